"""Is everything here that a recipe needs? Packages, GPU and files: what is missing, how large it is, where to get it.

    python -m arcopo_fast.doctor [RECIPE] [key=value ...] [--verify] [--self-test]

Looks, downloads nothing and loads no weights; only --self-test loads the generator and the rewards, and tries on one small group what must
be true of any run: that the ratio is exactly 1, that replay is the rollout, that scores are the videos' own. Ends with 1 if a file is
missing or damaged, or a test fails.
"""

from __future__ import annotations

import sys

from arcopo_fast.cli import RecipeParser, run_command
from arcopo_fast.config.schema import Config
from arcopo_fast.planning.needs import environment, examine
from arcopo_fast.runtime.memory import tune_for_cpu

NOT_WELL = 1
"""The exit status where a file is missing or damaged, or a test fails."""


def command_line() -> RecipeParser:
    """Return the parser of the command line."""
    parser = RecipeParser("python -m arcopo_fast.doctor", "Say whether everything is here that a recipe needs.")
    parser.add_argument("--verify", action="store_true", help="read every large file whose published SHA-256 is known, and compare it")
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="try the method on one group of the recipe's generator and rewards, at its sizes, on its device; nothing is written",
    )
    return parser


def run_self_test(config: Config) -> bool:
    """Run the self-test and print its findings; returns whether all is well."""
    from arcopo_fast.training.selftest import self_test

    tune_for_cpu(config.train.threads)
    print("\nIts method, on one group:")
    holds = promising = True
    for finding in self_test(config):
        verdicts = {None: "note"} | ({True: "good", False: "POOR"} if finding.forecast else {True: "holds", False: "FAILS"})
        print(f"{verdicts[finding.holds]:7}  {finding.subject}: {finding.detail}", flush=True)
        holds &= finding.holds is not False or finding.forecast
        promising &= finding.holds is not False or not finding.forecast
    if not holds:
        print("something does not hold: a run would not train the generator as the method intends")
    elif not promising:
        print("the method holds, but a run would learn little: see what is POOR, and its remedy")
    else:
        print("everything holds")
    return holds and promising


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    command = command_line().read_config(argv)
    if command is None:
        return 0
    config, options = command
    print("\n".join(environment()))
    lines, well = examine(config, verify=options.verify)
    print("\n".join([f"\nThe recipe {config.name}:", *lines]))
    if options.self_test and well:
        well = run_self_test(config)
    return 0 if well else NOT_WELL


if __name__ == "__main__":
    sys.exit(run_command(main))
