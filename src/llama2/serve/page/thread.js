// The messages of one conversation on the screen.
//
// Only a window of a long history is in the document; scrolling to its ends, or the buttons there, bring more. An
// article keeps its element as long as it is shown, and so its focus and selection.

import { partsOf, rate } from "./conversation.js";
import { copy, h, icon, iconButton, reconcile } from "./dom.js";
import { sentFiles } from "./files.js";
import { MarkdownView } from "./markdown.js";
import { tokenView } from "./tokens.js";

const PAGE = 40;
/** The most characters of one text that are shown: an imported file may have megabytes. */
const MAX_SHOWN = 200_000;
const format = new Intl.NumberFormat("en");

export class Thread {
  /** `actions`: edit, regenerate, exactly, continueAnswer, rate, version, retry: what the buttons of a message do. */
  constructor({ scroller, list, latest, spoken }, actions) {
    this.scroller = scroller;
    this.list = list;
    this.latest = latest;
    this.speaker = new Announcer(spoken);
    this.actions = actions;
    this.articles = new Map(); // message id → Article
    this.path = [];
    this.from = this.to = 0; // which part of the path is in the document
    this.follow = true; // whether the end stays in view while it grows
    this.earlier = h("button", { type: "button", class: "more", click: () => this.#grow("earlier") });
    this.later = h("button", { type: "button", class: "more", click: () => this.#grow("later") });
    const near = new IntersectionObserver(
      (entries) => {
        for (const { isIntersecting, target } of entries)
          if (isIntersecting && target.isConnected) this.#grow(target === this.earlier ? "earlier" : "later");
      },
      { root: scroller, rootMargin: "600px 0px" },
    );
    near.observe(this.earlier);
    near.observe(this.later);
    new ResizeObserver(() => this.follow && this.#pin()).observe(list); // formulas get their height later
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    latest.addEventListener("click", () => this.toEnd());
  }

  /** Shows another conversation, with the end of `path`, or the message `at`, in view. */
  open(state, at = null) {
    this.articles.clear();
    this.speaker.silence();
    this.from = this.to = 0;
    this.follow = true;
    this.show(state);
    if (at) this.#reveal(at);
  }

  /**
   * Shows `path`. `running` is the streaming Answer, or null; `versions(message)` are the message and its siblings;
   * `answers(message)` is whether it follows a user's; `notes` maps message ids to a line about them; `failure` is the
   * ApiError of the last message.
   */
  show(state) {
    const { path } = state;
    this.state = state;
    // The window keeps its place while the path before it is the same, and its end if it had it.
    const atEnd = this.to === this.path.length;
    this.path = path;
    if (atEnd || this.to > path.length) this.to = path.length;
    if (this.from >= this.to || this.to - this.from > 4 * PAGE) this.from = Math.max(0, this.to - PAGE);
    this.#render();
    if (this.follow) this.toEnd();
  }

  /** The streaming answer has more text. */
  grow(answer) {
    this.articles.get(answer.message.id)?.grow(answer);
    this.speaker.grow(partsOf(answer.message.content).answer);
    if (this.follow) this.#pin();
  }

  /** Brings the end into view, and keeps it there. */
  toEnd() {
    this.follow = true;
    if (this.to < this.path.length) {
      this.to = this.path.length;
      this.from = Math.max(0, this.to - PAGE);
      this.#render();
    }
    this.#pin();
    this.latest.hidden = true;
  }

  /** The element of a message, if it is in the document. */
  element(id) {
    return this.articles.get(id)?.element;
  }

  #reveal(id) {
    const index = this.path.findIndex((message) => message.id === id);
    if (index < 0) return;
    this.follow = false;
    this.from = Math.max(0, index - PAGE / 2);
    this.to = Math.min(this.path.length, index + PAGE / 2);
    this.#render();
    const element = this.element(id);
    element.scrollIntoView({ block: "center" });
    element.focus({ preventScroll: true });
  }

  #grow(end) {
    const { scroller } = this;
    const height = scroller.scrollHeight;
    const focused = document.activeElement === this[end];
    if (end === "earlier") {
      if (this.from === 0) return;
      const first = this.path[this.from];
      this.from = Math.max(0, this.from - PAGE);
      this.#render();
      // If the browser does not keep the position by itself
      if (!CSS.supports("overflow-anchor", "auto")) scroller.scrollTop += scroller.scrollHeight - height;
      if (focused) this.element(first.id).focus({ preventScroll: true });
    } else {
      if (this.to === this.path.length) return;
      const last = this.path[this.to - 1];
      this.to = Math.min(this.path.length, this.to + PAGE);
      this.#render();
      if (focused) this.element(last.id).focus({ preventScroll: true });
    }
  }

  #render() {
    const { state, path } = this;
    const shown = path.slice(this.from, this.to);
    const elements = shown.map((message) => {
      let article = this.articles.get(message.id);
      if (!article) {
        article = message.role === "user" ? new Question(message, this.actions) : new Reply(message, this.actions);
        this.articles.set(message.id, article);
      }
      article.update(message, state);
      return article.element;
    });
    const ids = new Set(shown.map(({ id }) => id));
    for (const id of this.articles.keys()) if (!ids.has(id)) this.articles.delete(id);
    this.earlier.textContent = `${format.format(this.from)} earlier`;
    this.later.textContent = `${format.format(path.length - this.to)} later`;
    if (this.from > 0) elements.unshift(this.earlier);
    if (this.to < path.length) elements.push(this.later);
    reconcile(this.list, elements);
  }

  #pin() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  #scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.follow = this.to === this.path.length && scrollHeight - scrollTop - clientHeight < 60;
    this.latest.hidden = this.follow;
  }
}

/** Announces a streaming answer to screen readers, by whole paragraphs, so that single words do not interrupt. */
class Announcer {
  constructor(element) {
    this.element = element;
    this.announced = 0;
  }

