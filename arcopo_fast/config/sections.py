"""The sections of a recipe: the typed settings of each component, with the default and the meaning of every key.

Every component takes its own section. `schema` puts them together and says what must agree between them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from arcopo_fast.errors import UserError


def expanded(path: str) -> str:
    """Return a path with the home directory in place of a "~" or "~user" at its beginning.

    Raises:
        UserError: there is no such user, or no file system takes such a path.
    """
    if any(len(part.encode(errors="replace")) > 255 for part in path.split("/")) or len(path) > 4095 or "\0" in path:
        raise UserError(f"{path[:60]!r}... is not a valid path: a file's name has at most 255 bytes")
    home = os.path.expanduser(path) if path.startswith("~") else path
    if home.startswith("~"):
        raise UserError(f"there is no home directory {path.partition('/')[0]!r}; for a name that begins with '~' write './{path[:60]}'")
    return home


Place = Annotated[str, Field(min_length=1), AfterValidator(expanded)]
"""A file or a directory: a path, whose "~" is the home directory, or where it is published."""
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
CacheVariant = Literal["self_forcing", "longlive", "longlive_infinity", "infinity_rope", "krea"]
"""A published generator whose cache and positions are used; its class is in `rollout.cache`."""


class Section(BaseModel):
    """Unknown keys are errors, values are not converted (an integer may stand for a float), and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _timesteps(steps: list[float]) -> list[float]:
    if not steps:
        raise ValueError("needs at least one timestep")
    if any(not 0 <= step <= 1000 for step in steps) or steps[0] == 0:
        raise ValueError(f"timesteps must lie in (0, 1000], and only the last may be 0; given {steps}")
    if any(later >= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"timesteps must decrease; given {steps}")
    return steps


Timesteps = Annotated[list[float], AfterValidator(_timesteps)]


class GeneratorConfig(Section):
    """The generator that is aligned."""

    checkpoint: Place = Field(
        "toy",
        description='"toy": part of the package; random:1.3b, random:14b: untrained; else a path or hf://owner/name/path (Hugging Face)',
    )
    weights: Literal["auto", "ema", "generator"] = Field(
        "auto",
        description="set of weights in a training checkpoint; ema: generator_ema; generator: raw weights; auto: the EMA if there is one",
    )
    base: Place | None = Field(
        None, description="directory or hf://owner/name with text encoder and VAE; null: the directory of the checkpoint"
    )
    lora: Place | None = Field(
        None,
        description="path or hf:// source of an adapter that is folded into the generator's weights before anything else",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of the frozen base; the adapter is always float32. float16 can generate, but cannot be trained"
    )
    vae_dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the decoder; bfloat16 is fast on a GPU")
    offload: bool = Field(False, description="keep decoder and rewards in host memory until they are needed: less GPU memory, more time")
    shard: bool = Field(
        False,
        description="divide the frozen weights among all ranks (FSDP2), for a base that no GPU holds; for training under torchrun only",
    )
    device: str = Field("auto", description='"auto": the GPU if there is one; else cpu, cuda or cuda:N')

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(f"a device is auto, cpu, cuda or cuda:N; given {device[:80]!r}")
        return device


class VideoConfig(Section):
    """The shape of a video."""

    chunks: Positive = Field(description="L, the chunks of a video, without an independent first frame")
    chunk_frames: Positive = Field(description="latent frames of a chunk")
    independent_first_frame: bool = Field(False, description="begin with one more chunk, of a single latent frame")
    latent_height: Positive = Field(description="rows of a latent frame: the height in pixels divided by the VAE's factor (8 for Wan)")
    latent_width: Positive = Field(description="columns of a latent frame: the width in pixels divided by the VAE's factor")
    fps: Positive = Field(description="frames per second of the decoded video")
    decode_frames: Positive = Field(1, description="latent frames that the VAE decodes in one call; more is faster only for small videos")

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """The latent frames of each chunk, an independent first frame included."""
        return (1,) * self.independent_first_frame + (self.chunk_frames,) * self.chunks

    @property
    def count(self) -> int:
        """The number of all chunks: a pivot can lie in each."""
        return len(self.chunk_sizes)


