#!/usr/bin/env python3
"""The long forms of the reliability tests: real processes, real signals, figures on stdout.

    cargo build --release -p bitnetd -p bitnetd-supervisor
    tests/long/reliability.py --bin target/release chaos --jobs 2000
    tests/long/reliability.py --bin target/release all

Needs Python 3.9 and nothing else. Each part starts a daemon of its own in a new folder, ends with one line of JSON, and with
exit code 1 if anything was lost, doubled, changed, left over or grew. docs/reliability.md has the figures of one run.
"""

import argparse
import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

PROMPTS = ["Once upon a time", "One day, a little girl", "There was a big dog", "Tom and Lily went to", "A cat sat on",
           "The sun was bright and", "In a small village", "It was raining when"]
STEP = 0.005
FAULTS = []


def check(holds, text):
    if not holds:
        FAULTS.append(text)
        print("FAULT: " + text, file=sys.stderr)


class Connection:
    """The protocol of proto/PROTOCOL.md."""

    def __init__(self, path, timeout=300.0):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.buffer = b""
        self.say({"type": "hello", "version": 1, "client": "reliability"})
        answer = self.hear()
        if answer["type"] != "welcome":
            raise ConnectionError(str(answer))

    def say(self, message):
        data = json.dumps(message).encode()
        self.socket.sendall(struct.pack("<I", len(data)) + data)

    def hear(self):
        while True:
            if len(self.buffer) >= 4:
                size = struct.unpack_from("<I", self.buffer)[0]
                if len(self.buffer) >= 4 + size:
                    message = json.loads(self.buffer[4:4 + size])
                    self.buffer = self.buffer[4 + size:]
                    return message
            data = self.socket.recv(1 << 16)
            if not data:
                raise ConnectionError("closed")
            self.buffer += data

    def ask(self, message):
        self.say(message)
        return self.hear()

    def status(self):
        return self.ask({"type": "status"})["report"]

    def generate(self, request, on_token=None):
        """The ids, log-probabilities and text of an answer; raises if it does not come whole."""
        self.say({"type": "generate", "id": 1, "request": request})
        ids, logprobs, text = [], [], ""
        while True:
            message = self.hear()
            kind = message["type"]
            if kind == "accepted":
                continue
            if kind == "token":
                token = message["token"]
                if token["index"] != len(ids):
                    raise ValueError(f"token {token['index']} instead of {len(ids)}")
                ids.append(token["id"])
                text += token["text"]
                logprobs.append(token.get("logprobs"))
                if on_token:
                    on_token()
            elif kind == "done":
                return ids, logprobs, text + message["done"]["tail"]
            else:
                raise ValueError(str(message))

    def close(self):
        self.socket.close()


