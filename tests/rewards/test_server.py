"""Rewards behind HTTP, on the loopback: the same scores, each to whom it belongs, whatever comes and whoever dies."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from safetensors.torch import save
from support.rewards import load_reward
from support.servers import SECONDS, serving
from torch import Tensor

from arcopo_fast.build import load_rewards
from arcopo_fast.config.reading import load_config
from arcopo_fast.errors import UserError
from arcopo_fast.rewards import server as server_module
from arcopo_fast.rewards import wire
from arcopo_fast.rewards.base import Reward, score
from arcopo_fast.rewards.client import RewardClient, RewardServerError, remote_rewards
from arcopo_fast.rewards.custom import CustomReward
from arcopo_fast.rewards.server import Handler, RewardServer

TOKEN = f"{random.SystemRandom().getrandbits(128):032x}"


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
    """What a process leaves behind that is killed: no listener, and every connection broken."""
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


# Scores ----------------------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_reward() -> None:
    """Of float32 frames up to rounding, since the server's batches are others; of uint8 frames those of the rounded frames."""
    rewards = {name: load_reward(name) for name in ("sharpness", "steadiness")}
    smooth = torch.nn.functional.interpolate(torch.rand(5, 3, 3, 4, 5), size=(6, 18, 26), mode="trilinear").transpose(1, 2).contiguous()
    prompts = ["plain", "ünïcode 日本", '"quoted" \\ {}', "two\nlines", ""]
    here = score(rewards, smooth, prompts)
    with serving(*rewards.values(), max_bytes=2 * smooth[0].nbytes + 8192) as server:  # two videos in a request
        there = score(remote_rewards(dict.fromkeys(rewards, server.url)), smooth, prompts)
        for name in rewards:
            assert there[name].dtype == torch.float32 and here[name].unique().numel() == 5
            torch.testing.assert_close(there[name], here[name], rtol=1e-5, atol=0)
        coarse = client(server, dtype=torch.uint8)(smooth, prompts)
    rounded = score(rewards, (smooth * 255).round() / 255, prompts)
    for name in rewards:
        torch.testing.assert_close(coarse[name], rounded[name], rtol=1e-5, atol=0)
        assert (coarse[name] / here[name] - 1).abs().max() > 1e-4


def test_one_request_serves_all_rewards_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    pack = wire.pack
    monkeypatch.setattr(wire, "pack", lambda frames, prompts, names: (asked.append(list(names)), pack(frames, prompts, names))[1])
    first, second = FirstPixel(), FirstPixel()
    second.scores = ("second",)
    frames = videos()
    with serving(first, second) as server:
        rewards = remote_rewards({"first_pixel": server.url, "second": server.url + "/"})
        for turn in range(1, 3):
            scores = score(rewards, frames, ["a"] * 3)
            assert list(scores) == [*rewards] and all(torch.equal(values, frames[:, 0, 0, 0, 0]) for values in scores.values())
            assert asked == [["first_pixel", "second"]] * turn and first.batches == second.batches == [3] * turn
        score({"second": rewards["second"]}, frames, ["b"] * 3)
        assert asked[2:] == [["second"]] and len(first.batches) == 2, "what is not wanted is not asked for"


class TwoScores(Reward):
    """Gives both from one call; counts its calls."""

    scores = ("first", "second")

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        self.calls += 1
        return {"first": frames[:, 0, 0, 0, 0], "second": frames[:, 0, 0, 0, 1]}


def test_a_served_judge_of_several_scores_is_called_once() -> None:
    judge, frames = TwoScores(), videos()
    with serving(judge) as server:
        scores = score(remote_rewards(dict.fromkeys(["second", "first"], server.url)), frames, ["a"] * 3)
        assert list(scores) == ["second", "first"] and judge.calls == 1
        assert torch.equal(scores["second"], frames[:, 0, 0, 0, 1]) and torch.equal(scores["first"], frames[:, 0, 0, 0, 0])
        alone = score(remote_rewards({"second": server.url}), frames, ["a"] * 3)
        assert list(alone) == ["second"] and torch.equal(alone["second"], scores["second"])


