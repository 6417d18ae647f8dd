/** The bottom panel's tab: the timeline of a rollout, its prompts, and the buttons that stop it and go on with it. */

import { extend, goOn, pointBefore, redo } from "./actions.js";
import { make, makeButton, say } from "./dom.js";
import { Curve } from "./curve.js";
import { feeding, rolloutsIn, timelineOf, valueOf } from "./graph.js";
import { Player } from "./player.js";
import { PromptRow } from "./prompt_row.js";
import { SteerRow } from "./steer_row.js";
import { isSteered, marksOf } from "./steering.js";
import { TEXTS } from "./texts.js";
import { Timeline } from "./timeline.js";
import { Axis, Film, Ruler, TimeStrip, filmOf, lay, repeat } from "./tracks.js";

const LOOK = 500; // ms between looks at the graph
const LOOP = 12; // pictures that are looped while following

/** What Extend will do once a run that is under way is whole; empty as long as that is not known. */
function extendLater(run) {
  if (!run.about || run.about.keeps_state === undefined) return "";
  if (run.about.length === 0) return TEXTS.extendEndless;
  if (!run.about.stream) return TEXTS.extendNoStream;
  return run.about.keeps_state ? TEXTS.extendWillGoOn : TEXTS.extendWillMakeAgain;
}

/** Seconds along the axis of a video without an end: it grows in steps, so that chunks do not move with each that comes. */
const room = (made) => {
  let seconds = 10;
  while (seconds < 1.1 * made) seconds *= 1.5;
  return seconds;
};

export class Panel {
  /** `host` gives runs, graph(), nodeOf(run), stop(run), steer(run, change) and complain(title, detail). */
  constructor(host) {
    this.host = host;
    this.picked = null; // the choice that the user made; null follows the newest run
    this.chosen = null; // the number of a chunk, or null
    this.drawn = 0;
    this.timeline = new Timeline(() => this.changed());
    this.prompts = new PromptRow((entries) => this.timeline.write(entries, this.told), () => this.here());
    this.steerRow = new SteerRow({ steer: (run, change) => this.host.steer(run, change), keep: () => this.keep(), goOn: () => this.goOn() });
    this.element = make("section", "adastate-panel", { "aria-label": TEXTS.panel });
    this.empty = make("div", "adastate-nothing", {}, TEXTS.nothing);
    this.content = make("div", "adastate-content", {}, this.makeHead(), this.steerRow.element, this.makeBody());
    this.element.append(this.empty, this.content);
    this.element.addEventListener("keydown", (event) => {
      if (!event.ctrlKey && !event.metaKey) event.stopPropagation(); // plain letters are the canvas's own keys
    });
    this.sizes = new ResizeObserver(() => this.changed());
  }

  makeHead() {
    this.select = make("select", "adastate-run", { "aria-label": TEXTS.run });
    this.select.addEventListener("change", () => this.pick(this.select.value));
    this.numbers = make("span", "adastate-numbers");
    this.status = make("span", "adastate-status", { role: "status", "aria-live": "polite" });
    this.seconds = make("input", "adastate-seconds", { type: "number", min: "0.25", step: "0.25", value: "5" });
    this.seconds.setAttribute("aria-label", TEXTS.extendSeconds);
    this.stopButton = makeButton("adastate-stop", TEXTS.stop, TEXTS.stopHint, () => this.host.stop(this.choice.run));
    this.extendButton = makeButton("adastate-extend", TEXTS.extend, TEXTS.extendHint, () => this.extend());
    this.redoButton = makeButton("adastate-redo", TEXTS.redo, "", () => this.redo());
    const amount = make("span", "adastate-amount", {}, TEXTS.extendBy, this.seconds, TEXTS.secondsUnit, this.extendButton);
    const buttons = make("div", "adastate-buttons", {}, this.stopButton, amount, this.redoButton);
    return make("div", "adastate-head", {}, this.select, this.numbers, this.status, buttons);
  }

