"""What follows the end of a life: a pure function of what it left behind.

The table of docs/slurm.md is this module, row by row, and every row is a test. Slurm's own exit
code of the step is not asked: with `--kill-on-bad-exit` it is that of the ranks that were ended,
and the code of the rank that failed is lost.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from slurm.job.state import Life, Policy, RankRecord
from xlstm_io.errors import ExitCode

START_S = 60.0  # a life that ends earlier has not really started
STARTS = 3
PORT_TRIES = 5
LAST_SIGNAL = 64
RECENT = 5  # lives in which a node is looked for
# NVIDIA's Xid numbers after which a GPU needs a reset or a technician: double-bit and contained ECC
# errors, row remapping failures, NVLink errors, a GPU that fell off the bus.
FATAL_XIDS = frozenset({48, 63, 64, 74, 79, 94, 95})


class Cause(StrEnum):
    """Why a life ended."""

    DONE = "done"
    SUPERSEDED = "superseded"
    BAD_INPUT = "bad input"
    DIVERGED = "diverged"
    INTERRUPTED = "interrupted"
    NODE_LOST = "node lost"
    HANG = "hang"
    DEVICE = "device error"
    MACHINE = "machine failed"
    MEMORY = "out of memory"
    PORT = "port in use"
    ERROR = "error"
    PREFLIGHT = "preflight"


class Action(StrEnum):
    """What is done next."""

    DONE = "done"  # the run is complete
    LEAVE = "leave"  # another life decides
    STOP = "stop"  # somebody asked for it
    RETRY = "retry"  # the same life again, on another port
    REQUEUE = "requeue"
    FAIL = "fail"  # no further life starts by itself


@dataclass(frozen=True)
class Evidence:
    """What a life left behind.

    Attributes:
        records: of its ranks.
        finished: whether all steps of the run are done.
        stop_requested: whether a stop without a restart was asked for.
        bad_nodes: what the preflight found, by node.
        unfit: why the preflight found no nodes fit, or "".
        tries: ports that this life has tried.
        slow_nodes: nodes that the trainer has found slow for long.
    """

    records: Sequence[RankRecord] = ()
    finished: bool = False
    stop_requested: bool = False
    bad_nodes: dict[str, str] | None = None
    unfit: str = ""
    tries: int = 1
    slow_nodes: Sequence[str] = ()


@dataclass(frozen=True)
class Decision:
    """What follows, and why.

    Attributes:
        action: what is done next.
        cause: why the life ended.
        reason: the same in one sentence.
        node: the node that is to blame, or "".
        last_line: the last line of the first rank that failed, or "".
        exclude: nodes to leave out from now on, with the reason.
        wait_s: how long the next life waits.
    """

    action: Action
    cause: Cause
    reason: str
    node: str = ""
    last_line: str = ""
    exclude: tuple[tuple[str, str], ...] = ()
    wait_s: int = 0


_PORT = re.compile(r"EADDRINUSE|address already in use", re.I)
_DEVICE = re.compile(r"CUDA error|NCCL (?:error|failure)|ncclUnhandled|ncclSystemError|\bXid\b")
_MEMORY = re.compile(r"oom[-_ ]kill|out of memory: killed", re.I)
# What the others say when a rank has gone: a consequence.
_PEER = re.compile(
    r"connection (?:reset|closed|refused)|broken pipe|ncclRemoteError|RendezvousConnectionError"
    r"|lost the connection to another rank",
    re.I,
)
_INTERRUPTS = {1, 2, 9, 10, 12, 15}  # HUP INT KILL USR1 USR2 TERM


def cause_of(record: RankRecord) -> Cause:
    """Why one rank ended.

    A rank that was killed may have been so by Slurm, by a person or by the end of its node: it was
    interrupted, unless the kernel had no memory left.
    """
    code = record.code
    if _fatal(record):
        return Cause.DEVICE
    if code is None:
        return Cause.INTERRUPTED
    if code in _BY_CODE:
        return _BY_CODE[code]
    if -code in _INTERRUPTS or code - 128 in _INTERRUPTS:
        return Cause.MEMORY if record.out_of_memory else Cause.INTERRUPTED
    text = "\n".join(record.tail)
    for pattern, cause in ((_PORT, Cause.PORT), (_MEMORY, Cause.MEMORY), (_DEVICE, Cause.DEVICE)):
        if pattern.search(text):
            return cause
    if _PEER.search(text):
        return Cause.NODE_LOST
    return Cause.MACHINE if code == ExitCode.MACHINE_FAILED else Cause.ERROR


_BY_CODE = {
    int(ExitCode.DONE): Cause.INTERRUPTED,  # done is what the summary says
    int(ExitCode.STOPPED): Cause.INTERRUPTED,
    int(ExitCode.SECOND_INTERRUPT): Cause.INTERRUPTED,
    int(ExitCode.BAD_INPUT): Cause.BAD_INPUT,
    int(ExitCode.DIVERGED): Cause.DIVERGED,
    int(ExitCode.HANG): Cause.HANG,
    int(ExitCode.SUPERSEDED): Cause.SUPERSEDED,
}
# Each of these says what happened; the first rank by time says it best.
_ROOTS = (Cause.SUPERSEDED, Cause.BAD_INPUT, Cause.DIVERGED)
_OTHERS = (Cause.HANG, Cause.DEVICE, Cause.MACHINE, Cause.MEMORY, Cause.PORT, Cause.ERROR)
_OF_A_NODE = (Cause.NODE_LOST, Cause.HANG, Cause.DEVICE, Cause.MACHINE, Cause.MEMORY)


def decide(
    life: Life,
    evidence: Evidence,
    past: Sequence[Life],
    policy: Policy,
    excluded: Sequence[str] = (),
    since: int = 0,
) -> Decision:
    """What follows the end of a life.

    Args:
        life: the life, with the steps it reached.
        evidence: what it left behind.
        past: the lives before it, in order.
        policy: the limits.
        excluded: the nodes that are left out already.
        since: the limits count the lives after this number; a node is looked for in all of them.
    """
    if evidence.finished:
        return Decision(Action.DONE, Cause.DONE, f"all {policy.steps} steps are done")
    if evidence.unfit:
        return Decision(Action.FAIL, Cause.PREFLIGHT, evidence.unfit)
    if evidence.bad_nodes:
        found = _preflight(evidence.bad_nodes)
    else:
        found = _first_words(life, evidence, past)
    if found.action is not Action.REQUEUE:
        return found
    left_out = sorted({*excluded, *(node for node, _ in found.exclude)})
    counted = [one for one in past if one.number > since]
    limit = _limit(found, life, counted, policy)
    if found.exclude and len(left_out) > policy.max_excluded:
        limit = (
            f"{len(left_out)} nodes would be left out, and {policy.max_excluded} may be "
            f"(max_excluded): {', '.join(left_out)}"
        )
    if limit:
        return replace(found, action=Action.FAIL, reason=f"{limit}; {found.reason}")
    # A slow node is left out only while there is room: the run can go on with it.
    room = policy.max_excluded - len(left_out)
    slow = [node for node in evidence.slow_nodes if node in life.nodes and node not in left_out]
    exclude = (*found.exclude, *((node, "slow for long") for node in slow[: max(0, room)]))
    return replace(found, exclude=exclude, wait_s=_wait(life, counted, policy))


def _first_words(life: Life, evidence: Evidence, past: Sequence[Life]) -> Decision:
    """The decision before the limits are asked."""
    cause, first = _judge(evidence.records)
    line = first.last_line if first else ""
    reason = f"{cause}{_words_of(first)}" if first else f"{cause}{_of_all(evidence.records)}"
    if cause is Cause.SUPERSEDED:
        return Decision(Action.LEAVE, cause, reason, last_line=line)
    if cause in (Cause.BAD_INPUT, Cause.DIVERGED):
        return Decision(Action.FAIL, cause, reason, last_line=line)
    if evidence.stop_requested:
        return Decision(Action.STOP, cause, f"stopped on request ({reason})", last_line=line)
    if cause is Cause.PORT and evidence.tries < PORT_TRIES:
        return Decision(Action.RETRY, cause, f"{reason}; trying another one", last_line=line)
    node = _blamed(cause, first, life, evidence.records)
    if cause is Cause.NODE_LOST and node:
        reason = f"{cause}: nothing was heard from {node}"
    return Decision(Action.REQUEUE, cause, reason, node, line, exclude=_bad_node(node, first, past))


def _words_of(record: RankRecord) -> str:
    """How a rank ended."""
    code = record.code or 0
    number = -code if code < 0 else code - 128  # as Python says it, and as a shell does
    said = f"killed by signal {number}" if 0 < number <= LAST_SIGNAL else record.last_line
    return f", rank {record.rank} on {record.host}: {said or f'exit code {record.code}'}"


def _of_all(records: Sequence[RankRecord]) -> str:
    """How the ranks of a life ended where none of them failed by itself."""
    ended = sorted((one for one in records if one.code is not None), key=lambda one: one.time)
    if not ended:
        return ": no rank could write how it ended"
    killed = [one for one in ended if one.code not in (ExitCode.DONE, ExitCode.STOPPED)]
    return _words_of(killed[0]) if killed else ": the ranks saved and stopped"


def _judge(records: Sequence[RankRecord]) -> tuple[Cause, RankRecord | None]:
    """The cause of a life's end, and the first rank by time that shows it."""
    ordered = sorted(records, key=lambda record: (record.time or float("inf"), record.rank))
    causes = [(cause_of(record), record) for record in ordered]
    for cause, record in causes:
        if _fatal(record):
            return cause, record
    for wanted in (_ROOTS, _OTHERS):
        for cause, record in causes:
            if cause in wanted:
                return cause, record
    lost = [record for cause, record in causes if cause is Cause.NODE_LOST]
    if not lost:
        return Cause.INTERRUPTED, None
    # Ranks that were killed before the others noticed are what the others lost.
    killed = ordered[0].code is not None and (ordered[0].code < 0 or ordered[0].code > 128)
    return (Cause.INTERRUPTED, ordered[0]) if killed else (Cause.NODE_LOST, lost[0])


