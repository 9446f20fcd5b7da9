"""`python -m pretrain copy|prune|average|cooldown`: checkpoints made from checkpoints."""

import argparse
from pathlib import Path

from pretrain.options import add_checkpoint
from xlstm_io.errors import ConfigError, ExitCode
from xlstm_io.terminal import say

HELP = {
    "copy": "copy a checkpoint to a folder or URL, and read it there once more",
    "prune": "copy the weights of a checkpoint, without the optimizer's state",
    "average": "the mean of a run's last checkpoints, as a checkpoint",
    "cooldown": "a run that leaves another's stable phase and lets the learning rate fall",
}


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of one of the commands."""
    if name in ("copy", "prune"):
        add_checkpoint(parser)
        parser.add_argument("out", metavar="OUT", help="run folder or URL to write into")
    elif name == "average":
        parser.add_argument("run_dir", metavar="RUN", help="run folder, or a URL of one")
        parser.add_argument(
            "--last", type=int, required=True, metavar="N", help="checkpoints to average"
        )
        parser.add_argument(
            "--out", metavar="DIR", help="where it goes (default: average-last-N in RUN)"
        )
    else:
        add_checkpoint(parser)
        add = parser.add_argument
        add("--steps", type=int, required=True, metavar="N", help="length of the cooldown")
        add("--out", required=True, metavar="DIR", help="run folder of the branch")
        add(
            "--shape",
            choices=("linear", "1-sqrt", "cosine", "exponential"),
            help="shape of the cooldown (default: that of the run)",
        )
        add(
            "--end",
            type=float,
            metavar="R",
            help="last learning rate over optimizer.lr (default: that of the run)",
        )


def run(options: argparse.Namespace) -> int:
    """Run one of the commands with parsed options.

    Raises:
        UserError: a checkpoint is not there or damaged, the target holds one, or an option is out
            of its range.
    """
    from pretrain.copies.branch import make_branch
    from pretrain.copies.copying import copy_checkpoint
    from pretrain.copies.rewriting import average, newest, prune
    from xlstm_io.checkpoint.choose import choose

    if options.command == "average":
        if options.last < 2:
            raise ConfigError(f"--last={options.last} averages nothing; use 2 or more")
        sources = newest(options.run_dir, options.last)
        out = options.out or f"{options.run_dir.rstrip('/')}/average-last-{options.last}"
        path = average(sources, out)
        say(f"the mean of {', '.join(one.name for one in sources)} is {path}, and was read back")
        return ExitCode.DONE
    source = choose(options.checkpoint, options.which)
    if options.command == "cooldown":
        branch = make_branch(source, Path(options.out), options.steps, options.shape, options.end)
        say(
            f"{branch.run_file}: from step {branch.step} of {source} on the learning rate falls "
            f"until step {branch.config.run.steps}\n"
            f"start it with: python -m pretrain launch {branch.run_file}"
        )
        return ExitCode.DONE
    make = copy_checkpoint if options.command == "copy" else prune
    path = make(source, options.out)
    what = "copied to" if options.command == "copy" else "its weights are in"
    say(f"{source}: {what} {path}, and every file was read back and compared")
    return ExitCode.DONE
