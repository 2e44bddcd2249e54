"""The needs of a recipe on this machine: packages, a GPU, files. Nothing is downloaded and no weights are loaded."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import NamedTuple

import torch

from arcopo_fast.build import UNTRAINED, base_files, check_fits
from arcopo_fast.config.schema import Config
from arcopo_fast.data.prompts import BENCH
from arcopo_fast.errors import UserError
from arcopo_fast.model.checkpoints import UnreadableFile
from arcopo_fast.rewards.registry import reward_files
from arcopo_fast.runtime.distributed import World
from arcopo_fast.storage import hub
from arcopo_fast.storage.identity import version_of

PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "safetensors", "huggingface_hub", "av")


class Need(NamedTuple):
    """A file or directory that a recipe's key asks for.

    Attributes:
        key: of the recipe.
        source: as the recipe writes it.
        files: names or patterns of what is needed of a directory.
    """

    key: str
    source: str
    files: list[str]


def needs(config: Config) -> list[Need]:
    """Return the files behind a recipe, but for what ships with the package and what a reward server has."""
    generator = config.generator
    files_needed = []
    if generator.checkpoint != "toy" and not generator.checkpoint.startswith(UNTRAINED):
        files_needed.append(Need("generator.checkpoint", generator.checkpoint, []))
    if generator.base:
        files_needed.append(Need("generator.base", generator.base, base_files(generator.base)))
    if generator.lora:
        files_needed.append(Need("generator.lora", generator.lora, []))
    if config.prompts not in ("toy", BENCH):
        files_needed.append(Need("prompts", config.prompts, []))
    if config.extended_prompts:
        files_needed.append(Need("extended_prompts", config.extended_prompts, []))
    for name in config.rewards:
        if name not in config.reward_servers.addresses:
            files_needed += [Need(f"rewards.{name}", source, list(files)) for source, files in reward_files(name)]
    return files_needed


def fetch(config: Config, world: World, *keys: str) -> None:
    """Download what is missing of a recipe's published files, once for all ranks that share a disk. A process alone does it as it loads.

    keys: beginnings of the keys whose files are needed; none: all.

    Raises:
        UserError: a file cannot be downloaded, or is not whole.
    """
    if world.alone:
        return
    with world.in_turn("download what the recipe needs"):
        for need in needs(config):
            if hub.is_published(need.source) and need.key.startswith(keys or ""):
                hub.find(need.source, need.files)


def environment() -> list[str]:
    """Return lines about Python, packages and devices."""
    versions = [f"{name} {version}" if (version := version_of(name)) else f"no {name}" for name in PACKAGES]
    lines = [f"Python {platform.python_version()} on {platform.system()} {platform.machine()}", ", ".join(versions)]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index}  {device.name}, {device.total_memory / 1e9:.0f} GB, sm_{device.major}{device.minor}")
    if not torch.cuda.is_available():
        lines.append("no GPU that PyTorch can use")
    return lines


def damaged_files(need: Need, path: Path) -> list[Path]:
    """Return the files of a need that are not what was published; reads all of those whose SHA-256 is known."""
    if not hub.is_published(need.source):
        return []
    known = hub.known_files(hub.Source.parse(need.source), path, need.files)
    return [file for file, published in known if hub.sha256(file) != published.sha256]


def examine(config: Config, *, verify: bool = False) -> tuple[list[str], bool]:
    """Return lines about a recipe's files, and whether all is well.

    verify: read every file whose checksum is known.
    """
    lines, missing, damaged = [], 0, 0
    examined: set[tuple[str, ...]] = set()
    for need in needs(config):
        if (need.source, *need.files) in examined:  # three rewards of one model need its files once
            continue
        examined.add((need.source, *need.files))
        path = hub.local(need.source, need.files)
        if path is None:
            missing += 1
            lines.append(f"missing  {need.key}: {hub.describe(need.source, need.files)}")
            continue
        try:
            hub.find(need.source, need.files)  # of the published size
        except UserError as error:
            damaged += 1
            lines.append(f"damaged  {need.key}: {error}")
            continue
        bad = damaged_files(need, path) if verify else []
        damaged += len(bad)
        lines.append(f"{'found' if not bad else 'damaged':7}  {need.key}: {path}")
        lines += [f"         {file} is not what was published; get it again" for file in bad]
    if not (missing or damaged):
        try:
            check_fits(config)
        except UnreadableFile:
            pass  # what is in it, only a run or --verify looks at
        except UserError as error:
            return [*lines, f"misfit   {error}"], False
    if missing or damaged:
        lines.append(f"{missing} missing, {damaged} damaged; with a network, a run downloads what is missing by itself")
    else:
        lines.append("every file is here")
    return lines, not (missing or damaged)
