"""The policy of lives: every row of the table in docs/slurm.md."""

import pytest

from slurm.job.decide import FATAL_XIDS, Action, Cause, Evidence, cause_of, decide
from slurm.job.state import Life, Policy, RankRecord
from xlstm_io.errors import ExitCode

POLICY = Policy(steps=100)


def rank(number=0, code=1, *, host=None, time=None, tail=(), xids=(), memory=False):
    return RankRecord(
        rank=number,
        host=host or f"n{number + 1}",
        step_id=0,
        code=code,
        time=float(number) if time is None else time,
        tail=tuple(tail),
        xids=tuple(xids),
        out_of_memory=memory,
    )


def life(number=1, *, start=0, checkpoint=10, seconds=600.0, nodes=("n1", "n2"), **more):
    return Life(
        number=number,
        job="7",
        restart=0,
        nodes=nodes,
        began=0.0,
        start_step=start,
        ended=seconds,
        checkpoint_step=checkpoint,
        **more,
    )


def fruitless(number=1, cause=Cause.INTERRUPTED, **more):
    return life(number, start=10, checkpoint=10, cause=str(cause), **more)


def after(*records, now=None, past=(), policy=POLICY, excluded=(), **evidence):
    return decide(now or life(9), Evidence(records, **evidence), past, policy, excluded)


def test_a_finished_run_is_done_whatever_its_ranks_said():
    decision = after(rank(code=1), finished=True)
    assert (decision.action, decision.cause) == (Action.DONE, Cause.DONE)
    assert decision.reason == "all 100 steps are done"


def test_bad_input_is_never_repeated_and_shows_its_message():
    line = "error: layout.tensor=3 does not divide model.num_heads=4"
    decision = after(rank(0, 75), rank(1, ExitCode.BAD_INPUT, tail=[line]))
    assert (decision.action, decision.last_line) == (Action.FAIL, line)
    assert decision.reason == f"bad input, rank 1 on n2: {line}"


def test_a_diverged_run_is_never_repeated():
    decision = after(rank(code=ExitCode.DIVERGED, tail=["error: step 7: loss nan"]))
    assert (decision.action, decision.cause) == (Action.FAIL, Cause.DIVERGED)


@pytest.mark.parametrize("code", [0, 75, -9, -15, -10, 137, 138, 143, None, 130])
def test_ranks_that_stopped_or_were_killed_were_interrupted(code):
    decision = after(rank(0, code), rank(1, code))
    assert (decision.action, decision.cause) == (Action.REQUEUE, Cause.INTERRUPTED)
    assert decision.wait_s == 0 and not decision.exclude


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([], "interrupted: no rank could write how it ended"),
        ([rank(0, None), rank(1, None)], "interrupted: no rank could write how it ended"),
        ([rank(0, 75), rank(1, 75)], "interrupted: the ranks saved and stopped"),
        ([rank(0, 75), rank(1, -9)], "interrupted, rank 1 on n2: killed by signal 9"),
        ([rank(0, 143), rank(1, None)], "interrupted, rank 0 on n1: killed by signal 15"),
    ],
)
def test_how_a_life_was_interrupted_is_said(records, reason):
    decision = after(*records)
    assert (decision.action, decision.reason) == (Action.REQUEUE, reason)


def test_a_superseded_life_leaves_quietly():
    decision = after(rank(0, -15), rank(1, ExitCode.SUPERSEDED, tail=["superseded: life 7 ..."]))
    assert (decision.action, decision.cause) == (Action.LEAVE, Cause.SUPERSEDED)


def test_a_stop_request_ends_the_restarts_but_hides_no_mistake():
    assert after(rank(code=75), stop_requested=True).action is Action.STOP
    assert after(rank(code=1), stop_requested=True).action is Action.STOP
    assert after(rank(code=2), stop_requested=True).action is Action.FAIL
    assert after(finished=True, stop_requested=True).action is Action.DONE


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        (rank(code=ExitCode.HANG), Cause.HANG),
        (rank(code=ExitCode.MACHINE_FAILED, tail=["error: the disk is full"]), Cause.MACHINE),
        (rank(tail=["RuntimeError: CUDA error: an illegal memory access"]), Cause.DEVICE),
        (rank(tail=["torch.distributed.DistBackendError: NCCL error in: ..."]), Cause.DEVICE),
        (rank(code=-6, xids=[79]), Cause.DEVICE),
        (rank(tail=["OSError: [Errno 98] Address already in use"]), Cause.PORT),
        (rank(code=-9, memory=True), Cause.MEMORY),
        (rank(code=-11), Cause.ERROR),
        (rank(tail=["torch.OutOfMemoryError: CUDA out of memory."]), Cause.ERROR),
        (rank(tail=["ValueError: what"]), Cause.ERROR),
        (rank(tail=["RuntimeError: Connection reset by peer"]), Cause.NODE_LOST),
        (rank(code=70, tail=["rank 3 lost the connection to another rank: ..."]), Cause.NODE_LOST),
        (rank(code=70, tail=["rank 0 lost the connection ...: EADDRINUSE"]), Cause.PORT),
    ],
)
def test_what_a_rank_says_about_its_end(record, cause):
    assert cause_of(record) is cause


