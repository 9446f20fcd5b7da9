"""Gathers documents into one `corpus.jsonl.zst` with a note of origin and licence beside it."""

import json
import os
import platform
import sysconfig
from pathlib import Path

import orjson
import xxhash
import zstandard

from data_prep.jobs.progress import Progress, say
from data_prep.sources.documents import DEFAULT_FIELDS, Fields, is_empty
from data_prep.sources.files import PROVENANCE_NAME, expand_inputs, file_fingerprint, file_size
from data_prep.sources.malformed import MAX_BAD_SHARE, Tally, read_counted, report_malformed
from xlstm_io.errors import PrepError
from xlstm_io.storage import replacing, write_atomic

CORPUS_NAME = "corpus.jsonl.zst"
_RECORD_NAME = ".collect.json"  # how the corpus was made, for reruns
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def library_files(root: Path) -> list[Path]:
    """The standard library's sources below `root` in a fixed order.

    Left out: tests, installed packages, and what is generated per machine (build configuration).
    """
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name for name in folders if name not in _NOT_LIBRARY and not name.startswith("config-")
        )
        found += [
            Path(folder, name)
            for name in sorted(files)
            if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return found


def collect(
    out: Path,
    inputs: list[str],
    *,
    min_mb: float = 8.0,
    fields: Fields = DEFAULT_FIELDS,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Path:
    """Write the corpus file to the folder `out` and return its path.

    Without `inputs`: the sources of the running Python's standard library. A finished corpus of
    the same inputs is left as it is.

    Raises:
        PrepError: bad inputs, too many malformed records (`max_bad_share`), less than `min_mb`
            megabytes of text, or a folder that holds another corpus.
    """
    corpus, record = out / CORPUS_NAME, out / _RECORD_NAME
    root: Path | None = None
    if inputs:
        paths = expand_inputs(inputs)
        identity = repr([fields, [file_fingerprint(path) for path in paths]]).encode()
        settings = {"input": "files", "digest": xxhash.xxh3_128_hexdigest(identity)}
        provenance = {"origin": "files given by --input", "licence": "as stated by their owner"}
    else:
        root = Path(sysconfig.get_path("stdlib"))
        paths = list(map(str, library_files(root)))
        settings = {"input": "standard library", "digest": platform.python_version()}
        provenance = {
            "origin": f"Python {platform.python_version()} standard library, without tests",
            "licence": "PSF-2.0 (Python Software Foundation License Version 2)",
            "url": "https://docs.python.org/3/license.html",
        }
    if _finished(record, corpus, settings):
        say(f"{corpus} is finished and its inputs are unchanged: nothing to do")
        return corpus

    documents = size = 0
    tallies = list[Tally]()
    out.mkdir(parents=True, exist_ok=True)
    total = sum(map(file_size, paths))
    with replacing(corpus) as file:
        with Progress("collect", total) as progress:
            with zstandard.ZstdCompressor(level=6).stream_writer(file, closefd=False) as stream:
                for document in read_counted(paths, fields, tallies):
                    if is_empty(document.text):
                        continue
                    name = document.id
                    if root:
                        name = Path(tallies[-1].path).relative_to(root).as_posix()
                    name = name.encode("utf-8", "backslashreplace").decode()  # a file's name
                    documents += 1
                    size += len(document.text.encode("utf-8"))
                    stream.write(orjson.dumps({"id": name, "text": document.text}) + b"\n")
                    progress.set(size)
        report_malformed(tallies, max_bad_share)
        if size < min_mb * 1e6:
            raise PrepError(
                f"only {size / 1e6:.2f} MB of text in {documents} documents, "
                f"--min-mb asks for {min_mb:g}; give more text with --input, or lower --min-mb"
            )
        noted = {**provenance, "documents": documents, "bytes": size}
        write_atomic(out / PROVENANCE_NAME, json.dumps(noted, indent=1).encode() + b"\n")
        # The record is written first: a corpus without one was made by something else, and is
        # never overwritten.
        done = {"settings": settings, "size": file.tell()}
        write_atomic(record, json.dumps(done).encode() + b"\n")
    skipped = sum(tally.bad for tally in tallies)
    say(f"{corpus}: {documents} documents, {size / 1e6:.2f} MB of text, {skipped} skipped")
    say(f"origin: {provenance['origin']}; licence: {provenance['licence']}")
    return corpus


def _finished(record: Path, corpus: Path, settings: dict) -> bool:
    """Whether `corpus` is there already.

    Raises:
        PrepError: it is, but it was made from other inputs, changed, or not made by this command.
    """
    try:
        done = json.loads(record.read_bytes())
        same_size = corpus.stat().st_size == done["size"]
        stored = dict(done["settings"])
    except FileNotFoundError:
        if corpus.exists():
            raise PrepError(
                f"{corpus} exists but was not finished by this command; move it away"
            ) from None
        return False
    except (ValueError, KeyError, TypeError):
        raise PrepError(f"{record} is damaged; delete the folder or use another --out") from None
    if stored != settings:
        raise PrepError(
            f"{corpus} was made from other inputs ({stored.get('input')}, now {settings['input']}, "
            "or their contents changed); nothing was overwritten: choose another --out, or delete "
            "the folder"
        )
    if not same_size:
        raise PrepError(f"{corpus} has changed since it was written; delete it and run again")
    return True
