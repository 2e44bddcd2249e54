"""Prompts: sets of them in the forms that are published, split once into those trained on and those kept for evaluation.

A set is a text file with one prompt a line, a JSON-lines file (.jsonl) or a JSON list (.json) of {"prompt": text, "extended": text}, or a
table (.csv, .tsv) with a column "prompt". The form goes by the file's name; what is plainly another one is refused, not taken for prompts.
An extended prompt is what a language model has made of the prompt: the generator reads it, rewards and file names keep to the original.
A record of a long video whose prompt changes says {"prompts": [text, ...], "frames": [0, ...]}: the latent frame from which on each counts.
"""

from __future__ import annotations

import csv
import importlib.resources
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arcopo_fast.config.sections import expanded
from arcopo_fast.errors import UserError, shorten
from arcopo_fast.storage import hub, identity
from arcopo_fast.storage.textfiles import parse_json, read_text, text_problem

BENCH = "bench"
"""Names the plain sentences that come with the package."""


class Turn(NamedTuple):
    """A prompt from a latent frame of a video on, or from the first chunk that begins after it."""

    frame: int
    prompt: Prompt


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        text: describes the video; rewards read it.
        extended: what the generator reads instead; None: the text.
        turns: the prompts that a long video follows later, in their order. None of these has turns.
    """

    text: str
    extended: str | None = None
    turns: tuple[Turn, ...] = ()

    @property
    def for_generator(self) -> str:
        """Text that the generator reads."""
        return self.extended or self.text

    @property
    def parts(self) -> tuple[Turn, ...]:
        """All prompts of the video, the first one from frame 0 on."""
        return Turn(0, self._replace(turns=())), *self.turns

    def at_chunks(self, starts: Sequence[int]) -> dict[int, Prompt]:
        """Return the prompts by the first latent frame of the chunk with which each of them begins to count.

        Args:
            starts: the first latent frame of every chunk.

        Raises:
            UserError: no chunk begins at or after a turn, or two of them fall on one chunk.
        """
        placed: dict[int, Prompt] = {}
        for frame, prompt in self.parts:
            start = next((start for start in starts if start >= frame), None)
            counts = f"prompt {shorten(prompt.text, 60)!r} counts from latent frame {frame} on"
            if start is None:
                raise UserError(f"{counts}, and the video's last chunk begins at {max(starts)}; make the video longer")
            if start in placed:
                raise UserError(f"{counts}, with the chunk that begins at {start}, and so does another prompt; leave one of them out")
            placed[start] = prompt
        return placed


class Prompts(NamedTuple):
    """Disjoint lists of prompts, in a fixed order."""

    training: list[Prompt]
    evaluation: list[Prompt]


def prompts_file(name: str) -> Path:
    """Return the file of a set of prompts: "bench" comes with the package, a published one is found or downloaded, anything else is a
    path."""
    if name == BENCH:
        return Path(str(importlib.resources.files("arcopo_fast.data") / "bench_prompts.txt"))
    return hub.find(name) if hub.is_published(name) else Path(expanded(name))


def read_prompt_set(source: str | Path, extended: str | Path | None = None, *, turns: bool = False) -> list[Prompt]:
    """Return the prompts of a file, in its order. Blank lines of a text are skipped.

    Args:
        source: "bench", or what `hub.find` takes: a path, or hf://datasets/owner/name/path/of/the/file.
        extended: a text file whose lines extend those of `source`, one by one.
        turns: the caller knows what to do with prompts that change within a video.

    Raises:
        UserError: a file cannot be read or holds no prompt, a line is not what it should be, or the two do not match; or a prompt changes
            within its video, and the caller does not know of that.
    """
    path = prompts_file(str(source))
    if path.is_dir():
        raise UserError(f"{source} is a directory; name the file in it that holds the prompts")
    kind = _kind(path)
    if extended is not None:
        if kind != TEXT:
            raise UserError(
                f"a file of extended prompts goes with a text file, line by line; {source} holds its own extended ones: leave the file out"
            )
        prompts = _pairs(path, prompts_file(str(extended)))
    elif kind == ".jsonl":
        prompts = list(_json_lines(path))
    elif kind == ".json":
        prompts = _json_list(path)
    elif kind in TABLES:
        prompts = list(_rows(path, TABLES[kind]))
    else:
        prompts = [Prompt(line) for line in _lines(path) if line]
    if not prompts:
        raise UserError(f"{path} holds no prompt; expected one on each line")
    if not turns and (changing := next((prompt for prompt in prompts if prompt.turns), None)):
        raise UserError(
            f"{source}: {shorten(changing.text, 60)!r} is followed by other prompts in the same video, of which there is none here; give a "
            "set with one prompt for each video"
        )
    return prompts


def check_prompt(text: str) -> str:
    """Return a prompt without the white space around it.

    Raises:
        ValueError: it is empty, or no text.
    """
    if problem := text_problem(text):
        raise ValueError(f"{problem}, is no part of a prompt")
    if not text.strip():
        raise ValueError("a prompt is empty")
    return text.strip()


def read_prompts(source: str | Path) -> list[str]:
    """Return the plain prompts of a file.

    Raises:
        UserError: see `read_prompt_set`; or the file has extended prompts, which the caller cannot use.
    """
    prompts = read_prompt_set(source)
    if any(prompt.extended for prompt in prompts):
        raise UserError(f"{source} has extended prompts beside the others; give a set without them, or the extended ones alone")
    return [prompt.text for prompt in prompts]


def digest(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of prompts, their order, their extended forms and their turns."""
    return identity.digest("\n".join("\t".join(filter(None, _listed(prompt))) for prompt in prompts))


