"""The number of samples in one backward pass, and how it shrinks when they do not fit.

A group's gradient that runs out of memory is computed again, from nothing on, in micro-batches of half the size, and at last with
checkpointing; these settings stay in force for the rest of the run. That gradient, and all after it, are bit for bit what these settings
give; those before it were made in larger micro-batches, which round differently.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from arcopo_fast.errors import UserError

R = TypeVar("R")


class Batching:
    """The present size of a backward pass, at first the recipe's.

    Attributes:
        micro_batch: samples of one backward pass; None: all of an update.
        checkpoint: activation checkpointing.

    Args:
        divided: other ranks take part in every pass, so that this one cannot start again.
    """

    def __init__(self, micro_batch: int | None, checkpoint: bool, *, divided: bool = False) -> None:
        self.micro_batch, self.checkpoint = micro_batch, checkpoint
        self._divided = divided
        self._recipe = self.state()

    def state(self) -> dict[str, Any]:
        """Return both values, by name."""
        return {"micro_batch": self.micro_batch, "checkpoint": self.checkpoint}

    def changed(self) -> dict[str, Any]:
        """Return the values that are no longer the recipe's, by name."""
        return {name: value for name, value in self.state().items() if value != self._recipe[name]}

    def restore(self, changed: dict[str, Any]) -> None:
        """Take the values that `changed` returned in an earlier part of the run."""
        self.micro_batch = changed.get("micro_batch", self.micro_batch)
        self.checkpoint = changed.get("checkpoint", self.checkpoint)

    def until_it_fits(self, attempt: Callable[[], R], samples: int) -> R:
        """Return what `attempt` returns. Where it runs out of memory it starts again with values that need less, and they stay.

        Args:
            samples: the most that can be in a micro-batch.

        Raises:
            UserError: not even one sample at a time, with checkpointing, fits; or the weights are divided among ranks.
        """
        before, reason = self.state(), ""
        while True:
            try:
                result = attempt()
                break
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
            # Out here the error is gone, and with it the frames that held the activations.
            self._shrink(min(self.micro_batch or samples, samples), reason)
            if self._divided:
                raise UserError(
                    f"the replay ran out of memory ({reason}); with generator.shard one rank alone cannot start it again: set "
                    f"{self._since(before)}"
                )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if self.state() != before:
            advice = f"continuing with {self._since(before)}: set this in the recipe"
            warnings.warn(f"the replay ran out of memory ({reason}); {advice}", stacklevel=3)
        return result

    def _since(self, before: dict[str, Any]) -> str:
        """Return the values that were others before, as settings."""
        return " ".join(f"objective.{name}={str(value).lower()}" for name, value in self.state().items() if value != before[name])

    def _shrink(self, size: int, reason: str) -> None:
        """Take micro-batches of half of `size`, then checkpointing."""
        if size > 1:
            self.micro_batch = (size + 1) // 2
        elif not self.checkpoint:
            self.checkpoint = True
        else:
            raise UserError(
                f"the replay of one (anchor, step) pair, with checkpointing, ran out of memory ({reason}); set rollout.branches_per_wave=1 "
                "and generator.offload=true to leave it more, or take a smaller video: train --dry-run prints what fits"
            )
