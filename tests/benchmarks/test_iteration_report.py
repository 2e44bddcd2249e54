"""The benchmark of an iteration runs at a small size and its report is complete; so is that of the full size, put together from parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import full_size, gpu, gpu_steps, iteration, results, shapes, tables
from benchmarks.commands import FAILED, LATE, PASSED, Outcome
from benchmarks.iteration import changed
from benchmarks.results import OURS
from benchmarks.timing import Ceilings, Timer

ROOT = Path(__file__).resolve().parents[2]
CEILINGS = Ceilings(bandwidth=1e10, matmul=1e11)


def check_stages(case: dict[str, Any], paths: set[str]) -> None:
    stages = {row["stage"]: row for row in case["stages"]}
    first, last = case["pivot"] == 1, case["pivot"] == case["chunks"]
    for name in paths:
        expected = {"denoise", "replay", "optimizer", "other"} | (set() if first else {"prefix"})
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


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, Any]]:
    """Some parts of the full-size measurement, at a size at which they take no time."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_size, "has_diffusers", lambda: False)
        scene = full_size.full(*full_size.small(), torch.device("cpu"))
    assert scene.vae is None
    timer, environment = Timer(torch.device("cpu")), results.environment(shapes.DEVICE)
    names = ["engine-p1", "engine-p4", "reference-p4", "profile-p4", "engine-p7", "reference-p7", "within-80", "sweep-length"]
    measured = {name: full_size.measure_part(name, scene, timer, CEILINGS, 1) for name in names}
    return {name: {"environment": environment, "ceilings": CEILINGS._asdict(), **found} for name, found in measured.items()}


def test_parts_become_one_table(parts: dict[str, dict[str, Any]]) -> None:
    cases = tables.merged([case for part in parts.values() for case in part["cases"]])
    assert [case["pivot"] for case in cases[:3]] == [1, 4, 7] and len(cases) == 3 + 2 + 4
    assert cases[0]["ratios"]["reference"] is None and cases[0]["variants"].keys() == {OURS}
    for case in cases[1:3]:
        check_stages(case, {OURS, "reference"})
        ours, theirs = (case["variants"][name]["median"] for name in (OURS, "reference"))
        assert case["ratios"]["reference"] == theirs / ours and case["extrapolated"]["measured_branches"] == 2
    assert cases[2]["memory"]["tail_pages"] == 0, "a group that forks at the last chunk needs no branch pages"
    within, swept = cases[3:5], cases[5:]
    assert [case["case"] for case in within] == [f"Wan 1.3B within 80 GB p={pivot}" for pivot in (1, 7)]
    assert within[0]["settings"] == {"branches_per_wave": 4, "decode_branches": 1, "micro_batch": 1} != cases[0]["settings"]
    windowed = [case["memory"]["pages"] for case in swept if "window=4" in case["case"]]
    assert max(windowed) < max(case["memory"]["pages"] for case in swept)

    text = tables.markdown({**parts["engine-p1"], "cases": cases, "kernels": parts["profile-p4"]["kernels"]})
    assert "denoised 4 branches at a time, decoded 4, and replayed 4 (anchor, step) pairs together" in text
    assert "ran 2 of 4 branches" in text and "diffusers is not installed" in text
    assert "extrapolated, times 2; the others, *other* among them, are not scaled" in text
    rows = [line for line in text.splitlines() if line.startswith("| average")]
    assert len(rows) == 1 and results.duration(sum(case["variants"][OURS]["median"] for case in cases[:3]) / 3) in rows[0]
    for case in cases:
        assert results.duration(case["variants"][OURS]["median"]) in text


def test_the_profile_names_what_takes_long(parts: dict[str, dict[str, Any]]) -> None:
    found = parts["profile-p4"]["kernels"]
    assert found.keys() == {"rollout", "update"}, "nothing is decoded here"
    for stage, profile in found.items():
        rows = profile["kernels"]
        seconds = [row["seconds"] for row in rows]
        assert profile["seconds"] > 0 and profile["busy"] > 0
        assert seconds == sorted(seconds, reverse=True) and min(seconds) > 0
        assert len(rows) == full_size.KERNELS_KEPT and 0.5 < sum(row["share"] for row in rows) <= 1
        assert not {row["name"] for row in rows} & {"denoise", "clean", "replay", "prefix"}, "stages are no kernels"
        assert any("addmm" in row["name"] for row in rows), stage
    text = tables.markdown({**parts["engine-p1"], "cases": parts["engine-p1"]["cases"], "kernels": found})
    assert "## Kernels of the update" in text and found["update"]["kernels"][0]["name"] in text


