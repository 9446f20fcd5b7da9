"""Which checkpoints a run may start from, as far as no process is needed."""

from types import SimpleNamespace

import pytest
import torch

from pretrain.checkpoint import CheckpointError, TensorSlice, read_manifest, save_checkpoint
from pretrain.config import ConfigError, config_from_dict
from pretrain.init_from import _check
from tests.dist.training_runs import tiny_run
from tests.xlstm_mcore.convert.small import train_tokenizer
from xlstm_io.tokenizer import open_tokenizer, read_tokenizer_files


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a run, with the tokenizer it was trained with."""
    file = train_tokenizer(tmp_path / "then.model")
    config = config_from_dict(tiny_run(tmp_path / "old", "data")).model_dump(mode="json")
    state = {"tokenizer": {"sha256": open_tokenizer(file).sha256}, "updates": 3}
    part = TensorSlice("w", (2,), (0,), torch.ones(2))
    files = read_tokenizer_files(file)
    return save_checkpoint(tmp_path / "old", [part], state, config, step=3, files=files)


def check(saved, data_tokenizer, tmp_path, **changes):
    raw = tiny_run(tmp_path / "new", "data", run__init_from=str(saved), **changes)
    manifest = SimpleNamespace(
        tokenizer_path=data_tokenizer, tokenizer_sha256=open_tokenizer(data_tokenizer).sha256
    )
    data = SimpleNamespace(manifest=manifest)
    return _check(config_from_dict(raw), data, saved, read_manifest(saved))


def test_another_tokenizer_is_refused_with_the_rows_that_match(saved, tmp_path):
    then = tmp_path / "then.model"
    assert check(saved, then, tmp_path) == []
    now = train_tokenizer(tmp_path / "now.model", vocab_size=400)
    with pytest.raises(CheckpointError, match=r"the first \d+ rows") as error:
        check(saved, now, tmp_path)
    same = sum(open_tokenizer(then).token(n) == open_tokenizer(now).token(n) for n in range(400))
    assert f"{same} in all" in str(error.value)
    assert "checkpoint.accept_changes=tokenizer.sha256" in str(error.value)
    check(saved, now, tmp_path, checkpoint__accept_changes="tokenizer.sha256")


def test_what_the_weights_compute_may_differ_and_is_said(saved, tmp_path):
    then = tmp_path / "then.model"
    changes = check(
        saved, then, tmp_path, model__norm_eps=1e-5, data__seq_len=4096, optimizer__lr=1.0
    )
    assert [change.name for change in changes] == ["model.norm_eps"]


def test_another_shape_is_never_accepted(saved, tmp_path):
    with pytest.raises(CheckpointError, match="hidden_size: checkpoint 32, run 64") as error:
        check(
            saved,
            tmp_path / "then.model",
            tmp_path,
            model__hidden_size=64,
            checkpoint__accept_changes="model",
        )
    assert "accept_changes" not in str(error.value)


def test_keys_that_do_not_go_together(tmp_path):
    raw = tiny_run(tmp_path, "data", run__init_optimizer=True)
    with pytest.raises(ConfigError, match=r"set that too"):
        config_from_dict(raw)
    with pytest.raises(ConfigError, match=r"is run\.dir too"):
        config_from_dict(tiny_run(tmp_path, "data", run__init_from=f"{tmp_path}/"))
