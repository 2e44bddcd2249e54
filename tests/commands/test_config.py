"""The configuration: what a recipe and overrides give, and the one line that everything unusable gets."""

from __future__ import annotations

import argparse
import importlib
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import arcopo_fast
from arcopo_fast import train
from arcopo_fast.config.explain import every_field
from arcopo_fast.config.reading import keys_help, load_config, recipes, resolved_yaml, setting
from arcopo_fast.config.schema import Config, objectives
from arcopo_fast.errors import UserError

# The numbers that the expected messages name; the shipped recipes may change.
BASE = """
name: base
video: {chunks: 4, chunk_frames: 2, latent_height: 8, latent_width: 8, fps: 8}
sampler: {steps: [1000, 350], warp: false, shift: 1.0}
optimizer:
  lr: 0.001
lora:
  rank: 16
rewards: {toy_vq: 1, toy_mq: 1}
evaluation: {prompts: 8, videos_per_prompt: 4}
"""


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)


def load(*overrides: str) -> Config:
    return load_config("base.yaml", overrides)


def message(*overrides: str, recipe: str = "base.yaml") -> str:
    with pytest.raises(UserError) as error:
        load_config(recipe, overrides)
    text = str(error.value)
    assert "\n" not in text
    return text


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


# What is read ----------------------------------------------------------------------------------------------------------------------


def test_the_default_is_the_toy_recipe(tmp_path: Path) -> None:
    assert load_config() == load_config("toy") == load_config("toy.yaml")
    assert load_config().name == "toy"
    assert "toy" in recipes()


def test_reading_recipes_imports_neither_the_engine_nor_a_kernel() -> None:
    script = """
import sys
from arcopo_fast.config.reading import keys_help, load_config, recipes
for recipe in recipes():
    load_config(recipe)
keys_help()  # of every objective
print(*sys.modules)
"""
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=True
    )
    modules = done.stdout.split()
    assert {f"arcopo_fast.objectives.{kind}" for kind in objectives()} <= set(modules)
    heavy = ("arcopo_kernels", "arcopo_fast.rollout.engine", "arcopo_fast.rollout.cache", "arcopo_fast.model.causal_wan")
    assert not [module for module in modules if module.startswith((*heavy, "triton", "diffusers", "transformers", "peft"))]


@pytest.mark.parametrize("recipe", recipes())
def test_every_shipped_recipe_is_read_and_survives_a_round_trip(recipe: str, tmp_path: Path) -> None:
    config = load_config(recipe)
    assert load_config(write(tmp_path / "config.yaml", resolved_yaml(config))) == config


PUBLISHED = [name for name in recipes() if not name.startswith(("toy", "bench"))]


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipes_of_published_generators_agree_where_the_paper_speaks_of_all(recipe: str) -> None:
    """Recipes are self-contained, so nothing but this keeps their common part in common."""
    one, other = load_config("self_forcing").model_dump(), load_config(recipe).model_dump()
    for section in ("objective", "optimizer", "lora", "rewards"):
        own = {"checkpoint": None, "skip_last_step": None}  # memory; Krea has its reason beside it
        assert {**other[section], **own} == {**one[section], **own}, section
    assert other["rollout"]["group_size"] == 12 and other["train"]["iterations"] == 100
    assert other["optimizer"]["relative_clip"] is not None, "an absolute limit of 1 never acts at this size"
    assert set(other["rewards"]) == {"videoalign_vq_raw", "videoalign_mq_raw", "videoalign_ta_raw"}, "the paper's scores are raw"


@pytest.mark.parametrize(
    "problem", [("objective.anchors=split", "objective.anchors_per_update=2", "objective.updates=3"), ("objective.anchors=all",)]
)
def test_anchors_that_cannot_be_dealt_are_refused(problem: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="at least one for each update|fresh, same or split"):
        load_config("toy", problem)


def test_a_random_configuration_survives_a_round_trip(tmp_path: Path) -> None:
    steps = sorted({round(random.uniform(1, 999), 4) for _ in range(4)}, reverse=True)
    text = random.choice(['"1e-5"', '"null"', '"true"', '"12"', '"1:30"', '"# x"', '"a: b"', "Ä/ß", '"2026-11-21"', "yes", '" x "'])
    overrides = [
        f"seed={random.randrange(2**32)}",
        f"optimizer.lr={10 ** random.uniform(-7, -1)!r}",
        f"optimizer.betas=[{random.random()}, {random.random()}]",
        f"sampler.steps={steps}",
        "sampler.first_chunk_steps=[3e2]",
        "objective.clip=null",
        random.choice(["objective.tau=auto", "objective.tau=0.25"]),
        f"rollout.pivot={random.choice(['per_group', '1', '4'])}",
        # texts that a YAML reader, of either version, might take for something else
        f"name={random.choice(['_1', '1e-5_', 'no', 'on.'])}",
        f"generator.checkpoint={text}",
    ]
    config = load(*overrides)
    printed = resolved_yaml(config)
    assert load_config(write(tmp_path / "config.yaml", printed)) == config
    assert yaml.safe_load(printed) == config.model_dump() | {"optimizer": listed(config)}  # also for a reader of the 1.1 rules


