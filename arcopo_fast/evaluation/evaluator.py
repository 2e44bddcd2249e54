"""Evaluate a generator with one adapter after the other: batches of videos, shared among processes, made, scored and kept one by one.

A video's noise is a function of the seed, its prompt's place and its own number: whatever adapter, batch or process makes it.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcopo_fast.build import Generator, encode_ahead, load_generator, load_held_out, load_rewards, sized_engine
from arcopo_fast.config.schema import Config
from arcopo_fast.data.prompts import Prompt
from arcopo_fast.evaluation.adapters import Adapted, prepare_adapters
from arcopo_fast.evaluation.compare import with_total
from arcopo_fast.evaluation.judging import judge, videos_at_once
from arcopo_fast.evaluation.scores import BASE, ScoreDirectory, Scores, ScoreWriter, Video, VideoScores
from arcopo_fast.evaluation.segments import Segments, chunk_starts, judge_segments
from arcopo_fast.model.lora import set_adapter
from arcopo_fast.model.sizes import VAESizes
from arcopo_fast.rewards.base import FramesNotFinite, Reward, RewardError
from arcopo_fast.rollout.stream import VideoShape
from arcopo_fast.runtime.console import Interrupted, Interruption, Progress
from arcopo_fast.runtime.distributed import ALONE, World
from arcopo_fast.runtime.rank_console import log_to
from arcopo_fast.storage.identity import describe, weights_digest
from arcopo_fast.storage.metrics import TOTAL
from arcopo_fast.storage.video import Mp4Writer, write_mp4

BITS_PER_PIXEL = 0.8
"""An assumption about an mp4, for the line about the disk; pictures with little in them take less."""
POLL = 0.2
"""Seconds between two looks at what other processes make."""


class Evaluated(NamedTuple):
    """A directory of scores with what it holds. shown: the generators that were asked for, in the order of the table."""

    directory: ScoreDirectory
    scores: Scores
    shown: list[str]


class Work(NamedTuple):
    """The way in which a process goes about an evaluation.

    batch: videos that are made at once; None: as an evaluation of a training run does, or of long videos as many as are decoded at once.
    shard: the batches that are this process's.
    keep: prompts, from the first, of which videos are written; None: of all.
    segments: of long videos, which are judged one after the other; None: videos are judged as wholes.
    """

    batch: int | None = None
    shard: slice = slice(None)
    keep: int | None = None
    segments: Segments | None = None


class Evaluator:
    """Makes and scores videos: the generator, which takes one adapter after the other, and what judges it.

    world: the ranks that are to have the same. segments: see `Work`.
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        generators: Sequence[Adapted],
        world: World = ALONE,
        segments: Segments | None = None,
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.segments = segments
        self.generators = {adapted.name: adapted for adapted in generators}
        self.rewards = load_rewards(config)
        self.generator = load_generator(config)
        self.held_out = load_held_out(self.generator)
        self.shape = VideoShape.of(config.video, self.generator.model.config.in_channels)
        self.vae = VAESizes.from_config(self.generator.decoder.vae.config)
        self.settings = settings_of(config, self.generator, {**self.rewards, **self.held_out})
        if segments is not None:
            self.settings |= describe({"segments": segments.settings(self.vae)})
            for prompt in prompts:
                prompt.at_chunks(chunk_starts(self.shape))  # what changes too late is said before a video is made
        self.adapters = {adapted.name: adapted.identity for adapted in generators}
        self._current: str | None = None
        prepare_adapters(self.generator.model, [adapted.source for adapted in generators if adapted.source])
        prepare_text(self.generator, prompts, world)

    def make_room(self, videos: int) -> None:
        """Make an engine for so many videos at once; before `score`."""
        self.engine = sized_engine(self.config, self.generator, videos, longer=self.segments is not None)

    def score(self, videos: Sequence[Video], files: Mapping[Video, Path]) -> dict[Video, VideoScores]:
        """Return the scores of a batch, of one generator's videos; those that have a file are written to it.

        Raises:
            RewardError, FramesNotFinite: see `rewards.base.score`.
        """
        if self._current != videos[0].generator:
            self._current = videos[0].generator
            adapted = self.generators[self._current]
            set_adapter(self.generator.model, adapted.adapter, adapted.scale)
        prompts = [self.prompts[video.prompt] for video in videos]
        groups = [video.prompt * self.config.evaluation.videos_per_prompt + video.number for video in videos]
        rewards = {**self.rewards, **self.held_out}
        if self.segments is not None:
            made = judge_segments(self.config, self.generator, self.engine, prompts, groups, rewards, self.segments)
            return self._in_segments(made, videos, files)
        values: dict[Video, VideoScores] = {}
        for frames, judged in judge(self.config, self.generator, self.engine, prompts, groups, rewards):
            for row, video in enumerate(videos[len(values) : len(values) + len(frames)]):
                values[video] = VideoScores({name: column[row].item() for name, column in judged.items()})
                if video in files:
                    files[video].parent.mkdir(parents=True, exist_ok=True)
                    write_mp4(files[video], frames[row], self.config.video.fps)
            del frames  # the next ones need the memory
        return values

    def _in_segments(
        self, made: Iterator[tuple[slice, Tensor, dict[str, Tensor]]], videos: Sequence[Video], files: Mapping[Video, Path]
    ) -> dict[Video, VideoScores]:
        """Collect what `judge_segments` makes of some videos; those that have a file are written to it as they come."""
        found: dict[Video, dict[str, list[float]]] = {video: {} for video in videos}
        with ExitStack() as stack:
            writers = {video: stack.enter_context(Mp4Writer(file, self.config.video.fps)) for video, file in files.items()}
            for file in files.values():
                file.parent.mkdir(parents=True, exist_ok=True)
            for rows, frames, judged in made:
                for row, video in enumerate(videos[rows]):
                    for name, column in judged.items():
                        found[video].setdefault(name, []).append(column[row].item())
                    if video in writers:
                        writers[video].append(frames[row])
                del frames  # the next ones need the memory
        judges = {**self.rewards, **self.held_out}
        return {video: VideoScores({name: fmean(parts[name]) for name in judges}, parts) for video, parts in found.items()}


