"""A tiny folder of shards, and manifests that a stranger has changed and signed."""

import json
import shutil

import pytest

from benchmarks.loader.synthetic_shards import write_shards
from xlstm_io.shards.manifest import MANIFEST_NAME, _digest


@pytest.fixture(scope="session")
def clean_shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean") / "shards"
    root.mkdir()
    write_shards(root, {"a": [6, 5]}, seq_len=16, block_rows=4, valid_rows=3)
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.model").write_bytes(b"model")
    return root


@pytest.fixture
def shards(clean_shards, tmp_path):
    """A copy of its own for each test."""
    return shutil.copytree(clean_shards, tmp_path / "in" / "shards")


def change_manifest(root, change):
    """Let `change` edit the manifest's fields, and sign them as our own code would."""
    file = root / MANIFEST_NAME
    fields = json.loads(file.read_bytes())
    change(fields)
    fields["hash"] = _digest(fields, "code", "hash", "checksum")
    fields["checksum"] = _digest(fields, "checksum")
    file.write_text(json.dumps(fields))
