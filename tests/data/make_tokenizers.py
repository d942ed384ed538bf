#!/usr/bin/env python3
"""Makes tokenizers.json: two small vocabularies, texts, and their ids by the packages that define them.

    python -m venv .venv && .venv/bin/pip install tokenizers==0.23.3 sentencepiece==0.2.3
    .venv/bin/python tests/data/make_tokenizers.py

The byte-level vocabulary is trained by `tokenizers`, the other one by `sentencepiece` (BPE with byte fallback). Each is then
used the way well-known model families use theirs; `tokenizers` and `sentencepiece` say what the ids are.
"""
import io
import json
import os

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

HERE = os.path.dirname(os.path.abspath(__file__))
TRAINING = [
    "The quick brown fox jumps over the lazy dog. It's what we'd expect; they're sure you'll see that I've done it.",
    "When the river rose in the spring, the people of the valley carried their books and their bread to the old tower.",
    "def tokenize(text, special=True):\n    for word in text.split():\n        yield self.merge(word)\n    return None\n",
    "fn main() {\n    let values: Vec<u32> = (0..10).map(|x| x * x).collect();\n    println!(\"{values:?}\");\n}\n",
    "In 1969 the price was 3.50; by 2024 it had risen to 1,234,567.89 (about 12 percent each year).",
    "Größe, Straße, façade, naïve, señor, Ærøskøbing, žluťoučký kůň, Привет, как дела? Хорошо, спасибо.",
    "東京は日本の首都です。今日は天気がいいですね。 我们今天去公园。 안녕하세요 세계 여러분",
    "مرحبا بالعالم  שלום עולם  नमस्ते दुनिया  สวัสดีชาวโลก",
    "<html><body><h1>Title</h1><p>Some text &amp; more</p></body></html>",
    "the there then them their these those this that than they  and  or   but    not     with",
    "\t".join(chr(c) for c in range(0x21, 0x7F) if chr(c) not in "^`~"),
    "user assistant system tool think begin end of turn Hello! How can I help you today?",
] * 4
TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t\t x",
    " \n \n  y ",
    "Hello, world!",
    " Hello   world  ",
    "It's they're I'VE we'Ll don't 'tis 's",
    "12345 3.14159 1,000,000 007 2024-06-01 x86_64 ½ ٣٤٥",
    "def f(x):\n    return x ** 2  # comment\n\n\nclass A: pass\r\n\r\n",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\n\t}\n",
    "東京タワーは333メートルです。",
    "我们今天去公园,天气很好!",
    "안녕하세요 세계",
    "Привет, мир! Как дела?",
    "Größe Straße naïve café e\u0301 a\u0308",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "👍 👩‍👩‍👧‍👦 🇩🇪 ☃️ 😀😀😀",
    "a\u00a0b\u3000c\u2003d\u200be",
    "\u0000\u0001\u007f\u0080\uffff",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "the the  the   the    the     the",
    "https://example.org/path?query=1&other=two#frag",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "<think>\nlet me see\n</think>\n\nYes.",
    "text with <|im_end|> inside, and <|im_end and |im_end|>",
    "<s>[INST] hello [/INST] hi </s>",
    "<0x0A> <0x41> <unk>",
    "a <mask> b  <mask>  c",
    "ﬁ Å ① Ⅳ ｆｕｌｌ",
    "...!!!???---===>>><<<",
    "x\u2581y \u2581 z",
    "CamelCaseWordsAndSNAKE_CASE_WORDS",
    "\r\n\r\n a\r b\n c",
    "   leading and trailing   ",
]
GPT2_SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
GPT2_PLAIN = ["<think>", "</think>"]
MASK = "<mask>"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")


def added(content, ident, special, **flags):
    token = {"id": ident, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": special}
    return {**token, **flags}


def byte_level(regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(kind, *steps):
    return {"type": "Sequence", {"n": "normalizers", "p": "pretokenizers", "d": "decoders"}[kind]: list(steps)}


def train_byte_level():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Only the bytes that occur: like SmolLM2's, the vocabulary lacks some.
    trainer = trainers.BpeTrainer(vocab_size=900, min_frequency=2, special_tokens=GPT2_SPECIAL, show_progress=False)
    t.train_from_iterator(TRAINING, trainer)
    return json.loads(t.to_str())["model"]


def train_sentencepiece():
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TRAINING for line in text.split("\n") if line), model_writer=buffer,
        vocab_size=800, model_type="bpe", byte_fallback=True, character_coverage=0.999, normalization_rule_name="identity",
        remove_extra_whitespaces=False, user_defined_symbols=GPT2_PLAIN, add_dummy_prefix=True, minloglevel=2,
        split_digits=True, allow_whitespace_only_pieces=True)
    return sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())


