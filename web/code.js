/**
 * Colours for code. The library is fetched when the page is idle; until it is there, code is shown as it is. What
 * it makes of a model's text is fenced in again: spans with its own classes, nothing else.
 */

import DOMPurify from "./vendor/dompurify-3.4.18/purify.es.js";

const HOME = "./vendor/highlight.js-11.12.0/";
const LANGUAGES = ["bash", "c", "cpp", "css", "go", "java", "javascript", "json", "python", "rust", "sql", "typescript",
  "xml", "yaml"];
/** Beyond so many characters colours cost more time than a frame has. */
const MOST = 12_000;

/** @type {any} */
let library = null;

/** Fetch it; the promise is done when code can be coloured. */
export async function loadColours() {
  const [core, ...grammars] = await Promise.all(
    [`${HOME}core.min.js`, ...LANGUAGES.map((name) => `${HOME}languages/${name}.min.js`)].map((path) => import(path)));
  LANGUAGES.forEach((name, i) => core.default.registerLanguage(name, grammars[i].default));
  library = core.default;
}

/**
 * @param {HTMLElement} code
 * @param {string} language as the model named it
 */
export function colour(code, language) {
  const text = code.textContent ?? "";
  if (!library?.getLanguage(language) || text.length > MOST) return;
  const html = library.highlight(text, { language, ignoreIllegals: true }).value;
  code.replaceChildren(/** @type {any} */ (DOMPurify.sanitize(html, {
    ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], ALLOW_ARIA_ATTR: false, ALLOW_DATA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  })));
}
