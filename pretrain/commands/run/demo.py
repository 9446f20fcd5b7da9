"""The whole pipeline in one command, which is what `make pretrain` runs.

    python -m pretrain demo --model large|classic --steps 200 [--data PATH] [--work runs/demo]

It holds no logic of its own: it prints and runs, one after another, the commands that a person
would type, so that its output is a tutorial and every stage is the real thing. A stage's exit code
is the demo's (2 bad input, 75 stopped and resumable); every stage keeps what it has finished, so
the same command continues.

The data are in WORK/data-NAME/ and are shared by both models; each model's run is in WORK/MODEL/.
"""

import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from pretrain.commands.after_run.report import EXPORT_DIR, SAMPLE_FILE, program
from pretrain.config import load_config
from pretrain.processes.devices import count_gpus
from pretrain.supervision.progress_file import read_progress
from xlstm_io.errors import ConfigError, ExitCode
from xlstm_io.signals import install, restore

CONFIGS = {"large": "cpu_demo.yaml", "classic": "cpu_demo_classic.yaml"}
# At 1 % a corpus of hundreds of files holds out so few files that the loss is mostly noise.
VALID_FRACTION = 0.05
SHARD_MB = 4  # several shards, so that several processes can write them
# Beginnings for the sample text. A run on other data than Python code starts from an empty one.
PYTHON_PROMPTS = ("import os\n", "class ", "    def __init__(self")
TITLES = {
    "collect": "collect text",
    "tokenizer": "train a tokenizer",
    "build": "pack the text into shards",
    "baselines": "measure n-gram models of the same tokens",
    "launch": "pretrain",
    "to-hf": "export to Hugging Face",
    "verify": "load the export with transformers and compare logits",
    "generate": "write some text",
    "report": "summary",
}


@dataclass(frozen=True)
class Text:
    """What the demo trains on.

    Attributes:
        data: a file, folder or glob of text; None for the Python standard library's sources.
        field: field (jsonl) or column (parquet, arrow) of the text.
        vocab_size: ids of the tokenizer that is trained, and rows of the model's embedding.
    """

    data: str | None = None
    field: str = "text"
    vocab_size: int = 8192

    @property
    def name(self) -> str:
        """A short name; another text gets another one."""
        if self == Text():
            return "stdlib"
        words = [self.data or ""]
        words += [f"field {self.field}"] * (self.field != "text")
        words += [f"vocab {self.vocab_size}"] * (self.vocab_size != 8192)
        return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Places:
    """Where the demo's files are.

    Attributes:
        data: folder of the corpus, tokenizer and shards.
        run: the run's folder.
    """

    data: Path
    run: Path

    @classmethod
    def of(cls, work: Path, model: str, text: Text) -> "Places":
        """The folders of a demo; another text gets another data folder, never the same one."""
        # A model trained on other data is another run.
        run = model if text == Text() else f"{model}-{text.name}"
        return cls(work / f"data-{text.name}", work / run)

    @property
    def corpus(self) -> Path:
        """Collected documents."""
        return self.data / "corpus"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder."""
        return self.data / "tokenizer"

    @property
    def shards(self) -> Path:
        """Packed shards, what training reads."""
        return self.data / "shards"

    @property
    def baselines(self) -> Path:
        """Losses of the n-gram models."""
        return self.data / "baselines.json"


def config_path(model: str) -> Path:
    """The demo's run file, relative to here where that is possible."""
    path = Path(__file__).parents[2] / "configs" / CONFIGS[model]
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def data_commands(places: Places, text: Text, seq_len: int) -> list[list[str]]:
    """Text -> tokenizer -> shards -> baselines, each a list of words after `python -m`."""
    # A user's corpus may be small; whether it is large enough is the tokenizer's question.
    source = [] if text.data is None else ["--input", text.data, "--min-mb", "0"]
    source += ["--text-field", text.field] if text.field != "text" else []
    prep = ["data_prep"]
    corpus = str(places.corpus)
    return [
        [*prep, "collect", "--out", corpus, *source],
        [
            *[*prep, "tokenizer", "--input", corpus, "--vocab-size", str(text.vocab_size)],
            *["--out", str(places.tokenizer)],
        ],
        [
            *[*prep, "build", "--input", corpus, "--tokenizer", str(places.tokenizer)],
            *["--out", str(places.shards), "--seq-len", str(seq_len)],
            *["--valid-fraction", str(VALID_FRACTION), "--shard-mb", str(SHARD_MB)],
        ],
        [*prep, "baselines", str(places.shards), "--out", str(places.baselines)],
    ]


