"""
Hugging Face folders in and out: config.json, tensor names, safetensors. Names and shapes, no model.

A folder is config.json + model.safetensors (or shards with an index) + tokenizer files. Our
parameters merge what the folder keeps apart (q, k, v in one matrix; gate and up in one), so a
parameter is the rows of several HF tensors one after another: `names()` is that table and reading
is a copy of each tensor into its slice of rows, straight into place. Shards are mapped, not read:
memory peaks at the weights themselves.

Three dense families are one table apart: Qwen2 and 2.5 (biases on q, k, v), Qwen3 (norms on q and
k), Llama 3 (neither); Qwen3-MoE is Qwen3 with experts. A folder of another shape is refused, naming
what is different, and so is a tensor that nothing here would read: a model that loads and is silently
another one costs a week.

Left out of the usual recipe: hub clients, auto classes, device maps, quantised weights. There is a
folder on disk, or an error that says what to run.
"""

import json
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.files import newest

# -----------------------------------------------------------------------------
# where the model is


def find(path):
    """A Hugging Face folder, or a run (its last complete checkpoint) -> the folder of the tensors."""
    path = Path(path)
    if any(path.glob("*.safetensors")):
        return path
    found = newest(path)
    if found:
        return found[0]
    if path.is_dir():
        raise FileNotFoundError(f"{path} holds no model: no .safetensors file and no complete checkpoint")
    if str(path).count("/") == 1 and not str(path).startswith((".", "/", "runs/")):
        raise FileNotFoundError(f"no folder {path}; for the hub's model of that name: "
                                f"hf download {path} --local-dir {path.name}")
    raise FileNotFoundError(f"no folder {path}: give a Hugging Face folder or a run folder")


# -----------------------------------------------------------------------------
# config.json <-> the keyword arguments of a GPTConfig

FAMILIES = {  # architecture: (qkv_bias, qk_norm, experts)
    "Qwen2ForCausalLM": (True, False, False),  # Qwen2, Qwen2.5, and what was distilled into them
    "Qwen3ForCausalLM": (False, True, False),
    "LlamaForCausalLM": (False, False, False),  # Llama 3, 3.1, 3.2, and the many that share its shape
    "Qwen3MoeForCausalLM": (False, True, True),
}


def _json(path):
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not JSON ({e}): download or copy it again") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} is not a JSON object: download or copy it again")
    return parsed


