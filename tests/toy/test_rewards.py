"""The rewards of the toy world have their peak at flawless data as the VAE shows them; damage, wrong captions and fixed filters cost."""

from __future__ import annotations

import time
from typing import Callable, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arcopo_fast.build import checkpoint_path
from arcopo_fast.evaluation.filters import FILTERS, slower, unsharp
from arcopo_fast.rewards.base import Reward, score
from arcopo_fast.toy import data
from arcopo_fast.toy.rewards import MotionQuality, TextAlignment, VisualQuality
from arcopo_fast.toy.vae_training import decode, encode, load_vae

VAE = load_vae(checkpoint_path("toy") / "vae")
REWARDS: tuple[Reward, ...] = (VisualQuality(), MotionQuality(), TextAlignment())


class Videos(NamedTuple):
    frames: Tensor
    captions: list[str]


def shown(frames: Tensor) -> Tensor:
    """Return what a generator without any fault would show, [N, F, 3, H, W]."""
    with torch.no_grad():
        return decode(VAE, encode(VAE, frames))


@pytest.fixture(scope="module")
def videos() -> Videos:
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    frames, captions, _ = data.sample(12, 8, generator, flaws=0)
    return Videos(shown(frames), captions)


def blurred(frames: Tensor, width: int) -> Tensor:
    return F.avg_pool2d(frames.flatten(0, 1), width, stride=1, padding=width // 2, count_include_pad=False).view(frames.shape)


def noisy(frames: Tensor) -> Tensor:
    return (frames + 0.05 * torch.randn(frames.shape)).clamp(0, 1)


def shuffled(frames: Tensor) -> Tensor:
    return frames[:, torch.randperm(frames.shape[1])]


def flickering(frames: Tensor) -> Tensor:
    return (frames * (1 + 0.25 * torch.randn(*frames.shape[:2], 1, 1, 1))).clamp(0, 1)


def striped(frames: Tensor) -> Tensor:
    """Every second row of the whole picture greyed out: a shape that is not uniform inside."""
    frames = frames.clone()
    frames[..., ::2, :] = frames[..., ::2, :].mean(2, keepdim=True)
    return frames


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.scores[0])
@pytest.mark.parametrize("latent_frames", [8, 12])
def test_flawless_videos_score_high(reward: Reward, latent_frames: int) -> None:
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    frames, captions, _ = data.sample(24, latent_frames, generator, flaws=0)
    scores = reward(shown(frames), captions)
    assert scores.shape == (24,) and scores.dtype == torch.float32
    assert scores.median() > 0.9 and scores.mean() > 0.85 and scores.min() > 0.35 and scores.max() <= 1


def test_flaws_cost_every_video_and_no_filter_repairs_them() -> None:
    """Alignment lives on it: nearly all videos have something to gain, and a filter earns less than a quarter of that."""
    seed, totals = int(torch.randint(2**31, ())), []
    for flaws in (0.0, 0.5, 1.0):
        frames, captions, _ = data.sample(24, 8, torch.Generator().manual_seed(seed), flaws=flaws)
        frames = shown(frames)
        totals.append(torch.stack([reward(frames, captions) for reward in REWARDS]).sum(0))
    clean, half, full = totals
    assert (clean > full).float().mean() > 0.9 and clean.mean() > half.mean() > full.mean()
    gain = (clean - full).mean()
    assert gain > full.std()
    for name, changed in FILTERS.items():
        filtered = changed(frames)
        assert (torch.stack([reward(filtered, captions) for reward in REWARDS]).sum(0) - full).mean() < gain / 4, name


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_slower_and_faster_than_the_data_cost_motion_quality(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = int(torch.randint(2**31, ()))
    scores = []
    for speed in (0.5, 0.5 * factor):
        monkeypatch.setattr(data, "SPEED_RANGE", (speed, speed))
        frames, captions, _ = data.sample(12, 6, torch.Generator().manual_seed(seed), flaws=0)
        scores.append(MotionQuality()(shown(frames), captions))
    assert (scores[1] < scores[0] - 0.2).all()


@pytest.mark.parametrize(
    ("reward", "damage", "most"),
    [
        (VisualQuality(), lambda frames: blurred(frames, 5), 0.85),
        (VisualQuality(), lambda frames: blurred(frames, 9), 0.5),
        (VisualQuality(), lambda frames: unsharp(frames, 2.0), 0.8),
        (MotionQuality(), slower, 0.85),
        (VisualQuality(), noisy, 0.8),
        (VisualQuality(), striped, 0.8),
        (MotionQuality(), shuffled, 0.3),
        (MotionQuality(), flickering, 0.6),
        (MotionQuality(), lambda frames: frames[:, :1].expand_as(frames), 0.6),
        (TextAlignment(), lambda frames: blurred(frames, 9), 0.9),
        (TextAlignment(), lambda frames: frames.flip(1), 0.5),
    ],
)
def test_damage_costs(videos: Videos, reward: Reward, damage: Callable[[Tensor], Tensor], most: float) -> None:
    damaged = reward(damage(videos.frames), videos.captions)
    assert damaged.mean() < most
    assert (damaged <= reward(videos.frames, videos.captions) + 0.02).all()


def test_another_colour_costs_text_alignment(videos: Videos) -> None:
    """Red and blue exchanged: green and purple shapes, of which there may be any number, keep their colour, and all others get another."""
    scores, damaged = (TextAlignment()(frames, videos.captions) for frames in (videos.frames, videos.frames.flip(2)))
    keeps = torch.tensor([bool({"green", "purple"} & set(caption.split())) for caption in videos.captions])
    assert (damaged[~keeps] < 0.6 * scores[~keeps]).all()
    torch.testing.assert_close(damaged[keeps], scores[keeps], rtol=0, atol=0.1)


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.scores[0])
def test_videos_without_a_shape_earn_nothing(videos: Videos, reward: Reward) -> None:
    for frames in (
        torch.rand(4, 29, 3, 64, 64),
        torch.full((4, 29, 3, 64, 64), 0.4),
        torch.zeros(4, 29, 3, 64, 64),
        torch.ones(4, 29, 3, 64, 64),
    ):
        scores = reward(frames, videos.captions[:4])
        assert scores.isfinite().all() and scores.min() >= 0 and scores.max() < 0.1


