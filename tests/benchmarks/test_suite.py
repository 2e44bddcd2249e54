"""The benchmarks run on a CPU, at small shapes; the script for the sanitizer launches every kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from arcopo_kernels.aot import OPERATORS

from benchmarks import compare, results, shapes
from benchmarks.timing import Call, Comparison, Timer

ROOT = Path(__file__).resolve().parents[2]


def test_every_operator_has_a_benchmark() -> None:
    names = {path.stem.removeprefix("bench_") for path in results.ROOT.glob("bench_*.py")}
    assert names == {*OPERATORS, "layers", "vae", "iteration", "scaling"}


@pytest.mark.skipif(shapes.DEVICE.type == "cuda", reason="minutes on a GPU: make gpu-bench")
def test_the_suite_runs_on_a_cpu(tmp_path: Path) -> None:
    # A worker of pytest-xdist says so in its environment, and pytest-benchmark would listen.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"OUT": str(tmp_path), "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    options = ["--seconds", "0.005", "--results", "smoke", f"--benchmark-json={tmp_path / 'plugin.json'}"]
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    path = tmp_path / "smoke.json"
    report = json.loads(path.read_text())
    cases = {results.case_name(case): case for case in report["cases"]}
    assert len(cases) == len(report["cases"]), "names of cases are unique"
    operators = {"copo_surrogate", "segment_attention", "copy_pages", "qk_norm_rope", "layer_norm_modulate", "norm_silu", "nft_loss"}
    operators |= {"lora_linear", "lora_linears", "adapted layer", "vae decoder"}
    assert operators <= {case["operator"] for case in cases.values()}
    for name, case in cases.items():
        assert "failed" not in case, name
        ours = case["variants"][results.OURS]
        assert 0 < ours["q1"] <= ours["median"] <= ours["q3"] and case["bytes"] > 0, name
        assert case["of_ceiling"] > 0 and case["ratios"]["reference"] > 0 and case["ratios"]["compiled"] is None, name
        assert any(line.startswith(f"  {case['mode']} {case['case']} ") for line in done.stdout.splitlines()), name
    assert {"device", "torch", "triton", "cuda", "driver", "python", "commit", "date"} <= report["environment"].keys()

    # pytest-benchmark's own figures are the same samples.
    medians = [benchmark["stats"]["median"] for benchmark in json.loads((tmp_path / "plugin.json").read_text())["benchmarks"]]
    assert medians == pytest.approx([case["variants"][results.OURS]["median"] for case in report["cases"]], rel=1e-6)
    assert compare.main([str(path), str(path)]) == 0


def test_a_session_that_is_killed_leaves_what_it_measured(tmp_path: Path) -> None:
    (tmp_path / "bench_dies.py").write_text(
        "import os\n"
        "import torch\n"
        "def test_one(bench):\n"
        "    x = torch.randn(100)\n"
        "    bench('exponential', 'N=100', lambda: x.exp(), traffic=800.0)\n"
        "def test_two(bench):\n"
        "    os._exit(9)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"OUT": str(tmp_path), "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}"}
    command = [sys.executable, "-m", "pytest", str(tmp_path / "bench_dies.py"), "-p", "benchmarks.conftest", "--benchmark-only"]
    options = ["--seconds", "0.005", "--compiled", "never", "--results", "part", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 9, done.stdout + done.stderr
    report = json.loads((tmp_path / "part.json").read_text())
    assert [case["operator"] for case in report["cases"]] == ["exponential"] and report["ceilings"]["matmul"] > 0
    assert any("N=100" in line for line in results.table(report)), "and what is left is a whole report"


def test_every_kernel_is_launched(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    from benchmarks import every_kernel

    assert every_kernel.main([]) == 0, capsys.readouterr().err


class Fake(Timer):
    """A device whose time is what the calls add to it; the second of two samples in a row takes longer."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.order: list[str] = []

    def call(self, name: str) -> Call:
        return lambda: self.order.append(name)

    def host_time(self, call: Call) -> float:
        return 0.0

    def sample(self, call: Call, host: float = 0.0) -> float:
        call()
        return {"fast": 1.0, "slow": 10.0}[self.order[-1]]


def test_compared_calls_take_turns() -> None:
    timer = Fake()
    comparison = Comparison(timer, {"fast": timer.call("fast"), "slow": timer.call("slow")}, seconds=20.0)
    timer.order.clear()
    for _ in range(comparison.rounds):
        comparison.round()
    timings = comparison.timings()
    assert (timings["fast"].rounds, timings["slow"].rounds) == (20, 5), "as many as fit into the time, but at least five"
    assert timer.order[:8] == ["fast", "slow", "slow", "fast"] * 2, "the order rotates"
    assert (timings["fast"].median, timings["slow"].median) == (1.0, 10.0)
