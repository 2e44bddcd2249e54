"""Measure which noise decides: replace one noise tensor of a chunk, freeze every other draw, and measure the change (AR-CoPO, Figure 6).

    python -m arcopo_fast.entropy [RECIPE] [key=value ...] [--prompts N] [--draws N] [--adapter DIR] [--out DIR]

For every pivot chunk the initial noise and each re-noise are replaced in turn. In few-step autoregressive generators the initial noise
decides; where it does not, AR-CoPO has nothing to explore with. The results lie in one directory:

    entropy.json  entropy.md  entropy.html  entropy.png  pivot-1.png ... pivot-L.png

entropy.json is written anew after each pivot of each prompt: an interrupted study goes on from there, and one that is done can be given
more prompts.
"""

from __future__ import annotations

import sys
from pathlib import Path

from arcopo_fast.cli import RecipeParser, adapter_path, positive_int, run_command
from arcopo_fast.evaluation.study import study_noise
from arcopo_fast.reports.entropy import write_results
from arcopo_fast.runtime.memory import tune_for_cpu


def command_line() -> RecipeParser:
    """Return the parser of the command line."""
    parser = RecipeParser(
        "python -m arcopo_fast.entropy", "Which noise decides what a generator shows (AR-CoPO, Figure 6).", one_process=True
    )
    parser.add_argument(
        "--prompts",
        type=positive_int,
        metavar="N",
        default=8,
        help="number of prompts to measure, evaluation prompts first; those already in DIR count",
    )
    parser.add_argument("--draws", type=positive_int, metavar="N", default=2, help="independent replacements of every noise tensor")
    parser.add_argument("--adapter", type=adapter_path, metavar="DIR", help="study the generator with this adapter (default: without)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory of the results; a study that it holds is continued (default: entropy/<the recipe's name>)",
    )
    return parser


def main(argv: list[str]) -> None:
    """Run the command."""
    command = command_line().read_config(argv)
    if command is None:
        return
    config, options = command
    tune_for_cpu(config.train.threads)
    directory = options.out or Path("entropy") / config.name
    study = study_noise(config, prompts=options.prompts, draws=options.draws, adapter=options.adapter, directory=directory)
    print(write_results(study, config.name))
    print(f"figure: {directory / 'entropy.html'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
