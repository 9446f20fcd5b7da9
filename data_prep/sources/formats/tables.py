"""Documents out of tables: parquet, and Hugging Face datasets saved to disk (arrow).

pyarrow trusts what a file says, so a table is read in a process of its own (`apart`), and each
batch is checked before its values are used. Characters are checked here, row by row: one text that
is not UTF-8 is one malformed record. What is not read decides nothing: a name that is not UTF-8
leaves the text alone.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.sources.documents import (
    LARGEST_TEXT,
    Document,
    Fields,
    Item,
    Malformed,
    Part,
    printable,
    too_large,
)
from data_prep.sources.formats.apart import yield_apart
from data_prep.sources.names import base_name
from data_prep.sources.streams import DECOMPRESSION_ERRORS, open_raw, open_stream
from xlstm_io.errors import PrepError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 1024
_BATCH_BYTES = 1 << 24


def read_table(path: str, kind: str, fields: Fields, wanted: np.ndarray | None) -> Iterator[Item]:
    """Documents of a table in order.

    Args:
        path: the file.
        kind: ".parquet" or ".arrow".
        fields: the columns of text and name.
        wanted: sorted row numbers; only these are given.

    Raises:
        PrepError: the file is not such a table, is damaged, or has no such column.
    """
    read = {".parquet": _read_parquet, ".arrow": _read_arrow}[kind]
    make = partial(_with_our_errors, path, read(path, fields, wanted))
    return yield_apart(make, path, lambda item: item.stored)


def _with_our_errors(path: str, items: Iterator[Item]) -> Iterator[Item]:
    import pyarrow as pa

    # mimalloc, pyarrow's own allocator, can crash in a process where the thread that loaded it is
    # gone, as threads are after a fork (apache/arrow issues 50471 and 50908).
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield from items
    except PrepError:
        raise
    except (pa.ArrowException, OSError, ValueError, *DECOMPRESSION_ERRORS) as error:
        reason = " ".join(printable(error).split())
        raise PrepError(f"{path}: cannot be read ({reason}); is it complete?") from None


def _read_parquet(path: str, fields: Fields, wanted: np.ndarray | None) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_raw(path) as stream:
        try:
            # Without reading ahead, which has threads of its own, in a process made by a fork.
            file = pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False)
        except pa.ArrowInvalid as error:
            raise PrepError(f"{path}: not a parquet file ({printable(error)})") from None
        columns = _columns(path, file.schema_arrow, fields)
        number = 0
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            if wanted is not None and number > wanted[-1]:
                return
            if _wanted_of(wanted, number, about.num_rows):
                # Rows of books are few at a time.
                mean = about.total_byte_size // max(1, about.num_rows)
                rows = min(_BATCH_ROWS, max(1, _BATCH_BYTES // max(1, mean)))
                batches = file.iter_batches(
                    rows, row_groups=[group], columns=columns, use_threads=False
                )
                counted = _Counted(batches)
                yield from _read_batches(path, counted, number, fields, wanted)
                if wanted is None and counted.rows != about.num_rows:
                    raise PrepError(
                        f"{path}: row group {group} has {counted.rows} rows, and should have "
                        f"{about.num_rows}: it is damaged"
                    )
            number += about.num_rows


class _Counted:
    """Batches, and how many rows have passed."""

    def __init__(self, batches: "Iterable[pa.RecordBatch]") -> None:
        self._batches, self.rows = batches, 0

    def __iter__(self) -> "Iterator[pa.RecordBatch]":
        for batch in self._batches:
            self.rows += batch.num_rows
            yield batch


def _read_arrow(path: str, fields: Fields, wanted: np.ndarray | None) -> Iterator[Item]:
    import pyarrow as pa

    with open_stream(path) as stream:
        try:
            reader = pa.ipc.open_stream(stream)
        except pa.ArrowInvalid:
            try:
                stream.seek(0)
                file = pa.ipc.open_file(stream)
            except (pa.ArrowInvalid, OSError) as error:
                raise PrepError(f"{path}: not an arrow file ({printable(error)})") from None
            reader = (file.get_batch(number) for number in range(file.num_record_batches))
            schema = file.schema
        else:
            schema = reader.schema
        _columns(path, schema, fields)
        batches = (
            batch.slice(first, _BATCH_ROWS)
            for batch in reader
            for first in range(0, batch.num_rows, _BATCH_ROWS)
        )
        yield from _read_batches(path, batches, 0, fields, wanted)


def _columns(path: str, schema: "pa.Schema", fields: Fields) -> list[str]:
    """The columns to read; `content.text` is the field `text` of the column `content`.

    Raises:
        PrepError: there is none for the text.
    """
    option = "--prompt-field and --completion-field" if fields.prompt else "--text-field"
    for column in fields.texts:
        if not _has(schema, column):
            names = ", ".join(map(printable, schema.names[:20]))
            raise PrepError(f"{path}: no column {column!r}; set {option} to one of {names}")
    for rule in fields.keep:
        if not _has(schema, rule.field):
            names = ", ".join(map(printable, schema.names[:20]))
            raise PrepError(f"{path}: no column {rule.field!r} for `keep`; it has {names}")
    named = [fields.id] if _has(schema, fields.id) else []
    return list(dict.fromkeys([*fields.texts, *named, *(rule.field for rule in fields.keep)]))


def _has(schema: "pa.Schema", name: str) -> bool:
    import pyarrow as pa

    if name in schema.names:
        return True
    first, *rest = name.split(".")
    if not rest or first not in schema.names:
        return False
    kind = schema.field(schema.names.index(first)).type
    for key in rest:
        if not pa.types.is_struct(kind) or kind.get_field_index(key) < 0:
            return False
        kind = kind.field(key).type
    return True


def _wanted_of(wanted: np.ndarray | None, first: int, rows: int) -> Collection[int]:
    """Those of the wanted numbers that are `first` or one of the next, `rows` in all."""
    if wanted is None:
        return range(first, first + rows)
    begin, end = np.searchsorted(wanted, [first, first + rows])
    return set(wanted[begin:end].tolist())


def _read_batches(
    path: str,
    batches: "Iterable[pa.RecordBatch]",
    number: int,
    fields: Fields,
    wanted: np.ndarray | None,
) -> Iterator[Item]:
    """The rows of table batches, of which the first has the number `number`."""
    for batch in batches:
        if wanted is not None and number > wanted[-1]:
            return
        kept = _wanted_of(wanted, number, batch.num_rows)
        if kept:
            texts = zip(*(_values(_column(batch, name)) for name in fields.texts), strict=True)
            names = _names(batch, fields)
            columns = [_for_rules(_column(batch, rule.field)) for rule in fields.keep]
            values = zip(*columns, strict=True) if columns else itertools.repeat(())
            rows = zip(texts, names, values, strict=False)
            for record, (found, name, others) in enumerate(rows, number):
                if record in kept:
                    yield _item(path, record, found, name, others, fields)
        number += batch.num_rows


def _for_rules(array: "pa.Array") -> list[Any]:
    return [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in _values(array)]


def _item(
    path: str,
    record: int,
    found: tuple[Any, ...],
    name: Any,
    others: tuple[Any, ...],
    fields: Fields,
) -> Item:
    """The document of a row, or what is wrong; `found` are the values of `fields.texts`."""
    label = f"{base_name(path)}:{record + 1}" if name is None else _label(name)
    where = f"{path}:{record + 1}"
    texts, size = [], 0
    for column, value in zip(fields.texts, found, strict=True):
        value = b"" if value is None else value
        if not isinstance(value, bytes):
            return Malformed(record, where, f"{type(value).__name__} in column {column!r}")
        size += len(value)
        if size > LARGEST_TEXT:
            return Malformed(record, where, too_large(size), size)
        try:
            texts.append(value.decode("utf-8"))
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 (byte {error.start}) in column {column!r}: {error.reason}"
            return Malformed(record, where, reason, size)
    parts = tuple(map(Part, texts, (False, True))) if fields.labelled else ()
    return Document(record, label, "".join(texts), 0, size, others, parts)


def _label(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _names(batch: "pa.RecordBatch", fields: Fields) -> Iterable[Any]:
    """The documents' names; none where they cannot be read, for nothing depends on them."""
    import pyarrow as pa

    if fields.id == fields.text or not _has(batch.schema, fields.id):
        return itertools.repeat(None)
    try:
        return _values(_column(batch, fields.id))
    except (pa.ArrowException, ValueError, OverflowError):  # such as a date of the year 10,000
        return itertools.repeat(None)


