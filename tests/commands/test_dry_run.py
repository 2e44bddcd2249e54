"""`train --dry-run` and `--profile N`: what is parsed, what is printed, and that nothing is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcopo_fast import train as train_module
from arcopo_fast.cli import RecipeParser
from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.train import command_line, main

PROG = "python -m arcopo_fast.train"


def options(*arguments: str) -> tuple[bool, tuple[float, ...], int]:
    parsed = command_line().read_config(arguments)
    assert parsed is not None
    assert parsed[0] == load_config("toy", ["seed=3"])
    return parsed[1].dry_run, parsed[1].device_memory, parsed[1].profile


def test_options_anywhere_on_the_line() -> None:
    assert options("toy", "seed=3") == (False, (), 0)
    assert options("--dry-run", "toy", "seed=3") == (True, (), 0)
    assert options("toy", "--device-memory", "24,80.5", "--dry-run", "seed=3") == (True, (24.0, 80.5), 0)
    assert options("toy", "--device-memory=141", "seed=3", "--dry-run") == (True, (141.0,), 0)
    assert options("--profile", "3", "seed=3") == options("seed=3", "--profile=3") == (False, (), 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profile", "0"], "at least 1; given '0'"),
        (["--profile", "many"], "given 'many'"),
        (["--profile"], "--profile: expected one argument"),
        (["--device-memory", "24,large", "--dry-run"], "numbers separated by commas, as in 24,80; given '24,large'"),
        (["--device-memory=-1", "--dry-run"], "given '-1'"),
        (["--device-memory", "0", "--dry-run"], "above 0"),
        (["--device-memory", "24"], "add --dry-run"),
        (["--ranks", "0", "--dry-run"], "at least 1; given '0'"),
        (["--ranks", "8"], "torchrun --nproc_per_node=8"),
        (["--ranks", "13", "--dry-run", "train.spread=branches"], "train.spread=branches cannot spread the 12 branches of a group over 13"),
        (["--profile", "2", "--dry-run"], "leave one out"),
        (["generator.dtype=float16", "--dry-run"], "cannot be trained"),
        (["--dryrun"], "the options are --help, --print-config, --dry-run, --device-memory, --ranks, --profile"),
        (["--dry-run=yes"], "--dry-run: ignored explicit argument 'yes'"),
    ],
)
def test_what_cannot_be_used(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        main(["toy", *arguments])
    assert said in str(error.value)


def test_other_commands_do_not_have_these_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="unknown option --dry-run: the options are --help, --print-config;"):
        RecipeParser(PROG, "").read_config(["--dry-run"])
    RecipeParser(PROG, "").read_config(["--help"])
    assert "--dry-run" not in capsys.readouterr().out


def test_help_documents_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line().read_config(["--help"]) is None
    text = capsys.readouterr().out
    assert all(option in text for option in ("--dry-run ", "--device-memory 24,40,80,141", "--profile N", "--print-config"))


def test_a_dry_run_prints_and_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_module, "train", lambda *arguments, **options: pytest.fail("a run was started"))
    main(["bench_1_3b", "--dry-run", "--device-memory", "24,80"])
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if "24 GB" in line)
    assert header.split() == ["as", "it", "stands", "24", "GB", "80", "GB"]
    assert any(line.startswith("  keys and values of the branches ") for line in lines)
    overrides = next(line for line in lines if line.startswith("24 GB: ")).removeprefix("24 GB: ").split()
    assert load_config("bench_1_3b", overrides).rollout.branches_per_wave == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    main(["toy", "--dry-run"])
    text = capsys.readouterr().out
    assert all(f"{size} GB" in text for size in (24, 40, 80, 141))
    assert not list(tmp_path.iterdir())


def test_the_number_of_iterations_to_profile_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Config, int]] = []
    monkeypatch.setattr(train_module, "train", lambda config, *, resume, profile, world: seen.append((config, profile)))
    main(["toy", "--profile", "2"])
    main(["toy"])
    assert seen == [(load_config("toy"), 2), (load_config("toy"), 0)]
