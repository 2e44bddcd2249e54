"""Importing arcopo_kernels brings in torch, triton and the standard library, and does without triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from arcopo_kernels import dispatch

KERNELS = Path(__file__).parents[2] / "kernels"

# Every import that the package's own modules ask for is recorded. What is in sys.modules afterwards would say less: torch fetches parts of
# itself, sympy with them, when one of its decorators is first used, and has loaded numpy, which the package must not need, before.
PROBE = """
import builtins, json, pkgutil, sys

if "triton" in left_out:
    sys.modules["triton"] = None  # every import of it fails
asked, ask = set(), builtins.__import__

def record(name, globals=None, locals=None, fromlist=(), level=0):
    if not level and ((globals or {}).get("__name__") or "").startswith("arcopo_kernels"):
        asked.add(name.partition(".")[0])
    return ask(name, globals, locals, fromlist, level)

builtins.__import__ = record
import arcopo_kernels
for module in pkgutil.walk_packages(arcopo_kernels.__path__, "arcopo_kernels."):
    if module.name.rpartition(".")[2] not in left_out:
        __import__(module.name)
found = {"asked for": sorted(asked - sys.stdlib_module_names), "modules": [x for x in sys.modules if x.startswith("arcopo")]}
exec("import pytest", {"__name__": "arcopo_kernels.planted"})
found["the plant"] = "pytest" in asked
import torch
normed = arcopo_kernels.rms_norm(torch.randn(2, 8), torch.randn(8))
print(json.dumps({**found, "finite": bool(normed.isfinite().all()), "reason": arcopo_kernels.used("rms_norm").reason}))
"""


def probe(*left_out: str) -> dict[str, Any]:
    """Import every module of the package but those of a name `left_out`, in a fresh process."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "ARCOPO_KERNELS")}
    paths = os.pathsep.join([str(KERNELS), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-c", f"left_out = {left_out!r}\n{PROBE}"]
    done = subprocess.run(command, env={**environment, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["the plant"], "an import of a third party would not have been seen"
    return found


@pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="triton is not installed")
def test_torch_triton_and_the_standard_library() -> None:
    found = probe()
    assert {"arcopo_kernels.surrogate.op", "arcopo_kernels.attention.triton", "arcopo_kernels.aot"} <= set(found["modules"])
    assert found["asked for"] == ["arcopo_kernels", "torch", "triton"]


def test_without_triton() -> None:
    found = probe("triton")
    assert {"arcopo_kernels.surrogate.op", "arcopo_kernels.attention.op", "arcopo_kernels.paging.pool"} <= set(found["modules"])
    assert found["asked for"] == ["arcopo_kernels", "torch"]
    assert found["finite"] and found["reason"] == "triton is not installed"
