"""The planner: the passes by which plans differ, the plans that fit, and what is printed of them. `test_memory` counts bytes."""

from __future__ import annotations

from functools import cache

import pytest

from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.model.families import SIZES
from arcopo_fast.planning import plan as planner
from arcopo_fast.planning.lockstep import check_lockstep
from arcopo_fast.planning.memory import CONTEXT, GB, Settings, estimate
from arcopo_fast.planning.plan import DEVICES, dry_run, passes, plan
from arcopo_fast.planning.spread import spread

FULL = SIZES["1.3b"]
JUDGE = "rewards.videoalign_vq=1.0"
WHOLE = ["rollout.branches_per_wave=null", "rollout.decode_branches=null", "objective.micro_batch=null"]
BUFFERED = ["train.mode=semi_on_policy", "train.buffer=somewhere"]


def bench(*overrides: str) -> Config:
    return load_config("bench_1_3b", overrides)


# Passes ----------------------------------------------------------------------------------------------------------------------------


def test_passes_are_the_parts_that_a_run_is_cut_into() -> None:
    """12 branches, 2 updates of 4 anchors at 4 steps."""
    assert passes(bench(*WHOLE), FULL) == (0, 0, 1, 1, 2)
    cut = ["rollout.branches_per_wave=5", "rollout.decode_branches=1", "objective.micro_batch=3"]
    assert passes(bench(*cut), FULL) == (0, 0, 3, 12, 12)
    assert passes(bench(*cut, "objective.checkpoint=true", "generator.offload=true"), FULL) == (12, 32, 3, 12, 12)


def test_the_passes_of_a_run_on_a_buffer() -> None:
    """It makes videos in its evaluations alone: 8 at once, if the pool of its groups holds them."""
    evaluations = ["evaluation.prompts=5", "evaluation.videos_per_prompt=4"]
    assert passes(bench(*BUFFERED, *WHOLE, *evaluations), FULL) == (0, 0, 3, 3, 2)
    sparing = passes(bench(*BUFFERED, *evaluations, "rollout.branches_per_wave=1", "rollout.decode_branches=1"), FULL)
    assert sparing.waves > 3 and sparing.slices == 20
    assert passes(bench(*BUFFERED, *WHOLE, *evaluations, "generator.offload=true"), FULL).trips == 3


def test_settings_that_save_memory_never_save_passes() -> None:
    def of(*overrides: str) -> tuple[int, ...]:
        return passes(bench(*overrides), FULL).cost(buffered=False)

    assert of("rollout.branches_per_wave=1") > of("rollout.branches_per_wave=12")
    assert of("objective.checkpoint=true") > of()
    assert of("generator.offload=true") > of()
    assert of("objective.micro_batch=1") > of("objective.micro_batch=4")
    assert of("generator.offload=true", *WHOLE) > of("objective.checkpoint=true", *WHOLE) > of("rollout.branches_per_wave=1")


def test_a_run_on_a_buffer_is_cut_in_its_evaluations_first() -> None:
    def of(*overrides: str) -> tuple[int, ...]:
        return passes(bench(*BUFFERED, *overrides), FULL).cost(buffered=True)

    assert of("objective.micro_batch=1") > of("rollout.branches_per_wave=1", "objective.micro_batch=4")
    assert of("objective.checkpoint=true") > of("generator.offload=true", "rollout.branches_per_wave=1")


# Plans -----------------------------------------------------------------------------------------------------------------------------


@cache
def all_plans(*overrides: str) -> list[planner.Plan]:
    return planner._plans(bench(*overrides), FULL, 1)


@pytest.mark.parametrize("gigabytes", DEVICES)
@pytest.mark.parametrize("overrides", [(), (JUDGE,)], ids=["no judge", "a judge"])
def test_every_device_has_a_plan_that_its_overrides_reproduce(gigabytes: float, overrides: tuple[str, ...]) -> None:
    found = plan(bench(*overrides), FULL, int(gigabytes * GB))
    assert found.estimate.peak <= gigabytes * GB * (1 - planner.SHORTFALL)
    repeated = bench(*overrides, *found.settings.overrides())
    assert Settings.of(repeated) == found.settings
    assert estimate(repeated, FULL) == found.estimate
    assert passes(repeated, FULL) == found.passes
    others = (each for each in all_plans(*overrides) if each.estimate.peak <= gigabytes * GB * (1 - planner.SHORTFALL))
    assert found.cost == min(each.cost for each in others), "nothing that fits takes fewer passes"


def test_the_plans_one_expects() -> None:
    by_device = {size: planner._best(all_plans(), int(size * GB)) for size in DEVICES}
    small, large = by_device[24].settings, by_device[141].settings
    assert small.branches_per_wave <= 2 and not small.offload
    assert large.branches_per_wave == 12 and not large.checkpoint and not large.offload
    rewarded = planner._best(all_plans(JUDGE), 24 * GB).settings
    assert rewarded.checkpoint or rewarded.offload
    costs = [by_device[size].cost for size in DEVICES]
    assert costs == sorted(costs, reverse=True)
    assert estimate(bench(JUDGE), FULL).peak < 80 * GB * (1 - planner.SHORTFALL), "the recipe as it stands fits 80 GB"


