"""Whatever a run's own files hold: a page, or one line that names the file. Never another exception."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import Page, evaluation, settings, write_run

from arcopo_fast.config.reading import load_config
from arcopo_fast.errors import UserError
from arcopo_fast.reports.comparison import write_comparison
from arcopo_fast.reports.results import DEVICE
from arcopo_fast.reports.run import write_report
from arcopo_fast.storage.identity import INPUTS, check_inputs, check_settings
from arcopo_fast.storage.metrics import FILE, MetricsWriter, read_metrics
from arcopo_fast.storage.video import write_mp4

DEEP = "[" * 2000 + "]" * 2000
VALUES = ["null", '"text"', "1", "-1", "0", "1e308", "-1e308", "1" * 400, "1e999", "NaN", "[]", "{}", DEEP, "true", '"\\u0000"', "[null]"]
MADE_OF, JUDGES = {"transformer": "0123"}, {"toy_vq": "89"}
MARK = "put the value here"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run, with every JSON file that one leaves."""
    folder = tmp_path_factory.mktemp("runs")
    document = evaluation()
    for side in ("before", "after"):
        for summary in document[side].values():
            summary["values"] = summary["values"][:2]
    path = write_run(folder, document=document, prompts=("a", "b"), steps=4)
    floor = {str(pivot): {"rollout": 1.5, "update": 0.25} for pivot in (1, 2)}
    (path / DEVICE).write_text(json.dumps({"device": "a", "dtype": "float32", "matmul": 2.5e12, "bandwidth": 1e11, "floor": floor}))
    check_inputs(path, settings(folder), MADE_OF, JUDGES, done=0)
    return path


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a document stands, the document itself included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(document: Any, path: tuple[Any, ...], text: str) -> str:
    """A document as JSON, with `text` in one place."""
    if not path:
        return text
    document = copy.deepcopy(document)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = MARK
    return json.dumps(document).replace(json.dumps(MARK), text)


def read_pages(run: Path) -> None:
    Page(write_report(run))
    Page(write_comparison([run], run / "comparison.html"))


def go_on(run: Path) -> None:
    config = load_config(str(run / "config.yaml"))
    check_settings(run, config)
    check_inputs(run, config, MADE_OF, JUDGES, done=4)


READERS: dict[str, Callable[[Path], None]] = {"evaluation.json": read_pages, DEVICE: read_pages, INPUTS: go_on}


def fine_or_one_line(read: Callable[[Path], None], run: Path, *names: str) -> bool:
    """Whether it was fine."""
    try:
        read(run)
    except UserError as error:
        assert any(name in str(error) for name in names) and "\n" not in str(error) and len(str(error)) < 2000
        return False
    return True


