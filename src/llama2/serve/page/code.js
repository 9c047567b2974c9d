// Colours of code, by highlight.js, which is loaded with the first code that names its language.

import { h } from "./dom.js";

/** Longer code has no colours. */
const MAX_LENGTH = 20_000;

let library = null;
let fetching = null;

/** An element that shows code, with the colours of its language as soon as they are known. */
export function code(text, language) {
  const element = h("code", {}, text);
  if (language === "" || text.length > MAX_LENGTH) return element;
  if (library) colour(element, text, language);
  else (fetching ??= fetchLibrary()).then(() => library && colour(element, text, language));
  return element;
}

async function fetchLibrary() {
  try {
    ({ default: library } = await import("./vendor/highlight/highlight.min.js"));
  } catch {
    // code stays plain
  }
}

function colour(element, text, language) {
  if (!library.getLanguage(language)) return;
  const stack = [document.createDocumentFragment()];
  library.highlight(text, { language, ignoreIllegals: true })._emitter.walk({
    addText: (part) => stack.at(-1).append(part),
    openNode({ scope }) {
      const outer = stack.at(-1);
      const inner = scope ? h("span", { class: `code-${scope.split(".")[0]}` }) : outer;
      if (inner !== outer) outer.append(inner);
      stack.push(inner);
    },
    closeNode: () => stack.pop(),
  });
  element.replaceChildren(stack[0]);
}
