"""What is noted of a start, and what is not."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.loader.synthetic_shards import write_shards
from pretrain.watching import provenance as module
from pretrain.watching.provenance import provenance
from xlstm_io.shards.manifest import load_manifest


def test_code_versions_command_and_data_are_noted_and_no_secrets(tmp_path, monkeypatch):
    write_shards(tmp_path / "shards", {"a": [4]}, seq_len=8, vocab_size=96)
    manifest = load_manifest(tmp_path / "shards")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    urls = ["https://host/shards?token=hidden", "s3://me:hidden@host/run"]
    monkeypatch.setattr(sys, "argv", ["train", *urls])
    found = provenance([manifest])
    assert "hidden" not in json.dumps(found)
    assert found["environment"]["NCCL_DEBUG"] == "INFO"
    assert found["command"][-1] == "s3://***@host/run"
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    (data,) = found["data"]
    assert (data["manifest"], data["tokenizer"]) == (manifest.hash, manifest.tokenizer_sha256)
    assert set(data["sources"]) == {"a"}
    root = Path(__file__).parents[3]
    assert root == module.SOURCES
    if (root / ".git").exists():
        assert found["code"] is not None and len(found["code"]["commit"]) == 40


def test_a_change_of_the_sources_has_another_hash(tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    assert module.code(tmp_path) is None
    (tmp_path / "code.py").write_text("a = 1\n")
    git("init")
    git("add", ".")
    git("-c", "user.name=x", "-c", "user.email=x", "commit", "-m", "x")
    clean = module.code(tmp_path)
    assert len(clean["commit"]) == 40 and clean["diff"] is None
    (tmp_path / "code.py").write_text("a = 2\n")
    changed = module.code(tmp_path)
    assert changed["commit"] == clean["commit"] and len(changed["diff"]) == 64
