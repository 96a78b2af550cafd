"""Make the tiny random models of this folder, and what transformers computes with them.

    python crates/trainer/tests/families/make.py

Needs torch and transformers (made with torch 2.15.0, transformers 5.24.0). Each folder beside this file holds a
Hugging Face model in f32 (config.json, model.safetensors) and io.safetensors:

    ids         i64 [2, tokens]
    logits      f32 [2, tokens, vocab]  of the model in f64, eager attention, rounded once
    peer_error  f32 [1]                 max |logits of the model in f32 − logits|: what f32 costs transformers itself
"""
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

# More tokens than one block of the CPU's attention kernel has queries (48) or keys (64).
TOKENS = 72
COMMON = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              vocab_size=96, initializer_range=0.25, bos_token_id=None, eos_token_id=None)
FAMILIES = {
    # Of the four rotary frequencies (wavelengths 6, 63, 628 and 6283) two stay, one is blended, one is divided.
    "llama": LlamaConfig(**COMMON, tie_word_embeddings=False, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5,
                         max_position_embeddings=8192,
                         rope_parameters=dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
                                              high_freq_factor=4.0, original_max_position_embeddings=1024)),
    "mistral": MistralConfig(**COMMON, tie_word_embeddings=False, sliding_window=7, rms_norm_eps=1e-5,
                             rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    # A window in the second layer alone.
    "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True, use_sliding_window=True, sliding_window=10,
                         max_window_layers=1, rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
    "qwen3": Qwen3Config(**COMMON, tie_word_embeddings=True, head_dim=12,
                         rope_parameters=dict(rope_type="default", rope_theta=1000.0)),
}


def empty(config, dtype):
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()


def logits_in_f64(config, weights, ids):
    # transformers asks for norms, rotary angles and softmaxes in torch.float32, whatever the model is in.
    with mock.patch.multiple(torch, float32=torch.float64, float=torch.float64):
        model = empty(config, torch.float64)
        model.load_state_dict(weights)
        return model(ids, use_cache=False).logits


def make(folder, config, seed):
    torch.manual_seed(seed)
    model = empty(config, torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
        elif name.endswith("bias"):
            parameter.copy_(0.5 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    ids = torch.randint(config.vocab_size, (2, TOKENS))
    logits = logits_in_f64(config, model.state_dict(), ids)
    peer_error = (model(ids, use_cache=False).logits - logits).abs().max().reshape(1)
    print(f"{folder.name}: largest logit {logits.abs().max():.3f}, peer_error {peer_error.item():.2e}")
    save_file({"ids": ids, "logits": logits.float(), "peer_error": peer_error.float()}, folder / "io.safetensors")


torch.set_grad_enabled(False)
torch.set_num_threads(1)
for seed, (name, config) in enumerate(FAMILIES.items()):
    make(Path(__file__).parent / name, config, seed)