  makeBody() {
    this.image = make("img", "adastate-preview", { alt: TEXTS.preview, draggable: "false" });
    this.image.addEventListener("load", () => this.image.naturalWidth !== this.width && this.changed());
    this.player = new Player(this.image);
    this.caption = make("div", "adastate-caption");
    const stage = make("div", "adastate-side", {}, make("div", "adastate-stage", {}, this.image), this.caption);
    const row = (name, title, hint, ...lane) => {
      const gutter = make("div", "adastate-gutter", hint ? { title: hint } : {}, title);
      return make("div", "adastate-track", { "data-row": name }, gutter, make("div", "adastate-lane", {}, ...lane));
    };
    this.ruler = new Ruler();
    this.film = new Film("adastate-film-chunks");
    this.hidden = new Film("adastate-film-hidden");
    this.strip = new TimeStrip((number) => this.choose(number));
    this.before = make("div", "adastate-before", { title: TEXTS.before });
    this.hiddenRow = row("hidden", TEXTS.rows.hidden, TEXTS.hiddenHint, this.hidden.element);
    this.curves = Object.entries(TEXTS.meters).map(([name, [title, hint]]) => new Curve(name, title, hint, TEXTS.meter));
    this.curves.forEach((curve) => curve.element.classList.add("adastate-track"));
    this.head = make("div", "adastate-playhead", { "aria-hidden": "true" });
    this.switch = make("div", "adastate-switch", { role: "img" }, make("span", "", {}, TEXTS.absorbed));
    this.steered = make("div", "adastate-steered", { role: "group", "aria-label": TEXTS.steered });
    this.shots = make("div", "adastate-shots", { role: "group", "aria-label": TEXTS.shots });
    this.overlay = make("div", "adastate-overlay", {}, this.shots, this.switch, this.steered, this.head);
    const chunks = row("chunks", TEXTS.rows.chunks, "", this.film.element, this.before, this.strip.element);
    this.promptsRow = row("prompts", TEXTS.rows.prompts, "", this.prompts.element);
    this.lane = chunks.lastElementChild;
    this.tracks = make("div", "adastate-tracks", {}, row("ruler", "", "", this.ruler.element), chunks, this.hiddenRow,
      ...this.curves.map((curve) => curve.element), this.promptsRow, this.overlay);
    return make("div", "adastate-body", {}, stage, make("div", "adastate-main", {}, this.tracks, this.prompts.editor));
  }

  /** The tab is shown in an element; called again whenever the host draws it. */
  mount(parent) {
    if (this.element.parentElement === parent) return;
    parent.classList.add("adastate-tab");
    parent.append(this.element);
    this.sizes.observe(this.lane);
    this.timer ??= setInterval(() => this.look(), LOOK);
    this.look();
  }

  unmount() {
    clearInterval(this.timer);
    this.timer = null;
    this.sizes.disconnect();
    this.player.end();
    this.element.remove();
  }

  /** What can be shown: the newest run of each rollout of the open graph, or none yet, and then every other run. */
  choices() {
    const runs = [...this.host.runs].reverse();
    const nodes = rolloutsIn(this.host.graph());
    const made = runs.map((run) => ({ key: `${run.ids.prompt_id} ${run.ids.node_id}`, run, node: this.host.nodeOf(run) }));
    const idle = nodes.filter((node) => !made.some((each) => each.node === node));
    return [...made, ...idle.map((node) => ({ key: `node ${node.id}`, run: null, node }))];
  }

  label({ run, node }, earlier) {
    const state = run ? (run.running ? "running" : run.outcome) : "none";
    const name = earlier ? `${TEXTS.states[state] ?? state}, ${TEXTS.earlier}` : TEXTS.states[state] ?? state;
    return TEXTS.runOf(node ? node.getTitle?.() ?? node.title : TEXTS.elsewhere, run ? run.ids.display_node ?? run.ids.node_id : node.id, name);
  }

  pick(key) {
    this.picked = key;
    this.chosen = null;
    this.look();
  }

  /** Look at the graph and the runs again. */
  look() {
    if (!this.element.isConnected || !this.element.offsetParent) return;
    const choices = this.choices();
    const running = choices.find((each) => each.run?.running && each.run.chunks.size);
    const was = this.choice?.key;
    this.choice = choices.find((each) => each.key === this.picked) ?? running ?? choices[0] ?? null;
    if (this.choice?.key !== was) this.chosen = null;
    const timeline = this.choice?.node ? timelineOf(this.choice.node) : null;
    this.timeline.follow(timeline, this.told);
    this.drawChoices(choices);
    this.changed();
  }

