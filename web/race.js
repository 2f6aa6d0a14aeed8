/**
 * The race: one question and one seed, in plain decoding and with DSpark, and what may be concluded. Pure but for
 * `ask`, which the caller brings.
 */

/** @typedef {import("./protocol.js").Settings} Settings */
/** @typedef {{text: string, status: string, tokens_per_s: number|null, decode_ms: number}} Finish */

/**
 * @typedef {Object} Verdict
 * @property {boolean|null} same        null: no verdict, one side did not finish
 * @property {number|null} at           first differing character, counted from 1
 * @property {[string, string]} around  plain's and DSpark's text from there
 * @property {number|null} ratio        DSpark's tokens/s over plain's
 */

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
 * @param {Finish} plain
 * @param {Finish} dspark
 * @returns {Verdict}
 */
export function judge(plain, dspark) {
  const finished = (/** @type {Finish} */ f) => f.status === "completed" || f.status === "incomplete";
  if (!finished(plain) || !finished(dspark)) return { same: null, at: null, around: ["", ""], ratio: null };
  const at = firstDifference(plain.text, dspark.text);
  const from = (/** @type {string} */ text) => Array.from(text).slice(at, at + 24).join("");
  return {
    same: at < 0,
    at: at < 0 ? null : at + 1,
    around: at < 0 ? ["", ""] : [from(plain.text), from(dspark.text)],
    ratio: plain.tokens_per_s && dspark.tokens_per_s ? dspark.tokens_per_s / plain.tokens_per_s : null,
  };
}

/**
 * Why two texts of the same seed may differ, and what to do about it.
 * @param {Settings} settings
 */
export function whyDifferent(settings) {
  if (settings.temperature > 0 && raceVerification(settings) === "rejection") {
    return "At a temperature above 0, rejection verification keeps the distribution of the text, not the text itself. " +
      "Set the temperature to 0 or choose coupled verification to compare texts.";
  }
  return "Both follow the same rule, but a pass over several tokens may add floating-point numbers in another order " +
    "than a pass over one. Where two tokens were almost equally likely, that can tip the choice; from there on the texts go their own ways.";
}

/**
 * @param {number|null} ratio
 */
export function speedSentence(ratio) {
  if (ratio === null) return "";
  if (Math.abs(ratio - 1) < 0.02) return "DSpark was as fast as plain decoding.";
  const times = ratio > 1 ? ratio : 1 / ratio;
  return `DSpark was ${times.toFixed(2)} times as ${ratio > 1 ? "fast" : "slow"}.`;
}
