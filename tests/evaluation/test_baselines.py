"""What is had without learning: filters and best-of-n, as changes of a run's evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from arcopo_fast.config.reading import load_config
from arcopo_fast.evaluation.baselines import FILTERED, baselines, bought, total_of
from arcopo_fast.evaluation.changes import changes
from arcopo_fast.reports.baselines import baseline_section, filter_warning

PROMPTS, VIDEOS = 6, 3


def evaluation(gains: dict[str, float], policy: float = 1.0) -> dict[str, Any]:
    """The policy raises the reward by `policy`, each filter by its own gain; what is held out falls by as much."""
    rng = np.random.default_rng(int(1000 * abs(policy)) + len(gains))
    before = {name: rng.normal(size=PROMPTS * VIDEOS) for name in ("reward", "toy_vq", "held")}

    def scores(gain: float) -> dict[str, Any]:
        moved = {name: values + (-gain if name == "held" else gain) for name, values in before.items()}
        moved = {name: values + rng.normal(scale=0.01, size=len(values)) for name, values in moved.items()}
        return {name: {"mean": values.mean(), "std": values.std(), "values": values.tolist()} for name, values in moved.items()}

    document: dict[str, Any] = {"before": scores(0.0), "after": scores(policy)}
    return document | {FILTERED: {name: scores(gain) for name, gain in gains.items()}}


CONFIG = load_config("toy", [f"evaluation.videos_per_prompt={VIDEOS}", "rewards={toy_vq: 1.0}"])


def test_filters_are_compared_with_the_same_videos() -> None:
    document = evaluation({"mean": 0.4, "blur": -0.2})
    mean, blur, _ = baselines(CONFIG, document)
    assert mean.gain is not None and mean.gain.change == pytest.approx(0.4, abs=0.02) and mean.gain.direction == 1
    assert blur.gain is not None and blur.gain.change == pytest.approx(-0.2, abs=0.02) and blur.gain.direction == -1
    held = next(change for change in mean.changes if change.kind == "held out")
    assert held.change == pytest.approx(-0.4, abs=0.02)


def test_best_of_n_takes_every_score_of_the_video_with_the_highest_total() -> None:
    document = evaluation({})
    (best,) = baselines(CONFIG, document)
    totals, held = (np.array(document["before"][name]["values"]).reshape(PROMPTS, VIDEOS) for name in ("reward", "held"))
    chosen = totals.argmax(1)
    assert best.name == f"best of {VIDEOS} untrained videos" and not best.filter and best.gain is not None
    assert best.gain.after == pytest.approx(totals.max(1).mean())
    found = next(change for change in best.changes if change.name == "held")
    assert found.after == pytest.approx(held[np.arange(PROMPTS), chosen].mean())
    document["before"]["reward"]["values"][int(chosen[0])] = None  # it failed, so another one is chosen
    totals[0, chosen[0]] = -np.inf
    (best,) = baselines(CONFIG, document)
    found = next(change for change in best.changes if change.name == "held")
    assert found.after == pytest.approx(held[np.arange(PROMPTS), totals.argmax(1)].mean())


@pytest.mark.parametrize(("gain", "told"), [(0.7, True), (0.3, False), (-0.5, False)])
def test_a_filter_that_earns_half_of_the_gain_is_told(gain: float, told: bool) -> None:
    document = evaluation({"mean of 7 frames": gain, "blur": 0.1})
    policy, found = changes(CONFIG, document), baselines(CONFIG, document)
    assert [each.name for each in bought(policy, found)] == ["mean of 7 frames"] * told
    page = filter_warning(policy, found)
    assert ("mean of 7 frames</b> earns 7" in page) == told and bool(page) == told
    table = baseline_section(policy, found)
    assert "the policy" in table and "mean of 7 frames" in table and f"best of {VIDEOS} untrained videos" in table and "held" in table


def test_a_policy_without_a_gain_owes_nothing_to_a_filter() -> None:
    document = evaluation({"mean": 0.5}, policy=-0.1)
    policy = changes(CONFIG, document)
    assert total_of(policy) is not None and not bought(policy, baselines(CONFIG, document))
    assert baseline_section(policy, []) == "" and filter_warning([], []) == ""