def evaluate(
    config: Config,
    prompts: Sequence[Prompt],
    generators: Sequence[Adapted],
    out: Path,
    work: Work,
    *,
    world: World = ALONE,
) -> Evaluated | None:
    """Score what is not scored yet and what no other process is scoring; returns all that is scored, once all of it is there.

    None: batches of other shards are not there yet. A batch is on the disk before the next one begins. One of which only some videos are
    missing is made as a whole, so that rounding does not depend on where an earlier process was stopped.

    Args:
        config: generator, rewards, and the videos of each prompt and their noise, `evaluation.videos_per_prompt` and `.seed`.
        generators: of different names.
        out: the directory of scores and videos, see `ScoreDirectory`.
        work: which of it, and how.
        world: the ranks that begin the evaluation together; each one is a process like any other after that.

    Raises:
        UserError: the input cannot be used, or `out` holds something else; nothing was made.
        Interrupted: the user asked to stop; what is scored is kept.
    """
    evaluator = Evaluator(config, prompts, generators, world, work.segments)
    with world.in_turn("begin the evaluation"):
        directory = ScoreDirectory.create(out, evaluator.settings)
    log_to(out)
    scores = directory.read()
    directory.check(scores, prompts, evaluator.adapters)
    at_once = work.batch or videos_at_once(config)
    if work.segments is not None and work.batch is None:
        at_once = min(at_once, config.rollout.decode_branches or at_once)  # each has a state of the decoder, which is large
    parts = list(batches(generators, prompts, config.evaluation.videos_per_prompt, at_once))
    wanted = {video for part in parts for video in part}
    if known := len(wanted & scores.values.keys()):
        print(f"{known} of {len(wanted)} videos are scored already", file=sys.stderr)
    to_score = [part for part in parts[work.shard] if not scores.values.keys() >= {*part}]
    if to_score:
        evaluator.make_room(max(map(len, to_score)))
        new = {video for part in to_score for video in part} - scores.values.keys()
        print_size(evaluator, out, len(video_files(out, new, prompts, work.keep)))
    score_missing(evaluator, directory, to_score, work.keep, world)
    scores = directory.read()
    if missing := len(wanted - scores.values.keys()):
        print(f"{missing} of {len(wanted)} videos are left to other processes; the last one to end writes the table", file=sys.stderr)
        return None
    base = [BASE] if BASE in scores.adapters else []  # of an earlier command, perhaps
    return Evaluated(directory, scores, list(dict.fromkeys([*base, *evaluator.adapters])))


def merge_scores(directories: Sequence[Path], out: Path) -> ScoreDirectory:
    """Bring the scores of several directories together in `out`, which may be one of them; stderr names what a generator lacks.

    Raises:
        UserError: one of them is broken or is no evaluation, or they contradict each other.
    """
    sources = [ScoreDirectory.open(path) for path in directories]
    for source in sources:
        source.read()  # what is broken or contradicts itself is said before anything is written
    merged = ScoreDirectory.create(out, sources[0].settings)
    for source in sources:
        if source.path.resolve() != merged.path.resolve():
            merged.add_files(source)
    scores = merged.read()
    known = {(video.prompt, video.number) for video in scores.values}
    for name in scores.adapters:
        if missing := len(known) - len(scores.of(name)):
            print(f"{name} lacks {missing} of {len(known)} videos", file=sys.stderr)
    return merged


