"""How the next token is drawn from logits.

What is drawn is a function of the seed, the number of the prompt and the number of the sample. Each
pair of numbers has a random stream of its own, from which every token takes one number, whatever
else is in the batch, in which order, on however many ranks. (Logits are sums of floats, so they
differ by rounding between batches. A number that falls within rounding of the border between two
tokens may then give the other one.)
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from xlstm_mcore.generation.settings import Sampling


class Draws:
    """The random numbers of one completion.

    Args:
        seed: of the whole call.
        prompt: number of the prompt.
        sample: number of the sample of that prompt.
    """

    def __init__(self, seed: int, prompt: int, sample: int) -> None:
        key = np.random.SeedSequence((seed, prompt, sample))
        self._generator = np.random.Generator(np.random.Philox(key))

    def next(self) -> float:
        """A number in [0, 1)."""
        return self._generator.random()


def pick(logits: Tensor, draws: Sequence[Draws], sampling: Sampling) -> Tensor:
    """A token for each row.

    Args:
        logits: `[rows, vocab]`.
        draws: of each row.
        sampling: temperature and what tokens are sampled among.

    Returns:
        Int64 `[rows]`.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits.double() / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        kept = scaled.topk(sampling.top_k).indices
        scaled = torch.full_like(scaled, -math.inf).scatter(-1, kept, scaled.gather(-1, kept))
    chances = scaled.softmax(-1)
    if sampling.top_p < 1:
        sorted_chances, order = chances.sort(dim=-1, descending=True)
        before = sorted_chances.cumsum(-1) - sorted_chances
        left_out = torch.zeros_like(chances).scatter(-1, order, (before >= sampling.top_p).double())
        chances = chances * (1 - left_out)
    # In the order of ids: rounding that swaps two nearly equal tokens changes nothing else.
    sums = chances.cumsum(-1)
    numbers = torch.tensor([[one.next()] for one in draws], dtype=torch.float64)
    picked = torch.searchsorted(sums, numbers.to(sums.device) * sums[:, -1:], right=True)
    return picked.squeeze(-1).clamp(max=logits.shape[-1] - 1)
