"""A run's directory: what has its final name is complete, whatever happened."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
from support.folders import everything

from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.storage import atomic as files
from arcopo_fast.storage.run_dir import RunDirectory


def config_in(folder: Path, *overrides: str) -> Config:
    return load_config("toy", [f"run.directory={folder}", "name=mine", *overrides])


def test_a_run_directory_holds_the_resolved_configuration(tmp_path: Path) -> None:
    config = config_in(tmp_path / "a" / "b", f"seed={random.randrange(1000)}")
    run = RunDirectory.create(config)
    assert run.path == tmp_path / "a" / "b" / "mine"
    assert load_config(str(run.path / "config.yaml")) == config
    assert (run.path / "samples").is_dir()
    assert run.write("adapter/README.md", "x").read_text() == "x"


def test_a_taken_name_gets_a_number_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [RunDirectory.create(config_in(tmp_path)).path.name for _ in range(3)]
    assert paths == ["mine", "mine-2", "mine-3"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "mine-2" in said[0] and "mine-3" in said[1]
    (tmp_path / "mine-4").write_text("a file in the way")
    (tmp_path / "mine-5").mkdir()  # an empty directory is free
    assert RunDirectory.create(config_in(tmp_path)).path.name == "mine-5"


def test_overwriting_replaces_a_run_and_nothing_else(tmp_path: Path) -> None:
    first = RunDirectory.create(config_in(tmp_path))
    first.write("metrics.jsonl", "old")
    with first.owned():
        pass
    again = RunDirectory.create(config_in(tmp_path, "run.overwrite=true"))
    assert again.path == first.path and not (again.path / "metrics.jsonl").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine"]
    (tmp_path / "mine" / "config.yaml").unlink()
    (tmp_path / "mine" / "diary.txt").write_text("precious")
    before = everything(tmp_path)
    with pytest.raises(UserError, match="not an earlier run"):
        RunDirectory.create(config_in(tmp_path, "run.overwrite=true"))
    assert everything(tmp_path) == before


def test_a_run_that_cannot_be_made_leaves_nothing(tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(UserError, match="cannot make the run directory .*mine: No space left on device; set run.directory") as error:
        RunDirectory.create(config_in(tmp_path / "a" / "b"))
    assert "\n" not in str(error.value)
    assert everything(tmp_path) == {}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("old")
    with pytest.raises(UserError):
        RunDirectory.create(config_in(tmp_path, "run.overwrite=true"))
    assert everything(tmp_path) == {"mine": None, "mine/config.yaml": b"old"}


@pytest.mark.parametrize("method", [RunDirectory.check, RunDirectory.create])
def test_unwritable_places_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: object) -> None:
    assert callable(method)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is not a directory"):
        method(config_in(tmp_path / "file" / "runs"))

    def read_only(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    # Permissions would not do: a test that runs as root may write everywhere.
    monkeypatch.setattr(files.tempfile, "TemporaryFile", read_only)
    with pytest.raises(UserError, match="cannot make the run directory .*Read-only file system"):
        method(config_in(tmp_path / "runs"))
    assert everything(tmp_path) == {"file": b"x"}


def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    RunDirectory.check(config_in(tmp_path / "a" / "b"))
    assert everything(tmp_path) == {}


def test_checkpoints_are_whole_and_the_newest_are_kept(tmp_path: Path) -> None:
    run = RunDirectory.create(config_in(tmp_path, "train.keep_checkpoints=2"))
    for step in (5, 20, 100):
        with run.checkpoint(step) as directory:
            (directory / "weights").write_bytes(str(step).encode())
    with pytest.raises(OSError), run.checkpoint(200) as directory:
        (directory / "weights").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [(path.name, (path / "weights").read_bytes()) for path in run.checkpoints()] == [("step-20", b"20"), ("step-100", b"100")]
    assert sorted(entry.name for entry in (run.path / "checkpoints").iterdir()) == ["step-100", "step-20"]
