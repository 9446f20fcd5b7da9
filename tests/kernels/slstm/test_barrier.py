"""How programs of the persistent sLSTM meet: a model of which every order is explored.

A program is a list of atomic actions for each step: read what every program of the group wrote
last, write its own, count its arrival, and wait for the count. Every interleaving of 3 programs and
3 steps is followed. It assumes that what was written before an arrival is seen after the wait,
which `meet` asks the memory for by release and acquire.
"""

from dataclasses import dataclass, replace

import pytest

PROGRAMS, STEPS = 3, 3


@dataclass(frozen=True)
class Protocol:
    """What the kernels do, and what can be planted in its place."""

    places: int = 2  # of what is exchanged, taking turns
    waits: bool = True
    growing: bool = True  # the count to wait for grows with the steps
    reset: bool = False  # the last one to arrive sets the counter to 0


@dataclass(frozen=True)
class State:
    """Where all programs are."""

    at: tuple[int, ...]  # actions that each program has done
    places: tuple[tuple[int, ...], ...]  # the step whose value each program has written, by place
    arrived: int
    seen: tuple[int, ...]  # the last step that each program read


ACTIONS = ("read", "write", "arrive", "wait")


def turn(protocol: Protocol, state: State, program: int) -> State | None:
    """The state after the next action of a program; None if it has to wait.

    Raises:
        AssertionError: It reads a value of another step than the one before.
    """
    step, action = divmod(state.at[program], len(ACTIONS))
    after = replace(state, at=tuple(n + (i == program) for i, n in enumerate(state.at)))
    if ACTIONS[action] == "read":
        # Each column is read apart, so that others can write in between.
        place = state.places[step % protocol.places]
        assert all(value == step for value in place), f"step {step} reads {place}"
        return after
    if ACTIONS[action] == "write":
        places = [list(place) for place in state.places]
        places[(step + 1) % protocol.places][program] = step + 1
        return replace(after, places=tuple(map(tuple, places)))
    if ACTIONS[action] == "arrive":
        arrived = state.arrived + 1
        if protocol.reset and arrived == PROGRAMS:
            arrived = 0
        return replace(after, arrived=arrived)
    if not protocol.waits:
        return after
    count = PROGRAMS * (step + 1) if protocol.growing else PROGRAMS
    return after if state.arrived >= count else None


def explore(protocol: Protocol) -> int:
    """The number of states that can be reached.

    Raises:
        AssertionError: A wrong value is read, or all programs wait and some are not done.
    """
    first = tuple((0,) * PROGRAMS for _ in range(protocol.places))
    start = State((0,) * PROGRAMS, first, 0, (0,) * PROGRAMS)
    seen, left = {start}, [start]
    while left:
        state = left.pop()
        running = [i for i in range(PROGRAMS) if state.at[i] < STEPS * len(ACTIONS)]
        following = [turn(protocol, state, i) for i in running]
        assert not running or any(following), f"nobody goes on: {state}"
        for one in following:
            if one is not None and one not in seen:
                seen.add(one)
                left.append(one)
    return len(seen)


def test_every_order_reads_what_the_step_before_wrote():
    assert explore(Protocol()) > 200


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"waits": False}, "reads"),
        ({"places": 1}, "reads"),
        ({"growing": False}, "reads"),
        ({"growing": False, "reset": True}, "nobody goes on"),
    ],
    ids=["no wait", "one place", "a count that does not grow", "a counter reset too early"],
)
def test_a_wrong_meeting_is_found(fault, message):
    with pytest.raises(AssertionError, match=message):
        explore(Protocol(**fault))
