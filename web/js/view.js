/** What a rollout node shows of its run: a playing preview, numbers, four curves, the chunks, and a button to stop it. */

import { Curve } from "./curve.js";
import { make, makeButton } from "./dom.js";
import { Player } from "./player.js";
import { Strip } from "./strip.js";
import { TEXTS } from "./texts.js";

const LOOP = 12; // pictures that are looped while following

export class View {
  static HEIGHT = 350;

  /** `stop(run)` asks the server to stop it. */
  constructor(stop) {
    this.run = null;
    this.chosen = null; // the number of a chunk, or null to follow the newest
    this.element = make("div", "adastate-live", { role: "region", "aria-label": TEXTS.view, tabindex: "-1" });
    this.element.style.display = "none"; // until there is a run
    const stage = make("div", "adastate-stage");
    this.image = make("img", "adastate-preview", { alt: TEXTS.preview, draggable: "false" });
    this.empty = make("div", "adastate-empty");
    this.empty.textContent = TEXTS.noPictures;
    stage.append(this.image, this.empty);
    this.player = new Player(this.image);
    this.progress = make("progress", "adastate-progress", { "aria-label": TEXTS.progress, max: "1" });
    this.numbers = make("div", "adastate-numbers");
    this.prompt = make("div", "adastate-prompt");
    this.unplayable = make("div", "adastate-unplayable", { role: "note" });
    const meters = make("div", "adastate-meters");
    this.curves = Object.entries(TEXTS.meters).map(([name, [title, hint]]) => new Curve(name, title, hint, TEXTS.meter));
    meters.append(...this.curves.map((curve) => curve.element));
    this.strip = new Strip((number) => this.choose(number));
    this.stopButton = makeButton("adastate-stop", TEXTS.stop, TEXTS.stopHint, () => stop(this.run));
    this.followButton = makeButton("adastate-follow", TEXTS.follow, TEXTS.followHint, () => this.choose(null));
    this.outcome = make("span", "adastate-outcome", { role: "status", "aria-live": "polite" });
    const row = make("div", "adastate-row");
    row.append(this.stopButton, this.followButton, this.outcome);
    this.element.append(stage, this.unplayable, this.progress, this.numbers, this.prompt, meters, this.strip.element, row);
    // the canvas and the node would take these for dragging and for their own keys
    for (const name of ["pointerdown", "mousedown", "dblclick", "keydown", "contextmenu"])
      this.element.addEventListener(name, (event) => event.stopPropagation());
  }

  show(run) {
    if (this.run !== run) this.chosen = null;
    this.run = run;
    this.element.style.display = "";
    this.draw();
  }

  choose(number) {
    this.chosen = number;
    this.draw();
  }

  draw() {
    const run = this.run;
    const chunks = run.inOrder;
    const chosen = this.chosen === null ? null : run.chunks.get(this.chosen) ?? null;
    if (!chosen) this.chosen = null;
    this.element.dataset.outcome = run.outcome ?? (run.stopping ? "stopping" : "running");
    this.drawPictures(chosen);
    this.unplayable.textContent = run.unplayable ? TEXTS.unplayable(run.unplayable) : "";
    this.unplayable.style.display = run.unplayable ? "" : "none";
    if (chunks.length) this.drawNumbers(chunks, chosen);
    this.strip.draw(chunks, this.chosen);
    this.followButton.disabled = chosen === null;
    this.stopButton.disabled = !run.running || run.stopping;
    const outcome = run.stopping ? (run.pausing ? TEXTS.pausing : TEXTS.stopping) : run.running ? "" : TEXTS.outcome[run.outcome] ?? run.outcome;
    if (this.outcome.textContent !== outcome) this.outcome.textContent = outcome;
  }

  drawPictures(chosen) {
    let pictures = this.run.pictures.slice(-LOOP);
    if (chosen) {
      const one = chosen.thumbnail ? [{ frame: chosen.first_frame, url: chosen.thumbnail }] : [];
      pictures = chosen.pictures.length ? chosen.pictures : one;
    }
    this.image.alt = chosen ? TEXTS.previewOf(chosen.chunk) : TEXTS.preview;
    this.image.style.display = pictures.length ? "" : "none";
    const without = !pictures.length && !this.run.pictures.length && this.run.newest?.meters === null;
    this.empty.style.display = without ? "" : "none";
    if (pictures.length) this.player.play(pictures, this.run.newest?.fps ?? 16);
  }

  drawNumbers(chunks, chosen) {
    const newest = chunks[chunks.length - 1];
    const now = chosen ?? newest;
    if (newest.frames_total === null) this.progress.removeAttribute("value"); // without an end there is no share of it
    else this.progress.value = newest.frames / newest.frames_total;
    this.progress.style.visibility = newest.frames_total === null && !this.run.running ? "hidden" : "";
    const parts = [TEXTS.made(newest.seconds, newest.seconds_total), TEXTS.speed(newest.speed)];
    if (this.run.running && newest.seconds_left !== null) parts.push(TEXTS.left(newest.seconds_left));
    parts.push(TEXTS.cache(newest.kv_bytes));
    if (this.run.running && newest.autosave?.seconds_apart) parts.push(TEXTS.autosave(newest.autosave.seconds_apart));
    this.numbers.textContent = parts.join(" · ");
    const several = now.prompt_text !== null || chunks.some((chunk) => chunk.prompt);
    this.prompt.textContent = several ? TEXTS.prompt(now.prompt, now.prompt_text) : "";
    this.prompt.title = this.prompt.textContent;
    this.prompt.style.display = several ? "" : "none";
    const [from, to] = [chunks[0].frames, newest.frames];
    const place = (chunk) => (to > from ? (chunk.frames - from) / (to - from) : 1);
    const measured = chunks.filter((chunk) => chunk.meters);
    for (const curve of this.curves) {
      const points = measured.map((chunk) => [place(chunk), chunk.meters[curve.name] ?? 0]);
      const value = (chosen ? chosen.meters : measured[measured.length - 1]?.meters)?.[curve.name] ?? null;
      curve.draw(points, chosen ? place(chosen) : null, value);
    }
  }

  end() {
    this.player.end();
  }
}
