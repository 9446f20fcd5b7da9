"""Texts on which an exported tokenizer must agree with the one of training, and the comparison."""

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from xlstm_io.tokenizer import Tokenizer
from xlstm_mcore.convert.errors import ConvertError

#: Texts that an exported tokenizer is compared on.
TEXTS = 5000

SPACE_SYMBOL = "\u2581"
SAMPLES = (
    "",
    " ",
    "a",
    "  two  spaces and a trailing one ",
    "Hello, world!\nSecond line\r\n\ttabbed\n\n\n",
    "def f(x):\n    return {'k': [1, 2.5e-3, 0xFF], \"s\": f'{x!r}'}  # 0123456789\n",
    "Grüße, naïve façade, señor, Ωμέγα, Привет, 你好世界, こんにちは, 안녕, العربية, עברית",
    "e\u0301 vs \u00e9, \ufb01 ligature, \u00a0nbsp, \u200bzero width, \u3000wide, \ufeffbom",
    "👩‍👩‍👧‍👦 🇩🇪 🤖 \U0001d54f \U0010ffff",
    "\x01\x02 control \x7f and a NUL: \0, at the end too\0",
    "<s> </s> <unk> <pad> <0x41> <|endoftext|> [CLS] [MASK] are text here; so is",
    f"a{SPACE_SYMBOL} {SPACE_SYMBOL}{SPACE_SYMBOL}b",
    SPACE_SYMBOL,
    "a" * 500 + " " * 70 + "ab" * 100,
    " " * 300,
    "\n" * 50 + "\t" * 50,
    "No. 1 | table | of | cells | 12,345.67 | https://example.org/a_b?c=d&e=%20f#g",
)

#: First and last character of the blocks of Unicode that random texts are made of.
_BLOCKS = (
    (0x20, 0x7E),
    (0x20, 0x7E),  # twice: the most common one
    (0xA0, 0x24F),  # Latin
    (0x300, 0x36F),  # combining marks
    (0x370, 0x3FF),  # Greek
    (0x400, 0x52F),  # Cyrillic
    (0x530, 0x5FF),  # Armenian, Hebrew
    (0x600, 0x6FF),  # Arabic
    (0x900, 0xDFF),  # Indic scripts
    (0xE00, 0xEFF),  # Thai, Lao
    (0x1000, 0x139F),  # Burmese, Georgian, Hangul jamo, Ethiopic
    (0x2000, 0x27BF),  # punctuation and symbols
    (0x2580, 0x259F),  # block elements, U+2581 among them
    (0x3000, 0x30FF),  # kana
    (0x4E00, 0x9FFF),  # Han
    (0xAC00, 0xD7A3),  # Hangul
    (0xF900, 0xFDFF),  # compatibility forms
    (0xFE00, 0xFFEF),  # variation selectors, wide forms
    (0x1F300, 0x1FAFF),  # emoji
    (0x0, 0x1F),  # control characters, NUL among them
)


def corpus(pieces: Sequence[str], special: Sequence[str], count: int) -> list[str]:
    """The same texts for the same tokenizer: fixed ones, random pieces, and random characters.

    Args:
        pieces: Texts of the vocabulary. Joined at random, they make its rarest merges occur.
        special: Special tokens, which are text when a text spells them out.
        count: Number of texts.
    """
    rng = random.Random(0)
    texts = list(SAMPLES)
    while len(texts) < count:
        parts: list[str] = []
        for _ in range(rng.randrange(1, 12)):
            kind = rng.randrange(8)
            if kind < 4 and pieces:
                parts += rng.choices(pieces, k=rng.randrange(1, 9))
            elif kind < 6:
                first, last = rng.choice(_BLOCKS)
                parts += [chr(rng.randint(first, last)) for _ in range(rng.randrange(1, 9))]
            elif kind == 6:
                parts.append(
                    rng.choice((" ", "\n", "\t", SPACE_SYMBOL, "\0")) * rng.randrange(1, 40)
                )
            elif special:
                parts.append(rng.choice(special))
        texts.append("".join(parts))
    return texts[:count]


def check_equal(found: PreTrainedTokenizerBase, exact: Tokenizer, texts: Sequence[str]) -> bool:
    """Check that a tokenizer of transformers gives the ids of training, called without options.

    Args:
        found: What `AutoTokenizer` gives.
        exact: The tokenizer of training.
        texts: See `corpus`.

    Returns:
        Whether it puts the bos token in front.

    Raises:
        ConvertError: It gives other ids, or decodes them to another text.
    """
    bos = [] if exact.bos_id is None else [exact.bos_id]
    bos_first = bool(bos) and found("a")["input_ids"][:1] == bos
    before = bos if bos_first else []
    for text, ids in zip(texts, exact.encode(texts), strict=True):
        expected = ids.tolist()
        if found(text)["input_ids"] != before + expected:
            raise ConvertError(f"it gives other ids for {text[:60]!r}")
        if found.unk_token_id in expected:  # SentencePiece writes U+2047, transformers nothing
            continue
        if found.decode(expected, skip_special_tokens=True) != exact.decode(expected):
            raise ConvertError(f"it decodes the ids of {text[:60]!r} to another text")
    return bos_first
