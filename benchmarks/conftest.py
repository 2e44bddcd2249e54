"""`pytest benchmarks/ --benchmark-only`: collects bench_*.py, measures the ceilings once, prints the table, writes the results.

--results NAME    write NAME.json to $OUT, else to benchmarks/results/<device>/
--seconds S       of samples for each implementation of each case
--compiled WHEN   auto (on a GPU), always, never: measure torch.compile of the references too
--sweep           other block sizes of the Triton kernels, not other implementations, for one case of each model
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

import pytest
import torch

from benchmarks import results, shapes
from benchmarks.measure import Bench, device_clock
from benchmarks.timing import Ceilings, Timer, measure_ceilings

MEASURED = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("operators")
    group.addoption("--results", metavar="NAME", help="write NAME.json to $OUT, else to benchmarks/results/<device>/")
    group.addoption("--seconds", type=float, help="of samples for each implementation of each case (default: 0.5 on a GPU, 0.05 on a CPU)")
    group.addoption("--compiled", choices=("auto", "always", "never"), default="auto", help="measure torch.compile of the references too")
    group.addoption("--sweep", action="store_true", help="measure other block sizes of the Triton kernels, not other implementations")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = {"cases": []}
    # Our table says what its own says and more.
    config.option.benchmark_quiet = True


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    # A file named on the command line is collected by pytest itself; without our options nobody asked for benchmarks.
    asked = hasattr(parent.config.option, "results")
    if asked and file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark(timer=device_clock))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if getattr(config.option, "sweep", False):
        first = {_swept(item): item for item in reversed(items)}
        items[:] = [item for item in items if first[_swept(item)] is item]


def _swept(item: pytest.Item) -> tuple[Any, ...]:
    """Items of one value compile the same kernels: one of them is swept."""
    params = item.callspec.params  # type: ignore[attr-defined]
    shape = params["shape"]
    return item.path, item.originalname, getattr(shape, "model", None), params.get("backward", getattr(shape, "backward", False))  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def timer() -> Timer:
    return Timer(shapes.DEVICE)


@pytest.fixture(scope="session")
def ceilings(timer: Timer, request: pytest.FixtureRequest) -> Ceilings:
    measured = measure_ceilings(timer)
    request.config.stash[MEASURED] |= {"environment": results.environment(shapes.DEVICE), "ceilings": measured._asdict()}
    return measured


@pytest.fixture
def bench(benchmark: Any, timer: Timer, ceilings: Ceilings, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Measures a case; its figures join the session's, a failure by its message."""
    option = request.config.option
    gpu = timer.device.type == "cuda"
    torch.manual_seed(0)
    one = Bench(
        timer,
        ceilings,
        seconds=option.seconds if option.seconds is not None else 0.5 if gpu else 0.05,
        compiled=option.compiled == "always" or (option.compiled == "auto" and gpu),
        swept=request.path.stem.removeprefix("bench_") if option.sweep else None,
        benchmark=benchmark,
    )
    one.figures = {"operator": request.node.name, "mode": "", "case": ""}  # until the case says better
    yield one
    if one.figures.keys() & {"variants", "failed"}:
        request.config.stash[MEASURED]["cases"].append(one.figures)
        _write(request.config)
    if gpu:
        torch.cuda.empty_cache()


@pytest.fixture
def plain_bench(bench: Bench) -> Bench:
    """Without torch.compile, and without block sizes to sweep."""
    if bench.swept:
        pytest.skip("there are no block sizes here")
    bench.compiled = False
    return bench


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except Exception as error:
        if isinstance(one := getattr(item, "funcargs", {}).get("bench"), Bench):
            one.figures["failed"] = f"{type(error).__name__}: {error}".split("\n")[0]
        raise


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured = config.stash[MEASURED]
    if not measured["cases"]:
        return
    terminalreporter.section("operators")
    for line in results.table(measured):
        terminalreporter.write_line(line)
    if path := _write(config):
        terminalreporter.write_line(f"written: {path}")


def _write(config: pytest.Config) -> Path | None:
    """Write what was measured so far, where --results names a file: a session that is killed leaves what it had."""
    if not config.option.results:
        return None
    path = results.folder(shapes.DEVICE) / f"{config.option.results}.json"
    measured: dict[str, Any] = config.stash[MEASURED]
    results.write(path, measured)
    return path
