"""train.py, eval.py and merge.py from the command line: the whole way on a tiny model, and all that is refused."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import load
from tiny_chat import (
    chat,
    quick,  # noqa: F401
    tiny_chat_folder,
    write_chats,
    write_jsonl,
)

import eval as evaluation
import merge
import train
from lora.config import Config, DataConfig, EvalConfig, MergeConfig, flags_of
from lora.data import encode, held_out, list_conversations, load_dataset, pack_examples
from lora.errors import UserError, exit_code
from lora.evaluate import evaluate
from lora.levels import AT_LEVEL, LEVELS
from lora.levels import DATA as LEVEL_DATA
from lora.log import read_metrics
from lora.run import read_run
from lora.tokenizer import Tokenizer

SCRIPTS = {"train": (train, Config), "eval": (evaluation, EvalConfig), "merge": (merge, MergeConfig)}
FLAGS = ["--device=cpu", "--dtype=fp32", "--quant=none", "--lora-rank=4", "--max-steps=3", "--batch-size=4"]
LONGER = ["--max-steps", "40", "--epochs", "99", "--learning-rate", "1e-2"]  # until its first choices are clear
LINE = re.compile(r"error: .+ \(.+\): .+")  # what (where): how to mend


class Ended(NamedTuple):
    code: int
    out: str
    errors: list[str]


Call = Callable[..., Ended]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_chat_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chat.jsonl", 30)


def run_script(name: str, *words: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        return exit_code(SCRIPTS[name][0].main)


@pytest.fixture
def call(monkeypatch, tmp_path, capsys) -> Call:
    """Runs a script in an empty working folder of its own; errors are the lines of stderr that are no progress."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def called(name: str, *words: object) -> Ended:
        code = run_script(name, *words)
        printed = capsys.readouterr()
        return Ended(code, printed.out, printed.err.splitlines())

    return called


@pytest.fixture
def trained(call, base, data) -> Path:
    """A short finished run, runs/chat."""
    assert call("train", *FLAGS, "--model", base, "--data", data).code == 0
    return Path("runs/chat")


def assert_refused(ended: Ended, *words: str, problems: int = 1) -> None:
    """Exit code 2 and a line for each problem, which say these words; nothing is written, no traceback shown."""
    assert ended.code == 2, ended
    assert len(ended.errors) == problems, ended.errors
    for line in ended.errors:
        assert LINE.fullmatch(line), line
    for word in words:
        assert word in "\n".join(ended.errors)
    assert not list(Path().iterdir()), "something was written"


# --- train.py refuses ---


