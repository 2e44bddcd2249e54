"""`make gpu` runs where little is installed: none of its steps may come to need what its environment need not have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = {"av", "diffusers", "flash_attn", "ftfy", "hypothesis", "nvtx", "tensorboard", "tqdm", "xdist", "yaml"}
"""Of what the project or its tests depend on, what the Makefile does not ask of that environment."""
BLOCK = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def run(code: str) -> None:
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # of plugins that are here
    done = subprocess.run([sys.executable, "-c", BLOCK + code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_benchmarks() -> None:
    run("import benchmarks.gpu, benchmarks.full_size, benchmarks.bench_iteration, benchmarks.every_kernel, benchmarks.sweep")


def test_the_gpu_tests() -> None:
    """Those of the kernels and the engine can be imported; the property test of the pages, which needs hypothesis, has none."""
    kernels = [path for path in sorted((ROOT / "tests/kernels").glob("test_*.py")) if "hypothesis" not in path.read_text()]
    paths = [str(path.relative_to(ROOT)) for path in [*kernels, ROOT / "tests/rollout/test_gpu_engine.py"]]
    assert len(paths) > 8
    run(f"import pytest; sys.exit(pytest.main([*{paths!r}, '--collect-only', '-q', '-m', 'gpu', '-p', 'no:cacheprovider']))")
