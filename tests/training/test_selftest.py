"""`doctor --self-test`: it holds where the method does, and says which part does not where a fault was planted."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arcopo_fast import doctor
from arcopo_fast.cli import run_command
from arcopo_fast.config.reading import load_config
from arcopo_fast.objectives.copo import CopoObjective
from arcopo_fast.objectives.policies import Policies
from arcopo_fast.objectives.updates import Updates
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import KeyedNoise
from arcopo_fast.toy.rewards import MotionQuality, TextAlignment
from arcopo_fast.training.findings import Finding
from arcopo_fast.training.groups import JudgedGroup, Rollouts
from arcopo_fast.training.selftest import self_test
from arcopo_fast.training.trainer import Trainer

FAST = ["evaluation.prompts=1", "evaluation.videos_per_prompt=1", "evaluation.sample_videos=0"]
FAST += ["video.chunks=3", "sampler.steps=[1000, 350]", "rollout.group_size=4", "objective.anchors_per_update=2"]


def failures(*settings: str) -> set[str]:
    """What does not hold; how often the findings came in all is checked on the way."""
    return {finding.subject for finding in findings(*settings) if finding.holds is False and not finding.forecast}


def findings(*settings: str) -> list[Finding]:
    found = list(self_test(load_config("toy", [*FAST, f"seed={int(torch.randint(1 << 30, ()))}", *settings])))
    assert len(found) >= 9 and found[0].subject == "a group"
    return found


def poor(*settings: str) -> dict[str, str]:
    """What bodes ill, with its remedy; the method must hold all the same."""
    found = findings(*settings)
    assert not {finding.subject for finding in found if finding.holds is False and not finding.forecast}
    return {finding.subject: finding.detail for finding in found if finding.forecast and not finding.holds}


WINDOWS = ["rollout.horizon=1", "judge.windows={near: {chunks: [0, 0], before: 1}, far: {chunks: [0, 1], weight: 0.5, rewards: [toy_mq]}}"]


@pytest.mark.parametrize("settings", [[], ["generator.dtype=bfloat16"], ["rollout.pivot=1", "objective.micro_batch=3"], WINDOWS])
def test_it_holds(settings: list[str]) -> None:
    assert failures(*settings) == set()


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(doctor.main, ["toy_sde_grpo", *FAST, "objective.explore=all", "--self-test"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "everything holds" and not list(tmp_path.iterdir())
    monkeypatch.setattr(MotionQuality, "__call__", lambda self, frames, prompts: torch.arange(float(len(frames))))
    assert run_command(doctor.main, ["toy", *FAST, "--self-test"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("something does not hold") and [line for line in said if line.startswith("FAILS    reward toy_mq")]


def test_a_reward_that_sees_nothing_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blind.py").write_text("def same(frames, prompts):\n    return [0.5] * len(frames)\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = list(self_test(load_config("toy", [*FAST, "rewards=" + json.dumps({"blind:same": 1.0})])))
    notes = [finding.detail for finding in found if finding.holds is None and finding.subject == "reward blind:same"]
    assert len(notes) == 1 and "does not tell the members apart" in notes[0]
    assert [finding.subject for finding in found if finding.holds is False] == ["the spread of blind:same"]


def wrapped(kind: type, name: str, change: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of a method goes through `change`."""
    method = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, *given, **named: change(self, method(self, *given, **named)))


def test_a_replay_that_does_not_repeat_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count(1)
    wrapped(Engine, "predict", lambda self, prediction: prediction + 1e-6 * next(calls), monkeypatch)
    assert failures() == {"a new adapter", "its repetition"}


def test_a_replay_of_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped(Engine, "predict", lambda self, prediction: 0.9 * prediction, monkeypatch)
    assert failures() == {"the replay"}


def test_a_ratio_that_is_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped(CopoObjective, "ratio", lambda self, outcome: outcome._replace(ratio_minus_one=outcome.ratio_minus_one + 1e-9), monkeypatch)
    assert failures() == {"the ratio"}


def test_a_gradient_of_the_wrong_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = Updates._gradient

    def wrong(self: Updates, *given: Any) -> Any:
        result = gradient(self, *given)
        for parameter in self.engine.model.parameters():
            if parameter.grad is not None:
                parameter.grad.neg_()
        return result

    monkeypatch.setattr(Updates, "_gradient", wrong)
    assert failures() == {"the objective"}


