"""Windows of a group's videos: which latent frames are decoded, which pixels a reward sees, under which prompt, and what becomes of its
scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.commands import SMALL_COPO
from torch import Tensor

from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.data.buffer import Buffer
from arcopo_fast.data.prompts import Prompt, Turn
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.windows import Part, View, Window, parts
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rollout.group import Group
from arcopo_fast.training.buffered import BufferedGroups, policy_of, recipe_of, store
from arcopo_fast.training.groups import JudgedGroup, Rollouts
from arcopo_fast.training.lessons import reward_record
from arcopo_fast.training.trainer import Trainer

SIZES = ["video.chunks=8", "video.chunk_frames=3", "rollout.pivot=5", "rewards={a: 2.0, b: 1.0}"]
LOCAL_AND_GLOBAL = "judge.windows={local: {chunks: [0, 0], before: 2}, global: {chunks: [1, 3], before: 5, weight: 0.5, rewards: [b]}}"


def recipe(*overrides: str) -> Config:
    return load_config("toy", [*SIZES, *overrides])


# Which frames


def test_without_windows_everything_is_seen() -> None:
    view = View.of(recipe(), 4)
    assert (view.frames, view.warmup) == (range(24), 0)
    assert [dict(window.rewards) for window in view.windows] == [{"a": "a", "b": "b"}] and view.windows[0].frames == range(24)
    assert view.pixels(range(24), 4) == slice(0, 93)


@pytest.mark.parametrize(
    ("overrides", "pivot", "frames", "warmup"),
    [
        (["judge.before=4"], 4, range(8, 24), 6),
        (["judge.before=4", "judge.warmup=all"], 4, range(8, 24), 8),
        (["judge.before=4", "judge.warmup=100"], 4, range(8, 24), 8),
        (["judge.before=9"], 4, range(3, 24), 3),  # there are no more frames to warm up with
        (["judge.before=12"], 4, range(24), 0),
        (["judge.before=0"], 0, range(24), 0),
        (["judge.before=0"], 7, range(21, 24), 6),
        ([LOCAL_AND_GLOBAL], 4, range(10, 24), 6),  # the union
        (["judge.windows={late: {chunks: [2, 3]}}"], 4, range(12, 24), 6),  # from the pivot at the latest: up to there it is one video
        (["judge.before=3", "rollout.pivot=shared", "rollout.horizon=2"], 4, range(9, 21), 6),
        (["judge.windows={all: {chunks: [0, null], before: null}}"], 4, range(24), 0),
    ],
)
def test_the_frames_that_are_decoded(overrides: list[str], pivot: int, frames: range, warmup: int) -> None:
    view = View.of(recipe(*overrides), pivot)
    assert (view.frames, view.warmup) == (frames, warmup)
    assert View.of(recipe(*overrides), pivot).windows == view.windows


def test_windows_are_cut_from_the_pixels_of_their_union() -> None:
    view = View.of(recipe(LOCAL_AND_GLOBAL), 4)
    assert [window.frames for window in view.windows] == [range(10, 15), range(10, 24)]
    assert [view.pixels(window.frames, 4) for window in view.windows] == [slice(0, 20), slice(0, 56)], "4 n frames of n latents"
    at_the_start = View(range(12), 0, view.windows)
    assert at_the_start.pixels(range(3), 4) == slice(0, 9) and at_the_start.pixels(range(1, 3), 4) == slice(1, 9)
    assert at_the_start.pixels(range(5, 12), 4) == slice(17, 45) and at_the_start.pixels(range(5, 12), 1) == slice(5, 12)


def test_how_far_back_is_decoded() -> None:
    reaches = [
        recipe(*overrides).judge.reach
        for overrides in ([], ["judge.before=4"], ["judge.before=4", "judge.warmup=all"], [LOCAL_AND_GLOBAL, "judge.warmup=2"])
    ]
    assert reaches == [None, 10, None, 7]


# Under which prompt


def test_a_window_is_cut_where_the_prompt_changes() -> None:
    switches = {0: "a", 6: "b", 12: "c"}
    assert parts(range(3, 18), switches, 3) == [Part(range(3, 6), "a"), Part(range(6, 12), "b"), Part(range(12, 18), "c")]
    assert parts(range(6, 12), switches, 3) == [Part(range(6, 12), "b")]
    assert parts(range(13, 18), switches, 3) == [Part(range(13, 18), "c")]
    assert parts(range(13, 18), {}, 3) == [Part(range(13, 18), None)]


def test_a_prompt_that_changes_counts_from_the_next_chunk_on() -> None:
    prompt = Prompt("a", turns=(Turn(10, Prompt("b")), Turn(18, Prompt("c", "longer"))))
    view = View.of(recipe("judge.before=4"), 4, prompt)
    assert list(view.windows[0].parts) == [Part(range(8, 12), "a"), Part(range(12, 18), "b"), Part(range(18, 24), "c")]
    assert list(View.of(recipe("judge.before=1"), 4, prompt).windows[0].parts)[0] == Part(range(11, 18), "b"), "one latent is no video"
    assert View.of(recipe("judge.before=4"), 4, Prompt("a")) == View.of(recipe("judge.before=4"), 4)


def test_a_part_that_is_too_short_joins_its_neighbor() -> None:
    switches = {0: "a", 6: "b", 7: "c", 12: "d"}
    assert parts(range(4, 12), switches, 3) == [Part(range(4, 7), "b"), Part(range(7, 12), "c")]
    assert parts(range(5, 12), switches, 3) == [Part(range(5, 12), "c")], "a joins b, and both are still too short"
    assert parts(range(3, 14), switches, 3) == [Part(range(3, 7), "a"), Part(range(7, 14), "c")]
    assert parts(range(5, 7), {0: "a", 6: "b"}, 3) == [Part(range(5, 7), "b")], "nothing is left to join"
    assert sum(len(part.frames) for part in parts(range(2, 30), switches, 3)) == 28


class Seeing(Reward):
    """A judge of several scores that keeps what it was shown; each is the mean of the frames plus the length of the prompt."""

    scores = ("a", "b", "toy_vq", "toy_mq")

    def __init__(self) -> None:
        self.shown: list[tuple[Tensor, list[str]]] = []

    def __call__(self, frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        self.shown.append((frames.clone(), prompts))
        return dict.fromkeys(self.scores, frames.flatten(1).mean(1) + torch.tensor([float(len(prompt)) for prompt in prompts]))


def test_every_part_is_judged_under_its_prompt_and_a_score_is_their_mean() -> None:
    view = View(range(10, 16), 6, [Window({"local/a": "a"}, [Part(range(10, 14), "xx"), Part(range(14, 16), None)])])
    frames, judge = torch.rand(2, 24, 3, 2, 2), Seeing()
    scores = view.judge({"a": judge, "b": judge}, frames, ["yyy", "zzzz"], 4)
    assert [(shown.shape[1], prompts) for shown, prompts in judge.shown] == [(16, ["xx", "xx"]), (8, ["yyy", "zzzz"])]
    assert torch.equal(judge.shown[0][0], frames[:, :16]) and torch.equal(judge.shown[1][0], frames[:, 16:])
    means = [frames[:, :16].flatten(1).mean(1) + 2, frames[:, 16:].flatten(1).mean(1) + torch.tensor([3.0, 4.0])]
    torch.testing.assert_close(scores["local/a"], (2 * means[0] + means[1]) / 3)
    assert list(scores) == ["local/a"]


# A group


class Scene(NamedTuple):
    """A trainer and a group of it, which forks at the third of four chunks.

    Attributes:
        judge: in the place of all rewards.
    """

    trainer: Trainer
    group: Group
    judge: Seeing
    whole: Tensor

    def under(self, *overrides: str) -> Rollouts:
        """Return its rollouts, as they judge under a recipe's other `judge`."""
        rollouts = copy(self.trainer.rollouts)
        rollouts.config = rollouts.config.model_copy(update={"judge": load_config("toy", [*GROUP, *overrides]).judge})
        rollouts.rewards = dict.fromkeys(rollouts.config.rewards, self.judge)
        self.judge.shown.clear()
        return rollouts

    def judged(self, *overrides: str) -> tuple[JudgedGroup, Config]:
        """Return the group with its scores under a recipe's other `judge`, and that recipe."""
        rollouts, prompt = self.under(*overrides), self.trainer.rollouts.prompt(1, 0)
        return JudgedGroup(self.group, prompt, rollouts.judge(self.group, rollouts.decode(self.group), prompt)), rollouts.config


