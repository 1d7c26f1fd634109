"""
python -m bench train: training steps of the same model, packed rows here against padded batches
in transformers.

Both sides start from the same weights, see the same documents, compute the same loss (compared
first) and take the same AdamW step; what is counted is real tokens, not padding, per CPU second.
Two sets of documents: near-equal lengths, where packing has nothing to win and only the step
itself counts, and the mixed corpus in the order it comes.
"""
import tempfile
from dataclasses import dataclass

import torch

import data
from bench import alternate, finish, peer, ratio, show
from common.flags import flags, positive
from common.optim import Optimizer
from train_gpt import GPT, GPTConfig, forward, packed_rows


@dataclass
class Config:
    docs: int = 192                      # documents per step
    padded: int = 32                     # documents of one padded batch of the peer
    row_tokens: int = 2048               # tokens of one packed row of ours
    repeats: int = 5                     # timed steps of each side
    threads: int = 1                     # CPU threads


def documents(task, n, tok, near):
    """n documents as (tokens, trained); near: only those within 10% of 32 tokens."""
    docs, i = [], 0
    while len(docs) < n:
        prompt, completion = task.document("train", 0, i)
        prompt, completion, i = tok.encode(prompt), tok.encode(completion) + tok.encode(tok.end), i + 1
        if not near or abs(len(prompt) + len(completion) - 32) <= 3:
            docs.append((prompt + completion, [False] * len(prompt) + [True] * len(completion)))
    return docs


def padded_batches(docs, size):
    """What a padding trainer sees: (ids, mask, labels) of `size` documents each, in the order they come."""
    for at in range(0, len(docs), size):
        part = docs[at:at + size]
        longest = max(len(tokens) for tokens, _ in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        mask = torch.zeros(len(part), longest, dtype=torch.long)
        labels = None
        labels = torch.full_like(ids, -100)
        for row, (tokens, trained) in enumerate(part):
            ids[row, :len(tokens)], mask[row, :len(tokens)] = torch.tensor(tokens), 1
            labels[row, :len(tokens)] = torch.where(torch.tensor(trained), torch.tensor(tokens), -100)
        yield ids, mask, labels


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "docs padded")
    torch.set_num_threads(config.threads)
    tok = data.tokenizer("chars")
    model = GPT(GPTConfig(tok.vocab_size, 5, 4, 2, 32, 128, 384, 4096, 10000.0)).init_weights(0)
    qwen3 = peer("transformers.models.qwen3")
    if qwen3:
        with tempfile.TemporaryDirectory() as folder:
            model.save_hf(folder, tok)
            theirs = qwen3.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        print("transformers is not installed: ours alone")
    numbers = {}
    for name, task, near in (("near-equal", "countdown", True), ("mixed", "mixed", False)):
        docs = documents(data.load(task), config.docs, tok, near)
        tokens, total = sum(len(t) for t, _ in docs), sum(sum(on) for _, on in docs)
        rows = list(packed_rows(docs, config.row_tokens, "cpu"))
        batches = list(padded_batches(docs, config.padded))
        optimizer = Optimizer(model, lr=1e-4, clip=1.0)

        def ours(rows=rows, total=total, optimizer=optimizer):
            loss = 0.0
            for row in rows:
                part = forward(model, row)
                part.backward()
                loss += part.item()
            optimizer.step(divide=total)
            return loss / total

        sides = {"ours, packed rows": ours}
        if qwen3:
            adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-4, betas=(0.9, 0.95),
                                      weight_decay=0.0, fused=True)

            def padding(batches=batches, total=total, adamw=adamw):
                loss = 0.0
                for ids, mask, labels in batches:
                    part = theirs(input_ids=ids, attention_mask=mask, labels=labels,
                                  num_items_in_batch=total, use_cache=False).loss
                    part.backward()
                    loss += part.item()
                torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
                adamw.step()
                adamw.zero_grad()
                return loss

            sides["transformers, padded batches"] = padding
            a, b = ours(), padding()
            assert abs(a - b) < 1e-4 * abs(a), f"the two sides compute different losses: {a} and {b}"
        fill = tokens / sum(ids.numel() for ids, _, _ in batches)
        print(f"{name}: {config.docs} documents, {tokens:,} tokens, padded "
              f"batches of {config.padded} are {fill:.0%} full")
        seconds = alternate(sides, config.repeats)
        for side, times in seconds.items():
            show(side, times, per=tokens, unit="tokens/s")
        if qwen3:
            numbers[f"{name} times faster than transformers"] = ratio(
                seconds["transformers, padded batches"], seconds["ours, packed rows"])
            print(f"  ratio {numbers[f'{name} times faster than transformers']:.2f}x")
    return finish("train", **numbers)


if __name__ == "__main__":
    main()