class Daemon:
    """A supervisor in a folder of its own."""

    def __init__(self, options, config="", fake=None):
        self.folder = tempfile.TemporaryDirectory(prefix="reliability-")
        self.socket = os.path.join(self.folder.name, "b.sock")
        self.log = open(os.path.join(self.folder.name, "log"), "wb")
        if fake is None:
            path = os.path.join(self.folder.name, "d.toml")
            with open(path, "w", encoding="utf-8") as file:
                file.write(config)
            command = [os.path.join(options.bin, "bitnetd"), "serve", "-c", path, "--socket", self.socket]
        else:
            command = [os.path.join(options.bin, "fake_worker"), "serve", self.socket, "1", *fake]
        environment = dict(os.environ, HOME=self.folder.name)
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.log, env=environment)
        self.pid = self.process.pid
        wait_for("a ready daemon", lambda: all_ready(self), 600)

    def connect(self):
        return Connection(self.socket)

    def status(self):
        connection = self.connect()
        try:
            return connection.status()
        finally:
            connection.close()

    def workers(self):
        return [slot["pid"] for slot in self.status()["slots"] if slot["pid"]]

    def end(self):
        workers = self.workers()
        self.connect().ask({"type": "drain"})
        code = self.process.wait(120)
        check(code == 0, f"the daemon ended with {code}: {self.tail()}")
        left = [pid for pid in workers if is_alive(pid)] + group_members(self.pid)
        check(not left, f"processes are left over: {left}")
        self.folder.cleanup()

    def tail(self):
        with open(self.log.name, "rb") as file:
            return file.read()[-2000:].decode(errors="replace")

    def fds(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def rss_kb(self):
        with open(f"/proc/{self.pid}/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))

    def cpu_seconds(self):
        with open(f"/proc/{self.pid}/stat", encoding="utf-8") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(what, probe, limit=120.0):
    end = time.monotonic() + limit
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > end:
            raise TimeoutError(f"waited {limit} s in vain for {what}")
        time.sleep(STEP)


def all_ready(daemon):
    try:
        report = daemon.status()
    except (OSError, ConnectionError):
        if daemon.process.poll() is not None:
            raise RuntimeError("the daemon ended: " + daemon.tail()) from None
        return None
    return report["health"] == "ready" and all(slot["state"] == "ready" for slot in report["slots"])


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def group_members(parent):
    """Live processes whose parent is (or was) the daemon."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8") as file:
                fields = file.read().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(name))
    return found


def request(number, n_tokens):
    """One of so many different requests; every third is greedy, every fourth wants log-probabilities."""
    sampling = {"seed": number, "temperature": 0.0 if number % 3 == 0 else 0.8}
    found = {"prompt": {"text": PROMPTS[number % len(PROMPTS)]}, "max_tokens": n_tokens, "sampling": sampling, "ignore_eos": True}
    if number % 4 == 0:
        found["logprobs"] = 2
    return found


PATIENT = """[split]
workers = 2
threads = 1
[restart]
max = 1000
backoff_min = "1ms"
backoff_max = "20ms"
[watchdog]
interval = "100ms"
timeout = "1s"
[queue]
max_deaths = 100
max_per_client = 1000
[listen]
max_connections = 20000
[log]
level = "warn"
"""


def model_lines(options):
    return f'[model]\npath = "{os.path.abspath(options.model)}"\n' if options.model else ""


def chaos(options):
    """Clients that compare every answer with the calm run's, while random workers are hurt."""
    daemon = Daemon(options, PATIENT + model_lines(options))
    kinds = 48
    connection = daemon.connect()
    calm = [connection.generate(request(number, options.tokens)) for number in range(kinds)]
    connection.close()
    todo = iter(range(options.jobs))
    lock, done, wrong = threading.Lock(), [], []

    def client():
        connection = daemon.connect()
        while True:
            with lock:
                job = next(todo, None)
            if job is None:
                return connection.close()
            try:
                answer = connection.generate(request(job % kinds, options.tokens))
                if answer != calm[job % kinds]:
                    wrong.append(f"job {job} has another answer than in the calm run")
            except (OSError, ValueError, ConnectionError) as error:
                wrong.append(f"job {job}: {error}")
                connection = daemon.connect()
            with lock:
                done.append(job)

    clients = [threading.Thread(target=client) for _ in range(options.clients)]
    start = time.monotonic()
    for thread in clients:
        thread.start()
    dice, hurt = random.Random(1), {"SIGKILL": 0, "SIGSTOP": 0, "SIGSEGV": 0}
    while any(thread.is_alive() for thread in clients):
        time.sleep(dice.uniform(0.1, 0.5))
        pids = daemon.workers()
        if pids:
            name = dice.choice(sorted(hurt))
            try:
                os.kill(dice.choice(pids), getattr(signal, name))
                hurt[name] += 1
            except ProcessLookupError:
                pass
    for thread in clients:
        thread.join()
    seconds = time.monotonic() - start
    totals = daemon.status()["totals"]
    lost = options.jobs - len(set(done))
    check(lost == 0, f"{lost} jobs lost")
    check(len(done) == len(set(done)), "jobs were done twice")
    check(not wrong, f"{len(wrong)} answers are wrong, such as {wrong[:3]}")
    check(totals["completed"] == options.jobs + kinds, f"the service counts otherwise: {totals}")
    wait_for("workers to be ready again", lambda: all_ready(daemon))
    daemon.end()
    return {"jobs": options.jobs, "clients": options.clients, "tokens_each": options.tokens, "seconds": round(seconds, 1), "lost": lost,
            "doubled": len(done) - len(set(done)), "other_answer": len(wrong), "hurt": hurt, "moves": totals["failovers"],
            "restarts": totals["restarts"]}


def restarts(options, fake):
    """One worker after the other; the supervisor's descriptors and memory stay flat."""
    count = options.fake_restarts if fake else options.real_restarts
    # The fake worker's supervisor has the default limits: an operator's restart counts against none of them.
    daemon = Daemon(options, PATIENT, fake=[] if fake else None)
    connection = daemon.connect()
    samples, start = [], time.monotonic()
    for number in range(count):
        connection.ask({"type": "restart", "slot": 0})
        wait_for("the next worker", lambda: is_ready_again(connection, number + 1))
        if number % max(1, count // 10) == count // 20:
            samples.append((number, daemon.fds(), daemon.rss_kb()))
    seconds = time.monotonic() - start
    connection.close()
    (_, fds_first, rss_first), (_, fds_last, rss_last) = samples[0], samples[-1]
    check(fds_last <= fds_first + 1, f"descriptors grow: {samples}")
    check(rss_last <= rss_first + 1024, f"memory grows: {samples}")
    daemon.end()
    return {"restarts": count, "fake_worker": fake, "seconds": round(seconds, 1), "fds": [fds_first, fds_last],
            "rss_kb": [rss_first, rss_last]}


def is_ready_again(connection, restarts_wanted):
    slot = connection.status()["slots"][0]
    return slot["restarts"] == restarts_wanted and slot["state"] == "ready"


def token_rate(daemon, seconds):
    """Tokens a second of one client that streams all the time."""
    connection, times = daemon.connect(), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        connection.generate(request(1, 100), lambda: times.append(time.monotonic()))
    connection.close()
    return len(times) / (times[-1] - times[0])


def crowd(options):
    """Many connections, slow readers, half frames: what another client notices of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    daemon = Daemon(options, PATIENT.replace("workers = 2", "workers = 1"))
    calm = token_rate(daemon, options.seconds)
    rss_before = daemon.rss_kb()
    n_wanted = min(options.connections, hard - 1200)
    idle = []
    for _ in range(n_wanted):
        idle.append(daemon.connect())
    with_idle, rss_idle = token_rate(daemon, options.seconds), daemon.rss_kb()
    silent = [socket.socket(socket.AF_UNIX) for _ in range(100)]
    for stream in silent:
        stream.connect(daemon.socket)
    halves = idle[:200]
    for connection in halves:
        connection.socket.sendall(struct.pack("<I", 1 << 20) + b"{" * 100)
    deaf = [daemon.connect() for _ in range(8)]
    for connection in deaf:
        connection.say({"type": "generate", "id": 1, "request": request(5, 100_000) | {"max_tokens": 200}})
    with_rude, rss_rude = token_rate(daemon, options.seconds), daemon.rss_kb()
    check(with_idle > 0.8 * calm, f"idle connections cost tokens: {calm:.0f} to {with_idle:.0f} a second")
    check(rss_idle - rss_before < 64 * n_wanted, f"{n_wanted} connections cost {rss_idle - rss_before} kB")
    for connection in idle + deaf:
        connection.close()
    for stream in silent:
        stream.close()
    wait_for("descriptors to come back", lambda: daemon.fds() < 100)
    after = token_rate(daemon, options.seconds)
    daemon.end()
    return {"connections": n_wanted, "tokens_a_second": {"calm": round(calm, 1), "with_idle_connections": round(with_idle, 1),
            "with_200_half_frames_100_silent_8_deaf": round(with_rude, 1), "after": round(after, 1)},
            "supervisor_rss_kb": {"calm": rss_before, "with_idle_connections": rss_idle, "with_rude_ones": rss_rude}}


def descriptors(options):
    """The supervisor runs out of file descriptors while a client streams."""
    daemon = Daemon(options, PATIENT)
    client, times, texts = daemon.connect(), [], []
    stop = threading.Event()

    def stream():
        while not stop.is_set():
            texts.append(client.generate(request(1, 100), lambda: times.append(time.monotonic()))[2])

    streaming = threading.Thread(target=stream)
    streaming.start()
    hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[1]
    limit = daemon.fds() + 4
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit, hard))
    crowd_sockets = []
    for _ in range(20):  # The backlog takes those that are not accepted.
        stream_socket = socket.socket(socket.AF_UNIX)
        stream_socket.connect(daemon.socket)
        crowd_sockets.append(stream_socket)
    cpu, n_before, begun = daemon.cpu_seconds(), len(times), time.monotonic()
    time.sleep(options.seconds)
    spent, seconds = daemon.cpu_seconds() - cpu, time.monotonic() - begun
    n_during = len(times) - n_before
    check(n_during > 0, "the client that was there got nothing")
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (hard, hard))
    for stream_socket in crowd_sockets:
        stream_socket.close()
    fresh = wait_for("a new connection", lambda: daemon.status())
    check(fresh["health"] == "ready", f"not ready again: {fresh}")
    stop.set()
    streaming.join()
    check(len(set(texts)) == 1, "an answer changed")
    with open(daemon.log.name, "rb") as file:
        n_lines = file.read().count(b"cannot accept")
    daemon.end()
    return {"limit": limit, "tokens_a_second_meanwhile": round(n_during / seconds, 1), "supervisor_cpu_share": round(spent / seconds, 3),
            "log_lines": n_lines}


def gaps(options):
    """From a kill to a ready replacement, and what a streaming client sees of it."""
    found = {}
    config = PATIENT.replace("backoff_min = \"1ms\"", "backoff_min = \"1ms\"") + model_lines(options)
    for workers in (1, 2):
        daemon = Daemon(options, config.replace("workers = 2", f"workers = {workers}"))
        times, ready = [], []
        connection, watch = daemon.connect(), daemon.connect()
        connection.generate(request(1, options.gap_tokens))
        kill_at = [options.gap_tokens // 3]

        def on_token():
            times.append(time.monotonic())
            if len(times) == kill_at[0]:
                threading.Thread(target=kill_busy, args=(daemon, watch, ready)).start()

        streams = []
        for _ in range(options.gap_rounds):
            times.clear()
            connection.generate(request(1, options.gap_tokens), on_token)
            steps = sorted(b - a for a, b in zip(times, times[1:]))
            streams.append((steps[-1], steps[len(steps) // 2]))
            wait_for("workers to be ready again", lambda: all_ready(daemon))
        ms = lambda values: {"median": round(1000 * sorted(values)[len(values) // 2], 1), "max": round(1000 * max(values), 1)}
        found[f"{workers}_workers"] = {"kill_to_ready_ms": ms(ready), "largest_gap_ms": ms([gap for gap, _ in streams]),
                                       "usual_gap_ms": ms([usual for _, usual in streams])}
        daemon.end()
    return found


def kill_busy(daemon, watch, ready):
    slot = next(slot for slot in watch.status()["slots"] if slot["jobs"] > 0)
    begun = time.monotonic()
    os.kill(slot["pid"], signal.SIGKILL)
    while True:
        now = watch.status()["slots"][slot["slot"]]
        if now["state"] == "ready" and now["pid"] != slot["pid"]:
            return ready.append(time.monotonic() - begun)
        time.sleep(0.001)


PARTS = {"chaos": chaos, "restarts": lambda options: restarts(options, False), "fake-restarts": lambda options: restarts(options, True),
         "crowd": crowd, "descriptors": descriptors, "gaps": gaps}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--bin", default="target/release", help="folder of bitnetd and fake_worker")
    parser.add_argument("--model", help="GGUF file instead of the built-in model (chaos, gaps)")
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--fake-restarts", type=int, default=10_000)
    parser.add_argument("--real-restarts", type=int, default=300)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--gap-rounds", type=int, default=10)
    parser.add_argument("--gap-tokens", type=int, default=120)
    options = parser.parse_args()
    for part in PARTS if options.part == "all" else [options.part]:
        print(json.dumps({part: PARTS[part](options)}), flush=True)
    return 1 if FAULTS else 0


if __name__ == "__main__":
    sys.exit(main())
