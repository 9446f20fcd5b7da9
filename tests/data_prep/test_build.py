import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import data_prep.build.build
from data_prep.build import state
from data_prep.build.encode import shard_path
from data_prep.build.pack import BestFitPacker, ConcatPacker, as_stored
from tests.data_prep.small_corpus import documents_of, make_texts, run, tree_bytes, write_jsonl
from xlstm_io.errors import Interrupted
from xlstm_io.shards.manifest import load_manifest
from xlstm_io.shards.writer import ShardWriter


def test_every_document_once_in_order_and_lossless(shards, texts):
    train, valid = documents_of(shards, "train"), documents_of(shards, "valid")
    assert sorted(train + valid) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]
    assert 5 < len(valid) < 50
    manifest = load_manifest(shards)
    assert len(manifest.shards("train")) > 2
    assert manifest.sources[0].splits["train"].docs == len(train)


def test_workers_do_not_change_a_byte(shards, build_flags, tmp_path):
    assert run("build", *build_flags, "--workers", 2, "--out", tmp_path / "two") == 0
    assert tree_bytes(tmp_path / "two") == tree_bytes(shards)


def test_rerun_is_a_no_op(build_flags, tmp_path, capsys, corpus):
    out = tmp_path / "out"
    assert run("build", *build_flags, "--out", out) == 0
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    capsys.readouterr()
    assert run("build", *build_flags, "--out", out) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == stamps


@pytest.mark.parametrize("linked", [False, True])
def test_shards_within_the_folder_of_texts_are_no_texts(
    corpus, tokenizer_dir, tmp_path, capsys, linked
):
    shutil.copy(corpus, tmp_path)
    texts = tmp_path
    if linked:
        texts = tmp_path / "link"
        texts.symlink_to(tmp_path)
    flags = ["--input", texts, "--tokenizer", tokenizer_dir, "--workers", 1]
    flags += ["--valid-fraction", 0.2, "--out", tmp_path / "shards"]
    assert run("build", *flags) == 0
    (tmp_path / "shards/manifest.json").unlink()
    assert run("build", *flags) == 0
    assert run("build", *flags) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_more_files_than_the_state_can_name_are_refused_before_the_scan(
    corpus, tokenizer_dir, tmp_path, monkeypatch, capsys
):
    """A million texts, a file each: after the scan no run could have read the state again."""
    (tmp_path / "in").mkdir()
    for number in range(40):
        shutil.copy(corpus, tmp_path / f"in/{number}.jsonl")
    flags = ["--input", tmp_path / "in", "--tokenizer", tokenizer_dir, "--workers", 1]
    flags += ["--valid-fraction", 0.2, "--out", tmp_path / "out"]
    for limits in ({"build_state": 40 * 106}, {"json_values": 8 * 39}):
        lower = dataclasses.replace(state.LIMITS, **limits)
        monkeypatch.setattr(state, "LIMITS", lower)
        assert run("build", *flags) == 2
        assert "40 files, more than the state" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        monkeypatch.undo()
    assert run("build", *flags) == 0
    stored = (tmp_path / "out/_work/build.json").read_bytes()
    values = stored.count(b",") + stored.count(b"[") + stored.count(b"{")
    names = sum(2 * len(json.dumps(str(path))) for path in (tmp_path / "in").iterdir())
    few = 2_000  # bytes of the settings
    assert len(stored) < names + 40 * (100 + len("corpus")) + few and values < 8 * 40 + 100


