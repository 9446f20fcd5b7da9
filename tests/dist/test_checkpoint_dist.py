"""Checkpoints between 2-4 gloo processes: layouts, errors on one rank, agreement."""

import errno
import os
import time

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoint import (
    Candidates,
    CheckpointDamagedError,
    CheckpointError,
    CheckpointSaver,
    Ranks,
    TensorSlice,
    find_latest,
    load_checkpoint,
    save_checkpoint,
)
from xlstm_io.checkpoint import writer

pytestmark = pytest.mark.dist

SHAPES = {
    "rows.weight": (12, 10),
    "columns.weight": (6, 8),
    "optimizer.state.exp_avg.rows": (12, 10),
}


def full(name):
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(SHAPES[name], generator=generator)


def flat_range_slices(name, shape, tensor_flat, start, stop):
    """A contiguous range of a row-major matrix as slices, as a distributed optimizer has it."""
    columns = shape[1]
    slices, position = [], start
    while position < stop:
        row, column = divmod(position, columns)
        if column or stop - position < columns:
            length = min(columns - column, stop - position)
            size = (1, length)
        else:
            size = ((stop - position) // columns, columns)
            length = size[0] * columns
        part = tensor_flat[position - start : position - start + length].view(size)
        slices.append(TensorSlice(name, shape, (row, column), part))
        position += length
    return slices


def layout(kind, rank, world):
    """(slices owned by this rank, what they should hold): the state split as `kind` says."""
    pairs = []
    for name, shape in SHAPES.items():
        value = full(name)
        if kind == "tensor":  # a slice of rows or of columns per rank
            axis = 1 if name.startswith("columns") else 0
            extent = shape[axis] // world
            offset = [0, 0]
            offset[axis] = rank * extent
            part = value.narrow(axis, rank * extent, extent)
            pairs.append((TensorSlice(name, shape, tuple(offset), torch.zeros_like(part)), part))
        elif kind == "flat":  # an uneven range of the flattened tensor per rank
            cuts = [value.numel() * r // world + (r % 2) * 3 for r in range(world)]
            cuts.append(value.numel())
            start, stop = cuts[rank], cuts[rank + 1]
            for part in flat_range_slices(name, shape, torch.zeros(stop - start), start, stop):
                (r, c), (h, w) = part.global_offset, part.tensor.shape
                pairs.append((part, value[r : r + h, c : c + w]))
        elif kind == "whole" and rank == 0:  # everything on the first rank, nothing on others
            pairs.append((TensorSlice(name, shape, (0, 0), torch.zeros(shape)), value))
        elif kind == "copies":  # every rank has everything (loading only)
            pairs.append((TensorSlice(name, shape, (0, 0), torch.zeros(shape)), value))
    return pairs


def worker(function, folder, *args):
    dist.init_process_group("gloo")
    return function(dist.get_rank(), dist.get_world_size(), folder, *args)


def save_layout(rank, world, folder, kind):
    pairs = layout(kind, rank, world)
    for part, value in pairs:
        part.tensor.copy_(value)
    path = save_checkpoint(folder, [c for c, _ in pairs], {"tokens": 5}, {"model": {}}, step=3)
    seen = [None] * world
    dist.all_gather_object(seen, str(path))
    assert len(set(seen)) == 1, "all ranks return the same folder"


def load_layouts(rank, world, folder, kinds):
    path = next(iter(Candidates(folder)))
    for kind in kinds:
        pairs = layout(kind, rank, world)
        manifest = load_checkpoint(path, [c for c, _ in pairs])
        assert manifest.state == {"tokens": 5} and manifest.step == 3
        for part, value in pairs:
            assert torch.equal(part.tensor, value), (kind, part.name, part.global_offset)


@pytest.mark.parametrize("kind", ["tensor", "flat", "whole"])
def test_any_layout_loads_into_any_layout(kind, tmp_path, pool):
    pool(2, worker, save_layout, tmp_path, kind)
    path = find_latest(tmp_path)
    assert len(list(path.glob("data-*"))) == (1 if kind == "whole" else 2)
    # one process without torch.distributed, then three
    pairs = layout("whole", 0, 1)
    load_checkpoint(path, [c for c, _ in pairs])
    assert all(torch.equal(c.tensor, value) for c, value in pairs)
    pool(3, worker, load_layouts, tmp_path, ["flat", "copies", "whole"])


def fail_on_one_rank(rank, world, folder):
    tensor = torch.full((2, 4), float(rank))
    part = TensorSlice("w", (2 * world, 4), (2 * rank, 0), tensor)
    good = save_checkpoint(folder, [part], {}, {}, step=1)

    def disk_full(path, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    real = writer.write_safetensors
    if rank == 1:
        writer.write_safetensors = disk_full
    errors = [None] * world
    try:
        save_checkpoint(folder, [part], {}, {}, step=2, keep=1)
    except CheckpointError as error:
        dist.all_gather_object(errors, str(error))
    assert len(set(errors)) == 1 and "step 2 failed on rank 1" in errors[0], errors
    assert "No space left on device" in errors[0]
    writer.write_safetensors = real
    assert next(iter(Candidates(folder))) == good
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [good.name]
    dist.barrier()  # the next attempt has a folder, for which a slow rank should not look here

    # slices of two ranks that overlap, and a tensor that only one rank finds missing
    for wrong, words in (
        (TensorSlice("w", (2 * world, 4), (rank, 0), tensor), "overlaps the slice"),
        (TensorSlice("w", (2 * world + rank, 4), (2 * rank, 0), tensor), "other ranks have"),
    ):
        with pytest.raises(CheckpointError, match=words):
            save_checkpoint(folder, [wrong], {}, {}, step=2)
    wanted = TensorSlice("missing" if rank == 1 else "w", (2 * world, 4), (0, 0), tensor)
    with pytest.raises(CheckpointError, match=r"on rank 1: .* does not hold the tensor missing"):
        load_checkpoint(good, [wanted])
    with pytest.raises(CheckpointError, match=f"on {world} ranks.*no manifest.json"):
        load_checkpoint(folder, [wanted])

    # after all those errors the group still works
    again = save_checkpoint(folder, [part], {}, {}, step=2, keep=1)
    dist.barrier()
    assert next(iter(Candidates(folder))) == again and not good.exists()


def test_an_error_on_one_rank_is_the_same_error_on_all(tmp_path, pool):
    pool(2, worker, fail_on_one_rank, tmp_path)


def save_in_a_subgroup(rank, world, folder):
    group = dist.new_group([1, 2])
    if rank in (1, 2):
        ranks = Ranks(group)
        part = TensorSlice("w", (2, 4), (rank - 1, 0), torch.full((1, 4), float(rank)))
        path = save_checkpoint(folder, [part], {}, {}, step=1, ranks=ranks)
        assert next(iter(Candidates(folder, ranks=ranks))) == path
        target = torch.zeros(2, 4)
        load_checkpoint(path, [TensorSlice("w", (2, 4), (0, 0), target)], ranks=ranks)
        assert target[:, 0].tolist() == [1.0, 2.0]
    dist.barrier()


def test_a_group_that_does_not_start_at_rank_zero(tmp_path, pool):
    pool(3, worker, save_in_a_subgroup, tmp_path)


def save_beside_collectives(rank, world, folder):
    """Training's collectives and a save run at once; a late failure reaches all at one step."""
    part = TensorSlice("w", (2 * world, 4), (2 * rank, 0), torch.full((2, 4), float(rank)))
    real, steps_of_failure = writer.write_safetensors, []

    def slow(*args):  # ranks reach the save's agreement at different moments
        time.sleep(0.03 * rank)
        return real(*args)

    def full_late(path, *_):
        time.sleep(0.1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    writer.write_safetensors = slow
    with CheckpointSaver(folder) as saver:
        for step in range(1, 20_000):  # until the failure is seen
            total = torch.tensor([step * (rank + 1.0)])
            dist.all_reduce(total)
            assert total.item() == step * world * (world + 1) / 2
            failed = torch.tensor(float(saver.failed))
            dist.all_reduce(failed, op=dist.ReduceOp.MAX)
            if failed:
                with pytest.raises(CheckpointError) as caught:
                    saver.wait()
                steps_of_failure.append((step, str(caught.value)))
                break
            if step == 120 and rank == 1:
                writer.write_safetensors = full_late
            if step in (40, 80, 120):
                saver.save([part], {}, {}, step=step)
            time.sleep(0.001)
    writer.write_safetensors = real
    everyone = [None] * world
    dist.all_gather_object(everyone, steps_of_failure[0])
    assert len(set(everyone)) == 1, everyone
    step, text = everyone[0]
    assert step > 120 and "step 120 failed on rank 1: [Errno 28] No space left" in text
    assert f"last good checkpoint is {folder}/step-00000080-" in text
    assert [p.name[:13] for p in Candidates(folder)] == ["step-00000080", "step-00000040"]


def test_saving_runs_beside_collectives_and_fails_on_all_ranks_at_one_step(tmp_path, pool):
    pool(3, worker, save_beside_collectives, tmp_path)


def damage_seen_by_one_rank(rank, world, folder):
    part = TensorSlice("w", (2 * world, 4), (2 * rank, 0), torch.full((2, 4), float(rank)))
    path = save_checkpoint(folder, [part], {}, {}, step=1)
    if rank == 1:
        data = path / "data-00001.safetensors"
        content = bytearray(data.read_bytes())
        content[-1] ^= 1
        data.write_bytes(content)
    dist.barrier()
    with pytest.raises(CheckpointDamagedError, match=r"on rank 1: .*w at \[2, 0\] does not match"):
        load_checkpoint(path, [part])


def test_damage_that_one_rank_reads_is_damage_for_all(tmp_path, pool):
    pool(2, worker, damage_seen_by_one_rank, tmp_path)
