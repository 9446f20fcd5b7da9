"""Loads a checkpoint and prints the likeliest next tokens of a text.

    python examples/logits.py runs/first --prompt "Once upon a"

Works with any checkpoint, run folder or URL of one, whatever layout it was trained on. Under
torchrun the processes share the heads.
"""

import argparse

import torch

from xlstm_mcore.inference import load_model, model_logits


def main() -> None:
    """Parse the command line, load the model, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="checkpoint or run folder")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--top", type=int, default=5, help="tokens to print")
    options = parser.parse_args()

    model, tokenizer = load_model(options.checkpoint)
    tokens = torch.tensor([tokenizer.prompt_ids(options.prompt)])  # [batch, sequence]
    logits = model_logits(model, tokens)  # [batch, sequence, vocabulary], fp32
    print(f"pattern {model.config.pattern}, logits {tuple(logits.shape)}")
    probabilities = logits[0, -1, : tokenizer.vocab_size].softmax(-1)
    for probability, token in zip(*probabilities.topk(options.top), strict=True):
        print(f"{probability.item():7.4f}  {tokenizer.decode([token.item()])!r}")


if __name__ == "__main__":
    main()
