"""Whatever bytes and values a file or an override holds, the answer is a result or one line, never another exception."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from arcopo_fast.build import check_fits, checkpoint_path
from arcopo_fast.config.explain import every_field
from arcopo_fast.config.reading import load_config, resolved_yaml
from arcopo_fast.config.schema import Config
from arcopo_fast.data.prompts import read_prompt_set
from arcopo_fast.errors import UserError
from arcopo_fast.model.adapter_files import read_adapter
from arcopo_fast.model.checkpoints import read_config
from arcopo_fast.model.sizes import VAESizes
from arcopo_fast.storage.textfiles import read_json

ODD_TEXTS = [
    *("", "~", "null", "[]", "{}", "[[]]", "{a: 1}", "a: b", "x:", "- a", "-", "'", '"', "''", "[", "]", "{", "}", "&", "&a b", "*", "*a"),
    *("!", "!x", "!!int x", "!!python/name:os.system", "%", "%YAML 1.1", "@a", "`a", "|", "> a", "a #b", "#", "a\nb", "---", "..."),
    *("a\x00b", "\x1b", "\ud800", '"\\ud800"', '"\\0"', '"\\u2028"', "1e5", "1e400", ".inf", ".nan", "1" * 5000, "-" + "1" * 400, "0x10"),
    *("yes", "2026-01-01", "12:30:00", "<<", "{<<: 1}", "[" * 2000, "{a: " * 300 + "}" * 300, "a" * 5000, "é", "\ufeff", "  ", "\t", "? a"),
    *("{1: 2}", "{[1]: 2}", "[null]", "{a: {b: c}}", "0", "-0", "1e-400", "9" * 20, "~/x", "~nobody-of-that-name/x", "..", "/", "hf://"),
    *("hf://../..", "github://a/b", "random:", "random:x", "json", "a.b.c", "arcopo_fast.objectives.base", "__main__", "a..b", "=", "true"),
    *("{'': 1}", '{"a\\ud800": 1}', "{a: 1, a: 2}", "&a [*a]", "!!binary aGk=", "!!set {a}", "[true]", "[1, a]", "a\u2028b", "😀"),
]
ODD_VALUES: list[Any] = [None, True, False, 0, -1, 1, 2.5, 1e300, 10**30, 10**400, "", "a", "12", "\x00"]
ODD_VALUES += [[], [[]], [1, 2, 3], ["a"], [None], {}, {"a": 1}, {"a": {}}]
ODD_BYTES = [b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\t", b"\\"]
ODD_BYTES += [b"\\ud800", b"\\u0000", b"NaN", b"1e999", b"-", b"#", b"&a", b"*a", b"!", b"9" * 5000, b"[" * 3000, b"\xed\xa0\x80"]
ODD_BYTES += ["\u2028".encode(), b"a" * 200_000]


def answered(question: Callable[[], object], limit: int = 2000) -> bool:
    """Whether there is a result, and not one line of a `UserError`."""
    try:
        question()
    except UserError as error:
        assert "\n" not in str(error).strip() and len(str(error)) < limit, str(error)
        return False
    return True


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Some bytes cut out, doubled, exchanged or put in."""
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(content) + 1)
        end = start + draw.choice([0, 0, 1, 2, 9, len(content)])
        middle = draw.choice([b"", draw.choice(ODD_BYTES), draw.randbytes(3), content[start:end] * 2])
        content = content[:start] + middle + content[end:]
    return content


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


KEYS = [name for name, _ in every_field(Config)]


def test_overrides(draw: random.Random) -> None:
    for _ in range(120):
        overrides = [f"{draw.choice(KEYS)}={draw.choice(ODD_TEXTS)}" for _ in range(draw.choice([1, 1, 1, 2]))]
        answered(lambda overrides=overrides: resolved_yaml(load_config("toy", overrides)).encode())


