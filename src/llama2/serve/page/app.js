// The chat page: its state, and its reactions to events.

import { Answer, compare } from "./answer.js";
import { ApiError, countTokens, key, models } from "./api.js";
import {
  assistantMessage, newConversation, now, partsOf, promptOf, randomSeed, SETTINGS, titleOf, Tree, userMessage,
} from "./conversation.js";
import { h, icon } from "./dom.js";
import { readSettings } from "./exchange.js";
import { Attachments, LONG_PASTE } from "./files.js";
import * as storage from "./browser_storage.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { fit, Thread } from "./thread.js";

const SUGGESTIONS = [
  "Explain how a rainbow forms",
  "Write a Python function that finds the prime numbers below n",
  "Plan a quiet weekend in the mountains",
];
/** Milliseconds between two saves of a streaming answer: a crash may lose so much. */
const SAVE_EVERY = 1000;

const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");

const running = new Map(); // conversation id → Answer
const failures = new Map(); // conversation id → ApiError of the last request
const notes = new Map(); // message id → {same, text}
let served = []; // the server's models
let conversations = []; // all of them, without messages
let current = newConversation(defaults()); // the one that is shown; saved from its first message on
let tree = new Tree();
let store;
let leaving = false; // whether the page is about to go

function defaults() {
  try {
    return readSettings(JSON.parse(storage.load("defaults") ?? "{}"));
  } catch {
    return { ...SETTINGS };
  }
}

const fresh = () => !conversations.some(({ id }) => id === current.id);

// ---- Showing ----------------------------------------------------------------------------------------------------

const thread = new Thread(
  { scroller: $("thread"), list: $("messages"), latest: $("latest"), spoken: $("spoken") },
  {
    edit: (message, text) => sendMessage(message.parent, text, message.files),
    regenerate: (message) =>
      answer(message.parent, requestFor(tree.versions(message).length), { beside: message }),
    exactly: (message) => {
      const prefix = message.content.slice(0, message.prefix ?? 0);
      return answer(message.parent, { ...message.request }, { beside: message, prefix, exactly: true });
    },
    continueAnswer: (message) => answer(message.parent, requestFor(0), { beside: message, prefix: message.content }),
    retry: (message) => answer(message.id, requestFor(0)),
    rate: (message, rating) => {
      Object.assign(message, { rating, rated: rating && now() });
      save([message]);
      render();
    },
    version: (message) => {
      current.leaf = tree.newest(message).id;
      save();
      render();
      thread.element(message.id)?.scrollIntoView({ block: "nearest" });
    },
  },
);

let sidebar;
let settings;
let attachments;

function state() {
  return {
    path: tree.path(current.leaf),
    running: running.get(current.id) ?? null,
    failure: failures.get(current.id) ?? null,
    notes,
    versions: (message) => tree.versions(message),
    answers: (message) => tree.messages.get(message.parent)?.role === "user",
  };
}

function render() {
  const { path, running: answering } = state();
  thread.show(state());
  $("empty").hidden = path.length > 0;
  $("title").textContent = current.title || "New conversation";
  document.title = current.title ? `${current.title} · llama2` : "llama2";
  $("stop").hidden = answering === null;
  $("send").hidden = answering !== null;
  settings.show({ ...SETTINGS, ...current.settings }, fresh() ? null : current.title);
  const { temperature, top_p, seed } = current.settings;
  const drawn = temperature === 0 ? "Likeliest tokens" : `Temperature ${temperature} · top-p ${top_p}`;
  $("sampling-text").textContent = seed === null ? drawn : `${drawn} · seed ${seed}`;
  showModel();
  showContext(path);
  sidebar.show(conversations, current.id, running);
}

function model() {
  return served.find(({ id }) => id === current.settings.model) ?? served[0] ?? null;
}

function showModel() {
  const chosen = model();
  const several = served.length > 1;
  $("model").hidden = !several;
  $("model-name").hidden = several;
  $("model-name").textContent = chosen?.id ?? "";
  if (several) {
    $("model").replaceChildren(...served.map(({ id }) => h("option", { value: id, selected: id === chosen.id }, id)));
    $("model").value = chosen.id;
  }
  const context = chosen?.max_model_len;
  $("empty-model").textContent = chosen
    ? `${chosen.id} answers${context ? `, and reads up to ${number.format(context)} tokens` : ""}. Nothing leaves this server.`
    : "";
}