def listed(config: Config) -> dict[str, Any]:
    return config.optimizer.model_dump() | {"betas": list(config.optimizer.betas)}


def test_overrides_apply_in_order_and_only_where_they_say() -> None:
    before = leaves(load().model_dump())
    after = leaves(load("optimizer.lr=1", "rewards={toy_vq: 2}", "optimizer.lr=3e-4", "rewards.toy_ta=0.5").model_dump())
    assert after["optimizer.lr"] == 3e-4
    assert {name: value for name, value in after.items() if name.startswith("rewards.")} == {"rewards.toy_vq": 2.0, "rewards.toy_ta": 0.5}
    untouched = {name for name in before if not name.startswith("rewards.")} - {"optimizer.lr"}
    assert {name: before[name] for name in untouched} == {name: after[name] for name in untouched}


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "1E-5", ".00001", "+1e-05"])
def test_numbers_are_read_as_people_write_them(text: str) -> None:
    assert load(f"optimizer.lr={text}").optimizer.lr == 1e-5


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().optimizer.lr = 1.0  # type: ignore[misc]


def test_pivots_may_lie_in_every_chunk_and_an_independent_first_frame_is_one() -> None:
    assert load("rollout.pivot=4").rollout.pivot == 4
    config = load("rollout.pivot=5", "video.independent_first_frame=true")
    assert config.video.count == 5


# What is not ----------------------------------------------------------------------------------------------------------------------


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
        ("sampler.steps=[1001, 5]", ["sampler.steps: timesteps lie in (0, 1000]"]),
        ("sampler.first_chunk_steps=[0]", ["sampler.first_chunk_steps: timesteps lie in (0, 1000]"]),
        ("sampler.steps=[1000, 0.5, -1]", ["sampler.steps: timesteps lie in (0, 1000], but for a last one of 0"]),
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


def test_help_names_every_key_with_default_and_meaning() -> None:
    text = keys_help()
    lines = [line.strip() for line in text.splitlines()]
    for name in leaves(load().model_dump() | {"rewards": 0}):
        index = next(index for index, line in enumerate(lines) if line.startswith((f"{name} = ", f"{name} (required)")))
        assert len(lines[index + 1]) > 10
    assert "optimizer.lr = 1.0e-05" in lines
    assert "rollout.group_size = 12" in lines


# Texts and paths in overrides ------------------------------------------------------------------------------------------------------

DROPPED = [
    "my file #1.txt",
    "a # b",
    "#1",
    "&x.txt",
    "&a b",
    "*x",
    "!x",
    "!!str x",
    "%x",
    "--- a",
    "... a",
    "| a",
    "> a",
    "a\nb",
    "[a] # b",
]
OTHERWISE = [
    "a: b",
    "x:",
    "@x",
    "`x",
    "- a",
    "? a",
    "[a",
    "{a}",
    "[a]",
    "1e5",
    "12",
    "null",
    "~",
    "true",
    "",
    "'a' b",
    '"a',
    "'",
    "{",
    "}",
    ",",
]


@pytest.mark.parametrize("text", DROPPED + OTHERWISE)
@pytest.mark.parametrize("key", ["prompts", "generator.checkpoint"])
def test_a_text_is_taken_whole_or_refused(key: str, text: str) -> None:
    """What is said then is how to quote it, which gives the text itself."""
    said = message(f"{key}={text}")
    assert said.startswith("override ") and len(said) < 400
    if text in DROPPED:
        assert f"'{key}=" in said and "taken whole in quotes" in said
    else:
        assert "quotes" in said
    if text not in ("", "~"):  # what no file is named, and a home directory
        config = load(setting(key, text))
        assert (config.prompts if key == "prompts" else config.generator.checkpoint) == text


@pytest.mark.parametrize(
    "text", ["a#b", "it's", "a:b", "a, b", "süß 😀", "a - b", "a & b * c!", "100%", "a | b", "x=y", "'a #1'", '"a: b"']
)
def test_texts_that_need_no_quotes(text: str) -> None:
    assert load(f"prompts={text}").prompts == text.strip("'\"")


def test_what_is_dropped_from_a_section_is_refused_too() -> None:
    for override in (
        "rewards={toy_vq: 1} # b",
        "lora=rank: 8 # b",
        "lora.targets=[&a to_q]",
        "lora.targets=[!x to_q]",
        "rewards={\n# b\ntoy_vq: 1}",
    ):
        assert "in YAML" in message(override)


