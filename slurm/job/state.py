"""What the Slurm jobs of a run leave for the next one, in `RUN/slurm`.

    state.json      every life of the run, and the nodes that are left out; replaced as a whole
    story.jsonl     what happened, one line each; only appended to
    policy.json     the limits of restarting; written by `submit`, may be edited
    run.yaml        the run file of the job, with every key
    health.json     what the preflight asks of a node, where there is one
    STOP            asks for a stop without a restart
    train.sbatch    the batch file, which each further job of the run is submitted from
    job/            the files that the batch script needs, copied at submission
    life-000007/    logs and records of the ranks of a life

A *life* is here one start of the batch script that reached the training step. The job's side of
this package imports the standard library alone, so that it also runs on a host whose Python has
nothing of the run's environment.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from xlstm_io.errors import UserError
from xlstm_io.remote import masked, masked_values

FOLDER = "slurm"
CHECKPOINTS_FOLDER = "checkpoints"  # as in xlstm_io.checkpoint.manifest, which needs torch
BATCH_FILE = "train.sbatch"
POLICY_FILE = "policy.json"
STOP_FILE = "STOP"
HEALTH_FILE = "health.json"
RUN_FILE = "run.yaml"
SUMMARY_FILE = "summary.json"  # of the run folder, as in pretrain.run_folder
LONGEST = 300  # characters of a line that is shown


@dataclass(frozen=True)
class Policy:
    """The limits of restarting a run.

    Attributes:
        steps: of the whole run.
        checkpoints: folder of its checkpoints; None when they lie on an object store.
        mode: "requeue", "chain" (a new job that waits for this one), or "never".
        without_progress: lives in a row that end without a newer checkpoint, at most.
        total: lives at most.
        waits: seconds before the next life after one, two, ... lives without progress.
        max_excluded: nodes that may be left out.
        stops_in_time: whether a life is told when its job ends, and stops before that by itself.
    """

    steps: int
    checkpoints: str | None = None
    mode: str = "requeue"
    without_progress: int = 3
    total: int = 100
    waits: tuple[int, ...] = (0, 60, 300)
    max_excluded: int = 2
    stops_in_time: bool = False


@dataclass(frozen=True)
class Life:
    """One life of a run.

    Attributes:
        number: counts from 1 over all jobs of the run.
        job: Slurm job.
        restart: how often Slurm had requeued that job.
        nodes: names.
        began, ended: seconds since 1970; `ended` is None while the life is at work.
        start_step: step of the newest complete checkpoint when it began.
        checkpoint_step: the same when it ended.
        last_step: steps done when it ended, saved or not.
        cause: why it ended, a value of `slurm.job.decide.Cause`.
        reason: the same in a sentence.
        node: the node that is to blame, or "".
        last_line: the last line of the first rank that failed, or "".
        action: what was decided, a value of `slurm.job.decide.Action`.
        step_id: the highest Slurm step id in which ranks ran; -1 when that is not known.
    """

    number: int
    job: str
    restart: int
    nodes: tuple[str, ...]
    began: float
    start_step: int
    ended: float | None = None
    checkpoint_step: int = 0
    last_step: int = 0
    cause: str = ""
    reason: str = ""
    node: str = ""
    last_line: str = ""
    action: str = ""
    step_id: int = -1

    @property
    def progressed(self) -> bool:
        """Whether it left a newer checkpoint."""
        return self.checkpoint_step > self.start_step

    @property
    def seconds(self) -> float:
        """How long it lasted; 0 while it is at work."""
        return 0.0 if self.ended is None else self.ended - self.began


@dataclass(frozen=True)
class State:
    """Everything that is known about the Slurm side of a run.

    Attributes:
        lives: in order.
        excluded: nodes that are left out, with the reason.
        verdict: why no further life is to start, or "".
        job: the job that was submitted last, or "". In a chain this is the one that waits.
        since: number of the last life before a person submitted the run or let it go on; the limits
            of restarting count later ones.
    """

    lives: tuple[Life, ...] = ()
    excluded: dict[str, str] = field(default_factory=dict)
    verdict: str = ""
    job: str = ""
    since: int = 0

    @property
    def jobs(self) -> list[str]:
        """The jobs that may have the run: that of the last life, and the last one submitted."""
        last = [life.job for life in self.lives[-1:]]
        return list(dict.fromkeys([*last, *([self.job] if self.job else [])]))

    def with_life(self, life: Life) -> "State":
        """This state with a life added, or replaced when its number is known."""
        lives = {one.number: one for one in (*self.lives, life)}
        return replace(self, lives=tuple(lives[number] for number in sorted(lives)))


@dataclass(frozen=True)
class RankRecord:
    """How a rank ended, as `slurm/job/rank.py` wrote it.

    Attributes:
        rank: its number.
        host: its node.
        step_id: Slurm's number of the step.
        code: exit code, negative for the signal that ended it; None when it never ended by itself.
        began, time: when it began, and when it ended, in seconds since 1970.
        tail: the last lines of its log.
        xids: numbers of the GPU driver's Xid messages since it began.
        out_of_memory: whether the kernel ended a process of the job for lack of memory.
    """

    rank: int
    host: str
    step_id: int
    code: int | None = None
    began: float = 0.0
    time: float = 0.0
    tail: tuple[str, ...] = ()
    xids: tuple[int, ...] = ()
    out_of_memory: bool = False

    @property
    def last_line(self) -> str:
        """The last line of the log that is not empty, or ""; cut where it is very long."""
        return next((line[:LONGEST] for line in reversed(self.tail) if line.strip()), "")


class RunState:
    """The files of this module in one run folder.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / FOLDER

    def load(self) -> State:
        """The state; an empty one before the first life.

        Raises:
            UserError: the file is not what was written.
        """
        path = self.folder / "state.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            lives = tuple(
                _checked(Life(**{**life, "nodes": tuple(life["nodes"])})) for life in raw["lives"]
            )
            excluded, since = dict(raw["excluded"]), raw.get("since", 0)
            return _checked(State(lives, excluded, raw["verdict"], raw["job"], since))
        except FileNotFoundError:
            return State()
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged ({error!r}); rename the folder {self.folder} and submit again"
            ) from error

    def save(self, state: State) -> None:
        """Replace the state."""
        write(self.folder / "state.json", asdict(state))

    def tell(self, event: str, text: str, **more: Any) -> None:
        """Append to the story, without credentials of URLs."""
        line = {"time": round(time.time(), 1), "event": event, "text": text, **more}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "story.jsonl", "a", encoding="utf-8") as file:
            file.write(masked(json.dumps(line)) + "\n")

    def policy(self) -> Policy:
        """The limits.

        Raises:
            UserError: there is no readable file of them.
        """
        path = self.folder / POLICY_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return Policy(**{**raw, "waits": tuple(raw["waits"])})
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error!r}); python -m slurm submit train writes it"
            ) from error

    def save_policy(self, policy: Policy) -> None:
        """Write the limits."""
        write(self.folder / POLICY_FILE, asdict(policy))

    @property
    def stop_requested(self) -> bool:
        """Whether somebody asked for a stop without a restart."""
        return (self.folder / STOP_FILE).exists()

    def life_folder(self, number: int) -> Path:
        """Where the records of a life lie."""
        return self.folder / f"life-{number:06d}"

    def records(self, number: int) -> list[RankRecord]:
        """The records of a life's ranks, by rank; one that is damaged counts as missing."""
        found = []
        for path in sorted(self.life_folder(number).glob("rank-*.json")):
            try:
                raw = json.loads(path.read_text(encoding="utf-8"))
                raw |= {"tail": tuple(raw["tail"]), "xids": tuple(raw["xids"])}
                found.append(RankRecord(**raw))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def newest_step(self, policy: Policy) -> int:
        """The step of the newest complete checkpoint that counts; 0 when there is none.

        One that a later life has left behind, or a rewind, does not count for the trainer either.
        """
        if policy.checkpoints is None:
            return int(self.progress().get("checkpoint_step") or 0)
        folder = Path(policy.checkpoints)
        starts = starts_of_lives(folder)
        for name in sorted(names_of_checkpoints(folder), reverse=True):
            step = step_that_counts(folder / name, starts)
            if step is not None:
                return step
        return 0

    def progress(self) -> dict[str, Any]:
        """What the trainer's `progress.json` says; empty when there is none."""
        return read_json(self.run / "progress.json")

    def finished(self, steps: int) -> bool:
        """Whether the run, which has so many steps, is finished."""
        return int(read_json(self.run / SUMMARY_FILE).get("steps", -1)) >= steps


