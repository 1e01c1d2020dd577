"""Out of a GGUF: the same model, taken out of llama.cpp's dress and written as a Hugging Face folder.

A GGUF keeps quantised weights under short names, query and key rows in another order (`unpermute`), and a tokenizer as
bare vocabulary and merges (`gguf_tokenizer`). What is read here is the kind of file that SmolLM2 comes in: Llama, tied
head, byte-level BPE with single digits.
"""

from pathlib import Path

import torch
from gguf import GGUFReader, TokenType, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from lora.files import write_json

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
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

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
