"""The source of an iteration's groups: rollouts of the policy, or a buffer of the reference policy's groups, which are judged already."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, groupby, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcopo_fast.build import Generator
from arcopo_fast.config.schema import Config
from arcopo_fast.config.sections import JudgeConfig
from arcopo_fast.data.buffer import Buffer, Entry, all_metadata
from arcopo_fast.data.prompts import Prompt, Prompts, Turn, digest
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.judging import Judging, joined
from arcopo_fast.evaluation.windows import View
from arcopo_fast.model.lora import adapter_disabled, frozen_state
from arcopo_fast.objectives.advantage import window_advantages
from arcopo_fast.objectives.base import Objective
from arcopo_fast.planning.spread import Spread
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rollout.cache import variant_of
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.group import Branching, Explored, Group
from arcopo_fast.rollout.history import Appended, History, Switched
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, keyed_rng
from arcopo_fast.rollout.stream import VideoShape
from arcopo_fast.runtime.distributed import World
from arcopo_fast.storage.identity import weights_digest


@dataclass
class JudgedGroup:
    """A group with its scores.

    Attributes:
        group: its videos.
        prompt: of all of them.
        rewards: scores [G] by name, see `Config.scores_of`; NaN where a reward failed.
    """

    group: Group
    prompt: Prompt
    rewards: dict[str, Tensor]

    def outcome(self, number: int, config: Config) -> Outcome:
        """Return what its iteration, in which it has a `number`, keeps of it."""
        return Outcome(number, self.group.pivot, self.rewards, self.advantages(config))

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
        )


class Outcome(NamedTuple):
    """The result of a group, which an iteration keeps when the videos are gone.

    Attributes:
        number: of the group in its iteration.
        pivot: the chunk at which it forked, counted from 0.
        rewards: scores [G] by name, see `Config.scores_of`; NaN where a reward failed.
        advantages: [G] float64.
    """

    number: int
    pivot: int
    rewards: dict[str, Tensor]
    advantages: Tensor


def prompt_of(config: Config, prompts: Sequence[Prompt], iteration: int, video: int) -> Prompt:
    """Return the prompt of a video of an iteration, and with `switches.every` those that follow it."""
    every, last_chunk = config.switches.every, sum(config.video.chunk_sizes[:-1])

    def drawn(*turn: int) -> Prompt:
        return prompts[int(keyed_rng(config.seed, iteration, video, "prompt", *turn).integers(len(prompts)))]

    if every is None:
        return drawn()
    return drawn()._replace(turns=tuple(Turn(frame, drawn(frame // every)) for frame in range(every, last_chunk + 1, every)))


def training_prompts(config: Config, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts of all of a run's groups, which are known before there is an engine."""
    if config.train.buffer is not None:
        return [_prompt_in(about) for about in all_metadata(config.train.buffer) if "prompt" in about]
    videos = product(range(1, config.train.iterations + 1), range(config.rollout.prompts_per_iteration))
    return [prompt_of(config, prompts, iteration, video) for iteration, video in videos]


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
            made = self.engine.forks(self.encode(prompt), self._name(iteration, video), pivots, self._branching(), self._switches(prompt))
            with closing(made):
                for index in wanted:
                    with self.objective.policies.as_(self.objective.acting):
                        group = next(made)
                    yield index, self._judged(replace(group, fork=index % forks), prompt)

    def _judged(self, group: Group, prompt: Prompt) -> JudgedGroup:
        """Judge a group, which is released if this fails."""
        with ExitStack() as undo:
            undo.enter_context(group)
            rewards = self.judge(group, self.decode(group), prompt)
            if not self.team.alone:
                rewards = joined(self.team.gathered(rewards))
                self._join(group)
            undo.pop_all()
        return JudgedGroup(group, prompt, rewards)

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
        pivots, switches = [self.pivot(iteration, index)], self._switches(self.prompt(iteration, index))
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
        )

    def _switches(self, prompt: Prompt) -> dict[int, Tensor]:
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
        """Yield frames [n, F, 3, H, W] in [0, 1] of what rewards see of a group's videos, as many at a time as the recipe says.

        at_once: as many instead.
        """
        judging, (view, shared, tails) = Judging.of(self.config, self.generator), self.seen(group)
        return replace(judging, at_once=at_once or judging.at_once).decode(tails, shared, warmup=view.warmup)

    def judge(self, group: Group, slices: Iterable[Tensor], prompt: Prompt) -> dict[str, Tensor]:
        """Return the scores [G] of a group's frames by name, see `Config.scores_of`, on the CPU; NaN where a reward failed."""
        prompts, view = [prompt.text] * self.branches[self.team.rank], self.view(group, prompt)
        parts: list[dict[str, Tensor]] = []
        for frames, scores in Judging.of(self.config, self.generator).judge(self.rewards, slices, prompts, view):
            del frames  # the next ones need the memory
            parts.append(scores)
        return joined(parts)


