"""lora/data.py: which examples there are, which step sees them, and how a step is cut into packs."""

import json
import math
from collections import Counter

import pytest
import torch
from tiny import problems
from tiny_chat import chat, random_examples, tiny_chat_folder, write_chats, write_jsonl

from lora.config import DataConfig, OptimConfig
from lora.data import (
    Conversation,
    Example,
    Overlong,
    check_ids,
    encode,
    load_dataset,
    pack_examples,
    plan,
    read_jsonl,
    split_conversations,
)
from lora.tokenizer import Tokenizer

# --- files ---


def test_read_jsonl(tmp_path):
    """Blank lines count as lines, not as examples."""
    path = write_jsonl(tmp_path / "chat.jsonl", [chat("Hi", "Ho ② 日本"), "", "   ", chat("a", "b")])
    assert read_jsonl(path) == [
        Conversation("chat.jsonl line 1", chat("Hi", "Ho ② 日本")["messages"]),
        Conversation("chat.jsonl line 4", chat("a", "b")["messages"]),
    ]


def test_bad_lines_are_told_together(tmp_path):
    lines = [chat("Hi", "Ho"), "{", '{"text": "Hi"}', "[1]", '{"messages": "Hi"}', '"Hi"', chat("a", "b")]
    found = problems(read_jsonl, write_jsonl(tmp_path / "chat.jsonl", lines))
    assert [problem.split("(")[1].split(")")[0] for problem in found] == [f"chat.jsonl line {n}" for n in range(2, 7)]
    assert "not JSON" in found[0]
    assert all("no list called messages" in problem for problem in found[1:])


def test_many_bad_lines_are_counted(tmp_path):
    found = problems(read_jsonl, write_jsonl(tmp_path / "chat.jsonl", ["{"] * 50))
    assert len(found) == 21
    assert "30 more" in found[-1]


@pytest.mark.parametrize(("content", "what"), [(b"", "no examples"), (b"\n \n", "no examples"), (b"\xff{}", "UTF-8")])
def test_unusable_file(tmp_path, content, what):
    (tmp_path / "chat.jsonl").write_bytes(content)
    (problem,) = problems(read_jsonl, tmp_path / "chat.jsonl")
    assert what in problem


def test_byte_order_mark(tmp_path):
    """Windows editors write one."""
    path = write_jsonl(tmp_path / "chat.jsonl", ["\ufeff" + json.dumps(chat("Hi", "Ho"))])
    assert len(read_jsonl(path)) == 1


def conversations(prompts: list[str]) -> list[Conversation]:
    return [Conversation(f"line {i}", chat(prompt, f"answer {i}")["messages"]) for i, prompt in enumerate(prompts)]


