"""The objects of a recipe: the generator, its engine, the rewards and the prompts, as every command needs them.

Whatever is wrong with the input is said here, as a UserError, before anything is written.
"""

from __future__ import annotations

import importlib.resources
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from arcopo_fast.config.schema import Config, objective_class
from arcopo_fast.config.sections import ObjectiveSettings
from arcopo_fast.data.prompts import Prompt, Prompts, read_prompt_set, split_prompts
from arcopo_fast.errors import UserError, first_line
from arcopo_fast.model.adapter_files import read_adapter
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.model.checkpoints import infer_config, load_into, read_config, read_state_dict
from arcopo_fast.model.families import LAYOUTS, OFFICIAL, SIZES, base_files, published, sizes_by_name
from arcopo_fast.model.lora import add_lora, fold_adapter
from arcopo_fast.model.sizes import CausalWanConfig, GeneratorSizes, VAESizes
from arcopo_fast.model.text import CachedTextEncoder, TextEncoderFiles
from arcopo_fast.model.untrained import HashedText, untrained_vae, untrained_wan, untrained_weights
from arcopo_fast.model.vae import StreamingDecoder, channels_last, load_vae
from arcopo_fast.objectives.base import Objective
from arcopo_fast.rewards import registry
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rewards.client import remote_rewards
from arcopo_fast.rewards.wire import read_token
from arcopo_fast.rollout.cache import pages_for, plan_pages, variant_of
from arcopo_fast.rollout.decode import Reencoder
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import keyed_rng
from arcopo_fast.rollout.stream import VideoShape
from arcopo_fast.runtime.distributed import ALONE, World
from arcopo_fast.runtime.memory import device_of, resident
from arcopo_fast.storage import hub
from arcopo_fast.storage.textfiles import read_json
from arcopo_fast.toy import data as toy_data
from arcopo_fast.toy import metrics as toy_metrics
from arcopo_fast.toy.text import ToyTextEncoder

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

UNTRAINED = "random:"
"""Begins a `generator.checkpoint` that names a size instead of a place."""


class TextEncoder(Protocol):
    """A callable that takes prompts to embeddings [B, text_len, text_dim] float32 on the CPU."""

    @property
    def fingerprint(self) -> str:
        """Text that tells it from every encoder that gives other embeddings."""
        ...

    def __call__(self, prompts: Sequence[str]) -> Tensor: ...


@dataclass
class Generator:
    """A text-to-video generator: prompts -> text embeddings -> latents -> frames.

    Attributes:
        model: the transformer.
        encode_text: the text encoder.
        decoder: the VAE's.
        directory: of its text encoder and VAE; None for an untrained one.
    """

    model: CausalWan
    encode_text: TextEncoder
    decoder: StreamingDecoder
    directory: Path | None


def checkpoint_path(checkpoint: str) -> Path:
    """Return the path of a recipe's `generator.checkpoint` or `generator.base`: "toy" ships with the package, others are found or
    downloaded.

    Raises:
        UserError: there is nothing at the path, or it cannot be downloaded.
    """
    if checkpoint == "toy":
        return Path(str(importlib.resources.files("arcopo_fast.toy") / "checkpoint"))
    if not hub.is_published(checkpoint) and not Path(checkpoint).expanduser().exists():
        untrained = ", ".join(UNTRAINED + size for size in SIZES)
        raise UserError(
            f"there is no checkpoint at {checkpoint}; give 'toy', its path, hf://owner/name/path, or for untrained weights {untrained}"
        )
    return hub.find(checkpoint)


def generator_sizes(checkpoint: str, base: str | None = None) -> GeneratorSizes:
    """Return the sizes behind a recipe's `generator.checkpoint`, without loading weights where a config.json has them, and without a
    download.

    What is not on this machine is taken to have the published sizes that its name, or its base's, speaks of. Without a config.json of its
    own, the VAE is taken to be Wan2.1's.
    """
    if checkpoint.startswith(UNTRAINED):
        return published(checkpoint.removeprefix(UNTRAINED))
    if hub.is_published(checkpoint) and hub.local(checkpoint) is None:
        if (sizes := sizes_by_name(checkpoint, base)) is None:
            raise UserError(f"{checkpoint} is not on this machine, and its name does not say its size; get it first, or set generator.base")
        return sizes
    path = checkpoint_path(checkpoint)
    config = read_config(path)
    if config is None or any(name not in config for name in ("num_layers", "num_attention_heads", "ffn_dim")):
        config = infer_config(read_state_dict(path), config, source=path)
    names = {entry.name for entry in fields(CausalWanConfig)}
    transformer = _text_to_video({name: value for name, value in config.items() if name in names and value is not None}, path)
    vae = (hub.local(base) or path if base else path) / "vae" / "config.json"
    return GeneratorSizes(transformer, VAESizes.from_config(read_json(vae), vae) if vae.is_file() else VAESizes())


