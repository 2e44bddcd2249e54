"""Long videos judged by segment: against whole videos that are decoded and then cut, and their figures against independent ones."""

from __future__ import annotations

import gc
import json
import math
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from support.commands import Ended, outcome
from support.models import decode_video, small_config
from support.ranks import run_commands
from torch import Tensor, nn

from arcopo_fast import evaluate
from arcopo_fast.build import Generator, load_generator, load_rewards, sized_engine
from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.data.prompts import Prompt, Turn
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.adapters import Adapted
from arcopo_fast.evaluation.drift import FIGURES, MEASURES, courses, figures
from arcopo_fast.evaluation.evaluator import batches
from arcopo_fast.evaluation.scores import BASE, ScoreDirectory, Scores, Video
from arcopo_fast.evaluation.segments import Segments, judge_segments, mean_pictures, measures, similarity
from arcopo_fast.model.families import SIZES
from arcopo_fast.model.lora import BLOCK_TARGETS, adapter_parameters, add_lora, save_adapter
from arcopo_fast.model.sizes import GeneratorSizes, VAESizes
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, StackedNoise

VAE = VAESizes(base_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temperal_downsample=(True, True))
TINY = small_config(text_len=16, in_channels=16, out_channels=16)
RECIPE = [
    "bench_1_3b",
    "generator.checkpoint=random:segments",
    *("generator.device=cpu", "generator.dtype=float32", "generator.vae_dtype=float32", "train.threads=1"),
    *("video.chunks=2", "video.chunk_frames=3", "video.latent_height=2", "video.latent_width=4", "video.fps=8"),
    *("sampler.steps=[1000,500]", "cache.variant=longlive_infinity", "cache.window=6", "cache.sink=1"),
    *("evaluation.prompts=2", "evaluation.videos_per_prompt=2", "evaluation.sample_videos=0"),
    'rewards={"judges_of_segments:Judge:bright": 1, "judges_of_segments:Judge:read": 0.5}',
]
BRIGHT, READ = "judges_of_segments:Judge:bright", "judges_of_segments:Judge:read"
PROMPTS = [Prompt("a cat"), Prompt("an owl", "an owl at night"), Prompt("a lamp"), Prompt("rain")]
JUDGES = '''
import hashlib
import torch

class Judge:
    """Tells which frames it has seen, and which prompt."""
    scores = ("bright", "read")

    def __call__(self, frames, prompts):
        weights = torch.arange(1.0, 1 + frames[0].numel()).view(frames[0].shape).sqrt()
        bright = (frames * weights).mean((1, 2, 3, 4))
        digits = [int(hashlib.sha256(prompt.encode()).hexdigest()[:5], 16) for prompt in prompts]
        return {"bright": bright, "read": torch.tensor([digit / 1e3 for digit in digits]) + frames.shape[1]}
'''
command = partial(outcome, evaluate.main)


@pytest.fixture(scope="module", autouse=True)
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("judges")
    (folder / "judges_of_segments.py").write_text(JUDGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "segments", GeneratorSizes(TINY, VAE))
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module")
def generator(sizes: None) -> Generator:
    return load_generator(load_config(RECIPE[0], RECIPE[1:]))


def made(
    generator: Generator, prompts: Sequence[Prompt], frames: int, segment: int, *overrides: str
) -> tuple[Config, Engine, Segments, list[list[Tensor]], dict[str, Tensor]]:
    """Judge a video of each prompt: frames of each segment and video, and scores [N, segments] by name."""
    config, segments = Segments.of(load_config(RECIPE[0], [*RECIPE[1:], *overrides]), frames, segment)
    engine = sized_engine(config, generator, len(prompts), longer=False)
    pieces: list[list[Tensor]] = [[] for _ in prompts]
    scores: dict[str, list[list[float]]] = {}
    rewards = load_rewards(config)
    for rows, seen, judged in judge_segments(config, generator, engine, prompts, range(len(prompts)), rewards, segments):
        for place, frames_of in zip(range(*rows.indices(len(prompts))), seen):
            pieces[place].append(frames_of.clone())
        for name, column in judged.items():
            for place, value in zip(range(*rows.indices(len(prompts))), column.tolist()):
                scores.setdefault(name, [[] for _ in prompts])[place].append(value)
    return config, engine, segments, pieces, {name: torch.tensor(rows) for name, rows in scores.items()}


