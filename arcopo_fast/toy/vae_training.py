"""Training of the toy world's VAE: a real `AutoencoderKLWan`, only narrow, 64 x 64 pixels to 16 channels of 8 x 8, four frames to one.

As in the Wan 2.2 VAE the first spatial halving is the patchify (`patch_size=2`) and the blocks carry averaging shortcuts (`is_residual`),
with which a few hundred steps reach what the plain blocks need thousands for. The two other halvings also halve time.
Knows nothing of the generator.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, patchify, unpatchify
from torch import Tensor
from torch.nn import functional

from arcopo_fast.model.vae import channels_last
from arcopo_fast.storage.atomic import atomic_directory
from arcopo_fast.toy import data

Z_DIM = 16
WARMUP_STEPS = 50
PHASES = (
    (0.8, 3e-3, ((4, 4),)),
    (0.2, 1.5e-3, ((2, 8), (2, 8), (4, 4), (1, 12))),
)
"""Share of the steps, peak learning rate, and (videos, latent frames) of successive steps. Short videos teach fastest, but the causal
convolutions look back over a whole video, and a VAE that has seen short ones only drifts in color on long ones."""
KL_WEIGHT = 1e-5
SHAPE_WEIGHT = 8.0
"""Extra weight of the shape and its surroundings: it covers a twelfth of the picture, and the background would take all the capacity."""


def new_vae() -> AutoencoderKLWan:
    """Return the untrained VAE: 0.70 M parameters, 1.4 MB in fp16."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=Z_DIM,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        is_residual=True,
    )
    # Almost no sampling noise at first: otherwise the decoder learns to ignore the latents before they say anything.
    with torch.no_grad():
        vae.quant_conv.bias[Z_DIM:] = -6.0
    return channels_last(vae)


def load_vae(directory: str | Path) -> AutoencoderKLWan:
    """Load the saved VAE in fp32, frozen, in eval mode, with its 3-d convolutions in the memory format that is fastest on a CPU."""
    vae = AutoencoderKLWan.from_pretrained(directory, torch_dtype=torch.float32)
    return channels_last(vae).eval().requires_grad_(False)


