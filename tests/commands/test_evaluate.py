"""`python -m arcopo_fast.evaluate`: what is compared is paired, what fails is left out, and what it says to bad input."""

from __future__ import annotations

import importlib
import json
import math
import random
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.commands import outcome
from support.evaluations import CAPTIONS, SMALL, THREE, lines_in, results_in, scores_in

from arcopo_fast import evaluate
from arcopo_fast.build import build_engine, checkpoint_path, load_generator, load_held_out, load_prompts, load_rewards
from arcopo_fast.cli import run_command
from arcopo_fast.config.reading import load_config
from arcopo_fast.evaluation.judging import evaluate as evaluate_once
from arcopo_fast.evaluation.judging import videos_at_once
from arcopo_fast.evaluation.scores import BASE, Video
from arcopo_fast.model.lora import load_adapter

command = partial(outcome, evaluate.main)


def test_what_it_leaves(evaluated: Path, adapters: dict[str, Path]) -> None:
    scores, results = scores_in(evaluated), results_in(evaluated)
    names = [BASE, "on@1", "on@-0.5", "mine@1", "zero@1"]
    assert list(scores.adapters) == sorted(names) and len(lines_in(evaluated)) == len(scores.values) == 5 * 6
    assert [one["generator"] for one in results[:5]] == names and results[0]["score"] == "reward"
    kinds = {one["score"]: one["kind"] for one in results}
    assert kinds == {"reward": "total"} | dict.fromkeys(("toy_vq", "toy_mq", "toy_ta"), "trained") | dict.fromkeys(
        ("shape_fidelity", "motion_agreement", "caption_accuracy"), "held out"
    )
    table = (evaluated / "table.md").read_text()
    for one in results:
        values = [parts[one["score"]] for parts in scores.of(one["generator"]).values()] if one["score"] != "reward" else None
        if values:
            assert one["mean"] == pytest.approx(np.mean(values)) and one["videos"] == 6 and one["failed"] == 0
        assert f"{one['mean']:.3f}" in table
    files = {str(file.relative_to(evaluated / "videos")) for file in evaluated.glob("videos/*/*.mp4")}
    words = [prompt.text.replace(" ", "-") for prompt in scores.prompts.values()]
    assert files == {f"{name}/0000-{words[0]}-{number}.mp4" for name in names for number in range(2)}
    assert not list(evaluated.rglob(".*")), "nothing half-written is left"


def test_an_adapter_of_zeros_changes_nothing_at_all(evaluated: Path) -> None:
    scores = scores_in(evaluated)
    assert [*scores.of("zero@1").values()] == [*scores.of(BASE).values()]
    differences = {(one["generator"], one["score"]): one["difference"] for one in results_in(evaluated)}
    for (generator, name), difference in differences.items():
        if generator == "zero@1":
            exactly = {"mean": 0, "low": 0, "high": 0, "pairs": 6, "improved": 0, "verdict": "none shown"}
            assert difference == exactly, name
    assert differences["on@1", "reward"]["mean"] != 0 and differences[BASE, "reward"] is None
    one, other = ((evaluated / "videos" / name).iterdir() for name in (BASE, "zero@1"))
    assert {file.name: file.read_bytes() for file in one} == {file.name: file.read_bytes() for file in other}
    noises = [*scores.of(BASE).values()]
    assert len({parts["toy_mq"] for parts in noises}) == len(noises), "each video has a noise of its own"


