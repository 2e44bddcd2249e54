"""`collect`, and training on what it collected: exact prefixes, exact first ratio, no lost group."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.commands import SMALL, SMALL_COPO
from torch import Tensor

from arcopo_fast import collect
from arcopo_fast.build import checkpoint_path
from arcopo_fast.config.reading import load_config
from arcopo_fast.data.buffer import Buffer, Entry
from arcopo_fast.errors import UserError
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import KeyedNoise
from arcopo_fast.storage.metrics import read_metrics
from arcopo_fast.toy.text import ToyTextEncoder
from arcopo_fast.train import main
from arcopo_fast.training.buffered import restore
from arcopo_fast.training.trainer import Trainer

GROUPS = 5


@pytest.fixture(scope="module")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("buffers") / "toy"
    collect.main(["toy", *SMALL_COPO, "--buffer", str(path), "--groups", str(GROUPS)])
    return path


def trainer(buffer: Path | None, *overrides: str) -> Trainer:
    """With an adapter that does something."""
    mode = [] if buffer is None else ["train.mode=semi_on_policy", f"train.buffer={buffer}"]
    made = Trainer(load_config("toy", [*SMALL_COPO, *mode, *overrides]))
    for parameter in made.parameters:
        torch.nn.init.normal_(parameter, std=0.05)
    return made


def entries(path: Path) -> list[Entry]:
    document = json.loads((path / "buffer.json").read_text())
    return list(Buffer.open(path, document["policy"]["values"]).entries())


def cached(engine: Engine, pages: list[int]) -> tuple[Tensor, Tensor]:
    pool = engine.pool
    return pool.keys[:, pages].clone(), pool.values[:, pages].clone()


def test_the_rebuilt_prefix_equals_the_rollouts_bit_for_bit(buffer: Path) -> None:
    """With a trained adapter in the generator, which must not leak into the prefix."""
    fresh, trained = Trainer(load_config("toy", SMALL_COPO)), trainer(buffer)
    pivots = set()
    for entry in entries(buffer):
        prompt = fresh.rollouts.prompt(entry.index, 0)
        group = fresh.rollouts.roll_out(fresh.rollouts.encode(prompt), entry.index, 0)
        with group, restore(entry, trained.generator, trained.engine, trained.objective, ["toy_vq"]).group as again:
            pivots.add(group.pivot)
            assert (again.pivot, prompt.text) == (group.pivot, entry.metadata["prompt"])
            assert torch.equal(again.inputs, group.inputs) and torch.equal(again.predictions, group.predictions)
            assert torch.equal(KeyedNoise(trained.shape, again.id).initial(group.pivot)[0], entry.tensors["initial"])
            ours = cached(trained.engine, again.prefix.cache.tables[0].pages)
            theirs = cached(fresh.engine, group.prefix.cache.tables[0].pages)
            assert len(ours[0][0]) == 2 * group.pivot
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len(pivots) > 1, "the test needs groups with and without a long prefix"
    assert fresh.engine.pool.pages_in_use == trained.engine.pool.pages_in_use == 0


def test_all_chunks_that_explore_are_stored(tmp_path: Path) -> None:
    """And trained again, each in its member's own context; a buffer of the pivot's alone is refused."""
    small = [*SMALL, "video.chunks=3", "objective.anchors_per_update=2", "rollout.pivot=2"]
    path = str(tmp_path / "all")
    collect.main(["toy_sde_grpo", *small, "objective.explore=all", "--buffer", path, "--groups", "2"])
    made = Trainer(load_config("toy_sde_grpo", [*small, "objective.explore=all"]))
    again = Trainer(load_config("toy_sde_grpo", [*small, "objective.explore=all", "train.mode=semi_on_policy", f"train.buffer={path}"]))
    for entry in entries(Path(path)):
        group = made.rollouts.roll_out(made.rollouts.encode(made.rollouts.prompt(entry.index, 0)), entry.index, 0)
        with group, restore(entry, again.generator, again.engine, again.objective, ["toy_vq"]).group as stored:
            assert list(stored.explored) == list(group.explored) == [1, 2] and torch.equal(stored.tails, group.tails)
            for chunk, explored in group.explored.items():
                assert torch.equal(stored.explored[chunk].inputs, explored.inputs)
                assert torch.equal(stored.explored[chunk].predictions, explored.predictions)
    trained = ["--mode", "semi_on_policy", "--buffer", path, "train.iterations=1", f"run.directory={tmp_path}"]
    main(["toy_sde_grpo", *small, "objective.explore=all", *trained])
    assert read_metrics(tmp_path / "toy_sde_grpo")[0]["update1/ratio_max"] == 0
    with pytest.raises(UserError, match="explored_chunks"):
        main(["toy_sde_grpo", *small, "name=pivot", *trained])


@pytest.mark.parametrize("mode", ["semi_on_policy", "off_policy"])
def test_training_on_a_buffer(buffer: Path, mode: str, tmp_path: Path) -> None:
    settings = ["train.iterations=6", "objective.clip=1.0e-5", "train.save_every=0", f"run.directory={tmp_path}"]
    main(["toy", *SMALL_COPO, *settings, "--mode", mode, "--buffer", str(buffer)])
    metrics = read_metrics(tmp_path / "toy")
    assert metrics[0]["update1/ratio_max"] == 0, "at the first step of training the ratio is exactly 1"
    assert all(line["update1/ratio_max"] > 0 for line in metrics[1:]), "later the policy has left the reference"
    assert "reward" not in metrics[0] and "buffer/reward" in metrics[0]
    live = [line["update2/live"] for line in metrics]
    assert (min(live) == 1) == (mode == "off_policy"), "only off-policy training has no clip"


def test_a_run_whose_every_ratio_is_clipped_says_so(buffer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A step far beyond the clip, and groups that come back: from then on no favourable ratio has a gradient."""
    monkeypatch.setattr("arcopo_fast.reports.stall.PATIENCE", 2)
    monkeypatch.setattr("arcopo_fast.training.recorder.PATIENCE", 2)
    settings = ["train.iterations=4", "objective.clip=1.0e-12", "objective.reward_combine=sum", f"run.directory={tmp_path}"]
    monkeypatch.setattr("arcopo_fast.reports.stall.LIVE", 0.9)  # about half of the ratios move the unfavourable way, and stay live
    with pytest.warns(UserWarning, match=r"has learned nothing since iteration \d: .* objective.clip"):
        main(["toy", *SMALL_COPO, *settings, "--mode", "semi_on_policy", "--buffer", str(buffer)])
    assert "The run stopped learning" in (tmp_path / "toy" / "report.html").read_text()


