/** Wires the page: the connection, the chat, the race, the keys. */

import { Chat } from "./chat.js";
import { loadColours } from "./code.js";
import { Conversation } from "./conversation.js";
import { byId, h } from "./dom.js";
import { figure } from "./metrics.js";
import { KEY_PATTERN, explain, wireError } from "./protocol.js";
import { RaceView } from "./race-view.js";
import { SettingsForm, keep, newSeed, recall } from "./settings.js";
import { Connection } from "./socket.js";

/** @typedef {import("./protocol.js").End} End */
/** @typedef {import("./answer-view.js").AnswerView} AnswerView */

const KEY = "dspark-stream.key";
const MARKS = "dspark-stream.marks";

const page = {
  scroller: byId("main"), chat: byId("chat"), intro: byId("intro"), turns: byId("turns"),
  race: byId("race"), raceIntro: byId("race-intro"), raceStage: byId("race-stage"),
  form: byId("composer"), question: byId("question"), send: byId("send"), stop: byId("stop"), hint: byId("hint"),
  settings: byId("settings"), raceNote: byId("race-note"), settingsToggle: byId("settings-toggle"), settingsDigest: byId("settings-digest"),
  modeSwitch: byId("mode-switch"), marks: byId("marks"), newChat: byId("new-chat"), exported: byId("export"),
  latest: byId("latest"), connection: byId("connection"), connectionText: byId("connection-text"),
  retryNow: byId("retry-now"), model: byId("model"), keyForm: byId("key-form"), key: byId("key"),
  keyError: byId("key-error"), notice: byId("notice"), toast: byId("toast"), status: byId("status"),
};

const settings = new SettingsForm(page.settings);
const conversation = new Conversation();
/** @type {{cancel: () => void}|null} what Stop stops */
let running = null;
let drafting = { gamma: 0, schedule: "adaptive" };
let modelName = "the model";
/** On a screen that is touched a question box with the focus brings up a keyboard over half the page. */
const touch = matchMedia("(pointer: coarse)");
const toQuestion = () => touch.matches || page.question.focus();

/** @param {string} text read out by screen readers, once */
const announce = (text) => (page.status.textContent = text);

/** @param {string} name @returns {any} the chosen one of a radio group */
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

// --- connection --------------------------------------------------------------------------------------------------

const socketUrl = new URL("v1/responses", document.baseURI);
socketUrl.protocol = socketUrl.protocol === "https:" ? "wss:" : "ws:";

const connection = new Connection({
  url: socketUrl.href,
  key: recall(KEY, sessionStorage),
  probe: async (key) => {
    try {
      const headers = key ? { Authorization: `Bearer ${key}` } : undefined;
      return (await fetch(new URL("v1/models", document.baseURI), { headers })).status;
    } catch {
      return 0;
    }
  },
  onState: showConnection,
  onHello: showHello,
  onStray: (event) => {
    const { title, detail } = explain(wireError(event));
    notice(`${title} ${detail}`);
  },
});

let countdown = 0;

/** @param {string} text */
function notice(text) {
  page.notice.textContent = text;
  page.notice.hidden = false;
}

/** @param {import("./socket.js").State} state */
function showConnection(state) {
  clearInterval(countdown);
  page.connection.dataset.phase = state.phase;
  page.retryNow.hidden = state.phase !== "waiting";
  page.keyForm.hidden = state.phase !== "key";
  if (state.phase === "open") {
    page.notice.hidden = true;
    hint("");
  }
  showRunning();

  if (state.phase === "connecting") page.connectionText.textContent = "Connecting";
  if (state.phase === "open") page.connectionText.textContent = "Connected";
  if (state.phase === "forbidden") {
    page.connectionText.textContent = "Refused";
    notice("The server does not accept connections from this page’s address. " +
      "Open the page at an address that the server allows.");
  }
  if (state.phase === "key") {
    page.connectionText.textContent = "Key needed";
    page.keyError.textContent = recall(KEY, sessionStorage) ? "The server did not accept that key." : "";
    page.key.focus();
  }
  if (state.phase === "waiting") {
    announce(state.why ?? "The connection is lost; it will be tried again.");
    const tick = () => {
      const left_s = Math.max(0, Math.ceil((/** @type {number} */ (state.retryAt) - Date.now()) / 1000));
      page.connectionText.textContent = `${state.why ?? "Offline."} Next try in ${left_s} s`;
    };
    tick();
    countdown = window.setInterval(tick, 1000);
  }
}

