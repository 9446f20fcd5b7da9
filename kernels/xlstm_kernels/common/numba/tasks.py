"""Where the compiled loops can run, and running them on several threads. Does not import Numba."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

# The import of Numba takes half a second, which calls on smaller tensors never earn back.
FEWEST_ELEMENTS = 1 << 18
MULTIPLE = 16  # of the length of rows: they are read in vectors of 8 or 16 numbers


def unsupported_reason(
    like: Tensor, *, asked: bool, width: int, elements: int, **facts: object
) -> str | None:
    """Why no loop over rows can run on tensors like this one, with the remedy; None if one can.

    Args:
        like: Has a device and a dtype.
        asked: Whether the caller named this backend. It then runs on small tensors too.
        width: Length of a row, the axis that lies together in memory.
        elements: Number of all elements.
        facts: What other backends decide by.
    """
    if like.device.type != "cpu":
        return f"the compiled loops run on the CPU, not on {like.device.type}; use another backend"
    if like.dtype != torch.float32:
        return f"the compiled loops take float32, not {like.dtype}; convert, or use 'torch'"
    if width % MULTIPLE:
        return f"rows of {width} numbers are not whole vectors of {MULTIPLE}; use 'torch'"
    if elements < FEWEST_ELEMENTS and not asked:
        return f"{elements} elements are too few to load Numba for; use 'torch'"
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "compiled-loops")


def readable(x: Tensor) -> Tensor:
    """`x` in float32 with unit stride last, as the loops read it; copied only if it is not so."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def run_tasks(loop, tasks: int, *arguments) -> None:
    """Call loop(first_task, end_task, *arguments) for all tasks, spread over torch's threads.

    Tensors among the arguments become flat arrays over the memory between their first and last
    element; `loop` knows their strides. This thread takes the last share.
    """
    threads = min(torch.get_num_threads(), tasks)
    arguments = [_flat(x) if isinstance(x, Tensor) else x for x in arguments]
    shares = list(pairwise(tasks * i // threads for i in range(threads + 1)))
    jobs: list[Future] = []
    if threads > 1:
        jobs = [_pool(threads - 1).submit(loop, *share, *arguments) for share in shares[:-1]]
    loop(*shares[-1], *arguments)
    for job in jobs:
        job.result()


def _flat(x: Tensor):
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.detach().as_strided((last + 1,), (1,)).numpy()
