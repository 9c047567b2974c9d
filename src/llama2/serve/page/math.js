// Formulas in LaTeX, set by KaTeX, which is fetched with the first of them.
//
// KaTeX builds elements and sets their styles one by one, as the page's policy wants it. Three of its MathML elements
// would have a style attribute, which the policy forbids and the reader does not see; they do without.

import { h } from "./dom.js";

/** A longer formula is shown as it is written. */
const MAX_LENGTH = 4000;
const OPTIONS = { trust: false, strict: "ignore", maxSize: 20, maxExpand: 500 };

let katex = null;
let fetching = null;

/** An element that shows `source`, which is what stood between the marks; `written` is the formula with them. */
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
    // formulas stay as they are written
  }
}

function typeset(element, source, display) {
  try {
    const tree = katex.__renderToDomTree(source, { ...OPTIONS, displayMode: display });
    withoutStyle(tree);
    element.replaceChildren(tree.toNode());
  } catch {
    // It is no formula that KaTeX knows, or nests too deeply.
  }
}

function withoutStyle(node) {
  delete node.attributes?.style;
  node.children?.forEach(withoutStyle);
}
