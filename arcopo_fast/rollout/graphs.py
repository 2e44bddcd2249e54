"""CUDA graphs of a chunk's few-step loop: every launch of its T network calls recorded once, then replayed as one.

A graph is bound to addresses. What stays where it is, the weights, adapters (updated in place) and pages of the pool, is used in place;
what changes from call to call, the noise and the prompt's keys and values, is copied to where the graph expects it, and what comes out is
copied away. So a graph fits one key: a shape, a step list and a set of visible pages. A key is captured when it is seen for the second
time, if there is room. The least recently used graph is evicted if it has been idle for patience x limit calls, and since the new key was
seen last: more keys than graphs never evict one another in turn.

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
from arcopo_fast.rollout.sampler import CONSISTENCY, StepRule, Steps, Trajectory, denoise

LAUNCHES_OF_A_BLOCK = 52
"""Kernel launches of one block without gradient, with an adapter, over two segments."""
SECONDS_OF_A_LAUNCH = 2e-5
"""Seconds of a launch in eager PyTorch, with the Python between two of them. An assumption: one core of a slow machine took 1e-4."""
FLOPS_OF_A_SECOND = 4e14
"""Operations a second of a GPU in half precision. With the two above, the rough estimate behind "auto"."""

MAX_KEYS_SEEN = 4096
"""Limit of the keys that were seen and have no graph. Windows over long videos can bring new ones without end."""

Function = Callable[[], Sequence[Tensor]]
Capture = Callable[[Function], tuple[Sequence[Tensor], Callable[[], object]]]
"""Runs a function while recording it: its outputs, and what runs it again into the same outputs."""
Loop = Callable[[Tensor, Sequence[Tensor], TextContext], Trajectory]
"""Denoises a chunk, given its initial noise, the noise after each step but the last, and the prompt."""


def launch_bound(config: CausalWanConfig, batch: int, tokens: int) -> bool:
    """Return whether a block, over a chunk of `tokens` tokens of each of `batch` videos, waits for its launches.

    An estimate: cached frames are not counted.
    """
    dim = config.dim
    linear = 2 * tokens * dim * (6 * dim + 2 * config.ffn_dim)
    attention = 4 * tokens * dim * (tokens + config.text_len)
    arithmetic = batch * (linear + attention) / FLOPS_OF_A_SECOND
    return arithmetic < LAUNCHES_OF_A_BLOCK * SECONDS_OF_A_LAUNCH


class _Captured(NamedTuple):
    """A captured loop.

    Attributes:
        noise, fresh, text: where the graph reads its arguments.
        outputs: where it leaves the inputs and then the predictions of all steps.
        replay: runs it.
        loop: holds what the graph reads by address, the context's indices for example.
    """

    noise: Tensor
    fresh: list[Tensor]
    text: TextContext
    outputs: Sequence[Tensor]
    replay: Callable[[], object]
    loop: object


class ChunkGraphs:
    """Captured loops by key.

    Args:
        mode: "on"; "auto", by `launch_bound`; "off".
        limit: number of graphs kept. A chunk of Wan2.1-1.3B takes tens of MiB of launches and one working set that all share.
        patience: the least recently used graph is evicted if it was used more than patience x limit calls ago.
        capture: how a loop is captured; None: as CUDA graphs, where there is a GPU.

    Attributes:
        reason: why the last call ran without a graph; None if it ran as one.
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
        self._last_seen: OrderedDict[Hashable, int] = OrderedDict()  # the call that saw a key last when it had no graph
        self._failed: dict[Hashable, str] = {}  # why a key that was seen cannot be captured
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
        rule: StepRule = CONSISTENCY,
    ) -> Trajectory:
        """Do what `sampler.denoise` does, as a graph where there is one."""

        def loop(noise: Tensor, fresh: Sequence[Tensor], text: TextContext) -> Trajectory:
            return denoise(model, noise, steps, fresh, text, context, rule=rule)

        addresses = context.addresses()
        self.reason = self._unsuitable(model, noise, addresses)
        if self.reason is None:
            shapes = tuple(tuple(tensor.shape) for tensor in (noise, *fresh, text.keys[0]))
            key = (addresses, shapes, noise.dtype, steps, rule, adapter_enabled(model))
            return self._run(key, loop, noise, fresh, text)
        return loop(noise, fresh, text)

    def _unsuitable(self, model: CausalWan, noise: Tensor, addresses: Hashable | None) -> str | None:
        """Return why this call cannot be a graph's, or None."""
        if self.mode == "off":
            return "rollout.cuda_graphs is off"
        if self._capture is None and model.device.type != "cuda":
            return f"the generator is on {model.device.type}, not on a GPU"
        if torch.is_grad_enabled():
            return "gradients are recorded"
        if model.ranks > 1:
            return "the weights are divided among ranks"
        if addresses is None:
            return "the context cannot say which addresses it reads"
        batch, frames, _, height, width = noise.shape
        tokens = frames * model.config.tokens_per_frame(height, width)
        if self.mode == "auto" and not launch_bound(model.config, batch, tokens):
            return "the arithmetic takes longer than the launches"
        return None

    def _run(self, key: Hashable, loop: Loop, noise: Tensor, fresh: Sequence[Tensor], text: TextContext) -> Trajectory:
        """Replay the graph of a key and copy away what comes out; run the loop itself where there is none."""
        self._calls += 1
        if key not in self._graphs:
            self.reason = self._new(key, loop, noise, fresh, text)
            if self.reason is not None:
                return loop(noise, fresh, text)  # which also warms up what must not be set up while a graph is captured
        graph = self._graphs[key]
        self._graphs.move_to_end(key)
        self._used[key] = self._calls
        graph.noise.copy_(noise)
        for target, draw in zip(graph.fresh, fresh):
            target.copy_(draw)
        self._text(text)
        graph.replay()
        outputs = [output.clone() for output in graph.outputs]
        return Trajectory(outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :])

    def _new(self, key: Hashable, loop: Loop, noise: Tensor, fresh: Sequence[Tensor], text: TextContext) -> str | None:
        """Capture a graph for a key; return why there is none, or None."""
        seen_before = self._last_seen.pop(key, None)
        self._last_seen[key] = self._calls
        if seen_before is None:
            if len(self._last_seen) > MAX_KEYS_SEEN:
                forgotten, _ = self._last_seen.popitem(last=False)
                self._failed.pop(forgotten, None)
            return "a chunk of these shapes and pages is seen for the first time"
        if key in self._failed:
            return self._failed[key]
        if len(self._graphs) >= self.limit:
            oldest = next(iter(self._graphs))
            last_use = self._used[oldest]
            if seen_before < last_use or self._calls - last_use <= self.patience * self.limit:
                return f"all {self.limit} graphs are in use"
            del self._graphs[oldest], self._used[oldest]
        graph = self._captured(loop, noise, fresh, text)
        if isinstance(graph, str):
            self._failed[key] = graph
            return graph
        self._graphs[key] = graph
        return None

    def _captured(self, loop: Loop, noise: Tensor, fresh: Sequence[Tensor], text: TextContext) -> _Captured | str:
        """Return a graph, or why there is none."""
        static_noise, static_fresh, static_text = noise.clone(), [tensor.clone() for tensor in fresh], self._text(text)
        capture = self._capture or partial(_cuda_capture, device=noise.device)

        def outputs() -> list[Tensor]:
            trajectory = loop(static_noise, static_fresh, static_text)
            return [*trajectory.inputs, *trajectory.predictions]

        try:
            captured, replay = capture(outputs)
        except RuntimeError as error:  # whatever an operator does that a graph cannot hold
            return f"the capture failed: {' '.join(str(error).split())[:200]}"
        return _Captured(static_noise, static_fresh, static_text, captured, replay, loop)

    def _text(self, text: TextContext) -> TextContext:
        """Return where graphs read a prompt of this shape, after copying this one there."""
        shape = (len(text.keys), tuple(text.keys[0].shape), text.keys[0].dtype)
        if shape not in self._texts:
            self._texts[shape] = TextContext([key.clone() for key in text.keys], [value.clone() for value in text.values]), text
        static_text, copied_text = self._texts[shape]
        if copied_text is not text:
            torch._foreach_copy_([*static_text.keys, *static_text.values], [*text.keys, *text.values])
            self._texts[shape] = static_text, text
        return static_text


_pool: Any = None


def _cuda_capture(function: Function, device: torch.device) -> tuple[Sequence[Tensor], Callable[[], object]]:
    """Capture a function as a CUDA graph. One memory pool serves all: outputs are copied away before another graph runs."""
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
