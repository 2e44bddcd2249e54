"""LoRA through peft: float32 master adapters over a frozen base, and their files.

peft's layers are injected into the module itself, so its class, its attributes and its forward stay as they are. Code that multiplies
with `layer.weight` instead of calling the layer would bypass the adapter, silently. Where the base computes in half precision, so do the
adapters; what is stored, trained and saved is float32. The arithmetic of an adapted layer is `AdaptedLinear`: peft's own passes six times
over the layer's output, half of all that a block of Wan moves.
A saved adapter is a directory with two forms of the same numbers: PEFT's, and diffusers' for WanPipeline.load_lora_weights.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from arcopo_fast.errors import UserError, listed, misfit
from arcopo_fast.model.adapter_files import (
    ADAPTER_NAME,
    DIFFUSERS_METADATA,
    DIFFUSERS_PREFIX,
    DIFFUSERS_WEIGHTS,
    PEFT_WEIGHTS,
    Adapter,
    read_adapter,
)
from arcopo_fast.model.checkpoints import atomic_directory, save_tensors

if TYPE_CHECKING:  # peft is imported where it is used: it takes as long as PyTorch, and a command line is read without it
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

# Every linear layer of a transformer block, ten in each; what LongLive adapts.
BLOCK_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

_PEFT_PREFIX = "base_model.model."

Module = TypeVar("Module", bound=nn.Module)


class AdaptedLinear(torch.autograd.Function):
    """W x + b + s B A x, with gradient for x, A and B: the adapter is added where the base's product lies.

    Written out, s B A x is a tensor as large as the output, scaled and added in passes of its own; here a matrix product adds it. A and B
    work in x's dtype, and their gradients come in their own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """Return W x + b + s B A x, [..., out].

        Args:
            ctx: None when no gradient is wanted.
            x: [..., in].
            weight, bias: W [out, in] and b [out] or None, frozen.
            down, up: A [r, in] and B [out, r].
            scale: s.
        """
        rows, a, b = x.reshape(-1, x.shape[-1]), down.to(x.dtype), up.to(x.dtype)
        reduced = rows @ a.T
        out = functional.linear(rows, weight, bias)
        torch.addmm(out, reduced, b.T, alpha=scale, out=out)  # addmm_ by the name under which its FLOP are counted
        if ctx is not None:
            ctx.save_for_backward(rows, reduced, weight, a, b)
            ctx.scale, ctx.dtypes = scale, (down.dtype, up.dtype)
        return out.view(*x.shape[:-1], len(up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `forward`'s arguments; those of W, b and s are None."""
        rows, reduced, weight, a, b = ctx.saved_tensors
        shape, grad = grad.shape[:-1], grad.reshape(-1, len(b))
        grad_reduced = (grad @ b).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x = torch.addmm(grad_x, grad_reduced, a, out=grad_x).view(*shape, weight.shape[1])
        grad_down = (grad_reduced.T @ rows).to(ctx.dtypes[0])
        grad_up = (grad.T @ reduced).mul_(ctx.scale).to(ctx.dtypes[1])
        return grad_x, None, None, grad_down, grad_up, None


