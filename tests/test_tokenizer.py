"""Small tokenizers of the three kinds that Llama models come with, built here, and what `Tokenizer` makes of them."""

import json
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from lora.errors import UserError
from lora.tokenizer import Tokenizer

LINES = [
    "The capital of France is Paris. What is 2 + 2? Four. Two and two make four. Yes, sure.",
    "Hello there! Write a sentence with the word, please. I like to read a good book.",
    "user assistant system Today Date: 26 Jul 2024 [INST] [/INST] answer: naïve Übung 日本\n\n\n",
]

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n<|eot_id|>" }}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\n\n" + message.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}
{%- endif %}
"""

LLAMA2 = """\
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' -}}
{% else %}
{{ ' ' + message['content'] | trim + ' ' + eos_token -}}
{% endif %}
{% endfor %}"""

QUESTION = {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": "Four."}
TWO_TURNS = [QUESTION, ANSWER, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes, four."}]


def byte_level(folder: Path, specials: list[str], config: dict, split: str | None = None, adds: str = "") -> Path:
    """A folder with a byte-level tokenizer.json; `adds` is the token that its post-processor puts in front."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is not None:
        cut = pre_tokenizers.Split(Regex(split), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, backend.pre_tokenizer])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    backend.train_from_iterator(LINES * 3, trainer)
    steps = [processors.ByteLevel(trim_offsets=True)]  # the trimming that must not move the mask
    if adds:
        steps.append(processors.TemplateProcessing([adds, "$A"], special_tokens=[(adds, backend.token_to_id(adds))]))
    backend.post_processor = processors.Sequence(steps)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def chatml_folder(folder: Path, **config) -> Path:
    """Like SmolLM2's: the BOS is the token that opens each turn."""
    defaults = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    return byte_level(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], defaults | config)


def llama3_folder(folder: Path, **config) -> Path:
    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    defaults = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA3}
    split = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Llama 3's, a little shorter
    return byte_level(folder, specials, defaults | config, split, adds="<|begin_of_text|>")


def llama2_folder(folder: Path, model_type: str = "bpe", **config) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3),
        model_prefix=str(folder / "tokenizer"),
        model_type=model_type,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": LLAMA2} | config))
    return folder


@pytest.fixture
def chatml(tmp_path) -> Tokenizer:
    return Tokenizer.load(chatml_folder(tmp_path))


@pytest.fixture
def llama3(tmp_path) -> Tokenizer:
    return Tokenizer.load(llama3_folder(tmp_path))


@pytest.fixture
def llama2(tmp_path) -> Tokenizer:
    return Tokenizer.load(llama2_folder(tmp_path))


def learnt(tokenizer: Tokenizer, messages: list[dict], loss_on: str = "response") -> str:
    """The supervised tokens as text, special tokens kept."""
    ids, mask = tokenizer.chat(messages, loss_on, "an example")
    assert len(ids) == len(mask)
    return tokenizer.backend.decode([id for id, on in zip(ids, mask) if on], skip_special_tokens=False)


# ---- what is learnt


def test_chatml_learns_the_answers_and_their_end_tokens(chatml):
    assert learnt(chatml, TWO_TURNS) == "Four.<|im_end|>Yes, four.<|im_end|>"
    assert learnt(chatml, TWO_TURNS, "last") == "Yes, four.<|im_end|>"
    # All but the first token, which has nothing before it; the turn's opening token is a token like others.
    assert learnt(chatml, TWO_TURNS, "full") == chatml.render(TWO_TURNS).removeprefix("<|im_start|>")


def test_llama3_learns_the_answers_and_their_end_tokens(llama3):
    assert learnt(llama3, TWO_TURNS) == "Four.<|eot_id|>Yes, four.<|eot_id|>"
    assert learnt(llama3, TWO_TURNS, "last") == "Yes, four.<|eot_id|>"
    assert learnt(llama3, TWO_TURNS, "full") == llama3.render(TWO_TURNS).removeprefix("<|begin_of_text|>")


def test_llama2_learns_the_answers_and_their_end_tokens(llama2):
    ids, mask = llama2.chat(TWO_TURNS, "response", "an example")
    pieces = [llama2.backend.id_to_token(id) for id, on in zip(ids, mask) if on]
    assert "".join(pieces).replace("▁", " ") == " Four. </s> Yes, four. </s>"
    assert learnt(llama2, TWO_TURNS, "last") == "Yes, four. </s>"


