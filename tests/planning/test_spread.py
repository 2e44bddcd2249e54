"""The spread of an iteration over ranks."""

from __future__ import annotations

import pytest

from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.planning.spread import Spread, idle, spread


def config(groups: int, size: int = 12, kind: str = "auto") -> Config:
    return load_config("toy", [f"rollout.prompts_per_iteration={groups}", f"rollout.group_size={size}", f"train.spread={kind}"])


@pytest.mark.parametrize("kind", ["auto", "groups", "branches"])
@pytest.mark.parametrize("groups", [1, 24])
def test_one_process_has_all(kind: str, groups: int) -> None:
    assert spread(config(groups, kind=kind), 1) == (1, 1)


@pytest.mark.parametrize(
    ("groups", "ranks", "expected"),
    [(24, 24, (24, 1)), (24, 8, (8, 1)), (1, 8, (1, 8)), (4, 8, (4, 2)), (8, 8, (8, 1)), (3, 4, (1, 4)), (3, 2, (1, 2)), (1, 24, (2, 12))],
)
def test_the_busiest_rank_has_least_to_do(groups: int, ranks: int, expected: tuple[int, int]) -> None:
    """Groups where there are enough of them; else branches, so that nobody is idle."""
    assert spread(config(groups), ranks) == expected


def test_what_is_asked_for() -> None:
    assert spread(config(1, kind="groups"), 8) == (8, 1)
    assert spread(config(8, kind="branches"), 8) == (4, 2), "the smallest teams: every rank makes the prefix of its team's groups"
    with pytest.raises(UserError, match=r"train.spread=branches cannot spread the 4 branches of a group over 7 ranks"):
        spread(config(1, size=4, kind="branches"), 7)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 12, 24, 36])
@pytest.mark.parametrize("groups", [1, 2, 3, 5, 24])
@pytest.mark.parametrize("kind", ["auto", "groups", "branches"])
def test_every_group_and_every_branch_is_made_once(kind: str, groups: int, ranks: int) -> None:
    chosen = spread(config(groups, kind=kind), ranks)
    assert chosen.teams * chosen.ranks == ranks
    branches = chosen.branches(12)
    assert sum(branches) == 12 and min(branches) >= 1 and max(branches) - min(branches) <= 1
    made = [group for rank in range(0, ranks, chosen.ranks) for group in chosen.groups(rank, groups)]
    assert sorted(made) == list(range(groups))
    for rank in range(ranks):
        assert chosen.groups(rank, groups) == chosen.groups(rank - rank % chosen.ranks, groups), "a team has one list of groups"


def test_ranks_without_work_are_told() -> None:
    assert idle(config(4), 8) is None and idle(config(1), 1) is None and idle(config(1), 8) is None
    warning = idle(config(1, kind="groups"), 8)
    assert warning is not None and warning.startswith("7 of 8 ranks have nothing to roll out: rollout.prompts_per_iteration is 1")
    assert Spread(2, 4).work(config(2)) == 0.5 + 3
