"""Rankfold's quantisation and bitsandbytes' on the CPU, side by side.

    python benches/peers/quantize.py [--rounds N]

Printed: elements a second of `cargo bench -p rankfold-cpu --bench quantize` and of bitsandbytes, and their ratio.
4096×4096, NF4 in blocks of 64, 8 bits in blocks of 256.
"""
from sides import compare

ROWS, COLUMNS = 4096, 4096


def peer(watch, threads):
    import torch, bitsandbytes.functional as bnb
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    measure = lambda name, kernel: watch.measure(f"{ROWS}x{COLUMNS} {name}", kernel)
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


def report(mine, theirs):
    for name, seconds in theirs.items():
        rate = ROWS * COLUMNS * 1e-9
        print(f"{name}: rankfold {rate / mine[name]:.2f} Gelem/s, peer {rate / seconds:.3f}: {seconds / mine[name]:.2f} times")


compare(__doc__, "quantize", peer, report)