@pytest.mark.parametrize("override", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_what_is_no_override(override: str) -> None:
    answered(lambda: load_config("toy", [override]))
    answered(lambda: load_config("toy", [f"{override}=1"]))
    answered(lambda: load_config(override))


def test_recipes(tmp_path: Path, draw: random.Random) -> None:
    good = resolved_yaml(load_config("toy")).encode()
    path = tmp_path / "recipe.yaml"
    results = set()
    for _ in range(100):
        path.write_bytes(damaged(good, draw))
        results.add(answered(lambda: resolved_yaml(load_config(str(path))).encode()))
    assert False in results


PROMPTS = {
    ".txt": "an owl\na süß fox\n\n\u201ca red\u201d circle\n",
    ".jsonl": '{"prompt": "an owl"}\n{"prompt": "a fox", "extended": "a \\u00fc fox"}\n',
    ".json": '["an owl", {"prompt": "a fox", "extended": "b"}]',
    ".csv": 'id,prompt,extended\n1,"an owl, red",\n2,"a ""fox""","b\nc"\n',
    ".tsv": "id\tprompt\n1\tan owl\n",
}


@pytest.mark.parametrize("suffix", PROMPTS)
def test_sets_of_prompts(suffix: str, tmp_path: Path, draw: random.Random) -> None:
    path, plain = tmp_path / f"prompts{suffix}", tmp_path / "plain.txt"
    plain.write_text("\n".join("abcde"))
    results = set()
    for index in range(120):
        path.write_bytes(damaged(PROMPTS[suffix].encode(), draw))
        results.add(answered(lambda: [f"{one.text}{one.extended}".encode() for one in read_prompt_set(path)]))
        if index % 4 == 0:
            answered(lambda: read_prompt_set(plain, path))
    assert results == {True, False}


def test_json_files(tmp_path: Path, draw: random.Random) -> None:
    good = (checkpoint_path("toy") / "vae" / "config.json").read_bytes()
    path = tmp_path / "config.json"
    for _ in range(150):
        path.write_bytes(damaged(good, draw))
        answered(lambda: json.dumps(read_json(path), ensure_ascii=False).encode())


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_values_in_a_generators_configuration(part: str, tmp_path: Path, draw: random.Random) -> None:
    shutil.copytree(checkpoint_path("toy"), tmp_path / "toy")
    path, config = tmp_path / "toy" / part / "config.json", load_config("toy", [f"generator.checkpoint={tmp_path / 'toy'}"])
    good = json.loads(path.read_text())
    names = [*good, "num_heads", "dim", "in_dim", "patch_size", "model_type", "qk_norm", "cross_attn_norm", "_text_len", "text_len", "eps"]
    for _ in range(120):
        path.write_text(json.dumps(good | {draw.choice(names): draw.choice(ODD_VALUES)}))
        answered(lambda: check_fits(config))
        if part == "transformer":
            answered(lambda: read_config(tmp_path / "toy"))
        else:
            answered(lambda: VAESizes.from_config(read_json(path), path))


def test_values_in_an_adapters_configuration(tmp_path: Path, draw: random.Random) -> None:
    state = {f"blocks.0.attn1.to_q.lora_{kind}.weight": torch.randn(4, 4) for kind in "AB"}
    file = tmp_path / "a.safetensors"
    names = [
        "r",
        "lora_alpha",
        "alpha",
        "rank",
        "peft_type",
        "init_lora_weights",
        "bias",
        "use_dora",
        "rank_pattern",
        "new",
        "lora_dropout",
    ]
    for index in range(80):
        config = {"r": 4, "lora_alpha": 8, "peft_type": "LORA"} | {draw.choice(names): draw.choice(ODD_VALUES)}
        header = {"lora_adapter_metadata": json.dumps(config)} if index % 3 else {}
        save_file(state, file, metadata={draw.choice(["a", "alpha", "r"]): str(draw.choice(ODD_VALUES)).replace("\x00", ""), **header})
        (tmp_path / "adapter_config.json").write_text("{}" if header else json.dumps(config))
        answered(lambda: read_adapter(file))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_weights(suffix: str, tmp_path: Path, draw: random.Random) -> None:
    state = {f"blocks.0.attn1.to_q.lora_{kind}.weight": torch.randn(4, 4) for kind in "AB"}
    file = tmp_path / f"a{suffix}"
    save_file(state, file, metadata={"alpha": "8"}) if suffix == ".safetensors" else torch.save(state, file)
    good = file.read_bytes()
    for _ in range(80):
        file.write_bytes(damaged(good, draw))
        answered(lambda: read_adapter(file))
