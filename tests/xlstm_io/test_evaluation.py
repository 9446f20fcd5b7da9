"""The validation loss beside a manifest counts for that manifest alone."""

import json
import math

import pytest
import torch

from pretrain.checkpoint import TensorSlice, save_checkpoint
from pretrain.commands.after_run.report import _best_checkpoint
from pretrain.commands.after_run.show import show
from xlstm_io.checkpoint.evaluation import Evaluation, read_evaluation, write_evaluation
from xlstm_io.checkpoint.lives import record_start
from xlstm_io.checkpoint.manifest import parse_manifest


def save(root, step=7, **state):
    slices = [TensorSlice("w", (2, 2), (0, 0), torch.zeros(2, 2))]
    return save_checkpoint(root, slices, state, {}, step=step)


def read(path):
    return read_evaluation(path, parse_manifest(path))


@pytest.mark.parametrize("url", [False, True], ids=["local", "memory"])
def test_what_is_written_is_read(tmp_path, url):
    path = save(f"memory://evaluation{tmp_path}" if url else tmp_path)
    assert read(path) is None
    evaluation = Evaluation(7, 2.5, {"a": 2.0, "b": 3.0})
    write_evaluation(path, evaluation)
    assert read(path) == evaluation


def test_a_loss_that_is_not_finite_is_measured_all_the_same(tmp_path):
    path = save(tmp_path)
    write_evaluation(path, Evaluation(7, math.inf, {"a": math.nan}))
    assert math.isnan(read(path).loss)


def test_a_file_that_names_another_manifest_counts_as_none(tmp_path):
    first, second = save(tmp_path, tokens=1), save(tmp_path, tokens=2)
    write_evaluation(first, Evaluation(7, 2.5))
    (second / "evaluation.json").write_bytes((first / "evaluation.json").read_bytes())
    assert read(first) is not None and read(second) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"manifest": 1, "step": 7}', "\xff", "[" * 9999])
def test_a_damaged_file_counts_as_none(tmp_path, text):
    path = save(tmp_path)
    (path / "evaluation.json").write_bytes(text.encode("latin-1"))
    assert read(path) is None


def test_sets_that_are_not_numbers_count_as_none(tmp_path):
    path = save(tmp_path)
    write_evaluation(path, Evaluation(7, 2.5, {"a": 2.5}))
    body = json.loads((path / "evaluation.json").read_text())
    for sets in ([], {"a": []}, None):
        (path / "evaluation.json").write_text(json.dumps(body | {"sets": sets}))
        assert read(path) is None


def test_version_0_1_0_has_it_in_the_state(tmp_path):
    assert read(save(tmp_path, valid_loss=2.5, valid_step=7)) == Evaluation(7, 2.5)
    assert read(save(tmp_path, valid_loss=2.5, valid_step=6)) is None
    assert read(save(tmp_path, valid_loss=None, valid_step=None)) is None


def test_show_and_report_name_it(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2, 3)]
    assert "not measured at this step" in show(paths[0])
    for path, loss in zip(paths, (2.5, 2.0, math.inf), strict=True):
        step = parse_manifest(path).step
        write_evaluation(path, Evaluation(step, loss, {"web": loss - 0.5, "code": loss + 0.5}))
    assert "valid loss  2.0000 (web 1.5000, code 2.5000)" in show(paths[1])
    assert _best_checkpoint(tmp_path) == (paths[1], 2.0)
    assert _best_checkpoint(tmp_path / "nothing") is None
    record_start(tmp_path / "checkpoints", 1, 1)  # a rewind: what is beyond is never loaded
    assert _best_checkpoint(tmp_path) == (paths[0], 2.5)
