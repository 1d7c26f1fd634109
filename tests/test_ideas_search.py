"""the exact invariants of ideas about steps, trees, votes and verifiers"""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import algos
import data
import train_gpt
from common import evidence
from ideas import chunks, evol, midtrain, treepo
from rollout import Sample
from stages import Settings, close, collect, next_problems, setup


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(here):
    """a random tiny model on Countdown; a text of odd length is right"""
    made = setup(Settings(init=evidence.random_model("base", here), steps=4, prompts=3, n=4, max_new=12,
                          lr=1e-2, warmup=1, decay=0.0, workers=1, threads=1),
                 reward=evidence.easy_reward(here))
    yield made
    close(made)


TOK = data.tokenizer("chars")


def group_of(texts, rewards=None):
    rewards = rewards or [1.0] * len(texts)
    return [Sample([1], TOK.encode(text), [0.0] * len(text), "stop", 0, i, 0, reward=r)
            for i, (text, r) in enumerate(zip(texts, rewards))]


# --- chunks


def test_chunks_cuts_after_each_step():
    assert chunks.ends(TOK.encode("12*3=36,36+7=43"), TOK) == [8, 15]
    assert chunks.ends(TOK.encode("1,2,"), TOK) == [2, 4], "what ends the response is no step more"
    assert chunks.ends(TOK.encode("12"), TOK) == [2]
    shared = group_of(["1+2=3,3+4=7", "1+2=3,3*4=12", "1*2=2,2+4=6", "8"])
    assert len(chunks.prefixes(shared, TOK)) == 2, "a step that two share is asked once"


def test_chunks_by_hand():
    """the picture in chunks.py: a right first step, then a slip"""
    assert chunks.difference([0.25, 0.75, 0.0]) == pytest.approx([0.5, -0.75])
    assert chunks.ratio([0.25, 0.75, 0.0], 0.8).tolist() == [1, -1]
    assert chunks.ratio([0.5, 0.41, 0.3], 0.8).tolist() == [1, -1], "a small loss is still good"
    assert chunks.ratio([0.0, 0.0, 0.0], 0.8).tolist() == [-1, -1], "nothing of nothing is not"


KNOWN = {"1+2=3,": 0.75, "1*2=2,": 0.25}


@pytest.mark.parametrize("arm", ["difference", "shuffled"])
def test_chunks_only_moves_what_plain_pays(arm):
    """the advantages of a response add up to those of GRPO without the deviation, wherever they stand"""
    group = group_of(["1+2=3,3+4=7", "1+2=3,3*4=12", "1*2=2,2+4=6", "8"], [1.0, 0.0, 0.0, 0.0])
    known = {(0, tuple(TOK.encode(text))): value for text, value in KNOWN.items()}
    config = SimpleNamespace(gamma=0.8)
    chunks.credit(group, known, arm, config, TOK, np.random.default_rng(0))
    plain = algos.BASELINES["mean"](np.array([s.reward for s in group]))
    for s, a in zip(group, plain):
        cut = chunks.ends(s.tokens, TOK)
        assert len(s.advantage) == len(s.tokens)
        assert sum(s.advantage[end - 1] for end in cut) == pytest.approx(a)
        assert all(len(set(s.advantage[i:j])) == 1 for i, j in zip([0, *cut], cut)), "one for a whole step"
    assert set(group[3].advantage) == {-0.25}, "a response of one step gets what it got before"
    if arm == "difference":
        assert group[1].advantage[0] == 0.5 and group[1].advantage[-1] == -0.75


def test_chunks_labels_are_centred_step_by_step():
    group = group_of(["1+2=3,3+4=7", "1+2=3,3*4=12", "1*2=2,2+4=6"], [1.0, 0.0, 0.0])
    known = {(0, tuple(TOK.encode(text))): value for text, value in KNOWN.items()}
    chunks.credit(group, known, "ratio", SimpleNamespace(gamma=0.8), TOK, None)
    assert [s.advantage[0] for s in group] == pytest.approx([2 / 3, 2 / 3, -4 / 3])
    assert [s.advantage[-1] for s in group] == pytest.approx([4 / 3, -2 / 3, -2 / 3])


