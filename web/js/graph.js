/** Nodes of the open graph: which one a run belongs to, what feeds it, and setting what stands on them. */

export const ROLLOUT = "AdaStateRollout";
const TIMELINES = new Set(["AdaStatePromptTimeline", "AdaStateDemoTimeline"]);

const typeOf = (node) => node.comfyClass ?? node.type;

/** The node that `ids` name, through subgraphs ("12:5"), or null: another workflow is open, or it was deleted. */
export function nodeOf(root, ids) {
  if (!root || (ids.workflow && root.id && ids.workflow !== root.id)) return null;
  let graph = root;
  const path = String(ids.display_node ?? ids.node_id).split(":");
  for (const id of path.slice(0, -1)) graph = graph?.getNodeById(id)?.subgraph;
  const node = graph?.getNodeById(path[path.length - 1]) ?? null;
  return node && typeOf(node) === ROLLOUT ? node : null;
}

/** The rollout nodes of a graph, without those in subgraphs. */
export const rolloutsIn = (root) => (root?.nodes ?? []).filter((node) => typeOf(node) === ROLLOUT);

/** The node that feeds an input, seen through reroutes, or null. */
export function feeding(node, name) {
  let slot = node?.findInputSlot(name) ?? -1;
  let from = slot < 0 ? null : node.getInputNode(slot);
  for (let hops = 0; from && /^Reroute/.test(from.type) && hops < 32; hops++) from = from.getInputNode(0);
  return from ?? null;
}

/** The node of a type that feeds an input, or null: another one, or none. */
export function feedingOf(node, name, type) {
  const from = feeding(node, name);
  return from && typeOf(from) === type ? from : null;
}

/** The timeline node whose own text a rollout follows, or null. */
export function timelineOf(node) {
  const from = feeding(node, "positive");
  if (!from || !TIMELINES.has(typeOf(from))) return null;
  return from.inputs?.find((input) => input.name === "text")?.link == null ? from : null;
}

export const isDemo = (timeline) => typeOf(timeline) === "AdaStateDemoTimeline";

export const valueOf = (node, name) => node?.widgets?.find((widget) => widget.name === name)?.value;

/** Frames as a rollout counts them: -1, which is as long as the sound, 0, which has no end, or the nearest 4n + 1. */
function nearestLength(frames) {
  if (frames < 0) return -1;
  return frames < 1 ? 0 : 4 * Math.round((frames - 1) / 4) + 1;
}

/** Let a node's length be -1, 0, 1, 5, 9 and so on: the front end's own steps would all count from the least. */
export function stepLength(node) {
  const widget = node.widgets?.find((each) => each.name === "length");
  if (!widget) return;
  Object.assign(widget.options, { step: 40, step2: 4 });
  widget.callback = function (value) {
    this.value = nearestLength(value);
  };
}

/** Set a widget as its user would; a choice that its list does not have yet is put in front. */
export function setValue(node, name, value) {
  const widget = node.widgets?.find((each) => each.name === name);
  if (!widget) throw new Error(name);
  const choices = widget.options?.values;
  if (widget.type === "combo" && Array.isArray(choices) && !choices.includes(value)) choices.unshift(value);
  widget.value = value;
  widget.callback?.(value);
  node.graph?.setDirtyCanvas?.(true, true);
}
