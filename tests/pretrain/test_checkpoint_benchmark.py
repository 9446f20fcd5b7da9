"""The benchmark of saving and loading runs, at a tiny size; its figures are not judged here."""

from benchmarks import checkpoint


def test_every_operation_is_measured(capsys):
    assert checkpoint.main(["--megabytes", "20", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("state of 20 MB") and len(lines) == 10
    assert sum("GB/s" in line for line in lines) == 6
