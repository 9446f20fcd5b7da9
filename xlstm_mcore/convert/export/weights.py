"""Write a checkpoint's weights as safetensors files, one tensor in memory at a time.

Files are planned first, so a conversion that was killed finds those that it had finished by their
hashes, and goes on with the next one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash
from tqdm import tqdm

from xlstm_io.checkpoint.reader import CheckpointReader, TensorSlice
from xlstm_io.checkpoint.safetensors_stream import TensorHeader, hash_file, write_safetensors
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.storage import Location, exists, read_file, write_atomic
from xlstm_io.terminal import tell
from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.tables import Row

#: Lists the files of an unfinished export with their hashes.
PROGRESS = "conversion_progress.json"
INDEX = "model.safetensors.index.json"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """What is written.

    Attributes:
        rows: The tensors.
        vocab: Rows of the vocabulary that are written; what is behind them is padding.
        dtype: Name of their type, a key of `DTYPES`.
        files: The tensors of each file, by the file's name.
    """

    rows: tuple[Row, ...]
    vocab: int
    dtype: str
    files: dict[str, tuple[Row, ...]]

    def shape(self, row: Row) -> tuple[int, ...]:
        """Shape of a tensor as it is written."""
        return (self.vocab, *row.shape[1:]) if row.has_vocabulary else row.shape

    def header(self, row: Row) -> TensorHeader:
        """What the file says about a tensor."""
        return TensorHeader(row.theirs, DTYPES[self.dtype], self.shape(row))


def plan_files(rows: Sequence[Row], vocab: int, dtype: str, shard_bytes: int) -> Plan:
    """Distribute tensors over files of at most `shard_bytes` (a larger tensor has its own)."""
    plan = Plan(tuple(rows), vocab, dtype, {})
    groups: list[list[Row]] = [[]]
    size = 0
    for row in rows:
        added = plan.header(row).num_bytes
        if groups[-1] and size + added > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(row)
        size += added
    for number, group in enumerate(groups, start=1):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        plan.files[name] = tuple(group)
    return plan


def read_row(reader: CheckpointReader, row: Row, plan: Plan) -> torch.Tensor:
    """A tensor of theirs, from those of the checkpoint, in the type of the plan.

    Raises:
        ConvertError: A number is too large for the type.
    """
    dtype = DTYPES[plan.dtype]
    if row.has_vocabulary:  # the rows of real tokens alone
        ours = [torch.empty(plan.shape(row), dtype=dtype)]
        reader.read_into(TensorSlice(row.ours[0], row.shapes[0], (0, 0), ours[0]))
    else:
        ours = [reader.read(name, dtype=dtype) for name in row.ours]
    theirs = row.transform.to_theirs(ours)
    if plan.dtype == "fp16" and theirs.isinf().any():
        raise ConvertError(f"{row.ours[0]} has numbers too large for fp16; use --dtype bf16")
    return theirs


def write_weights(reader: CheckpointReader, plan: Plan, folder: Location) -> None:
    """Write the files of a plan, and their index when there are several.

    Args:
        reader: The checkpoint.
        plan: What to write.
        folder: Where; files that an earlier call finished there are kept.

    Raises:
        ConvertError: A number is too large for the type.
        OSError: As the file system does.
    """
    fingerprint = _fingerprint(reader, plan)
    finished = _finished_files(folder, fingerprint)
    by_key = {row.theirs: row for row in plan.rows}
    with tqdm(total=len(plan.rows), unit="tensor", disable=None) as progress:

        def tensor_of(header: TensorHeader) -> torch.Tensor:
            progress.update()
            return read_row(reader, by_key[header.key], plan)

        for name, rows in plan.files.items():
            if name in finished:
                progress.update(len(rows))
                continue
            if len(plan.files) > 1:
                tell(f"writing {name}")
            file, _ = write_safetensors(folder / name, list(map(plan.header, rows)), tensor_of)
            finished[name] = {"size": file.size, "xxh3": file.xxh3}
            body = {"plan": fingerprint, "files": finished}
            write_atomic(folder / PROGRESS, json.dumps(body).encode())
    if len(plan.files) > 1:
        total = sum(plan.header(row).num_bytes for row in plan.rows)
        weight_map = {row.theirs: name for name, rows in plan.files.items() for row in rows}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomic(folder / INDEX, json.dumps(index, indent=2).encode())


def _fingerprint(reader: CheckpointReader, plan: Plan) -> str:
    """Changes when another checkpoint, or the same one otherwise, is to be written."""
    stored = sorted((name, file.xxh3) for name, file in reader.manifest.files.items())
    files = {
        name: [(*row.ours, row.theirs, row.transform.name, plan.shape(row)) for row in rows]
        for name, rows in plan.files.items()
    }
    return xxhash.xxh3_64_hexdigest(json.dumps([stored, plan.dtype, files]).encode())


def _finished_files(folder: Location, fingerprint: str) -> dict[str, dict]:
    """The files of the same plan that are complete in `folder`, by name."""
    if not exists(folder / PROGRESS):
        return {}
    try:
        body = json.loads(read_file(folder / PROGRESS, LIMITS.checkpoint_json))
        if body["plan"] != fingerprint:
            return {}
        return {
            name: entry
            for name, entry in dict(body["files"]).items()
            if exists(folder / name) and hash_file(folder / name).xxh3 == entry["xxh3"]
        }
    except (ValueError, KeyError, TypeError):
        return {}  # written by something else: begin again
