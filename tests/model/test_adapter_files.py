"""What an adapter's file and the files beside it say is read right, or refused in one line: alpha, ranks, variants of LoRA, values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from arcopo_fast.errors import UserError
from arcopo_fast.model.adapter_files import Adapter, read_adapter
from arcopo_fast.model.lora import write_adapter

RANK = 4
LAYERS = ("blocks.0.attn1.to_q", "blocks.0.ffn.net.2")
Config = dict[str, Any]


def matrices(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    pairs = {name: (torch.randn(RANK, 6), torch.randn(5, RANK)) for name in LAYERS}
    return {f"{name}.lora_{kind}.weight": pair[at].to(dtype) for name, pair in pairs.items() for at, kind in enumerate("AB")}


def named(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def write(
    path: Path,
    state: dict[str, Tensor] | None = None,
    *,
    header: Config | None = None,
    peft: Config | None = None,
    plain: Config | None = None,
) -> Path:
    """A safetensors file, its header, and what lies beside it: adapter_config.json and lora_config.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(matrices() if state is None else state, path, metadata={key: str(value) for key, value in (header or {}).items()})
    for name, config in (("adapter_config.json", peft), ("lora_config.json", plain)):
        if config is not None:
            path.with_name(name).write_text(json.dumps(config))
    return path


def peft_config(**changes: Any) -> Config:
    """As peft itself writes it, but for the changes."""
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=["to_q"]).to_dict()
    config |= {"target_modules": ["to_q"], "peft_type": "LORA"}
    config.pop("runtime_config", None)
    return json.loads(json.dumps(config | changes))


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        read_adapter(path)
    text = str(error.value)
    assert "\n" not in text and str(path) in text
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"


# Alpha


DIFFUSERS = {"transformer.r": RANK, "transformer.lora_alpha": 8, "transformer.target_modules": ["to_q"]}
PLACES: dict[str, Config] = {
    "peft's configuration": {"peft": peft_config()},
    "a minimal one": {"peft": {"r": RANK, "lora_alpha": 8}},
    "lora_config.json": {"plain": {"rank": RANK, "alpha": 8, "learning_rate": 1e-4, "dataset": "mine"}},
    "both, which agree": {"peft": peft_config(), "plain": {"lora_alpha": 8.0}},
    "diffusers' header": {"header": {"lora_adapter_metadata": json.dumps(DIFFUSERS)}},
    "kohya's header": {"header": {"ss_network_alpha": "8.0", "ss_network_dim": RANK}},
    "header and file": {"header": {"lora_alpha": 8}, "peft": peft_config()},
}


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "transformer.", "diffusion_model."])
@pytest.mark.parametrize("place", PLACES)
def test_alpha_is_read_wherever_it_stands(place: str, prefix: str, tmp_path: Path) -> None:
    state = matrices()
    adapter = read_adapter(write(tmp_path / "my_lora.safetensors", named(state, prefix), **PLACES[place]))
    assert (adapter.rank, adapter.alpha) == (RANK, 8)
    assert adapter.state.keys() == state.keys() and all(torch.equal(adapter.state[name], state[name]) for name in state)


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_alpha_of_every_layer(names: tuple[str, str], tmp_path: Path) -> None:
    state = matrices()
    kohya = {name.replace("lora_A", names[0]).replace("lora_B", names[1]): tensor for name, tensor in state.items()}
    alphas = {f"{name}.alpha": torch.tensor(2.0) for name in LAYERS}
    adapter = read_adapter(write(tmp_path / "a.safetensors", named(kohya | alphas, "diffusion_model.")))
    assert adapter.alpha == 2 and all(torch.equal(adapter.state[name], state[name]) for name in state)
    whole_numbers = {name: torch.tensor(2) for name in alphas}
    assert read_adapter(write(tmp_path / "b.safetensors", kohya | whole_numbers)).alpha == 2
    alphas[f"{LAYERS[1]}.alpha"] = torch.tensor(3.0)
    refused(write(tmp_path / "c.safetensors", kohya | alphas), f"{LAYERS[0]}.alpha says alpha 2", f"{LAYERS[1]}.alpha says alpha 3")


