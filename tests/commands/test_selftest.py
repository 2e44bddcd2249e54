"""`doctor --self-test`: it holds where the method does, and says which part does not where a fault was planted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arcopo_fast import doctor
from arcopo_fast.commands import run_command
from arcopo_fast.objectives.copo import CopoObjective
from arcopo_fast.recipe import load_config
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import KeyedNoise
from arcopo_fast.selftest import self_test
from arcopo_fast.toy.rewards import MotionQuality
from arcopo_fast.train import Trainer

FAST = ["evaluation.prompts=1", "evaluation.videos_per_prompt=1", "evaluation.sample_videos=0"]


def failures(*settings: str) -> set[str]:
    """What does not hold; how often the findings came in all is checked on the way."""
    found = list(self_test(load_config("toy", [*FAST, f"seed={int(torch.randint(1 << 30, ()))}", *settings])))
    assert len(found) >= 9 and found[0].what == "a group"
    return {finding.what for finding in found if finding.well is False}


@pytest.mark.parametrize("settings", [[], ["generator.dtype=bfloat16"], ["rollout.pivot=1", "objective.micro_batch=3"]])
def test_it_holds(settings: list[str]) -> None:
    assert failures(*settings) == set()


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(doctor.main, ["toy_sde_grpo", *FAST, "--self-test"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "everything holds" and not list(tmp_path.iterdir())
    monkeypatch.setattr(MotionQuality, "__call__", lambda self, frames, prompts: torch.arange(float(len(frames))))
    assert run_command(doctor.main, ["toy", *FAST, "--self-test"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("something does not hold") and [line for line in said if line.startswith("FAILS    reward toy_mq")]


def test_a_reward_that_sees_nothing_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blind.py").write_text("def same(frames, prompts):\n    return [0.5] * len(frames)\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = list(self_test(load_config("toy", [*FAST, "rewards=" + json.dumps({"blind:same": 1.0})])))
    notes = [finding.detail for finding in found if finding.well is None and finding.what == "reward blind:same"]
    assert len(notes) == 1 and "does not tell the members apart" in notes[0]
    assert all(finding.well is not False for finding in found)  # the update is tried with advantages of its own


def wrapped(kind: type, name: str, change: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of a method goes through `change`."""
    method = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, *given, **named: change(self, method(self, *given, **named)))


def test_a_replay_that_does_not_repeat_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count(1)
    wrapped(Engine, "replay", lambda self, prediction: prediction + 1e-6 * next(calls), monkeypatch)
    assert failures() == {"a new adapter", "its repetition"}


def test_a_replay_of_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped(Engine, "replay", lambda self, prediction: 0.9 * prediction, monkeypatch)
    assert failures() == {"the replay"}


def test_a_ratio_that_is_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped(CopoObjective, "loss", lambda self, outcome: outcome._replace(ratio_minus_one=outcome.ratio_minus_one + 1e-9), monkeypatch)
    assert failures() == {"the ratio"}


def test_a_gradient_of_the_wrong_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    update = CopoObjective._backward

    def wrong(self: CopoObjective, *given: Any) -> Any:
        result = update(self, *given)
        for parameter in self.engine.model.parameters():
            if parameter.grad is not None:
                parameter.grad.neg_()
        return result

    monkeypatch.setattr(CopoObjective, "_backward", wrong)
    assert failures() == {"the objective"}


def test_an_adapter_that_adds_something(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Trainer.__init__

    def trained(self: Trainer, config: Any) -> None:
        made(self, config)
        for parameter in self.parameters:
            parameter.data.add_(0.01 * torch.randn_like(parameter))

    monkeypatch.setattr(Trainer, "__init__", trained)
    assert failures() == {"a new adapter"}


def test_members_that_are_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped(KeyedNoise, "neighbours", lambda self, noise: noise[:1].expand_as(noise).clone(), monkeypatch)
    assert "the perturbed noise" in failures()
