"""The ability of few steps: videos of a sampler that stops after 1, 2 or all of its steps, before and after training.

What training of a few-step generator can lose is sharpness after few steps, which a reward need not see. So the sampler is cut after k
steps, its last prediction x0hat is decoded, and the same prompts and noises are compared: by the reward, by the spread of the latents, and
by three measures of sharpness. Of these the acutance is the robust one. A change of contrast, which raises a plain Laplacian, leaves it
alone, and grain, which raises the other two more than tenfold, hardly moves it. On videos of the toy world a Gaussian blur of 0.8 pixels
lowers its logarithm by 0.08.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from arcopo_fast.build import Generator
from arcopo_fast.config.schema import Config
from arcopo_fast.data.prompts import Prompt
from arcopo_fast.evaluation.few_steps import ACUTANCE, FINE, LAPLACIAN, MEASURES, SPREAD
from arcopo_fast.evaluation.judging import Judging, joined, latents_of, shares, summary, videos_at_once
from arcopo_fast.objectives.advantage import weighted_total
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.runtime.distributed import World
from arcopo_fast.storage.metrics import TOTAL

StepScores = dict[int, dict[str, Tensor]]
"""Values [N] by name, TOTAL and `MEASURES`, for each number of steps."""


_TINY = 1e-8


def sharpness(frames: Tensor) -> dict[str, Tensor]:
    """Return three measures [N] fp32 on the CPU of frames [N, F, 3, H, W] in [0, 1], means over frames; one video at a time.

    acutance: the 98th percentile of the gradient's norm, by that of the distance from the frame's median color.
    laplacian: the variance of the luminance's Laplacian, by the luminance's.
    fine_detail: the share of the luminance's spectral power above a quarter of the sampling rate.
    """
    found = [torch.stack([torch.stack(_sharpness(frame)) for frame in video.float()]).mean(0) for video in frames]
    return dict(zip((ACUTANCE, LAPLACIAN, FINE), torch.stack(found).cpu().unbind(1)))


def acutance(frame: Tensor) -> Tensor:
    """Return that of a frame [3, H, W]: a scalar, 0 for a frame of one color."""
    across, down = frame[:, :-1, 1:] - frame[:, :-1, :-1], frame[:, 1:, :-1] - frame[:, :-1, :-1]
    gradient = (across.square() + down.square()).sum(0).sqrt()
    distance = (frame - frame.flatten(1).median(1).values[:, None, None]).square().sum(0).sqrt()
    return torch.quantile(gradient.flatten(), 0.98) / torch.quantile(distance.flatten(), 0.98).clamp_min(_TINY)


def _sharpness(frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three measures of a frame [3, H, W]. A frame of one color has none of each."""
    gray = frame.mean(0)
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], device=frame.device).view(1, 1, 3, 3)
    laplacian = F.conv2d(gray[None, None], kernel).var(correction=0) / gray.var(correction=0).clamp_min(_TINY)

    height, width = gray.shape
    windows = [torch.hann_window(size, periodic=False, device=frame.device) for size in (height, width)]
    power = torch.fft.fft2((gray - gray.mean()) * windows[0][:, None] * windows[1]).abs().square()
    rates = [torch.fft.fftfreq(size, device=frame.device).square() for size in (height, width)]
    fine = (power * (rates[0][:, None] + rates[1] > 0.25**2)).sum() / power.sum().clamp_min(_TINY)
    return acutance(frame), laplacian, fine


def counts(steps: int) -> list[int]:
    """Return the numbers of steps that are tried of a sampler of T."""
    return sorted({1, min(2, steps), steps})


def few_steps(
    config: Config,
    generator: Generator,
    engine: Engine,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    world: World | None = None,
) -> StepScores:
    """Return reward and sharpness of the first video of every prompt, made with 1, 2 and all steps of the sampler.

    Args:
        world: the ranks that share the work, batch by batch; all get the scores.
    """
    world, batch, texts = world or World(), videos_at_once(config), [prompt.text for prompt in prompts]
    batches = shares(math.ceil(len(prompts) / batch), 0, world)
    rounds = max(world.gathered(len(batches))) if generator.model.ranks > 1 else len(batches)
    own: dict[tuple[int, int], dict[str, Tensor]] = {}
    for index in batches + [0] * (rounds - len(batches)):  # where weights are divided, all ranks make equally many batches
        part = slice(index * batch, (index + 1) * batch)
        groups = range(0, len(prompts) * config.evaluation.videos_per_prompt, config.evaluation.videos_per_prompt)[part]
        for count in counts(len(engine.steps)):
            with engine.stopping_after(count):
                latents = latents_of(config, generator, engine, prompts[part], groups)
            judging, found = Judging.of(config, generator), []
            for frames, scores in judging.judge(rewards, judging.decode(latents), texts[part]):
                found.append(scores | sharpness(frames))
                del frames
            own[count, index] = joined(found) | {SPREAD: latents.float().flatten(1).std(1, correction=0).cpu()}
    everybodys = {key: scores for rank in world.gathered(own) for key, scores in rank.items()}
    found_by_count: StepScores = {}
    for count in counts(len(engine.steps)):
        scores = joined([everybodys[key] for key in sorted(everybodys) if key[0] == count])
        found_by_count[count] = {TOTAL: weighted_total(scores, config.rewards)} | {name: scores[name] for name in MEASURES}
    return found_by_count


def as_document(before: StepScores, after: StepScores) -> dict[str, Any]:
    """Return what evaluation.json says: by the number of steps, before and after, each measure's summary."""
    return {str(count): {"before": summary(before[count]), "after": summary(after[count])} for count in before}
