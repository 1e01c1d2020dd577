r"""Text to ids, and which of those ids the model is to learn: both in one place, so that they cannot drift apart.

A chat model reads a conversation as one line of text, written by the model's own chat template, a jinja2 program that
comes with its tokenizer. ChatML writes a turn like this, and Llama 3 much the same with other markers:

    <|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n
                                                                       ~~~~~~~~~~~~~~~

Only the marked part is the model's own: the answer, and the end token by which it says that it has finished. What
stands before is given (the *generation prompt*, "<|im_start|>assistant\n", too), and the newline after the end token is
never generated, because generation has stopped. So the loss is taken on the marked part alone; a model trained without
the end token never learns to stop, and one trained on the rest learns to talk like its user.

**Where an answer stands.** A template is a program, so no pattern finds the answers in its output for sure (a user may
well write "<|im_start|>assistant"). We ask the template instead, by rendering the conversation up to a turn and again
with it:

    start = len(render(messages[:i], add_generation_prompt=True))        what the model is given to answer turn i
    end   = len(render(messages[:i + 1]))                                the same, with the answer

and between them lies turn i, as long as each text is the beginning of the next and of the whole conversation. Some
templates break that rule: they write history unlike the last turn (thoughts cut out of old answers, say). Those raise
an error; a mask that is nearly right would be worse. The turn ends with the *last* special token in it, so that an
answer that quotes "<|im_end|>" stays whole.

**From characters to tokens.** The whole conversation is encoded once, which gives the ids that every other program
gives (transformers' apply_chat_template), and a token is learnt if it begins inside a marked part. Encoding the parts
one by one would cut tokens where nobody else cuts them. The price: an answer that begins with blanks may have the first
of them joined to the newline before it, and that joined token counts as given.

**Special tokens in the text.** The text "<|eot_id|>" in a message becomes the special token, here as in transformers:
the template's own markers come to us as text, too. It may confuse the model, but not the mask.

**One BOS.** Most templates write the token that begins a sequence, and most tokenizers would put one in front, which
makes two. We never let the tokenizer add anything while it encodes; if the template wrote none, and the tokenizer is
one that adds it, we do. (SmolLM2's BOS is "<|im_start|>", which opens each of its turns; only a doubled *first* token
is wrong.)

**The date.** Llama 3's template writes today's date into every conversation, so tomorrow's model would be trained on
other text than today's. Here the date is a setting.

`tokenizer.json` is what the `tokenizers` package reads. The older `tokenizer.model`, as Llama 2 has it, is read by
`sentencepiece` and turned into the same kind of object, so that there is one way to encode and one kind of offsets.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

import sentencepiece
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from lora.errors import UserError, caught
from lora.files import read_json

# What an adapter or a merged folder needs beside its weights, to be used by somebody else's program.
FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


# Who may speak. Templates know the last two under one name or the other: what a program answered.
ROLES = ("system", "user", "assistant", "tool", "ipython")

LossOn = Literal["response", "last", "full"]

_ENCODED_AT_A_TIME = 1024  # conversations: an encoding takes much more memory than its ids


class ChatIds(NamedTuple):
    """A conversation as the model reads it: the ids, and for each whether the loss counts it."""

    ids: list[int]
    mask: list[bool]


class Tokenizer:
    """A model's tokenizer and chat template; made by `Tokenizer.load(folder)`."""

    vocab_size: int  # the largest id + 1; a model's embedding may have more rows
    bos_id: int | None
    eos_id: int | None
    chat_template: str | None
    files: list[Path]

    def __init__(self, backend: tokenizers.Tokenizer, config: dict, files: list[Path], template_date: str):
        self.files = files
        self.backend = backend
        # The special tokens that have a name ("bos_token", "pad_token", ...), by which templates know them.
        named = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in config.items()
            if key.endswith("_token") and value and isinstance(value, str | dict)
        }
        for key in ("bos_token", "eos_token"):
            if key in named and backend.token_to_id(named[key]) is None:
                how = "use the tokenizer files that belong together"
                raise UserError(f"{key} {named[key]!r} is not in the vocabulary", "tokenizer_config.json", how)
        self.special_tokens = named
        self.bos_id = backend.token_to_id(named["bos_token"]) if "bos_token" in named else None
        self.eos_id = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None

        # They are special, even where tokenizer.json has them as ordinary pieces.
        listed = {token.content for token in backend.get_added_tokens_decoder().values()}
        pieces = [text for text in named.values() if text not in listed and backend.token_to_id(text) is not None]
        backend.add_special_tokens(pieces)
        self.special_ids = {
            id for id, token in backend.get_added_tokens_decoder().items() if token.special or id == self.eos_id
        }
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())

        # A tokenizer.json may carry a length at which it cuts, or to which it pads, without a word.
        backend.no_truncation()
        backend.no_padding()
        # The post-processor adds the BOS, which we do ourselves, and trims blanks off the tokens' offsets: without it,
        # the offsets of " Four" begin at the blank, as the token does.
        self.adds_bos = self.bos_id is not None and backend.encode("").ids[:1] == [self.bos_id]
        backend.post_processor = None

        template = config.get("chat_template")
        if isinstance(template, list):  # several, each for a use of its own: [{"name": ..., "template": ...}]
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        self.chat_template = template
        self.template_date = template_date
        self._template = _compile(template, template_date) if template is not None else None

    @classmethod
    def load(cls, folder: Path, template_date: str = "26 Jul 2024") -> "Tokenizer":
        """The tokenizer in a model's folder; a template that asks for today's date is given `template_date`."""
        config = _read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # older folders keep the special tokens in a file of their own
            config |= _read_json(folder / "special_tokens_map.json")
        if (folder / "chat_template.jinja").exists():  # newer folders; where both are given, the file counts
            config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")

        if (folder / "tokenizer.json").exists():
            try:
                backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the package raises nothing more exact
                raise UserError(
                    f"not a readable tokenizer: {_one_line(error)}", str(folder / "tokenizer.json"), "fetch it again"
                ) from error
        elif (folder / "tokenizer.model").exists():
            backend, config = _read_sentencepiece(folder / "tokenizer.model", config)
        else:
            raise UserError("no tokenizer.json and no tokenizer.model", str(folder), "copy the model's tokenizer there")
        return cls(backend, config, [folder / name for name in FILES if (folder / name).exists()], template_date)

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Special tokens written in it are recognised; nothing is added, no BOS either."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without the special tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def render(self, messages: list[dict], add_generation_prompt: bool = False, name: str = "messages") -> str:
        """The conversation as the chat template writes it; `name` says in errors which one it is."""
        if self._template is None:
            how = "train from an instruct model, or add its template to the folder as chat_template.jinja"
            raise UserError("the tokenizer has no chat template", name, how)
        # As in transformers: a key that is None counts as not given, and what we never have (tools) is None.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        given = {"tools": None, "documents": None, "date_string": self.template_date, **self.special_tokens}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **given)
        except Exception as error:  # a template is somebody else's program: whatever it raises is about its input
            how = "change the conversation to what the template takes"
            raise UserError(f"the chat template refuses the conversation: {_one_line(error)}", name, how) from error

    def chat(self, messages: list[dict], loss_on: LossOn, name: str) -> ChatIds:
        """A whole conversation: its ids, and as `mask` the tokens of all answers, of the last one, or of everything."""
        (found,) = self.chats([(messages, name)], loss_on)
        if isinstance(found, UserError):
            raise found
        return found

    def chats(self, conversations: Sequence[tuple[list[dict], str]], loss_on: LossOn) -> Iterator[ChatIds | UserError]:
        """`chat` of many (messages, name), in order; of one that nothing can be learnt from, the error. Encoding, half
        of the work, is done by all cores."""
        for start in range(0, len(conversations), _ENCODED_AT_A_TIME):
            some = conversations[start : start + _ENCODED_AT_A_TIME]
            written = [caught(self._write, messages, name) for messages, name in some]
            texts = [text for text in written if isinstance(text, str)]
            encodings = iter(self.backend.encode_batch(texts, add_special_tokens=False))
            for (messages, name), text in zip(some, written, strict=True):
                if isinstance(text, UserError):
                    yield text
                else:
                    yield caught(self._chat_ids, messages, loss_on, name, text, next(encodings))

    def _write(self, messages: list[dict], name: str) -> str:
        check_messages(messages, name)
        return self.render(messages, name=name)

    def _chat_ids(
        self, messages: list[dict], loss_on: LossOn, name: str, text: str, encoding: tokenizers.Encoding
    ) -> ChatIds:
        """See `chat`; text: what the template writes, and its encoding."""
        own_ids, offsets = encoding.ids, encoding.offsets  # each look at these attributes copies the list: look once
        front = self._missing_bos(own_ids, name)
        ids = front + own_ids
        if loss_on == "full":  # the first token, BOS or not, has nothing before it to be predicted from
            if len(ids) < 2:
                raise UserError("the chat template writes nothing to learn", name, "take the example out")
            return ChatIds(ids, [False] + [True] * (len(ids) - 1))

        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise UserError("no assistant turn, so nothing to learn", name, "add the answer, or use --loss-on full")
        mask = [False] * len(ids)
        for i in answers[-1:] if loss_on == "last" else answers:
            for position in self._answer(messages, i, text, own_ids, offsets, name):
                mask[len(front) + position] = True
        return ChatIds(ids, mask)

    def prompt(self, messages: list[dict], name: str) -> list[int]:
        """The ids that ask for the next answer: the turns so far and the generation prompt."""
        check_messages(messages, name)
        ids = self.encode(self.render(messages, add_generation_prompt=True, name=name))
        return self._missing_bos(ids, name) + ids

    def pieces(self, messages: list[dict], texts: list[str], name: str) -> list[list[int]]:
        """Where texts stand that follow each other in the last message: the places of their tokens in `chat(...).ids`.

        A token that has any character of a text belongs to it.
        """
        text = self.render(messages, name=name)
        encoding = self.backend.encode(text, add_special_tokens=False)
        offsets, front = encoding.offsets, len(self._missing_bos(encoding.ids, name))
        end, found = text.rindex(messages[-1]["content"].strip()), []
        for piece in texts:
            start = text.index(piece, end)
            end = start + len(piece)
            found.append([front + k for k, (b, e) in enumerate(offsets) if b < end and e > start])
        return found

    def _answer(self, messages: list[dict], i: int, text: str, ids: list[int], offsets: list, name: str) -> range:
        """The tokens of assistant turn i, its end token included, in the `ids` of the whole `text`.

        offsets: the (begin, end) of each token in the text, in characters
        """
        where = f"{name}, message {i + 1}"
        if i == 0:
            how = "put a user turn before it, or use --loss-on last or full"
            raise UserError("the conversation opens with an assistant turn, an answer to nothing", where, how)
        given = self.render(messages[:i], add_generation_prompt=True, name=name)
        turn_end = self.render(messages[: i + 1], name=name) if i + 1 < len(messages) else text
        if not (turn_end.startswith(given) and text.startswith(turn_end)):
            what = "this chat template cannot be masked: it writes the turn otherwise in another place"
            raise UserError(what, where, "use --loss-on last or full, or another template (chat_template.jinja)")

        begins = [begin for begin, _ in offsets]
        first, stop = bisect_left(begins, len(given)), bisect_left(begins, len(turn_end))
        last = max((k for k in range(first, stop) if ids[k] in self.special_ids), default=None)
        # The end token ends the turn: a special token inside the answer does not count as one.
        if last is None or text[offsets[last][1] : len(turn_end)].strip():
            what = "this chat template writes no end token after an answer, so the model would never learn to stop"
            raise UserError(what, where, "give a template that does, as chat_template.jinja in the model's folder")
        if not text[len(given) : begins[last]].strip():
            raise UserError("the assistant turn is empty", where, "fill it in or take it out")
        if text[len(given) : begins[first]].strip():
            what = "this chat template cannot be masked: its generation prompt ends inside a token of the answer"
            raise UserError(what, where, "use --loss-on full, or another template (chat_template.jinja)")
        return range(first, last + 1)

    def _missing_bos(self, ids: list[int], name: str) -> list[int]:
        """What has to come before `ids` for them to begin with one BOS: nothing or a BOS. Two are an error."""
        front = [self.bos_id] if self.adds_bos and ids[:1] != [self.bos_id] else []
        if self.bos_id is not None and ids[:2] == [self.bos_id] * 2:
            raise UserError("two BOS tokens at the beginning", name, "take one out of the text or the chat template")
        return front


