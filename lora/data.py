"""From files to steps: conversations -> examples (ids and loss mask) -> the plan of a run -> packed micro-batches.

Two sources. A *table of words* (a level's, or one's own) is made into lists, anew for every epoch: levels.py. A *file*
is JSONL, one conversation a line; without a file to evaluate on, 5 % of its prompts are held out by a hash of the
prompt, so that one prompt with many answers stays on one side.

A step is a set of examples, not a shape. The plan says which; `pack_examples` cuts them into rows under a token budget,
back to back, with no padding. The plan is a pure function of (examples, settings, seed), so to resume at a step is to
know its number.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lora.config import DataConfig, OptimConfig
from lora.errors import UserError, caught
from lora.levels import (
    DATA,
    HELD_OUT_AT_LEAST,
    Pair,
    Words,
    answer,
    ask,
    deal,
    read_words,
    split_words,
    uses_of,
    wordings,
)
from lora.tokenizer import Tokenizer, check_messages

T = TypeVar("T")

HELD_OUT = 0.05  # of the prompts of a file


@dataclass(frozen=True)
class Conversation:
    """messages [{"role", "content"}, ...] and a name that finds it again: "chat.jsonl line 7", "a1 train list 3".

    pairs: the words it asks for and the sentences it answers with, if it is a list.
    """

    name: str
    messages: list[dict[str, str]]
    pairs: tuple[Pair, ...] = ()


@dataclass(frozen=True)
class Example:
    """ids of a whole conversation, and which of them are learnt (never the first: nothing predicts it)."""

    name: str
    ids: list[int]
    mask: list[bool]

    @property
    def supervised(self) -> int:
        return sum(self.mask[1:])

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """ids int64 [T] and mask bool [T]."""
        # Ten times as fast as torch.tensor(list).
        ids, mask = array("q", self.ids), bytearray(self.mask)
        return torch.frombuffer(ids, dtype=torch.int64), torch.frombuffer(mask, dtype=torch.bool)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# --- lists of words ---------------------------------------------------------------------------------------------------


def words_of(config: DataConfig) -> tuple[Words, Words]:
    """The words to train on and those held out, of --level or --words; UserError if they are too few for a list."""
    path = config.words or DATA / f"{config.level}.tsv"
    words = read_words(path)
    sides = split_words(list(words))
    if min(map(len, sides)) < config.list_size:
        what = f"{len(words)} words are too few: {len(sides[1])} are held out, and a list takes {config.list_size}"
        how = f"give {HELD_OUT_AT_LEAST + config.list_size} or more, or a smaller --list-size"
        raise UserError(what, str(path), how)
    train, held_out = ({word: words[word] for word in side} for side in sides)
    return train, held_out


def without_their_word(config: DataConfig) -> list[str]:
    """The sentences of --words in which their word is not recognised: eval.py would count it as not used."""
    uses = uses_of(config.language)
    return [
        f"{word}: {sentence}"
        for words in words_of(config)
        for word, sentences in words.items()
        for sentence in sentences
        if not uses(word, sentence)
    ]


def list_conversations(
    config: DataConfig, seed: int, epochs: int
) -> tuple[list[list[Conversation]], list[Conversation]]:
    """Train lists, epoch by epoch, and eval lists (none with --eval-data).

    `seed` moves the train lists; words and eval lists are fixed.
    """
    train, held_out = words_of(config)
    ways = wordings(config.language, config.level, config.prompt)
    name = config.words.stem if config.words else config.level

    def made(kind: str, words: Words, n: int, draw: int) -> list[Conversation]:
        if math.comb(len(words), config.list_size) < n:
            what = f"{len(words)} {kind} words do not make {n} different lists of {config.list_size}"
            how = {"train": "fewer --train-lists or --epochs", "eval": "fewer --eval-lists"}[kind]
            raise UserError(what, name, f"give more words, or {how}")
        lists = deal(words, n, config.list_size, np.random.default_rng(draw))
        asked = np.random.default_rng((draw, 1)).integers(len(ways), size=n)
        conversations = []
        for number, (pairs, way) in enumerate(zip(lists, asked, strict=True), 1):
            user, assistant = ask([pair.word for pair in pairs], ways[way]), answer(pairs)
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            conversations.append(Conversation(f"{name} {kind} list {number}", messages, tuple(pairs)))
        return conversations

    n = config.train_lists
    eval_lists = config.eval_lists if config.eval_data is None else 0
    calls = (partial(made, "train", train, n * epochs, seed), partial(made, "eval", held_out, eval_lists, 0))
    dealt, evaluated = _gather(calls)
    return [dealt[start : start + n] for start in range(0, len(dealt), n)], evaluated


# --- files ------------------------------------------------------------------------------------------------------------


def read_jsonl(path: Path) -> list[Conversation]:
    """The conversations of a JSONL file; UserError lists the lines that are none."""
    conversations, problems = [], []
    how = 'write {"messages": [{"role": "user", "content": "..."}, ...]}'
    try:
        # Windows editors put a byte order mark in front.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(error.strerror or str(error), str(path), "bring the file back, or name another") from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: {error}", str(path), "save the file as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = f"{path.name} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(UserError(f"not JSON: {error.msg}", name, how))
            continue
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
            problems.append(UserError("no list called messages", name, how))
        else:
            try:
                check_messages(row["messages"], name)
            except UserError as error:
                problems.append(error)
            conversations.append(Conversation(name, row["messages"]))
    if not conversations and not problems:
        problems.append(UserError("no examples", str(path), how))
    UserError.raise_all(problems)
    return conversations


def _gather(calls: Iterable[Callable[[], T]]) -> list[T]:
    """What the calls return; if some of them raise a UserError, all that they find, as one."""
    results = [caught(call) for call in calls]
    # Each call has told its first 20 problems; none of them hides those of another.
    UserError.raise_all((result for result in results if isinstance(result, UserError)), most=100)
    return results


def _prompt(conversation: Conversation) -> str:
    """Everything before the first answer, as one string."""
    turns = []
    for message in conversation.messages:
        if isinstance(message, dict) and message.get("role") == "assistant":
            break
        turns.append(message)
    return json.dumps(turns, sort_keys=True)


def split_conversations(conversations: list[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
    """Train and held-out conversations: the 5 % of prompts with the smallest hashes, one at least, are held out."""
    prompts = sorted({_prompt(conversation) for conversation in conversations}, key=_hash)
    held_out = set(prompts[: max(1, round(HELD_OUT * len(prompts)))])
    train = [c for c in conversations if _prompt(c) not in held_out]
    if not train:
        raise UserError("all examples have one prompt, so none can be held out", "--data", "give a file to --eval-data")
    return train, [c for c in conversations if _prompt(c) in held_out]


# --- examples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlong:
    """What happened to examples longer than max_length."""

    dropped: int
    truncated: int


def encode(
    conversations: list[Conversation], tokenizer: Tokenizer, config: DataConfig
) -> tuple[list[Example], Overlong]:
    """Conversations -> examples of at most config.max_length tokens; UserError lists every one that cannot be one."""
    examples, problems = [], []
    dropped = truncated = 0
    chats = tokenizer.chats([(c.messages, c.name) for c in conversations], config.loss_on)
    for conversation, chat in zip(conversations, chats, strict=True):
        if isinstance(chat, UserError):
            problems.append(chat)
            continue
        ids, mask = chat.ids, chat.mask
        if len(ids) > config.max_length:
            if config.overlong == "error":
                what = f"{len(ids)} tokens are more than {config.max_length}"
                problems.append(UserError(what, conversation.name, "shorten it, or raise --max-length"))
                continue
            ids, mask = ids[: config.max_length], mask[: config.max_length]
            # Cut before its first supervised token, an example teaches nothing.
            if config.overlong == "drop" or not any(mask[1:]):
                dropped += 1
                continue
            truncated += 1
        examples.append(Example(conversation.name, ids, mask))
    UserError.raise_all(problems)
    return examples, Overlong(dropped, truncated)


def hash_of(examples: Iterable[Example]) -> str:
    """SHA-256 over ids and masks."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array(example.ids, "<i4").tobytes() + np.array(example.mask, "u1").tobytes())
    return digest.hexdigest()