def train_command(
    places: Places, model: str, steps: int, nproc: int, text: Text = Text()
) -> list[str]:
    """The training run."""
    config = load_config(config_path(model))
    command = ["pretrain", "launch", str(config_path(model)), "--nproc", str(nproc)]
    if nproc % config.layout.tensor:
        command += ["--layout.tensor", "1", "--layout.sequence", "false"]
    command += ["--run.dir", str(places.run), "--run.steps", str(steps)]
    command += ["--data.path", str(places.shards)]
    if text.vocab_size != config.model.vocab_size:
        command += ["--model.vocab_size", str(text.vocab_size)]
    warmup = config.schedule.warmup_steps
    if warmup > steps // 2:  # a very short run still wants a falling learning rate
        command += ["--schedule.warmup_steps", str(steps // 2)]
    return command


def result_commands(places: Places, text: Text) -> list[list[str]]:
    """What is done with the newest checkpoint of the run."""
    run, export = str(places.run), str(places.run / EXPORT_DIR)
    commands = [
        ["xlstm_mcore.convert", "to-hf", run, export, "--no-verify"],
        ["xlstm_mcore.convert", "verify", run, export],
    ]
    prompts = PYTHON_PROMPTS if text.data is None else ("",)
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    commands += [
        ["pretrain", "generate", run, *asked, "--out", str(places.run / SAMPLE_FILE)],
        ["pretrain", "report", run, "--baselines", str(places.baselines)],
    ]
    return commands


def make_command(model: str, steps: int, text: Text, work: str, nproc: int | None) -> str:
    """The call of make that runs this demo with another number of steps."""
    given = {
        "MODEL": (model, "large"),
        "DATA": (text.data, None),
        "TEXT_FIELD": (text.field, "text"),
        "VOCAB": (str(text.vocab_size), "8192"),
        "WORK": (work, "runs/demo"),
    }
    words = [f"{k}={shlex.quote(v)}" for k, (v, usual) in given.items() if v and v != usual]
    words += [f"NPROC={nproc}"] * (nproc is not None)
    return " ".join(["make pretrain", *words, f"STEPS={steps}"])


def shown(command: list[str]) -> str:
    """A command as a person would type it."""
    words = [f"$'{w[:-1]}\\n'" if w.endswith("\n") else shlex.quote(w) for w in command]
    return " ".join([program("python"), "-m", *words])


@dataclass
class Runner:
    """Runs one command at a time and lets signals through to it.

    Ctrl-C at a terminal reaches the command directly; other ways to signal the demo do not, and
    then it passes the signal on. It always waits for its command to end.

    Attributes:
        stopped_by: the last signal it got.
    """

    stopped_by: int | None = None
    _child: subprocess.Popen | None = None
    _previous: dict = field(default_factory=dict)

    def __enter__(self) -> "Runner":
        self._previous = install(self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        restore(self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        if self._child is None or self._child.returncode is not None:
            return
        if number == signal.SIGINT and _in_foreground():
            return  # the terminal has told the child already
        self._child.send_signal(number)

    def run(self, command: list[str]) -> int:
        """Run `python -m COMMAND` to its end; returns an exit code, also for a killed child."""
        if self.stopped_by is None:
            self._child = subprocess.Popen([sys.executable, "-m", *command])
            code = self._child.wait()
        else:
            code = ExitCode.DONE
        if code < 0:
            if self.stopped_by is None:
                print(f"killed by {signal.Signals(-code).name}", file=sys.stderr)
                return ExitCode.BUG
            code = ExitCode.STOPPED
        if code in (ExitCode.DONE, ExitCode.SECOND_INTERRUPT) and self.stopped_by is not None:
            # Asked to stop when a stage was nearly over, or in a stage without an exit code for it.
            return ExitCode.STOPPED if code == ExitCode.DONE else code
        return code


def _in_foreground() -> bool:
    """Whether a terminal's Ctrl-C goes to our process group."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False  # no terminal at all
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _say(text: str) -> None:
    print(text, flush=True)


def run_all(runner: Runner, commands: list[list[str]]) -> int:
    """Print and run commands until one does not end with 0; returns the last exit code."""
    for command in commands:
        _say(f"\n=== {TITLES[command[1]]}\n$ {shown(command)}")
        started = time.monotonic()
        code = runner.run(command)
        if code != ExitCode.DONE:
            if code == ExitCode.STOPPED:
                _say("stopped; the same command continues from here")
            return code
        _say(f"({time.monotonic() - started:.0f} s)")
    return ExitCode.DONE


def main(
    *,
    model: str = "large",
    steps: int = 200,
    data: str | None = None,
    text_field: str = "text",
    vocab_size: int = 8192,
    work: str,
    nproc: int | None = None,
) -> int:
    """Run every stage.

    Args:
        model: "large" (7B-style blocks) or "classic" (mLSTM and sLSTM blocks at [3:1]).
        steps: optimizer steps of the training run.
        data: a file, folder or glob of text; None for the Python standard library's sources.
        text_field: field or column of the text.
        vocab_size: ids of the tokenizer.
        work: folder for everything that the demo makes.
        nproc: number of training processes; None for two, or one where there is one GPU.

    Returns:
        The exit code of the first stage that does not end with 0, or 0.

    Raises:
        ConfigError: `steps` or `nproc` is below 1, the path of the data is empty, the processes do
            not divide the vocabulary, or the run that is there has
            done more steps.
    """
    text = Text(data, text_field, vocab_size)
    for name, value in (("--steps", steps), ("--nproc", nproc)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is too small; use 1 or more")
    if data is not None and not data.strip():
        raise ConfigError("--data is empty; give a file, a folder or a glob, or leave it out")
    # Before minutes go into the data: the model has a row for every id, and splits them.
    config = load_config(config_path(model), {"model.vocab_size": vocab_size})
    places = Places.of(Path(work), model, text)
    progress = read_progress(places.run)
    if progress is not None and (progress.checkpoint_step or 0) > steps:
        done = progress.checkpoint_step or 0
        raise ConfigError(
            f"--steps={steps} (STEPS of make), but the run in {places.run} has done {done} steps "
            f"already; use {make_command(model, done, text, work, nproc)} or more, or another WORK"
        )
    started = time.monotonic()
    with Runner() as runner:
        commands = data_commands(places, text, config.data.seq_len)
        processes = nproc or (1 if count_gpus() == 1 else 2)
        commands.append(train_command(places, model, steps, processes, text))
        code = run_all(runner, commands)
        if code != ExitCode.DONE:
            return code
        code = run_all(runner, result_commands(places, text))
    if code == ExitCode.DONE:
        minutes = (time.monotonic() - started) / 60
        _say(f"\nall done in {minutes:.1f} minutes; the summary is in {places.run}/summary.txt")
        _say(f"to train further: {make_command(model, 2 * steps, text, work, nproc)}")
    return code