def _column(batch: "pa.RecordBatch", name: str) -> "pa.Array":
    """The column `name`, or the field of a column that `a.b` names."""
    import pyarrow.compute as pc

    names = batch.schema.names
    if name in names:
        return batch.column(names.index(name))
    first, *rest = name.split(".")
    array = batch.column(names.index(first))
    array.validate()
    for key in rest:
        array = pc.struct_field(array, key)
    return array


def _values(array: "pa.Array") -> list[Any]:
    """The values of a column, texts as their bytes; they are checked to lie inside the column.

    Raises:
        pa.ArrowException: they do not.
    """
    import pyarrow as pa

    array.validate()
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if not pa.types.is_dictionary(array.type):
        return _as_bytes(array).to_pylist()
    # Not decoded, as a long text may stand in every row; and no more of the dictionary than these
    # rows name, as each batch has that of its whole row group.
    checked = pa.DictionaryArray.from_arrays(array.indices, _as_bytes(array.dictionary))
    used = checked.indices.drop_null().unique().to_pylist()
    values = {n: checked.dictionary[n].as_py() for n in used}
    return [None if n is None else values[n] for n in array.indices.to_pylist()]


def _as_bytes(array: "pa.Array") -> "pa.Array":
    """A checked array; its texts as bytes, so that one that is not UTF-8 spoils no other.

    Raises:
        pa.ArrowInvalid: its values do not lie inside it.
    """
    import pyarrow as pa

    array.validate()
    as_bytes = {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.string_view(): pa.binary_view(),
    }
    if array.type in as_bytes:
        array = array.view(as_bytes[array.type])
    array.validate(full=True)
    return array
