import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.sources.documents import Document, Fields, Malformed
from data_prep.sources.files import expand_inputs
from data_prep.sources.readers import read_documents
from xlstm_io.errors import PrepError

TEXTS = ["one\nline", "", "zwei ü", "  three "]


def jsonl() -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def write(path, data: bytes):
    path.write_bytes(data)
    return path


def texts_of(path, **kwargs):
    return [item.text for item in read_documents(path, **kwargs)]


def test_jsonl_plain_gz_zst_agree(tmp_path):
    assert texts_of(write(tmp_path / "a.jsonl", jsonl())) == TEXTS
    assert texts_of(write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl()))) == TEXTS
    two_frames = b"".join(zstandard.compress(part) for part in (jsonl()[:30], jsonl()[30:]))
    assert texts_of(write(tmp_path / "a.jsonl.zst", two_frames)) == TEXTS


def test_parquet_with_other_column_and_null(tmp_path):
    """A null is a text that is empty, not a record that is malformed."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [7, 8, 9], "body": ["x", None, "y"]}), path)
    items = list(read_documents(path, Fields("body")))
    assert items == [Document(0, "7", "x"), Document(1, "8", ""), Document(2, "9", "y")]
    with pytest.raises(PrepError, match=r"no column 'text'.*body"):
        list(read_documents(path))


def test_text_file_and_bad_utf8_names_the_line(tmp_path):
    assert texts_of(write(tmp_path / "a.txt", "é\r\nb".encode())) == ["é\r\nb"]
    (bad,) = read_documents(write(tmp_path / "b.txt", b"ok\nok\n\xff\n"))
    assert bad.where.endswith("b.txt:3")


def test_malformed_lines_are_named_and_the_rest_is_read(tmp_path):
    lines = [b'{"text": "a"}', b"{broken", b'["list"]', b'{"body": 1}', b"", b'{"text": "b"}']
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    items = list(read_documents(path))
    assert [i.where for i in items if isinstance(i, Malformed)] == [
        f"{path}:{n}" for n in (2, 3, 4)
    ]
    assert [(i.record, i.text) for i in items if isinstance(i, Document)] == [(0, "a"), (5, "b")]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_wanted_records_only(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write(path, jsonl())
    else:
        pq.write_table(pa.table({"text": TEXTS}), path)
    found = list(read_documents(path, wanted=np.array([0, 2])))
    assert [(item.record, item.text) for item in found] == [(0, TEXTS[0]), (2, TEXTS[2])]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_truncated_archive_is_an_error_not_an_end(tmp_path, suffix):
    big = b"".join(b'{"text": "%d"}\n' % (n * n) for n in range(5000))
    packed = gzip.compress(big) if suffix == "gz" else zstandard.compress(big)
    path = write(tmp_path / f"a.jsonl.{suffix}", packed[:-20])
    with pytest.raises(PrepError, match=r"a\.jsonl"):
        list(read_documents(path))


def test_not_parquet(tmp_path):
    with pytest.raises(PrepError, match="not a parquet file"):
        list(read_documents(write(tmp_path / "a.parquet", b"nothing of the kind")))


def test_expand_folders_globs_and_order(tmp_path):
    for name in ("b/2.jsonl", "a.txt", "b/1.jsonl.gz", "b/.hidden.txt", "b/picture.png", "c.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "SOURCE.json").write_text("{}")
    names = [Path(p).relative_to(tmp_path).as_posix() for p in expand_inputs([str(tmp_path)])]
    assert names == ["a.txt", "b/1.jsonl.gz", "b/2.jsonl"]
    twice = expand_inputs([str(tmp_path / "**/*.jsonl"), str(tmp_path / "b/2.jsonl")])
    assert twice == [str(tmp_path / "b/2.jsonl")]
    assert expand_inputs([str(tmp_path / "*.log")]) == [str(tmp_path / "c.log")]


def test_expand_refuses_nothing(tmp_path):
    with pytest.raises(PrepError, match="no such file"):
        expand_inputs([str(tmp_path / "missing*")])
    with pytest.raises(PrepError, match="no readable file"):
        expand_inputs([str(tmp_path)])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(PrepError, match="empty"):
        expand_inputs([str(tmp_path)])
    shutil.rmtree(tmp_path)
