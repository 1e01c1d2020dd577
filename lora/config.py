"""Every setting of a run: one dataclass tree, the presets, and the way from a command line to a checked config.

A field is a flag: `lora_rank` is `--lora-rank` on the command line and `lora_rank` in a TOML file. What a field means,
its default and its limits stand in one place, its line below. A value comes from the default, the preset, the
`--config` file and the flags, each stronger than the one before. Every problem is found before anything starts, and all
are told at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from lora.errors import UserError
from lora.levels import LANGUAGES, LEVELS

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

T = TypeVar("T")


def flag(default: Any, text: str, name: str = "", low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field that is a flag: default, help text, name if not the field's, inclusive limits."""
    return field(default=default, metadata={"help": text, "name": name, "low": low, "high": high})


@dataclass(frozen=True)
class LoraConfig:
    rank: int = flag(16, "rank of the update: A is [rank, in], B is [out, rank]", "lora_rank", low=1)
    alpha: float = flag(32, "the update is scaled by alpha / rank", "lora_alpha", low=1e-6)
    dropout: float = flag(0.0, "dropout on the input of A", "lora_dropout", low=0, high=0.9)
    rslora: bool = flag(False, "scale by alpha / sqrt(rank) instead")
    target_modules: tuple[str, ...] = flag(LINEARS, "the linears that learn, separated by commas")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class BaseConfig:
    model: str | None = flag(
        None,
        "a folder in Hugging Face layout, a hub id, or smollm2-135m "
        "(default: unsloth/Llama-3.2-1B-Instruct with a CUDA GPU, smollm2-135m without)",
    )
    quant: Literal["nf4", "none"] = flag("nf4", "how the frozen weights are kept")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = flag(
        "auto", "what is computed in; auto: bf16 where the hardware has it, fp16 on older GPUs, fp32 elsewhere"
    )
    device: str = flag("auto", "cpu, cuda or cuda:N; auto: cuda where there is one")


@dataclass(frozen=True)
class DataConfig:
    level: str | None = flag(
        None,
        f"train on this project's word lists for a CEFR level, by its preset: {', '.join(LEVELS)}; all: each in turn",
    )
    words: Path | None = flag(
        None, "make lists of your own words: a TSV with the columns word, pos, sentence; --level says of which level"
    )
    language: str = flag("en", f"of --words: {', '.join(LANGUAGES)}, or any other with --prompt")
    prompt: str | None = flag(None, "how a list is asked for (default: several ways, in the language of the words)")
    list_size: int = flag(10, "words in a list", low=1)
    train_lists: int = flag(160, "lists in an epoch; each epoch draws new ones", low=1)
    eval_lists: int = flag(18, "lists of held-out words", low=1)
    data: Path | None = flag(None, 'train on a JSONL file, a line an example: {"messages": [{"role", "content"}, ...]}')
    eval_data: Path | None = flag(
        None, "evaluate on this JSONL file (default: lists of held-out words, or 5 % of --data by a hash of the prompt)"
    )
    loss_on: Literal["response", "last", "full"] = flag(
        "response", "which tokens are learnt: every assistant turn, the last one only, or all tokens"
    )
    max_length: int = flag(2048, "longest example, in tokens", low=2)
    overlong: Literal["drop", "truncate", "error"] = flag("drop", "what happens to longer examples")
    template_date: str = flag("26 Jul 2024", "the date that Llama 3's chat template writes into the system turn")


@dataclass(frozen=True)
class OptimConfig:
    epochs: float = flag(3, "passes over the training examples", low=1e-6)
    max_steps: int | None = flag(None, "at most this many steps, if --epochs comes to more", low=1)
    batch_size: int = flag(16, "examples a step = batch_size x grad_accum; only the product matters", low=1)
    grad_accum: int = flag(1, "see --batch-size; how a step is cut up is --micro-batch-tokens", low=1)
    step_tokens: int | None = flag(
        None, "instead of a number of examples: take examples until a step has N tokens", low=1
    )
    micro_batch_tokens: int | None = flag(
        None,
        "tokens in one forward and backward pass: memory and speed, not the result (default: from free memory)",
        low=1,
    )
    recompute: Literal["none", "mlp", "block"] = flag(
        "none", "what to run again in backward instead of keeping what it made: the MLPs, or whole blocks"
    )
    graphs: bool = flag(True, "on a GPU, replay packs as CUDA graphs; --no-graphs: op by op, slower")
    learning_rate: float = flag(2e-4, "peak learning rate", low=0)
    schedule: Literal["cosine", "linear", "constant"] = flag("cosine", "the learning rate after warmup")
    warmup_ratio: float = flag(0.1, "part of all steps in which the learning rate rises", low=0, high=1)
    warmup_steps: int | None = flag(None, "the same as a number of steps; overrides --warmup-ratio", low=0)
    optimizer: Literal["auto", "adamw8bit", "adamw"] = flag(
        "auto",
        "8-bit (bitsandbytes) or 32-bit AdamW state; auto: adamw8bit on a GPU, adamw on a CPU, where it is faster",
    )
    weight_decay: float = flag(0.01, "decoupled weight decay", low=0)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this global norm", low=1e-12)


