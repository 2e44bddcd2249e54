"""Rewards that misbehave: whatever one of them does is an error that names it, or does no harm; no score is silently wrong."""

from __future__ import annotations

import asyncio
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rewards import load_reward
from torch import Tensor

from arcopo_fast.errors import UserError
from arcopo_fast.rewards import base, wire
from arcopo_fast.rewards.base import FramesNotFinite, Reward, RewardError, score
from arcopo_fast.rewards.custom import CustomReward

PROMPTS = ["first", "second", "third", "fourth"]


def judged(function: Callable[[Tensor, list[str]], Any], frames: Tensor | None = None, **more: Any) -> Tensor:
    frames = torch.rand(4, 3, 3, 6, 8) if frames is None else frames
    return score({"mine": CustomReward("mine", function)}, frames, PROMPTS[: len(frames)], **more)["mine"]


def first_pixels(frames: Tensor, prompts: list[str]) -> Tensor:
    return frames[:, 0, 0, 0, 0]


# What it is given ------------------------------------------------------------------------------------------------------------------


def swap(array: Any, first: Any, second: Any) -> None:
    array[first], array[second] = np.array(array[second]), np.array(array[first])


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda frames: frames.mul_(255),
    "one pixel of a view": lambda frames: frames[2, 1].select(0, 1)[3:4].add_(1e-6),
    "through data": lambda frames: frames.data.clamp_(0.2, 0.8),
    "other data": lambda frames: setattr(frames, "data", frames.data * 2),
    "half the data": lambda frames: setattr(frames, "data", frames.data.half()),
    "one pixel through numpy": lambda frames: frames.numpy().__setitem__((3, 2, 1, 0, 5), 0.5),
    "RGB to BGR": lambda frames: swap(frames.numpy(), np.s_[:, :, 0], np.s_[:, :, 2]),
    "frames in another order": lambda frames: swap(frames.numpy(), np.s_[:, 0], np.s_[:, 1]),
    "videos in another order": lambda frames: swap(frames.numpy(), 0, 3),
    "upside down": lambda frames: frames.numpy().__setitem__(..., frames.numpy()[..., ::-1, :].copy()),
    "mirrored": lambda frames: frames.numpy().__setitem__(..., frames.numpy()[..., ::-1].copy()),
    "transposed": lambda frames: frames.transpose_(1, 2),
    "resized": lambda frames: frames.resize_(4, 2, 3, 6, 8),
    "a gradient asked for": lambda frames: frames.requires_grad_(),
    "not finite": lambda frames: frames[0].fill_(torch.nan),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("fails", [False, True])
def test_frames_that_a_reward_changed_are_judged_by_no_other(change: str, fails: bool) -> None:
    asked = []

    def changes(frames: Tensor, prompts: list[str]) -> list[float | None]:
        CHANGES[change](frames)
        return [None if fails else 1.0] * 4

    rewards = {"changes": CustomReward("changes", changes), "next": CustomReward("next", lambda frames, prompts: asked.append(1))}
    with pytest.raises(RewardError, match=r"reward 'changes' changed the frames .*frames\.clone\(\)"):
        score(rewards, torch.rand(4, 3, 3, 6, 8), PROMPTS, quarantine=True)
    assert not asked


def test_frames_may_be_read_copied_and_written_as_they_are() -> None:
    frames = torch.rand(4, 3, 3, 6, 7).transpose(3, 4)  # not contiguous, and of an odd size
    kept = frames.clone()

    def reads(frames: Tensor, prompts: list[str]) -> Tensor:
        frames.clamp_(0, 1)
        frames.clone().zero_()
        return first_pixels(frames, prompts)

    assert torch.equal(judged(reads, frames), kept[:, 0, 0, 0, 0]) and torch.equal(frames, kept)


