"""pack.py: nothing lost, nothing padded, nothing changed. Rungs 5 and 6 of the equality ladder,
and rung 9 with an odd number of rows."""
import json
import math
import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import pack
from kernels import linear_logprob, packed_attention
from tests.models import nudged
from train_gpt import GPT, GPTConfig

SHAPE = GPTConfig(vocab_size=61, n_layer=2, n_head=4, n_kv_head=2, head_dim=8,
                  d_model=16, d_ff=24, max_len=64, rope_theta=1e4)
nan = math.nan


@dataclass
class Sample:                          # what the sampler hands over, as far as packing reads it
    prompt: list
    tokens: list
    logprobs: list = field(default_factory=list)
    problem: int = 0
    index: int = 0
    kept: list | None = None
    reward: float = 0.0
    advantage: object = nan
    weight: float = 1.0


def sample(rng, prompt, n, problem=0, index=0):
    logprobs = [nan if rng.random() < 0.1 else -rng.random() for _ in range(n)]
    return Sample(prompt, [rng.randrange(61) for _ in range(n)], logprobs, problem, index,
                  kept=rng.choice([None, [-rng.random() for _ in range(n)]]), reward=rng.random(),
                  advantage=rng.choice([rng.gauss(0, 1), [rng.gauss(0, 1) for _ in range(n)]]))


def group(rng, problem, longest_prompt=12, longest=20):
    prompt = [rng.randrange(61) for _ in range(rng.randint(1, longest_prompt))]
    return [sample(rng, prompt, rng.choice([1, rng.randint(1, longest)]), problem, g)
            for g in range(rng.randint(1, 5))]


def conversation(rng):
    """Two turns: three answers to a prompt; two of them asked a follow-up question each,
    with two answers."""
    first = [sample(rng, [5, 6, 7, 8], n, index=i) for i, n in enumerate((1, 6, 3))]
    return first + [sample(rng, first[i].prompt + first[i].tokens + ask, n, index=10 * (i + 1) + j)
                    for i, ask in ((0, []), (1, [9, 10])) for j, n in enumerate((4, 1))]


def model(dtype=torch.float64, seed=0):
    # no zero matrices: every path must carry a gradient
    return nudged(GPT(SHAPE).init_weights(seed), seed, 0.05).to(dtype)


def gradients(net, losses):
    net.zero_grad()
    total = 0.0
    for loss in losses:                                          # one at a time: micro-batches add into .grad
        loss.backward()
        total += loss.item()
    return total, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]


