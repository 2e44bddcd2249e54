"""The parity tests take golden files of any folder, whatever steps, shift, chunks, window, sink or initial frames those were made with.

Some files here are official ones told in another way, so that their numbers stay true. Those named synthetic hold what our own engine makes
with other settings: they show that the tests read every setting from a file, and say nothing about parity.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support import fixtures
from torch import Tensor

from arcopo_fast.config.sections import CacheConfig, SamplerConfig
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.stream import VideoShape

Golden = tuple[dict[str, Any], dict[str, Tensor]]


def own(name: str) -> Golden:
    config, tensors = fixtures.read(fixtures.OWN / f"{name}.safetensors")
    return config, {key: tensor for key, tensor in tensors.items() if not key.startswith("trace/")}


def write(folder: Path, name: str, golden: Golden) -> None:
    config, tensors = golden
    whole = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    save_file(whole, folder / f"{name}.safetensors", {"config": json.dumps(config)})


def shortened(golden: Golden, chunks: int) -> Golden:
    """Only the first chunks."""
    config, tensors = golden
    dropped = len(config["chunk_sizes"]) - chunks
    sizes = config["chunk_sizes"][:chunks]
    kept = {key: tensor for key, tensor in tensors.items() if not re.match(r"chunk(\d+)/", key) or int(key[5 : key.index("/")]) < chunks}
    kept |= {key: tensors[key][:, : sum(sizes)] for key in ("noise", "latents")}
    return config | {"chunk_sizes": sizes, "chunks": config["chunks"] - dropped}, kept


def given(golden: Golden, count: int) -> Golden:
    """The first chunks are what the video begins with: where the context has no noise, caching them is the same call."""
    config, tensors = golden
    sizes, assumed = config["chunk_sizes"][count:], config["chunk_sizes"][:count]
    assert config["context_noise"] == 0 and not config["switch"]
    moved = {"initial_latent": tensors["latents"][:, : sum(assumed)], "noise": tensors["noise"][:, sum(assumed) :]}
    for key, tensor in tensors.items():
        if not key.startswith("chunk"):
            moved.setdefault(key, tensor)
        elif (chunk := int(key[5 : key.index("/")])) >= count:
            moved[f"chunk{chunk - count}{key[key.index('/') :]}"] = tensor
        elif key.endswith(("/k", "/v")):
            moved[f"init{chunk}{key[key.index('/') :]}"] = tensor
    ends = [sum(assumed[: index + 1]) * config["frame_seqlen"] for index in range(count)]
    calls = [{"kind": "init", "global_end": end, "t": 0.0} for end in ends]
    changes = {"chunk_sizes": sizes, "chunks": len(sizes), "init_frames": sum(assumed), "first_chunk_steps": None, "calls": calls}
    return config | changes, moved


def without_window(golden: Golden) -> Golden:
    """The same video where nothing had to leave the window; of a cache without one a chunk's own part is recorded."""
    config, tensors = golden
    assert sum(config["chunk_sizes"]) <= config["local"]
    tokens = config["nfpb"] * config["frame_seqlen"]
    own_part = {key: tensor[:, :, -tokens:] for key, tensor in tensors.items() if key.endswith(("/k", "/v"))}
    return config | {"local": -1, "sink": 0}, tensors | own_part


def synthetic(model: CausalWan, base: Golden, policy: CacheConfig, sampler: SamplerConfig, shape: VideoShape, **more: Any) -> Golden:
    """What our own engine makes, in the official layout. more: what the file says beside the settings of engine and video."""
    config = base[0] | {"first_chunk_steps": None, "init_frames": 0, "switch": None, "batch": 2, "calls": []} | more
    config |= {"nfpb": shape.chunk_frames[0], "chunks": shape.chunks, "chunk_sizes": list(shape.chunk_frames)}
    config |= {"steps": list(sampler.steps), "warp": sampler.warp, "shift": sampler.shift, "context_noise": sampler.context_noise}
    config |= {"local": policy.window or -1, "sink": policy.sink, "global_sink": policy.global_sink}
    tensors = {key: tensor for key, tensor in base[1].items() if key.startswith("w/")}
    tensors |= {f"text{segment}": torch.randn(2, config["text_len"], config["text_dim"]) for segment in range(2)}
    given = torch.randn(2, config["init_frames"], *shape.chunk(0)[1:])
    tensors |= {"initial_latent": given} if config["init_frames"] else {}
    tensors["noise"] = torch.randn(2, shape.frames, *shape.chunk(0)[1:])
    for chunk in range(shape.chunks):
        for step in range(len(sampler.steps) - 1):
            tensors[f"chunk{chunk}/step{step}/eps"] = torch.randn(2, *shape.chunk(chunk))
    engine = Engine(model, shape, sampler, policy, pages=4 * (shape.frames + config["init_frames"]))
    tensors |= {"scheduler/sigmas": shifted(sampler.shift), "scheduler/timesteps": 1000 * shifted(sampler.shift)}
    indices = [1000 - int(step) for step in sampler.steps]
    tensors["denoising_step_list"] = tensors["scheduler/timesteps"][indices] if sampler.warp else torch.tensor(sampler.steps)
    noise, stream = fixtures.RecordedNoise(tensors, config["chunk_sizes"]), engine.start(tensors["text0"])

    def record(name: str, frames: int) -> None:
        visible = stream.cache.frames if policy.window else frames
        tensors[f"{name}k"], tensors[f"{name}v"] = fixtures.cached(engine, stream, visible)

    with torch.no_grad():
        for index, part in enumerate(given.split(config["nfpb"], dim=1) if config["init_frames"] else ()):
            engine.append(stream, part)
            record(f"init{index}/", part.shape[1])
        for chunk, size in enumerate(shape.chunk_frames):
            if config["switch"] and stream.frame == config["switch"][0]:
                engine.switch_prompt(stream, tensors["text1"])
                record(f"chunk{chunk}/recache_", stream.frame)
            predictions = engine.extend(stream, chunk, noise.initial(chunk), noise, last=False).predictions
            tensors |= {f"chunk{chunk}/step{step}/x0": prediction for step, prediction in enumerate(predictions)}
            record(f"chunk{chunk}/", size)
    return config, tensors | {"latents": torch.cat(stream.latents, dim=1)}


