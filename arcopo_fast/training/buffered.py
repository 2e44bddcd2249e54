"""Groups in a buffer: what an entry holds, how it becomes a group again, and what a buffer was made from."""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor

from arcopo_fast.build import Generator
from arcopo_fast.config.schema import Config
from arcopo_fast.config.sections import JudgeConfig
from arcopo_fast.data.buffer import Buffer, Entry, all_metadata
from arcopo_fast.data.prompts import Prompt, Prompts, Turn, digest
from arcopo_fast.errors import UserError
from arcopo_fast.model.lora import adapter_disabled, frozen_state
from arcopo_fast.objectives.base import Objective
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rollout.cache import variant_of
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.group import Explored, Group
from arcopo_fast.rollout.history import Appended, History, Switched
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, keyed_rng
from arcopo_fast.rollout.stream import VideoShape
from arcopo_fast.storage.identity import weights_digest
from arcopo_fast.training.groups import JudgedGroup, prompt_of


class BufferedGroups:
    """A source of groups that the generator made before it was trained (semi-on-policy AR-CoPO).

    Every pass over them has an order of its own.

    Raises:
        UserError: the buffer is of another policy, holds no intact entry, or lacks a reward or the anchors of the recipe.
    """

    def __init__(self, config: Config, generator: Generator, engine: Engine, objective: Objective[Any], buffer: Buffer) -> None:
        self.config = config
        self.generator = generator
        self.engine = engine
        self.objective = objective
        self.buffer = buffer
        self.indices = buffer.indices  # once: a collection may still be adding to it
        first = next(buffer.entries(self.indices))
        scored = [name.removeprefix(REWARD) for name in first.tensors if name.startswith(REWARD)]
        if missing := [name for name in config.score_weights if name not in scored]:
            raise UserError(
                f"{buffer.path} was not scored by {', '.join(missing)}, only by {', '.join(scored)}; choose rewards among these, "
                "or collect a buffer with the others"
            )
        if config.anchored and not any(name.startswith(ANCHOR) for name in first.tensors):
            raise UserError(
                f"the groups of {buffer.path} have no anchor for objective.advantage_baseline=anchor; collect a buffer with that setting, "
                "or train with objective.advantage_baseline=mean"
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
ANCHOR = "anchor/"
"""Begins the name of a score [1] of the branch with no noise of its own, in the entry of a group that had one."""
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
    tensors |= {ANCHOR + name: torch.tensor([value]) for name, value in (judged.anchor or {}).items()}
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
        anchor = {name: entry.tensors[ANCHOR + name].item() for name in scores if ANCHOR + name in entry.tensors}
        return JudgedGroup(group, prompt, {name: entry.tensors[REWARD + name] for name in scores}, anchor or None)
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


def training_prompts(config: Config, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts of all of a run's groups, which are known before there is an engine."""
    if config.train.buffer is not None:
        return [_prompt_in(about) for about in all_metadata(config.train.buffer) if "prompt" in about]
    videos = product(range(1, config.train.iterations + 1), range(config.rollout.prompts_per_iteration))
    return [prompt_of(config, prompts, iteration, video) for iteration, video in videos]


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
    sometimes: dict[str, Any] = {"pivots_per_video": forks} if forks > 1 else {}
    if config.anchored:
        sometimes["advantage_baseline"] = config.objective.advantage_baseline
    return sometimes | {
        "seed": config.seed,
        "prompts": digest(prompts.training),
        "rewards": {name: reward.fingerprint(name) for name, reward in rewards.items()},
        "pivot": config.rollout.pivot,
        "dtype": config.generator.dtype,
        "vae_dtype": config.generator.vae_dtype,
    }