def test_what_comes_together_is_scored_together_and_goes_to_whom_it_belongs() -> None:
    reward, many = FirstPixel(), [videos(random.choice([1, 2, 3])) for _ in range(24)] + [videos(2, side=8) for _ in range(6)]
    many.append(videos(9))  # more than a batch
    random.shuffle(many)
    with serving(reward, batch=4, waiting_bytes=1 << 30) as server, ThreadPoolExecutor(len(many)) as pool:
        reward.go.clear()
        answers = []
        for frames in many:
            answers.append(pool.submit(client(server), frames, ["a"] * len(frames)))
            eventually(reward.begun.is_set)  # with the first; the others wait
        eventually(lambda: len(server.scorer._jobs) == len(many) - 1)
        reward.go.set()
        for frames, answer in zip(many, answers):
            assert torch.equal(answer.result(SECONDS)["first_pixel"], frames[:, 0, 0, 0, 0])
    assert sum(reward.batches) == sum(map(len, many)) and max(reward.batches) <= 4
    assert len(reward.batches) < len(many), "nothing was joined"


def test_only_what_fits_is_joined() -> None:
    reward = FirstPixel()
    ours = [videos(3) for _ in range(4)]
    with serving(reward, batch=5) as server, ThreadPoolExecutor(8) as pool:
        reward.go.clear()
        answers = []
        for frames in ours:
            answers.append(pool.submit(client(server), frames, ["a"] * 3))
            eventually(reward.begun.is_set)
        answers += [pool.submit(client(server, dtype=torch.uint8), frames[:1], ["a"]) for frames in ours]
        eventually(lambda: len(server.scorer._jobs) == 7)
        reward.go.set()
        for frames, answer in zip([*ours, *(frames[:1] for frames in ours)], answers):
            torch.testing.assert_close(answer.result(SECONDS)["first_pixel"], frames[:, 0, 0, 0, 0], rtol=0, atol=0.002)
    assert sorted(reward.batches) == [3, 3, 3, 3, 4], "two of 3 are more than 5, and bytes are not floats"


def test_nan_passes_through_and_an_exception_does_not_spread() -> None:
    reward = FirstPixel()
    frames = videos()
    with serving(reward) as server, ThreadPoolExecutor(4) as pool:
        with pytest.warns(UserWarning, match="not finite"):
            scores = score(remote_rewards({"first_pixel": server.url}), frames, ["a", "nan", "b"], quarantine=True)
        assert torch.equal(scores["first_pixel"].nan_to_num(-1), torch.where(torch.tensor([True, False, True]), frames[:, 0, 0, 0, 0], -1))

        reward.go.clear()
        reward.begun.clear()
        first = pool.submit(client(server), frames, ["a"] * 3)
        eventually(reward.begun.is_set)
        good = pool.submit(client(server), frames, ["a"] * 3)
        bad = pool.submit(client(server), videos(1), ["raise"])
        eventually(lambda: len(server.scorer._jobs) == 2)
        reward.go.set()
        assert torch.equal(good.result(SECONDS)["first_pixel"], frames[:, 0, 0, 0, 0])
        with pytest.raises(RewardServerError, match="500.*a reward raised KeyError") as raised:
            bad.result(SECONDS)
        assert "secret" not in str(raised.value) and first.result(SECONDS)
        assert 4 in reward.batches, "the bad one was joined with a good one"
        assert client(server)(frames, ["a"] * 3)


# Servers that are away -------------------------------------------------------------------------------------------------------------


