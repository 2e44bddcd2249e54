"""Every test draws fresh random inputs; the seed is printed with a failure, and ARCOPO_TEST_SEED repeats it."""

from __future__ import annotations

import os
import random
from typing import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_seed() -> Iterator[None]:
    seed = int(os.environ.get("ARCOPO_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"ARCOPO_TEST_SEED={seed}")
    torch.manual_seed(seed)
    yield
