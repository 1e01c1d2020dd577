"""The level task: a list of words in, one numbered sentence for each out. How lists are made, how answers are judged.

A table of words (data/<level>.tsv, or any file of its shape) has for each word a few sentences. An example is a list:

    user        Write one English sentence at CEFR level A1 for each of these words.   1. milk   2. tree   ...
    assistant   1. Do you take milk in your tea?   2. There are apples on the tree.   ...

**What is held out is words.** Sentences of one word are alike, and lists share words; so a tenth of the *words*, chosen
by a hash that no seed moves, is set aside first, and lists are drawn from one part or the other. A held-out word is
never asked for in training and none of its sentences stands there, though it may occur inside another word's sentence.

**Train lists are dealt anew for every epoch**, like cards: each word comes again when (nearly) all have come, in new
company and with another of its sentences. No list comes twice.

**Judging.** An answer is *valid* if it is a numbered list of the right length and nothing else, and came to its end.
Its i-th sentence is asked whether the i-th word is used in it (the word alone is no sentence), how long it is, whether
its words are of the level (English only: cefrpy's labels, a word counting at its easiest reading; what is capitalised
inside a sentence is taken for a name and left out, and so are words that cefrpy does not know), whether it stands in
the answer already, and whether it was copied from the training sentences.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora import english, turkish
from lora.bootstrap import Tally
from lora.errors import UserError

DATA = Path(__file__).parent.parent / "data"
COLUMNS = ["word", "pos", "sentence"]
HELD_OUT, HELD_OUT_AT_LEAST = 0.1, 20

Words = dict[str, list[str]]  # each word with its sentences


class Language(NamedTuple):
    """How a list is asked for, and how a word is recognised.

    prompts    {level} is where `at_level`, filled in, stands; or nothing, for words of no level
    uses       (word, sentence) -> whether the word, or a form of it, stands in the sentence
    """

    prompts: tuple[str, ...]
    at_level: str
    uses: Callable[[str, str], bool]


def stands_in(word: str, sentence: str) -> bool:
    """For languages whose forms we do not know: the word begins some word of the sentence, or, where no blanks are
    written between words, stands anywhere in it."""
    start = r"(?<!\w)" if " " in sentence.strip() else ""
    return re.search(start + re.escape(word.casefold()), sentence.casefold()) is not None


LANGUAGES = {
    "en": Language(
        prompts=(
            "Write one English sentence{level} for each of these words.",
            "Use each of these words in an English sentence{level}.",
            "Give one example sentence in English{level} for every word in this list.",
            "Here is a list of words. Write an English sentence{level} with each of them.",
            "Make a numbered list of English sentences{level}, one for each of these words.",
            "Please show me how to use these words: one English sentence{level} for each.",
        ),
        at_level=" at CEFR level {}",
        uses=english.uses,
    ),
    "tr": Language(
        prompts=(
            "Bu kelimelerin her biriyle{level} bir Türkçe cümle yaz.",
            "Her kelime için{level} Türkçe bir örnek cümle ver.",
            "Aşağıdaki kelimeleri{level} birer Türkçe cümlede kullan.",
            "Bu kelimeleri öğreniyorum. Her biri için{level} Türkçe bir cümle yazar mısın?",
        ),
        at_level=" {} düzeyinde",
        uses=turkish.uses,
    ),
}


def uses_of(language: str) -> Callable[[str, str], bool]:
    """How a language's words are recognised."""
    return LANGUAGES[language].uses if language in LANGUAGES else stands_in


@dataclass(frozen=True)
class Level:
    """A CEFR level: its number (A1 is 1), and how many words a sentence should have, from and to."""

    number: int
    length: tuple[int, int]


LEVELS = {
    "a1": Level(1, (4, 9)),
    "a2": Level(2, (5, 12)),
    "b1": Level(3, (7, 16)),
    "b2": Level(4, (9, 20)),
    "c1": Level(5, (11, 26)),
}


class Pair(NamedTuple):
    """A word of a list and the sentence that answers it."""

    word: str
    sentence: str


# --- words ------------------------------------------------------------------------------------------------------------


