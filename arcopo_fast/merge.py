"""Merge a semi-on-policy and an on-policy adapter into one: W + dW_semi + s dW_on.

    python -m arcopo_fast.merge --semi RUN --on RUN --scale 0.8 --out DIR
    python -m arcopo_fast.merge --semi RUN --on RUN --sweep 0,0.2,0.4,0.6,0.8,1 --out DIR [RECIPE] [key=value ...]

The merge is exact: B and A are concatenated along the rank (`model.lora.merge_adapters`). The sweep generates the same videos, by prompt
and noise, at every scale and with the base model, and chooses the scale by AR-CoPO's dual criterion: the largest at which the
in-domain score (the weighted sum of the rewards) and the out-of-domain score (the mean of the held-out metrics, each in standard deviations
of the base's videos) are both above the base's.
It leaves

    DIR/  evaluations/{baseline,scale-S}.json   sweep.json  sweep.md  sweep.html   adapter/, of the chosen scale, if there is one

An evaluation is kept as soon as it is done; the same command continues from there, also with other scales.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from arcopo_fast.cli import RecipeParser, adapter_path, numbers, run_command
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.adapters import Pair
from arcopo_fast.evaluation.sweep import ADAPTER, MERGE, sweep
from arcopo_fast.reports.sweep import write_merged, write_sweep
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.storage.atomic import check_out
from arcopo_fast.storage.locks import owned


def merge(pair: Pair, scale: float, out: Path, *, overwrite: bool = False) -> None:
    """Write the merged adapter to `out`, complete or not at all.

    Args:
        overwrite: replace an earlier merge in `out`.

    Raises:
        UserError: the adapters are not of one base model, or `out` cannot be written or holds something else.
    """
    check_out(out)
    if out.exists() and any(out.iterdir()):
        if not (out / MERGE).is_file():
            raise UserError(f"{out} holds something else than a merged adapter (it has no {MERGE}); give another --out")
        if not overwrite:
            raise UserError(f"{out} holds a merged adapter already; give another --out, or replace it with --overwrite")
    write_merged(out, pair, scale)


def choose(config: Config, pair: Pair, options: Any) -> None:
    """Evaluate at several scales, and write what comes of it."""
    tune_for_cpu(config.train.threads)
    check_out(options.out)
    with owned(options.out):
        found = sweep(config, pair, options.sweep, options.out, held_out=options.held_out, overwrite=options.overwrite)
        print(write_sweep(options.out, config, found))
    print(f"report: {options.out / 'sweep.html'}")
    if found.chosen:
        print(f"adapter: {options.out / ADAPTER}")


def command_line() -> RecipeParser:
    """Return the parser of the command line."""
    prog = "python -m arcopo_fast.merge"
    parser = RecipeParser(
        prog,
        "Merge a semi-on-policy and an on-policy adapter, W + dW_semi + s dW_on: at one scale, or at the best of several. A recipe and "
        "settings say how --sweep evaluates.",
        default="the config.yaml of the --on run",
        one_process=True,
    )
    parser.usage = f"{prog} --semi PATH --on PATH (--scale S | --sweep S,S,...) --out DIR [recipe] [key.sub=value ...] [options]"
    where = "a run's directory, an adapter's directory or a file of weights"
    semi_help = f"the semi-on-policy adapter, taken whole: {where}"
    parser.add_argument("--semi", type=adapter_path, required=True, metavar="PATH", help=semi_help)
    parser.add_argument("--on", type=adapter_path, required=True, metavar="PATH", help=f"the on-policy adapter, which is scaled: {where}")
    scales = parser.add_mutually_exclusive_group(required=True)
    scales.add_argument("--scale", type=numbers, metavar="S", help="s in dW_semi + s dW_on; the paper: 0.8 for Self-Forcing")
    scales.add_argument(
        "--sweep",
        type=numbers,
        metavar="S,S,...",
        help="evaluate the base model, scale 0 (the semi-on-policy adapter alone) and these scales on the same prompts and noises, and "
        "merge at the largest scale at which in-domain and out-of-domain score are both above the base model's",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory of the merged adapter, or of all results of a sweep"
    )
    parser.add_argument(
        "--held-out",
        type=lambda text: tuple(filter(None, text.split(","))),
        metavar="NAME,...",
        default=(),
        help="with --sweep: the metrics whose mean is the out-of-domain score (default: all that the generator's world has)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge, or start an earlier sweep again")
    return parser


def main(argv: list[str]) -> None:
    """Run the command."""
    parser = command_line()
    options = parser.read(argv)
    if options is None:
        return
    if options.scale is not None:
        if len(options.scale) > 1:
            raise UserError("--scale takes one number; give several to --sweep")
        if options.settings or options.held_out or options.print_config:
            raise UserError("--scale evaluates nothing: a recipe, settings, --held-out and --print-config go with --sweep; leave them out")
        merge(Pair.read(options.semi, options.on), options.scale[0], options.out, overwrite=options.overwrite)
        print(f"adapter: {options.out}")
        return
    command = parser.read_config(argv, run_of=on_policy_run)
    if command is None:
        return
    choose(command[0], Pair.read(options.semi, options.on), options)


def on_policy_run(options: Any) -> Path:
    """Return the run by whose recipe a sweep evaluates, where the command line names none."""
    if not (options.on / "config.yaml").is_file():
        raise UserError(f"{options.on} is not a run's directory (it has no config.yaml), so name the recipe by which the sweep evaluates")
    return options.on


if __name__ == "__main__":
    sys.exit(run_command(main))
