/** Changing a run while it rolls: asking the server for it, and reading what it says of what waits and of what was changed. */

import { api } from "../../../scripts/api.js";
import { TEXTS } from "./texts.js";

/** Ask for a change of a run ({prompt, transition, seed, strength, pause, take_back}); an Error says why it is refused. */
export async function steer(run, change) {
  const mine = { id: null, change };
  run.sent.push(mine);
  try {
    const answer = await api.fetchApi("/adastate/steer", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ prompt_id: run.ids.prompt_id, node_id: run.ids.node_id, ...change }),
    });
    const told = await answer.json().catch(() => null);
    if (!answer.ok) throw new Error(told?.error?.message ?? answer.statusText);
    mine.id = told.steer.id;
    run.steer(told.steering);
    if (change.pause) run.stopping = run.pausing = run.running;
  } finally {
    const done = run.steering?.done.some(({ id }) => id === mine.id);
    if (mine.id === null || done) run.sent = run.sent.filter((each) => each !== mine);
  }
}

/** Whether what the server told was on its way while something newer was told: answers and events take different ways. */
export function isOlder(told, known) {
  const now = new Map((known?.done ?? []).map((change) => [change.id, change]));
  const unseen = (change) => change.seconds_to_picture == null && now.get(change.id)?.seconds_to_picture != null;
  return told.waiting.some((id) => now.has(id)) || told.done.some(unseen);
}

/** A change in words. */
export function wordsOf(change) {
  const parts = [];
  if (change.prompt != null) parts.push(TEXTS.steerWords(change.prompt, change.transition ?? null));
  if (change.seed != null) parts.push(TEXTS.steerToSeed(change.seed));
  if (change.strength != null) parts.push(TEXTS.steerToStrength(change.strength));
  if (change.taken_back) parts.unshift(TEXTS.steerTaken(change.taken_back.to));
  else if (change.take_back != null) parts.unshift(TEXTS.steerTakes(change.take_back));
  if (change.pause) parts.push(TEXTS.steerPauses);
  return parts.join(", ");
}

/** What waits to be taken up, in words: this page's own changes, and how many others asked for. */
export function waitingOf(run) {
  const told = run.steering?.waiting ?? [];
  const mine = new Set(run.sent.map(({ id }) => id));
  const unnamed = run.sent.filter(({ id }) => id === null).length; // theirs may be among the ones that were told
  const others = Math.max(0, told.filter((id) => !mine.has(id)).length - unnamed);
  const words = run.sent.map(({ change }) => wordsOf(change));
  return others ? [...words, TEXTS.steerOthers(others)] : words;
}

/** The changes that hold, in order of time: a take back undid those behind it. */
export function heldOf(steering) {
  let held = [];
  for (const change of steering?.done ?? []) {
    if (change.error) continue;
    if (change.taken_back) held = held.filter((each) => each.at < change.taken_back.to);
    held.push(change);
  }
  return held.filter(wordsOf).sort((a, b) => a.at - b.at); // a pause changes nothing
}

/** What holds from which second on, in order: { at, words, wait, back }, one for all that was changed at the same second. */
export function marksOf(steering) {
  const marks = new Map();
  for (const change of heldOf(steering)) {
    const mark = marks.get(change.at) ?? { at: change.at, words: [], wait: null, back: false };
    mark.words.push(wordsOf(change));
    mark.wait = change.seconds_to_picture ?? mark.wait;
    mark.back ||= Boolean(change.taken_back);
    marks.set(change.at, mark);
  }
  return [...marks.values()].map((mark) => ({ ...mark, words: mark.words.join(", ") }));
}

/** Whether the video was changed while it was made. */
export const isSteered = (run) => heldOf(run?.steering).length > 0;
