"""What an error says about the machine: a lost rank, a killed worker, a full disk.

Such an error is nobody's mistake, and the same command may be repeated. It comes from torch or the
operating system in many words, and is told here in one message that names the rank and the cause.
"""

import torch.distributed as dist

from xlstm_io.errors import MachineFailed, UserError, first_line, is_machine_failure

# What gloo and NCCL say of a wrong call, which is a bug of ours.
WRONG_CALLS = ("ncclInvalid", "invalid usage", "invalid argument")


def machine_failure(error: BaseException, rank: int) -> MachineFailed | None:
    """An error as a failure of the machine, or None if it is something else.

    Args:
        error: what ended this rank.
        rank: of this process.
    """
    if isinstance(error, MachineFailed | UserError):
        return None
    text = first_line(error)
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return MachineFailed(
            f"rank {rank}: a worker process of the loader was killed: {text}; often the machine "
            "ran out of memory, and a smaller data.workers helps"
        )
    if _lost_a_rank(error):
        return MachineFailed(
            f"rank {rank} lost the connection to another rank, whose own output says why: {text}"
        )
    if isinstance(error, OSError) and is_machine_failure(error):
        return MachineFailed(f"rank {rank}: {error}")
    return None


def _lost_a_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone.

    gloo raises a plain RuntimeError that names its source file. NCCL's errors have a class, which
    also stands for wrong calls. What NCCL says was taken from torch's sources; it has not been seen
    on a GPU.
    """
    if isinstance(error, dist.DistError):
        return not any(words in str(error) for words in WRONG_CALLS)
    return isinstance(error, RuntimeError) and "gloo/transport/" in str(error)