/** How much of the context the last answer left in use, and what the attachments will add. */
function showContext(path) {
  const usage = path.findLast((message) => message.usage)?.usage;
  const limit = model()?.max_model_len;
  const used = (usage ? usage.prompt_tokens + usage.completion_tokens : 0) + attachments.tokens;
  const over = limit && used > limit;
  $("context").hidden = used === 0;
  $("context").classList.toggle("over", over);
  const text = limit ? `${number.format(used)} of ${number.format(limit)} tokens` : `${number.format(used)} tokens`;
  $("context-text").textContent = over ? `${text}: too many` : text;
  $("context-meter").hidden = !limit;
  if (limit) $("context-meter").value = Math.min(1, used / limit);
}

function banner(text, label = null, action = null) {
  const parts = [h("span", {}, text)];
  if (label) parts.push(h("button", { type: "button", class: "button", click: action }, label));
  $("banner").replaceChildren(...(text ? parts : []));
}

/** A line at the bottom that goes by itself, though not while someone is at it. */
function toast(text, label, action) {
  const element = h("div", { class: "toast" }, h("span", {}, text));
  const close = () => element.remove();
  const act = () => {
    close();
    action();
  };
  if (label) element.append(h("button", { type: "button", class: "button", click: act }, label));
  $("toasts").replaceChildren(element);
  const timer = setInterval(() => {
    if (element.matches(":hover, :focus-within")) return;
    close();
    clearInterval(timer);
  }, 10_000);
}

