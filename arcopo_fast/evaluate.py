"""Evaluate a generator with several adapters, each at several scales, on the same prompts and noises.

    python -m arcopo_fast.evaluate [RECIPE] [key=value ...] --adapter [NAME=]PATH[@SCALE,...] [--adapter ...] [--out DIR]
        [--prompts FILE [--extended FILE] [--limit N]] [--videos N] [--seed N] [--batch N] [--shard I/N] [--keep-videos all|none|N]
    python -m arcopo_fast.evaluate merge DIR [DIR ...] --out DIR

The generator without an adapter comes first; then every adapter at every scale is compared with it. It leaves

    DIR/  evaluation.json  claims  scores/*.jsonl  videos/<generator>/*.mp4  results.json  table.md

A video's noise is a function of the seed, its prompt's place and its own number: whatever adapter, batch or process makes it. It is that of
the same video in the evaluations before and after a training run, whose prompts, seed and number of videos are the defaults: the base model
then has the numbers of the run's `before`.
The same command goes on where an earlier one ended, also with more adapters or prompts. Processes that share one directory share the work,
batch by batch, and each waits for the rest; what one that ended has left is made by another (see `runtime.scores`).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from arcopo_fast.build import Generator, encode_ahead, load_generator, load_held_out, load_prompts, load_rewards
from arcopo_fast.cli import Parser, RecipeParser, finite, positive_int, run_command, seed, shard
from arcopo_fast.config.schema import Config, expanded
from arcopo_fast.data.prompts import Prompt, read_prompt_set
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.adapters import Adapted, AdapterOption, adapted_generators, prepare_adapters
from arcopo_fast.evaluation.compare import Result, as_json, compare, with_total
from arcopo_fast.evaluation.judging import judge, videos_at_once
from arcopo_fast.evaluation.scores import BASE, ScoreDirectory, Scores, ScoreWriter, Video
from arcopo_fast.generate import sized_engine
from arcopo_fast.model.lora import set_adapter
from arcopo_fast.model.sizes import VAESizes
from arcopo_fast.reports.evaluation import as_markdown
from arcopo_fast.rewards.base import FramesNotFinite, Reward, RewardError
from arcopo_fast.rollout.engine import VideoShape
from arcopo_fast.runtime.console import Interrupted, Interruption, Progress
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.storage.atomic import atomic_write, check_out
from arcopo_fast.storage.identity import describe, weights_digest
from arcopo_fast.storage.metrics import TOTAL
from arcopo_fast.storage.video import write_mp4
from arcopo_fast.toy import data as toy_data

PROGRAM = "python -m arcopo_fast.evaluate"
BITS_PER_PIXEL = 0.8
"""Of an mp4 as `runtime.video` writes it. An assumption, for the line about the disk; pictures with little in them take less."""
POLL = 0.2
"""Seconds between two looks at what other processes make."""


class Evaluator:
    """Makes and scores videos: the generator, which takes one adapter after the other, and what judges it."""

    def __init__(self, config: Config, prompts: Sequence[Prompt], generators: Sequence[Adapted]) -> None:
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        self.config = config
        self.prompts = prompts
        self.generators = {one.name: one for one in generators}
        self.rewards = load_rewards(config)
        self.generator = load_generator(config)
        self.held_out = load_held_out(self.generator)
        self.shape = VideoShape.of(config.video, self.generator.model.config.in_channels)
        self.settings = settings_of(config, self.generator, {**self.rewards, **self.held_out})
        self.adapters = {one.name: one.identity for one in generators}
        self._current: str | None = None
        prepare_adapters(self.generator.model, [one.source for one in generators if one.source])
        prepare_text(self.generator, prompts)

    def make_room(self, videos: int) -> None:
        """For so many videos at once; before `score`."""
        self.engine = sized_engine(self.config, self.generator, videos, longer=False)

    def score(self, videos: Sequence[Video], files: Mapping[Video, Path]) -> dict[Video, dict[str, float]]:
        """The scores of a batch, of one generator's videos; those that have a file are written to it.

        Raises:
            RewardError, FramesNotFinite: see `rewards.base.score`.
        """
        if self._current != videos[0].generator:
            self._current = videos[0].generator
            adapted = self.generators[self._current]
            set_adapter(self.generator.model, adapted.adapter, adapted.scale)
        prompts = [self.prompts[video.prompt] for video in videos]
        groups = [video.prompt * self.config.evaluation.videos_per_prompt + video.number for video in videos]
        values: dict[Video, dict[str, float]] = {}
        rewards = {**self.rewards, **self.held_out}
        for frames, judged in judge(self.config, self.generator, self.engine, prompts, groups, rewards):
            for row, video in enumerate(videos[len(values) : len(values) + len(frames)]):
                values[video] = {name: column[row].item() for name, column in judged.items()}
                if video in files:
                    files[video].parent.mkdir(parents=True, exist_ok=True)
                    write_mp4(files[video], frames[row], self.config.video.fps)
            del frames  # the next ones need the memory
        return values


def evaluate(
    config: Config,
    prompts: Sequence[Prompt],
    generators: Sequence[Adapted],
    out: Path,
    *,
    batch: int | None = None,
    shard: slice = slice(None),
    keep: int | None = None,
) -> list[Result] | None:
    """Score what is not scored yet and what no other process is scoring; once all is there, write the table.

    None: batches of other shards are not there yet. A batch is on the disk before the next one begins. One of which only some videos are
    missing is made as a whole, so that rounding does not depend on where an earlier process was stopped.

    Args:
        config: generator, rewards, and the videos of each prompt and their noise, `evaluation.videos_per_prompt` and `.seed`.
        generators: of different names.
        out: see the module's docstring.
        batch: videos that are made at once; None: as an evaluation of a training run does.
        shard: the batches that are this process's.
        keep: prompts, from the first, of which videos are written; None: of all.

    Raises:
        UserError: the input cannot be used, or `out` holds something else; nothing was made.
        Interrupted: the user asked to stop; what is scored is kept.
    """
    evaluator = Evaluator(config, prompts, generators)
    directory = ScoreDirectory.create(out, evaluator.settings)
    scores = directory.read()
    directory.check(scores, prompts, evaluator.adapters)
    batch = batch or videos_at_once(config)
    parts = list(batches(generators, prompts, config.evaluation.videos_per_prompt, batch))
    wanted = {video for part in parts for video in part}
    if known := len(wanted & scores.values.keys()):
        print(f"{known} of {len(wanted)} videos are scored already", file=sys.stderr)
    mine = [part for part in parts[shard] if not scores.values.keys() >= {*part}]
    if mine:
        evaluator.make_room(max(map(len, mine)))
        new = {video for part in mine for video in part} - scores.values.keys()
        say_size(evaluator, out, len(video_files(out, new, prompts, keep)))
    score_missing(evaluator, directory, mine, keep)
    scores = directory.read()
    if missing := len(wanted - scores.values.keys()):
        print(f"{missing} of {len(wanted)} videos are left to other processes; the last one to end writes the table", file=sys.stderr)
        return None
    base = [BASE] if BASE in scores.adapters else []  # of an earlier command, perhaps
    return write_results(directory, scores, list(dict.fromkeys([*base, *evaluator.adapters])))


def score_missing(evaluator: Evaluator, directory: ScoreDirectory, batches: Sequence[list[Video]], keep: int | None) -> None:
    """Score the batches that no other process scores, wait for the others, and score what one that ended has left.

    Raises:
        Interrupted, RewardError, FramesNotFinite: see `evaluate`.
    """
    prompts, adapters, waiting = evaluator.prompts, evaluator.adapters, False

    def check() -> None:
        if interruption.asked:
            raise Interrupted(f"{progress.done} of {len(batches)} batches are scored and kept; the same command goes on")

    def pause(others: int) -> None:
        nonlocal waiting
        check()
        if not waiting:
            print(f"waiting for {others} batches that other processes are making", file=sys.stderr)
        waiting = True
        time.sleep(POLL)

    with Interruption("the batch") as interruption, ScoreWriter(directory) as writer, Progress(len(batches)) as progress:
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
                raise type(error)(f"{error}; what is scored is kept, and the same command goes on") from None
            except FramesNotFinite as error:
                raise FramesNotFinite(f"{part[0].generator}: {error}; what is scored is kept") from None
            writer.append([(video, prompts[video.prompt], values[video]) for video in missing], adapters)
            progress.update(torch.tensor([with_total(one, evaluator.config.rewards)[TOTAL] for one in values.values()]).nanmean().item())


# The generator with its adapters ---------------------------------------------------------------------------------------------------


def prepare_text(generator: Generator, prompts: Sequence[Prompt]) -> None:
    """Encode every prompt before the first video is made, so that the text encoder is gone by then, and what it cannot read is said now."""
    texts = list(dict.fromkeys(prompt.for_generator for prompt in prompts))
    encode_ahead(generator.encode_text, texts)
    for text in texts:
        generator.encode_text([text])


# What is made, and what its scores depend on ---------------------------------------------------------------------------------------


def settings_of(config: Config, generator: Generator, judges: Mapping[str, Reward]) -> dict[str, Any]:
    """What every score depends on, by dotted keys. The generator has no adapter yet. judges: rewards and held-out metrics."""
    return describe(
        {
            "seed": config.evaluation.seed,
            "videos_per_prompt": config.evaluation.videos_per_prompt,  # a video's noise depends on it
            "weights": weights_digest(generator.model),
            "vae_weights": weights_digest(generator.decoder.vae),
            "text_encoder": generator.encode_text.fingerprint,
            "reward_servers.frames": config.reward_servers.frames,
            "video": config.video.model_dump(mode="json", exclude={"decode_frames"}),  # says how, not what
            **config.model_dump(mode="json", include={"sampler", "cache", "rewards"}),
            "generator": config.generator.model_dump(include={"dtype", "vae_dtype"}),  # its weights are above, its name may differ
            "code_and_weights": {name: judge.fingerprint(name) for name, judge in judges.items()},
        }
    )


def batches(generators: Sequence[Adapted], prompts: Sequence[Prompt], videos: int, size: int) -> Iterator[list[Video]]:
    """All videos, generator by generator, cut into batches whose videos do not depend on what is done already."""
    for one in generators:
        every = [Video(one.name, place, index) for place in range(len(prompts)) for index in range(videos)]
        for start in range(0, len(every), size):
            yield every[start : start + size]


def video_files(out: Path, videos: Iterable[Video], prompts: Sequence[Prompt], keep: int | None) -> dict[Video, Path]:
    """Where videos that are kept lie: by their generator, the number and words of their prompt, and their own number."""
    files = {}
    for video in videos:
        if keep is None or video.prompt < keep:
            words = re.sub(r"\W+", "-", prompts[video.prompt].text.lower())[:48].strip("-")
            files[video] = out / "videos" / video.generator / f"{video.prompt:04d}-{words}-{video.number}.mp4"
    return files


def say_size(evaluator: Evaluator, out: Path, videos: int) -> None:
    """How much of the disk the videos take, before the first is made."""
    if not videos:
        return
    vae, shape = VAESizes.from_config(evaluator.generator.decoder.vae.config), evaluator.shape
    pixels = vae.pixel_frames(shape.frames) * shape.height * shape.width * vae.spatial_factor**2
    size, free = videos * pixels * BITS_PER_PIXEL / 8, shutil.disk_usage(out).free
    amount = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    print(f"{videos} videos go to {out / 'videos'}: about {amount}, and {free / 1e9:.1f} GB are free", file=sys.stderr)


def write_results(directory: ScoreDirectory, scores: Scores, generators: Sequence[str] | None = None) -> list[Result]:
    """Write results.json and table.md, and print the table. generators: those shown, in this order; None: all."""
    weights = {key.removeprefix("rewards."): value for key, value in directory.settings.items() if key.startswith("rewards.")}
    results = compare(scores, weights, generators)
    shown = list(dict.fromkeys(result.generator for result in results))
    document = {
        "settings": directory.settings,
        "prompts": len(scores.prompts),
        "adapters": {name: scores.adapters[name] for name in shown},
        "results": as_json(results),
    }
    atomic_write(directory.path / "results.json", json.dumps(document, indent=2, allow_nan=False) + "\n")
    table = as_markdown(results)
    atomic_write(directory.path / "table.md", f"# Evaluation\n\n{table}")
    print(table)
    return results


# The command -----------------------------------------------------------------------------------------------------------------------


def adapter_option(text: str) -> AdapterOption:
    """For `type=` of an option: [NAME=]PATH[@SCALE,...]."""
    match = re.fullmatch(r"(?:([\w.-]+)=)?(.+?)(?:@([-+.,\deE]+))?", text)
    if match is None or match[1] == BASE:
        raise argparse.ArgumentTypeError(
            f"expected [NAME=]PATH[@SCALE,...] with a NAME other than {BASE}, as in runs/on@0.5,1; given {text!r}"
        )
    return AdapterOption(match[1], expanded(match[2]), tuple(finite(scale) for scale in (match[3] or "1").split(",")))


def keep_option(text: str) -> int | None:
    """For `type=` of an option: all, none or a number."""
    if not re.fullmatch(r"all|none|\d+", text):
        raise argparse.ArgumentTypeError(f"expected all, none, or the number of prompts whose videos are kept; given {text!r}")
    return {"all": None, "none": 0}[text] if text.isalpha() else int(text)


def command_line() -> RecipeParser:
    parser = RecipeParser(
        PROGRAM,
        "Evaluate a generator without and with adapters, on the same prompts and noises. `merge DIR ... --out DIR` makes one table of what "
        "processes without a common disk have scored.",
        default="toy; with --adapter RUN the config.yaml of the first one",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        type=adapter_option,
        default=[],
        metavar="[NAME=]PATH[@SCALE,...]",
        help="a run's directory, an adapter's directory (PEFT or diffusers) or its file, or hf://owner/name; compared at each scale, W + "
        "SCALE dW (default: 1); once for each adapter",
    )
    parser.add_argument("--no-base", action="store_true", help="leave out the generator without an adapter, with which all are compared")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="a text file with a prompt on each line, JSON lines of {prompt, extended}, or a CSV file with a column prompt: its path, or "
        "hf://datasets/WenhaoWang/VidProM/VidProM_unique.csv or github://facebookresearch/MovieGenBench/benchmark/MovieGenVideoBench.txt, "
        "or toy or bench (default: those that the recipe keeps for evaluation). VidProM and MovieGen Video Bench are not part of this "
        "package: their licences (CC BY-NC) do not allow commercial use",
    )
    parser.add_argument(
        "--extended",
        metavar="FILE",
        help="what a language model has made of each line of --prompts, in the same order: the generator reads it, rewards and file names "
        "keep to the line of --prompts",
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="the first N of --prompts (default: all)")
    parser.add_argument("--videos", type=positive_int, metavar="N", help="of each prompt; the same as evaluation.videos_per_prompt=N")
    parser.add_argument("--seed", type=seed, metavar="N", help="of the noise; the same as evaluation.seed=N")
    parser.add_argument(
        "--batch", type=positive_int, metavar="N", help="videos that are made at once (default: 8, or as the pages of a run hold)"
    )
    parser.add_argument(
        "--shard",
        type=shard,
        default="0/1",
        metavar="I/N",
        help="of all batches, counted from 0, make I, I + N, I + 2 N ...: for N processes with the same --batch and no common disk; those "
        "with the same --out share the work without it (default: 0/1)",
    )
    parser.add_argument(
        "--keep-videos",
        type=keep_option,
        metavar="all|none|N",
        help="write every video that is scored, none, or those of the first N prompts, as mp4 (default: all)",
    )
    parser.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="where everything is written")
    return parser


def merge_command_line() -> Parser:
    parser = Parser(
        f"{PROGRAM} merge", "Make one evaluation, and its table, of several with the same settings. Videos stay where they are."
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="the --out of an evaluation, finished or not")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the scores are brought together; may be one of them")
    return parser


def merge(argv: list[str]) -> None:
    """Bring the scores of several directories together."""
    options = merge_command_line().read(argv)
    if options is None:
        return
    check_out(options.out)
    sources = [ScoreDirectory.open(path) for path in options.directories]
    for source in sources:
        source.read()  # what is broken or contradicts itself is said before anything is written
    merged = ScoreDirectory.create(options.out, sources[0].settings)
    for source in sources:
        if source.path.resolve() != merged.path.resolve():
            merged.add_files(source)
    scores = merged.read()
    every = {(video.prompt, video.number) for video in scores.values}
    for name in scores.adapters:
        if lacking := len(every) - len(scores.of(name)):
            print(f"{name} lacks {lacking} of {len(every)} videos", file=sys.stderr)
    write_results(merged, scores)
    print(f"results: {merged.path / 'results.json'}")


def settings_from(options: Any) -> list[str]:
    """The settings that --videos and --seed stand for. Samples are those of a training run's report."""
    given = {"videos_per_prompt": options.videos, "seed": options.seed, "sample_videos": 0}
    return [f"evaluation.{name}={value}" for name, value in given.items() if value is not None]


