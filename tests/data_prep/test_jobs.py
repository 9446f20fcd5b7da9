"""Several jobs on one build, several sources, and joining finished folders."""

import itertools
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

import data_prep.build.build
import data_prep.build.planner
import data_prep.build.repeated
from tests.data_prep.small_corpus import documents_of, make_texts, run, tree_bytes, write_jsonl
from xlstm_io.errors import Interrupted
from xlstm_io.holder import Holder
from xlstm_io.shards.manifest import load_manifest


@pytest.fixture(scope="module")
def split_corpus(tmp_path_factory, texts):
    """Five files with duplicates across them."""
    folder = tmp_path_factory.mktemp("split")
    for number in range(5):
        write_jsonl(folder / f"{number}.jsonl", texts[number::5] + texts[:3])
    return folder


@pytest.fixture(scope="module")
def one_job(tmp_path_factory, split_corpus, tokenizer_dir):
    flags = ["--input", split_corpus, "--tokenizer", tokenizer_dir, "--seq-len", 16]
    flags += ["--valid-fraction", 0.2, "--shard-mb", 0.002, "--workers", 1]
    out = tmp_path_factory.mktemp("one")
    assert run("build", *flags, "--out", out) == 0
    return flags, out


def slurm(monkeypatch, task: int, tasks: int, first: int = 0) -> None:
    values = {"ID": first + task, "COUNT": tasks, "MIN": first, "MAX": first + tasks - 1}
    for key, value in values.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", str(value))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_array_jobs_and_merge_equal_one_job(one_job, tmp_path, monkeypatch, capsys, order):
    flags, single = one_job
    out = tmp_path / "out"
    for task in order:
        slurm(monkeypatch, task, 3, first=1)
        assert run("merge", out) == 2
        assert run("build", *flags, "--out", out) == 0
        assert not (out / "manifest.json").exists()
    written = capsys.readouterr()
    assert "shards are not finished" in written.err and "no build was begun" in written.err
    assert run("merge", out) == 0
    assert tree_bytes(out) == tree_bytes(single)
    assert load_manifest(out).sources[0].dropped["duplicate"] == 15
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for task in order:  # all is done: nobody writes any more
        slurm(monkeypatch, task, 3, first=1)
        assert run("build", *flags, "--out", out) == 0
    assert run("merge", out) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps


def test_jobs_left_undone_are_done_by_number_or_by_all(one_job, tmp_path, capsys):
    flags, single = one_job
    for name, last in (("a", ["--task", 1, "--tasks", 2]), ("b", ["--tasks", 1])):
        out = tmp_path / name
        assert run("build", *flags, "--out", out, "--task", 0, "--tasks", 2) == 0
        assert run("merge", out) == 2
        assert "numbers 5, 6" in capsys.readouterr().err
        assert run("build", *flags, "--out", out, *last) == 0
        assert run("merge", out) == 0
        assert tree_bytes(out) == tree_bytes(single)


def test_merge_from_elsewhere_keeps_the_provenance(
    one_job, split_corpus, tmp_path, monkeypatch, capsys
):
    flags, _ = one_job
    shutil.copytree(split_corpus, tmp_path / "corpus")
    (tmp_path / "corpus/SOURCE.json").write_text('{"licence": "CC0"}')
    monkeypatch.chdir(tmp_path)
    for task in range(2):
        share = ["--task", task, "--tasks", 2, "--out", "out"]
        assert run("build", *flags, "--input", "corpus", *share) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("merge", "../out") == 0
    assert load_manifest(tmp_path / "out").sources[0].provenance == {"licence": "CC0"}


def planner_of(out, job: int, silent_s: float = 0.0, **process) -> Path:
    """The file of another job that makes the plan, after all files were scanned."""
    (plan,) = (out / "_work/plan").glob("*.json")
    plan.unlink()
    holder = asdict(Holder.here()) | process
    path = plan.with_name(f"{plan.stem}.planner-000001")
    path.write_text(json.dumps({"job": job, "holder": holder}))
    os.utime(path, (path.stat().st_mtime - silent_s,) * 2)
    return path