  begin() {
    this.announced = 0;
    this.element.replaceChildren();
  }

  grow(text) {
    const end = text.lastIndexOf("\n\n");
    if (end > this.announced) this.#say(text, end);
  }

  finish(text) {
    this.#say(text, text.length);
  }

  say(text) {
    this.element.append(h("p", {}, text));
  }

  silence() {
    this.element.replaceChildren();
  }

  #say(text, end) {
    for (const part of text.slice(this.announced, end).split("\n\n")) if (part.trim()) this.say(part.trim());
    this.announced = end;
  }
}

/** The base of both kinds of messages: an article with a row of buttons below it. */
class Article {
  constructor(message, name, className) {
    this.message = message;
    this.foot = h("div", { class: "foot" });
    this.element = h("article", { class: `message ${className}`, "aria-label": name, tabindex: "-1" });
  }

  /** Fills the row of buttons, if they changed. The focused button keeps the focus. */
  footer(key, make) {
    if (key === this.key) return;
    this.key = key;
    const focused = this.foot.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    this.foot.replaceChildren(...make().filter((part) => part !== null));
    if (focused) this.foot.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
  }

  copyButton(label, text) {
    const button = iconButton("copy", label, {
      click: async () => {
        button.replaceChildren(icon((await copy(text())) ? "check" : "close"));
        setTimeout(() => button.replaceChildren(icon("copy")), 2000);
      },
    });
    return button;
  }

  versions(message, beside, actions) {
    if (beside.length < 2) return null;
    const at = beside.indexOf(message);
    const step = (name, label, to) =>
      iconButton(name, label, {
        "aria-disabled": beside[to] ? null : "true",
        click: () => beside[to] && actions.version(beside[to]),
      });
    return h(
      "span",
      { class: "versions", role: "group", "aria-label": "Versions" },
      step("previous", "Version before", at - 1),
      h("span", {}, `${at + 1} / ${beside.length}`),
      step("next", "Version after", at + 1),
    );
  }
}

/** A message of the user. */
class Question extends Article {
  constructor(message, actions) {
    super(message, "You", "question");
    this.actions = actions;
    this.bubble = h("div", { class: "bubble", dir: "auto", hidden: message.content === "" }, shown(message.content));
    this.after = h("div");
    this.element.append(...sentFiles(message.files ?? []), this.bubble, this.foot, this.after);
  }

  update(message, { path, running, failure, versions }) {
    this.message = message;
    const beside = versions(message);
    const busy = running !== null;
    this.footer(`${beside.indexOf(message)} ${beside.length} ${busy}`, () => [
      this.versions(message, beside, this.actions),
      this.copyButton("Copy message", () => this.message.content),
      busy ? null : iconButton("edit", "Edit message", { click: () => this.edit() }),
    ]);
    const unanswered = !busy && path.at(-1) === message;
    const problem = unanswered ? (failure ?? { kind: "none", message: "There is no answer yet." }) : null;
    if (problem === this.problem || (problem?.kind === "none" && this.problem?.kind === "none")) return;
    this.problem = problem;
    this.after.replaceChildren(...(problem ? [trouble(problem, "Try again", () => this.actions.retry(this.message))] : []));
  }