@pytest.mark.parametrize(
    ("flags", "words", "problems"),
    [
        (["--colour", "red"], ["--colour", "red"], 1),
        (["--lora-rank", "many"], ["'many'", "--lora-rank", "whole number"], 1),
        (
            ["--lora-rank", "0", "--lora-dropout", "2", "--epochs", "-1"],
            ["--lora-rank", "--lora-dropout", "--epochs"],
            3,
        ),
        (["--quant", "int3"], ["--quant", "nf4"], 1),
        (["--target-modules", "q_proj,lm_head"], ["lm_head", "--target-modules"], 1),
        (["--device", "abacus"], ["--device abacus"], 1),
        (["--device", "cuda:99"], ["--device cuda:99"], 1),
        (["--level", "a1"], ["--level", "--data"], 1),
        (["--config", "none.toml"], ["none.toml"], 1),
        (["--eval-data", "none.jsonl"], ["--eval-data none.jsonl"], 1),
        (["--template-date", "today"], ["--template-date"], 1),
        (["--epochs", "0"], ["--epochs"], 1),
        (["--epochs", "inf"], ["--epochs"], 1),
        (["--learning-rate", "inf"], ["--learning-rate"], 1),
        (["--max-length", "5"], ["--max-length"], 1),
        (["--lora-rank"], ["--lora-rank"], 1),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_bad_flags(call, base, data, flags, words, problems):
    assert_refused(call("train", "--model", base, "--data", data, *flags), *words, problems=problems)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_gpu(call, base, data, script, tmp_path):
    if script == "train":
        assert_refused(call("train", "--model", base, "--data", data, "--device", "cuda"), "--device cuda")
        return
    assert call("train", *FLAGS, "--model", base, "--data", data, "--run-dir", tmp_path / "run").code == 0
    assert_refused(call(script, "--run", tmp_path / "run", "--device", "cuda"), "--device cuda")


@pytest.mark.parametrize("flags", [[], ["--level", "z9"], ["--data", "none.jsonl"], ["--level", "z9", "--data", "x"]])
def test_no_data(call, base, flags):
    given = max(1, len(flags) // 2) + (len(flags) == 4)
    assert_refused(call("train", "--model", base, *flags), *flags, problems=given)


def test_overlong_examples(call, base, tmp_path):
    """Told by name and length, with --overlong error; counted otherwise, and if none is left that is an error, too."""
    file, held_out = write_chats(tmp_path / "chat.jsonl", 40), write_chats(tmp_path / "eval.jsonl", 1)
    given = ["--model", base, "--data", file, "--eval-data", held_out, "--max-length", "8"]
    assert_refused(call("train", *given), "no training example", "--max-length")
    ended = call("train", *given, "--overlong", "error")
    assert_refused(ended, "chat.jsonl line 20", "eval.jsonl line 1", "20 more problems", problems=22)


def test_empty_file(call, base, tmp_path):
    assert_refused(call("train", "--model", base, "--data", write_jsonl(tmp_path / "chat.jsonl", [])), "no examples")


def test_malformed_lines(call, base, tmp_path):
    file = write_jsonl(tmp_path / "chat.jsonl", [chat("a", "b"), "{", "[]", chat("c", "d"), '{"messages": 3}'])
    lines = [f"chat.jsonl line {number}" for number in (2, 3, 5)]
    assert_refused(call("train", "--model", base, "--data", file), *lines, problems=3)


def test_nothing_supervised(call, base, tmp_path):
    rows = [chat("a", "b"), {"messages": chat("c", "d")["messages"][:1]}, chat("e", "f"), chat("g", "")]
    held_out = write_chats(tmp_path / "eval.jsonl", 2)
    file = write_jsonl(tmp_path / "chat.jsonl", rows)
    ended = call("train", "--model", base, "--data", file, "--eval-data", held_out)
    assert_refused(ended, "chat.jsonl line 2", "chat.jsonl line 4", "no assistant turn", problems=2)


def damaged(folder: Path, out: Path, what: str) -> Path:
    """A copy of a model's folder with something wrong."""
    shutil.copytree(folder, out)
    weights, config = out / "model.safetensors", out / "config.json"
    if what == "absent":
        shutil.rmtree(out)
    elif what == "no llama":
        config.write_text(config.read_text().replace('"llama"', '"mamba"'))
    elif what == "half a download":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif what == "no weights":
        weights.unlink()
    elif what == "no tokenizer":
        (out / "tokenizer.json").unlink()
    elif what == "no template":
        (out / "tokenizer_config.json").write_text("{}")
    elif what == "a tensor missing":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights)
    return out


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("absent", ["model"]),
        ("no llama", ["mamba", "llama"]),
        ("half a download", ["model.safetensors", "fetch"]),
        ("no weights", ["model.safetensors"]),
        ("no tokenizer", ["tokenizer"]),
        ("no template", ["template"]),
        ("a tensor missing", ["model.layers.1.mlp.up_proj.weight is missing"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_model(call, base, tmp_path, what, words):
    """Every one is told before anything is written; a missing template is told once for each of the lines."""
    file = write_chats(tmp_path / "chat.jsonl", 2)
    model = damaged(base, tmp_path / "model", what)
    ended = call("train", "--model", model, "--data", file)
    assert_refused(ended, *words, problems=len(ended.errors) if what == "no template" else 1)


def test_run_dir_that_holds_a_run(call, base, data, trained):
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    ended = call("train", *FLAGS, "--model", base, "--data", data, "--run-dir", trained)
    assert ended.code == 2
    (line,) = ended.errors
    assert LINE.fullmatch(line)
    assert "--resume" in line
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_run_dir_that_is_a_file(call, base, data):
    for folder in ("file", "file/run"):
        Path("file").write_text("")
        ended = call("train", *FLAGS, "--model", base, "--data", data, "--run-dir", folder)
        assert (ended.code, len(ended.errors)) == (2, 1), ended
        Path("file").unlink()


def test_nothing_to_resume(call, tmp_path):
    assert_refused(call("train", "--resume"), "no unfinished run")
    assert_refused(call("train", "--resume", "--run-dir", tmp_path), "no run is there")
    assert_refused(call("train", "--resume", "--level", "a1", "--epochs", "3"), "--epochs, --level")


def test_debug_adds_a_traceback(call, base):
    ended = call("train", "--model", base, "--debug")
    assert ended.code == 2
    assert ended.errors[0].startswith("Traceback")
    assert LINE.fullmatch(ended.errors[-1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag(capsys, script):
    with pytest.raises(SystemExit) as ended:
        run_script(script, "--help")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for name in [*flags_of(SCRIPTS[script][1]), "config", "debug"]:
        assert f"--{name.replace('_', '-')}" in out, name


def test_as_a_program(tmp_path, base):
    """In a process of its own and from another folder: exit code 2, a line, no file."""
    script = Path(train.__file__)
    command = [sys.executable, script, "--model", base, "--lora-rank", "x", "--lora-alpha", "y", "--data", "none.jsonl"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 3, ended.stderr
    assert not ended.stdout
    assert not list(tmp_path.iterdir())


# --- eval.py and merge.py refuse ---


@pytest.mark.parametrize("script", ["eval", "merge"])
def test_no_run(call, script, tmp_path):
    assert_refused(call(script), "no finished run", "train.py")
    assert_refused(call(script, "--run", tmp_path), str(tmp_path))


@pytest.mark.parametrize("script", ["eval", "merge"])
@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--checkpoint", "7"], "(--checkpoint 7): give best, last or a step that has one: 3"),
        (["--checkpoint", "worst"], "--checkpoint worst"),
        (["--model", "none"], "none"),
        (["--colour"], "--colour"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "cuda:"], "--device cuda:"),
        (["--max-examples", "0"], "--max-examples"),
    ],
    ids=str,
)
def test_bad_flags_of_eval_and_merge(call, trained, script, flags, word):
    before = sorted(Path().rglob("*"))
    ended = call(script, *flags)
    assert (ended.code, len(ended.errors)) == (2, 1), ended
    assert LINE.fullmatch(ended.errors[0])
    assert word in ended.errors[0]
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("flag", "value", "word"),
    [("--data", "none.jsonl", "none.jsonl"), ("--top-p", "0", "--top-p"), ("--temperature", "-1", "--temperature")],
)
def test_bad_flags_of_eval(call, trained, flag, value, word):
    ended = call("eval", flag, value)
    assert (ended.code, len(ended.errors)) == (2, 1), ended
    assert word in ended.errors[0]
    assert not (trained / "eval.json").exists()


@pytest.mark.parametrize("script", ["eval", "merge"])
@pytest.mark.parametrize("change", ["gone", "longer"])
def test_data_that_has_changed_since(call, base, data, script, change):
    """Other lines may hold out other prompts, some that were trained on: never a silent comparison on those."""
    file = Path("chat.jsonl")
    shutil.copyfile(data, file)
    assert call("train", *FLAGS, "--model", base, "--data", file).code == 0
    file.unlink() if change == "gone" else write_chats(file, 60)
    ended = call(script)
    assert (ended.code, len(ended.errors)) == (2, 1), ended
    assert LINE.fullmatch(ended.errors[0])


def test_merge_does_not_overwrite(call, trained):
    Path("out").mkdir()
    ended = call("merge", "--out", "out")
    assert (ended.code, len(ended.errors)) == (2, 1)
    assert "--out out" in ended.errors[0]
    assert not list(Path("out").iterdir())


def test_merge_with_another_base(call, trained, tmp_path):
    """The adapter of another shape of model."""
    other = tiny_chat_folder(tmp_path / "other", num_hidden_layers=1)
    ended = call("merge", "--model", other)
    assert ended.code == 2
    assert all("model.layers.1" in line for line in ended.errors)
    assert not Path("merged").exists()


# --- the whole way ---


def json_of(path: Path) -> dict:
    return json.loads(path.read_text())


def test_train_eval_merge(call, base, data):
    flags = [*FLAGS[:-2], "--batch-size", "4", "--epochs", "2", "--max-steps", "9", "--learning-rate", "1e-2"]
    ended = call("train", *flags, "--model", base, "--data", data, "--lora-dropout", "0.1")
    assert (ended.code, ended.errors) == (0, []), ended
    assert re.search(r"steps +9\n +epochs +1.286\n", ended.out)
    run = Path("runs/chat")
    files = {path.name for path in run.iterdir()}
    assert files >= {
        "config.json", "run_card.json", "metrics.jsonl", "tensorboard", "adapter_model.safetensors",
        "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "checkpoint-9",
    }  # fmt: skip
    assert not [name for name in files if name.startswith(".")]

    # 28 train examples in steps of 4: 7 steps an epoch, so 9 are the first epoch and 8 examples of the second.
    settings, resolved = read_run(run)
    assert (settings.lora.rank, settings.optim.max_steps, resolved.optimizer) == (4, 9, "adamw")
    examples = load_dataset(settings.data, Tokenizer.load(base), settings.run.seed, 1)
    card, lines = json_of(run / "run_card.json"), read_metrics(run)
    assert (card["examples"], card["eval_examples"], card["unique_examples_seen"]) == (28, 2, 28)
    assert (card["steps"], card["steps_planned"]) == (9, 9)
    assert card["epochs"] == pytest.approx(1 + 8 / 28)
    assert card["overlong"] == {kind: {"dropped": 0, "truncated": 0} for kind in ("train", "eval")}
    for key in ("tokens", "supervised_tokens"):
        assert card[key] == sum(line[key] for line in lines if line["kind"] == "train")
    assert card["data_hash"] == examples.hash
    assert (card["finished"], card["ending"]) == (True, "finished")
    assert card["versions"]["torch"] == torch.__version__
    assert card["seconds_in_steps"] > 0
    assert card["peak_memory_gib"] > 0
    best = min((line for line in lines if line["kind"] == "eval" and line["step"]), key=lambda line: line["eval_loss"])
    assert (card["best_step"], card["best_eval_loss"]) == (best["step"], best["eval_loss"])

    ended = call("eval", "--max-new-tokens", "5", "--generations", "1")
    assert (ended.code, ended.errors) == (0, []), ended
    result = json_of(run / "eval.json")
    untouched = evaluate(load(base), pack_examples(range(2), examples.eval, 10_000))
    response, full = (result["metrics"][f"loss, {kind}"] for kind in ("response", "full text"))
    assert response["base"] == pytest.approx(untouched.response, rel=1e-6)
    assert full["base"] == pytest.approx(untouched.full, rel=1e-6)
    assert response["tuned"] == pytest.approx(best["eval_loss"], rel=1e-6)
    assert full["tuned"] == pytest.approx(best["eval_loss_full"], rel=1e-6)
    assert response["low"] <= response["change"] <= response["high"]
    assert (result["examples"], result["checkpoint"]) == (2, "best")
    (answer,) = result["generations"]
    assert answer["prompt"][-1]["role"] == "user"
    for side in ("base", "tuned"):
        assert "<|im_" not in answer[side]["text"]
        assert isinstance(answer[side]["stopped"], bool)
    assert answer["prompt"][-1]["content"] in ended.out

    ended = call("merge")
    assert (ended.code, ended.errors) == (0, []), ended
    assert "KL" in ended.out
    merged = Path("merged/chat")
    assert {path.name for path in merged.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    alone = evaluate(load(merged), pack_examples(range(2), examples.eval, 10_000))
    assert alone.response == pytest.approx(best["eval_loss"], rel=1e-2)
    assert call("merge").code == 2
    assert call("merge", "--checkpoint", "last", "--out", "again", "--dtype", "fp16").code == 0
    assert {tensor.dtype for tensor in load_file("again/model.safetensors").values()} == {torch.float16}
    assert json_of(Path("again/config.json"))["dtype"] == "float16"


def test_level(call, base):
    """The word lists, with their recipe; two held-out lists are enough for eval.py here."""
    ended = call("train", *FLAGS[:-1], "--model", base, "--level", "a1", "--max-length", "1000", "--grad-accum", "1")
    assert ended.code == 0, ended
    card = json_of(Path("runs/a1/run_card.json"))
    assert (card["examples"], card["eval_examples"]) == (960, 18)  # each of the 8 epochs has its own 120 lists
    assert json_of(Path("runs/a1/config.json"))["settings"]["lora_alpha"] == 256
    assert call("eval", "--max-examples", "2", "--generations", "0").code == 0
    assert json_of(Path("runs/a1/eval.json"))["examples"] == 2


def test_all_levels(call, base):
    """One after another, each with its own preset, into a folder of its own; bad flags are told before the first."""
    flags = [*FLAGS[:-1], "--model", base, "--train-lists", "3", "--eval-lists", "2", "--epochs", "1"]
    assert call("train", *flags, "--level", "all", "--lora-dropout", "2").code == 2
    assert not Path("runs").exists()
    ended = call("train", *flags, "--level", "all", "--run-dir", "five", "--max-length", "2000")
    assert ended.code == 0, ended
    assert {path.name for path in Path("five").iterdir()} == {*LEVELS}
    for level in LEVELS:
        settings = json_of(Path("five") / level / "config.json")["settings"]
        assert (settings["level"], settings["train_lists"], settings["lora_alpha"]) == (level, 3, 256)


def test_all_levels_start_together_or_not_at_all(call, base):
    """A folder that is taken is told before the first level is trained."""
    taken = Path("five/b1")
    taken.mkdir(parents=True)
    (taken / "config.json").write_text("{}")
    assert call("train", *FLAGS, "--model", base, "--level", "all", "--run-dir", "five").code == 2
    assert not Path("five/a1").exists()


def test_words_in_turkish(call, base):
    """The whole way with one's own words: lists, training, evaluation with what can be told without levels, merge."""
    flags = [*FLAGS[:-1], "--model", base, "--train-lists", "20", "--eval-lists", "3", "--max-length", "2000"]
    ended = call("train", *flags, "--words", LEVEL_DATA / "tr-a1.tsv", "--language", "tr", "--epochs", "1")
    assert ended.code == 0, ended
    settings, resolved = read_run(Path("runs/tr-a1"))
    conversations, examples, _ = held_out(settings.data, Tokenizer.load(base), 0, resolved.held_out_hash)
    assert len(examples) == 3
    assert "Türkçe" in conversations[0].messages[0]["content"]
    ended = call("eval", "--max-new-tokens", "8")
    assert ended.code == 0, ended
    result = json_of(Path("runs/tr-a1/eval.json"))
    assert {"loss, sentences", "words used", "valid lists", "sentences copied"} <= result["metrics"].keys()
    assert not {AT_LEVEL, "sentences in the length band"} & result["metrics"].keys()
    assert "left out" in ended.out
    assert call("merge").code == 0


def test_sentence_losses_are_those_of_the_sentences(base):
    """With place k of every example losing k nats, a sentence loses the mean of its places; a list cut short, less."""
    tokenizer = Tokenizer.load(base)
    (conversations,), _ = list_conversations(DataConfig(level="a1", train_lists=2), 0, 1)
    examples, _ = encode(conversations, tokenizer, DataConfig())
    whole, cut = examples[0], replace(examples[1], ids=examples[1].ids[:200], mask=examples[1].mask[:200])
    losses = {e.name: torch.arange(len(e.ids), dtype=torch.float64) for e in (whole, cut)}
    tallies = evaluation.tally_losses(losses, [whole, cut], conversations, tokenizer)
    total = 0
    for pair in conversations[0].pairs:
        loss, n = map(int, tallies["loss, sentences"][pair.word])
        first = (loss - n * (n - 1) // 2) // n  # the places of a sentence follow each other
        assert sum(range(first, first + n)) == loss
        assert tokenizer.decode(whole.ids[first : first + n]).strip() == pair.sentence
        total += n
    assert total < whole.supervised
    assert sum(n for _, n in tallies["loss, sentences"].values()) < sum(e.supervised for e in examples)
    learnt = [place for place, is_learnt in enumerate(whole.mask) if is_learnt]
    assert tallies["loss, response"][whole.name] == (sum(learnt), len(learnt))
    losses[whole.name][5] = torch.nan
    with pytest.raises(UserError, match="not a number"):
        evaluation.tally_losses(losses, [whole], [], tokenizer)


def test_an_answer_without_end_is_shown_by_its_beginning():
    text = "\n".join(map(str, range(100)))
    assert evaluation.shown(text, stopped=True) == text
    assert evaluation.shown("one line", stopped=False) == "one line"
    *lines, last = evaluation.shown(text, stopped=False).splitlines()
    assert lines == text.splitlines()[: len(lines)] and f"{100 - len(lines)} more lines" in last


@pytest.mark.parametrize("flags", [["--quant", "nf4"], ["--recompute", "block"], ["--optimizer", "adamw8bit"]], ids=str)
def test_other_ways_to_train(call, base, data, flags):
    given = ["--model", base, "--data", data, "--eval-data", data]
    assert call("train", *FLAGS, *LONGER, *given, *flags).code == 0
    assert call("eval", "--generations", "0").code == 0
    assert call("merge").code == 0


def test_names_of_runs(call, base, data, trained):
    """A name that is taken gets a number; eval.py takes the newest finished run."""
    for number in (2, 3):
        assert call("train", *FLAGS, "--model", base, "--data", data).code == 0
        assert (Path(f"runs/chat-{number}") / "run_card.json").is_file()
    assert call("eval", "--generations", "0").code == 0
    assert [path.parent.name for path in Path("runs").glob("*/eval.json")] == ["chat-3"]


def test_full_text_without_answers(call, base, tmp_path):
    """--loss-on full learns texts without an assistant turn, too; eval.py then has nothing to generate, and says so."""
    rows = [{"messages": [{"role": "user", "content": f"text {number}"}]} for number in range(8)]
    file = write_jsonl(tmp_path / "chat.jsonl", rows)
    assert call("train", *FLAGS, "--model", base, "--data", file, "--eval-data", file, "--loss-on", "full").code == 0
    ended = call("eval", "--max-new-tokens", "2")
    assert ended.code == 0, ended
    assert json_of(Path("runs/chat/eval.json"))["generations"] == []


def test_the_first_held_out_example_is_too_long(call, base, data, tmp_path):
    """--max-examples counts examples that can be used."""
    held_out = write_jsonl(tmp_path / "eval.jsonl", [chat("a", "very long " * 60), chat("b", "c"), chat("d", "e")])
    flags = ["--model", base, "--data", data, "--eval-data", held_out, "--max-length", "120"]
    ended = call("train", *FLAGS, *flags)
    assert ended.code == 0, ended
    assert "1 dropped" in ended.out
    for script in ("eval", "merge"):
        ended = call(script, "--max-examples", "1")
        assert ended.code == 0, ended


def test_divergence(call, base, tmp_path):
    """A weight that is not a number: exit code 1, the example named, the run not finished."""
    model = damaged(base, tmp_path / "model", "")
    tensors = load_file(model / "model.safetensors")
    (odd,) = Tokenizer.load(model).encode("~")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"][odd] = torch.nan
    save_file(tensors, model / "model.safetensors")
    config = json_of(model / "config.json") | {"tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(config))
    rows = [chat(f"{number}{'~' * (number == 5)}", "yes") for number in range(8)]
    file, held_out = write_jsonl(tmp_path / "chat.jsonl", rows), write_chats(tmp_path / "eval.jsonl", 2)
    ended = call("train", *FLAGS, "--epochs", "3", "--model", model, "--data", file, "--eval-data", held_out)
    assert ended.code == 1, ended
    (line,) = ended.errors
    assert line.startswith("error: ")
    assert re.findall(r"chat.jsonl line \d+", line) == ["chat.jsonl line 6"]
    card = json_of(Path("runs/chat/run_card.json"))
    assert (card["finished"], card["ending"]) == (False, "diverged")
    ended = call("eval")
    assert ended.code == 2
    assert "no finished run" in ended.errors[0]


def test_crash_is_no_divergence(call, base, data, monkeypatch):
    """The run card says what happened, and an error of the program itself is not hidden."""

    def broken(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(train, "train", broken)
    with pytest.raises(RuntimeError):
        call("train", *FLAGS, "--model", base, "--data", data)
    card = json_of(Path("runs/chat/run_card.json"))
    assert (card["finished"], card["ending"]) == (False, "failed")


def test_merge_that_damages_the_model(call, trained, monkeypatch):
    """What is read back is not what was trained: exit code 1, and no folder."""
    write_model = merge.write_model

    def damaging(model, source, files, out):
        write_model(model, source, files, out)
        tensors = load_file(out / "model.safetensors")
        tensors["model.layers.0.mlp.down_proj.weight"].zero_()
        save_file(tensors, out / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(merge, "write_model", damaging)
    ended = call("merge")
    assert ended.code == 1
    (line,) = ended.errors
    assert line.startswith("error: ")
    assert not list(Path("merged").iterdir())
