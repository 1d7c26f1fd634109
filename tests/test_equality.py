r"""
our equality of answers against math-verify's, on pairs of real answers: the answer of a real
question, and what a model might write for it

    # pairs, seeds: recall, precision, every disagreement
    NANORL_DATA=/data python tests/test_equality.py 2000 21 22 23

math-verify alone says which pairs are equal: half are, though written differently (spaces aside),
half are not. It is called as its manual asks: the question's answer first, as LaTeX between
dollars, then the other one in a box. The other writing comes from four places:
- another real answer that the judge calls equal: people write .5, 0.5, 1:2 and \frac12;
- a list of habits (`habit`): what people and models do to an answer when they write it once more;
- sympy, which knows nothing of our rules: the judge's own tree, rearranged and printed
  (`rearranged`);
- slips of the pen and of the head (`slip`), for the half that is not equal.
A place may miss what it means to make; the judge's word counts, and the figures without such pairs
are printed beside those of all.

Left out is what the judge cannot read in a question's answer (0.3% of the real ones: there it has
no verdict), and what nobody writes: a full stop or \( \) inside the box (they stand around it),
Python's constructors (Interval(1, 2)), letters whose case was lost (the judge reads 2R as 2r),
digits of a thousand in another order, a fraction over a pair of coordinates. records/equality.md
has the disagreements of three seeds by class.
"""
import json
import logging
import os
import random
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import answers  # noqa: E402
from data.answers import same  # noqa: E402

REAL = os.environ.get("NANORL_DATA")
PATIENCE = 20            # seconds; a judge that is hurried says no
# one expression, no words
VALUE = re.compile(r"(?!.*\\(?:text|mbox|circ|approx|begin))[^=<>,;{}\[\]≤≥\\%_]*(?:[\\{}][^=<>,;≤≥%_]*)*")


# --------------------------------------------------------------------------------------------------
# real answers

def real_answers(root):
    """(answers of the row distribution, distinct answers that are no plain integers)"""
    root = Path(root)
    found = [row["answer"] for file in ("math/MATH_train.json", "ttrl/MATH-TTT.json",
                                        "ttrl/AMC-TTT.json", "ttrl/AIME-TTT.json")
             for row in json.loads((root / file).read_text())]
    for file in ("gsm8k/train.jsonl", "gsm8k/test.jsonl"):
        found += [json.loads(line)["answer"].rpartition("####")[2].strip()
                  for line in (root / file).read_text().splitlines()]
    found = [answer for answer in found if answer]
    return found, sorted({answer for answer in found if not re.fullmatch(r"-?\d+", answer)})


def bare(text):
    return "".join(text.split())


def is_value(gold):
    return bool(VALUE.fullmatch(gold)) and not re.search(r"le|ge|cup|in\b|^\\?[({\[].*,", gold)


def items_of(gold):
    """of a plain list 1, -2, x+3; [] where the commas are something else"""
    if re.search(r"[(\[\]=]|\\\{|\d,\d{3}|,\s*\\!|text|mbox|begin", gold):
        return []
    items = [item.strip() for item in gold.split(",")]
    return items if len(items) > 1 else []


# --------------------------------------------------------------------------------------------------
# the same, written differently

UNITS = ("cm", "units", "inches", "square units", "dollars", "meters", "hours")
UNIT = re.compile(r"(?:\\\$)?\s*(\\%|\^\{?\\circ\}?|\s*\\(?:text|mbox)\s*\{[^{}]*\}(\^\{?\d\}?)?)?")
NUMBER = re.compile(r"(?:\\\$)?(-?[\d.,\\!]+|-?\\[dt]?frac\{\d+\}\{\d+\})")
FRACTION = re.compile(r"(?<![\d}] )(?<![\d}])\\[dt]?frac\s*\{?(-?\d+?)\}?\s*\{?(\d+)\}?(?!\})")
PAIR = re.compile(r"(?:\\left)?([(\[])([^,()\[\]]+),([^,()\[\]]+?)(?:\\right)?([)\]])")


