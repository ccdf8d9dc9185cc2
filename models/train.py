#!/usr/bin/env python3
"""Trains the built-in story model: from the texts beside this file to a checkpoint that `bitnetd model convert` takes.

    pip install -r models/requirements.txt
    models/train.py --out story-model                       # the whole training; see models/README.md for how long it takes
    models/train.py --out story-model --resume              # goes on after an interruption, to the same result
    models/train.py --evaluate story-model                  # the held-out loss of a checkpoint
    bitnetd model convert story-model story.gguf && bitnetd run -m story.gguf -p "Once upon a time"

The folder written is a Hugging Face checkpoint (`BitNetForCausalLM`: config.json, model.safetensors with bf16 master weights,
tokenizer.json) with training.json (recipe, shares of the texts, held-out losses), losses.jsonl and samples.txt beside it.
The same seed, versions, threads and machine give the same bytes, interrupted or not.
"""

import argparse
import dataclasses
import hashlib
import json
import lzma
import math
import os
import pathlib
import platform
import re
import signal
import sys
import time

import numpy
import safetensors
import safetensors.torch
import tokenizers
import torch
from torch.nn import functional

HERE = pathlib.Path(__file__).resolve().parent
# What the texts are, by the first part of their files' names. Held-out stories are taken from `tinystories` only.
KINDS = ("generated", "tinystories", "storybooks")
STORY_END = "<|endoftext|>"  # Between two stories of a text file; it is not a token.
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
BOS, EOS = 0, 1
HELD_OUT_ONE_IN = 29
PROMPTS = ("Once upon a time", "One day, a little girl", "The dog was sad because", "Tom and his mom went to the park.", "There was a big")


class Problem(Exception):
    """What the user can mend; shown without a traceback."""


# Shape

@dataclasses.dataclass(frozen=True)
class Shape:
    n_layers: int = 8
    n_embd: int = 256
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 64
    n_ff: int = 768
    n_vocab: int = 4096
    n_ctx: int = 256
    rope_base: float = 10000.0
    rms_eps: float = 1e-5

    def problem(self):
        """Why no model can have this shape, or None."""
        if min(dataclasses.astuple(self)) <= 0:
            return "every number of the shape must be positive"
        if self.n_embd % 128 or self.n_ff % 128:
            return f"width {self.n_embd} and feed-forward {self.n_ff} must be multiples of 128, the block of I2_S"
        if self.n_heads * self.head_dim != self.n_embd:
            return f"{self.n_heads} heads of {self.head_dim} do not make a width of {self.n_embd}"
        if self.n_heads % self.n_kv_heads:
            return f"{self.n_heads} heads cannot share {self.n_kv_heads} key/value heads"
        return None

    def ternary(self, layer):
        """The ternary matrices of a layer: name and (outputs, inputs)."""
        prefix, kv = f"model.layers.{layer}.", self.n_kv_heads * self.head_dim
        return {
            prefix + "self_attn.q_proj.weight": (self.n_embd, self.n_embd),
            prefix + "self_attn.k_proj.weight": (kv, self.n_embd),
            prefix + "self_attn.v_proj.weight": (kv, self.n_embd),
            prefix + "self_attn.o_proj.weight": (self.n_embd, self.n_embd),
            prefix + "mlp.gate_proj.weight": (self.n_ff, self.n_embd),
            prefix + "mlp.up_proj.weight": (self.n_ff, self.n_embd),
            prefix + "mlp.down_proj.weight": (self.n_embd, self.n_ff),
        }

    def norms(self):
        for layer in range(self.n_layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", self.n_embd
            yield prefix + "self_attn.attn_sub_norm.weight", self.n_embd
            yield prefix + "post_attention_layernorm.weight", self.n_embd
            yield prefix + "mlp.ffn_sub_norm.weight", self.n_ff
        yield "model.norm.weight", self.n_embd

    def config(self):
        """config.json, as `transformers` and bitnetd read it."""
        return {
            "architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "hidden_act": "relu2",
            "hidden_size": self.n_embd, "intermediate_size": self.n_ff, "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads, "num_key_value_heads": self.n_kv_heads, "head_dim": self.head_dim,
            "max_position_embeddings": self.n_ctx, "rms_norm_eps": self.rms_eps, "rope_theta": self.rope_base,
            "vocab_size": self.n_vocab, "tie_word_embeddings": True, "bos_token_id": BOS, "eos_token_id": EOS,
            "initializer_range": 0.02, "attention_bias": False, "attention_dropout": 0.0, "use_cache": True,
            "torch_dtype": "bfloat16",
            "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"},
        }

    @staticmethod
    def from_config(path):
        raw = read_json(path)
        if raw.get("model_type") != "bitnet" or raw.get("hidden_act") != "relu2" or not raw.get("tie_word_embeddings"):
            raise Problem(f"{path}: not a `bitnet` model with `relu2` and a tied embedding")
        keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                "intermediate_size", "vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps")
        missing = [key for key in keys if key not in raw]
        if missing:
            raise Problem(f"{path}: no `{missing[0]}`")
        return Shape(*(raw[key] for key in keys))


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Problem(f"cannot read {path}: {error}") from error


