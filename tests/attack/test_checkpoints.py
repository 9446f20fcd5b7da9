"""Strangers' checkpoints whose values are hostile, with hashes that fit.

Every program that takes a checkpoint is tried on each: it is read, or refused in one message. More
of them by command: `python -m pytest tests/attack/test_checkpoints.py --attacks 250`.
"""

import json
import random
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from pretrain.checkpoint import Candidates, TensorSlice, save_checkpoint
from pretrain.checkpoint.retention import Retention, apply_retention
from pretrain.commands.after_run.show import show
from pretrain.config import config_from_dict
from pretrain.data import DataCursor
from pretrain.guard.divergence import Divergence
from pretrain.resume import TrainState, curve_of
from tests.attack import hostile
from tests.attack.children import CRASHED, READ, REFUSED, attempt
from tests.dist.training_runs import tiny_run
from tests.xlstm_mcore.convert.small import train_tokenizer
from xlstm_io.checkpoint import manifest as manifest_module
from xlstm_io.checkpoint.evaluation import Evaluation, write_evaluation
from xlstm_io.checkpoint.lives import record_start
from xlstm_io.checkpoint.manifest import manifest_checksum, read_manifest, resolve, verify_hashes
from xlstm_io.checkpoint.safetensors_stream import hash_file
from xlstm_io.checkpoint.tokenizer import tokenizer_of
from xlstm_io.errors import UserError
from xlstm_io.tokenizer import open_tokenizer, read_tokenizer_files
from xlstm_mcore.convert.export.to_hf import export
from xlstm_mcore.convert.families import custom
from xlstm_mcore.convert.tables import rows
from xlstm_mcore.inference import model_logits, open_model, single_process_groups
from xlstm_mcore.settings import ModelConfig

