"""Small corpora and tokenizers, commands run on them, and what their shards hold."""

import json
import random
from pathlib import Path

import numpy as np

from data_prep.cli import main
from xlstm_io.shards.manifest import load_manifest
from xlstm_io.shards.rows import CONTINUATION, NO_DOCUMENT, PADDING, POSITION_MASK
from xlstm_io.shards.shard import ShardReader
from xlstm_io.tokenizer import open_tokenizer


def make_texts(count: int = 120, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["def", "return", "loop", "gate", "cell", "state", "  ", "\t", "\n", "naïve", "x = 1\n"]
    texts = []
    for number in range(count):
        length = rng.choice([1, 3, 10, 40, 120])
        texts.append(f"# {number}\n" + " ".join(rng.choice(words) for _ in range(length)))
    texts[3] += " ▁ a space symbol ▁▁"
    texts[4] += " \U0001f600 \r\n  trailing  \n\n"
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"id": f"d{n}", "text": t}) + "\n" for n, t in enumerate(texts))
    )
    return path


def save_hf_tokenizer(folder: Path, texts: list[str], *, bos_first: bool = False) -> Path:
    """A byte-level BPE tokenizer of 400 ids as transformers saves it; no bos is named."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos_first:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|end|> $A", special_tokens=[("<|end|>", 0)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "<|end|>"}
    config = {"eos_token": eos, "pad_token": "<|pad|>", "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def run(*arguments) -> int:
    """The exit code of a command; the parser leaves by SystemExit, everything else returns."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as leave:
        return leave.code


def tree_bytes(root: Path) -> dict[str, bytes]:
    """Everything a build is judged by: all files but the build state."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    relative = ((p.relative_to(root), p) for p in files)
    return {name.as_posix(): p.read_bytes() for name, p in relative if name.parts[0] != "_work"}


def documents_of(out, split, source=None) -> list[str]:
    """The texts that a split's shards hold, put together again from rows."""
    manifest = load_manifest(out)
    tokenizer = open_tokenizer(manifest.tokenizer_path)
    join = {"concat": _stream_of_rows, "best_fit": _documents_of_parts}[manifest.packing]
    found = []
    for entry in manifest.shards(split):
        if source is None or entry.path.split("/")[0] == source:
            for ids in join(manifest, entry):
                assert ids[0] == manifest.bos_id and ids[-1] == manifest.eos_id
                found.append(tokenizer.decode(ids[1:-1]))
    return found


def _stream_of_rows(manifest, entry) -> list[list[int]]:
    reader = ShardReader(manifest, entry)
    stream = []
    for number in range(entry.rows):
        tokens = np.empty(manifest.row_tokens, reader.dtype)
        segments = reader.row(number, tokens)
        end = manifest.row_tokens
        if segments[-1] & PADDING:
            end = int(segments[-1] & POSITION_MASK)
        assert number == 0 or tokens[0] == stream[-1]
        starts_here = not segments[0] & CONTINUATION
        assert (tokens[0] == manifest.bos_id) == starts_here
        stream += tokens[0 if number == 0 else 1 : end].tolist()
    found: list[list[int]] = []
    for token in stream:
        if token == manifest.bos_id:
            found.append([])
        found[-1].append(token)
    return found


def _documents_of_parts(manifest, entry) -> list[list[int]]:
    reader = ShardReader(manifest, entry)
    parts: dict[int, list[int]] = {}
    for number in range(reader.num_blocks):
        block = reader.block(number)
        for row, tokens in enumerate(block.tokens.tolist()):
            mine = range(block.offsets[row], block.offsets[row + 1])
            starts = [int(block.segments[i] & POSITION_MASK) for i in mine] + [len(tokens)]
            for i, start, end in zip(mine, starts[:-1], starts[1:], strict=True):
                if block.documents[i] == NO_DOCUMENT:
                    assert block.segments[i] & PADDING
                    continue
                known = parts.setdefault(int(block.documents[i]), [])
                assert bool(block.segments[i] & CONTINUATION) == bool(known)
                assert not known or known[-1] == tokens[start]
                known += tokens[start + bool(known) : end]
    return [parts[number] for number in sorted(parts)]


def make_shards(root: Path) -> Path:
    """Tiny shards in a folder, for runs: 16 tokens per row, 330 words."""
    corpus = write_jsonl(root / "corpus.jsonl", make_texts(90))
    assert run("tokenizer", "--input", corpus, "--vocab-size", 330, "--out", root / "tok") == 0
    flags = ["--input", corpus, "--tokenizer", root / "tok", "--out", root / "shards"]
    flags += ["--seq-len", 16, "--valid-fraction", 0.2, "--shard-mb", 0.004, "--workers", 1]
    assert run("build", *flags) == 0
    return root / "shards"
