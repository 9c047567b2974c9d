// The list of conversations, and the search in them.

import { h, icon, iconButton, reconcile } from "./dom.js";

const PAGE = 200;

export class Sidebar {
  constructor({ list, search, found }, store, { remove, rename }) {
    this.list = list;
    this.search = search;
    this.found = found;
    this.store = store;
    this.remove = remove;
    this.rename = rename;
    this.renaming = null; // id of the conversation whose title is in a field
    this.items = new Map(); // conversation id → {key, element}
    this.limit = PAGE;
    this.hits = null; // what a search has found: conversation id → message
    this.searching = new AbortController();
    this.conversations = [];
    search.addEventListener("input", () => this.#search());
  }

  show(conversations, current, running) {
    Object.assign(this, { conversations, current, running });
    this.#render();
  }

  async #search() {
    this.searching.abort();
    this.searching = new AbortController();
    const { signal } = this.searching;
    const text = this.search.value.trim();
    this.limit = PAGE;
    if (text === "") {
      this.hits = null;
      this.found.textContent = "";
      this.#render();
      return;
    }
    await new Promise((resolve) => setTimeout(resolve, 120));
    if (signal.aborted) return;
    const hits = await this.store.search(text, signal);
    if (signal.aborted) return;
    this.hits = hits;
    this.needle = text;
    this.#render();
    const count = this.list.querySelectorAll("a").length;
    this.found.textContent = count === 1 ? "1 conversation found" : `${count} conversations found`;
  }

  #render() {
    const needle = this.needle?.toLowerCase();
    const wanted = this.hits
      ? this.conversations.filter(({ id, title }) => this.hits.has(id) || title.toLowerCase().includes(needle))
      : this.conversations;
    const parts = [];
    let heading = null;
    let group = null;
    for (const conversation of wanted.slice(0, this.limit)) {
      const period = this.hits ? "Found" : periodOf(conversation.updated);
      if (period !== heading) {
        heading = period;
        group = [];
        parts.push({ heading, group });
      }
      group.push(this.#item(conversation));
    }
    const elements = parts.map(({ heading, group }) => {
      this.groups ??= new Map();
      let section = this.groups.get(heading);
      if (!section) {
        section = h("section", { "aria-label": heading }, h("h2", {}, heading), h("ul"));
        this.groups.set(heading, section);
      }
      reconcile(section.lastChild, group);
      return section;
    });
    if (wanted.length > this.limit) {
      const more = () => {
        this.limit += PAGE;
        this.#render();
      };
      elements.push(h("button", { type: "button", class: "more", click: more }, `${wanted.length - this.limit} more`));
    }
    if (wanted.length === 0)
      elements.push(h("p", { class: "nothing" }, this.hits ? "Nothing found." : "Conversations will stand here."));
    reconcile(this.list, elements);
    const ids = new Set(this.conversations.map(({ id }) => id));
    for (const id of this.items.keys()) if (!ids.has(id)) this.items.delete(id);
  }

  #item(conversation) {
    const { id, title } = conversation;
    const hit = this.hits?.get(id);
    const current = id === this.current;
    const running = this.running.has(id);
    const renaming = id === this.renaming;
    const key = `${renaming} ${title} ${hit?.id} ${hit && this.needle} ${current} ${running}`;
    const known = this.items.get(id);
    if (known?.key === key) return known.element;
    const element = known?.element ?? h("li");
    const focused = element.contains(document.activeElement) ? document.activeElement.tagName : null;
    const link = h(
      "a",
      { href: hit ? `#${id}/${hit.id}` : `#${id}`, "aria-current": current ? "page" : null, title },
      h("span", { class: "name", dir: "auto" }, title),
      hit ? excerpt(hit.content, this.needle) : null,
    );
    if (renaming) {
      element.replaceChildren(this.#field(conversation));
      this.items.set(id, { key, element });
      return element;
    }
    if (running) link.append(h("span", { class: "dot" }, h("span", { class: "visually-hidden" }, "is answering")));
    const edit = () => {
      this.renaming = id;
      this.#render();
      element.querySelector("input").select();
    };
    element.replaceChildren(
      link,
      iconButton("edit", `Rename “${title}”`, { click: edit }),
      iconButton("trash", `Delete “${title}”`, { click: () => this.remove(conversation) }),
    );
    if (focused) element.querySelector(focused)?.focus();
    this.items.set(id, { key, element });
    return element;
  }

  /** A title as a field: Enter and leaving it save the text, Escape does not. */
  #field(conversation) {
    const field = h("input", { class: "rename", "aria-label": "Title", maxlength: "200", autocomplete: "off", dir: "auto" });
    field.value = conversation.title;
    const done = (title) => {
      if (this.renaming !== conversation.id) return;
      this.renaming = null;
      const inside = document.activeElement === field;
      if (title && title !== conversation.title) this.rename(conversation, title);
      else this.#render();
      if (inside) this.items.get(conversation.id)?.element.querySelector("a")?.focus();
    };
    field.addEventListener("blur", () => done(field.value.trim()));
    field.addEventListener("keydown", (event) => {
      if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return;
      event.preventDefault();
      event.stopPropagation();
      done(event.key === "Enter" ? field.value.trim() : null);
    });
    return field;
  }
}

function excerpt(text, needle) {
  const at = text.toLowerCase().indexOf(needle.toLowerCase());
  const from = Math.max(0, at - 24);
  const end = at + needle.length;
  return h(
    "span",
    { class: "excerpt", dir: "auto" },
    (from > 0 ? "…" : "") + text.slice(from, at),
    h("mark", {}, text.slice(at, end)),
    text.slice(end, end + 60),
  );
}

function periodOf(time) {
  const day = (date) => new Date(date.getFullYear(), date.getMonth(), date.getDate());
  const days = Math.round((day(new Date()) - day(new Date(time))) / 86_400_000);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  return days < 7 ? "Last seven days" : days < 30 ? "Last thirty days" : "Older";
}
