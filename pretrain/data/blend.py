"""Weighted mixtures: sample number -> (source, sample index within it), a pure function.

Samples come in cycles of `CYCLE` slots. Each cycle holds exactly the same number of slots of each
source, its quota: the weights' shares of the cycle, rounded so that they add up (largest remainder;
weights of up to four decimals are exact). One permuted table says which source each slot belongs to
and how many slots of that source came before it. So the sample index within a source is found in
closed form, the indices of a source follow one another without a gap, and memory is O(CYCLE)
whatever the length of the run.

*Phases* change the weights from a given sample on. A phase continues the indices of every source
where the phase before left them, also in the middle of a cycle: no row is skipped or repeated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.data.order import derive_seed, permute

CYCLE = 10_000


@dataclass(frozen=True)
class Phase:
    """A span of the run with one mixture.

    Attributes:
        from_sample: The global sample number at which it starts.
        weights: Weight of each source, by name; a source that is absent is not used.
    """

    from_sample: int
    weights: Mapping[str, float]


def quotas(weights: Sequence[float], cycle: int = CYCLE) -> list[int]:
    """Whole numbers in proportion to `weights` that add up to `cycle` (largest remainder)."""
    total = sum(weights)
    exact = [weight / total * cycle for weight in weights]
    whole = [int(share + 1e-9) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for place in by_remainder[: cycle - sum(whole)]:
        whole[place] += 1
    return whole


class _Table:
    """One phase: the source of each slot of its cycles."""

    def __init__(self, quota: Sequence[int], before: np.ndarray, seed: int) -> None:
        self.quota = np.array(quota, np.int64)
        self.before = before  # samples of each source before this phase
        bounds = np.cumsum(self.quota)
        self.only = int(np.flatnonzero(self.quota)[0]) if (self.quota > 0).sum() == 1 else None
        slots = permute(np.arange(CYCLE), CYCLE, seed=seed, epoch=0)
        self.source = np.searchsorted(bounds, slots, side="right").astype(np.int32)
        by_source = np.argsort(self.source, kind="stable")
        self.rank = np.empty(CYCLE, np.int32)
        self.rank[by_source] = np.arange(CYCLE) - (bounds - self.quota)[self.source[by_source]]

    def counts(self, samples: int) -> np.ndarray:
        """How many samples of each source `[sources]` come before sample `samples` of the phase."""
        cycle, slot = divmod(samples, CYCLE)
        begun = np.bincount(self.source[:slot], minlength=len(self.quota))
        return self.before + cycle * self.quota + begun

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sources, and indices within them, of samples counted from the start of the phase."""
        if self.only is not None:
            return np.full_like(samples, self.only), self.before[self.only] + samples
        cycle, slot = np.divmod(samples, CYCLE)
        source = self.source[slot].astype(np.int64)
        return source, self.before[source] + cycle * self.quota[source] + self.rank[slot]


class Blend:
    """A mixture of sources.

    The caller has checked that names are known, weights positive and phases in order
    (`pretrain.config.checks.data`).

    Args:
        names: Names of the sources.
        phases: Phases in order; the first starts at sample 0.
        seed: The run's data seed.
    """

    def __init__(self, names: Sequence[str], phases: Sequence[Phase], seed: int) -> None:
        self.names, self.phases = tuple(names), tuple(phases)
        self._starts = np.array([phase.from_sample for phase in phases], np.int64)
        before = np.zeros(len(names), np.int64)
        self._tables: list[_Table] = []
        for number, phase in enumerate(phases):
            if number:
                length = phase.from_sample - phases[number - 1].from_sample
                before = self._tables[-1].counts(length)
            quota = quotas([phase.weights.get(name, 0.0) for name in names])
            key = derive_seed(seed, "blend", phase.from_sample)
            self._tables.append(_Table(quota, before, key))

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which source each sample belongs to, and its index within the source.

        Args:
            samples: Int64 array of global sample numbers, from 0.

        Returns:
            The source (its place in `names`) and the index within it, from 0 over the whole run:
            two int64 arrays of the shape of `samples`.
        """
        samples = np.asarray(samples, np.int64)
        phase = np.searchsorted(self._starts, samples, side="right") - 1
        source, index = np.empty_like(samples), np.empty_like(samples)
        for number in np.unique(phase).tolist():
            here = phase == number
            found = self._tables[number].locate(samples[here] - self._starts[number])
            source[here], index[here] = found
        return source, index

    def shares(self, number: int) -> dict[str, float]:
        """The exact share of the samples that each source of phase `number` has."""
        quota = self._tables[number].quota.tolist()
        return {name: q / CYCLE for name, q in zip(self.names, quota, strict=True) if q}

    def shares_at(self, sample: int) -> dict[str, float]:
        """The shares at a sample number."""
        return self.shares(int(np.searchsorted(self._starts, sample, side="right")) - 1)

    def samples_of_sources(self, consumed: int) -> dict[str, int]:
        """How many of the first `consumed` samples each source gave."""
        number = int(np.searchsorted(self._starts, consumed, side="right")) - 1
        counts = self._tables[number].counts(consumed - int(self._starts[number]))
        return dict(zip(self.names, counts.tolist(), strict=True))
