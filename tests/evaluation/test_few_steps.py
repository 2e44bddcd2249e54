"""Videos of a sampler that stops early: what is measured of them, against plain formulas, and what a report says of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import SMALL_COPO
from torch import Tensor

from arcopo_fast.config.reading import load_config
from arcopo_fast.evaluation.few_steps import FEW_STEPS, alarms, step_changes
from arcopo_fast.evaluation.filters import blurred
from arcopo_fast.evaluation.sharpness import as_document, counts, few_steps, sharpness
from arcopo_fast.reports.few_steps import few_steps_section, few_steps_warning
from arcopo_fast.training.trainer import Trainer


def picture(size: int = 48) -> Tensor:
    """Frames [1, 2, 3, size, size] of colored discs on a slope."""
    place = torch.arange(float(size))
    y, x = torch.meshgrid(place, place, indexing="ij")
    frames = []
    for center in (15.0, 22.0):
        disc = ((x - center).square() + (y - 20).square()).sqrt()
        inside = (8.5 - disc).clamp(0, 1)
        frames.append(torch.stack([0.2 + 0.5 * inside, 0.3 + 0.2 * x / size, 0.6 - 0.3 * inside]))
    return torch.stack(frames)[None]


def test_the_measures_are_those_of_their_formulas() -> None:
    frames = torch.rand(2, 3, 3, 11, 14)
    found = sharpness(frames)
    for video in range(2):
        expected = []
        for frame in frames[video].double().numpy():
            across, down = frame[:, :-1, 1:] - frame[:, :-1, :-1], frame[:, 1:, :-1] - frame[:, :-1, :-1]
            colors = frame.reshape(3, -1)
            median = np.sort(colors, axis=1)[:, (colors.shape[1] - 1) // 2]
            distance = np.sqrt(((frame - median[:, None, None]) ** 2).sum(0))
            acutance = np.quantile(np.sqrt((across**2 + down**2).sum(0)), 0.98) / np.quantile(distance, 0.98)
            gray = frame.mean(0)
            inner = gray[2:, 1:-1] + gray[:-2, 1:-1] + gray[1:-1, 2:] + gray[1:-1, :-2] - 4 * gray[1:-1, 1:-1]
            power = np.abs(np.fft.fft2((gray - gray.mean()) * np.hanning(11)[:, None] * np.hanning(14))) ** 2
            rate = np.hypot(np.fft.fftfreq(11)[:, None], np.fft.fftfreq(14))
            expected.append([acutance, inner.var() / gray.var(), power[rate > 0.25].sum() / power.sum()])
        for name, value in zip(("acutance", "laplacian", "fine_detail"), np.mean(expected, axis=0)):
            assert found[name][video].item() == pytest.approx(value, rel=1e-4), name


def test_acutance_sees_blur_and_neither_contrast_nor_grain() -> None:
    frames = picture()
    before = sharpness(frames)
    changed = {
        "blur": blurred(frames),
        "contrast": (0.4 + 1.2 * (frames - 0.4)).clamp(0, 1),
        "grain": frames + 0.01 * torch.randn(frames.shape),
        "one color": torch.full_like(frames, 0.4),
    }
    logs = {name: (sharpness(other)["acutance"] / before["acutance"]).log().item() for name, other in changed.items()}
    assert logs["blur"] < -0.1 and abs(logs["contrast"]) < 0.02 and abs(logs["grain"]) < 0.05
    assert all(values.isfinite().all() for values in sharpness(changed["one color"]).values())
    assert (sharpness(changed["grain"])["fine_detail"] / before["fine_detail"]).log() > 0.3, "which fools a spectrum"


def test_videos_of_fewer_steps() -> None:
    trainer = Trainer(load_config("toy", [*SMALL_COPO, "sampler.steps=[1000,600,300]", "evaluation.videos_per_prompt=2"]))
    engine, prompts = trainer.engine, trainer.prompts.evaluation
    found = few_steps(trainer.config, trainer.generator, engine, prompts, trainer.rewards)
    assert list(found) == counts(3) == [1, 2, 3] and len(engine.steps) == len(engine.first_steps) == 3
    whole = trainer.evaluate()
    torch.testing.assert_close(found[3]["reward"], whole.scores["reward"][::2], rtol=0, atol=1e-3)
    assert all(values.isfinite().all() and len(values) == len(prompts) for scores in found.values() for values in scores.values())
    assert not torch.allclose(found[1]["acutance"], found[3]["acutance"], rtol=1e-3)
    short = Trainer(load_config("toy", [*SMALL_COPO, "sampler.steps=[1000]", "evaluation.videos_per_prompt=2"]))
    alone = few_steps(short.config, short.generator, short.engine, short.prompts.evaluation, short.rewards)
    assert list(alone) == counts(1) == [1]
    torch.testing.assert_close(alone[1]["acutance"], found[1]["acutance"], rtol=1e-3, atol=0)


def measured(reward: float, acutance: float, spread: float) -> dict[str, Tensor]:
    noise = torch.linspace(-0.01, 0.01, 8).exp()
    return {"reward": reward * noise, "acutance": acutance * noise, "laplacian": noise, "fine_detail": noise, "latent_std": spread * noise}


def test_what_a_report_says() -> None:
    before = {1: measured(1.0, 0.2, 1.0), 4: measured(1.2, 0.3, 1.0)}
    document: dict[str, Any] = {FEW_STEPS: as_document(before, {1: measured(1.1, 0.2, 1.0), 4: measured(1.5, 0.29, 1.1)})}
    first, last = step_changes(document)
    assert (first.steps, last.steps) == (1, 4) and last.reward == (pytest.approx(1.2, rel=1e-3), pytest.approx(1.5, rel=1e-3))
    assert last.logs["acutance"] == (pytest.approx(math.log(0.29 / 0.3), rel=1e-5), pytest.approx(0, abs=1e-6))
    assert alarms([first, last]) == [] and few_steps_warning(document) == ""
    page = few_steps_section(document)
    assert page.count("<tr>") == 3 and "−0.034" in page and "+0.095" in page

    document = {FEW_STEPS: as_document(before, {1: measured(1.1, 0.2, 1.0), 4: measured(1.0, 0.25, 1.5)})}
    lost = alarms(step_changes(document))
    assert [("blurred" in line, "grew" in line, "earn less" in line) for line in lost] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert "acutance fell by 17 %" in lost[0] and "1.50 times" in lost[1]
    assert few_steps_warning(document).count("<li>") == 3
    assert few_steps_section({}) == few_steps_warning({}) == "" and step_changes({}) == []