@cache
def _layer_class() -> type[nn.Module]:
    """Return peft's adapted layer with our arithmetic; whatever else peft can do with a layer, it does itself."""
    from peft.tuners.lora import Linear

    class Layer(Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.disable_adapters or self.merged or self.active_adapters != [ADAPTER_NAME]:
                return super().forward(x)
            base, (down, up) = self.get_base_layer(), _pair(self)
            arguments = x, base.weight, base.bias, down.weight, up.weight, self.scaling[ADAPTER_NAME]
            # Without gradient a function of autograd would only take the host's time.
            return AdaptedLinear.apply(*arguments) if torch.is_grad_enabled() else AdaptedLinear.forward(None, *arguments)

    return Layer


# In a module -----------------------------------------------------------------------------------------------------------------------


def add_lora(
    module: Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = BLOCK_TARGETS,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Module:
    """Freeze a module and give its targeted linear layers trainable adapters: W x + (alpha / rank) B A x. Returns the same module.

    A is drawn as peft does (uniform, Kaiming), but each layer from its own generator keyed by `seed` and the layer's name: the global
    generator is neither read nor moved, and more targets do not change the draws of the others. B is zero.

    Args:
        targets: names of linear layers, whole or from some dot on: "to_q" is to_q of both attentions of every block.
        dtype: of the adapters, whatever the base has.
        device: of the adapters; None: that of the base.

    Raises:
        UserError: a target names no linear layer, or rank or alpha is not positive.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1 or alpha <= 0:
        raise UserError(f"LoRA rank {rank}, alpha {alpha}: both must be positive")
    if _layers(module):
        raise ValueError("the module has an adapter already")
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    for target in targets:
        if not _matching(linear, [target]):
            known = ", ".join(sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in linear})) or "none"
            raise UserError(f"LoRA target {target!r} matches no linear layer; there are {known}")
    if not targets:
        raise UserError("LoRA needs at least one target layer")
    peft_alpha = int(alpha) if alpha == int(alpha) else alpha  # peft declares an integer, and computes with either
    config = LoraConfig(r=rank, lora_alpha=cast(int, peft_alpha), target_modules=list(targets), lora_dropout=0.0, bias="none")
    config._register_custom_module({nn.Linear: _layer_class()})
    # Freezes the module, and makes the adapter on the meta device: nothing is drawn.
    inject_adapter_in_model(config, module, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True)
    for name, layer in _layers(module):
        base_device = cast(nn.Linear, layer.get_base_layer()).weight.device
        down, up = _pair(layer)
        key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
        bound = down.in_features**-0.5
        weight = torch.empty(rank, down.in_features).uniform_(-bound, bound, generator=generator)
        down.weight = nn.Parameter(weight.to(device or base_device, dtype))
        up.weight = nn.Parameter(torch.zeros(up.out_features, rank, device=device or base_device, dtype=dtype))
    return module


def adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the adapter's parameters, A and B of each layer, in the order of the module's layers."""
    return [parameter for _, layer in _layers(module) for linear in _pair(layer) for parameter in linear.parameters()]


def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors, detached but not copied, as `<module>.lora_A.weight` and `<module>.lora_B.weight`."""
    state = {}
    for name, layer in _layers(module):
        down, up = _pair(layer)
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = down.weight.detach(), up.weight.detach()
    return state


def frozen_name(name: str) -> str | None:
    """Return the name that a tensor of the base has without an adapter, given its name in an adapted module; None: it is the adapter's."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def frozen_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the base's tensors, detached but not copied, under the names that they have without an adapter."""
    return {plain: tensor for name, tensor in module.state_dict().items() if (plain := frozen_name(name)) is not None}


def load_adapter_state(module: nn.Module, state: Mapping[str, Tensor], *, source: str | Path = "the adapter") -> None:
    """Copy what `adapter_state` returned into a module that has such an adapter: all of it, or a `UserError` that lists what differs."""
    current = adapter_state(module)
    given, needed = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (state, current))
    if problems := misfit(given, needed):
        raise UserError(f"{source} does not fit the module's adapter: {problems}; use the same base, rank and targets")
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(state[name])


def set_adapter(module: nn.Module, adapter: Adapter | None, scale: float = 1.0) -> None:
    """Let a module compute W + scale dW from now on; without `adapter`, W.

    The module has an adapter with room for this one: its layers, at least its rank. What lies beside it there is zero and adds exactly
    nothing, and so does all of it for None: the module's adapter is not disabled, because CUDA graphs that an engine captured without its
    operations would be replayed with it.
    """
    state = {name: torch.zeros_like(tensor) for name, tensor in adapter_state(module).items()}
    if adapter is not None:
        config = _config(module)
        module_scale = config.lora_alpha / config.r
        factor = scale if adapter.alpha / adapter.rank == module_scale else scale * adapter.alpha / adapter.rank / module_scale
        for name, tensor in adapter.state.items():
            if ".lora_A." in name:
                state[name][: adapter.rank] = tensor
            else:
                state[name][:, : adapter.rank] = tensor.float() * factor
    load_adapter_state(module, state)


@contextmanager
def adapter_disabled(module: nn.Module) -> Iterator[None]:
    """Let the module compute what its base computes, within the block. May be nested; `requires_grad` flags come out as they went in."""
    layers = _tuner_layers(module)
    disabled_before = [layer.disable_adapters for layer in layers]
    flags = [(parameter, parameter.requires_grad) for parameter in adapter_parameters(module)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, disabled in zip(layers, disabled_before, strict=True):
            layer.enable_adapters(not disabled)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def adapter_enabled(module: nn.Module) -> bool:
    """Return whether the module computes with an adapter: it has one, and is not within `adapter_disabled`."""
    return any(not layer.disable_adapters for layer in _tuner_layers(module))


def _tuner_layers(module: nn.Module) -> list[BaseTunerLayer]:
    """Return the layers with an adapter of any kind that peft has."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def _layers(module: nn.Module) -> list[tuple[str, LoraLayer]]:
    from peft.tuners.lora import LoraLayer

    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer)]