def _fatal(record: RankRecord | None) -> list[int]:
    return sorted(set(record.xids) & FATAL_XIDS) if record else []


def _blamed(
    cause: Cause, first: RankRecord | None, life: Life, records: Sequence[RankRecord]
) -> str:
    """The node that is to blame: that of the first failing rank, or the only silent one."""
    if cause not in _OF_A_NODE:
        return ""
    if cause in (Cause.NODE_LOST, Cause.HANG):
        # These are said by the ranks that wait; the one they wait for says nothing.
        heard = {record.host for record in records if record.code is not None}
        silent = [node for node in life.nodes if node not in heard]
        return silent[0] if len(silent) == 1 else ""
    return first.host if first else ""


def _bad_node(
    node: str, first: RankRecord | None, past: Sequence[Life]
) -> tuple[tuple[str, str], ...]:
    """The node to leave out with the reason, or nothing."""
    if not node:
        return ()
    if fatal := _fatal(first):
        return ((node, f"Xid {fatal[0]}"),)
    named = sum(life.node == node for life in past[-(RECENT - 1) :])
    return ((node, f"to blame for {named + 1} of {RECENT} lives"),) if named else ()


def _preflight(bad_nodes: dict[str, str]) -> Decision:
    found = sorted(bad_nodes.items())
    nodes: dict[str, list[str]] = {}  # a mistake of the software is often that of many
    for node, why in found:
        nodes.setdefault(why, []).append(node)
    reason = "preflight: " + "; ".join(f"{', '.join(of)}: {why}" for why, of in nodes.items())
    return Decision(Action.REQUEUE, Cause.PREFLIGHT, reason, found[0][0], exclude=tuple(found))