def test_the_old_policy_is_the_generator_without_adapter_asked_once(buffer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trainer(buffer, "objective.anchors_per_update=3", "objective.updates=1")
    objective, engine, asked = trained.objective, trained.engine, []
    original = engine.predict
    monkeypatch.setattr(engine, "predict", lambda *given, **named: (asked.append(1), original(*given, **named))[1])
    base = Trainer(load_config("toy", SMALL_COPO))  # its fresh adapter adds zeros
    assert trained.groups is not trained.rollouts and objective.compared() == ("reference",)
    with trained.groups.judged(1, 0).group as group:
        samples = objective.samples(group, 0)
        assert samples[0].steps is not None
        for expected in (1, 1):  # the second time they are known
            (old,) = trained.updates(1)._predictions("reference", group, samples)
            assert len(asked) == expected
        rollouts, iteration = base.rollouts, group.id.iteration
        with rollouts.roll_out(rollouts.encode(rollouts.prompt(iteration, 0)), iteration, 0) as theirs, torch.no_grad():
            assert torch.equal(old, base.engine.predict(theirs, theirs.samples(samples[0].steps, samples[0].members)))
            assert not torch.equal(old, original(group, samples[0])), "the adapter must do something"


def test_every_entry_is_drawn_once_in_a_pass(buffer: Path) -> None:
    source = trainer(buffer).groups
    assert source is not None
    seen = []
    for iteration in range(1, 2 * GROUPS + 1):
        with source.judged(iteration, 0).group as group:
            seen.append(group.id.iteration)
    assert sorted(seen[:GROUPS]) == sorted(seen[GROUPS:]) == list(range(GROUPS))


def test_what_does_not_fit_is_refused(buffer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"another policy \([0-9a-f]{16} here, [0-9a-f]{16} in the buffer\): sampler.steps"):
        trainer(buffer, "sampler.steps=[1000, 400, 200, 100]")
    with pytest.raises(UserError, match=r"noise_strength: 0.5 here, 0.3 in the buffer"):
        trainer(buffer, "rollout.noise_strength=0.5")
    with pytest.raises(UserError, match="was not scored by sharpness, only by toy_"):
        trainer(buffer, "rewards={sharpness: 1.0}")
    with pytest.raises(UserError, match="is no replay buffer"):
        trainer(tmp_path)
    with pytest.raises(UserError, match="do not go together"):
        load_config("toy", ["train.mode=off_policy"])
    with pytest.raises(UserError, match="another recipe"):
        collect.main(["toy", *SMALL_COPO, "seed=1", "--buffer", str(buffer), "--groups", "6"])
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_path("toy"), checkpoint)
    trainer(buffer, f"generator.checkpoint={checkpoint}")
    text = ToyTextEncoder.from_pretrained(checkpoint / "text")
    ToyTextEncoder(text.vocabulary, 2 * text.table, text_len=text.text_len).save_pretrained(checkpoint / "text")
    with pytest.raises(UserError, match=r"another policy .* in the buffer\): text_encoder: \S+ here, \S+ in the buffer; use"):
        trainer(buffer, f"generator.checkpoint={checkpoint}")
    monkeypatch.setattr(Reward, "fingerprint", lambda self, name: name)  # as if it were edited
    with pytest.raises(UserError, match=r"another recipe .* in the buffer\): rewards.toy_mq: \S+ here, \S+ in the buffer; rewards.toy_ta"):
        collect.main(["toy", *SMALL_COPO, "--buffer", str(buffer), "--groups", "6"])
    with pytest.raises(UserError, match="--buffer is missing"):
        collect.main(["toy"])
    assert len(entries(buffer)) == GROUPS


def test_two_processes_and_a_kill(buffer: Path, tmp_path: Path) -> None:
    """One of two collecting processes is killed in the middle: the other leaves no hole and no duplicate, only the same groups."""
    path = tmp_path / "shared"
    command = [sys.executable, "-m", "arcopo_fast.collect", "toy", *SMALL_COPO, "--buffer", str(path), "--groups", str(GROUPS)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    deadline = time.monotonic() + 120
    while not list(path.glob("entries/0*.safetensors")):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[0].send_signal(signal.SIGKILL)
    _, said = processes[1].communicate(timeout=120)
    assert processes[0].wait() == -signal.SIGKILL and processes[1].returncode == 0, said
    collected, expected = entries(path), entries(buffer)
    assert [entry.index for entry in collected] == list(range(GROUPS))
    assert sorted(entry.name for entry in (path / "entries").iterdir()) == [f"{index:06d}.safetensors" for index in range(GROUPS)]
    for ours, theirs in zip(collected, expected, strict=True):
        assert ours.metadata == theirs.metadata and set(ours.tensors) == set(theirs.tensors)
        for name in ours.tensors:  # other processes may have other numbers of threads
            torch.testing.assert_close(ours.tensors[name], theirs.tensors[name], rtol=0, atol=1e-4)