GROUP = [*SMALL_COPO, "video.chunks=4", "sampler.steps=[1000, 350]", "rollout.pivot=3", "rewards={toy_vq: 1.0, toy_mq: 0.5}"]
GROUP += ["objective.advantage_std_floor=0"]


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    trainer = Trainer(load_config("toy", GROUP))
    rollouts = trainer.rollouts
    with rollouts.roll_out(rollouts.encode(rollouts.prompt(1, 0)), 1, 0) as group:
        yield Scene(trainer, group, Seeing(), torch.cat(list(rollouts.decode(group))))


def cut(scene: Scene, first: int, stop: int) -> Tensor:
    """Return the pixels of latent frames [first, stop) of the whole videos, first >= 1."""
    factor = scene.trainer.generator.decoder.factor
    return scene.whole[:, 1 + factor * (first - 1) : 1 + factor * (stop - 1)]


@pytest.mark.parametrize("warmup", ["all", "1"])
def test_only_a_window_is_decoded(scene: Scene, warmup: str) -> None:
    chunk, factor = scene.trainer.shape.chunk_frames[0], scene.trainer.generator.decoder.factor
    windows = "judge.windows={a: {chunks: [0, 0], before: 1, rewards: [toy_vq]}, b: {chunks: [0, 1], weight: 0.5}}"
    _, config = scene.judged(windows, f"judge.warmup={warmup}")
    first, pivot = 2 * chunk - 1, 2 * chunk
    shown = [frames for frames, _ in scene.judge.shown]
    assert [frames.shape[1] for frames in shown] == [factor * (chunk + 1), factor * 2 * chunk], "4 n frames of n latents"
    exact = [cut(scene, first, pivot + chunk), cut(scene, pivot, pivot + 2 * chunk)]
    near = [(frames - expected).abs().mean().item() for frames, expected in zip(shown, exact)]
    assert all(torch.equal(*pair) for pair in zip(shown, exact)) if warmup == "all" else 0 < max(near) < 0.2
    assert torch.equal(shown[0][:1, :factor].expand(3, -1, -1, -1, -1), shown[0][:, :factor]), "one video up to the pivot"
    assert (shown[0][0, factor:] != shown[0][1, factor:]).any()
    decoded = next(scene.under(windows, f"judge.warmup={warmup}").decode(scene.group))
    assert decoded.shape[1] == factor * (2 * chunk + 1) < scene.whole.shape[1], "the frames of the union are all that there are"
    assert config.score_weights == {"a/toy_vq": 1.0, "b/toy_vq": 0.5, "b/toy_mq": 0.25}


