// Markdown to elements: CommonMark's blocks and inlines, with GitHub's tables, strikethrough and bare addresses.
// Formulas are \(a\), \[a\], $$a$$, and $a$ where no price can be meant.
//
// The text comes from a model or a user and is not trusted. Every character of it ends in a text node, or in the address
// of a link whose scheme is http, https or mailto. HTML in it is shown as text. An image becomes a link, because
// loading it would inform another server about the reader. Work is linear in the length of any text, and nesting is
// bounded.

import { code } from "./code.js";
import { copy, h, icon } from "./dom.js";
import { math } from "./math.js";

const MAX_DEPTH = 16;
const MAX_ADDRESS = 2000;

/** A streaming text, shown in `element`. Only top-level blocks that changed are rendered again. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.shown = []; // {source, node}
  }

  update(text) {
    const blocks = segment(text.replace(/\r\n?/g, "\n").split("\n"));
    const sources = blocks.map((block) => `${block.type}\n${block.lines.join("\n")}`);
    let same = 0;
    while (same < sources.length && same < this.shown.length && sources[same] === this.shown[same].source) same++;
    for (const { node } of this.shown.splice(same)) node.remove();
    for (let i = same; i < blocks.length; i++) {
      const node = build(blocks[i], 0);
      this.element.append(node);
      this.shown.push({ source: sources[i], node });
    }
  }
}

/** A fragment that shows a whole text. */
export function markdown(text) {
  const fragment = document.createDocumentFragment();
  new MarkdownView(fragment).update(text);
  return fragment;
}

// ---- Blocks -----------------------------------------------------------------------------------------------------

const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^( {0,3})([-+*]|\d{1,9}[.)])(?=[ \t]|$)/;
const MARKS = /^ {0,3}(?:> ?|(?:[-+*]|\d{1,9}[.)])[ \t]+)/;
const UNDERLINE = /^ {0,3}(=+|-+)[ \t]*$/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

const FORMULA = /^ {0,3}(\$\$|\\\[)/;
const FORMULA_END = { "$$": /\$\$[ \t]*$/, "\\[": /\\\][ \t]*$/ };

const blank = (line) => line.trim() === "";

/** The columns of white space that a line begins with; a tab goes to the next multiple of four. */
function indentation(line) {
  let columns = 0;
  for (const character of line) {
    if (character === " ") columns++;
    else if (character === "\t") columns += 4 - (columns % 4);
    else break;
  }
  return columns;
}

/** A line without its first `columns` columns of white space. */
function outdent(line, columns) {
  const present = indentation(line);
  return " ".repeat(Math.max(0, present - columns)) + line.replace(/^[ \t]+/, "");
}

/** Whether a line begins a block even where a paragraph could continue. */
function interrupts(line) {
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const item = ITEM.exec(line);
  return item !== null && !blank(line.slice(item[0].length)) && (item[2].length === 1 || /^1[.)]$/.test(item[2]));
}

/** Whether the lines of a container leave a paragraph open, which then continues without the container's marks. */
class Lazy {
  open = false;
  fence = null;

  /** A line of the container, without its marks. */
  after(line) {
    const mark = FENCE.exec(line)?.[1];
    if (this.fence !== null) {
      if (mark?.startsWith(this.fence)) this.fence = null;
      this.open = false;
      return;
    }
    let text = line;
    for (let depth = 0; depth <= MAX_DEPTH && !RULE.test(text); depth++) {
      const inner = MARKS.exec(text);
      if (!inner) break;
      text = text.slice(inner[0].length);
    }
    if (FENCE.test(text)) this.fence = FENCE.exec(text)[1];
    const ends = blank(text) || HEADING.test(text) || RULE.test(text) || /^ {0,3}(?:[-+*]|\d{1,9}[.)])$/.test(text);
    this.open = this.fence === null && !ends && (this.open || indentation(text) < 4);
  }

  /** Whether a line without marks continues the paragraph. */
  takes(line) {
    return this.open && !blank(line) && !interrupts(line) && !ITEM.test(line);
  }
}

