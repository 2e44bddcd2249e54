"""The planner: a cost model that can tell plans apart, the fastest that fit, and what is printed of them. `test_footprint` counts bytes."""

from __future__ import annotations

from functools import cache

import pytest

from arcopo_fast.build import generator_sizes
from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.model.sizes import PUBLISHED
from arcopo_fast.planning import plan as planner
from arcopo_fast.planning.memory import CONTEXT, GB, Settings, estimate
from arcopo_fast.planning.plan import DEVICES, dry_run, plan, seconds
from arcopo_fast.planning.work import decode, forward
from benchmarks import full_size

FULL = PUBLISHED["1.3b"]
REWARD_OF_2B = 2 * 2 * 10**9
BUFFERED = ["train.mode=semi_on_policy", "train.buffer=somewhere"]


def bench(*overrides: str) -> Config:
    return load_config("bench_1_3b", overrides)


def close(value: float, expected: float, tolerance: float) -> bool:
    return abs(value - expected) <= tolerance * abs(expected)


# Time ------------------------------------------------------------------------------------------------------------------------------


def test_frames_that_are_encoded_again_are_decoded_first() -> None:
    """16 latent frames of a video, those of the prefix once."""
    again, (height, width) = ["cache.variant=krea", "cache.window=6"], (60, 104)
    for pivot, prefix in ((1, 0), (3, 4), (7, 16)):
        shared = decode(FULL.vae, height, width, prefix)
        own = decode(FULL.vae, height, width, 16 - prefix, start=not prefix)
        of_pivot = f"rollout.pivot={pivot}"
        more = seconds(bench(*again, of_pivot), FULL) - seconds(bench(*again, "cache.sink=1", of_pivot), FULL)
        assert close(more, (shared + own * 12).vae / planner.DECODER[2], 1e-6)


def test_the_time_of_a_run_on_a_buffer() -> None:
    """A clean pass of each chunk before the pivot; updates that all ask the reference; and a share of the evaluations."""
    many = ["train.iterations=1000000000"]

    def of(*overrides: str) -> float:
        return seconds(bench(*BUFFERED, *overrides), FULL)

    rebuilt = 2 * of(*many, "rollout.pivot=7", "objective.updates=1") - of(*many, "rollout.pivot=7", "objective.updates=2")
    work = forward(full_size.FULL, 3, 3) * 6  # linear layers and adapters do the same in every chunk
    attention = sum((part := forward(full_size.FULL, 3, 3 * chunk)).self_attention + part.cross_attention for chunk in range(1, 7))
    expected = work.linear / (planner.MATMUL[2] * planner.FILL[0][1]) + work.lora / planner.MATMUL[2] + attention / planner.ATTENTION[2]
    assert close(rebuilt, expected, 1e-3)
    evaluations = ["evaluation.prompts=4", "evaluation.videos_per_prompt=4", "train.iterations=10"]
    assert of(*evaluations) > of(*many) and of(*evaluations, "rollout.branches_per_wave=1") > of(*evaluations)
    assert of(*evaluations, "generator.offload=true") > of(*evaluations)
    assert close(of(*many), of(*many, "rollout.branches_per_wave=1"), 1e-6), "there are no waves"
    assert 16 * 0.9 < (of("train.iterations=1", "evaluation.prompts=16") - of(*many)) / (of("train.iterations=1") - of(*many)) < 16 * 1.1


def test_settings_that_save_memory_never_save_time() -> None:
    def of(*overrides: str) -> float:
        return seconds(bench(*overrides), FULL)

    assert of("rollout.branches_per_wave=1") > of("rollout.branches_per_wave=12")
    assert of("objective.checkpoint=true") > of()
    assert of("generator.offload=true") > of()
    assert of("objective.micro_batch=1") > of("objective.micro_batch=4")
    assert of("rollout.pivot=1") > of("rollout.pivot=7")
    # Where launches take the time, batches are all that counts.
    toy = load_config("toy")
    assert seconds(Settings(1, 12, 16, False, False).apply(toy), generator_sizes("toy")) > 2 * seconds(toy, generator_sizes("toy"))


