"""Intervals and paired differences, against formulas of numpy's and by simulation: they cover as often as they say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from statistics import NormalDist

import numpy as np
import pytest
import torch

from arcopo_fast.evaluation.compare import Interval, as_json, clustered, compare, t_quantile
from arcopo_fast.evaluation.scores import BASE, Scores, Video
from arcopo_fast.reports.evaluation import as_markdown

WEIGHTS = {"beauty": 2.0, "motion": 0.5, "watched": 0.0}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(torch.initial_seed())


def videos(values: np.ndarray, generator: str = BASE) -> dict[Video, float]:
    """[prompts, videos]; NaN: there is none."""
    return {Video(generator, *place): value for place, value in np.ndenumerate(values) if not math.isnan(value)}


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30, 101, 1002])
def test_t_quantile(freedom: int) -> None:
    """Against the integral of the density, by the trapezium rule after a substitution that makes it proper: t = sqrt(n) tan(u)."""
    reach = t_quantile(freedom)
    angle = np.linspace(0, math.atan(reach / math.sqrt(freedom)), 20001)
    density = np.cos(angle) ** (freedom - 1)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    area = (density[1:] + density[:-1]) @ np.diff(angle) / 2
    assert 2 * constant * area == pytest.approx(0.95, abs=1e-7)


def test_t_quantile_against_the_printed_table() -> None:
    table = {1: 12.706, 2: 4.303, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980}
    assert {freedom: round(t_quantile(freedom), 3) for freedom in table} == table
    assert t_quantile(10, 0.99) == pytest.approx(3.169, abs=5e-4)
    assert t_quantile(100_000) == pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-4)


def test_equally_many_videos_of_each_prompt(rng: np.random.Generator) -> None:
    """Then it is the ordinary t interval of the prompts' means."""
    values = rng.normal(rng.normal(0, 2, (7, 1)), 0.3, (7, 4))
    found, means = clustered(videos(values)), values.mean(axis=1)
    reach = t_quantile(6) * means.std(ddof=1) / math.sqrt(7)
    np.testing.assert_allclose(found, (values.mean(), values.mean() - reach, values.mean() + reach))


def test_different_numbers_of_videos(rng: np.random.Generator) -> None:
    """The sandwich of a least-squares fit of a constant."""
    values = rng.normal(rng.normal(0, 1, (9, 1)), 1, (9, 5))
    values[rng.random((9, 5)) < 0.3] = math.nan
    values[0, 0] = rng.normal()
    flat = np.array(list(videos(values).values()))
    prompts = np.array([video.prompt for video in videos(values)])
    member = (prompts[:, None] == np.unique(prompts)).astype(float)  # [videos, prompts]
    ones, residuals = np.ones((len(flat), 1)), np.diag(flat - flat.mean())
    bread, count = np.linalg.inv(ones.T @ ones), member.shape[1]
    variance = (bread @ ones.T @ residuals @ member @ member.T @ residuals @ ones @ bread).item() * count / (count - 1)
    reach = t_quantile(count - 1) * math.sqrt(variance)
    np.testing.assert_allclose(clustered(videos(values)), (flat.mean(), flat.mean() - reach, flat.mean() + reach))


def test_what_has_no_interval(rng: np.random.Generator) -> None:
    one = clustered(videos(rng.normal(size=(1, 5))))
    assert math.isfinite(one.mean) and math.isnan(one.low) and math.isnan(one.high) and one.direction == 0
    assert all(map(math.isnan, clustered({}))) and clustered({}).direction == 0
    assert clustered(videos(np.full((4, 3), 0.5))) == Interval(0.5, 0.5, 0.5)
    # a score in steps that has changed by the same for every prompt
    assert clustered(videos(np.full((3, 6), 1 / 6))).direction == 0 and clustered(videos(np.full((3, 6), -0.1))).direction == 0
    assert [Interval(0, *bounds).direction for bounds in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0.0, 0.0))] == [1, -1, 0, 0]


def independent(values: Mapping[Video, float]) -> Interval:
    """The interval that takes all videos for independent."""
    flat = np.array(list(values.values()))
    reach = t_quantile(len(flat) - 1) * flat.std(ddof=1) / math.sqrt(len(flat))
    return Interval(flat.mean(), flat.mean() - reach, flat.mean() + reach)


