"""The model card of an export."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from xlstm_mcore.convert.tokenizer.write import WrittenTokenizer

TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- xlstm
---

# xLSTM language model

{parameters:,} parameters, {history}. Exported from a checkpoint of
xlstm-pretrain as `{family}`; {architecture}

| | |
|---|---|
{table}

## Use

```python
{snippet}```

Good to know:

{notes}
"""

_ARCHITECTURES = {
    "xlstm": "the architecture is the one of xLSTM 7B (arXiv 2503.13427).",
    "llama": "the architecture is a Transformer with rotary positions, as baselines have it.",
    "xlstm_blocks": (
        "the architecture is written out in `modeling_xlstm_blocks.py` (arXiv 2405.04517, "
        "2503.13427)."
    ),
}

#: The first line of a program after its imports.
_FOLDER = 'FOLDER = "."  # where this card lies, or its name on a hub\n'

_AUTO = """from transformers import AutoModelForCausalLM, AutoTokenizer

{folder}tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust_tokenizer})
model = AutoModelForCausalLM.from_pretrained(FOLDER{trust_model})
"""
_PLAIN = """import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

{folder}tokenizer = Tokenizer.from_file(f"{{FOLDER}}/tokenizer.json")
tokenizer.encode_special_tokens = True
model = AutoModelForCausalLM.from_pretrained(FOLDER{trust_model})
ids = [{bos}, *tokenizer.encode("Once", add_special_tokens=False).ids]
print(tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=50)[0].tolist()))
"""
_BOS_FIRST = """inputs = tokenizer("Once", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
"""
_BOS_BY_HAND = """ids = [tokenizer.bos_token_id, *tokenizer("Once")["input_ids"]]
print(tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=50)[0]))
"""

#: Whether the exported tokenizer puts the bos token in front, as in training.
BOS = "Every training document began with the bos token; the tokenizer puts it in front."
NO_BOS = "Every training document began with the bos token, which the tokenizer does not put there."

REGISTERED = (
    "Without remote code: install xlstm-pretrain, `import xlstm_mcore.hf`, and leave "
    "`trust_remote_code` out."
)


def snippet(remote_model: bool, tokenizer: WrittenTokenizer, bos_id: int | None) -> str:
    """Python that continues a text, with the ids that training had.

    Args:
        remote_model: Whether the model's class travels with the export.
        tokenizer: How its tokenizer is used.
        bos_id: The token that begins a document.
    """
    trust = ", trust_remote_code=True"
    fields = {
        "folder": _FOLDER,
        "trust_model": trust if remote_model else "",
        "trust_tokenizer": trust if tokenizer.remote_code else "",
        "bos": bos_id,
    }
    if not tokenizer.auto:
        return _PLAIN.format(**fields)
    if tokenizer.bos_first or bos_id is None:
        return _AUTO.format(**fields) + _BOS_FIRST
    return "import torch\n" + _AUTO.format(**fields) + _BOS_BY_HAND


def _history(provenance: dict[str, Any]) -> str:
    """How the weights came about, after the number of parameters."""
    tokens, imported = provenance["tokens"], provenance["imported"]
    if imported is not None:
        return f"imported from `{imported.get('from')}` and not trained since"
    on = f" on {tokens:,} tokens" if isinstance(tokens, int) else ""
    return f"pretrained for {provenance['step']:,} steps{on}"


def model_card(
    provenance: dict[str, Any],
    family: ModuleType,
    tokenizer: WrittenTokenizer,
    notes: Sequence[str],
) -> str:
    """The text of an export's README.md.

    Args:
        provenance: Where the export comes from (see `to_hf.export`).
        family: Its format.
        tokenizer: How its tokenizer is used.
        notes: What holds for this export.
    """
    model = provenance["model"]
    remote_model = family.NAME == "xlstm_blocks"
    notes = [*notes, BOS] if tokenizer.bos_first else [*notes]
    if remote_model or tokenizer.remote_code:
        notes.append(REGISTERED)
    shown = ("pattern", "hidden_size", "num_heads", "tie_embeddings")
    facts = {
        "checkpoint": f"`{provenance['checkpoint']}`",
        **{key: str(model[key]) for key in shown},
        "vocabulary": provenance["vocab_size"],
        "weights": provenance["dtype"],
        "tokenizer sha256": f"`{provenance['tokenizer_sha256']}`",
        **{f"{name} version": text for name, text in provenance["written_by"].items()},
    }
    return TEMPLATE.format(
        parameters=provenance["parameters"],
        history=_history(provenance),
        family=family.NAME,
        architecture=_ARCHITECTURES[family.NAME],
        table="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        snippet=snippet(remote_model, tokenizer, provenance["bos_id"]),
        notes="\n".join(f"- {note}" for note in notes),
    )
