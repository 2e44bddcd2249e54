"""The text encoder of the Wan generators, UMT5-XXL: prompts in, embeddings out, each prompt encoded once and kept on disk.

The network is transformers' UMT5EncoderModel; its weights come from the official Wan2.1 file or from a diffusers directory. It is 11 GB and
needed for seconds, so `CachedTextEncoder` has it only while there are prompts without an embedding, and frees it before it returns.
Knows nothing of generators: what rows beyond a prompt's tokens do to a video is their matter; here they are exactly zero.
"""

from __future__ import annotations

import hashlib
import html
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from arcopo_fast.errors import UserError, listed
from arcopo_fast.model.checkpoints import load_into, read_container, strip_wrappers
from arcopo_fast.model.families import LAYOUTS, OFFICIAL
from arcopo_fast.model.tensors import rename
from arcopo_fast.storage.atomic import atomic_write
from arcopo_fast.storage.identity import digest
from arcopo_fast.storage.textfiles import read_json

if TYPE_CHECKING:  # imported where an encoder is loaded: with every embedding cached, neither is needed
    from tokenizers import Tokenizer
    from transformers import UMT5EncoderModel

logger = logging.getLogger(__name__)

# Prompts ---------------------------------------------------------------------------------------------------------------------------


def clean_prompt(prompt: str) -> str:
    """Return a prompt as the official code hands it to the tokenizer.

    Broken Unicode is mended and typographic quotes are made straight (ftfy), HTML entities are resolved twice, and every run of white space
    becomes one space.

    Raises:
        UserError: ftfy is not installed. Without it the same prompt would give other tokens, and another video.
    """
    try:
        import ftfy
    except ImportError as error:
        raise UserError(f"prompts are cleaned with the package ftfy, which cannot be imported ({error}); pip install ftfy") from error
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


# Files -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextEncoderFiles:
    """The files of a text encoder.

    Attributes:
        weights: the official .pth, or a transformers directory.
        tokenizer: a tokenizer.json.
    """

    weights: Path
    tokenizer: Path

    @classmethod
    def find(cls, directory: str | Path) -> TextEncoderFiles:
        """Return the files of a Wan2.1 directory, official or in diffusers' form.

        Raises:
            UserError: it has none, or lacks a part.
        """
        directory = Path(directory)
        layout = next((layout for layout in LAYOUTS if (directory / layout.text).exists()), None)
        if layout is None:
            official, tokenizer = OFFICIAL.text, Path(OFFICIAL.tokenizer).parent
            expected = f"{official} (11.4 GB) beside {tokenizer}/, or diffusers' text_encoder/ beside tokenizer/"
            raise UserError(f"{directory} has no text encoder; expected {expected}; both come with Wan-AI/Wan2.1-T2V-1.3B on Hugging Face")
        files = cls(directory / layout.text, directory / layout.tokenizer)
        if not files.tokenizer.is_file():
            raise UserError(f"{files.tokenizer} does not exist (17 MB); copy it from where {files.weights.name} came from")
        return files

    @property
    def weight_files(self) -> list[Path]:
        """Files with tensors: one, or all shards."""
        if self.weights.is_file():
            return [self.weights]
        single = self.weights / "model.safetensors"
        files = [single] if single.exists() else sorted(self.weights.glob("model-*-of-*.safetensors"))
        if not files:
            raise UserError(f"{self.weights} has no weights; expected model.safetensors, or the shards model-*-of-*.safetensors")
        return files

    def width(self) -> int:
        """Return the width of an embedding, text_dim, from a configuration or from shapes; no weights are loaded.

        Raises:
            UserError: the files are not those of a UMT5 encoder.
        """
        if self.weights.is_dir():
            width = read_json(self.weights / "config.json").get("d_model")
        else:
            tensors = strip_wrappers(read_container(self.weights), self.weights)
            width = _sizes(rename(tensors, transformers_name, self.weights), self.weights)["d_model"]
        if type(width) is not int or width < 1:
            raise UserError(f"{self.weights / 'config.json'}: d_model is {str(width)[:60]!r}; expected the width of a umt5 encoder")
        return width

    def fingerprint(self) -> str:
        """Return a digest that tells encoders apart: of sizes and of samples spread over every file, at most 4 MiB each, wherever they lie.

        Training changes every tensor, so samples suffice; reading all 11 GB would take longer than most encodings.
        """
        blocks, length = 64, 1 << 16
        configs = [self.weights / "config.json"] if self.weights.is_dir() else []
        samples = hashlib.sha256()
        for path in [*self.weight_files, *configs, self.tokenizer]:
            try:
                with path.open("rb") as file:
                    size = file.seek(0, os.SEEK_END)
                    samples.update(size.to_bytes(8, "big"))
                    for block in range(blocks):
                        file.seek(max(0, size - length) * block // (blocks - 1))
                        samples.update(file.read(length))
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from error
        return samples.hexdigest()


# Module names inside one block of the official encoder, and outside the blocks: those of transformers. (wan/modules/t5.py, T5Encoder)
_BLOCK_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_MODEL_NAMES = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}


