"""Packs the documents of finished shards again: another row length, another packing, the same ids.

Each shard becomes one shard, so work is parallel, and a killed run redoes its unfinished shards.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.build.notes import read_note, write_note
from data_prep.build.pack import Packing, make_packer, write_shard
from data_prep.jobs.progress import Progress, say
from data_prep.jobs.workers import Tick, Workers, available_cpus
from data_prep.tools.finished import is_finished
from xlstm_io.errors import PrepError
from xlstm_io.shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    load_manifest,
    place_of,
    split_fields,
    write_manifest,
)
from xlstm_io.shards.rows import (
    CONTINUATION,
    NO_DOCUMENT,
    PADDING,
    POSITION_MASK,
    Block,
    no_label,
)
from xlstm_io.shards.shard import ShardReader, default_block_rows, entry_is_there
from xlstm_io.storage import remove_temporaries, write_atomic

_STATE_NAME = "repack.json"


@dataclass(frozen=True)
class RepackTask:
    """One shard to pack again.

    Attributes:
        manifest: of the old shards, without their entries.
        entry: the old shard.
        out: folder of the new shards.
        seq_len: context length of the new rows.
        packing: "concat" or "best_fit".
    """

    manifest: Manifest
    entry: ShardEntry
    out: Path
    seq_len: int
    packing: Packing

    @property
    def record_path(self) -> Path:
        """Where the entry of the finished shard is kept."""
        return self.out / "_work" / "done" / f"{self.entry.path.replace('/', '-')}.json"


def repack(
    shards: Path,
    seq_len: int,
    out: Path | None = None,
    *,
    packing: Packing | None = None,
    workers: int = 0,
) -> Manifest:
    """Write the documents of `shards` to `out` in rows of `seq_len` and return the manifest.

    Args:
        shards: finished folder.
        seq_len: context length of the new rows.
        out: default `SHARDS-N` beside `shards`.
        packing: "concat" or "best_fit"; default: as it is.
        workers: processes; 0 takes every core. Does not change the output.

    Raises:
        PrepError: nothing to change, or `out` holds something else.
        CorruptShardError: damaged shards.
    """
    manifest = load_manifest(shards)
    packing = packing or manifest.packing
    out = out or shards.with_name(f"{shards.name}-{seq_len}")
    if seq_len < 2:
        raise PrepError(f"--seq-len {seq_len}: must be at least 2")
    if not manifest.add_eos:
        raise PrepError(
            f"{shards} holds samples, whose ends are not stored; make them again for rows of "
            f"{seq_len} (`python -m data_prep synthetic --seq-len {seq_len}`)"
        )
    if (seq_len, packing) == (manifest.seq_len, manifest.packing):
        raise PrepError(f"{shards} has --seq-len {seq_len} and packing {packing} already")
    settings = {"from": manifest.hash, "seq_len": seq_len, "packing": packing}
    if is_finished(out, _STATE_NAME, settings):
        say(f"{out} is finished: nothing to do")
        return load_manifest(out)
    write_atomic(out / "_work" / _STATE_NAME, json.dumps(settings).encode() + b"\n")
    for file in manifest.tokenizer_files():
        write_atomic(place_of(out, f"tokenizer/{file.name}"), file.read_bytes())

    format_only = manifest.model_copy(update={"sources": []})  # workers need not know all shards
    tasks = [RepackTask(format_only, e, out, seq_len, packing) for e in manifest.all_shards()]
    stored = {task.entry.path: _load_record(task) for task in tasks}
    done = {path: entry for path, entry in stored.items() if entry is not None}
    todo = [task for task in tasks if task.entry.path not in done]
    total = sum(task.entry.bytes for task in todo)
    with Workers(workers or available_cpus()) as processes, Progress("repack", total) as progress:
        for place, entry in processes.run(repack_shard, todo, progress):
            done[todo[place].entry.path] = entry.model_dump()
    remove_temporaries(out)

    fields = json.loads((manifest.root / MANIFEST_NAME).read_bytes())
    for source in fields["sources"]:
        for name, split in source["splits"].items():
            source["splits"][name] = split_fields([done[e["path"]] for e in split["shards"]])
    fields.pop("parent", None)
    fields |= {
        "seq_len": seq_len,
        "row_tokens": seq_len + 1,
        "block_rows": default_block_rows(seq_len + 1, np.dtype(manifest.dtype)),
        "packing": packing,
        "config_hash": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
    }
    result = write_manifest(out, fields)
    for source in result.sources:
        for name, split in source.splits.items():
            say(
                f"{source.name} {name}: {split.docs} documents, {split.tokens} tokens, "
                f"{split.rows} rows of {seq_len}, {split.pad_tokens} padding"
            )
    say(f"manifest {out / MANIFEST_NAME}  hash {result.hash[:12]}")
    return result


def _load_record(task: RepackTask) -> dict[str, Any] | None:
    entry = read_note(ShardEntry, task.record_path)
    if entry is None or (entry.path, entry.index) != (task.entry.path, task.entry.index):
        return None
    return entry.model_dump() if entry_is_there(task.out, entry) else None


def repack_shard(task: RepackTask, tick: Tick) -> ShardEntry:
    """Pack one shard again and keep its entry under `_work`."""
    manifest, old = task.manifest, task.entry
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    packer = make_packer(task.packing, task.seq_len, dtype, manifest.pad_id, manifest.labels)
    place_of(task.out, old.path)  # refuses a name that leads out of the folder
    documents = _counted(manifest, old, tick)
    entry = write_shard(task.out, old.path, documents, packer, bytes_in=old.bytes_in)
    write_note(task.record_path, entry.model_dump())
    return entry


def _counted(manifest: Manifest, entry: ShardEntry, tick: Tick) -> Iterator[np.ndarray]:
    """The documents of a shard, compared with the manifest's counts at the end."""
    documents = tokens = 0
    for document in stored_documents(manifest, entry, tick):
        documents, tokens = documents + 1, tokens + document.shape[-1]
        yield document
    if (documents, tokens) != (entry.docs, entry.tokens):
        raise PrepError(
            f"{manifest.root / entry.path}: {documents} documents of {tokens} tokens, the manifest "
            f"says {entry.docs} of {entry.tokens}; look with `python -m data_prep verify --full`"
        )


