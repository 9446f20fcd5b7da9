"""Command line of the conversion: `to-hf`, `verify`, and the import (`import_cli`)."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from xlstm_io.errors import ExitCode, UserError, is_machine_failure
from xlstm_io.storage import location
from xlstm_io.terminal import say, tell, until_nobody_reads
from xlstm_mcore.convert.imports import cli as import_cli

#: Names that `--family` and `--dtype` know; the modules that define them take seconds to import.
FAMILY_NAMES = ("xlstm", "llama", "xlstm_blocks")
DTYPE_NAMES = ("fp32", "bf16", "fp16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code, `ExitCode.REFUTED` where a comparison failed."""
    return until_nobody_reads(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        tell(f"error: {error}")
        return ExitCode.MACHINE_FAILED if is_machine_failure(error) else ExitCode.BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_mcore.convert",
        description="Convert checkpoints to and from other formats.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    ckpt_help = "a checkpoint, or a run folder (then its newest complete checkpoint)"
    tokenizer_help = (
        "a SentencePiece .model file, a tokenizer.json with its tokenizer_config.json beside it, "
        "or the folder of one (default: the tokenizer in the checkpoint)"
    )

    to_hf = commands.add_parser(
        "to-hf",
        help="write a checkpoint as a Hugging Face folder",
        description="Write a checkpoint as a Hugging Face folder and compare the two. Models of M "
        "become transformers' xlstm, models of * llama, and all others a class whose code travels "
        "with the weights. A conversion that was stopped goes on when it is repeated. Exit code 3 "
        "if the comparison fails.",
    )
    to_hf.add_argument("checkpoint", metavar="CKPT", help=ckpt_help)
    to_hf.add_argument(
        "out",
        metavar="OUT",
        help="the folder or URL to write; an earlier export there is replaced, anything else is "
        "refused",
    )
    to_hf.add_argument("--tokenizer", metavar="FILE|FOLDER", type=location, help=tokenizer_help)
    to_hf.add_argument(
        "--family",
        choices=FAMILY_NAMES,
        help="the format to write (default: the first of these that can express the model)",
    )
    to_hf.add_argument(
        "--dtype", choices=DTYPE_NAMES, default="fp32", help="type of the weights (default: fp32)"
    )
    to_hf.add_argument(
        "--shard-size",
        metavar="SIZE",
        type=_size,
        default=_size("5GB"),
        help="largest file of weights, such as 500MB (default: 5GB)",
    )
    to_hf.add_argument(
        "--keep-padding",
        action="store_true",
        help="keep the rows of the vocabulary that have no token",
    )
    to_hf.add_argument(
        "--dry-run", action="store_true", help="print the table of tensors and write nothing"
    )
    to_hf.add_argument("--no-verify", action="store_true", help="do not compare the two models")
    to_hf.add_argument("--json", action="store_true", help="print what was done as JSON")
    to_hf.set_defaults(run=_to_hf)

    verify = commands.add_parser(
        "verify",
        help="compare an exported folder with its checkpoint",
        description="Compare HF_DIR with its checkpoint: every tensor, the logits by transformers, "
        "generation, padding and the tokenizer. Write parity.json and parity.md there, and "
        "generate a few lines. Exit code 3 if anything differs.",
    )
    verify.add_argument("checkpoint", metavar="CKPT", help=ckpt_help)
    verify.add_argument("folder", metavar="HF_DIR", type=Path, help="what `to-hf` wrote")
    verify.add_argument("--json", action="store_true", help="print the results as JSON")
    verify.set_defaults(run=_verify)
    import_cli.add_commands(commands)
    return parser


def _size(text: str) -> int:
    """Bytes of a size such as 5GB or 500MB.

    Raises:
        ArgumentTypeError: It is not a size.
    """
    match = re.fullmatch(r"([1-9][0-9]*)(MB|GB|MiB|GiB)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it as 5GB or 500MB")
    unit = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}[match[2]]
    return int(match[1]) * unit


# transformers takes seconds to import: the commands import it, `--help` and errors do not wait.


def _to_hf(arguments: argparse.Namespace) -> int:
    from xlstm_mcore.convert.export.to_hf import export

    done = export(
        arguments.checkpoint,
        arguments.out,
        tokenizer=arguments.tokenizer,
        family=arguments.family,
        dtype=arguments.dtype,
        shard_bytes=arguments.shard_size,
        keep_padding=arguments.keep_padding,
        dry_run=arguments.dry_run,
    )
    table = [
        {"ours": row.ours, "theirs": row.theirs, "shape": done.plan.shape(row), "file": name}
        for name, rows in done.plan.files.items()
        for row in rows
    ]
    if arguments.dry_run:
        if arguments.json:
            say(json.dumps({"family": done.family, "tensors": table}))
            return ExitCode.DONE
        for line in table:
            say(f"{' + '.join(line['ours'])} -> {line['theirs']} {list(line['shape'])}")
        say(f"{len(table)} tensors as {done.family}, none missing and none left over")
        return ExitCode.DONE
    for note in done.notes:
        tell(f"note: {note}")
    whole = f", {done.parameters + done.padding:,} with rows of padding" if done.padding else ""
    text = f"wrote {done.path}: {done.parameters:,} parameters{whole}, {done.plan.dtype}, "
    text += f"as {done.family}"
    if arguments.json:
        keys = {"path": str(done.path), "family": done.family, "parameters": done.parameters}
        text = json.dumps({**keys, "padding": done.padding, "notes": done.notes})
    say(text)
    if arguments.no_verify:
        return ExitCode.DONE
    if not isinstance(location(arguments.out), Path):
        tell("not compared: transformers loads local folders")
        return ExitCode.DONE
    return _compare(arguments.checkpoint, Path(done.path), silent=True)


def _verify(arguments: argparse.Namespace) -> int:
    folder = arguments.folder
    code = _compare(arguments.checkpoint, folder, silent=False, as_json=arguments.json)
    if code == ExitCode.DONE and not arguments.json:
        from xlstm_mcore.convert.proof import verify

        if verify.read_marker(folder).parameters <= verify.SMALL:
            say("generated by transformers:")
            for text in verify.samples(verify.load_exported(folder), folder):
                say(f"  {text!r}")
    return code


def _compare(checkpoint: str, folder: Path, *, silent: bool, as_json: bool = False) -> int:
    """Compare a folder with its checkpoint; `silent` prints a line alone where all is well."""
    from xlstm_mcore.convert.proof import verify

    checks = verify.verify(checkpoint, folder)
    good = verify.passed(checks)
    if as_json:
        say((folder / verify.REPORT).read_text(encoding="utf-8"))
    elif not (silent and good):
        words = {True: "equal", False: "DIFFERENT", None: "not compared"}
        for check in checks:
            say(f"{check.name}: {words[check.passed]}; {check.detail}")
    report = folder / verify.PAGE
    if not good:
        tell(f"error: the export is not the checkpoint's model; see {report}")
        return ExitCode.REFUTED
    if not as_json:
        (tell if silent else say)(f"tensors and logits agree; wrote {report}")
    return ExitCode.DONE
