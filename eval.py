"""Base against tuned, on the same held-out examples: losses, perplexities, and what their answers are worth.

python eval.py                                 the newest finished run, on its held-out examples
python eval.py --run runs/a1 --data chat.jsonl

Base means the weights as they were quantised for training, with the adapter off, so the difference is what training
did. Every difference has its 95 % interval (bootstrap.py). Where the examples are lists of words, all of them are
answered, and the answers judged (levels.py); otherwise a few are answered for show.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from torch import Tensor
from tqdm import tqdm

from lora.bootstrap import Tally, difference
from lora.build import build_model, choose_device, choose_dtype, choose_micro_batch_tokens, load_into
from lora.checkpoint import stop_ids
from lora.config import EvalConfig, parse
from lora.data import Conversation, Example, check_ids, encode, held_out, pack_examples, read_jsonl, words_of
from lora.errors import UserError, exit_code
from lora.evaluate import token_losses
from lora.files import write_json
from lora.generate import generate
from lora.hub import fetch
from lora.levels import AT_LEVEL, LENGTH, judge
from lora.log import print_table
from lora.run import adapter_folder, find_run, read_run
from lora.tokenizer import Tokenizer


def main(argv: list[str]) -> int:
    config = parse(EvalConfig, argv, __doc__)
    run = find_run(config.run, finished=True)
    trained, resolved = read_run(run)
    adapter_from = adapter_folder(run, config.checkpoint)
    device = choose_device(config.device)
    folder = fetch(config.model or resolved.model)
    tokenizer = Tokenizer.load(folder, trained.data.template_date)
    if config.data is None:
        held = held_out(trained.data, tokenizer, trained.run.seed, resolved.held_out_hash)
        conversations, examples, overlong = held
    else:
        conversations = read_jsonl(config.data)
        examples, overlong = encode(conversations, tokenizer, trained.data)
    examples = examples[: config.max_examples]
    if not examples:
        raise UserError("every example is longer than the run's --max-length", str(run), "give shorter ones to --data")

    model = build_model(folder, trained.base.quant, choose_dtype(trained.base.dtype, device), device)
    check_ids(examples, model.config.vocab_size)
    adapter = load_into(model, adapter_from)
    budget = choose_micro_batch_tokens(model, adapter.config)
    packs = pack_examples(range(len(examples)), examples, budget)
    by_name = {c.name: c for c in conversations}
    evaluated = [by_name[example.name] for example in examples]
    lists = [c for c in evaluated if c.pairs]
    answered = [c for c in evaluated if before_answer(c.messages)]
    answered = answered if lists and config.generations else answered[: config.generations]
    prompts = [tokenizer.prompt(before_answer(c.messages), c.name) for c in answered]
    longest = config.max_new_tokens or (2 * max(e.supervised for e in examples) if lists else 256)
    stops = stop_ids(folder)
    where = config.data or "its held-out examples"
    print(f"{run}, {config.checkpoint} adapter, on {where}: {len(examples)} examples", flush=True)
    options = (longest, config.temperature, config.top_p, config.seed)
    asked, data = [c.pairs for c in lists], trained.data
    learnt = words_of(data)[0] if lists else {}

    def measure(side: str) -> tuple[dict[str, Tally], list[dict[str, str | bool]]]:
        tallies = tally_losses(token_losses(model, packs), examples, lists, tokenizer)
        if not prompts:
            return tallies, []
        with tqdm(desc=f"{len(prompts)} answers, {side}", unit=" tokens", disable=not sys.stderr.isatty()) as bar:
            made = generate(model, prompts, stops, *options, on_token=lambda prompt, token: bar.update())
        texts, stopped = [tokenizer.decode(answer.ids) for answer in made], [answer.stopped for answer in made]
        if lists:
            tallies |= judge(asked, texts, stopped, data.language, data.level, learnt)
        return tallies, [{"text": text, "stopped": ended} for text, ended in zip(texts, stopped, strict=True)]

    tuned, tuned_answers = measure("tuned")
    with adapter.off(model):
        base, base_answers = measure("base")

    answers = [
        {"name": c.name, "prompt": before_answer(c.messages), "base": before, "tuned": after}
        for c, before, after in zip(answered, base_answers, tuned_answers, strict=True)
    ]
    for answer in answers[: config.generations]:
        print(f"\n--- {answer['name']}\n{answer['prompt'][-1]['content']}")
        for side in ("base", "tuned"):
            cut_off = "" if answer[side]["stopped"] else f", cut off after {longest} tokens"
            print(f"\n[{side}{cut_off}]\n{shown(**answer[side])}")
    print(f"\n{overlong.dropped} examples too long and left out, {overlong.truncated} truncated")
    metrics = {name: compare(base[name], tuned[name]) for name in tuned}
    head = f"{'base':>10}{'tuned':>10}{'change':>10}   {'95 % interval':<20} of"
    print_table({"": head} | {name: row(name, metric) for name, metric in metrics.items()})
    if lists and answers and AT_LEVEL not in metrics:
        print(f"  {AT_LEVEL}: left out, it is known for the words of an English level only")
    result = {
        "run": str(run),
        "checkpoint": config.checkpoint,
        "data": str(config.data) if config.data else "held out",
        "examples": len(examples),
        "metrics": metrics,
        "tallies": {name: [[unit, *counted] for unit, counted in tally.items()] for name, tally in tuned.items()},
        "temperature": config.temperature,
        "generations": answers,
    }
    write_json(run / "eval.json", result)
    return 0


def before_answer(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns before the last answer; none, if there is no answer."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    return messages[:last]


SHOWN = 12  # lines of an answer that did not end


def shown(text: str, stopped: bool) -> str:
    """An answer for the terminal: of one that did not end, and often repeats itself line by line, the beginning."""
    lines = text.splitlines()
    if stopped or len(lines) <= SHOWN:
        return text
    return "\n".join([*lines[:SHOWN], f"... and {len(lines) - SHOWN} more lines, in eval.json"])


LOSS = "loss, "


def tally_losses(
    losses: dict[str, Tensor], examples: Sequence[Example], lists: Sequence[Conversation], tokenizer: Tokenizer
) -> dict[str, Tally]:
    """Mean losses in nats: on what is learnt and on the full text, by example; on the sentences of lists, by word.

    losses: of every token, by the name of its example (evaluate.token_losses).
    """
    response, full, sentences = Tally(), Tally(), Tally()
    for example in examples:
        own = losses[example.name]
        if not own[1:].isfinite().all():
            raise UserError("its loss is not a number", example.name, "evaluate an earlier --checkpoint")
        learnt = [place for place, is_learnt in enumerate(example.mask) if is_learnt and place > 0]
        response.add(example.name, own[learnt].sum().item(), len(learnt))
        full.add(example.name, own[1:].sum().item(), len(own) - 1)
    for c in lists:
        places = tokenizer.pieces(c.messages, [pair.sentence for pair in c.pairs], c.name)
        for pair, sentence in zip(c.pairs, places, strict=True):
            inside = [place for place in sentence if place < len(losses[c.name])]  # a truncated list has fewer
            sentences.add(pair.word, losses[c.name][inside].sum().item(), len(inside))
    return {f"{LOSS}response": response, f"{LOSS}full text": full} | ({f"{LOSS}sentences": sentences} if lists else {})


def compare(base: Tally, tuned: Tally) -> dict[str, float | None]:
    """A metric of both sides and the interval of the difference, for eval.json; None is what cannot be known.

    units: how many answers, or words, the means are over.
    """
    low, high = difference(base, tuned)
    values = {"base": base.mean, "tuned": tuned.mean, "change": tuned.mean - base.mean, "low": low, "high": high}
    known = {name: None if math.isnan(value) else value for name, value in values.items()}
    return known | {"units": len(base.keys() | tuned.keys())}


def row(name: str, metric: dict[str, float | None]) -> str:
    """A metric as a line of the table; a loss with its perplexities."""
    *values, units = metric.values()
    kind = ".4f" if name.startswith(LOSS) else ".1f" if name == LENGTH else ".1%"
    formats = (kind, kind, f"+{kind}", f"+{kind}", f"+{kind}")
    base, tuned, change, low, high = (
        "-" if value is None else f"{value:{form}}" for value, form in zip(values, formats, strict=True)
    )
    interval = "unknown" if metric["low"] is None else f"{low} to {high}"
    line = f"{base:>10}{tuned:>10}{change:>10}   {interval:<20} {units:>4}"
    if not name.startswith(LOSS) or metric["base"] is None:
        return line
    return line + f"   perplexity {perplexity(metric['base']):.2f} -> {perplexity(metric['tuned']):.2f}"


def perplexity(loss: float) -> float:
    """exp(loss), or infinity where that is too large a number."""
    return math.exp(loss) if loss < 700 else math.inf


if __name__ == "__main__":
    sys.exit(exit_code(main))
