"""The sizes the operators are measured at: causal Wan 2.1 at 480x832, three latent frames a chunk, groups of twelve (AR-CoPO)."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Model(NamedTuple):
    """The operators' view of a generator; `grid` is the height and width of a latent frame in tokens."""

    name: str
    heads: int
    head_dim: int
    layers: int
    grid: tuple[int, int]
    chunk_frames: int = 3

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def frame(self) -> int:
        """Tokens of a latent frame: one page."""
        return self.grid[0] * self.grid[1]

    @property
    def chunk(self) -> int:
        """Tokens of a chunk: the queries of one call."""
        return self.frame * self.chunk_frames


WAN_1_3B = Model("Wan 1.3B", heads=12, head_dim=128, layers=30, grid=(30, 52))
WAN_14B = Model("Wan 14B", heads=40, head_dim=128, layers=40, grid=(30, 52))
SMALL = Model("small", heads=2, head_dim=16, layers=2, grid=(4, 6))
"""Small shapes, only to run the suite on a CPU."""

LATENT = 3 * 16 * 60 * 104
"""Elements of a chunk's latent, [3 frames, 16 channels, 60, 104]."""
GROUP = 12
STEPS = 4
ANCHORS = 16
"""Four symmetric anchors at each of the four denoising steps."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ACTIVATIONS = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
"""The dtype of hidden states, queries, keys and values."""


def cases(gpu: list[T], cpu: list[T]) -> list[T]:
    """The cases of this machine: realistic ones where there is a GPU, small ones elsewhere."""
    return gpu if DEVICE.type == "cuda" else cpu
