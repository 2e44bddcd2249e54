"""Reading and writing Wan weights: every container in which causal Wan checkpoints are published, one set of names inside.

Names are those of diffusers' WanTransformer3DModel everywhere in this library; the official names exist only in files.
Nothing here builds a network or knows what it computes; a file that is not what it should be ends in one `UserError` line.
"""

from __future__ import annotations

import json
import logging
import math
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arcopo_fast.errors import UserError, first_line, listed, misfit
from arcopo_fast.model.sizes import check_sizes
from arcopo_fast.model.tensors import check_dtype, check_finite, rename, replace_prefix
from arcopo_fast.storage import atomic as files
from arcopo_fast.storage.textfiles import read_json

logger = logging.getLogger(__name__)


class UnreadableFile(UserError):
    """A checkpoint that is damaged, so that its content is not known."""


WEIGHTS_NAME = "diffusion_pytorch_model"  # diffusers' stem for the weights of a model directory
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

# Names -----------------------------------------------------------------------------------------------------------------------------

# Module names inside one block, official: diffusers. The official norm1 and norm2 have no parameters, so only norm3 changes its number.
_BLOCK_NAMES = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
} | {
    f"{official}.{inner}": f"{diffusers}.{outer}"
    for official, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for inner, outer in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"))
}
_MODEL_NAMES = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
# Components that wrappers (FSDP, activation checkpointing, torch.compile, DDP, the official WanDiffusionWrapper) put into names.
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module", "model", "diffusion_model"}
# The CLIP image branch of the image-to-video Wan models, in both spellings.
_IMAGE_BRANCH = re.compile(r"^img_emb\.|\.(k_img|v_img|norm_k_img|add_k_proj|add_v_proj|norm_added_k)\.|\.image_embedder\.")


def diffusers_name(name: str) -> str:
    """Return the diffusers name of one official parameter or module name; a name that is not official is returned as it is."""
    match = re.match(r"blocks\.\d+\.", name)
    prefix = match.group() if match else ""
    return prefix + replace_prefix(name[len(prefix) :], _BLOCK_NAMES if match else _MODEL_NAMES)


def strip_wrappers(state: Mapping[str, Any], source: str | Path) -> dict[str, Tensor]:
    """Remove the components that wrappers put into parameter names, and check that every value is a tensor of weights.

    Raises:
        UserError: a value is not a tensor, or of no dtype that weights have, or two names become one. `source` is the file named in the
            message.
    """
    stripped: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            expected = "expected a state dict, or one under generator_ema, generator or model"
            raise UserError(f"{source}: entry {name!r} is a {type(value).__name__}, not a tensor; {expected}")
        check_dtype(str(name), value, source)
        short = ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)
        if short in stripped:
            raise UserError(f"{source}: two entries are both named {short!r} once wrapper prefixes are removed; save one set of weights")
        stripped[short] = value
    return stripped


# Reading ---------------------------------------------------------------------------------------------------------------------------


def read_state_dict(path: str | Path, *, weights: Literal["auto", "ema", "generator"] = "auto") -> dict[str, Tensor]:
    """Return the weights of a Wan text-to-video transformer, under diffusers names, on the CPU, in the dtypes of the file.

    Args:
        path: a `.pt`, `.pth`, `.bin`, `.ckpt` or `.safetensors` file, or a directory with `diffusion_pytorch_model*.safetensors`
            (or a pipeline directory that has such a one as `transformer`).
        weights: which set to take from a training checkpoint. "ema" is `generator_ema`; "generator" is `generator`, or `model`.
            "auto" takes the EMA where there is one. That is `--use_ema` of the official scripts, which their READMEs give for
            Self-Forcing and for the frame-wise Causal-Forcing models; Causal-Forcing's chunk-wise model is run without it, so say
            "generator" there. Which set was taken is logged.

    Raises:
        UserError: missing, empty, damaged, not readable without running code, or not a Wan text-to-video transformer.
    """
    path = Path(path)
    container = read_container(path, subfolder="transformer")
    state = rename(strip_wrappers(_choose_weights(container, weights, path), path), diffusers_name, path)
    if any(_IMAGE_BRANCH.search(name) for name in state):
        advice = "give a text-to-video one: images enter these generators as clean first latents"
        raise UserError(f"{path} is an image-to-video Wan checkpoint (it has a CLIP image branch); {advice}")
    if "patch_embedding.weight" not in state or "blocks.0.attn1.to_q.weight" not in state:
        found = f"{len(state)} tensors such as {listed(state, 3)}" if state else "no tensors"
        raise UserError(f"{path} is not a Wan transformer: it holds {found}; give a checkpoint of a causal Wan generator")
    return state