class SamplerConfig(Section):
    """The few-step sampler of one chunk."""

    kind: Literal["consistency", "ode"] = Field(
        "consistency", description="consistency: predict the clean chunk, then re-noise it freshly; ode: Euler steps"
    )
    steps: Timesteps = Field(description="T timesteps, decreasing, in (0, 1000]; the last one may be 0")
    first_chunk_steps: Timesteps | None = Field(None, description="timesteps of the first chunk; null: the same as steps")
    warp: bool = Field(
        description="true: steps are indices into the shifted table of 1000 timesteps (750 -> 937.5 for shift 5); false: timesteps"
    )
    shift: PositiveFloat = Field(description="s in sigma = s u / (1 + (s - 1) u)")
    context_noise: float = Field(0.0, ge=0, le=1000, description="timestep of the clean pass that puts a finished chunk into the cache")

    @model_validator(mode="after")
    def _warped_steps_are_entries(self) -> SamplerConfig:
        if self.warp:
            for name in ("steps", "first_chunk_steps"):
                if any(step != int(step) for step in getattr(self, name) or []):
                    raise ValueError(f"sampler.{name} {getattr(self, name)} must be whole with sampler.warp true: they index a table")
        return self


class CacheConfig(Section):
    """The finished frames that a chunk attends to."""

    variant: CacheVariant = Field("self_forcing", description="the published generator whose cache and positions are used")
    window: Positive | None = Field(None, description="visible latent frames, with those of the chunk that is denoised; null: all")
    sink: int = Field(
        0, ge=0, description="first latent frames that never leave the window; krea: 1, or 0 to put a newly encoded frame in their place"
    )
    global_sink: bool = Field(True, description="the sink survives a prompt switch (longlive)")

    @model_validator(mode="after")
    def _window_holds_the_sink(self) -> CacheConfig:
        if self.window is not None and self.window <= self.sink:
            raise ValueError(f"cache.window {self.window} is too small for the sink of {self.sink} latent frames and a chunk")
        if self.variant == "infinity_rope" and self.window is not None and self.sink < 1:
            raise ValueError("cache.sink must be at least 1 for infinity_rope with a window")
        if self.variant == "krea" and (self.window is None or self.sink > 1):
            window = "null" if self.window is None else self.window
            raise ValueError(
                "krea recomputes its context for every chunk: it needs a cache.window, and a cache.sink of 0 or 1; "
                f"given cache.window {window} and cache.sink {self.sink}"
            )
        return self


class RolloutConfig(Section):
    """The making of a group of candidates."""

    group_size: int = Field(12, description="G, the candidates of a group; at least 2")
    noise_strength: float = Field(0.5, gt=0, le=1, description="sigma in eps_i = sqrt(1 - sigma^2) eps* + sigma delta_i")
    pivot: int | Literal["shared", "per_group"] = Field(
        "shared",
        description="p, the pivot chunk; shared: a random one per iteration; per_group: per group; a number from 1: always this one",
    )
    horizon: int | None = Field(
        None, ge=0, description="H, the chunks that branches go on for after the pivot chunk; null: to the end of the video"
    )
    prompts_per_iteration: Positive = Field(1, description="prompts of an iteration, each of one video; a group for each of its pivots")
    pivots_per_video: Positive = Field(
        1, description="groups that fork off one video, at pivots of their own; the video goes on unperturbed and is made once"
    )
    branches_per_wave: Positive | None = Field(
        None, description="branches that are finished at once; fewer take less memory, and results agree up to rounding; null: all"
    )
    decode_branches: Positive | None = Field(
        None, description="branches that are decoded at once; fewer take less memory, and results agree up to rounding; null: all"
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        "auto", description="replay the denoising steps of a chunk as one CUDA graph; auto: if launches take longer than arithmetic"
    )

    @property
    def groups(self) -> int:
        """The groups of an iteration."""
        return self.prompts_per_iteration * self.pivots_per_video

    def pivots(self, chunks: int) -> int:
        """Return in how many of a video's first chunks a pivot can lie: the horizon follows."""
        return chunks - (self.horizon or 0)

    @property
    def wave_size(self) -> int:
        """The branches that are finished at once."""
        return min(self.branches_per_wave or self.group_size, self.group_size)

    @field_validator("group_size")
    @classmethod
    def _group_has_neighbors(cls, size: int) -> int:
        if size < 2:
            raise ValueError(f"a group of {size} has no advantage: rewards are compared inside the group; give at least 2 (the paper: 12)")
        return size


