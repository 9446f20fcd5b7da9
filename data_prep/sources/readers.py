"""Documents out of files: jsonl, parquet, Hugging Face datasets saved to disk (arrow), text.

A record is numbered by its place in the file (line, table row, part of a text), good or not. So
"record 17 of this file" means the same in every pass and can be found without parsing the others.
What cannot be a document comes out as `Malformed` with file and line; `malformed` counts them and
decides.
"""

from collections.abc import Iterator

import numpy as np

from data_prep.sources.documents import DEFAULT_FIELDS, Fields, Item, printable
from data_prep.sources.formats.json_lines import read_json_lines
from data_prep.sources.formats.tables import read_table
from data_prep.sources.formats.text import read_parts, read_text
from data_prep.sources.names import JSON_SUFFIXES, TABLE_SUFFIXES, suffixes
from data_prep.sources.streams import DECOMPRESSION_ERRORS
from xlstm_io.errors import PrepError


def read_documents(
    path: str,
    fields: Fields = DEFAULT_FIELDS,
    wanted: np.ndarray | None = None,
    offset: int = 0,
) -> Iterator[Item]:
    """Documents of one file in order.

    Args:
        path: jsonl, parquet, arrow or text by its suffix; what it is compressed by is taken off.
        fields: which part of a record is its text.
        wanted: sorted record numbers; only these are parsed, reading ends after the last.
        offset: `Document.offset` of the first wanted record: what precedes is not even read.

    Raises:
        PrepError: the file cannot be read: missing, truncated, damaged, or not of its kind.
    """
    path = str(path)
    if wanted is not None and not len(wanted):
        return
    kind, _ = suffixes(path)
    if fields.keep and kind not in JSON_SUFFIXES | TABLE_SUFFIXES:
        raise PrepError(
            f"{path}: a text file has no fields for `keep`; make it a source of its own"
        )
    if fields.segments and kind not in JSON_SUFFIXES:
        raise PrepError(
            f"{path}: segments are read from JSON lines alone; write its rows as .jsonl"
        )
    if fields.prompt and kind not in JSON_SUFFIXES | TABLE_SUFFIXES:
        raise PrepError(f"{path}: a text file has no fields for prompts; write it as .jsonl")
    try:
        if kind in JSON_SUFFIXES:
            yield from read_json_lines(path, fields, wanted, offset)
        elif kind in TABLE_SUFFIXES:
            yield from read_table(path, kind, fields, wanted)
        elif fields.split == "file":
            yield from read_text(path)
        else:
            yield from read_parts(path, fields.split, wanted)
    except PrepError:
        raise
    except (OSError, *DECOMPRESSION_ERRORS) as error:
        raise PrepError(f"{path}: cannot be read ({printable(error)}); is it complete?") from error
    except MemoryError:
        raise PrepError(f"{path}: there is too little memory to read it") from None