def test_a_thousand_requests_survive_two_deaths() -> None:
    def die(server: RewardServer, reward: FirstPixel) -> None:
        eventually(lambda: not reward.go.is_set())
        kill(server)
        assert not all(answer.done() for answer in answers)
        reward.go.set()

    first, second = FirstPixel(), FirstPixel()  # each server's own: what a dead one still scores is nothing to the next
    first.hold_at, second.hold_at = [200], [400]
    frames = torch.rand(1000, 1, 2, 3, 2, 2)
    with ThreadPoolExecutor(1000) as pool:
        with serving(first) as server:
            port = server.server_address[1]
            answers = [pool.submit(client(server), one, ["a"]) for one in frames]
            die(server, first)
        with serving(second, port=port) as server:
            die(server, second)
        with serving(FirstPixel(), port=port):
            eventually(lambda: all(answer.done() for answer in answers))
        for one, answer in zip(frames, answers):
            assert torch.equal(answer.result()["first_pixel"], one[:, 0, 0, 0, 0])


def test_a_client_waits_says_so_and_goes_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcopo_fast.rewards.client._SAY_FIRST", 0.1)
    frames = videos()
    with serving(FirstPixel()) as server:
        port, asked = server.server_address[1], client(server)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(asked, frames, ["a"] * 3)
        time.sleep(0.5)
        assert not answer.done()
        with serving(FirstPixel(), port=port):
            assert torch.equal(answer.result(SECONDS)["first_pixel"], frames[:, 0, 0, 0, 0])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, "once a minute"
    assert said[0].startswith(f"waiting for the reward server at {asked.address}") and "refused" in said[0] and said[1].endswith("is back")


def test_a_client_gives_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begun = time.monotonic()
        with pytest.raises(
            RewardServerError, match=r"could not be used for 1 s: no answer in 0.2 s, reward_servers.timeout; start it again"
        ):
            RewardClient(address, ["it"], timeout=0.2, give_up_after=1)(videos(), ["a"] * 3)
        assert 1 <= time.monotonic() - begun < 5
    with pytest.raises(RewardServerError, match="refused"):
        remote_rewards({"it": address}, give_up_after=0.2)


def test_a_slow_server_is_told_so_and_not_asked_again() -> None:
    reward = FirstPixel()
    with serving(reward) as server:
        reward.go.clear()
        begun = time.monotonic()
        with pytest.raises(RewardServerError, match=r"is well, but has not scored in 0.3 s, reward_servers.timeout: raise that"):
            client(server, timeout=0.3)(videos(), ["a"] * 3)
        assert time.monotonic() - begun < SECONDS / 2, "it does not wait until it gives up"
        reward.go.set()
        assert client(server)(videos(1), ["a"])
    assert reward.batches == [3, 1]


def test_a_server_that_answers_nothing_is_not_asked_for_scores_again() -> None:
    """Its reward may keep the interpreter to itself. As soon as it answers anything, it is known to be slow."""
    asked: list[bytes] = []
    health = json.dumps({"rewards": ["it"], "protocol": wire.PROTOCOL, "max_bytes": 1 << 20}).encode()

    def talk(listener: socket.socket) -> None:
        kept = []
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                kept.append(connection)
                asked.append(connection.recv(1 << 16).split(b" HTTP")[0])
                if asked.count(b"POST /score") == 0 or asked.count(b"GET /health") >= 4:
                    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + health)
                    connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=talk, args=(listener,), daemon=True).start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(RewardServerError, match="is well, but has not scored"):
            RewardClient(address, ["it"], timeout=0.2, give_up_after=SECONDS)(videos(1), ["a"])
    assert asked == [b"GET /health", b"POST /score"] + [b"GET /health"] * 3


def test_a_server_that_is_gone_when_it_should_answer_is_waited_for() -> None:
    reward, frames = FirstPixel(), videos()
    with ThreadPoolExecutor(1) as pool, serving(reward) as server:
        reward.go.clear()
        answer = pool.submit(client(server, timeout=0.5), frames, ["a"] * 3)
        eventually(reward.begun.is_set)
        server.shutdown()
        server.server_close()  # as if the machine were gone: the connection stays, and nobody answers
        time.sleep(0.7)
        assert not answer.done()
        with serving(FirstPixel(), port=server.server_address[1]):
            assert torch.equal(answer.result(SECONDS)["first_pixel"], frames[:, 0, 0, 0, 0])
        reward.go.set()


