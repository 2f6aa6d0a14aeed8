/** The race on the page: recorded one after the other, replayed in step, judged. */

import { AnswerText } from "./answer-text.js";
import { h, paintSoon, svg } from "./dom.js";
import { duration } from "./metrics.js";
import { Recording, judge, raceVerification } from "./race.js";
import { count, headline, others, verdictTimes } from "./words.js";

/** @typedef {import("./protocol.js").Settings} Settings */
/** @typedef {import("./protocol.js").End} End */

/** One side: a clock, a bar, the text, which scrolls by itself. */
class Lane {
  /** @param {"plain"|"dspark"} mode @param {number} seed */
  constructor(mode, seed) {
    this.name = mode === "plain" ? "Plain" : "DSpark";
    this.recording = new Recording(mode, seed);
    this.state = h("span", { class: "answer-state" }, "not started");
    this.clock = h("span", { class: "clock" });
    this.value = svg("rect", { class: "value", width: "0%" });
    this.text = new AnswerText();
    this.count = h("p", { class: "lane-count", hidden: true });
    this.scroller = h("div", { class: "lane-text", tabindex: 0, role: "region", "aria-label": `${this.name} answer` },
      this.count, this.text.element);
    this.notice = h("div", { class: "notice", role: "alert", hidden: true });
    this.element = h("article", { class: "lane answer", "data-mode": mode, "aria-label": `${this.name}’s lane` },
      h("p", { class: "lane-head" }, h("b", {}, this.name), this.state, this.clock),
      svg("svg", { class: "track", "aria-hidden": "true" }, svg("rect", { class: "road", width: "100%" }), this.value),
      this.notice, this.scroller);
  }

  /** To the start line. */
  begin() {
    this.play = this.recording.play();
    this.count.hidden = true;
    this.text.element.remove();
    this.text = new AnswerText();
    this.scroller.append(this.text.element);
    this.state.textContent = "";
    delete this.element.dataset.done;
  }

  /** @param {number} elapsed_ms @returns {boolean} whether there is more */
  show(elapsed_ms) {
    const answer = /** @type {NonNullable<typeof this.play>} */ (this.play)(elapsed_ms);
    const more = this.text.paint(answer);
    const all = this.recording.answer.text.length || 1;
    const { length_ms } = this.recording;
    this.value.setAttribute("width", `${(100 * answer.text.length) / all}%`);
    this.clock.textContent = duration(Math.min(elapsed_ms, length_ms));
    this.scroller.scrollTop = this.scroller.scrollHeight;
    if (answer.end) this.element.dataset.done = "";
    return more || !answer.end;
  }

  /** @param {string} title @param {string} [detail] @param {() => void} [retry] */
  notify(title, detail, retry) {
    this.notice.replaceChildren(h("p", {}, title), ...(detail ? [h("p", { class: "detail" }, detail)] : []),
      ...(retry ? [h("button", { type: "button", class: "quiet", onclick: retry }, "Try again")] : []));
    this.notice.hidden = false;
  }
}

export class RaceView {
  #cancelled = false;
  #skipped = false;
  /** @type {{cancel: () => void}|null} */
  #running = null;

  /**
   * @param {HTMLElement} root emptied first
   * @param {{question: string, settings: Settings, seed: number, gamma: number}} options
   */
  constructor(root, options) {
    this.options = options;
    const { question, seed, gamma, settings } = options;
    this.lanes = { plain: new Lane("plain", seed), dspark: new Lane("dspark", seed) };
    const how = [settings.temperature > 0
      ? "Coupled verification, under which a seed gives the same text at any temperature." : "Greedy: each time the likeliest token."];
    if (gamma === 0) how.push("This server has no drafter, so both decode plainly.");
    how.push(`Seed ${seed}.`);
    this.title = h("h2", { class: "headline" });
    this.detail = h("p", { class: "detail" });
    this.again = h("button", { type: "button", class: "quiet", disabled: true, onclick: () => this.replay() }, "Play again");
    this.verdict = h("div", { class: "race-line" }, this.title, this.detail);
    root.replaceChildren(h("p", { class: "race-question", dir: "auto" }, question), this.verdict,
      h("div", { class: "lanes" }, this.lanes.plain.element, this.lanes.dspark.element),
      h("p", { class: "how" }, h("span", {}, how.join(" ")), this.again));
  }

