"""Files of results: where they go, what they say of the machine, and how they are printed.

A file is {"environment": ..., "ceilings": ..., "cases": [...]}; times are in seconds, the names of a case's fields are those of `case_name`
and `measure.Bench`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent
OURS = "arcopo"
"""The name of our own variant among a case's variants."""

Case = Mapping[str, Any]
_DESCRIBE = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")  # the commit's hash, and whether the tree is clean


def device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return "CPU"
    return torch.cuda.get_device_name(device)


def folder(device: torch.device) -> Path:
    """Return the directory of results, and create it: $OUT when it is set, else benchmarks/results/<device>/."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "results" / slug
    path.mkdir(parents=True, exist_ok=True)
    return path


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, commit and date of a run. The commit is $ARCOPO_COMMIT, else git's, else "unknown"."""
    gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)) if gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] if gpu else "",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": os.environ.get("ARCOPO_COMMIT") or _output("git", "-C", str(ROOT), *_DESCRIBE) or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON through a temporary file: a reader finds a whole file or none."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def case_name(case: Case) -> str:
    return f"{case['operator']} {case['mode']} {case['case']}"


def table(report: Mapping[str, Any]) -> list[str]:
    """Lines for a person. A ratio is the other's time over ours: above 1, ours is faster."""
    ceilings, cases = report["ceilings"], report["cases"]
    width = max(len(f"  {case['mode']} {case['case']}") for case in cases)
    lines = [
        f"{report['environment']['device']}: a copy moves {_large(ceilings['bandwidth'])}B/s, a matrix product does "
        f"{_large(ceilings['matmul'])}FLOP/s (measured in this run)",
        f"{'':{width}s} {'time':>10s} {'spread':>7s} {'work':>12s} {'of ceiling':>10s} {'reference':>10s} {'compiled':>9s}  best other",
    ]
    notes: dict[str, int] = {}
    operator = None
    for case in cases:
        if case["operator"] != operator:
            operator = case["operator"]
            lines.append(operator)
        name = f"  {case['mode']} {case['case']}"
        if "failed" in case:
            lines.append(f"{name:{width}s} {'failed':>10s}  {case['failed']}")
            continue
        ours, ratios = case["variants"][OURS], case["ratios"]
        work = f"{_large(case['flops'])}FLOP" if case["limit"] == "matmul" else f"{_large(case['bytes'])}B"
        reference, compiled = ("-" if ratios[name] is None else f"{ratios[name]:.2f}x" for name in ("reference", "compiled"))
        best = f"{ratios['best']:.2f}x {case['best']}" if case["best"] else "-"
        lines.append(
            f"{name:{width}s} {duration(ours['median']):>10s} {(ours['q3'] - ours['q1']) / ours['median']:7.1%} {work:>12s} "
            f"{case['of_ceiling']:10.1%} {reference:>10s} {compiled:>9s}  {best}"
        )
        for variant, figures in case["variants"].items():
            if variant in case["alternatives"] and "median" in figures:
                lines.append(f"{'    ' + variant:{width}s} {duration(figures['median']):>10s}")
            if "skipped" in figures:
                note = f"not measured: {operator}, {variant}: {figures['skipped']}"
                notes[note] = notes.get(note, 0) + 1
    return lines + [note + (f" ({count} cases)" if count > 1 else "") for note, count in notes.items()]


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds / 1e-6:.1f} us"


def _large(number: float) -> str:
    """Three digits or more and a prefix, ready for a unit."""
    prefix, size = next(((prefix, size) for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if number >= size), ("k", 1e3))
    return f"{number / size:.{2 if number < 10 * size else 1 if number < 100 * size else 0}f} {prefix}"


def _output(*command: str) -> str:
    """The output of a command; empty if it is not there or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