class BufferedGroups:
    """A source of groups that the generator made before it was trained (semi-on-policy AR-CoPO).

    Every pass over them has an order of its own.

    Raises:
        UserError: the buffer is of another policy, holds no intact entry, or lacks a reward of the recipe.
    """

    def __init__(self, config: Config, generator: Generator, engine: Engine, objective: Objective[Any], buffer: Buffer) -> None:
        self.config = config
        self.generator = generator
        self.engine = engine
        self.objective = objective
        self.buffer = buffer
        self.indices = buffer.indices  # once: a collection may still be adding to it
        scored = [name.removeprefix(REWARD) for name in next(buffer.entries(self.indices)).tensors if name.startswith(REWARD)]
        if missing := [name for name in config.score_weights if name not in scored]:
            raise UserError(
                f"{buffer.path} was not scored by {', '.join(missing)}, only by {', '.join(scored)}; choose rewards among these, "
                "or collect a buffer with the others"
            )

    def judged(self, iteration: int, index: int) -> JudgedGroup:
        """Return the group `index` of an iteration, with the rewards that it was stored with. Who takes it releases it."""
        drawn_before = (iteration - 1) * self.config.rollout.groups + index
        turn, place = divmod(drawn_before, len(self.indices))
        order = keyed_rng(self.config.seed, "buffer", turn).permutation(self.indices).tolist()
        entry = next(self.buffer.entries(order[place:] + order[:place]))  # a broken entry's place is taken by the next one
        return restore(entry, self.generator, self.engine, self.objective, list(self.config.score_weights))

    def each(self, iteration: int, indices: Sequence[int]) -> abc.Generator[tuple[int, JudgedGroup], None, None]:
        """Yield the number and the group of each of `indices`; who takes it releases it."""
        for index in indices:
            yield index, self.judged(iteration, index)


REWARD = "reward/"
"""Begins the name of scores [G] in a buffer's entry."""
CLEAN = "clean"
"""Name of the members' chunks from the pivot on, [G, F1, C, h, w], in the entry of a group without trajectories."""


def store(judged: JudgedGroup, shape: VideoShape) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a group as a buffer keeps it: tensors, and the metadata that name them.

    Latents are kept, never keys and values: those are rebuilt from the prefix. The tensors are inputs, predictions [T, G, F, C, h, w]: x_t
    and x0hat_t of the pivot chunk, whose first input is eps_i, and inputs/N, predictions/N of explored chunks N after it; initial [F, C, h,
    w]: eps*; and prefix [F0, C, h, w] float32, the chunks of the video's history, absent at the first chunk. A group without trajectories
    is stored as its finished chunks, `CLEAN`, in place of inputs and predictions. The metadata say what happened to the prefix:
    ["append", first frame, frames] and ["switch", frame].
    """
    group, (seed, iteration, index) = judged.group, judged.group.id
    initial = KeyedNoise(shape, group.id).initial(group.pivot)[0]
    tensors = {"initial": initial} if group.explored else {"initial": initial, CLEAN: group.tails}
    for chunk, explored in group.explored.items():
        tensors |= dict(zip(_names(chunk, group.pivot), (explored.inputs, explored.predictions)))
    if chunks := group.history.chunks:
        tensors["prefix"] = torch.cat([chunk.latents[0] for chunk in chunks])
    tensors |= {REWARD + name: values for name, values in judged.rewards.items()}
    events = [
        ["append", event.frame, event.latents.shape[1]] if isinstance(event, Appended) else ["switch", event.frame]
        for event in group.history.events
    ]
    about = {"prompt": judged.prompt.text, "pivot": group.pivot, "seed": seed, "iteration": iteration, "group": index, "events": events}
    if judged.prompt.extended:
        about["extended"] = judged.prompt.extended
    if judged.prompt.turns:
        about["turns"] = [{"frame": frame, "text": later.text, "extended": later.extended} for frame, later in judged.prompt.turns]
    if group.fork:
        about["fork"] = group.fork
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, about


def _names(chunk: int, pivot: int) -> tuple[str, str]:
    """Return the names of an explored chunk's inputs and predictions in a buffer's entry."""
    ending = "" if chunk == pivot else f"/{chunk}"
    return f"inputs{ending}", f"predictions{ending}"


@torch.no_grad()
def restore(entry: Entry, generator: Generator, engine: Engine, objective: Objective[Any], scores: list[str]) -> JudgedGroup:
    """Return a stored group with the scores of these names, its prefix rebuilt by clean passes of the generator without its adapter. Its
    `tails` are the explored chunks'.

    The passes are the rollout's, so with the device and the libraries that made the group, keys and values are equal bit for bit; elsewhere
    they differ by rounding, which the ratio does not see: old and new predictions have the same prefix.
    """
    about, device = entry.metadata, engine.model.device
    pivot, prompt = about["pivot"], _prompt_in(about)
    starts = list(accumulate(engine.shape.chunk_frames[:-1], initial=0))
    placed = prompt.at_chunks(starts) if prompt.turns else {0: prompt}
    texts = {start: generator.encode_text([part.for_generator]).to(device) for start, part in placed.items()}
    explored: dict[int, Explored] = {}
    for chunk in range(pivot, engine.shape.chunks):
        names = _names(chunk, pivot)
        if names[0] in entry.tensors:
            explored[chunk] = Explored(engine.steps_of(chunk), *(entry.tensors[name].to(device) for name in names))
    clean = entry.tensors[CLEAN].to(device) if CLEAN in entry.tensors else None
    tails = torch.cat([part.predictions[-1] for part in explored.values()], dim=1) if clean is None else clean
    history = _history(entry, texts, list(engine.shape.chunk_frames[:pivot]))
    with adapter_disabled(engine.model):
        prefix = engine.rebuild(history)
    try:
        name = GroupId(about["seed"], about["iteration"], about["group"])
        rule = objective.noise_plan(0.0).rule or engine.rule
        stop = starts[pivot] + tails.shape[1]
        later = {chunk: texts[start] for chunk, start in enumerate(starts) if start in texts and starts[pivot] < start < stop}
        group = Group(name, pivot, prefix, history, tails, explored, rule, later, fork=about.get("fork", 0))
        return JudgedGroup(group, prompt, {name: entry.tensors[REWARD + name] for name in scores})
    except BaseException:
        prefix.cache.release()
        raise


def _history(entry: Entry, texts: Mapping[int, Tensor], chunk_frames: list[int]) -> History:
    """Return what happened to an entry's video before its pivot; before there were events, every chunk was kept."""
    history, starts = History(texts[0]), accumulate(chunk_frames, initial=0)
    events = entry.metadata.get("events", [["append", *chunk] for chunk in zip(starts, chunk_frames)])
    done = 0
    for kind, frame, *frames in events:
        if kind == "switch":
            history.events.append(Switched(frame, texts[frame]))
        else:
            history.events.append(Appended(frame, entry.tensors["prefix"][None, done : done + frames[0]]))
            done += frames[0]
    return history


