"""Hugging Face tokenizers: a `tokenizer.json` with its `tokenizer_config.json`."""

import json
import os
from collections.abc import Mapping, Sequence
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

    def _special_id(self, token: str | dict[str, Any] | None) -> int | None:
        """Id of a token as the configuration names it: a string, or an object with `content`."""
        name = token.get("content") if isinstance(token, dict) else token
        return None if name is None else self._tokenizer.token_to_id(name)

    @property
    def vocab_size(self) -> int:
        """Number of ids, with added tokens."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def token(self, number: int) -> str | None:
        """The token of an id; None for an id without one."""
        return self._tokenizer.id_to_token(number)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids int32 of each text, without bos and eos."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return as_arrays([item.ids for item in encoded])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; special ids give nothing."""
        return self._tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)
