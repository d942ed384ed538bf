"""A llama checkpoint written by the public safetensors package, and what its conversion must hold.

  python checkpoint.py write DIR          config.json and two shards with an index
  python checkpoint.py check DIR FILE     compares every tensor of the converted file
"""
import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file

HIDDEN, FFN, VOCAB, HEADS, KV, HEAD_DIM, LAYERS = 64, 96, 50, 4, 2, 16, 2
LAYER = {
    "input_layernorm": ("attn_norm", (HIDDEN,)),
    "self_attn.q_proj": ("attn_q", (HEADS * HEAD_DIM, HIDDEN)),
    "self_attn.k_proj": ("attn_k", (KV * HEAD_DIM, HIDDEN)),
    "self_attn.v_proj": ("attn_v", (KV * HEAD_DIM, HIDDEN)),
    "self_attn.o_proj": ("attn_output", (HIDDEN, HEADS * HEAD_DIM)),
    "post_attention_layernorm": ("ffn_norm", (HIDDEN,)),
    "mlp.gate_proj": ("ffn_gate", (FFN, HIDDEN)),
    "mlp.up_proj": ("ffn_up", (FFN, HIDDEN)),
    "mlp.down_proj": ("ffn_down", (HIDDEN, FFN)),
}


def tensors():
    """Names in the checkpoint and in the file, and values; half of them float16."""
    random = np.random.default_rng(7)
    shapes = {
        "model.embed_tokens": ("token_embd", (VOCAB, HIDDEN)),
        "model.norm": ("output_norm", (HIDDEN,)),
        "lm_head": ("output", (VOCAB, HIDDEN)),
    }
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{a}": (f"blk.{i}.{b}", shape) for a, (b, shape) in LAYER.items()}
    for n, (source, (name, shape)) in enumerate(shapes.items()):
        dtype = np.float16 if n % 2 else np.float32
        yield f"{source}.weight", f"{name}.weight", random.standard_normal(shape).astype(dtype)


def write(folder):
    folder.mkdir()
    config = dict(
        model_type="llama", vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    (folder / "config.json").write_text(json.dumps(config))
    shards = {f"model-{i + 1:05}-of-00002.safetensors": {} for i in range(2)}
    names = list(shards)
    weight_map = {}
    for n, (source, _, values) in enumerate(tensors()):
        shards[names[n % 2]][source] = values
        weight_map[source] = names[n % 2]
    for name, content in shards.items():
        save_file(content, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def interleave(values, heads):
    """Rows of each head from halves (j, j + d/2) to pairs (2j, 2j+1)."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(values.shape)


def check(file):
    found = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(file).tensors}
    for _, name, values in tensors():
        if name.endswith("attn_q.weight"):
            values = interleave(values, HEADS)
        if name.endswith("attn_k.weight"):
            values = interleave(values, KV)
        np.testing.assert_array_equal(found.pop(name), values.astype(np.float32), err_msg=name)
    assert not found, list(found)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        check(sys.argv[3])
