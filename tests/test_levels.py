"""lora/levels.py and the lists of data.py: what is held out stays held out, and answers are judged fairly."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tiny import problems
from tiny_chat import tiny_chat_folder

from lora.bootstrap import difference
from lora.config import DataConfig
from lora.data import Conversation, list_conversations, without_their_word, words_of
from lora.levels import (
    AT_LEVEL,
    DATA,
    LEVELS,
    Pair,
    answer,
    ask,
    deal,
    judge,
    level_fit,
    read_answer,
    read_words,
    split_words,
    stands_in,
    wordings,
)
from lora.tokenizer import Tokenizer

SEEDS = (0, 1, 77)
EPOCHS = 2


def entries(text: str) -> list[str]:
    """The entries of a numbered list at the end of a text; their numbers must be 1, 2, 3, ..."""
    lines = text.split("\n\n")[-1].split("\n")
    for number, line in enumerate(lines, 1):
        assert line.startswith(f"{number}. "), line
    return [line.split(". ", 1)[1] for line in lines]


def pairs_of(conversation: Conversation) -> list[tuple[str, str]]:
    """The words of a list, each with its sentence, as the model sees them."""
    user, assistant = conversation.messages
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return list(zip(entries(user["content"]), entries(assistant["content"]), strict=True))


def words_file(path: Path, n: int) -> Path:
    rows = [
        f"w{chr(97 + i // 26)}{chr(97 + i % 26)}\tnoun\tSentence {k} of number {i}." for i in range(n) for k in (1, 2)
    ]
    path.write_text("\n".join(["word\tpos\tsentence", *rows]), encoding="utf-8")
    return path


# --- words ---


@pytest.mark.parametrize("level", LEVELS)
def test_words_are_split_once(level):
    """The tenth of the words, 20 at least, whatever their order; a word's side does not depend on a seed."""
    words = list(read_words(DATA / f"{level}.tsv"))
    train, held_out = split_words(words)
    assert split_words(words[::-1]) == (train, held_out)
    assert {*train, *held_out} == {*words}
    assert not {*train} & {*held_out}
    assert len(held_out) == round(len(words) / 10)
    assert len(split_words(train[:50])[1]) == 20


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("level", LEVELS)
def test_what_is_held_out(level, seed):
    """No held-out word is asked for in training, and none of its sentences stands there."""
    config = DataConfig(level=level, train_lists=300, eval_lists=30)
    words, held_out = words_of(config)
    epochs, evaluation = list_conversations(config, seed, EPOCHS)
    assert len(epochs) == EPOCHS
    train = [pair for conversations in epochs for conversation in conversations for pair in pairs_of(conversation)]
    evaluated = [pair for conversation in evaluation for pair in pairs_of(conversation)]
    assert {word for word, _ in train} == words.keys()
    assert {word for word, _ in evaluated} == held_out.keys()
    assert not {sentence for _, sentence in train} & {s for sentences in held_out.values() for s in sentences}
    assert all(sentence in words[word] for word, sentence in train)
    assert all(sentence in held_out[word] for word, sentence in evaluated)


@pytest.mark.parametrize("seed", SEEDS)
def test_lists(seed):
    """160 lists an epoch and 18 of 10 different words each; no list comes twice, in no epoch."""
    epochs, evaluation = list_conversations(DataConfig(level="a1"), seed, EPOCHS)
    assert [len(conversations) for conversations in (*epochs, evaluation)] == [160, 160, 18]
    asked = []
    for conversations in ([c for epoch in epochs for c in epoch], evaluation):
        lists = [frozenset(word for word, _ in pairs_of(conversation)) for conversation in conversations]
        assert {*map(len, lists)} == {10}
        assert len({*lists}) == len(lists)
        assert len({conversation.name for conversation in conversations}) == len(lists)
        assert all(pairs_of(c) == list(c.pairs) for c in conversations)
        asked += [c.messages[0]["content"].split("\n")[0] for c in conversations]
    assert {*asked} == {*wordings("en", "a1", None)}


