"""Sizes and kinds that do not go together are one line of every command, before anything is loaded, fetched or made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from support import fixtures, umt5
from support.models import small_model
from support.published import SIZES

from arcopo_fast import build as assemble
from arcopo_fast import collect, doctor, entropy, evaluate, generate, train
from arcopo_fast.build import check_fits, checkpoint_path
from arcopo_fast.cli import run_command
from arcopo_fast.config.reading import load_config
from arcopo_fast.errors import UserError
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.storage import hub
from arcopo_fast.toy.text import ToyTextEncoder

PROMPT = "a red circle moving left"
COMMANDS: dict[str, tuple[Callable[[list[str]], int | None], list[str]]] = {
    "train": (train.main, []),
    "dry run": (train.main, ["--dry-run", "--device-memory", "24"]),
    "collect": (collect.main, ["--buffer", "made/buffer"]),
    "generate": (generate.main, ["--prompt", PROMPT, "--out", "made/videos"]),
    "evaluate": (evaluate.main, ["--out", "made/evaluation"]),
    "entropy": (entropy.main, ["--out", "made/entropy"]),
    "doctor": (doctor.main, []),
}


@pytest.fixture(autouse=True)
def nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and an error where weights are loaded, something is fetched, or a reward is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(hub.VARIABLE, str(tmp_path / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hugging-face"))
    for module, name in (
        (assemble, "load_model"), (assemble, "load_vae"), (assemble, "load_text"), (assemble, "untrained_wan"),
        (assemble.registry, "load_rewards"), (hub, "_download"), (hub, "_fetch"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *unused, name=name, **more: pytest.fail(f"{name} was called"))


def toy(path: Path, **configs: dict[str, Any]) -> Path:
    """A copy of the toy's directory, with changes to the config.json of a part."""
    shutil.copytree(checkpoint_path("toy"), path)
    for part, change in configs.items():
        file = path / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return path


def transformer(path: Path, **sizes: Any) -> Path:
    """A directory whose transformer has other sizes than the toy's; the rest is the toy's."""
    toy(path)
    model = CausalWan(small_model(**{**SIZES, "text_dim": 32, "text_len": 8, **sizes}).config)
    save_file(model.state_dict(), path / "transformer" / "diffusion_pytorch_model.safetensors")
    (path / "transformer" / "config.json").unlink()
    return path


def other_text(path: Path) -> Path:
    toy(path)
    ToyTextEncoder(["a"], torch.randn(1, 48)).save_pretrained(path / "text")
    return path


def published_base(path: Path) -> list[str]:
    """A generator and a Wan2.1 directory whose text encoder is of another width."""
    path.mkdir()
    umt5.write_official(path / "base", umt5.official_state())
    shutil.copy(fixtures.VAES[0], path / "base" / "Wan2.1_VAE.pth")
    torch.save(small_model(**{**SIZES, "text_dim": 40}).state_dict(), path / "generator.pt")
    return [f"generator.checkpoint={path / 'generator.pt'}", f"generator.base={path / 'base'}"]


def checkpoint(path: Path) -> list[str]:
    return [f"generator.checkpoint={path}"]


MISFITS: dict[str, tuple[str, Callable[[Path], list[str]], list[str]]] = {
    "odd height": ("toy", lambda path: ["video.latent_height=7"], ["video.latent_height is 7", "give 6 or 8"]),
    "too small": ("toy", lambda path: ["video.latent_width=1"], ["video.latent_width is 1", "give 2"]),
    "odd, untrained": ("bench_1_3b", lambda path: ["video.latent_width=105"], ["video.latent_width is 105", "104 or 106"]),
    "odd, not here yet": ("self_forcing", lambda path: ["video.latent_height=61"], ["video.latent_height is 61"]),
    "image to video by shapes": ("toy", lambda path: checkpoint(transformer(path, in_channels=36)),
        ["36 channels and makes 16", "image-to-video"]),
    "image to video by name": (
        "toy", lambda path: checkpoint(toy(path, transformer={"model_type": "i2v"})), ["image-to-video", "config.json"]
    ),
    "image to video by configuration": (
        "toy", lambda path: checkpoint(toy(path, transformer={"in_channels": 36})), ["36 channels and makes 16", "image-to-video"]
    ),
    "48 channels": (
        "toy", lambda path: checkpoint(transformer(path, in_channels=48, out_channels=48)), ["latents of 48 channels", "decodes 16"]
    ),
    "another VAE": ("toy", lambda path: checkpoint(toy(path, vae={"z_dim": 48})),
        ["latents of 16 channels", "decodes 48", "generator.base"]),
    "another text encoder": ("toy", lambda path: checkpoint(other_text(path)), ["width 32", "gives 48", "generator.base"]),
    "another UMT5": ("toy", published_base, ["width 40", f"gives {umt5.DIM}"]),
    "no VAE": ("toy", lambda path: checkpoint(without(toy(path), "vae")), ["has no VAE"]),
    "no text encoder": ("toy", lambda path: checkpoint(without(toy(path), "text")), ["no text encoder"]),
    "the transformer alone": ("toy", lambda path: checkpoint(transformer(path) / "transformer" / "diffusion_pytorch_model.safetensors"),
        ["alone"]),
}  # fmt: skip


