from itertools import pairwise

import numpy as np
import pytest

from data_prep.build.pack import BestFitPacker, ConcatPacker, as_stored
from xlstm_io.shards.rows import (
    CONTINUATION,
    NO_DOCUMENT,
    PADDING,
    POSITION_MASK,
    parse_block,
    row_masks,
)

BOS, EOS, PAD = 0, 2, 1


def pack(docs, seq_len, block_rows, kind=ConcatPacker):
    dtype = np.dtype("<u2")
    packer = kind(seq_len, block_rows, dtype, PAD)
    tokens = [as_stored(doc, BOS, EOS, dtype) for doc in docs]
    blocks = [block for doc in tokens for block in packer.add(doc)] + list(packer.finish())
    return packer, blocks


def expected_rows(docs, seq_len):
    """The same rows by the definition: one long list of (token, document, first?)."""
    stream = [
        (token, number, place == 0)
        for number, doc in enumerate(docs)
        for place, token in enumerate([BOS, *doc, EOS])
    ]
    rows = []
    for start in range(0, len(stream) - 1, seq_len):
        row = stream[start : start + seq_len + 1]
        row += [(PAD, -1, False)] * (seq_len + 1 - len(row))
        tokens = [token for token, _, _ in row]
        pairs = pairwise(row)
        mask = [float(a[1] == b[1] and b[1] >= 0) for a, b in pairs]
        rows.append((tokens, mask, [first for _, _, first in row[:-1]]))
    return rows


@pytest.mark.parametrize("seq_len", [2, 3, 5, 16])
@pytest.mark.parametrize("block_rows", [1, 2, 7, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_rows_masks_and_boundaries_by_definition(seq_len, block_rows, seed):
    rng = np.random.default_rng(seed)
    docs = [rng.integers(4, 99, rng.integers(0, 3 * seq_len)).tolist() for _ in range(20)]
    packer, blocks = pack(docs, seq_len, block_rows)
    expected = expected_rows(docs, seq_len)
    found = []
    for block in blocks:
        again = parse_block(block.tokens.tobytes(), block.doc_bytes(), seq_len + 1, "uint16")
        assert (again.tokens == block.tokens).all() and (again.segments == block.segments).all()
        owner = block.segment_rows()
        masks, boundaries = row_masks(owner, block.segments, (len(block.tokens), seq_len))
        found += zip(block.tokens.tolist(), masks.tolist(), boundaries.tolist(), strict=True)
    assert found == expected
    assert all(len(block.tokens) == block_rows for block in blocks[:-1])
    assert packer.tokens == sum(len(doc) + 2 for doc in docs)
    assert sum(sum(mask) for _, mask, _ in found) == packer.tokens - packer.docs


@pytest.mark.parametrize("length", range(12))
def test_every_length_of_a_single_document(length):
    doc = list(range(10, 10 + length))
    packer, blocks = pack([doc], 4, 2)
    rows = [row for block in blocks for row in block.tokens.tolist()]
    assert rows == [row for row, _, _ in expected_rows([doc], 4)]
    assert packer.pad_tokens == sum(row.count(PAD) for row in rows)


def test_no_document_no_block():
    assert pack([], 4, 2)[1] == []


def parts_by_definition(docs, seq_len):
    """(document, continues, tokens) of every part: only documents longer than a row are cut."""
    parts = []
    for number, doc in enumerate(docs):
        tokens = [BOS, *doc, EOS]
        for first in range(0, len(tokens) - 1, seq_len):
            parts.append((number, first > 0, tuple(tokens[first : first + seq_len + 1])))
    return sorted(parts)


@pytest.mark.parametrize("seq_len", [2, 5, 16])
@pytest.mark.parametrize("block_rows", [1, 7, 1000])
@pytest.mark.parametrize("buffer", [3, 20, 10_000])
def test_best_fit_rows_hold_each_document_part_once(seq_len, block_rows, buffer, monkeypatch):
    monkeypatch.setattr("data_prep.build.pack._BUFFER_PARTS", buffer)
    monkeypatch.setattr("data_prep.build.pack._OPEN_ROWS", 2)
    rng = np.random.default_rng(seq_len + buffer)
    docs = [rng.integers(4, 99, rng.integers(0, 3 * seq_len)).tolist() for _ in range(60)]
    packer, blocks = pack(docs, seq_len, block_rows, BestFitPacker)
    found, targets, pad = [], 0, 0
    for block in blocks:
        again = parse_block(block.tokens.tobytes(), block.doc_bytes(), seq_len + 1, "uint16")
        assert (again.documents == block.documents).all()
        assert (again.segments == block.segments).all() and len(again.documents)
        owner = block.segment_rows()
        mask, boundaries = row_masks(owner, block.segments, (len(block.tokens), seq_len))
        expected_mask = np.zeros_like(mask)
        expected_boundaries = np.zeros_like(boundaries)
        for number, row in enumerate(block.tokens):
            mine = slice(block.offsets[number], block.offsets[number + 1])
            segments, numbers = block.segments[mine].astype(int), block.documents[mine]
            starts = [int(segment & POSITION_MASK) for segment in segments]
            assert starts[0] == 0
            for start, end, segment, document in zip(
                starts, [*starts[1:], seq_len + 1], segments, numbers, strict=True
            ):
                if segment & PADDING:
                    assert (row[start:] == PAD).all() and document == NO_DOCUMENT
                    pad += seq_len + 1 - start
                    continue
                continues = bool(segment & CONTINUATION)
                found.append((int(document), continues, tuple(row[start:end].tolist())))
                expected_mask[number, start : end - 1] = 1.0
                expected_boundaries[number, start] = start > 0 or not continues
        assert (mask == expected_mask).all() and (boundaries == expected_boundaries).all()
        targets += int(mask.sum())
    assert sorted(found) == parts_by_definition(docs, seq_len)
    assert packer.tokens == sum(len(doc) + 2 for doc in docs)
    assert targets == packer.tokens - packer.docs
    assert pad == packer.pad_tokens
    assert all(len(block.tokens) == block_rows for block in blocks[:-1])


@pytest.mark.parametrize(("mean", "seq_len"), [(6.4, 512), (8.0, 2048)])
def test_best_fit_padding_is_below_two_per_mille(mean, seq_len):
    lengths = np.exp(np.random.default_rng(1).normal(mean, 1.0, 4000)).astype(int)
    packer, blocks = pack([[5] * n for n in lengths], seq_len, 64, BestFitPacker)
    assert packer.pad_tokens < 0.002 * packer.tokens
    stored = sum(block.tokens.size for block in blocks)
    overlap = sum((n + 1) // seq_len - ((n + 1) % seq_len == 0) for n in lengths)
    assert stored == packer.tokens + overlap + packer.pad_tokens
