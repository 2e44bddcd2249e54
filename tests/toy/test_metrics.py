"""The held-out measures: right on rendered videos, lower for the damage that each is there to see, and independent of scale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arcopo_fast.build import checkpoint_path
from arcopo_fast.errors import UserError
from arcopo_fast.toy import data, metrics
from arcopo_fast.toy.metrics import CaptionAccuracy, CaptionClassifier, MotionAgreement, ShapeFidelity, Variety


class Videos(NamedTuple):
    frames: Tensor
    captions: list[str]


@pytest.fixture(scope="module")
def videos() -> Videos:
    frames, captions, _ = data.sample(8, 8, torch.Generator().manual_seed(int(torch.randint(2**31, ()))), flaws=0)
    return Videos(frames, captions)


def test_shape_fidelity_is_the_largest_normalised_correlation() -> None:
    """Against a plain loop over positions and sizes on one small picture."""
    measure = ShapeFidelity()
    image = torch.rand(40, 40)
    margin = measure._window // 2
    padded = F.pad(image[None, None], (margin,) * 4, mode="replicate")[0, 0]
    pixel = torch.arange(measure._window) - margin + 0.0
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    best = -1.0
    for radius in measure._radii:
        template = (0.5 - data.outline_distance("cross", x, y, torch.tensor(radius))).clamp(0, 1)
        for row in range(40):
            for column in range(40):
                window = padded[row : row + measure._window, column : column + measure._window]
                best = max(best, float(torch.corrcoef(torch.stack([template.flatten(), window.flatten()]))[0, 1]))
    assert float(measure._best_match(image[None], "cross")[0, 0]) == pytest.approx(best, abs=1e-4)


def test_shape_fidelity_knows_the_shape(videos: Videos) -> None:
    measure = ShapeFidelity()
    scores = measure(*videos)
    assert scores.shape == (8,) and scores.min() > 0.85 and scores.max() <= 1
    for step in (1, 2, 3):
        wrong = []
        for caption in videos.captions:
            shape, colour, motion = data.attributes_of(caption)
            wrong.append(data.caption_of(data.SHAPES[(data.SHAPES.index(shape) + step) % 4], colour, motion))
        assert (measure(videos.frames, wrong) < scores - 0.01).all()
    # Every pixel row pulled sideways at random: the colours stay, the shape is gone.
    torn = torch.stack([row.roll(int(torch.randint(-8, 9, ())), -1) for row in videos.frames.unbind(-2)], dim=-2)
    assert (measure(torn, videos.captions) < scores - 0.1).all()
    assert measure(torch.rand(2, 9, 3, 64, 64), videos.captions[:2]).max() < 0.5
    assert measure(torch.full((2, 9, 3, 64, 64), 0.3), videos.captions[:2]).max() < 0.05


def test_the_best_match_says_where_the_shape_is() -> None:
    frames, captions, scenes = data.sample(8, 2, torch.Generator().manual_seed(int(torch.randint(2**31, ()))), flaws=0)
    _, x, y, radius = ShapeFidelity().find(frames[:, :1], captions)[:, 0].unbind(1)
    # A triangle is found by the middle of its height, which lies above its centroid.
    above = [0.3 * scene.radius if scene.shape == "triangle" else 0.0 for scene in scenes]
    places = torch.tensor([(scene.start[0], scene.start[1] - up) for scene, up in zip(scenes, above)])
    torch.testing.assert_close(torch.stack([x, y], dim=1), places, atol=1.5, rtol=0)
    torch.testing.assert_close(radius, torch.tensor([scene.radius for scene in scenes]), atol=1.3, rtol=0)


def test_motion_agreement_is_that_of_speeds(videos: Videos, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare videos at the data's mean speed, at half of it, at twice, standing ones and such that go the other way."""
    measure, seed, agreement = MotionAgreement(), int(torch.randint(2**31, ())), {}
    for factor in (1.0, 0.5, 2.0):
        speed = factor * sum(data.SPEED_RANGE) / 2
        with monkeypatch.context() as patch:
            patch.setattr(data, "SPEED_RANGE", (speed, speed))
            frames, captions, _ = data.sample(8, 5, torch.Generator().manual_seed(seed), flaws=0)
        torch.testing.assert_close(measure.speeds(frames, captions), torch.full((8,), speed), atol=0.15, rtol=0)
        agreement[factor] = measure(frames, captions)
    assert agreement[1.0].min() > 0.75 and agreement[0.5].max() < 0.75 and agreement[2.0].max() < 0.65
    standing = videos.frames[:, :1].expand_as(videos.frames)
    assert not measure(standing, videos.captions).any() and not measure(videos.frames.flip(1), videos.captions).any()
    assert measure(videos.frames[:, :1], videos.captions).shape == (8,)


