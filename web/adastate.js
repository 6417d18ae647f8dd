/** The pack's page: shows a rollout on its node while it runs, and its timeline in a tab of the bottom panel. Helpers in js/ do nothing by being imported. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { ROLLOUT, nodeOf, stepLength } from "./js/graph.js";
import { keepMessages, speak } from "./js/language.js";
import { Panel } from "./js/panel.js";
import { Runs } from "./js/runs.js";
import { steer } from "./js/steering.js";
import { listByName } from "./js/templates.js";
import { TEXTS } from "./js/texts.js";
import { addUpload } from "./js/upload.js";
import { View } from "./js/view.js";

const WIDGET = "adastate_live";
const LOCALE = "Comfy.Locale"; // the front end's setting
const PLAYERS = new Set(["video-preview", "$$comfy_animation_preview"]);
const OPEN_LENGTH = new Set([ROLLOUT, "AdaStatePlan"]);
const runs = new Runs();
const views = new WeakMap(); // node -> its view and widget

const rootGraph = () => app.rootGraph ?? app.graph?.rootGraph ?? app.graph;

speak(app.extensionManager?.setting?.get?.(LOCALE));
let panel = makePanel();

function makePanel() {
  return new Panel({
    runs,
    graph: rootGraph,
    nodeOf: (run) => nodeOf(rootGraph(), run.ids),
    stop,
    steer: steerRun,
    complain,
  });
}

/** Another language was chosen: the front end makes the nodes again, and so their views; the panel is made again here. */
function changeLanguage(locale) {
  speak(locale);
  const place = panel.element.parentElement;
  panel.unmount();
  panel = makePanel();
  if (place) panel.mount(place);
}

function complain(summary, detail) {
  app.extensionManager?.toast?.add({ severity: "warn", summary, detail, life: 6000 });
}

async function stop(run) {
  const answer = await api.fetchApi("/adastate/stop", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(run.ids),
  });
  if (answer.ok) run.stopping = run.running;
  else complain(TEXTS.stopFailed, (await answer.json().catch(() => null))?.error?.message ?? answer.statusText);
  show(run);
}

/** Ask for a change of a run while it rolls; an Error says why it is refused. */
async function steerRun(run, change) {
  const asked = steer(run, change);
  panel.changed(); // it waits from now on
  try {
    await asked;
  } finally {
    show(run);
  }
}

/**
 * Keep the host's players of a node's output out of the prompts that are queued later: as an input of their own they would
 * make the host run a finished rollout again.
 */
function keepPlayersOut(node) {
  const add = node.addDOMWidget;
  node.addDOMWidget = function (name, type, element, options = {}) {
    const widget = add.call(this, name, type, element, PLAYERS.has(name) ? { ...options, serialize: false } : options);
    if (PLAYERS.has(name)) {
      widget.serialize = false;
      setTimeout(() => this.graph?.setDirtyCanvas?.(true, true), 500); // the node grows as it is drawn, and is drawn too small
    }
    return widget;
  };
}

