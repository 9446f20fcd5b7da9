"""What a part is told: where it computes, and how large its problems are."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Setting:
    """How a part runs.

    Attributes:
        out: folder of the results.
        dry: tiny sizes on the CPU, with the PyTorch implementations.
    """

    out: Path
    dry: bool

    @property
    def device(self) -> str:
        """Where tensors are made."""
        return "cpu" if self.dry else "cuda"

    @property
    def backend(self) -> str:
        """The backend that is checked and timed."""
        return "torch" if self.dry else "triton"

    def pick(self, real: int, tiny: int) -> int:
        """A size of a real run, or that of a dry one."""
        return tiny if self.dry else real

    def generator(self) -> torch.Generator:
        """Random numbers of the CPU, the same in every run and on every machine."""
        return torch.Generator().manual_seed(0)
