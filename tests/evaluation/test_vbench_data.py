"""VBench's numbers and names: the official total, the prompts with their dimensions, and seeds."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.vbench import BLUE, COLUMNS, GREEN, INFO, RED, random_raw, scores_of, write_info, write_results

from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.vbench.data import (
    DIMENSIONS,
    RESULTS,
    Prompt,
    manifest,
    read_extended,
    read_info,
    read_scores,
    total_score,
    video_seed,
    videos_of,
)

# From VBench's leaderboard, in per cent: total, quality, semantic, then the raw scores in the order of `COLUMNS`.
LEADERBOARD = {
    "CogVideoX-5B": "81.61 82.75 77.04 96.23 96.52 98.66 96.92 70.97 61.98 62.90 85.23 62.11 99.40 82.81 66.35 53.20 24.91 25.38 27.59",
    "CogVideoX-1.5": "82.17 82.78 79.76 96.87 97.35 98.88 98.31 50.93 62.79 65.02 87.47 69.65 97.20 87.55 80.25 52.91 24.89 25.19 27.30",
    "Gen-3": "82.32 84.11 75.17 97.10 96.62 98.61 99.23 60.14 63.34 66.82 87.81 53.64 96.40 80.90 65.09 54.57 24.31 24.71 26.69",
    "Kling": "81.85 83.39 75.68 98.33 97.60 99.30 99.40 46.94 61.21 65.62 87.24 68.05 93.40 89.90 73.03 50.86 19.62 24.17 26.42",
    "Mira": "71.87 78.78 44.21 96.23 96.92 98.29 97.54 60.33 42.51 60.16 52.06 12.52 63.80 42.24 27.83 16.34 21.89 18.77 18.72",
    "CausVid": "84.27 85.65 78.75 97.53 97.19 96.24 98.05 92.69 64.15 68.88 92.99 72.15 99.80 80.17 64.65 56.58 24.27 25.33 27.51",
}


# By hand, from the paper's normalisation: the scores that count as 0 and as 1, in the order of `COLUMNS`.
LOW = [0.1462, 0.2615, 0.6293, 0.706, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0009, 0, 0]
HIGH = [1, 1, 1, 0.9975, 1, 1, 1, 1, 1, 1, 1, 1, 0.8222, 0.2855, 0.364, 0.364]


@pytest.mark.parametrize("model", LEADERBOARD)
def test_the_leaderboard_is_reproduced(model: str) -> None:
    published = [float(value) for value in LEADERBOARD[model].split()]
    means = scores_of([value / 100 for value in published[3:]]).means()
    assert [100 * mean for mean in means.values()] == pytest.approx([*published[1:3], published[0]], abs=0.01), (
        "to the rounding of the raw scores"
    )


def test_total_of_the_paper() -> None:
    assert total_score(84.87, 71.27) == pytest.approx(82.15, abs=1e-9)


def test_bounds_and_weights() -> None:
    assert list(scores_of(LOW).means().values()) == pytest.approx([0, 0, 0], abs=1e-12)
    assert list(scores_of(HIGH).means().values()) == pytest.approx([1, 1, 1])
    for index, name in enumerate(COLUMNS):
        one = scores_of([high if place == index else low for place, (low, high) in enumerate(zip(LOW, HIGH))])
        assert one.normalized(name) == pytest.approx(1)
        share = [0, 1 / 9] if index >= 7 else [(0.5 if name == "dynamic_degree" else 1) / 6.5, 0]
        assert list(one.means().values()) == pytest.approx([*share, 0.8 * share[0] + 0.2 * share[1]], abs=1e-12)
    beyond = scores_of([2 * high - low for low, high in zip(LOW, HIGH)])
    assert list(beyond.means().values()) == pytest.approx([2, 2, 2]), "nothing is clipped"


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    raw = random_raw()
    files = sorted(write_results(tmp_path, raw).glob(f"*{RESULTS}"))
    assert read_scores([*files, files[3]]).raw == raw
    (tmp_path / "more.json").write_text(json.dumps({"color": [raw["color"] / 2, []]}))
    with pytest.raises(UserError, match="both have color"):
        read_scores([*files, tmp_path / "more.json"])
    (tmp_path / "more.json").write_text(json.dumps({"colour": [0.5, []]}))
    with pytest.raises(UserError, match="'colour'"):
        read_scores([*files, tmp_path / "more.json"])


# Prompts, names and seeds


def test_every_prompt_once_with_all_of_its_dimensions(tmp_path: Path) -> None:
    info = read_info(write_info(tmp_path / "info.json"))
    lines = [json.loads(line) for line in manifest(info, None, 3).splitlines()]
    assert info == INFO and [line["prompt"] for line in lines] == [RED, BLUE, GREEN]
    assert lines[1]["dimensions"] == ["color", "object_class", "overall_consistency"]
    assert [len(line["videos"]) for line in lines] == [25, 5, 5]
    assert [video["file"] for video in lines[2]["videos"]] == [f"{GREEN}-{index}.mp4" for index in range(5)]
    chosen = videos_of(manifest(info, None, 3, 2), ["dynamic_degree", "color"])
    assert [video.file for video in chosen] == [f"{prompt}-{index}.mp4" for prompt in (BLUE, GREEN) for index in range(2)]


def test_a_seed_depends_on_prompt_and_index_alone() -> None:
    seed = random.randrange(2**32)

    def seeds(info: Sequence[Prompt], seed: int, per_prompt: int = 5) -> dict[str, int]:
        return {video.file: video.seed for video in videos_of(manifest(info, None, seed, per_prompt), list(DIMENSIONS))}

    whole = seeds(INFO, seed)
    assert len(set(whole.values())) == len(whole) == 35 and all(0 <= value < 2**32 for value in whole.values())
    part = seeds(INFO[:1:-1], seed, 3)
    assert part and part.items() <= whole.items()
    assert not set(seeds(INFO, seed + 1).values()) & set(whole.values())
    bits = np.unpackbits(np.array([video_seed(seed, "p", index) for index in range(2000)], dtype=np.uint32).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 0.01


def test_extended_prompts_follow_their_lines(tmp_path: Path) -> None:
    lines, list_file, originals = ["one \u2028 line", "two", "three", "two again"], tmp_path / "extended.txt", tmp_path / "originals.txt"
    list_file.write_text("\n".join(lines) + "\n\n")
    expected = {RED: "one \u2028 line", BLUE: "two", GREEN: "three"}
    assert read_extended(list_file, INFO) == expected
    videos = videos_of(manifest(INFO, expected, 0), ["color"])
    assert {video.text for video in videos} == {"two"} and videos[0].file == f"{BLUE}-0.mp4", "named by the original"
    originals.write_text(f"{GREEN} \n{RED}\nsomething else\n{BLUE}\n")
    assert read_extended(list_file, INFO, originals) == {GREEN: "one \u2028 line", RED: "two", BLUE: "two again"}
    for content, problem in {"one\ntwo\nthree\n": "3 lines", "one\n\nthree\nfour\n": "line 2 of"}.items():
        list_file.write_text(content)
        with pytest.raises(UserError, match=problem):
            read_extended(list_file, INFO)
    list_file.write_text("\n".join(lines))
    originals.write_text(f"{GREEN}\n{RED}\nx\ny\n")
    with pytest.raises(UserError, match="lacks 2 of VBench's prompts: 'a blue square"):
        read_extended(list_file, INFO, originals)


@pytest.mark.parametrize("prompt", ["a cat and/or a dog", "ä" * 125])
def test_prompts_that_cannot_be_names_are_refused(prompt: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of a file"):
        manifest([Prompt(prompt, ("color",))], None, 0)
    manifest([Prompt("x" * 230, ("color",))], None, 0)


@pytest.mark.parametrize("content", ["no JSON", "{}", '[{"prompt": "x"}]', '[{"prompt_en": "x", "dimension": ["Human_Anatomy"]}]', None])
def test_another_file_is_not_taken_for_the_prompts(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="VBench_full_info.json"):
        read_info(path)
