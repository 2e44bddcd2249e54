"""`python -m arcopo_fast.generate`: frames come while the video is made, the same seed gives the same video, and memory does not grow."""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from numpy.typing import NDArray
from support.commands import outcome
from torch import Tensor, nn

from arcopo_fast import generate
from arcopo_fast.build import Generator, build_engine, checkpoint_path, load_generator, load_model, load_rewards, sized_engine
from arcopo_fast.config.reading import load_config, resolved_yaml
from arcopo_fast.config.schema import Config
from arcopo_fast.data.prompts import Prompt
from arcopo_fast.evaluation.judging import evaluate
from arcopo_fast.evaluation.videos import Switch, first_frames, output_files, place_switches, stream_frames, with_frames
from arcopo_fast.model.families import SIZES
from arcopo_fast.model.lora import BLOCK_TARGETS, adapter_parameters, add_lora, load_adapter, read_adapter, save_adapter
from arcopo_fast.model.sizes import CausalWanConfig, GeneratorSizes, VAESizes
from arcopo_fast.model.vae import StreamingDecoder
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, StackedNoise
from arcopo_fast.rollout.stream import Stream

FAST = ["sampler.steps=[1000,300]", "generator.device=cpu"]
WINDOW = ["cache.variant=longlive", "cache.window=4", "cache.sink=1"]
PROMPTS = ["a red circle moving left", "a blue square moving up", "a green cross moving right"]
ROUNDING = 2e-4


@pytest.fixture(scope="module")
def generator() -> Generator:
    return load_generator(load_config("toy", FAST))


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], list[Path]]:
    """Exit status, the lines on stderr, and the files named on stdout."""
    status, lines, out = outcome(generate.main, capsys, *FAST, *arguments)
    return status, lines, [Path(line) for line in out.splitlines()]


def decoded(path: Path) -> NDArray[np.uint8]:
    """[F, H, W, 3]"""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def toy(generator: Generator, *overrides: str, frames: int | None = None, videos: int = 1) -> tuple[Config, Engine]:
    config = load_config("toy", [*FAST, *overrides])
    if frames:
        config = with_frames(config, frames, VAESizes.from_config(generator.decoder.vae.config))
    return config, sized_engine(config, generator, videos, longer=False)


def frames_of(generator: Generator, engine: Engine, prompts: Sequence[str], seed: int, first: int = 0, **more: Any) -> list[Tensor]:
    """Each chunk's frames [B, F, 3, H, W]; the prompts are those from place `first` on."""
    noise = StackedNoise([KeyedNoise(engine.shape, GroupId(seed, group=first + row)) for row in range(len(prompts))])
    return list(stream_frames(generator, engine, generator.encode_text(prompts), noise, **more))


# Streaming


def test_frames_are_in_the_file_before_the_next_chunk_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    extend, seen = Engine.extend, []
    partial = tmp_path / "new" / "a.partial.mp4"

    def watched(*arguments: Any, **keywords: Any) -> Any:
        seen.append(len(decoded(partial)) if partial.exists() else 0)
        return extend(*arguments, **keywords)

    monkeypatch.setattr(Engine, "extend", watched)
    status, said, files = command(capsys, "--prompt", PROMPTS[0], "--out", tmp_path / "new" / "a.mp4")
    assert seen == [0, 4, 12, 20], "of the 5, 13 and 21 frames of the chunks before, all but the last"
    assert status == 0 and files == [tmp_path / "new" / "a.mp4"] and list(tmp_path.rglob("*.mp4")) == files
    assert len(decoded(files[0])) == 29
    assert said[-1].startswith("a.mp4: 29 frames, 3.6 s; first frame after ") and said[-1].endswith(" frames/s")
    first, pace = float(said[-1].split("after ")[1].split(" s")[0]), float(said[-1].split(", ")[-1].split()[0])
    assert 0 < first < 29 / pace


