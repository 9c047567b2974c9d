// Small texts in the browser's storage, by name. A browser without storage loses them, which is not an error.

/** A saved text, or null. `where` is "localStorage", or "sessionStorage" for as long as the window is open. */
export function load(name, where = "localStorage") {
  try {
    return globalThis[where].getItem(`llama2-${name}`);
  } catch {
    return null;
  }
}

/** Saves a text; null removes it. Returns whether that worked. */
export function save(name, value, where = "localStorage") {
  try {
    if (value === null) globalThis[where].removeItem(`llama2-${name}`);
    else globalThis[where].setItem(`llama2-${name}`, value);
    return true;
  } catch {
    return false; // nothing depends on it
  }
}