def one_by_one(net, samples):
    """No packing, no attend of ours, no row arithmetic: a sequence, a causal attention, its log-softmax."""
    def attend(layer, q, k, v):
        q, k, v = (x.transpose(0, 1).unsqueeze(0)
                   for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
    for s in samples:
        text = torch.tensor(s.prompt + s.tokens)
        logp = torch.log_softmax(net(text, torch.arange(len(text)), attend) @ net.head_weight.t(), -1)
        advantage = s.advantage if isinstance(s.advantage, list) else [s.advantage] * len(s.tokens)
        terms = [a * logp[at, token] for at, (token, a, old)
                 in enumerate(zip(s.tokens, advantage, s.logprobs), len(s.prompt) - 1) if old == old]
        yield sum(terms) if terms else logp.sum() * 0


def packed(net, micro):
    for batch in micro:
        hidden = net(batch.tokens_T, batch.positions_T,
                     packed_attention(batch.cu_seqlens, batch.max_len, batch.parent))
        logp_N, _ = linear_logprob(hidden[batch.at_N], net.head_weight, batch.targets_N)
        yield (logp_N * batch.advantage_N * batch.weight_N).sum()


def same(ours, theirs, loss_tol, grad_tol):
    assert ours[0] == pytest.approx(theirs[0], rel=loss_tol, abs=loss_tol)
    scale = max(g.abs().max() for g in theirs[1])
    for a, b in zip(ours[1], theirs[1]):
        assert (a - b).abs().max() <= grad_tol * scale


def rounded(samples):
    """Advantages that fp32 holds exactly, so that a float64 comparison compares the model and not
    the Batch's fp32."""
    for s in samples:
        def f(a):
            return torch.tensor(a).item()

        s.advantage = [f(a) for a in s.advantage] if isinstance(s.advantage, list) else f(s.advantage)
    return samples


# -----------------------------------------------------------------------------
# bins and ranks


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
def test_every_item_is_in_one_bin_and_no_bin_overflows(lengths, budget):
    bins = pack.pack(lengths, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(b and sum(lengths[i] for i in b) <= budget for b in bins)
    # best fit leaves at most one bin half empty or emptier: two such would have been one
    assert sum(sum(lengths[i] for i in b) * 2 <= budget for b in bins) <= 1


def test_best_fit_is_what_a_plain_search_finds():
    rng = random.Random(0)
    lengths = [rng.randint(1, 50) for _ in range(300)]
    fills = []                                                   # of the plain way: look at every bin
    for n in sorted(lengths, reverse=True):
        room = [b for b in range(len(fills)) if fills[b] + n <= 64]
        if room:
            fills[max(room, key=lambda b: fills[b])] += n
        else:
            fills.append(n)
    assert sorted(sum(lengths[i] for i in b) for b in pack.pack(lengths, 64)) == sorted(fills)


def test_a_law_of_lengths_fills_its_rows():
    rng = random.Random(0)
    lengths = [min(8192, max(1, int(rng.lognormvariate(6.5, 0.9)))) for _ in range(20_000)]
    assert sum(lengths) / (8192 * len(pack.pack(lengths, 8192))) >= 0.999


def test_too_long_is_an_error_that_names_it():
    """A trainer once dropped what did not fit, and nobody saw the longest answers leave the loss.
    Here nothing is dropped."""
    with pytest.raises(ValueError,
                       match=r"item 1 has 9 tokens: a row takes 8, raise --row-tokens to at least 9"):
        pack.pack([3, 9], 8)
    too_long = Sample([1] * 5, [2] * 4, [-1.0] * 4, problem=7, index=2)
    with pytest.raises(ValueError, match=r"problem 7, sample 2: 5 prompt "
                       r"\+ 4 response tokens, a row takes 8: raise --row-tokens to .* 9"):
        pack.batches([[too_long]], 8, SHAPE)
    with pytest.raises(ValueError, match="item 0 has 0 tokens"):
        pack.pack([0], 8)
    with pytest.raises(ValueError, match="2 log-probs for 3 tokens"):
        pack.batches([Sample([1], [2] * 3, [-1.0] * 2)], 8, SHAPE)
    with pytest.raises(ValueError, match="prompt has no token"):
        pack.batches([Sample([], [2] * 3, [-1.0] * 3)], 8, SHAPE)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1000), max_size=50), st.integers(1, 9))
def test_every_item_is_on_one_rank_and_the_load_is_within_the_known_bound(costs, ranks):
    shares = pack.balance(costs, ranks)
    assert len(shares) == ranks and sorted(i for s in shares for i in s) == list(range(len(costs)))
    if costs:
        assert ranks * max(sum(costs[i] for i in s) for s in shares) <= sum(costs) + max(costs) * (ranks - 1)


def test_the_heaviest_rank_trades():
    """Longest first alone deals 3+2+2 and 3+2; a trade makes both 6."""
    assert [sum([3, 3, 2, 2, 2][i] for i in s) for s in pack.balance([3, 3, 2, 2, 2], 2)] == [6, 6]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 1000), max_size=8), min_size=1, max_size=6))
def test_trades_never_make_the_heaviest_rank_heavier(parts):
    costs = [cost for part in parts for cost in part]
    ids = iter(range(len(costs)))
    shares = [[next(ids) for _ in part] for part in parts]
    after = pack.improve([list(share) for share in shares], costs)
    assert sorted(i for share in after for i in share) == list(range(len(costs)))

    def load(shares):
        return max(sum(costs[i] for i in share) for share in shares)

    assert load(after) <= load(shares)


def test_balance_of_a_law_of_lengths():
    shape = pack.SHAPE
    for n in (32, 64, 256):
        rng, worst = random.Random(n), []
        for _ in range(50):
            costs = [pack.cost(shape, min(8192, max(1, int(rng.lognormvariate(6.5, 0.9))))) for _ in range(n)]
            worst.append(max(sum(costs[i] for i in s)
                             for s in pack.balance(costs, 8)) / max(sum(costs) / 8, max(costs)))
        assert sorted(worst)[25] <= 1.02 and max(worst) <= 1.05


