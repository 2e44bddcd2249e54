"""`python -m arcopo_fast.merge`: what the merged adapter computes, how a sweep judges and resumes, and what it says to bad input."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Iterator
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import PeftModel
from support.commands import SHORT, outcome
from torch import Tensor, nn

from arcopo_fast import merge
from arcopo_fast.build import build_engine, checkpoint_path, load_generator, load_held_out, load_model, load_prompts, load_rewards
from arcopo_fast.cli import run_command
from arcopo_fast.config.reading import load_config, resolved_yaml
from arcopo_fast.evaluation import sweep
from arcopo_fast.evaluation.judging import Evaluation, evaluate
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.model.lora import BLOCK_TARGETS, Adapter, adapter_parameters, add_lora, load_adapter, read_adapter, save_adapter
from arcopo_fast.reports.table import signed

SMALL = [*SHORT, "evaluation.prompts=2", "evaluation.videos_per_prompt=2", "evaluation.sample_videos=1"]
ROUNDING = 2e-5  # of the largest value
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "merge.json", "pytorch_lora_weights.safetensors"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs' directories as far as a merge looks at them; adapters of different rank, alpha and targets, in which B is not zero."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rank, alpha, targets in (("semi", 3, 7.0, ("to_q", "ffn.net.2", "proj_out")), ("on", 5, 4.0, BLOCK_TARGETS)):
        model = add_lora(load_model(checkpoint_path("toy")), rank=rank, alpha=alpha, targets=targets, seed=0)
        for parameter in adapter_parameters(model):
            nn.init.normal_(parameter, std=0.08)
        save_adapter(folder / name / "adapter", model, base_model="toy")
        (folder / name / "config.yaml").write_text(resolved_yaml(load_config("toy", [f"name={name}", *SMALL])))
    return folder / "semi", folder / "on"


command = partial(outcome, merge.main)


# Merging


class Inputs:
    """One first chunk, for our network and for diffusers'."""

    def __init__(self) -> None:
        self.latents, self.text, self.timestep = torch.randn(2, 2, 16, 8, 8), torch.randn(2, 8, 32), torch.tensor([820.0])

    @torch.no_grad()
    def through(self, model: nn.Module) -> Tensor:
        if isinstance(model, WanTransformer3DModel):
            return model(self.latents.transpose(1, 2), self.timestep.expand(2), self.text).sample.transpose(1, 2)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        return model(self.latents, self.timestep[:, None], base.encode_text(self.text))


