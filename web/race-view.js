/** The race on the page: two lanes, a timeline, a verdict. */

import { AnswerView } from "./answer-view.js";
import { h, svg } from "./dom.js";
import { duration } from "./metrics.js";
import { judge, raceVerification, speedSentence, whyDifferent } from "./race.js";

/** @typedef {import("./protocol.js").Settings} Settings */
/** @typedef {import("./protocol.js").End} End */

/**
 * @typedef {Object} Runner
 * @property {(lane: string, mode: "plain"|"dspark", verification: "rejection"|"coupled", view: AnswerView)
 *            => {ended: Promise<End>, cancel: () => void}} ask
 */

export class RaceView {
  /** @type {AnswerView[]} */
  views = [];
  #cancelled = false;
  /** @type {{cancel: () => void}[]} */
  #running = [];

  /**
   * @param {HTMLElement} root emptied first
   * @param {{question: string, settings: Settings, seed: number, together: boolean, gamma: number,
   *          show: "tokens"|"formatted", onPaint: () => void}} options
   */
  constructor(root, options) {
    this.options = options;
    const { question, seed, gamma, show, onPaint, settings, together } = options;
    const view = (/** @type {"plain"|"dspark"} */ mode, /** @type {string} */ title) =>
      new AnswerView({ mode, seed: null, gamma, show, title, onPaint });
    this.plain = view("plain", "Plain answer");
    this.dspark = view("dspark", "DSpark answer");
    this.views = [this.plain, this.dspark];

    const how = [together
      ? "Both at once: they share the machine, so each is slower than alone."
      : "One after the other, so that neither slows the other."];
    if (settings.temperature > 0) {
      how.push("Coupled verification, under which the same seed gives the same text at any temperature.");
    } else {
      how.push("Greedy: each time the likeliest token.");
    }
    if (gamma === 0) how.push("This server has no drafter, so both decode plainly.");
    how.push(`Seed ${seed}.`);
    this.verdict = h("section", { class: "verdict", "aria-label": "Verdict", hidden: true });
    root.replaceChildren(
      h("div", { class: "question" }, h("p", {}, question)),
      h("p", { class: "how" }, how.join(" ")),
      this.verdict,
      h("div", { class: "lanes" }, this.plain.element, this.dspark.element));
  }

  /**
   * @param {Runner} runner
   * @returns {Promise<string>} the verdict in one sentence
   */
  async run({ ask }) {
    const verification = raceVerification(this.options.settings);
    const start = (/** @type {"plain"|"dspark"} */ mode) => {
      const running = ask(`race-${mode}`, mode, verification, this[mode]);
      this.#running.push(running);
      return running.ended;
    };
    if (this.options.together) {
      await Promise.all([start("plain"), start("dspark")]);
    } else {
      const { status } = await start("plain");
      if (this.#cancelled || status === "failed" || status === "lost") {
        this.dspark.finish({ status: "cancelled", usage: null, reason: null, error: null });
      } else {
        await start("dspark");
      }
    }
    return this.#judge();
  }

  cancel() {
    this.#cancelled = true;
    for (const running of this.#running) running.cancel();
  }

  #judge() {
    const finish = (/** @type {AnswerView} */ view) => ({
      text: view.text, status: view.end?.status ?? "lost", ...view.snapshot() });
    const [plain, dspark] = [finish(this.plain), finish(this.dspark)];
    const verdict = judge(plain, dspark);
    if (verdict.same === null) {
      this.verdict.replaceChildren(h("p", { class: "headline" }, "No verdict"),
        h("p", {}, "Both sides have to finish for that."));
      this.verdict.hidden = false;
      return "No verdict: both sides have to finish.";
    }
    const headline = verdict.same ? "Same text" : "Texts differ";
    // Without a drafter a ratio would only measure the machine's mood.
    const sentence = this.options.gamma === 0 ? "" : speedSentence(verdict.ratio);
    const longest = Math.max(plain.decode_ms, dspark.decode_ms, 1);
    const bar = (/** @type {string} */ name, /** @type {number} */ ms) => h("div", { class: "bar" },
      h("span", {}, name),
      svg("svg", { "aria-hidden": "true" }, svg("rect", { class: "track", width: "100%" }),
        svg("rect", { class: "value", width: `${(100 * ms) / longest}%` })),
      h("span", { class: "num" }, duration(ms)));
    this.verdict.dataset.same = String(verdict.same);
    this.verdict.replaceChildren(
      h("p", { class: "headline" }, headline),
      h("p", {}, verdict.same
        ? `Character for character, over ${Array.from(plain.text).length} characters and ${plain.tokens} tokens. `
        : `The first difference is at character ${verdict.at}. `, sentence),
      h("div", { class: "bars" }, bar("Plain", plain.decode_ms), bar("DSpark", dspark.decode_ms)));
    if (!verdict.same) {
      this.verdict.append(
        h("dl", { class: "diff" },
          h("dt", {}, "Plain"), h("dd", {}, quote(verdict.around[0])),
          h("dt", {}, "DSpark"), h("dd", {}, quote(verdict.around[1]))),
        h("p", { class: "detail" }, whyDifferent(this.options.settings)));
    }
    if (this.options.together) {
      this.verdict.append(h("p", { class: "detail" },
        "Run at once, so the speeds are not what each has alone."));
    }
    this.verdict.hidden = false;
    return `${headline}. ${sentence}`;
  }
}

/** @param {string} text */
const quote = (text) => (text === "" ? "(ends here)" : h("q", {}, text));