/** The blocks that lines consist of: {type, lines: of containers those inside, apart: whether a blank line is before}. */
function segment(lines) {
  const blocks = [];
  const formulas = formulasIn(lines);
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    const start = i;
    const before = blocks.length;
    let match;
    if (blank(line)) {
      i++;
    } else if (formulas.has(i)) {
      i = formulas.get(i);
      blocks.push({ type: "math", lines: lines.slice(start, i) });
    } else if (indentation(line) >= 4) {
      while (i < lines.length && (blank(lines[i]) || indentation(lines[i]) >= 4)) i++;
      const code = lines.slice(start, i).map((each) => outdent(each, 4));
      while (blank(code.at(-1))) code.pop();
      blocks.push({ type: "code", language: "", lines: code });
    } else if ((match = FENCE.exec(line))) {
      const [, fence, info] = match;
      const close = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`);
      i++;
      while (i < lines.length && !close.test(lines[i])) i++;
      const indent = indentation(line);
      const code = lines.slice(start + 1, i).map((each) => outdent(each, Math.min(indent, indentation(each))));
      i++;
      blocks.push({ type: `code ${info.trim()}`, language: info.trim().split(/\s/)[0], lines: code });
    } else if ((match = HEADING.exec(line))) {
      blocks.push({ type: `h${match[1].length}`, lines: [headingText(line.slice(match[0].length))] });
      i++;
    } else if (RULE.test(line)) {
      blocks.push({ type: "hr", lines: [] });
      i++;
    } else if (QUOTE.test(line)) {
      const inner = [];
      const lazy = new Lazy();
      for (; i < lines.length; i++) {
        if (QUOTE.test(lines[i])) {
          inner.push(lines[i].replace(/^ {0,3}> ?/, ""));
          lazy.after(inner.at(-1));
        } else if (lazy.takes(lines[i])) inner.push(lines[i]);
        else break;
      }
      blocks.push({ type: "quote", lines: inner });
    } else if (ITEM.test(line)) {
      i = list(lines, i, blocks);
    } else if (line.includes("|") && i + 1 < lines.length && isTable(line, lines[i + 1])) {
      i += 2;
      while (i < lines.length && !blank(lines[i]) && !interrupts(lines[i])) i++;
      blocks.push({ type: "table", lines: lines.slice(start, i) });
    } else {
      i = paragraph(lines, i, blocks, formulas);
    }
    if (blocks.length > before) blocks[before].apart = start > 0 && blank(lines[start - 1]);
  }
  return blocks;
}

function headingText(text) {
  const bare = text.trim();
  const without = bare.replace(/#+$/, "");
  return without === "" || /[ \t]$/.test(without) ? without.trim() : bare;
}

/** Where formulas that have lines of their own begin and end: a map from a line's index to the index after its last one. */
function formulasIn(lines) {
  const found = new Map();
  const next = {}; // by the mark, where the next line is that can end a formula
  lines.forEach((line, start) => {
    const match = FORMULA.exec(line);
    if (!match) return;
    const [{ length }, mark] = match;
    if (FORMULA_END[mark].test(line.slice(length))) {
      found.set(start, start + 1);
      return;
    }
    if (!blank(line.slice(length)) && line.includes(mark === "$$" ? mark : "\\]", length)) return; // it ends within the line
    next[mark] = Math.max(next[mark] ?? 0, start + 1);
    while (next[mark] < lines.length && !FORMULA_END[mark].test(lines[next[mark]])) next[mark]++;
    if (next[mark] < lines.length) found.set(start, next[mark] + 1);
  });
  return found;
}

function paragraph(lines, start, blocks, formulas) {
  let i = start + 1;
  while (i < lines.length && !blank(lines[i])) {
    const underline = UNDERLINE.exec(lines[i]);
    if (underline) {
      blocks.push({ type: underline[1][0] === "=" ? "h1" : "h2", lines: lines.slice(start, i) });
      return i + 1;
    }
    if (interrupts(lines[i]) || formulas.has(i)) break;
    if (lines[i].includes("|") && i + 1 < lines.length && isTable(lines[i], lines[i + 1])) break;
    i++;
  }
  blocks.push({ type: "p", lines: lines.slice(start, i) });
  return i;
}

function list(lines, start, blocks) {
  const kind = (match) => (match[2].length === 1 ? match[2] : match[2].at(-1));
  const first = ITEM.exec(lines[start]);
  const items = [];
  let loose = false; // whether blank lines stand between its items
  let i = start;
  while (i < lines.length) {
    const match = ITEM.exec(lines[i]);
    if (!match || kind(match) !== kind(first) || RULE.test(lines[i])) break;
    const after = lines[i].slice(match[0].length);
    let spaces = indentation(after);
    if (blank(after) || spaces > 4) spaces = 1;
    const width = match[0].length + spaces;
    const inner = [blank(after) ? "" : outdent(after, spaces)];
    let begun = inner[0] !== "";
    const lazy = new Lazy();
    lazy.after(inner[0]);
    i++;
    for (; i < lines.length; i++) {
      const line = lines[i];
      if (blank(line)) {
        inner.push("");
        lazy.after("");
      } else if (indentation(line) >= width) {
        if (inner.length > 1 && !begun) break; // an item does not begin with a blank line
        begun = true;
        inner.push(outdent(line, width));
        lazy.after(inner.at(-1));
      } else if (lazy.takes(line)) {
        inner.push(line.trimStart());
      } else {
        break;
      }
    }
    let trailing = 0;
    while (inner.length > 1 && inner.at(-1) === "") {
      inner.pop();
      trailing++;
    }
    const next = i < lines.length ? ITEM.exec(lines[i]) : null;
    if (trailing > 0 && next && kind(next) === kind(first) && !RULE.test(lines[i])) loose = true;
    items.push(inner);
  }
  const number = first[2].length > 1 ? Number.parseInt(first[2], 10) : null;
  blocks.push({ type: number === null ? "ul" : `ol ${number}`, number, loose, items, lines: lines.slice(start, i) });
  return i;
}

// ---- Tables -----------------------------------------------------------------------------------------------------

function isTable(head, rule) {
  return TABLE_RULE.test(rule) && (rule.includes("|") || rule.includes(":")) && cells(head).length === cells(rule).length;
}

/** The cells of a table's line; a backslash before a bar makes it text. */
function cells(line) {
  const row = line.trim().replace(/^\|/, "");
  const found = [];
  let cell = "";
  for (let i = 0; i < row.length; i++) {
    if (row[i] === "\\" && row[i + 1] === "|") {
      cell += "|";
      i++;
    } else if (row[i] === "|") {
      found.push(cell.trim());
      cell = "";
    } else {
      cell += row[i];
    }
  }
  if (cell.trim() !== "" || found.length === 0) found.push(cell.trim());
  return found;
}

function table(lines) {
  const head = cells(lines[0]);
  const sides = cells(lines[1]).map((rule) => {
    if (rule.endsWith(":")) return rule.startsWith(":") ? "center" : "end";
    return rule.startsWith(":") ? "start" : null;
  });
  const row = (tag, texts) =>
    h("tr", {}, ...sides.map((side, i) => h(tag, { dir: "auto", class: side && `align-${side}` }, inline(texts[i] ?? ""))));
  const body = lines.slice(2).map((line) => row("td", cells(line)));
  const rows = body.length ? [h("tbody", {}, ...body)] : [];
  return scrolling("table-frame", "Table", h("table", {}, h("thead", {}, row("th", head)), ...rows));
}

/** An element that scrolls by itself, and by the keyboard, if it is wider than the page. */
function scrolling(className, label, ...children) {
  return h("div", { class: className, tabindex: "0", role: "group", "aria-label": label }, ...children);
}

// ---- Elements of blocks -----------------------------------------------------------------------------------------

function build(block, depth) {
  const [type] = depth > MAX_DEPTH ? ["p"] : block.type.split(" ");
  switch (type) {
    case "p":
      return h("p", { dir: "auto" }, inline(trimmed(block.lines)));
    case "hr":
      return h("hr");
    case "code":
      return codeBlock(block);
    case "math": {
      const written = block.lines.join("\n").trim();
      return math(written.slice(2, -2), written, true);
    }
    case "table":
      return table(block.lines);
    case "quote":
      return h("blockquote", { dir: "auto" }, ...segment(block.lines).map((inner) => build(inner, depth + 1)));
    case "ul":
    case "ol":
      return listElement(block, depth);
    default:
      // The page's own headings are h1 and h2, so those of an answer begin below them.
      return h(`h${Math.min(6, Number(type[1]) + 2)}`, { dir: "auto", class: type }, inline(trimmed(block.lines)));
  }
}

/** A paragraph's lines without the white space that they begin with, and without that of its end. */
function trimmed(lines) {
  return lines.map((line) => line.replace(/^[ \t]+/, "")).join("\n").trimEnd();
}

function listElement({ number, loose, items }, depth) {
  const element = h(number === null ? "ul" : "ol", { start: number === null || number === 1 ? null : number });
  const contents = items.map(([first, ...others]) => {
    const task = /^\[([ xX])\] /.exec(first);
    return { task, blocks: segment([task ? first.slice(task[0].length) : first, ...others]) };
  });
  const paragraphs = loose || contents.some(({ blocks }) => blocks.slice(1).some((block) => block.apart));
  for (const { task, blocks } of contents) {
    const children = blocks.flatMap((block) => {
      const child = build(block, depth + 1);
      return !paragraphs && block.type === "p" ? [...child.childNodes] : [child];
    });
    if (task) {
      const done = task[1] !== " ";
      children.unshift(h("input", { type: "checkbox", disabled: true, checked: done, "aria-label": done ? "Done" : "To do" }), " ");
    }
    element.append(h("li", { dir: "auto", class: task && "task" }, ...children));
  }
  return element;
}

function codeBlock({ language, lines }) {
  const text = lines.join("\n");
  const label = h("span", {}, "Copy");
  const button = h("button", { type: "button", class: "copy-code", "aria-label": "Copy code" }, icon("copy"), label);
  button.addEventListener("click", async () => {
    label.textContent = (await copy(text)) ? "Copied" : "Not copied";
    setTimeout(() => (label.textContent = "Copy"), 2000);
  });
  const name = language.slice(0, 40);
  const pre = h("pre", { tabindex: "0", role: "group", "aria-label": name ? `Code, ${name}` : "Code", dir: "ltr" });
  pre.append(code(text, name));
  return h("div", { class: "code" }, h("div", { class: "code-bar" }, h("span", { class: "language" }, name || "text"), button), pre);
}

// ---- Inlines ----------------------------------------------------------------------------------------------------

const ESCAPABLE = /[!-/:-@[-`{-~]/;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const ENTITY = /&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|([a-z]{2,4}));/y;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const BARE = /https?:\/\/[^\s<>]{1,2000}/y;
const SPACE = /\s/;
const MARK = /[\p{P}\p{S}]/u;
const WORD = /[\p{L}\p{N}]/u;
const PLAIN = /[^\\`*_~[\]!&<\nh$]+/y;

/** An address that a link may have, or null. */
function safe(address) {
  if (!/^(?:https?:\/\/|mailto:)/i.test(address)) return null;
  try {
    return ["http:", "https:", "mailto:"].includes(new URL(address).protocol) ? address : null;
  } catch {
    return null;
  }
}

/** A fragment that shows one run of text. */
function inline(text) {
  return assemble(tokenise(text));
}

/**
 * The tokens of a text: {text}, {code} or {math}, and with `closes` and `opens` the elements that end before and begin after it.
 * Emphasis is matched as CommonMark says: by a stack of runs that may open it.
 */
function tokenise(text) {
  const tokens = [];
  const runs = []; // those of * _ and ~ that have not been matched
  const brackets = []; // {token, runs: how many came before it, image, active}
  const missing = new Set(); // lengths of back-tick runs that have no partner further on
  const unclosed = new Set(); // ends of formulas that do not come any more
  let i = 0;
  const say = (string) => tokens.push({ text: string });

  while (i < text.length) {
    const character = text[i];
    const sticky = (pattern) => {
      pattern.lastIndex = i;
      return pattern.exec(text);
    };
    let match;
    if ((match = sticky(PLAIN))) {
      say(match[0]);
      i += match[0].length;
    } else if ((character === "$" || character === "\\") && (match = formula(text, i, unclosed))) {
      tokens.push(match);
      i += match.math.written.length;
    } else if (character === "\\") {
      if (text[i + 1] === "\n") tokens.push({ br: true });
      else say(ESCAPABLE.test(text[i + 1] ?? "") ? text[i + 1] : "\\");
      i += text[i + 1] === "\n" || ESCAPABLE.test(text[i + 1] ?? "") ? 2 : 1;
    } else if (character === "\n") {
      const last = tokens.at(-1);
      if (last?.text !== undefined && !last.opens) {
        const bare = last.text.replace(/ +$/, "");
        const hard = last.text.length - bare.length >= 2;
        last.text = bare;
        tokens.push(hard ? { br: true } : { text: "\n" });
      } else say("\n");
      i++;
    } else if (character === "`") {
      let end = i;
      while (text[end] === "`") end++;
      const length = end - i;
      const close = missing.has(length) ? -1 : closingTicks(text, end, length);
      if (close < 0) {
        missing.add(length);
        say(text.slice(i, end));
        i = end;
      } else {
        let code = text.slice(end, close).replace(/\n/g, " ");
        if (code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "") code = code.slice(1, -1);
        tokens.push({ code });
        i = close + length;
      }
    } else if (character === "*" || character === "_" || character === "~") {
      let end = i;
      while (text[end] === character) end++;
      runs.push(run(text, i, end));
      tokens.push(runs.at(-1));
      i = end;
    } else if (character === "[" || (character === "!" && text[i + 1] === "[")) {
      const token = { text: character === "!" ? "![" : "[" };
      tokens.push(token);
      brackets.push({ token, runs: runs.length, image: character === "!", active: true });
      i += token.text.length;
    } else if (character === "]") {
      const opener = brackets.pop();
      const target = opener?.active ? destination(text, i + 1) : null;
      if (target && safe(target.address)) {
        opener.token.text = "";
        opener.token.opens = [{ tag: "a", address: target.address }];
        tokens.push({ text: "", closes: 1 });
        pair(runs.splice(opener.runs));
        for (const other of brackets) other.active &&= other.image; // no link in a link
        i = target.end;
      } else {
        say("]");
        i++;
      }
    } else if (character === "<" && (match = sticky(AUTOLINK)) && safe(match[1])) {
      tokens.push({ text: match[1], link: match[1] });
      i += match[0].length;
    } else if (character === "h" && !WORD.test(text[i - 1] ?? "") && (match = sticky(BARE))) {
      const address = withoutTail(match[0]);
      tokens.push(safe(address) ? { text: address, link: address } : { text: address });
      i += address.length;
    } else if (character === "&" && (match = sticky(ENTITY))) {
      say(entity(match));
      i += match[0].length;
    } else {
      say(character);
      i++;
    }
  }
  pair(runs);
  return tokens;
}