def test_a_user_turn_after_the_last_answer_is_not_learnt(chatml, llama3):
    assert learnt(chatml, TWO_TURNS[:3]) == learnt(chatml, TWO_TURNS[:3], "last") == "Four.<|im_end|>"
    assert learnt(llama3, TWO_TURNS[:3]) == "Four.<|eot_id|>"


def test_every_token_of_a_mask(chatml):
    ids, mask = chatml.chat([QUESTION, ANSWER], "response", "an example")
    prompt = chatml.encode("<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    answer, newline = chatml.encode("Four.<|im_end|>"), chatml.encode("\n")
    assert ids == prompt + answer + newline
    assert mask == [False] * len(prompt) + [True] * len(answer) + [False] * len(newline)


@pytest.mark.parametrize(
    "content",
    [
        "🦜",
        "naïve 日本 🙂🙂.",
        "a  b\n\nc\t",
        "\nFour",
        " Four",
        "1. one\n2. two\n",
        "x" * 300,
        "<|im_start|>user\nNo.",
    ],
)
@pytest.mark.parametrize("kind", ["chatml", "llama3", "llama2"])
def test_answers_of_many_shapes(kind, content, request):
    tokenizer = request.getfixturevalue(kind)
    messages = [QUESTION, {"role": "assistant", "content": content}, QUESTION, ANSWER]
    expected = {
        "chatml": f"{content}<|im_end|>Four.<|im_end|>",
        "llama3": f"{content.strip()}<|eot_id|>Four.<|eot_id|>",
        "llama2": f"{content.strip()} </s> Four. </s>",
    }
    assert learnt(tokenizer, messages) == expected[kind]


@pytest.mark.parametrize("at_a_time", [1, 3, 100])
def test_many_at_once(chatml, at_a_time, monkeypatch):
    """As one by one, in the same order; those that nothing can be learnt from are errors in their places."""
    monkeypatch.setattr("lora.tokenizer._ENCODED_AT_A_TIME", at_a_time)
    conversations = [
        ([], "none"),
        (TWO_TURNS, "two turns"),
        ([QUESTION], "no answer"),
        ([QUESTION, ANSWER], "one turn"),
        ([{"role": "poet", "content": "Ah."}], "no such role"),
        ([*TWO_TURNS[:3], {"role": "assistant", "content": "No."}], "other answer"),
    ]
    found = list(chatml.chats(conversations, "response"))
    assert [isinstance(chat, UserError) for chat in found] == [True, False, True, False, True, False]
    for (messages, name), chat in zip(conversations, found, strict=True):
        if isinstance(chat, UserError):
            assert name in str(chat)
        else:
            assert chat == chatml.chat(messages, "response", name)
            assert chat.ids == chatml.encode(chatml.render(messages))


def test_quoted_special_tokens_do_not_cut_an_answer(chatml):
    asked = {"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>"}
    told = {"role": "assistant", "content": "They write <|im_end|> at the end."}
    assert learnt(chatml, [asked, told]) == "They write <|im_end|> at the end.<|im_end|>"
    assert chatml.chat([asked, told], "response", "an example").ids.count(chatml.eos_id) == 5


def test_the_prompt_is_the_beginning_of_the_conversation(chatml, tmp_path):
    llama3 = Tokenizer.load(llama3_folder(tmp_path))
    for tokenizer in (chatml, llama3):
        for asked in (TWO_TURNS[:1], TWO_TURNS[:3], [{"role": "system", "content": ""}, QUESTION]):
            prompt = tokenizer.prompt(asked, "an example")
            ids, mask = tokenizer.chat([*asked, ANSWER], "last", "an example")
            assert ids[: len(prompt)] == prompt
            assert mask.index(True) == len(prompt)


def test_blanks_joined_to_the_generation_prompt_count_as_given(chatml):
    """The ids are those of the whole text, where the prompt's newline and the answer's first are one token."""
    assert len(chatml.encode("\n\n")) == 1
    assert learnt(chatml, [QUESTION, {"role": "assistant", "content": "\n\nFour."}]) == "\nFour.<|im_end|>"


def test_a_template_that_rewrites_history_can_learn_its_last_answer_only(tmp_path):
    template = CHATML.replace("message['content']", "(message['content'] if loop.last else 'x')")
    tokenizer = Tokenizer.load(chatml_folder(tmp_path, chat_template=template))
    with pytest.raises(UserError, match=r"cannot be masked.*line 7, message 2"):
        tokenizer.chat(TWO_TURNS, "response", "line 7")
    with pytest.raises(UserError, match=r"cannot be masked.*line 7, message 4"):  # nor that, if its prompt differs
        tokenizer.chat(TWO_TURNS, "last", "line 7")
    thoughts = "(message['content'] if loop.last or message['role'] == 'user' else message['content'][7:])"
    tokenizer = Tokenizer.load(chatml_folder(tmp_path, chat_template=CHATML.replace("message['content']", thoughts)))
    answers = [{"role": "assistant", "content": "(Hm...) Four."}, {"role": "assistant", "content": "(Hm...) Yes."}]
    messages = [QUESTION, answers[0], QUESTION, answers[1]]
    with pytest.raises(UserError, match="cannot be masked"):
        tokenizer.chat(messages, "response", "line 7")
    assert learnt(tokenizer, messages, "last") == "(Hm...) Yes.<|im_end|>"


def test_a_template_that_writes_nothing(tmp_path):
    tokenizer = Tokenizer.load(chatml_folder(tmp_path, chat_template="{% if false %}{% endif %}"))
    with pytest.raises(UserError, match=r"nothing to learn \(line 3\)"):
        tokenizer.chat(TWO_TURNS, "full", "line 3")


# ---- one BOS


def test_one_bos(chatml, tmp_path):
    assert not chatml.adds_bos
    llama3 = Tokenizer.load(llama3_folder(tmp_path))
    assert llama3.chat(TWO_TURNS, "full", "an example").ids.count(llama3.bos_id) == 1
    assert llama3.encode("Hello") == llama3.encode("<|begin_of_text|>Hello")[1:]
    bare = Tokenizer.load(llama3_folder(tmp_path, chat_template=LLAMA3.replace("{{- bos_token }}\n", "")))
    for loss_on in ("response", "last", "full"):  # the template writes none, the tokenizer would: the same ids and mask
        assert bare.chat(TWO_TURNS, loss_on, "an example") == llama3.chat(TWO_TURNS, loss_on, "an example")
    assert bare.prompt([QUESTION], "an example") == llama3.prompt([QUESTION], "an example")
    never = Tokenizer.load(chatml_folder(tmp_path, bos_token="<|endoftext|>"))  # has a BOS, and nobody writes it
    assert never.bos_id not in never.chat(TWO_TURNS, "full", "an example").ids


def test_two_bos_are_an_error(tmp_path):
    tokenizer = Tokenizer.load(llama3_folder(tmp_path, chat_template="{{ bos_token }}" + LLAMA3))
    with pytest.raises(UserError, match=r"two BOS tokens.*line 3"):
        tokenizer.chat(TWO_TURNS, "response", "line 3")


# ---- the template


@pytest.mark.parametrize(
    "template", [LLAMA3, LLAMA3.replace("date_string is defined", "false"), "Today Date: {{ date_string }}\n\n"]
)
def test_the_date_is_a_setting(tmp_path, template):
    folder = llama3_folder(tmp_path, chat_template=template)
    assert "Today Date: 26 Jul 2024\n" in Tokenizer.load(folder).render([QUESTION])
    assert "Today Date: 03 May 2031\n" in Tokenizer.load(folder, "03 May 2031").render([QUESTION])


def test_a_date_that_is_none(tmp_path):
    with pytest.raises(UserError, match="'soon' is not a date"):
        Tokenizer.load(llama3_folder(tmp_path), "soon")


def test_the_template_runs_as_in_transformers(tmp_path):
    template = """\
    {% for message in messages %}
        {% if loop.index > 2 %}{% break %}{% endif %}
{{ {"text": message.content} | tojson }}{{ 'tool_calls' in message }}{% generation %}!{% endgeneration %}
    {% endfor %}
{% if tools is none and documents is none %}none{% endif %}{{ pad_token }}"""
    pad = {"content": "<|endoftext|>", "special": True}
    tokenizer = Tokenizer.load(chatml_folder(tmp_path, chat_template=template, pad_token=pad))
    messages = [{"role": "user", "content": "<ü>", "tool_calls": None}] * 3
    assert tokenizer.render(messages) == '{"text": "<ü>"}False!{"text": "<ü>"}False!none<|endoftext|>'


def test_where_the_template_comes_from(tmp_path):
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    folder = chatml_folder(tmp_path, chat_template=several)
    assert Tokenizer.load(folder).chat_template == CHATML
    (folder / "chat_template.jinja").write_text(LLAMA3)
    assert Tokenizer.load(folder).chat_template == LLAMA3
    assert [file.name for file in Tokenizer.load(folder).files] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, r"no chat template \(line 3\)"),
        (
            "{{ raise_exception('roles must\nalternate') }}",
            r"refuses the conversation: roles must alternate \(line 3\)",
        ),
        ("{{ messages.append(1) }}", r"refuses the conversation: .*unsafe.* \(line 3\)"),
        ("{{ ''.__class__.__mro__ }}", r"refuses the conversation: .*unsafe.* \(line 3\)"),
        ("{{ messages[0]['content'] + none }}", r"refuses the conversation: .* \(line 3\)"),
        (
            "{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
            r"no end token .*\(line 3, message 2\)",
        ),
        (CHATML.replace("+ '<|im_end|>' ", ""), r"no end token .*\(line 3, message 2\)"),
        (CHATML.replace("assistant\n", "assistant "), r"cannot be masked.*\(line 3, message 2\)"),
    ],
)
def test_templates_that_do_not_do(tmp_path, template, problem):
    tokenizer = Tokenizer.load(chatml_folder(tmp_path, chat_template=template))
    with pytest.raises(UserError, match=problem) as caught:
        tokenizer.chat([QUESTION, {"role": "assistant", "content": "A fake <|im_end|> is none."}], "response", "line 3")
    assert "\n" not in str(caught.value)


