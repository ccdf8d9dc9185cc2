#!/usr/bin/env python3
"""Whether the fast image changes a token: many answers with `model.head = "file"` and with "fast", compared to the letter.

    tests/long/same_tokens.py --bitnetd target/release/bitnetd [--model model.gguf] [--prompts 400] [--tokens 64]

Needs Python 3.9 and nothing else. A daemon with each head answers the same beginnings of stories (`models/texts`), once greedy and once
at temperature 1 with a seed. Prints one line of JSON; exit code 1 if any answer differs, or the fast daemon made no image.
"""

import argparse
import json
import lzma
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

TEXTS = pathlib.Path(__file__).resolve().parents[2] / "models" / "texts"
KINDS = {"greedy": ["--temp", "0"], "sampled": ["--temp", "1", "--seed", "7"]}


def beginnings(n):
    """The first words of n stories: five to eleven, each another number than the one before."""
    found = []
    for path in sorted(TEXTS.glob("*.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as text:
            for paragraph in re.split(r"\n\s*\n|<\|endoftext\|>", text.read()):
                words = paragraph.split()
                if len(words) >= 20:
                    found.append(" ".join(words[:5 + len(found) % 7]))
                if len(found) == n:
                    return found
    raise SystemExit(f"{len(found)} stories in {TEXTS}, expected {n}")


def answers(args, head, folder):
    """Answers of each kind with this head, and what the image came from."""
    environment = dict(os.environ, STATE_DIRECTORY=folder, CACHE_DIRECTORY=folder)
    config, socket = f"{folder}/{head}.toml", f"{folder}/{head}.sock"
    model = f'path = "{os.path.abspath(args.model)}"\n' if args.model else ""
    pathlib.Path(config).write_text(f'[model]\n{model}head = "{head}"\nimage_cache = "off"\n[queue]\nmax_jobs = 4096\nmax_per_client = 4096\n')
    daemon = subprocess.Popen([args.bitnetd, "-q", "serve", "-c", config, "--socket", socket], env=environment)

    def status():
        done = subprocess.run([args.bitnetd, "status", "--json", "--socket", socket], capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else None

    try:
        while True:
            if daemon.poll() is not None:
                raise SystemExit(f"the daemon with head {head} ended with {daemon.returncode}")
            report = status()
            states = [slot["load"].get("image", "none") for slot in report["slots"]] if report else ["waiting"]
            is_ready = report and report["health"] == "ready"
            if is_ready and (head == "file" or all(state in ("made", "mapped") for state in states)):
                break
            time.sleep(0.1)
        texts = {}
        for kind, options in KINDS.items():
            out = f"{folder}/{head}-{kind}.jsonl"
            subprocess.run([args.bitnetd, "-q", "batch", f"{folder}/prompts.txt", "-o", out, "--socket", socket, "-n", str(args.tokens),
                            "--ignore-eos", "-P", "64", *options], check=True)
            rows = [json.loads(line) for line in open(out, encoding="utf-8")]
            texts[kind] = {row["index"]: (row["text"], row["tokens"]) for row in rows}
        return texts, sorted(set(states))
    finally:
        daemon.terminate()
        daemon.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bitnetd", required=True)
    parser.add_argument("--model", help="without it the built-in one")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(f"{folder}/prompts.txt").write_text("\n".join(beginnings(args.prompts)) + "\n", encoding="utf-8")
        exact, _ = answers(args, "file", folder)
        fast, states = answers(args, "fast", folder)
    differing = {kind: [index for index, answer in exact[kind].items() if fast[kind].get(index) != answer] for kind in KINDS}
    n_tokens = sum(n for kind in KINDS for _, n in exact[kind].values())
    is_whole = all(len(of[kind]) == args.prompts for of in (exact, fast) for kind in KINDS)
    print(json.dumps({"tokens": n_tokens, "image": states, "differing": differing}))
    return 0 if is_whole and not any(differing.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