def _limit(found: Decision, life: Life, past: Sequence[Life], policy: Policy) -> str:
    """Which limit of restarting is reached, or ""."""
    if len(past) + 1 >= policy.total:
        return f"{policy.total} lives are the most (restarts.total)"
    if found.cause is Cause.PREFLIGHT:
        return ""
    earlier = [one for one in past if one.cause == found.cause]
    if found.cause is Cause.ERROR and earlier:
        # Not by the steps of the checkpoints: after a rewind newer ones have lower steps.
        since = [one for one in (*past, life) if one.number > earlier[-1].number]
        if not any(one.progressed for one in since) and found.last_line == earlier[-1].last_line:
            return "the same error twice, and no checkpoint in between"
    fruitless = _fruitless(life, past)
    quick = [one for one in fruitless if one.seconds < START_S]
    failed = [one.cause for one in quick if one.cause not in ("", Cause.INTERRUPTED)]
    if len(quick) >= STARTS and len(quick) == len(fruitless):
        if len(failed) >= STARTS - 1 and found.cause is not Cause.INTERRUPTED:
            return f"the run does not start: {len(quick)} lives of less than {START_S:.0f} s"
    if len(fruitless) >= policy.without_progress:
        return (
            f"{len(fruitless)} lives in a row left no newer checkpoint "
            f"(restarts.without_progress={policy.without_progress})"
        )
    return ""


def _fruitless(life: Life, past: Sequence[Life]) -> list[Life]:
    """The lives up to this one since the last that left a newer checkpoint, newest first."""
    since: list[Life] = []
    for one in (life, *reversed(past)):
        if one.progressed:
            break
        if one.cause != Cause.PREFLIGHT:
            since.append(one)
    return since


def _wait(life: Life, past: Sequence[Life], policy: Policy) -> int:
    """Seconds until the next life: longer after every life without progress."""
    fruitless = len(_fruitless(life, past))
    if not fruitless or not policy.waits:
        return 0
    return policy.waits[min(fruitless, len(policy.waits)) - 1]
