"""The mLSTM on a CPU, forward and backward, beside a peer: time, memory, errors.

    python -m benchmarks.mlstm_cpu                                  ours, and the peer if it is here
    python -m benchmarks.mlstm_cpu --peer-python ../peers/bin/python    the peer from its own place

The peer is mlstm_kernels of tests/peers.txt: `native_autograd` differentiates its chunkwise form,
`native_custbw` has a backward pass by hand that leaves out the normalizer's gradient (shown as
error). All implementations run in float32 in one process, one after the other in each round, so
that a busy machine slows all of them. Times are medians over rounds. CPU ms are of all threads
together. Peak memory is what a process of its own grew by beyond inputs and code.

Goals: at most 1/2 of the time of native_autograd and 1/1.3 of that of native_custbw.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOALS = {"native_autograd": 2.0, "native_custbw": 1.3}
OURS = "xlstm_kernels"
NAMES = ("h", "dq", "dk", "dv", "di", "df")


def peer_functions(chunk_size: int) -> dict:
    """The peer's native chunkwise functions by name; empty if it is not installed here."""
    try:
        from mlstm_kernels.torch import get_mlstm_kernel
    except ImportError:
        return {}
    return {
        name: partial(get_mlstm_kernel(f"chunkwise--{name}"), chunk_size=chunk_size)
        for name in GOALS
    }


def make_inputs(arguments: argparse.Namespace, dim: int, dtype=None) -> list:
    """q, k, v [b, heads, s, dim] and gate pre-activations [b, heads, s] of a usual size."""
    import torch

    torch.manual_seed(0)
    shape = arguments.batch, arguments.heads, arguments.steps
    inputs = [torch.randn(*shape, dim) for _ in range(3)]
    inputs += [torch.randn(shape), torch.randn(shape) + 3]
    return [x.to(dtype or torch.float32).requires_grad_() for x in inputs]


def gradient_of(inputs: list):
    """A fixed random gradient of the hidden states."""
    import torch

    return torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(1))


def forward_backward(function, inputs: list, d_h) -> list:
    """Hidden states and the gradients of all inputs."""
    import torch

    h = function(*inputs)
    return [h.detach(), *torch.autograd.grad(h, inputs, d_h.to(h.dtype))]


def errors(function, inputs: list, d_h, exact: list) -> dict[str, float]:
    """Largest error of the output and each gradient, as part of its largest value."""
    got = forward_backward(function, inputs, d_h)
    return {
        name: ((x.double() - y).abs().max() / y.abs().max()).item()
        for name, x, y in zip(NAMES, got, exact, strict=True)
    }


def measure_time(arguments: argparse.Namespace, functions: dict, dim: int) -> dict:
    """Medians over rounds of wall and CPU ms, and errors against our float64 result."""
    import torch

    inputs = make_inputs(arguments, dim)
    d_h = gradient_of(inputs)
    exact = forward_backward(functions[OURS], make_inputs(arguments, dim, torch.float64), d_h)
    found = {
        n: {"errors": errors(f, inputs, d_h, exact)} for n, f in functions.items()
    }  # and warm-up
    samples = {name: [] for name in functions}
    for _ in range(arguments.rounds):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            forward_backward(function, inputs, d_h)
            samples[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    for name, pairs in samples.items():
        found[name]["wall_ms"] = 1e3 * statistics.median(wall for wall, _ in pairs)
        found[name]["cpu_ms"] = 1e3 * statistics.median(cpu for _, cpu in pairs)
    return found


def measure_memory(arguments: argparse.Namespace, function, dim: int) -> float:
    """MB that one forward and backward adds to the process at most (Linux)."""
    inputs = make_inputs(arguments, dim)
    d_h = gradient_of(inputs)
    short = [x[:, :, :64].detach().requires_grad_() for x in inputs]
    forward_backward(function, short, d_h[:, :, :64])
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = _memory("VmRSS")
    forward_backward(function, inputs, d_h)
    return _memory("VmHWM") - before


def _memory(field: str) -> float:
    """A field of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def child(arguments: argparse.Namespace) -> dict:
    """What the measuring process returns: times of everything, or memory of one implementation."""
    import torch

    from xlstm_kernels import mlstm_chunkwise

    torch.set_num_threads(arguments.threads)
    functions = {OURS: mlstm_chunkwise} | peer_functions(arguments.peer_chunk)
    if arguments.child == "time":
        about = {"torch": torch.__version__, "implementations": list(functions)}
        return about | {str(d): measure_time(arguments, functions, d) for d in arguments.dims}
    function = functions[arguments.child]
    return {str(d): measure_memory(arguments, function, d) for d in arguments.dims}


def run_child(python: str, what: str) -> dict:
    """Start this file in `python` with the same options; its result."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}
    environment["OMP_NUM_THREADS"] = "1"
    if what != "time":  # freed memory goes back at once, so that the peak is the arrays' own
        environment["MALLOC_MMAP_THRESHOLD_"] = environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
    command = [python, "-m", "benchmarks.mlstm_cpu", *sys.argv[1:], "--child", what]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def report(arguments: argparse.Namespace, data: dict) -> None:
    """Print one table for each head dimension."""
    print(
        f"mLSTM forward + backward, float32, b {arguments.batch}, {arguments.heads} heads, "
        f"{arguments.steps} steps, {arguments.threads} thread(s), torch {data['torch']}; medians "
        f"of {arguments.rounds} rounds; load {data['load_before']:.1f} before and "
        f"{data['load_after']:.1f} after, {os.cpu_count()} cores"
    )
    for dim in map(str, arguments.dims):
        print(
            f"\nD {dim:<18} CPU ms  wall ms  peak MB  ours is            "
            "      largest error: h, gradients"
        )
        for name, one in data[dim].items():
            beside = ""
            if name in GOALS:
                ratio, goal = one["cpu_ms"] / data[dim][OURS]["cpu_ms"], GOALS[name]
                verdict = "met" if ratio >= goal else "MISSED"
                beside = f"{ratio:5.2f}x faster {goal:.1f}x {verdict}"
            worst = max(value for key, value in one["errors"].items() if key != "h")
            print(
                f"{name:<20} {one['cpu_ms']:6.0f}  {one['wall_ms']:7.0f}  {one['peak_mb']:7.0f}  "
                f"{beside:24} {one['errors']['h']:.0e}, {worst:.0e}"
            )
    if len(data["implementations"]) == 1:
        print(
            "\nThe peer is not installed here: python -m venv DIR, DIR/bin/pip install -r "
            "tests/peers.txt,\nthen --peer-python DIR/bin/python"
        )


def main() -> int:
    """Measure in children, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has the peer")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peer-chunk", type=int, default=64, help="the peer's chunk size")
    parser.add_argument("--json", type=Path, default=Path("build/mlstm_cpu.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments)))
        return 0
    if not Path(arguments.peer_python).exists():
        parser.error(f"--peer-python {arguments.peer_python} does not exist; name a Python program")
    load = os.getloadavg()[0]
    data = run_child(arguments.peer_python, "time")
    data |= {"load_before": load, "load_after": os.getloadavg()[0]}
    for name in data["implementations"]:
        peaks = run_child(arguments.peer_python, name)
        for dim in map(str, arguments.dims):
            data[dim][name]["peak_mb"] = peaks[dim]
    report(arguments, data)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