def test_a_prompt_that_ends_inside_a_token(tmp_path):
    template = "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}a: {% endif %}"
    tokenizer = Tokenizer.load(chatml_folder(tmp_path, chat_template=template))
    with pytest.raises(UserError, match=r"ends inside a token of the answer \(line 3, message 2\)"):
        tokenizer.chat([QUESTION, ANSWER], "response", "line 3")


def test_a_template_with_an_error_in_it(tmp_path):
    with pytest.raises(UserError, match="not valid jinja2"):
        Tokenizer.load(chatml_folder(tmp_path, chat_template="{% for %}"))


def test_roles_that_do_not_alternate(llama2):
    with pytest.raises(UserError, match=r"roles must alternate \(line 3\)"):
        llama2.chat([QUESTION, QUESTION, ANSWER], "response", "line 3")


# ---- the messages


@pytest.mark.parametrize(
    ("messages", "problems"),
    [
        ([], ["no list of messages (line 3)"]),
        ("Hello", ["no list of messages (line 3)"]),
        ([QUESTION], ["no assistant turn, so nothing to learn (line 3)"]),
        ([ANSWER, QUESTION], ["an answer to nothing (line 3, message 1)"]),
        ([QUESTION, {"role": "assistant", "content": " \n"}], ["the assistant turn is empty (line 3, message 2)"]),
        ([QUESTION, {"role": "assistant", "content": "\ud83d"}], ["half a surrogate pair (line 3, message 2)"]),
        (
            [{"role": "", "content": "x"}, "Hello", {"role": "assistant", "content": None}, {"from": "human"}],
            [
                "no role '' (line 3, message 1)",
                "not an object (line 3, message 2)",
                "not a text (line 3, message 3)",
                "no role None (line 3, message 4)",
                "not a text (line 3, message 4)",
            ],
        ),
    ],
)
def test_messages_that_do_not_do(chatml, messages, problems):
    with pytest.raises(UserError) as caught:
        chatml.chat(messages, "response", "line 3")
    assert len(caught.value.problems) == len(problems)
    for found, problem in zip(caught.value.problems, problems):
        assert problem in found