def test_chunks_is_exact_on_a_chain_with_known_values():
    """Two steps of two choices each; whether a path is right is known. Averaged over all paths, the gradient
    with the true values is that of the chance to be right, in float64, and its variance is below that of the
    whole return."""
    right = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    first = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[0.5, 0.1], [-0.4, 0.2]], dtype=torch.float64, requires_grad=True)
    p, q = first.softmax(0), second.softmax(1)
    value = (p[:, None] * q * right).sum()
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(value, (first, second), retain_graph=True)])
    after = (q * right).sum(1)
    moments = {}
    for arm in ("difference", "return"):
        mean, square = 0, 0
        for i, j in itertools.product(range(2), repeat=2):
            path = [value.item(), after[i].item(), right[i, j].item()]
            paid = chunks.difference(path) if arm == "difference" else [path[2] - path[0]] * 2
            score = paid[0] * p[i].log() + paid[1] * q[i, j].log()
            grads = torch.autograd.grad(score, (first, second), retain_graph=True, allow_unused=True)
            g = torch.cat([x.flatten() for x in grads])
            chance = float(p[i] * q[i, j])
            mean = mean + chance * g
            square = square + chance * float((g**2).sum())
        moments[arm] = square - float((mean**2).sum())
        assert torch.allclose(mean, truth, atol=1e-12), arm
    assert moments["difference"] < moments["return"]


def test_chunks_values_are_those_of_the_rollouts(small):
    """k rollouts from each prefix, scored whole; what was forced on them is not counted as sampled"""
    problems = next_problems(small, 3)
    asked = {p.id: [tuple(TOK.encode("1+2=3,")), tuple(TOK.encode("7,"))] for p in problems[:2]}
    known, spent = chunks.values(small, problems, asked, 4, seed=5)
    assert set(known) == {(id, prefix) for id in asked for prefix in asked[id]}
    assert all(4 * value == int(4 * value) for value in known.values())
    assert 2 * 2 * 4 <= spent <= 2 * 4 * (6 + 10), "12 tokens at most, 6 or 2 of them forced"
    again, _ = chunks.values(small, problems, asked, 4, seed=5)
    assert again == known and not small.visits, "an evaluation moves nothing"


def test_chunks_searches_and_counts(small):
    problems = small.problems[:6]
    for curve in (chunks.by_steps(small, problems, 2), chunks.independent(small, problems, 8)):
        tokens, solved = map(np.array, zip(*curve))
        assert (np.diff(tokens) >= 0).all() and (np.diff(solved) >= 0).all() and 0 <= solved[-1] <= 1
    groups = list(collect(small, problems, 8, seed=chunks.SEED))
    assert curve[-1][1] == np.mean([any(s.reward > 0.5 for s in group) for group in groups])
    assert math.isclose(curve[-1][0], sum(len(s.tokens) for group in groups for s in group) / 6)


# --- treepo


def test_treepo_by_hand():
    """Six leaves: two of them stand under a b, one more under a, two under e, and d is alone. The picture in
    treepo.py is the tree of the first two and d."""
    paths = [("a", "b", 1), ("a", "b", 2), ("a", "c"), ("d",), ("e", 1), ("e", 2)]
    r = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    found = treepo.subgroup_advantages(paths, r)
    all_six = r - 1 / 2
    under_a = np.array([1 / 3, -2 / 3, 1 / 3])
    assert found[0] == pytest.approx((all_six[0] + under_a[0] + 1 / 2) / 3)
    assert found[1] == pytest.approx((all_six[1] + under_a[1] - 1 / 2) / 3)
    assert found[2] == pytest.approx((all_six[2] + under_a[2]) / 2), "alone under a c: left out"
    assert found[3] == pytest.approx(all_six[3])
    assert found[4:] == pytest.approx([(-1 / 2 - 1 / 2) / 2, (1 / 2 + 1 / 2) / 2])
    picture = treepo.subgroup_advantages([("a", "b", 1), ("a", "b", 2), ("d",)], [1.0, 0.0, 0.0])
    assert picture[0] == pytest.approx((2 / 3 + 1 / 2 + 1 / 2) / 3)


def test_treepo_that_splits_at_the_root_alone_is_grpo():
    r = np.array([1.0, 0.0, 0.0, 1.0, 0.0])
    found = treepo.subgroup_advantages([(i, 0, 0) for i in range(5)], r)
    assert found == pytest.approx(algos.BASELINES["mean"](r).tolist())
    assert treepo.subgroup_advantages([(1, i) for i in range(5)], r) == pytest.approx(found), "one child"


def test_treepo_never_spends_more_leaves_than_there_are():
    rng = np.random.default_rng(0)
    assert {treepo.children(1, 0, 8, True, rng)[0] for _ in range(200)} == set(range(2, 9))
    assert treepo.children(1, 0, 4, True, rng)[0] <= 4
    assert treepo.children(3, 0, 8, False, rng) == [2, 2, 2], "two for each"
    assert treepo.children(3, 0, 4, False, rng) == [2, 1, 1]
    assert treepo.children(3, 2, 3, False, rng) == [1, 1, 1]


def test_treepo_hands_the_share_of_a_path_that_ended_to_those_that_live():
    """two paths, one of them ended: the other gets four; a live path never had more than two"""
    assert treepo.children(1, 1, 6, False, None) == [4]
    assert treepo.children(2, 1, 7, False, None) == [3, 3]
    assert treepo.children(1, 3, 5, False, None) == [5], "no more than there are"


