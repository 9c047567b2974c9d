// Requests to the server.

import * as storage from "./browser_storage.js";

/** The API key, saved until the window closes, or longer if the user wants that. */
export const key = {
  get: () => storage.load("key", "sessionStorage") ?? storage.load("key"),
  set(value, remember) {
    storage.save("key", remember ? null : value, "sessionStorage");
    storage.save("key", remember ? value : null);
  },
};

/** An error with a message for the user. `kind`: key, busy, context, request, server, connection. */
export class ApiError extends Error {
  constructor(kind, message, seconds = null) {
    super(message);
    this.kind = kind;
    this.seconds = seconds; // after which the server expects to have room
  }
}

/** The models that are served: [{id, max_model_len, …}]. Raises ApiError. */
export async function models() {
  return (await (await call("v1/models")).json()).data;
}

/** How many tokens a text has. Raises ApiError. */
export async function countTokens(text, model) {
  const body = JSON.stringify({ content: text, model, parse_special: false });
  const response = await call("tokenize", { method: "POST", headers: { "Content-Type": "application/json" }, body });
  return (await response.json()).tokens.length;
}

/** The server's description of its routes. Raises ApiError. */
export async function description() {
  return (await call("openapi.json")).json();
}

/** The chunks of a streamed chat completion. Raises ApiError, or what `signal` was aborted with. */
export async function* chat(body, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ApiError("connection", "The connection ended before the answer did.");
      const events = (waiting + value).split("\n\n");
      waiting = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue; // a comment that keeps the connection open
        if (event === "data: [DONE]") return;
        const chunk = JSON.parse(event.slice("data: ".length));
        if (chunk.error) throw new ApiError("server", `The server could not continue: ${chunk.error.message}.`);
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || signal.aborted) throw error;
    throw new ApiError("connection", "The connection to the server was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    // A proxy may serve the page below another path, so URLs are relative.
    response = await fetch(new URL(path, import.meta.url), { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError("connection", "The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  throw await failure(response);
}

async function failure(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // a proxy has answered, and not in JSON
  }
  const { status } = response;
  const message = error.message ?? `it answered ${status} ${response.statusText}`.trim();
  if (status === 401) return new ApiError("key", "The server requires an API key.");
  if (status === 429) {
    const seconds = Number.parseInt(response.headers.get("Retry-After"), 10);
    return new ApiError("busy", "The server is busy.", Number.isNaN(seconds) ? null : seconds);
  }
  if (error.code === "context_length_exceeded") return new ApiError("context", `The conversation is too long: ${message}.`);
  if (status === 503) return new ApiError("server", `The server accepts no requests now: ${message}.`);
  if (status >= 500) return new ApiError("server", `The server failed: ${message}.`);
  return new ApiError("request", `The server refused this: ${message}.`);
}
