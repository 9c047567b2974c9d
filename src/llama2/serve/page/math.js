// LaTeX formulas, by KaTeX, which is loaded with the first of them.
//
// KaTeX sets styles by properties, as the page's policy requires. Three of its MathML elements have a style attribute,
// which the policy forbids and nobody sees; it is removed.

import { h } from "./dom.js";

/** A longer formula is shown as its source. */
const MAX_LENGTH = 4000;
const OPTIONS = { trust: false, strict: "ignore", maxSize: 20, maxExpand: 500 };

let katex = null;
let fetching = null;

/** An element that shows the formula `source`; `written` is the source with its delimiters. */
export function math(source, written, display) {
  const scrolls = display ? { tabindex: "0", role: "group", "aria-label": "Formula" } : {};
  const element = h("span", { class: display ? "math display" : "math", ...scrolls }, written);
  if (source.length > MAX_LENGTH) return element;
  if (katex) typeset(element, source, display);
  else (fetching ??= fetchKatex()).then(() => katex && typeset(element, source, display));
  return element;
}

async function fetchKatex() {
  const stylesheet = new URL("vendor/katex/katex.min.css", import.meta.url).href;
  document.head.append(h("link", { rel: "stylesheet", href: stylesheet }));
  try {
    katex = await import("./vendor/katex/katex.mjs");
  } catch {
    // formulas stay as their source
  }
}

function typeset(element, source, display) {
  try {
    const tree = katex.__renderToDomTree(source, { ...OPTIONS, displayMode: display });
    withoutStyle(tree);
    element.replaceChildren(tree.toNode());
  } catch {
    // KaTeX cannot parse it, or it nests too deeply.
  }
}

function withoutStyle(node) {
  delete node.attributes?.style;
  node.children?.forEach(withoutStyle);
}