@pytest.fixture
def planned_by(monkeypatch):
    """The job that has made a plan, and each job that has read the rows of all scans, in order."""
    jobs = []

    def noted(share, check_rows=data_prep.build.plan.check_rows):
        jobs.append(int(os.environ["SLURM_ARRAY_TASK_ID"]))
        check_rows(share)

    monkeypatch.setattr(data_prep.build.plan, "check_rows", noted)
    return jobs


ELSEWHERE = {"host": "elsewhere", "boot": "another"}


def test_one_job_plans_and_the_others_wait_for_it(
    one_job, tmp_path, monkeypatch, capsys, planned_by
):
    flags, single = one_job
    out = tmp_path / "out"
    slurm(monkeypatch, 1, 3)
    assert run("build", *flags, "--out", out) == 0
    planner_of(out, 0, **ELSEWHERE)
    waited = []

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 2:  # then the planner goes on
            slurm(monkeypatch, 0, 3)
            assert run("build", *flags, "--out", out) == 0

    monkeypatch.setattr(data_prep.build.planner.time, "sleep", wait)
    slurm(monkeypatch, 2, 3)
    assert run("build", *flags, "--out", out) == 0
    assert len(waited) == 2 and planned_by == [1, 0]
    assert "job 2 waits for the plan of the corpus, which job 0 on elsewhere" in (
        capsys.readouterr().out
    )
    assert run("merge", out) == 0
    assert tree_bytes(out) == tree_bytes(single)


@pytest.mark.parametrize(
    ("planner", "waits"),
    [
        ({"job": 0, "silent_s": 301.0, **ELSEWHERE}, False),
        ({"job": 1, **ELSEWHERE}, False),  # an earlier start of this job
        ({"job": 0, "pid": 1, "started": 1}, False),  # killed on this machine
        ({"job": 0, "silent_s": 200.0, **ELSEWHERE}, True),
        ({"job": 0}, True),
    ],
)
def test_a_planner_that_is_gone_holds_nobody_up(
    one_job, tmp_path, monkeypatch, planned_by, planner, waits
):
    flags, _ = one_job
    out = tmp_path / "out"
    slurm(monkeypatch, 1, 3)
    assert run("build", *flags, "--out", out) == 0
    path = planner_of(out, **planner)

    def wait(seconds):
        raise Interrupted

    monkeypatch.setattr(data_prep.build.planner.time, "sleep", wait)
    assert run("build", *flags, "--out", out) == (75 if waits else 0)
    assert planned_by == [1] * (1 if waits else 2)
    taken = [*path.parent.glob("*.planner-000002")]
    assert taken == ([] if waits else [path.with_suffix(".planner-000002")])


def test_a_planner_that_fails_leaves_the_plan_to_another(
    one_job, tmp_path, monkeypatch, capsys, planned_by
):
    flags, _ = one_job
    out = tmp_path / "out"
    slurm(monkeypatch, 0, 2)
    assert run("build", *flags, "--out", out) == 0
    (plan,) = (out / "_work/plan").glob("*.json")
    plan.unlink()
    for claim in plan.parent.glob("*.planner-*"):
        claim.unlink()
    table = next((out / "_work/scan").glob("*.scan"))
    table.write_bytes(table.read_bytes()[:-1] + b"\x01")
    slurm(monkeypatch, 1, 2)
    assert run("build", *flags, "--out", out) == 2
    assert f"{table} was damaged, and is removed; run the build again" in capsys.readouterr().err
    assert not [*plan.parent.glob("*.planner-*")]
    assert run("build", *flags, "--out", out) == 0 and planned_by == [0, 1, 1]


