"""Fill a replay buffer with groups of the generator as it is, for semi-on-policy training.

    python -m arcopo_fast.collect [RECIPE] [key=value ...] --buffer DIR [--groups N]

Any number of processes may fill one buffer at once, on any number of machines, started by torchrun or one by one; a collection that was
stopped goes on where it was, by the same command. Group i is a function of (recipe, seed, i), whoever makes it.
"""

from __future__ import annotations

import sys

from arcopo_fast.build import build_engine, build_objective, encode_ahead, load_generator, load_prompts, load_rewards
from arcopo_fast.cli import RecipeParser, positive_int, run_command
from arcopo_fast.config.schema import Config
from arcopo_fast.data.buffer import Buffer
from arcopo_fast.objectives.advantage import weighted_total
from arcopo_fast.planning.needs import fetch
from arcopo_fast.runtime.console import Progress
from arcopo_fast.runtime.distributed import ALONE, World
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.runtime.rank_console import log_to
from arcopo_fast.training.buffered import policy_of, recipe_of, store
from arcopo_fast.training.groups import Rollouts, prompt_of


def collect(config: Config, path: str, groups: int, world: World = ALONE) -> Buffer:
    """Make what is missing of a buffer of `groups` groups, and wait for what other processes are making of it.

    world: the ranks that begin the buffer together; each one is a process like any other after that.

    Raises:
        UserError: the recipe cannot be used, or the directory holds a buffer of another policy or recipe.
    """
    fetch(config, world)
    rewards, prompts, generator = load_rewards(config), load_prompts(config), load_generator(config)
    forks = config.rollout.pivots_per_video
    videos = (prompt_of(config, prompts.training, index, 0) for index in range(-(-groups // forks)))
    ahead = (part.for_generator for prompt in videos for _, part in prompt.parts)
    encode_ahead(generator.encode_text, ahead, world)
    engine = build_engine(config, generator.model, vae=generator.decoder.vae)
    objective = build_objective(config, engine)
    with world.in_turn("begin the buffer"):
        buffer = Buffer.create(path, policy_of(config, generator, objective), recipe_of(config, prompts, rewards), groups=groups)
    log_to(buffer.path)
    source = Rollouts(config, generator, engine, objective, prompts, rewards)

    def waiting(others: list[int]) -> None:
        print(f"waiting for {len(others)} groups that other processes are making", file=sys.stderr)

    def done() -> int:
        return sum(index < groups for index in buffer.indices)

    with Progress(groups, done(), ranks=world.size) as progress:
        for index in buffer.missing(groups, waiting):
            progress.skip(done() - progress.done)
            judged = source.judged(*divmod(index, forks))
            with judged.group:
                buffer.write(index, *store(judged, engine.shape))
            progress.update(weighted_total(judged.rewards, config.score_weights).nanmean().item())
    return buffer


def command_line() -> RecipeParser:
    """Return the parser of the command line."""
    parser = RecipeParser("python -m arcopo_fast.collect", "Fill a replay buffer with groups of the generator as it is.")
    parser.add_argument("--buffer", metavar="DIR", help="directory of the buffer, new or existing (required)")
    parser.add_argument("--groups", type=positive_int, default=100, metavar="N", help="groups of the whole buffer, including existing ones")
    return parser


def main(argv: list[str]) -> None:
    """Run the command."""
    parser = command_line()
    command = parser.read_config(argv)
    if command is None:
        return
    config, options = command
    if options.buffer is None:
        parser.error("--buffer is missing: name the directory to collect into, as in --buffer buffers/toy")
    tune_for_cpu(config.train.threads)
    with World.joined() as world:
        buffer = collect(config, options.buffer, options.groups, world)
        world.meet_after_work("finish the buffer")
    print(f"{len(buffer)} groups in {buffer.path}; train on them: --mode semi_on_policy --buffer {buffer.path}")


if __name__ == "__main__":
    sys.exit(run_command(main))
