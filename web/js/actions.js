/** Going on with a run: fills the inputs of the open graph, where the user sees them, and queues it. */

import { app } from "../../../scripts/app.js";
import { feedingOf, setValue, valueOf } from "./graph.js";
import { TEXTS } from "./texts.js";

const LOADER = "AdaStateLoadState";
const ADAPTIVE = "AdaStateAnchorAdaptive";
const STREAMS = ["AdaStateStreamOutput", "AdaStateStreamFrames"];
const MOST_SEED = 2 ** 50; // as the front end's own

/** Frames as the rollout counts them, 4n + 1, at least as many. */
const wholeLength = (frames) => 4 * Math.ceil((frames - 1) / 4) + 1;

/** A place to the left of a node where no other one lies. */
function placeBeside(node, size) {
  const place = [node.pos[0] - size[0] - 60, node.pos[1]];
  const overlaps = (other) =>
    other.pos[0] < place[0] + size[0] && place[0] < other.pos[0] + other.size[0] &&
    other.pos[1] - 40 < place[1] + size[1] && place[1] - 40 < other.pos[1] + other.size[1];
  for (let tries = 0; tries < 200; tries++) {
    const other = node.graph.nodes.find(overlaps);
    if (!other) break;
    place[1] = other.pos[1] + other.size[1] + 70;
  }
  return place;
}

/** The node that loads a state for `node` alone, or null. */
function loaderOf(node) {
  const loader = feedingOf(node, "resume", LOADER);
  return loader && (loader.outputs[0].links ?? []).length === 1 ? loader : null;
}

/** The stream that a rollout, or another stream, is given, or null. */
function streamOf(node) {
  for (const type of STREAMS) {
    const found = feedingOf(node, "stream", type);
    if (found) return found;
  }
  return null;
}

/** Put a node into the graph, filled already: Nodes 2.0 draws it as it is then. */
function addLoader(node, loader) {
  loader.pos = placeBeside(node, loader.size);
  node.graph.add(loader);
  loader.connect(0, node, node.findInputSlot("resume"));
}

/** Let `node` go on from a state, and its stream write one whole video. */
function resumeFrom(node, file, chunk) {
  const there = loaderOf(node);
  const loader = there ?? window.LiteGraph.createNode(LOADER);
  setValue(loader, "file", file);
  setValue(loader, "chunk", chunk);
  if (!there) addLoader(node, loader);
  const start = node.findInputSlot("start_latent");
  if (start >= 0 && node.inputs[start].link != null) node.disconnectInput(start); // a state goes on by itself
  for (let stream = streamOf(node); stream; stream = streamOf(stream))
    if (!valueOf(stream, "join")) setValue(stream, "join", true);
}

function fill(node, name, value) {
  if (node.inputs?.some((input) => input.name === name && input.link != null)) throw new Error(TEXTS.linked(name));
  setValue(node, name, value);
}

/** Make a run's video longer by some seconds; without a saved state it is made again from where the graph begins. */
export async function extend(node, run, seconds) {
  const frames = run.newest.frames;
  const length = wholeLength(frames + Math.round(seconds * run.newest.fps));
  fill(node, "length", length);
  if (run.about && Number.isSafeInteger(run.about.seed)) fill(node, "seed", run.about.seed);
  if (run.saved.state) resumeFrom(node, run.saved.state, -1);
  await app.queuePrompt(0);
  return TEXTS.extended(length, run.saved.state);
}

/** The state to go back to for making a chunk again: {after} chunks (0: the beginning), or {reason} why there is none. */
export function pointBefore(run, chunk) {
  if (run.running) return { reason: TEXTS.redoRunning };
  if (!chunk) return { reason: TEXTS.redoChoose };
  if (chunk.given) return { reason: TEXTS.redoGiven };
  const wanted = chunk.generated - 1;
  if (wanted === 0 && !run.about?.first_frame) return { after: 0 };
  if (!run.saved.state || !run.saved.kept.length)
    return { reason: run.about?.history_chunks ? TEXTS.redoNone : TEXTS.redoNoHistory };
  const earlier = run.saved.kept.filter((number) => number <= wanted);
  return earlier.length ? { after: Math.max(...earlier) } : { reason: TEXTS.redoTooEarly(run.saved.kept[0] + 1) };
}

/** A seed as the dice of the page throw it. */
export const newSeed = () => Math.floor(Math.random() * MOST_SEED);

/** Without a timeline to write them to, the numbers that a run was steered to are those of the nodes from here on. */
function fillSteered(node, { seed, strength, done }) {
  if (Number.isSafeInteger(seed)) fill(node, "seed", seed);
  const anchor = feedingOf(node, "anchor", ADAPTIVE);
  if (anchor && done.some((change) => change.strength != null)) setValue(anchor, "strength", strength);
}

/** Let a run that was paused go on as it was asked for; `write` puts what was steered into the graph's timeline, or is null. */
export async function goOn(node, run, write) {
  fill(node, "length", run.about.length);
  if (Number.isSafeInteger(run.about.seed)) fill(node, "seed", run.about.seed);
  if (run.steering && run.steering.timeline === null) fillSteered(node, run.steering);
  await write?.();
  resumeFrom(node, run.saved.state, -1);
  await app.queuePrompt(0);
  return TEXTS.wentOn(run.saved.state);
}

/** Make a run's video again from the state after some chunks on, with another seed: as long as it was asked for, or until it is stopped. */
export async function redo(node, run, after) {
  const seed = newSeed();
  fill(node, "seed", seed);
  fill(node, "length", run.newest.frames_total ?? 0);
  if (after) resumeFrom(node, run.saved.state, after);
  await app.queuePrompt(0);
  return TEXTS.redone(after, seed);
}
