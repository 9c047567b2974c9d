// The tokens of an answer: the probability of each, and the alternatives.

import { h } from "./dom.js";

/** The most tokens that are shown. */
const MAX_SHOWN = 20_000;
const percent = new Intl.NumberFormat("en", { style: "percent", maximumSignificantDigits: 3 });

/** An element that shows `tokens`, [token, log-probability, [[token, log-probability] of the most probable]]. */
export function tokenView(tokens) {
  const detail = h("div", { class: "odds", role: "status" }, h("p", {}, "Choose a token: arrow keys go from one to the next."));
  const text = h("div", { class: "tokens", dir: "auto", role: "group", "aria-label": "Tokens" });
  const buttons = tokens.slice(0, MAX_SHOWN).map(([token, logprob], i) =>
    h(
      "button",
      {
        type: "button",
        class: `token likely-${grade(logprob)}`,
        tabindex: i === 0 ? "0" : "-1",
        "aria-label": JSON.stringify(token),
      },
      visible(token),
    ),
  );
  text.append(...buttons);
  const choose = (index) => {
    text.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
    text.querySelector("[aria-current]")?.removeAttribute("aria-current");
    buttons[index].setAttribute("tabindex", "0");
    buttons[index].setAttribute("aria-current", "true");
    buttons[index].focus();
    detail.replaceChildren(odds(tokens[index]));
  };
  text.addEventListener("click", ({ target }) => {
    const index = buttons.indexOf(target.closest(".token"));
    if (index >= 0) choose(index);
  });
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const index = buttons.indexOf(document.activeElement) + (step ?? 0);
    if (!step || !buttons[index]) return;
    event.preventDefault();
    choose(index);
  });
  return h("div", {}, text, detail);
}

/** A token's text, with symbols for invisible characters. */
function visible(token) {
  return token.replace(/[^\P{C}\n]/gu, "□").replace(/\n/g, "↵\n") || "∅";
}

/** 0 to 4: from hardly to nearly certain. */
function grade(logprob) {
  const probability = logprob === null ? 0 : Math.exp(logprob);
  return [0.05, 0.25, 0.6, 0.9].filter((bound) => probability >= bound).length;
}

function odds([token, logprob, top]) {
  const drawn = top.some(([each]) => each === token) ? top : [...top, [token, logprob]];
  const row = ([each, value]) =>
    h(
      "tr",
      { class: each === token ? "drawn" : null },
      h("th", { scope: "row" }, JSON.stringify(each).slice(1, -1)),
      h("td", {}, value === null ? "0%" : percent.format(Math.exp(value))),
    );
  return h("table", {}, h("caption", { class: "visually-hidden" }, "Most probable tokens here"), h("tbody", {}, ...drawn.map(row)));
}
