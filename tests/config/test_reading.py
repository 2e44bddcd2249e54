"""What a recipe and overrides give."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.recipes import leaves, load, write

from arcopo_fast.config.reading import keys_help, load_config, recipes, resolved_yaml
from arcopo_fast.config.schema import Config, objectives
from arcopo_fast.errors import UserError


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


PUBLISHED = [name for name in recipes() if not name.startswith(("toy", "bench")) and not name.endswith("_astrolabe")]
ASTROLABE = {"self_forcing": "self_forcing", "causal_forcing": "causal_forcing", "longlive": "longlive", "krea": "krea_realtime_14b"}
"""The recipe of AR-CoPO for the generator of each of Astrolabe's."""


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


@pytest.mark.parametrize("name", ASTROLABE)
def test_recipes_of_astrolabe_have_the_generators_of_arcopos_and_the_papers_values(name: str) -> None:
    ours, other = load_config(f"{name}_astrolabe"), load_config(ASTROLABE[name])
    assert (ours.generator, ours.video, ours.cache) == (other.generator, other.video, other.cache)
    assert ours.sampler == other.sampler.model_copy(update={"steps": [1000, 750, 500, 250]})
    common = load_config("self_forcing_astrolabe").model_dump()
    for section in ("objective", "optimizer", "lora", "rewards", "train"):
        assert {**ours.model_dump()[section], "checkpoint": None} == {**common[section], "checkpoint": None}, section
    objective = common["objective"]
    assert (objective["kind"], objective["beta"], objective["advantage_max"], objective["old_decay"]) == ("nft", 1.0, 5.0, 0.9)
    assert (ours.rollout.group_size, ours.lora.rank, ours.lora.alpha, ours.optimizer.lr) == (24, 256, 256, 1e-5)
    assert ours.evaluation.few_steps and not ours.objective.risks(ours.rollout.group_size, ours.video.chunk_frames)


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


def test_help_names_every_key_with_default_and_meaning() -> None:
    text = keys_help()
    lines = [line.strip() for line in text.splitlines()]
    for name in leaves(load().model_dump() | {"rewards": 0}):
        index = next(index for index, line in enumerate(lines) if line.startswith((f"{name} = ", f"{name} (required)")))
        assert len(lines[index + 1]) > 10
    assert "optimizer.lr = 1.0e-05" in lines
    assert "rollout.group_size = 12" in lines
