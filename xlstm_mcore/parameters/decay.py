"""Which parameters weight decay applies to, and which Muon updates."""

import re
from collections.abc import Iterable, Mapping

# Kinds of global tensors for weight decay: the first pattern that fits, and the papers' choice
# (arXiv 2405.04517 B.2, 2503.13427 App. B: kernels decay, those of the head and the gates among
# them). All slices of one parameter are of one kind.
_KINDS: list[tuple[str, str, bool]] = [
    ("embedding", r"embedding\..*", False),
    ("head", r"output_layer\.weight", True),
    ("norm", r".*norm\.weight", False),
    ("skip", r".*\.(learnable_skip|skip)", False),
    ("recurrent", r".*\.recurrent_weight", False),
    ("conv", r".*\.([xbc]_)?conv\.weight", True),
    ("projection", r".*\.(\w+_proj|[ifzo]gate)\.weight", True),
    ("bias", r".*(bias|\.a_log)", False),
]

KINDS = tuple(kind for kind, _, _ in _KINDS)


def decays(name: str, overrides: Mapping[str, bool] | None = None) -> bool:
    """Whether weight decay applies to a global tensor, by its kind.

    Args:
        name: Global name.
        overrides: Choices that differ from the papers', by kind (one of `KINDS`).

    Raises:
        KeyError: No kind fits the name.
    """
    for kind, pattern, choice in _KINDS:
        if re.fullmatch(pattern, name):
            return (overrides or {}).get(kind, choice)
    raise KeyError(f"no kind for {name}")


def is_hidden_matrix(name: str, shape: Iterable[int]) -> bool:
    """Whether a global tensor is a full matrix between hidden activations (Muon's kind).

    Embedding and head are not, nor are block-diagonal projections and the gates of mLSTM, whose
    rows are the gates of single heads.
    """
    full = re.fullmatch(r"decoder\..*\.(\w+_proj|ogate)\.weight", name) is not None
    return full and len(tuple(shape)) == 2
