#!/usr/bin/env python3
"""Measures bitnetd beside builds of llama.cpp and its forks on the same model, in turn, and makes one table of medians.

  peers.py measure --out FILE --bitnetd PROGRAM --model GGUF [--peer NAME=BIN_FOLDER:GGUF ...] [--rows a,b] [--rounds N]
  peers.py table FILE
  peers.py plot FILE SVG

Each measurement is one line of JSON appended to FILE, so that a run can be done in several parts. In a round every row is
measured once with each program, one after the other. A peer's folder holds llama-bench, llama-batched-bench, llama-server
and llama-completion (or, in older trees, llama-cli). Rows: see ROWS. Nothing else should run meanwhile.
"""
import argparse, concurrent.futures, json, os, random, resource, socket, statistics, struct, subprocess, sys, tempfile
import threading, time, urllib.request

ROWS = {  # name: (what it is, unit)
    "decode_t1": ("one answer of 64 tokens, 1 thread", "tokens/s"),
    "decode_t2": ("one answer of 64 tokens, 2 threads", "tokens/s"),
    "prefill_t1": ("prompt of 512 tokens, 1 thread", "tokens/s"),
    "prefill_t2": ("prompt of 512 tokens, 2 threads", "tokens/s"),
    "together8": ("8 answers together, 2 threads", "tokens/s in all"),
    "server8": ("8 clients of the server, 64 + 32 tokens each, 2 threads", "tokens/s in all"),
    "ttft32": ("first token of a 32-token prompt from the server, 2 threads", "s"),
    "memory2": ("two workers (theirs two servers) with 1 thread each, PSS in all beyond one model file", "MiB"),
    "batch16": ("16 prompts, 32 tokens each: `bitnetd batch`, theirs one process each, 2 threads", "s"),
}
# Peers put prompt batches on the stack.
def unlimited_stack():
    try:
        resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        pass
ENV = dict(os.environ, OMP_STACKSIZE="128M")

def run(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, preexec_fn=unlimited_stack, env=ENV)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}: {done.stderr[-600:]}")
    return done.stdout + "\n" + done.stderr, done.stdout

def prompts(n, length, seed):
    rng = random.Random(seed)
    return [[rng.randrange(1000, 30000) for _ in range(length)] for _ in range(n)]

WORDS = "the river was cold and a small boat went slowly under the old bridge while people on the shore watched it go".split()
def text_prompt(i, n_words=24):
    rng = random.Random(i)
    return " ".join(rng.choice(WORDS) for _ in range(n_words))