/** Give a rollout node its place for a view; it takes no room until there is a run. */
function prepare(node) {
  const view = new View(stop);
  const widget = node.addDOMWidget(WIDGET, "adastate_live", view.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => (view.run ? View.HEIGHT : 0),
    getMaxHeight: () => (view.run ? View.HEIGHT : 0),
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false;
  widget.hidden = true;
  const removed = node.onRemoved;
  node.onRemoved = function (...args) {
    view.end();
    return removed?.apply(this, args);
  };
  views.set(node, { view, widget });
}

/** Make room for the view of a node's first run. */
function unfold(node, widget) {
  widget.hidden = false;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
}

/** Show a run on its node, if that is in the graph that is open. */
function show(run) {
  panel.look();
  const node = nodeOf(rootGraph(), run.ids);
  if (!node) return;
  if (!views.has(node)) prepare(node);
  const { view, widget } = views.get(node);
  const shown = view.run;
  if (!shown || shown === run || run.running || !shown.running) view.show(run);
  if (!shown) unfold(node, widget);
  node.graph?.setDirtyCanvas?.(true, false);
}

/** Draw every run again: another graph is open, and its nodes are new. */
function showAll() {
  for (const run of runs) show(run);
}

async function known(summary) {
  const path = [summary.prompt_id, summary.node_id].map(encodeURIComponent).join("/");
  const answer = await api.fetchApi(`/adastate/runs/${path}`);
  if (!answer.ok) return;
  const run = runs.get(summary);
  run.merge(await answer.json());
  show(run);
}

/** Ask the server for what this client missed. */
async function catchUp() {
  if (!api.clientId) return;
  const answer = await api.fetchApi(`/adastate/runs?page=1&client_id=${encodeURIComponent(api.clientId)}`);
  if (!answer.ok) return;
  const told = (await answer.json()).runs;
  const alive = new Set(told.map((summary) => summary.prompt_id));
  for (const run of runs) if (run.running && !alive.has(run.ids.prompt_id)) run.end("failed");
  for (const summary of told) if (summary.newest) await known(summary);
  showAll();
}

/**
 * A video that this browser cannot play is kept from the host's player, which would show an empty one: the view says so and goes on
 * with the preview's pictures. The file is where it was written, and in the history that the server keeps.
 */
function keepUnplayableOut({ detail }) {
  const video = detail.output?.adastate_video?.[0];
  if (!video || document.createElement("video").canPlayType(video.mime)) return;
  delete detail.output.images;
  delete detail.output.animated;
  const run = runs.get({ prompt_id: detail.prompt_id, node_id: detail.node, display_node: detail.display_node });
  run.unplayable = video.codec;
  if (run.newest) show(run);
}

function listen() {
  // before the host's own listeners
  api.addEventListener("executed", keepUnplayableOut, { capture: true });
  api.addEventListener("adastate.start", ({ detail }) => {
    const run = runs.get(detail);
    run.about = detail.about;
    run.steer(detail.steering);
    panel.look();
  });
  api.addEventListener("adastate.chunk", ({ detail }) => {
    const run = runs.get(detail);
    run.addChunk(detail);
    show(run);
  });
  api.addEventListener("adastate.steered", ({ detail }) => {
    const run = runs.get(detail);
    run.steer(detail.steering);
    show(run);
  });
  api.addEventListener("adastate.pictures", ({ detail }) => {
    const run = runs.get(detail);
    run.addPictures(detail.chunk, detail.pictures, detail.hidden);
    show(run);
  });
  api.addEventListener("adastate.end", ({ detail }) => {
    const run = runs.get(detail);
    run.steer(detail.steering);
    run.end(detail.outcome, detail.saved);
    show(run);
  });
  api.addEventListener("reconnected", catchUp);
}

/** The server tells a page its client id by the first status message. */
function whenConnected(work) {
  if (api.clientId) return work();
  const wait = () => {
    if (!api.clientId) return;
    api.removeEventListener("status", wait);
    work();
  };
  api.addEventListener("status", wait);
}

app.registerExtension({
  name: "adastate.live",
  bottomPanelTabs: [
    {
      id: "adastate",
      title: TEXTS.tab,
      type: "custom",
      render: (element) => panel.mount(element),
      destroy: () => panel.unmount(),
    },
  ],
  async init() {
    for (const name of ["adastate", "panel", "prompts", "steer"]) {
      const style = document.createElement("link");
      style.rel = "stylesheet";
      style.href = new URL(`./css/${name}.css`, import.meta.url).href;
      document.head.append(style);
    }
    listen();
    listByName(api);
    app.ui?.settings?.addEventListener?.(`${LOCALE}.change`, ({ detail }) => changeLanguage(detail.value));
    const answer = await api.fetchApi("/i18n"); // waited for, since the nodes are named next
    if (answer.ok) keepMessages(await answer.json());
  },
  setup() {
    whenConnected(catchUp);
  },
  nodeCreated(node) {
    // now, because Nodes 2.0 draws the widgets that a node has when it is made
    if (OPEN_LENGTH.has(node.comfyClass)) stepLength(node);
    if (node.comfyClass === "AdaStateLoadSound") addUpload(node, "file", complain);
    if (node.comfyClass !== ROLLOUT) return;
    keepPlayersOut(node);
    prepare(node);
  },
  afterConfigureGraph() {
    showAll();
  },
});
