"""Writers that are killed at any moment, and locks that end with their process."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from arcopo_fast.errors import UserError
from arcopo_fast.storage import atomic as files
from arcopo_fast.storage.atomic import atomic_directory, settle
from arcopo_fast.storage.locks import LOCK, Owner, lock, owned

# Replaces a directory and a file, and dies in the n-th call to the file system that could be the last.
KILLED = """
import os, signal, shutil, sys
from pathlib import Path
from arcopo_fast.storage import atomic as files
folder, dies, calls = Path(sys.argv[1]), int(sys.argv[2]), 0

def counted(function):
    def wrapped(*arguments, **keywords):
        global calls
        calls += 1
        if calls == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return wrapped

for name in ("open", "close", "fsync", "rename", "replace", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
with files.atomic_directory(folder / "step-1") as made:
    (made / "a").write_text("new")
    (made / "b").write_text("new")
files.atomic_write(folder / "file.json", "new")
files.remove_directory(folder / "step-1")
"""


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("is_owned", [True, False])
def test_a_writer_that_is_killed_anywhere_leaves_the_old_or_the_new(tmp_path: Path, is_owned: bool) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    old = {"step-1/a": "old", "step-1/c": "old", "file.json": "old"}
    new = {"step-1/a": "new", "step-1/b": "new"}
    stages, died = [old, new | {"file.json": "old"}, new | {"file.json": "new"}, {"file.json": "new"}], 0
    seen = set()
    for dies in range(1, 200, 2 if is_owned else 5):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        (tmp_path / "x" / "step-1").mkdir(parents=True)
        for name, text in old.items():
            (tmp_path / "x" / name).write_text(text)
        done = subprocess.run(
            [sys.executable, "-S", "-c", KILLED, tmp_path / "x", str(dies)], env=environment, capture_output=True, text=True
        )
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        died += 1
        settle(tmp_path / "x", r"step-\d+|file", owned=is_owned)
        found = tree(tmp_path / "x")
        if not is_owned:  # a file is left alone, for its writer may be alive
            found = {name: text for name, text in found.items() if not name.startswith(".file")}
        assert found in stages, dies
        seen.add(stages.index(found))
    assert died > 5 and {0, 1} < seen


def test_what_a_living_process_makes_is_left_alone(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a") as made:
        (made / "x").write_text("half")
        settle(tmp_path, "a")
        assert (made / "x").exists()
    (tmp_path / "a" / "old").write_text("old")
    descriptor = files._open_in_use(tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / ".a.01234567.old")
    settle(tmp_path, "a")
    assert not (tmp_path / "a").exists(), "a living process replaces it at this moment"
    os.close(descriptor)
    settle(tmp_path, "a")
    assert tree(tmp_path) == {"a/x": "half", "a/old": "old"}


@pytest.mark.parametrize("name", ["notes", ".a", ".a.123", ".a.ABCDEFGH", ".a.abcdefgh.b.c", ".b.abcdefgh", "a.abcdefgh", ".a.abcdefghi"])
def test_only_what_a_writer_left_is_removed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    (tmp_path / ".a.0123abcd").symlink_to(outside)
    settle(tmp_path, "a", owned=True)
    assert tree(tmp_path)[name] == "mine" and (outside / "file").exists()


def test_an_owner_keeps_others_out_and_leaves_nothing(tmp_path: Path) -> None:
    first = Owner(tmp_path)
    with pytest.raises(UserError, match=rf"^{tmp_path} is in use by process {os.getpid()} on {os.uname().nodename}; wait"):
        Owner(tmp_path)
    first.release()
    first.release()
    assert not list(tmp_path.iterdir())
    (tmp_path / LOCK).write_text("process 1 on another machine, which died")
    with Owner(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"


def test_ownership_goes_along_with_a_directory_that_is_renamed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    owner = Owner(tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="b is in use"):
        Owner(tmp_path / "b")
    owner.directory = tmp_path / "b"
    owner.release()
    assert not list((tmp_path / "b").iterdir())


def test_there_is_one_owner_at_any_moment(tmp_path: Path) -> None:
    """Also while the file of the lock is removed by one and opened by the next."""
    inside, most, taken = [0], [0], [0]

    def work() -> None:
        for _ in range(150):
            try:
                with Owner(tmp_path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    taken[0] += 1
                    inside[0] -= 1
            except UserError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and taken[0] >= 20 and not list(tmp_path.iterdir())


def test_an_owned_directory_that_stays_empty_goes_away(tmp_path: Path) -> None:
    with owned(tmp_path / "a" / "b"):
        pass
    with pytest.raises(RuntimeError), owned(tmp_path / "a" / "b"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with owned(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("x")
    assert tree(tmp_path) == {"a/b/file": "x"}


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with owned(tmp_path / "run"), atomic_directory(tmp_path / "run" / "step-1") as made:
        (made / "x").write_text("x")
    assert tree(tmp_path) == {"run/step-1/x": "x"}
    assert f"the file system of {tmp_path / 'run'} has no locks: see to it yourself" in capsys.readouterr().err
    (tmp_path / "run" / ".step-1.abcdefgh").mkdir()
    settle(tmp_path / "run", "step-1")
    assert (tmp_path / "run" / ".step-1.abcdefgh").exists(), "its maker may live"
    settle(tmp_path / "run", "step-1", owned=True)
    assert not (tmp_path / "run" / ".step-1.abcdefgh").exists()
    with pytest.raises(UserError, match="has no locks .*; put the buffer on another"), lock(tmp_path / "lock", "buffer", wait=True):
        pass
