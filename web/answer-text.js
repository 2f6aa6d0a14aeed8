/**
 * The text of an answer: formatted, its accepted runs tinted. A run that is pointed at, touched or has the focus lights
 * up and tells its round; the arrow keys go from run to run.
 */

import { h } from "./dom.js";
import { GrowingMarkdown } from "./markdown.js";
import { hideTip, showTip } from "./tip.js";

/** @typedef {import("./answer.js").Answer} Answer */

export class AnswerText {
  #painted = -1;
  #next = 0;
  #finished = false;
  #lit = -1;
  /** @type {Answer|null} */
  #answer = null;

  /** @param {{onRound?: (round: number) => void}} [options] called with -1 when none is pointed at */
  constructor({ onRound } = {}) {
    this.onRound = onRound;
    this.element = h("div", {
      class: "prose",
      onpointerover: (event) => this.#point(event.target),
      onclick: (event) => this.#point(event.target),
      onpointerleave: () => this.light(-1),
      onfocusin: (event) => this.#point(event.target),
      onfocusout: () => this.light(-1),
      onkeydown: (event) => this.#key(event),
    });
    this.markdown = new GrowingMarkdown(this.element);
  }

  /**
   * @param {Answer} answer
   * @returns {boolean} whether there is more to paint, later
   */
  paint(answer) {
    this.#answer = answer;
    if (answer.end) {
      if (!this.#finished) this.markdown.finish(answer.text, answer.runs, answer.end.status !== "completed");
      this.#finished = true;
      const first = this.element.querySelector("mark");
      if (first) first.tabIndex = 0; // one stop for the tab key; the arrows go on from there
      return false;
    }
    const { shown } = answer;
    if (shown.length === this.#painted) return false;
    // The longer a block takes to render, the less often it is rendered.
    const now = performance.now();
    if (now < this.#next) return true;
    this.markdown.update(shown, answer.runs);
    this.#painted = shown.length;
    this.#next = now + 4 * (performance.now() - now);
    return false;
  }

  /** @param {number} round -1: none */
  light(round) {
    if (round === this.#lit) return;
    for (const run of this.element.querySelectorAll(".lit")) run.classList.remove("lit");
    for (const run of this.#pieces(round)) run.classList.add("lit");
    this.#lit = round;
    if (round < 0) hideTip();
    this.onRound?.(round);
  }

  /** @param {EventTarget|null} target */
  #point(target) {
    const run = /** @type {HTMLElement|null} */ (/** @type {Element} */ (target).closest("mark"));
    const marked = document.documentElement.dataset.marks !== "off";
    const round = run && marked ? Number(run.dataset.round) : -1;
    this.light(round);
    const step = this.#answer?.steps[round];
    if (run && step) showTip(run, step, round);
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const run = /** @type {HTMLElement} */ (event.target);
    const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!way || !run.matches("mark")) return;
    event.preventDefault();
    const runs = /** @type {HTMLElement[]} */ ([...this.element.querySelectorAll("mark")]);
    for (let i = runs.indexOf(run) + way; runs[i]; i += way) {
      if (runs[i].dataset.round === run.dataset.round) continue;
      run.removeAttribute("tabindex");
      runs[i].tabIndex = 0;
      runs[i].focus();
      return;
    }
  }

  /** @param {number} round */
  #pieces(round) {
    return round < 0 ? [] : this.element.querySelectorAll(`mark[data-round="${round}"]`);
  }
}