def test_other_roles_and_keys_pass_if_the_template_takes_them(chatml):
    messages = [QUESTION, {"role": "tool", "content": "4", "tool_call_id": "x", "name": None}, ANSWER]
    assert learnt(chatml, messages) == "Four.<|im_end|>"


# ---- the files


def test_ids_and_text(chatml):
    assert (chatml.vocab_size, chatml.bos_id, chatml.eos_id) == (400, 1, 2)
    text = "The naïve 🦜 reads.\n"
    assert chatml.decode(chatml.encode(text)) == text
    assert chatml.decode(chatml.encode(f"<|im_start|>{text}<|im_end|>")) == text


def test_a_tokenizer_that_would_cut_or_pad(tmp_path):
    folder = chatml_folder(tmp_path)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=100)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("Hello there! " * 9)) == "Hello there! " * 9


def test_special_tokens_by_other_ways(tmp_path):
    """As an object in the config, in a file of their own, or as a piece that tokenizer.json does not call special."""
    folder = chatml_folder(tmp_path, bos_token=None, eos_token={"content": "<|im_end|>", "special": True})
    assert (Tokenizer.load(folder).bos_id, Tokenizer.load(folder).eos_id) == (None, 2)
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<|im_start|>", "eos_token": "Four"}')
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken("Five", special=False)])
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="eos_token 'Four' is not in the vocabulary"):
        Tokenizer.load(folder)
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<|im_start|>", "eos_token": "four"}')
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (1, 401)
    assert tokenizer.encode("four") == [tokenizer.eos_id]
    assert tokenizer.decode(tokenizer.encode("Five four")) == "Five "
    (folder / "special_tokens_map.json").write_text('{"eos_token": "Five"}')
    (folder / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>", "Five"))
    assert learnt(Tokenizer.load(folder), TWO_TURNS) == "Four.FiveYes, four.Five"


def test_folders_that_hold_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    for name, content in [("tokenizer.model", "!!!!"), ("tokenizer.json", "{}"), ("tokenizer_config.json", "{")]:
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"not .*{name}"):
            Tokenizer.load(tmp_path)