@dataclass(frozen=True)
class RunConfig:
    recipe: str | None = flag(None, "settings of a run that was reported elsewhere, by name: c1-reference")
    run_dir: Path | None = flag(None, "where the run is written (default: runs/<recipe, level or file>)")
    resume: bool = flag(False, "continue --run-dir, or the newest unfinished run")
    eval_every: int | None = flag(
        None, "steps between evaluations (default: 50 or an epoch, whichever is shorter)", low=1
    )
    save_every: int | None = flag(None, "steps between checkpoints (default: with every evaluation)", low=1)
    keep: int = flag(2, "how many of the latest checkpoints stay, beside the best one", low=1)
    patience: int | None = flag(None, "stop after this many evaluations in a row without a better loss", low=1)
    seed: int = flag(0, "of the first A, the order of the examples, dropout and the word lists", low=0, high=2**31 - 1)
    deterministic: bool = flag(False, "bit-for-bit repeatable on a GPU too; older GPUs take a fifth longer")


@dataclass(frozen=True)
class Config:
    base: BaseConfig
    data: DataConfig
    lora: LoraConfig
    optim: OptimConfig
    run: RunConfig


@dataclass(frozen=True)
class EvalConfig:
    run: Path | None = flag(None, "the run to evaluate (default: the newest finished one)")
    checkpoint: str = flag("best", "which of its adapters: best, last or a step")
    model: str | None = flag(None, "where the base is, if it has moved since")
    data: Path | None = flag(None, "a JSONL file to evaluate on instead of the run's held-out examples")
    max_examples: int | None = flag(None, "evaluate on the first N examples only", low=1)
    generations: int = flag(
        3,
        "how many answers to show (lists are all answered, and judged); 0: none are made, and losses measured alone",
        low=0,
    )
    max_new_tokens: int | None = flag(
        None, "longest answer, in tokens (default: 256; for lists, twice the longest held-out answer)", low=1
    )
    temperature: float = flag(0.0, "0 takes the likeliest token every time", low=0)
    top_p: float = flag(1.0, "draw from the likeliest tokens that together reach this probability", low=1e-6, high=1)
    device: str = flag("auto", "cpu, cuda or cuda:N; auto: cuda where there is one")
    seed: int = flag(0, "of the draws", low=0, high=2**31 - 1)


@dataclass(frozen=True)
class MergeConfig:
    run: Path | None = flag(None, "the run to merge (default: the newest finished one)")
    checkpoint: str = flag("best", "which of its adapters: best, last or a step")
    model: str | None = flag(None, "where the base is, if it has moved since")
    out: Path | None = flag(None, "the folder to write (default: merged/<run>)")
    dtype: Literal["bf16", "fp16"] = flag("bf16", "of the merged weights")
    max_examples: int = flag(64, "compare on this many held-out examples", low=1)
    device: str = flag("auto", "cpu, cuda or cuda:N; auto: cuda where there is one")


# The defaults above are for --data; these are for lists of words, by --level, or "words" without one. They say
# everything that they were measured with.
_LISTS = {
    "lora_rank": 128, "lora_alpha": 256, "batch_size": 16, "grad_accum": 4, "learning_rate": 2e-4, "schedule": "cosine",
    "warmup_ratio": 0.1, "epochs": 10, "weight_decay": 0.01, "max_grad_norm": 1.0, "max_length": 512,
}  # fmt: skip
# Measured with SmolLM2 on held-out words (benchmarks/RESULTS.md): on every level 8 epochs of 120 lists, 16 to a step,
# are the best or as good as the best. 960 lists show every sentence of a level some six times, each time in new
# company.
_LEVEL = {**_LISTS, "epochs": 8, "grad_accum": 1, "train_lists": 120}
PRESETS = {"words": _LEVEL, "a1": _LEVEL} | {level: {**_LEVEL, "eval_lists": 60} for level in ("a2", "b1", "b2", "c1")}
# Settings of runs that others have reported, to compare with; a recipe says what it trains on, too.
RECIPES = {"c1-reference": {**_LISTS, "level": "c1", "train_lists": 1800, "eval_lists": 200}}


# --- from dataclass to command line -----------------------------------------------------------------------------------