def test_split_by_prompt():
    """A prompt's answers stay on one side; 5 % of the prompts are held out, whatever the order of the lines."""
    rows = conversations([f"prompt {i % 60}" for i in range(200)])
    train, held_out = split_conversations(rows)
    sides = [{c.messages[0]["content"] for c in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [57, 3]
    assert len(train) + len(held_out) == 200
    backwards = split_conversations(rows[::-1])
    assert [side[::-1] for side in backwards] == [train, held_out]


def test_prompt_is_all_before_the_first_answer():
    """The same question under another system turn is another prompt; later turns do not count."""
    system = [{"role": "system", "content": "Be brief."}]
    more = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]
    for i in range(20):
        plain = chat(f"Q{i}", "A")["messages"]
        rows = [Conversation("plain", plain), Conversation("long", plain + more), Conversation("other", system + plain)]
        sides = [{c.name for c in side} for side in split_conversations(rows)]
        assert {"plain", "long"} in sides
        assert {"other"} in sides


@pytest.mark.parametrize(("prompts", "held_out"), [(2, 1), (19, 1), (100, 5)])
def test_at_least_one_is_held_out(prompts, held_out):
    train, evaluation = split_conversations(conversations([f"prompt {i}" for i in range(prompts)]))
    assert (len(train), len(evaluation)) == (prompts - held_out, held_out)


def test_one_prompt_cannot_be_split():
    (problem,) = problems(split_conversations, conversations(["same"] * 5))
    assert "--eval-data" in problem


# --- examples ---


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(tiny_chat_folder(tmp_path_factory.mktemp("base")))


def test_encode(tokenizer):
    """The answer and its end token are learnt; the example has the conversation's name."""
    (example,), overlong = encode(conversations(["Hi"]), tokenizer, DataConfig())
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nanswer 0<|im_end|>\n"
    assert example.name == "line 0"
    assert example.ids == tokenizer.encode(text)
    learnt = tokenizer.encode("answer 0<|im_end|>")
    assert [id for id, mask in zip(example.ids, example.mask, strict=True) if mask] == learnt
    assert example.supervised == len(learnt)
    assert overlong == Overlong(dropped=0, truncated=0)


@pytest.mark.parametrize("overlong", ["drop", "truncate", "error"])
def test_overlong(tokenizer, overlong):
    """Three fit, one is cut inside its answer, one would be cut inside its prompt."""
    rows = [*conversations(["a", "b", "c"]), *(Conversation(f"long {i}", chat(*m)["messages"]) for i, m in LONG)]
    whole, _ = encode(rows, tokenizer, DataConfig())
    limit = max(len(example.ids) for example in whole[:3])
    config = DataConfig(max_length=limit, overlong=overlong)
    if overlong == "error":
        found = problems(encode, rows, tokenizer, config)
        assert [str(len(example.ids)) in problem for example, problem in zip(whole[3:], found, strict=True)] == [
            True
        ] * 2
        assert "long 0" in found[0]
        return
    examples, count = encode(rows, tokenizer, config)
    assert examples[:3] == whole[:3]
    if overlong == "drop":
        assert (len(examples), count) == (3, Overlong(dropped=2, truncated=0))
    else:
        assert count == Overlong(dropped=1, truncated=1)
        assert examples[3:] == [Example("long 0", whole[3].ids[:limit], whole[3].mask[:limit])]
        assert examples[3].supervised


LONG = [(0, ("d", "many words " * 9)), (1, ("many words " * 9, "e"))]


def test_unusable_conversations_are_told_together(tokenizer):
    rows = [
        Conversation("line 1", chat("Hi", "Ho")["messages"]),
        Conversation("line 2", chat("Hi", "Ho")["messages"][:1]),
        Conversation("line 3", chat("Hi", "")["messages"]),
        Conversation("line 4", [{"role": "user"}]),
    ]
    found = problems(encode, rows, tokenizer, DataConfig())
    assert len(found) == 3
    for line, problem in zip((2, 3, 4), found, strict=True):
        assert f"line {line}" in problem


def test_dataset(tokenizer, tmp_path):
    """A file is split, or not with --eval-data; the hash sees every id and mask."""
    one, other = (write_chats(tmp_path / f"{seed}.jsonl", 40, seed) for seed in (1, 2))
    split = load_dataset(DataConfig(data=one), tokenizer, seed=0, epochs=2)
    assert (len(split.train), len(split.eval)) == (38, 2)
    given = load_dataset(DataConfig(data=one, eval_data=other), tokenizer, seed=0, epochs=2)
    assert (len(given.train), len(given.eval)) == (40, 40)
    last = load_dataset(DataConfig(data=one, loss_on="full"), tokenizer, seed=0, epochs=2)
    assert len({split.hash, given.hash, last.hash}) == 3
    assert load_dataset(DataConfig(data=one), tokenizer, seed=5, epochs=1).hash == split.hash
    level = load_dataset(DataConfig(level="a1", eval_data=other), tokenizer, seed=0, epochs=2)
    assert (len(level.train), len(level.eval)) == (320, 40)
    assert level.epochs == [range(160), range(160, 320)]


def test_bad_examples_of_both_sides_are_told_together(tokenizer, tmp_path):
    """Of both files, and of both sides of a split."""
    bad = write_jsonl(tmp_path / "bad.jsonl", [chat(f"Q{i}", "") for i in range(5)])
    assert len(problems(load_dataset, DataConfig(data=bad), tokenizer, 0, 1)) == 5
    broken = write_jsonl(tmp_path / "broken.jsonl", ["{"])
    found = problems(load_dataset, DataConfig(data=broken, eval_data=broken), tokenizer, 0, 1)
    assert len(found) == 2


def test_nothing_short_enough(tokenizer, tmp_path):
    short, long = (write_jsonl(tmp_path / f"{n}.jsonl", [chat("Q", "A" * n)]) for n in (1, 90))
    for train, evaluation, kind in ((long, short, "training"), (short, long, "held-out")):
        config = DataConfig(data=train, eval_data=evaluation, max_length=60)
        (problem,) = problems(load_dataset, config, tokenizer, 0, 1)
        assert f"no {kind} example" in problem


# --- steps ---

EXAMPLES = random_examples([3, 9, 4, 7, 5, 8, 6, 3, 9, 4, 7])


def seen(steps) -> list[int]:
    return [index for step in steps for index in step.examples]


@pytest.mark.parametrize(("batch_size", "grad_accum"), [(1, 1), (4, 1), (2, 2), (11, 1), (100, 1)])
def test_every_example_once_an_epoch(batch_size, grad_accum):
    steps = plan(EXAMPLES, OptimConfig(epochs=3, batch_size=batch_size, grad_accum=grad_accum), seed=0)
    an_epoch = math.ceil(11 / (batch_size * grad_accum))
    assert len(steps) == 3 * an_epoch
    orders = []
    for epoch in range(3):
        some = steps[epoch * an_epoch : (epoch + 1) * an_epoch]
        assert sorted(seen(some)) == list(range(11))
        assert some[-1].epoch == epoch + 1
        assert all(len(step.examples) == batch_size * grad_accum for step in some[:-1])
        orders.append(seen(some))
    assert len(set(map(tuple, orders))) == 3, "epochs have one order"
    behind = [step.epoch for step in steps]
    assert behind == sorted(behind)
    assert behind[0] == pytest.approx(len(steps[0].examples) / 11)


def test_every_epoch_has_its_own_examples():
    steps = plan(EXAMPLES, OptimConfig(epochs=2, batch_size=4), seed=0, epochs=[range(3), range(3, 11)])
    assert [sorted(step.examples) for step in steps[:1]] == [[0, 1, 2]]
    assert sorted(seen(steps[1:])) == list(range(3, 11))
    assert [step.epoch for step in steps] == [1, 1.5, 2]


def test_only_the_product_matters():
    plans = [plan(EXAMPLES, OptimConfig(batch_size=b, grad_accum=a), seed=4) for b, a in ((6, 1), (1, 6), (2, 3))]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize(
    ("epochs", "steps"), [(0.05, 1), (0.5, 3), (1.0, 6), (1.5, 9), (1 + 1 / 6, 7), (2.5, 15), (2 + 1 / 3, 14)]
)
def test_fractional_epochs(epochs, steps):
    """Of the 6 steps of an epoch the share is taken, rounded up, but a share that is whole is not rounded up again."""
    made = plan(EXAMPLES, OptimConfig(epochs=epochs, batch_size=2), seed=0)
    assert len(made) == steps
    assert made == plan(EXAMPLES, OptimConfig(epochs=5, batch_size=2), seed=0)[:steps]


def test_max_steps():
    """They end a run early and never make it longer."""
    whole = plan(EXAMPLES, OptimConfig(epochs=2, batch_size=4), seed=0)
    assert plan(EXAMPLES, OptimConfig(epochs=2, batch_size=4, max_steps=4), seed=0) == whole[:4]
    assert plan(EXAMPLES, OptimConfig(epochs=2, batch_size=4, max_steps=400), seed=0) == whole


@pytest.mark.parametrize("step_tokens", [1, 10, 25, 10_000])
def test_step_tokens(step_tokens):
    """Examples are taken until a step has that many tokens."""
    steps = plan(EXAMPLES, OptimConfig(epochs=2, step_tokens=step_tokens), seed=0)
    assert Counter(seen(steps)) == dict.fromkeys(range(11), 2)
    for step in steps:
        lengths = [len(EXAMPLES[index].ids) for index in step.examples]
        assert sum(lengths[:-1]) < step_tokens
        assert sum(lengths) >= step_tokens or step.epoch in (1, 2)


def test_the_plan_is_a_function_of_the_seed():
    config = OptimConfig(epochs=2, batch_size=2)
    assert plan(EXAMPLES, config, seed=1) == plan(EXAMPLES, config, seed=1)
    assert seen(plan(EXAMPLES, config, seed=1)) != seen(plan(EXAMPLES, config, seed=2))


# --- packs ---


def test_pack_by_hand():
    """Two examples of 3 and 2 tokens; the longer one comes first."""
    short = Example("short", [7, 8], [True, True])
    long = Example("long", [4, 5, 6], [True, False, True])
    (pack,) = pack_examples([0, 1], [short, long], budget=5)
    assert (pack.names, pack.lengths) == (("long", "short"), (3, 2))
    assert pack.indices.tolist() == [1, 1, 1, 0, 0]
    assert pack.ids.tolist() == [4, 5, 6, 7, 8]
    assert pack.positions.tolist() == [0, 1, 2, 0, 1]
    assert pack.targets.tolist() == [5, 6, 0, 8, 0]
    assert pack.scored.tolist() == [True, True, False, True, False]
    assert pack.supervised.tolist() == [False, True, False, True, False]
    assert pack.supervised_tokens == long.supervised + short.supervised == 2
    assert pack.indices.dtype == torch.int32
    assert {pack.ids.dtype, pack.positions.dtype, pack.targets.dtype} == {torch.int64}


@pytest.mark.parametrize("budget", [1, 8, 9, 13, 20, 65, 1000])
def test_packs(budget):
    """Every example once and whole, within the budget or alone; no two packs fit into one."""
    chosen = [10, 2, 3, 5, 7, 8, 1, 0]
    packs = pack_examples(chosen, EXAMPLES, budget)
    found = []
    for pack in packs:
        assert len(pack.ids) <= budget or len(pack.lengths) == 1
        for ids, indices in zip(pack.ids.split(pack.lengths), pack.indices.split(pack.lengths), strict=True):
            (index,) = set(indices.tolist())
            assert ids.tolist() == EXAMPLES[index].ids
            found.append(index)
    assert sorted(found) == sorted(chosen)
    assert sum(pack.supervised_tokens for pack in packs) == sum(EXAMPLES[index].supervised for index in chosen)
    sizes = sorted(len(pack.ids) for pack in packs)
    assert len(sizes) == 1 or sizes[0] + sizes[1] > budget


def test_ids_beyond_the_embedding():
    """The first example that has one is named; ids up to the last row of the embedding are fine."""
    examples = [Example("fine", [1, 9], [True, True]), Example("beyond", [3, 10], [True, True])]
    check_ids(examples, 11)
    (problem,) = problems(check_ids, examples, 10)
    assert problem.startswith("id 10, and the model has 10 embeddings (beyond)")
