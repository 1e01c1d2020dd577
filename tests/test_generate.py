"""Answers of a small random model: the cache against recomputing everything, draws against the softmax."""

import math

import pytest
import torch

from lora import generate as generating
from lora.adapter import Adapter
from lora.config import LoraConfig
from lora.generate import Answer, generate, sample, uniform
from lora.model import Llama, LlamaConfig, packed
from lora.quant import NF4Linear

VOCABULARY = 97
# Ragged, two of one length, one of a single token.
PROMPTS = [[5, 17, 3], [8], [41, 2, 96, 33, 7, 7, 12], [60, 61, 62], [1, 2, 3, 4, 5]]


def random_llama(kind: str) -> Llama:
    """Three blocks with grouped heads (6 queries, 2 keys), weights large enough that answers wander."""
    config = LlamaConfig(VOCABULARY, 96, 128, 3, 6, 2, 16, 1e-5, 1e4, None, tied=kind != "untied")
    generator = torch.Generator().manual_seed(0)
    model = Llama(config)
    for name, parameter in model.named_parameters():
        parameter.normal_(1 if "norm" in name else 0, 0.2, generator=generator)
    if kind == "nf4":
        for block in model.model.layers:
            for part in (block.self_attn, block.mlp):
                for name, linear in list(part.named_children()):
                    setattr(part, name, NF4Linear.quantise(linear.weight))
    if kind == "adapter":
        adapter = Adapter(model, LoraConfig(rank=4, alpha=8), seed=0)
        adapter.flat.normal_(0, 0.2, generator=generator)
        adapter.wrap(model)
    return model


@pytest.fixture(params=["plain", "nf4", "adapter", "untied"])
def llama(request) -> Llama:
    return random_llama(request.param)


def logits_without_cache(model: Llama, ids: list[int]) -> torch.Tensor:
    """What comes after `ids`, from the whole row at once: fp32 [vocabulary]."""
    with torch.no_grad():
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), packed([len(ids)]))
        return hidden[-1].float() @ model.head.t()


def test_the_cache_changes_nothing(llama):
    answers = generate(llama, PROMPTS, [], 20)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = list(prompt)
        for token in answer.ids:
            assert token == logits_without_cache(llama, ids).argmax()
            ids.append(token)
    assert len({tuple(answer.ids) for answer in answers}) == len(PROMPTS)
    assert all(len(set(answer.ids)) > 5 for answer in answers), "an answer that repeats itself tests little"


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}], ids=str)
def test_an_answer_depends_neither_on_the_batch_nor_on_neighbours(llama, how):
    stop = list(range(8))  # often met, so sequences leave the batch at different times
    answers = generate(llama, PROMPTS, stop, 20, **how)
    assert answers == generate(llama, PROMPTS, stop, 20, batch_size=1, **how)
    assert answers == generate(llama, PROMPTS, stop, 20, batch_size=2, **how)
    # The third prompt among others of other lengths.
    others = [[9, 9], [10] * 12, PROMPTS[2], [11]]
    assert answers[2] == generate(llama, others, stop, 20, **how)[2]


def test_a_stop_id_ends_an_answer_and_is_not_part_of_it(llama):
    free = generate(llama, PROMPTS, [], 20)
    stop = [free[0].ids[4], free[2].ids[9]]
    for whole, answer in zip(free, generate(llama, PROMPTS, stop, 20), strict=True):
        end = next((i for i, token in enumerate(whole.ids) if token in stop), None)
        assert answer == Answer(whole.ids[:end], end is not None)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_max_new_tokens_counts_the_stop_id(llama, n):
    long = generate(llama, PROMPTS, [], 9)
    answers = generate(llama, PROMPTS, [], n)
    assert answers == [Answer(answer.ids[:n], False) for answer in long]
    # Stopped by the last token allowed.
    stop = long[1].ids[n - 1]
    ended = long[1].ids.index(stop)
    assert generate(llama, PROMPTS[1:2], [stop], n) == [Answer(long[1].ids[:ended], True)]


def test_a_tiny_top_p_is_greedy(llama):
    greedy = generate(llama, PROMPTS, [3], 20)
    assert greedy == generate(llama, PROMPTS, [3], 20, temperature=1.0, top_p=1e-6, seed=7)
    assert greedy != generate(llama, PROMPTS, [3], 20, temperature=1.0, seed=7)


def test_seeds_and_equal_prompts_give_different_answers(llama):
    first, second = generate(llama, [[5, 6]] * 2, [], 20, temperature=1.0)
    assert first != second
    assert [first, second] == generate(llama, [[5, 6]] * 2, [], 20, temperature=1.0)
    assert first != generate(llama, [[5, 6]], [], 20, temperature=1.0, seed=1)[0]