class WindowConfig(Section):
    """Some frames of a group's videos, judged as a video of their own."""

    chunks: Annotated[tuple[Natural, Natural | None], Field(strict=False)] = Field(
        description="first and last chunk of it, counted from the pivot chunk, which is 0; the last one null: to the end of the branches"
    )
    before: Natural | None = Field(0, description="latent frames before its first chunk that rewards see, too; null: all")
    weight: float = Field(1.0, description="weight of its advantages in the sum over windows")
    rewards: list[str] | None = Field(None, min_length=1, description="names of the rewards that judge it; null: all")

    @field_validator("chunks")
    @classmethod
    def _in_order(cls, chunks: tuple[int, int | None]) -> tuple[int, int | None]:
        if chunks[1] is not None and chunks[1] < chunks[0]:
            raise ValueError(f"the last chunk of a window lies before its first; given {list(chunks)}")
        return chunks

    def first_frame(self, pivot: int, chunk_sizes: Sequence[int]) -> int:
        """Return the first latent frame that is seen, with a `pivot` counted from 0."""
        start = sum(chunk_sizes[: pivot + self.chunks[0]])
        return 0 if self.before is None else max(0, start - self.before)


class JudgeConfig(Section):
    """The part of a group's videos that rewards see in training. An evaluation judges whole videos."""

    before: Natural | None = Field(
        None, description="latent frames before the pivot chunk that rewards see; null: all. With judge.windows: give each window's own"
    )
    warmup: Positive | Literal["all"] = Field(
        6,
        description="latent frames before the first one seen that are decoded for the decoder's state, and dropped; all: exact",
    )
    windows: dict[str, WindowConfig] = Field(
        default_factory=dict,
        description="windows of their own weights and rewards, by name, as in {local: {chunks: [0, 0], before: 6}}; their advantages are "
        "added up. {}: one window of all that is decoded",
    )

    @property
    def seen(self) -> dict[str, WindowConfig]:
        """The windows by name; "" for the one that there is without `windows`."""
        return self.windows or {"": WindowConfig(chunks=(0, None), before=self.before)}

    @property
    def reach(self) -> int | None:
        """How many latent frames before the pivot chunk are decoded at most; None: all."""
        befores = [window.before for window in self.seen.values()]
        known = [before for before in befores if before is not None]
        return None if self.warmup == "all" or len(known) < len(befores) else max(known) + self.warmup

    def described(self) -> str:
        """Return what rewards see in words; "" if it is all."""
        if not self.windows and self.before is None:
            return ""
        parts = []
        for name, window in self.seen.items():
            label, (first, last) = f"{name} × {window.weight:g}: " if name else "", window.chunks
            ends, before = "the end" if last is None else last, "all" if window.before is None else window.before
            parts.append(f"{label}chunks {first} to {ends} from the pivot's on, and {before} latent frames before")
        return "; ".join(parts)

    @field_validator("windows")
    @classmethod
    def _windows_have_names(cls, windows: dict[str, WindowConfig]) -> dict[str, WindowConfig]:
        for name in windows:
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name):
                raise ValueError(f"a window's name is made of letters, digits, '_' and '-', at most 60; given {name[:80]!r}")
        if windows and not any(window.weight for window in windows.values()):
            raise ValueError("needs at least one window with a weight other than 0")
        return windows

    @model_validator(mode="after")
    def _each_window_has_its_own(self) -> JudgeConfig:
        if self.windows and self.before is not None:
            raise ValueError(
                f"judge.before {self.before} is of the only window, and judge.windows gives others; give before to each of these instead"
            )
        return self


