"""The layer pattern language."""

import pytest

from xlstm_mcore.pattern import PatternError, parse_pattern


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
        ("MM#", "use M, m, s, *, and |"),
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