def test_nothing_is_scored_for_clients_that_have_left() -> None:
    """Neither what waits nor, between two batches, what has begun."""
    reward = FirstPixel()
    long, short = (wire.pack(videos(count), ["a"] * count, ["first_pixel"]) for count in (9, 2))
    with serving(reward, batch=4) as server, ThreadPoolExecutor(1) as pool:

        def send(body: bytes) -> socket.socket:
            raw = socket.create_connection(server.server_address[:2], SECONDS)
            raw.sendall(head(len(body)) + body)
            return raw

        reward.go.clear()
        begun = send(long)
        eventually(reward.begun.is_set)
        waits = [send(short) for _ in range(3)]
        eventually(lambda: len(server.scorer._jobs) == 3)
        stays = videos(1)
        answer = pool.submit(client(server), stays, ["a"])
        eventually(lambda: len(server.scorer._jobs) == 4)
        for connection in (begun, *waits):
            connection.close()
        reward.go.set()
        assert torch.equal(answer.result(SECONDS)["first_pixel"], stays[:, 0, 0, 0, 0])
        eventually(lambda: not server.scorer._admitted)
    assert reward.batches == [4, 1]


@pytest.mark.parametrize("answer", [b"HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\nshort", b"no http\r\n\r\n", b""])
def test_half_an_answer_is_none(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as broken, ThreadPoolExecutor(1) as pool:

        def talk() -> None:
            connection, _ = broken.accept()
            connection.recv(1 << 16)
            connection.sendall(answer)
            connection.close()

        talked = pool.submit(talk)
        asked = RewardClient(f"http://127.0.0.1:{broken.getsockname()[1]}", ["it"], timeout=0.2, give_up_after=0.5)
        with pytest.raises(RewardServerError, match="could not be used"):
            asked.health()
        talked.result(SECONDS)


def test_something_else_at_the_address_is_said_at_once() -> None:
    with serving(FirstPixel()) as server:
        with pytest.raises(RewardServerError, match="does not serve other, only first_pixel"):
            remote_rewards({"other": server.url})
        with pytest.raises(RewardServerError, match="a video has .* MiB; raise its --max-mib"):
            client(server)(videos(1, side=200), ["a"])
    for address in ("127.0.0.1:8123", "ftp://host:1", "http://", "http://user@host:1", "http://host:1/path", "http://host:99999999"):
        with pytest.raises(UserError, match="not the address of a reward server"):
            remote_rewards({"it": address})


def test_the_end_finishes_what_is_scored_and_refuses_the_rest() -> None:
    reward, frames = FirstPixel(), videos()
    with serving(reward) as server, ThreadPoolExecutor(3) as pool:
        reward.go.clear()
        scored = pool.submit(request, server, wire.pack(frames, ["a"] * 3, ["first_pixel"]))
        eventually(reward.begun.is_set)
        waits = pool.submit(request, server, wire.pack(frames, ["a"] * 3, ["first_pixel"]))
        eventually(lambda: len(server.scorer._jobs) == 1)
        ending = pool.submit(server.scorer.close)
        eventually(lambda: server.scorer._closing)
        assert request(server, wire.pack(frames, ["a"] * 3, ["first_pixel"])) == (503, {"status": 503, "error": "the server is stopping"})
        assert not ending.done()
        reward.go.set()
        assert scored.result(SECONDS)[0] == 200 and waits.result(SECONDS)[0] == 503
        ending.result(SECONDS)
    assert reward.batches == [3]
    with pytest.raises(OSError):
        socket.create_connection(server.server_address[:2], timeout=1).close()


# What must not reach the reward ----------------------------------------------------------------------------------------------------


def header(**changes: Any) -> bytes:
    """A request for the scores of a video of 96 bytes whose header says something else."""
    entry = {"dtype": "F32", "shape": [1, 2, 3, 2, 2], "data_offsets": [0, 96]}
    metadata = {"rewards": '["first_pixel"]', "prompts": '["a"]'}
    document: dict[str, Any] = {"__metadata__": metadata, "frames": entry}
    for name, value in changes.items():
        part = metadata if name in metadata else entry if name in entry else document
        part[name] = value
    content = json.dumps(document).encode()
    return len(content).to_bytes(8, "little") + content + b"\0" * 96


BAD: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x01\x00",
    "no header": (0).to_bytes(8, "little") + b"\0" * 96,
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
    "header beyond the body": (500).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"{{{{",
    "deep JSON": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "list": (2).to_bytes(8, "little") + b"[]",
    "pickle": (12).to_bytes(8, "little") + b"\x80\x04cos\nsystem\n.",
    "trailing bytes": header() + b"\0",
    "bytes missing": header()[:-1],
    "another tensor": header(other={"dtype": "U8", "shape": [0], "data_offsets": [96, 96]}),
    "dtype": header(dtype="F64"),
    "dtype list": header(dtype=["F32"]),
    "shape": header(shape=[1, 3, 2, 2, 2]),
    "negative shape": header(shape=[-1, -2, 3, 2, 2]),
    "no videos": header(shape=[0, 2, 3, 2, 2]),
    "boolean shape": header(shape=[True, 2, 3, 2, 2]),
    "huge shape": header(shape=[1, 2, 3, 2, 10**30]),
    "offsets": header(data_offsets=[-96, 0]),
    "prompts": header(prompts='["a", "b"]'),
    "prompts no texts": header(prompts="[1]"),
    "prompts no JSON": header(prompts="a"),
    "prompts no string": header(prompts=["a"]),
    "no rewards": header(rewards="[]"),
    "rewards twice": header(rewards='["first_pixel", "first_pixel"]'),
    "metadata": header(__metadata__=[]),
}


