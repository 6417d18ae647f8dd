/** The hand on the wheel: fields that change a run while it rolls, what waits and what was changed, and keeping it afterwards. */

import { newSeed } from "./actions.js";
import { make, makeButton, say } from "./dom.js";
import { isSteered, marksOf, waitingOf, wordsOf } from "./steering.js";
import { TEXTS } from "./texts.js";

const PAUSE = 350; // ms between the slider's last step and its sending

/** Set what a field shows, unless it is being used. */
function show(input, value) {
  if (document.activeElement !== input && input.value !== value) input.value = value;
}

export class SteerRow {
  /** `steer(run, change)` asks for a change, `keep()` and `goOn()` are called by their buttons; all may throw a sentence. */
  constructor({ steer, keep, goOn }) {
    this.work = { steer, keep, goOn };
    this.run = null;
    this.fault = ""; // what the server refused last
    this.element = make("div", "adastate-steer", { role: "group", "aria-label": TEXTS.steer });
    this.error = make("div", "adastate-error", { role: "alert" });
    this.note = make("div", "adastate-steer-note", { role: "status", "aria-live": "polite" });
    this.element.append(this.makeFields(), this.error, this.makeAfter(), this.note);
    this.element.addEventListener("keydown", (event) => this.key(event));
  }

  makeFields() {
    const field = (label, ...inputs) => make("label", "adastate-field", {}, make("span", "", {}, label), ...inputs);
    this.prompt = make("input", "adastate-steer-prompt", { type: "text", spellcheck: "false", autocomplete: "off" });
    this.transition = make("select", "adastate-steer-transition", { "aria-label": TEXTS.transition });
    for (const name of ["", ...TEXTS.transitions])
      this.transition.append(make("option", "", { value: name }, name || TEXTS.transitionOwn));
    this.sendButton = makeButton("adastate-steer-send", TEXTS.steerSend, "", () => this.sendPrompt());
    this.seed = make("input", "adastate-steer-seed", { type: "text", inputmode: "numeric", autocomplete: "off" });
    this.dice = makeButton("adastate-steer-dice", "⚄", "", () => this.send({ seed: newSeed() }));
    this.dice.setAttribute("aria-label", TEXTS.steerDice);
    this.strength = make("input", "adastate-steer-strength", { type: "range", min: "0.05", max: "1", step: "0.05" });
    this.strengthShown = make("span", "adastate-steer-value", { "aria-hidden": "true" });
    this.strength.addEventListener("input", () => this.slide());
    this.strengthField = field(TEXTS.steerStrength, this.strength, this.strengthShown);
    this.pause = makeButton("adastate-steer-pause", TEXTS.steerPause, "", () => this.send({ pause: true }));
    this.back = make("input", "adastate-seconds", { type: "number", min: "0.25", step: "0.25", value: "3" });
    this.back.setAttribute("aria-label", TEXTS.steerBackSeconds);
    this.backButton = makeButton("adastate-steer-back", TEXTS.steerBack, "", () => this.takeBack());
    const back = make("span", "adastate-amount", {}, this.back, TEXTS.secondsUnit, this.backButton);
    const seeds = make("span", "adastate-amount", {}, field(TEXTS.steerSeed, this.seed), this.dice);
    const words = make("span", "adastate-steer-words", {}, field(TEXTS.steerPrompt, this.prompt), this.transition, this.sendButton);
    this.fields = make("div", "adastate-buttons adastate-steer-fields", {}, words, seeds, this.strengthField, this.pause, back);
    return this.fields;
  }

  makeAfter() {
    this.keepButton = makeButton("adastate-steer-keep", TEXTS.steerKeep, "", () => this.attempt(this.work.keep));
    this.goOnButton = makeButton("adastate-steer-go-on", TEXTS.goOn, "", () => this.attempt(this.work.goOn));
    this.after = make("div", "adastate-buttons adastate-steer-after", {}, this.goOnButton, this.keepButton);
    return this.after;
  }

  /** `keep` and `goOn` are { reason } why not, or { hint }; `goOn` is null where nothing is paused. */
  draw(run, { keep, goOn }) {
    if (run !== this.run) this.turnTo(run);
    const rolling = Boolean(run?.running && run.steering);
    const ended = Boolean(run && !run.running && (goOn || isSteered(run)));
    this.element.hidden = !(rolling || ended);
    this.fields.hidden = !rolling;
    this.after.hidden = !ended;
    if (rolling) this.drawFields(run.steering, run.stopping);
    if (ended) this.drawAfter(run, keep, goOn);
    if (rolling || ended) this.drawNotes(run, rolling);
  }

  /** Another run: what was typed for the one before is not sent to it. */
  turnTo(run) {
    this.run = run;
    this.fault = "";
    this.prompt.value = "";
    clearTimeout(this.sliding);
    this.sliding = null;
    document.activeElement === this.seed && this.seed.blur();
  }