def test_the_reference_is_extrapolated_by_branch(parts: dict[str, dict[str, Any]]) -> None:
    """What is measured of 2 of 4 branches counts twice, the replay once."""
    scene = replace(full_size.full(*full_size.small(), torch.device("cpu")), vae=None)

    class Steady(Timer):
        def sample(self, call: Any, host: float = 0.0) -> float:
            call()
            return 10.0

    class Recorded(iteration.Samples):
        def medians(self, rounds: int) -> dict[str, float]:
            return {"prefix": 1.0, "denoise": 2.0, "replay": 3.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_size, "Samples", Recorded)
        (case,) = full_size.measure_part("reference-p2", scene, Steady(torch.device("cpu")), CEILINGS, 1)["cases"]
    seconds = {row["stage"]: row["reference"] for row in case["stages"]}
    assert seconds == {"prefix": 2.0, "denoise": 4.0, "replay": 3.0, "other": 4.0}
    assert case["variants"]["reference"]["median"] == 13.0


class Process:
    """Stands for `gpu_steps.Command`: writes what the parts would have measured, and says so; what is broken fails, at `killed` it ends.

    deadly: at such a part the process dies; after such as are both, it does once it has said that they failed. started: how many processes.
    """

    def __init__(self, parts: dict[str, dict[str, Any]], broken: Sequence[str] = (), killed: str = "", deadly: Sequence[str] = ()) -> None:
        self.parts, self.broken, self.killed, self.deadly = parts, broken, killed, deadly
        self.ran: list[str] = []
        self.started = 0

    def __call__(self, command: Sequence[str], deadline: float) -> Process:
        begin, end = command.index("benchmarks.full_size") + 1, command.index("--write")
        self.names, self.file = command[begin:end], Path(command[end + 1])
        assert command[end + 2 :] == ["--rounds", "1"]
        self.started += 1
        return self

    def __iter__(self) -> Iterator[str]:
        measured = {}
        for name in self.names:
            if name == self.killed:
                self.outcome = Outcome(None, ["at work"], 0.1)
                return
            self.ran.append(name)
            yield f"{name}: begun"
            yield f"at {name}"
            if name in self.deadly and name not in self.broken:
                self.outcome = Outcome(-11, ["a fault"], 0.1)
                return
            if name not in self.broken or self.parts[name].get("problems"):
                measured[name] = self.parts[name]
            self.file.write_text(json.dumps(measured))
            yield f"{name}: {'failed' if name in self.broken else 'measured'}"
            if name in self.deadly:
                yield "the device answers no more"
                break
        self.outcome = Outcome(int(bool(self.broken)), [], 0.1)


