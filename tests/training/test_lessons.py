"""Rewards from which nothing can be learned end a run, on rollouts and on a buffer; those that only seldom differ, or little, do not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arcopo_fast.config.reading import load_config
from arcopo_fast.data.prompts import Prompt
from arcopo_fast.planning.spread import spread
from arcopo_fast.rewards.base import RewardError
from arcopo_fast.runtime.distributed import World
from arcopo_fast.train import one_iteration
from arcopo_fast.training.groups import JudgedGroup, Outcome
from arcopo_fast.training.lessons import LearningWatch, reward_record
from arcopo_fast.training.trainer import Trainer

GROUP, PROMPTS = 4, 2


class NoVideos(nullcontext[Any]):
    """A group of which only its pivot is asked."""

    pivot = 0

    def put_away(self) -> None:
        """Keep nothing."""


class NoUpdates(nullcontext[Any]):
    """Updates that change nothing."""

    def __enter__(self) -> NoUpdates:
        return self

    def learn(self, number: int, group: object, advantages: Tensor, *rewards: object) -> None:
        """Take no gradient."""

    def finish(self) -> dict[str, float]:
        return {}


BUFFER = ["train.mode=semi_on_policy", "train.buffer=nowhere"]


def trainer_of(scores: Iterable[dict[str, Tensor]], iterations: int, *settings: str) -> Trainer:
    """A trainer whose groups have these scores, one after the other, and no videos."""
    made: Any = Trainer.__new__(Trainer)
    shape = [f"rollout.group_size={GROUP}", f"rollout.prompts_per_iteration={PROMPTS}", f"train.iterations={iterations}"]
    made.config = load_config("toy", ["rewards={toy_vq: 1.0, toy_mq: 1.0, toy_ta: 0.0}", *shape, *settings])
    made.generator = SimpleNamespace(model=SimpleNamespace(device=torch.device("cpu")))
    groups = iter(scores)
    group: Any = NoVideos()
    made.groups = SimpleNamespace(
        each=lambda iteration, numbers: ((number, JudgedGroup(group, Prompt("a boat"), next(groups))) for number in numbers)
    )
    made.optimizer = SimpleNamespace(param_groups=[{}])
    made.world = made.team = World()
    made.spread = spread(made.config, 1)
    made.updates = lambda iteration: NoUpdates()
    made.parameters, made.agree = [], lambda: None
    return made


def ends_at(trainer: Trainer) -> tuple[int, str]:
    """The iteration that ended the run, and why; one more than all if none did."""
    watch = LearningWatch(trainer.config)
    for iteration in range(1, trainer.config.train.iterations + 1):
        try:
            one_iteration(trainer, watch, iteration)
        except RewardError as error:
            return iteration, str(error)
    return trainer.config.train.iterations + 1, ""


def dull(vq: float = 0.1, mq: float = 3.0) -> dict[str, Tensor]:
    """A watched reward that varies teaches nothing either."""
    return {"toy_vq": torch.full((GROUP,), vq), "toy_mq": torch.full((GROUP,), mq), "toy_ta": torch.rand(GROUP)}


def varied(scale: float = 1.0) -> dict[str, Tensor]:
    return dull(mq=3 * scale) | {"toy_vq": torch.tensor([1.0, 2.0, 4.0, 3.0]) * scale}


def rounded() -> dict[str, Tensor]:
    """Equal but for float32's last bit."""
    equal, target = torch.full((GROUP,), 3e6), torch.full((GROUP,), 3e6)
    target[3] = 4e6
    return dull() | {"toy_mq": equal.nextafter(target)}


def failed() -> dict[str, Tensor]:
    return dull(vq=math.nan)


def one_each() -> dict[str, Tensor]:
    """One member of a group has a score."""
    scores = torch.tensor([math.nan, 0.5, math.nan, math.nan])
    return dull() | {"toy_vq": scores}


def cancelling() -> dict[str, Tensor]:
    scores = torch.rand(GROUP)
    return dull() | {"toy_vq": scores, "toy_mq": -scores}


