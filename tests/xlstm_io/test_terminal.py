"""What reaches the terminal: no control characters, and a quiet end where nobody reads."""

import shlex
import subprocess
import sys

import pytest

from xlstm_io.errors import ExitCode
from xlstm_io.terminal import counted, one_line, printable, size_of_model, until_nobody_reads


@pytest.mark.parametrize(
    ("text", "shown", "in_a_line"),
    [
        ("plain, naïve, 日本", "plain, naïve, 日本", "plain, naïve, 日本"),
        ("a\nb\tc", "a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07", "\\x1b[31mred\\x07"),
        ("\x9b2J and \x7f", "\\x9b2J and \\x7f", "\\x9b2J and \\x7f"),
        ("\u202egnp.exe", "\\u202egnp.exe", "\\u202egnp.exe"),
        ("cut \ud800", "cut \\ud800", "cut \\ud800"),
    ],
)
def test_control_characters_are_spelled_out(text, shown, in_a_line):
    assert printable(text) == shown
    assert one_line(text) == in_a_line


def test_one_thing_has_no_plural():
    assert counted(1, "shard") == "1 shard" and counted(0, "shard") == "0 shards"
    assert counted(2000, "process", "processes") == "2,000 processes"


def test_models_are_called_by_millions_or_billions():
    assert size_of_model(4_081_234) == "4.08 M" and size_of_model(6_865_424_384) == "6.87 B"


PRINTS = """
import sys
from xlstm_io.terminal import until_nobody_reads
def command():
    for _ in range(100_000):
        print("a line")
    return 0
sys.exit(until_nobody_reads(command))
"""


def test_a_command_whose_reader_has_ended_ends_quietly():
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == ExitCode.NOBODY_READS


CLOSED = """
import sys
from xlstm_io.terminal import until_nobody_reads
def command():
    with open(sys.argv[1], "w") as file:
        print("on the terminal", file=sys.stderr, flush=True)
        print("on the terminal", flush=True)
        print(sys.stdin.read(), end="")
        file.write(str(file.fileno() > 2))
    return 3
sys.exit(until_nobody_reads(command))
"""


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_at_the_start_change_nothing_and_no_file_takes_their_place(closed, tmp_path):
    words = shlex.join([sys.executable, "-c", CLOSED, str(tmp_path / "file")])
    done = subprocess.run(["sh", "-c", f"exec {words} {closed}"], stdin=subprocess.DEVNULL)
    assert done.returncode == 3
    assert (tmp_path / "file").read_text() == "True"


def test_another_broken_pipe_is_an_error_as_before():
    def command():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        until_nobody_reads(command)
    assert until_nobody_reads(lambda: 2) == 2
