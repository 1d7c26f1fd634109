"""rollout.py: the sampler equals the uncached oracle, and nothing that shares the batch with a
row can be seen in its tokens"""
import gc
import math
import random
import shutil
import threading
from dataclasses import replace

import pytest
import torch

from common import deal
from common.deal import Feed, SharedPrompts, deal_out
from common import cpu
from kernels import linear_logprob, packed_attention, uniform
from rollout import Pages, Sample, Sampler, completion
from tests.models import random_matrices
from train_gpt import GPT, GPTConfig, sample

V, STOP = 61, 5
to_the_bit = pytest.mark.skipif(not cpu.ON, reason="NANORL_CPU_TRICKS=0: "
                                "equal to the bit is what common/cpu.py gives; else to 1e-5")


def tiny(seed=0, **kw):
    shape = dict(vocab_size=V, n_layer=2, n_head=4, n_kv_head=2, head_dim=16,
                 d_model=64, d_ff=96, max_len=400, rope_theta=1e4) | kw
    torch.manual_seed(seed)                                      # biases are torch's own
    return random_matrices(GPT(GPTConfig(**shape)), seed)


@pytest.fixture(scope="module")
def model():
    return tiny()


PROMPTS = [[(7 * i + j * j) % V for j in range(1 + 9 * i % 41)] for i in range(10)]
LIMITS = [3 + 9 * i for i in range(10)]
KINDS = [dict(exact=True), dict(exact=False), dict(paged=True)]
IDS = ["exact", "slabs", "pages"]


def tokens(groups):
    return [[s.tokens for s in group] for group in groups]


def distribution(model, prefix, temperature=1.0):
    with torch.no_grad():
        T = len(prefix)
        hidden = model(torch.tensor(prefix), torch.arange(T), packed_attention([0, T], T))[-1]
        return (hidden.double() @ model.head_weight.double().t() / temperature).softmax(-1)


def same_or_tied(model, prompt, a, b, s, seed, temperature=1.0):
    """Equal, or parted where the uniform fell on the border of two tokens within rounding. ->
    were they equal?"""
    if a == b:
        return True
    t = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
    cdf = distribution(model, prompt + a[:t], temperature).cumsum(-1)
    u = float(uniform(seed, s.visit, s.problem, s.index, t))
    assert min(abs(float(cdf[x]) - u) for x in (a[t], b[t], max(a[t] - 1, 0), max(b[t] - 1, 0))) < 1e-5, (
        "parted without a tie")
    return False


# --------------------------------------------------------------------------------------------------
# the ladder: cached == uncached, batched == alone, re-batched == not, sampler log-probs ==
# trainer log-probs

@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_cached_is_uncached(model, kind):
    sampler = Sampler(model, {STOP}, slots=6, **kind)
    groups = sampler.generate(PROMPTS, n=3, max_new=LIMITS, seed=3)
    equal = []
    for i, group in enumerate(groups):
        for s in group:
            with torch.no_grad():
                oracle = sample(model, PROMPTS[i], LIMITS[i], {STOP}, 1.0, 3, i, s.index, 0)
            equal.append(same_or_tied(model, PROMPTS[i], s.tokens, oracle, s, 3))
            assert s.finished == ("stop" if s.tokens[-1] == STOP else "length")
            assert len(s.logprobs) == len(s.tokens)
            assert s.finished == "stop" or len(s.tokens) == LIMITS[i]
    assert sum(equal) >= len(equal) - 2 and sampler.live == 0 and sampler.free.left == 6


@to_the_bit
@pytest.mark.parametrize("threads", [1, 2])
def test_alone_is_in_a_crowd(threads):
    """With exact=, the tokens and every bit of the log-probs are the same alone, in a crowd, with 4 slots
    and with 32, in any order: a bug report about one sample can be replayed without the 255 others."""
    many = 10 if threads == 1 else 4          # two threads on a busy machine wait for each other
    prompts, limits = PROMPTS[:many], LIMITS[:many]
    torch.set_num_threads(threads)
    try:
        model = tiny(1, n_head=3, n_kv_head=1, head_dim=32)
        crowd = Sampler(model, {STOP}, slots=32,
                        exact=True).generate(prompts, n=4, max_new=limits, seed=1, temperature=0.8)
        few = Sampler(model, {STOP}, slots=4,
                      exact=True).generate(prompts[::-1], n=4, max_new=limits[::-1], seed=1,
                                           temperature=0.8, ids=range(many - 1, -1, -1))[::-1]
        one = [Sampler(model, {STOP}, slots=1,
                       exact=True).generate([p], 2, m, seed=1, temperature=0.8, ids=[i])[0]
               for i, (p, m) in enumerate(zip(prompts, limits))]

        def bits(groups, n):
            return [[(s.tokens, s.logprobs) for s in group[:n]] for group in groups]

        assert bits(crowd, 4) == bits(few, 4) and bits(crowd, 2) == bits(one, 2)
        assert len({tuple(s.tokens) for group in crowd for s in group}) > 3 * many
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("shape", [{}, dict(qk_norm=False, qkv_bias=True),
                                   dict(n_kv_head=4, tie_embeddings=True)], ids=str)
