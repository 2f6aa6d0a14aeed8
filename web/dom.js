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

/** @type {Set<() => void>} */
const due = new Set();
let planned = false;

/**
 * Run `paint` once before the next frame, however often it is asked for. A hidden page has no frames; there a timer
 * stands in.
 * @param {() => void} paint
 */
export function beforeNextFrame(paint) {
  due.add(paint);
  if (planned) return;
  planned = true;
  const run = () => {
    planned = false;
    const now = [...due];
    due.clear();
    for (const each of now) each();
  };
  if (document.hidden) setTimeout(run, 100);
  else requestAnimationFrame(run);
}
