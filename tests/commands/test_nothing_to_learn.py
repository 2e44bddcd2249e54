"""A run whose rewards teach it nothing says so, keeps what it has, and goes on once they are mended."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from arcopo_fast.cli import run_command
from arcopo_fast.storage.metrics import read_metrics
from arcopo_fast.train import main


def test_a_run_says_so_keeps_what_it_has_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tmp_path / "says_little.py"
    module.write_text("def length(frames, prompts):\n    return [len(prompt) for prompt in prompts]\n")
    monkeypatch.syspath_prepend(tmp_path)
    small = ["evaluation.prompts=1", "evaluation.videos_per_prompt=1", "evaluation.sample_videos=0", "lora.rank=4", "lora.alpha=8"]
    shape = ["train.iterations=2", "train.save_every=0", "rollout.group_size=2", "objective.anchors_per_update=2"]
    shape += ["rollout.prompts_per_iteration=1"]
    assert run_command(main, ["toy", 'rewards={"says_little:length": 1.0, toy_vq: 0}', *small, *shape, f"run.directory={tmp_path}"]) == 2
    said, run = capsys.readouterr().err.splitlines()[-1], tmp_path / "toy"
    assert "'says_little:length' did not tell them apart" in said and said.endswith(f"--resume {run}")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"] and not (run / "evaluation.json").exists()
    module.write_text("def length(frames, prompts):\n    return frames.std((1, 2, 3, 4))\n")
    importlib.reload(sys.modules["says_little"])
    assert run_command(main, ["--resume", str(run)]) == 0
    assert [line["zero_variance_groups"] for line in read_metrics(run)] == [1, 0]
