"""What data preparation is measured against: the peers' ways from text to ids."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np


def peer(corpus: Path, tokenizer: Path, out: Path) -> None:
    """What Megatron's preprocess_data.py does per document: json, encode, add, end."""
    import sentencepiece
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    out.mkdir()
    builder = IndexedDatasetBuilder(str(out / "data.bin"), dtype=np.uint16)
    with open(corpus, encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"]
            if text:
                ids = [processor.bos_id(), *processor.encode(text), processor.eos_id()]
                builder.add_item(torch.IntTensor(ids))
                builder.end_document()
    builder.finalize(str(out / "data.idx"))


def ids_of_bin(prefix: Path) -> list[np.ndarray]:
    """The documents of a Megatron dataset in order."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [np.array(dataset[number]) for number in range(len(dataset))]  # views of a mapped file


def compare_ids(mine: list[np.ndarray], theirs: list[np.ndarray], bos: bool) -> str:
    """How many documents have the same ids; ours are each there once."""
    trimmed = {(tokens if bos else tokens[1:]).tobytes() for tokens in mine}
    kept = {tokens.astype(np.uint16).tobytes() for tokens in theirs}
    return f"{len(trimmed & kept)} of {len(trimmed)} documents have identical ids"


def child_seconds(command: list[str], package_root: Path) -> float:
    """CPU time of a command that imports from `package_root`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "PYTHONPATH": str(package_root)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def megatron_command(root: Path, corpus: Path, tokenizer: Path, prefix: Path) -> list[str]:
    """preprocess_data.py with one worker."""
    tool = str(root / "tools/preprocess_data.py")
    model = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer)]
    files = ["--input", str(corpus), "--output-prefix", str(prefix), "--append-eod"]
    return [sys.executable, tool, *model, *files, "--workers", "1"]


_DATATROVE = """
import os, sys, time
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
folder, tokenizer, out = sys.argv[1:]
for name in ("one.jsonl", "corpus.jsonl"):  # the first loads all there is to load
    start = time.process_time()
    step = DocumentTokenizer(os.path.join(out, name), tokenizer, eos_token="<|end|>",
                             shuffle_documents=False)
    step.run(JsonlReader(folder, glob_pattern=name).run())
print(time.process_time() - start)
"""


def hugging_face_tokenizer(folder: Path, corpus: Path, vocab_size: int) -> Path:
    """A folder with a byte-level BPE trained on the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<|end|>"], "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **options)
    texts = (json.loads(line)["text"] for line in corpus.read_text().splitlines())
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def datatrove_seconds(python: str, folder: Path, tokenizer: Path, out: Path) -> float:
    """CPU time of datatrove's DocumentTokenizer for `folder`/corpus.jsonl, after a first document.

    Args:
        python: an interpreter that can import datatrove.
        folder: with one.jsonl and corpus.jsonl.
        tokenizer: a Hugging Face folder.
        out: a new folder.
    """
    words = [folder, tokenizer / "tokenizer.json", out]
    command = [python, "-c", _DATATROVE, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"--datatrove-python: {done.stderr[-2000:]}")
    return float(done.stdout)


def ids_of_datatrove(out: Path) -> list[np.ndarray]:
    """The documents that `datatrove_seconds` has written, in order."""
    (data,) = (out / "corpus.jsonl").glob("*.ds")
    ends = np.fromfile(f"{data}.index", np.uint64).astype(np.int64)
    return np.split(np.fromfile(data, np.uint16), ends[:-1])
