"""`make gpu` runs where little is installed: none of its steps may come to need what its environment need not have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks import gpu_steps

ROOT = Path(__file__).parents[2]
ABSENT = {"av", "diffusers", "flash_attn", "ftfy", "hypothesis", "nvtx", "tensorboard", "tqdm", "xdist", "yaml"}
"""Of what the project or its tests depend on, what the Makefile does not ask of that environment."""
OF_TRAINING = {"peft", "pydantic", "safetensors", "transformers"}
"""What the full-size iteration needs, and the kernels' steps do not."""
BLOCK = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def run(code: str, absent: set[str] = ABSENT) -> str:
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # of plugins that are here
    code = f"ABSENT = {absent!r}{BLOCK}{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_benchmarks() -> None:
    """transformers, which the full-size iteration asks for, requires tqdm and PyYAML."""
    names = ("gpu", "look", "full_size", "bench_iteration", "every_kernel", "sweep")
    run(f"import {', '.join(f'benchmarks.{name}' for name in names)}", ABSENT - {"tqdm", "yaml"})


def test_the_gpu_tests() -> None:
    """The files that the step runs can be imported."""
    kernels = [path for path in sorted((ROOT / "tests/kernels").glob("test_*.py")) if path.name not in gpu_steps.KERNEL_TESTS_ON_A_CPU]
    paths = [*(str(path.relative_to(ROOT)) for path in kernels), *gpu_steps.ENGINE_TESTS]
    assert len(paths) > 10
    collect = f"import pytest; sys.exit(pytest.main([*{paths!r}, '--collect-only', '-q', '-m', 'gpu', '-p', 'no:cacheprovider']))"
    run(collect, ABSENT - {"tqdm", "yaml"})  # transformers, whose CLIP one of the files tests, requires these two


TRAINING = ("bench_iteration", "bench_layers", "bench_scaling", "bench_vae")
"""Benchmarks of more than the kernels."""


def test_the_kernels_steps_need_no_more_than_kernels_do() -> None:
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py") if path.stem not in TRAINING)
    imports = ", ".join(f"benchmarks.{name}" for name in ["gpu", "gpu_steps", "look", "every_kernel", "sweep", *names])
    said = f"""
import {imports}
print([(part["status"], part["output"]) for part, _ in benchmarks.gpu_steps.iteration(0.0, benchmarks.gpu_steps.Chosen())])
"""
    assert "not available" in run(said, ABSENT | OF_TRAINING)
    # Layers need peft and what settings are made of; without them they are skipped, which pytest calls status 5.
    code = "import pytest; print(int(pytest.main(['benchmarks/bench_layers.py', '-q', '-p', 'no:cacheprovider'])))"
    assert run(code, ABSENT | OF_TRAINING).split()[-1] == "5"