def check_messages(messages: list[dict], name: str) -> None:
    """All that is wrong with the shape of a conversation, in one error."""
    if not isinstance(messages, list) or not messages:
        raise UserError("no list of messages", name, 'write [{"role": "user", "content": "..."}, ...]')
    errors = []
    for number, message in enumerate(messages, start=1):
        where = f"{name}, message {number}"
        if not isinstance(message, dict):
            errors.append(UserError("a message is not an object", where, 'write {"role": "user", "content": "..."}'))
            continue
        if (role := message.get("role")) not in ROLES:
            errors.append(UserError(f"there is no role {role!r}", where, f"give one of {', '.join(ROLES)}"))
        if not isinstance(message.get("content"), str):
            errors.append(UserError("the content is not a text", where, 'give "content" as a string'))
        elif re.search(r"[\ud800-\udfff]", message["content"]):
            errors.append(UserError("the content has half a surrogate pair", where, "write the character whole"))
    UserError.raise_all(errors)


class _GenerationTag(Extension):
    """`{% generation %}`, by which some templates mark answers for transformers: the text inside stays as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str, template_date: str):
    """The template in the sandbox and with the settings that transformers gives it, but for the date."""
    try:
        date = datetime.strptime(template_date, "%d %b %Y")
    except ValueError as error:
        raise UserError(f"{template_date!r} is not a date", "--template-date", 'write it like "26 Jul 2024"') from error

    def raise_exception(message):
        raise ValueError(message)

    def tojson(value, ensure_ascii=False, **settings):  # jinja2's own would escape <, > and & for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": date.strftime}
    try:
        return environment.from_string(template)
    except Exception as error:
        what = f"the chat template is not valid jinja2: {_one_line(error)}"
        raise UserError(what, "chat_template", "correct it in tokenizer_config.json or chat_template.jinja") from error


def _read_sentencepiece(path: Path, config: dict) -> tuple[tokenizers.Tokenizer, dict]:
    """A Llama-2-style tokenizer.model as a `tokenizers` object, and the config with the model's own tokens filled in.

    Such a model is a byte-pair encoding: a list of pieces, "▁" for the blank, each with a score; of all neighbours that
    make a piece together, those are merged first whose piece scores highest. So every way to cut a piece in two is a
    merge, and the score gives the order (not the id: runs of blanks have small ids and are merged last). Characters
    without a piece become bytes, and a blank is put in front of the text: once, or, in a model whose config says
    "legacy", after every special token, too.
    """
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.load(str(path))
    except (RuntimeError, OSError) as error:
        how = "use the folder with tokenizer.json (Meta's own tokenizer.model of Llama 3 is of another kind)"
        raise UserError("not a sentencepiece model", str(path), how) from error
    vocab = {model.id_to_piece(id): id for id in range(model.vocab_size())}
    ranked = sorted(vocab, key=lambda piece: -model.get_score(vocab[piece]))
    cuts = ((piece[:k], piece[k:]) for piece in ranked for k in range(1, len(piece)))
    merges = [(left, right) for left, right in cuts if left in vocab and right in vocab]

    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
    scheme = "always" if config.get("legacy") else "first"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    blanks, first_blank = decoders.Replace("▁", " "), decoders.Strip(content=" ", left=1)
    backend.decoder = decoders.Sequence([blanks, decoders.ByteFallback(), decoders.Fuse(), first_blank])

    # Other kinds of model (unigram, normalising, without bytes) would be read wrongly, so compare once.
    probe = "A probe:  two blanks, naïve ﬁne ② 日本 🦜\tThe end.\n"
    if model.encode(probe) != backend.encode(probe).ids:
        raise UserError("not a tokenizer.model of Llama 2's kind", str(path), "use a folder with tokenizer.json")

    named = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    config = {key: model.id_to_piece(id) for key, id in named.items() if id >= 0} | config
    tokens = {int(id): AddedToken(**token) for id, token in config.get("added_tokens_decoder", {}).items()}
    for id in range(model.vocab_size()):
        if model.is_control(id) or model.is_unknown(id):
            tokens.setdefault(id, AddedToken(model.id_to_piece(id), special=True, normalized=False))
    for id, token in sorted(tokens.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != id:
            where = f"{path.parent / 'tokenizer_config.json'}, added_tokens_decoder"
            raise UserError(f"{token.content!r} cannot have id {id}", where, "number the added tokens without gaps")
    if config.get("add_bos_token", True) and model.bos_id() >= 0:
        bos = model.id_to_piece(model.bos_id())
        backend.post_processor = processors.TemplateProcessing([bos, "$A"], special_tokens=[(bos, model.bos_id())])
    return backend, config


def _read_json(path: Path) -> dict:
    """The object in a JSON file, {} where there is no such file."""
    return read_json(path) if path.exists() else {}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
