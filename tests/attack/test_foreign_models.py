"""A stranger's folder is data: an import of it runs nothing, takes no memory, and ends in words."""

import json
import pickle
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.xlstm_mcore.convert.test_import import write_case
from xlstm_io.tensor_files import TensorFileError, open_tensors
from xlstm_mcore.convert import cli
from xlstm_mcore.convert.imports.plan import make_plan, open_hf

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    write_case(tmp_path / "theirs", "native")
    return tmp_path / "theirs"


def refused(folder, capsys, command="from-hf"):
    """The one message of an import that must end with exit code 2 and leave nothing."""
    out = folder.parent / "out"
    assert cli.main([command, str(folder), str(out)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    assert not out.exists()
    return message


def rewrite_header(file, change):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


NAME = "lm_head.weight"


def entry(**changes):
    return lambda header: header[NAME].update(changes)


HEADERS = {
    "outside": (entry(data_offsets=[0, 1 << 40]), "lies outside the file"),
    "backwards": (entry(data_offsets=[64, 0]), "lies outside the file"),
    "negative": (entry(data_offsets=[-8, 23032]), "lies outside the file"),
    "no numbers": (entry(data_offsets=["0", None]), "lies outside the file"),
    "three numbers": (entry(data_offsets=[0, 1, 2]), "not a safetensors file"),
    "another size": (entry(shape=[90, 65]), "is not [90, 65] of F32"),
    "huge shape": (entry(shape=[1 << 60, 1 << 60]), "not a safetensors file"),
    "negative shape": (entry(shape=[-90, -64]), "not a safetensors file"),
    "another dtype": (entry(dtype="F64"), "which is not"),
    "unknown dtype": (entry(dtype="X7"), "has the dtype 'X7'"),
    "dtype of no kind": (entry(dtype=["F32"]), "not a safetensors file"),
    "overlap": (
        lambda header: header.update({f"w{n}": header[NAME] for n in range(20)}),
        "tensors overlap",
    ),
    "no entry": (lambda header: header.update({NAME: 7}), "not a safetensors file"),
    "whole numbers": (
        lambda header: header[NAME].update(dtype="I32"),
        "lm_head.weight [90, 64]: is int32",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_false_headers(folder, capsys, name):
    change, words = HEADERS[name]
    rewrite_header(folder / "model.safetensors", change)
    assert words in refused(folder, capsys)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        (1 << 62).to_bytes(8, "little"),
        (50).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (4).to_bytes(8, "little") + b"\xff\xff\xff\xff",
    ],
    ids=["empty", "cut", "huge header", "header cut", "a list", "deep", "not UTF-8"],
)
def test_files_that_are_not_safetensors(folder, capsys, data):
    (folder / "model.safetensors").write_bytes(data)
    assert "model.safetensors" in refused(folder, capsys)


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../model.safetensors", "outside its folder"),
        ("/etc/passwd", "outside its folder"),
        ("link.safetensors", "a link leads to"),
        ("gone.safetensors", "is missing"),
        (7, "is missing"),
    ],
)
def test_an_index_names_files_of_its_folder_alone(folder, capsys, name, words):
    (folder.parent / "model.safetensors").write_bytes(b"secret")
    (folder / "link.safetensors").symlink_to(folder.parent / "model.safetensors")
    write_index(folder, {NAME: name})
    assert words in refused(folder, capsys)


def test_an_index_that_promises_too_much(folder, capsys):
    write_index(folder, {"more.weight": "model.safetensors"})
    assert "names more.weight, which its files do not hold" in refused(folder, capsys)
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "does not hold a JSON object" in refused(folder, capsys)


def test_names_in_files_are_spelled_out_in_messages(folder):
    write_index(folder, {NAME: "mod\x7f\n.safetensors"})
    with pytest.raises(TensorFileError, match=r"mod\\x7f\\n\.safetensors is missing"):
        open_tensors(folder)
    write_index(folder, {"a\x7f": "model.safetensors"})
    with pytest.raises(TensorFileError, match=r"names a\\x7f, which"):
        open_tensors(folder)
    (folder / "model.safetensors.index.json").unlink()
    rewrite_header(folder / "model.safetensors", lambda header: header.update({"a\x7f": EMPTY}))
    foreign = open_hf(folder)
    with foreign.tensors:
        plan = make_plan(foreign)
    assert plan.problems == ["a\\x7f: left over, the model has no place for it"]
    assert "\x7f" not in plan.as_text()


