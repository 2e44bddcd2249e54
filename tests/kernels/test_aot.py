"""All kernels compile ahead of time for the GPUs of every family and of AMD, as they are launched there, and on NVIDIA's none spills.

The plain tests take one target of each family, as compiling for one takes a quarter of a minute; `pytest -m slow` takes the others, and
`python -m arcopo_kernels.aot` all.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from inspect import getsource
from typing import Any

import pytest
import torch
from arcopo_kernels import aot, dispatch

pytestmark = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="triton is not installed")

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
        assert needs["shared"] <= aot.SHARED["sm_86" if target == "sm_80" else target] * 1024, f"{kernel}: its family has less than sm_80"
        assert not needs["spilled"] or not target.startswith("sm_"), kernel
        if target.startswith("sm_"):
            assert needs["wide_loads"] and (needs["wide_stores"] or "partials" in kernel), kernel
            half = kernel.startswith("attention.") and kernel.endswith("bf16]") and "merge" not in kernel
            assert bool(needs["tensor_cores"]) == (half or kernel.startswith("lora_linear.")), kernel


def test_the_gate_says_what_is_wrong_with_machine_code() -> None:
    plain, product, sum_ = (aot.AotCase("a", None, {}, {}, **more) for more in ({}, {"multiplies": True}, {"reduces": True}))
    good = aot.Resources(64, 0, 99 * 1024, wide_loads=4, wide_stores=2, tensor_cores=8)
    assert all(good.faults(case, "sm_86") == [] for case in (plain, product, sum_))
    (spill,) = good._replace(spilled=8).faults(plain, "sm_89")
    assert "8 bytes" in spill and good._replace(spilled=8).faults(plain, "gfx942") == [
        "takes 101376 bytes of shared memory; a block of gfx942 can have 64 KiB"
    ]
    assert good._replace(shared=99 * 1024 + 1).faults(plain, "sm_90") == []
    large = "takes 101377 bytes of shared memory; a block of sm_120 can have 99 KiB"
    assert good._replace(shared=99 * 1024 + 1).faults(plain, "sm_120") == [large]
    assert good._replace(wide_loads=0).faults(plain, "sm_90") == ["loads nothing in 16 bytes"]
    narrow = good._replace(wide_stores=0, tensor_cores=0)
    assert narrow.faults(plain, "sm_90") == ["stores nothing in 16 bytes"] and narrow.faults(sum_, "sm_90") == []
    assert "multiplies without tensor cores" in narrow.faults(product, "sm_90")
    assert aot.Resources(64, 0, 1024).faults(product, "gfx942") == [], "AMD's machine code is not read"


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        (aot.LOADS, ["LDG.E.128 R4,", "LDGSTS.E.BYPASS.128 [R1],", "LDG.E.ENL2.256 R4,", "UTMALDG.2D [UR4],"], ["LDG.E.64 R4,", "LDS.128"]),
        (aot.STORES, ["STG.E.128 [R4],", "STG.E.ENL2.256 desc", "UTMASTG.2D [UR4]"], ["STG.E [R4],", "STS.128 [R4],"]),
        (aot.TENSOR_CORES, ["HMMA.16816.F32.BF16 R4,", "HGMMA.64x64x16.F32 R4,", "UTCHMMA.2CTA gdesc", "UTCHMMA gdesc"], ["FFMA R4,"]),
    ],
)
def test_what_the_gate_counts(pattern: str, matches: list[str], others: list[str]) -> None:
    assert all(re.search(pattern, f"        /*0a10*/  {line}") for line in matches)
    assert not any(re.search(pattern, f"        /*0a10*/  {line}") for line in others)


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
