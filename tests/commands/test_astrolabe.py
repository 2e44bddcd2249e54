"""Astrolabe by its commands: a run with selective regularization, a buffer of finished chunks, the self-test and the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import SMALL, outcome

from arcopo_fast import collect, doctor
from arcopo_fast.build import generator_sizes
from arcopo_fast.config.reading import load_config, recipes
from arcopo_fast.data.buffer import Buffer
from arcopo_fast.planning.memory import estimate
from arcopo_fast.planning.plan import dry_run
from arcopo_fast.storage.metrics import read_metrics
from arcopo_fast.train import main
from arcopo_fast.training.buffered import policy_of, restore
from arcopo_fast.training.trainer import Trainer

TINY = [*SMALL, "video.chunks=3", "sampler.steps=[1000, 350]", "run.tensorboard=false", "train.iterations=1"]
KIND = "objective={kind: nft, kl: selective, evaluation_ema: 0.9}"


def test_a_run_says_what_it_held_back_and_leaves_the_average(tmp_path: Path) -> None:
    main(
        [
            "toy",
            *TINY,
            KIND,
            "name=run",
            "rollout.prompts_per_iteration=2",
            "rollout.pivot=2",
            "train.iterations=2",
            f"run.directory={tmp_path}",
        ]
    )
    line, later = read_metrics(tmp_path / "run")
    assert (
        line["update1/drift"] == line["update1/kl"] == 0 < later["update1/drift"]
        and {"held_share", "old_decay", "reference_age"} <= line.keys()
    )
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Distance from the old policy" in report and "Age of the reference" in report and "Live fraction" not in report
    assert "Astrolabe (arXiv 2603.17051)" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    state = torch.load(tmp_path / "run" / "checkpoints" / "step-2" / "trainer.pt", weights_only=True)["objective"]
    assert set(state["policies"]) == {"old", "kl_reference", "average"} and state["moves"] == 2
    left, kept = (
        load_file(tmp_path / "run" / folder / "adapter_model.safetensors") for folder in ("adapter", "checkpoints/step-2/adapter")
    )
    average = list(state["policies"]["average"].values())
    assert all(any(torch.equal(tensor, other) for other in average) for tensor in left.values())
    assert any(not torch.equal(left[name], tensor) for name, tensor in kept.items()), "a checkpoint has the policy that learns"


def test_a_buffer_keeps_only_finished_chunks(tmp_path: Path) -> None:
    settings, path = [*TINY, "objective={kind: nft}", "rollout.pivot=2"], tmp_path / "buffer"
    collect.main(["toy", *settings, "--buffer", str(path), "--groups", "2"])
    made = Trainer(load_config("toy", settings))
    entry = next(Buffer.open(path, policy_of(made.config, made.generator, made.objective)).entries([1]))
    assert set(entry.tensors) == {"initial", "prefix", "clean", *(f"reward/{name}" for name in made.config.rewards)}
    group = made.rollouts.roll_out(made.rollouts.encode(made.rollouts.prompt(entry.index, 0)), entry.index, 0)
    with group, restore(entry, made.generator, made.engine, made.objective, []).group as stored:
        assert torch.equal(stored.tails, group.tails) and stored.size == 3 and not stored.explored
        restored, made_anew = (made.objective.samples(each, 0) for each in (stored, group))
        assert [part.chunk for part in restored] == [1, 2] and all(torch.equal(a.x, b.x) for a, b in zip(restored, made_anew))
    main(["toy", *settings, "name=semi", f"run.directory={tmp_path}", "--mode", "semi_on_policy", "--buffer", str(path)])
    (line,) = read_metrics(tmp_path / "semi")
    assert line["update1/drift"] == 0 and "old_decay" not in line, "the old policy is the base, which made the groups"


def test_the_self_test_has_the_trajectories_that_training_does_not_keep(capsys: pytest.CaptureFixture[str]) -> None:
    ended = outcome(doctor.main, capsys, "toy", *TINY, KIND, "--self-test")
    assert ended.status == 0, ended.out
    assert "gives back the rollout's predictions" in ended.out and "have moved after two steps" in ended.out


def test_plans_count_the_policies_and_no_trajectories() -> None:
    names = [name for name in recipes() if name.endswith("_astrolabe")]
    assert len(names) == 4
    for name in names:
        config = load_config(name)
        sizes = generator_sizes(config.generator.checkpoint, config.generator.base)
        found = estimate(config, sizes).components
        assert found["other policies"] == found["adapters, float32"] and found["the old policy"] == 2 * found["adapters, float32"]
        assert found["latents of the group"] == 24 * 7 * 4 * 3 * 16 * 60 * 104, "finished chunks alone"
    assert "other policies" not in estimate(load_config(name, ["objective.kl=none"]), sizes).components
    text = dry_run(load_config("toy", [*TINY, "objective={kind: nft, timesteps: uniform}"]), [80.0])
    assert "Beware: objective.timesteps=uniform" in text