@contextmanager
def side_by_side(model: CausalWan, *adapters: tuple[Adapter, float]) -> Iterator[CausalWan]:
    """Every adapted layer gives W x + sum s alpha / r B A x, each adapter by itself, in float64."""

    def adding(adapter: Adapter, factor: float, name: str) -> Any:
        down, up = (adapter.state[f"{name}.lora_{letter}.weight"].double() for letter in "AB")
        return lambda _, inputs, output: output + (factor * adapter.alpha / adapter.rank * inputs[0].double() @ down.T @ up.T).float()

    hooks = [
        model.get_submodule(name).register_forward_hook(adding(adapter, factor, name))
        for adapter, factor in adapters
        for name in adapter.modules
    ]
    yield model
    for hook in hooks:
        hook.remove()


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("scale", [0.0, 0.37, 1.0, 1.5])
def test_the_merged_adapter_is_the_two_adapters_side_by_side(
    scale: float, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    semi, on = (read_adapter(run / "adapter") for run in runs)
    out, inputs = tmp_path / "new" / "merged", Inputs()
    # an adapter's directory is as good as its run's, and so is a file in diffusers' form
    assert command(capsys, "--semi", runs[0], "--on", runs[1] / "adapter", "--scale", scale, "--out", out)[:2] == (0, [])
    with side_by_side(load_model(checkpoint_path("toy")), (semi, 1.0), (on, scale)) as both:
        expected = inputs.through(both)
    for fault in ((1.0, scale + 0.01), (0.99, scale)):  # a wrong scale of either would be seen
        with side_by_side(load_model(checkpoint_path("toy")), (semi, fault[0]), (on, fault[1])) as other:
            assert distance(inputs.through(other), expected) > 5 * ROUNDING

    assert distance(inputs.through(load_adapter(load_model(checkpoint_path("toy")), out)), expected) <= ROUNDING
    through_peft = PeftModel.from_pretrained(load_model(checkpoint_path("toy")), str(out))
    assert distance(inputs.through(through_peft), expected) <= ROUNDING
    wan = WanTransformer3DModel.from_pretrained(checkpoint_path("toy") / "transformer", torch_dtype=torch.float32)
    wan.load_lora_adapter(str(out), weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
    assert distance(inputs.through(wan), expected) <= ROUNDING


def test_what_a_merge_leaves(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    pair = ["--semi", runs[0], "--on", runs[1]]
    status, said, printed = command(capsys, *pair, "--scale", 0.8, "--out", out)
    assert (status, said) == (0, []) and str(out) in printed
    assert sorted(path.name for path in out.iterdir()) == FILES and [path.name for path in tmp_path.iterdir()] == ["merged"]
    hashes = [hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest() for run in runs]
    card, record = (out / "README.md").read_text(), json.loads((out / "merge.json").read_text())
    assert "base_model: toy" in card and "scale 0.8" in card and all(one in card for one in hashes) and hashes[0] != hashes[1]
    assert [record[name]["sha256"] for name in ("semi", "on")] == hashes and record["scale"] == 0.8
    assert (record["semi"]["rank"], record["on"]["alpha"]) == (3, 4.0) and read_adapter(out).rank == 8

    # the same again is the same; something that is there is kept unless the command is told otherwise, and only a merge is replaced
    weights = (out / "adapter_model.safetensors").read_bytes()
    status, said, _ = command(capsys, *pair, "--scale", 0.5, "--out", out)
    assert status == 2 and len(said) == 1 and "--overwrite" in said[0]
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    assert command(capsys, *pair, "--scale", 0.8, "--out", out, "--overwrite")[0] == 0
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    assert command(capsys, *pair, "--scale", 0.5, "--out", out, "--overwrite")[0] == 0
    assert (out / "adapter_model.safetensors").read_bytes() != weights
    before = (runs[0] / "adapter" / "README.md").exists(), sorted(runs[0].rglob("*"))
    status, said, _ = command(capsys, *pair, "--scale", 0.5, "--out", runs[0] / "adapter", "--overwrite")
    assert status == 2 and len(said) == 1 and "merge.json" in said[0]
    assert before == ((runs[0] / "adapter" / "README.md").exists(), sorted(runs[0].rglob("*")))


def test_different_base_models_are_told(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    save_adapter(other, load_adapter(load_model(checkpoint_path("toy")), runs[1] / "adapter"), base_model="some/base")
    status, said, _ = command(capsys, "--semi", runs[0], "--on", other, "--scale", 1, "--out", tmp_path / "merged")
    assert status == 0 and len(said) == 1 and "some/base and toy" in said[0]
    assert "base_model" not in (tmp_path / "merged" / "README.md").read_text().split("---")[1]


# The sweep


@pytest.fixture(scope="module")
def swept(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweeps") / "sweep"
    arguments = ["--semi", str(runs[0]), "--on", str(runs[1]), "--sweep", "1,0.5", "--out", str(out)]
    assert run_command(merge.main, arguments) == 0
    return out


def test_a_sweep_leaves_numbers_tables_and_a_page(swept: Path) -> None:
    names = {path.name for path in (swept / "evaluations").iterdir()}
    assert names == {"baseline.json", "scale-0.json", "scale-0.5.json", "scale-1.json"}
    document = json.loads((swept / "sweep.json").read_text())
    assert [one["scale"] for one in document["scales"]] == [0, 0.5, 1]
    scores = {"reward", "toy_vq", "toy_mq", "toy_ta", *document["out_of_domain"], "held_out"}
    assert len(document["out_of_domain"]) == 3 and set(document["baseline"]) == scores
    base = {name: np.array(one["values"]) for name, one in document["baseline"].items()}
    scaled = [(base[name] - base[name].mean()) / base[name].std() for name in document["out_of_domain"]]
    np.testing.assert_allclose(base["held_out"], np.mean(scaled, axis=0), atol=1e-6)
    np.testing.assert_allclose(base["reward"], 2 * base["toy_vq"] + base["toy_mq"] + 0.5 * base["toy_ta"], atol=1e-5)
    markdown, page = (swept / "sweep.md").read_text(), (swept / "sweep.html").read_text()
    passing = []
    for one in document["scales"]:
        assert set(one["scores"]) == scores
        for name, score in one["scores"].items():
            differences = np.array(score["values"]) - base[name]
            assert len(differences) == 4 and (differences.any() or name != "reward")
            assert score["change"] == pytest.approx(differences.mean(), abs=2e-6)
            assert score["error"] == pytest.approx(differences.std(ddof=1) / 2)
        passing += [one["scale"]] * all(one["scores"][name]["change"] > 0 for name in ("reward", "held_out"))
        for text in (markdown, page):
            change, error = one["scores"]["reward"]["change"], one["scores"]["reward"]["error"]
            assert f"{signed(change)} ± {error:.3f}{' ≈' if abs(change) <= 2 * error else ''}" in text
    assert document["chosen"] == max(passing, default=None)
    assert (swept / "adapter").exists() == bool(passing)
    # one page that needs nothing else, and draws what was measured
    assert not re.search(r"https?://|url\(|@import|<script|<link", page) and not re.search(r"\b(nan|inf|None)\b", page)
    first, second = (ElementTree.fromstring(chart) for chart in re.findall(r"<svg.*?</svg>", page))
    for chart, name in ((first, "reward"), (second, "held_out")):
        lines = [line for line in chart.iter("polyline") if line.attrib["class"].startswith("line")]
        merged, level = (np.array([pair.split(",") for pair in line.attrib["points"].split()], dtype=float) for line in lines)
        assert np.ptp(level[:, 1]) == 0 and np.ptp(np.diff(merged[:, 0])) < 0.2
        drawn = level[0, 1] - merged[:, 1]  # upwards
        measured = np.array([one["scores"][name]["change"] for one in document["scales"]])
        pixels = drawn @ measured / (measured @ measured)
        assert pixels > 0 and np.abs(drawn - pixels * measured).max() <= 0.3
        assert "scale 0" in [text.text for text in chart.iter("text")]


def test_the_baseline_is_the_plain_generator_and_scale_0_the_semi_adapter(runs: tuple[Path, Path], swept: Path) -> None:
    config = load_config(str(runs[1] / "config.yaml"))
    document = json.loads((swept / "sweep.json").read_text())
    for adapter, measured in ((None, document["baseline"]), (runs[0] / "adapter", document["scales"][0]["scores"])):
        generator = load_generator(config)
        if adapter:
            load_adapter(generator.model, adapter)
        engine = build_engine(config, generator.model)
        expected = evaluate(
            config, generator, engine, load_prompts(config).evaluation, load_rewards(config), load_held_out(generator)
        ).scores
        for name, values in expected.items():
            np.testing.assert_allclose(measured[name]["values"], values.numpy(), atol=2e-6 if adapter is None else 1e-3, err_msg=name)


class MadeUp:
    """Stands in for `evaluate`: each call gives the next (reward, held-out) means, with equal noise around them every time."""

    def __init__(self, *means: tuple[float, float] | type[BaseException]) -> None:
        self.means, self.calls = list(means), 0

    def __call__(
        self, config: Any, generator: Any, engine: Any, prompts: Sequence[str], rewards: dict[str, Any], held_out: dict[str, Any]
    ) -> Evaluation:
        self.calls += 1
        mean = self.means.pop(0)
        if not isinstance(mean, tuple):
            raise mean
        spread = torch.linspace(-0.1, 0.1, 4)
        scores = dict.fromkeys(["reward", *rewards], mean[0] + spread) | dict.fromkeys(held_out, mean[1] + spread)
        return Evaluation(scores, list(prompts) * 2, torch.zeros(0))


def test_a_sweep_goes_on_after_an_interrupt(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sweep"
    call = ["--semi", runs[0], "--on", runs[1], "--out", out, "--sweep"]
    interrupted = MadeUp((0.5, 0.5), (0.6, 0.7), KeyboardInterrupt)
    monkeypatch.setattr(sweep, "evaluate", interrupted)
    status, said, _ = command(capsys, *call, "0,0.4,0.8")
    assert status == 130 and interrupted.calls == 3 and "interrupted" in said[-1]
    assert sorted(path.name for path in out.rglob("*")) == ["baseline.json", "evaluations", "scale-0.json"]
    first = (out / "evaluations" / "baseline.json").read_bytes()

    rest = MadeUp((0.7, 0.6), (0.8, 0.4))
    monkeypatch.setattr(sweep, "evaluate", rest)
    status, said, printed = command(capsys, *call, "0,0.4,0.8")
    assert status == 0 and rest.calls == 2 and "2 of 4" in said[0] and "Scale 0.4 is the largest" in printed
    assert (out / "evaluations" / "baseline.json").read_bytes() == first
    assert json.loads((out / "adapter" / "merge.json").read_text())["scale"] == 0.4
    assert "Scale 0.4 is the largest" in (out / "adapter" / "README.md").read_text()

    # again: nothing to do; another scale: only that one
    for scales, means, chosen in (("0.8,0.4", [], 0.4), ("0.6,0.8", [(0.75, 0.55)], 0.6)):
        made_up = MadeUp(*means)
        monkeypatch.setattr(sweep, "evaluate", made_up)
        assert command(capsys, *call, scales)[0] == 0 and made_up.calls == len(means)
        assert json.loads((out / "adapter" / "merge.json").read_text())["scale"] == chosen

    # anew; then with a scale of which none improves both, which is no failure and leaves no adapter of before
    anew = MadeUp((0.5, 0.5), (0.4, 0.7), (0.6, 0.6), (0.8, 0.4))
    monkeypatch.setattr(sweep, "evaluate", anew)
    assert command(capsys, *call, "0.4", "--overwrite")[0] == 0 and anew.calls == 3
    assert {path.name for path in (out / "evaluations").iterdir()} == {"baseline.json", "scale-0.json", "scale-0.4.json"}
    assert json.loads((out / "sweep.json").read_text())["chosen"] == 0.4
    status, _, printed = command(capsys, *call, "0.8")
    assert status == 0 and anew.calls == 4 and "No scale" in printed and "no adapter" in printed
    assert not (out / "adapter").exists() and json.loads((out / "sweep.json").read_text())["chosen"] is None

    # other settings or adapters are refused by one line that names what differs, and nothing changes
    untouched = MadeUp()
    monkeypatch.setattr(sweep, "evaluate", untouched)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for change, parts in (
        (["evaluation.seed=7"], ("with other settings: evaluation.seed: 7 here, 1234 there", "--overwrite")),
        (["rewards={toy_vq: 1}"], ("rewards.toy_", "; rewards.toy_")),
        (["--semi", runs[1]], ("semi.",)),
    ):
        status, said, _ = command(capsys, *call, "0.8", *change)
        assert status == 2 and len(said) == 1 and all(part in said[0] for part in (str(out), *parts)), said
    assert command(capsys, *call, "0.8", "optimizer.lr=1", "train.iterations=3")[0] == 0  # say nothing of an evaluation
    assert untouched.calls == 0
    unchanged = [path for path in before if path.name != "sweep.html"]  # which shows the recipe
    assert all(path.read_bytes() == before[path] for path in unchanged)


def test_one_process_owns_a_sweep_and_what_a_kill_left_is_removed(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sweep"
    call = ["--semi", runs[0], "--on", runs[1], "--out", out, "--sweep", "0.4"]
    seen: list[tuple[int, list[str], str]] = []
    made_up = MadeUp((0.5, 0.5), (0.6, 0.7), (0.7, 0.6))

    def evaluate(*arguments: Any) -> Evaluation:
        seen.append(command(capsys, *call))
        return made_up(*arguments)

    (out / "evaluations").mkdir(parents=True)
    (out / "evaluations" / ".baseline.abcdefgh.json").write_text("half")
    (out / ".sweep.abcdefgh.html").write_text("half")
    monkeypatch.setattr(sweep, "evaluate", evaluate)
    assert command(capsys, *call)[0] == 0
    assert all(status == 2 and f"{out} is in use by process {os.getpid()} on " in said[0] for status, said, _ in seen) and len(seen) == 3
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    # One that was killed between the two renames of a replacement.
    whole = {path.name: path.read_bytes() for path in (out / "adapter").iterdir()}
    (out / "adapter").rename(out / ".adapter.01234567.old")
    monkeypatch.setattr(merge, "write_sweep", lambda *arguments: None)
    assert command(capsys, *call)[0] == 0
    assert {path.name: path.read_bytes() for path in (out / "adapter").iterdir()} == whole


@pytest.mark.parametrize("text", ["null", '"text"', "-1", "1e999", "NaN", "[]", "{}", "[" * 3000 + "]" * 3000, "true"])
def test_a_damaged_evaluation_of_a_sweep_is_one_line(
    text: str, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sweep"
    call = ["--semi", runs[0], "--on", runs[1], "--out", out, "--sweep", "0.4"]
    monkeypatch.setattr(sweep, "load_generator", raising)  # whatever is refused is so before that
    summary = {"mean": 0.5, "std": 0.1, "values": [0.4, 0.6]}
    document = {"scale": None, "settings": {}, "scores": {"reward": summary}}
    for path in [(), ("settings",), ("scores",), ("scores", "reward"), *(("scores", "reward", name) for name in ("mean", "std", "values"))]:
        changed = json.loads(json.dumps(document))
        inner: Any = changed
        for key in path[:-1]:
            inner = inner[key]
        if path:
            inner[path[-1]] = "here"
        (out / "evaluations").mkdir(parents=True, exist_ok=True)
        (out / "evaluations" / "baseline.json").write_text(json.dumps(changed).replace('"here"', text) if path else text)
        status, said, _ = command(capsys, *call)
        assert status == 2 and len(said) == 1 and "Traceback" not in said[0], (path, said)
        assert "not an evaluation of a sweep" in said[0] or "holds a sweep with other settings" in said[0]


def raising(*arguments: Any) -> None:
    raise AssertionError


# Bad input

BAD: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "--semi, --on, --out"),
    "neither scale nor sweep": (["--semi", "{semi}", "--on", "{on}", "--out", "{out}"], "--scale"),
    "both": (["--semi", "{semi}", "--on", "{on}", "--out", "{out}", "--scale", "1", "--sweep", "1"], "not allowed with"),
    "a scale that is none": (["--semi", "{semi}", "--on", "{on}", "--out", "{out}", "--scale", "much"], "much"),
    "a negative scale": (["--semi", "{semi}", "--on", "{on}", "--out", "{out}", "--sweep", "0,-1"], "0,-1"),
    "two scales": (["--semi", "{semi}", "--on", "{on}", "--out", "{out}", "--scale", "1,2"], "--sweep"),
    "settings without a sweep": (["--semi", "{semi}", "--on", "{on}", "--out", "{out}", "--scale", "1", "seed=1"], "--sweep"),
    "no adapter": (["--semi", "{none}", "--on", "{on}", "--out", "{out}", "--scale", "1"], "{none}"),
    "a directory without one": (["--semi", "{semi}", "--on", "{empty}", "--out", "{out}", "--scale", "1"], "{empty} has neither"),
    "another base model": (["--semi", "{semi}", "--on", "{wide}", "--out", "{out}", "--scale", "1"], "one base model"),
    "strange layers": (["--semi", "{strange}", "--on", "{on}", "--out", "{out}", "--sweep", "1"], "elsewhere"),
    "out is a file": (["--semi", "{semi}", "--on", "{on}", "--out", "{file}/x", "--scale", "1"], "not a directory"),
    "out cannot be written": (["--semi", "{semi}", "--on", "{on}", "--out", "/proc/x", "--scale", "1"], "/proc/x"),
    "out holds something else": (
        ["--semi", "{semi}", "--on", "{on}", "--out", "{semi}", "--sweep", "1", "--overwrite"],
        "else than a sweep",
    ),
    "no recipe": (["--semi", "{semi}", "--on", "{on}/adapter", "--out", "{out}", "--sweep", "1"], "name the recipe"),
    "unknown recipe": (["--semi", "{semi}", "--on", "{on}", "--out", "{out}", "--sweep", "1", "tou"], "toy"),
    "unknown key": (["--semi", "{semi}", "--on", "{on}", "--out", "{out}", "--sweep", "1", "evalation.seed=1"], "did you mean evaluation"),
    "unknown metric": (["--semi", "{semi}", "--on", "{on}", "--out", "{out}", "--sweep", "1", "--held-out", "beauty"], "beauty"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], said: str, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"semi": runs[0], "on": runs[1]} | {name: tmp_path / name for name in ("out", "none", "empty", "wide", "strange", "file")}
    places["empty"].mkdir()
    places["file"].touch()
    layers = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn1": nn.ModuleDict({"to_q": nn.Linear(99, 99)})})])})
    save_adapter(places["wide"], add_lora(layers, rank=2, alpha=2, targets=["to_q"], seed=0))
    save_adapter(places["strange"], add_lora(nn.ModuleDict({"elsewhere": nn.Linear(9, 9)}), rank=2, alpha=2, targets=["elsewhere"], seed=0))
    before = sorted(tmp_path.rglob("*")), sorted(runs[0].rglob("*"))
    status, lines, printed = command(capsys, *(argument.format(**places) for argument in arguments))
    assert status == 2 and len(lines) == 1 and not printed, (lines, printed)
    assert lines[0].startswith("error: ") and said.format(**places) in lines[0], lines[0]
    assert before == (sorted(tmp_path.rglob("*")), sorted(runs[0].rglob("*")))


def test_help_and_print_config(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, printed = command(capsys, "--help")
    assert (status, said) == (0, []) and all(word in printed for word in ("--semi", "--on", "--scale", "--sweep", "--out", "rewards"))
    pair = ["--semi", runs[0], "--on", runs[1], "--sweep", "1", "--out", tmp_path / "out"]
    assert "name: 'on'" in command(capsys, *pair, "--print-config")[2]
    assert "name: toy" in command(capsys, *pair, "toy", "seed=4", "--print-config")[2]
    assert not list(tmp_path.iterdir())
