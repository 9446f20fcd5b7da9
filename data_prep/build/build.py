"""From a corpus to shards.

The same command run again does only what is missing: nothing after the end, the unfinished shards
after a kill. The build state in `OUT/_work` holds the settings, the scans of the input files, the
plan and a record of each finished shard; `manifest.json` is written last. A folder that was begun
with other settings or another corpus is never overwritten.

Several jobs (a Slurm array) may share a build. They share the scan, and one of them makes the plan,
for which the others wait. Each writes a range of the shards (`JobShare.of_shards`), and `merge`
writes the manifest when all are there. The result is bit for bit that of a single job, whatever the
number of workers. Duplicates are dropped by the plan, so this holds for them as well.
"""

import time
from pathlib import Path
from typing import Any

from data_prep.build.encode import ShardRecord, encode_shard, encode_tasks, load_record
from data_prep.build.extend import new_files, take_over
from data_prep.build.plan import SPLITS, Corpus, check_splits, plan_build
from data_prep.build.report import Finished, finish_build
from data_prep.build.scan import InputFile, scan_files
from data_prep.build.state import (
    BuildState,
    check_number_of_files,
    check_same_settings,
    finished_manifest,
    load_state,
    save_state,
)
from data_prep.config import BuildConfig, JobShare
from data_prep.jobs.progress import Progress, say
from data_prep.jobs.workers import Workers, available_cpus
from data_prep.sources.files import expand_inputs, file_fingerprint, file_size
from data_prep.sources.malformed import report_malformed
from xlstm_io.errors import PrepError, TokenizerFileError
from xlstm_io.remote import is_remote
from xlstm_io.shards.manifest import MANIFEST_NAME, Manifest
from xlstm_io.storage import absolute, write_atomic
from xlstm_io.terminal import counted
from xlstm_io.tokenizer import Tokenizer, open_tokenizer


def build(config: BuildConfig, *, allow_functions: bool = False) -> Manifest | None:
    """Run a build to its end.

    Args:
        config: its settings.
        allow_functions: run the code that `filter_functions` names. It is not a setting, because
            settings come from files, and files from others.

    Returns:
        The manifest; None when this is one job of several.

    Raises:
        PrepError: bad inputs, functions that are not allowed, or OUT holds shards of other settings
            or contents.
        TokenizerFileError: the tokenizer defines no bos or eos.
        Interrupted: a signal arrived; finished shards are kept.
    """
    _check_allowed(config, allow_functions)
    with Workers(config.workers or available_cpus()) as workers:
        return _build(config, workers)


def _build(config: BuildConfig, workers: Workers) -> Manifest | None:
    started = time.monotonic()
    out, share = Path(config.out), _share(config)
    tokenizer, files = _open_tokenizer(config.tokenizer), _input_files(config)
    settings = {**config.settings(), "tokenizer": tokenizer.sha256}
    for name in config.filter_functions:
        say(f"runs the function {name} on every text ({settings['filters'][name]} of its file)")
    earlier = None
    if config.extends:
        earlier = take_over(out, config, settings)
        settings["extends"] = earlier.manifest.hash
        files = new_files(earlier, files, config.extends)
    fingerprints = [file_fingerprint(file.path) for file in files]

    state = _begun(out, settings)
    if state is not None:
        manifest = finished_manifest(out)
        if manifest is not None and state.fingerprints == fingerprints:
            say(f"{out} is finished and its inputs are unchanged: nothing to do")
            return manifest

    scans = scan_files(files, config.filters(), out / "_work", workers, share)
    tallies = [scan.tally(file.path) for file, scan in zip(files, scans, strict=True)]
    report_malformed(tallies, config.max_bad_share, out / "_work" / "malformed.log")
    corpus = plan_build(out, config, files, fingerprints, scans, earlier, share)
    check_splits(corpus.plan, config)
    save_state(out, config, settings, corpus.digest, files, fingerprints)
    for name, data in tokenizer.files.items():
        write_atomic(out / "tokenizer" / name, data)

    scanned = time.monotonic()
    numbers = share.of_shards(len(corpus.plan.shards))
    records, bytes_done = _encode(out, config, tokenizer, corpus, numbers, workers)
    if share.jobs > 1:
        say(
            f"job {share.job} of {share.jobs} is done: {len(numbers)} of "
            f"{counted(len(corpus.plan.shards), 'shard')}; when all are, run "
            f"`python -m data_prep merge {out}`"
        )
        return None
    seconds = {"scan": scanned - started, "tokenize": time.monotonic() - scanned}
    finished = Finished(config, tokenizer, settings, corpus, records, seconds, bytes_done)
    return finish_build(out, finished)


