"""What can be said about how text is generated. Nothing here imports torch."""

import math
from dataclasses import dataclass

from xlstm_io.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How to continue prompts.

    Attributes:
        max_tokens: tokens to add at most; the end of a document stops earlier.
        temperature: 1 samples from the model's distribution, 0 takes the likeliest token.
        top_k: sample among so many of the likeliest tokens; 0 for all.
        top_p: sample among the likeliest tokens that together have this probability; 1 for all.
        stop: texts that end a completion; they are not part of it.
        seed: seed of the samples.
        num_samples: completions of each prompt.

    Raises:
        UserError: a value is out of its range; the message names all of them.
    """

    max_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    num_samples: int = 1

    def __post_init__(self) -> None:
        """Check all values."""
        rules = (
            ("max_tokens", self.max_tokens >= 1, "must be at least 1"),
            (
                "temperature",
                math.isfinite(self.temperature) and self.temperature >= 0,
                "must be 0 (the likeliest token) or above",
            ),
            ("top_k", self.top_k >= 0, "must be 0 (all tokens) or above"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1 (all tokens)"),
            ("stop", all(self.stop), "must not be empty"),
            ("seed", self.seed >= 0, "must be 0 or above"),
            ("num_samples", self.num_samples >= 1, "must be at least 1"),
        )
        wrong = [
            f"--{name.replace('_', '-')}={getattr(self, name)} {rule}"
            for name, sound, rule in rules
            if not sound
        ]
        if wrong:
            raise UserError("; ".join(wrong))
