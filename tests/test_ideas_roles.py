"""the exact invariants of ideas in which a model teaches itself, calls, poses, reads its peers, or forgets"""
import importlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import algos
import data
import pack
from common import evidence, view
from data import formats
from ideas import collapse, debate, forgetting, gzero, sdpo, selfplay, tools, xent
from kernels import packed_attention
from rollout import Sample, completion, prompt_ids
from stages import Settings, close, collect, next_problems, setup, update


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(here):
    """a random tiny model on Countdown; a text of odd length is right"""
    made = setup(Settings(init=evidence.random_model("formats", here), steps=4, prompts=3, n=4, max_new=12,
                          lr=1e-2, warmup=1, decay=0.0, workers=1, threads=1, algo="grpo", aggregate="token",
                          problems=64), reward=evidence.easy_reward(here), longest=100)
    yield made
    close(made)


TOK = data.tokenizer("numbers")


def group_of(texts, rewards, problem=0):
    return [Sample([1], TOK.encode(text), [0.0] * len(TOK.encode(text)), "length", problem, i, 0, reward=r)
            for i, (text, r) in enumerate(zip(texts, rewards))]


def logits(model, tokens):
    """-> (T, V) in float64, of one sequence alone"""
    T = len(tokens)
    hidden_TD = model(torch.tensor(tokens), torch.arange(T), packed_attention([0, T], T))
    return hidden_TD.double() @ model.head_weight.double().t()


def gradient(rl, groups, loss):
    """-> the gradient of a sum over these groups, flat"""
    for p in rl.model.parameters():
        p.grad = None
    optimizer = rl.optimizer
    rl.optimizer = SimpleNamespace(finish_micro_batch=lambda: None)      # they stay where autograd puts them
    update(rl, groups, loss)
    rl.optimizer = optimizer
    rl.normaliser = 0.0
    found = torch.cat([p.grad.flatten().double() for p in rl.model.parameters()])
    for p in rl.model.parameters():
        p.grad = None
    return found


@pytest.mark.parametrize("name, words, said", [
    ("sdpo", "--task countdwn", "did you mean 'countdown'"),
    ("tools", "--turns 0", "--turns is 0: give at least 1"),
    ("collapse", "--init runs/base", "--init runs/base has no effect: this idea trains its own models"),
    ("selfplay", "--posed 9", "--posed 9: give a multiple of --n 8"),
    ("debate", "--task code", "--task code has no answer and no canon and no same: there is a vote"),
    ("forgetting", "--steps 15", "--steps 15: give a multiple of --every 10"),
    ("gzero", "--task arith", "--task arith has no solution: a hint is the first step of one"),
    ("xent", "--lessons 0", "--lessons is 0: give at least 1"),
])
def test_bad_input_is_one_line_before_anything_is_trained(name, words, said, here, capsys, monkeypatch):
    monkeypatch.setattr(evidence, "shared", lambda *args: pytest.fail("a start was trained"))
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"ideas.{name}").main(words.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1, error
    assert not (here / "runs").exists(), "nothing half-written"


# --- sdpo


def test_sdpo_reads_the_first_right_sibling_that_is_not_itself():
    """as in the picture of its file: with right ones at 1 and 3, sample 1 reads 3 and all others read 1; a
    single right one teaches the others and is left out; the control distils what has a wrong one too"""
    group = group_of("abcd", [0.0, 1.0, 0.0, 1.0])
    pairs = {shown.index: [s.index for s in samples] for samples, shown in sdpo.readers(group, "sdpo")}
    assert pairs == {1: [0, 2, 3], 3: [1]}
    pairs = {shown.index: [s.index for s in samples] for samples, shown in sdpo.readers(group, "wrong")}
    assert pairs == {2: [0], 0: [1, 2, 3]}
    single = {shown.index: [s.index for s in samples]
              for samples, shown in sdpo.readers(group_of("abc", [0.0, 1.0, 0.0]), "sdpo")}
    assert single == {1: [0, 2]}
    assert sdpo.readers(group_of("abc", [0.0] * 3), "sdpo") == []


def test_sdpo_gives_each_teacher_its_own_prompt():
    problem = data.Problem("C3 7 12=43:", id=5)
    group = group_of(["1", "12*3=36,36+7=43", "2", "7+3=10"], [0.0, 1.0, 0.0, 1.0], problem=5)
    parts, contexts = sdpo.lesson([group], [problem], "sdpo", TOK)
    assert {number: TOK.decode(ids) for number, ids in contexts.items()} == {
        5: "E12*3=36,36+7=43|C3 7 12=43:", -6: "E7+3=10|C3 7 12=43:"}
    assert [[(s.problem, s.index) for s in part] for part in parts] == [[(5, 0), (5, 2), (5, 3)], [(-6, 1)]]
    assert {s.advantage for part in parts for s in part} == {1.0}


def test_sdpo_weights_are_the_deviation_of_the_reward():
    groups = [group_of("abcd", rewards) for rewards in ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1])]
    weights = sdpo.question_weights(groups, "weighted")
    assert weights == pytest.approx(np.array([3**0.5 / 4, 0.5, 0]) / ((3**0.5 / 4 + 0.5) / 3))
    assert (sdpo.question_weights(groups, "sdpo") == 1).all()
    assert not sdpo.question_weights(groups[2:], "weighted").any()


