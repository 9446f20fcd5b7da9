"""How likely a model finds given tokens, at any length.

Rows are scored in batches of similar length. A batch goes through the model in windows, and the
state of every layer is carried from one to the next, so the logits of a long text never lie in
memory as a whole, and its cost is linear in its length (but for attention blocks).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xlstm_mcore.inference import gather_vocabulary
from xlstm_mcore.model import XLSTMModel

LOGITS = 1 << 27
"""Logits of a window at most, over all its rows: 512 MiB in fp32."""
CONTEXT = 1 << 15
"""Tokens of a window of which no logit is needed, over all its rows."""


@dataclass(frozen=True)
class Row:
    """Tokens of which the last ones are scored.

    Attributes:
        tokens: at least two ids; the first is not scored.
        first: number of the first token that is scored, from 1.
    """

    tokens: Sequence[int]
    first: int = 1


@dataclass(frozen=True)
class Score:
    """How likely the scored tokens of a row are.

    Attributes:
        log_likelihood: natural logarithm of their probability after the tokens before them.
        greedy: whether each of them is the likeliest at its place.
    """

    log_likelihood: float
    greedy: bool


@torch.no_grad()
def score(
    model: XLSTMModel,
    rows: Sequence[Row],
    *,
    batch: int = 16,
    logits: int = LOGITS,
    on_done: Callable[[int], object] = lambda rows: None,
) -> list[Score]:
    """Score rows of any lengths.

    Args:
        model: a whole model, in one process or tensor parallel; all ranks return the same.
        rows: what to score.
        batch: rows that are computed together at most.
        logits: numbers in the logits of a window at most.
        on_done: called with the number of rows of every batch that is done.

    Returns:
        The scores in the order of the rows.
    """
    model.eval()
    scores: dict[int, Score] = {}
    # The longest first: what does not fit into memory fails at once.
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].tokens))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        found = _score_together(model, [rows[number] for number in chosen], logits)
        scores.update(zip(chosen, found, strict=True))
        on_done(len(chosen))
    return [scores[number] for number in range(len(rows))]


def _score_together(model: XLSTMModel, rows: list[Row], logits: int) -> list[Score]:
    """Score a batch, window by window. Rows are filled up behind their ends, which nothing sees."""
    device = next(model.parameters()).device
    lengths = [len(row.tokens) - 1 for row in rows]  # of inputs, and of targets
    tokens = torch.zeros(len(rows), max(lengths) + 1, dtype=torch.int64)
    counted = torch.zeros(len(rows), max(lengths), dtype=torch.bool)
    for line, mask, row in zip(tokens, counted, rows, strict=True):
        line[: len(row.tokens)] = torch.tensor(row.tokens)
        mask[row.first - 1 : len(row.tokens) - 1] = True
    tokens, counted = tokens.to(device), counted.to(device)
    vocabulary = model.config.vocab_tokens or model.config.vocab_size
    likely = torch.zeros(len(rows), dtype=torch.float64, device=device)
    greedy = torch.ones(len(rows), dtype=torch.bool, device=device)
    cache: dict = {}
    begin, end = min(row.first for row in rows) - 1, max(lengths)
    for place, stop in _windows(0, begin, CONTEXT // len(rows)):
        model(tokens[:, place:stop], cache=cache, last_only=True)
    for place, stop in _windows(begin, end, logits // (len(rows) * vocabulary)):
        window = model(tokens[:, place:stop], cache=cache)
        window = gather_vocabulary(model, window)[..., :vocabulary]
        likely_here, greedy_here = _of_targets(window, tokens[:, place + 1 : stop + 1])
        mask = counted[:, place:stop]
        likely += torch.where(mask, likely_here, 0.0).sum(1)
        greedy &= (greedy_here | ~mask).all(1)
    return [
        Score(value, bool(best))
        for value, best in zip(likely.tolist(), greedy.tolist(), strict=True)
    ]


def _windows(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    size = max(1, size)
    return [(place, min(place + size, end)) for place in range(begin, end, size)]


def _of_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (fp64) and whether it is the likeliest, `[b, s]`, of each target."""
    own = logits.gather(2, targets[..., None])[..., 0]
    return (own - logits.logsumexp(2)).double(), logits.argmax(2) == targets
