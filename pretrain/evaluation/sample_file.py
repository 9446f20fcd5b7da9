"""`samples.jsonl` of a run: how each evaluation continued `evaluation.prompts`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.run_folder import SAMPLES_FILE


@dataclass(frozen=True)
class Sample:
    """A continued prompt.

    Attributes:
        step: finished steps of the run.
        prompt: the text that was given.
        text: what the model added, the likeliest token each time.
    """

    step: int
    prompt: str
    text: str


def append_samples(folder: Path, samples: Sequence[Sample]) -> None:
    """Add the samples of an evaluation to the file of a run."""
    with open(folder / SAMPLES_FILE, "a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(asdict(one), ensure_ascii=False)}\n" for one in samples)


def read_samples(folder: Path) -> list[Sample]:
    """The samples of a run's newest evaluation that has any; of a step taken twice the later."""
    path = folder / SAMPLES_FILE
    if not path.exists():
        return []
    newest: dict[str, Sample] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            one = Sample(**json.loads(line))
        except (ValueError, TypeError):
            continue  # cut off by the end of a process
        if newest and one.step != next(iter(newest.values())).step:
            newest = {}
        newest[one.prompt] = one
    return list(newest.values())