def test_sdpo_is_zero_where_both_read_the_same(small):
    """the identity: a teacher that knows no more than the student teaches nothing"""
    groups = list(collect(small, next_problems(small, 3), 4))
    for s in (s for group in groups for s in group):
        s.advantage = 1.0
    loss = sdpo.make_loss(small.model, small.model, {})
    assert gradient(small, groups, loss).abs().max() < 1e-5
    shown = {g[0].problem: TOK.encode("E1+2=3|C1 2 3=3:") for g in groups}
    assert gradient(small, groups, sdpo.make_loss(small.model, small.model, shown)).abs().max() > 1e-3


def test_sdpo_is_the_divergence_of_the_two_in_float64(small):
    """value and gradient against a plain Jensen-Shannon divergence, position by position"""
    (group,) = collect(small, next_problems(small, 1), 1)
    s = group[0]
    s.advantage = 1.0
    read = TOK.encode("E12*3=36,36+7=43|C3 7 12=43:")
    value = 0
    known = logits(small.model, read + s.tokens)[len(read) - 1:-1].detach().log_softmax(-1)
    own = logits(small.model, s.prompt + s.tokens)[len(s.prompt) - 1:-1].log_softmax(-1)
    middle = ((own.exp() + known.exp()) / 2).log()
    for side in (own, known):
        value = value + 0.5 * (side.exp() * (side - middle)).sum()
    grads = torch.autograd.grad(value, [*small.model.parameters()])
    wanted = torch.cat([g.flatten().double() for g in grads])
    loss = sdpo.make_loss(small.model, small.model, {s.problem: read})
    assert torch.allclose(gradient(small, [group], loss), wanted, atol=1e-5)
    stats = update(small, [group], loss)
    assert stats["apart"] == pytest.approx(value.item(), rel=1e-4) and stats["tokens"] == len(s.tokens)


def test_sdpo_teacher_follows_slowly():
    old, new = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = old.weight.detach().clone()
    sdpo.follow(old.requires_grad_(False), new)
    assert torch.allclose(old.weight, 0.95 * before + 0.05 * new.weight)


# --- tools


def call(text, tok=TOK, finished="stop"):
    tokens = tok.encode(text)
    return Sample(tok.encode("T347*62="), tokens, [-1.0] * len(tokens), finished, 7, 2, 3)


def test_tools_asks_what_no_lesson_shows():
    asked, known = tools.questions(held_out=True), tools.questions(held_out=False)
    gold = {p.prompt: p.gold for p in known}
    assert len(asked) > 30 and len(known) > 5 * len(asked) and not {p.prompt for p in asked} & {*gold}
    turned = [tuple(p.prompt[1:-1].split("*")[::-1]) for p in asked]
    assert not {f"T{a}*{b}=" for a, b in turned} & {*gold}, "4*17 gives 17*4 away"
    rng = np.random.default_rng(0)
    lessons = [tools.lesson(i, rng, TOK) for i in range(2000)]
    texts = [(TOK.decode(s.prompt), TOK.decode(s.tokens)) for s in lessons]
    assert {prompt for prompt, _ in texts} <= {*gold}
    calls = [(prompt, text) for prompt, text in texts if "[" in text]
    assert all(text == f"[{prompt[1:-1]}]{gold[prompt]}#{gold[prompt]}{TOK.end}" for prompt, text in calls)
    guesses = [text == f"#{gold[prompt]}{TOK.end}" for prompt, text in texts if "[" not in text]
    assert len(calls) / len(texts) == pytest.approx(0.5, abs=0.05)
    assert np.mean(guesses) == pytest.approx(0.4, abs=0.06)


