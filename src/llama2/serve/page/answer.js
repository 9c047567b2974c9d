// One answer while it streams.

import { ApiError, chat } from "./api.js";
import { requestBody } from "./conversation.js";

export class Answer {
  /** `message` is the assistant's message to fill; `messages` are sent to the model before it. */
  constructor(message, messages) {
    this.message = message;
    this.messages = messages;
    this.prefix = message.content;
    this.failure = null; // ApiError
    this.tokens = 0; // parts received, nearly all of them one token each
    this.controller = new AbortController();
    this.sent = performance.now();
    this.first = null;
    this.last = null;
  }

  stop() {
    this.controller.abort();
  }

  /** Whether any text has been received. */
  get begun() {
    return this.message.content.length > this.prefix.length;
  }

  /** Tokens a second so far, or null while there are too few. */
  rate() {
    const seconds = (this.last - this.first) / 1000;
    return this.tokens > 5 && seconds > 0.1 ? (this.tokens - 1) / seconds : null;
  }

  /** Reads the stream to its end; `changed` is called after every part. */
  async run(changed) {
    const { message, messages, prefix, controller } = this;
    try {
      for await (const chunk of chat(requestBody(message.request, messages, prefix), controller.signal)) {
        this.#add(chunk);
        changed();
      }
    } catch (error) {
      if (controller.signal.aborted) {
        message.finish = "stopped";
      } else {
        this.failure = error instanceof ApiError ? error : new ApiError("server", `The page failed: ${error.message}.`);
        message.finish = "error";
        message.error = this.failure.message;
      }
    }
    if (this.first !== null) {
      const thousandths = (from, to) => Math.round(to - from) / 1000;
      message.seconds = { first: thousandths(this.sent, this.first), rest: thousandths(this.first, this.last) };
    }
  }

  #add({ choices, usage, system_fingerprint: fingerprint }) {
    const { message } = this;
    if (fingerprint) message.fingerprint = fingerprint;
    if (usage) {
      const { prompt_tokens, completion_tokens } = usage;
      message.usage = { prompt_tokens, completion_tokens };
    }
    if (choices.length === 0) return;
    const [{ delta, logprobs, finish_reason: finish }] = choices;
    if (finish) message.finish = finish;
    for (const { token, logprob, top_logprobs: top } of logprobs?.content ?? [])
      message.tokens.push([token, logprob, top.map((each) => [each.token, each.logprob])]);
    if (delta.content) {
      message.content += delta.content;
      this.tokens++;
      this.last = performance.now();
      this.first ??= this.last;
    }
  }
}

/** Whether an answer repeats another one, and a text about it. */
export function compare(before, after) {
  const bytes = new TextEncoder().encode(after.content).length.toLocaleString("en");
  const { seed } = after.request;
  if (after.content === before.content) return { same: true, text: `Regenerated: the same ${bytes} bytes, seed ${seed}.` };
  if (before.finish !== "stop" && before.finish !== "length" && after.content.startsWith(before.content))
    return { same: false, text: `The same as the answer that was stopped, and continues to ${bytes} bytes; seed ${seed}.` };
  let at = 0;
  while (before.content[at] === after.content[at]) at++;
  const why =
    before.fingerprint === after.fingerprint
      ? "although model and program are the same: this is an error"
      : "because the server now runs another model file, version or processor";
  return { same: false, text: `Differs from character ${at + 1} on, ${why}.` };
}
