/** Which node of the open graph a run belongs to. */

export const ROLLOUT = "AdaStateRollout";

/** The node that `ids` name, through subgraphs ("12:5"), or null: another workflow is open, or it was deleted. */
export function nodeOf(root, ids) {
  if (!root || (ids.workflow && root.id && ids.workflow !== root.id)) return null;
  let graph = root;
  const path = String(ids.display_node ?? ids.node_id).split(":");
  for (const id of path.slice(0, -1)) graph = graph?.getNodeById(id)?.subgraph;
  const node = graph?.getNodeById(path[path.length - 1]) ?? null;
  return node && (node.comfyClass ?? node.type) === ROLLOUT ? node : null;
}
