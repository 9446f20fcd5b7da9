"""Validation loss of a checkpoint, whatever layout trained it.

In one process, or tensor parallel over all processes of torchrun.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.checkpoint import read_manifest
from pretrain.commands.after_run.generate import check_split
from pretrain.config import RunConfig
from pretrain.config.schema import ValidConfig
from pretrain.data import Batch, TokenDataset, open_valid
from pretrain.engines.base import LossSum, mean_of
from pretrain.evaluation.answers import Answers, exact_documents, losses_and_hits
from xlstm_io.checkpoint.choose import choose
from xlstm_io.errors import ConfigError
from xlstm_io.storage import Location
from xlstm_io.terminal import say
from xlstm_mcore import hardware
from xlstm_mcore.inference import open_model

BY = ("position", "length", "frequency", "source")
_BUCKETS = 40  # powers of two; no row is longer


@dataclass(frozen=True)
class SetLoss:
    """The loss on one validation set.

    Attributes:
        sum: over its unmasked tokens.
        targets_per_byte: of the set's text; None for a set with labels, which is not text.
        by: tokens from 2^n to 2^(n + 1) - 1, by n, of what they were asked to be sorted by.
        answers: of a set with labels, how they were answered.
        answers_by: the same, sorted as `by`; by position there are no samples.
    """

    sum: LossSum
    targets_per_byte: float | None
    by: Mapping[int, LossSum] = field(default_factory=dict)
    answers: Answers | None = None
    answers_by: Mapping[int, Answers] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Nats per unmasked token."""
        return self.sum.mean

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text, which does not depend on the tokenizer; None where none is read.

        The labels of a task are a choice of its positions, so bytes say nothing about its loss.
        """
        if self.targets_per_byte is None:
            return None
        return self.loss * self.targets_per_byte / math.log(2)


def main(
    checkpoint: str,
    config: RunConfig,
    *,
    which: str | None = None,
    by: str | None = None,
    times: int = 1,
    as_json: bool = False,
) -> int:
    """Print the loss of `checkpoint` on the validation split of `config.data`.

    Args:
        checkpoint: a checkpoint or a run folder.
        which: which checkpoint of a run; see `xlstm_io.checkpoint.choose`.
        config: the run file whose data and batch to use; the model is the checkpoint's.
        by: what the loss is also shown by, one of `BY`: "position" counts the tokens of the
            document up to the predicting one, "length" all of the document that are in the row,
            "frequency" how often the target is one in the set. Sets with labels also show accuracy
            and exact matches.
        times: at so many times the trained length: the state is carried over so many rows.
        as_json: print one JSON object.

    Returns:
        0.

    Raises:
        UserError: no checkpoint, no data, the data were made with another tokenizer, or their rows
            do not continue each other.
    """
    if times < 1:
        raise ConfigError(f"--times={times} is not a length; use 1 or more")
    path = choose(checkpoint, which)
    if by == "source":
        config = _sources_apart(config)
    found = evaluate(path, config, by if by != "source" else None, times)
    if os.environ.get("RANK", "0") != "0":
        return 0
    say(_as_json(path, found, by) if as_json else _as_text(path, found, by))
    return 0


@torch.no_grad()
def evaluate(
    path: Location | str, config: RunConfig, by: str | None = None, times: int = 1
) -> dict[str, SetLoss]:
    """The loss by validation set; see `main` for `by`, which is not "source" here."""
    # What is measured is the whole set, or nothing.
    sets = open_valid(config.data.model_copy(update={"on_corrupt": "raise"}))
    trained_with = read_manifest(path).state.get("tokenizer", {}).get("sha256")
    for dataset in sets.values():
        if dataset.manifest.tokenizer_sha256 != trained_with:
            raise ConfigError(
                f"{dataset.manifest.root} was built with another tokenizer (sha256 "
                f"{dataset.manifest.tokenizer_sha256}) than {path} was trained with (sha256 "
                f"{trained_with}), so its ids mean other text; build the data with that tokenizer"
            )
        if times > 1:
            _check_rows_continue(dataset)
    check_split(path)
    model = open_model(path)
    return {name: measure(model, dataset, config, by, times) for name, dataset in sets.items()}


def _check_rows_continue(dataset: TokenDataset) -> None:
    manifest = dataset.manifest
    if manifest.packing != "concat" or manifest.labels:
        how = "labels" if manifest.labels else f"packing={manifest.packing}"
        raise ConfigError(
            f"--times carries the state from row to row, but {manifest.root} was built with {how}, "
            "and its rows do not continue each other; build it with packing=concat"
        )


@torch.no_grad()
def measure(
    model: torch.nn.Module,
    dataset: TokenDataset,
    config: RunConfig,
    by: str | None = None,
    times: int = 1,
    frequency: Tensor | None = None,
) -> SetLoss:
    """The loss of a model on one set, and of a set with labels how they are answered.

    Args:
        model: in one process, or tensor parallel.
        dataset: the set.
        config: its `data.micro_batch` rows are read at once.
        by: see `main`; not "source" here.
        times: see `main`.
        frequency: by frequency, how often each id is a target of other data, such as those of
            training; see `frequencies`. None for the set's own.
    """
    rows = config.data.micro_batch
    if by == "frequency" and frequency is None:
        frequency = frequencies(dataset, rows)
    # Sum of the losses, tokens, right ones, samples and exact ones, by powers of two.
    sums = torch.zeros(5, _BUCKETS, dtype=torch.float64)
    for batch, there in _batches(dataset, rows, times):
        document = _documents(batch)
        sizes = _lengths(document, there) if by == "length" else _positions(document)
        if by == "frequency":
            assert frequency is not None
            sizes = frequency[batch.labels].clamp(min=1).double()
        bucket = sizes.log2().long() if by else torch.zeros_like(document)
        if dataset.manifest.labels:
            losses, hits = losses_and_hits(model, batch)
            asked, exact = exact_documents(document, hits, batch.loss_mask)
            # A document's number is below its first position, so all its positions are there.
            of_document = bucket.new_zeros(bucket.shape).scatter_(1, document, bucket)
            counted = [(hits * batch.loss_mask, bucket), (asked, of_document), (exact, of_document)]
        else:
            losses, counted = _losses(model, batch, times), []
        counted = [(losses * batch.loss_mask, bucket), (batch.loss_mask, bucket), *counted]
        for line, (weights, places) in zip(sums, counted, strict=False):
            each = weights.double().flatten()
            line += torch.bincount(places.flatten(), each, minlength=_BUCKETS).cpu()
    groups = {n: values for n, values in enumerate(sums.t().tolist()) if by and values[1]}
    total = sums.sum(1).tolist()
    return SetLoss(
        _loss(total),
        None if dataset.manifest.labels else dataset.targets_per_byte,
        {n: _loss(values) for n, values in groups.items()},
        _answers(total) if dataset.manifest.labels else None,
        {
            n: _answers(values if by == "length" else [*values[:3], 0, 0])
            for n, values in groups.items()
            if dataset.manifest.labels
        },
    )


def _losses(model: torch.nn.Module, batch: Batch, times: int) -> Tensor:
    """The loss of each position; long rows in windows of the trained length, the state carried."""
    if times == 1:
        return model(batch.tokens, batch.boundaries, batch.labels)
    cache: dict = {}
    windows = zip(
        *(part.chunk(times, 1) for part in (batch.tokens, batch.boundaries, batch.labels)),
        strict=True,
    )
    return torch.cat([model(*window, cache=cache) for window in windows], 1)


def _batches(
    dataset: TokenDataset, micro_batch: int, times: int = 1
) -> Iterator[tuple[Batch, Tensor]]:
    """All rows of a set, `times` joined to one, and which positions are not padding.

    The rows of a split continue each other in the order in which they were written, and a row that
    begins with a document has a boundary there.
    """
    device, width = hardware.device(), dataset.seq_len
    for first in range(0, dataset.num_rows, micro_batch * times):
        last = min(first + micro_batch * times, dataset.num_rows)
        rows = dataset.read(np.arange(first, last))
        if (last - first) % times:
            whole = -(-(last - first) // times) * times
            rows = rows.padded(whole, dataset.manifest.pad_id)
        there = torch.arange(width) < torch.from_numpy(rows.ends())[:, None]
        batch = Batch.of(rows)
        if times > 1:
            parts = (batch.tokens, batch.labels, batch.loss_mask, batch.boundaries)
            joined = [part.reshape(-1, times * width) for part in parts]
            batch = Batch(*joined, batch.sources[::times])
        yield batch.to(device), there.reshape(-1, times * width).to(device)


def frequencies(dataset: TokenDataset, micro_batch: int) -> Tensor:
    """How often each id is a target of a set, int64 `[ids]`; `micro_batch` rows at once."""
    size = dataset.manifest.vocab_size
    counts = torch.zeros(size, dtype=torch.int64, device=hardware.device())
    for batch, _ in _batches(dataset, micro_batch):
        counts += torch.bincount(batch.labels[batch.loss_mask > 0], minlength=size)
    return counts


def _documents(batch: Batch) -> Tensor:
    """The number in its row of the document of each position, int64 `[b, s]`.

    A row that begins in the middle of a document knows nothing of its beginning.
    """
    starts = batch.boundaries.clone()
    starts[:, 0] = True
    return starts.long().cumsum(1) - 1


def _positions(document: Tensor) -> Tensor:
    """The place of each position in its document, fp64 `[b, s]`, from 1."""
    place = torch.arange(document.shape[1], device=document.device).expand(document.shape)
    starts = torch.diff(document, dim=1, prepend=document.new_full((len(document), 1), -1)) > 0
    return (place - torch.where(starts, place, 0).cummax(1).values + 1).double()


def _lengths(document: Tensor, there: Tensor) -> Tensor:
    """The length of each position's document without the padding behind it, fp64 `[b, s]`."""
    lengths = torch.zeros_like(document).scatter_add_(1, document, there.long())
    return lengths.gather(1, document).clamp(min=1).double()


