"""Sets of prompts: every published form, pairs with extended prompts, and what is said of lines that are not what they should be."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest

from arcopo_fast.data.prompts import Prompt, Turn, digest, read_prompt_set, read_prompts, split_prompts
from arcopo_fast.errors import UserError


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


def test_prompts_that_change_within_a_video(tmp_path: Path, prompts: list[Prompt]) -> None:
    path = tmp_path / "prompts.jsonl"
    frames = sorted(random.sample(range(1, 99), len(prompts) - 1))
    texts, longer = [prompt.text for prompt in prompts], [prompt.text + " at dusk" for prompt in prompts]
    records = [{"prompts": texts, "frames": [0, *frames]}, {"prompts": texts, "frames": [0, *frames], "extended": longer}, {"prompt": "a"}]
    path.write_text("\n".join(map(json.dumps, records)))
    plain, extended, single = read_prompt_set(path, turns=True)
    assert plain == Prompt(texts[0], None, tuple(Turn(frame, Prompt(text)) for frame, text in zip(frames, texts[1:])))
    assert [(frame, one.text, one.for_generator) for frame, one in extended.parts] == list(zip([0, *frames], texts, longer))
    assert single.parts == ((0, Prompt("a")),) and len({digest([prompt]) for prompt in (plain, extended, single, Prompt(texts[0]))}) == 4
    for refused in (read_prompt_set, read_prompts):
        with pytest.raises(UserError, match="followed by other prompts"):
            refused(path)
    # two videos are the same to a split only if all their prompts are
    other = plain._replace(turns=plain.turns[1:])
    training, (judged,) = split_prompts([plain, other, plain], 1, np.random.default_rng(0))
    assert judged not in training and {*training, judged} == {plain, other}


def test_a_turn_counts_from_the_chunk_that_begins_at_its_frame_or_after_it() -> None:
    video = Prompt("a", None, (Turn(5, Prompt("b")), Turn(9, Prompt("c"))))
    assert video.at_chunks(range(0, 12, 3)) == {0: Prompt("a"), 6: Prompt("b"), 9: Prompt("c")}
    for frames, part in ((9, "last chunk begins at 6"), (0, "last chunk begins at 0")):
        with pytest.raises(UserError, match=part):
            video.at_chunks(range(0, max(1, frames), 3))
    with pytest.raises(UserError, match="'c' counts from latent frame 9 on, with the chunk that begins at 10, and so does another"):
        Prompt("a", None, (Turn(7, Prompt("b")), Turn(9, Prompt("c")))).at_chunks(range(0, 20, 5))


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"prompts": ["a", "b"]}, "needs"),
        ({"prompts": ["a"], "frames": [0], "prompt": "a"}, "needs"),
        ({"prompts": [], "frames": []}, "lists of one length"),
        ({"prompts": "ab", "frames": [0, 2]}, "lists of one length"),
        ({"prompts": ["a", "b"], "frames": [0]}, "lists of one length"),
        ({"prompts": ["a", "b"], "frames": [0, 3], "extended": []}, "lists of one length"),
        ({"prompts": ["a", "b"], "frames": [1, 3]}, "begins with 0 and rises"),
        ({"prompts": ["a", "b"], "frames": [0, 0]}, "begins with 0 and rises"),
        ({"prompts": ["a", "b"], "frames": [0, 2.5]}, "begins with 0 and rises"),
        ({"prompts": ["a", 3], "frames": [0, 2]}, "no text"),
        ({"prompts": ["a", " "], "frames": [0, 2]}, "empty"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_records_of_changing_prompts_that_are_none(record: dict[str, object], part: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"prompts{suffix}"
    path.write_text(json.dumps(record if suffix == ".jsonl" else [record]))
    with pytest.raises(UserError, match=part):
        read_prompt_set(path, turns=True)


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


# The form of a file


def refused(path: Path, *parts: str, extended: Path | None = None) -> None:
    with pytest.raises(UserError) as error:
        read_prompt_set(path, extended)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    for part in (str(path), *parts):
        assert part in text, f"{part!r} is not in: {text}"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".json", ".Json", ".csv", ".CSV", ".tsv", ".TSV", ".txt", ".TXT", "", ".2024"])
def test_a_forms_name_in_any_case(suffix: str, mark: str, tmp_path: Path, prompts: list[Prompt]) -> None:
    path, kind = tmp_path / f"prompts{suffix}", suffix.lower()
    records = [{"prompt": one.text} | ({"extended": one.extended} if one.extended else {}) for one in prompts]
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(mark)
        if kind in (".csv", ".tsv"):
            writer = csv.writer(file, delimiter="," if kind == ".csv" else "\t")
            writer.writerows([["id", "extended", "prompt"], *([3, one.extended, one.text] for one in prompts)])
        elif kind == ".json":
            json.dump(records, file, indent=1)
        else:
            file.write("\n".join(map(json.dumps, records) if kind == ".jsonl" else (one.text for one in prompts)))
    plain = kind not in (".csv", ".tsv", ".json", ".jsonl")
    assert read_prompt_set(path) == ([Prompt(one.text) for one in prompts] if plain else prompts)


def test_a_json_list_of_texts(tmp_path: Path, prompts: list[Prompt]) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([one.text for one in prompts]))
    assert read_prompts(path) == [one.text for one in prompts]
    for content, part in (
        ('{"prompts": ["a"]}', "holds a JSON dict; expected a list"),
        ('["a", 3]', "entry 2"),
        ('["a", {"text": "b"}]', "entry 2"),
        ('["a", " "]', "entry 2"),
        ('["a", "\\ud800"]', "U+D800"),
        ('["a", "\\u0000"]', "U+0000"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"prompt": "a", "prompt": "b"}]', "stands twice"),
        ("[", "not valid JSON"),
        ("[]", "no prompt"),
    ):
        path.write_text(content)
        refused(path, part)


@pytest.mark.parametrize("suffix", [".yaml", ".YML", ".xml", ".parquet", ".xlsx", ".gz", ".toml", ".pkl"])
def test_forms_that_are_not_read(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").write_text("- an owl\n- a fox\n")
    refused(tmp_path / f"a{suffix}", suffix.lower(), ".jsonl")
    (tmp_path / "a.txt").write_text("an owl\na fox\n")
    with pytest.raises(UserError, match=suffix.lower()):
        read_prompt_set(tmp_path / "a.txt", tmp_path / f"a{suffix}")


NOT_TEXT = {
    "records": '{"prompt": "an owl"}\n\n{"prompt": "a fox"}\n',
    "one record": '{"prompt": "an owl"}',
    "a list": '[\n "an owl",\n "a fox"\n]\n',
    "an object": '{\n "prompts": ["an owl"]\n}\n',
    "lists": '["an owl", 1]\n["a fox", 2]\n',
    "a header": "id,prompt,seed\n1,an owl,3\n",
    "a quoted header": '"prompt";"seed"\nan owl;3\n',
    "tabs": "uuid\ttext\n1\tan owl\n",
    "a single column": "prompt\nan owl\na fox\n",
}


@pytest.mark.parametrize("kind", NOT_TEXT)
@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_another_form_under_a_texts_name(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("\n" * 2 + NOT_TEXT[kind])
    refused(path, "name it .json" if "{" in NOT_TEXT[kind] or "[" in NOT_TEXT[kind] else "a table's header")
    (tmp_path / "plain.txt").write_text("an owl\n")
    with pytest.raises(UserError, match=f"{path}"):
        read_prompt_set(tmp_path / "plain.txt", path)


@pytest.mark.parametrize(
    "line", ["[a fox] jumps", "{fox}", "a prompt, a fox", "fox,owl", "owl", "id card on a table", '"prompt", he said', "text"]
)
def test_prompts_that_only_look_like_another_form(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f'{line}\n{{"prompt": "not every line is one"}}\n')
    assert read_prompts(path)[0] == line


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('id,"prompt\n1,an owl\n', ["not CSV"]),
        ("prompt,prompt\na,b\n", ["stands twice"]),
        ("prompt,extended,extended\na,b,c\n", ["'extended' stands twice"]),
        ("prompt,seed\na fox, an owl,3\n", [":2: 3 cells under a header of 2", "in quotes"]),
        ("seed,prompt\n1,a\n3\n", [":3: 1 cells"]),
        ("prompt\n" + "a" * 200_000 + "\n", [":2: not CSV", "field"]),
        ("a" * 200_000 + ",prompt\na,b\n", ["not CSV", "field"]),
        ("prompt\na\x00b\n", [":2: the control character U+0000"]),
        ("", ["no column 'prompt', only nothing"]),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables_that_are_none(content: str, parts: list[str], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text(content.replace(",", "\t") if suffix == ".tsv" else content)
    refused(path, *parts)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"an owl\nthe \x00 fox\n", ":2: the control character U+0000"),
        (b"an owl\n\n\x1b[31mred\n", ":3: the control character U+001B"),
        ("an owl\n".encode("utf-16"), "UTF-16"),
        ("an owl\n".encode("utf-16-be"), "control character U+0000"),
        ("an owl\n".encode("utf-32"), "UTF-32"),
        ("an owl\na süß fox".encode("latin-1"), ":2: not UTF-8 text (the byte 0xfc)"),
    ],
    ids=range(6),
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".json", ".tsv"])
def test_text_that_is_none(content: bytes, part: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    refused(path, part)
    if suffix == ".txt":
        plain = tmp_path / "plain.txt"
        plain.write_text("an owl")
        with pytest.raises(UserError, match=str(path)):
            read_prompt_set(plain, path)


@pytest.mark.parametrize("text", ["\\ud800", "a\\udfffb", "\\u0000", "\\u001b[1m"])
@pytest.mark.parametrize("key", ["prompt", "extended"])
def test_json_escapes_of_what_is_no_text(text: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    record = '{"prompt": "a", "extended": "b"}'.replace('"a"' if key == "prompt" else '"b"', f'"{text}"')
    path.write_text(f'{{"prompt": "a"}}\n{record}\n')
    refused(path, "a.jsonl:2: expected", "U+")


# The split


@pytest.mark.parametrize("seed", range(5))
def test_no_prompt_is_on_both_sides(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [sentence() for _ in range(6)]
    other = [Prompt(f"  {text.replace(' ', '  ')}", sentence()) for text in texts[:3]]  # the same, with another extended form
    renamed = Prompt(sentence(), texts[4])  # the generator reads the same
    prompts = [Prompt(text, f"{text}, longer" if index % 2 else None) for index, text in enumerate(texts)] * 2 + other + [renamed]
    random.shuffle(prompts)
    training, evaluation = split_prompts(prompts, 3, np.random.default_rng(seed))
    plain = [" ".join(one.text.split()) for one in evaluation]
    assert len(set(plain)) == len(evaluation) == 3
    seen = {" ".join(form.split()) for one in training for form in (one.text, one.for_generator)}
    assert training and not seen & {*plain, *(" ".join(one.for_generator.split()) for one in evaluation)}
    left_out = len(prompts) - len(training) - 3
    assert left_out >= 2 and f"{left_out} of {len(prompts)} prompts repeat one" in capsys.readouterr().err


def test_a_split_without_duplicates_is_of_all(prompts: list[Prompt], capsys: pytest.CaptureFixture[str]) -> None:
    split = split_prompts(prompts, 2, np.random.default_rng(3))
    assert sorted(map(str, split.training + split.evaluation)) == sorted(map(str, prompts)) and len(split.evaluation) == 2
    assert [one for one in prompts if one in split.training] == split.training
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "evaluation", "part"),
    [
        ([Prompt("a"), Prompt("b")], 2, "2 prompts in all"),
        ([Prompt("a"), Prompt("b"), Prompt("a ", "c"), Prompt("b")], 2, "2 different prompts in all"),
        ([Prompt("a", "x"), Prompt("b", "x")], 1, "every other prompt equals one of these"),
    ],
)
def test_nothing_left_to_train_on(prompts: list[Prompt], evaluation: int, part: str) -> None:
    with pytest.raises(UserError, match=part):
        split_prompts(prompts, evaluation, np.random.default_rng(0))
