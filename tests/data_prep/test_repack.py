"""Packing again without tokenizing: the same documents, whatever was before."""

import shutil

import pytest

import data_prep.tools.repack
from tests.data_prep.small_corpus import documents_of, run, tree_bytes
from xlstm_io.errors import Interrupted
from xlstm_io.shards.manifest import load_manifest


@pytest.fixture(scope="module")
def best_fit(tmp_path_factory, build_flags):
    out = tmp_path_factory.mktemp("best_fit")
    assert run("build", *build_flags, "--packing", "best_fit", "--out", out) == 0
    return out


def test_best_fit_build_holds_every_document(best_fit, shards, build_flags, tmp_path, capsys):
    assert run("verify", best_fit, "--full") == 0
    for split in ("train", "valid"):
        assert documents_of(best_fit, split) == documents_of(shards, split)
    assert run("inspect", best_fit, "--row", 0) == 0
    two = tmp_path / "two"
    assert run("build", *build_flags, "--packing", "best_fit", "--workers", 2, "--out", two) == 0
    assert tree_bytes(two) == tree_bytes(best_fit)


@pytest.mark.parametrize("seq_len", [3, 16, 40, 1000])
@pytest.mark.parametrize("before", ["concat", "best_fit"])
@pytest.mark.parametrize("after", ["concat", "best_fit"])
def test_repacked_shards_hold_the_same_documents(
    shards, best_fit, tmp_path, before, after, seq_len, capsys
):
    source, out = {"concat": shards, "best_fit": best_fit}[before], tmp_path / "out"
    flags = ["--seq-len", seq_len, "--packing", after, "--out", out, "--workers", 1]
    if (seq_len, before) == (16, after):
        assert run("repack", source, *flags) == 2
        assert "already" in capsys.readouterr().err
        return
    assert run("repack", source, *flags) == 0
    assert run("verify", out, "--full") == 0
    manifest, old = load_manifest(out), load_manifest(source)
    assert (manifest.seq_len, manifest.packing) == (seq_len, after)
    for split in ("train", "valid"):
        assert sorted(documents_of(out, split)) == sorted(documents_of(source, split))
        now, then = (m.sources[0].splits[split] for m in (manifest, old))
        for name in ("tokens", "targets", "docs", "bytes_in"):
            assert getattr(now, name) == getattr(then, name)


def test_repack_of_concat_is_the_build_of_that_length(shards, build_flags, tmp_path):
    """Packing again gives the tars that tokenizing for the new length would have given."""
    for packing in ("concat", "best_fit"):
        flags = ["--seq-len", 24, "--packing", packing, "--out"]
        assert run("repack", shards, *flags, tmp_path / f"re-{packing}", "--workers", 2) == 0
        assert run("build", *build_flags, *flags, tmp_path / packing) == 0
        again, built = (tree_bytes(tmp_path / name) for name in (f"re-{packing}", packing))
        del again["manifest.json"], built["manifest.json"]
        assert again == built


def test_interrupted_repack_goes_on_and_then_is_a_no_op(shards, tmp_path, monkeypatch, capsys):
    flags = ["--seq-len", 20, "--workers", 1, "--out"]
    assert run("repack", shards, *flags, tmp_path / "fresh") == 0
    real, done = data_prep.tools.repack.repack_shard, []

    def stop_after_two(task, tick):
        if len(done) == 2:
            raise Interrupted
        done.append(task.out / task.entry.path)
        return real(task, tick)

    out = tmp_path / "out"
    monkeypatch.setattr(data_prep.tools.repack, "repack_shard", stop_after_two)
    assert run("repack", shards, *flags, out) == 75
    assert not (out / "manifest.json").exists()
    stamps = [path.stat().st_mtime_ns for path in done]
    monkeypatch.setattr(data_prep.tools.repack, "repack_shard", real)
    assert run("repack", shards, *flags, out) == 0
    assert [path.stat().st_mtime_ns for path in done] == stamps
    assert tree_bytes(out) == tree_bytes(tmp_path / "fresh")
    capsys.readouterr()
    assert run("repack", shards, *flags, out) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_document_that_gets_lost_is_an_error(shards, tmp_path, monkeypatch, capsys):
    def all_but_one(*words, real=data_prep.tools.repack.stored_documents):
        yield from list(real(*words))[1:]

    monkeypatch.setattr(data_prep.tools.repack, "stored_documents", all_but_one)
    out = tmp_path / "out"
    assert run("repack", shards, "--seq-len", 20, "--workers", 1, "--out", out) == 2
    assert "tokens, the manifest says" in capsys.readouterr().err
    assert not (out / "manifest.json").exists() and not list(out.rglob("*.tar"))


def test_repack_overwrites_nothing(shards, tmp_path, capsys):
    copy = shutil.copytree(shards, tmp_path / "copy")
    before = tree_bytes(copy)
    assert run("repack", shards, "--seq-len", 20, "--out", copy) == 2
    assert "was not made by this command" in capsys.readouterr().err
    assert tree_bytes(copy) == before
    assert run("repack", copy, "--seq-len", 20) == 0
    assert load_manifest(tmp_path / "copy-20").seq_len == 20
    assert run("repack", copy, "--seq-len", 24, "--out", tmp_path / "copy-20") == 2
    assert "other shards or settings" in capsys.readouterr().err
    assert run("repack", copy, "--seq-len", 1) == 2
