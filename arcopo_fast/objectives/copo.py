"""AR-CoPO: pull the policy's prediction of the pivot chunk towards well-scored candidates (arXiv 2603.17461).

An update draws anchors among a group's candidates, replays their pivot chunk under the present weights and maximises the clipped
surrogate of `arcopo_kernels.surrogate`. The old prediction of an anchor is made by the same replay path under the old weights: for the
first update it is the replay itself, detached, so that the ratio is exactly 1; for later updates one forward without gradient, before
the first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Sequence

import torch
from arcopo_kernels.surrogate import SurrogateOutput, copo_surrogate
from torch import Tensor, nn

from arcopo_fast.rollout.engine import Engine, Group, Stream
from arcopo_fast.rollout.noise import generator
from arcopo_fast.rollout.sampler import Steps, next_input
from arcopo_fast.runtime.profiling import stage


@dataclass(frozen=True)
class CopoSettings:
    """Every open choice of the objective; the recipe says what each means and why its default is what it is."""

    distance: Literal["consistency", "flow_matching"] = "consistency"
    distance_reduction: Literal["mean", "sum"] = "mean"
    tau: float | Literal["auto"] = 1.0
    clip: float | None = 1e-4
    steps: float | Literal["all"] = "all"
    skip_last_step: bool = False
    anchors_per_update: int = 4
    updates: int = 2
    context: Literal["rollout", "recompute"] = "rollout"
    micro_batch: int | None = None
    checkpoint: bool = False


class Items(NamedTuple):
    """The (step, anchor) pairs of one update of one group, [N] each."""

    steps: Tensor
    anchors: Tensor


class RatioNotOne(RuntimeError):
    """Before the first update the ratio was not exactly 1: replay is not reproducible, and training on it would be training on noise."""


def draw_items(settings: CopoSettings, group: Group, update: int) -> Items:
    """Anchors without replacement, each with all its steps (or a random fraction of them), drawn by key."""
    noise = group.noise
    random = generator(noise.seed, noise.iteration, noise.group, "anchors", update)
    anchors = random.choice(group.size, size=min(settings.anchors_per_update, group.size), replace=False)
    available = len(group.steps) - (settings.skip_last_step and len(group.steps) > 1)
    pairs: list[tuple[int, int]] = []
    for anchor in anchors.tolist():
        chosen = list(range(available))
        if settings.steps != "all":
            count = max(1, round(settings.steps * available))
            chosen = sorted(random.choice(available, size=count, replace=False).tolist())
        pairs += [(step, anchor) for step in chosen]
    return Items(*torch.tensor(pairs).unbind(1))


def one_step(clean: Tensor, inputs: Tensor, steps: Steps, step: Tensor) -> Tensor:
    """The state after one first-order solver step from `inputs`, given the prediction `clean`; `step` [N] indexes dimension 0."""
    sigma = torch.tensor(steps.sigmas, device=clean.device)
    following = torch.tensor([steps.next_sigma(index) for index in range(len(steps))], device=clean.device)
    shape = (-1, *[1] * (clean.dim() - 1))
    return next_input("ode", inputs, clean, sigma[step].view(shape), following[step].view(shape), None)


class Target(NamedTuple):
    """What an update needs of its group, computed once: what is compared with what."""

    candidates: Tensor  # [T, G, ...]
    advantages: Tensor  # [G]
    tau: float


class CopoObjective:
    """Runs the policy updates of one iteration."""

    def __init__(self, engine: Engine, settings: CopoSettings) -> None:
        self.engine = engine
        self.settings = settings

    def target(self, group: Group, advantages: Tensor) -> Target:
        """Candidates in the space where distances are taken, and tau (``auto``: the median pairwise distance of the group)."""
        candidates = group.predictions
        if self.settings.distance == "flow_matching":
            index = torch.arange(len(group.steps), device=candidates.device)
            candidates = one_step(candidates, group.inputs, group.steps, index)
        tau = self.settings.tau
        if tau == "auto":
            flat = candidates[0].flatten(1).double()
            first, second = torch.triu_indices(len(flat), len(flat), offset=1).unbind()
            squared = (flat[first] - flat[second]).square()
            distances = squared.mean(1) if self.settings.distance_reduction == "mean" else squared.sum(1)
            tau = distances.median().item()
        return Target(candidates, advantages.to(candidates.device), tau)

    def predict(self, group: Group, items: Items, prefix: Stream | None) -> Tensor:
        """Replay: the prediction (or, for flow matching, the state one solver step on) of each item, [N, F, C, h, w] float32."""
        clean = self.engine.replay(group, items.steps, items.anchors, prefix=prefix, checkpoint=self.settings.checkpoint)
        if self.settings.distance == "flow_matching":
            return one_step(clean, group.inputs[items.steps, items.anchors], group.steps, items.steps)
        return clean

    def loss(self, group: Group, target: Target, items: Items, old: Tensor | None = None, prefix: Stream | None = None) -> SurrogateOutput:
        """The surrogate of each item; `old` None is the first update, whose old prediction is the replay itself."""
        predictions = self.predict(group, items, prefix)
        return copo_surrogate(
            predictions,
            predictions.detach() if old is None else old,
            target.candidates,
            target.advantages,
            items.steps.to(predictions.device),
            tau=target.tau,
            clip=self.settings.clip,
            reduction=self.settings.distance_reduction,
        )

    def update(
        self,
        groups: Sequence[tuple[Group, Tensor]],
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        *,
        gradient_clip: float,
    ) -> dict[str, float]:
        """All policy updates of an iteration over (group, advantages [G]) pairs; returns statistics.

        Groups without variance contribute nothing. If no group has any, no step is taken.

        Raises:
            RatioNotOne: the ratio of the first update was not exactly 1.
        """
        live_groups = [(group, advantages) for group, advantages in groups if advantages.abs().any()]
        statistics: dict[str, list[float]] = {}
        if live_groups:
            targets = [self.target(group, advantages) for group, advantages in live_groups]
            drawn = [[draw_items(self.settings, group, update) for group, _ in live_groups] for update in range(self.settings.updates)]
            # Old predictions of the later updates' fresh anchors: under the old weights, hence before the first step.
            with stage("replay"):
                old: list[list[list[Tensor]]] = [
                    [self._old(group, items) for (group, _), items in zip(live_groups, drawn[update])]
                    for update in range(1, self.settings.updates)
                ]
            for update in range(self.settings.updates):
                optimizer.zero_grad(set_to_none=True)
                with stage("replay"):
                    for index, (group, _) in enumerate(live_groups):
                        known = old[update - 1][index] if update else None
                        self._backward(group, targets[index], drawn[update][index], known, len(live_groups), update, statistics)
                with stage("optimiser"):
                    norm = nn.utils.clip_grad_norm_(parameters, gradient_clip)
                    statistics.setdefault("gradient_norm", []).append(norm.item())
                    optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        means = {name: sum(values) / len(values) for name, values in statistics.items()}
        return means | {"zero_variance_groups": float(len(groups) - len(live_groups))}

    def _micro_batches(self, items: Items) -> list[Items]:
        size = self.settings.micro_batch or len(items.steps)
        return [Items(steps, anchors) for steps, anchors in zip(items.steps.split(size), items.anchors.split(size))]

    def _prefix(self, group: Group) -> Stream | None:
        """The context of a replay: the rollout's (None), or recomputed from its latents under the present weights."""
        if self.settings.context == "rollout":
            return None
        with torch.no_grad():
            return self.engine.rebuild_prefix(group.text, group.latents[: group.pivot])

    @torch.no_grad()
    def _old(self, group: Group, items: Items) -> list[Tensor]:
        """Predictions of the items under the present weights, in the micro-batches of the update."""
        prefix = self._prefix(group)
        try:
            return [self.predict(group, part, prefix) for part in self._micro_batches(items)]
        finally:
            if prefix is not None:
                prefix.cache.release()

    def _backward(
        self,
        group: Group,
        target: Target,
        items: Items,
        old: list[Tensor] | None,
        groups: int,
        update: int,
        statistics: dict[str, list[float]],
    ) -> None:
        """Accumulate the gradient of one group's share of the loss, micro-batch by micro-batch."""
        prefix = self._prefix(group)
        try:
            for index, part in enumerate(self._micro_batches(items)):
                loss, ratio_minus_one, live = self.loss(group, target, part, old[index] if old else None, prefix)
                if update == 0 and ratio_minus_one.any():
                    worst = ratio_minus_one.abs().max().item()
                    raise RatioNotOne(f"before the first update |ratio - 1| reached {worst:.3g}; it must be exactly 0")
                (loss.sum() / (len(items.steps) * groups)).backward()
                self._record(statistics, update, ratio_minus_one, live[:, target.advantages != 0])
        finally:
            if prefix is not None:
                prefix.cache.release()

    def _record(self, statistics: dict[str, list[float]], update: int, ratio_minus_one: Tensor, live: Tensor) -> None:
        """Ratio and clip statistics by update: of the first, the ratio is 1; how the later ones differ shows how far a step went."""
        radius = self.settings.clip or float("inf")
        for name, value in {
            "ratio_max": ratio_minus_one.abs().max(),
            "ratio_std": ratio_minus_one.std(),
            "outside_clip": (ratio_minus_one.abs() > radius).double().mean(),
            "live": live.double().mean(),
        }.items():
            statistics.setdefault(f"update{update + 1}/{name}", []).append(value.item())
