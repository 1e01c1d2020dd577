"""lora/config.py: where a value comes from, and what is said when it will not do."""

import dataclasses
import json
from pathlib import Path

import pytest
from tiny import problems

from lora.config import LINEARS, PRESETS, Config, LoraConfig, flags_of, flat, from_flat, parse_training


@pytest.fixture
def data(tmp_path) -> list[str]:
    """--data with a file that is there."""
    (tmp_path / "data.jsonl").write_text("{}\n")
    return ["--data", str(tmp_path / "data.jsonl")]


def toml(folder: Path, text: str) -> list[str]:
    """--config with a file that says `text`."""
    (folder / "run.toml").write_text(text)
    return ["--config", str(folder / "run.toml")]


def parse(*argv: str) -> Config:
    return parse_training(list(argv), "")


# --- where a value comes from ---


def test_defaults(data):
    config = parse(*data)
    for part in dataclasses.fields(config):
        got, default = getattr(config, part.name), type(getattr(config, part.name))()
        if part.name != "data":
            assert got == default, part.name
    assert config.data.data == Path(data[1])
    assert (config.lora.rank, config.lora.alpha, config.optim.epochs, config.optim.batch_size) == (16, 32, 3, 16)


def test_level_recipe():
    """A level's: rank 128, alpha 256, 16 lists a step, 2e-4, cosine, warmup 0.1, 512 tokens, 8 epochs of 120 lists. The
    one to compare with: ten of 1,800, 16 x 4 a step."""
    config, reference = parse("--level", "a1"), parse("--recipe", "c1-reference")
    for optim, epochs, grad_accum in ((config.optim, 8, 1), (reference.optim, 10, 4)):
        assert (optim.batch_size, optim.grad_accum, optim.learning_rate, optim.schedule) == (
            16, grad_accum, 2e-4, "cosine",
        )  # fmt: skip
        assert (optim.warmup_ratio, optim.epochs, optim.weight_decay, optim.max_grad_norm) == (0.1, epochs, 0.01, 1.0)
    assert config.lora == reference.lora == LoraConfig(rank=128, alpha=256, dropout=0.0, target_modules=LINEARS)
    assert (config.data.train_lists, reference.data.train_lists, reference.data.level) == (120, 1800, "c1")
    assert config.data.max_length == 512
    assert PRESETS["a1"].keys() <= flags_of(Config).keys()


def test_precedence(tmp_path):
    """default < preset < file < flag, setting by setting; the file may choose the preset."""
    file = toml(tmp_path, 'level = "a1"\nlora_rank = 64\nlora_alpha = 8\nlearning_rate = 1')
    config = parse(*file, "--lora-rank", "32")
    assert config.lora.rank == 32  # flag
    assert config.lora.alpha == 8  # file
    assert config.optim.learning_rate == 1.0
    assert config.data.max_length == 512  # preset
    assert config.optim.max_steps is None  # default


def test_every_kind_of_value(data, tmp_path):
    """The same settings as flags and as TOML make the same config."""
    argv = ["--max-steps", "7", "--epochs", "0.5", "--rslora", "--target-modules", "q_proj, v_proj", "--dtype", "bf16"]
    flags = parse(*data, *argv, "--run-dir", "runs/x", "--learning-rate", "1e-3", "--model", "org/name")
    text = 'max_steps = 7\nepochs = 0.5\nrslora = true\ntarget_modules = ["q_proj", "v_proj"]\ndtype = "bf16"\n'
    file = parse(*data, *toml(tmp_path, text + 'run_dir = "runs/x"\nlearning_rate = 1e-3\nmodel = "org/name"'))
    assert flags == file
    assert flags.lora.target_modules == ("q_proj", "v_proj")
    assert flags.run.run_dir == Path("runs/x")
    assert flags.optim.max_steps == 7
    assert flags.lora.rslora is True


def test_booleans(data, tmp_path):
    file = toml(tmp_path, "rslora = true\ndeterministic = false")
    assert parse(*data, *file).lora.rslora is True
    assert parse(*data, *file, "--no-rslora").lora.rslora is False
    assert parse(*data, *file, "--deterministic").run.deterministic is True


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name in flags_of(Config):
        assert "--" + name.replace("_", "-") in shown, name