function confirm(title, text) {
  const dialog = $("confirm");
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

// ---- Saving -----------------------------------------------------------------------------------------------------

/** Saves a conversation's record and these of its messages, and deletes those in `gone`. */
async function save(messages = [], conversation = current, gone = []) {
  conversation.updated = now();
  const record = structuredClone(conversation);
  const run = running.get(conversation.id);
  if (run && !messages.includes(run.message)) record.leaf = run.leaf; // the message that it names must be saved, too
  const index = conversations.findIndex(({ id }) => id === conversation.id);
  if (index >= 0) conversations.splice(index, 1);
  conversations.unshift(conversation);
  try {
    await store.save(record, structuredClone(messages), gone.map(({ id }) => id));
  } catch (error) {
    banner(`Not saved: ${error.message}. The conversation is lost when the page closes; free some space, or copy it.`);
  }
}

async function reload() {
  conversations = await store.conversations();
}

/** Stops every answer, and waits until their parts are saved. */
async function settle(runs = [...running.values()]) {
  for (const run of runs) run.stop();
  await Promise.all(runs.map(({ ended }) => ended));
}

async function remove(conversation) {
  if (running.has(conversation.id)) await settle([running.get(conversation.id)]);
  const gone = await store.remove(conversation);
  drafts.forget(conversation.id);
  const open = conversation.id === current.id;
  conversations = conversations.filter(({ id }) => id !== conversation.id);
  if (open) startNew();
  else render();
  toast(`“${conversation.title}” is deleted.`, "Undo", async () => {
    await store.merge([gone]);
    await reload();
    render();
    if (open) location.hash = conversation.id;
  });
}

// ---- Answers ----------------------------------------------------------------------------------------------------

/** The settings of an answer. The `count`th answer to one message has a seed of its own. */
function requestFor(count) {
  const { seed, ...rest } = current.settings;
  const chosen = seed === null ? randomSeed() : (seed + count) % 2 ** 32;
  return { ...SETTINGS, ...rest, model: model()?.id ?? "", seed: chosen };
}

async function sendMessage(parent, text, files = []) {
  if (running.has(current.id)) return;
  const message = userMessage(current, parent, text, files);
  tree.add(message);
  current.leaf = message.id;
  if (current.title === "") current.title = titleOf(text.trim() === "" ? files[0].name : text);
  thread.follow = true;
  const saving = save([message]);
  history.replaceState(null, "", `#${current.id}`);
  await Promise.all([saving, answer(message.id, requestFor(0))]);
}

/**
 * Requests an answer to the message `parent`. `beside` is the answer that it is an alternative to; it begins with
 * `prefix`. With `exactly`, it should be the same, and is saved only if it differs.
 */
async function answer(parent, request, { beside = null, prefix = "", exactly = false } = {}) {
  if (running.has(current.id)) return;
  const conversation = current;
  const branches = tree;
  const message = assistantMessage(conversation, parent, request, prefix);
  const run = new Answer(message, promptOf(request.system, branches.path(parent)));
  run.tree = branches;
  run.leaf = conversation.leaf; // what was shown before
  const { promise, resolve: end } = Promise.withResolvers();
  run.ended = promise;
  running.set(conversation.id, run);
  failures.delete(conversation.id);
  if (beside) notes.delete(beside.id);
  branches.add(message);
  conversation.leaf = message.id;
  thread.follow = true;
  thread.speaker.begin();
  thread.speaker.say("Answering");
  render();

  if (request.model === "") {
    await connect();
    request.model = model()?.id ?? "";
  }
  let drawing = false;
  let saved = performance.now();
  await run.run(() => {
    if (drawing) return;
    drawing = true;
    afterFrame(() => {
      drawing = false;
      if (running.get(conversation.id) !== run) return;
      if (conversation === current) thread.grow(run);
      if (!exactly && performance.now() - saved > SAVE_EVERY) {
        saved = performance.now();
        save([message], conversation);
      }
    });
  });

  if (leaving) return; // the browser has closed the connection; what was saved stays
  const whole = isWhole(message);
  const comparison = exactly && whole ? compare(beside, message) : null;
  // An answer that failed before its first token stays, so that the user can continue. If not, the next one replaces it.
  const failed = beside !== null && beside.content === "" && !isWhole(beside) && !branches.followers.get(beside.id)?.length;
  const wanted = exactly ? comparison?.same === false : beside === null || failed || whole || run.begun;
  if (wanted) {
    if (comparison) notes.set(message.id, comparison);
    if (run.failure) failures.set(conversation.id, run.failure);
    if (failed) branches.remove(beside);
    await save([message], conversation, failed ? [beside] : []);
  } else {
    branches.remove(message);
    conversation.leaf = run.leaf;
    if (comparison) notes.set(beside.id, comparison);
    else if (run.failure) notes.set(beside.id, { same: false, text: `No other answer: ${run.failure.message}` });
  }
  running.delete(conversation.id); // only after all of it is saved
  end();
  if (conversation === current) {
    thread.speaker.finish(partsOf(message.content).answer);
    if (comparison) thread.speaker.say(comparison.text);
    if (run.failure) thread.speaker.say(run.failure.message);
  }
  render();
  if (run.failure?.kind === "key") requestKey();
  if (whole && !model()?.max_model_len) connect(); // how much a model reads is known once it is loaded
}

/** Whether the model, a limit or a policy has ended an answer. */
function isWhole({ finish }) {
  return ["stop", "length", "content_filter"].includes(finish);
}

/** Draws with the next frame; in a window that nobody sees there are none, and a timer does. */
function afterFrame(action) {
  if (document.hidden) setTimeout(action, 200);
  else requestAnimationFrame(action);
}

function stop() {
  running.get(current.id)?.stop();
}

// ---- Drafts -------------------------------------------------------------------------------------------------------

/** The draft of the conversation that is shown, for as long as the window is open. */
const drafts = {
  get place() {
    return fresh() ? "new" : current.id;
  },
  load() {
    const prompt = $("prompt");
    prompt.value = storage.load(`draft-${this.place}`, "sessionStorage") ?? "";
    fit(prompt);
    attachments.set(JSON.parse(storage.load(`draft-files-${this.place}`, "sessionStorage") ?? "[]"));
  },
  saveText() {
    storage.save(`draft-${this.place}`, $("prompt").value || null, "sessionStorage");
  },
  saveFiles() {
    const { files } = attachments;
    storage.save(`draft-files-${this.place}`, files.length > 0 ? JSON.stringify(files) : null, "sessionStorage");
  },
  forget(place = this.place) {
    storage.save(`draft-${place}`, null, "sessionStorage");
    storage.save(`draft-files-${place}`, null, "sessionStorage");
  },
};

function send() {
  const text = $("prompt").value;
  const { files } = attachments;
  if ((text.trim() === "" && files.length === 0) || running.has(current.id)) return;
  drafts.forget();
  drafts.load();
  sendMessage(current.leaf, text, files);
}

function listenForFiles() {
  const prompt = $("prompt");
  const chooser = $("attachment");
  $("attach").addEventListener("click", () => chooser.click());
  chooser.addEventListener("change", async () => {
    await attachments.add([...chooser.files]);
    chooser.value = ""; // so that the same file can be chosen again
    prompt.focus();
  });
  prompt.addEventListener("paste", (event) => {
    const { files } = event.clipboardData;
    const text = event.clipboardData.getData("text/plain");
    const long = text.length > LONG_PASTE;
    if (!long && (text !== "" || files.length === 0)) return;
    event.preventDefault();
    attachments.add(long ? [new File([text], "Pasted text.txt")] : [...files]);
  });
  const hasFiles = ({ dataTransfer }) => dataTransfer?.types.includes("Files");
  const main = document.querySelector("main");
  const show = (over) => document.body.classList.toggle("dropping", over);
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault(); // or the browser leaves the page for the file
    show(main.contains(event.target));
  });
  addEventListener("dragleave", (event) => event.relatedTarget === null && show(false));
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    show(false);
    attachments.add([...event.dataTransfer.files]);
    prompt.focus();
  });
}

