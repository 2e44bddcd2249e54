"""The shipped toy checkpoint: small, loads by default, and behaves as the full-size generators do."""

from __future__ import annotations

import json

import pytest
import torch

from arcopo_fast.build import (
    Generator,
    build_engine,
    checkpoint_path,
    load_generator,
    load_held_out,
    load_prompts,
    load_rewards,
)
from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.evaluation.influence import noise_influence
from arcopo_fast.evaluation.judging import evaluate
from arcopo_fast.rollout.stream import VideoShape


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("toy", ["evaluation.prompts=8", "evaluation.videos_per_prompt=1", "evaluation.sample_videos=1"])


@pytest.fixture(scope="module")
def generator(config: Config) -> Generator:
    return load_generator(config)


def test_it_is_at_most_8_megabytes() -> None:
    size = sum(file.stat().st_size for file in checkpoint_path("toy").rglob("*") if file.is_file())
    assert size <= 8_000_000, f"the toy checkpoint takes {size / 1e6:.1f} MB"


def test_the_initial_noise_decides_and_renoises_do_not(config: Config, generator: Generator) -> None:
    """At every pivot, replacing the initial noise changes the video at least 3 times as much (mean square) as replacing any re-noise.

    In latents, with one draw of a few prompts. `python -m arcopo_fast.entropy toy` has 4.7 to 18 there, and 5.4 to 19 in decoded frames,
    with two draws of 24 prompts.
    """
    shape = VideoShape.of(config.video, generator.model.config.in_channels)
    text = generator.encode_text([prompt.text for prompt in load_prompts(config).training[::9]])
    influence = noise_influence(generator.model, text, shape, config.sampler, seed=int(torch.randint(2**31, ())))
    assert min(influence["ratio"]) >= 3, {name: [f"{value:.3g}" for value in values] for name, values in influence.items()}
    assert min(influence["initial"]) > 0.01, "the pivot's noise must matter at all"


def test_it_shows_what_the_caption_says_often_enough(config: Config, generator: Generator) -> None:
    """An aligned generator has to start from one that works: the independent classifier recognises most captions."""
    engine = build_engine(config, generator.model)
    evaluation = evaluate(config, generator, engine, load_prompts(config).training[::6], load_rewards(config), load_held_out(generator))
    for name, values in evaluation.scores.items():
        assert values.isfinite().all(), name
        if name != "reward":
            assert values.min() >= 0 and values.max() <= 1, name
    assert evaluation.scores["caption_accuracy"].mean() > 0.45, "guessing gives 0.22"
    assert evaluation.frames.shape[2:] == (3, 64, 64)


def test_its_records_ship_with_it() -> None:
    directory = checkpoint_path("toy")
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["vae"]["psnr"] > 24 and min(metrics["noise_influence"]["ratio"]) >= 5
    stages = [json.loads(line)["stage"] for line in (directory / "training_log.jsonl").read_text().splitlines()]
    assert {"teacher", "distil"} <= set(stages)