def shifted(shift: float) -> Tensor:
    u = torch.linspace(1, 0, 1001)[:-1]
    return shift * u / (1 + (shift - 1) * u)


def test_golden_files_of_any_settings(tmp_path: Path) -> None:
    """One of them is damaged: what should fail does, and leaves the later tests of that file alone."""
    base = own("public_sf_global")
    unwarped = shortened(base, 2)
    unwarped[0].update(steps=unwarped[1]["denoising_step_list"].tolist(), warp=False)
    write(tmp_path, "unwarped", unwarped)
    damaged = {key: tensor + 0.001 if key in ("chunk1/step1/x0", "chunk0/v") else tensor for key, tensor in unwarped[1].items()}
    write(tmp_path, "damaged", (unwarped[0], damaged))
    write(tmp_path, "independent_first_and_two_calls", given(shortened(own("public_sf_indep"), 3), 2))
    write(tmp_path, "framewise_after_an_image", given(shortened(own("public_cf_framewise"), 3), 1))
    write(tmp_path, "no_window", without_window(shortened(own("public_ir_window"), 3)))
    config, tensors = given(shortened(own("public_sf_window"), 5), 2)
    write(tmp_path, "window_after_two_calls", (config | {"case": "another"}, tensors))
    config, tensors = fixtures.read(fixtures.OWN / "public_sf_window.grad.safetensors")
    write(tmp_path, "of_another.grad", (config | {"case": "another", "chunk": config["chunk"] - 2}, tensors))

    model = fixtures.load(fixtures.OWN / "public_sf_global.safetensors").model
    sampler = SamplerConfig(steps=[1000, 600, 300], warp=True, shift=3.0, context_noise=20.0)
    policy = CacheConfig(variant="longlive", window=6, sink=2, global_sink=False)
    switching = synthetic(model, base, policy, sampler, VideoShape((2,) * 4, 16, 8, 12), repo="ll", switch=[4])
    write(tmp_path, "synthetic_switch", switching)
    sampler = SamplerConfig(steps=[950.5], warp=False, shift=8.0)
    write(
        tmp_path,
        "synthetic_long_beginning",
        synthetic(model, base, CacheConfig(), sampler, VideoShape((2,), 16, 8, 12), repo="cf", init_frames=8),
    )

    tests = Path(__file__).with_name("test_parity.py")
    call = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=line", "-p", "no:cacheprovider", "-k", "not recipes", str(tests)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ARCOPO_FIXTURES": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300)
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) \S*?(?:test_parity.py::(\w+)\[([\w.]+)\])?(?: |$)", done.stdout, re.MULTILINE)
    found: dict[str, set[tuple[str, str]]] = {}
    for outcome, test, name in outcomes:
        found.setdefault(outcome, set()).add((test, name))
    names = {path.stem for path in fixtures.files_of(tmp_path).rollouts}
    failing = {("test_whole_rollout", "damaged"), ("test_each_step", "damaged")}
    passing = {(test, name) for test in ("test_schedule", "test_whole_rollout", "test_generate", "test_each_step") for name in names}
    assert len(names) == 8 and found.get("FAILED") == failing and "ERROR" not in found, done.stdout
    assert found["PASSED"] - {("", "")} == passing - failing | {("test_gradients", "of_another.grad")}, done.stdout
