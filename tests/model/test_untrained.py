"""Untrained generators: no zeros, activations of order one through many blocks, and a recipe that runs on one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import decode_video, small_config
from torch import nn

from arcopo_fast.build import load_generator, load_held_out, load_prompts
from arcopo_fast.config.reading import load_config
from arcopo_fast.errors import UserError
from arcopo_fast.model.families import SIZES
from arcopo_fast.model.sizes import GeneratorSizes, VAESizes
from arcopo_fast.model.untrained import HashedText, untrained_vae, untrained_wan
from arcopo_fast.runtime.memory import device_of
from arcopo_fast.storage.metrics import read_metrics
from arcopo_fast.train import main

DEEP = small_config(num_layers=30, attention_head_dim=32, ffn_dim=256, text_dim=32, text_len=16)
VAE = VAESizes(base_dim=8)


def assert_drawn(module: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in module.named_parameters():
        assert parameter.dtype == dtype and not parameter.requires_grad and not parameter.is_meta, name
        assert (parameter != 0).float().mean() > 0.99 and parameter.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_network_stays_of_order_one(dtype: torch.dtype) -> None:
    seed = int(torch.randint(10**6, ()))
    model = untrained_wan(DEEP, dtype=dtype, device="cpu", seed=seed)
    assert_drawn(model, dtype)
    sizes: list[float] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *arguments: sizes.append(arguments[-1].float().std().item()))
    x, t = torch.randn(2, 3, 8, 8, 12), torch.tensor([[900.0], [625.0]])
    text = HashedText(DEEP.text_len, DEEP.text_dim)(["one", "another"])
    with torch.no_grad():
        flow = model(x, t, model.encode_text(text))
        other = model(x, t, model.encode_text(text.flip(0)))
    assert flow is not None and other is not None
    assert len(sizes) == 60 and min(sizes) > 0.5 and max(sizes) < 4, sizes
    assert 0.3 < flow.float().std() < 3
    assert (flow - other).float().std() > 0.01 * flow.float().std(), "the prompt changes the flow"
    again, different = (untrained_wan(DEEP, dtype=dtype, device="cpu", seed=seed + offset) for offset in (0, 1))
    for one, same, another in zip(model.parameters(), again.parameters(), different.parameters()):
        assert torch.equal(one, same) and not torch.equal(one, another)


def test_the_decoder_gives_frames_that_are_neither_black_nor_white() -> None:
    vae = untrained_vae(VAE, dtype=torch.float32, device="cpu", seed=int(torch.randint(10**6, ())))
    assert_drawn(vae, torch.float32)
    frames = decode_video(vae, torch.randn(1, 3, 16, 4, 6))
    assert frames.shape == (1, 9, 3, 32, 48)
    assert frames.std() > 0.05 and ((frames > 0) & (frames < 1)).float().mean() > 0.6


def test_hashed_text() -> None:
    encode = HashedText(512, 4096)
    prompts = ["a cat", "a dog", "a cat"]
    text = encode(prompts)
    assert text.shape == (3, 512, 4096) and text.dtype == torch.float32
    assert torch.equal(text[0], text[2]) and torch.equal(text[:1], encode(["a cat"])) and not torch.equal(text[0], text[1])
    for rows in text:
        words = int(rows.any(dim=1).sum())
        assert 8 <= words <= 128 and rows[:words].any(dim=1).all() and not rows[words:].any()
    torch.testing.assert_close(text[0][text[0] != 0].std(), torch.tensor(1.0), rtol=0.05, atol=0)


def test_bench_prompts_come_with_the_package() -> None:
    prompts = load_prompts(load_config("bench_1_3b"))
    assert len(prompts.training) >= 20 and len(set(prompts.training + prompts.evaluation)) == len(prompts.training) + 1


def test_an_unknown_size() -> None:
    with pytest.raises(UserError, match="no generator of size '2b' is known; the sizes are 1.3b, 14b"):
        load_generator(load_config("bench_1_3b", ["generator.checkpoint=random:2b"]))


def test_the_recipe_runs_on_an_untrained_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench_1_3b`, smaller in every size."""
    model = replace(DEEP, num_layers=2, in_channels=16, out_channels=16)
    monkeypatch.setitem(SIZES, "tiny", GeneratorSizes(model, VAE))
    small = ["video.chunks=2", "video.chunk_frames=1", "video.latent_height=2", "video.latent_width=4", "sampler.steps=[1000, 500]"]
    few = ["rollout.group_size=3", "objective.anchors_per_update=2", "lora.rank=4", "lora.alpha=8", "train.iterations=1"]
    main(["bench_1_3b", "generator.checkpoint=random:tiny", *small, *few, "generator.device=cpu", f"run.directory={tmp_path}"])
    (line,) = read_metrics(tmp_path / "bench_1_3b" / "metrics.jsonl")
    assert line["update1/ratio_max"] == 0 and 0 < line["reward/sharpness"] < 1 and line["gradient_norm"] > 0
    generator = load_generator(load_config("bench_1_3b", ["generator.checkpoint=random:tiny", "generator.device=cpu"]))
    assert load_held_out(generator) == {} and generator.model.dtype == generator.decoder.vae.dtype == torch.bfloat16


def test_devices_of_which_there_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="'cuda:2', but PyTorch sees 2 GPUs here, counted from 0"):
        device_of("cuda:2")
