"""The causal Wan video transformer: one chunk of latent frames at a time, over whatever cached frames it is shown.

Parameter names are those of diffusers' WanTransformer3DModel, so its tools, LoRA files and checkpoints fit. Every size comes from the
configuration. The module knows nothing of pages, windows or samplers: a `ChunkContext` tells it which cached keys are visible, at which
RoPE positions the chunk stands, and takes the chunk's own keys and values if they are to be kept.

Behavior follows the official Self-Forcing network exactly, bf16 rounding points included (see `arcopo_kernels.qk_norm_rope.reference`
and `arcopo_kernels.modulation.reference`, which are the specification of what lies between the matrix products).
"""

from __future__ import annotations

from typing import Hashable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from arcopo_kernels.attention import Segment, segment_attention
from arcopo_kernels.modulation import gated_residual, gated_residual_layer_norm_modulate, layer_norm_modulate
from arcopo_kernels.qk_norm_rope import apply_rope, qk_norm_rope, rms_norm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from arcopo_fast.model.sizes import CausalWanConfig


class CachedRun(NamedTuple):
    """Consecutive cached frames of one layer.

    Attributes:
        key, value: [1 or B, T, H, D], in the model's dtype.
        first_position: RoPE time position of the first frame, for keys that are cached un-roped; None for keys cached roped.
        frozen: no gradient flows into it; only teacher forcing, which trains the context too, clears it.
    """

    key: Tensor
    value: Tensor
    first_position: int | None = None
    frozen: bool = True


class ChunkContext:
    """Everything that one chunk sees besides itself. This base class is the start of a video: nothing, positions from 0, nothing kept.

    Attributes:
        query_position: RoPE time position of the chunk's first frame, for queries.
        key_position: the same for keys; it differs from the queries' in one official variant only.
        keep: `store` wants the chunk's keys and values.
        keep_roped: it wants the keys with RoPE applied, not before.
    """

    query_position: int = 0
    key_position: int = 0
    keep: bool = False
    keep_roped: bool = True

    def cached(self, layer: int) -> Sequence[CachedRun]:
        """Return the visible cached frames of one layer."""
        return ()

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Take the chunk's keys and values [B, T, H, D]."""

    def addresses(self) -> Hashable | None:
        """Return what is equal for contexts that read the same addresses in the same way, as a captured graph needs; None if not known."""
        return (self.query_position, self.key_position) if not self.keep and type(self) is ChunkContext else None


class TextContext(NamedTuple):
    """Keys and values of the prompt for every layer's cross-attention.

    Attributes:
        keys, values: one tensor for each layer, [1 or B, text_len, H, D], in the model's dtype.
    """

    keys: list[Tensor]
    values: list[Tensor]


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; in bf16 the normalized value is rounded before the weight is applied, as officially."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """The projections and q/k norms of self- or cross-attention; q and k are normalized over the full dimension."""

    def __init__(self, config: CausalWanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)

    def query(self, x: Tensor) -> Tensor:
        """Return the normalized queries [B, T, H, D] of x [B, T, E]."""
        return self.split(self.norm_q(self.to_q(x)))

    def key(self, x: Tensor) -> Tensor:
        """Return the normalized keys [B, T, H, D] of x [B, T, E], without RoPE."""
        return self.split(self.norm_k(self.to_k(x)))

    def value(self, x: Tensor) -> Tensor:
        """Return the values [B, T, H, D] of x [B, T, E]."""
        return self.split(self.to_v(x))

    def roped_query_key(self, x: Tensor, context: ChunkContext, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Return query and key at the positions of `context`, both [B, T, H, D]: norms and RoPE of both in one pass."""
        query, key = self.split(self.to_q(x)), self.split(self.to_k(x))
        weights, positions = (self.norm_q.weight, self.norm_k.weight), (context.query_position, context.key_position)
        return qk_norm_rope(query, key, *weights, grid=grid, position=positions[0], key_position=positions[1], eps=self.norm_q.eps)

    def output(self, x: Tensor) -> Tensor:
        """Return the output projection [B, T, E] of attended values [B, T, H, D]."""
        return self.to_out[0](x.flatten(-2))

    def split(self, x: Tensor) -> Tensor:
        """Return x [..., E] split into heads, [..., H, D]."""
        return x.unflatten(-1, (self.heads, -1))