def encode(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """Return normalized latents (posterior mode) of frames [N, F, 3, H, W] fp32 in [0, 1] -> [N, 1 + (F - 1) / 4, C, H / 8, W / 8]."""
    mean, _ = _moments(vae, frames)
    shift, scale = _normalization(vae)
    return ((mean - shift) / scale).transpose(1, 2)


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return the videos of normalized latents: [N, F, C, h, w] -> frames [N, 1 + 4 * (F - 1), 3, 8 h, 8 w] fp32 in [0, 1]."""
    shift, scale = _normalization(vae)
    return _reconstruct(vae, latents.transpose(1, 2) * scale + shift).clamp(0, 1)


def train_vae(
    out_dir: str | Path, *, steps: int = 2400, seed: int = 0, log: Callable[[str], None] = print, evaluation_videos: int = 256
) -> dict[str, float]:
    """Train, normalize, and save a VAE; about fifteen minutes with two threads.

    Args:
        out_dir: becomes a `save_pretrained` directory (fp16) with `training_log.jsonl` and `metrics.json`. Replaced as a whole at the end.
        steps: optimizer steps; one batch is about 50 frames.
        seed: of weights and data.
        log: receives a line now and then.
        evaluation_videos: how many fit the normalization, and as many others measure the result; a multiple of 8.

    Returns:
        the metrics of `evaluate_vae` on held-out videos, measured with the fp16-rounded weights that are saved.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = new_vae().train()
    records: list[dict[str, float]] = []
    for share, peak, batches in PHASES:
        _train_phase(vae, max(1, round(share * steps)), peak, batches, generator, records, log)

    vae = vae.eval().requires_grad_(False).half().float()
    _fit_normalization(vae, torch.Generator().manual_seed(seed + 1), videos=evaluation_videos)
    metrics = evaluate_vae(vae, torch.Generator().manual_seed(seed + 2), videos=evaluation_videos)
    _save(vae, Path(out_dir), records, metrics)
    log(" ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return metrics


def _train_phase(
    vae: AutoencoderKLWan,
    steps: int,
    peak: float,
    batches: Sequence[tuple[int, int]],
    generator: torch.Generator,
    records: list[dict[str, float]],
    log: Callable[[str], None],
) -> None:
    """Train with AdamW and a cosine of its own; append to `records`, which go on counting steps."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, steps))
    former_steps, began = (int(records[-1]["step"]) + 1 if records else 0), time.monotonic()
    for step in range(steps):
        frames, _, _ = data.sample(*batches[step % len(batches)], generator)
        mean, log_variance = _moments(vae, frames)
        latents = mean + torch.randn(mean.shape, generator=generator) * (0.5 * log_variance).exp()
        loss, terms = _loss(_reconstruct(vae, latents), frames, mean, log_variance)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            values = {name: float(value.detach()) for name, value in terms.items()}
            records.append({"step": former_steps + step, **values, "seconds": round(time.monotonic() - began, 2)})
            log(" ".join(f"{name} {value:.4g}" for name, value in records[-1].items()))


@torch.no_grad()
def evaluate_vae(vae: AutoencoderKLWan, generator: torch.Generator, *, videos: int = 256) -> dict[str, float]:
    """Measure reconstruction quality and the geometry of the latents on freshly drawn videos.

    Returns:
        `psnr` (dB over all pixels), `psnr_shape` (dB over saturated pixels), `psnr_last_frames` (dB over the last four frames: does the
        error grow with time), `latent_dimensions_of_two_frames` (participation ratio of the covariance of flattened two-frame chunks of
        normalized latents), `latent_smallest_channel_std`, `latent_largest_channel_std` (before normalization).
    """
    squared: list[Tensor] = []
    shape_squared: list[Tensor] = []
    last_squared: list[Tensor] = []
    chunks: list[Tensor] = []
    for _ in range(videos // 8):
        frames, _, _ = data.sample(8, 8, generator)
        latents = encode(vae, frames)
        error = (decode(vae, latents) - frames).square()
        saturated = _saturation(frames) > 0.5
        squared.append(error.mean())
        shape_squared.append(error.mean(2, keepdim=True)[saturated].mean())
        last_squared.append(error[:, -4:].mean())
        chunks.append(latents.unfold(1, 2, 2).permute(0, 1, 5, 2, 3, 4).flatten(0, 1).flatten(1))

    def decibel(values: list[Tensor]) -> float:
        return float(-10 * torch.stack(values).mean().log10())

    std = torch.tensor(vae.config["latents_std"])
    return {
        "psnr": decibel(squared),
        "psnr_shape": decibel(shape_squared),
        "psnr_last_frames": decibel(last_squared),
        "latent_dimensions_of_two_frames": participation_ratio(torch.cat(chunks)),
        "latent_smallest_channel_std": float(std.min()),
        "latent_largest_channel_std": float(std.max()),
    }


def participation_ratio(rows: Tensor) -> float:
    """Return the effective dimension (sum of eigenvalues)^2 / (sum of their squares) of the covariance of `rows` [n, d]."""
    centered = rows - rows.mean(0)
    # Rows' and columns' products have the same non-zero eigenvalues; take the smaller matrix.
    gram = centered @ centered.T if rows.shape[0] < rows.shape[1] else centered.T @ centered
    return float(gram.trace() ** 2 / gram.square().sum())


def _normalization(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    shape = (1, -1, 1, 1, 1)
    return torch.tensor(vae.config["latents_mean"]).view(shape), torch.tensor(vae.config["latents_std"]).view(shape)


# The class's own encode and decode walk the clip one latent frame at a time. The same modules take the first frame and then all others at
# once with equal results, since the feature caches of the causal convolutions do not care how a clip is cut. Training then makes a third
# of the calls.


def _moments(vae: AutoencoderKLWan, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log-variance of the posterior, each [N, C, F, h, w]."""
    pixels = patchify(frames.transpose(1, 2) * 2 - 1, vae.config["patch_size"])
    vae.clear_cache()
    first_frame = vae.encoder(pixels[:, :, :1], feat_cache=vae._enc_feat_map, feat_idx=[0])
    more_frames = [vae.encoder(pixels[:, :, 1:], feat_cache=vae._enc_feat_map, feat_idx=[0])] if pixels.shape[2] > 1 else []
    vae.clear_cache()
    mean, log_variance = vae.quant_conv(torch.cat([first_frame, *more_frames], dim=2)).chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def _reconstruct(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return frames in about [0, 1], not clamped, [N, F, 3, H, W], of raw latents [N, C, F, h, w]."""
    hidden = vae.post_quant_conv(latents)
    vae.clear_cache()
    first_frame = vae.decoder(hidden[:, :, :1], feat_cache=vae._feat_map, feat_idx=[0], first_chunk=True)
    more_frames = [vae.decoder(hidden[:, :, 1:], feat_cache=vae._feat_map, feat_idx=[0])] if hidden.shape[2] > 1 else []
    vae.clear_cache()
    return unpatchify(torch.cat([first_frame, *more_frames], dim=2), vae.config["patch_size"]).transpose(1, 2) * 0.5 + 0.5


def _loss(reconstruction: Tensor, frames: Tensor, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return weighted L1 and squared error of pixels, L1 of spatial differences for crisp outlines, KL divergence in nats a latent
    value."""
    weight = 1 + SHAPE_WEIGHT * functional.max_pool3d(_saturation(frames).transpose(1, 2), (1, 5, 5), 1, (0, 2, 2)).transpose(1, 2)
    error = reconstruction - frames
    pixel = (weight * (error.abs() + 4 * error.square())).mean()
    edge = (weight[..., 1:] * error.diff(dim=-1).abs()).mean() + (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    psnr = -10 * error.square().mean().log10()
    return pixel + edge + KL_WEIGHT * kl, {"pixel": pixel, "edge": edge, "kl": kl, "psnr": psnr}


def _saturation(frames: Tensor) -> Tensor:
    return frames.amax(2, keepdim=True) - frames.amin(2, keepdim=True)


def _learning_rate_factor(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def _fit_normalization(vae: AutoencoderKLWan, generator: torch.Generator, *, videos: int) -> None:
    latents = torch.cat([encode(vae, data.sample(8, 8, generator)[0]) for _ in range(videos // 8)])
    std, mean = torch.std_mean(latents, dim=(0, 1, 3, 4))
    vae.register_to_config(latents_mean=[round(v, 5) for v in mean.tolist()], latents_std=[round(v, 5) for v in std.tolist()])


def _save(vae: AutoencoderKLWan, out_dir: Path, records: list[dict[str, float]], metrics: dict[str, Any]) -> None:
    with atomic_directory(out_dir) as staging:
        vae.half().save_pretrained(staging)
        vae.float()
        (staging / "training_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (staging / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
