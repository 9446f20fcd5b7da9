"""Import of a foreign model as a checkpoint at step 0.

The tables of tensors are those of the export, read the other way (`xlstm_mcore.convert.tables`).
One tensor of theirs is in memory at a time, and weights keep their dtype. There is no optimizer
state, so a run starts from such a checkpoint by `init_from`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from xlstm_io.checkpoint.manifest import TensorInfo, newest_first
from xlstm_io.checkpoint.streamed import write_streamed
from xlstm_io.errors import CheckpointError
from xlstm_io.remote import masked
from xlstm_io.storage import Location, exists, is_folder
from xlstm_io.tensor_files import TensorFiles
from xlstm_io.terminal import tell
from xlstm_io.tokenizer import Tokenizer, open_tokenizer
from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.imports.plan import Plan
from xlstm_mcore.convert.tables import Row

NO_OPTIMIZER = "It has no optimizer state; start a run from it with run.init_from."


@dataclass(frozen=True)
class Imported:
    """What was written.

    Attributes:
        path: The checkpoint.
        parameters: Number of parameters.
        notes: What a user should know, one sentence each.
    """

    path: Location
    parameters: int
    notes: tuple[str, ...]


def write(
    plan: Plan,
    tensors: TensorFiles,
    out: Location,
    *,
    source: Location,
    tokenizer: Location | None = None,
) -> Imported:
    """Write the checkpoint of a plan; one that was killed goes on with its next data file.

    Args:
        plan: What becomes of each tensor.
        tensors: Theirs.
        out: A folder for the run, local or an fsspec URL; it must not hold a checkpoint.
        source: Where they come from; its tokenizer is taken along.
        tokenizer: A tokenizer's file or folder, in place of that.

    Raises:
        ConvertError: A tensor has no place, the tokenizer has more ids than the model, or `out`
            holds a checkpoint.
        CheckpointError: The checkpoint cannot be written.
        TensorFileError: A file of theirs changed meanwhile.
        TokenizerFileError: The tokenizer cannot be opened.
    """
    plan.check()
    if exists(out) and not is_folder(out):
        raise ConvertError(f"{out} is a file; choose a folder")
    if is_folder(out) and next(iter(newest_first(out, [])), None) is not None:
        raise ConvertError(f"{out} holds a checkpoint already; choose another folder")
    words = _find_tokenizer(source, tokenizer)
    notes = [NO_OPTIMIZER]
    if words is None:
        notes.append(f"{source} has no tokenizer.model or tokenizer.json; give --tokenizer later.")
    elif words.vocab_size > plan.model.vocab_size:
        raise ConvertError(
            f"{words.path} has {words.vocab_size} ids, the model only {plan.model.vocab_size} "
            "rows; give the right --tokenizer, or more rows with --vocab-size"
        )
    places = {name: (row, part) for row in plan.rows for part, name in enumerate(row.ours)}
    infos = {name: _info(plan, row, part) for name, (row, part) in places.items()}
    with tqdm(total=len(infos), unit="tensor", disable=None) as progress:

        def load(name: str) -> Tensor:
            progress.update()
            row, part = places[name]
            return _ours(plan, row, part, tensors.read(row.theirs))

        def kept(number: int) -> None:
            progress.update(number)
            if number:
                tell(f"an import was stopped here: {number} of {len(infos)} tensors are kept")

        try:
            path = write_streamed(
                out,
                infos,
                load,
                _state(plan, source, words),
                {"model": plan.model.model_dump(mode="json")},
                files=words.files if words else {},
                source=tensors.version(),
                kept=kept,
            )
        except OSError as error:
            raise CheckpointError(f"writing to {out} failed: {error}") from error
    return Imported(path, plan.parameters, tuple(notes))


def _info(plan: Plan, row: Row, part: int) -> TensorInfo:
    """Shape and dtype of a tensor of ours."""
    shape, dtype = row.shapes[part], plan.found[row.theirs].dtype
    if row.has_vocabulary:
        shape = (shape[0] + plan.rows_added, *shape[1:])
    return TensorInfo(shape, dtype if row.transform.exact else _at_least_fp32(dtype))


def _ours(plan: Plan, row: Row, part: int, theirs: Tensor) -> Tensor:
    """A tensor of ours, from the one that it is in."""
    if not row.transform.exact:
        theirs = theirs.to(_at_least_fp32(theirs.dtype))
    ours = row.transform.to_ours(theirs, row.shapes)[part]
    if row.has_vocabulary and plan.rows_added:
        ours = torch.cat([ours, ours.new_zeros(plan.rows_added, ours.shape[1])])
    return ours


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _state(plan: Plan, source: Location, words: Tokenizer | None) -> dict[str, Any]:
    """The training state of a model that this program has not trained."""
    return {
        "step": 0,
        "updates": 0,
        "tokens": 0,
        "seconds": 0.0,
        "valid_loss": None,
        "valid_step": None,
        "tokenizer": {} if words is None else {"sha256": words.sha256},
        "imported": {"from": masked(source.name), "family": plan.family},
    }


def _find_tokenizer(source: Location, given: Location | None) -> Tokenizer | None:
    """The tokenizer that is given, or the one beside the weights; None if there is none."""
    if given is not None:
        return open_tokenizer(given)
    folder = source if is_folder(source) else source.parent
    names = ("tokenizer.model", "tokenizer.json")
    return open_tokenizer(folder) if any(exists(folder / name) for name in names) else None
