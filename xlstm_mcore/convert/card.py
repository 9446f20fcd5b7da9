"""The model card of an export."""

from collections.abc import Sequence
from typing import Any

TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- xlstm
---

# xLSTM language model

{parameters:,} parameters, pretrained for {step:,} steps{tokens}. Exported from a checkpoint of
xlstm-pretrain; the architecture is the one of xLSTM 7B (arXiv 2503.13427).

| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
inputs = tokenizer("Once", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

Good to know:

{notes}
"""

#: Whether the exported tokenizer puts the bos token in front, as in training.
BOS = "Every training document began with the bos token; the tokenizer puts it in front."
NO_BOS = "Every training document began with the bos token, which the tokenizer does not put there."

#: What holds for every export, because of transformers' xlstm class.
GENERAL = (
    "Weights are fp32: transformers' native xLSTM kernels are exact only then.",
    "The class ignores the attention mask: do not pad on the left; generate with batch size 1.",
    "For training or plain logits pass `use_cache=False`.",
)


def model_card(provenance: dict[str, Any], notes: Sequence[str]) -> str:
    """The text of an export's README.md.

    Args:
        provenance: Where the export comes from (see `to_hf.export`).
        notes: What holds for this export alone.
    """
    model = provenance["model"]
    bos = () if NO_BOS in notes else (BOS,)
    facts = {
        "checkpoint": f"`{provenance['checkpoint']}`",
        **{
            key: str(model[key]).replace("|", "")  # a pattern's pipeline cuts mean nothing here
            for key in ("pattern", "hidden_size", "num_heads", "vocab_size", "tie_embeddings")
            if key in model
        },
        "tokenizer sha256": f"`{provenance['tokenizer_sha256']}`",
        **{f"{name} version": text for name, text in provenance["written_by"].items()},
    }
    tokens = provenance["tokens"]
    return TEMPLATE.format(
        parameters=provenance["parameters"],
        step=provenance["step"],
        tokens=f" on {tokens:,} tokens" if isinstance(tokens, int) else "",
        table="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        notes="\n".join(f"- {note}" for note in (*notes, *bos, *GENERAL)),
    )
