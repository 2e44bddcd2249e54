"""How a command ends: one line and a status."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import outcome

import arcopo_fast
from arcopo_fast import train
from arcopo_fast.cli import RecipeParser, machine_problem, run_command
from arcopo_fast.config.reading import load_config
from arcopo_fast.errors import UserError


def parse(*arguments: str) -> object:
    read = RecipeParser("python -m arcopo_fast.train", "Align a generator.").read_config(arguments)
    return read and read[0]


def test_recipe_and_overrides_in_any_order() -> None:
    assert parse() == load_config()
    assert parse("toy", "seed=3") == parse("seed=3", "toy") == load_config("toy", ["seed=3"])


def test_help_and_print_config(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    assert parse("nonsense", "--help") is None
    text = capsys.readouterr().out
    for part in ("usage: python -m arcopo_fast.train [recipe] [key.sub=value ...]", "Align a generator.", "rollout.group_size = 12"):
        assert part in text
    assert parse("seed=7", "--print-config") is None
    path = f"{tmp_path}/printed.yaml"
    with open(path, "w") as file:
        file.write(capsys.readouterr().out)
    assert load_config(path) == load_config(None, ["seed=7"])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["--seed", "3"], "unknown option --seed"), (["toy", "seed"], "one recipe at a time"), (["x=1"], "unknown key x")],
)
def test_bad_command_lines(arguments: list[str], part: str) -> None:
    with pytest.raises(UserError, match=part):
        parse(*arguments)


def ending(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def main(arguments: list[str]) -> None:
        assert arguments == ["a", "b"]
        raise error

    status = run_command(main, ["a", "b"])
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.endswith("\n")
    return status, err.strip()


def test_endings(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(UserError("what was\n given"), capsys) == (2, "error: what was given")
    assert ending(KeyboardInterrupt(), capsys)[0] == 130
    status, line = ending(OSError(errno.ENOSPC, "No space left on device", "runs/x"), capsys)
    assert status == 2 and line.startswith("error: the disk is full (runs/x)")
    assert ending(PermissionError(errno.EACCES, "Permission denied", "runs/x"), capsys)[0] == 2
    assert "read-only" in ending(OSError(errno.EROFS, "Read-only file system", "runs/x"), capsys)[1]
    # A library that keeps only the text of the error, and one that raises its own error on top of it.
    assert "the disk is full" in ending(RuntimeError("I/O error: No space left on device (os error 28)"), capsys)[1]
    wrapped = RuntimeError("writer failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert "the disk is full" in ending(wrapped, capsys)[1]
    assert run_command(lambda arguments: None, []) == 0
    assert run_command(lambda arguments: 3, []) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_interrupt_a_command(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    former = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]

    def main(arguments: list[str]) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError

    assert run_command(main, []) == 130
    assert capsys.readouterr().err == "interrupted; what was complete by then is kept, and the same command continues\n"
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == former


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_end_changes_nothing(number: int) -> None:
    """While Python ends it would kill the process, or print a traceback."""
    program = f"""
import atexit, os, sys
from arcopo_fast.cli import run_command
class Last:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, {int(number)})
sys.kept_to_the_end = Last()
atexit.register(lambda: os.kill(os.getpid(), {int(number)}))
sys.exit(run_command(lambda arguments: 3))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (3, "")


def test_what_is_not_the_users_doing_keeps_its_traceback() -> None:
    def main(arguments: list[str]) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")

    with pytest.raises(FileNotFoundError):
        run_command(main, [])
    looped = RuntimeError("a")
    looped.__context__ = ValueError("b")
    looped.__context__.__context__ = looped
    assert machine_problem(looped) is None


def test_a_reader_that_leaves_is_no_error() -> None:
    program = "import sys\nfrom arcopo_fast.cli import *\n"
    program += "sys.exit(run_command(lambda a: print(RecipeParser('x', 'y').format_help() * 50), []))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout and process.stderr
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_an_interrupt_in_code_that_a_library_runs_from_c_has_the_status_of_any(tmp_path: Path) -> None:
    """Python remembers such a KeyboardInterrupt, though it is caught, and would end by SIGINT when its module was run with -m."""
    (tmp_path / "interrupted_in_c.py").write_text(
        "import ctypes, sys\n"
        "from arcopo_fast.cli import run_command\n"
        "def main(arguments):\n"
        "    run = ctypes.pythonapi.PyRun_String\n"
        "    run.restype, run.argtypes = ctypes.py_object, [ctypes.c_char_p, ctypes.c_int, ctypes.py_object, ctypes.py_object]\n"
        "    print('begun')\n"
        "    run(b'raise KeyboardInterrupt', 257, {}, {})\n"
        "sys.exit(run_command(main))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    call = [sys.executable, "-m", "interrupted_in_c"]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode == 130 and done.stdout == "begun\n"
    assert done.stderr == "interrupted; what was complete by then is kept, and the same command continues\n"


def command_lines() -> dict[str, Any]:
    """Return the parser of every command, by the function that makes it."""
    found: dict[str, Any] = {}
    for path in sorted(Path(arcopo_fast.__file__).parent.rglob("*.py")):
        name = ".".join(("arcopo_fast", *path.relative_to(Path(arcopo_fast.__file__).parent).with_suffix("").parts))
        if "command_line() -> " in path.read_text(encoding="utf-8"):
            module = importlib.import_module(name)
            makers = [maker for maker in vars(module) if maker.endswith("command_line")]
            found |= {f"{name}.{maker}": getattr(module, maker)() for maker in makers}
    return found


def test_every_option_that_is_a_path_expands_a_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = command_lines()
    assert len(lines) >= 12
    seen = set()
    for name, parser in lines.items():
        for action in parser._actions:
            metavar = str(action.metavar)
            if not re.search(r"DIR|FILE|PATH|RUN|RESULTS", metavar) and action.type is not Path:
                continue
            value = parser._get_value(action, "~/a.html")
            assert str(getattr(value, "path", value)) == str(tmp_path / "a.html"), f"{name}: {action.option_strings or action.dest}"
            with pytest.raises(argparse.ArgumentTypeError, match="no home directory"):
                action.type("~nobody-of-that-name/x")
            seen.add((action.option_strings or [action.dest])[0])
    assert {"--out", "--buffer", "--adapter", "--lora", "--prompts", "--extended", "--resume", "--semi", "--on", "--info", "runs"} <= seen
    option = lines["arcopo_fast.evaluate.command_line"]._option_string_actions["--adapter"]
    assert option.type("mine=~/runs/on@0.5").path == str(tmp_path / "runs" / "on")


def test_the_buffer_of_an_option_is_a_text() -> None:
    parsed = train.command_line().read(["--buffer", "my # 1: {x}", "--mode", "semi_on_policy"])
    assert load_config("toy", train.settings_of(parsed)).train.buffer == "my # 1: {x}"


@pytest.mark.parametrize(
    "command",
    [
        "merge --semi A --on B --scale 1 --out C",
        "entropy",
        "report RUN",
        "evaluate merge A --out B",
        "vbench total A",
        "rewards.__main__ serve x",
    ]
    + ["vbench score --python P --videos V"],
)
def test_what_is_one_process_s_work_is_refused_on_several_ranks(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *arguments = command.split()
    for variable, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(variable, value)
    status, (line,), out = outcome(importlib.import_module(f"arcopo_fast.{name}").main, capsys, *arguments)
    assert status == 2 and not out and line.startswith("rank 1: error: python -m arcopo_fast.")
    assert line.endswith(" is one process's work; start it without torchrun"), line
