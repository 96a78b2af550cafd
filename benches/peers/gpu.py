"""torch and bitsandbytes on a GPU, on what `benches/cuda.rs` measures.

    python benches/peers/gpu.py [--host] > peers.json

Printed: JSON with rows of the bench's own format, by the same method: the median of several rounds, each of many calls
between two events. A short product is captured as a graph too (`graph_us`), which leaves Python's part out: a peer's
time is the best of what there is. Without torch or a GPU, a reason and no rows. `--host` runs small sizes on the CPU, to
see that everything runs; its times mean nothing.
"""
import json, statistics, sys, time

HOST = "--host" in sys.argv[1:]
BLOCK, BLOCK_8BIT, RANK = 64, 256, 16
ROUNDS, ROUND_US = (3, 0) if HOST else (7, 5000)
TURNS_BYTES = 1 << 13 if HOST else 256 << 20
COPY_BYTES = 1 << 16 if HOST else 1 << 30
SIDES = [64] if HOST else [4096, 8192]
ELEMENTS = [1 << 12] if HOST else [64 << 20, 256 << 20]
WEIGHTS = [(96, 64)] if HOST else [(4096, 4096), (11008, 4096)]
TOKENS = [1, 4, 20] if HOST else [2 ** i for i in range(13)]
# Calls below it may wait for Python.
LAUNCH_BOUND_US = 200
ROWS = []


def count(n):
    return f"{n >> 20} Mi" if n % (1 << 20) == 0 else str(n)


