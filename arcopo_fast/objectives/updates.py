"""The policy updates of one iteration, group by group and rank by rank.

A group gives its gradient and lets its keys and values go before the next one is rolled out, so memory is that of one group. Later updates
make its context again from its latents, by the rollout's clean passes under the rollout's policy: the same calls with the same shapes.
Nothing else is kept from one update to the next but the policies.

The gradient of an update is the mean over all groups whose rewards vary, on whatever rank they are. It is summed in float64: in any order
and on any number of ranks it rounds to the same float32 numbers, up to the rare one that lies between two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from arcopo_fast.objectives.optimizer import GradientNotFinite, Stepper
from arcopo_fast.rollout.contexts import Contexts
from arcopo_fast.runtime.distributed import World
from arcopo_fast.runtime.profiling import stage

if TYPE_CHECKING:
    from arcopo_fast.objectives.base import Objective
    from arcopo_fast.rollout.group import Group, Samples
    from arcopo_fast.rollout.stream import Stream


class GradientSum:
    """The sum of the groups' gradients of one update. A single group's is kept as it is; more are added in float64.

    Args:
        parameters: whose `grad` is taken and given.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)
        self._groups = 0

    def add(self) -> None:
        """Take the gradients that lie in the parameters into the sum."""
        self._groups += 1
        for index, parameter in enumerate(self.parameters):
            gradient, parameter.grad = parameter.grad, None
            before = self._sums[index]
            if before is None or gradient is None:
                self._sums[index] = gradient if before is None else before
            else:
                self._sums[index] = before.double().add_(gradient)

    def give(self, world: World, groups: int) -> None:
        """Make the gradients the sum over all ranks, divided by the number of `groups`; the sum is empty again."""
        if not world.alone:
            present = world.gathered([sums is not None for sums in self._sums])
            wanted = [index for index, flags in enumerate(zip(*present)) if any(flags)]
            for index in wanted:
                sums, parameter = self._sums[index], self.parameters[index]
                self._sums[index] = torch.zeros_like(parameter, dtype=torch.float64) if sums is None else sums.double()
            world.sum_([sums for sums in self._sums if sums is not None])
        for parameter, sums in zip(self.parameters, self._sums):
            parameter.grad = None if sums is None else (sums if groups == 1 else sums / groups).to(parameter.dtype)
        self._sums = [None] * len(self.parameters)
        self._groups = 0


class Lesson(NamedTuple):
    """A group to learn from, and what its updates need besides.

    Attributes:
        number: of the group in its iteration.
        group: may be put away.
        advantages: [G] float64.
        counts: a reward of it varies.
        rewards: scores [G] by name.
    """

    number: int
    group: Group
    advantages: Tensor
    counts: bool
    rewards: Mapping[str, Tensor]


class _Statistics(NamedTuple):
    """The statistics of one chunk's samples of a group in one update, of one rank's part of them."""

    update: int
    group: int
    chunk: int
    values: Mapping[str, Tensor]


