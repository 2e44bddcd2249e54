"""Training with rewards that are not built in: served by another process, and a user's own; with failed scores."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from support.commands import SMALL_COPO
from support.rewards import load_reward
from support.servers import serving
from torch import Tensor

from arcopo_fast import train
from arcopo_fast.build import load_rewards
from arcopo_fast.cli import run_command
from arcopo_fast.config.reading import load_config, resolved_yaml
from arcopo_fast.errors import UserError
from arcopo_fast.reports.results import read_run
from arcopo_fast.rewards.base import score
from arcopo_fast.rewards.client import RewardServerError
from arcopo_fast.rewards.server import RewardServer
from arcopo_fast.storage.metrics import read_metrics
from arcopo_fast.train import main
from arcopo_fast.training.groups import JudgedGroup
from arcopo_fast.training.lessons import LearningWatch
from arcopo_fast.training.trainer import Trainer

RUN = ["toy", *SMALL_COPO, "rollout.group_size=4", "evaluation.sample_videos=0", "train.iterations=3", "train.save_every=0"]
RUN += ["rewards={toy_vq: 1.0, toy_mq: 0.5}"]


def serving_toys(port: int = 0) -> AbstractContextManager[RewardServer]:
    return serving(named={name: load_reward(name) for name in ("toy_vq", "toy_mq")}, port=port, max_bytes=1 << 30, waiting_bytes=1 << 30)


def untimed(run: Path) -> list[dict[str, object]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in read_metrics(run)]


def test_a_server_scores_as_well_as_we_do_and_its_death_loses_no_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*RUN, f"run.directory={tmp_path}/here"])
    here = tmp_path / "here" / "toy"
    with serving_toys() as server:
        addresses = f"{{toy_vq: {server.url}, toy_mq: {server.url}}}"
        arguments = [*RUN, f"reward_servers.addresses={addresses}", "reward_servers.give_up_after=0.5", f"run.directory={tmp_path}/there"]
        iteration = train.one_iteration

        def dies(trainer: Trainer, watch: LearningWatch, number: int) -> dict[str, object]:
            if number == 3:
                server.stop()
            return iteration(trainer, watch, number)

        with monkeypatch.context() as patched:
            patched.setattr(train, "one_iteration", dies)
            assert run_command(main, arguments) == 2
    there = tmp_path / "there" / "toy"
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the reward server at") and f"continue with python -m arcopo_fast.train --resume {there}" in said
    assert [path.name for path in (there / "checkpoints").iterdir()] == ["step-2"], "though none was due"
    with serving_toys(server.server_address[1]):
        main(["--resume", str(there)])
    assert untimed(there) == untimed(here)
    assert all(line["failed_scores"] == 0 for line in untimed(here))
    assert (there / "evaluation.json").read_text() == (here / "evaluation.json").read_text()


def test_failed_scores_are_counted_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "import torch\n"
        "def sometimes(frames, prompts):\n"
        "    scores = frames.mean((1, 2, 3, 4))\n"
        "    return [None if len(scores) == 4 and i == 1 else s for i, s in enumerate(scores)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[Tensor] = []
    advantages = JudgedGroup.advantages
    monkeypatch.setattr(JudgedGroup, "advantages", lambda self, config: (seen.append(advantages(self, config)), seen[-1])[1])
    own = 'rewards={"my_rewards:sometimes": 1.0, toy_vq: 0}'
    with pytest.warns(UserWarning, match="'my_rewards:sometimes' returned scores that are not finite"):
        main([*RUN, own, "rollout.prompts_per_iteration=2", "train.iterations=1", f"run.directory={tmp_path}"])
    (line,) = read_metrics(tmp_path / "toy")
    assert line["failed_scores"] == 2 and 0 < line["reward"] == line["reward/my_rewards:sometimes"] < 1
    assert len(seen) == 2 and all(one[1] == 0 and one[[0, 2, 3]].abs().min() > 0 and one.sum().abs() < 1e-9 for one in seen)


def test_a_run_whose_every_score_fails_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It would go on without ever learning. What it had learnt by then is kept, and it goes on once the reward is mended.

    One iteration may fail by its prompts, which a resumed run would meet again: that alone ends none.
    """
    module = tmp_path / "breaks.py"
    healthy = "class Breaks:\n    groups = 0\n    def __call__(self, frames, prompts):\n        return frames.mean((1, 2, 3, 4))\n"
    broken = (  # from the second iteration on, each of which has two groups of four, but for the third
        "        self.groups += len(frames) == 4\n"
        "        if self.groups > 2 and self.groups not in (5, 6):\n"
        "            return [None] * len(frames)\n"
        "        return"
    )
    module.write_text(healthy.replace("        return", broken))
    monkeypatch.syspath_prepend(tmp_path)
    rewards, shape = 'rewards={"breaks:Breaks": 1.0, toy_vq: 0.5}', ["rollout.prompts_per_iteration=2", "train.iterations=6"]
    with pytest.warns(UserWarning, match="not finite"):
        assert run_command(main, [*RUN, rewards, *shape, f"run.directory={tmp_path}"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "not one video of 3 iterations in a row got all its scores: of the last one's 8, 'breaks:Breaks' failed for 8; continue" in said
    run = tmp_path / "toy"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-5"]
    lines = untimed(run)
    assert [line["failed_scores"] for line in lines] == [0, 8, 0, 8, 8]
    assert ["reward" in line for line in lines] == [True, False, True, False, False]
    module.write_text(healthy)
    importlib.reload(sys.modules["breaks"])
    main(["--resume", str(run)])
    assert [line["failed_scores"] for line in untimed(run)] == [0, 8, 0, 8, 8, 0] and (run / "report.html").is_file()


def test_evaluation_leaves_failed_scores_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One video has no score before training: it counts nowhere, and the files stay JSON that anybody reads."""
    (tmp_path / "once.py").write_text(
        "class Once:\n"
        "    calls = 0\n"
        "    def __call__(self, frames, prompts):\n"
        "        self.calls += 1\n"
        "        return [None if self.calls == 1 and i == 1 else s for i, s in enumerate(frames.mean((1, 2, 3, 4)))]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = ["evaluation.prompts=3", "evaluation.videos_per_prompt=1", "evaluation.sample_videos=2", "train.iterations=1"]
    with pytest.warns(UserWarning, match="not finite"):
        main([*RUN, 'rewards={"once:Once": 2.0}', *settings, f"run.directory={tmp_path}"])
    run = tmp_path / "toy"

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads((run / "evaluation.json").read_text(), parse_constant=refuse)
    for name, weight in (("once:Once", 1.0), ("reward", 2.0)):
        before, after = document["before"][name], document["after"][name]
        assert before["failed"] == 1 and before["values"][1] is None and "failed" not in after and None not in after["values"]
        there = [before["values"][0], before["values"][2]]
        assert before["mean"] == pytest.approx(sum(there) / 2, abs=1e-6) and 0 < before["mean"] / weight < 1
        (change,) = [one for one in read_run(run).changes if one.name == name]
        assert change.failed == 1 and change.before == pytest.approx(sum(there) / 2, abs=1e-6)
        assert change.after == pytest.approx((after["values"][0] + after["values"][2]) / 2, abs=1e-6)
    assert document["videos"][1]["reward_before"] is None
    assert "1 left out: no score" in (run / "report.html").read_text() and "1 left out: no score" in capsys.readouterr().out


def test_a_watched_reward_that_fails_costs_no_total_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reward of weight 0 is in no total: of an iteration, of the evaluations before and after, or of what is reported."""
    (tmp_path / "watched.py").write_text("def half(frames, prompts):\n    return [None if i % 2 else 0.5 for i in range(len(frames))]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="'watched:half' returned scores that are not finite"):
        main([*RUN, 'rewards={toy_vq: 2.0, "watched:half": 0}', "train.iterations=1", f"run.directory={tmp_path}"])
    run = tmp_path / "toy"
    (line,) = read_metrics(run)
    assert line["failed_scores"] == 2 and line["reward"] == 2 * line["reward/toy_vq"] and line["reward/watched:half"] == 0.5
    document = json.loads((run / "evaluation.json").read_text())
    for side in ("before", "after"):
        assert document[side]["watched:half"]["failed"] == 1 and "failed" not in document[side]["reward"]
        assert document[side]["reward"]["mean"] == pytest.approx(2 * document[side]["toy_vq"]["mean"], rel=1e-6)
    failed = {change.name: change.failed for change in read_run(run).changes}
    assert failed["reward"] == failed["toy_vq"] == 0 and failed["watched:half"] == 1
    assert sum("left out: no score" in said for said in capsys.readouterr().out.splitlines()) == 1


def test_a_reward_that_goes_by_seconds_is_told_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by the recipe, at a server by --fps; a server that was told another rate than the recipe's is refused."""
    (tmp_path / "rated.py").write_text(
        "class Reward:\n    fps = 16.0\n    def __call__(self, frames, prompts):\n        return [self.fps] * len(frames)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name, frames = "rated:Reward", torch.rand(2, 3, 3, 8, 8)
    recipe = f"rewards={json.dumps({name: 1.0})}"
    assert score(load_rewards(load_config("toy", [recipe, "video.fps=24"])), frames, ["a", "b"])[name].tolist() == [24, 24]
    with serving(named={name: load_reward(name, fps=12)}, fps=12) as server:
        remote = [recipe, f"reward_servers.addresses={json.dumps({name: server.url})}", "reward_servers.give_up_after=0.5"]
        rewards = load_rewards(load_config("toy", [*remote, "video.fps=12"]))
        assert score(rewards, frames, ["a", "b"])[name].tolist() == [12, 12]
        with pytest.raises(RewardServerError, match=r"at 12 frames per second, but these have 24; start it with --fps 24"):
            load_rewards(load_config("toy", [*remote, "video.fps=24"]))


def test_addresses_are_of_rewards() -> None:
    with pytest.raises(UserError, match="reward_servers.addresses has 'toy_ta', which is not among the rewards"):
        load_config("toy", ["rewards={toy_vq: 1.0}", "reward_servers.addresses={toy_ta: http://127.0.0.1:1}"])
    with pytest.raises(UserError, match="expected a text"):
        load_config("toy", ["reward_servers.addresses={toy_vq: 3}"])
    config = load_config("toy", ["rewards={toy_vq: 1.0}", "reward_servers.addresses={toy_vq: 'http://[::1]:8123'}"])
    assert "http://[::1]:8123" in resolved_yaml(config)