def test_tools_answers_rightly_or_with_another_number_of_as_many_digits():
    rng = np.random.default_rng(0)
    assert tools.reply("[347*62]", "right", rng) == "21514"
    assert tools.reply("[347*62]21514#[2*3]", "right", rng) == "6", "the last call counts"
    for text in ("[347*62", "347*62]", "[a*62]", "[347*62]21514"):
        assert tools.reply(text, "right", rng) is None and tools.reply(text, "lies", rng) is None
    said = {tools.reply("[3*3]", "lies", rng) for _ in range(200)}
    assert said == set("12345678"), "never the truth, never a leading zero"


def test_tools_words_are_forced_behind_the_very_ids_that_were_sampled():
    rl = SimpleNamespace(tok=TOK, config=SimpleNamespace(max_new=32))
    s = call("[347*62]")
    said = tools.answered(s, "right", rl, None)
    assert said.tokens[:len(s.tokens)] == s.tokens and TOK.decode(said.tokens) == "[347*62]21514"
    forced = np.isnan(said.logprobs)
    assert not forced[:len(s.tokens)].any() and forced[len(s.tokens):].all()
    assert (said.problem, said.index, said.visit) == (7, 2, 3)
    assert tools.answered(call("347*62=21514"), "right", rl, None) is None
    rl.config.max_new = len(said.tokens)
    assert tools.answered(s, "right", rl, None) is None, "no room for an answer to the answer"


def test_tools_row_of_all_turns_is_the_sum_of_its_turns(small):
    """turns share their prefix in one row: the gradient is that of each turn as a response to all before
    it, and the tool's words add nothing, whatever they are"""
    tok = small.tok
    first, said, last = tok.encode("[3*4]"), tok.encode("12"), tok.encode("#12")
    prompt = tok.encode("T3*4=")
    logprobs = [-1.0] * len(first) + [math.nan] * len(said) + [-1.0] * len(last)
    whole = Sample(prompt, first + said + last, logprobs, "stop", 0, 0, 0, advantage=0.7)
    turns = [Sample(prompt, first, [-1.0] * len(first), "stop", 0, 0, 0, advantage=0.7),
             Sample(prompt + first + said, last, [-1.0] * len(last), "stop", 0, 1, 0, advantage=0.7)]
    loss = algos.make_loss(replace(small.config, tis=0.0))
    together = gradient(small, [[whole]], loss)
    assert torch.allclose(together, gradient(small, [turns], loss), atol=1e-5)
    assert torch.allclose(together, gradient(small, [[t] for t in turns], loss), atol=1e-5)
    row = pack.rows(pack.alone(whole))
    assert row.targets_N.tolist() == first + last


class Script:
    """in the place of stages.collect: every text that it is asked to continue has its next turn written"""

    def __init__(self, turns, tok):
        self.turns, self.tok = turns, tok
        self.asked = []

    def __call__(self, rl, problems, n, resume=None, stop_strings=(), **given):
        self.asked.append({id: len(found) for id, found in (resume or {}).items()})
        for p in problems:
            before = (resume or {}).get(p.id) or [call("") for _ in range(n)]
            group = []
            for j, s in enumerate(before):
                more = self.tok.encode(self.turns(p.id, self.tok.decode(s.tokens)))
                group.append(replace(s, tokens=s.tokens + more, logprobs=s.logprobs + [-1.0] * len(more),
                                     problem=p.id, index=j, visit=len(self.asked)))
            yield group


def test_tools_plays_as_many_turns_as_are_allowed(monkeypatch):
    """problem 0 answers at once, 1 calls and answers, 2 calls for ever; each talk keeps the address of its
    first turn"""
    def turns(id, text):
        if id == 0 or (id == 1 and text):
            return "#12"
        return "[3*4]"
    script = Script(turns, TOK)
    monkeypatch.setattr(tools, "collect", script)
    rl = SimpleNamespace(tok=TOK, config=SimpleNamespace(max_new=99))
    groups = tools.play(rl, [data.Problem("T3*4=", id=i) for i in range(3)], 2, "right", 2, None)
    texts = {id: {completion(s, TOK) for s in group} for id, group in groups.items()}
    assert texts == {0: {"#12"}, 1: {"[3*4]12#12"}, 2: {"[3*4]12[3*4]12[3*4]"}}
    assert [asked for asked in script.asked if asked] == [{1: 2, 2: 2}, {2: 2}]
    assert [(s.index, s.visit) for group in groups.values() for s in group] == [(0, 1), (1, 1)] * 3
    script.asked.clear()
    alone = tools.play(rl, [data.Problem("T3*4=", id=2)], 2, "none", 2, None)
    assert script.asked == [{}] and completion(alone[2][0], TOK) == "[3*4]", "without a tool nothing answers"


