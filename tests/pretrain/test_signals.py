"""Ranks agree that one of them was asked to stop."""

import torch.distributed as dist
import torch.multiprocessing as mp

from pretrain.signals import any_rank


def test_alone_a_process_agrees_with_itself():
    assert any_rank([False, True]) == [False, True]


def _two_ranks(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    assert any_rank([False, False]) == [False, False]
    # one rank's request must reach all, and no other flag
    assert any_rank([rank == 1, False]) == [True, False]
    dist.destroy_process_group()


def test_ranks_agree_when_one_was_asked(tmp_path):
    mp.spawn(_two_ranks, args=(str(tmp_path / "store"),), nprocs=2)
