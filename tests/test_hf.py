"""Hugging Face folders: every family equal to transformers in both directions, loaded in place,
and what is another model is refused"""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels import packed_attention
from train_gpt import GPT, GPTConfig, sample

transformers = pytest.importorskip("transformers")

SHAPE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
FAMILIES = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, dict(qkv_bias=True, qk_norm=False)),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, dict(qkv_bias=False, qk_norm=True)),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, dict(qkv_bias=False, qk_norm=False)),
    "moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM,
            dict(qkv_bias=False, qk_norm=True, n_expert=6, n_active=2)),
}
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=40, norm_topk_prob=True)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def theirs(family, folder, shard="5GB", **kw):
    config, cls, _ = FAMILIES[family]
    more = dict(head_dim=16) if family in ("qwen3", "moe") else {}
    more |= EXPERTS if family == "moe" else {}
    rope = kw.pop("rope", {"rope_type": "default"})
    model = cls(config(**SHAPE, **more, rope_parameters={"rope_theta": 10000.0, **rope}, **kw)).eval()
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():  # biases and norms too: at their start they would hide a mistake
        p.data.copy_(torch.randn(p.shape, generator=g) * (0.2 if p.ndim >= 2 else 0.1)
                     + (0 if p.ndim >= 2 else 1))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def logits(model, tokens):
    with torch.no_grad():
        if not isinstance(model, GPT):
            return model(torch.tensor([tokens])).logits[0]
        T = len(tokens)
        return model(torch.tensor(tokens), torch.arange(T),
                     packed_attention([0, T], T)) @ model.head_weight.t()


def assert_same(a, b, tokens):
    a, b = logits(a, tokens), logits(b, tokens)
    assert (a - b).abs().max() < 5e-5 * a.abs().max()


TOKENS = torch.randint(0, 97, (120,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rung_1_in_both_directions_and_greedy_text(tmp_path, family, tied):
    """their folder here, our folder there, and the same greedy continuation; also in many shards,
    and through our own save again"""
    their = theirs(family, tmp_path / "theirs", shard="20KB", tie_word_embeddings=tied)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = GPT.from_hf(tmp_path / "theirs")
    assert_same(ours, their, TOKENS)
    for n in (3, 20):
        prompt = TOKENS[:n]
        with torch.no_grad():
            text = their.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, n, dtype=torch.long),
                                  max_new_tokens=24, do_sample=False, pad_token_id=0)[0, n:].tolist()
        assert sample(ours, prompt, 24, temperature=0) == text

    config = GPTConfig(vocab_size=97, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, d_model=48,
                       d_ff=80, max_len=256, rope_theta=5e5, tie_embeddings=tied, **FAMILIES[family][2])
    mine = GPT(config)
    for p in mine.parameters():
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0, 0.2)
    mine.save_hf(tmp_path / "ours")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert type(loaded) is FAMILIES[family][1] and not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same(mine, loaded, TOKENS)


@pytest.mark.parametrize("old", [False, True])
def test_both_spellings_of_the_rope_settings(tmp_path, old):
    """transformers 5 writes rope_parameters; every folder on the hub has rope_theta and
    rope_scaling, older ones `type` for rope_type"""
    their = theirs("llama", tmp_path, rope=LLAMA3 | {"rope_theta": 5e5})
    config = json.loads((tmp_path / "config.json").read_text())
    assert "rope_scaling" not in config
    if old:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = rope
        (tmp_path / "config.json").write_text(json.dumps(config))
    model = GPT.from_hf(tmp_path)
    assert model.config.rope_theta == 5e5 and model.config.rope_scaling == LLAMA3
    assert_same(model, their, TOKENS)


