"""What a preflight found, as nodes to leave out: a pure function of the reports of its ranks.

    python -m slurm.job.health FOLDER NODE ...

prints it for a preflight that is a job of its own.

Each rank of `slurm.job.preflight` keeps one file, which it replaces *before* every check. So the
file of a node that hangs or dies says in which check it did, and a node without a file never
answered. The report is made whatever became of the ranks.
"""

import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm import scheduler
from slurm.job.state import HEALTH_FILE, RunState, write
from xlstm_io.errors import ExitCode

FOLDER = "preflight"
MEETING = ("rendezvous", "links")  # checks that need the other nodes
SLOW = 0.15  # a device this much below the median of all is slow


@dataclass(frozen=True)
class Health:
    """What a node must be like; the section `health` of the site file.

    Attributes:
        command: a command that must succeed on every node, or None.
        min_gemm_tflops: speed of a matrix product, or None.
        min_allreduce_gbs: gigabytes per second of an all-reduce between two nodes, or None.
        max_clock_skew_s: seconds by which a clock may differ from the others.
        min_free_run_gb: free gigabytes where the run lies.
        min_free_scratch_gb: free gigabytes on the node's own disk, where there is one.
        devices: GPUs of a node; 0 for none.
        scratch: the node's own disk, or None.
    """

    command: str | None = None
    min_gemm_tflops: float | None = None
    min_allreduce_gbs: float | None = None
    max_clock_skew_s: float = 2.0
    min_free_run_gb: float = 50.0
    min_free_scratch_gb: float = 20.0
    devices: int = 0
    scratch: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What follows a preflight.

    Attributes:
        bad_nodes: nodes to leave out, with the reason.
        failed: why the run cannot start on any nodes, or "".
        cut_short: whether Slurm ended the preflight, which says nothing about the nodes.
    """

    bad_nodes: dict[str, str]
    failed: str = ""
    cut_short: bool = False

    @property
    def fit(self) -> bool:
        """Whether the run may start on these nodes."""
        return not (self.bad_nodes or self.failed or self.cut_short)


def judge_folder(folder: Path, nodes: Sequence[str], notes: Sequence[str] = ()) -> Verdict:
    """Judge the reports in a folder, and write `preflight.json` there.

    Args:
        folder: of a life, or of a preflight that is a job of its own; what a node must be like lies
            beside it.
        nodes: that were checked.
        notes: what was found beside the nodes, in sentences.
    """
    limits = Health(**json.loads((folder.parent / HEALTH_FILE).read_bytes()))
    reports = read_reports(folder)
    verdict = judge(reports, nodes, limits)
    found = {"bad_nodes": verdict.bad_nodes, "failed": verdict.failed}
    write(folder / "preflight.json", {**found, "notes": notes, "reports": reports})
    return verdict


def notes_on_cluster(run: Path) -> list[str]:
    """What of this cluster hurts a run, for which no node is to blame, in sentences.

    This asks Slurm, and so runs beside the batch script, outside of any container. Where Slurm does
    not answer there is nothing to say.

    Args:
        run: the run folder.
    """
    try:
        facts = scheduler.facts(os.environ["SLURM_JOB_PARTITION"])
    except scheduler.SlurmError:
        return []
    return scheduler.too_late_to_save(RunState(run).progress().get("save_seconds"), facts)


def read_reports(life_folder: Path) -> list[dict[str, Any]]:
    """The reports of a life's ranks; one that is damaged counts as missing."""
    found = []
    for path in sorted((life_folder / FOLDER).glob("*.json")):
        try:
            found.append(json.loads(path.read_bytes()))
        except (OSError, ValueError):
            continue
    return found


def judge(reports: Sequence[Mapping[str, Any]], nodes: Sequence[str], limits: Health) -> Verdict:
    """Which nodes are bad.

    Args:
        reports: of the ranks, see `slurm.job.preflight`.
        nodes: of the life.
        limits: what a node must be like.
    """
    if any(report["interrupted"] for report in reports):
        return Verdict({}, cut_short=True)
    found = {node: _of_node([r for r in reports if r["node"] == node]) for node in nodes}
    bad = {node: why for node, (check, why) in found.items() if why and check not in MEETING}
    for odd in (_odd_versions(reports), _odd_clocks(reports, limits), _slow_devices(reports)):
        bad = {**odd, **bad}
    checks = {found[node][0] for node in bad}
    if len(bad) == len(nodes) > 1 and len(checks) == 1 and "" not in checks:
        return Verdict({}, f"preflight fails on every node: {bad[nodes[0]]}")
    # Ranks that wait for one that is broken fail too: that is a consequence.
    return Verdict(bad) if bad else _meeting(found, reports, limits)


