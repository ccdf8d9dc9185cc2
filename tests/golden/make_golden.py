#!/usr/bin/env python3
"""Makes every file of this folder that a test compares with. See README.md for the command and the formats."""

import argparse
import json
import os
import random
import shutil
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # transformers compiles its quantisers; eager is the same arithmetic.

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.integrations.bitnet import pack_weights

import golden_corpus as corpus
from golden_corpus import texts, write_json

LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
N_TOP = 10
N_GREEDY = 64


# --- Tokenizers ------------------------------------------------------------------------------------------------


def train_tokenizer(vocab_size):
    """A byte-level BPE with the llama-3 pre-tokenizer, trained on the corpus itself; ids end with the specials."""
    tok = Tokenizer(models.BPE(ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS) - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=2,
    )
    tok.train_from_iterator(corpus.NASTY + [corpus.STORY_LONG], trainer)
    # A word that only `ignore_merges` can reach: no merge makes it.
    spec = json.loads(tok.to_str())
    spec["model"]["vocab"]["\u0120unmergeable"] = len(spec["model"]["vocab"])
    tok = Tokenizer.from_str(json.dumps(spec))
    tok.add_special_tokens(SPECIALS)
    return tok


def tokenizer_cases(tok):
    cases = []
    for text in texts() + ["un unmergeable unmergeables"]:
        tok.encode_special_tokens = False
        parsed = tok.encode(text, add_special_tokens=False).ids
        tok.encode_special_tokens = True
        plain = tok.encode(text, add_special_tokens=False).ids
        tok.encode_special_tokens = False
        case = {"text": text, "ids": parsed}
        if plain != parsed:
            case["ids_as_text"] = plain
        decoded = tok.decode(parsed, skip_special_tokens=True)
        if decoded != text:
            case["decoded"] = decoded
        cases.append(case)
    return cases


def unreachable_words(tok):
    """Ordinary tokens that their own text does not encode to when `ignore_merges` is off."""
    spec = json.loads(tok.to_str())
    spec["model"]["ignore_merges"] = False
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec["added_tokens"] = []
    plain = Tokenizer.from_str(json.dumps(spec))
    byte_of = {c: b for b, c in enumerate_bytes()}
    bad = []
    for text, idx in spec["model"]["vocab"].items():
        try:
            word = bytes(byte_of[c] for c in text).decode()
        except (KeyError, UnicodeDecodeError):
            continue
        if text not in SPECIALS and plain.encode(word).ids != [idx]:
            bad.append(text)
    return bad


def enumerate_bytes():
    """GPT-2's map of bytes to printable characters."""
    shift = 0
    for b in range(256):
        if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255:
            yield b, chr(b)
        else:
            yield b, chr(256 + shift)
            shift += 1


def class_ranges(pattern):
    """Inclusive ranges of the code points that match, as this `tokenizers` sees them."""
    splitter = pre_tokenizers.Split(Regex(pattern), "removed")
    kept, ranges = set(), []
    points = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    for start in range(0, len(points), 4096):
        block = points[start:start + 4096]
        kept.update(ord(c) for piece, _ in splitter.pre_tokenize_str("".join(map(chr, block))) for c in piece)
    for c in points:
        if c in kept:
            continue
        if ranges and ranges[-1][1] == c - 1:
            ranges[-1][1] = c
        else:
            ranges.append([c, c])
    return ranges


def splits(pattern):
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated")
    return [[piece for piece, _ in splitter.pre_tokenize_str(text)] for text in texts()]


def make_tokenizer_files(out, story_path, tiny):
    story = Tokenizer.from_file(str(story_path / "tokenizer.json"))
    version = tokenizers.__version__
    bad = unreachable_words(story)
    print("story tokens out of reach without ignore_merges:", bad)
    write_json(out / "tokenizer_story.json", {"tokenizers": version, "cases": tokenizer_cases(story)})
    write_json(out / "tokenizer_tiny.json", {"tokenizers": version, "cases": tokenizer_cases(tiny)})
    write_json(out / "splits_gpt2.json", {"tokenizers": version, "texts": texts(), "splits": splits(GPT2_REGEX)})
    write_json(out / "unicode_classes.json", {
        "tokenizers": version,
        "letter": class_ranges(r"\p{L}"),
        "number": class_ranges(r"\p{N}"),
        "space": class_ranges(r"\s"),
    })


# --- Models ----------------------------------------------------------------------------------------------------


def load(path):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