class Bitnetd:
    name = "bitnetd"
    def __init__(self, program, model): self.program, self.model = program, model
    def bench(self, threads, sequences, n, p):
        out = run([self.program, "-q", "bench", "-m", self.model, "-t", threads, "--sequences", sequences, "-n", n, "-p", p,
                   "--repeat", 1, "-c", 1024, "--json"])[1]
        return json.loads(out)
    def measure(self, group):
        if group in ("t1", "t2"):
            r = self.bench(int(group[1]), 1, 64, 512)
            return {f"decode_{group}": r["decode"][0]["tokens_per_s"], f"prefill_{group}": r["prefill"][0]["tokens_per_s"],
                    f"bound_decode_{group}": r["decode"][0]["bound_tokens_per_s"],
                    f"bound_prefill_{group}": r["prefill"][0]["bound_tokens_per_s"]}
        if group == "together8":
            r = self.bench(2, 8, 32, 32)
            return {"together8": r["decode"][0]["tokens_per_s"], "bound_together8": r["decode"][0]["bound_tokens_per_s"]}
        if group == "server":
            with tempfile.TemporaryDirectory() as folder:
                sock = folder + "/s"
                server = subprocess.Popen([self.program, "-q", "serve", "-m", self.model, "--workers", "1", "--threads", "2",
                                           "--socket", sock], env=ENV)
                try:
                    return serve_rows(lambda prompt, n: framed(sock, prompt, n), lambda: ready(sock, server), lambda: settled(sock))
                finally:
                    server.terminate(); server.wait()
        if group == "memory2":
            with tempfile.TemporaryDirectory() as folder:
                sock = folder + "/s"
                server = subprocess.Popen([self.program, "-q", "serve", "-m", self.model, "--workers", "2", "--threads", "1",
                                           "--socket", sock], env=ENV)
                try:
                    ready(sock, server); settled(sock)
                    with concurrent.futures.ThreadPoolExecutor(8) as pool:
                        list(pool.map(lambda p: framed(sock, p, 16), prompts(8, 64, 5)))
                    return {"memory2": (pss_bytes([server.pid]) - os.path.getsize(self.model)) / 2**20}
                finally:
                    server.terminate(); server.wait()
        if group == "batch16":
            with tempfile.TemporaryDirectory() as folder:
                with open(folder + "/p.txt", "w") as f:
                    f.writelines(text_prompt(i) + "\n" for i in range(16))
                begin = time.time()
                run([self.program, "-q", "batch", folder + "/p.txt", "-o", folder + "/o.jsonl", "-m", self.model, "-n", 32,
                     "--ignore-eos", "--workers", 1, "--threads", 2, "-P", 16])
                seconds = time.time() - begin
                rows = [json.loads(line) for line in open(folder + "/o.jsonl")]
                assert len(rows) == 16 and all(row["tokens"] == 32 for row in rows), rows
                return {"batch16": seconds}

def frame(stream, message):
    data = json.dumps(message).encode(); stream.sendall(struct.pack("<I", len(data)) + data)
def unframe(stream):
    def exactly(n):
        data = b""
        while len(data) < n:
            piece = stream.recv(n - len(data))
            if not piece: raise SystemExit("the daemon closed the connection")
            data += piece
        return data
    return json.loads(exactly(struct.unpack("<I", exactly(4))[0]))
def connect(path):
    stream = socket.socket(socket.AF_UNIX); stream.connect(path)
    frame(stream, {"type": "hello", "version": 1, "client": "peers.py"}); welcome = unframe(stream)
    assert welcome["type"] == "welcome", welcome
    return stream
def framed(path, prompt, n):
    """Seconds to the first token, and number of tokens."""
    stream = connect(path); begin = time.time(); first, count = None, 0
    frame(stream, {"type": "generate", "id": 1, "request": {"prompt": {"tokens": prompt}, "max_tokens": n, "ignore_eos": True}})
    while True:
        message = unframe(stream)
        if message["type"] == "token":
            count += 1; first = first or time.time() - begin
        elif message["type"] == "done": return first, count
        elif message["type"] == "error": raise SystemExit(message)
def ready(path, process):
    while process.poll() is None:
        try:
            stream = connect(path); frame(stream, {"type": "status"})
            if unframe(stream)["report"]["health"] == "ready": return
        except OSError: pass
        time.sleep(0.05)
    raise SystemExit("the server ended")

def settled(path):
    """Waits until what decoding reads is in use by every worker."""
    stream = connect(path)
    while True:
        frame(stream, {"type": "status"})
        loads = [slot["load"] for slot in unframe(stream)["report"]["slots"]]
        if all(load["step_bytes"] and load["image"] not in ("waiting", "making") for load in loads): return
        time.sleep(0.1)

def pss_bytes(pids):
    """Of processes and all their children."""
    total = 0
    while pids:
        pid = pids.pop()
        with open(f"/proc/{pid}/smaps_rollup") as rollup:
            total += sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as children: pids += map(int, children.read().split())
    return total