@pytest.mark.parametrize("change", ["a new file", "other settings"])
def test_jobs_that_begin_together_with_other_input_do_not_mix(
    tmp_path, tokenizer_dir, monkeypatch, capsys, change
):
    """A folder takes one build: the second job has begun before the first one says which."""
    for name in "ac":  # of equal sizes, so that the shards of both builds have equal counts
        texts = [f"{name} {number:03d} of equal size" for number in range(40)]
        (tmp_path / "in").mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"in/{name}.jsonl", texts)
    flags = ["--input", tmp_path / "in", "--tokenizer", tokenizer_dir, "--valid-fraction", 0]
    flags += ["--shard-mb", 0.0004, "--workers", 1, "--tasks", 2, "--out", tmp_path / "out"]
    plan_build, written = data_prep.build.build.plan_build, list[Path]()

    def slowly(*arguments):
        monkeypatch.setattr(data_prep.build.build, "plan_build", plan_build)
        if change == "a new file":
            write_jsonl(tmp_path / "in/b.jsonl", [f"b {n:03d} of equal size" for n in range(40)])
        more = ["--seq-len", 32 if change == "other settings" else 16, "--task", 1]
        assert run("build", *flags, *more) == 0
        written.extend(tmp_path.rglob("*.tar"))
        return plan_build(*arguments)

    monkeypatch.setattr(data_prep.build.build, "plan_build", slowly)
    before = [*flags, "--seq-len", 16, "--task", 0]
    assert run("build", *before) == 2
    words = {"a new file": "other contents of --input", "other settings": "seq_len 32 -> 16"}
    assert words[change] in capsys.readouterr().err
    assert written and written == list(tmp_path.rglob("*.tar"))


def test_array_with_gaps_is_refused(one_job, tmp_path, monkeypatch, capsys):
    slurm(monkeypatch, 0, 2)
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "7")
    assert run("build", *one_job[0], "--out", tmp_path / "out") == 2
    assert "has gaps" in capsys.readouterr().err


def test_large_corpora_find_the_same_duplicates_in_buckets(one_job, tmp_path, monkeypatch):
    flags, single = one_job
    monkeypatch.setattr(data_prep.build.repeated, "BUCKET_ROWS", 4)
    assert run("build", *flags, "--out", tmp_path / "out") == 0
    assert tree_bytes(tmp_path / "out") == tree_bytes(single)
    assert not list((tmp_path / "out").rglob("*buckets*"))


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory, tokenizer_dir, texts):
    folder = tmp_path_factory.mktemp("sources")
    web = write_jsonl(folder / "web.jsonl", texts[:70])
    code = write_jsonl(folder / "code.jsonl", [*texts[60:], *make_texts(30, seed=4)])
    (folder / "prep.yaml").write_text(
        f"tokenizer: {tokenizer_dir}\nseq_len: 16\nvalid_fraction: 0.2\nworkers: 1\n"
        f"out: {folder}/out\nsources:\n"
        f"  - {{name: web, input: {web}, licence: CC0}}\n"
        f"  - {{name: code, input: [{code}], origin: made up}}\n"
    )
    assert run("build", folder / "prep.yaml") == 0
    return folder


def test_sources_share_one_deduplication(two_sources, texts):
    out = two_sources / "out"
    web, code = load_manifest(out).sources
    assert (web.name, web.provenance) == ("web", {"licence": "CC0"})
    assert (code.name, code.provenance) == ("code", {"origin": "made up"})
    assert (web.dropped["duplicate"], code.dropped["duplicate"]) == (0, 10)
    found = [documents_of(out, split, "web") for split in ("train", "valid")]
    assert sorted(itertools.chain(*found)) == sorted(texts[:70])
    found = [documents_of(out, split, "code") for split in ("train", "valid")]
    assert sorted(itertools.chain(*found)) == sorted([*texts[70:], *make_texts(30, seed=4)])
    assert run("verify", out, "--full") == 0


