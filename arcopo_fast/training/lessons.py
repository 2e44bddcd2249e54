"""The rewards of an iteration's groups: the numbers that are logged, and whether there is anything to learn from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import isfinite, isnan

import torch
from torch import Tensor

from arcopo_fast.config.schema import Config
from arcopo_fast.objectives.advantage import weighted_total, zscore
from arcopo_fast.rewards.base import RewardError
from arcopo_fast.storage.metrics import ANCHOR
from arcopo_fast.training.groups import Outcome

UNSCORED = 3
"""Iterations in a row without one score that end a run: of one, its prompts alone may be to blame."""
ALIKE = 10
"""Iterations in a row without a group whose members differ that end a run: scores in whole numbers may agree by chance for a while."""


def reward_record(config: Config, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return what metrics.jsonl says of an iteration's rewards: mean and spread within a group, averaged over the groups that have scores.

    What the groups of a buffer were rewarded says nothing of the policy: then the names begin with "buffer/".
    """
    prefix = "" if config.train.buffer is None else "buffer/"
    logged: dict[str, list[float]] = {}
    for outcome in outcomes:
        for name, scores in _scores(config, outcome).items():
            scores = scores[scores.isfinite()].double()
            if len(scores):
                logged.setdefault(prefix + name, []).append(scores.mean().item())
                logged.setdefault(f"{prefix}{name}_std", []).append(scores.std(correction=0).item())
        for name, score in _anchor_scores(config, outcome).items():
            if isfinite(score):
                logged.setdefault(prefix + name, []).append(score)
        logged.setdefault("pivot", []).append(outcome.pivot + 1)
    failed = sum(int(scores.isnan().sum()) for outcome in outcomes for scores in outcome.rewards.values())
    partly = {"partly_scored": sum(_partly_scored(config, outcome) for outcome in outcomes)} if config.judge.windows else {}
    means = {name: sum(values) / len(values) for name, values in logged.items()} | {"failed_scores": failed} | partly
    if not config.anchored:
        return means
    return means | {"failed_anchor_scores": sum(isnan(score) for outcome in outcomes for score in (outcome.anchor or {}).values())}


def _anchor_scores(config: Config, outcome: Outcome) -> dict[str, float]:
    """Return the anchor's weighted total and scores by the names that they are logged by; nothing if there is none."""
    if outcome.anchor is None:
        return {}
    total = weighted_total(outcome.anchor, config.score_weights)
    return {ANCHOR: total} | {f"{ANCHOR}/{name}": score for name, score in outcome.anchor.items()}


def _partly_scored(config: Config, outcome: Outcome) -> int:
    """Count the members whose advantages are those of some windows alone, since in another one a score failed, theirs or the anchor's."""
    weights = [{name: weight for name, weight in rewards.items() if weight} for window, rewards in config.windows if window]
    weights, anchor = [rewards for rewards in weights if rewards], outcome.anchor
    scored = torch.stack([weighted_total(outcome.rewards, rewards).isfinite() for rewards in weights])
    if anchor is not None:
        scored &= torch.tensor([isfinite(weighted_total(anchor, rewards)) for rewards in weights])[:, None]
    return int((scored.any(0) & ~scored.all(0)).sum())


def _scores(config: Config, outcome: Outcome) -> dict[str, Tensor]:
    total = weighted_total(outcome.rewards, config.score_weights)
    return {"reward": total} | {f"reward/{name}": scores for name, scores in outcome.rewards.items()}


def _has_scores(config: Config, outcome: Outcome) -> bool:
    """Return whether some member has all its scores, and the anchor too if there is one."""
    anchored = all(map(isfinite, _anchor_scores(config, outcome).values()))
    return anchored and bool(_scores(config, outcome)["reward"].isfinite().any())


class LearningWatch:
    """A count of iterations in a row from which nothing can be learned, which ends the run when they are too many."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.unscored = self.alike = 0  # iterations in a row without one score, and without a group whose members differ

    def check(self, outcomes: Sequence[Outcome]) -> None:
        """Take an iteration's groups into account, those of all ranks.

        Raises:
            RewardError: the rewards teach the run nothing, by all signs; the message names them.
        """
        config, scores = self.config, [_scores(self.config, outcome) for outcome in outcomes]
        self.unscored = 0 if any(_has_scores(config, outcome) for outcome in outcomes) else self.unscored + 1
        self.alike = 0 if any(outcome.advantages.any() for outcome in outcomes) else self.alike + 1
        unscored = Counter[str]()  # videos by the reward that failed
        for outcome in outcomes:
            unscored.update({name: int(values.isnan().sum()) for name, values in outcome.rewards.items()})
            unscored.update({name: int(isnan(score)) for name, score in (outcome.anchor or {}).items()})
        failed = ", ".join(f"{name!r} failed for {number}" for name, number in unscored.items() if number)
        videos = f"of the last one's {config.rollout.groups * (config.rollout.group_size + config.anchored)}, {failed}"
        if self.unscored == min(UNSCORED, config.train.iterations):
            none = "no video and anchor of one group" if config.anchored else "not one video"
            raise RewardError(f"{none} of {self.unscored} iterations in a row got all its scores: {videos}")
        if self.alike == min(ALIKE, config.train.iterations):
            telling = {name.removeprefix("reward/") for scored in scores for name, values in scored.items() if _differ(values)}
            alike = ", ".join(repr(name) for name, weight in config.score_weights.items() if weight and name not in telling)
            advice = "raise rollout.noise_strength or rollout.group_size" if config.train.buffer is None else "collect another buffer"
            raise RewardError(
                f"nothing was learned in {self.alike} iterations in a row, because all members of each group had the same reward: in the "
                f"last one {alike or 'the weighted sum of the rewards'} did not tell them apart{f' ({videos})' if failed else ''}; take a "
                f"reward that does, or {advice}"
            )


def _differ(scores: Tensor) -> bool:
    finite = scores[scores.isfinite()].double()
    return bool(len(finite)) and bool(zscore(finite).any())
