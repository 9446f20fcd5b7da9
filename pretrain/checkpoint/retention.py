"""Which checkpoints stay, and the removal of attempts that nobody will finish."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.ranks import RANK_TIMEOUT
from xlstm_io.checkpoint.evaluation import read_evaluation
from xlstm_io.checkpoint.lives import Lives
from xlstm_io.checkpoint.manifest import (
    MANIFEST_NAME,
    check_sizes,
    is_unreadable,
    parse_manifest,
    step_folders,
    step_of_folder,
)
from xlstm_io.errors import CheckpointError
from xlstm_io.storage import Location, exists, files, remove_file, remove_folder

log = logging.getLogger(__name__)

#: An attempt without a manifest in which nothing changed for so long is dead: its ranks would have
#: given up waiting for each other (`RANK_TIMEOUT`) and removed it themselves.
DEAD_AFTER_S = 2 * RANK_TIMEOUT.total_seconds()


@dataclass(frozen=True)
class Retention:
    """What stays: the union of the newest `keep`, every `keep_every`-th step, and the best.

    Attributes:
        keep: How many of the newest checkpoints (by step, then time); None for all.
        keep_every: Checkpoints of steps that this number divides are kept for ever; None for none.
        keep_best: How many of those with the lowest validation loss, measured at their own step. A
            loss is measured before the next checkpoint is saved, or never: so a checkpoint that is
            not the newest and has no loss is not waited for.

    Raises:
        CheckpointError: `keep` is less than 1.
    """

    keep: int | None = None
    keep_every: int | None = None
    keep_best: int = 0

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise CheckpointError(
                f"checkpoint.keep={self.keep} would delete what was just saved; use >= 1"
            )


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint, as retention sees it.

    Attributes:
        path: Its folder.
        step: Its step.
        created: When its manifest was written, in seconds since 1970.
        valid_loss: The validation loss at its step; inf where none was measured.
        finite: Whether the loss of its last step was finite.
        life: The life that wrote it.
    """

    path: Location
    step: int
    created: float
    valid_loss: float = math.inf
    finite: bool = True
    life: int = 0


def to_delete(
    saved: Sequence[Saved], retention: Retention, onset: int | None = None
) -> list[Saved]:
    """The complete checkpoints that are to be deleted.

    Whatever the retention says, two stay: the newest one whose last loss was finite, and the newest
    one from before `onset`.

    Args:
        saved: All complete checkpoints.
        retention: Which ones stay.
        onset: Step at which the loss began to spike, from 1; None where it did not.
    """
    if retention.keep is None:
        return []
    stay, every = in_place(saved, retention, onset), retention.keep_every
    newest = sorted(saved, key=_order, reverse=True)
    return [s for s in newest if s.path not in stay and not (every and s.step % every == 0)]


def in_place(
    saved: Sequence[Saved], retention: Retention, onset: int | None = None
) -> set[Location]:
    """The checkpoints in whose favour others are deleted; see `to_delete`."""
    newest = sorted(saved, key=_order, reverse=True)
    measured = [s for s in newest if s.valid_loss < math.inf]
    best = sorted(measured, key=lambda s: s.valid_loss)  # of equals the newest
    places = [*newest[: retention.keep], *best[: retention.keep_best]]
    places += [s for s in newest if s.finite][:1]
    if onset is not None:
        places += [s for s in newest if s.step < onset][:1]
    return {s.path for s in places}


def _order(saved: Saved) -> tuple[int, float]:
    return saved.step, saved.created


#: What was read of sound checkpoints, each with a hash of its folder's listing then: of all names,
#: sizes and times. Under the same listing nothing has to be read again.
Known = dict[Location, tuple[int, Saved]]