@pytest.mark.parametrize("text", ["a\x00b", "\x1b[1m", "\ud800", '"\\ud800"', '"\\0"', '"\\x1b[1m"', '"\\x7f"'])
def test_what_is_no_text(text: str, tmp_path: Path) -> None:
    assert "not valid YAML" in message(f"prompts={text}")
    assert "not valid YAML" in message(f"rewards={{{text}: 1}}")
    if text != "\ud800":
        path = write(tmp_path / "odd.yaml", BASE + f"prompts: {text}\n")
        assert message(recipe=path).startswith(path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("utf-16", "UTF-16 text"),
        ("utf-32", "UTF-32 text"),
        ("utf-16-be", "not UTF-8 text"),
        ("latin-1", ":11: not UTF-8 text (the byte 0xfc)"),
    ],
)
def test_recipes_in_other_encodings(content: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_bytes((BASE + "# süß\n").encode(content))
    assert part in message(recipe=str(tmp_path / "other.yaml"))
    (tmp_path / "marked.yaml").write_bytes((BASE + "# süß\n").encode("utf-8-sig"))
    assert load_config(str(tmp_path / "marked.yaml")) == load()


@pytest.mark.parametrize("text", ["a" * 256, "a/" * 3000, "ü" * 128])
def test_paths_that_no_file_system_takes(text: str) -> None:
    for key in ("prompts", "generator.checkpoint", "run.directory"):
        assert "no path that a file system takes" in message(f"{key}={text}")
    assert "at most 200" in message(f"name={'a' * 201}")
    assert "255 bytes" in message(recipe="a" * 5000)


PLACES = ["prompts", "extended_prompts", "generator.checkpoint", "generator.base", "generator.lora", "run.directory", "train.buffer"]


def test_every_key_that_is_a_path_is_of_the_type_that_expands_it() -> None:
    """By the words of its meaning, so that a new one cannot be forgotten; a run's name and the path of the replay are none."""
    meanings = {name: info.description or "" for name, info in every_field(Config)}
    found = {name for name, text in meanings.items() if re.search(r"\b(file|directory|path|hf)\b", text)}
    assert found - {"name", "objective.old_prediction"} == set(PLACES)


@pytest.mark.parametrize("key", PLACES)
def test_a_home_directory(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    more = ["train.mode=semi_on_policy"] if key == "train.buffer" else []
    assert leaves(load(f"{key}=~/a b/c", *more).model_dump())[key] == str(tmp_path / "a b" / "c")
    assert leaves(load(f"{key}=./~/c", *more).model_dump())[key] == "./~/c"
    assert "no home directory '~nobody-of-that-name'" in message(f"{key}=~nobody-of-that-name/c", *more)
    assert load_config("~/base.yaml") == load()


def command_lines() -> dict[str, Any]:
    """Of every command, by the function that makes it."""
    found: dict[str, Any] = {}
    for path in sorted(Path(arcopo_fast.__file__).parent.rglob("*.py")):
        name = ".".join(("arcopo_fast", *path.relative_to(Path(arcopo_fast.__file__).parent).with_suffix("").parts))
        if "command_line() -> " in path.read_text(encoding="utf-8"):
            module = importlib.import_module(name)
            makers = [maker for maker in vars(module) if maker.endswith("command_line")]
            found |= {f"{name}.{maker}": getattr(module, maker)() for maker in makers}
    return found


def test_every_option_that_is_a_path_expands_a_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = command_lines()
    assert len(lines) >= 12
    seen = set()
    for name, parser in lines.items():
        for action in parser._actions:
            metavar = str(action.metavar)
            if not re.search(r"DIR|FILE|PATH|RUN|RESULTS", metavar) and action.type is not Path:
                continue
            value = parser._get_value(action, "~/a.html")
            assert str(getattr(value, "path", value)) == str(tmp_path / "a.html"), f"{name}: {action.option_strings or action.dest}"
            with pytest.raises(argparse.ArgumentTypeError, match="no home directory"):
                action.type("~nobody-of-that-name/x")
            seen.add((action.option_strings or [action.dest])[0])
    assert {"--out", "--buffer", "--adapter", "--lora", "--prompts", "--extended", "--resume", "--semi", "--on", "--info", "runs"} <= seen
    option = lines["arcopo_fast.evaluate.command_line"]._option_string_actions["--adapter"]
    assert option.type("mine=~/runs/on@0.5").path == str(tmp_path / "runs" / "on")


def test_the_buffer_of_an_option_is_a_text(tmp_path: Path) -> None:
    parsed = train.command_line().read(["--buffer", "my # 1: {x}", "--mode", "semi_on_policy"])
    assert load(*train.settings_of(parsed)).train.buffer == "my # 1: {x}"