def _pair(layer: LoraLayer) -> tuple[nn.Linear, nn.Linear]:
    """Return A and B of one adapted layer."""
    return cast(nn.Linear, layer.lora_A[ADAPTER_NAME]), cast(nn.Linear, layer.lora_B[ADAPTER_NAME])


def _config(module: nn.Module) -> LoraConfig:
    return cast("dict[str, LoraConfig]", module.peft_config)[ADAPTER_NAME]  # peft leaves it on the module that it injects into


def _matching(names: Sequence[str], targets: Sequence[str]) -> set[str]:
    """Return the names that peft adapts for a list of targets."""
    return {name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)}


# In files --------------------------------------------------------------------------------------------------------------------------


def save_adapter(directory: str | Path, module: nn.Module, *, base_model: str | None = None, more: Mapping[str, str] | None = None) -> None:
    """Write the adapter in PEFT form (`adapter_model.safetensors`, `adapter_config.json`) and diffusers form
    (`pytorch_lora_weights.safetensors`), complete or not at all.

    The PEFT form has the adapter's tensors as they are, and alpha in its configuration. The diffusers form has B multiplied by
    alpha / rank: some readers of such files know no alpha, and take alpha = rank. Its header says so to the others.

    Args:
        base_model: recorded as `base_model_name_or_path`.
        more: other files of the directory, as text by name.

    Raises:
        UserError: the directory cannot be written, or holds other files.
    """
    state = adapter_state(module)
    if not state:
        raise ValueError("the module has no adapter")
    config = _config(module)
    adapter = Adapter(state, config.r, config.lora_alpha)
    write_adapter(directory, adapter, targets=sorted(config.target_modules or ()), base_model=base_model, more=more)


