"""Commands as a user runs them: small settings, and what a command left on its streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest

from arcopo_fast.cli import run_command

SMALL = [
    "rollout.prompts_per_iteration=1",
    "rollout.group_size=3",
    "evaluation.prompts=2",
    "evaluation.videos_per_prompt=1",
    "evaluation.sample_videos=1",
    "evaluation.filters=false",
    "evaluation.few_steps=false",
    "lora.rank=4",
    "lora.alpha=8",
]
"""Overrides with which an iteration of a toy, and the evaluations before and after a run, take a second, whatever the objective."""
SMALL_COPO = ["objective.anchors_per_update=2", *SMALL]
"""The same for AR-CoPO."""
SHORT = ["video.chunks=2", "sampler.steps=[1000,300]", "generator.device=cpu"]
"""Overrides of the toy recipe with which a video takes little time."""


class Ended(NamedTuple):
    """A command's exit status, its lines on stderr that are not blank, and what it printed."""

    status: int
    lines: list[str]
    out: str


def outcome(main: Callable[[Sequence[str]], None], capsys: pytest.CaptureFixture[str], *arguments: object) -> Ended:
    """Run a command in this process."""
    status = run_command(main, [str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return Ended(status, [line for line in err.splitlines() if line.strip()], out)