def test_flags_of_are_all_fields():
    """No two settings share a name, so none hides another."""
    config = parse("--level", "a1")
    fields = [f for part in dataclasses.fields(config) for f in dataclasses.fields(getattr(config, part.name))]
    assert len(flags_of(Config)) == len(fields)


# --- what will not do ---


def test_all_problems_at_once(tmp_path):
    """From flags, file and the checks across settings, in one go."""
    file = toml(tmp_path, 'lora_alpha = "big"\nlora-dropout = 0.1\nrslora = "yes"\ngrad_accum = 0')
    argv = ["--level", "z9", "--lora-rank", "0", "--schedule", "steps", "--seed", "-1", "--epochs", "few", "--nonsense"]
    argv += ["--target-modules", "q_proj,x_proj", "--eval-data", "nothing.jsonl"]
    found = problems(parse, *file, *argv)
    config = str(tmp_path / "run.toml")
    wanted = [
        "unknown argument --nonsense (command line)",
        f"'big' will not do (lora_alpha in {config}): give a number",
        f"no setting is called lora-dropout (lora-dropout in {config})",
        f"'yes' will not do (rslora in {config}): give true or false",
        f"0 is out of range (grad_accum in {config}): give a number at least 1",
        "0 is out of range (--lora-rank): give a number at least 1",
        "'steps' will not do (--schedule): give one of cosine, linear, constant",
        "-1 is out of range (--seed): give a number between 0 and 2",
        "'few' will not do (--epochs): give a number",
        "there is no level 'z9' (--level): give one of a1",
        "no linear is called x_proj (--target-modules)",
        "no such file (--eval-data nothing.jsonl)",
    ]
    for want in wanted:
        assert sum(problem.startswith(want) for problem in found) == 1, want
    assert len(found) == len(wanted), found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lora_rank = 1.5", "a whole number"),
        ("lora_rank = true", "a whole number"),
        ("lora_rank = inf", "a whole number"),
        ('lora_rank = "8x"', "a whole number"),
        ("lora_rank = [8]", "a whole number"),
        ("learning_rate = nan", "a number"),
        ("learning_rate = inf", "a number"),
        ("target_modules = 5", "names"),
        ("target_modules = [5]", "names"),
        ("model = 5", "text"),
        ("run_dir = 5", "text"),
        ("rslora = 1", "true or false"),
        ("dtype = 16", "one of auto, bf16, fp16, fp32"),
    ],
)
def test_toml_values_of_the_wrong_kind(data, tmp_path, line, expected):
    name = line.split()[0]
    (problem,) = problems(parse, *data, *toml(tmp_path, line))
    assert f"will not do ({name} in {tmp_path / 'run.toml'}): give {expected}" in problem


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "nothing to train on (--level, --words, --data)"),
        (["--level", "a1", "--data", "x.jsonl"], "more than one thing to train on (--level, --data)"),
        (["--recipe", "c1-reference", "--words", "x.tsv"], "more than one thing to train on (--words, --recipe)"),
        (["--recipe", "c9"], "there is no recipe 'c9' (--recipe)"),
        (["--level", "d1"], "there is no level 'd1' (--level)"),
        (["--level", "all", "--words", "x.tsv"], "more than one thing to train on (--level, --words)"),
        (["--level", "a1", "--language", "tr"], "nothing here to use it for (--language)"),
        (["--level", "a1", "--eval-data", "x.jsonl", "--eval-lists", "3"], "nothing here to use it for (--eval-lists)"),
        (["--words", "x.tsv", "--prompt", ""], "nothing is asked (--prompt)"),
        (["--words", "x.tsv", "--language", "de"], "no wording for this language (--language de)"),
        (["--data", "x.jsonl", "--list-size", "5"], "nothing here to use it for (--list-size)"),
        (["--level", "a1", "--target-modules", ""], "no linear was named (--target-modules)"),
        (["--level", "a1", "--lora-ra", "4"], "unknown argument --lora-ra 4 (command line): did you mean --lora-rank?"),
        (
            ["--level", "a1", "--lora-dropout", "1"],
            "1.0 is out of range (--lora-dropout): give a number between 0 and 0.9",
        ),
        (["--level", "a1", "--max-length", "1e3"], "'1e3' will not do (--max-length): give a whole number"),
        (["--level", "a1", "--learning-rate", "inf"], "'inf' will not do (--learning-rate): give a number"),
        (
            ["--level", "a1", "--step-tokens", "9", "--batch-size", "4"],
            "a step counted twice (--step-tokens, --batch-size, --grad-accum)",
        ),
        (["--level"], "argument --level: expected one argument (command line)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_will_not_do(argv, problem):
    assert problem in [found[: len(problem)] for found in problems(parse, *argv)]


@pytest.mark.parametrize(
    ("argv", "want"),
    [
        (["--levle", "a1"], ["unknown argument --levle a1 (command line): did you mean --level? see --help"]),
        (["--levle=a1"], ["unknown argument --levle a1 (command line): did you mean --level? see --help"]),
        (["--level", "a1", "--rslra", "x"], ["unknown argument --rslra x (command line): did you mean --rslora?"]),
        (["--level", "a1", "--colour", "red"], ["unknown argument --colour red (command line): see --help"]),
        (["--level", "a1", "red"], ["unknown argument red (command line): see --help"]),
        (["--levle", "z9", "--sede", "x"], [
            "unknown argument --levle z9 (command line)", "unknown argument --sede x (command line)",
            "'x' will not do (--sede): give a whole number", "there is no level 'z9' (--level)",
        ]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("-") else "",
)  # fmt: skip
def test_misspelt_flags(argv, want):
    """One line for a flag and its value, which is looked at as if the flag had been spelt right."""
    found = problems(parse, *argv)
    assert [problem[: len(start)] for problem, start in zip(found, want, strict=True)] == want


def test_data_that_is_a_folder(tmp_path):
    (problem,) = problems(parse, "--data", str(tmp_path))
    assert problem == f"a folder, not a file (--data {tmp_path}): give a JSONL file"


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices(device):
    assert parse("--level", "a1", "--device", device).base.device == device


def test_step_tokens_replace_the_recipe():
    assert parse("--level", "a1", "--step-tokens", "4096").optim.step_tokens == 4096


@pytest.mark.parametrize(
    ("content", "why"), [(None, "No such file"), (b"= 3", "not TOML"), (b"a = '\xff'", "not TOML")]
)
def test_config_file_problems(data, tmp_path, content, why):
    """Told together with the other problems."""
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    found = problems(parse, *data, "--config", str(path), "--lora-rank", "0")
    assert len(found) == 2
    assert found[0].startswith(why)
    assert f"--config {path}" in found[0]


def test_resume_takes_no_other_settings(tmp_path):
    assert parse("--resume").run.resume is True
    assert parse("--resume", "--run-dir", "runs/x").run.run_dir == Path("runs/x")
    (problem,) = problems(parse, "--resume", "--lora-rank", "8", "--epochs", "2")
    assert problem.startswith("a resumed run keeps its settings (--epochs, --lora-rank)")


# --- config.json ---


def test_flat_round_trip(data):
    argv = ["--rslora", "--target-modules", "q_proj,down_proj", "--max-steps", "9", "--learning-rate", "1e-3"]
    for config in (parse("--level", "a1"), parse(*data, *argv, "--run-dir", "runs/x")):
        stored = json.loads(json.dumps(flat(config)))
        assert stored.keys() == flags_of(Config).keys()
        assert from_flat(Config, stored, "config.json") == config


def test_from_flat_problems():
    stored = flat(parse("--level", "a1")) | {"lora_rank": 0, "colour": "red", "schedule": "steps"}
    found = problems(from_flat, Config, stored, "config.json")
    assert sorted(problem.split(":")[0] for problem in found) == [
        "'steps' will not do (schedule in config.json)",
        "0 is out of range (lora_rank in config.json)",
        "no setting is called colour (config.json)",
    ]
