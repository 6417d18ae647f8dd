/** The pack's workflows in the template browser. */

const PACK = decodeURIComponent(new URL("..", import.meta.url).pathname.split("/").at(-2)); // the folder that it is installed in

/**
 * Have the host's `api` list the pack's workflows by name. Older hosts list them as the disk does, which is no order at all, and the
 * browser keeps the order that it gets. Other packs' lists stay as they are.
 */
export function listByName(api) {
  const ask = api.getWorkflowTemplates;
  if (!ask) return;
  api.getWorkflowTemplates = async function (...args) {
    const listed = await ask.apply(this, args);
    if (Array.isArray(listed?.[PACK])) listed[PACK].sort();
    return listed;
  };
}
