"""Continue texts with a trained model, in one process or tensor parallel over those of torchrun."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pretrain.checkpoint import read_manifest
from pretrain.config import config_from_dict
from xlstm_io.checkpoint.choose import choose
from xlstm_io.errors import UserError
from xlstm_io.storage import Location, replacing
from xlstm_io.terminal import printable
from xlstm_mcore.generation.generate import Completion, generate
from xlstm_mcore.generation.settings import Sampling
from xlstm_mcore.inference import load_model

STDIN = "-"
EXAMPLE = '{"prompt": "Once upon a time"}'
"""A line of a file of prompts, for messages."""


class Prompt(NamedTuple):
    """A text to continue, and the number that decides its random numbers."""

    text: str
    number: int


def main(
    checkpoint: str,
    sampling: Sampling,
    *,
    which: str | None = None,
    prompt: list[str] | None = None,
    prompts: str | None = None,
    batch: int = 16,
    precision: str = "fp32",
    tokenizer: str | None = None,
    as_json: bool = False,
    out: str | None = None,
) -> int:
    """Continue prompts, and print or write the texts.

    Args:
        checkpoint: a checkpoint or a run folder.
        sampling: how tokens are drawn.
        which: which checkpoint of a run; see `xlstm_io.checkpoint.choose`.
        prompt: texts to continue; `-` is the whole of stdin, an empty one starts a document.
        prompts: a JSONL file of prompts, or `-` for stdin; see `read_prompts`.
        batch: completions that are computed together at most.
        precision: "fp32" or "bf16", of weights and activations.
        tokenizer: a tokenizer's file or folder; by default the one in the checkpoint.
        as_json: print a line of JSON for each completion.
        out: file to write: JSON lines if it ends in `.jsonl`, else the texts.

    Returns:
        0.

    Raises:
        UserError: no checkpoint, its model does not split over the processes, its tokenizer is
            gone or another one, or the prompts cannot be read.
    """
    if batch < 1:
        raise UserError(f"--batch={batch} computes nothing; use 1 or more")
    path = choose(checkpoint, which)
    check_split(path)
    asked = gather_prompts(prompt, prompts)
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise UserError(f"--out={out}: there is no such folder to write to; make it first")
    model, words = load_model(path, tokenizer=tokenizer, precision=precision)
    main_process = model.tp_group.rank() == 0
    rows = len(asked) * sampling.num_samples
    streams = main_process and rows == 1 and not as_json and out is None and sys.stdout.isatty()
    if streams:
        _print(asked[0].text, end="")
    with tqdm(total=rows, unit="text", disable=None if main_process and rows > 1 else True) as bar:
        completions = generate(
            model,
            words,
            [one.text for one in asked],
            sampling,
            numbers=[one.number for one in asked],
            batch=batch,
            on_text=(lambda text: _print(text, end="")) if streams else (lambda text: None),
            on_done=lambda completion: bar.update(),
        )
    if not main_process:
        return 0
    if streams:
        _print("")
    elif out is None or not out.endswith(".jsonl"):
        for completion in completions:
            _print(as_line(completion) if as_json else as_text(completion, sampling))
    if out is not None:
        _write(Path(out), completions)
    return 0


def gather_prompts(prompt: list[str] | None, prompts: str | None) -> list[Prompt]:
    """The prompts of the command line and those of a file, numbered in this order.

    Raises:
        UserError: the file cannot be read, or stdin is asked for twice or by several processes.
    """
    texts = list(prompt or [])
    readers = texts.count(STDIN) + (prompts == STDIN)
    if readers > 1:
        raise UserError("stdin (-) can be read once; give it to one --prompt or to --prompts")
    if readers and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("stdin (-) reaches one of several processes; write the prompts to a file")
    texts = [sys.stdin.read() if text == STDIN else text for text in texts]
    asked = [Prompt(text, number) for number, text in enumerate(texts)]
    if prompts is not None:
        asked += read_prompts(prompts, first=len(asked))
        if not asked:
            raise UserError(f"{prompts} holds no prompt; a line is such as {EXAMPLE}")
    return asked or [Prompt("", 0)]


def read_prompts(path: str, first: int = 0) -> Iterator[Prompt]:
    """Prompts of a JSONL file, one a line: `{"prompt": TEXT}`, or the text as a JSON string.

    A line may have a `number`, by which the prompt keeps its random numbers when the file is cut or
    put into another order. Other keys are passed over.

    Args:
        path: the file, or `-` for stdin.
        first: number of the first line's prompt.

    Raises:
        UserError: a line is something else.
    """
    try:
        text = sys.stdin.read() if path == STDIN else Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompts={path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts={path} is not UTF-8: {error}") from error
    lines = [(place, line) for place, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, (place, line) in enumerate(lines, first):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {place}: not JSON ({error}); write a line such as {EXAMPLE}"
            ) from error
        value = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
            raise UserError(f'{path}, line {place}: wanted {{"prompt": TEXT}}')
        own = value.get("number", number)
        if type(own) is not int or own < 0:
            raise UserError(
                f"{path}, line {place}: number={own!r} must be 0, 1, 2, ...; leave it out to "
                "count lines"
            )
        yield Prompt(value["prompt"], own)


def check_split(path: Location) -> None:
    """Check that a checkpoint's model splits over the processes that torchrun started.

    Raises:
        ConfigError: it does not; the message has the numbers of processes that would work.
    """
    tensor = int(os.environ.get("WORLD_SIZE", "1"))
    if tensor > 1:
        saved = read_manifest(path).config["model"]
        sections = {
            "model": {**saved, "pattern": saved["pattern"].replace("|", "")},
            "layout": {"tensor": tensor},
            # An import has no run and no data; the rules about the model need none.
            "run": {"dir": "none", "steps": 1},
            "data": {"path": "none", "seq_len": tensor, "global_batch": 1, "micro_batch": 1},
        }
        config_from_dict(sections, f"{tensor} processes")


def as_line(completion: Completion) -> str:
    """A completion as one line of JSON."""
    return json.dumps(asdict(completion), ensure_ascii=False)


def as_text(completion: Completion, sampling: Sampling) -> str:
    """A completion for a person."""
    sample = f", sample {completion.sample}" if sampling.num_samples > 1 else ""
    return f"--- prompt {json.dumps(completion.prompt)}{sample}\n{_whole(completion)}\n"


def _whole(completion: Completion) -> str:
    return completion.prompt + completion.text


def _print(text: str, end: str = "\n") -> None:
    # A terminal would obey the escape codes that a model may write; a file gets what it wrote.
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


def _write(path: Path, completions: list[Completion]) -> None:
    """Write all completions, or leave what was there."""
    if path.suffix == ".jsonl":
        text = "".join(f"{as_line(one)}\n" for one in completions)
    else:
        text = "\n----\n".join(map(_whole, completions)) + "\n"
    with replacing(path) as file:
        file.write(text.encode("utf-8", errors="surrogatepass"))
