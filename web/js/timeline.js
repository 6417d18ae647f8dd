/** The prompts of a timeline node, read and written by the server, which knows the grammar. */

import { api } from "../../../scripts/api.js";
import { isDemo, setValue, valueOf } from "./graph.js";
import { TEXTS } from "./texts.js";

async function ask(body) {
  const answer = await api.fetchApi("/adastate/timeline", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  const told = await answer.json().catch(() => null);
  return answer.ok ? told : { error: told?.error ?? { message: answer.statusText, line: null, column: null } };
}

export class Timeline {
  /** `changed()` is called when there is something else to show. */
  constructor(changed) {
    this.changed = changed;
    this.asked = 0;
    this.forget();
  }

  forget() {
    this.node = null;
    this.text = null; // what the node held when it was last read or written
    this.entries = [];
    this.error = null; // { message, line, column }
    this.grammar = null;
    this.asked++; // what is still under way comes too late
  }

  /** `fps` is null where nobody knows it yet: prompts may then fall on any second. */
  options(fps) {
    const duration = valueOf(this.node, "duration") || null;
    return { fps, words: isDemo(this.node), ...(duration ? { duration } : {}) };
  }

  /** Look at a node (or at none); its text is read when it is not the one that is known. */
  async follow(node, fps) {
    if (node !== this.node) {
      const had = this.node;
      this.forget();
      this.node = node;
      if (had) this.changed();
    }
    const text = node ? String(valueOf(node, "text") ?? "") : null;
    if (text === this.text) return;
    this.text = text;
    const mine = ++this.asked;
    const told = await ask({ text, ...this.options(fps) });
    if (mine === this.asked) this.take(told);
  }

  /** Write entries to the node; if they cannot be written it keeps its text, and `error` says why. */
  async write(entries, fps) {
    this.entries = entries;
    const told = await this.put({ entries, grammar: this.grammar }, fps);
    if (told) this.take(told);
  }

  /** Write a whole text to the node; an Error says why it cannot be. */
  async writeText(text, fps) {
    const told = await this.put({ text }, fps);
    if (!told) throw new Error(TEXTS.keepChanged);
    if (told.error) throw new Error(told.error.message);
    this.take(told);
  }

  /** Ask the server for the node's new text and set it; what was told, or null where something else was asked meanwhile. */
  async put(body, fps) {
    const node = this.node;
    const mine = ++this.asked;
    const told = await ask({ ...body, ...this.options(fps) });
    if (mine !== this.asked) return null;
    if (!told.error && node === this.node) {
      this.text = told.text;
      setValue(node, "text", told.text);
    }
    return told;
  }

  take(told) {
    this.error = told.error ?? null;
    if (!told.error) {
      this.entries = told.entries;
      this.grammar = told.grammar;
    }
    this.changed();
  }
}
