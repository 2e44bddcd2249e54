"""A generator of a few layers with an adapter, the same one in diffusers, and inputs of both."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from peft import PeftModel
from torch import Tensor, nn

from arcopo_fast.model import lora
from arcopo_fast.model.causal_wan import CausalWan
from support.models import TINY

RANK, ALPHA = 3, 7.0  # alpha / rank is neither 1 nor a power of two


ROUNDING = 2e-5  # of the largest value


def copy_of(model: CausalWan) -> CausalWan:
    """A plain model with the same base weights."""
    plain = CausalWan(TINY)
    plain.load_state_dict({name.replace(".base_layer.", "."): t for name, t in model.state_dict().items() if ".lora_" not in name})
    return plain


def adapted(model: CausalWan, rank: int = RANK, alpha: float = ALPHA, targets: tuple[str, ...] = lora.BLOCK_TARGETS) -> CausalWan:
    lora.add_lora(model, rank=rank, alpha=alpha, targets=targets, seed=5)
    for parameter in lora.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def as_diffusers(model: CausalWan) -> WanTransformer3DModel:
    """diffusers' network with the same base weights."""
    sizes = {name: value for name, value in TINY.to_dict().items() if name != "text_len"}
    theirs = WanTransformer3DModel(**sizes).eval()
    theirs.load_state_dict(copy_of(model).state_dict())
    return theirs


class Inputs:
    """One first chunk, for our network and for diffusers'."""

    def __init__(self) -> None:
        self.latents, self.text = torch.randn(2, 3, 4, 8, 6), torch.randn(2, TINY.text_len, TINY.text_dim)
        self.timestep = 1000 * torch.rand(2, 1)

    @torch.no_grad()
    def through(self, model: nn.Module) -> Tensor:
        if isinstance(model, WanTransformer3DModel):
            return model(self.latents.transpose(1, 2), self.timestep[:, 0], self.text).sample.transpose(1, 2)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        return model(self.latents, self.timestep, base.encode_text(self.text))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= ROUNDING, f"{error:.1e} of the largest value"
