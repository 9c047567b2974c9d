// Small things that the browser keeps by name. A browser that keeps nothing forgets them, and that is no error.

/** A kept text, or null. `where` is "localStorage", or "sessionStorage" for as long as the window is open. */
export function kept(name, where = "localStorage") {
  try {
    return globalThis[where].getItem(`llama2-${name}`);
  } catch {
    return null;
  }
}

/** Keeps a text; null forgets it. Returns whether it went well. */
export function keep(name, value, where = "localStorage") {
  try {
    if (value === null) globalThis[where].removeItem(`llama2-${name}`);
    else globalThis[where].setItem(`llama2-${name}`, value);
    return true;
  } catch {
    return false; // nothing depends on it
  }
}
