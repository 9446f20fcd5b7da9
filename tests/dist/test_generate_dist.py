"""Generation under tensor parallelism writes what one process writes."""

import pytest
import torch

from tests.dist import work
from xlstm_mcore.generation.settings import Sampling

PROMPTS = ["3 1 4 1 5 9 2 6 5", "7", "2 7 1 8 2 8 1 8 2 8 4 5 9 0 4 5"]


@pytest.fixture(scope="module", params=["large", "classic", "mixed"])
def checkpoint(request, pool, tmp_path_factory):
    """A checkpoint of two pipeline stages, which generation does not have."""
    root = tmp_path_factory.mktemp(request.param)
    config = work.run_config(request.param, layout__pipeline=2)
    pool(2, work.train_and_save, config, str(root), 2, 0)
    return str(root)


@pytest.mark.dist
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_same_tokens_on_every_number_of_processes(pool, checkpoint, temperature):
    sampling = Sampling(max_tokens=24, temperature=temperature, top_k=10, num_samples=2, seed=5)
    ((alone, true_logits),) = pool(1, work.generate_tokens, checkpoint, PROMPTS, sampling)
    assert len(alone) == 6 and all(len(tokens) == 24 for tokens in alone)
    assert len(set(alone)) == (6 if temperature else 3)
    for ranks in (2, 4):
        for tokens, logits in pool(ranks, work.generate_tokens, checkpoint, PROMPTS, sampling):
            assert tokens == alone
            assert torch.allclose(logits, true_logits, rtol=0, atol=2e-5)


@pytest.mark.dist
def test_processes_that_cannot_share_the_heads_are_refused(pool, checkpoint):
    for message in pool(3, work.refused_split, checkpoint):
        assert "layout.tensor=3 does not divide model.num_heads=4; use 1, 2 or 4" in message