@pytest.mark.parametrize("measure", [ShapeFidelity(), MotionAgreement()], ids=lambda measure: measure.scores[0])
def test_brightness_earns_nothing(videos: Videos, measure: ShapeFidelity | MotionAgreement) -> None:
    scores = measure(*videos)
    torch.testing.assert_close(measure(0.3 + 0.6 * videos.frames, videos.captions), scores, atol=1e-3, rtol=0)


def test_variety_is_the_spread_of_places_and_sizes_and_the_entropy_of_shapes(videos: Videos) -> None:
    measure = Variety(checkpoint_path("toy") / "classifier")
    every = measure.compare(measure.describe(*videos), videos.captions)
    again = [0] * len(videos.frames)
    same = measure.compare(measure.describe(videos.frames[again], [videos.captions[0]] * len(again)), videos.captions)
    assert every.keys() == {"position_spread", "size_spread", "shape_entropy"}
    assert all(values.shape == (8,) and values.min() >= 0 for values in every.values())
    assert not same["position_spread"].any() and not same["size_spread"].any()
    assert every["position_spread"].mean() > 2
    assert every["shape_entropy"].mean() <= math.log(4) + 1e-5
    row = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 1.0, 0, 0]])
    shares = torch.cat([torch.zeros(3, 3), row], dim=1)
    expected = -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))
    assert measure.compare(shares, [""] * 3)["shape_entropy"].mean().item() == pytest.approx(expected, abs=1e-6)


def test_the_classifier_is_small_and_survives_saving(videos: Videos, tmp_path: Path) -> None:
    classifier = CaptionClassifier()
    assert sum(parameter.numel() for parameter in classifier.parameters()) < 100_000
    classifier.save_pretrained(tmp_path)
    loaded = CaptionClassifier.from_pretrained(tmp_path)
    stills = classifier.select(videos.frames)
    for before, after in zip(classifier.half().float()(stills), loaded(stills)):
        assert torch.equal(before, after)
    assert set(metrics.held_out(tmp_path)) == {"shape_fidelity", "motion_agreement", "caption_accuracy"}
    with pytest.raises(UserError, match="cannot read"):
        CaptionClassifier.from_pretrained(tmp_path / "absent")


def test_caption_accuracy_counts_attributes(videos: Videos) -> None:
    class Oracle(CaptionClassifier):
        """Answers with the videos' own captions."""

        def forward(self, stills: Tensor) -> tuple[Tensor, ...]:
            labels = self.labels(videos.captions)
            return tuple(F.one_hot(labels[:, i], len(head)).float() for i, head in enumerate(self.heads))

    measure = CaptionAccuracy(Oracle())
    assert torch.equal(measure(*videos), torch.ones(8))
    wrong_motion = [caption.replace(caption.split()[-1], "up" if caption.endswith("down") else "down") for caption in videos.captions]
    torch.testing.assert_close(measure(videos.frames, wrong_motion), torch.full((8,), 2 / 3))
    other = {"circle": "cross", "cross": "circle", "square": "triangle", "triangle": "square"}
    wrong_shape_too = [caption.replace(caption.split()[2], other[caption.split()[2]]) for caption in wrong_motion]
    torch.testing.assert_close(measure(videos.frames, wrong_shape_too), torch.full((8,), 1 / 3))


def test_the_classifier_looks_at_first_middle_and_last(videos: Videos) -> None:
    stills = CaptionClassifier.select(videos.frames)
    assert torch.equal(stills.view(8, 3, 3, 64, 64), videos.frames[:, [0, 14, 28]])


def test_training_the_classifier_learns_and_saves(tmp_path: Path) -> None:
    """A short run is far above chance (1/6) on the easiest attribute, and its file is what `from_pretrained` reads."""
    lines: list[str] = []
    accuracy = metrics.train_classifier(
        tmp_path / "classifier", videos=96, steps=40, seed=int(torch.randint(2**31, ())), held_out_videos=64, log=lines.append
    )
    assert set(accuracy) == {"rendered_shape", "rendered_colour", "rendered_motion"}
    assert accuracy["rendered_colour"] > 0.4 and lines
    CaptionClassifier.from_pretrained(tmp_path / "classifier")
