"""Texts and paths in recipes and overrides: taken whole, or refused with a line that says how to quote them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.recipes import BASE, leaves, load, message, write

from arcopo_fast.config.explain import every_field
from arcopo_fast.config.reading import load_config, setting
from arcopo_fast.config.schema import Config

DROPPED = [
    "my file #1.txt",
    "a # b",
    "#1",
    "&x.txt",
    "&a b",
    "*x",
    "!x",
    "!!str x",
    "%x",
    "--- a",
    "... a",
    "| a",
    "> a",
    "a\nb",
    "[a] # b",
]


OTHERWISE = [
    "a: b",
    "x:",
    "@x",
    "`x",
    "- a",
    "? a",
    "[a",
    "{a}",
    "[a]",
    "1e5",
    "12",
    "null",
    "~",
    "true",
    "",
    "'a' b",
    '"a',
    "'",
    "{",
    "}",
    ",",
]


@pytest.mark.parametrize("text", DROPPED + OTHERWISE)
@pytest.mark.parametrize("key", ["prompts", "generator.checkpoint"])
def test_a_text_is_taken_whole_or_refused(key: str, text: str) -> None:
    """What is said then is how to quote it, which gives the text itself."""
    said = message(f"{key}={text}")
    assert said.startswith("override ") and len(said) < 400
    if text in DROPPED:
        assert f"'{key}=" in said and "taken whole in quotes" in said
    else:
        assert "quotes" in said
    if text not in ("", "~"):  # what no file is named, and a home directory
        config = load(setting(key, text))
        assert (config.prompts if key == "prompts" else config.generator.checkpoint) == text


@pytest.mark.parametrize(
    "text", ["a#b", "it's", "a:b", "a, b", "süß 😀", "a - b", "a & b * c!", "100%", "a | b", "x=y", "'a #1'", '"a: b"']
)
def test_texts_that_need_no_quotes(text: str) -> None:
    assert load(f"prompts={text}").prompts == text.strip("'\"")


def test_what_is_dropped_from_a_section_is_refused_too() -> None:
    for override in (
        "rewards={toy_vq: 1} # b",
        "lora=rank: 8 # b",
        "lora.targets=[&a to_q]",
        "lora.targets=[!x to_q]",
        "rewards={\n# b\ntoy_vq: 1}",
    ):
        assert "in YAML" in message(override)


@pytest.mark.parametrize("text", ["a\x00b", "\x1b[1m", "\ud800", '"\\ud800"', '"\\0"', '"\\x1b[1m"', '"\\x7f"'])
def test_what_is_no_text(text: str, tmp_path: Path) -> None:
    assert "not valid YAML" in message(f"prompts={text}")
    assert "not valid YAML" in message(f"rewards={{{text}: 1}}")
    if text != "\ud800":
        path = write(tmp_path / "odd.yaml", BASE + f"prompts: {text}\n")
        assert message(recipe=path).startswith(path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("utf-16", "UTF-16 text"),
        ("utf-32", "UTF-32 text"),
        ("utf-16-be", "not UTF-8 text"),
        ("latin-1", ":11: not UTF-8 text (the byte 0xfc)"),
    ],
)
def test_recipes_in_other_encodings(content: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_bytes((BASE + "# süß\n").encode(content))
    assert part in message(recipe=str(tmp_path / "other.yaml"))
    (tmp_path / "marked.yaml").write_bytes((BASE + "# süß\n").encode("utf-8-sig"))
    assert load_config(str(tmp_path / "marked.yaml")) == load()


@pytest.mark.parametrize("text", ["a" * 256, "a/" * 3000, "ü" * 128])
def test_paths_that_no_file_system_takes(text: str) -> None:
    for key in ("prompts", "generator.checkpoint", "run.directory"):
        assert "is not a valid path" in message(f"{key}={text}")
    assert "at most 200" in message(f"name={'a' * 201}")
    assert "255 bytes" in message(recipe="a" * 5000)


PLACES = ["prompts", "extended_prompts", "generator.checkpoint", "generator.base", "generator.lora", "run.directory", "train.buffer"]


def test_every_key_that_is_a_path_is_of_the_type_that_expands_it() -> None:
    """By the words of its meaning, so that a new one cannot be forgotten; a run's name and the path of the replay are none."""
    meanings = {name: info.description or "" for name, info in every_field(Config)}
    found = {name for name, text in meanings.items() if re.search(r"\b(file|directory|path|hf)\b", text)}
    assert found - {"name", "objective.old_prediction"} == set(PLACES)


@pytest.mark.parametrize("key", PLACES)
def test_a_home_directory(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    more = ["train.mode=semi_on_policy"] if key == "train.buffer" else []
    assert leaves(load(f"{key}=~/a b/c", *more).model_dump())[key] == str(tmp_path / "a b" / "c")
    assert leaves(load(f"{key}=./~/c", *more).model_dump())[key] == "./~/c"
    assert "no home directory '~nobody-of-that-name'" in message(f"{key}=~nobody-of-that-name/c", *more)
    assert load_config("~/base.yaml") == load()
