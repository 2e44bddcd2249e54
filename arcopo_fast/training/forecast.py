"""Forecast what a run of this recipe would learn: figures of one real group and one optimizer step, each good or poor, with the remedy.

By step of the sampler: how far the candidates lie apart, how far a step moves the ratio in units of the clip, what the clip leaves alive.
Then the gradient against Adam's eps and the norm limits, and each judge's own noise against the spread that it shall judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from arcopo_fast.training.findings import Check, Finding, Replayed, ratio_objective

ALIKE = 1e-5
"""Spread of the candidates, relative to their size, below which float32 predictions tell them apart by rounding alone."""
TINY_STEP = 0.01
"""In units of the clip: a largest |ratio - 1| below it means that a run would take a hundred times as long as the clip allows."""
LITTLE_ALIVE = 0.05
"""Share of live ratios below which the clip has stopped nearly all learning."""
BELOW_EPS = 0.05
"""Share of gradient elements below 10 eps from which on Adam's step depends on eps."""
NEVER_ACTS = 0.1
"""A gradient's norm, in units of `gradient_clip`, below which that limit protects from nothing."""
JUDGES_NOISE = 0.1
"""A judge's own noise, in units of the group's spread, above which advantages are partly noise."""


def forecast(check: Check, replayed: Replayed) -> Iterator[Finding]:
    """Yield what a run can be expected to learn, from one group and the update that `replayed` is of."""
    for findings in (_spread, _ratios, _gradient):
        yield from findings(check, replayed)
    yield from _noise(check)


def _spread(check: Check, replayed: Replayed) -> Iterator[Finding]:
    predictions = check.judged.group.predictions.double().flatten(2)  # [T, G, D]
    apart = (predictions - predictions.mean(1, keepdim=True)).square().mean((1, 2)).sqrt() / predictions.square().mean((1, 2)).sqrt()
    steps = ", ".join(f"{value:.2g}" for value in apart.tolist())
    holds = apart.max().item() > ALIKE
    remedy = "" if holds else ": they are all the same; raise rollout.noise_strength"
    yield Finding("the candidates' spread", holds, f"by step {steps} of their size{remedy}", forecast=True)


def _ratios(check: Check, replayed: Replayed) -> Iterator[Finding]:
    """Yield how far one step goes, by step of the sampler, and how many ratios the clip leaves alive."""
    clip = ratio_objective(check).settings.clip
    sizes = replayed.ratio_minus_one.abs()
    by_step = _by_step(replayed, sizes)
    if clip is None:
        yield Finding("the step", True, f"without a clip; |ratio - 1| by step up to {_listed(by_step, Tensor.max)}", forecast=True)
        return
    largest, live = sizes.max().item() / clip, replayed.live.double().mean().item() if replayed.live.numel() else 0.0
    tiny = largest < TINY_STEP
    remedy = ": hardly moves the policy; raise optimizer.lr, or lower objective.tau" if tiny else ""
    reach = f"median {_listed(by_step, Tensor.median, clip)}, largest {_listed(by_step, Tensor.max, clip)} of the clip {clip:g}"
    yield Finding("the step", not tiny, f"after one update |ratio - 1| is by step {reach}{remedy}", forecast=True)
    shares = _by_step(replayed, replayed.live.double()) if len(replayed.live) == len(sizes) else [replayed.live.double()]
    stopped = live < LITTLE_ALIVE
    remedy = ": the clip stops nearly all learning; lower optimizer.lr, or raise objective.clip" if stopped else ""
    detail = f"{live:.0%} of the second update's ratios, by step {_listed(shares, Tensor.mean)}{remedy}"
    yield Finding("the live fraction", not stopped, detail, forecast=True)


def _by_step(replayed: Replayed, values: Tensor) -> list[Tensor]:
    """Return the values [N, K] of the samples, split by denoising step."""
    return [values[replayed.steps == step].flatten() for step in replayed.steps.unique()]


def _listed(parts: list[Tensor], statistic: Callable[[Tensor], Tensor], unit: float = 1.0) -> str:
    return ", ".join(f"{statistic(part).item() / unit:.2g}" for part in parts if part.numel())


def _gradient(check: Check, replayed: Replayed) -> Iterator[Finding]:
    settings, statistics = check.trainer.config.optimizer, replayed.statistics
    below = statistics["below_eps"]
    remedy = "" if below < BELOW_EPS else ": Adam shortens their steps; lower optimizer.eps"
    yield Finding("the gradient and eps", below < BELOW_EPS, f"{below:.1%} of its elements lie below 10 eps{remedy}", forecast=True)
    norm, limit = statistics["gradient_norm"], settings.gradient_clip
    detail, holds = f"norm {norm:.2g}", True
    if settings.relative_clip is not None:
        detail += f", limited to {settings.relative_clip:g} times the running norm"
    if limit is not None:
        detail += f", and to {limit:g}"
        holds = settings.relative_clip is not None or norm >= NEVER_ACTS * limit
    remedy = "" if holds else ": it never acts, so one pivot's gradient may drown the others'; set optimizer.relative_clip=1.5"
    yield Finding("the gradient and its limits", holds, detail + remedy, forecast=True)


def _noise(check: Check) -> Iterator[Finding]:
    """Yield each judge's own noise: the same video twice, and in a batch of another size."""
    frames, text = check.frames, check.judged.prompt.text
    for name, weight in check.trainer.config.score_weights.items():
        spread = check.spread(name)
        if not spread > 0:
            if weight:
                remedy = "raise rollout.noise_strength, or take another reward"
                yield Finding(f"the spread of {name}", False, f"is 0 in this group, so there is nothing to learn: {remedy}", forecast=True)
            continue
        with check.at_work(name):
            together = [check.judge(name, frames, [text] * len(frames)) for _ in range(2)]
            alone = [check.judge(name, frame[None], [text]) for frame in frames]
        noise = max((together[0] - scores).abs().max().item() for scores in (together[1], torch.cat(alone)))
        holds = noise < JUDGES_NOISE * spread
        remedy = "" if holds else ": advantages are partly noise; judge in float32 or in batches of one size, or take another reward"
        yield Finding(f"the noise of {name}", holds, f"{noise / spread:.1g} of its spread in the group{remedy}", forecast=True)
