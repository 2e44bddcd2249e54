"""The causal Wan forward in plain PyTorch, after the official network: one video, one chunk at a time, a dense K/V cache of all frames.

The modules of a CausalWan are used as parameter holders: linear layers are called, adapted or not; all between them is written out here.
Shapes: B is 1; F frames of a chunk, N tokens of a frame, E = H * D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcopo_fast.model.causal_wan import CausalWan, GELUProjection

TextCache = list[tuple[Tensor, Tensor]]
"""Keys and values [1, text_len, H, D] of the prompt, for each block."""


class DenseCache:
    """Keys and values of every frame of one video in every layer, [1, frames * N, H, D]; a video that starts anew overwrites the last one.

    window: frames visible to a chunk, itself included (None: all). sink: first frames that stay visible.
    """

    def __init__(self, model: CausalWan, frames: int, tokens: int, window: int | None = None, sink: int = 0) -> None:
        shape = (1, frames * tokens, model.config.num_attention_heads, model.config.attention_head_dim)
        self.keys = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in model.blocks]
        self.values = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in model.blocks]
        self.tokens, self.window, self.sink = tokens, window, sink

    def extended(self, layer: int, frame: int, key: Tensor, value: Tensor, *, write: bool) -> tuple[Tensor, Tensor]:
        """Return what a chunk from `frame` on attends to: the visible frames before it, and its own keys and values [1, F * N, H, D].

        write: put the chunk into the cache. Without it the cache is a constant, and gradient flows into the chunk's own part only.
        """
        start, end = frame * self.tokens, frame * self.tokens + key.shape[1]
        hidden = 0 if self.window is None else max(0, end - self.window * self.tokens)
        if write:
            self.keys[layer][:, start:end] = key
            self.values[layer][:, start:end] = value
            if not hidden:
                return self.keys[layer][:, :end], self.values[layer][:, :end]
        sink = self.sink * self.tokens if hidden else 0
        keys, values = (
            torch.cat([cached[:, :sink], cached[:, sink + hidden : start], own], dim=1)
            for cached, own in ((self.keys[layer], key), (self.values[layer], value))
        )
        return keys, values


class ReferenceWan:
    """The forward over a CausalWan's weights."""

    def __init__(self, model: CausalWan) -> None:
        self.model = model
        self.config = model.config
        pairs = self.config.attention_head_dim // 2
        axes = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
        self.frequencies = [rope_table(1024, size).to(model.device) for size in axes]

    def encode_text(self, text: Tensor) -> TextCache:
        """Prompt embeddings [1, length, text_dim], padded with zeros to text_len."""
        model, config = self.model, self.config
        padded = text.new_zeros(1, config.text_len, config.text_dim)
        padded[:, : text.shape[1]] = text
        embedder = model.condition_embedder.text_embedder
        hidden = embedder.linear_1(padded.to(model.device, model.dtype))
        hidden = embedder.linear_2(F.gelu(hidden, approximate="tanh"))
        cache = []
        for block in model.blocks:
            key = rms_norm(block.attn2.to_k(hidden), block.attn2.norm_k.weight, config.eps)
            cache.append((self.heads(key), self.heads(block.attn2.to_v(hidden))))
        return cache

    def __call__(self, x: Tensor, timestep: float, text: TextCache, cache: DenseCache, frame: int, *, write: bool) -> Tensor:
        """The flow [1, F, C, h, w] of a chunk x that starts at `frame` of the video, at one timestep; for `write` see `DenseCache`."""
        model = self.model
        hidden = model.patch_embedding(x.to(model.dtype).transpose(1, 2))  # [1, E, F, rows, columns]
        grid = hidden.shape[2:]
        hidden = hidden.flatten(2).transpose(1, 2)  # [1, F * N, E]
        embedding, modulation = self.embed_time(timestep)
        rotation = self.rotation(frame, grid)
        for layer, block in enumerate(model.blocks):
            shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (block.scale_shift_table + modulation).chunk(6, dim=1)  # [1, 1, E] each
            # Self-attention
            normed = self.layer_norm(hidden) * (1 + scale_a) + shift_a
            attention = block.attn1
            query = rms_norm(attention.to_q(normed), attention.norm_q.weight, self.config.eps)
            key = rms_norm(attention.to_k(normed), attention.norm_k.weight, self.config.eps)
            query, key, value = self.heads(query), self.heads(key), self.heads(attention.to_v(normed))
            keys, values = cache.extended(layer, frame, apply_rope(key, rotation), value, write=write)
            hidden = hidden + attention.to_out[0](attend(apply_rope(query, rotation), keys, values)) * gate_a
            # Cross-attention to the prompt
            attention = block.attn2
            normed = self.layer_norm(hidden, block.norm2)
            query = rms_norm(attention.to_q(normed), attention.norm_q.weight, self.config.eps)
            hidden = hidden + attention.to_out[0](attend(self.heads(query), *text[layer]))
            # Feed-forward
            normed = self.layer_norm(hidden) * (1 + scale_f) + shift_f
            up, _, down = block.ffn.net
            assert isinstance(up, GELUProjection)
            hidden = hidden + down(F.gelu(up.proj(normed), approximate="tanh")) * gate_f
        shift, scale = (model.scale_shift_table + embedding.unsqueeze(1)).chunk(2, dim=1)
        out = model.proj_out(self.layer_norm(hidden) * (1 + scale) + shift)  # [1, F * N, patch rows * patch columns * C]
        frames, rows, columns = grid
        _, patch_rows, patch_columns = self.config.patch_size
        out = out.view(1, frames, rows, columns, patch_rows, patch_columns, self.config.out_channels)
        out = torch.einsum("bfrcpqo->bforpcq", out)
        return out.reshape(1, frames, self.config.out_channels, rows * patch_rows, columns * patch_columns)

    def embed_time(self, timestep: float) -> tuple[Tensor, Tensor]:
        """Embedding [1, E] and modulation [1, 6, E] of a timestep, by sinusoids in float64."""
        model = self.model
        half = self.config.freq_dim // 2
        position = torch.tensor([timestep], dtype=torch.float64, device=model.device)
        steps = torch.arange(half, dtype=torch.float64, device=model.device).div(half)
        angles = torch.outer(position, torch.pow(10000, -steps))
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1).to(model.dtype)
        embedder = model.condition_embedder
        embedding = embedder.time_embedder.linear_2(F.silu(embedder.time_embedder.linear_1(sinusoids)))
        return embedding, embedder.time_proj(F.silu(embedding)).unflatten(1, (6, -1))

    def rotation(self, frame: int, grid: tuple[int, ...]) -> Tensor:
        """The unit complex numbers that turn the pairs of every token of a grid, [F * N, 1, D / 2] complex128."""
        frames, rows, columns = grid
        time, row, column = self.frequencies
        parts = [
            time[frame : frame + frames].view(frames, 1, 1, -1).expand(frames, rows, columns, -1),
            row[:rows].view(1, rows, 1, -1).expand(frames, rows, columns, -1),
            column[:columns].view(1, 1, columns, -1).expand(frames, rows, columns, -1),
        ]
        return torch.cat(parts, dim=-1).reshape(frames * rows * columns, 1, -1)

    def layer_norm(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        weight, bias = (norm.weight, norm.bias) if norm is not None else (None, None)
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.config.eps)

    def heads(self, x: Tensor) -> Tensor:
        """[1, tokens, E] -> [1, tokens, H, D]"""
        return x.unflatten(-1, (self.config.num_attention_heads, -1))


def rope_table(positions: int, pairs: int) -> Tensor:
    """exp(i p 10000^(-j / pairs)) for each position p and pair j, [positions, pairs] complex128."""
    frequencies = 1.0 / torch.pow(10000, torch.arange(pairs, dtype=torch.float64).div(pairs))
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rope(x: Tensor, rotation: Tensor) -> Tensor:
    """x [1, tokens, H, D], neighboring elements as complex numbers."""
    pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the full dimension, all heads together; in float32 or wider, rounded before the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)).to(x.dtype) * weight


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[1, tokens, H, D] -> [1, tokens, E], by the backend that PyTorch chooses."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
