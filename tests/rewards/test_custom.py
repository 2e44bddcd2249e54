"""Rewards by name: a user's own by import path, what is said when it cannot be used, and failed scores, which never reach an average."""

from __future__ import annotations

import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.rewards import load_reward
from torch import Tensor

from arcopo_fast.errors import UserError
from arcopo_fast.rewards.base import RewardError, score
from arcopo_fast.rewards.custom import CustomReward, find, load_custom
from arcopo_fast.rewards.registry import REWARDS, judges, load_rewards, reward_bytes, reward_files

MODULE = "mine_of_no_other_test"

SOURCE = """
    import torch

    from arcopo_fast.rewards.base import Reward

    def brightness(frames, prompts):
        return frames.mean((1, 2, 3, 4))

    def as_list(frames, prompts):
        return [None if prompt == "unreadable" else float(video.mean()) for video, prompt in zip(frames, prompts)]

    def as_array(frames, prompts):
        return frames.mean((1, 2, 3, 4)).numpy().astype("float64")

    def no_numbers(frames, prompts):
        return ["good"] * len(frames)

    def too_few(frames, prompts):
        return frames.mean((1, 2, 3, 4))[1:]

    def one_argument(frames):
        return frames

    def broken(frames, prompts):
        return frames.no_such_method()

    class Weighted(torch.nn.Module):
        bytes = 12345

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(3.0))

        def forward(self, frames, prompts):
            return self.weight * frames.mean((1, 2, 3, 4))

    class NeedsArguments:
        def __init__(self, path):
            pass

    class Look:
        scores = ("contrast", "color")
        bytes = 678
        calls = 0

        def __call__(self, frames, prompts):
            self.calls += 1
            return {"contrast": frames.std((1, 2, 3, 4)), "color": frames.std(2).mean((1, 2, 3)), "beside": None}

    class Forgets(Look):
        scores = ["contrast", "sound"]

    class Single(Look):
        scores = ("color",)

    class Passes(Reward):
        scores = ("near", "far")

        def __init__(self):
            self.asked = []

        def __call__(self, frames, prompts):
            return self.ask(self.scores, frames, prompts)

        def ask(self, names, frames, prompts):
            self.asked.append(list(names))
            return {name: frames.mean((1, 2, 3, 4)) for name in names}

    class OneText:
        scores = "contrast"

        def __call__(self, frames, prompts):
            return frames

    Weighted.inner = staticmethod(brightness)
    number = 3
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("own")
    (directory / f"{MODULE}.py").write_text(textwrap.dedent(SOURCE))
    (directory / f"{MODULE}_needs.py").write_text("import no_such_dependency\n")
    (directory / f"{MODULE}_bug.py").write_text("1 / 0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield directory


def judge(name: str, frames: Tensor, prompts: list[str] | None = None, **settings: Any) -> Tensor:
    return score({name: load_reward(name)}, frames, prompts or ["a prompt"] * len(frames), **settings)[name]


@pytest.mark.parametrize("name", ["brightness", "as_list", "as_array", "Weighted", "Weighted.inner"])
def test_anything_that_can_be_called_is_a_reward(name: str) -> None:
    frames = torch.rand(4, 5, 3, 6, 7)
    scores = judge(f"{MODULE}:{name}", frames)
    expected = torch.stack([video.mean() for video in frames]) * (3 if name == "Weighted" else 1)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scores, expected)
    assert reward_bytes([f"{MODULE}:{name}"]) == (12345 if name == "Weighted" else 0)


def test_a_judge_of_several_scores_is_made_and_called_once() -> None:
    names = [f"{MODULE}:Look:color", "sharpness", f"{MODULE}:Look:contrast"]
    rewards, frames = load_rewards(names), torch.rand(4, 5, 3, 6, 7)
    look = rewards[names[0]].function  # type: ignore[attr-defined]
    scores = score(rewards, frames, ["a prompt"] * 4)
    assert rewards[names[0]] is rewards[names[2]] and look.calls == 1 and list(scores) == names
    torch.testing.assert_close(scores[names[0]], frames.std(2).mean((1, 2, 3)))
    torch.testing.assert_close(scores[names[2]], frames.std((1, 2, 3, 4)))
    assert reward_bytes(names) == 678 and len({rewards[name].fingerprint(name) for name in names}) == 2
    torch.testing.assert_close(judge(names[0], frames), scores[names[0]])


def test_what_the_readme_shows_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (tmp_path / "my_package").mkdir()
    (source,) = re.findall(r"^```python\n(# my_package/my_module.py\n.*?)^```", readme, re.S | re.M)
    (tmp_path / "my_package" / "my_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    shown = yaml.safe_load(re.findall(r"^rewards: .*my_package.*$", readme, re.M)[0])["rewards"]
    scores = score(load_rewards(shown), torch.rand(3, 4, 3, 64, 64), ["a red circle moving left"] * 3)
    assert list(scores) == [*shown] and len(shown) == 4 and all(values.shape == (3,) for values in scores.values())


def test_a_judge_of_one_score_has_the_name_of_its_path() -> None:
    frames = torch.rand(4, 5, 3, 6, 7)
    torch.testing.assert_close(judge(f"{MODULE}:Single", frames), frames.std(2).mean((1, 2, 3)))


def test_a_judge_of_several_passes_makes_those_that_are_asked_for() -> None:
    rewards = load_rewards([f"{MODULE}:Passes:near", f"{MODULE}:Passes:far"])
    asked = rewards[f"{MODULE}:Passes:far"].function.asked  # type: ignore[attr-defined]
    score({f"{MODULE}:Passes:far": rewards[f"{MODULE}:Passes:far"]}, torch.rand(2, 2, 3, 4, 4), ["a", "b"])
    score(rewards, torch.rand(2, 2, 3, 4, 4), ["a", "b"])
    assert asked == [["far"], ["near", "far"]]


def test_a_score_that_a_judge_leaves_out_is_named() -> None:
    rewards = load_rewards([f"{MODULE}:Forgets:contrast", f"{MODULE}:Forgets:sound"])
    with pytest.raises(RewardError, match=r"Forgets:contrast', '.*returned a dict without '.*Forgets:sound'; expected a dictionary"):
        score(rewards, torch.rand(2, 2, 3, 4, 4), ["a", "b"])
    with pytest.raises(RewardError, match=r"Forgets:sound' returned a dict; expected \[2\]"):
        judge(f"{MODULE}:Forgets:sound", torch.rand(2, 2, 3, 4, 4))


def test_a_module_inside_goes_where_the_reward_goes() -> None:
    reward = load_custom(f"{MODULE}:Weighted")
    assert [tuple(parameter.shape) for parameter in reward.parameters()] == [()]
    assert next(reward.to(torch.float64).parameters()).dtype == torch.float64


def test_the_packages_rewards_are_found_by_name() -> None:
    """Those that read published files say so, and how much memory they take; the others need nothing."""
    for path, names in judges().items():
        found = find(path, "reward")
        assert found.__name__ == path.partition(":")[2] and set(found.scores) == {*names}, "the registry names what the judge gives"
        for name in names:
            assert REWARDS[name] == path and bool(reward_files(name)) == bool(reward_bytes([name]))
            if not reward_files(name):
                assert type(load_reward(name)) is found


def test_a_model_that_rewards_share_is_counted_once() -> None:
    one = reward_bytes(["videoalign_vq"])
    assert reward_bytes(["videoalign_vq", "videoalign_mq_grey", "videoalign_ta"]) == one
    assert reward_bytes(["videoalign_vq", "hpsv3", f"{MODULE}:Weighted"]) == one + reward_bytes(["hpsv3"]) + 12345


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("no_such_reward", ["'no_such_reward'", "toy_vq", "package.module:function"]),
        ("no such:thing", ["'no such:thing'", "package.module:function"]),
        (f"{MODULE}:", ["package.module:function"]),
        ("../../etc/passwd:f", ["package.module:function"]),
        ("no_such_module.sub:f", ["no_such_module.sub", "No module named 'no_such_module'", "PYTHONPATH"]),
        (f"{MODULE}_needs:f", [f"{MODULE}_needs", "No module named 'no_such_dependency'", "install what it needs"]),
        (f"{MODULE}:brightnes", ["has no brightnes", "did you mean brightness?"]),
        (f"{MODULE}:number", ["is a int"]),
        (f"{MODULE}:Look", [f"is not a score of {MODULE}:Look", f"give {MODULE}:Look:contrast, {MODULE}:Look:color"]),
        (f"{MODULE}:Look:sound", ["Look:sound' is not a score", f"{MODULE}:Look:contrast"]),
        (f"{MODULE}:brightness:color", ["is not a score", f"give {MODULE}:brightness"]),
        (f"{MODULE}:OneText", ["has scores 'contrast'", "scores = ("]),
        (f"{MODULE}:NeedsArguments", ["takes (path)", "without arguments"]),
        (f"{MODULE}:one_argument", ["takes (frames)", "(frames, prompts)"]),
    ],
)
def test_what_cannot_be_used_is_one_line(name: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        load_reward(name)
    assert "\n" not in str(raised.value) and all(part in str(raised.value) for part in parts), str(raised.value)


def test_errors_in_the_users_code_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        load_reward(f"{MODULE}_bug:f")
    with pytest.raises(AttributeError, match="no_such_method") as raised:
        judge(f"{MODULE}:broken", torch.rand(2, 2, 3, 4, 4))
    assert any(entry.path.name == f"{MODULE}.py" for entry in raised.traceback)


@pytest.mark.parametrize(("name", "error"), [("no_numbers", "one number for each video"), ("too_few", r"shape \[3\]; expected \[4\]")])
def test_what_a_function_returns_is_checked(name: str, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{MODULE}:{name}.*{error}"):
        judge(f"{MODULE}:{name}", torch.rand(4, 2, 3, 4, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_failed_scores_are_an_error_or_quarantined(bad: float) -> None:
    frames, values = torch.rand(3, 2, 3, 4, 4), torch.rand(3)
    values[1] = bad
    rewards = {"it": CustomReward("it", lambda frames, prompts: values), "other": load_reward(f"{MODULE}:brightness")}
    with pytest.raises(ValueError, match="'it' returned .* video 1"):
        score(rewards, frames, ["a", "b", "c"])
    with pytest.warns(UserWarning, match="'it' returned scores that are not finite"):
        scores = score(rewards, frames, ["a", "b", "c"], quarantine=True)
    assert scores["it"].isnan().tolist() == [False, True, False]
    assert torch.equal(scores["it"][::2], values[::2]) and scores["other"].isfinite().all()


def test_none_in_a_list_is_a_failed_score() -> None:
    frames = torch.rand(3, 2, 3, 4, 4)
    with pytest.warns(UserWarning):
        scores = judge(f"{MODULE}:as_list", frames, ["a", "unreadable", "c"], quarantine=True)
    assert scores.isnan().tolist() == [False, True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert judge(f"{MODULE}:as_list", frames, quarantine=True).isfinite().all()


def test_rewards_leave_no_graph_behind() -> None:
    function: Callable[..., Tensor] = lambda frames, prompts: frames.mean((1, 2, 3, 4)) * torch.nn.Parameter(torch.rand(()))  # noqa: E731
    assert score({"it": CustomReward("it", function)}, torch.rand(2, 2, 3, 4, 4), ["a", "b"])["it"].grad_fn is None
