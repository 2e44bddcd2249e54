"""The toy's rewards as judges would give them that err, in three ways and by chosen amounts.

    White     a number drawn from the video's bytes: the errors of two videos have nothing to do with each other, however alike they are
    Smooth    a fixed random convolutional network on the frames: an optimizer can follow such an error
    Rounded   the score comes in steps, as from a judge that has few grades

How the errors of a learned judge are made up we do not know; these are three corners. The amount, a level, is the standard deviation of the
error in standard deviations of the score itself over videos of the untrained generator. A score's name says both, as in
erring:Smooth:toy_vq_0.5; level 0 is the exact score. What a level is in the score's own units is measured once, into a file that
ERRING_SCALES names:

    export PYTHONPATH=examples/paper_at_small_scale ERRING_SCALES=runs/erring.json
    python -m erring toy --out $ERRING_SCALES
    python -m arcopo_fast.train toy 'rewards={"erring:Smooth:toy_vq_0.5": 1, "erring:Smooth:toy_vq_0": 0}'
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from arcopo_fast.build import build_engine, load_generator, load_prompts
from arcopo_fast.cli import RecipeParser, run_command
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.judging import judge, videos_at_once
from arcopo_fast.rewards.base import score
from arcopo_fast.rewards.registry import load_rewards
from arcopo_fast.rollout.noise import normal
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.storage.atomic import atomic_write

EXACT = ("toy_vq", "toy_mq", "toy_ta")
LEVELS = (0.25, 0.5, 1.0)
SCALES = "ERRING_SCALES"


class Erring:
    """Every score in `EXACT`, exact and with an error of every level. scales: of each, see `scales_of`; None: those of the file."""

    scores = tuple(f"{name}_{level:g}" for name in EXACT for level in (0, *LEVELS))

    def __init__(self, scales: Mapping[str, Mapping[str, float]] | None = None) -> None:
        if scales is None:
            if not os.environ.get(SCALES):
                raise UserError(f"set {SCALES} to the file that python -m erring RECIPE --out FILE has written")
            scales = json.loads(Path(os.environ[SCALES]).read_text(encoding="utf-8"))
        self.exact = load_rewards(EXACT)
        self.scales = scales

    def __call__(self, frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        exact, units = score(self.exact, frames, prompts), self.units(frames)
        erring = {f"{name}_{level:g}": self.judged(name, exact[name], units.get(name), level) for name in EXACT for level in LEVELS}
        return erring | {f"{name}_0": scores for name, scores in exact.items()}

    def units(self, frames: Tensor) -> dict[str, Tensor]:
        """Return errors [N] with mean 0 and standard deviation 1, by the score's name."""
        return {}

    def judged(self, name: str, exact: Tensor, unit: Tensor | None, level: float) -> Tensor:
        """Return the scores [N] that are given."""
        assert unit is not None
        return exact + level * self.scales[name]["spread"] * unit


class White(Erring):
    """Errors without a slope: those of equal videos are equal, and that is all."""

    def units(self, frames: Tensor) -> dict[str, Tensor]:
        digests = [hashlib.blake2b(video.contiguous().numpy()).hexdigest() for video in frames.cpu()]
        return {name: torch.cat([normal((1,), "white error", name, digest) for digest in digests]).to(frames.device) for name in EXACT}


class Smooth(Erring):
    """Errors with a slope."""

    def units(self, frames: Tensor) -> dict[str, Tensor]:
        raw = network(frames)
        return {name: (raw[name] - self.scales[name]["mean"]) / self.scales[name]["std"] for name in EXACT}


class Rounded(Erring):
    """Scores in steps of sqrt(12) standard deviations of the error: that of a number which may lie anywhere in its step.

    At a level of 1 a score takes two or three values, and the error is a little smaller than its level says.
    """

    def judged(self, name: str, exact: Tensor, unit: Tensor | None, level: float) -> Tensor:
        step = 12**0.5 * level * self.scales[name]["spread"]
        return (exact / step).round() * step


def network(frames: Tensor) -> dict[str, Tensor]:
    """Return a number [N] for each score: two random convolutions over time and space, their mean over both, a random mixture of these."""
    video = frames.movedim(1, 2) - 0.5  # [N, 3, F, H, W]
    for layer, (inputs, outputs) in enumerate(((3, 8), (8, 16))):
        weight = normal((outputs, inputs, 3, 5, 5), "smooth error", f"layer {layer}").to(frames.device)
        video = F.conv3d(video, 3 * weight / (inputs * 75) ** 0.5, stride=2, padding=(1, 2, 2)).tanh()
    pooled = video.mean((2, 3, 4))  # [N, 16]
    return {name: pooled @ normal((16,), "smooth error", name).to(frames.device) for name in EXACT}


def scales_of(scores: Mapping[str, Tensor], raw: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return, of each score, its standard deviation over videos, and mean and standard deviation of the network's raw numbers."""
    return {
        name: {
            "spread": scores[name].double().std(correction=0).item(),
            "mean": raw[name].double().mean().item(),
            "std": raw[name].double().std(correction=0).item(),
        }
        for name in EXACT
    }


def measure(config: Config) -> dict[str, dict[str, float]]:
    """Return the scales over the recipe's evaluation videos, made by the untrained generator."""
    generator, exact = load_generator(config), load_rewards(EXACT)
    engine = build_engine(config, generator.model, videos=videos_at_once(config), vae=generator.decoder.vae)
    wanted = [prompt for prompt in load_prompts(config).evaluation for _ in range(config.evaluation.videos_per_prompt)]
    batch, scores, raw = videos_at_once(config), [], []
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        for frames, judged in judge(config, generator, engine, part, range(start, start + len(part)), exact):
            scores.append(judged)
            raw.append(network(frames))
    return scales_of(*({name: torch.cat([part[name] for part in parts]) for name in EXACT} for parts in (scores, raw)))


@torch.no_grad()
def main(argv: list[str]) -> None:
    """Run the command."""
    parser = RecipeParser("python -m erring", "Measure how large the errors of judges that err are.", one_process=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file of the scales")
    command: tuple[Config, Any] | None = parser.read_config(argv)
    if command is not None:
        config, options = command
        tune_for_cpu(config.train.threads)
        atomic_write(options.out, json.dumps(measure(config), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