def test_bad_sources_are_named_together(two_sources, tmp_path, capsys):
    text = (two_sources / "prep.yaml").read_text()
    bad = text.replace("licence: CC0", "licens: CC0, text_split: words")
    (tmp_path / "prep.yaml").write_text(bad)
    assert run("build", tmp_path / "prep.yaml") == 2
    error = capsys.readouterr().err
    assert (
        "sources[0].licens is not a setting; did you mean licence?" in error
        and "sources[0].text_split" in error
    )
    (tmp_path / "prep.yaml").write_text(text.replace("name: web", "name: code") + "input: x\n")
    assert run("build", tmp_path / "prep.yaml") == 2
    error = capsys.readouterr().err
    assert "either input or sources" in error and "must differ" in error


def build_source(folder: Path, name: str, texts, tokenizer_dir, **more) -> Path:
    corpus = write_jsonl(folder / f"{name}.jsonl", texts)
    flags = {"seq-len": 16, "valid-fraction": 0.2, "workers": 1, "source": name} | more
    words = itertools.chain(*((f"--{key}", value) for key, value in flags.items()))
    out = folder / name
    assert run("build", "--input", corpus, "--tokenizer", tokenizer_dir, "--out", out, *words) == 0
    return out


def test_finished_folders_are_joined_unless_documents_repeat(
    tmp_path, tokenizer_dir, texts, capsys
):
    first = build_source(tmp_path, "a", texts[:50], tokenizer_dir)
    second = build_source(tmp_path, "b", texts[50:], tokenizer_dir)
    third = build_source(tmp_path, "c", texts[40:90], tokenizer_dir)
    out = tmp_path / "joined"
    assert run("merge", out, "--inputs", first, second) == 0
    assert run("verify", out, "--full") == 0
    assert [source.name for source in load_manifest(out).sources] == ["a", "b"]
    found = documents_of(out, "train") + documents_of(out, "valid")
    assert sorted(found) == sorted(texts)
    before = tree_bytes(out)
    capsys.readouterr()
    assert run("merge", out, "--inputs", first, second) == 0
    assert "nothing to do" in capsys.readouterr().out and tree_bytes(out) == before

    new = tmp_path / "new"
    assert run("merge", new, "--inputs", first, third) == 2
    assert "10 of 100 documents are in an earlier folder too" in capsys.readouterr().err
    assert run("merge", new, "--inputs", first, third, "--allow-duplicates") == 0
    shutil.rmtree(second / "_work")
    assert run("merge", tmp_path / "newer", "--inputs", first, second) == 2
    assert "cannot be looked for" in capsys.readouterr().err
    others = {"seq-len": 8, "valid-fraction": 0.5}
    other = build_source(tmp_path, "d", texts[:9], tokenizer_dir, **others)
    assert run("merge", tmp_path / "newer", "--inputs", first, other) == 2
    said = capsys.readouterr().err
    assert "seq_len 16 and 8" in said and "valid_fraction 0.2 and 0.5" in said
    assert run("merge", out, "--inputs", first, third, "--allow-duplicates") == 2
    assert tree_bytes(out) == before


def test_joining_writes_nothing_into_the_folders_that_it_joins(
    tmp_path, tokenizer_dir, texts, monkeypatch
):
    """They may be others', who let us read."""
    folders = [
        build_source(tmp_path, name, part, tokenizer_dir)
        for name, part in (("a", texts[:50]), ("b", texts[50:]))
    ]
    monkeypatch.setattr(data_prep.build.repeated, "BUCKET_ROWS", 4)
    before = {path: path.stat().st_mtime_ns for f in folders for path in [f, *f.rglob("*")]}
    assert run("merge", tmp_path / "joined", "--inputs", *folders) == 0
    after = {path: path.stat().st_mtime_ns for f in folders for path in [f, *f.rglob("*")]}
    linked = {path for path in before if path.is_file()}  # a link changes no time of a file
    assert {path for path in before if before[path] != after[path]} <= linked
    assert not list((tmp_path / "joined").glob("buckets*"))


