"""`python -m arcopo_fast.report`: one run, several runs, and what it says to bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs import Page, evaluation, write_run

from arcopo_fast.cli import run_command
from arcopo_fast.report import main


def test_one_run_writes_its_report_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, document=evaluation())
    assert run_command(main, [str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert "Before and after" in Page(run / "report.html").text
    assert run_command(main, [str(run), f"{run}/.", "--out", str(tmp_path / "other.html")]) == 0, "the same run twice is one run"
    assert (tmp_path / "other.html").read_bytes() == (run / "report.html").read_bytes()


def test_several_runs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path, f"seed={seed}", document=evaluation()) for seed in range(2)]
    monkeypatch.chdir(tmp_path)
    assert run_command(main, [run.name for run in runs]) == 0
    assert "1 series · 2 runs" in Page(tmp_path / "report.html").text
    assert not [run for run in runs if (run / "report.html").exists()]


def test_help_says_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "RUN [RUN ...]" in text and "default: report.html in the run's directory" in text


BAD = {
    "nothing": ([], "RUN"),
    "unknown directory": (["{folder}/absent"], "absent is not a run: it is not a directory"),
    "not a run": (["{folder}"], "is not a run: it holds no config.yaml"),
    "a file": (["{run}/config.yaml"], "is not a run"),
    "broken settings": (["{broken}", "{run}"], "config.yaml"),
    "broken metrics": (["{run}", "{torn}"], "metrics.jsonl:2: not a JSON record"),
    "not a page": (["{run}", "--out", "{run}/config.yaml"], ".html"),
    "a directory": (["{run}", "--out", "{folder}/folder.html"], "is a directory"),
    "nowhere": (["{run}", "--out", "{folder}/absent/page.html"], "there is no directory"),
    "unknown option": (["{run}", "--output", "x.html"], "--out"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, broken, torn = (write_run(tmp_path, f"name={name}") for name in ("run", "broken", "torn"))
    (broken / "config.yaml").write_text("name: [")
    lines = (torn / "metrics.jsonl").read_text().splitlines(keepends=True)
    (torn / "metrics.jsonl").write_text("".join([lines[0], lines[1][:9] + "\n", *lines[2:]]))
    (tmp_path / "folder.html").mkdir()
    before = sorted(tmp_path.rglob("*"))
    names = {"folder": tmp_path, "run": run, "broken": broken, "torn": torn}
    assert run_command(main, [argument.format(**names) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and said in error, error
    assert sorted(tmp_path.rglob("*")) == before