def read_config(folder):
    """-> dict of GPTConfig's fields. ValueError or FileNotFoundError, the whole story in one line."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give a Hugging Face folder or a run folder")
    c = _json(path)
    wrong = f"{path} is no model's config"
    again = "download or copy it again"
    arch = (c.get("architectures") or ["?"])[0]
    if arch not in FAMILIES:
        raise ValueError(f"{path}: architecture {arch} is not known here; known: {', '.join(FAMILIES)}")
    qkv_bias, qk_norm, sparse = FAMILIES[arch]
    try:
        heads = c["num_attention_heads"]
        max_len = c["max_position_embeddings"]
        theta, scaling = _rope(c, max_len)
        fields = dict(
            vocab_size=c["vocab_size"],
            n_layer=c["num_hidden_layers"],
            n_head=heads,
            n_kv_head=c.get("num_key_value_heads") or heads,
            head_dim=c.get("head_dim") or c["hidden_size"] // heads,
            d_model=c["hidden_size"],
            d_ff=c["intermediate_size"],
            max_len=max_len,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=c.get("rms_norm_eps", 1e-6),
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            tie_embeddings=bool(c.get("tie_word_embeddings", False)))
        if sparse:
            fields |= _experts(c)
        different = _different(c, arch, max_len)
    except KeyError as e:
        raise ValueError(f"{path} has no {e}: {again}") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
        # "4" for 4, a list for a dict
        raise ValueError(f"{wrong} ({e}): {again}") from None
    for name in ["vocab_size", "n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff", "max_len",
                 *(("n_expert", "n_active") if sparse else ())]:
        if not isinstance(fields[name], int) or fields[name] < 1:
            raise ValueError(f"{wrong} ({name} would be {fields[name]!r}): {again}")
    if not isinstance(theta, int | float):
        raise ValueError(f"{wrong} (rope_theta is {theta!r}): {again}")
    if different:
        raise ValueError(f"{path}: {different}, which the {arch} written here does not have; "
                         "it would load and compute something else")
    return fields


NUMBERS = {
    "linear": ["factor"],
    "yarn": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor"],
}


def _rope(c, max_len):
    """both spellings (rope_parameters; rope_theta and rope_scaling) -> theta, and None or our dict"""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta = rope.get("rope_theta", c.get("rope_theta", 10000.0))
    elsewhere = ("rope_theta", "type", "partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key not in elsewhere}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling["rope_type"] = kind
    if kind == "default":
        return theta, None
    for needed in NUMBERS.get(kind, ()):
        scaling[needed] = float(scaling[needed])       # or the error that says which one is missing
    if kind in ("llama3", "yarn"):
        original = scaling.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = original or max_len
    if kind == "yarn" and scaling.get("attention_factor") is None:
        m = scaling.pop("mscale", None)
        m_all = scaling.pop("mscale_all_dim", None)
        factor = scaling["factor"]
        temperature = _temperature(factor)
        if m and m_all:
            temperature = _temperature(factor, m) / _temperature(factor, m_all)
        scaling["attention_factor"] = temperature
    return theta, scaling


def _experts(c):
    """What a token meets of its experts is as wide as one SwiGLU of d_ff."""
    active = c["num_experts_per_tok"]
    count = c["num_experts"] if "num_experts" in c else c["num_local_experts"]
    if active > count:
        raise ValueError(f"{active} of {count} experts")
    return dict(d_ff=active * c["moe_intermediate_size"], n_expert=count, n_active=active,
                norm_gates=bool(c.get("norm_topk_prob", False)))


def _temperature(factor, m=1.0):
    return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_frequencies(c):
    """-> inv_freq (head_dim/2) and the factor on cos and sin (yarn's attention temperature, else 1)."""
    inv = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim)
    s = c.rope_scaling
    if s is None:
        return inv, 1.0
    kind = s["rope_type"]
    factor = s["factor"]
    if kind == "linear":
        return inv / factor, 1.0
    if kind == "llama3":  # long waves interpolated, short ones kept, a ramp between
        turns = s["original_max_position_embeddings"] * inv / (2 * math.pi)  # in the original context
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        return inv * (keep + (1 - keep) / factor), 1.0
    if kind == "yarn":  # the same idea, the ramp linear in the dimension's index
        def index(turns):
            wave = s["original_max_position_embeddings"] / (turns * 2 * math.pi)
            return c.head_dim * math.log(wave) / (2 * math.log(c.rope_theta))
        low, high = index(s.get("beta_fast") or 32), index(s.get("beta_slow") or 1)
        if s.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, c.head_dim - 1)
        ramp = ((torch.arange(c.head_dim // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
        return inv * (1 - ramp + ramp / factor), s.get("attention_factor") or 0.1 * math.log(factor) + 1.0
    raise ValueError(f"rope_scaling type {kind!r} is not known here; known: linear, llama3, yarn")


def _different(c, arch, max_len):
    """what this config asks for and the shape here cannot give, in words; "" where there is nothing"""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    window = c.get("sliding_window")
    slides = c.get("use_sliding_window") and c.get("max_window_layers", 0) < c["num_hidden_layers"]
    if "sliding_attention" in (c.get("layer_types") or []) or slides:
        if window and window < max_len:
            return f"a sliding window of {window} in a context of {max_len}"
    if c.get("hidden_act", "silu") != "silu":
        return f"hidden_act {c['hidden_act']!r}"
    if c.get("attention_bias") and arch != "Qwen2ForCausalLM":
        return "attention_bias (a bias on the output projection)"
    if c.get("mlp_bias"):
        return "mlp_bias"
    if not FAMILIES[arch][2] and (c.get("num_experts") or c.get("num_local_experts")):
        return "a mixture of experts"
    if c.get("mlp_only_layers") or c.get("decoder_sparse_step", 1) != 1:
        return "layers without experts between those with some"
    if c.get("quantization_config"):
        method = c["quantization_config"].get("quant_method", "quantization_config")
        return f"weights quantised by {method!r}"
    if rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0)) != 1.0:
        return "partial_rotary_factor"
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        return f"rope type {kind!r} (known: default, linear, llama3, yarn)"
    return ""


def config_json(c, dtype, eos=None):
    """The config.json of GPTConfig fields `c` (a dict)."""
    kind = c["qkv_bias"], c["qk_norm"], bool(c.get("n_expert"))
    arch = next((a for a, flags in FAMILIES.items() if flags == kind), None)
    if arch is None and kind[2]:
        raise ValueError("experts are written in Qwen3's shape only: qk_norm, and no qkv_bias")
    if arch is None:
        raise ValueError("a model with both qkv_bias and qk_norm has no name in Hugging Face's library: "
                         "turn one of them off")
    written = dict(
        architectures=[arch],
        model_type=arch.removesuffix("ForCausalLM").lower(),
        torch_dtype=str(dtype).removeprefix("torch."),
        vocab_size=c["vocab_size"],
        hidden_size=c["d_model"],
        intermediate_size=c["d_ff"],
        num_hidden_layers=c["n_layer"],
        num_attention_heads=c["n_head"],
        num_key_value_heads=c["n_kv_head"],
        head_dim=c["head_dim"],
        hidden_act="silu",
        max_position_embeddings=c["max_len"],
        rope_theta=c["rope_theta"],
        rope_scaling=c["rope_scaling"],
        rms_norm_eps=c["norm_eps"],
        tie_word_embeddings=c["tie_embeddings"],
        attention_dropout=0.0,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=eos)
    written["mlp_bias" if arch == "LlamaForCausalLM" else "use_sliding_window"] = False
    if arch != "Qwen2ForCausalLM":
        written["attention_bias"] = False
    if kind[2]:
        written |= dict(
            model_type="qwen3_moe",
            num_experts=c["n_expert"],
            num_experts_per_tok=c["n_active"],
            moe_intermediate_size=c["d_ff"] // c["n_active"],
            norm_topk_prob=c["norm_gates"],
            decoder_sparse_step=1,
            mlp_only_layers=[])
    return written


def names(c):
    """{our parameter: [(hf tensor, rows)]}: their rows, one after another, are our parameter."""
    q = c["n_head"] * c["head_dim"]
    kv = c["n_kv_head"] * c["head_dim"]
    table = {
        "embed.weight": [("model.embed_tokens.weight", c["vocab_size"])],
        "norm.weight": [("model.norm.weight", c["d_model"])],
    }
    if not c["tie_embeddings"]:
        table["head.weight"] = [("lm_head.weight", c["vocab_size"])]
    for i in range(c["n_layer"]):
        ours, hf = f"blocks.{i}.", f"model.layers.{i}."
        table[ours + "attn_norm.weight"] = [(hf + "input_layernorm.weight", c["d_model"])]
        table[ours + "mlp_norm.weight"] = [(hf + "post_attention_layernorm.weight", c["d_model"])]
        for kind in ("weight", "bias") if c["qkv_bias"] else ("weight",):
            table[ours + f"qkv.{kind}"] = [
                (hf + f"self_attn.q_proj.{kind}", q),
                (hf + f"self_attn.k_proj.{kind}", kv),
                (hf + f"self_attn.v_proj.{kind}", kv)]
        table[ours + "out.weight"] = [(hf + "self_attn.o_proj.weight", c["d_model"])]
        if c["qk_norm"]:
            table[ours + "q_norm.weight"] = [(hf + "self_attn.q_norm.weight", c["head_dim"])]
            table[ours + "k_norm.weight"] = [(hf + "self_attn.k_norm.weight", c["head_dim"])]
        if c.get("n_expert"):
            table |= _expert_names(c, ours + "experts.", hf + "mlp.")
            continue
        table[ours + "gate_up.weight"] = [
            (hf + "mlp.gate_proj.weight", c["d_ff"]),
            (hf + "mlp.up_proj.weight", c["d_ff"])]
        table[ours + "down.weight"] = [(hf + "mlp.down_proj.weight", c["d_model"])]
    return table


def _expert_names(c, ours, hf):
    width = c["d_ff"] // c["n_active"]
    experts = [f"{hf}experts.{e}." for e in range(c["n_expert"])]
    return {
        ours + "router.weight": [(hf + "gate.weight", c["n_expert"])],
        ours + "gate_up.weight": [(f"{expert}{part}_proj.weight", width)
                                  for expert in experts for part in ("gate", "up")],
        ours + "down.weight": [(expert + "down_proj.weight", c["d_model"]) for expert in experts],
    }


# -----------------------------------------------------------------------------
# tensors


@torch.no_grad()
def load(folder, c, params):
    """Copies the folder's tensors into `params` ({name: tensor}), each into its rows, cast on the way."""
    folder = Path(folder)
    files = shards(folder)
    into = {}                              # hf tensor -> the rows that it fills
    for ours, parts in names(c).items():
        first = 0
        for hf, rows in parts:
            into[hf] = params[ours].narrow(0, first, rows)
            first += rows
    missing = set(into)
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for hf in shard.keys():
                    _copy(file, shard, hf, into.get(hf), c)
                    missing.discard(hf)
        except SafetensorError as e:
            raise ValueError(f"{file} is damaged or cut short ({e}): download or copy it again") from None
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} tensors, {sorted(missing)[0]} first")