@pytest.mark.parametrize("code", list(ExitCode))
def test_every_exit_code_has_a_cause(code):
    assert cause_of(rank(code=int(code))) in Cause


def test_the_first_failing_rank_by_time_is_shown_and_consequences_are_not():
    decision = after(
        rank(0, 1, time=1.0, tail=["RuntimeError: Connection closed by peer"]),
        rank(1, 1, time=3.0, tail=["ValueError: later"]),
        rank(2, 1, time=2.0, tail=["ValueError: first"]),
        rank(3, -15, time=0.5),
    )
    assert decision.last_line == "ValueError: first"
    assert "rank 2 on n3" in decision.reason


def test_a_port_in_use_costs_a_try_and_no_life():
    taken = rank(tail=["RuntimeError: EADDRINUSE"])
    assert after(taken, tries=1).action is Action.RETRY
    assert after(taken, tries=5).action is Action.REQUEUE


def test_a_node_named_twice_in_five_lives_is_left_out():
    broken = rank(code=1, host="n2", tail=["CUDA error: unspecified launch failure"])
    assert after(broken).exclude == ()
    named = [life(5, node="n2"), life(6), life(7), life(8)]
    assert after(broken, past=named).exclude == (("n2", "to blame for 2 of 5 lives"),)
    long_ago = [life(4, node="n2"), life(5), life(6), life(7), life(8)]
    assert after(broken, past=long_ago).exclude == ()


@pytest.mark.parametrize("xid", sorted(FATAL_XIDS))
def test_one_fatal_xid_leaves_the_node_out(xid):
    decision = after(
        rank(0, 74, time=1.0), rank(1, -6, host="n2", time=2.0, xids=[13, xid]), now=life(9)
    )
    assert decision.exclude == (("n2", f"Xid {xid}"),) and decision.action is Action.REQUEUE
    assert after(rank(code=-6, xids=[13])).exclude == ()


def test_the_only_silent_node_is_to_blame_when_the_others_lost_a_peer():
    lost = rank(0, 1, host="n1", tail=["Connection reset by peer"])
    decision = after(lost)
    assert (decision.node, decision.cause) == ("n2", Cause.NODE_LOST)
    assert "nothing was heard from n2" in decision.reason
    assert after(lost, rank(1, None, host="n2")).node == "n2"
    assert after(lost, now=life(9, nodes=("n1", "n2", "n3"))).node == ""  # which of the two?
    assert after(rank(0, ExitCode.HANG, host="n1")).node == "n2"


def test_a_rank_that_was_killed_is_the_cause_of_what_the_others_lost():
    lost = rank(0, 70, time=2.0, tail=["rank 0 lost the connection to another rank: ..."])
    decision = after(rank(1, -9, time=1.0), lost)
    assert (decision.cause, decision.node) == (Cause.INTERRUPTED, "")
    assert decision.reason == "interrupted, rank 1 on n2: killed by signal 9"
    silent = rank(2, None, time=0.0)  # it never ended by itself, so it was not the first
    assert after(rank(1, -9, time=1.0), silent, lost).cause is Cause.INTERRUPTED
    later = after(rank(1, -15, time=3.0), lost)  # by Slurm, after the loss
    assert later.cause is Cause.NODE_LOST


def test_a_very_long_line_is_cut():
    assert len(after(rank(code=2, tail=["x" * 9999])).last_line) == 300


def test_too_many_nodes_left_out_end_the_run_with_the_list():
    broken = rank(code=-6, xids=[79], host="n2")
    assert after(broken, excluded=("n7",)).action is Action.REQUEUE
    decision = after(broken, excluded=("n7", "n8"))
    assert decision.action is Action.FAIL and "n2, n7, n8" in decision.reason


