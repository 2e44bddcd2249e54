"""Does the method hold on this machine, with this generator, these rewards? What must be true of any run, tried on one small group.

A run whose reward does not rise has either a bug or a recipe that does not suit it. These checks are of the first kind: they use the
recipe's generator, sizes, kernels and rewards, and the very parts that training consists of. Nothing is written, nothing is kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from arcopo_fast.config import Config
from arcopo_fast.groups import JudgedGroup, Rollouts
from arcopo_fast.model.lora import adapter_disabled, adapter_state, load_adapter_state
from arcopo_fast.model.sizes import VAESizes
from arcopo_fast.objectives.base import Items, RatioNotOne
from arcopo_fast.objectives.optimizer import GradientNotFinite, Stepper
from arcopo_fast.rewards.base import score
from arcopo_fast.rollout.decode import decode_branches
from arcopo_fast.runtime.memory import resident
from arcopo_fast.train import Trainer

MEMBERS, ANCHORS = 4, 2
LARGER_STEPS = (1, 10, 100)
"""Times the recipe's learning rate: in half precision one small step may lie below what a prediction can show."""
SAME_SCORE = 1e-3
"""Relative to the spread in the group: a score that moves more when other videos stand beside it is no score of the video."""


class Finding(NamedTuple):
    """well: None for a remark."""

    what: str
    well: bool | None
    detail: str


@dataclass
class Check:
    """What all checks are made on."""

    trainer: Trainer
    judged: JudgedGroup
    frames: Tensor
    advantages: Tensor


def small(config: Config) -> Config:
    """The recipe with a group, an update and an evaluation as small as they can be; sizes, kernels and precision are its own."""
    rollout = config.rollout.model_copy(
        update={
            "group_size": min(config.rollout.group_size, MEMBERS),
            "prompts_per_iteration": 1,
            "pivot": config.rollout.pivot if isinstance(config.rollout.pivot, int) else (config.video.count + 1) // 2,
        }
    )
    objective = config.objective.model_copy(update={"anchors_per_update": min(config.objective.anchors_per_update, ANCHORS), "updates": 1})
    train = config.train.model_copy(update={"mode": "on_policy", "buffer": None, "iterations": 1})
    return config.model_copy(update={"rollout": rollout, "objective": objective, "train": train})


def self_test(config: Config) -> Iterator[Finding]:
    """Findings, one after the other, as they come.

    Raises:
        UserError: the recipe cannot be used.
    """
    trainer = Trainer(small(config))
    assert isinstance(trainer.source, Rollouts)
    began = time.monotonic()
    group, prompt = trainer.source.rollout(1, 0)
    with group:
        decoder, offload = trainer.generator.decoder, config.generator.offload
        with resident(trainer.generator.model.device, decoder.vae, offload=offload), torch.no_grad():
            frames = next(decode_branches(decoder, group.latents, group.pivot, 2))
        rewards = trainer.source.judge(group, prompt)
        judged = JudgedGroup(group, prompt, rewards)
        advantages = trainer.advantages(judged)
        forked = f"{group.size} members that fork at chunk {group.pivot + 1} of {trainer.shape.chunks}"
        yield Finding("a group", None, f"{forked}, made and judged in {time.monotonic() - began:.1f} s")
        if not advantages.abs().any():  # the checks of the update need something to learn
            advantages = torch.linspace(-1, 1, group.size, dtype=torch.float64)
        check = Check(trainer, judged, frames, advantages)
        for one in (_shared_frames, _fresh_adapter, _replay, _rewards, _update):
            yield from one(check)


def _shared_frames(check: Check) -> Iterator[Finding]:
    """Members show the same until the pivot, and not after it."""
    trainer, group, frames = check.trainer, check.judged.group, check.frames
    sizes = VAESizes.from_config(trainer.generator.decoder.vae.config)
    before = sum(trainer.shape.chunk_frames[: group.pivot])
    cut = sizes.pixel_frames(before) if before else 0
    expected = sizes.pixel_frames(trainer.shape.frames)
    inside = bool(frames.isfinite().all()) and frames.min().item() >= 0 and frames.max().item() <= 1
    said = f"{frames.shape[1]} of {expected}, from {frames.min():.2f} to {frames.max():.2f}"
    yield Finding("frames", inside and frames.shape[1] == expected, said)
    if cut:
        same = bool(torch.equal(frames[0, :cut], frames[1, :cut]))
        yield Finding("the shared context", same, f"the first {cut} frames of two members are equal")
    different = (frames[0, cut:] - frames[1, cut:]).square().mean().sqrt().item()
    yield Finding("the perturbed noise", different > 0, f"from there on two members differ by {different:.3g} (root mean square of pixels)")


@torch.no_grad()
def _fresh_adapter(check: Check) -> Iterator[Finding]:
    """A new adapter adds exactly nothing."""
    items = _items(check)
    ours = torch.cat(_predict(check, items))
    with adapter_disabled(check.trainer.generator.model):
        base = torch.cat(_predict(check, items))
    yield Finding("a new adapter", bool(torch.equal(ours, base)), "predictions with it are those without it, bit for bit")


