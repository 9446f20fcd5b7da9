"""Continue prompts in batches.

Prompts of unequal length are padded in front and begin with a document boundary. A boundary makes
every cell, convolution and attention forget what stood before it, exactly. So after one pass over
the prompts the state of each row is that of its own prompt, and all rows go on with one token each.
A row that has ended leaves the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xlstm_io.tokenizer.base import Tokenizer
from xlstm_io.tokenizer.text_stream import TextStream
from xlstm_mcore.generation.sampling import Draws, pick
from xlstm_mcore.generation.settings import Sampling
from xlstm_mcore.inference import gather_vocabulary
from xlstm_mcore.model import XLSTMModel

PREFILL_TOKENS = 1 << 15
"""Tokens of prompts, padding included, that one pass reads; a longer prompt is read alone."""


@dataclass(frozen=True)
class Completion:
    """What was added to a prompt.

    Attributes:
        prompt: the prompt's text.
        number: the prompt's number.
        sample: which of its samples, from 0.
        text: what was added.
        tokens: its ids; with a stop text, up to the one that completed it.
        ended_by: `end` (of the document), `stop` (a stop text) or `length`.
    """

    prompt: str
    number: int
    sample: int
    text: str
    tokens: tuple[int, ...]
    ended_by: str


@torch.no_grad()
def generate(
    model: XLSTMModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    numbers: Sequence[int] | None = None,
    batch: int = 16,
    on_text: Callable[[str], None] = lambda text: None,
    on_done: Callable[[Completion], None] = lambda completion: None,
) -> list[Completion]:
    """Continue prompts.

    Args:
        model: a whole model, in one process or tensor parallel; all ranks return the same.
        tokenizer: of the model.
        prompts: texts to continue; an empty one starts a document.
        sampling: how tokens are drawn; the defaults of `Sampling` without it.
        numbers: of the prompts, for their random numbers; by default 0, 1, 2, ...
        batch: rows that are computed together at most.
        on_text: called with text as it comes, where there is one prompt and one sample.
        on_done: called with every completion as soon as it has ended.

    Returns:
        The completions, by prompt and then sample.

    Raises:
        TokenizerFileError: the tokenizer defines no bos or eos.
    """
    sampling = sampling or Sampling()
    numbers = range(len(prompts)) if numbers is None else numbers
    rows = [
        _Row(tokenizer, place, text, number, sample, sampling)
        for place, (text, number) in enumerate(zip(prompts, numbers, strict=True))
        for sample in range(sampling.num_samples)
    ]
    if len(rows) == 1:
        rows[0].on_text = on_text
    model.eval()
    for together in batches(rows, batch):
        _continue(model, tokenizer, together, sampling, on_done)
    return [row.completion() for row in rows]


class _Row:
    """A completion in the making."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        place: int,
        prompt: str,
        number: int,
        sample: int,
        sampling: Sampling,
    ) -> None:
        self.place, self.prompt, self.number, self.sample = place, prompt, number, sample
        self.ids = tokenizer.prompt_ids(prompt)
        self.draws = Draws(sampling.seed, number, sample)
        self.on_text: Callable[[str], None] = lambda text: None
        self._stream = TextStream(tokenizer, self.ids)
        self._sampling = sampling
        self._end = tokenizer.eos_id
        self._tokens: list[int] = []
        self._text, self._shown = "", 0
        self._ended_by = ""

    def add(self, token: int) -> bool:
        """Take the next token; whether the completion has ended with it."""
        if token == self._end:
            self._finish("end")
            return True
        self._tokens.append(token)
        self._grow(self._stream.push(token))
        if not self._ended_by and len(self._tokens) == self._sampling.max_tokens:
            self._finish("length")
        return bool(self._ended_by)

    def completion(self) -> Completion:
        """What was added."""
        return Completion(
            self.prompt, self.number, self.sample, self._text, tuple(self._tokens), self._ended_by
        )

    def _finish(self, reason: str) -> None:
        self._grow(self._stream.finish())
        self._ended_by = self._ended_by or reason
        self._show(len(self._text))

    def _grow(self, new: str) -> None:
        """Add text; a stop text in it ends the completion."""
        stops = self._sampling.stop
        before = max(0, len(self._text) - max(map(len, stops), default=0))
        self._text += new
        places = [self._text.find(stop, before) for stop in stops]
        if any(place >= 0 for place in places):
            self._text = self._text[: min(place for place in places if place >= 0)]
            self._ended_by = "stop"
        held = 0 if self._ended_by else begun_stop(self._text, stops)
        self._show(len(self._text) - held)

    def _show(self, until: int) -> None:
        if until > self._shown:
            self.on_text(self._text[self._shown : until])
            self._shown = until


