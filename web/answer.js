/**
 * One answer as it is known: its text, which runs of it were guessed ahead, its rounds, its figures, its end. Pure: the
 * caller brings the clock (milliseconds), so an answer can be recorded, replayed and kept.
 */

import { Figures } from "./metrics.js";
import { TextByOrigin } from "./origin.js";

/** @typedef {import("./protocol.js").Step} Step */
/** @typedef {import("./protocol.js").End} End */
/** @typedef {import("./marks.js").Run} Run */

/** Rounds in a row without a draft from which on drafting counts as paused. */
const PAUSED = 8;
/** Text that no round claimed in so many characters is shown without waiting for one. */
const UNCLAIMED = 400;

export class Answer {
  /** @type {Run[]} */
  runs = [];
  /** @type {Step[]} */
  steps = [];
  /** @type {End|null} */
  end = null;
  /** @type {import("./metrics.js").Snapshot|null} of an answer that was kept */
  #kept = null;
  #origin = new TextByOrigin();
  #figures = new Figures();
  #placed = 0;

  /** @param {{mode: "dspark"|"plain", seed: number|null}} options */
  constructor({ mode, seed }) {
    this.mode = mode;
    this.seed = seed;
  }

  get text() {
    return this.#origin.text;
  }

  /** What can be shown: the part whose origin is known, or all once nothing more can tell. */
  get shown() {
    const { text } = this;
    return this.end || text.length - this.#placed > UNCLAIMED ? text : text.slice(0, this.#placed);
  }

  /** Whether the last rounds drafted nothing, though earlier ones may have. */
  get paused() {
    const last = this.steps.slice(-PAUSED);
    return this.mode === "dspark" && last.length === PAUSED && last.every((step) => step.drafted === 0);
  }

  get drafted() {
    return this.steps.some((step) => step.drafted > 0);
  }

  /** @returns {import("./metrics.js").Snapshot} */
  snapshot() {
    return this.#kept ?? this.#figures.snapshot();
  }

  /** @param {number} now */
  sent(now) {
    this.#figures.sent(now);
  }

  /** @param {string} text @param {number} now */
  delta(text, now) {
    if (text !== "") this.#figures.text(now);
    this.#origin.delta(text);
  }

  /** @param {Step} step @param {number} now */
  step(step, now) {
    // A round's text comes before its step or after it; what is longer has something before the round.
    this.#figures.step(step, now, this.text.length > step.text.length);
    this.#origin.step(this.steps.length, step.pieces ?? []);
    this.steps.push(step);
    this.#take();
  }

  /** @param {string} text the whole text, as the server has it @param {number} now */
  done(text, now) {
    if (text.startsWith(this.text)) this.delta(text.slice(this.text.length), now);
  }

  /** @param {End} end */
  finish(end) {
    this.end = end;
    this.#figures.end(end.usage);
    this.#take();
  }

  #take() {
    for (const { text, origin, round } of this.#origin.take(this.end !== null)) {
      const start = this.#placed;
      this.#placed += text.length;
      if (origin !== "drafted") continue;
      const last = this.runs.at(-1);
      if (last?.round === round && last.end === start) last.end = this.#placed;
      else this.runs.push({ start, end: this.#placed, round });
    }
  }

  /** What a browser keeps of it. */
  toJSON() {
    const { mode, seed, text, end } = this;
    return {
      mode, seed, text, end, figures: this.snapshot(), runs: this.runs.map((run) => [run.start, run.end, run.round]),
      steps: this.steps.map((s) => [s.drafted, s.scheduled, s.accepted, s.t_draft_ms, s.t_verify_ms, s.streams,
        (s.survival ?? []).map((a) => Math.round(a * 1000) / 1000), ...(s.source === "lookup" ? [s.source] : [])]),
    };
  }

  /** @param {any} kept */
  static fromJSON(kept) {
    const answer = new Answer(kept);
    answer.#origin.delta(kept.text);
    answer.#kept = kept.figures;
    answer.end = kept.end ?? { status: "lost", usage: null, reason: "left", error: null };
    answer.runs = kept.runs.map(([start, end, round]) => ({ start, end, round }));
    answer.steps = kept.steps.map(([drafted, scheduled, accepted, t_draft_ms, t_verify_ms, streams, survival, source]) =>
      ({ drafted, scheduled, accepted, t_draft_ms, t_verify_ms, streams, survival, source }));
    return answer;
  }
}
