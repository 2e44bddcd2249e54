"""metrics.jsonl: every line is whole, and a crash costs one line at most."""

from __future__ import annotations

import errno
import json
import math
import random
from pathlib import Path

import pytest
import torch

from arcopo_fast.errors import UserError
from arcopo_fast.storage.metrics import MetricsWriter, read_metrics


def test_what_is_written_is_read(tmp_path: Path) -> None:
    values = [{"reward": random.gauss(0, 1), "update1/live": random.random(), "time": {"rollout": random.random()}} for _ in range(5)]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step, record in enumerate(values, start=1):
            writer.write(step, record)
            assert len(read_metrics(tmp_path)) == step  # flushed: another process sees it
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": step} | record for step, record in enumerate(values, start=1)]


def test_order_and_kinds_of_values(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"b": math.nan, "a": torch.tensor(0.5), "time": {"z": 1.0, "c": -math.inf}, "B": 3, "t": True, "n": None, "s": "Ä"})
        writer.write(2, {"s": "Ä", "n": None, "t": True, "B": 3, "time": {"c": 2.0, "z": 1.0}, "a": 0.5, "b": math.inf})
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"step": 1, "B": 3, "a": 0.5, "b": null, "n": null, "s": "Ä", "t": true, "time": {"c": null, "z": 1.0}}'
    assert lines[1] == lines[0].replace('"step": 1', '"step": 2').replace('"c": null', '"c": 2.0')
    first, second = map(json.loads, lines)
    for record in (first, second):
        del record["time"], record["step"]
    assert first == second


def test_a_torn_last_line_is_left_out_and_not_glued_to_the_next(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"reward": 1.0})
        writer.write(2, {"reward": 2.0})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole)):  # killed anywhere inside the second line
        path.write_bytes(whole[:cut])
        assert [record["step"] for record in read_metrics(path)] == [1]
        with MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.write(3, {"reward": 3.0})
        assert [record["step"] for record in read_metrics(path)] == [1, 3]


def test_a_foreign_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl:2: not a JSON record"):
        read_metrics(path)
    with pytest.raises(UserError, match="cannot read"):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"reward": 1.0})
    file = writer._file

    class Full:
        """Takes half of what it is given, then nothing."""

        def write(self, content: bytes) -> int:
            if len(content) < 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return file.write(content[: len(content) // 2])

        def __getattr__(self, name: str) -> object:
            return getattr(file, name)

    writer._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        writer.write(2, {"reward": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "reward": 1.0}\n'
    writer._file = file
    writer.write(3, {"reward": 3.0})
    writer.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rewards = [random.gauss(0, 1) for _ in range(3)]
    with MetricsWriter(tmp_path) as writer:
        for step, reward in enumerate(rewards, start=1):
            writer.write(step, {"reward": reward, "reward/toy_vq": 2 * reward, "gradient_norm": math.nan, "time": {"rollout": 0.5}})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["reward", "reward/toy_vq", "time/rollout"]
    scalars = events.Scalars("reward")
    assert [scalar.step for scalar in scalars] == [1, 2, 3]
    assert [scalar.value for scalar in scalars] == pytest.approx(rewards, rel=1e-6)


def test_tensorboard_shows_each_step_once_after_a_checkpoint_was_gone_back_to(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for after, steps, reward in ((0, range(1, 6), 1.0), (2, range(3, 5), 2.0)):
        with MetricsWriter(tmp_path, after=after) as writer:
            for step in steps:
                writer.write(step, {"reward": reward})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("reward")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_an_interrupt_in_the_midst_of_a_line_leaves_none_of_it(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    file = writer._file

    class Interrupted:
        def write(self, content: bytes) -> int:
            file.write(content[:5])
            raise KeyboardInterrupt

        def __getattr__(self, name: str) -> object:
            return getattr(file, name)

    writer._file = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        writer.write(1, {"reward": 1.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