def begun_stop(text: str, stops: Sequence[str]) -> int:
    """How many last characters of a text may be the beginning of a stop text."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def batches(rows: Sequence[_Row], size: int) -> Iterator[list[_Row]]:
    """Rows that are computed together: of similar length, and within `PREFILL_TOKENS`."""
    together: list[_Row] = []
    for row in sorted(rows, key=lambda row: (len(row.ids), row.place, row.sample)):
        padded = len({one.place for one in (*together, row)}) * len(row.ids)
        if together and (len(together) == size or padded > PREFILL_TOKENS):
            yield together
            together = []
        together.append(row)
    if together:
        yield together


def _continue(
    model: XLSTMModel,
    tokenizer: Tokenizer,
    rows: list[_Row],
    sampling: Sampling,
    on_done: Callable[[Completion], None],
) -> None:
    """Continue a batch of rows to their ends."""
    device = next(model.parameters()).device
    prompts = {row.place: row.ids for row in rows}  # samples of a prompt share its pass
    window, boundaries = pad_in_front(list(prompts.values()))
    capacity = window.shape[1] + sampling.max_tokens
    cache: dict = {layer.layer_number: {"capacity": capacity} for layer in model.decoder.layers}
    if boundaries is not None:
        boundaries = boundaries.to(device)
    last = model(window.to(device), boundaries, cache=cache, last_only=True)[:, -1]
    places = list(prompts)
    chosen = torch.tensor([places.index(row.place) for row in rows], device=device)
    last, cache = last[chosen], rows_of(cache, chosen, len(places))
    while True:
        logits = gather_vocabulary(model, last)[:, : tokenizer.vocab_size].float().cpu()
        tokens = pick(logits, [row.draws for row in rows], sampling).tolist()
        ended = [row.add(token) for row, token in zip(rows, tokens, strict=True)]
        for row, done in zip(rows, ended, strict=True):
            if done:
                on_done(row.completion())
        left = [place for place, done in enumerate(ended) if not done]
        if not left:
            return
        if len(left) < len(rows):
            cache = rows_of(cache, torch.tensor(left, device=device), len(rows))
            rows = [rows[place] for place in left]
        window = torch.tensor([[tokens[place]] for place in left], device=device)
        last = model(window, cache=cache, last_only=True)[:, -1]


def pad_in_front(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Prompts as one tensor, each behind padding that a boundary cuts off.

    Returns:
        Int64 `[rows, longest]`, and bool boundaries of that shape; None where nothing was padded.
    """
    longest = max(map(len, prompts))
    if all(len(ids) == longest for ids in prompts):
        return torch.tensor(prompts), None
    tokens = torch.tensor([[ids[0]] * (longest - len(ids)) + list(ids) for ids in prompts])
    boundaries = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, ids in enumerate(prompts):
        boundaries[row, longest - len(ids)] = True
    return tokens, boundaries


def rows_of(cache: dict, chosen: Tensor, rows: int) -> dict:
    """The cache of some rows of a batch; a row may be chosen several times.

    Args:
        cache: by layer, a dictionary whose tensors, and tuples of tensors, have the rows first.
        chosen: int64, the rows.
        rows: how many there are.
    """
    if torch.equal(chosen, torch.arange(rows, device=chosen.device)):
        return cache

    def cut(value: object) -> object:
        if isinstance(value, Tensor):
            return value.index_select(0, chosen)
        return tuple(map(cut, value)) if isinstance(value, tuple) else value

    return {
        number: {key: cut(value) for key, value in layer.items()} for number, layer in cache.items()
    }
