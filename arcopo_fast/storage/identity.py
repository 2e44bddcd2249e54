"""What a run was begun with, beyond its settings: a file can change under its name while the run is stopped."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from torch import Tensor

from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError, shorten
from arcopo_fast.reports.series import leaves
from arcopo_fast.storage.atomic import atomic_write

INPUTS = "inputs.json"
SAMPLES = 64


def sampled_digest(tensors: Iterable[tuple[str, Tensor]], about: bytes = b"") -> str:
    """16 hexadecimal digits: of each tensor its name, dtype, shape and up to 2 x `SAMPLES` of its elements.

    Training changes all elements, and to read the weights of a large model would take longer than to load them.

    about: what else tells them apart.
    """
    digest = hashlib.sha256(about)
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class _Document(BaseModel):
    """inputs.json. settings: null in a run of an earlier version."""

    model_config = ConfigDict(strict=True)
    made_of: dict[str, str]
    judges: dict[str, str]
    settings: dict[str, JsonValue] | None = None


# What an iteration computes, by dotted keys and sections; checkpoints, prompts and other files are told by what is in them.
_FIXED = ("seed", "generator.dtype", "generator.vae_dtype", "video", "sampler", "cache", "rollout", "objective", "lora", "train.mode")
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


def check_settings(run: Path, config: Config) -> None:
    """Say on stderr which settings of a run that goes on are others than when it was last running.

    Raises:
        UserError: with them the run would not go on as it began.
    """
    earlier = _read(run / INPUTS)
    if earlier is None or earlier.settings is None:
        return
    before, now = earlier.settings, _settings(config)
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]

    def said(keys: Sequence[str]) -> str:
        return ", ".join(f"{key} from {_shown(before, key)} to {_shown(now, key)}" for key in keys)

    if fixed := [key for key in changed if key not in _FREE and any(key == one or key.startswith(f"{one}.") for one in _FIXED)]:
        raise UserError(
            f"{run / 'config.yaml'} was changed since the run began: {said(fixed)}; it would not go on as it began, so put that back, or "
            "start a new run with it"
        )
    if changed:
        print(f"{run / 'config.yaml'} was changed since the run last went on: {said(changed)}; from here on it counts", file=sys.stderr)


def check_inputs(run: Path, config: Config, made_of: Mapping[str, str], judges: Mapping[str, str], *, done: int) -> None:
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
        if other := [name for name, digest in made_of.items() if earlier.made_of.get(name) != digest]:
            raise UserError(
                f"{run} was begun with another {' and another '.join(other)} than is here now, and would not go on as it began; "
                f"put back what its config.yaml names, or start a new run"
            )
        if other := [name for name, digest in judges.items() if earlier.judges.get(name) != digest]:
            print(
                f"{', '.join(other)}: another code or other weights than when {run} was last running; its curves are of the earlier one up "
                f"to iteration {done}, and its table of before and after is of this one",
                file=sys.stderr,
            )
    document = {"made_of": made_of, "judges": judges, "settings": _settings(config)}
    atomic_write(run / INPUTS, json.dumps(document, indent=2) + "\n")


def _read(file: Path) -> _Document | None:
    """None: there is none yet."""
    if not file.exists():
        return None
    try:
        return _Document.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        raise UserError(f"{file} is damaged, so what the run was begun with is unknown; remove it to go on with what is here") from None


def _settings(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key, as JSON gives it back; where the run lies is none of it."""
    values = {key: value for key, value in leaves(config) if not key.startswith("run.")}
    return json.loads(json.dumps(values))


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return shorten(json.dumps(settings[key], ensure_ascii=False)) if key in settings else "nothing"
