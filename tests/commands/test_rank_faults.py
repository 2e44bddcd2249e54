"""Ranks that are killed, that hang, or that run out of memory: the job ends, nothing is half-written, and it goes on as if undisturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import run_commands

from arcopo_fast import train
from arcopo_fast.objectives.base import Objective
from arcopo_fast.objectives.optimizer import Step, Stepper
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import MemberNoise
from arcopo_fast.runtime.distributed import World
from arcopo_fast.storage.metrics import read_metrics
from arcopo_fast.storage.run_dir import damage

SMALL = [
    "toy",
    "video.chunks=2",
    "video.chunk_frames=1",
    "sampler.steps=[1000, 350]",
    "rollout.group_size=4",
    "rollout.prompts_per_iteration=4",
    "objective.anchors_per_update=2",
    "lora.rank=2",
    "lora.alpha=4",
    "evaluation.prompts=2",
    "evaluation.videos_per_prompt=1",
    "evaluation.sample_videos=1",
    "train.iterations=3",
    "train.save_every=1",
    "train.rank_timeout=20",
    "run.tensorboard=false",
]


def results(run: Path) -> dict[str, Any]:
    lines = [{key: value for key, value in line.items() if key != "time"} for line in read_metrics(run)]
    return {"metrics": lines, "adapter": load_file(run / "adapter" / "adapter_model.safetensors")}


def check_equal(run: Path, expected: dict[str, Any]) -> None:
    """Groups are spread, so that any number of ranks makes the same calls with the same shapes: bit for bit."""
    found = results(run)
    assert found["metrics"] == expected["metrics"]
    assert all(torch.equal(found["adapter"][name], tensor) for name, tensor in expected["adapter"].items())
    left = [path for path in run.rglob("*") if path.name.startswith(".")]
    assert not left, "what was half-written is gone"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    train.main([*SMALL, f"run.directory={folder}"])
    return results(folder / "toy")


def on_rank(rank: int, owner: Any, name: str, call: int, do: Callable[[], object]) -> Callable[[list[str]], None]:
    """The command, in which on one rank the call of this number does something before what it is for."""

    def command(arguments: list[str]) -> None:
        original, calls = getattr(owner, name), iter(range(1, 10**6))

        def wrapped(*given: Any, **named: Any) -> Any:
            if next(calls) == call:
                do()
            return original(*given, **named)

        if os.environ["RANK"] == str(rank):
            setattr(owner, name, wrapped)
        train.main(arguments)

    return command


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


MOMENTS: dict[str, tuple[int, Any, str, int]] = {
    "a reduction": (1, World, "sum_", 4),  # of the second iteration's last update
    "a rollout": (1, Engine, "forks", 4),
    "a save": (0, Objective, "state_dict", 2),  # when the adapter of the second checkpoint is there
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_rank(moment: str, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    victim, owner, name, call = MOMENTS[moment]
    began = time.monotonic()
    ends = run_commands(2, on_rank(victim, owner, name, call, kill), *SMALL, f"run.directory={tmp_path}", killed=victim)
    assert time.monotonic() - began < 60
    assert ends[victim].status == -signal.SIGKILL and ends[1 - victim].status == 2
    run = tmp_path / "toy"
    checkpoints = [path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith(".")]
    assert checkpoints == ["step-1"] and damage(run / "checkpoints" / "step-1") is None
    assert [line["step"] for line in read_metrics(run)] in ([1], [1, 2])
    if victim == 1:
        assert any("rank 1" in line or "another rank" in line for line in ends[0].lines), ends[0].lines
    if moment == "a rollout":  # with the same number of ranks, and else with another
        assert [end.status for end in run_commands(2, train.main, "--resume", run)] == [0, 0]
    else:
        train.main(["--resume", str(run)])
    check_equal(run, undisturbed)


def test_a_rank_that_hangs_ends_the_job_and_is_named(tmp_path: Path) -> None:
    command = on_rank(1, Engine, "forks", 2, lambda: time.sleep(13))
    first, second = run_commands(2, command, *SMALL, "train.rank_timeout=6", f"run.directory={tmp_path}", within=60)
    assert first.status == 2 and second.status == 2
    assert "rank 1 did not come within 6 s" in first.lines[-1], first.lines


def test_all_ranks_take_what_one_has_memory_for(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Waves and micro-batches, from the next reduction on; the checkpoint says so, and a run that goes on begins with them."""

    def command(arguments: list[str]) -> None:
        finish, predict = Engine._finish, Engine.predict

        def small_finish(engine: Engine, fork: Any, noise: MemberNoise) -> Any:
            if len(noise.members) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return finish(engine, fork, noise)

        def small_predict(engine: Engine, group: Any, samples: Any, **named: Any) -> Any:
            if torch.is_grad_enabled() and len(samples) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return predict(engine, group, samples, **named)

        if os.environ["RANK"] == "1":
            Engine._finish, Engine.predict = small_finish, small_predict  # type: ignore[method-assign]
        train.main(arguments)

    ends = run_commands(2, command, *SMALL, f"run.directory={tmp_path}")
    assert [end.status for end in ends] == [0, 0], ends
    run = tmp_path / "toy"
    told = [line for line in ends[0].lines if "another rank ran out of memory" in line]
    assert len(told) == 1 and "rollout.branches_per_wave=2 objective.micro_batch=2 objective.checkpoint=false" in told[0]
    log = (run / "logs" / "rank-1.log").read_text()
    assert "a wave of 4 branches ran out of memory" in log and "the replay ran out of memory" in log
    state = torch.load(run / "checkpoints" / "step-3" / "trainer.pt", weights_only=True)
    assert state["halved"] == {"largest_wave": 2, "micro_batch": 2}
    for found, expected in zip(results(run)["metrics"], undisturbed["metrics"]):
        assert found["reward"] == pytest.approx(expected["reward"], abs=1e-3)