def read_words(path: Path) -> Words:
    """word -> its sentences, from a TSV with the columns word, pos, sentence; UserError lists what is wrong with it."""
    how = "write a header and then rows of three fields with tabs between: word, part of speech, sentence"
    try:
        lines = [line.rstrip("\r") for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except OSError as error:
        raise UserError(error.strerror or str(error), str(path), "bring the file back, or name another") from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: {error}", str(path), "save the file as UTF-8") from None
    if lines[0].split("\t") != COLUMNS:
        raise UserError("the first line is not word, pos, sentence", str(path), how)
    words: Words = {}
    problems = []
    first: dict[str, int] = {}  # where each sentence stands
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        where, fields = f"{path} line {number}", [field.strip() for field in line.split("\t")]
        if len(fields) != 3 or not fields[0] or not fields[2]:
            problems.append(UserError("not a word, its part of speech and a sentence", where, how))
        elif any(len(field) > 1 and field[0] == field[-1] == '"' for field in fields):
            problems.append(
                UserError("a field in quotes", where, "save the table as tab-separated text without quoting")
            )
        elif (earlier := first.setdefault(same(fields[2]), number)) != number:
            # On both sides of the split it would be learnt and then asked for.
            problems.append(UserError(f"the sentence of line {earlier} again", where, "write another one"))
        else:
            words.setdefault(fields[0], []).append(fields[2])
    spellings: dict[str, list[str]] = {}
    for word in words:
        spellings.setdefault(word.casefold(), []).append(word)
    for alike in spellings.values():
        if len(alike) > 1:
            problems.append(
                UserError(f"one word in several spellings: {', '.join(alike)}", str(path), "write it one way")
            )
    UserError.raise_all(problems)
    return words


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Train and held-out words: the tenth with the smallest hashes is held out, and 20 words at least."""
    held_out = max(HELD_OUT_AT_LEAST, round(HELD_OUT * len(words)))
    by_hash = sorted(words, key=lambda word: hashlib.sha256(word.encode()).digest())
    return sorted(by_hash[held_out:]), sorted(by_hash[:held_out])


def deal(words: Words, n: int, size: int, rng: np.random.Generator) -> list[list[Pair]]:
    """n different lists of `size` of the words, each with one of its sentences."""
    lists: list[list[Pair]] = []
    seen, deck = set(), []
    while len(lists) < n:
        if len(deck) < size:
            deck = [str(word) for word in rng.permutation(list(words))]
        hand, deck = deck[:size], deck[size:]
        if (key := frozenset(hand)) not in seen:
            seen.add(key)
            lists.append([Pair(word, words[word][rng.integers(len(words[word]))]) for word in hand])
    return lists


def ask(words: Sequence[str], wording: str) -> str:
    """The user's turn."""
    return wording + "\n\n" + "\n".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def answer(pairs: Sequence[Pair]) -> str:
    """The assistant's turn."""
    return "\n".join(f"{number}. {sentence}" for number, (_, sentence) in enumerate(pairs, 1))


def wordings(language: str, level: str | None, prompt: str | None) -> list[str]:
    """The ways to ask: the one given, or those of the language."""
    if prompt is not None:
        return [prompt]
    known = LANGUAGES[language]
    at_level = known.at_level.format(level.upper()) if level else ""
    return [wording.format(level=at_level) for wording in known.prompts]


# --- judging ----------------------------------------------------------------------------------------------------------


LENGTH, AT_LEVEL = "words in a sentence", "words at or below the level"


@cache
def reading_level(word: str) -> int | None:
    """The CEFR level (A1 is 1) of a lower-case English word in its easiest reading; None if cefrpy does not know it."""
    from cefrpy import CEFRAnalyzer  # takes a second to load

    readings = CEFRAnalyzer().get_pos_level_dict_for_word(word, pos_tag_as_string=True)
    return min(map(int, readings.values())) if readings else None


def level_fit(sentence: str, number: int) -> tuple[int, int]:
    """Of the words of a sentence whose level is known: how many are at or below `number`, and how many there are."""
    words = re.findall(r"[A-Za-z]+(?:'[a-z]+)?", sentence)
    # A capital inside a sentence makes a name.
    plain = [word.lower() for place, word in enumerate(words) if place == 0 or word == "I" or word[0].islower()]
    levels = [level for word in plain if (level := reading_level(word)) is not None]
    return sum(level <= number for level in levels), len(levels)


def read_answer(text: str, size: int) -> tuple[bool, list[str]]:
    """Whether a text is a list numbered 1 to `size` and nothing else; and its sentences, "" where one is missing."""
    sentences = [""] * size
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    numbers = []
    for line in lines:
        if found := re.fullmatch(r"(\d+)[.)]\s*(.+)", line):
            numbers.append(int(found[1]))
            if 1 <= numbers[-1] <= size and not sentences[numbers[-1] - 1]:
                sentences[numbers[-1] - 1] = found[2]
    return len(lines) == len(numbers) and numbers == list(range(1, size + 1)), sentences


def same(sentence: str) -> str:
    """What is alike in two sentences that differ in capitals and punctuation only."""
    return " ".join(re.findall(r"\w+", sentence.casefold()))


def judge(
    lists: Sequence[Sequence[Pair]],
    answers: Sequence[str],
    stopped: Sequence[bool],
    language: str,
    level: str | None,
    trained: Words,
) -> dict[str, Tally]:
    """What the answers to these lists are worth, metric by metric; each tally by list or by word.

    stopped: whether the model ended each answer itself; one that was cut off is no valid list.
    trained: the words that were trained on, whose sentences an answer may have copied.
    """
    uses = uses_of(language)
    known = {same(sentence) for sentences in trained.values() for sentence in sentences}
    names = ("words used", LENGTH, "sentences repeated", "sentences copied")
    valid, tallies = Tally(), {name: Tally() for name in names}
    if level is not None:
        tallies["sentences in the length band"] = Tally()
        if language == "en":
            tallies[AT_LEVEL] = Tally()
    for number, (pairs, text, ended) in enumerate(zip(lists, answers, stopped, strict=True)):
        is_list, sentences = read_answer(text, len(pairs))
        valid.add(number, is_list and ended)
        earlier: set[str] = set()
        for (word, _), sentence in zip(pairs, sentences, strict=True):
            # A model that only says its words again has written no sentence.
            echoed = same(sentence) == same(word)
            tallies["words used"].add(word, uses(word, sentence) and not echoed)
            if not sentence:
                continue
            length = len(sentence.split())
            tallies[LENGTH].add(word, length)
            tallies["sentences repeated"].add(word, same(sentence) in earlier)
            tallies["sentences copied"].add(word, same(sentence) in known)
            earlier.add(same(sentence))
            if level is not None:
                low, high = LEVELS[level].length
                tallies["sentences in the length band"].add(word, low <= length <= high)
            if AT_LEVEL in tallies:
                tallies[AT_LEVEL].add(word, *level_fit(sentence, LEVELS[level].number))
    return {"valid lists": valid, **tallies}