class GELUProjection(nn.Module):
    """A linear layer with tanh GELU, under diffusers' names."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """The feed-forward of a block: E -> inner -> E, with tanh GELU between."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELUProjection(dim, inner), nn.Identity(), nn.Linear(inner, dim)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class Block(nn.Module):
    """Self-attention over the chunk and its context, cross-attention to the text, feed-forward; adaLN modulation for each frame."""

    def __init__(self, config: CausalWanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.attn1 = Attention(config)
        self.norm2 = nn.LayerNorm(dim, eps=config.eps)
        self.attn2 = Attention(config)
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def text(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prompt's keys and values [B, text_len, H, D] for the cross-attention, of its embedding [B, text_len, E]."""
        return self.attn2.key(embedding), self.attn2.value(embedding)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        layer: int,
        grid: tuple[int, int, int],
        text: tuple[Tensor, Tensor],
        context: ChunkContext,
        stop: bool,
    ) -> Tensor | None:
        """Run the block on one chunk.

        Args:
            x: [B, F, T, E].
            modulation: adaLN shifts, scales and gates, [1 or B, 1 or F, 6, E].
            layer: the block's index, by which `context` is read.
            grid: frames, rows and columns of the chunk's tokens.
            text: what the method of this name returned.
            stop: return None as soon as the keys and values are stored; nobody reads the last block's output in a clean pass.

        Returns:
            [B, F, T, E], or None with `stop`.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation).unsqueeze(3).unbind(2)  # [., ., 1, E]
        normed = layer_norm_modulate(x, scale=scale1, shift=shift1, eps=self.eps).flatten(1, 2)  # [B, T, E]
        value = self.attn1.value(normed)
        if stop or (context.keep and not context.keep_roped):
            key = self.attn1.key(normed)
            roped_key = apply_rope(key, context.key_position, grid)
            context.store(layer, roped_key if context.keep_roped else key, value)
            if stop:
                return None
            query = apply_rope(self.attn1.query(normed), context.query_position, grid)
        else:
            query, roped_key = self.attn1.roped_query_key(normed, context, grid)
            if context.keep:
                context.store(layer, roped_key, value)
        segments = []
        for run in context.cached(layer):
            cached_key = run.key
            if run.first_position is not None:
                frames = run.key.shape[1] // (grid[1] * grid[2])
                cached_key = apply_rope(run.key, run.first_position, (frames, *grid[1:]))
            segments.append(Segment(cached_key, run.value, run.frozen))
        attended = self.attn1.output(segment_attention(query, [*segments, Segment(roped_key, value)])).view_as(x)
        affine = {"weight": self.norm2.weight, "bias": self.norm2.bias}
        x, normed = gated_residual_layer_norm_modulate(x, attended, gate1, **affine, eps=self.eps)
        query = self.attn2.query(normed.flatten(1, 2))
        attended = self.attn2.output(segment_attention(query, [Segment(*text)])).view_as(x)
        x, normed = gated_residual_layer_norm_modulate(x, attended, scale=scale2, shift=shift2, eps=self.eps)
        return gated_residual(x, self.ffn(normed), gate2)


class MLP(nn.Module):
    """Two linear layers with tanh GELU or SiLU between."""

    def __init__(self, in_dim: int, dim: int, gelu: bool) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_1(x)
        return self.linear_2(F.gelu(x, approximate="tanh") if self.gelu else F.silu(x))


class ConditionEmbedder(nn.Module):
    """Embeddings of what conditions every block: the timestep and the text."""

    def __init__(self, config: CausalWanConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = MLP(config.freq_dim, config.dim, gelu=False)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = MLP(config.text_dim, config.dim, gelu=True)

    def time(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the embedding [..., E] and the modulation [..., 6, E] of timesteps [...] in 0..1000."""
        half = self.freq_dim // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
        angles = timestep.double().unsqueeze(-1) * frequencies
        embedding = self.time_embedder(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))
        return embedding, self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))


