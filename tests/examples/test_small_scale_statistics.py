"""The study's statistics against planted ones, and the rules of its claims."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "paper_at_small_scale"
sys.path.insert(0, str(FOLDER))

import claims  # noqa: E402
import inference  # noqa: E402

# Statistics ------------------------------------------------------------------------------------------------------------------------


def planted(random: np.random.Generator, seeds: int, prompts: int, videos: int, spreads: tuple[float, float, float]) -> np.ndarray:
    """Cells around 0 with effects of seed, prompt and video of these standard deviations."""
    seed, prompt, video = spreads
    noise = video * random.standard_normal((seeds, prompts, videos)).mean(2)
    return seed * random.standard_normal((seeds, 1)) + prompt * random.standard_normal((1, prompts)) + noise


@pytest.mark.parametrize(
    ("size", "spreads", "most"),
    [
        ((6, 64, 4), (0.3, 0.0, 1.0), 0.97),
        ((6, 64, 4), (0.0, 0.5, 1.0), 0.97),
        ((6, 64, 4), (0.1, 0.5, 1.0), 0.97),
        ((6, 64, 4), (0.3, 1.0, 0.2), 0.97),
        ((6, 64, 4), (0.05, 0.5, 0.5), 0.97),
        ((4, 24, 2), (0.2, 0.5, 1.0), 0.97),
        (
            (6, 64, 4),
            (0.0, 0.0, 1.0),
            0.995,
        ),  # neither seed nor prompt matters: the bound of the variance acts, and the interval is too wide
    ],
)
def test_coverage(size: tuple[int, int, int], spreads: tuple[float, float, float], most: float) -> None:
    """At sizes of the study's parts. 2,000 draws know a coverage of 95 % to within 0.5 %."""
    random, inside = np.random.default_rng(5), 0
    for _ in range(2000):
        estimate = inference.crossed(planted(random, *size, spreads))
        inside += inference.outside(abs(estimate.mean) / estimate.error, estimate.freedom) > 0.05
    assert 0.93 <= inside / 2000 <= most


def test_too_narrow_without_prompts_or_seeds() -> None:
    """Taking videos for independent, or seeds alone, covers far less: the reason for all this."""
    random, naive, seeds_only = np.random.default_rng(6), 0, 0
    for _ in range(1000):
        cells = planted(random, 6, 64, 4, (0.1, 1.0, 0.5))
        naive += abs(cells.mean()) < 1.96 * cells.std() / cells.size**0.5
        estimate = inference.independent(cells.mean(axis=1))
        seeds_only += estimate.p > 0.05
    assert naive < 650 and seeds_only < 650


def test_crossed_is_exact_where_one_side_alone_varies() -> None:
    cells = np.random.default_rng(0).standard_normal((6, 1)) + np.zeros((6, 64))
    by_seed = inference.independent(cells[:, 0])
    estimate = inference.crossed(cells)
    assert estimate.error == pytest.approx(by_seed.error) and estimate.freedom == pytest.approx(5)
    assert estimate.interval == pytest.approx(by_seed.interval) and estimate.by_unit == pytest.approx(by_seed.by_unit)
    by_prompt = inference.crossed(cells.T)
    assert by_prompt.error == pytest.approx(by_seed.error) and len(by_prompt.by_unit) == 64
    missing = cells.copy()
    missing[2, 7] = np.nan
    assert inference.crossed(missing).error == pytest.approx(by_seed.error), "the prompt is left out"
    assert np.isnan(inference.crossed(cells[:1]).p)


def test_student() -> None:
    """Against a printed table."""
    table = {(1, 0.95): 12.706, (2, 0.95): 4.303, (5, 0.95): 2.571, (30, 0.95): 2.042, (5, 0.99): 4.032, (120, 0.95): 1.980}
    for (freedom, level), value in table.items():
        assert inference.quantile(freedom, level) == pytest.approx(value, abs=6e-4)
    assert 2.571 > inference.quantile(5.5) > 2.447, "between 5 and 6"
    assert inference.outside(0.0, 7) == pytest.approx(1)