def test_first_tokens_follow_the_softmax(llama):
    n, temperature = 1000, 0.5
    expected = torch.softmax(logits_without_cache(llama, PROMPTS[0]) / temperature, dim=0)
    answers = generate(llama, [PROMPTS[0]] * n, [], 1, temperature=temperature, batch_size=250)
    counts = torch.bincount(torch.tensor([answer.ids[0] for answer in answers]), minlength=VOCABULARY)
    assert chi_square(counts, expected) < 4


def test_every_position_draws_anew():
    """At a temperature that makes all tokens alike, one long answer holds them all alike."""
    (answer,) = generate(random_llama("plain"), [[5]], [], 1000, temperature=1e6)
    counts = torch.bincount(torch.tensor(answer.ids), minlength=VOCABULARY)
    assert chi_square(counts, torch.full((VOCABULARY,), 1 / VOCABULARY)) < 4


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations from what p would give; classes expected under 5 times are one."""
    n = counts.sum()
    common = p * n >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([p[common], p[~common].sum()[None]]) * n
    freedom = int(common.sum())
    return float((((observed - expected) ** 2 / expected.clamp_min(1e-9)).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("top_p, kept", [(1.0, 5), (0.96, 5), (0.8, 3), (0.72, 3), (0.68, 2), (0.4, 1), (0.01, 1)])
def test_draws_follow_the_nucleus(top_p, kept):
    p = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])  # falling: 0.4, 0.3, 0.15, 0.1, 0.05
    n = 4000
    u = torch.tensor([uniform(3, prompt, 0) for prompt in range(n)], dtype=torch.float64)
    counts = torch.bincount(sample(p.log().repeat(n, 1), u, 1.0, top_p), minlength=5)
    nucleus = p.argsort(descending=True)[:kept]
    assert set(counts.nonzero()[:, 0].tolist()) == set(nucleus.tolist())
    expected = torch.zeros(5).index_copy(0, nucleus, p[nucleus])
    if kept > 1:
        assert chi_square(counts, expected / expected.sum()) < 4


def test_the_ends_of_the_staircase_are_tokens_that_may_be_drawn():
    logits = torch.tensor([[-1e9, 0.3, 0.1, -1e9]]).repeat(2, 1)
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, u, 1.0, 1.0).tolist() == [1, 2]
    assert sample(logits, u, 1.0, 0.9).tolist() == [1, 2]


def test_temperature_flattens():
    logits = torch.tensor([0.0, 2.0]).repeat(2000, 1)
    u = torch.tensor([uniform(0, 0, position) for position in range(2000)], dtype=torch.float64)
    for temperature in (0.5, 1.0, 2.0):
        share = sample(logits, u, temperature, 1.0).float().mean()
        assert share == pytest.approx(1 / (1 + math.exp(-2 / temperature)), abs=0.03)


def test_on_token_hears_every_answer(llama):
    heard = {prompt: [] for prompt in range(len(PROMPTS))}
    answers = generate(
        llama, PROMPTS, [3], 12, batch_size=2, on_token=lambda prompt, token: heard[prompt].append(token)
    )
    assert list(heard.values()) == [answer.ids for answer in answers]


def test_places_beyond_a_sequence_are_never_read(llama, monkeypatch):
    """Whatever lies behind the end of a shorter sequence: large numbers there change nothing."""
    expected = generate(llama, PROMPTS, [], 12)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, **kw: zeros(*shape, **kw) + 1e4)
    assert generate(llama, PROMPTS, [], 12) == expected


def test_a_16_bit_model_may_keep_32_bit_weights():
    """The head is converted, and tokens are the most probable ones up to the rounding of bf16."""
    model = random_llama("plain")
    model.dtype = torch.bfloat16
    for prompt, answer in zip(PROMPTS, generate(model, PROMPTS, [], 8), strict=True):
        ids = list(prompt)
        for token in answer.ids:
            logits = logits_without_cache(model, ids)
            assert logits.max() - logits[token] < 0.02 * logits.abs().max()
            ids.append(token)


WRONG = [{"prompts": []}, {"prompts": [[1], []]}, {"max_new_tokens": 0}, {"batch_size": 0}]
WRONG += [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_calls_are_refused(llama, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate(**{"model": llama, "prompts": PROMPTS, "stop": [], "max_new_tokens": 4, **wrong})


@pytest.mark.parametrize(
    ("free", "size"), [(None, 64), (2**40, 64), (0, 1), (2 * 10 * 2 * 3 * 2 * 16 * 100 * 4, 10)], ids=str
)
def test_batch_size_from_memory(llama, monkeypatch, free, size):
    """A sequence's cache: keys and values in 3 layers, 2 key heads of 16, 100 tokens, fp32."""
    monkeypatch.setattr(generating, "free_bytes", lambda device: free)
    assert generating.choose_batch_size(llama, 100) == size
