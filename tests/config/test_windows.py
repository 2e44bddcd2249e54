"""Windows of rewards in a recipe: what does not go together is refused, in a line that says what to do."""

from __future__ import annotations

import pytest
from support.recipes import load, message

from arcopo_fast.config.reading import resolved_yaml

REWARDS = "rewards={a: 2.0, b: 0.0}"


def windows(*described: str) -> str:
    return "judge.windows={" + ", ".join(described) + "}"


def test_scores_are_named_and_weighted_by_window() -> None:
    assert load(REWARDS).score_weights == {"a": 2.0, "b": 0.0} and load(REWARDS).judge.described() == ""
    config = load(
        REWARDS, windows("local: {chunks: [0, 0], before: 6}", "global: {chunks: [0, null], before: null, weight: 0.5, rewards: [a]}")
    )
    assert config.score_weights == {"local/a": 2.0, "local/b": 0.0, "global/a": 1.0}
    assert load(REWARDS, "judge.windows.near.chunks=[0, 0]").score_weights == {"near/a": 2.0, "near/b": 0.0}
    assert "global × 0.5: chunks 0 to the end" in config.judge.described() and "judge:" in resolved_yaml(config)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([windows("w: {chunks: [1, 0]}")], "judge.windows.w.chunks: the last chunk of a window lies before its first; given [1, 0]"),
        ([windows("w: {chunks: [0, -1]}")], "judge.windows.w.chunks[1]: expected a whole number >= 0; given -1"),
        ([windows("w: {chunks: [0]}")], "the key judge.windows.w.chunks[1] is missing"),
        ([windows("w: {chunk: [0, 0]}")], "unknown key judge.windows.w.chunk; did you mean judge.windows.NAME.chunks?"),
        ([windows("w: 3")], "judge.windows.w: expected a section with the keys chunks, before, weight, rewards; given 3"),
        ([windows("w/v: {chunks: [0, 0]}")], "a window's name is made of letters, digits, '_' and '-'"),
        ([windows("w: {chunks: [0, 0], rewards: [c]}")], "has 'c', which is not among the rewards a, b; give it a weight in rewards"),
        ([windows("w: {chunks: [0, 0], rewards: []}")], "judge.windows.w.rewards: expected"),
        ([windows("w: {chunks: [0, 0], rewards: [a]}")], "the reward 'b' judges no window; add it"),
        ([windows("w: {chunks: [0, 0], weight: 0}")], "needs at least one window with a weight other than 0"),
        (
            [windows("w: {chunks: [0, 0], rewards: [b]}", "v: {chunks: [0, 0], weight: 0, rewards: [a]}")],
            "no score has a weight other than 0",
        ),
        ([windows("w: {chunks: [0, 0]}"), "judge.before=3"], "judge.before 3 is of the only window"),
        (["judge.warmup=0"], "judge.warmup: expected a whole number >= 1 or all; given 0"),
        (["rollout.horizon=1", windows("w: {chunks: [0, 2]}")], "rollout.horizon 1 and L = "),
        (["rollout.horizon=1", windows("w: {chunks: [2, 2]}")], "1 to 1 follow the pivot's; give a first chunk of at most 1"),
        ([windows("w: {chunks: [1, 1]}")], "0 to "),  # some pivot is the last chunk
    ],
)
def test_what_is_refused(overrides: list[str], told: str) -> None:
    assert told in message(REWARDS, *overrides)


def test_a_window_that_every_branch_reaches_is_taken() -> None:
    assert load(REWARDS, "rollout.horizon=1", windows("w: {chunks: [1, 1]}")).judge.seen["w"].chunks == (1, 1)
    assert load(REWARDS, "rollout.pivot=1", windows("w: {chunks: [1, null]}")).judge.seen["w"].chunks == (1, None)