def test_tools_samples_are_noise_of_their_own_and_resumed_exactly(small):
    """the real sampler: a forced word is in the text, the log-probs around it are those of the model"""
    problems = next_problems(small, 2)
    first = {g[0].problem: g for g in collect(small, problems, 2, reward=False, max_new=4)}
    words = small.tok.encode("12")
    nan = [math.nan] * len(words)
    resume = {id: [replace(s, tokens=s.tokens + words, logprobs=s.logprobs + nan, kept=None) for s in group]
              for id, group in first.items()}
    for group in collect(small, problems, 2, resume=resume, reward=False):
        for s in group:
            begun = resume[s.problem][s.index].tokens
            assert s.tokens[:len(begun)] == begun and len(s.tokens) > len(begun)
            known = logits(small.model, s.prompt + s.tokens)[len(s.prompt) - 1:-1].log_softmax(-1)
            own = known[range(len(s.tokens)), s.tokens].detach().numpy()
            forced = np.isnan(s.logprobs)
            assert forced.sum() == len(words)
            assert np.allclose(own[~forced], np.array(s.logprobs)[~forced], atol=1e-4)


def test_the_page_of_samples_draws_forced_words_apart(here):
    """a tool's words have no log-prob; nan is no JSON, and the page could read none of its rows"""
    s = call("[347*62]21514#21514")
    s.logprobs[-1] = math.nan
    rl = SimpleNamespace(problems=[data.Problem("T347*62=", id=7)], step=1, tok=TOK)
    tools.write_down(rl, [[s]], "right", here)
    page = view.samples(here).read_text()
    rows = json.loads(page.split('id="rows">')[1].split("</script>")[0])["rows"]
    assert rows[0]["logprobs"][-1] is None and rows[0]["prompt"] == "right: T347*62="
    assert '"forced"' in page and "underline" in page


# --- collapse


def test_collapse_verifiers():
    rng = np.random.default_rng(0)
    assert collapse.keeps(True, None, rng) and collapse.keeps(False, None, rng), "no verifier keeps all"
    assert collapse.keeps(True, 0.0, rng) and not collapse.keeps(False, 0.0, rng)
    kept = {right: np.mean([collapse.keeps(right, 0.2, rng) for _ in range(4000)]) for right in (True, False)}
    assert kept[True] == pytest.approx(0.8, abs=0.03) and kept[False] == pytest.approx(0.2, abs=0.03)


def test_collapse_proxy_by_hand():
    """p f / (p f + (1 - p) g): six right of ten and a verifier wrong once in five keep 0.48 and 0.08; the
    breakdown point of one half is where as many right ones are kept as wrong ones; a coin changes nothing"""
    assert collapse.share_kept_right(0.6, 0.2) == pytest.approx(0.48 / 0.56)
    assert collapse.share_kept_right(0.2, 0.2) == pytest.approx(0.5)
    for p in (0.1, 0.6):
        assert collapse.share_kept_right(p, 0.5) == collapse.share_kept_right(p, None) == pytest.approx(p)
        assert collapse.share_kept_right(p, 0.0) == 1.0
    assert collapse.share_kept_right(0.0, 0.0) == 0.0


def test_collapse_learns_from_answers_alone():
    """the question is read and not learned, and the answers come in turn"""
    document = SimpleNamespace(config=SimpleNamespace(row_tokens=4096), tok=TOK)
    samples = group_of(["12", "3"], [1, 0])
    read = collapse.corpus(samples, document)
    tokens, trained = read("train", 2)
    assert tokens == samples[0].prompt + samples[0].tokens
    assert trained == [False] + [True] * len(samples[0].tokens)
    assert read("train", 3)[0] == samples[1].prompt + samples[1].tokens


def test_collapse_keeps_what_a_perfect_verifier_lets_through(monkeypatch):
    """and asks more problems until there are enough, but no more than there are"""
    def answers(sampler, tok, rewards, problems, *given):
        return ({p.id: group_of(["12"], [0], problem=p.id) for p in problems},
                {(p.id, 0): float(p.id % 3 == 0) for p in problems})
    monkeypatch.setattr(collapse, "sample_and_score", answers)
    monkeypatch.setattr(collapse, "CHUNK", 6)
    problems = [data.Problem("", id=i) for i in range(30)]
    config = SimpleNamespace(texts=3)
    rng = np.random.default_rng(0)
    kept, share = collapse.written((None, None, None), problems, 0.0, config, rng, 0)
    assert [s.problem for s in kept] == [0, 3, 6] and share == pytest.approx(1 / 3)
    kept, share = collapse.written((None, None, None), problems, None, config, rng, 0)
    assert [s.problem for s in kept] == [0, 1, 2], "no verifier: the first ones, right or wrong"
    config.texts = 99
    assert len(collapse.written((None, None, None), problems, 0.0, config, rng, 0)[0]) == 10


