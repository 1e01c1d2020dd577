"""lora/english.py: forms of words, and what is none."""

import pytest

from lora.english import IRREGULAR, inflections, uses


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
        ("undo", "undoes undid undone undoing"),
        ("analysis", "analyses"),
        ("businesswoman", "businesswomen"),
        ("well", "better best"),
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
        ("us", "used"),
        ("for", "forest"),
        ("we", "west"),
        ("to", "toes"),
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
    assert uses("look after", "He looked after them.")
    assert not uses("look after", "Look at me after lunch.")
    assert uses("well-known", "She is well-known here.")
    assert uses("o'clock", "It is ten o\u2019clock.")
    assert uses("caf\u00e9", "Two caf\u00e9s are open.")
    assert uses("man", "That man's hat is red.")


def test_the_table_is_whole():
    """No entry begins with a form of another one: a bar in the wrong place would make it so."""
    for word in ("undid", "underwent", "went", "broken", "gone"):
        assert word not in IRREGULAR