def check_build(config: BuildConfig, *, allow_functions: bool = False) -> None:
    """Say whether a build can begin, without reading a document or writing a file.

    Args:
        config: the build.
        allow_functions: whether `filter_functions` may run.

    Raises:
        PrepError: bad inputs, or OUT holds shards of other settings.
        TokenizerFileError: the tokenizer defines no bos or eos.
    """
    _check_allowed(config, allow_functions)
    out = Path(config.out)
    _share(config)
    tokenizer, files = _open_tokenizer(config.tokenizer), _input_files(config)
    state = None
    if not config.extends:  # what is extended is compared when it is opened
        state = _begun(out, {**config.settings(), "tokenizer": tokenizer.sha256})
    size = sum(file_size(file.path) for file in files)
    say(
        f"{out} can be built: {counted(len(files), 'file')} of {size / 1e6:,.1f} MB, "
        f"{tokenizer.vocab_size:,} tokens in the vocabulary"
        + ("; what is there is kept" if state is not None else "")
    )


def _check_allowed(config: BuildConfig, allow_functions: bool) -> None:
    if config.filter_functions and not allow_functions:
        raise PrepError(
            f"filter_functions={config.filter_functions} would run code of yours; allow it in this "
            "call with --allow-functions"
        )


def _begun(out: Path, settings: dict[str, Any]) -> BuildState | None:
    """The state of a build that has begun in a folder, with the same settings; None for none."""
    state = load_state(out)
    if state is not None:
        check_same_settings(out, state.settings, settings)
    elif (out / MANIFEST_NAME).exists():
        raise PrepError(
            f"{out} holds finished shards without their build state (_work); nothing was "
            "overwritten: choose another --out"
        )
    return state


def _share(config: BuildConfig) -> JobShare:
    try:
        return config.share()
    except ValueError as error:
        raise PrepError(str(error)) from None


def _open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of `--tokenizer`, which must define what stands around a document."""
    try:
        tokenizer = open_tokenizer(path)
    except TokenizerFileError as error:
        raise PrepError(
            f"--tokenizer {error}; make one with `python -m data_prep tokenizer` and give its "
            "--out folder"
        ) from None
    tokenizer.document_ids()
    return tokenizer


def _input_files(config: BuildConfig) -> list[InputFile]:
    out = absolute(config.out)
    files = [
        InputFile(path, source.name, source.fields)
        for source in config.all_sources()
        for path in expand_inputs(source.input)
        if is_remote(path) or not _is_built(absolute(path), out)
    ]
    check_number_of_files(files)
    return files


def _is_built(path: Path, out: Path) -> bool:
    """Whether a file is one that a build in `out` makes, which may be a folder of texts itself."""
    if not path.is_relative_to(out):
        return False
    first, *others = path.relative_to(out).parts
    return (
        first in ("_work", "tokenizer")
        or (not others and first.startswith(MANIFEST_NAME))
        or (len(others) == 2 and others[0] in SPLITS and others[1].startswith("shard-"))
    )


def _encode(
    out: Path,
    config: BuildConfig,
    tokenizer: Tokenizer,
    corpus: Corpus,
    numbers: range,
    workers: Workers,
) -> tuple[list[ShardRecord], int]:
    """Write those of the shards `numbers` that are not there.

    Returns:
        The records of all of them, and the bytes of text that were tokenized.
    """
    shards = [corpus.plan.shards[number] for number in numbers]
    stored = [load_record(out, shard) for shard in shards]
    records = {place: record for place, record in enumerate(stored) if record is not None}
    todo = [place for place in range(len(shards)) if place not in records]
    if records:
        say(f"{len(records)} of {len(shards)} shards are finished: kept")
    tasks = encode_tasks(out, config, tokenizer, corpus, [shards[place] for place in todo])
    todo_bytes = sum(task.plan.bytes_in for task in tasks)
    with Progress("tokenize", todo_bytes) as progress:
        for number, record in workers.run(encode_shard, tasks, progress):
            records[todo[number]] = record
            say(f"{record.entry.path}: {record.entry.rows} rows, {record.entry.tokens} tokens")
    return [records[place] for place in range(len(shards))], todo_bytes
