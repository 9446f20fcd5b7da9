"""Damaged files end in a reading or in one message: no traceback, signal, hang or flood of memory.

Every damage is drawn from the reader's name and a number, so a failure names what repeats it. By
command with more of them: `python -m pytest tests/attack --attacks 1000`.
"""

import os
import random
import time

import pytest

from tests.attack import children
from tests.attack.children import CRASHED, READ, REFUSED, attempt, attempts
from tests.attack.damage import damaged
from tests.attack.readers import READERS, Reader
from xlstm_io.errors import UserError


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damaged_input_is_read_or_refused(reader: Reader, tmp_path, pytestconfig):
    file = reader.make(tmp_path)
    sound = file.read_bytes()
    assert attempt(lambda: reader.read(file)).kind == READ

    def read(number: int) -> None:
        file.unlink()
        file.write_bytes(damaged(sound, random.Random(f"{reader.name} {number}")))
        reader.read(file)

    faults = []
    for number, outcome in enumerate(attempts(read, pytestconfig.getoption("--attacks"))):
        if outcome.kind == CRASHED:
            faults.append(f"number {number}: {outcome.message}")
        elif not outcome.message.replace("\n", "").isprintable():
            faults.append(f"number {number}: a message with control codes: {outcome.message!r}")
    assert not faults, "\n".join(faults)


def test_what_a_child_does_is_seen():
    def refuse():
        raise UserError("no")

    def eat():
        return bytearray(children.MEMORY + (1 << 30))

    assert attempt(refuse) == children.Outcome(REFUSED, "no")
    assert attempt(lambda: 3).kind == READ
    assert "MemoryError" in attempt(eat).message
    assert "ZeroDivisionError" in attempt(lambda: 1 / 0).message
    assert attempt(os.abort).message == "ended by SIGABRT"
    assert attempt(lambda: os._exit(3)).kind == CRASHED
    asleep = attempt(lambda: time.sleep(600), seconds=0.2)
    assert asleep.message == "still running after 0.2 s"


def test_a_try_that_ends_its_child_does_not_end_the_others():
    def act(number):
        if number == 2:
            os.abort()
        if number == 4:
            time.sleep(600)
        if number == 5:
            bytearray(children.MEMORY + (1 << 30))
        if number == 6:
            raise UserError(f"no, {os.getpid() != parent}")

    parent = os.getpid()
    outcomes = list(attempts(act, 8, seconds=0.5))
    kinds = [outcome.kind for outcome in outcomes]
    assert kinds == [READ, READ, CRASHED, READ, CRASHED, CRASHED, REFUSED, READ]
    assert outcomes[2].message == "ended by SIGABRT"
    assert outcomes[4].message == "still running after 0.5 s"
    assert "MemoryError" in outcomes[5].message
    assert outcomes[6].message == "no, True"


def test_damage_is_the_same_for_the_same_number():
    data = bytes(range(256)) * 8
    made = {damaged(data, random.Random(f"a {number}")) for number in range(50)}
    assert len(made) == 50 and data not in made
    assert damaged(data, random.Random("a 3")) == damaged(data, random.Random("a 3"))
    assert damaged(b"", random.Random("a 3")) is not None
