"""The place of a process in its job, as its launcher tells it. Needs no PyTorch, so that a command knows it before anything is imported."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from arcopo_fast.errors import UserError


class Place(NamedTuple):
    """The place of a process in its job, as its launcher tells it.

    Attributes:
        rank, size: number of the process, and how many there are.
        local_rank: number of the process on its machine: that of its GPU.
        address, port: where rank 0, or its launcher, can be reached.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def place_of(environment: Mapping[str, str]) -> Place | None:
    """Return this process's place by torchrun's variables, or by SLURM's for a step with several tasks; None: it was started alone.

    Raises:
        UserError: variables are missing, or are no numbers.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _place(environment, {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}, environment.get("MASTER_PORT"))
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "SLURM_PROCID" in environment:
        job = environment.get("SLURM_JOB_ID", "0")
        nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
        port = environment.get("MASTER_PORT") or str(20000 + int(re.sub(r"\D", "", job) or 0) % 40000)
        names = {"rank": "SLURM_PROCID", "size": "SLURM_STEP_NUM_TASKS", "local_rank": "SLURM_LOCALID"}
        return _place({"MASTER_ADDR": first_host(nodes)} | dict(environment), names, port)
    return None


def _place(environment: Mapping[str, str], names: Mapping[str, str], port: str | None) -> Place | None:
    values = {field: environment.get(name, "") for field, name in names.items()}
    if values["size"] == "1":
        return None
    needed = {**{names[field]: value for field, value in values.items()}, "MASTER_PORT": port or ""}
    if wrong := [name for name, value in needed.items() if not value.isdecimal()]:
        raise UserError(
            f"{wrong[0]} is {needed[wrong[0]]!r}, which is no number: some of the variables of a launcher are set, and not all; start the "
            "command with torchrun, or unset RANK and WORLD_SIZE to run one process"
        )
    if not environment.get("MASTER_ADDR"):
        raise UserError("MASTER_ADDR is not set: start the command with torchrun, or set it to the host of rank 0")
    rank, size, local_rank = (int(values[field]) for field in ("rank", "size", "local_rank"))
    return Place(rank, size, local_rank, environment["MASTER_ADDR"], int(needed["MASTER_PORT"]))


def first_host(nodes: str) -> str:
    """Return the first host of a list as SLURM writes it, such as node[03-05,9],gpu1; empty for an empty list."""
    prefix, bracket, rest = nodes.partition("[")
    return (
        prefix.split(",")[0]
        if not bracket or "," in prefix
        else prefix + re.split(r"[-,\]]", rest)[0] + rest.partition("]")[2].split(",")[0]
    )


def launcher() -> str:
    """Return how a command line begins that starts as many processes as this one's did."""
    place = place_of(os.environ)
    if place is None:
        return "python"
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return f"torchrun --nproc_per_node={local}" if local == str(place.size) else "the launcher of all ranks, and"


def job() -> str | None:
    """Return a name of the torchrun that started this process, the same when it starts it again; None where there is none."""
    agent = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if agent is None else f"{socket.gethostname()} {os.getppid()} {agent}"


def started_again() -> bool:
    """Return whether torchrun has started this job before (`--max-restarts`)."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
