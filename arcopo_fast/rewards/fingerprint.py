"""A digest that tells a reward from itself before an edit or an update: kept beside scores, so that two states are never mixed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from arcopo_fast.storage.identity import sampled_digest


def code_and_weights(judge: object, *modules: object) -> str:
    """Return 16 hexadecimal digits: of the file that a judge's code is in, of the files of `modules`, and of samples of its tensors.

    Tensors are found in a torch module's state, and in modules that are an object's attributes. Not covered: what those files import, and
    what a judge reads at a call.

    Args:
        judge: a function, or an object that can be called.
    """
    code = judge if inspect.isroutine(judge) else type(judge)
    sources = [_source(code) for code in (code, *modules)]
    name = f"{getattr(code, '__module__', '')}:{getattr(code, '__qualname__', '')}\n"
    return sampled_digest(_tensors(judge.__self__ if inspect.ismethod(judge) else judge), name.encode() + b"".join(sources))


def _source(code: Any) -> bytes:
    """The file that a module, class or function is written in; nothing for one that has none, such as one in C."""
    try:
        file = Path(inspect.getsourcefile(inspect.unwrap(code)) or "")
    except (TypeError, OSError):
        return b""
    return file.read_bytes() if file.is_file() else b""


def _tensors(judge: Any) -> Iterator[tuple[str, Tensor]]:
    attributes = {"": judge} if isinstance(judge, nn.Module) else getattr(judge, "__dict__", {})
    for prefix, module in sorted(attributes.items()):
        if isinstance(module, nn.Module):
            for name, value in module.state_dict(prefix=f"{prefix}.").items():
                if isinstance(value, Tensor):
                    yield name, value