def test_motion_needs_more_than_one_frame(videos: Videos) -> None:
    for reward in REWARDS:
        assert reward(videos.frames[:, :1], videos.captions).isfinite().all()


@pytest.mark.parametrize("attribute", range(3), ids=["shape", "colour", "motion"])
def test_each_wrong_attribute_costs_alignment(videos: Videos, attribute: int) -> None:
    choices = (data.SHAPES, tuple(data.COLORS), tuple(data.MOTIONS))[attribute]
    wrong = []
    for caption in videos.captions:
        attributes = list(data.attributes_of(caption))
        others = [name for name in choices if name != attributes[attribute]]
        attributes[attribute] = others[int(torch.randint(len(others), ()))]
        wrong.append(data.caption_of(*attributes))
    cost = TextAlignment()(videos.frames, videos.captions) - TextAlignment()(videos.frames, wrong)
    assert cost.min() > 0 and cost.mean() > 0.35
    assert attribute == 0 or cost.min() > 0.3, "shapes alone can be alike"


def tone(kind: str, factor: float, frames: Tensor) -> Tensor:
    pivot = {
        "brightness": torch.zeros(()),
        "contrast": frames.mean((1, 2, 3, 4), keepdim=True),
        "saturation": frames.mean(2, keepdim=True),
    }[kind]
    return pivot + factor * (frames - pivot)


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.scores[0])
@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_tone_changes_earn_nothing(videos: Videos, reward: Reward, kind: str) -> None:
    """Sharpness, motion and outlines are ratios, and see none; the named color has a strength, too, which text alignment sees."""
    flawed = shown(data.sample(12, 8, torch.Generator().manual_seed(int(torch.randint(2**31, ()))), captions=videos.captions)[0])
    for frames in (videos.frames, flawed):
        scores = reward(frames, videos.captions)
        for factor in (0.5, 0.8, 1.3, 2.0):
            changed = tone(kind, factor, frames)
            assert (reward(changed.clamp(0, 1), videos.captions) - scores).mean() < 0.03
            if not isinstance(reward, TextAlignment):
                torch.testing.assert_close(reward(changed, videos.captions), scores, atol=5e-3, rtol=0)


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.scores[0])
def test_a_video_is_judged_alone(videos: Videos, reward: Reward) -> None:
    together = reward(videos.frames, videos.captions)
    order = torch.randperm(12)
    permuted = reward(videos.frames[order], [videos.captions[i] for i in order])
    torch.testing.assert_close(permuted, together[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(reward(videos.frames[:1], videos.captions[:1]), together[:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.scores[0])
def test_small_differences_are_seen(videos: Videos, reward: Reward) -> None:
    """A little more of the same fault always costs a little more: the ranking inside a group has something to hold on to."""
    fault = {
        "toy_vq": lambda frames: blurred(frames, 9),
        "toy_mq": shuffled,
        "toy_ta": lambda frames: frames.flip(3),
    }[reward.scores[0]]
    frames, captions, amounts = videos.frames, videos.captions, (0.0, 0.15, 0.3, 0.5)
    if reward.scores[0] == "toy_ta":
        amounts = (0.0, 0.2, 0.35, 0.5)  # flat at the top: a mirror image of 15 % costs a clean video 0.0002 to 0.003
        triangles = [caption.replace(caption.split()[2], "triangle") for caption in captions]
        frames, captions, _ = data.sample(12, 8, torch.Generator().manual_seed(int(torch.randint(2**31, ()))), captions=triangles, flaws=0)
    broken = fault(frames)
    scores = torch.stack([reward(torch.lerp(frames, broken, amount), captions).mean() for amount in amounts])
    assert (scores.diff() < -1e-3).all(), scores


def test_speed(videos: Videos) -> None:
    """12 videos of 29 frames; generous, since machines are shared. A loop over frames would take seconds."""
    score({reward.scores[0]: reward for reward in REWARDS}, *videos)
    began = time.perf_counter()
    score({reward.scores[0]: reward for reward in REWARDS}, *videos)
    assert time.perf_counter() - began < 2.0
