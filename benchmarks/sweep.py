"""Other block sizes than the heuristic's: `pytest benchmarks/ --benchmark-only --sweep` measures them in place of other implementations."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from itertools import product
from typing import Any
from unittest import mock

from benchmarks.timing import Call

FACTORS = (0.5, 1, 2)
KNOBS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # Of what `block_sizes` returns: what is swept against each other, and what one at a time. num_warps ends a tuple without names.
    "surrogate": (("block", "num_warps"), ("anchors", "num_stages")),
    "attention": (("query", "key"), ("num_warps", "num_stages")),
    "paging": (("block", "num_warps"), ()),
    "qk_norm_rope": (("num_warps",), ()),
    "modulation": (("num_warps",), ()),
    "norm_silu": (("pixels", "num_warps"), ()),
    "nft": (("block", "num_warps"), ()),
    "lora_linear": (("block_t", "block_out"), ("num_warps",)),
}


def candidates(operator: str, call: Call) -> dict[str, Call]:
    """`call` with the block sizes of `arcopo_kernels.<operator>` scaled, by a name that says how."""
    module = import_module(f"arcopo_kernels.{operator}.triton")
    heuristic = module.block_sizes

    def with_sizes(factors: dict[str, float]) -> Call:
        def sizes(*args: Any, **kwargs: Any) -> Any:
            return _scaled(heuristic(*args, **kwargs), factors)

        def swept() -> Any:
            with mock.patch.object(module, "block_sizes", sizes):
                return call()

        return swept

    return {" ".join(f"{knob}*{factor:g}" for knob, factor in factors.items()): with_sizes(factors) for factors in _settings(operator)}


def _settings(operator: str) -> Iterator[dict[str, float]]:
    together, alone = KNOBS[operator]
    for factors in product(FACTORS, repeat=len(together)):
        if any(factor != 1 for factor in factors):
            yield {knob: factor for knob, factor in zip(together, factors) if factor != 1}
    for knob in alone:
        yield from ({knob: factor} for factor in FACTORS if factor != 1)


def _scaled(sizes: Any, factors: dict[str, float]) -> Any:
    values = list(sizes)
    for knob, factor in factors.items():
        at = sizes._fields.index(knob) if hasattr(sizes, "_fields") else {"num_warps": -1}[knob]
        values[at] = max(1, int(values[at] * factor))
    return type(sizes)(*values) if hasattr(sizes, "_fields") else tuple(values)
