"""Several ranks in one test: forked processes that join a world over gloo, as torchrun's do."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from arcopo_fast.errors import UserError
from arcopo_fast.runtime.distributed import World


def run_ranks(size: int, work: Callable[..., Any], *arguments: Any, timeout: float = 60.0, within: float = 120.0) -> list[Any]:
    """Return what `work(world, *arguments)` returns on each of `size` ranks, or the UserError that it raises there; any other error fails.

    The processes are forked, so that neither libraries nor what a fixture has built are loaded again.

    Args:
        timeout: of the world, in seconds.
        within: seconds in which all must have answered.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    fork = multiprocessing.get_context("fork")
    processes, pipes = [], []
    for rank in range(size):
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=_rank, args=(rank, size, store.port, sender, work, arguments, timeout))
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
            (results if good else failures).append(value)
    finally:
        for process in processes:
            process.join(0 if failures else 20)
            process.kill()
            process.join()
    if failures:
        pytest.fail("\n".join(failures))
    return results


def _rank(rank: int, size: int, port: int, sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...], timeout: float) -> None:
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": "0"})
    try:
        with World.joined(timeout) as world:
            try:
                answer = True, work(world, *arguments)
            except UserError as error:
                answer = True, type(error)(str(error))
            sender.send_bytes(pickle.dumps(answer))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, f"rank {rank}:\n{traceback.format_exc()}")))
    finally:
        os._exit(0)
