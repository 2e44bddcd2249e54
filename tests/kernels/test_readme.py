"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
EXAMPLES = {re.findall(r"(?:import|class) (\w+)", example)[-1]: example for example in re.findall(r"```python\n(.*?)```", README, re.S)}
"""By the last name that each imports, or the class that it defines."""


def run(name: str) -> dict[str, Any]:
    """What an example leaves behind."""
    names: dict[str, Any] = {}
    # Not under this file's own __future__ imports.
    exec(compile(EXAMPLES[name], "kernels/README.md", "exec", dont_inherit=True), names)
    return names


def test_there_is_one_for_each_operator() -> None:
    assert len(EXAMPLES) >= 10 and len(EXAMPLES) == README.count("```python")


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    run(name)
