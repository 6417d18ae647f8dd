/** The prompts on the axis, to be chosen, dragged and edited. */

import { make, makeButton, say } from "./dom.js";
import { TEXTS } from "./texts.js";
import { lay, repeat } from "./tracks.js";

const PAUSE = 350; // ms between the last key and the writing

const round = (seconds, step) => Math.round(Math.round(seconds / step) * step * 1e6) / 1e6;

export class PromptRow {
  /** `write(entries)` is called with changed entries; `here()` says the second at which to add one, or null. */
  constructor(write, here) {
    this.write = write;
    this.here = here;
    this.entries = [];
    this.chosen = 0;
    this.step = 0.25;
    this.editable = false;
    this.element = make("div", "adastate-prompts", { role: "group", "aria-label": TEXTS.promptKeys });
    this.element.addEventListener("keydown", (event) => this.key(event));
    this.element.addEventListener("pointerdown", (event) => this.drag(event));
    this.makeEditor();
  }

  makeEditor() {
    const field = (label, input) => make("label", "adastate-field", {}, make("span", "", {}, label), input);
    this.time = make("input", "adastate-time", { type: "number", min: "0", title: TEXTS.promptTimeHint });
    this.text = make("textarea", "adastate-text", { rows: "1", spellcheck: "false" });
    this.transition = make("select", "adastate-transition");
    for (const name of ["", ...TEXTS.transitions])
      this.transition.append(make("option", "", { value: name }, name || TEXTS.transitionOwn));
    this.add = makeButton("adastate-add", TEXTS.promptAdd, TEXTS.promptAddHint, () => this.addOne());
    this.removeButton = makeButton("adastate-remove", TEXTS.promptRemove, TEXTS.promptRemoveHint, () => this.remove());
    this.note = make("div", "adastate-note");
    this.error = make("div", "adastate-error", { role: "alert" });
    const fields = make("div", "adastate-fields", {},
      field(TEXTS.promptTime, this.time), field(TEXTS.transition, this.transition), field(TEXTS.promptText, this.text), this.add,
      this.removeButton);
    this.fields = fields;
    this.editor = make("div", "adastate-editor", {}, fields, this.error, this.note);
    this.text.addEventListener("input", () => {
      clearTimeout(this.waiting);
      this.waiting = setTimeout(() => this.change({ text: this.text.value }), PAUSE);
    });
    this.text.addEventListener("blur", () => this.flush());
    this.time.addEventListener("change", () => this.move(Number(this.time.value)));
    this.transition.addEventListener("change", () => this.change({ transition: this.transition.value || null }));
  }

  /** Write at once what was typed. */
  flush() {
    if (!this.waiting) return;
    clearTimeout(this.waiting);
    this.waiting = null;
    if (this.editable && this.text.value !== this.entries[this.chosen]?.text) this.change({ text: this.text.value });
  }

  draw({ entries, editable, error, note }, axis, step) {
    Object.assign(this, { entries, editable, axis, step });
    this.chosen = Math.max(0, Math.min(this.chosen, entries.length - 1));
    const fault = error?.message ?? "";
    this.error.hidden = !error;
    if (this.error.textContent !== fault) {
      this.error.textContent = fault;
      if (fault) this.error.scrollIntoView?.({ block: "nearest" });
    }
    say(this.note, note);
    this.drawMarks();
    this.drawEditor();
  }

  drawMarks() {
    const mark = () => make("button", "adastate-mark", { type: "button" }, make("span", "adastate-grip"), make("span", "adastate-words"));
    repeat(this.element, this.entries, mark, (button, entry, index) => {
      const last = index + 1 === this.entries.length;
      lay(button, this.axis, entry.seconds, last ? this.axis.total : this.entries[index + 1].seconds);
      button.hidden = entry.seconds >= this.axis.total;
      const options = TEXTS.promptOptions(entry.transition, entry.seed ?? null, entry.strength ?? null);
      const words = entry.text || TEXTS.promptSame;
      const label = TEXTS.promptAt(words, entry.seconds) + (options ? ` {${options}}` : "");
      button.setAttribute("aria-label", label);
      button.title = label;
      button.setAttribute("aria-pressed", String(index === this.chosen));
      button.tabIndex = index === this.chosen ? 0 : -1;
      button.classList.toggle("adastate-movable", this.editable && index > 0);
      button.classList.toggle("adastate-shot", entry.transition === "shot" && index > 0);
      say(button.lastElementChild, entry.text || `{${options}}`);
    });
  }

