"""Evaluate a generator with several adapters, each at several scales, on the same prompts and noises.

    python -m arcopo_fast.evaluate [RECIPE] [key=value ...] --adapter [NAME=]PATH[@SCALE,...] [--adapter ...] [--out DIR]
        [--prompts FILE [--extended FILE] [--limit N]] [--videos N] [--seed N] [--batch N] [--shard I/N] [--keep-videos all|none|N]
        [--frames N] [--segment N] [--switch FRAME:TEXT ...]
    python -m arcopo_fast.evaluate merge DIR [DIR ...] --out DIR

The generator without an adapter comes first; then every adapter at every scale is compared with it. It leaves

    DIR/  evaluation.json  claims  scores/*.jsonl  videos/<generator>/*.mp4  results.json  table.md

A video's noise is a function of the seed, its prompt's place and its own number: whatever adapter, batch or process makes it. It is that of
the same video in the evaluations before and after a training run, whose prompts, seed and number of videos are the defaults: the base model
then has the numbers of the run's `before`.
With --frames or --segment long videos are judged segment by segment while they are made, in the memory of one segment: how do scores run
along a video, and what drifts? Then it leaves report.html, too. Frames are counted in latents here, as in a recipe.

The same command continues where an earlier one ended, also with more adapters or prompts. Processes that share a directory, such as the
ranks of torchrun, share its work, batch by batch, and each waits for the rest; what one that ended has left is made by another (see
`evaluation.scores`).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from arcopo_fast.build import load_prompts
from arcopo_fast.cli import Parser, RecipeParser, finite, positive_int, run_command, seed, shard, switch
from arcopo_fast.config.schema import Config
from arcopo_fast.config.sections import expanded
from arcopo_fast.data.prompts import Prompt, Turn, read_prompt_set
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.adapters import AdapterOption, adapted_generators
from arcopo_fast.evaluation.evaluator import Work, evaluate, merge_scores
from arcopo_fast.evaluation.scores import BASE
from arcopo_fast.evaluation.segments import Segments
from arcopo_fast.planning.needs import fetch
from arcopo_fast.reports.evaluation import REPORT, write_results
from arcopo_fast.runtime.distributed import World
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.storage.atomic import check_out
from arcopo_fast.toy import data as toy_data

PROGRAM = "python -m arcopo_fast.evaluate"


def adapter_option(text: str) -> AdapterOption:
    """Convert an option (`type=`): [NAME=]PATH[@SCALE,...]."""
    match = re.fullmatch(r"(?:([\w.-]+)=)?(.+?)(?:@([-+.,\deE]+))?", text)
    if match is None or match[1] == BASE:
        raise argparse.ArgumentTypeError(
            f"expected [NAME=]PATH[@SCALE,...] with a NAME other than {BASE}, as in runs/on@0.5,1; given {text!r}"
        )
    return AdapterOption(match[1], expanded(match[2]), tuple(finite(scale) for scale in (match[3] or "1").split(",")))


def keep_option(text: str) -> int | None:
    """Convert an option (`type=`): all, none or a number."""
    if not re.fullmatch(r"all|none|\d+", text):
        raise argparse.ArgumentTypeError(f"expected all, none, or the number of prompts whose videos are kept; given {text!r}")
    return {"all": None, "none": 0}[text] if text.isalpha() else int(text)


def command_line() -> RecipeParser:
    """Return the parser of the command line."""
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
        "SCALE dW (default: 1). Repeat the option for more adapters",
    )
    parser.add_argument(
        "--no-base", action="store_true", help="leave out the generator without an adapter, which is the base of all comparisons"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="a text file with a prompt on each line, JSON lines of {prompt, extended}, or a CSV file with a column prompt: its path, or "
        "hf://datasets/WenhaoWang/VidProM/VidProM_unique.csv or github://facebookresearch/MovieGenBench/benchmark/MovieGenVideoBench.txt, "
        "or toy or bench (default: those that the recipe keeps for evaluation). VidProM and MovieGen Video Bench are not part of this "
        "package: their licenses (CC BY-NC) do not allow commercial use",
    )
    parser.add_argument(
        "--extended",
        metavar="FILE",
        help="a longer form of each line of --prompts, in the same order, as a language model writes it: the generator reads it; rewards "
        "and file names use the line of --prompts",
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="the first N of --prompts (default: all)")
    parser.add_argument(
        "--videos", type=positive_int, metavar="N", help="videos of each prompt; the same as evaluation.videos_per_prompt=N"
    )
    parser.add_argument("--seed", type=seed, metavar="N", help="seed of the noise; the same as evaluation.seed=N")
    parser.add_argument(
        "--batch", type=positive_int, metavar="N", help="videos that are made at once (default: 8, or as many as a run's pages hold)"
    )
    parser.add_argument(
        "--shard",
        type=shard,
        default="0/1",
        metavar="I/N",
        help="make only batches I, I + N, I + 2 N, ..., counted from 0: for N processes with the same --batch and no common disk. "
        "Processes with the same --out share the work without this option (default: 0/1)",
    )
    _add_long_videos(parser)
    parser.add_argument(
        "--keep-videos",
        type=keep_option,
        metavar="all|none|N",
        help="scored videos that are written as mp4: all, none, or those of the first N prompts (default: all)",
    )
    parser.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="directory of all results")
    return parser


def _add_long_videos(parser: RecipeParser) -> None:
    """Add the options that long videos have."""
    parser.add_argument(
        "--frames",
        type=positive_int,
        metavar="N",
        help="latent frames of long videos, which are judged segment by segment; what is no whole segment at their end is left out "
        "(default: the recipe's videos)",
    )
    parser.add_argument(
        "--segment",
        type=positive_int,
        metavar="N",
        help="latent frames of a segment of a long video, each of which is judged by itself (default: as many as the recipe's videos have)",
    )
    parser.add_argument(
        "--switch",
        action="append",
        type=switch,
        default=[],
        metavar="FRAME:TEXT",
        help="change to another prompt at this latent frame of every long video, or at the next one that begins a chunk. Repeat the option "
        "for more changes. A set of prompts may have changes of its own: JSON lines of {prompts: [...], frames: [0, ...]}",
    )


def merge_command_line() -> Parser:
    """Return the parser of `evaluate merge`."""
    parser = Parser(
        f"{PROGRAM} merge",
        "Make one evaluation, and its table, of several with the same settings. Videos stay where they are.",
        one_process=True,
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="the --out directory of an evaluation, finished or not")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for all their scores; it may be one of them")
    return parser


def merge(argv: list[str]) -> None:
    """Bring the scores of several directories together."""
    options = merge_command_line().read(argv)
    if options is None:
        return
    check_out(options.out)
    merged = merge_scores(options.directories, options.out)
    print(write_results(merged, merged.read()))
    print_files(merged.path)


def print_files(out: Path) -> None:
    """Print where the results lie."""
    print(f"results: {out / 'results.json'}")
    if (out / REPORT).exists():
        print(f"report: {out / REPORT}")


def settings_from(options: Any) -> list[str]:
    """The settings that --videos and --seed stand for. Samples are those of a training run's report."""
    given = {"videos_per_prompt": options.videos, "seed": options.seed, "sample_videos": 0}
    return [f"evaluation.{name}={value}" for name, value in given.items() if value is not None]


