"""A reward's fingerprint: the same for the same code and weights, wherever they are served, and another one for any others."""

from __future__ import annotations

import importlib
import operator
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.rewards import load_reward
from support.servers import serving
from torch import Tensor, nn

from arcopo_fast.rewards.base import Reward
from arcopo_fast.rewards.client import RewardClient, remote_rewards
from arcopo_fast.rewards.custom import CustomReward

MODULE = "judges_that_are_edited"
SOURCE = """
import functools
import operator
import torch

def brightness(frames, prompts):
    return frames.mean((1, 2, 3, 4)) * 1.0

def other(frames, prompts):
    return frames.mean((1, 2, 3, 4)) * 1.0

class Weighted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(300, 5, dtype=torch.bfloat16)
        self.scalar = torch.nn.Parameter(torch.tensor(3.0))
        self.register_buffer("mean", torch.full((3, 1), 0.5))
        torch.nn.init.constant_(self.layer.weight, 0.25)
        torch.nn.init.constant_(self.layer.bias, 0.25)

    def forward(self, frames, prompts):
        return self.scalar * frames.mean((1, 2, 3, 4))

made = functools.partial(operator.setitem, [2])
weighted = Weighted()
method = weighted.forward

class Holds:
    def __init__(self):
        self.judge = Weighted()

    def __call__(self, frames, prompts):
        return self.judge(frames, prompts)
"""


@contextmanager
def module_of(directory: Path, source: str) -> Iterator[None]:
    """The module as a new process would import it."""
    directory.mkdir(parents=True)
    (directory / f"{MODULE}.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        importlib.invalidate_caches()
        sys.modules.pop(MODULE, None)
        yield
    sys.modules.pop(MODULE, None)


@pytest.fixture
def module(tmp_path: Path) -> Iterator[None]:
    with module_of(tmp_path / "first", SOURCE):
        yield


OWN = [f"{MODULE}:{name}" for name in ("brightness", "other", "Weighted", "Holds", "made", "method")]
NAMES = [*OWN, "toy_vq", "toy_mq", "sharpness", "steadiness"]


def test_every_reward_has_its_own_and_keeps_it(tmp_path: Path) -> None:
    with module_of(tmp_path / "one", SOURCE):
        first = {name: load_reward(name).fingerprint(name) for name in NAMES}
    with module_of(tmp_path / "two", SOURCE):  # the same file at another place
        assert {name: load_reward(name).fingerprint(name) for name in NAMES} == first
    assert len({*first.values()}) == len(NAMES) and all(re.fullmatch("[0-9a-f]{16}", one) for one in first.values())
    for change in ("* 1.0", "* 2.0"), ("[2]", "[3]"):
        with module_of(tmp_path / change[1], SOURCE.replace(*change)):
            edited = {name: load_reward(name).fingerprint(name) for name in NAMES}
        assert [name for name in NAMES if edited[name] == first[name]] == NAMES[len(OWN) :]


@pytest.mark.parametrize("name", ["Weighted", "Holds", "method"])
def test_any_trained_tensor_is_seen(module: None, name: str) -> None:
    seen = set()
    for changed in [None, "layer.weight", "layer.bias", "scalar", "mean"]:
        reward = load_reward(f"{MODULE}:{name}")
        function = reward.function
        owners = function, getattr(function, "judge", None), getattr(function, "__self__", None)
        judge = next(one for one in owners if isinstance(one, nn.Module))
        state = {key: value.clone() for key, value in judge.state_dict().items()}
        if changed:
            with torch.no_grad():
                judge.state_dict()[changed].mul_(1 + random.choice([-1, 1]) * 2.0**-6)
        seen.add(reward.fingerprint(""))
        judge.load_state_dict(state)  # `method` has one object for all
    assert len(seen) == 5
    assert load_reward(f"{MODULE}:{name}").fingerprint("") in seen
    reward.to(torch.float64)
    if name == "Weighted":
        assert reward.fingerprint("") not in seen, "another dtype rounds in another way"


def test_what_has_no_source_or_attributes(module: None) -> None:
    class Slots(Reward):
        __slots__ = ()
        scores = ("slots",)

        def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
            return frames.mean((1, 2, 3, 4))

    assert Slots().fingerprint("slots") == Slots().fingerprint("slots")
    for one, other in ((operator.eq, operator.ne), (nn.CosineSimilarity(), nn.PairwiseDistance())):
        fingerprints = [CustomReward("_operator:name", function).fingerprint("") for function in (one, one, other)]
        assert fingerprints[0] == fingerprints[1] != fingerprints[2], "by their names alone"


def test_a_served_reward_has_the_fingerprint_that_it_has_here(module: None) -> None:
    with serving(named={name: load_reward(name) for name in NAMES}) as server:
        served = remote_rewards(dict.fromkeys(NAMES, server.url), give_up_after=30.0)
        assert {name: client.fingerprint(name) for name, client in served.items()} == {
            name: load_reward(name).fingerprint(name) for name in NAMES
        }


@pytest.mark.parametrize("said", [{}, {"fingerprints": None}, {"fingerprints": {"other": "0123"}}])
def test_a_server_that_says_nothing(said: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RewardClient, "health", lambda self: said)
    (reward,) = remote_rewards({"toy_vq": "http://127.0.0.1:1"}).values()
    assert reward.fingerprint("toy_vq") == "unknown"