@pytest.mark.parametrize("more", [{}, {"mscale": 0.7, "mscale_all_dim": 1.2}, {"attention_factor": 1.1}])
def test_yarn_takes_its_temperature_from_where_the_folder_says(tmp_path, more):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **more}
    their = theirs("qwen2", tmp_path / "a", rope=rope)
    ours = GPT.from_hf(tmp_path / "a")
    assert_same(ours, their, TOKENS)
    ours.save_hf(tmp_path / "b")
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32),
                their, TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_weights_survive_a_round_trip_bit_for_bit(tmp_path, family):
    theirs(family, tmp_path / "a").to(torch.bfloat16).save_pretrained(tmp_path / "a")
    GPT.from_hf(tmp_path / "a", dtype=torch.bfloat16).save_hf(tmp_path / "b")
    a, b = load_file(tmp_path / "a/model.safetensors"), load_file(tmp_path / "b/model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == torch.bfloat16 for k in a)


LOAD = """
import sys, threading, time, torch
from train_gpt import GPT

# mapped pages of a file can be dropped at any time and are not counted
def anonymous():
    lines = open("/proc/self/status")
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

def watch():
    while watching:
        peaks.append(anonymous())
        time.sleep(0.0005)

GPT.from_hf(sys.argv[1])         # what torch imports at its first use is no part of a model
for folder in sys.argv[1:]:
    for dtype in (torch.bfloat16, torch.float32):
        before, peaks, watching = anonymous(), [], True
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        model = GPT.from_hf(folder, dtype=dtype)
        watching = False
        thread.join()
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        print((max(peaks + [anonymous()]) - before) / size, size)
        del model
"""


def test_loading_takes_no_more_memory_than_the_weights(tmp_path, one_process):
    """a loader that reads a shard into a dict first needs twice the model, on a machine that
    just holds it once"""
    config = GPTConfig(vocab_size=8000, n_layer=8, n_head=8, n_kv_head=4,
                       head_dim=64, d_model=1024, d_ff=2560, max_len=256, rope_theta=1e4)
    with torch.device("meta"):
        model = GPT(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(0.5)
    model.save_hf(tmp_path / "one")
    tensors = load_file(tmp_path / "one/model.safetensors")
    names, many = sorted(tensors), tmp_path / "many"
    many.mkdir()
    parts = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, many / file)
    (many / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {k: f for f, keys in parts.items() for k in keys}}))
    (many / "config.json").write_bytes((tmp_path / "one/config.json").read_bytes())
    for line in one_process(LOAD, tmp_path / "one", many).splitlines():
        ratio, size = map(float, line.split())
        assert size > 180e6 and ratio < 1.2, ratio


# --------------------------------------------------------------------------------------------------
# bad folders

def spoil_config(**changes):
    def spoil(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))
    return spoil


def spoil_tensors(change):
    def spoil(folder):
        file = sorted(folder.glob("*.safetensors"))[0]
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    return spoil


def cut(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-50])