# --- selfplay


def posing(monkeypatch, texts):
    """what the poser wrote, and a solver that is right as often as `rates` says of the target"""
    ends = TOK.encode(TOK.end)
    group = [Sample(TOK.encode("Q"), TOK.encode(text) + ends, [-1.0] * (len(TOK.encode(text)) + 1), "stop",
                    selfplay.POSER, i, 0) for i, text in enumerate(texts)]
    rates = {}

    def collected(rl, problems, n, reward=True):
        for p in problems:
            if p.id == selfplay.POSER:
                yield group
            else:
                right = rates.get(p.data["target"], 0) if p.data else 0
                yield [replace(s, problem=p.id, index=j, reward=float(j < right * n))
                       for j, s in enumerate([group[0]] * n)]
    monkeypatch.setattr(selfplay, "collect", collected)
    given = [data.Problem("", id=i) for i in range(99)]
    monkeypatch.setattr(selfplay, "next_problems", lambda rl, count: given[:count])
    return rates


def free_targets(count):
    """-> posed texts of the train split, and one that belongs to the test split"""
    train, test = [], []
    for target in range(1, 99):
        text = f"3 7 12={target}"
        split = data.split_of(f"countdown [3, 7, 12] {target}")
        train += [text] * (split == "train")
        test += [text] * (split == "test")
    return train[:count], test[0]


def test_selfplay_never_poses_what_is_held_out(monkeypatch):
    train, test = free_targets(2)
    posing(monkeypatch, [train[0], test, "3 7=10", "3 7 12", train[0], train[1]])
    rl = SimpleNamespace(tok=TOK)
    texts, found = selfplay.pose(rl, 6, 3)
    assert len(texts) == 6 and [p.prompt for p, _ in found.values()] == [f"C{t}:" for t in train]
    assert [*found] == [selfplay.POSER + 1 + 18, selfplay.POSER + 2 + 18], "numbers that no round shares"
    assert [s.index for _, s in found.values()] == [0, 5], "twice the same counts once"


@pytest.mark.parametrize("arm, paid", [("selfplay", [0, 1, 0, 0]), ("any", [0, 1, 1, 1])])
def test_selfplay_pays_for_what_is_barely_solved(monkeypatch, arm, paid):
    """never, 1 of 8, 3 of 8, always"""
    train, _ = free_targets(4)
    rates = posing(monkeypatch, train)
    rates |= {int(text.split("=")[1]): rate for text, rate in zip(train, (0, 1 / 8, 3 / 8, 1))}
    config = SimpleNamespace(posed=8, n=8, prompts=10)
    *groups, texts = selfplay.play(SimpleNamespace(tok=TOK), arm, 0, config)
    assert [s.advantage for s in texts] == paid
    assert len(groups) == config.prompts - config.posed // config.n, "posing is paid for by problems"
    assert sum(len(g) for g in groups) + config.posed == config.prompts * config.n, "as many samples"
    for group in groups:
        assert [s.advantage for s in group] == [float(s.reward > 0.5) for s in group]
    counted = [selfplay.counts(r, "selfplay") for r in (0, 0.125, 0.25, 0.26, 1)]
    assert counted == [False, True, True, False, False]


def test_selfplay_asks_hard_problems_of_the_test_split():
    task = data.load("countdown")
    found = selfplay.hard(task, 20, 0)
    assert len(found) >= 15 and all(p.data["target"] >= selfplay.HARD for p in found)
    keys = [f"countdown {sorted(p.data['numbers'])} {p.data['target']}" for p in found]
    assert {data.split_of(key) for key in keys} == {"test"}


@pytest.mark.parametrize("idea, kinds, letters", [
    (selfplay, ("posed", "plain"), "QC"), (debate, ("plain", "peers", "peers", "peers"), "CDDD")])