@torch.no_grad()
def logits_f16_kv(model, ids):
    """The same with keys and values rounded to f16, as a half-precision KV cache does."""
    from transformers.models.bitnet import modeling_bitnet as bitnet

    def attention(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
        return eager(module, query, key.half().float(), value.half().float(), mask, scaling, dropout, **kwargs)

    eager = bitnet.eager_attention_forward
    bitnet.eager_attention_forward = attention
    try:
        return logits_of(model, ids)
    finally:
        bitnet.eager_attention_forward = eager


def top(row):
    order = np.lexsort((np.arange(len(row)), -row))[:N_TOP]
    return [[int(i), round(float(row[i]), 5)] for i in order]


@torch.no_grad()
def greedy(model, ids):
    """Ids and the distance of the best logit to the second best at each step."""
    chosen, margins, cache, inputs = [], [], None, ids
    for _ in range(N_GREEDY):
        result = model(torch.tensor([inputs]), past_key_values=cache, use_cache=True)
        row, cache = result.logits[0, -1].numpy(), result.past_key_values
        best = np.sort(row)[-2:]
        margins.append(round(float(best[1] - best[0]), 5))
        chosen.append(int(row.argmax()))
        inputs = chosen[-1:]
    return chosen, margins


def full_positions(n):
    return sorted({0, 1, n // 2, n - 1} & set(range(n)))


def make_logits(out, name, model, prompts, n_greedy_prompts):
    rows, entries = [], []
    for prompt_name, text, ids in prompts:
        logits, rounded = logits_of(model, ids), logits_f16_kv(model, ids)
        full = []
        for position in full_positions(len(ids)):
            full.append([position, len(rows), len(rows) + 1])
            rows += [logits[position], rounded[position]]
        entry = {
            "name": prompt_name, "text": text, "ids": ids, "full": full,
            "drift_max": float(np.abs(logits - rounded).max()), "drift_std": float((logits - rounded).std()),
            "argmax_differs_at": np.flatnonzero(logits.argmax(1) != rounded.argmax(1)).tolist(),
            "top": [top(row) for row in logits],
            "top_f16_kv": [top(row) for row in rounded],
        }
        if len(entries) < n_greedy_prompts:
            entry["greedy"], entry["margins"] = greedy(model, ids)
        entries.append(entry)
        print(name, prompt_name, len(ids), "tokens", {k: v for k, v in entry.items() if "dr" in k or "dif" in k})
    np.stack(rows).astype("<f4").tofile(out / f"logits_{name}.bin")
    write_json(out / f"logits_{name}.json", {
        "transformers": transformers.__version__, "torch": torch.__version__.split("+")[0],
        "n_vocab": int(rows[0].shape[0]), "prompts": entries,
    })


def make_tiny(out, tok):
    """A random two-layer checkpoint: bf16 masters in `tiny/`, the same weights packed in `tiny-packed/`."""
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    config = transformers.BitNetConfig(
        vocab_size=tok.get_vocab_size(), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, hidden_act="relu2", max_position_embeddings=512,
        rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True,
        bos_token_id=tok.token_to_id(SPECIALS[0]), eos_token_id=tok.token_to_id(SPECIALS[1]),
    )
    generator = torch.Generator().manual_seed(20261122)
    model = transformers.BitNetForCausalLM(config)
    masters, packed = {}, {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        noise = torch.randn(value.shape, generator=generator)
        if "norm" in name:
            value = (1.0 + 0.2 * noise).bfloat16()
        elif "embed" in name:
            value = (0.5 * noise).bfloat16()
        else:
            value = away_from_ties((0.05 * noise).bfloat16())
            mean = value.float().abs().mean()
            codes = (value.float() / mean).round().clamp(-1, 1)
            packed[name + "_scale"] = mean.reshape(1).bfloat16()
            packed[name] = pack_weights(codes.clone())
        masters[name] = value
        packed.setdefault(name, value)
    for folder, tensors, mode in (("tiny", masters, "online"), ("tiny-packed", packed, "offline")):
        path = out / folder
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        config.quantization_config = quantization | {"quantization_mode": mode}
        spec = config.to_dict() | {"architectures": ["BitNetForCausalLM"], "torch_dtype": "bfloat16"}
        spec.pop("transformers_version", None)
        spec.pop("dtype", None)
        (path / "config.json").write_text(json.dumps(spec, indent=1, sort_keys=True) + "\n")
        tok.save(str(path / "tokenizer.json"), pretty=False)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        print(path, (path / "model.safetensors").stat().st_size)


def away_from_ties(weight):
    """Moves weights whose rounding depends on the last bits of the mean: no |w| / mean within 1 % of one half."""
    for _ in range(8):
        mean = weight.float().abs().mean()
        ratio = weight.float().abs() / mean
        close = (ratio > 0.495) & (ratio < 0.505)
        weight = torch.where(close, weight.float() * 0.95, weight.float()).bfloat16()
    mean = weight.float().abs().mean()
    assert not (((weight.float().abs() / mean) - 0.5).abs() < 0.002).any()
    return weight


def check_ties(path):
    """How near the story model's weights come to a tie of the ternary rounding."""
    nearest = 1.0
    for name, w in load_file(path / "model.safetensors").items():
        if "proj" in name:
            w = w.float()
            nearest = min(nearest, float((w.abs() / w.abs().mean() - 0.5).abs().min()))
    print("story model: nearest |w| / mean to one half:", nearest)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--story-model", type=Path, required=True, help="folder with the story model's checkpoint")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    torch.set_num_threads(2)

    tok = train_tokenizer(700)
    make_tiny(args.out, tok)
    make_tokenizer_files(args.out, args.story_model, tok)

    rng = random.Random(7)
    n_vocab, bos = tok.get_vocab_size(), tok.token_to_id(SPECIALS[0])
    drawn = [("random-16", None, [bos] + [rng.randrange(n_vocab) for _ in range(15)]),
             ("random-100", None, [bos] + [rng.randrange(n_vocab) for _ in range(99)]),
             ("one", None, [bos])]
    make_logits(args.out, "tiny", load(args.out / "tiny"), drawn, 3)
    make_logits(args.out, "tiny_packed", load(args.out / "tiny-packed"), drawn, 3)

    check_ties(args.story_model)
    story_tok = Tokenizer.from_file(str(args.story_model / "tokenizer.json"))
    prompts = [(n, t, [0] + story_tok.encode(t).ids) for n, t in corpus.STORY_PROMPTS.items()]
    prompts.append(("long", corpus.STORY_LONG, ([0] + story_tok.encode(corpus.STORY_LONG).ids)[:200]))
    make_logits(args.out, "story", load(args.story_model), prompts, 5)


if __name__ == "__main__":
    main()
