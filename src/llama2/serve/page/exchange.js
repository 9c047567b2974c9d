// Conversations as a file and back, and ratings as preference records.
//
// The file of conversations is JSON:
//
//   {"format": "llama2-conversations", "version": 1, "exported": TIME, "conversations": [
//     {"id", "title", "created", "updated", "leaf", "settings": {…}, "messages": [{"id", "parent", "role", …}]}]}
//
// with the fields that conversation.js gives them. Times are ISO 8601 in UTC. Reading checks every field; an
// error names its place in the file, and then nothing is imported. Exports of ChatGPT and Open WebUI are read as well:
// see foreign.js.
//
// The file of ratings is JSON Lines, one preference record a line. Two answers to the same messages, one rated up and one
// down, are a comparison; a rating without an opposite is a record alone. The names are those of TRL's conversational
// preference datasets:
//
//   {"prompt": [{"role", "content"}, …], "chosen": [{"role": "assistant", "content"}],
//    "rejected": [{"role": "assistant", "content"}], "chosen_source": SOURCE, "rejected_source": SOURCE}
//   {"prompt": […], "completion": [{"role": "assistant", "content"}], "label": true | false, "source": SOURCE}
//
// SOURCE is {"conversation", "message", "model", "fingerprint", "sampling": {"temperature", …, "seed"}, "finish",
// "created": TIME, "rated": TIME}. The prompt begins with the system prompt, if there was one, and ends with the user's
// message.

import { now, promptOf, SETTINGS, Tree } from "./conversation.js";
import { translated } from "./foreign.js";

const FORMAT = "llama2-conversations";
const VERSION = 1;

// ---- Conversations ----------------------------------------------------------------------------------------------

/** The text of a file that holds `entries`, [{conversation, messages}]. Raises Error where it could not be read back. */
export function serialise(entries, exported) {
  const conversations = entries.map(({ conversation, messages }) => ({
    ...conversation,
    messages: messages.toSorted(inTime).map(({ conversation: _, ...message }) => message),
  }));
  const text = `${JSON.stringify({ format: FORMAT, version: VERSION, exported, conversations }, null, 1)}\n`;
  if (canonical(parse(text)) !== canonical(entries)) throw new Error("the file was written with errors");
  return text;
}

/** The order of time; of the same millisecond the question comes before its answer. */
function inTime(a, b) {
  if (a.created !== b.created) return a.created < b.created ? -1 : 1;
  return (a.role === "assistant") - (b.role === "assistant");
}

/** The contents of a file, as [{conversation, messages}]. Raises Error with the reason and its place. */
export function parse(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch (error) {
    throw new Error(`it is not JSON (${error.message}); choose a file that “Export all” has made`);
  }
  if (Array.isArray(file)) file = { format: FORMAT, version: VERSION, exported: now(), conversations: translated(file) };
  if (typeof file !== "object" || file === null || file.format !== FORMAT)
    throw new Error(`it does not say "format": "${FORMAT}"; choose a file that “Export all” has made`);
  if (file.version !== VERSION)
    throw new Error(`version: is ${JSON.stringify(file.version)}, and this page reads ${VERSION}; update the server`);
  check(file, { format: any, version: any, exported: time, conversations: array(any) }, "");
  const ids = new Set();
  return file.conversations.map((conversation, i) => {
    const place = `conversations[${i}]`;
    check(conversation, CONVERSATION, place);
    if (ids.has(conversation.id)) throw new Error(`${place}.id: appears twice`);
    ids.add(conversation.id);
    return restore(conversation, place, ids);
  });
}