def whole_videos(config: Config, engine: Engine, generator: Generator, prompts: Sequence[Prompt], placed: Sequence[int]) -> Tensor:
    """The same videos, made at once and decoded as wholes. placed: the latent frames at which the prompts of all change."""
    forms = [[part.prompt.for_generator for part in prompt.parts] for prompt in prompts]
    first, *later = [generator.encode_text(list(column)) for column in zip(*forms)]
    noise = StackedNoise([KeyedNoise(engine.shape, GroupId(config.evaluation.seed, group=row)) for row in range(len(prompts))])
    latents = engine.generate(first, noise, switches=dict(zip(placed, later)))
    return torch.cat([decode_video(generator.decoder.vae, row) for row in latents.split(1)])


CUTS: dict[str, tuple[int, int, list[str], list[int]]] = {
    "segments of whole chunks": (12, 6, [], [6]),
    "cut inside a chunk, with a rest": (17, 4, [], [3, 9]),
    "an independent first frame": (13, 6, ["video.independent_first_frame=true"], [4]),
    "changes inside segments": (14, 7, [], [3, 12]),
    "chunks of one frame": (4, 2, ["video.chunk_frames=1", "cache.window=3"], [1, 3]),
    "two videos decoded at once": (12, 6, ["rollout.decode_branches=2"], []),
    "no window": (8, 4, ["cache.variant=self_forcing", "cache.window=null", "cache.sink=0"], [6]),
}


@pytest.mark.parametrize(("frames", "segment", "overrides", "changes"), CUTS.values(), ids=CUTS.keys())
def test_segments_are_the_whole_video_decoded_and_then_cut(
    generator: Generator, frames: int, segment: int, overrides: list[str], changes: list[int]
) -> None:
    """Bit for bit, under the prompts that count there."""
    exact = "rollout.decode_branches=2" not in overrides
    some, overrides = PROMPTS[: 2 if exact else 3], ["rollout.decode_branches=1", *overrides]
    prompts = [prompt._replace(turns=tuple(Turn(at, PROMPTS[(row + at) % 4]) for at in changes)) for row, prompt in enumerate(some)]
    config, engine, segments, pieces, scores = made(generator, prompts, frames, segment, *overrides)
    assert engine.pool.pages_in_use == 0 and segments == Segments(segment, frames // segment)
    videos = whole_videos(config, engine, generator, prompts, changes)
    ends = [0, *(1 + 4 * (segment * (place + 1) - 1) for place in range(segments.count))]
    assert segments.settings(VAE)["frames"] == np.diff(ends).tolist() and [len(row) for row in pieces] == [segments.count] * len(prompts)
    for video, row in zip(videos, pieces):
        for place, piece in enumerate(row):
            torch.testing.assert_close(piece, video[ends[place] : ends[place + 1]], rtol=0, atol=0 if exact else 1e-5)

    reward = load_rewards(config)[BRIGHT]
    for row, (prompt, video) in enumerate(zip(prompts, videos)):
        for place in range(segments.count):
            total = torch.zeros(2)
            latents = range(place * segment, (place + 1) * segment)
            texts = [[part.prompt.text for part in prompt.parts if part.frame <= frame][-1] for frame in latents]
            for text, begin, end in joined(texts, config.video.chunk_frames):
                first, last = (max(0, 1 + 4 * (latents[0] + at - 1)) for at in (begin, end))
                given = reward(video[None, first:last], [text])
                total += torch.tensor([given[BRIGHT].item(), given[READ].item()]) * (end - begin) / segment
            found = torch.stack([scores[BRIGHT][row, place], scores[READ][row, place]])
            torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-4)


def joined(texts: Sequence[str], shortest: int) -> list[tuple[str, int, int]]:
    """Runs of equal texts, of which a short one at an end goes to its neighbor."""
    cuts = [0, *(place for place in range(1, len(texts)) if texts[place] != texts[place - 1]), len(texts)]
    runs = [(texts[begin], begin, end) for begin, end in zip(cuts, cuts[1:])]
    if len(runs) > 1 and runs[0][2] < shortest:
        runs[:2] = [(runs[1][0], 0, runs[1][2])]
    if len(runs) > 1 and runs[-1][2] - runs[-1][1] < shortest:
        runs[-2:] = [(runs[-2][0], runs[-2][1], len(texts))]
    return runs


