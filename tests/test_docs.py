"""What README and docs tell to type can be typed: commands, recipes, options and keys exist."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from support.ranks import load_libraries, run_commands

from arcopo_fast.config.reading import recipes
from arcopo_fast.config.schema import Config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {
    "vbench": {"sample": "sample_command_line", "score": "score_command_line", "total": "total_command_line"},
    "rewards": {"serve": "serve_command_line", "list": None},
    "evaluate": {"merge": "merge_command_line"},
}
"""Of commands with commands of their own."""


def lines(page: Path) -> list[list[str]]:
    """The words of every command line with `-m arcopo_fast` in the page's blocks of shell, comments left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    found = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in found if "-m arcopo_fast" in line]


def commands(page: Path) -> list[list[str]]:
    """The same from the module's name on."""
    return [line[line.index("-m") + 1 :] for line in lines(page)]


EVERY = [pytest.param(words, id=f"{page.stem}-{index}-{words[0]}") for page in PAGES for index, words in enumerate(commands(page))]


def parser_of(words: list[str]) -> tuple[argparse.ArgumentParser | None, list[str]]:
    """The parser of a command line, and its words without the command."""
    name = words[0].removeprefix("arcopo_fast.")
    module = importlib.import_module(f"arcopo_fast.{name}" + (".__main__" if name == "rewards" else ""))
    inner = PARSERS.get(name, {})
    if len(words) > 1 and words[1] in inner:
        made = inner[words[1]]
        return (getattr(module, made)() if made else None), words[2:]
    return module.command_line(), words[1:]


def test_there_are_commands() -> None:
    assert len(EVERY) > 25 and {
        "train",
        "collect",
        "merge",
        "generate",
        "evaluate",
        "vbench",
        "rewards",
        "doctor",
        "report",
        "entropy",
    } <= {words[0].removeprefix("arcopo_fast.") for page in PAGES for words in commands(page)}


@pytest.mark.parametrize("words", EVERY)
def test_what_is_told_can_be_typed(words: list[str]) -> None:
    if words[0] == "arcopo_fast.toy.pretrain" or "--help" in words:
        return
    parser, arguments = parser_of(words)
    if parser is None:
        assert not arguments
        return
    known = set(parser._option_string_actions)
    for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        assert option in known, f"{words[0]} has no {option}"
    settings = parser.parse_args(arguments).settings if any(action.dest == "settings" for action in parser._actions) else []
    for word in settings:
        key, equals, _ = word.partition("=")
        if equals:
            here: Any = Config
            for part in key.split("."):
                assert part in here.model_fields, f"there is no key {key}"
                here = here.model_fields[part].annotation
        else:
            assert word in (*recipes(), "RECIPE") or word.endswith(".yaml"), f"there is no recipe {word}"


def test_ranks_on_a_laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of docs/scaling.md that need no GPU do what the page says."""
    load_libraries()
    monkeypatch.chdir(tmp_path)
    runs, toy = [], [line for line in lines(ROOT / "docs" / "scaling.md") if line[0] == "torchrun" and "toy" in line]
    for line in toy:
        launcher, (module, *arguments) = line[: line.index("-m")], line[line.index("-m") + 1 :]
        main = importlib.import_module(module).main
        first, *others = run_commands(int(launcher[-1].removeprefix("--nproc_per_node=")), main, *arguments)
        assert (first.status, [other.status for other in others]) == (0, [0]), (first, others)
        runs += [word.removeprefix("name=") for word in arguments if word.startswith("name=")]
    assert len(toy) == 3 and runs == ["groups", "branches"] == sorted((path.name for path in (tmp_path / "runs").iterdir()), reverse=True)
    for run in runs:
        assert {"report.html", "adapter", "logs"} <= {path.name for path in (tmp_path / "runs" / run).iterdir()}
        assert [path.name for path in (tmp_path / "runs" / run / "logs").iterdir()] == ["rank-1.log"]
        assert "wait for other ranks" in (tmp_path / "runs" / run / "report.html").read_text(encoding="utf-8")
