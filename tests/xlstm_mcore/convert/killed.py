"""A conversion that SIGKILL ends, by `python -m` with N, FOLDER, and the command's words.

What it does to files below FOLDER is counted (a file is opened, renamed or removed, a folder made,
a tensor written), and right before number N it kills itself. It prints how many there were if it
gets to its end. Files of weights are small, so that there are several.
"""

import os
import signal
import sys

from tests import fake_object_store
from xlstm_io.checkpoint import safetensors_stream, streamed
from xlstm_mcore.convert import cli
from xlstm_mcore.convert.tokenizer import corpus

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
DATA_FILE_BYTES = 300_000


def main(number: int, folder: str, words: list[str]) -> int:
    """Run a conversion, and end it before what it does for the `number`-th time."""
    count = 0

    def one_more() -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        if event in EVENTS and str(arguments[0]).startswith(folder):
            one_more()

    bytes_of = safetensors_stream.bytes_of

    def counted(tensor):
        one_more()
        return bytes_of(tensor)

    fake_object_store.register()
    corpus.TEXTS = 20
    streamed.DATA_FILE_BYTES = DATA_FILE_BYTES
    safetensors_stream.bytes_of = counted
    sys.addaudithook(hook)
    code = cli.main(words)
    print(count)
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
