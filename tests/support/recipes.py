"""A small recipe whose numbers the expected messages name (the shipped recipes may change), and what reading it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError

BASE = """
name: base
video: {chunks: 4, chunk_frames: 2, latent_height: 8, latent_width: 8, fps: 8}
sampler: {steps: [1000, 350], warp: false, shift: 1.0}
optimizer:
  lr: 0.001
lora:
  rank: 16
rewards: {toy_vq: 1, toy_mq: 1}
evaluation: {prompts: 8, videos_per_prompt: 4}
"""


def load(*overrides: str) -> Config:
    return load_config("base.yaml", overrides)


def message(*overrides: str, recipe: str = "base.yaml") -> str:
    with pytest.raises(UserError) as error:
        load_config(recipe, overrides)
    text = str(error.value)
    assert "\n" not in text
    return text


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
