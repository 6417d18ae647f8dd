"""The shipped workflows in the host's own front end: listed, opened, equal to their API twins, run."""

from __future__ import annotations

import base64
import json
import urllib.parse
import urllib.request

import av
import pytest
import torch
from conftest import Page, without_titles

from adastate_core.video.frame_folder import FrameFolder, FrameSequence, frame_name
from tools.workflow_titles import API, TITLES, shown, twin

NAMES = sorted(path.stem for path in API.glob("*.json"))
TWINS = {name: json.loads(twin(name).read_text(encoding="utf-8")) for name in NAMES}
SYSTEMS = [name for name in NAMES if name.startswith("system_")]
OTHERS = [name for name in NAMES if name not in SYSTEMS]
# The systems' workflows differ in a preset and a note only: every one is opened, one in every way and run.
ONE_SYSTEM = ["system_self_forcing"]
# (name, renderer), so ordered that every second one is each name once, the renderers in turns
IN_BOTH = [
    (name, ("classic", "vue")[(number + turn) % 2])
    for number, name in enumerate(OTHERS + ONE_SYSTEM)
    for turn in (0, 1)
]
# All are run through their API twins (tests/api); these from the page too: a stream, several, branches, files made before.
RUN_HERE = ["anchor_comparison", "continue_video", "long_video", "redo_from_chunk", "save_and_resume", *ONE_SYSTEM]
FIRST, RESUMED = 33, 49  # video frames that a workflow is shortened to, so that it runs in seconds
# Frames of the videos in the output folder after a run, where they are not one of FIRST.
LENGTHS = {
    "anchor_comparison": 5 * [FIRST],
    "continue_video": [FIRST, FIRST, 2 * FIRST - 13],
    "redo_from_chunk": [FIRST, RESUMED, RESUMED, RESUMED],
    "save_and_resume": [FIRST, RESUMED],
}
LOADERS = {"AdaStateLoadModel": "diffusion_models", "VAELoader": "vae"}

_MISSING = (
    """() => app.graph.nodes.filter((node) => !LiteGraph.registered_node_types[node.type]).map((node) => node.type)"""
)
_OVERLAPS = """() => {
  const boxes = app.graph.nodes.map((n) => [n.id, n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
  const found = [];
  for (const a of boxes) for (const b of boxes)
    if (a[0] < b[0] && a[1] < b[3] && b[1] < a[3] && a[2] < b[4] && b[2] < a[4]) found.push([a[0], b[0]]);
  return found;
}"""
_SHORTEN = """([first, resumed]) => {
  const lengthy = ["AdaStateRollout", "EmptyHunyuanLatentVideo"];
  for (const node of app.graph.nodes.filter((node) => lengthy.includes(node.type))) {
    const goesOn = node.inputs.find((input) => input.name === "resume")?.link != null;
    node.widgets.find((widget) => widget.name === "length").value = goesOn ? resumed : first;
  }
}"""
_DROP = """(picture) => {
  const bytes = Uint8Array.from(atob(picture), (letter) => letter.charCodeAt(0));
  const dropped = new DataTransfer();
  dropped.items.add(new File([bytes], "000000.png", { type: "image/png" }));
  document.querySelector("#graph-canvas")
    .dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true, cancelable: true }));
}"""
_RUN = """async () => {
  const ended = new Promise((done) => {
    for (const name of ["execution_success", "execution_error", "execution_interrupted"])
      app.api.addEventListener(name, (event) => done([name, event.detail]), { once: true });
    setTimeout(() => done(["nothing in 120 s", app.lastNodeErrors]), 120000);
  });
  await app.queuePrompt(0);
  return ended;
}"""


def test_nodes_say_which_pack_they_are_from_and_seeds_stay():
    for name in NAMES:
        nodes = json.loads(shown(name).read_text(encoding="utf-8"))["nodes"]
        packs = {node["type"]: node["properties"].get("cnr_id") for node in nodes if node["type"] != "MarkdownNote"}
        assert packs == {type_: "adastate" if type_.startswith("AdaState") else "comfy-core" for type_ in packs}
        assert all("fixed" in node["widgets_values"] for node in nodes if node["type"] == "AdaStateRollout")


def test_the_host_lists_them_as_templates_and_serves_their_thumbnails(host):
    listed = host.request("/workflow_templates")["ComfyUI-AdaState"]
    assert sorted(listed) == sorted(TITLES[name] for name in NAMES)
    for title in map(urllib.parse.quote, listed):
        url = f"http://127.0.0.1:{host.port}/api/workflow_templates/ComfyUI-AdaState/{title}.jpg"
        with urllib.request.urlopen(url) as answer:
            assert answer.read(2) == b"\xff\xd8", f"{title}.jpg is no JPEG"


def test_the_template_browser_shows_them_in_the_order_of_their_titles_with_pictures(open_front_end, host, artefacts):
    """Whatever order the host lists them in: the one here is turned round."""
    page = open_front_end("classic")
    page.tab.route("**/workflow_templates", turned_round)
    page.tab.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.tab.get_by_text("ComfyUI-AdaState", exact=True).first.click()
    cards = "[...document.querySelectorAll('[data-testid^=template-workflow-]')].map((card) => card.dataset.testid)"
    page.tab.wait_for_function(f"(title) => {cards}.includes(`template-workflow-${{title}}`)", arg=TITLES["long_video"])
    seen = [card.removeprefix("template-workflow-") for card in page.tab.evaluate(cards)]
    in_order = sorted(TITLES.values())
    seen = [title for title in seen if title in in_order]
    assert seen[0] == TITLES["start_from_picture"] and seen == in_order[: len(seen)] and len(seen) > 10
    loaded = "(title) => document.querySelector(`[data-testid='template-workflow-${title}'] img`)?.naturalWidth === 512"
    page.tab.wait_for_function(loaded, arg=seen[0])
    page.screenshot(artefacts / "template_browser.png")
    assert page.complaints == []


