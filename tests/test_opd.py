"""on-policy distillation: every loss against the full-vocabulary KL in float64, the teacher's
side, the loop, the guard, bad input"""
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import opd
import opd_check
import pack
import stages
from common import overlap
from common.run import Run
from kernels import packed_attention
from rollout import Sample
from train_gpt import GPT, GPTConfig

N, V = 6, 50


# -----------------------------------------------------------------------------
# the losses, in float64: the gradient with respect to the logits


def case(apart=1.0, equal=False, stop=None, **settings):
    """-> p, q, s as a loss gets them. The head is the identity, so that the gradient at the
    hidden states is that of the logits"""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(N, V, generator=g, dtype=torch.float64)
    t = z.clone() if equal else z + apart * torch.randn(N, V, generator=g, dtype=torch.float64)
    eye = torch.eye(V, dtype=torch.float64)
    p = SimpleNamespace(hidden_ND=z.requires_grad_(), head_VD=eye)
    q = SimpleNamespace(hidden_ND=t, head_VD=eye)
    plain = dict(targets_N=torch.randint(V, (N,), generator=g), temperature=1.0, k=8, baseline=0, bound=1e9,
                 divergence="reverse", beta=0.5, stop=None if stop is None else torch.tensor(stop),
                 trust_N=torch.ones(N, dtype=torch.float64))
    s = SimpleNamespace(**{**plain, **settings})
    return p, q, target(p, q, s)


def target(p, q, s):
    s.logp_N, _ = opd.of_target(p, s)
    with torch.no_grad():
        s.logq_N, _ = opd.of_target(q, s)
    return s


def gradient(loss, p, q, s):
    return torch.autograd.grad(loss(p, q, s).sum(), p.hidden_ND)[0]


def logps(p, q, s):
    return (p.hidden_ND / s.temperature).log_softmax(-1), (q.hidden_ND / s.temperature).log_softmax(-1)


def exact(p, q, s):
    """the gradient of sum p (log p - log q) by plain autograd"""
    logp, logq = logps(p, q, s)
    return torch.autograd.grad((logp.exp() * (logp - logq)).sum(), p.hidden_ND)[0]


