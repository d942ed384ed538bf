"""The equations of the supported models in float64 numpy, from the papers alone: no cache, no chunks, no shortcut.

Every function takes the weights under their checkpoint names and the config of the checkpoint, runs all layers on all
positions, and returns what the last position saw: logits, selected positions, and the residual stream after each sub-layer.
"""
import numpy as np


class Trace:
    """What the last position saw."""

    def __init__(self):
        self.ladder, self.selected, self.scores, self.logits = {}, None, None, None

    def step(self, name, x):
        self.ladder[name] = x[-1].copy()
        return x


def rms(x, w, eps):
    return w * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def silu(x):
    return x / (1 + np.exp(-x))


def heads(x, n):
    return x.reshape(x.shape[0], n, -1)


def rotate(x, frequencies, interleaved):
    """x [T, n, d]; pair j of position t turns by t * frequencies[j]."""
    angle = np.arange(len(x))[:, None, None] * frequencies
    sin, cos, half = np.sin(angle), np.cos(angle), x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (a * cos - b * sin, a * sin + b * cos)
    return np.stack(turned, -1).reshape(x.shape) if interleaved else np.concatenate(turned, -1)


def usual_frequencies(theta, d):
    return theta ** (-2 * np.arange(d // 2) / d)


def inclusive_frequencies(theta, d):
    """microsoft/unilm: the exponents run from 0 to 1 with both ends."""
    return theta ** -np.linspace(0, 1, d // 2)


def attention(q, k, v, mask):
    """q [T, n_head, d], k, v [S, n_kv, d], mask [T, S]: softmax(q k / sqrt(d)) v per head."""
    share = q.shape[1] // k.shape[1]
    out = np.empty_like(q)
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h // share].T / np.sqrt(q.shape[2])
        scores = np.where(mask, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = p / p.sum(-1, keepdims=True) @ v[:, h // share]
    return out.reshape(len(q), -1)


def causal(n, window=None):
    distance = np.arange(n)[:, None] - np.arange(n)
    return (distance >= 0) & (distance < (window or n))


def best(scores, k):
    """The k largest, equal scores by lower position, ascending."""
    return sorted(np.argsort(-np.asarray(scores), kind="stable")[:k].tolist())


def select(scores, mode, k):
    """Positions that one token attends to; None: all of them."""
    if mode == "dense" or len(scores) <= k:
        return list(range(len(scores))) if mode != "dense" else None
    if mode == "clsa":
        return best(scores, k)
    size = int(mode.removeprefix("block-"))
    blocks = [scores[i : i + size].mean() for i in range(0, len(scores), size)]
    chosen = best(blocks, max(1, k // size))
    return [s for b in chosen for s in range(b * size, min((b + 1) * size, len(scores)))]


def routing_mask(trace, qidx, kidx, mode, k):
    """Which positions each token of the cross-decoder sees."""
    n = len(qidx)
    mask = causal(n)
    if mode == "dense":
        return mask
    for t in range(n):
        scores = kidx[: t + 1] @ qidx[t]
        chosen = select(scores, mode, k)
        mask[t] = False
        mask[t, chosen] = True
    trace.selected, trace.scores = chosen, scores
    return mask


def hf_mlp(x, w, p, eps):
    b = rms(x, w[p + "post_attention_layernorm.weight"], eps)
    gated = silu(b @ w[p + "mlp.gate_proj.weight"].T) * (b @ w[p + "mlp.up_proj.weight"].T)
    return x + gated @ w[p + "mlp.down_proj.weight"].T


def hf_self_attention(x, w, p, c, window, qk_norm):
    """One layer of the self-decoder, or of a Transformer."""
    eps, n_head, n_kv, d = c["rms_norm_eps"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    a = rms(x, w[p + "input_layernorm.weight"], eps)
    q, k, v = (a @ w[f"{p}self_attn.{m}_proj.weight"].T for m in "qkv")
    q, k, v = heads(q, n_head), heads(k, n_kv), heads(v, n_kv)
    if qk_norm:
        q, k = rms(q, w[p + "self_attn.q_norm.weight"], eps), rms(k, w[p + "self_attn.k_norm.weight"], eps)
    frequencies = usual_frequencies(c["rope_theta"], d)
    q, k = rotate(q, frequencies, False), rotate(k, frequencies, False)
    return x + attention(q, k, v, causal(len(x), window)) @ w[p + "self_attn.o_proj.weight"].T


def output_weight(w, c):
    return w["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]


def yoco_clsa(w, c, tokens, mode, k):
    """Canonical checkpoints, with or without an indexer."""
    trace, eps = Trace(), c["rms_norm_eps"]
    n_head, n_kv, n_self = c["num_attention_heads"], c["num_key_value_heads"], c["num_self_decoder_layers"]
    x = trace.step("embed", w["model.embed_tokens.weight"][tokens] * c.get("embed_scale", 1.0))
    for i in range(n_self):
        p = f"model.self_decoder.layers.{i}."
        x = trace.step(f"attention.{i}", hf_self_attention(x, w, p, c, c["sliding_window"], c["qk_norm"]))
        x = trace.step(f"feed_forward.{i}", hf_mlp(x, w, p, eps))
    h = rms(x, w["model.shared_kv.norm.weight"], eps)
    key = heads(h @ w["model.shared_kv.k_proj.weight"].T, n_kv)
    value = heads(h @ w["model.shared_kv.v_proj.weight"].T, n_kv)
    qidx = kidx = h
    if "model.indexer.q_proj.weight" in w:
        qidx, kidx = h @ w["model.indexer.q_proj.weight"].T, h @ w["model.indexer.k_proj.weight"].T
    mask = routing_mask(trace, qidx, kidx, mode, k)
    for j in range(c["num_hidden_layers"] - n_self):
        p = f"model.cross_decoder.layers.{j}."
        a = rms(x, w[p + "input_layernorm.weight"], eps)
        q = heads(a @ w[p + "cross_attn.q_proj.weight"].T, n_head)
        x = x + attention(q, key, value, mask) @ w[p + "cross_attn.o_proj.weight"].T
        trace.step(f"attention.{n_self + j}", x)
        x = trace.step(f"feed_forward.{n_self + j}", hf_mlp(x, w, p, eps))
    trace.logits = rms(x[-1:], w["model.norm.weight"], eps)[0] @ output_weight(w, c).T
    return trace


def transformer(w, c, tokens, mode, k):
    """`llama` and, with per-head q/k norm, `qwen3`."""
    del mode, k
    trace, eps = Trace(), c["rms_norm_eps"]
    x = trace.step("embed", w["model.embed_tokens.weight"][tokens])
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        x = trace.step(f"attention.{i}", hf_self_attention(x, w, p, c, None, c["model_type"] == "qwen3"))
        x = trace.step(f"feed_forward.{i}", hf_mlp(x, w, p, eps))
    trace.logits = rms(x[-1:], w["model.norm.weight"], eps)[0] @ output_weight(w, c).T
    return trace


def unilm(w, c, tokens, mode, k):
    """YOCO under the names of microsoft/unilm, window self-decoder."""
    del mode, k
    trace, eps, theta, dim = Trace(), c["norm_eps"], c["rope_theta"], c["dim"]
    n_self_heads, n_head, n_kv = c["n_self_heads"], c["n_attn_heads"], c["n_attn_kv_heads"]
    n_self = c["n_layers"] // 2
    self_turns = inclusive_frequencies(theta, dim // n_self_heads)
    cross_turns = inclusive_frequencies(theta, dim // n_head)

    def ffn(x, p):
        b = rms(x, w[p + "final_layer_norm.weight"], eps)
        return x + (silu(b @ w[p + "ffn.fc1.weight"].T) * (b @ w[p + "ffn.gate.weight"].T)) @ w[p + "ffn.fc2.weight"].T

    x = trace.step("embed", w["embed_tokens.weight"][tokens] * np.sqrt(dim))
    for i in range(n_self):
        p = f"self_decoder.layers.{i}."
        a = rms(x, w[p + "mixer_layer_norm.weight"], eps)
        q, key, value = (heads(a @ w[f"{p}mixer.{m}_proj.weight"].T, n_self_heads) for m in "qkv")
        q, key = rotate(q, self_turns, True), rotate(key, self_turns, True)
        o = attention(q, key, value, causal(len(x), c["sliding_window"]))
        x = trace.step(f"attention.{i}", x + o @ w[p + "mixer.out_proj.weight"].T)
        x = trace.step(f"feed_forward.{i}", ffn(x, p))
    h = rms(x, w["cross_decoder.kv_layer_norm.weight"], eps)
    key = rotate(heads(h @ w["cross_decoder.k_proj.weight"].T, n_kv), cross_turns, True)
    value = heads(h @ w["cross_decoder.v_proj.weight"].T, n_kv)
    for j in range(c["n_layers"] - n_self):
        p = f"cross_decoder.layers.{j}."
        a = rms(x, w[p + "mixer_layer_norm.weight"], eps)
        q = rotate(heads(a @ w[p + "mixer.q_proj.weight"].T, n_head), cross_turns, True)
        o = attention(q, key, value, causal(len(x)))
        x = trace.step(f"attention.{n_self + j}", x + o @ w[p + "mixer.out_proj.weight"].T)
        x = trace.step(f"feed_forward.{n_self + j}", ffn(x, p))
    trace.logits = rms(x[-1:], w["layer_norm.weight"], eps)[0] @ w["output_projection.weight"].T
    return trace
