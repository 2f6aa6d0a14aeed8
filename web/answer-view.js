/**
 * One answer on the page: its text by origin or formatted, its figures, its rounds. Events only change state; all
 * DOM work happens once a frame and appends.
 */

import { beforeNextFrame, h } from "./dom.js";
import { GrowingMarkdown } from "./markdown.js";
import { Figures, duration, figure } from "./metrics.js";
import { TextByOrigin } from "./origin.js";
import { explain } from "./protocol.js";
import { RoundStrip } from "./strip.js";

/** @typedef {import("./protocol.js").Step} Step */
/** @typedef {import("./protocol.js").End} End */
/** @typedef {"tokens"|"formatted"} Show */

/** What the head of an answer says about how it ended. */
const ENDINGS = { completed: "", incomplete: "cut at the token limit", failed: "failed", cancelled: "stopped by the server",
  lost: "connection lost" };

export class AnswerView {
  origin = new TextByOrigin();
  /** @type {End|null} */
  end = null;
  #asked = false;
  #stopped = false;
  /** @type {Show} */
  #show;
  #figures = new Figures();
  /** @type {HTMLElement[]} the spans of each round */
  #rounds = [];
  #rest = document.createTextNode("");
  #nextMarkdown = 0;
  #markdownLength = 0;
  /** @type {HTMLElement|null} */
  #lit = null;
  #paint = () => this.#paintNow();