class Updates:
    """The updates of one iteration.

        with Updates(objective, stepper) as updates:
            for ...:
                updates.learn(number, group, advantages)     the gradient of the first update
                group.put_away()                             where the next one needs the room
            statistics = updates.finish()                    its step, then the later updates

    An objective that compares all groups of the iteration lets the first update wait for `finish`, too.
    Groups stay their owner's, who releases them.

    Args:
        objective, stepper: say what is learned, and take the steps.
        draw: extra key of the random draws, see `Objective.samples`.
        world: all ranks; each has groups of its own.
        team: the ranks that share every group of this one: each trains a part of its samples.

    Where the weights are divided among ranks, all make the same passes: a group without variance is computed, too, and then left out.
    """

    def __init__(
        self,
        objective: Objective[Any],
        stepper: Stepper,
        *,
        draw: tuple[int | str, ...] = (),
        world: World | None = None,
        team: World | None = None,
    ) -> None:
        self.objective, self.stepper, self.draw = objective, stepper, draw
        self.world, self.team = world or World(), team or World()
        self.engine, self.policies, self.batching = objective.engine, objective.policies, objective.batching
        self.sum = GradientSum([parameter for group in stepper.optimizer.param_groups for parameter in group["params"]])
        self.lockstep = self.engine.model.ranks > 1
        self.lessons: list[Lesson] = []
        self.without_variance = 0
        self._statistics: list[_Statistics] = []

    def __enter__(self) -> Updates:
        self.stepper.optimizer.zero_grad(set_to_none=True)
        if self.objective.maker == "rollout":
            self.policies.keep("rollout")
        self.objective.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.policies.drop("rollout")
        self.stepper.optimizer.zero_grad(set_to_none=True)

    def learn(self, number: int, group: Group, advantages: Tensor, rewards: Mapping[str, Tensor] | None = None) -> None:
        """Take a group's gradient for the first update. A group whose members all have the advantage 0 contributes nothing.

        Args:
            number: of the group among those of all ranks; it orders what is logged.
            advantages: [G].
            rewards: scores [G] by name of what is trained on, more is better, for an objective that compares all groups.

        Raises:
            UserError: not even one sample at a time, with checkpointing, fits the device's memory.
        """
        counts = bool(advantages.any())
        self.without_variance += not counts
        if counts or self.lockstep:
            self.lessons.append(Lesson(number, group, advantages, counts, rewards or {}))
            if not self.objective.waits:
                with stage("replay"):
                    self._learn(self.lessons[-1], 0)

    def finish(self) -> dict[str, float]:
        """Do the first update's step and all later updates; return the iteration's statistics, the same on every rank.

        If no group on any rank has variance, or the gradient is exactly zero, no step is taken.

        Raises:
            GradientNotFinite: the step of that update and those after it were not taken.
        """
        leads = self.team.is_main  # of the ranks that share a group one speaks
        groups = round(self.world.total(sum(lesson.counts for lesson in self.lessons) * leads))
        waits, logged = self.objective.waits, dict[str, list[float]]()
        if waits:
            told = {lesson.group.key: lesson.rewards for lesson in self.lessons if lesson.counts and leads}
            everything = {name: rewards for rank in self.world.gathered(told) for name, rewards in rank.items()}
            self.objective.compare({name: everything[name] for name in sorted(everything)})
        for update in range(self.objective.settings.updates if groups else 0):
            if update or waits:
                with stage("replay"):
                    for lesson in self.lessons:
                        with self._brought_back(lesson.group):
                            self._learn(lesson, update)
            self.sum.give(self.world, groups)
            for name, value in self._step(update).items():
                logged.setdefault(name, []).append(float(value))
        means = self._summaries() | {name: sum(values) / len(values) for name, values in logged.items()}
        means["steps"] = sum(logged.get("steps", []), 0.0)
        if groups:
            means |= self.objective.end(means)
        return means | {"zero_variance_groups": self.world.total(float(self.without_variance * leads))}

    @contextmanager
    def _brought_back(self, group: Group) -> Iterator[None]:
        """Give a group that was put away its context again within the block, under the policy that made it."""
        if group.prefix is not None:
            yield
            return
        with self.policies.as_(self.objective.maker):
            self.engine.bring_back(group)
        try:
            yield
        finally:
            group.put_away()

    def _step(self, update: int) -> dict[str, float]:
        """Step; return what is logged of it."""
        with stage("optimizer"):
            try:
                step = self.stepper.take()
            except GradientNotFinite as error:
                raise GradientNotFinite(
                    f"the gradient of update {update + 1} of {self.objective.settings.updates} {error}: no step was taken. Try a smaller "
                    "optimizer.lr, in case the weights have gone too far, or generator.dtype=float32, in case a number was too large"
                ) from None
        return {"gradient_norm": step.norm, "clipped": step.clipped, "below_eps": step.below_eps, "steps": step.taken}

    # One group's gradient

    def _learn(self, lesson: Lesson, update: int) -> None:
        """Add the gradient of this rank's part of a group's samples to the sum, in micro-batches that fit."""
        group = lesson.group
        chunks = self.objective.samples(group, update, self.draw)
        weight = 1 / sum(map(len, chunks))
        own = [part for samples in chunks if len(part := samples.part(slice(self.team.rank, None, self.team.size)))]
        if self.lockstep:
            passes = [part.chunk for part in self._micro_batches(group, own)]
            advice = "generator.shard asks for equally many: let each rank of a team have as many samples of an update as the others"
            self.world.check_same("number of passes", passes, advice)
        if not own:
            return
        target = self.objective.target(group, lesson.advantages)
        gradient = partial(self._gradient, group, target, own, weight)
        statistics = self.batching.until_it_fits(gradient, max(map(len, own)))
        if lesson.counts:
            self.sum.add()
            for samples, values in zip(own, statistics):
                self._statistics.append(_Statistics(update, lesson.number, samples.chunk, values))
        else:
            self.stepper.optimizer.zero_grad(set_to_none=True)

    def _gradient(self, group: Group, target: Any, chunks: Sequence[Samples], weight: float) -> list[dict[str, Tensor]]:
        """Make the gradients those of `weight` times the sum of the samples' losses; return each chunk's statistics.

        Micro-batch by micro-batch: the same members chunk after chunk, so that each context goes on from the one before.
        """
        self.stepper.optimizer.zero_grad(set_to_none=True)
        objective, parts = self.objective, self._micro_batches(group, chunks)
        compared = objective.compared()
        unmoved = [name for name in compared if self.policies.is_live(name)]
        moved = [name for name in compared if name == "reference" or name not in unmoved]
        apart = objective.settings.context == "recompute"  # then every policy makes the context anew for itself
        ahead = {name: self._predictions(name, group, parts) for name in moved if apart}
        statistics: dict[int, list[Mapping[str, Tensor]]] = {samples.chunk: [] for samples in chunks}
        with self._contexts(group, parts) as context_of:
            for index, part in enumerate(parts):
                context = context_of(part)
                known = {name: ahead[name][index] if apart else self._prediction(name, group, part, context) for name in moved}
                live = self.engine.predict(group, part, context=context, checkpoint=self.batching.checkpoint)
                loss = objective.loss(group, target, part, live, {name: known.get(name, live.detach()) for name in compared})
                if unmoved and len(unmoved) == len(compared):
                    objective.check_unmoved(loss.statistics)
                (loss.loss.sum() * weight).backward()
                statistics[part.chunk].append(loss.statistics)
        return [{name: torch.cat([part[name] for part in found]) for name in found[0]} for found in statistics.values()]

    def _micro_batches(self, group: Group, chunks: Sequence[Samples]) -> list[Samples]:
        """Return the samples of all chunks in parts: the first part of each chunk, then the second of each, and so on."""
        limits = [self.batching.micro_batch, *(self.engine.at_once(group, samples.chunk) for samples in chunks)]
        size = min([max(map(len, chunks)), *(limit for limit in limits if limit)])
        rows = zip_longest(*(samples.split(size) for samples in chunks))
        return [part for row in rows for part in row if part is not None]

    @torch.no_grad()
    def _prediction(self, policy: str, group: Group, part: Samples, context: Stream) -> Tensor:
        """Return x0hat of samples under a policy that is compared, in the context that the live policy sees."""
        with self.policies.as_(policy):
            return self.objective.predict_known(policy, group, part, context)

    @torch.no_grad()
    def _predictions(self, policy: str, group: Group, parts: Sequence[Samples]) -> list[Tensor]:
        """Return x0hat of each part under a policy that is compared, in contexts of its own."""
        with self.policies.as_(policy), self._contexts(group, parts) as context_of:
            return [self.objective.predict_known(policy, group, part, context_of(part)) for part in parts]

    @contextmanager
    def _contexts(self, group: Group, parts: Sequence[Samples]) -> Iterator[Callable[[Samples], Stream]]:
        """Give a function that returns the context that samples were made in, one at a time.

        That of the pivot chunk is the rollout's, or recomputed under the weights as they are. What members made of their own is cached anew
        under the policy that made it.
        """
        recompute, last = self.objective.settings.context == "recompute", max(part.chunk for part in parts)
        with self.engine.recomputed_prefix(group, recompute) as prefix, Contexts(self.engine, group, last, prefix) as contexts:

            def context_of(samples: Samples) -> Stream:
                rebuilt = samples.chunk > group.pivot and not recompute
                with self.policies.as_(self.objective.maker) if rebuilt else nullcontext():
                    return contexts.of(samples.chunk, samples.members)

            yield context_of

    # What is logged

    def _summaries(self) -> dict[str, float]:
        """Return the mean over all groups of what the objective says of the samples of each, update by update."""
        parts: dict[tuple[int, int, int], list[Mapping[str, Tensor]]] = {}
        own = [part._replace(values={name: tensor.cpu() for name, tensor in part.values.items()}) for part in self._statistics]
        for part in (part for rank in self.world.gathered(own) for part in rank):
            parts.setdefault(part[:3], []).append(part.values)
        logged: dict[str, list[float]] = {}
        for update, group in sorted({(update, group) for update, group, _ in parts}):
            chunks = [dealt for (*key, _), dealt in parts.items() if key == [update, group]]
            statistics = {name: torch.cat([_undealt([part[name] for part in dealt]) for dealt in chunks]) for name in chunks[0][0]}
            for name, value in self.objective.summary(statistics).items():
                logged.setdefault(f"update{update + 1}/{name}", []).append(value)
        return {name: sum(values) / len(values) for name, values in logged.items()}


def _undealt(parts: Sequence[Tensor]) -> Tensor:
    """Return rows in their order before they were dealt, one by one, to as many players as there are parts."""
    rows = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for player, part in enumerate(parts):
        rows[player :: len(parts)] = part
    return rows
