"""Which hosts are named as slow, from what every rank computes between its collectives."""

from pretrain.watching.ranks import LOOKS, SlowHosts


def looks(slow, compute, number, first=100):
    return [line for n in range(number) for line in slow.add(compute, first + 100 * n)]


def test_a_host_that_stays_behind_is_named_once_with_its_slowest_rank():
    slow = SlowHosts(["a", "a", "b", "b", "c", "c"], [0] * 6)
    compute = [1.0, 1.0, 1.02, 1.0, 1.0, 1.11]
    assert not looks(slow, compute, LOOKS - 1) and not slow.named
    (said,) = looks(slow, compute, 3, first=2000)
    assert "host c is slow" in said and "at step 2000 rank 5 computes for 1.110 s" in said
    assert f"in each of {LOOKS} looks since step 100" in said and "median rank for 1.000 s" in said
    assert slow.named == ["c"]


def test_one_look_in_time_starts_the_count_anew_and_a_host_may_catch_up():
    slow = SlowHosts(["a", "b", "c"], [0] * 3)
    behind, even = [1.0, 1.0, 1.2], [1.0, 1.0, 1.07]
    looks(slow, behind, LOOKS - 1)
    assert not looks(slow, even, 1) and not looks(slow, behind, LOOKS - 1) and not slow.named
    assert len(looks(slow, behind, 1)) == 1 and slow.named == ["c"]
    assert looks(slow, even, 1, first=9000) == ["host c has caught up at step 9000"]
    assert not slow.named


def test_stages_with_more_work_are_not_slow():
    slow = SlowHosts(["a", "b", "c", "d", "e", "f"], [0, 0, 0, 1, 1, 1])
    assert not looks(slow, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0], LOOKS) and not slow.named
    assert len(looks(slow, [1.0, 1.0, 1.0, 2.0, 2.0, 2.3], LOOKS)) == 1 and slow.named == ["f"]


def test_a_stage_on_one_host_cannot_be_behind_itself():
    slow = SlowHosts(["a", "a", "b", "b"], [0, 0, 1, 1])
    assert not looks(slow, [1.0, 1.0, 5.0, 5.0], LOOKS)
