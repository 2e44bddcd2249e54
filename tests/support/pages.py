"""Small page pools, and what is written to and read from their tables."""

from __future__ import annotations

import torch
from arcopo_kernels import PagePool, PageTable
from torch import Tensor

LAYERS, TOKENS, HEADS, DIM = 2, 3, 2, 4


def make(pages: int, **options: object) -> PagePool:
    return PagePool(layers=LAYERS, pages=pages, tokens_per_page=TOKENS, heads=HEADS, head_dim=DIM, **options)


def append(pool: PagePool, tables: list[PageTable], frames: int) -> tuple[Tensor, Tensor]:
    """Append random frames to every table; what was written, [layers, B, frames * tokens, heads, dim]."""
    pages = pool.allocate(frames * len(tables))
    for row, table in enumerate(tables):
        table.extend(pages[row * frames : (row + 1) * frames])
    return overwrite(pool, tables, len(tables[0]) - frames, len(tables[0]))


def overwrite(pool: PagePool, tables: list[PageTable], start: int, stop: int) -> tuple[Tensor, Tensor]:
    key, value = torch.randn(2, LAYERS, len(tables), (stop - start) * TOKENS, HEADS, DIM, device=pool.keys.device)
    runs = pool.prepare_write(tables, start, stop)
    for layer in range(LAYERS):
        pool.write(layer, runs, key[layer], value[layer])
    return key, value


def read(pool: PagePool, tables: list[PageTable]) -> Tensor:
    """Keys and values as a batch reads them, [2, layers, B, tokens, heads, dim]."""
    runs, batch = pool.runs(tables), len(tables)
    parts = [[pool.read(layer, run) for run in runs] for layer in range(LAYERS)]
    return torch.stack(
        [torch.stack([torch.cat([p[i].expand(batch, -1, -1, -1) for p in layer], dim=1) for layer in parts]) for i in (0, 1)]
    )
