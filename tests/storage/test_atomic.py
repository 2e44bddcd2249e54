"""Files and directories are whole or not there, whatever fails and whoever is killed at any moment."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.folders import everything, tree

from arcopo_fast.storage import atomic as files
from arcopo_fast.storage.atomic import atomic_directory, atomic_path, atomic_write, settle

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


def test_a_file_is_replaced_whole_and_can_be_read_by_others(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    for content in (random.randbytes(1000), random.randbytes(10), "Ä text"):
        atomic_write(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert everything(tmp_path).keys() == {"file.bin"}


def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.mp4"
    old = random.randbytes(100)
    atomic_write(path, old)
    with pytest.raises(RuntimeError), atomic_path(path) as partial:
        assert partial.suffix == ".mp4" and partial.parent == tmp_path
        partial.write_bytes(random.randbytes(50))
        raise RuntimeError
    assert everything(tmp_path) == {"file.mp4": old}


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, full_disk: None) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        atomic_write(tmp_path / "file", "new")
    with pytest.raises(OSError, match="No space left"):
        atomic_write(tmp_path / "other", "new")
    assert everything(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("free", [0, 1 << 30])
def test_a_library_that_hides_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    class Disk:
        f_bavail, f_frsize = free // 4096, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Disk)
    for partial_at in (atomic_path, atomic_directory):
        with pytest.raises(RuntimeError if free else OSError) as error, partial_at(tmp_path / "x.pt"):
            raise RuntimeError("unexpected pos 576 vs 534")
        assert free or (error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path))  # type: ignore[attr-defined]
    assert everything(tmp_path) == {}


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "step-1"
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as partial:
        (partial / "half").write_bytes(b"x")
        raise KeyboardInterrupt
    assert everything(tmp_path) == {"sub": None}
    with atomic_directory(target) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_bytes(b"1")
        assert not target.exists()
    first = everything(tmp_path)
    assert first == {"sub": None, "sub/step-1": None, "sub/step-1/inner": None, "sub/step-1/inner/a": b"1"}
    with pytest.raises(RuntimeError), atomic_directory(target) as partial:
        (partial / "b").write_bytes(b"2")
        raise RuntimeError
    assert everything(tmp_path) == first
    with atomic_directory(target) as partial:
        (partial / "b").write_bytes(b"2")
    assert everything(tmp_path) == {"sub": None, "sub/step-1": None, "sub/step-1/b": b"2"}


def test_a_failing_exchange_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    before, rename, calls = everything(tmp_path), os.rename, []

    def second_fails(source: Path, goal: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, goal)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"), atomic_directory(target) as partial:
        (partial / "new").write_bytes(b"new")
    assert len(calls) == 3 and everything(tmp_path) == before