  /**
   * @param {{mode: "dspark"|"plain", seed: number|null, gamma: number, show: Show, title: string,
   *          onPaint?: () => void}} options `gamma` is how high the strip is; `seed` is shown unless it is null
   */
  constructor({ mode, seed, gamma, show, title, onPaint }) {
    this.mode = mode;
    this.onPaint = onPaint;
    this.#show = show;
    this.strip = new RoundStrip({ gamma, onSelect: (round) => this.#select(round) });

    this.state = h("span", { class: "answer-state" }, "not started");
    this.tokens = h("div", { class: "text tokens", onpointerover: (event) => this.#hover(event),
      onpointerleave: () => this.strip.select(-1) });
    this.tokens.append(this.#rest);
    this.prose = h("div", { class: "text prose" });
    this.markdown = new GrowingMarkdown(this.prose);
    this.notice = h("div", { class: "notice", role: "alert", hidden: true });

    this.values = {
      speed: h("span", {}, "–"), tau: h("dd", {}, "–"), ell: h("dd", {}, "–"), rounds: h("dd", {}, "0"),
      tokens: h("dd", {}, "0"), streams: h("dd", {}, "–"), first: h("dd", {}, "–"), seed: h("dd", {}, String(seed)),
    };
    const row = (/** @type {string} */ term, /** @type {HTMLElement} */ value, /** @type {string} */ help) =>
      h("div", { title: help }, h("dt", {}, term), value);
    this.roundLine = h("p", { class: "round-line" });
    this.figures = h("aside", { class: "figures", "aria-label": "Figures of this answer" },
      h("p", { class: "speed" }, this.values.speed, h("span", { class: "unit" }, " tokens/s")),
      h("dl", {},
        row("accepted τ", this.values.tau, "Accepted length: tokens committed a round, the target’s own included"),
        row("verified ℓ", this.values.ell, "Mean verification length: draft tokens sent to the target a round"),
        row("rounds", this.values.rounds, "Target passes that this answer took"),
        row("tokens", this.values.tokens, "Tokens of this answer"),
        row("batch", this.values.streams, "Streams that shared the last round"),
        row("first text", this.values.first, "From the question sent to the first text"),
        ...(seed === null ? [] : [row("seed", this.values.seed, "The seed that repeats this answer")]),
      ),
      this.strip.element, this.roundLine);

    this.element = h("article", { class: "answer", "data-mode": mode, "aria-busy": "true", "aria-label": title },
      h("p", { class: "answer-head" },
        h("span", { class: "mode-name" }, mode === "plain" ? "Plain" : "DSpark"), this.state),
      h("div", { class: "answer-body" }, this.tokens, this.prose, this.notice),
      this.figures);
    this.show(show);
    this.#describeRound(-1);
  }

  get text() {
    return this.origin.text;
  }

  snapshot() {
    return this.#figures.snapshot();
  }

  sent() {
    this.#asked = true;
    this.#figures.sent(performance.now());
    this.state.textContent = "waiting";
  }

  created() {
    if (!this.#stopped) this.state.textContent = "answering";
  }

  /** The reader wants no more of it; its end is still to come. */
  stopping() {
    if (this.end) return;
    this.#stopped = true;
    this.state.textContent = "stopping";
  }

  /** @param {string} text */
  delta(text) {
    if (text !== "") this.#figures.text(performance.now());
    this.origin.delta(text);
    beforeNextFrame(this.#paint);
  }

  /** @param {Step} step */
  step(step) {
    // A round's text comes before its step or after it; what is longer has something before the round.
    this.#figures.step(step, performance.now(), this.text.length > step.text.length);
    this.origin.step(this.strip.steps.length, step.pieces ?? []);
    this.strip.add(step);
    beforeNextFrame(this.#paint);
  }

  /** @param {string} text the whole text, as the server has it */
  done(text) {
    if (text.startsWith(this.text)) this.delta(text.slice(this.text.length));
  }

  /** @param {End} end */
  finish(end) {
    this.end = end;
    this.#figures.end(end.usage);
    beforeNextFrame(this.#paint);
  }

  /**
   * @param {string} title
   * @param {{detail?: string, retry?: () => void}} [more]
   */
  notify(title, { detail, retry } = {}) {
    this.notice.replaceChildren(h("p", {}, title));
    if (detail) this.notice.append(h("p", { class: "detail" }, detail));
    if (retry) this.notice.append(h("button", { type: "button", class: "quiet", onclick: retry }, "Try again"));
    this.notice.hidden = false;
  }

  /**
   * Say why an answer did not come.
   * @param {End} end
   * @param {() => void} retry
   */
  notifyEnd(end, retry) {
    if (end.status === "lost") {
      this.notify("The connection was lost before the answer ended.", { retry });
    } else if (end.status === "cancelled" && this.#asked && !this.#stopped) {
      this.notify("The server stopped this answer before its end.", { retry });
    } else if (end.status === "failed") {
      const { title, detail, retry: helps } = explain(end.error);
      this.notify(title, { detail, retry: helps ? retry : undefined });
    }
  }

  /** @param {Show} show */
  show(show) {
    this.#show = show;
    this.tokens.hidden = show !== "tokens";
    this.prose.hidden = show !== "formatted";
    if (show === "formatted") {
      this.#nextMarkdown = 0;
      this.#markdownLength = -1;
      this.#paintNow();
    }
  }

  #paintNow() {
    for (const span of this.origin.take(this.end !== null)) {
      if (span.origin === "drafted") this.element.dataset.drafted = "";
      this.#round(span.round).append(
        span.origin === null ? span.text : h("span", { class: span.origin }, span.text));
    }
    this.#rest.data = this.origin.rest;
    this.tokens.append(this.#rest);
    this.strip.paint();
    if (this.#show === "formatted") this.#paintMarkdown();
    this.#paintFigures();
    if (this.end && this.element.hasAttribute("aria-busy")) {
      this.element.removeAttribute("aria-busy");
      this.element.dataset.status = this.end.status;
      if (!this.#asked) this.state.textContent = "not started";
      else if (this.#stopped && this.end.status === "cancelled") this.state.textContent = "stopped";
      else this.state.textContent = ENDINGS[this.end.error?.code === "server_shutdown" ? "cancelled" : this.end.status];
    }
    this.onPaint?.();
  }

  #paintMarkdown() {
    if (this.end) {
      this.markdown.finish(this.text);
      return;
    }
    // A single block can be long (a file of code): the longer it takes to render, the less often it is rendered.
    const now = performance.now();
    if (this.#markdownLength === this.text.length) return;
    if (now < this.#nextMarkdown) {
      beforeNextFrame(this.#paint);
      return;
    }
    this.markdown.update(this.text);
    this.#markdownLength = this.text.length;
    this.#nextMarkdown = performance.now() + 8 * (performance.now() - now);
  }

  #paintFigures() {
    const now = this.#figures.snapshot();
    this.values.speed.textContent = figure(now.tokens_per_s);
    this.values.tau.textContent = figure(now.tau);
    this.values.ell.textContent = figure(now.ell);
    this.values.rounds.textContent = String(now.rounds);
    this.values.tokens.textContent = String(now.tokens);
    this.values.streams.textContent = now.streams === null ? "–" : String(now.streams);
    this.values.first.textContent = duration(now.first_ms);
  }

  /** @param {number} round -1: text that no round claimed */
  #round(round) {
    if (round < 0) {
      const element = h("span", {});
      this.tokens.insertBefore(element, this.#rest);
      return element;
    }
    let element = this.#rounds[round];
    if (!element) {
      element = h("span", { class: "round", "data-round": round });
      this.#rounds[round] = element;
      this.tokens.insertBefore(element, this.#rest);
    }
    return element;
  }

  /** @param {PointerEvent} event */
  #hover(event) {
    const round = /** @type {Element} */ (event.target).closest("[data-round]");
    if (round) this.strip.select(Number(/** @type {HTMLElement} */ (round).dataset.round));
  }

  /** @param {number} round */
  #select(round) {
    this.#lit?.classList.remove("lit");
    this.#lit = this.#rounds[round] ?? null;
    this.#lit?.classList.add("lit");
    this.#describeRound(round);
  }

  /** @param {number} round */
  #describeRound(round) {
    const step = this.strip.steps[round];
    if (!step) {
      this.roundLine.replaceChildren(this.mode === "plain"
        ? "One column a round: plain decoding commits one token in each."
        : "One column a round: own token, accepted, hollow where rejected, dot where not sent.");
      return;
    }
    const line = [`Round ${round + 1}: `, h("b", {}, `${step.accepted} of ${step.scheduled}`), " accepted"];
    if (step.drafted > step.scheduled) line.push(`, ${step.drafted - step.scheduled} not sent`);
    line.push(`. Draft ${step.t_draft_ms.toFixed(1)} ms, verify ${step.t_verify_ms.toFixed(1)} ms.`);
    if (step.survival?.length) {
      line.push(h("br"), "survival ");
      step.survival.forEach((a, k) => {
        line.push(h("span", { class: k < step.scheduled ? "a sent" : "a" }, a.toFixed(2).replace(/^0/, "")), " ");
      });
    }
    this.roundLine.replaceChildren(...line);
  }
}
