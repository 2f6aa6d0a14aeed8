/** Small helpers for the DOM. Nothing here sets a `style` attribute: the page's CSP forbids it. */

const SVG = "http://www.w3.org/2000/svg";

/** @typedef {Record<string, string|number|boolean|((event: any) => void)|null|undefined>} Props */

/**
 * @param {Element} element
 * @param {Props} props attributes; `on…` functions are listeners; false, null and undefined are left out
 * @param {(Node|string)[]} children
 */
function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children);
}

/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Props} [props]
 * @param {...(Node|string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  fill(element, props, children);
  return element;
}

/**
 * @template {keyof SVGElementTagNameMap} K
 * @param {K} tag
 * @param {Props} [props]
 * @param {...Node} children
 * @returns {SVGElementTagNameMap[K]}
 */
export function svg(tag, props = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  fill(element, props, children);
  return element;
}

/**
 * @param {string} id
 * @returns {any} the element; a page without it is broken, and says so at once
 */
export function byId(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`index.html has no #${id}`);
  return element;
}

/** Text is painted at most this often: oftener nobody reads it, and each time costs a layout. */
const PAINT_MS = 33;

/** @type {Set<() => void>} */
const due = new Set();
let planned = false;
let painted = 0;

/**
 * Run `paint` once soon, before a frame, however often it is asked for. A hidden page has no frames; there a timer
 * stands in.
 * @param {() => void} paint
 */
export function paintSoon(paint) {
  due.add(paint);
  if (planned) return;
  planned = true;
  const run = () => {
    planned = false;
    painted = performance.now();
    const now = [...due];
    due.clear();
    for (const each of now) each();
  };
  const wait = painted + PAINT_MS - performance.now();
  if (document.hidden) setTimeout(run, 200);
  else if (wait > 8) setTimeout(() => requestAnimationFrame(run), wait - 8);
  else requestAnimationFrame(run);
}

/** Work that can wait takes so much of the page's time at once. */
const SLICE_MS = 6;

/** @type {(() => void)[]} */
const later = [];
let idling = false;

/** Run `work` when the page has nothing better to do. @param {() => void} work short: a few milliseconds */
export function whenIdle(work) {
  later.push(work);
  if (!idling) plan();
}

function plan() {
  idling = true;
  // Safari has no idle callback; a pause stands in.
  if ("requestIdleCallback" in window) requestIdleCallback(slice, { timeout: 500 });
  else setTimeout(slice, 30);
}

function slice() {
  const start = performance.now();
  idling = false;
  try {
    while (later.length > 0 && performance.now() - start < SLICE_MS) /** @type {() => void} */ (later.shift())();
  } finally {
    if (later.length > 0 && !idling) plan();
  }
}

/**
 * @param {string} text
 * @returns {Promise<boolean>} whether it is in the clipboard
 */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Off localhost without TLS there is no clipboard; the old way asks for none.
    const box = h("textarea", { class: "unseen", readonly: true });
    box.value = text;
    const focused = /** @type {HTMLElement|null} */ (document.activeElement);
    document.body.append(box);
    box.select();
    const done = document.execCommand("copy");
    box.remove();
    focused?.focus();
    return done;
  }
}

/**
 * @param {() => string} text
 * @param {string} label for readers
 */
export function copyButton(text, label) {
  const button = h("button", { type: "button", class: "quiet small", "aria-label": label, onclick: async () => {
    button.textContent = (await copy(text())) ? "Copied" : "Not copied";
    byId("status").textContent = button.textContent === "Copied" ? "Copied." : "The browser did not allow copying.";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  } }, "Copy");
  return button;
}
