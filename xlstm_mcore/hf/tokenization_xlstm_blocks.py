"""A SentencePiece model as a tokenizer of transformers, with the ids of SentencePiece itself.

For models that transformers' own classes read otherwise, unigram models above all. It travels with
an export that needs it, and needs the package `sentencepiece`.
"""

import os
import shutil

import sentencepiece
from transformers import PreTrainedTokenizer

SPACE_SYMBOL = "\u2581"


class XLSTMSentencePieceTokenizer(PreTrainedTokenizer):
    """SentencePiece behind transformers' interface.

    Control symbols that a text spells out are text. U+2581, which SentencePiece cannot tell from a
    space, is encoded as its bytes where the model has pieces for bytes.

    Args:
        vocab_file: The model, `tokenizer.model`.
        **kwargs: As for every tokenizer of transformers.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs) -> None:
        self.vocab_file = vocab_file
        self.model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        names = ("bos", "eos", "pad", "unk")
        ids = {f"{name}_token": getattr(self.model, f"{name}_id")() for name in names}
        for name, index in ids.items():
            if index >= 0:
                kwargs.setdefault(name, self.model.id_to_piece(index))
        kwargs.setdefault("split_special_tokens", True)
        kwargs["clean_up_tokenization_spaces"] = False
        bytes_of_symbol = [f"<0x{byte:02X}>" for byte in SPACE_SYMBOL.encode()]
        found = map(self.model.piece_to_id, bytes_of_symbol)
        self.symbol = bytes_of_symbol if all(map(self.model.is_byte, found)) else None
        super().__init__(vocab_file=vocab_file, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self.model.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Ids by piece."""
        return {self.model.id_to_piece(index): index for index in range(self.vocab_size)}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        if self.symbol is None:
            return self._pieces(text)
        first, *rest = text.split(SPACE_SYMBOL)
        pieces = self._pieces(first)
        for part in rest:
            pieces += self.symbol + self._pieces(part)
        return pieces

    def _pieces(self, text: str) -> list[str]:
        # By way of the ids: what SentencePiece calls the piece of an unknown character is the
        # character.
        return [self.model.id_to_piece(index) for index in self.model.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of some pieces."""
        return self.model.decode([self.model.piece_to_id(token) for token in tokens])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[bos] ids`, as training documents begin."""
        bos = [] if self.bos_token_id is None else [self.bos_token_id]
        second = [] if token_ids_1 is None else bos + token_ids_1
        return bos + token_ids_0 + second

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple:
        """Copy the model into a folder."""
        name = (filename_prefix + "-" if filename_prefix else "") + "tokenizer.model"
        target = os.path.join(save_directory, name)
        if os.path.abspath(target) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, target)
        return (target,)
