"""The contract of an objective.

An objective says, each in one place,

* which noises are a member's own: `noise_plan`;
* which samples (chunk, member, x_t, t) are trained: `samples`; the engine predicts each in the context that it was made in;
* which policies the live one is compared with: `compared`, and when they move: `begin`, `end`; which one makes the groups: `acting`;
* the loss of the samples, with its own statistics and charts: `target`, `loss`, `summary`, `charts`.

The update is the same for all, see `objectives.updates`: draw the samples, predict them under the policies that are compared (without
gradient) and under the live one, take the loss, step. Nothing is kept from one update of an iteration to the next but the policies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from torch import Tensor

from arcopo_fast.config.sections import ObjectiveSettings
from arcopo_fast.objectives.batching import Batching
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.rollout.noise import NoisePlan
from arcopo_fast.storage.metrics import Chart

if TYPE_CHECKING:  # a recipe is read without the engine
    from arcopo_fast.rollout.engine import Engine
    from arcopo_fast.rollout.group import Group, Samples
    from arcopo_fast.rollout.stream import Stream

S = TypeVar("S", bound=ObjectiveSettings)


class Loss(NamedTuple):
    """The loss of N samples.

    Attributes:
        loss: [N], with gradient.
        statistics: [N, ...] by name, without gradient.
    """

    loss: Tensor
    statistics: Mapping[str, Tensor]


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
        self.batching = Batching(settings.micro_batch, settings.checkpoint, divided=engine.model.ranks > 1)

    @property
    def acting(self) -> str:
        """Name of the policy that makes groups."""
        return "live"

    @property
    def maker(self) -> str:
        """Name of the policy that made the groups: the live one as it was before the iteration's first step, the base, or another."""
        return "reference" if self.reference else "rollout" if self.acting == "live" else self.acting

    @property
    def evaluated(self) -> str:
        """Name of the policy that a run evaluates and leaves behind."""
        return "live"

    # What an objective decides

    def noise_plan(self, strength: float) -> NoisePlan:
        """Return the noises that members do not share, given the recipe's `rollout.noise_strength`."""
        return NoisePlan(strength, chunks=self.explored_chunks(self.settings))

    @classmethod
    def explored_chunks(cls, settings: Any) -> int | None:
        """Return the number of chunks, from the pivot on, in which members have noises of their own; None: all that branches make."""
        return 1

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

    @property
    def waits(self) -> bool:
        """Whether the first update, too, waits until all groups of the iteration are judged, see `compare`."""
        return False

    def compare(self, rewards: Mapping[tuple[int | str, ...], Mapping[str, Tensor]]) -> None:
        """Take note of the scores [G] by name of all groups that are learned from, on all ranks, before the first update that waits."""

    def end(self, statistics: Mapping[str, float]) -> Mapping[str, float]:
        """Move policies of its own after the updates of an iteration, given its statistics, the same on all ranks.

        Returns:
            What metrics.jsonl says of them.
        """
        return {}

    @abstractmethod
    def target(self, group: Group, advantages: Tensor) -> Any:
        """Return what `loss` needs of a group with advantages [G]; the same for every update."""

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
        """Return the most samples of a group's chunk that one update trains, for a sampler of `steps` steps; the planner asks."""
        return steps * group_size

    @classmethod
    def states_per_chunk(cls, settings: Any, steps: int) -> int:
        """Return the latents that a group holds of each explored chunk of a member, besides the finished one; the planner asks."""
        return 2 * steps

    @classmethod
    def kept_policies(cls, settings: Any) -> int:
        """Return the copies of the adapter that it holds besides the one that learns; the planner asks."""
        return 1

    # Common to all objectives

    def update(self, groups: Sequence[tuple[Group, Tensor]], stepper: Stepper, *, draw: tuple[int | str, ...] = ()) -> dict[str, float]:
        """Do all policy updates of an iteration over (group, advantages [G]) pairs that are there already; return statistics.

        For what it raises, and for groups that are made one after the other, see `Updates`.
        """
        from arcopo_fast.objectives.updates import Updates

        with Updates(self, stepper, draw=draw) as updates:
            for number, (group, advantages) in enumerate(groups):
                updates.learn(number, group, advantages)
            return updates.finish()

    def predict_known(self, policy: str, group: Group, samples: Samples, context: Stream) -> Tensor:
        """Return x0hat of samples under a policy that is compared, which is in place; an objective may know it already, or not need it."""
        return self.engine.predict(group, samples, context=context)

    # What a checkpoint keeps

    def state_dict(self) -> dict[str, Any]:
        """Return the policies that it keeps from one iteration to the next."""
        return {"policies": self.policies.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.policies.load_state_dict(state.get("policies", {}))