def _prompt_in(about: Mapping[str, Any]) -> Prompt:
    turns = tuple(Turn(turn["frame"], Prompt(turn["text"], turn["extended"])) for turn in about.get("turns", ()))
    return Prompt(about["prompt"], about.get("extended"), turns)


# The identity of a buffer ---------------------------------------------------------------------------------------------------------------


def policy_of(config: Config, generator: Generator, objective: Objective[Any]) -> dict[str, Any]:
    """Return everything that the groups of a buffer were drawn from; training must agree with every value."""
    plan = objective.noise_plan(config.rollout.noise_strength)
    sometimes: dict[str, Any] = {"vae_dtype": config.generator.vae_dtype} if variant_of(config.cache).reencodes(config.cache) else {}
    if plan.chunks != 1:
        sometimes["explored_chunks"] = plan.chunks or "all"
    if config.rollout.horizon is not None:
        sometimes["horizon"] = config.rollout.horizon
    if config.switches.every is not None:
        sometimes["switches"] = config.switches.model_dump()
    if (judge := config.judge) != JudgeConfig():  # the weights may be others in training
        seen = {name or "all": window.model_dump(include={"chunks", "before"}) for name, window in judge.seen.items()}
        sometimes["judge"] = {"warmup": judge.warmup, **seen}
    if plan.keep != "trajectory":
        sometimes["keep"] = plan.keep
    return sometimes | {
        "weights": weights_digest(frozen_state(generator.model)),
        "text_encoder": generator.encode_text.fingerprint,
        "video": config.video.model_dump(exclude={"fps", "decode_frames"}),
        "sampler": config.sampler.model_dump(),
        "cache": config.cache.model_dump(),
        "group_size": config.rollout.group_size,
        "noise_strength": plan.initial,
        "kernel": asdict(plan.rule) if plan.rule else None,
    }


def recipe_of(config: Config, prompts: Prompts, rewards: Mapping[str, Reward]) -> dict[str, Any]:
    """Return everything besides the policy that determines an entry of a buffer; later collectors must match it."""
    forks = config.rollout.pivots_per_video
    return ({"pivots_per_video": forks} if forks > 1 else {}) | {
        "seed": config.seed,
        "prompts": digest(prompts.training),
        "rewards": {name: reward.fingerprint(name) for name, reward in rewards.items()},
        "pivot": config.rollout.pivot,
        "dtype": config.generator.dtype,
        "vae_dtype": config.generator.vae_dtype,
    }
