"""What becomes of every tensor of a foreign file: matched with the table of its family.

Nothing is written here, and no weights are read but those of embedding and output layer.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import xxhash

from xlstm_io.checkpoint.manifest import TensorInfo
from xlstm_io.checkpoint.safetensors_stream import bytes_of
from xlstm_io.foreign.yaml_file import YAMLTextError, parse_yaml
from xlstm_io.storage import Location
from xlstm_io.tensor_files import TensorFiles, open_tensors, read_json_file
from xlstm_io.terminal import one_line
from xlstm_mcore.checked_model import LARGEST, checked_model
from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.families import FAMILIES, nxai_classic, nxai_large
from xlstm_mcore.convert.imports.config import ForeignConfig
from xlstm_mcore.convert.tables import Row, rows
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.parameters import count_parameters

CONFIG_NAME = "config.json"

#: Buffers that files may hold; the model computes them.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|causal_mask)$")
_SHOWN = 8  # problems in a message


@dataclass(frozen=True)
class Foreign:
    """A model of somebody else.

    Attributes:
        tensors: Its tensors.
        config: Its configuration, empty for a bare state dict.
        family: Its format, a module of `xlstm_mcore.convert.families`.
    """

    tensors: TensorFiles
    config: ForeignConfig
    family: ModuleType


@dataclass(frozen=True)
class Plan:
    """Every tensor of theirs with its place in our model.

    Attributes:
        family: Name of the format.
        model: The model.
        rows: The tensors that the model has.
        found: Shape and dtype of what is there, by their names.
        left_over: Tensors that the model has no place for.
        rows_added: Rows of zeros below the vocabulary of theirs.
    """

    family: str
    model: ModelConfig
    rows: tuple[Row, ...]
    found: Mapping[str, TensorInfo]
    left_over: tuple[str, ...]
    rows_added: int

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return count_parameters(self.model)["total"]

    def status(self, row: Row) -> str:
        """`ok`, `missing`, or what is wrong with a tensor of theirs."""
        if row.theirs not in self.found:
            return "missing"
        info = self.found[row.theirs]
        if info.shape != row.shape:
            return f"has shape {list(info.shape)}"
        return "ok" if info.dtype.is_floating_point else f"is {_word(info.dtype)}"

    @property
    def problems(self) -> list[str]:
        """A line for each tensor that is missing, wrong or left over."""
        wrong = [
            f"{row.theirs} {list(row.shape)}: {status}"
            for row in self.rows
            if (status := self.status(row)) != "ok"
        ]
        return wrong + [
            f"{one_line(name)}: left over, the model has no place for it" for name in self.left_over
        ]

    def check(self) -> None:
        """Raise ConvertError unless every tensor has its place."""
        problems = self.problems
        if problems:
            more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise ConvertError(
                f"the tensors are not those of this {self.family} model; --dry-run lists all:\n  "
                + "\n  ".join(problems[:_SHOWN])
                + more
            )

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "family": self.family,
            "model": self.model.model_dump(mode="json"),
            "parameters": self.parameters,
            "tensors": [
                {
                    "theirs": row.theirs,
                    "shape": list(row.shape),
                    "dtype": _word(self.found[row.theirs].dtype)
                    if row.theirs in self.found
                    else None,
                    "transform": row.transform.name,
                    "ours": list(row.ours),
                    "status": self.status(row),
                }
                for row in self.rows
            ],
            "left_over": list(self.left_over),
        }

    def as_text(self) -> str:
        """All of it, as a table for a person."""
        lines = []
        for row in self.rows:
            status = self.status(row)
            note = "" if status == "ok" else f"  <-- {status}"
            lines.append(
                f"{row.theirs:<56} {list(row.shape)!s:<16} {row.transform.name:<10} "
                f"{', '.join(row.ours)}{note}"
            )
        lines += [
            f"{one_line(name):<56} {list(self.found[name].shape)!s:<16} <-- left over"
            for name in self.left_over
        ]
        bad = sum(self.status(row) != "ok" for row in self.rows)
        lines.append(
            f"{self.family}: {self.parameters:,} parameters, {len(self.rows)} tensors, {bad} of "
            f"them missing or wrong, {len(self.left_over)} left over"
        )
        return "\n".join(lines)


def open_hf(folder: Location) -> Foreign:
    """A Hugging Face folder.

    Raises:
        ConvertError: its architecture is not one of `FAMILIES`.
        TensorFileError: a file is missing or not sound.
    """
    file = folder / CONFIG_NAME
    values = read_json_file(file)
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConvertError(
            f"{file}: model_type={str(name)[:60]!r} cannot be imported; {', '.join(FAMILIES)} can"
        )
    return Foreign(open_tensors(folder), ForeignConfig(values, file), FAMILIES[name])


def open_nxai(path: Location) -> Foreign:
    """A state dict of pip `xlstm`, which has no configuration.

    Raises:
        ConvertError: it is neither of its two classes.
        TensorFileError: a file is missing or not sound.
    """
    tensors = open_tensors(path)
    config = ForeignConfig({}, path)
    if any(name.startswith("xlstm_block_stack.") for name in tensors.infos):
        return Foreign(tensors, config, nxai_classic)
    if nxai_large.EMBEDDING in tensors.infos:
        return Foreign(tensors, config, nxai_large)
    tensors.close()
    raise ConvertError(f"{path} is not a state dict of pip xlstm's xLSTMLMModel or xLSTMLarge")


def make_plan(
    foreign: Foreign, *, changes: Mapping[str, Any] | None = None, vocab_size: int | None = None
) -> Plan:
    """Match tensors with the table of their family.

    Args:
        foreign: Their model.
        changes: Keys of the `model:` section that the user sets.
        vocab_size: Rows of the embedding, more than theirs; None for theirs.

    Raises:
        ConvertError: The configuration is not that of a model that we can compute.
    """
    tensors, config, family = foreign.tensors, foreign.config, foreign.family
    found = {n: info for n, info in tensors.infos.items() if not _COMPUTED.search(n)}
    shapes = {name: info.shape for name, info in found.items()}
    section = {**family.model_section(config, shapes), **(changes or {})}
    table = family.table(shapes)
    copies = {table.embedding, table.head}
    if copies <= set(found) and found[table.embedding] == found[table.head]:
        # By hash, so that one of the two largest tensors is in memory at a time.
        hashes = {xxhash.xxh3_128_hexdigest(bytes_of(tensors.read(name))) for name in copies}
        section["tie_embeddings"] = len(hashes) == 1
        if section["tie_embeddings"]:
            del found[table.head]  # the same matrix a second time
    model = checked_model(section, tensors=len(found), source=config.source, error=ConvertError)
    have = tuple(rows(table, model))
    left_over = sorted(set(found) - {row.theirs for row in have})
    vocab = model.vocab_size if vocab_size is None else vocab_size
    if not model.vocab_size <= vocab < LARGEST:
        raise ConvertError(
            f"--vocab-size={vocab} must be at least the {model.vocab_size} rows that there are"
        )
    if vocab > model.vocab_size:  # rows of zeros get no logit
        tokens = model.vocab_tokens or model.vocab_size
        padded = model.model_copy(update={"vocab_size": vocab, "vocab_tokens": tokens})
    else:
        padded = model
    return Plan(family.NAME, padded, have, found, tuple(left_over), vocab - model.vocab_size)


def parse_changes(words: Iterable[str]) -> dict[str, Any]:
    """Keys of the `model:` section from `KEY=VALUE`, as a run file would hold them.

    Raises:
        ConvertError: a word is something else, or there is no such key.
    """
    changes = {}
    for word in words:
        key, sign, value = word.partition("=")
        key = key.removeprefix("model.")
        if not sign or key not in ModelConfig.model_fields:
            raise ConvertError(f"--set {word}: wanted KEY=VALUE with a key of model:")
        try:
            changes[key] = parse_yaml(value)
        except YAMLTextError as error:
            raise ConvertError(f"--set {word}: {error}") from error
    return changes


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