def write_adapter(
    directory: str | Path,
    adapter: Adapter,
    *,
    targets: Sequence[str] | None = None,
    base_model: str | None = None,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter that is in no module, as `save_adapter` does.

    Args:
        targets: as `add_lora` takes them; None: every adapted layer by its full name.
        base_model, more: see `save_adapter`.
    """
    from peft import LoraConfig

    rank, alpha = adapter.rank, int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    config = LoraConfig(r=rank, lora_alpha=cast(int, alpha), lora_dropout=0.0, bias="none", inference_mode=True)
    config.target_modules = cast("set[str]", list(targets or adapter.modules))  # peft keeps a set, whose order changes from run to run
    config.base_model_name_or_path = base_model
    scale = adapter.alpha / rank
    baked = {DIFFUSERS_PREFIX + name: tensor * scale if ".lora_B." in name else tensor for name, tensor in adapter.state.items()}
    about = {"r": rank, "lora_alpha": rank, "target_modules": adapter.modules}
    header = json.dumps({DIFFUSERS_PREFIX + key: value for key, value in about.items()}, sort_keys=True)
    with atomic_directory(directory) as temporary:
        config.save_pretrained(str(temporary))
        save_tensors(temporary / PEFT_WEIGHTS, {_PEFT_PREFIX + name: tensor for name, tensor in adapter.state.items()})
        save_tensors(temporary / DIFFUSERS_WEIGHTS, baked, {DIFFUSERS_METADATA: header})
        for name, text in (more or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")


def merge_adapters(first: Adapter, second: Adapter, scale: float) -> Adapter:
    """Return the adapter that adds `first` and `scale` times `second`, exactly: dW_1 + s dW_2 = [B_1, s B_2] [A_1; A_2], no decomposition.

    Its rank is the sum of both, its alpha equal to the rank; each adapter's own alpha / rank goes into its B. A layer that only one of
    them adapts gets zeros from the other. Source: AR-CoPO's merge of the semi-on-policy and the on-policy adapter.

    Raises:
        UserError: the adapters are not of one base model: a layer of both has different sizes.
    """
    rank = first.rank + second.rank
    state: dict[str, Tensor] = {}
    for name in sorted({*first.modules, *second.modules}):
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        pair_1, pair_2 = ([adapter.state[key] for key in (down, up)] if down in adapter.state else None for adapter in (first, second))
        present = pair_1 or pair_2
        assert present is not None
        if pair_1 and pair_2 and (pair_1[0].shape[1], pair_1[1].shape[0]) != (pair_2[0].shape[1], pair_2[1].shape[0]):
            sizes = " and ".join(f"{a.shape[1]} to {b.shape[0]}" for a, b in (pair_1, pair_2))
            raise UserError(f"the adapters of {name} go from {sizes}; only adapters that were trained over one base model can be merged")
        downs, ups = [], []
        for adapter, factor, pair in ((first, 1.0, pair_1), (second, scale, pair_2)):
            if pair is None:
                pair = [present[0].new_zeros(adapter.rank, present[0].shape[1]), present[1].new_zeros(present[1].shape[0], adapter.rank)]
            downs.append(pair[0].float())
            ups.append(pair[1].float() * (factor * adapter.alpha / adapter.rank))
        state[down], state[up] = torch.cat(downs), torch.cat(ups, dim=1)
    return Adapter(state, rank, float(rank))


def check_layers(adapter: Adapter, layers: Mapping[str, tuple[int, int]], source: str | Path) -> None:
    """Raise `UserError` if an adapter does not fit linear layers, given by their names with inputs and outputs."""
    if strangers := [name for name in adapter.modules if name not in layers]:
        raise UserError(f"{source} adapts {len(strangers)} layers that the model lacks ({listed(strangers)}); use its own base model")
    for name in adapter.modules:
        down, up, (inputs, outputs) = adapter.state[f"{name}.lora_A.weight"], adapter.state[f"{name}.lora_B.weight"], layers[name]
        if (down.shape[1], up.shape[0]) != (inputs, outputs):
            sizes = f"{down.shape[1]} to {up.shape[0]}, the model's layer goes from {inputs} to {outputs}"
            raise UserError(f"{source}: the adapter of {name} goes from {sizes}; use its own base model")


def fold_adapter(state: dict[str, Tensor], adapter: Adapter, *, source: str | Path = "the adapter") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state dict under diffusers names, which are taken out of it, with the adapter in the weights.

    That is W + (alpha / r) B A, computed and left in float32, one tensor at a time: the adapter is folded before the weights are rounded to
    the dtype they are used in, which is closer to what it was trained as than three half-precision products.

    Raises:
        UserError: the adapter has layers or shapes that the model lacks.
    """
    layers = {name.removesuffix(".weight"): tensor.shape for name, tensor in state.items() if tensor.dim() == 2}
    check_layers(adapter, {name: (inputs, outputs) for name, (outputs, inputs) in layers.items()}, source)
    adapted = {f"{name}.weight": name for name in adapter.modules}
    for name in list(state):
        tensor = state.pop(name)
        if name in adapted:
            down, up = (adapter.state[f"{adapted[name]}.lora_{part}.weight"].float() for part in "AB")
            tensor = torch.addmm(tensor.float(), up, down, alpha=adapter.alpha / adapter.rank)
        yield name, tensor


def load_adapter(module: Module, path: str | Path, *, scale: float = 1.0) -> Module:
    """Read an adapter (see `read_adapter`) into a module, which then computes W + scale dW; one without adapter is given it.

    Returns the same module.

    Raises:
        UserError: `read_adapter`'s, or the adapter has other layers, shapes or scale than the module.
    """
    adapter = read_adapter(path)
    layers = _layers(module)
    if not layers:
        linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
        check_layers(adapter, {name: (layer.in_features, layer.out_features) for name, layer in linear.items()}, path)
        suffixes = sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in adapter.modules})
        every_block = _matching(list(linear), suffixes) == set(adapter.modules)
        add_lora(module, rank=adapter.rank, alpha=adapter.alpha, targets=suffixes if every_block else adapter.modules, seed=0)
    else:
        own_config = _config(module)
        if (own_config.r, own_config.lora_alpha) != (adapter.rank, adapter.alpha):
            conflict = f"the module's adapter has rank {own_config.r} and alpha {own_config.lora_alpha:g}"
            raise UserError(f"{path} has rank {adapter.rank} and alpha {adapter.alpha:g}, {conflict}; configure the same")
    load_adapter_state(module, adapter.state, source=path)
    if scale != 1:
        set_adapter(module, adapter, scale)
    return module
