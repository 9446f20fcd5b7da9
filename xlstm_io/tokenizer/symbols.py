"""The tokenizer of synthetic tasks: a list of symbols, written with blanks between them."""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from xlstm_io.errors import UserError
from xlstm_io.storage import Location
from xlstm_io.tokenizer.base import SYMBOLS_NAME, Tokenizer, as_arrays

_SHOWN = 16  # symbols that a message lists


class SymbolsTokenizer(Tokenizer):
    """Ids are places in a list of symbols. Nothing stands around a sample: no bos, no eos.

    Args:
        path: the file, for messages.
        files: its bytes, under the name `symbols.json`: `{"symbols": ["_", "a", "b"]}`.

    Raises:
        ValueError: it is not a list of different words without blanks.
    """

    kind = "symbols"
    bos_id = eos_id = None

    def __init__(self, path: Location, files: Mapping[str, bytes]):
        super().__init__(path, {SYMBOLS_NAME: files[SYMBOLS_NAME]})
        fields = json.loads(files[SYMBOLS_NAME])
        symbols = fields.get("symbols") if isinstance(fields, dict) else None
        if not isinstance(symbols, list) or not all(isinstance(word, str) for word in symbols):
            raise ValueError("it has no list `symbols`")
        if not symbols or any(word.split() != [word] for word in symbols):
            raise ValueError("a symbol is a word without blanks")
        self._symbols: list[str] = symbols
        self._ids = {word: number for number, word in enumerate(symbols)}
        if len(self._ids) < len(symbols):
            raise ValueError("a symbol stands there twice")
        self.pad_id = 0

    @staticmethod
    def file_of(symbols: Sequence[str]) -> bytes:
        """The bytes of the file for these symbols; the first one is that of padding."""
        return json.dumps({"symbols": list(symbols)}).encode() + b"\n"

    @property
    def vocab_size(self) -> int:
        """Number of symbols."""
        return len(self._symbols)

    def token(self, number: int) -> str | None:
        """The symbol of an id."""
        return self._symbols[number] if 0 <= number < len(self._symbols) else None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids int32 of each text.

        Raises:
            UserError: a word of it is not a symbol.
        """
        return as_arrays([[self._id(word) for word in text.split()] for text in texts])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The symbols of some ids with blanks between them."""
        return " ".join(self._symbols[number] for number in ids if number < len(self._symbols))

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt: those of its symbols."""
        return self.encode([text])[0].tolist()

    def _id(self, word: str) -> int:
        number = self._ids.get(word)
        if number is None:
            shown = " ".join(self._symbols[:_SHOWN]) + (" ..." if self.vocab_size > _SHOWN else "")
            raise UserError(f"{word!r} is not a symbol of {self.path}; it has {shown}")
        return number
