// System prompts by name, saved in this browser.

import { h } from "./dom.js";
import * as storage from "./browser_storage.js";

const BUILT_IN = {
  Brief: "Answer in as few words as the question allows. No introduction, no summary.",
  Teacher: "Explain step by step to someone who is new to the subject. Define each term when you first use it.",
  Reviewer: "Review the code that you are given. List faults in the order of their weight, each with its line and a fix.",
};

function own() {
  try {
    const found = JSON.parse(storage.load("presets") ?? "{}");
    return new Map(Object.entries(found).filter(([, system]) => typeof system === "string"));
  } catch {
    return new Map();
  }
}

export class Presets {
  /** `chosen(system)` is called with a preset's text; `current()` gives the text that a new preset has. */
  constructor({ select, name, add, remove }, { chosen, current }) {
    Object.assign(this, { select, name, removeButton: remove });
    this.presets = own();
    select.addEventListener("change", () => {
      const system = this.presets.get(select.value) ?? BUILT_IN[select.value];
      if (system !== undefined) chosen(system);
      this.#showRemove();
    });
    add.addEventListener("click", () => {
      const called = name.value.trim();
      if (called === "") return name.focus();
      this.presets.set(called, current());
      this.#save(called);
      name.value = "";
    });
    remove.addEventListener("click", () => {
      this.presets.delete(select.value);
      this.#save("");
      select.focus();
    });
    this.#show("");
  }

  #save(selected) {
    storage.save("presets", JSON.stringify(Object.fromEntries(this.presets)));
    this.#show(selected);
  }

  #show(selected) {
    const names = [...new Set([...this.presets.keys(), ...Object.keys(BUILT_IN)])];
    this.select.replaceChildren(
      h("option", { value: "" }, "Preset…"),
      ...names.map((each) => h("option", { value: each }, each)),
    );
    this.select.value = selected;
    this.#showRemove();
  }

  #showRemove() {
    this.removeButton.hidden = !this.presets.has(this.select.value);
  }
}
