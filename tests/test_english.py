"""lora/english.py: forms of words, and what is none."""

import pytest

from lora.english import inflections, uses


@pytest.mark.parametrize(
    ("word", "forms"),
    [
        ("city", "cities"),
        ("boy", "boys"),
        ("glass", "glasses"),
        ("tomato", "tomatoes"),
        ("piano", "pianos"),
        ("stop", "stops stopped stopping"),
        ("travel", "travelled travelling traveled traveling"),
        ("listen", "listened listening"),
        ("make", "made making makes"),
        ("cry", "cried crying cries"),
        ("lie", "lay lain lying lies"),
        ("see", "saw seen seeing sees"),
        ("agree", "agreed agreeing agrees"),
        ("panic", "panicked panicking panics"),
        ("undergo", "undergoes underwent undergone undergoing"),
        ("big", "bigger biggest"),
        ("nice", "nicer nicest"),
        ("happy", "happier happiest"),
        ("good", "better best"),
        ("foot", "feet"),
        ("life", "lives"),
        ("quiz", "quizzes"),
        ("be", "am is are was were been being"),
    ],
)
def test_forms(word, forms):
    assert {word, *forms.split()} <= inflections(word)


@pytest.mark.parametrize(
    ("word", "other"),
    [
        ("car", "carry"),
        ("boy", "boies"),
        ("in", "inner"),
        ("be", "best"),
        ("see", "seed"),
        ("go", "good"),
        ("lie", "life"),
    ],
)
def test_other_words(word, other):
    assert other not in inflections(word)


def test_uses():
    assert uses("bring", "She BROUGHT it.")
    assert uses("child", "The children's room is big.")
    assert not uses("art", "We start at ten.")
    assert not uses("up", "")
