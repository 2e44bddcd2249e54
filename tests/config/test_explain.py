"""The one line that everything unusable gets: what is wrong, where, and what was probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.recipes import load, message, write

from arcopo_fast.config.reading import load_config, recipes, resolved_yaml


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        # unknown keys, with what was probably meant
        ("optimzer.lr=1", ["override 'optimzer.lr=1'", "unknown key optimzer", "did you mean optimizer?"]),
        ("optimizer.lrr=1", ["unknown key optimizer.lrr", "did you mean optimizer.lr?"]),
        ("lr=1", ["unknown key lr", "did you mean optimizer.lr?"]),
        ("sampler.group_size=4", ["unknown key sampler.group_size", "did you mean rollout.group_size?"]),
        ("zzzz=1", ["unknown key zzzz", "the keys here are name, seed"]),
        # types are not converted
        ("seed=1.5", ["seed: expected a whole number >= 0", "given 1.5"]),
        ("seed=true", ["seed: expected a whole number", "given true"]),
        ("seed='1'", ["seed: expected a whole number", "given the text '1'"]),
        ("seed=-1", ["seed: expected a whole number >= 0", "given -1"]),
        ("optimizer.lr=fast", ["optimizer.lr: expected a number > 0", "given the text 'fast'"]),
        ("optimizer.lr=.nan", ["optimizer.lr: expected a number", "nan"]),
        ("run.overwrite=yes", ["run.overwrite: expected true or false", "given the text 'yes'"]),
        ("run.overwrite=1", ["run.overwrite: expected true or false", "given 1"]),
        ("generator.dtype=fp32", ["generator.dtype: expected float32, bfloat16 or float16", "'fp32'"]),
        ("generator.checkpoint=", ["generator.checkpoint: expected a text", "given null"]),
        ("objective.tau=0", ["objective.tau: expected a number > 0 or auto", "given 0"]),
        ("objective.steps=some", ["objective.steps: expected a number > 0 and <= 1 or all", "'some'"]),
        ("rollout.pivot=middle", ["rollout.pivot: expected a whole number or shared or per_group", "'middle'"]),
        ("rollout.noise_strength=1.5", ["rollout.noise_strength: expected a number > 0 and <= 1", "given 1.5"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas"]),
        ("optimizer.betas=[0.9, 1]", ["optimizer.betas[1]: expected a number >= 0 and < 1", "given 1"]),
        ("lora.targets=to_q", ["lora.targets: expected a list of texts", "'to_q'"]),
        ("sampler.steps=[1000, x]", ["sampler.steps[1]: expected a number", "'x'"]),
        ("rewards.toy_vq=high", ["rewards.toy_vq: expected a number", "'high'"]),
        ("rewards=toy_vq", ["rewards: expected names with a number each"]),
        ("video=3", ["video: expected a section", "given 3"]),
        # values that make no sense
        ("rollout.group_size=1", ["rollout.group_size: a group of 1 has no advantage", "at least 2"]),
        ("rollout.pivot=5", ["rollout.pivot 5 is beyond the video of L = 4 chunks", "1 to 4"]),
        ("rollout.pivot=0", ["rollout.pivot 0 is beyond the video"]),
        ("sampler.steps=[]", ["sampler.steps: needs at least one timestep"]),
        ("sampler.steps=[500, 500]", ["sampler.steps: timesteps must decrease", "[500.0, 500.0]"]),
        ("sampler.steps=[1001, 5]", ["sampler.steps: timesteps must lie in (0, 1000]"]),
        ("sampler.first_chunk_steps=[0]", ["sampler.first_chunk_steps: timesteps must lie in (0, 1000]"]),
        ("sampler.steps=[1000, 0.5, -1]", ["sampler.steps: timesteps must lie in (0, 1000], and only the last may be 0"]),
        ("cache.window=1", ["cache.window 1 is too small", "a chunk of 2 latent frames"]),
        ("objective.anchors_per_update=13", ["objective.anchors_per_update 13 is more than rollout.group_size 12"]),
        ("rewards={}", ["rewards: needs at least one reward"]),
        ("rewards={toy_vq: 0}", ["rewards: needs at least one reward with a weight other than 0"]),
        ("name=a/b", ["name:", "given 'a/b'"]),
        ("name=..", ["name:", "given '..'"]),
        ("generator.device=tpu", ["generator.device", "'tpu'"]),
        ("evaluation.sample_videos=33", ["evaluation.sample_videos 33 is more than the 32 videos"]),
        # overrides that are none
        ("seed", ["override 'seed'", "key.sub=value"]),
        ("=1", ["key.sub=value"]),
        ("a..b=1", ["key.sub=value"]),
        ("name.x=1", ["name is a value, not a section"]),
        ("seed=[1", ["override 'seed=[1'", "not valid YAML"]),
        ("lora={rank: 1, rank: 2}", ["the key rank stands twice"]),
        ("seed=&a [*a]", ["seed"]),
    ],
)
def test_bad_overrides(override: str, parts: list[str]) -> None:
    text = message(override)
    assert text.startswith("override ")
    for part in parts:
        assert part in text


def test_settings_that_contradict_each_other_name_both() -> None:
    assert "cache.sink" in message("cache.variant=infinity_rope", "cache.window=4")
    assert "cache.sink 3" in message("cache.variant=longlive", "cache.window=6", "cache.sink=3")
    assert "the sink of 3" in message("cache.sink=3", "cache.window=4")
    assert "whole" in message("sampler.warp=true", "sampler.steps=[750.5]")
    assert load("cache.sink=2", "cache.window=4").cache.window == 4
    krea = "cache.variant=krea"
    assert "cache.window 2 must be more than the chunk's 2 latent frames" in message(krea, "cache.window=2")
    for sink, window in ((0, "null"), (2, 6)):
        expected = f"needs a cache.window, and a cache.sink of 0 or 1; given cache.window {window} and cache.sink {sink}"
        assert expected in message(krea, f"cache.window={window}", f"cache.sink={sink}")
    assert load("cache.variant=krea", "cache.window=3", "sampler.steps=[1000, 0]").sampler.steps == [1000, 0]


def test_several_problems_are_counted_and_the_unknown_key_is_named() -> None:
    text = message("seed=x", "optimizer.rl=1", "train.iterations=0")
    assert "unknown key optimizer.rl" in text
    assert text.endswith("(and 2 more problems)")


def test_a_problem_in_a_recipe_names_its_line(tmp_path: Path) -> None:
    good = resolved_yaml(load())
    line = good.splitlines().index("  lr: 0.001") + 1
    path = write(tmp_path / "mine.yaml", good.replace("  lr: 0.001", "  lr: slow"))
    assert message(recipe=path) == f"{path}:{line}: optimizer.lr: expected a number > 0; given the text 'slow'"
    assert load_config(path, ["optimizer.lr=1e-3"]) == load()  # an override may mend it
    path = write(tmp_path / "mine.yaml", good.replace("  lr: 0.001", "  rl: 0.001"))
    assert message(recipe=path) == f"{path}:{line}: unknown key optimizer.rl; did you mean optimizer.lr?"


def test_broken_recipes(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    good = resolved_yaml(load())
    count = len(good.splitlines())
    cases = {
        good + "seed: 3\n": [f"{path}:{count + 1}", "the key seed stands twice"],
        good.replace("  rank: 16\n", "  rank: 16\n  rank: 8\n"): ["the key lora.rank stands twice"],
        good + "seed: [1\n": [f"{path}:", "not valid YAML"],
        good + "\tx: 1\n": [f"{path}:{count + 1}", "not valid YAML"],
        good + "3: x\n": [f"{path}:{count + 1}", "a key must be a name", "3"],
        good.replace("  chunks: 4\n", ""): ["the key video.chunks is missing", "L, the chunks of a video"],
        "": ["is empty"],
        "- 1\n- 2\n": ["maps keys to values"],
        "just a text": ["maps keys to values"],
        "a: !!python/object/apply:os.getcwd []\n": ["not valid YAML"],
        "a: 1\n--- \nb: 2\n": ["not valid YAML"],
    }
    for text, parts in cases.items():
        found = message(recipe=write(path, text))
        assert str(path) in found
        for part in parts:
            assert part in found, found
    path.write_bytes(b"name: \xff\xfe\n")
    assert "not UTF-8" in message(recipe=str(path))


def test_unknown_recipes(tmp_path: Path) -> None:
    text = message(recipe="tooy")
    assert "unknown recipe 'tooy'" in text and "did you mean toy?" in text and f"one of: {', '.join(recipes())}" in text
    for recipe in (str(tmp_path / "absent.yaml"), str(tmp_path), "../toy"):
        assert f"unknown recipe {recipe!r}" in message(recipe=recipe)
