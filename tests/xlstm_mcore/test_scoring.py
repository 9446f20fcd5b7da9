"""Scores of rows in batches and windows equal those of each row by itself, computed at once."""

import pytest
import torch

from tests.xlstm_mcore.test_generation_state import make_model
from xlstm_mcore.inference import model_logits
from xlstm_mcore.scoring import Row, score


def one_by_one(model, row, vocabulary):
    """(log-likelihood, greedy) from the logits of the whole row."""
    tokens = torch.tensor([list(row.tokens)])
    logits = model_logits(model, tokens)[0, :, :vocabulary].double()
    likely = logits.log_softmax(1)
    places = range(row.first - 1, len(row.tokens) - 1)
    total = sum(likely[place, row.tokens[place + 1]].item() for place in places)
    return total, all(logits[place].argmax().item() == row.tokens[place + 1] for place in places)


@pytest.mark.parametrize("pattern", ["Mms*", "M"])
@pytest.mark.parametrize("logits", [1 << 27, 96 * 3 * 5, 1])
def test_windows_and_batches_change_nothing(pattern, logits):
    model = make_model(pattern, vocab_tokens=90)
    rng = torch.Generator().manual_seed(3)
    rows = []
    for length, first in ((2, 1), (17, 1), (17, 16), (40, 20), (9, 3), (31, 30), (5, 4)):
        rows.append(Row(torch.randint(0, 90, (length,), generator=rng).tolist(), first))
    # Half a row of likeliest tokens, so that some rows are greedy.
    tokens = list(rows[0].tokens)
    for _ in range(6):
        tokens.append(model_logits(model, torch.tensor([tokens]))[0, -1, :90].argmax().item())
    rows.append(Row(tokens, 2))
    expected = [one_by_one(model, row, 90) for row in rows]
    for batch in (1, 3, 8):
        found = score(model, rows, batch=batch, logits=logits)
        assert [one.greedy for one in found] == [greedy for _, greedy in expected]
        for one, (likely, _) in zip(found, expected, strict=True):
            assert one.log_likelihood == pytest.approx(likely, rel=1e-4, abs=1e-4)
    assert found[-1].greedy and not all(one.greedy for one in found)


def test_progress_counts_rows():
    done = []
    score(make_model("M"), [Row([1, 2, 3])] * 5, batch=2, on_done=done.append)
    assert done == [2, 2, 1]
    assert score(make_model("M"), []) == []