def habit(gold, rng):
    """another spelling, by a person or a model in another mood"""
    glued = "text" in gold or re.search(r"\\[a-zA-Z]+ +[a-zA-Z]", gold)
    options = [gold.replace("\\left", "").replace("\\right", ""),
               re.sub(r"(?<!\\left)([(\[])(.*?)(?<!\\right)([)\]])", r"\\left\1\2\\right\3", gold),
               gold if glued else bare(gold), re.sub(r"(?<=[\w})])\s*([+-])\s*(?=[\w\\({])", r" \1 ", gold),
               gold.replace(",", ", "), re.sub(r"\\[dt]frac", r"\\frac", gold),
               re.sub(r"\\[dt]?frac", r"\\dfrac", gold), re.sub(r"\\[dt]?frac", r"\\tfrac", gold),
               re.sub(r"\\text(?=\s*\{(?! ?(?:and|or)\b))", r"\\mathrm", gold),
               re.sub(r"^\\text(?=\{[^{}]*\}$)", r"\\textbf", gold), f"\\displaystyle {gold}",
               re.sub(r"(\d)\s*\\pi", r"\1 \\cdot \\pi", gold),
               re.sub(r"(\d)\s*\\sqrt", r"\1 \\cdot \\sqrt", gold),
               re.sub(r"(\d)\s*\\sqrt", r"\1 \\times \\sqrt", gold),
               re.sub(r"\\sqrt\{(\w)\}", r"\\sqrt\1", gold),
               re.sub(r"(?<!\])\\sqrt\{([^{}]*)\}", r"(\1)^{1/2}", gold),
               re.sub(r"(?<!\^)\^(\d)(?!\d)", r"^{\1}", gold), gold.replace("pmatrix", "bmatrix"),
               gold.replace("\\infty", "+\\infty").replace("-+", "-"), gold.replace("\\!", ""),
               gold.replace(",\\!", ""), gold.replace(",\\!", "{,}"), gold.replace("\\cup", " \\cup "),
               gold.replace("\\le ", "\\leq "), re.sub(r"^\\text\{\(?([^{}()]*)\)?\}$", r"\1", gold),
               re.sub(r"^\\text\{\(([A-F])\)\}$", r"\\textbf{(\1)}", gold),
               re.sub(r"^\\text\{([A-Z]?[a-z' -]+)\}$", lambda m: m[1].lower(), gold)]
    number = NUMBER.match(gold)
    # the unit left out, or written another way
    if number and number[1] != gold and UNIT.fullmatch(gold[number.end():]):
        options += [number[1]] * 3
        options += [number[1] + other for other in ("\\text{ degrees}", " degrees",
                                                    "^{\\circ}", "°")] * ("circ" in gold)
        options += [number[1] + other for other in ("%", "\\text{ percent}")] * ("\\%" in gold)
    if is_value(gold):
        options += [f"{rng.choice('xyknr')} = {gold}", f"{gold}\\text{{ {rng.choice(UNITS)}}}"]
        options += ([f"{gold} {rng.choice(UNITS)}", f"{gold} \\, \\text{{cm}}^2"]
                    * bool(re.fullmatch(r"[\d.,]+", gold)))
        options += [f"\\left({gold}\\right)"] * bool(re.search(r"[a-z] *[+-]", gold))
    if re.fullmatch(r"-?\d+", gold):
        n, k = int(gold), rng.randint(2, 9)
        options += [f"{n}.0", f"{n}.00", f"\\${n}", f"\\${n:,}.00", f"{n}\\%",
                    f"{n}^\\circ", f"\\frac{{{n * k}}}{{{k}}}", f"{n * k}/{k}", f"\\text{{{n}}}",
                    f"{n - k}+{k}", f"\\boxed{{{n}}}", f"\\mathbf{{{n}}}", f"{n:03}"]
        options += [f"{n:,}".replace(",", comma) for comma in (",", ",\\!", "{,}", "\\,")]
        options += ([f"+{n}", f"\\sqrt{{{n * n}}}"] * (n >= 0)
                    + [f"{n / 1000:g} \\times 10^{{3}}"] * (n % 1000 == 0))
    for fraction in list(FRACTION.finditer(gold))[:1]:
        a, b, k = int(fraction[1]), int(fraction[2]), rng.randint(2, 9)
        if not b:
            continue
        q, whole = b, fraction[0] == gold.lstrip("- ")
        for p in (2, 5):
            while q % p == 0:
                q //= p
        other = [f"\\frac{{{a * k}}}{{{b * k}}}"] + [f"\\frac{{{a}}}{b}"] * (b < 10)
        other += [f"{a}/{b}", f"({a})/({b})", f"{a} \\div {b}", f"\\frac{{{-a}}}{{{-b}}}",
                  f"{a} / {b}"] if whole else [f"({a}/{b})"]
        other += [f"{a / b:.12g}"] * 3 if q == 1 else [f"{a / b:.{rng.randint(6, 9)}f}"]
        if abs(a) > b and whole and abs(a) % b:
            mixed = f"{'-' * (a < 0)}{abs(a) // b}", abs(a) % b, b
            other += ["{}\\frac{{{}}}{{{}}}".format(*mixed), "{} {}/{}".format(*mixed)]
        options += [gold.replace(fraction[0], new, 1) for new in other]
        options += [f"\\frac{{-{a}}}{{{b}}}",
                    f"\\frac{{{a}}}{{-{b}}}"] * (gold.startswith("-") and whole and a > 0)
    if items := items_of(gold):
        rng.shuffle(items)
        name = rng.choice("xyn")
        named = [f"{name} = {item}" for item in items]
        options += [", ".join(items), "\\{" + ", ".join(items) + "\\}",
                    " \\text{ and } ".join(items), ",".join(items),
                    f"{name} = " + ", ".join(items), ", ".join(named), " \\text{ or } ".join(named)] * 2
    if match := PAIR.fullmatch(gold):
        if "[" in gold or "]" in gold or "infty" in gold:
            options += [f"x \\in {gold}"] * 2
            if "infty" not in gold:
                left, right = ("<" if match[1] == "(" else rng.choice(["≤", "\\le", "\\leq"]),
                               "<" if match[4] == ")" else "\\le")
                options.append(f"{match[2]} {left} x {right} {match[3]}")
        else:
            options += [f"(x, y) = {gold}", f"(x,y)={gold}"]
    options = [option for option in dict.fromkeys(options) if bare(option) != bare(gold) and option]
    return rng.choice(options) if options else None


