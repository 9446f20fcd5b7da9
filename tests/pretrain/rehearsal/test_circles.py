"""Ranks that wait for each other, in a few letters for each rank.

`s1` and `r1` send to rank 1 and receive from it, `c` is a collective, `w0` waits for the end of the
rank's first message, and brackets make a batch.
"""

from dataclasses import replace

import pytest

from pretrain.rehearsal import compare
from pretrain.rehearsal.compare import compare_ranks
from pretrain.rehearsal.record import Message, RankRecord

OPERATIONS = {"s": "send", "r": "receive", "c": "all_reduce"}


def records(*courses: str) -> list[RankRecord]:
    found = []
    for rank, course in enumerate(courses):
        record, batch, batches = RankRecord(rank), None, 0
        for word in course.replace("(", "( ").replace(")", " )").split():
            if word == "(":
                batch = batches = batches + 1
            elif word == ")":
                batch = None
            elif word[0] == "w":
                record.ended.append((len(record.messages), int(word[1:])))
            else:
                operation, peer = OPERATIONS[word[0]], int(word[1:]) if word[1:] else None
                stack = (f"line of {word} on rank {rank}",)
                members = tuple(range(len(courses)))
                record.messages.append(
                    Message(operation, "A", members, "", 8, peer, "", "step 1", stack, batch)
                )
        found.append(record)
    return found


def found(*courses: str) -> list[str]:
    return [mismatch.summary for mismatch in compare_ranks(records(*courses))]


def ring(course: str, ranks: int) -> list[str]:
    """The same course on every rank; `+` and `-` are the neighbours."""
    return [
        course.replace("+", str((rank + 1) % ranks)).replace("-", str((rank - 1) % ranks))
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("course", ["r- s+ w0 w1", "s+ r- w0 w1", "s+ r-"])
def test_a_ring_of_single_messages_is_found(course, ranks):
    everybody = ", ".join(map(str, range(ranks)))
    assert found(*ring(course, ranks)) == [
        f"ranks {everybody} would hang: they wait for each other"
    ]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_ring_in_batches_passes(ranks):
    assert found(*ring("(r- s+) w0 w1 (s- r+) w2 w3", ranks)) == []


def test_a_circle_is_told_with_what_each_rank_is_at_and_what_waits_behind_it():
    (text,) = map(str, compare_ranks(records("r1 s1", "r0 s0")))
    assert "rank 0: receive of 8 bytes  with rank 1 in step 1 in group A" in text
    assert "line of r1 on rank 0" in text and "line of r0 on rank 1" in text
    assert "before it comes to its send of 8 bytes" in text and "line of s0 on rank 1" in text


def test_stacks_of_a_long_circle_are_told_of_some_ranks():
    (mismatch,) = compare_ranks(records(*ring("r- s+", 9)))
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8" in mismatch.summary
    assert mismatch.details[-1] == "  and 5 more"


def test_each_circle_is_told_once():
    pairs = ["r1 s1", "r0 s0", "r3 s3", "r2 s2"]
    assert len(found(*pairs)) == 2
    # Who waits for a rank of a circle is not part of it.
    assert found("r1 s1", "r0 s0 s2", "r1") == [found("r1 s1", "r0 s0", "")[0]]


@pytest.mark.parametrize(
    "courses",
    [
        ("s1", "r0 s2", "r1"),
        ("r1", "r2 s0", "s1"),
        ("s1 r1", "r0 s0"),
        ("s1 s1 s1 w0 w1 w2", "r0 r0 r0 w0 s2 w1 s2 w2 s2", "r1 r1 r1 w0 w1 w2"),
    ],
    ids=["chain", "chain back", "in turn", "line of states"],
)
def test_messages_that_come_to_an_end_pass(courses):
    assert found(*courses) == []


def test_single_messages_of_different_ranks_do_not_wait_once_their_communicators_are_open():
    opened = ["s1 r3", "r0 s2", "s3 r1", "r2 s0"]
    again = ring("r- s+", 4)
    assert found(*(f"{one} {other}" for one, other in zip(opened, again, strict=True))) == []


def test_communicators_must_be_opened_in_one_order():
    assert len(found("s1 c", "c r0")) == 1
    assert found("s1 c c s1", "r0 c r0 c") == []


def test_a_wait_holds_back_messages_of_other_queues():
    assert found("c r1 r1 c", "c s0 c s0") == []
    assert len(found("c r1 r1 w2 c", "c s0 c w2 s0")) == 1


def test_a_batch_stands_in_the_queue_of_the_collectives():
    assert len(found("c (s1)", "(r0) c")) == 1
    assert found("c (s1)", "c (r0)") == []


def test_a_batch_holds_back_what_is_behind_it_until_it_has_ended():
    assert len(found("c (s1 r1) c", "c (r0) c (s0)")) == 1
    assert found("c (s1 r1) c", "c (r0) (s0) c") == []


def test_ranks_that_were_not_rehearsed_are_ready():
    assert compare_ranks(records(*ring("r- s+", 4))[:3]) == []
    whole = records("c r1 w1 c", "c s0 c", "c c", "c c")
    assert compare_ranks(whole) == [] == compare_ranks(whole[:2])


def test_a_communicator_that_not_all_ranks_open_is_found():
    """torch: the first batch of a group must have all ranks of it."""
    (text,) = map(str, compare_ranks(records("(s1)", "(r0)", "")))
    assert "rank 2 does not come" in text and "in a batch" in text and "line of s1" in text
    assert found("c (s1)", "c (r0)", "c") == []


def test_the_sides_of_a_message_must_both_be_in_batches_or_none():
    assert any("does not come" in text for text in found("c (s1)", "c r0"))


def test_the_order_of_groups_is_written_out_once_for_each_rank(monkeypatch):
    """For each pair of ranks it took minutes for hundreds of them."""
    seen, real = [], compare._same
    monkeypatch.setattr(compare, "_same", lambda message: seen.append(message) or real(message))
    many = records(*["c c c"] * 16)
    assert list(compare._order_of_groups(many)) == []
    assert len(seen) == 3 * 16
    odd = many[5].messages
    odd[1] = replace(odd[1], group="B")
    for record in many:
        if record.rank != 5:
            record.messages[2] = replace(record.messages[2], group="B")
    mismatches = list(compare._order_of_groups(many))
    assert len(mismatches) == 15 and all("rank 5" in one.summary for one in mismatches)
    assert "in group B" in str(mismatches[0]) and "in group A" in str(mismatches[0])
