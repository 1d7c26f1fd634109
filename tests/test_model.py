"""the model: equal to transformers, packed equal to alone, folders that come back as they went,
positions without an end"""
from dataclasses import asdict

import pytest
import torch

from common import hf
from common.hf import rope_frequencies
from kernels import linear_logprob, packed_attention
from train_gpt import GPT, GPTConfig, sample


def tiny(**kw):
    return GPTConfig(**{**dict(vocab_size=97, n_layer=2, n_head=4, n_kv_head=2, head_dim=16,
                               d_model=48, d_ff=80, max_len=256, rope_theta=10000.0), **kw})


def random_model(config, seed=0):
    """init_weights starts the blocks as the identity, which would hide a wrong block"""
    g = torch.Generator().manual_seed(seed)
    model = GPT(config)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * (0.2 if p.ndim == 2 else 0.1)
                     + (0 if p.ndim == 2 else 1))
    return model


def hidden(model, tokens):
    return model(torch.tensor(tokens), torch.arange(len(tokens)),
                 packed_attention([0, len(tokens)], len(tokens)))


SCALINGS = [None, {"rope_type": "linear", "factor": 4.0},
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}]


@pytest.mark.parametrize("tied", [False, True])
def test_saved_folder_gives_the_same_logits_in_transformers(tmp_path, tied):
    """rung 1: what is trained here is served anywhere"""
    transformers = pytest.importorskip("transformers")
    model = random_model(tiny(tie_embeddings=tied))
    model.save_hf(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, 97, (40,)).tolist()
    with torch.no_grad():
        ours = hidden(model, tokens) @ model.head_weight.t()
        assert (theirs(torch.tensor([tokens])).logits[0] - ours).abs().max() < 2e-5 * ours.abs().max()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_transformers_folder_gives_the_same_logits_here(tmp_path, scaling):
    """rung 1, the other way, with every rope scaling we read"""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    c = transformers.Qwen3Config(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=False,
        rope_parameters={"rope_theta": 10000.0, **(scaling or {"rope_type": "default"})})
    theirs = transformers.Qwen3ForCausalLM(c)
    for p in theirs.parameters():
        p.data.normal_(0, 0.2).add_(0 if p.ndim == 2 else 1)
    theirs.save_pretrained(tmp_path)
    model = GPT.from_hf(tmp_path)
    tokens = torch.randint(0, 97, (200,)).tolist()
    with torch.no_grad():
        ours = hidden(model, tokens) @ model.head_weight.t()
        assert (theirs(torch.tensor([tokens])).logits[0] - ours).abs().max() < 5e-5 * ours.abs().max()


def test_packed_row_equals_one_by_one():
    """rung 5 for the model: many lengths in a row, each segment as if it were alone; loss and
    gradient, float64"""
    model = random_model(tiny()).double()
    lengths = [5, 7, 33, 20, 7, 1, 64, 13, 2]
    tokens = [torch.randint(0, 97, (n,)) for n in lengths]
    cu = [0]
    for n in lengths:
        cu.append(cu[-1] + n)

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    alone = sum(linear_logprob(hidden(model, t.tolist())[:-1], model.head_weight, t[1:])[0].sum()
                for t in tokens if len(t) > 1)
    row = model(torch.cat(tokens), torch.cat([torch.arange(n) for n in lengths]),
                packed_attention(cu, max(lengths)))
    at = torch.cat([torch.arange(a, b - 1) for a, b in zip(cu, cu[1:])])
    packed = linear_logprob(row[at], model.head_weight, torch.cat([t[1:] for t in tokens]))[0].sum()
    assert abs(alone - packed) < 1e-12 * abs(alone)
    a, b = gradient(alone), gradient(packed)
    assert (a - b).norm() < 1e-12 * a.norm()


def test_recomputing_blocks_changes_no_gradient():
    model = random_model(tiny()).double()
    tokens = torch.randint(0, 97, (30,)).tolist()
    grads = []
    for model.checkpoint in (False, True):
        model.zero_grad()
        hidden(model, tokens).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_positions_have_no_table_to_run_off():
    """a sampler that had a rotary table of prompt length plus some crashed, or wrapped, once
    prompt and generation together passed it; here positions far beyond max_len still rotate by
    their own angle: shifting a whole sequence changes nothing"""
    model = random_model(tiny(max_len=16)).double()
    tokens, T = torch.randint(0, 97, (24,)), 24
    near = model(tokens, torch.arange(T), packed_attention([0, T], T))
    far = model(tokens, torch.arange(T) + 4096, packed_attention([0, T], T))
    assert (near - far).abs().max() < 1e-2 * near.abs().max()  # fp32 angles near 4,120 keep about four digits
    assert not torch.equal(near, far)


def test_scaled_rope_keeps_fast_waves_and_stretches_slow_ones():
    for scaling in SCALINGS[2:]:
        scaling = {**scaling, "original_max_position_embeddings": 512}
        plain, _ = rope_frequencies(tiny(head_dim=64))
        scaled, _ = rope_frequencies(tiny(head_dim=64, rope_scaling=scaling))
        assert torch.equal(plain[:2], scaled[:2])
        assert torch.allclose(plain[-1] / scaled[-1], torch.tensor(scaling["factor"]))


def test_save_and_load_is_exact(tmp_path):
    model = random_model(tiny())
    model.save_hf(tmp_path)
    again = GPT.from_hf(tmp_path)
    assert asdict(again.config) == asdict(model.config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_oracle_is_greedy_at_temperature_zero_and_repeats_itself_elsewhere():
    model = random_model(tiny())
    greedy = sample(model, [1, 2, 3], 12, temperature=0)
    with torch.no_grad():
        for t in range(12):
            assert greedy[t] == int(
                (hidden(model, [1, 2, 3] + greedy[:t])[-1] @ model.head_weight.t()).argmax())
    assert (sample(model, [1, 2, 3], 12, seed=5) == sample(model, [1, 2, 3], 12, seed=5)
            != sample(model, [1, 2, 3], 12, seed=6))


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("spoil, message", [
    (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
     "damaged or cut short"),
    (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    (lambda d: edit(d / "config.json", "Qwen3For", "QwenXFor"), "QwenXForCausalLM is not known"),
    (lambda d: edit(d / "config.json", '"intermediate_size": 80', '"intermediate_size": 81'), "has shape"),
    (lambda d: (d / "config.json").write_text("{"), "not JSON"),
    (lambda d: (d / "config.json").unlink(), "no config.json"),
])
def test_a_bad_folder_says_what_is_wrong_with_it(tmp_path, spoil, message):
    random_model(tiny()).save_hf(tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        GPT.from_hf(tmp_path)


def test_a_hub_name_gets_the_download_command():
    with pytest.raises(FileNotFoundError, match="hf download Qwen/Qwen3-0.6B"):
        hf.find("Qwen/Qwen3-0.6B")
