"""The keys of the section `data:`, and what follows from them: mixture, folders, batches, ramp."""

from typing import Annotated, Literal

from pydantic import Field

from pretrain.config.ramp import BatchRamp
from xlstm_mcore.settings import (
    NonEmpty,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class SourceConfig(Section):
    """One corpus of a mixture."""

    name: Name
    """short name, for phases and logs; with the seed it decides the order of its rows"""
    path: NonEmpty
    """folder that `python -m data_prep build` wrote"""
    source: NonEmpty | None = None
    """one source of that folder; null for all of them"""
    weight: PositiveFloat | None = None
    """share of the samples, relative to the other sources; null until a phase names it"""


class PhaseConfig(Section):
    """A change of the mixture in the middle of a run."""

    from_sample: PositiveInt
    """first sample of the new mixture"""
    weights: Annotated[dict[str, PositiveFloat], Field(min_length=1)]
    """weight of each source from there on; a source that is left out is not used"""


class RampStage(Section):
    """Some steps with a smaller batch."""

    steps: PositiveInt
    """how many steps"""
    global_batch: PositiveInt
    """rows per optimizer step"""


class ValidConfig(Section):
    """One set to measure the loss on."""

    name: Name
    """short name, for the logs"""
    path: NonEmpty
    """folder whose validation split is used"""
    source: NonEmpty | None = None
    """one source of that folder; null for all of them"""


class DataConfig(Section):
    """Training data and batch: `path`, or a mixture of `sources`."""

    path: NonEmpty | None = None
    """folder that `python -m data_prep build` wrote"""
    sources: list[SourceConfig] = Field(default_factory=list)
    """weighted mixture, in place of path"""
    phases: list[PhaseConfig] = Field(default_factory=list)
    """changes of the mixture"""
    valid: list[ValidConfig] = Field(default_factory=list)
    """sets to evaluate on; [] for the validation split of every source"""
    seq_len: PositiveInt
    """tokens per row"""
    global_batch: PositiveInt
    """rows per optimizer step, over all processes"""
    micro_batch: PositiveInt
    """rows per forward pass of one process"""
    batch_ramp: list[RampStage] = Field(default_factory=list)
    """smaller batches at the start"""
    fill_batch: bool = False
    """rows without a loss fill a global batch that the replicas do not divide; they cost time"""
    shuffle: Literal["row", "window"] = "row"
    """row mixes all rows; window mixes those of a few files at a time, for slow storage"""
    window_shards: PositiveInt = 16
    """files per window of shuffle=window"""
    on_corrupt: Literal["raise", "quarantine"] = "raise"
    """a damaged block stops the run, or its rows keep their place and give no loss"""
    max_quarantined: PositiveInt = 1000
    """damaged rows of training that stop a run with on_corrupt=quarantine"""
    cache_dir: NonEmpty | None = None
    """folder on a local disk for copies of shards that paths with :// name (fsspec)"""
    cache_gb: PositiveFloat = 100.0
    """gigabytes of copies in cache_dir, shared by all processes of the machine"""
    workers: NonNegativeInt = 0
    """processes that read ahead for each training process; 0 reads ahead in a thread of it"""

    @property
    def mixture(self) -> list[SourceConfig]:
        """The sources; a plain `path` is a mixture of one, which has no name of its own."""
        if self.path is None:
            return self.sources
        only = SourceConfig.model_construct(name="", path=self.path, source=None, weight=1.0)
        return [only]

    @property
    def folders(self) -> list[tuple[str, str]]:
        """Every folder of shards that the run reads, with the key that names it."""
        if self.path is not None:
            found = [("data.path", self.path)]
        else:
            found = [(f"data.sources[{n}].path", s.path) for n, s in enumerate(self.sources)]
        return found + [(f"data.valid[{n}].path", v.path) for n, v in enumerate(self.valid)]

    @property
    def global_batches(self) -> list[tuple[str, int]]:
        """The size of every global batch of the run, after the place of the key that sets it."""
        stages = [(f"data.batch_ramp[{n}]", s.global_batch) for n, s in enumerate(self.batch_ramp)]
        return [*stages, ("data", self.global_batch)]

    @property
    def ramp(self) -> BatchRamp:
        """Samples of every step."""
        return BatchRamp(self.global_batch, [(s.steps, s.global_batch) for s in self.batch_ramp])
