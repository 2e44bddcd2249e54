"""The entry of each published generator says what its recipe says, and what is known of its files is looked up."""

from __future__ import annotations

import pytest

from arcopo_fast.build import generator_sizes
from arcopo_fast.config.reading import load_config, recipes
from arcopo_fast.errors import UserError
from arcopo_fast.model.families import FAMILIES, OFFICIAL, SIZES, WAN_1_3B, Family, base_files
from arcopo_fast.storage import hub

RECIPES = {load_config(name).generator.checkpoint: name for name in recipes()}


def test_every_recipe_of_a_published_generator_has_an_entry() -> None:
    assert {checkpoint for checkpoint in RECIPES if hub.is_published(checkpoint)} == {family.checkpoint for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_recipe_agrees_with_the_entry(family: Family) -> None:
    config = load_config(RECIPES[family.checkpoint])
    generator = config.generator
    assert (generator.weights, config.cache.variant) == (family.weights, family.cache)
    assert generator.base == f"hf://{family.base.repository}" and base_files(generator.base) == family.base.layout.files
    named = [generator.checkpoint, *([generator.lora] if generator.lora else [])]
    assert named == [f"hf://{family.repository}/{path}" for path in family.files]
    assert all(hub.FILES[f"{family.repository}/{path}"] == known for path, known in family.files.items())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_familys_size_is_known_before_it_is_here(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "local", lambda *_: None)
    assert generator_sizes(family.checkpoint) == SIZES[family.size]
    with pytest.raises(UserError, match="its name does not say its size"):
        generator_sizes("hf://someone/generator.pt")
    assert generator_sizes("hf://someone/generator.pt", "hf://someone/else-14B") == SIZES["14b"]


def test_what_a_base_is_asked_for() -> None:
    assert base_files("hf://Wan-AI/Wan2.1-T2V-1.3B") == [OFFICIAL.text, OFFICIAL.tokenizer, OFFICIAL.vae]
    assert set(WAN_1_3B.files) == set(OFFICIAL.files)
    assert base_files("hf://Wan-AI/Wan2.1-T2V-1.3B-Diffusers@main") == ["text_encoder/*", "tokenizer/tokenizer.json", "vae/*"]
    assert base_files("/data/Wan2.1-T2V-1.3B") == []