def prompts_of(config: Config, options: Any) -> list[Prompt]:
    """Those that the command line names, or else the recipe's for evaluation."""
    if options.prompts is None:
        if options.extended or options.limit:
            raise UserError(
                f"--{'extended' if options.extended else 'limit'} goes with --prompts; name the set of prompts, or leave it out"
            )
        return load_prompts(config).evaluation
    if options.prompts == "toy" and options.extended is None:
        prompts = [Prompt(text) for text in toy_data.all_captions()]
    else:
        prompts = read_prompt_set(options.prompts, options.extended)
    return prompts[: options.limit]


def main(argv: list[str]) -> None:
    if argv[:1] == ["merge"]:
        merge(argv[1:])
        return
    command = command_line().read_config(argv, settings_from, lambda options: Path(options.adapter[0].path) if options.adapter else None)
    if command is None:
        return
    config, options = command
    generators = adapted_generators(options.adapter, base=not options.no_base)
    if not generators:
        raise UserError("--no-base leaves nothing to evaluate; name an adapter with --adapter, or leave it out")
    prompts = prompts_of(config, options)
    check_out(options.out)
    tune_for_cpu()
    keep = options.keep_videos
    if evaluate(config, prompts, generators, options.out, batch=options.batch, shard=options.shard, keep=keep) is not None:
        print(f"results: {options.out / 'results.json'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
