"""`python -m arcopo_fast.entropy` on the toy world: its numbers, what it leaves, going on, and what it says to bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from support.commands import outcome

from arcopo_fast.build import build_engine, load_generator, load_prompts
from arcopo_fast.cli import run_command
from arcopo_fast.config.reading import load_config
from arcopo_fast.entropy import main
from arcopo_fast.evaluation.study import MEASURES, Study
from arcopo_fast.model.lora import adapter_state, add_lora, load_adapter_state, save_adapter
from arcopo_fast.rollout.noise import GroupId, KeyedNoise

SMALL = ["toy", "video.chunks=3", "sampler.steps=[1000,300]"]
NAMES = ["initial", "renoise1"]


def study(directory: Path, *arguments: str, prompts: int = 2, draws: int = 2) -> dict[str, Any]:
    main([*SMALL, "--prompts", str(prompts), "--draws", str(draws), "--out", str(directory), *arguments])
    return read(directory)


def read(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "entropy.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    status, lines, _ = outcome(main, capsys, *arguments)
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("entropy") / "deep" / "toy"
    study(directory)
    return directory


def test_its_numbers_are_those_of_independent_videos(finished: Path) -> None:
    """Every video generated and decoded as a whole, by itself."""
    config = load_config("toy", SMALL[1:])
    generator = load_generator(config)
    engine = build_engine(config, generator.model, videos=1)
    prompt = load_prompts(config).evaluation[1].text

    class Source:
        def __init__(self, pivot: int, step: int | None, draw: int) -> None:
            self.place, self.draw = (pivot, step), draw

        def noise(self, *place: Any) -> KeyedNoise:
            return KeyedNoise(engine.shape, GroupId(config.evaluation.seed, iteration=self.draw if place == self.place else 0, group=1))

        def initial(self, chunk: int) -> torch.Tensor:
            return self.noise(chunk, None).initial(chunk)

        def renoise(self, chunk: int, step: int) -> torch.Tensor:
            return self.noise(chunk, step).renoise(chunk, step)

    def made(source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        latents = engine.generate(generator.encode_text([prompt]), source)
        return latents[0].double(), generator.decoder.decode(latents, generator.decoder.start())[0][0].double()

    latents, frames = made(Source(0, None, 0))
    first_frame = [0, 5, 13]
    records = {record["pivot"]: record for record in read(finished)["records"] if record["prompt"] == 1}
    assert sorted(records) == [1, 2, 3] and records[1]["text"] == prompt
    for pivot, step, draw in ((0, None, 1), (1, 0, 2), (2, None, 2)):
        others, other_frames = made(Source(pivot, step, draw))
        changes = {
            "chunk": (others - latents)[2 * pivot : 2 * pivot + 2],
            "video": (others - latents)[2 * pivot :],
            "frames": 255 * (other_frames - frames)[first_frame[pivot] :],
        }
        assert torch.equal(other_frames[: first_frame[pivot]], frames[: first_frame[pivot]])
        for measure, change in changes.items():
            measured = records[pivot + 1][measure][NAMES[0 if step is None else 1]]
            assert len(measured) == 2
            assert measured[draw - 1] == pytest.approx(change.square().mean().item(), rel=1e-3), (pivot, step, measure)


def test_a_study_leaves_everything_behind(finished: Path) -> None:
    left = {path.name for path in finished.iterdir()}
    assert left == {"entropy.json", "entropy.md", "entropy.html", "entropy.png", "pivot-1.png", "pivot-2.png", "pivot-3.png"}
    document = read(finished)
    assert document["settings"]["sampler.steps"] == [1000, 300] and document["settings"]["adapter"] == "none"
    assert [entry["pivot"] for entry in document["summary"]] == [1, 2, 3]
    assert min(entry["video"]["ratio"]["mean"] for entry in document["summary"]) > 1, "the toy's initial noise decides"
    text = (finished / "entropy.md").read_text()
    heads = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| pivot")]
    assert heads == [["pivot", "initial noise", "re-noise 1", "ratio"]] * 3
    page = (finished / "entropy.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page
    for label in ("unchanged", "initial noise", "re-noise 1", "Pivot 3"):
        assert label in page
    assert "re-noise 2" not in page


def test_a_picture_shows_the_rows_that_differ(finished: Path) -> None:
    """Above the changed rows the unchanged video; they part from it at the pivot and not before."""
    with av.open(str(finished / "pivot-2.png")) as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(float)
    record = next(record for record in read(finished)["records"] if record["pivot"] == 2)
    columns, tile = len(record["times"]), 128
    assert image.shape == (8 + 3 * 130 - 2, columns * 130 - 2, 3) and len(record["marked"]) == columns // 3
    rows = [image[8 + row * 130 : 8 + row * 130 + tile] for row in range(3)]
    for column in range(columns):
        part = slice(column * 130, column * 130 + tile)
        initial, renoise = (np.abs(row[:, part] - rows[0][:, part]).mean() for row in rows[1:])
        assert (image[:6, part].max() < 128) == (column in record["marked"])
        if column < record["marked"][0]:
            assert initial == renoise == 0
        else:
            assert initial > renoise > 0


def test_an_interrupted_study_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add = Study.add

    def interrupted(self: Study, record: dict[str, Any]) -> None:
        add(self, record)
        if len(self.records) == 4:
            raise KeyboardInterrupt

    arguments = [*SMALL, "--prompts", "2", "--out", str(tmp_path / "a")]
    with monkeypatch.context() as patched:
        patched.setattr(Study, "add", interrupted)
        assert run_command(main, arguments) == 130
    assert len(read(tmp_path / "a")["records"]) == 4
    made = []

    def counted(self: Study, record: dict[str, Any]) -> None:
        made.append((record["prompt"], record["pivot"]))
        add(self, record)

    monkeypatch.setattr(Study, "add", counted)
    assert run_command(main, arguments) == 0
    assert made == [(1, 2), (1, 3)]
    assert {path.name for path in (tmp_path / "a").iterdir()} == {path.name for path in finished.iterdir()}
    ours, theirs = read(tmp_path / "a"), read(finished)
    assert ours == theirs, "the same numbers, whether it was interrupted or not"
    for name in ("entropy.md", "entropy.html", "entropy.png"):
        assert (tmp_path / "a" / name).read_bytes() == (finished / name).read_bytes()
    capsys.readouterr()

    monkeypatch.setattr("arcopo_fast.evaluation.study.load_generator", None)  # nothing is missing: nothing is loaded
    assert run_command(main, arguments) == 0 and "| pivot" in capsys.readouterr().out
    other = refused(capsys, *arguments, "sampler.steps=[1000,400]", "evaluation.seed=5", "cache.window=4", "--draws", "1")
    assert "sampler.steps: [1000.0, 400.0] here, [1000.0, 300.0] there" in other and "evaluation.seed: 5 here, 1234 there" in other
    assert (
        "cache.window: 4 here, null there" in other
        and "draws: 1 here, 2 there" in other
        and str(tmp_path / "a") in other
        and "video" not in other
    )
    assert read(tmp_path / "a") == theirs
    # What changes no number is no other study.
    assert run_command(main, [*arguments, "video.fps=9", "name=again", "train.iterations=7", "objective.tau=2.0"]) == 0


def test_small_batches_and_a_window(finished: Path, tmp_path: Path) -> None:
    """Two videos at once, one decoded at a time: the same numbers. With a window others, in a pool that holds them."""
    waves = study(tmp_path / "waves", "rollout.branches_per_wave=1", "rollout.decode_branches=1", prompts=1)
    ours, theirs = waves["records"], read(finished)["records"][:3]
    for record, expected in zip(ours, theirs, strict=True):
        for measure in MEASURES:
            for name in NAMES:
                assert record[measure][name] == pytest.approx(expected[measure][name], rel=1e-3)
    windowed = study(tmp_path / "window", "cache.window=4", "cache.sink=1", "video.chunks=4", prompts=1, draws=1)
    assert [record["pivot"] for record in windowed["records"]] == [1, 2, 3, 4]


def test_an_adapter_is_studied(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_generator(load_config("toy")).model
    add_lora(model, rank=2, alpha=4, targets=["to_q", "to_v"], seed=int(torch.randint(1000, ())))
    load_adapter_state(model, {name: 0.1 * torch.randn_like(tensor) for name, tensor in adapter_state(model).items()})
    save_adapter(tmp_path / "adapter", model)
    arguments = ["--adapter", str(tmp_path / "adapter")]
    changed = study(tmp_path / "study", *arguments, prompts=1, draws=1)
    plain = {record["pivot"]: record for record in read(finished)["records"] if record["prompt"] == 0}
    assert re.fullmatch("[0-9a-f]{12}", changed["settings"]["adapter"])
    ratios = [record["video"]["initial"][0] / plain[record["pivot"]]["video"]["initial"][0] for record in changed["records"]]
    assert len(ratios) == 3 and max(abs(ratio - 1) for ratio in ratios) > 1e-3, "one alone may come out nearly the same"
    capsys.readouterr()
    said = refused(capsys, *SMALL, "--draws", "1", "--out", str(tmp_path / "study"))
    assert f'adapter: "none" here, "{changed["settings"]["adapter"]}" there' in said


@pytest.mark.parametrize(("setting", "said"), [("sampler.steps=[1000]", "of a single step"), ("sampler.kind=ode", "of kind ode")])
def test_a_sampler_without_renoise(setting: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = study(tmp_path / "a", setting, prompts=1)
    assert list(document["records"][0]["video"]) == ["initial"]
    assert document["summary"][0]["video"]["ratio"] == {"mean": None, "error": None}
    assert f"There is no re-noise to compare with: the sampler is {said}" in capsys.readouterr().out
    assert said in (tmp_path / "a" / "entropy.html").read_text()


def test_the_first_chunk_may_have_other_steps(tmp_path: Path) -> None:
    document = study(tmp_path / "a", "sampler.first_chunk_steps=[1000,500,250]", prompts=1, draws=1)
    assert [list(record["video"]) for record in document["records"]] == [["initial", "renoise1", "renoise2"], NAMES, NAMES]
    rows = [line for line in (tmp_path / "a" / "entropy.md").read_text().splitlines() if re.match(r"\| [123] ", line)]
    assert [line.split("|")[4].strip() == "–" for line in rows[:3]] == [False, True, True]


BAD = {
    "no prompts": (["--prompts", "0"], "--prompts: expected a whole number, at least 1; given '0'"),
    "more prompts than there are": (["--prompts", "5000"], "--prompts is 5000"),
    "no such adapter": (["--adapter", "/nowhere/adapter"], "/nowhere/adapter"),
    "a place that cannot be written": (["--out", "/proc/entropy"], "cannot make /proc/entropy"),
    "no such recipe": (["tou"], "toy"),
    "no such option": (["--prompt", "3"], "--prompts"),
}


@pytest.mark.parametrize("arguments, said", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_directory_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert f"--out {tmp_path / 'file'} is a file" in refused(capsys, "--out", str(tmp_path / "file"))
    for content in ("{", '{"records": []}', "[]", '{"settings": 3, "records": 4}'):
        (tmp_path / "entropy.json").write_text(content)
        assert "cannot be read as a study" in refused(capsys, "--out", str(tmp_path))
        assert (tmp_path / "entropy.json").read_text() == content
