"""Judges that are a Qwen2-VL with a small head: the network, and the strict loading of its official checkpoints.

VideoAlign and HPSv3 are such judges. Both were trained, and are run by their authors, with a forward of their own that passes no position
ids to the language model: vision tokens are numbered one after the other like text, in all three axes of the rotary embedding, and not by
Qwen2-VL's grid positions (VideoAlign trainer.py and HPSv3 qwen2vl_trainer.py, `self.model(position_ids=None, inputs_embeds=...)`). So are
they here.

The base model's weights are not needed: the checkpoints hold all of them. Its configuration, tokenizer and preprocessor are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from arcopo_fast.errors import UserError, misfit
from arcopo_fast.rewards.qwen2vl.frames import Patches
from arcopo_fast.storage import hub
from arcopo_fast.storage.textfiles import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BASE_FILES = ("config.json", "tokenizer.json", "preprocessor_config.json")

# The network -----------------------------------------------------------------------------------------------------------------------


class Qwen2VLJudge(nn.Module):
    """Qwen2-VL's two towers, and a head that reads scores off the language model's last hidden states.

    config: transformers' Qwen2VLConfig. head: applied in fp32; in bf16 scores above 4 would come in steps of 1/32.
    """

    def __init__(self, config: Any, head: nn.Module) -> None:
        from transformers.models.qwen2_vl import modeling_qwen2_vl as modeling

        super().__init__()
        # Qwen2VLModel was the language model alone before transformers 4.52.
        language_model = getattr(modeling, "Qwen2VLTextModel", modeling.Qwen2VLModel)
        self.visual = modeling.Qwen2VisionTransformerPretrainedModel._from_config(config.vision_config, attn_implementation="sdpa")
        self.language_model = language_model._from_config(config.get_text_config(), attn_implementation="sdpa")
        self.rm_head = head

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.language_model.embed_tokens.weight.device

    def forward(self, patches: Tensor, grid: Tensor, ids: Tensor, pad: int, places: Sequence[int]) -> Tensor:
        """Scores [B, len(places), outputs] fp32 of B conversations of the same length, each about one video or image.

        Args:
            patches, grid: [patches, values] and [B, 3], as from `Patches`.
            ids: [B, L] tokens; where they are `pad`, the features of the vision tower are put in.
            places: of the tokens in L where the head reads.
        """
        batch, length = ids.shape
        embeddings = self.language_model.embed_tokens(ids)
        features = self.visual(patches.to(embeddings.dtype), grid_thw=grid)
        features = getattr(features, "pooler_output", features)  # from transformers 5 on; what else it holds is not merged yet
        embeddings = embeddings.masked_scatter((ids == pad)[..., None], features.to(embeddings.dtype))
        positions = torch.arange(length, device=ids.device).expand(3, batch, length)
        hidden = self.language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state
        return self.rm_head(hidden[:, list(places)].float())


def build(base: Path, tokenizer: Tokenizer, head: Callable[[int], nn.Module]) -> Qwen2VLJudge:
    """A judge of the sizes of a base model, its parameters on the meta device.

    Args:
        base: directory with the base model's config.json.
        tokenizer: with the judge's own tokens; the embedding gets a row for each token, as in the official code.
        head: makes the head for hidden states of that width.
    """
    from accelerate import init_empty_weights
    from transformers import Qwen2VLConfig

    try:
        config = Qwen2VLConfig.from_dict(read_json(base / "config.json"))
        config.get_text_config().vocab_size = tokenizer.get_vocab_size()
        with init_empty_weights():  # of the parameters alone: the rotary frequencies are buffers that no file holds
            return Qwen2VLJudge(config, head(config.get_text_config().hidden_size))
    except UserError:
        raise
    except Exception as error:  # transformers hardly checks sizes, so what a wrong one raises is open
        raise UserError(f"{base}: no Qwen2-VL can be built from config.json ({type(error).__name__}: {error}); copy it again") from error


def load_patches(base: Path) -> Patches:
    """Return how the base model cuts frames into patches."""
    vision, file = read_json(base / "config.json").get("vision_config", {}), base / "preprocessor_config.json"
    colors = read_json(file)
    try:
        sizes = (vision.get("patch_size", 14), vision.get("temporal_patch_size", 2), vision.get("spatial_merge_size", 2))
        return Patches(tuple(colors["image_mean"]), tuple(colors["image_std"]), *sizes)
    except KeyError as error:
        raise UserError(f"{file} has no {error.args[0]}; get it again") from None


def find_base(name: str, files: Sequence[str] = BASE_FILES) -> Path:
    """The directory of a base model with these files: `name` is a path, or owner/name on Hugging Face."""
    return hub.find(name if Path(name).is_dir() else f"hf://{name}", files)


# Loading ---------------------------------------------------------------------------------------------------------------------------

_PREFIXES = (
    ("model.visual.", "visual."),  # transformers 4.52 and later
    ("model.language_model.", "language_model."),
    ("model.", "language_model."),  # before
)


def judge_name(name: str) -> str:
    """The name in `Qwen2VLJudge` of a parameter in a file, whichever transformers and PEFT wrote it."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    name = re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name)
    for old, new in _PREFIXES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@dataclass(frozen=True)
