/** What the page says about answers, rounds and races, in words. Pure. */

import { duration, figure } from "./metrics.js";

/** @typedef {import("./protocol.js").Step} Step */
/** @typedef {import("./answer.js").Answer} Answer */
/** What the server said about its drafting. @typedef {{gamma: number, schedule: string}} Drafting */

/** How an answer ended, where that needs saying. */
export const ENDINGS = { completed: "", incomplete: "cut at the token limit", failed: "failed",
  cancelled: "stopped by the server", lost: "connection lost" };

/** @param {number} n @param {string} one @param {string} [many] */
export const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

/**
 * Why nothing was drafted.
 * @param {Drafting} drafting
 */
export function whyNoDrafts({ gamma, schedule }) {
  if (gamma === 0) return "This server has no drafter, so nothing is guessed ahead.";
  if (schedule === "none" || schedule === "fixed:0") return "Drafting is switched off on this server.";
  return "Drafting is paused: at this load it would not pay.";
}

/**
 * The first line of an answer.
 * @param {Answer} answer
 * @param {Drafting} drafting
 * @param {number|null} [ratio] speed over that of the same answer without drafting, where that was measured
 */
export function firstLine(answer, drafting, ratio = null) {
  const { tokens, guessed } = answer.snapshot();
  if (tokens === 0) return "";
  if (answer.mode === "plain") return "Written without drafting, one token at a time.";
  if (!answer.drafted) {
    const soon = !answer.end && drafting.gamma > 0 && !answer.paused; // the first rounds may yet be followed by others
    return soon ? "" : whyNoDrafts(drafting);
  }
  const so_far = answer.end ? "" : " so far";
  const share = guessed === 0 ? `No guess was right${so_far}: the model wrote all of it itself.`
    : `${Math.round((100 * guessed) / tokens)}\u00a0% of this answer was guessed ahead${so_far}.`;
  if (!answer.end && answer.paused) return `${share} ${whyNoDrafts(drafting)}`;
  return ratio === null ? share : `${share} ${timesAsFast(ratio)}`;
}

/** @param {number} ratio */
function timesAsFast(ratio) {
  if (Math.abs(ratio - 1) < 0.05) return "As fast as without.";
  return ratio > 1 ? `${times(ratio)}\u00a0× as fast as without.` : `${times(1 / ratio)}\u00a0× as slow as without.`;
}

/** @param {number} ratio */
export const times = (ratio) => ratio.toFixed(ratio < 9.95 ? 1 : 0);

/**
 * One round, as whoever points at its run reads it.
 * @param {Step} step
 * @param {number} round
 * @returns {[string, string]}
 */
export function roundWords(step, round) {
  const sure = step.survival?.[step.accepted - 1];
  const what = step.accepted === 1 ? "it" : step.accepted === 2 ? "both" : `all ${step.accepted}`;
  const found = step.source === "lookup";
  return [
    `Round ${round + 1}: ${count(step.accepted, "guess", "guesses")} accepted at once`,
    `${found ? "Found earlier in this text: " : ""}${step.drafted} ${found ? "guesses" : "drafted"}, ${step.scheduled} verified, ${step.accepted} accepted.` +
      (sure === undefined ? "" : ` Before the check ${found ? `${what} had` : `the drafter gave ${what}`} a chance of ${percent(sure)}.`),
  ];
}

/** @param {number} share */
const percent = (share) => (share > 0.995 ? "over 99\u00a0%" : share < 0.01 ? "under 1\u00a0%" : `${Math.round(100 * share)}\u00a0%`);

/**
 * What came of an answer that was asked for again without drafting.
 * @param {Answer} answer
 * @param {Answer} plain
 * @param {boolean} bound whether the seed fixes the text
 */
export function comparison(answer, plain, bound) {
  const [with_, without] = [answer.snapshot(), plain.snapshot()];
  const speeds = with_.tokens_per_s && without.tokens_per_s
    ? `${timesAsFast(with_.tokens_per_s / without.tokens_per_s)} ${figure(with_.tokens_per_s)} tokens a second with drafting, ${figure(without.tokens_per_s)} without; one run each. ` : "";
  const shared = others([answer, plain]);
  const text = answer.text === plain.text ? "The same text."
    : bound ? "Not the same text: where two tokens were almost equally likely, rounding can tip the choice."
    : "Another text: at this temperature, and with this verification, each run is a draw of its own.";
  return `${speeds}${text}${shared}`;
}

/** @param {Answer[]} answers */
export function others(answers) {
  return answers.some(({ steps }) => steps.some((step) => step.streams > 1))
    ? " Other answers shared the machine meanwhile, so these are not the times of a machine alone." : "";
}

/**
 * The verdict of a race.
 * @param {import("./race.js").Verdict} verdict
 * @returns {string}
 */
export function headline({ same, sooner }) {
  if (same === null) return "No verdict";
  const text = same ? "Same text" : "Texts differ";
  if (sooner === null) return `${text}.`;
  if (Math.abs(sooner - 1) < 0.05) return same ? `${text}, in the same time.` : `${text}; at the same speed.`;
  if (!same) return sooner > 1 ? `${text}; ${times(sooner)}\u00a0× as fast.` : `${text}; ${times(1 / sooner)}\u00a0× as slow.`;
  return sooner > 1 ? `${text}, ${times(sooner)}\u00a0× sooner.` : `${text}, ${times(1 / sooner)}\u00a0× later.`;
}

/**
 * @param {Answer} plain
 * @param {Answer} dspark
 */
export function verdictTimes(plain, dspark) {
  return `DSpark ${duration(dspark.snapshot().decode_ms)}, plain ${duration(plain.snapshot().decode_ms)}, counted from the first text.`;
}