def close(a, b, tolerance=1e-12):
    return torch.allclose(a, b, atol=tolerance, rtol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_is_the_reverse_kl(temperature):
    p, q, s = case(temperature=temperature)
    assert close(gradient(opd.full, p, q, s), exact(p, q, s))
    logp, logq = logps(p, q, s)
    r = logp - logq
    by_hand = logp.exp() * (r - (logp.exp() * r).sum(1, keepdim=True)) / temperature          # p_j (r_j - KL)
    assert close(gradient(opd.full, p, q, s), by_hand.detach())


@pytest.mark.parametrize("baseline", [0, 5, V])
def test_sampled_is_the_full_kl_in_expectation(baseline):
    """the mean over every token that could have been drawn, weighted by its probability; a
    baseline changes nothing of it"""
    p, q, s = case(baseline=baseline)
    mean = torch.zeros(N, V, dtype=torch.float64)
    for y in range(V):
        s.targets_N = torch.full((N,), y)
        target(p, q, s)
        mean += logps(p, q, s)[0][:, y:y + 1].exp().detach() * gradient(opd.sampled, p, q, s)
    assert close(mean, exact(p, q, s), 1e-10)


def test_the_baseline_takes_variance_away():
    def variance(baseline):
        p, q, s = case(apart=3.0, baseline=baseline)
        total = 0.0
        for y in range(V):
            s.targets_N = torch.full((N,), y)
            target(p, q, s)
            total = (total + logps(p, q, s)[0][:, y].exp().detach()
                     * (gradient(opd.sampled, p, q, s) - exact(p, q, s)).pow(2).sum(1))
        return float(total.sum())
    assert variance(16) < 0.8 * variance(0)


def test_r_itself_says_nothing():
    """back-propagating log p - log q at the sampled token looks like the KL and is its estimate; yet
    its expected gradient is 0, since sum p dlog p = 0: a run that did this would drift by noise alone"""
    p, q, s = case()
    mean, largest = torch.zeros(N, V, dtype=torch.float64), 0.0
    for y in range(V):
        logp, logq = logps(p, q, s)
        one = torch.autograd.grad((logp - logq)[:, y].sum(), p.hidden_ND)[0]
        mean += logp[:, y:y + 1].exp().detach() * one
        largest = max(largest, float(one.abs().max()))
    assert mean.abs().max() < 1e-14 and largest > 0.5 and exact(p, q, s).abs().max() > 1e-3


def test_student_topk_is_the_full_gradient_cut():
    p, q, s = case(k=V)
    assert close(gradient(opd.student_topk, p, q, s), exact(p, q, s)), "nothing is cut at K = V"
    p, q, s = case(k=8)
    logp, logq = logps(p, q, s)
    on = torch.zeros(N, V, dtype=torch.bool).scatter_(1, logp.topk(8).indices, True)
    w = (logp.exp() * (logp - logq) * on).detach()
    assert close(gradient(opd.student_topk, p, q, s), w - logp.exp().detach() * w.sum(1, keepdim=True))
    # the corrected form sum (p r - p + q) has the very same one
    corrected = ((logp.exp() * (logp - logq) - logp.exp() + logq.exp()) * on).sum()
    assert close(gradient(opd.student_topk, p, q, s), torch.autograd.grad(corrected, p.hidden_ND)[0])
    assert torch.cosine_similarity(gradient(opd.student_topk, p, q, s).flatten(),
                                   exact(p, q, s).flatten(), dim=0) > 0.8


def test_teacher_topk_is_renormalised_and_blind_outside():
    p, q, s = case(k=V)
    assert close(gradient(opd.teacher_topk, p, q, s), exact(p, q, s))
    p, q, s = case(k=8)
    ids = q.hidden_ND.topk(8).indices
    a, b = p.hidden_ND.gather(1, ids).log_softmax(1), q.hidden_ND.gather(1, ids).log_softmax(1)
    expected = torch.autograd.grad((a.exp() * (a - b)).sum(), p.hidden_ND)[0]
    found = gradient(opd.teacher_topk, p, q, s)
    assert close(found, expected)
    assert (found.scatter(1, ids, 0.0).abs() < 1e-15).all(), "what the student has elsewhere is not seen"


def test_tail_is_the_kl_of_k_plus_one_outcomes():
    p, q, s = case(k=V - 1)
    assert close(gradient(opd.tail, p, q, s), exact(p, q, s), 1e-9), "the rest of V - 1 is one token"
    p, q, s = case(k=8)
    ids = p.hidden_ND.topk(8).indices
    a, b = (torch.cat([logp.gather(1, ids), (1 - logp.gather(1, ids).exp().sum(1, keepdim=True)).log()], 1)
            for logp in logps(p, q, s))
    assert close(gradient(opd.tail, p, q, s), torch.autograd.grad((a.exp() * (a - b)).sum(), p.hidden_ND)[0])


def test_forward_and_jensen_shannon():
    p, q, s = case(divergence="forward")
    assert close(gradient(opd.full, p, q, s), (logps(p, q, s)[0].exp() - logps(p, q, s)[1].exp()).detach())
    for beta in (0.1, 0.5, 0.9):
        p, q, s = case(divergence="jsd", beta=beta)
        logp, logq = logps(p, q, s)
        m = (1 - beta) * logp.exp() + beta * logq.exp()
        value = (beta * (logq.exp() * (logq - m.log())).sum(1)
                 + (1 - beta) * (logp.exp() * (logp - m.log())).sum(1))
        assert close(opd.full(p, q, s), value) and (value > 0).all() and (value < math.log(2)).all()
        assert close(gradient(opd.full, p, q, s), torch.autograd.grad(value.sum(), p.hidden_ND)[0])


EVERY = [("sampled", {}), ("sampled", {"baseline": 4}), ("student_topk", {}), ("teacher_topk", {}),
         ("tail", {}), ("full", {}), ("full", {"divergence": "forward"}), ("full", {"divergence": "jsd"})]


@pytest.mark.parametrize("stop", [None, [0, 3, 7]])
@pytest.mark.parametrize("name, settings", EVERY)
def test_no_gradient_where_the_student_is_the_teacher(name, settings, stop):
    p, q, s = case(equal=True, stop=stop, **settings)
    assert gradient(opd.LOSSES[name], p, q, s).abs().max() < 1e-14
    p, q, s = case(stop=stop, **settings)
    assert gradient(opd.LOSSES[name], p, q, s).abs().max() > 1e-3, "and some where it is not"


def test_the_loss_that_is_left_out():
    """The KL summed over the top K as it stands, back-propagated: what several distillers ship. At p
    = q each term's derivative is p (r + 1) = p, and over part of the vocabulary these do not cancel:
    a perfect student is pushed to put more into its own top K. It is worst where the run has nearly
    converged. Renormalising, a tail bucket, - p + q or stop-gradient weights each repair it."""
    p, q, s = case(equal=True)
    logp, logq = logps(p, q, s)
    ids = logp.topk(s.k).indices
    a, b = logp.gather(1, ids), logq.gather(1, ids)
    assert torch.autograd.grad((a.exp() * (a - b)).sum(), p.hidden_ND)[0].abs().max() > 0.01


@pytest.mark.parametrize("name", opd.LOSSES)
def test_stop_ids_are_one_action(name):
    """A base model ends with one id, its teacher with another, and both mean the same. Scored id
    by id the student is punished wherever it stops, and the id the teacher would use is never
    sampled: lengths grow to the cap. As one action the two agree, so the gradient is the one of a
    vocabulary that has a single stop."""
    stop, kept = [0, 3], [i for i in range(V) if i not in (0, 3)]
    p, q, s = case(stop=stop, k=V if name != "tail" else V - 3)
    with torch.no_grad():                  # the student ends by 0 only, the teacher by 3 only
        p.hidden_ND[:, 3], q.hidden_ND[:, 0] = -30.0, -30.0
        q.hidden_ND[:, 3] = p.hidden_ND[:, 0]
        q.hidden_ND[:, kept] = p.hidden_ND[:, kept]
        s.targets_N = torch.zeros(N, dtype=torch.int64)
    found = gradient(opd.LOSSES[name], p, q, target(p, q, s))
    assert found.abs().max() < 1e-9, "they agree on everything but the name of the end"
    s.stop = None
    assert gradient(opd.LOSSES[name], p, q, target(p, q, s)).abs().max() > 0.1, "id by id they seem far apart"


def test_log_ratios_are_bounded_as_weights_not_as_values():
    """A clamp that is back-propagated through has no gradient where it acts: the worst tokens
    would stop learning. As a weight it only limits them."""
    p, q, s = case(apart=8.0, bound=2.0)
    far = (s.logp_N - s.logq_N).abs() > 2
    assert far.any()
    expected = torch.autograd.grad(((s.logp_N - s.logq_N).detach().clamp(-2, 2) * s.logp_N).sum(),
                                   p.hidden_ND)[0]
    found = gradient(opd.sampled, p, q, target(p, q, s))
    assert close(found, expected) and (found[far].abs().amax(1) > 0.1).all()


def test_bytes_a_token():
    c = opd.Config()
    assert opd.bytes_a_token(c, 1000) == 4 and opd.bytes_a_token(replace(c, loss="full"), 1000) == 4000
    assert opd.bytes_a_token(replace(c, loss="teacher_topk", k=32), 1000) == 256


# -----------------------------------------------------------------------------
# the diagnostics


def test_compare_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log()
    q = torch.tensor([[0.1, 0.6, 0.2, 0.04, 0.06]]).log()
    found = dict(zip(overlap.MEASURES, overlap.compare(p, q, 2, [4])[0].tolist()))

    def close(name, value):
        return math.isclose(found[name], value, rel_tol=1e-4, abs_tol=1e-6)

    assert close("overlap", 0.5), "0, 1 against 1, 2"
    assert close("p_mass", 0.3) and close("q_mass", 0.6) and close("covered", 0.4) and close("agreed", 0.0)
    assert close("p_stop", 0.04) and close("q_stop", 0.06)
    assert close("kl", float((p.exp() * (p - q)).sum()))
    assert close("gap", abs(found["p_entropy"] - found["q_entropy"]))
    wide = dict(zip(overlap.MEASURES, overlap.compare(p, q, 5, [4])[0].tolist()))
    assert math.isclose(wide["agreed"], -wide["kl"], rel_tol=1e-5) and wide["overlap"] == 1
    same = dict(zip(overlap.MEASURES, overlap.compare(p, p, 2, [4])[0].tolist()))
    assert same["overlap"] == 1 and abs(same["agreed"]) < 1e-6 and same["kl"] == same["gap"] == 0


def test_no_overlap_at_all_is_a_number():
    p = torch.tensor([[1 - 3e-30, 1e-30, 1e-30, 1e-30]]).log()
    found = overlap.compare(p, p.flip(1), 1, [])
    assert found.isfinite().all() and found[0, 0] == 0


def test_measures_by_position():
    sample_N = torch.tensor([0] * 5 + [1] * 3 + [2] * 20)
    assert overlap.places(sample_N).tolist() == [*range(5), *range(3), *range(20)]
    g = torch.Generator().manual_seed(0)
    hidden, other, head = (torch.randn(n, 4, generator=g) for n in (28, 28, 9))
    sums = overlap.measure(hidden, head, other, head, sample_N, 3, [0])
    assert sums[:, 0].tolist()[:4] == [4 + 3 + 4, 1 + 12, 4, 0]
    means = overlap.means_of(sums.flatten())
    whole = overlap.compare((hidden @ head.t()).log_softmax(1), (other @ head.t()).log_softmax(1),
                              3, [0]).mean(0)
    assert math.isclose(means["kl"], float(whole[overlap.MEASURES.index("kl")]), rel_tol=1e-5)
    assert "kl/16" in means and "kl/64" not in means, "nobody was there"


def test_repeated_against_a_loop():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 2, size).tolist() for size in (40, 3, 1, 25)]
    expected = [i >= 3 and any(t[j - 3:j + 1] == t[i - 3:i + 1] for j in range(3, i))
                for t in texts for i in range(len(t))]
    tokens, owner = torch.tensor(sum(texts, [])), torch.tensor([i for i, t in enumerate(texts) for _ in t])
    assert overlap.repeated(tokens, owner, 4).tolist() == expected and sum(expected) > 20


