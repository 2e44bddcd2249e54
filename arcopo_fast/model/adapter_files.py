"""Reading LoRA adapters from files, under diffusers names: PEFT's form, diffusers', kohya's with dotted names, and LongLive's.

An adapter's effect is B A times alpha / rank, and files say alpha in many places, or nowhere. All places that concern a file are looked at:
they must agree, and what would make the adapter anything but a plain LoRA over the base as published is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from arcopo_fast.errors import UserError, listed
from arcopo_fast.model.checkpoints import check_finite, diffusers_name, read_container, rename, strip_wrappers
from arcopo_fast.storage.textfiles import parse_json, read_json

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
DIFFUSERS_METADATA = "lora_adapter_metadata"  # diffusers' header entry: the adapter's configuration as JSON
DIFFUSERS_PREFIX = "transformer."
RUNS_ADAPTER = "adapter"  # the adapter's directory in that of a run or a sweep
ADAPTER_NAME = "default"  # peft's, which stands in the names of a module's parameters and of careless files'

CONFIGS = (PEFT_CONFIG, "lora_config.json")
_ALPHA_KEYS = ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha")
_RANK_KEYS = ("r", "rank", "lora_rank", "network_dim", "ss_network_dim")
_LOOSE = (*_ALPHA_KEYS, *_RANK_KEYS, "adapter_config", "lora_config", "peft_config")
_HUGE = 1e300
_LARGEST_SCALE = 1e6  # largest alpha / rank, its inverse the smallest: no training uses more than hundreds

# Keys of peft's configuration that do not matter for reading the saved matrices.
_BOOKKEEPING = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
    "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core", "runtime_config", "qalora_group_size",
    "init_lora_weights", *_ALPHA_KEYS, *_RANK_KEYS,
}  # fmt: skip
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")  # B A = 0 at first: over the base as it is
# Keys of the same meaning in any lora_config.json, whatever program wrote it.
_VARIANTS = {"use_dora", "dora", "use_rslora", "rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias"}


class Adapter(NamedTuple):
    """An adapter as read from a file.

    Attributes:
        state: `<module>.lora_A.weight` [r, in] and `<module>.lora_B.weight` [out, r] by name, in the dtypes of the file.
        rank: r, the same for all layers.
        alpha: the adapter adds B A times alpha / rank.
    """

    state: dict[str, Tensor]
    rank: int
    alpha: float

    @property
    def modules(self) -> list[str]:
        """Names of the adapted layers, sorted."""
        return sorted({name.rpartition(".lora_")[0] for name in self.state})


def read_adapter(path: str | Path) -> Adapter:
    """Return an adapter for a Wan transformer, under diffusers names.

    Alpha is what the file's header, its tensors or a configuration beside it says; where none does, alpha is the rank.

    Args:
        path: a run's directory, one that holds PEFT's or else diffusers' form, a `.safetensors` file of any name, or LongLive's `lora.pt`
            (official names, possibly under `generator_lora`).

    Raises:
        UserError: missing, damaged, not finite, not a plain LoRA of one rank and alpha, or alpha stands in two places that disagree.
    """
    file = adapter_file(Path(path))
    container = read_container(file)
    configs = _loose(container)
    if isinstance(container.get("generator_lora"), Mapping):
        container = container["generator_lora"]
        configs += _loose(container)
    configs += _configs(file)
    alphas = {f"the tensor {name}": container[name] for name in container if str(name).endswith(".alpha")}
    tensors = {name: value for name, value in container.items() if not str(name).endswith(".alpha") and name not in _LOOSE}
    state = _matrices(strip_wrappers(tensors, file), file)
    rank = _rank(state, file)
    check_finite(state, file)

    places: dict[str, Any] = {}
    for place, config in configs:
        _check_plain(config, place, file)
        for key in _RANK_KEYS:
            if config.get(key) is not None and _number(config[key], f"{file}: {place} says {key}") != rank:
                raise UserError(f"{file}: {place} says rank {config[key]}, its tensors have rank {rank}; they do not belong together")
        alphas_here = {key: config[key] for key in _ALPHA_KEYS if config.get(key) is not None}
        places |= {place if len(alphas_here) == 1 else f"{place} as {key}": value for key, value in alphas_here.items()}
    if file.name == DIFFUSERS_WEIGHTS and places and not alphas and not _says_alpha(file):
        places["diffusers, where such a file itself says nothing,"] = rank
    return Adapter(state, rank, _alpha(places | alphas, rank, file))


def adapter_file(path: Path) -> Path:
    """Return the file with an adapter's weights: `path`, or the one that a directory or a run's directory holds, in PEFT's form first."""
    if not path.is_dir():
        return path
    folder = path / RUNS_ADAPTER if (path / RUNS_ADAPTER).is_dir() else path
    file = next((folder / name for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS) if (folder / name).exists()), None)
    if file is None:
        raise UserError(f"{path} has neither {PEFT_WEIGHTS} nor {DIFFUSERS_WEIGHTS}; give an adapter directory, or the file itself")
    return file


