"""4-bit checkpoints in the peers: what `rankfold quantize` writes, loaded by transformers and dequantised by
bitsandbytes, beside what `rankfold dequantize` makes of it.

    python benches/peers/checkpoint.py target/release/rankfold

Printed, by format and scales: the linear layers compared and the elements whose values differ (−0 and +0 are one
value: bitsandbytes' compiled kernel gives −0 for FP4's code 8 where its own table has 0). Needs torch, transformers,
bitsandbytes, accelerate, safetensors.
"""
import subprocess, sys, tempfile
import bitsandbytes, torch, transformers
from safetensors.torch import load_file


def main(binary):
    transformers.logging.set_verbosity_error()
    rankfold = lambda *args: subprocess.run([binary, *args], check=True, capture_output=True)
    for kind in ("nf4", "fp4"):
        for scales, double in (("single", []), ("double", ["--double-quant"])):
            with tempfile.TemporaryDirectory() as folder:
                rankfold("quantize", "--format", kind, *double, "--out", f"{folder}/q")
                rankfold("dequantize", "--model", f"{folder}/q", "--out", f"{folder}/d")
                ours = load_file(f"{folder}/d/model.safetensors")
                model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/q", device_map={"": "cpu"})
                layers = [(n, m) for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
                theirs = {n: bitsandbytes.functional.dequantize_4bit(m.weight, m.weight.quant_state) for n, m in layers}
                different = sum((theirs[n] != ours[f"{n}.weight"]).sum().item() for n in theirs)
                elements = sum(w.numel() for w in theirs.values())
                print(f"{kind}, {scales} scales: {len(theirs)} layers, {different} of {elements} elements differ")


main(*sys.argv[1:])