function restore({ messages, ...conversation }, place, ids) {
  const own = new Map();
  messages.forEach((message, i) => {
    const at = `${place}.messages[${i}]`;
    check(message, message?.role === "assistant" ? ASSISTANT : USER, at);
    if (ids.has(message.id)) throw new Error(`${at}.id: appears twice`);
    ids.add(message.id);
    own.set(message.id, message);
  });
  if (conversation.leaf !== null && !own.has(conversation.leaf))
    throw new Error(`${place}.leaf: names a message that is not there`);
  const rooted = new Set([null]);
  messages.forEach((message, i) => {
    const branch = new Set();
    for (let id = message.id; !rooted.has(id); id = own.get(id).parent) {
      if (!own.has(id)) throw new Error(`${place}.messages[${i}].parent: names a message that is not there`);
      if (branch.has(id)) throw new Error(`${place}.messages[${i}].parent: is its own ancestor`);
      branch.add(id);
    }
    for (const id of branch) rooted.add(id);
  });
  return { conversation, messages: messages.map((message) => ({ ...message, conversation: conversation.id })) };
}

/** Entries as text that is the same for the same conversations, in whatever order they and their fields stand. */
export function canonical(entries) {
  const byId = (a, b) => (a.id < b.id ? -1 : 1);
  const sorted = entries
    .map(({ conversation, messages }) => ({ ...conversation, messages: [...messages].sort(byId) }))
    .sort(byId);
  const inOrder = (_, value) =>
    value && typeof value === "object" && !Array.isArray(value)
      ? Object.fromEntries(Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1)))
      : value;
  return JSON.stringify(sorted, inOrder);
}

/**
 * The entries to save so that nothing of either side is lost: {entries, added, merged, same}. Where both know a
 * conversation or message, the one of the conversation changed later counts.
 */
export function merge(present, incoming) {
  const known = new Map(present.map((entry) => [entry.conversation.id, entry]));
  const owners = new Map(present.flatMap(({ messages }) => messages.map(({ id, conversation }) => [id, conversation])));
  const counts = { added: 0, merged: 0, same: 0 };
  const entries = [];
  for (const entry of incoming) {
    const { id, title } = entry.conversation;
    for (const message of entry.messages)
      if ((owners.get(message.id) ?? id) !== id)
        throw new Error(`“${title}”: its message ${message.id} is here already, in another conversation`);
    const old = known.get(id);
    if (!old) {
      counts.added++;
      entries.push(entry);
      continue;
    }
    const newer = entry.conversation.updated > old.conversation.updated;
    const [first, second] = newer ? [old, entry] : [entry, old];
    const messages = new Map([...first.messages, ...second.messages].map((message) => [message.id, message]));
    const together = { conversation: second.conversation, messages: [...messages.values()] };
    if (canonical([together]) === canonical([old])) {
      counts.same++;
    } else {
      counts.merged++;
      entries.push(together);
    }
  }
  return { entries, ...counts };
}

// ---- What fields may hold ---------------------------------------------------------------------------------------

const fails = (what) => (place) => {
  throw new Error(`${place}: must be ${what}`);
};
const rule = (what, test) => (value, place) => test(value) || fails(what)(place);
const any = () => {};
const text = rule("a text of at most ten million characters", (v) => typeof v === "string" && v.length <= 1e7);
const line = rule("a text of at most 1,000 characters", (v) => typeof v === "string" && v.length <= 1000);
const flag = rule("true or false", (value) => typeof value === "boolean");
const name = rule("a text of 1 to 100 characters", (v) => typeof v === "string" && v.length > 0 && v.length <= 100);
const number = rule("a number", (value) => Number.isFinite(value));
const whole = rule("a whole number", (value) => Number.isSafeInteger(value));
const time = rule("a time such as 2026-01-31T12:00:00.000Z", isTime);
const oneOf = (...values) => rule(values.map((value) => JSON.stringify(value)).join(" or "), (v) => values.includes(v));
const array = (each) => (value, place) =>
  Array.isArray(value) ? value.forEach((item, i) => each(item, `${place}[${i}]`)) : fails("a list")(place);
const optional = (each) => (value, place) => value === null || each(value, place);
/** Marks the rule of a field that older files do not have. */
const newer = (each) => Object.assign((value, place) => each(value, place), { newer: true });
const tuple = (...rules) => (value, place) =>
  Array.isArray(value) && value.length === rules.length
    ? rules.forEach((each, i) => each(value[i], `${place}[${i}]`))
    : fails(`a list of ${rules.length}`)(place);
const object = (fields) => (value, place) => check(value, fields, place);