# Measures


def test_measures_against_their_definitions() -> None:
    frames = torch.rand(2, 5, 3, 12, 20)
    frames[0, :, :, :3] = 1.0  # a quarter of the pixels
    frames[0, :, 1, 5, 5] = 0.001
    found = measures(frames)
    for row, video in enumerate(frames.double().numpy()):
        gray = video.mean(1)
        assert found["luminance"][row] == pytest.approx(video.mean(), rel=1e-5)
        levels = np.rint(255 * video)
        assert found["clipped"][row] == pytest.approx(((levels == 0) | (levels == 255)).any(1).mean(), rel=1e-5)
        spreads = [math.sqrt(np.mean([np.var(color - gray[at]) for color in frame])) for at, frame in enumerate(video)]
        assert found["chroma"][row] == pytest.approx(np.mean(spreads), rel=1e-5)
        assert found["contrast"][row] == pytest.approx(np.mean([frame.std() for frame in gray]), rel=1e-5)
        assert found["motion"][row] == pytest.approx(math.sqrt(np.mean((gray[1:] - gray[:-1]) ** 2)), rel=1e-5)
    assert {*found, "similarity"} == MEASURES.keys() and found["clipped"][0] >= 0.25 + 1 / 240
    still = measures(frames[:, :1].expand(-1, 5, -1, -1, -1))
    assert (still["motion"] == 0).all() and (still["acutance"] > 0).all()
    gray = measures(frames.mean(2, keepdim=True).expand(-1, -1, 3, -1, -1))
    torch.testing.assert_close(gray["contrast"], found["contrast"])
    assert (gray["chroma"] < 1e-6).all()


def test_similarity_is_of_the_picture_not_of_its_brightness() -> None:
    pictures = mean_pictures(torch.rand(2, 4, 3, 32, 32))
    torch.testing.assert_close(similarity(pictures, pictures), torch.ones(2))
    torch.testing.assert_close(similarity(0.4 * pictures + 0.3, pictures), torch.ones(2))
    torch.testing.assert_close(similarity(1 - pictures, pictures), -torch.ones(2))
    assert similarity(pictures, torch.zeros_like(pictures)).tolist() == [0, 0], "of nothing"
    other = mean_pictures(torch.rand(2, 4, 3, 32, 32))
    expected = [np.corrcoef(one, two)[0, 1] for one, two in zip(pictures.numpy(), other.numpy())]
    torch.testing.assert_close(similarity(pictures, other), torch.tensor(expected).float())


def test_memory_does_not_grow_with_the_length(generator: Generator) -> None:
    """Between segments as much is alive in the 14th as in the 7th, and no more pages are in use."""
    config, segments = Segments.of(load_config(RECIPE[0], [*RECIPE[1:], "sampler.steps=[1000]"]), 42, 3)
    engine = sized_engine(config, generator, 1, longer=True)
    alive = {}
    prompt = Prompt("a cat", None, (Turn(6, Prompt("a dog")), Turn(30, Prompt("a hen"))))
    for number, (_, frames, _) in enumerate(judge_segments(config, generator, engine, [prompt], [0], load_rewards(config), segments)):
        if number in (6, 13):
            gc.collect()
            alive[number] = sum(found.numel() for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter))
        del frames
    assert alive[13] == alive[6] and engine.pool.peak_in_use <= 6 + 3 and engine.pool.pages_in_use == 0


# Figures


def stored(generators: Sequence[str], prompts: int, videos: int, segments: int) -> Scores:
    found = Scores(adapters=dict.fromkeys(generators))
    for name in generators:
        for video in (Video(name, prompt, number) for prompt in range(prompts) for number in range(videos)):
            parts = {"beauty": 1.0, "truth": 2.0, "luminance": 0.3, "clipped": 0.1}
            found.segments[video] = {score: [mean + random.gauss(0, 0.1) for _ in range(segments)] for score, mean in parts.items()}
            found.values[video] = {score: float(np.mean(found.segments[video][score])) for score in ("beauty", "truth")}
    return found


SETTINGS = {"rewards.beauty": 1.0, "rewards.truth": 0.5, "video.fps": 8, "segments.frames": [13, 16, 16, 16], "segments.latent_frames": 4}


