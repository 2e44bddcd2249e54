"""Every test draws the random numbers that belong to its name, see `support.seeds`.

Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before the first import of triton.
"""

from __future__ import annotations

import os
import random
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


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        assert isinstance(item, pytest.Function)
        definitions = item._fixtureinfo.name2fixturedefs.values()
        if any(definition[-1].scope == "module" for definition in definitions):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))  # on one worker, so that they are made once
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
    """Seed every test with its own name, to which pytest-xdist adds that of its group."""
    group = request.node.get_closest_marker("xdist_group")
    seed_everything(request.node.nodeid.removesuffix(f"@{group.args[0]}" if group else ""))


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
