"""Write a checkpoint as a Hugging Face folder that transformers loads.

Models of `M` blocks become transformers' own `xlstm`, models of `*` blocks become `llama`, and what
these two cannot express becomes this project's class, whose code travels with the weights
(`xlstm_mcore.convert.families`).
"""

import json
import math
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from transformers import GenerationConfig

import xlstm_mcore.hf
from xlstm_io.checkpoint.manifest import is_weight, resolve
from xlstm_io.checkpoint.reader import CheckpointReader
from xlstm_io.checkpoint.tokenizer import tokenizer_of
from xlstm_io.storage import Location, location
from xlstm_io.tokenizer import Tokenizer
from xlstm_io.tokenizer.symbols import SymbolsTokenizer
from xlstm_mcore.checked_model import model_of
from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.export.card import NO_BOS, model_card
from xlstm_mcore.convert.export.folder import MARKER, building, check_replaceable, put_files
from xlstm_mcore.convert.export.weights import INDEX, Plan, plan_files, write_weights
from xlstm_mcore.convert.families import choose, custom
from xlstm_mcore.convert.tables import Row, rows
from xlstm_mcore.convert.tokenizer.write import write_tokenizer
from xlstm_mcore.settings import ModelConfig

#: Largest file of weights; a larger model is written into several.
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Export:
    """What is to be written, or was.

    Attributes:
        path: The folder.
        family: The format, a key of `xlstm_mcore.convert.families.FAMILIES`.
        plan: The tensors and their files.
        parameters: Number of parameters in the folder. A tied embedding counts once.
        padding: Parameters of the checkpoint's model that belong to rows of padding and were cut.
        notes: What a user should know about this export, one sentence each.
    """

    path: Location
    family: str
    plan: Plan
    parameters: int
    padding: int
    notes: tuple[str, ...]


def export(
    checkpoint: Location | str,
    out: Location | str,
    *,
    tokenizer: Location | None = None,
    family: str | None = None,
    dtype: str = "fp32",
    shard_bytes: int = SHARD_BYTES,
    keep_padding: bool = False,
    dry_run: bool = False,
) -> Export:
    """Export a checkpoint.

    Args:
        checkpoint: A checkpoint, or a run folder (then its newest complete checkpoint).
        out: The folder to write, local or an fsspec URL. One that exists is replaced only if it is
            empty or an earlier export.
        tokenizer: A tokenizer's file or folder; by default the one in the checkpoint.
        family: The format to write; by default the first that can express the model.
        dtype: Type of the weights, "fp32", "bf16" or "fp16".
        shard_bytes: Largest file of weights.
        keep_padding: Whether to keep the rows of the vocabulary that have no token.
        dry_run: Check everything and write nothing.

    Raises:
        ConvertError: The family cannot express the model, or `out` holds something else.
        CheckpointError: The checkpoint is not sound, or its tokenizer is missing or another one.
        TokenizerFileError: The tokenizer cannot be opened.
    """
    out = location(out)
    out = out.absolute() if isinstance(out, Path) else out
    check_replaceable(out)
    with CheckpointReader(resolve(checkpoint)) as reader:
        model = model_of(reader.manifest, reader.path)
        found = _find_tokenizer(reader.path, tokenizer, model.vocab_size)
        vocab = model.vocab_size if keep_padding else found.vocab_size
        chosen = choose(with_rows(model, vocab), family)
        plan = plan_files(check_tensors(reader, chosen, model), vocab, dtype, shard_bytes)
        parameters = sum(math.prod(plan.shape(row)) for row in plan.rows)
        padding = sum(math.prod(row.shape) for row in plan.rows) - parameters
        done = Export(out, chosen.NAME, plan, parameters, padding, ())
        if dry_run:
            return done
        with tempfile.TemporaryDirectory() as small, building(out) as folder:
            notes = _write_small_files(Path(small), reader, model, chosen, found, done)
            write_weights(reader, plan, folder)
            written = {*plan.files, INDEX} if len(plan.files) > 1 else set(plan.files)
            put_files(Path(small), folder, keep=written)
    return replace(done, notes=tuple(notes))


def with_rows(model: ModelConfig, vocab: int) -> ModelConfig:
    """The model with the first `vocab` rows of its vocabulary.

    Its `vocab_tokens` is None where none of these rows is padding.
    """
    tokens = model.vocab_tokens
    if tokens is not None and tokens >= vocab:
        tokens = None
    return model.model_copy(update={"vocab_size": vocab, "vocab_tokens": tokens})


