"""The level data keeps its rules: format, words, lengths, and enough variety that a model cannot learn a template.

Every check collects all offenders and shows them together, so that one run is enough to mend the file.
"""

import re
from collections import Counter
from itertools import combinations, groupby
from pathlib import Path

import pytest

DATA = Path(__file__).parent.parent / "data"
HEADER = ["word", "pos", "sentence"]
PARTS_OF_SPEECH = {"noun", "verb", "adjective", "adverb", "preposition", "pronoun", "number"}

# Forms that the rules in inflections() do not make. Only words of the data stand here.
IRREGULAR = {
    "bad": "worse worst",
    "begin": "began begun",
    "break": "broke broken",
    "bring": "brought",
    "build": "built",
    "buy": "bought",
    "catch": "caught",
    "child": "children",
    "choose": "chose chosen",
    "come": "came",
    "draw": "drew drawn",
    "drink": "drank drunk",
    "drive": "drove driven",
    "eat": "ate eaten",
    "fall": "fell fallen",
    "feel": "felt",
    "find": "found",
    "fly": "flew flown",
    "foot": "feet",
    "forget": "forgot forgotten",
    "give": "gave given",
    "go": "went gone",
    "good": "better best",
    "hear": "heard",
    "knife": "knives",
    "know": "knew known",
    "leave": "left",
    "lose": "lost",
    "make": "made",
    "man": "men",
    "meet": "met",
    "pay": "paid",
    "ride": "rode ridden",
    "run": "ran",
    "say": "said",
    "see": "saw seen",
    "sell": "sold",
    "send": "sent",
    "sing": "sang sung",
    "sit": "sat",
    "sleep": "slept",
    "speak": "spoke spoken",
    "stand": "stood",
    "swim": "swam swum",
    "take": "took taken",
    "teach": "taught",
    "tell": "told",
    "think": "thought",
    "tooth": "teeth",
    "understand": "understood",
    "wake": "woke woken",
    "wear": "wore worn",
    "wife": "wives",
    "win": "won",
    "woman": "women",
    "write": "wrote written",
}


def inflections(word: str, pos: str) -> set[str]:
    """The forms of a word: itself, the regular forms of its part of speech, and its irregular ones."""
    consonant_y = re.search(r"[^aeiou]y$", word)  # city -> cities, but boy -> boys
    stem = word[:-1] if word.endswith("e") else word[:-1] + "i" if consonant_y else word  # mak-, citi-, play-
    doubled = word + word[-1] if re.search(r"[^aeiou][aeiou][bdglmnprt]$", word) else stem  # stop -> stopp-
    forms = {word, *IRREGULAR.get(word, "").split()}
    if pos in ("noun", "verb"):
        sibilant = re.search(r"(s|x|z|ch|sh|o)$", word)
        forms |= {stem + "es"} if consonant_y else {word + "es", word + "s"} if sibilant else {word + "s"}
    if pos == "verb":
        ing = word if consonant_y else re.sub(r"ie$", "y", word) if word.endswith("ie") else stem  # cry-, ly-, mak-
        forms |= {base + "ed" for base in (stem, doubled)} | {base + "ing" for base in (ing, doubled)}
    if pos in ("adjective", "adverb"):
        forms |= {base + ending for base in (stem, doubled) for ending in ("er", "est")}
    return forms


def tokens(sentence: str) -> list[str]:
    """Lower-case words without punctuation; apostrophes stay inside words."""
    return re.findall(r"[a-z0-9']+", sentence.lower())


def trigrams(sentence: str) -> list[tuple[str, ...]]:
    """The word 3-grams of a sentence, in order."""
    words = tokens(sentence)
    return list(zip(words, words[1:], words[2:]))


def near_duplicates(sentences: list[str], limit: float = 0.6) -> list[tuple[str, str]]:
    """Pairs that share more than `limit` of the 3-grams of the one that has fewer."""
    grams = [(sentence, set(trigrams(sentence))) for sentence in sentences]
    return [(a, b) for (a, x), (b, y) in combinations(grams, 2) if len(x & y) > limit * min(len(x), len(y))]


def report(**offenders: list) -> None:
    """Fail with every offender of every check: the check's name, then one offender a line."""
    found = {check.replace("_", " "): rows for check, rows in offenders.items() if rows}
    assert not found, "".join(
        f"\n{check} ({len(rows)}):" + "".join(f"\n  {row}" for row in rows) for check, rows in found.items()
    )


@pytest.fixture(scope="module", params=["a1"])
def lines(request) -> list[list[str]]:
    """The fields of every line of a level's file, header first."""
    text = (DATA / f"{request.param}.tsv").read_text(encoding="utf-8")
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
    assert len(counts) >= 300
    report(
        not_two_sentences=[(word, count) for word, count in counts.items() if count != 2],
        not_a_lower_case_word=[word for word in counts if not re.fullmatch(r"[a-z]+", word)],
        unknown_part_of_speech=[row for row in rows if row[1] not in PARTS_OF_SPEECH],
        apart_or_two_parts_of_speech=[word for word, count in runs.items() if count > 1],
    )


def test_sentences(rows, sentences):
    report(
        not_4_to_9_words=[s for s in sentences if not 4 <= len(s.split()) <= 9],
        no_capital_or_end_mark=[s for s in sentences if not re.fullmatch(r"[A-Z].*[^ .?!][.?!]", s)],
        word_not_used=[row for row in rows if not inflections(*row[:2]) & set(tokens(row[2]))],
    )


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


@pytest.mark.parametrize(
    "word, pos, form",
    [
        ("city", "noun", "cities"),
        ("boy", "noun", "boys"),
        ("glass", "noun", "glasses"),
        ("tomato", "noun", "tomatoes"),
        ("piano", "noun", "pianos"),
        ("stop", "verb", "stopping"),
        ("travel", "verb", "travelled"),
        ("make", "verb", "making"),
        ("cry", "verb", "cried"),
        ("cry", "verb", "crying"),
        ("big", "adjective", "bigger"),
        ("nice", "adjective", "nicer"),
        ("happy", "adjective", "happiest"),
        ("foot", "noun", "feet"),
    ],
)
def test_inflections(word, pos, form):
    assert form in inflections(word, pos)


@pytest.mark.parametrize(
    "word, pos, form",
    [
        ("car", "noun", "carry"),
        ("boy", "noun", "boies"),
        ("cold", "adjective", "colds"),
        ("in", "preposition", "inner"),
    ],
)
def test_inflections_are_not_guesses(word, pos, form):
    assert form not in inflections(word, pos)


def test_near_duplicates_are_found():
    pair = ["What colour is your bedroom?", "What colour is your new car?"]
    assert near_duplicates([*pair, "Red and blue are nice colours."]) == [tuple(pair)]