def sp_type(sp, i):
    if sp.is_unknown(i):
        return 2
    if sp.is_control(i):
        return 3
    if sp.is_byte(i):
        return 6
    if sp.is_unused(i):
        return 5
    return 4 if sp.id_to_piece(i) in GPT2_PLAIN else 1


def main():
    model = train_byte_level()
    model["merges"] = [list(m) if isinstance(m, list) else m.split(" ") for m in model["merges"]]
    n = len(model["vocab"])
    special = [added(t, i, True) for i, t in enumerate(GPT2_SPECIAL)]
    plain = [added(t, n + i, False) for i, t in enumerate(GPT2_PLAIN)]
    mask = added(MASK, n + len(plain), True, lstrip=True, rstrip=True)
    normal = added("Привет", n + len(plain) + 1, False, normalized=True, single_word=True)

    sp = train_sentencepiece()
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    scores = [sp.get_score(i) for i in range(sp.vocab_size())]
    types = [sp_type(sp, i) for i in range(sp.vocab_size())]
    ids = {p: i for i, p in enumerate(pieces)}
    merges = []
    for piece, score in zip(pieces, scores):
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in ids and piece[k:] in ids]
        if types[ids[piece]] == 1:
            merges += [(-score, ids[a], ids[b], [a, b]) for a, b in pairs]
    merges = [m[3] for m in sorted(merges)]
    sp_model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                "vocab": ids, "merges": merges}
    sp_added = [added(p, i, t in (2, 3)) for i, (p, t) in enumerate(zip(pieces, types)) if t in (2, 3, 4)]
    sp_decoder = sequence("d", {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                          {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0})
    bos = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
           {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
           "special_tokens": {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}}}

    variants = {
        "smollm": {"pre_tokenizer": sequence("p", {"type": "Digits", "individual_digits": True}, byte_level(True)),
                   "decoder": byte_level(True), "added_tokens": special},
        "gpt-2": {"pre_tokenizer": byte_level(True), "decoder": byte_level(True), "added_tokens": special + plain + [mask]},
        "llama-bpe": {"pre_tokenizer": sequence("p", split(LLAMA3), byte_level(False)), "decoder": byte_level(True),
                      "added_tokens": special + plain, "post_processor": sequence("n", byte_level(True)) | {
                          "processors": [byte_level(True), bos]}, "ignore_merges": True},
        "qwen2": {"normalizer": {"type": "NFC"}, "pre_tokenizer": sequence("p", split(QWEN2), byte_level(False)),
                  "decoder": byte_level(True), "added_tokens": special + plain + [mask, normal]},
        "llama": {"model": "spm", "normalizer": sequence("n", {"type": "Prepend", "prepend": "▁"}, {
            "type": "Replace", "pattern": {"String": " "}, "content": "▁"}), "pre_tokenizer": None, "decoder": sp_decoder,
            "added_tokens": sp_added},
        "metaspace": {"model": "spm", "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first",
                      "split": False}, "decoder": sp_decoder, "added_tokens": sp_added},
    }
    out = {}
    for name, variant in variants.items():
        base = dict(sp_model if variant.get("model") == "spm" else model)
        base["ignore_merges"] = variant.get("ignore_merges", False)
        config = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": variant["added_tokens"],
                  "normalizer": variant.get("normalizer"), "pre_tokenizer": variant["pre_tokenizer"],
                  "post_processor": variant.get("post_processor"), "decoder": variant["decoder"], "model": base}
        t = Tokenizer.from_str(json.dumps(config))
        special_ids = [t.encode(text, add_special_tokens=False).ids for text in TEXTS]
        decoded = [t.decode(i, skip_special_tokens=True) for i in special_ids]
        t.encode_special_tokens = True
        plain_ids = [t.encode(text, add_special_tokens=False).ids for text in TEXTS]
        config["model"] = {"ignore_merges": base["ignore_merges"], "is": "spm" if base["byte_fallback"] else "byte_level"}
        out[name] = {"config": config, "special": special_ids, "plain": plain_ids, "decoded": decoded}
    sp_ids = [sp.encode(text) for text in TEXTS]
    path = os.path.join(HERE, "tokenizers.json")
    with open(path, "w") as f:
        json.dump({"texts": TEXTS, "byte_level": model, "spm": sp_model, "scores": scores, "types": types,
                   "sentencepiece": sp_ids, "variants": out}, f, ensure_ascii=True, separators=(",", ":"))
        f.write("\n")
    print(path, os.path.getsize(path), "bytes;", n, "byte-level tokens,", len(pieces), "pieces")


main()
