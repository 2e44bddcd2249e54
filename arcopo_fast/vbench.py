"""VBench: make its videos, score them with its own scorer in the scorer's environment, and work out its total.

    python -m arcopo_fast.vbench sample [RECIPE] [key=value ...] [--info FILE | --python PYTHON] [--extended FILE [--originals FILE]]
        [--lora PATH [--lora-scale S]] [--dimensions A,B] [--videos N] [--seed N] [--batch N] [--shard I/N] [--out DIR]
    python -m arcopo_fast.vbench score --python PYTHON --videos DIR/videos [--info FILE] [--dimensions A,B] [--per-prompt N] [--ngpus N]
        [--out DIR/results]
    python -m arcopo_fast.vbench total DIR/results [DIR/results] [--out DIR]

    DIR/manifest.jsonl   every prompt, with its dimensions, its extended form, and the seed of each of its videos
    DIR/sampling.json    what the videos were made with; another setting needs another DIR
    DIR/videos/          {prompt}-{index}.mp4, and nothing else: VBench takes the ending of its first file for that of all
    DIR/results/         {dimension}_eval_results.json, as the official scripts and the leaderboard take them, and the scorer's output
    DIR/results_static/  the videos that temporal flickering is scored on

`sample` and `score` go on where they were when they are called again. A video is a function of (seed, prompt, index), so any number of
processes may share the work; `generate --prompt EXTENDED --seed SEED` with a seed of the manifest makes the same one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from arcopo_fast.build import Generator, encode_ahead, load_generator
from arcopo_fast.cli import Parser, RecipeParser, adapter_path, finite, positive_int, run_command, run_subcommand, shard
from arcopo_fast.cli import seed as seed_option
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.vbench.data import (
    DIMENSIONS,
    INFO,
    RESULTS,
    VIDEOS_PER_PROMPT,
    Video,
    manifest,
    read_extended,
    read_info,
    read_scores,
    table,
    videos_of,
)
from arcopo_fast.evaluation.vbench.scorer import Scorer, score_dimension
from arcopo_fast.generate import sized_engine, stream_frames
from arcopo_fast.model.lora import load_adapter
from arcopo_fast.rollout.noise import KeyedNoise, StackedNoise
from arcopo_fast.runtime.console import Interrupted, Interruption, Progress
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.storage.atomic import atomic_write, check_out
from arcopo_fast.storage.hub import find
from arcopo_fast.storage.identity import digest, file_digest, require_same, weights_digest
from arcopo_fast.storage.video import Mp4Writer

PROGRAM = "python -m arcopo_fast.vbench"


# Making the videos -----------------------------------------------------------------------------------------------------------------


def sampling_of(config: Config, generator: Generator, prompts: str) -> dict[str, Any]:
    """What makes the videos what they are. prompts: the manifest. The adapter, if any, is loaded."""
    return {
        "weights": weights_digest(generator.model),
        "vae_weights": weights_digest(generator.decoder.vae),
        "text_encoder": generator.encode_text.fingerprint,
        "manifest": digest(prompts),
        "video": config.video.model_dump(exclude={"decode_frames"}),
        "sampler": config.sampler.model_dump(),
        "cache": config.cache.model_dump(),
        "dtype": config.generator.dtype,
        "vae_dtype": config.generator.vae_dtype,
    }


def begin(out: Path, prompts: str, sampling: Mapping[str, Any], sources: Mapping[str, Any]) -> Path:
    """The directory for the videos, with the manifest and what they are made with beside it.

    sources: where all that came from, to be read by people.

    Raises:
        UserError: there are videos of something else.
    """
    record = out / "sampling.json"
    if record.is_file():
        earlier = json.loads(record.read_text(encoding="utf-8"))["sampling"]
        require_same(f"{out} has videos of something else (see {record})", earlier, sampling, "give another --out")
    (out / "videos").mkdir(parents=True, exist_ok=True)
    atomic_write(out / "manifest.jsonl", prompts)
    atomic_write(record, json.dumps({"sampling": sampling, "sources": sources}, indent=2) + "\n")
    return out / "videos"


def make_videos(config: Config, generator: Generator, videos: Sequence[Video], directory: Path, *, batch: int) -> None:
    """Make those videos that are not in the directory yet. A video's noise depends on its seed alone.

    batch: videos that are made at once.

    Raises:
        Interrupted: the user asked to stop; the videos at hand were finished.
    """
    missing = [video for video in videos if not (directory / video.file).exists()]
    if not missing:
        return
    encode_ahead(generator.encode_text, [video.text for video in missing])
    batch = min(batch, len(missing))
    engine = sized_engine(config, generator, batch, longer=False)
    with Interruption("the videos at hand") as interruption, Progress(len(videos), len(videos) - len(missing)) as progress:
        for start in range(0, len(missing), batch):
            if interruption.asked:
                raise Interrupted(f"{progress.done} of {len(videos)} videos are made; the same command makes the others")
            part = missing[start : start + batch]
            text = generator.encode_text([video.text for video in part])
            noise = StackedNoise([KeyedNoise(engine.shape.chunk, video.seed) for video in part])
            with ExitStack() as stack:
                writers = [stack.enter_context(Mp4Writer(directory / video.file, config.video.fps, smallest_side=1)) for video in part]
                for chunk in stream_frames(generator, engine, text, noise, offload=config.generator.offload):
                    for writer, frames in zip(writers, chunk):
                        writer.append(frames)
            for _ in part:
                progress.update()


def sample(argv: list[str]) -> None:
    command = sample_command_line().read_config(argv, run_of=lambda options: options.lora)
    if command is None:
        return
    config, options = command
    if options.lora_scale is not None and options.lora is None:
        raise UserError("--lora-scale scales an adapter; name it with --lora, or leave the scale out")
    if options.originals and not options.extended:
        raise UserError("--originals says what --extended extends; give that too, or leave it out")
    path = Scorer.find(options.python).info if options.python and not options.info else find(options.info or INFO)
    info = read_info(path)
    extension = find(options.extended) if options.extended else None
    originals = find(options.originals) if options.originals else None
    extended = read_extended(extension, info, originals) if extension else None
    seed = config.seed if options.seed is None else options.seed
    prompts = manifest(info, extended, seed, options.videos)
    check_out(options.out)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    tune_for_cpu()
    generator = load_generator(config)
    scale = 1.0 if options.lora_scale is None else options.lora_scale
    if options.lora:
        load_adapter(generator.model, options.lora, scale=scale)
    sources = {
        "checkpoint": config.generator.checkpoint,
        "adapter": {"path": str(options.lora), "scale": scale} if options.lora else None,
        "seed": seed,
        "prompts": _source(path),
        "extended": _source(extension) if extension else None,
    }
    directory = begin(options.out, prompts, sampling_of(config, generator, prompts), sources)
    videos = videos_of(prompts, options.dimensions)[options.shard]
    make_videos(config, generator, videos, directory, batch=options.batch)
    print(directory)


def _source(path: Path) -> dict[str, str]:
    return {"path": str(path), "sha256": file_digest(path)}


# Scoring them ----------------------------------------------------------------------------------------------------------------------


def score(argv: list[str]) -> None:
    options = score_command_line().read(argv)
    if options is None:
        return
    videos = options.videos.absolute()
    out = (options.out or videos.parent / "results").absolute()
    scorer = Scorer.find(options.python, options.info)
    info = read_info(scorer.info)
    check_out(out)
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for dimension in options.dimensions:
        try:
            score_dimension(scorer, info, dimension, videos, out, per_prompt=options.per_prompt, ngpus=options.ngpus)
        except UserError as error:  # four of the dimensions need what is hard to install: the others need not wait for that
            print(f"{dimension}: {error}", file=sys.stderr)
            failed.append(dimension)
    if failed:
        raise UserError(f"not scored: {', '.join(failed)}; the reasons are above, and the same command tries these again")
    print(out)


# The total -------------------------------------------------------------------------------------------------------------------------


def total(argv: list[str]) -> None:
    options = total_command_line().read(argv)
    if options is None:
        return
    directories = [path for path in options.results if path.is_dir()]
    if len(directories) > 2 or (directories and len(directories) < len(options.results)):
        raise UserError("expected one directory of results, two to compare, or files that hold the 16 dimensions together")
    groups = {str(path): sorted(path.glob(f"*{RESULTS}")) for path in directories} or {"results": options.results}
    results = {name: read_scores(files) for name, files in groups.items()}
    out = options.out or options.results[-1].absolute().parent
    check_out(out)
    out.mkdir(parents=True, exist_ok=True)
    written = table(results)
    atomic_write(out / "vbench.json", json.dumps({name: scores.summary() for name, scores in results.items()}, indent=2) + "\n")
    atomic_write(out / "vbench.md", written)
    print(written, end="")


# The command -----------------------------------------------------------------------------------------------------------------------


def dimensions(text: str) -> tuple[str, ...]:
    """For `type=` of an option: dimensions, separated by commas."""
    names = tuple(text.split(","))
    if strange := [name for name in names if name not in DIMENSIONS]:
        raise argparse.ArgumentTypeError(f"there is no dimension {strange[0]!r}; they are {', '.join(DIMENSIONS)}")
    return names


def _add_dimensions(parser: Parser) -> None:
    parser.add_argument(
        "--dimensions", type=dimensions, default=",".join(DIMENSIONS), metavar="A,B", help="that videos are made for, or scored on"
    )


def sample_command_line() -> RecipeParser:
    parser = RecipeParser(f"{PROGRAM} sample", "Make the videos.", default="toy; with --lora RUN the config.yaml of that run")
    parser.add_argument(
        "--info", metavar="FILE", help=f"VBench_full_info.json, a path or published (default: that of --python, else {INFO})"
    )
    parser.add_argument("--python", type=Path, metavar="PATH", help="interpreter of the environment that has vbench")
    parser.add_argument("--extended", metavar="FILE", help="generate from extended prompts, one on each line; a path or published")
    parser.add_argument("--originals", metavar="FILE", help="the prompts that --extended extends, line by line (default: as in --info)")
    _add_dimensions(parser)
    parser.add_argument(
        "--videos", type=positive_int, default=VIDEOS_PER_PROMPT, metavar="N", help="of each prompt; five times N for temporal flickering"
    )
    parser.add_argument(
        "--lora", type=adapter_path, metavar="PATH", help="an adapter: a run's directory, an adapter's directory, its file, or published"
    )
    parser.add_argument("--lora-scale", type=finite, metavar="S", help="W + S dW (default: 1)")
    parser.add_argument("--seed", type=seed_option, metavar="N", help="that the videos' seeds come from (default: the recipe's seed)")
    parser.add_argument("--batch", type=positive_int, default=1, metavar="N", help="videos that are made at once")
    parser.add_argument(
        "--shard", type=shard, default="0/1", metavar="I/N", help="make every N-th of the videos, from the I-th on, I from 0 to N - 1"
    )
    parser.add_argument("--out", type=Path, default=Path("vbench"), metavar="DIR", help="see above; shards share it")
    return parser


def score_command_line() -> Parser:
    parser = Parser(f"{PROGRAM} score", "Score videos with VBench's own scorer.")
    parser.add_argument("--python", type=Path, required=True, metavar="PATH", help="interpreter of the environment that has vbench")
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="the directory of the mp4s")
    parser.add_argument("--info", type=Path, metavar="FILE", help="VBench_full_info.json (default: that of the environment)")
    _add_dimensions(parser)
    parser.add_argument(
        "--per-prompt", type=positive_int, default=VIDEOS_PER_PROMPT, metavar="N", help="videos of each prompt that must be there"
    )
    parser.add_argument("--ngpus", type=positive_int, default=1, metavar="N", help="GPUs of the scorer")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go (default: results, beside the videos)")
    return parser


def total_command_line() -> Parser:
    parser = Parser(f"{PROGRAM} total", "Quality, semantic and total score.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS", help="a directory of results, two to compare, or files")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where vbench.json (from 0 to 1) and vbench.md (per cent) go (default: beside the last one)"
    )
    return parser


COMMANDS: dict[str, Callable[[list[str]], None]] = {"sample": sample, "score": score, "total": total}


def main(argv: list[str]) -> None:
    run_subcommand(PROGRAM, __doc__, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
