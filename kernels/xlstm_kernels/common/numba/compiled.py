"""How functions become compiled loops, and where these are kept between processes."""

import logging
from pathlib import Path

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile

log = logging.getLogger(__name__)


class BestEffortCache(FunctionCache):
    """Numba's cache on disk, of which no trouble is worth a run: full disks, broken files.

    Processes that start at once may all compile; each file is replaced as a whole, so that none
    reads half of one.
    """

    def __init__(self, function):
        """Keep code as long as no module changes in this folder or in that of `function`.

        Numba alone looks at the file of `function`, and would not see a change of what it calls.
        """
        super().__init__(function)
        folders = Path(__file__).parent, Path(function.__code__.co_filename).parent
        files = [path.stat() for folder in folders for path in sorted(folder.glob("*.py"))]
        self._cache_file = IndexDataCacheFile(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=tuple((file.st_mtime, file.st_size) for file in files),
        )

    def load_overload(self, sig, target_context):
        """The compiled code, or None for compiling anew."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # whatever a broken file does to the unpickler
            self._complain("read", error)

    def save_overload(self, sig, data):
        """Keep compiled code for the next process."""
        try:
            super().save_overload(sig, data)
        except Exception as error:
            self._complain("written", error)

    def _complain(self, what, error):
        log.warning(
            "the cache of compiled loops in %s could not be %s (%s: %s); every start compiles for "
            "some seconds. Delete that folder, or set NUMBA_CACHE_DIR to one that can be written",
            self.cache_path, what, type(error).__name__, error,
        )  # fmt: skip


def compiled(function):
    """`function` compiled at its first call, without the GIL; kept on disk where that can be."""
    dispatcher = njit(nogil=True, error_model="numpy", boundscheck=False)(function)
    try:
        dispatcher._cache = BestEffortCache(function)  # as `njit(cache=True)` does with its own
    except RuntimeError:  # no folder that could be written: neither beside this file nor in $HOME
        log.info("no folder to keep compiled loops in; NUMBA_CACHE_DIR can name one")
    return dispatcher
