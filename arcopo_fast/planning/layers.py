"""The layers of a generator, counted from its sizes by arithmetic alone: before anything is built, without a tensor."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import NamedTuple

from arcopo_fast.model.sizes import CausalWanConfig, VAESizes

# The transformer -------------------------------------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """A linear layer.

    Attributes:
        inputs, outputs: features.
        source: the tensor that it reads; layers with the same source read the same one.
        of_text: it reads the text.
    """

    inputs: int
    outputs: int
    source: str
    of_text: bool = False


def block_linears(config: CausalWanConfig) -> dict[str, Linear]:
    """Return the linear layers of one block, by their names in it."""
    dim, inner = config.dim, config.ffn_dim
    return {
        **{f"attn1.to_{part}": Linear(dim, dim, "norm1") for part in "qkv"},
        "attn1.to_out.0": Linear(dim, dim, "attn1"),
        "attn2.to_q": Linear(dim, dim, "norm2"),
        **{f"attn2.to_{part}": Linear(dim, dim, "text", of_text=True) for part in "kv"},
        "attn2.to_out.0": Linear(dim, dim, "attn2"),
        "ffn.net.0.proj": Linear(dim, inner, "norm3"),
        "ffn.net.2": Linear(inner, dim, "gelu"),
    }


def transformer_parameters(config: CausalWanConfig) -> int:
    """Return the number of a transformer's parameters."""
    dim, patch = config.dim, config.patch_size[1] * config.patch_size[2]
    linears = [(linear.inputs, linear.outputs) for linear in block_linears(config).values()] * config.num_layers
    linears += [(config.in_channels * patch, dim), (dim, config.out_channels * patch), (dim, 6 * dim)]
    linears += [(config.text_dim, dim), (dim, dim), (config.freq_dim, dim), (dim, dim)]
    # Beside the linears a block has four q/k norms, an affine LayerNorm and a table of six rows; the head has a table of two.
    return sum(inputs * outputs + outputs for inputs, outputs in linears) + config.num_layers * 12 * dim + 2 * dim


# The VAE ---------------------------------------------------------------------------------------------------------------------------


class Convolution(NamedTuple):
    """A convolution of the decoder (or encoder, which is only counted).

    Attributes:
        inputs, outputs: channels.
        taps: elements of its kernel.
        spatial, temporal: rows of its output for each latent row, frames for each latent frame.
        cached: the decoder keeps its last two input frames from call to call.
    """

    inputs: int
    outputs: int
    taps: int
    spatial: int = 1
    temporal: int = 1
    cached: bool = False


@cache
def decoder_convolutions(vae: VAESizes) -> tuple[Convolution, ...]:
    """Return the convolutions of diffusers' WanDecoder3d, in the order of its forward pass."""
    base = vae.decoder_base_dim or vae.base_dim
    widths = [base * factor for factor in (vae.dim_mult[-1], *reversed(vae.dim_mult))]
    layers = [Convolution(vae.z_dim, widths[0], 27, cached=True), *_middle(widths[0])]
    spatial = temporal = 1
    for level, (inputs, outputs) in enumerate(pairwise(widths)):
        if level and not vae.is_residual:
            inputs //= 2
        for block in range(vae.num_res_blocks + 1):
            layers += _residual(outputs if block else inputs, outputs, spatial, temporal)
        if level < len(vae.dim_mult) - 1:
            if vae.temperal_downsample[-1 - level]:
                layers.append(Convolution(outputs, 2 * outputs, 3, spatial, temporal, cached=True))
                temporal *= 2
            spatial *= 2
            layers.append(Convolution(outputs, outputs if vae.is_residual else outputs // 2, 9, spatial, temporal))
    return *layers, Convolution(widths[-1], vae.out_channels, 27, spatial, temporal, cached=True)


def vae_parameters(vae: VAESizes) -> int:
    """Return the parameters of encoder and decoder, but for the scales of their norms, a thousandth."""
    widths = [vae.base_dim * factor for factor in (1, *vae.dim_mult)]
    encoder = [Convolution(vae.in_channels, widths[0], 27), *_middle(widths[-1]), Convolution(widths[-1], 2 * vae.z_dim, 27)]
    for level, (inputs, outputs) in enumerate(pairwise(widths)):
        for block in range(vae.num_res_blocks):
            encoder += _residual(outputs if block else inputs, outputs)
        if level < len(vae.dim_mult) - 1:
            encoder += [Convolution(outputs, outputs, 9), *[Convolution(outputs, outputs, 3)] * vae.temperal_downsample[level]]
    between = [Convolution(width, width, 1) for width in (2 * vae.z_dim, vae.z_dim)]
    return sum(conv.inputs * conv.outputs * conv.taps + conv.outputs for conv in [*encoder, *between, *decoder_convolutions(vae)])


def _residual(inputs: int, outputs: int, spatial: int = 1, temporal: int = 1) -> list[Convolution]:
    scale = (spatial, temporal)
    pair = [Convolution(inputs, outputs, 27, *scale, cached=True), Convolution(outputs, outputs, 27, *scale, cached=True)]
    return pair if inputs == outputs else [*pair, Convolution(inputs, outputs, 1, *scale)]


def _middle(width: int) -> list[Convolution]:
    return [*_residual(width, width), Convolution(width, 3 * width, 1), Convolution(width, width, 1), *_residual(width, width)]
