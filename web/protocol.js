/**
 * What the page says to the server and how it reads the answers. Pure: no socket, no DOM, no clock, so that the
 * tests can drive it event by event.
 */

/** @typedef {{role: "user"|"assistant", content: string}} Item */

/**
 * @typedef {Object} Settings
 * @property {number} temperature
 * @property {number} top_p
 * @property {number} max_output_tokens
 * @property {number|null} seed            null: a new one for every answer
 * @property {"rejection"|"coupled"} verification
 * @property {string} system               what the model is told before everything else; empty: nothing
 */

/**
 * One verification round, as `dspark:step` tells it.
 * @typedef {Object} Step
 * @property {number} drafted     draft tokens proposed
 * @property {number} scheduled   of these, sent to the target (ℓ)
 * @property {number} accepted
 * @property {"model"|"lookup"} [source]  who proposed them: the drafter, or a look into the text so far
 * @property {number[]} confidence
 * @property {number[]} survival
 * @property {string} text
 * @property {[string, boolean][]} pieces  text by origin; true: drafted and accepted
 * @property {number} t_draft_ms
 * @property {number} t_verify_ms
 * @property {number} batch_tokens
 * @property {number} streams
 */

/**
 * @typedef {{status?: number, type?: string, code?: string, message: string, param?: string|null,
 *            retry_after_s?: number}} WireError
 */

/**
 * How a response ended. `lost` is ours: the socket went away before the server could say.
 * @typedef {Object} End
 * @property {"completed"|"incomplete"|"failed"|"cancelled"|"lost"} status
 * @property {Record<string, any>|null} usage
 * @property {string|null} reason          for `incomplete`; ours for `lost`: "left", the page was
 * @property {WireError|null} error        for `failed`
 * @property {Record<string, any>|null} [stats]  what the server says of its rounds and queue
 */

/**
 * @typedef {Object} Handlers
 * @property {() => void} [created]
 * @property {(text: string) => void} [delta]
 * @property {(step: Step) => void} [step]
 * @property {(text: string) => void} [done]    the whole text, as the server has it
 * @property {(end: End) => void} end          called exactly once
 */

const TERMINAL = new Map([
  ["response.completed", "completed"],
  ["response.incomplete", "incomplete"],
  ["response.failed", "failed"],
  ["response.cancelled", "cancelled"],
]);

/**
 * The `response.create` event of one question.
 * @param {{lane: string, eventId: string, input: Item[], settings: Settings, seed: number,
 *          mode: "dspark"|"plain", verification?: "rejection"|"coupled"}} ask
 */
export function createEvent({ lane, eventId, input, settings, seed, mode, verification }) {
  return {
    type: "response.create",
    event_id: eventId,
    stream_id: lane,
    input,
    ...(settings.system ? { instructions: settings.system } : {}),
    temperature: settings.temperature,
    top_p: settings.top_p,
    max_output_tokens: settings.max_output_tokens,
    store: false, // every question brings its whole conversation along
    dspark: { mode, verification: verification ?? settings.verification, seed, steps: true },
  };
}

/**
 * One response, from the question sent to its one terminal event.
 *
 *     asked ──created──▶ open ──terminal──▶ ended
 *       └──────error──────────────────────────▲
 */
export class ResponseState {
  /** @type {"asked"|"open"|"ended"} */
  phase = "asked";
  /** @type {string|null} */
  id = null;

  /**
   * @param {string} eventId
   * @param {Handlers} handlers
   */
  constructor(eventId, handlers) {
    this.eventId = eventId;
    this.handlers = handlers;
  }

  /** @param {any} event */
  receive(event) {
    if (this.phase === "ended") return;
    const status = TERMINAL.get(event.type);
    if (status) {
      const response = event.response ?? {};
      this.finish({
        status: /** @type {End["status"]} */ (status),
        usage: response.usage ?? null,
        stats: response.dspark ?? null,
        reason: response.incomplete_details?.reason ?? null,
        error: response.error ?? null,
      });
      return;
    }
    switch (event.type) {
      case "response.created":
        this.phase = "open";
        this.id = event.response?.id ?? null;
        this.handlers.created?.();
        break;
      case "response.output_text.delta":
        this.handlers.delta?.(event.delta);
        break;
      case "dspark:step":
        this.handlers.step?.(event);
        break;
      case "response.output_text.done":
        this.handlers.done?.(event.text);
        break;
      case "error":
        // Once a response is open its failure is `response.failed`; an error beside it is about something else.
        if (this.phase === "asked") {
          this.finish({ status: "failed", usage: null, reason: null, error: wireError(event) });
        }
        break;
      default: // in_progress, output_item.added, …: nothing to show
    }
  }

