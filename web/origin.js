/**
 * Which part of an answer's text came from whom. Deltas are the text; steps say who wrote it. A step follows its
 * delta, so its text is what the text ends with at that moment; should it come first, its text is looked for. Text
 * before the first round is the target's own: the token that reading the prompt gives. Elsewhere, what no step claims
 * stays unmarked. Pure.
 */

/** @typedef {"drafted"|"own"|null} Origin */
/** @typedef {{text: string, origin: Origin, round: number}} Span */

export class TextByOrigin {
  text = "";
  #placed = 0;
  #first = true;
  /** @type {{round: number, pieces: [string, boolean][], text: string, at: number}[]} */
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
    if (spoken.length === 0) return;
    const text = spoken.map(([piece]) => piece).join("");
    const at = this.text.endsWith(text) ? this.text.length - text.length : -1;
    this.#waiting.push({ round, pieces: spoken, text, at });
  }

  /**
   * What can be placed now, in order, without gaps.
   * @param {boolean} [ended] no step will follow
   * @returns {Span[]}
   */
  take(ended = false) {
    /** @type {Span[]} */
    const spans = [];
    let step;
    while ((step = this.#waiting[0])) {
      const at = step.at >= this.#placed ? step.at : this.text.indexOf(step.text, this.#placed);
      if (at < 0) break; // its delta is still to come
      if (at > this.#placed) {
        spans.push({ text: this.text.slice(this.#placed, at), origin: this.#first ? "own" : null, round: -1 });
      }
      this.#first = false;
      this.#placed = at;
      for (const [text, drafted] of step.pieces) {
        spans.push({ text, origin: drafted ? "drafted" : "own", round: step.round });
        this.#placed += text.length;
      }
      this.#waiting.shift();
    }
    if (ended && this.#first && this.rest !== "") {
      spans.push({ text: this.rest, origin: "own", round: -1 }); // the prompt's token was the only one
      this.#placed = this.text.length;
    }
    return spans;
  }

  /** Text that no step has claimed yet. */
  get rest() {
    return this.text.slice(this.#placed);
  }
}