_Record = TypeVar("_Record", Life, State)


def _checked(record: _Record) -> _Record:
    """A record whose fields have the types that they were written with; TypeError otherwise."""
    kinds = {"int": (int,), "float": (int, float), "float | None": (int, float, type(None))}
    for one in fields(record):
        value = getattr(record, one.name)
        kind = str(getattr(one.type, "__name__", one.type))
        if not isinstance(value, kinds.get(kind, (str, tuple, dict))):
            raise TypeError(f"{one.name}={value!r}")
    return record


def read_preflight(life_folder: Path) -> tuple[dict[str, str], str]:
    """What a life's preflight found: bad nodes with the reason, and why no node is fit, or ""."""
    found = read_json(life_folder / "preflight.json")
    return dict(found.get("bad_nodes", {})), str(found.get("failed", ""))


def write(path: Path, value: Any) -> None:
    """Replace a JSON file at once, so that no reader and no crash finds half of it.

    Credentials in URLs are masked: others can read the run folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{os.uname().nodename}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(masked_values(value), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty where there is none that can be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def names_of_checkpoints(folder: Path) -> list[str]:
    """Names of the folders of a run's checkpoints, whatever their state, in no order."""
    return [name for name in _names(folder) if name.startswith("step-")]


def step_that_counts(checkpoint: Path, starts: Mapping[int, int]) -> int | None:
    """The step of a complete checkpoint; None where it is not, or a later life has left it behind.

    Args:
        checkpoint: its folder.
        starts: see `starts_of_lives`.
    """
    manifest = read_json(checkpoint / "manifest.json")
    try:
        step, life = int(manifest["step"]), int(manifest.get("state", {}).get("life", 0))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # an attempt that was cut short
    left_behind = any(start < step for number, start in starts.items() if number > life)
    return step if manifest.get("complete") is True and not left_behind else None


def starts_of_lives(checkpoints: Path) -> dict[int, int]:
    """The step from which each life of the run went on, by its number, as the trainer counts them.

    `xlstm_io.checkpoint.lives` writes these records, and needs more than the standard library.
    """
    starts = {}
    for name in _names(checkpoints / "lives"):
        start = read_json(checkpoints / "lives" / name).get("start_step")
        number = name.removesuffix(".json")
        if number.isdecimal() and isinstance(start, int):
            starts[int(number)] = start
    return starts


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