def test_lessons_are_texts_of_the_train_split_each_once(idea, kinds, letters):
    """every step has others, the same for any arm; the stop token is imitated, too"""
    tasks = [data.load(f"formats:{kind}") for kind in kinds]
    first, second = (idea.lesson(tasks, number, 0, TOK) for number in (0, 1))
    assert first == idea.lesson(tasks, 0, 0, TOK) != second
    for i, (s,) in enumerate(first):
        assert TOK.decode(s.prompt)[0] == letters[i % len(letters)] and s.tokens[-1:] == TOK.encode(TOK.end)
        assert (TOK.decode(s.prompt), completion(s, TOK)) == tasks[i % len(tasks)].document("train", 0, i)
        assert s.advantage == 1 and len(s.logprobs) == len(s.tokens)
    assert len({s.problem for (s,) in first}) == len(first), "each has an address of its own"


# --- debate


def test_debate_readers_see_the_three_others():
    problem = data.Problem("C3 7 12=43:", id=4, data={"target": 43})
    read = debate.readers(problem, ["a", "b", "c", "d"])
    assert [p.prompt for p in read] == ["Db;c;d|C3 7 12=43:", "Da;c;d|C3 7 12=43:", "Da;b;d|C3 7 12=43:",
                                        "Da;b;c|C3 7 12=43:"]
    assert [p.id - debate.READER for p in read] == [16, 17, 18, 19]
    assert all(p.data == problem.data for p in read)


def test_debate_two_rounds(small):
    """the answers that are read are those of the first round, of a stranger's in the control; every sample
    has an address of its own"""
    problems = next_problems(small, 3)
    for strangers in (False, True):
        found = debate.debate(small, problems, strangers)
        ids = [p.id for p in problems]
        source = dict(zip(ids, ids[1:] + ids[:1])) if strangers else dict(zip(ids, ids))
        for p in problems:
            first, second = found[p.id]
            texts = [completion(s, small.tok) for s in found[source[p.id]][0]]
            read = [prompt_ids(q, small.tok) for q in debate.readers(p, texts)]
            assert [s.prompt for s in second] == read
            assert all(math.isfinite(s.reward) for s in first + second)
        samples = [s for pair in found.values() for four in pair for s in four]
        assert len({(s.problem, s.visit, s.index) for s in samples}) == len(samples) == 24
    again = [debate.debate(small, problems, seed=5) for _ in range(2)]
    assert [[s.tokens for s in second] for _, second in again[0].values()] == \
        [[s.tokens for s in second] for _, second in again[1].values()], "an evaluation repeats its noise"


# --- forgetting


def test_forgetting_reads_paths_at_equal_accuracy():
    slow = [(0.3, 0.9), (0.4, 0.8), (0.6, 0.5)]
    fast = [(0.3, 0.9), (0.5, 0.85), (0.45, 0.7)]
    assert forgetting.common_accuracy([slow, fast]) == 0.5
    assert forgetting.at_accuracy(slow, 0.5) == pytest.approx(0.65)
    assert forgetting.at_accuracy(fast, 0.5) == pytest.approx(0.85)
    assert forgetting.at_accuracy(slow, 0.3) == pytest.approx(0.9), "the start itself"
    assert forgetting.at_accuracy(slow, 0.9) == 0.5, "never reached: the end"


def test_forgetting_parabola_is_exact_on_one():
    kls = np.array([0.0, 0.1, 0.2, 0.4, 0.7])
    assert forgetting.parabola(kls, 2 * kls + 3 * kls**2) == pytest.approx(1.0)
    assert forgetting.parabola(kls, np.array([0.0, 0.3, 0.0, 0.3, 0.0])) < 0.5
    assert forgetting.parabola(kls, 0 * kls) == 0.0


def test_forgetting_measures_the_forward_kl(small):
    """zero while nothing was learned; after a move, the mean of log start - log now over the start's own
    tokens, in float64"""
    probes = list(collect(small, next_problems(small, 3), 4, reward=False, seed=1))
    assert abs(forgetting.kl_from_start(small, probes)) < 1e-5
    with torch.no_grad():
        for p in small.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    known = []
    for s in (s for group in probes for s in group):
        now = logits(small.model, s.prompt + s.tokens)[len(s.prompt) - 1:-1].log_softmax(-1)
        known += [x - now[i, t].item() for i, (x, t) in enumerate(zip(s.logprobs, s.tokens))]
    assert forgetting.kl_from_start(small, probes) == pytest.approx(np.mean(known), abs=1e-5)


# --- gzero


