"""Rankfold's products and torch's (oneDNN's, bitsandbytes' in 4 bits), in f32 and bf16, side by side.

    python benches/peers/gemm.py [--rounds N]

Printed: operations a second of `cargo bench -p rankfold-cpu --bench gemm` and of torch, and their ratio. In bf16 the
peer's operands are stored so; ours are f32 that are rounded on the way.
"""
from sides import compare

SHAPES = [(1024, 1024, 1024), (512, 4096, 4096), (1024, 1408, 512), (1024, 512, 1408),
          (16, 4096, 4096), (8, 4096, 4096), (4, 4096, 4096), (2, 4096, 4096), (1, 4096, 4096)]


def peer(watch, threads):
    import torch, bitsandbytes as bnb
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    for m, n, k in SHAPES:
        for inputs, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            name = lambda stored, product: f"{m}x{n}x{k} {stored} in {inputs}, {product}"
            x, w, dy = (torch.randn(*shape).to(dtype) for shape in ((m, k), (n, k), (m, n)))
            watch.measure(name("f32", "y = x·Wᵀ"), lambda: torch.nn.functional.linear(x, w))
            watch.measure(name("f32", "dx = dy·W"), lambda: dy @ w)
            layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
            layer.weight = bnb.nn.Params4bit(w, requires_grad=False, quant_type="nf4", compress_statistics=True)
            layer = layer.to("cpu")
            watch.measure(name("nf4", "y = x·Wᵀ"), lambda: layer(x))
            state = layer.weight.quant_state
            watch.measure(name("nf4", "dx = dy·W"), lambda: dy @ bnb.functional.dequantize_4bit(layer.weight, state))


def report(mine, theirs):
    for name, seconds in theirs.items():
        m, n, k = map(int, name.split()[0].split("x"))
        rate = 2e-9 * m * n * k
        print(f"{name}: rankfold {rate / mine[name]:.1f} GFLOP/s, peer {rate / seconds:.1f}: {seconds / mine[name]:.2f} times")


if __name__ == "__main__":
    compare(__doc__, "gemm", peer, report)
