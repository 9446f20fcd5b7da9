"""Every reader of the product: a sound input, and what reads it whole.

A reader of a new kind of file is a row here.
"""

import bz2
import gzip
import json
import lzma
import shutil
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from safetensors.torch import load_file

from data_prep.build.state import STATE_NAME, load_state
from data_prep.build_options import build_options
from data_prep.sources.documents import Fields
from data_prep.sources.files import expand_inputs, provenance_notes
from data_prep.sources.formats.megatron import MegatronCorpus
from data_prep.sources.readers import read_documents
from data_prep.tools.verify import verify
from pretrain.config.load import load_config
from slurm.batch_files.site import load_site
from slurm.job.state import Life, RunState, State
from slurm.status import describe, lines
from tests.data_prep.small_corpus import make_texts, run, save_hf_tokenizer
from tests.xlstm_mcore.convert.test_import import write_case
from xlstm_io.checkpoint.reader import CheckpointReader
from xlstm_io.tokenizer import open_tokenizer
from xlstm_io.tokenizer.symbols import SymbolsTokenizer
from xlstm_mcore.convert.imports.plan import make_plan, open_hf

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/data/golden/0.1.0"
TEXTS = make_texts(60)


@dataclass(frozen=True)
class Reader:
    """A row of the list.

    Attributes:
        name: of the kind of file.
        make: writes a sound input into a folder and gives the file that is damaged.
        read: reads it whole, given that file; raises UserError where it is refused.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]


def _lines() -> bytes:
    return b"".join(json.dumps({"id": n, "text": t}).encode() + b"\n" for n, t in enumerate(TEXTS))


def _file(name: str, data: Callable[[], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data())
        return folder / name

    return make


def _documents(**fields: str) -> Callable[[Path], object]:
    return lambda file: deque(read_documents(str(file), Fields(**fields)), maxlen=0)


def _table() -> pa.Table:
    ids = pa.array([f"d{n}" for n in range(len(TEXTS))]).dictionary_encode()
    return pa.table({"text": TEXTS, "id": ids, "meta": [{"text": text} for text in TEXTS]})


def _parquet(**options: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pq.write_table(_table(), folder / "a.parquet", row_group_size=20, **options)
        return folder / "a.parquet"

    return make


def _arrow(new: Callable, compression: str | None = None) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        table = _table()
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with new(folder / "a.arrow", table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=20)
        return folder / "a.arrow"

    return make


def _dataset(folder: Path) -> Path:
    _arrow(pa.ipc.new_stream)(folder)
    (folder / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": "a.arrow"}], "_indices_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder / "state.json"


def _note(folder: Path) -> Path:
    (folder / "SOURCE.json").write_text('{"licence": "CC0", "origin": "made up"}')
    return folder / "SOURCE.json"


def _hugging_face(name: str) -> Callable[[Path], Path]:
    return lambda folder: save_hf_tokenizer(folder, TEXTS) / name


def _encode(file: Path) -> None:
    tokenizer = open_tokenizer(file.parent)
    for ids in tokenizer.encode([*TEXTS[:20], "\u2581 \U0001f600"]):
        tokenizer.decode(ids)
    assert tokenizer.vocab_size and len(tokenizer.sha256) == 64


def _segments() -> bytes:
    parts = [[{"text": "Say:", "loss": False}, {"text": text, "loss": True}] for text in TEXTS]
    return b"".join(json.dumps({"segments": each}).encode() + b"\n" for each in parts)


def _task(pattern: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        counts = ("--samples", 40, "--validation-samples", 5)
        assert run("synthetic", "parity", "--out", folder, *counts) == 0
        return next((folder / "train").glob(pattern))

    return make


def _copy_of(tree: str, file: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        shutil.copytree(GOLDEN / tree, folder / "copy")
        return next((folder / "copy").glob(file))

    return make


def _shards(file: Path) -> None:
    verify(next(p for p in file.parents if p.name == "copy"), full=True)


def _tensors(file: Path) -> None:
    with CheckpointReader(file.parent) as reader:
        for name in reader.stored:
            reader.read(name)


def _prep_yaml(folder: Path) -> Path:
    path = folder / "prep.yaml"
    path.write_text(
        "sources:\n  - {name: web, input: a/*.jsonl, licence: CC0}\n  - {name: books, input: b,"
        " text_split: lines}\ntokenizer: tok\nout: shards\nseq_len: 2048\npacking: best_fit\n"
        "min_chars: 20\nvalid_fraction: 0.01\nfilter_functions: []\n"
    )
    return path


def _build_state(folder: Path) -> Path:
    stored = {
        "settings": {"seq_len": 16, "filters": {}, "sources": {}},
        "corpus": "0" * 64,
        "stamps": [["/a.jsonl", 5, 7]],
        "files": [["/a.jsonl", "corpus"]],
        "config": {"tokenizer": "t", "out": "o", "input": ["/a.jsonl"]},
    }
    (folder / "_work").mkdir()
    (folder / "_work" / STATE_NAME).write_text(json.dumps(stored))
    return folder / "_work" / STATE_NAME


def _read_state(file: Path) -> None:
    state = load_state(file.parents[1])
    if state is not None:
        state.stored_scans(file.parents[1])


def _slurm_state(folder: Path) -> Path:
    files = RunState(folder)
    life = Life(1, "7", 0, ("n1", "n2"), 1.0, 0, ended=2.0, cause="hang", node="n1")
    files.save(State((life,), {"n1": "Xid 79"}, "", "7"))
    return files.folder / "state.json"


def _story(file: Path) -> None:
    files = RunState(file.parents[1])
    lines(describe(files, files.load(), None))


def _megatron(folder: Path) -> Path:
    sizes = [len(text) for text in TEXTS]
    offsets = [2 * sum(sizes[:number]) for number in range(len(sizes))]
    (folder / "a.bin").write_bytes(bytes(2 * sum(sizes)))
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(sizes), len(sizes) + 1)
    arrays = ((sizes, "<i4"), (offsets, "<i8"), (range(len(sizes) + 1), "<i8"))
    parts = [np.array(list(values), kind).tobytes() for values, kind in arrays]
    (folder / "a.idx").write_bytes(header + b"".join(parts))
    return folder / "a.idx"


def _megatron_documents(file: Path) -> None:
    corpus = MegatronCorpus(str(file.with_suffix("")))
    corpus.bytes_of_documents()
    deque(corpus.documents(0, len(corpus)), maxlen=0)


def _model(name: str) -> Callable[[Path], Path]:
    """A stranger's folder of a small model: with one file of weights, with several, or pickled."""

    def make(folder: Path) -> Path:
        write_case(folder / "theirs", "native")
        weights = folder / "theirs/model.safetensors"
        tensors = load_file(weights)
        if name.endswith(".bin"):
            weights.unlink()
            torch.save(tensors, folder / "theirs" / name)
        if name.endswith("index.json"):
            weight_map = dict.fromkeys(tensors, "model.safetensors")
            (folder / "theirs" / name).write_text(json.dumps({"weight_map": weight_map}))
        return folder / "theirs" / name

    return make