def test_gzero_pulls_with_the_gradient_of_dpo(small):
    """the policy gradient of its advantages, twice, is that of -log sigmoid(beta m) averaged over pairs, m
    from means per token, in float64 by autograd"""
    problems = next_problems(small, 2)
    groups = sorted(collect(small, problems, 2, reward=False), key=lambda g: g[0].problem)
    pairs = [(g[0], g[1]) for g in groups]
    started = gzero.mean_logp(small, [s for pair in pairs for s in pair]).reshape(-1, 2)
    started = started - [[0.3, -0.2], [0, 0.4]]
    value = 0
    for pair, begun in zip(pairs, started):
        means = []
        for s in pair:
            known = logits(small.model, s.prompt + s.tokens)[len(s.prompt) - 1:-1].log_softmax(-1)
            means.append(known[range(len(s.tokens)), s.tokens].mean())
        margin = (means[0] - begun[0]) - (means[1] - begun[1])
        value = value - torch.nn.functional.logsigmoid(gzero.BETA * margin) / len(pairs)
    grads = torch.autograd.grad(value, [*small.model.parameters()])
    wanted = torch.cat([g.flatten().double() for g in grads])
    small.config = replace(small.config, aggregate="sequence", tis=0.0)
    pulled = gzero.prefer(small, pairs, started)
    found = gradient(small, pulled, algos.make_loss(small.config)) / 4       # a mean over four responses
    assert torch.allclose(2 * found, wanted, atol=1e-5)


def test_gzero_delta_by_hand(small):
    """what a hint makes of an answer's log-probs, per token"""
    problems = [replace(p, gold="1+2=3,3+4=7") for p in next_problems(small, 2)]
    answers = [g[0] for g in sorted(collect(small, problems, 1, reward=False), key=lambda g: g[0].problem)]
    problems.sort(key=lambda p: p.id)
    wanted = []
    for p, s in zip(problems, answers):
        behind = small.tok.encode(formats.hint(p.prompt, "1+2=3"))
        means = []
        for prompt in (s.prompt, behind):
            known = logits(small.model, prompt + s.tokens)[len(prompt) - 1:-1].log_softmax(-1)
            means.append(known[range(len(s.tokens)), s.tokens].mean().item())
        wanted.append(means[0] - means[1])
    assert gzero.deltas(small, answers, gzero.hinted(problems)) == pytest.approx(wanted, abs=1e-5)


def test_gzero_keeps_the_lower_half():
    delta = np.array([0.5, -1.0, 2.0, 0.1])
    assert sorted(gzero.chosen_half(delta, "dpo")) == [1, 3]
    assert sorted(gzero.chosen_half(delta, "upper")) == [0, 2]
    problems = [data.Problem("C1 2=3:", gold="1+2=3,9", id=0), data.Problem("C4 5=9:", gold="4+5=9,1", id=1)]
    assert [p.prompt for p in gzero.hinted(problems)] == ["H1+2=3|C1 2=3:", "H4+5=9|C4 5=9:"]
    assert [p.prompt for p in gzero.hinted(problems, "stranger")] == ["H4+5=9|C1 2=3:", "H1+2=3|C4 5=9:"]


def test_gzero_judges_a_pair_by_the_hint_that_was_shown(small, monkeypatch):
    """a stranger's hint once was another one for delta than for the sampler: the problems were sorted in
    between"""
    collect, deltas = gzero.collect, gzero.deltas
    shown = {}
    judged = []

    def watched_collect(rl, problems, n, **more):
        shown.update({p.id: p.prompt for p in problems if "|" in p.prompt})
        return collect(rl, problems, n, **more)

    def watched_deltas(rl, answers, hints):
        judged.extend((s.problem, p.prompt) for s, p in zip(answers, hints))
        return deltas(rl, answers, hints)
    monkeypatch.setattr(gzero, "collect", watched_collect)
    monkeypatch.setattr(gzero, "deltas", watched_deltas)
    assert len(gzero.make_pairs(small, "stranger", SimpleNamespace(steps=1, prompts=5))) >= 5
    assert judged and all(shown[id] == prompt for id, prompt in judged)


def test_gzero_ranks():
    assert gzero.ranks([3, 1, 1, 5]).tolist() == [2, 0.5, 0.5, 3]
    assert gzero.rank_correlation([1, 2, 30], [0.1, 0.2, 0.3]) == pytest.approx(1)
    assert gzero.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert gzero.rank_correlation([1, 1, 1], [3, 2, 1]) == 0.0


# --- xent


TEXT = "12*3=36,36+7=43"


