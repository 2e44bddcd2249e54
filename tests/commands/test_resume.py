"""A run that is stopped goes on as if nothing had happened."""

from __future__ import annotations

import importlib
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.commands import SMALL_COPO

from arcopo_fast import train
from arcopo_fast.build import checkpoint_path
from arcopo_fast.cli import run_command
from arcopo_fast.config.reading import load_config
from arcopo_fast.errors import UserError
from arcopo_fast.objectives.optimizer import GradientNotFinite
from arcopo_fast.runtime.console import Interruption
from arcopo_fast.storage.metrics import read_metrics
from arcopo_fast.storage.run_dir import RunDirectory
from arcopo_fast.train import main
from arcopo_fast.training.lessons import LearningWatch
from arcopo_fast.training.trainer import Trainer

RUN = ["toy", "train.iterations=4", "train.save_every=2", *SMALL_COPO]


def untimed(run: Path) -> list[dict[str, object]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in read_metrics(run)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    main([*RUN, f"run.directory={directory}"])
    return directory / "toy"


def stopped(directory: Path, monkeypatch: pytest.MonkeyPatch, *settings: str, at: int, how: str) -> Path:
    """A run that is interrupted in iteration `at`: "softly", or by an error, before or in the midst of its update."""
    original = train.one_iteration

    def iteration(trainer: Trainer, watch: LearningWatch, number: int) -> dict[str, object]:
        if number == at:
            if how != "softly":
                trainer.stepper.begun += how == "updating"
                raise RuntimeError("the machine went away")
            os.kill(os.getpid(), signal.SIGINT)
        return original(trainer, watch, number)

    with monkeypatch.context() as patched:
        patched.setattr(train, "one_iteration", iteration)
        if how != "softly":
            with pytest.raises(RuntimeError, match="went away"):
                main([*RUN, *settings, f"run.directory={directory}"])
        else:
            assert run_command(main, [*RUN, *settings, f"run.directory={directory}"]) == 130
    return directory / "toy"


def test_a_resumed_runs_settings_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = stopped(tmp_path, monkeypatch, at=1, how="softly")
    capsys.readouterr()
    main(["--resume", str(run), "--print-config"])
    assert capsys.readouterr().out == (run / "config.yaml").read_text()
    for wrong in (["toy"], ["seed=3"], ["--dry-run"], ["--mode", "off_policy"]):
        with pytest.raises(UserError, match="--resume uses the run's own config.yaml"):
            main(["--resume", str(run), *wrong])
    with pytest.raises(UserError, match="is not a run: it has no config.yaml"):
        main(["--resume", str(tmp_path), "--print-config"])


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_what_was_halved_for_want_of_memory_stays_halved(out_of_memory: bool, tmp_path: Path) -> None:
    """A run that goes on makes the calls that it would have made, in the same shapes."""
    first, second = (Trainer(load_config("toy", RUN[1:])) for _ in range(2))
    if out_of_memory:
        first.objective.batching.restore({"micro_batch": 1, "checkpoint": True})
        first.engine.largest_wave = 2
    first.save(RunDirectory(tmp_path), 3)
    second.restore(tmp_path / "checkpoints" / "step-3")
    assert second.objective.batching.state() == first.objective.batching.state() and second.engine.largest_wave == first.engine.largest_wave


@pytest.mark.parametrize(("at", "how"), [(1, "softly"), (3, "softly"), (4, "rolling out"), (4, "updating")])
def test_it_goes_on_where_it_was(
    whole: Path, at: int, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped(tmp_path, monkeypatch, at=at, how=how)
    if how == "softly":
        said = capsys.readouterr().err
        assert "finishing the iteration first; interrupt again to stop at once" in said
        assert f"interrupted; stopped after iteration {at}; continue with python -m arcopo_fast.train --resume {run}" in said
        assert len(untimed(run)) == at
    else:  # in the midst of an update nothing can be saved, and iteration 3 is made again
        assert len(untimed(run)) == 3
        assert max(int(entry.name[5:]) for entry in (run / "checkpoints").iterdir()) == (3 if how == "rolling out" else 2)
    assert not (run / "evaluation.json").exists()
    main(["--resume", str(run)])
    assert untimed(run) == untimed(whole)
    assert (run / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()
    ours, theirs = (load_file(directory / "adapter" / "adapter_model.safetensors") for directory in (run, whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.parametrize(("update", "kept"), [(1, ["step-2"]), (2, [])])
def test_a_gradient_that_is_not_finite_ends_a_run_whose_weights_are_kept(
    update: int, kept: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a step of its iteration has been taken already: the weights are then of no iteration."""
    original = train.one_iteration

    def iteration(trainer: Trainer, watch: LearningWatch, number: int) -> dict[str, object]:
        calls = iter(range(1, 100))
        if number == 3:
            trainer.parameters[0].register_hook(lambda gradient: gradient * math.nan if next(calls) == update else gradient)
        return original(trainer, watch, number)

    monkeypatch.setattr(train, "one_iteration", iteration)
    with pytest.raises(GradientNotFinite, match=f"the gradient of update {update} of 2 has the norm nan"):
        main([*RUN, "train.save_every=0", f"run.directory={tmp_path}"])
    assert [path.name for path in (tmp_path / "toy").glob("checkpoints/*")] == kept


def test_a_run_goes_on_with_what_it_was_begun_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not with a checkpoint, or a file of prompts, that was replaced by another one of the same name."""
    checkpoint, prompts = tmp_path / "checkpoint", tmp_path / "prompts.txt"
    shutil.copytree(checkpoint_path("toy"), checkpoint)
    prompts.write_text("a red circle moving left\na blue square moving up\na green cross moving right")
    run = stopped(tmp_path, monkeypatch, f"generator.checkpoint={checkpoint}", f"prompts={prompts}", at=1, how="softly")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    places = {"transformer": checkpoint / "transformer", "VAE": checkpoint / "vae", "text encoder": checkpoint / "text"}
    files = {name: next(place.glob("*.safetensors")) for name, place in places.items()} | {"set of prompts": prompts}
    for name, file in files.items():
        original = file.read_bytes()
        if file == prompts:
            prompts.write_text("a red circle moving left\na blue square moving up\na green cross moving down")
        else:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
            save_file({key: tensor * 1.5 for key, tensor in load_file(file).items()}, file, metadata=metadata)
        problem = rf"{run} was begun with other inputs than those here now, .*: {name}: .* here, .* there; put back .* start a new run$"
        with pytest.raises(UserError, match=problem):
            main(["--resume", str(run)])
        file.write_bytes(original)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_reward_may_be_mended_while_a_run_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "def brightness(frames, prompts):\n    return frames.mean((1, 2, 3, 4))\n"
    file = tmp_path / "mended_while_stopped.py"
    file.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    run = stopped(tmp_path, monkeypatch, 'rewards={"mended_while_stopped:brightness": 1, toy_vq: 1}', at=2, how="softly")
    file.write_text(source.replace("return", "return 2 *"))
    monkeypatch.delitem(sys.modules, "mended_while_stopped")
    importlib.invalidate_caches()
    capsys.readouterr()
    main(["--resume", str(run)])
    said = f"mended_while_stopped:brightness: code or weights changed since {run} last ran; the run's curves show the earlier"
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{said} version up to iteration 2, and")]
    rewards = [line["reward/mended_while_stopped:brightness"] for line in read_metrics(run)]
    assert min(rewards[2:]) > max(rewards[:2]), "the mended one counts from there on"


def test_what_cannot_be_resumed(whole: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (["--resume", str(whole)], "is complete"),
        (["--resume", str(tmp_path)], "has no config.yaml"),
        (["toy", "--resume", str(whole)], "leave recipe"),
        (["--resume", str(whole), "--dry-run"], "leave recipe"),
        (["--resume"], "--resume: expected one argument"),
    ):
        with pytest.raises(UserError, match=said):
            main(arguments)


def test_a_second_interrupt_stops_at_once() -> None:
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interruption("this") as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.asked
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is former
