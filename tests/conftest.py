"""Every test draws the random numbers that belong to its name, see `support.seeds`.

Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before the first import of triton.
"""

from __future__ import annotations

import os
import random
from functools import cache
from typing import Any, Generator

import numpy as np
import pytest
import torch
from support.seeds import VARIABLE, seed_everything

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

try:
    from hypothesis import settings
except ImportError:  # the tests that need it are skipped
    pass
else:  # its examples follow from each test's name too, but for new seeds
    settings.register_profile("repeatable", derandomize=VARIABLE not in os.environ, print_blob=True)
    settings.load_profile("repeatable")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give the tests of a file with fixtures that they share to one worker, which makes these once; every other test goes anywhere."""
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def shares(file: str) -> bool:
        return 'scope="module"' in (config.rootpath / file).read_text()

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if shares(file) else nodeid

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if VARIABLE in os.environ and terminalreporter.stats.get("failed"):
        terminalreporter.write_line(f"to repeat these failures: {VARIABLE}={os.environ[VARIABLE]} pytest ...")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a Triton kernel runs: the CPU in Triton's interpreter, or a GPU. One process can do only one of the two."""
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        pytest.skip("kernels are compiled in this process: there is a GPU")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seed every test with its own name."""
    seed_everything(request.node.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
    """Seed a fixture that several tests share with its own name, whichever test asks for it first."""
    if fixturedef.scope == "function":
        return (yield)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed_everything(f"{fixturedef.baseid}::{fixturedef.argname}[{getattr(request, 'param', '')}]")
    try:
        return (yield)
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
