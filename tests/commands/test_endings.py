"""However a run ends, it is whole, nobody else's, and says how to go on. Iterations and videos are made up; the rest is real."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.commands import outcome

from arcopo_fast import train as module
from arcopo_fast.cli import run_command
from arcopo_fast.evaluation.judging import Evaluation
from arcopo_fast.model.lora import adapter_enabled
from arcopo_fast.storage.locks import LOCK
from arcopo_fast.storage.metrics import read_metrics
from arcopo_fast.storage.run_dir import SUMS
from arcopo_fast.train import main
from arcopo_fast.training import finish
from arcopo_fast.training import trainer as trainer_module
from arcopo_fast.training.trainer import Trainer

SMALL = ["toy", "train.iterations=4", "train.save_every=1", "lora.rank=2", "lora.alpha=4", "lora.targets=[to_q]"]
SMALL += ["evaluation.prompts=2", "evaluation.videos_per_prompt=1", "evaluation.sample_videos=1"]
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def made_up(patch: pytest.MonkeyPatch) -> None:
    """An iteration changes the adapter by what follows from its number and the state before; an evaluation depends on the adapter."""

    def iteration(trainer: Trainer, watch: object, number: int) -> dict[str, Any]:
        trainer.set_learning_rate(number)
        for index, parameter in enumerate(trainer.parameters):
            generator = torch.Generator().manual_seed(1000 * number + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        trainer.stepper.begun += 1
        trainer.optimizer.step()
        return {"reward": trainer.parameters[0].sum().item(), "pivot": 1.0, "time": {"update": 1.0}}

    def evaluate(self: Trainer, filters: object = None) -> Evaluation:
        values = torch.stack([parameter.detach().sum() for parameter in self.parameters[:2]]).double()
        values = values if adapter_enabled(self.generator.model) else torch.zeros(2)
        return Evaluation({"reward": values, "toy_vq": values}, ["a", "b"], torch.full((1, 3, 3, 16, 16), 0.5))

    patch.setattr(module, "one_iteration", iteration)
    patch.setattr(Trainer, "evaluate", evaluate)
    patch.setattr(Trainer, "device", lambda self: {"device": "a", "dtype": "float32", "matmul": 1.0, "bandwidth": 1.0, "floor": {}})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch)


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, list[str]]:
    """Exit status and the lines on stderr, without those of the progress."""
    capsys.readouterr()
    status, lines, _ = outcome(main, capsys, *arguments)
    return status, [line for line in lines if not re.match(r"\d+/\d+ ", line)]


def content(run: Path) -> dict[str, Any]:
    """Everything a run leaves that does not depend on when and where it ran; hidden files too."""
    found: dict[str, Any] = {}
    for file in sorted(run.rglob("*")):
        name = str(file.relative_to(run))
        if file.is_file() and not name.startswith("tensorboard"):
            found[name] = file.read_bytes()
    found["metrics.jsonl"] = [{key: value for key, value in record.items() if key != "time"} for record in read_metrics(run)]
    for name in ("report.html", "config.yaml", "adapter/README.md"):  # the last has a digest of the configuration
        found[name] = re.sub(r"(directory:|\| configuration)[^\n]*", "", found[name].decode())
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves that nobody disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        made_up(patch)
        folder = tmp_path_factory.mktemp("whole")
        main([*SMALL, f"run.directory={folder}"])
    return content(folder / "toy")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its third iteration; copy it."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        made_up(patch)
        patch.setattr(module, "one_iteration", at(module.one_iteration, 3, lambda: os.kill(os.getpid(), signal.SIGINT)))
        assert run_command(main, [*SMALL, f"run.directory={folder}"]) == 130
    return folder / "toy"


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "runs" / "toy"))


def at(function: Callable[..., Any], call: int, do: Callable[[], object]) -> Callable[..., Any]:
    """The function, which in its call of this number first does something."""
    calls = iter(range(1, 1000))

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == call:
            do()
        return function(*arguments, **keywords)

    return wrapped


# Interrupts ------------------------------------------------------------------------------------------------------------------------

RESUME = "continue with python -m arcopo_fast.train --resume {run}"
MOMENTS: dict[str, tuple[Any, str, int, str]] = {
    "loading": (trainer_module, "load_generator", 1, "nothing was begun; the same command starts it"),
    "the prompts' encoding": (trainer_module, "encode_ahead", 1, "nothing was begun; the same command starts it"),
    "the checks": (module, "check_inputs", 1, f"its settings are kept; {RESUME}"),
    "the evaluation before": (Trainer, "evaluate", 1, f"its settings are kept; {RESUME}"),
    "an iteration": (module, "one_iteration", 2, f"stopped after iteration 2; {RESUME}"),
    "a checkpoint": (Trainer, "save", 3, f"stopped after iteration 3; {RESUME}"),
    "the last iteration": (module, "one_iteration", 4, f"stopped after iteration 4; {RESUME}"),
    "the evaluation after": (Trainer, "evaluate", 2, f"iterations up to 4 are kept; {RESUME}"),
    "the samples": (finish, "write_mp4", 2, f"iterations up to 4 are kept; {RESUME}"),
    "the card": (finish, "model_card", 1, f"iterations up to 4 are kept; {RESUME}"),
    "the adapter": (finish, "save_adapter", 1, f"iterations up to 4 are kept; {RESUME}"),
    "the report": (module, "write_report", 1, "{run} is complete but for its report; write that with python -m arcopo_fast.report {run}"),
}


BY_CTRL_C = ["loading", "the evaluation before", "an iteration", "the report"]


@pytest.mark.parametrize(
    ("moment", "number"), [*((moment, signal.SIGTERM) for moment in MOMENTS), *((moment, signal.SIGINT) for moment in BY_CTRL_C)]
)
def test_an_interrupt_at_any_moment(
    moment: str, number: int, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same line for both signals; nothing is half-written; going on ends as if nothing had happened."""
    owner, name, call, said = MOMENTS[moment]
    run, former = tmp_path / "toy", [signal.getsignal(one) for one in SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, at(getattr(owner, name), call, lambda: os.kill(os.getpid(), number)))
        status, lines = command(capsys, *SMALL, f"run.directory={tmp_path}")
    soft = ["finishing the iteration first; interrupt again to stop at once"] if "stopped after" in said else []
    assert (status, lines) == (130, [*soft, f"interrupted; {said.format(run=run)}"])
    assert [signal.getsignal(one) for one in SIGNALS] == former
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert run.exists() == ("nothing was begun" not in said)
    go_on = ["--resume", run] if run.exists() else [*SMALL, f"run.directory={tmp_path}"]
    assert command(capsys, *go_on) == (0, [])
    assert content(run) == whole


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", ["train", "collect", "merge", "generate", "evaluate", "report"])
def test_an_interrupt_while_modules_are_imported(name: str, number: int, tmp_path: Path) -> None:
    """A command imports torch, or numpy, for seconds; the one that it finds here interrupts it."""
    for library in ("torch", "numpy", "yaml"):
        (tmp_path / f"{library}.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\nimport time\ntime.sleep(9)\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-m", f"arcopo_fast.{name}"], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted; what was complete by then is kept\n")