def test_the_frames_are_those_of_the_whole_video_and_of_its_evaluation(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(2**32)
    evaluation = ["evaluation.videos_per_prompt=1", "evaluation.prompts=2", "evaluation.sample_videos=2", f"evaluation.seed={seed}"]
    config, engine = toy(generator, *evaluation, videos=2)
    chunks = frames_of(generator, engine, PROMPTS[:2], seed)
    assert [chunk.shape[1] for chunk in chunks] == [5, 8, 8, 8] and engine.pool.pages_in_use == 0
    judged = evaluate(config, generator, engine, [Prompt(prompt) for prompt in PROMPTS[:2]], load_rewards(config), {})
    torch.testing.assert_close(torch.cat(chunks, dim=1), judged.frames, rtol=0, atol=ROUNDING)


def test_the_same_seed_gives_the_same_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.randrange(2**32 - 1)
    prompts = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[0], "video.chunks=2"]
    made = {}
    for name, arguments in {"one": [seed], "again": [seed], "batch": [seed, "--batch", 2], "other": [seed + 1]}.items():
        status, _, files = command(capsys, *prompts, "--out", tmp_path / name, "--seed", *arguments)
        assert status == 0 and [file.name for file in files] == [f"0{index}-a-red-circle-moving-left.mp4" for index in range(2)]
        made[name] = files
    for index in range(2):
        assert made["one"][index].read_bytes() == made["again"][index].read_bytes(), "bit for bit"
        one, batch, other = (decoded(made[name][index]).astype(float) for name in ("one", "batch", "other"))
        assert np.abs(one - batch).mean() < 0.5 < 2 < np.abs(one - other).mean()
    assert made["one"][0].read_bytes() != made["one"][1].read_bytes(), "each place in the list has noise of its own"


def test_a_batch_is_its_videos(generator: Generator) -> None:
    _, together = toy(generator, videos=3)
    _, alone = toy(generator)
    seed = random.randrange(2**32)
    batch = torch.cat(frames_of(generator, together, PROMPTS, seed), dim=1)
    for row, prompt in enumerate(PROMPTS):
        single = torch.cat(frames_of(generator, alone, [prompt], seed, row), dim=1)
        torch.testing.assert_close(batch[row : row + 1], single, rtol=0, atol=ROUNDING)
    assert (batch[0] - batch[1]).abs().max() > 0.1


# Prompts that change


def test_a_prompt_switch_changes_the_chunks_from_there_on(generator: Generator) -> None:
    _, engine = toy(generator, *WINDOW)
    seed = random.randrange(2**32)
    plain = frames_of(generator, engine, PROMPTS[:1], seed)
    text = generator.encode_text(PROMPTS[1:2])
    switched = frames_of(generator, engine, PROMPTS[:1], seed, switches={4: text})
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], switched[:2]))
    assert all((a - b).abs().max() > 0.05 for a, b in zip(plain[2:], switched[2:]))
    latents = engine.generate(generator.encode_text(PROMPTS[:1]), KeyedNoise(engine.shape, GroupId(seed)), switches={4: text})
    whole, _ = generator.decoder.decode(latents, generator.decoder.start())
    torch.testing.assert_close(torch.cat(switched, dim=1), whole, rtol=0, atol=ROUNDING)


def test_a_switch_falls_on_the_chunk_that_begins_at_or_after_its_frame(generator: Generator, capsys: pytest.CaptureFixture[str]) -> None:
    config, engine = toy(generator)
    vae = VAESizes.from_config(generator.decoder.vae.config)
    starts = first_frames(engine.shape, vae)
    assert starts == {0: 0, 2: 5, 4: 13, 6: 21}, "a latent frame is four frames, the first one is one"
    assert place_switches([Switch(13, "b"), Switch(1, "a"), Switch(14, "c")], engine.shape, vae) == {2: "a", 4: "b", 6: "c"}
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said] == ["the prompt changes at frame 5", "the prompt changes at frame 21"]


def test_the_command_switches_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [*WINDOW, "--prompt", PROMPTS[0], "--frames", 22, "--seed", 5]
    videos = []
    for name, more in {"plain": [], "switched": ["--switch", f"11:{PROMPTS[1]}"]}.items():
        status, said, files = command(capsys, *common, *more, "--out", tmp_path / f"{name}.mp4")
        assert status == 0 and said[0] == "22 frames are not whole chunks of 2 latent frames: making 29"
        videos.append(decoded(files[0]).astype(float))
    assert said[1] == "the prompt changes at frame 13, where a chunk begins, not at 11"
    difference = np.abs(videos[0] - videos[1]).mean(axis=(1, 2, 3))
    assert difference[:13].max() == 0 and difference[13:].min() > 0.5


# Long videos


