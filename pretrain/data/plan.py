"""The data of a run as one function: global sample number -> row of a source.

    sample --Blend--> (source, sample index) --Order--> row --TokenDataset--> tokens

Every stage is a pure function of the seed, so a run continues anywhere, on any number of processes,
and nothing but the sample number is stored. The plan also describes itself (`describe`).
Checkpoints keep that description, and a checkpoint with another description is refused. Where the
change is meant (`checkpoint.accept_changes: cursor.plan`), the run continues with what the new plan
says about the next sample number, as if it had been the plan from the start. Rows may then be met
again before their epoch is over. A phase that begins later does not change the description, and
repeats nothing.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from pretrain.config.data_section import DataConfig, SourceConfig, ValidConfig
from pretrain.data.blend import Blend, Phase
from pretrain.data.cache import CacheSettings
from pretrain.data.dataset import DataError, NoRowsError, Rows, TokenDataset, read_rows
from pretrain.data.order import Order, RowOrder, WindowOrder, derive_seed
from xlstm_io.shards.manifest import Manifest
from xlstm_io.storage import absolute

# What a job has on the disk of its node: folders by the paths that the run file names, as JSON, and
# the folder for copies of remote shards.
COPIES_VARIABLE = "XLSTM_DATA_COPIES"
CACHE_VARIABLE = "XLSTM_DATA_CACHE"
_UNLIMITED = 1 << 20
_OPEN_WHEN_READ_IN_ORDER = 2  # shards of a validation set
_SAME = ("tokenizer.sha256", "dtype", "bos_id", "eos_id", "pad_id")


class DataPlan:
    """Sources, how they are mixed and how each is shuffled.

    Args:
        sources: Datasets by name. A source's name, with the seed, decides the order of its rows;
            the order of the mapping does not matter.
        phases: The mixture; the first phase starts at sample 0.
        seed: The run's data seed.
        shuffle: "row" or "window".
        window_shards: Shards per window of "window".

    Raises:
        DataError: Sources have different tokenizers or token types; the message names both.
    """

    def __init__(
        self,
        sources: dict[str, TokenDataset],
        phases: Sequence[Phase],
        *,
        seed: int,
        shuffle: str = "row",
        window_shards: int = 16,
    ) -> None:
        self.names = sorted(sources)
        self.datasets = [sources[name] for name in self.names]
        _check_alike(self.datasets)
        self.seed, self.shuffle, self.window_shards = seed, shuffle, window_shards
        self._blend = Blend(self.names, phases, seed)
        self._orders: list[Order] = []
        most_open = max(1, _descriptors() // len(self.names))
        for name, dataset in zip(self.names, self.datasets, strict=True):
            own = derive_seed(seed, "source", name) if name else seed
            # A batch may lie in two windows.
            wanted = 2 * window_shards if shuffle == "window" else dataset.max_open
            dataset.max_open = min(wanted, most_open)
            if shuffle == "window":
                self._orders.append(WindowOrder(dataset.shard_rows, window_shards, own))
            else:
                self._orders.append(RowOrder(dataset.num_rows, own))

    @classmethod
    def of(cls, dataset: TokenDataset, *, seed: int, **options: Any) -> DataPlan:
        """The plan of a run on one dataset, which is what `data.path` means."""
        return cls({"": dataset}, [Phase(0, {"": 1.0})], seed=seed, **options)

    @property
    def manifest(self) -> Manifest:
        """The manifest of the first source. Tokenizer and special ids are the same in all."""
        return self.datasets[0].manifest

    @property
    def num_rows(self) -> int:
        """Rows of all sources together."""
        return sum(dataset.num_rows for dataset in self.datasets)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which row of which source each sample is.

        Args:
            samples: Int64 array of global sample numbers, from 0.

        Returns:
            The source (its place in `names`) and the row: two int64 arrays of the shape of
            `samples`.
        """
        which, indices = self._blend.locate(samples)
        rows = np.empty_like(indices)
        for number in np.unique(which).tolist():
            here = which == number
            rows[here] = self._orders[number].rows(indices[here])
        return which, rows

    def read(self, which: np.ndarray, rows: np.ndarray) -> Rows:
        """Read the rows that `locate` found; see `TokenDataset.read` for errors."""
        return read_rows(self.datasets, which, rows)

    @property
    def source_names(self) -> list[str]:
        """The sources by which losses are told apart; none where all rows are of one source.

        Those of a mixture, or those of the folder that `data.path` names.
        """
        names = self.names if len(self.names) > 1 else self.datasets[0].sources
        return names if len(names) > 1 else []

    def sources_of(self, which: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Place in `source_names` of the source of each row that `locate` found."""
        return which if len(self.names) > 1 else self.datasets[0].sources_of(rows)

    def epochs(self, consumed: int) -> dict[str, float]:
        """How many passes over each source the first `consumed` samples make."""
        samples = self._blend.samples_of_sources(consumed)
        sizes = {n: d.num_rows for n, d in zip(self.names, self.datasets, strict=True)}
        return {name: samples[name] / sizes[name] for name in self.names}

    def summary(self, consumed: int) -> str:
        """One line about the sources and the shuffle, at the phase of sample `consumed`."""
        parts = []
        shares, epochs = self._blend.shares_at(consumed), self.epochs(consumed)
        for name, dataset in zip(self.names, self.datasets, strict=True):
            share = f"{name} {shares.get(name, 0.0):.2%} of " if name else ""
            parts.append(f"{share}{dataset.num_rows:,} rows, epoch {epochs[name]:.2f}")
        how = "rows of all shards mixed"
        if self.shuffle == "window":
            how = f"rows of {self.window_shards} shards mixed at a time"
        files = sum(min(d.max_open, len(d.shard_rows)) for d in self.datasets)
        return f"{'; '.join(parts)}; {how}, at most {files} files open in each process"

    def describe(self, consumed: int) -> dict[str, Any]:
        """All that the first `consumed` samples (at least one) depend on, as plain values.

        Two plans with the same description up to a sample agree on every sample before it. Phases
        that start later, and sources that only those use, are left out: a run may add them.
        """
        used = [p for p in self._blend.phases if p.from_sample < max(consumed, 1)]
        names = {name for phase in used for name in phase.weights}
        window = {"window_shards": self.window_shards} if self.shuffle == "window" else {}
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            **window,
            "sources": {
                name or "path": {
                    "manifest": dataset.manifest.hash,
                    "source": dataset.source,
                    "rows": dataset.num_rows,
                }
                for name, dataset in zip(self.names, self.datasets, strict=True)
                if name in names
            },
            "phases": {
                str(phase.from_sample): self._blend.shares(number)
                for number, phase in enumerate(used)
            },
        }


def _descriptors() -> int:
    """Files that the training data may keep open: half of what the process may.

    Not counted are those that are connections to other ranks, whether they are there yet or not.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    others = dist.get_world_size() - 1 if dist.is_available() and dist.is_initialized() else 0
    return _UNLIMITED if limit == resource.RLIM_INFINITY else (limit - others) // 2


def _check_alike(datasets: Sequence[TokenDataset]) -> None:
    """Raise DataError unless all datasets hold ids of one tokenizer in one type."""

    def value(dataset: TokenDataset, key: str) -> Any:
        found: Any = dataset.manifest
        for part in key.split("."):
            found = getattr(found, part)
        return found

    problems: list[str] = []
    root = datasets[0].manifest.root
    for dataset in datasets[1:]:
        for key in _SAME:
            mine, first = value(dataset, key), value(datasets[0], key)
            if mine != first:
                problems.append(f"{root} has {key}={first}, {dataset.manifest.root} has {mine}")
                break  # another tokenizer has other ids too
    if problems:
        raise DataError(
            "all data of a run must hold ids of one tokenizer; build them with the same "
            "--tokenizer:\n  " + "\n  ".join(problems)
        )


def open_plan(data: DataConfig, seed: int, *, check_files: bool = True) -> DataPlan:
    """The training data that the section `data` of a run file describes.

    Args:
        data: The section.
        seed: The run's data seed.
        check_files: See `TokenDataset`.

    Raises:
        DataError: Something is wrong; the message lists the problems of all sources.
    """
    sources: dict[str, TokenDataset] = {}
    problems: list[str] = []
    for item in data.mixture:
        try:
            sources[item.name] = _open(data, item, "train", check_files)
        except DataError as error:
            place = f"source {item.name!r}: " if item.name else "data.path: "
            problems.append(f"{place}{error}")
    if problems:
        raise DataError("\n".join(problems))
    return DataPlan(
        sources,
        list(_phases(data)),
        seed=seed,
        shuffle=data.shuffle,
        window_shards=data.window_shards,
    )


def open_valid(
    data: DataConfig, plan: DataPlan | None = None, *, check_files: bool = True
) -> dict[str, TokenDataset]:
    """The sets to evaluate on, by name: `data.valid`, or the validation split of every source.

    Sources without validation rows are left out, as long as there are others.

    Args:
        data: The section `data` of a run file. With `on_corrupt: quarantine` the sets give damaged
            rows as padding without a loss, as the training data do.
        plan: The training data, whose tokenizer the sets must share; None if there is none.
        check_files: See `TokenDataset`.

    Raises:
        DataError: Something is wrong, or there are no rows at all; the message lists the problems
            of all sets.
    """
    given = data.valid or data.mixture
    sets: dict[str, TokenDataset] = {}
    problems: list[str] = []
    for item in given:
        try:
            sets[item.name] = _open(data, item, "valid", check_files)
            sets[item.name].max_open = _OPEN_WHEN_READ_IN_ORDER
        except NoRowsError as error:
            if data.valid:
                problems.append(f"data.valid {item.name!r}: {error}")
        except DataError as error:
            problems.append(f"data.valid {item.name!r}: {error}" if item.name else str(error))
    if not sets and not problems:
        problems = [f"{given[0].path}: no source has validation rows; build with --valid-fraction"]
    if problems:
        raise DataError("\n".join(problems))
    _check_alike([*(plan.datasets if plan else ()), *sets.values()])
    return sets


def _open(
    data: DataConfig, item: SourceConfig | ValidConfig, split: str, check_files: bool
) -> TokenDataset:
    """One dataset, from a copy on the node's own disk where the job has made one.

    A job says so in its environment: what the run file names stays as it is, in the configuration
    of checkpoints too, where nobody could use the disk of a node.
    """
    cache_dir = data.cache_dir and os.environ.get(CACHE_VARIABLE, data.cache_dir)
    cache = CacheSettings(absolute(cache_dir), int(data.cache_gb * 1e9)) if cache_dir else None
    return TokenDataset(
        item.path,
        split,
        seq_len=data.seq_len,
        source=item.source,
        quarantine=data.on_corrupt == "quarantine",
        cache=cache,
        copy=json.loads(os.environ.get(COPIES_VARIABLE, "{}")).get(item.path),
        check_files=check_files,
    )


def _phases(data: DataConfig) -> Iterable[Phase]:
    yield Phase(0, {item.name: item.weight for item in data.mixture if item.weight is not None})
    for phase in data.phases:
        yield Phase(phase.from_sample, dict(phase.weights))
