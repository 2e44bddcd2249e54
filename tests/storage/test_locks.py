"""Owners of directories, and locks that end with their process."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest
from support.folders import tree

from arcopo_fast.errors import UserError
from arcopo_fast.storage.atomic import atomic_directory, settle
from arcopo_fast.storage.locks import LOCK, Owner, lock, owned


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
    assert f"the file system of {tmp_path / 'run'} has no locks: make sure yourself" in capsys.readouterr().err
    (tmp_path / "run" / ".step-1.abcdefgh").mkdir()
    settle(tmp_path / "run", "step-1")
    assert (tmp_path / "run" / ".step-1.abcdefgh").exists(), "its maker may live"
    settle(tmp_path / "run", "step-1", owned=True)
    assert not (tmp_path / "run" / ".step-1.abcdefgh").exists()
    with pytest.raises(UserError, match="has no locks .*; put the buffer on another"), lock(tmp_path / "lock", "buffer", wait=True):
        pass
