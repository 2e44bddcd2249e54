"""What an objective is, and the policy updates that all of them share.

An objective says how the members of a group differ (`noise_strength`, `kernel`), what is compared (`target`, `predict`) and the loss. The
update is the same for all: draw members, replay their pivot chunk under the present weights, compare with the old policy's replay of
the same members, step. Before the first update new and old are the same, so the ratio is exactly 1; this is asserted at run time.

Where the old policy is the one that made the group (on-policy), its prediction is the replay itself, detached, in the first update, and one
forward without gradient before the first step in later ones. Where it is a fixed reference policy (semi-on-policy and off-policy: groups
from a buffer), it is the generator without its adapter; its predictions are made once for each member and kept.

An update that runs out of memory is computed again, from no gradient on, in micro-batches of half the size, and at last with checkpointing;
so it is for the rest of the run. Before the iteration's first step this makes the old policy's predictions anew too, and everything is bit
for bit what these settings give from the start. In a later update the old weights are gone, and its old predictions keep the rounding of
the larger micro-batch.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, ClassVar, Generic, NamedTuple, Sequence, TypeVar

import torch
from torch import Tensor

from arcopo_fast.config.schema import ObjectiveSettings
from arcopo_fast.errors import UserError
from arcopo_fast.model.lora import adapter_disabled
from arcopo_fast.objectives.optimizer import GradientNotFinite, Stepper
from arcopo_fast.rollout.noise import generator
from arcopo_fast.rollout.sampler import Kernel
from arcopo_fast.runtime.profiling import stage

if TYPE_CHECKING:  # reading a recipe imports its objective, and needs no engine
    from arcopo_fast.rollout.engine import Engine, Group, Stream

S = TypeVar("S", bound=ObjectiveSettings)
R = TypeVar("R")


class Items(NamedTuple):
    """The (step, anchor) pairs of one update of one group, [N] each."""

    steps: Tensor
    anchors: Tensor


class Outcome(NamedTuple):
    """Of each item: loss [N] with gradient; ratio_minus_one [N, K] float64 and live [N, K] of the K ratios it depends on.

    live: the clip lets a gradient through, and the advantage is not 0.
    """

    loss: Tensor
    ratio_minus_one: Tensor
    live: Tensor


@dataclass
class _Lesson:
    """What an iteration's updates learn from one group: the items of each update, and the old policy's predictions of them.

    old: [N, F, C, h, w] by update; None where they are the replay itself, detached.
    """

    group: Group
    target: Any
    items: list[Items]
    old: list[Tensor | None] = field(default_factory=list)


class RatioNotOne(RuntimeError):
    """Before the first update the ratio was not exactly 1: replay is not reproducible, and training on it would be training on noise."""


class Objective(ABC, Generic[S]):
    """Runs the policy updates of one iteration.

    Args:
        engine: of the generator that learns.
        settings: of the class `Settings`.
        reference: the old policy is the generator without its adapter, not the one before the iteration's first update.
    """

    Settings: ClassVar[type[ObjectiveSettings]]

    def __init__(self, engine: Engine, settings: S, *, reference: bool = False) -> None:
        self.engine = engine
        self.settings = settings
        self.reference = reference
        self.moved = False  # has the policy left the reference? A continued run sets this.
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    # What an objective says

    def noise_strength(self, strength: float) -> float:
        """sigma of the members' initial noises, given the recipe's `rollout.noise_strength`: 0 shared, 1 a fresh one for each."""
        return strength

    @property
    def kernel(self) -> Kernel | None:
        """Through which each member draws noise of its own at the steps of the pivot chunk; None: the steps' noise is shared."""
        return None

    def trainable_steps(self, group: Group) -> int:
        """The first so many denoising steps can be trained."""
        return len(group.steps)

    @abstractmethod
    def target(self, group: Group, advantages: Tensor) -> Any:
        """What `loss` needs of a group with advantages [G], computed once for all its updates."""

    @abstractmethod
    def predict(self, group: Group, items: Items, prefix: Stream | None) -> Tensor:
        """What is compared between new and old policy, [N, F, C, h, w]; from `engine.replay`."""

    @abstractmethod
    def loss(self, group: Group, target: Any, items: Items, new: Tensor, old: Tensor) -> Outcome:
        """The loss of each item, given `predict` under the new policy (with gradient) and under the old one."""

    # What all of them do

    def update(
        self,
        groups: Sequence[tuple[Group, Tensor]],
        stepper: Stepper,
        *,
        draw: tuple[int | str, ...] = (),
    ) -> dict[str, float]:
        """Do all policy updates of an iteration over (group, advantages [G]) pairs; return statistics.

        Groups without variance contribute nothing. If no group has any, or the gradient is exactly zero, no step is taken.

        Args:
            draw: goes into the name of the draw of anchors: a group out of a buffer is met again, with other anchors.

        Raises:
            RatioNotOne: the ratio before the first update was not exactly 1.
            GradientNotFinite: the step of that update and those after it were not taken.
            UserError: not even one pair at a time, with checkpointing, fits the device's memory.
        """
        settings, statistics = self.settings, dict[str, list[float]]()
        lessons = [
            _Lesson(group, self.target(group, advantages), [self.draw_items(group, update, draw) for update in range(settings.updates)])
            for group, advantages in groups
            if advantages.abs().any()
        ]
        pairs = max((len(items.steps) for lesson in lessons for items in lesson.items), default=0)
        for update in range(settings.updates if lessons else 0):
            with stage("replay"):
                ratios = self._until_it_fits(partial(self._gradient, lessons, update, stepper.optimizer), pairs)
            for ratio_minus_one, live in ratios:
                self._record(statistics, update, ratio_minus_one, live)
            with stage("optimiser"):
                try:
                    step = stepper.take()
                except GradientNotFinite as error:
                    raise GradientNotFinite(
                        f"the gradient of update {update + 1} of {settings.updates} {error}: no step was taken; a smaller "
                        "optimizer.lr, or generator.dtype=float32, tells whether the weights had gone too far or a number was too large"
                    ) from None
            self.moved |= step.taken
            logged = {"gradient_norm": step.norm, "clipped": step.clipped, "below_eps": step.below_eps, "steps": step.taken}
            for name, value in logged.items():
                statistics.setdefault(name, []).append(float(value))
        stepper.optimizer.zero_grad(set_to_none=True)
        means = {name: sum(values) / len(values) for name, values in statistics.items()}
        means["steps"] = sum(statistics.get("steps", []), 0.0)
        return means | {"zero_variance_groups": float(len(groups) - len(lessons))}

    def draw_items(self, group: Group, update: int, draw: tuple[int | str, ...] = ()) -> Items:
        """Draw the anchors of one update by key, without replacement, each with all its steps (or a random fraction of them).

        `settings.anchors` says how those of an iteration's updates belong together: see there.
        """
        settings, noise = self.settings, group.noise
        drawn_for = update if settings.anchors == "fresh" else 0
        random = generator(noise.seed, noise.iteration, noise.group, *draw, "anchors", drawn_for)
        anchors = random.choice(group.size, size=min(settings.anchors_per_update, group.size), replace=False)
        available = min(self.trainable_steps(group), max(1, len(group.steps) - settings.skip_last_step))
        pairs: list[tuple[int, int]] = []
        for place, anchor in enumerate(anchors.tolist()):
            chosen = list(range(available))
            if settings.steps != "all":
                count = max(1, round(settings.steps * available))
                chosen = sorted(random.choice(available, size=count, replace=False).tolist())
            if settings.anchors != "split" or place % settings.updates == update:
                pairs += [(step, anchor) for step in chosen]
        return Items(*torch.tensor(pairs).unbind(1))

    def _until_it_fits(self, attempt: Callable[[], R], pairs: int) -> R:
        """What `attempt` returns. Where it runs out of memory it starts again with settings that need less, and they stay.

        Args:
            pairs: the most that can be in a micro-batch.
        """
        before, reason = self.settings, ""
        while True:
            try:
                result = attempt()
                break
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
            # Out here the error is gone, and with it the frames that held the activations.
            self.settings = self._less_memory(min(self.settings.micro_batch or pairs, pairs), reason)
            self._kept.clear()  # made in larger micro-batches, which round differently
            if self.engine.model.device.type == "cuda":
                torch.cuda.empty_cache()
        if self.settings is not before:
            keys = [key for key in ("micro_batch", "checkpoint") if getattr(self.settings, key) != getattr(before, key)]
            values = " ".join(f"objective.{key}={str(getattr(self.settings, key)).lower()}" for key in keys)
            warnings.warn(f"the replay ran out of memory ({reason}); going on with {values}: set it", stacklevel=3)
        return result

    def _less_memory(self, size: int, reason: str) -> S:
        """The settings with micro-batches of half of `size`, then with checkpointing."""
        if size > 1:
            return self.settings.model_copy(update={"micro_batch": (size + 1) // 2})
        if not self.settings.checkpoint:
            return self.settings.model_copy(update={"checkpoint": True})
        raise UserError(
            f"the replay of one (anchor, step) pair, with checkpointing, ran out of memory ({reason}); rollout.branches_per_wave=1 and "
            "generator.offload=true leave it most, else take a smaller video: train --dry-run prints what fits"
        )

    def _gradient(self, lessons: Sequence[_Lesson], update: int, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
        """The gradient of one update, from none on; returns ratio - 1 [N, K] and `live` [N, K] of each group."""
        optimizer.zero_grad(set_to_none=True)
        if update == 0:  # under the old weights, hence before the first step
            for lesson in lessons:
                lesson.old = [self._old(lesson.group, items, later) for later, items in enumerate(lesson.items)]
        return [self._backward(lesson, update, len(lessons)) for lesson in lessons]

    def _micro_batches(self, items: Items) -> list[Items]:
        size = self.settings.micro_batch or len(items.steps)
        return [Items(steps, anchors) for steps, anchors in zip(items.steps.split(size), items.anchors.split(size))]

    def _prefix(self, group: Group) -> Stream | None:
        """The context of a replay: the rollout's (None), or recomputed from its latents under the present weights."""
        if self.settings.context == "rollout":
            return None
        with torch.no_grad():
            return self.engine.rebuild_prefix(group.text, group.latents[: group.pivot])

    def _old_policy(self) -> AbstractContextManager[None]:
        return adapter_disabled(self.engine.model) if self.reference else nullcontext()

    @torch.no_grad()
    def _old(self, group: Group, items: Items, update: int) -> Tensor | None:
        """The old policy's predictions of the items [N, F, C, h, w]; None where they are the replay itself, detached."""
        if not self.reference and update == 0:
            return None
        with self._old_policy():
            prefix = self._prefix(group)
            try:
                return torch.cat([self._known(group, part, prefix) for part in self._micro_batches(items)])
            finally:
                if prefix is not None:
                    prefix.cache.release()

    def _known(self, group: Group, items: Items, prefix: Stream | None) -> Tensor:
        """`predict`; of a reference policy, which never changes, once for each item: kept on the host, with the rounding of the
        micro-batch that it was first met in."""
        if not self.reference:
            return self.predict(group, items, prefix)
        noise = group.noise
        names = [(noise.seed, noise.iteration, noise.group, *pair) for pair in zip(items.steps.tolist(), items.anchors.tolist())]
        if any(name not in self._kept for name in names):
            for name, prediction in zip(names, self.predict(group, items, prefix)):
                self._kept.setdefault(name, prediction.cpu())
        return torch.stack([self._kept[name] for name in names]).to(self.engine.model.device)

    def _backward(self, lesson: _Lesson, update: int, groups: int) -> tuple[Tensor, Tensor]:
        """Accumulate the gradient of one group's share of the loss, micro-batch by micro-batch; returns ratio - 1 and `live`, [N, K]."""
        group, items, old = lesson.group, lesson.items[update], lesson.old[update]
        parts = self._micro_batches(items)
        known: Sequence[Tensor | None] = [None] * len(parts) if old is None else old.split(len(parts[0].steps))
        prefix = self._prefix(group)
        ratios, live = [], []
        try:
            for part, before in zip(parts, known):
                new = self.predict(group, part, prefix)
                outcome = self.loss(group, lesson.target, part, new, new.detach() if before is None else before)
                old_is_new = update == 0 and not (self.reference and self.moved)
                if old_is_new and outcome.ratio_minus_one.any():
                    worst = outcome.ratio_minus_one.abs().max().item()
                    raise RatioNotOne(f"before the first update |ratio - 1| reached {worst:.3g}; it must be exactly 0")
                (outcome.loss.sum() / (len(items.steps) * groups)).backward()
                ratios.append(outcome.ratio_minus_one)
                live.append(outcome.live)
        finally:
            if prefix is not None:
                prefix.cache.release()
        return torch.cat(ratios), torch.cat(live)

    def _record(self, statistics: dict[str, list[float]], update: int, ratio_minus_one: Tensor, live: Tensor) -> None:
        """Ratio and clip statistics by update: of the first, the ratio is 1; how the later ones differ shows how far a step went."""
        radius = self.settings.clip or float("inf")
        recorded = {
            "ratio_max": ratio_minus_one.abs().max(),
            "ratio_std": ratio_minus_one.std(correction=0),
            "outside_clip": (ratio_minus_one.abs() > radius).double().mean(),
        }
        if live.numel():  # none where the drawn members all have an advantage of exactly 0
            recorded["live"] = live.double().mean()
        for name, value in recorded.items():
            statistics.setdefault(f"update{update + 1}/{name}", []).append(value.item())