def check_ids(examples: Iterable[Example], vocabulary: int) -> None:
    """UserError if an example has an id that the model has no embedding for: the tokenizer is another model's."""
    for example in examples:
        if (largest := max(example.ids)) >= vocabulary:
            what = f"id {largest}, and the model has {vocabulary} embeddings"
            raise UserError(what, example.name, "use the tokenizer files that belong to the model")


@dataclass(frozen=True)
class Dataset:
    """epochs: which of the train examples each epoch goes through; None: through all of them."""

    train: list[Example]
    eval: list[Example]
    train_overlong: Overlong
    eval_overlong: Overlong
    epochs: Sequence[range] | None = None

    @property
    def hash(self) -> str:
        """SHA-256 over ids and masks of all examples: two runs with the same hash saw the same data."""
        return hash_of([*self.train, *self.eval])


def load_conversations(
    config: DataConfig, seed: int, epochs: int
) -> tuple[list[list[Conversation]], list[Conversation]]:
    """Train conversations, epoch by epoch, and held-out ones, as --level, --words, --data and --eval-data name them.

    Those of a file are the same in every epoch, and stand there once.
    """
    if config.data is None:
        train, held_out = list_conversations(config, seed, epochs)
        return train, held_out if config.eval_data is None else read_jsonl(config.eval_data)
    if config.eval_data is None:
        once, held_out = split_conversations(read_jsonl(config.data))
    else:
        once, held_out = _gather(partial(read_jsonl, path) for path in (config.data, config.eval_data))
    return [once], held_out