class HostEvent:
    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def interval(run):
    """Microseconds between two events around a call."""
    import torch
    begin, end = (HostEvent(), HostEvent()) if HOST else [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    begin.record()
    run()
    end.record()
    if not HOST:
        end.synchronize()
    return max(1e3 * begin.elapsed_time(end), 1e-3)


def time_of(call):
    """The median of the rounds, and how far they lie apart as a fraction of it."""
    turn = 0

    def several(calls):
        nonlocal turn
        for _ in range(calls):
            call(turn)
            turn += 1

    interval(lambda: several(1))
    calls = 1 if HOST else min(max(int(ROUND_US * 3 / interval(lambda: several(3))), 1), 1000)
    interval(lambda: several(calls))
    times = sorted(interval(lambda: several(calls)) / calls for _ in range(ROUNDS))
    median = statistics.median(times)
    return median, (times[-1] - times[0]) / median


def graph_of(call, turns):
    """A call's time in a graph of one for every turn; none where it cannot be captured."""
    import torch
    if HOST:
        return None
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for turn in range(turns):
                call(turn)
        return time_of(lambda _: graph.replay())[0] / turns
    except Exception as why:
        print(f"not captured: {str(why).splitlines()[0]}", file=sys.stderr)
        return None


def measure(kernel, shape, call, bytes=0, flops=0, turns=None, **also):
    row = {"kernel": kernel, "shape": shape, **also}
    try:
        median, spread = time_of(call)
        row |= {"median_us": median, "spread": spread, "bytes": int(bytes), "flops": flops,
                "bytes_per_s": 1e6 * bytes / median, "flops_per_s": 1e6 * flops / median}
        captured = graph_of(call, turns) if turns and median < LAUNCH_BOUND_US else None
        if captured:
            row["graph_us"] = captured
    except Exception as why:
        row["error"] = (str(why).splitlines() or [type(why).__name__])[0]
    print(", ".join(str(value) for value in row.values()), file=sys.stderr)
    ROWS.append(row)


def limits(torch, device):
    x = torch.rand(COPY_BYTES // 4, device=device)
    y = torch.empty_like(x)
    measure("copy", count(COPY_BYTES), lambda _: y.copy_(x), 2 * COPY_BYTES)
    del x, y
    for n in SIDES:
        for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
            a, b = (torch.rand(n, n, device=device).sub_(0.5).to(dtype) for _ in range(2))
            measure("gemm", f"{n}x{n}x{n}", lambda _: a @ b.t(), 3 * n * n * a.element_size(), 2 * n ** 3, compute=name)


def quantise(torch, bnb, device):
    for n in ELEMENTS:
        for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            w = torch.rand(n, device=device).sub_(0.5).to(dtype)
            for scales, double in (("", False), (", double", True)):
                bytes = n * (w.element_size() + 0.5 + (1 + 4 / 256 if double else 4) / BLOCK)
                to_codes = lambda _: bnb.quantize_4bit(w, blocksize=BLOCK, compress_statistics=double, quant_type="nf4")
                measure(f"quantize_4bit {name}{scales}", count(n), to_codes, bytes)
                codes, state = to_codes(0)
                back = lambda _: bnb.dequantize_4bit(codes, state)
                measure(f"dequantize_4bit {name}{scales}", count(n), back, bytes)
                del codes, state
            del w
        x = torch.rand(n, device=device).sub_(0.5)
        bytes = n * (5 + 4 / BLOCK_8BIT)
        measure("quantize_8bit", count(n), lambda _: bnb.quantize_blockwise(x, blocksize=BLOCK_8BIT), bytes)
        codes, state = bnb.quantize_blockwise(x, blocksize=BLOCK_8BIT)
        measure("dequantize_8bit", count(n), lambda _: bnb.dequantize_blockwise(codes, state), bytes)
        del x, codes, state


def dense_products(torch, device, outputs, inputs):
    turns = max(TURNS_BYTES // (2 * outputs * inputs), 1)
    weights = [torch.rand(outputs, inputs, device=device).sub_(0.5).bfloat16() for _ in range(turns)]
    for tokens in TOKENS:
        x, dy = (torch.rand(tokens, n, device=device).sub_(0.5).bfloat16() for n in (inputs, outputs))
        bytes = 2 * (outputs * inputs + tokens * (inputs + outputs))
        about = dict(bytes=bytes, flops=2 * tokens * outputs * inputs, turns=turns, tokens=tokens, compute="bf16")
        forward = lambda turn: torch.nn.functional.linear(x, weights[turn % turns])
        measure("linear dense", f"{outputs}x{inputs}", forward, **about)
        measure("linear_grad_input dense", f"{outputs}x{inputs}", lambda turn: dy @ weights[turn % turns], **about)


def products(torch, bnb, matmul_4bit, device, outputs, inputs):
    """Forward as bitsandbytes' Linear4bit does it, with PEFT's LoRA beside it; backward as its autograd function does."""
    shape, turns = f"{outputs}x{inputs}", max(TURNS_BYTES // (outputs * inputs // 2), 1)
    for compute, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        draw = lambda *shape: torch.rand(*shape, device=device).sub_(0.5).to(dtype)
        quantised = [bnb.quantize_4bit(draw(outputs, inputs), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
                     for _ in range(turns)]
        adapters = [(draw(RANK, inputs), draw(outputs, RANK)) for _ in range(turns)]
        weight = outputs * inputs * (0.5 + (1 + 4 / 256) / BLOCK)

        def linear(turn, x, rank):
            codes, state = quantised[turn % turns]
            y = matmul_4bit(x, codes.t(), quant_state=state)
            if rank:
                a, b = adapters[turn % turns]
                y = y + (x @ a.t()) @ b.t() * 2.0
            return y

        def grad_input(turn, dy, rank):
            codes, state = quantised[turn % turns]
            dx = dy @ bnb.dequantize_4bit(codes, state)
            if rank:
                a, b = adapters[turn % turns]
                dx = dx + (dy * 2.0 @ b) @ a
            return dx

        for tokens in TOKENS:
            x, dy = draw(tokens, inputs), draw(tokens, outputs)
            about = lambda rank: dict(
                bytes=weight + x.element_size() * (tokens + rank) * (inputs + outputs),
                flops=2 * tokens * (inputs * outputs + rank * (inputs + outputs)),
                turns=turns, tokens=tokens, compute=compute, rank=rank)
            for rank in (0, RANK):
                measure("linear nf4", shape, lambda turn: linear(turn, x, rank), path="matmul_4bit", **about(rank))
                measure("linear_grad_input nf4", shape, lambda turn: grad_input(turn, dy, rank), path="dequantize_4bit",
                        **about(rank))
            if tokens == 1:
                gemv = lambda turn: bnb.gemv_4bit(x, quantised[turn % turns][0].t(), state=quantised[turn % turns][1])
                measure("linear nf4", shape, gemv, path="gemv_4bit", **about(0))


def run():
    """The record; a reason in place of rows where there is no GPU or no torch."""
    try:
        import torch
    except ImportError as why:
        return {"reason": f"torch is not there: {why}", "rows": []}
    if not HOST and not torch.cuda.is_available():
        return {"reason": f"torch {torch.__version__} finds no CUDA device", "rows": []}
    device = "cpu" if HOST else "cuda"
    record = {"device": "host" if HOST else torch.cuda.get_device_name(), "torch": torch.__version__}
    with torch.no_grad():
        limits(torch, device)
        for outputs, inputs in WEIGHTS:
            dense_products(torch, device, outputs, inputs)
        try:
            import bitsandbytes
        except Exception as why:
            record["reason"] = f"bitsandbytes is not there: {(str(why).splitlines() or [type(why).__name__])[0]}"
        else:
            record["bitsandbytes"] = bitsandbytes.__version__
            quantise(torch, bitsandbytes.functional, device)
            for outputs, inputs in WEIGHTS:
                products(torch, bitsandbytes.functional, bitsandbytes.matmul_4bit, device, outputs, inputs)
    return {**record, "rows": ROWS}


record = run()
if "reason" in record:
    print(f"skipped: {record['reason']}", file=sys.stderr)
print(json.dumps(record))
