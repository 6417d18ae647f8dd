/** What lies on the timeline's axis: a ruler, films of pictures, and the chunks to click. */

import { make } from "./dom.js";
import { Strip } from "./strip.js";
import { TEXTS } from "./texts.js";

const STEPS = [0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600];
const TICK_ROOM = 64; // pixels

/** Seconds of video along a width. */
export class Axis {
  constructor(total = 0, pixels = 0) {
    this.total = Math.max(total, 1e-6);
    this.pixels = pixels;
  }

  /** Where a second lies, in percent. */
  at(seconds) {
    return (100 * Math.min(Math.max(seconds, 0), this.total)) / this.total;
  }
}

/** Put an element between two seconds. */
export function lay(element, axis, from, to) {
  const left = axis.at(from);
  element.style.left = `${left.toFixed(3)}%`;
  element.style.width = `${Math.max(0, axis.at(to) - left).toFixed(3)}%`;
}

/** As many children as there are items; `make` makes one that is missing, `update(element, item, index)` fills each. */
export function repeat(parent, items, makeOne, update) {
  while (parent.children.length > items.length) parent.lastElementChild.remove();
  while (parent.children.length < items.length) parent.append(makeOne());
  items.forEach((item, index) => update(parent.children[index], item, index));
}

export class Ruler {
  constructor() {
    this.element = make("div", "adastate-ruler", { "aria-hidden": "true" });
  }

  draw(axis) {
    const step = STEPS.find((each) => (each / axis.total) * axis.pixels >= TICK_ROOM) ?? STEPS[STEPS.length - 1];
    const ticks = Array.from({ length: Math.min(400, Math.floor(axis.total / step) + 1) }, (_, index) => index * step)
      .filter((at) => axis.at(at) < 96); // where its words have room
    repeat(this.element, ticks, () => make("span", "adastate-tick"), (tick, at) => {
      tick.style.left = `${axis.at(at).toFixed(3)}%`;
      const text = TEXTS.clock(at, step);
      if (tick.textContent !== text) tick.textContent = text;
    });
  }
}

/** Pictures side by side, as many as there is room for, each the newest one of its time. */
export class Film {
  constructor(className) {
    this.element = make("div", `adastate-film ${className}`, { "aria-hidden": "true" });
  }

  /** `pictures` are {seconds, url} in order of time; they fill the axis from `from` to `to`. `aspect` is width by height. */
  draw(pictures, axis, from, to, aspect) {
    const height = this.element.clientHeight || 48;
    const cell = (axis.total * Math.min(120, Math.max(24, height * aspect))) / Math.max(1, axis.pixels); // seconds
    const cells = [];
    let next = 0;
    for (let at = from; pictures.length && at < to - 1e-6; at += cell) {
      const end = Math.min(to, at + cell);
      while (next + 1 < pictures.length && pictures[next + 1].seconds <= (at + end) / 2) next++;
      cells.push({ from: at, to: end, url: pictures[next].url });
    }
    repeat(this.element, cells, () => make("div", "adastate-cell"), (element, { from, to, url }) => {
      lay(element, axis, from, to);
      if (element.shown === url) return;
      element.shown = url;
      element.style.backgroundImage = `url("${url}")`;
    });
  }
}

/** The chunks as clear buttons over a film, each as wide as its time; a click on the chosen one, or Escape, chooses none. */
export class TimeStrip extends Strip {
  constructor(choose) {
    super(choose);
    this.element.className = "adastate-chunks";
    this.axis = new Axis();
  }

  draw(chunks, chosen, axis) {
    this.axis = axis;
    super.draw(chunks, chosen);
  }

  click(number) {
    this.choose(this.buttons.get(number).getAttribute("aria-pressed") === "true" ? null : number);
  }

  key(event) {
    if (event.key === "Escape") this.choose(null);
    else super.key(event);
  }

  picture(button, chunk) {
    lay(button, this.axis, chunk.first_frame / chunk.fps, chunk.frames / chunk.fps);
  }
}

/** Pictures of a run for its film: those of each chunk, or its thumbnail. */
export function filmOf(chunks) {
  return chunks.flatMap((chunk) => {
    if (chunk.pictures.length) return chunk.pictures.map(({ frame, url }) => ({ seconds: frame / chunk.fps, url }));
    return chunk.thumbnail ? [{ seconds: chunk.first_frame / chunk.fps, url: chunk.thumbnail }] : [];
  });
}