def check_tensors(reader: CheckpointReader, family: ModuleType, model: ModelConfig) -> list[Row]:
    """The tensors of a model in a family's format, all of which the checkpoint has.

    Raises:
        ConvertError: A tensor has another shape, or there are weights that the table lacks.
        CheckpointError: A tensor is missing.
    """
    found = list(rows(family.TABLE, model))
    for row in found:
        for name, shape in zip(row.ours, row.shapes, strict=True):
            stored = reader.info(name).shape
            if stored != shape:
                raise ConvertError(
                    f"{name}: the checkpoint has {list(stored)}, its config makes {list(shape)}"
                )
    known = {name for row in found for name in row.ours}
    unknown = sorted({name for name in reader.manifest.tensors if is_weight(name)} - known)
    if unknown:
        raise ConvertError(f"weights that {family.NAME} has no place for: {unknown}")
    return found


def _find_tokenizer(path: Location, given: Location | None, vocab: int) -> Tokenizer:
    """The tokenizer to ship; ConvertError if the model is too small for it."""
    tokenizer = tokenizer_of(path, given)
    if isinstance(tokenizer, SymbolsTokenizer):
        raise ConvertError(
            f"{path} was trained on the symbols of a synthetic task, which no Hugging Face "
            "tokenizer knows; read it with `python -m pretrain generate` or `load_model`"
        )
    if tokenizer.vocab_size > vocab:
        raise ConvertError(
            f"{tokenizer.path} has {tokenizer.vocab_size} ids, the model only "
            f"model.vocab_size={vocab}"
        )
    return tokenizer


def _write_small_files(
    folder: Path,
    reader: CheckpointReader,
    model: ModelConfig,
    family: ModuleType,
    tokenizer: Tokenizer,
    done: Export,
) -> list[str]:
    """All files but the weights; what a user should know about this export."""
    names, exported = ("bos", "eos", "pad"), with_rows(model, done.plan.vocab)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in names}
    stored = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[done.plan.dtype]
    config = {
        **family.config(exported),
        "vocab_size": done.plan.vocab,
        # transformers' own xLSTM kernels are exact in fp32 alone, so they load as fp32.
        "dtype": "float32" if family.NAME == "xlstm" else stored,
        **ids,
    }
    if family.NAME == "llama":  # llama reads no more of it than a default of generation
        config["max_position_embeddings"] = _seq_len(reader)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    generation = {"do_sample": True, "temperature": 0.8, "top_k": 50, **ids}
    GenerationConfig(**generation).save_pretrained(folder)
    if family is custom:
        source = Path(xlstm_mcore.hf.__file__).parent
        for name in ("configuration_xlstm_blocks.py", "modeling_xlstm_blocks.py"):
            shutil.copyfile(source / name, folder / name)
    written = write_tokenizer(tokenizer, folder)
    manifest = reader.manifest
    provenance = {
        "kind": "xlstm-pretrain export",
        "checkpoint": reader.path.name,
        "step": manifest.step,
        "tokens": manifest.state.get("tokens"),
        "imported": manifest.state.get("imported"),
        "family": family.NAME,
        "dtype": done.plan.dtype,
        "vocab_size": done.plan.vocab,
        "model": model.model_dump(),
        "tokenizer_sha256": tokenizer.sha256,
        "auto_tokenizer": written.auto,
        "bos_id": tokenizer.bos_id,
        "parameters": done.parameters,
        "parameters_of_padding": done.padding,
        "written_by": manifest.versions,
    }
    (folder / MARKER).write_text(json.dumps(provenance, indent=2), encoding="utf-8")
    notes = [*written.notes] if written.bos_first else [*written.notes, NO_BOS]
    if done.padding:
        notes.append(
            f"The last {model.vocab_size - done.plan.vocab} rows of the model's vocabulary have no "
            "token, and the folder does not have them."
        )
    if exported.vocab_tokens is not None:
        spare = exported.vocab_size - exported.vocab_tokens
        notes.append(
            f"The last {spare} rows of the vocabulary have no token and get no logit; "
            "`vocab_tokens` in config.json says so."
        )
    card = model_card(provenance, family, written, [*notes, *family.NOTES])
    (folder / "README.md").write_text(card, encoding="utf-8")
    return notes


def _seq_len(reader: CheckpointReader) -> int:
    """Tokens of a training row by the checkpoint's configuration; imports do not say it."""
    length = (reader.manifest.config.get("data") or {}).get("seq_len")
    return length if isinstance(length, int) else 2048
