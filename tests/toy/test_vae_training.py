"""The toy VAE: a real AutoencoderKLWan with the compression of the real one, and training that learns, normalises and saves."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest
import torch
from diffusers import AutoencoderKLWan

from arcopo_fast.toy import data, vae_training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    directory = tmp_path_factory.mktemp("toy") / "vae"
    lines: list[str] = []
    vae_training.train_vae(directory, steps=2, seed=int(torch.randint(2**31, ())), log=lines.append, evaluation_videos=16)
    return directory, lines


def test_it_compresses_as_the_real_one_does(trained: tuple[Path, list[str]]) -> None:
    vae = vae_training.load_vae(trained[0])
    frames = torch.rand(2, 13, 3, 64, 64)
    latents = vae_training.encode(vae, frames)
    assert latents.shape == (2, 4, 16, 8, 8)
    decoded = vae_training.decode(vae, latents)
    assert decoded.shape == frames.shape and decoded.min() >= 0 and decoded.max() <= 1


def test_whole_clips_equal_the_streaming_walk_of_diffusers(trained: tuple[Path, list[str]]) -> None:
    vae = AutoencoderKLWan.from_pretrained(trained[0])
    frames = torch.rand(2, 13, 3, 64, 64)
    mean, std = (torch.tensor(vae.config[name]).view(1, 16, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        raw = vae.encode(frames.transpose(1, 2) * 2 - 1).latent_dist.mode()
        latents = vae_training.encode(vae, frames)
        torch.testing.assert_close(latents, ((raw - mean) / std).transpose(1, 2), atol=1e-4, rtol=1e-4)
        expected = vae.decode(raw).sample.transpose(1, 2) * 0.5 + 0.5
        torch.testing.assert_close(vae_training.decode(vae, latents), expected, atol=1e-4, rtol=0)


def test_saved_latents_are_normalised_and_weights_are_half_precision(trained: tuple[Path, list[str]]) -> None:
    directory, lines = trained
    assert (directory / "diffusion_pytorch_model.safetensors").stat().st_size < 1_500_000
    vae = vae_training.load_vae(directory)
    assert all(parameter.dtype == torch.float32 and torch.equal(parameter, parameter.half().float()) for parameter in vae.parameters())
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    latents = vae_training.encode(vae, data.sample(24, 8, generator)[0])
    std, mean = torch.std_mean(latents, dim=(0, 1, 3, 4))
    assert mean.abs().max() < 0.5 and std.min() > 0.6 and std.max() < 1.5
    records = [json.loads(line) for line in (directory / "training_log.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records]
    assert steps[0] == 0 and steps == sorted(set(steps)), "every phase goes on counting"
    assert set(json.loads((directory / "metrics.json").read_text())) >= {"psnr", "latent_dimensions_of_two_frames"}
    assert lines and [path.name for path in directory.parent.iterdir()] == ["vae"], "something temporary was left behind"


def test_a_step_in_the_loss_direction_learns() -> None:
    vae = vae_training.new_vae()
    frames, _, _ = data.sample(2, 2, torch.Generator().manual_seed(int(torch.randint(2**31, ()))))
    optimiser = torch.optim.Adam(vae.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        mean, log_variance = vae_training._moments(vae, frames)
        loss, _ = vae_training._loss(vae_training._reconstruct(vae, mean), frames, mean, log_variance)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert median(losses[-5:]) < 0.7 * losses[0]  # Adam at this rate overshoots now and then, by a single step


def test_participation_ratio_counts_directions() -> None:
    rows = torch.randn(20_000, 7)
    assert vae_training.participation_ratio(rows) == pytest.approx(7, rel=0.02)
    embedded = rows @ torch.linalg.qr(torch.randn(30, 7)).Q.T + 5.0
    assert vae_training.participation_ratio(embedded) == pytest.approx(7, rel=0.02)
    rows[:, 1:] *= 1e-3
    assert vae_training.participation_ratio(rows) == pytest.approx(1, rel=0.02)
