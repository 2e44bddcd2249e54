"""How much each noise decides: replace one noise tensor at a time and measure the change of the output.

In few-step autoregressive generators the initial noise of a chunk decides what it shows and re-noises barely matter (AR-CoPO, Figure 6).
That is why AR-CoPO explores through it, and a toy world must share the property to be worth training on.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.rollout.cache import CachePolicy
from arcopo_fast.rollout.engine import Engine, SamplerSettings, VideoShape
from arcopo_fast.rollout.noise import KeyedNoise, NoiseSource, StackedNoise


@dataclass(frozen=True)
class Replaced:
    """A noise source with one tensor of chunk `chunk` taken from another: the initial noise (step None) or one re-noise."""

    base: NoiseSource
    other: NoiseSource
    chunk: int
    step: int | None

    def initial(self, chunk: int) -> Tensor:
        return (self.other if (chunk, None) == (self.chunk, self.step) else self.base).initial(chunk)

    def renoise(self, chunk: int, step: int) -> Tensor:
        return (self.other if (chunk, step) == (self.chunk, self.step) else self.base).renoise(chunk, step)


def noise_influence(
    model: CausalWan, text: Tensor, shape: VideoShape, sampler: SamplerSettings, *, seed: int
) -> dict[str, list[float]]:
    """Mean squared change of the whole latent video, averaged over prompts, for each pivot chunk.

    Args:
        text: prompts [B, length, text_dim], one video each.

    Returns:
        {"initial": [L], "renoise1": [L], ..., "ratio": [L]}; ratio is the initial noise's change over the largest change of any re-noise.
    """
    batch = text.shape[0]
    engine = Engine(model, shape, sampler, CachePolicy(), pages=Engine.pages_for(shape, batch))

    def source(offset: int) -> NoiseSource:
        return StackedNoise([KeyedNoise(shape.chunk, seed + offset, group=row) for row in range(batch)])

    base, other = source(0), source(1)
    unchanged = engine.generate(text, base)
    steps: list[int | None] = [None, *range(len(engine.steps) - 1)]
    changes: dict[str, list[float]] = {"initial" if step is None else f"renoise{step + 1}": [] for step in steps}
    for chunk in range(shape.chunks):
        for step in steps:
            changed = engine.generate(text, Replaced(base, other, chunk, step))
            changes["initial" if step is None else f"renoise{step + 1}"].append((changed - unchanged).square().mean().item())
    renoises = [values for name, values in changes.items() if name != "initial"]
    return changes | {"ratio": [a / max(b) for a, *b in zip(changes["initial"], *renoises)]}
