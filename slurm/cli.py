"""The command line `python -m slurm`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurm.batch_files.site import Site, load_site
from xlstm_io.errors import ExitCode, UserError, exit_code_of
from xlstm_io.terminal import tell, until_nobody_reads

if TYPE_CHECKING:
    from slurm.batch_files.tasks import TaskPlan

KINDS = ("train", "prep", "evaluate", "convert", "preflight")
ONE_NODE = ("evaluate", "convert")
AGAIN_MINUTES = 10.0
OVERRIDES = "Keys of the run file can be given as options, such as --optimizer.lr 3e-4."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slurm",
        description="Submit jobs to Slurm, and see why each life of a run ended.",
        epilog="The cluster is described once, in a site file: docs/slurm.md.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, allow_abbrev=False)

    render = add("render", "print the batch file of a job; needs no Slurm and writes nothing")
    submit = add("submit", "check a job, write its files and hand it to Slurm")
    for command in (render, submit):
        command.add_argument("kind", choices=KINDS, help="what the job does")
        command.add_argument(
            "paths",
            nargs="+",
            metavar="FILE",
            help="RUN.yaml for train and preflight, BUILD.yaml for prep, a run folder for "
            "evaluate, a checkpoint or run folder and OUT for convert",
        )
        command.add_argument(
            "--nodes",
            type=int,
            default=1,
            metavar="N",
            help="nodes of the job; for prep, elements of its array (default: 1)",
        )
        command.add_argument("--site", metavar="FILE", help="site file (see docs/slurm.md)")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="replace a key of the site file; may be given several times",
        )
        command.add_argument(
            "--allow-functions",
            action="store_true",
            help="for prep: run the code that filter_functions of the file names",
        )
        command.add_argument(
            "--every-checkpoint",
            type=float,
            nargs="?",
            const=AGAIN_MINUTES,
            metavar="MINUTES",
            help="evaluate each checkpoint of a run as it comes, looking again after so many "
            f"minutes in the queue (default: {AGAIN_MINUTES:g})",
        )
        command.epilog = OVERRIDES
    submit.add_argument(
        "--dry-run",
        action="store_true",
        help="check, print the file and what this cluster is like, and submit nothing",
    )
    submit.add_argument("--after", metavar="JOB", help="start when this job has ended well")

    status = add("status", "the story of a run: its lives, why each ended, and what comes next")
    status.add_argument("--json", action="store_true", help="print JSON")
    stop = add("stop", "let a run save and stop, and not start again by itself")
    stop.add_argument("--now", action="store_true", help="cancel the job without saving")
    resume = add("resume", "let a run go on: release its held job, or submit its files again")
    for command in (status, stop, resume):
        command.add_argument("run", type=Path, metavar="RUN", help="run folder")
    return parser


def _dispatch(words: Sequence[str]) -> int:
    words = list(words)
    overrides: dict[str, Any] = {}
    if words and words[0] in ("render", "submit") and not {"-h", "--help"} & set(words):
        from pretrain.config import split_overrides

        words, overrides = split_overrides(words)
    options = _parser().parse_args(words)
    if options.command in ("render", "submit"):
        return _job(options, overrides)
    if options.command == "status":
        from slurm.status import status

        return status(options.run, as_json=options.json)
    from slurm.control import resume, stop

    if options.command == "stop":
        return stop(options.run, now=options.now)
    return resume(options.run)


def _job(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Render or submit a job."""
    from slurm.batch_files.render import render
    from slurm.batch_files.tasks import submit_tasks
    from slurm.submit import make_plan, submit_training

    _check_words(options, overrides)
    site = load_site(options.site, options.set)
    paths, rendering = options.paths, options.command == "render"
    if options.kind == "train":
        from pretrain.config import load_config

        config = load_config(paths[0], overrides)
        if rendering:
            print(render(make_plan(config, site, options.nodes)), end="")
            return ExitCode.DONE
        return submit_training(
            config, site, options.nodes, dry_run=options.dry_run, after=options.after
        )
    plans = _tasks(options, site, overrides)
    if rendering:
        print("\n".join(render(plan) for plan in plans), end="")
        return ExitCode.DONE
    return submit_tasks(plans, site, dry_run=options.dry_run, after=options.after)


def _tasks(options: argparse.Namespace, site: Site, overrides: dict[str, Any]) -> "list[TaskPlan]":
    from pretrain.config import load_config, override_option
    from slurm.batch_files.tasks import (
        plan_conversion,
        plan_evaluation,
        plan_preflight,
        plan_preparation,
        shards_of,
    )

    first, *rest = map(Path, options.paths)
    if options.kind == "preflight":
        return plan_preflight(load_config(first, overrides), site, options.nodes)
    if options.kind == "prep":
        allowed = options.allow_functions
        out = shards_of(first)
        return plan_preparation(first, out, site, options.nodes, allow_functions=allowed)
    if options.kind == "convert":
        return plan_conversion(first, rest[0], site)
    words = [word for key, value in overrides.items() for word in override_option(key, value)]
    return plan_evaluation(first, site, words, every_minutes=options.every_checkpoint)


def _check_words(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """UserError when the words do not fit the kind of the job."""
    kind, paths = options.kind, options.paths
    wanted = 2 if kind == "convert" else 1
    if len(paths) != wanted:
        what = "CKPT and OUT" if kind == "convert" else "one FILE"
        raise UserError(f"{kind} takes {what}, and {len(paths)} words were given: {paths}")
    if kind in ONE_NODE and options.nodes != 1:
        raise UserError(f"--nodes {options.nodes}: {kind} runs on one node")
    if options.allow_functions and kind != "prep":
        raise UserError(f"--allow-functions is not an option of {kind}; only prep runs functions")
    if kind in ("prep", "convert") and overrides:
        keys = "; keys of a build belong into its file" if kind == "prep" else ""
        raise UserError(f"--{next(iter(overrides))} is not an option of {kind}{keys}")
    if kind == "evaluate":
        from pretrain.options import check_evaluation_keys

        check_evaluation_keys(overrides)
    if options.every_checkpoint is not None:
        if kind != "evaluate":
            raise UserError(f"--every-checkpoint is not an option of {kind}")
        if not options.every_checkpoint > 0:
            raise UserError(f"--every-checkpoint {options.every_checkpoint:g} must be above 0")
        if (Path(paths[0]) / "manifest.json").exists():
            raise UserError(f"{paths[0]} is one checkpoint; --every-checkpoint takes a run folder")
    if kind in ONE_NODE and not Path(paths[0]).is_dir():
        raise UserError(f"{paths[0]} is not a folder; give a run or a checkpoint")


def run(words: Sequence[str]) -> int:
    """Run a command; returns its exit code. A user's mistake is one message, and exit code 2."""
    try:
        return _dispatch(words)
    except UserError as error:
        tell(f"error: {error}")
        return exit_code_of(error)


def main() -> None:
    """Console entry point."""
    sys.exit(until_nobody_reads(lambda: run(sys.argv[1:])))
