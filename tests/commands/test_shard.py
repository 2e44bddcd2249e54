"""Training with weights divided among ranks: the run of whole weights, byte for byte, and one process goes on with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import SHORT, SMALL_COPO
from support.ranks import run_ranks
from torch import Tensor

from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.data.prompts import Prompt
from arcopo_fast.errors import UserError
from arcopo_fast.rollout.group import Group
from arcopo_fast.runtime.distributed import World
from arcopo_fast.storage.metrics import read_metrics
from arcopo_fast.storage.run_dir import RunDirectory
from arcopo_fast.train import main, train
from arcopo_fast.training.groups import Rollouts

# Three videos in one batch of an evaluation: one of two ranks makes none that counts.
SETTINGS = [*SHORT, *SMALL_COPO, "rollout.group_size=4", "evaluation.prompts=3", "train.iterations=2", "train.save_every=1"]
SPREAD = {"branches": ["train.spread=branches"], "groups": ["train.spread=groups", "rollout.prompts_per_iteration=2", "train.iterations=1"]}
SHARD = {"whole": "generator.shard=false", "divided": "generator.shard=true"}


def config(directory: Path, *settings: str) -> Config:
    return load_config("toy", [*SETTINGS, "train.threads=1", "run.tensorboard=false", f"run.directory={directory}", *settings])


def trained(world: World, directory: Path) -> str:
    """Train in every way. The groups of rank 1 have no variance. Return what is said of a recipe that cannot be."""
    original = Rollouts.judge

    def judge(self: Rollouts, group: Group, slices: Any, prompt: Prompt) -> dict[str, Tensor]:
        rewards = original(self, group, slices, prompt)
        return {name: torch.zeros_like(values) if world.rank and self.team.alone else values for name, values in rewards.items()}

    Rollouts.judge = judge  # type: ignore[method-assign]
    for spread, settings in SPREAD.items():
        for name, shard in SHARD.items():
            train(config(directory / f"{spread} {name}", shard, *settings), world=world)
    try:
        train(config(directory / "refused", SHARD["divided"], *SPREAD["groups"], "rollout.prompts_per_iteration=3"), world=world)
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch._dynamo  # each rank would load it for itself
    import torch.distributed.fsdp  # noqa: F401

    directory = tmp_path_factory.mktemp("runs")
    said = run_ranks(2, trained, directory)
    assert said[0] == said[1] and "rollout.prompts_per_iteration=3 does not divide evenly over 2 teams" in said[0]
    return directory


def results(run: Path) -> tuple[dict[str, bytes], list[dict[str, object]], Any]:
    """The adapters, the metrics and the scores."""
    adapters = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.safetensors")}
    metrics = [{key: value for key, value in line.items() if key != "time"} for line in read_metrics(run)]
    return adapters, metrics, json.loads((run / "evaluation.json").read_text())


@pytest.mark.parametrize("spread", SPREAD)
def test_it_is_the_run_of_whole_weights(directory: Path, spread: str) -> None:
    """Groups without variance are passed through as well, and count for nothing."""
    whole, divided = (results(directory / f"{spread} {name}" / "toy") for name in SHARD)
    assert divided == whole
    adapters, metrics, evaluation = whole
    assert len(adapters) > 2 and len(evaluation["before"]["reward"]["values"]) == 3
    assert [line["zero_variance_groups"] for line in metrics] == {"groups": [1.0], "branches": [0.0, 0.0]}[spread]
    assert all(line["steps"] == 2 for line in metrics)


def test_what_cannot_be_is_refused_before_anything_is_written(directory: Path) -> None:
    assert not (directory / "refused").exists()


def test_one_process_goes_on(directory: Path, tmp_path: Path) -> None:
    """As with whole weights: neither the digests of the inputs nor the checkpoint know of the division."""
    for name in SHARD:
        path = shutil.copytree(directory / f"branches {name}", tmp_path / name) / "toy"
        (path / "evaluation.json").unlink()
        run = RunDirectory.open(path)
        shutil.rmtree(run.checkpoints()[-1])
        main(["--resume", str(path)])
    assert results(tmp_path / "divided" / "toy") == results(tmp_path / "whole" / "toy")
