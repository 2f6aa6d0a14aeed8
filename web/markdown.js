/**
 * Markdown of a model's answer to safe DOM. What a model writes is untrusted: raw HTML in it is shown as text, an
 * image becomes a link (to load one would tell its host that this was read), and DOMPurify with an allow-list is
 * the fence behind that.
 */

import DOMPurify from "./vendor/dompurify-3.4.18/purify.es.js";
import { Marked } from "./vendor/marked-18.2.1/marked.esm.js";

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "href", "rel", "start", "target", "title"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  RETURN_DOM_FRAGMENT: true,
};

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

/** @param {string} html */
const purified = (html) => /** @type {DocumentFragment} */ (/** @type {unknown} */ (DOMPurify.sanitize(html, ALLOWED)));

/**
 * @param {string} markdown
 * @returns {DocumentFragment}
 */
export function render(markdown) {
  return purified(/** @type {string} */ (marked.parse(markdown)));
}

/**
 * Renders a growing text. A finished block is never touched again: only the last one, which may still change its
 * meaning, is rendered anew, so a long answer costs no more a frame than a short one.
 */
export class GrowingMarkdown {
  #settled = 0;
  /** @type {ChildNode[]} nodes of the last block */
  #tail = [];

  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
  }

  /** @param {string} text all of it, so far */
  update(text) {
    const tokens = marked.lexer(text.slice(this.#settled));
    let last = tokens.length - 1;
    while (last > 0 && tokens[last].type === "space") last -= 1;
    const settled = tokens.slice(0, Math.max(0, last)).map((token) => token.raw).join("");
    this.#replaceTail(settled);
    this.#tail = [];
    this.#settled += settled.length;
    this.#replaceTail(text.slice(this.#settled));
  }

  /** @param {string} text the whole; links may be defined after their use, so the end renders once from the start */
  finish(text) {
    this.root.replaceChildren(render(text));
    this.#settled = text.length;
    this.#tail = [];
  }

  /** @param {string} markdown */
  #replaceTail(markdown) {
    for (const node of this.#tail) node.remove();
    const fragment = render(markdown);
    this.#tail = [...fragment.childNodes];
    this.root.append(fragment);
  }
}
