"""An output folder that takes nothing is told of when the prompt is queued or before anything is loaded, in one sentence."""

from __future__ import annotations

import os
import subprocess

import pytest
from adastate_pack.nodes.host import model as adapter

SAVERS = {
    "AdaStateStreamOutput": {"filename_prefix": "take", "fps": 16.0, "codec": "h264", "quality": 18, "preview": False},
    "AdaStateStreamFrames": {"filename_prefix": "take", "format": "png", "fps": 16.0, "preview": False},
    "AdaStateSaveState": {"filename_prefix": "take"},
    "AdaStateSaveAbsorption": {"filename_prefix": "take"},
}


@pytest.fixture
def read_only(folders):
    """The output folder as one on a disk that is mounted read-only; where nothing may be mounted, one that is not ours to write."""
    out = folders / "output"
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(out)], capture_output=True).returncode  # noqa: S603, S607
    if not mounted:
        out.chmod(0o555)
    if os.access(out, os.W_OK):
        pytest.skip("nothing may be mounted here, and the superuser writes anywhere")
    yield out
    if mounted:
        subprocess.run(["umount", str(out)], check=True)  # noqa: S603, S607
    else:
        out.chmod(0o755)


@pytest.mark.parametrize("name", SAVERS)
@pytest.mark.parametrize("prefix", ["take", "a/folder/take"])
def test_it_is_told_when_the_prompt_is_queued(node, read_only, name, prefix):
    said = node(name).validate(**SAVERS[name] | {"filename_prefix": prefix})
    assert f"'{prefix}' cannot be written: the folder 'output' is read-only" in said and said.count(".") == 0


def test_a_rollout_that_was_queued_before_is_told_before_its_model_is_loaded(rollout, stream, read_only, monkeypatch):
    loaded = []
    monkeypatch.setattr(adapter.HostModel, "load", lambda *args: loaded.append(args))
    with pytest.raises(ValueError, match="filename_prefix 'take' cannot be written: the folder 'output' is read-only"):
        rollout(stream=stream())
    assert loaded == []