def test_malformed_requests_are_refused_and_never_scored() -> None:
    reward = FirstPixel()
    with serving(reward) as server:
        assert request(server, header())[0] == 200, "what the others are changed from"
        reward.batches.clear()
        for name, body in {**BAD, "noise": random.randbytes(500)}.items():
            status, answer = request(server, body)
            assert status == 400 and answer["status"] == 400 and "\n" not in answer["error"], (name, status, answer)
        whole = header()
        with socket.create_connection(server.server_address[:2], SECONDS) as raw:  # a client that dies
            raw.sendall(head(len(whole)) + whole[:-9])
            raw.shutdown(socket.SHUT_WR)
            assert raw.recv(64).startswith(b"HTTP/1.0 400 ")
        assert not reward.batches
        assert request(server, whole)[0] == 200


def test_other_requests_are_refused_without_an_echo() -> None:
    marker = f"<b>{random.getrandbits(64):x}"
    with serving(FirstPixel()) as server:
        for expected, arguments in [
            (404, {"path": f"/{marker}"}),
            (404, {"path": "/../../etc/passwd"}),
            (404, {"path": "/health"}),
            (404, {"path": "/score", "method": "GET"}),
            (501, {"method": f"M{marker}"}),
            (415, {"Content-Type": "text/plain"}),
            (411, {"Content-Length": "1e3"}),
            (411, {"Content-Length": "-1"}),
            (411, {"Transfer-Encoding": "chunked"}),
        ]:
            status, answer = request(server, header(), **arguments)  # type: ignore[arg-type]
            assert (status, answer["status"]) == (expected, expected) and marker not in answer["error"], (arguments, answer)
        status, answer = request(server, header(rewards=json.dumps([marker])))
        assert status == 404 and marker not in answer["error"] and "first_pixel" in answer["error"]
        status, answer = request(server, None, "/health", "GET")
        assert status == 200 and answer["rewards"] == ["first_pixel"] and answer["waiting"] == 0 and answer["protocol"] == wire.PROTOCOL


def test_too_large_a_body_is_refused_before_it_is_sent() -> None:
    with serving(FirstPixel(), max_bytes=1000) as server, socket.create_connection(server.server_address[:2], SECONDS) as raw:
        raw.sendall(head(1001))
        assert raw.recv(64).startswith(b"HTTP/1.0 413 ")
        assert request(server, b"\0" * 20_000_000)[0] == 413, "one that is sent all the same"