def test_a_lone_row_in_numpy(monkeypatch, shape, slots):
    """Where there is one thread a lone row's step is numpy's, from the start or once the others
    have left: the same tokens and log-probs as the uncached oracle's, and an update is seen at
    once, since numpy reads the trainer's own memory."""
    monkeypatch.setattr("common.cpu.ONE_THREAD", True)
    model = tiny(**shape)
    was, used = model.lone_row, []
    model.lone_row = lambda *args: used.append(1) or was(*args)
    sampler, before = Sampler(model, {STOP}, slots=slots, exact=False), None
    for scale in (1.0, 1.3):
        with torch.no_grad():
            model.blocks[1].qkv.weight.mul_(scale)
        found = [g[0] for g in sampler.generate(PROMPTS, 1, LIMITS, seed=1)]
        for i, (p, s) in enumerate(zip(PROMPTS, found)):
            if same_or_tied(model, p, s.tokens, sample(model, p, LIMITS[i], {STOP}, seed=1, problem=i), s, 1):
                want = [float(distribution(model, p + s.tokens[:t])[s.tokens[t]].log())
                        for t in range(len(s.tokens))]
                assert s.logprobs == pytest.approx(want, abs=2e-5)
        assert tokens([found]) != before and used
        before = tokens([found])


def test_the_longest_first(model):
    """Known limits decide who goes first, so that a long one does not run alone behind all
    others; the tokens are the same."""
    limits = [4] * 9 + [60]
    sampler = Sampler(model, (), slots=2)
    groups = dict(sampler.stream(PROMPTS, 1, limits, seed=2))
    assert sampler.steps_done < 4 * 9 / 2 + 60 - 8               # 18 + 60 in the order they came
    alone = [sampler.generate([p], 1, limit, seed=2, ids=[i])[0]
             for i, (p, limit) in enumerate(zip(PROMPTS, limits))]
    assert tokens([groups[i] for i in range(10)]) == tokens(alone)


@to_the_bit
def test_exact_where_the_sums_get_long():
    """A product over more than about 350 keys is summed in blocks, and the blocks depend on its
    length: a row that saw its own 300 keys padded to its neighbour's 390 had another last bit.
    The length is the slab's, which depends on the row alone."""
    model = tiny(4, n_layer=1, n_head=8, n_kv_head=1)
    prompts = [[3 + i] * n for i, n in enumerate((280, 390, 330, 5))]

    def run(pick, slots):
        sampler = Sampler(model, (), slots=slots, exact=True)
        return {i: g for i, g in zip(pick, sampler.generate([prompts[i] for i in pick], 2, 8, ids=pick))}

    together = run([0, 1, 2, 3], 8)
    for i in range(4):
        assert [s.logprobs for s in run([i], 2)[i]] == [s.logprobs for s in together[i]]


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_are_the_trainers(model, kind, temperature):
    """Log-probs at temperature 1 beside samples at another were a silent bug of a popular
    trainer. Greedy: those of temperature 1. The stop token has one too."""
    groups = Sampler(model, {STOP}, slots=5, **kind).generate(PROMPTS, 2, LIMITS, temperature=temperature)
    for s in (s for group in groups for s in group):
        row, P = s.prompt + s.tokens, len(s.prompt)
        with torch.no_grad():
            hidden = model(torch.tensor(row), torch.arange(len(row)),
                           packed_attention([0, len(row)], len(row)))
            logp, _ = linear_logprob(hidden[P - 1 : -1], model.head_weight,
                                     torch.tensor(s.tokens), temperature or 1.0)
        torch.testing.assert_close(torch.tensor(s.logprobs), logp, atol=1e-5, rtol=1e-5)
        assert s.kept is None


def test_greedy_is_transformers(tmp_path):
    from bench import peer
    transformers = peer("transformers")
    if transformers is None:
        pytest.skip("transformers is not installed")
    model = tiny(2)
    model.save_hf(tmp_path)
    hf = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for prompt in PROMPTS[1:4]:
        out = hf.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                          max_new_tokens=40, do_sample=False,
                          eos_token_id=STOP, pad_token_id=0)[0, len(prompt) :].tolist()
        assert Sampler(model, {STOP}, slots=2).generate([prompt], 1, 40, temperature=0)[0][0].tokens == out


def test_long_prompts_in_chunks(model):
    """A long prompt is computed a chunk per step while others decode, and comes out the same."""
    prompt, short = [(3 * j) % V for j in range(150)], [[9, 8]]
    for kind in KINDS:
        whole = Sampler(model, {STOP}, slots=4, **kind).generate([prompt, *short], 2, 20)
        chunked = Sampler(model, {STOP}, slots=4, **kind)
        chunked.chunk = 32
        groups = chunked.generate([prompt, *short], 2, 20)
        for a, b in zip(whole[0], groups[0]):
            same_or_tied(model, prompt, a.tokens, b.tokens, a, 0)
        assert tokens(groups)[1] == tokens(whole)[1]


def test_sampling_leaves_training_alone(model):
    """The sampler reads the trainer's own weights in inference mode; a gradient must still be
    had afterwards."""
    fresh = tiny(3)
    Sampler(fresh, {STOP}, slots=2).generate([[1, 2]], 2, 3)
    fresh(torch.tensor([1, 2, 3]), torch.arange(3), packed_attention([0, 3], 3)).sum().backward()
    assert all(p.grad is not None for name, p in fresh.named_parameters() if "head" not in name)


# --------------------------------------------------------------------------------------------------
# noise