def rearranged(gold, tree, rng):
    """another form of the same expression, found and printed by a computer algebra system that
    knows nothing of ours"""
    import sympy
    if "circ" in gold or "%" in gold:                                # the tree has lost them
        return None
    letters = {s: sympy.Symbol(s.name.upper(), real=s.is_real)
               for s in tree.free_symbols if s.name not in gold and s.name.upper() in gold}
    tree = tree.subs(letters)
    if any(s.name not in gold for s in tree.free_symbols):           # a word
        return None
    printers = [lambda t: sympy.latex(t), lambda t: sympy.latex(t, order="rev-lex"),
                lambda t: sympy.latex(t, mul_symbol="dot"), lambda t: sympy.latex(t, fold_short_frac=True),
                lambda t: sympy.latex(t, root_notation=False)]
    if isinstance(tree, sympy.Eq):
        k, zero = rng.randint(2, 5), sympy.expand(tree.lhs - tree.rhs)
        sides = rng.choice([(tree.lhs, tree.rhs), (tree.rhs, tree.lhs),
                            (zero, 0), (-zero, 0), (tree.lhs, sympy.factor(tree.rhs)),
                            (sympy.expand(k * tree.lhs), sympy.expand(k * tree.rhs))])
        tree = sympy.Eq(*sides, evaluate=False)
    changes = [lambda t: t]
    if isinstance(tree, sympy.Expr):
        changes += [sympy.expand, sympy.factor, sympy.together, sympy.radsimp, sympy.simplify, sympy.cancel]
        printers.append(lambda t: str(t).replace("**", "^"))
    try:
        printed = rng.choice(printers)(rng.choice(changes)(tree))
    # it cannot do everything
    except (TypeError, ValueError, AttributeError, NotImplementedError, sympy.PolynomialError):
        return None
    return re.sub(r"(?<=\d) (?=[a-zA-Z])", "", printed)


# --------------------------------------------------------------------------------------------------
# not the same

