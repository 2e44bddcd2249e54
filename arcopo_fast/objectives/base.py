"""The contract of an objective, and the policy updates that all of them share.

An objective says, each in one place,

* which noises are a member's own: `noise_plan`;
* which samples (chunk, member, x_t, t) are trained: `samples`; the engine predicts each in the context that it was made in;
* which policies the live one is compared with: `compared`, and when they move: `begin`, `end`;
* the loss of the samples, with its own statistics and charts: `target`, `loss`, `summary`, `charts`.

The update is the same for all: draw the samples, predict them under the policies that are compared (without gradient) and under the live
one, take the loss, step. Nothing is kept from one update of an iteration to the next but the policies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from arcopo_fast.config.schema import ObjectiveSettings
from arcopo_fast.objectives.batching import Batching
from arcopo_fast.objectives.optimizer import GradientNotFinite, Stepper
from arcopo_fast.rollout.noise import NoisePlan
from arcopo_fast.runtime.profiling import stage
from arcopo_fast.storage.metrics import Chart

if TYPE_CHECKING:  # a recipe is read without the engine
    from arcopo_fast.rollout.engine import Engine
    from arcopo_fast.rollout.group import Group, Samples, Stream

S = TypeVar("S", bound=ObjectiveSettings)


class Loss(NamedTuple):
    """The loss of N samples.

    Attributes:
        loss: [N], with gradient.
        statistics: [N, ...] by name, without gradient.
    """

    loss: Tensor
    statistics: Mapping[str, Tensor]


class Lesson(NamedTuple):
    """A group to learn from.

    Attributes:
        group: has a reward that varies.
        target: what `Objective.target` returned for it.
    """

    group: Group
    target: Any


class Objective(ABC, Generic[S]):
    """A method of learning from groups: the policy updates of one iteration.

    Args:
        engine: of the generator that learns.
        settings: of the class `Settings`.
        reference: groups are the base's own, from a buffer, and not the live policy's.
    """

    Settings: ClassVar[type[ObjectiveSettings]]
    method: ClassVar[str] = ""
    """Its name in a model card; empty: its name in the recipe."""

    def __init__(self, engine: Engine, settings: S, *, reference: bool = False) -> None:
        from arcopo_fast.objectives.policies import Policies  # loads the adapters' library, which reading a recipe does not need

        self.engine = engine
        self.settings = settings
        self.reference = reference
        self.policies = Policies(engine.model)
        self.batching = Batching(settings.micro_batch, settings.checkpoint)

    @property
    def maker(self) -> str:
        """Name of the policy that made the groups: the live one as it was before the iteration's first step, or the base."""
        return "reference" if self.reference else "rollout"

    # What an objective decides

    def noise_plan(self, strength: float) -> NoisePlan:
        """Return the noises that members do not share, given the recipe's `rollout.noise_strength`."""
        return NoisePlan(strength)

    @abstractmethod
    def samples(self, group: Group, update: int, draw: tuple[int | str, ...] = ()) -> list[Samples]:
        """Return what update `update` of an iteration trains, chunk by chunk; the same for the same arguments.

        Args:
            draw: extra key of the random draws, so that a buffered group gets new ones each time it is used.
        """

    def compared(self) -> tuple[str, ...]:
        """Return the names of the policies whose predictions `loss` compares the live one's with."""
        return ()

    def begin(self) -> None:
        """Prepare policies of its own for the updates of an iteration."""

    def end(self) -> None:
        """Move policies of its own after the updates of an iteration."""

    @abstractmethod
    def target(self, group: Group, advantages: Tensor) -> Any:
        """Return what `loss` needs of a group with advantages [G], computed once for all its updates."""

    @abstractmethod
    def loss(self, group: Group, target: Any, samples: Samples, new: Tensor, compared: Mapping[str, Tensor]) -> Loss:
        """Return the loss of each sample, given the predictions x0hat [N, F, C, h, w] of the live policy and of the compared ones."""

    def check_unmoved(self, statistics: Mapping[str, Tensor]) -> None:
        """Raise an error if a loss's statistics contradict that the compared policies are the live one, weight by weight."""

    def summary(self, statistics: Mapping[str, Tensor]) -> dict[str, float]:
        """Return what metrics.jsonl says of one group's samples in one update, from their statistics [N, ...]."""
        return {name: values.double().mean().item() for name, values in statistics.items() if values.numel()}

    def headline(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Return the numbers of an iteration that are shown beside its reward while a run goes on, from what metrics.jsonl says of it."""
        return {}

    @classmethod
    def charts(cls, settings: Any) -> tuple[Chart, ...]:
        """Return the charts of its own that a report shows."""
        return ()

    @classmethod
    def samples_per_update(cls, settings: Any, steps: int, group_size: int) -> int:
        """Return the most samples of a group that one update trains, for a sampler of `steps` steps; the planner asks."""
        return steps * group_size

    # Common to all objectives

    def update(
        self,
        groups: Sequence[tuple[Group, Tensor]],
        stepper: Stepper,
        *,
        draw: tuple[int | str, ...] = (),
    ) -> dict[str, float]:
        """Do all policy updates of an iteration over (group, advantages [G]) pairs; return statistics.

        Groups without variance contribute nothing. If no group has any, or the gradient is exactly zero, no step is taken.

        Raises:
            GradientNotFinite: the step of that update and those after it were not taken.
            UserError: not even one sample at a time, with checkpointing, fits the device's memory.
        """
        statistics = dict[str, list[float]]()
        lessons = [Lesson(group, self.target(group, advantages)) for group, advantages in groups if advantages.abs().any()]
        if lessons:
            if not self.reference:
                self.policies.keep("rollout")
            self.begin()
            try:
                for update in range(self.settings.updates):
                    for name, value in self._one_update(lessons, update, stepper, draw):
                        statistics.setdefault(name, []).append(value)
            finally:
                self.policies.drop("rollout")
            self.end()
        stepper.optimizer.zero_grad(set_to_none=True)
        means = {name: sum(values) / len(values) for name, values in statistics.items()}
        means["steps"] = sum(statistics.get("steps", []), 0.0)
        return means | {"zero_variance_groups": float(len(groups) - len(lessons))}

    def _one_update(self, lessons: Sequence[Lesson], update: int, stepper: Stepper, draw: tuple[int | str, ...]) -> list[tuple[str, float]]:
        """Take the gradient of one update and step; return what is logged."""
        trained = [self.samples(lesson.group, update, draw) for lesson in lessons]
        largest = max(len(samples) for chunks in trained for samples in chunks)
        with stage("replay"):
            results = self.batching.until_it_fits(partial(self._gradient, lessons, trained, stepper.optimizer), largest)
        logged = [(f"update{update + 1}/{name}", value) for statistics in results for name, value in self.summary(statistics).items()]
        with stage("optimizer"):
            try:
                step = stepper.take()
            except GradientNotFinite as error:
                raise GradientNotFinite(
                    f"the gradient of update {update + 1} of {self.settings.updates} {error}: no step was taken. Try a smaller "
                    "optimizer.lr, in case the weights have gone too far, or generator.dtype=float32, in case a number was too large"
                ) from None
        about = {"gradient_norm": step.norm, "clipped": step.clipped, "below_eps": step.below_eps, "steps": step.taken}
        return [*logged, *((name, float(value)) for name, value in about.items())]

    def _gradient(
        self, lessons: Sequence[Lesson], trained: Sequence[list[Samples]], optimizer: torch.optim.Optimizer
    ) -> list[dict[str, Tensor]]:
        """Zero the gradients, then accumulate those of one update; return each group's statistics."""
        optimizer.zero_grad(set_to_none=True)
        unmoved = [name for name in self.compared() if self.policies.is_live(name)]
        statistics = []
        for lesson, chunks in zip(lessons, trained):
            weight = 1 / (sum(map(len, chunks)) * len(lessons))
            parts = [part for samples in chunks for part in self._backward(lesson, samples, unmoved, weight)]
            statistics.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        return statistics

    def _backward(self, lesson: Lesson, samples: Samples, unmoved: Sequence[str], weight: float) -> list[Mapping[str, Tensor]]:
        """Accumulate the gradient of one chunk's samples, micro-batch by micro-batch; return the statistics of each."""
        group, parts = lesson.group, self._micro_batches(lesson.group, samples)
        moved = {name: self._predictions(name, group, parts) for name in self.compared() if name == "reference" or name not in unmoved}
        statistics = []
        with self._prefix(group) as prefix:
            for index, part in enumerate(parts):
                with self._context(group, part, prefix) as context:
                    live = self.engine.predict(group, part, context=context, checkpoint=self.batching.checkpoint)
                    compared = {name: moved[name][index] if name in moved else live.detach() for name in self.compared()}
                    loss = self.loss(group, lesson.target, part, live, compared)
                    if unmoved and len(unmoved) == len(compared):
                        self.check_unmoved(loss.statistics)
                    (loss.loss.sum() * weight).backward()
                statistics.append(loss.statistics)
        return statistics

    def _micro_batches(self, group: Group, samples: Samples) -> list[Samples]:
        size = min(self.batching.micro_batch or len(samples), self.engine.at_once(group, samples.chunk) or len(samples))
        return samples.split(size)

    @torch.no_grad()
    def _predictions(self, policy: str, group: Group, parts: Sequence[Samples]) -> list[Tensor]:
        """Return x0hat of each part under a policy that is compared."""
        predictions = []
        with self.policies.as_(policy), self._prefix(group) as prefix:
            for part in parts:
                with self._context(group, part, prefix) as context:
                    predictions.append(self.predict_known(policy, group, part, context))
        return predictions

    def predict_known(self, policy: str, group: Group, samples: Samples, context: Stream) -> Tensor:
        """Return x0hat of samples under a policy that is compared, which is in place; an objective may know it already."""
        return self.engine.predict(group, samples, context=context)

    def _prefix(self, group: Group) -> AbstractContextManager[Stream | None]:
        """Give the context of the pivot chunk: the rollout's (None), or recomputed from its latents under the present weights."""
        return self.engine.recomputed_prefix(group, self.settings.context == "recompute")

    @contextmanager
    def _context(self, group: Group, samples: Samples, prefix: Stream | None) -> Iterator[Stream]:
        """Give the context that samples were made in: what members made of their own is cached anew under the policy that made it."""
        rebuilt = samples.chunk > group.pivot and self.settings.context == "rollout"
        with ExitStack() as stack:
            with self.policies.as_(self.maker) if rebuilt else nullcontext():
                context = stack.enter_context(self.engine.context(group, samples.chunk, samples.members, prefix=prefix))
            yield context

    # What a checkpoint keeps

    def state_dict(self) -> dict[str, Any]:
        """Return the policies that it keeps from one iteration to the next."""
        return {"policies": self.policies.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.policies.load_state_dict(state.get("policies", {}))
