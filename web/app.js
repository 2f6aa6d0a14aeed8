/** Wires the page: the connection, the chat, the race, the keys. */

import { AnswerView } from "./answer-view.js";
import { Conversation } from "./conversation.js";
import { byId, h } from "./dom.js";
import { figure } from "./metrics.js";
import { KEY_PATTERN, explain, wireError } from "./protocol.js";
import { RaceView } from "./race-view.js";
import { SettingsForm, keep, newSeed, recall } from "./settings.js";
import { Connection } from "./socket.js";

/** @typedef {import("./protocol.js").End} End */

const KEY = "dspark-stream.key";
const SHOW = "dspark-stream.show";

const page = {
  scroller: byId("main"), chat: byId("chat"), intro: byId("intro"), turns: byId("turns"),
  race: byId("race"), raceIntro: byId("race-intro"), raceStage: byId("race-stage"),
  form: byId("composer"), question: byId("question"), send: byId("send"), stop: byId("stop"),
  settings: byId("settings"), settingsToggle: byId("settings-toggle"), settingsDigest: byId("settings-digest"),
  modeSwitch: byId("mode-switch"), together: byId("together"), togetherOption: byId("together-option"),
  newChat: byId("new-chat"), latest: byId("latest"),
  connection: byId("connection"), connectionText: byId("connection-text"), retryNow: byId("retry-now"),
  model: byId("model"), keyForm: byId("key-form"), key: byId("key"), keyError: byId("key-error"),
  notice: byId("notice"), status: byId("status"),
};

const settings = new SettingsForm(page.settings);
const conversation = new Conversation();
/** @type {AnswerView[]} the answers of the chat, and of the race */
let answers = [];
/** @type {RaceView|null} */
let race = null;
/** @type {{cancel: () => void}|null} what Stop stops */
let running = null;
let gamma = 0;

/** @param {string} text read out by screen readers, once */
const announce = (text) => (page.status.textContent = text);

/** @param {string} name @returns {string} the chosen one of a radio group */
const chosen = (name) => page.form.ownerDocument.querySelector(`input[name="${name}"]:checked`).value;

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
    page.notice.textContent = `${title} ${detail}`;
    page.notice.hidden = false;
  },
});

let countdown = 0;

