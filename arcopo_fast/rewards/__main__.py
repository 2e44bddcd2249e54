"""Serve rewards from a process of their own, in whatever environment they need.

    python -m arcopo_fast.rewards serve NAME [NAME ...] [--port 8123] [--host 127.0.0.1] [--token-file FILE]
    python -m arcopo_fast.rewards list

A recipe then says where they are: `reward_servers.addresses={NAME: http://127.0.0.1:8123}`. GET /health says whether a server is well.
Ctrl-C or SIGTERM finishes what is being scored, refuses the rest and ends; clients wait for the next server at the address.
"""

from __future__ import annotations

import inspect
import sys
import threading
import time
from collections.abc import Callable

from arcopo_fast.cli import Parser, positive_int, run_command, run_subcommand
from arcopo_fast.errors import UserError
from arcopo_fast.rewards import wire
from arcopo_fast.rewards.custom import find
from arcopo_fast.rewards.registry import judges, load_rewards
from arcopo_fast.rewards.server import RewardServer, Scorer
from arcopo_fast.runtime.console import Interruption
from arcopo_fast.runtime.memory import device_of, tune_for_cpu

PROGRAM = "python -m arcopo_fast.rewards"
MIB = 1 << 20


def serve_command_line() -> Parser:
    """Return the parser of `rewards serve`."""
    parser = Parser(f"{PROGRAM} serve", "Serve rewards over HTTP, until Ctrl-C or SIGTERM.", one_process=True)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"see {PROGRAM} list; a custom reward is named package.module:function")
    parser.add_argument("--port", type=int, default=8123, metavar="N", help="port to listen at; 0: a free port, which is printed")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen at; any but a loopback address needs a token"
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help=f"file with the token that clients must show (default: the token in the variable {wire.TOKEN_VARIABLE})",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--fps", type=positive_int, default=16, metavar="N", help="frames per second of the videos (default: Wan's 16)")
    parser.add_argument("--batch", type=positive_int, default=8, metavar="N", help="most videos that a reward gets at once")
    parser.add_argument("--max-mib", type=positive_int, default=1024, metavar="N", help="largest request, in MiB")
    parser.add_argument(
        "--waiting-mib",
        type=positive_int,
        default=4096,
        metavar="N",
        help="most MiB of requests held at once; beyond this, clients try again later",
    )
    return parser


def serve(argv: list[str]) -> None:
    """Run `rewards serve`."""
    options = serve_command_line().read(argv)
    if options is None:
        return
    token = wire.read_token(options.token_file)
    if token is None and not wire.is_loopback(options.host):
        advice = f"give --token-file or {wire.TOKEN_VARIABLE}, or listen at 127.0.0.1"
        raise UserError(f"--host {options.host} can be reached from other machines, and there is no token; {advice}")
    device = device_of(options.device, "--device")
    tune_for_cpu()
    rewards = load_rewards(options.names, fps=options.fps, device=device)
    scorer = Scorer(rewards, batch=options.batch, waiting_bytes=options.waiting_mib * MIB, device=device)
    rate = options.fps if any(reward.fps is not None for reward in rewards.values()) else None
    try:
        server = RewardServer((options.host, options.port), scorer, token=token, max_bytes=options.max_mib * MIB, fps=rate)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {options.host} port {options.port}: {reason}; give another --port or --host") from None
    with Interruption("what is being scored") as interruption:
        threading.Thread(target=server.serve_forever, name="server", daemon=True).start()
        print(f"serving {', '.join(scorer.rewards)} at {server.url}", flush=True)
        while not interruption.asked:
            time.sleep(0.1)
        server.stop()


def show(argv: list[str]) -> None:
    """Run `rewards list`."""
    if Parser(f"{PROGRAM} list", "Print the rewards of the package.").read(argv) is None:
        return
    for path, names in judges().items():
        try:
            about = (inspect.getdoc(find(path, "reward")) or path).splitlines()[0]
        except UserError as error:
            about = f"not here: {error}"
        print(f"{', '.join(names)}\n    {about}")
    print("package.module:function\n    A custom reward; package.module:class:score for a judge that gives several scores.")


COMMANDS: dict[str, Callable[[list[str]], None]] = {"serve": serve, "list": show}


def main(argv: list[str]) -> None:
    """Run the command."""
    run_subcommand(PROGRAM, __doc__, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
