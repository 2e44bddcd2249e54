"""All kernels compile ahead of time for the GPUs of every family and of AMD, as they are launched there, and on NVIDIA's none spills.

The plain tests take one target of each family, as compiling for one takes a quarter of a minute; `pytest -m slow` takes the others, and
`python -m arcopo_kernels.aot` all.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from inspect import getsource
from typing import Any

import pytest
import torch
from arcopo_kernels import aot, dispatch

pytestmark = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="triton is not installed")

SHARED = {"sm_80": 99, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
"""KiB that a block can have; for sm_80 the least of its family, which sm_86 and sm_89 have."""
OF_EACH_VENDOR = ("sm_90", "gfx942")
TARGETS = [pytest.param(target, marks=[] if target in OF_EACH_VENDOR else pytest.mark.slow) for target in aot.TARGETS]  # 25 s each


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # in a process of its own: here kernels may be interpreted
    command = [sys.executable, "-m", "arcopo_kernels.aot", "--json", "--target", target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {kernel: figures[target] for kernel, figures in json.loads(done.stdout).items()}
    assert compiled.keys() == {case.name for case in aot.cases(target)}
    for kernel, needs in compiled.items():
        print(f"{kernel:44s} {needs}")
        assert 0 < needs["registers"] <= (255 if target.startswith("sm_") else 512), kernel
        assert needs["shared"] <= SHARED[target] * 1024, kernel
        assert not needs["spilled"] or not target.startswith("sm_"), kernel


class Recorder:
    """Stands for a kernel, and keeps the keywords of its launches, `kernel[grid](...)`."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: object) -> Any:
        return lambda *args, **keywords: self.launches.append(keywords)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "bf16"), (128, "bf16"), (64, "fp32"), (128, "fp32")])
def test_attention_is_launched_as_it_is_compiled(target: str, head_dim: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("arcopo_kernels.attention.triton")
    cases = {case.name: case for case in aot.cases(target, ["attention"])}
    monkeypatch.setattr(module, "target_of", lambda x: target)
    recorders = {kernel: Recorder() for kernel in ("forward", "grad_query", "grad_key_value")}
    for kernel, recorder in recorders.items():
        monkeypatch.setattr(module, f"_{kernel}", recorder)
    query = torch.zeros(1, 3, 2, head_dim, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    out, lse = module.forward(query, query, query, 1.0)
    module.backward(out, query, query, query, out, lse, 1.0, trained=True)
    for kernel, recorder in recorders.items():
        case = cases[f"attention.{kernel}[{head_dim}, {dtype}]"]
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": dispatch.FP_FUSION}
        assert recorder.launches == [{**case.constants, **options}], kernel


def launches(tree: ast.Module) -> list[ast.Call]:
    """Every `kernel[grid](...)` of a module: calls of what brackets give."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]


@pytest.mark.parametrize("operator", aot.OPERATORS)
def test_every_launch_states_the_fusion(operator: str) -> None:
    """Triton's default depends on the release, so that a launch that says nothing would be another kernel under another Triton."""
    found = launches(ast.parse(getsource(import_module(f"arcopo_kernels.{operator}.triton"))))
    kernels = {case.kernel.__name__ for case in aot.cases("sm_90", [operator])}
    assert {ast.unparse(call.func.value) for call in found if isinstance(call.func, ast.Subscript)} == kernels
    for call in found:
        stated = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert stated.get("enable_fp_fusion") == "FP_FUSION", ast.unparse(call.func)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_compilation_states_the_fusion(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.amd.compiler import HIPOptions
    from triton.backends.nvidia.compiler import CUDAOptions

    class Compiled(Exception):
        pass

    def compile_instead(source: object, *, target: object, options: dict[str, Any]) -> None:
        raise Compiled(options)

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("triton.compile", compile_instead)
    options = HIPOptions if target == "gfx942" else CUDAOptions
    for case in aot.cases(target):
        with pytest.raises(Compiled) as compiled:
            aot.compile_case(case, target)
        (given,) = compiled.value.args
        assert given["enable_fp_fusion"] is dispatch.FP_FUSION
        assert given.keys() <= options.__dataclass_fields__.keys()  # Triton passes over what it does not know
