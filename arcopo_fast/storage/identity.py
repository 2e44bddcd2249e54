"""Digests of content, descriptions of what numbers depend on, and the comparison that names what differs.

Files keep these digests and descriptions, so their values stay as they are: `digest` of bytes or text, `file_digest`, `values_digest` of
settings, `weights_digest` of a whole model, `sampled_digest` where reading a whole model would take too long. `describe` and
`require_same` are for results that are added to, and inputs.json for a run that goes on: a file can change under its name meanwhile.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from arcopo_fast.errors import UserError, shorten
from arcopo_fast.storage.atomic import atomic_write

if TYPE_CHECKING:  # PyTorch takes seconds to import, and a report is written without it
    from torch import Tensor

INPUTS = "inputs.json"
SAMPLES = 64
MOST_NAMED = 8
"""Differences that a message names."""


# Digests ---------------------------------------------------------------------------------------------------------------------------


def digest(content: str | bytes) -> str:
    """Return the SHA-256 of bytes, or of a text in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def file_digest(file: Path, read: Callable[[int], object] = lambda size: None) -> str:
    """Return the SHA-256 of a file of any size. read: called with the number of bytes after each part that was read."""
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 24):
            found.update(part)
            read(len(part))
    return found.hexdigest()


def values_digest(values: Mapping[str, Any]) -> str:
    """Return 16 digits of the SHA-256 of plain, possibly nested values: of their JSON, with sorted keys and no spaces."""
    return digest(json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False))[:16]


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a whole model's tensors, names and dtypes included."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(_whole(tensor).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def sampled_digest(tensors: Iterable[tuple[str, Tensor]], about: bytes = b"") -> str:
    """Return 16 digits of each tensor's name, dtype, shape and up to 2 x `SAMPLES` of its elements.

    Training changes all elements, and to read the weights of a large model would take longer than to load them.

    about: what else tells them apart.
    """
    import torch

    found = hashlib.sha256(about)
    for name, tensor in tensors:
        flat = _whole(tensor).reshape(-1)
        samples = flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(samples.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor without gradient; one that is divided among ranks, all of which must be here, is gathered."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return a checksum of the bits of float32 tensors, made on their device: fast enough for every step, and no proof."""
    import torch

    found = 0
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(-1).view(torch.int32).long()
        sums = torch.stack([bits.sum(), bits[::2].sum(), bits[::3].sum()]).tolist()
        for part in sums:
            found = (found * 1000003 + part) % 2**64
    return found


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None for one that is not installed, as this one is not where it lies on PYTHONPATH."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# What numbers depend on ------------------------------------------------------------------------------------------------------------


def describe(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what numbers depend on, as JSON gives it back: a section's values by "section.key", a single value by its name.

    Of what weights and judges are of, say their digests: the same file may lie elsewhere, and another one under the same name.
    """
    found: dict[str, Any] = {}
    for name, part in parts.items():
        found |= {f"{name}.{key}": value for key, value in part.items()} if isinstance(part, Mapping) else {name: part}
    return json.loads(json.dumps(found))


def require_same(
    problem: str, stored: Mapping[str, Any], current: Mapping[str, Any], advice: str, *, places: tuple[str, str] = ("here", "there")
) -> None:
    """Raise `UserError` if two descriptions, possibly nested, differ: "PROBLEM: KEY: 2 here, 1 there; ADVICE".

    What one of them lacks is equal to null: an earlier version may not have known the setting.

    Args:
        stored: of what lies on the disk.
        places: the words for where a value is current, and where it is stored.
    """
    before, now = dict(_flat(stored)), dict(_flat(json.loads(json.dumps(current))))
    if keys := _differing(before, now):
        named = [f"{key}: {_shown(now, key)} {places[0]}, {_shown(before, key)} {places[1]}" for key in keys[:MOST_NAMED]]
        more = [f"and {len(keys) - MOST_NAMED} more"] if len(keys) > MOST_NAMED else []
        raise UserError(f"{problem}: {'; '.join([*named, *more])}; {advice}")


def leaves(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting of a recipe, by its dotted key."""
    for name, value in section:
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        elif _sections(value):
            for key, part in value.items():
                yield from leaves(part, f"{prefix}{name}.{key}.")
        else:
            yield prefix + name, value


def _sections(value: Any) -> bool:
    """Return whether a setting holds sections by names that the recipe gives them."""
    return isinstance(value, Mapping) and any(isinstance(part, BaseModel) for part in value.values())


def _defaults(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the default of every setting that has one, by its dotted key."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _defaults(value, f"{prefix}{name}.")
        elif not field.is_required() and not _sections(value):
            yield prefix + name, field.get_default(call_default_factory=True)


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the keys of two flat descriptions that differ; what one of them lacks is equal to null."""
    return sorted(key for key in {*before, *now} if before.get(key) != now.get(key))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested values by dotted keys; an empty section is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return shorten(json.dumps(values[key], ensure_ascii=False, sort_keys=True)) if key in values else "nothing"


# A run that goes on ----------------------------------------------------------------------------------------------------------------


class _Document(BaseModel):
    """inputs.json. settings: null in a run of an earlier version."""

    model_config = ConfigDict(strict=True)
    made_of: dict[str, str]
    judges: dict[str, str]
    settings: dict[str, JsonValue] | None = None


# What an iteration computes, by dotted keys and sections; checkpoints, prompts and other files are told by what is in them.
_FIXED = (
    "seed",
    "generator.dtype",
    "generator.vae_dtype",
    "video",
    "sampler",
    "cache",
    "rollout",
    "judge",
    "objective",
    "lora",
    "train.mode",
)
# Of these, what says how and not what: less memory or less time, the same result.
_FREE = (
    "video.decode_frames",
    "video.fps",
    "rollout.branches_per_wave",
    "rollout.decode_branches",
    "rollout.cuda_graphs",
    "objective.micro_batch",
    "objective.checkpoint",
)


def check_settings(run: Path, config: BaseModel) -> None:
    """Say on stderr which settings of a run that goes on are others than when it was last running.

    Raises:
        UserError: with them the run would not go on as it began.
    """
    earlier = _read(run / INPUTS)
    if earlier is None or earlier.settings is None:
        return
    before, now = _plain(dict(_defaults(config))) | earlier.settings, _settings(config)  # a setting that is new had its default's effect
    changed = _differing(before, now)

    def listed(keys: Sequence[str]) -> str:
        return ", ".join(f"{key} from {_shown(before, key)} to {_shown(now, key)}" for key in keys)

    if fixed := [key for key in changed if key not in _FREE and any(key == section or key.startswith(f"{section}.") for section in _FIXED)]:
        raise UserError(
            f"{run / 'config.yaml'} was changed since the run began: {listed(fixed)}; the run would not continue as it began. Undo the "
            "change, or start a new run with it"
        )
    if changed:
        print(
            f"{run / 'config.yaml'} was changed since the run last ran: {listed(changed)}; the new values count from here on",
            file=sys.stderr,
        )


def check_inputs(run: Path, config: BaseModel, made_of: Mapping[str, str], judges: Mapping[str, str], *, done: int) -> None:
    """Keep what a new run is made of; hold a run that goes on to it.

    Args:
        run: its directory.
        config: its settings, see `check_settings`.
        made_of: what every video depends on, as digests by what they are of.
        judges: digests of rewards and metrics, by name. Those may change, to be mended say: that is said on stderr.
        done: iterations.

    Raises:
        UserError: `made_of` is not what the run began with.
    """
    earlier = _read(run / INPUTS)
    if earlier is not None:
        began = {name: earlier.made_of.get(name) for name in made_of}
        problem = f"{run} was begun with other inputs than those here now, and would not continue as it began"
        require_same(problem, began, made_of, "put back what its config.yaml names, or start a new run")
        if other := [name for name, digest in judges.items() if earlier.judges.get(name) != digest]:
            print(
                f"{', '.join(other)}: code or weights changed since {run} last ran; the run's curves show the earlier version "
                f"up to iteration {done}, and its table of before and after shows the present one",
                file=sys.stderr,
            )
    document = {"made_of": made_of, "judges": judges, "settings": _settings(config)}
    atomic_write(run / INPUTS, json.dumps(document, indent=2) + "\n")


def _read(file: Path) -> _Document | None:
    """Return what inputs.json says; None if there is none yet."""
    if not file.exists():
        return None
    try:
        return _Document.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        raise UserError(
            f"{file} is damaged, so the inputs that the run began with are unknown; remove it to continue with the present ones"
        ) from None


def _settings(config: BaseModel) -> dict[str, Any]:
    """Return every setting by its dotted key, as JSON gives it back; where the run lies is none of it."""
    return _plain(dict(leaves(config)))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({key: value for key, value in values.items() if not key.startswith("run.")}))