def read_container(path: str | Path, *, subfolder: str = "") -> dict[str, Any]:
    """Return the content of a checkpoint file or model directory unchanged: original names, training checkpoints still nested.

    A pickle is read with `weights_only=True`, that is, nothing in it can run; tensors are memory-mapped where the format allows it.
    For a directory without weights of its own, `subfolder` is tried (diffusers' pipeline layout).
    """
    path = Path(path)
    if path.is_dir():
        return _read_directory(model_directory(path, subfolder))
    return _read_file(path)


def model_directory(path: Path, subfolder: str) -> Path:
    """Return `path`, or its `subfolder` if it is a diffusers pipeline directory."""
    return path / subfolder if subfolder and not (path / "config.json").exists() and (path / subfolder).is_dir() else path


def read_config(path: str | Path) -> dict[str, Any] | None:
    """Return the transformer's config.json beside the weights, under diffusers' names, or None where there is none.

    Official configurations (`dim`, `num_heads`, `in_dim`, ...) are translated. Only directories, and files that carry diffusers'
    standard name inside one, are looked at: a config.json beside some other file may belong to something else.

    Raises:
        UserError: config.json is no JSON object, or describes a network that is not a text-to-video Wan transformer.
    """
    path = Path(path)
    if not path.is_dir() and not path.name.startswith(WEIGHTS_NAME):
        return None
    file = (model_directory(path, "transformer") if path.is_dir() else path.parent) / "config.json"
    if not file.exists():
        return None
    config = read_json(file)
    check_sizes(config, file)
    if "num_heads" in config:  # the original repository's names
        translated = {"num_attention_heads": config["num_heads"], "qk_norm": config.get("qk_norm", True)}
        if config.get("dim"):
            translated["attention_head_dim"] = config["dim"] // config["num_heads"]
        renamed = {"in_dim": "in_channels", "out_dim": "out_channels"}
        kept = ("ffn_dim", "freq_dim", "text_dim", "text_len", "num_layers", "eps", "patch_size", "cross_attn_norm", "model_type")
        config = {renamed.get(key, key): value for key, value in config.items() if key in renamed or key in kept} | translated
    if config.get("_class_name", "WanTransformer3DModel") not in ("WanTransformer3DModel", "CausalWan"):
        raise UserError(f"{file} describes a {config['_class_name']}; expected a WanTransformer3DModel or the original WanModel")
    if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None or config.get("model_type", "t2v") != "t2v":
        raise UserError(f"{file} describes an image-to-video Wan model; give a text-to-video one")
    if config.get("qk_norm", True) not in (True, "rms_norm_across_heads") or config.get("cross_attn_norm", True) is not True:
        raise UserError(f"{file}: only Wan models with q/k RMSNorm over all heads and a cross-attention norm are supported")
    if "_text_len" in config:
        config["text_len"] = config.pop("_text_len")
    check_sizes(config, file)
    return config