  /** Puts a box in the message's place. */
  edit() {
    const box = h("textarea", { "aria-label": "Edit message", dir: "auto", rows: "1" });
    const done = (focus) => {
      form.replaceWith(this.bubble);
      this.foot.hidden = false;
      if (focus) this.foot.querySelector('[aria-label="Edit message"]')?.focus();
    };
    const send = () => {
      if (box.value.trim() === "" && !this.message.files?.length) return;
      done(false);
      this.actions.edit(this.message, box.value);
    };
    const form = h(
      "form",
      {
        class: "edit",
        submit: (event) => {
          event.preventDefault();
          send();
        },
        keydown: (event) => {
          if (event.isComposing) return;
          if (event.key === "Escape") {
            event.stopPropagation();
            done(true);
          } else if (event.key === "Enter" && !event.shiftKey && event.target === box) {
            event.preventDefault();
            send();
          }
        },
      },
      box,
      h(
        "div",
        { class: "row" },
        h("span", { class: "grow" }, "The message as it was stays, as another version."),
        h("button", { type: "button", class: "button", click: () => done(true) }, "Cancel"),
        h("button", { type: "submit", class: "button primary" }, "Send"),
      ),
    );
    box.value = this.message.content;
    this.bubble.replaceWith(form);
    this.foot.hidden = true;
    fit(box);
    box.addEventListener("input", () => fit(box));
    box.focus();
  }
}

/** A message of the model. */
class Reply extends Article {
  constructor(message, actions) {
    super(message, "Answer", "reply");
    this.actions = actions;
    this.thinking = h("summary");
    this.thoughtText = h("div", { class: "thought-text", dir: "auto" });
    this.thought = h("details", { class: "thought", hidden: true }, this.thinking, this.thoughtText);
    this.body = h("div", { class: "prose" });
    this.view = new MarkdownView(this.body);
    this.tokens = null; // the view of tokens, where it is shown in the body's place
    this.waiting = h("p", { class: "waiting" }, "Reading");
    this.note = h("div");
    this.element.append(this.thought, this.body, this.note, this.foot);
  }

  update(message, { running, failure, notes, versions, answers, path }) {
    this.message = message;
    const coming = running?.message === message;
    this.element.classList.toggle("coming", coming);
    this.element.setAttribute("aria-busy", String(coming));
    if (coming) {
      this.grow(running);
      this.note.replaceChildren();
      this.remarked = null;
      return;
    }
    this.waiting.remove();
    this.#show(message.content, false);
    const last = path.at(-1) === message;
    this.#remark(message, notes.get(message.id), last ? failure : null);
    const beside = versions(message);
    const idle = running === null && answers(message);
    const whole = message.finish === "stop";
    const key = [beside.indexOf(message), beside.length, idle, last, message.rating, message.finish, this.tokens].join(" ");
    const rating = (value, name, label) =>
      iconButton(name, label, {
        "aria-pressed": String(message.rating === value),
        click: () => this.actions.rate(this.message, this.message.rating === value ? null : value),
      });
    const { content, request } = message;
    const action = (name, label, act) => iconButton(name, label, { click: () => act(this.message) });
    this.footer(key, () => [
      this.versions(message, beside, this.actions),
      this.copyButton("Copy answer", () => partsOf(this.message.content).answer || this.message.content),
      idle && last && !whole && content ? action("continue", "Continue", this.actions.continueAnswer) : null,
      idle ? action("again", "Regenerate", this.actions.regenerate) : null,
      idle && request && content ? action("exactly", "Regenerate exactly", this.actions.exactly) : null,
      message.tokens?.length ? this.#tokensButton() : null,
      rating("up", "up", "Good answer"),
      rating("down", "thumb-down", "Bad answer"),
      facts(message),
    ]);
  }

  grow(answer) {
    const { message } = answer;
    this.#show(message.content, true);
    if (message.content === "") this.body.append(this.waiting);
    else this.waiting.remove();
    const speed = answer.rate();
    const text = speed === null ? "" : `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`;
    if (this.key !== "coming") {
      this.key = "coming";
      this.live = h("span", { class: "facts" });
      this.foot.replaceChildren(this.live);
    }
    if (this.live.textContent !== text) this.live.textContent = text;
  }

