// Conversations.
//
// Messages form a tree: each names the one before it as its `parent`. An edit, or another answer, adds a sibling, so
// nothing is lost. `leaf` is the last message that is shown; the shown conversation is the path from the root to it.

export const SETTINGS = {
  model: null, // null: the server's first
  system: "",
  temperature: 0.6,
  top_p: 0.9,
  top_k: 0,
  min_p: 0,
  repetition_penalty: 1,
  max_tokens: null, // null: what fits the context
  seed: null, // null: another one for every answer
  logprobs: false, // whether the most probable tokens are requested for each token
};

export function now() {
  return new Date().toISOString();
}

/** A unique name. crypto.randomUUID would need HTTPS or localhost. */
function identifier() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A seed of 32 bits, which is easy to copy. */
export function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

export function newConversation(settings) {
  const time = now();
  return { id: identifier(), title: "", created: time, updated: time, leaf: null, settings: { ...settings } };
}

/** The user's message. `files` are text files: [{name, content}]. */
export function userMessage(conversation, parent, content, files = []) {
  return { id: identifier(), conversation: conversation.id, parent, role: "user", content, files, created: now() };
}

/**
 * An answer without content except its beginning `prefix`. `request` is everything that it depends on besides messages.
 */
export function assistantMessage(conversation, parent, request, prefix = "") {
  return {
    id: identifier(),
    conversation: conversation.id,
    parent,
    role: "assistant",
    content: prefix,
    prefix: prefix.length, // characters that the model continued
    created: now(),
    request, // {model, system, temperature, …, max_tokens, seed}; null: another program's answer
    origin: null, // the other program's name of its model
    tokens: [], // [token, log-probability, [[token, log-probability] of the most probable]], if requested
    finish: null, // stop, length, content_filter; stopped: by the user; error; null: it was never finished
    error: null, // one line
    fingerprint: null, // the server's: equal requests get equal answers while it stays
    usage: null, // {prompt_tokens, completion_tokens}
    seconds: null, // {first: to the first token, rest: from the first to the last}
    rating: null, // up, down
    rated: null, // when
  };
}

/** The tree of one conversation's messages. */
export class Tree {
  constructor(messages = []) {
    this.messages = new Map();
    this.followers = new Map(); // parent → messages, in order of time
    const order = [...messages].sort((a, b) => (a.created < b.created ? -1 : a.created > b.created ? 1 : 0));
    for (const message of order) this.add(message);
  }

  add(message) {
    this.messages.set(message.id, message);
    const siblings = this.followers.get(message.parent);
    if (siblings) siblings.push(message);
    else this.followers.set(message.parent, [message]);
  }

  remove(message) {
    this.messages.delete(message.id);
    const siblings = this.followers.get(message.parent);
    siblings.splice(siblings.indexOf(message), 1);
  }

  /** The messages from the first one to `leaf`. */
  path(leaf) {
    const path = [];
    for (let at = this.messages.get(leaf); at; at = this.messages.get(at.parent)) path.push(at);
    return path.reverse();
  }

  /** The siblings of `message`, including itself. */
  versions(message) {
    return this.followers.get(message.parent);
  }

  /** The last message on the newest path through `message`. */
  newest(message) {
    let at = message;
    for (let next; (next = this.followers.get(at.id)?.at(-1)); ) at = next;
    return at;
  }
}

/**
 * An answer's parts: {thought, answer, open}. A reasoning model, or its template, begins with `<think>`. An `open` thought
 * has not ended. These tags elsewhere are text.
 */
export function partsOf(content) {
  const begun = /^\s*<think>/.exec(content);
  const end = (begun ? /<\/think>/ : /^<\/think>/m).exec(content);
  if (!begun && !end) return { thought: "", answer: content, open: false };
  const thought = content.slice(begun?.[0].length ?? 0, end?.index).trim();
  return { thought, answer: end ? content.slice(end.index + end[0].length).trimStart() : "", open: !end };
}

/** A file in a message, between fences that are longer than any within it. */
function fencedFile({ name, content }) {
  const longest = Math.max(2, ...Array.from(content.matchAll(/`{3,}/g), ([ticks]) => ticks.length));
  const fence = "`".repeat(longest + 1);
  return `File: ${name}\n${fence}\n${content}${content.endsWith("\n") ? "" : "\n"}${fence}`;
}

/** A user's message for the model: its files, then its text. */
export function textOf({ content, files = [] }) {
  return [...files.map(fencedFile), content].filter((part) => part !== "").join("\n\n");
}

/** The messages for a model: the system prompt if there is one, then the path, without thoughts. */
export function promptOf(system, path) {
  const messages = path.map((message) => ({
    role: message.role,
    content: message.role === "user" ? textOf(message) : partsOf(message.content).answer,
  }));
  return system === "" ? messages : [{ role: "system", content: system }, ...messages];
}

/** The body of a chat completion for `request`; the answer continues `prefix`. Settings without effect are left out. */
export function requestBody(request, messages, prefix = "") {
  const { system, logprobs, ...rest } = request;
  const idle = { top_k: 0, min_p: 0, repetition_penalty: 1, max_tokens: null };
  const chosen = Object.entries(rest).filter(([name, value]) => !(name in idle) || value !== idle[name]);
  return {
    ...Object.fromEntries(chosen),
    ...(logprobs ? { logprobs, top_logprobs: 5 } : {}),
    ...(prefix === "" ? { messages } : {
      messages: [...messages, { role: "assistant", content: prefix }],
      continue_final_message: true,
      add_generation_prompt: false,
    }),
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** A conversation's title, from its first message. */
export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].trim();
  const characters = Array.from(line);
  return characters.length > 60 ? `${characters.slice(0, 59).join("").trimEnd()}…` : line || "Conversation";
}

/** Tokens a second after the first one, or null if they came too fast to measure. */
export function rate({ usage, seconds }) {
  return usage && seconds && usage.completion_tokens > 1 && seconds.rest > 0.02
    ? (usage.completion_tokens - 1) / seconds.rest
    : null;
}
