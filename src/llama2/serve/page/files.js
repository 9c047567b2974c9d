// Text files that go with a message: read here, shown as attachments, and sent as text.

import { h, iconButton } from "./dom.js";

const MAX_BYTES = 1 << 20;
const MAX_FILES = 20;
/** Pasted text of more characters becomes a file. */
export const LONG_PASTE = 4000;

const number = new Intl.NumberFormat("en");

/** A File's text as {name, content}. Raises Error, one line, for files that are too large or not text. */
export async function readText(file) {
  const name = cleanName(file.name);
  if (file.size > MAX_BYTES) throw new Error(`${name}: has ${sizeOf(file.size)}, and a file may have ${sizeOf(MAX_BYTES)}; attach a part of it.`);
  if (file.size === 0) throw new Error(`${name}: is empty, or a folder; choose a text file.`);
  let bytes;
  try {
    bytes = new Uint8Array(await file.arrayBuffer());
  } catch {
    throw new Error(`${name}: cannot be read; choose a text file.`);
  }
  const encoding = { "255 254": "utf-16le", "254 255": "utf-16be" }[bytes.slice(0, 2).join(" ")] ?? "utf-8";
  let content;
  try {
    content = new TextDecoder(encoding, { fatal: true }).decode(bytes);
  } catch {
    throw new Error(`${name}: is not text in UTF-8; save its text so, and attach that.`);
  }
  if (/[\0-\x08\x0e-\x1a\x1c-\x1f]/.test(content)) throw new Error(`${name}: is not a text file; attach its text.`);
  return { name, content: content.replace(/\r\n?/g, "\n") };
}

/** A file's name as one line without control characters. */
function cleanName(name) {
  return name.replace(/[\p{C}\p{Zl}\p{Zp}`]+/gu, " ").trim().slice(0, 100) || "file";
}

export function sizeOf(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  return bytes < 1e6 ? `${number.format(Math.round(bytes / 1024))} KiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

/** The size of a text in UTF-8. */
export function sizeOfText(text) {
  return sizeOf(new TextEncoder().encode(text).length);
}

/** The attachments of the message that is being written. */
export class Attachments {
  /**
   * `count(text)` gives how many tokens a text has, or null; `changed()` is called when a file comes, goes, or is counted;
   * `refused(line)` when one is not accepted.
   */
  constructor(list, { count, changed, refused }) {
    this.list = list;
    this.count = count;
    this.changed = changed;
    this.refused = refused;
    this.set([]);
  }

  /** Shows these files, [{name, content}], and no others. */
  set(files) {
    this.files = files;
    this.counts = new Map(); // file → how many tokens it has, or null
    for (const file of files) this.#count(file);
    this.#render();
  }

  /** Reads Files, and adds those that are text. */
  async add(files) {
    const refused = [];
    for (const file of files) {
      try {
        if (this.files.length >= MAX_FILES) throw new Error(`${cleanName(file.name)}: a message takes ${MAX_FILES} files.`);
        this.push(await readText(file));
      } catch (error) {
        refused.push(error.message);
      }
    }
    if (refused.length > 0) this.refused(refused.length === 1 ? refused[0] : `${refused[0]} (${refused.length - 1} more not taken)`);
  }

  push(file) {
    this.files = [...this.files, file];
    this.#count(file);
    this.#render();
    this.changed();
  }

  /** Tokens of all files, as far as they have been counted. */
  get tokens() {
    return this.files.reduce((sum, file) => sum + (this.counts.get(file) ?? 0), 0);
  }

  async #count(file) {
    this.counts.set(file, await this.count(file.content));
    if (!this.files.includes(file)) return;
    this.#render();
    this.changed();
  }

  #render() {
    this.list.hidden = this.files.length === 0;
    this.list.replaceChildren(
      ...this.files.map((file) => {
        const tokens = this.counts.get(file) ?? null;
        const size = sizeOfText(file.content) + (tokens === null ? "" : ` · ${number.format(tokens)} tokens`);
        const remove = () => {
          this.files = this.files.filter((each) => each !== file);
          this.#render();
          this.changed();
        };
        return h(
          "li",
          { class: "attachment" },
          h("span", { class: "name", dir: "auto", title: file.name }, file.name),
          h("span", { class: "size" }, size),
          iconButton("close", `Remove ${file.name}`, { click: remove }),
        );
      }),
    );
  }
}

/** The files of a message that was sent, which open on demand. */
export function sentFiles(files) {
  return files.map(({ name, content }) => {
    const details = h(
      "details",
      { class: "file" },
      h("summary", {}, h("span", { class: "name", dir: "auto" }, name), h("span", { class: "size" }, sizeOfText(content))),
    );
    details.addEventListener("toggle", () => {
      if (details.open && !details.querySelector("pre"))
        details.append(h("pre", { tabindex: "0", role: "group", "aria-label": name, dir: "auto" }, content));
    });
    return details;
  });
}