class CausalWan(nn.Module):
    """A network that predicts the flow (noise - clean) of one chunk.

    Sources: Self-Forcing's CausalWanModel for the computation, diffusers' WanTransformer3DModel for the names.

    Attributes:
        ranks: processes among which the weights are divided, see `sharding`.
    """

    ranks: int = 1

    def __init__(self, config: CausalWanConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(config)
        # A ModuleList at run time; typed as what iterating it gives.
        self.blocks: Sequence[Block] = nn.ModuleList([Block(config) for _ in range(config.num_layers)])  # type: ignore[assignment]
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, config.out_channels * patch[1] * patch[2])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which the network computes."""
        return self.proj_out.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.proj_out.weight.device

    def encode_text(self, text: Tensor) -> TextContext:
        """Return the keys and values that every chunk attends to, of prompt embeddings [B, length <= text_len, text_dim].

        Missing rows are filled with zeros, and zero rows are attended to: the official generators mask nothing.
        """
        if text.dim() != 3 or text.shape[1] > self.config.text_len or text.shape[2] != self.config.text_dim:
            expected = f"[B, at most {self.config.text_len}, {self.config.text_dim}]"
            raise ValueError(f"text embeddings have shape {tuple(text.shape)}; expected {expected}")
        text = F.pad(text.to(self.device, self.dtype), (0, 0, 0, self.config.text_len - text.shape[1]))
        embedding = self.condition_embedder.text_embedder(text)
        pairs = [block.text(embedding) for block in self.blocks]
        return TextContext([key for key, _ in pairs], [value for _, value in pairs])

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: TextContext,
        context: ChunkContext | None = None,
        *,
        store_only: bool = False,
        checkpoint: bool = False,
    ) -> Tensor | None:
        """Return the flow of one chunk.

        Args:
            x: noisy (or, for a clean pass, clean) latents [B, F, C, h, w].
            timestep: [1 or B, 1 or F], in 0..1000, not necessarily integers.
            text: from `encode_text`; batch 1 is shared by the whole batch.
            context: visible cached frames and positions; None is the start of a video.
            store_only: stop once the last layer's keys and values are stored (a clean pass) and return None.
            checkpoint: keep only the inputs of each block for the backward pass, which computes the block again; same result.

        Returns:
            [B, F, C, h, w] in the model's dtype, or None with `store_only`.
        """
        context = context or ChunkContext()
        batch, frames, _, height, width = x.shape
        _, patch_rows, patch_columns = self.config.patch_size
        rows, columns = height // patch_rows, width // patch_columns
        patches = x.to(self.dtype).unflatten(4, (columns, patch_columns)).unflatten(3, (rows, patch_rows))  # [B, F, C, r, pr, c, pc]
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, frames, rows * columns, -1)
        hidden = F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)  # [B, F, T, E]
        embedding, modulation = self.condition_embedder.time(timestep, self.dtype)
        grid = (frames, rows, columns)
        for layer, block in enumerate(self.blocks):
            stop = store_only and layer == len(self.blocks) - 1
            arguments = hidden, modulation, layer, grid, (text.keys[layer], text.values[layer]), context, stop
            hidden = activation_checkpoint(block, *arguments, use_reentrant=False) if checkpoint else block(*arguments)
        if store_only:
            return None
        shift, scale = (self.scale_shift_table + embedding.unsqueeze(2)).unsqueeze(3).unbind(2)  # [., ., 1, E]
        out = self.proj_out(layer_norm_modulate(hidden, scale=scale, shift=shift, eps=self.config.eps))
        out = out.reshape(batch, frames, rows, columns, patch_rows, patch_columns, self.config.out_channels)  # channels vary fastest
        return out.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, frames, self.config.out_channels, height, width)
