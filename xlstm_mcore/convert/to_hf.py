"""Write a checkpoint as a Hugging Face folder that transformers loads without further packages.

The folder is built beside its final place and renamed when it is complete. One tensor is in memory
at a time. Weights are written in fp32, because transformers' own (native) xLSTM kernels compute
correctly only then.
"""

import json
import math
import secrets
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, xLSTMConfig

from xlstm_io.checkpoint.manifest import is_weight, resolve
from xlstm_io.checkpoint.reader import CheckpointReader
from xlstm_io.checkpoint.safetensors_stream import TensorHeader, write_safetensors
from xlstm_io.checkpoint.tokenizer import tokenizer_of
from xlstm_io.storage import Location
from xlstm_io.tokenizer import Tokenizer
from xlstm_io.tokenizer.sentencepiece_model import SentencePieceTokenizer
from xlstm_mcore.convert.card import NO_BOS, model_card
from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.names import Dimensions, Row, rows
from xlstm_mcore.convert.tokenizer import SAMPLES, SPACE_SYMBOL_NOTE, fast_tokenizer
from xlstm_mcore.old_keys import current_keys
from xlstm_mcore.parameters.names import EMBEDDING, OUTPUT

#: Marks a folder as an export of ours, which a later export may replace.
MARKER = "xlstm_export.json"
#: Largest file of weights; a larger model is written into several.
MAX_FILE_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: The folder.
        parameters: Number of parameters.
        notes: What a user should know about this export, one sentence each.
    """

    path: Path
    parameters: int
    notes: tuple[str, ...]


def export(
    checkpoint: Path | str,
    out: Path | str,
    *,
    tokenizer: Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Export:
    """Export a checkpoint of a 7B-style model.

    Args:
        checkpoint: A checkpoint, or a run folder (then its newest complete checkpoint).
        out: The folder to write. One that exists is replaced only if it is empty or an earlier
            export.
        tokenizer: A tokenizer's file or folder; by default the one in the checkpoint.
        max_file_bytes: Largest file of weights.

    Raises:
        ConvertError: transformers cannot compute the model, or `out` holds something else.
        CheckpointError: The checkpoint is not sound, or its tokenizer is missing or another one.
        TokenizerFileError: The tokenizer cannot be opened.
    """
    out = Path(out).absolute()
    _check_replaceable(out)
    with CheckpointReader(resolve(checkpoint)) as reader:
        manifest = reader.manifest
        model = current_keys(manifest.config).get("model")
        if not isinstance(model, dict):
            raise ConvertError(f"{reader.path}: its config has no model section")
        check_exportable(model)
        dimensions = _dimensions(reader, model)
        tensors = _check_tensors(reader, dimensions)
        found = _find_tokenizer(reader.path, tokenizer, dimensions.vocab)
        temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir(parents=True)
        try:
            notes = [*_write_tokenizer(found, temporary), *_cache_notes(dimensions)]
            _write_config(
                temporary, model, dimensions, found, use_cache=not _cache_notes(dimensions)
            )
            _write_weights(reader, tensors, temporary, max_file_bytes)
            parameters = sum(math.prod(t.shape) for t in tensors)
            provenance = {
                "kind": "xlstm-pretrain export",
                "checkpoint": reader.path.name,
                "step": manifest.step,
                "tokens": manifest.state.get("tokens"),
                "model": model,
                "tokenizer_sha256": found.sha256,
                "parameters": parameters,
                "written_by": manifest.versions,
            }
            (temporary / "README.md").write_text(model_card(provenance, notes), encoding="utf-8")
            (temporary / MARKER).write_text(json.dumps(provenance, indent=2), encoding="utf-8")
            _move_into_place(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Export(out, parameters, tuple(notes))


def check_exportable(model: dict[str, Any]) -> None:
    """Check that transformers' `xlstm` can compute a model.

    Args:
        model: The `model` section of its configuration.

    Raises:
        ConvertError: It cannot; the message names the key.
    """
    letters = set(model.get("pattern", "").replace("|", ""))
    if letters & {"m", "s"}:
        raise ConvertError(
            "the export of classic blocks (m, s) is not built yet; model.pattern="
            f"{model['pattern']} has them, only patterns of M alone can be exported"
        )
    if letters != {"M"}:
        raise ConvertError(
            f"model.pattern={model.get('pattern')!r} has layers that transformers' xlstm does not "
            "have; only patterns of M alone can be exported"
        )
    for key, wanted in (
        ("norm", "rmsnorm"),
        ("gate_soft_cap", float),
        ("logit_soft_cap", float),
        ("head_norm", "layernorm"),
        ("mlstm_gate", "exp"),
        ("mlstm_normalize", True),
        ("mlstm_input_gate", True),
        ("mlstm_forget_gate", True),
    ):
        value = model.get(key, None if wanted is float else wanted)
        if value != wanted and not (wanted is float and isinstance(value, float | int)):
            rule = "a number" if wanted is float else wanted
            raise ConvertError(
                f"model.{key}={value}: transformers' xlstm always has {rule} here, so this model "
                "cannot be exported exactly"
            )


def _dimensions(reader: CheckpointReader, model: dict[str, Any]) -> Dimensions:
    """Sizes of the model; the inner width of the feed-forward is read from its tensor."""
    hidden = model["hidden_size"]
    return Dimensions(
        layers=len(model["pattern"].replace("|", "")),
        vocab=model["vocab_size"],
        hidden=hidden,
        qk=int(hidden * model["qk_dim_factor"]),
        v=int(hidden * model["v_dim_factor"]),
        heads=model["num_heads"],
        ffn=reader.info("decoder.layers.0.ffn.gate_proj.weight").shape[0],
    )


def _check_tensors(reader: CheckpointReader, dimensions: Dimensions) -> list[Row]:
    """The tensors to write; a tied model's output layer is written as a copy of the embedding.

    Raises:
        ConvertError: A tensor has another shape, or there are weights that the table lacks.
    """
    stored = reader.manifest.tensors
    tensors = []
    for row in rows(dimensions):
        if row.ours == OUTPUT and OUTPUT not in stored:
            row = Row(EMBEDDING, row.theirs, row.shape)
        if reader.info(row.ours).shape != row.shape:
            raise ConvertError(
                f"{row.ours}: the checkpoint has {list(reader.info(row.ours).shape)}, its config "
                f"makes {list(row.shape)}"
            )
        tensors.append(row)
    unknown = sorted({n for n in stored if is_weight(n)} - {row.ours for row in tensors})
    if unknown:
        raise ConvertError(f"weights that transformers' xlstm has no place for: {unknown}")
    return tensors


def _find_tokenizer(path: Location, given: Path | None, vocab: int) -> Tokenizer:
    """The tokenizer to ship; ConvertError if the model is too small for it."""
    tokenizer = tokenizer_of(path, given)
    if tokenizer.vocab_size > vocab:
        raise ConvertError(
            f"{tokenizer.path} has {tokenizer.vocab_size} ids, the model only "
            f"model.vocab_size={vocab}"
        )
    return tokenizer


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Ship the tokenizer's files as they are, with a fast form of a SentencePiece model.

    Returns:
        What a user should know about it.
    """
    for name, data in tokenizer.files.items():
        (folder / name).write_bytes(data)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _write_fast_form(tokenizer, folder)
    return _compare_with_transformers(tokenizer, folder)