def _copy(file, shard, hf, rows, c):
    if rows is None:
        # rotary buffers and a tied head written twice say nothing new; anything else says: another model
        if hf.endswith("rotary_emb.inv_freq") or (hf == "lm_head.weight" and c["tie_embeddings"]):
            return
        raise ValueError(f"{file}: {hf} has no place in the model that config.json describes: "
                         "its architecture is not what it says")
    piece = shard.get_slice(hf)
    shape = tuple(piece.get_shape())
    dtype = piece.get_dtype()
    if shape != tuple(rows.shape):
        raise ValueError(f"{file}: {hf} has shape {shape}, config.json says {tuple(rows.shape)}")
    if dtype not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(f"{file}: {hf} is stored as {dtype}: only plain bf16, fp16 and fp32 are read")
    rows.copy_(shard.get_tensor(hf))


def shards(folder):
    """the files that hold the tensors: all that the index names, or the only one"""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise FileNotFoundError(f"{folder} has no model.safetensors and no model.safetensors.index.json")
        return [single]
    where = _json(index).get("weight_map")
    whole = isinstance(where, dict) and where and all(isinstance(file, str) for file in where.values())
    if not whole:
        raise ValueError(f"{index} has no weight_map: download or copy it again")
    files = [folder / file for file in sorted(set(where.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: the index names it; download the folder again")
    return files


def save(folder, c, params, dtype, eos=None):
    """
    Writes config.json, generation_config.json and model.safetensors. The caller makes the folder
    appear at once. A tokenizer that came from a Hugging Face folder is saved after this and puts
    that folder's own generation_config.json back.
    """
    folder = Path(folder)
    if isinstance(eos, (set, list, tuple)):
        eos = sorted(eos) if len(eos) != 1 else next(iter(eos))
    config = config_json(c, dtype, eos)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for ours, parts in names(c).items():
        whole = params[ours].detach().to("cpu", dtype)
        for (hf, _), piece in zip(parts, whole.split([rows for _, rows in parts])):
            tensors[hf] = piece.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors", 0o644)
    generation = dict(eos_token_id=eos, do_sample=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
