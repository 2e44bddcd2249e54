"""What every command of `python -m arcopo_fast.<name>` shares: reading the command line and ending with a clear line.

A command is a function of its arguments, handed to `run_command`. It raises `UserError` for input that cannot be used; everything that is
not the user's doing keeps its traceback.
"""

from __future__ import annotations

import errno
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from arcopo_fast.config import Config, keys_help, load_config, recipes, resolved_yaml
from arcopo_fast.errors import UserError

BAD_INPUT = 2
INTERRUPTED = 130

# The disk or the permissions of the machine, not the program: one line is all that helps.
_MACHINE_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
}


def run_command(main: Callable[[list[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 with one line for bad input, a full disk or a lack of permission, 130 when interrupted.

    arguments: the command line without the program's name; None: the process's own.
    """
    try:
        status = main(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except UserError as error:
        status = _end(f"error: {error}", BAD_INPUT)
    except KeyboardInterrupt:
        status = _end("interrupted; what was complete by then is kept", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, as in `--help | head`: not an error, but nothing may be printed any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        problem = machine_problem(error)
        if problem is None:
            raise
        status = _end(f"error: {problem}", BAD_INPUT)
    return status or 0


def machine_problem(error: BaseException) -> str | None:
    """One line, if an exception or one of its causes says that the disk is full or that something may not be written; else None."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in _MACHINE_ERRORS:
            where = f" ({cause.filename})" if cause.filename else ""
            return f"{_MACHINE_ERRORS[cause.errno]}{where}; nothing was left half-written"
        # Libraries with writers of their own, such as safetensors, keep the text only.
        if "No space left on device" in str(cause):
            return f"{_MACHINE_ERRORS[errno.ENOSPC]}; nothing was left half-written"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _end(line: str, status: int) -> int:
    print("\n" * sys.stderr.isatty() + " ".join(line.split()), file=sys.stderr)  # a progress line may be standing there
    return status


@dataclass(frozen=True)
class TrainOptions:
    """What `train` is told beside its configuration.

    dry_run: say what the run needs instead of starting it. device_memory: for devices of so many GB; none: the one that is here.
    profile: iterations to trace.
    """

    dry_run: bool = False
    device_memory: tuple[float, ...] = ()
    profile: int = 0


TRAIN_OPTIONS = """
  --dry-run       print the memory that the run needs by component, and the settings that fit each device; start nothing, need no GPU
  --device-memory 24,40,80,141
                  with --dry-run: for devices of so many GB; without it, for the GPU that is here, else for these four
  --profile N     write a PyTorch trace of N iterations into the run's directory"""


def parse_train(arguments: Sequence[str], prog: str, description: str) -> tuple[Config, TrainOptions] | None:
    """`parse_config` for `train`, which has options of its own."""
    rest: list[str] = []
    given: dict[str, Any] = {}
    pending = iter(arguments)
    for argument in pending:
        name, equals, value = argument.partition("=")
        if name == "--dry-run" and not equals:
            given["dry_run"] = True
        elif name in ("--device-memory", "--profile"):
            value = value if equals else next(pending, "")
            given[name[2:].replace("-", "_")] = _sizes(value) if name == "--device-memory" else _count(value)
        else:
            rest.append(argument)
    config = parse_config(rest, prog, description, options=TRAIN_OPTIONS)
    if config is None:
        return None
    options = TrainOptions(**given)
    if options.device_memory and not options.dry_run:
        raise UserError("--device-memory only says what --dry-run is about; add --dry-run, or leave it out")
    if options.profile and options.dry_run:
        raise UserError("--profile traces a run, and --dry-run starts none; leave one out")
    return config, options


def _sizes(text: str) -> tuple[float, ...]:
    try:
        sizes = tuple(float(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or not all(0 < size < math.inf for size in sizes):
        raise UserError(f"--device-memory takes GB separated by commas, as in 24,80; given {text!r}")
    return sizes


def _count(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]*", text):
        raise UserError(f"--profile takes a number of iterations, at least 1; given {text!r}")
    return int(text)


def parse_config(arguments: Sequence[str], prog: str, description: str, *, options: str = "") -> Config | None:
    """The configuration that `[recipe] [key.sub=value ...]` asks for; None after `--help` or `--print-config`, which print what they say.

    Args:
        arguments: the command line without the program's name.
        prog: the command as it is called, such as "python -m arcopo_fast.train".
        description: what it does, for `--help`.
        options: further lines of the help, for options that the caller has taken out of `arguments`.

    Raises:
        UserError: anything that cannot be used.
    """
    if {"-h", "--help"} & set(arguments):
        print(help_text(prog, description, options))
        return None
    words, overrides, show = [], [], False
    for argument in arguments:
        if argument == "--print-config":
            show = True
        elif argument.startswith("-"):
            known = ["--help", "--print-config", *re.findall(r"^  (--[a-z-]+)", options, re.MULTILINE)]
            raise UserError(f"unknown option {argument}: the options are {', '.join(known)}; settings are written key.sub=value")
        elif re.match(r"[^/=]*=", argument):
            overrides.append(argument)
        else:
            words.append(argument)
    if len(words) > 1:
        raise UserError(f"one recipe at a time, given {' and '.join(words)}: settings are written key.sub=value, as in optimizer.lr=1e-4")
    config = load_config(words[0] if words else None, overrides)
    if show:
        print(resolved_yaml(config), end="")
        return None
    return config


def help_text(prog: str, description: str, options: str = "") -> str:
    """Usage, recipes, and every key with its default and meaning."""
    return f"""usage: {prog} [recipe] [key.sub=value ...] [options]

{description.strip()}

  recipe          a YAML file, or a recipe of the package: {", ".join(recipes())} (default: toy)
  key.sub=value   overrides the recipe; the value is YAML; later ones win. Example: optimizer.lr=5e-4 sampler.steps=[1000,300]
  --print-config  print the resolved configuration and end{options}
  --help          print this and end

Keys, with the default they have where a recipe says nothing:

{keys_help()}"""