def apply_retention(
    folder: Location,
    retention: Retention,
    just_saved: Location,
    damaged: Collection[Location] = (),
    onset: int | None = None,
    known: Known | None = None,
) -> None:
    """Delete what `to_delete` says, and then dead attempts. One process calls it.

    Nothing here fails a run: what cannot be deleted is named in a warning. The manifest is deleted
    first, so that a deletion that is interrupted leaves nothing that looks complete; the rest is
    then a dead attempt like any other. Damaged checkpoints and superseded
    ones do not count, and are left for a person to look at.

    Args:
        folder: The folder of the checkpoints.
        retention: Which ones stay.
        just_saved: A checkpoint that is never deleted.
        damaged: Checkpoints that the caller knows to be damaged. Those with a file of the wrong
            size are found here.
        onset: See `to_delete`.
        known: What earlier calls read, for the next one. It is looked at again where it decides:
            what is to be deleted, and in whose favour. What stays for ever costs no request.
    """
    known = {} if known is None else known
    try:
        found = [path for path in step_folders(folder) if path not in damaged]
        old, attempts = _decide(found, Lives(folder), retention, onset, known)
        for one in old:
            # If the run went back to an earlier step, that is what it wants now.
            if one.path != just_saved:
                del known[one.path]
                _delete(one.path)
        # By the file system's own clock; storage that lists late may not show it yet.
        listed = files(just_saved) if attempts else {}
        now = listed[MANIFEST_NAME][1] if MANIFEST_NAME in listed else -math.inf
        for path in attempts:
            if now - _last_change(path) > DEAD_AFTER_S and not exists(path / MANIFEST_NAME):
                log.warning("removing %s, which nobody has written to for hours", path)
                _delete(path)
    except (OSError, CheckpointError) as error:
        log.warning("could not clean up in %s: %s", folder, error)


def _decide(
    found: Sequence[Location],
    lives: Lives,
    retention: Retention,
    onset: int | None,
    known: Known,
) -> tuple[list[Saved], list[Location]]:
    """The checkpoints that are to be deleted, and the attempts."""
    for gone in known.keys() - set(found):
        del known[gone]
    seen = set(found) - known.keys()
    attempts = [path for path in found if path in seen and _look_at(path, retention, known)]
    while True:
        # What nobody will load takes no place, and is left for a person.
        saved = [s for _, s in known.values() if not lives.superseded_by(s.life, s.step)]
        old = to_delete(saved, retention, onset)
        decide = {s.path for s in old} | in_place(saved, retention, onset) if old else set()
        if not decide - seen:
            return old, attempts
        for path in decide - seen:
            _look_at(path, retention, known)
        seen |= decide


def _look_at(path: Location, retention: Retention, known: Known) -> bool:
    """Note in `known` what a folder is now, and return whether it is an attempt."""
    before = known.pop(path, None)
    try:
        listed = files(path)
        if MANIFEST_NAME not in listed:
            return True
        listing = hash(frozenset(listed.items()))
        if before is None or before[0] != listing:
            # Where all stay, nothing has to be known of one.
            unread = Saved(path, step_of_folder(path), 0.0)
            about = unread if retention.keep is None else _about(path, listed)
            before = listing, about
        known[path] = before
    except CheckpointError:
        # Damaged, or of another version of the format, whose program will read it: it takes no
        # place.
        pass
    except OSError as error:
        if not is_unreadable(error):
            raise
        log.warning("%s cannot be read, and stays: %s", path, error)
    return False


def _about(path: Location, listed: Mapping[str, tuple[int, float]]) -> Saved:
    """A sound checkpoint, from its files."""
    manifest = parse_manifest(path, check_files=False)
    check_sizes(path, manifest.files, {name: size for name, (size, _) in listed.items()})
    measured = read_evaluation(path, manifest)
    loss = measured.loss if measured is not None and math.isfinite(measured.loss) else math.inf
    finite = manifest.state.get("loss", 0.0) is not None
    life = int(manifest.state.get("life", 0))
    return Saved(path, manifest.step, manifest.created, loss, finite, life)


def _last_change(path: Location) -> float:
    """When something in the attempt was last written."""
    times = [changed for _, changed in files(path).values()]
    if isinstance(path, Path):
        times.append(path.stat().st_mtime)
    return max(times, default=math.inf)


def _delete(path: Location) -> None:
    try:
        if isinstance(path, Path) and path.is_symlink():
            path.unlink()  # what somebody has moved elsewhere, and linked to here, stays there
            return
        if exists(path / MANIFEST_NAME):
            remove_file(path / MANIFEST_NAME)
        remove_folder(path)
    except OSError as error:
        log.warning("could not delete the old checkpoint %s: %s", path, error)
