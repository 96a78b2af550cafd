"""One optimiser step of Rankfold and of torch + transformers + PEFT (+ bitsandbytes), side by side.

    python benches/peers/train_step.py target/release/rankfold [small|smol] [full|lora|qlora|adalora] [f32|bf16] [--threads N]

Both train the same model (random weights, stored in that precision), the same adapters (rank 16 on every linear layer;
AdaLoRA from 24 to 16, masked, in its budget's fall) and the same tokens, with AdamW. With bf16 the peer's activations are
bf16 too; ours are f32 between products. The two alternate, a fresh process each time, so that a machine whose speed drifts treats both alike.
Printed: tokens a second (the median step after two of warm-up; the best round of each), their ratio, peak resident
memory of each process, and its ratio. Needs the peers' packages: torch, transformers, peft, bitsandbytes, safetensors.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile

CONFIGS = {
    # 512 wide, 8 layers, four rows of 256 tokens
    "small": (dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
                   intermediate_size=1408, vocab_size=8192), 4, 256),
    # the shape of SmolLM2-135M, one row of 256 tokens
    "smol": (dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                  intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True), 1, 256),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(folder, name, dtype):
    """The model's folder and the tokens' file."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM
    config, rows, seq = CONFIGS[name]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config, max_position_embeddings=2048))
    model.to(torch.bfloat16 if dtype == "bf16" else torch.float32).save_pretrained(f"{folder}/model")
    ids = torch.randint(0, config["vocab_size"], (rows, seq))
    save_file({"ids": ids, "labels": ids.clone()}, f"{folder}/tokens.safetensors")


def peer(folder, method, dtype, steps, threads):
    """Run in a process of its own: prints its figures as JSON."""
    import resource, time, torch, transformers
    from peft import AdaLoraConfig, LoraConfig, get_peft_model
    from safetensors.torch import load_file
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    precision = torch.bfloat16 if dtype == "bf16" else torch.float32
    quantised = {}
    if method == "qlora":
        quantised = dict(device_map={"": "cpu"}, quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=precision))
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=precision, attn_implementation="sdpa", **quantised)
    common = dict(lora_alpha=32, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM")
    if method == "adalora":
        model = get_peft_model(model, AdaLoraConfig(init_r=24, target_r=16, tinit=2, tfinal=2, deltaT=1, total_step=100, **common))
    elif method != "full":
        model = get_peft_model(model, LoraConfig(r=16, **common))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    ids = load_file(f"{folder}/tokens.safetensors")["ids"]
    times = []
    for step in range(steps):
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if method == "adalora":
            model.base_model.update_and_allocate(step + 1)
        times.append(time.perf_counter() - begun)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"rate": ids.numel() / statistics.median(times[2:]), "rss": rss}))


def ours(binary, folder, method, dtype, steps, threads):
    out = f"{folder}/run"
    methods = {
        "full": ["--method", "full"],
        "lora": ["--rank", "16", "--alpha", "32", "--targets", "all-linear", "--quantize", "none"],
        "qlora": ["--rank", "16", "--alpha", "32", "--targets", "all-linear", "--quantize", "nf4", "--double-quant"],
        "adalora": ["--method", "adalora", "--rank", "24", "--alpha", "32", "--targets", "all-linear", "--quantize", "none", "--adalora-target",
                    "16", "--adalora-tinit", "2", "--adalora-tfinal", "2", "--adalora-delta", "1", "--adalora-prune", "mask"],
    }
    subprocess.run([binary, "train", "--model", f"{folder}/model", "--tokens", f"{folder}/tokens.safetensors",
                    "--compute", dtype, "--steps", str(steps), "--lr", "1e-4", "--schedule", "constant",
                    "--warmup", "0", "--clip", "0", "--checkpoint-every", "0", "--threads", str(threads), "--out", out,
                    *(["--overwrite"] if os.path.exists(out) else []), *methods[method]], check=True, capture_output=True)
    lines = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
    return {"rate": statistics.median(x["tokens_per_second"] for x in lines[2:]), "rss": lines[-1]["peak_rss"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("config", nargs="?", default="small", choices=CONFIGS)
    parser.add_argument("method", nargs="?", default="lora", choices=["full", "lora", "qlora", "adalora"])
    parser.add_argument("dtype", nargs="?", default="f32", choices=["f32", "bf16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--peer", metavar="FOLDER", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.peer:
        return peer(a.peer, a.method, a.dtype, a.steps, a.threads)
    print(sentence(a, both(a)))


def both(a):
    """The best round of each side."""
    with tempfile.TemporaryDirectory() as folder:
        make(folder, a.config, a.dtype)
        best = {"rankfold": None, "torch": None}
        for _ in range(a.rounds):
            here = ours(a.binary, folder, a.method, a.dtype, a.steps, a.threads)
            command = [sys.executable, __file__, a.binary, a.config, a.method, a.dtype, "--threads", str(a.threads),
                       "--steps", str(a.steps), "--peer", folder]
            there = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            for name, figures in (("rankfold", here), ("torch", there)):
                if best[name] is None or figures["rate"] > best[name]["rate"]:
                    best[name] = figures
        return best


def sentence(a, best):
    r, t = best["rankfold"], best["torch"]
    return (f"{a.config} {a.method} {a.dtype}, {a.threads} threads: rankfold {r['rate']:.0f} tokens/s, torch {t['rate']:.0f}: "
            f"{r['rate'] / t['rate']:.2f} times; peak memory {r['rss'] / 1e6:.0f} MB, {t['rss'] / 1e6:.0f}: "
            f"{r['rss'] / t['rss']:.2f} of it")


if __name__ == "__main__":
    main()
