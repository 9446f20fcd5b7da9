"""Finding and loading checkpoints, agreed by all ranks; `xlstm_io.checkpoint.reader` reads them."""

from collections.abc import Iterator, Sequence

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
    ranks = ranks or Ranks()

    def read() -> None:
        try:
            with CheckpointReader(path, check_files=ranks.is_first) as reader:
                for part in slices:
                    if part.tensor.numel():
                        reader.read_into(part)
        except OSError as error:
            if is_unreadable(error):  # a bad sector, a file of another user: an older one may do
                raise CheckpointDamagedError(f"{path} cannot be read: {error}") from error
            raise
        mine.append(reader.manifest)

    mine: list[Manifest] = []
    ranks.together(f"loading the checkpoint {path}", read)
    return mine[0]


class Candidates:
    """The checkpoints that a run may continue from, newest first; the same on every rank.

    Broken ones are named in a warning and passed over, attempts that were cut short too. Only the
    newest is looked for at once. The ranks go through the others together, and each is looked for
    when they come to it.

    Args:
        root: A run folder or its folder of checkpoints.
        ranks: Who looks together (default: all; without torch.distributed: this process).

    Raises:
        CheckpointError: There are checkpoints, but each is broken. A run must not start anew by
            accident.
    """

    def __init__(self, root: Location | str, ranks: Ranks | None = None) -> None:
        self._root, self._ranks = root, ranks or Ranks()
        self._broken: list[CheckpointError] = []
        self._search = newest_first(root, self._broken)  # it moves on the first rank alone
        self._found: list[Location] = []
        self._complete = False
        self._look()

    def __bool__(self) -> bool:
        return bool(self._found)

    def __iter__(self) -> Iterator[Location]:
        number = 0
        while number < len(self._found) or self._look():
            yield self._found[number]
            number += 1

    def _look(self) -> bool:
        """Whether there is one more."""
        if not self._complete:
            path = self._ranks.first(f"looking for checkpoints in {self._root}", self._next)
            if path is not None:
                self._found.append(path)
                return True
            self._complete = True
        return False

    def _next(self) -> Location | None:
        path = next(self._search, None)
        broken = self._broken
        if path is None and not self._found:
            if any(not isinstance(problem, UnfinishedError) for problem in broken):
                raise CheckpointError(
                    "none of the checkpoints there is sound; move them away to start anew:\n  "
                    + "\n  ".join(map(str, broken))
                )
        name_broken(broken)
        broken.clear()
        return path


def read_manifest_together(path: Location, *, ranks: Ranks) -> Manifest:
    """`read_manifest` on the first rank; every rank gets its result, or its error."""
    return ranks.first(f"reading {path}", lambda: parse_manifest(path))


def read_evaluation_together(
    path: Location, manifest: Manifest, *, ranks: Ranks
) -> Evaluation | None:
    """`read_evaluation` on the first rank; every rank gets its result, or its error."""
    return ranks.first(f"reading {path}", lambda: read_evaluation(path, manifest))
