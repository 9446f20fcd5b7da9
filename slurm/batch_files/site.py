"""The site file: what a cluster is like, written once for all runs.

Looked for at `--site`, `$XLSTM_SITE`, `./site.yaml` and `~/.config/xlstm/site.yaml`, in this order.
Nothing is guessed: a key that is not set is not passed to Slurm. The docstring under a field is
part of its error message.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from xlstm_io.errors import UserError
from xlstm_io.field_errors import rule_of
from xlstm_io.foreign.yaml_file import YAMLTextError, parse_yaml, read_yaml

VARIABLE = "XLSTM_SITE"
PLACES = ("site.yaml", "~/.config/xlstm/site.yaml")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class SiteError(UserError):
    """One or more things are wrong with a site file; the message lists all of them."""


def time_limit_seconds(text: str) -> int:
    """Seconds of one of Slurm's time limits: `90`, `1:30:00`, `2-12`, `2-12:00:00`.

    Raises:
        ValueError: it is something else.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError("must be one of Slurm's times, such as 12:00:00 or 2-00:00:00")
    days, first, second, third = (int(part) if part else None for part in match.groups())
    assert first is not None
    if days is not None:
        hours, minutes, seconds = first, second or 0, third or 0
    elif third is not None:
        hours, minutes, seconds = first, second or 0, third
    else:
        hours, minutes, seconds = 0, first, second or 0
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _time(text: str) -> str:
    time_limit_seconds(text)
    return text


def _text(value: object) -> object:
    if isinstance(value, int):
        raise ValueError('must be in quotes, as "12:00:00": YAML takes it for a number')
    return value


def _one_line(text: str) -> str:
    if "\n" in text:
        raise ValueError("must be one line")
    return text


def _option(text: str) -> str:
    if not text.startswith("--"):
        raise ValueError("must be an option of sbatch in its long form, such as --comment=x")
    return _one_line(text)


def _variables(values: dict[str, str]) -> dict[str, str]:
    for name in values:
        if not _NAME.fullmatch(name):
            raise ValueError(f"has the key {name!r}, which is not a name of a variable")
    return values


