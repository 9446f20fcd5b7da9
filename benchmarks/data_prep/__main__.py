"""Data preparation beside Megatron's way, on this machine's own text: speed, identity, memory.

    python -m benchmarks.data_prep                       ours, and sentencepiece + megatron-core's
                                                         IndexedDatasetBuilder in one process
    python -m benchmarks.data_prep --megatron DIR        also DIR/tools/preprocess_data.py
    python -m benchmarks.data_prep --datatrove-python PY also datatrove, which PY can import
    python -m benchmarks.data_prep --input 'c/*.jsonl' --mb 20 --skip memory scaling

The corpus is the Python standard library's sources (or --input), cut to --mb megabytes. Speed is
text per CPU second of one process, median over rounds in which the ways take turns, so that a busy
machine hits them alike; the CPU time that a command needs before its first document is subtracted
from commands. Ours does more than the peer: it also drops duplicates, splits, hashes and verifies.

Sections: speed (with identical ids), datatrove (the same with a Hugging Face tokenizer), shares (of
a build's CPU time), packing (padding, overhead of tars), scaling (two processes), memory (a job's
peak at two sizes of corpus).
"""

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.data_prep import peers

ROOT = Path(__file__).parents[2]
SECTIONS = ("speed", "datatrove", "shares", "packing", "scaling", "memory")
SEQ_LEN = 2048


def quietly(function, *arguments, **more):
    """Call without the job's log."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments, **more)


def make_corpus(folder: Path, inputs: list[str], megabytes: float) -> Path:
    """The first documents of the inputs, in one jsonl of about so many megabytes of text."""
    from data_prep.sources.readers import read_documents
    from data_prep.tools.collect import collect

    quietly(collect, folder / "all", inputs, min_mb=0)
    path, size = folder / "corpus.jsonl", 0
    with open(path, "w") as file:
        for item in read_documents(str(folder / "all/corpus.jsonl.zst")):
            file.write(json.dumps({"id": item.id, "text": item.text}) + "\n")
            size += len(item.text.encode())
            if size >= megabytes * 1e6:
                break
    return path


def build_config(corpus: Path, tokenizer: Path, out: Path, **more):
    """Settings of a build without a validation split, which would reorder the ids."""
    from data_prep.config import BuildConfig

    fields = {"seq_len": SEQ_LEN, "valid_fraction": 0, "workers": 1} | more
    return BuildConfig(input=[str(corpus)], tokenizer=str(tokenizer), out=str(out), **fields)


def ours(corpus: Path, tokenizer: Path, out: Path) -> None:
    """A whole build in this process."""
    from data_prep.build.build import build

    quietly(build, build_config(corpus, tokenizer, out))


def ids_of_shards(out: Path) -> list[np.ndarray]:
    """The documents of our shards in order, with bos and eos."""
    from data_prep.tools.repack import stored_documents
    from xlstm_io.shards.manifest import load_manifest

    manifest = load_manifest(out)
    entries = manifest.shards("train")
    return [tokens for entry in entries for tokens in stored_documents(manifest, entry)]


def cpu_seconds(function, *arguments) -> float:
    """CPU time of this process, all threads."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def speed(folder: Path, corpus: Path, tokenizer: Path, size: float, arguments) -> None:
    """Text per CPU second, ways taking turns; ids compared."""
    one = folder / "one.jsonl"
    with open(corpus) as file:
        one.write_text(file.readline())
    for way in (ours, peers.peer):  # imports
        way(one, tokenizer, folder / f"one-{way.__name__}")
    seconds: dict[str, list[float]] = {"ours": [], "sentencepiece + IndexedDatasetBuilder": []}
    ways = dict(zip(seconds, (ours, peers.peer), strict=True))
    for number in range(arguments.rounds):
        for name, way in ways.items():
            out = folder / f"{name[:4]}-{number}"
            seconds[name].append(cpu_seconds(way, corpus, tokenizer, out))
    mine = ids_of_shards(folder / "ours-0")
    print("  " + peers.compare_ids(mine, peers.ids_of_bin(folder / "sent-0/data"), bos=True))
    if arguments.megatron:
        name = "Megatron tools/preprocess_data.py"
        root = Path(arguments.megatron)
        start_up = peers.child_seconds(
            peers.megatron_command(root, one, tokenizer, folder / "m-one"), root
        )
        whole = peers.child_seconds(
            peers.megatron_command(root, corpus, tokenizer, folder / "m"), root
        )
        seconds[name] = [whole - start_up]
        theirs = peers.ids_of_bin(folder / "m_text_document")
        print(f"  {name}: " + peers.compare_ids(mine, theirs, bos=False))
    print_speeds(seconds, size)


