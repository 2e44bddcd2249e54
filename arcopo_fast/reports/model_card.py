"""The model card of an adapter, of a run's or a merged one: README.md beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from arcopo_fast.config.reading import resolved_yaml
from arcopo_fast.config.schema import Config, objective_class
from arcopo_fast.evaluation.adapters import Pair, scale_text
from arcopo_fast.evaluation.changes import changes
from arcopo_fast.reports.table import markdown_table, plain, plus_minus, signed
from arcopo_fast.storage.identity import digest

HOW_TO_LOAD = """## How to load it

`adapter_model.safetensors` with `adapter_config.json` is PEFT's form, `pytorch_lora_weights.safetensors` is diffusers':

```python
transformer.load_lora_adapter("adapter", weight_name="pytorch_lora_weights.safetensors", prefix="transformer")  # WanTransformer3DModel
model = peft.PeftModel.from_pretrained(model, "adapter")
```

The terms of use are those of the generator that it adapts.
"""
"""Ends the card of any adapter."""


def config_hash(config: Config) -> str:
    """Twelve characters that change with any setting."""
    return digest(resolved_yaml(config))[:12]


def model_card(config: Config, evaluation: Mapping[str, Any]) -> str:
    """README.md of the adapter's directory: what it is, how it was made, what it changed and how to load it."""
    header = yaml.safe_dump(
        {"library_name": "peft", "base_model": config.generator.checkpoint, "tags": ["text-to-video", "lora", "reinforcement-learning"]},
        sort_keys=False,
    )
    rows = [
        [change.name, change.kind, plain(change.before), plain(change.after), signed(change.change) + plus_minus(change.error)]
        for change in changes(config, evaluation)
    ]
    results = markdown_table(["", "", "before", "after", "change"], rows, padded=False) if rows else "Not evaluated.\n"
    weights = ", ".join(f"{name} x {weight:g}" for name, weight in config.rewards.items())
    videos = config.evaluation.prompts * config.evaluation.videos_per_prompt
    facts = {
        "rewards": weights,
        **({"windows that they judged": seen} if (seen := config.judge.described()) else {}),
        "prompts": config.prompts,
        "groups": config.train.mode.replace("_", "-"),
        "iterations": f"{config.train.iterations}, groups of {config.rollout.group_size}, {config.objective.updates} updates each",
        "adapter": f"rank {config.lora.rank}, alpha {config.lora.alpha:g}, on {', '.join(config.lora.targets)}",
        "optimizer": f"AdamW, learning rate {config.optimizer.lr:g}",
        "seed": f"{config.seed}",
        "configuration": f"{config_hash(config)} (SHA-256 of the run's config.yaml)",
    }
    return f"""---
{header}---

# {config.name}

A LoRA adapter for the streaming autoregressive video generator `{config.generator.checkpoint}`, aligned with
{objective_class(config.objective.kind).method or config.objective.kind} by arcopo_fast.

{markdown_table(["", ""], facts.items(), padded=False)}
## What it changed

{videos} videos of {config.evaluation.prompts} prompts that were not trained on, with the same noise before and after; intervals are one
standard error over videos. What is held out was never trained on.

{results}
{HOW_TO_LOAD}"""


def merged_card(pair: Pair, scale: float, base_model: str | None, results: str = "") -> str:
    """README.md of a merged adapter. results: the sweep that chose it, as Markdown."""
    base = {"base_model": base_model} if base_model else {}
    header = yaml.safe_dump({"library_name": "peft", **base, "tags": ["text-to-video", "lora", "ar-copo"]}, sort_keys=False)
    rows = [
        [kind, f"{factor:g}", f"{source.adapter.rank}", f"{source.adapter.alpha:g}", str(source.file), f"`{source.sha256}`"]
        for kind, factor, source in (("semi-on-policy", 1.0, pair.semi), ("on-policy", scale, pair.on))
    ]
    chosen = f"\n## How the scale was chosen\n\n{results}" if results else ""
    return f"""---
{header}---

# Merged adapter, scale {scale_text(scale)}

Two LoRA adapters in one: W + dW_semi + {scale_text(scale)} dW_on, the merge of AR-CoPO (arXiv 2603.17461), by arcopo_fast. It is exact:
B and A are concatenated along the rank, {pair.semi.adapter.rank} + {pair.on.adapter.rank}.

{markdown_table(["adapter", "scale", "rank", "alpha", "file", "SHA-256"], rows, padded=False).rstrip()}
{chosen}
{HOW_TO_LOAD}"""