def test_filters_are_counted_by_reason(tmp_path, tokenizer_dir, texts, monkeypatch, capsys):
    (tmp_path / "my_filters.py").write_text(
        "def no_zebra(text):\n    return 'zebra' not in text\n\n\ndef broken(text):\n    1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    kept = [text for text in texts if 20 <= len(text) <= 400]
    edges = ["abc " * 5, "abc " * 100]  # just long and short enough
    bad = [
        "12 34 56 78 90 12 34 56 78",
        "same line here\n" * 9,
        "x" * 99,
        "a zebra is a zebra " * 2,
    ]
    corpus = write_jsonl(tmp_path / "c.jsonl", [*texts, *bad, *edges, ""])
    flags = ["--input", corpus, "--tokenizer", tokenizer_dir, "--valid-fraction", 0.2]
    flags += ["--min-chars", 20, "--max-chars", 400, "--min-letter-share", 0.2, "--workers", 1]
    flags += ["--max-repeated-line-share", 0.8, "--max-mean-word-chars", 50]
    flags += ["--filter-functions", "my_filters:no_zebra"]
    out = tmp_path / "out"
    assert run("build", *flags, "--out", out) == 2
    assert "allow it in this call with --allow-functions" in capsys.readouterr().err
    assert run("build", *flags, "--out", out, "--allow-functions") == 0
    (source,) = load_manifest(out).sources
    assert source.dropped.pop("min_chars") == sum(len(text) < 20 for text in texts)
    assert source.dropped.pop("max_chars") == sum(len(text) > 400 for text in texts)
    reasons = ["min_letter_share", "max_repeated_line_share", "max_mean_word_chars"]
    expected = dict.fromkeys([*reasons, "my_filters:no_zebra", "empty"], 1)
    assert source.dropped == expected | {"duplicate": 0, "malformed": 0}
    assert source.filters["min_chars"] == 20 and "sha256" in source.filters["my_filters:no_zebra"]
    found = documents_of(out, "train") + documents_of(out, "valid")
    assert sorted(found) == sorted([*kept, *edges])
    broken = [*flags[:-1], "my_filters:broken", "--allow-functions", "--out", tmp_path / "new"]
    assert run("build", *broken) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    missing = [*flags[:-1], "my_filters:none", "--allow-functions", "--out", tmp_path / "new"]
    assert run("build", *missing) == 2
    assert "my_filters:none" in capsys.readouterr().err


def test_malformed_records_of_many_files_are_counted_and_some_are_logged(
    tmp_path, tokenizer_dir, texts, monkeypatch, capsys
):
    """A corpus of 20,000 files has millions: no process holds them all."""
    monkeypatch.setattr("data_prep.build.scan._LOGGED_IN_ALL", 8)
    (tmp_path / "in").mkdir()
    for number in range(4):
        file = write_jsonl(tmp_path / f"in/{number}.jsonl", texts[number::4])
        file.write_text(file.read_text() + "broken\n" * 3)
    flags = ["--input", tmp_path / "in", "--tokenizer", tokenizer_dir, "--valid-fraction", 0.2]
    flags += ["--workers", 1, "--out", tmp_path / "out"]
    for _ in range(2):
        assert run("build", *flags) == 0
        log = (tmp_path / "out/_work/malformed.log").read_text().splitlines()
        assert [line.split("/in/")[1][0] for line in log] == [*"00112233"]
        (tmp_path / "out/manifest.json").unlink()  # the next one reads the stored scans
    assert "skipped: 7 more" in capsys.readouterr().out
    assert run("build", *flags) == 0
    assert load_manifest(tmp_path / "out").sources[0].dropped["malformed"] == 12


def test_malformed_records_are_logged(tmp_path, tokenizer_dir, texts):
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    with open(corpus, "a") as file:
        file.write("broken\n" * 9)
    flags = ["--input", corpus, "--tokenizer", tokenizer_dir, "--valid-fraction", 0.2]
    assert run("build", *flags, "--workers", 1, "--out", tmp_path / "out") == 0
    log = (tmp_path / "out/_work/malformed.log").read_text().splitlines()
    assert [line.split(": ")[0] for line in log] == [f"{corpus}:{121 + n}" for n in range(9)]
    assert json.loads((tmp_path / "out/_work/report.json").read_text())["documents"] == 120
