/**
 * Markdown of a model's answer to safe DOM. What a model writes is untrusted: raw HTML in it is shown as text, an
 * image becomes a link (to load one would tell its host that this was read), and DOMPurify with an allow-list is
 * the fence behind that.
 */

import { addLines, colour, colourSoFar } from "./code.js";
import { copyButton, h } from "./dom.js";
import { firstRun, mark } from "./marks.js";
import DOMPurify from "./vendor/dompurify-3.4.18/purify.es.js";
import { Marked } from "./vendor/marked-18.2.1/marked.esm.js";

/** @typedef {import("./marks.js").Run} Run */

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "rel", "start", "target", "title"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("uponSanitizeAttribute", (node, data) => {
  // The one class that the formatting makes: what language a piece of code is in.
  if (data.attrName === "class" && node.nodeName !== "SPAN" && !/^language-[\w+#.-]{1,30}$/.test(data.attrValue)) {
    data.keepAttr = false;
  }
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

/** @param {string} text */
const escaped = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "[x] " : "[ ] "),
    // Answers sit below the page's own headings.
    heading({ tokens, depth }) {
      const level = Math.min(6, depth + 3);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
  },
});

const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/;

/**
 * Whether a text of these tokens ends in words: not in code, to which nothing may be added.
 * @param {any[]} tokens
 * @returns {boolean}
 */
function endsInWords(tokens) {
  const last = tokens.findLast(({ type }) => type !== "space");
  if (last?.type === "list") return endsInWords(last.items);
  if (last?.type === "list_item" || last?.type === "blockquote") return endsInWords(last.tokens);
  return ["heading", "paragraph", "table", "text"].includes(last?.type);
}

/**
 * Bold text and code that the last line has begun are ended, so that their signs do not show until the end has come.
 * @param {string} source
 */