  /**
   * @param {(mode: "plain"|"dspark", verification: "rejection"|"coupled", handlers: import("./protocol.js").Handlers)
   *         => {cancel: () => void}} ask
   * @param {(lane: Lane, end: End) => void} explainEnd
   * @returns {Promise<string>} the verdict in one sentence
   */
  async run(ask, explainEnd) {
    const verification = raceVerification(this.options.settings);
    for (const mode of /** @type {const} */ (["plain", "dspark"])) {
      if (this.#cancelled) break;
      const lane = this.lanes[mode];
      this.#say(`${lane.name} runs, alone.`, "Each side is recorded on its own, and unseen: to draw it would cost it speed. Then both are replayed from the same start.");
      const end = await this.#record(lane, mode, verification, ask);
      if (end.status === "failed" || end.status === "lost") this.#cancelled = true;
      lane.state.textContent = { failed: "failed", lost: "connection lost", cancelled: "stopped" }[end.status] ?? "recorded";
      if (!this.#cancelled || end.status !== "cancelled") explainEnd(lane, end);
    }
    const verdict = judge(this.lanes.plain.recording, this.lanes.dspark.recording);
    this.judged = verdict;
    if (verdict.same === null) {
      this.#say("No verdict", "Both sides have to finish for that.");
      return "No verdict: both sides have to finish.";
    }
    this.again.disabled = false;
    return this.replay();
  }

  /** @returns {Promise<string>} */
  replay() {
    this.#skipped = false;
    this.again.disabled = true;
    delete this.verdict.dataset.same;
    this.#say("Both, from the same start.", "Replayed in step, at the speed at which each was recorded.");
    for (const lane of Object.values(this.lanes)) lane.begin();
    const start = performance.now();
    return new Promise((resolve) => {
      const tick = () => {
        const elapsed = this.#skipped ? Infinity : performance.now() - start;
        const more = Object.values(this.lanes).map((lane) => lane.show(elapsed));
        if (more.includes(true)) paintSoon(tick);
        else resolve(this.#judge());
      };
      tick();
    });
  }

  /** What is recorded ends without a verdict; what is replayed goes to its end. */
  cancel() {
    this.#skipped = true;
    if (this.judged) return;
    this.#cancelled = true;
    if (this.#running) for (const lane of Object.values(this.lanes)) if (lane.state.dataset.runs) lane.state.textContent = "stopping";
    this.#running?.cancel();
  }

  /**
   * @param {Lane} lane
   * @param {"plain"|"dspark"} mode
   * @param {"rejection"|"coupled"} verification
   * @param {any} ask
   * @returns {Promise<End>}
   */
  #record(lane, mode, verification, ask) {
    const { recording, state } = lane;
    state.dataset.runs = "yes";
    state.textContent = "runs now";
    recording.answer.sent(performance.now());
    const tell = () => {
      const { tokens } = recording.answer.snapshot();
      const [figure, ...word] = count(tokens, "token").split(" ");
      lane.count.replaceChildren(h("b", {}, figure), ` ${word} recorded`);
      lane.count.hidden = false;
      lane.value.setAttribute("width", `${Math.min(100, (100 * tokens) / this.options.settings.max_output_tokens)}%`);
    };
    return new Promise((resolve) => {
      this.#running = ask(mode, verification, {
        delta: (/** @type {string} */ text) => recording.delta(text, performance.now()),
        step: (/** @type {any} */ step) => {
          recording.step(step, performance.now());
          paintSoon(tell);
        },
        end: (/** @type {End} */ end) => {
          recording.answer.finish(end);
          delete state.dataset.runs;
          const done = end.status === "completed" || end.status === "incomplete";
          if (done) paintSoon(() => lane.value.setAttribute("width", "100%"));
          setTimeout(() => resolve(end), 50); // after the last count
        },
      });
    });
  }

  #judge() {
    const verdict = /** @type {import("./race.js").Verdict} */ (this.judged);
    const [plain, dspark] = [this.lanes.plain.recording.answer, this.lanes.dspark.recording.answer];
    // Without a drafter a ratio would only measure the machine's mood.
    const title = headline(this.options.gamma === 0 ? { ...verdict, sooner: null } : verdict);
    const how = others([plain, dspark]) || " Each ran alone, once.";
    const where = verdict.same ? `${count(Array.from(plain.text).length, "character")}, all alike.`
      : `The first difference is at character ${verdict.at}: plain ${quote(verdict.around[0])}, DSpark ${quote(verdict.around[1])}. ` +
        "Where two tokens are almost equally likely, rounding can tip the choice.";
    this.#say(title, `${where} ${verdictTimes(plain, dspark)}${how}`);
    this.verdict.dataset.same = String(verdict.same);
    this.again.disabled = false;
    return `${title} ${where}`;
  }

  /** @param {string} title @param {string} detail */
  #say(title, detail) {
    this.title.textContent = title;
    this.detail.textContent = detail;
  }
}

/** @param {string} text */
const quote = (text) => (text === "" ? "ends there" : `“${text}”`);