/** @param {any} hello */
function showHello(hello) {
  drafting = { gamma: hello.gamma ?? 0, schedule: hello.schedule ?? "adaptive" };
  settings.limit(hello.limits ?? {});
  settings.recommend(hello.sampling ?? {});
  digest();
  const name = (/** @type {string} */ path) => path.replace(/[/\\]+$/, "").split(/[/\\]/).pop() ?? path;
  modelName = name(hello.model);
  page.model.textContent = modelName;
  page.model.title = `Model ${hello.model}\n${hello.drafter ? `Drafter ${hello.drafter}` : "No drafter"}` +
    `\ndspark-stream ${hello.version}`;
  announce(`Connected to ${modelName}`);
  chat.greet(); // what is kept can be worked with now
}

page.retryNow.addEventListener("click", () => connection.open());

page.keyForm.addEventListener("submit", (/** @type {SubmitEvent} */ event) => {
  event.preventDefault();
  const key = page.key.value.trim();
  if (!KEY_PATTERN.test(key)) {
    page.keyError.textContent = "A key has letters, digits and marks like - _ . only.";
    return;
  }
  keep(KEY, key, sessionStorage); // for this tab only: a key does not belong in lasting storage
  page.key.value = "";
  connection.useKey(key);
  page.question.focus();
});

// --- asking ------------------------------------------------------------------------------------------------------

/** @param {any} question with the `view` that shows its answer */
function ask({ view, ...question }) {
  let cancel = () => {};
  const ended = /** @type {Promise<End>} */ (new Promise((resolve) => {
    ({ cancel } = connection.ask({ ...question, settings: settings.read() }, {
      created: () => view.created(),
      delta: (text) => view.delta(text),
      step: (step) => view.step(step),
      done: (text) => view.done(text),
      end: (end) => {
        view.finish(end);
        resolve(end);
      },
    }));
  }));
  return { ended, cancel: () => {
    view.stopping();
    cancel();
  } };
}

const chat = new Chat({
  list: page.turns, conversation, drafting: () => drafting, settings: () => settings.read(), mode: () => chosen("mode"),
  free: mayAsk, ask, undo, onPaint: follow,
  running: (what, ended, view) => {
    page.intro.hidden = true;
    stick(true);
    follow();
    return whileRunning(what, ended.then((end) => endSentence(end, view)));
  },
  changed: save,
});

let full = false;

function save() {
  if (conversation.keep() || full) return;
  full = true;
  toast("This browser keeps no more: the conversation will not survive a reload. Export it to keep it.");
}

// What is half written is kept too.
addEventListener("pagehide", () => conversation.keep());

/** @param {End} end @param {AnswerView} view */
function endSentence(end, view) {
  const { tokens, tokens_per_s } = view.answer.snapshot();
  const size = `${tokens} tokens` + (tokens_per_s ? `, ${figure(tokens_per_s)} a second` : "");
  return {
    completed: `Answer complete: ${size}.`, incomplete: `Answer cut at the token limit: ${size}.`,
    cancelled: `Stopped after ${tokens} tokens.`, failed: "", lost: "", // the alert has said it
  }[end.status];
}