def without(path: Path, part: str) -> Path:
    shutil.rmtree(path / part)
    return path


# The doctor's first word is what is missing.
PAIRS = [(misfit, command) for misfit in MISFITS for command in COMMANDS if (misfit, command) != ("odd, not here yet", "doctor")]


@pytest.mark.parametrize(("misfit", "command"), PAIRS, ids="-".join)
def test_what_does_not_fit_is_one_line_of_every_command(
    misfit: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, prepare, parts = MISFITS[misfit]
    settings = prepare(tmp_path / "given")
    main, options = COMMANDS[command]
    if command == "doctor" and misfit == "odd, not here yet":
        pytest.skip("the doctor's first word is what is missing")
    status = run_command(main, [recipe, *settings, "run.directory=made/runs", *options])
    out, err = capsys.readouterr()
    lines = [line for line in (out if command == "doctor" else err).splitlines() if line.strip()]
    if command == "doctor":
        assert status == 1 and lines[-1].startswith("misfit   ")
    else:
        assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and not out
    for part in parts:
        assert part in lines[-1], f"{part!r} is not in: {lines[-1]}"
    assert {entry.name for entry in tmp_path.iterdir()} <= {"given"}


@pytest.mark.parametrize("recipe", ["toy", "bench_1_3b", "self_forcing", "krea_realtime_14b"])
def test_what_fits_or_is_not_known_passes(recipe: str, tmp_path: Path) -> None:
    check_fits(load_config(recipe))
    check_fits(load_config("toy", checkpoint(toy(tmp_path / "given"))))
    check_fits(load_config("toy", ["generator.checkpoint=hf://some-one/of-unknown-size/model.pt"]))


NONSENSE = [0, -1, 2.5, "12", True, [3], {"a": 1}, 10**400]


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: str(value)[:8])
@pytest.mark.parametrize(
    "name", ["num_layers", "num_attention_heads", "ffn_dim", "freq_dim", "text_dim", "in_channels", "text_len", "eps", "patch_size"]
)
def test_sizes_of_nonsense_in_a_generators_configuration(name: str, value: Any, tmp_path: Path) -> None:
    path = toy(tmp_path / "given", transformer={name: value})
    with pytest.raises(UserError, match=r"config\.json|given") as error:
        check_fits(load_config("toy", checkpoint(path)))
        assert value == 10**400  # a whole number: it is the weights that contradict it
        assemble.infer_config(assemble.read_state_dict(path), assemble.read_config(path), source=path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 900 and name in str(error.value)


@pytest.mark.parametrize(
    "change", [{"patch_size": [2, 2, 2]}, {"patch_size": [1, 2]}, {"patch_size": [1, 0, 2]}, {"attention_head_dim": 3}], ids=str
)
def test_other_generators(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        check_fits(load_config("toy", checkpoint(toy(tmp_path / "given", transformer=change))))


@pytest.mark.parametrize("value", [0, -1, 2.5, "12", {"a": 1}, [], [[1]], 2**0.5], ids=str)
@pytest.mark.parametrize("name", ["z_dim", "base_dim", "dim_mult", "temperal_downsample", "num_res_blocks", "patch_size"])
def test_sizes_of_nonsense_in_a_vaes_configuration(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"vae/config\.json: .*{name}") as error:
        check_fits(load_config("toy", checkpoint(toy(tmp_path / "given", vae={name: value}))))
    assert "\n" not in str(error.value)


def test_official_names_of_sizes(tmp_path: Path) -> None:
    path = toy(tmp_path / "given")
    file = path / "transformer" / "config.json"
    for config in ({"dim": 128, "num_heads": 0}, {"dim": "128", "num_heads": 4}, {"dim": 128, "num_heads": 4, "in_dim": 36, "out_dim": 16}):
        file.write_text(json.dumps(config))
        with pytest.raises(UserError, match="num_heads|dim is|in_channels|takes latents"):
            check_fits(load_config("toy", checkpoint(path)))
