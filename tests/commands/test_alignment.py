"""The promise of `make train`, in full, for three seeds: the reward rises, no held-out measure pays for it, and no filter buys it.

Prints, beside the policy, what every filter and the best of several untrained videos earn. Slow: run by `make test-alignment`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from arcopo_fast.config.reading import load_config
from arcopo_fast.evaluation.baselines import baselines, bought, total_of
from arcopo_fast.evaluation.changes import changes
from arcopo_fast.train import main


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_recipe_aligns(seed: int, tmp_path: Path) -> None:
    started = time.monotonic()
    main(["toy", f"seed={seed}", f"run.directory={tmp_path}"])
    minutes = (time.monotonic() - started) / 60
    evaluation = json.loads((tmp_path / "toy" / "evaluation.json").read_text())
    config = load_config("toy", [f"seed={seed}"])
    policy, without = changes(config, evaluation), baselines(config, evaluation)
    total = total_of(policy)
    assert total is not None
    print(f"\nseed {seed}: {total.before:.3f} -> {total.after:.3f}, {total.in_spreads:+.2f} standard deviations in {minutes:.1f} minutes")
    for change in policy:
        print(f"  {change.name:22} {change.before:8.3f} -> {change.after:8.3f}  {change.change / change.error:+6.1f} standard errors")
    for baseline in without:
        assert baseline.gain is not None
        print(f"  {baseline.name:30} {baseline.gain.in_spreads:+.2f}")
    assert total.in_spreads >= 1.0
    assert not bought(policy, without), "filters earn half of the policy's gain"
    worse = {change.name: change.change / change.error for change in policy if change.kind == "held out" and change.direction < 0}
    assert not worse, "held-out measures that fell by more than two standard errors"