def test_holm() -> None:
    """The worked example of four hypotheses that textbooks give."""
    corrected = inference.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert inference.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_verdicts() -> None:
    def of(mean: float, error: float, seeds: int = 6) -> inference.Estimate:
        return inference.Estimate(mean, error, 20, (mean,) * seeds)

    def verdict(*estimates: inference.Estimate) -> str:
        return inference.family({str(index): estimate for index, estimate in enumerate(estimates)}, 0.2)["0"].verdict

    assert verdict(of(1, 0.1)) == "rises" and verdict(of(-1, 0.1)) == "falls"
    assert verdict(of(0.05, 0.05)) == "equivalent" and verdict(of(0.05, 0.2)) == "no difference shown"
    assert verdict(of(1, 0.1, seeds=3)) == "too few" and verdict(inference.Estimate(1, float("nan"), 0, (1,) * 6)) == "too few"
    weak = of(0.23, 0.1)  # p = 0.03
    assert verdict(weak) == "rises" and verdict(weak, of(0, 1)) == "no difference shown", "one of two tests"
    assert verdict(of(0, 0.0)) == "equivalent" and verdict(of(0.1, 0.0)) == "rises"


# Rules -----------------------------------------------------------------------------------------------------------------------------

UP, FLAT, DOWN = "rises", "no difference shown", "falls"


@pytest.mark.parametrize(
    ("verdicts", "wins", "beats"),
    [
        ((UP, FLAT, UP), "holds", "holds"),
        ((UP, DOWN, UP), "holds", "holds"),
        ((UP, UP, UP), "in part", "holds"),
        ((UP, FLAT, FLAT), "not shown", "not shown"),
        ((FLAT, DOWN, UP), "not shown", "not shown"),
        ((UP, UP, DOWN), "opposite", "opposite"),
        ((FLAT, FLAT, "equivalent"), "not shown", "not shown"),
    ],
)
def test_contests(verdicts: tuple[Any, Any, Any], wins: str, beats: str) -> None:
    named = dict(zip((claims.FIRST, claims.SECOND, claims.MORE), verdicts))
    assert claims.wins(named) == wins and claims.beats(named) == beats


def caption(on: Any, semi: Any, on_rest: Any, semi_rest: Any, gap: Any) -> dict[str, Any]:
    """Verdicts of the two on the caption reward, and on one other measure; a second one does not move."""
    found = {"on-policy: caption": on, "semi: caption": semi, "on-policy: a": on_rest, "semi: a": semi_rest, "semi minus on-policy: a": gap}
    return found | {"on-policy: b": FLAT, "semi: b": FLAT, "semi minus on-policy: b": UP}


@pytest.mark.parametrize(
    ("rule", "verdicts", "finding"),
    [
        (claims.always("rises"), {"1": UP, "2": UP}, "holds"),
        (claims.always("rises"), {"1": UP, "2": FLAT}, "not shown"),
        (claims.always("rises"), {"1": DOWN, "2": DOWN}, "opposite"),
        (claims.always("falls"), {"1": DOWN, "2": DOWN}, "holds"),
        (claims.semi_does_not_hack, caption(UP, FLAT, DOWN, FLAT, UP), "holds"),
        (claims.semi_does_not_hack, caption(UP, FLAT, DOWN, FLAT, FLAT), "in part"),
        (claims.semi_does_not_hack, caption(FLAT, FLAT, DOWN, FLAT, UP), "in part"),
        (claims.semi_does_not_hack, caption(UP, UP, FLAT, FLAT, FLAT), "not shown"),
        (claims.semi_does_not_hack, caption(UP, UP, DOWN, DOWN, UP), "not shown"),
        (claims.semi_does_not_hack, caption(UP, UP, FLAT, DOWN, DOWN), "opposite"),
        (claims.scale_trades, {"in-domain: gain": UP, "out-of-domain: a": DOWN, "out-of-domain: b": FLAT}, "holds"),
        (claims.scale_trades, {"in-domain: gain": UP, "out-of-domain: a": UP}, "in part"),
        (claims.scale_trades, {"in-domain: gain": DOWN, "out-of-domain: a": DOWN}, "opposite"),
        (claims.scale_trades, {"in-domain: gain": FLAT, "out-of-domain: a": DOWN}, "not shown"),
    ],
)
def test_rules(rule: Callable[[Mapping[str, Any]], str], verdicts: dict[str, Any], finding: str) -> None:
    assert rule(verdicts) == finding


@pytest.mark.parametrize(
    ("caption", "gap", "first", "second", "finding"),
    [
        (DOWN, DOWN, DOWN, FLAT, "holds"),
        (DOWN, DOWN, FLAT, FLAT, "in part"),
        (FLAT, FLAT, DOWN, DOWN, "in part"),
        (DOWN, FLAT, FLAT, UP, "not shown"),
        (UP, UP, DOWN, DOWN, "opposite"),
    ],
)
def test_collapse(caption: Any, gap: Any, first: Any, second: Any, finding: str) -> None:
    named = {"off-policy: caption": caption, "off-policy minus semi: caption": gap, "off-policy: a": first, "off-policy: b": second}
    assert claims.off_policy_collapses(named) == finding
