"""Prompts: sets of them in the forms that are published, split once into those trained on and those kept for evaluation.

A set is a text file with one prompt a line, a JSON-lines file of {"prompt": text, "extended": text}, or a CSV file with a column "prompt".
An extended prompt is what a language model has made of the prompt: the generator reads it, rewards and file names keep to the original.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.resources
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np

from arcopo_fast import hub
from arcopo_fast.errors import UserError

BENCH = "bench"
"""Names the plain sentences that come with the package."""


class Prompt(NamedTuple):
    """What a video shall show, and what the generator reads instead, if that is something else."""

    text: str
    extended: str | None = None

    @property
    def for_generator(self) -> str:
        return self.extended or self.text


class Prompts(NamedTuple):
    """Disjoint lists, in a fixed order."""

    training: list[Prompt]
    evaluation: list[Prompt]


def prompts_file(name: str) -> Path:
    """Where a set of prompts lies: "bench" comes with the package, what is published is found or fetched, anything else is a path."""
    if name == BENCH:
        return Path(str(importlib.resources.files("arcopo_fast.data") / "bench_prompts.txt"))
    return hub.find(name) if hub.is_published(name) else Path(name).expanduser()


def read_prompt_set(source: str | Path, extended: str | Path | None = None) -> list[Prompt]:
    """The prompts of a file, in its order; its form is that of its name: .jsonl, .csv, else text. Blank lines of a text are skipped.

    Args:
        source: "bench", or what `hub.find` takes: a path, or hf://datasets/owner/name/path/of/the/file.
        extended: a text file whose lines extend those of `source`, one by one.

    Raises:
        UserError: a file cannot be read or holds no prompt, a line is not what it should be, or the two do not match.
    """
    path = prompts_file(str(source))
    if path.is_dir():
        raise UserError(f"{source} is a directory; name the file in it that holds the prompts")
    content = _read(path)
    if extended is not None:
        if path.suffix in (".jsonl", ".csv"):
            raise UserError(
                f"extended prompts in a file of their own go with a text file, line by line; {source} holds its own: leave them out"
            )
        found = _pairs(path, content, prompts_file(str(extended)))
    elif path.suffix == ".jsonl":
        found = list(_json_lines(path, content))
    elif path.suffix == ".csv":
        found = list(_rows(path, content))
    else:
        found = [Prompt(line) for line in _lines(content) if line]
    if not found:
        raise UserError(f"{path} holds no prompt; expected one on each line")
    return found


def read_prompts(source: str | Path) -> list[str]:
    """`read_prompt_set` for whoever has no use for extended prompts.

    Raises:
        UserError: as there, or a prompt is extended: it would be left out without a word.
    """
    prompts = read_prompt_set(source)
    if any(prompt.extended for prompt in prompts):
        raise UserError(f"{source} has extended prompts beside the others; give a set without them, or the extended ones alone")
    return [prompt.text for prompt in prompts]


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of prompts, their order and their extended forms."""
    return hashlib.sha256("\n".join("\t".join(filter(None, prompt)) for prompt in prompts).encode()).hexdigest()


def split_prompts(prompts: Sequence[Prompt], evaluation: int, random: np.random.Generator) -> Prompts:
    """Keep `evaluation` prompts aside, drawn with `random`; the rest is trained on.

    Raises:
        UserError: nothing would be left to train on.
    """
    if evaluation >= len(prompts):
        raise UserError(f"evaluation.prompts is {evaluation}, but there are {len(prompts)} prompts in all; leave at least one to train on")
    kept = set(random.choice(len(prompts), size=evaluation, replace=False).tolist())
    return Prompts(
        [prompt for index, prompt in enumerate(prompts) if index not in kept],
        [prompt for index, prompt in enumerate(prompts) if index in kept],
    )


# The forms of a file ---------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    """UTF-8, with \\n at the ends of lines, without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path}: {error}; expected a UTF-8 text file with one prompt on each line") from error


def _lines(content: str) -> list[str]:
    """Stripped lines, without blank ones at the end. Only a line feed ends a line: a prompt may hold U+2028, which `splitlines` cuts at."""
    return [line.strip() for line in content.rstrip().split("\n")]


def _pairs(path: Path, content: str, extended: Path) -> list[Prompt]:
    lines, longer = _lines(content), _lines(_read(extended))
    if len(lines) != len(longer):
        raise UserError(f"{path} has {len(lines)} lines and {extended} {len(longer)}; expected the extended form of each line in its place")
    for number, (line, other) in enumerate(zip(lines, longer), start=1):
        if bool(line) != bool(other):
            raise UserError(
                f"line {number} is blank in {extended if line else path} only; expected the extended form of each line in its place"
            )
    return [Prompt(line, other) for line, other in zip(lines, longer) if line]


def _json_lines(path: Path, content: str) -> Iterator[Prompt]:
    for number, line in enumerate(_lines(content), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        known = isinstance(record, dict) and record.keys() <= {"prompt", "extended"}
        texts = [record.get("prompt"), record.get("extended", "-")] if known else [None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            shown = line if len(line) <= 60 else f"{line[:60]}..."
            raise UserError(
                f'{path}:{number}: expected {{"prompt": text}}, and "extended": text if there is one; given {shown or "nothing"}'
            )
        yield Prompt(record["prompt"].strip(), record["extended"].strip() if "extended" in record else None)


def _rows(path: Path, content: str) -> Iterator[Prompt]:
    """Other columns are left alone, and so are rows without a prompt."""
    rows = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    if "prompt" not in (rows.fieldnames or ()):
        raise UserError(f"{path} has no column 'prompt', only {', '.join(rows.fieldnames or ()) or 'nothing'}; expected a header with one")
    try:
        for row in rows:
            if text := (row["prompt"] or "").strip():
                yield Prompt(text, (row.get("extended") or "").strip() or None)
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: not CSV: {error}") from None
