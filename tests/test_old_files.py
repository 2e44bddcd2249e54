"""Files that an older version wrote are read, added to and finished by this one.

tests/fixtures/old was written by the first version, before its files moved to rooms: two runs of the toy recipe with `SETTINGS`, of which
one was stopped in its second iteration; a buffer of one group; an evaluation, a study and a sweep with `VIDEO`. What no test needs is left
out.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from support import old_judges
from support.commands import outcome
from support.runs import Page

from arcopo_fast import collect, entropy, evaluate, generate, merge, report, train
from arcopo_fast.build import checkpoint_path, load_model
from arcopo_fast.config.reading import load_config
from arcopo_fast.model.adapter_files import read_adapter
from arcopo_fast.model.lora import adapter_state, load_adapter
from arcopo_fast.storage.metrics import read_metrics

OLD = Path(__file__).parent / "fixtures" / "old"
VIDEO = ["video.chunks=2", "video.chunk_frames=1", "sampler.steps=[1000,350]", "sampler.warp=false", "sampler.shift=1.0"]
SETTINGS = [
    *VIDEO,
    'rewards={"toy_vq":1.0}',
    "rollout.group_size=2",
    "objective.anchors_per_update=1",
    "train.iterations=2",
    "train.save_every=1",
    "evaluation.prompts=1",
    "evaluation.videos_per_prompt=1",
    "evaluation.sample_videos=1",
    "lora.rank=1",
    "lora.alpha=2",
    "lora.targets=[to_q]",
    "run.tensorboard=false",
    "run.directory=.",
    # What the recipe said then.
    "rollout.prompts_per_iteration=1",
    "rollout.noise_strength=0.85",
    "objective.tau=1.0",
    "objective.clip=2.0e-2",
    "optimizer.gradient_clip=0.02",
    "optimizer.lr=5.0e-4",
]


@pytest.fixture(autouse=True)
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a copy of the old files, as their writer stood."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def judges_of_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the judges be those of then: a judge whose file was edited since is another one, and rightly refused."""
    old_judges.put_in_place(monkeypatch, OLD / "stopped" / "inputs.json")


