"""Text from ids as they come, one at a time.

Ids cannot be decoded one by one: a character may be spelled in several ids, and some tokenizers
drop the space before the first id of what they decode. So a few ids before the new ones are decoded
with them, and text is given out once its last character is complete.
"""

from collections.abc import Sequence

from xlstm_io.tokenizer.base import Tokenizer

_CONTEXT = 8  # ids of the prompt that are decoded with the first new ones
_INCOMPLETE = "\ufffd"  # what decoders write for bytes that are not a character yet


class TextStream:
    """Decodes ids that follow a prompt; the parts joined are the text of all of them.

    Args:
        tokenizer: whose ids they are.
        prompt: ids before the first new one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])  # the context, then what has not been given out
        self._known = len(self._ids)

    def push(self, token: int) -> str:
        """Take the next id; the text that is complete now, which may be empty."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(_INCOMPLETE):
            return ""  # without text of its own an id is not a context for the next ones
        self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
        return text

    def finish(self) -> str:
        """What is left when no more ids come: the start of a character that was cut off."""
        text = self._new_text()
        self._known = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._known])
        return self._tokenizer.decode(self._ids)[len(before) :]
