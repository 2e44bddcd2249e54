"""The common part of every command of `python -m arcopo_fast.<name>`: reading the command line and ending with a clear line.

A command is a function of its arguments, handed to `run_command`. It raises `UserError` for input that cannot be used; everything that is
not the user's doing keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from arcopo_fast.config.reading import DEFAULT_RECIPE, keys_help, load_config, recipes, resolved_yaml
from arcopo_fast.config.schema import Config
from arcopo_fast.config.sections import expanded
from arcopo_fast.data.prompts import check_prompt
from arcopo_fast.errors import RankLost, UserError
from arcopo_fast.runtime.console import INTERRUPTED, KEPT, Handler, ignore, interrupt, last_line
from arcopo_fast.runtime.place import place_of
from arcopo_fast.runtime.rank_console import Console
from arcopo_fast.storage import hub

BAD_INPUT = 2

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

    SIGTERM interrupts it as Ctrl-C does. Of several ranks, those other than 0 keep a log each, see `runtime.rank_console`.

    arguments: the command line without the program's name; None: the process's own.
    """
    try:
        place = place_of(os.environ)
    except UserError as error:
        return _end(Console(None), error)
    with Console(place) as console:
        return _run(main, arguments, console)


def _run(main: Callable[[list[str]], int | None], arguments: Sequence[str] | None, console: Console) -> int:
    try:
        with Handler(interrupt):
            status = main(list(sys.argv[1:] if arguments is None else arguments))
            sys.stdout.flush()
    except UserError as error:
        status = _end(console, error)
    except KeyboardInterrupt as error:
        last_line(sys.stderr, _line(f"interrupted; {str(error) or f'{KEPT}, and the same command continues'}"))
        status = INTERRUPTED
        if arguments is None:
            _leave(status)
    except BrokenPipeError:  # the reader of our output left, as in `--help | head`: not an error, but nothing may be printed any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        problem = machine_problem(error)
        if problem is not None:
            status = _end(console, problem)
        elif console.place is None:
            raise
        else:
            console.fail(console.kept + traceback.format_exc().rstrip())
            status = 1
    finally:
        if arguments is None:
            ignore()
    return status or 0


