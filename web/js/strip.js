/** The chunks of a run in a row: thumbnails to click, or to walk through with the arrow keys. */

import { TEXTS } from "./texts.js";

export class Strip {
  /** `choose(number)` is called with a chunk's number. */
  constructor(choose) {
    this.choose = choose;
    this.buttons = new Map();
    this.element = document.createElement("div");
    this.element.className = "adastate-strip";
    this.element.setAttribute("role", "group");
    this.element.setAttribute("aria-label", TEXTS.strip);
    this.element.addEventListener("keydown", (event) => this.key(event));
  }

  /** Show `chunks` (in order); `chosen` is the number of one of them, or null to stay at the end. */
  draw(chunks, chosen) {
    const wanted = new Set(chunks.map((chunk) => chunk.chunk));
    for (const [number, button] of [...this.buttons])
      if (!wanted.has(number)) {
        button.remove();
        this.buttons.delete(number);
      }
    const focus = chosen ?? chunks[chunks.length - 1]?.chunk;
    let after = null;
    for (const chunk of [...chunks].reverse()) {
      let button = this.buttons.get(chunk.chunk);
      if (!button) {
        button = this.button(chunk.chunk);
        this.element.insertBefore(button, after);
      }
      this.update(button, chunk, chunk.chunk === chosen, chunk.chunk === focus);
      after = button;
    }
    if (chosen === null) this.element.scrollLeft = this.element.scrollWidth;
  }

  button(number) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.chunk = String(number);
    button.addEventListener("click", () => this.click(number));
    this.buttons.set(number, button);
    return button;
  }

  click(number) {
    this.choose(number);
  }

  update(button, chunk, chosen, focusable) {
    button.setAttribute("aria-pressed", String(chosen));
    button.tabIndex = focusable ? 0 : -1;
    const words = TEXTS.chunk(chunk.chunk, chunk.first_frame / chunk.fps);
    const label = chunk.shot ? TEXTS.chunkOfShot(words) : words;
    button.classList.toggle("adastate-shot", Boolean(chunk.shot));
    if (button.title !== label) {
      button.title = label;
      button.setAttribute("aria-label", label);
    }
    this.picture(button, chunk);
  }

  picture(button, chunk) {
    const url = chunk.thumbnail ? `url("${chunk.thumbnail}")` : "";
    if (button.style.backgroundImage !== url) button.style.backgroundImage = url;
  }

  key(event) {
    const all = [...this.element.children];
    const at = all.indexOf(document.activeElement);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const button = all[Math.min(all.length - 1, Math.max(0, to))];
    this.choose(Number(button.dataset.chunk));
    button.focus();
  }
}