# Texts and tokens

@dataclasses.dataclass(frozen=True)
class Texts:
    """The stories, by kind. `held_out` is never trained on, neither by the model nor by the vocabulary."""
    train: dict  # kind -> stories
    held_out: list
    sha256: str  # Over every story in order, and on which side it is.


# Some of the stories came through a wrong decoding (UTF-8 read as Windows-1252); typographic marks become the plain ones.
BROKEN = (("â€œ", '"'), ("â€™", "'"), ("â€˜", "'"), ("â€\u201c", "-"), ("â€\u201d", "-"), ("â€\u0160", " "), ("â€", '"'))
PLAIN = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u00b4": "'", "\u2013": "-", "\u2014": "-",
                       "\u2015": "-", "\u00a0": " ", "\u2003": " ", "\u2029": "\n"})


def tidied(text):
    for broken, mark in BROKEN:
        text = text.replace(broken, mark)
    return re.sub(" *\n *", "\n", re.sub("[ \t]+", " ", text.translate(PLAIN)))


def is_held_out(story):
    """By its own text, so that neither order nor file matters."""
    return int.from_bytes(hashlib.sha256(story.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def read_texts(folder):
    files = sorted(folder.glob("*.txt.xz")) + sorted(folder.glob("*.txt"))
    train, held_out, seen, digest = {kind: [] for kind in KINDS}, [], set(), hashlib.sha256()
    for path in files:
        kind = next((kind for kind in KINDS if path.name.startswith(kind)), None)
        if kind is None:
            raise Problem(f"{path}: the name must begin with one of {', '.join(KINDS)}")
        try:
            data = path.read_bytes()
            text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
        except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
            raise Problem(f"cannot read {path}: {error}") from error
        for story in (part.strip() for part in tidied(text).split(STORY_END)):
            if not story or story in seen:
                continue
            seen.add(story)
            is_out = kind == "tinystories" and is_held_out(story)
            (held_out if is_out else train[kind]).append(story)
            digest.update(f"{kind} {is_out} {len(story)} {story}\n".encode())
    if not held_out or not any(train.values()):
        raise Problem(f"{folder}: no stories to train with, or none to hold out; it needs tinystories*.txt or .txt.xz")
    return Texts(train, held_out, digest.hexdigest())


def train_tokenizer(texts, n_vocab):
    """A byte-level BPE with the pre-tokenizer of Llama 3, which bitnetd knows as `llama-bpe`."""
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n_vocab, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator((story for kind in KINDS for story in texts.train[kind]), trainer)
    return tokenizer


def read_tokenizer(path, n_vocab):
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises a bare Exception.
        raise Problem(f"cannot read {path}: {error}") from error
    return checked_tokenizer(tokenizer, path, n_vocab)


def checked_tokenizer(tokenizer, name, n_vocab):
    if tokenizer.get_vocab_size() != n_vocab:
        raise Problem(f"{name}: {tokenizer.get_vocab_size()} tokens, but the model has a vocabulary of {n_vocab}")
    for token_id, token in enumerate(SPECIAL):
        if tokenizer.token_to_id(token) != token_id:
            raise Problem(f"{name}: `{token}` is not token {token_id}")
    return tokenizer


def encode(tokenizer, stories):
    """Each story as its tokens between BOS and EOS."""
    encodings = tokenizer.encode_batch(stories, add_special_tokens=False)
    return [numpy.array([BOS, *encoding.ids, EOS], dtype=numpy.int64) for encoding in encodings]


class Windows:
    """The training tokens as an endless row of windows: any one of them follows from the seed and its number alone.

    In an epoch every story comes once: in a new order, one after another, cut into windows, and these shuffled too.
    """

    def __init__(self, stories, n_ctx, seed):
        self.stories, self.n_ctx, self.seed = stories, n_ctx, seed
        self.per_epoch = (sum(map(len, stories)) - 1) // n_ctx
        if self.per_epoch < 1:
            raise Problem(f"the texts do not fill one window of {n_ctx} tokens")
        self.epoch, self.tokens, self.order = None, None, None

    def window(self, number):
        """(n_ctx + 1) tokens: the last is only predicted."""
        epoch, at = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            random = numpy.random.default_rng([self.seed, epoch])
            self.tokens = numpy.concatenate([self.stories[i] for i in random.permutation(len(self.stories))])
            self.order, self.epoch = random.permutation(self.per_epoch), epoch
        begin = self.order[at] * self.n_ctx
        return self.tokens[begin:begin + self.n_ctx + 1]

    def batch(self, step, n_windows):
        windows = [self.window(step * n_windows + i) for i in range(n_windows)]
        return torch.from_numpy(numpy.stack(windows))


# The model: FORMAT as bitnetd computes it. Integers below 2^24 are exact in f32, so that the sums of the ternary products are too.

def ternary(weight):
    """Codes (-1, 0, 1) and scale by the mean magnitude of the whole tensor."""
    mean = weight.abs().double().mean().float().clamp(min=1e-5)
    scale = 1.0 / mean
    return (weight * scale).round_().clamp_(-1, 1), 1.0 / scale


def quantised(x):
    """Activations as whole numbers of eight bits (in f32), and the factor that made them, one for each token."""
    factor = 127.0 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x * factor).round_().clamp_(-128, 127), factor


class TernaryLinear(torch.autograd.Function):
    """Several ternary matrices with the same input, which is quantised once. Straight through: backward sees no rounding."""

    @staticmethod
    def forward(ctx, x, *weights):
        values, factor = quantised(x)
        made = [ternary(weight) for weight in weights]
        codes = torch.cat([code for code, _ in made])
        scale = torch.cat([scale.expand(len(code)) for code, scale in made])
        ctx.save_for_backward(values, factor, codes, scale)
        ctx.rows = [len(weight) for weight in weights]
        y = (values @ codes.T).div_(factor).mul_(scale)
        return y.split(ctx.rows, dim=-1)

    @staticmethod
    def backward(ctx, *gradients):
        values, factor, codes, scale = ctx.saved_tensors
        dy = torch.cat(gradients, dim=-1)
        dw = (dy / factor).flatten(0, -2).T @ values.flatten(0, -2)
        return (dy * scale) @ codes, *dw.split(ctx.rows)


def rms_norm(x, weight, eps):
    return functional.rms_norm(x, weight.shape, weight, eps)


def rope_table(shape, length, device):
    angle = torch.arange(shape.head_dim // 2, dtype=torch.float64) * (-2.0 / shape.head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * shape.rope_base ** angle
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rope(x, table):
    """NeoX: the pairs are (i, i + head_dim / 2). x: (batch, heads, tokens, head_dim)."""
    (cos, sin), (a, b) = table, x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def hidden_states(weights, shape, tokens):
    """(batch, tokens, n_embd), after the last norm; times the embedding they are the logits."""
    n_batch, length = tokens.shape
    table = rope_table(shape, length, tokens.device)
    x = functional.embedding(tokens, weights["model.embed_tokens.weight"])
    for layer in range(shape.n_layers):
        prefix = f"model.layers.{layer}."

        def linear(x, *names):
            return TernaryLinear.apply(x, *(weights[f"{prefix}{name}.weight"] for name in names))

        def norm(x, name):
            return rms_norm(x, weights[f"{prefix}{name}.weight"], shape.rms_eps)

        def heads(x):
            return x.view(n_batch, length, -1, shape.head_dim).transpose(1, 2)

        q, k, v = map(heads, linear(norm(x, "input_layernorm"), "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        shared = shape.n_heads // shape.n_kv_heads
        k, v = rope(k, table).repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        o = functional.scaled_dot_product_attention(rope(q, table), k, v, is_causal=True)
        o = norm(o.transpose(1, 2).reshape(n_batch, length, -1), "self_attn.attn_sub_norm")
        x = x + linear(o, "self_attn.o_proj")[0]
        gate, up = linear(norm(x, "post_attention_layernorm"), "mlp.gate_proj", "mlp.up_proj")
        h = norm(functional.relu(gate).square() * up, "mlp.ffn_sub_norm")
        x = x + linear(h, "mlp.down_proj")[0]
    return rms_norm(x, weights["model.norm.weight"], shape.rms_eps)


def logits(weights, shape, tokens):
    return hidden_states(weights, shape, tokens) @ weights["model.embed_tokens.weight"].T


def new_weights(shape, seed):
    """Normal with deviation 0.02; norms are one."""
    random = torch.Generator().manual_seed(seed)
    names = {"model.embed_tokens.weight": (shape.n_vocab, shape.n_embd)}
    for layer in range(shape.n_layers):
        names.update(shape.ternary(layer))
    weights = {name: torch.empty(size).normal_(0.0, 0.02, generator=random) for name, size in names.items()}
    weights.update((name, torch.ones(size)) for name, size in shape.norms())
    return weights


# Optimisers

class Muon:
    """Momentum, made orthogonal by a Newton-Schulz iteration: each step changes a matrix by the same amount in every direction."""

    MOMENTUM = 0.95
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, weights):
        self.momentum = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.groups = {}  # Matrices of one size, wide side last, are made orthogonal together.
        for name, weight in weights.items():
            self.groups.setdefault(tuple(sorted(weight.shape)), []).append(name)

    @torch.no_grad()
    def step(self, weights, rate):
        for names in self.groups.values():
            updates = []
            for name in names:
                gradient, momentum = weights[name].grad, self.momentum[name]
                momentum.lerp_(gradient, 1 - self.MOMENTUM)
                update = gradient.lerp(momentum, self.MOMENTUM)  # Nesterov's.
                updates.append(update.T if update.shape[0] > update.shape[1] else update)
            for name, update in zip(names, self.orthogonal(torch.stack(updates))):
                weight = weights[name]
                is_tall = weight.shape[0] > weight.shape[1]
                gain = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.add_(update.T if is_tall else update, alpha=-rate * gain)

    def orthogonal(self, x):
        a, b, c = self.COEFFICIENTS
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x

    def state(self):
        return {"momentum": self.momentum}


class Adam:
    BETAS, EPSILON = (0.9, 0.95), 1e-8

    def __init__(self, weights):
        self.mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.square = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.n_steps = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def step(self, weights, rate):
        self.n_steps += 1
        first, second = (1 - beta ** int(self.n_steps) for beta in self.BETAS)
        for name, mean in self.mean.items():
            gradient, square = weights[name].grad, self.square[name]
            mean.lerp_(gradient, 1 - self.BETAS[0])
            square.lerp_(gradient.square(), 1 - self.BETAS[1])
            weights[name].addcdiv_(mean, (square / second).sqrt_().add_(self.EPSILON), value=-rate / first)

    def state(self):
        return {"mean": self.mean, "square": self.square, "n_steps": self.n_steps}


def set_state(optimiser, state):
    """Copies a loaded state over that of a new optimiser, which has the right sizes and device."""
    for key, now in optimiser.state().items():
        if isinstance(now, dict):
            for name, tensor in now.items():
                tensor.copy_(state[key][name])
        else:
            now.copy_(state[key])


def rate_factor(step, n_steps):
    """One for the first half, then down to nothing in a straight line."""
    return min(1.0, 2.0 * (1.0 - step / n_steps))


# Held-out loss and samples

@torch.no_grad()
def evaluate(weights, shape, stories, texts, batch_tokens, device):
    """Mean over every token of every story after BOS, EOS among them; a story longer than the window goes on in a new one.

    Bits per byte: all bits over the bytes of the stories.
    """
    groups, total, n_tokens = {}, 0.0, 0
    for tokens in stories:
        for begin in range(0, len(tokens) - 1, shape.n_ctx):
            part = tokens[begin:begin + shape.n_ctx + 1]
            groups.setdefault(len(part), []).append(part)
    # Shorter ones are filled up at the end, where nothing that counts can see it.
    parts = [part for _, group in sorted(groups.items()) for part in group]
    n_windows = max(1, batch_tokens // shape.n_ctx)
    for begin in range(0, len(parts), n_windows):
        some = parts[begin:begin + n_windows]
        longest = max(map(len, some))
        inputs = torch.full((len(some), longest - 1), EOS)
        targets = torch.full((len(some), longest - 1), -1)
        for row, part in enumerate(some):
            inputs[row, :len(part) - 1] = torch.from_numpy(part[:-1])
            targets[row, :len(part) - 1] = torch.from_numpy(part[1:])
        scores = logits(weights, shape, inputs.to(device)).flatten(0, 1)
        total += functional.cross_entropy(scores, targets.flatten().to(device), ignore_index=-1, reduction="sum").item()
        n_tokens += sum(len(part) - 1 for part in some)
    n_bytes = sum(len(text.encode()) for text in texts)
    loss = total / n_tokens
    return {"nats_per_token": round(loss, 4), "perplexity": round(math.exp(loss), 2),
            "bits_per_byte": round(total / math.log(2) / n_bytes, 4), "n_stories": len(stories), "n_tokens": n_tokens,
            "n_bytes": n_bytes}


@torch.no_grad()
def sample(weights, shape, tokenizer, prompt, random, device, temperature=0.8, n_tokens=160):
    tokens = [BOS, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    n_prompt = len(tokens)
    while len(tokens) < min(shape.n_ctx, n_prompt + n_tokens):
        scores = logits(weights, shape, torch.tensor([tokens], device=device))[0, -1].cpu()
        token = int(torch.multinomial(functional.softmax(scores / temperature, -1), 1, generator=random))
        if token == EOS:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[1:])


# Files

def write_whole(path, write):
    """The file is there in full or not at all, whatever interrupts."""
    part = path.with_name(path.name + ".part")
    write(part)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def write_text(path, text):
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def shipped(weights):
    """The weights as they are stored: rounded to bf16."""
    return {name: weight.detach().to(torch.bfloat16) for name, weight in weights.items()}


def read_checkpoint(folder, device):
    shape = Shape.from_config(folder / "config.json")
    try:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise Problem(f"cannot read {folder / 'model.safetensors'}: {error}") from error
    expected = {name: tuple(weight.shape) for name, weight in new_weights(shape, 0).items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise Problem(f"{folder}: tensor `{name}` is {found.get(name)}, its config.json asks for {expected.get(name)}")
    return shape, {name: weight.float().to(device) for name, weight in weights.items()}


class Interruption:
    """SIGINT and SIGTERM end the training after the step that is going on; a second one at once."""

    def __init__(self):
        self.has_come = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, _frame):
        self.has_come = True
        signal.signal(number, signal.SIG_DFL)


# The training

class Training:
    def __init__(self, options):
        self.options, self.out = options, options.out
        self.device = device(options)
        self.shape = Shape(options.layers, options.width, options.heads, options.kv_heads, options.width // options.heads,
                           options.ff, options.vocabulary, options.window)
        self.n_windows = options.batch_tokens // options.window
        problem = self.shape.problem() or (None if self.n_windows else "a batch must hold at least one window")
        if problem:
            raise Problem(problem)
        self.texts = read_texts(options.texts)
        self.prepare_folder()
        if options.train_tokenizer:
            tokenizer = train_tokenizer(self.texts, self.shape.n_vocab)
            self.tokenizer = checked_tokenizer(tokenizer, "the vocabulary of these texts", self.shape.n_vocab)
        else:
            self.tokenizer = read_tokenizer(options.tokenizer, self.shape.n_vocab)
        encoded = {kind: encode(self.tokenizer, stories) for kind, stories in self.texts.train.items()}
        self.n_tokens = {kind: sum(map(len, stories)) for kind, stories in encoded.items()}
        self.held_out = encode(self.tokenizer, self.texts.held_out)
        self.windows = Windows([story for kind in KINDS for story in encoded[kind]], self.shape.n_ctx, options.seed)
        weights = {name: weight.to(self.device) for name, weight in new_weights(self.shape, options.seed).items()}
        self.weights = {name: weight.requires_grad_() for name, weight in weights.items()}
        matrices = {name for layer in range(self.shape.n_layers) for name in self.shape.ternary(layer)}
        self.muon = Muon({name: weight for name, weight in weights.items() if name in matrices})
        self.adam = Adam({name: weight for name, weight in weights.items() if name not in matrices})
        self.step, self.seconds = 0, 0.0
        self.out.mkdir(parents=True, exist_ok=True)
        if options.resume:
            self.load_state()

    def prepare_folder(self):
        """Nothing that is there already is written over, unless it is this training's own."""
        has_state = (self.out / "state.pt").exists()
        if self.options.resume and not has_state:
            is_done = (self.out / "training.json").exists()
            raise Problem(f"{self.out}: " + ("this training has ended" if is_done else "nothing to resume here: no state.pt"))
        if not self.options.resume and self.out.exists() and any(self.out.iterdir()):
            hint = "; --resume goes on with the training in it" if has_state else ""
            raise Problem(f"{self.out}: the folder is not empty{hint}")

    def recipe(self):
        """What decides the result, besides versions, threads and machine."""
        options = self.options
        return {"seed": options.seed, "steps": options.steps, "batch_tokens": self.n_windows * self.shape.n_ctx,
                "muon_rate": options.muon_rate, "adam_rate": options.adam_rate, "shape": dataclasses.asdict(self.shape),
                "texts_sha256": self.texts.sha256,
                "tokenizer_sha256": hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()}

    def save_state(self):
        state = {"recipe": json.dumps(self.recipe()), "step": self.step, "seconds": self.seconds,
                 "weights": {name: weight.detach() for name, weight in self.weights.items()},
                 "muon": self.muon.state(), "adam": self.adam.state()}
        write_whole(self.out / "state.pt", lambda part: torch.save(state, part))

    def load_state(self):
        path = self.out / "state.pt"
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # Of many kinds, by what is broken.
            raise Problem(f"cannot read {path}: {error}") from error
        then, now = json.loads(state["recipe"]), self.recipe()
        for key in now:
            if then.get(key) != now[key]:
                raise Problem(f"{path}: begun with {key} {then.get(key)}, now it is {now[key]}")
        self.step, self.seconds = state["step"], state["seconds"]
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        set_state(self.muon, state["muon"])
        set_state(self.adam, state["adam"])
        # What was written down after the state was saved is done again.
        log = self.out / "losses.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        write_text(log, "".join(line + "\n" for line in kept))

    def one_step(self):
        batch = self.windows.batch(self.step, self.n_windows).to(self.device)
        scores = logits(self.weights, self.shape, batch[:, :-1]).flatten(0, 1)
        loss = functional.cross_entropy(scores, batch[:, 1:].flatten())
        loss.backward()
        factor = rate_factor(self.step, self.options.steps)
        self.muon.step(self.weights, self.options.muon_rate * factor)
        self.adam.step(self.weights, self.options.adam_rate * factor)
        for weight in self.weights.values():
            weight.grad = None
        self.step += 1
        return loss.item()

    def held_out_loss(self, weights):
        return evaluate(weights, self.shape, self.held_out, self.texts.held_out, self.options.batch_tokens, self.device)

    def run(self):
        options, interruption = self.options, Interruption()
        share = {kind: round(n / sum(self.n_tokens.values()), 4) for kind, n in self.n_tokens.items()}
        n_weights = sum(weight.numel() for weight in self.weights.values())
        say(f"{n_weights:,} parameters; {sum(self.n_tokens.values()):,} tokens of text "
            f"({', '.join(f'{share[kind]:.0%} {kind}' for kind in KINDS)}), {len(self.held_out)} stories held out; "
            f"{options.steps} steps of {self.n_windows * self.shape.n_ctx} tokens on {self.device}, {torch.get_num_threads()} threads")
        if self.step:
            say(f"going on after step {self.step}")
        with open(self.out / "losses.jsonl", "a", encoding="utf-8") as log:
            while self.step < options.steps:
                self.some_steps(log)
                is_end = self.step == options.steps
                if interruption.has_come or is_end or self.step % options.save_every == 0:
                    log.flush()
                    self.save_state()
                if interruption.has_come and not is_end:
                    say(f"stopped after step {self.step}; --resume goes on")
                    return 130
        self.finish(share)
        return 0

    def some_steps(self, log):
        """One step, and what is said about it."""
        begun = time.monotonic()
        loss = self.one_step()
        self.seconds += time.monotonic() - begun
        line = {"step": self.step, "loss": round(loss, 4)}
        if not math.isfinite(loss):
            raise Problem(f"the loss of step {self.step} is {loss}; try lower rates")
        every = self.options.evaluate_every
        if every and self.step % every == 0 and self.step < self.options.steps:
            line["held_out"] = self.held_out_loss(self.weights)["nats_per_token"]
            say(f"step {self.step}: held-out loss {line['held_out']:.4f}")
        log.write(json.dumps(line) + "\n")
        if self.step % self.options.say_every == 0 or self.step == 1:
            each = self.seconds / self.step
            left = each * (self.options.steps - self.step) / 60
            say(f"step {self.step}/{self.options.steps} loss {loss:.4f} {each:.2f} s/step, {left:.0f} min left")

    def finish(self, share):
        """The checkpoint and what is known about it; the state goes last, so that an interruption loses nothing."""
        stored = shipped(self.weights)
        rounded = {name: weight.float() for name, weight in stored.items()}
        losses = {"float": self.held_out_loss(self.weights), "bf16": self.held_out_loss(rounded)}
        write_text(self.out / "config.json", json.dumps(self.shape.config(), indent=1) + "\n")
        write_text(self.out / "tokenizer.json", self.tokenizer.to_str(pretty=True) + "\n")
        on_cpu = {name: weight.cpu().contiguous() for name, weight in stored.items()}
        write_whole(self.out / "model.safetensors",
                    lambda part: safetensors.torch.save_file(on_cpu, part, metadata={"format": "pt"}))
        random = torch.Generator().manual_seed(self.options.seed)
        samples = [sample(rounded, self.shape, self.tokenizer, prompt, random, self.device) for prompt in PROMPTS]
        write_text(self.out / "samples.txt", "\n\n".join(samples) + "\n")
        write_text(self.out / "training.json", json.dumps({
            "recipe": self.recipe(), "tokens_trained": self.step * self.n_windows * self.shape.n_ctx,
            "share_of_training_tokens": share, "held_out_tinystories": losses,
            "minutes": round(self.seconds / 60, 1), "device": str(self.device), "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "tokenizers": tokenizers.__version__,
                         "safetensors": safetensors.__version__, "numpy": numpy.__version__},
        }, indent=1) + "\n")
        (self.out / "state.pt").unlink()
        say(f"{self.out}: held-out loss {losses['float']['nats_per_token']:.4f} nats per token, "
            f"{losses['float']['bits_per_byte']:.4f} bits per byte; {losses['bf16']['nats_per_token']:.4f} as stored, in bf16")


def say(text):
    print(text, flush=True)


def device(options):
    if options.device == "cuda" and not torch.cuda.is_available():
        raise Problem("no CUDA device here")
    is_cuda = options.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if is_cuda else "cpu")


def evaluate_checkpoint(options):
    on = device(options)
    shape, weights = read_checkpoint(options.evaluate, on)
    texts = read_texts(options.texts)
    path = options.evaluate / "tokenizer.json"
    tokenizer = read_tokenizer(path if path.exists() else options.tokenizer, shape.n_vocab)
    stories = encode(tokenizer, texts.held_out)
    print(json.dumps(evaluate(weights, shape, stories, texts.held_out, options.batch_tokens, on)))
    return 0


def arguments():
    def positive(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Exit codes: 0 ok, 1 failed, 2 wrong command line, 130 interrupted.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=pathlib.Path, metavar="FOLDER", help="train, and write the checkpoint to this new or empty folder")
    what.add_argument("--evaluate", type=pathlib.Path, metavar="CHECKPOINT", help="print the held-out loss of a checkpoint, as JSON")
    parser.add_argument("--resume", action="store_true", help="go on with the training in the folder of --out")
    parser.add_argument("--steps", type=positive, default=2325)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=positive, help="CPU threads [as many as there are cores]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--texts", type=pathlib.Path, default=HERE / "texts", metavar="FOLDER")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=HERE / "tokenizer.json", metavar="FILE")
    parser.add_argument("--train-tokenizer", action="store_true", help="make the vocabulary anew, from the training texts")
    parser.add_argument("--save-every", type=positive, default=50, metavar="STEPS", help="how often the state for --resume is saved [50]")
    parser.add_argument("--evaluate-every", type=int, default=250, metavar="STEPS", help="how often the held-out loss is taken; 0: at the end only [250]")
    parser.add_argument("--say-every", type=positive, default=10, metavar="STEPS", help="how often progress is shown [10]")
    parser.add_argument("--batch-tokens", type=positive, default=4096)
    parser.add_argument("--muon-rate", type=float, default=0.02, help="learning rate of the ternary matrices [0.02]")
    parser.add_argument("--adam-rate", type=float, default=0.003, help="learning rate of embedding and norms [0.003]")
    shape = parser.add_argument_group("shape of the model (the defaults are those of the story model)")
    for name, default in (("layers", 8), ("width", 256), ("heads", 4), ("kv-heads", 2), ("ff", 768), ("vocabulary", 4096), ("window", 256)):
        shape.add_argument(f"--{name}", type=positive, default=default)
    options = parser.parse_args()
    if options.resume and not options.out:
        parser.error("--resume goes with --out")
    return options


def main():
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Asked for by the line below, on CUDA.
    torch.use_deterministic_algorithms(True)
    try:
        return evaluate_checkpoint(options) if options.evaluate else Training(options).run()
    except Problem as problem:
        print(f"train.py: {problem}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
