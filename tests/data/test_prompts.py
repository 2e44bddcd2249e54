"""Sets of prompts: every published form, pairs with extended prompts, and what is said of lines that are not what they should be."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch

from arcopo_fast.data.prompts import Prompt, read_prompt_set, read_prompts
from arcopo_fast.errors import UserError


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(torch.initial_seed())


def sentence() -> str:
    """Of characters that a form could take for its own."""
    words = ["owl", 'a "quoted" word', "semi; colon", "comma, here", "süß", "line\u2028separator", "{brace}", "tab\tstop", "5 > 3"]
    return f"{random.choice(words)} {' '.join(random.sample(words, 3))} {random.random()}"


@pytest.fixture
def prompts(seeded: None) -> list[Prompt]:
    return [Prompt(sentence(), sentence() if index % 2 else None) for index in range(random.randint(3, 9))]


def test_text(tmp_path: Path, prompts: list[Prompt]) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff".encode() + "\r\n".join(f"  {one.text} \r\n" for one in prompts).encode() + b"\n\n")
    assert read_prompt_set(path) == [Prompt(one.text) for one in prompts]
    assert read_prompts(path) == read_prompts(str(path)) == [one.text for one in prompts]
    assert all(one.for_generator == one.text for one in read_prompt_set(path))


def test_json_lines(tmp_path: Path, prompts: list[Prompt]) -> None:
    path = tmp_path / "prompts.jsonl"
    records = [{"prompt": f" {one.text}\n"} | ({"extended": one.extended} if one.extended else {}) for one in prompts]
    path.write_text("".join(json.dumps(record, ensure_ascii=random.random() < 0.5) + "\n" for record in records), encoding="utf-8")
    assert read_prompt_set(path) == prompts
    assert [one.for_generator for one in read_prompt_set(path)] == [one.extended or one.text for one in prompts]
    with pytest.raises(UserError, match="extended prompts"):
        read_prompts(path)


def test_csv_with_a_column_prompt_as_vidprom_and_moviegen_have_it(tmp_path: Path, prompts: list[Prompt]) -> None:
    path = tmp_path / "VidProM_unique.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["uuid", "prompt", "time", "toxicity"])
        writer.writerows([random.random(), f"{one.text}\nsecond line", "Sun", random.random()] for one in prompts)
        writer.writerow([1, "", "Sun", 0.1])
    assert [one.text for one in read_prompt_set(path)] == [f"{one.text}\nsecond line" for one in prompts]
    path.write_text("uuid,text\n1,a\n")
    with pytest.raises(UserError, match="no column 'prompt', only uuid, text"):
        read_prompt_set(path)
    path.write_text('prompt,time\n"a,b\nc\n')
    with pytest.raises(UserError, match="not CSV"):
        read_prompt_set(path)


def test_extended_prompts_line_by_line(tmp_path: Path, prompts: list[Prompt]) -> None:
    path, longer = tmp_path / "prompts.txt", tmp_path / "prompts_extended.txt"
    path.write_text("\n".join([prompts[0].text, "", *(one.text for one in prompts[1:])]) + "\n")
    extended = [sentence() for _ in prompts]
    longer.write_text("\n".join([extended[0], " ", *extended[1:]]))
    assert read_prompt_set(path, longer) == [Prompt(one.text, other) for one, other in zip(prompts, extended, strict=True)]

    longer.write_text("\n".join(extended))  # one line short: everything after the blank one would be of the prompt before
    with pytest.raises(UserError, match=rf"{len(prompts) + 1} lines and .* {len(prompts)};"):
        read_prompt_set(path, longer)
    longer.write_text("\n".join([*extended, sentence()]))
    with pytest.raises(UserError, match="line 2 is blank in .*prompts.txt only"):
        read_prompt_set(path, longer)
    other = tmp_path / "prompts.jsonl"
    other.write_text(json.dumps({"prompt": "a"}))
    with pytest.raises(UserError, match="line by line"):
        read_prompt_set(other, longer)


def test_by_repository(tmp_path: Path, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCOPO_MODELS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "someone" / "prompts" / "sets" / "all.txt"
    file.parent.mkdir(parents=True)
    file.write_text("\n".join(one.text for one in prompts))
    assert read_prompts("hf://someone/prompts/sets/all.txt") == [one.text for one in prompts]
    with pytest.raises(UserError, match="is a directory; name the file"):
        read_prompt_set("hf://someone/prompts/sets")
    with pytest.raises(UserError, match="sets/other.txt"):
        read_prompt_set("hf://someone/prompts/sets/other.txt")


@pytest.mark.parametrize(
    "line",
    ["a plain sentence", '"a string"', '["a"]', "{}", '{"prompt": 3}', '{"prompt": " "}', '{"prompt": "a", "caption": "b"}', "",
     '{"prompt": "a", "extended": null}', '{"prompt": "a", "extended": ""}', '{"text": "a"}', '{"prompt": "a"'],
)  # fmt: skip
def test_a_json_line_is_what_it_should_be(line: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + '\n{"prompt": "fine"}\n')
    with pytest.raises(UserError, match="prompts.jsonl:2: expected"):
        read_prompt_set(path)


@pytest.mark.parametrize(("name", "content"), [("a.txt", b"\n \n"), ("a.txt", b""), ("a.txt", b"\xff\xfe"), ("a.csv", b"prompt\n\n")])
def test_nothing_to_read(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}"):
        read_prompt_set(tmp_path / name)
    with pytest.raises(UserError, match="missing"):
        read_prompt_set(tmp_path / "missing.txt")
