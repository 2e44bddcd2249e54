"""`torchrun -m arcopo_fast.doctor`: it holds where ranks can train together, and says which cannot, and why, where a fault was planted."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from support.ranks import load_libraries, run_commands, run_ranks

from arcopo_fast import doctor
from arcopo_fast.config.reading import load_config
from arcopo_fast.objectives.updates import GradientSum
from arcopo_fast.runtime.distributed import World
from arcopo_fast.training import ranktest, trainer
from arcopo_fast.training.findings import Finding
from arcopo_fast.training.ranktest import rank_test
from arcopo_fast.training.trainer import Trainer

FAST = ["evaluation.prompts=1", "evaluation.videos_per_prompt=1", "evaluation.sample_videos=0", "train.threads=1"]
FAST += ["video.chunks=2", "sampler.steps=[1000, 350]", "rollout.group_size=4", "objective.anchors_per_update=2", "lora.rank=4"]


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    load_libraries()


def failures(ranks: int, *settings: str, update: bool = False, seed: Any = lambda rank: 7) -> dict[str, str]:
    """What does not hold, and why; all ranks must find the same."""

    def findings(world: World) -> list[Finding]:
        return list(rank_test(load_config("toy", [*FAST, f"seed={seed(world.rank)}", *settings]), world, update=update))

    found = run_ranks(ranks, findings)
    assert found == found[:1] * ranks and found[0][0].subject == "the ranks"
    assert update == ("the step" in {finding.subject for finding in found[0]}) or any(finding.holds is False for finding in found[0])
    return {finding.subject: finding.detail for finding in found[0] if finding.holds is False}


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (3, ["rollout.prompts_per_iteration=3"]),
        (2, []),
        (2, ["generator.dtype=bfloat16"]),
        (2, ["rollout.prompts_per_iteration=2", "generator.shard=true"]),
    ],
    ids=["groups spread", "branches spread", "half precision", "weights divided"],
)
def test_it_holds(ranks: int, settings: list[str]) -> None:
    assert failures(ranks, *settings, update=True) == {}


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run_commands(2, doctor.main, "toy", *FAST)
    assert (first.status, first.lines) == (0, []) and second == (0, [], "")
    assert first.out.splitlines()[-1] == "everything holds"
    assert (
        "note     the ranks: 2 on " in first.out
        and "; tensors go over gloo" in first.out
        and " MB, a gradient in float64, in " in first.out
    )
    monkeypatch.setattr(World, "sum_", lambda self, tensors: None)
    first, second = run_commands(2, doctor.main, "toy", *FAST, "--self-test")
    assert (first.status, second.status, second.out) == (1, 1, "")
    failing = "FAILS    a sum over the ranks: ranks 0, 1 do not get the sum of all: gradients would not be summed"
    assert failing in first.out.splitlines() and first.out.splitlines()[-1].startswith("something does not hold")
    assert "Its method" not in first.out


def test_files_that_only_another_rank_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    examine = doctor.examine
    lacks = (["missing  generator.checkpoint: a.pt"], False)
    monkeypatch.setattr(doctor, "examine", lambda *given, **named: lacks if os.environ["RANK"] == "1" else examine(*given, **named))
    first, second = run_commands(2, doctor.main, "toy", *FAST)
    assert (first.status, second.status) == (1, 1) and "Its ranks" not in first.out
    assert first.out.splitlines()[-2:] == ["every file is here", "rank 1: missing  generator.checkpoint: a.pt"]


def test_a_rank_that_takes_no_part_in_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    sum_ = World.sum_
    monkeypatch.setattr(World, "sum_", lambda self, tensors: None if os.environ["RANK"] == "1" else sum_(self, tensors))
    monkeypatch.setattr(ranktest, "PATIENCE", 2.0)
    told = "rank 1 does not get the sum of all: gradients would not be summed; ranks 0, 2 waited for the others in vain"
    assert failures(3, update=True) == {"a sum over the ranks": told}


def test_gradients_that_are_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    give = GradientSum.give
    monkeypatch.setattr(GradientSum, "give", lambda self, world, groups: give(self, World(), groups))
    found = failures(2, "rollout.prompts_per_iteration=2", update=True)
    assert found.keys() == {"the gradient of all", "the step"} and found["the gradient of all"].startswith(
        "that of ranks 0, 1 is not the mean"
    )
    assert found["the step"].startswith("rank 1 of 2 has another")


def test_a_rank_with_another_recipe_or_seed() -> None:
    found = failures(3, seed=lambda rank: 7 + (rank == 1))
    assert found["the seed"] == "rank 1 of 3 has another than the others: 8 instead of 7"
    assert found.keys() == {"the seed", "the fresh adapter"} and found["the fresh adapter"].startswith("rank 1 of 3 has")

    def other(world: World) -> list[Finding]:
        return list(rank_test(load_config("toy", [*FAST, f"lora.rank={4 + (world.rank != 2)}"]), world, update=True))

    *_, found_last = run_ranks(3, other)[0]
    assert found_last.subject == "everything else" and found_last.holds is None


def test_noise_of_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe is the same, but one rank does not use its seed."""
    made = Trainer.__init__

    def reseeded(self: Trainer, config: Any, world: World) -> None:
        made(self, config, world)
        self.rollouts.config = config.model_copy(update={"seed": config.seed + world.rank})

    monkeypatch.setattr(Trainer, "__init__", reseeded)
    found = failures(2, "rollout.prompts_per_iteration=2", update=True)
    assert "another than the rank whose it is" in found["a group"]


def test_ranks_with_other_weights_and_an_adapter_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    made, load = Trainer.__init__, trainer.load_generator

    def loaded(*given: Any, **named: Any) -> Any:
        generator = load(*given, **named)
        if os.environ["RANK"] == "2":
            with torch.no_grad():
                next(generator.model.parameters()).mul_(1.001)
        return generator

    def halved(self: Trainer, config: Any, world: World) -> None:
        made(self, config, world)
        for parameter in self.parameters if world.rank == 1 else []:
            parameter.data = parameter.data.bfloat16()

    monkeypatch.setattr(trainer, "load_generator", loaded)
    monkeypatch.setattr(Trainer, "__init__", halved)
    found = failures(4, update=True)
    assert found.keys() == {"the transformer", "the adapter's precision", "the fresh adapter"}
    assert found["the transformer"] == "rank 2 of 4 has another than the others"
    assert found["the adapter's precision"] == "rank 1 has bfloat16, not float32"