def test_uniform_is_for_ever():
    """Samples in old logs are found again by their address: these bits must never change."""
    words = [(0, 0, 0, 0, 0), (1, 2, 3, 4, 5), (42, 0, 7, 3, 255), (2**31, 1, 2**32 + 9, 0, 1),
             (-1, 0, 0, 0, 0)]
    assert [int(float(uniform(*w)) * 2**24) for w in words] == [8312281, 10343044, 9519112, 3391287, 12466301]


def test_uniform_is_uniform():
    n = 1000
    u = uniform(0, 0, torch.arange(n)[:, None], 3, torch.arange(n)[None]).double()  # a million addresses
    counts = torch.histc(u.flatten(), 256, 0, 1)
    chi2 = float(((counts - n * n / 256) ** 2 / (n * n / 256)).sum())
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)
    z = (u - 0.5) * math.sqrt(12)

    def at(seed, visit, index):
        return uniform(seed, visit, torch.arange(n)[:, None], index, torch.arange(n)[None]).double()

    neighbours = [at(1, 0, 3), at(0, 1, 3), at(0, 0, 4), u.roll(1, 0), u.roll(1, 1)]
    for other in neighbours:                                     # in each of the five words
        assert abs(float((z * (other - 0.5) * math.sqrt(12)).mean())) < 5 / n


@pytest.mark.parametrize("top_p, top_k", [(1.0, 0), (0.8, 0), (1.0, 6), (0.9, 12)])
def test_samples_follow_the_softmax(model, top_p, top_k):
    """Chi-square of first tokens, and `kept` is the log of the mass that survived: the trainer
    needs it, since its softmax is full."""
    n, prompt, temperature = 3000, PROMPTS[3], 0.7
    (group,) = Sampler(model, (), slots=500).generate([prompt], n, 1, temperature=temperature,
                                                      top_p=top_p, top_k=top_k)
    p = distribution(model, prompt, temperature)
    q, order = p.sort(descending=True)
    keep = torch.arange(V) < top_k if top_k else torch.ones(V, dtype=torch.bool)
    keep &= (q.cumsum(0) - q < top_p * (q * keep).sum()) | (top_p == 1)
    kept = float((q * keep).sum())
    law = torch.zeros_like(p)
    law[order[keep]] = q[keep] / kept
    counts = torch.bincount(torch.tensor([s.tokens[0] for s in group]), minlength=V)
    assert not counts[law == 0].any()
    common = law * n > 5
    chi2, dof = float(((counts - n * law)[common] ** 2 / (n * law)[common]).sum()), int(common.sum())
    assert chi2 < dof + 5 * math.sqrt(2 * dof)
    assert len(set(counts.tolist())) > 3, "the first token was drawn once for all samples"
    for s in group[:20]:
        assert s.logprobs[0] == pytest.approx(math.log(p[s.tokens[0]]), abs=1e-5)
        assert ((s.kept is None) if top_p == 1
                and not top_k else s.kept[0] == pytest.approx(math.log(kept), abs=1e-5))


def test_first_tokens_are_not_one_token(model):
    """A sampler once drew the first token of a prompt and gave it to all rows of the group."""
    (group,) = Sampler(model, {STOP}, slots=4).generate([PROMPTS[2]], 24, 1)
    assert len({s.tokens[0] for s in group}) > 3


def test_a_visit_has_its_own_noise(model):
    """Without `visit` in the address, every epoch over the same questions repeated the same answers."""
    sampler = Sampler(model, {STOP}, slots=8)
    a, b, c = (tokens(sampler.generate(PROMPTS[:3], 4, 20, visits=[v] * 3)) for v in (0, 1, 0))
    assert a == c and a != b


# --------------------------------------------------------------------------------------------------
# submit, step, abort; pages

def test_abort_and_resume(model):
    """What abort gave back goes on exactly where it was, with its recorded log-probs,
    under its own index."""
    for kind in KINDS:
        sampler = Sampler(model, (), slots=4, **kind)
        (whole,) = sampler.generate([PROMPTS[4]], 3, 40, ids=[77])
        sampler.submit(77, PROMPTS[4], 3, 40)
        for _ in range(17):
            sampler.step()
        cut = sampler.abort(77)
        assert [s.finished for s in cut] == ["aborted"] * 3 and sampler.live == 0
        assert [s.tokens for s in cut] == [s.tokens[:17] for s in whole]
        sampler.submit(77, PROMPTS[4], 3, 40, resume=cut[1:])
        done = []
        while sampler.live:
            done += sampler.step()
        done.sort(key=lambda s: s.index)
        assert [s.index for s in done] == [0, 1, 2]
        for s, c, w in zip(done, cut, whole):
            same_or_tied(model, PROMPTS[4], s.tokens, w.tokens, s, 0)
            assert s.logprobs[:17] == pytest.approx(c.logprobs, abs=1e-6)
            assert len(s.logprobs) == len(s.tokens) == 40
        assert done[1].logprobs[:17] == cut[1].logprobs


