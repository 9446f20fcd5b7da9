"""Part 6: the sLSTM's time for each step, by graphs and launched from Python.

Beside them stands the forward pass as one graph of all its launches, which copies nothing, and the
persistent form with its distance to the others.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from benchmarks.gpu_proof.setting import Setting
from benchmarks.kernels_gpu import forward_backward, slstm_inputs, time_call, time_ms
from xlstm_kernels import slstm_scan
from xlstm_kernels.common.launch_graph import without_graphs


def rows(setting: Setting) -> Iterator[dict]:
    """One row for each head dimension."""
    steps = setting.pick(512, 6)
    for d in (64, 192, 256, 512):
        size = (8, 4, steps, setting.pick(d, 8))
        inputs = slstm_inputs(size, torch.bfloat16, setting.device)

        def scan(*x: torch.Tensor) -> torch.Tensor:
            return slstm_scan(*x, backend=setting.backend)

        def persistent(*x: torch.Tensor) -> torch.Tensor:
            return slstm_scan(*x, backend="persistent")

        row: dict = {"name": f"head dimension {d}"}
        for form, mode in (("", nullcontext), ("_launched", without_graphs)):
            with mode():
                times = time_call(scan, inputs, setting.device)
            row |= {
                f"us_per_step_{k[:-3]}{form}": 1e3 * times[k]["median"] / steps
                for k in times
                if k.endswith("_ms")
            }
        if not setting.dry:
            row["us_per_step_fw_one_graph"] = 1e3 * _graph_ms(scan, inputs) / steps
            # Last: its programs wait for each other, and it has never run.
            yield row
            expected = forward_backward(scan, inputs)
            got = forward_backward(persistent, inputs)
            times = time_call(persistent, inputs, setting.device)
            errors = [
                ((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)
            ]
            row = {"name": f"head dimension {d}, persistent", "worst": max(errors)}
            row |= {
                f"us_per_step_{k[:-3]}": 1e3 * times[k]["median"] / steps
                for k in times
                if k.endswith("_ms")
            }
        yield row


def _graph_ms(function, inputs: list[torch.Tensor]) -> float:
    """Median ms of a graph of the forward pass; nan where it cannot be captured."""
    plain = [x.detach() for x in inputs]
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            function(*plain)
        return time_ms(graph.replay, "cuda")["median"]
    except RuntimeError:
        return float("nan")
