"""Rewards that a server computes (`python -m arcopo_fast.rewards serve`), as if they were here.

A server that is away pauses its caller: a request is asked again, after growing pauses, until it is answered or the caller has waited long
enough. Nothing is lost by asking twice, for a score is a function of its video and prompt.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from arcopo_fast.errors import UserError
from arcopo_fast.rewards import wire
from arcopo_fast.rewards.base import Reward, RewardError

_SAY_FIRST, _SAY_EVERY = 2.0, 60.0  # seconds
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0
_MAX_ANSWER = 64 << 20
_AGAIN = (408, 503)
UNKNOWN = "unknown"


class RewardServerError(RewardError):
    """A reward server was away for too long, or does not do what is asked of it. The message says which, where and what to do."""


class _Away(Exception):
    """No answer this time."""


class _Slow(_Away):
    """No answer in time, to a request that the server has got."""


class RewardClient(Reward):
    """Some of the scores of one server, all asked for in one request.

    Args:
        address: such as http://127.0.0.1:8123.
        scores: their names, as the server knows them.
        token: what the server wants to see. It is sent to hosts that `wire.token_may_go_to`, and no other.
        dtype: of the frames on their way: float32 gives the scores that the reward would give here, uint8 takes a quarter of the bytes.
        fps: frames per second of the videos, which the server's rewards must have been told; None: not checked.
        connect_timeout, timeout: seconds until a connection, and until an answer. A server that is well, and slower, is not asked again.
        give_up_after: seconds that a request may wait for a server that is away.

    Raises:
        UserError: the address cannot be used, or the token must not go there.
    """

    def __init__(
        self,
        address: str,
        scores: Sequence[str],
        *,
        token: str | None = None,
        dtype: torch.dtype = torch.float32,
        fps: float | None = None,
        connect_timeout: float = 10.0,
        timeout: float = 600.0,
        give_up_after: float = 3600.0,
    ) -> None:
        self.address = address.rstrip("/")
        self.host, self.port, self._connection = _parse(address)
        if token is not None and not wire.token_may_go_to(self.host, self.port):
            raise UserError(
                f"{wire.TOKEN_VARIABLE} would be sent to {self.host}, an address of the recipe's: if it is yours, say so with "
                f"{wire.HOSTS_VARIABLE}={self.host}, or unset the token"
            )
        self.scores = list(scores)
        self.token = token
        self.dtype = dtype
        self.fps = fps
        self.connect_timeout, self.timeout, self.give_up_after = connect_timeout, timeout, give_up_after

    def __call__(self, frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        return self.ask(self.scores, frames, prompts)

    def ask(self, names: Sequence[str], frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Return the scores [N] of frames [N, F, 3, H, W] in [0, 1], by name.

        Raises:
            RewardServerError: see there.
        """
        at_once = self._videos_at_once(names, frames, prompts)
        parts = [
            self._ask_for_scores(names, part, prompts[start : start + at_once])
            for start, part in zip(range(0, len(frames), at_once), frames.split(at_once))
        ]
        return {name: torch.cat([part[name] for part in parts]).to(frames.device) for name in names}

    def fingerprint(self, name: str) -> str:
        """Return what the server says, `UNKNOWN` if it says nothing.

        Raises:
            RewardServerError: see there.
        """
        fingerprints = self.health().get("fingerprints")
        return str(fingerprints.get(name, UNKNOWN)) if isinstance(fingerprints, dict) else UNKNOWN

    def health(self) -> dict[str, Any]:
        """Return what the server says of itself, see `wire`; it is checked that it has the scores.

        Raises:
            RewardServerError: see there.
        """
        content = self._ask("GET", "/health")
        try:
            document = json.loads(content)
            protocol, rewards, max_bytes = document["protocol"], list(document["rewards"]), int(document["max_bytes"])
        except (ValueError, KeyError, TypeError):
            raise self._error("is no reward server: it does not answer GET /health as one") from None
        if protocol != wire.PROTOCOL:
            raise self._error(f"speaks version {protocol} of the protocol, not {wire.PROTOCOL}; install the same arcopo_fast on both sides")
        if missing := [name for name in self.scores if name not in rewards]:
            raise self._error(f"does not serve {', '.join(missing)}, only {', '.join(map(str, rewards))}")
        judged = document.get("fps")
        if None not in (judged, self.fps) and judged != self.fps:
            raise self._error(f"judges videos at {judged} frames per second, but these have {self.fps}; start it with --fps {self.fps}")
        return {**document, "max_bytes": max_bytes}

    def _videos_at_once(self, names: Sequence[str], frames: Tensor, prompts: list[str]) -> int:
        """Return how many videos a request may hold."""
        room = self.health()["max_bytes"] - wire.room_for_header(prompts, names)
        video = frames[0].numel() * self.dtype.itemsize
        if room < video:
            raise self._error(f"takes requests of {room / 2**20:.1f} MiB, and a video has {video / 2**20:.1f} MiB; raise its --max-mib")
        return room // video

    def _ask_for_scores(self, names: Sequence[str], frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        body = wire.pack(wire.to_uint8(frames) if self.dtype == torch.uint8 else frames, prompts, names)
        content = self._ask("POST", "/score", body)
        try:
            return wire.read_scores(content, names, len(frames))
        except wire.Malformed as error:
            raise self._error(f"gave an answer that is {error}") from None

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The answer to a request, whenever the server can give it."""
        begun = time.monotonic()
        say_at, announced, pause, slow = begun + _SAY_FIRST, False, _SHORTEST_PAUSE, False
        while True:
            try:
                if slow:
                    self._try("GET", "/health", None)
                    raise self._error(
                        f"is well, but has not scored in {_minutes(self.timeout)}, reward_servers.timeout: raise that setting, let it "
                        "judge fewer videos at once (rollout.decode_branches), or look whether one of its rewards hangs"
                    )
                answer = self._try(method, path, body)
            except _Away as away:
                # What is there and has not scored in time would not be faster if it had to score the same videos again.
                slow = isinstance(away, _Slow) and body is not None
                now = time.monotonic()
                left = begun + self.give_up_after - now
                if left <= 0:
                    raise self._error(f"could not be used for {_minutes(self.give_up_after)}: {away}; start it again") from None
                if now >= say_at:
                    print(f"waiting for the reward server at {self.address}, {_minutes(left)} more: {away}", file=sys.stderr, flush=True)
                    say_at, announced = now + _SAY_EVERY, True
                time.sleep(min(left, pause * random.uniform(0.5, 1.5)))  # so that many clients do not come back as one
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if announced:
                    print(f"the reward server at {self.address} is back", file=sys.stderr, flush=True)
                return answer

    def _try(self, method: str, path: str, body: bytes | None) -> bytes:
        """The answer to a request now; `_Away` if there is none."""
        connection = self._connection(self.host, self.port, timeout=self.connect_timeout)
        headers = {"Content-Type": wire.CONTENT} if body else {}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        connected = False
        try:
            connection.connect()
            connected = True
            connection.sock.settimeout(self.timeout)
            with suppress(BrokenPipeError, ConnectionResetError):  # refused while we were sending: the answer may say why
                connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read(_MAX_ANSWER)
            if response.length:  # `read` with a limit does not say so
                raise HTTPException("its answer was cut short")
        except TimeoutError:
            if connected:
                raise _Slow(f"no answer in {_minutes(self.timeout)}, reward_servers.timeout") from None
            raise _Away(f"no connection in {_minutes(self.connect_timeout)}") from None
        except (OSError, HTTPException) as error:
            raise _Away(str(error) or type(error).__name__) from None
        finally:
            connection.close()
        if response.status == 200:
            return content
        line = f"{response.status} {response.reason}: {_line(content)}"
        if response.status in _AGAIN:
            raise _Away(line)
        raise self._error(f"answered {line}")

    def _error(self, what: str) -> RewardServerError:
        return RewardServerError(f"the reward server at {self.address} {what}")


def remote_rewards(addresses: Mapping[str, str], **settings: Any) -> dict[str, Reward]:
    """Return a client for each score by the address of its server, the same one for all of a server. Waits for a server that is away.

    settings: of `RewardClient`.

    Raises:
        UserError: an address cannot be used.
        RewardServerError: see there.
    """
    names: dict[str, list[str]] = {}
    for name, address in addresses.items():
        names.setdefault(address.rstrip("/"), []).append(name)
    clients = {address: RewardClient(address, rewards, **settings) for address, rewards in names.items()}
    for client in clients.values():
        client.health()
    return {name: clients[address.rstrip("/")] for name, address in addresses.items()}


def _parse(address: str) -> tuple[str, int, type[HTTPConnection]]:
    """Return host, port and kind of connection of an address."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host or parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise UserError(f"{address!r} is not the address of a reward server; expected something like http://127.0.0.1:8123")
    return (host, port or 443, HTTPSConnection) if parts.scheme == "https" else (host, port or 80, HTTPConnection)


def _line(content: bytes) -> str:
    """Return what the server says is wrong; short and printable, whoever it is that answers."""
    try:
        text = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        return "no reason given"
    return "".join(character for character in str(text)[:300] if character.isprintable())


def _minutes(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.0f} min"