def test_who_only_imports_the_library_keeps_its_signals(tmp_path: Path) -> None:
    """Also a command of another package, which imports ours."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("import arcopo_fast")
    (tmp_path / "theirs" / "command.py").write_text("import signal; print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    call = [sys.executable, "-m", "theirs.command"]
    assert subprocess.run(call, capture_output=True, text=True, env=environment, check=True).stdout == "True\n"


# Owners ----------------------------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from arcopo_fast.storage.locks import Owner
owner = Owner(Path(sys.argv[1]))
print("owned", flush=True)
time.sleep(60)
"""


def test_one_process_owns_a_run(run: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Another one neither goes on with it nor overwrites it, until it ends, even by a kill."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout and process.stdout.readline() == b"owned\n"
            before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
            holder = f"process {process.pid} on {os.uname().nodename}"
            for arguments in (["--resume", run], ["--resume", run / "."], [*SMALL, f"run.directory={run.parent}", "run.overwrite=true"]):
                status, lines = command(capsys, *arguments)
                assert status == 2 and len(lines) == 1 and f"is in use by {holder}; wait until that ends" in lines[0]
            assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
            assert [path.name for path in run.parent.iterdir()] == ["toy"]
        finally:
            process.kill()
    assert (run / LOCK).exists()
    assert command(capsys, "--resume", run) == (0, [])
    assert content(run) == whole, "the dead one's lock is gone too"


def test_a_new_run_is_owned_from_its_first_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def intrude() -> None:
        seen.append(run_command(main, ["--resume", str(tmp_path / "toy")]))
        seen.append(run_command(main, [*SMALL, f"run.directory={tmp_path}", "run.overwrite=true"]))

    for overwrite in ("false", "true"):
        with monkeypatch.context() as patch:
            patch.setattr(module, "check_inputs", at(module.check_inputs, 1, intrude))
            assert command(capsys, *SMALL, "train.iterations=1", f"run.directory={tmp_path}", f"run.overwrite={overwrite}")[0] == 0
    assert seen == [2] * 4


def test_a_run_that_another_process_has_completed_meanwhile(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from arcopo_fast.storage.run_dir import RunDirectory

    waiting = RunDirectory.open(run)
    main(["--resume", str(run)])
    with pytest.raises(module.UserError, match="is complete"), waiting.owned():
        pass


# Kills -----------------------------------------------------------------------------------------------------------------------------


def test_what_a_kill_left_is_removed_and_nothing_is_lost(run: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The adapter with its card, the hidden files of writers, and a checkpoint that had only been put aside."""
    shutil.copytree(run / "checkpoints" / "step-3" / "adapter", run / "adapter")
    (run / "adapter" / "README.md").write_text("card")
    for name in (".step-3.abcdef12", ".step-4.k3_x9a01", ".step-3.0123abcd.tmp", ".step-2.01234567.old"):
        shutil.copytree(run / "checkpoints" / "step-2", run / "checkpoints" / name)
    os.rename(run / "checkpoints" / "step-3", run / "checkpoints" / ".step-3.89abcdef.old")
    shutil.copytree(run / "adapter", run / ".adapter.0123abcd.tmp")
    for name in (".metrics.abcd_123.jsonl", "samples/.before-00.abcd_123.mp4", ".evaluation.abcdefgh.json", "adapter/.README.abcdefgh.md"):
        (run / name).write_text("half")
    (run / ".notes.abcdefgh.txt").write_text("mine")
    assert command(capsys, "--resume", run) == (0, [])
    found = content(run)
    assert found.pop(".notes.abcdefgh.txt") == b"mine"
    assert found == whole


def test_a_file_of_the_users_in_the_adapter_is_not_lost(run: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (run / "adapter").mkdir()
    (run / "adapter" / "diary.txt").write_text("mine")
    status, lines = command(capsys, "--resume", run)
    assert status == 2 and "adapter holds other files (diary.txt)" in lines[-1] and (run / "adapter" / "diary.txt").read_text() == "mine"
    (run / "adapter" / "diary.txt").unlink()
    assert command(capsys, "--resume", run) == (0, [])
    assert content(run) == whole


def test_a_run_without_its_report_gets_it(run: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    main(["--resume", str(run)])
    (run / "report.html").unlink()
    main(["--resume", str(run)])
    assert content(run) == whole
    status, lines = command(capsys, "--resume", run)
    assert status == 2 and "is complete" in lines[0]


# Checkpoints -----------------------------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[int(torch.randint(len(data), ()))] ^= 1 << int(torch.randint(8, ()))
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of the weights": lambda path: flip(path / "adapter" / "adapter_model.safetensors"),
    "a bit of the other form": lambda path: flip(path / "adapter" / "pytorch_lora_weights.safetensors"),
    "a bit of the adapter's configuration": lambda path: flip(path / "adapter" / "adapter_config.json"),
    "a bit of the state": lambda path: flip(path / "trainer.pt"),
    "a bit of the checksums": lambda path: flip(path / SUMS),
    "cut short": lambda path: os.truncate(path / "trainer.pt", 100),
    "empty": lambda path: os.truncate(path / "adapter" / "adapter_model.safetensors", 0),
    "a file is missing": lambda path: (path / "trainer.pt").unlink(),
    "no weights": lambda path: shutil.rmtree(path / "adapter"),
    "checksums cut short": lambda path: os.truncate(path / SUMS, (path / SUMS).stat().st_size // 2),
    "checksums of nothing": lambda path: (path / SUMS).write_text(""),
    "nothing": lambda path: (shutil.rmtree(path), path.mkdir()),
    "unchecked and damaged": lambda path: ((path / SUMS).unlink(), os.truncate(path / "trainer.pt", 100)),
    "unchecked, of another kind": lambda path: ((path / SUMS).unlink(), torch.save({"iteration": 3, "optimizer": 3}, path / "trainer.pt")),
    "unchecked, of another iteration": lambda path: (
        shutil.rmtree(path),
        shutil.copytree(path.with_name("step-2"), path),
        (path / SUMS).unlink(),
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    kind: str, run: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[kind](run / "checkpoints" / "step-3")
    status, lines = command(capsys, "--resume", run)
    note = [line for line in lines if line.endswith("it is used unchecked")]
    (said,) = [line for line in lines if line not in note]
    assert not status and len(note) == ("unchecked" in kind)
    assert re.search(r"step-3 is damaged: .*; it is now step-3.damaged, and the run continues from step-2$", said), said
    found = {name: value for name, value in content(run).items() if "step-3.damaged" not in name}
    assert found == whole and (run / "checkpoints" / "step-3.damaged").exists()


def test_no_checkpoint_is_whole(run: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 3):
        flip(run / "checkpoints" / f"step-{step}" / "trainer.pt")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, lines = command(capsys, "--resume", run)
    assert status == 2 and len(lines) == 1
    assert "is whole:" in lines[0] and "step-3 is damaged: trainer.pt is not as it was written; put one back" in lines[0]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    shutil.rmtree(run / "checkpoints")  # as the line says
    assert command(capsys, "--resume", run) == (0, [])
    assert content(run) == whole


def test_a_checkpoint_without_checksums_is_used_and_said(run: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step-3" / SUMS).unlink()
    sums = whole[f"checkpoints/step-3/{SUMS}"]
    status, lines = command(capsys, "--resume", run)
    assert not status and [
        line.endswith(f"step-3 has no {SUMS}, because an earlier version wrote it: it is used unchecked") for line in lines
    ] == [True]
    assert content(run) | {f"checkpoints/step-3/{SUMS}": sums} == whole


def test_the_checksums_are_what_sha256sum_reads(run: Path) -> None:
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=run / "checkpoints" / "step-3", capture_output=True, text=True)
    assert not done.returncode and done.stdout.count(": OK") == 4, done.stdout + done.stderr


# Settings --------------------------------------------------------------------------------------------------------------------------


def change(run: Path, key: str, value: Any) -> None:
    document = yaml.safe_load((run / "config.yaml").read_text())
    section, _, name = key.rpartition(".")
    (document[section] if section else document)[name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(document))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optimizer.lr", 0.25, r"optimizer.lr from \S+ to 0.25"),
        ("train.iterations", 5, "train.iterations from 4 to 5"),
        ("train.keep_checkpoints", 3, "train.keep_checkpoints from 2 to 3"),
        ("rewards", {"toy_vq": 0.5}, r"rewards from \{.*\} to \{\"toy_vq\": 0.5\}"),
        ("rollout.branches_per_wave", 2, "rollout.branches_per_wave from null to 2"),
        ("evaluation.sample_videos", 0, "evaluation.sample_videos from 1 to 0"),
    ],
)
def test_settings_that_changed_are_said(key: str, value: Any, said: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(run, key, value)
    status, lines = command(capsys, "--resume", run)
    assert not status and re.search(
        rf"config.yaml was changed since the run last ran: {said}; the new values count from here on$", lines[0]
    ), lines
    assert json.loads((run / "inputs.json").read_text())["settings"][key] == value


def test_a_run_cannot_be_shorter_than_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(run, "train.iterations", 2)
    status, lines = command(capsys, "--resume", run)
    assert status == 2 and lines[-1].endswith("has done 3 iterations, and train.iterations is 2; give at least 3")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seed", 5, "seed from 0 to 5"),
        ("rollout.group_size", 5, r"rollout.group_size from \d+ to 5"),
        ("sampler.steps", [1000, 500], r"sampler.steps from \[.*\] to \[1000.0, 500.0\]"),
        ("video.chunks", 2, r"video.chunks from \d+ to 2"),
        ("lora.rank", 3, "lora.rank from 2 to 3"),
        ("objective.clip", 0.5, r"objective.clip from \S+ to 0.5"),
        ("generator.dtype", "bfloat16", 'generator.dtype from "float32" to "bfloat16"'),
    ],
)
def test_settings_with_which_a_run_would_be_another_are_refused(
    key: str, value: Any, said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    change(run, key, value)
    status, lines = command(capsys, "--resume", run)
    assert status == 2 and len(lines) == 1
    assert re.search(rf"config.yaml was changed since the run began: {said}; the run would not continue as it began", lines[0]), lines
    (run / "config.yaml").write_bytes(before[run / "config.yaml"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