// ---- Navigation -------------------------------------------------------------------------------------------------

/** Opens the conversation of the URL: #CONVERSATION or #CONVERSATION/MESSAGE. */
async function follow() {
  const [id, message = null] = location.hash.slice(1).split("/");
  const conversation = conversations.find((each) => each.id === id);
  if (!conversation) {
    if (id !== "") toast("This conversation is not in this browser.");
    startNew();
    return;
  }
  if (conversation !== current) {
    // While an answer streams, the messages in use are newer than the saved ones.
    const branches = running.get(id)?.tree ?? new Tree(await store.messages(id));
    if (location.hash.slice(1).split("/")[0] !== id) return; // meanwhile another one was chosen
    [current, tree] = [conversation, branches];
  }
  if (message && tree.messages.has(message)) current.leaf = tree.newest(tree.messages.get(message)).id;
  open(message);
}

function open(message) {
  thread.open(state(), message);
  drafts.load();
  render();
  closeSidebar();
  if (!message) focusPrompt();
}

function startNew() {
  if (location.hash !== "") history.pushState(null, "", location.pathname + location.search);
  current = newConversation({ ...defaults(), model: current.settings.model });
  tree = new Tree();
  open(null);
}

/** On a phone the keyboard would cover what there is to read. */
function focusPrompt() {
  if (matchMedia("(hover: hover)").matches) $("prompt").focus();
}

const narrow = matchMedia("(max-width: 52em)");

function openSidebar() {
  document.body.classList.add("with-sidebar");
  $("scrim").hidden = false;
  $("open-sidebar").setAttribute("aria-expanded", "true");
  showSidebar();
  $("close-sidebar").focus();
}

function closeSidebar() {
  if (!document.body.classList.contains("with-sidebar")) return;
  document.body.classList.remove("with-sidebar");
  $("scrim").hidden = true;
  $("open-sidebar").setAttribute("aria-expanded", "false");
  showSidebar();
  $("open-sidebar").focus();
}

/** Where there is room for one thing only, the other cannot be reached. */
function showSidebar() {
  const over = narrow.matches && document.body.classList.contains("with-sidebar");
  $("sidebar").inert = narrow.matches && !over;
  document.querySelector("main").inert = over;
}

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "auto";
  const names = { auto: "Theme: system", light: "Theme: light", dark: "Theme: dark" };
  const icons = { auto: "auto", light: "sun", dark: "moon" };
  $("theme").replaceChildren(icon(icons[theme]), names[theme]);
}

function nextTheme() {
  const { dataset } = document.documentElement;
  const next = { undefined: "light", light: "dark", dark: null }[dataset.theme];
  if (next) dataset.theme = next;
  else delete dataset.theme;
  storage.save("theme", next);
  showTheme();
}

// ---- The server -------------------------------------------------------------------------------------------------

async function connect() {
  try {
    served = await models();
    banner("");
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.kind === "key") requestKey();
    else banner(error.message, "Try again", connect);
  }
  render();
}