  /** @param {End} end */
  finish(end) {
    if (this.phase === "ended") return;
    this.phase = "ended";
    this.handlers.end(end);
  }
}

/**
 * The lanes of one socket. A lane is first in, first out, so its events belong to its oldest open response; most
 * events do not name the response.
 */
export class Lanes {
  /** @type {Map<string, ResponseState[]>} */
  #lanes = new Map();

  /**
   * @param {string} lane
   * @param {ResponseState} response
   */
  add(lane, response) {
    const queue = this.#lanes.get(lane);
    if (queue) queue.push(response);
    else this.#lanes.set(lane, [response]);
  }

  /**
   * Hand an event to the response that it belongs to.
   * @param {any} event
   * @returns {boolean} false: it belongs to none
   */
  receive(event) {
    const queue = this.#lanes.get(event.stream_id) ?? this.#laneOf(event.event_id) ?? [];
    if (event.type === "error") {
      const response = event.event_id ? queue.find((r) => r.eventId === event.event_id) : queue[0];
      if (!response) return false; // for example a cancel that came after the end
      response.receive(event);
    } else {
      if (queue.length === 0) return false;
      queue[0].receive(event);
    }
    const open = queue.filter((r) => r.phase !== "ended");
    queue.splice(0, queue.length, ...open);
    return true;
  }

  /** The socket is gone: whatever was open has no end of its own any more. */
  lose() {
    const open = [...this.#lanes.values()].flat();
    this.#lanes.clear();
    for (const response of open) response.finish({ status: "lost", usage: null, reason: null, error: null });
  }

  /** @param {string|undefined} eventId */
  #laneOf(eventId) {
    if (!eventId) return undefined;
    return [...this.#lanes.values()].find((queue) => queue.some((r) => r.eventId === eventId));
  }
}

/**
 * @param {any} event an `error` event
 * @returns {WireError}
 */
export function wireError(event) {
  return { status: event.status, retry_after_s: event.retry_after_s, message: "Unknown error", ...event.error };
}

/**
 * What a person should read about an error, and whether trying again can help.
 * @param {WireError|null} error
 * @returns {{title: string, detail: string, retry: boolean}}
 */
export function explain(error) {
  const detail = error?.message ?? "";
  const seconds = error?.retry_after_s;
  const wait = !seconds ? "Give it a few seconds" : seconds === 1 ? "Give it a second" : `Give it ${seconds} seconds`;
  if (error?.code === "draining" || error?.code === "server_shutdown") {
    return { title: "The server is shutting down. Try again when it is back.", detail, retry: true };
  }
  if (error?.code === "engine_failed") {
    return { title: "The server’s engine has failed. Try again when it has been restarted.", detail, retry: true };
  }
  if (error?.status === 503 || error?.type === "overloaded_error") {
    return { title: `The server is full at the moment. ${wait}, then try again.`, detail, retry: true };
  }
  if (error?.status === 429 || error?.code === "rate_limit_exceeded") {
    return { title: `You have reached this server’s limit for one client. ${wait}, then try again.`, detail,
      retry: true };
  }
  if (error?.code === "message_too_large") {
    return { title: "This conversation is too long for one message. Start a new chat, or ask a shorter question.", detail,
      retry: false };
  }
  if (error?.code === "context_length_exceeded") {
    return { title: "This conversation no longer fits the model’s context. Start a new chat, or ask for a shorter answer.",
      detail, retry: false };
  }
  if (error?.status !== undefined && error.status < 500) {
    return { title: "The server could not accept this request.", detail, retry: false };
  }
  return { title: "The server failed while answering.", detail, retry: true };
}

/**
 * Seconds before the next attempt to connect: doubling from half a second to fifteen, with jitter so that the
 * pages of many people do not come back in step.
 * @param {number} attempt 0 for the first
 * @param {number} random  in [0, 1)
 */
export function backoff(attempt, random) {
  return Math.min(15, 0.5 * 2 ** attempt) * (0.75 + 0.5 * random);
}

/** Characters that a subprotocol, and so a key that travels in one, may have (RFC 9110 token). */
export const KEY_PATTERN = /^[!#$%&'*+\-.^_`|~0-9A-Za-z]+$/;

/** @param {string|null} key */
export function subprotocols(key) {
  return key ? ["dspark.v1+json", `openai-insecure-api-key.${key}`] : ["dspark.v1+json"];
}
