"""Commands that several ranks run together: the results of one process, byte for byte, and printed once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.commands import SMALL_COPO, outcome
from support.evaluations import lines_in, results_in, scores_in, whole
from support.ranks import run_commands, run_ranks
from support.vbench import write_info

from arcopo_fast import collect, evaluate, generate, vbench
from arcopo_fast.build import encode_ahead
from arcopo_fast.config.reading import load_config
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation import videos
from arcopo_fast.model.text import CachedTextEncoder
from arcopo_fast.planning import needs
from arcopo_fast.runtime.distributed import World
from arcopo_fast.runtime.memory import device_of
from arcopo_fast.storage import hub

TINY = ["toy", "sampler.steps=[1000]", "video.chunks=1", "generator.device=cpu", "train.threads=1"]
LIST = ["a red circle moving left", "a blue square moving up", "a green cross moving right"]
PROMPTS = [word for prompt in LIST for word in ("--prompt", prompt)]


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the ranks' logs."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in found if name.startswith(".") or "/." in name]
    return {name: content for name, content in found.items() if not name.startswith("logs/")}


def alone(main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status, lines, out = outcome(main, capsys, *arguments)
    assert not status, lines
    return out


def together(size: int, main: Callable[[list[str]], None], *arguments: object) -> str:
    """Return what rank 0 printed. The other ranks print nothing, and all end well."""
    first, *others = run_commands(size, main, *arguments)
    assert first.status == 0 and others == [(0, [], "")] * (size - 1), (first, others)
    return first.out


# The same results


def test_collect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["toy", *SMALL_COPO, "video.chunks=2", "--groups", "3", "--buffer"]
    alone(collect.main, capsys, *arguments, tmp_path / "one")
    out = together(2, collect.main, *arguments, tmp_path / "two")
    assert out.startswith(f"3 groups in {tmp_path / 'two'};") and out.count("\n") == 1
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert two == one and len([name for name in one if name.startswith("entries/")]) == 3
    assert ": rank 1 of 2, process " in (tmp_path / "two" / "logs" / "rank-1.log").read_text()


def test_evaluate(evaluated: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = together(2, evaluate.main, *whole(adapters), "--out", out)
    table, results = printed.strip().rsplit("\n", 1)
    assert table in (out / "table.md").read_text() and results == f"results: {out / 'results.json'}"
    assert results_in(out) == results_in(evaluated) and (out / "table.md").read_bytes() == (evaluated / "table.md").read_bytes()
    assert scores_in(out).values == scores_in(evaluated).values and len(lines_in(out)) == len(set(lines_in(out)))
    one, two = ({name: content for name, content in files(path).items() if name.endswith(".mp4")} for path in (evaluated, out))
    assert one == two and one


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two batches, of which the second is short; one of three ranks has nothing to do."""
    arguments = [*TINY, *PROMPTS, "--batch", 2, "--out"]
    out = alone(generate.main, capsys, *arguments, tmp_path / "one")
    for size in (2, 3):
        assert together(size, generate.main, *arguments, tmp_path / str(size)) == out.replace("/one/", f"/{size}/")
        assert files(tmp_path / str(size)) == files(tmp_path / "one")
    logs = {number: (tmp_path / "3" / "logs" / f"rank-{number}.log").read_text() for number in (1, 2)}
    assert "02-a-green-cross-moving-right.mp4: 5 frames" in logs[1] and ".mp4: " not in logs[2]