def test_prompts_are_each_rewards_own() -> None:
    seen: list[list[str]] = []

    def changes(frames: Tensor, prompts: list[str]) -> Tensor:
        seen.append(list(prompts))
        prompts.reverse()
        prompts[0] = "another"
        prompts.append("one more")
        return first_pixels(frames, prompts)

    given = tuple(PROMPTS)
    score({name: CustomReward(name, changes) for name in ("one", "two")}, torch.rand(4, 2, 3, 4, 4), given)  # type: ignore[arg-type]
    assert seen == [PROMPTS, PROMPTS] and given == tuple(PROMPTS)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_frames_that_are_not_finite_are_judged_by_none(bad: float) -> None:
    """As bytes they would be black pixels, with a score like any other."""
    frames = torch.rand(4, 3, 3, 6, 8)
    frames[2, 1, 0, 5, 7] = bad
    assert wire.to_uint8(frames).float().isfinite().all()
    with pytest.raises(FramesNotFinite, match=r"video 2 of 4 \('third'\).*not finite.*optimizer.lr.*dtype") as raised:
        judged(lambda frames, prompts: pytest.fail("it was asked"), frames, quarantine=True)
    assert isinstance(raised.value, UserError) and "\n" not in str(raised.value)


def test_no_frames_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"rewards judge fp32 frames"):
        judged(first_pixels, torch.rand(0, 3, 3, 6, 8))


# What it returns -------------------------------------------------------------------------------------------------------------------

VALUES = [0.5, -2.0, 3.0, 0.0]
READ: dict[str, Any] = {
    "list": VALUES,
    "tuple": tuple(VALUES),
    "None in a list": [0.5, None, 3, 0.0],
    "integers": [1, 2, 3, 4],
    "booleans": [True, False, True, True],
    "fp64": torch.tensor(VALUES, dtype=torch.float64),
    "bf16": torch.tensor(VALUES, dtype=torch.bfloat16),
    "int64": torch.tensor([1, 2, 3, 4]),
    "bool": torch.tensor([True, False, True, True]),
    "a view": torch.tensor([VALUES, VALUES]).T[:, 0],
    "with a gradient": torch.nn.Parameter(torch.tensor(VALUES)).sub(0),
    "list of tensors": [torch.tensor(value) for value in VALUES],
    "list of numpy's numbers": [np.float32(0.5), np.int64(-2), np.bool_(True), np.array(1.0)],
    "array": np.array(VALUES, dtype=np.float16),
    "integer array": np.arange(4, dtype=np.uint8),
    "array of objects": np.array([0.5, None, Fraction(1, 2).numerator, np.float32(2)], dtype=object),
    "another byte order": np.array(VALUES, dtype=">f4"),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "None": (None, "None"),
    "text": ("0.5", "a str"),
    "number": (0.5, "a float"),
    "scalar": (torch.tensor(0.5), "a Tensor of float32, shape []"),
    "column": (torch.ones(4, 1), "a Tensor of float32, shape [4, 1]"),
    "row": (torch.ones(1, 4), "shape [1, 4]"),
    "too few": (torch.ones(3), "shape [3]"),
    "too many": (VALUES + [1.0], "a list of 5"),
    "nothing": ([], "a list of 0"),
    "dictionary": ({"score": VALUES}, "a dict"),
    "dictionary by video": (dict(enumerate(VALUES)), "a dict"),
    "set": (set(VALUES), "a set"),
    "generator": ((value for value in VALUES), "a generator"),
    "texts": (["0.1", "0.2", "0.3", "0.4"], "a list of 4 in which there is a str"),
    "one text": ([0.1, 0.2, "n/a", 0.4], "in which there is a str"),
    "lists": ([[value] for value in VALUES], "in which there is a list"),
    "rows": ([torch.tensor([value]) for value in VALUES], "in which there is a Tensor"),
    "scores and more": ((torch.ones(4), {}), "a tuple of 2 in which there is a Tensor"),
    "complex": (torch.ones(4, dtype=torch.complex64), "complex64"),
    "complex numbers": ([1j] * 4, "in which there is a complex"),
    "array of texts": (np.array(["a"] * 4), "a ndarray of <U1"),
    "array of times": (np.array([1, 2, 3, 4], dtype="m8[s]"), "a ndarray of timedelta64"),
    "masked": (np.ma.masked_array(VALUES, [0, 1, 0, 0]), "a MaskedArray"),
    "masked ones": (list(np.ma.masked_array(VALUES, [0, 1, 0, 0])), "in which there is a MaskedConstant"),
    "sparse": (torch.tensor(VALUES).to_sparse(), "a Tensor"),
    "meta": (torch.empty(4, device="meta"), "a Tensor"),
    "a class": (Tensor, "a _TensorMeta"),
    "huge": ([10**400] * 4, "in which there is a int"),
}