/** @param {string} question */
function startRace(question) {
  const now = settings.readForRace();
  const seed = now.seed ?? newSeed();
  page.raceIntro.hidden = true;
  const race = new RaceView(page.raceStage, { question, settings: now, seed, gamma: drafting.gamma });
  const input = /** @type {const} */ ([{ role: "user", content: question }]);
  whileRunning(race, race.run(
    (mode, verification, handlers) =>
      connection.ask({ lane: `race-${mode}`, mode, verification, seed, settings: now, input: [...input] }, handlers),
    (lane, end) => {
      const retry = () => {
        if (mayAsk()) startRace(question);
      };
      if (end.status === "lost") lane.notify("The connection was lost before the answer ended.", "", retry);
      if (end.status === "cancelled") lane.notify("The server stopped this answer before its end.", "", retry);
      if (end.status !== "failed") return;
      const { title, detail, retry: helps } = explain(end.error);
      lane.notify(title, detail, helps ? retry : undefined);
    }));
}

/**
 * @param {{cancel: () => void}} what
 * @param {Promise<string>} ended what to announce then
 */
async function whileRunning(what, ended) {
  running = what;
  showRunning();
  announce("Answering. Escape stops.");
  const sentence = await ended;
  if (running !== what) return;
  running = null;
  hint("");
  showRunning();
  announce(sentence);
}

function showRunning() {
  const focused = document.activeElement === page.send || document.activeElement === page.stop;
  page.send.hidden = running !== null;
  page.stop.hidden = running === null;
  page.stop.disabled = false;
  page.send.disabled = connection.state.phase !== "open";
  if (focused) (running ? page.stop : page.send).focus(); // one button replaces the other: keep the place
}

/** Beside the question box: why nothing was sent. @param {string} text */
function hint(text) {
  page.hint.textContent = text;
}

/** @returns {boolean} whether a question can be sent now; if not, the page says why */
function mayAsk() {
  const why = running ? "An answer is still being written. Escape stops it."
    : connection.state.phase !== "open" ? "Not sent: the page is not connected. Your text stays here." : "";
  hint(why);
  return why === "";
}

function stop() {
  if (!running) return;
  running.cancel();
  page.stop.disabled = true;
}

function submit() {
  const question = page.question.value.trim();
  if (question === "" || !mayAsk()) return;
  const invalid = settings.firstInvalid();
  if (invalid) {
    openSettings(true);
    invalid.focus();
    return;
  }
  page.question.value = "";
  fit();
  if (touch.matches) page.question.blur(); // the keyboard would stand where the answer comes
  if (chosen("view") === "race") startRace(question);
  else chat.ask(question);
}

page.form.addEventListener("submit", (/** @type {SubmitEvent} */ event) => {
  event.preventDefault();
  submit();
});

page.question.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
  // While an input method composes, Enter belongs to it.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});

page.stop.addEventListener("click", stop);

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) stop();
  else if (!page.settings.hidden) {
    openSettings(false);
    page.settingsToggle.focus();
  }
});

page.newChat.addEventListener("click", () => {
  running?.cancel();
  if (chosen("view") === "race") {
    page.raceStage.replaceChildren();
    page.raceIntro.hidden = false;
  } else if (conversation.turns.length) {
    const before = conversation.snapshot();
    conversation.turns = [];
    redraw();
    undo("A new chat was begun.", before);
  }
  toQuestion();
});