def _leave(status: int) -> NoReturn:
    """End the process at once, with a status.

    Python would end it by SIGINT instead once a KeyboardInterrupt has passed through code that a library ran from C, though it was caught.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def machine_problem(error: BaseException) -> str | None:
    """Return one line if an exception or one of its causes says that the disk is full or that something may not be written; else None."""
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


def _end(console: Console, problem: UserError | str) -> int:
    console.fail(_line(f"error: {problem}"), secondary=isinstance(problem, RankLost))
    return BAD_INPUT


def _line(text: str) -> str:
    return " ".join(text.split())


class Parser(argparse.ArgumentParser):
    """A parser as every command uses it: an error is a `UserError`, options are never abbreviated, `--help` shows defaults.

    Args:
        prog: the command as it is called, such as "python -m arcopo_fast.merge".
        description: what it does, for `--help`.
        one_process: the command is refused where several ranks run it, which would all do the same.
    """

    def __init__(self, prog: str, description: str, *, one_process: bool = False, **options: Any) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_Formatter, **options)
        self.one_process = one_process

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` instead of printing the usage and exiting."""
        raise UserError(message)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace | None:
        """Return the parsed command line; None after `--help`, which prints.

        Raises:
            UserError: an argument cannot be used.
        """
        try:
            parsed, unknown = self.parse_known_intermixed_args(list(arguments))
        except SystemExit:  # --help
            return None
        if unknown:
            known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            raise UserError(f"unknown option {unknown[0]}: the options are {', '.join(known)}{self.hint}")
        if self.one_process and place_of(os.environ):
            raise UserError(f"{self.prog} is one process's work; start it without torchrun")
        return parsed

    hint = ""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an option as argparse does; what names a file or a directory, by its metavar, may begin with "~", the home directory."""
        if re.search("DIR|FILE|PATH|RUN|RESULTS", str(options.get("metavar"))):
            convert = options.get("type", str)
            options["type"] = lambda text: convert(_expanded(text))
        return super().add_argument(*names, **options)


def _expanded(text: str) -> str:
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class RecipeParser(Parser):
    """A parser that reads `[recipe] [key.sub=value ...]` beside options of its own, which are added as to any argparse parser.

    Args:
        default: the recipe that `--help` names as the one that is used where none is given.
    """

    hint = "; settings are written key.sub=value"

    def __init__(self, prog: str, description: str, *, default: str = DEFAULT_RECIPE, one_process: bool = False) -> None:
        super().__init__(prog, description, usage=f"{prog} [recipe] [key.sub=value ...] [options]", one_process=one_process)
        self.add_argument(
            "settings",
            nargs="*",
            metavar="recipe, key.sub=value",
            help=f"a YAML file, or a recipe of the package: {', '.join(recipes())} (default: {default}); then "
            "overrides of its values, in YAML; the last one of a key counts. Example: optimizer.lr=5e-4 sampler.steps=[1000,300]",
        )
        self.add_argument("--print-config", action="store_true", help="print the resolved configuration and end")

    def format_help(self) -> str:
        """Return the help of argparse, followed by all keys of a recipe."""
        keys = "Keys, with the default they have where a recipe says nothing:"
        return f"{super().format_help()}\n{keys}\n\n{keys_help()}\n"

    def read_config(
        self,
        arguments: Sequence[str],
        overrides: Callable[[Any], Sequence[str]] | None = None,
        run_of: Callable[[Any], Path | None] | None = None,
    ) -> tuple[Config, Any] | None:
        """Return the configuration and the options; None after `--help` or `--print-config`, which print.

        Args:
            overrides: settings that options stand for, by the parsed options; they win over those on the command line.
            run_of: the run that options speak of, by the parsed options; its config.yaml, if it has one, is the recipe where none is named.

        Raises:
            UserError: an argument cannot be used.
        """
        options = self.read(arguments)
        if options is None:
            return None
        words = [word for word in options.settings if not re.match(r"[^/=]*=", word)]
        if len(words) > 1:
            raise UserError(f"one recipe at a time, given {' and '.join(words)}{self.hint}, as in optimizer.lr=1e-4")
        if not words and run_of is not None and (run := run_of(options)) is not None and (run / "config.yaml").is_file():
            words = [str(run.absolute() / "config.yaml")]
        settings = [word for word in options.settings if word not in words]
        config = load_config(words[0] if words else None, [*settings, *(overrides(options) if overrides else ())])
        if options.print_config:
            print(resolved_yaml(config), end="")
            return None
        return config, options


def run_subcommand(program: str, about: str | None, commands: Mapping[str, Callable[[list[str]], None]], arguments: list[str]) -> None:
    """Run a command's own command that the first word names.

    Args:
        about: the module's docstring, for --help.

    Raises:
        UserError: there is no such command, or it raises one.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        print((about or "").strip())
    elif not arguments or arguments[0] not in commands:
        raise UserError(f"expected {program} {', '.join(commands)} or --help; given {' '.join(arguments) or 'nothing'}")
    else:
        commands[arguments[0]](arguments[1:])


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """A formatter that shows defaults where they say something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=18, width=130)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is argparse.SUPPRESS or not action.default
        return action.help if silent else super()._get_help_string(action)


def adapter_path(text: str) -> Path:
    """Convert an option (`type=`): the path of an adapter, which is downloaded if it is named as published (hf://owner/name/path)."""
    if not hub.is_published(text):
        return Path(text)
    try:
        return hub.find(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_lora_options(parser: Parser, places: str) -> None:
    """Add --lora and --lora-scale, see `scale_of`. places: what --lora can name."""
    parser.add_argument("--lora", type=adapter_path, metavar="PATH", help=f"an adapter: {places}")
    parser.add_argument("--lora-scale", type=finite, metavar="S", help="scale S in W + S dW (default: 1)")


def scale_of(options: Any) -> float:
    """Return --lora-scale.

    Raises:
        UserError: there is no adapter to scale.
    """
    if options.lora_scale is not None and options.lora is None:
        raise UserError("--lora-scale scales an adapter; name it with --lora, or leave the scale out")
    return 1.0 if options.lora_scale is None else options.lora_scale


def switch(text: str) -> tuple[int, str]:
    """Convert an option (`type=`): FRAME:TEXT, a change of prompt."""
    frame, colon, prompt = text.partition(":")
    if not colon or not re.fullmatch(r"0*[1-9][0-9]{0,17}", frame) or not prompt.strip():
        raise argparse.ArgumentTypeError(f"expected FRAME:TEXT with a frame from 1 on, as in '48:a dog runs'; given {text[:200]!r}")
    return int(frame), prompt_text(prompt)


def prompt_text(text: str) -> str:
    """Convert an option (`type=`): the text of a prompt, without the white space around it."""
    try:
        return check_prompt(text) if text.strip() else ""
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; given {text[:200]!r}") from None


def positive_int(text: str) -> int:
    """Convert an option (`type=`): a whole number, at least 1."""
    if not re.fullmatch(r"0*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1; given {text!r}")
    return int(text)


def seed(text: str) -> int:
    """Convert an option (`type=`): a whole number that can be a recipe's seed."""
    if not re.fullmatch(r"[0-9]+", text) or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^32 - 1; given {text!r}")
    return int(text)


def finite(text: str) -> float:
    """Convert an option (`type=`): a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number; given {text!r}")
    return value


def shard(text: str) -> slice:
    """Convert an option (`type=`): I/N, every N-th of a list from the I-th on."""
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, as in 0/4; given {text!r}")
    return slice(int(match[1]), None, int(match[2]))


def numbers(text: str) -> tuple[float, ...]:
    """Convert an option (`type=`): finite numbers separated by commas, none of them negative."""
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 <= value < math.inf for value in values):
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, as in 24,80; given {text!r}")
    return values