def test_figures_against_independent_ones() -> None:
    """One video of each of three prompts: the ordinary t interval, with the quantile of two degrees of freedom."""
    scores = stored([BASE, "on@1"], 3, 1, 4)
    found = courses(scores, SETTINGS)
    assert found.compared_with == BASE and found.seconds == [(0, 13 / 8), (13 / 8, 29 / 8), (29 / 8, 45 / 8), (45 / 8, 61 / 8)]
    expected_order = [(name, kind) for name, kind in (("reward", "total"), ("beauty", "trained"), ("truth", "trained"))]
    assert [(course.name, course.kind) for course in found.found[::2]] == [*expected_order, ("luminance", "drift"), ("clipped", "drift")]
    minutes = [np.mean(span) / 60 for span in found.seconds]

    def values(generator: str, name: str) -> np.ndarray:
        if name == "reward":
            return values(generator, "beauty") + 0.5 * values(generator, "truth")
        return np.array([scores.segments[Video(generator, prompt, 0)][name] for prompt in range(3)])

    def figures_of(rows: np.ndarray, name: str) -> dict[str, np.ndarray]:
        far = np.abs(rows - rows[:, :1]).argmax(1)
        worst = {"clipped": rows.max(1), "luminance": rows[range(3), far]}.get(name, rows.min(1))
        slope = np.array([np.polyfit(minutes, row, 1)[0] for row in rows])
        return dict(zip(FIGURES, (rows[:, 0], rows[:, -1], rows[:, -1] - rows[:, 0], slope, worst)))

    def interval(column: np.ndarray) -> list[float]:
        reach = 4.302653 * column.std(ddof=1) / math.sqrt(3)
        return [column.mean(), column.mean() - reach, column.mean() + reach]

    for course in found.found:
        rows, base = values(course.generator, course.name), values(BASE, course.name)
        for place, segment in enumerate(course.values.segments):
            assert list(segment) == pytest.approx(interval(rows[:, place]), rel=1e-5)
        for figure, column in figures_of(rows, course.name).items():
            assert list(course.values.figures[figure]) == pytest.approx(interval(column), rel=1e-5, abs=1e-9), (course.name, figure)
            if course.generator != BASE:
                changed = interval(column - figures_of(base, course.name)[figure])
                assert course.difference is not None and course.pairs == 3
                assert list(course.difference.figures[figure]) == pytest.approx(changed, rel=1e-5, abs=1e-9), (course.name, figure)
        means = rows.mean(0)
        worst = {"clipped": means.argmax(), "luminance": abs(means - means[0]).argmax()}.get(course.name, means.argmin())
        assert course.worst == worst and (course.difference is None) == (course.generator == BASE)


def test_a_segment_without_a_score_takes_its_video_out() -> None:
    scores = stored([BASE, "on@1"], 3, 2, 4)
    scores.segments[Video("on@1", 1, 1)]["beauty"][2] = math.nan
    scores.segments[Video(BASE, 2, 0)]["beauty"][0] = math.nan
    found = {(course.generator, course.name): course for course in courses(scores, SETTINGS).found}
    for name in ("beauty", "reward"):
        assert (found["on@1", name].failed, found[BASE, name].failed, found["on@1", name].pairs) == (1, 1, 4)
        kept = [Video("on@1", prompt, number) for prompt in range(3) for number in range(2) if (prompt, number) != (1, 1)]
        last = np.mean([scores.segments[video]["beauty"][-1] for video in kept])
        assert name == "reward" or found["on@1", name].values.figures["last"].mean == pytest.approx(last)
    assert found["on@1", "truth"].failed == 0 and found["on@1", "truth"].pairs == 6


def test_one_segment_has_no_slope() -> None:
    assert math.isnan(figures([0.5], "beauty", [(0, 2)])["slope"])
    found = courses(stored(["a@1", "b@1"], 2, 1, 1), SETTINGS | {"segments.frames": [13]})
    assert found.compared_with == "a@1", "without the base model, the first one"
    assert found.found[1].difference is not None and found.found[1].difference.figures["drift"].mean == 0


# The command


def small(*arguments: object) -> list[object]:
    return [*RECIPE, "--frames", 13, "--segment", 4, "--switch", "6:a red owl", "--keep-videos", "none", *arguments]