def turned_round(route) -> None:
    """Answer the page's question for templates with the host's answer, the pack's list from the last to the first title."""
    listed = route.fetch().json()
    listed["ComfyUI-AdaState"].sort(reverse=True)
    route.fulfill(json=listed)


def test_systems_name_the_files_to_download_and_only_safe_ones():
    for name in SYSTEMS:
        nodes = json.loads(shown(name).read_text(encoding="utf-8"))["nodes"]
        note = next(node for node in nodes if node["type"] == "MarkdownNote")["widgets_values"][0]
        assert "models/diffusion_models" in note and "https://huggingface.co/" in note
        offered = [(LOADERS[node["type"]], file) for node in nodes for file in node["properties"].get("models", ())]
        vae = "wan2.2_vae.safetensors" if name == "system_longlive2" else "wan_2.1_vae.safetensors"
        assert vae in [file["name"] for _, file in offered]
        for directory, file in offered:
            assert file["directory"] == directory and file["url"].endswith(f"/{file['name']}")
            assert file["name"].endswith(".safetensors") and "/resolve/" in file["url"] and file["name"] in note


def on_this_host(name: str, page: dict, host) -> dict:
    """What the page has to say of a workflow: its twin, where this host's own nodes have the inputs that those had of the
    host that the workflows were made with.

    Of a node of the host's, what the host does not know any more is left out; of what it knows besides, the page has a
    value of its own and no link.
    """
    definitions, said = host.request("/object_info"), without_titles(TWINS[name])
    for key, node in said.items():
        kind, inputs = node["class_type"], node["inputs"]
        if kind.startswith("AdaState"):
            continue
        known = {each for group in definitions[kind]["input_order"].values() for each in group}
        found = page.get(key, {}).get("inputs", {})
        more = {each for each in found if each not in inputs and each.split(".")[0] in known}
        assert not [each for each in more if isinstance(found[each], list)], (kind, found)
        kept = {each for each in inputs if each in known or each in found}  # the page itself gives some nodes a widget
        node["inputs"] = {each: inputs[each] for each in kept} | {each: found[each] for each in more}
    return said


def test_every_system_opens_as_its_twin_says(open_front_end, host):
    page = open_front_end("classic")
    for name in SYSTEMS:
        page.open_template(name)
        assert page.prompt() == on_this_host(name, page.prompt(), host), name
        assert page.tab.evaluate(_MISSING) == []
    assert page.complaints == []


@pytest.fixture(scope="module")
def page_of(browser, host):
    """One tab a renderer, into which one workflow after the other is loaded."""
    pages = {}

    def page(renderer: str) -> Page:
        if renderer not in pages:
            pages[renderer] = Page(browser.new_page(viewport={"width": 1600, "height": 900}), host, renderer)
        return pages[renderer]

    yield page
    for page in pages.values():
        page.tab.close()


@pytest.mark.parametrize(("name", "renderer"), IN_BOTH)
@pytest.mark.sampled(2)
def test_it_opens_whole_and_says_what_its_twin_says(name, renderer, page_of, host, artefacts):
    page = page_of(renderer)
    page.complaints.clear()
    page.open_template(name)
    assert page.tab.evaluate(_MISSING) == []
    assert page.prompt() == on_this_host(name, page.prompt(), host)
    page.screenshot(artefacts / f"{name}_{renderer}.png")
    assert page.tab.evaluate(_OVERLAPS) == []
    assert page.complaints == []


@pytest.mark.parametrize("form", ["png", "png16"])
def test_a_frame_that_is_dropped_into_the_page_opens_its_graph(form, page_of, tmp_path):
    graph = json.loads(shown("long_video").read_text(encoding="utf-8"))
    metadata = {"workflow": graph, "prompt": TWINS["long_video"]}
    folder = FrameFolder(tmp_path, FrameSequence("run", form, 64, 48, "16", 0), metadata)
    folder.write(torch.rand(1, 48, 64, 3))
    picture = (folder.close() / frame_name(0, form)).read_bytes()
    page = page_of("classic")
    page.tab.evaluate("() => app.graph.clear()")
    page.tab.evaluate(_DROP, base64.b64encode(picture).decode())
    page.tab.wait_for_function("(count) => app.graph.nodes.length === count", arg=len(graph["nodes"]))
    assert page.prompt() == without_titles(TWINS["long_video"])


@pytest.mark.parametrize("name", RUN_HERE)
def test_it_runs_from_the_page_and_its_files_are_there(name, open_front_end, host, folders, artefacts):
    page = open_front_end("classic")
    page.open_template(name)
    page.tab.evaluate(_SHORTEN, [FIRST, RESUMED])
    end, detail = page.tab.evaluate(_RUN)
    assert end == "execution_success", detail
    page.screenshot(artefacts / f"{name}_after_run.png")
    outputs = host.request(f"/history/{detail['prompt_id']}")[detail["prompt_id"]]["outputs"]
    written = [
        folders[file["type"]] / file["subfolder"] / file["filename"]
        for output in outputs.values()
        for entries in output.values()
        for file in entries
        if isinstance(file, dict) and "filename" in file
    ]
    assert written
    assert all(path.stat().st_size for path in written)
    lengths = sorted(
        frames_of(path) for path in written if path.suffix == ".mp4" and path.is_relative_to(folders["output"])
    )
    assert lengths == LENGTHS.get(name, [FIRST])
    if name == "save_and_resume":
        assert list(folders["output"].rglob("adastate/*.state.safetensors")), (
            "the saved state is not where its prefix says"
        )
    assert page.complaints == []


def frames_of(path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))