def test_cost_counts_the_models_multiplications():
    """Against the matrices of the model itself: two flops per weight and token, and 4 x width for
    each pair that attends."""
    net, c = GPT(SHAPE), SHAPE
    weights = sum(p.numel() for name, p in net.named_parameters() if p.ndim == 2 and "embed" not in name)
    pairs = sum(range(1, 8))
    assert pack.cost(c, 7) == 7 * 2 * weights + pairs * 4 * c.n_head * c.head_dim * c.n_layer
    # shared: what a text costs does not depend on where it is cut
    assert pack.cost(c, 7) == pack.cost(c, 4) + pack.cost(c, 3, before=4)
    assert pack.cost(c, 7, predicted=3) == pack.cost(c, 7) - 4 * 2 * c.d_model * c.vocab_size


# -----------------------------------------------------------------------------
# the Batch


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6), st.integers(32, 80), st.integers(1, 4),
       st.sampled_from(["length", "correct", "mixed"]), st.sampled_from([None, True, False]))
def test_every_prediction_of_every_sample_is_there_once(seed, n_groups, budget, ranks, order, share):
    """Whatever the lengths, the budget and the number of ranks. One trainer dropped the rows that
    did not divide by its ranks; here ranks get equally many micro-batches and the odd ones are
    empty. And each prediction is what its sequence, laid out alone, says."""
    rng = random.Random(seed)
    groups = [group(rng, p) for p in range(n_groups)]
    per_rank = [pack.batches(groups, budget, SHAPE, r, ranks, order, share) for r in range(ranks)]
    assert len({len(micro) for micro in per_rank}) == 1
    found = {}
    for batch in (b for micro in per_rank for b in micro):
        T = len(batch.tokens_T)
        assert 1 <= T <= budget and batch.cu_seqlens[0] == 0
        assert batch.cu_seqlens[-1] == T == len(batch.positions_T)
        lengths = [b - a for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:])]
        assert min(lengths) >= 1 and batch.max_len == max(lengths)
        segment_of = [i for i, n in enumerate(lengths) for _ in range(n)]
        text = []                          # of each segment: all it sees, from the first token on
        for i, p in enumerate(batch.parent):
            assert -1 <= p < i
            own = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
            before = text[p] if p >= 0 else []
            assert batch.positions_T[own].tolist() == list(range(len(before), len(before) + lengths[i]))
            text.append(before + batch.tokens_T[own].tolist())
        assert (batch.weight_N == 1).all()
        for at, target, owner, old, kept, adv in zip(*(x.tolist() for x in (
            batch.at_N, batch.targets_N, batch.sample_N, batch.sampler_logp_N, batch.kept_N,
            batch.advantage_N))):
            s, position = batch.samples[owner], int(batch.positions_T[at])
            t = position + 1 - len(s.prompt)
            assert text[segment_of[at]][: position + 1] == (s.prompt + s.tokens)[: position + 1]
            assert target == s.tokens[t]
            assert (id(s), t) not in found
            found[id(s), t] = True
            expected = (s.logprobs[t], s.kept[t] if s.kept else 0.0,
                        s.advantage[t] if isinstance(s.advantage, list) else s.advantage)
            assert (old, kept, adv) == pytest.approx(expected, abs=1e-6)
    assert len(found) == sum(lp == lp for g in groups for s in g for lp in s.logprobs)
    together = [id(s) for micro in per_rank for b in micro for s in b.samples]
    assert sorted(together) == sorted(id(s) for g in groups for s in g)


def test_the_stop_token_is_trained_and_the_prompt_is_not():
    """Three code bases masked the token that ends an answer (one because its padding id was its
    stop id): the loss went down, and the models never learned to stop. The last sampled token is
    a prediction like any other; tokens of the prompt never are."""
    stop = 60
    for share in (True, False):
        (batch,) = pack.batches([[Sample([1, 2], [3, stop], [-0.5, -0.25]),
                                  Sample([1, 2], [stop], [-0.125])]], 64, SHAPE, share=share)
        assert sorted(batch.targets_N.tolist()) == [3, stop, stop]
        assert sorted(batch.sampler_logp_N.tolist()) == [-0.5, -0.25, -0.125]