def score_missing(evaluator: Evaluator, directory: ScoreDirectory, batches: Sequence[list[Video]], keep: int | None, world: World) -> None:
    """Score the batches that no other process scores, wait for the others, and score what one that ended has left.

    Raises:
        Interrupted, RewardError, FramesNotFinite: see `evaluate`.
    """
    prompts, adapters, waiting = evaluator.prompts, evaluator.adapters, False

    def check() -> None:
        if interruption.asked:
            raise Interrupted(f"{progress.done} of {len(batches)} batches are scored and kept; the same command continues")

    def pause(others: int) -> None:
        nonlocal waiting
        check()
        if not waiting:
            print(f"waiting for {others} batches that other processes are making", file=sys.stderr)
        waiting = True
        time.sleep(POLL)

    with Interruption("the batch") as interruption, ScoreWriter(directory) as writer, Progress(len(batches), ranks=world.size) as progress:
        for part, scores in directory.unscored(batches, pause):
            check()
            progress.skip(sum(scores.values.keys() >= {*batch} for batch in batches) - progress.done)
            directory.check(scores, prompts, adapters)
            missing = [video for video in part if video not in scores.values]
            files = video_files(directory.path, missing, prompts, keep)
            for file in files.values():
                for left in file.parent.glob(f".{file.stem}.*"):  # by a process that was killed while it wrote
                    left.unlink()
            try:
                values = evaluator.score(part, files)
            except RewardError as error:
                raise type(error)(f"{error}; what is scored is kept, and the same command continues") from None
            except FramesNotFinite as error:
                raise FramesNotFinite(f"{part[0].generator}: {error}; what is scored is kept") from None
            writer.append([(video, prompts[video.prompt], values[video]) for video in missing], adapters)
            totals = [with_total(judged.whole, evaluator.config.rewards)[TOTAL] for judged in values.values()]
            progress.update(torch.tensor(totals).nanmean().item())


def prepare_text(generator: Generator, prompts: Sequence[Prompt], world: World) -> None:
    """Encode every prompt before the first video is made, so that the text encoder is gone by then, and what it cannot read is said now."""
    texts = list(dict.fromkeys(part.for_generator for prompt in prompts for _, part in prompt.parts))
    encode_ahead(generator.encode_text, texts, world)
    for text in texts:
        generator.encode_text([text])


# What is made, and what its scores depend on ---------------------------------------------------------------------------------------


def settings_of(config: Config, generator: Generator, judges: Mapping[str, Reward]) -> dict[str, Any]:
    """Return what every score depends on, by dotted keys. The generator has no adapter yet. judges: rewards and held-out metrics."""
    return describe(
        {
            "seed": config.evaluation.seed,
            "videos_per_prompt": config.evaluation.videos_per_prompt,  # a video's noise depends on it
            "weights": weights_digest(generator.model.state_dict()),
            "vae_weights": weights_digest(generator.decoder.vae.state_dict()),
            "text_encoder": generator.encode_text.fingerprint,
            "reward_servers.frames": config.reward_servers.frames,
            "video": config.video.model_dump(mode="json", exclude={"decode_frames"}),  # says how, not what
            **config.model_dump(mode="json", include={"sampler", "cache", "rewards"}),
            "generator": config.generator.model_dump(include={"dtype", "vae_dtype"}),  # its weights are above, its name may differ
            "code_and_weights": {name: judge.fingerprint(name) for name, judge in judges.items()},
        }
    )


def batches(generators: Sequence[Adapted], prompts: Sequence[Prompt], videos: int, size: int) -> Iterator[list[Video]]:
    """Yield all videos, generator by generator, cut into batches whose videos do not depend on what is done already.

    Videos whose prompts change at other frames are in other batches.
    """
    for adapted in generators:
        videos_of = [Video(adapted.name, place, index) for place in range(len(prompts)) for index in range(videos)]
        for _, alike in groupby(videos_of, lambda video: [part.frame for part in prompts[video.prompt].parts]):
            together = list(alike)
            for start in range(0, len(together), size):
                yield together[start : start + size]


def video_files(out: Path, videos: Iterable[Video], prompts: Sequence[Prompt], keep: int | None) -> dict[Video, Path]:
    """Return where videos that are kept lie: by their generator, the number and words of their prompt, and their own number."""
    files = {}
    for video in videos:
        if keep is None or video.prompt < keep:
            words = re.sub(r"\W+", "-", prompts[video.prompt].text.lower())[:48].strip("-")
            files[video] = out / "videos" / video.generator / f"{video.prompt:04d}-{words}-{video.number}.mp4"
    return files


def print_size(evaluator: Evaluator, out: Path, videos: int) -> None:
    """Print how much of the disk the videos take, before the first is made."""
    if not videos:
        return
    vae, shape = evaluator.vae, evaluator.shape
    pixels = vae.pixel_frames(shape.frames) * shape.height * shape.width * vae.spatial_factor**2
    size, free = videos * pixels * BITS_PER_PIXEL / 8, shutil.disk_usage(out).free
    amount = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    print(f"{videos} videos go to {out / 'videos'}: about {amount}, and {free / 1e9:.1f} GB are free", file=sys.stderr)