def infer_config(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, source: str | Path = "the checkpoint"
) -> dict[str, Any]:
    """Return the sizes of a Wan transformer, read off its tensors' shapes, as keyword arguments under diffusers' configuration names.

    The number of heads leaves no trace in the shapes: it comes from `config` (see `read_config`), else heads are 128 wide. `eps` and
    `text_len` appear only if `config` has them.

    Raises:
        UserError: a tensor is missing or has an impossible shape, or `config` contradicts the weights.
    """

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in state:
            raise UserError(f"{source} is not a complete Wan transformer: {name} is missing")
        if state[name].dim() != dimensions or not state[name].numel():
            raise UserError(f"{source}: {name} has shape {list(state[name].shape)}; expected {dimensions} dimensions, none of them 0")
        return state[name].shape

    dim, in_channels, *patch = shape("patch_embedding.weight", 5)
    layers = {int(match.group(1)) for match in map(re.compile(r"blocks\.(\d+)\.").match, state) if match}
    if not layers or max(layers) != len(layers) - 1:
        absent = min(set(range(len(layers) + 1)) - layers)
        raise UserError(f"{source} is not a complete Wan transformer: it has {len(layers)} blocks, but no block {absent}")
    out_features = shape("proj_out.weight", 2)[0]
    if out_features % math.prod(patch):
        raise UserError(f"{source}: proj_out.weight has {out_features} rows, which patches of {tuple(patch)} do not divide")
    sizes: dict[str, Any] = {
        "num_layers": len(layers),
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        "in_channels": in_channels,
        "out_channels": out_features // math.prod(patch),
        "patch_size": tuple(patch),
    }
    config = config or {}
    for name, found in sizes.items():
        given = config.get(name)
        if given is not None and (tuple(given) if name == "patch_size" else given) != found:
            raise UserError(f"{source}: its config.json says {name} {given}, its weights have {found}; they do not belong together")
    heads, head_dim = config.get("num_attention_heads"), config.get("attention_head_dim", 128)
    if heads is None and dim % head_dim:
        advice = "the number of heads cannot be read off, so add a config.json with num_attention_heads"
        raise UserError(f"{source}: the width {dim} is no multiple of {head_dim}; {advice}")
    heads = dim // head_dim if heads is None else heads
    if heads * config.get("attention_head_dim", dim // heads) != dim:
        raise UserError(f"{source}: its config.json says {heads} heads of {config.get('attention_head_dim')}, its weights are {dim} wide")
    sizes |= {"num_attention_heads": heads, "attention_head_dim": dim // heads}
    check_sizes(sizes, source)
    return sizes | {name: config[name] for name in ("eps", "text_len") if config.get(name) is not None}


def load_into(module: nn.Module, state: Mapping[str, Tensor], *, source: str | Path = "the checkpoint") -> None:
    """Copy a state dict into a module, all of it or nothing. Values take the module's dtypes and devices.

    Parameters on the meta device are replaced by the tensors themselves, with the dtypes of the file.

    Raises:
        UserError: names are missing or unexpected, or shapes differ, and the message lists them; or a value is not finite.
    """
    current = module.state_dict()
    check_fit({name: tensor.shape for name, tensor in state.items()}, current, type(module).__name__, source)
    check_finite(state, source)
    module.load_state_dict(state, strict=True, assign=any(tensor.is_meta for tensor in current.values()))


def check_fit(given: Mapping[str, Sequence[int]], needed: Mapping[str, Tensor], kind: str, source: str | Path) -> None:
    """Raise `UserError`, which lists what differs, unless names and shapes are those of the tensors that a network of a `kind` needs."""
    if problems := misfit(given, {name: tensor.shape for name, tensor in needed.items()}):
        advice = "check that the checkpoint and the configured sizes belong together"
        raise UserError(f"{source} does not fit {kind}: {problems}; {advice}")


def _choose_weights(container: Mapping[str, Any], weights: str, path: Path) -> Mapping[str, Any]:
    sets = [name for name in ("generator_ema", "generator", "model") if isinstance(container.get(name), Mapping)]
    if not sets:
        if weights == "ema":
            raise UserError(f"{path} holds a single set of weights, no generator_ema; ask for weights 'auto' or 'generator'")
        return container
    wanted = {"auto": sets, "ema": ["generator_ema"], "generator": ["generator", "model"]}[weights]
    taken = next((name for name in wanted if name in sets), None)
    if taken is None:
        raise UserError(f"{path} holds {', '.join(sets)}, but weights {weights!r} means {' or '.join(wanted)}; ask for another set")
    logger.info("%s: taking %s (the file holds %s)", path, taken, ", ".join(sets))
    return container[taken]


def _read_directory(directory: Path) -> dict[str, Any]:
    index = directory / f"{WEIGHTS_NAME}.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{index} has no weight_map from tensor names to files; copy it again")
        state: dict[str, Any] = {}
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise UserError(f"{index} names the file {file!r}, which lies outside its directory")
            part = _read_file(directory / file)
            if doubles := part.keys() & state.keys():
                raise UserError(f"{directory}: {len(doubles)} tensors are in several shards ({listed(doubles, 3)}); copy the shards again")
            state |= part
        if absent := [name for name in weight_map if name not in state]:
            raise UserError(f"{directory}: its shards lack {len(absent)} of the index's tensors ({listed(absent)}); copy them again")
        return state
    files = sorted(directory.glob(f"{WEIGHTS_NAME}*.safetensors"))
    if len(files) > 1:
        found = ", ".join(file.name for file in files[:3])
        raise UserError(f"{directory} has several weight files ({found}, ...), but no {index.name}; copy the index too, or name one file")
    if not files:
        raise UserError(f"{directory} has no {WEIGHTS_NAME}.safetensors; give a checkpoint file, or a diffusers or Wan model directory")
    return _read_file(files[0])


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a checkpoint file or a model directory")
    if path.suffix != ".safetensors" and path.suffix not in TORCH_SUFFIXES:
        raise UserError(f"{path}: unknown kind of checkpoint; expected {', '.join(TORCH_SUFFIXES)}, .safetensors or a model directory")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise UserError(f"{path} is empty; copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the weights; fetch them with 'git lfs pull'")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UnreadableFile(
                f"{path} is damaged or not a safetensors file ({first_line(error, 100)}); copy or download it again"
            ) from error
    return _read_pickle(path)


def _read_pickle(path: Path) -> dict[str, Any]:
    archive = zipfile.is_zipfile(path)  # else torch's format before 1.6, which cannot be mapped, or no checkpoint at all
    try:
        if archive:
            with zipfile.ZipFile(path) as file:
                if any(name.endswith("constants.pkl") for name in file.namelist()):
                    raise UserError(f"{path} is a TorchScript program, not weights; save its state dict")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except UserError:
        raise
    except Exception as error:  # whatever bytes make the unpickler stumble over: the set of exceptions is open
        blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if blocked:
            advice = "so it is refused: reading it could run code; save only tensors (a state dict), or use .safetensors"
            raise UserError(f"{path} is a pickle that needs {blocked.group(1)}, {advice}") from error
        raise UnreadableFile(f"{path} is damaged or not a torch checkpoint ({type(error).__name__}); copy or download it again") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a state dict")
    return dict(content)


# Writing ---------------------------------------------------------------------------------------------------------------------------


def save_transformer(directory: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a transformer as a diffusers model directory that WanTransformer3DModel.from_pretrained reads.

    Args:
        directory: the new directory; a former save there is replaced, complete or not at all.
        state: diffusers names, without adapters.
        config: sizes under diffusers' names, as `infer_config` returns them.

    Raises:
        UserError: the directory cannot be written, or holds other files.
    """
    if adapted := [name for name in state if ".lora_" in name or ".base_layer." in name]:
        raise ValueError(f"the state dict has adapter names ({listed(adapted, 3)}); merge or remove the adapter first")
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    if "text_len" in config:
        config["_text_len"] = config.pop("text_len")  # diffusers ignores underscored entries; it has no text length of its own
    document = {"_class_name": "WanTransformer3DModel"} | config | {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
    with atomic_directory(directory) as temporary:
        save_tensors(temporary / f"{WEIGHTS_NAME}.safetensors", state)
        (temporary / "config.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_tensors(file: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; tensors may live on any device. metadata: more entries of its header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    file.touch()
    mode = file.stat().st_mode  # safetensors makes files that only their owner can read
    save_file(tensors, file, metadata={"format": "pt", **(metadata or {})})
    file.chmod(mode)
    _sort_metadata(file)


def _sort_metadata(file: Path) -> None:
    """Put the metadata of a safetensors file in order, which safetensors does not: the same tensors shall make the same bytes."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(content) <= length:  # always, as long as safetensors writes JSON without spaces; the rest is padding
            opened.seek(8)
            opened.write(content.ljust(length))


@contextmanager
def atomic_directory(directory: str | Path) -> Iterator[Path]:
    """Open `files.atomic_directory`, which replaces an existing directory only if it holds nothing but what is written anew.

    Raises:
        UserError: it cannot be written, or holds other files.
    """
    try:
        with files.atomic_directory(directory, only_same=True) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error, 100)
        raise UserError(f"{directory} cannot be written: {reason}; free space there, or give another directory") from error
