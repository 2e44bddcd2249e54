"""The size of a backward pass: halved while memory runs out, then checkpointed, kept, said once, and part of what is saved."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from arcopo_fast.errors import UserError
from arcopo_fast.objectives.batching import Batching


class Card:
    """An update that fits in micro-batches of `fits`, or with checkpointing only; keeps the values that it was tried with."""

    def __init__(self, batching: Batching, fits: int, *, checkpointed: bool = False) -> None:
        self.batching, self.fits, self.checkpointed = batching, fits, checkpointed
        self.tried: list[tuple[int | None, bool]] = []

    def __call__(self) -> str:
        self.tried.append((self.batching.micro_batch, self.batching.checkpoint))
        size, checkpoint = self.tried[-1]
        if (size or 9) > self.fits or (self.checkpointed and not checkpoint):
            raise torch.OutOfMemoryError("out of memory\nwith details")
        return "done"


@pytest.mark.parametrize(
    ("micro_batch", "fits", "tried"),
    [
        (None, 9, [None]),
        (None, 8, [None, 5]),
        (None, 1, [None, 5, 3, 2, 1]),
        (4, 3, [4, 2]),
        (100, 4, [100, 5, 3]),  # more than there are samples: 9
    ],
)
def test_it_is_halved_until_it_fits(micro_batch: int | None, fits: int, tried: list[int | None]) -> None:
    batching = Batching(micro_batch, False)
    card = Card(batching, fits)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [batching.until_it_fits(card, 9) for _ in range(2)] == ["done"] * 2
    assert card.tried == [(size, False) for size in [*tried, tried[-1]]], "the second update begins where the first one ended"
    expected: list[str] = (
        [] if len(tried) == 1 else [f"out of memory); continuing with objective.micro_batch={tried[-1]}: set this in the recipe"]
    )
    assert [str(warning.message).partition("(")[2] for warning in said] == expected
    assert batching.changed() == ({} if len(tried) == 1 else {"micro_batch": tried[-1]})


def test_single_samples_are_checkpointed_at_last() -> None:
    batching = Batching(2, False)
    card = Card(batching, 1, checkpointed=True)
    with pytest.warns(UserWarning, match="objective.micro_batch=1 objective.checkpoint=true: set this in the recipe"):
        batching.until_it_fits(card, 9)
    assert card.tried == [(2, False), (1, False), (1, True)] and batching.changed() == {"micro_batch": 1, "checkpoint": True}


def test_what_never_fits_and_what_is_no_lack_of_memory_is_an_error() -> None:
    batching = Batching(1, True)
    with pytest.raises(UserError, match=r"with checkpointing, ran out of memory \(out of memory\); set rollout.branches_per_wave=1"):
        batching.until_it_fits(Card(batching, 0), 9)

    def broken() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        batching.until_it_fits(broken, 9)
    assert batching.changed() == {}


@pytest.mark.parametrize(("batching", "advice"), [((None, False), "objective.micro_batch=5"), ((1, False), "objective.checkpoint=true")])
def test_nothing_starts_again_where_other_ranks_take_part(batching: tuple[int | None, bool], advice: str) -> None:
    divided = Batching(*batching, divided=True)
    card = Card(divided, 0)
    with pytest.raises(UserError, match=rf"ran out of memory \(out of memory\); with generator.shard .*: set {advice}$"):
        divided.until_it_fits(card, 9)
    assert card.tried == [batching]


@pytest.mark.parametrize("changed", [{}, {"micro_batch": 1}, {"micro_batch": 1, "checkpoint": True}])
def test_what_changed_is_restored_over_the_recipes_values(changed: dict[str, Any]) -> None:
    batching = Batching(4, False)
    batching.restore(changed)
    assert batching.state() == {"micro_batch": 4, "checkpoint": False} | changed and batching.changed() == changed
