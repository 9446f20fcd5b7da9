"""Damaged rows that a run does without: they are counted, written down, and limited in number.

A damaged row keeps its place in the order and becomes padding without a loss. So no other rank has
to know: batches keep their shapes, and the loss is divided by the number of tokens that count.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.data.dataset import DataError
from xlstm_io.shards.index import CorruptShardError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DamagedRow:
    """One sample that became padding without a loss, and why.

    Attributes:
        sample: Its global sample number.
        source: Name of its source.
        row: Its row in the source.
        path: File of the shard; this and the rest come from `CorruptShardError`.
        block: Block of rows in the shard, or None for the whole shard.
        offset: First byte of the damage in the file.
        expected: What should be there.
        got: What is there.
    """

    sample: int
    source: str
    row: int
    path: str
    block: int | None
    offset: int
    expected: str
    got: str

    @classmethod
    def of(cls, sample: int, source: str, row: int, error: CorruptShardError) -> DamagedRow:
        """The record of a row that raised `error`."""
        return cls(
            sample, source, row, error.path, error.block, error.offset, error.expected, error.got
        )


class Quarantine:
    """The damaged rows of a run so far.

    Args:
        limit: How many rows a run may meet before it gives up.
        file: Where the rows that this process meets are written, as JSON lines. None writes nothing
            and does not warn, for ranks that read the same rows as another.
        known: Rows that the run met before, from a checkpoint.
    """

    def __init__(
        self, limit: int, file: Path | None = None, known: Iterable[DamagedRow] = ()
    ) -> None:
        self.limit, self.file = limit, file
        self._rows = {row.sample: row for row in known}
        self._new: list[DamagedRow] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[DamagedRow]:
        """All of them, by sample number."""
        return [self._rows[sample] for sample in sorted(self._rows)]

    def add(self, rows: Iterable[DamagedRow]) -> None:
        """Write down rows that this process met.

        Raises:
            DataError: There are more than `limit` rows.
        """
        new = [row for row in rows if row.sample not in self._rows]
        if new and self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(asdict(row)) + "\n" for row in new)
            where = f"{new[0].path} block {new[0].block}"
            log.warning("%d damaged rows without a loss; see %s: %s", len(new), self.file, where)
        self._new += new
        self.merge(new)

    def take_new(self) -> list[DamagedRow]:
        """The rows that this process met since the last call, which others have not heard of."""
        new, self._new = self._new, []
        return new

    def merge(self, rows: Iterable[DamagedRow]) -> None:
        """Add rows that other ranks met.

        Raises:
            DataError: There are more than `limit` rows.
        """
        self._rows |= {row.sample: row for row in rows}
        if len(self._rows) > self.limit:
            paths = sorted({row.path for row in self._rows.values()})
            raise DataError(
                f"{len(self._rows)} damaged rows, more than data.max_quarantined={self.limit}, in "
                f"{', '.join(paths[:5])}{' and others' if len(paths) > 5 else ''}; restore these "
                "files, or raise data.max_quarantined"
            )
