"""Finding and loading checkpoints, agreed by all ranks; `xlstm_io.checkpoint.reader` reads them."""

from collections.abc import Sequence

from pretrain.checkpoint.ranks import Ranks
from xlstm_io.checkpoint.evaluation import Evaluation, read_evaluation
from xlstm_io.checkpoint.manifest import (
    Manifest,
    is_unreadable,
    name_broken,
    newest_first,
    parse_manifest,
)
from xlstm_io.checkpoint.reader import CheckpointReader, TensorSlice
from xlstm_io.errors import CheckpointDamagedError, CheckpointError, UnfinishedError
from xlstm_io.storage import Location


def load_checkpoint(
    path: Location | str, slices: Sequence[TensorSlice], *, ranks: Ranks | None = None
) -> Manifest:
    """Fill the tensors of slices in place from a checkpoint.

    All ranks call it, each with the slices that it needs, whatever layout wrote them. Only floating
    point tensors are converted, and only to another floating point type. The tensors of a
    checkpoint that nobody asks for are not read, so weights alone can be loaded. The hash of every
    byte that is used is compared. Errors are the same on every rank, and some of the tensors may
    have been overwritten by then.

    Args:
        path: The checkpoint's folder.
        slices: What this rank needs.
        ranks: Who loads together (default: all; without torch.distributed: this process).

    Returns:
        The manifest (state, config, step).

    Raises:
        CheckpointDamagedError: The checkpoint is not sound.
        CheckpointError: A tensor is missing or has another shape, or the file system refuses.
    """

    def read() -> None:
        try:
            with CheckpointReader(path) as reader:
                for part in slices:
                    if part.tensor.numel():
                        reader.read_into(part)
        except OSError as error:
            if is_unreadable(error):  # a bad sector, a file of another user: an older one may do
                raise CheckpointDamagedError(f"{path} cannot be read: {error}") from error
            raise
        mine.append(reader.manifest)

    mine: list[Manifest] = []
    (ranks or Ranks()).together(f"loading the checkpoint {path}", read)
    return mine[0]


def candidates_together(root: Location | str, *, ranks: Ranks | None = None) -> list[Location]:
    """The checkpoints that a run may continue from, newest first; the same on every rank.

    Broken ones are named in a warning and passed over, attempts that were cut short too.

    Raises:
        CheckpointError: There are checkpoints, but each is broken. A run must not start anew by
            accident.
    """

    def find() -> list[Location]:
        broken: list[CheckpointError] = []
        found = list(newest_first(root, broken))
        if not found and any(not isinstance(problem, UnfinishedError) for problem in broken):
            raise CheckpointError(
                "none of the checkpoints there is sound; move them away to start anew:\n  "
                + "\n  ".join(map(str, broken))
            )
        name_broken(broken)
        return found

    return (ranks or Ranks()).first(f"looking for checkpoints in {root}", find)


def read_manifest_together(path: Location, *, ranks: Ranks) -> Manifest:
    """`read_manifest` on the first rank; every rank gets its result, or its error."""
    return ranks.first(f"reading {path}", lambda: parse_manifest(path))


def read_evaluation_together(
    path: Location, manifest: Manifest, *, ranks: Ranks
) -> Evaluation | None:
    """`read_evaluation` on the first rank; every rank gets its result, or its error."""
    return ranks.first(f"reading {path}", lambda: read_evaluation(path, manifest))