def test_adapters_that_drift_apart_stop_the_run(tmp_path: Path) -> None:
    def command(arguments: list[str]) -> None:
        take, calls = Stepper.take, iter(range(1, 100))

        def drifting(stepper: Stepper) -> Step:
            step = take(stepper)
            if next(calls) == 3:  # the second iteration's first update
                with torch.no_grad():
                    stepper.optimizer.param_groups[0]["params"][0][0, 0] += 1e-6
            return step

        if os.environ["RANK"] == "1":
            Stepper.take = drifting  # type: ignore[method-assign]
        train.main(arguments)

    ends = run_commands(2, command, *SMALL, f"run.directory={tmp_path}")
    assert [end.status for end in ends] == [2, 2]
    assert "rank 1 of 2 has another adapter after iteration 2 than rank 0" in ends[0].lines[-1]
    assert [path.name for path in (tmp_path / "toy" / "checkpoints").iterdir()] == ["step-1"], "what is wrong is not kept"


KILLER = """
import os, pathlib, signal
calls = 0
def kill(frames, prompts):
    global calls
    calls += 1
    if os.environ.get("RANK") == "1" and calls == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return frames.mean((1, 2, 3, 4))
"""


def test_torchrun_starts_the_job_again_and_it_goes_on_by_itself(tmp_path: Path) -> None:
    (tmp_path / "kills.py").write_text(KILLER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"}
    small = [*SMALL, 'rewards={toy_vq: 1.0, "kills:kill": 0.0}']
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command = [*torchrun, "-m", "arcopo_fast.train", *small, f"run.directory={tmp_path / 'killed'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["toy"], "the second attempt went on with the first one's run"
    whole = [sys.executable, "-m", "arcopo_fast.train", *small, f"run.directory={tmp_path / 'whole'}"]
    subprocess.run(whole, env=environment | {"TORCHELASTIC_RESTART_COUNT": "0"}, check=True, capture_output=True, timeout=180)
    check_equal(tmp_path / "killed" / "toy", results(tmp_path / "whole" / "toy"))
