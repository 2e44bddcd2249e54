"""Decoding and scoring, slice by slice; and a generator judged on fixed prompts and noises, by trained rewards and held-out metrics.

A score that failed is NaN, in a summary null; it is counted, and no mean has it in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from arcopo_fast.build import Generator, pool_pages
from arcopo_fast.config.schema import Config
from arcopo_fast.data.prompts import Prompt
from arcopo_fast.evaluation.filters import Filter
from arcopo_fast.evaluation.looks import DETAIL, MOTION, Diversity, SetMeasure, motion_and_detail
from arcopo_fast.evaluation.windows import View
from arcopo_fast.model.vae import StreamingDecoder
from arcopo_fast.objectives.advantage import weighted_total
from arcopo_fast.rewards.base import Reward, score
from arcopo_fast.rollout.decode import decode_branches
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, StackedNoise
from arcopo_fast.runtime import profiling
from arcopo_fast.runtime.distributed import World
from arcopo_fast.runtime.memory import resident
from arcopo_fast.storage.metrics import TOTAL
from arcopo_fast.toy.metrics import Variety

BATCH = 8


@dataclass(frozen=True)
class Judging:
    """The way latents become frames, and frames scores: slice by slice, so that memory holds the frames of one slice.

    decoder: of the generator's VAE.
    at_once: videos of a slice; None: all of them.
    device: where the VAE and the rewards go from host memory while they work; None: they stay where they are.
    """

    decoder: StreamingDecoder
    at_once: int | None = None
    device: torch.device | None = None

    @classmethod
    def of(cls, config: Config, generator: Generator) -> Judging:
        """Return what a recipe says: `rollout.decode_branches` and `generator.offload`."""
        return cls(generator.decoder, config.rollout.decode_branches, generator.model.device if config.generator.offload else None)

    def at_work(self, *things: object) -> AbstractContextManager[None]:
        """Keep the modules among `things` on the device inside the block, if they wait elsewhere."""
        return nullcontext() if self.device is None else resident(self.device, *things, offload=True)

    def decode(self, latents: Tensor, prefix: Tensor | None = None, *, warmup: int = 0, anchor: Tensor | None = None) -> Iterator[Tensor]:
        """Yield frames [n, F, 3, H, W] in [0, 1] of a slice after the other, see `decode_branches`.

        Delete a slice before the next one is asked for: its memory is needed.

        Args:
            latents: of N videos, [N, F, C, h, w].
            prefix: what all of them begin with, [1, F0, C, h, w].
            warmup: how many of its first latent frames have no frames here.
            anchor: see `decode_branches`.
        """
        videos = len(latents)
        prefix = latents[:1, :0] if prefix is None else prefix
        slices = decode_branches(self.decoder, prefix, latents, self.at_once, warmup=warmup, anchor=anchor)
        for _ in range(math.ceil(videos / (self.at_once or videos)) + (anchor is not None)):
            with profiling.stage("decode"), self.at_work(self.decoder.vae):
                frames = next(slices)
            yield frames
            del frames  # the next ones need the memory

    def judge(
        self, rewards: Mapping[str, Reward], slices: Iterable[Tensor], prompts: Sequence[str], view: View | None = None
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield each slice's frames, see `decode`, and its scores [n] fp32 on the CPU by the reward's name, NaN where a reward failed.

        Args:
            rewards: see `score`.
            slices: of the frames of N videos, from `decode`.
            prompts: one for each of the N videos.
            view: of which the frames are; its windows are judged, and give the scores their names. None: the frames are judged whole.
        """
        done = 0
        for frames in slices:
            own = list(prompts[done : done + len(frames)])
            with profiling.stage("reward"), self.at_work(*rewards.values()):
                if view is None:
                    scores = score(rewards, frames, own, quarantine=True)
                else:
                    scores = view.judge(rewards, frames, own, self.decoder.factor)
            done += len(frames)
            yield frames, {name: values.cpu() for name, values in scores.items()}
            del frames


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the scores [N] of all slices, by name."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass
class Evaluation:
    """scores: each reward's and metric's values [N] by name, and "reward", the weighted sum that is trained on.

    frames: the first videos, to be looked at. looks: values [N] by name, see `evaluation.looks`. filtered: by the name of a filter, all of
    them for the same videos after it. few_steps: by number of steps, see `evaluation.sharpness`.
    """

    scores: dict[str, Tensor]
    prompts: list[str]
    frames: Tensor
    looks: dict[str, Tensor] = field(default_factory=dict)
    filtered: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    few_steps: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return each score's mean and standard deviation over the videos that have it (null if none has), values, and how many failed."""
        return summary(self.scores)


