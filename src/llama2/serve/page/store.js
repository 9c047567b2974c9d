// Conversations in the browser's own database.
//
// IndexedDB, because histories outgrow the 5 MB of localStorage, and because a transaction is stored whole or not at all,
// also when the browser dies. Each message is a record, so that two windows do not
// overwrite each other's. The cost of saving an answer does not depend on the history.

const STORES = ["conversations", "messages"];

export class Store {
  static async open(name = "llama2") {
    const opening = indexedDB.open(name, 1);
    opening.onupgradeneeded = () => {
      opening.result.createObjectStore("conversations", { keyPath: "id" });
      opening.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    const database = await result(opening);
    // Another window may need a newer layout, and must not wait.
    database.onversionchange = () => database.close();
    return new Store(database);
  }

  constructor(database) {
    this.database = database;
    this.channel = new BroadcastChannel("llama2-conversations");
  }

  /** Calls `listener` with a conversation's id, or null for all, when another window has changed it. */
  onChange(listener) {
    this.channel.onmessage = ({ data }) => listener(data);
  }

  /** Every conversation without its messages, the last changed first. */
  async conversations() {
    const found = await result(this.database.transaction("conversations").objectStore("conversations").getAll());
    return found.sort((a, b) => (a.updated < b.updated ? 1 : -1));
  }

  /** The messages of a conversation, in no order. */
  messages(id) {
    return result(this.database.transaction("messages").objectStore("messages").index("conversation").getAll(id));
  }

  /** Saves a conversation's record and these of its messages, and deletes those in `gone`, in one transaction. */
  save(conversation, messages = [], gone = []) {
    return this.#write(conversation.id, (stores) => {
      stores.conversations.put(conversation);
      for (const message of messages) stores.messages.put(message);
      for (const id of gone) stores.messages.delete(id);
    });
  }

  /** Deletes a conversation. Returns it for an undo: {conversation, messages}. */
  async remove(conversation) {
    const messages = await this.messages(conversation.id);
    await this.#write(conversation.id, (stores) => {
      stores.conversations.delete(conversation.id);
      for (const { id } of messages) stores.messages.delete(id);
    });
    return { conversation, messages };
  }

  /** Deletes every conversation. */
  clear() {
    return this.#write(null, (stores) => {
      stores.conversations.clear();
      stores.messages.clear();
    });
  }

  /** Everything as of one moment: [{conversation, messages}]. */
  async everything() {
    const transaction = this.database.transaction(STORES);
    const [conversations, messages] = await Promise.all(
      STORES.map((store) => result(transaction.objectStore(store).getAll())),
    );
    const byConversation = Map.groupBy(messages, (message) => message.conversation);
    return conversations.map((conversation) => ({
      conversation,
      messages: byConversation.get(conversation.id) ?? [],
    }));
  }

  /** Saves all of [{conversation, messages}], or nothing. */
  merge(entries) {
    return this.#write(null, (stores) => {
      for (const { conversation, messages } of entries) {
        stores.conversations.put(conversation);
        for (const message of messages) stores.messages.put(message);
      }
    });
  }

  /**
   * Messages that contain `text`, whatever its case: the first of each conversation, as a map by its id. They are read a
   * thousand at a time, so that the page stays quick; `signal` ends the search.
   */
  async search(text, signal) {
    const needle = text.toLowerCase();
    const found = new Map();
    let after = null;
    while (!signal.aborted) {
      const store = this.database.transaction("messages").objectStore("messages");
      const batch = await result(store.getAll(after && IDBKeyRange.lowerBound(after, true), 1000));
      for (const message of batch) {
        if (!message.content.toLowerCase().includes(needle)) continue;
        const first = found.get(message.conversation);
        if (!first || message.created < first.created) found.set(message.conversation, message);
      }
      if (batch.length < 1000) break;
      after = batch.at(-1).id;
    }
    return found;
  }

  async #write(changed, change) {
    const transaction = this.database.transaction(STORES, "readwrite", { durability: "strict" });
    const done = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error ?? new Error("the browser gave up"));
    });
    try {
      change({ conversations: transaction.objectStore("conversations"), messages: transaction.objectStore("messages") });
      transaction.commit(); // else the browser commits only while the page is open
    } catch (error) {
      transaction.abort();
      done.catch(() => {}); // the first error is reported
      throw error;
    }
    await done;
    this.channel.postMessage(changed);
  }
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = request.onblocked = () => reject(request.error ?? new Error("another window holds the old data"));
  });
}