def coverage(interval: Callable[[Mapping[Video, float]], Interval], prompts: int, number: int) -> float:
    """How often the interval contains the mean that the values were drawn around; prompts differ as much as their videos do."""
    rng = np.random.default_rng(prompts)  # the same draws every time, so that the bounds below cannot fail by chance
    trials = 2000
    hits = 0
    for values in rng.normal(rng.normal(0, 1, (trials, prompts, 1)), 1, (trials, prompts, number)):
        found = interval(videos(values))
        hits += found.low <= 0 <= found.high
    return hits / trials


@pytest.mark.parametrize(("prompts", "number"), [(4, 4), (8, 3), (30, 2)])
def test_the_interval_covers_in_95_of_100_evaluations(prompts: int, number: int) -> None:
    assert coverage(clustered, prompts, number) == pytest.approx(0.95, abs=0.015)  # three standard errors of the simulation
    assert coverage(independent, prompts, number) < 0.91, "a test that could not tell the two apart would say nothing"


# Comparing


def scores_of(rng: np.random.Generator, shape: tuple[int, int], shift: Mapping[str, float]) -> Scores:
    """Scores of the base model, and of generators that are better by so much, with noise a tenth of the videos' spread."""
    base = {name: rng.normal(size=shape) for name in ("watched", "beauty", "motion", "unweighted")}
    scores = Scores()
    for generator, change in {BASE: None, **shift}.items():
        scores.adapters[generator] = None if change is None else {"sha256": generator}
        moved = {name: values if change is None else values + change + rng.normal(0, 0.1, shape) for name, values in base.items()}
        for place in np.ndindex(shape):
            scores.values[Video(generator, *place)] = {name: float(values[place]) for name, values in moved.items()}
    return scores


def test_paired_by_video(rng: np.random.Generator) -> None:
    scores = scores_of(rng, (12, 2), {"worse@1": -0.5, "same@1": 0.0, "better@1": 0.5})
    scores.values = dict(
        [list(scores.values.items())[place] for place in rng.permutation(len(scores.values))]
    )  # pairs are found by name, not by place
    results = compare(scores, WEIGHTS)
    assert [one.kind for one in results] == ["total"] * 4 + ["trained"] * 8 + ["held out"] * 8
    assert [one.generator for one in results[:4]] == [BASE, "better@1", "same@1", "worse@1"]
    for one in results:
        values, base = (np.full((12, 2), math.nan) for _ in range(2))
        for array, generator in ((values, one.generator), (base, BASE)):
            for video, parts in scores.of(generator).items():
                total = 2 * parts["beauty"] + 0.5 * parts["motion"]
                array[video.prompt, video.number] = total if one.name == "reward" else parts[one.name]
        np.testing.assert_allclose(one.interval, clustered(videos(values)), atol=1e-12)
        assert (one.videos, one.failed, one.difference is None) == (24, 0, one.generator == BASE)
        if one.difference:
            np.testing.assert_allclose(one.difference.interval, clustered(videos(values - base)), atol=1e-12)
            assert (one.difference.pairs, one.difference.improved) == (24, ((values - base) > 0).mean())
            # the noise between videos is ten times that of a difference: unpaired, nothing could be told here
            if one.generator != "same@1":
                assert one.difference.interval.direction == (1 if one.generator == "better@1" else -1)
                assert one.difference.interval.high - one.difference.interval.low < 0.5 * (one.interval.high - one.interval.low)
    assert [one.generator for one in compare(scores, WEIGHTS, ["same@1", BASE])[:2]] == ["same@1", BASE]


