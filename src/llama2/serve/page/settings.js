// The settings dialog: of one conversation, and of all of them.

import { key } from "./api.js";
import { now, SETTINGS } from "./conversation.js";
import { download } from "./dom.js";
import { merge, parse, preferences, serialise } from "./exchange.js";
import { Presets } from "./presets.js";

/** Larger files are not read. */
const MAX_IMPORT = 256 * 2 ** 20;

export class Settings {
  /**
   * `changed(settings)`, `renamed(title)` and `imported()` are called after a change. `settle` ends
   * all answers before an import or a deletion, which `confirm` confirms.
   */
  constructor(dialog, store, { changed, renamed, settle, imported, saveAsDefault, confirm }) {
    this.dialog = dialog;
    this.store = store;
    this.form = dialog.querySelector("form");
    this.outcome = dialog.querySelector("#outcome");
    const on = (id, action) => dialog.querySelector(id).addEventListener("click", action);
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("change", ({ target }) => {
      if (target.name === "title") renamed(target.value.trim());
      else if (target.name && this.#valid(target)) changed({ ...this.settings, [target.name]: valueOf(target) });
    });
    const system = this.form.elements.namedItem("system");
    const [select, presetName] = ["preset", "preset-name"].map((id) => dialog.querySelector(`#${id}`));
    const [add, remove] = ["add", "remove"].map((id) => dialog.querySelector(`#${id}-preset`));
    new Presets({ select, name: presetName, add, remove }, {
      current: () => system.value,
      chosen(text) {
        system.value = text;
        system.dispatchEvent(new Event("change", { bubbles: true }));
      },
    });
    on("#keep-settings", () => {
      saveAsDefault(this.settings);
      dialog.querySelector("#settings-saved").textContent = "New conversations will begin with these.";
    });
    on("#reset-settings", () => changed({ ...SETTINGS, model: this.settings.model }));
    on("#export", () => this.#export());
    on("#export-ratings", () => this.#exportRatings());
    on("#import", () => dialog.querySelector("#file").click());
    dialog.querySelector("#file").addEventListener("change", async ({ target }) => {
      const [file] = target.files;
      await settle();
      if (file && (await this.#import(file))) imported();
      target.value = ""; // so that the same file can be chosen again
    });
    on("#delete-all", async () => {
      const question = "Every conversation in this browser will be gone. What you have exported stays.";
      if (!(await confirm("Delete all conversations?", question))) return;
      await settle();
      await this.#try(() => store.clear(), "All conversations are deleted.");
      imported();
    });
    on("#forget-key", () => {
      key.set(null, false);
      dialog.querySelector("#key-settings").hidden = true;
    });
  }

  /** Opens the dialog, with the focus on the field `name`. */
  open(name) {
    for (const status of this.dialog.querySelectorAll("[role=status]")) status.textContent = "";
    this.dialog.querySelector("#key-settings").hidden = key.get() === null;
    this.dialog.showModal();
    const field = this.form.elements.namedItem(name);
    if (field) field.focus();
  }

  /** What the fields show. `title` is null before a conversation has one. */
  show(settings, title) {
    this.settings = settings;
    const { elements } = this.form;
    this.dialog.querySelector("#title-field").hidden = title === null;
    elements.title.value = title ?? "";
    for (const [name, value] of Object.entries(settings)) {
      const field = elements.namedItem(name);
      if (!field || field === document.activeElement) continue;
      if (field.type === "checkbox") field.checked = value;
      else field.value = value ?? "";
      field.setCustomValidity("");
      field.removeAttribute("aria-invalid");
    }
  }

  #valid(field) {
    const valid = field.checkValidity();
    field.setAttribute("aria-invalid", String(!valid));
    return valid || field.reportValidity();
  }

  async #export() {
    await this.#try(async () => {
      const entries = await this.store.everything();
      download(`llama2-conversations-${stamp()}.json`, "application/json", serialise(entries, now()));
      return `${counted(entries.length, "conversation")} exported; the file was read back without differences.`;
    });
  }

  async #exportRatings() {
    await this.#try(async () => {
      const records = preferences(await this.store.everything());
      if (records.length === 0) return "There are no ratings yet: use the thumbs below each answer.";
      const lines = records.map((record) => `${JSON.stringify(record)}\n`).join("");
      download(`llama2-preferences-${stamp()}.jsonl`, "application/jsonl", lines);
      return `${counted(records.length, "preference record")} exported.`;
    });
  }

  #import(file) {
    return this.#try(async () => {
      try {
        if (file.size > MAX_IMPORT) throw new Error(`it has more than ${MAX_IMPORT / 2 ** 20} MiB`);
        const incoming = parse(await file.text());
        const { entries, added, merged, same } = merge(await this.store.everything(), incoming);
        await this.store.merge(entries);
        return `${counted(added, "conversation")} added, ${merged} merged, ${same} here already.`;
      } catch (error) {
        throw new Error(`${file.name}: ${error.message}. Nothing was changed.`);
      }
    });
  }

  async #try(action, text) {
    try {
      this.#report((await action()) ?? text, false);
      return true;
    } catch (error) {
      this.#report(error.message, true);
      return false;
    }
  }

  #report(text, failed) {
    this.outcome.textContent = text;
    this.outcome.classList.toggle("failed", failed);
    this.outcome.scrollIntoView({ block: "nearest" });
  }
}

function valueOf({ type, value, checked, name }) {
  if (type === "checkbox") return checked;
  if (type !== "number") return value;
  if (value === "") return SETTINGS[name];
  return Number(value);
}

function counted(count, what) {
  return `${count} ${what}${count === 1 ? "" : "s"}`;
}

function stamp() {
  return now().slice(0, 16).replace("T", "-").replace(":", "");
}