def test_vbench_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with --shard, and where some of the videos are there already."""
    arguments = ["sample", *TINY, "--info", write_info(tmp_path / "info.json"), "--videos", 1, "--out"]
    alone(vbench.main, capsys, *arguments, tmp_path / "one", "--batch", 2)
    assert together(2, vbench.main, *arguments, tmp_path / "two", "--batch", 2) == f"{tmp_path / 'two' / 'videos'}\n"
    expected = files(tmp_path / "one")
    assert files(tmp_path / "two") == expected and len([name for name in expected if name.endswith(".mp4")]) == 7
    together(3, vbench.main, *arguments, tmp_path / "parts", "--shard", "1/2")
    assert len(list((tmp_path / "parts" / "videos").iterdir())) == 3
    for _ in range(2):
        together(2, vbench.main, *arguments, tmp_path / "parts")
    assert files(tmp_path / "parts").keys() == expected.keys()


def test_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks that torchrun starts, as a user does, leave the files of one process, and rank 0 alone prints."""
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "arcopo_fast.generate"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    alone(generate.main, capsys, *TINY, *PROMPTS, "--out", tmp_path / "one")
    arguments = [*TINY, *PROMPTS, "--out", str(tmp_path / "two")]
    done = subprocess.run([*call, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr
    assert [Path(line).name for line in done.stdout.splitlines()] == sorted(files(tmp_path / "one"))
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert done.stderr.count(".mp4: ") == 2, "those of rank 0"


# What goes wrong


def test_a_rank_that_fails_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise UserError("a cosmic ray")

    write = videos.write_videos
    monkeypatch.setattr(videos, "write_videos", lambda *a, **k: (fail if os.environ["RANK"] == "1" else write)(*a, **k))
    first, second, third = run_commands(3, generate.main, *TINY, *PROMPTS, "--out", tmp_path, within=60)
    assert (second.status, second.lines[-1]) == (2, "rank 1: error: a cosmic ray")
    for number, lost in ((0, first), (2, third)):
        said = "(another rank has ended or does not answer, where all were|rank 1 did not come) to finish the videos; its own error"
        assert lost.status == 2 and re.match(f"rank {number}: error: {said}", lost.lines[-1]), lost
    assert {path.name[:2] for path in tmp_path.glob("*.mp4")} == {"00", "02"}


def test_ranks_with_another_list_are_named(tmp_path: Path) -> None:
    def main(arguments: list[str]) -> None:
        generate.main([*arguments, "--prompt", f"a {('red', 'blue')[int(os.environ['RANK'])]} circle moving left"])

    for number, ended in enumerate(run_commands(2, main, *TINY, "--out", tmp_path)):
        assert ended.status == 2 and ended.lines[-1].startswith(f"rank {number}: error: rank 1 of 2 has another recipe or list of prompts")
    assert not list(tmp_path.iterdir())


def test_a_gpu_is_not_shared() -> None:
    def device(world: World) -> torch.device:
        assert device_of("cpu", "--device") == torch.device("cpu")
        return device_of("cuda:1")

    for error in run_ranks(2, device):
        assert str(error) == "generator.device is 'cuda:1', and each of the 2 ranks has a GPU of its own; use generator.device=auto"


# Once for all


def test_prompts_are_encoded_by_one_rank(tmp_path: Path) -> None:
    class Encoder:
        def encode(self, prompt: str) -> torch.Tensor:
            return torch.full((2, 3), float(len(prompt)))

    def encode(world: World) -> list[float]:
        def load() -> Encoder:
            (tmp_path / f"loaded by {world.rank}").touch()
            return Encoder()

        encoder = CachedTextEncoder(load, fingerprint="a", text_len=4, directory=tmp_path / "cache")  # type: ignore[arg-type, return-value]
        encode_ahead(encoder, ["a", "bcd"], world)
        return encoder(["a", "bcd"])[:, 0, 0].tolist()

    assert run_ranks(3, encode) == [[1.0, 3.0]] * 3
    assert [path.name for path in tmp_path.glob("loaded*")] == ["loaded by 0"]


def test_files_are_downloaded_by_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(source: str, patterns: list[str]) -> None:
        copy = tmp_path / source.replace("/", "-")
        if not copy.exists():
            copy.write_text(os.environ["RANK"])

    monkeypatch.setattr(hub, "find", find)
    config = load_config("self_forcing", ["rewards={videoalign_vq: 1}"])
    published = {need.source for need in needs.needs(config) if hub.is_published(need.source)}
    assert len(published) > 2
    run_ranks(3, lambda world: needs.fetch(config, world))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {source.replace("/", "-"): "0" for source in published}
    for path in tmp_path.iterdir():
        path.unlink()
    run_ranks(2, lambda world: needs.fetch(config, world, "generator."))
    fetched = len(list(tmp_path.iterdir()))
    assert 0 < fetched < len(published)
    needs.fetch(config, World())
    assert len(list(tmp_path.iterdir())) == fetched, "a process alone downloads as it loads"
