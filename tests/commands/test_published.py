"""From the published files of a generator to its videos and an adapter of one's own, through the recipes, without a network."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import av
import pytest
import torch
from huggingface_hub import constants
from support import published, umt5
from support.published import SMALL, Weights

from arcopo_fast import collect, generate, train
from arcopo_fast.build import generator_sizes, load_generator
from arcopo_fast.cli import run_command
from arcopo_fast.config.reading import load_config, recipes
from arcopo_fast.errors import UserError
from arcopo_fast.model.checkpoints import diffusers_name
from arcopo_fast.model.text import CachedTextEncoder
from arcopo_fast.storage import hub

GENERATORS = ["self_forcing", "causal_forcing", "causal_forcing_framewise", "causal_forcing_2step", "causal_forcing_1step", "longlive"]
PROMPTS = ["ba ce di", "fo gu", "he bake", "celi dimo fonu", "gupa", "here bato"]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$ARCOPO_MODELS with a base in it; no network, and a cache of embeddings of its own."""
    root = tmp_path / "models"
    monkeypatch.setenv(hub.VARIABLE, str(root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hugging-face"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "FILES", {name: known._replace(sha256="") for name, known in hub.FILES.items()})  # ours are small
    published.write_base(root)
    return root


def put(models: Path, recipe: str) -> tuple[Weights, Weights]:
    """The recipe's generator under its published name; the weights that the recipe means, and those that it does not."""
    settings = load_config(recipe).generator
    wanted, other = published.generator_weights(), published.generator_weights()
    pair = (wanted, other) if settings.weights == "generator" else (other, wanted)
    published.write_generator(published.place(models, settings.checkpoint), *pair)
    return wanted, other


@pytest.mark.parametrize("recipe", GENERATORS)
def test_every_recipe_finds_its_files_and_makes_a_video(recipe: str, models: Path, tmp_path: Path) -> None:
    wanted, _ = put(models, recipe)
    expected = dict(wanted)
    settings = load_config(recipe).generator
    if settings.lora:
        for name, (down, up) in published.write_lora(published.place(models, settings.lora)).items():
            expected[f"{diffusers_name(name)}.weight"] = wanted[f"{diffusers_name(name)}.weight"] + up @ down
    generator = load_generator(load_config(recipe, SMALL))
    found = generator.model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    out = tmp_path / "video.mp4"
    generate.main([recipe, *SMALL, "video.chunks=2", "--prompt", PROMPTS[0], "--out", str(out)])
    frames = 1 + 4 * (2 * load_config(recipe).video.chunk_frames - 1)
    with av.open(str(out)) as video:
        assert [frame.width / frame.height for frame in video.decode(video=0)] == [48 / 32] * frames  # shown larger, being so small


def test_every_recipe_of_a_published_generator_is_tested_here() -> None:
    published_ones = [name for name in recipes() if hub.is_published(load_config(name).generator.checkpoint)]
    others = {name for name in published_ones if name.endswith("_astrolabe")}  # their generators are those of other recipes
    assert set(published_ones) - others - {"krea_realtime_14b"} == set(GENERATORS)


RUN = [
    *SMALL,
    "video.chunks=2",
    "rewards={sharpness: 1.0, steadiness: 0.5}",
    "rollout.group_size=3",
    "rollout.branches_per_wave=3",
    "objective.anchors_per_update=2",
    "lora.rank=2",
    "lora.alpha=2",
    "evaluation.prompts=1",
    "evaluation.videos_per_prompt=1",
    "evaluation.sample_videos=1",
    "train.iterations=2",
    "run.tensorboard=false",
]


@pytest.mark.parametrize("recipe", ["self_forcing", "longlive"])
def test_an_aligned_generator(recipe: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(models, recipe)
    if recipe == "longlive":
        published.write_lora(published.place(models, "hf://Efficient-Large-Model/LongLive-1.3B/models/lora.pt"))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = [recipe, *RUN, f"prompts={tmp_path / 'prompts.txt'}", "extended_prompts=null", f"run.directory={tmp_path / 'runs'}"]
    loads: list[int] = []
    encode = CachedTextEncoder._encode

    def counted(self: CachedTextEncoder, prompts: list[str]) -> object:
        loads.extend([len(prompts)] * bool(prompts))
        return encode(self, prompts)

    monkeypatch.setattr(CachedTextEncoder, "_encode", counted)
    train.main(settings)
    assert len(loads) == 1 and 2 <= loads[0] <= 3  # once, the prompt for evaluation and those of two iterations
    run = tmp_path / "runs" / recipe
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["update1/ratio_max"] for record in records] == [0, 0]  # |ratio - 1| before the first update of an iteration
    adapter, videos = ["--lora", str(run)], []
    for number, options in enumerate(([], [*adapter, "--lora-scale", "0"], [*adapter, "--lora-scale", "300"])):  # two updates are little
        out = tmp_path / f"{number}.mp4"
        generate.main([recipe, *RUN, "--prompt", PROMPTS[1], *options, "--out", str(out)])
        videos.append(out.read_bytes())
    assert videos[0] == videos[1] != videos[2]
    collect.main([*settings, "--buffer", str(tmp_path / "buffer"), "--groups", "2"])
    train.main([*settings, "name=semi", "--mode", "semi_on_policy", "--buffer", str(tmp_path / "buffer")])
    first = json.loads((tmp_path / "runs" / "semi" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["update1/ratio_max"] == 0


def test_extended_prompts_are_generated_from_and_the_others_judged(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rollouts, evaluations and a buffer: the generator sees the embedding of the extended form, a reward the prompt."""
    put(models, "self_forcing")
    (tmp_path / "heard.py").write_text(
        "prompts = []\ndef reward(frames, said):\n    prompts.extend(said)\n    return frames.mean((1, 2, 3, 4))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    extended = [f"{prompt} gunu heke" for prompt in PROMPTS]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "longer.txt").write_text("\n".join(extended))
    sources = [f"prompts={tmp_path / 'prompts.txt'}", f"extended_prompts={tmp_path / 'longer.txt'}"]
    settings = ["self_forcing", *RUN, 'rewards={"heard:reward": 1.0}', *sources, f"run.directory={tmp_path / 'runs'}"]
    encoded: set[str] = set()
    encode = CachedTextEncoder.__call__

    def noted(self: CachedTextEncoder, prompts: list[str]) -> object:
        encoded.update(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(CachedTextEncoder, "__call__", noted)
    train.main(settings)
    heard = importlib.import_module("heard")
    assert set(heard.prompts) <= set(PROMPTS) and encoded <= set(extended) and len(heard.prompts) > 4
    pairs = dict(zip(extended, PROMPTS))
    assert {pairs[text] for text in encoded} == set(heard.prompts)
    collect.main([*settings, "--buffer", str(tmp_path / "buffer"), "--groups", "2"])
    encoded.clear()
    train.main([*settings, "name=semi", "--mode", "semi_on_policy", "--buffer", str(tmp_path / "buffer")])
    assert encoded and encoded <= set(extended)
    (tmp_path / "longer.txt").write_text("\n".join(extended[1:]))
    with pytest.raises(UserError, match="5 lines|line by line|lines"):
        train.main(settings)


def test_what_is_missing_is_named_with_its_size(models: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoints/self_forcing_dmd.pt \(5.7 GB\).*hf download gdhe17/Self-Forcing"):
        load_generator(load_config("self_forcing", SMALL))
    put(models, "self_forcing")
    (models / "Wan-AI/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth").unlink()
    with pytest.raises(UserError, match=r"Wan2.1_VAE.pth \(508 MB\)"):
        load_generator(load_config("self_forcing", SMALL))


def test_a_generator_alone_is_told_what_it_lacks(models: Path) -> None:
    put(models, "self_forcing")
    with pytest.raises(UserError, match=r"is the transformer alone; set generator.base"):
        load_generator(load_config("self_forcing", [*SMALL, "generator.base=null"]))
    with pytest.raises(UserError, match=r"has no VAE"):
        load_generator(load_config("self_forcing", [*SMALL, f"generator.base={models}"]))


def test_a_base_in_the_form_of_diffusers(models: Path, tmp_path: Path) -> None:
    """The VAE that save_pretrained writes, beside the same text encoder, decodes to the same pixels."""
    put(models, "self_forcing")
    official = load_generator(load_config("self_forcing", SMALL))
    base = tmp_path / "base"
    umt5.write_official(base, umt5.official_state(torch.bfloat16))
    official.decoder.vae.save_pretrained(base / "vae")
    ours = load_generator(load_config("self_forcing", [*SMALL, f"generator.base={base}"]))
    latents = torch.randn(1, 3, 16, 4, 6)
    frames = [made.decoder.decode(latents, made.decoder.start())[0] for made in (official, ours)]
    assert torch.equal(*frames)


def test_an_adapter_of_another_generator_is_refused(models: Path) -> None:
    put(models, "longlive")
    path = published.place(models, "hf://Efficient-Large-Model/LongLive-1.3B/models/lora.pt")
    pairs = published.write_lora(path)
    elsewhere = {name.replace("blocks.0", "blocks.7"): pair for name, pair in pairs.items()}
    torch.save({f"{name}.lora_{kind}.weight": pair[at] for name, pair in elsewhere.items() for at, kind in enumerate("AB")}, path)
    with pytest.raises(UserError, match=r"adapts 10 layers that the model lacks .*blocks.7.*use its own base model"):
        load_generator(load_config("longlive", SMALL))


def test_a_plan_needs_no_files(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generator_sizes("hf://some/thing.pt", "hf://Wan-AI/Wan2.1-T2V-14B").transformer.num_layers == 40
    with pytest.raises(UserError, match="its name does not say its size"):
        generator_sizes("hf://some/thing.pt")
    train.main(["self_forcing", "rewards={sharpness: 1.0}", "--dry-run", "--device-memory", "80"])
    assert "1.42 billion parameters in bfloat16; 81 frames of 480x832" in capsys.readouterr().out


def test_a_published_adapter(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line, by name; and what is said of one that is not to be had."""
    put(models, "self_forcing")
    source = "hf://some-one/adapter/lora.pt"
    command = ["self_forcing", *SMALL, "video.chunks=2", "--prompt", PROMPTS[0], "--lora", source]
    assert run_command(generate.main, [*command, "--out", str(tmp_path / "none.mp4")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "hf download some-one/adapter lora.pt" in said[0]
    published.write_lora(published.place(models, source))
    assert run_command(generate.main, [*command, "--out", str(tmp_path / "with.mp4")]) == 0
    assert run_command(generate.main, [*command[:-2], "--out", str(tmp_path / "without.mp4")]) == 0
    assert (tmp_path / "with.mp4").read_bytes() != (tmp_path / "without.mp4").read_bytes()


def test_a_missing_file_is_one_line_of_the_command(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = run_command(generate.main, ["causal_forcing", "--prompt", "x", "--out", str(tmp_path / "video.mp4")])
    said = capsys.readouterr().err.splitlines()
    assert status == 2 and len(said) == 1 and "causal_forcing.pt (5.7 GB)" in said[0] and not (tmp_path / "video.mp4").exists()