def test_the_step_resumes_where_it_was(parts: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.full_size.PARTS", tuple(parts))
    monkeypatch.setenv("OUT", str(tmp_path))

    def step(chosen: Sequence[str], *broken: str, killed: str = "", deadly: Sequence[str] = ()) -> tuple[str, list[str], dict[str, Any]]:
        nonlocal process
        process = Process(parts, broken, killed, deadly)
        monkeypatch.setattr(gpu_steps, "Command", process)
        status = gpu.run_step("iteration", 60.0, gpu_steps.Chosen(parts=chosen, rounds=1))
        return status, process.ran, json.loads((tmp_path / "iteration.json").read_text())

    everything, process = tuple(parts), Process({})
    assert step(["engine-p4"])[:2] == (PASSED, ["engine-p4"])
    status, ran, report = step(everything, "engine-p7", killed="reference-p7")
    assert status == FAILED and ran == ["engine-p1", "reference-p4", "profile-p4", "engine-p7"]
    states = {part["name"]: part["status"] for part in report["parts"]}
    assert states["engine-p4"] == states["engine-p1"] == PASSED and states["engine-p7"] == FAILED
    assert states["reference-p7"] == states["sweep-length"] == LATE
    (failed,) = (part for part in report["parts"] if part["name"] == "engine-p7")
    assert failed["output"] == ["engine-p7: begun", "at engine-p7", "engine-p7: failed"]
    assert report["measured"].keys() == {"engine-p1", "engine-p4", "reference-p4", "profile-p4"}
    status, ran, report = step(everything, "engine-p7", deadly=["engine-p7", "within-80"])
    assert status == FAILED and ran == ["engine-p7", "reference-p7", "within-80", "sweep-length"] and process.started == 3
    states = {part["name"]: part["status"] for part in report["parts"]}
    assert [name for name in states if states[name] != PASSED] == ["engine-p7", "within-80"]
    (died,) = (part for part in report["parts"] if part["name"] == "within-80")
    assert died["exit"] == -11 and died["output"] == ["a fault"]
    assert report["measured"].keys() == set(everything) - {"engine-p7", "within-80"}
    status, ran, report = step(everything)
    assert status == PASSED and ran == ["engine-p7", "within-80"] and process.started == 1
    assert report["measured"].keys() == set(everything) and report["kernels"] == parts["profile-p4"]["kernels"]
    assert [case["pivot"] for case in report["cases"][:3]] == [1, 4, 7]
    assert (tmp_path / "iteration.md").read_text() == tables.markdown(report | {"environment": parts["engine-p1"]["environment"]})
    assert step(everything)[1] == [] and process.started == 0
    monkeypatch.setattr("benchmarks.full_size.fingerprint", lambda *_: "of other sources")
    assert step(["engine-p1"])[1] == ["engine-p1"], "what other sources measured counts for nothing"


def test_a_process_that_never_gets_to_work_is_not_started_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Broken(Process):
        def __iter__(self) -> Iterator[str]:
            yield "ImportError: no such thing"
            self.outcome = Outcome(1, ["ImportError: no such thing"], 0.1)

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu_steps, "Command", process := Broken({}))
    assert gpu.run_step("iteration", 60.0, gpu_steps.Chosen(parts=["engine-p1", "engine-p4"], rounds=1)) == FAILED and process.started == 1
    first, second = json.loads((tmp_path / "iteration.json").read_text())["parts"]
    assert first["output"] == ["ImportError: no such thing"] and second["output"] == ["not started"]


