"""Random numbers of the tests: a function of a test's own name, so that a test that fails fails again.

ARCOPO_TEST_SEED=N draws other numbers, the same ones for the same N; `make test-fresh` takes a new N.
"""

from __future__ import annotations

import os
import random
import zlib

import numpy as np
import torch

VARIABLE = "ARCOPO_TEST_SEED"


def seed_of(name: str) -> int:
    """The seed of what has this name, in [0, 2^32)."""
    return zlib.crc32(f"{name} {os.environ.get(VARIABLE, '')}".encode())


def seed_everything(name: str) -> None:
    """Seed torch, numpy and Python's `random` with `seed_of(name)`."""
    seed = seed_of(name)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