def prompts_of(config: Config, options: Any) -> list[Prompt]:
    """Those that the command line names, or else the recipe's for evaluation; with the changes that it names."""
    if options.prompts is None:
        if options.extended or options.limit:
            raise UserError(
                f"--{'extended' if options.extended else 'limit'} goes with --prompts; name the set of prompts, or leave it out"
            )
        prompts = load_prompts(config).evaluation
    elif options.prompts == "toy" and options.extended is None:
        prompts = [Prompt(text) for text in toy_data.all_captions()]
    else:
        prompts = read_prompt_set(options.prompts, options.extended, turns=True)
    prompts = prompts[: options.limit]
    changing = next((prompt for prompt in prompts if prompt.turns), None)
    if changing and options.switch:
        raise UserError(f"--switch changes every video, but {changing.text!r} is followed by prompts of its own; leave one of them out")
    turns = tuple(Turn(frame, Prompt(text)) for frame, text in sorted(options.switch))
    return [prompt._replace(turns=turns) for prompt in prompts] if turns else prompts


def main(argv: list[str]) -> None:
    """Run the command."""
    if argv[:1] == ["merge"]:
        merge(argv[1:])
        return
    command = command_line().read_config(argv, settings_from, lambda options: Path(options.adapter[0].path) if options.adapter else None)
    if command is None:
        return
    config, options = command
    generators = adapted_generators(options.adapter, base=not options.no_base)
    if not generators:
        raise UserError("--no-base leaves nothing to evaluate; name an adapter with --adapter, or leave --no-base out")
    prompts, segments = prompts_of(config, options), None
    if options.frames or options.segment:
        config, segments = Segments.of(config, options.frames, options.segment)
    elif any(prompt.turns for prompt in prompts):
        given = "--switch" if options.switch else "the set of prompts"
        raise UserError(f"{given} has prompts change within a video, which only long videos do; give --frames or --segment, too")
    check_out(options.out)
    tune_for_cpu(config.train.threads)
    with World.joined() as world:
        fetch(config, world, "generator.", "rewards.")
        work = Work(options.batch, options.shard, options.keep_videos, segments)
        found = evaluate(config, prompts, generators, options.out, work, world=world)
        world.meet_after_work("finish the evaluation")
        if found is not None and world.is_main:
            print(write_results(*found))
            print_files(options.out)


if __name__ == "__main__":
    sys.exit(run_command(main))
