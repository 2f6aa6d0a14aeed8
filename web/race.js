/**
 * The race: one question and one seed, in plain decoding and with DSpark, recorded one after the other and replayed in
 * step, and what may be concluded. Pure.
 */

import { Answer } from "./answer.js";

/** @typedef {import("./protocol.js").Settings} Settings */
/** @typedef {import("./protocol.js").Step} Step */

/**
 * @typedef {Object} Verdict
 * @property {boolean|null} same        null: no verdict, one side did not finish
 * @property {number|null} at           first differing character, counted from 1
 * @property {[string, string]} around  plain's and DSpark's text from there
 * @property {number|null} sooner       by how much: plain's time over DSpark's; of speeds where the lengths differ
 */

/** What came of one answer, and when. */
export class Recording {
  /** @type {{at: number, text?: string, step?: Step}[]} */
  #events = [];

  /** @param {"plain"|"dspark"} mode @param {number} seed */
  constructor(mode, seed) {
    this.answer = new Answer({ mode, seed });
  }

  /** @param {string} text @param {number} now */
  delta(text, now) {
    this.answer.delta(text, now);
    this.#events.push({ at: now, text });
  }

  /** @param {Step} step @param {number} now */
  step(step, now) {
    this.answer.step(step, now);
    this.#events.push({ at: now, step });
  }

  /** Its clock starts at its first text: to read the question is the same work on both sides. */
  get start() {
    return this.#events.find(({ text }) => text)?.at ?? 0;
  }

  get length_ms() {
    return Math.max(0, (this.#events.at(-1)?.at ?? 0) - this.start);
  }

  /** @returns {(elapsed_ms: number) => Answer} what was there then; the calls go forward in time */
  play() {
    const answer = new Answer(this.answer);
    let next = 0;
    answer.sent(this.start);
    return (elapsed_ms) => {
      for (; next < this.#events.length && this.#events[next].at - this.start <= elapsed_ms; next++) {
        const { at, text, step } = this.#events[next];
        if (step) answer.step(step, at);
        else answer.delta(/** @type {string} */ (text), at);
      }
      if (next === this.#events.length && !answer.end && this.answer.end) answer.finish(this.answer.end);
      return answer;
    };
  }
}

/**
 * Which verification makes the same seed give the same text.
 * @param {Settings} settings
 * @returns {"rejection"|"coupled"}
 */
export function raceVerification(settings) {
  return settings.temperature > 0 ? "coupled" : settings.verification;
}

/**
 * Counted in characters as people see them in an editor (code points), from 0; -1 when there is none.
 * @param {string} a
 * @param {string} b
 */
export function firstDifference(a, b) {
  if (a === b) return -1;
  const [as, bs] = [Array.from(a), Array.from(b)];
  let i = 0;
  while (i < as.length && i < bs.length && as[i] === bs[i]) i++;
  return i;
}

/**
 * @param {Recording} plain
 * @param {Recording} dspark
 * @returns {Verdict}
 */
export function judge(plain, dspark) {
  const finished = ({ answer }) => answer.end?.status === "completed" || answer.end?.status === "incomplete";
  if (!finished(plain) || !finished(dspark)) return { same: null, at: null, around: ["", ""], sooner: null };
  const [a, b] = [plain.answer.text, dspark.answer.text];
  const at = firstDifference(a, b);
  const from = (/** @type {string} */ text) => Array.from(text).slice(at, at + 24).join("");
  const [slow, fast] = [plain.answer.snapshot(), dspark.answer.snapshot()];
  const ratio = at < 0 ? slow.decode_ms / fast.decode_ms
    : /** @type {number} */ (fast.tokens_per_s) / /** @type {number} */ (slow.tokens_per_s);
  return {
    same: at < 0,
    at: at < 0 ? null : at + 1,
    around: at < 0 ? ["", ""] : [from(a), from(b)],
    sooner: slow.tokens_per_s && fast.tokens_per_s && Number.isFinite(ratio) ? ratio : null,
  };
}
