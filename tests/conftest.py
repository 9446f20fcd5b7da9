"""Options of the whole suite."""

import signal
import zlib

# What a shell starts in the background ignores Ctrl-C, under nohup the end of the terminal too, and
# so would all its children; some tests send both.
for number, usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


def pytest_addoption(parser):
    parser.addoption(
        "--dist-share",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="run this share of the tests that start several processes, the same ones every time",
    )


def pytest_collection_modifyitems(config, items):
    """Keep a sample of the distributed tests, drawn by their names and the seed 0."""
    share = config.getoption("--dist-share")
    left_out = [
        item
        for item in items
        if "dist" in item.keywords and zlib.crc32(f"0 {item.nodeid}".encode()) >= share * 2**32
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
