"""Validation loss of a checkpoint, whatever layout trained it.

In one process, or tensor parallel over all processes of torchrun.
"""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from pretrain.checkpoint import read_manifest
from pretrain.commands.after_run.generate import check_split
from pretrain.config import RunConfig
from pretrain.config.data_section import ValidConfig
from pretrain.data import TokenDataset, open_valid
from pretrain.engines.base import mean_of
from pretrain.evaluation.answers import Answers
from pretrain.evaluation.losses import SetLoss, measure
from xlstm_io.checkpoint.choose import choose
from xlstm_io.errors import ConfigError
from xlstm_io.storage import Location
from xlstm_io.terminal import say
from xlstm_mcore.inference import open_model


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
        by: what the loss is also shown by: "position" counts the tokens of the document up to the
            predicting one, "length" all of the document that are in the row, "frequency" how often
            the target is one in the set; "source" measures every source apart. Sets with labels
            also show accuracy and exact matches.
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
        config, by = _sources_apart(config), None
    found = evaluate(path, config, by, times)
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
            f"perplexity {measured.perplexity:.2f}, "
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
        bits = measured.bits_per_byte
        sets[name] = {
            "loss": _number(measured.loss),
            "perplexity": _number(measured.perplexity),
            **({} if bits is None else {"bits_per_byte": _number(bits)}),
            "tokens": measured.sum.tokens,
            **_as_fields(measured.answers),
        }
        if by is not None:
            sets[name][by] = {
                _bucket(n): {
                    "loss": _number(group.mean),
                    "tokens": group.tokens,
                    **_as_fields(measured.answers_by.get(n)),
                }
                for n, group in measured.by.items()
            }
    mean = mean_of(measured.sum for measured in found.values())
    body = {"checkpoint": str(path), "loss": _number(mean), "sets": sets}
    return json.dumps(body, allow_nan=False)


def _number(value: float) -> float | None:
    """nan and inf, which JSON cannot express, become null."""
    return value if math.isfinite(value) else None


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