def test_no_memory_is_taken_for_a_body_that_is_not_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    receive = Handler._receive
    monkeypatch.setattr(Handler, "_receive", lambda self, size, deadline: (taken.append(size), receive(self, size, deadline))[1])
    lie = (50).to_bytes(8, "little") + b" " * 50
    with (
        serving(FirstPixel(), max_bytes=1 << 40, waiting_bytes=1 << 41) as server,
        socket.create_connection(server.server_address[:2], SECONDS) as raw,
    ):
        raw.sendall(head(1 << 40) + lie)
        assert raw.recv(64).startswith(b"HTTP/1.0 400 ")
    assert taken == [8, 50]


def test_the_token_is_asked_for_everywhere() -> None:
    frames, reward = videos(), FirstPixel()
    with serving(reward, token=TOKEN) as server:
        for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": f"Bearer {TOKEN[:-1]}"}, {"Authorization": f"Basic {TOKEN}"}):
            assert request(server, header(), **headers)[0] == 401
            assert request(server, None, "/health", "GET", **headers)[0] == 401
            assert request(server, None, "/nowhere", "GET", **headers)[0] == 401
        for token in (None, TOKEN[::-1] + "x"):
            with pytest.raises(RewardServerError, match="401.*token is missing or wrong"):
                client(server, token=token)(frames, ["a"] * 3)
        assert not reward.batches
        assert torch.equal(client(server, token=TOKEN)(frames, ["a"] * 3)["first_pixel"], frames[:, 0, 0, 0, 0])


def test_more_than_may_wait_comes_again_later() -> None:
    reward = FirstPixel()
    many = [videos(1) for _ in range(12)]
    body = wire.pack(many[0], ["a"], ["first_pixel"])
    with serving(reward, waiting_bytes=2 * len(body)) as server, ThreadPoolExecutor(12) as pool:
        reward.go.clear()
        answers = [pool.submit(client(server), one, ["a"]) for one in many]
        eventually(lambda: len(server.scorer._admitted) == 2)
        assert request(server, body)[0] == 503
        reward.go.set()
        for one, answer in zip(many, answers):
            assert torch.equal(answer.result(SECONDS)["first_pixel"], one[:, 0, 0, 0, 0])


def test_those_who_dawdle_are_shown_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SILENCE", 0.3)
    monkeypatch.setattr(Handler, "timeout", SECONDS)
    monkeypatch.setattr(server_module, "CONNECTIONS", 2)
    with serving(FirstPixel()) as server:
        address = server.server_address[:2]
        with socket.create_connection(address, SECONDS) as headers, socket.create_connection(address, SECONDS) as body:
            headers.sendall(b"GET /hea")
            body.sendall(head(5) + b"12")
            eventually(lambda: len(server._open) == 2)
            with socket.create_connection(address, SECONDS) as third, pytest.raises(ConnectionResetError):
                if not third.recv(1):  # closed
                    raise ConnectionResetError
            assert headers.recv(64) == b""
            assert body.recv(64).startswith(b"HTTP/1.0 408 ")
        eventually(lambda: not server._open)
        assert request(server, header())[0] == 200


def test_unknown_bodies_are_not_unpickled() -> None:
    scores = {"it": torch.rand(3)}
    assert torch.equal(wire.read_scores(wire.pack_scores(scores), ["it"], 3)["it"], scores["it"])
    wrong = [{"it": torch.rand(2)}, {"other": torch.rand(3)}, {"it": torch.rand(3).double()}]
    for content in (b"", b"\x80\x04cos\nsystem\n.", *map(save, wrong)):
        with pytest.raises(wire.Malformed):
            wire.read_scores(content, ["it"], 3)


def test_quarantine_is_the_callers() -> None:
    """A remote reward is a reward like any other: without quarantine its NaN is an error that names it."""
    failing = CustomReward("it", lambda frames, prompts: [None] * len(frames))
    with serving(failing) as server, pytest.raises(ValueError, match="reward 'it' returned nan for video 0"):
        score(remote_rewards({"it": server.url}), videos(), ["a"] * 3)


