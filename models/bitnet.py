"""The story model in PyTorch: BitNet b1.58 as bitnetd computes it, with straight-through gradients.

Sums of the ternary products are whole numbers below 2^24: exact in f32 and in int8 products, so that nothing depends on their order.
"""

import dataclasses
import json
import math

import safetensors
import safetensors.torch
import torch
from torch.nn import functional

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
BOS, EOS = 0, 1


class Problem(Exception):
    """What the user can mend; shown without a traceback."""


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


def ternary(weight):
    """Codes (-1, 0, 1) and scale by the mean magnitude of the whole tensor."""
    mean = weight.abs().double().mean().float().clamp(min=1e-5)
    scale = 1.0 / mean
    return (weight * scale).round_().clamp_(-1, 1), 1.0 / scale


def quantised(x):
    """Activations as whole numbers of eight bits (in f32), and the factor that made them, one for each token."""
    factor = 127.0 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x * factor).round_().clamp_(-128, 127), factor


def exact_product(values, codes):
    """values @ codes.T for whole numbers of eight bits: the same in int8, which is faster where the CPU has instructions for it."""
    if values.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512" and len(values) > 16:
        return torch._int_mm(values.to(torch.int8), codes.to(torch.int8).T.contiguous()).float()
    return values @ codes.T


class TernaryLinear(torch.autograd.Function):
    """Several ternary matrices with the same input, which is quantised once. Straight through: backward sees no rounding."""

    @staticmethod
    def forward(ctx, x, precision, *weights):
        values, factor = quantised(x.flatten(0, -2))
        made = [ternary(weight) for weight in weights]
        codes = torch.cat([code for code, _ in made])
        scale = torch.cat([scale.expand(len(code)) for code, scale in made])
        y = exact_product(values, codes).div_(factor).mul_(scale)
        ctx.save_for_backward(values.to(torch.int8), factor, codes.to(torch.int8), scale)
        ctx.precision, ctx.rows, ctx.shape = precision, [len(weight) for weight in weights], x.shape
        return y.view(*x.shape[:-1], -1).split(ctx.rows, dim=-1)

    @staticmethod
    def backward(ctx, *gradients):
        values, factor, codes, scale = ctx.saved_tensors
        dy = torch.cat([gradient.flatten(0, -2).to(ctx.precision) for gradient in gradients], dim=-1)
        dw = dy.T @ (values / factor).to(ctx.precision)
        dx = dy @ (codes * scale[:, None]).to(ctx.precision)
        return dx.float().view(ctx.shape), None, *dw.float().split(ctx.rows)


class Head(torch.autograd.Function):
    """x @ embedding.T, with gradients in the wanted precision."""

    @staticmethod
    def forward(ctx, x, precision, embedding):
        ctx.save_for_backward(x, embedding)
        ctx.precision = precision
        return x @ embedding.T

    @staticmethod
    def backward(ctx, dy):
        x, embedding = (tensor.to(ctx.precision) for tensor in ctx.saved_tensors)
        dy = dy.to(ctx.precision)
        return (dy @ embedding).float(), None, (dy.flatten(0, -2).T @ x.flatten(0, -2)).float()


class GatedSquare(torch.autograd.Function):
    """relu(gate)^2 * up, in fewer passes over memory than autograd would make."""

    @staticmethod
    def forward(ctx, gate, up):
        gate = gate.relu()
        ctx.save_for_backward(gate, up)
        return gate.square().mul_(up)

    @staticmethod
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        both = dh * gate
        return (both * up).mul_(2), both.mul_(gate)


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight, in fewer passes over memory than autograd would make."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        size = x.shape[-1]
        factor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return (x * factor).mul_(weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight, factor = ctx.saved_tensors
        normal = x * factor
        both = dy * normal
        along = (both @ weight).div_(x.shape[-1])[..., None]
        return (dy * weight).sub_(normal.mul_(along)).mul_(factor), both.flatten(0, -2).sum(0), None


def rope_table(shape, length, device):
    angle = torch.arange(shape.head_dim // 2, dtype=torch.float64) * (-2.0 / shape.head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * shape.rope_base ** angle
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rope(x, table):
    """NeoX: the pairs are (i, i + head_dim / 2). x: (batch, heads, tokens, head_dim)."""
    (cos, sin), (a, b) = table, x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def hidden_states(weights, shape, tokens, precision=torch.float32):
    """(batch, tokens, n_embd), after the last norm; times the embedding they are the logits."""
    n_batch, length = tokens.shape
    table = rope_table(shape, length, tokens.device)
    x = functional.embedding(tokens, weights["model.embed_tokens.weight"])
    for layer in range(shape.n_layers):
        prefix = f"model.layers.{layer}."

        def linear(x, *names):
            return TernaryLinear.apply(x, precision, *(weights[f"{prefix}{name}.weight"] for name in names))

        def norm(x, name):
            return RMSNorm.apply(x, weights[f"{prefix}{name}.weight"], shape.rms_eps)

        def heads(x):
            return x.view(n_batch, length, -1, shape.head_dim).transpose(1, 2)

        q, k, v = map(heads, linear(norm(x, "input_layernorm"), "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        shared = shape.n_heads // shape.n_kv_heads
        k, v = rope(k, table).repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        o = functional.scaled_dot_product_attention(rope(q, table), k, v, is_causal=True)
        o = norm(o.transpose(1, 2).reshape(n_batch, length, -1), "self_attn.attn_sub_norm")
        x = x + linear(o, "self_attn.o_proj")[0]
        gate, up = linear(norm(x, "post_attention_layernorm"), "mlp.gate_proj", "mlp.up_proj")
        h = norm(GatedSquare.apply(gate, up), "mlp.ffn_sub_norm")
        x = x + linear(h, "mlp.down_proj")[0]
    return RMSNorm.apply(x, weights["model.norm.weight"], shape.rms_eps)


def logits(weights, shape, tokens, precision=torch.float32):
    return Head.apply(hidden_states(weights, shape, tokens, precision), precision, weights["model.embed_tokens.weight"])


def new_weights(shape, seed):
    """Normal with deviation 0.02; norms are one."""
    random = torch.Generator().manual_seed(seed)
    names = {"model.embed_tokens.weight": (shape.n_vocab, shape.n_embd)}
    for layer in range(shape.n_layers):
        names.update(shape.ternary(layer))
    weights = {name: torch.empty(size).normal_(0.0, 0.02, generator=random) for name, size in names.items()}
    weights.update((name, torch.ones(size)) for name, size in shape.norms())
    return weights


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
