"""The benchmark of an iteration runs at a small size and its report is complete; so is that of the full size, put together from parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arcopo_fast.floor import workload_of
from arcopo_fast.rollout.engine import VideoShape
from arcopo_fast.work import Workload
from benchmarks import gpu, iteration, results, shapes
from benchmarks.results import OURS
from benchmarks.timing import Ceilings, Timer

ROOT = Path(__file__).resolve().parents[2]
CEILINGS = Ceilings(bandwidth=1e10, matmul=1e11)


def check_stages(case: dict[str, Any], paths: set[str]) -> None:
    stages = {row["stage"]: row for row in case["stages"]}
    first, last = case["pivot"] == 1, case["pivot"] == case["chunks"]
    for name in paths:
        expected = {"denoise", "replay", "optimiser", "other"} | (set() if first else {"prefix"})
        expected |= {"fork"} if name == OURS else set()
        expected |= {"clean"} if not last or name == "reference" else set()  # the reference path caches the last chunk too
        assert expected <= {stage for stage, row in stages.items() if name in row}, name
        in_stages = sum(row.get(name, 0.0) for row in stages.values())
        assert in_stages == pytest.approx(case["variants"][name]["median"], rel=0.25), "the stages make up the whole"
    if OURS in paths:
        for stage in ("denoise", "replay", *(["clean"] if not last else [])):
            row = stages[stage]
            assert row["flops"] > 0 and row["floor"] > 0 and row["of_floor"] == pytest.approx(row["floor"] / row[OURS]), stage
        assert case["flops"] == pytest.approx(sum(row["flops"] for row in stages.values()))
        assert case["floor"] == pytest.approx(sum(row["floor"] for row in stages.values()))


@pytest.mark.skipif(shapes.DEVICE.type == "cuda", reason="minutes on a GPU: make gpu-iteration")
def test_the_benchmark_runs_and_says_everything(tmp_path: Path) -> None:
    # A worker of pytest-xdist says so in its environment, and pytest-benchmark would listen.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"OUT": str(tmp_path), "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_iteration.py", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    options = ["--seconds", "0.005", "--results", "small"]
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    (case,) = json.loads((tmp_path / "small.json").read_text())["cases"]
    assert "failed" not in case and case["variants"].keys() == {OURS, "reference"}
    check_stages(case, {OURS, "reference"})
    assert {"decode", "reward"} <= {row["stage"] for row in case["stages"] if OURS in row and "reference" in row}
    memory = case["memory"]
    assert memory["pages"] == memory["planned_pages"] == memory["prefix_pages"] + 3 * memory["tail_pages"]
    assert memory["kv_bytes"] == memory["planned_kv_bytes"]
    assert case["agreement"].keys() == {"latents", "rewards", "adapter"}
    assert case["ratios"]["reference"] > 0 and 0 < case["utilisation"] <= case["of_floor"]
    assert case["tokens_per_second"][OURS] == pytest.approx(3 * 4 * 16 / case["variants"][OURS]["median"])

    text = (tmp_path / "small.md").read_text()
    assert text in done.stdout
    assert "| 2 of 2 |" in text and all(f"| {row['stage']} |" in text for row in case["stages"])


def tiny() -> Workload:
    """The full-size workload, but for its sizes."""
    full = iteration.FULL
    model = replace(full.model, num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=40, text_dim=20, text_len=7)
    shape = VideoShape.of(full.shape.chunks, 1, 16, 4, 4)
    return replace(full, model=model, shape=shape, group_size=4, lora_rank=2, dtype=torch.float32, vae=None)


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, Any]]:
    """Some parts of the full-size measurement, at a size at which they take no time."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration, "find_spec", lambda name: None)  # diffusers, say, is not installed
        scene = iteration.full(tiny(), torch.device("cpu"))
    assert scene.vae is None
    timer, environment = Timer(torch.device("cpu")), results.environment(shapes.DEVICE)
    names = ["engine-p1", "engine-p4", "reference-p4", "engine-p7", "reference-p7", "sweep-length"]
    measured = {name: iteration.measure_part(name, scene, timer, CEILINGS, 1) for name in names}
    return {name: {"environment": environment, "ceilings": CEILINGS._asdict(), "cases": cases} for name, cases in measured.items()}


def test_parts_become_one_table(parts: dict[str, dict[str, Any]]) -> None:
    cases = iteration.merged([case for part in parts.values() for case in part["cases"]])
    assert [case["pivot"] for case in cases[:3]] == [1, 4, 7] and len(cases) == 3 + 4
    assert cases[0]["ratios"]["reference"] is None and cases[0]["variants"].keys() == {OURS}
    for case in cases[1:3]:
        check_stages(case, {OURS, "reference"})
        ours, theirs = (case["variants"][name]["median"] for name in (OURS, "reference"))
        assert case["ratios"]["reference"] == theirs / ours and case["extrapolated"]["measured_branches"] == 2
    assert cases[2]["memory"]["tail_pages"] == 0, "a group that forks at the last chunk needs no branch pages"
    windowed = [case["memory"]["pages"] for case in cases[3:] if "window=4" in case["case"]]
    assert max(windowed) < max(case["memory"]["pages"] for case in cases[3:])

    text = iteration.markdown({**parts["engine-p1"], "cases": cases})
    assert "ran 2 of 4 branches" in text and "diffusers is not installed" in text
    assert "extrapolated, times 2; the others, *other* among them, are not scaled" in text
    rows = [line for line in text.splitlines() if line.startswith("| average")]
    assert len(rows) == 1 and results.duration(sum(case["variants"][OURS]["median"] for case in cases[:3]) / 3) in rows[0]
    for case in cases:
        assert results.duration(case["variants"][OURS]["median"]) in text