Line = Annotated[str, Field(min_length=1), AfterValidator(_one_line)]
Time = Annotated[str, BeforeValidator(_text), AfterValidator(_time)]
Option = Annotated[str, AfterValidator(_option)]
Variables = Annotated[dict[str, Line], AfterValidator(_variables)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Container(_Section):
    """The container of the ranks; Slurm's own commands always run outside of it."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """How containers are started."""
    image: Line | None = None
    """The image, as pyxis or apptainer names it."""
    mounts: list[Line] = []
    """Folders to mount, as `outside:inside`; the run folder and the working folder are added."""
    workdir: Line | None = None
    """The working folder inside; that of the submission if it is not set."""
    flags: list[Line] = []
    """Further words for `srun` (pyxis) or `apptainer exec`."""
    python: Line = "python3"
    """The interpreter inside that has this package."""


class Network(_Section):
    """How the ranks find each other."""

    interface: Line | None = None
    """Network interface for gloo and NCCL, such as ib0."""
    env: Variables = {}
    """Further variables, such as NCCL_IB_HCA."""


class Signal(_Section):
    """The signal before the time limit, upon which the run saves."""

    name: Literal["USR1", "USR2", "TERM"] = "USR1"
    """Its name."""
    seconds: Literal["auto"] | Count = "auto"
    """How long before; auto: at least 120, and a run with slow saves stops earlier by itself."""


class Restarts(_Section):
    """The limits of restarting by itself; see `slurm.job.state.Policy`."""

    without_progress: Count = 3
    """Lives in a row without a newer checkpoint, at most."""
    total: Count = 100
    """Lives of a run, at most."""
    wait_minutes: list[Annotated[int, Field(ge=0)]] = [0, 1, 5]
    """Waits after one, two, ... lives without a newer checkpoint."""
    max_excluded: Count | None = None
    """Nodes that may be left out; a tenth of the job's nodes, and at least 2, if it is not set."""


class FreeSpace(_Section):
    """Free gigabytes."""

    run: Annotated[float, Field(ge=0)] = 50.0
    """Where the run lies."""
    scratch: Annotated[float, Field(ge=0)] = 20.0
    """On the node's own disk, where there is one."""


class Stage(_Section):
    """What each node copies to its own disk (`scratch`) before the ranks start."""

    data: bool = False
    """The folders of shards."""
    venv: bool = False
    """The virtual environment of `python`, so that a thousand ranks do not import from one disk."""


class HealthSection(_Section):
    """Checks of the nodes before every life; see `slurm.job.preflight`."""

    preflight: bool = False
    """Whether they are made."""
    command: Line | None = None
    """A command that must succeed on every node, such as `dcgmi diag -r 2`."""
    min_gemm_tflops: Annotated[float, Field(gt=0)] | None = None
    """Speed that a matrix product in bf16 must have."""
    min_allreduce_gbs: Annotated[float, Field(gt=0)] | None = None
    """Gigabytes per second that an all-reduce between two nodes must reach."""
    max_clock_skew_s: Annotated[float, Field(gt=0)] = 2.0
    """Seconds by which a node's clock may differ."""
    min_free_gb: FreeSpace = FreeSpace()
    """Free space that must be there."""


class Site(_Section):
    """A cluster."""

    partition: Line
    """Partition of the jobs."""
    name: Line = "site"
    """Name of the cluster, for people."""
    account: Line | None = None
    """Account that is charged."""
    qos: Line | None = None
    """Quality of service."""
    reservation: Line | None = None
    """Reservation."""
    constraint: Line | None = None
    """Features that the nodes must have."""
    time: Time = "24:00:00"
    """Time limit of a job."""
    mail: Line | None = None
    """Address that hears of the job's end and failure."""
    nice: int | None = None
    """Lowers the priority."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs of a node; 0 for a site without GPUs."""
    tasks_per_node: Count | None = None
    """Ranks of a node; as many as it has GPUs, or one, if it is not set."""
    gres: Line | None = None
    """In place of --gpus-per-node, such as gpu:a100:4."""
    cpus_per_task: Count | None = None
    """Cores of a rank."""
    mem: Line | None = None
    """Memory of a node; 0 for all of it."""
    exclusive: bool = True
    """Whether the job has its nodes for itself."""
    modules: list[Line] = []
    """Environment modules to load; all others are unloaded first."""
    setup: list[Line] = []
    """Lines of bash that prepare the environment."""
    python: Line | None = None
    """Python 3.11 or newer outside of a container; that of the submission if it is not set."""
    container: Container = Container()
    network: Network = Network()
    env: Variables = {}
    """Variables of the ranks."""
    scratch: Line | None = None
    """Folder on the node's own disk, for compiled kernels and cached data; cleared at the end."""
    stage: Stage = Stage()
    requeue: Literal["requeue", "chain", "never"] = "requeue"
    """How a run goes on: the same job again, the next job of a chain, or not by itself."""
    signal: Signal = Signal()
    restarts: Restarts = Restarts()
    health: HealthSection = HealthSection()
    extra_sbatch: list[Option] = []
    """Further options of sbatch; none that a key above sets."""


def find_site(given: str | None) -> Path:
    """The site file to use.

    Raises:
        SiteError: there is none at any of the places.
    """
    if given is not None:
        return Path(given)
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    for place in PLACES:
        if Path(place).expanduser().is_file():
            return Path(place).expanduser()
    raise SiteError(
        f"no site file: give --site FILE, set ${VARIABLE}, or write {' or '.join(PLACES)}; it "
        "needs at least the key partition (docs/slurm.md)"
    )


def load_site(given: str | None, settings: Sequence[str] = ()) -> Site:
    """Read a site file.

    Args:
        given: its path; None to look at the usual places.
        settings: `KEY=VALUE` words that replace keys of the file, such as `container.kind=pyxis`.

    Raises:
        SiteError: every bad key, in one message.
    """
    path = find_site(given)
    raw = read_yaml(path, of="site file", example="partition:, gpus_per_node:", error=SiteError)
    for word in settings:
        _set(raw, word)
    return site_from_dict(raw, str(path))


def site_from_dict(raw: Mapping[str, Any], source: str) -> Site:
    """Validate the keys of a site; SiteError names every bad one."""
    try:
        return Site.model_validate(dict(raw))
    except ValidationError as error:
        lines = "\n".join(f"  - {_message(item)}" for item in error.errors())
        raise SiteError(f"{source}: {error.error_count()} problem(s)\n{lines}") from None


def _set(raw: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals:
        raise SiteError(f"--set {word} has no value; write --set {key}=VALUE")
    *sections, last = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise SiteError(f"--set {word}: {section} has no keys")
    try:
        value = parse_yaml(text)
    except YAMLTextError as error:
        raise SiteError(f"--set {word}: {error}") from None
    # A key of numbers takes them as text, too. YAML would take 2:00 for the number 120, and the
    # shell has removed the quotes.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    raw[last] = text if number else value


def _message(error: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors: key, value, rule, and what the key means."""
    parts = [str(part) for part in error["loc"]]
    key = ".".join(parts)
    model, field = _field(parts)
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(parts[-1], model.model_fields, n=1)
        known = f"did you mean {close[0]}?" if close else f"keys: {', '.join(model.model_fields)}"
        return f"{key} is not a key of a site file; {known}"
    if error["type"] == "missing":
        return f"{key} is missing; set it ({field})"
    rule = rule_of(error)
    return f"{key}={error['input']!r} {rule} ({field})" if field else f"{key} {rule}"


def _field(parts: Sequence[str]) -> tuple[type[BaseModel], str]:
    """The section of a key, and the help text of the key."""
    model: type[BaseModel] = Site
    text = ""
    for part in parts:
        field = model.model_fields.get(part)
        if field is None:
            break
        text = (field.description or "").removesuffix(".")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
    return model, text