def test_every_part_of_a_group_is_judged_under_its_own_prompt(scene: Scene) -> None:
    """A prompt that changes with the pivot chunk: the reward reads both, and its score is the mean by frames."""
    chunk, rollouts = scene.trainer.shape.chunk_frames[0], scene.under("judge.before=" + str(scene.trainer.shape.chunk_frames[0]))
    prompt = Prompt("ab", turns=(Turn(2 * chunk, Prompt("abcd")),))
    scores = rollouts.judge(scene.group, rollouts.decode(scene.group), prompt)["toy_vq"]
    (early, first), (late, second) = scene.judge.shown
    assert (first, second) == (["ab"] * 3, ["abcd"] * 3) and late.shape[1] == 2 * early.shape[1]
    assert torch.equal(early[:1].expand(3, -1, -1, -1, -1), early), "before the pivot chunk all members are one video"
    expected = (early.flatten(1).mean(1) + 2 + 2 * (late.flatten(1).mean(1) + 4)) / 3
    torch.testing.assert_close(scores, expected)


def test_a_window_of_everything_is_what_there_is_without_windows(scene: Scene) -> None:
    plain, config = scene.judged()
    frames = scene.judge.shown[0][0]
    windowed, other = scene.judged("judge.windows={all: {chunks: [0, null], before: null}}")
    assert torch.equal(frames, scene.whole) and torch.equal(scene.judge.shown[0][0], frames)
    assert {f"all/{name}": scores.tolist() for name, scores in plain.rewards.items()} == {
        k: v.tolist() for k, v in windowed.rewards.items()
    }
    assert torch.equal(plain.advantages(config), windowed.advantages(other))
    halves, half = scene.judged(
        "judge.windows={a: {chunks: [0, null], before: null, weight: 0.5}, b: {chunks: [0, null], before: null, weight: 0.5}}"
    )
    torch.testing.assert_close(halves.advantages(half), plain.advantages(config), rtol=0, atol=1e-12)


