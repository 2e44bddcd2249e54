"""A reward that knows its videos, and clients and bare requests to the server that it is behind."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from arcopo_fast.rewards import wire
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rewards.client import RewardClient
from arcopo_fast.rewards.server import RewardServer
from support.seeds import seed_of
from support.servers import SECONDS

TOKEN = f"{random.Random(seed_of(__name__)).getrandbits(128):032x}"


class FirstPixel(Reward):
    """A score that says whose video it is; remembers how many it was given, and can be held: at once, or when it has got so many."""

    scores: Sequence[str] = ("first_pixel",)

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.hold_at: list[int] = []

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        self.batches.append(len(frames))
        self.begun.set()
        if self.hold_at and sum(self.batches) >= self.hold_at[0]:
            self.hold_at.pop(0)
            self.go.clear()
        assert self.go.wait(SECONDS)
        if "raise" in prompts:
            raise KeyError("secret")
        return frames[:, 0, 0, 0, 0].where(torch.tensor([prompt != "nan" for prompt in prompts]), torch.nan)


def kill(server: RewardServer) -> None:
    """Leave what a killed process leaves: no listener, and every connection broken."""
    server.shutdown()
    server.server_close()
    for connection in list(server._open):
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def client(server: RewardServer, *names: str, **settings: Any) -> RewardClient:
    return RewardClient(server.url, names or list(server.scorer.rewards), **{"timeout": SECONDS, "give_up_after": SECONDS} | settings)


def videos(count: int = 3, side: int = 6) -> Tensor:
    return torch.rand(count, 4, 3, side, side + 1)


def request(server: RewardServer, body: bytes | None, path: str = "/score", method: str = "POST", **headers: str) -> tuple[int, Any]:
    """Any request, and the status and the JSON that it gets."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=SECONDS)
    try:
        connection.request(method, path, body, {"Content-Type": wire.CONTENT} | headers)
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if answer.getheader("Content-Type") == "application/json" else content
    finally:
        connection.close()


def head(size: int) -> bytes:
    """The HTTP headers of a request, for those who send the rest as they like."""
    return f"POST /score HTTP/1.1\r\nContent-Type: {wire.CONTENT}\r\nContent-Length: {size}\r\n\r\n".encode()


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