  drawEditor() {
    const entry = this.entries[this.chosen];
    this.fields.style.display = entry && this.editable ? "" : "none";
    if (!entry) return;
    const set = (input, value) => {
      if (document.activeElement !== input && input.value !== value) input.value = value;
    };
    set(this.text, entry.text);
    set(this.time, String(entry.seconds));
    set(this.transition, entry.transition ?? "");
    this.time.step = String(this.step);
    this.time.disabled = this.chosen === 0;
    this.transition.disabled = this.chosen === 0 && !entry.transition;
    this.removeButton.disabled = this.entries.length < 2;
  }

  choose(index) {
    this.flush();
    this.chosen = index;
    this.drawMarks();
    document.activeElement === this.text && this.text.blur();
    this.drawEditor();
  }

  /** Write the chosen prompt with some of it changed. */
  change(part) {
    clearTimeout(this.waiting);
    this.waiting = null;
    if (!this.editable || !this.entries[this.chosen]) return;
    this.write(this.entries.map((entry, index) => (index === this.chosen ? { ...entry, ...part } : entry)));
  }

  /** Where the chosen prompt may begin: a step behind the one before, a step in front of the next. */
  bounded(seconds) {
    const low = this.entries[this.chosen - 1].seconds + this.step;
    const next = this.entries[this.chosen + 1];
    const high = next ? next.seconds - this.step : Infinity;
    return Math.max(low, Math.min(high, round(seconds, this.step)));
  }

  move(seconds) {
    if (this.chosen === 0 || !Number.isFinite(seconds)) return;
    const at = this.bounded(seconds);
    this.time.value = String(at);
    this.change({ seconds: at });
  }

  addOne() {
    this.flush();
    const now = this.here();
    const next = this.entries[this.chosen + 1];
    const from = this.entries[this.chosen].seconds;
    const middle = round((from + (next ? next.seconds : Math.max(from + 2 * this.step, this.axis.total))) / 2, this.step);
    const taken = (at) => at === null || at <= 0 || this.entries.some((entry) => Math.abs(entry.seconds - at) < this.step);
    const wanted = now === null ? null : round(now, this.step);
    const at = taken(wanted) ? middle : wanted;
    if (taken(at)) return;
    const before = this.entries.filter((entry) => entry.seconds < at).length;
    const entry = { seconds: at, text: this.wordsAt(before - 1), transition: null };
    this.chosen = before;
    this.write([...this.entries.slice(0, before), entry, ...this.entries.slice(before)]);
  }

  /** The words that hold at an entry: its own, or those of one before it where it changes numbers alone. */
  wordsAt(index) {
    return this.entries.slice(0, index + 1).findLast((entry) => entry.text)?.text ?? "";
  }

  remove() {
    clearTimeout(this.waiting);
    this.waiting = null;
    if (!this.editable || this.entries.length < 2) return;
    const rest = this.entries.filter((_, index) => index !== this.chosen);
    rest[0] = { ...rest[0], seconds: 0, text: rest[0].text || this.entries[0].text };
    this.chosen = Math.max(0, this.chosen - 1);
    this.write(rest);
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const at = [...this.element.children].indexOf(document.activeElement);
    if (at < 0 || (step === undefined && event.key !== "Delete")) return;
    event.preventDefault();
    event.stopPropagation();
    if (event.key === "Delete") this.remove();
    else if (event.shiftKey && this.editable) this.move(this.entries[this.chosen].seconds + step * this.step);
    else this.choose(Math.max(0, Math.min(this.entries.length - 1, at + step)));
    this.element.children[this.chosen]?.focus();
  }

  /** A press chooses a prompt; going on sideways moves it, and letting go writes. */
  drag(event) {
    const button = event.target.closest(".adastate-mark");
    const index = [...this.element.children].indexOf(button);
    if (index < 0 || event.button !== 0) return;
    this.choose(index);
    if (!this.editable || index === 0) return;
    const width = this.element.clientWidth;
    const begun = this.entries[index].seconds;
    let at = begun;
    const moved = (move) => {
      const asked = begun + ((move.clientX - event.clientX) / width) * this.axis.total;
      at = Math.abs(move.clientX - event.clientX) < 4 ? begun : this.bounded(asked);
      this.time.value = String(at);
      lay(button, this.axis, at, this.entries[index + 1]?.seconds ?? this.axis.total);
      lay(button.previousElementSibling, this.axis, this.entries[index - 1].seconds, at);
    };
    const done = () => {
      button.removeEventListener("pointermove", moved);
      if (at !== begun) this.change({ seconds: at });
    };
    button.setPointerCapture(event.pointerId);
    button.addEventListener("pointermove", moved);
    button.addEventListener("pointerup", done, { once: true });
    button.addEventListener("pointercancel", done, { once: true });
  }
}
