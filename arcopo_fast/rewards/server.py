"""A reward in a process of its own, behind HTTP: `wire` says what is spoken, `client` is the other side.

A thread for each connection reads a request; one thread scores, because models are not thread-safe. Requests that have come together while
it was busy are scored together, as long as their videos have the same shape. Nothing is scored for a client that has left. Whoever is
refused is refused before the body is read: without the token (401), too large (413), more than what may wait (503, come again later).
"""

from __future__ import annotations

import hmac
import json
import re
import selectors
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from arcopo_fast.rewards import wire
from arcopo_fast.rewards.base import FramesNotFinite, Reward, RewardError, score
from arcopo_fast.storage.identity import version_of

CONNECTIONS = 1024
SILENCE = 30.0  # seconds in which a client must have sent its headers, or the next piece of its body
SLOWEST = 1 << 20  # bytes a second in which a body must come, beside those seconds
GOODBYE = 10.0  # seconds in which answers are still sent when the server ends
_PIECE = 1 << 20


class Refusal(Exception):
    """A request that gets no scores, and the line that says why; nothing in it is the client's text."""

    def __init__(self, status: HTTPStatus, line: str) -> None:
        super().__init__(line)
        self.status = status


@dataclass(eq=False)
class Job:
    """A request that has been read."""

    rewards: tuple[str, ...]
    prompts: list[str]
    frames: Tensor
    has_left: Callable[[], bool] = lambda: False
    """Says whether the client is gone, so that nobody will read the scores."""
    scores: Future[dict[str, Tensor]] = field(default_factory=Future)

    def joins(self, other: Job) -> bool:
        """Return whether two jobs can be scored in one call."""
        return self.rewards == other.rewards and self.frames.dtype == other.frames.dtype and self.frames.shape[1:] == other.frames.shape[1:]