@torch.no_grad()
def _replay(check: Check) -> Iterator[Finding]:
    """The replay predicts what the rollout did, and twice the same."""
    group, items = check.judged.group, _items(check)

    def replay() -> Tensor:
        parts = _micro_batches(check, items)
        return torch.cat([check.trainer.engine.replay(group, part.steps, part.anchors) for part in parts])

    ours, theirs = replay(), group.predictions[items.steps, items.anchors]
    apart = ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()
    largest = 1e-4 if check.trainer.generator.model.dtype == torch.float32 else 0.05
    said = "bit for bit" if apart == 0 else f"within {apart:.1g} of their size, from batches of another shape; the ratio never sees that"
    yield Finding("the replay", apart <= largest, f"gives back the rollout's predictions {said}")
    yield Finding("its repetition", bool(torch.equal(ours, replay())), "the same predictions again, bit for bit")


def _rewards(check: Check) -> Iterator[Finding]:
    """Each video's score is its own: it repeats, and other videos beside it do not change it."""
    trainer, frames, prompt = check.trainer, check.frames, check.judged.prompt.text
    for name, reward in trainer.rewards.items():
        of_group = check.judged.rewards[name]
        spread = of_group[of_group.isfinite()].double().std(correction=0).item() if of_group.isfinite().any() else float("nan")

        began = time.monotonic()
        with resident(trainer.generator.model.device, reward, offload=trainer.config.generator.offload):
            first, other = (score({name: reward}, videos, [prompt] * 2, quarantine=True)[name].cpu() for videos in (frames, frames.flip(0)))
        seconds = (time.monotonic() - began) / 4
        apart = (other.flip(0) - first).abs().max().item()
        well = bool(first.isfinite().all()) and apart <= max(SAME_SCORE * spread, 1e-6)
        said = f"{of_group.mean():.3g} on average, spread in the group {spread:.2g}; in another order within {apart:.1g}"
        yield Finding(f"reward {name}", well, f"{said}; {seconds:.2f} s a video")
        if not spread > 0:
            yield Finding(f"reward {name}", None, "does not tell the members apart: raise rollout.noise_strength, or take another reward")


def _update(check: Check) -> Iterator[Finding]:
    """The ratio is 1 before the first step, and a step raises what it shall raise."""
    trainer, objective, group = check.trainer, check.trainer.objective, check.judged.group
    start = {name: tensor.clone() for name, tensor in adapter_state(trainer.generator.model).items()}
    target, items = objective.target(group, check.advantages), objective.draw_items(group, 0)
    before = _surrogate(check, target, items, None)
    for factor in LARGER_STEPS:
        load_adapter_state(trainer.generator.model, start)
        optimizer = torch.optim.AdamW(trainer.parameters, lr=factor * trainer.config.optimizer.lr, betas=trainer.config.optimizer.betas)
        try:
            statistics = objective.update([(group, check.advantages)], Stepper(optimizer, eps=trainer.config.optimizer.eps))
        except RatioNotOne as error:
            yield Finding("the ratio", False, str(error))
            return
        except GradientNotFinite as error:
            yield Finding("the gradient", False, str(error))
            return
        if factor == 1:
            yield Finding("the ratio", statistics["update1/ratio_max"] == 0, "exactly 1 before the first update")
            norm = statistics["gradient_norm"]
            yield Finding("the gradient", norm > 0, f"of the adapter: norm {norm:.3g}")
        after = _surrogate(check, target, items, before.predictions)
        rose = before.loss - after.loss
        if rose > 0:
            break
    step = "one update" if factor == 1 else f"one update at {factor} times the learning rate"
    moved = f"; |ratio - 1| up to {after.ratio:.2g}" + (f", clip {objective.settings.clip:g}" if objective.settings.clip else "")
    yield Finding("the objective", rose > 0, f"{step} changes it by {rose:+.2g} on the members it saw{moved}")


class _Surrogate(NamedTuple):
    loss: float
    ratio: float
    predictions: Tensor


@torch.no_grad()
def _surrogate(check: Check, target: object, items: Items, old: Tensor | None) -> _Surrogate:
    """The mean loss of items under the present weights; old None: the old policy is the present one."""
    objective, group, parts = check.trainer.objective, check.judged.group, _micro_batches(check, items)
    new = _predict(check, items)
    known = new if old is None else old.split([len(part.steps) for part in parts])
    outcomes = [objective.loss(group, target, part, now, then) for part, now, then in zip(parts, new, known)]
    loss = torch.cat([outcome.loss for outcome in outcomes]).double().mean().item()
    return _Surrogate(loss, max(outcome.ratio_minus_one.abs().max().item() for outcome in outcomes), torch.cat(new))


def _items(check: Check) -> Items:
    """Every step of one member."""
    steps = check.trainer.objective.trainable_steps(check.judged.group)
    return Items(torch.arange(steps), torch.zeros(steps, dtype=torch.long))


def _micro_batches(check: Check, items: Items) -> list[Items]:
    """As many at once as in training."""
    size = check.trainer.objective.settings.micro_batch or len(items.steps)
    return [Items(*part) for part in zip(items.steps.split(size), items.anchors.split(size))]


def _predict(check: Check, items: Items) -> list[Tensor]:
    """By micro-batch."""
    return [check.trainer.objective.predict(check.judged.group, part, None) for part in _micro_batches(check, items)]