  #show(content, coming) {
    const { thought, answer, open } = partsOf(content);
    this.thought.hidden = thought === "" && !(open && coming);
    const title = open && coming ? "Thinking" : "Thought";
    if (this.thinking.textContent !== title) this.thinking.textContent = title;
    if (this.thoughtText.textContent !== shown(thought)) this.thoughtText.textContent = shown(thought);
    this.view.update(shown(answer));
  }

  /** Shows the tokens, or the text again. */
  #tokensButton() {
    const button = iconButton("odds", "Token probabilities", {
      "aria-pressed": String(this.tokens !== null),
      click: () => {
        const before = this.tokens ?? this.body;
        this.tokens = this.tokens ? null : tokenView(this.message.tokens);
        before.replaceWith(this.tokens ?? this.body);
        button.setAttribute("aria-pressed", String(this.tokens !== null));
      },
    });
    return button;
  }

  #remark(message, note, failure) {
    const { finish, content, error, request } = message;
    const key = [finish, content === "", note?.text, failure?.message].join(" ");
    if (key === this.remarked && failure === this.failure) return;
    this.remarked = key;
    this.failure = failure;
    const again = () => this.actions.regenerate(this.message);
    const say = (text) => h("p", { class: "note" }, text);
    const remarks = {
      error: () =>
        trouble(failure ?? { kind: "server", message: error }, content === "" ? "Try again" : "Regenerate", again),
      length: () =>
        say(request?.max_tokens
          ? `Cut off after ${format.format(request.max_tokens)} tokens, as the settings say.`
          : "The context is full. Begin a new conversation, or edit an earlier message to go on from there."),
      stopped: () => say("Stopped."),
      content_filter: () => say("Ended by the policy of this server."),
      stop: () => (content.trim() === "" ? say("The model answered nothing.") : null),
      null: () => say("Broken off when the page was closed."),
    };
    const lines = [remarks[finish]()];
    if (note) lines.push(h("p", { class: note.same ? "note good" : "note" }, note.same ? icon("check") : null, note.text));
    this.note.replaceChildren(...lines.filter((part) => part !== null));
  }
}

function shown(text) {
  if (text.length <= MAX_SHOWN) return text;
  return `${text.slice(0, MAX_SHOWN)}\n\n… ${format.format(text.length - MAX_SHOWN)} more characters, which are copied and sent too.`;
}

/** One line about how an answer was generated. */
function facts(message) {
  const { usage, request, origin } = message;
  const speed = rate(message);
  const parts = [
    speed === null ? null : `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`,
    usage ? `${format.format(usage.completion_tokens)} tokens` : null,
    request ? `seed ${request.seed}` : origin,
  ];
  const sampling = Object.entries(request ?? {})
    .filter(([name, value]) => name !== "system" && value !== null)
    .map(([name, value]) => `${name} ${value}`);
  return h("span", { class: "facts", title: sampling.join("\n") }, parts.filter((part) => part).join(" · "));
}

const ADVICE = {
  busy: "Your message is saved; send it again when the server has room.",
  context: "Begin a new conversation, or edit an earlier message to go on from there.",
  connection: "Your message is saved. Start the server again or check the network, then try again.",
  key: "Enter the key to go on.",
  request: "Change the settings or the message, then try again.",
  server: "Its log says more.",
};

/** A box with an error and its remedy. For a busy server, it counts the seconds down. */
function trouble({ kind, message, seconds }, label, again) {
  const button = h("button", { type: "button", class: "button", click: () => button.getAttribute("aria-disabled") || again() }, label);
  const advice = ADVICE[kind] ? h("p", {}, ADVICE[kind]) : null;
  const box = h("div", { class: kind === "none" ? "trouble mild" : "trouble" }, h("p", {}, h("strong", {}, message)), advice, button);
  if (seconds > 0) {
    const until = Date.now() + seconds * 1000;
    button.setAttribute("aria-disabled", "true");
    const tick = () => {
      const left = Math.ceil((until - Date.now()) / 1000);
      button.textContent = left > 0 ? `Try again in ${left} s` : label;
      if (left > 0) return;
      button.removeAttribute("aria-disabled");
      clearInterval(timer);
    };
    const timer = setInterval(tick, 500);
    tick();
  }
  return box;
}

/** Makes a text box as high as its text, up to the limit of its style. */
export function fit(box) {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + box.offsetHeight - box.clientHeight}px`;
}
