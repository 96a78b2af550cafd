"""Criterion benches of ours and a peer's own loops, in turn, a fresh process each time, so that a machine whose speed
drifts treats both alike; of each kernel the best time of all rounds.
"""
import argparse, glob, json, os, subprocess, sys, time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))


class Stopwatch:
    """The peer's side: best times by name."""

    def __init__(self):
        self.best = {}

    def measure(self, name, kernel):
        kernel()
        end = time.perf_counter() + 1.0
        while time.perf_counter() < end:
            begun = time.perf_counter()
            kernel()
            self.best[name] = min(self.best.get(name, 1e9), time.perf_counter() - begun)


def ours(bench, only):
    """Best times by "group kernel"."""
    options = ["--warm-up-time", "0.3", "--measurement-time", "1", "--sample-size", "10", *only]
    begun = time.time()
    subprocess.run(["cargo", "bench", "-p", "rankfold-cpu", "--bench", bench, "--", *options], check=True, cwd=ROOT, capture_output=True)
    best = {}
    for path in glob.glob(os.path.join(TARGET, "criterion/*/*/new/sample.json")):
        if os.path.getmtime(path) < begun:
            continue  # another bench's, or a kernel that is no more
        with open(os.path.join(os.path.dirname(path), "benchmark.json")) as file:
            about = json.load(file)
        with open(path) as file:
            sample = json.load(file)
        best[f"{about['group_id']} {about['function_id']}"] = min(t / n for t, n in zip(sample["times"], sample["iters"])) / 1e9
    return best


def both(script, bench, rounds, only=()):
    """Seconds by name, ours and the peer's: best of so many rounds. `only` filters our benches."""
    mine, theirs = {}, {}
    for _ in range(rounds):
        command = [sys.executable, script, "--peer", str(os.cpu_count())]
        other = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        for best, figures in ((mine, ours(bench, only)), (theirs, json.loads(other))):
            for name, seconds in figures.items():
                best[name] = min(best.get(name, 1e9), seconds)
    return mine, theirs


def compare(doc, bench, peer, report):
    """`peer(stopwatch, threads)` measures the other side; `report(ours, theirs)` prints, given seconds by name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.peer:
        watch = Stopwatch()
        peer(watch, a.peer)
        print(json.dumps(watch.best))
        return
    report(*both(sys.argv[0], bench, a.rounds))