def flags_of(tree: type) -> dict[str, dataclasses.Field]:
    """Every flag of a dataclass tree by its name, with its type resolved, in order of appearance."""
    found = {}
    hints = typing.get_type_hints(tree)
    for f in fields(tree):
        if dataclasses.is_dataclass(hints[f.name]):
            found |= flags_of(hints[f.name])
        else:
            f.type = hints[f.name]
            found[f.metadata["name"] or f.name] = f
    return found


def _convert(value: Any, kind: Any) -> Any:
    """A string of the command line, or a TOML value, as `kind`; ValueError says what was expected."""
    options = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return _convert(value, options[0])
    if typing.get_origin(kind) is Literal:
        if value not in options:
            raise ValueError(f"one of {', '.join(options)}")
        return value
    if typing.get_origin(kind) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ValueError("names")
        return tuple(item.strip() for item in items if item.strip())
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value
    try:
        if isinstance(value, bool) or (kind in (str, Path) and not isinstance(value, str)):
            raise ValueError
        converted = kind(value)
        if kind is int and isinstance(value, float) and value != converted:
            raise ValueError
        if kind is float and not math.isfinite(converted):
            raise ValueError
        return converted
    except (TypeError, ValueError, OverflowError):
        raise ValueError({int: "a whole number", float: "a number"}.get(kind, "text")) from None


def _check(name: str, f: dataclasses.Field, value: Any, where: str) -> Any:
    """The converted value, or UserError."""
    try:
        converted = _convert(value, f.type)
    except ValueError as expected:
        raise UserError(f"{value!r} will not do", where, f"give {expected}") from None
    low, high = f.metadata["low"], f.metadata["high"]
    if (low is not None and converted < low) or (high is not None and converted > high):
        limits = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise UserError(f"{converted} is out of range", where, f"give a number {limits}")
    return converted


def _build(tree: type[T], values: dict[str, Any]) -> T:
    hints = typing.get_type_hints(tree)
    made = {}
    for f in fields(tree):
        name = f.metadata.get("name") or f.name
        if dataclasses.is_dataclass(hints[f.name]):
            made[f.name] = _build(hints[f.name], values)
        elif name in values:
            made[f.name] = values[name]
    return tree(**made)


def flat(config: Any) -> dict[str, Any]:
    """A dataclass tree as one dict of flag name -> plain JSON value: what config.json holds."""
    values: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            values |= flat(value)
        else:
            plain = str(value) if isinstance(value, Path) else value
            values[f.metadata["name"] or f.name] = list(plain) if isinstance(plain, tuple) else plain
    return values


def from_flat(tree: type[T], values: dict[str, Any], where: str) -> T:
    """The inverse of `flat`; UserError lists every value that does not fit."""
    known = flags_of(tree)
    checked, problems = {}, []
    for name, value in values.items():
        if name not in known:
            problems.append(UserError(f"no setting is called {name}", where, "see --help for the settings there are"))
        elif value is not None:
            try:
                checked[name] = _check(name, known[name], value, f"{name} in {where}")
            except UserError as error:
                problems.append(error)
    UserError.raise_all(problems)
    return _build(tree, checked)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, "command line", "see --help")


def parse(
    tree: type[T], argv: list[str], description: str, preset: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> T:
    """A command line -> a config of type `tree`: default < preset < --config file < flag.

    `preset` sees what file and flags say and returns the values of the preset they choose. Raises UserError with
    every problem found. `--help` prints the flags and exits.
    """
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="TOML file with the same settings, under the same names")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    known = flags_of(tree)
    for name, f in known.items():
        option, shown = "--" + name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if f.default is not None and f.type is not bool and "default" not in shown:
            value = ",".join(f.default) if isinstance(f.default, tuple) else f.default
            chosen_by: dict[Any, list[str]] = {}
            for kind, settings in PRESETS.items():
                if settings.get(name, value) != value:
                    chosen_by.setdefault(settings[name], []).append(kind)
            others = "".join(
                f"; {'lists of words' if len(kinds) == len(PRESETS) else ', '.join(kinds)}: {other}"
                for other, kinds in chosen_by.items()
            )
            shown += f" (default: {value}{others})"
        if f.type is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=shown)
        else:
            literal = typing.get_origin(f.type) is Literal
            metavar = "|".join(typing.get_args(f.type)) if literal else name.rsplit("_")[-1].upper()
            parser.add_argument(option, metavar=metavar, help=shown)
    arguments, left = parser.parse_known_args(argv)
    problems: list[UserError] = []
    given: dict[str, tuple[Any, str]] = {}
    if arguments.config is not None:
        for name, value in _read_toml(arguments.config, problems).items():
            given[name] = (value, f"{name} in {arguments.config}")
    unknown: list[list[str]] = []  # each with what follows it
    for word in left:
        if word.startswith("--") or not unknown:
            unknown.append(word.split("=", 1))
        else:
            unknown[-1].append(word)
    for option, *words in unknown:
        how = "see --help"
        if close := difflib.get_close_matches(option.lstrip("-").replace("-", "_"), known, n=1):
            (name,) = close
            how = f"did you mean --{name.replace('_', '-')}? see --help"
            if words and known[name].type is not bool:  # lest it be told, too, that this flag is missing
                given[name] = (words[0], option)
        problems.append(UserError(f"unknown argument {' '.join([option, *words])}", "command line", how))
    for name in known:
        if (value := getattr(arguments, name)) is not None:
            given[name] = (value, "--" + name.replace("_", "-"))

    values = {}
    for name, (value, where) in given.items():
        try:
            if name not in known:
                raise UserError(f"no setting is called {name}", where, "see --help for the settings there are")
            values[name] = _check(name, known[name], value, where)
        except UserError as error:
            problems.append(error)
    try:
        values = (preset(values) if preset else {}) | values
    except UserError as error:
        problems.append(error)
    UserError.raise_all(problems)
    return _build(tree, values)


