"""Compare an exported folder, loaded by transformers, with the model it was exported from."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from xlstm_io.checkpoint.manifest import resolve
from xlstm_io.tokenizer import open_tokenizer
from xlstm_mcore.convert.errors import ConvertError

#: Lengths to compare: 1, less than a chunk, a chunk of 64, and more than a chunk. Both
#: implementations take another path for each.
LENGTHS = (1, 15, 64, 100)
TOLERANCE = 1e-3
REPORT = "parity.json"


@dataclass(frozen=True)
class Parity:
    """The result of a comparison at one length.

    Attributes:
        length: Tokens per row.
        max_abs_difference: Largest difference of logits.
        scale: The largest logit.
    """

    length: int
    max_abs_difference: float
    scale: float

    @property
    def relative(self) -> float:
        """Difference relative to the scale of the logits."""
        return self.max_abs_difference / self.scale


def own_logits(checkpoint: Path | str) -> Callable[[Tensor], Tensor]:
    """Logits `[b, s, vocab]` of tokens `[b, s]` by this project's model of a checkpoint, fp32."""
    from xlstm_mcore.inference import model_logits, open_model

    model = open_model(checkpoint)
    return lambda tokens: model_logits(model, tokens)


def compare(
    logits_of: Callable[[Tensor], Tensor], exported: PreTrainedModel, lengths=LENGTHS
) -> list[Parity]:
    """Compare the logits of two models on random tokens.

    Args:
        logits_of: Logits `[b, s, vocab]` of tokens `[b, s]` by the one.
        exported: The other.
        lengths: Lengths of the rows.

    Raises:
        ConvertError: The two have different vocabularies.
    """
    generator = torch.Generator().manual_seed(0)
    results = []
    for length in lengths:
        tokens = torch.randint(exported.config.vocab_size, (2, length), generator=generator)
        ours = logits_of(tokens).detach().cpu().double()
        with torch.no_grad():
            theirs = exported(tokens, use_cache=False).logits.double()
        if ours.shape != theirs.shape:
            raise ConvertError(
                f"not an export of this checkpoint: its logits have shape {list(theirs.shape)}, "
                f"the checkpoint's {list(ours.shape)}"
            )
        difference, scale = (ours - theirs).abs().max().item(), ours.abs().max().item()
        results.append(Parity(length, difference, scale))
    return results


def passed(results: list[Parity]) -> bool:
    """Whether all differences are within TOLERANCE of the logits' scale (NaN is not)."""
    return all(result.relative <= TOLERANCE for result in results)


def write_report(checkpoint: Path | str, folder: Path | str, results: list[Parity]) -> Path:
    """Write parity.json into the exported folder."""
    report = {
        "checkpoint": resolve(checkpoint).name,
        "tolerance_relative": TOLERANCE,
        "passed": passed(results),
        "lengths": [asdict(r) | {"relative": r.relative} for r in results],
    }
    path = Path(folder) / REPORT
    path.write_text(json.dumps(report, indent=2), encoding="utf-8")
    return path


def samples(
    exported: PreTrainedModel, folder: Path | str, *, count: int = 3, new_tokens: int = 48
) -> list[str]:
    """A few texts that transformers generates from bos, sampled with a fixed seed."""
    tokenizer = open_tokenizer(Path(folder))
    prompt = torch.tensor([[tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]])
    torch.manual_seed(0)
    texts = []
    for _ in range(count):
        ids = exported.generate(prompt, max_new_tokens=new_tokens)[0, 1:].tolist()
        # A model's vocabulary may be padded beyond the tokenizer's.
        texts.append(tokenizer.decode([i for i in ids if i < tokenizer.vocab_size]))
    return texts


def load_exported(folder: Path | str) -> PreTrainedModel:
    """The exported model by transformers, fp32, evaluation mode; ConvertError if it is none."""
    if not (Path(folder) / "config.json").is_file():
        raise ConvertError(f"{folder} is not an exported folder: it has no config.json")
    disable_progress_bar()  # loading takes a moment, and the bar would litter a log
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