function requestKey() {
  const dialog = $("key-dialog");
  $("key-text").textContent = key.get()
    ? "The server rejects this key. The person who runs it has the right one."
    : "The server requires a key. The person who runs it has one.";
  if (!dialog.open) dialog.showModal();
}

// ---- Events -----------------------------------------------------------------------------------------------------

function listen() {
  const prompt = $("prompt");
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("input", () => {
    fit(prompt);
    drafts.saveText();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  listenForFiles();
  $("stop").addEventListener("click", () => {
    stop();
    prompt.focus();
  });
  $("new").addEventListener("click", startNew);
  $("theme").addEventListener("click", nextTheme);
  $("open-sidebar").addEventListener("click", openSidebar);
  $("close-sidebar").addEventListener("click", closeSidebar);
  $("scrim").addEventListener("click", closeSidebar);
  $("open-settings").addEventListener("click", () => settings.open("system"));
  $("sampling").addEventListener("click", () => settings.open("temperature"));
  $("model").addEventListener("change", ({ target }) => change({ ...current.settings, model: target.value }));
  $("suggestions").append(
    ...SUGGESTIONS.map((text) => h("button", { type: "button", class: "suggestion", click: () => sendMessage(null, text) }, text)),
  );
  for (const button of document.querySelectorAll("[data-close]"))
    button.addEventListener("click", () => button.closest("dialog").close());
  $("key-form").addEventListener("submit", ({ target }) => {
    const fields = target.elements;
    key.set(fields.key.value, fields.remember.checked);
    fields.key.value = "";
    connect();
  });
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.defaultPrevented || document.querySelector("dialog[open]")) return;
    const command = event.ctrlKey || event.metaKey;
    if (command && event.key.toLowerCase() === "k") {
      event.preventDefault();
      if (narrow.matches) openSidebar();
      $("search").focus();
    } else if (command && event.shiftKey && event.key.toLowerCase() === "o") {
      event.preventDefault();
      startNew();
    } else if (event.key === "Escape") {
      if (document.body.classList.contains("with-sidebar")) closeSidebar();
      else stop();
    }
  });
  narrow.addEventListener("change", showSidebar);
  addEventListener("hashchange", follow);
  addEventListener("pagehide", () => (leaving = true));
  addEventListener("pageshow", ({ persisted }) => persisted && location.reload());
  // The parts of an answer are saved before the page may be closed.
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) return;
    for (const [id, { message }] of running) {
      const conversation = conversations.find((each) => each.id === id);
      if (conversation && message.content) save([message], conversation);
    }
  });
}

/** Loads the shown conversation from the store again. */
async function refresh() {
  const again = conversations.find(({ id }) => id === current.id);
  if (!again && tree.messages.size > 0) return startNew();
  if (again) [current, tree] = [again, new Tree(await store.messages(again.id))];
  return render();
}

function change(chosen) {
  current.settings = chosen;
  if (!fresh()) save();
  render();
}

async function start() {
  try {
    store = await Store.open();
    await reload();
  } catch (error) {
    // Without a store there are no conversations; the API and its description remain.
    banner(`This browser stores no data for the page (${error.message}). Allow it to, and load the page again.`);
    return;
  }
  store.onChange(async () => {
    if (running.size > 0) return; // the streaming answers here are newer
    await reload();
    await refresh();
  });
  attachments = new Attachments($("attachments"), {
    count: (text) => countTokens(text, model()?.id).catch(() => null),
    changed() {
      drafts.saveFiles();
      showContext(state().path);
    },
    refused: (line) => toast(line),
  });
  const rename = (conversation, title) => {
    conversation.title = title;
    save([], conversation);
    render();
  };
  sidebar = new Sidebar({ list: $("list"), search: $("search"), found: $("found") }, store, { remove, rename });
  settings = new Settings($("settings"), store, {
    changed: change,
    renamed: (title) => title && rename(current, title),
    settle,
    imported: async () => {
      await reload();
      await refresh();
    },
    saveAsDefault: ({ model: _, ...rest }) => storage.save("defaults", JSON.stringify(rest)),
    confirm,
  });
  listen();
  showTheme();
  showSidebar();
  render();
  await Promise.all([follow(), connect()]);
  document.body.dataset.ready = "";
}

start();