def _listed(prompt: Prompt) -> Iterator[str | None]:
    """Yield all that a prompt says."""
    yield from prompt[:2]
    for frame, later in prompt.turns:
        yield str(frame)
        yield from later[:2]


def split_prompts(prompts: Sequence[Prompt], evaluation: int, random: np.random.Generator) -> Prompts:
    """Keep `evaluation` prompts aside, drawn with `random` among those of different text; the rest is trained on.

    What would show a prompt of the evaluation to the training is left out, and said on stderr: a prompt that stands twice in the set, also
    with another extended form, or one that reads the same to the generator.

    Raises:
        UserError: nothing would be left to train on.
    """
    first_of: dict[str, Prompt] = {}  # by text
    for prompt in prompts:
        first_of.setdefault(_forms(prompt)[0], prompt)
    distinct = list(first_of.values())
    if evaluation >= len(distinct):
        counted = f"{len(distinct)} different prompts" if len(distinct) < len(prompts) else f"{len(prompts)} prompts"
        raise UserError(f"evaluation.prompts is {evaluation}, but there are {counted} in all; leave at least one to train on")
    chosen = set(random.choice(len(distinct), size=evaluation, replace=False).tolist())
    judged = [prompt for index, prompt in enumerate(distinct) if index in chosen]
    judged_texts = {form for prompt in judged for form in _forms(prompt)}
    training = [prompt for prompt in prompts if not judged_texts.intersection(_forms(prompt))]
    if not training:
        raise UserError(f"evaluation.prompts is {evaluation}, and every other prompt equals one of these; leave at least one to train on")
    if repeated := len(prompts) - len(training) - len(judged):
        print(f"{repeated} of {len(prompts)} prompts repeat one that is kept for evaluation, and are not trained on", file=sys.stderr)
    return Prompts(training, judged)


def _forms(prompt: Prompt) -> tuple[str, str]:
    """Return what rewards and what the generator read of a video, in forms that are equal for texts that differ in white space only, which
    text encoders do not see."""
    texts = [(part.text, part.for_generator) for _, part in prompt.parts]
    read, generated = (" | ".join(" ".join(text.split()) for text in column) for column in zip(*texts))
    return read, generated


# The forms of a file ---------------------------------------------------------------------------------------------------------------

TEXT = ".txt"
TABLES = {".csv": ",", ".tsv": "\t"}
_STRUCTURED = re.compile(
    r"\.(yaml|yml|toml|ini|xml|html|htm|json5|jsonc|ndjson|ipynb|py|md|rtf|doc|docx|odt|pdf|xls|xlsx|ods|parquet|arrow|feather|db|sqlite|h5"
    r"|npy|npz|pkl|pt|pth|safetensors|zip|gz|bz2|xz|zst|tar|tgz|7z|mp4|png|jpg)"
)
_HEADER = re.compile(r"\"?[A-Za-z_]\w*\"?(?:[,;\t|]\"?[A-Za-z_]\w*\"?)*")  # one word, or several between separators without a space


def _kind(path: Path) -> str:
    """Return the form of a file, by the end of its name in any case."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json", *TABLES):
        return suffix
    if _STRUCTURED.fullmatch(suffix):
        raise UserError(
            f"{path}: prompts are not read from {suffix} files; give a .txt with one on each line, a .jsonl, .json, .csv or .tsv"
        )
    return TEXT


def _lines(path: Path) -> list[str]:
    """Return a text file's stripped lines, without blank ones at the end.

    Only a line feed ends a line: a prompt may hold U+2028, which `splitlines` cuts at.

    Raises:
        UserError: the file is not a text, or another form under a text's name.
    """
    if (kind := _kind(path)) != TEXT:
        raise UserError(f"{path} is a {kind} file; expected a text file with one prompt on each line")
    content = read_text(path, "prompts")
    lines = [line.strip() for line in content.rstrip().split("\n")]
    filled = [line for line in lines if line]
    if filled and (_is_json(content) or all(map(_is_json, filled))):
        raise UserError(f"{path} holds JSON, not a prompt on each line; name it .json, or .jsonl if each line is a record")
    if filled and _is_header(filled[0]):
        raise UserError(
            f"{path}: its first line, {filled[0][:60]!r}, is a table's header, not a prompt; name the file .csv or .tsv, or remove the line"
        )
    return lines


def _is_json(text: str) -> bool:
    """Return whether a text is a JSON object or list."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except ValueError:
        return False
    except RecursionError:
        pass
    return True