# -----------------------------------------------------------------------------
# the teacher's side of a batch


def tiny(seed, folder=None, tok="chars", noise=0.3):
    tok = data.tokenizer(tok)
    model = GPT(GPTConfig(tok.vocab_size, 2, 2, 1, 16, 32, 48, 256, 10000.0)).init_weights(0)
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim == 2:
            p.data.add_(torch.randn(p.shape, generator=g) * noise * (seed > 0))
    if folder:
        model.save_hf(folder, tok)
    return model


def samples(count=5):
    rng = np.random.default_rng(1)

    def make(n):
        return rng.integers(4, 99, n).tolist()

    made = [Sample(make(3 + i % 2), make(2 + 3 * i), [], "stop", i // 2, i % 2, 0) for i in range(count)]
    return [replace(s, logprobs=[-1.0] * len(s.tokens), advantage=[0.0] * len(s.tokens)) for s in made]


def batch_of(group):
    return pack.rows([segment for s in group for segment in pack.alone(s)])


def setting(group=None, teacher=None, **flags):
    """-> stats, the batch, the student, and the gradient at its head's input"""
    config = replace(opd.Config(teacher="x"), **flags)
    student, batch = tiny(1), batch_of(group or samples())
    loss = opd.make_loss(config, student, teacher or tiny(2), stop=[0])
    hidden = batch.hidden(student).detach().requires_grad_()
    value, stats = loss(batch, hidden, student.head_weight)
    value.backward()
    return stats, batch, student, hidden.grad


def test_a_teacher_that_sees_more_scores_the_same_tokens():
    """its rows are longer and stand in another order; each prediction must meet its own"""
    group, teacher, student = samples(), tiny(2), tiny(1)
    batch = batch_of(group)
    contexts = {0: [5, 6, 7, 8, 9, 10], 1: [11]}
    hidden = batch.hidden(student)
    _, q, bad = opd.sides(student, teacher, batch, hidden, student.head_weight, contexts)
    done = 0
    for s in batch.samples:
        prompt = contexts.get(s.problem, s.prompt)
        T = len(prompt) + len(s.tokens)
        alone = teacher(torch.tensor(prompt + s.tokens), torch.arange(T),
                        packed_attention([0, T], T))[len(prompt) - 1:-1]
        assert torch.allclose(q.hidden_ND[done:done + len(s.tokens)], alone, atol=1e-5)
        done += len(s.tokens)
    assert done == len(batch.targets_N) and not bad.any()


@pytest.mark.parametrize("name", opd.LOSSES)
def test_nan_of_the_teacher_is_counted_and_teaches_nothing(name):
    teacher, group = tiny(2), samples()
    group[4].tokens[3] = 1                                       # a token that no other sample has
    teacher.embed.weight.data[1] = math.nan
    stats, batch, _, grad = setting(group, teacher, loss=name)
    assert 0 < int(stats["teacher_nan"]) < len(batch.targets_N)
    assert grad.isfinite().all() and int((grad.abs().amax(1) == 0).sum()) == int(stats["teacher_nan"])


def test_special_tokens_give_no_signal():
    group = samples()
    group[0].tokens[0] = 2
    config = opd.Config(teacher="x", mask_special=True)
    student, batch = tiny(1), batch_of(group)
    hidden = batch.hidden(student).detach().requires_grad_()
    opd.make_loss(config, student, tiny(2), stop=[0],
                  special=[1, 2, 3])(batch, hidden, student.head_weight)[0].backward()
    silent = (hidden.grad.abs().amax(1) == 0)
    assert silent.tolist() == (batch.targets_N == 2).tolist() and silent.any()


def test_top_p_is_corrected_by_the_mass_it_kept():
    """what is sampled under top-p is pi / kept, so its policy gradient is weighted by kept;
    losses that sum over tokens are not"""
    group = samples()
    student, batch = tiny(1), batch_of(group)
    with torch.no_grad():
        logp, _ = opd.of_target(SimpleNamespace(hidden_ND=batch.hidden(student),
                                                head_VD=student.head_weight),
                                SimpleNamespace(targets_N=batch.targets_N, temperature=1.0, stop=None))
    ends = np.cumsum([len(s.tokens) for s in batch.samples])
    for s, part in zip(batch.samples, np.split(logp.numpy(), ends[:-1])):
        s.logprobs = part.tolist()                               # sampler and trainer agree
    plain = {name: setting(group, loss=name)[3] for name in ("sampled", "tail")}
    for s in group:
        s.kept = [math.log(0.9)] * len(s.tokens)
    assert torch.allclose(setting(group, loss="sampled")[3], 0.9 * plain["sampled"], atol=1e-5)
    assert torch.allclose(setting(group, loss="tail")[3], plain["tail"], atol=1e-5)


def test_coherence():
    """1 where all tokens pull the same way, 0 where they cancel; filled in by the backward itself"""
    stats, _, student, grad = setting()
    D = student.config.d_model
    stats = {k: v.numpy() if torch.is_tensor(v) else v for k, v in stats.items()}
    found = opd.diagnosis(stats, D)["coherence"]
    assert math.isclose(found, float(grad.sum(0).norm() / grad.norm(dim=1).sum()), rel_tol=1e-4)
    assert 0 < found < 1


def test_fixed_negative_is_the_least_likely_fifth():
    group = samples(4)
    rng = np.random.default_rng(0)
    for s in group:
        s.logprobs = (-rng.random(len(s.tokens))).tolist()
    opd.set_advantages(opd.Config(control="fixed_negative"), [group])
    low = [x for s in group for x, a in zip(s.logprobs, s.advantage) if a == -0.5]
    rest = [x for s in group for x, a in zip(s.logprobs, s.advantage) if a == 0.0]
    assert max(low) < min(rest) and abs(len(low) / (len(low) + len(rest)) - 0.2) < 0.05


# -----------------------------------------------------------------------------
# the guard


def history(**curves):
    n = max(len(v) for v in curves.values())
    return [{"repetition": 0.0, "truncated": 0.0, "kl": 0.1, "max_new": 48,
             **{k: v[i] for k, v in curves.items()}} for i in range(n)]


def test_guard():
    c, noise = opd.Config(guard=9, guard_rise=0.1), np.random.default_rng(0).normal(0, 0.02, 30)
    assert "cut" in opd.guard(history(truncated=(np.linspace(0, 0.4, 9)).tolist()), c)
    assert "repeat" in opd.guard(history(repetition=(np.linspace(0, 0.3, 9) + noise[:9]).tolist()), c)
    assert not opd.guard(history(truncated=np.linspace(0, 0.4, 8).tolist()), c), "too soon to say"
    assert not opd.guard(history(truncated=(0.5 + noise).tolist()), c), "high, but it does not rise"
    assert not opd.guard(history(truncated=np.linspace(0.9, 0.1, 20).tolist()), c)
    assert not opd.guard(history(truncated=np.linspace(0, 0.4, 9).tolist()), replace(c, guard=0))
    assert not opd.guard(history(truncated=np.linspace(0, 1, 9).tolist(), max_new=[16] * 9),
                         c), "what the horizon cuts is no failure"


def test_guard_never_stops_on_the_kl():
    """The KL rises while a student leaves its old habits, and falls while it collapses into
    repetition: texts alone decide"""
    assert not opd.guard(history(kl=np.linspace(0.1, 9, 30).tolist()), opd.Config(guard=9))


def test_horizon():
    c = opd.Config(max_new=48, horizon=16, horizon_steps=10)
    assert [opd.horizon(c, now) for now in (0, 5, 10, 99)] == [16, 32, 48, 48]
    assert opd.horizon(replace(c, horizon_steps=0), 50) == 16 and opd.horizon(replace(c, horizon=0), 50) == 48


# -----------------------------------------------------------------------------
# the loop, on tiny random models: the teacher is another one


@pytest.fixture
def own(tmp_path, monkeypatch):
    tiny(1, tmp_path / "student")
    tiny(2, tmp_path / "teacher")
    (tmp_path / "my.jsonl").write_text(
        "".join(json.dumps(dict(prompt=f"question {i}:", gold=f"{i}!")) + "\n" for i in range(40)))
    (tmp_path / "my.py").write_text("def score(problem, text):\n"
                                    "    return sum(c in '0123456789' for c in text) / 8\n")
    monkeypatch.chdir(tmp_path)
    return ("--init student --teacher teacher --data my.jsonl --reward my.py:score --device cpu "
            "--threads 1 --prompts 6 --n 2 --max-new 8 --steps 3 --row-tokens 128 --eval-n 4 --final-n 4 "
            "--eval-k 1 --eval-every 1 --save-every 10 --lr 3e-3 --warmup 1 --workers 1").split()


def metrics(name="opd"):
    return [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return GPT.from_hf(folder).state_dict()


def unequal(one, two):
    return [k for k in one if not torch.equal(one[k], two[k])]


@pytest.mark.parametrize("loss", ["sampled --baseline-k 100 --lr 1e-2",
                                  "tail --k 40", "full --divergence jsd"])
def test_the_student_comes_nearer(own, loss):
    opd.main([*own, *f"--loss {loss} --steps 12 --prompts 24 --eval-every 0".split()])
    m = metrics()
    assert m[-1]["kl"] < 0.7 * m[1]["kl"]
    for key in ("overlap p_mass q_mass gap covered agreed p_stop q_stop "
                "advantage advantage_repeated advantage_others repeated truncated "
                "repetition coherence overlap/0 overlap/4 eval/avg test/avg spent").split():
        assert key in m[-1], key
    rows = [json.loads(line) for line in Path("runs/opd/samples.jsonl").read_text().splitlines()]
    assert all(len(row["disagreement"]) == len(row["pieces"]) for row in rows)
    assert any(x < 0 for row in rows for x in row["disagreement"])


def test_a_student_taught_by_itself_stays(own):
    for i, name in enumerate(opd.LOSSES):
        opd.main([*own, "--teacher", "student", "--loss", name, "--steps", "1",
                  "--eval-every", "0", "--name", name])
        m = metrics(name)[1]
        assert m["grad_norm"] < 1e-6 and m["kl"] < 1e-9 and m["overlap"] == 1, name


@pytest.mark.parametrize("more", [
    "--gold task --kl-coef 0.1 --teacher-at host --eval-every 0",
    "--loss student_topk --k 4 --reward-coef 0.5 --horizon 4 "
    "--horizon-steps 3 --top-p 0.9 --teacher-at sharded",
    "--control sft",
    "--gold teacher",
])
def test_resumed_equals_never_stopped_bit_for_bit(own, monkeypatch, more):
    own += more.split()
    opd.main([*own, "--name", "whole"])
    with monkeypatch.context() as patch:
        calls = []
        patch.setattr(Run, "stopping", lambda self: calls.append(1) or len(calls) == 2)
        with pytest.raises(SystemExit) as stopped:
            opd.main([*own, "--name", "parts"])
    assert stopped.value.code == 130
    opd.main([*own, "--name", "parts", "--resume"])
    assert not unequal(weights("runs/whole/ckpt/step_3"), weights("runs/parts/ckpt/step_3"))
    assert unequal(weights("student"), weights("runs/whole/ckpt/step_3"))

    def timeless(rows):
        return [{k: v for k, v in m.items() if not k.startswith("t_") and "tok_s" not in k} for m in rows]

    assert timeless(metrics("whole")) == timeless(metrics("parts"))


SCRIPT = "import sys, opd; opd.main(sys.argv[1:])"


def test_two_ranks_equal_one_and_a_sharded_teacher_is_whole(own, ranks, one_process):
    argv = [*own, "--steps", "1", "--eval-every", "0", "--gold", "task"]
    one_process(SCRIPT, *argv, "--name", "one")
    ranks(2, SCRIPT, *argv, "--name", "two", "--teacher-at", "sharded")
    one, two = weights("runs/one/ckpt/step_1"), weights("runs/two/ckpt/step_1")
    assert unequal(one, weights("student"))
    assert all(torch.allclose(one[k], two[k], atol=5e-5) for k in one)
    a, b = metrics("one")[1], metrics("two")[1]
    assert all(math.isclose(a[k], b[k], rel_tol=1e-3)
               for k in ("advantage", "repeated", "gold", "spent", "reward"))


def test_controls_and_self_distillation_run(own):
    alone = own[:2] + own[4:]
    opd.main([*alone, "--control", "fixed_negative", "--name", "negative", "--steps", "1"])
    assert "kl" not in metrics("negative")[1] and metrics("negative")[1]["grad_norm"] > 0
    opd.main([*alone, "--context", "hint", "--name", "self", "--steps", "1"])
    m = metrics("self")[1]
    assert m["kl"] > 0.001, "the same weights, but they know the answer"
    opd.main([*alone, "--context", "gold", "--teacher", "self",
              "--context-text", "{prompt}{context}\n{prompt}", "--name", "live", "--steps", "1"])
    assert metrics("live")[1]["kl"] > 0.001


def test_gold_is_learned(own):
    Path("gold.jsonl").write_text("".join(json.dumps(dict(prompt=f"Q{i}:", response="yes!")) + "\n"
                                          for i in range(3)))
    opd.main([*own, "--gold", "gold.jsonl", "--gold-share", "4", "--steps", "20",
              "--eval-every", "0", "--lr", "1e-2"])
    model, tok = GPT.from_hf("runs/opd/ckpt/step_20"), data.tokenizer("chars")
    tokens = tok.encode("Q1:yes!")
    hidden = model(torch.tensor(tokens), torch.arange(7), packed_attention([0, 7], 7))
    guess = (hidden @ model.head_weight.t()).argmax(1)[2:].tolist()
    assert guess == tok.encode("yes!<|end|>")
    assert metrics()[1]["gold"] == 48 * 5


def test_the_guard_goes_back_to_the_best_state(own, monkeypatch, capsys):
    monkeypatch.setattr(opd, "guard", lambda history, config: "it repeats" if len(history) == 3 else "")
    # before on test and valid, held out at 1 and 2, after on test and valid
    results = iter([0.0, 0.1, 0.9, 0.2, 0.0, 0.0])
    rest = dict(k=1, n=1, avg_se=0.0, truncated=0.0, no_answer=0.0, length=1.0)
    monkeypatch.setattr(stages, "evaluate", lambda *a, **k: dict(rest, avg=next(results)))
    opd.main([*own, "--steps", "9"])
    assert "it repeats" in capsys.readouterr().out and len(metrics()) == 4
    assert not unequal(weights("runs/opd/best/step_1"), weights("runs/opd/ckpt/step_3"))
    assert not Path("runs/opd/best/step_2").exists()


def test_nan_at_every_token_ends_the_run_with_the_last_good_state(own, monkeypatch, capsys):
    whole = opd.sides
    steps = []

    def broken(*args):
        p, q, bad = whole(*args)
        steps.append(1)
        return p, q, torch.ones_like(bad) if len(steps) > 12 else bad
    monkeypatch.setattr(opd, "sides", broken)
    with pytest.raises(SystemExit) as stopped:
        opd.main([*own, "--steps", "30", "--eval-every", "0"])
    error = capsys.readouterr().err
    last = [line for line in error.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(last) == 1 and "nan at every token" in last[0]
    folder = last[0].split("state is ")[1]
    assert unequal(weights(folder), weights("student"))
    assert all(v.isfinite().all() for v in weights(folder).values())


# -----------------------------------------------------------------------------
# bad input: one line, and nothing written


@pytest.mark.parametrize("flags, words", [
    ("--teacher other", "another vocabulary"),
    ("--teacher nothing", "nothing"),
    ("--teacher broken", "nan or inf in"),
    ("--loss tail --k 101", "the vocabulary has 100"),
    ("--baseline-k 101", "the vocabulary has 100"),
    ("--gold empty.jsonl", "empty.jsonl is empty"),
    ("--gold bad.jsonl", "line 1"),
    ("--gold none.jsonl", "no such file"),
    ("--teacher=", "no --teacher"),
    ("--teacher self", "every signal is 0"),
    ("--divergence forward", "--loss full"),
    ("--control fixed_negative", "without a teacher"),
    ("--control sft --gold task", "one signal"),
    ("--guard 3", "6 steps or more"),
    ("--gold teacher --teacher-at host", "stay where they are"),
    ("--context gold --context-text x", "{prompt}"),
    ("--reward-coef 1 --n 1", "--n 2"),
    ("--horizon 9", "above --max-new"),
    ("--max-new 300 --row-tokens 500", "serves 256"),
])
def test_bad_input(own, capsys, flags, words):
    tiny(2, "other", tok="bytes")
    broken = tiny(2)
    broken.head.weight.data[7] = math.nan
    broken.save_hf("broken", data.tokenizer("chars"))
    Path("empty.jsonl").write_text("")
    Path("bad.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(SystemExit) as stopped:
        opd.main([*own, *flags.split()])
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 0
    assert words in error
    assert not Path("runs").exists()


# -----------------------------------------------------------------------------
# opd_check.py


def test_tokenizers_are_compared_by_content(tmp_path):
    chars, numbers = data.tokenizer("chars"), data.tokenizer("numbers")
    chars.save(tmp_path / "copy")
    assert opd_check.tokens_differ(chars, data.tokenizer(tmp_path / "copy")) == ""
    assert "100" in opd_check.tokens_differ(chars, numbers)
    assert "1,090" in opd_check.tokens_differ(chars, numbers)
    other = data.tokenizer("chars")
    other.encoding = SimpleNamespace(decode_single_token_bytes=lambda i: b"x" if i == 40
                                     else chars.encoding.decode_single_token_bytes(i))
    assert "id 40" in opd_check.tokens_differ(chars, other)
    assert opd_check.stop_class(SimpleNamespace(stop={5}), SimpleNamespace(stop={2, 5})) == [2, 5]


def measured(**changed):
    plain = dict(gain=0.2, gain_se=0.02, identity=1e-6, tolerance=1e-3,
                 covered=0.98, kl=0.1, continuation=[(4, 0.1, 0.02, 100)])
    return {**plain, **changed}


@pytest.mark.parametrize("changed, word", [
    ({}, "go"),
    ({"gain": -0.1}, "do not"),
    ({"gain": 0.02}, "do not"),
    ({"identity": 0.5}, "do not"),
    ({"covered": 0.4}, "SFT first"),
    ({"kl": 5.0}, "SFT first"),
    ({"continuation": [(600, 0.15, 0.02, 100), (1200, 0.01, 0.02, 60)]}, "shorten"),
    ({"continuation": [(4, 0.1, 0.02, 100), (8, 0.0, 0.02, 60)]}, "go"),
])
def test_verdicts(changed, word):
    assert opd_check.verdict(opd_check.Config("a", "b"), measured(**changed))[0] == word


def test_check_of_a_pair(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny(1, "one"), tiny(2, "two"), tiny(2, "other", tok="bytes")
    argv = "--n 4 --samples 2 --max-new 12 --device cpu --threads 1 --workers 1 --k 4".split()
    found = opd_check.main(["--student", "one", "--teacher", "two", *argv])
    out = capsys.readouterr().out
    assert found["verdict"] == "do not" and found["identity"] < 1e-4 and found["kl"] > 0.1
    for word in ("accuracy:", "identity:", "overlap:", "continuation after",
                 "cost of", "verdict: do not. the teacher is not better"):
        assert word in out
    same = opd_check.main(["--student", "one", "--teacher", "one", *argv])
    assert same["kl"] < 1e-9 and same["covered"] == pytest.approx(found["covered"], abs=1)
    assert same["overlap"] == 1
    assert opd_check.main(["--student", "one", "--teacher", "other",
                           *argv])["reason"].startswith("the vocabularies differ")
    with pytest.raises(SystemExit) as stopped:
        opd_check.main(["--student", "one", "--teacher", "two", *argv, "--k", "101"])
    assert stopped.value.code == 2 and "above the vocabulary of 100" in capsys.readouterr().err
