"""Means, ratios and errors of a study of which noise decides."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from arcopo_fast.evaluation.study import MEASURES, Study, summarize
from arcopo_fast.reports.entropy import write_results


def test_means_ratios_and_errors(tmp_path: Path) -> None:
    """Against the textbook formula for a mean, and the delta method for a ratio of means, which the jackknife approaches."""
    prompts, random = 400, np.random.default_rng(int(torch.randint(2**31, ())))
    initial = 8 + random.gamma(2, 2, size=(prompts, 1)) + random.normal(0, 0.1, size=(prompts, 3))
    renoise = initial / 10 + random.gamma(2, 0.1, size=(prompts, 3))
    small = renoise / 7
    values = [dict(zip(["initial", "renoise1", "renoise2"], map(np.ndarray.tolist, row))) for row in zip(initial, small, renoise)]
    records = [{"prompt": i, "text": "", "pivot": 1} | dict.fromkeys(MEASURES, value) for i, value in enumerate(values)]
    (entry,) = summarize(records)
    a, b = initial.mean(axis=1), renoise.mean(axis=1)
    found = entry["video"]
    assert found["initial"]["mean"] == pytest.approx(a.mean()) and found["renoise2"]["mean"] == pytest.approx(b.mean())
    assert found["initial"]["error"] == pytest.approx(a.std(ddof=1) / prompts**0.5, rel=1e-6)
    ratio = a.mean() / b.mean()
    assert found["ratio"]["mean"] == pytest.approx(ratio)
    assert found["ratio"]["error"] == pytest.approx((a - ratio * b).std(ddof=1) / b.mean() / prompts**0.5, rel=0.02)
    (alone,) = summarize(records[:1])
    assert alone["frames"]["initial"]["error"] == pytest.approx(initial[0].std(ddof=1) / math.sqrt(3), rel=1e-6), "over draws"
    records[0]["chunk"] = {"initial": [1.0], "renoise1": [0.0]}
    records[0]["video"] = records[0]["frames"] = {"initial": [1.0]}
    (single,) = summarize(records[:1])
    assert single["chunk"] == {
        "initial": {"mean": 1.0, "error": None},
        "renoise1": {"mean": 0.0, "error": None},
        "ratio": {"mean": None, "error": None},
    }
    write_results(
        Study(
            tmp_path,
            {"draws": 1, "adapter": "none", "generator.checkpoint": "toy", "sampler.steps": [1.0], "sampler.kind": "ode"},
            records[:1],
        ),
        "x",
    )
