"""`python -m pretrain self-test`: does this machine keep what the run file promises?

Without `--layout` a run that stops and resumes is compared with one that does not. With it the
layout is compared with one process. Either runs as the workers of one machine, which this command
starts, or as the tasks of torchrun or srun.
"""

import argparse
import os

from pretrain.config import RunConfig, check_world
from pretrain.processes.devices import set_device_defaults
from pretrain.processes.slurm_ranks import check_one_node
from xlstm_io.errors import ConfigError

STEPS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="processes to start; under torchrun or srun, which start them, it is not needed",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help=f"steps to train, half before the stop (default: {STEPS})",
    )
    parser.add_argument(
        "--layout",
        action="store_true",
        help="compare N processes with one instead: losses, gradients and three updates, tensor by "
        "tensor, on random tokens",
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="with --layout: the same blocks, heads, layout and engine at small widths",
    )


def run(options: argparse.Namespace, config: RunConfig, overrides: list[str]) -> int:
    """Run the command with parsed options, as one of its workers or as what starts them.

    Returns:
        0 when the comparison holds, else `ExitCode.REFUTED` or 2; see `pretrain.self_test`.

    Raises:
        UserError: the test cannot start, or a resumed run differs.
    """
    if options.nproc is not None and options.nproc < 1:
        raise ConfigError(f"--nproc={options.nproc} starts no process; use 1 or more")
    if options.layout and options.steps is not None:
        raise ConfigError("--layout compares three steps, whatever --steps says; leave one out")
    if options.layout and options.nproc == 1:
        raise ConfigError("--layout compares several processes with one; give --nproc 2 or more")
    if options.small and not options.layout:
        raise ConfigError("--small makes the model of --layout smaller; give --layout too")
    steps = STEPS if options.steps is None else options.steps
    if "WORLD_SIZE" not in os.environ:
        return _start_workers(options, config, overrides, steps)
    check_world(config, int(os.environ["WORLD_SIZE"]))
    from xlstm_mcore.megatron.first_import import import_megatron

    set_device_defaults(config.layout.tensor)  # torch may read them when it is imported
    import_megatron()
    if options.layout:
        from pretrain.self_test.layout import main as compare_layout

        return compare_layout(config, small=options.small)
    from pretrain.self_test.resume import main as compare_resume

    return compare_resume(config, steps)


def _start_workers(
    options: argparse.Namespace, config: RunConfig, overrides: list[str], steps: int
) -> int:
    from pretrain.commands.run.launch import launch

    check_one_node("self-test")
    words = [*overrides, "--steps", str(steps)]
    if options.layout:
        words = [*overrides, "--layout", *(["--small"] if options.small else [])]
    return launch(
        options.config,
        config,
        options.nproc,
        words,
        command="self-test",
        needs_data=not options.layout,
    )
