"""Prompts: a list of lines, split once into those trained on and those kept for evaluation."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np

from arcopo_fast.errors import UserError


class Prompts(NamedTuple):
    """Disjoint lists, in a fixed order."""

    training: list[str]
    evaluation: list[str]


def prompts_file(name: str) -> Path:
    """Where a recipe's `prompts` lie: "bench" comes with the package, anything else is a path."""
    return Path(str(importlib.resources.files("arcopo_fast.data") / "bench_prompts.txt")) if name == "bench" else Path(name)


def read_prompts(path: str | Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file, one prompt each."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path}: {error}; expected a UTF-8 text file with one prompt on each line") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt; expected one on each line")
    return prompts


def split_prompts(prompts: Sequence[str], evaluation: int, random: np.random.Generator) -> Prompts:
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
