"""a real model's road through the house: folder in, RL on GSM8K, folder out, for a tiny random
model of each family"""
import json

import pytest
import torch

import nanorl

transformers = pytest.importorskip("transformers")
from test_hf import EXPERTS, FAMILIES, SHAPE  # noqa: E402
from test_hf_tokenizer import train  # noqa: E402

TOKENIZER = {"qwen2": "qwen", "qwen3": "qwen", "llama": "llama", "moe": "qwen"}
TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rl_step_on_gsm8k(tmp_path, monkeypatch, family):
    tok = train(TOKENIZER[family], vocab=400)
    eos = "<|im_end|>" if family != "llama" else "<|eot_id|>"
    config, cls, _ = FAMILIES[family]
    more = dict(head_dim=16) if family in ("qwen3", "moe") else {}
    more |= EXPERTS if family == "moe" else {}
    torch.manual_seed(0)
    theirs = cls(config(**{**SHAPE, "vocab_size": tok.get_vocab_size()},
                        **more, eos_token_id=tok.token_to_id(eos)))
    theirs.save_pretrained(tmp_path / "model")
    tok.save(str(tmp_path / "model/tokenizer.json"))
    (tmp_path / "model/tokenizer_config.json").write_text(
        json.dumps({"eos_token": eos, "chat_template": TEMPLATE}))
    (tmp_path / "data/gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        rows = [dict(question=f"{split}: Ann has {i} pens and buys 2. How many?",
                     answer=f"{i}+2\n#### {i + 2}") for i in range(60)]
        (tmp_path / f"data/gsm8k/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("NANORL_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    nanorl.main(("--init model --task gsm8k --device cpu --threads 1 "
                 "--prompts 3 --n 2 --max-new 8 --steps 1 --eval-n 2 --final-n 2 --eval-k 2 "
                 "--eval-every 0 --workers 1 --entropy-coef 0.1 --lr 1e-2 --warmup 1").split())
    out = tmp_path / "runs/rl/ckpt/step_1"
    (row,) = [json.loads(line) for line in (tmp_path / "runs/rl/metrics.jsonl").read_text().splitlines()][1:]
    assert row["length"] > 0 and row["sampler_max"] < 1e-4
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(again).__name__ == type(theirs).__name__
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    assert (transformers.AutoTokenizer.from_pretrained(out)("some pens").input_ids
            == tok.encode("some pens", add_special_tokens=False).ids)
