"""Every test draws fresh random inputs; the seed is printed with a failure, and ARCOPO_TEST_SEED repeats it.

Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before the first import of triton.
"""

from __future__ import annotations

import os
import random
from typing import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a Triton kernel runs: the CPU in Triton's interpreter, or a GPU. One process can do only one of the two."""
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        pytest.skip("kernels are compiled in this process: there is a GPU")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def fresh_seed() -> Iterator[None]:
    seed = int(os.environ.get("ARCOPO_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"ARCOPO_TEST_SEED={seed}")
    torch.manual_seed(seed)
    yield
