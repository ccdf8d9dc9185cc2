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
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import platform
import signal
import sys
import time

import numpy
import safetensors
import safetensors.torch
import tokenizers
import torch
from torch.nn import functional

from bitnet import Problem, Shape, evaluate, logits, new_weights, read_checkpoint, sample, shipped
from corpus import KINDS, Windows, checked_tokenizer, encode, read_texts, read_tokenizer, train_tokenizer
from optimisers import Adam, Muon, rate_factor, set_state

HERE = pathlib.Path(__file__).resolve().parent
PROMPTS = ("Once upon a time", "One day, a little girl", "The dog was sad because", "Tom and his mom went to the park.", "There was a big")


def write_whole(path, write):
    """The file is there in full or not at all, whatever interrupts."""
    part = path.with_name(path.name + ".part")
    write(part)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def write_text(path, text):
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


class Interruption:
    """SIGINT and SIGTERM end the training after the step that is going on; a second one at once."""

    def __init__(self):
        self.has_come = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, _frame):
        self.has_come = True
        signal.signal(number, signal.SIG_DFL)


class Training:
    def __init__(self, options):
        self.options, self.out = options, options.out
        self.device = device(options)
        self.shape = Shape(options.layers, options.width, options.heads, options.kv_heads, options.width // options.heads,
                           options.ff, options.vocabulary, options.window)
        self.n_windows = options.batch_tokens // options.window
        self.precision = {"f32": torch.float32, "bf16": torch.bfloat16}[options.gradients]
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
        self.muon = Muon({name: weight for name, weight in weights.items() if name in matrices}, self.precision)
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
                "muon_rate": options.muon_rate, "adam_rate": options.adam_rate, "gradients": options.gradients, "shape": dataclasses.asdict(self.shape),
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
        scores = logits(self.weights, self.shape, batch[:, :-1], self.precision).flatten(0, 1)
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
        with open(self.out / "losses.jsonl", "a", encoding="utf-8", buffering=1) as log:
            while self.step < options.steps:
                self.some_steps(log)
                is_end = self.step == options.steps
                if interruption.has_come or is_end or self.step % options.save_every == 0:
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
    def at_least(smallest):
        def number(text):
            if int(text) < smallest:
                raise argparse.ArgumentTypeError(f"{text} is less than {smallest}")
            return int(text)
        return number

    positive = at_least(1)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Exit codes: 0 ok, 1 failed, 2 wrong command line, 130 interrupted.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=pathlib.Path, metavar="FOLDER", help="train, and write the checkpoint to this new or empty folder")
    what.add_argument("--evaluate", type=pathlib.Path, metavar="CHECKPOINT", help="print the held-out loss of a checkpoint, as JSON")
    parser.add_argument("--resume", action="store_true", help="go on with the training in the folder of --out")
    parser.add_argument("--steps", type=positive, default=2325)
    parser.add_argument("--seed", type=at_least(0), default=1)
    parser.add_argument("--threads", type=positive, help="CPU threads [as many as there are cores]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--texts", type=pathlib.Path, default=HERE / "texts", metavar="FOLDER")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=HERE / "tokenizer.json", metavar="FILE")
    parser.add_argument("--train-tokenizer", action="store_true", help="make the vocabulary anew, from the training texts")
    parser.add_argument("--save-every", type=positive, default=50, metavar="STEPS", help="how often the state for --resume is saved [50]")
    parser.add_argument("--evaluate-every", type=at_least(0), default=250, metavar="STEPS", help="how often the held-out loss is taken; 0: at the end only [250]")
    parser.add_argument("--say-every", type=positive, default=10, metavar="STEPS", help="how often progress is shown [10]")
    parser.add_argument("--batch-tokens", type=positive, default=4096)
    parser.add_argument("--muon-rate", type=float, default=0.02, help="learning rate of the ternary matrices [0.02]")
    parser.add_argument("--adam-rate", type=float, default=0.003, help="learning rate of embedding and norms [0.003]")
    parser.add_argument("--gradients", choices=("f32", "bf16"), default="f32",
                        help="precision of the backward pass; bf16 is faster on CPUs with instructions for it [f32]")
    shape = parser.add_argument_group("shape of the model (the defaults are those of the story model)")
    for name, default in (("layers", 8), ("width", 256), ("heads", 4), ("kv-heads", 2), ("ff", 768), ("vocabulary", 4096), ("window", 256)):
        shape.add_argument(f"--{name}", type=positive, default=default)
    options = parser.parse_args()
    if options.resume and not options.out:
        parser.error("--resume goes with --out")
    return options


def keep_memory():
    """Lets glibc keep freed memory: given back, each large buffer of each operation would come anew from the kernel, page by page."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)
    mallopt(arena_max, 1)


def main():
    options = arguments()
    keep_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Asked for by the line below, on CUDA.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # Nothing here reads memory that it has not written.
    try:
        return evaluate_checkpoint(options) if options.evaluate else Training(options).run()
    except (Problem, OSError) as problem:
        print(f"train.py: {problem}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
