"""What must not reach a served reward, and where the token goes."""

from __future__ import annotations

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors.torch import save
from support.requests import TOKEN, FirstPixel, client, eventually, head, request, videos
from support.servers import SECONDS, serving

from arcopo_fast.build import load_rewards
from arcopo_fast.config.reading import load_config
from arcopo_fast.errors import UserError
from arcopo_fast.rewards import server as server_module
from arcopo_fast.rewards import wire
from arcopo_fast.rewards.base import score
from arcopo_fast.rewards.client import RewardClient, RewardServerError, remote_rewards
from arcopo_fast.rewards.custom import CustomReward
from arcopo_fast.rewards.server import Handler

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
