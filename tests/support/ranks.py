"""Several ranks in one test: forked processes that join a world over gloo, as torchrun's do."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from arcopo_fast.cli import run_command
from arcopo_fast.config.reading import load_config
from arcopo_fast.errors import UserError
from arcopo_fast.runtime.distributed import World
from arcopo_fast.training.trainer import Trainer
from support.commands import Ended

# c10d asks for the name of every address, and where a name server does not answer each question takes 5 s by default.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


def run_ranks(size: int, work: Callable[..., Any], *arguments: Any, timeout: float = 60.0, within: float = 120.0) -> list[Any]:
    """Return what `work(world, *arguments)` returns on each of `size` ranks, or the UserError that it raises there; any other error fails.

    Args:
        timeout: of the world, in seconds.
        within: seconds in which all must have answered.
    """

    def joined() -> Any:
        with World.joined(timeout) as world:
            try:
                return work(world, *arguments)
            except UserError as error:
                return type(error)(str(error))

    return _run(size, joined, within)


def run_commands(
    size: int, main: Callable[[list[str]], int | None], *arguments: object, within: float = 120.0, killed: int | None = None
) -> list[Ended]:
    """Return how a command has ended on each of `size` ranks that were started as torchrun starts them.

    Args:
        within: seconds in which all must have ended.
        killed: a rank that does not live to say so; its place is taken by the status of a kill.
    """

    def show(message: Any, category: type[Warning], file: str, line: int, *unused: Any) -> None:
        print(warnings.formatwarning(message, category, file, line), end="", file=sys.stderr)

    def command() -> Ended:
        warnings.showwarning = show  # pytest's records them
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            status = run_command(main, [str(argument) for argument in arguments])
        return Ended(status, [line for line in err.getvalue().splitlines() if line.strip()], out.getvalue())

    return _run(size, command, within, {} if killed is None else {killed: Ended(-signal.SIGKILL, [], "")})


@cache
def load_libraries() -> None:
    """Load what a trainer needs, seconds of imports, before ranks are forked, so that they need not."""
    Trainer(load_config("toy"))


def _run(size: int, work: Callable[[], Any], within: float, silent: Mapping[int, Any] | None = None) -> list[Any]:
    """Run `work` in forked processes, so that neither libraries nor what a fixture has built are loaded again."""
    fork = multiprocessing.get_context("fork")
    there, here = fork.Pipe()
    # In a process of its own: in a forked rank, the end of a store that lives here would wait for a thread that is not there.
    store = fork.Process(target=_store, args=(there,), daemon=True)
    store.start()
    port = here.recv()
    processes, pipes = [], []
    for rank in range(size):
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=_rank, args=(rank, size, port, sender, work))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    results, failures = [], []
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(within):
                failures.append(f"rank {rank} gave no answer within {within:g} s")
                continue
            try:
                good, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                good, value = False, f"rank {rank} ended without an answer"
                if silent and rank in silent:
                    good, value = True, silent[rank]
            (results if good else failures).append(value)
    finally:
        for process in processes:
            process.join(0 if failures else 20)
            process.kill()
            process.join()
        store.kill()
        store.join()
    if failures:
        pytest.fail("\n".join(failures))
    return results


def _store(pipe: Any) -> None:
    """Hold the store through which ranks find one another, until killed."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    pipe.recv()


def _rank(rank: int, size: int, port: int, sender: Any, work: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": "0"})
    try:
        sender.send_bytes(pickle.dumps((True, work())))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, f"rank {rank}:\n{traceback.format_exc()}")))
    finally:
        os._exit(0)
