"""A reward server for the length of a block."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from arcopo_fast.rewards.base import Reward
from arcopo_fast.rewards.server import RewardServer, Scorer

SECONDS = 60  # no answer takes so long, unless something hangs


@contextmanager
def serving(
    *rewards: Reward,
    named: Mapping[str, Reward] | None = None,
    port: int = 0,
    token: str | None = None,
    batch: int = 8,
    max_bytes: int = 1 << 20,
    waiting_bytes: int = 1 << 24,
    fps: float | None = None,
) -> Iterator[RewardServer]:
    """rewards: served under the names of their scores. named: under these."""
    served = {name: judge for judge in rewards for name in judge.scores} | dict(named or {})
    scorer = Scorer(served, batch=batch, waiting_bytes=waiting_bytes, device=torch.device("cpu"))
    server = RewardServer(("127.0.0.1", port), scorer, token=token, max_bytes=max_bytes, fps=fps)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(SECONDS)
        assert not thread.is_alive()