function closed(source) {
  const said = source.trimEnd();
  const line = said.slice(said.lastIndexOf("\n") + 1);
  if ((line.match(/`/g)?.length ?? 0) % 2 > 0) return /[^`]$/.test(said) ? `${said}\`` : source;
  const bold = /(?:^|[\s(>|])\*\*(?=[^\s*])((?:(?!\*\*).)*)$/.exec(line.replace(/`[^`]*`/g, "``"));
  if (!bold) return source;
  return bold[1].endsWith("*") ? `${said}*` : `${said}**`;
}

/** A last block longer than this is no longer rendered anew: what comes is appended to it until it ends. */
const LONG = 1000;
/** What a later sign may turn into formatting, a link or a tag, together with all that lies between. */
const OPENS = /[*~](?=\S)|(?<![\p{L}\p{N}])_|[`[]|<[a-z/!?]/iu;

/**
 * Up to where a part of a paragraph is finished: behind a space at which nothing is open. 0: nowhere.
 * @param {string} source
 * @param {(at: number) => boolean} inside whether a run goes across that place
 */
function finishedUpTo(source, inside) {
  let at = 0;
  let found = 0;
  for (const { type, raw } of marked.Lexer.lexInline(source, marked.defaults)) {
    if (type === "text") {
      const said = raw.replace(/\[[^[\]]*\]/g, (whole) => "-".repeat(whole.length)); // "[1]" is no link by itself
      const open = said.search(OPENS);
      for (const { index } of (open < 0 ? said : said.slice(0, open)).matchAll(/(?<=\S) (?=\S)/g)) {
        if (!inside(at + index)) found = at + index + 1;
      }
      if (open >= 0) return found;
    }
    at += raw.length;
  }
  return found;
}

/**
 * @param {string} text
 * @param {number} [from]
 * @param {number} [to]
 * @param {Run[]} [runs]
 * @param {{open?: boolean, loose?: boolean, growing?: boolean}} [how] `growing`: more is to come; `open`: the last block
 *   is code whose end is to come; `loose`: the text begins in the middle of a list whose items are paragraphs
 * @returns {DocumentFragment}
 */
export function render(text, from = 0, to = text.length, runs = [], { open = false, loose = false, growing = false } = {}) {
  const source = text.slice(from, to);
  let tokens = marked.lexer(source);
  if (growing && endsInWords(tokens)) tokens = marked.lexer(closed(source));
  if (loose && tokens[0]?.type === "list") {
    for (const token of tokens[0].items.flatMap((/** @type {any} */ item) => item.tokens)) {
      if (token.type === "text") token.type = "paragraph";
    }
  }
  const html = marked.parser(tokens);
  const root = /** @type {DocumentFragment} */ (/** @type {unknown} */ (DOMPurify.sanitize(html, ALLOWED)));
  const codes = /** @type {HTMLElement[]} */ ([...root.querySelectorAll("pre > code")]);
  mark(root, text, from, to, runs);
  if (RIGHT_TO_LEFT.test(source)) {
    for (const block of root.children) block.setAttribute("dir", "auto");
  }
  codes.forEach((code, i) => { // last: what it adds is not the model's
    const language = code.className.replace("language-", "").toLowerCase();
    code.removeAttribute("class");
    frame(code, language);
    if (!open || i < codes.length - 1) colour(code, language);
  });
  return root;
}

/**
 * A piece of code gets its language's name and a way to copy it.
 * @param {HTMLElement} code
 * @param {string} language
 */
function frame(code, language) {
  const pre = /** @type {HTMLElement} */ (code.parentElement);
  pre.setAttribute("tabindex", "0"); // what scrolls sideways is reached with the keyboard
  const block = h("div", { class: "code" });
  pre.replaceWith(block);
  block.append(h("div", { class: "code-head" }, h("span", {}, language || "code"),
    copyButton(() => code.textContent ?? "", "Copy the code")), pre);
  const said = [...code.childNodes];
  code.replaceChildren();
  addLines(code, said);
}

/**
 * Renders a growing text. A finished block is never touched again, and of a list no finished item: only the last one,
 * which may still change its meaning, is rendered anew, and a long one not even that. So a long answer costs no more a
 * frame than a short one.
 */
export class GrowingMarkdown {
  #settled = 0;
  /** @type {ChildNode[]} nodes of the last block */
  #tail = [];
  /** @type {{into: HTMLElement, at: number, fence: string, language: string, tail: ChildNode[], plain: boolean}|null}
   *  where the last block is appended to; `fence` is empty for a paragraph. Of a paragraph `tail` is what stands behind
   *  `at`; `plain`: something was never ended, and what comes is shown as it is until the paragraph ends */
  #grows = null;
  /** @type {{into: HTMLElement, loose: boolean}|null} a list of which the first items are settled */
  #list = null;

  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
  }

  /**
   * @param {string} text all of it, so far
   * @param {Run[]} [runs] of all of it
   */
  update(text, runs = []) {
    if (this.#grows && this.#append(text, runs)) return;
    let tokens = marked.lexer(text.slice(this.#settled));
    if (tokens.length > 1 && this.#endParagraph(text, tokens[0], runs)) tokens = tokens.slice(1);
    this.#grows = null;
    let last = tokens.length - 1;
    while (last > 0 && tokens[last].type === "space") last -= 1;
    // "2" after a list may be its next item's number, and half an item may look like a list of its own.
    if (/^\s*(?:(?:\d{1,9}[.)]?|[-*+])?\s*$|\d{1,9}[.)]\s|[-*+]\s)/.test(tokens[last]?.raw ?? "")) {
      const before = tokens.findLastIndex((token, i) => i < last && token.type !== "space");
      if (tokens[before]?.type === "list") last = before;
    }
    const settled = tokens.slice(0, Math.max(0, last)).reduce((sum, token) => sum + token.raw.length, 0);
    if (settled > 0) {
      this.#replaceTail(text, this.#settled + settled, runs, false);
      this.#settle(settled);
      this.#list = null;
    }
    this.#settleItems(text, tokens[last], runs);
    this.#replaceTail(text, text.length, runs, isOpen(tokens[last]), true);
    this.#grow(text, tokens[last]);
  }

  /**
   * @param {string} text the whole
   * @param {Run[]} [runs]
   * @param {boolean} [cut] whether it ends in the middle
   */
  finish(text, runs = [], cut = false) {
    if (/^ {0,3}\[[^\]\n]+\]:/m.test(text)) { // links may be defined after their use
      this.#settled = 0;
      this.root.replaceChildren();
      this.#tail = [];
      this.#list = null;
    } else if (this.#grows?.fence && this.#append(`${text}\n`, runs)) {
      const { into, language } = this.#grows;
      return colour(into, language); // a program that was cut in the middle
    } else if (this.#grows) {
      const tokens = marked.lexer(text.slice(this.#settled));
      if (tokens.slice(1).every(({ type }) => type === "space") && this.#endParagraph(text, tokens[0], runs, cut)) return;
    }
    this.#grows = null;
    this.#replaceTail(text, text.length, runs, false, cut);
  }

  /** @param {number} length */
  #settle(length) {
    this.#tail = [];
    this.#settled += length;
  }

  /**
   * The items of a long list before its last two are finished. (Should a list begin with its items close together and
   * set them apart later, the first ones stay close.)
   * @param {string} text
   * @param {any} token the last block
   * @param {Run[]} runs
   */
  #settleItems(text, token, runs) {
    if (token?.type !== "list" || token.raw.length < LONG || token.items.length < 3) return;
    const settled = token.items.slice(0, -2).reduce((/** @type {number} */ sum, /** @type {any} */ item) => sum + item.raw.length, 0);
    this.#replaceTail(text, this.#settled + settled, runs, false);
    const into = this.#list?.into ?? /** @type {HTMLElement} */ (this.#tail.find((node) => node instanceof HTMLElement));
    this.#list ??= { into, loose: token.loose };
    this.#settle(settled);
  }

  /**
   * @param {string} text
   * @param {any} token the last block
   */
  #grow(text, token) {
    const at = text.length;
    const parent = /** @type {HTMLElement|undefined} */ (this.#tail.findLast((node) => node instanceof HTMLElement));
    const fence = isOpen(token) ? /^([`~]+)[^\n]*\n/.exec(token.raw)?.[1] : undefined;
    if (fence && parent?.matches(".code") && !/(?:^|\n) {0,3}[`~]+$/.test(text)) {
      const into = /** @type {HTMLElement} */ (parent.querySelector("code"));
      // The page ends code with a line break that the model has yet to write.
      const end = into.lastElementChild?.lastChild;
      if (end instanceof Text && end.data.endsWith("\n") && !text.endsWith("\n")) end.data = end.data.slice(0, -1);
      this.#grows = { into, at, fence, language: /\S*/.exec(token.lang ?? "")?.[0].toLowerCase() ?? "", tail: [], plain: false };
    } else if (token?.type === "paragraph" && token.raw.length > LONG && parent?.localName === "p") {
      this.#grows = { into: parent, at: this.#settled, fence: "", language: "", tail: [...parent.childNodes], plain: false };
    }
  }

  /**
   * @param {string} text
   * @param {Run[]} runs
   * @returns {boolean} whether that is all it takes
   */
  #append(text, runs) {
    const grows = /** @type {any} */ (this.#grows);
    const { into, at, fence, language } = grows;
    if (!fence) return this.#appendToParagraph(text, runs);
    // What may be the fence at the end is held back until its line is whole.
    const line = text.lastIndexOf("\n", at - 1) + 1;
    const end = new RegExp(`^ {0,3}(?:${fence}${fence[0]}*[ \\t]*(?:\\n|$(?![^]))|${fence[0]}+$(?![^]))`, "m");
    const found = end.exec(text.slice(line));
    const to = found ? Math.max(at, line + found.index) : text.length;
    addLines(into, plain(text, at, to, runs));
    grows.at = to;
    if (!found?.[0].endsWith("\n")) {
      colourSoFar(into, language);
      return true;
    }
    this.#settle(line + found.index + found[0].length - this.#settled);
    colour(into, language);
    return false;
  }

  /**
   * Of a paragraph too what is finished is not touched again, up to the last place where nothing is open.
   * @param {string} text
   * @param {Run[]} runs
   */
  #appendToParagraph(text, runs) {
    const grows = /** @type {any} */ (this.#grows);
    const line = text.indexOf("\n", grows.at);
    if (line >= 0 && (grows.plain || line < text.length - 1)) return false; // after one line break it may yet go on
    if (!grows.plain) {
      for (const node of grows.tail) node.remove();
      if (text.length - grows.at > LONG) {
        const inside = (/** @type {number} */ at) => (runs[firstRun(runs, grows.at + at)]?.start ?? Infinity) < grows.at + at;
        const to = grows.at + finishedUpTo(text.slice(grows.at), inside);
        grows.into.append(...inline(text, grows.at, to, runs));
        grows.at = to;
      }
      grows.plain = text.length - grows.at > 4 * LONG;
    }
    grows.tail = grows.plain ? plain(text, grows.at, text.length, runs) : inline(text, grows.at, text.length, runs, true);
    grows.into.append(...grows.tail);
    if (grows.plain) grows.at = text.length;
    return true;
  }

  /**
   * @param {string} text
   * @param {any} token the first one that is not settled
   * @param {Run[]} runs
   * @param {boolean} [cut]
   * @returns {boolean} whether that was the growing paragraph, and only its end had to be rendered
   */
  #endParagraph(text, token, runs, cut = false) {
    const grows = this.#grows;
    if (!grows || grows.fence || grows.plain || token?.type !== "paragraph") return false;
    const to = this.#settled + token.raw.replace(/\n+$/, "").length;
    if (to < grows.at || text.slice(grows.at, to).includes("\n")) return false;
    for (const node of grows.tail) node.remove();
    grows.into.append(...inline(text, grows.at, to, runs, cut));
    this.#settle(token.raw.length);
    this.#grows = null;
    return true;
  }

  /**
   * @param {string} text
   * @param {number} to
   * @param {Run[]} runs
   * @param {boolean} open
   * @param {boolean} [growing]
   */
  #replaceTail(text, to, runs, open, growing = false) {
    for (const node of this.#tail) node.remove();
    const list = this.#list;
    const fragment = render(text, this.#settled, to, runs, { open, loose: list?.loose, growing });
    const more = list && fragment.firstElementChild?.localName === list.into.localName ? fragment.firstElementChild : null;
    this.#tail = more ? [...more.childNodes, ...fragment.childNodes].filter((node) => node !== more) : [...fragment.childNodes];
    if (more) {
      list?.into.append(...more.childNodes);
      more.remove();
    }
    this.root.append(fragment);
  }
}

/**
 * A part of the text as it is, with its runs.
 * @param {string} text
 * @param {number} from
 * @param {number} to
 * @param {Run[]} runs
 * @param {Node|string} [said] what the page shows of it
 * @returns {ChildNode[]}
 */
function plain(text, from, to, runs, said = text.slice(from, to)) {
  const holder = h("div", {}, h("span", {}, said));
  mark(holder, text, from, to, runs);
  return [.../** @type {HTMLElement} */ (holder.firstChild).childNodes];
}

/**
 * A part of a paragraph, with its runs.
 * @param {string} text
 * @param {number} from
 * @param {number} to
 * @param {Run[]} runs
 * @param {boolean} [growing]
 */
function inline(text, from, to, runs, growing = false) {
  const source = text.slice(from, to);
  const html = /** @type {string} */ (marked.parseInline(growing ? closed(source) : source));
  return plain(text, from, to, runs, /** @type {any} */ (DOMPurify.sanitize(html, ALLOWED)));
}

/** @param {any} token a fenced piece of code whose end is still to come */
function isOpen(token) {
  if (token?.type !== "code" || token.codeBlockStyle === "indented") return false;
  const fence = /^ {0,3}(`{3,}|~{3,})/.exec(token.raw)?.[1];
  return fence !== undefined && !new RegExp(`\\n {0,3}${fence[0]}{${fence.length},}[ \\t]*\\n*$`).test(token.raw);
}