def cycle(*groups: Callable[[], dict[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    return (group() for group in itertools.cycle(groups))


DULL: dict[str, tuple[Callable[[], Iterable[dict[str, Tensor]]], int, int, list[str]]] = {
    "constant": (lambda: cycle(dull), 30, 10, ["toy_vq", "toy_mq"]),
    "by the prompt": (lambda: (dull(vq=index) for index in itertools.count()), 30, 10, ["toy_vq", "toy_mq"]),
    "a short run": (lambda: cycle(dull), 4, 4, ["toy_vq", "toy_mq"]),
    "a single iteration": (lambda: cycle(dull), 1, 1, ["1 iterations in a row"]),
    "by the last bit": (lambda: cycle(rounded), 30, 10, ["toy_vq", "toy_mq"]),
    "one score in a group": (lambda: cycle(one_each), 30, 10, ["toy_vq", "toy_mq", "of the last one's 8, 'toy_vq' failed for 6"]),
    "some failed, others equal": (lambda: cycle(failed, failed, dull, dull), 30, 10, ["toy_vq"]),
    "rewards that cancel": (lambda: cycle(cancelling), 30, 10, ["the weighted sum of the rewards did not"]),
    "after it had taught": (lambda: itertools.chain(cycle_of(varied, 10), cycle(dull)), 30, 15, ["toy_vq", "toy_mq"]),
}


def cycle_of(group: Callable[[], dict[str, Tensor]], count: int) -> Iterable[dict[str, Tensor]]:
    return itertools.islice(cycle(group), count)


@pytest.mark.parametrize("settings", [[], BUFFER], ids=["rollouts", "buffer"])
@pytest.mark.parametrize("kind", DULL)
def test_rewards_that_do_not_tell_members_apart_end_a_run(kind: str, settings: list[str]) -> None:
    scores, iterations, expected, parts = DULL[kind]
    iteration, line = ends_at(trainer_of(scores(), iterations, *settings))
    assert iteration == expected and "did not tell them apart" in line and "\n" not in line
    assert all(part in line for part in parts) and "toy_ta" not in line, line
    assert ("another buffer" if settings else "rollout.noise_strength") in line


@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1.0, 1e12])
def test_rewards_of_any_size_teach(scale: float) -> None:
    assert ends_at(trainer_of(cycle(lambda: varied(scale)), 12)) == (13, "")


def test_one_group_that_differs_is_enough() -> None:
    assert ends_at(trainer_of(cycle(*[dull] * (10 * PROMPTS - 1), varied), 40)) == (41, "")


@pytest.mark.parametrize(("iterations", "expected"), [(30, 3), (2, 2)])
def test_a_run_without_a_score_ends(iterations: int, expected: int) -> None:
    iteration, line = ends_at(trainer_of(cycle(failed), iterations))
    assert iteration == expected and line.startswith(f"not one video of {expected} iterations in a row got all its scores")


@pytest.mark.parametrize("settings", [[], BUFFER], ids=["rollouts", "buffer"])
def test_what_is_logged_of_rewards(settings: list[str]) -> None:
    """In float64, group by group: a score that failed is in no mean, a group without one score in none of its reward."""
    config = trainer_of([], 1, *settings).config
    scores = [varied() | {"toy_mq": torch.rand(GROUP)}, dull() | {"toy_vq": torch.tensor([math.nan, 0.5, 1.5, math.nan])}, failed()]
    record = reward_record(config, [Outcome(number, number, part, torch.zeros(GROUP)) for number, part in enumerate(scores)])
    columns = {f"reward/{name}": [part[name].double().numpy() for part in scores] for name in scores[0]}
    columns["reward"] = [vq + mq for vq, mq in zip(columns["reward/toy_vq"], columns["reward/toy_mq"])]  # toy_ta's weight is 0
    prefix = "buffer/" if settings else ""
    expected = {"pivot": 2.0, "failed_scores": 2 + GROUP}
    for name, values in columns.items():
        finite = [part[np.isfinite(part)] for part in values if np.isfinite(part).any()]
        expected[prefix + name] = np.mean([part.mean() for part in finite])
        expected[f"{prefix}{name}_std"] = np.mean([part.std() for part in finite])
    assert record == pytest.approx(expected)