@pytest.mark.parametrize(
    ("misbehaves", "line"),
    [
        (lambda frames, prompts: frames.zero_()[:, 0, 0, 0, 0], "reward 'it' changed the frames in place"),
        (lambda frames, prompts: {"score": 1}, "reward 'it' returned a dict"),
        (lambda frames, prompts: exit(3), "reward 'it' called sys.exit"),
    ],
)
def test_a_served_reward_that_misbehaves_is_named_to_its_client(misbehaves: Any, line: str) -> None:
    with serving(CustomReward("it", misbehaves)) as server:
        for _ in range(2):
            with pytest.raises(RewardServerError, match=f"answered 500 .*{line}"):
                client(server)(videos(), ["a"] * 3)


def test_frames_that_are_not_finite_are_not_scored() -> None:
    reward = FirstPixel()
    with serving(reward) as server:
        status, answer = request(server, wire.pack(videos(1) / 0, ["private"], ["first_pixel"]))
    assert status == 400 and "not finite" in answer["error"] and "private" not in answer["error"] and not reward.batches


# Where the token goes --------------------------------------------------------------------------------------------------------------

STRANGE = [
    "http://gpu7:8123",
    "https://gpu7",
    "http://127.0.0.1.example.org:1",
    "http://localhost.example.org",
    "http://10.0.0.1:1",
    "http://[fe80::1]:1",
]


@pytest.mark.parametrize("address", STRANGE)
def test_the_token_goes_only_where_the_user_allows_it(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses come with recipes, which may be a stranger's."""
    monkeypatch.delenv(wire.HOSTS_VARIABLE, raising=False)
    host = RewardClient(address, ["it"]).host
    for allowed in ("", "gpu", "another,gpu77", f"{host}:2", "*", "example.org"):
        monkeypatch.setenv(wire.HOSTS_VARIABLE, allowed)
        with pytest.raises(UserError, match=rf"{wire.TOKEN_VARIABLE} would be sent to .*{wire.HOSTS_VARIABLE}=") as raised:
            remote_rewards({"it": address}, token=TOKEN)
        assert TOKEN not in str(raised.value)
    port = RewardClient(address, ["it"]).port
    for allowed in (host, f" other , {host.upper()} ", f"[{host}]:{port}" if ":" in host else f"{host}:{port}"):
        monkeypatch.setenv(wire.HOSTS_VARIABLE, allowed)
        assert RewardClient(address, ["it"], token=TOKEN).token == TOKEN


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://localhost", "http://[::1]:9", "http://127.9.9.9"])
def test_a_loopback_needs_no_allowance(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(wire.HOSTS_VARIABLE, raising=False)
    assert RewardClient(address, ["it"], token=TOKEN).token == TOKEN


def test_a_recipe_alone_gets_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(wire.TOKEN_VARIABLE, TOKEN)
    monkeypatch.setattr(socket, "create_connection", lambda *unused, **more: pytest.fail("it was connected to"))
    with pytest.raises(UserError, match=f"{wire.TOKEN_VARIABLE} would be sent to gpu7"):
        load_rewards(load_config("toy", ["reward_servers.addresses={toy_vq: 'http://gpu7:8123'}"]))


def test_a_redirection_is_not_followed() -> None:
    with serving(FirstPixel(), token=TOKEN) as other, socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        other_asked = []
        other.process_request = lambda *unused: other_asked.append(1)  # type: ignore[method-assign]

        def redirect() -> None:
            connection, _ = listener.accept()
            connection.recv(1 << 16)
            connection.sendall(f"HTTP/1.0 307 Temporary Redirect\r\nLocation: {other.url}/health\r\n\r\n".encode())
            connection.close()

        redirected = pool.submit(redirect)
        with pytest.raises(RewardServerError, match="answered 307"):
            RewardClient(f"http://127.0.0.1:{listener.getsockname()[1]}", ["first_pixel"], token=TOKEN).health()
        redirected.result(SECONDS)
        time.sleep(0.1)
        assert not other_asked