@pytest.mark.parametrize("first", [False, True])
def test_frames_are_rounded_up_to_whole_chunks(first: bool, generator: Generator) -> None:
    config = load_config("toy", [f"video.independent_first_frame={str(first).lower()}", f"video.chunk_frames={random.randint(1, 4)}"])
    vae = VAESizes.from_config(generator.decoder.vae.config)

    def total(config: Config) -> int:
        return vae.pixel_frames(sum(config.video.chunk_sizes))

    for frames in [1, 5, 6, *(random.randint(1, 300) for _ in range(20))]:
        made = with_frames(config, frames, vae)
        shorter = made.model_copy(update={"video": made.video.model_copy(update={"chunks": made.video.chunks - 1})})
        assert total(made) >= frames and (made.video.chunks == 1 or total(shorter) < frames)


def test_memory_does_not_grow_with_a_window(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    # In this variant positions are places in the window. In the others new ones come with every chunk, and a few of their tables are kept.
    config, engine = toy(generator, *WINDOW, "cache.variant=longlive_infinity", "sampler.steps=[1000]", frames=157, videos=2)
    assert engine.shape.chunks == 20 and engine.pool.pages == 8
    streams: list[Stream] = []
    start = engine.start
    monkeypatch.setattr(engine, "start", lambda text: streams.append(start(text)) or streams[-1])
    text, switched = generator.encode_text(PROMPTS[:2]), generator.encode_text(PROMPTS[2:] * 2)
    noise = StackedNoise([KeyedNoise(engine.shape, GroupId(0, group=row)) for row in range(2)])

    def living() -> int:
        gc.collect()
        return sum(found.numel() for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter))

    kept, tensors = [], {}
    for chunk, _ in enumerate(stream_frames(generator, engine, text, noise, switches={6: switched, 30: switched})):
        kept.append(sum(part.shape[1] for part in streams[0].latents))
        if chunk in (4, 18):
            tensors[chunk] = living()
    assert engine.pool.peak_in_use == 8 and max(kept) == 4
    assert tensors[18] == tensors[4]