class Scorer:
    """Scores requests in one thread, up to `batch` videos at a time.

    Args:
        rewards: the judge of each score, by the name under which clients ask for it.
        batch: most videos that a reward is given at once.
        waiting_bytes: of all requests that are being read, wait, or are scored; a single one may be larger.
        device: where frames go before they are judged.
    """

    def __init__(self, rewards: Mapping[str, Reward], *, batch: int, waiting_bytes: int, device: torch.device) -> None:
        self.rewards = dict(rewards)
        self.fingerprints = {name: reward.fingerprint(name) for name, reward in rewards.items()}
        self.batch = batch
        self.waiting_bytes = waiting_bytes
        self.device = device
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._admitted: list[int] = []  # bytes of each
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="rewards", daemon=True)
        self._thread.start()

    @contextmanager
    def admit(self, size: int) -> Iterator[None]:
        """Hold room for a request of `size` bytes, from before it is read until it is answered.

        Raises:
            Refusal: there is none, or the server ends.
        """
        with self._changed:
            if self._closing:
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping")
            if self._admitted and sum(self._admitted) + size > self.waiting_bytes:
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests are waiting already")
            self._admitted.append(size)
        try:
            yield
        finally:
            with self._changed:
                self._admitted.remove(size)

    def score(self, job: Job) -> dict[str, Tensor]:
        """The scores of a request, when its turn has come.

        Raises:
            Refusal: a reward raised an exception, or the server ends.
        """
        with self._changed:
            if self._closing:
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping")
            self._jobs.append(job)
            self._changed.notify_all()
        return job.scores.result()

    @property
    def waiting(self) -> int:
        """The number of videos that wait for their turn."""
        with self._changed:
            return sum(len(job.prompts) for job in self._jobs)

    def close(self) -> None:
        """Finish what is being scored, refuse what waits and what comes."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            self._run(jobs)

    def _next(self) -> list[Job]:
        """The oldest request and those that can be scored with it, in the order in which they came; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closing)
            if self._closing:
                for job in self._jobs:
                    job.scores.set_exception(Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping"))
                self._jobs.clear()
                return []
            jobs = [self._jobs.popleft()]
            videos = len(jobs[0].prompts)
            for job in list(self._jobs):
                if job.joins(jobs[0]) and videos + len(job.prompts) <= self.batch:
                    self._jobs.remove(job)
                    jobs.append(job)
                    videos += len(job.prompts)
            return jobs

    def _waits(self, job: Job) -> bool:
        """Return whether a request's client still waits for its scores; if it does not, the request is done with."""
        if not job.has_left():
            return True
        job.scores.set_exception(Refusal(HTTPStatus.REQUEST_TIMEOUT, "the client has left"))
        return False

    def _run(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if self._waits(job)]
        if not jobs:
            return
        prompts = [prompt for job in jobs for prompt in job.prompts]
        parts: list[dict[str, Tensor]] = []
        try:
            frames = jobs[0].frames if len(jobs) == 1 else torch.cat([job.frames for job in jobs])
            for start, part in zip(range(0, len(frames), self.batch), frames.split(self.batch)):
                if start and not self._waits(jobs[0]):  # more than a batch are of a single request
                    return
                parts.append(self._judge(jobs[0].rewards, part, prompts[start : start + self.batch]))
            scores = {name: torch.cat([part[name] for part in parts]) for name in jobs[0].rewards}
        except BaseException as error:  # SystemExit, too: a user's code must not end the thread and leave everybody waiting
            if len(jobs) > 1:  # one of them may be at fault: the others shall not suffer
                for job in jobs:
                    self._run([job])
                return
            jobs[0].scores.set_exception(_refusal(error))
            return
        start = 0
        for job in jobs:
            stop = start + len(job.prompts)
            job.scores.set_result({name: values[start:stop] for name, values in scores.items()})
            start = stop

    def _judge(self, names: tuple[str, ...], frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        frames = wire.to_float32(frames.to(self.device))
        scores = score({name: self.rewards[name] for name in names}, frames, prompts, quarantine=True)
        return {name: values.cpu() for name, values in scores.items()}


def _refusal(error: BaseException) -> Refusal:
    """Return what a client is told of an exception; the server's own output says more."""
    if isinstance(error, FramesNotFinite):
        return Refusal(HTTPStatus.BAD_REQUEST, "not a request for scores: the frames are not finite")
    traceback.print_exception(error)
    line = str(error) if isinstance(error, RewardError) else f"a reward raised {type(error).__name__}; the server's own output says where"
    return Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, line)


class RewardServer(ThreadingHTTPServer):
    """Listens as soon as it is made; `serve_forever` answers, and `stop`, from another thread, ends it.

    Args:
        address: host and port; port 0 takes a free one.
        scorer: see there; the server closes it.
        token: what clients must show; None: nothing.
        max_bytes: of the body of a request.
        fps: frames per second that the rewards were told; None: none of them goes by seconds.
    """

    daemon_threads = True  # `stop` waits for answers, and not for connections that say nothing
    request_queue_size = CONNECTIONS

    def __init__(self, address: tuple[str, int], scorer: Scorer, *, token: str | None, max_bytes: int, fps: float | None = None) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.scorer = scorer
        self.token = token
        self.max_bytes = max_bytes
        self.fps = fps
        self._changed = threading.Condition()
        self._open: dict[socket.socket, float | None] = {}  # connections; and since when they have not sent complete headers
        super().__init__(address, Handler)

    @property
    def url(self) -> str:
        """Address of the server."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}"

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own looks up the host's name, which may take long, for CGI scripts

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            full = len(self._open) >= CONNECTIONS
            if not full:
                self._open[request] = time.monotonic()
        if full:
            self.shutdown_request(request)  # the client comes again
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._changed:
            self._open.pop(request, None)
            self._changed.notify_all()
        super().shutdown_request(request)

    def stop(self) -> None:
        """Finish what is being scored, answer everybody, and end; refuse what waits and what comes."""
        self.scorer.close()
        self.shutdown()
        with self._changed:
            self._changed.wait_for(lambda: all(self._open.values()), GOODBYE)
        self.server_close()

    def has_spoken(self, request: socket.socket) -> None:
        """A connection's headers are complete."""
        with self._changed:
            self._open[request] = None

    def service_actions(self) -> None:
        """End, between connections and twice a second, those that have not sent their headers in time."""
        latest = time.monotonic() - SILENCE
        with self._changed:
            late = [request for request, since in self._open.items() if since is not None and since < latest]
        for request in late:
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is not worth a traceback."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request: HTTP/1.0 semantics, a connection each."""

    server: RewardServer
    server_version, sys_version = "arcopo_fast", ""
    timeout = SILENCE

    def do_GET(self) -> None:
        self._answer("/health", self._health)

    def do_POST(self) -> None:
        self._answer("/score", self._score)

    def _answer(self, path: str, respond: Callable[[], tuple[str, bytes]]) -> None:
        self.server.has_spoken(self.connection)
        try:
            self._authorise()
            if self.path != path:
                raise Refusal(HTTPStatus.NOT_FOUND, "expected GET /health or POST /score")
            content, body = respond()
        except Refusal as refusal:
            self._send_error(refusal.status, str(refusal))
        else:
            self._send(HTTPStatus.OK, content, body)

    def _authorise(self) -> None:
        token = self.server.token
        given = (self.headers.get("Authorization") or "").encode("utf-8", "surrogateescape")
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise Refusal(HTTPStatus.UNAUTHORIZED, f"the token is missing or wrong; clients take it from {wire.TOKEN_VARIABLE}")

    def _health(self) -> tuple[str, bytes]:
        scorer = self.server.scorer
        document = {
            "rewards": list(scorer.rewards),
            "fingerprints": scorer.fingerprints,
            "version": version_of("arcopo_fast") or "unknown",
            "protocol": wire.PROTOCOL,
            "waiting": scorer.waiting,
            "max_bytes": self.server.max_bytes,
            "fps": self.server.fps,
        }
        return "application/json", json.dumps(document).encode() + b"\n"

    def _score(self) -> tuple[str, bytes]:
        size = self._size()
        with self.server.scorer.admit(size):
            job = self._read(size)
            return wire.CONTENT, wire.pack_scores(self.server.scorer.score(job))

    def _size(self) -> int:
        """The length of the body, which is announced, and allowed."""
        if self.headers.get("Content-Type") != wire.CONTENT:  # web pages cannot send this type without asking first
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"the body must be {wire.CONTENT}")
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or not re.fullmatch(r"[0-9]{1,15}", lengths[0]) or "Transfer-Encoding" in self.headers:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "the body's length must be given, once, in Content-Length")
        size = int(lengths[0])
        if size > self.server.max_bytes:
            line = f"the body is larger than the {self.server.max_bytes} bytes that are allowed (--max-mib)"
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, line)
        return size

    def _read(self, size: int) -> Job:
        """The body of a request: first its header, which is checked, then its frames."""
        deadline = time.monotonic() + SILENCE + size / SLOWEST
        try:
            length = int.from_bytes(self._receive(min(size, 8), deadline), "little")
            if not 0 < length <= min(wire.MAX_HEADER, size - 8):
                raise wire.Malformed(f"the header must be shorter than the body, and at most {wire.MAX_HEADER} bytes")
            header = wire.read_header(self._receive(length, deadline), size - 8 - length)
        except wire.Malformed as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"not a request for scores: {error}") from None
        known = self.server.scorer.rewards
        if any(name not in known for name in header.rewards):
            raise Refusal(HTTPStatus.NOT_FOUND, f"this server's rewards are {', '.join(known)}")
        body = self._receive(size - 8 - length, deadline)
        frames = torch.frombuffer(body, dtype=header.dtype).view(header.shape)
        return Job(header.rewards, header.prompts, frames, partial(_has_left, self.connection))

    def _receive(self, size: int, deadline: float) -> bytearray:
        content = bytearray(size)
        view = memoryview(content)
        while view:
            try:
                self.connection.settimeout(max(0.001, min(SILENCE, deadline - time.monotonic())))
                received = self.rfile.readinto1(view[:_PIECE])
            except TimeoutError:
                raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "the body did not come in time") from None
            if not received:
                raise Refusal(HTTPStatus.BAD_REQUEST, "the body ended too early")
            view = view[received:]
        self.connection.settimeout(SILENCE)
        return content

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send what the library refuses: its messages quote the request, ours do not."""
        self._send_error(HTTPStatus(code), HTTPStatus(code).phrase)

    def _send_error(self, status: HTTPStatus, line: str) -> None:
        self._send(status, "application/json", json.dumps({"status": status, "error": line}).encode() + b"\n")
        # A connection that is closed while the client still sends is reset, and the answer may be lost: read on for a moment.
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1.0)
            deadline = time.monotonic() + 2.0
            while time.monotonic() < deadline and self.rfile.read1(_PIECE):
                pass

    def _send(self, status: HTTPStatus, content: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Connection", "close")
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "1")
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Do nothing: requests are not logged."""


def _has_left(connection: socket.socket) -> bool:
    """Return whether the client has closed its end of a connection. Does not wait, and leaves what it sent unread."""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            return bool(selector.select(0)) and not connection.recv(1, socket.MSG_PEEK)
    except (OSError, ValueError):  # reset by the client, or closed here
        return True