def test_a_check_says_whether_a_build_can_begin_and_writes_nothing(build_flags, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("build", *build_flags, "--out", out, "--check") == 0
    assert f"{out} can be built: 1 file of" in capsys.readouterr().out
    assert not out.exists()
    assert run("build", *build_flags, "--out", out) == 0
    capsys.readouterr()
    assert run("build", *build_flags, "--out", out, "--check") == 0
    assert "what is there is kept" in capsys.readouterr().out
    assert run("build", *build_flags, "--out", out, "--check", "--seq-len", 32) == 2
    missing = ("--input", tmp_path / "nowhere", "--tokenizer", tmp_path, "--out", out)
    assert run("build", *missing, "--check") == 2


def test_same_contents_elsewhere_keep_all_shards(build_flags, shards, tmp_path, corpus):
    out, moved = shutil.copytree(shards, tmp_path / "out"), tmp_path / "moved.jsonl"
    shutil.copy(corpus, moved)
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.tar")}
    assert run("build", *build_flags, "--input", moved, "--out", out) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.tar")} == stamps
    assert tree_bytes(out) == tree_bytes(shards)


def test_interrupted_build_keeps_finished_shards(
    build_flags, shards, tmp_path, monkeypatch, capsys
):
    out, real, done = tmp_path / "out", data_prep.build.build.encode_shard, []

    def stop_after_two(task, tick):
        if len(done) == 2:
            raise Interrupted
        done.append(out / shard_path(task.plan))
        return real(task, tick)

    monkeypatch.setattr(data_prep.build.build, "encode_shard", stop_after_two)
    assert run("build", *build_flags, "--out", out) == 75
    assert "run it again" in capsys.readouterr().err
    assert not (out / "manifest.json").exists()
    assert sorted(out.rglob("*.tar")) == sorted(done)
    stamps = [path.stat().st_mtime_ns for path in done]
    monkeypatch.setattr(data_prep.build.build, "encode_shard", real)
    assert run("build", *build_flags, "--out", out) == 0
    assert [path.stat().st_mtime_ns for path in done] == stamps
    assert tree_bytes(out) == tree_bytes(shards)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_process_then_rerun_is_bit_equal(tmp_path, tokenizer_dir, number):
    corpus = write_jsonl(tmp_path / "c.jsonl", make_texts(3000))
    flags = ["--input", corpus, "--tokenizer", tokenizer_dir, "--seq-len", 16]
    flags = [str(f) for f in [*flags, "--shard-mb", 0.02, "--valid-fraction", 0.1]]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data_prep", "build", *flags, "--workers", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--out", str(out)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while process.poll() is None and not list(out.glob("_work/done/*.json")):
        time.sleep(0.002)
    process.send_signal(number)
    _, message = process.communicate(timeout=30)
    assert process.returncode in ((-9,) if number == signal.SIGKILL else (75,)), message
    assert not (out / "manifest.json").exists()
    for _ in range(100):  # workers of a killed parent end by themselves
        before = sorted(out.rglob("*.tar"))
        time.sleep(0.05)
        if sorted(out.rglob("*.tar")) == before:
            break
    kept = {path: path.stat().st_mtime_ns for path in before}
    assert kept
    assert run("build", *flags, "--workers", 1, "--out", out) == 0
    noted = [path for path, stamp in kept.items() if path.stat().st_mtime_ns == stamp]
    assert len(noted) >= len(kept) - 2  # at most the shard of each worker was written again
    assert run("build", *flags, "--workers", 1, "--out", tmp_path / "fresh") == 0
    assert tree_bytes(out) == tree_bytes(tmp_path / "fresh")


def test_signals_to_every_process_stop_a_build_that_then_goes_on(tmp_path, tokenizer_dir):
    """As Slurm sends them before the end of a job: the parent acts on them, the workers do not."""
    corpus = write_jsonl(tmp_path / "c.jsonl", make_texts(3000))
    flags = ["--input", corpus, "--tokenizer", tokenizer_dir, "--seq-len", 16]
    flags = [str(f) for f in [*flags, "--shard-mb", 0.02, "--valid-fraction", 0.1]]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data_prep", "build", *flags, "--workers", "2"]
    done = 0
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        process = subprocess.Popen(
            [*command, "--out", str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while process.poll() is None and len(list(out.glob("_work/done/*.json"))) <= done:
            time.sleep(0.002)
        os.killpg(process.pid, number)
        _, message = process.communicate(timeout=60)
        assert process.returncode == 75, message
        expected = "python -m data_prep build: interrupted; what is finished is kept"
        assert message.startswith(expected) and message.count("\n") == 1
        done = len(list(out.glob("_work/done/*.json")))
    assert run("build", *flags, "--workers", 1, "--out", out) == 0
    assert run("build", *flags, "--workers", 1, "--out", tmp_path / "fresh") == 0
    assert tree_bytes(out) == tree_bytes(tmp_path / "fresh")


def test_deleted_or_truncated_shard_alone_is_made_again(build_flags, shards, tmp_path):
    out = shutil.copytree(shards, tmp_path / "out")
    first, second, third, *others = sorted(out.rglob("*.tar"))
    stamps = [path.stat().st_mtime_ns for path in others]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    third.with_suffix(".idx.npz").unlink()
    assert run("build", *build_flags, "--out", out) == 0
    assert [path.stat().st_mtime_ns for path in others] == stamps
    assert tree_bytes(out) == tree_bytes(shards)
    third.with_suffix(".idx.npz").unlink()  # of a folder that is finished otherwise
    assert run("build", *build_flags, "--out", out) == 0
    assert tree_bytes(out) == tree_bytes(shards)


def test_damaged_scans_and_plans_are_made_again(build_flags, shards, tmp_path):
    for kind in ("scan/*.scan", "scan/*.json", "plan/*.json", "plan/*.fate"):
        out = shutil.copytree(shards, tmp_path / kind.replace("/", "-"))
        (out / "manifest.json").unlink()
        for path in out.glob(f"_work/{kind}"):
            path.write_bytes(bytes(path.stat().st_size - ("fate" in kind)))
        assert run("build", *build_flags, "--out", out) == 0
        assert tree_bytes(out) == tree_bytes(shards)


def test_duplicates_empty_and_malformed_are_counted(tmp_path, tokenizer_dir, texts, capsys):
    corpus = write_jsonl(tmp_path / "c.jsonl", [*texts, texts[0], texts[7], "", texts[0]])
    with open(corpus, "a") as file:
        file.write('{"text": 3}\nnot json\n')
    flags = ["--tokenizer", tokenizer_dir, "--valid-fraction", 0.2, "--workers", 1]
    out = tmp_path / "out"
    assert run("build", "--input", corpus, *flags, "--out", out) == 0
    report = capsys.readouterr().out
    line = len(texts) + 5
    assert f"{corpus}:{line}: " in report and f"{corpus}:{line + 1}: not JSON" in report
    dropped = load_manifest(out).sources[0].dropped
    assert dropped == {"duplicate": 3, "empty": 1, "malformed": 2}
    assert sorted(documents_of(out, "train") + documents_of(out, "valid")) == sorted(texts)


def test_validation_documents_stay_when_the_corpus_grows(tmp_path, tokenizer_dir, texts, shards):
    corpus = write_jsonl(tmp_path / "c.jsonl", make_texts(50, seed=9) + texts)
    flags = ["--input", corpus, "--tokenizer", tokenizer_dir, "--valid-fraction", 0.2]
    assert run("build", *flags, "--workers", 1, "--out", tmp_path / "out") == 0
    grown = documents_of(tmp_path / "out", "valid")
    assert set(documents_of(shards, "valid")) <= set(grown)
    assert not set(documents_of(shards, "train")) & set(grown)


def test_yaml_with_overrides_and_provenance(tmp_path, corpus, tokenizer_dir):
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(corpus, own / "c.jsonl")
    (own / "SOURCE.json").write_text('{"licence": "CC0"}')
    config = tmp_path / "prep.yaml"
    config.write_text(
        f"input: {own}/c.jsonl\ntokenizer: {tokenizer_dir}\nout: {tmp_path}/out\n"
        "seq_len: 64\nvalid_fraction: 0.2\n"
    )
    assert run("build", config, "--seq-len", 32, "--workers", 1) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.seq_len == 32 and manifest.valid_fraction == 0.2
    assert manifest.sources[0].provenance == {"licence": "CC0"}


def test_large_vocabulary_is_stored_as_uint32():
    from xlstm_io.shards.rows import token_dtype

    assert token_dtype(65_535) == np.uint16 and token_dtype(65_536) == np.uint32


BAD_BUILDS = {
    "missing input": (["--input", "/no/such/path"], "no such file"),
    "missing tokenizer": (["--tokenizer", "/no/such/tok"], "/no/such/tok: No such file"),
    "other settings": (["--seq-len", 32], "seq_len 16 -> 32"),
    "bad numbers": (["--seq-len", 1, "--valid-fraction", 0.9], "seq_len=1"),
    "bad name": (["--source", "../up"], "source='../up'"),
    "other contents": (["--input", "{other}"], "other contents"),
    "empty file": (["--input", "{empty}"], "empty"),
    "all malformed": (["--input", "{garbage}"], "malformed"),
    "wrong field": (["--text-field", "body", "--out", "{new}"], "no text in field 'body'"),
    "no validation": (["--valid-fraction", 1e-6, "--out", "{new}"], "fell into validation"),
    "file as folder": (["--out", "{other}"], "ot a directory"),
}


@pytest.mark.parametrize("name", BAD_BUILDS)
def test_bad_build_is_exit_2_with_one_message_and_no_harm(
    name, build_flags, shards, tmp_path, capsys
):
    flags, message = BAD_BUILDS[name]
    places = {key: tmp_path / f"{key}.jsonl" for key in ("other", "empty", "garbage")}
    places["new"] = tmp_path / "new"
    write_jsonl(places["other"], make_texts(40, seed=5))
    places["empty"].touch()
    places["garbage"].write_text("nothing\n" * 20)
    flags = [f.format(**places) if isinstance(f, str) else f for f in flags]
    before = tree_bytes(shards)
    assert run("build", *build_flags, "--out", shards, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert tree_bytes(shards) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seqlen: 3\nworkers: x\n", "workers='x'"),
        ("- a list", "must hold keys"),
        ("a: [", "not valid YAML"),
        ("seq_len: 8\nseq_len: 9\n", "line 2: seq_len is given twice"),
        (None, "does not exist"),
    ],
)
def test_bad_yaml(tmp_path, text, message, capsys):
    path = tmp_path / "prep.yaml"
    if text is not None:
        path.write_text(text)
    assert run("build", path) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_report_is_kept(shards):
    report = json.loads((shards / "_work/report.json").read_text())
    assert report["lossy"] == 0 and report["round_trips"] > 50


# A change of tars, index or packing must be meant: shards of earlier versions stay readable.
GOLDEN = {
    "concat": ("18605783c53853d8", "d491e54a7fb3ff94"),
    "best_fit": ("04c8490396dd3140", "f96c289628bea556"),
}


@pytest.mark.parametrize("packing", GOLDEN)
def test_golden_shard(packing, tmp_path):
    words = [4 + (n * n) % 326 for n in range(4000)]
    dtype = np.dtype("<u2")
    kind = {"concat": ConcatPacker, "best_fit": BestFitPacker}[packing]
    packer = kind(16, 8, dtype, 1)
    with ShardWriter(tmp_path / "shard-00000000.tar") as writer:
        for number, length in enumerate([3, 40, 0, 14, 15, 16, 7, 200, 1] * 9):
            for block in packer.add(as_stored(words[number : number + length], 0, 2, dtype)):
                writer.write(block)
        for block in packer.finish():
            writer.write(block)
        written = writer.close()
    assert (written.xxh3, written.index_xxh3) == GOLDEN[packing]


def kill_soon(delay: float, command: list[str], out) -> bool:
    """Start a build and kill -9 its process group `delay` seconds after it began to write.

    Returns whether it was still running.
    """

    def written():
        return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.exists()}

    before = written()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **quiet)
    while process.poll() is None and written() == before:
        time.sleep(0.005)
    try:
        process.wait(delay)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


