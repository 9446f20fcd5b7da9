"""The sLSTM on one CPU thread, forward and backward: this project's backends and a torch loop.

    python -m benchmarks.slstm_cpu

Every implementation runs once in each round, so that a busy machine slows all of them. Times are
medians over rounds, in ms. The loop is written as well as torch allows: autograd, layout
[heads, b, d], one baddbmm for all four gates.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid

from xlstm_kernels import slstm_scan
from xlstm_kernels.common.backends import BACKENDS

LOOP = "torch loop, autograd"


def good_torch_loop(gate_preacts, recurrent_weight, bias):
    """h [b, s, heads, d] by autograd through a loop over time; no states, no boundaries."""
    b, s, _, heads, d = gate_preacts.shape
    x = (gate_preacts + bias).permute(1, 3, 0, 2, 4).reshape(s, heads, b, 4 * d).unbind(0)
    R = recurrent_weight.permute(1, 2, 0, 3).reshape(heads, d, 4 * d)
    h = c = n = x[0].new_zeros(heads, b, d)
    m = torch.full_like(h, -torch.inf)
    hs = []
    for preacts in x:
        i, f, z, o = torch.baddbmm(preacts, h, R).chunk(4, -1)
        carried = logsigmoid(f) + m
        m = torch.maximum(carried, i).detach()
        write, decay = (i - m).exp(), (carried - m).exp()
        c = decay * c + write * z.tanh()
        n = decay * n + write
        h = o.sigmoid() * c / n
        hs.append(h)
    return torch.stack(hs).permute(2, 0, 1, 3)


def implementations(names):
    """Name and function of each implementation to be timed, the loop first."""
    chosen = {LOOP: good_torch_loop}
    for name in names:
        chosen[name] = lambda *x, name=name: slstm_scan(*x, backend=name)
    return chosen


def make_inputs(b, s, heads, d):
    """Pre-activations, recurrent weight and bias of a usual size, all with gradients."""
    torch.manual_seed(0)
    x = torch.randn(b, s, 4, heads, d)
    x[:, :, 1] += 3
    inputs = [x, torch.randn(4, heads, d, d) * d**-0.5, torch.randn(4, heads, d)]
    return [x.requires_grad_() for x in inputs]


def seconds(function, inputs, upstream):
    """Wall and processor seconds of one forward and backward pass."""
    wall, cpu = time.perf_counter(), time.process_time()
    torch.autograd.grad(function(*inputs), inputs, upstream)
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(functions, shape, rounds):
    """Median times and ratios to the loop of one shape, one row for each implementation.

    Times are processor time: with one thread that is the wall time of an idle machine.
    """
    inputs = make_inputs(*shape)
    b, s, heads, d = shape
    upstream = torch.randn(b, s, heads, d)
    first = {name: seconds(f, inputs, upstream)[0] for name, f in functions.items()}
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function, inputs, upstream))
    rows = []
    for name, pairs in times.items():
        ratios = [loop[1] / mine[1] for loop, mine in zip(times[LOOP], pairs, strict=True)]
        rows.append(
            {
                "shape": dict(zip(("b", "s", "heads", "d"), shape, strict=True)),
                "name": name,
                "cpu_ms": 1e3 * statistics.median(cpu for _, cpu in pairs),
                "wall_ms": 1e3 * statistics.median(wall for wall, _ in pairs),
                "first_ms": 1e3 * first[name],
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 64, 128, 192])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = [one.name for one in BACKENDS["slstm_scan"] if one.needs != "triton"]
    functions = implementations(names)
    print(
        f"b {arguments.batch}, {arguments.heads} heads, {arguments.steps} steps, float32, ", end=""
    )
    print(f"forward + backward, {arguments.threads} thread(s), torch {torch.__version__}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; median of", end=" ")
    print(f"{arguments.rounds} rounds; ratio: loop / this, paired by round (lowest..highest)\n")
    print(f"{'d':>4} {'implementation':<22} {'cpu ms':>8} {'wall ms':>8} {'ratio':>6}")
    rows = []
    for d in arguments.dims:
        shape = (arguments.batch, arguments.steps, arguments.heads, d)
        for row in compare(functions, shape, arguments.rounds):
            rows.append(row)
            print(
                f"{d:>4} {row['name']:<22} {row['cpu_ms']:8.1f} {row['wall_ms']:8.1f} "
                f"{row['ratio']:6.2f} ({row['ratio_low']:.2f}..{row['ratio_high']:.2f})"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
