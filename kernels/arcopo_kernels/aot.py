"""Compile every kernel ahead of time, without a GPU, and print what it needs of one.

    python -m arcopo_kernels.aot [--target sm_90 ...] [--json]

Exit status 1 if a kernel spills registers on an NVIDIA target. Each `triton.py` lists its kernels with realistic arguments in `aot_cases`,
launched as its launchers launch them on a target.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from arcopo_kernels.dispatch import FP_FUSION

OPERATORS = ("surrogate", "attention", "paging", "qk_norm_rope", "modulation", "norm_silu", "nft", "lora_linear")
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
"""A100; RTX 3090 and A6000; RTX 4090 and L40S; H100 and H200; B200; RTX 5090 and PRO 6000; MI300."""


class AotCase(NamedTuple):
    """One kernel with the types of its arguments.

    Attributes:
        name: what the report calls it.
        kernel: a Triton function.
        signature: argument -> Triton type ("*fp32", "*bf16", "*i64", "i32", "fp32"), without the constants.
        constants: tl.constexpr arguments, and arguments that are None or 1.
        divisible: arguments that are multiples of 16, as Triton finds them to be at run time: pointers and sizes. Without them loads are
            scalar
            and the figures mean nothing.
        num_warps, num_stages: of the launch; num_stages None: the launcher states none, and Triton has a default for each kind of GPU.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int | None = None


class Resources(NamedTuple):
    """The needs of a compiled kernel.

    Attributes:
        registers: of a thread.
        spilled: bytes of register spills of a thread.
        shared: bytes of shared memory of a block.
    """

    registers: int
    spilled: int
    shared: int


def compile_case(case: AotCase, target: str) -> Resources:
    """Compile one kernel for "sm_NN" or "gfxNNN".

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where kernels are Python functions and cannot be compiled.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1; unset it before the first import of triton")
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    names = case.kernel.arg_names
    # Triton wants every argument in its signature, the constants under the type "constexpr".
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    missing = [name for name in names if name not in case.signature and name not in case.constants]
    if missing:
        raise ValueError(f"{case.name}: neither signature nor constants name {', '.join(missing)}")
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options: dict[str, Any] = {"num_warps": case.num_warps, "enable_fp_fusion": FP_FUSION}
    if case.num_stages is not None:
        options["num_stages"] = case.num_stages
    compiled = triton.compile(source, target=gpu, options=options)
    if nvidia:
        registers, spilled = _nvidia_resources(compiled.asm["cubin"])
        return Resources(registers, spilled, compiled.metadata.shared)
    listing = compiled.asm["amdgcn"]

    def figure(name: str) -> int:
        return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", listing))

    return Resources(figure("vgpr_count"), 4 * figure("vgpr_spill_count"), compiled.metadata.shared)


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and spilled bytes; Triton's shared memory is dynamic, so that the cubin does not know it."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def cases(target: str, operators: Sequence[str] = OPERATORS) -> list[AotCase]:
    """Return the kernels of `operators` as they are launched on "sm_NN" or "gfxNNN"."""
    found: list[AotCase] = []
    for operator in operators:
        try:
            module = import_module(f"arcopo_kernels.{operator}.triton")
        except ModuleNotFoundError as error:
            if error.name != f"arcopo_kernels.{operator}.triton":
                raise
            continue
        found += [case._replace(name=f"{operator}.{case.name}") for case in module.aot_cases(target)]
    return found


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m arcopo_kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", nargs="+", default=TARGETS, help="sm_NN or gfxNNN (default: %(default)s)")
    parser.add_argument("--operator", nargs="+", default=OPERATORS, choices=OPERATORS)
    parser.add_argument("--json", action="store_true", help="print one JSON object, kernel -> target -> figures")
    arguments = parser.parse_args(argv)
    table: dict[str, dict[str, dict[str, int]]] = {}
    spilling: list[str] = []
    for target in arguments.target:
        for case in cases(target, arguments.operator):
            resources = compile_case(case, target)
            table.setdefault(case.name, {})[target] = resources._asdict()
            if resources.spilled and target.startswith("sm_"):
                spilling.append(f"{case.name} on {target} ({resources.spilled} bytes)")
            if not arguments.json:
                figures = f"{resources.registers:4d} registers {resources.shared:7d} bytes shared {resources.spilled:5d} bytes spilled"
                print(f"{case.name:44s} {target:8s} {figures}", flush=True)
    if arguments.json:
        print(json.dumps(table, indent=2))
    if spilling:
        print("register spills: " + ", ".join(spilling), file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
