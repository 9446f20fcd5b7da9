"""How much of the input is malformed, and when that is too much.

Records and bytes are counted, file by file. A single malformed record among good ones is skipped
and reported. A file that is mostly malformed is never skipped: it is of another kind than it seems,
or damaged, and its texts would be missing without a word. (Of a JSON array with an element per line
the last line alone is JSON.)
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.jobs.progress import say
from data_prep.sources.documents import Document, Fields, Item
from data_prep.sources.names import JSON_SUFFIXES, TABLE_SUFFIXES, suffixes
from data_prep.sources.readers import read_documents
from data_prep.sources.streams import DECOMPRESSION_ERRORS, open_text
from xlstm_io.errors import PrepError
from xlstm_io.remote import masked
from xlstm_io.storage import write_atomic

QUOTED_MALFORMED = 5
"""Malformed records that commands print; more are only counted."""

MAX_BAD_SHARE = 0.1
"""Share of malformed records, or bytes, that is accepted where the user says nothing."""

_MOST_OF_A_FILE = 0.5
_LOGGED = 1_000  # malformed records of a file that are logged
_QUOTED_FILES = 3
_HEAD = 1 << 12


@dataclass
class Tally:
    """What was read of one file.

    Attributes:
        path: the file.
        good: documents.
        good_bytes: bytes of their records.
        bad: malformed records.
        bad_bytes: bytes of them.
        examples: the first malformed records, as "file:line: reason".
    """

    path: str
    good: int = 0
    good_bytes: int = 0
    bad: int = 0
    bad_bytes: int = 0
    examples: list[str] = field(default_factory=list)

    def documents(self, items: Iterable[Item]) -> Iterator[Document]:
        """The documents among `items`, all of which are counted."""
        for item in items:
            if isinstance(item, Document):
                self.good += 1
                self.good_bytes += item.stored
                yield item
                continue
            self.bad += 1
            self.bad_bytes += item.stored
            if len(self.examples) < _LOGGED:
                self.examples.append(f"{item.where}: {item.reason}")


def check_max_bad_share(share: float) -> None:
    """Raise PrepError where `share` is not a share."""
    if not 0 <= share <= 1:
        raise PrepError(f"--max-bad-share {share}: must lie between 0 and 1")


def read_counted(paths: Sequence[str], fields: Fields, tallies: list[Tally]) -> Iterator[Document]:
    """The documents of some files; a tally of each file is appended to `tallies`."""
    for path in paths:
        tallies.append(Tally(path))
        yield from tallies[-1].documents(read_documents(path, fields))


def report_malformed(tallies: Sequence[Tally], max_share: float, log: Path | None = None) -> None:
    """Print the first malformed records, and log all that are quoted.

    Args:
        tallies: of all files.
        max_share: largest share of malformed records, and of their bytes, that is accepted; of a
            single file more than half is refused, unless this is larger.
        log: file for the malformed records.

    Raises:
        PrepError: it is more, over all files or in one, or there is no document at all.
    """
    bad = sum(tally.bad for tally in tallies)
    good = sum(tally.good for tally in tallies)
    examples = [example for tally in tallies for example in tally.examples]
    if not good and not bad:
        raise PrepError("--input: no document in these files")
    if examples and log is not None:
        lines = masked("".join(f"{example}\n" for example in examples))
        write_atomic(log, lines.encode("utf-8", "backslashreplace"))  # names may not be UTF-8
    most = max(_MOST_OF_A_FILE, max_share)
    _refuse_files([tally for tally in tallies if tally.bad > most * (tally.bad + tally.good)])
    bad_bytes = sum(tally.bad_bytes for tally in tallies)
    all_bytes = bad_bytes + sum(tally.good_bytes for tally in tallies)
    for part, whole, unit in ((bad, bad + good, "records"), (bad_bytes, all_bytes, "bytes")):
        if part > max_share * whole:
            raise PrepError(
                f"{part} of {whole} {unit} are malformed, more than --max-bad-share "
                f"{max_share:g}: {'; '.join(examples[:QUOTED_MALFORMED])}; repair them, set "
                "--text-field, or raise --max-bad-share"
            )
    for example in examples[:QUOTED_MALFORMED]:
        say(f"malformed, skipped: {example}")
    if bad > QUOTED_MALFORMED:
        more = f"malformed, skipped: {bad - QUOTED_MALFORMED} more"
        say(more if log is None else f"{more}; see {log}")


def _refuse_files(files: list[Tally]) -> None:
    """Raise for files that are mostly malformed."""
    if not files:
        return
    named = [
        f"{tally.path}: {tally.bad} of {tally.bad + tally.good} records are malformed "
        f"({tally.examples[0]}{_what_it_looks_like(tally)})"
        for tally in files[:_QUOTED_FILES]
    ]
    more = [f"{len(files) - _QUOTED_FILES} more such files"] if len(files) > _QUOTED_FILES else []
    raise PrepError(
        f"{'; '.join([*named, *more])}; repair them, set --text-field, leave them out of --input, "
        "or skip them by --max-bad-share 1"
    )


def _what_it_looks_like(tally: Tally) -> str:
    """What a malformed file seems to be, with the remedy; empty where that is open."""
    kind = suffixes(tally.path)[0]
    if kind in TABLE_SUFFIXES:
        return ""
    if "not UTF-8" in tally.examples[0]:
        return "; write it as UTF-8, for example by `iconv -f LATIN1 -t UTF-8`"
    if kind not in JSON_SUFFIXES:
        return ""
    try:
        with open_text(tally.path) as stream:
            begin = stream.read(_HEAD).lstrip()
    except (OSError, PrepError, *DECOMPRESSION_ERRORS):
        return ""
    line = begin.partition(b"\n")[0].rstrip()
    if line.startswith(b"["):
        return "; it looks like a JSON array: make lines of it by `jq -c '.[]'`"
    if line == b"{":
        return "; it looks like JSON over several lines: make one line of each by `jq -c .`"
    if line.startswith(b"{"):
        return "; its lines end in commas: take them off" if line.endswith(b"},") else ""
    if b"," in line or b"\t" in line:
        return "; it looks like values separated by commas or tabs: make a parquet table of it"
    return "; it looks like plain text: name it .txt"