def test_the_reference_is_extrapolated_by_branch(parts: dict[str, dict[str, Any]]) -> None:
    """What is measured of 2 of 4 branches counts twice, the replay once."""
    scene = replace(iteration.full(tiny(), torch.device("cpu")), vae=None)

    class Steady(Timer):
        def sample(self, call: Any, host: float = 0.0) -> float:
            call()
            return 10.0

    class Recorded(iteration.Samples):
        def medians(self, rounds: int) -> dict[str, float]:
            return {"prefix": 1.0, "denoise": 2.0, "replay": 3.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration, "Samples", Recorded)
        (case,) = iteration.measure_part("reference-p2", scene, Steady(torch.device("cpu")), CEILINGS, 1)
    seconds = {row["stage"]: row["reference"] for row in case["stages"]}
    assert seconds == {"prefix": 2.0, "denoise": 4.0, "replay": 3.0, "other": 4.0}
    assert case["variants"]["reference"]["median"] == 13.0


class Commands:
    """Stands for `gpu.run`: writes what a part would have measured, or fails; `ran` are the parts that were started."""

    def __init__(self, parts: dict[str, dict[str, Any]], broken: Sequence[str] = ()) -> None:
        self.parts, self.broken = parts, broken
        self.ran: list[str] = []

    def __call__(self, command: Sequence[str], deadline: float, **variables: str) -> gpu.Outcome:
        if "pytest" in command:
            return gpu.Outcome(0, [], 0.1)
        name = command[command.index("benchmarks.iteration") + 1]
        self.ran.append(name)
        if name in self.broken:
            return gpu.Outcome(1, ["it broke"], 0.1)
        Path(command[command.index("--write") + 1]).write_text(json.dumps(self.parts[name]))
        return gpu.Outcome(0, [], 0.1)


def test_the_step_resumes_where_it_was(parts: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.iteration.PARTS", tuple(parts))
    monkeypatch.setenv("OUT", str(tmp_path))

    def step(chosen: Sequence[str], *broken: str) -> tuple[str, list[str], dict[str, Any]]:
        commands = Commands(parts, broken)
        monkeypatch.setattr(gpu, "run", commands)
        status = gpu.run_step("iteration", 60.0, chosen)
        return status, commands.ran, json.loads((tmp_path / "iteration.json").read_text())

    everything = tuple(parts)
    assert step(["engine-p4"])[:2] == (gpu.PASSED, ["engine-p4"])
    status, ran, report = step(everything, "engine-p7")
    assert status == gpu.FAILED and ran == [name for name in everything if name != "engine-p4"]
    assert report["measured"].keys() == set(everything) - {"engine-p7"}
    status, ran, report = step(everything)
    assert status == gpu.PASSED and ran == ["engine-p7"] and report["measured"].keys() == set(everything)
    assert [case["pivot"] for case in report["cases"][:3]] == [1, 4, 7]
    assert (tmp_path / "iteration.md").read_text() == iteration.markdown(report | {"environment": parts["engine-p1"]["environment"]})
    assert step(everything)[1] == []
    monkeypatch.setattr("benchmarks.iteration.fingerprint", lambda *_: "of other sources")
    assert step(["engine-p1"])[1] == ["engine-p1"], "what other sources measured counts for nothing"


def test_the_parts_are_those_of_the_issue() -> None:
    assert {"engine-p1", "engine-p4", "engine-p7", "reference-p1", "reference-p4", "reference-p7"} <= set(iteration.PARTS)
    assert {f"engine-p{pivot}" for pivot in range(1, 8)} <= set(iteration.PARTS), "the average is over all pivots"
    assert {"sweep-group", "sweep-steps", "sweep-length", "sweep-resolution"} <= set(iteration.PARTS)


def test_the_full_size_is_that_of_the_recipe() -> None:
    """But for how the work is cut into waves and micro-batches, which depends on the device's memory."""
    from arcopo_fast.recipe import load_config

    config = load_config("bench_1_3b")
    recipe, full = workload_of(config, iteration.FULL.name, iteration.FULL.model, iteration.FULL.vae), iteration.FULL
    cut = {"branches_per_wave": None, "decode_branches": None}
    assert config.generator.checkpoint == "random:1.3b" and config.generator.vae_dtype == "bfloat16"
    whole = {"micro_batch": None}
    assert replace(recipe, copo=recipe.copo.model_copy(update=whole), **cut) == replace(
        full, copo=full.copo.model_copy(update=whole), **cut
    )


def test_the_fingerprint_knows_settings_and_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    once = iteration.fingerprint()
    assert iteration.fingerprint() == once and iteration.fingerprint(replace(iteration.FULL, group_size=11)) != once
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "arcopo_fast").mkdir()
    monkeypatch.setattr(results, "ROOT", tmp_path / "benchmarks")
    empty = iteration.fingerprint()
    (tmp_path / "arcopo_fast" / "new.py").write_text("x = 1\n")
    assert iteration.fingerprint() != empty