MODEL = {"pattern": "Ms", "hidden_size": 32, "num_heads": 2, "vocab_size": 460, "round_up_to": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with one checkpoint, which has all that today's programs write."""
    # Once a process has left a group of gloo's, no fork of it can make one. CI runs this file in a
    # process of its own.
    if attempt(single_process_groups, seconds=5).kind == CRASHED:
        pytest.skip("another test has left a process group; run this file by itself")
    folder = tmp_path_factory.mktemp("run")
    file = train_tokenizer(folder / "tokenizer.model")
    rng = torch.Generator().manual_seed(0)
    slices = [
        TensorSlice(row.ours[0], row.shape, (0,) * len(row.shape), values)
        for row in rows(custom.TABLE, ModelConfig.model_validate(MODEL))
        for values in [torch.rand(row.shape, generator=rng)]
    ]
    config = config_from_dict(tiny_run(folder, "data") | {"model": MODEL})
    row = {"sample": 3, "source": "web", "row": 3, "path": "a.tar", "block": 0, "offset": 5}
    state = {
        **asdict(TrainState(step=4, updates=4, tokens=99, seconds=1.5, loss=2.5)),
        "life": 1,
        "provenance": {"git": "abc"},
        "evaluation_due": True,
        "curve": {"steps": 24, "turns": [{"at": 2, "end": 20, "pace": 0.5}]},
        "divergence": {"losses": [2.5], "norms": [1.0], "skipped": 0, "onset": None, "last": None},
        "cursor": {
            "consumed_samples": 16,
            "plan": {"seed": 1},
            "quarantined": [{**row, "expected": "a", "got": "b"}],
            "skipped": [[4, 2]],
        },
        "tokenizer": {"path": str(file), "sha256": open_tokenizer(file).sha256},
    }
    files = read_tokenizer_files(file)
    saved = config.model_dump(mode="json")
    path = save_checkpoint(folder, slices, state, saved, step=4, files=files)
    write_evaluation(path, Evaluation(4, 2.5, {"web": 2.5}))
    record_start(path.parent, 1, 0)
    record_start(path.parent, 2, 4, skip_samples=8)
    return folder, path, config


def use(run, name):
    """What programs do with a stranger's checkpoint, one after the other."""
    folder, path, config = run
    errors = []
    programs = [
        lambda: show(path),
        lambda: resolve(folder),
        lambda: Candidates(folder),
        lambda: apply_retention(path.parent, Retention(keep=1), path),
    ]
    if name in ("manifest", "metadata"):
        programs += [
            lambda: verify_hashes(path, read_manifest(path)),
            lambda: tokenizer_of(path),
            lambda: continue_run(config, read_manifest(path)),
            lambda: model_logits(open_model(path), torch.tensor([[1, 2, 3]])),
            lambda: export(path, folder / "out", dry_run=True),
        ]
    for program in programs:
        try:
            program()
        except UserError as error:  # anything else is a fault
            errors.append(error)
    for error in errors:
        raise error


def continue_run(config, manifest):
    """What a run reads when it continues."""
    TrainState.saved_in(manifest).logged()
    curve, _ = curve_of(config, manifest, [])
    curve.rates(1e-3, config.schedule)(manifest.step)
    DataCursor.from_dict(manifest.state.get("cursor", {"consumed_samples": 0})).skip(1)
    Divergence(config, manifest.state.get("divergence")).limits()


def tried(run, name, number):
    """The outcome of one try with a changed file, which is put back afterwards."""
    _, path, _ = run
    file = FILES[name](path)
    manifest, sound = path / "manifest.json", file.read_bytes()
    signed = manifest.read_bytes()
    try:
        rng = random.Random(f"{file.name} {number}")
        file.write_text(json.dumps(hostile.changed(json.loads(sound), rng)))
        body = json.loads(manifest.read_text())
        if isinstance(body, dict):
            if file != manifest and file.name in body["files"]:
                body["files"][file.name] = asdict(hash_file(file))
            body["checksum"] = manifest_checksum(body)
        manifest.write_text(json.dumps(body))
        return attempt(lambda: use(run, name))
    finally:
        file.write_bytes(sound)
        manifest.write_bytes(signed)


FILES = {
    "manifest": lambda path: path / "manifest.json",
    "metadata": lambda path: path / "metadata.json",
    "evaluation": lambda path: path / "evaluation.json",
    "life": lambda path: path.parent / "lives" / "000002.json",
}


def faults_of(run, name, count):
    """What went wrong, by number."""
    found = {}
    for number in range(count):
        outcome = tried(run, name, number)
        if outcome.kind == CRASHED:
            found[number] = outcome.message
        elif not outcome.message.replace("\n", "").isprintable():
            found[number] = f"control codes: {outcome.message!r}"
        elif len(outcome.message) > 4000:
            found[number] = f"a message of {len(outcome.message)} characters"
    return found


def test_the_sound_one_is_read(run):
    outcome = attempt(lambda: use(run, "manifest"))
    assert outcome.kind == READ, outcome.message


@pytest.mark.parametrize("name", FILES)
def test_hostile_values_are_read_or_refused(run, name, pytestconfig):
    faults = faults_of(run, name, pytestconfig.getoption("--attacks"))
    assert not faults, "\n".join(f"number {number}: {text}" for number, text in faults.items())


def test_a_check_that_is_taken_out_is_found(run, monkeypatch):
    """So the tries above would notice a value that nobody checks."""

    def objects(values):
        return {name: SimpleNamespace(**entry) for name, entry in values.items()}

    def unchecked(kind, body, **options):
        said = {name: objects(body[name]) for name in ("files", "tensors")}
        return SimpleNamespace(**body | said | {"state": SimpleNamespace(step=None)})

    monkeypatch.setattr(manifest_module, "checked", unchecked)
    assert faults_of(run, "manifest", 12)


def test_damage_without_fitting_hashes_is_refused(run):
    """A flipped bit anywhere in a file that the manifest names."""
    _, path, _ = run
    rng = random.Random(0)
    for file in sorted(path.iterdir()):
        if file.name == "evaluation.json":  # it has no hash: a damaged one counts as none
            continue
        sound = file.read_bytes()
        try:
            for _ in range(3):
                data = bytearray(sound)
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                file.write_bytes(data)
                outcome = attempt(lambda: verify_hashes(path, read_manifest(path)))
                assert outcome.kind == REFUSED, (file.name, outcome.message)
        finally:
            file.write_bytes(sound)
