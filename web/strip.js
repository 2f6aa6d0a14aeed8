/**
 * The strip of rounds: one column a round, read from the bottom. The target's own token, then the accepted draft
 * tokens, then those that were sent and rejected (hollow), then those that were not sent (a dot). For the keyboard
 * and for screen readers it is a slider over the rounds.
 */

import { h, svg } from "./dom.js";

/** @typedef {import("./protocol.js").Step} Step */

const CELL = 6;
const GAP = 1.5;
const PITCH = CELL + GAP;

/** @param {number} level 0 is the bottom cell @param {number} height */
const yOf = (level, height) => height - (level + 1) * PITCH + GAP;

export class RoundStrip {
  /** @type {Step[]} */
  steps = [];
  #selected = -1;
  #drawn = 0;
  #levels;

  /**
   * @param {{gamma: number, onSelect: (round: number) => void}} options
   */
  constructor({ gamma, onSelect }) {
    this.onSelect = onSelect;
    this.#levels = gamma + 1;
    this.marker = svg("rect", { class: "marker", width: PITCH, y: 0, visibility: "hidden" });
    this.columns = svg("g");
    this.svg = svg("svg", { class: "rounds", "aria-hidden": "true" }, this.marker, this.columns);
    this.element = h("div", {
      class: "strip", role: "slider", tabindex: 0, "aria-label": "Rounds of this answer",
      "aria-valuemin": 0, "aria-valuemax": 0, "aria-valuenow": 0, "aria-valuetext": "No round yet",
      onkeydown: (event) => this.#key(event),
      onpointermove: (event) => this.#point(event),
      onpointerdown: (event) => this.#point(event),
    }, this.svg);
  }

  /** @param {Step} step */
  add(step) {
    this.steps.push(step);
  }

  /** Draw what was added since the last frame. */
  paint() {
    if (this.#drawn === this.steps.length) return;
    const follow = this.#selected < 0;
    const levels = Math.max(this.#levels, ...this.steps.slice(this.#drawn).map((step) => step.scheduled + 1));
    if (levels > this.#levels) {
      this.#levels = levels;
      this.columns.replaceChildren();
      this.#drawn = 0;
    }
    const height = this.#levels * PITCH;
    for (; this.#drawn < this.steps.length; this.#drawn++) {
      this.columns.append(column(this.steps[this.#drawn], this.#drawn * PITCH, this.#levels));
    }
    const width = this.steps.length * PITCH;
    this.svg.setAttribute("width", String(width));
    this.svg.setAttribute("height", String(height));
    this.marker.setAttribute("height", String(height));
    this.element.setAttribute("aria-valuemin", "1");
    this.element.setAttribute("aria-valuemax", String(this.steps.length));
    if (follow) {
      this.element.setAttribute("aria-valuetext", this.summary());
      this.element.scrollLeft = width;
    }
  }

  /** @param {number} round its index; -1 for none */
  select(round) {
    const step = this.steps[round];
    if (!step) round = -1;
    if (round === this.#selected) return;
    this.#selected = round;
    this.marker.setAttribute("visibility", round < 0 ? "hidden" : "visible");
    if (step) {
      const x = round * PITCH;
      this.marker.setAttribute("x", String(x - GAP / 2));
      this.element.setAttribute("aria-valuenow", String(round + 1));
      this.element.setAttribute("aria-valuetext", describe(step, round, this.steps.length));
      if (x < this.element.scrollLeft) this.element.scrollLeft = x;
      else if (x + PITCH > this.element.scrollLeft + this.element.clientWidth) {
        this.element.scrollLeft = x + PITCH - this.element.clientWidth;
      }
    } else {
      this.element.setAttribute("aria-valuetext", this.summary());
    }
    this.onSelect(round);
  }

  /** The strip in words. */
  summary() {
    const n = this.steps.length;
    if (n === 0) return "No round yet";
    const mean = (/** @type {(step: Step) => number} */ of) =>
      (this.steps.reduce((sum, step) => sum + of(step), 0) / n).toFixed(1);
    return `${n} rounds; in the mean ${mean((s) => s.scheduled)} draft tokens checked and ${mean((s) => s.accepted)} accepted`;
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const last = this.steps.length - 1;
    const from = this.#selected < 0 ? last + 1 : this.#selected;
    const to = {
      ArrowLeft: from - 1, ArrowDown: from - 1, ArrowRight: from + 1, ArrowUp: from + 1,
      PageUp: from + 10, PageDown: from - 10, Home: 0, End: last,
    }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.select(Math.max(0, Math.min(last, to)));
  }

  /** @param {PointerEvent} event */
  #point(event) {
    if (event.pointerType === "touch" && event.type === "pointermove") return; // that is a scroll
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    const round = Math.floor(x / PITCH);
    if (round >= 0 && round < this.steps.length) this.select(round);
  }
}

/**
 * @param {Step} step
 * @param {number} round
 * @param {number} rounds
 */
export function describe(step, round, rounds) {
  return `Round ${round + 1} of ${rounds}: ${step.drafted} drafted, ${step.scheduled} checked, ${step.accepted} accepted`;
}

/**
 * @param {Step} step
 * @param {number} x
 * @param {number} levels a look into the text may find more guesses than there is room for; those that were sent have it
 */
function column(step, x, levels) {
  const height = levels * PITCH;
  const group = svg("g", {}, svg("rect", { class: "own", x, y: yOf(0, height), width: CELL, height: CELL }));
  for (let k = 0; k < Math.min(step.drafted, levels - 1); k++) {
    const y = yOf(k + 1, height);
    if (k < step.accepted) group.append(svg("rect", { class: "accepted", x, y, width: CELL, height: CELL }));
    else if (k < step.scheduled) {
      group.append(svg("rect", { class: "rejected", x: x + 0.5, y: y + 0.5, width: CELL - 1, height: CELL - 1 }));
    } else group.append(svg("circle", { class: "unsent", cx: x + CELL / 2, cy: y + CELL / 2, r: 0.9 }));
  }
  return group;
}