def _is_header(line: str) -> bool:
    """Return whether a line is a row of column names, one of which tables of prompts have."""
    if not _HEADER.fullmatch(line):
        return False
    names = re.findall(r"\w+", line.lower())
    return bool({"prompt", "caption"} & set(names)) or (len(names) > 1 and bool({"prompts", "captions", "text", "id", "uuid"} & set(names)))


def _pairs(path: Path, extended: Path) -> list[Prompt]:
    lines, longer = _lines(path), _lines(extended)
    if len(lines) != len(longer):
        raise UserError(f"{path} has {len(lines)} lines and {extended} {len(longer)}; expected the extended form of each line in its place")
    for number, (line, extension) in enumerate(zip(lines, longer), start=1):
        if bool(line) != bool(extension):
            raise UserError(
                f"line {number} is blank in {extended if line else path} only; expected the extended form of each line in its place"
            )
    return [Prompt(line, extension) for line, extension in zip(lines, longer) if line]


def _record(value: Any) -> Prompt:
    """Return a prompt out of JSON. Raise `ValueError` if the value is no record of one."""
    if isinstance(value, dict) and "prompts" in value:
        return _changing(value)
    if not isinstance(value, dict) or not {"prompt"} <= value.keys() <= {"prompt", "extended"}:
        raise ValueError("it is no such record")
    if not all(isinstance(text, str) for text in value.values()):
        raise ValueError("a prompt is no text")
    return Prompt(check_prompt(value["prompt"]), check_prompt(value["extended"]) if "extended" in value else None)


def _changing(record: dict[str, Any]) -> Prompt:
    """Return a prompt with turns out of JSON. Raise `ValueError` if the record does not say them."""
    if not {"prompts", "frames"} <= record.keys() <= {"prompts", "frames", "extended"}:
        raise ValueError('beside "prompts" it needs "frames", and may have "extended"')
    texts, frames, longer = record["prompts"], record["frames"], record.get("extended")
    columns = [texts, frames, *([] if longer is None else [longer])]
    if not all(isinstance(column, list) and len(column) == len(texts) > 0 for column in columns):
        raise ValueError('"prompts", "frames" and "extended" are lists of one length')
    if not all(type(frame) is int for frame in frames) or frames[0] != 0 or any(a >= b for a, b in pairwise(frames)):
        raise ValueError(f'"frames" begins with 0 and rises; given {shorten(str(frames), 60)}')
    if not all(isinstance(text, str) for text in (*texts, *(longer or ()))):
        raise ValueError("a prompt is no text")
    prompts = [Prompt(check_prompt(text), longer and check_prompt(longer[place])) for place, text in enumerate(texts)]
    return prompts[0]._replace(turns=tuple(map(Turn, frames[1:], prompts[1:])))


def _json_lines(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(read_text(path, "prompts").rstrip().split("\n"), start=1):
        try:
            yield _record(parse_json(line))
        except ValueError as error:
            content = shorten(line, 60) or "nothing"
            raise UserError(f"{path}:{number}: expected {_EXPECTED}; given {content} ({error})") from None


def _json_list(path: Path) -> list[Prompt]:
    """Return the prompts of a JSON list of records, or of texts."""
    try:
        values = parse_json(read_text(path, "prompts"))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(values, list):
        raise UserError(f"{path} holds a JSON {type(values).__name__}; expected a list of texts, or of {_EXPECTED}")
    prompts = []
    for number, value in enumerate(values, start=1):
        try:
            prompts.append(Prompt(check_prompt(value)) if isinstance(value, str) else _record(value))
        except ValueError as error:
            raise UserError(f"{path}: entry {number}: expected a text or {_EXPECTED}; given {shorten(repr(value), 60)} ({error})") from None
    return prompts


_EXPECTED = '{"prompt": text}, and "extended": text if there is one, or {"prompts": [text, ...], "frames": [0, ...]}'


def _rows(path: Path, delimiter: str) -> Iterator[Prompt]:
    """Yield the prompts of a table. Other columns are ignored, and so are rows without a prompt."""
    rows = csv.reader(io.StringIO(read_text(path, "prompts"), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if "prompt" not in header:
            columns = shorten(", ".join(header), 60) or "nothing"
            raise UserError(f"{path} has no column 'prompt', only {columns}; expected a header with one")
        if repeated := [name for name in ("prompt", "extended") if header.count(name) > 1]:
            raise UserError(f"{path}: the column {repeated[0]!r} stands twice; remove or rename one")
        for row in rows:
            if row and len(row) != len(header):
                raise UserError(
                    f"{path}:{rows.line_num}: {len(row)} cells under a header of {len(header)}; put text that holds {delimiter!r} in quotes"
                )
            cells = dict(zip(header, row))
            if text := cells.get("prompt", "").strip():
                yield Prompt(text, cells.get("extended", "").strip() or None)
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: not CSV: {error}") from None
