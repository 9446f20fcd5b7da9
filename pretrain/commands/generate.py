"""Text from a checkpoint, with the state of every layer carried from token to token."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint import read_manifest, resolve
from pretrain.config import config_from_dict
from xlstm_io.checkpoint.tokenizer import tokenizer_of
from xlstm_io.storage import Location
from xlstm_io.tokenizer import Tokenizer
from xlstm_mcore.inference import gather_vocabulary, load_model
from xlstm_mcore.model import XLSTMModel


def main(
    checkpoint: str,
    *,
    prompt: list[str],
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    precision: str = "fp32",
    out: str | None = None,
    tokenizer: str | None = None,
) -> int:
    """Continue prompts and print the texts.

    In one process, or tensor parallel over all processes of torchrun; the texts are the same.

    Args:
        checkpoint: a checkpoint or a run folder.
        prompt: texts to continue; an empty one starts a document.
        max_new_tokens: tokens to add at most; the end of a document stops earlier.
        temperature: 0 takes the likeliest token, 1 samples from the model's distribution.
        top_k: sample among the k likeliest tokens; 0 for all.
        seed: seed of the sampling.
        precision: "fp32" or "bf16", of weights and activations.
        out: file to write the texts to as well.
        tokenizer: a tokenizer's file or folder; by default the one in the checkpoint.

    Returns:
        0.

    Raises:
        UserError: no checkpoint, its model does not split over the processes, or its tokenizer is
            gone or another one.
    """
    path = resolve(checkpoint)
    check_split(path)
    model, _ = load_model(path, precision=precision)
    main_process = model.tp_group.rank() == 0
    words = tokenizer_of(path, tokenizer)
    rng = torch.Generator().manual_seed(seed)
    texts = []
    for start in prompt:
        prompted = prompt_ids(words, start)
        added = generate(
            model,
            prompted,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            end=words.document_ids().eos,
            limit=words.vocab_size,
            rng=rng,
        )
        # Some tokenizers decode a first token without its space: decode it after the prompt.
        known = len(words.decode(prompted))
        texts.append(start + words.decode([*prompted, *added])[known:])
        if main_process:
            print(f"--- prompt {json.dumps(start)}\n{texts[-1]}\n", flush=True)
    if main_process and out is not None:
        Path(out).write_text("\n----\n".join(texts) + "\n", encoding="utf-8")
    return 0


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a prompt: those of a training document that begins with it, bos included."""
    return [tokenizer.document_ids().bos, *tokenizer.encode([text])[0].tolist()]


def check_split(path: Location) -> None:
    """Check that a checkpoint's model splits over the processes that torchrun started.

    Raises:
        ConfigError: it does not; the message has the numbers of processes that would work.
    """
    tensor = int(os.environ.get("WORLD_SIZE", "1"))
    if tensor > 1:
        saved = read_manifest(path).config
        model = {**saved["model"], "pattern": saved["model"]["pattern"].replace("|", "")}
        layout = {"tensor": tensor}
        config_from_dict({**saved, "model": model, "layout": layout}, f"{tensor} processes")


@torch.no_grad()
def generate(
    model: XLSTMModel,
    tokens: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    end: int,
    limit: int,
    rng: torch.Generator,
) -> list[int]:
    """Tokens that follow `tokens`.

    The prompt is read in one pass. Every further token costs one step, however long the text before
    it, because a layer's state holds all it needs of the past.

    Args:
        model: a whole model, in one process or tensor parallel; all ranks return the same.
        tokens: the prompt, at least one token.
        max_new_tokens: how many to add at most.
        temperature: 0 for the likeliest token.
        top_k: candidates to sample among; 0 for all.
        end: token that ends a document; not returned.
        limit: tokens of the tokenizer; rows of the head beyond it are padding.
        rng: source of the samples.
    """
    device = next(model.parameters()).device
    cache: dict = {}
    added: list[int] = []
    window = torch.tensor([tokens], device=device)
    for _ in range(max_new_tokens):
        last = model(window, cache=cache, last_only=True)[0, -1]
        logits = gather_vocabulary(model, last)[:limit].float().cpu()
        token = _pick(logits, temperature, top_k, rng)
        if token == end:
            break
        added.append(token)
        window = torch.tensor([[token]], device=device)
    return added


def _pick(logits: Tensor, temperature: float, top_k: int, rng: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < logits.numel():
        logits, choices = logits.topk(top_k)
    else:
        choices = torch.arange(logits.numel())
    chance = torch.softmax(logits / temperature, dim=-1)
    return int(choices[torch.multinomial(chance, 1, generator=rng)])
