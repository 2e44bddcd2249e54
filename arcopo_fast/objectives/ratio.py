"""The common part of the methods that maximize a clipped ratio of the new policy to the old one: AR-CoPO, SDE-GRPO, Neighbor GRPO.

They replay the pivot chunk of some members, the anchors, and the later chunks in which members have noises of their own, if there are any,
at some of the sampler's steps, from the inputs that the rollout had there. Before the first update new and old policy are the same, so the
ratio is exactly 1; this is asserted at run time.

Where the old policy is the one that made the group (on-policy), it is a copy of the live adapter that is taken before the iteration's first
step. In the first update it is the live one, and its prediction is the replay itself, detached. Where groups come from a buffer
(semi-on-policy and off-policy), the old policy is the generator without its adapter; its predictions are made once for each (step, anchor)
pair and kept on the host, with the rounding of the micro-batch that the pair was first met in.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from arcopo_fast.config.sections import ObjectiveSettings, Positive, PositiveFloat
from arcopo_fast.objectives.base import Loss, Objective
from arcopo_fast.rollout.noise import keyed_rng
from arcopo_fast.storage.metrics import Chart

if TYPE_CHECKING:
    from arcopo_fast.rollout.engine import Engine
    from arcopo_fast.rollout.group import Group, Samples
    from arcopo_fast.rollout.sampler import Steps
    from arcopo_fast.rollout.stream import Stream


class RatioSettings(ObjectiveSettings):
    """Settings of the ratio, its clip, and the (anchor, step) pairs that are trained."""

    clip: PositiveFloat | None = Field(1e-4, description="eps in clip(rho, 1 - eps, 1 + eps); null: no clipping")
    steps: Annotated[float, Field(gt=0, le=1)] | Literal["all"] = Field(
        "all", description="denoising steps that are trained: all, or a random fraction of them"
    )
    skip_last_step: bool = Field(False, description="never train the last denoising step")
    anchors_per_update: Positive = Field(4, description="A, the candidates that one update replays, drawn without replacement")
    anchors: Literal["fresh", "same", "split"] = Field(
        "fresh",
        description="fresh: A new anchors for each update of an iteration; same: the same A for all; split: A for all together",
    )
    old_prediction: Literal["replay"] = Field("replay", description="the replay path makes the old prediction, with the old weights")

    @model_validator(mode="after")
    def _anchors_for_each_update(self) -> RatioSettings:
        if self.anchors == "split" and self.anchors_per_update < self.updates:
            raise ValueError(
                f"objective.anchors split divides objective.anchors_per_update {self.anchors_per_update} anchors among objective.updates "
                f"{self.updates}: give at least one for each update"
            )
        return self

    def check_group(self, size: int) -> None:
        """Raise `ValueError` if a group of `size` members has too few for the anchors of one update."""
        if self.anchors_per_update > size:
            raise ValueError(
                f"objective.anchors_per_update {self.anchors_per_update} is more than rollout.group_size {size}: "
                "anchors are drawn without replacement"
            )

    def off_policy(self) -> RatioSettings:
        """Return the settings of off-policy training, which has no clip."""
        return self.model_copy(update={"clip": None})

    @property
    def largest_update(self) -> int:
        """Most anchors that one update replays."""
        return -(-self.anchors_per_update // self.updates) if self.anchors == "split" else self.anchors_per_update


S = TypeVar("S", bound=RatioSettings)


class Items(NamedTuple):
    """The (step, anchor) pairs of one update of one group.

    Attributes:
        steps: of the sampler, [N] int64.
        anchors: members of the group, [N] int64.
    """

    steps: Tensor
    anchors: Tensor


class Ratio(NamedTuple):
    """The loss of N samples and the K ratios that each depends on.

    Attributes:
        loss: [N], with gradient.
        ratio_minus_one: [N, K] float64.
        live: [N, K] bool, for the ratios whose advantage is not 0: the clip lets a gradient through.
    """

    loss: Tensor
    ratio_minus_one: Tensor
    live: Tensor


class RatioNotOne(RuntimeError):
    """The ratio was not exactly 1 before the first update: replay is not reproducible, and training on it would be training on noise."""


class RatioObjective(Objective[S]):
    """An objective that compares the live policy with the old one by a clipped ratio."""

    def __init__(self, engine: Engine, settings: S, *, reference: bool = False) -> None:
        super().__init__(engine, settings, reference=reference)
        self._kept: dict[
            tuple[Any, ...], Tensor
        ] = {}  # the reference's predictions of (group, chunk, step, anchor), [F, C, h, w] on the host
        self._kept_from: dict[str, Any] = {}  # the micro-batches that they were made in

    # What a ratio method decides

    def trainable_steps(self, steps: Steps) -> int:
        """Return how many of a chunk's denoising steps, from the first on, can be trained."""
        return len(steps)

    @abstractmethod
    def ratio(self, group: Group, target: Any, samples: Samples, new: Tensor, old: Tensor) -> Ratio:
        """Return loss and ratio of each sample, given x0hat under the new policy, with gradient, and under the old one."""

    # Common to all ratio methods

    def compared(self) -> tuple[str, ...]:
        """Return the policy that made the group, which is the old one."""
        return (self.maker,)

    def samples(self, group: Group, update: int, draw: tuple[int | str, ...] = ()) -> list[Samples]:
        """Return the explored chunks' anchors of one update, the same members in each, at their steps."""
        return [group.samples(*self.draw_items(group, update, draw, chunk), chunk) for chunk in group.explored]

    def draw_items(self, group: Group, update: int, draw: tuple[int | str, ...] = (), chunk: int | None = None) -> Items:
        """Draw the anchors of one update by key, without replacement, each with all its steps (or a random fraction of them).

        `settings.anchors` says how those of an iteration's updates belong together: see there.

        Args:
            chunk: an explored one, whose steps are drawn; None: the pivot.
        """
        chunk = group.pivot if chunk is None else chunk
        settings = self.settings
        drawn_for = update if settings.anchors == "fresh" else 0
        random = keyed_rng(*group.key, *draw, "anchors", drawn_for)
        anchors = random.choice(group.size, size=min(settings.anchors_per_update, group.size), replace=False)
        if chunk != group.pivot:
            random = keyed_rng(*group.key, *draw, "steps", drawn_for, chunk)
        steps = group.explored[chunk].steps
        available = min(self.trainable_steps(steps), max(1, len(steps) - settings.skip_last_step))
        pairs: list[tuple[int, int]] = []
        for index, anchor in enumerate(anchors.tolist()):
            chosen = list(range(available))
            if settings.steps != "all":
                count = max(1, round(settings.steps * available))
                chosen = sorted(random.choice(available, size=count, replace=False).tolist())
            if settings.anchors != "split" or index % settings.updates == update:
                pairs += [(step, anchor) for step in chosen]
        return Items(*torch.tensor(pairs).unbind(1))

    def predict_known(self, policy: str, group: Group, samples: Samples, context: Stream) -> Tensor:
        if policy != "reference" or self.engine.model.ranks > 1:  # ranks that know other predictions would make other passes
            return super().predict_known(policy, group, samples, context)
        if self._kept_from != self.batching.state():  # other micro-batches round differently
            self._kept.clear()
            self._kept_from = self.batching.state()
        assert samples.steps is not None
        names = [(group.key, samples.chunk, *pair) for pair in zip(samples.steps.tolist(), samples.members.tolist())]
        if any(name not in self._kept for name in names):
            for name, prediction in zip(names, super().predict_known(policy, group, samples, context)):
                self._kept.setdefault(name, prediction.cpu())
        return torch.stack([self._kept[name] for name in names]).to(self.engine.model.device)

    def loss(self, group: Group, target: Any, samples: Samples, new: Tensor, compared: Mapping[str, Tensor]) -> Loss:
        """Return the loss, with ratio - 1 and `live` as its statistics."""
        loss, ratio_minus_one, live = self.ratio(group, target, samples, new, compared[self.maker])
        return Loss(loss, {"ratio_minus_one": ratio_minus_one, "live": live})

    def check_unmoved(self, statistics: Mapping[str, Tensor]) -> None:
        """Raise `RatioNotOne` unless every ratio is exactly 1."""
        if statistics["ratio_minus_one"].any():
            worst = statistics["ratio_minus_one"].abs().max().item()
            raise RatioNotOne(f"before the first update |ratio - 1| reached {worst:.3g}; it must be exactly 0")

    def summary(self, statistics: Mapping[str, Tensor]) -> dict[str, float]:
        """Return ratio and clip statistics: in the first update the ratio is 1; how the later ones differ shows how far a step went."""
        ratio_minus_one, live = statistics["ratio_minus_one"], statistics["live"]
        recorded = {
            "ratio_max": ratio_minus_one.abs().max(),
            "ratio_std": ratio_minus_one.std(correction=0),
            "outside_clip": (ratio_minus_one.abs() > (self.settings.clip or float("inf"))).double().mean(),
        }
        if live.numel():  # none where the drawn members all have an advantage of exactly 0
            recorded["live"] = live.double().mean()
        return {name: value.item() for name, value in recorded.items()}

    def headline(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Return the live fraction of the last update."""
        return {"live": record.get(f"update{self.settings.updates}/live", 0.0)}

    @classmethod
    def charts(cls, settings: Any) -> tuple[Chart, ...]:
        clipped = Chart("Ratios outside the clip", "Share of |ratio − 1| above the clip.", "outside_clip", each_update=True)
        return (
            Chart(
                "Live fraction",
                "Share of candidates whose gradient the clip lets through. 0: the update has stopped learning.",
                "live",
                each_update=True,
            ),
            *([clipped] if settings.clip is not None else []),  # without a clip nothing lies outside it
            Chart(
                "Largest |ratio − 1|",
                "How far an update moved the policy. On-policy, it is exactly 0 in the first update.",
                "ratio_max",
                each_update=True,
            ),
            Chart(
                "Spread of the ratios",
                "Standard deviation of ratio − 1 over anchors, steps and candidates.",
                "ratio_std",
                each_update=True,
            ),
        )

    @classmethod
    def samples_per_update(cls, settings: Any, steps: int, group_size: int) -> int:
        available = steps - (settings.skip_last_step and steps > 1)
        chosen = available if settings.steps == "all" else max(1, round(settings.steps * available))
        return settings.largest_update * chosen
