#!/usr/bin/env python3
"""The long form of the durable test: the supervisor is killed again and again while jobs come in and are worked on.

    tests/long/durable_kills.py --bitnetd target/release/bitnetd [--kills 50] [--seed 1]

Needs Python 3.9 and nothing else. Clients run `bitnetd submit --id KEY` and offer a job again, under the same key, until they
have a number for it: what was acknowledged before a kill and what was not are both met. At the end every job that has a
number has one result, two keys never share one, and every text is that of `bitnetd run`. Prints one line of JSON; exit code 1
if anything was lost, doubled or changed, or a worker outlived its supervisor.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time

PROMPTS = ["Once upon a time", "One day, a little girl", "There was a big dog", "Tom and Lily went to", "A cat sat on",
           "The sun was bright and", "In a small village", "It was raining when"]
FLAGS = ["-n", "60", "--temp", "0.8"]
CLIENTS = 4
STEP = 0.005


class Daemon:
    def __init__(self, program, folder):
        self.socket = os.path.join(folder, "bitnetd.sock")
        self.log = open(os.path.join(folder, "log"), "ab")
        self.environment = dict(os.environ, HOME=folder, STATE_DIRECTORY=os.path.join(folder, "state"))
        self.program = program
        self.process = None

    def start(self):
        command = [self.program, "serve", "--workers", "2", "--threads", "1", "--socket", self.socket]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=self.environment)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def call(self, *words, timeout=300):
        command = [self.program, *words, "--socket", self.socket]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=timeout)

    def until(self, *words):
        end = time.monotonic() + 300
        while True:
            done = self.call(*words)
            if done.returncode == 0:
                return done.stdout
            if time.monotonic() > end:
                sys.exit(f"waited in vain: {words}: {done.stderr}")
            time.sleep(STEP)


def orphans(folder):
    """Processes that carry our folder in their environment."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if f"HOME={folder}\0" in open(f"/proc/{pid}/environ").read():
                found.append(int(pid))
        except (OSError, UnicodeDecodeError):
            pass
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bitnetd", required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    program = os.path.abspath(options.bitnetd)
    rng = random.Random(options.seed)
    faults = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(program, folder)
        calm = []
        for seed, prompt in enumerate(PROMPTS):
            command = [program, "run", "-q", *FLAGS, "-s", str(seed), "-p", prompt]
            calm.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        numbers, offers, lock, over = {}, [0], threading.Lock(), threading.Event()

        def client(name):
            count = 0
            while not over.is_set():
                kind = count % len(PROMPTS)
                words = ["submit", *FLAGS, "-s", str(kind), "-p", PROMPTS[kind], "--id", f"{name}/{count}"]
                # Until it is acknowledged: one that is not may be in the journal all the same.
                while (told := daemon.call(*words)).returncode != 0:
                    with lock:
                        offers[0] += 1
                    time.sleep(STEP)
                with lock:
                    offers[0] += 1
                    numbers[f"{name}/{count}"] = (int(told.stdout), kind)
                count += 1

        daemon.start()
        threads = [threading.Thread(target=client, args=(name,)) for name in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for _ in range(options.kills):
            daemon.until("status", "--json")
            time.sleep(rng.uniform(0.05, 0.5))
            daemon.kill()
            daemon.start()
        over.set()
        for thread in threads:
            thread.join()
        if len({number for number, _ in numbers.values()}) != len(numbers):
            faults.append("two keys share a number")
        for key, (number, kind) in numbers.items():
            record = json.loads(daemon.until("wait", str(number), "--json"))
            if record["state"] != "done" or record["id"] != key:
                faults.append(f"job {number}: {record['state']}, key {record['id']}, expected {key}")
            elif record["text"].rstrip("\n") != calm[kind].rstrip("\n"):
                faults.append(f"job {number} has another text than the calm run")
        journal = json.loads(daemon.until("status", "--json"))["journal"]
        if (journal["queued"], journal["running"]) != (0, 0) or journal["ended"] != len(numbers):
            faults.append(f"{len(numbers)} acknowledged, the journal says {journal}")
        daemon.kill()
        end = time.monotonic() + 30
        while orphans(folder) and time.monotonic() < end:
            time.sleep(STEP)
        if orphans(folder):
            faults.append(f"left over: {orphans(folder)}")
        result = {"kills": options.kills, "acknowledged": len(numbers), "offers": offers[0],
                  "results": journal["ended"], "seconds": round(time.monotonic() - begun, 1), "faults": faults}
        print(json.dumps(result))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