def test_forced_tokens_are_marked(model):
    """Tokens that nobody sampled have log-prob nan: they are context, not predictions."""
    sampler = Sampler(model, {STOP}, slots=2)
    sampler.submit(0, [1, 2, 3], 2, 12, resume=[[7, 8], []])
    done = []
    while sampler.live:
        done += sampler.step()
    forced = next(s for s in done if s.index == 0)
    assert forced.tokens[:2] == [7, 8] and all(map(math.isnan, forced.logprobs[:2]))
    assert not any(map(math.isnan, forced.logprobs[2:]))
    p = distribution(model, [1, 2, 3, 7, 8])
    assert forced.logprobs[2] == pytest.approx(math.log(p[forced.tokens[2]]), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_branches_of_one_sample(model, kind):
    """A tree: several samples continue the same stem, each as the sample of its place, with noise
    of its own from there on. They share the stem's log-probs to the bit, max_new counts the stem,
    and each is what it would be alone."""
    sampler = Sampler(model, (), slots=8, **kind)
    (grown,) = sampler.generate([PROMPTS[4]], 2, 12, ids=[9], top_p=0.9)
    stem = replace(grown[1], tokens=grown[1].tokens[:7], logprobs=grown[1].logprobs[:7],
                   kept=grown[1].kept[:7])

    def grow(resume):
        sampler.submit(9, PROMPTS[4], len(resume), 20, top_p=0.9, resume=resume)
        done = []
        while sampler.live:
            done += sampler.step()
        return sorted(done, key=lambda s: s.index)

    branches = grow([replace(stem, index=j) for j in range(3)] + [stem.tokens])
    assert [s.index for s in branches] == [0, 1, 2, 3]
    assert all(len(s.tokens) == 20 and s.tokens[:7] == stem.tokens for s in branches)
    assert len({tuple(s.tokens) for s in branches}) == 4, "branches with one noise are one sample"
    assert all(s.logprobs[:7] == stem.logprobs and s.kept[:7] == stem.kept for s in branches[:3])
    assert all(map(math.isnan, branches[3].logprobs[:7]))
    assert not any(map(math.isnan, branches[3].logprobs[7:]))
    # it was sample 1 from the start
    same_or_tied(model, PROMPTS[4], branches[1].tokens[:12], grown[1].tokens, grown[1], 0)
    for s in branches[:3]:
        (alone,) = grow([replace(stem, index=s.index)])
        same_or_tied(model, PROMPTS[4], alone.tokens, s.tokens, s, 0)
    with pytest.raises(ValueError, match="two samples to resume have index 1"):
        sampler.submit(9, PROMPTS[4], 2, 20, resume=[stem, stem])


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_feed_of_groups_that_resume(model, kind):
    """What collect(resume=) stands on: the group of an id is exactly what is resumed, the other
    prompts have n fresh samples."""
    sampler = Sampler(model, {STOP}, slots=4, **kind)
    prompts, groups = {7: PROMPTS[3], 8: PROMPTS[5]}, {}
    with Feed(sampler, prompts, 2, {7: 9, 8: 9}, resume={8: [[1, 2], [1, 2], [3]]}, seed=4) as feed:
        while feed.busy:
            groups |= {group[0].problem: group for group in feed.complete(feed.step())}
    assert [s.index for s in groups[7]] == [0, 1]
    assert [s.tokens[:2] for s in groups[8]][:2] == [[1, 2]] * 2 and groups[8][2].tokens[0] == 3
    assert groups[8][0].tokens != groups[8][1].tokens and sampler.live == 0


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_new_stop_ids_are_known_from_the_next_reset_on(model, kind):
    """A student stops at [0], its teacher at [0, 30]. The teacher's id was set on the student's
    sampler, which was reset; but with pages reset() left the table of stop ids as it was, and samples
    ran on behind the teacher's id. Graphs know the table's address, so it is filled in place."""
    sampler = Sampler(model, {0}, slots=8, **kind)
    table, (free,) = sampler.is_stop, sampler.generate([PROMPTS[6]], 16, 40, seed=8)
    assert any(30 in s.tokens[:-1] for s in free)
    sampler.stop = {0, 30}
    sampler.reset()
    (group,) = sampler.generate([PROMPTS[6]], 16, 40, seed=8)
    for s, f in zip(group, free):
        end = next((i for i, t in enumerate(f.tokens) if t in (0, 30)), 39) + 1
        assert s.tokens == f.tokens[:end] and s.finished == ("stop" if s.tokens[-1] in (0, 30) else "length")
    assert sampler.is_stop is table


def test_a_feed_left_early_gives_back_what_is_in_flight(model):
    """An error in what is done with the samples left the sampler full of sequences that the next
    call got to see."""
    sampler = Sampler(model, (), slots=4)
    with pytest.raises(ZeroDivisionError), Feed(sampler, dict(enumerate(PROMPTS)),
                                                2, dict.fromkeys(range(10), 30)) as feed:
        feed.step()
        assert sampler.live == 6, "4 slots, and the samples of one prompt that wait"
        1 / 0  # noqa: B018
    assert sampler.live == 0 and sampler.free.left == 4


def test_one_token_a_step(model):
    sampler = Sampler(model, (), slots=3)
    sampler.submit(1, PROMPTS[1], 5, 4)
    ends = []
    for step in range(1, 20):
        ends += [(step, s.index) for s in sampler.step()]
    assert (ends == [(4, 0), (4, 1), (4, 2), (8, 3), (8, 4)]
            or ends == [(4, 0), (4, 1), (4, 2), (7, 3), (7, 4)])


def test_preemption_changes_nothing(model):
    """Too few pages for all rows: the youngest leaves and is computed again later, with the same noise."""
    plenty = Sampler(model, {STOP}, slots=8, paged=True).generate(PROMPTS, 3, 70, seed=5)
    sampler = Sampler(model, {STOP}, slots=8, paged=True, pages=9)
    withdrawn, was = [], sampler._preempt
    sampler._preempt = lambda: (withdrawn.append(len(sampler.running)), was())
    scarce = sampler.generate(PROMPTS, 3, 70, seed=5)
    assert withdrawn and sampler.storage.pages.left == 8
    for group, other in zip(plenty, scarce):
        for a, b in zip(group, other):
            same_or_tied(model, a.prompt, a.tokens, b.tokens, a, 5)
            assert len(b.logprobs) == len(b.tokens)


def test_prompt_pages_are_shared(model):
    sampler = Sampler(model, (), slots=8, paged=True)
    sampler.submit(0, [1] * 100, 8, 4)
    sampler.step()
    total = len(sampler.storage.pages.owners) - 1
    assert total - sampler.storage.pages.left == 3 + 8           # 3 full pages once, the partial one for each
    sampler.abort(0)
    assert sampler.storage.pages.left == total


def test_pages():
    pages = Pages(2)
    a = pages.take()
    pages.share(a)
    pages.free(a)
    assert pages.left == 1
    pages.free(a)
    assert pages.left == 2
    for wrong in (pages.free, pages.share):
        with pytest.raises(AssertionError, match="page"):
            wrong(a)


@pytest.mark.parametrize("kind", [dict(exact=False), dict(paged=True, pages=14)], ids=["slabs", "pages"])
def test_nothing_leaks(kind):
    """10,000 random submits, steps and aborts: every sample comes back once, and every page is
    free at the end."""
    model = tiny(0, vocab_size=16, n_layer=1, n_head=1, n_kv_head=1, head_dim=8,
                 d_model=8, d_ff=8, max_len=200)
    rng, sampler = random.Random(0), Sampler(model, {3}, slots=5, **kind)
    running, asked, back = {}, 0, 0
    for op in range(10_000 if "paged" in kind else 3_000):
        kind_of = rng.random()
        if kind_of < 0.3 and len(running) < 6:
            n = rng.randint(1, 4)
            sampler.submit(op, [rng.randrange(16) for _ in range(rng.randint(1, 70))],
                           n, rng.randint(1, 40), seed=op)
            running[op], asked = n, asked + n
        elif kind_of < 0.6 and running:
            problem = rng.choice(list(running))
            back += len(sampler.abort(problem))
            running.pop(problem)
        else:
            for s in sampler.step():
                back += 1
                if s.problem in running:
                    running[s.problem] -= 1
                    if not running[s.problem]:
                        del running[s.problem]
        assert sampler.live == asked - back
    for problem in running:
        back += len(sampler.abort(problem))
    back += len(sampler.step())
    assert back == asked and sampler.live == 0 and sampler.free.left == 5
    if "paged" in kind:
        assert sampler.storage.pages.left == 13 and not sampler.storage.owned
    else:
        assert not sampler.storage.places and not any(slab.slots for slab in sampler.storage.slabs.values())


# --------------------------------------------------------------------------------------------------
# many prompts: streaming, stop strings, ranks

def test_stream_gives_groups_as_they_end(model):
    sampler = Sampler(model, (), slots=8)
    order = [i for i, group in sampler.stream(PROMPTS[:4], 2, [30, 3, 20, 9]) if len(group) == 2]
    assert order == [1, 3, 2, 0]
    for _ in sampler.stream(PROMPTS[:4], 2, [30, 3, 20, 9]):
        break                                                    # left early: what was in flight is freed
    gc.collect()
    assert sampler.live == 0 and sampler.free.left == 8


class Letters:
    def decode(self, ids):
        return "".join(chr(65 + i) for i in ids)


def test_stop_strings(model):
    """The text decides, however the tokens cut it; what matched stays in the tokens, and
    nothing after it."""
    for kind in KINDS:
        sampler = Sampler(model, (), Letters(), slots=4, **kind)
        (free,) = sampler.generate([PROMPTS[2]], 4, 30)
        word = Letters().decode(free[1].tokens[6:8])
        (cut,) = sampler.generate([PROMPTS[2]], 4, 30, stop_strings=[word])
        for a, b in zip(free, cut):
            at = Letters().decode(a.tokens).find(word)
            want = a.tokens[: at + 2] if at >= 0 else a.tokens
            assert b.tokens == want and b.finished == ("stop" if at >= 0 else "length")
            assert len(b.logprobs) == len(want)


def test_a_stop_string_in_the_text_to_resume_stops_nothing(model):
    """A calculator's call ended a turn with "]". Its answer was forced, the sample resumed, and the next turn
    ended with its first token: the last few tokens are searched, and the old "]" was among them. No call was
    ever answered rightly, and RL learned not to call."""
    for kind in KINDS:
        sampler = Sampler(model, (), Letters(), slots=4, **kind)
        (free,) = sampler.generate([PROMPTS[2]], 2, 30)
        for s in free:
            word = Letters().decode(s.tokens[6:8])
            forced = s.tokens[:8]
            for new in ([word], [Letters().decode(s.tokens[7:9])]):      # all of it old; half of it new
                sampler.submit(0, PROMPTS[2], 1, 30, resume=[forced], stop_strings=new)
                (again,) = ended(sampler)
                text = Letters().decode(again.tokens)
                later = text.find(new[0], 8 - len(new[0]) + 1)
                assert len(again.tokens) == (later + 2 if later >= 0 else 30)


def ended(sampler):
    found = []
    while sampler.live:
        found += sampler.step()
    return found


def test_the_text_of_a_sample():
    """The last token of every sample that had stopped was dropped from its text, also where a
    stop STRING had ended it: "7*6=42;" with ";" as the string reached its judge as "7*6=42", and
    "</answer>" lost its ">". Only a stop id is no text."""
    import data
    tok = data.tokenizer("chars")
    end, user = tok.encode("<|end|>"), tok.encode("<|user|>")

    def text(tokens, finished="stop"):
        return completion(Sample([1], tokens, [0.0] * len(tokens), finished, 0, 0, 0), tok)
    assert text(tok.encode("7*6=42") + end) == text(tok.encode("7*6=42"), "length") == "7*6=42"
    assert text(tok.encode("7*6=42;")) == "7*6=42;" and text(end) == ""
    assert text(tok.encode("42") + user) == "42", "a teacher's stop id that this tokenizer knows as special"
    assert text(tok.encode("42") + user, "length") == "42<|user|>", "cut there by max_new, it stopped nothing"
    model = tiny(vocab_size=tok.vocab_size)
    for kind in KINDS:
        sampler = Sampler(model, tok.stop, tok, slots=4, **kind)
        (free,) = sampler.generate([PROMPTS[2]], 1, 30, seed=1)
        word = tok.decode(free[0].tokens[4:6])
        ((s,),) = sampler.generate([PROMPTS[2]], 1, 30, seed=1, stop_strings=[word])
        assert s.finished == "stop" and completion(s, tok).endswith(word)


def test_prompts_from_a_shared_counter(model, monkeypatch):
    """Two samplers on one counter: each prompt is sampled once, the longest expected first, and
    the tokens do not depend on who."""
    store = torch.distributed.HashStore()
    alone = tokens(Sampler(model, {STOP}, slots=2).generate(PROMPTS, 2, LIMITS))
    a, b = (Sampler(model, {STOP}, slots=2, deterministic=False, store=store) for _ in range(2))
    monkeypatch.setattr(deal, "calls", iter([5, 5]))          # two processes count their calls alike
    streams = [s.stream(PROMPTS, 2, LIMITS) for s in (a, b)]
    firsts = [next(stream) for stream in streams]
    rest = [[], []]
    threads = [threading.Thread(target=lambda stream=stream, out=out: out.extend(stream))
               for stream, out in zip(streams, rest)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    results = firsts + rest[0] + rest[1]
    assert sorted(i for i, _ in results) == list(range(10))
    assert {i: [s.tokens for s in g] for i, g in results} == dict(enumerate(alone))
    assert min(i for i, _ in firsts) >= 7, "the longest limits go first where nothing is known"
    assert a.expected.keys() | b.expected.keys() == set(range(10))


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_rank_without_rows_gets_half_of_anothers(model, monkeypatch, kind):
    """One rank has taken every prompt when the other comes: it asks, half of the groups move with
    the tokens they have, and every group comes out once, whole, as if nothing had moved. A look
    that ends a row between two steps must not take it from its group."""
    store = torch.distributed.HashStore()
    settings = dict(n=3, max_new=[80 + 9 * i for i in range(10)], seed=2, top_p=0.9)
    whole = Sampler(model, (), slots=32, **kind).generate(PROMPTS, **settings)
    a, b = (Sampler(model, (), slots=32, deterministic=False, store=store, **kind) for _ in range(2))
    monkeypatch.setattr(deal, "calls", iter([5, 5]))
    monkeypatch.setattr(deal, "PIECE", 1000)                  # as if a store took no more at once
    busy, moved = a.stream(PROMPTS, **settings), []
    results = [next(busy)]                                       # it has taken all ten by now
    other = threading.Thread(target=lambda: moved.extend(b.stream(PROMPTS, **settings)))
    other.start()
    while not store.add("rollout/5/requests", 0):
        assert other.is_alive()
    results += busy
    other.join(60)
    assert not other.is_alive() and moved and len(results) + len(moved) == 10 and a.live == b.live == 0
    equal = 0
    for i, group in results + moved:
        assert [s.index for s in group] == [0, 1, 2] and all(s.finished == "length" for s in group)
        for s, w in zip(group, whole[i]):
            assert len(s.tokens) == len(s.logprobs) == len(s.kept) == settings["max_new"][i]
            equal += s.tokens == w.tokens and max(abs(x - y) for x, y in zip(s.logprobs, w.logprobs)) < 1e-4
    assert equal >= 29, ("where keys are computed again, tokens may part "
                         "at a tie; not more than one in thirty samples")


def test_a_stream_left_early_keeps_nobody_waiting(model, monkeypatch):
    store = torch.distributed.HashStore()
    a, b = (Sampler(model, (), slots=4, deterministic=False, store=store) for _ in range(2))
    monkeypatch.setattr(deal, "calls", iter([5, 5]))
    leaves = a.stream(PROMPTS, 1, 20)
    next(leaves)
    leaves.close()
    others = []
    stays = threading.Thread(target=lambda: others.extend(b.stream(PROMPTS, 1, 20)), daemon=True)
    stays.start()
    stays.join(60)
    assert not stays.is_alive() and 0 < len(others) < 9


def lone(model, monkeypatch, given):
    """a sampler whose other rank asks for groups at its fifth step, and is gone; given() is
    called when it has got them"""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(deal, "calls", iter([5, 6]))
    sampler = Sampler(model, (), slots=32, deterministic=False, store=store)
    step = sampler.step

    def asked():
        if sampler.steps_done == 5:
            store.add("rollout/5/requests", 1)
        if store.add("rollout/5/offers", 0):
            given()
        return step()
    monkeypatch.setattr(sampler, "step", asked)
    return store, sampler


def test_what_a_rank_asked_for_that_is_gone_comes_back(model, monkeypatch):
    """Groups under the number of one rank alone would wait for it for ever, and so would everybody."""
    given, results = [], []
    _, a = lone(model, monkeypatch, lambda: given.append(1))
    stream = threading.Thread(target=lambda: results.extend(a.stream(PROMPTS, 2, 40)), daemon=True)
    stream.start()
    stream.join(60)
    assert not stream.is_alive() and given
    assert sorted(i for i, _ in results) == list(range(10))
    assert ({i: [s.tokens for s in g] for i, g in results}
            == dict(enumerate(tokens(Sampler(model, (), slots=32).generate(PROMPTS, 2, 40)))))


def test_an_interrupt_finds_the_groups_that_nobody_has_taken_yet(model, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt
    store, a = lone(model, monkeypatch, interrupt)
    groups = dict(a.stream(PROMPTS, 2, 40))
    assert sorted(groups) == list(range(10)) and all([s.index for s in g] == [0, 1] for g in groups.values())
    assert all(s.tokens and s.finished == "aborted" for g in groups.values()
               for s in g), "each has got some tokens, given away or not"
    assert store.add("rollout/5/done", 0) == 10


def test_a_row_that_has_ended_when_groups_are_given_away(model):
    """On a GPU the host looks every 8 steps; the look that comes before groups are given finds
    rows that ended since, and writes."""
    a = Sampler(model, (), slots=8, paged=True)
    feed = Feed(a, dict(enumerate(PROMPTS[:4])), 2, dict(enumerate((14, 17, 40, 60))))
    feed.shared = SharedPrompts(range(4), torch.distributed.HashStore(), "x")
    feed.coming = iter(range(3))
    ended = [s for _ in range(4) for s in feed.step()]
    feed.coming = iter([3])          # the batch is rebuilt, so its looks and those for requests fall apart
    feed.prompts_left = True
    while a.steps_done < 16:
        ended += feed.step()
    assert not ended and a.batch.steps % 8 and not feed.prompts_left
    feed.shared.count("requests", 1)
    ended = feed.step()
    assert feed.samples_left and set(feed.groups) == {0, 1, 2}
    ((problem, there, unfinished),) = feed.shared.receive()
    assert problem == 3 and there == [] and [len(s.tokens) for s in unfinished] == [13, 13]
    assert sorted((s.problem, s.index, len(s.tokens))
                  for s in ended) == [(0, 0, 14), (0, 1, 14), (1, 0, 17), (1, 1, 17)]


def test_ranks_that_expect_different_lengths_deal_in_one_order(model, monkeypatch):
    """Each rank knows the lengths of what it has sampled itself. With an order of its own each,
    the shared counter would point at different prompts: some would be sampled twice, others never."""
    store = torch.distributed.HashStore()
    a, b = (Sampler(model, (), slots=4, deterministic=False, store=store) for _ in range(2))
    a.expected, b.expected = {0: 9.0, 1: 2.0, 2: 5.0}, {3: 8.0, 4: 1.0}
    monkeypatch.setattr(deal, "calls", iter([5, 5]))
    (one, _), (two, _) = (deal_out(s, dict.fromkeys(range(6), 7)) for s in (a, b))
    taken = [i for pair in zip(one, two) for i in pair]
    assert sorted(taken) == list(range(6)) and taken[0] == 0


# --------------------------------------------------------------------------------------------------
# bad input

@pytest.mark.parametrize("change, words", [
    (dict(prompts=[[]]), "empty"), (dict(prompts=[[1] * 400]), "400 tokens"),
    (dict(prompts=[[1, V]]), "token 61"), (dict(prompts=[[-1]]), "token -1"),
    (dict(n=0), "n = 0"), (dict(max_new=0), "max_new = 0"), (dict(top_p=0), "top_p 0"),
    (dict(top_p=2), "top_p 2"), (dict(top_k=-1), "top_k -1"),
    (dict(temperature=-1.0), "temperature"), (dict(temperature=math.nan), "temperature"),
    (dict(ids=[1, 1], prompts=[[1], [2]]), "same id"), (dict(ids=[1, 2]), "2 ids"),
    (dict(stop_strings=["x"]), "tokenizer"), (dict(max_new=[1, 2]), "2 max_new")])
def test_bad_calls(model, change, words):
    sampler = Sampler(model, {STOP}, slots=2)
    with pytest.raises(ValueError, match=words):
        sampler.generate(**(dict(prompts=[[1, 2]], n=2, max_new=3) | change))
    assert sampler.live == 0
    assert len(sampler.generate([[1, 2]], 2, 3)[0]) == 2


def test_bad_samplers(model):
    for kw, words in ((dict(stop={V}), "stop id 61"), (dict(stop={-1}), "stop id -1"),
                      (dict(slots=0), "slots 0"), (dict(max_len=9999), "max_len")):
        with pytest.raises(ValueError, match=words):
            Sampler(model, **(dict(stop={STOP}) | kw))
    with pytest.raises(ValueError, match="pool holds"):
        Sampler(model, {STOP}, slots=2, paged=True, pages=6).generate([[1] * 60], 1, 300)
    with pytest.raises(ValueError, match="to resume"):
        Sampler(model, {STOP}).submit(0, [1], 1, 5, resume=[[1], [2]])
    with pytest.raises(ValueError, match="already"):
        Sampler(model, {STOP}).submit(0, [1], 1, 2, resume=[[1, 2]])


def test_the_context_ends(model):
    """Past prompt + max_new > max_len a table of positions used to overflow; here the sample ends
    at the model's length."""
    (group,) = Sampler(model, (), slots=2).generate([[1] * 390], 2, 50)
    assert [len(s.tokens) for s in group] == [10, 10] and group[0].finished == "length"


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_logits_that_are_not_finite(kind):
    """Named with step and request; the weights mended, the same sampler goes on."""
    model = tiny(5)
    sampler = Sampler(model, {STOP}, slots=3, **kind)
    before = tokens(sampler.generate(PROMPTS[:3], 2, 12))
    good = model.norm.weight.data.clone()
    model.norm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match=r"step \d+: the logits of problem \d.* not finite"):
        sampler.generate(PROMPTS[:3], 2, 12)
    model.norm.weight.data.copy_(good)
    assert sampler.live == 0 and tokens(sampler.generate(PROMPTS[:3], 2, 12)) == before


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_interrupt(model, kind):
    """Ctrl-C in mid-round: what was sampled comes back as aborted, finished groups as they are,
    and nothing stays taken. A GPU is looked at every few steps only: rows that had ended since
    the last look came back with what was drawn behind their stop token."""
    sampler = Sampler(model, {STOP}, slots=4, **kind)
    was, kinds = sampler._next_token, set()
    for at in range(24, 40, 1 if kind.get("paged") else 6):
        calls, whole = [], sampler.generate(PROMPTS, 2, LIMITS, seed=at)

        def interrupted(*args):
            calls.append(1)  # noqa: B023
            if len(calls) == at:  # noqa: B023
                raise KeyboardInterrupt
            return was(*args)
        sampler._next_token = interrupted
        groups = sampler.generate(PROMPTS, 2, LIMITS, seed=at)
        sampler._next_token = was
        assert len(groups) == 10 and all(len(g) == 2 for g in groups)
        assert "aborted" in {s.finished for g in groups for s in g}
        kinds |= {s.finished for g in groups for s in g}
        for g, w in zip(groups, whole):
            for a, b in zip(g, w):
                assert isinstance(a, Sample) and a.tokens == b.tokens[: len(a.tokens)]
                assert len(a.tokens) == len(a.logprobs)
        assert sampler.live == 0 and sampler.free.left == 4
    assert len(kinds) > 1
    assert tokens(sampler.generate(PROMPTS, 2, LIMITS, seed=at)) == tokens(whole)


# --------------------------------------------------------------------------------------------------
# command line, GPU

def test_command_line(tmp_path, capsys, monkeypatch):
    import data
    import rollout
    tok = data.tokenizer("chars")
    tiny(0, vocab_size=tok.vocab_size).save_hf(tmp_path, tok)
    rollout.main(["--model", str(tmp_path), "--prompt", "1+2=", "--n", "2",
                  "--max-new", "5", "--device", "cpu"])
    lines = capsys.readouterr().out
    assert lines.count("1+2=") >= 2
    answers = iter(["hello", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    step = tmp_path / "run/ckpt/step_3"                          # a run, too: its last complete checkpoint
    shutil.copytree(tmp_path, step, ignore=shutil.ignore_patterns("run"))
    (step / "meta.json").write_text('{"step": 3, "world": 1}')
    (step / "state_0_of_1.pt").write_bytes(b"")
    rollout.main(["--model", str(tmp_path / "run"), "--prompt", "1+2=",
                  "--n", "2", "--max-new", "5", "--device", "cpu"])
    assert capsys.readouterr().out == lines
    rollout.main(["--model", str(tmp_path), "--chat", "--max-new", "5", "--device", "cpu"])
    assert "model:" in capsys.readouterr().out
    for argv in (["--model", str(tmp_path)], ["--model", "nowhere", "--prompt", "x"]):
        with pytest.raises(SystemExit):
            rollout.main(argv)
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.gpu
def test_graphs_replay_what_eager_does():
    """A graph with a length baked in at capture once attended too little: every bucket edge,
    replayed against eager."""
    model = tiny(6, head_dim=32).cuda()
    for B in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32):
        graphs = Sampler(model, {STOP}, slots=32)
        eager = Sampler(model, {STOP}, slots=32)
        eager.replayed = False
        for top_p in (1.0, 0.9):
            a, b = (s.generate([[1 + i, 2, 3] for i in range(B)], 1, 90, top_p=top_p)
                    for s in (graphs, eager))
            assert tokens(a) == tokens(b)
