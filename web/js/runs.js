/** What this page knows of rollouts, by prompt and node. Bounded, whatever their length. */

import { isOlder } from "./steering.js";

const MOST_CHUNKS = 240;
const NEWEST_PICTURES = 24;
const CHUNKS_WITH_PICTURES = 60;
const MOST_RUNS = 24;

export const keyOf = (ids) => `${ids.prompt_id} ${ids.node_id}`;

export class Run {
  constructor(ids) {
    this.ids = { prompt_id: ids.prompt_id, node_id: ids.node_id, display_node: ids.display_node, workflow: ids.workflow };
    this.chunks = new Map(); // number -> { numbers and meters, thumbnail, pictures }
    this.shots = new Set(); // seconds at which scenes begin, those of chunks that were let go too
    this.pictures = []; // the newest ones
    this.running = true;
    this.stopping = false;
    this.pausing = false; // this page asked for it
    this.outcome = null;
    this.stride = 1;
    this.about = null; // seed, length, fps, prompts: what was known before the first chunk
    this.unplayable = null; // the codec of its video, where this browser does not play it
    this.steering = null; // what can be changed while it rolls, what waits and what was changed
    this.sent = []; // this page's own changes, { id, change }, the id null until the server has given one
    this.saved = { state: null, kept: [] }; // the state's file as Load Rollout State names it; chunks that others are kept after
  }

  get newest() {
    return this.chunks.size ? this.chunks.get(Math.max(...this.chunks.keys())) : null;
  }

  /** Chunks in order. */
  get inOrder() {
    return [...this.chunks.values()].sort((a, b) => a.chunk - b.chunk);
  }

  addChunk(numbers) {
    this.chunks.set(numbers.chunk, { pictures: [], ...this.chunks.get(numbers.chunk), ...numbers });
    if (numbers.shot) this.shots.add(numbers.first_frame / numbers.fps);
    const newest = Math.max(...this.chunks.keys());
    while (this.chunks.size > MOST_CHUNKS) {
      this.stride *= 2;
      for (const number of [...this.chunks.keys()]) if (number % this.stride && number !== newest) this.chunks.delete(number);
    }
    for (const number of [...this.chunks.keys()]) {
      if (number % this.stride && number < newest) this.chunks.delete(number);
      else if (number <= newest - CHUNKS_WITH_PICTURES) this.chunks.get(number).pictures = [];
    }
  }

  addPictures(chunk, pictures, hidden = null) {
    const known = new Set(this.pictures.map((picture) => picture.frame));
    for (const picture of pictures) if (!known.has(picture.frame)) this.pictures.push({ ...picture, chunk });
    this.pictures.sort((a, b) => a.frame - b.frame);
    this.pictures = this.pictures.slice(-NEWEST_PICTURES);
    const entry = this.chunks.get(chunk);
    if (entry && hidden) entry.hidden = hidden;
    if (entry && pictures.length) {
      entry.thumbnail = pictures[pictures.length - 1].url;
      entry.pictures = pictures;
    }
  }

  /** What GET /adastate/runs/{prompt}/{node} said. */
  merge(told) {
    this.steer(told.steering);
    for (const chunk of told.chunks) this.addChunk(chunk);
    const byChunk = new Map();
    for (const picture of told.pictures) byChunk.set(picture.chunk, [...(byChunk.get(picture.chunk) ?? []), picture]);
    for (const [chunk, pictures] of byChunk) this.addPictures(chunk, pictures);
    this.stopping = told.stopping;
    this.about = told.about ?? this.about;
    if (!told.running) this.end(told.outcome, told.saved);
  }

  /** What the server says of the steering; chunks that it took back since are forgotten here too. */
  steer(told) {
    if (!told || isOlder(told, this.steering)) return;
    const before = new Set(this.steering?.done.map((change) => change.id));
    for (const change of told.done) if (change.taken_back && !before.has(change.id)) this.dropFrom(change.taken_back.to);
    const over = new Set(told.done.map((change) => change.id));
    this.sent = this.sent.filter(({ id }) => id === null || !over.has(id));
    this.steering = told;
  }

  /** Forget the chunks and pictures from a second of the video on. */
  dropFrom(seconds) {
    const fps = this.newest?.fps ?? 16;
    for (const [number, chunk] of [...this.chunks]) if (chunk.seconds > seconds + 1e-3) this.chunks.delete(number);
    for (const at of [...this.shots]) if (at > seconds - 1e-3) this.shots.delete(at);
    this.pictures = this.pictures.filter((picture) => picture.frame < seconds * fps - 0.5);
  }

  end(outcome, saved) {
    this.saved = saved ?? this.saved;
    this.running = false;
    this.stopping = this.pausing = false;
    this.outcome = outcome ?? this.outcome ?? "failed";
  }
}

export class Runs {
  constructor() {
    this.all = new Map(); // oldest first
  }

  get(ids) {
    const key = keyOf(ids);
    if (!this.all.has(key)) this.all.set(key, new Run(ids));
    while (this.all.size > MOST_RUNS) this.all.delete(this.all.keys().next().value);
    return this.all.get(key);
  }

  /** Chunks that runs before made of the video that this one goes on with, in order, as far as this page knows them. */
  before(run) {
    const from = run.about?.continues;
    const earlier = from ? [...this.all.values()].find((each) => each !== run && each.about?.stream === from) : null;
    if (!earlier) return [];
    return [...this.before(earlier), ...earlier.inOrder].filter((chunk) => chunk.frames <= run.about.first_frame);
  }

  [Symbol.iterator]() {
    return this.all.values();
  }
}
