/** The settings of the next answer: read from the form, checked, kept in this browser. */

/** @typedef {import("./protocol.js").Settings} Settings */

const KEPT = "dspark-stream.settings";

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
    this.inputs = /** @type {(HTMLInputElement|HTMLSelectElement)[]} */ ([...panel.querySelectorAll("[name]")]);
    const kept = JSON.parse(recall(KEPT) ?? "{}");
    for (const input of this.inputs) {
      if (typeof kept[input.name] === "string") input.value = kept[input.name];
      input.addEventListener("change", () => this.#keep());
      input.addEventListener("input", () => mark(input));
    }
  }

  /** @param {{max_model_len?: number}} limits */
  limit({ max_model_len }) {
    const input = this.inputs.find(({ name }) => name === "max_output_tokens");
    // One token of the context is the least that a question takes.
    if (max_model_len && input) input.setAttribute("max", String(max_model_len - 1));
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
    };
  }

  #keep() {
    keep(KEPT, JSON.stringify(Object.fromEntries(this.inputs.map((input) => [input.name, input.value]))));
  }
}

/** @param {HTMLInputElement|HTMLSelectElement} input */
function mark(input) {
  input.setAttribute("aria-invalid", String(!input.checkValidity()));
}
