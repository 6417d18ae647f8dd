"""What a run on real weights needs before it starts: its data, and a dry run."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file

from training import captioned_videos, dry_run
from training.bare_model import load_codec
from training.codec import encode_clip
from training.latents import encode, load
from training.run import Run, read_config
from training.texts import texts_of
from training.world import Scene, render

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "training" / "configs"


def write_video(path: Path, frames: torch.Tensor, fps: int = 16) -> None:
    """A lossless mp4 of frames [t, h, w, 3] in 0..1."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=fps, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "rgb24"
        for frame in (frames * 255).round().byte().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def words(monkeypatch) -> None:
    """A text encoder of 11 GB stands outside; its output has zeros behind the text."""

    def embeddings(self, texts):
        for text in texts:
            out = torch.zeros(512, 4096)
            out[: len(text)] = torch.randn(len(text), 4096, generator=torch.Generator().manual_seed(len(text)))
            yield out

    monkeypatch.setattr(captioned_videos.HostModels, "embeddings", embeddings)


def start(monkeypatch, tmp_path: Path, **entries) -> Path:
    """Run the stage with these entries; its folder."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in (entries | {"folder": str(tmp_path / "out")}).items()]
    (tmp_path / "config.toml").write_text("\n".join(lines))
    monkeypatch.setattr("sys.argv", ["captioned_videos", "--config", str(tmp_path / "config.toml"), "--threads", "1"])
    captioned_videos.main()
    return tmp_path / "out"


COMMON = {"negative_prompt": "bad", "latent_frames": 6, "seed": 1, "steps": 0}


def test_captioned_videos_become_latents_and_prompts(words, monkeypatch, tmp_path):
    scene = Scene.draw(torch.Generator().manual_seed(4), 2)
    true = render(scene, torch.arange(21))
    for name, frames in (("a", true), ("b", true.flip(2)), ("short", true[:8]), ("silent", true)):
        write_video(tmp_path / f"{name}.mp4", frames)
    for name, caption in (("a", "a hill"), ("b", "a hill, mirrored"), ("short", "too short")):
        (tmp_path / f"{name}.txt").write_text(caption + "\n")
    out = start(
        monkeypatch, tmp_path, videos=str(tmp_path), size=[64, 64], fps=16.0, held_out=1,
        vae=str(ROOT / "models" / "vae" / "adastate_demo_vae.safetensors"), **COMMON,
    )  # fmt: skip
    held, numbers = load(str(out / "held_out.safetensors"))
    trained, others = load(str(out / "train.safetensors"))
    assert numbers.tolist() == [[[0], [0]]] and others.tolist() == [[[1], [1]]]
    codec = load_codec(str(ROOT / "models" / "vae" / "adastate_demo_vae.safetensors"))
    expected = encode(lambda clip: encode_clip(codec, clip), scene, 2)
    torch.testing.assert_close(held[0].float(), expected, atol=0.06, rtol=0.05)
    assert not torch.allclose(trained[0].float(), expected, atol=0.5)
    texts = texts_of({"texts": str(out / "texts.safetensors")})
    assert [len(part) for part in texts.parts] == [len("a hill"), len("a hill, mirrored"), len("too short"), len("bad")]
    assert texts.context(torch.tensor([[1]])).shape == (1, 512, 4096)


def test_prompts_alone_are_enough_for_distribution_matching(words, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\nthe second\n")
    out = start(monkeypatch, tmp_path, prompts=str(tmp_path / "prompts.txt"), **COMMON)
    assert load(str(out / "train.safetensors"))[1].tolist() == [[[0], [0]], [[1], [1]]]
    assert load_file(out / "texts.safetensors")["lengths"].tolist() == [3, 10, 3]


def test_slow_videos_repeat_frames_and_wide_ones_are_cut(tmp_path):
    frames = torch.zeros(4, 32, 64, 3)
    frames[:, :, 16:48] = torch.tensor([0.2, 0.4, 0.6, 0.8])[:, None, None, None]
    write_video(tmp_path / "slow.mp4", frames, fps=8)
    taken = captioned_videos.pictures(tmp_path / "slow.mp4", 7, 16.0, 32, 32)
    levels = taken.mean((1, 2, 3))
    torch.testing.assert_close(levels, torch.tensor([0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8]), atol=0.02, rtol=0)
    assert captioned_videos.pictures(tmp_path / "slow.mp4", 9, 16.0, 32, 32) is None


def test_a_folder_without_captions_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no NAME.mp4 with a NAME.txt"):
        captioned_videos.captioned(tmp_path)


@pytest.mark.parametrize("name", ["wan_1_3b_recurrence", "wan_1_3b_distribution_matching"])
def test_the_big_runs_start_on_a_small_geometry(name, monkeypatch, tmp_path):
    (tmp_path / f"{name}.toml").write_text(
        f'like = "{CONFIGS / name}.toml"\nlatent_size = [4, 4]\n'
        "[geometry]\ndim = 128\nffn_dim = 64\nlayers = 30\nlatent_size = [4, 4]\n"
    )
    command = ["dry_run", "--config", str(tmp_path / f"{name}.toml"), "--layers", "1", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    dry_run.main()
    text = (tmp_path / f"dry_run_{name}.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    assert [row[1].strip() for row in rows[2:]] == ["1", "2", "each more", "30, by that"]
    assert all(float(row[2]) > 100 for row in rows[2:4])


def test_a_config_says_only_what_differs(tmp_path):
    for path in CONFIGS.glob("*.toml"):
        config = read_config(path)
        assert "like" not in config and config["folder"].startswith(("training/", "models")), path
    static, adaptive = (read_config(CONFIGS / f"recurrence{name}.toml") for name in ("_static", ""))
    differing = {key for key in adaptive if adaptive[key] != static[key]}
    assert differing == {"folder", "anchor"}
    folders = [read_config(path)["folder"] for path in CONFIGS.glob("*.toml") if path.stem != "export"]
    assert len(folders) == len(set(folders)), "no run writes over another"
    assert isinstance(Run(static, tmp_path / "run", False).done, float)
