"""What the package asks for and what `make` installs: no upper bounds for others, pinned versions for the tests."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
KNOWN_TO_BREAK: set[str] = set()
"""Names of distributions that may have an upper bound, each with its reason beside it in pyproject.toml."""


def requirements(section: str) -> list[Requirement]:
    """The requirements of one list in pyproject.toml; read by hand, since Python 3.10 has no tomllib."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(rf"^{section} = \[\n(.*?)^\]", text, re.M | re.S)
    assert match, section
    return [Requirement(line) for line in re.findall(r'^\s+"([^"]+)"', match[1], re.M)]


PINNED = [
    Requirement(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")
]
ASKED = [*requirements("dependencies"), *requirements("test")]


@pytest.mark.parametrize("requirement", ASKED, ids=str)
def test_no_requirement_has_an_upper_bound(requirement: Requirement) -> None:
    bounds = {specifier.operator for specifier in requirement.specifier}
    assert bounds <= {">=", "!="} or requirement.name in KNOWN_TO_BREAK, f"{requirement}: who has a newer release could not install us"


@pytest.mark.parametrize("requirement", ASKED, ids=str)
def test_what_make_installs_is_pinned_and_is_what_is_asked_for(requirement: Requirement) -> None:
    pins = [pin for pin in PINNED if canonicalize_name(pin.name) == canonicalize_name(requirement.name)]
    assert len(pins) == 1, f"{requirement.name} is not in constraints.txt"
    (pin,) = pins[0].specifier
    assert pin.operator == "==" and requirement.specifier.contains(pin.version)


def test_the_pins_are_a_set_that_can_be_installed_together() -> None:
    """Among those that are installed here in just these versions, as after `make`, each is content with the others."""
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in PINNED}
    checked = 0
    for name, version in versions.items():
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.version.partition("+")[0] != version:
            continue
        for line in found.requires or ():
            needed = Requirement(line)
            other = versions.get(canonicalize_name(needed.name))
            if other is not None and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
                assert needed.specifier.contains(other, prereleases=True), f"{name} {version} asks for {needed}"
                checked += 1
    pins_are_here = importlib.metadata.version("torch").partition("+")[0] == versions["torch"]
    assert checked > 20 or not pins_are_here