def slip(gold, rng, rows):
    """what a wrong computation or a slip of the pen would have given"""
    digits = list(re.finditer(r"(?<!_)(?<!_\{)(?<![\d.])\d+", gold))
    options = [rng.choice(rows), gold.replace("+", "-", 1), re.sub(r"(?<=.)-", "+", gold, count=1),
               gold.replace("\\pi", "", 1), re.sub(r"\\sqrt(?!\[)", "", gold, count=1),
               re.sub(r"(?<![a-zA-Z\\])x(?![a-zA-Z])", "y", gold), gold.replace("sin", "cos"),
               gold.replace("\\infty", "0", 1), re.sub(r"(?<![a-zA-Z\\])i(?![a-zA-Z])", "", gold),
               gold.replace("\\cup", ",", 1)]
    if re.match(r"(?:\\left)?[(\[]", gold) and "," in gold:
        options += [gold.replace("(", "[", 1) if "(" in gold else gold.replace("[", "(", 1),
                    gold.replace("]", ")", 1)]
    if is_value(gold):
        options += [gold[1:] if gold.startswith("-") else "-" + gold, f"\\frac{{1}}{{{gold}}}", f"2{gold}"]
    for _ in range(6 if digits else 0):
        d = rng.choice(digits)
        n = int(d[0])
        new = rng.choice([n + 1, max(n - 1, 0), n * 2, int(str(n)[::-1]), int(f"{n}0"), n // 10, n + 10])
        options.append(gold[:d.start()] + str(new) + gold[d.end():])
    frac = re.search(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", gold)
    if frac:
        options += [gold.replace(frac[0], f"\\frac{{{frac[2]}}}{{{frac[1]}}}")] * 2
        if re.fullmatch(r"-?\d+", frac[1]) and frac[2].isdigit() and int(frac[2]):
            options += [gold.replace(frac[0], f"{int(frac[1]) / int(frac[2]):.2f}")] * 2
    if items := items_of(gold):
        options += [", ".join(items[:-1]), gold + ", 0"] * 2
    elif ((match := re.fullmatch(r"((?:\\left)?[(\[])([^()\[\]]+?)((?:\\right)?[)\]])", gold))
          and "," in match[2]):
        options += [match[1] + ",".join(reversed(match[2].split(","))) + match[3]] * 2
    options = [option for option in dict.fromkeys(options) if option.strip() and bare(option) != bare(gold)]
    return rng.choice(options)


# --------------------------------------------------------------------------------------------------
# the judge

class Judge:
    def __init__(self, root, every=1):
        import math_verify
        logging.disable(logging.CRITICAL)
        self.library, self.trees = math_verify, {}
        self.rows, self.distinct = real_answers(root)
        self.natural = self.spellings(sorted(set(self.rows))[::every])

    def tree(self, gold):
        """what the judge reads in the answer of a question; None: nothing"""
        if gold not in self.trees:
            config = [self.library.LatexExtractionConfig()]
            parsed = self.library.parse(f"${gold}$", extraction_config=config, parsing_timeout=PATIENCE)
            self.trees[gold] = parsed if parsed and not isinstance(parsed[0], str) else None
        return self.trees[gold]

    def equal(self, gold, other):
        boxed = self.library.parse(f"\\boxed{{{other}}}", parsing_timeout=PATIENCE)
        return self.library.verify(self.tree(gold), boxed, timeout_seconds=PATIENCE)

    def spellings(self, golds):
        """pairs of real answers that may be equal: those whose trees have the same value at one point"""
        import sympy
        found = {}
        for gold in golds:
            if self.tree(gold):
                tree = self.tree(gold)[0]
                if isinstance(tree, sympy.Expr):
                    value = tree.subs({s: sympy.Rational(37 + sum(map(ord, s.name)), 29)
                                       for s in tree.free_symbols}).evalf(15)
                    tree = complex(value) if value.is_number and value.is_finite else value
                    tree = f"{tree:.9g}" if isinstance(tree, complex) else tree
                found.setdefault(str(tree), []).append(gold)
        return [(a, b) for group in found.values() for a in group for b in group if bare(a) != bare(b)]


def judged(judge, want, seed=0):
    """`want` different (gold, other, verdict, what was meant), half of them of each verdict"""
    rng = random.Random(seed)
    pairs, seen, left = [], set(), {True: want // 2, False: want - want // 2}
    while any(left.values()):
        gold = rng.choice(judge.distinct if rng.random() < 0.75 else judge.rows)
        meant = rng.random() < 0.5 if all(left.values()) else left[True] > 0
        if not judge.tree(gold):
            continue
        if not meant:
            other = slip(gold, rng, judge.rows)
        elif (place := rng.random()) < 0.2:
            gold, other = rng.choice(judge.natural)
        else:
            other = habit(gold, rng) if place < 0.65 else rearranged(gold, judge.tree(gold)[0], rng)
        if not other or bare(other) == bare(gold) or (gold, other) in seen or len(other) > 300:
            continue
        seen.add((gold, other))
        verdict = judge.equal(gold, other)
        if left[verdict]:
            left[verdict] -= 1
            pairs.append((gold, other, verdict, meant))
    return pairs


def figures(pairs):
    """-> recall, precision, and the pairs of which we think otherwise than the judge"""
    rows = [(same(gold, other), verdict, gold, other) for gold, other, verdict, _ in pairs]
    right = sum(ours and verdict for ours, verdict, *_ in rows)
    return (right / sum(row[1] for row in rows), right / sum(row[0] for row in rows),
            [row for row in rows if row[0] != row[1]])


@pytest.mark.skipif(not REAL, reason="NANORL_DATA names no folder")
def test_equality_agrees_with_math_verify(monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(answers, "have_math_verify", lambda: False)
    recall, precision, wrong = figures(judged(Judge(REAL, every=10), 200, seed=3))
    assert recall >= 0.97 and precision >= 0.97, wrong


if __name__ == "__main__":
    answers.have_math_verify = lambda: False
    judge = Judge(REAL)
    for seed in map(int, sys.argv[2:] or [0]):
        pairs = judged(judge, int(sys.argv[1]), seed)
        recall, precision, wrong = figures(pairs)
        print(f"seed {seed}: {len(pairs)} pairs, recall {recall:.4f}, precision {precision:.4f}")
        meant = [pair for pair in pairs if pair[2] == pair[3]]
        recall, precision, _ = figures(meant)
        print(f"    of these, {len(meant)} that are what they were meant "
              f"to be: recall {recall:.4f}, precision {precision:.4f}")
        for ours, _, gold, other in wrong:
            print(f"    {'only we' if ours else 'only the judge'} say equal:  {gold}    {other}")
