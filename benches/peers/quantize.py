"""Rankfold's quantisation and bitsandbytes' on the CPU, side by side.

    python benches/peers/quantize.py [--rounds N]

Runs `cargo bench -p rankfold-cpu --bench quantize` and bitsandbytes in turn, a fresh process each time, so that a
machine whose speed drifts treats both alike. Printed: the best time of each over all rounds, as elements a second, and
their ratio. 4096×4096, NF4 in blocks of 64, 8 bits in blocks of 256.
"""
import argparse, glob, json, os, subprocess, sys, time

ROWS, COLUMNS = 4096, 4096
ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")


def peer(threads):
    import torch, bitsandbytes.functional as bnb
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    best = {}

    def measure(name, kernel):
        kernel()
        end = time.perf_counter() + 1.0
        while time.perf_counter() < end:
            begun = time.perf_counter()
            kernel()
            best[name] = min(best.get(name, 1e9), time.perf_counter() - begun)

    w = 0.02 * torch.randn(ROWS, COLUMNS)
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        typed = w.to(dtype)
        for scales, double in (("", False), (", double", True)):
            quantise = lambda: bnb.quantize_4bit(typed, blocksize=64, compress_statistics=double, quant_type="nf4")
            measure(f"quantise {name} to nf4{scales}", quantise)
            codes, state = quantise()
            measure(f"dequantise nf4 to {name}{scales}", lambda: bnb.dequantize_4bit(codes, state))
    codes, state = bnb.quantize_blockwise(w, blocksize=256)
    measure("quantise f32 to 8 bits", lambda: bnb.quantize_blockwise(w, blocksize=256))
    measure("dequantise 8 bits to f32", lambda: bnb.dequantize_blockwise(codes, state))
    print(json.dumps(best))


def ours():
    command = ["cargo", "bench", "-p", "rankfold-cpu", "--bench", "quantize", "--", "--warm-up-time", "0.3", "--measurement-time", "1", "--sample-size", "10"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    best = {}
    for path in glob.glob(os.path.join(ROOT, f"target/criterion/{ROWS}x{COLUMNS}/*/new/sample.json")):
        with open(os.path.join(os.path.dirname(path), "benchmark.json")) as file:
            about = json.load(file)
        with open(path) as file:
            sample = json.load(file)
        best[about["function_id"]] = min(t / n for t, n in zip(sample["times"], sample["iters"])) / 1e9
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
    for name, seconds in theirs.items():
        rate = ROWS * COLUMNS * 1e-9
        print(f"{name}: rankfold {rate / mine[name]:.2f} Gelem/s, peer {rate / seconds:.3f}: {seconds / mine[name]:.2f} times")


main()
