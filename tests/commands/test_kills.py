"""Kills at random moments of train, collect, merge --sweep and evaluate: the end is that of an undisturbed run, byte for byte.

Damaged checkpoints and two processes at once are among them. Slow, a quarter of an hour; run it by its name:

    python -m pytest -m slow -s tests/commands/test_kills.py

ARCOPO_KILLS is how many there are over all commands (default 100). ARCOPO_TEST_SEED repeats what was drawn; moments are seconds, so what
they hit still varies.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.evaluations import SMALL
from support.seeds import seed_of
from torch import nn

from arcopo_fast.build import checkpoint_path, load_model
from arcopo_fast.model.lora import BLOCK_TARGETS, adapter_parameters, add_lora, save_adapter
from arcopo_fast.storage.metrics import read_metrics

KILLS = int(os.environ.get("ARCOPO_KILLS", "100"))
MOST = 4
"""Kills of one trial; after them it is let to end."""

VIDEO = [*SMALL, "evaluation.prompts=2"]
GROUP = ["rollout.group_size=3", "objective.anchors_per_update=2", "evaluation.videos_per_prompt=1", "evaluation.sample_videos=1"]
TRAIN = [*VIDEO, *GROUP, "train.iterations=5", "train.save_every=1", "lora.rank=2", "lora.alpha=4", "run.tensorboard=false"]
COMMANDS = {
    "train": TRAIN,
    "collect": [*VIDEO, *GROUP, "--buffer", "out", "--groups", "6"],
    "merge": [*VIDEO, *GROUP, "--semi", "semi", "--on", "on", "--sweep", "0.5,1", "--out", "out"],
    "evaluate": [*VIDEO, "--adapter", "on", "--videos", "2", "--batch", "2", "--out", "out"],
}
RUN = Path("runs") / "toy"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for name, rank in (("semi", 2), ("on", 3)):
        model = add_lora(load_model(checkpoint_path("toy")), rank=rank, alpha=rank, targets=BLOCK_TARGETS, seed=0)
        for parameter in adapter_parameters(model):
            nn.init.normal_(parameter, std=0.05)
        save_adapter(folder / name / "adapter", model, base_model="toy")
    return folder


# One trial -------------------------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """A directory in which one command is killed, and goes on, until it has ended. events: what was done to it, for a failure."""

    name: str
    folder: Path
    draw: random.Random
    events: list[str] = field(default_factory=list)
    kills: int = 0

    def start(self) -> subprocess.Popen[str]:
        arguments = COMMANDS[self.name]
        if self.name == "train":
            arguments = ["--resume", str(RUN)] if (self.folder / RUN).exists() else [*TRAIN, f"run.directory={RUN.parent}"]
        call = [sys.executable, "-m", f"arcopo_fast.{self.name}", *arguments]
        return subprocess.Popen(call, cwd=self.folder, env=ENVIRONMENT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    @property
    def begun(self) -> bool:
        """There is something that two processes could both go on with."""
        return self.name in ("collect", "evaluate") or (self.folder / (RUN if self.name == "train" else "out")).exists()

    def kill(self, process: subprocess.Popen[str], seconds: float, number: int) -> bool:
        """Send a signal after so many seconds; returns whether the process was still there."""
        began = time.monotonic()
        while not _catches(process, number):
            time.sleep(0.01)  # before that the signal would hit Python's own start
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        alive = process.poll() is None
        process.send_signal(number)
        self.events.append(f"{signal.Signals(number).name} after {time.monotonic() - began:.2f} s")
        self.ended(process, number if alive else 0)
        self.kills += alive
        return alive

    def ended(self, process: subprocess.Popen[str], number: int = 0) -> int:
        """Wait, and check how it ended: well, by the signal, or because another process or a damaged file keeps it from going on."""
        said = process.communicate(timeout=300)[1]
        status = process.returncode
        self.events.append(f"  status {status}: {said.strip().splitlines()[-1:]}")
        assert "Traceback" not in said and "Exception ignored" not in said, said
        if number == signal.SIGKILL and status == -number or status == 0:
            return status
        last = said.strip().splitlines()[-1]
        if status == 130:
            assert number in (signal.SIGTERM, signal.SIGINT) and last.startswith("interrupted; "), said
        else:
            assert status == 2 and re.match("error: .*(is in use by process|is complete|no checkpoint of .* is whole)", last), said
        return status

    def damage(self) -> None:
        """A bit of the newest checkpoint."""
        kept = sorted((self.folder / RUN / "checkpoints").glob("step-[0-9]"))
        if kept:
            file = self.draw.choice([path for path in kept[-1].rglob("*") if path.is_file()])
            content = bytearray(file.read_bytes())
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
            file.write_bytes(content)
            self.events.append(f"a bit of {file.relative_to(self.folder)}")

    def finish(self) -> None:
        """Let it end."""
        for _ in range(3):
            status = self.ended(self.start())
            if status == 0 or "is complete" in self.events[-1]:
                return
            if "is whole" in self.events[-1]:
                shutil.rmtree(self.folder / RUN / "checkpoints")  # as the line says
        raise AssertionError("it does not end")


def _catches(process: subprocess.Popen[str], number: int) -> bool:
    """Whether a process handles a signal by now, or cannot, or has ended."""
    if number == signal.SIGKILL or process.poll() is not None:
        return True
    try:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    except OSError:
        return True
    # Python itself catches SIGINT, so the handler of SIGTERM is what tells.
    return caught is None or bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def run_trial(trial: Trial, seconds: float) -> None:
    """Kill it up to `MOST` times, then let it end. seconds: an undisturbed process takes."""
    for _ in range(MOST):
        if trial.name == "train" and trial.draw.random() < 0.25:
            trial.damage()
        process = trial.start()
        other = trial.start() if trial.draw.random() < 0.2 and trial.begun else None
        number = trial.draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        alive = trial.kill(process, trial.draw.uniform(0, 1.1 * seconds), number)
        if other is not None:
            trial.events.append("and another process at once")
            alive |= trial.kill(other, trial.draw.uniform(0, 0.5 * seconds), number)
        if not alive and other is None:
            break
    trial.finish()


# What is left ----------------------------------------------------------------------------------------------------------------------


def content(trial: Trial) -> dict[str, Any]:
    """Everything that is left but times, and who wrote which line of scores."""
    place = trial.folder / (RUN if trial.name == "train" else "out")
    found: dict[str, Any] = {}
    for file in sorted(path for path in place.rglob("*") if path.is_file()):
        name = str(file.relative_to(place))
        # An evaluation has many owners, so nobody removes what a dead one left hidden.
        of_the_dead = trial.name == "evaluate" and file.name.startswith(".")
        if ".damaged" not in name and Path(name).parts[0] not in ("claims", "scores") and not of_the_dead:
            found[name] = file.read_bytes()
    if trial.name == "train":
        found["metrics.jsonl"] = [{key: value for key, value in record.items() if key != "time"} for record in read_metrics(place)]
        for name in ("report.html", "device.json"):  # have times in them
            found[name] = bool(found[name])
    if trial.name == "evaluate":
        lines = {line for file in place.glob("scores/*.jsonl") for line in file.read_text().split("\n")[:-1]}
        found["scores"] = sorted(lines)
    return found


def prepared(name: str, folder: Path, adapters: Path, draw: random.Random) -> Trial:
    for adapter in ("semi", "on"):
        shutil.copytree(adapters / adapter, folder / adapter)
    return Trial(name, folder, draw)


def differing(found: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            kind = "absent" if name not in found else "strange" if name not in expected else "another"
            yield f"{name}: {kind}"


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_random_it_ends_as_if_nothing_had_happened(name: str, adapters: Path, tmp_path: Path) -> None:
    draw = random.Random(seed_of(f"kills of {name}"))
    undisturbed = prepared(name, tmp_path / "undisturbed", adapters, draw)
    began = time.monotonic()
    undisturbed.finish()
    seconds = time.monotonic() - began
    expected = content(undisturbed)
    assert len(expected) > 3 and not [name for name in expected if Path(name).name.startswith(".")]
    failures, kills, trials = [], 0, 0
    share = -(-KILLS // len(COMMANDS))
    while kills < share:
        trial = prepared(name, tmp_path / f"trial-{trials}", adapters, draw)
        try:
            run_trial(trial, seconds)
            problems = list(differing(content(trial), expected))
        except (AssertionError, subprocess.TimeoutExpired) as error:
            problems = [str(error)]
        if problems:
            failures.append("\n".join([f"{trial.folder}:", *trial.events, *problems]))
        else:
            shutil.rmtree(trial.folder)
        kills, trials = kills + max(trial.kills, 1), trials + 1
    print(f"{name}: {kills} kills in {trials} trials, {len(failures)} ended otherwise; undisturbed {seconds:.1f} s")
    assert not failures, "\n\n".join(failures)
