"""The recipes with which weights can be divided: those with equally many passes on every rank."""

from __future__ import annotations

import pytest

from arcopo_fast.config.reading import load_config
from arcopo_fast.errors import UserError
from arcopo_fast.planning.lockstep import check_lockstep
from arcopo_fast.planning.spread import Spread

ONE_EACH, TEAM = Spread(4, 1), Spread(1, 4)
COPO = ["rollout.group_size=12", "objective.anchors_per_update=4", "sampler.steps=[1000,350,200,100]"]  # 16 samples of an update


@pytest.mark.parametrize(
    ("spread", "settings"),
    [
        (ONE_EACH, ["rollout.prompts_per_iteration=4"]),
        (ONE_EACH, ["rollout.prompts_per_iteration=8", "rollout.pivot=2", "objective.micro_batch=3", "rollout.branches_per_wave=5"]),
        (TEAM, ["rollout.prompts_per_iteration=3", "rollout.pivot=per_group"]),
        (TEAM, ["train.mode=semi_on_policy", "train.buffer=somewhere"]),
        (TEAM, ["rollout.group_size=10"]),  # 3, 3, 2 and 2 branches, in one wave each
        (TEAM, ["rollout.branches_per_wave=2", "objective.micro_batch=3"]),  # twice 2 of 3 branches; 3 and 1 of 4 samples
        (Spread(2, 2), ["rollout.prompts_per_iteration=2", "objective.skip_last_step=true"]),
    ],
)
def test_what_can_be(spread: Spread, settings: list[str]) -> None:
    check_lockstep(load_config("toy", [*COPO, *settings]), spread)


@pytest.mark.parametrize(
    ("spread", "settings", "said"),
    [
        (ONE_EACH, ["rollout.prompts_per_iteration=6"], "=6 does not divide evenly over 4 teams of 1; give a multiple of 4"),
        (ONE_EACH, ["rollout.prompts_per_iteration=4", "rollout.pivot=per_group"], "set rollout.pivot=shared"),
        (
            ONE_EACH,
            ["rollout.prompts_per_iteration=4", "train.mode=semi_on_policy", "train.buffer=somewhere"],
            "groups of a buffer fork at chunks of their own; take train.spread=branches",
        ),
        (TEAM, ["rollout.group_size=10", "rollout.branches_per_wave=2"], "the 10 branches .* set rollout.group_size to a multiple of 4"),
        (TEAM, ["objective.anchors_per_update=1", "objective.skip_last_step=true"], "the 3 samples .* ranks that divides 3$"),
        (TEAM, ["objective.steps=0.75", "objective.anchors_per_update=2", "objective.micro_batch=1"], "the 6 samples .*micro_batch=null$"),
        (TEAM, ["rollout.cuda_graphs=on"], "set rollout.cuda_graphs=auto or off"),
    ],
)
def test_what_cannot_be(spread: Spread, settings: list[str], said: str) -> None:
    with pytest.raises(UserError, match=f"^generator.shard asks for equally many passes on all ranks, but .*{said}"):
        check_lockstep(load_config("toy", [*COPO, *settings]), spread)
