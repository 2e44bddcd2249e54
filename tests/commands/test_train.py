"""`python -m arcopo_fast.train` on the toy world: what a run leaves behind, that it repeats itself, and what it says to bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict
from support.commands import SMALL_COPO
from torch import Tensor

from arcopo_fast.build import build_engine, checkpoint_path, load_generator, load_model
from arcopo_fast.config.reading import load_config
from arcopo_fast.evaluation.videos import stream_frames
from arcopo_fast.model.lora import load_adapter
from arcopo_fast.model.vae import load_vae
from arcopo_fast.rollout.noise import GroupId, KeyedNoise
from arcopo_fast.storage.metrics import read_metrics
from arcopo_fast.train import main
from arcopo_fast.training.trainer import Trainer

RUN = ["train.iterations=2", "train.save_every=1", *SMALL_COPO]


def run(directory: Path, *overrides: str) -> Path:
    main(["toy", *RUN, f"run.directory={directory}", *overrides])
    return directory / "toy"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("runs"), "evaluation.filters=true", "evaluation.few_steps=true")


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    left = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "evaluation.json",
        "report.html",
        "samples/before-00.mp4",
        "samples/after-00.mp4",
        "adapter/README.md",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/pytorch_lora_weights.safetensors",
        "checkpoints/step-2/adapter/adapter_model.safetensors",
    } <= left
    assert any("tfevents" in name for name in left)
    metrics = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(line["update1/ratio_max"] == 0 for line in metrics), "before the first update of every iteration the ratio is exactly 1"
    assert any(line["update2/ratio_max"] > 0 for line in metrics)
    evaluation, page = json.loads((finished / "evaluation.json").read_text()), (finished / "report.html").read_text()
    assert len(evaluation["filters"]) > 5 and list(evaluation["few_steps"]) == ["1", "2", "4"]
    assert all(f"<h2>{title}</h2>" in page for title in ("Before and after", "Without learning", "Few steps"))


def test_the_same_seed_gives_the_same_metrics(finished: Path, tmp_path: Path) -> None:
    def untimed(directory: Path) -> list[dict[str, object]]:
        return [{key: value for key, value in line.items() if key != "time"} for line in read_metrics(directory / "metrics.jsonl")]

    again = run(tmp_path / "again", "evaluation.filters=true", "evaluation.few_steps=true")
    assert untimed(again) == untimed(finished)
    assert json.loads((again / "evaluation.json").read_text()) == json.loads((finished / "evaluation.json").read_text())
    assert untimed(run(tmp_path / "other", "seed=1")) != untimed(finished)


def test_several_groups_an_iteration(tmp_path: Path) -> None:
    directory = run(
        tmp_path,
        "train.save_every=0",
        "rollout.prompts_per_iteration=3",
        "rollout.pivot=per_group",
        "objective.context=recompute",
        "rollout.branches_per_wave=2",
    )
    assert all(line["update1/ratio_max"] == 0 for line in read_metrics(directory / "metrics.jsonl"))
    assert [entry.name for entry in (directory / "checkpoints").iterdir()] == ["step-2"], "without save_every, one checkpoint at the end"


def test_a_window_needs_a_smaller_pool_and_fits_it(tmp_path: Path) -> None:
    several = ["rollout.prompts_per_iteration=2", "objective.context=recompute", "video.chunks=6"]
    window = [*several, "cache.window=4", "cache.sink=1"]
    pages = []
    for overrides in (several, window):
        config = load_config("toy", [*RUN, f"run.directory={tmp_path}", *overrides])
        pages.append(Trainer(config).engine.pool.pages)
    assert pages[1] < pages[0] / 2
    run(tmp_path, *window)  # PagePoolExhausted if it were too small


def test_the_resolved_configuration_repeats_the_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(finished / "config.yaml"), "--print-config", f"run.directory={tmp_path}"])
    printed = capsys.readouterr().out
    assert printed.replace(str(tmp_path), str(finished.parent)) == (finished / "config.yaml").read_text()
    assert not list(tmp_path.iterdir())


def test_the_adapter_loads_into_peft_and_diffusers(finished: Path) -> None:
    """And gives there what it gives here: the first chunk is what diffusers' bidirectional transformer computes on it."""
    ours = load_adapter(load_model(checkpoint_path("toy")), finished / "adapter")
    x, t = torch.randn(2, 2, 16, 8, 8), torch.tensor([820.0])
    text = torch.randn(2, 8, 32)
    with torch.no_grad():
        expected = ours(x, t[:, None], ours.encode_text(text))
        base = load_model(checkpoint_path("toy"))
        plain = base(x, t[:, None], base.encode_text(text))
        assert expected is not None and plain is not None and (expected - plain).abs().max() > 1e-4, "the adapter must do something"

        through_peft = inject_adapter_in_model(LoraConfig.from_pretrained(str(finished / "adapter")), base)
        result = set_peft_model_state_dict(through_peft, load_peft_weights(str(finished / "adapter"), device="cpu"))
        assert not result.unexpected_keys
        torch.testing.assert_close(through_peft(x, t[:, None], through_peft.encode_text(text)), expected, rtol=0, atol=2e-5)

        wan = WanTransformer3DModel.from_pretrained(checkpoint_path("toy") / "transformer", torch_dtype=torch.float32)
        wan.load_lora_adapter(str(finished / "adapter"), weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
        out = wan(x.transpose(1, 2), t.expand(2), text, return_dict=False)[0].transpose(1, 2)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


class OurSigmas(FlowMatchEulerDiscreteScheduler):
    """Euler steps at the sigmas of a recipe, whatever number of steps a pipeline asks for."""

    def set_timesteps(self, *_: object, **__: object) -> None:
        super().set_timesteps(sigmas=[1.0, 0.9375, 1 / 1.2, 0.625])


def test_the_adapter_gives_the_same_video_in_diffusers_own_pipeline(finished: Path) -> None:
    """A video of one chunk has no context, so diffusers' bidirectional pipeline can make it: same noise, same Euler steps, same frames."""
    steps = ["sampler.kind=ode", "sampler.steps=[1000, 750, 500, 250]", "sampler.warp=true", "sampler.shift=5.0"]
    config = load_config("toy", [*steps, "video.chunks=1", "video.chunk_frames=4"])
    generator = load_generator(config)
    engine = build_engine(config, generator.model, videos=1)
    noise = KeyedNoise(engine.shape, GroupId(seed=int(torch.randint(1 << 30, ()))))
    prompt = "a red circle moving right"
    text = generator.encode_text([prompt])

    def ours() -> Tensor:
        return torch.cat(list(stream_frames(generator, engine, text, noise)), dim=1)

    directory = checkpoint_path("toy")
    wan = WanTransformer3DModel.from_pretrained(directory / "transformer", torch_dtype=torch.float32)
    pipeline = WanPipeline(None, None, load_vae(directory / "vae"), OurSigmas(), wan)
    pipeline.set_progress_bar_config(disable=True)

    def theirs() -> Tensor:
        latents = noise.initial(0).transpose(1, 2)
        video = pipeline(
            prompt_embeds=text,
            latents=latents,
            height=64,
            width=64,
            num_frames=13,
            guidance_scale=1.0,
            output_type="pt",
            max_sequence_length=8,
        )
        return video.frames

    plain = ours()
    torch.testing.assert_close(theirs(), plain, rtol=0, atol=1e-5)
    load_adapter(generator.model, finished)
    pipeline.load_lora_weights(str(finished / "adapter"))
    adapted = ours()
    assert (adapted - plain).abs().max() > 1e-3, "the adapter must show"
    torch.testing.assert_close(theirs(), adapted, rtol=0, atol=1e-5)


BAD = {
    "unknown recipe": (["tou"], "toy"),
    "unknown key": (["toy", "rolout.group_size=4"], "rollout"),
    "wrong type": (["toy", "train.iterations=many"], "whole number"),
    "group of one": (["toy", "rollout.group_size=1"], "at least 2"),
    "pivot beyond the video": (["toy", "rollout.pivot=9"], "beyond the video"),
    "no such checkpoint": (["toy", "generator.checkpoint=/nowhere/model.pt"], "no checkpoint"),
    "unknown reward": (["toy", "rewards={beauty: 1.0}"], "beauty"),
    "unwritable run directory": (["toy", "run.directory=/proc/runs"], "/proc/runs"),
    "too many evaluation prompts": (["toy", "evaluation.prompts=5000"], "5000"),
    "a dtype whose gradients vanish": (["toy", "generator.dtype=float16"], "use generator.dtype=bfloat16"),
    "no such target": (["toy", "lora.targets=[to_z]"], "to_z"),
}


@pytest.mark.parametrize("arguments, said", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_leaves_nothing(arguments: list[str], said: str, tmp_path: Path) -> None:
    override = [] if "run.directory" in " ".join(arguments) else [f"run.directory={tmp_path / 'runs'}"]
    status, lines = command([*arguments, *override])
    assert status == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and said in lines[0], lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["truncated", "foreign", "pickle with code", "empty directory"])
def test_bad_checkpoints_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("model.pt" if kind == "pickle with code" else "model.safetensors")
    if kind == "truncated":
        whole = (checkpoint_path("toy") / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "foreign":
        from safetensors.torch import save_file

        save_file({"layer1.0.conv1.weight": torch.randn(4, 4)}, path)
    elif kind == "pickle with code":
        torch.save({"generator": os.system}, path)
    else:
        path.mkdir()
    status, lines = command(["toy", f"generator.checkpoint={path}", f"run.directory={tmp_path / 'runs'}"])
    assert status == 2 and len(lines) == 1, lines
    assert str(path) in lines[0]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def command(arguments: list[str]) -> tuple[int, list[str]]:
    """Exit status and the lines on stderr of the command as a user runs it."""
    done = subprocess.run([sys.executable, "-m", "arcopo_fast.train", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, [line for line in done.stderr.splitlines() if line.strip()]
