/** Colours code, beside the page: a long program would keep the page busy for longer than a frame. */

import library from "./vendor/highlight.js-11.12.0/core.min.js";
import bash from "./vendor/highlight.js-11.12.0/languages/bash.min.js";
import c from "./vendor/highlight.js-11.12.0/languages/c.min.js";
import cpp from "./vendor/highlight.js-11.12.0/languages/cpp.min.js";
import css from "./vendor/highlight.js-11.12.0/languages/css.min.js";
import go from "./vendor/highlight.js-11.12.0/languages/go.min.js";
import java from "./vendor/highlight.js-11.12.0/languages/java.min.js";
import javascript from "./vendor/highlight.js-11.12.0/languages/javascript.min.js";
import json from "./vendor/highlight.js-11.12.0/languages/json.min.js";
import python from "./vendor/highlight.js-11.12.0/languages/python.min.js";
import rust from "./vendor/highlight.js-11.12.0/languages/rust.min.js";
import sql from "./vendor/highlight.js-11.12.0/languages/sql.min.js";
import typescript from "./vendor/highlight.js-11.12.0/languages/typescript.min.js";
import xml from "./vendor/highlight.js-11.12.0/languages/xml.min.js";
import yaml from "./vendor/highlight.js-11.12.0/languages/yaml.min.js";

const languages = { bash, c, cpp, css, go, java, javascript, json, python, rust, sql, typescript, xml, yaml };
for (const [name, grammar] of Object.entries(languages)) library.registerLanguage(name, grammar);

onmessage = ({ data: { id, language, text } }) => {
  let html = "";
  try {
    const known = library.getLanguage(language); // by one of its names
    if (known) html = library.highlight(text, { language, ignoreIllegals: true }).value;
  } catch {
    // a text that it cannot read stays as it is
  }
  postMessage({ id, html });
};