def _read_toml(path: Path, problems: list[UserError]) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(
            UserError(error.strerror or str(error), f"--config {path}", "give a TOML file that can be read")
        )
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(UserError(f"not TOML: {error}", f"--config {path}", "mend the file"))
    return {}


# --- what no single field can say -------------------------------------------------------------------------------------


def training_preset(values: dict[str, Any]) -> dict[str, Any]:
    """The recipe that was chosen, by name, level or source; and the checks across settings, all at once."""
    problems = []
    if values.get("resume") and (others := values.keys() - {"resume", "run_dir"}):
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(others))
        problems.append(UserError("a resumed run keeps its settings", flags, "leave them out, or start a new run"))
    recipe = values.get("recipe")
    if recipe is not None and recipe not in RECIPES:
        problems.append(UserError(f"there is no recipe {recipe!r}", "--recipe", f"give one of {', '.join(RECIPES)}"))
    level, words = values.get("level"), values.get("words")
    if level is not None and level not in (*LEVELS, "all"):
        problems.append(UserError(f"there is no level {level!r}", "--level", f"give one of {', '.join(LEVELS)}, all"))
    sources = [f"--{name}" for name in ("level", "words", "data", "recipe") if values.get(name)]
    # Words may have a level.
    if len(sources) > 1 and (sources != ["--level", "--words"] or level == "all"):
        problems.append(UserError("more than one thing to train on", ", ".join(sources), "give one of them"))
    if not sources and not values.get("resume"):
        how = "say --level a1, --words FILE for lists of your own words, or --data FILE for your own examples"
        problems.append(UserError("nothing to train on", "--level, --words, --data", how))
    unused = [name for name in ("language", "prompt", "list_size", "train_lists", "eval_lists") if values.get("data")]
    unused += ["eval_lists"] * ("eval_data" in values) + ["language"] * bool(level and not words)
    for name in unused:
        if name in values:
            where = f"--{name.replace('_', '-')}"
            problems.append(UserError("nothing here to use it for", where, "leave it out"))
    if values.get("prompt") == "":
        problems.append(UserError("nothing is asked", "--prompt", "say how a list is asked for, or leave it out"))
    if (language := values.get("language", "en")) not in LANGUAGES and "prompt" not in values:
        how = f"say with --prompt how a list is asked for, or give one of {', '.join(LANGUAGES)}"
        problems.append(UserError("no wording for this language", f"--language {language}", how))
    wrong = [name for name in values.get("target_modules", ()) if name not in LINEARS]
    if wrong or values.get("target_modules") == ():
        what = f"no linear is called {', '.join(wrong)}" if wrong else "no linear was named"
        problems.append(UserError(what, "--target-modules", f"choose from {','.join(LINEARS)}"))
    for name, kind in (("data", "JSONL"), ("eval_data", "JSONL"), ("words", "TSV")):
        if (path := values.get(name)) is not None and not Path(path).is_file():
            what = "a folder, not a file" if Path(path).is_dir() else "no such file"
            problems.append(UserError(what, f"--{name.replace('_', '-')} {path}", f"give a {kind} file"))
    if values.get("step_tokens") and ("batch_size" in values or "grad_accum" in values):
        problems.append(
            UserError("a step counted twice", "--step-tokens, --batch-size, --grad-accum", "count tokens or examples")
        )
    UserError.raise_all(problems)
    if recipe is not None:
        return RECIPES[recipe]
    return PRESETS.get(level or ("words" if words else None), {})


def parse_training(argv: list[str], description: str) -> Config:
    """train.py's command line -> its config."""
    return parse(Config, argv, description, training_preset)
