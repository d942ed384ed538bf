#!/usr/bin/env python3
"""Writes the tiny checkpoints of this folder and what the equations give for them: golden.json beside each.

  python make.py            write everything again (deterministic)
  python make.py --check    compare with what is committed, write nothing

The models and prompts are random, with weights that make attention and routing selective. A prompt is taken only if no greedy
choice and no selection hangs on a rounding error, so that a test may ask for exactly the same tokens and positions.
"""
import json
import sys
from pathlib import Path

import numpy as np

import equations
from tokenizer import write_tokenizer

HERE = Path(__file__).parent
VOCAB, GREEDY = 320, 24
MARGIN = 1e-3  # of a greedy choice, against the largest logit; a quarter of it for a selection
PROMPTS = (5, 40, 300)  # shorter than window and top_k, longer than both, longer than a page of the cache

HF = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    rms_norm_eps=1e-5, hidden_act="silu", max_position_embeddings=1024, bos_token_id=0, eos_token_id=2, pad_token_id=2,
)
YOCO = HF | dict(
    model_type="yoco_clsa", architectures=["YocoClsaForCausalLM"], num_hidden_layers=4, num_self_decoder_layers=2,
    sliding_window=16, rope_theta=10000.0,
)
FAMILIES = {
    "yoco-clsa": dict(
        config=YOCO | dict(qk_norm=True, tie_word_embeddings=False, index_head_dim=32, index_topk=12),
        run=equations.yoco_clsa, modes=("clsa", "dense", "block-4"), dtype="BF16", pre="smollm",
    ),
    "yoco-dense": dict(
        config=YOCO | dict(num_hidden_layers=3, sliding_window=8, qk_norm=False, tie_word_embeddings=True, embed_scale=2.0),
        run=equations.yoco_clsa, modes=("dense",), dtype="F16", pre="gpt-2",
    ),
    "unilm": dict(
        config=dict(
            dim=64, hidden_dim=96, n_layers=4, n_self_heads=4, n_attn_heads=2, n_attn_kv_heads=1, vocab_size=VOCAB,
            rope_theta=10000.0, norm_eps=1e-5, sliding_window=16,
        ),
        run=equations.unilm, modes=("dense",), dtype="BF16", pre="gpt-2",
    ),
    "llama": dict(
        config=HF | dict(
            model_type="llama", architectures=["LlamaForCausalLM"], num_hidden_layers=2, rope_theta=500000.0,
            tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
        ),
        run=equations.transformer, modes=("dense",), dtype="BF16", pre="llama-bpe", shards=2,
    ),
    "qwen3": dict(
        config=HF | dict(
            model_type="qwen3", architectures=["Qwen3ForCausalLM"], num_hidden_layers=2, head_dim=32,
            rope_theta=1000000.0, tie_word_embeddings=True, attention_bias=False,
        ),
        run=equations.transformer, modes=("dense",), dtype="F32 norms, BF16", pre="qwen2",
    ),
}


def shapes(name, c):
    """Tensor names and shapes of a checkpoint, as model.md section 4 lists them."""
    if name == "unilm":
        dim, ffn, kv = c["dim"], c["hidden_dim"], c["dim"] // c["n_attn_heads"] * c["n_attn_kv_heads"]
        yield from [("embed_tokens.weight", (VOCAB, dim)), ("output_projection.weight", (VOCAB, dim))]
        yield from [("layer_norm.weight", (dim,)), ("cross_decoder.kv_layer_norm.weight", (dim,))]
        yield from [(f"cross_decoder.{m}_proj.weight", (kv, dim)) for m in "kv"]
        for i in range(c["n_layers"]):
            own = i < c["n_layers"] // 2
            p = f"self_decoder.layers.{i}." if own else f"cross_decoder.layers.{i - c['n_layers'] // 2}."
            yield from [(f"{p}mixer.{m}_proj.weight", (dim, dim)) for m in (("q", "k", "v", "out") if own else ("q", "out"))]
            yield from [(f"{p}{m}_layer_norm.weight", (dim,)) for m in ("mixer", "final")]
            yield from [(f"{p}ffn.fc1.weight", (ffn, dim)), (f"{p}ffn.gate.weight", (ffn, dim)), (f"{p}ffn.fc2.weight", (dim, ffn))]
        return
    hidden, ffn, d = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    yoco = c["model_type"] == "yoco_clsa"
    yield from [("model.embed_tokens.weight", (VOCAB, hidden)), ("model.norm.weight", (hidden,))]
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (VOCAB, hidden)
    n_self = c["num_self_decoder_layers"] if yoco else c["num_hidden_layers"]
    for i in range(c["num_hidden_layers"]):
        own = i < n_self
        stack = ("self_decoder.layers" if own else "cross_decoder.layers") if yoco else "layers"
        p = f"model.{stack}.{i if own else i - n_self}."
        attn = p + ("self_attn." if own else "cross_attn.")
        yield from [(attn + "q_proj.weight", (q, hidden)), (attn + "o_proj.weight", (hidden, q))]
        if own:
            yield from [(f"{attn}{m}_proj.weight", (kv, hidden)) for m in "kv"]
        if own and (c.get("qk_norm") or c["model_type"] == "qwen3"):
            yield from [(f"{attn}{m}_norm.weight", (d,)) for m in "qk"]
        yield from [(p + "input_layernorm.weight", (hidden,)), (p + "post_attention_layernorm.weight", (hidden,))]
        yield from [(f"{p}mlp.{m}_proj.weight", (ffn, hidden)) for m in ("gate", "up")]
        yield p + "mlp.down_proj.weight", (hidden, ffn)
    if yoco:
        yield "model.shared_kv.norm.weight", (hidden,)
        yield from [(f"model.shared_kv.{m}_proj.weight", (kv, hidden)) for m in "kv"]
    if "index_topk" in c:
        yield from [(f"model.indexer.{m}_proj.weight", (c["index_head_dim"], hidden)) for m in "qk"]