def load_dataset(config: DataConfig, tokenizer: Tokenizer, seed: int, epochs: int) -> Dataset:
    """The examples of a training run of so many epochs; UserError if no length limit leaves any."""
    train, held_out = load_conversations(config, seed, epochs)
    *encoded, (eval_examples, eval_overlong) = _gather(
        partial(encode, some, tokenizer, config) for some in [*train, held_out]
    )
    for kind, examples in [*(("training", examples) for examples, _ in encoded), ("held-out", eval_examples)]:
        if not examples:
            what = f"no {kind} example has {config.max_length} tokens or fewer"
            raise UserError(what, "--max-length, --overlong", "raise the length, or truncate so that answers remain")
    ends = list(accumulate(len(examples) for examples, _ in encoded))
    return Dataset(
        [example for examples, _ in encoded for example in examples],
        eval_examples,
        Overlong(sum(long.dropped for _, long in encoded), sum(long.truncated for _, long in encoded)),
        eval_overlong,
        [range(start, end) for start, end in pairwise([0, *ends])] if len(encoded) > 1 else None,
    )


def held_out(
    config: DataConfig, tokenizer: Tokenizer, seed: int, data_hash: str
) -> tuple[list[Conversation], list[Example], Overlong]:
    """What a run was evaluated on, by its settings; UserError if that is not what its hash was taken of."""
    _, conversations = load_conversations(config, seed, epochs=1)
    examples, overlong = encode(conversations, tokenizer, config)
    if hash_of(examples) != data_hash:
        # Other lines may hold out other prompts, and some of them were trained on.
        where = str(config.eval_data or config.data or config.words or config.level)
        raise UserError("the held-out examples are not those of the run", where, "bring the data back")
    return conversations, examples, overlong


# --- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """The examples of one optimiser step, and how many epochs are behind when it is done."""

    examples: list[int]
    epoch: float


