/**
 * The connection: opens, reads, reconnects. All that it knows of the protocol is in protocol.js.
 */

import { Lanes, ResponseState, backoff, createEvent, subprotocols } from "./protocol.js";

/**
 * @typedef {Object} State
 * @property {"connecting"|"open"|"waiting"|"key"|"forbidden"} phase
 *   `waiting`: the next attempt comes by itself; `key`: the server wants a key; `forbidden`: it refuses this page.
 * @property {number} [retryAt]  for `waiting`: when, in Date.now() milliseconds
 * @property {string} [why]
 */

/** Close codes that say more than "gone". */
const WHY = new Map([
  [1001, "Server going away."],
  [1009, "Message too large."],
  [1012, "Server restarting."],
  [1013, "Server too busy."],
]);

/** Begins the `event_id` of every cancel. */
const CANCEL = "cancel-";

export class Connection {
  /** @type {State} */
  state = { phase: "connecting" };
  /** @type {any} the `dspark:hello` of the open socket */
  hello = null;

  /** @type {WebSocket|null} */
  #socket = null;
  #lanes = new Lanes();
  #attempt = 0;
  #timer = 0;
  #asked = 0;
  /** @type {string|undefined} */
  #why;
  /** @type {string|null} */
  #key;

  /**
   * @param {{url: string, key: string|null, probe: (key: string|null) => Promise<number>,
   *          onState: (state: State) => void, onHello: (hello: any) => void,
   *          onStray: (event: any) => void}} options
   *   `probe` gives the HTTP status of a plain request, or 0: a browser does not tell why an upgrade was refused.
   */
  constructor(options) {
    this.options = options;
    this.#key = options.key;
  }

  open() {
    clearTimeout(this.#timer);
    this.#set({ phase: "connecting" });
    const socket = new WebSocket(this.options.url, subprotocols(this.#key));
    this.#socket = socket;
    socket.onmessage = (message) => this.#receive(JSON.parse(message.data));
    socket.onclose = (event) => this.#closed(socket, event);
  }

  /** @param {string} key */
  useKey(key) {
    this.#key = key;
    this.#attempt = 0;
    this.open();
  }

  /**
   * Send one question.
   * @param {Omit<Parameters<typeof createEvent>[0], "eventId">} question
   * @param {import("./protocol.js").Handlers} handlers
   * @returns {{cancel: () => void}}
   */
  ask(question, handlers) {
    const eventId = `ask-${++this.#asked}`;
    const response = new ResponseState(eventId, handlers);
    if (this.state.phase !== "open") {
      response.finish({ status: "lost", usage: null, reason: null, error: null });
      return { cancel() {} };
    }
    const message = JSON.stringify(createEvent({ ...question, eventId }));
    const limit = this.hello?.limits?.max_message_bytes ?? Infinity;
    if (message.length > limit || new Blob([message]).size > limit) {
      // The server would close the socket on it, and everything else that runs there would end.
      response.finish({ status: "failed", usage: null, reason: null,
        error: { status: 413, code: "message_too_large", message: `A message may have ${limit} bytes.` } });
      return { cancel() {} };
    }
    this.#lanes.add(question.lane, response);
    this.#socket?.send(message);
    return {
      cancel: () => {
        if (response.phase === "ended") return;
        // Before `response.created` the lane is the only name that the response has.
        const target = response.id ? { response_id: response.id } : { stream_id: question.lane };
        const event = { type: "response.cancel", event_id: `${CANCEL}${eventId}`, ...target };
        if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(event));
      },
    };
  }

  /** @param {any} event */
  #receive(event) {
    if (event.type === "dspark:hello") {
      this.#attempt = 0;
      this.hello = event;
      this.#set({ phase: "open" });
      this.options.onHello(event);
    } else if (event.type === "error" && event.event_id?.startsWith(CANCEL)) {
      // The answer ended while the cancel was on its way: nothing is left to stop.
    } else if (!this.#lanes.receive(event) && event.type === "error") {
      this.options.onStray(event);
    }
  }

  /**
   * @param {WebSocket} socket
   * @param {CloseEvent} event
   */
  async #closed(socket, event) {
    if (socket !== this.#socket) return; // an older one; a newer has taken its place
    const wasOpen = this.state.phase === "open";
    this.#lanes.lose();
    if (event.code === 1008) {
      this.#set({ phase: "key", why: event.reason });
      return;
    }
    if (!wasOpen) {
      const status = await this.options.probe(this.#key);
      if (socket !== this.#socket) return;
      if (status === 401) return this.#set({ phase: "key" });
      if (status === 403) return this.#set({ phase: "forbidden" });
    }
    const wait_s = backoff(this.#attempt++, Math.random());
    this.#timer = window.setTimeout(() => this.open(), wait_s * 1000);
    this.#why = WHY.get(event.code) ?? (wasOpen ? undefined : this.#why); // a try that fails says less than the close did
    this.#set({ phase: "waiting", retryAt: Date.now() + wait_s * 1000, why: this.#why });
  }

  /** @param {State} state */
  #set(state) {
    this.state = state;
    this.options.onState(state);
  }
}