class SwitchesConfig(Section):
    """Prompts that change within a training video. A set may say so, too: {"prompts": [...], "frames": [0, ...]} in a .jsonl."""

    every: Positive | None = Field(
        None, description="latent frames after which another training prompt counts, drawn by key; null: one prompt for a video"
    )


class ObjectiveSettings(Section):
    """The learning of the policy from its groups: the part that all objectives share."""

    kind: str = Field(
        "copo", description="copo: AR-CoPO; sde_grpo: the baseline; nft: Astrolabe; or the dotted name of a module with an objective"
    )
    updates: Positive = Field(2, description="optimizer steps of an iteration")
    context: Literal["rollout", "recompute"] = Field(
        "rollout", description="h_{p-1}, the context of the pivot chunk: the rollout's, or recomputed with the new weights"
    )
    advantage: Literal["zscore", "quasi_norm"] = Field("zscore", description="how A_i is computed from the rewards of a group")
    quasi_norm_p: PositiveFloat = Field(0.8, description="p of the quasi-norm, for advantage=quasi_norm")
    advantage_std: Literal["population", "sample"] = Field(
        "population", description="standard deviation that a z-score divides by: over G, or over G - 1 as in DanceGRPO"
    )
    advantage_baseline: Literal["mean", "anchor"] = Field(
        "mean",
        description="what rewards are compared with; anchor: those of one more branch, with no noise of its own, which is no member",
    )
    advantage_std_floor: float = Field(0.0, ge=0, description="lower limit of the spread that advantages are divided by")
    advantage_max: PositiveFloat | None = Field(None, description="largest |A_i|; null: no limit")
    reward_combine: Literal["sum", "per_reward_zscore"] = Field(
        "sum", description="sum: advantage of the summed rewards; per_reward_zscore: sum of each reward's z-scores"
    )
    micro_batch: Positive | None = Field(None, description="(anchor, step) pairs of one backward pass; fewer take less memory; null: all")
    checkpoint: bool = Field(False, description="activation checkpointing of the pivot chunk, block by block: less memory, more time")

    def check_group(self, size: int) -> None:
        """Raise ValueError if groups of `size` members do not do."""

    def check_rewards(self, weights: Mapping[str, float]) -> None:
        """Raise ValueError if rewards with these weights, by name, do not do."""

    def risks(self, group_size: int, chunk_frames: int) -> list[str]:
        """Return what is known to do harm in these settings, each in a sentence; a run warns of it."""
        return []

    def off_policy(self) -> ObjectiveSettings:
        """Return the settings for `train.mode: off_policy`: without a clip where there is one."""
        return self


class LoraConfig(Section):
    """The adapter, the only thing that is trained."""

    rank: Positive = Field(64, description="r, the rank of A and B in B A x")
    alpha: PositiveFloat = Field(128, description="the adapter is scaled by alpha / rank")
    targets: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"],
        min_length=1,
        description="linear layers that are adapted, by full name or last part of it",
    )


class OptimizerConfig(Section):
    """AdamW on float32 master weights, no warm-up."""

    lr: PositiveFloat = Field(1e-5, description="learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="schedule of the learning rate; linear and cosine fall to 0"
    )
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = Field((0.9, 0.999), description="Adam's two decays")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled weight decay")
    eps: PositiveFloat = Field(
        1e-8,
        description="Adam's epsilon, relative to the root mean square of the gradient's elements, so that the loss's scale does not matter",
    )
    gradient_clip: PositiveFloat | None = Field(1.0, description="largest norm of the gradient; null: no limit")
    relative_clip: PositiveFloat | None = Field(
        None, description="largest norm of the gradient, relative to the running norm of earlier updates; null: no limit"
    )


