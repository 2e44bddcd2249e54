"""Adapters to evaluate: read from runs, directories and files, named, and put on one generator in turn."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.scores import BASE
from arcopo_fast.model.adapter_files import PEFT_CONFIG, PEFT_WEIGHTS, Adapter, adapter_file, read_adapter
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.model.lora import add_lora, check_layers, merge_adapters
from arcopo_fast.storage.hub import find
from arcopo_fast.storage.identity import file_digest
from arcopo_fast.storage.textfiles import read_json


class AdapterFile(NamedTuple):
    """An adapter and the file of its weights. base_model: what its configuration names, if it names one."""

    file: Path
    sha256: str
    adapter: Adapter
    base_model: str | None

    def summary(self) -> dict[str, Any]:
        """Return what a document says of the adapter."""
        return {"file": str(self.file), "sha256": self.sha256, "rank": self.adapter.rank, "alpha": self.adapter.alpha}


class AdapterOption(NamedTuple):
    """A value of --adapter. name: None for that of its file or directory."""

    name: str | None
    path: str
    scales: tuple[float, ...]


class Adapted(NamedTuple):
    """The generator with an adapter, W + scale dW; source None: without. name: in the table and the files."""

    name: str
    source: AdapterFile | None = None
    scale: float = 0.0

    @property
    def adapter(self) -> Adapter | None:
        """Adapter to put on the generator; None for the generator alone."""
        return self.source.adapter if self.source else None

    @property
    def identity(self) -> dict[str, Any] | None:
        """Return what its scores depend on; the name of the file is no part of it."""
        if self.source is None:
            return None
        return {"sha256": self.source.sha256, "alpha": self.source.adapter.alpha, "scale": self.scale}


def read_adapter_file(path: Path) -> AdapterFile:
    """Return the adapter of a run directory, an adapter directory or a file.

    Raises:
        UserError: see `read_adapter`.
    """
    file = adapter_file(path)
    adapter = read_adapter(file)
    config = read_json(file.with_name(PEFT_CONFIG)) if file.name == PEFT_WEIGHTS else {}
    base_model = config.get("base_model_name_or_path")
    return AdapterFile(file, file_digest(file), adapter, base_model if isinstance(base_model, str) else None)


class Pair(NamedTuple):
    """The two adapters of a merge: W + dW_semi + s dW_on."""

    semi: AdapterFile
    on: AdapterFile

    @classmethod
    def read(cls, semi: Path, on: Path) -> Pair:
        """Read both; stderr says so if they name different base models. Paths differ between machines, so that is not refused."""
        pair = cls(read_adapter_file(semi), read_adapter_file(on))
        if len(bases := pair.base_models) > 1:
            names = " and ".join(bases)
            print(f"the adapters name different base models, {names}: make sure that these are the same weights", file=sys.stderr)
        return pair

    def merged(self, scale: float) -> Adapter:
        """Return the merge of both adapters, the on-policy one at a scale."""
        return merge_adapters(self.semi.adapter, self.on.adapter, scale)

    @property
    def base_models(self) -> list[str]:
        """Names of the base models that the adapters' files record."""
        return sorted({source.base_model for source in self if source.base_model})


def prepare_adapters(model: CausalWan, sources: Sequence[AdapterFile]) -> None:
    """Give the model an adapter that can hold each of `sources` in turn: all their layers, the largest of their ranks.

    Raises:
        UserError: one of them does not fit the model.
    """
    if not sources:
        return
    rank, targets = max(source.adapter.rank for source in sources), sorted({name for source in sources for name in source.adapter.modules})
    layers = {name: (layer.in_features, layer.out_features) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for source in sources:
        check_layers(source.adapter, layers, source.file)
    add_lora(model, rank=rank, alpha=rank, targets=targets, seed=0)


def adapted_generators(options: Iterable[AdapterOption], *, base: bool) -> list[Adapted]:
    """Return the generators to compare, in order. base: the one without an adapter is the first.

    Raises:
        UserError: an adapter cannot be read, or two have the same name.
    """
    found = [Adapted(BASE)] if base else []
    for option in options:
        source = read_adapter_file(find(option.path))
        name = option.name or name_of(source.file)
        for scale in option.scales:
            label = f"{name}@{scale_text(scale)}"
            if any(label == other.name for other in found):
                raise UserError(
                    f"--adapter {option.path}: two adapters have the name {label}; give another name, as in --adapter NAME=PATH"
                )
            found.append(Adapted(label, source, scale))
    return found


def name_of(file: Path) -> str:
    """Return an adapter's name, the innermost of its file and directories that says something: runs/on/adapter/... is called on."""
    parts = [file.stem, *(folder.name for folder in file.absolute().parents)]
    silent = ("", "adapter", "adapter_model", "pytorch_lora_weights")
    return re.sub(r"[^\w.-]+", "-", next((part for part in parts if part not in silent), "adapter"))


def scale_text(scale: float) -> str:
    """Return a scale as the user wrote it."""
    return f"{scale:.12g}"
