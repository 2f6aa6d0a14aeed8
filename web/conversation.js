/**
 * The turns of a chat. Every question sends them all again instead of naming a previous response, so that a chat
 * outlives a restart of the server.
 */

/** @typedef {import("./protocol.js").Item} Item */

export class Conversation {
  /** @type {Item[]} */
  #items = [];

  get empty() {
    return this.#items.length === 0;
  }

  /**
   * The input of the next request.
   * @param {string} question
   * @returns {Item[]}
   */
  withQuestion(question) {
    return [...this.#items, { role: "user", content: question }];
  }

  /**
   * A turn counts once something was answered: a model that reads two questions in a row answers neither well.
   * @param {string} question
   * @param {string} answer  also a partial one, after a stop
   */
  commit(question, answer) {
    if (answer.trim() === "") return;
    this.#items.push({ role: "user", content: question }, { role: "assistant", content: answer });
  }

  /**
   * Take back the last turn, if it is this one: it is asked again.
   * @param {string} question
   * @param {string} answer
   */
  forget(question, answer) {
    const [asked, answered] = this.#items.slice(-2);
    if (asked?.content === question && answered?.content === answer) this.#items.splice(-2);
  }

  clear() {
    this.#items = [];
  }
}