@pytest.mark.parametrize("nested", [True, False])
def test_alpha_in_a_pickle(nested: bool, tmp_path: Path) -> None:
    file = tmp_path / "lora.pt"

    def written(content: Config, beside: Config) -> Path:
        torch.save({"generator_lora": content, "step": 3, **beside} if nested else content | beside, file)
        return file

    assert read_adapter(written(matrices(), {})).alpha == RANK  # LongLive's
    assert read_adapter(written(matrices(), {"lora_alpha": 8})).alpha == 8
    assert read_adapter(written(matrices(), {"lora_config": {"rank": RANK, "alpha": 8}})).alpha == 8
    assert read_adapter(written(matrices() | {"alpha": 8}, {})).alpha == 8
    refused(written(matrices() | {"alpha": 8}, {"lora_alpha": 4}), "its entry lora_alpha says alpha 4", "its entry alpha says alpha 8")
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config()))
    assert read_adapter(written(matrices(), {})).alpha == 8


@pytest.mark.parametrize(
    "beside",
    [
        {"peft": peft_config(), "plain": {"alpha": 4}},
        {"peft": peft_config(lora_alpha=4), "header": {"ss_network_alpha": 8}},
        {"header": {"lora_adapter_metadata": json.dumps(DIFFUSERS), "ss_network_alpha": "4"}},
        {"plain": {"alpha": 4}, "state": matrices() | {f"{LAYERS[0]}.alpha": torch.tensor(8.0)}},
        {"plain": {"alpha": 4, "lora_alpha": 8}},
    ],
)
def test_two_places_that_disagree_are_both_named(beside: Config, tmp_path: Path) -> None:
    refused(write(tmp_path / "my_lora.safetensors", **beside), "says alpha 4", "says alpha 8")


def test_what_we_write_is_read_the_same_in_either_form(tmp_path: Path) -> None:
    adapter = Adapter(matrices(), RANK, 8.0)
    write_adapter(tmp_path, adapter)
    assert read_adapter(tmp_path).alpha == 8
    diffusers = tmp_path / "pytorch_lora_weights.safetensors"
    for remaining in (True, False):  # beside PEFT's form, and beside its configuration alone
        if not remaining:
            (tmp_path / "adapter_model.safetensors").unlink()
        read = read_adapter(diffusers)
        up = next(name for name in adapter.state if ".lora_B." in name)
        assert read.alpha == read.rank and torch.equal(read.state[up], adapter.state[up] * 2)
    renamed = diffusers.rename(tmp_path / "mine.safetensors")
    refused(renamed, "lora_adapter_metadata says alpha 4", "adapter_config.json says alpha 8")


def test_a_diffusers_file_beside_a_configuration_that_may_be_another_files(tmp_path: Path) -> None:
    path = write(tmp_path / "pytorch_lora_weights.safetensors", named(matrices(), "transformer."))
    assert read_adapter(path).alpha == RANK
    refused(write(path, named(matrices(), "transformer."), peft=peft_config()), "adapter_config.json says alpha 8", "alpha 4")
    assert read_adapter(write(path, named(matrices(), "transformer."), peft=peft_config(lora_alpha=RANK))).alpha == RANK


NONSENSE = [0, -1, 1e30, 1e-30, 10**400, True, "8", [8], {"to_q": 8}]


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: str(value)[:9])
def test_an_alpha_of_nonsense(value: Any, tmp_path: Path) -> None:
    refused(write(tmp_path / "a.safetensors", peft=peft_config(lora_alpha=value)), "adapter_config.json says alpha")
    if isinstance(value, str | list | dict):
        return
    refused(
        write(tmp_path / "b" / "b.safetensors", header={"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": value})}), "alpha"
    )
    if not isinstance(value, bool) and abs(value) < 1e31:
        refused(write(tmp_path / "c" / "c.safetensors", matrices() | {f"{LAYERS[0]}.alpha": torch.tensor(float(value))}), "alpha")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_an_alpha_that_is_no_number(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    path.with_name("adapter_config.json").write_text(f'{{"r": {RANK}, "lora_alpha": {text}}}')
    with pytest.raises(UserError, match=r"adapter_config.json is not valid JSON \(.*finite"):
        read_adapter(path)
    refused(write(tmp_path / "b" / "b.safetensors", header={"ss_network_alpha": text}), "ss_network_alpha says alpha")
    refused(write(tmp_path / "c" / "c.safetensors", matrices() | {"x.alpha": torch.tensor(math.nan)}), "x.alpha says alpha 'nan'")


@pytest.mark.parametrize("rank", [0, 3, -4, 4.5, True, "4", [4]], ids=str)
def test_a_rank_that_is_not_the_tensors(rank: Any, tmp_path: Path) -> None:
    refused(write(tmp_path / "a.safetensors", peft=peft_config(r=rank)), "adapter_config.json says r")
    refused(write(tmp_path / "b" / "b.safetensors", plain={"rank": rank, "alpha": 8}), "lora_config.json says r")


# Variants


BASE_CHANGES = ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "eva", "lora_ga", "mica", "something new"]


