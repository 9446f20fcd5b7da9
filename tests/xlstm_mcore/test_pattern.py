"""The layer pattern language."""

import pytest

from xlstm_mcore.pattern import PatternError, parse_pattern, spelled_out
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.presets import PRESETS


def test_letters_and_stages_carry_global_layer_numbers():
    pattern = parse_pattern("mmsm|MM|s")
    assert pattern.letters == ("m", "m", "s", "m", "M", "M", "s")
    assert pattern.stages == ((0, 1, 2, 3), (4, 5), (6,))
    assert len(pattern.letters) == 7


def test_without_cuts_there_is_one_stage():
    assert parse_pattern("MMM").stages == ((0, 1, 2),)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("", "does not name a layer"),
        ("MxM", "'x' at position 1"),
        ("MM#", "use M, m, s, l, d, *, and |"),
        ("MM||M", "leaves pipeline stage 1 without a layer"),
        ("|MM", "leaves pipeline stage 0 without a layer"),
        ("MM|", "leaves pipeline stage 1 without a layer"),
        ("3M", "'3' at position 0"),
    ],
)
def test_bad_patterns_say_what_is_wrong(pattern, says):
    with pytest.raises(PatternError, match="pattern=") as caught:
        parse_pattern(pattern)
    assert says in str(caught.value)


def test_message_about_a_long_pattern_stays_short():
    with pytest.raises(PatternError) as caught:
        parse_pattern("m" * 500 + "?")
    assert len(str(caught.value)) < 200
    assert "'?' at position 500" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "letters"),
    [
        ("xLSTM[1:0]x3", "mmm"),
        ("xLSTM[0:1]x2", "ss"),
        ("xLSTM[1:1]x4", "msms"),
        ("xLSTM[7:1]x48", PRESETS["xlstm_1.3b_7to1"].model["pattern"]),
        ("mm|s", "mm|s"),
    ],
)
def test_a_name_of_the_papers_is_written_out(name, letters):
    assert spelled_out(name) == letters
    model = ModelConfig(pattern=name, hidden_size=8, num_heads=2, vocab_size=8)
    assert model.pattern == letters


@pytest.mark.parametrize(
    "name",
    ["xLSTM[7:1]x47", "xLSTM[3:1]x48", "xLSTM[1:1]x3", "xLSTM[1:0]x0", "xLSTM"],
)
def test_a_name_that_no_paper_places_is_refused(name):
    with pytest.raises(PatternError, match=r"use xLSTM\[1:0\]xN"):
        spelled_out(name)