# ---- sentencepiece


def test_sentencepiece_ids_are_sentencepieces_own(llama2, tmp_path):
    model = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for text in [*LINES, "a    b     c\n      d", "naïve 🦜\t日本語 ½", "x" * 99, "The capital\n\n of Paris "]:
        assert llama2.encode(text) == model.encode(text)
        assert llama2.decode(llama2.encode(text)) == text
    assert (llama2.bos_id, llama2.eos_id, llama2.vocab_size) == (1, 2, model.vocab_size())


def test_sentencepiece_merges_by_score(tmp_path):
    """The order is by score, not by id: Mistral's runs of blanks have the smallest of both, as a few pieces here."""
    folder = llama2_folder(tmp_path)
    proto = sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    merged = [piece for piece in proto.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
    for piece in merged[:5]:
        piece.score = -1e9
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    model, tokenizer = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")), Tokenizer.load(folder)
    for text in [*LINES, *(piece.piece.replace("▁", " ") for piece in merged)]:
        assert tokenizer.encode(f"a{text}") == model.encode(f"a{text}")


def test_sentencepiece_special_tokens_and_bos(llama2):
    ids = llama2.encode("<s>Hello</s> there")
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 1, 1)
    assert llama2.decode(ids) == "Hello there"
    assert llama2.adds_bos
    ids = llama2.chat(TWO_TURNS, "response", "an example").ids
    assert (ids[0], ids.count(1)) == (1, 2)  # Llama 2's template writes one for each question, but one in front


@pytest.mark.parametrize(("legacy", "pieces"), [(False, ["▁a", "</s>", "a"]), (True, ["▁a", "</s>", "▁a"])])
def test_sentencepiece_legacy(tmp_path, legacy, pieces):
    tokenizer = Tokenizer.load(llama2_folder(tmp_path, legacy=legacy, add_bos_token=False))
    assert [tokenizer.backend.id_to_token(id) for id in tokenizer.encode("a</s>a")] == pieces
    assert learnt(tokenizer, TWO_TURNS) == "Four. </s> Yes, four. </s>"
    assert not tokenizer.adds_bos


def test_sentencepiece_added_tokens(tmp_path):
    size = Tokenizer.load(llama2_folder(tmp_path)).vocab_size
    added = {size + k: {"content": text, "special": True} for k, text in enumerate(["<|im_start|>", "<|im_end|>"])}
    config = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "chat_template": CHATML}
    tokenizer = Tokenizer.load(llama2_folder(tmp_path, **config))
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (size + 1, size + 2)
    assert learnt(tokenizer, TWO_TURNS) == "Four.<|im_end|>Yes, four.<|im_end|>"
    config["added_tokens_decoder"] = {size + 5: {"content": "<|im_start|>"}}
    with pytest.raises(UserError, match=f"'<|im_start|>' cannot have id {size + 5}"):
        Tokenizer.load(llama2_folder(tmp_path, **config))


def test_sentencepiece_models_of_another_kind(tmp_path):
    with pytest.raises(UserError, match=r"not a tokenizer\.model of Llama 2"):
        Tokenizer.load(llama2_folder(tmp_path, model_type="unigram"))