# Plans -----------------------------------------------------------------------------------------------------------------------------


@cache
def all_plans(reward: int) -> list[planner.Plan]:
    return planner._plans(bench(), FULL, reward)


@pytest.mark.parametrize("gigabytes", DEVICES)
@pytest.mark.parametrize("reward", [0, REWARD_OF_2B])
def test_every_device_has_a_plan_that_its_overrides_reproduce(gigabytes: float, reward: int) -> None:
    found = plan(bench(), FULL, int(gigabytes * GB), reward_bytes=reward)
    assert found.estimate.peak <= gigabytes * GB * (1 - planner.MISSING)
    repeated = bench(*found.settings.overrides())
    assert Settings.of(repeated) == found.settings
    assert estimate(repeated, FULL, reward_bytes=reward) == found.estimate
    assert seconds(repeated, FULL, reward_bytes=reward) == found.seconds
    # Nothing that fits is faster by more than the model can tell.
    others = (each for each in all_plans(reward) if each.estimate.peak <= gigabytes * GB * (1 - planner.MISSING))
    assert found.seconds <= planner.EQUALLY_FAST * min(each.seconds for each in others)


def test_the_plans_one_expects() -> None:
    by_device = {size: planner._fastest(all_plans(0), int(size * GB)) for size in DEVICES}
    small, large = by_device[24].settings, by_device[141].settings
    assert small.branches_per_wave <= 2 and not small.offload
    assert large.branches_per_wave == 12 and not large.checkpoint and not large.offload
    rewarded = planner._fastest(all_plans(REWARD_OF_2B), 24 * GB).settings
    assert rewarded.checkpoint or rewarded.offload
    times = [by_device[size].seconds for size in DEVICES]
    assert times == sorted(times, reverse=True)
    assert estimate(bench(), FULL, reward_bytes=REWARD_OF_2B).peak < 80 * GB * (1 - planner.MISSING), "the recipe as it stands fits 80 GB"


def test_plans_of_a_run_on_a_buffer() -> None:
    """Nothing is swapped or made smaller than there is room for: evaluations take time."""
    config = bench(*BUFFERED, "evaluation.prompts=8", "evaluation.videos_per_prompt=4", "train.iterations=20")
    small, large = (plan(config, FULL, size * GB, reward_bytes=REWARD_OF_2B) for size in (24, 141))
    assert small.estimate.peak < 24 * GB and small.settings.branches_per_wave < 12
    assert not large.settings.offload and not large.settings.checkpoint and large.settings.branches_per_wave > 1
    assert large.seconds < small.seconds


def test_what_fits_nowhere_is_said() -> None:
    with pytest.raises(UserError, match=r"nothing fits 8 GB: .* stage .* needs \d+\.\d GB, \d+\.\d of it for .*; take a larger device"):
        plan(bench(), FULL, 8 * GB)
    with pytest.raises(UserError, match="nothing fits 24 GB: .*generator weights"):
        plan(bench("generator.checkpoint=random:14b"), PUBLISHED["14b"], 24 * GB)


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
    for part in ("generator weights", "predicted", "peak", "update", "As it stands, it needs a device of"):
        assert part in text
    assert "toy: 1." in dry_run(load_config("toy"))


def test_the_table_of_a_run_on_a_buffer() -> None:
    config = bench(*BUFFERED, "train.iterations=1000")
    text = dry_run(config, [24])
    assert "evaluation: reward" in text and "denoising a wave" not in text and "of the branches" not in text
    # 12 members at 4 steps of 1.1 MiB; 1000 iterations with 2 updates of 16 pairs.
    assert f"the host keeps 0.1 GB a group, {1000 * 32 * 4 * 3 * 16 * 60 * 104 / GB:.1f} GB in the run, at most" in text
    assert "Groups from a buffer" not in dry_run(bench(), [24])
