"""Base against tuned, on the same held-out tokens: losses, perplexities, and a few answers side by side.

python eval.py                                 the newest finished run, on its held-out examples
python eval.py --run runs/a1 --data chat.jsonl

Base means the weights as they were quantised for training, with the adapter off, so the difference is what training
did.
"""

from __future__ import annotations

import sys

from lora.build import build_model, choose_device, choose_dtype, choose_micro_batch_tokens, load_into
from lora.checkpoint import stop_ids
from lora.config import EvalConfig, parse
from lora.data import check_ids, encode, held_out, pack_examples, read_jsonl
from lora.errors import UserError, exit_code
from lora.evaluate import Losses, evaluate
from lora.files import write_json
from lora.generate import generate
from lora.hub import fetch
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
    budget = choose_micro_batch_tokens(model, adapter.config, recompute=False)
    packs = pack_examples(range(len(examples)), examples, budget)
    evaluated = {example.name for example in examples}
    answered = [c for c in conversations if c.name in evaluated and before_answer(c.messages)]
    shown = answered[: config.generations]
    prompts = [tokenizer.prompt(before_answer(c.messages), c.name) for c in shown]

    stops = stop_ids(folder)

    def measure() -> tuple[Losses, list[dict[str, str | bool]]]:
        losses = evaluate(model, packs)
        options = (config.max_new_tokens, config.temperature, config.top_p, config.seed)
        answers = generate(model, prompts, stops, *options) if prompts else []
        return losses, [{"text": tokenizer.decode(answer.ids), "stopped": answer.stopped} for answer in answers]

    tuned, tuned_answers = measure()
    with adapter.off(model):
        base, base_answers = measure()

    answers = [
        {"name": c.name, "prompt": before_answer(c.messages), "base": before, "tuned": after}
        for c, before, after in zip(shown, base_answers, tuned_answers, strict=True)
    ]
    for answer in answers:
        print(f"\n--- {answer['name']}\n{answer['prompt'][-1]['content']}")
        for side in ("base", "tuned"):
            cut_off = "" if answer[side]["stopped"] else f", cut off after {config.max_new_tokens} tokens"
            print(f"\n[{side}{cut_off}]\n{answer[side]['text']}")
    left_out = f"{overlong.dropped} too long left out, {overlong.truncated} truncated"
    print(f"\n{run}, {config.checkpoint} adapter, {len(examples)} examples ({left_out})")
    print_table(
        {
            "": f"{'base':>12}{'tuned':>12}{'change':>12}",
            "loss, response": row(base.response, tuned.response),
            "perplexity, response": row(base.perplexity, tuned.perplexity),
            "loss, full text": row(base.full, tuned.full),
            "perplexity, full text": row(base.perplexity_full, tuned.perplexity_full),
        }
    )
    result = {
        "run": str(run),
        "checkpoint": config.checkpoint,
        "data": str(config.data) if config.data else "held out",
        "examples": len(examples),
        "base": as_dict(base),
        "tuned": as_dict(tuned),
        "temperature": config.temperature,
        "generations": answers,
    }
    write_json(run / "eval.json", result)
    return 0


def before_answer(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns before the last answer; none, if there is no answer."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    return messages[:last]


def row(base: float, tuned: float) -> str:
    """Two numbers and the change between them, aligned."""
    return f"{base:12,.4f}{tuned:12,.4f}{100 * (tuned / base - 1):+10.1f} %"


def as_dict(losses: Losses) -> dict[str, float]:
    """Losses with their perplexities, for eval.json."""
    return {**vars(losses), "perplexity": losses.perplexity, "perplexity_full": losses.perplexity_full}


if __name__ == "__main__":
    sys.exit(exit_code(main))
