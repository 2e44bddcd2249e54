"""One case of a benchmark: an operator and everything it is compared with, sampled in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from arcopo_kernels import dispatch
from arcopo_kernels.testing import error_ratio
from torch import Tensor

from benchmarks import sweep
from benchmarks.results import OURS
from benchmarks.timing import Call, Ceilings, Comparison, Timer

TOLERANCE = 0.02
"""Error ratio to the reference above which a case fails: what is timed is not the operator. The tests hold the real tolerances."""
OUT_OF_MEMORY = "out of memory"


class Other(NamedTuple):
    """Another implementation of the operator's work.

    Attributes:
        call: does it.
        gradients: its own leaves, in the order of the operator's.
        competes: False for the operator with other settings, which is measured and listed, but is no competitor.
    """

    call: Call
    gradients: Sequence[Tensor] = ()
    competes: bool = True


def library(name: str) -> Any | None:
    """Return a module that may not be installed, or None."""
    try:
        return import_module(name) if find_spec(name.split(".")[0]) else None
    except ImportError:
        return None


_device_time = 0.0


def device_clock() -> float:
    """Return the time of the clock that pytest-benchmark is given: it advances by the samples of the operator under test, and by nothing
    else."""
    return _device_time


class Bench:
    """A measurement of the cases of one test.

    Args:
        seconds: of samples for each implementation.
        compiled: measure torch.compile of the reference too.
        swept: a folder of arcopo_kernels: measure its kernels with other block sizes, in place of all else.
        benchmark: pytest-benchmark's fixture.
    """

    def __init__(self, timer: Timer, ceilings: Ceilings, *, seconds: float, compiled: bool, swept: str | None, benchmark: Any) -> None:
        self.timer = timer
        self.ceilings = ceilings
        self.seconds = seconds
        self.compiled = compiled
        self.swept = swept
        self.benchmark = benchmark
        self.figures: dict[str, Any] = {}

    def __call__(
        self,
        operator: str,
        case: str,
        call: Call,
        *,
        traffic: float,
        flops: float = 0.0,
        gradients: Sequence[Tensor] = (),
        reference: Call | None = None,
        others: Mapping[str, Other | str] | None = None,
    ) -> None:
        """Measure one case.

        Args:
            call: calls the public operator; it returns a tensor, a sequence of tensors, or None if it works in place. The same call under
                `dispatch.use("reference")` is the reference, and torch.compile of that the compiled one.
            traffic, flops: the bytes that must be moved (each input read once, each output written once), the FLOP that must be done.
            gradients: leaves to differentiate with respect to; the backward pass is then part of what is timed.
            reference: another reference than that.
            others: other implementations to compare with, each or why it cannot be.

        Raises:
            AssertionError: the operator and its reference disagree.
        """
        mode = "forward+backward" if gradients else "forward"
        self.figures |= {"operator": operator, "mode": mode, "case": case}
        others = others or {}
        alternatives = [name for name, other in others.items() if isinstance(other, Other) and not other.competes]
        calls, skipped = self._calls(call, gradients, reference or call, others)
        errors = self._check(calls, skipped)
        implementation = dispatch.used(operator)

        comparison = Comparison(self.timer, calls, self.seconds)

        def one_round() -> None:
            global _device_time
            _device_time += comparison.round()[OURS]

        self.benchmark.pedantic(one_round, rounds=comparison.rounds)
        timings = comparison.timings().items()
        variants: dict[str, dict[str, Any]] = {name: {**timing._asdict(), "error": errors.get(name)} for name, timing in timings}
        time = variants[OURS]["median"]
        ratios = {name: figures["median"] / time for name, figures in variants.items() if name != OURS}
        competitors = [name for name in ratios if name not in ("reference", "compiled", *alternatives)]
        best = min(competitors, key=lambda name: ratios[name], default=None)
        floor = self.ceilings.floor(traffic, flops)
        self.figures |= {
            "implementation": implementation._asdict() if implementation else None,
            "bytes": traffic,
            "flops": flops,
            "limit": "matmul" if flops / self.ceilings.matmul > traffic / self.ceilings.bandwidth else "bandwidth",
            "floor": floor,
            "of_ceiling": floor / time,
            "ratios": {"reference": ratios.get("reference"), "compiled": ratios.get("compiled"), "best": ratios[best] if best else None},
            "best": best,
            "alternatives": alternatives,
            "variants": variants | {name: {"skipped": reason} for name, reason in skipped.items()},
        }

    def _calls(
        self, call: Call, gradients: Sequence[Tensor], reference: Call, others: Mapping[str, Other | str]
    ) -> tuple[dict[str, Call], dict[str, str]]:
        """Return what is timed, by name, and why the rest is not."""
        upstream: list[Tensor] = []

        def step(forward: Call, leaves: Sequence[Tensor]) -> Call:
            def forward_backward() -> Sequence[Tensor]:
                outputs = _tensors(forward())
                if not upstream:
                    upstream.extend(torch.randn_like(output) for output in outputs)
                return torch.autograd.grad(outputs, leaves, upstream)

            return forward_backward if leaves else forward

        def using(implementation: str, function: Call) -> Call:
            def call_implementation() -> Any:
                with dispatch.use(implementation):
                    return function()

            return call_implementation

        if self.swept:
            kernel = using("triton", step(call, gradients))
            return {OURS: kernel, **sweep.candidates(self.swept, kernel)}, {}
        calls = {OURS: step(call, gradients), "reference": step(using("reference", reference), gradients)}
        if self.compiled:
            torch._dynamo.reset()  # the cases are different calls of the same code: none may find another's graph or its recompile limit
            calls["compiled"] = step(using("reference", torch.compile(reference, dynamic=False)), gradients)
        calls |= {name: step(other.call, other.gradients) for name, other in others.items() if isinstance(other, Other)}
        return calls, {name: reason for name, reason in others.items() if isinstance(reason, str)}

    def _check(self, calls: dict[str, Call], skipped: dict[str, str]) -> dict[str, float | None]:
        """Run everything once; return the error ratio of our output to each other's. What does not run is moved from `calls` to
        `skipped`."""
        errors: dict[str, float | None] = {}
        for name in [name for name in calls if name != OURS]:
            if name == "compiled" and skipped.get("reference") == OUT_OF_MEMORY:
                skipped[name] = OUT_OF_MEMORY  # no need to compile it to see that
                del calls[name]
                continue
            try:
                errors[name] = _error(_tensors(calls[name]()), _tensors(calls[OURS]()))
                if self.swept and (errors[name] or 0.0) > TOLERANCE:
                    skipped[name] = f"error ratio {errors[name]:.3g}"
            except Exception as error:  # whatever keeps another implementation from running here is worth a word, not the end of the run
                first_line = f"{type(error).__name__}: {error}".split("\n")[0]
                skipped[name] = OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else first_line
            if name in skipped:
                del calls[name]
                if self.timer.device.type == "cuda":
                    torch.cuda.empty_cache()
        calls[OURS]()  # last, for `dispatch.used`
        mismatch = errors.get("reference")
        assert mismatch is None or mismatch <= TOLERANCE, f"the operator's error ratio to its reference is {mismatch:.3g}"
        return errors


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an operator's output; none of one that works in place."""
    return [output] if isinstance(output, Tensor) else list(output or ())


def _error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """Return the largest error ratio of two outputs; None if they are not the same tensors, or none."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        return None
    return max((error_ratio(a, b) for a, b in zip(expected, actual)), default=None)