  drawFields({ can, seed, strength }, stopping) {
    const late = stopping ? TEXTS.steerLate : null;
    const set = (reason, hint, ...controls) => {
      for (const control of controls) {
        control.disabled = Boolean(reason ?? late);
        control.title = reason ?? late ?? hint;
      }
    };
    set(can.prompt, TEXTS.steerPromptHint, this.prompt, this.sendButton);
    set(can.prompt, TEXTS.steerTransitionHint, this.transition);
    set(can.seed, TEXTS.steerSeedHint, this.seed);
    set(can.seed, TEXTS.steerDice, this.dice);
    set(can.strength, TEXTS.steerStrengthHint, this.strength);
    set(can.pause, TEXTS.steerPauseHint, this.pause);
    set(can.take_back, this.backHint(), this.back, this.backButton);
    show(this.seed, Number.isSafeInteger(seed) ? String(seed) : "");
    this.strengthField.hidden = strength === null;
    if (strength === null || this.sliding) return;
    this.strength.value = String(strength);
    this.strengthShown.textContent = strength.toFixed(2);
  }

  backHint() {
    const seconds = this.run?.steering?.back_to ?? [];
    return [TEXTS.steerBackHint, ...(seconds.length ? [TEXTS.steerBackRange(Math.min(...seconds), Math.max(...seconds))] : [])].join("; ");
  }

  drawAfter(run, keep, goOn) {
    this.goOnButton.hidden = !goOn;
    this.keepButton.hidden = !isSteered(run);
    for (const [button, what] of [[this.goOnButton, goOn], [this.keepButton, keep]]) {
      button.disabled = Boolean(what?.reason);
      button.title = what?.reason ?? what?.hint ?? "";
    }
  }

  drawNotes(run, rolling) {
    const failed = (run.steering?.done ?? []).slice(-1).filter((change) => change.error);
    const fault = this.fault || (failed.length ? TEXTS.steerFailed(wordsOf(failed[0]), failed[0].error) : "");
    this.error.hidden = !fault;
    say(this.error, fault);
    const parts = rolling ? waitingOf(run).map(TEXTS.steerWaits) : [];
    const newest = marksOf(run.steering).pop();
    if (newest) parts.push(TEXTS.steerHolds(newest.at, newest.words, newest.wait));
    say(this.note, parts.join(" · "));
    this.note.title = this.note.textContent; // what has no room is cut off
    this.note.dataset.waiting = String(rolling ? waitingOf(run).length : 0);
  }

  sendPrompt() {
    if (this.prompt.value.trim() && !this.prompt.disabled) this.sendWords({});
  }

  /** Send a change with the words that are typed, if there are any; once they are taken the field is empty. */
  async sendWords(change) {
    const typed = this.prompt.value;
    const transition = this.transition.value;
    const words = typed.trim() && !this.prompt.disabled ? { prompt: typed.trim(), ...(transition ? { transition } : {}) } : {};
    const taken = await this.send({ ...words, ...change });
    if (taken && words.prompt && this.prompt.value === typed) this.prompt.value = this.transition.value = "";
  }

  sendSeed() {
    const text = this.seed.value.trim();
    if (/^\d+$/.test(text) && Number.isSafeInteger(Number(text))) this.send({ seed: Number(text) });
    else this.refuse(TEXTS.steerSeedWrong);
  }

  /** Go back, and on from there with the words that are typed and another seed: without, the same chunks would be made again. */
  takeBack() {
    const seconds = Number(this.back.value);
    if (seconds > 0 && !this.backButton.disabled) this.sendWords({ take_back: seconds, seed: newSeed() });
  }

  /** The slider is sent when it rests. */
  slide() {
    this.strengthShown.textContent = Number(this.strength.value).toFixed(2);
    clearTimeout(this.sliding);
    const run = this.run;
    this.sliding = setTimeout(async () => {
      if (run !== this.run) return;
      await this.send({ strength: Number(this.strength.value) });
      this.sliding = null;
    }, PAUSE);
  }

  /** Whether the server took the change. */
  async send(change) {
    const run = this.run;
    return this.attempt(() => this.work.steer(run, change));
  }

  async attempt(work) {
    const run = this.run;
    try {
      this.refuse("");
      await work();
      return true;
    } catch (error) {
      if (run === this.run) this.refuse(error.message);
      return false;
    }
  }

  refuse(sentence) {
    this.fault = sentence;
    this.error.hidden = !sentence;
    say(this.error, sentence);
  }

  /** Enter sends the field that it is pressed in, Escape leaves it; keys of an input method are its own. */
  key(event) {
    if (event.isComposing || event.ctrlKey || event.metaKey) return;
    const sends = new Map([[this.prompt, () => this.sendPrompt()], [this.seed, () => this.sendSeed()], [this.back, () => this.takeBack()]]);
    if (event.key === "Escape") {
      event.target.blur?.();
    } else if (event.key === "Enter" && sends.has(event.target)) {
      event.preventDefault();
      sends.get(event.target)();
    }
  }
}
