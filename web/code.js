/**
 * Code of an answer: in pieces of a few lines, so that what is out of sight is not laid out, and coloured piece by piece
 * while the page is idle. The library runs in a worker: a long program would take it longer than a frame has. What it
 * makes of a model's text is fenced in again: spans with its own classes, nothing else.
 */

import { h, whenIdle } from "./dom.js";
import DOMPurify from "./vendor/dompurify-3.4.18/purify.es.js";

/** Lines of a piece. */
const LINES = 24;
/** Code longer than this is shown without colours: each is a node, and there would be tens of thousands. */
const MOST = 60_000;

/** @type {Worker|null} */
let worker = null;
/** It has failed once, and there will be no colours. */
let broken = false;
/** @type {(() => void)} called when there will be no colours */
let failed = () => {};
/** @type {Map<number, {code: HTMLElement, key: string}>} code whose colours are on their way, by number */
const waiting = new Map();
let asked = 0;
/** Code that is still being written is coloured so often, no oftener. */
const AGAIN_MS = 400;
/** @type {WeakMap<HTMLElement, number>} when it was coloured last */
const times = new WeakMap();
/** So many short pieces of code are remembered with their colours: in a list they are rendered anew with it. */
const KNOWN = 32;
/** @type {Map<string, string>} */
const known = new Map();
/** @type {WeakMap<Element, string>} what a piece was coloured with */
const painted = new WeakMap();
/** @type {WeakMap<HTMLElement, number>} the last colours of a piece of code, by number: what comes after is older */
const latest = new WeakMap();

/** @param {() => void} onFailure */
export function loadColours(onFailure) {
  failed = onFailure;
}

/**
 * Put text at the end of code.
 * @param {HTMLElement} code
 * @param {Iterable<ChildNode>} nodes text and runs; no run has a line's end in it
 */
export function addLines(code, nodes) {
  let piece = code.lastElementChild;
  let lines = piece ? count(piece.textContent ?? "") : LINES;
  for (const node of [...nodes]) {
    /** @type {ChildNode|null} */
    let rest = node;
    while (rest) {
      if (!piece || lines >= LINES) {
        piece = h("span", { class: "lines" });
        code.append(piece);
        lines = 0;
      }
      const now = rest;
      rest = null;
      if (now instanceof Text) {
        const end = nth(now.data, LINES - lines);
        if (end > 0 && end < now.length) rest = now.splitText(end);
      }
      lines += count(now.textContent ?? "");
      piece.append(now);
    }
  }
}

/** @param {string} text */
const count = (text) => text.split("\n").length - 1;

/** Where the nth line ends; -1: not in here. @param {string} text @param {number} n */
function nth(text, n) {
  let at = 0;
  for (; n > 0; n--) {
    at = text.indexOf("\n", at) + 1;
    if (at === 0) return -1;
  }
  return at;
}

/**
 * Colour it, soon.
 * @param {HTMLElement} code
 * @param {string} language as the model named it
 */
export function colour(code, language) {
  const text = code.textContent ?? "";
  if (broken || !language || text.length > MOST) return;
  const id = ++asked;
  const key = `${language}\n${text}`;
  const html = known.get(key);
  if (html) return paint(code, html, id, (work) => work());
  whenIdle(() => {
    if (broken || !code.isConnected) return; // or it was rendered anew meanwhile
    worker ??= start();
    waiting.set(id, { code, key });
    worker.postMessage({ id, language, text });
  });
}

/** Colour what is there of code that is still being written. @param {HTMLElement} code @param {string} language */
export function colourSoFar(code, language) {
  const now = performance.now();
  if (now - (times.get(code) ?? 0) < AGAIN_MS) return;
  times.set(code, now);
  colour(code, language);
}

function start() {
  const made = new Worker(new URL("./code-worker.js", import.meta.url), { type: "module" });
  made.onmessage = ({ data: { id, html } }) => {
    const asker = waiting.get(id);
    waiting.delete(id);
    if (!asker || !html) return;
    const { code, key } = asker;
    if (key.length < 4000) known.set(key, html);
    if (known.size > KNOWN) known.delete(/** @type {string} */ (known.keys().next().value));
    paint(code, html, id, whenIdle);
  };
  made.onerror = () => {
    broken = true;
    waiting.clear();
    failed();
  };
  return made;
}

/** @param {HTMLElement} code @param {string} html @param {number} id @param {(work: () => void) => void} when */
function paint(code, html, id, when) {
  if ((latest.get(code) ?? 0) > id) return;
  latest.set(code, id);
  const lines = html.split(/(?<=\n)/);
  /** @type {string[]} spans that a line leaves open are closed at the end of its piece and go on in the next */
  let open = [];
  [...code.children].forEach((piece, i) => {
    const own = lines.slice(i * LINES, (i + 1) * LINES).join("");
    const before = open.join("");
    for (const [tag] of own.matchAll(/<\/?span[^>]*>/g)) open = tag === "</span>" ? open.slice(0, -1) : [...open, tag];
    const coloured = before + own + "</span>".repeat(open.length);
    if (own && painted.get(piece) !== coloured) when(() => {
      if (latest.get(code) === id) recolour(/** @type {HTMLElement} */ (piece), coloured);
    });
  });
}

/** @param {HTMLElement} piece @param {string} html its text with colours; more may have come since */
function recolour(piece, html) {
  const root = /** @type {DocumentFragment} */ (/** @type {unknown} */ (DOMPurify.sanitize(html, {
    ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], ALLOW_ARIA_ATTR: false, ALLOW_DATA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  })));
  const [text, said] = [piece.textContent ?? "", root.textContent ?? ""];
  if (!text.startsWith(said) || piece.contains(document.activeElement)) return;
  if (text !== said) root.append(text.slice(said.length));
  keepRuns(piece, root);
  piece.replaceChildren(root);
  painted.set(piece, html);
}

/**
 * The runs of a piece on its coloured self, where a run may be parts of several colours.
 * @param {HTMLElement} piece
 * @param {DocumentFragment} root
 */
function keepRuns(piece, root) {
  /** @type {{from: number, to: number, run: HTMLElement}[]} */
  const runs = [];
  let at = 0;
  for (const text of texts(piece)) {
    const from = at;
    at += text.length;
    const run = /** @type {HTMLElement} */ (text.parentElement);
    if (run.localName === "mark") runs.push({ from, to: at, run });
  }
  if (runs.length === 0) return;
  at = 0;
  let next = 0;
  for (let text of texts(root)) {
    const end = at + text.length;
    for (; next < runs.length && runs[next].from < end; next++) {
      const { from, to, run } = runs[next];
      if (from > at) [text, at] = [text.splitText(from - at), from];
      const rest = to < end ? text.splitText(to - at) : null;
      const part = /** @type {HTMLElement} */ (run.cloneNode(false));
      if (at > from) {
        part.classList.remove("starts");
        part.removeAttribute("tabindex");
      }
      if (to > end) part.classList.remove("ends");
      text.replaceWith(part);
      part.append(text);
      if (!rest) {
        if (to === end) next++;
        break;
      }
      [text, at] = [rest, to];
    }
    at = end;
  }
}

/** @param {Node} root @returns {Text[]} */
function texts(root) {
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const found = [];
  for (let node = walker.nextNode(); node; node = walker.nextNode()) found.push(/** @type {Text} */ (node));
  return found;
}