def test_a_failed_score_is_left_out_of_everything_and_counted(rng: np.random.Generator) -> None:
    scores = scores_of(rng, (6, 2), {"on@1": 1.0})
    clean = {(one.generator, one.name): one for one in compare(scores, WEIGHTS)}
    failed = {BASE: rng.permutation(6)[:2].tolist(), "on@1": [0, 1, 2]}
    for generator, prompts in failed.items():
        for prompt in prompts:
            scores.values[Video(generator, prompt, 1)]["beauty"] = float(rng.choice([math.nan, math.inf, -math.inf]))
            scores.values[Video(generator, prompt, 0)]["watched"] = math.nan  # has no weight, so the total is not touched
    broken = {(one.generator, one.name): one for one in compare(scores, WEIGHTS)}
    for (generator, name), one in broken.items():
        hit = name in ("beauty", "reward", "watched")
        assert one.videos == 12 and one.failed == (len(failed[generator]) if hit else 0)
        assert hit or one == clean[generator, name]
    pairs = 12 - len({*failed[BASE], *failed["on@1"]})
    for name in ("beauty", "reward", "watched"):
        number = 0 if name == "watched" else 1
        out = [Video(BASE, prompt, number) for prompt in {*failed[BASE], *failed["on@1"]}]
        part = Scores({v: s for v, s in scores.values.items() if v._replace(generator=BASE) not in out}, {}, scores.adapters)
        expected = next(one for one in compare(part, WEIGHTS) if (one.generator, one.name) == ("on@1", name))
        found = broken["on@1", name].difference
        assert found == expected.difference and found is not None and found.pairs == pairs
        own = {
            video: parts for video, parts in scores.of("on@1").items() if video not in [Video("on@1", p, number) for p in failed["on@1"]]
        }
        alone = Scores({**own, **scores.of(BASE)}, {}, scores.adapters)
        assert broken["on@1", name].interval == next(r for r in compare(alone, WEIGHTS) if (r.generator, r.name) == ("on@1", name)).interval
    markdown = as_markdown(list(broken.values()))
    assert "beauty of on@1: 3 of 12" in markdown and "beauty of base: 2 of 12" in markdown and "motion of" not in markdown
    text = json.dumps(as_json(list(broken.values())), allow_nan=False)
    assert "NaN" not in text and '"failed": 3' in text


def test_every_score_failed() -> None:
    scores = Scores({Video(name, 0, 0): {"beauty": math.nan, "motion": 1.0} for name in (BASE, "on@1")}, {}, {BASE: None, "on@1": {}})
    results = compare(scores, {"beauty": 1.0, "motion": 0.0})
    assert all(math.isnan(one.interval.mean) and one.difference is None for one in results if one.name != "motion")
    assert "–" in as_markdown(results) and json.dumps(as_json(results), allow_nan=False)


def test_what_cannot_be_told_apart_is_no_gain(rng: np.random.Generator) -> None:
    scores = scores_of(rng, (10, 2), {"same@1": 0.0, "better@1": 0.5})
    for place in np.ndindex(10, 2):
        scores.values[Video("same@1", *place)] = dict(scores.values[Video(BASE, *place)])
    results = compare(scores, WEIGHTS)
    verdicts = {one["generator"]: one["difference"] and one["difference"]["verdict"] for one in as_json(results)}
    assert verdicts == {BASE: None, "better@1": "gain", "same@1": "none shown"}
    for line in as_markdown(results).splitlines():
        if line.startswith("|"):
            assert ("≈" in line) == ("same@1" in line) and ("0.000 [0.000, 0.000]" in line) == ("same@1" in line)
    single = compare(Scores({v: s for v, s in scores.values.items() if v.prompt == 0}, {}, scores.adapters), WEIGHTS)
    assert "one prompt: no interval" in as_markdown(single) and "≈" not in as_markdown(single).split("\n\n")[0]
    assert {one["difference"]["verdict"] for one in as_json(single) if one["difference"]} == {None}


def test_a_small_difference_is_shown_with_its_digits(rng: np.random.Generator) -> None:
    """A gain must not look like none, nor none like a gain."""
    before = rng.normal(0.6, 0.1, (6, 2))
    gain = before + rng.normal(4e-5, 4e-6, (6, 2))
    values = {**videos(before), **videos(gain, "on@1")}
    scores = Scores({video: {"beauty": value} for video, value in values.items()}, adapters={BASE: None, "on@1": {}})
    (line,) = [
        line for line in as_markdown(compare(scores, {"beauty": 1.0}, [BASE, "on@1"])).splitlines() if "beauty" in line and "on@1" in line
    ]
    low, high = (float(number) for number in re.findall(r"\+(0\.\d+)", line)[1:3])
    assert 3e-5 < low < high < 5e-5 and "≈" not in line