def test_a_cache_without_window_says_what_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ["--prompt", PROMPTS[0], "--frames", 37]
    status, said, _ = command(capsys, *prompt, "--out", tmp_path / "a")
    config = load_config("toy", ["video.chunks=5"])
    pool = build_engine(config, load_model(checkpoint_path("toy")), videos=1).pool
    size = f"{(pool.keys.nbytes + pool.values.nbytes) / 2**30:.3g} GiB"
    assert status == 0 and said[0].startswith(f"keys and values of 8 latent frames take {size}: the cache has no window")
    status, said, _ = command(capsys, *prompt, *WINDOW, "--out", tmp_path / "b")
    assert status == 0 and "keys and values" not in "".join(said)

    def refuses(*arguments: object, **keywords: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 200 GiB.\nMore")

    monkeypatch.setattr("arcopo_fast.build.build_engine", refuses)
    status, said, _ = command(capsys, *prompt, "--out", tmp_path / "c")
    assert status == 2 and "do not fit (CUDA out of memory. Tried to allocate 200 GiB.); set cache.window" in said[-1]
    assert not (tmp_path / "c").exists()


# Adapters


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory as far as this command looks at it; its recipe differs from the default one."""
    model = add_lora(load_model(checkpoint_path("toy")), rank=3, alpha=5.0, targets=BLOCK_TARGETS, seed=0)
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.08)
    save_adapter(tmp_path / "run" / "adapter", model, base_model="toy")
    (tmp_path / "run" / "config.yaml").write_text(resolved_yaml(load_config("toy", [*FAST, "name=mine", "video.chunks=2", "seed=77"])))
    return tmp_path / "run"


def test_adapters_of_a_run_in_either_form_at_any_scale(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def video(name: str, *arguments: object) -> NDArray[np.float64]:
        status, said, files = command(capsys, "--prompt", PROMPTS[0], "--out", tmp_path / f"{name}.mp4", *arguments)
        assert status == 0, said
        return decoded(files[0]).astype(float)

    trained = video("run", "--lora", run)
    assert len(trained) == 13, "the run's recipe"
    recipe = ["toy", "video.chunks=2", "seed=77"]
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        np.testing.assert_allclose(video(name, "--lora", run / "adapter" / name, *recipe), trained, atol=12)
    plain = video("plain", *recipe)
    np.testing.assert_array_equal(video("zero", "--lora", run, "--lora-scale", 0), plain)
    half = video("half", "--lora", run, "--lora-scale", 0.5)
    assert min(np.abs(a - b).mean() for a, b in ((trained, plain), (half, plain), (half, trained))) > 1


@pytest.mark.parametrize("scale", [1.0, 0.37, -0.5])
def test_a_scaled_adapter_adds_so_much_of_itself_and_is_what_diffusers_computes(scale: float, run: Path) -> None:
    adapter = read_adapter(run / "adapter")
    model, merged = load_model(checkpoint_path("toy")), load_model(checkpoint_path("toy"))
    load_adapter(model, run, scale=scale)
    for name in adapter.modules:
        down, up = (adapter.state[f"{name}.lora_{letter}.weight"] for letter in "AB")
        merged.get_submodule(name).weight += (scale * adapter.alpha / adapter.rank) * up @ down
    wan = WanTransformer3DModel.from_pretrained(checkpoint_path("toy") / "transformer", torch_dtype=torch.float32)
    wan.load_lora_adapter(str(run / "adapter"), weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
    wan.set_adapters(["default_0"], [scale])
    latents, text, timestep = torch.randn(2, 2, 16, 8, 8), torch.randn(2, 8, 32), torch.tensor([820.0])
    with torch.no_grad():
        ours = model(latents, timestep[:, None], model.encode_text(text))
        added = merged(latents, timestep[:, None], merged.encode_text(text))
        theirs = wan(latents.transpose(1, 2), timestep.expand(2), text).sample.transpose(1, 2)
    for other in (added, theirs):
        assert (ours - other).abs().max() < 2e-5 * other.abs().max()


def test_videos_that_are_not_finite_are_no_videos(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter whose values are finite, but under which the generator's are not."""
    prompts = [argument for prompt in PROMPTS[:2] for argument in ("--prompt", prompt)]
    status, said, files = command(capsys, *prompts, "--batch", 2, "--lora", run, "--lora-scale", 1e30, "--out", tmp_path / "videos")
    assert status == 2 and not files and not list(tmp_path.rglob("*.mp4"))
    assert said[-1].startswith("error: video 1 of 2: its latents are not finite from frame 0 on; ") and "adapter" in said[-1]


@pytest.mark.parametrize("chunk", [0, 2])
def test_frames_that_are_not_finite_are_no_video(
    chunk: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = StreamingDecoder.decode, []

    def broken(self: StreamingDecoder, latents: Tensor, cache: Any) -> Any:
        frames, cache = decode(self, latents, cache)
        calls.append(None)
        if len(calls) > chunk:
            frames[0, 1] = torch.nan
        return frames, cache

    monkeypatch.setattr(StreamingDecoder, "decode", broken)
    status, said, files = command(capsys, "--prompt", PROMPTS[0], "--out", tmp_path / "a.mp4")
    assert status == 2 and not files and not list(tmp_path.iterdir())
    assert f"a.mp4: frame {[1, 6, 14][chunk]} holds values that are not finite" in said[-1]


# Stopping


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Calls of `Engine.extend`, counted from 0, during which the user interrupts."""
    extend, calls, when = Engine.extend, [], set()

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        if len(calls) in when:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(None)
        return extend(*arguments, **keywords)

    monkeypatch.setattr(Engine, "extend", interrupted)
    yield when


def test_ctrl_c_keeps_the_chunks_that_are_done(tmp_path: Path, capsys: pytest.CaptureFixture[str], interrupting: set[int]) -> None:
    interrupting.add(1)
    status, said, files = command(capsys, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--batch", 2, "--out", tmp_path)
    names = [f"{index:02d}-{prompt.replace(' ', '-')}" for index, prompt in enumerate(PROMPTS)]
    assert status == 130 and not files and said[-1].startswith("interrupted; ")
    assert f"{names[0]}.partial.mp4 and 1 more hold the first 13 of 29 frames" in said[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.partial.mp4" for name in names[:2]]
    assert all(len(decoded(path)) == 13 for path in tmp_path.iterdir())


def test_ctrl_c_in_a_last_chunk_begins_no_other_video(tmp_path: Path, capsys: pytest.CaptureFixture[str], interrupting: set[int]) -> None:
    interrupting.add(3)
    status, said, _ = command(capsys, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--out", tmp_path)
    assert status == 130 and said[-1] == "interrupted; 1 of 2 videos are made; the same command with --overwrite starts again"
    assert [path.name for path in tmp_path.iterdir()] == ["00-a-red-circle-moving-left.mp4"]


# Input


def test_prompts_of_a_file_come_after_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[1]}\n\n{PROMPTS[2]}\n")
    given = ["--prompt", PROMPTS[0], "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out", "video.chunks=1"]
    status, _, files = command(capsys, *given)
    assert status == 0 and [file.name for file in files] == [f"{i:02d}-{prompt.replace(' ', '-')}.mp4" for i, prompt in enumerate(PROMPTS)]
    before = files[0].read_bytes()
    status, said, _ = command(capsys, *given, "--seed", 9)
    assert status == 2 and len(said) == 1 and "and 2 more are there already" in said[0] and files[0].read_bytes() == before
    assert command(capsys, *given, "--seed", 9, "--overwrite")[0] == 0 and files[0].read_bytes() != before


def test_names_can_be_read() -> None:
    prompts = ["A dog, running!", "Ein Hund läuft / 狗", "...", "word " * 60]
    names = [path.name for path in output_files(Path("v"), prompts)]
    assert names[:3] == ["00-a-dog-running.mp4", "01-ein-hund-läuft-狗.mp4", "02-.mp4"]
    assert len(names[3]) < 60 and [path.name for path in output_files(Path("v"), ["x"] * 101)][100] == "100-x.mp4"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "there is no prompt"),
        (["--prompt", " "], "there is no prompt"),
        (["--prompts", "nowhere.txt"], "cannot read prompts from nowhere.txt"),
        (["--prompt", "a mauve circle"], "does not know the word 'mauve'"),
        (["--prompt", "x", "--frames", "0"], "--frames: expected a whole number, at least 1"),
        (["--prompt", "x", "--seed", "-1"], "--seed: expected a whole number from 0"),
        (["--prompt", "x", "--batch", "two"], "--batch: expected a whole number"),
        (["--prompt", "x", "--switch", "red"], "--switch: expected FRAME:TEXT"),
        (["--prompt", "x", "--switch", "0:a circle"], "--switch: expected FRAME:TEXT"),
        (["--prompt", PROMPTS[0], "--switch", f"22:{PROMPTS[1]}"], "the video's last chunk begins at frame 21"),
        (["--prompt", PROMPTS[0], "--switch", f"6:{PROMPTS[1]}", "--switch", f"13:{PROMPTS[2]}"], "same chunk, which begins at frame 13"),
        (["--prompt", PROMPTS[0], "--switch", "6:a mauve circle"], "does not know the word 'mauve'"),
        (["--prompt", "x", "cache.window=2", "cache.sink=1"], "cache.window 2 is too small"),
        (["--prompt", "x", "--lora", "nowhere"], "nowhere"),
        (["--prompt", "x", "--lora-scale", "0.5"], "name it with --lora"),
        (["--prompt", "x", "--lora", "y", "--lora-scale", "nan"], "--lora-scale: expected a number"),
        (["--prompt", "x", "--prompt", "y", "--out", "one.mp4"], "one.mp4 is one file, and there are 2 prompts"),
        (["--prompt", "x", "--prompt", "y", "--out", "one.MP4"], "one.MP4 is one file, and there are 2 prompts"),
        (["--prompt", "x", "--out", "one.mov"], "videos are written as .mp4"),
        (["--prompt", "a\x00b"], "--prompt: the control character U+0000"),
        (["--prompt", "a\x1b[1m"], "--prompt: the control character U+001B"),
        (["--prompt", "a\udcffb"], "--prompt: U+DCFF, half of a surrogate pair"),
        (["--prompt", "x", "--switch", "8:a\x07"], "--switch: the control character U+0007"),
        (["--prompt", "x", "--switch", "9" * 5000 + ":a"], "--switch: expected FRAME:TEXT"),
        (["--prompts", "a" * 5000], "is not a valid path"),
        (["--prompt", "x", "--out", "file/videos"], "is not a directory"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    status, said, files = command(capsys, *arguments)
    errors = [line for line in said if not line.startswith("the prompt changes at")]
    assert status == 2 and len(errors) == 1 and expected in errors[0], said
    assert not files and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_untrained_generators_work_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = CausalWanConfig(num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=40, freq_dim=16, text_dim=16, text_len=20)
    monkeypatch.setitem(SIZES, "tiny", GeneratorSizes(small, VAESizes(base_dim=8)))
    arguments = ["generator.checkpoint=random:tiny", "--prompt", "Any words at all", "--frames", 20, "--out", tmp_path / "a.mp4"]
    status, _, files = command(capsys, *arguments)
    assert status == 0 and len(decoded(files[0])) == 21
