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
processes may share the work, by --shard or as the ranks of torchrun; `generate --prompt EXTENDED --seed SEED` with a seed of the manifest
makes the same one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from arcopo_fast.build import load_generator
from arcopo_fast.cli import Parser, RecipeParser, add_lora_options, positive_int, run_command, run_subcommand, scale_of, shard
from arcopo_fast.cli import seed as seed_option
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.vbench.data import (
    DIMENSIONS,
    INFO,
    RESULTS,
    VIDEOS_PER_PROMPT,
    manifest,
    read_extended,
    read_info,
    read_scores,
    videos_of,
)
from arcopo_fast.evaluation.vbench.sampling import begin, make_videos, sampling_of, source_of
from arcopo_fast.evaluation.vbench.scorer import Scorer, score_dimensions
from arcopo_fast.model.lora import load_adapter
from arcopo_fast.planning.needs import fetch
from arcopo_fast.reports.vbench import write_total
from arcopo_fast.runtime.distributed import World
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.runtime.rank_console import log_to
from arcopo_fast.storage.atomic import check_out
from arcopo_fast.storage.hub import find

PROGRAM = "python -m arcopo_fast.vbench"


def sample(argv: list[str]) -> None:
    """Run `vbench sample`."""
    command = sample_command_line().read_config(argv, run_of=lambda options: options.lora)
    if command is None:
        return
    config, options = command
    scale = scale_of(options)
    if options.originals and not options.extended:
        raise UserError("--originals names the prompts that --extended extends; give --extended too, or leave --originals out")
    path = Scorer.find(options.python).info if options.python and not options.info else find(options.info or INFO)
    info = read_info(path)
    extension = find(options.extended) if options.extended else None
    originals = find(options.originals) if options.originals else None
    extended = read_extended(extension, info, originals) if extension else None
    seed = config.seed if options.seed is None else options.seed
    prompts = manifest(info, extended, seed, options.videos)
    check_out(options.out)
    tune_for_cpu(config.train.threads)
    sources = {
        "checkpoint": config.generator.checkpoint,
        "adapter": {"path": str(options.lora), "scale": scale} if options.lora else None,
        "seed": seed,
        "prompts": source_of(path),
        "extended": source_of(extension) if extension else None,
    }
    with World.joined() as world:
        fetch(config, world, "generator.")
        generator = load_generator(config)
        if options.lora:
            load_adapter(generator.model, options.lora, scale=scale)
        with world.in_turn("begin the videos"):
            directory = begin(options.out, prompts, sampling_of(config, generator, prompts), sources)
        log_to(options.out)
        videos = videos_of(prompts, options.dimensions)[options.shard]
        make_videos(config, generator, videos, directory, batch=options.batch, world=world)
        world.meet_after_work("finish the videos")
    print(directory)


# Scoring them ----------------------------------------------------------------------------------------------------------------------


def score(argv: list[str]) -> None:
    """Run `vbench score`."""
    options = score_command_line().read(argv)
    if options is None:
        return
    videos = options.videos.absolute()
    out = (options.out or videos.parent / "results").absolute()
    scorer = Scorer.find(options.python, options.info)
    info = read_info(scorer.info)
    check_out(out)
    out.mkdir(parents=True, exist_ok=True)
    score_dimensions(scorer, info, options.dimensions, videos, out, per_prompt=options.per_prompt, ngpus=options.ngpus)
    print(out)


# The total -------------------------------------------------------------------------------------------------------------------------


def total(argv: list[str]) -> None:
    """Run `vbench total`."""
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
    print(write_total(out, results), end="")


# The command -----------------------------------------------------------------------------------------------------------------------


def dimensions(text: str) -> tuple[str, ...]:
    """Convert an option (`type=`): dimensions, separated by commas."""
    names = tuple(text.split(","))
    if strange := [name for name in names if name not in DIMENSIONS]:
        raise argparse.ArgumentTypeError(f"there is no dimension {strange[0]!r}; they are {', '.join(DIMENSIONS)}")
    return names


def _add_dimensions(parser: Parser) -> None:
    parser.add_argument(
        "--dimensions",
        type=dimensions,
        default=",".join(DIMENSIONS),
        metavar="A,B",
        help="dimensions that videos are made for, or scored on",
    )


def sample_command_line() -> RecipeParser:
    """Return the parser of `vbench sample`."""
    parser = RecipeParser(f"{PROGRAM} sample", "Make the videos.", default="toy; with --lora RUN the config.yaml of that run")
    parser.add_argument(
        "--info", metavar="FILE", help=f"VBench_full_info.json, a path or published (default: that of --python, else {INFO})"
    )
    parser.add_argument("--python", type=Path, metavar="PATH", help="interpreter of the environment that has vbench")
    parser.add_argument("--extended", metavar="FILE", help="generate from extended prompts, one on each line; a path or published")
    parser.add_argument("--originals", metavar="FILE", help="the prompts that --extended extends, line by line (default: as in --info)")
    _add_dimensions(parser)
    parser.add_argument(
        "--videos",
        type=positive_int,
        default=VIDEOS_PER_PROMPT,
        metavar="N",
        help="videos of each prompt; five times N for temporal flickering",
    )
    add_lora_options(parser, "a run's directory, an adapter's directory, its file, or published")
    parser.add_argument("--seed", type=seed_option, metavar="N", help="seed that the videos' seeds come from (default: the recipe's)")
    parser.add_argument("--batch", type=positive_int, default=1, metavar="N", help="videos that are made at once")
    parser.add_argument(
        "--shard", type=shard, default="0/1", metavar="I/N", help="make every N-th video, from the I-th on, with I from 0 to N - 1"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("vbench"), metavar="DIR", help="directory of the results, see above; shards share it"
    )
    return parser


def score_command_line() -> Parser:
    """Return the parser of `vbench score`."""
    parser = Parser(f"{PROGRAM} score", "Score videos with VBench's own scorer.", one_process=True)
    parser.add_argument("--python", type=Path, required=True, metavar="PATH", help="interpreter of the environment that has vbench")
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="the directory of the mp4s")
    parser.add_argument("--info", type=Path, metavar="FILE", help="VBench_full_info.json (default: that of the environment)")
    _add_dimensions(parser)
    parser.add_argument("--per-prompt", type=positive_int, default=VIDEOS_PER_PROMPT, metavar="N", help="videos that each prompt must have")
    parser.add_argument("--ngpus", type=positive_int, default=1, metavar="N", help="GPUs of the scorer")
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory of the results (default: results, beside the videos)")
    return parser


def total_command_line() -> Parser:
    """Return the parser of `vbench total`."""
    parser = Parser(f"{PROGRAM} total", "Quality, semantic and total score.", one_process=True)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS", help="a directory of results, two to compare, or files")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where vbench.json (from 0 to 1) and vbench.md (per cent) go (default: beside the last results)",
    )
    return parser


COMMANDS: dict[str, Callable[[list[str]], None]] = {"sample": sample, "score": score, "total": total}


def main(argv: list[str]) -> None:
    """Run the command."""
    run_subcommand(PROGRAM, __doc__, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
