"""
common/hf.py: Hugging Face folders in and out. config.json, tensor names, safetensors; it knows names and shapes, no model.

A folder is config.json + model.safetensors (or shards with an index) + tokenizer files. Our parameters merge what the
folder keeps apart (q, k, v in one matrix; gate and up in one), so a parameter is the rows of several HF tensors one after
another: `names()` is that table and reading is a copy of each tensor into its slice of rows, straight into place.

Deleted: no hub client, no auto classes, no device maps. A folder on disk or an error that says what to run.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.run import newest

# -----------------------------------------------------------------------------
# where the model is


def find(path):
    """A Hugging Face folder, or a run folder (its last complete checkpoint) -> the folder with config.json and tensors."""
    path = Path(path)
    if any(path.glob("*.safetensors")):
        return path
    found = newest(path)
    if found:
        return found[0]
    if path.is_dir():
        raise FileNotFoundError(f"{path} holds no model: no .safetensors file and no complete checkpoint")
    if str(path).count("/") == 1 and not str(path).startswith((".", "/", "runs/")):
        raise FileNotFoundError(f"no folder {path}; for the hub's model of that name: hf download {path} --local-dir {path.name}")
    raise FileNotFoundError(f"no folder {path}: give a Hugging Face folder or a run folder")


# -----------------------------------------------------------------------------
# config.json <-> the keyword arguments of a GPTConfig

FAMILIES = {  # architecture: (qkv_bias, qk_norm)
    "Qwen3ForCausalLM": (False, True),
}


def read_config(folder):
    """-> dict of GPTConfig's fields. ValueError / FileNotFoundError with the whole story in one line."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give a Hugging Face folder or a run folder")
    try:
        c = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not JSON ({e})") from None
    arch = (c.get("architectures") or ["?"])[0]
    if arch not in FAMILIES:
        raise ValueError(f"{path}: architecture {arch} is not known here; known: {', '.join(FAMILIES)}")
    qkv_bias, qk_norm = FAMILIES[arch]
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}          # new spelling, old spelling
    theta = rope.get("rope_theta", c.get("rope_theta", 10000.0))
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return dict(
        vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"], n_head=c["num_attention_heads"],
        n_kv_head=c.get("num_key_value_heads", c["num_attention_heads"]),
        head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        d_model=c["hidden_size"], d_ff=c["intermediate_size"], max_len=c["max_position_embeddings"], rope_theta=theta,
        rope_scaling=None if kind == "default" else {**scaling, "rope_type": kind},
        norm_eps=c.get("rms_norm_eps", 1e-6), qkv_bias=qkv_bias, qk_norm=qk_norm,
        tie_embeddings=bool(c.get("tie_word_embeddings", False)))


def config_json(c, dtype, eos=None):
    """The config.json of GPTConfig fields `c` (a dict)."""
    arch = next(a for a, flags in FAMILIES.items() if flags == (c["qkv_bias"], c["qk_norm"]))
    return dict(
        architectures=[arch], model_type=arch.removesuffix("ForCausalLM").lower(), torch_dtype=str(dtype).removeprefix("torch."),
        vocab_size=c["vocab_size"], hidden_size=c["d_model"], intermediate_size=c["d_ff"], num_hidden_layers=c["n_layer"],
        num_attention_heads=c["n_head"], num_key_value_heads=c["n_kv_head"], head_dim=c["head_dim"], hidden_act="silu",
        max_position_embeddings=c["max_len"], rope_theta=c["rope_theta"], rope_scaling=c["rope_scaling"], rms_norm_eps=c["norm_eps"],
        tie_word_embeddings=c["tie_embeddings"], attention_bias=c["qkv_bias"], attention_dropout=0.0, use_cache=True,
        use_sliding_window=False, bos_token_id=None, eos_token_id=eos)


