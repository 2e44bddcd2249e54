"""An objective of one's own, as docs/adding_an_objective.md shows it: its code blocks are the file and the recipe that run here."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Iterator

import pytest
import torch
from support.models import SHAPE, random_text, small_engine, small_model

import arcopo_fast.objectives
from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import config_class, objective_class, objectives
from arcopo_fast.errors import UserError
from arcopo_fast.model.lora import adapter_parameters, add_lora
from arcopo_fast.objectives.advantage import zscore
from arcopo_fast.objectives.copo import CopoObjective
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.objectives.sde_grpo import SdeGrpoObjective
from arcopo_fast.rollout.noise import KeyedNoise
from arcopo_fast.storage.metrics import read_metrics
from arcopo_fast.train import main

DOCUMENT = (Path(__file__).parents[2] / "docs" / "adding_an_objective.md").read_text(encoding="utf-8")
KIND = "my_project.best_and_worst"
SMALL = [
    "train.iterations=2",
    "rollout.group_size=3",
    "objective.anchors_per_update=2",
    "evaluation.prompts=2",
    "evaluation.videos_per_prompt=1",
    "evaluation.sample_videos=1",
    "lora.rank=4",
    "lora.alpha=8",
]


def block(language: str) -> str:
    """The document's only block in a language."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.S)
    return text


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The document's files, where it says that they lie, with their directory on Python's path."""
    directory = tmp_path_factory.mktemp("somewhere")
    path = directory / f"{KIND.replace('.', '/')}.py"
    path.parent.mkdir()
    path.write_text(block("python"))
    (directory / "best_and_worst.yaml").write_text(block("yaml"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield str(directory / "best_and_worst.yaml")
    for name in (KIND, KIND.partition(".")[0]):
        sys.modules.pop(name, None)
    config_class.cache_clear()


def test_the_document_names_its_files() -> None:
    assert f"`{KIND.replace('.', '/')}.py`" in DOCUMENT and f"kind: {KIND}\n" in block("yaml") and "`best_and_worst.yaml`" in DOCUMENT


def test_it_trains(recipe: str, tmp_path: Path) -> None:
    main([recipe, *SMALL, f"run.directory={tmp_path}"])
    metrics = read_metrics(tmp_path / "best_and_worst" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(line["update1/ratio_max"] == 0 for line in metrics) and any(line["update2/ratio_max"] > 0 for line in metrics)
    assert load_config(str(tmp_path / "best_and_worst" / "config.yaml")).objective.kind == KIND
    assert (tmp_path / "best_and_worst" / "report.html").is_file()


def test_it_does_what_it_says(recipe: str) -> None:
    """Updates take predictions towards the best member and away from the worst, and the clip ends them."""
    own = objective_class(KIND)
    engine = small_engine(add_lora(small_model(), rank=4, alpha=8, seed=1), branches=6)
    parameters, advantages = adapter_parameters(engine.model), zscore(torch.randn(6))
    noise = KeyedNoise(SHAPE.chunk, int(torch.randint(10**6, ())))
    with engine.rollout(random_text(), noise, pivot=1, branches=6, sigma=0.5) as group:
        best, worst = group.predictions[:, advantages.argmax()], group.predictions[:, advantages.argmin()]

        def margin() -> float:
            steps = torch.arange(len(group.steps)).repeat_interleave(6)
            with torch.no_grad():
                replayed = engine.replay(group, steps, torch.arange(6).repeat(len(group.steps)))
            return ((replayed - worst[steps]).square().mean() - (replayed - best[steps]).square().mean()).item()

        before = margin()
        free = own(engine, own.Settings(kind=KIND, clip=None, updates=6))
        statistics = free.update([(group, advantages)], Stepper(torch.optim.AdamW(parameters, lr=3e-3), gradient_clip=1.0))
        assert margin() > before and statistics["update6/live"] == 1
        clipped = own(engine, own.Settings(kind=KIND, clip=1e-9, updates=2, anchors_per_update=6))
        statistics = clipped.update([(group, advantages)], Stepper(torch.optim.AdamW(parameters, lr=3e-3), gradient_clip=1.0))
        assert statistics["update1/live"] == 1 and statistics["update2/live"] < 1


def test_the_resolved_configuration_repeats_itself(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([recipe, "--print-config"])
    printed = capsys.readouterr().out
    assert f"kind: {KIND}\n" in printed and "pairs: 3\n" in printed
    (tmp_path / "again.yaml").write_text(printed)
    main([str(tmp_path / "again.yaml"), "--print-config"])
    assert capsys.readouterr().out == printed
    assert load_config(str(tmp_path / "again.yaml")) == load_config(recipe)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.pair=2", "unknown key objective.pair; did you mean objective.pairs?"),
        ("objective.pairs=0", "objective.pairs: expected a whole number >= 1; given 0"),
        ("objective.tau=1.0", "unknown key objective.tau"),  # another objective's
    ],
)
def test_its_keys_are_strict(recipe: str, override: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(recipe, [override])
    assert said in str(error.value) and "\n" not in str(error.value)


# Where objectives are found --------------------------------------------------------------------------------------------------------


def test_a_file_in_the_package_is_an_objective(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert objective_class("copo") is CopoObjective and objective_class("sde_grpo") is SdeGrpoObjective
    assert {"copo", "sde_grpo"} <= set(objectives()) and not {"base", "advantage", "__init__"} & set(objectives())
    assert all(issubclass(config_class(kind).model_fields["objective"].annotation, object) for kind in objectives())
    # As if it lay beside them.
    monkeypatch.setattr(arcopo_fast.objectives, "__path__", [*arcopo_fast.objectives.__path__, str(Path(recipe).parent / "my_project")])
    try:
        assert load_config(recipe, ["objective.kind=best_and_worst"]).objective.pairs == 3
    finally:
        sys.modules.pop("arcopo_fast.objectives.best_and_worst", None)
        config_class.cache_clear()


@pytest.mark.parametrize(
    "override",
    ["objective.kind=best", "objective={kind: best}", "objective.kind=my_project.worst", "objective.kind=base"]
    + [f"objective.kind={name}" for name in ("json.decoder", "'.best'", "''", "'a b.c'", "..")],
)
def test_what_is_no_objective_is_said_in_one_line(recipe: str, override: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(recipe, [override])
    text = str(error.value)
    assert "objective.kind: no objective" in text and "copo, sde_grpo or the dotted name of a module" in text and "\n" not in text
    assert text.startswith("override ")


def test_a_mistake_in_an_objective_keeps_its_traceback(recipe: str) -> None:
    """Its own missing import must not read as if there were no such objective."""
    (Path(recipe).parent / "my_project" / "broken.py").write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load_config(recipe, ["objective.kind=my_project.broken"])