  /** Frames a second as the run or its stream says, or null: those of the model are told when it runs. */
  get told() {
    const { run, node } = this.choice ?? {};
    return run?.newest?.fps ?? run?.about?.fps ?? (Number(valueOf(feeding(node, "stream"), "fps")) || null);
  }

  get fps() {
    return this.told ?? 16;
  }

  /** Draw at the next frame; many changes at once are drawn once. */
  changed() {
    if (this.drawn || !this.element.isConnected) return;
    this.drawn = requestAnimationFrame(() => {
      this.drawn = 0;
      this.draw();
    });
  }

  choose(number) {
    this.chosen = number;
    this.draw();
  }

  /** The second at which the chosen chunk begins, or null. */
  here() {
    const chunk = this.choice?.run?.chunks.get(this.chosen);
    return chunk ? chunk.first_frame / chunk.fps : null;
  }

  drawChoices(choices) {
    const seen = new Set();
    const wanted = choices.map((each) => {
      const place = each.node ?? each.run.ids.node_id;
      const label = this.label(each, seen.has(place));
      seen.add(place);
      return [each.key, label];
    });
    const text = JSON.stringify(wanted);
    if (text !== this.listed) {
      this.listed = text;
      this.select.replaceChildren(...wanted.map(([value, label]) => make("option", "", { value }, label)));
    }
    if (this.choice) this.select.value = this.choice.key;
  }

  draw() {
    const choice = this.choice ?? null;
    this.empty.style.display = choice ? "none" : "";
    this.content.style.display = choice ? "" : "none";
    if (!choice) return;
    const { run, node } = choice;
    this.element.dataset.outcome = run ? run.outcome ?? (run.stopping ? "stopping" : "running") : "none";
    const chunks = run?.inOrder ?? [];
    const chunk = run?.chunks.get(this.chosen) ?? null;
    const prompts = this.promptsOf(run);
    const axis = new Axis(this.total(run, node, prompts.entries), this.lane.clientWidth);
    this.ruler.draw(axis);
    this.drawPictures(run, chunks, chunk, axis);
    this.strip.draw(chunks, chunk ? this.chosen : null, axis);
    this.drawMeters(chunks, chunk, axis);
    this.drawMarks(chunks, chunk, axis);
    this.drawShots(run, axis);
    this.drawSteered(run, axis);
    this.steerRow.draw(run, { keep: this.keepable(run), goOn: this.resumable(run) });
    this.promptsRow.style.display = prompts.entries.length ? "" : "none";
    this.prompts.draw(prompts, axis, Math.max(0.001, Math.round(4000 / this.fps) / 1000));
    this.drawNumbers(run, chunks, chunk);
    this.drawButtons(run, node, chunk);
  }

  /** Seconds along the axis: the video as it was asked for, or as it was kept, with room for prompts that lie behind its end. */
  total(run, node, entries) {
    const about = run?.about;
    const asked = Math.max(0, Number(valueOf(node, "length")) || 0); // -1 is as long as the sound, which is not known yet
    let seconds = (about?.length || asked || 81) / (about?.fps ?? this.fps);
    if (run?.newest) {
      const { seconds: made, seconds_total: all } = run.newest;
      seconds = ["stopped", "paused"].includes(run.outcome) ? made : all ?? (run.running ? room(made) : made);
    }
    const last = entries[entries.length - 1]?.seconds ?? 0;
    return last < seconds ? seconds : 1.15 * last;
  }