def _text_to_video(sizes: Mapping[str, Any], source: Path) -> CausalWanConfig:
    """Return the configuration of a text-to-video generator.

    Raises:
        UserError: the generator reads more than the latents that it makes and a text.
    """
    config = CausalWanConfig(**sizes)
    if config.in_channels != config.out_channels:
        advice = "an image-to-video Wan takes an image's channels too; give a text-to-video one: images enter as clean first latents"
        raise UserError(f"{source} takes latents of {config.in_channels} channels and makes {config.out_channels}; {advice}")
    return config


def check_fits(config: Config) -> None:
    """Raise `UserError` if the recipe's sizes, generator, VAE and text encoder do not go together.

    Every `load_...` of a recipe begins with it. By names, configurations and shapes: no weights are loaded and nothing is downloaded;
    what is not on this machine yet is not looked at.
    """
    checkpoint, base = config.generator.checkpoint, config.generator.base
    if hub.is_published(checkpoint) and hub.local(checkpoint) is None:
        if sizes_named := sizes_by_name(checkpoint, base):
            _check_patches(config, sizes_named.transformer)
        return
    sizes = generator_sizes(checkpoint, base)
    _check_patches(config, sizes.transformer)
    directory = hub.local(base, base_files(base)) if base and hub.is_published(base) else hub.find(base) if base else None
    if checkpoint.startswith(UNTRAINED) or (base and directory is None):
        return
    directory = directory or checkpoint_path(checkpoint)
    vae, channels = vae_path(directory), sizes.transformer.in_channels
    if sizes.vae.z_dim != channels:
        raise UserError(
            f"{checkpoint} makes latents of {channels} channels, and the VAE {vae} decodes {sizes.vae.z_dim}: they do not belong "
            "together; set generator.base to where the generator's own VAE is"
        )
    width, expected = _text_width(directory), sizes.transformer.text_dim
    if width != expected:
        raise UserError(
            f"{checkpoint} reads text embeddings of width {expected}, and the text encoder in {directory} gives {width}: they do not "
            "belong together; set generator.base to where the generator's own text encoder is"
        )


def _check_patches(config: Config, transformer: CausalWanConfig) -> None:
    for name, size in zip(("latent_height", "latent_width"), transformer.patch_size[1:]):
        pixels = getattr(config.video, name)
        if pixels % size:
            below = pixels - pixels % size
            advice = f"give {below} or {below + size}" if pixels > size else f"give {size}"
            raise UserError(f"video.{name} is {pixels}, which the generator's patches of {size} latent pixels do not divide; {advice}")


def _text_width(directory: Path) -> int:
    if (directory / "text").is_dir():
        return ToyTextEncoder.from_pretrained(directory / "text").text_dim
    return TextEncoderFiles.find(directory).width()


def vae_path(directory: Path) -> Path:
    """Return the path of the VAE in a generator's directory, or in its base's.

    Raises:
        UserError: the directory has no VAE.
    """
    if not directory.is_dir():
        raise UserError(
            f"{directory} is the transformer alone; set generator.base to where its text encoder and VAE are, as in "
            "hf://Wan-AI/Wan2.1-T2V-1.3B"
        )
    vae = next((path for layout in LAYOUTS if (path := directory / layout.vae).exists()), None)
    if vae is None:
        raise UserError(f"{directory} has no VAE; expected vae/, or {OFFICIAL.vae}, beside a text encoder")
    return vae


def read_model(
    path: Path, *, weights: Literal["auto", "ema", "generator"] = "auto", lora: Path | None = None
) -> tuple[CausalWanConfig, Iterator[tuple[str, Tensor]]]:
    """Return the sizes of a causal Wan in any container of its weights, and its tensors by name, which are read as they are asked for.

    lora: an adapter to fold into the weights.
    """
    state = read_state_dict(path, weights=weights)
    sizes = _text_to_video(infer_config(state, read_config(path), source=path), path)
    if lora is not None:
        return sizes, fold_adapter(state, read_adapter(lora), source=lora)
    return sizes, ((name, state.pop(name)) for name in list(state))


def load_model(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    weights: Literal["auto", "ema", "generator"] = "auto",
    lora: Path | None = None,
) -> CausalWan:
    """Return a frozen causal Wan from any container of its weights; sizes come from config.json and the shapes.

    There is never a second copy of the model in host memory, nor one in another dtype.

    Args:
        lora: an adapter to fold into the weights.
    """
    sizes, tensors = read_model(path, weights=weights, lora=lora)
    with torch.device("meta"):
        model = CausalWan(sizes)
    load_into(model, {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors}, source=path)
    return model.requires_grad_(False)