def test_treepo_grows_what_its_paths_say(small):
    """leaves that share a path share these tokens and their log-probs, and they were decoded once"""
    config = treepo.Config(n=6, segment=3, max_new=12)
    problems = next_problems(small, 3)
    groups, tokens = treepo.rollout("tree", small, problems, config, np.random.default_rng(1))
    trees = treepo.Trees(small, problems, config, np.random.default_rng(1))
    small.visits.clear()
    trees.grow()
    assert trees.tokens == tokens and tokens["prefilled"] > 0
    new = 0
    for group, leaves in zip(groups, trees.ended.values()):
        assert len(leaves) == 6 == len({path for _, path in leaves}) and len({s.index for s in group}) == 6
        for (s, path), (t, other) in itertools.combinations(leaves, 2):
            same = sum(all(pair[0] == pair[1] for pair in zip(path[:i + 1], other[:i + 1]))
                       for i in range(min(len(path), len(other))))
            assert s.tokens[:3 * same] == t.tokens[:3 * same]
            assert s.logprobs[:3 * same] == t.logprobs[:3 * same]
        assert not any(math.isnan(x) for s, _ in leaves for x in [*s.logprobs, s.reward])
        parts = {}
        for s, path in leaves:
            for i in range(len(path)):
                last = i == len(path) - 1
                parts[path[:i + 1]] = len(s.tokens) - 3 * i if last else 3
        new += sum(parts.values())
    # a leaf that was cut again is no more than its own new part: its path says where it was cut
    assert tokens["decoded"] == new < sum(len(s.tokens) for group in groups for s in group)


# --- evol


def test_evol_by_hand():
    """two that agree in one text, one that agrees in other words, one that does not, one without answer"""
    texts = ["abcd", "abcd", "wxyz", "abcx", ""]
    agrees = [True, True, True, False, None]
    similar = evol.similarity(texts[:4])
    assert similar[0, 1] == pytest.approx(1) and similar[0, 2] == 0
    assert similar[0, 3] == pytest.approx(1 / 2), "one of two grams"
    places = evol.novelty(similar, np.array(agrees[:4]))
    assert places == pytest.approx([0, 0, 1, 1]), "a set of one is novel"
    paid = evol.evolved(texts, agrees, "evol", None)
    assert paid == pytest.approx([0.5, 0.5, 1.0, -0.5, -1.0])
    assert evol.evolved(texts, agrees, "signs", None) == pytest.approx([0.75] * 3 + [-0.75, -1.0])
    mixed = evol.evolved(texts, agrees, "shuffled", np.random.default_rng(0))
    assert sorted(mixed) == pytest.approx(sorted(paid)) and mixed[3:] == pytest.approx(paid[3:])


def test_evol_where_all_are_equally_novel_is_the_vote():
    """what is equal in every way gets equal rewards, so a group that all agrees teaches nothing"""
    assert len(set(evol.evolved(["abc"] * 4, [True] * 4, "evol", None))) == 1
    paid = evol.evolved(["abc", "abc", "xyz", "xyz"], [True, True, False, False], "evol", None)
    assert paid == pytest.approx([0.75, 0.75, -0.75, -0.75]), "the middle of both sets"
    A = algos.BASELINES["group"](paid)
    assert A == pytest.approx(algos.BASELINES["group"](np.array([1.0, 1, 0, 0])), abs=1e-5)
    assert evol.evolved(["a", "b"], [None, None], "evol", None).tolist() == [-1, -1]
    assert evol.evolved(["a", "b"], [True, None], "evol", None).tolist() == [-1, -1], "too few"


def test_evol_takes_no_rounding_for_novelty():
    """the same text 31 times: its mean similarity differs in the last digit, which min-max made 0 and 1"""
    similar = np.ones((31, 31))
    similar[0, 1:] = similar[1:, 0] = 1 - 1e-15
    assert (evol.novelty(similar, np.array([True] * 31)) == 0.5).all()


def test_evol_compares_with_all_votes_and_trains_the_first(small):
    """novelty was measured among the samples that are trained: what the other votes say did not count"""
    texts = ["1+2=3", "1+2=3", "2+1=3", "2+1=3", "2+1=3", "2+1=3"]
    chosen = evol.judge(group_of(texts), "evol", small, evol.Config(n=3), np.random.default_rng(0))
    assert [s.index for s in chosen] == [0, 1, 2] and [s.reward for s in chosen] == [1, 1, 0.5]


