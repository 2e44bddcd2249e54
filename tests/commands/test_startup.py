"""A command line is read, and its mistakes are told, before libraries are imported that take longer than PyTorch itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import arcopo_fast

SLOW = {"torch._dynamo", "peft", "diffusers", "transformers", "accelerate", "tensorboard", "scipy"}
COMMANDS = {path.stem for path in Path(arcopo_fast.__file__).parent.glob("*.py") if "\nif __name__ ==" in path.read_text()}
BEGINNINGS = {
    "every command": [(f"arcopo_fast.{name}", ["--help"]) for name in sorted(COMMANDS)],
    "a recipe": [("arcopo_fast.train", ["--print-config"]), ("arcopo_fast.train", ["objective.kind=sde_grpo", "sampler.stepz=3"])]
    + [("arcopo_fast.doctor", ["toy"])],
    "rewards": [("arcopo_fast.rewards.__main__", ["list"])],
}
PROBE = """
import contextlib, importlib, io, json, sys
from arcopo_fast.cli import run_command

with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
    statuses = [run_command(importlib.import_module(command).main, arguments) for command, arguments in json.loads(sys.argv[1])]
print(json.dumps({"statuses": statuses, "output": output.getvalue(), "imported": list(sys.modules)}))
"""


def imported_by(beginnings: list[tuple[str, list[str]]]) -> set[str]:
    """Modules that a fresh process has imported after these commands."""
    done = subprocess.run([sys.executable, "-c", PROBE, json.dumps(beginnings)], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    expected = [2 if "sampler.stepz=3" in arguments else 0 for _, arguments in beginnings]
    assert found["statuses"] == expected and found["output"], found["output"]
    return set(found["imported"])


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_nothing_slow_is_imported(kind: str) -> None:
    assert {"train", "generate", "evaluate", "report"} <= COMMANDS
    imported = imported_by(BEGINNINGS[kind])
    assert "torch" in imported and not imported & SLOW


def test_a_report_needs_no_torch() -> None:
    assert "torch" not in imported_by([("arcopo_fast.report", ["--help"])])