def _loss(values: list[float]) -> LossSum:
    return LossSum(values[0], int(values[1]))


def _answers(values: list[float]) -> Answers:
    return Answers(*map(int, values[1:]))


def _sources_apart(config: RunConfig) -> RunConfig:
    """The run with a validation set for every source of every set."""
    apart = []
    for item in config.data.valid or config.data.mixture:
        one = config.data.model_copy(
            update={"valid": [ValidConfig(name="all", path=item.path, source=item.source)]}
        )
        manifest = open_valid(one)["all"].manifest
        names = [s.name for s in manifest.sources if "valid" in s.splits and s.splits["valid"].rows]
        for source in [item.source] if item.source else names:
            name = f"{item.name}.{source}" if item.name and item.name != source else source
            apart.append(ValidConfig(name=name, path=item.path, source=source))
    return config.model_copy(update={"data": config.data.model_copy(update={"valid": apart})})


def _as_text(path: Location | str, found: Mapping[str, SetLoss], by: str | None) -> str:
    lines = []
    for name, measured in found.items():
        bits = measured.bits_per_byte
        lines.append(
            f"{path}{f', {name}' if name else ''}: {measured.loss:.4f} nats per token, "
            f"perplexity {math.exp(measured.loss):.2f}, "
            f"{'' if bits is None else f'{bits:.4f} bits per byte, '}"
            f"over {measured.sum.tokens:,} tokens{_as_words(measured.answers)}"
        )
        width = len(f"{measured.sum.tokens:,}")
        for n, group in measured.by.items():
            lines.append(
                f"  {by} {_bucket(n):>15}  {group.mean:7.4f} nats per token, "
                f"{group.tokens:{width},} tokens{_as_words(measured.answers_by.get(n))}"
            )
    if len(found) > 1:
        mean = mean_of(measured.sum for measured in found.values())
        lines.append(f"mean of the {len(found)} sets, by their tokens: {mean:.4f} nats per token")
    return "\n".join(lines)


