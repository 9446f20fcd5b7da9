"""Hugging Face tokenizers: a `tokenizer.json` with its `tokenizer_config.json`."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from xlstm_io.storage import Location
from xlstm_io.tokenizer.base import HF_CONFIG_NAME, HF_NAME, Tokenizer, as_arrays


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer as transformers saves it.

    Args:
        path: the `tokenizer.json`, for messages.
        files: its bytes, and those of its `tokenizer_config.json`.

    Raises:
        Exception: a file is damaged (the library raises bare `Exception`).
    """

    kind = "huggingface"

    def __init__(self, path: Location, files: Mapping[str, bytes]):
        super().__init__(path, {name: files[name] for name in (HF_NAME, HF_CONFIG_NAME)})
        config = json.loads(files[HF_CONFIG_NAME])
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # builds run a process per core
        self._tokenizer = FastTokenizer.from_str(files[HF_NAME].decode())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.bos_id = self._special_id(config.get("bos_token"))
        self.eos_id = self._special_id(config.get("eos_token"))
        self.pad_id = self._special_id(config.get("pad_token"))
        self._control = self._control_ids(json.loads(files[HF_NAME])["model"])

    def _control_ids(self, model: dict[str, Any]) -> set[int]:
        """Ids that no text may yield; what unknown characters become is none of them."""
        named = {number for number in (self.bos_id, self.eos_id, self.pad_id) if number is not None}
        added = self._tokenizer.get_added_tokens_decoder()
        # Some files do not say of their eos that it is special, so that a text could spell it.
        plain = [n for n in named if n not in added or not added[n].special]
        self._tokenizer.add_special_tokens([self._tokenizer.id_to_token(n) for n in plain])
        unknown = {model.get("unk_id"), self._tokenizer.token_to_id(model.get("unk_token") or "")}
        return (named | {n for n, token in added.items() if token.special}) - unknown

    def _special_id(self, token: str | dict[str, Any] | None) -> int | None:
        """Id of a token as the configuration names it: a string, or an object with `content`."""
        name = token.get("content") if isinstance(token, dict) else token
        return None if name is None else self._tokenizer.token_to_id(name)

    @cached_property  # the library makes a dictionary of the whole vocabulary to answer
    def vocab_size(self) -> int:
        """Number of ids, with added tokens."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def token(self, number: int) -> str | None:
        """The token of an id; None for an id without one."""
        return self._tokenizer.id_to_token(number)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids int32 of each text, without bos and eos."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [item.ids for item in encoded]
        for number, each in enumerate(ids):
            if not self._control.isdisjoint(each):
                ids[number] = self._encode_cut(texts[number])
        return as_arrays(ids)

    def _encode_cut(self, text: str) -> list[int]:
        """Ids of a text in which the model itself finds a control token: `</s>` as a whole word.

        Unigram models and lists of words do so, since their vocabulary has it. The text is cut
        behind the first character of each, as often as it takes.
        """
        parts = [text]
        while True:
            found = self._tokenizer.encode_batch(parts, add_special_tokens=False)
            cut = list[str]()
            for part, item in zip(parts, found, strict=True):
                pairs = zip(item.ids, item.offsets, strict=True)
                places = [first + 1 for n, (first, _) in pairs if n in self._control]
                bounds = [0, *(place for place in places if place < len(part)), len(part)]
                cut += [part[a:b] for a, b in pairwise(bounds)]
            if len(cut) == len(parts):
                return [number for item in found for number in item.ids]
            parts = cut

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; special ids give nothing."""
        return self._tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)
