"""How much of a run's time goes into steps that count, and the best interval of checkpoints.

    python -m benchmarks.large_runs.goodput [--gpus 1024 16384] [--detect 1800] ...

The model: nodes fail independently at a constant rate. A life waits in the queue, starts, and
trains until a node fails or its time is over. A checkpoint holds the run up for `--stall` seconds
and is complete `--write` seconds later, so a failure costs the steps since the newest complete one,
the time until somebody notices, and the next start. A planned end saves first. Beside the closed
form stands a simulation of 60 days.
"""

import argparse
import math
import random

DAY_S = 86400.0


def goodput(options, nodes, interval):
    """Share of the time in steps that count, in closed form.

    Args:
        options: the times, see `parser`.
        nodes: of the run.
        interval: steps between checkpoints.
    """
    cycle = interval * options.step + options.stall
    failures = nodes * options.rate / DAY_S
    dead = options.detect + options.wait + options.start
    lost = failures * (cycle / 2 + options.write + dead)
    if lost >= 1:
        return 0.0
    planned = (options.wait + options.start + options.stall + options.write) / options.limit
    return interval * options.step / cycle * (1 - lost / (1 + failures * dead)) * (1 - planned)


def simulate(options, nodes, interval, *, days=60, seed=0):
    """The same share by drawing the failures."""
    draw = random.Random(seed)
    failures = nodes * options.rate / DAY_S
    cycle = interval * options.step + options.stall
    now = useful = 0.0
    while now < days * DAY_S:
        now += options.start
        failure, end = draw.expovariate(failures), options.limit - options.start
        if failure < end:
            complete = int(max(0.0, failure - options.write) // cycle)
            useful += complete * interval * options.step
            now += failure + options.detect + options.wait
        else:
            useful += (end - options.write - options.stall) * interval * options.step / cycle
            now += end + options.wait
    return useful / now


def best_interval(options, nodes):
    """Steps between checkpoints that cost least; a save ends before the next begins."""
    steps = sorted({max(1, round(1.15**power)) for power in range(80)})
    possible = [n for n in steps if options.write <= n * options.step <= DAY_S]
    return max(possible, key=lambda interval: goodput(options, nodes, interval))


def parser():
    """The times of a run, in seconds."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.large_runs.goodput", description=__doc__
    )
    found.add_argument("--gpus", type=int, nargs="+", default=[1024, 4096, 16384])
    found.add_argument("--gpus-per-node", type=int, default=8)
    found.add_argument("--rate", type=float, default=6.5e-3, help="failures per node and day")
    found.add_argument("--step", type=float, default=5.0)
    found.add_argument("--stall", type=float, default=1.0, help="training waits for a checkpoint")
    found.add_argument("--write", type=float, default=30.0, help="until it is complete")
    found.add_argument("--detect", type=float, default=60.0, help="until a failure is noticed")
    found.add_argument("--wait", type=float, default=120.0, help="in the queue")
    found.add_argument("--start", type=float, default=180.0, help="imports, rendezvous, loading")
    found.add_argument("--limit", type=float, default=DAY_S, help="time limit of a job")
    return found


def main(words=None):
    options = parser().parse_args(words)
    print(f"{'GPUs':>6} {'best':>6} {'min':>5} {'goodput':>8} {'drawn':>6}   at 1/4, 4, 16 times")
    for gpus in options.gpus:
        nodes = math.ceil(gpus / options.gpus_per_node)
        best = best_interval(options, nodes)
        drawn = sum(simulate(options, nodes, best, seed=seed) for seed in range(8)) / 8
        others = [goodput(options, nodes, max(1, round(best * by))) for by in (0.25, 4, 16)]
        print(
            f"{gpus:>6} {best:>6} {best * options.step / 60:>5.1f} "
            f"{goodput(options, nodes, best):>8.3f} {drawn:>6.3f}   "
            + " ".join(f"{share:.3f}" for share in others)
        )


if __name__ == "__main__":
    main()