/** The token of a formula that begins at `start`, or null. `unclosed` remembers which ends the text has no more of. */
function formula(text, start, unclosed) {
  const mark = text.startsWith("$$", start) ? "$$" : text[start] === "$" ? "$" : text.slice(start, start + 2);
  const end = { "$$": "$$", $: "$", "\\(": "\\)", "\\[": "\\]" }[mark];
  if (!end || unclosed.has(end)) return null;
  const from = start + mark.length;
  const at = text.indexOf(end, from);
  if (at < 0) unclosed.add(end);
  const source = text.slice(from, at);
  if (at < 0 || source.trim() === "" || (mark === "$" && !meant(text, start, source))) return null;
  return { math: { source, written: text.slice(start, at + end.length), display: mark === "$$" || mark === "\\[" } };
}

/** Whether single dollars are the marks of a formula, and not prices. */
function meant(text, start, source) {
  const around = [text[start - 1] ?? " ", text[start + source.length + 2] ?? " "];
  return !around.some((one) => /[\p{L}\p{N}$\\]/u.test(one)) && !/^\s|[\s\\]$|\n/.test(source);
}

function closingTicks(text, from, length) {
  let at = text.indexOf("`", from);
  while (at >= 0) {
    let end = at;
    while (text[end] === "`") end++;
    if (end - at === length) return at;
    at = text.indexOf("`", end);
  }
  return -1;
}