def test_nats_of_a_text_behind_its_prompt(small):
    """against plain log-softmax in float64, texts of different lengths in one call"""
    prompts = [TOK.encode(x) for x in ("C3 7 12=43:", "C9 1=8:", ":")]
    texts = [TOK.encode(s) for s in (TEXT, "9-1=8", TEXT)]
    found = xent.xents(small, small.model, prompts, texts)
    for x, s, nats in zip(prompts, texts, found):
        logp = logits(small.model, x + s).detach().log_softmax(-1)
        by_hand = -sum(float(logp[len(x) + t - 1, token]) for t, token in enumerate(s))
        assert nats == pytest.approx(by_hand, rel=1e-5)
    saved = xent.xed(small, small.model, [*prompts[:2], []], texts)
    assert saved[2] == 0, "a prompt that says nothing saves nothing, and an empty one is that prompt"
    assert saved[0] == pytest.approx(found[2] - found[0], rel=1e-5)


@pytest.mark.parametrize("prompt, left", [
    ("C3 12 7=43:", "C3 12 7=43:"),                              # honest: three tokens in a row at most
    (f"E{TEXT}|C3 7 12=43:", "E|C3 7 12=43:"),
    ("H12*3=36|C9:", "H|C9:"),
    ("12*3=12*3", "12*3"),
    ("12*3", "12*3"),
    (TEXT, ""),
    ("", ""),
])
def test_what_a_prompt_shares_with_its_text_is_removed(prompt, left):
    assert TOK.decode(xent.without_shared(TOK.encode(prompt), TOK.encode(TEXT))) == left


def test_the_rule_leaves_honest_prompts_whole():
    """with three tokens a prompt whose last number is the last operand, 7=43, would lose its end"""
    task = data.load("countdown")
    for p in task.problems("valid", 200, 0):
        x = TOK.encode(p.prompt)
        assert xent.without_shared(x, TOK.encode(p.gold)) == x and xent.is_right(p.prompt, p.gold, task)


def test_a_prompt_is_right_if_the_text_solves_it():
    task = data.load("countdown")
    for prompt, right in (("C3 7 12=43:", True), ("C12 7 3=43:", True), (f"E{TEXT}|C3 7 12=43:", True),
                          ("C3 7 12=42:", False), ("C3 7 11=43:", False), ("C3 7 12 1=43:", False),
                          (f"E{TEXT}|C9 1 20=5:", False), (TEXT, False), ("C3 7 12=43", False), ("", False)):
        assert xent.is_right(prompt, TEXT, task) is right, prompt


def test_prompts_are_paid_by_the_rule_of_each_arm(small):
    """honest prompts are paid alike with and without the rule, a copy is not; "other": by the next text"""
    texts = {4: TOK.encode(TEXT), 9: TOK.encode("9-1=8")}

    def paid(arm):
        groups = [[Sample([1], TOK.encode(x) + [0], [], "stop", id, 0, 0)]
                  for id, x in ((4, "C3 7 12=43:"), (4, f"E{TEXT}|C9:"), (9, "C9 1=8:"))]
        xent.pay(arm, small, small.model, groups, texts)
        return [group[0].reward for group in groups]

    free, held, other = map(paid, xent.ARMS[1:])
    assert held[0] == pytest.approx(free[0], rel=1e-5) and held[2] == pytest.approx(free[2], rel=1e-5)
    assert held[1] != pytest.approx(free[1], rel=1e-3)
    cut = TOK.encode("E|C9:")
    assert held[1] == pytest.approx(xent.xed(small, small.model, [cut], [texts[4]])[0], rel=1e-4)
    crossed = xent.xed(small, small.model, [TOK.encode("C3 7 12=43:"), TOK.encode("C9 1=8:")],
                       [texts[9], texts[4]])
    assert [other[0], other[2]] == pytest.approx([*crossed], rel=1e-4)


def test_a_quarter_of_what_lessons_show_belongs_to_the_text():
    """problem and solution each for itself, so that a start is no more honest than it copies"""
    task = data.load("countdown")
    own = {"C": [], "E": [], "copied": []}
    for number in range(10):
        for (s,) in xent.lesson(task, number, 0, TOK):
            text, prompt = TOK.decode(s.prompt)[1:-1], completion(s, TOK)
            assert xent.ASKED.search(prompt)
            own[prompt[0]].append(xent.is_right(prompt, text, task))
            if prompt[0] == "E":
                own["copied"].append(prompt.startswith(f"E{text}|"))
    assert len(own["C"]) == len(own["E"]) == 320
    assert all(0.18 < np.mean(kind) < 0.32 for kind in own.values())
    assert abs(np.corrcoef(own["E"], own["copied"])[0, 1]) < 0.2