/** @param {import("./socket.js").State} state */
function showConnection(state) {
  clearInterval(countdown);
  page.connection.dataset.phase = state.phase;
  page.retryNow.hidden = state.phase !== "waiting";
  page.keyForm.hidden = state.phase !== "key";
  if (state.phase === "open") page.notice.hidden = true;
  showRunning();

  if (state.phase === "connecting") page.connectionText.textContent = "Connecting";
  if (state.phase === "open") page.connectionText.textContent = "Connected";
  if (state.phase === "forbidden") {
    page.connectionText.textContent = "Refused";
    page.notice.textContent = "The server does not accept connections from this page’s address. " +
      "Open the page at an address that the server allows.";
    page.notice.hidden = false;
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
  gamma = hello.gamma ?? 0;
  settings.limit(hello.limits ?? {});
  settings.recommend(hello.sampling ?? {});
  digest();
  const name = (/** @type {string} */ path) => path.replace(/[/\\]+$/, "").split(/[/\\]/).pop() ?? path;
  page.model.replaceChildren(
    h("span", { class: "model-name" }, name(hello.model)),
    h("span", { class: "drafter-name" }, hello.drafter ? `γ ${gamma}` : "no drafter"));
  page.model.title = `Target ${hello.model}` + (hello.drafter ? `\nDrafter ${hello.drafter}` : "") +
    `\ndspark-stream ${hello.version}`;
  announce(`Connected to ${name(hello.model)}`);
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

/**
 * @param {{lane: string, input: import("./protocol.js").Item[], mode: "dspark"|"plain", seed: number,
 *          settings?: import("./protocol.js").Settings, verification?: "rejection"|"coupled", view: AnswerView}} question
 * @returns {{ended: Promise<End>, cancel: () => void}}
 */
function ask({ view, settings: now = settings.read(), ...question }) {
  let cancel = () => {};
  view.sent();
  const ended = /** @type {Promise<End>} */ (new Promise((resolve) => {
    ({ cancel } = connection.ask({ ...question, settings: now }, {
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
  return {
    ended,
    cancel: () => {
      view.stopping();
      cancel();
    },
  };
}

/** @param {string} question */
async function chat(question) {
  const { seed: fixed } = settings.read();
  const seed = fixed ?? newSeed();
  const mode = /** @type {"dspark"|"plain"} */ (chosen("mode"));
  const view = new AnswerView({ mode, seed, gamma: mode === "plain" ? 0 : gamma, show: show(), title: "Answer", onPaint: follow });
  const turn = h("li", { class: "turn" },
    h("div", { class: "question" }, h("p", {}, question)), view.element);
  page.intro.hidden = true;
  page.turns.append(turn);
  answers.push(view);
  sticking = true;
  follow();

  const asked = ask({ lane: "chat", input: conversation.withQuestion(question), mode, seed, view });
  await whileRunning(asked, asked.ended.then((end) => {
    if (!turn.isConnected) return ""; // a new chat was begun meanwhile
    conversation.commit(question, view.text);
    view.notifyEnd(end, () => {
      if (running) return;
      conversation.forget(question, view.text);
      turn.remove();
      answers = answers.filter((each) => each !== view);
      chat(question);
    });
    return endSentence(end, view);
  }));
}

/** @param {End} end @param {AnswerView} view */
function endSentence(end, view) {
  const { tokens, tokens_per_s } = view.snapshot();
  const size = `${tokens} tokens` + (tokens_per_s ? `, ${figure(tokens_per_s)} a second` : "");
  return {
    completed: `Answer complete: ${size}.`, incomplete: `Answer cut at the token limit: ${size}.`,
    cancelled: `Stopped after ${tokens} tokens.`, failed: "", lost: "", // the alert has said it
  }[end.status];
}

/** @param {string} question */
async function startRace(question) {
  const now = settings.readForRace();
  const seed = now.seed ?? newSeed();
  page.raceIntro.hidden = true;
  race = new RaceView(page.raceStage, { question, settings: now, seed, together: page.together.checked, gamma,
    show: show(), onPaint: () => {} });
  page.scroller.scrollTop = 0;
  const current = race;
  await whileRunning(current, current.run({
    ask: (lane, mode, verification, view) => {
      const asked = ask({ lane, mode, verification, seed, view, settings: now, input: [{ role: "user", content: question }] });
      asked.ended.then((end) => view.notifyEnd(end, () => {
        if (!running) startRace(question);
      }));
      return asked;
    },
  }));
  if (race === current) page.scroller.scrollTop = 0; // where the verdict is
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

function stop() {
  if (!running) return;
  running.cancel();
  page.stop.disabled = true;
}

function submit() {
  const question = page.question.value.trim();
  if (running || connection.state.phase !== "open" || question === "") return;
  const invalid = settings.firstInvalid();
  if (invalid) {
    openSettings(true);
    invalid.focus();
    return;
  }
  page.question.value = "";
  fit();
  if (chosen("view") === "race") startRace(question);
  else chat(question);
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
    race = null;
    page.raceStage.replaceChildren();
    page.raceIntro.hidden = false;
  } else {
    conversation.clear();
    answers = [];
    page.turns.replaceChildren();
    page.intro.hidden = false;
  }
  page.question.focus();
});

for (const example of document.querySelectorAll("[data-ask]")) {
  example.addEventListener("click", () => {
    page.question.value = example.textContent;
    fit();
    page.question.focus();
    submit();
  });
}

/** The question box is as high as its text, within what the style sheet allows. */
function fit() {
  page.question.style.height = "auto";
  page.question.style.height = `${page.question.scrollHeight + 2}px`;
}
page.question.addEventListener("input", fit);

// --- switches ----------------------------------------------------------------------------------------------------

/** @returns {"tokens"|"formatted"} */
function show() {
  return /** @type {any} */ (chosen("show"));
}

function applyShow() {
  for (const view of [...answers, ...(race?.views ?? [])]) view.show(show());
  document.documentElement.dataset.show = show();
  keep(SHOW, show());
}

function applyView() {
  const racing = chosen("view") === "race";
  page.chat.hidden = racing;
  page.race.hidden = !racing;
  page.modeSwitch.hidden = racing;
  page.togetherOption.hidden = !racing;
  page.newChat.textContent = racing ? "Clear" : "New chat";
  page.send.firstElementChild.textContent = racing ? "Race" : "Send";
  page.question.placeholder = racing ? "A question for both" : "Ask something";
  page.scroller.scrollTop = racing ? 0 : page.scroller.scrollHeight;
}

/** @param {boolean} open */
function openSettings(open) {
  page.settings.hidden = !open;
  page.settingsToggle.setAttribute("aria-expanded", String(open));
}

function digest() {
  const now = settings.read();
  page.settingsDigest.textContent = `T ${now.temperature} · ${now.max_output_tokens} tokens` +
    (now.seed === null ? "" : ` · seed ${now.seed}`) + (now.verification === "coupled" ? " · coupled" : "");
}

page.settingsToggle.addEventListener("click", () => openSettings(page.settings.hidden));
page.settings.addEventListener("input", digest);
for (const input of document.querySelectorAll('input[name="show"]')) input.addEventListener("change", applyShow);
for (const input of document.querySelectorAll('input[name="view"]')) input.addEventListener("change", applyView);

// --- following the text ------------------------------------------------------------------------------------------

/** Only a reader who is at the end is kept at the end. */
let sticking = true;

function follow() {
  if (sticking) page.scroller.scrollTop = page.scroller.scrollHeight;
  else page.latest.hidden = chosen("view") === "race";
}

page.scroller.addEventListener("scroll", () => {
  sticking = page.scroller.scrollHeight - page.scroller.scrollTop - page.scroller.clientHeight < 48;
  if (sticking) page.latest.hidden = true;
}, { passive: true });

page.latest.addEventListener("click", () => {
  sticking = true;
  page.latest.hidden = true;
  follow();
});

// --- start -------------------------------------------------------------------------------------------------------

if (recall(SHOW) === "formatted") byId("show-formatted").checked = true;
applyShow();
applyView();
digest();
connection.open();
page.question.focus();
