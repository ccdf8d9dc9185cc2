#!/usr/bin/env python3
"""Trains a small SentencePiece BPE vocabulary and writes what sentencepiece and tokenizers make of the corpus with it.

See README.md for the command and the formats.
"""

import io
import random
from pathlib import Path

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

import golden_corpus as corpus
from golden_corpus import texts, write_json

OUT = Path(__file__).parent
N_VOCAB = 640
SPACE = "\u2581"
NORMAL = proto.ModelProto.SentencePiece.NORMAL

# What only this kind of vocabulary stumbles over.
MORE = [
    "\u2581", "a\u2581b", "\u2581\u2581 x", " \u2581 ", "<0x41>", "<0x0A>\n<0xFF>", "<unk>", "<s>", "</s> <s>a</s>",
    " a", "  a", "   a", "a ", "a  ", " ", "  ", "the", " the", "the the  the   the", "\n", "\n\n", " \n", "\t", "\t\t x",
    "x\ny", "x \n y", "\r\n", "0", "2026", "3.14", "\u4e2d\u6587", "\U0001f600\U0001f600", "\u00e9\u00e8", "e\u0301", "aaaaaaaaaaaaaaaaaaaaaaaaa",
    "thethethethethe", "The_quick", "<tool>", "a<tool>b", " <tool> ", "<tool><tool>", "x <tool>\ny", "\x00", "\x00\x01\x1f\x7f",
]


def train():
    """The vocabulary of Llama 2 in small: text as it is, a space in front, bytes for what no piece fits."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((corpus.STORY_LONG * 8 + "\n".join(corpus.NASTY)).replace("\0", "").splitlines()),
        model_writer=model, model_type="bpe", vocab_size=N_VOCAB - 1, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_digits=True, character_coverage=0.98, num_threads=1,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )
    spec = proto.ModelProto.FromString(model.getvalue())
    # What does not matter for tokens: paths and times of the training.
    spec.trainer_spec.ClearField("input")
    spec.trainer_spec.ClearField("model_prefix")
    spec.ClearField("self_test_data")
    return spec


def without_prefix(spec):
    """The same pieces, and no space in front."""
    copy = proto.ModelProto()
    copy.CopyFrom(spec)
    copy.normalizer_spec.add_dummy_prefix = False
    return copy


def processor(spec):
    return sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())


def merges(spec):
    """Every pair of pieces that makes a piece, the highest score first: what transformers' converter writes."""
    ids = {piece.piece: idx for idx, piece in enumerate(spec.pieces) if piece.type == NORMAL}
    pairs = []
    for text, idx in ids.items():
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            if left in ids and right in ids:
                pairs.append((-spec.pieces[idx].score, -len(left), left, right))
    return [(left, right) for _, _, left, right in sorted(pairs)]


def to_tokenizers(spec, metaspace=None):
    """The `tokenizer.json` that transformers makes of it: normalizers as with `legacy`, or a Metaspace pre-tokenizer."""
    vocab = {piece.piece: idx for idx, piece in enumerate(spec.pieces)}
    tok = Tokenizer(models.BPE(vocab, merges(spec), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=metaspace, split=False)
    else:
        tok.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tok.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tok.add_tokens([AddedToken("<tool>", normalized=False)])
    return tok


def cases(spec, tok):
    """`ids` by sentencepiece; by tokenizers with its special tokens, where that says something else."""
    sp, found = processor(spec), []
    for text in texts() + MORE:
        tok.encode_special_tokens = True
        plain = tok.encode(text, add_special_tokens=False).ids
        tok.encode_special_tokens = False
        parsed = tok.encode(text, add_special_tokens=False).ids
        case = {"text": text, "ids": sp.encode(text)}
        if plain != case["ids"]:
            case["ids_as_text"] = plain
        if parsed != plain:
            case["ids_parsed"] = parsed
        decoded = sp.decode(case["ids"])
        if decoded != text:
            case["decoded"] = decoded
        found.append(case)
    return found


def main():
    spec = train()
    folder = OUT / "spm"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(spec.SerializeToString(deterministic=True))
    tok = to_tokenizers(spec)
    (folder / "tokenizer.json").write_text(tok.to_str(pretty=False) + "\n")
    sp = processor(spec)
    bare = processor(without_prefix(spec))
    write_json(OUT / "tokenizer_spm.json", {
        "sentencepiece": sentencepiece.__version__, "tokenizers": tokenizers.__version__,
        "pieces": [[piece.piece, piece.score, piece.type] for piece in spec.pieces],
        "cases": cases(spec, tok),
        "ids_without_prefix": [bare.encode(text) for text in texts() + MORE],
        "sampled": sampled(sp),
    })


def sampled(sp):
    """Tokens as a model may choose them, which no text gives, and their text."""
    rng = random.Random(20261123)
    bytes_of = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    found = []
    for _ in range(60):
        ids = []
        for _ in range(rng.randint(1, 12)):
            if rng.random() < 0.3:
                ids += [bytes_of[byte] for byte in rng.choice("é中😀ñ\n ").encode()]
            else:
                ids.append(rng.randrange(3 + 256, sp.get_piece_size()))
        found.append([ids, sp.decode(ids)])
    return found


if __name__ == "__main__":
    main()
