"""The command line `python -m slurm`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slurm.site import load_site
from xlstm_io.errors import ExitCode, UserError

OVERRIDES = "Keys of the run file can be given as options, such as --optimizer.lr 3e-4."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slurm",
        description="Submit a run to Slurm, and see why each of its lives ended.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, allow_abbrev=False)

    render = add("render", "print the batch file of a job; needs no Slurm and writes nothing")
    submit = add("submit", "check a job, write its files and hand it to Slurm")
    for command in (render, submit):
        command.add_argument("kind", choices=("train",), help="what the job does")
        command.add_argument("file", metavar="FILE", help="run file")
        command.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the job")
        command.add_argument("--site", metavar="FILE", help="site file (see docs/slurm.md)")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="replace a key of the site file; may be given several times",
        )
        command.epilog = OVERRIDES
    submit.add_argument(
        "--dry-run",
        action="store_true",
        help="check, print the file and what this cluster is like, and submit nothing",
    )
    submit.add_argument("--after", metavar="JOB", help="start when this job has ended well")

    status = add("status", "the story of a run: its lives, why each ended, and what comes next")
    status.add_argument("--json", action="store_true", help="as JSON")
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
        from pretrain.config import load_config
        from slurm.render import render
        from slurm.submit import make_plan, submit_training

        config = load_config(options.file, overrides)
        site = load_site(options.site, options.set)
        if options.command == "render":
            print(render(make_plan(config, site, options.nodes)), end="")
            return ExitCode.DONE
        return submit_training(
            config, site, options.nodes, dry_run=options.dry_run, after=options.after
        )
    if options.command == "status":
        from slurm.status import status

        return status(options.run, as_json=options.json)
    from slurm.control import resume, stop

    if options.command == "stop":
        return stop(options.run, now=options.now)
    return resume(options.run)


def run(words: Sequence[str]) -> int:
    """Run a command; returns its exit code. A user's mistake is one message, and exit code 2."""
    try:
        return _dispatch(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `render | head`
        return ExitCode.DONE


def main() -> None:
    """Console entry point."""
    sys.exit(run(sys.argv[1:]))
