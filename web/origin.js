/**
 * Which part of an answer's text came from whom. Deltas are the text; steps say who wrote it. The two may come in
 * either order, and a step can be missing, so each step is placed where its text is found and what no step claims
 * stays unmarked. Pure.
 */

/** @typedef {"drafted"|"own"|null} Origin */
/** @typedef {{text: string, origin: Origin, round: number}} Span */

export class TextByOrigin {
  text = "";
  #placed = 0;
  /** @type {{round: number, pieces: [string, boolean][]}[]} */
  #waiting = [];

  /** @param {string} text */
  delta(text) {
    this.text += text;
  }

  /**
   * @param {number} round its index
   * @param {[string, boolean][]} pieces
   */
  step(round, pieces) {
    const spoken = pieces.filter(([text]) => text !== "");
    if (spoken.length > 0) this.#waiting.push({ round, pieces: spoken });
  }

  /**
   * What can be placed now, in order, without gaps.
   * @returns {Span[]}
   */
  take() {
    /** @type {Span[]} */
    const spans = [];
    let step;
    while ((step = this.#waiting[0])) {
      const at = this.text.indexOf(step.pieces.map(([text]) => text).join(""), this.#placed);
      if (at < 0) break; // its delta is still to come
      if (at > this.#placed) spans.push({ text: this.text.slice(this.#placed, at), origin: null, round: -1 });
      this.#placed = at;
      for (const [text, drafted] of step.pieces) {
        spans.push({ text, origin: drafted ? "drafted" : "own", round: step.round });
        this.#placed += text.length;
      }
      this.#waiting.shift();
    }
    return spans;
  }

  /** Text that no step has claimed yet. */
  get rest() {
    return this.text.slice(this.#placed);
  }
}