def summary(scores: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return what a file keeps of each score [N], see `Evaluation.summary`."""
    return {name: _summary(values) for name, values in scores.items()}


def _summary(values: Tensor) -> dict[str, Any]:
    scored = values[values.isfinite()].double()
    mean, std = (scored.mean().item(), scored.std(correction=0).item()) if len(scored) else (None, None)
    if len(scored) and scored.max() == scored.min():  # whose standard deviation may be that of a rounded mean
        std = 0.0
    listed = [float(f"{value:.9g}") if math.isfinite(value) else None for value in values.tolist()]
    failed = {"failed": len(values) - len(scored)} if len(scored) < len(values) else {}
    return {"mean": mean, "std": std, "values": listed, **failed}


def videos_at_once(config: Config) -> int:
    """Return how many independent videos the pages of a run's groups hold, at most `BATCH`; at least one."""
    videos = config.evaluation.prompts * config.evaluation.videos_per_prompt
    return max(1, min(BATCH, videos, pool_pages(config) // pool_pages(config, videos=1)))


def latents_of(config: Config, generator: Generator, engine: Engine, prompts: Sequence[Prompt], groups: Sequence[int]) -> Tensor:
    """Make a batch of evaluation videos, [N, F, C, h, w]. prompts: one for each video. groups: which noise is whose."""
    rows = [KeyedNoise(engine.shape, GroupId(config.evaluation.seed, group=group)) for group in groups]
    return engine.generate(generator.encode_text([prompt.for_generator for prompt in prompts]), StackedNoise(rows))


def judge(
    config: Config,
    generator: Generator,
    engine: Engine,
    prompts: Sequence[Prompt],
    groups: Sequence[int],
    rewards: Mapping[str, Reward],
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Make a batch of videos and score them, `rollout.decode_branches` at a time.

    Args:
        prompts: one for each video. groups: which noise is whose.

    Returns:
        frames and scores of a slice after the other, see `Judging.judge`.
    """
    latents = latents_of(config, generator, engine, prompts, groups)
    judging = Judging.of(config, generator)
    return judging.judge(rewards, judging.decode(latents), [prompt.text for prompt in prompts])


def evaluate(
    config: Config,
    generator: Generator,
    engine: Engine,
    prompts: Sequence[Prompt],
    rewards: dict[str, Reward],
    held_out: dict[str, Reward],
    world: World | None = None,
    filters: Mapping[str, Filter] | None = None,
) -> Evaluation:
    """Score `evaluation.videos_per_prompt` videos of every prompt. Equal configurations give equal noises, whatever the weights.

    Args:
        engine: of the generator, between two iterations; as many videos are made at once as its pages hold, at most `BATCH`.
        world: the ranks that share the work, batch by batch, so that numbers are those of one. All get the scores; rank 0 has the frames.
        filters: the videos are scored after each of these, too.
    """
    world = world or World()
    wanted = [prompt for prompt in prompts for _ in range(config.evaluation.videos_per_prompt)]
    texts, batch = [prompt.text for prompt in wanted], videos_at_once(config)
    judges, variants = {**rewards, **held_out}, {"": None} | dict(filters or {})
    measures = load_set_measures(generator)
    own: dict[tuple[int, str], dict[str, Tensor]] = {}  # also what describes each video, to be compared with the others at the end
    shown: list[Tensor] = []
    numbers = shares(math.ceil(len(wanted) / batch), math.ceil(config.evaluation.sample_videos / batch), world)
    rounds = max(world.gathered(len(numbers))) if generator.model.ranks > 1 else len(numbers)
    for number in numbers:
        part = wanted[number * batch : (number + 1) * batch]
        groups = range(number * batch, number * batch + len(part))
        parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in variants}
        for frames, scores in judge(config, generator, engine, part, groups, judges):
            first = number * batch + sum(len(done[DETAIL]) for done in parts[""])
            own_texts = texts[first : first + len(frames)]
            parts[""].append(scores | _looks(frames, own_texts, measures))
            for name, filtered in (filters or {}).items():
                ((changed, scores),) = Judging.of(config, generator).judge(judges, [filtered(frames).contiguous()], own_texts)
                parts[name].append(scores | _looks(changed, own_texts, measures))
                del changed
            shown.append(frames[: max(0, config.evaluation.sample_videos - sum(map(len, shown)))].to("cpu", copy=True))
            del frames
        own |= {(number, name): joined(scored) for name, scored in parts.items()}
    for _ in range(rounds - len(numbers)):  # the others cannot gather weights without this rank, which makes videos for nothing
        judge(config, generator, engine, wanted[:batch], range(batch), {})
    everybodys = {key: scores for rank in world.gathered(own) for key, scores in rank.items()}
    judged, looks = {}, {}
    for name in variants:
        scores = joined([everybodys[key] for key in sorted(everybodys) if key[1] == name])
        seen = {kind: scores.pop(kind) for kind in (MOTION, DETAIL)}
        for index, measure in enumerate(measures):
            seen |= measure.compare(scores.pop(f"{_DESCRIBED}{index}"), texts)
        looks[name] = {kind: values for kind, values in seen.items() if not values.isnan().all()}
        judged[name] = {TOTAL: weighted_total(scores, config.rewards)} | scores
    frames = torch.cat(shown)[: config.evaluation.sample_videos] if shown and world.is_main else torch.empty(0)
    return Evaluation(judged[""], texts, frames, looks[""], {name: judged[name] | looks[name] for name in filters or {}})


def load_set_measures(generator: Generator) -> tuple[SetMeasure, ...]:
    """Load what is measured of each video among the others, and never trained on: diversity; in the toy world the shapes' variety, too."""
    if generator.directory is None or not (generator.directory / "classifier").is_dir():
        return (Diversity(),)
    return Diversity(), Variety(generator.directory / "classifier")


_DESCRIBED = "described by "


def _looks(frames: Tensor, prompts: Sequence[str], measures: Sequence[SetMeasure]) -> dict[str, Tensor]:
    described = {f"{_DESCRIBED}{index}": measure.describe(frames, prompts) for index, measure in enumerate(measures)}
    return motion_and_detail(frames) | described


def shares(batches: int, shown: int, world: World) -> list[int]:
    """Return this rank's of the batches: rank 0 has the first `shown`, whose frames it writes; the others are dealt, from rank 1 on."""
    return [number for number in range(batches) if (max(0, number - shown + 1) % world.size) == world.rank]
