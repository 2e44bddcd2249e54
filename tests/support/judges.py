"""Tiny random Qwen2-VL judges on disk, in the official layouts: as transformers 4.45 and PEFT 0.10 named their tensors.

And what scores of theirs should be: transformers' own Qwen2VLForConditionalGeneration, with PEFT's adapter, run as the official code runs
it: right padding, a mask, one position after the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from arcopo_fast.errors import UserError
from arcopo_fast.rewards.base import Reward
from arcopo_fast.storage import hub

try:  # the processor that needs no torchvision
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as ImageProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as smart_resize
except ImportError:  # before transformers 5
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as ImageProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as smart_resize

QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
VIDEO_TEMPLATE = "\nJudge the {{video}}.\nQuality: <|VQ_reward|>\nMotion: <|MQ_reward|>\nText - {text_prompt}\nMatch: <|TA_reward|>\nEND\n"
FRAME_TEMPLATE = ("\nJudge the image.\nText - {text_prompt}\n\n", "\nRating: <|Reward|>\n\nEND\n")
MEANS_STDS = {"VQ": (3.5, 2.25), "MQ": (1.25, 1.5), "TA": (2.75, 2.5)}


def published_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory in which, from now on, published files are looked for, and nowhere else."""
    monkeypatch.setenv("ARCOPO_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "models"


def base_config() -> dict[str, Any]:
    """Return a smaller config.json of the form of Qwen/Qwen2-VL-2B-Instruct's."""
    return {
        "image_token_id": 260,
        "video_token_id": 261,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "vision_start_token_id": 258,
        "vision_end_token_id": 259,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 80,
        "max_position_embeddings": 32768,
        "max_window_layers": 2,
        "model_type": "qwen2_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "mlp_ratio": 4,
            "num_heads": 4,
            "in_chans": 3,
            "hidden_size": 48,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
        "vocab_size": 300,  # more rows than tokens, as published
    }


def make_tokenizer() -> Tokenizer:
    """One token a byte, and the base model's own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(QWEN_TOKENS)
    return tokenizer


def write_base(directory: Path) -> Path:
    """The small files of a base model, without weights."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(base_config()))
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD, "patch_size": 14}))
    make_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


class Reference(nn.Module):
    """The judge that the official code builds: the base model, its embedding cut to the tokenizer, a head, and an adapter."""

    def __init__(self, tokens: Sequence[str], head: nn.Module, *, rank: int = 0, alpha: int = 0) -> None:
        super().__init__()
        self.tokenizer = make_tokenizer()
        self.base_rows = base_config()["vocab_size"]
        self.model = Qwen2VLForConditionalGeneration._from_config(Qwen2VLConfig.from_dict(base_config()), attn_implementation="sdpa")
        self.tokenizer.add_special_tokens(list(tokens))
        self.model.resize_token_embeddings(self.tokenizer.get_vocab_size())
        self.model.rm_head = head
        for parameter in self.model.parameters():  # biases and norms too: a tensor at its default could be left out unseen
            scale = 1.5 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3  # large enough for scores to tell videos apart
            nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=scale)
        if rank:
            linear = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
            self.model = get_peft_model(self.model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear))
            for name, parameter in self.model.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(parameter, std=0.15)
        self.model.float().eval().requires_grad_(False)
        self.ids = [self.tokenizer.token_to_id(token) for token in tokens]

    def official_state(self) -> dict[str, Tensor]:
        """Its tensors under the names of transformers 4.45: `visual` beside `model`, which is the language model."""
        return {
            re.sub(r"^(base_model\.model\.|)model\.(?:(visual\.)|language_(model\.))", r"\1\2\3", name): tensor.clone()
            for name, tensor in self.model.state_dict().items()
        }

    @torch.no_grad()
    def scores(self, texts: Sequence[str], frames: Sequence[Tensor], kind: str) -> Tensor:
        """[B, tokens, outputs] of conversations in one right-padded batch.

        frames: [F, 3, H, W] uint8, already of the right size. kind: "video", or "image" of one frame.
        """
        pad = self.tokenizer.token_to_id(f"<|{kind}_pad|>")
        patches, grids, rows = [], [], []
        for text, video in zip(texts, frames):
            values, grid = official_patches(video)
            patches.append(values)
            grids.append(grid)
            chat = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|{kind}_pad|>"
            ids = self.tokenizer.encode(f"{chat}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n").ids
            rows.append([part for one in ids for part in [one] * (grid[0] * grid[1] * grid[2] // 4 if one == pad else 1)])
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.tokenizer.token_to_id("<|im_end|>")] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        network = self.model.base_model.model if hasattr(self.model, "peft_config") else self.model
        # Before transformers 4.52 `model` was the language model, and the vision tower stood beside it.
        towers = network.model if hasattr(network.model, "visual") else network
        language_model = getattr(network.model, "language_model", network.model)
        features = towers.visual(torch.cat(patches), grid_thw=torch.tensor(grids))
        features = getattr(features, "pooler_output", features)  # a bare tensor before transformers 5
        embeddings = network.get_input_embeddings()(ids)
        embeddings[ids == pad] = features
        positions = torch.arange(longest).expand(3, len(rows), -1)
        hidden = language_model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions).last_hidden_state
        places = torch.stack([torch.stack([(row == one).nonzero()[0, 0] for one in self.ids]) for row in ids])
        return network.rm_head(hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])))