def _as_json(path: Location | str, found: Mapping[str, SetLoss], by: str | None) -> str:
    sets: dict[str, dict[str, Any]] = {}
    for name, measured in found.items():
        sets[name] = {
            "loss": measured.loss,
            "perplexity": math.exp(measured.loss),
            **({} if measured.bits_per_byte is None else {"bits_per_byte": measured.bits_per_byte}),
            "tokens": measured.sum.tokens,
            **_as_fields(measured.answers),
        }
        if by in BY and by != "source":
            sets[name][by] = {
                _bucket(n): {
                    "loss": group.mean,
                    "tokens": int(group.tokens),
                    **_as_fields(measured.answers_by.get(n)),
                }
                for n, group in measured.by.items()
            }
    mean = mean_of(measured.sum for measured in found.values())
    return json.dumps({"checkpoint": str(path), "loss": mean, "sets": sets})


def _as_words(answers: Answers | None) -> str:
    if answers is None:
        return ""
    samples = f", {answers.exact_match:.4f} of {answers.samples:,} samples exact"
    return f", accuracy {answers.accuracy:.4f}{samples if answers.samples else ''}"


def _as_fields(answers: Answers | None) -> dict[str, float]:
    if answers is None:
        return {}
    fields: dict[str, float] = {"accuracy": answers.accuracy}
    if answers.samples:
        fields |= {"exact_match": answers.exact_match, "samples": answers.samples}
    return fields


def _bucket(power: int) -> str:
    """`8-15`: the sizes from 2^3 to 2^4 - 1."""
    low, high = 1 << power, (2 << power) - 1
    return str(low) if low == high else f"{low}-{high}"
