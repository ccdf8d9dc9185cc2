#!/usr/bin/env python3
"""What confinement costs: decoding and starting with it and without it, in pairs, in turn.

    tests/long/confinement_cost.py --bitnetd target/release/bitnetd [--model FILE] [--threads 2] [--pairs 15] [--tokens 200] [--starts 20]

Needs Python 3.9 and nothing else, and a machine with nothing else running. Two daemons with one worker each, one with
`security.confinement = "auto"`, the other with "off", answer the same request in turn, the first of a pair being the second of the
next. Then each is started anew that many times, and the time until its worker has loaded and is ready is taken. Prints one line of JSON:
medians, and the median, the lower and the upper quartile of the pairs' ratios (with / without confinement).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time


class Daemon:
    def __init__(self, options, folder, confinement):
        self.folder = os.path.join(folder, confinement)
        os.mkdir(self.folder)
        self.socket = os.path.join(self.folder, "s")
        config = os.path.join(self.folder, "b.toml")
        with open(config, "w", encoding="utf-8") as file:
            model = f"[model]\npath = {json.dumps(os.path.abspath(options.model))}\n" if options.model else ""
            file.write(f'{model}[split]\nworkers = 1\nthreads = {options.threads}\n[security]\nconfinement = "{confinement}"\n')
        self.command = [options.bitnetd, "serve", "-c", config, "--socket", self.socket]
        self.environment = dict(os.environ, HOME=self.folder, STATE_DIRECTORY=self.folder)
        self.environment.pop("RUST_BACKTRACE", None)
        self.program = options.bitnetd
        self.process = None

    def start(self):
        """Seconds until a worker is ready."""
        with open(os.path.join(self.folder, "log"), "wb") as log:
            begun = time.monotonic()
            self.process = subprocess.Popen(self.command, stderr=log, env=self.environment)
        while b"ready to serve" not in open(os.path.join(self.folder, "log"), "rb").read():
            if time.monotonic() > begun + 120 or self.process.poll() is not None:
                sys.exit(open(os.path.join(self.folder, "log"), encoding="utf-8").read())
            time.sleep(0.0005)
        return time.monotonic() - begun

    def settle(self):
        """Waits until nothing is prepared beside the jobs any more."""
        while True:
            status = [self.program, "status", "--json", "--socket", self.socket]
            slots = json.loads(subprocess.run(status, capture_output=True, check=True, env=self.environment).stdout)["slots"]
            if all(slot["load"].get("image", "none") in ("none", "made", "mapped") for slot in slots):
                return
            time.sleep(0.1)

    def stop(self):
        self.process.terminate()
        self.process.wait()

    def generate(self, tokens):
        """Tokens a second, and the tokens."""
        words = ["generate", "--socket", self.socket, "-p", "Once upon a time", "-n", str(tokens), "--temp", "0.8", "-s", "7", "--ignore-eos", "--json"]
        said = subprocess.run([self.program, *words], capture_output=True, check=True, env=self.environment).stdout
        answer = json.loads(said)
        return answer["tokens"] / answer["decode_seconds"], answer["token_ids"]


def in_turn(with_it, without, n_pairs, measure):
    pairs = []
    for n in range(n_pairs):
        order = [with_it, without] if n % 2 == 0 else [without, with_it]
        taken = {id(daemon): measure(daemon) for daemon in order}
        pairs.append((taken[id(with_it)], taken[id(without)]))
    return pairs


def summary(pairs):
    ratios = [a / b for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "with": round(statistics.median(a for a, _ in pairs), 5),
        "without": round(statistics.median(b for _, b in pairs), 5),
        "ratio": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)], "pairs": len(pairs),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bitnetd", required=True)
    parser.add_argument("--model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--starts", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        daemons = [Daemon(options, folder, confinement) for confinement in ("auto", "off")]
        result = {}
        for daemon in daemons:
            daemon.start()
        try:
            calm = {str(daemon.generate(options.tokens)[1]) for daemon in daemons}
            for daemon in daemons:
                daemon.settle()

            def rate(daemon):
                rate, tokens = daemon.generate(options.tokens)
                calm.add(str(tokens))
                return rate

            result["tokens_per_second"] = summary(in_turn(*daemons, options.pairs, rate))
            if len(calm) != 1:
                sys.exit("the answers differ")
        finally:
            for daemon in daemons:
                daemon.stop()
        if options.starts >= 2:
            def start(daemon):
                seconds = daemon.start()
                daemon.stop()
                return seconds

            result["start_seconds"] = summary(in_turn(*daemons, options.starts, start))
        print(json.dumps(result))


if __name__ == "__main__":
    main()