function entity([source, decimal, hexadecimal, name]) {
  if (name) return ENTITIES[name] ?? source;
  const code = decimal ? Number.parseInt(decimal, 10) : Number.parseInt(hexadecimal, 16);
  return code > 0 && code <= 0x10ffff && !(code >= 0xd800 && code < 0xe000) ? String.fromCodePoint(code) : "\ufffd";
}

/** A bare address without the punctuation of the sentence around it. */
function withoutTail(address) {
  let end = address.length;
  for (;;) {
    const last = address[end - 1];
    if (/[.,:;!?'"*_~`\]]/.test(last)) end--;
    else if (last === ")" && count(address, ")", end) > count(address, "(", end)) end--;
    else return address.slice(0, end);
  }
}

function count(text, character, end) {
  let found = 0;
  for (let i = 0; i < end; i++) found += text[i] === character;
  return found;
}

/** The address in parentheses after a link's text: {address, end}, or null. */
function destination(text, from) {
  if (text[from] !== "(") return null;
  const window = text.slice(from, from + MAX_ADDRESS);
  const match =
    /^\(\s*<([^<>\n]*)>\s*(?:"[^"]*"|'[^']*')?\s*\)/.exec(window) ??
    /^\(\s*((?:[^\s()<>]|\([^\s()]*\))+)(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.exec(window);
  return match && { address: match[1].replace(/\\([!-/:-@[-`{-~])/g, "$1"), end: from + match[0].length };
}

/** The token of a run of * _ or ~ from `start` to `end`. */
function run(text, start, end) {
  const character = text[start];
  const before = text.codePointAt(start - 2) > 0xffff ? text.slice(start - 2, start) : (text[start - 1] ?? " ");
  const after = String.fromCodePoint(text.codePointAt(end) ?? 32);
  const space = (one) => SPACE.test(one);
  const mark = (one) => MARK.test(one);
  const left = !space(after) && (!mark(after) || space(before) || mark(before));
  const right = !space(before) && (!mark(before) || space(after) || mark(after));
  const word = character === "_";
  return {
    text: text.slice(start, end),
    closes: 0,
    opens: [],
    character,
    length: end - start,
    canOpen: left && (!word || !right || mark(before)),
    canClose: right && (!word || !left || mark(after)),
  };
}

/** Finds which runs begin and end emphasis. */
function pair(runs) {
  const stack = []; // runs that may still open
  const floors = new Map(); // below which height of the stack a kind of closer has no partner
  for (const closer of runs) {
    const { character, length, canOpen, canClose } = closer;
    const strikes = character === "~";
    if (strikes && length !== 2) continue;
    const key = `${character}${canOpen}${length % 3}`;
    while (canClose && closer.text.length > 0) {
      const floor = Math.min(floors.get(key) ?? 0, stack.length);
      let at = stack.length - 1;
      while (at >= floor && !partners(stack[at], closer)) at--;
      if (at < floor) {
        floors.set(key, stack.length);
        break;
      }
      const opener = stack[at];
      const used = strikes || (opener.text.length > 1 && closer.text.length > 1) ? 2 : 1;
      opener.text = opener.text.slice(used);
      opener.opens.unshift({ tag: strikes ? "del" : used === 2 ? "strong" : "em" });
      closer.text = closer.text.slice(used);
      closer.closes++;
      stack.length = opener.text.length > 0 ? at + 1 : at;
      for (const [kind, height] of floors) if (height > stack.length) floors.set(kind, stack.length);
    }
    if (canOpen && closer.text.length > 0) stack.push(closer);
  }
}

function partners(opener, closer) {
  if (opener.character !== closer.character) return false;
  const both = opener.canClose || closer.canOpen;
  const thirds = (opener.length + closer.length) % 3 === 0 && (opener.length % 3 !== 0 || closer.length % 3 !== 0);
  return !(both && thirds && closer.character !== "~");
}

/** The elements of tokens. */
function assemble(tokens) {
  const root = document.createDocumentFragment();
  const stack = [root];
  for (const token of tokens) {
    for (let i = 0; i < (token.closes ?? 0); i++) stack.pop();
    const into = stack.at(-1);
    if (token.br) into.append(h("br"));
    else if (token.math) into.append(math(token.math.source, token.math.written, token.math.display));
    else if (token.code !== undefined) into.append(h("code", {}, token.code));
    else if (token.link) into.append(link(token.link, token.text));
    else if (token.text) into.append(token.text);
    for (const { tag, address } of token.opens ?? []) {
      // Beyond the limit an element is left out, and its content takes its place.
      const parent = stack.at(-1);
      if (stack.length > MAX_DEPTH) {
        stack.push(parent);
        continue;
      }
      const element = tag === "a" ? link(address) : h(tag);
      parent.append(element);
      stack.push(element);
    }
  }
  root.normalize();
  return root;
}

function link(address, ...children) {
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...children);
}
