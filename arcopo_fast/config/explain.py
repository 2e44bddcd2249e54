"""The problem of a recipe in one line: where a value came from, what it is, what was expected and which key was probably meant."""

from __future__ import annotations

import difflib
import math
import types
from dataclasses import dataclass, replace
from typing import Annotated, Any, Iterator, Literal, Mapping, Sequence, TypeGuard, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from arcopo_fast.config.schema import Config
from arcopo_fast.config.sections import Section
from arcopo_fast.errors import shorten


def explain(error: ValidationError, model: type[Config], origins: Mapping[str, str], source: str) -> str:
    """Return the first problem, in one line. Unknown keys come first: a misspelt key often causes the other problems."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    place = _locate(model, first["loc"])
    if first["type"] == "extra_forbidden":
        problem = f"unknown key {shorten(place.path)}{_suggest(model, place.path)}"
    elif first["type"] == "missing":
        problem = f"the key {place.path} is missing: {place.meaning}"
    elif first["type"] == "value_error":
        problem = f"{place.path}: {first['ctx']['error']}" if place.key else str(first["ctx"]["error"])
    else:
        problem = f"{place.path}: expected {place.expected}; given {shorten(_shown(first['input']))}"
        if first["type"] == "string_type":
            problem += f"; to make it a text, put it in quotes that YAML sees, on a command line as '{place.path}=\"...\"'"
    others = len({_locate(model, problem["loc"]).path for problem in problems} - {place.path})
    more = f" (and {others} more problem{'s' * (others > 1)})" if others else ""
    return f"{_origin(place, problem, origins, source)}: {problem}{more}"


@dataclass(frozen=True)
class _Place:
    """The place of a problem in the tree of settings. key: it is a single key, not a section; expected: what that takes, in words."""

    path: str
    key: bool
    expected: str
    meaning: str


def _locate(model: type[BaseModel], location: tuple[int | str, ...]) -> _Place:
    """Follow pydantic's location down the tree, leaving out the branches of a union that it tried."""
    path = ""
    for index, step in enumerate(location):
        path += f".{step}" if path else str(step)
        info = model.model_fields.get(str(step))
        if info is None:
            return _Place(path, True, "nothing", "")
        section = section_of(info)
        if section is None:
            inner = location[index + 1] if index + 1 < len(location) else None
            kind, arguments = get_origin(info.annotation), get_args(info.annotation)
            if kind is dict and inner is not None and _is_section(arguments[1]) and index + 2 < len(location):
                rest = _locate(arguments[1], location[index + 2 :])
                return replace(rest, path=f"{path}.{inner}.{rest.path}")
            if kind is dict and inner is not None:
                return _Place(f"{path}.{inner}", True, _describe(arguments[1]), "")
            if kind in (list, tuple) and isinstance(inner, int):
                return _Place(f"{path}[{inner}]", True, _describe(arguments[0]), expected(info))
            return _Place(path, True, expected(info), info.description or "")
        model = section
    return _Place(path, False, "a section with keys of its own", model.__doc__ or "")


def _origin(place: _Place, problem: str, origins: Mapping[str, str], source: str) -> str:
    """Return the override or the line of the recipe that a problem comes from."""
    path = place.path.partition("[")[0]
    overridden = [key for key, origin in origins.items() if origin.startswith("override")]
    if not place.key:  # values that contradict each other: an override that is named, or that lies in the section
        candidates = [key for key in overridden if key in problem] + [key for key in overridden if key.startswith(f"{path}.")]
        return origins[candidates[0]] if candidates else source
    above = [path.rsplit(".", depth)[0] for depth in range(path.count(".") + 1)]
    below = [key for key in origins if key.startswith(f"{path}.")]
    return next((origins[key] for key in [*above, *below] if key in origins), source)


def section_of(info: FieldInfo) -> type[Section] | None:
    """Return the class of a field that is a section; None for a single key."""
    annotation = info.annotation
    return annotation if _is_section(annotation) else None


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def every_field(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every dotted key with its field, sections included, in the order of the tree. NAME stands for any name of a section."""
    for name, info in model.model_fields.items():
        yield prefix + name, info
        section, arguments = section_of(info), get_args(info.annotation)
        if section:
            yield from every_field(section, f"{prefix}{name}.")
        elif get_origin(info.annotation) is dict and _is_section(arguments[1]):
            yield from every_field(arguments[1], f"{prefix}{name}.NAME.")


def _suggest(model: type[Config], path: str) -> str:
    """Return a hint at the key that was probably meant: a sibling, else the same name elsewhere, else anything similar."""
    names = [name for name, _ in every_field(model)]
    parent, _, leaf = path.rpartition(".")
    siblings = [name for name in names if name.rpartition(".")[0] == parent]
    same = [name for name in names if name.rpartition(".")[2] == leaf]
    near = difflib.get_close_matches(path, siblings, n=1, cutoff=0.75) or same or difflib.get_close_matches(path, siblings + names, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; the keys here are {', '.join(name.rpartition('.')[2] for name in siblings)}" if siblings else ""


def expected(info: FieldInfo) -> str:
    """Return what a field takes, in words."""
    return _describe(info.annotation, info.metadata)


def _describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        more = [item for entry in arguments[1:] for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
        return _describe(arguments[0], [*more, *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(branch) for branch in arguments)
    if origin is Literal:
        return " or ".join([", ".join(arguments[:-1]), arguments[-1]] if len(arguments) > 1 else arguments)
    if _is_section(annotation):
        return f"a section with the keys {', '.join(annotation.model_fields)}"
    if origin is dict:
        return f"names with {_describe(arguments[1])} each"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_describe(arguments[0])}"
    if origin is list:
        return f"a list of {_describe(arguments[0]).replace('a number', 'numbers').replace('a text', 'texts')}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}[annotation]
    limits = [
        f"{sign} {getattr(limit, name)}"
        for limit in metadata
        for kind, name, sign in ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))
        if isinstance(limit, kind)
    ]
    return " ".join([words, " and ".join(limits)]).strip()


def _shown(value: Any) -> str:
    """Return a value as YAML would show it, with its type where the text alone would mislead."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, dict):
        return f"a section with the keys {', '.join(map(str, value))}" if value else "an empty section"
    return str(value) if not isinstance(value, float) or math.isfinite(value) else f"{value}, which is not finite"
