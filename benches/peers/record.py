"""The speed of Rankfold beside its peers on a CPU, as a record: a table, a plot and JSON.

    python benches/peers/record.py target/release/rankfold benches/records/DEVICE/DATE-peers [--rounds N] [--only TEXT]

Written: the prefix with .md, .svg and .json; with --only, the steps whose name has the text are measured, and the other
rows stay as the record, where there is one, has them. What is compared, and how, `gemm.py` and `train_step.py` say; a
machine that does other work beside it gives no figures worth keeping. Needs the peers' packages.
"""
import argparse, datetime, gemm, itertools, json, os, platform, sides, train_step
from importlib.metadata import version

SHAPES = ["512x4096x4096", "1024x1024x1024"]
STEPS = [("small", "qlora", "f32"), ("small", "qlora", "bf16"), ("smol", "qlora", "bf16"), ("small", "adalora", "f32"),
         ("small", "full", "f32")]


def machine():
    with open("/proc/cpuinfo") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in names.get("flags", "").split()]
    return f"{names.get('model name', platform.machine())} ({', '.join(units)}), {os.cpu_count()} cores"


def products(rounds):
    """Of y = x·Wᵀ and dx = dy·W together: their operations over their times."""
    mine, theirs = sides.both(gemm.__file__, "gemm", rounds, [f"^({'|'.join(SHAPES)})/"])
    for shape in SHAPES:
        m, n, k = map(int, shape.split("x"))
        for stored, inputs in (("f32", "f32"), ("f32", "bf16"), ("nf4", "f32"), ("nf4", "bf16")):
            names = [f"{shape} {stored} in {inputs}, {product}" for product in ("y = x·Wᵀ", "dx = dy·W")]
            rates = [4e-9 * m * n * k / sum(times[name] for name in names) for times in (mine, theirs)]
            what = "dense" if stored == "f32" else "NF4"
            yield dict(name=f"{what} linear, {inputs}, {shape}", unit="GFLOP/s", rankfold=rates[0], peer=rates[1])


def steps(binary, rounds, only):
    options = lambda of, threads: argparse.Namespace(
        binary=binary, config=of[0], method=of[1], dtype=of[2], threads=threads, rounds=rounds, steps=8)
    name = lambda of: f"{of[0]}, {of[1]} step, {of[2]}"
    found = {}
    for of in (of for of in STEPS if only in name(of)):
        best = found[of] = train_step.both(options(of, os.cpu_count()))
        mine, theirs = best["rankfold"], best["torch"]
        yield dict(name=name(of), unit="tokens/s", rankfold=mine["rate"], peer=theirs["rate"],
                   rankfold_rss=mine["rss"], peer_rss=theirs["rss"])
    for of in () if only else STEPS[:2]:
        one = train_step.both(options(of, 1))
        speedup = lambda side: found[of][side]["rate"] / one[side]["rate"]
        yield dict(name=f"{of[0]}, {of[1]}, {of[2]}: 1 to {os.cpu_count()} threads", unit="times",
                   rankfold=speedup("rankfold"), peer=speedup("torch"))


def markdown(record):
    yield f"# {record['date']}, {record['machine']}\n"
    yield f"{record['peers']}; the two in turn, the best of {record['rounds']} rounds or more. `benches/peers/record.py` measures it again.\n"
    yield "| | unit | Rankfold | peer | Rankfold / peer | peak memory |"
    yield "|---|---|---|---|---|---|"
    for row in record["rows"]:
        number = lambda x: f"{x:.2f}" if x < 10 else f"{x:.0f}"
        memory = ""
        if "peer_rss" in row:
            mine, theirs = (row[key] / 1e6 for key in ("rankfold_rss", "peer_rss"))
            memory = f"{mine:.0f} MB of {theirs:.0f}: {mine / theirs:.2f}"
        yield (f"| {row['name']} | {row['unit']} | {number(row['rankfold'])} | {number(row['peer'])} "
               f"| **{row['rankfold'] / row['peer']:.2f}** | {memory} |")


def svg(record):
    """Bars of the ratio, with a line where the two are alike."""
    rows = [row for row in record["rows"] if row["unit"] != "times"]
    most = max(row["rankfold"] / row["peer"] for row in rows)
    left, width, height, top = 270, 430, 22, 46
    x = lambda ratio: left + width * ratio / most
    bottom = top + height * len(rows)
    yield (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 60} {bottom + 16}" '
           'font-family="sans-serif" font-size="12" fill="#222">')
    yield f'<rect width="100%" height="100%" fill="#fff"/><text x="10" y="18" font-size="14">Rankfold / peer, {record["date"]}</text>'
    yield f'<text x="10" y="34" fill="#666">{record["machine"]}</text>'
    for i, row in enumerate(rows):
        ratio, y = row["rankfold"] / row["peer"], top + height * i
        yield f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{row["name"]}</text>'
        yield f'<rect x="{left}" y="{y + 4}" width="{x(ratio) - left:.1f}" height="{height - 8}" fill="#3b7ddd"/>'
        yield f'<text x="{x(ratio) + 6:.1f}" y="{y + 15}">{ratio:.2f}</text>'
    yield f'<line x1="{x(1):.1f}" x2="{x(1):.1f}" y1="{top}" y2="{bottom}" stroke="#c33" stroke-dasharray="4 3"/></svg>'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("prefix")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="")
    a = parser.parse_args()
    peers = ", ".join(f"{name} {version(package)}" for name, package in
                      (("torch", "torch"), ("PEFT", "peft"), ("bitsandbytes", "bitsandbytes")))
    record = dict(date=datetime.date.today().isoformat(), machine=machine(), peers=peers, rounds=a.rounds, rows=[])
    if a.only and os.path.exists(f"{a.prefix}.json"):
        with open(f"{a.prefix}.json") as file:
            record = json.load(file)
    rows = {row["name"]: row for row in record["rows"]}
    measured = steps(os.path.abspath(a.binary), a.rounds, a.only)
    for row in measured if a.only else itertools.chain(products(a.rounds), measured):
        rows[row["name"]] = row
        print(f"{row['name']}: {row['rankfold'] / row['peer']:.2f} times", flush=True)
    record["rows"] = list(rows.values())
    os.makedirs(os.path.dirname(os.path.abspath(a.prefix)), exist_ok=True)
    for ending, text in (("json", json.dumps(record, indent=1)), ("md", "\n".join(markdown(record))), ("svg", "\n".join(svg(record)))):
        with open(f"{a.prefix}.{ending}", "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
