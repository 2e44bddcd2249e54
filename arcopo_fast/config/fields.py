"""The pieces that typed settings are made of, and what every objective can be told.

An objective extends `ObjectiveSettings` in its own file; a recipe chooses it by `objective.kind`, and `config` does the rest.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from arcopo_fast.errors import UserError


def expanded(path: str) -> str:
    """Return a path with the home directory in place of a "~" or "~user" at its beginning.

    Raises:
        UserError: there is no such user, or no file system takes such a path.
    """
    if any(len(part.encode(errors="replace")) > 255 for part in path.split("/")) or len(path) > 4095 or "\0" in path:
        raise UserError(f"{path[:60]!r}... is no path that a file system takes; a file's name has at most 255 bytes")
    home = os.path.expanduser(path) if path.startswith("~") else path
    if home.startswith("~"):
        raise UserError(f"there is no home directory {path.partition('/')[0]!r}; for a name that begins with '~' write './{path[:60]}'")
    return home


Place = Annotated[str, Field(min_length=1), AfterValidator(expanded)]
"""A file or a directory: a path, whose "~" is the home directory, or where it is published."""
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Unknown keys are errors, values are not converted (an integer may stand for a float), and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ObjectiveSettings(Section):
    """What the policy learns from its groups, and how: the part that all objectives share."""

    kind: str = Field("copo", description="copo: AR-CoPO; sde_grpo: the baseline; or the dotted name of a module that holds one")
    clip: PositiveFloat | None = Field(1e-4, description="eps of clip(rho, 1 - eps, 1 + eps); null: no clipping")
    steps: Annotated[float, Field(gt=0, le=1)] | Literal["all"] = Field(
        "all", description="denoising steps to train: all, or a random fraction"
    )
    skip_last_step: bool = Field(False, description="never train the last denoising step")
    anchors_per_update: Positive = Field(4, description="A: candidates that are replayed in one update, drawn without replacement")
    updates: Positive = Field(2, description="optimiser steps of an iteration")
    anchors: Literal["fresh", "same", "split"] = Field(
        "fresh", description="of an iteration's updates: A new ones for each, the same A for all, or A in all, dealt over the updates"
    )
    old_prediction: Literal["replay"] = Field("replay", description="the old prediction is made by the replay path under the old weights")
    context: Literal["rollout", "recompute"] = Field("rollout", description="h_{p-1}: the rollout's, or recomputed under new weights")
    advantage: Literal["zscore", "quasi_norm"] = Field("zscore", description="A_i from the rewards of a group")
    quasi_norm_p: PositiveFloat = Field(0.8, description="p of the quasi-norm")
    advantage_std: Literal["population", "sample"] = Field(
        "population", description="divide by the square root of the mean square, or of the sum over G - 1, as DanceGRPO does"
    )
    advantage_std_floor: float = Field(0.0, ge=0, description="smallest spread of a group's rewards that advantages are divided by")
    advantage_max: PositiveFloat | None = Field(None, description="largest |A_i|; null: no limit")
    reward_combine: Literal["sum", "per_reward_zscore"] = Field("sum", description="sum, then advantage; or the reverse")
    micro_batch: Positive | None = Field(None, description="(anchor, step) pairs of one backward pass: less memory; null: all")
    checkpoint: bool = Field(False, description="activation checkpointing of the pivot chunk, block by block: less memory, more time")

    @property
    def largest_update(self) -> int:
        """Anchors that one update replays, at most."""
        return -(-self.anchors_per_update // self.updates) if self.anchors == "split" else self.anchors_per_update