  drawPictures(run, chunks, chunk, axis) {
    const all = run?.pictures ?? [];
    let pictures = all.slice(-LOOP);
    if (chunk) pictures = chunk.pictures.length ? chunk.pictures : filmOf([chunk]).map(({ url }) => ({ frame: 0, url }));
    this.image.style.visibility = pictures.length ? "" : "hidden";
    this.image.alt = chunk ? TEXTS.previewOf(chunk.chunk) : TEXTS.preview;
    if (pictures.length) this.player.play(pictures, this.fps);
    this.width = this.image.naturalWidth;
    const aspect = this.width ? this.width / this.image.naturalHeight : 16 / 9;
    const made = run ? [...this.host.runs.before(run), ...chunks] : [];
    const from = made.length ? made[0].first_frame / made[0].fps : 0;
    const to = made.length ? made[made.length - 1].seconds : 0;
    this.film.draw(filmOf(made), axis, from, to, aspect);
    lay(this.before, axis, 0, chunks.length ? chunks[0].first_frame / chunks[0].fps : 0);
    const states = made.filter((each) => each.hidden).map((each) => ({ seconds: each.first_frame / each.fps, url: each.hidden }));
    this.hiddenRow.style.display = states.length ? "" : "none";
    if (states.length) this.hidden.draw(states, axis, states[0].seconds, to, aspect);
  }

  drawMeters(chunks, chunk, axis) {
    const measured = chunks.filter((each) => each.meters);
    const middle = (each) => axis.at((each.first_frame + each.frames) / 2 / each.fps) / 100;
    for (const curve of this.curves) {
      const points = measured.map((each) => [middle(each), each.meters[curve.name] ?? 0]);
      const value = (chunk ? chunk.meters : measured[measured.length - 1]?.meters)?.[curve.name] ?? null;
      curve.draw(points, null, value);
    }
  }

  drawMarks(chunks, chunk, axis) {
    const newest = chunks[chunks.length - 1];
    this.head.style.display = newest ? "" : "none";
    if (newest) this.head.style.left = `${axis.at(chunk ? chunk.first_frame / chunk.fps : newest.seconds).toFixed(3)}%`;
    const switched = chunks.find((each) => each.absorbed);
    this.switch.style.display = switched ? "" : "none";
    if (!switched) return;
    this.switch.style.left = `${axis.at(switched.seconds).toFixed(3)}%`;
    const hint = TEXTS.absorbedHint(switched.seconds);
    this.switch.title = switched.absorbed_why ? `${hint} (${switched.absorbed_why})` : hint;
    this.switch.setAttribute("aria-label", this.switch.title);
  }

  drawShots(run, axis) {
    const mark = () => make("span", "adastate-shot-mark", {}, make("span", "adastate-shot-flag", { role: "img" }, TEXTS.shot));
    repeat(this.shots, [...(run?.shots ?? [])].sort((a, b) => a - b), mark, (element, at) => {
      element.style.left = `${axis.at(at).toFixed(3)}%`;
      const flag = element.firstElementChild;
      flag.title = TEXTS.shotAt(at);
      flag.setAttribute("aria-label", flag.title);
    });
  }

  drawSteered(run, axis) {
    const marks = marksOf(run?.steering).filter(({ at }) => at <= axis.total);
    const mark = () => make("span", "adastate-steered-mark", {}, make("span", "adastate-steered-dot", { role: "img" }));
    repeat(this.steered, marks, mark, (element, { at, words, wait, back }) => {
      element.style.left = `${axis.at(at).toFixed(3)}%`;
      const dot = element.firstElementChild;
      dot.title = TEXTS.steerHolds(at, words, wait);
      dot.setAttribute("aria-label", dot.title);
      element.classList.toggle("adastate-steered-back", back);
    });
  }

  /** Where the steered timeline can be written: { hint }, or { reason } why not. */
  keepable(run) {
    const node = this.timeline.node;
    if (!this.choice?.node) return { reason: TEXTS.noNode };
    if (!node || run?.steering?.timeline == null) return { reason: TEXTS.keepNoTimeline };
    if (this.timeline.text === run.steering.timeline) return { reason: TEXTS.keepHas };
    return { hint: TEXTS.steerKeepHint(node.getTitle?.() ?? node.title, node.id) };
  }

  /** How a paused run can go on: { hint }, or { reason } why not; null where none is paused. */
  resumable(run) {
    if (run?.outcome !== "paused") return null;
    if (!this.choice.node) return { reason: TEXTS.noNode };
    if (!run.saved.state) return { reason: TEXTS.goOnNoState };
    return this.toWrite(run) && !this.timeline.node ? { reason: TEXTS.keepNoTimeline } : { hint: TEXTS.goOnHint };
  }

