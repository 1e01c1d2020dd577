"""Folds a run's adapter into its base and writes a model folder that stands alone, in Hugging Face's layout.

python merge.py                                the best adapter of the newest finished run
python merge.py --run runs/a1 --checkpoint last --out my-model

The folder appears only once it has been read back and says, token by token, what base and adapter say together.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lora.build import build_model, choose_device, choose_dtype, choose_micro_batch_tokens, is_quantised, load_into
from lora.config import MergeConfig, parse
from lora.data import held_out, pack_examples
from lora.errors import UserError, exit_code
from lora.export import MAX_KL, MIN_TOP1, Agreement, agreement, hidden_states, write_model
from lora.files import new_folder
from lora.hub import fetch
from lora.run import adapter_folder, find_run, read_run
from lora.tokenizer import Tokenizer


class Disagreement(Exception):
    """The merged model is not the model that was trained."""


def main(argv: list[str]) -> int:
    config = parse(MergeConfig, argv, __doc__)
    run = find_run(config.run, finished=True)
    trained, resolved = read_run(run)
    adapter_from = adapter_folder(run, config.checkpoint)
    out = config.out or Path("merged") / run.name
    if out.exists():
        raise UserError("something is there already", f"--out {out}", "delete it or give another folder")
    device = choose_device(config.device)
    folder = fetch(config.model or resolved.model)
    tokenizer = Tokenizer.load(folder, trained.data.template_date)
    _, examples, _ = held_out(trained.data, tokenizer, trained.run.seed, resolved.held_out_hash)
    examples = examples[: config.max_examples]
    if is_quantised(folder):
        print(f"the base is 4-bit already: it is dequantised to {config.dtype} first ({folder})")

    def load(source: Path):
        # Weights in 16 bits, arithmetic in fp32: what is compared is the weights, not the rounding of the arithmetic.
        return build_model(source, "none", torch.float32, device, kept=choose_dtype(config.dtype, device))

    model = load(folder)
    adapter = load_into(model, adapter_from)
    budget = choose_micro_batch_tokens(model, adapter.config)
    packs = pack_examples(range(len(examples)), examples, budget)
    unmerged = hidden_states(model, packs)
    adapter.fold(model)
    try:
        with new_folder(out) as aside:
            write_model(model, folder, tokenizer.files, aside)
            del model, adapter
            merged = load(aside)
            result = agreement(unmerged, hidden_states(merged, packs), merged.head)
            print(describe(result, len(examples)))
            if not result.good:
                raise Disagreement
    except Disagreement:
        limits = f"{MAX_KL:g} nats and {100 * MIN_TOP1:g} %"
        print(f"error: the merged model is not the tuned one (limits {limits}); nothing was written", file=sys.stderr)
        return 1
    print(f"{config.checkpoint} adapter of {run} merged into {resolved.model}, {config.dtype}: {out}")
    return 0


def describe(result: Agreement, examples: int) -> str:
    return (
        f"merged against base + adapter, {result.tokens:,} distinct tokens of {examples} held-out examples: "
        f"mean KL {result.kl:.2e} nats, same first choice on {100 * result.top1:.2f} %"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
