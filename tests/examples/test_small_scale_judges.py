"""The study's judges that err."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from support.rewards import load_reward
from torch import Tensor

from arcopo_fast.config.reading import load_config
from arcopo_fast.errors import UserError
from arcopo_fast.rewards.base import Reward

FOLDER = Path(__file__).parents[2] / "examples" / "paper_at_small_scale"
sys.path.insert(0, str(FOLDER))

import erring  # noqa: E402
import plan  # noqa: E402


class Plain(Reward):
    """A score that is a mean of the frames."""

    scores = ("plain",)

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        return frames.mean((1, 2, 3, 4))


def judge_of(kind: type[erring.Erring], frames: Tensor) -> erring.Erring:
    """A judge that errs on plain scores, with the scales of these frames."""
    plain = {name: frames.mean((1, 2, 3, 4)) for name in erring.EXACT}
    judge = kind(erring.scales_of(plain, erring.network(frames)))
    judge.exact = {name: type(name, (Plain,), {"scores": (name,)})() for name in erring.EXACT}
    return judge


@pytest.fixture
def frames() -> Tensor:
    """256 videos of blobs in motion."""
    coarse = torch.rand(256, 3, 3, 4, 4)  # [N, 3, F, H, W]
    videos = torch.nn.functional.interpolate(coarse, size=(9, 12, 12), mode="trilinear")
    return videos.movedim(1, 2).contiguous()


@pytest.mark.parametrize("kind", [erring.White, erring.Smooth, erring.Rounded])
def test_errors_are_as_large_as_asked(kind: type[erring.Erring], frames: Tensor) -> None:
    """And those of the three scores are apart, and the same each time, whatever else is judged with a video."""
    judge, exact = judge_of(kind, frames), frames.mean((1, 2, 3, 4))
    scores = judge(frames, [""] * 256)
    assert sorted(scores) == sorted(kind.scores) and all(torch.equal(scores[f"{name}_0"], exact) for name in erring.EXACT)
    for level in erring.LEVELS:
        errors = torch.stack([scores[f"{name}_{level:g}"] - exact for name in erring.EXACT])
        asked = level * exact.std(correction=0)
        if kind is erring.Rounded and level == 1:  # steps wider than what is rounded
            assert (errors.std(1) / asked).max() < 1.1
        else:
            assert (errors.std(1) / asked - 1).abs().max() < 0.2
        if kind is not erring.Rounded:
            assert errors.mean(1).abs().max() < 0.3 * asked
            assert (torch.corrcoef(errors) - torch.eye(3)).abs().max() < 0.9
    alone = judge(frames[7:9].flip(0), [""] * 2)
    for name, values in alone.items():
        torch.testing.assert_close(values.flip(0), scores[name][7:9], rtol=0, atol=1e-4)


def test_only_the_smooth_error_has_a_slope(frames: Tensor) -> None:
    """Near videos get near errors: a tenth of the step, a tenth of the difference. White errors of near videos are strangers."""
    step = torch.randn_like(frames)
    for kind in (erring.Smooth, erring.White):
        judge = judge_of(kind, frames)
        far, near, base = (judge.units(frames + size * step)["toy_mq"] for size in (1e-2, 1e-3, 0.0))
        if kind is erring.Smooth:
            assert (far - base).abs().max() < 0.5
            torch.testing.assert_close(near - base, 0.1 * (far - base), rtol=0.2, atol=2e-3)
        else:
            assert (near - base).std() > 1


def test_rounded_scores_come_in_steps(frames: Tensor) -> None:
    judge, exact = judge_of(erring.Rounded, frames), frames.mean((1, 2, 3, 4))
    for level in erring.LEVELS:
        step = 12**0.5 * level * exact.double().std(correction=0).item()
        steps = judge(frames, [""] * 256)[f"toy_ta_{level:g}"] / step
        torch.testing.assert_close(steps, (exact / step).round(), rtol=0, atol=1e-4)


def test_recipes_name_judges_that_err(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(erring.SCALES, raising=False)
    with pytest.raises(UserError, match=f"set {erring.SCALES} to the file"):
        load_reward("erring:White:toy_vq_0.5")
    (tmp_path / "scales.json").write_text(json.dumps({name: {"spread": 0.1, "mean": 0.0, "std": 1.0} for name in erring.EXACT}))
    monkeypatch.setenv(erring.SCALES, str(tmp_path / "scales.json"))
    for run in plan.runs(plan.PARTS["judges"], {name: plan.sweep(name)[0] for name in plan.SWEPT}):
        weights = load_config(run.recipe, run.settings).rewards
        used = [name for name, weight in weights.items() if weight]
        assert len(used) == 3 and len(weights) == (3 if "exact" in run.name else 6)
        assert all(name.endswith("_0") for name, weight in weights.items() if not weight) and not any(name.endswith("_0") for name in used)
    assert load_reward("erring:Smooth:toy_mq_0.25").function.scales["toy_mq"]["spread"] == 0.1