def test_a_prompt_row_predicts_the_first_token_of_each_response():
    (batch,) = pack.batches([[Sample([7, 8, 9], [n] * n, [-1.0] * n) for n in (1, 2, 2)]],
                            64, SHAPE, share=True)
    assert batch.cu_seqlens == [0, 3, 4, 6, 8] and batch.parent == [-1, 0, 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 3, 4, 3, 4]
    assert batch.at_N.tolist() == [2, 2, 4, 2, 6] and batch.targets_N.tolist() == [1, 2, 2, 2, 2]


def test_a_weight_travels_and_a_sample_of_weight_zero_is_in_no_row():
    group = [Sample([1, 2], [3, 4], [-0.5, nan], weight=0.25),
             Sample([1, 2], [5], [-0.5], index=1, weight=0.0),
             Sample([1, 2], [6], [-0.5], index=2, weight=2.0)]
    (batch,) = pack.batches([group], 64, SHAPE)
    weights = {batch.samples[s].index: w for s, w in zip(batch.sample_N.tolist(), batch.weight_N.tolist())}
    assert weights == {0: 0.25, 2: 2.0} and len(batch.weight_N) == 2
    assert pack.batches([group[1:2]], 64, SHAPE, rank=1, ranks=2) == [], "nothing to learn, so no row"


def test_a_second_turn_hangs_under_the_first():
    samples = conversation(random.Random(0))
    (batch,) = pack.batches([samples], 200, SHAPE, share=True)
    assert len(batch.tokens_T) == 4 + (1 + 6 + 3) + 2 + (4 + 1) * 2       # every token once
    by_length = dict(zip((b - a for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:])),
                         range(len(batch.parent))))
    # the question follows the answer it asks about
    assert batch.parent.count(0) == 3 and batch.parent[by_length[2]] == by_length[6]
    assert batch.parent.count(by_length[2]) == 2


def test_a_heavy_group_is_cut_and_shares_in_each_part():
    g = [Sample([1] * 30, [2] * 10, [-1.0] * 10, index=i) for i in range(8)]
    (row,) = pack.batches([g], 1000, SHAPE, share=True)
    assert len(row.tokens_T) == 30 + 8 * 10
    rows = pack.batches([g], 80, SHAPE, share=True)                       # over the budget: 30 + 4 x 10 twice
    assert [len(b.tokens_T) for b in rows] == [70, 70]
    # over half a rank's load: one rank would idle
    ranks = [pack.batches([g], 1000, SHAPE, r, 2, share=True) for r in range(2)]
    assert [sum(len(b.samples) for b in micro) for micro in ranks] == [4, 4]


def test_sharing_is_used_where_it_pays():
    def stored(prompt, response):
        g = [Sample([1] * prompt, [2] * response, [-1.0] * response, index=i) for i in range(8)]
        return sum(len(b.tokens_T) for b in pack.batches([g], 1 << 16, pack.SHAPE))
    assert stored(1024, 256) == 1024 + 8 * 256
    assert stored(2, 500) == 8 * 502


def test_one_copy_to_a_device():
    """All tensors travel as one buffer: on the other side they are views of one storage, in dtype
    and shape what they were."""
    (batch,) = pack.batches([conversation(random.Random(1))], 200, SHAPE, share=True)
    assert batch.to("cpu") is batch
    there = batch.to("meta")
    tensors = {name: x for name, x in vars(there).items() if isinstance(x, torch.Tensor)}
    assert len(tensors) == 9 and len({x.untyped_storage()._cdata for x in tensors.values()}) == 1
    for name, x in tensors.items():
        here = getattr(batch, name)
        assert x.device.type == "meta" and (x.dtype, x.shape) == (here.dtype, here.shape)
    assert there.cu_seqlens == batch.cu_seqlens and there.samples is batch.samples


# -----------------------------------------------------------------------------
# the ladder


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("dtype, loss_tol, grad_tol",
                         [(torch.float64, 1e-12, 1e-10), (torch.float32, 5e-6, 5e-6)])
def test_packed_is_one_by_one(share, dtype, loss_tol, grad_tol):
    """Rungs 5 and 6: rows of many sequences, with prompts stored once or repeated, give the loss and
    the gradient of each sequence run alone; responses of one token and two-level trees included."""
    rng = random.Random(3)
    groups = [group(rng, p) for p in range(4)] + [conversation(rng),
                                                  [sample(rng, [4, 5, 6], 1, index=i) for i in range(3)]]
    rounded([s for g in groups for s in g])
    net = model(dtype)
    micro = pack.batches(groups, 64, SHAPE, share=share)
    assert len(micro) > 1 and share == any(p >= 0 for b in micro for p in b.parent)
    same(gradients(net, packed(net, micro)),
         gradients(net, one_by_one(net, [s for g in groups for s in g])), loss_tol, grad_tol)


