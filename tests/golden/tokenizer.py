"""A tiny byte-level BPE tokenizer in the files that checkpoints carry, with a well-known pre-tokenizer each."""
import json
from collections import Counter

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = (
    "A prompt of many tokens runs the self-decoder once and appends to the shared memory. The index scores every position, "
    "the router selects the best of them, and every cross layer attends to the same rows: that is why the cost of a token at "
    "the end of a long text is the cost of a token at its beginning. The reader of the text may ask what the model looked at."
)
SPLIT = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|%s| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_letters():
    """GPT-2's printable letter for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def learn_merges(n):
    letters = byte_letters()
    words = Counter(
        tuple(letters[b] for b in (" " * (i > 0) + word).encode()) for i, word in enumerate(TEXT.split(" "))
    )
    merges = []
    while len(merges) < n:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        pair = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(pair)
        joined = Counter()
        for word, count in words.items():
            out = []
            for letter in word:
                out[-1:] = [out[-1] + letter] if out and (out[-1], letter) == pair else [*out[-1:], letter]
            joined[tuple(out)] += count
        words = joined
    return merges


def pre_tokenizer(name):
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    if name == "gpt-2":
        return byte_level
    if name == "smollm":
        return dict(type="Sequence", pretokenizers=[dict(type="Digits", individual_digits=True), byte_level])
    digits = dict([("llama-bpe", "\\p{N}{1,3}"), ("qwen2", "\\p{N}")])[name]
    split = dict(type="Split", pattern=dict(Regex=SPLIT % digits), behavior="Isolated", invert=False)
    return dict(type="Sequence", pretokenizers=[split, byte_level | dict(use_regex=False)])


def write_tokenizer(pre, vocab_size):
    """tokenizer.json and tokenizer_config.json as bytes."""
    merges = learn_merges(vocab_size - 256 - len(SPECIAL))
    pieces = SPECIAL + list(byte_letters().values()) + ["".join(m) for m in merges]
    added = [
        dict(id=i, content=s, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for i, s in enumerate(SPECIAL)
    ]
    tokenizer = dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
        pre_tokenizer=pre_tokenizer(pre), post_processor=None,
        decoder=dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True),
        model=dict(
            type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
            fuse_unk=False, byte_fallback=False, vocab={p: i for i, p in enumerate(pieces)},
            merges=[" ".join(m) for m in merges],
        ),
    )
    config = dict(
        added_tokens_decoder={str(a["id"]): {k: v for k, v in a.items() if k != "id"} for a in added},
        bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>",
        add_bos_token=False, add_prefix_space=False, chat_template=TEMPLATE, model_max_length=1024,
        tokenizer_class="GPT2Tokenizer",
    )
    return {
        "tokenizer.json": (json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")) + "\n").encode(),
        "tokenizer_config.json": (json.dumps(config, indent=1) + "\n").encode(),
    }