def test_the_numbers_are_those_of_a_training_runs_evaluation(evaluated: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """The base model's bit for bit where batches have their default size; else, and with adapters, up to rounding."""
    assert run_command(evaluate.main, [*SMALL, *THREE, "--keep-videos", "none", "--out", str(tmp_path)]) == 0
    config = load_config("toy", [*SMALL[1:], "evaluation.prompts=3", "evaluation.videos_per_prompt=2", "evaluation.sample_videos=0"])
    scores = scores_in(evaluated)
    for name, adapter, scale in ((BASE, None, 1.0), ("on@1", "on", 1.0), ("on@-0.5", "on", -0.5), ("mine@1", "semi", 1.0)):
        generator = load_generator(config)
        if adapter:
            load_adapter(generator.model, adapters[adapter], scale=scale)
        engine = build_engine(config, generator.model)
        expected = evaluate_once(config, generator, engine, load_prompts(config).evaluation, load_rewards(config), load_held_out(generator))
        for score, values in expected.scores.items():
            if score != "reward":
                found = [parts[score] for parts in scores.of(name).values()]
                np.testing.assert_allclose(found, values.numpy(), atol=1e-3 if adapter else 1e-5, err_msg=f"{name} {score}")
                if not adapter:
                    assert [parts[score] for parts in scores_in(tmp_path).values.values()] == values.tolist(), score
    assert videos_at_once(config) == 6


def test_batch_and_company_do_not_matter(evaluated: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """One adapter by itself, in batches of another size, without the base model, at another number of scales."""
    call = [
        *SMALL,
        *THREE,
        "--no-base",
        "--adapter",
        f"{adapters['on']}@1",
        "--batch",
        "5",
        "--keep-videos",
        "none",
        "--out",
        str(tmp_path),
    ]
    assert run_command(evaluate.main, call) == 0
    alone, among = scores_in(tmp_path), scores_in(evaluated)
    assert list(alone.adapters) == ["on@1"] and not (tmp_path / "videos").exists()
    for video, parts in alone.values.items():
        for name, value in parts.items():
            assert value == pytest.approx(among.values[video][name], abs=1e-3), (video, name)
    assert all(one["difference"] is None for one in results_in(tmp_path))
    # another seed has other noises
    other = tmp_path / "other"
    assert run_command(evaluate.main, [*SMALL, *THREE, "--seed", "77", "--keep-videos", "none", "--out", str(other)]) == 0
    base = among.of(BASE)
    assert all(abs(parts["toy_mq"] - base[video]["toy_mq"]) > 1e-3 for video, parts in scores_in(other).values.items())


# What failed


def test_a_score_that_is_not_finite_is_quarantined(
    tmp_path: Path, adapters: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward fails for one prompt's bright videos, so of some videos of a prompt, and not of the same ones with each adapter."""
    (tmp_path / "failing_reward.py").write_text(
        "def brightness(frames, prompts):\n"
        "    bright = frames.mean((1, 2, 3, 4)).tolist()\n"
        "    return [None if 'red' in prompt and int(1e5 * one) % 2 else one for one, prompt in zip(bright, prompts)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(CAPTIONS[:2]))
    rewards = 'rewards={"failing_reward:brightness": 1, toy_vq: 1}'
    call = [*SMALL, rewards, "--videos", "8", "--prompts", prompts, "--keep-videos", "none"]
    with pytest.warns(UserWarning, match="not finite"):
        assert command(capsys, *call, "--adapter", adapters["on"], "--out", out)[0] == 0
    scores = scores_in(out)
    name = "failing_reward:brightness"
    failed = [video for video, parts in scores.values.items() if math.isnan(parts[name])]
    assert failed and {video.prompt for video in failed} == {0} and "NaN" not in "".join(file.read_text() for file in out.glob("scores/*"))
    results = {(one["generator"], one["score"]): one for one in results_in(out)}
    for generator in (BASE, "on@1"):
        fine = [parts[name] for parts in scores.of(generator).values() if not math.isnan(parts[name])]
        one = results[generator, name]
        assert one["failed"] == results[generator, "reward"]["failed"] == 16 - len(fine) and one["mean"] == pytest.approx(np.mean(fine))
        assert results[generator, "toy_vq"]["failed"] == 0
    pairs = 16 - len({video._replace(generator=BASE) for video in failed})
    assert results["on@1", name]["difference"]["pairs"] == results["on@1", "reward"]["difference"]["pairs"] == pairs
    assert f"{name} of {failed[0].generator}: " in (out / "table.md").read_text()


# Prompts


def test_the_generator_reads_the_extended_prompt_and_all_else_the_original(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / name for name in ("plain.txt", "longer.txt", "both.jsonl")}
    files["plain.txt"].write_text("\n".join(CAPTIONS[:2]))
    files["longer.txt"].write_text("\n".join(CAPTIONS[1:]))
    files["both.jsonl"].write_text("\n".join(json.dumps({"prompt": a, "extended": b}) for a, b in zip(CAPTIONS[:2], CAPTIONS[1:])))
    calls = {
        "pairs": ["--prompts", files["plain.txt"], "--extended", files["longer.txt"]],
        "json": ["--prompts", files["both.jsonl"]],
        "longer": ["--prompts", files["longer.txt"]],
        "limited": ["--prompts", files["longer.txt"], "--limit", "1"],
    }
    for name, call in calls.items():
        assert command(capsys, *SMALL, "--videos", "1", *call, "--out", tmp_path / name)[0] == 0
    found = {name: scores_in(tmp_path / name) for name in calls}
    assert found["pairs"] == found["json"] and len(found["limited"].values) == 1
    assert [prompt.extended for prompt in found["pairs"].prompts.values()] == CAPTIONS[1:]
    for place in range(2):
        pair, longer = (found[name].values[Video(BASE, place, 0)] for name in ("pairs", "longer"))
        assert pair["toy_vq"] == longer["toy_vq"], "the same video"
        assert pair["toy_ta"] < longer["toy_ta"], "judged by another prompt"
        names = [f"videos/base/{place:04d}-{CAPTIONS[place + more].replace(' ', '-')}-0.mp4" for more in (0, 1)]
        assert (tmp_path / "pairs" / names[0]).read_bytes() == (tmp_path / "longer" / names[1]).read_bytes()


# Bad input

BAD: dict[str, tuple[list[str], str]] = {
    "no adapter": (["--adapter", "{none}"], "there is nothing at {none}"),
    "a directory without one": (["--adapter", "{empty}"], "has neither"),
    "twice": (["--adapter", "{on}", "--adapter", "{on}@1"], "two adapters have the name on@1"),
    "called base": (["--adapter", "base={on}"], "other than base"),
    "a scale that is none": (["--adapter", "{on}@1,-"], "expected a number"),
    "of another generator": (["--adapter", "{thin}"], "goes from 9 to"),
    "nothing to do": (["--no-base"], "name an adapter"),
    "limit alone": (["--limit", "3"], "goes with --prompts"),
    "extended alone": (["--extended", "{prompts}"], "goes with --prompts"),
    "extended of the toy": (["--prompts", "toy", "--extended", "{prompts}"], "toy"),
    "no prompts": (["--prompts", "{none}"], "cannot read prompts from {none}"),
    "a word that the encoder lacks": (["--prompts", "{words}"], "zebra"),
    "a shard too many": (["--shard", "2/2"], "from 0 to N - 1"),
    "no shard": (["--shard", "0"], "I/N"),
    "keep some": (["--keep-videos", "some"], "all, none, or"),
    "no videos": (["--videos", "0"], "at least 1"),
    "a negative seed": (["--seed", "-1"], "--seed"),
    "out is a file": (["--out", "{file}/x"], "not a directory"),
    "out holds something else": (["--out", "{on}"], "something else than an evaluation"),
    "unknown key": (["evalation.seed=1"], "did you mean evaluation"),
    "merge of nothing": (["merge", "--out", "{out}"], "DIR"),
    "merge without out": (["merge", "{empty}"], "--out"),
    "merge of something else": (["merge", "{on}", "--out", "{out}"], "is no evaluation"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_leaves_no_score(
    arguments: list[str], said: str, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = adapters | {name: tmp_path / name for name in ("out", "none", "empty", "file", "prompts", "words")}
    places["empty"].mkdir()
    for name, content in (("file", ""), ("prompts", "a red circle moving left"), ("words", "a red zebra")):
        places[name].write_text(content)
    before = sorted(adapters["on"].rglob("*"))
    given = [argument.format(**places) for argument in arguments]
    usual = [] if given[0] == "merge" else [*SMALL, *THREE, "--out", places["out"]]  # of an option given twice the later counts
    status, lines, printed = command(capsys, *usual, *given)
    assert status == 2 and len(lines) == 1 and not printed, (lines, printed)
    assert lines[0].startswith("error: ") and said.format(**places) in lines[0], lines[0]
    assert not places["out"].exists() and sorted(adapters["on"].rglob("*")) == before


def test_what_does_not_belong_together(
    evaluated: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [*SMALL, *THREE, "--out", evaluated]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS))
    before = {path: path.read_bytes() for path in evaluated.rglob("*") if path.is_file()}
    for change, part in (
        (["--seed", "3"], "with other settings: seed: 3 here, 1234 there; give another --out"),
        (["--videos", "3"], "videos_per_prompt: 3 here, 2 there"),
        (["rewards={toy_vq: 1}"], "rewards.toy_"),
        (["sampler.shift=2"], "sampler.shift: 2.0 here, 0.413 there"),
        (["--prompts", prompts], "scores of other prompts: number 0"),
        (["--adapter", f"on={adapters['zero']}"], "another on@1 (SHA-256"),
    ):
        status, said, printed = command(capsys, *call, *change)
        assert status == 2 and not printed and part in said[-1] and len(said) == 1, said
    other = tmp_path / "other"
    assert command(capsys, *SMALL, *THREE, "--seed", "3", "--keep-videos", "none", "--out", other)[0] == 0
    status, said, _ = command(capsys, "merge", evaluated, other, "--out", tmp_path / "merged")
    assert status == 2 and len(said) == 1 and f"seed: 3 in {other}, 1234 in {tmp_path / 'merged'}" in said[0]
    assert {path: path.read_bytes() for path in evaluated.rglob("*") if path.is_file()} == before


def test_other_weights_beside_the_generators_are_another_evaluation(
    evaluated: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when a text encoder, a decoder or a judge was updated in its place."""
    out, checkpoint = tmp_path / "out", tmp_path / "checkpoint"
    shutil.copytree(evaluated, out)
    shutil.copytree(checkpoint_path("toy"), checkpoint)
    call = [*SMALL, *THREE, f"generator.checkpoint={checkpoint}", "--adapter", adapters["on"], "--out", out]
    known = scores_in(out).values
    assert command(capsys, *call)[0] == 0 and scores_in(out).values.keys() == known.keys(), "a copy is the same"
    for part, key in {"text": "text_encoder", "vae": "vae_weights", "classifier": "code_and_weights.caption_accuracy"}.items():
        (file,) = (checkpoint / part).glob("*.safetensors")
        original, tensors = file.read_bytes(), load_file(file)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        name = random.choice([name for name in tensors if tensors[name].abs().max() > 0])
        save_file(tensors | {name: tensors[name] * 1.5}, file, metadata=metadata)
        status, said, printed = command(capsys, *call)
        assert status == 2 and not printed and len(said) == 1, said
        assert f"{out} holds scores with other settings: {key}: " in said[0]
        assert re.search(r"^[^;]* here, [^;]* there; give another --out$", said[0]), "nothing else differs"
        file.write_bytes(original)


def test_a_reward_that_was_edited_is_another_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "def brightness(frames, prompts):\n    return frames.mean((1, 2, 3, 4))\n"
    file, out = tmp_path / "edited_reward.py", tmp_path / "out"
    monkeypatch.syspath_prepend(tmp_path)
    call = [*SMALL, 'rewards={"edited_reward:brightness": 1}', *THREE, "--keep-videos", "none", "--out", out]
    for content, expected in ((source, 0), (source.replace("return", "return 2 *"), 2), (source, 0)):
        file.write_text(content)
        importlib.invalidate_caches()
        status, said, _ = command(capsys, *call)
        assert status == expected, said
        if status:
            assert f"{out} holds scores with other settings: code_and_weights.edited_reward:brightness: " in said[-1]
        monkeypatch.delitem(sys.modules, "edited_reward")  # a new process imports it again
    assert len(lines_in(out)) == 6


def test_help_and_print_config(adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    status, said, printed = command(capsys, "--help")
    assert (status, said) == (0, []) and all(word in printed for word in ("--adapter", "--extended", "--shard", "CC BY-NC", "merge DIR"))
    assert command(capsys, "merge", "--help")[0] == 0
    status, _, printed = command(capsys, *SMALL, "--videos", "3", "--seed", "9", "--print-config")
    assert status == 0 and "videos_per_prompt: 3" in printed and "seed: 9" in printed
