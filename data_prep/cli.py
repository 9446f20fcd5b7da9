"""The command line `python -m data_prep`: collect, tokenizer, build, merge, repack, verify, ...

The exit codes are those of `xlstm_io.errors.ExitCode`.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import tyro
from pydantic import ValidationError

from data_prep.build.build import build, check_build
from data_prep.build_options import build_options, explain
from data_prep.config import BuildConfig
from data_prep.jobs.progress import say
from data_prep.options import Paths, Words, parse
from data_prep.sources.documents import Fields, TextSplit
from data_prep.sources.malformed import MAX_BAD_SHARE, check_max_bad_share
from data_prep.synthetic.command import main as synthetic
from data_prep.tools.collect import collect
from data_prep.tools.import_megatron import ImportSettings, import_megatron
from data_prep.tools.inspect_shards import describe, show_row
from data_prep.tools.merge import merge
from data_prep.tools.ngram_baselines import baselines
from data_prep.tools.repack import repack
from data_prep.tools.train_tokenizer import adopt_tokenizer, train_tokenizer
from data_prep.tools.verify import verify
from xlstm_io.errors import (
    ExitCode,
    Interrupted,
    MachineFailed,
    PrepError,
    UserError,
    exit_code_of,
    is_machine_failure,
)
from xlstm_io.signals import stop_signals_raise
from xlstm_io.terminal import one_line, tell, until_nobody_reads

_PROGRAM = "python -m data_prep"
CHECK = "--check"  # not a setting: what is built does not depend on it


@dataclass(kw_only=True)
class Collect:
    """Gather documents into OUT/corpus.jsonl.zst with a note of origin and licence."""

    out: Path
    """Folder for the corpus."""
    input: Words = field(default_factory=list)
    """Files, folders or quoted globs; none: the Python standard library's sources."""
    min_mb: float = 8.0
    """Refuse a corpus with less text than this, in megabytes."""
    text_field: str = "text"
    """Field (jsonl) or column (parquet, arrow) of the text."""
    text_split: TextSplit = "file"
    """What of a text file is one document: file, lines, or paragraphs (between blank lines)."""
    max_bad_share: float = MAX_BAD_SHARE
    """Share of malformed records, or of their bytes, above which the corpus is refused. Of a single
    file more than half is refused, unless this is larger."""

    def run(self) -> None:
        """Do it."""
        fields = Fields(self.text_field, split=self.text_split)
        check_max_bad_share(self.max_bad_share)
        collect(
            self.out,
            self.input,
            min_mb=self.min_mb,
            fields=fields,
            max_bad_share=self.max_bad_share,
        )


