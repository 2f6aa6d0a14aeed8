/**
 * One answer of the chat: a first line in words, the text, what can be done with it, and how it was made. Events only
 * change the answer; what shows is painted a few times a second.
 */

import { AnswerText } from "./answer-text.js";
import { Curious } from "./curious.js";
import { copyButton, h, paintSoon } from "./dom.js";
import { figure } from "./metrics.js";
import { explain } from "./protocol.js";
import { ENDINGS, firstLine } from "./words.js";

/** @typedef {import("./answer.js").Answer} Answer */
/** @typedef {import("./protocol.js").End} End */
/** @typedef {{label: string, title: string, run: () => void}} Action */

/** The first line changes so often, no oftener: it is read, not watched. */
const LINE_MS = 300;
/** After so long without a text the wait is explained. */
const WAIT_MS = 1500;

export class AnswerView {
  /** @type {number|null} speed over that without drafting, once measured */
  ratio = null;
  /** Whether it says why it did not come, with a way to ask again. */
  retries = false;
  #asked = 0;
  #stopped = false;
  #lineAt = 0;
  #timer = 0;
  #paint = () => this.#paintNow();

  /**
   * @param {{answer: Answer, drafting: import("./words.js").Drafting, title: string, onPaint?: () => void,
   *          curious?: boolean}} options
   */
  constructor({ answer, drafting, title, onPaint, curious = true }) {
    this.answer = answer;
    this.drafting = drafting;
    this.onPaint = onPaint;
    this.text = new AnswerText({ onRound: (round) => this.curious.strip.select(round) });
    this.curious = new Curious({ answer, gamma: drafting.gamma, onRound: (round) => this.text.light(round) });
    this.line = h("span", { class: "line" });
    this.state = h("span", { class: "answer-state" });
    this.notice = h("div", { class: "notice", role: "alert", hidden: true });
    this.actions = h("div", { class: "actions" });
    this.element = h("article", { class: "answer", "data-mode": answer.mode, "aria-label": title },
      h("p", { class: "answer-head" }, this.line, " ", this.state), this.text.element, this.notice, this.actions);
    if (curious) this.element.append(this.curious.element);
    this.#paintLine();
    if (answer.end) this.#ended();
    else {
      this.element.setAttribute("aria-busy", "true");
    }
  }

  sent() {
    this.#asked = performance.now();
    this.answer.sent(this.#asked);
    this.state.textContent = "waiting";
    this.#timer = window.setInterval(() => this.#wait(), 500);
  }

  created() {
    if (!this.#stopped) this.state.textContent = "answering";
  }

  /** The reader wants no more of it; its end is still to come. */
  stopping() {
    if (this.answer.end) return;
    this.#stopped = true;
    this.state.textContent = "stopping";
  }

  /** @param {string} text */
  delta(text) {
    clearInterval(this.#timer);
    if (!this.#stopped) this.state.textContent = "answering";
    this.answer.delta(text, performance.now());
    paintSoon(this.#paint);
  }

  /** @param {import("./protocol.js").Step} step */
  step(step) {
    this.answer.step(step, performance.now());
    paintSoon(this.#paint);
  }

  /** @param {string} text */
  done(text) {
    this.answer.done(text, performance.now());
  }

  /** @param {End} end */
  finish(end) {
    clearInterval(this.#timer);
    this.answer.finish(end);
    this.#ended();
    paintSoon(this.#paint);
  }

  /** Paint one that was kept. */
  show() {
    this.#paintNow();
  }

  /** @param {import("./words.js").Drafting} drafting as the server has said by now */
  drafts(drafting) {
    this.drafting = drafting;
    this.curious.gamma = drafting.gamma;
    this.#paintLine();
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
    this.retries = retry !== undefined;
  }

  /**
   * Say why an answer did not come.
   * @param {End} end
   * @param {() => void} retry
   */
  notifyEnd(end, retry) {
    if (end.status === "lost") {
      this.notify(end.reason === "left" ? "The page was left before the answer ended."
        : "The connection was lost before the answer ended.", { retry });
    } else if (end.status === "cancelled" && this.#asked && !this.#stopped) {
      this.notify("The server stopped this answer before its end.", { retry });
    } else if (end.status === "failed") {
      const { title, detail, retry: helps } = explain(end.error);
      this.notify(title, { detail, retry: helps ? retry : undefined });
    }
  }

  /** @param {Action[]} actions beside the copying, which every answer has */
  offer(actions) {
    this.actions.replaceChildren(
      ...(this.answer.text === "" ? [] : [copyButton(() => this.answer.text, "Copy the answer")]),
      ...actions.map(({ label, title, run }) => h("button", { type: "button", class: "quiet small", title, onclick: run }, label)));
  }

  /** @param {number} ratio */
  compare(ratio) {
    this.ratio = ratio;
    this.#paintLine();
  }

  #ended() {
    const { end } = this.answer;
    if (!end) return;
    this.element.dataset.status = end.status;
    const stopped = end.status === "cancelled" && (this.#stopped || !this.#asked); // one that was kept says no more
    this.state.textContent = stopped ? "stopped"
      : end.reason === "left" ? "cut off" : ENDINGS[end.error?.code === "server_shutdown" ? "cancelled" : end.status];
  }

  #paintNow() {
    const more = this.text.paint(this.answer);
    const now = performance.now();
    if (this.answer.end || now - this.#lineAt > LINE_MS) {
      this.#lineAt = now;
      this.#paintLine();
      this.curious.paint();
    }
    if (this.answer.end) this.element.removeAttribute("aria-busy");
    else if (more) paintSoon(this.#paint);
    this.onPaint?.();
  }

  #paintLine() {
    const line = firstLine(this.answer, this.drafting, this.ratio);
    const speed = this.answer.snapshot().tokens_per_s;
    this.line.replaceChildren(line);
    this.curious.element.hidden = this.answer.text === "" && this.answer.steps.length === 0;
    if (line && speed) this.line.append(" ", h("span", { class: "speed" }, `${figure(speed)} tokens a second`));
  }

  /** Nothing has come for a while: say how long, and what that may mean. */
  #wait() {
    const waited = performance.now() - this.#asked;
    if (waited < WAIT_MS || this.#stopped) return;
    this.state.textContent = `waiting for the first text: ${(waited / 1000).toFixed(0)} s. ` +
      "The server is reading the question, or it is busy with others and this one is in its queue.";
  }
}
