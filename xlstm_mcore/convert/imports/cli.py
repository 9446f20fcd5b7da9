"""Command line of the import: `from-hf` and `from-nxai`."""

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import yaml

from xlstm_io.errors import ExitCode
from xlstm_io.storage import location
from xlstm_io.terminal import say
from xlstm_mcore.convert.errors import ConvertError

if TYPE_CHECKING:
    from xlstm_io.storage import Location
    from xlstm_mcore.convert.imports.plan import Foreign


def add_commands(commands: Any) -> None:
    """Add both commands to the subparsers of `python -m xlstm_mcore.convert`."""
    from_hf = commands.add_parser(
        "from-hf",
        help="read a Hugging Face folder as a checkpoint",
        description="Write the model of a Hugging Face folder as a checkpoint at step 0, from "
        "which a run of any layout starts (run.init_from). It reads transformers' `xlstm` (the "
        "published 7B too), `llama`, and the class of our own exports. Weights come from "
        "safetensors, or from .bin files by torch's weights-only loading. Nothing of them is run. "
        "An import that was stopped goes on when it is repeated.",
    )
    from_hf.add_argument(
        "source",
        metavar="DIR",
        type=location,
        help="the folder, with its config.json; a path or an fsspec URL",
    )
    from_hf.set_defaults(run=_from_hf)
    from_nxai = commands.add_parser(
        "from-nxai",
        help="read a state dict of pip xlstm as a checkpoint",
        description="Write the model of a state dict of pip xlstm (xLSTMLMModel with either "
        "backend of the sLSTM, or xLSTMLarge) as a checkpoint at step 0, from which a run of any "
        "layout starts (run.init_from). Sizes are read from the weights; what a state dict does "
        "not say is the default of its class, and --set changes it.",
    )
    from_nxai.add_argument(
        "source",
        metavar="FILE",
        type=location,
        help="a .safetensors, .pt or .bin file, or its folder; a path or an fsspec URL",
    )
    from_nxai.set_defaults(run=_from_nxai)
    for command in (from_hf, from_nxai):
        command.add_argument(
            "out",
            metavar="OUT",
            type=location,
            nargs="?",
            help="folder or URL for the checkpoint; it must not hold one (not needed with "
            "--dry-run)",
        )
        command.add_argument(
            "--tokenizer",
            metavar="FILE|FOLDER",
            type=location,
            help="a .model file, a tokenizer.json, or a folder (default: the one beside the "
            "weights)",
        )
        command.add_argument(
            "--vocab-size",
            metavar="N",
            type=int,
            help="rows of the embedding, filled up with zeros (default: those that there are)",
        )
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="a key of the model: section; may be given several times",
        )
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="print the table of tensors with what is missing and left over; write nothing",
        )
        command.add_argument("--json", action="store_true", help="print JSON")


# torch takes seconds to import: the commands import it, `--help` and errors do not wait.


def _from_hf(arguments: argparse.Namespace) -> int:
    from xlstm_mcore.convert.imports.plan import open_hf

    return _import(arguments, open_hf)


def _from_nxai(arguments: argparse.Namespace) -> int:
    from xlstm_mcore.convert.imports.plan import open_nxai

    return _import(arguments, open_nxai)


def _import(arguments: argparse.Namespace, open_source: "Callable[[Location], Foreign]") -> int:
    from xlstm_mcore.convert.imports.plan import make_plan, parse_changes
    from xlstm_mcore.convert.imports.write import write

    if arguments.out is None and not arguments.dry_run:
        raise ConvertError("OUT is missing: the folder to write the checkpoint into")
    changes = parse_changes(arguments.set)
    foreign = open_source(arguments.source)
    with foreign.tensors as tensors:
        plan = make_plan(foreign, changes=changes, vocab_size=arguments.vocab_size)
        if arguments.dry_run:
            say(json.dumps(plan.as_json()) if arguments.json else plan.as_text())
            return ExitCode.BAD_INPUT if plan.problems else ExitCode.DONE
        done = write(
            plan,
            tensors,
            arguments.out,
            source=arguments.source,
            tokenizer=arguments.tokenizer,
        )
    if arguments.json:
        facts = {"checkpoint": str(done.path), "parameters": done.parameters, "notes": done.notes}
        say(json.dumps(plan.as_json() | facts))
        return ExitCode.DONE
    for note in done.notes:
        say(f"note: {note}")
    section = plan.model.model_dump(mode="json", exclude_defaults=True)
    say("the model section of a run file that starts from it:")
    say(yaml.safe_dump({"model": section}, sort_keys=False).rstrip())
    say(f"wrote {done.path}: {done.parameters:,} parameters, {plan.family}")
    return ExitCode.DONE
