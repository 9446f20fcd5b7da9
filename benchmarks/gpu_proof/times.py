"""Part 2: ms of the mLSTM, forward and forward + backward, beside peers on the same inputs."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import kernels_gpu
from benchmarks.gpu_proof.correctness import documents, mlstm_inputs
from benchmarks.gpu_proof.setting import Setting
from xlstm_kernels import mlstm_chunkwise

SHAPES = {
    "TFLA 8192": kernels_gpu.Setting("TFLA 8192", 8, 16, 8192, 128, 256),
    "7B": kernels_gpu.Setting("7B", 1, 8, 8192, 256, 512),
    "125M": kernels_gpu.Setting("125M", 8, 4, 2048, 384, 384),
}
TINY = {"tiny": kernels_gpu.Setting("tiny", 1, 2, 64, 8, 16)}


def rows(setting: Setting) -> Iterator[dict]:
    """Ours as trained, then for each size ours and the peers."""
    for states in (torch.float32, torch.bfloat16):
        inputs = [x.requires_grad_() for x in mlstm_inputs(setting, torch.bfloat16).values()]
        # Made here: a copy from the host in the timed call would make the GPU wait for launches.
        starts = documents(setting, 1, inputs[0].shape[2])

        def trained(*x: Tensor, states: torch.dtype = states, starts: Tensor = starts) -> Tensor:
            options = {"gate_soft_cap": 15.0, "states_dtype": states, "backend": setting.backend}
            return mlstm_chunkwise(*x, boundaries=starts, **options)

        yield _row(f"7B as trained, 2,048 tokens, {states}", trained, inputs, setting)
    for name, size in (TINY if setting.dry else SHAPES).items():
        inputs = kernels_gpu.inputs_of(size, torch.bfloat16, setting.device)
        for title, options in kernels_gpu.OURS.items():

            def ours(*x: Tensor, options: dict = options) -> Tensor:
                return mlstm_chunkwise(*x, backend=setting.backend, **options)

            yield _row(f"{name}: ours, {title}", ours, inputs, setting)
        for title, (function, note) in kernels_gpu.peers(size).items():
            yield _row(f"{name}: {title} ({note})", function, inputs, setting)


def _row(name: str, function: Callable, inputs: list[Tensor], setting: Setting) -> dict:
    try:
        return {"name": name, **kernels_gpu.time_call(function, inputs, setting.device)}
    except Exception as error:  # a peer that fails must not end the part
        return {"name": name, "left_out": f"{type(error).__name__}: {str(error)[:300]}"}
