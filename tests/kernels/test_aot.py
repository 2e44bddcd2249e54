"""All kernels compile ahead of time for the GPUs of three generations and of AMD, and on NVIDIA's none spills a register."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from arcopo_kernels import aot, dispatch

SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""KiB that a block can have; of sm_80's family the least, which sm_86 and sm_89 have."""


@pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_kernel_compiles(target: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # in a process of its own: here kernels may be interpreted
    command = [sys.executable, "-m", "arcopo_kernels.aot", "--json", "--target", target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {kernel: figures[target] for kernel, figures in json.loads(done.stdout).items()}
    assert compiled.keys() == {case.name for case in aot.cases()}
    for kernel, needs in compiled.items():
        print(f"{kernel:44s} {needs}")
        assert 0 < needs["registers"] <= (255 if target.startswith("sm_") else 512), kernel
        assert needs["shared"] <= SHARED[target] * 1024, kernel
        assert not needs["spilled"] or not target.startswith("sm_"), kernel