_BUILD_SLOWLY = """
import random, sys, time
import xlstm_io.shards.manifest, xlstm_io.shards.shard
import data_prep.build.scan, data_prep.build.plan, data_prep.cli
rng = random.Random(int(sys.argv[1]))
def slow(real):
    def call(*arguments, **more):
        time.sleep(rng.random() * 0.02)
        return real(*arguments, **more)
    return call
import os
for name in ("replace", "fsync"):  # kills fall around the moments that matter
    setattr(os, name, slow(getattr(os, name)))
sys.exit(data_prep.cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_then_bit_equal(seed, build_flags, tmp_path, corpus, texts):
    """kill -9 again and again at random moments; what is finished stays, the end is the same."""
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in range(4):
        write_jsonl(parts / f"{number}.jsonl", texts[number::4])
    packing = ["concat", "best_fit"][seed % 2]
    flags = [*build_flags, "--input", parts, "--packing", packing, "--shard-mb", 0.001]
    assert run("build", *flags, "--out", tmp_path / "fresh") == 0
    out, rng = tmp_path / "out", np.random.default_rng(seed)
    command = [sys.executable, "-c", _BUILD_SLOWLY, str(seed), "build", *map(str, flags)]
    finished: dict = {}
    killed = 0
    for _ in range(4):
        killed += kill_soon(0.25 * rng.random(), [*command, "--out", str(out)], out)
        for path, stamp in finished.items():
            assert path.stat().st_mtime_ns == stamp  # noted shards are never written again
        notes = [json.loads(p.read_bytes())["entry"] for p in out.glob("_work/done/*.json")]
        finished = {out / e["path"]: (out / e["path"]).stat().st_mtime_ns for e in notes}
    assert killed > 1
    assert run("build", *flags, "--out", out) == 0
    for path, stamp in finished.items():
        assert path.stat().st_mtime_ns == stamp
    assert tree_bytes(out) == tree_bytes(tmp_path / "fresh")
    assert not list(out.rglob("*.tmp.*"))
