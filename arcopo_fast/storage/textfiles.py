"""Text and JSON that come from outside, read strictly: what is not plain UTF-8 text, or not JSON, is told in one line."""

from __future__ import annotations

import codecs
import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from arcopo_fast.errors import UserError, shorten

# UTF-32's mark for little-endian begins with UTF-16's, so it comes first.
_OTHER_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # but for tab, line feed and carriage return, which are replaced before


def read_text(path: Path, what: str = "") -> str:
    """Return a text file's content: UTF-8 with or without a byte order mark, `\\n` at the ends of lines.

    what: it should hold, for the message where there is no such file.

    Raises:
        UserError: it cannot be read, is in another encoding, or holds a control character; with the line.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path that no file system takes
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {what} from {path}: {reason}" if what else f"{path} cannot be read: {reason}") from None
    for mark, encoding in _OTHER_ENCODINGS:
        if content.startswith(mark):
            raise UserError(f"{path} is {encoding} text; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text (the byte 0x{content[error.start]:02x}); save it as UTF-8") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if found := _CONTROL.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise UserError(f"{path}:{line}: the control character U+{ord(found[0]):04X} is no part of a text; remove it")
    return text


def text_problem(text: str) -> str | None:
    """Return what keeps a string from being a text: a control character, or half of a surrogate pair; None if nothing does."""
    if found := _CONTROL.search(text.replace("\r", "\n")):
        return f"the control character U+{ord(found[0]):04X}"
    if found := re.search("[\ud800-\udfff]", text):
        return f"U+{ord(found[0]):04X}, half of a surrogate pair"
    return None


def parse_json(text: str) -> Any:
    """Return what a JSON text says. Stricter than Python's reader, which takes NaN, and the last one of equal keys.

    Raises:
        ValueError: of one line.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_float=_number, parse_constant=_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in text.lower() and (problem := text_problem(json.dumps(value, ensure_ascii=False))):
        raise ValueError(f"it holds {problem}")
    return value


def read_json(file: Path) -> dict[str, Any]:
    """Return a file's JSON object.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = parse_json(read_text(file))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a JSON {type(content).__name__}; expected an object")
    return content


class Document(BaseModel):
    """A JSON file that a run writes and reads back, of which what is read has these types. Other keys are left alone."""

    model_config = ConfigDict(strict=True)


_D = TypeVar("_D", bound=Document)


def read_document(path: Path, kind: type[_D], what: str) -> _D:
    """Return what a JSON file holds.

    Raises:
        UserError: it cannot be read, or it is not `what`, such as "the evaluation of a run".
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        raise UserError(
            f"{path}: not {what} ({shorten(where + first['msg'], 160)}); the file was changed by something else than a run: put it back "
            "from a copy"
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:60]!r} stands twice")
        found[key] = value
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value
