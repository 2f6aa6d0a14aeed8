/**
 * The turns of a chat. Every question sends them all again instead of naming a previous response, so that a chat
 * outlives a restart of the server. It is kept in this tab, and nowhere else.
 */

import { Answer } from "./answer.js";
import { recall } from "./settings.js";

/** @typedef {import("./protocol.js").Item} Item */
/** @typedef {{question: string, answer: Answer}} Turn */

const KEPT = "dspark-stream.conversation";

export class Conversation {
  /** @type {Turn[]} */
  turns = [];

  /**
   * What the model is to read for a turn. A turn counts once something was answered: a model that reads two questions
   * in a row answers neither well.
   * @param {Turn} turn one of the turns
   * @returns {Item[]}
   */
  inputFor(turn) {
    const before = this.turns.slice(0, this.turns.indexOf(turn)).filter(({ answer }) => answer.text.trim() !== "");
    return [
      ...before.flatMap(({ question, answer }) => /** @type {Item[]} */ (
        [{ role: "user", content: question }, { role: "assistant", content: answer.text }])),
      { role: "user", content: turn.question },
    ];
  }

  /** @returns {boolean} false: this browser keeps no more */
  keep() {
    try {
      if (this.turns.length === 0) sessionStorage.removeItem(KEPT);
      else sessionStorage.setItem(KEPT, this.snapshot());
      return true;
    } catch {
      return false;
    }
  }

  recall() {
    this.restore(recall(KEPT, sessionStorage) ?? "[]");
  }

  snapshot() {
    return JSON.stringify(this.turns);
  }

  /** @param {string} kept */
  restore(kept) {
    try {
      this.turns = JSON.parse(kept).map(({ question, answer }) => ({ question, answer: Answer.fromJSON(answer) }));
    } catch {
      this.turns = []; // of another version of the page
    }
  }

  /**
   * As a text to keep elsewhere.
   * @param {string} model
   * @param {string} system
   */
  markdown(model, system) {
    const said = this.turns.map(({ question, answer }) => `## Question\n\n${question}\n\n## Answer\n\n${answer.text}\n`);
    return [`# Conversation with ${model}\n`, ...(system ? [`## System prompt\n\n${system}\n`] : []), ...said].join("\n");
  }
}
