/** How an answer was made, for the curious: every figure with its name and its letter, and each round as a column. */

import { h } from "./dom.js";
import { duration, figure } from "./metrics.js";
import { RoundStrip } from "./strip.js";

/** @typedef {import("./answer.js").Answer} Answer */

export class Curious {
  #drawn = 0;

  /** @param {{answer: Answer, gamma: number, onRound: (round: number) => void}} options */
  constructor({ answer, gamma, onRound }) {
    this.answer = answer;
    this.gamma = gamma;
    this.strip = new RoundStrip({ gamma: answer.mode === "plain" ? 0 : gamma, onSelect: (round) => {
      this.#describe(round);
      onRound(round);
    } });
    this.roundLine = h("p", { class: "round-line" });
    this.list = h("dl");
    this.element = h("details", { class: "curious", ontoggle: () => this.paint() },
      h("summary", {}, "How it was made"), this.list, this.strip.element, this.roundLine);
    this.#describe(-1);
  }

  paint() {
    if (!(/** @type {HTMLDetailsElement} */ (this.element).open)) return;
    const { answer, gamma } = this;
    for (; this.#drawn < answer.steps.length; this.#drawn++) this.strip.add(answer.steps[this.#drawn]);
    this.strip.paint();
    const now = answer.snapshot();
    const queued = answer.end?.stats?.queue_ms;
    /** @type {[string, string, string][]} */
    const rows = [
      ["Speed", `${figure(now.tokens_per_s)}`, "tokens a second, from the first text to the last"],
      ["First text", duration(now.first_ms), `after the question was sent${queued > 100 ? `; of that ${duration(queued)} in the queue` : ""}`],
      ["Tokens", String(now.tokens), `in ${now.rounds} rounds: each is one pass of the model, and plain decoding needs one for every token`],
    ];
    if (answer.mode === "dspark" && gamma > 0) {
      rows.push(
        ["Block γ", String(gamma), "gamma: guesses that the drafter makes in one round, at most"],
        ["Verified ℓ", figure(now.ell), "ell: guesses of a round that were sent to the model to check, in the mean"],
        ["Accepted τ", figure(now.tau), "tau: tokens that a round brought, in the mean, the model’s own one included"]);
    }
    const found = answer.steps.filter((step) => step.source === "lookup").length;
    if (found) rows.push(["Found", String(found), "rounds whose guesses were not drafted but found earlier in the text, where it repeats itself"]);
    rows.push(["Streams", now.streams === null ? "–" : String(now.streams), "answers that shared the last pass"]);
    if (answer.seed !== null) rows.push(["Seed", String(answer.seed), "the same seed and settings ask for this answer again"]);
    this.list.replaceChildren(...rows.map(([term, value, means]) =>
      h("div", {}, h("dt", {}, term), h("dd", {}, h("b", {}, value), " ", h("span", {}, means)))));
  }

  /** @param {number} round */
  #describe(round) {
    const step = this.strip.steps[round];
    if (!step) {
      this.roundLine.replaceChildren(this.answer.mode === "plain" ? "One column a round; without drafting each brings one token."
        : "One column a round, read from the bottom: the model’s own token, then guesses accepted (full), rejected (hollow) and not sent (a dot).");
      return;
    }
    const line = [`Round ${round + 1}: `, h("b", {}, `${step.accepted} of ${step.scheduled}`), " accepted"];
    if (step.drafted > step.scheduled) line.push(`, ${step.drafted - step.scheduled} not sent`);
    if (step.source === "lookup") line.push("; found earlier in this text");
    line.push(`. Draft ${step.t_draft_ms.toFixed(1)} ms, check ${step.t_verify_ms.toFixed(1)} ms.`);
    if (step.survival?.length) {
      line.push(h("br"), "Chance, before the check, that all guesses so far hold: ");
      step.survival.forEach((a, k) => {
        line.push(h("span", { class: k < step.scheduled ? "a sent" : "a" }, a.toFixed(2).replace(/^0/, "")), " ");
      });
    }
    this.roundLine.replaceChildren(...line);
  }
}