function isTime(value) {
  return typeof value === "string" && /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/.test(value) && !Number.isNaN(Date.parse(value));
}

/** Raises Error unless `value` is an object with these fields, newer ones excepted, and no others. */
function check(value, fields, place) {
  if (typeof value !== "object" || value === null || Array.isArray(value)) fails("an object")(place);
  const inner = (field) => (place ? `${place}.${field}` : field);
  for (const field of Object.keys(value)) if (!Object.hasOwn(fields, field)) throw new Error(`${inner(field)}: is not known`);
  for (const [field, test] of Object.entries(fields)) {
    if (Object.hasOwn(value, field)) test(value[field], inner(field));
    else if (!test.newer) throw new Error(`${inner(field)}: is missing`);
  }
}

const SAMPLING = {
  temperature: number,
  top_p: number,
  top_k: whole,
  min_p: number,
  repetition_penalty: number,
  max_tokens: optional(whole),
  logprobs: newer(flag),
};
const CONVERSATION = {
  id: name,
  title: line,
  created: time,
  updated: time,
  leaf: optional(name),
  settings: object({ model: optional(line), system: text, ...SAMPLING, seed: optional(whole) }),
  messages: array(any),
};
const MESSAGE = { id: name, parent: optional(name), role: oneOf("user", "assistant"), content: text, created: time };
const USER = { ...MESSAGE, files: newer(array(object({ name: line, content: text }))) };
const SCORED = [line, optional(number)]; // a token and its log-probability
const ASSISTANT = {
  ...MESSAGE,
  prefix: newer(whole),
  request: optional(object({ model: line, system: text, ...SAMPLING, seed: whole })),
  origin: newer(optional(line)),
  tokens: newer(array(tuple(...SCORED, array(tuple(...SCORED))))),
  finish: optional(oneOf("stop", "length", "content_filter", "stopped", "error")),
  error: optional(text),
  fingerprint: optional(line),
  usage: optional(object({ prompt_tokens: whole, completion_tokens: whole })),
  seconds: optional(object({ first: number, rest: number })),
  rating: optional(oneOf("up", "down")),
  rated: optional(time),
};

/** Settings as far as they are in order; the usual ones for the rest. */
export function readSettings(value) {
  try {
    check({ ...SETTINGS, ...value }, Object.fromEntries(Object.keys(SETTINGS).map((key) => [key, any])), "settings");
    CONVERSATION.settings({ ...SETTINGS, ...value }, "settings");
    return { ...SETTINGS, ...value };
  } catch {
    return { ...SETTINGS };
  }
}

// ---- Preference records -----------------------------------------------------------------------------------------

/** The preference records of rated answers, in order of conversation and time. */
export function preferences(entries) {
  return entries.flatMap(({ messages }) => {
    const tree = new Tree(messages);
    const rated = [...tree.messages.values()].filter((message) => message.rating);
    const groups = Map.groupBy(rated, ({ parent, request }) => `${parent} ${request?.system ?? ""}`);
    return [...groups.values()].flatMap((answers) => records(tree, answers));
  });
}

function records(tree, answers) {
  const prompt = promptOf(answers[0].request?.system ?? "", tree.path(answers[0].parent));
  const completion = ({ content }) => [{ role: "assistant", content }];
  const up = answers.filter(({ rating }) => rating === "up");
  const down = answers.filter(({ rating }) => rating === "down");
  if (up.length === 0 || down.length === 0) {
    return answers.map((answer) => ({
      prompt,
      completion: completion(answer),
      label: answer.rating === "up",
      source: source(answer),
    }));
  }
  return up.flatMap((chosen) =>
    down.map((rejected) => ({
      prompt,
      chosen: completion(chosen),
      rejected: completion(rejected),
      chosen_source: source(chosen),
      rejected_source: source(rejected),
    })),
  );
}

function source({ conversation, id, request, origin, fingerprint, finish, created, rated }) {
  const { model = origin, system: _, logprobs: __, ...sampling } = request ?? {};
  return { conversation, message: id, model, fingerprint, sampling, finish, created, rated };
}