def test_what_was_measured_other_than_planned_stays_a_failure(
    parts: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is thrown away, and nobody takes it for what was asked for, this time or the next."""
    problem = "it held 9 pages"
    (case,) = parts["engine-p1"]["cases"]
    other = {**parts["engine-p1"], "cases": [case | {"problems": [problem]}], "problems": [problem]}
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr("benchmarks.full_size.PARTS", ("engine-p1",))
    for again in (False, True):
        monkeypatch.setattr(gpu_steps, "Command", process := Process({"engine-p1": other}, ["engine-p1"]))
        assert gpu.run_step("iteration", 60.0, gpu_steps.Chosen(rounds=1)) == FAILED
        report = json.loads((tmp_path / "iteration.json").read_text())
        assert report["parts"][0]["status"] == FAILED and process.started == int(not again)
        assert report["parts"][0]["output"] == ([problem] if again else ["engine-p1: begun", "at engine-p1", "engine-p1: failed"])
        assert report["measured"]["engine-p1"]["problems"] == [problem]
        assert f"**Not as planned**, {case['case']}: {problem}." in (tmp_path / "iteration.md").read_text()
    monkeypatch.setattr("benchmarks.full_size.PARTS", ("engine-p1", "engine-p4"))
    monkeypatch.setattr(gpu_steps, "Command", Process(parts))
    assert gpu.run_step("iteration", 60.0, gpu_steps.Chosen(parts=["engine-p4"], rounds=1)) == PASSED, "which has no problems"
    assert json.loads((tmp_path / "iteration.json").read_text())["measured"].keys() == {"engine-p1", "engine-p4"}
    assert gpu.run_step("iteration", 60.0, gpu_steps.Chosen(parts=["engine-p1"], rounds=1)) == PASSED, "by its name it is measured anew"
    assert json.loads((tmp_path / "iteration.json").read_text())["measured"].keys() == {"engine-p1", "engine-p4"}


def test_a_part_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def measure_part(name: str, *_: object) -> dict[str, Any]:
        if name == "engine-p4":
            raise torch.OutOfMemoryError("no room")
        return {"cases": [name], "problems": ["it held 9 pages"] if name == "engine-p7" else []}

    monkeypatch.setattr(full_size, "measure_part", measure_part)
    monkeypatch.setattr(full_size, "measure_ceilings", lambda timer: CEILINGS)
    monkeypatch.setattr(full_size, "full", lambda: iteration.Scene("tiny", full_size.small()[0], None, None, ""))  # type: ignore[arg-type]
    names, file = ["engine-p1", "engine-p4", "engine-p7"], tmp_path / "parts.json"
    assert full_size.main([*names, "--write", str(file)]) == 1
    out, err = capsys.readouterr()
    verdicts = [match["verdict"] for line in out.splitlines() if (match := full_size.SAID.fullmatch(line))]
    assert verdicts == ["begun", "measured", "begun", "failed", "begun", "failed"] and "no room" in err
    assert out.splitlines()[-2:] == ["it held 9 pages", "engine-p7: failed"]
    measured = json.loads(file.read_text())
    assert measured.keys() == {"engine-p1", "engine-p7"} and measured["engine-p7"]["cases"] == ["engine-p7"]
    assert full_size.main(["engine-p1", "--write", str(file)]) == 0


def test_the_cuts_are_those_of_the_planner_and_the_recipe() -> None:
    from arcopo_fast.build import generator_sizes
    from arcopo_fast.config.reading import load_config
    from arcopo_fast.planning.memory import GB, Settings
    from arcopo_fast.planning.plan import plan

    config = load_config("bench_1_3b")
    planned = {24: plan(config, generator_sizes(config.generator.checkpoint), 24 * GB).settings, 80: Settings.of(config)}
    for gigabytes, settings in planned.items():
        assert settings == Settings(*full_size.CUTS[gigabytes][:3], checkpoint=False, offload=False)
        cut = full_size.cut_for(gigabytes)
        assert (cut.rollout.branches_per_wave, cut.rollout.decode_branches, cut.objective.micro_batch) == full_size.CUTS[gigabytes][:3]
    assert full_size.CUTS[80].resident == 4 * 10**9, "a judge of two billion parameters in half precision"


@pytest.mark.parametrize(("gib", "size"), [(23.6, 24), (31.4, 24), (79.1, 80), (94.5, 80), (139.8, 141), (178.0, 141), (11.8, 24)])
def test_a_card_takes_the_largest_cut_that_it_has_the_memory_for(monkeypatch: pytest.MonkeyPatch, gib: float, size: int) -> None:
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=int(gib * 2**30)))
    assert full_size.card(torch.device("cuda")) == size


def test_less_memory_than_the_cut_needs_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that went on with smaller waves, or an update with smaller micro-batches, did not do what is reported."""
    scene = replace(full_size.full(*full_size.small(), torch.device("cpu")), vae=None)
    original = iteration.OurPath.iteration

    def falls_back(path: iteration.OurPath, advantages: Any = None) -> Any:
        path.engine.largest_wave = 2
        path.objective.batching.restore({"micro_batch": 1})
        return original(path)

    monkeypatch.setattr(iteration.OurPath, "iteration", falls_back)
    found = full_size.measure_part("engine-p1", scene, Timer(torch.device("cpu")), CEILINGS, 1)
    pages, wave, settings = found["problems"]
    assert "held 12 pages, planned were 24" in pages and "waves of 2 branches" in wave and "micro_batch=1" in settings
    assert found["cases"][0]["variants"][OURS]["median"] > 0, "and yet it was measured"


def test_the_parts_are_those_of_the_issue() -> None:
    assert {"engine-p1", "engine-p4", "engine-p7", "reference-p1", "reference-p4", "reference-p7"} <= set(full_size.PARTS)
    assert {f"engine-p{pivot}" for pivot in range(1, 8)} <= set(full_size.PARTS), "the average is over all pivots"
    assert {"sweep-group", "sweep-steps", "sweep-length", "sweep-resolution", "within-80", "within-24"} <= set(full_size.PARTS)
    assert full_size.PARTS[:2] == ("engine-p4", "reference-p4"), "what tells most comes first"


def test_the_full_size_is_that_of_the_recipe() -> None:
    """But for how the work is cut into waves and micro-batches, which depends on the device's memory."""
    from arcopo_fast.config.reading import load_config

    config = load_config("bench_1_3b")
    assert config.generator.checkpoint == "random:1.3b" and config.generator.vae_dtype == "bfloat16"
    assert full_size.cut_for(80) == full_size.cut_for(80, config)


def test_the_fingerprint_knows_settings_and_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    once = full_size.fingerprint()
    assert full_size.fingerprint() == once and full_size.fingerprint(changed(full_size.FULL, rollout={"group_size": 11})) != once
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "arcopo_fast").mkdir()
    monkeypatch.setattr(results, "ROOT", tmp_path / "benchmarks")
    empty = full_size.fingerprint()
    (tmp_path / "arcopo_fast" / "new.py").write_text("x = 1\n")
    assert full_size.fingerprint() != empty
