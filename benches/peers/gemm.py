"""Rankfold's products and torch's (oneDNN in f32, bitsandbytes in 4 bits), side by side.

    python benches/peers/gemm.py [--rounds N]

Runs `cargo bench -p rankfold-cpu --bench gemm` and torch in turn, a fresh process each time, so that a machine whose
speed drifts treats both alike. Printed: the best time of each over all rounds, as operations a second, and their ratio.
"""
import argparse, glob, json, os, subprocess, sys, time

SHAPES = [(1024, 1024, 1024), (512, 4096, 4096), (1024, 1408, 512), (1024, 512, 1408), (16, 4096, 4096), (1, 4096, 4096)]
ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")


def peer(threads):
    import torch, bitsandbytes as bnb
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    best = {}

    def measure(name, product):
        product()
        end = time.perf_counter() + 1.0
        while time.perf_counter() < end:
            begun = time.perf_counter()
            product()
            best[name] = min(best.get(name, 1e9), time.perf_counter() - begun)

    for m, n, k in SHAPES:
        x, w, dy = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
        measure(f"{m}x{n}x{k} f32 y = x·Wᵀ", lambda: torch.nn.functional.linear(x, w))
        measure(f"{m}x{n}x{k} f32 dx = dy·W", lambda: dy @ w)
        layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True)
        layer.weight = bnb.nn.Params4bit(w, requires_grad=False, quant_type="nf4", compress_statistics=True)
        layer = layer.to("cpu")
        measure(f"{m}x{n}x{k} nf4 y = x·Wᵀ", lambda: layer(x))
        state = layer.weight.quant_state
        measure(f"{m}x{n}x{k} nf4 dx = dy·W", lambda: dy @ bnb.functional.dequantize_4bit(layer.weight, state))
    print(json.dumps(best))


def ours():
    command = ["cargo", "bench", "-p", "rankfold-cpu", "--bench", "gemm", "--", "--warm-up-time", "0.3", "--measurement-time", "1", "--sample-size", "10"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    best = {}
    for path in glob.glob(os.path.join(ROOT, "target/criterion/*/*/new/sample.json")):
        with open(os.path.join(os.path.dirname(path), "benchmark.json")) as file:
            about = json.load(file)
        with open(path) as file:
            sample = json.load(file)
        best[f"{about['group_id']} {about['function_id']}"] = min(t / n for t, n in zip(sample["times"], sample["iters"])) / 1e9
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.peer:
        return peer(a.peer)
    mine, theirs = {}, {}
    for _ in range(a.rounds):
        command = [sys.executable, __file__, "--peer", str(os.cpu_count())]
        for best, figures in ((mine, ours()), (theirs, json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))):
            for name, seconds in figures.items():
                best[name] = min(best.get(name, 1e9), seconds)
    for m, n, k in SHAPES:
        for kernel in ("f32 y = x·Wᵀ", "f32 dx = dy·W", "nf4 y = x·Wᵀ", "nf4 dx = dy·W"):
            r, t = mine[f"{m}x{n}x{k} {kernel}"], theirs[f"{m}x{n}x{k} {kernel}"]
            rate = 2e-9 * m * n * k
            print(f"{m}×{n}×{k} {kernel}: rankfold {rate / r:.1f} GFLOP/s, peer {rate / t:.1f}: {t / r:.2f} times")


main()
