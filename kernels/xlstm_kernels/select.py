"""Choice of a backend for a kernel call.

A backend is an implementation of one public function. ``"torch"`` runs on every device and
dtype; it is the twin that others are tested against.
"""

BACKENDS = {
    "mlstm_chunkwise": ("torch",),
    "mlstm_step": ("torch",),
    "slstm_scan": ("torch",),
    "slstm_step": ("torch",),
}


def select_backend(kernel: str, backend: str | None) -> str:
    """Name of the backend that runs `kernel`: the requested one, or the best one that exists.

    Raises ValueError if `backend` names something that `kernel` does not have; the message lists
    what exists.
    """
    available = BACKENDS[kernel]
    if backend is None:
        return available[0]
    if backend not in available:
        raise ValueError(
            f"backend={backend!r} does not exist for {kernel}; "
            f"use one of {', '.join(map(repr, available))}, or None for the best one"
        )
    return backend
