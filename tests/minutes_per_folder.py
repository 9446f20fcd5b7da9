"""The minutes that each folder of tests took, beside what it is meant to take.

Printed by `pytest --budget` and never asserted: machines differ by a factor of two. With two jobs
(`make test`) a folder's minutes are those of both, so that all together are twice what passed.
"""

import collections
import os
import time

# Minutes of .ci/run on two quiet cores, by folder of tests; folders that are not there yet are
# those that planned work may fill. All that has no line of its own shares the first one, with what
# .ci/run does before the tests.
SHARED = 18
BUDGET = {
    "tests/faults": 3,
    "tests/slurm": 6,
    "tests/convert": 3,
    "tests/operations": 3,
    "tests/experiments": 2,
    "tests/gpu": 3,
    "tests/trust": 2,
    "tests/rehearsal": 1,
}


class MinutesPerFolder:
    """Pytest plugin: adds up the seconds of every test, its fixtures included."""

    def __init__(self):
        self.seconds = collections.Counter()
        # .ci/run says when it began; alone, pytest counts from here.
        self.began = float(os.environ.get("CI_BEGAN", time.time()))

    def pytest_runtest_logreport(self, report):
        self.seconds["/".join(report.nodeid.split("/")[:2])] += report.duration

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("minutes per folder (budget)")
        for line in table(self.seconds, time.time() - self.began):
            terminalreporter.line(line)


def table(seconds, total):
    """Lines of the table: ``seconds`` by folder, and what everything took from the beginning."""
    lines = [
        f"{folder:24} {seconds[folder] / 60:5.1f}"
        + (f" ({BUDGET[folder]})" if folder in BUDGET else "")
        for folder in sorted(seconds)
    ]
    later = sum(seconds[folder] for folder in BUDGET)
    lines.append(f"{'all without a budget':24} {(total - later) / 60:5.1f} ({SHARED})")
    lines.append(f"{'everything':24} {total / 60:5.1f} ({SHARED + sum(BUDGET.values())})")
    return lines
