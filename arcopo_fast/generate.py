"""Generate videos, each written to an mp4 while it is made.

    python -m arcopo_fast.generate [RECIPE] [key=value ...] --prompt TEXT [--prompt TEXT ...] [--prompts FILE] [--batch N]
        [--frames N] [--switch FRAME:TEXT ...] [--seed N] [--lora PATH [--lora-scale S]] [--out DIR|FILE.mp4] [--overwrite]

A chunk is decoded and written as soon as it is denoised. With a window (cache.window) a video of any length takes the same memory.
Frames are counted in pixels, not in latents: the first latent frame is one of them, each later one four. Times count from the encoded
prompt to what is in the file; loading and the text encoder come before.

The same settings, seed and place in the list of prompts give the same video. Prompt i has the noise of video i of an evaluation, so
--seed with the value of evaluation.seed shows what was judged. The ranks of torchrun share the list, batch by batch.
"""

from __future__ import annotations

import sys
from pathlib import Path

from arcopo_fast.build import load_generator
from arcopo_fast.cli import RecipeParser, add_lora_options, positive_int, prompt_text, run_command, scale_of, seed, switch
from arcopo_fast.data.prompts import read_prompts
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.videos import Switch, generate, output_files
from arcopo_fast.model.lora import load_adapter
from arcopo_fast.planning.needs import fetch
from arcopo_fast.runtime.console import Interrupted
from arcopo_fast.runtime.distributed import World
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.storage.atomic import check_out
from arcopo_fast.storage.identity import values_digest


def command_line() -> RecipeParser:
    """Return the parser of the command line."""
    parser = RecipeParser(
        "python -m arcopo_fast.generate",
        "Generate videos, each written to an mp4 while it is made.",
        default="toy; with --lora RUN the config.yaml of that run",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        type=prompt_text,
        default=[],
        metavar="TEXT",
        help="what a video shows; repeat the option for more videos",
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="more prompts: a text file with one on each line, or a .jsonl, .json, .csv or .tsv file"
    )
    parser.add_argument(
        "--switch",
        action="append",
        type=switch,
        default=[],
        metavar="FRAME:TEXT",
        help="change to another prompt at this frame, or at the next frame that begins a chunk; it changes every video. Repeat the option "
        "for more changes",
    )
    parser.add_argument(
        "--frames", type=positive_int, metavar="N", help="frames of each video, rounded up to whole chunks (default: as in the recipe)"
    )
    parser.add_argument("--seed", type=seed, metavar="N", help="seed of the noise (default: the recipe's)")
    add_lora_options(parser, "a run's directory, an adapter's directory (PEFT or diffusers), its file, or hf://owner/name/path")
    parser.add_argument("--batch", type=positive_int, default=1, metavar="N", help="videos that are made at once")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("videos"),
        metavar="DIR|FILE.mp4",
        help="directory of the videos, or the name of the file for a single video",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing videos")
    return parser


def main(argv: list[str]) -> None:
    """Run the command."""
    command = command_line().read_config(argv, run_of=lambda options: options.lora)
    if command is None:
        return
    config, options = command
    prompts = options.prompt + (read_prompts(options.prompts) if options.prompts else [])
    if not prompts or not all(prompts):
        raise UserError("there is no prompt: say what the video shows with --prompt TEXT, or name a file with --prompts FILE")
    scale = scale_of(options)
    files = output_files(options.out, prompts)
    check_out(files[0].parent)
    if not options.overwrite and (existing := [file for file in files if file.exists()]):
        others = f" and {len(existing) - 1} more are" if len(existing) > 1 else " is"
        raise UserError(f"{existing[0]}{others} there already; give another --out, or replace them with --overwrite")
    tune_for_cpu(config.train.threads)
    try:
        with World.joined() as world:
            world.check_same("recipe or list of prompts", values_digest({"recipe": config.model_dump(mode="json"), "prompts": prompts}))
            fetch(config, world, "generator.")
            generator = load_generator(config)
            if options.lora:
                load_adapter(generator.model, options.lora, scale=scale)
            generate(
                config,
                generator,
                dict(zip(files, prompts)),
                seed=config.seed if options.seed is None else options.seed,
                frames=options.frames,
                switches=[Switch(*change) for change in options.switch],
                batch=options.batch,
                world=world,
            )
            world.meet_after_work("finish the videos")
    except KeyboardInterrupt as error:
        again = "the same command with --overwrite" if any(file.exists() for file in files) else "the same command"
        raise Interrupted(f"{error or 'the videos that were complete by then are kept'}; {again} starts again") from None
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    sys.exit(run_command(main))
