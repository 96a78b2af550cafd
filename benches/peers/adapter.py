"""A run's adapter in PEFT: on the built-in base as `rankfold export` writes it, and as `rankfold quantize` does (NF4,
double quantisation) and bitsandbytes dequantises it; the logits compared with those of `rankfold logits`.

    python benches/peers/adapter.py target/release/rankfold runs/001

Printed: the largest difference of a logit, beside the largest logit. Needs torch, transformers, peft, bitsandbytes,
safetensors. (The products themselves are torch's in f32: on a CPU with bf16 units bitsandbytes' own round to bf16.)
"""
import subprocess, sys, tempfile
import bitsandbytes, torch, transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"})


def peer(dense, base, adapter, ids):
    model, quantised = load(dense), dict(load(base).named_modules())
    for name, layer in model.named_modules():
        stored = quantised[name]
        if isinstance(stored, bitsandbytes.nn.Linear4bit):
            stored.weight.quant_state.dtype = torch.float32
            layer.weight.data = bitsandbytes.functional.dequantize_4bit(stored.weight, stored.weight.quant_state)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, adapter).eval()(ids).logits


def main(binary, run):
    transformers.logging.set_verbosity_error()
    rankfold = lambda *args: subprocess.run([binary, *args], check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        tokens, out = f"{folder}/tokens.safetensors", f"{folder}/logits.safetensors"
        rankfold("export", "--out", f"{folder}/dense")
        rankfold("quantize", "--double-quant", "--out", f"{folder}/nf4")
        vocab = transformers.AutoConfig.from_pretrained(f"{folder}/dense").vocab_size
        ids = torch.randint(0, vocab, (2, 128), generator=torch.Generator().manual_seed(0))
        save_file({"ids": ids, "labels": ids.clone()}, tokens)
        for base in ("dense", "nf4"):
            logits = peer(f"{folder}/dense", f"{folder}/{base}", run, ids)
            rankfold("logits", "--model", f"{folder}/{base}", "--adapter", run, "--tokens", tokens, "--out", out)
            difference = (load_file(out)["logits"] - logits).abs().max().item()
            print(f"{base}: logits differ by {difference:.1e} at most, the largest is {logits.abs().max().item():.1f}")


main(*sys.argv[1:])
