"""Rewards behind HTTP, on the loopback: the same scores, each to whom it belongs, whatever comes and whoever dies."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from support.requests import FirstPixel, client, eventually, head, kill, request, videos
from support.rewards import load_reward
from support.servers import SECONDS, serving
from torch import Tensor

from arcopo_fast.errors import UserError
from arcopo_fast.rewards import wire
from arcopo_fast.rewards.base import Reward, score
from arcopo_fast.rewards.client import RewardClient, RewardServerError, remote_rewards
from arcopo_fast.rewards.server import RewardServer

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
