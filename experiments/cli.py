"""The command line `python -m experiments`."""

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.definition import SIZES, Cell, cells_of, chosen, load, names
from experiments.grid import Body, Grid, go_through
from xlstm_io.errors import (
    ConfigError,
    ExitCode,
    Interrupted,
    MachineFailed,
    UserError,
    exit_code_of,
)
from xlstm_io.signals import stop_signals_raise
from xlstm_io.terminal import counted, say, tell, until_nobody_reads

DEFAULT_OUT = "runs/experiments"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="The papers' experiments: grids of runs, tables, figures and verdicts.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        if name != "list":
            command.add_argument("name", metavar="NAME", help="an experiment of `list`")
            command.add_argument(
                "--size",
                choices=SIZES,
                default="toy",
                help="how much work (default: toy); see `list`",
            )
            command.add_argument(
                "--out",
                type=Path,
                default=Path(DEFAULT_OUT),
                metavar="DIR",
                help=f"folder of all grids (default: {DEFAULT_OUT})",
            )
        return command

    add("list", "the experiments, their sizes and what these cost")
    run = add("run", "make the data, run all cells, draw and judge; goes on where it stopped")
    run.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="cells at a time (default: 1)"
    )
    run.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only these cells, such as model=Transformer or lr=0.003; may be given several times",
    )
    cell = add("cell", "run one cell, as the elements of a Slurm array do")
    cell.add_argument("--number", type=int, required=True, metavar="I", help="which cell, from 0")
    array = add("slurm", "print the batch file of a Slurm array with an element per cell")
    array.add_argument("--site", metavar="FILE", help="site file (see docs/slurm.md)")
    array.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a key of the site file; may be given several times",
    )
    report = add("report", "table, figure and verdicts of what is done so far")
    for command in (run, report):
        command.add_argument(
            "--strict",
            action="store_true",
            help=f"end with {ExitCode.REFUTED:d} where a claim does not hold",
        )
    return parser


def _dispatch(words: Sequence[str]) -> int:
    options = _parser().parse_args(words)
    if options.command == "list":
        return _list()
    grid = Grid.open(options.name, options.size, options.out)
    if options.command == "slurm":
        return _slurm(grid, options)
    if options.command == "report":
        return _report(grid, strict=options.strict)
    if options.command == "cell":
        cells = grid.cells
        if not 0 <= options.number < len(cells):
            raise ConfigError(
                f"--number {options.number}: {grid.name} has the cells 0 to {len(cells) - 1} at "
                f"this size"
            )
        return _cell(grid, cells[options.number])
    if options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs}: at least one cell runs at a time")
    return _run(grid, chosen(grid.cells, options.only), options.jobs, strict=options.strict)


def _list() -> int:
    for name in names():
        experiment = load(name)
        say(f"{name}: {experiment.title}  [{experiment.source}]")
        for size_name, size in experiment.sizes.items():
            say(f"  {size_name:6} {counted(len(cells_of(size)), 'cell'):>10}  {size.about}")
    return ExitCode.DONE


def _body(grid: Grid, cells: Sequence[Cell]) -> Body:
    """What a cell of this kind of experiment does, and on which machine it did so."""
    found = _body_of_kind(grid, cells)
    from pretrain.watching import provenance

    def on_this_machine(*arguments: Any) -> dict[str, Any]:
        where = f"{platform.machine()}, {provenance.device() or 'CPU'}"
        return {"machine": where, **found(*arguments)}

    return on_this_machine


def _body_of_kind(grid: Grid, cells: Sequence[Cell]) -> Body:
    """What a cell of this kind of experiment does; what they need is made and imported here."""
    if grid.experiment.kind == "kernels":
        from experiments.cells import kernel_times

        return kernel_times.body
    if grid.experiment.kind == "generation":
        from experiments.cells import generation

        return generation.body
    if grid.experiment.kind == "downstream":
        from experiments.cells import downstream

        downstream.check(grid, cells)
        return downstream.body
    from experiments import data

    data.prepare(grid, cells)
    from experiments.cells import measure, training  # noqa: F401  (what the children need of torch)
    from pretrain.commands.run import train  # noqa: F401

    return training.body


def _run(grid: Grid, cells: Sequence[Cell], jobs: int, *, strict: bool) -> int:
    grid.check_unchanged(cells)
    open_ = [cell for cell in cells if grid.result(cell) is None]
    say(
        f"{grid.name}, {grid.size_name}: {counted(len(cells), 'cell')}, "
        f"{len(cells) - len(open_)} of them done; {grid.folder}"
    )
    if open_:
        code = go_through(grid, open_, _body(grid, open_), jobs)
        if code != ExitCode.DONE:
            return code
    return _report(grid, strict=strict)


def _cell(grid: Grid, cell: Cell) -> int:
    grid.check_unchanged([cell])
    if grid.result(cell) is not None:
        return ExitCode.DONE
    body = _body(grid, [cell])
    while grid.result(cell) is None:
        code = go_through(grid, [cell], body)
        if code != ExitCode.DONE:
            return code
        if grid.result(cell) is None:
            claim = grid.claim(cell)
            owner = claim.owner()
            if owner is None:
                raise MachineFailed(f"{cell}: {grid.last_attempt(cell)}; give the command again")
            # An element that was requeued may find the claim of the node that failed under it.
            if claim.shows_life():
                say(f"{cell}: {owner} is at work on it")
                break
    return ExitCode.DONE


def _report(grid: Grid, *, strict: bool) -> int:
    from experiments.results import table

    made, judged = table.write(grid)
    say(table.as_markdown(grid, made, judged).rstrip())
    files = [table.TABLE_FILE, table.TEXT_FILE, table.VERDICT_FILE]
    files += [table.FIGURE_FILE] if made["best"] else []
    say(f"\nwritten: {grid.folder}/{{{','.join(files)}}}")
    refuted = any(item["holds"] is False for item in judged)
    return ExitCode.REFUTED if strict and refuted else ExitCode.DONE


def _slurm(grid: Grid, options: Any) -> int:
    from slurm.batch_files.render import render
    from slurm.batch_files.site import load_site
    from slurm.batch_files.tasks import plan_array

    out = str(Path.cwd() / options.out)
    words = ("-m", "experiments", "cell", grid.name, "--size", grid.size_name, "--out", out)
    site = load_site(options.site, options.set)
    plan = plan_array(
        f"{grid.name}-{grid.size_name}",
        Path.cwd() / grid.folder,
        site,
        words,
        elements=len(grid.cells),
        option="--number",
    )
    print(render(plan), end="")
    return ExitCode.DONE


def run(words: Sequence[str]) -> int:
    """Run a command; returns its exit code. A user's mistake is one message, and exit code 2."""
    try:
        with stop_signals_raise():  # while cells run, `go_through` listens instead
            return _dispatch(words)
    except UserError as error:
        tell(f"error: {error}")
        return exit_code_of(error)
    except MachineFailed as error:
        tell(f"error: {error}")
        return ExitCode.MACHINE_FAILED
    except (Interrupted, KeyboardInterrupt):
        say("stopped; what is finished is kept, give the same command again to go on")
        return ExitCode.STOPPED


def main() -> None:
    """Console entry point."""
    sys.exit(until_nobody_reads(lambda: run(sys.argv[1:])))