def test_the_cache_of_the_hub_has_links_to_its_blobs(folder, tmp_path):
    snapshot = tmp_path / "hub/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub/blobs").mkdir()
    for file in folder.iterdir():
        file.rename(tmp_path / "hub/blobs" / file.name)
        (snapshot / file.name).symlink_to(tmp_path / "hub/blobs" / file.name)
    assert cli.main(["from-hf", str(snapshot), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, "model_type='bert' cannot be imported; xlstm, llama"),
        ({"model_type": ["xlstm"]}, "cannot be imported"),
        ({"num_heads": float("nan")}, "NaN is not a number of JSON"),
        ({"num_heads": -4}, "num_heads=-4 must be"),
        ({"num_heads": 1e300}, "must be a positive whole number"),
        ({"num_heads": 10**30}, "must be a positive whole number"),
        ({"num_heads": True}, "num_heads=True must be"),
        ({"num_heads": 5}, "heads do not divide"),
        ({"norm_eps": float("inf")}, "Infinity is not a number of JSON"),
        ({"gate_soft_cap": "15"}, "gate_soft_cap='15' must be"),
        ({"hidden_size": 10**9}, "says hidden size 1000000000"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers, the tensors have 64 and 2"),
        ({"add_out_norm": False}, "add_out_norm=False; only models with add_out_norm=True"),
    ],
)
def test_configurations_without_sense(folder, capsys, changes, words):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert words in refused(folder, capsys)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": "M" * 10_000_000}, "more layers than there are tensors"),
        ({"pattern": 7}, "pattern has '7'"),
        ({"pattern": "Mxs*"}, "pattern has 'x'"),
        ({"ffn_dim": 0}, "ffn_dim=0 must be"),
        ({"ffn_dim": 4096}, "has shape [192, 64]"),
        ({"hidden_size": "wide"}, "model.hidden_size=wide"),
        ({"norm": None}, "model.norm=None"),
        ({"pattern": "l", "num_heads": 5}, "5 heads do not divide a width of 64"),
        ({"num_heads": 10**9}, "heads do not divide"),
    ],
)
def test_configurations_of_our_own_class_without_sense(tmp_path, capsys, changes, words):
    write_case(tmp_path / "theirs", "custom")
    file = tmp_path / "theirs/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert words in refused(tmp_path / "theirs", capsys)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\x00"])
def test_a_config_that_is_not_json(folder, capsys, text):
    (folder / "config.json").write_text(text)
    assert "config.json" in refused(folder, capsys)


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_build_tensors_and_run_nothing(folder, tmp_path, capsys):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(tensors, file)
    assert cli.main(["from-hf", str(folder), str(tmp_path / "good")]) == 0
    capsys.readouterr()
    traces = tmp_path / "trace"
    torch.save(tensors | {"x": Bomb(traces)}, file)
    assert "nothing of it was run" in refused(folder, capsys)
    file.write_bytes(pickle.dumps(Bomb(traces)))
    assert "not an archive of torch.save" in refused(folder, capsys)
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    assert "not an archive of torch.save" in refused(folder, capsys)
    torch.save([tensors], file)
    assert "is not a state dict" in refused(folder, capsys)
    torch.save(tensors | {NAME: torch.zeros(1).expand(1 << 40)}, file)
    assert "is not a tensor that the file has the bytes of" in refused(folder, capsys)
    assert not traces.exists()


def test_an_archive_that_grows_when_it_is_read_is_refused(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    plain, file = folder.parent / "plain.bin", folder / "pytorch_model.bin"
    torch.save(tensors, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, b"\0" * 300_000 + old.read(item))
    assert "is compressed" in refused(folder, capsys)


def test_other_files_than_state_dicts(tmp_path, capsys):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "x.pt")
    assert "not a state dict of pip xlstm" in refused(tmp_path / "x.pt", capsys, "from-nxai")
    assert "no such file" in refused(tmp_path / "gone.pt", capsys, "from-nxai")
    (tmp_path / "empty").mkdir()
    assert "has no model.safetensors" in refused(tmp_path / "empty", capsys, "from-nxai")
    assert "config.json: no such file" in refused(tmp_path / "empty", capsys)


def test_memory_stays_bounded_whatever_a_header_claims(folder):
    """Under a limit of address space, with a config and headers of terabytes."""
    rewrite_header(folder / "model.safetensors", entry(shape=[1 << 40, 64]))
    limit = 24 << 30  # torch alone maps several GiB

    done = subprocess.run(
        [sys.executable, "-m", "xlstm_mcore.convert", "from-hf", str(folder), str(folder / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