def test_evol_never_sees_a_label(small):
    """the vote of all samples is the label, whatever is right; only n of them are trained"""
    texts = ["1+2=3", "2+1=3", "1*2=2", "1+2=3", "x", "x", "x"]
    for rewards in ([1.0] * 7, [0.0] * 7):
        chosen = evol.judge(group_of(texts, rewards), "vote", small, evol.Config(n=7),
                            np.random.default_rng(0))
        assert [s.reward for s in chosen] == [1, 1, 0, 1, 0, 0, 0], "no answer is no vote"
    few = evol.judge(group_of(texts), "evol", small, evol.Config(n=3), np.random.default_rng(0))
    assert len(few) == 3 and all(-1 <= s.reward <= 1 for s in few)
    assert evol.judge(group_of(["x", "y"]), "evol", small, evol.Config(), np.random.default_rng(0)) == []


# --- midtrain


SEARCH = data.load("countdown:search")
NUMBERS = data.tokenizer("numbers")


def read(i):
    return SEARCH.document("train", 0, i)


def size(text):
    return len(NUMBERS.encode(text)) + 1


def branch(arm, budget=6000):
    return midtrain.branch(arm, read, size, 50, budget)


def test_a_branch_without_searches_reads_on_where_the_plateau_ended():
    texts = branch("0%", 500)
    assert texts == [midtrain.answer_alone(*read(50 + i)) for i in range(len(texts))]
    assert all(text.count("#") == 1 and text[0] == "#" and "(" not in text for _, text in texts)


@pytest.mark.parametrize("arm", midtrain.SHARES)
def test_a_branch_has_its_share_its_tokens_and_no_wrong_answer(arm):
    """arms differ in what is thought before an answer, never in whether it is right"""
    texts = branch(arm)
    sizes = [size(text) for _, text in texts]
    assert sum(sizes[:-1]) < 6000 <= sum(sizes)
    for number in range(1, len(texts)):
        thought = sum(text[0] != "#" for _, text in texts[:number])
        assert abs(thought - midtrain.SHARES[arm] * number) <= 1, "evenly, from the first document on"
    for prompt, text in texts:
        numbers, target = prompt[1:-1].split("=")
        facts = dict(numbers=[int(x) for x in numbers.split()], target=int(target))
        assert SEARCH.reward(data.Problem(prompt, data=facts), text) == 1


def test_two_documents_exchange_their_searches_and_nothing_else():
    pair = ("S3 7 12=43:", "12*3=36(36+7=43#12*3=36,36+7=43"), ("S5 2 9=16:", "5+2=7(9+7=16#5+2=7,9+7=16")
    assert midtrain.exchanged(*pair) == (("S3 7 12=43:", "5+2=7(9+7=16#12*3=36,36+7=43"),
                                         ("S5 2 9=16:", "12*3=36(36+7=43#5+2=7,9+7=16"))
    own, other = midtrain.searches(read, False), midtrain.searches(read, True)
    for _ in range(20):
        pair, swapped = ([next(texts), next(texts)] for texts in (own, other))
        assert sum(size(text) for _, text in pair) == sum(size(text) for _, text in swapped)
        assert [prompt for prompt, _ in pair] == [prompt for prompt, _ in swapped]


def test_rows_are_those_that_pretraining_reads():
    given = train_gpt.configure("--data countdown:search --seed 0".split())
    own = train_gpt.documents(given, NUMBERS)[0]
    rows = midtrain.in_rows([read(i) for i in range(8)], own, batch=4)
    assert [rows("train", i) for i in range(8)] == [own("train", i) for i in range(8)]


def test_every_branch_begins_at_the_end_of_the_plateau(here, monkeypatch):
    """the second of two equal branches ends where the first did, to the bit: weights and moments were
    taken back"""
    monkeypatch.setattr(midtrain, "SHARES", {"one": 0.2, "two": 0.2})
    config = midtrain.Config(smoke=True)
    trial = SimpleNamespace(folder=here, bar=evidence.progress(1, "branches"))
    folders = midtrain.bases(trial, config).values()
    one, two = (train_gpt.GPT.from_hf(folder).state_dict() for folder in folders)
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- bad input


@pytest.mark.parametrize("idea, words, said", [
    (chunks, "--gamma 2", "--gamma is 2.0: it is a share, give 0 to 1"),
    (treepo, "--segment 25", "--max-new 192: give whole segments of --segment 25"),
    (treepo, "--n 1", "--n: at least 2"),
    (evol, "--task code", "--task code has no answer and no canon and no same: there is a vote on answers"),
    (evol, "--n 40", "--n 40 is above --votes 32"),
    (midtrain, "--task countdown", "--task countdown: its documents show no search"),
    (midtrain, "--init runs/base", "--init runs/base has no effect: this idea trains its own models"),
])
def test_bad_input_is_one_line_before_anything_is_trained(idea, words, said, here, capsys, monkeypatch):
    monkeypatch.setattr(evidence, "shared", lambda *args: pytest.fail("a start was trained"))
    with pytest.raises(SystemExit) as stopped:
        idea.main(words.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1
    assert not (here / "runs").exists(), "nothing half-written"
