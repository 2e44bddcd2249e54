"""The way an iteration is spread over the ranks of a job: its groups over teams, and the branches of a group over the ranks of a team.

A rank alone is a team whenever there are as many groups as ranks: nothing is done twice then. With fewer groups, a team shares each of its
groups: every rank makes the prefix itself, for a message that holds its keys and values would be larger, and then its own branches.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError

PREFIX = 0.5
"""Work of a prefix in units of a whole branch: at a random pivot it is half of a video."""


class Spread(NamedTuple):
    """The shape of the spread.

    Attributes:
        teams: each has its own groups.
        ranks: of a team.
    """

    teams: int
    ranks: int

    def groups(self, rank: int, videos: int, pivots: int = 1) -> list[int]:
        """Return the numbers of a rank's groups, of `pivots` groups of each of `videos` videos in all. A video is one team's."""
        return [video * pivots + fork for video in range(rank // self.ranks, videos, self.teams) for fork in range(pivots)]

    def branches(self, group_size: int) -> list[int]:
        """Return how many branches of a group each rank of a team has; its anchor is the last one's besides."""
        return [group_size // self.ranks + (rank < group_size % self.ranks) for rank in range(self.ranks)]

    def work(self, config: Config) -> float:
        """Return the work of the rank that has most, in branches."""
        rollout, shares = config.rollout, self.branches(config.rollout.group_size)
        shares[-1] += config.anchored
        return ceil(rollout.prompts_per_iteration / self.teams) * (PREFIX + rollout.pivots_per_video * max(shares))


def spread(config: Config, ranks: int) -> Spread:
    """Return the spread over so many ranks that `train.spread` asks for; auto: the one in which the busiest rank has least to do.

    Raises:
        UserError: there are more ranks than the recipe has work for.
    """
    rollout, kind = config.rollout, config.train.spread
    sizes = [size for size in range(1, min(ranks, rollout.group_size) + 1) if ranks % size == 0]
    choices = [Spread(ranks // size, size) for size in sizes]
    if kind == "groups" or ranks == 1:
        choices = choices[:1]
    elif kind == "branches":
        choices = choices[1:]
    best = min(choices, key=lambda choice: (choice.work(config), choice.ranks), default=None)
    if best is None:
        raise UserError(
            f"train.spread=branches cannot spread the {rollout.group_size} branches of a group over {ranks} ranks: their number has no "
            f"divisor from 2 to {rollout.group_size}; start another number of ranks, or take train.spread=groups"
        )
    return best


def idle(config: Config, ranks: int) -> str | None:
    """Return a warning if some ranks have no group, else None."""
    chosen, groups = spread(config, ranks), config.rollout.prompts_per_iteration
    if chosen.teams <= groups:
        return None
    without = (chosen.teams - groups) * chosen.ranks
    return (
        f"{without} of {ranks} ranks have nothing to roll out: rollout.prompts_per_iteration is {groups}, for {chosen.teams} teams of "
        f"{chosen.ranks}; give at least {chosen.teams}, or start fewer ranks"
    )