def test_a_member_without_a_score_in_one_window_keeps_the_others_advantage_and_is_counted(scene: Scene) -> None:
    judged, config = scene.judged("judge.windows={a: {chunks: [0, 0]}, b: {chunks: [0, 1], weight: 0.5, rewards: [toy_mq]}}")
    judged.rewards["a/toy_vq"][1] = math.nan
    advantages = judged.advantages(config)
    of_b = judged.rewards["b/toy_mq"].double()
    assert advantages[1].item() == pytest.approx(0.5 * ((of_b - of_b.mean()) / of_b.std(correction=0))[1].item())
    record = reward_record(config, [judged.outcome(0, config)])
    assert (record["partly_scored"], record["failed_scores"]) == (1, 1)
    assert {"reward/a/toy_vq", "reward/b/toy_mq_std", "reward"} <= record.keys()
    judged.rewards["b/toy_mq"][1] = math.nan
    assert judged.advantages(config)[1] == 0 and reward_record(config, [judged.outcome(0, config)])["partly_scored"] == 0


def test_a_buffer_keeps_the_scores_of_windows(scene: Scene, tmp_path: Path) -> None:
    trainer, windows = scene.trainer, "judge.windows={a: {chunks: [0, 0], before: 1}, b: {chunks: [0, 1], weight: 0.5, rewards: [toy_mq]}}"
    judged, config = scene.judged(windows)
    policy = policy_of(config, trainer.generator, trainer.objective)
    buffer = Buffer.create(str(tmp_path / "buffer"), policy, recipe_of(config, trainer.prompts, {}), groups=1)
    for index in buffer.missing(1, print):
        buffer.write(index, *store(judged, trainer.shape))

    def read(*overrides: str) -> JudgedGroup:
        other = load_config("toy", [*GROUP, *overrides])
        opened = Buffer.open(str(buffer.path), policy_of(other, trainer.generator, trainer.objective))
        return BufferedGroups(other, trainer.generator, trainer.engine, trainer.objective, opened).judged(1, 0)

    with (again := read(windows)).group:
        assert {name: scores.tolist() for name, scores in again.rewards.items()} == {k: v.tolist() for k, v in judged.rewards.items()}
        assert torch.equal(again.advantages(config), judged.advantages(config))
    with read(windows.replace("weight: 0.5", "weight: 2.0")).group:
        pass  # weights are the trainer's business
    with pytest.raises(UserError, match="judge.a.before: 2 here, 1 in the buffer"):
        read(windows.replace("before: 1", "before: 2"))
    with pytest.raises(UserError, match="not scored by b/toy_vq, only by a/toy_mq, a/toy_vq, b/toy_mq"):
        read(windows.replace("rewards: [toy_mq]", "rewards: [toy_vq]"))