def test_a_preflight_leaves_out_what_it_names_and_costs_no_life():
    found = {"n3": "does not answer", "n1": "slow"}
    past = [fruitless(number, Cause.PREFLIGHT) for number in range(1, 9)]
    decision = after(bad_nodes=found, past=past, now=fruitless(9))
    assert (decision.action, decision.cause) == (Action.REQUEUE, Cause.PREFLIGHT)
    assert decision.exclude == (("n1", "slow"), ("n3", "does not answer"))
    assert decision.reason == "preflight: n1: slow; n3: does not answer"
    many = after(bad_nodes=dict.fromkeys(("n2", "n1"), "has Python 3.12, the others Python 3.11"))
    assert many.reason == "preflight: n1, n2: has Python 3.12, the others Python 3.11"
    assert after(bad_nodes=found, excluded=("n9",)).action is Action.FAIL
    assert after(unfit="preflight fails on every node: x").action is Action.FAIL


def test_an_error_is_tried_again_once_per_checkpoint():
    failed = rank(tail=["ValueError: what"])
    known = life(8, cause="error", last_line="ValueError: what", start=0, checkpoint=10)
    assert after(failed).action is Action.REQUEUE
    assert after(failed, now=life(9, start=10, checkpoint=20), past=[known]).action is (
        Action.REQUEUE
    )
    again = after(failed, now=life(9, start=10, checkpoint=10), past=[known])
    assert again.action is Action.FAIL and "the same error twice" in again.reason
    back = life(9, start=4, checkpoint=6)  # after a rewind
    assert after(failed, now=back, past=[known]).action is Action.REQUEUE
    other = after(rank(tail=["KeyError: x"]), now=life(9, start=10, checkpoint=10), past=[known])
    assert other.action is Action.REQUEUE


def test_lives_without_progress_are_counted_and_progress_sets_them_back():
    two = [fruitless(7), fruitless(8)]
    decision = after(rank(code=None), now=fruitless(9), past=two)
    assert decision.action is Action.FAIL
    assert "3 lives in a row left no newer checkpoint" in decision.reason
    back = after(rank(code=None), now=life(9, start=10, checkpoint=20), past=two)
    assert (back.action, back.wait_s) == (Action.REQUEUE, 0)


def test_the_wait_grows_with_lives_without_progress():
    policy = Policy(steps=100, without_progress=9)
    waits = [
        after(now=fruitless(9), past=[life(1), *map(fruitless, range(2, 2 + n))], policy=policy)
        for n in range(5)
    ]
    assert [decision.wait_s for decision in waits] == [0, 60, 300, 300, 300]


def test_the_total_of_lives_is_limited():
    past = [life(number) for number in range(1, 100)]
    assert after(now=life(100), past=past).action is Action.FAIL
    assert after(now=life(99), past=past[:-1]).action is Action.REQUEUE


def test_a_run_that_never_starts_is_given_up():
    policy = Policy(steps=100, without_progress=9)
    quick = [fruitless(n, Cause.ERROR, seconds=5.0, last_line=f"line {n}") for n in (1, 2)]
    failed = rank(tail=["ImportError: no module"])
    decision = after(failed, now=fruitless(3, "", seconds=5.0), past=quick, policy=policy)
    assert decision.action is Action.FAIL and "does not start" in decision.reason
    assert decision.last_line == "ImportError: no module"
    slow = after(failed, now=fruitless(3, "", seconds=500.0), past=quick, policy=policy)
    assert slow.action is Action.REQUEUE


def test_slow_nodes_are_left_out_while_there_is_room():
    policy = Policy(steps=100, max_excluded=2)
    now = life(9, nodes=("n1", "n2", "n3", "n4"))
    told = after(rank(0, 75), now=now, policy=policy, slow_nodes=["n3", "n4", "gone"])
    assert told.action is Action.REQUEUE
    assert told.exclude == (("n3", "slow for long"), ("n4", "slow for long"))
    told = after(
        rank(0, 75), now=now, policy=policy, slow_nodes=["n2", "n3", "n4"], excluded=["n2"]
    )
    assert told.exclude == (("n3", "slow for long"),), "one is left out already, one more may be"
    full = after(
        rank(0, 75), now=now, policy=policy, slow_nodes=["n3", "n4"], excluded=["n1", "n2", "n0"]
    )
    assert full.action is Action.REQUEUE and not full.exclude, "the run goes on with it"
    assert not after(rank(0, 2), now=now, policy=policy, slow_nodes=["n3"]).exclude
