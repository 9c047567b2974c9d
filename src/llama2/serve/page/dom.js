// Making elements. Text only ever becomes text nodes: nothing in this page parses HTML.

/**
 * An element. In `properties`, functions are event listeners by the event's name, `true` and `false` set and leave out
 * an attribute, null leaves it out, and everything else is an attribute's text.
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  // Before the attributes: Chromium takes quadratic time to fill an element that has dir="auto".
  element.append(...children.filter((child) => child !== null && child !== undefined));
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  return element;
}

const ICONS = new URL("icons.svg", import.meta.url).href;

/** A drawing of icons.svg, hidden from screen readers. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `${ICONS}#${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows an icon and is called `label`. */
export function iconButton(name, label, properties) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, ...properties }, icon(name));
}

/** Makes `parent` hold exactly `children`, and moves none that is where it should be, so that focus stays. */
export function reconcile(parent, children) {
  let at = parent.firstChild;
  const wanted = new Set(children);
  for (const child of children) {
    while (at && at !== child && !wanted.has(at)) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
    if (at === child) at = at.nextSibling;
    else parent.insertBefore(child, at);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

/** Puts text on the clipboard, also where the page is not served securely. Returns whether that worked. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { class: "visually-hidden", "aria-hidden": "true", tabindex: "-1" });
    const before = document.activeElement;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.value = text;
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus();
    return done;
  }
}

/** Offers a file for download. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