def scores_of(out: Path) -> Scores:
    return ScoreDirectory.open(out).read()


@pytest.fixture(scope="module")
def adapter(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "on"
    config = load_config(RECIPE[0], RECIPE[1:])
    model = add_lora(load_generator(config).model, rank=2, alpha=4, targets=BLOCK_TARGETS, seed=0)
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    save_adapter(folder / "adapter", model, base_model="random")
    return folder


@pytest.fixture(scope="module")
def judged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("judged") / "out"
    evaluate.main([str(word) for word in small("--adapter", adapter, "--out", out)])
    return out


def test_what_the_command_leaves(judged: Path, generator: Generator) -> None:
    scores, document = scores_of(judged), json.loads((judged / "results.json").read_text())
    assert len(scores.values) == len(scores.segments) == 8 and list(scores.adapters) == [BASE, "on@1"]
    turns = (Turn(6, Prompt("a red owl")),)
    assert all(prompt.turns == turns for prompt in scores.prompts.values())
    for video, parts in scores.segments.items():
        assert parts.keys() == {BRIGHT, READ, *MEASURES} and {len(column) for column in parts.values()} == {3}
        assert scores.values[video] == pytest.approx({name: np.mean(parts[name]) for name in (BRIGHT, READ)})
        assert parts["similarity"][0] == pytest.approx(1)
    # the same videos as anybody's who asks for them
    *_, expected = made(generator, [scores.prompts[0], scores.prompts[0]], 13, 4, "rollout.decode_branches=1")
    for name, rows in expected.items():
        for number in range(2):
            assert scores.segments[Video(BASE, 0, number)][name] == pytest.approx(rows[number].tolist(), rel=1e-4, abs=1e-5)
    listed = document["segments"]
    assert listed["compared_with"] == BASE and len(listed["scores"]) == 2 * (3 + len(MEASURES)) and listed["seconds"][0] == [0, 13 / 8]
    entry = next(entry for entry in listed["scores"] if entry["score"] == READ and entry["generator"] == "on@1")
    assert entry["difference"]["drift"] == {"mean": 0, "low": 0, "high": 0} and entry["difference"]["pairs"] == entry["videos"] == 4
    assert {result["score"] for result in document["results"]} == {"reward", BRIGHT, READ}, "what drifts is no score of the whole"
    table, page = (judged / "table.md").read_text(), (judged / "report.html").read_text()
    assert "3 segments of 2 s" in table and "slope per minute" in table and "Difference to base" in table
    assert page.count("<svg") == 2 * (3 + len(MEASURES)) and "<script" not in page
    assert not (judged / "videos").exists()


def test_it_goes_on_and_parts_are_merged(judged: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In shards, with the second generator later; the result is that of one command."""
    for part in range(2):
        out = tmp_path / f"part{part}"
        first = command(capsys, *small("--batch", 2, "--shard", f"{part}/2", "--out", out))
        assert first.status == 0 and "3 segments of 4 latent frames; the last 1 of 13 are no whole segment" in first.lines[0]
        assert command(capsys, *small("--batch", 2, "--shard", f"{part}/2", "--out", out, "--adapter", adapter)).status == 0
    status, _, printed = command(capsys, "merge", tmp_path / "part0", tmp_path / "part1", "--out", tmp_path / "merged")
    assert status == 0 and "report: " in printed
    once, merged = scores_of(judged), scores_of(tmp_path / "merged")
    assert once.segments.keys() == merged.segments.keys() and once.prompts == merged.prompts
    for video, parts in once.segments.items():
        for name, column in parts.items():
            assert merged.segments[video][name] == pytest.approx(column, rel=1e-3, abs=1e-4), (video, name)
    (file, *_) = (tmp_path / "merged" / "scores").iterdir()
    record = json.loads(file.read_text().splitlines()[0])
    record["segments"][BRIGHT].pop()
    file.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match="not 3 segments"):
        scores_of(tmp_path / "merged")


def test_ranks_share_the_work(judged: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = run_commands(2, evaluate.main, *small("--adapter", adapter, "--out", out))
    assert (first.status, second.status) == (0, 0), (first, second)
    assert scores_of(out).segments == scores_of(judged).segments and len([*(out / "scores").iterdir()]) == 2
    assert (out / "report.html").read_text() == (judged / "report.html").read_text()


def test_videos_are_written_while_they_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a cat"}\n{"prompts": ["an owl", "a hen"], "frames": [0, 3]}\n')
    out = tmp_path / "out"
    ended = command(capsys, *RECIPE, "--prompts", prompts, "--videos", 1, "--segment", 3, "--keep-videos", "all", "--out", out)
    assert ended.status == 0, ended
    files = sorted((out / "videos" / BASE).iterdir())
    assert [file.name for file in files] == ["0000-a-cat-0.mp4", "0001-an-owl-0.mp4"]
    for file in files:
        with av.open(str(file)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 1 + 4 * 5
    assert scores_of(out).prompts[1] == Prompt("an owl", None, (Turn(3, Prompt("a hen")),))


def test_prompts_that_change_at_other_frames_are_other_batches() -> None:
    turn = Turn(4, Prompt("b"))
    prompts = [Prompt("a"), Prompt("c"), Prompt("d", None, (turn,)), Prompt("e", None, (turn,)), Prompt("f", None, (Turn(8, Prompt("b")),))]
    found = [[(video.prompt, video.number) for video in batch] for batch in batches([Adapted(BASE)], prompts, 2, 3)]
    assert found == [[(0, 0), (0, 1), (1, 0)], [(1, 1)], [(2, 0), (2, 1), (3, 0)], [(3, 1)], [(4, 0), (4, 1)]]


BAD: dict[str, tuple[list[str], str]] = {
    "shorter than a segment": (["--frames", "8", "--segment", "9"], "videos of 8 latent frames are shorter than a segment of 9"),
    "a single picture": (["--segment", "1"], "--segment 2 or more"),
    "no frames": (["--frames", "0"], "at least 1"),
    "half a frame": (["--frames", "2.5"], "at least 1"),
    "a change that comes too late": (["--frames", "12", "--switch", "10:a dog"], "last chunk begins at 9; make the video longer"),
    "two changes at once": (["--frames", "12", "--switch", "4:a dog", "--switch", "5:a hen"], "begins at 6, and so does another"),
    "a change without a long video": (["--switch", "3:a dog"], "give --frames or --segment"),
    "a change that is none": (["--frames", "12", "--switch", "x:a dog"], "FRAME:TEXT"),
    "changes of both kinds": (["--frames", "12", "--switch", "3:a dog", "--prompts", "{changing}"], "prompts of its own"),
    "changing prompts of whole videos": (["--prompts", "{changing}"], "give --frames or --segment"),
    "a record that is none": (["--frames", "12", "--prompts", "{wrong}"], '"frames" begins with 0 and rises'),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"changing": tmp_path / "changing.jsonl", "wrong": tmp_path / "wrong.jsonl"}
    places["changing"].write_text('{"prompts": ["an owl", "a hen"], "frames": [0, 4]}')
    places["wrong"].write_text('{"prompts": ["an owl", "a hen"], "frames": [2, 4]}')
    ended: Ended = command(capsys, *RECIPE, *(word.format(**places) for word in arguments), "--out", tmp_path / "out")
    assert ended.status == 2 and said in ended.lines[-1] and not (tmp_path / "out").exists(), ended


def test_without_a_window_memory_grows_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    call = [*RECIPE, "cache.variant=self_forcing", "cache.window=null", "cache.sink=0", "--frames", 9, "--segment", 3, "--out"]

    def refuses(*arguments: object, **keywords: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 200 GiB.\nMore")

    monkeypatch.setattr("arcopo_fast.build.build_engine", refuses)
    status, said, _ = command(capsys, *call, tmp_path / "out")
    assert status == 2 and any("the cache has no window, so it grows with the video; set cache.window" in line for line in said)
    assert "keys and values of 6 latent frames" in said[-1] and "do not fit" in said[-1]


def test_other_lengths_are_another_evaluation(judged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change, part in ((["--segment", "3"], "segments.latent_frames: 3 here, 4 there"), (["--switch", "9:a hen"], "other prompts")):
        status, said, _ = command(capsys, *small("--out", judged), *change)
        assert status == 2 and part in said[-1], said
    status, said, _ = command(capsys, *RECIPE, "--out", judged)
    assert status == 2 and "segments.latent_frames: nothing here, 4 there" in said[-1], said