def datatrove(folder: Path, corpus: Path, size: float, arguments) -> None:
    """Text per CPU second with a Hugging Face tokenizer, beside datatrove's DocumentTokenizer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = peers.hugging_face_tokenizer(folder / "hf", corpus, arguments.vocab_size)
    one = folder / "one.jsonl"
    with open(corpus) as file:
        one.write_text(file.readline())
    ours(one, tokenizer, folder / "hf-one")
    seconds: dict[str, list[float]] = {"ours": []}
    for number in range(arguments.rounds):
        out = folder / f"hf-{number}"
        seconds["ours"].append(cpu_seconds(ours, corpus, tokenizer, out))
        if arguments.datatrove_python:
            trove = folder / f"trove-{number}"
            used = peers.datatrove_seconds(arguments.datatrove_python, folder, tokenizer, trove)
            seconds.setdefault("datatrove", []).append(used)
    if arguments.datatrove_python:
        theirs = peers.ids_of_datatrove(folder / "trove-0")
        print("  " + peers.compare_ids(ids_of_shards(folder / "hf-0"), theirs, bos=False))
    else:
        print("  without the peer: `pip install datatrove orjson` elsewhere, --datatrove-python PY")
    print_speeds(seconds, size)


def print_speeds(seconds: dict[str, list[float]], size: float) -> None:
    """Medians, and ours relative to each."""
    base = statistics.median(seconds["ours"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"  {name:38s} {size / middle:6.2f} MB/s   ours is {middle / base:.2f} times as fast")


def shares(folder: Path, corpus: Path, tokenizer: Path) -> None:
    """What of a build's CPU time is not tokenizing."""
    import sentencepiece

    import data_prep.build.build
    from data_prep.build import scan
    from xlstm_io.tokenizer.sentencepiece_model import SentencePieceTokenizer

    spent = {"tokenize": 0.0, "scan": 0.0, "shards": 0.0}

    def timed(name, real):
        def call(*values):
            start = time.process_time()
            try:
                return real(*values)
            finally:
                spent[name] += time.process_time() - start

        return call

    places = [
        ("tokenize", SentencePieceTokenizer, "encode"),
        ("scan", scan, "scan_file"),
        ("shards", data_prep.build.build, "encode_shard"),
    ]
    kept = [(owner, name, getattr(owner, name)) for _, owner, name in places]
    try:
        for key, owner, name in places:
            setattr(owner, name, timed(key, getattr(owner, name)))
        ours(corpus, tokenizer, folder / "shares")
    finally:
        for owner, name, real in kept:
            setattr(owner, name, real)
    work = spent["shards"] - spent["tokenize"]
    lines = corpus.read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    whole = cpu_seconds(lambda: [plain.encode(text) for text in texts])
    print(f"  tokenizer {spent['tokenize']:.2f} CPU s; sentencepiece itself {whole:.2f}")
    for name, value in (("read, check, pack and write", work), ("scan before it", spent["scan"])):
        print(
            f"  {name}: {value:.2f} CPU s, {100 * value / spent['tokenize']:.1f} % of the "
            f"tokenizer's, {100 * value / whole:.1f} % of sentencepiece's (goal: 8 % in all)"
        )


def packing(folder: Path, corpus: Path, tokenizer: Path) -> None:
    """Padding, cut documents and the overhead of tars."""
    from data_prep.build.build import build
    from data_prep.tools.repack import repack
    from xlstm_io.shards.index import BlockIndex

    whole = quietly(build, build_config(corpus, tokenizer, folder / "p"))
    for name in ("concat", "best_fit"):
        for seq_len in (512, SEQ_LEN):
            manifest = whole
            if (name, seq_len) != ("concat", SEQ_LEN):
                out = folder / f"p-{name}-{seq_len}"
                manifest = quietly(repack, folder / "p", seq_len, out, packing=name, workers=1)
            (split,) = (source.splits["train"] for source in manifest.sources)
            indices = [BlockIndex.load(manifest.root / e.index, e.index_xxh3) for e in split.shards]
            ids, boundaries = (
                sum(int(getattr(index, name).sum()) for index in indices)
                for name in ("size", "doc_size")
            )
            files = sum(entry.bytes for entry in split.shards)
            print(
                f"  {name:8s} rows of {seq_len}: {split.tokens} tokens, padding "
                f"{100 * split.pad_tokens / split.tokens:.3f} %; document boundaries "
                f"{100 * boundaries / ids:.2f} % of the ids, tar "
                f"{100 * (files / (ids + boundaries) - 1):.2f} % around both (goal 0.5 %)"
            )