def plan(
    examples: Sequence[Example], config: OptimConfig, seed: int, epochs: Sequence[range] | None = None
) -> list[Step]:
    """All steps of a run. Each epoch is a permutation of its examples drawn from (seed, epoch), cut into steps.

    epochs: which examples each epoch goes through; None: through all of them.

    A step has batch_size * grad_accum examples, or with step_tokens as many as reach that many tokens; the last one of
    an epoch may be smaller.
    """
    steps: list[Step] = []
    for epoch in range(math.ceil(config.epochs)):
        if config.max_steps is not None and len(steps) >= config.max_steps:
            break
        order = np.random.default_rng((seed, epoch)).permutation(epochs[epoch] if epochs else len(examples)).tolist()
        cuts = _cut(order, examples, config)
        share = min(1.0, config.epochs - epoch)
        done = 0
        # Rounded first, lest 2.1 epochs of ten steps be 2.1000000000000001 and so a step more.
        for chunk in cuts[: math.ceil(round(share * len(cuts), 6))]:
            done += len(chunk)
            steps.append(Step(chunk, epoch + done / len(order)))
    return steps[: config.max_steps]


def _cut(order: list[int], examples: Sequence[Example], config: OptimConfig) -> list[list[int]]:
    if config.step_tokens is None:
        size = config.batch_size * config.grad_accum
        return [order[start : start + size] for start in range(0, len(order), size)]
    chunks, tokens = [], config.step_tokens
    for index in order:
        if tokens >= config.step_tokens:
            chunks.append([])
            tokens = 0
        chunks[-1].append(index)
        tokens += len(examples[index].ids)
    return chunks


@dataclass(frozen=True)
class Pack:
    """Whole examples back to back in one row of T tokens.

    names       of the examples
    lengths     tokens of each
    indices     int32 [T]: the number of the example that each token is from
    ids         int64 [T]
    positions   int64 [T]: restart at 0 with each example
    targets     int64 [T]: the next token; 0 at the last one of an example, where it is never used
    scored      bool [T]: there is a next token
    supervised  bool [T]: ... and it is learnt
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    indices: Tensor
    ids: Tensor
    positions: Tensor
    targets: Tensor
    scored: Tensor
    supervised: Tensor

    @property
    def supervised_tokens(self) -> int:
        return int(self.supervised.sum())


def make_pack(indices: list[int], examples: Sequence[Example]) -> Pack:
    """One pack of these examples, in this order, on the CPU."""
    chosen = [examples[index] for index in indices]
    lengths = [len(example.ids) for example in chosen]
    ends = torch.tensor(lengths).cumsum(0) - 1
    ids, mask = (torch.cat(parts) for parts in zip(*(example.tensors for example in chosen), strict=True))
    scored = torch.ones(len(ids), dtype=torch.bool)
    scored[ends] = False
    return Pack(
        names=tuple(example.name for example in chosen),
        lengths=tuple(lengths),
        indices=torch.tensor(indices, dtype=torch.int32).repeat_interleave(torch.tensor(lengths)),
        ids=ids,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        targets=ids.roll(-1).masked_fill(~scored, 0),
        scored=scored,
        supervised=mask.roll(-1) & scored,
    )


def pack_examples(indices: Sequence[int], examples: Sequence[Example], budget: int) -> list[Pack]:
    """These examples in few rows of at most `budget` tokens, all nearly equally long; an example that alone is longer
    has a row of its own.

    Longest first, each to the shortest row so far (Graham 1969), with one row more until no row is too long. So equally
    long examples end up as neighbours, which attention can take as one batch.
    """
    order = sorted(indices, key=lambda index: -len(examples[index].ids))
    lengths = [len(examples[index].ids) for index in order]
    # No two examples of over half the budget share a row.
    least = max(-(-sum(lengths) // budget), sum(2 * length > budget for length in lengths))
    for count in range(min(least, len(order)), len(order) + 1):
        rows = [[] for _ in range(count)]
        heap = [(0, row) for row in range(count)]  # tokens so far, which row
        for index, length in zip(order, lengths, strict=True):
            tokens, row = heap[0]
            rows[row].append(index)
            heapq.heapreplace(heap, (tokens + length, row))
        if all(tokens <= budget or len(rows[row]) == 1 for tokens, row in heap):
            break
    return [make_pack(row, examples) for row in rows]
