"""`python -m arcopo_fast.doctor`: what is here, what is not, and what is not what was published."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from arcopo_fast import doctor
from arcopo_fast.cli import run_command
from arcopo_fast.storage import hub

NAME = "some-one/some.model"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(hub.VARIABLE, str(tmp_path / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hugging-face"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "models"


def examined(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """The exit status, and what is said of files."""
    status = run_command(doctor.main, arguments)
    return status, capsys.readouterr().out.split("\nThe recipe ")[1].splitlines()[1:]


def test_a_recipe_that_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert examined(capsys, "toy") == (0, ["every file is here"])
    assert examined(capsys, "bench_1_3b") == (0, ["every file is here"])


def test_what_is_missing_found_and_damaged(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_judge.py").write_text(
        f"class Judge:\n    sources = (('hf://{NAME}', ['judge.pt']),)\n\nclass Other(Judge):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rewards = "rewards=" + json.dumps({"my_judge:Judge": 1.0, "my_judge:Other": 1.0})
    settings = [rewards, f"generator.checkpoint=hf://{NAME}/weights.pt", f"prompts={tmp_path / 'prompts.txt'}"]
    monkeypatch.setitem(hub.FILES, f"{NAME}/weights.pt", hub.Published(7, hashlib.sha256(b"weights").hexdigest()))
    status, said = examined(capsys, "toy", *settings)
    assert status == 1 and [line.split(":")[0] for line in said] == [
        "missing  generator.checkpoint",
        "missing  prompts",
        "missing  rewards.my_judge",  # once for both rewards
        "3 missing, 0 damaged; with a network, a run downloads what is missing by itself",
    ]
    assert f"hf download {NAME} judge.pt" in said[2]
    for name, content in (("weights.pt", "weight"), ("judge.pt", "judge")):
        (models / NAME).mkdir(parents=True, exist_ok=True)
        (models / NAME / name).write_text(content)
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    status, said = examined(capsys, "toy", *settings)
    assert status == 1 and said[0].startswith("damaged  generator.checkpoint") and "has 6 bytes, the published file 7" in said[0]
    assert said[1] == f"found    prompts: {tmp_path / 'prompts.txt'}"
    (models / NAME / "weights.pt").write_text("weighty"[:7])
    assert examined(capsys, "toy", *settings)[0] == 0  # its size is right
    status, said = examined(capsys, "toy", *settings, "--verify")
    assert status == 1 and "weights.pt is not what was published" in said[1]
    (models / NAME / "weights.pt").write_text("weights")
    assert examined(capsys, "toy", *settings, "--verify")[0] == 0
    assert "my_judge" in sys.modules


def test_the_environment_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(doctor.main, ["toy"])
    said = capsys.readouterr().out
    assert said.startswith("Python 3.") and "torch 2." in said and ("no GPU" in said or "cuda:0" in said)
