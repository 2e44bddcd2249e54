"""Contexts in which the chunks of a group's members are predicted again: the shared prefix, then each member's own chunks."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from arcopo_fast.rollout.engine import Engine
    from arcopo_fast.rollout.group import Group
    from arcopo_fast.rollout.stream import Stream


class Contexts:
    """The contexts of some members' chunks, one at a time; a context manager.

    The members' own chunks are made anew by clean passes of their latents, under the weights as they are, once for each member. Asked for a
    later chunk of the same members, it goes on from where it is, as the rollout did.

    Args:
        engine: of the group.
        group: has its context, see `Engine.bring_back`.
        until: the last chunk that it is asked for.
        prefix: instead of the group's own.
    """

    def __init__(self, engine: Engine, group: Group, until: int, prefix: Stream | None = None) -> None:
        prefix = prefix or group.prefix
        assert prefix is not None, "the group has no context: see bring_back"
        self.engine, self.group, self.prefix = engine, group, prefix
        own = group.own_chunks(engine.shape.chunk_frames)
        self.own = {chunk: latents for chunk, latents in own.items() if chunk < until}
        self._members = torch.empty(0, dtype=torch.long)
        self._chunk = group.pivot  # that `_stream` is the context of
        self._stream: Stream | None = None
        self._held = ExitStack()  # the pages of `_stream`
        self._rows = ExitStack()  # those of the rows that were asked for

    def __enter__(self) -> Contexts:
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()
        self._held.close()

    def of(self, chunk: int, members: Tensor) -> Stream:
        """Return what chunk `chunk` of `members` [N] sees; it is there until the next one is asked for."""
        self._rows.close()
        distinct, rows = members, list(range(len(members)))
        if chunk > self.group.pivot:
            distinct, inverse = members.unique(return_inverse=True)
            rows = inverse.tolist()
        if self._stream is None or chunk < self._chunk or not torch.equal(distinct, self._members):
            self._begin(distinct)
        assert self._stream is not None
        with torch.no_grad():
            if self._chunk == self.group.pivot < chunk:  # consecutive pages, as in the rollout
                self._stream.cache.reserve(sum(latents.shape[1] for latents in self.own.values()))
            while self._chunk < chunk:
                self.engine.append(self._stream, self.own[self._chunk][distinct], timestep=self.engine.context_noise)
                self._chunk += 1
                self._switch()
        if rows == list(range(len(distinct))):
            return self._stream
        stream = replace(self._stream, cache=self._stream.cache.of(rows))
        self._rows.callback(stream.cache.release)
        return stream

    def _begin(self, members: Tensor) -> None:
        """Fork the prefix for some members."""
        self._held.close()
        cache = self.prefix.cache.fork(len(members))
        self._held.callback(cache.release)
        self._stream = replace(self.prefix, cache=cache, latents=list(self.prefix.latents), history=None)
        self._members, self._chunk = members, self.group.pivot
        with torch.no_grad():
            self._switch()

    def _switch(self) -> None:
        """Take the prompt that begins with the chunk at hand."""
        if self._chunk in self.group.switches:
            assert self._stream is not None
            self.engine.switch_prompt(self._stream, self.group.switches[self._chunk])