def stored_documents(
    manifest: Manifest, entry: ShardEntry, tick: Callable[[int], None] = lambda amount: None
) -> Iterator[np.ndarray]:
    """The documents of a shard, each as its ids with bos and eos, and with its labels [2, n].

    Args:
        manifest: of the folder.
        entry: the shard.
        tick: told the bytes of tokens as they are read.

    Raises:
        CorruptShardError: damaged bytes.
    """
    reader = ShardReader(manifest, entry)

    def blocks() -> Iterator[Block]:
        for number in range(reader.num_blocks):
            block = reader.block(number)
            yield block
            tick(block.tokens.nbytes)

    try:
        yield from (_uncut if manifest.packing == "concat" else _joined)(blocks(), manifest)
    finally:
        reader.close()


def _uncut(blocks: Iterator[Block], manifest: Manifest) -> Iterator[np.ndarray]:
    """Documents of concat blocks: the rows are one stream, cut where documents start."""
    held: list[np.ndarray] = []  # of the document that goes on
    last = np.empty(0, manifest.dtype)  # the row's last token, which the next row begins with
    for block in blocks:
        rows = _with_labels(block)
        positions = block.segments & np.uint32(POSITION_MASK)
        places = block.segment_rows() * manifest.seq_len + positions
        inside = positions < manifest.seq_len
        padding = (block.segments & np.uint32(PADDING)) != 0
        starts = places[inside & ~padding & ((block.segments & np.uint32(CONTINUATION)) == 0)]
        stream = rows[..., :-1].reshape(*rows.shape[:-2], -1)
        last = rows[..., -1, -1:]
        if padding.any():
            whole = np.concatenate([stream, last], axis=-1)
            stream, last = whole[..., : places[padding][0]], last[..., :0]
        for number, part in enumerate(np.split(stream, starts, axis=-1)):
            if number and held:
                yield np.concatenate(held, axis=-1)
                held = []
            if part.shape[-1]:
                held.append(part)
    if held:
        yield np.concatenate([*held, last], axis=-1)


def _with_labels(block: Block) -> np.ndarray:
    """The rows of a block [rows, row_tokens], or [2, rows, row_tokens] where it has labels."""
    if block.labels is None:
        return block.tokens
    # The last token of a row has its label where it stands again, or ends a document.
    labels = np.pad(block.labels, ((0, 0), (0, 1)), constant_values=no_label(block.labels.dtype))
    return np.stack([block.tokens, labels])


def _joined(blocks: Iterator[Block], manifest: Manifest) -> Iterator[np.ndarray]:
    """Documents of best_fit blocks: parts are joined by the document that they belong to.

    Its last part is the one that does not fill a row. Where that fills one, too, only the end of
    the shard shows that no more follow: an eos at the end of a row may stand within a document.
    """
    held: dict[int, list[np.ndarray]] = {}
    for block in blocks:
        positions = (block.segments & np.uint32(POSITION_MASK)).tolist()
        documents, offsets = block.documents.tolist(), block.offsets.tolist()
        rows = _with_labels(block)
        for row in range(rows.shape[-2]):
            tokens = rows[..., row, :]
            first, last = offsets[row], offsets[row + 1]
            ends = [*positions[first + 1 : last], manifest.row_tokens]
            for number, start, end in zip(
                documents[first:last], positions[first:last], ends, strict=True
            ):
                if number == NO_DOCUMENT:
                    continue
                parts = held.setdefault(number, [])
                if parts:  # its last token begins this part, with its label
                    parts[-1] = parts[-1][..., :-1]
                parts.append(tokens[..., start:end].copy())
                if end - start < manifest.row_tokens:
                    yield np.concatenate(held.pop(number), axis=-1)
    for parts in held.values():
        yield np.concatenate(parts, axis=-1)