def transformers_name(name: str) -> str:
    """Return the name in transformers' UMT5EncoderModel of an official parameter; a name that is not official is returned as it is."""
    module, _, parameter = name.rpartition(".")
    if module in _MODEL_NAMES:
        return f"{_MODEL_NAMES[module]}.{parameter}"
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if match and match[2] in _BLOCK_NAMES:
        return f"encoder.block.{match[1]}.{_BLOCK_NAMES[match[2]]}.{parameter}"
    return name


def load_umt5(files: TextEncoderFiles, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu") -> UMT5EncoderModel:
    """Return a frozen encoder in evaluation mode.

    Tensors of the file's dtype stay mapped on a CPU, and go to a GPU one by one: there is never a second copy in host memory.

    Raises:
        UserError: damaged, or not the weights of such an encoder; names that are missing or too many are listed.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    source = files.weights
    state: dict[str, Tensor] = {}
    for file in files.weight_files:
        part = rename(strip_wrappers(read_container(file), file), transformers_name, file)
        if repeated := part.keys() & state.keys():
            raise UserError(f"{file} repeats {len(repeated)} tensors of another shard ({listed(repeated, 3)}); copy the shards again")
        state |= part
    if "shared.weight" in state:  # one table under two names, which some files hold once and some twice
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    sizes = read_json(source / "config.json") if source.is_dir() else _sizes(state, source)
    if sizes.setdefault("model_type", "umt5") != "umt5":
        raise UserError(f"{source / 'config.json'} describes a {sizes['model_type']}; expected a umt5 encoder")
    try:
        with torch.device("meta"):
            model = UMT5EncoderModel(UMT5Config.from_dict(sizes))
    except Exception as error:  # transformers hardly checks sizes, so what a wrong one raises is open
        raise UserError(f"{source}: no encoder can be built from its configuration ({type(error).__name__}: {error})") from error
    load_into(model, state, source=source)
    model.set_input_embeddings(model.shared)  # loading gave each of the two names a parameter of its own
    return nn.Module.to(model, device, dtype).eval().requires_grad_(False)


def _sizes(state: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """Return transformers' configuration of an official file, from its shapes and from what the official code fixes."""
    block = "encoder.block.0.layer"
    needed = ["shared.weight", f"{block}.0.SelfAttention.q.weight", f"{block}.0.SelfAttention.relative_attention_bias.weight"]
    needed.append(f"{block}.1.DenseReluDense.wi_0.weight")
    if missing := [name for name in needed if name not in state or state[name].dim() != 2 or not state[name].numel()]:
        found = f"{len(state)} tensors such as {listed(state, 3)}" if state else "no tensors"
        raise UserError(f"{source} is not a UMT5 encoder: it lacks {listed(missing)}; it holds {found}")
    embedding, query, bias, gate = (state[name].shape for name in needed)
    blocks = {match[1] for name in state if (match := re.match(r"encoder\.block\.(\d+)\.", name))}
    return {
        "vocab_size": embedding[0],
        "d_model": embedding[1],
        "relative_attention_num_buckets": bias[0],
        "num_heads": bias[1],
        "d_kv": query[0] // bias[1],
        "d_ff": gate[0],
        "num_layers": len(blocks),
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
    }


def load_tokenizer(file: Path, text_len: int) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, set to cut prompts to `text_len` tokens, the end token included.

    The file says everything about the tokenizer. transformers' own loader, from its version 5 on, goes by the class name in
    tokenizer_config.json instead, and builds a T5Tokenizer without the file's normalizer.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.enable_truncation(text_len)
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(f"{file} is damaged or not a tokenizer ({error}); copy it again") from error
    if not tokenizer.encode("").ids:
        raise UserError(f"{file} adds no end token to a prompt; expected the tokenizer.json of google/umt5-xxl")
    return tokenizer


# Encoding --------------------------------------------------------------------------------------------------------------------------


class UMT5TextEncoder:
    """A tokenizer and its encoder.

    A prompt is encoded by itself and without padding: its embedding does not depend, in any bit, on the prompts beside it, and no time is
    spent on rows that become zero. The official code pads to `text_len` and masks; the result is the same up to rounding.
    """

    def __init__(self, model: UMT5EncoderModel, tokenizer: Tokenizer, text_len: int = 512) -> None:
        if tokenizer.get_vocab_size() > model.shared.num_embeddings:
            sizes = f"{tokenizer.get_vocab_size()} tokens, the encoder {model.shared.num_embeddings}"
            raise UserError(f"tokenizer and text encoder do not belong together: the tokenizer knows {sizes}")
        self.model = model
        self.tokenizer = tokenizer
        self.text_len = text_len

    @classmethod
    def load(
        cls, files: TextEncoderFiles, *, text_len: int = 512, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
    ) -> UMT5TextEncoder:
        """Return an encoder of the given files; `text_len` rows in every embedding."""
        tokenizer = load_tokenizer(files.tokenizer, text_len)
        return cls(load_umt5(files, dtype=dtype, device=device), tokenizer, text_len)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Return the rows of a cleaned prompt's tokens, [n <= text_len, text_dim], on the CPU, in the encoder's dtype.

        A prompt that is too long is cut, as in the official code, and the log says so.
        """
        tokens = self.tokenizer.encode(prompt)
        if tokens.overflowing:
            logger.warning("the prompt %r is longer than %d tokens; the rest is cut off", prompt[:60] + "...", self.text_len)
        ids = torch.tensor([tokens.ids], device=self.model.device)
        rows = self.model(input_ids=ids).last_hidden_state[0]
        if not rows.isfinite().all():
            raise UserError(f"the embedding of {prompt[:60]!r} is not finite; use bfloat16 or float32, or check the encoder's weights")
        return rows.cpu()

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings of prompts, [B, text_len, text_dim] float32 on the CPU; rows beyond a prompt's tokens are exactly 0."""
        return _pad([self.encode(clean_prompt(prompt)) for prompt in prompts], self.text_len)


def _pad(rows: Sequence[Tensor], text_len: int) -> Tensor:
    embeddings = torch.zeros(len(rows), text_len, rows[0].shape[1])
    for embedding, part in zip(embeddings, rows, strict=True):
        embedding[: len(part)] = part
    return embeddings


# The cache -------------------------------------------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Return the default place of embeddings: arcopo_fast/text in the user's cache directory (XDG), which all runs share."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "arcopo_fast" / "text"


class CachedTextEncoder:
    """Embeddings from disk; a prompt that has none is encoded once, by an encoder that exists only meanwhile.

    Processes may share a directory: a file appears complete or not at all, and two that encode the same prompt write the same.
    Files that are broken are reported and made again.

    Args:
        load: makes the encoder, of which `encode` is used.
        fingerprint: tells apart all encoders, and settings of one, that share the directory.
        text_len: rows of every embedding, padding included.
        directory: holds one file for each prompt, with the rows of its tokens; None: `cache_directory()`.
    """

    def __init__(
        self, load: Callable[[], UMT5TextEncoder], *, fingerprint: str, text_len: int = 512, directory: str | Path | None = None
    ) -> None:
        self.load = load
        self.fingerprint = fingerprint
        self.text_len = text_len
        self.directory = cache_directory() if directory is None else Path(directory)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        text_len: int = 512,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        directory: str | Path | None = None,
    ) -> CachedTextEncoder:
        """Return the encoder of a Wan2.1 directory, official or in diffusers' form. Nothing is loaded yet, but its files are there.

        Args:
            checkpoint: the directory with the encoder and its tokenizer.
            text_len: as in the generator's configuration.
            dtype: of the encoder's weights and arithmetic, and of the stored rows.
            device: where the encoder runs; embeddings are always on the CPU.
            directory: where embeddings are kept; None: `cache_directory()`.
        """
        files = TextEncoderFiles.find(checkpoint)
        load = partial(UMT5TextEncoder.load, files, text_len=text_len, dtype=dtype, device=device)
        return cls(load, fingerprint=f"{files.fingerprint()} {dtype}", text_len=text_len, directory=directory)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings of prompts, [B, text_len, text_dim] float32 on the CPU; rows beyond a prompt's tokens are exactly 0."""
        prompts = [clean_prompt(prompt) for prompt in prompts]
        cached = {prompt: self._read(prompt) for prompt in dict.fromkeys(prompts)}
        rows = {prompt: part for prompt, part in cached.items() if part is not None}
        rows |= self._encode([prompt for prompt in cached if prompt not in rows])
        return _pad([rows[prompt] for prompt in prompts], self.text_len)

    def encode_all(self, prompts: Sequence[str]) -> None:
        """Put the embeddings of all prompts of a run on disk, so that the encoder is not needed, and takes no memory, later."""
        distinct = dict.fromkeys(clean_prompt(prompt) for prompt in prompts)
        for _ in self._encode([prompt for prompt in distinct if self._read(prompt) is None]):
            pass

    def _encode(self, prompts: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        if not prompts:
            return
        print(f"text encoder: loading, for {len(prompts)} new prompt{'s' * (len(prompts) > 1)}", file=sys.stderr)
        encoder = self.load()
        try:
            for prompt in tqdm(prompts, desc="text encoder", unit="prompt", disable=None, leave=False):
                rows = encoder.encode(prompt)
                self._write(prompt, rows)
                yield prompt, rows
        finally:
            del encoder
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _file(self, prompt: str) -> Path:
        key = json.dumps([prompt, self.fingerprint, self.text_len])
        return self.directory / f"{digest(key)}.safetensors"

    def _read(self, prompt: str) -> Tensor | None:
        """Return the rows of a cleaned prompt; None if its file is missing or broken."""
        path = self._file(prompt)
        try:
            with safe_open(path, framework="pt") as file:
                rows = file.get_tensor("rows")
                intact = (file.metadata() or {}).get("sha256") == _digest(prompt, rows)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            logger.warning("%s is broken (%s); encoding the prompt again", path, error)
            return None
        if not intact:
            logger.warning("%s is broken (its checksum is wrong); encoding the prompt again", path)
            return None
        return rows

    def _write(self, prompt: str, rows: Tensor) -> None:
        content = save({"rows": rows.contiguous()}, {"prompt": prompt, "sha256": _digest(prompt, rows)})
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            atomic_write(self._file(prompt), content)
        except OSError as error:
            advice = "free space there, or choose another cache directory"
            raise UserError(f"{self.directory}: embeddings cannot be written: {error.strerror}; {advice}") from error


def _digest(prompt: str, rows: Tensor) -> str:
    """Return the digest of a prompt and its rows, bit for bit."""
    about = json.dumps([prompt, str(rows.dtype), list(rows.shape)])
    return digest(about.encode() + rows.contiguous().view(torch.uint8).numpy().tobytes())
