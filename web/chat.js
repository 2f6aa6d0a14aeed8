/** The chat: its turns, what can be done with each, and that nothing of it is lost without a way back. */

import { Answer } from "./answer.js";
import { AnswerView } from "./answer-view.js";
import { copyButton, h, whenIdle } from "./dom.js";
import { newSeed } from "./settings.js";
import { comparison } from "./words.js";

/** @typedef {import("./conversation.js").Turn} Turn */
/** @typedef {import("./protocol.js").End} End */
/** @typedef {import("./protocol.js").Settings} Settings */

/** So many turns that were kept are shown at once, the others while the page is idle. */
const ATONCE = 6;

export class Chat {
  /** @type {AnswerView[]} */
  views = [];

  /**
   * @param {{list: HTMLElement, conversation: import("./conversation.js").Conversation,
   *   drafting: () => import("./words.js").Drafting, settings: () => Settings, mode: () => "dspark"|"plain",
   *   free: () => boolean, ask: (question: any) => {ended: Promise<End>, cancel: () => void},
   *   running: (what: {cancel: () => void}, ended: Promise<End>, view: AnswerView) => Promise<void>,
   *   changed: () => void, undo: (what: string, snapshot: string) => void, onPaint: () => void}} page
   */
  constructor(page) {
    this.page = page;
  }

  /** Show what is kept. */
  draw() {
    const { turns } = this.page.conversation;
    this.views = [];
    this.page.list.replaceChildren();
    for (const turn of turns) this.#add(turn);
    // Of a long conversation the end is seen first.
    this.views.slice(-ATONCE).forEach((view) => view.show());
    for (const view of this.views.slice(0, -ATONCE).reverse()) whenIdle(() => view.show());
    const [turn, view] = [turns.at(-1), this.views.at(-1)];
    if (turn?.answer.end && view) view.notifyEnd(turn.answer.end, () => this.#again(turn));
    this.#offer();
  }

  /** The server has said how it drafts. */
  greet() {
    for (const view of this.views) view.drafts(this.page.drafting());
    this.#offer();
  }

  /** @param {string} question */
  ask(question) {
    const { settings, mode, conversation } = this.page;
    const turn = { question, answer: new Answer({ mode: mode(), seed: settings().seed ?? newSeed() }) };
    conversation.turns.push(turn);
    this.#run(turn, this.#add(turn));
  }

  /** @param {Turn} turn @returns {AnswerView} */
  #add(turn) {
    const { drafting, onPaint, list } = this.page;
    const view = new AnswerView({ answer: turn.answer, drafting: drafting(), title: "Answer", onPaint });
    const said = h("div", { class: "question" }, h("p", { dir: "auto" }, turn.question), h("div", { class: "actions" },
      copyButton(() => turn.question, "Copy the question"),
      h("button", { type: "button", class: "quiet small", onclick: () => this.#edit(turn, said) }, "Edit")));
    list.append(h("li", { class: "turn" }, said, view.element));
    this.views.push(view);
    return view;
  }

  /** @param {Turn} turn @param {AnswerView} view */
  #run(turn, view) {
    const { page } = this;
    view.sent();
    this.#offer();
    const asked = page.ask({ lane: "chat", input: page.conversation.inputFor(turn), mode: turn.answer.mode, seed: turn.answer.seed,
      view });
    page.running(asked, asked.ended, view).then(async () => {
      const end = await asked.ended;
      if (!view.element.isConnected) return; // a new chat was begun meanwhile
      view.notifyEnd(end, () => this.#again(turn));
      this.#offer();
      page.onPaint();
      page.changed();
    });
  }

  /** What can be done depends on where a turn stands: only the last one is answered anew without taking others away. */
  #offer() {
    const { turns } = this.page.conversation;
    turns.forEach((turn, i) => {
      const { end } = turn.answer;
      if (!end) return this.views[i].offer([]);
      const answered = end.status === "completed" || end.status === "incomplete";
      const actions = [];
      if (i === turns.length - 1 && !this.views[i].retries) {
        actions.push({ label: "Regenerate", title: "Answer once more, with another seed unless the settings name one", run: () => this.#again(turn) });
      }
      if (answered && turn.answer.mode === "dspark" && this.page.drafting().gamma > 0) {
        actions.push({ label: "The same without drafting", title: "Answer once more from the same seed, and compare",
          run: () => this.#without(turn, this.views[i]) });
      }
      this.views[i].offer(actions);
    });
  }

  /** @param {Turn} turn */
  #again(turn) {
    if (!this.page.free()) return;
    this.#cut(turn, "The answer was taken back.", turn.answer.text !== "");
    this.ask(turn.question);
  }

  /** Take this turn and all after it away. @param {Turn} turn @param {string} what @param {boolean} matters */
  #cut(turn, what, matters) {
    const { conversation, undo, list } = this.page;
    const before = conversation.snapshot();
    const from = conversation.turns.indexOf(turn);
    conversation.turns.splice(from);
    this.views.splice(from);
    while (list.children.length > from) list.lastElementChild?.remove();
    if (matters) undo(what, before);
  }

  /** @param {Turn} turn @param {HTMLElement} said */
  #edit(turn, said) {
    if (!this.page.free()) return;
    const shown = [...said.childNodes];
    const box = h("textarea", { "aria-label": "The question, to be changed", rows: 3, dir: "auto" });
    box.value = turn.question;
    const later = this.page.conversation.turns.length - 1 - this.page.conversation.turns.indexOf(turn);
    const done = () => said.replaceChildren(...shown);
    const send = () => {
      const question = box.value.trim();
      if (question === "" || !this.page.free()) return;
      this.#cut(turn, later ? "This answer and the turns after it were taken back." : "The answer was taken back.", true);
      this.ask(question);
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        done();
      }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    said.replaceChildren(box, h("div", { class: "actions" },
      h("button", { type: "button", class: "quiet small", onclick: send }, "Ask again"),
      h("button", { type: "button", class: "quiet small", onclick: done }, "Cancel")));
    box.focus();
  }

  /** @param {Turn} turn @param {AnswerView} view */
  #without(turn, view) {
    const { page } = this;
    if (!page.free()) return;
    view.element.querySelector(".without")?.remove();
    const answer = new Answer({ mode: "plain", seed: turn.answer.seed });
    const plain = new AnswerView({ answer, drafting: page.drafting(), title: "The same without drafting", curious: false });
    const outcome = h("p", { class: "outcome", role: "status" }, "It is being written once more, without drafting.");
    view.element.append(h("section", { class: "without", "aria-label": "The same without drafting" },
      outcome, h("details", {}, h("summary", {}, "Its text"), plain.element)));
    const settings = page.settings();
    plain.sent();
    const asked = page.ask({ lane: "chat", input: page.conversation.inputFor(turn), mode: "plain", seed: answer.seed, view: plain });
    page.running(asked, asked.ended, plain).then(async () => {
      const end = await asked.ended;
      plain.notifyEnd(end, () => this.#without(turn, view));
      if (end.status !== "completed" && end.status !== "incomplete") {
        outcome.textContent = "No comparison: it did not come to its end.";
        if (!plain.notice.hidden) outcome.after(plain.notice);
        return;
      }
      outcome.textContent = comparison(turn.answer, answer, settings.temperature === 0 || settings.verification === "coupled");
      const [with_, without] = [turn.answer.snapshot().tokens_per_s, answer.snapshot().tokens_per_s];
      if (with_ && without) view.compare(with_ / without);
    });
  }
}