def random_weight(rng, name, shape):
    if len(shape) == 1:
        return 1 + 0.2 * rng.standard_normal(shape)
    if "embed" in name:
        return 0.3 * rng.standard_normal(shape)
    # Sharp attention and large updates, so that tokens far apart matter.
    gain = 1.6 if any(m in name for m in ("q_proj", "k_proj")) else 1.2
    return gain / np.sqrt(shape[1]) * rng.standard_normal(shape)


def encode(x, dtype):
    """The stored bits and the values they stand for."""
    if dtype == "BF16":
        u = x.astype(np.float32).view(np.uint32).astype(np.uint64)
        bits = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    bits = x.astype(np.float16 if dtype == "F16" else np.float32)
    return bits, bits.astype(np.float64)


def safetensors(tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, bits) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(bits.shape), "data_offsets": [offset, offset + bits.nbytes]}
        offset += bits.nbytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + b"".join(bits.tobytes() for _, bits in tensors.values())


def margin(values, k):
    """How far the k-th largest is above the next, against the largest magnitude."""
    order = np.sort(values)[::-1]
    return (order[k - 1] - order[k]) / np.abs(order).max()


def run_case(family, weights, prompt, mode):
    """One prompt in one mode: what the last position saw, and GREEDY more tokens. None when it hangs on a rounding error."""
    c, tokens, first = family["config"], list(prompt), None
    k = c.get("index_topk", 0)
    for _ in range(GREEDY):
        trace = family["run"](weights, c, tokens, mode, k)
        first = first or trace
        if margin(trace.logits, 1) < MARGIN:
            return None
        if trace.scores is not None and len(tokens) > k:
            size = 1 if mode == "clsa" else int(mode.removeprefix("block-"))
            pooled = np.array([trace.scores[i : i + size].mean() for i in range(0, len(tokens), size)])
            if margin(pooled, k // size) < MARGIN / 4:
                return None
        tokens.append(int(np.argmax(trace.logits)))
    case = dict(prompt=list(prompt), mode=mode, greedy=tokens[len(prompt) :])
    if first.selected is not None:
        case["selected"] = first.selected
    case["logits"] = [float(f"{v:.7g}") for v in first.logits]
    if len(prompt) == PROMPTS[1]:
        case["ladder"] = {name: [float(f"{v:.7g}") for v in x] for name, x in first.ladder.items()}
    return case


def random_cases(family, weights, rng, length):
    """Random prompts of this length until one has a margin in every mode; its case in each."""
    for _ in range(200):
        prompt = rng.integers(3, VOCAB, length).tolist()
        cases = []
        for mode in family["modes"]:
            case = run_case(family, weights, prompt, mode)
            if case is None or len(set(case["greedy"])) < GREEDY // 3:
                break
            cases.append(case)
        else:
            return cases
    raise SystemExit(f"no prompt of {length} tokens has a margin in every mode")


def make(name, family):
    """Files of one family by name."""
    rng = np.random.default_rng([*name.encode()])
    tensors, weights = {}, {}
    for tensor, shape in shapes(name, family["config"]):
        kind, value = family["dtype"], random_weight(rng, tensor, shape)
        if kind.startswith("F32 norms"):
            kind = "F32" if len(shape) == 1 else "BF16"
        bits, weights[tensor] = encode(value / (8 if name == "unilm" and "embed" in tensor else 1), kind)
        tensors[tensor] = (kind, bits)
    cases = [case for length in PROMPTS for case in random_cases(family, weights, rng, length)]
    print(f"{name}: {sum(bits.size for _, bits in tensors.values())} parameters", file=sys.stderr)
    files = {"golden.json": golden_json(cases)}
    config = "params.json" if name == "unilm" else "config.json"
    files[config] = (json.dumps(family["config"], indent=1) + "\n").encode()
    names = list(tensors)
    n_shards = family.get("shards", 1)
    index = {}
    for s in range(n_shards):
        file = f"model-{s + 1:05}-of-{n_shards:05}.safetensors" if n_shards > 1 else "model.safetensors"
        mine = names[s::n_shards]
        files[file] = safetensors({n: tensors[n] for n in mine})
        index |= dict.fromkeys(mine, file)
    if n_shards > 1:
        total = sum(bits.nbytes for _, bits in tensors.values())
        whole = dict(metadata=dict(total_size=total), weight_map=dict(sorted(index.items())))
        files["model.safetensors.index.json"] = (json.dumps(whole, indent=1) + "\n").encode()
    return files | write_tokenizer(family["pre"], VOCAB)


def golden_json(cases):
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    return f'{{"cases":[\n{lines}\n]}}\n'.encode()


def main():
    check = "--check" in sys.argv[1:]
    wrong, total = [], 0
    for name, family in FAMILIES.items():
        for file, data in make(name, family).items():
            path = HERE / name / file
            total += len(data)
            if not check:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
            elif not path.is_file() or path.read_bytes() != data:
                wrong.append(str(path))
    print(f"{total} bytes", file=sys.stderr)
    if wrong:
        raise SystemExit("differ from what make.py writes: " + ", ".join(wrong))


if __name__ == "__main__":
    main()
