"""A CUDA graph that records launches and runs them again in Triton's interpreter.

It stands in the place of torch's, with the functions of `torch.cuda` that a capture takes. It is as
strict as a GPU: inside a capture no operator of torch runs, and no kernel that was never launched
before, which would be compiled there.
"""

import contextlib
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xlstm_kernels.common import launch_graph
from xlstm_kernels.common.triton_launch import Launch


class NoOperators(TorchDispatchMode):
    """Raises at every operator of torch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise RuntimeError(f"operation not permitted when stream is capturing: {func}")


class FakeCuda:
    """What the tests see of the device.

    Attributes:
        graphs: Those that were made, in order.
        capturing: The graph that is being captured, or None.
        compiled: Kernels that were launched, with the values that they are compiled for.
        single: Launches outside of graphs.
        stream: Handle of the current stream.
        fails: What the next capture raises at its end, or None.
    """

    def __init__(self, monkeypatch):
        self.graphs, self.capturing, self.compiled = [], None, set()
        self.single, self.stream, self.fails = 0, 7, None
        cuda, run = self, Launch.run

        class Graph:
            def __init__(self):
                self.launches, self.replays, self.freed = [], 0, False
                cuda.graphs.append(self)

            def replay(self):
                assert not self.freed and not cuda.capturing
                self.replays += 1
                for launch in self.launches:
                    run(launch)

            def reset(self):
                self.freed, self.launches = True, []

        @contextlib.contextmanager
        def graph(one, *, capture_error_mode):
            assert capture_error_mode == "thread_local"
            cuda.capturing = one
            try:
                with NoOperators():
                    yield
            finally:
                cuda.capturing = None
            if cuda.fails:
                raise cuda.fails

        def recorded(launch):
            compiled_for = (
                launch.kernel,
                *((name, value) for name, value in launch.arguments.items() if name.isupper()),
            )
            if self.capturing is None:
                self.single += 1
                self.compiled.add(compiled_for)
                run(launch)
            elif compiled_for not in self.compiled:
                raise RuntimeError("operation not permitted when stream is capturing: compiler")
            else:
                self.capturing.launches.append(launch)

        replaced = {
            "CUDAGraph": Graph,
            "graph": graph,
            "device": lambda device: contextlib.nullcontext(),
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda device: None,
            "current_stream": lambda device=None: SimpleNamespace(cuda_stream=self.stream),
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(Launch, "run", recorded)
        monkeypatch.setattr(
            launch_graph,
            "can_capture",
            lambda device: launch_graph._allowed and self.capturing is None,
        )
