"""`python -m arcopo_fast.rewards`: what it serves, when it ends, and what it says to bad input."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.requests import TOKEN
from support.rewards import load_reward

from arcopo_fast.errors import UserError
from arcopo_fast.rewards import wire
from arcopo_fast.rewards.__main__ import main
from arcopo_fast.rewards.base import score
from arcopo_fast.rewards.client import remote_rewards

SECONDS = 30  # nothing here takes so long, unless it hangs


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "expected python -m arcopo_fast.rewards serve"),
        (["serv"], "given serv"),
        (["serve", "no_such"], "there is no reward 'no_such'"),
        (["serve", "sharpness", "--host", "0.0.0.0"], "there is no token"),
        (["serve", "sharpness", "--token-file", "/no/such/file"], "cannot read the token"),
        (["serve", "sharpness", "--token-file", os.devnull], "holds no token"),
        (["serve", "sharpness", "--port", "99999"], "cannot listen"),
        (["serve", "sharpness", "--host", "192.0.2.1"], "there is no token"),
        (["serve", "sharpness", "--device", "tpu9"], "--device"),
    ],
)
def test_bad_command_lines(arguments: list[str], part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(wire.TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match=part) as raised:
        main(arguments)
    assert "\n" not in str(raised.value)


def test_a_port_in_use_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot listen .* in use"):
        main(["serve", "sharpness", "--port", str(taken.getsockname()[1])])


def test_the_list_names_every_reward(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("toy_vq", "sharpness", "package.module:function")) and "not here" not in out


SLOW = """
import pathlib, time

def slow(frames, prompts):
    pathlib.Path(prompts[0]).touch()
    time.sleep(1)
    return frames[:, 0, 0, 0, 0]
"""


def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    (tmp_path / "my_reward.py").write_text(SLOW)
    command = [sys.executable, "-m", "arcopo_fast.rewards", "serve", "sharpness", "my_reward:slow", "--port", "0", "--device", "cpu"]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = os.environ | {wire.TOKEN_VARIABLE: TOKEN, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert line.startswith("serving sharpness, my_reward:slow at http://127.0.0.1:"), process.stderr.read()
            address = line.split()[-1]
            frames, begun = torch.rand(2, 5, 3, 12, 13), tmp_path / "begun"
            rewards = remote_rewards({"sharpness": address}, token=TOKEN, give_up_after=SECONDS)
            assert torch.equal(score(rewards, frames, ["a", "b"])["sharpness"], load_reward("sharpness")(frames, ["a", "b"]))

            with ThreadPoolExecutor(1) as pool:
                slow = remote_rewards({"my_reward:slow": address}, token=TOKEN, give_up_after=SECONDS)["my_reward:slow"]
                scores = pool.submit(slow, frames, [str(begun), "b"])
                deadline = time.monotonic() + SECONDS
                while not begun.exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                assert torch.equal(scores.result(2 * SECONDS)["my_reward:slow"], frames[:, 0, 0, 0, 0]), "what was being scored is answered"
            assert process.wait(SECONDS) == 0
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def test_loading_a_reward_needs_no_other() -> None:
    """An environment that is made for one reward may lack what the rest of the package needs."""
    code = "import sys, arcopo_fast.rewards.__main__ as m; m.load_rewards(['sharpness']); print([n for n in sys.modules if n in %r])"
    heavy = ("diffusers", "transformers", "peft", "av", "tensorboard", "arcopo_fast.model", "arcopo_fast.toy", "arcopo_fast.build")
    done = subprocess.run([sys.executable, "-c", code % (heavy,)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