def _loose(container: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return what a pickle says of an adapter beside its matrices: (place, entries) pairs."""
    found = [(f"its entry {name}", container[name]) for name in _LOOSE if name in container]
    return [(place, value if isinstance(value, Mapping) else {place.rpartition(" ")[2]: value}) for place, value in found]


def _configs(file: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Return what the header and the files beside it say of an adapter: (place, entries) pairs."""
    found = _header(file)
    if file.name == PEFT_WEIGHTS and not file.with_name(PEFT_CONFIG).exists():
        raise UserError(f"{file.with_name(PEFT_CONFIG)} does not exist; copy it from where {PEFT_WEIGHTS} came from: it says alpha")
    # A file in diffusers' form is self-contained if it lies beside PEFT's, or says its own alpha: the configuration there is PEFT's.
    self_contained = file.name == DIFFUSERS_WEIGHTS and (_says_alpha(file) or file.with_name(PEFT_WEIGHTS).exists())
    return found + [(name, read_json(file.with_name(name))) for name in CONFIGS if not self_contained and file.with_name(name).is_file()]


def _says_alpha(file: Path) -> bool:
    return any(key in config for _, config in _header(file) for key in _ALPHA_KEYS)


def _header(file: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the entries of a safetensors header that concern an adapter: (place, entries) pairs."""
    if file.suffix != ".safetensors":
        return []
    with safe_open(file, "pt") as opened:
        header = opened.metadata() or {}
    found: list[tuple[str, Mapping[str, Any]]] = []
    if DIFFUSERS_METADATA in header:
        place = f"its header entry {DIFFUSERS_METADATA}"
        try:
            entries = parse_json(header[DIFFUSERS_METADATA]).items()
        except (ValueError, AttributeError) as error:
            raise UserError(f"{file}: {place} is no JSON object ({error}); save the adapter again") from None
        found.append((place, {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in entries}))
    return found + [(f"its header entry {key}", {key: _from_text(header[key])}) for key in _ALPHA_KEYS + _RANK_KEYS if key in header]


def _from_text(value: str) -> Any:
    """Return a number out of a safetensors header, which holds texts only; a text that is no number is returned as it is."""
    try:
        return float(value)
    except ValueError:
        return value


def _matrices(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the pairs A and B under diffusers names; refuse anything else."""

    def short(name: str) -> str:
        name = name.removeprefix("base_model.").removeprefix(DIFFUSERS_PREFIX)  # "model" is gone with the wrappers
        name = name.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")
        return diffusers_name(name).replace(f".{ADAPTER_NAME}.weight", ".weight")

    state = rename(tensors, short, file)
    if unknown := [name for name, tensor in state.items() if not re.search(r"\.lora_[AB]\.weight$", name) or tensor.dim() != 2]:
        raise UserError(
            f"{file}: {unknown[0]!r} {list(state[unknown[0]].shape)} is no lora_A or lora_B matrix; give a plain LoRA of linear layers"
        )
    modules = {name.rpartition(".lora_")[0] for name in state}
    if not modules:
        raise UserError(f"{file} holds no adapter tensors")
    if halves := [name for name in modules if not {f"{name}.lora_A.weight", f"{name}.lora_B.weight"} <= state.keys()]:
        raise UserError(f"{file}: {len(halves)} layers have only one of lora_A and lora_B ({listed(halves)}); copy it again")
    return state


def _rank(state: Mapping[str, Tensor], file: Path) -> int:
    ranks = {tensor.shape[0 if ".lora_A." in name else 1] for name, tensor in state.items()}
    if len(ranks) > 1:
        raise UserError(f"{file}: its layers have different ranks ({', '.join(map(str, sorted(ranks)))}); one rank for all is supported")
    if not (rank := ranks.pop()):
        raise UserError(f"{file}: its matrices have rank 0: they hold nothing")
    return rank


def _check_plain(config: Mapping[str, Any], place: str, file: Path) -> None:
    """Refuse a configuration under which B A is not simply added to the base's weights."""
    kind = config.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        raise UserError(f"{file}: {place} says that it is a {kind}, not a LORA; give a plain LoRA")
    start = config.get("init_lora_weights")
    if not any(start is value or start == value for value in _PLAIN_STARTS):
        advice = "such training changes the base too; convert it to a plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        raise UserError(f"{file}: {place} says init_lora_weights {start!r}; {advice}")
    neutral = _neutral() if place == PEFT_CONFIG or DIFFUSERS_METADATA in place else None
    variants = [
        key
        for key, value in config.items()
        if value and key not in _BOOKKEEPING and (key in _VARIANTS if neutral is None else value != neutral.get(key))
    ]
    if config.get("bias", "none") not in ("none", None, False) and "bias" not in variants:
        variants.append("bias")
    if variants:
        raise UserError(f"{file}: {place} uses {', '.join(variants)}; give a plain LoRA of one rank and alpha, scaled by alpha / rank")


@cache
def _neutral() -> dict[str, Any]:
    """Return peft's defaults, under which an adapter is a plain LoRA."""
    from peft import LoraConfig

    return {entry.name: entry.default for entry in dataclasses.fields(LoraConfig)}


def _alpha(places: Mapping[str, Any], rank: int, file: Path) -> float:
    """Return the alpha on which all places agree; the rank, if there is no place."""
    values = {place: _number(value, f"{file}: {place} says alpha") for place, value in places.items()}
    for place, value in values.items():
        if not 1 / _LARGEST_SCALE <= value / rank <= _LARGEST_SCALE:
            raise UserError(f"{file}: {place} says alpha {value:g}, which makes no sense for rank {rank}; expected about the rank")
    if not values:
        return float(rank)
    (first_place, alpha), *more_places = values.items()
    for place, value in more_places:
        if value != alpha:
            raise UserError(
                f"{file}: {first_place} says alpha {alpha:g}, but {place} says alpha {value:g}; make them agree, or remove the wrong one"
            )
    return alpha


def _number(value: Any, statement: str) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_HUGE < value < _HUGE:
        raise UserError(f"{statement} {str(value)[:60]!r}; expected a number")
    return float(value)