def serve_rows(ask, wait, settle=lambda: None):
    """Both rows of a server: 8 clients at once, then one short prompt alone."""
    begin = time.time(); wait(); result = {"ready": time.time() - begin}
    settle(); result["settled"] = time.time() - begin
    ask(prompts(1, 64, 99)[0], 8)  # Pages are touched, speeds are learnt.
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        begin = time.time(); counts = [n for _, n in pool.map(lambda p: ask(p, 32), prompts(8, 64, 7))]
        result["server8"] = sum(counts) / (time.time() - begin)
    assert counts == [32] * 8, counts
    result["ttft32"] = statistics.median(ask(p, 1)[0] for p in prompts(3, 32, 11))
    return result

class Llama:
    def __init__(self, name, folder, model): self.name, self.folder, self.model = name, folder, model
    def tool(self, *names):
        return next(p for p in (os.path.join(self.folder, n) for n in names) if os.path.exists(p))
    def serve(self, threads, sequences, ctx):
        """A server, what waits until it is ready, and what asks it."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
        server = subprocess.Popen([self.tool("llama-server"), "-m", self.model, "-t", str(threads), "-np", str(sequences),
                                   "-c", str(ctx), "--host", "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL, preexec_fn=unlimited_stack, env=ENV)
        url = f"http://127.0.0.1:{port}"
        def wait():
            while server.poll() is None:
                try:
                    if urllib.request.urlopen(url + "/health", timeout=2).status == 200: return
                except OSError: time.sleep(0.05)
            raise SystemExit("the server ended")
        def ask(prompt, n):
            body = dict(prompt=prompt, n_predict=n, ignore_eos=True, temperature=0.0, top_k=1, cache_prompt=False)
            begin = time.time()
            answer = json.load(urllib.request.urlopen(urllib.request.Request(
                url + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}), timeout=600))
            return time.time() - begin, answer.get("tokens_predicted") or answer["timings"]["predicted_n"]
        return server, wait, ask
    def measure(self, group):
        if group in ("t1", "t2"):
            out = run([self.tool("llama-bench"), "-m", self.model, "-t", group[1], "-r", 1, "-o", "json", "-p", 512, "-n", 64])[1]
            rows = json.loads(out[out.index("["):])
            pick = lambda key: next(row["avg_ts"] for row in rows if row[key])
            return {f"prefill_{group}": pick("n_prompt"), f"decode_{group}": pick("n_gen")}
        if group == "together8":
            out = run([self.tool("llama-batched-bench"), "-m", self.model, "-t", 2, "-c", 2048, "-b", 512, "-ub", 512, "-npp", 32,
                       "-ntg", 32, "-npl", 8])[0]
            cells = [line for line in out.splitlines() if line.replace(" ", "").startswith("|32|32|8|")][-1].split("|")
            return {"together8": float(cells[8])}
        if group == "server":
            server, wait, ask = self.serve(2, 8, 4096)
            try:
                return serve_rows(ask, wait)
            finally:
                server.terminate(); server.wait()
        if group == "memory2":
            servers = [self.serve(1, 4, 2048) for _ in range(2)]
            try:
                for _, wait, ask in servers:
                    wait(); ask(prompts(1, 64, 5)[0], 16)
                return {"memory2": (pss_bytes([s.pid for s, _, _ in servers]) - os.path.getsize(self.model)) / 2**20}
            finally:
                for server, _, _ in servers: server.terminate(); server.wait()
        if group == "batch16":
            program = self.tool("llama-completion", "llama-cli"); begin = time.time()
            for i in range(16):
                run([program, "-m", self.model, "-t", 2, "-p", text_prompt(i), "-n", 32, "--ignore-eos", "--temp", 0]
                    + (["-no-cnv"] if program.endswith("completion") else []))
            return {"batch16": time.time() - begin}

GROUPS = ["t1", "t2", "together8", "server", "batch16", "memory2"]

def measure(args):
    contestants = [Bitnetd(args.bitnetd, args.model)] if args.bitnetd else []
    for peer in args.peer:
        name, rest = peer.split("=", 1); folder, model = rest.split(":", 1)
        contestants.append(Llama(name, folder, model))
    for _ in range(args.rounds):
        for group in args.groups.split(","):
            for one in contestants:
                values = one.measure(group)
                line = dict(time=time.strftime("%F %T"), load=os.getloadavg()[0], program=one.name, group=group, values=values)
                with open(args.out, "a") as out: out.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)

def table(args):
    values, order = {}, []
    for line in map(json.loads, open(args.file)):
        if line["program"] not in order: order.append(line["program"])
        for key, value in line["values"].items(): values.setdefault((key, line["program"]), []).append(value)
    median = lambda row, name: statistics.median(values[row, name]) if (row, name) in values else None
    others = [name for name in order if name != "bitnetd"]
    print("| | " + " | ".join(order) + " | bitnetd to the best of the others |\n|---" * 1 + "|---" * (len(order) + 1) + "|")
    for row, (what, unit) in ROWS.items():
        cells, best = [], None
        for name in order:
            value = median(row, name)
            if value is None: cells.append(""); continue
            spread = values[row, name]
            cells.append(f"{value:.3g} ({min(spread):.3g} to {max(spread):.3g}, n {len(spread)})")
            if name in others: best = value if best is None else (max if "tokens" in unit else min)(best, value)
        ours, ratio = median(row, "bitnetd"), ""
        if ours and best: ratio = f"{(ours / best if 'tokens' in unit else best / ours):.2f}"
        print(f"| {what}, {unit} | " + " | ".join(cells) + f" | {ratio} |")

def plot(args):
    """Bars of bitnetd's rate to that of the best other program, in each row that both have."""
    values = {}
    for line in map(json.loads, open(args.file)):
        for key, value in line["values"].items(): values.setdefault(key, {}).setdefault(line["program"], []).append(value)
    bars = []
    for row, (what, unit) in ROWS.items():
        medians = {name: statistics.median(v) for name, v in values.get(row, {}).items()}
        ours, others = medians.pop("bitnetd", None), medians
        if not ours or not others: continue
        name = (max if "tokens" in unit else min)(others, key=others.get); best = others[name]
        bars.append((what, ours / best if "tokens" in unit else best / ours, f"{ours:.3g} to {best:.3g} {unit} ({name})"))
    step, left, width = 34, 580, 1040
    scale = (width - left - 60) / max(ratio for _, ratio, _ in bars)
    height = 40 + step * len(bars)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/>',
           '<text x="10" y="18" font-weight="bold">bitnetd to the fastest peer (1 = as fast)</text>']
    for i, (what, ratio, detail) in enumerate(bars):
        y = 32 + i * step
        out += [f'<text x="{left - 8}" y="{y + 10}" text-anchor="end">{what}</text>',
                f'<text x="{left - 8}" y="{y + 23}" text-anchor="end" font-size="10" fill="#666">{detail}</text>',
                f'<rect x="{left}" y="{y}" width="{ratio * scale:.1f}" height="22" fill="#3b6ea5"/>',
                f'<text x="{left + ratio * scale + 5:.1f}" y="{y + 15}">{ratio:.2f}</text>']
    out += [f'<line x1="{left + scale:.1f}" y1="26" x2="{left + scale:.1f}" y2="{height - 8}" stroke="#c33" stroke-dasharray="4 3"/>', "</svg>"]
    with open(args.svg, "w") as svg: svg.write("\n".join(out) + "\n")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
commands = parser.add_subparsers(required=True)
m = commands.add_parser("measure"); m.set_defaults(main=measure)
m.add_argument("--out", required=True); m.add_argument("--bitnetd"); m.add_argument("--model"); m.add_argument("--peer", action="append", default=[])
m.add_argument("--groups", default=",".join(GROUPS), help="some of " + ",".join(GROUPS)); m.add_argument("--rounds", type=int, default=1)
t = commands.add_parser("table"); t.set_defaults(main=table); t.add_argument("file")
t = commands.add_parser("plot"); t.set_defaults(main=plot); t.add_argument("file"); t.add_argument("svg")
if __name__ == "__main__":
    args = parser.parse_args(); args.main(args)
