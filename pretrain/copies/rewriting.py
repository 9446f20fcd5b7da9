"""Checkpoints that hold other tensors than the ones they come from; one tensor is in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from xlstm_io.checkpoint.manifest import (
    METADATA_NAME,
    OPTIMIZER_PREFIX,
    Manifest,
    TensorInfo,
    is_weight,
    newest_first,
    read_manifest,
    verify_hashes,
)
from xlstm_io.checkpoint.reader import CheckpointReader
from xlstm_io.checkpoint.streamed import write_streamed
from xlstm_io.errors import CheckpointError
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.storage import Location, is_folder, location, read_file

MASTER = f"{OPTIMIZER_PREFIX}state.param."
DATA_SUFFIX = ".safetensors"


def prune(source: Location, out: Location | str) -> Location:
    """Write a checkpoint's weights without the optimizer's state.

    Such a checkpoint evaluates, generates, exports and starts other runs. Its own run cannot go on
    from it.

    Args:
        source: its folder.
        out: the run folder to write into, a path or an fsspec URL.

    Returns:
        The new checkpoint, read back and compared with its hashes.

    Raises:
        CheckpointError: the source is damaged, `out` holds a checkpoint, or cannot be written.
    """
    manifest = read_manifest(source)
    infos = {name: info for name, info in manifest.tensors.items() if is_weight(name)}
    with CheckpointReader(source) as reader:
        state = {**manifest.state, "pruned_from": str(source)}
        return _write(out, infos, reader.read, state, manifest, source)


def average(sources: Sequence[Location], out: Location | str) -> Location:
    """Write the mean of the weights of several checkpoints of one model.

    It is taken in fp64 of the fp32 master weights, where there are any, and stored in fp32.

    Args:
        sources: their folders, the newest first.
        out: the run folder to write into, a path or an fsspec URL.

    Returns:
        The new checkpoint, read back and compared with its hashes.

    Raises:
        CheckpointError: they are of different models, a source is damaged, `out` holds a
            checkpoint, or cannot be written.
    """
    manifests = [read_manifest(source) for source in sources]
    first = manifests[0]
    shapes = {name: info.shape for name, info in first.tensors.items() if is_weight(name)}
    for source, manifest in zip(sources, manifests, strict=True):
        other = {name: info.shape for name, info in manifest.tensors.items() if is_weight(name)}
        if other != shapes:
            raise CheckpointError(f"{source} and {sources[0]} are of different models")
    infos = {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
    with ExitStack() as stack:
        readers = [stack.enter_context(CheckpointReader(source)) for source in sources]

        def load(name: str) -> Tensor:
            total = torch.zeros(shapes[name], dtype=torch.float64)
            for reader in readers:
                master = MASTER + name
                total += reader.read(master if master in reader.manifest.tensors else name)
            return (total / len(readers)).float()

        kept = ("tokenizer", "provenance")
        state = {key: first.state[key] for key in kept if key in first.state}
        state["averaged"] = [str(source) for source in sources]
        return _write(out, infos, load, state, first, sources[0])


def newest(run: str, number: int) -> list[Location]:
    """The newest complete checkpoints of a run that count, the newest first.

    Raises:
        CheckpointError: there are fewer.
    """
    with _explained(run):
        found = list(islice(newest_first(run, []), number))
    if len(found) < number:
        raise CheckpointError(
            f"{run} has {len(found)} complete checkpoints, not {number}; checkpoint.keep and "
            "keep_every say how many a run keeps"
        )
    return found


def _write(
    out: Location | str,
    infos: Mapping[str, TensorInfo],
    load: Callable[[str], Tensor],
    state: Mapping[str, Any],
    manifest: Manifest,
    source: Location,
) -> Location:
    """Write tensors with the small files, configuration and step of a checkpoint, and verify."""
    with _explained(out):
        if is_folder(location(out)) and next(iter(newest_first(out, [])), None) is not None:
            raise CheckpointError(f"{out} holds a checkpoint already; choose another folder")
        small = {
            name: read_file(source / name, LIMITS.checkpoint_json)
            for name in manifest.files
            if name != METADATA_NAME and not name.endswith(DATA_SUFFIX)
        }
        with tqdm(total=len(infos), unit="tensor", disable=None) as bar:

            def load_and_show(name: str) -> Tensor:
                bar.update()
                return load(name)

            path = write_streamed(
                out,
                infos,
                load_and_show,
                state,
                manifest.config,
                step=manifest.step,
                files=small,
            )
        verify_hashes(path, read_manifest(path))
    return path


@contextmanager
def _explained(place: Location | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{place}: {error}") from error
