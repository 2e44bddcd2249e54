"""The comparison of two files of results: what it calls a regression, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, results


def report(**cases: tuple[float, float]) -> dict[str, Any]:
    """Results of one device; a case is its median and its interquartile range."""
    return {
        "environment": {"device": "some GPU"},
        "cases": [
            {
                "operator": name,
                "mode": "forward",
                "case": "N=1",
                "variants": {results.OURS: {"median": middle, "q1": middle - spread / 2, "q3": middle + spread / 2}},
            }
            for name, (middle, spread) in cases.items()
        ],
    }


def run(folder: Path, old: Any, new: Any, *options: str) -> int:
    paths = [folder / "old.json", folder / "new.json"]
    for path, content in zip(paths, (old, new)):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return compare.main([*map(str, paths), *options])


def test_a_slower_case_is_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = report(attention=(1e-3, 1e-6), nft=(2e-3, 1e-6))
    assert run(tmp_path, old, report(attention=(1.2e-3, 1e-6), nft=(1e-3, 1e-6))) == 1
    slower, faster = capsys.readouterr().out.splitlines()[1:]
    assert slower.startswith("attention forward N=1") and "+20.0%" in slower and slower.endswith("SLOWER")
    assert "-50.0%" in faster and faster.endswith("faster")


def test_noise_is_what_the_files_say_and_at_least_the_floor(tmp_path: Path) -> None:
    assert run(tmp_path, report(a=(1.0, 0.0)), report(a=(1.04, 0.0))) == 0
    assert run(tmp_path, report(a=(1.0, 0.0)), report(a=(1.04, 0.0)), "--noise", "0.03") == 1
    assert run(tmp_path, report(a=(1.0, 0.2)), report(a=(1.19, 0.2))) == 0, "the boxes of the quartiles touch"
    assert run(tmp_path, report(a=(1.0, 0.2)), report(a=(1.21, 0.2))) == 1


def test_a_case_that_fails_now_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = report(a=(1.0, 0.0), b=(1.0, 0.0))
    new = copy.deepcopy(old)
    del new["cases"][0]["variants"]
    new["cases"][0]["failed"] = "AssertionError: wrong"
    assert run(tmp_path, old, new) == 1
    assert "fails now" in capsys.readouterr().out
    assert run(tmp_path, new, old) == 0
    assert run(tmp_path, new, new) == 0


def test_cases_of_one_file_only_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, report(a=(1.0, 0.0), b=(1.0, 0.0)), report(b=(1.0, 0.0), c=(1.0, 0.0))) == 0
    first, _, third = capsys.readouterr().out.splitlines()[1:]
    assert first.endswith("only in the old file") and third.endswith("only in the new file")


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("{", "new.json: Expecting"),
        ("[]", "holds no results"),
        ({"environment": {"device": "some GPU"}}, "holds no results"),
        ({"environment": {"device": "another"}, "cases": []}, "only results of one device"),
        (report(b=(1.0, 0.0)), "share no case"),
        ({"environment": {"device": "some GPU"}, "cases": [{"operator": "a", "mode": "forward", "case": "N=1"}]}, "lacks a figure"),
        ({"environment": {"device": "some GPU"}, "cases": [{}]}, "lacks a figure"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], new: Any, message: str) -> None:
    assert run(tmp_path, report(a=(1.0, 0.0)), new) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(tmp_path / "none.json"), str(tmp_path / "none.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "none.json" in line
