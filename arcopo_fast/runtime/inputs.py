"""What a run was begun with, beyond its settings: a file can change under its name while the run is stopped."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from arcopo_fast.errors import UserError
from arcopo_fast.runtime.run_dir import atomic_write

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


def check_inputs(run: Path, made_of: Mapping[str, str], judges: Mapping[str, str], *, done: int) -> None:
    """Keep what a new run is made of; hold a run that goes on to it.

    Args:
        run: its directory.
        made_of: what every video depends on, as digests by what they are of.
        judges: digests of rewards and metrics, by name. Those may change, to be mended say: that is said on stderr.
        done: iterations.

    Raises:
        UserError: `made_of` is not what the run began with.
    """
    file = run / INPUTS
    if file.is_file():
        try:
            document = json.loads(file.read_bytes())
            earlier, judged = dict(document["made_of"]), dict(document["judges"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} is damaged, so what the run was begun with is unknown; remove it to go on with what is here") from None
        if other := [name for name, digest in made_of.items() if earlier.get(name) != digest]:
            raise UserError(
                f"{run} was begun with another {' and another '.join(other)} than is here now, and would not go on as it began; "
                f"put back what its config.yaml names, or start a new run"
            )
        if other := [name for name, digest in judges.items() if judged.get(name) != digest]:
            print(
                f"{', '.join(other)}: another code or other weights than when {run} was last running; its curves are of the earlier one up "
                f"to iteration {done}, and its table of before and after is of this one",
                file=sys.stderr,
            )
    atomic_write(file, json.dumps({"made_of": made_of, "judges": judges}, indent=2) + "\n")
