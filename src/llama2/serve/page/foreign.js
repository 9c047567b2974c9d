// Conversations that other programs have exported, in this page's own form.
//
// ChatGPT's conversations.json is a list of {id, title, create_time, update_time, current_node, mapping}, where `mapping`
// holds nodes {id, parent, message} by id. Open WebUI's export is a list of {id, title, chat}, where `chat.history` holds
// messages {id, parentId, role, content, timestamp, model} by id, and `currentId`. Both are trees, as here. Only text
// of users and assistants is imported: tools, images and hidden instructions are left out, and their children follow
// their parents.

import { SETTINGS } from "./conversation.js";

/** The conversations of another program's export. Raises Error with the reason. */
export function translated(list) {
  const conversations = list.map((each, i) => {
    const place = `[${i}]`;
    if (isObject(each?.mapping)) return chatgpt(each, place);
    if (isObject(each?.chat?.history?.messages)) return openWebui(each, place);
    throw new Error(`${place}: is a conversation neither of ChatGPT's nor of Open WebUI's; choose one of their exports`);
  });
  const spoken = conversations.filter(({ messages }) => messages.length > 0);
  if (spoken.length === 0) throw new Error("it holds no conversation");
  return spoken;
}

function chatgpt({ id, conversation_id, title, create_time, update_time, current_node, mapping }, place) {
  const nodes = Object.entries(mapping).map(([name, node]) => {
    const { author, content, recipient, create_time: time, metadata } = node?.message ?? {};
    const parts = ["text", "multimodal_text"].includes(content?.content_type) && Array.isArray(content.parts) ? content.parts : [];
    const shown = !metadata?.is_visually_hidden_from_conversation && (recipient ?? "all") === "all";
    const text = parts.filter((part) => typeof part === "string").join("\n\n");
    return { name, parent: node?.parent, role: author?.role, text: shown ? text : "", time, model: metadata?.model_slug };
  });
  const head = { id: id ?? conversation_id, title, created: create_time, updated: update_time, leaf: current_node };
  return conversation("chatgpt", head, nodes, place);
}

function openWebui({ id, title, created_at, updated_at, chat }, place) {
  const { messages, currentId } = chat.history;
  const nodes = Object.entries(messages).map(([name, message]) => {
    const { parentId: parent, role, content, timestamp: time, model } = message ?? {};
    return { name, parent, role, text: typeof content === "string" ? withoutDetails(content) : "", time, model };
  });
  const head = { id, title: title ?? chat.title, created: created_at, updated: updated_at, leaf: currentId };
  const system = typeof chat.params?.system === "string" ? chat.params.system : "";
  return conversation("openwebui", head, nodes, place, system);
}

/** Open WebUI writes thoughts as an HTML element with quoted lines; a model writes them between `<think>` and `</think>`. */
function withoutDetails(text) {
  const open = /^\s*<details type="reasoning"[^>]*>\s*(?:<summary>[^<]*<\/summary>)?/.exec(text);
  const end = open ? text.indexOf("</details>", open[0].length) : -1;
  if (end < 0) return text;
  const thought = text.slice(open[0].length, end).trim().replace(/^(?:&gt;|>) ?/gm, "");
  return `<think>\n${thought}\n</think>\n\n${text.slice(end + "</details>".length).trimStart()}`;
}

/** `nodes` are {name, parent, role, text, time, model}, of which those with a text and one of the two roles are messages. */
function conversation(program, head, nodes, place, system = "") {
  const id = `${program}-${named(head.id, `${place}.id`)}`;
  const nodesByName = new Map(nodes.map((node) => [node.name, node]));
  const isMessage = ({ role, text }) => (role === "user" || role === "assistant") && text.trim() !== "";
  const known = new Map(); // results for nodes that are not messages
  /** The nearest message at or above a node, by its name, or null. */
  const nearest = (name) => {
    const passed = new Set();
    let at = nodesByName.get(name);
    while (at && !isMessage(at) && !known.has(at.name)) {
      if (passed.has(at.name)) throw new Error(`${place}: its message ${at.name} is its own ancestor`);
      passed.add(at.name);
      at = nodesByName.get(at.parent);
    }
    const found = at ? (known.get(at.name) ?? (isMessage(at) ? at.name : null)) : null;
    for (const each of passed) known.set(each, found);
    return found;
  };
  const own = (name) => (name === null ? null : `${id}.${named(name, place)}`);
  const created = timeOf(head.created) ?? timeOf(nodes.find(({ time }) => timeOf(time))?.time) ?? new Date(0).toISOString();
  const messages = nodes.filter(isMessage).map(({ name, parent, role, text, time, model }) => ({
    id: own(name),
    parent: own(nearest(parent)),
    role,
    content: text,
    created: timeOf(time) ?? created,
    ...(role === "assistant" ? { ...ANSWER, origin: typeof model === "string" ? model.slice(0, 200) : program } : {}),
  }));
  return {
    id,
    title: typeof head.title === "string" && head.title.trim() !== "" ? head.title.slice(0, 200) : "Conversation",
    created,
    updated: timeOf(head.updated) ?? created,
    leaf: own(nearest(head.leaf)) ?? messages.at(-1)?.id ?? null,
    settings: { ...SETTINGS, system },
    messages,
  };
}

/** The fields that another program's answer does not have. */
const ANSWER = { request: null, finish: "stop", error: null, fingerprint: null, usage: null, seconds: null, rating: null, rated: null };

/** An id that is valid in a URL and in an id of this page. */
function named(id, place) {
  if (typeof id !== "string" || !/^[\w-]{1,40}$/.test(id)) throw new Error(`${place}: its id must be 1 to 40 letters, digits or -`);
  return id;
}

const LAST_TIME = Date.UTC(9999, 11, 31);

/** Seconds, milliseconds or nanoseconds since 1970 as a time of ours; null where there is none. */
function timeOf(value) {
  if (typeof value !== "number" || !(value > 0)) return null;
  const milliseconds = value > 1e15 ? value / 1e6 : value > 1e11 ? value : value * 1000;
  return new Date(Math.min(milliseconds, LAST_TIME)).toISOString();
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