@pytest.mark.parametrize("start", BASE_CHANGES)
def test_an_adapter_over_a_changed_base(start: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "a.safetensors", peft=peft_config(init_lora_weights=start)), f"init_lora_weights {start!r}")
    header = {
        "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in peft_config(init_lora_weights=start).items()})
    }
    refused(write(tmp_path / "b" / "b.safetensors", header=header), f"init_lora_weights {start!r}")


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_an_adapter_over_the_base_as_it_is(start: bool | str, tmp_path: Path) -> None:
    assert read_adapter(write(tmp_path / "a.safetensors", peft=peft_config(init_lora_weights=start))).alpha == 8


VARIANTS: list[Config] = [
    {"use_dora": True},
    {"use_rslora": True},
    {"rank_pattern": {"to_q": 2}},
    {"alpha_pattern": {"to_q": 16}},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"modules_to_save": ["proj_out"]},
    {"fan_in_fan_out": True},
    {"lora_bias": True},
    {"layer_replication": [[0, 4]]},
    {"trainable_token_indices": [1]},
    {"use_qalora": True},
    {"alora_invocation_tokens": [3]},
    {"target_parameters": ["x"]},
    {"an_option_of_tomorrow": True},
]


@pytest.mark.parametrize("change", VARIANTS, ids=lambda change: next(iter(change)))
def test_variants_of_lora(change: Config, tmp_path: Path) -> None:
    refused(write(tmp_path / "a.safetensors", peft=peft_config(**change)), f"adapter_config.json uses {next(iter(change))}")


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "ADALORA", "VERA", "OFT", 3])
def test_adapters_of_another_kind(kind: Any, tmp_path: Path) -> None:
    refused(write(tmp_path / "a.safetensors", peft=peft_config(peft_type=kind)), str(kind))


@pytest.mark.parametrize(
    "name",
    ["lora_magnitude_vector", "dora_scale", "lora_A.bias", "lora_B.bias", "lokr_w1", "hada_w1_a", "diff", "diff_b", "lora_embedding_A",
     "lora_mid.weight", "modules_to_save.weight"],
)  # fmt: skip
def test_tensors_of_variants(name: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "a.safetensors", matrices() | {f"{LAYERS[0]}.{name}": torch.randn(RANK, 6)}), name, "no lora_A or lora_B")


# Values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    state = matrices(dtype)
    state[name := f"{LAYERS[1]}.lora_B.weight"][1, 2] = value
    refused(write(tmp_path / "a.safetensors", state), name, "not finite")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_dtypes_that_are_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    state = matrices()
    state[name := f"{LAYERS[0]}.lora_A.weight"] = torch.ones(RANK, 6).to(dtype)
    torch.save(state, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", name, str(dtype).removeprefix("torch."), "not a dtype of weights")


def test_one_matrix_under_two_names(tmp_path: Path) -> None:
    state = matrices() | {"blocks.0.self_attn.q.lora_A.weight": torch.randn(RANK, 6)}
    refused(write(tmp_path / "a.safetensors", state), "two entries", "blocks.0.attn1.to_q.lora_A.weight")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"r": 4, "r": 4}', "[]", '"a"', "\x00", '{"r": 4, "base": "\\ud800"}', "\ufeff{", ""])
def test_a_configuration_that_is_none(text: str, tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors").with_name("adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter_config\.json") as error:
        read_adapter(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)
    if text != "\x00":
        path = write(tmp_path / "b.safetensors", header={"lora_adapter_metadata": text})
        path.with_name("adapter_config.json").unlink()
        refused(path, "lora_adapter_metadata")