@pytest.mark.filterwarnings("ignore:reward 'mine' returned scores that are not finite")
@pytest.mark.parametrize("kind", READ)
def test_numbers_are_read_as_they_are(kind: str) -> None:
    scores = judged(lambda frames, prompts: READ[kind], quarantine=True)
    values = READ[kind].detach() if isinstance(READ[kind], Tensor) else READ[kind]
    expected = [torch.nan if value is None else float(value) for value in values]
    assert scores.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", REFUSED)
def test_anything_else_is_one_line(kind: str) -> None:
    returned, described = REFUSED[kind]
    with pytest.raises(RewardError) as raised:
        judged(lambda frames, prompts: returned, quarantine=True)
    line = str(raised.value)
    assert isinstance(raised.value, UserError) and line.startswith("reward 'mine' returned ") and described in line and "\n" not in line, (
        line
    )
    assert "expected [4], one number for each video" in line


def test_a_scalar_is_refused_for_one_video_as_for_many() -> None:
    for count in (1, 2):
        with pytest.raises(RewardError, match=rf"shape \[\]; expected \[{count}\]"):
            judged(lambda frames, prompts: frames.mean(), torch.rand(count, 2, 3, 4, 4))


def test_a_reward_of_the_package_is_read_alike() -> None:
    class Direct(Reward):
        scores = ("direct",)

        def __call__(self, frames: Tensor, prompts: list[str]) -> Any:
            return [float(video.mean()) for video in frames]

    frames = torch.rand(2, 2, 3, 4, 4)
    torch.testing.assert_close(score({"it": Direct()}, frames, ["a", "b"])["it"], frames.mean((1, 2, 3, 4)))


@pytest.mark.parametrize("returned", ["tensor", "array", "frames"])
def test_what_a_reward_does_later_changes_no_score(returned: str) -> None:
    values = torch.rand(4)
    frames = torch.rand(4, 2, 3, 4, 4)
    given = {"tensor": values, "array": values.numpy(), "frames": frames[:, 0, 0, 0, 0]}[returned]
    scores = judged(lambda frames, prompts: given, frames)
    kept = scores.clone()
    values.zero_()
    frames.zero_()
    assert torch.equal(scores, kept) and kept.any()


# How it ends -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "shown"), [(0, "0"), (3, "3"), (None, ""), ("no model", "'no model'")])
def test_sys_exit_is_an_error_that_names_the_reward(code: Any, shown: str) -> None:
    with pytest.raises(RewardError, match=r"test_misbehaving\.py, line \d+") as raised:
        judged(lambda frames, prompts: sys.exit(code))
    assert f"reward 'mine' called sys.exit({shown})" in str(raised.value)


@pytest.mark.parametrize("where", ["import", "class"])
def test_sys_exit_before_the_first_video_is_one_too(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {
        "import": "import argparse\nargparse.ArgumentParser().parse_args(['--unknown'])\n",
        "class": "class Reward:\n    def __init__(self):\n        raise SystemExit(4)\n",
    }[where]
    module = f"ends_in_{where}"
    (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=rf"reward '{module}:Reward'.*called sys\.exit\({2 if where == 'import' else 4}\)"):
        load_reward(f"{module}:Reward")


@pytest.mark.parametrize("kind", [AttributeError, StopIteration, OSError, asyncio.CancelledError, GeneratorExit])
def test_an_exception_keeps_its_traceback_and_names_the_reward(kind: type[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(frames: Tensor, prompts: list[str]) -> None:
        raise kind("inside")

    with pytest.raises(kind, match="inside") as raised:
        judged(breaks)
    shown = "".join(traceback.format_exception(raised.type, raised.value, raised.tb)) + capsys.readouterr().err
    assert "in breaks" in shown and "raised by reward 'mine'" in shown


def test_ctrl_c_is_the_users() -> None:
    def interrupted(frames: Tensor, prompts: list[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        judged(interrupted)
    assert not getattr(raised.value, "__notes__", [])


def test_a_reward_that_takes_long_is_named_ever_less_often(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(base, "SLOW", 0.05)
    judged(lambda frames, prompts: (time.sleep(0.9), first_pixels(frames, prompts))[1])
    judged(first_pixels)
    said = capsys.readouterr().err.splitlines()
    assert 2 <= len(said) <= 5 and all(line.startswith("reward 'mine' has been judging 4 videos for ") for line in said), said
    time.sleep(0.2)
    assert not capsys.readouterr().err, "it is done"