def load_generator(config: Config, *, adapted: bool = False, world: World | None = None) -> Generator:
    """Load transformer, text encoder and VAE: from one directory, from a checkpoint and its base, or untrained, of a published size.

    Args:
        adapted: give the transformer the recipe's adapter, as it is before training.
        world: the processes among which `generator.shard` divides an adapted transformer; None: this one alone.
    """
    check_fits(config)
    settings = config.generator
    device = device_of(settings.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events, streams and graphs are the current device's
    vae_dtype = getattr(torch, settings.vae_dtype)
    waits_on = torch.device("cpu") if settings.offload else device  # the decoder, for its turn
    if settings.checkpoint.startswith(UNTRAINED):
        sizes = generator_sizes(settings.checkpoint)
        model = _load_transformer(config, device, adapted, world)
        vae = channels_last(untrained_vae(sizes.vae, dtype=vae_dtype, device=device, seed=config.seed)).to(waits_on)
        stand_in = HashedText(sizes.transformer.text_len, sizes.transformer.text_dim)
        return Generator(model, stand_in, StreamingDecoder(vae, config.video.decode_frames), None)
    base = hub.find(settings.base, base_files(settings.base)) if settings.base else checkpoint_path(settings.checkpoint)
    vae_file = vae_path(base)
    model = _load_transformer(config, device, adapted, world)
    vae = channels_last(load_vae(vae_file, vae_dtype)).to(waits_on)
    text = load_text(base, model.config.text_len, device)
    return Generator(model, text, StreamingDecoder(vae, config.video.decode_frames), base)


def _load_transformer(config: Config, device: torch.device, adapted: bool, world: World | None) -> CausalWan:
    settings, dtype, lora = config.generator, getattr(torch, config.generator.dtype), config.lora
    untrained = settings.checkpoint.startswith(UNTRAINED)
    folded = hub.find(settings.lora) if settings.lora and not untrained else None
    adapt = partial(add_lora, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=config.seed, device=device)
    if adapted and settings.shard and world is not None and not world.alone:
        from arcopo_fast.model.sharding import load_sharded  # loads a part of PyTorch that nothing else needs

        if untrained:
            sizes = generator_sizes(settings.checkpoint).transformer
            tensors = untrained_weights(sizes, dtype=dtype, device=device, seed=config.seed)
        else:
            sizes, tensors = read_model(checkpoint_path(settings.checkpoint), weights=settings.weights, lora=folded)
        return load_sharded(sizes, tensors, adapt, world, dtype=dtype, device=device, source=settings.checkpoint)
    if untrained:
        model = untrained_wan(generator_sizes(settings.checkpoint).transformer, dtype=dtype, device=device, seed=config.seed)
    else:
        model = load_model(checkpoint_path(settings.checkpoint), dtype=dtype, device=device, weights=settings.weights, lora=folded)
    return adapt(model) if adapted else model


def load_text(directory: Path, text_len: int, device: torch.device) -> TextEncoder:
    """Load the text encoder of a checkpoint directory: the toy's, or UMT5 behind its cache."""
    if (directory / "text").is_dir():
        return ToyTextEncoder.from_pretrained(directory / "text")
    return CachedTextEncoder.from_pretrained(directory, text_len=text_len, device=device)


def encode_ahead(encode_text: TextEncoder, prompts: Iterable[str], world: World = ALONE) -> None:
    """Encode what a command will need before it takes memory for anything else: UMT5 is loaded once, and gone when videos are made.

    world: the ranks that need the same prompts; a single one of those that share a disk encodes them.
    """
    if isinstance(encode_text, CachedTextEncoder):
        with world.in_turn("encode the prompts"):
            encode_text.encode_all(list(prompts))


def switching_chunks(config: Config) -> list[tuple[int, ...]]:
    """Return the chunks with which the prompt changes, of each video that a run may make in training; a set of prompts that is not on this
    machine yet counts as one without changes."""
    starts = list(accumulate(config.video.chunk_sizes[:-1], initial=0))
    if config.switches.every is not None:
        frames = range(config.switches.every, starts[-1] + 1, config.switches.every)
        return [tuple(bisect_left(starts, frame) for frame in frames)]
    path = Path(config.prompts)
    if path.suffix.lower() not in (".jsonl", ".json") or (hub.is_published(config.prompts) and hub.local(config.prompts) is None):
        return [()]
    if not hub.is_published(config.prompts) and not path.is_file():
        return [()]
    changes = _changes(config.prompts, path.stat().st_mtime_ns if path.is_file() else 0)
    return [tuple(bisect_left(starts, frame) for frame in frames if frame <= starts[-1]) for frames in changes]


@lru_cache
def _changes(source: str, _written: int) -> list[tuple[int, ...]]:
    """Return the frames at which prompts of a set change, each combination once."""
    prompts = read_prompt_set(source, turns=True)
    return sorted({tuple(frame for frame, _ in prompt.turns) for prompt in prompts})


def pool_pages(config: Config, *, videos: int | None = None) -> int:
    """Return the pages that a group needs at the worst pivot, or `videos` independent videos."""
    chunks = config.video.chunk_sizes
    visible = plan_pages(config.cache, chunks, len(chunks) - 1, 1).prefix  # what one whole video holds at most
    if videos:
        return max(1, videos * visible)
    recomputed = visible if config.objective.context == "recompute" else 0  # it stands beside the rollout's own
    rollout, switches = config.rollout, switching_chunks(config)
    return pages_for(config.cache, chunks, rollout.wave_size, horizon=rollout.horizon, switches=switches) + recomputed


def build_engine(
    config: Config, model: CausalWan, *, videos: int | None = None, pages: int | None = None, vae: AutoencoderKLWan | None = None
) -> Engine:
    """Return an engine whose pool holds a group of the recipe, or `videos` independent videos, or `pages` latent frames.

    Args:
        vae: for a cache that encodes frames again.
    """
    reencoder = None
    if vae is not None and variant_of(config.cache).reencodes(config.cache):
        reencoder = Reencoder(vae, partial(resident, model.device, vae, offload=config.generator.offload))
    return Engine(
        model,
        VideoShape.of(config.video, model.config.in_channels),
        config.sampler,
        config.cache,
        pages=pages or pool_pages(config, videos=videos),
        cuda_graphs=config.rollout.cuda_graphs,
        reencoder=reencoder,
    )


def sized_engine(config: Config, generator: Generator, videos: int, *, longer: bool) -> Engine:
    """Return an engine for `videos` videos at once.

    Args:
        longer: the videos are longer than the recipe's, so a line says what a cache without window then takes.

    Raises:
        UserError: its keys and values do not fit the memory.
    """
    model, pages = generator.model, pool_pages(config, videos=videos)
    tokens = model.config.tokens_per_frame(config.video.latent_height, config.video.latent_width)
    page = 2 * model.config.num_layers * tokens * model.config.dim * model.dtype.itemsize
    size = f"keys and values of {pages} latent frames take {pages * page / 2**30:.3g} GiB"
    if longer and config.cache.window is None:
        print(f"{size}: the cache has no window, so it grows with the video; set cache.window to bound it", file=sys.stderr)
    try:
        return build_engine(config, model, videos=videos, vae=generator.decoder.vae)
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU; the allocator of a CPU has none of its own
        raise UserError(f"{size}, which do not fit ({first_line(error, 1000)}); set cache.window, or lower --frames or --batch") from error


def build_objective(config: Config, engine: Engine) -> Objective[ObjectiveSettings]:
    """Return the recipe's objective. Off-policy training is semi-on-policy training without the clip."""
    settings, mode = config.objective, config.train.mode
    if mode == "off_policy":
        settings = settings.off_policy()
    return objective_class(settings.kind)(engine, settings, reference=mode != "on_policy")


def load_rewards(config: Config) -> dict[str, Reward]:
    """Load the recipe's rewards, in its order, here or from a server. The recipe is checked first, since a judge may be large."""
    check_fits(config)
    servers = config.reward_servers
    remote = remote_rewards(
        servers.addresses,
        token=read_token(None) if servers.addresses else None,
        dtype=getattr(torch, servers.frames),
        fps=config.video.fps,
        timeout=servers.timeout,
        give_up_after=servers.give_up_after,
    )
    device = None if config.generator.offload else device_of(config.generator.device)
    local = registry.load_rewards((name for name in config.rewards if name not in remote), fps=config.video.fps, device=device)
    return {name: remote[name] if name in remote else local[name] for name in config.rewards}


def load_held_out(generator: Generator) -> dict[str, Reward]:
    """Load the metrics that are never trained on: those of the toy world, whose classifier lies in its checkpoint. Other generators have
    none."""
    if generator.directory is None or not (generator.directory / "classifier").is_dir():
        return {}
    return toy_metrics.held_out(generator.directory / "classifier")


def load_prompts(config: Config) -> Prompts:
    """Return training and evaluation prompts; which are kept for evaluation depends on `evaluation.seed` alone."""
    check_fits(config)
    if config.prompts == "toy" and config.extended_prompts is None:
        prompts = [Prompt(caption) for caption in toy_data.all_captions()]
    else:
        prompts = read_prompt_set(config.prompts, config.extended_prompts, turns=True)
    starts = list(accumulate(config.video.chunk_sizes[:-1], initial=0))
    for prompt in prompts:
        if prompt.turns and config.switches.every is not None:
            raise UserError(f"switches.every changes prompts, and so does {config.prompts} itself; leave one of them out")
        prompt.at_chunks(starts)  # what changes too late is said before anything is made
    return split_prompts(prompts, config.evaluation.prompts, keyed_rng(config.evaluation.seed, "evaluation prompts"))