@dataclass(kw_only=True)
class TrainTokenizer:
    """Train a SentencePiece tokenizer (byte fallback, text kept as it is), or adopt one."""

    out: Path
    """Folder for the tokenizer."""
    input: Words = field(default_factory=list)
    """Files, folders, quoted globs or URLs: jsonl, parquet, arrow, text; also compressed."""
    from_hf: Path | None = None
    """Adopt the Hugging Face tokenizer of this folder (tokenizer.json) instead of training."""
    from_model: Path | None = None
    """Adopt this SentencePiece .model instead of training."""
    bos_token: str | None = None
    """With --from-hf: the token that begins documents, where the folder names none."""
    eos_token: str | None = None
    """With --from-hf: the token that ends documents, where the folder names none."""
    vocab_size: int = 8192
    """Number of pieces, with bytes and special symbols."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """Algorithm; unigram trains about 15 times longer."""
    special_tokens: Words = field(default_factory=list)
    """Further ids that no text yields, such as '<|user|>'."""
    text_field: str = "text"
    """Field (jsonl) or column (parquet, arrow) of the text."""
    text_split: TextSplit = "file"
    """What of a text file is one document: file, lines, or paragraphs (between blank lines)."""
    sample_mb: float = 200.0
    """Train on a sample of at most this much text, in megabytes."""
    max_bad_share: float = MAX_BAD_SHARE
    """Share of malformed records, or of their bytes, above which the corpus is refused. Of a single
    file more than half is refused, unless this is larger."""

    def run(self) -> None:
        """Do it."""
        adopted = self.from_hf or self.from_model
        given = [bool(self.input), self.from_hf is not None, self.from_model is not None]
        if sum(given) != 1:
            raise PrepError("give one of --input (train), --from-hf and --from-model (adopt)")
        if adopted is not None:
            adopt_tokenizer(adopted, self.out, bos_token=self.bos_token, eos_token=self.eos_token)
            return
        if self.vocab_size < 1 or self.sample_mb <= 0:
            raise PrepError(
                f"--vocab-size {self.vocab_size}, --sample-mb {self.sample_mb}: must be positive"
            )
        check_max_bad_share(self.max_bad_share)
        train_tokenizer(
            self.input,
            self.out,
            vocab_size=self.vocab_size,
            model_type=self.model_type,
            sample_mb=self.sample_mb,
            special_tokens=tuple(self.special_tokens),
            fields=Fields(self.text_field, split=self.text_split),
            max_bad_share=self.max_bad_share,
        )


@dataclass
class Merge:
    """Write the manifest of a build that several jobs shared, or join finished folders."""

    out: tyro.conf.Positional[Path]
    """Folder of shards; with --inputs a new one."""
    inputs: Paths = field(default_factory=list)
    """Finished folders to join (hard links where possible), each with sources of its own."""
    allow_duplicates: bool = False
    """Join folders that share documents, or whose documents cannot be compared."""
    rename: Words = field(default_factory=list)
    """With --inputs (one will do): OLD=NEW or FOLDER/OLD=NEW gives a source another name."""

    def run(self) -> None:
        """Do it."""
        merge(self.out, self.inputs, allow_duplicates=self.allow_duplicates, rename=self.rename)


@dataclass
class Repack:
    """Pack shards again for another length or packing, without tokenizing."""

    shards: tyro.conf.Positional[Path]
    """Folder of shards."""
    seq_len: int
    """The new context length."""
    out: Path | None = None
    """Folder for the new shards; default: SHARDS-N beside SHARDS."""
    packing: Literal["concat", "best_fit"] | None = None
    """Default: as it is."""
    workers: int = 0
    """Processes; 0 takes every core that the job may use. Does not change the output."""

    def run(self) -> None:
        """Do it."""
        repack(self.shards, self.seq_len, self.out, packing=self.packing, workers=self.workers)


@dataclass(kw_only=True)
class ImportMegatron:
    """Make shards of corpora that Megatron-LM has tokenized (.bin and .idx), with the same ids."""

    prefixes: tyro.conf.Positional[Words]
    """Paths without .bin and .idx, one or more."""
    tokenizer: Path
    """Folder or file of the tokenizer that made the ids."""
    out: Path
    """Folder for the shards."""
    seq_len: int = 256
    """Context length: a row holds seq_len + 1 tokens."""
    packing: Literal["concat", "best_fit"] = "concat"
    """Rows as one chopped stream, or documents kept whole and rows filled up with padding."""
    valid_fraction: float = 0.01
    """Share of the documents for validation, chosen by the hash of the text."""
    source: str = "corpus"
    """Name of the corpus: a folder in OUT."""
    shard_mb: float = 64.0
    """Megabytes of tokens per shard."""
    workers: int = 0
    """Processes; 0 takes every core that the job may use. Does not change the output."""

    def run(self) -> None:
        """Do it."""
        if not self.prefixes:
            raise PrepError("give the path of a corpus: that of its .bin and .idx, without them")
        layout = self.seq_len, self.packing, self.valid_fraction, self.shard_mb
        settings = ImportSettings(self.source, *layout)
        BuildConfig.model_validate({"input": "-", "tokenizer": "-", "out": "-", **vars(settings)})
        import_megatron(self.prefixes, self.tokenizer, self.out, settings, self.workers)


@dataclass
class Verify:
    """Check a folder of shards against its manifest."""

    out: tyro.conf.Positional[Path]
    """Folder of shards."""
    full: bool = False
    """Read and hash every byte."""

    def run(self) -> None:
        """Do it."""
        verify(self.out, full=self.full)


@dataclass
class Inspect:
    """Show what a folder of shards holds, or one row as text with its documents marked."""

    out: tyro.conf.Positional[Path]
    """Folder of shards."""
    row: int | None = None
    """Row to show, from 0."""
    split: Literal["train", "valid"] = "train"
    """Split of the row."""

    def run(self) -> None:
        """Do it."""
        say(describe(self.out) if self.row is None else show_row(self.out, self.row, self.split))


@dataclass
class Baselines:
    """Entropies of the validation tokens under unigram and bigram models of the train split."""

    shards: tyro.conf.Positional[Path]
    """Folder of shards."""
    out: Path | None = None
    """Where the JSON goes; default: baselines.json in the folder of shards."""

    def run(self) -> None:
        """Do it."""
        baselines(self.shards, self.out)


class _Command(Protocol):
    def run(self) -> None: ...


_COMMANDS: dict[str, type[_Command]] = {
    "collect": Collect,
    "tokenizer": TrainTokenizer,
    "merge": Merge,
    "repack": Repack,
    "import-megatron": ImportMegatron,
    "verify": Verify,
    "inspect": Inspect,
    "baselines": Baselines,
}
"""The commands whose options are a dataclass; `build` also reads a file, `synthetic` a task."""

_BUILD_HELP = "Tokenize and pack a corpus into shards: build [prep.yaml] [--key value ...]"
_HELP = {name: (command.__doc__ or "").splitlines()[0] for name, command in _COMMANDS.items()} | {
    "build": _BUILD_HELP,
    "synthetic": "Make the shards of a synthetic task: formal languages, recall, ListOps",
}
_NAMES = (*list(_COMMANDS)[:2], "build", "synthetic", *list(_COMMANDS)[2:])
_ALIASES = {"tokenize": "tokenizer"}


def _usage() -> str:
    lines = [
        f"usage: {_PROGRAM} COMMAND ...",
        f"       {_PROGRAM} COMMAND --help    for the options of a command",
        "",
    ]
    width = max(map(len, _NAMES))
    return "\n".join([*lines, *(f"  {name:{width}}  {_HELP[name]}" for name in _NAMES)])


def _run(name: str, arguments: list[str]) -> None:
    prog = f"{_PROGRAM} {name}"
    if name == "build":
        words = [word for word in arguments if word != CHECK]
        config, allow_functions = build_options(words, prog)
        (build if words == arguments else check_build)(config, allow_functions=allow_functions)
    elif name == "synthetic":
        synthetic(arguments, prog)
    else:
        parse(_COMMANDS[name], arguments, prog).run()


def _tell(name: str, message: str) -> None:
    """Print the one message of a command that did not come to its end."""
    tell(f"{_PROGRAM} {one_line(name)}: {message}")


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command and its options; default: those of the command line.

    Returns:
        The exit code.
    """
    return until_nobody_reads(lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return ExitCode.DONE if arguments else ExitCode.BAD_INPUT
    name = _ALIASES.get(arguments[0], arguments[0])
    if name not in _NAMES:
        _tell(name, f"there is no such command; use one of {', '.join(_NAMES)}")
        return ExitCode.BAD_INPUT
    try:
        with stop_signals_raise():
            _run(name, arguments[1:])
    except UserError as error:
        _tell(name, str(error))
        return exit_code_of(error)
    except ValidationError as error:
        _tell(name, explain(error.errors()))
        return ExitCode.BAD_INPUT
    except BrokenPipeError:
        raise
    except OSError as error:  # disk full, no permission, a file in place of a folder
        where = f": {error.filename}" if error.filename else ""
        _tell(name, os.strerror(error.errno or 0) + where)
        return ExitCode.MACHINE_FAILED if is_machine_failure(error) else ExitCode.BAD_INPUT
    except MachineFailed as error:
        _tell(name, str(error))
        return ExitCode.MACHINE_FAILED
    except (Interrupted, KeyboardInterrupt):
        _tell(name, "interrupted; what is finished is kept, run it again to continue")
        return ExitCode.STOPPED
    return ExitCode.DONE
