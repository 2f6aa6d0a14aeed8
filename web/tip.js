/** The note beside a run: what its round did. One for the page; it stands where a run is pointed at or has the focus. */

import { byId, h } from "./dom.js";
import { roundWords } from "./words.js";

/** @typedef {import("./protocol.js").Step} Step */

const tip = byId("tip");
/** @type {HTMLElement|null} */
let shownFor = null;

/** @param {HTMLElement} run @param {Step} step @param {number} round */
export function showTip(run, step, round) {
  const [title, detail] = roundWords(step, round);
  tip.replaceChildren(h("b", {}, title), h("span", {}, detail));
  tip.hidden = false;
  shownFor?.removeAttribute("aria-describedby");
  run.setAttribute("aria-describedby", "tip");
  shownFor = run;
  const at = run.getClientRects()[0];
  const { width, height } = tip.getBoundingClientRect();
  const above = at.top - height - 8;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  tip.style.top = `${above > 8 ? above : at.bottom + 8}px`;
}

export function hideTip() {
  tip.hidden = true;
  shownFor?.removeAttribute("aria-describedby");
  shownFor = null;
}

addEventListener("scroll", hideTip, { passive: true, capture: true });
addEventListener("resize", hideTip);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});
