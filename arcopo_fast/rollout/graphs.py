"""CUDA graphs of a chunk's few-step loop: every launch of its T network calls recorded once, then replayed as one.

A graph is bound to addresses. What stays where it is, the weights, adapters (updated in place) and pages of the pool, is used in place;
what changes from call to call, the noise and the prompt's keys and values, is copied to where the graph expects it, and what comes out is
copied away. So a graph fits one shape, step list and set of visible pages. Such a place is captured when it is met for the second time, if
there is room; a graph makes room for another once it has not been of use for long, nor since that place was met last. So more places than
graphs never capture in turn.

Worth it where launching the kernels takes longer than running them: small models, single frames of single videos. Predicted, not measured:
with chunks of three frames of Wan2.1-1.3B a launch is hidden behind the arithmetic, and "auto" leaves graphs off.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from arcopo_fast.model.causal_wan import CausalWan, ChunkContext, TextContext
from arcopo_fast.model.lora import adapter_enabled
from arcopo_fast.model.sizes import CausalWanConfig
from arcopo_fast.rollout.sampler import CONSISTENCY, Kernel, Steps, Trajectory, denoise

LAUNCHES_OF_A_BLOCK = 52
"""Without gradient, with an adapter, over two segments."""
SECONDS_OF_A_LAUNCH = 2e-5
"""Of eager PyTorch, with the Python between two launches. An assumption: one core of a slow machine took 1e-4."""
FLOPS_OF_A_SECOND = 4e14
"""Of a GPU in half precision. With the two above, the rough estimate behind "auto"."""

PLACES_REMEMBERED = 4096
"""That have been met, and have no graph. Windows over long videos can meet new ones without end."""

Function = Callable[[], Sequence[Tensor]]
Capture = Callable[[Function], tuple[Sequence[Tensor], Callable[[], object]]]
"""Runs a function while recording it: its outputs, and what runs it again into the same outputs."""


def launch_bound(config: CausalWanConfig, batch: int, tokens: int) -> bool:
    """Whether a block, over a chunk of `tokens` tokens of each of `batch` videos, waits for its launches. An estimate: no cached frames."""
    dim = config.dim
    linear = 2 * tokens * dim * (6 * dim + 2 * config.ffn_dim)
    attention = 4 * tokens * dim * (tokens + config.text_len)
    arithmetic = batch * (linear + attention) / FLOPS_OF_A_SECOND
    return arithmetic < LAUNCHES_OF_A_BLOCK * SECONDS_OF_A_LAUNCH


class _Captured(NamedTuple):
    noise: Tensor
    fresh: list[Tensor]
    text: TextContext
    outputs: Sequence[Tensor]  # the inputs of all steps, then their predictions
    replay: Callable[[], object]
    run: object  # holds what the graph reads by address, the context's indices for one


class ChunkGraphs:
    """Captured loops by place.

    Args:
        mode: "on"; "auto", by `launch_bound`; "off".
        limit: graphs kept. A chunk of Wan2.1-1.3B takes tens of MiB of launches and one working set that all share.
        patience: the graph that has not been used for longest makes room, if that was more than so many calls ago for each graph kept, and
            the place that needs it has been met since.
        capture: how; None: as CUDA graphs, where there is a GPU.

    `reason` says why the last call ran without a graph; None if it ran as one.
    """

    def __init__(
        self, mode: Literal["auto", "on", "off"] = "auto", limit: int = 32, capture: Capture | None = None, patience: int = 8
    ) -> None:
        self.mode = mode
        self.limit = limit
        self.patience = patience
        self.reason: str | None = None
        self._capture = capture
        self._calls = 0
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()  # the least recently used first
        self._used: dict[Hashable, int] = {}  # the call that used a graph last
        self._met: OrderedDict[Hashable, int] = OrderedDict()  # the call that met a place last when it had no graph
        self._failed: dict[Hashable, str] = {}  # why a place that was met cannot be captured
        self._texts: dict[Hashable, tuple[TextContext, TextContext]] = {}  # by shape: where graphs read it, and whose copy lies there

    def denoise(
        self,
        model: CausalWan,
        noise: Tensor,
        steps: Steps,
        fresh: Sequence[Tensor],
        text: TextContext,
        context: ChunkContext,
        *,
        kernel: Kernel = CONSISTENCY,
    ) -> Trajectory:
        """`sampler.denoise`, as a graph where there is one."""

        def run(noise: Tensor, fresh: Sequence[Tensor], text: TextContext) -> list[Tensor]:
            trajectory = denoise(model, noise, steps, fresh, text, context, kernel=kernel)
            return [*trajectory.inputs, *trajectory.predictions]

        place = context.place()
        self.reason = self._unsuitable(model, noise, place)
        if self.reason is None:
            shapes = tuple(tuple(tensor.shape) for tensor in (noise, *fresh, text.keys[0]))
            key = (place, shapes, noise.dtype, steps, kernel, adapter_enabled(model))
            outputs = self._outputs(key, run, noise, fresh, text)
        else:
            outputs = run(noise, fresh, text)
        return Trajectory(list(outputs[: len(steps)]), list(outputs[len(steps) :]))

    def _unsuitable(self, model: CausalWan, noise: Tensor, place: Hashable | None) -> str | None:
        if self.mode == "off":
            return "rollout.cuda_graphs is off"
        if self._capture is None and model.device.type != "cuda":
            return f"the generator is on {model.device.type}, not on a GPU"
        if torch.is_grad_enabled():
            return "gradients are recorded"
        if place is None:
            return "the context cannot say which addresses it reads"
        batch, frames, _, height, width = noise.shape
        tokens = frames * model.config.tokens_per_frame(height, width)
        if self.mode == "auto" and not launch_bound(model.config, batch, tokens):
            return "the arithmetic takes longer than the launches"
        return None

    def _outputs(
        self, key: Hashable, run: Callable[..., list[Tensor]], noise: Tensor, fresh: Sequence[Tensor], text: TextContext
    ) -> Sequence[Tensor]:
        self._calls += 1
        if key not in self._graphs:
            self.reason = self._new(key, run, noise, fresh, text)
            if self.reason is not None:
                return run(noise, fresh, text)  # which also warms up what must not be set up while a graph is captured
        graph = self._graphs[key]
        self._graphs.move_to_end(key)
        self._used[key] = self._calls
        graph.noise.copy_(noise)
        for ours, given in zip(graph.fresh, fresh):
            ours.copy_(given)
        self._text(text)
        graph.replay()
        return [output.clone() for output in graph.outputs]

    def _new(
        self, key: Hashable, run: Callable[..., list[Tensor]], noise: Tensor, fresh: Sequence[Tensor], text: TextContext
    ) -> str | None:
        """Capture a place; or why not."""
        met_before = self._met.pop(key, None)
        self._met[key] = self._calls
        if met_before is None:
            if len(self._met) > PLACES_REMEMBERED:
                forgotten, _ = self._met.popitem(last=False)
                self._failed.pop(forgotten, None)
            return "this place is met for the first time"
        if key in self._failed:
            return self._failed[key]
        if len(self._graphs) >= self.limit:
            oldest = next(iter(self._graphs))
            used = self._used[oldest]
            if met_before < used or self._calls - used <= self.patience * self.limit:
                return f"all {self.limit} graphs are in use"
            del self._graphs[oldest], self._used[oldest]
        graph = self._captured(run, noise, fresh, text)
        if isinstance(graph, str):
            self._failed[key] = graph
            return graph
        self._graphs[key] = graph
        return None

    def _captured(self, run: Callable[..., list[Tensor]], noise: Tensor, fresh: Sequence[Tensor], text: TextContext) -> _Captured | str:
        """A graph, or why there is none."""
        ours, ours_fresh, ours_text = noise.clone(), [tensor.clone() for tensor in fresh], self._text(text)
        capture = self._capture or partial(_cuda_capture, device=noise.device)
        try:
            outputs, replay = capture(lambda: run(ours, ours_fresh, ours_text))
        except RuntimeError as error:  # whatever an operator does that a graph cannot hold
            return f"the capture failed: {' '.join(str(error).split())[:200]}"
        return _Captured(ours, ours_fresh, ours_text, outputs, replay, run)

    def _text(self, text: TextContext) -> TextContext:
        """Where graphs read a prompt of this shape, holding this one."""
        shape = (len(text.keys), tuple(text.keys[0].shape), text.keys[0].dtype)
        if shape not in self._texts:
            self._texts[shape] = TextContext([key.clone() for key in text.keys], [value.clone() for value in text.values]), text
        ours, held = self._texts[shape]
        if held is not text:
            torch._foreach_copy_([*ours.keys, *ours.values], [*text.keys, *text.values])
            self._texts[shape] = ours, text
        return ours


_pool: Any = None


def _cuda_capture(function: Function, device: torch.device) -> tuple[Sequence[Tensor], Callable[[], object]]:
    """One memory pool serves all graphs: their outputs are copied away before another one runs."""
    global _pool
    with torch.cuda.device(device):  # a capture records a stream of the current device, whatever device the work is on
        _pool = _pool or torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=_pool, capture_error_mode="thread_local"):
                outputs = function()
        except BaseException:  # a capture that fails at its end leaves its stream the current one, and may leave its pool recording
            torch.cuda.set_stream(stream)
            _pool = None
            raise
    return outputs, graph.replay
