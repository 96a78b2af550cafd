"""The record of `benches/gpu run`: what its steps left in one folder, as JSON and as tables in another.

    python benches/peers/gpu_record.py RESULTS RECORDS

Written: RECORDS/<device>/<date>.json and .md. What a run of the same day and build did not do again is kept.
"""
import json, os, re, sys, time


def read(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def steps(results):
    """Each step's outcome and the end of its log, by name."""
    found = {}
    for line in read(f"{results}/steps.tsv").splitlines():
        name, outcome, seconds, why = line.split("\t")
        log = read(f"{results}/{name}.log").splitlines() if os.path.exists(f"{results}/{name}.log") else []
        found[name] = {"outcome": outcome, "seconds": int(seconds), "why": why, "log": log[-(100 if outcome == "failed" else 12):]}
    return found


def merged(results, records):
    """The record and the path that it belongs to, without an ending."""
    sides = {name: json.loads(read(f"{results}/{name}.json") or "{}")
             for name in ("bench", "peers") if os.path.exists(f"{results}/{name}.json")}
    device = read(f"{results}/device").strip()
    path = f"{records}/{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}/{time.strftime('%Y-%m-%d')}"
    record = {"device": device, "date": os.path.basename(path), "built_from": read(f"{results}/built_from").strip()}
    old = json.loads(read(f"{path}.json")) if os.path.exists(f"{path}.json") else {}
    if old.get("built_from") == record["built_from"]:
        record = {**old, **record}
    record["steps"] = {**record.get("steps", {}), **steps(results)}
    return record | sides, path


def one_row_a_line(record):
    text = json.dumps({**record, **{side: {**record[side], "rows": f"rows of {side}"} for side in ("bench", "peers") if side in record}},
                      ensure_ascii=False, indent=1)
    for side in ("bench", "peers"):
        rows = ",\n".join(f"   {json.dumps(row, ensure_ascii=False)}" for row in record.get(side, {}).get("rows", []))
        text = text.replace(f'"rows of {side}"', f"[\n{rows}\n  ]" if rows else "[]")
    return text + "\n"


def key(row):
    return row["kernel"], row.get("compute"), row["shape"], row.get("tokens"), row.get("rank") or 0


def us(value):
    return "" if value is None else f"{value:.1f} µs" if value < 1e3 else f"{value / 1e3:.2f} ms"


def times(mine, theirs):
    return f"{theirs / mine:.2f}" if mine and theirs else ""


def limit(row):
    """The limit that a kernel is nearer to, and how near."""
    copy, dense = row.get("fraction_of_copy") or 0, row.get("fraction_of_dense") or 0
    if not copy and not dense:
        return ""
    return f"{100 * max(copy, dense):.0f} % of {'the copy' if copy >= dense else 'dense ' + row.get('compute', 'f32')}"


def table(head, rows):
    return ["", *(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)), ""]


def product_tables(rows, peers):
    """A table for each kernel, type and weight: a line for each number of tokens, a column for each way."""
    found = {(key(row), row["path"]): row for row in rows if "path" in row and "error" not in row}
    dense = {key(row): row["median_us"] for row in rows if row["kernel"].endswith(" dense") and "error" not in row}
    for kernel, compute, shape in dict.fromkeys(key(row)[:3] for row in rows if "path" in row):
        lines, fastest = [], {}
        for tokens in dict.fromkeys(k[3] for k, _ in found if k[:3] == (kernel, compute, shape)):
            of = lambda path, rank=0: found.get(((kernel, compute, shape, tokens, rank), path), {})
            plain, adapted = of("default"), of("default", 16)
            forced = {path: of(path).get("median_us") for path in ("few", "tensor", "decoded") if of(path)}
            if forced:
                fastest.setdefault(min(forced, key=forced.get), []).append(str(tokens))
            peer, peer_adapted = (peers.get((kernel, compute, shape, tokens, rank)) for rank in (0, 16))
            lines.append([
                str(tokens), us(plain.get("median_us")), limit(plain), *(us(forced.get(path)) for path in ("few", "tensor", "decoded")),
                us(dense.get((kernel.replace(" nf4", " dense"), "bf16", shape, tokens, 0))),
                us(peer), times(plain.get("median_us"), peer),
                us(adapted.get("median_us")), f"{adapted['over_rank_0']:.2f}" if "over_rank_0" in adapted else "",
                us(peer_adapted), times(adapted.get("median_us"), peer_adapted)])
        yield from ["", f"{kernel}, {compute}, {shape}. Fastest: " +
                    "; ".join(f"{path} at {', '.join(tokens)}" for path, tokens in fastest.items()) + " tokens."]
        yield from table(["tokens", "default", "of the limit", "few", "tensor", "decoded", "dense bf16", "peer", "times",
                          "rank 16", "over rank 0", "peer, rank 16", "times"], lines)


def markdown(record):
    bench, peers = record.get("bench", {}), record.get("peers", {})
    yield f"# {record['date']}, {record['device']}"
    yield from ["", f"Built from {record['built_from']}. By `benches/gpu run`."]
    if bench.get("host"):
        yield "Small sizes on the host in place of a GPU: its times mean nothing."
    versions = [f"{name} {peers[name]}" for name in ("torch", "bitsandbytes") if name in peers]
    if versions:
        yield f"Peers: {', '.join(versions)}; their best time, eager or captured as a graph."
    yield from table(["step", "outcome", "seconds", "why"],
                     [[name, step["outcome"], str(step["seconds"]), step["why"]] for name, step in record["steps"].items()])
    for name, step in record["steps"].items():
        if step["log"] and (step["outcome"] == "failed" or name in ("nvidia-smi", "train")):
            yield from ["", f"{name}:", "", *(f"    {line}" for line in step["log"][-40:])]
    if "copy_bytes_per_s" in bench:
        rate = lambda name, unit: f"{bench[name] * 1e-12:.2f} {unit}" if bench.get(name) else "not measured"
        yield from ["", f"Limits: the copy {rate('copy_bytes_per_s', 'TB/s')}, dense bf16 {rate('dense_bf16_flops_per_s', 'TFLOP/s')}, "
                    f"dense f32 {rate('dense_f32_flops_per_s', 'TFLOP/s')}, by {'cuBLASLt' if bench['cublaslt'] else 'kernels/gemm.cu'}."]
    rows = bench.get("rows", [])
    best = {}
    for row in peers.get("rows", []):
        if "error" not in row:
            best[key(row)] = min(best.get(key(row), 1e12), row["median_us"], row.get("graph_us", 1e12))
    plain = [[row["kernel"] + (f" {row['compute']}" if "compute" in row else ""), row["shape"], us(row["median_us"]),
              f"{100 * row['spread']:.0f} %", limit(row), us(best.get(key(row))), times(row["median_us"], best.get(key(row)))]
             for row in rows if "path" not in row and "error" not in row and not row["kernel"].endswith(" dense")]
    if plain:
        yield from table(["kernel", "shape", "time", "spread", "of the limit", "peer", "times"], plain)
    yield from product_tables(rows, best)
    for side, found in (("bench", rows), ("peers", peers.get("rows", []))):
        for row in found:
            if "error" in row:
                yield from ["", f"{side}, {', '.join(str(part) for part in key(row))}: {row['error']}"]


def main(results, records):
    record, path = merged(results, records)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    lines = "\n".join(markdown(record)) + "\n"
    for ending, text in ((".json", one_row_a_line(record)), (".md", re.sub("\n\n\n+", "\n\n", lines))):
        with open(path + ending, "w", encoding="utf-8") as file:
            file.write(text)
    return path


print(main(*sys.argv[1:]) + ".md")
