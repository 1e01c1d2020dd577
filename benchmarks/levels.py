"""What training on each level's words does to a model: a table of the levels.

    python benchmarks/levels.py --model smollm2-135m
                          all five levels by their presets, under runs/levels/
    python benchmarks/levels.py --levels a1 --epochs 1
                          other flags go to train.py

For each level: train, evaluate base and tuned on held-out words, and train a *control* the same way on the same words
with each other's sentences. The control learns the format, the length and the style; what the tuned model does better
than the control on held-out sentences is what it learnt of words. A run that is finished already is taken as it is, and
one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as evaluation
import train
from lora.bootstrap import Tally, difference
from lora.errors import UserError
from lora.files import read_json
from lora.levels import AT_LEVEL, COLUMNS, DATA, LEVELS, Words, read_words, split_words
from lora.run import CONFIG, FINISHED, ending


def shuffled(words: Words) -> Words:
    """Every train word with the sentences of another one; held-out words keep their own."""
    train_words, _ = split_words(list(words))
    order = np.random.default_rng(0).permutation(len(train_words))
    # One step around a random circle: no word keeps its own.
    others = {train_words[a]: train_words[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
    return {word: words[others.get(word, word)] for word in words}


def write_control(level: str, path: Path) -> None:
    """The level's words with each other's sentences, as a table of words. Their parts of speech are left out."""
    rows = [COLUMNS, *([word, "", s] for word, own in shuffled(read_words(DATA / f"{level}.tsv")).items() for s in own)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map("\t".join, rows)) + "\n", encoding="utf-8")


def trained(run: Path, flags: list[str]) -> None:
    """Brings the run in this folder to its end."""
    if (run / CONFIG).is_file():
        flags = ["--resume"]
    if ending(run) not in FINISHED and train.main(["--run-dir", str(run), *flags]):
        sys.exit(f"{run} did not end well")


def column(run: Path, control: Path) -> dict[str, str]:
    """A level's column of the table: base -> tuned, the difference's 95 % interval in brackets.

    The control's cell has its loss on sentences, and the interval of tuned - control.
    """
    mine, others = (read_json(folder / "eval.json") for folder in (run, control))
    metrics, card = mine["metrics"], read_json(run / "run_card.json")
    cells = {}
    for kind in ("response", "full text", "sentences"):
        base, tuned, _, low, high, _ = metrics[f"loss, {kind}"].values()
        cells[f"loss, {kind}"] = f"{base:.3f} -> {tuned:.3f} [{low:+.3f}, {high:+.3f}]"
        cells[f"perplexity, {kind}"] = f"{math.exp(base):.1f} -> {math.exp(tuned):.1f}"
    by_word = [
        Tally({word: (total, count) for word, total, count in side["tallies"]["loss, sentences"]})
        for side in (others, mine)
    ]
    low, high = difference(*by_word)
    cells["control's loss, sentences"] = f"{by_word[0].mean:.3f} [{low:+.3f}, {high:+.3f}]"
    for name in ("valid lists", "words used", AT_LEVEL):
        base, tuned, _, low, high, _ = metrics[name].values()
        base, tuned = ("-" if side is None else f"{100 * side:.0f}" for side in (base, tuned))
        # Without an interval, a side wrote no sentence at all.
        interval = "" if low is None else f" [{100 * low:+.0f}, {100 * high:+.0f}]"
        cells[name] = f"{base} -> {tuned} %{interval}"
    cells["steps (best)"] = f"{card['steps']} ({card['best_step']})"
    cells["seconds in steps"] = f"{card['seconds_in_steps']:.0f}"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=[*LEVELS])
    parser.add_argument("--folder", type=Path, default=Path("runs/levels"))
    arguments, flags = parser.parse_known_args()
    columns = {}
    for level in arguments.levels:
        run, control = arguments.folder / level, arguments.folder / f"{level}-control"
        table = arguments.folder / f"{level}-control.tsv"
        if not table.is_file():
            write_control(level, table)
        trained(run, ["--level", level, *flags])
        trained(control, ["--level", level, "--words", str(table), *flags])
        for folder, generations in ((run, "3"), (control, "0")):
            if not (folder / "eval.json").is_file():
                evaluation.main(["--run", str(folder), "--generations", generations])
        columns[level] = column(run, control)
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(cells[name] for cells in columns.values()) + " |")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
