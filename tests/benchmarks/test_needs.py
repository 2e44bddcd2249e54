"""`make gpu` runs where little is installed: none of its steps may come to need what its environment need not have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = {"av", "diffusers", "flash_attn", "ftfy", "hypothesis", "nvtx", "tensorboard", "tqdm", "xdist", "yaml"}
"""Of what the project or its tests depend on, what the Makefile does not ask of that environment."""
OF_TRAINING = {"peft", "pydantic", "safetensors", "transformers"}
"""What the full-size iteration needs, and the kernels' steps do not."""
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def run(code: str, absent: set[str] = ABSENT) -> str:
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # of plugins that are here
    code = f"ABSENT = {absent!r}{BLOCK}{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_benchmarks() -> None:
    run("import benchmarks.gpu, benchmarks.full_size, benchmarks.bench_iteration, benchmarks.every_kernel, benchmarks.sweep")


def test_the_gpu_tests() -> None:
    """Those of the kernels and the engine can be imported; the property test of the pages, which needs hypothesis, has none."""
    kernels = [path for path in sorted((ROOT / "tests/kernels").glob("test_*.py")) if "hypothesis" not in path.read_text()]
    paths = [str(path.relative_to(ROOT)) for path in [*kernels, ROOT / "tests/rollout/test_gpu_engine.py"]]
    assert len(paths) > 8
    run(f"import pytest; sys.exit(pytest.main([*{paths!r}, '--collect-only', '-q', '-m', 'gpu', '-p', 'no:cacheprovider']))")


def test_the_kernels_steps_need_no_more_than_kernels_do() -> None:
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py") if path.stem not in ("bench_iteration", "bench_layers"))
    imports = ", ".join(f"benchmarks.{name}" for name in ["gpu", "every_kernel", "sweep", *names])
    said = f"""
import {imports}
print([(part["status"], part["output"]) for part, _ in benchmarks.gpu.iteration(0.0, benchmarks.gpu.Chosen())])
"""
    assert "not available" in run(said, ABSENT | OF_TRAINING)
    # Layers need peft and what settings are made of; without them they are skipped, which pytest calls status 5.
    code = "import pytest; print(int(pytest.main(['benchmarks/bench_layers.py', '-q', '-p', 'no:cacheprovider'])))"
    assert run(code, ABSENT | OF_TRAINING).split()[-1] == "5"