def test_plans_of_a_run_on_a_buffer() -> None:
    """Nothing is swapped or made smaller than there is room for."""
    config = bench(*BUFFERED, JUDGE, "evaluation.prompts=8", "evaluation.videos_per_prompt=4", "train.iterations=20")
    small, large = (plan(config, FULL, size * GB) for size in (24, 141))
    assert small.estimate.peak < 24 * GB and small.settings.branches_per_wave < 12
    assert not large.settings.offload and not large.settings.checkpoint and large.settings.branches_per_wave > 1
    assert large.cost < small.cost


def test_what_fits_nowhere_is_said() -> None:
    with pytest.raises(UserError, match=r"nothing fits 8 GB: .* stage .* needs \d+\.\d GB, \d+\.\d of it for .*; take a larger device"):
        plan(bench(), FULL, 8 * GB)
    with pytest.raises(UserError, match="nothing fits 24 GB: .*generator weights"):
        plan(bench("generator.checkpoint=random:14b"), SIZES["14b"], 24 * GB)


# What is printed -------------------------------------------------------------------------------------------------------------------


def test_a_run_that_needs_more_than_planned_is_told_by_how_much() -> None:
    planned = estimate(bench(), FULL).peak - CONTEXT
    assert planner.over_plan(bench(), planned) is None
    said = planner.over_plan(bench(), planned + GB)
    assert said is not None and "1.0 GB (" in said and "more than planned" in said and "--dry-run" in said


def test_the_table() -> None:
    text = dry_run(bench(), [24, 8, 80])
    lines = text.splitlines()
    header = next(line for line in lines if "as it stands" in line and "24 GB" in line)
    assert header.split("  ")[-1].strip() == "80 GB"
    branches = next(line for line in lines if line.startswith("rollout.branches_per_wave")).split()
    assert branches[1] == "4" and branches[3] == "-", "as the recipe has it; nothing fits 8 GB"
    assert any(line.startswith("8 GB: nothing fits 8 GB") for line in lines)
    assert any(line.startswith("24 GB: rollout.branches_per_wave=") for line in lines)
    assert max(len(line) for line in lines if ": nothing fits" not in line) <= 150
    for part in ("generator weights", "Predicted", "waves of branches", "peak", "update", "As it stands, it needs a device of"):
        assert part in text
    assert "toy: 1." in dry_run(load_config("toy"))


def test_the_table_of_one_of_several_ranks() -> None:
    """Whatever fits can be run: with divided weights all ranks make equally many passes."""
    config = bench("generator.shard=true", "rollout.group_size=10")
    text = dry_run(config, [24, 40], 8)
    assert "8 ranks in 1 team; 8 of them share each group: everything below is of one rank" in text
    assert "  generator weights, 1 / 8 " in text and "  weights gathered to work " in text
    small = planner.plan(config, FULL, 24 * GB, 8).settings.apply(config)
    check_lockstep(small, spread(small, 8))
    assert "generator.shard divides the weights among the ranks of a job: give their number with --ranks" in dry_run(config, [40])
    assert "4 ranks in 4 teams: everything" in dry_run(bench("rollout.prompts_per_iteration=4"), [40], 4)
    with pytest.raises(UserError, match="=3 does not divide evenly over 2 teams"):
        dry_run(bench("generator.shard=true", "rollout.prompts_per_iteration=3", "train.spread=groups"), [40], 2)


def test_many_groups_of_an_iteration_wait_in_host_memory() -> None:
    """They change the plan by nothing but the sum of their gradients."""
    one, many = (dry_run(bench(f"rollout.prompts_per_iteration={count}"), [80]) for count in (1, 24))
    told = "24 groups of an iteration, one after the other; they wait for its end in 5.0 GB of host memory."
    assert told in many.splitlines() and "host memory" not in one
    assert "sum of the groups' gradients, float64" in many and "keys and values of the branches" in many
    rows = [dict(line.rsplit(maxsplit=2)[::2] for line in text.splitlines() if line.startswith("  keys")) for text in (one, many)]
    assert rows[0] == rows[1]
    assert "host memory" not in dry_run(bench("rollout.prompts_per_iteration=24"), [80], ranks=24)


def test_the_table_of_a_run_on_a_buffer() -> None:
    config = bench(*BUFFERED, "train.iterations=1000")
    text = dry_run(config, [24])
    assert "evaluation: reward" in text and "denoising a wave" not in text and "of the branches" not in text
    # 12 members at 4 steps of 1.1 MiB; 1000 iterations with 2 updates of 16 pairs.
    assert f"the host keeps 0.1 GB a group, {1000 * 32 * 4 * 3 * 16 * 60 * 104 / GB:.1f} GB in the run, at most" in text
    assert "Groups from a buffer" not in dry_run(bench(), [24])