def test_two_ranks_with_an_odd_number_of_rows():
    """Five rows over two ranks: a project dropped the fifth. The second rank runs an empty
    micro-batch in its place, which weighs zero and still goes through the model, so that no
    collective waits for it; the two gradients add up to that of one rank."""
    rng = random.Random(5)
    samples = rounded([sample(rng, [1, 2], 28, problem=p) for p in range(5)])
    net = model()
    ranks = [pack.batches(samples, 32, SHAPE, r, 2) for r in range(2)]
    assert [len(m) for m in ranks] == [3, 3] and [len(b.samples) for m in ranks for b in m].count(0) == 1
    empty = next(b for m in ranks for b in m if not b.samples)
    loss = next(packed(net, [empty]))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None and not p.grad.any() for p in net.parameters())
    halves = [gradients(net, packed(net, m)) for m in ranks]
    both = sum(h[0] for h in halves), [a + b for a, b in zip(halves[0][1], halves[1][1])]
    same(both, gradients(net, packed(net, pack.batches(samples, 32, SHAPE))), 1e-12, 1e-10)


def test_the_order_does_not_change_an_update():
    """Correct and incorrect answers together, or apart? For one update it is the same sum; only
    updates taken in between could differ."""
    rng = random.Random(7)
    groups = [rounded(group(rng, p)) for p in range(6)]
    net, results = model(), []
    for order in ("length", "correct", "mixed"):
        micro = pack.batches(groups, 64, SHAPE, order=order)
        hits = [[s.reward > 0.5 for s in b.samples] for b in micro]
        if order == "correct":                                   # each row of one kind, the right ones first
            assert all(len(set(h)) == 1 for h in hits) and sorted(hits, key=lambda h: not h[0]) == hits
        else:
            assert any(len(set(h)) == 2 for h in hits)
        results.append(gradients(net, packed(net, micro)))
    same(results[1], results[0], 1e-12, 1e-10)
    same(results[2], results[0], 1e-12, 1e-10)
    with pytest.raises(ValueError, match='order is "size": it must be length, correct or mixed'):
        pack.batches(groups, 64, SHAPE, order="size")


def test_every_rank_makes_the_same_plan():
    rng = random.Random(11)
    groups = [group(rng, p) for p in range(9)]

    def texts(plan):
        return [[[s.tokens for s in row] for row in micro] for micro in plan]

    assert (texts(pack.plan(groups, 64, SHAPE, 3))
            == texts(pack.plan([list(reversed(g)) for g in groups], 64, SHAPE, 3)))


# -----------------------------------------------------------------------------
# the script


def test_script_draws_and_prints(tmp_path, capsys):
    file = tmp_path / "lengths.json"
    file.write_text(json.dumps([300, 900, 40, 12, 500]))
    pack.main([str(file), "--row-tokens", "1000", "--ranks", "2"])
    out = capsys.readouterr().out
    assert "fill 87.60%: 1752 tokens in 2 rows of 1000" in out and "imbalance" in out
    assert (tmp_path / "lengths.png").stat().st_size > 5000


@pytest.mark.parametrize("content, flags, words", [
    ("[5, 3000]", ["--row-tokens", "1000"], "item 1 has 3000 tokens"),
    ("{}", [], "a JSON list of lengths"),
    ("[1, oops]", [], "Expecting value"),
    ("[1, 0]", [], "item 1 has 0 tokens: leave it out"),
    ("[1, 2]", ["--ranks", "0"], "--ranks is 0"),
    (None, [], "No such file"),
])
def test_script_names_what_is_wrong(tmp_path, capsys, content, flags, words):
    file = tmp_path / "lengths.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as stop:
        pack.main([str(file), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "lengths.png").exists()


def test_cost_takes_any_shape():
    assert pack.cost(SimpleNamespace(n_layer=1, n_head=1, n_kv_head=1, head_dim=1,
                                     d_model=1, d_ff=1, vocab_size=1), 1) == 2 * 7 + 2 + 4