def _import(file: Path) -> None:
    foreign = open_hf(file.parent)
    with foreign.tensors as tensors:
        plan = make_plan(foreign)
        plan.check()
        for row in plan.rows:
            tensors.read(row.theirs)


READERS = [
    Reader("JSON lines", _file("a.jsonl", _lines), _documents()),
    Reader("gzip", _file("a.jsonl.gz", lambda: gzip.compress(_lines())), _documents()),
    Reader("zstd", _file("a.jsonl.zst", lambda: zstandard.compress(_lines())), _documents()),
    Reader("xz", _file("a.jsonl.xz", lambda: lzma.compress(_lines())), _documents()),
    Reader("bzip2", _file("a.jsonl.bz2", lambda: bz2.compress(_lines())), _documents()),
    Reader("text", _file("a.txt", lambda: "\n\n".join(TEXTS).encode()), _documents()),
    Reader(
        "paragraphs",
        _file("a.txt", lambda: "\n\n".join(TEXTS).encode()),
        _documents(split="paragraphs"),
    ),
    Reader("parquet", _parquet(), _documents()),
    Reader("parquet, nested", _parquet(compression="zstd"), _documents(text="meta.text")),
    Reader("parquet, plain", _parquet(use_dictionary=False, compression="none"), _documents()),
    Reader("arrow stream", _arrow(pa.ipc.new_stream), _documents()),
    Reader("arrow stream, lz4", _arrow(pa.ipc.new_stream, "lz4"), _documents(text="meta.text")),
    Reader("arrow file", _arrow(pa.ipc.new_file), _documents()),
    Reader("Megatron's index", _megatron, _megatron_documents),
    Reader("state.json", _dataset, lambda file: expand_inputs([str(file.parent)])),
    Reader("SOURCE.json", _note, lambda file: provenance_notes([str(file.parent / "a.txt")])),
    Reader("tokenizer.model", _copy_of("shards/tokenizer", "tokenizer.model"), _encode),
    Reader("tokenizer.json", _hugging_face("tokenizer.json"), _encode),
    Reader("tokenizer_config.json", _hugging_face("tokenizer_config.json"), _encode),
    Reader("JSON lines, segments", _file("a.jsonl", _segments), _documents(segments="segments")),
    Reader(
        "symbols.json",
        _file("symbols.json", lambda: SymbolsTokenizer.file_of(["_", "a", "b"])),
        lambda file: open_tokenizer(file).decode([0, 1, 2]),
    ),
    Reader(
        "labelled shards: tar",
        _task("task/train/*.tar"),
        lambda file: verify(file.parents[2], full=True),
    ),
    Reader(
        "labelled shards: index",
        _task("task/train/*.npz"),
        lambda file: verify(file.parents[2], full=True),
    ),
    Reader("prep.yaml", _prep_yaml, lambda file: build_options([str(file)], "build")),
    Reader("build.json", _build_state, _read_state),
    Reader("shards: manifest.json", _copy_of("shards", "manifest.json"), _shards),
    Reader("shards: tar", _copy_of("shards", "corpus/train/*.tar"), _shards),
    Reader("shards: index", _copy_of("shards", "corpus/train/*.npz"), _shards),
    Reader("shards: tokenizer", _copy_of("shards", "tokenizer/*"), _shards),
    Reader(
        "run file",
        _file("run.yaml", (ROOT / "pretrain/configs/cpu_demo.yaml").read_bytes),
        lambda file: load_config(file),
    ),
    Reader(
        "site file",
        _file("site.yaml", (ROOT / "slurm/examples/gpu_modules.yaml").read_bytes),
        lambda file: load_site(str(file)),
    ),
    Reader("slurm: state.json", _slurm_state, _story),
    *(
        Reader(f"Hugging Face: {name}", _model(name), _import)
        for name in (
            "config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
        )
    ),
    *(
        Reader(f"checkpoint: {name}", _copy_of(f"run/checkpoints/{step.name}", name), _tensors)
        for step in (GOLDEN / "run/checkpoints").glob("step-*")
        for name in ("manifest.json", "metadata.json", "data-00000.safetensors")
    ),
]
