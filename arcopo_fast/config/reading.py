"""Reading a recipe: one YAML file and `key.sub=value` overrides, to a `Config`.

A recipe is self-contained: nothing is inherited from another file. An unknown key, a wrong type or a contradiction is a `UserError` of one
line that says where the value came from, what was expected and, for a misspelt key, which name is nearest.

What an override says is taken whole or refused: a comment, an anchor or a tag in it was meant as text.

YAML is read by the 1.2 core rules: `1e-5` is a number, and only `true` and `false` are booleans. Python's usual reader follows 1.1, where
`1e-5` is a string and `no` is false.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, Sequence

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from arcopo_fast.config.explain import every_field, expected, explain, section_of
from arcopo_fast.config.schema import DEFAULT_OBJECTIVE, Config, config_class, objective_class, objectives
from arcopo_fast.config.sections import expanded
from arcopo_fast.errors import UserError, shorten
from arcopo_fast.storage.textfiles import read_text, text_problem

DEFAULT_RECIPE = "toy"

# YAML ------------------------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """The 1.2 core rules."""


class _Override(_Loader):
    """One value from a command line. What is not part of the value for YAML, such as a comment, was meant to be one here: it is refused."""

    def scan_to_next_token(self) -> None:
        begin = self.pointer
        super().scan_to_next_token()
        if "#" in self.buffer[begin : self.pointer]:
            raise self._dropped("' #' begins a comment")

    def scan_plain(self) -> Any:
        token = super().scan_plain()
        if token.start_mark.line != token.end_mark.line:
            raise self._dropped("a line break becomes a space")
        return token

    def _refuse(self, *unused: Any) -> NoReturn:
        raise self._dropped(f"{self.prefix(3) if self.prefix(3) in ('---', '...') else self.peek()!r} has a meaning of its own in YAML")

    fetch_anchor = fetch_alias = fetch_tag = fetch_directive = fetch_literal = fetch_folded = _refuse
    fetch_document_start = fetch_document_end = _refuse

    def _dropped(self, what: str) -> yaml.scanner.ScannerError:
        return yaml.scanner.ScannerError(None, None, f"{what} in YAML", self.get_mark())


class _Dumper(yaml.SafeDumper):
    """Quotes what either rule set would take for something else than a string; lists stay on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_NUMBER_START = list("-+.0123456789")
_CORE_RULES = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", _NUMBER_START),
    ("tag:yaml.org,2002:float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", _NUMBER_START),
)
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _CORE_RULES:
    for _rules in (_Loader, _Dumper):
        _rules.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    """Return a string; its escapes may spell what is no text."""
    if problem := text_problem(node.value):
        raise yaml.constructor.ConstructorError(None, None, f"a text holds {problem}", node.start_mark)
    return node.value


_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:str", _text)
for _kind in (list, tuple):
    _Dumper.add_representer(_kind, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True))


@dataclass
class _Document:
    """A YAML mapping and the line of each dotted key."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)


def _read_yaml(text: str, source: str, kind: type[_Loader] = _Loader) -> Any:
    """Return a YAML document; a `_Document` if it is a mapping."""
    loader = None
    try:
        loader = kind(text)
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        if isinstance(node, yaml.MappingNode):
            _note_keys(node, "", lines, source, frozenset())
        value = None if node is None else loader.construct_document(node)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = _line(source, mark.line + 1) if mark else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not valid YAML: {problem}") from None
    finally:
        if loader is not None:
            loader.dispose()
    return _Document(value, lines) if isinstance(value, dict) else value


def _line(source: str, line: int) -> str:
    """Return where a line is; an override has one line only."""
    return source if source.startswith("override ") else f"{source}:{line}"


def _note_keys(node: yaml.MappingNode, prefix: str, lines: dict[str, int], source: str, above: frozenset[int]) -> None:
    """Remember the line of each key; a key that stands twice in one mapping is an error."""
    for key, value in node.value:
        line = key.start_mark.line + 1
        where = _line(source, line)
        if key.tag != "tag:yaml.org,2002:str":
            raise UserError(f"{where}: a key must be a name; given {shorten(str(getattr(key, 'value', key)))!r}")
        path = f"{prefix}{key.value}"
        if path in lines:
            raise UserError(f"{where}: the key {shorten(path)} stands twice; remove one")
        lines[path] = line
        if isinstance(value, yaml.MappingNode) and id(value) not in above:
            _note_keys(value, f"{path}.", lines, source, above | {id(node)})


# Reading ---------------------------------------------------------------------------------------------------------------------------


def recipes() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in (files("arcopo_fast") / "recipes").iterdir() if entry.name.endswith(".yaml")
    )


def load_config(recipe: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply overrides, in their order.

    Args:
        recipe: a path to a YAML file, or the name of a recipe of the package, with or without ".yaml"; None: the default.
        overrides: `key.sub=value`; the value is YAML, so `sampler.steps=[1000, 500]` works.

    Raises:
        UserError: with one line, for anything that cannot be used.
    """
    source, text = _find_recipe(recipe or DEFAULT_RECIPE)
    document = _read_yaml(text, source)
    if not isinstance(document, _Document):
        raise UserError(f"{source}: a recipe maps keys to values; this file {'is empty' if document is None else 'holds something else'}")
    origins = {path: f"{source}:{line}" for path, line in document.lines.items()}
    for override in overrides:
        _apply(document.values, override, origins)
    objective = document.values.get("objective")
    kind = objective.get("kind", DEFAULT_OBJECTIVE) if isinstance(objective, dict) else DEFAULT_OBJECTIVE
    try:
        model = config_class(kind if isinstance(kind, str) else DEFAULT_OBJECTIVE)
    except UserError as error:
        raise UserError(f"{origins.get('objective.kind') or origins['objective']}: {error}") from None
    try:
        return model.model_validate(document.values)
    except ValidationError as error:
        raise UserError(explain(error, model, origins, source)) from None


