/** The settings of the next answer: read from the form, checked, kept in this browser. */

/** @typedef {import("./protocol.js").Settings} Settings */

/** A race is no longer than this unless somebody chose a length. */
const RACE_TOKENS = 256;
const KEPT = "dspark-stream.chosen"; // what somebody chose, not what a model's makers recommend

/** @param {string} key @param {Storage} [storage] */
export function recall(key, storage = localStorage) {
  try {
    return storage.getItem(key);
  } catch {
    return null; // storage may be switched off; the page works without it
  }
}

/** @param {string} key @param {string} value @param {Storage} [storage] */
export function keep(key, value, storage = localStorage) {
  try {
    storage.setItem(key, value);
  } catch {
    // see recall
  }
}

/** A seed that a JSON number carries exactly. */
export function newSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

export class SettingsForm {
  /** @param {HTMLElement} panel with the inputs, by name */
  constructor(panel) {
    this.inputs = /** @type {(HTMLInputElement|HTMLSelectElement|HTMLTextAreaElement)[]} */ ([...panel.querySelectorAll("[name]")]);
    /** @type {Record<string, string>} values that somebody chose */
    this.chosen = JSON.parse(recall(KEPT) ?? "{}");
    /** @type {Record<string, string>} what an input starts at where nothing is recommended */
    this.starts = {};
    for (const input of this.inputs) {
      this.starts[input.name] = input.value;
      if (typeof this.chosen[input.name] === "string") input.value = this.chosen[input.name];
      input.addEventListener("input", () => {
        mark(input);
        this.#choose(input);
      });
    }
  }

  /**
   * Start at what is recommended for the model, wherever nobody chose otherwise.
   * @param {{temperature?: number|null, top_p?: number|null}} sampling
   */
  recommend(sampling) {
    for (const name of /** @type {const} */ (["temperature", "top_p"])) {
      const input = /** @type {HTMLInputElement} */ (this.inputs.find((each) => each.name === name));
      input.defaultValue = String(sampling[name] ?? this.starts[name]);
      if (!(name in this.chosen)) input.value = input.defaultValue;
      mark(input);
    }
  }

  /** @param {{max_model_len?: number}} limits */
  limit({ max_model_len }) {
    const input = this.inputs.find(({ name }) => name === "max_output_tokens");
    // One token of the context is the least that a question takes.
    if (!max_model_len || !input) return;
    input.setAttribute("max", String(max_model_len - 1));
    if (!("max_output_tokens" in this.chosen)) {
      input.value = String(Math.min(Number(this.starts.max_output_tokens), max_model_len >> 2));
    }
  }

  /** @returns {HTMLElement|null} the first input that is out of range */
  firstInvalid() {
    for (const input of this.inputs) mark(input);
    return this.inputs.find((input) => !input.checkValidity()) ?? null;
  }

  /** @returns {Settings} */
  read() {
    const value = Object.fromEntries(this.inputs.map((input) => [input.name, input.value.trim()]));
    return {
      temperature: Number(value.temperature),
      top_p: Number(value.top_p),
      max_output_tokens: Number(value.max_output_tokens),
      seed: value.seed === "" ? null : Number(value.seed),
      verification: value.verification === "coupled" ? "coupled" : "rejection",
      system: value.system,
    };
  }

  /**
   * Of a race: greedy and short unless somebody chose otherwise. Greedy texts are the same on both sides at full speed,
   * and what is recorded is waited for.
   * @returns {Settings}
   */
  readForRace() {
    const now = this.read();
    if (!("temperature" in this.chosen)) now.temperature = 0;
    if (!("max_output_tokens" in this.chosen)) now.max_output_tokens = Math.min(now.max_output_tokens, RACE_TOKENS);
    return now;
  }

  /** @param {HTMLInputElement|HTMLSelectElement|HTMLTextAreaElement} input */
  #choose(input) {
    if (input.value === "") delete this.chosen[input.name];
    else this.chosen[input.name] = input.value;
    keep(KEPT, JSON.stringify(this.chosen));
  }
}

/** @param {HTMLInputElement|HTMLSelectElement|HTMLTextAreaElement} input */
function mark(input) {
  input.setAttribute("aria-invalid", String(!input.checkValidity()));
}
