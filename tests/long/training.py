#!/usr/bin/env python3
"""Tests models/train.py: a tiny model is trained, interrupted, resumed, converted and run.

    pip install -r models/requirements.txt
    cargo build --release -p bitnetd
    tests/long/training.py --bitnetd target/release/bitnetd

Takes a minute or two. Beside that the arithmetic of the script is compared with slow twins: its straight-through gradients with
those of autograd, its Adam with torch's, and the log-probabilities of the trained model with those that bitnetd computes.
"""

import argparse
import json
import lzma
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest

import numpy
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "models" / "train.py"
TINY = ["--layers", "2", "--width", "128", "--heads", "2", "--kv-heads", "1", "--ff", "256", "--window", "64", "--batch-tokens", "512",
        "--steps", "12", "--say-every", "1", "--evaluate-every", "6", "--threads", "2", "--device", "cpu"]
OPTIONS = None

sys.path.insert(0, str(ROOT / "models"))
import bitnet, corpus, optimisers  # noqa: E401, E402


class Arithmetic(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(1)

    def test_ternary_product_and_gradients_are_those_of_the_formulas(self):
        x = torch.randn(3, 5, 128, dtype=torch.float32, requires_grad=True)
        weights = [torch.randn(n, 128, requires_grad=True) for n in (64, 32)]
        twins = [tensor.detach().clone().requires_grad_() for tensor in (x, *weights)]
        factor = 127 / twins[0].detach().abs().max(-1, keepdim=True).values
        rounded = (twins[0] * factor).round().clamp(-128, 127) / factor
        straight = twins[0] + (rounded - twins[0]).detach()
        total, twin_total = 0.0, 0.0
        for y, twin in zip(bitnet.TernaryLinear.apply(x, torch.float32, *weights), twins[1:]):
            mean = twin.detach().abs().mean()
            codes = (twin.detach() / mean).round().clamp(-1, 1) * mean
            expected = straight @ (twin + (codes - twin).detach()).T
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            total, twin_total = total + (y ** 2).sum(), twin_total + (expected ** 2).sum()
        total.backward()
        twin_total.backward()
        for tensor, twin in zip((x, *weights), twins):
            torch.testing.assert_close(tensor.grad, twin.grad, rtol=1e-3, atol=1e-2)

    def test_sums_of_the_ternary_product_are_exact(self):
        for n_tokens in (7, 64):
            values, codes = torch.randint(-128, 128, (n_tokens, 6912)), torch.randint(-1, 2, (16, 6912))
            self.assertTrue(torch.equal(bitnet.exact_product(values.float(), codes.float()).long(), values @ codes.T))

    def test_other_gradients_are_those_of_autograd(self):
        def norm(x, weight):
            return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

        def gated(gate, up):
            return torch.nn.functional.relu(gate).square() * up

        pairs = [
            (lambda x, weight: bitnet.RMSNorm.apply(x, weight, 1e-5), norm, (2, 3, 64), (64,)),
            (bitnet.GatedSquare.apply, gated, (2, 3, 64), (2, 3, 64)),
            (lambda x, weight: bitnet.Head.apply(x, torch.float32, weight), lambda x, weight: x @ weight.T, (2, 3, 64), (96, 64)),
        ]
        for ours, twin, *sizes in pairs:
            inputs = [torch.randn(size, requires_grad=True) for size in sizes]
            copies = [tensor.detach().clone().requires_grad_() for tensor in inputs]
            y, expected = ours(*inputs), twin(*copies)
            torch.testing.assert_close(y, expected)
            direction = torch.randn_like(y)
            (y * direction).sum().backward()
            (expected * direction).sum().backward()
            for tensor, copy in zip(inputs, copies):
                torch.testing.assert_close(tensor.grad, copy.grad)

    def test_muon_makes_every_singular_value_about_one(self):
        for shape in ((4, 64, 64), (2, 64, 192)):
            values = torch.linalg.svdvals(optimisers.Muon({}).orthogonal(torch.randn(shape)))
            self.assertLess(values.max(), 1.3)
            self.assertGreater(values.median(), 0.65)

    def test_adam_is_that_of_torch(self):
        ours, theirs = torch.randn(5, 4, requires_grad=True), torch.nn.Parameter(torch.zeros(5, 4))
        theirs.data.copy_(ours.detach())
        adam, twin = optimisers.Adam({"w": ours.detach()}), torch.optim.Adam([theirs], lr=0.003, betas=optimisers.Adam.BETAS, eps=optimisers.Adam.EPSILON)
        for _ in range(5):
            ours.grad = torch.randn(5, 4)
            theirs.grad = ours.grad.clone()
            adam.step({"w": ours}, 0.003)
            twin.step()
        torch.testing.assert_close(ours.detach(), theirs.detach())

    def test_rate_is_constant_and_then_goes_down_to_nothing(self):
        self.assertEqual([optimisers.rate_factor(step, 8) for step in range(9)], [1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])

    def test_texts_are_mended(self):
        self.assertEqual(corpus.tidied("\u00e2\u20ac\u0153Hi,\u00e2\u20ac  it\u00e2\u20ac\u2122s \u201cme\u201d \u2013 x \n y"), "\"Hi,\" it's \"me\" - x\ny")

    def test_windows_follow_from_their_numbers(self):
        stories = [numpy.arange(10 * n, 10 * n + 7) for n in range(20)]
        windows, again = corpus.Windows(stories, 8, 3), corpus.Windows(stories, 8, 3)
        row = [windows.window(number).tolist() for number in range(2 * windows.per_epoch)]
        self.assertEqual(row, [again.window(number).tolist() for number in range(len(row))])
        self.assertEqual(row[-1], corpus.Windows(stories, 8, 3).window(len(row) - 1).tolist())
        first = [token for window in row[:windows.per_epoch] for token in window[:-1]]
        self.assertEqual(len(first), len(set(first)))
        self.assertNotEqual(row[0], row[windows.per_epoch])


class Script(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(tempfile.mkdtemp())
        cls.texts = cls.folder / "texts"
        cls.texts.mkdir()
        for name, n_stories in (("generated", 300), ("tinystories_1", 200), ("storybooks", 20)):
            text = lzma.decompress((ROOT / "models" / "texts" / f"{name}.txt.xz").read_bytes()).decode()
            some = corpus.STORY_END.join(text.split(corpus.STORY_END)[:n_stories])
            (cls.texts / f"{name}.txt").write_text(some, encoding="utf-8")
        cls.whole = cls.folder / "whole"
        done = cls.script("--out", cls.whole)
        assert done.returncode == 0, done.stderr

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder)

    @classmethod
    def command(cls, *words):
        return [sys.executable, SCRIPT, "--texts", cls.texts, *TINY, *words]

    @classmethod
    def script(cls, *words):
        return subprocess.run(cls.command(*words), capture_output=True, text=True, timeout=600)

    def fails(self, text, *words):
        done = self.script(*words)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn(text, done.stderr)
        self.assertNotIn("Traceback", done.stderr)

    def begin_and_send(self, number, out, *words):
        """Sends a signal when the seventh step has been shown."""
        with subprocess.Popen(self.command("--out", out, *words), stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith("step 7/"):
                    process.send_signal(number)
        return process.returncode

    def assert_same_as_whole(self, out):
        for name in ("model.safetensors", "losses.jsonl", "samples.txt", "config.json", "tokenizer.json"):
            self.assertEqual((out / name).read_bytes(), (self.whole / name).read_bytes(), name)
        self.assertFalse((out / "state.pt").exists())

    def test_terminated_and_resumed_gives_the_same_bytes(self):
        out = self.folder / "terminated"
        self.assertEqual(self.begin_and_send(signal.SIGTERM, out), 130)
        self.fails("--resume goes on", "--out", out)
        self.fails("begun with seed 1, now it is 2", "--out", out, "--resume", "--seed", "2")
        done = self.script("--out", out, "--resume")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("going on after step", done.stdout)
        self.assert_same_as_whole(out)

    def test_killed_and_resumed_gives_the_same_bytes(self):
        out = self.folder / "killed"
        self.assertEqual(self.begin_and_send(signal.SIGKILL, out, "--save-every", "3"), -signal.SIGKILL)
        done = self.script("--out", out, "--resume")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assert_same_as_whole(out)

    def test_another_seed_gives_another_model(self):
        done = self.script("--out", self.folder / "seed", "--seed", "2")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertNotEqual((self.folder / "seed" / "losses.jsonl").read_bytes(), (self.whole / "losses.jsonl").read_bytes())

    def test_it_learns_and_says_what_it_measured(self):
        losses = [json.loads(line)["loss"] for line in (self.whole / "losses.jsonl").read_text().splitlines()]
        self.assertEqual(len(losses), 12)
        self.assertLess(losses[-1], losses[0] - 0.5, losses)
        said = json.loads((self.whole / "training.json").read_text())["held_out_tinystories"]["bf16"]
        done = self.script("--evaluate", self.whole)
        self.assertEqual(json.loads(done.stdout), said, done.stderr)

    def test_bitnetd_runs_the_model_that_was_trained(self):
        gguf = self.folder / "tiny.gguf"
        subprocess.run([OPTIONS.bitnetd, "-q", "model", "convert", self.whole, gguf], check=True, timeout=600)
        prompt, run = "Once upon a time, there was", ["-n", "24", "--temp", "0", "--ignore-eos", "--logprobs", "1", "--json"]
        done = subprocess.run([OPTIONS.bitnetd, "-q", "run", "-m", gguf, "-p", prompt, *run], check=True, capture_output=True, timeout=600)
        # The vocabulary that is beside the script is that of the built-in model.
        made, built_in = gguf.read_bytes(), (ROOT / "models" / "story.gguf").read_bytes()
        vocabulary = made[made.index(b"tokenizer.ggml.tokens"):made.index(b"tokenizer.ggml.bos_token_id")]
        self.assertGreater(len(vocabulary), 50_000)
        self.assertIn(vocabulary, built_in)
        answer = json.loads(done.stdout)
        shape, weights = bitnet.read_checkpoint(self.whole, torch.device("cpu"))
        tokenizer = corpus.read_tokenizer(self.whole / "tokenizer.json", shape.n_vocab)
        tokens = [bitnet.BOS, *tokenizer.encode(prompt).ids]
        self.assertEqual(len(tokens), answer["prompt_tokens"])
        with torch.no_grad():
            scores = bitnet.logits(weights, shape, torch.tensor([tokens + answer["token_ids"]]))[0].log_softmax(-1)
        apart = [abs(scores[len(tokens) - 1 + i, token].item() - found["logprob"])
                 for i, (token, found) in enumerate(zip(answer["token_ids"], answer["logprobs"]))]
        self.assertEqual(len(apart), 24)
        print(f"log-probabilities of bitnetd and the script: {max(apart):.5f} apart at most, {sum(apart) / len(apart):.5f} on average")
        self.assertLess(max(apart), 0.02, apart)

    def test_a_vocabulary_can_be_made_anew(self):
        out = self.folder / "vocabulary"
        done = self.script("--out", out, "--train-tokenizer", "--vocabulary", "512", "--steps", "2")
        self.assertEqual(done.returncode, 0, done.stderr)
        gguf = self.folder / "vocabulary.gguf"
        subprocess.run([OPTIONS.bitnetd, "-q", "model", "convert", out, gguf], check=True, timeout=600)
        subprocess.run([OPTIONS.bitnetd, "-q", "run", "-m", gguf, "-p", "Tom", "-n", "4"], check=True, capture_output=True, timeout=600)

    def test_bad_input_is_refused(self):
        new, empty = self.folder / "new", self.folder / "empty"
        empty.mkdir()
        self.fails("the folder is not empty", "--out", self.texts)
        self.fails("nothing to resume here", "--out", new, "--resume")
        self.fails("this training has ended", "--out", self.whole, "--resume")
        self.fails("no stories to train with", "--out", new, "--texts", empty)
        self.fails("4096 tokens, but the model has a vocabulary of 2048", "--out", new, "--vocabulary", "2048")
        self.fails("multiples of 128", "--out", new, "--width", "192")
        self.fails("cannot read", "--out", new, "--tokenizer", empty / "none.json")
        self.fails("cannot read", "--evaluate", empty)
        (empty / "poems.txt").write_text("a")
        self.fails("the name must begin with one of", "--out", new, "--texts", empty)
        self.assertFalse(new.exists(), "a refused training leaves a folder")
        self.fails("Not a directory", "--out", empty / "poems.txt")
        for wrong in (["--steps", "0"], ["--seed", "-1"], ["--resume", "--evaluate", new]):
            self.assertEqual(self.script("--out", new, *wrong).returncode, 2, wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bitnetd", type=os.path.abspath, required=True)
    OPTIONS, rest = parser.parse_known_args()
    unittest.main(argv=[sys.argv[0], *rest])
