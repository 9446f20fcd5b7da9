"""docs/shards.md: its example reads every row, with the documents where they begin."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.data_prep.small_corpus import run
from xlstm_io.shards.manifest import load_manifest
from xlstm_io.shards.rows import row_masks
from xlstm_io.shards.shard import ShardReader

PAGE = Path(__file__).parents[2] / "docs/shards.md"


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_plain_webdataset_reads_what_we_read(packing, build_flags, tmp_path, monkeypatch):
    flags = [*build_flags, "--packing", packing, "--out", tmp_path / "shards"]
    assert run("build", *flags) == 0
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    assert len(code.splitlines()) <= 12
    found = []
    monkeypatch.chdir(tmp_path)
    exec(
        compile(code + "\n        found.append((inputs, targets, starts))\n", str(PAGE), "exec"),
        {"found": found},
    )

    manifest = load_manifest(tmp_path / "shards")
    assert len(found) == sum(entry.rows for entry in manifest.shards("train")) > 20
    number = 0
    for entry in manifest.shards("train"):
        reader = ShardReader(manifest, entry)
        tokens = np.empty(manifest.row_tokens, reader.dtype)
        for row in range(entry.rows):
            segments = reader.row(row, tokens)
            inputs, targets, starts = found[number]
            assert (inputs == tokens[:-1]).all() and (targets == tokens[1:]).all()
            # The page's rule for targets: those at which a segment begins do not count.
            counted = np.ones(manifest.seq_len, bool)
            counted[starts[starts > 0] - 1] = False
            padding = segments[-1] & np.uint32(1 << 30)
            if padding:
                counted[max(int(starts[-1]) - 1, 0) :] = False
            rows = np.zeros(len(segments), np.int64)
            mask, _ = row_masks(rows, segments, (1, manifest.seq_len))
            assert (counted == (mask[0] > 0)).all()
            number += 1
