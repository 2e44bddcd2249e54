"""Is everything here that a recipe needs? Packages, GPU and files: what is missing, how large it is, where to get it.

    python -m arcopo_fast.doctor [RECIPE] [key=value ...] [--verify] [--self-test]

    torchrun --nproc_per_node=8 -m arcopo_fast.doctor ...       also: can these ranks train together?

Looks, downloads nothing and loads no weights; only --self-test loads the generator and the rewards, and tries on one small group what must
be true of any run: that the ratio is exactly 1, that replay is the rollout, that scores are the videos' own. Several ranks load the
generator to compare it, measure the sum of a gradient, and with --self-test try an update together. Ends with 1 if a file is missing or
damaged, or a test fails.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from arcopo_fast.cli import RecipeParser, run_command
from arcopo_fast.config.schema import Config
from arcopo_fast.planning.needs import environment, examine
from arcopo_fast.runtime.distributed import World
from arcopo_fast.runtime.memory import tune_for_cpu

if TYPE_CHECKING:
    from arcopo_fast.training.findings import Finding

NOT_WELL = 1
"""The exit status where a file is missing or damaged, or a test fails."""


def command_line() -> RecipeParser:
    """Return the parser of the command line."""
    parser = RecipeParser("python -m arcopo_fast.doctor", "Say whether everything is here that a recipe needs.")
    parser.add_argument("--verify", action="store_true", help="read every large file whose published SHA-256 is known, and compare it")
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="try the method on one group of the recipe's generator and rewards, at its sizes, on its device, and where there are several "
        "ranks one update of all of them; nothing is written",
    )
    return parser


def say(findings: Iterable[Finding], world: World) -> bool:
    """Print findings as they come, and what they come to; return whether all is well, on every rank."""
    failed, holds, promising = [], True, True
    for finding in findings:
        verdicts = {None: "note"} | ({True: "good", False: "POOR"} if finding.forecast else {True: "holds", False: "FAILS"})
        print(f"{verdicts[finding.holds]:7}  {finding.subject}: {finding.detail}", flush=True)
        if finding.holds is False:
            failed.append(finding)
    own = {finding.subject for finding in failed}
    for finding, ranks in _elsewhere(world.gathered(failed)):
        holds, promising = holds and finding.forecast, promising and not finding.forecast
        if finding.subject not in own:
            print(f"{'POOR' if finding.forecast else 'FAILS':7}  {finding.subject}, on rank {ranks}: {finding.detail}")
    if not holds:
        print("something does not hold: a run would not train the generator as the method intends")
    elif not promising:
        print("the method holds, but a run would learn little: see what is POOR, and its remedy")
    else:
        print("everything holds")
    return holds and promising


def _elsewhere(failed: Sequence[Iterable[Finding]]) -> list[tuple[Finding, str]]:
    """Return each subject's first finding, and the numbers of the ranks whose findings of it failed."""
    found: dict[str, tuple[Finding, list[str]]] = {}
    for rank, findings in enumerate(failed):
        for finding in findings:
            found.setdefault(finding.subject, (finding, []))[1].append(str(rank))
    return [(finding, ", ".join(ranks)) for finding, ranks in found.values()]


def run_self_test(config: Config, world: World) -> bool:
    """Try the method on one group, on every rank by itself; return whether all is well."""
    from arcopo_fast.training.selftest import self_test

    print("\nIts method, on one group:")
    return say(self_test(config), world)


def run_rank_test(config: Config, world: World, *, update: bool) -> bool:
    """Try whether the ranks can train together; return whether all is well."""
    from arcopo_fast.training.ranktest import rank_test

    print("\nIts ranks:")
    return say(rank_test(config, world, update=update), world)


def files(config: Config, world: World, *, verify: bool) -> bool:
    """Say which files of a recipe are here, and on which ranks that is otherwise; return whether all are everywhere."""
    lines, well = examine(config, verify=verify)
    print("\n".join([f"\nThe recipe {config.name}:", *lines]))
    everybodys = world.gathered((lines, well))
    for rank, (others, _) in enumerate(everybodys):
        if others != lines:
            print("\n".join(f"rank {rank}: {line}" for line in others))
    return all(good for _, good in everybodys)


def diagnose(config: Config, options: Any, world: World) -> bool:
    """Examine everything that the options ask for, as far as it makes sense; return whether all is well."""
    print("\n".join(environment()))
    well = files(config, world, verify=options.verify)
    tune_for_cpu(config.train.threads)
    if well and not world.alone:
        well = run_rank_test(config, world, update=options.self_test)
    if well and options.self_test and config.generator.shard and not world.alone:
        print("\nIts method was not tried: no rank has the whole generator. Try it with generator.shard=false where there is room.")
    elif well and options.self_test:
        well = run_self_test(config, world)
    return well


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    command = command_line().read_config(argv)
    if command is None:
        return 0
    config, options = command
    with World.joined(config.train.rank_timeout) as world:
        return 0 if diagnose(config, options, world) else NOT_WELL


if __name__ == "__main__":
    sys.exit(run_command(main))
