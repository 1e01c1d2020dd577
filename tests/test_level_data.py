"""The level data keeps its rules: format, words, lengths, and enough variety that a model cannot learn a template.

Every check collects all offenders and shows them together, so that one run is enough to mend the file.
"""

import re
from collections import Counter
from itertools import combinations, groupby

import numpy as np
import pytest

from lora.english import uses
from lora.levels import DATA, LEVELS, level_fit, read_words

HEADER = ["word", "pos", "sentence"]
PARTS_OF_SPEECH = {"noun", "verb", "adjective", "adverb", "preposition", "pronoun", "number", "conjunction"}

# American spellings and words that this data, British throughout, does without.
AMERICAN = re.compile(
    r"\b(aluminum|airplane|analyze|behavior|canceled|canceling|catalog|center|color|curb|defense|dialog|enrollment|"
    r"favorite|fiber|flavor|fulfill|gotten|gray|harbor|honor|humor|jewelry|kilometer|labor|liter|math|meter|mom|"
    r"neighbor|neighborhood|offense|pajamas|practiced|practicing|program|rumor|sidewalk|skillful|soccer|theater|tire|"
    r"traveled|traveler|traveling)\b"
)
IZE = {"size", "prize", "seize", "capsize", "oversize"}  # the verbs and nouns that have a z in Britain, too

# Share of the words of all sentences at or below the level, which the data reaches; the card tells it exactly.
LEVEL_FIT = {"a1": 0.91, "a2": 0.95, "b1": 0.97, "b2": 0.99, "c1": 0.96}


def tokens(sentence: str) -> list[str]:
    """Lower-case words without punctuation; apostrophes stay inside words."""
    return re.findall(r"[a-z0-9']+", sentence.lower())


def trigrams(sentence: str) -> list[tuple[str, ...]]:
    """The word 3-grams of a sentence, in order."""
    words = tokens(sentence)
    return list(zip(words, words[1:], words[2:]))


def near_duplicates(sentences: list[str], limit: float = 0.6) -> list[tuple[str, str]]:
    """Pairs that share more than `limit` of the 3-grams of the one that has fewer."""
    grams = [set(trigrams(sentence)) for sentence in sentences]
    having: dict[tuple[str, ...], list[int]] = {}
    for place, own in enumerate(grams):
        for gram in own:
            having.setdefault(gram, []).append(place)
    shared = Counter(pair for places in having.values() for pair in combinations(places, 2))
    return [
        (sentences[a], sentences[b])
        for (a, b), count in shared.items()
        if count > limit * min(len(grams[a]), len(grams[b]))
    ]


def report(**offenders: list) -> None:
    """Fail with every offender of every check: the check's name, then one offender a line."""
    found = {check.replace("_", " "): rows for check, rows in offenders.items() if rows}
    assert not found, "".join(
        f"\n{check} ({len(rows)}):" + "".join(f"\n  {row}" for row in rows) for check, rows in found.items()
    )


@pytest.fixture(scope="module", params=LEVELS)
def level(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def lines(level) -> list[list[str]]:
    """The fields of every line of a level's file, header first."""
    text = (DATA / f"{level}.tsv").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.removesuffix("\n").split("\n")]


@pytest.fixture(scope="module")
def rows(lines) -> list[list[str]]:
    """(word, pos, sentence), without the header and without broken lines, which test_format reports."""
    return [line for line in lines[1:] if len(line) == len(HEADER)]


@pytest.fixture(scope="module")
def sentences(rows) -> list[str]:
    """The sentences alone."""
    return [sentence for _, _, sentence in rows]


def test_format(lines):
    assert lines[0] == HEADER
    report(
        not_three_clean_fields=[
            line
            for line in lines
            if len(line) != len(HEADER) or any(not field or field != " ".join(field.split()) for field in line)
        ],
        not_ascii=[line for line in lines if not "".join(line).isascii()],
    )


def test_words(rows):
    counts = Counter(word for word, _, _ in rows)
    runs = Counter(word for (word, _), _ in groupby(rows, key=lambda row: row[:2]))  # rows of a word stand together
    assert len(counts) >= 600
    report(
        not_three_sentences=[(word, count) for word, count in counts.items() if count != 3],
        not_a_lower_case_word=[word for word in counts if not re.fullmatch(r"[a-z]+", word)],
        unknown_part_of_speech=[row for row in rows if row[1] not in PARTS_OF_SPEECH],
        apart_or_two_parts_of_speech=[word for word, count in runs.items() if count > 1],
    )


def test_sentences(level, rows, sentences):
    low, high = LEVELS[level].length
    report(
        length=[s for s in sentences if not low <= len(s.split()) <= high],
        no_capital_or_end_mark=[s for s in sentences if not re.fullmatch(r"[\"']?[A-Z].*[^ .?!][.?!][\"']?", s)],
        word_not_used=[row for row in rows if not uses(row[0], row[2])],
    )


def test_one_spelling(sentences):
    ize = re.compile(r"\b(\w+iz)(?:e|es|ed|ing|ation|ations)\b")
    report(
        american=[s for s in sentences if AMERICAN.search(s.lower())],
        ize=[s for s in sentences if any(verb + "e" not in IZE for verb in ize.findall(s.lower()))],
    )


def test_level_fit(level, sentences):
    below, known = np.sum([level_fit(sentence, LEVELS[level].number) for sentence in sentences], axis=0)
    assert below / known >= LEVEL_FIT[level]


def test_no_word_in_two_levels():
    levels = Counter(word for level in LEVELS for word in read_words(DATA / f"{level}.tsv"))
    report(in_two_levels=[word for word, count in levels.items() if count > 1])


def test_no_duplicates(sentences):
    counts = Counter(" ".join(tokens(s)) for s in sentences)
    report(
        said_twice=[s for s, count in counts.items() if count > 1],
        nearly_the_same=near_duplicates(sentences),
    )


def test_no_templates(sentences):
    openings = Counter(" ".join(tokens(s)[:4]) for s in sentences)
    report(four_word_opening_over_1_percent=[o for o in openings.items() if o[1] > 0.01 * len(sentences)])
    grams = [gram for s in sentences for gram in trigrams(s)]
    assert len(set(grams)) > 0.75 * len(grams), f"distinct 3-grams: {len(set(grams))} of {len(grams)}"


def test_near_duplicates_are_found():
    pair = ["What colour is your bedroom?", "What colour is your new car?"]
    assert near_duplicates([*pair, "Red and blue are nice colours."]) == [tuple(pair)]
