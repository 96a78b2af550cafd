"""Make the vectors of this folder: what PEFT computes with each of its methods, on the tiny models beside this folder.

    python crates/trainer/tests/peft/make.py

Needs torch, transformers, PEFT and bitsandbytes (made with torch 2.15.0, transformers 5.24.0, PEFT 0.21.2,
bitsandbytes 0.50.2). For each method a folder of its name holds what PEFT saved, an adapter that has moved from where
it began (but for LoftQ's), and what PEFT computes with it in f32:

    adapter_config.json, adapter_model.safetensors
    converted/          where the adapter began as a part of the base: the same as a LoRA beside the base as it was
    encoder/            where a prefix comes out of a network: that network, which PEFT keeps only in memory
    io.safetensors      ids and labels, i64 [2, tokens]; logits, f32 [2, tokens, vocab]
                        losses, f32 [steps]: before each step of AdamW (0.9, 0.999, 1e-8, no decay) at the rate lr [1]
                        trained_logits: after the last; grad.NAME: before the first, by the names of the adapter's file
"""
import copy
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import bitsandbytes as bnb
import peft
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
BIASED = HERE.parent / "families/llama"
# Of rows that are whole blocks of 4-bit weights, which bitsandbytes' CPU path needs.
BLOCKS = HERE.parent / "golden/tiny-llama"
TOKENS, STEPS, RATE = 8, 4, 1e-2


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                 device_map={"": "cpu"})
    # The folder's place on this machine, which PEFT would write into the configuration.
    model.name_or_path = model.config.name_or_path = ""
    return model.eval()


def saved_name(name):
    """The name in a file of what PEFT has in memory."""
    name = name.replace(".modules_to_save.default.", ".").replace("prompt_encoder.default.embedding.weight",
                                                                  "prompt_embeddings")
    return re.sub(r"\.default(?=\.|$)", "", name)


def move(model, by, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))


def follow(name, model, file_name=saved_name):
    """Save the adapter, and what the model computes with it."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    vocab = model.get_base_model().config.vocab_size
    torch.manual_seed(7)
    ids = torch.randint(vocab, (2, TOKENS))
    labels = ids.clone()
    labels[0, :3] = -100
    io = {"ids": ids, "labels": labels}

    def logits():
        with torch.no_grad():
            return model(input_ids=ids).logits[:, -TOKENS:].contiguous()

    io["logits"] = logits()
    named = {file_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        if step == 0:
            io |= {f"grad.{n}": p.grad.clone().contiguous() for n, p in named.items()}
        losses.append(loss.item())
        optimizer.step()
    io |= {"losses": torch.tensor(losses), "lr": torch.tensor([RATE]), "trained_logits": logits()}
    save_file(io, folder / "io.safetensors")
    print(f"{name}: {len(named)} tensors, loss {losses[0]:.4f} to {losses[-1]:.4f}")
    return folder


def check_names(model):
    """That gradients are under the names of the file."""
    trained = {saved_name(n) for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(get_peft_model_state_dict(model)), trained ^ set(get_peft_model_state_dict(model))


def beside_the_base(name, config, by):
    torch.manual_seed(1)
    model = get_peft_model(load(BIASED), config).eval()
    move(model, by, seed=2)
    check_names(model)
    follow(name, model)


def out_of_the_base(name, start):
    """PiSSA, OLoRA: with what PEFT makes of them for others."""
    model = get_peft_model(load(BIASED), LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"],
                                                    init_lora_weights=start, task_type="CAUSAL_LM")).eval()
    with TemporaryDirectory() as begun:
        # PEFT loads it beside the adapter, where nothing may be taken out of the base again.
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(begun)
        model.peft_config["default"].init_lora_weights = start
        move(model, 0.05, seed=2)
        check_names(model)
        converted = copy.deepcopy(model)
        folder = follow(name, model)
        converted.save_pretrained(folder / "converted", path_initial_model_for_weight_conversion=begun)
        (folder / "converted/README.md").unlink()


def on_the_cpu():
    """PEFT's LoftQ asks for a GPU, and needs none."""
    def here(to):
        return lambda self, *args, **named: to(self, *("cpu" if arg == "cuda" else arg for arg in args),
                                               **{k: "cpu" if v == "cuda" else v for k, v in named.items()})
    patches = ExitStack()
    for holder in (torch.Tensor, bnb.nn.Params4bit):
        patches.enter_context(mock.patch.object(holder, "to", here(holder.to)))
    return patches


def loftq():
    with on_the_cpu():
        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=2, lora_alpha=2, target_modules=layers, init_lora_weights="loftq",
                            loftq_config=peft.LoftQConfig(loftq_bits=4, loftq_iter=2), task_type="CAUSAL_LM")
        model = get_peft_model(load(BLOCKS), config).eval()
    check_names(model)
    follow("loftq", model)


def olora_in_4_bits():
    """Computed on the 4-bit base's values in f32: bitsandbytes' own CPU forward rounds the block scales to bf16."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"], init_lora_weights="olora",
                        task_type="CAUSAL_LM")
    with torch.no_grad():
        quantised = get_peft_model(load(BLOCKS.parent / "qlora_nf4_dq/checkpoint"), config)
        state = {n.replace(".base_layer.", ".").removeprefix("base_model.model."): p
                 for n, p in quantised.named_parameters()}
        dense = load(BLOCKS)
        for name, parameter in dense.named_parameters():
            found = state.pop(name)
            if isinstance(found, bnb.nn.Params4bit):
                found = bnb.functional.dequantize_4bit(found.data, found.quant_state).reshape(parameter.shape)
            parameter.copy_(found)
        config.init_lora_weights = True
        model = get_peft_model(dense, config).eval()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state.pop(name.removeprefix("base_model.model.")))
        assert not state
    config.init_lora_weights = "olora"
    move(model, 0.05, seed=2)
    check_names(model)
    follow("olora_nf4_dq", model)


def projected_prefix():
    torch.manual_seed(1)
    config = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5,
                                task_type="CAUSAL_LM")
    model = get_peft_model(load(BIASED), config).eval()
    encoder = {n: p.detach().clone().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    encoder = {n.replace("prompt_encoder.default.", "prompt_encoder."): p for n, p in encoder.items()}
    folder = follow("prefix_projected", model, lambda n: n.replace("prompt_encoder.default.", "prompt_encoder."))
    (folder / "encoder").mkdir()
    save_file(encoder, folder / "encoder/adapter_model.safetensors")
    shutil.copy(folder / "adapter_config.json", folder / "encoder")


torch.set_num_threads(1)
TASK = dict(task_type="CAUSAL_LM")
LORA = dict(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], **TASK)
beside_the_base("ia3", IA3Config(**TASK), 0.2)
beside_the_base("bias_all", LoraConfig(bias="all", **LORA), 0.1)
beside_the_base("bias_lora_only", LoraConfig(bias="lora_only", **LORA), 0.1)
beside_the_base("modules_to_save", LoraConfig(modules_to_save=["lm_head", "norm"], **LORA), 0.1)
beside_the_base("prompt", PromptTuningConfig(num_virtual_tokens=3, **TASK), 0.1)
beside_the_base("prefix", PrefixTuningConfig(num_virtual_tokens=3, **TASK), 0.5)
projected_prefix()
out_of_the_base("pissa", "pissa")
out_of_the_base("olora", "olora")
loftq()
olora_in_4_bits()
