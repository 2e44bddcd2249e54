"""Groups of videos with their scores, and the rollouts of the policy that make them; `buffered` has those of a buffer."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any, NamedTuple

from torch import Tensor

from arcopo_fast.build import Generator
from arcopo_fast.config.schema import Config
from arcopo_fast.data.prompts import Prompt, Prompts, Turn
from arcopo_fast.evaluation.judging import Judging, joined
from arcopo_fast.evaluation.windows import View
from arcopo_fast.objectives.advantage import window_advantages
from arcopo_fast.objectives.base import Objective
from arcopo_fast.planning.spread import Spread
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.group import Branching, Group
from arcopo_fast.rollout.noise import GroupId, keyed_rng
from arcopo_fast.runtime.distributed import World


@dataclass
class JudgedGroup:
    """A group with its scores.

    Attributes:
        group: its videos.
        prompt: of all of them.
        rewards: scores [G] by name, see `Config.scores_of`; NaN where a reward failed.
        anchor: the same of the branch with no noise of its own; None: there was none.
    """

    group: Group
    prompt: Prompt
    rewards: dict[str, Tensor]
    anchor: dict[str, float] | None = None

    @classmethod
    def of(cls, group: Group, prompt: Prompt, scores: dict[str, Tensor]) -> JudgedGroup:
        """Return a group with its scores by name: [G], or [G + 1], the last of which is its anchor's."""
        rewards = {name: values[: group.size] for name, values in scores.items()}
        anchored = any(len(values) > group.size for values in scores.values())
        return cls(group, prompt, rewards, {name: values[-1].item() for name, values in scores.items()} if anchored else None)

    def outcome(self, number: int, config: Config) -> Outcome:
        """Return what its iteration, in which it has a `number`, keeps of it."""
        return Outcome(number, self.group.pivot, self.rewards, self.advantages(config), self.anchor if config.anchored else None)

    def weighted(self, config: Config) -> dict[str, Tensor]:
        """Return each score that has a weight times it, [G] by name, in the recipe's order."""
        return {name: weight * self.rewards[name] for name, weight in config.score_weights.items() if weight}

    def advantages(self, config: Config) -> Tensor:
        """Return A_i of the members [G] float64."""
        objective = config.objective
        return window_advantages(
            self.rewards,
            config.windows,
            combine=objective.reward_combine,
            kind=objective.advantage,
            p=objective.quasi_norm_p,
            std_floor=objective.advantage_std_floor,
            std=objective.advantage_std,
            largest=objective.advantage_max,
            anchor=self.anchor if config.anchored else None,
        )


class Outcome(NamedTuple):
    """The result of a group, which an iteration keeps when the videos are gone.

    Attributes:
        number: of the group in its iteration.
        pivot: the chunk at which it forked, counted from 0.
        rewards: scores [G] by name, see `Config.scores_of`; NaN where a reward failed.
        advantages: [G] float64.
        anchor: scores by name of the branch that is the baseline, NaN where a reward failed; None: the mean of the members is.
    """

    number: int
    pivot: int
    rewards: dict[str, Tensor]
    advantages: Tensor
    anchor: dict[str, float] | None = None


