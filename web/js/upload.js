/** A button that adds a sound to the input folder. The host's own is for an input that is called audio, and Nodes 2.0 has one in its list. */

import { api } from "../../../scripts/api.js";
import { setValue } from "./graph.js";
import { TEXTS } from "./texts.js";

/** The name under which the host now has a file in its input folder; it takes every kind of file at the door for pictures. */
async function sent(file) {
  const body = new FormData();
  body.append("image", file);
  const answer = await api.fetchApi("/upload/image", { method: "POST", body });
  if (!answer.ok) throw new Error(TEXTS.uploadFailed(file.name, answer.status));
  const { name, subfolder } = await answer.json();
  return subfolder ? `${subfolder}/${name}` : name;
}

/** Give a node's list of files the button; `failed` is given an error's words. */
export function addUpload(node, list, failed) {
  const chooser = document.createElement("input");
  chooser.type = "file";
  chooser.accept = "audio/*,video/*";
  chooser.onchange = async () => {
    const [file] = chooser.files;
    chooser.value = ""; // the same file may be chosen again
    try {
      if (file) setValue(node, list, await sent(file));
    } catch (error) {
      failed(error.message);
    }
  };
  const button = node.addWidget("button", "upload", "", () => chooser.click(), { serialize: false, canvasOnly: true });
  button.label = TEXTS.upload;
  button.serialize = false;
}