def judged(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The toy's motion quality with its scores changed."""
    wrapped(MotionQuality, "__call__", lambda self, scores: change(scores), monkeypatch)


def test_scores_that_are_handed_to_the_wrong_video(monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, lambda scores: scores.roll(1))
    assert "reward toy_mq" in failures()


def test_scores_that_are_put_together_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward is right; who judges the group in slices is not."""
    wrapped(Rollouts, "judge", lambda self, scores: {name: values.roll(1) for name, values in scores.items()}, monkeypatch)
    assert {"reward toy_vq", "reward toy_mq"} & failures()


@pytest.mark.parametrize(
    "change",
    [
        lambda scores: scores - scores.mean(),
        lambda scores: scores + 0.05 * scores.max(),
        lambda scores: scores.argsort().argsort().float(),
        lambda scores: scores / len(scores),
    ],
    ids=["less the mean", "a little of the largest", "ranks", "over the number"],
)
def test_a_reward_that_depends_on_the_other_videos(change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, change)
    assert "reward toy_mq" in failures()


def test_prompts_that_are_handed_to_the_wrong_video(monkeypatch: pytest.MonkeyPatch) -> None:
    score = TextAlignment.__call__
    monkeypatch.setattr(TextAlignment, "__call__", lambda self, frames, prompts: score(self, frames, prompts[1:] + prompts[:1]))
    assert failures() == {"reward toy_ta"}


@pytest.mark.parametrize("settings", [[], ["objective.reward_combine=per_reward_zscore"], ["objective.advantage=quasi_norm"]])
def test_a_reversed_advantage(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures(*settings) == set()
    wrapped(JudgedGroup, "advantages", lambda self, advantages: -advantages, monkeypatch)
    assert failures(*settings) == {"the advantages"}


def test_half_precision_master_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Trainer.__init__

    def halved(self: Trainer, config: Any) -> None:
        made(self, config)
        for parameter in self.parameters:
            parameter.data = parameter.data.bfloat16()

    monkeypatch.setattr(Trainer, "__init__", halved)
    assert "the master weights" in failures()


def test_master_weights_that_lose_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are float32, and rounded to bfloat16 at every step: most of lora_A stays where it is."""

    def rounded(self: Any, *given: Any) -> None:
        for parameter in self.parameters if isinstance(self, Trainer) else self.param_groups[0]["params"]:
            parameter.data.copy_(parameter.data.bfloat16())

    wrapped(Trainer, "__init__", rounded, monkeypatch)
    wrapped(torch.optim.AdamW, "step", rounded, monkeypatch)
    assert "the weights" in failures("optimizer.lr=1e-5")


def test_an_old_policy_that_is_silently_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policies, "is_live", lambda self, name: True)
    assert failures() == {"the old policy"}


def test_a_reference_policy_that_is_the_present_one(monkeypatch: pytest.MonkeyPatch) -> None:
    semi = ["train.mode=semi_on_policy", "train.buffer=none"]
    assert failures(*semi) == set()
    put = Policies.as_
    monkeypatch.setattr(Policies, "as_", lambda self, name: contextlib.nullcontext() if name == "reference" else put(self, name))
    assert failures(*semi) == {"the reference policy"}


def test_an_old_policy_that_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped(CopoObjective, "predict_known", lambda self, old: 1.1 * old, monkeypatch)
    assert failures() == {"the old policy"}


def test_a_step_too_small_for_the_clip() -> None:
    assert "raise optimizer.lr" in poor("optimizer.lr=1e-7", "objective.tau=1.0", "objective.clip=0.02")["the step"]


def test_a_clip_that_lets_nothing_through(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped(CopoObjective, "ratio", lambda self, outcome: outcome._replace(live=torch.zeros_like(outcome.live)), monkeypatch)
    assert "lower optimizer.lr" in poor()["the live fraction"]


def test_a_limit_that_never_acts() -> None:
    assert "relative_clip" in poor("optimizer.gradient_clip=10.0")["the gradient and its limits"]
    assert not poor("optimizer.gradient_clip=10.0", "optimizer.relative_clip=1.5")
    assert not poor("optimizer.gradient_clip=null")


def test_an_eps_that_shortens_steps() -> None:
    assert "lower optimizer.eps" in poor("optimizer.eps=1.0")["the gradient and eps"]


def test_a_judge_that_is_as_loud_as_what_it_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batch gives the same scores, but a batch of another size does not: as half-precision judges do."""
    judged(monkeypatch, lambda scores: scores + 0.05 * (len(scores) == 3))
    assert "judge in float32" in poor()["the noise of toy_mq"]


def test_an_adapter_that_adds_something(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Trainer.__init__

    def trained(self: Trainer, config: Any) -> None:
        made(self, config)
        for parameter in self.parameters:
            parameter.data.add_(0.01 * torch.randn_like(parameter))

    monkeypatch.setattr(Trainer, "__init__", trained)
    assert failures() == {"a new adapter"}


def test_members_that_are_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped(KeyedNoise, "neighbors", lambda self, noise: noise[:1].expand_as(noise).clone(), monkeypatch)
    assert "the perturbed noise" in failures()
