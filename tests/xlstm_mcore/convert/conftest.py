"""What the tests of conversion share: few texts for the tokenizer, a checkpoint, its export."""

import pytest

from tests.xlstm_mcore.convert.small import make_weights, save, train_tokenizer
from xlstm_mcore.convert import cli
from xlstm_mcore.convert.tokenizer import corpus


@pytest.fixture(scope="module")
def few_texts():
    """Each export compares its tokenizer on texts; `test_tokenizer.py` is about how many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "TEXTS", 100)
        yield


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, spm):
    """(weights, checkpoint, the run's folder)."""
    root = tmp_path_factory.mktemp("run")
    weights = make_weights()
    return weights, save(root, weights, spm), root


@pytest.fixture(scope="module")
def exported(saved, few_texts):
    """(weights, checkpoint, folder)."""
    weights, checkpoint, root = saved
    assert cli.main(["to-hf", str(root), str(root / "hf")]) == 0
    return weights, checkpoint, root / "hf"
