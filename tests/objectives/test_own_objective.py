"""An objective of one's own, as docs/adding_an_objective.md shows it: its code blocks are the file and the recipe that run here."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Iterator

import pytest
import torch
from support.adapted import fresh_engine
from support.commands import SMALL
from support.models import random_text
from torch import Tensor

import arcopo_fast.objectives
from arcopo_fast import train
from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import config_class, objective_class, objectives
from arcopo_fast.errors import UserError
from arcopo_fast.model.lora import adapter_parameters, adapter_state
from arcopo_fast.objectives.advantage import zscore
from arcopo_fast.objectives.copo import CopoObjective
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.objectives.sde_grpo import SdeGrpoObjective
from arcopo_fast.rollout.noise import GroupId
from arcopo_fast.storage.metrics import read_metrics
from arcopo_fast.train import main, one_iteration
from arcopo_fast.training.trainer import Trainer

DOCUMENT = (Path(__file__).parents[2] / "docs" / "adding_an_objective.md").read_text(encoding="utf-8")
KIND = "my_project.forward_process"
# Without the settings that only ratio methods have.
TWO_ITERATIONS = ["train.iterations=2", *(setting for setting in SMALL if not setting.startswith("objective."))]


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
    (directory / "forward_process.yaml").write_text(block("yaml"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield str(directory / "forward_process.yaml")
    for name in (KIND, KIND.partition(".")[0]):
        sys.modules.pop(name, None)
    config_class.cache_clear()


def test_the_document_names_its_files() -> None:
    assert f"`{KIND.replace('.', '/')}.py`" in DOCUMENT and f"kind: {KIND}\n" in block("yaml") and "`forward_process.yaml`" in DOCUMENT


def test_it_trains_and_goes_on(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old policy follows the live one, is part of a checkpoint, and a run that goes on is the run that was never stopped."""
    main([recipe, *TWO_ITERATIONS, f"run.directory={tmp_path / 'whole'}"])
    whole = read_metrics(tmp_path / "whole" / "forward_process")
    assert [line["step"] for line in whole] == [1, 2]
    assert whole[0]["update1/moved"] == 0 < whole[0]["update2/moved"] and whole[1]["update1/moved"] > 0
    assert load_config(str(tmp_path / "whole" / "forward_process" / "config.yaml")).objective.kind == KIND
    report = (tmp_path / "whole" / "forward_process" / "report.html").read_text()
    assert "Distance from the old policy" in report and "Live fraction" not in report
    assert "a forward-process loss" in (tmp_path / "whole" / "forward_process" / "adapter" / "README.md").read_text()

    def broken_off(trainer: Trainer, watch: object, iteration: int) -> dict[str, object]:
        if iteration == 2:
            raise RuntimeError("the machine went away")
        return one_iteration(trainer, watch, iteration)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="went away"):
        patch.setattr(train, "one_iteration", broken_off)
        main([recipe, *TWO_ITERATIONS, f"run.directory={tmp_path / 'broken'}"])
    main(["--resume", str(tmp_path / "broken" / "forward_process")])
    again = read_metrics(tmp_path / "broken" / "forward_process")
    assert [{**line, "time": None} for line in again] == [{**line, "time": None} for line in whole]


def test_it_does_what_it_says(recipe: str) -> None:
    """The first gradient, at the old policy, is 2 beta (2 r - 1) (p_old - x_0) / N; updates pull towards the better videos."""
    own = objective_class(KIND)
    engine = fresh_engine()
    parameters, advantages = adapter_parameters(engine.model), 3 * zscore(torch.randn(6))
    objective = own(engine, own.Settings(kind=KIND, updates=4, decay=0.5))
    with engine.rollout(random_text(), GroupId(7), pivot=1, members=6, plan=objective.noise_plan(0.5)) as group:
        assert len({tuple(chunk.flatten().tolist()) for chunk in group.tails[:, -1]}) == 6, "the last chunk's noises differ, too"
        target, trained = objective.target(group, advantages), objective.samples(group, 0)
        assert [samples.chunk for samples in trained] == [1, 2, 3] and all(len(samples) == 6 for samples in trained)
        for samples in trained:
            new = engine.predict(group, samples).detach().requires_grad_()
            objective.loss(group, target, samples, new, {"old": new.detach()}).loss.sum().backward()
            error = new.detach() - target.chunks[samples.chunk]
            expected = 2 * (2 * target.r - 1).view(-1, 1, 1, 1, 1) * error / error[0].numel()
            torch.testing.assert_close(new.grad, expected, rtol=1e-4, atol=1e-9)

        def distances() -> Tensor:
            found = []
            for samples in objective.samples(group, 0):
                with torch.no_grad():
                    error = engine.predict(group, samples) - target.chunks[samples.chunk]
                found.append(error.square().flatten(1).mean(1))
            return torch.stack(found).mean(0)

        before = distances()
        start = {name: tensor.clone() for name, tensor in adapter_state(engine.model).items()}
        statistics = objective.update([(group, advantages)], Stepper(torch.optim.AdamW(parameters, lr=3e-3)))
        assert (((distances() - before) * advantages).sum()) < 0
        assert statistics["update1/moved"] == 0 < statistics["update4/moved"] and engine.pool.pages_in_use == group.prefix.cache.frames
        old, live = objective.policies.state_dict()["old"], adapter_state(engine.model)
        for name, tensor in old.items():
            torch.testing.assert_close(tensor, 0.5 * (start[name] + live[name]))


def test_the_resolved_configuration_repeats_itself(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([recipe, "--print-config"])
    printed = capsys.readouterr().out
    assert f"kind: {KIND}\n" in printed and "beta: 1.0\n" in printed
    (tmp_path / "again.yaml").write_text(printed)
    main([str(tmp_path / "again.yaml"), "--print-config"])
    assert capsys.readouterr().out == printed
    assert load_config(str(tmp_path / "again.yaml")) == load_config(recipe)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.betta=2", "unknown key objective.betta; did you mean objective.beta?"),
        ("objective.beta=0", "objective.beta: expected a number > 0; given 0"),
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
        assert load_config(recipe, ["objective.kind=forward_process"]).objective.beta == 1
    finally:
        sys.modules.pop("arcopo_fast.objectives.forward_process", None)
        config_class.cache_clear()


@pytest.mark.parametrize(
    "override",
    ["objective.kind=best", "objective={kind: best}", "objective.kind=my_project.backward", "objective.kind=base"]
    + [f"objective.kind={name}" for name in ("json.decoder", "'.best'", "''", "'a b.c'", "..")],
)
def test_what_is_no_objective_is_said_in_one_line(recipe: str, override: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(recipe, [override])
    text = str(error.value)
    assert "objective.kind: no objective" in text and "copo, nft, sde_grpo or the dotted name of a module" in text and "\n" not in text
    assert text.startswith("override ")


def test_a_mistake_in_an_objective_keeps_its_traceback(recipe: str) -> None:
    """Its own missing import must not read as if there were no such objective."""
    (Path(recipe).parent / "my_project" / "broken.py").write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load_config(recipe, ["objective.kind=my_project.broken"])
