/**
 * The figures of one answer, from its rounds. Pure: the caller brings the clock (milliseconds).
 */

/** @typedef {import("./protocol.js").Step} Step */

/**
 * @typedef {Object} Snapshot
 * @property {number} tokens
 * @property {number} guessed         of these, drafted ahead and accepted
 * @property {number} rounds
 * @property {number|null} tokens_per_s  while decoding: the first text and the wait for it do not count
 * @property {number|null} tau           accepted length τ, the bonus token included
 * @property {number|null} ell           mean verification length ℓ
 * @property {number|null} streams       in the batch of the last round
 * @property {number|null} first_ms      from the question sent to the first text
 * @property {number} decode_ms          from the first text to the last
 */

export class Figures {
  #rounds = 0;
  #accepted = 0;
  #scheduled = 0;
  #tokens = 0;
  #tokensOfFirst = 0;
  #cut = 0;
  #streams = 0;
  #sentAt = 0;
  /** @type {number|null} */
  #textAt = null;
  #firstAt = 0;
  #lastAt = 0;

  /** @param {number} now when the question was sent */
  sent(now) {
    this.#sentAt = now;
  }

  /** @param {number} now when some text came */
  text(now) {
    this.#textAt ??= now;
  }

  /**
   * @param {Step} step
   * @param {number} now
   * @param {boolean} [late] text of an earlier moment came before this round's, though no round did: the prompt's
   *   pass gives the first token
   */
  step(step, now, late = false) {
    const tokens = step.accepted + 1;
    if (this.#rounds === 0) {
      const prefill = late && this.#textAt !== null;
      this.#firstAt = prefill ? /** @type {number} */ (this.#textAt) : now;
      this.#tokensOfFirst = prefill ? 1 : tokens;
      this.#tokens = prefill ? 1 : 0;
      this.#textAt ??= now;
    }
    this.#lastAt = now;
    this.#rounds += 1;
    this.#tokens += tokens;
    this.#accepted += step.accepted;
    this.#scheduled += step.scheduled;
    this.#streams = step.streams;
  }

  /** @param {Record<string, any>|null} usage of the terminal event; it knows where a stop cut the last round */
  end(usage) {
    if (typeof usage?.output_tokens !== "number") return;
    // What a stop cut off the last round was its own token first, then accepted ones.
    this.#cut = Math.max(0, this.#tokens - usage.output_tokens - 1);
    this.#tokens = usage.output_tokens;
  }

  /** @returns {Snapshot} */
  snapshot() {
    const rounds = this.#rounds;
    const decode_ms = rounds ? this.#lastAt - this.#firstAt : 0;
    const later = this.#tokens - this.#tokensOfFirst;
    return {
      tokens: this.#tokens,
      guessed: this.#accepted - this.#cut,
      rounds,
      tokens_per_s: decode_ms > 0 && later > 0 ? (later / decode_ms) * 1000 : null,
      tau: rounds ? 1 + this.#accepted / rounds : null,
      ell: rounds ? this.#scheduled / rounds : null,
      streams: rounds ? this.#streams : null,
      first_ms: this.#textAt === null ? null : this.#textAt - this.#sentAt,
      decode_ms,
    };
  }
}

/**
 * A figure as text: three significant digits are what the eye compares.
 * @param {number|null} value
 */
export function figure(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  if (value >= 100) return value.toFixed(0);
  return value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

/** @param {number|null} ms */
export function duration(ms) {
  if (ms === null) return "–";
  return ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
}