@pytest.mark.usefixtures("judges_of_then")
def test_a_run_goes_on_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, _ = outcome(train.main, capsys, "--resume", "stopped")
    assert status == 0 and len(lines) == 1 and "2/2" in lines[0], lines
    ours, theirs = (read_metrics(Path(name)) for name in ("stopped", "finished"))
    assert [line["step"] for line in ours] == [1, 2] and ours[0] == read_metrics(OLD / "stopped")[0]
    for name in theirs[1].keys() - {"time"}:
        assert ours[1].get(name) == pytest.approx(theirs[1].get(name), rel=1e-2, abs=1e-5), name
    assert {"adapter", "evaluation.json", "report.html", "samples"} <= {path.name for path in Path("stopped").iterdir()}
    ours, theirs = (read_adapter(Path(name) / "adapter").state for name in ("stopped", "finished"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


def test_a_runs_report_is_written_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(report.main, capsys, "finished").status == 0
    text = Page(Path("finished/report.html")).text
    document = json.loads((OLD / "finished" / "evaluation.json").read_text())
    assert "Before and after" in text and f"{document['before']['toy_vq']['mean']:.3f}" in text
    assert outcome(report.main, capsys, "finished", "stopped", "--out", "both.html").status == 0


def test_a_runs_own_recipe_starts_another_one() -> None:
    config = load_config("finished/config.yaml", ["name=again"])
    assert config.lora.rank == 1 and config == load_config(
        "toy", [*SETTINGS, "evaluation.filters=false", "evaluation.few_steps=false", "name=again"]
    )


@pytest.mark.parametrize("mode", ["semi_on_policy", "off_policy"])
def test_a_buffer_is_trained_on(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(train.main, capsys, "toy", *SETTINGS, "--mode", mode, "--buffer", "buffer", "name=new").status == 0
    metrics = read_metrics(Path("new"))
    assert len(metrics) == 2 and metrics[0]["update1/ratio_max"] == 0 and math.isfinite(metrics[0]["buffer/reward"])


@pytest.mark.usefixtures("judges_of_then")
def test_a_buffer_is_added_to(capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("buffer/entries/000000.safetensors").read_bytes()
    assert outcome(collect.main, capsys, "toy", *SETTINGS, "--buffer", "buffer", "--groups", 2).status == 0
    assert sorted(path.name for path in Path("buffer/entries").iterdir()) == ["000000.safetensors", "000001.safetensors"]
    assert Path("buffer/entries/000000.safetensors").read_bytes() == before


@pytest.mark.parametrize("place", ["finished/adapter", "stopped/checkpoints/step-1/adapter"])
def test_an_adapter_is_loaded_merged_and_used(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = read_adapter(place)
    model = load_adapter(load_model(checkpoint_path("toy")), place)
    assert (adapter.rank, adapter.alpha) == (1, 2.0)
    assert adapter.state.keys() == adapter_state(model).keys() and any(tensor.any() for tensor in adapter.state.values())
    assert outcome(merge.main, capsys, "--semi", "finished", "--on", place, "--scale", 0.5, "--out", "merged").status == 0
    assert read_adapter("merged").rank == 2
    video = [*VIDEO, "--prompt", "a red circle moving left", "--lora", "merged", "--out", "video.mp4"]
    assert outcome(generate.main, capsys, "toy", *video).status == 0 and Path("video.mp4").stat().st_size


@pytest.mark.usefixtures("judges_of_then")
def test_an_evaluation_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """With its last video missing and another scale."""
    file = Path("evaluation/scores/first.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    ask = ["toy", *VIDEO, 'rewards={"toy_vq":1.0}', "evaluation.prompts=2", "--videos", 1, "--keep-videos", "none"]
    assert outcome(evaluate.main, capsys, *ask, "--adapter", "finished=finished/adapter@0.5,1,2", "--out", "evaluation").status == 0
    ours, theirs = (json.loads((folder / "results.json").read_text())["results"] for folder in (Path("evaluation"), OLD / "evaluation"))
    means = {(one["generator"], one["score"]): one["mean"] for one in ours}
    assert {name for name, _ in means} == {"base", "finished@0.5", "finished@1", "finished@2"}
    for one in theirs:
        assert means[one["generator"], one["score"]] == pytest.approx(one["mean"], abs=1e-4)
    assert file.read_text() == "".join(lines[:-1]), "what was made is not made again"


def test_a_study_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(entropy.main, capsys, "toy", *VIDEO, "--prompts", 2, "--draws", 2, "--out", "study").status == 0
    ours, theirs = (json.loads((folder / "entropy.json").read_text())["records"] for folder in (Path("study"), OLD / "study"))
    assert ours[: len(theirs)] == theirs and len(ours) == 2 * len(theirs)


@pytest.mark.usefixtures("judges_of_then")
def test_a_sweep_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """With another scale between those that it had."""
    pair = ["--semi", "finished", "--on", "stopped/checkpoints/step-1/adapter"]
    settings = [*VIDEO, 'rewards={"toy_vq":1.0}', "evaluation.prompts=1", "evaluation.videos_per_prompt=2", "evaluation.sample_videos=0"]
    assert outcome(merge.main, capsys, *pair, "--sweep", "0.5,1", "--out", "sweep", "toy", *settings).status == 0
    kept = [path.relative_to(OLD) for path in (OLD / "sweep" / "evaluations").iterdir()]
    assert len(kept) == 2 and all(path.read_bytes() == (OLD / path).read_bytes() for path in kept), "what was judged is not judged again"
    rows = [line for line in Path("sweep/sweep.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[:6]] == ["scale", "----------", "base model", "0", "0.5", "1"]
