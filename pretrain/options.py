"""Options of commands about a checkpoint, those of `generate`, and keys of a run file."""

import argparse
from collections.abc import Iterable

from pretrain.config import RunConfig
from pretrain.config.reference import options_help
from xlstm_io.errors import ConfigError

OVERRIDES_HELP = (
    "Every key of the run file can be given as an option, such as --optimizer.lr 3e-4. Lists and "
    "mappings are written as in the file, in one line: --optimizer.decay '{norm: true}'. "
    "COMMAND RUN.yaml --help lists all keys."
)
EVALUATION_HELP = (
    "The model is the checkpoint's, in fp32, and every set is measured whole. Keys of the run file "
    "that say which data these are can be given as options, such as --data.path shards. "
    "evaluate CKPT RUN.yaml --help lists them."
)
EVALUATION_KEYS = (
    "data.path",
    "data.sources",
    "data.valid",
    "data.seq_len",
    "data.micro_batch",
    "data.cache_dir",
    "data.cache_gb",
)
# They decide nothing in `evaluate`, but rules between keys tie them to those that do: a length that
# the layout of training would not split can be measured all the same.
_TIED_KEYS = (
    *("data.phases", "data.global_batch", "data.batch_ramp", "data.fill_batch"),
    *("layout.context", "layout.tensor", "layout.sequence"),
)


def overrides_help(command: str, config: RunConfig) -> str:
    """The keys of a run file that a command takes as options, with their values in `config`."""
    if command == "evaluate":
        return f"{EVALUATION_HELP}\n\n{options_help(config, EVALUATION_KEYS)}"
    return f"{OVERRIDES_HELP}\n\n{options_help(config)}"


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint a command is about."""
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="checkpoint or run folder, or a URL of one"
    )
    parser.add_argument(
        "--checkpoint",
        dest="which",
        metavar="best|STEP|PATH",
        help="which checkpoint of the run folder: the lowest validation loss, that of a step, or "
        "one by name (default: the newest)",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """How a command opens the model and the tokenizer of a checkpoint."""
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of weights and activations (default: %(default)s)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE|FOLDER",
        help="a .model file, a tokenizer.json, or a folder (default: the one in the checkpoint)",
    )


def check_evaluation_keys(given: Iterable[str]) -> None:
    """Refuse keys of the run file that `evaluate` would not use.

    Args:
        given: the dotted keys of a command line.

    Raises:
        ConfigError: there are such keys; the message names them all.
    """
    unused = [f"--{key}" for key in given if key not in EVALUATION_KEYS + _TIED_KEYS]
    if unused:
        raise ConfigError(
            f"{', '.join(unused)}: evaluate would not use this; it measures every set whole, with "
            f"the checkpoint's model in fp32. The keys that count are {', '.join(EVALUATION_KEYS)}"
        )


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Options of `evaluate`."""
    parser.epilog = EVALUATION_HELP
    add_checkpoint(parser)
    parser.add_argument(
        "--by",
        choices=("position", "length", "frequency", "source"),
        help="also by a token's place in its document, by the document's length, by how often the "
        "token is to be predicted, or by source",
    )
    parser.add_argument(
        "--times",
        type=int,
        default=1,
        metavar="K",
        help="at K times the trained length: the state is carried over K rows, in linear time",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Options of `demo`."""
    add, default = parser.add_argument, "(default: %(default)s)"
    add(
        "--model",
        choices=("large", "classic"),
        default="large",
        help=f"blocks of xLSTM 7B, or of the first paper {default}",
    )
    add("--steps", type=int, default=200, metavar="N", help=f"steps to train {default}")
    add("--data", metavar="PATH", help="your text files or a glob (default: Python's own sources)")
    field = f"field (jsonl) or column (parquet) of the text {default}"
    add("--text-field", default="text", metavar="NAME", help=field)
    add("--vocab-size", type=int, default=8192, metavar="N", help=f"ids of the tokenizer {default}")
    add("--work", default="runs/demo", metavar="DIR", help=f"where everything goes {default}")
    add("--nproc", type=int, metavar="N", help="processes (default: 2, or 1 with one GPU)")


def add_report(parser: argparse.ArgumentParser) -> None:
    """Options of `report`."""
    add = parser.add_argument
    add("run_dirs", nargs="+", metavar="RUN", help="run folder; several are compared on one page")
    add("--baselines", metavar="FILE", help="n-gram losses that data_prep baselines wrote")


def add_rewind(parser: argparse.ArgumentParser) -> None:
    """Options of `rewind`."""
    add = parser.add_argument
    add("run_dir", metavar="RUN", help="run folder")
    add("--to", type=int, required=True, metavar="STEP", help="step of that checkpoint")
    text = "samples after it that are left out (default: %(default)s)"
    add("--skip-samples", type=int, default=0, metavar="N", help=text)


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Options of `generate`; their defaults are those of `xlstm_mcore.generation.settings`."""
    add = parser.add_argument
    parser.epilog = (
        "What is written is a function of the seed, the prompt's number and the sample's number. "
        "Under torchrun all processes share the heads (tensor parallel)."
    )
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue, - for stdin; may be given several times (default: start a "
        "document)",
    )
    add(
        "--prompts",
        metavar="FILE.jsonl",
        help='file with a line {"prompt": TEXT} for each text to continue, - for stdin',
    )
    default = "(default: %(default)s)"
    add("--max-tokens", type=int, default=128, metavar="N", help=f"tokens to add at most {default}")
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help=f"0 takes the likeliest token {default}",
    )
    add(
        "--top-k",
        type=int,
        default=50,
        metavar="K",
        help=f"sample among the K likeliest tokens; 0 for all {default}",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample among the likeliest tokens that together have probability P; 1 for all "
        f"{default}",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a completion before this text; may be given several times",
    )
    add("--seed", type=int, default=0, metavar="S", help=f"seed of the samples {default}")
    add(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help=f"completions of each prompt {default}",
    )
    add(
        "--batch",
        type=int,
        default=16,
        metavar="N",
        help=f"completions that are computed together at most {default}",
    )
    add_model(parser)
    add("--json", action="store_true", help="print a line of JSON for each completion")
    add(
        "--out",
        metavar="FILE",
        help="write the completions: JSON lines if FILE ends in .jsonl, else the texts",
    )
