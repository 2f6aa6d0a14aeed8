/**
 * Accepted runs on formatted text. Formatting leaves signs out (`**`, the target of a link) and keeps the order of the
 * rest, so a character on the page is found in the source by going on from the last one.
 */

/** A run of draft tokens that one round accepted, as a part of the text. @typedef {{start: number, end: number, round: number}} Run */

/** So far ahead a character is looked for; what is not found there was made by the formatting. */
const AHEAD = 80;
/** Text between these is layout. */
const LAYOUT = new Set(["UL", "OL", "TABLE", "THEAD", "TBODY", "TR", "BLOCKQUOTE", "DIV"]);

/**
 * The first run that ends after `at`.
 * @param {Run[]} runs in order
 * @param {number} at
 */
export function firstRun(runs, at) {
  let [low, high] = [0, runs.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (runs[middle].end > at) high = middle;
    else low = middle + 1;
  }
  return low;
}

/**
 * Put the runs of `text[from:to]` into what it was formatted to.
 * @param {Node} root the formatted part, as a parent of its own
 * @param {string} text
 * @param {number} from
 * @param {number} to
 * @param {Run[]} runs
 */
export function mark(root, text, from, to, runs) {
  let next = firstRun(runs, from);
  if (next === runs.length || runs[next].start >= to) return;
  let at = from;
  /** @type {HTMLElement|null} the last piece of the run before */
  let last = null;
  let lastRun = -1;

  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT | NodeFilter.SHOW_ELEMENT);
  /** @type {{node: Text, fence: boolean}[]} */
  const nodes = [];
  let fence = false;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (node.nodeName === "PRE") fence = true;
    else if (node.nodeType === Node.TEXT_NODE) {
      const layout = LAYOUT.has(node.parentNode?.nodeName ?? "") || node.parentNode === root;
      if (layout && !/** @type {Text} */ (node).data.trim()) continue;
      nodes.push({ node: /** @type {Text} */ (node), fence });
      fence = false;
    }
  }

  for (const { node, fence } of nodes) {
    if (fence) at = afterFence(text, at, to);
    const { data } = node;
    /** @type {{from: number, to: number, run: number}[]} */
    const parts = [];
    let line = 0;
    for (let i = 0; i < data.length; i++) {
      const found = find(data[i], text, at, to);
      if (found < 0) continue;
      at = found + 1;
      while (next < runs.length && runs[next].end <= found) next++;
      if (next === runs.length) break;
      if (runs[next].start > found) continue;
      if (data[i] === "\n") line = i; // what a line is set in by has no tint either
      const part = parts.at(-1);
      if (part?.run === next && part.from >= line) part.to = i + 1;
      else if (data[i].trim()) parts.push({ from: i, to: i + 1, run: next }); // space around a run has no tint
    }
    if (parts.length === 0) continue;
    const pieces = document.createDocumentFragment();
    let done = 0;
    for (const part of parts) {
      const said = data.slice(part.from, part.to).trimEnd();
      const { start, end, round } = runs[part.run];
      const element = document.createElement("mark");
      element.className = "run";
      element.dataset.round = String(round);
      element.textContent = said;
      if (part.run !== lastRun) {
        last?.classList.add("ends");
        if (start >= from || !text.slice(start, from).trim()) element.classList.add("starts");
      }
      [last, lastRun] = [element, end <= to || !text.slice(to, end).trim() ? part.run : -1];
      pieces.append(data.slice(done, part.from), element);
      done = part.from + said.length;
    }
    pieces.append(data.slice(done));
    node.replaceWith(pieces);
  }
  if (lastRun >= 0) last?.classList.add("ends");
}

/**
 * Where a character of the page is in the source; -1: nowhere near.
 * @param {string} sign
 * @param {string} text
 * @param {number} at
 * @param {number} to
 */
function find(sign, text, at, to) {
  const space = !sign.trim();
  while (at < to) {
    if (text[at] === sign || (space && !text[at].trim())) return at;
    if (text[at] !== "]" || text[at + 1] !== "(") break;
    const close = text.indexOf(")", at);
    if (close < 0 || close >= to) break;
    at = close + 1; // the target of a link is not on the page
  }
  const limit = Math.min(to, at + AHEAD);
  for (let i = at + 1; i < limit; i++) if (text[i] === sign || (space && !text[i].trim())) return i;
  return -1;
}

/**
 * @param {string} text
 * @param {number} at
 * @param {number} to
 */
function afterFence(text, at, to) {
  const fence = /^[^\S\n]*(?:[>*+-][^\S\n]*|\d+[.)][^\S\n]*)*(?:`{3,}|~{3,})[^\n]*\n/my;
  const from = text.slice(at, Math.min(to, at + AHEAD)).search(/`{3}|~{3}/);
  if (from < 0) return at;
  const line = text.lastIndexOf("\n", at + from) + 1;
  fence.lastIndex = line;
  return fence.test(text) ? fence.lastIndex : at;
}
