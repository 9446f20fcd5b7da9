"""`python -m pretrain downstream`: tasks of lm-evaluation-harness on a checkpoint."""

import argparse
from importlib.util import find_spec

from pretrain.options import add_checkpoint, add_model
from xlstm_io.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_checkpoint(parser)
    add = parser.add_argument
    add(
        "--tasks",
        required=True,
        metavar="TASK,TASK",
        help="names of tasks or groups, as lm-evaluation-harness lists them",
    )
    add("--include", metavar="DIR", help="folder with the YAML files of more tasks")
    add(
        "--fewshot",
        type=int,
        metavar="N",
        help="examples before each question (default: what the task says)",
    )
    add("--limit", type=int, metavar="N", help="items of each task at most (default: all)")
    add(
        "--batch",
        type=int,
        default=16,
        metavar="N",
        help="texts that are computed together at most (default: %(default)s)",
    )
    add_model(parser)
    add("--out", metavar="FILE", help="write all results to this file, as JSON")
    parser.epilog = (
        "Needs pip install 'xlstm-pretrain[eval]'. Under torchrun or srun all processes share the "
        "heads (tensor parallel)."
    )


def run(options: argparse.Namespace) -> int:
    """Run the command with parsed options; see `pretrain.evaluation.harness.main`.

    Raises:
        UserError: the harness is not installed, or an option is out of its range.
    """
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not tasks:
        raise UserError(f"--tasks={options.tasks!r} names no task")
    for name, least in (("fewshot", 0), ("limit", 1), ("batch", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    if find_spec("lm_eval") is None:
        raise UserError(
            "downstream needs lm-evaluation-harness; pip install 'xlstm-pretrain[eval]'"
        )
    from xlstm_mcore.megatron.first_import import import_megatron

    import_megatron()
    from pretrain.evaluation.harness import main

    return main(
        options.checkpoint,
        tasks,
        which=options.which,
        include=options.include,
        fewshot=options.fewshot,
        limit=options.limit,
        batch=options.batch,
        precision=options.precision,
        tokenizer=options.tokenizer,
        out=options.out,
    )