@pytest.mark.parametrize("family, spoil, message", [
    ("llama", spoil_config(architectures=["MixtralForCausalLM"]),
     "MixtralForCausalLM is not known.*Qwen2For.*Qwen3For.*LlamaFor"),
    ("qwen2", spoil_config(use_sliding_window=True, sliding_window=64,
                           max_window_layers=0), "sliding window of 64"),
    ("qwen3", spoil_config(layer_types=["full_attention", "sliding_attention"],
                           sliding_window=32), "sliding window of 32"),
    ("llama", spoil_config(attention_bias=True), "attention_bias"),
    ("llama", spoil_config(mlp_bias=True), "mlp_bias"),
    ("llama", spoil_config(num_attention_heads="4"), "no model's config"),
    ("llama", spoil_config(num_attention_heads=0), "no model's config"),
    ("llama", spoil_config(hidden_size=None), "no model's config"),
    ("llama", spoil_config(max_position_embeddings=None), "max_len would be None"),
    ("llama", spoil_config(rope_parameters="yarn"), "no model's config"),
    ("llama", spoil_config(rope_parameters="gone", rope_scaling=None, rope_theta=None), "rope_theta is None"),
    ("llama", spoil_config(rope_parameters={"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}),
     "has no 'low_freq_factor'"),
    ("llama", spoil_config(rope_parameters={"rope_type": "linear"}), "has no 'factor'"),
    ("llama", lambda f: (f / "config.json").write_text("[1]"), "config.json is not a JSON object"),
    ("llama", spoil_config(hidden_act="gelu"), "hidden_act 'gelu'"),
    ("llama", spoil_config(num_local_experts=8), "mixture of experts"),
    ("moe", spoil_config(architectures=["Qwen2MoeForCausalLM"]), "Qwen2Moe.*is not known.*Qwen3Moe"),
    ("moe", spoil_config(mlp_only_layers=[0]), "layers without experts"),
    ("moe", spoil_config(decoder_sparse_step=2), "layers without experts"),
    ("moe", spoil_config(num_experts_per_tok=7), "7 of 6 experts"),
    ("moe", spoil_config(num_experts_per_tok="gone"), "has no 'num_experts_per_tok'"),
    ("moe", spoil_config(moe_intermediate_size=0), "d_ff would be 0"),
    ("moe", spoil_config(num_experts=7, num_local_experts="gone"), "lacks 6 tensors|has shape"),
    ("moe", spoil_config(architectures=["Qwen3ForCausalLM"]), "mixture of experts"),
    ("qwen2", spoil_config(quantization_config={"quant_method": "awq"}), "quantised by 'awq'"),
    ("qwen2", spoil_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
     "rope type 'dynamic'"),
    ("qwen2", spoil_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "has no 'factor'"),
    ("llama", spoil_config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
     "partial_rotary_factor"),
    ("qwen2", spoil_config(intermediate_size="gone"), "has no 'intermediate_size'"),
    ("qwen2", spoil_config(architectures=["LlamaForCausalLM"]), "self_attn.[kqv]_proj.bias has no place"),
    ("llama", spoil_config(architectures=["Qwen2ForCausalLM"]), "lacks 6 tensors.*bias"),
    ("qwen3", spoil_config(num_hidden_layers=1), "has no place"),
    ("llama", spoil_config(num_hidden_layers=3), "lacks 9 tensors"),
    ("llama", spoil_config(intermediate_size=81), "has shape"),
    ("llama", cut, "damaged or cut short"),
    ("llama", lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "is missing: the index names it"),
    ("llama", lambda f: (f / "model.safetensors.index.json").write_text("{"), "not JSON"),
    ("llama", lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    ("llama", lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'),
     "no weight_map"),
    ("llama", lambda f: (f / "model.safetensors.index.json").write_text("[]"), "not a JSON object"),
    ("llama", spoil_tensors(lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()})), "stored as I8"),
])
def test_a_bad_folder_is_named_in_one_line(tmp_path, family, spoil, message):
    theirs(family, tmp_path, shard="20KB")
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        GPT.from_hf(tmp_path)
    assert "\n" not in str(error.value)


def test_a_window_that_never_closes_is_no_window(tmp_path):
    """Qwen2.5 folders carry a sliding window that is switched off, or as long as the context"""
    theirs("qwen2", tmp_path)
    spoil_config(use_sliding_window=False, sliding_window=64, max_window_layers=1)(tmp_path)
    GPT.from_hf(tmp_path)
    spoil_config(use_sliding_window=True, sliding_window=256, max_window_layers=1)(tmp_path)
    GPT.from_hf(tmp_path)


def test_a_shape_without_a_name_is_not_written(tmp_path):
    model = GPT(GPTConfig(11, 1, 2, 1, 8, 16, 16, 64, 1e4, qkv_bias=True, qk_norm=True))
    with pytest.raises(ValueError, match="both qkv_bias and qk_norm"):
        model.save_hf(tmp_path / "new")
    assert not list(tmp_path.glob("new/*"))