def resolved_yaml(config: Config) -> str:
    """Return the whole configuration as YAML; reading it gives the same configuration."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


def _find_recipe(recipe: str) -> tuple[str, str]:
    """Return the recipe's name for messages, and its text."""
    path = Path(expanded(recipe))
    named = files("arcopo_fast") / "recipes" / f"{recipe.removesuffix('.yaml')}.yaml"
    try:
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return recipe, read_text(path)
        if "/" not in recipe and named.is_file():
            return named.name, named.read_text(encoding="utf-8")
        if path.is_file():
            return recipe, read_text(path)
    except (OSError, ValueError) as error:  # ValueError: no file system takes such a path
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read the recipe {shorten(recipe)!r}: {getattr(error, 'strerror', None) or error}") from None
    near = difflib.get_close_matches(recipe.removesuffix(".yaml"), recipes(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"unknown recipe {shorten(recipe)!r}: {hint}give the path of a YAML file or one of: {', '.join(recipes())}")


def _apply(values: dict[str, Any], override: str, origins: dict[str, str]) -> None:
    """Set one dotted key."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    origin = f"override {shorten(override)!r}"
    if not equals or not all(keys) or any(character.isspace() for character in path):
        raise UserError(f"{origin}: an override has the form key.sub=value, as in optimizer.lr=1e-4")
    try:
        value = _read_yaml(text, origin, _Override)
    except UserError as error:
        raise UserError(f"{error}; {_in_quotes(path, text)}") from None
    section: dict[str, Any] = values
    for depth, key in enumerate(keys[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
        if not isinstance(section[key], dict):
            raise UserError(f"{origin}: {'.'.join(keys[:depth])} is a value, not a section")
        section = section[key]
    section[keys[-1]] = value.values if isinstance(value, _Document) else value
    for replaced in [key for key in origins if key == path or key.startswith(f"{path}.")]:
        del origins[replaced]
    origins[path] = origin


def setting(path: str, text: str) -> str:
    """Return the override that sets a key to a text, whatever YAML would take it for."""
    return f"{path}={json.dumps(text, ensure_ascii=False)}"


def _in_quotes(path: str, text: str) -> str:
    """Return how to write an override whose text is more than a text to YAML; the quotes must reach it past the shell's."""
    if len(text) > 60 or text_problem(text):
        return "a text is taken whole in quotes, without control characters"
    return f"a text is taken whole in quotes: {shlex.quote(setting(path, text.strip()))}"


# Help ------------------------------------------------------------------------------------------------------------------------------


def keys_help() -> str:
    """Return every key that a recipe or an override can set: its default, what it takes and what it means."""
    lines = []
    fields = list(every_field(config_class(DEFAULT_OBJECTIVE)))
    for path, info in sorted(fields, key=lambda item: "." in item[0] or section_of(item[1]) is not None):  # single keys first
        section = section_of(info)
        lines += [f"\n{path}: {section.__doc__}"] if section else _key_help(path, info)
    shown = dict(fields)
    for kind in objectives():
        settings = objective_class(kind).Settings
        own = {f"objective.{name}": info for name, info in settings.model_fields.items()}
        different = [
            line
            for path, info in own.items()
            if path != "objective.kind" and (path not in shown or _default(info) != _default(shown[path]))
            for line in _key_help(path, info)
        ]
        if kind != DEFAULT_OBJECTIVE:
            lines += [f"\nobjective, with objective.kind={kind}: {settings.__doc__}", *different]
    return "\n".join(lines)


def _key_help(path: str, info: FieldInfo) -> list[str]:
    default = "(required)" if info.is_required() else f"= {yaml.dump([_default(info)], Dumper=_Dumper, width=1000).strip()[1:-1]}"
    return [f"  {path} {default}", f"      {info.description} [{expected(info)}]"]


def _default(info: FieldInfo) -> Any:
    return info.get_default(call_default_factory=True)
