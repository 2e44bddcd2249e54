"""The processes of one job: which of them this is, and what they tell each other.

    torchrun --nproc_per_node=8 -m arcopo_fast.train self_forcing        one process for each GPU, a rank
    srun --ntasks-per-node=8 python -m arcopo_fast.train self_forcing    the same by SLURM

A process that was started alone is a world of one: nothing is set up, and everything here is the identity.
Numbers and messages go over gloo, so that no GPU waits for them; tensors go the way of their device, on GPUs over NCCL.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from arcopo_fast.errors import RankLost, UserError
from arcopo_fast.runtime.place import place_of
from arcopo_fast.runtime.profiling import stage

T = TypeVar("T")

TIMEOUT = 1800.0
"""Seconds that a rank waits for the others before it ends the job."""
WORK = 86400.0
"""The same where the others may be at work. A rank that ends is noticed before."""
BUCKET = 1 << 26
"""Bytes that are summed over the ranks at once: fewer calls, and no second copy of everything."""


@dataclass(frozen=True)
class World:
    """Some processes that work together: all of a job, or a team of them. By default one process alone.

    Every method that has the others do something must be called by all of them, in the same order.

    Attributes:
        rank, size: number of this process among them, and how many they are.
        ranks: their numbers in the job.
        timeout: seconds to wait for one another.
        local_rank: number of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    ranks: tuple[int, ...] = (0,)
    timeout: float = TIMEOUT
    local_rank: int = 0
    _control: Any = field(default=None, repr=False)  # process groups: for messages from the host, and for tensors of any device
    _tensors: Any = field(default=None, repr=False)
    _patient: Any = field(default=None, repr=False)  # of a whole job, for waiting long

    @classmethod
    @contextmanager
    def joined(cls, timeout: float = TIMEOUT) -> Iterator[World]:
        """Join the job that this process belongs to, for as long as the block lasts.

        Raises:
            UserError: the launcher's variables cannot be used, the others do not come, or this machine has fewer GPUs than processes.
        """
        place = place_of(os.environ)
        if place is None:
            yield cls()
            return
        if torch.cuda.is_available():
            if place.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"rank {place.rank} is process {place.local_rank + 1} of {socket.gethostname()}, which has {torch.cuda.device_count()} "
                    "GPUs; start as many processes as there are GPUs: --nproc_per_node"
                )
            torch.cuda.set_device(place.local_rank)
        os.environ.update({"RANK": str(place.rank), "WORLD_SIZE": str(place.size), "LOCAL_RANK": str(place.local_rank)})
        os.environ.update({"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)})
        patience, ranks = timedelta(seconds=timeout), tuple(range(place.size))
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=patience))
            # torchrun's store outlives the ranks: what those of an earlier attempt left there would lead these to processes that are gone.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
            control = dist.new_group(backend="gloo", timeout=patience) if torch.cuda.is_available() else dist.group.WORLD
            patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=WORK))
        except (RuntimeError, ValueError) as error:
            where = f"{place.size} ranks at {place.address}:{place.port}"
            raise UserError(f"rank {place.rank} could not join {where}: {str(error).splitlines()[0]}") from error
        yield cls(place.rank, place.size, ranks, timeout, place.local_rank, control, dist.group.WORLD, patient)
        dist.destroy_process_group()  # not after an error: NCCL would wait for the others, and the user for the error

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.size == 1

    @property
    def backend(self) -> str:
        """Name of what sums tensors over the ranks."""
        return "gloo" if self._tensors is self._control else "nccl"

    def mine(self, count: int) -> range:
        """Return this process's share of `count` pieces of work: every `size`-th from `rank` on."""
        return range(self.rank, count, self.size)

    def team(self, size: int, timeout: float | None = None) -> World:
        """Return the team of `size` consecutive ranks that this process is in.

        timeout: of that team, which then has channels of its own, whatever its size.
        """
        if size == self.size and timeout is None:
            return self
        if self.size % size:
            raise ValueError(f"{self.size} ranks are not teams of {size}")
        timeout = self.timeout if timeout is None else timeout
        if size == 1:
            return World(ranks=(self.ranks[self.rank],), timeout=timeout, local_rank=self.local_rank)
        patience, mine = timedelta(seconds=timeout), None
        for start in range(0, self.size, size):  # everybody takes part in the making of every team
            ranks = self.ranks[start : start + size]
            control = dist.new_group(list(ranks), backend="gloo", timeout=patience)
            tensors = dist.new_group(list(ranks), timeout=patience) if torch.cuda.is_available() else control
            if self.ranks[self.rank] in ranks:
                mine = World(self.rank - start, size, ranks, timeout, self.local_rank, control, tensors)
        assert mine is not None
        return mine

    # What they tell each other. They meet first, so that a rank that does not come is named.

    def gathered(self, value: T) -> list[T]:
        """Return everybody's value, by rank. It is pickled, so it is small and lies on the CPU."""
        if self.alone:
            return [value]
        self.meet("tell how it stands")
        values: list[Any] = [None] * self.size
        with stage("wait"):
            self.together(lambda: dist.all_gather_object(values, value, group=self._control))
        return values

    def from_main(self, value: T) -> T:
        """Return rank 0's value."""
        values: list[Any] = self.gathered(value if self.is_main else None)
        return values[0]

    def total(self, number: float) -> float:
        """Return the sum of everybody's number."""
        return sum(self.gathered(number))

    def mean(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of everybody's numbers by name; one who lacks a name has 0."""
        everybodys = self.gathered(dict(numbers))
        names = dict.fromkeys(name for rank in everybodys for name in rank)
        return {name: sum(rank.get(name, 0.0) for rank in everybodys) / self.size for name in names}

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set anywhere."""
        return any(self.gathered(flag))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their sums over all ranks."""
        if self.alone:
            return
        self.meet("sum up")
        with stage("reduce"):
            for bucket in _buckets(tensors):
                flat = torch.cat([tensor.flatten() for tensor in bucket])
                self.together(lambda: dist.all_reduce(flat, group=self._tensors))  # noqa: B023, called at once
                for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
                    tensor.copy_(part.view_as(tensor))

    def concatenated(self, tensor: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        """Return everybody's tensors side by side along `dim`, where rank r's has `sizes[r]` entries."""
        if self.alone:
            return tensor
        self.meet("share what it made")
        rows = tensor.movedim(dim, 0).contiguous()
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        with stage("wait"):
            self.together(lambda: dist.all_gather(parts, padded, group=self._tensors))
        return torch.cat([part[:size] for part, size in zip(parts, sizes)]).movedim(0, dim).contiguous()

    def meet(self, what: str) -> None:
        """Wait until everybody is here.

        Raises:
            RankLost: some did not come in time; on rank 0 the message names them.
        """
        self._meet(self._control, what, self.timeout)

    def meet_after_work(self, what: str) -> None:
        """Wait until everybody in the job is here, however long the others' work takes: a download, or their share of the videos.

        Raises:
            RankLost: another rank has ended.
        """
        self._meet(self._patient, what, WORK)

    def _meet(self, group: Any, what: str, timeout: float) -> None:
        if not self.alone:
            patience = timedelta(seconds=timeout)
            with stage("wait"):
                if self._tensors is not self._control:
                    torch.cuda.synchronize()  # the others wait for this rank's device, too
                self.together(lambda: dist.monitored_barrier(group, timeout=patience, wait_all_ranks=True), what, timeout)

    @contextmanager
    def in_turn(self, what: str) -> Iterator[None]:
        """Let rank 0 go through the block first, then a rank of each machine, then the others: what one leaves on the disk the next finds.

        A rank that fails in the block ends the others.
        """
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.meet_after_work(what)
        yield
        for _ in range(2 - turn):
            self.meet_after_work(what)

    def check_same(self, what: str, value: Any, advice: str = "start all ranks with the same command, files and versions") -> None:
        """Check that everybody has an equal value.

        Args:
            what: the name of the value.
            advice: ends the message.

        Raises:
            UserError: they differ; the message names the ranks.
        """
        values = self.gathered(value)
        if odd := [rank for rank, other in zip(self.ranks, values) if other != values[0]]:
            raise UserError(
                f"rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))} of {self.size} {'have' if len(odd) > 1 else 'has'} another {what} "
                f"than rank {self.ranks[0]}; {advice}"
            )

    def together(self, work: Callable[[], T], what: str = "", timeout: float | None = None) -> T:
        """Return what `work` returns, in which everybody takes part.

        Args:
            what: the work, in words, for the message.
            timeout: seconds after which it fails, if not `self.timeout`.

        Raises:
            RankLost: it failed, so another rank has ended or does not answer.
        """
        began, timeout = time.monotonic(), timeout or self.timeout
        try:
            return work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            missing = re.search(r"[Rr]anks? ([\d, ]+) failed to pass monitoredBarrier", reason)
            within = f" within {timeout:g} s" if time.monotonic() - began > 0.95 * timeout else ""
            if missing:
                lost = f"rank {missing[1].strip(' ,')} did not come{within} to {what}"
            else:
                lost = f"another rank has ended or does not answer{within}{f', where all were to {what}' if what else ''}"
            more = "" if missing or "Connection closed by peer" in reason else f" ({reason[:160]})"
            raise RankLost(f"{lost}; its own error, above or in its log, is the cause{more}") from error


ALONE = World()
"""The world of a process that was started alone."""


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield runs of tensors of at most `BUCKET` bytes together, or a single larger one."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