def names(c):
    """{our parameter: [(hf tensor, rows)]}: the rows of the HF tensors, one after another, are our parameter."""
    q, kv = c["n_head"] * c["head_dim"], c["n_kv_head"] * c["head_dim"]
    table = {"embed.weight": [("model.embed_tokens.weight", c["vocab_size"])], "norm.weight": [("model.norm.weight", c["d_model"])]}
    if not c["tie_embeddings"]:
        table["head.weight"] = [("lm_head.weight", c["vocab_size"])]
    for i in range(c["n_layer"]):
        ours, hf = f"blocks.{i}.", f"model.layers.{i}."
        table[ours + "attn_norm.weight"] = [(hf + "input_layernorm.weight", c["d_model"])]
        table[ours + "mlp_norm.weight"] = [(hf + "post_attention_layernorm.weight", c["d_model"])]
        for kind in ("weight", "bias") if c["qkv_bias"] else ("weight",):
            table[ours + f"qkv.{kind}"] = [(hf + f"self_attn.{p}_proj.{kind}", n) for p, n in (("q", q), ("k", kv), ("v", kv))]
        table[ours + "out.weight"] = [(hf + "self_attn.o_proj.weight", c["d_model"])]
        if c["qk_norm"]:
            table[ours + "q_norm.weight"] = [(hf + "self_attn.q_norm.weight", c["head_dim"])]
            table[ours + "k_norm.weight"] = [(hf + "self_attn.k_norm.weight", c["head_dim"])]
        table[ours + "gate_up.weight"] = [(hf + "mlp.gate_proj.weight", c["d_ff"]), (hf + "mlp.up_proj.weight", c["d_ff"])]
        table[ours + "down.weight"] = [(hf + "mlp.down_proj.weight", c["d_model"])]
    return table


# -----------------------------------------------------------------------------
# tensors


def load(folder, c, params):
    """Copies the folder's tensors into `params` ({name: tensor}), each into its rows, cast on the way."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        where = json.loads(index.read_text())["weight_map"]
    elif (folder / "model.safetensors").is_file():
        where = None
    else:
        raise FileNotFoundError(f"{folder} has no model.safetensors and no model.safetensors.index.json")
    places = {hf: (ours, rows, at) for ours, parts in names(c).items()
              for (hf, rows), at in zip(parts, _starts([rows for _, rows in parts]))}
    missing = set(places)
    for file in sorted(set(where.values())) if where else ["model.safetensors"]:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing: the index names it; download the folder again")
        try:
            with safe_open(folder / file, framework="pt") as shard, torch.no_grad():
                for hf in shard.keys():
                    if hf not in places:                         # rotary buffers, a tied head written twice
                        continue
                    ours, rows, at = places[hf]
                    into = params[ours].narrow(0, at, rows)
                    shape = tuple(shard.get_slice(hf).get_shape())
                    if shape != tuple(into.shape):
                        raise ValueError(f"{folder / file}: {hf} has shape {shape}, config.json says {tuple(into.shape)}")
                    into.copy_(shard.get_tensor(hf))
                    missing.discard(hf)
        except SafetensorError as e:
            raise ValueError(f"{folder / file} is damaged or cut short ({e}): download or copy it again") from None
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} tensors, {sorted(missing)[0]} first")


def _starts(sizes):
    return [sum(sizes[:i]) for i in range(len(sizes))]


def save(folder, c, params, dtype, eos=None):
    """Writes config.json, generation_config.json and model.safetensors. The caller makes the folder appear at once."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for ours, parts in names(c).items():
        whole = params[ours].detach().to("cpu", dtype)
        for (hf, _), piece in zip(parts, whole.split([rows for _, rows in parts])):
            tensors[hf] = piece.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors", 0o644)
    eos = sorted(eos) if isinstance(eos, (set, list, tuple)) else eos
    eos = eos[0] if isinstance(eos, list) and len(eos) == 1 else eos
    (folder / "config.json").write_text(json.dumps(config_json(c, dtype, eos), indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=eos, do_sample=True), indent=2) + "\n")
