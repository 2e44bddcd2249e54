"""Make the toy checkpoint from nothing, on a CPU: VAE, classifier, text table, latents, teacher, few-step student.

    python -m arcopo_fast.toy.pretrain [DIRECTORY] [--quick] [--seed N]

Each stage leaves its result in the directory and is skipped when that is there, so an interrupted run goes on where it stopped. The
finished checkpoint is what ships in `arcopo_fast/toy/checkpoint`: transformer/, vae/, text/, classifier/, training_log.jsonl, metrics.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor

from arcopo_fast.config.sections import SamplerConfig
from arcopo_fast.evaluation.influence import noise_influence
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.model.checkpoints import load_into, read_state_dict, save_transformer
from arcopo_fast.model.sizes import CausalWanConfig
from arcopo_fast.rollout.stream import VideoShape
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.storage.atomic import atomic_path, atomic_write
from arcopo_fast.toy import data
from arcopo_fast.toy.generator_training import Course, GuidedTeacher, Log, distill, train_teacher
from arcopo_fast.toy.metrics import CLASSIFIER_FILE_NAME, train_classifier
from arcopo_fast.toy.text import ToyTextEncoder
from arcopo_fast.toy.vae_training import encode, load_vae, train_vae

GENERATOR = CausalWanConfig(
    num_layers=5,
    num_attention_heads=4,
    attention_head_dim=32,
    ffn_dim=448,
    freq_dim=64,
    text_dim=32,
    text_len=8,
    in_channels=16,
    out_channels=16,
)
SHAPE = VideoShape((2,) * 4, GENERATOR.in_channels, 8, 8)
SAMPLER = SamplerConfig(steps=[1000, 350, 200, 100], warp=False, shift=1.0)


class Sizes:
    """Steps and videos of every stage; `quick` only shows that it runs."""

    def __init__(self, quick: bool) -> None:
        self.vae_steps = 20 if quick else 3000
        self.vae_evaluation_videos = 8 if quick else 256
        self.classifier_steps = 10 if quick else 2400
        self.classifier_videos = 64 if quick else 3072
        self.videos = 64 if quick else 4096
        self.teacher_steps = 4 if quick else 4200
        self.distill_steps = 8 if quick else 360
        self.guided_steps = 4 if quick else 12
        self.batch = 4 if quick else 16


def initialize(config: CausalWanConfig, seed: int) -> CausalWan:
    """Return a generator to train from: PyTorch's initialization, but an output that starts at zero."""
    torch.manual_seed(seed)
    model = CausalWan(config)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


@torch.no_grad()
def encode_videos(vae: Any, count: int, latent_frames: int, seed: int) -> tuple[Tensor, list[str]]:
    """Return normalized latents [count, latent_frames, C, h, w] float16 of fresh videos, and their captions."""
    random = torch.Generator().manual_seed(seed)
    latents: list[Tensor] = []
    captions: list[str] = []
    while len(captions) < count:
        frames, texts, _ = data.sample(min(32, count - len(captions)), latent_frames, random)
        latents.append(encode(vae, frames).half())
        captions += texts
    return torch.cat(latents), captions


def stage(directory: Path, name: str, model: CausalWan, train: Callable[[], CausalWan]) -> CausalWan:
    """Return the trained weights of a stage: from the directory if they are there, else by training."""
    if (directory / name / "config.json").exists():
        load_into(model, read_state_dict(directory / name))
        return model
    result = train()
    save_transformer(directory / name, result.half().state_dict(), GENERATOR.to_dict())
    return result.float()


def autoencoder(directory: Path, sizes: Sizes, seed: int, log: Log) -> Any:
    """Return the VAE of a directory, and train it first if it is missing; likewise the classifier, which judges what the VAE decodes."""
    if not (directory / "vae" / "config.json").exists():
        trained = train_vae(directory / "vae", steps=sizes.vae_steps, seed=seed, evaluation_videos=sizes.vae_evaluation_videos)
        log({"stage": "vae"} | trained)
    vae = load_vae(directory / "vae")
    if not (directory / "classifier" / CLASSIFIER_FILE_NAME).exists():
        accuracies = train_classifier(
            directory / "classifier",
            vae=vae,
            videos=sizes.classifier_videos,
            steps=sizes.classifier_steps,
            seed=seed,
            held_out_videos=min(512, sizes.videos),
        )
        log({"stage": "classifier"} | accuracies)
    return vae


def text_encoder(directory: Path, seed: int) -> ToyTextEncoder:
    """Return the text encoder of a directory, and make it first if it is missing."""
    if not directory.exists():
        captions, width, length = data.all_captions(), GENERATOR.text_dim, GENERATOR.text_len
        ToyTextEncoder.for_captions(captions, text_dim=width, text_len=length, seed=seed).save_pretrained(directory)
    return ToyTextEncoder.from_pretrained(directory)


def generator(directory: Path, sizes: Sizes, vae: Any, text: ToyTextEncoder, seed: int, log: Log) -> CausalWan:
    """Return the few-step generator of a directory; the stages before it that are missing are run first."""
    latents_file = directory / "latents.pt"
    if not latents_file.exists():
        with atomic_path(latents_file) as partial:
            torch.save(encode_videos(vae, sizes.videos, SHAPE.frames, seed + 1), partial)
    latents, captions = torch.load(latents_file, weights_only=True)
    prompts = text(captions)

    model = initialize(GENERATOR, seed)
    course = Course(sizes.teacher_steps, sizes.batch, lr=2e-3, seed=seed + 2, log=log)
    teacher = stage(directory, "teacher", model, lambda: train_teacher(model, latents, prompts, SHAPE.chunk_frames, course, shift=3.0))
    guided = GuidedTeacher(teacher, SHAPE, steps=sizes.guided_steps, shift=2.0, guidance=2.0, batch=sizes.batch)
    distillation = Course(sizes.distill_steps, sizes.batch, lr=1e-3, seed=seed + 3, log=log)
    student, texts = initialize(GENERATOR, seed), text(data.all_captions())
    return stage(directory, "transformer", student, lambda: distill(guided, texts, SHAPE, SAMPLER, distillation))


def pretrain(directory: Path, *, quick: bool, seed: int) -> dict[str, Any]:
    """Run every stage that is missing; return the metrics that are written to metrics.json."""
    directory.mkdir(parents=True, exist_ok=True)

    def log(record: dict[str, Any]) -> None:
        line = json.dumps({key: round(value, 5) if isinstance(value, float) else value for key, value in record.items()})
        with open(directory / "training_log.jsonl", "a") as file:
            file.write(line + "\n")
        print(line, file=sys.stderr, flush=True)

    sizes = Sizes(quick)
    vae = autoencoder(directory, sizes, seed, log)
    metrics: dict[str, Any] = {"vae": json.loads((directory / "vae" / "metrics.json").read_text())}
    text = text_encoder(directory / "text", seed)
    student = generator(directory, sizes, vae, text, seed, log)
    metrics["noise_influence"] = noise_influence(student, text(data.all_captions()[::12]), SHAPE, SAMPLER, seed=seed + 4)
    metrics["parameters"] = sum(parameter.numel() for parameter in student.parameters())
    atomic_write(directory / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    log({"stage": "done"})
    return metrics


def main(argv: list[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m arcopo_fast.toy.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs/toy-checkpoint"))
    parser.add_argument("--quick", action="store_true", help="a few steps of every stage, to see that it runs (a minute)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    tune_for_cpu()
    pretrain(arguments.directory, quick=arguments.quick, seed=arguments.seed)


if __name__ == "__main__":
    main(sys.argv[1:])
