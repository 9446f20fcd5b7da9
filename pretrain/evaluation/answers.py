"""How a model answers labels: the most likely token is right or wrong, and so is a whole sample."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data import Batch
from xlstm_mcore.inference import gather_vocabulary
from xlstm_mcore.model import XLSTMModel

_MOST_LOGITS = 1 << 26  # held at once; a row has seq_len times the vocabulary


@dataclass(frozen=True)
class Answers:
    """Counts of answers.

    Attributes:
        labels: positions with a label.
        right: those where the most likely token is the label.
        samples: documents with a label; of a document that rows cut, each part in a row.
        exact: those whose labels are all right.
    """

    labels: int
    right: int
    samples: int
    exact: int

    @property
    def accuracy(self) -> float:
        """Share of the labels that are right."""
        return self.right / max(1, self.labels)

    @property
    def exact_match(self) -> float:
        """Share of the samples whose labels are all right."""
        return self.exact / max(1, self.samples)


def losses_and_hits(model: XLSTMModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss of each position's label, and whether the label is the most likely token.

    Args:
        model: in this process, or tensor parallel.
        batch: on the model's device.

    Returns:
        fp32 and bool `[b, s]`, the same on every rank.
    """
    tokens = model.config.vocab_tokens or model.config.vocab_size
    at_once = max(1, _MOST_LOGITS // (batch.tokens.shape[1] * model.config.vocab_size))
    losses, hits = [], []
    for part in batch.split(at_once):
        logits = gather_vocabulary(model, model(part.tokens, part.boundaries))[..., :tokens]
        losses.append(F.cross_entropy(logits.transpose(1, 2), part.labels, reduction="none"))
        hits.append(logits.argmax(-1) == part.labels)
    return torch.cat(losses), torch.cat(hits)


def exact_documents(document: Tensor, hits: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which documents of some rows have labels, and which of them are answered without a mistake.

    Args:
        document: int64 `[b, s]`, the number in its row of the document of each position.
        hits: bool `[b, s]`, see `losses_and_hits`.
        loss_mask: fp32 `[b, s]`, 1 where there is a label.

    Returns:
        bool `[b, s]` each, by row and number of the document.
    """
    none = torch.zeros_like(loss_mask)
    asked = none.scatter_add(1, document, loss_mask)
    wrong = none.scatter_add(1, document, loss_mask * ~hits)
    return asked > 0, (asked > 0) & (wrong == 0)