def _meeting(
    found: Mapping[str, tuple[str, str]], reports: Sequence[Mapping[str, Any]], limits: Health
) -> Verdict:
    """What to say where every node is sound by itself."""
    apart = {node: why for node, (_, why) in found.items() if why}
    if any("EADDRINUSE" in why for why in apart.values()):
        return Verdict({})  # the training finds the same and takes another port
    if len(apart) == len(found) > 1:
        return Verdict({}, f"the ranks do not meet: {next(iter(apart.values()))}")
    return Verdict(apart) if apart else _bad_links(reports, limits)


def _of_node(reports: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The check that a node does not pass and what it says; two empty texts where there is none."""
    if not reports:
        return "answer", "does not answer"
    for report in sorted(reports, key=lambda report: str(report["check"]) in MEETING):
        if report["bad"]:
            return str(report["check"]), str(report["bad"])
    stuck = [str(report["doing"]) for report in reports if not report["done"]]
    stuck.sort(key=lambda check: check in MEETING)
    return (stuck[0], f"did not get beyond the check {stuck[0]}") if stuck else ("", "")


def _odd_versions(reports: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Nodes whose software differs from that of the most."""
    versions = {r["node"]: r["facts"]["versions"] for r in reports if "versions" in r["facts"]}
    counts = Counter(versions.values())
    if len(counts) < 2:
        return {}
    usual = counts.most_common(1)[0][0]
    return {
        node: f"has {mine}, the others {usual}" for node, mine in versions.items() if mine != usual
    }


def _odd_clocks(reports: Sequence[Mapping[str, Any]], limits: Health) -> dict[str, str]:
    """Nodes whose clock differs, read right after a barrier."""
    clocks = {r["node"]: r["facts"]["clock"] for r in reports if "clock" in r["facts"]}
    if len(clocks) < 3:
        return {}  # of two clocks none is wrong
    middle = statistics.median(clocks.values())
    return {
        node: f"its clock differs by {clock - middle:+.1f} s"
        for node, clock in clocks.items()
        if abs(clock - middle) > limits.max_clock_skew_s
    }


def _slow_devices(reports: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Nodes with a device far below the median; on CPUs the load of the moment decides."""
    speeds = [(r["node"], r["facts"]["tflops"]) for r in reports if "device_tflops" in r["facts"]]
    if len(speeds) < 3:
        return {}
    middle = statistics.median(speed for _, speed in speeds)
    return {
        node: f"a device does {speed:.1f} TFLOP/s, the median is {middle:.1f}"
        for node, speed in speeds
        if speed < (1 - SLOW) * middle
    }


def _bad_links(reports: Sequence[Mapping[str, Any]], limits: Health) -> Verdict:
    """Nodes all of whose pairs are slow, while others have a good one."""
    if limits.min_allreduce_gbs is None:
        return Verdict({})
    good: dict[str, list[bool]] = {}
    for report in reports:
        for link in report["facts"].get("links", []):
            good.setdefault(report["node"], []).append(link["gbs"] >= limits.min_allreduce_gbs)
    why = f"all-reduces with other nodes are below {limits.min_allreduce_gbs} GB/s"
    slow = {node: why for node, each in good.items() if not any(each)}
    if slow and len(slow) == len(good):
        return Verdict({}, f"preflight: {why}, on every node")
    return Verdict(slow)


def main(words: Sequence[str]) -> int:
    """Print which nodes are fit; 70 when one is not, or the preflight was cut short."""
    folder, nodes = Path(words[0]), words[1:]
    notes = notes_on_cluster(folder.parents[2])  # RUN/slurm/preflight/JOB
    verdict = judge_folder(folder, nodes, notes)
    for node in nodes:
        print(f"{node}: {verdict.bad_nodes.get(node) or verdict.failed or 'fit'}")
    for note in notes:
        print(f"note: {note}")
    if verdict.cut_short:
        print("the preflight was cut short")
        return ExitCode.MACHINE_FAILED
    print(f"measured: {folder / 'preflight.json'}")
    return ExitCode.DONE if verdict.fit else ExitCode.MACHINE_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