page.exported.addEventListener("click", () => {
  if (conversation.turns.length === 0) return toast("There is nothing to export yet.");
  const url = URL.createObjectURL(new Blob([conversation.markdown(modelName, settings.read().system)], { type: "text/markdown" }));
  h("a", { href: url, download: "conversation.md" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
  toast("Exported as conversation.md.");
});

for (const example of document.querySelectorAll("[data-ask]")) {
  example.addEventListener("click", () => {
    page.question.value = example.textContent;
    fit();
    toQuestion();
    submit();
  });
}

/** The question box is as high as its text, within what the style sheet allows. */
function fit() {
  page.question.style.height = "auto";
  page.question.style.height = `${page.question.scrollHeight + 2}px`;
}
page.question.addEventListener("input", () => {
  fit();
  hint("");
});

// --- what was taken away can be had back --------------------------------------------------------------------------

let toastTimer = 0;

/** @param {string} text @param {() => void} [back] */
function toast(text, back) {
  clearTimeout(toastTimer);
  page.toast.replaceChildren(h("span", {}, text), ...(back ? [h("button", { type: "button", class: "quiet small", onclick: () => {
    page.toast.hidden = true;
    back();
  } }, "Undo")] : []));
  page.toast.hidden = false;
  toastTimer = window.setTimeout(() => (page.toast.hidden = true), back ? 10_000 : 4000);
}

/** @param {string} what @param {string} before */
function undo(what, before) {
  toast(what, () => {
    running?.cancel();
    conversation.restore(before);
    redraw();
  });
}

function redraw() {
  chat.draw();
  page.intro.hidden = conversation.turns.length > 0;
  save();
}

// --- switches ----------------------------------------------------------------------------------------------------

function applyMarks() {
  const on = page.marks.checked ? "on" : "off";
  document.documentElement.dataset.marks = on;
  keep(MARKS, on);
}

function applyView() {
  const racing = chosen("view") === "race";
  document.documentElement.dataset.view = chosen("view");
  page.chat.hidden = racing;
  page.race.hidden = !racing;
  page.modeSwitch.hidden = racing;
  page.exported.hidden = racing;
  page.raceNote.hidden = !racing;
  page.newChat.textContent = racing ? "Clear" : "New chat";
  page.send.firstElementChild.textContent = racing ? "Race" : "Send";
  page.question.placeholder = racing ? "A question for both" : "Ask something";
  digest();
  stick(!racing && conversation.turns.length > 0);
  if (sticking) follow();
  else page.scroller.scrollTop = 0;
}

/** @param {boolean} open */
function openSettings(open) {
  page.settings.hidden = !open;
  page.settingsToggle.setAttribute("aria-expanded", String(open));
}

function digest() {
  const now = chosen("view") === "race" ? settings.readForRace() : settings.read();
  page.settingsDigest.textContent = [`temperature ${now.temperature}`, `${now.max_output_tokens} tokens`,
    ...(now.seed === null ? [] : [`seed ${now.seed}`]), ...(now.verification === "coupled" ? ["coupled"] : []),
    ...(now.system ? ["system prompt"] : [])].join(" · ");
}

page.settingsToggle.addEventListener("click", () => openSettings(page.settings.hidden));
page.settings.addEventListener("input", digest);
page.marks.addEventListener("change", applyMarks);
for (const input of document.querySelectorAll('input[name="view"]')) input.addEventListener("change", applyView);

// --- following the text ------------------------------------------------------------------------------------------

/** Only a reader who is at the end is kept at the end. */
let sticking = false;
let top_ = 0;

/** @param {boolean} on */
function stick(on) {
  sticking = on;
  page.scroller.classList.toggle("follows", on);
  if (on) page.latest.hidden = true;
}

function follow() {
  if (sticking && chosen("view") === "chat") {
    page.scroller.scrollTop = page.scroller.scrollHeight;
    top_ = page.scroller.scrollTop;
  } else page.latest.hidden = chosen("view") === "race" || !running;
}

page.scroller.addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = page.scroller;
  // Text that came meanwhile puts the end further off; only who goes up leaves it.
  if (scrollHeight - scrollTop - clientHeight < 48) stick(true);
  else if (scrollTop < top_) {
    stick(false);
    follow();
  }
  top_ = scrollTop;
}, { passive: true });

new ResizeObserver(follow).observe(page.scroller); // what is below it may grow

page.latest.addEventListener("click", () => {
  stick(true);
  follow();
});

// --- start -------------------------------------------------------------------------------------------------------

page.marks.checked = recall(MARKS) !== "off";
applyMarks();
conversation.recall();
chat.draw();
page.intro.hidden = conversation.turns.length > 0;
applyView();
connection.open();
loadColours(() => toast("The colours for code could not be loaded; code is shown without."));
toQuestion();