def prompt_of(config: Config, prompts: Sequence[Prompt], iteration: int, video: int) -> Prompt:
    """Return the prompt of a video of an iteration, and with `switches.every` those that follow it."""
    every, last_chunk = config.switches.every, sum(config.video.chunk_sizes[:-1])

    def drawn(*turn: int) -> Prompt:
        return prompts[int(keyed_rng(config.seed, iteration, video, "prompt", *turn).integers(len(prompts)))]

    if every is None:
        return drawn()
    return drawn()._replace(turns=tuple(Turn(frame, drawn(frame // every)) for frame in range(every, last_chunk + 1, every)))


class Rollouts:
    """A source of groups of the policy that acts. Prompt, pivot and every noise are functions of (seed, iteration, index).

    With `rollout.pivots_per_video` K, the groups v K to v K + K - 1 of an iteration are forks of its video v, in the order of their pivots.

    Args:
        team: the ranks that share every group: each makes the prefix, and finishes, decodes and judges branches of its own.
    """

    def __init__(
        self,
        config: Config,
        generator: Generator,
        engine: Engine,
        objective: Objective[Any],
        prompts: Prompts,
        rewards: dict[str, Reward],
        team: World | None = None,
    ) -> None:
        self.config = config
        self.generator = generator
        self.engine = engine
        self.objective = objective
        self.prompts = prompts.training
        self.rewards = rewards
        self.team = team or World()
        self.branches = Spread(1, self.team.size).branches(config.rollout.group_size)

    def judged(self, iteration: int, index: int) -> JudgedGroup:
        """Return a group of videos with their rewards, its own video made for it alone. Who takes it releases it."""
        prompt = self.prompt(iteration, index)
        return self._judged(self.roll_out(self.encode(prompt), iteration, index), prompt)

    def each(self, iteration: int, indices: Sequence[int]) -> abc.Generator[tuple[int, JudgedGroup], None, None]:
        """Yield the number and the group of each of `indices`, with its rewards; who takes it releases it. Forks share one video.

        Close this if not all are taken.
        """
        forks = self.config.rollout.pivots_per_video
        if forks == 1:
            for index in indices:
                yield index, self.judged(iteration, index)
            return
        for video, numbers in groupby(indices, key=lambda index: index // forks):
            prompt, wanted = self.prompt(iteration, video * forks), list(numbers)
            pivots = [self.pivot(iteration, index) for index in wanted]
            made = self.engine.forks(self.encode(prompt), self._name(iteration, video), pivots, self._branching(), self.switches(prompt))
            with closing(made):
                for index in wanted:
                    with self.objective.policies.as_(self.objective.acting):
                        group = next(made)
                    yield index, self._judged(replace(group, fork=index % forks), prompt)

    def _judged(self, group: Group, prompt: Prompt) -> JudgedGroup:
        """Judge a group, which is released if this fails."""
        with ExitStack() as undo:
            undo.enter_context(group)
            scores = self.judge(group, self.decode(group), prompt)
            group.anchor = None  # of which only the scores are needed
            if not self.team.alone:
                scores = joined(self.team.gathered(scores))
                self._join(group)
            undo.pop_all()
        return JudgedGroup.of(group, prompt, scores)

    def _join(self, group: Group) -> None:
        """Give a group the branches of all ranks of the team, in their order."""
        group.tails = self.team.concatenated(group.tails, 0, self.branches)
        for explored in group.explored.values():
            explored.inputs, explored.predictions = (
                self.team.concatenated(states, 1, self.branches) for states in (explored.inputs, explored.predictions)
            )

    def prompt(self, iteration: int, index: int) -> Prompt:
        """Return the prompt of the group `index` of an iteration, with those that follow it in its video."""
        return prompt_of(self.config, self.prompts, iteration, index // self.config.rollout.pivots_per_video)

    def encode(self, prompt: Prompt) -> Tensor:
        """Return what the generator reads of a prompt, [1, length, text_dim]; of prompts that change, of the first one."""
        return self.generator.encode_text([prompt.for_generator])

    def pivot(self, iteration: int, index: int) -> int:
        """Return the chunk at which a group forks, counted from 0."""
        rollout, count = self.config.rollout, self.config.rollout.pivots(self.engine.shape.chunks)
        if isinstance(rollout.pivot, int):
            return rollout.pivot - 1
        video, fork = divmod(index, rollout.pivots_per_video)
        rng = keyed_rng(self.config.seed, iteration, *(("pivot",) if rollout.pivot == "shared" else ("pivot", video)))
        if rollout.pivots_per_video == 1:
            return int(rng.integers(count))
        return int(sorted(rng.choice(count, size=rollout.pivots_per_video, replace=False))[fork])

    def roll_out(self, text: Tensor, iteration: int, index: int, *, every_step: bool = False) -> Group:
        """Return a group of videos of the policy that makes groups, this rank's branches of it, not yet judged.

        Args:
            text: from `encode`, of the group's prompt.
            every_step: keep the trajectories of chunks that explore, even if the objective needs only the finished chunks.
        """
        video, fork = divmod(index, self.config.rollout.pivots_per_video)
        pivots, switches = [self.pivot(iteration, index)], self.switches(self.prompt(iteration, index))
        with self.objective.policies.as_(self.objective.acting):
            branching = self._branching(every_step=every_step)
            group = next(self.engine.forks(text, self._name(iteration, video), pivots, branching, switches))
        return replace(group, fork=fork)

    def _name(self, iteration: int, video: int) -> GroupId:
        return GroupId(self.config.seed, iteration, video)

    def _branching(self, *, every_step: bool = False) -> Branching:
        """Return the branches of a group that are this rank's."""
        rollout, first = self.config.rollout, sum(self.branches[: self.team.rank])
        plan = self.objective.noise_plan(rollout.noise_strength)
        return Branching(
            members=rollout.group_size,
            plan=replace(plan, keep="trajectory") if every_step else plan,
            horizon=rollout.horizon,
            part=range(first, first + self.branches[self.team.rank]),
            branches_per_wave=rollout.branches_per_wave,
            kept=self.config.judge.reach,
            anchor=self.config.anchored and self.team.rank == self.team.size - 1,  # who has least to do, and whose scores come last
        )

    def switches(self, prompt: Prompt) -> dict[int, Tensor]:
        """Return what the generator reads of the prompts that follow a video's first one, by the latent frame from which they count."""
        starts = accumulate(self.engine.shape.chunk_frames[:-1], initial=0)
        return {start: self.encode(later) for start, later in prompt.at_chunks(list(starts)).items() if start}

    def view(self, group: Group, prompt: Prompt | None = None) -> View:
        """Return what rewards see of a group's videos; with their prompt, under which prompts."""
        return View.of(self.config, group.pivot, prompt)

    def seen(self, group: Group) -> tuple[View, Tensor, Tensor]:
        """Return what rewards see of a group's videos, and the latents to decode for it: shared ones [1, F0, C, h, w], those to be dropped
        first, and each branch's own [G, F1, C, h, w]."""
        view, prefix, pivot = self.view(group), group.prefix_latents, sum(self.engine.shape.chunk_frames[: group.pivot])
        kept = range(pivot - prefix.shape[1], pivot)  # the group may have forgotten the first frames
        return view, prefix[:, view.frames.start - view.warmup - kept.start :], group.tails[:, : view.frames.stop - pivot]

    def decode(self, group: Group, at_once: int | None = None) -> Iterator[Tensor]:
        """Yield frames [n, F, 3, H, W] in [0, 1] of what rewards see of a group's videos, as many at a time as the recipe says; those of
        an anchor last, by itself.

        at_once: as many instead.
        """
        judging, (view, shared, tails) = Judging.of(self.config, self.generator), self.seen(group)
        anchor = None if group.anchor is None else group.anchor[:, : tails.shape[1]]
        return replace(judging, at_once=at_once or judging.at_once).decode(tails, shared, warmup=view.warmup, anchor=anchor)

    def judge(self, group: Group, slices: Iterable[Tensor], prompt: Prompt) -> dict[str, Tensor]:
        """Return the scores [G], with an anchor [G + 1], of a group's frames by name, see `Config.scores_of`, on the CPU; NaN where a
        reward failed."""
        prompts, view = [prompt.text] * (self.branches[self.team.rank] + (group.anchor is not None)), self.view(group, prompt)
        parts: list[dict[str, Tensor]] = []
        for frames, scores in Judging.of(self.config, self.generator).judge(self.rewards, slices, prompts, view):
            del frames  # the next ones need the memory
            parts.append(scores)
        return joined(parts)