class TrainConfig(Section):
    """The source of the groups, the length of a run, and what is kept."""

    mode: Literal["on_policy", "semi_on_policy", "off_policy"] = Field(
        "on_policy",
        description="source of groups; on_policy: the policy; semi_on_policy: a buffer of the initial generator; off_policy: same, no clip",
    )
    buffer: Place | None = Field(None, description="directory that `python -m arcopo_fast.collect` filled; null for on_policy")
    iterations: Positive = Field(100, description="iterations, each of rollout, reward and update")
    spread: Literal["auto", "groups", "branches"] = Field(
        "auto",
        description="how ranks share an iteration; groups: each has its own; branches: teams of ranks share the branches of each group; "
        "auto: by the numbers of ranks, groups and branches",
    )
    rank_timeout: PositiveFloat = Field(
        1800.0, description="seconds that a rank waits for the others, as for one whose judge is slow, before the job ends"
    )
    save_every: int = Field(50, ge=0, description="iterations between checkpoints; 0: only one, at the end")
    keep_checkpoints: Positive = Field(2, description="how many of the newest checkpoints are kept")
    threads: Positive | None = Field(None, description="CPU threads of PyTorch; null: PyTorch's own choice")


class RewardServersConfig(Section):
    """Rewards in processes of their own, `python -m arcopo_fast.rewards serve`. ARCOPO_REWARD_HOSTS alone get ARCOPO_REWARD_TOKEN."""

    addresses: dict[str, str] = Field(
        default_factory=dict, description="address of each served reward, by name, as in {toy_vq: http://127.0.0.1:8123}"
    )
    frames: Literal["float32", "uint8"] = Field(
        "float32", description="dtype of frames sent to a server; float32: without loss; uint8: a quarter of the bytes, in steps of 1/255"
    )
    timeout: PositiveFloat = Field(
        600.0, description="seconds that a server may take for an answer; a server that works, but is slower, ends the run"
    )
    give_up_after: PositiveFloat = Field(
        3600.0, description="seconds that a run waits for an unreachable server before it ends; it can then be resumed"
    )


class EvaluationConfig(Section):
    """Before and after: the same prompts, the same noise."""

    prompts: Positive = Field(8, description="number of evaluation prompts, which are not trained on")
    videos_per_prompt: Positive = Field(4, description="videos of each prompt")
    seed: int = Field(1234, ge=0, le=2**32 - 1, description="seed of the noise; never used in training")
    filters: bool = Field(
        False, description="score the untrained videos after fixed filters, too: filters have learned nothing. Ten times the judging"
    )
    few_steps: bool = Field(False, description="judge a video of each prompt made with 1, 2 and all steps, too: is it sharp after few?")
    sample_videos: int = Field(4, ge=0, description="pairs of videos, before and after, that are written as mp4")

    @model_validator(mode="after")
    def _samples_exist(self) -> EvaluationConfig:
        if self.sample_videos > self.prompts * self.videos_per_prompt:
            raise ValueError(
                f"evaluation.sample_videos {self.sample_videos} is more than the {self.prompts * self.videos_per_prompt} videos "
                "of evaluation.prompts x evaluation.videos_per_prompt"
            )
        return self


class RunConfig(Section):
    """The place where a run leaves what it made."""

    directory: Place = Field("runs", description="the run is written to <directory>/<name>; if that exists, to <name>-2 and so on")
    overwrite: bool = Field(False, description="replace an earlier run of the same name instead")
    tensorboard: bool = Field(True, description="write TensorBoard events beside metrics.jsonl")
