"""The frozen weights divided among the ranks of a job, by PyTorch's `fully_shard`: for a base that one GPU does not hold.

Each rank keeps its rows of every weight, 1 / ranks of the model. Each block is a unit: its weights are gathered while it computes, and let
go after it. The adapters are no part of this: every rank has them whole, in float32, and their gradients are summed elsewhere.

A unit is gathered by all ranks together, so all must run the network equally often and in the same order: a rank that does not come keeps
the others waiting.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from arcopo_fast.errors import UserError
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.model.checkpoints import check_fit
from arcopo_fast.model.lora import adapter_parameters, adapter_state, frozen_name, frozen_state
from arcopo_fast.model.sizes import CausalWanConfig
from arcopo_fast.model.tensors import check_finite
from arcopo_fast.runtime.distributed import World

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before PyTorch 2.13


def load_sharded(
    sizes: CausalWanConfig,
    weights: Iterable[tuple[str, Tensor]],
    adapt: Callable[[CausalWan], object],
    world: World,
    *,
    dtype: torch.dtype,
    device: torch.device,
    source: str | Path,
) -> CausalWan:
    """Return an adapted causal Wan whose frozen weights are divided among all ranks. A rank keeps only its rows of each weight.

    Args:
        weights: the base's tensors by name, whole, on any device; best mapped files, of which a rank then reads only its rows.
        adapt: gives the model its adapters, on the device.
        source: the file named in messages.

    Raises:
        UserError: names are missing or unexpected, or shapes differ, or a value is not finite; on every rank, whichever found it.
    """
    with torch.device("meta"):
        model = CausalWan(sizes).to(dtype).requires_grad_(False)
    adapt(model)
    shard(model, world, device)
    problem = ""
    try:
        _load(model, weights, world, device, source)
    except UserError as error:
        problem = str(error)
    if found := next(filter(None, world.gathered(problem)), None):
        raise UserError(found)
    return model


def shard(model: CausalWan, world: World, device: torch.device) -> None:
    """Divide the frozen weights of a model, which may be on the meta device, among all ranks. Its adapters stay as they are.

    Adapters that are added later would take the size of this rank's rows for the layer's, in some versions of peft.
    """
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world.size,)),
        "reshard_after_forward": True,
        "ignored_params": set(adapter_parameters(model)),
    }
    gather: Any = _Gather(world)  # PyTorch has no public name for its type
    for block in model.blocks:
        fully_shard(block, **options).set_custom_all_gather(gather)
        register_fsdp_forward_method(block, "text")
    fully_shard(model, **options).set_custom_all_gather(gather)
    register_fsdp_forward_method(model, "encode_text")  # the first to run must be the whole model, not a block
    if any(".attn2.to_k." in name or ".attn2.to_v." in name for name in adapter_state(model)):
        model.condition_embedder.text_embedder.register_forward_hook(_with_gradient)
    model.ranks = world.size
    # A block's keys of the text are a view. The warning is about writing to it, which nothing does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


class _Gather:
    """Gathers a unit's weights, as PyTorch does by default; where it fails, another rank is lost."""

    def __init__(self, world: World) -> None:
        self.world = world

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        return self.world.together(lambda: _all_gather(output_tensor, input_tensor, group=group, async_op=async_op))


def _with_gradient(module: nn.Module, inputs: object, embedding: Tensor) -> None:
    """Let the prompt's embedding take a gradient, whether needed or not: its arrival is the sign to let go of a block's weights.

    Without it the backward pass of the adapted keys and values of the text would gather the blocks one by one and keep them all to its end.
    """
    if torch.is_grad_enabled():
        embedding.requires_grad_()


def _load(model: CausalWan, weights: Iterable[tuple[str, Tensor]], world: World, device: torch.device, source: str | Path) -> None:
    """Give a divided model on the meta device this rank's rows of each weight, all of them or nothing."""
    needed, given, pieces = frozen_state(model), {}, {}
    for name, weight in weights:
        given[name] = weight.shape
        if name in needed and weight.shape == needed[name].shape:
            rows = -(-len(weight) // world.size)  # of every rank but the last ones, as torch.chunk divides
            piece = weight[rows * world.rank : rows * (world.rank + 1)]
            check_finite({name: piece}, source)
            pieces[name] = piece.to(device, needed[name].dtype, copy=True, memory_format=torch.contiguous_format)
    check_fit(given, needed, CausalWan.__name__, source)
    divided = {}
    for name, parameter in model.state_dict().items():
        if (plain := frozen_name(name)) is not None:
            spec = {"shape": parameter.shape, "stride": parameter.stride()}
            divided[name] = DTensor.from_local(pieces.pop(plain), parameter.device_mesh, parameter.placements, run_check=False, **spec)
    model.load_state_dict(divided, strict=False, assign=True)