class LoRA:
    """An adapter on every linear layer of the language model. rank: r. scale: alpha / r, or alpha / sqrt(r) if it is rank-stabilised."""

    rank: int
    scale: float

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LoRA:
        """Read model_config.json's `peft_lora_config`."""
        rank, alpha = int(config["lora_r"]), float(config["lora_alpha"])
        return cls(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))

    def shapes(self, judge: Qwen2VLJudge) -> dict[str, torch.Size]:
        """Return the shapes of its tensors, by name."""
        layers = {
            name: layer for name, layer in judge.named_modules() if isinstance(layer, nn.Linear) and name.startswith("language_model.")
        }
        return {f"{name}.lora_A.weight": torch.Size((self.rank, layer.in_features)) for name, layer in layers.items()} | {
            f"{name}.lora_B.weight": torch.Size((layer.out_features, self.rank)) for name, layer in layers.items()
        }

    def merge(self, state: dict[str, Tensor]) -> None:
        """W <- W + scale B A, computed in fp32.

        It is what the adapter does up to the rounding of W, and leaves a third of its kernels.
        """
        for layer in [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]:
            change = state.pop(f"{layer}.lora_B.weight").float() @ state.pop(f"{layer}.lora_A.weight").float()
            weight = state[f"{layer}.weight"]
            state[f"{layer}.weight"] = (weight.float() + self.scale * change).to(weight.dtype)


def load_strict(judge: Qwen2VLJudge, files: Mapping[str, Tensor], source: Path, *, dtype: torch.dtype, lora: LoRA | None = None) -> None:
    """Put the tensors of a checkpoint into a judge that was built on the meta device, all of them or nothing.

    Args:
        files: tensors by the names of the files; they become the parameters, without a copy where their dtype is right.
        source: for messages.
        dtype: of the towers. The head is fp32.
        lora: the adapter that the checkpoint must hold; it is merged.

    Raises:
        UserError: names are missing, unexpected, or of another shape.
    """
    names = {judge_name(name): name for name in files if name.removeprefix("base_model.model.") != "lm_head.weight"}  # no score needs it
    state = {name: files[original] for name, original in names.items()}
    needed = {name: tensor.shape for name, tensor in judge.state_dict().items()} | (lora.shapes(judge) if lora else {})
    if problems := misfit(
        {names[name]: tensor.shape for name, tensor in state.items()}, {names.get(name, name): needed[name] for name in needed}
    ):
        raise UserError(f"{source} is not such a judge: {problems}; get it again, or the base model that belongs to it")

    if lora:
        lora.merge(state)
    state = {name: tensor.to(torch.float32 if name.startswith("rm_head.") else dtype) for name, tensor in state.items()}
    judge.load_state_dict(state, strict=True, assign=True)
    judge.eval().requires_grad_(False)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, mapped where they lie, not yet read. Nothing in a pickle can run.

    Raises:
        UserError: damaged, or something else.
    """
    from safetensors.torch import load_file

    try:
        content = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever bytes make the readers stumble over: the set of exceptions is open
        raise UserError(f"{file} cannot be read as weights ({type(error).__name__}); get it again") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file} holds no state dict; get it again")
    return dict(content)


def tower_dtype() -> torch.dtype:
    """Return the dtype of a judge's towers: bf16, fp32 where there is no GPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32