def _seconds_of_all() -> float:
    """CPU time of this process and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def scaling(folder: Path, corpus: Path, tokenizer: Path, rounds: int) -> None:
    """CPU time of a build with one process and with two, whatever else the machine does."""
    from data_prep.build.build import build

    few = folder / "few.jsonl"
    with open(corpus) as file:
        few.write_text("".join(file.readline() for _ in range(2)))
    seconds: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds):
        for path, shard_mb in ((few, 1e-6), (corpus, 0.5)):
            for workers in (1, 2):
                out = folder / f"scale-{path.stem}-{workers}-{number}"
                config = build_config(path, tokenizer, out, workers=workers, shard_mb=shard_mb)
                before = _seconds_of_all()
                quietly(build, config)
                used = _seconds_of_all() - before
                seconds.setdefault((path.stem, workers), []).append(used)
    middle = {key: statistics.median(values) for key, values in seconds.items()}
    one, two = middle[corpus.stem, 1], middle[corpus.stem, 2]
    start = middle["few", 2] - middle["few", 1]
    print(
        f"  one process {one:.2f} CPU s, two {two:.2f} together, of which {start:.2f} start them: "
        f"{100 * one / (two - start):.0f} % efficient after the start, {100 * one / two:.0f} % "
        "with it (goal 85 % after the start)"
    )


_PEAK = """
import contextlib, io, sys
sys.path.insert(0, sys.argv[1])
from benchmarks.data_prep.__main__ import build_config
from data_prep.build.build import build
with contextlib.redirect_stdout(io.StringIO()):
    build(build_config(*sys.argv[2:5], shard_mb=1, packing="best_fit"))
with open("/proc/self/status") as file:  # ru_maxrss would tell the parent's peak
    print(next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM")))
"""


def memory(folder: Path, corpus: Path, tokenizer: Path) -> None:
    """Peak resident memory of a build of the corpus and of four times as much."""
    lines = [json.loads(line) for line in corpus.read_text().splitlines()]
    peaks = []
    for times in (1, 4):
        path = folder / f"times-{times}.jsonl"
        with open(path, "w") as file:
            for number in range(times):
                for line in lines:  # the first line makes other documents of them
                    file.write(json.dumps({"text": f"# {number}\n{line['text']}"}) + "\n")
        command = [sys.executable, "-c", _PEAK, ROOT, path, tokenizer, folder / f"rss-{times}"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout))
        print(f"  {path.stat().st_size / 1e6:6.1f} MB corpus: peak {peaks[-1]:.0f} MiB")
    print(f"  four times the corpus takes {peaks[1] - peaks[0]:+.0f} MiB")


def main() -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="*", default=[], help="corpus; default: Python's library")
    parser.add_argument("--mb", type=float, default=4.0, help="megabytes of text")
    parser.add_argument("--tokenizer", help=".model file; default: one trained on the corpus")
    parser.add_argument("--model-type", default="bpe", choices=["bpe", "unigram"])
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megatron", metavar="DIR", help="a checkout of Megatron-LM")
    parser.add_argument("--datatrove-python", metavar="PY", help="a Python that has datatrove")
    parser.add_argument("--skip", nargs="*", default=[], choices=SECTIONS)
    arguments = parser.parse_args()
    from data_prep.tools.train_tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = make_corpus(folder, arguments.input, arguments.mb)
        if arguments.tokenizer:
            tokenizer = Path(arguments.tokenizer)
        else:
            kind = {"vocab_size": arguments.vocab_size, "model_type": arguments.model_type}
            quietly(train_tokenizer, [str(corpus)], folder / "tok", **kind)
            tokenizer = folder / "tok/tokenizer.model"
        lines = corpus.read_text().splitlines()
        size = sum(len(json.loads(line)["text"].encode()) for line in lines) / 1e6
        print(f"{len(lines)} documents, {size:.1f} MB of text; {tokenizer.name}")
        sections = {
            "speed": lambda: speed(folder, corpus, tokenizer, size, arguments),
            "datatrove": lambda: datatrove(folder, corpus, size, arguments),
            "shares": lambda: shares(folder, corpus, tokenizer),
            "packing": lambda: packing(folder, corpus, tokenizer),
            "scaling": lambda: scaling(folder, corpus, tokenizer, arguments.rounds),
            "memory": lambda: memory(folder, corpus, tokenizer),
        }
        for name, section in sections.items():
            if name not in arguments.skip:
                print(name)
                section()


if __name__ == "__main__":
    main()