@pytest.mark.parametrize("name", READERS)
def test_every_value_of_a_file_may_be_any_other(name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    document = json.loads((run / name).read_text())
    cases = [(path, text) for path in places(document) for text in VALUES]
    random.shuffle(cases)
    refused = 0
    for path, text in cases[:60]:
        (run / name).write_text(replaced(document, path, text))
        try:
            refused += not fine_or_one_line(READERS[name], run, name, "config.yaml was changed", "was begun with other inputs")
        except BaseException as error:
            raise AssertionError(f"{name}: {'.'.join(map(str, path))} = {text[:80]}") from error
    assert (refused > 0) == (name != DEVICE), "a device is left out of the page, and the page says so"


def test_a_broken_device_is_left_out_and_said(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    assert "of floor" in Page(write_report(run)).text
    for content in ("{", '{"floor": {"1": {"rollout": "fast"}}}', '{"floor": 3}', "\xff"):
        (run / DEVICE).write_bytes(content.encode("latin-1"))
        text = Page(write_report(run)).text
        assert "Left out:" in text and f"{DEVICE}: not what a run says of its device" in text and "rollout 3.000 75 %" in text


def damaged_lines(lines: list[bytes]) -> Iterator[tuple[int, bytes]]:
    """(index of the line, what now stands in its place): flipped and removed bytes, other values, foreign text."""
    for _ in range(120):
        index = random.randrange(len(lines))
        line, at = bytearray(lines[index]), random.randrange(len(lines[index]))
        line[at] ^= 1 << random.randrange(8)
        yield index, bytes(line)
        yield index, lines[index][:at]
        yield index, lines[index][at:]
    record = json.loads(lines[1])
    for path in places(record):
        for text in VALUES:
            yield 1, replaced(record, path, text).encode()
    for content in (b"", b"\x00" * 40, b"\xff\xfe", b"[1, 2]", b'{"reward": 1}', lines[0] + lines[1]):
        yield 1, content


def test_a_damaged_line_of_metrics_is_named_or_harmless(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    lines = (run / FILE).read_bytes().splitlines()
    cases = list(damaged_lines(lines))
    for index, content in random.sample(cases, 50):
        (run / FILE).write_bytes(b"\n".join([*lines[:index], content, *lines[index + 1 :], b""]))
        try:
            fine_or_one_line(read_pages, run, FILE)
        except BaseException as error:
            raise AssertionError(content[:300]) from error


def test_a_run_that_goes_on_keeps_each_step_once(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    lines = (run / FILE).read_bytes().splitlines()
    assert len(lines) == 4
    for index, content in random.sample(list(damaged_lines(lines)), 150):
        (run / FILE).write_bytes(b"\n".join([*lines[:index], content, *lines[index + 1 :], b""]))
        capsys.readouterr()
        MetricsWriter(run, after=4, tensorboard=False).close()
        kept = [record["step"] for record in read_metrics(run)]
        assert kept == sorted(set(kept)) and {1, 2, 3, 4} - {index + 1} <= set(kept) <= {1, 2, 3, 4}
        said = capsys.readouterr().err
        if len(kept) < 4:
            assert f"{FILE}: iterations {index + 1} are missing" in said
        elif b"\n" not in content:
            rest = [line for place, line in enumerate((run / FILE).read_bytes().splitlines()) if place != index]
            assert rest == lines[:index] + lines[index + 1 :]


@pytest.mark.parametrize(
    ("change", "after", "kept", "said"),
    [
        (lambda lines: lines, 4, [1, 2, 3, 4], ""),
        (lambda lines: lines, 2, [1, 2], ""),  # an earlier checkpoint
        (lambda lines: lines, 0, [], ""),
        (lambda lines: lines[:2] + lines[1:], 4, [1, 2, 3, 4], ""),
        (lambda lines: lines[::-1], 4, [1, 2, 3, 4], ""),
        (lambda lines: [lines[0], lines[3]], 4, [1, 4], "iterations 2-3 are missing;"),
        (lambda lines: [b"?", *lines], 4, [1, 2, 3, 4], "lines 1 were damaged, and are removed"),
        (lambda lines: [b"?", lines[1][:9], lines[2], b"!"], 4, [3], "iterations 1-2, 4 are missing, for lines 1-2, 4 were damaged"),
        (lambda lines: [], 4, [], "iterations 1-4 are missing"),
    ],
)
def test_what_is_missing_is_said(
    change: Callable[[list[bytes]], list[bytes]],
    after: int,
    kept: list[int],
    said: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = change((run / FILE).read_bytes().splitlines())
    (tmp_path / FILE).write_bytes(b"".join(line + b"\n" for line in lines) + b'{"step": 5, "rew')
    MetricsWriter(tmp_path, after=after, tensorboard=False).close()
    assert [record["step"] for record in read_metrics(tmp_path)] == kept
    err = capsys.readouterr().err
    assert said in err and (err.count("\n") == 1) == bool(said)


def test_a_configuration_that_was_changed_is_fine_or_one_line(run: Path, tmp_path: Path) -> None:
    name = "config.yaml"
    run = Path(shutil.copytree(run, tmp_path / "run"))
    lines = (run / name).read_text().splitlines()
    for _ in range(25):
        index = random.randrange(len(lines))
        key, colon, _ = lines[index].partition(":")
        value = random.choice([*VALUES, ".inf", ".nan", "&a [*a]", "!!python/name:os.system", "''", "2001-01-01", "'"])
        (run / name).write_text("\n".join([*lines[:index], f"{key}{colon} {value}", *lines[index + 1 :]]))
        fine_or_one_line(read_pages, run, "config.yaml")
        fine_or_one_line(go_on, run, "config.yaml")


OUTSIDE = [
    "../secret.mp4",
    "{outside}/secret.mp4",
    "samples/link.mp4",
    "link/secret.mp4",
    "config.yaml",
    "samples/text.mp4",
    "../" * 9 + "etc/passwd",
]


@pytest.mark.parametrize(
    "name",
    [*OUTSIDE, "samples/text.mp4", "../" * 9 + "etc/passwd", "a\0b.mp4", "x" * 5000 + ".mp4", "samples", "samples.mp4", "loop.mp4", ""],
)
def test_a_page_embeds_only_videos_of_the_run(name: str, run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "runs" / "run"))
    outside = tmp_path / "runs"
    write_mp4(outside / "secret.mp4", torch.rand(3, 3, 32, 32), 8)
    (run / "samples" / "link.mp4").symlink_to(outside / "secret.mp4")
    (run / "samples" / "text.mp4").symlink_to(run / "config.yaml")
    (run / "link").symlink_to(outside)
    (run / "loop.mp4").symlink_to(run / "loop.mp4")
    (run / "samples.mp4").mkdir()
    document = json.loads((run / "evaluation.json").read_text())
    document["videos"][0]["before"] = name.format(outside=outside)
    (run / "evaluation.json").write_text(json.dumps(document))
    for page in (Page(write_report(run)), Page(write_comparison([run], tmp_path / "page.html"))):
        assert "names what is no mp4 file inside the run's directory" in page.text
        assert len(page.sources) == 3, "the other three videos are there"
