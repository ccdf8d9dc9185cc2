"""The texts as stories, stories as tokens, tokens as an endless row of windows to train on."""

import dataclasses
import hashlib
import lzma
import re

import numpy
import tokenizers
import torch

from bitnet import BOS, EOS, SPECIAL, Problem

# What the texts are, by the first part of their files' names. Held-out stories are taken from `tinystories` only.
KINDS = ("generated", "tinystories", "storybooks")
STORY_END = "<|endoftext|>"  # Between two stories of a text file; it is not a token.
HELD_OUT_ONE_IN = 29


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