def official_patches(video: Tensor) -> tuple[Tensor, list[int]]:
    """Patches and their grid, by transformers' image processor: of a video one frame at a time, then two frames into each patch."""
    processor = ImageProcessor(image_mean=MEAN, image_std=STD, do_resize=False)
    images = [processor(np.asarray(frame), return_tensors="pt", input_data_format="channels_first") for frame in video]
    values = torch.stack([image["pixel_values"].unflatten(1, (3, 2, 14, 14)) for image in images])  # [F, patches, 3, 2, 14, 14]
    if len(values) % 2:
        values = torch.cat([values, values[-1:]])
    pairs = torch.stack([values[::2, :, :, 0], values[1::2, :, :, 0]], dim=3)  # both frames of an image's patches are the same
    return pairs.flatten(0, 1).flatten(1), [len(pairs), *images[0]["image_grid_thw"][0, 1:].tolist()]


def write_videoreward(directory: Path, state: dict[str, Tensor], *, base: str, rank: int, alpha: int) -> Path:
    """KlingTeam/VideoReward's layout, with the instruction beside it. An older checkpoint stands there too, and is no checkpoint."""
    checkpoint = directory / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    (directory / "checkpoint-9").mkdir()
    (directory / "checkpoint-9" / "model.pth").write_bytes(b"older")
    torch.save(state, checkpoint / "model.pth")
    settings = {
        "data_config": {
            "max_frame_pixels": 200704,
            "num_frames": None,
            "fps": 2.0,
            "eval_dim": ["VQ", "MQ", "TA"],
            "prompt_template_type": "detailed_special",
            "sample_type": "uniform",
        },
        "model_config": {"model_name_or_path": base, "output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
        "peft_lora_config": {"lora_enable": True, "lora_r": rank, "lora_alpha": alpha, "lora_dropout": 0.05, "use_rslora": False},
        "inference_config": {f"{name}_{what}": value for name, pair in MEANS_STDS.items() for what, value in zip(("mean", "std"), pair)},
    }
    (directory / "model_config.json").write_text(json.dumps(settings))
    write_instruction(directory / "prompt_template.py", DETAILED_PROMPT_WITH_SPECIAL_TOKEN=VIDEO_TEMPLATE)
    return directory


def split_adapter(directory: Path, base: Path, reference: Reference) -> None:
    """The other layout of a VideoReward: the adapter and what was trained beside it, over the base model's own weights."""
    checkpoint = directory / "checkpoint-20"
    state = torch.load(checkpoint / "model.pth", weights_only=True)
    (checkpoint / "model.pth").unlink()
    trained = ("rm_head", "visual.merger")
    adapter = {name.replace(".default", ""): tensor for name, tensor in state.items() if ".lora_" in name}
    beside = {name: tensor for name, tensor in state.items() if any(part in name for part in trained)}
    save_file(adapter, checkpoint / "adapter_model.safetensors")
    torch.save(beside, checkpoint / "non_lora_state_dict.pth")
    plain = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): torch.randn_like(tensor) if name in beside else tensor
        for name, tensor in state.items()
        if ".lora_" not in name
    }
    embedding = plain["model.embed_tokens.weight"]  # the published one has more rows than there are tokens
    plain["model.embed_tokens.weight"] = torch.cat([embedding, torch.randn(reference.base_rows - len(embedding), embedding.shape[1])])
    first, second = [name for name in plain if "visual" in name], [name for name in plain if "visual" not in name]
    second = [name for name in second if not name.startswith(("rm_head", "lm_head"))]  # tied, so not in the file
    for number, names in enumerate((first, second), start=1):
        save_file({name: plain[name].contiguous() for name in names}, base / f"model-0000{number}-of-00002.safetensors")


def write_instruction(file: Path, **texts: str) -> None:
    """A Python file with texts at its top level, which must not be run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    assignments = "\n\n".join(f'{name} = """{text}"""' for name, text in texts.items())
    file.write_text(f"import no_such_module\n\nNUMBER = 3\n\n{assignments}\n\nraise SystemExit('run')\n")


def assert_missing_file_is_named(judge: Callable[[], object], file: Path, parts: Sequence[str]) -> None:
    """Hold a judge of which a published file is gone to an error that names it, with where it comes from."""
    file.unlink()
    with pytest.raises(UserError) as raised:
        judge()
    assert all(part in str(raised.value) for part in parts), str(raised.value)


def assert_sources_are_all_that_is_read(judge: type[Reward], published: Path, frames: Tensor) -> None:
    """Hold a judge's `sources` to the published files, with which alone it gives finite scores of one video."""
    named = {place / file for source, files in judge.sources if (place := hub.local(source, files)) for file in files or [""]}
    assert named == {file for file in published.rglob("*") if file.is_file()}
    assert all(values.isfinite().all() for values in judge()(frames, ["a"]).values())