def test_words_are_dealt_evenly():
    """A word comes again only when all others have come, but for those left over at the end of a deck."""
    words = {f"word {i}": ["one", "two"] for i in range(43)}
    lists = deal(words, 40, 10, np.random.default_rng(3))
    counts = Counter(word for pairs in lists for word, _ in pairs)
    assert max(counts.values()) <= 10
    assert len(counts) == 43
    assert {sentence for pairs in lists for _, sentence in pairs} == {"one", "two"}


def test_the_seed_moves_train_alone():
    runs = [list_conversations(DataConfig(level="a1"), seed, 1) for seed in SEEDS]
    assert list_conversations(DataConfig(level="a1"), SEEDS[0], 1) == runs[0]
    for (one_train, one_eval), (other_train, other_eval) in pairwise(runs):
        assert one_train != other_train
        assert one_eval == other_eval


def test_more_epochs_do_not_change_the_first():
    """So that a run cut short, or made longer, saw the same lists."""
    short, long = (list_conversations(DataConfig(level="a1"), 5, epochs)[0] for epochs in (1, 3))
    assert long[:1] == short


def test_a_list_as_a_conversation():
    pairs = [Pair("milk", "I drink milk."), Pair("tree", "The tree is tall.")]
    assert ask(["milk", "tree"], "Write.") == "Write.\n\n1. milk\n2. tree"
    assert answer(pairs) == "1. I drink milk.\n2. The tree is tall."


def test_wordings():
    assert all(" at CEFR level B2" in wording for wording in wordings("en", "b2", None))
    assert not any("level" in wording or "{" in wording for wording in wordings("en", None, None))
    assert not any("{" in wording for wording in wordings("tr", None, None))
    assert wordings("de", None, "Schreibe!") == ["Schreibe!"]


def test_your_own_words(tmp_path):
    """20 words at least are held out, and too few words are an error that says so."""
    config = DataConfig(words=words_file(tmp_path / "w.tsv", 60))
    assert [*map(len, words_of(config))] == [40, 20]
    (problem,) = problems(words_of, DataConfig(words=words_file(tmp_path / "few.tsv", 25)))
    assert "few.tsv" in problem
    tight = DataConfig(words=words_file(tmp_path / "tight.tsv", 41), list_size=20)
    train, evaluation = problems(list_conversations, tight, 0, 9)
    assert "--train-lists" in train
    assert "--eval-lists" in evaluation
    assert list_conversations(DataConfig(words=tight.words, list_size=20, train_lists=1, eval_lists=1), 0, 1)


def test_sentences_without_their_word(tmp_path):
    path = tmp_path / "w.tsv"
    rows = [f"word{i}\tnoun\tThis is word{i} or {'x' * i}." for i in range(40)]
    path.write_text("\n".join(["word\tpos\tsentence", *rows, "go\tverb\tWe went."]), encoding="utf-8")
    assert without_their_word(DataConfig(words=path)) == []
    assert without_their_word(DataConfig(words=path, language="xx")) == ["go: We went."]


@pytest.mark.parametrize(
    ("word", "sentence", "there"),
    [
        ("Haus", "Die Häuser", False),
        ("Haus", "im hause", True),
        ("in", "er geht dahin", False),
        ("猫", "我有一只猫。", True),
    ],
)
def test_languages_without_rules(word, sentence, there):
    assert stands_in(word, sentence) == there


def test_bad_words(tmp_path):
    path = tmp_path / "bad.tsv"
    path.write_text("word\tpos\tsentence\nmilk\tnoun\nx\tnoun\t\n\nok\tnoun\tFine.\n", encoding="utf-8")
    assert len(problems(read_words, path)) == 2
    rows = ["milk\tnoun\tI like it.", 'tea\tnoun\t"I like tea."', "tea\tnoun\tI like it!", "Milk\tnoun\tIt is white."]
    path.write_text("\r\n".join(["word\tpos\tsentence", *rows]), encoding="utf-8")
    quotes, again, spellings = problems(read_words, path)
    assert "line 3" in quotes
    assert "line 4" in again
    assert "milk, Milk" in spellings
    path.write_text("milk\tnoun\tI like milk.\n", encoding="utf-8")
    assert "first line" in problems(read_words, path)[0]
    assert problems(read_words, tmp_path / "none.tsv")