  /** The timeline that the graph lacks for making a run's video again, or null. */
  toWrite(run) {
    const text = isSteered(run) ? run.steering.timeline : null;
    return text === this.timeline.text ? null : text;
  }

  /** The entries to show: the node's, to be edited, else those of the run. */
  promptsOf(run) {
    const { node, entries, error, text } = this.timeline;
    if (node) {
      const comments = /^[^\S\n]*\/\//m.test(text ?? "") ? ` · ${TEXTS.comments}` : "";
      const note = TEXTS.promptsOf(node.getTitle?.() ?? node.title, node.id) + comments;
      return { entries, editable: entries.length > 0, error, note };
    }
    const told = run?.about?.prompts ?? [];
    return { entries: told, editable: false, error: null, note: told.length ? TEXTS.promptsFixed : TEXTS.promptsNone };
  }

  drawNumbers(run, chunks, chunk) {
    const newest = chunks[chunks.length - 1];
    const parts = newest ? [TEXTS.made(newest.seconds, newest.seconds_total), TEXTS.speed(newest.speed)] : [];
    if (run?.running && newest?.seconds_left != null) parts.push(TEXTS.left(newest.seconds_left));
    if (newest) parts.push(TEXTS.cache(newest.kv_bytes));
    if (run?.running && newest?.autosave?.seconds_apart) parts.push(TEXTS.autosave(newest.autosave.seconds_apart));
    say(this.numbers, parts.join(" · "));
    const shown = chunk ?? newest;
    say(this.caption, shown ? TEXTS.chunk(shown.chunk, shown.first_frame / shown.fps) : "");
    if (run?.stopping) say(this.status, run.pausing ? TEXTS.pausing : TEXTS.stopping);
    else if (this.said && this.saidOf === this.choice.key) say(this.status, this.said);
    else say(this.status, !run ? "" : run.running ? extendLater(run) : TEXTS.outcome[run.outcome] ?? run.outcome);
    this.status.title = this.status.textContent; // what has no room is cut off
  }

  drawButtons(run, node, chunk) {
    this.stopButton.disabled = !run?.running || run.stopping;
    const ended = run && !run.running && run.newest;
    this.extendButton.disabled = !ended || !node;
    const later = run?.running && extendLater(run) ? [extendLater(run), ...(run.about.stream ? [TEXTS.extendStopped] : [])] : [];
    this.extendButton.title = !ended ? [TEXTS.extendRunning, ...later].join(". ") : !node ? TEXTS.noNode : run.saved.state ? TEXTS.extendHint : TEXTS.extendWhole;
    const point = run ? pointBefore(run, chunk) : { reason: TEXTS.redoChoose };
    this.redoButton.disabled = point.after === undefined || !node;
    this.redoButton.title = point.reason ?? (node ? TEXTS.redoHint(chunk.generated, point.after) : TEXTS.noNode);
  }

  extend() {
    const seconds = Number(this.seconds.value);
    if (seconds > 0) this.act(() => extend(this.choice.node, this.choice.run, seconds));
  }

  redo() {
    const { run, node } = this.choice;
    const { after } = pointBefore(run, run.chunks.get(this.chosen));
    if (after !== undefined) this.act(() => redo(node, run, after));
  }

  /** Write what was steered into the graph. */
  async keep() {
    const { run, key } = this.choice;
    await this.timeline.writeText(run.steering.timeline, this.told);
    this.said = TEXTS.kept;
    this.saidOf = key;
    this.look();
  }

  async goOn() {
    const { node, run, key } = this.choice;
    const text = this.toWrite(run);
    this.said = await goOn(node, run, text && (() => this.timeline.writeText(text, this.told)));
    this.saidOf = key;
    this.picked = null;
    this.look();
  }

  /** Fill and queue, then follow the run that comes of it. */
  async act(work) {
    const { key } = this.choice;
    try {
      this.said = await work();
      this.saidOf = key;
      this.picked = null;
    } catch (error) {
      this.host.complain(TEXTS.actionFailed, error.message);
    }
    this.look();
  }
}