def _write_fast_form(tokenizer: SentencePieceTokenizer, folder: Path) -> list[str]:
    """Add the fast form of a SentencePiece model where there is one; what to note about it."""
    try:
        fast_tokenizer(tokenizer).save_pretrained(folder)
    except ConvertError as error:
        return [f"{error}. The folder has tokenizer.model only; encode with sentencepiece.", NO_BOS]
    return [SPACE_SYMBOL_NOTE]


def _compare_with_transformers(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """What to note about a Hugging Face tokenizer as transformers reads it.

    That depends on the version of transformers and on the class that the files name, so the ids
    are compared.
    """
    try:
        auto = AutoTokenizer.from_pretrained(folder)
        for text in SAMPLES:
            ids = auto.encode(text, add_special_tokens=False, split_special_tokens=True)
            if ids != tokenizer.encode([text])[0].tolist():
                raise ConvertError(f"it gives other ids for {text[:60]!r}")
        bos_first = auto.encode("a")[0] == tokenizer.bos_id
    except Exception as error:  # whatever a class of transformers may raise
        return [
            f"AutoTokenizer is not the trained tokenizer ({error}); use tokenizers' own.",
            NO_BOS,
        ]
    notes = [
        "Special tokens spelled out in a text were text in training: split_special_tokens=True."
    ]
    return notes if bos_first else [*notes, NO_BOS]


def _cache_notes(dimensions: Dimensions) -> list[str]:
    """Notes on the cache: transformers rounds its widths up to 64, but not those of layers."""
    if dimensions.qk % 64 == 0 and dimensions.v % 64 == 0:
        return []
    return [
        f"qk width {dimensions.qk} and v width {dimensions.v} are not both multiples of 64, which "
        "transformers' cache needs: use_cache is off."
    ]


def _write_config(
    folder: Path,
    model: dict[str, Any],
    dimensions: Dimensions,
    tokens: Tokenizer,
    use_cache: bool,
) -> None:
    """config.json and generation_config.json, with the kernels that need no further package."""
    factor, multiple = _ffn_rule(model, dimensions)
    names = ("bos", "eos", "pad")
    ids = {f"{name}_token_id": getattr(tokens, f"{name}_id") for name in names}
    xLSTMConfig(
        architectures=["xLSTMForCausalLM"],
        dtype="float32",
        vocab_size=dimensions.vocab,
        hidden_size=dimensions.hidden,
        num_hidden_layers=dimensions.layers,
        num_heads=dimensions.heads,
        # lm_head is always written: transformers' class does not tie even when told to.
        tie_word_embeddings=False,
        norm_eps=model["norm_eps"],
        eps=model["cell_eps"],
        qk_dim_factor=model["qk_dim_factor"],
        v_dim_factor=model["v_dim_factor"],
        ffn_proj_factor=factor,
        ffn_round_up_to_multiple_of=multiple,
        gate_soft_cap=float(model["gate_soft_cap"]),
        output_logit_soft_cap=float(model["logit_soft_cap"]),
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        mode="inference",
        chunk_size=64,
        autocast_kernel_dtype="float32",
        inference_state_dtype="float32",
        weight_mode="single",
        use_cache=use_cache,
        **ids,
    ).save_pretrained(folder)
    GenerationConfig(
        do_sample=True, temperature=0.8, top_k=50, use_cache=use_cache, **ids
    ).save_pretrained(folder)


def _ffn_rule(model: dict[str, Any], dimensions: Dimensions) -> tuple[float, int]:
    """(factor, multiple) from which transformers computes the same feed-forward width."""
    multiple = model.get("round_up_to", 64)
    for factor in (model["ffn_dim_factor"], dimensions.ffn / dimensions.hidden):
        width = int((dimensions.hidden * factor + multiple - 1) // multiple * multiple)
        if width == dimensions.ffn:
            return factor, multiple
    raise ConvertError(
        f"the feed-forward width {dimensions.ffn} is not a multiple of model.round_up_to={multiple}"
    )


def _write_weights(
    reader: CheckpointReader, tensors: list[Row], folder: Path, max_file_bytes: int
) -> None:
    """Stream the tensors into safetensors files, with an index when there are several."""
    source = {row.theirs: row.ours for row in tensors}
    files: list[list[TensorHeader]] = [[]]
    for row in tensors:
        header = TensorHeader(row.theirs, torch.float32, row.shape)
        size = sum(other.num_bytes for other in files[-1])
        if files[-1] and size + header.num_bytes > max_file_bytes:
            files.append([])
        files[-1].append(header)
    weight_map = {}
    with tqdm(total=len(tensors), unit="tensor", disable=None) as progress:

        def tensor_of(header: TensorHeader) -> torch.Tensor:
            progress.update()
            return reader.read(source[header.key], dtype=torch.float32)

        for number, headers in enumerate(files, start=1):
            name = "model.safetensors"
            if len(files) > 1:
                name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
                print(f"writing {name}", file=sys.stderr)
            write_safetensors(folder / name, headers, tensor_of)
            weight_map |= {header.key: name for header in headers}
    if len(files) > 1:
        total = sum(header.num_bytes for headers in files for header in headers)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _check_replaceable(out: Path) -> None:
    """Raise ConvertError if `out` exists and is neither empty nor an earlier export."""
    if out.is_dir() and ((out / MARKER).is_file() or not any(out.iterdir())):
        return
    if out.exists() or out.is_symlink():
        raise ConvertError(
            f"{out} exists and is not an earlier export (it has no {MARKER}); choose another folder"
        )


def _move_into_place(temporary: Path, out: Path) -> None:
    """Rename the folder. An earlier export is renamed first and removed afterwards."""
    _check_replaceable(out)
    if not out.exists():
        temporary.rename(out)
        return
    old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
    out.rename(old)
    try:
        temporary.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)