# --- judging ---


@pytest.mark.parametrize(
    ("text", "valid", "sentences"),
    [
        ("1. A b.\n2. C d.", True, ["A b.", "C d."]),
        ("1) A b.\n\n2) C d.\n", True, ["A b.", "C d."]),
        ("Here you are:\n1. A b.\n2. C d.", False, ["A b.", "C d."]),
        ("1. A b.", False, ["A b.", ""]),
        ("2. C d.\n1. A b.", False, ["A b.", "C d."]),
        ("1. A b.\n2. C d.\n3. E f.", False, ["A b.", "C d."]),
        ("1. A b.\n1. C d.\n2.", False, ["A b.", ""]),
        ("", False, ["", ""]),
    ],
)
def test_read_answer(text, valid, sentences):
    assert read_answer(text, 2) == (valid, sentences)


def test_level_fit():
    """Words above the level count against it; names and what cefrpy does not know do not count."""
    assert level_fit("I have a dog.", 1) == (4, 4)
    assert level_fit("We scrutinised the dog.", 1) == (3, 4)
    assert level_fit("My friend Agamemnon reads.", 6)[1] == 3
    assert level_fit("Xqzzy brtl.", 1) == (0, 0)


def test_judge():
    lists = [[Pair("milk", "I drink milk."), Pair("go", "We go home.")], [Pair("milk", "."), Pair("see", ".")]]
    answers = ["1. Cold milk is nice in the morning.\n2. They went home, and it was late at night.", "1. No.\n2. No!"]
    metrics = judge(lists, answers, [True, False], "en", "a1", {"other": ["They went home and it was late, at night!"]})
    means = {name: tally.mean for name, tally in metrics.items()}
    assert means == {
        "valid lists": 0.5,  # the second was cut off
        "words used": 0.5,
        "words in a sentence": (7 + 9 + 1 + 1) / 4,
        "sentences repeated": 0.25,
        "sentences copied": 0.25,
        "sentences in the length band": 0.5,
        AT_LEVEL: 17 / 18,  # cefrpy has "went" at A2
    }
    assert metrics["words used"] == {"milk": (1, 2), "go": (1, 1), "see": (0, 1)}
    assert metrics["valid lists"] == {0: (1, 1), 1: (0, 1)}
    assert AT_LEVEL not in judge(lists, answers, [True, True], "tr", None, {})
    low, high = difference(metrics["words used"], metrics["words used"])
    assert low == high == 0


def test_a_word_alone_is_no_sentence():
    metrics = judge([[Pair("milk", "."), Pair("go", ".")]], ["1. Milk!\n2. Go home!"], [True], "en", "a1", {})
    assert metrics["words used"] == {"milk": (0, 1), "go": (1, 1)}


def test_missing_sentences_count_against_the_use_of_words_alone():
    metrics = judge([[Pair("milk", "."), Pair("go", ".")]], ["I cannot do that."], [True], "en", "a1", {})
    assert (metrics["valid lists"].mean, metrics["words used"].mean) == (0, 0)
    assert metrics["words in a sentence"] == {}


# --- where sentences stand ---


def test_pieces(tmp_path):
    """The tokens of each sentence, decoded, are the sentence, without number and newline."""
    tokenizer = Tokenizer.load(tiny_chat_folder(tmp_path))
    (conversations,), _ = list_conversations(DataConfig(level="a1", train_lists=5), 0, 1)
    for c in conversations:
        chat = tokenizer.chat(c.messages, "response", c.name)
        places = tokenizer.pieces(c.messages, [pair.sentence for pair in c.pairs], c.name)
        for pair, own in zip(c.pairs, places, strict=True):
            assert all(chat.mask[place] for place in own)
            assert tokenizer.decode([chat.ids[place] for place in own]).strip() == pair.sentence
