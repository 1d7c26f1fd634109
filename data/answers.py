r"""
Answers in mathematics: the last thing a text says, a normal form of it, and whether two of
them are the same.

    extract(r"the result is \boxed{\frac12}")    # '\\frac12': the last \boxed{}, else what follows
                                                 # ####, else "answer is", else None
    canon(r"\frac12") == canon("0.5")            # hashable: two spellings of an answer are one vote
    same("3+2i", "2i + 3")                       # equality; more patient than canon (a decimal and
                                                 # what it rounds)

The normal form is not a string that was cleaned. LaTeX is parsed, and an expression IS its value:
a rational number exactly, a number with roots or pi as a float of sixteen digits, one with
variables as its values at three fixed points, where two different polynomials do not meet. So
\frac{\sqrt2}{2} and 1/\sqrt2 need no rule, nor x^2+x-2 and (x+2)(x-1). Around expressions stand
tuples, sets, intervals, matrices, equations and words. Units, currency signs, degrees, number
bases and a leading "x =" are dropped: the question said them.

Left out of the usual recipe: the last number of a text as its answer (a text that was cut off
then votes with whatever it was computing), "" as an answer (it wins votes), eval and sympy's
parser (hostile text is run, or runs for ever). Length, depth and the size of every number are
bounded before anything is computed; what cannot be parsed is itself, without its spaces, and only
such a pair is handed to math-verify, where that is installed.
"""
import cmath
import functools
import importlib.util
import math
import re
import threading
from collections import namedtuple
from fractions import Fraction
from hashlib import blake2b

LONGEST = 400            # characters of an answer that is parsed
DEEPEST = 40             # brackets within brackets
BITS = 30_000            # of an exact number
PATIENCE = 2             # seconds for each step of math-verify
POINTS = 3               # at which expressions with variables are compared

# --------------------------------------------------------------------------------------------------
# what a text answers


def extract(text):
    r"""the last closed \boxed{...} that holds something; else what follows the last ####; else
    the last "answer is"; else None"""
    end = len(text)
    for _ in range(20):          # twenty boxes that are cut or empty: this text answers nothing
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            break
        found = BOX.match(text, start)
        inside = found and braced(text, found.end())
        if inside and inside.strip():
            return inside.strip()
        end = start
    for mark in (r"####[ \t]*", r"(?i:answer\s+is)[\s:]*"):
        *_, last = [None, *re.finditer(mark, text)]
        if last:
            # a sentence ends at a full stop, which a decimal point is not
            line = text[last.end():last.end() + 4 * LONGEST].split("\n", 1)[0]
            words = re.split(r"\.(?=\s|$)", line.strip(), maxsplit=1)[0].strip().strip("*").strip()
            if words:
                return words
    return None


BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\[\s\S]|[{}]")


def braced(text, at):
    """the text from `at` up to the brace that closes the one before it; None: it is never closed"""
    depth = 1
    for match in BRACE.finditer(text, at, at + 4 * LONGEST):  # \\{ is a line's end and a brace, \{ is none
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[at:match.start()]
    return None


# --------------------------------------------------------------------------------------------------
# LaTeX -> a plainer line of symbols

SPELLINGS = [(re.compile(pattern), by) for pattern, by in [
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits|q?quad|[!;:, ]"
     r"|hspace\{[^{}]*\}|phantom\{[^{}]*\}|phantom)(?![a-zA-Z])", " "),
    (r"~|\\\(|\\\)|\\\[|\\\]|\$|\\\$|£|€", " "), (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:cdot|times|ast)(?![a-zA-Z])|[*·×⋅]", " * "), (r"\\div(?![a-zA-Z])|÷|:", "/"), ("[−–]", "-"),
    (r"\\leq?(?:slant)?(?![a-zA-Z])|≤|<=", "≤"), (r"\\geq?(?:slant)?(?![a-zA-Z])|≥|>=", "≥"),
    (r"\\lt(?![a-zA-Z])", "<"), (r"\\gt(?![a-zA-Z])", ">"), (r"\\neq?(?![a-zA-Z])|≠|!=", "≠"),
    (r"\\in(?![a-zA-Z])|∈", "∈"), (r"\\(?:cup|bigcup)(?![a-zA-Z])|∪", "∪"),
    (r"\\infty(?![a-zA-Z])|(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", "∞"),
    (r"\\pi(?![a-zA-Z])|(?<![\\a-zA-Z])pi(?![a-zA-Z])", "π"), (r"\\pm(?![a-zA-Z])", "±"),
    (r"\\mp(?![a-zA-Z])", "∓"), (r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![a-zA-Z])", "°"),
    (r"√", r"\\sqrt"), (r"(?<![\\a-zA-Z])(?=(?:sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp)(?![a-zA-Z]))", r"\\"),
    (r"\\operatorname\*?\{([a-z]+)\}", r"\\\1"), (r"\\[lr]vert(?![a-zA-Z])|\\mid(?![a-zA-Z])", "|"),
    (r"\\(?:approx|simeq)(?![a-zA-Z])", "≈"), (r"\\(?:lbrace|\{)", "⟨"),
    (r"\\(?:rbrace|\})", "⟩"), (r"\*\s*\*", "^"), (r"\\imath(?![a-zA-Z])", "i"),
    (r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"(\1+\2/\3)"),
]]
TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mbox|math(?:rm|bf|it|sf|tt|cal|bb)|bf|rm|boxed)"
                  r"\s*\{([^{}]*)\}(\s*\^\s*\{?\d\}?)?")
UNIT = re.compile(r"(?<=[\d})°π])\s*(?:[a-zA-Z]{2,}\.?|[pa]\.?m\.?|[mghsL](?![a-zA-Z]))"
                  r"(?:[\s/]*[a-zA-Z]+\.?)*(?:\s*\^\s*\{?[23]\}?)?\s*\.?$")
PLAIN = re.compile(r"[-+]?\s*\d+")
THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
# x, AB, \theta, f(x), x_1, (r, \theta)
NAME = re.compile(r"[a-zA-Z](?:\s*[a-zA-Z]){,2}|\\[a-z]+|[a-zA-Z]\s*\(\s*[a-zA-Z]\s*\)"
                  r"|[a-zA-Z]_\{?\w+\}?|\(\s*L(?:\s*,\s*L)+\s*\)"
                  .replace("L", r"(?:[a-zA-Z]|\\[a-z]+)"))
WORD = re.compile(r"(?=.*[a-zA-Z]{2} +[a-zA-Z]{2}|[a-zA-Z'-]{3})[a-zA-Z][a-zA-Z .'-]*")


def simpler(text):
    """one spelling for each symbol; text in \\text{} is a separator, a unit (dropped), or
    the answer itself"""
    text = text.replace("\\\\", "¶")                                # a row of a matrix ends
    # 10,\!000 and 10{,}000: surely one number
    text = re.sub(r"(?<=\d)(?:\s*,\s*\\!|\{,\}|\\,)\s*(?=\d{3}(?!\d))", "", text)

    def worded(match):
        inside, before = match[1].strip().rstrip("."), text[:match.start()].strip()
        if re.fullmatch(r",?\s*(?:and|or)\s*,?", inside):
            return " , "
        if not before or re.fullmatch(r"\(?[A-Z]\)?|[-\d.,/ ]+", inside) or before[-1] in "+-*/=^({[,":
            return match[1] + (match[2] or "")
        return " "
    for pattern, by in SPELLINGS[:2]:          # spaces and styles first: \displaystyle \text{May}
        text = pattern.sub(by, text)
    text = TEXT.sub(worded, text)
    for pattern, by in SPELLINGS:
        text = pattern.sub(by, text)
    return re.sub(r"(?<=[^a-zA-Z\\])\s*,?\s+(?:and|or)\s+(?=[-\d\\(])",
                  " , ", text).strip().rstrip(".,;").strip()


# --------------------------------------------------------------------------------------------------
# expressions: a descent through the symbols to a tree of tuples, then its value at a point


class Unread(Exception):
    """what stands here is no expression that is known, or one too large to compute"""


SYMBOL = re.compile(r"\d+\.\d+|\.\d+|\d+|\\[a-zA-Z]+|\S")
FUNCTIONS = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x), "cot": lambda x: 1 / cmath.tan(x),
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "sinh": cmath.sinh,
    "cosh": cmath.cosh, "tanh": cmath.tanh, "ln": cmath.log, "log": cmath.log, "exp": cmath.exp,
}
ANGLES = ("sin", "cos", "tan", "sec", "csc", "cot")
GREEK = {"alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "nu", "rho",
         "sigma", "tau", "phi", "varphi", "psi", "omega", "Delta", "Omega", "ell", "triangle"}
ENDS = set(")]},=<>≤≥≠∈∪&⟩")


class Reader:
    def __init__(self, text):
        self.symbols, self.at, self.depth, self.variables, self.bars = SYMBOL.findall(text), 0, 0, False, 0

    def peek(self):
        return self.symbols[self.at] if self.at < len(self.symbols) else ""

    def next(self):
        self.at += 1
        return self.symbols[self.at - 1] if self.at <= len(self.symbols) else ""

    def expect(self, symbol):
        if self.next() != symbol:
            raise Unread

    def whole(self):
        tree = self.sum()
        if self.peek():
            raise Unread
        return tree

    def sum(self):
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unread
        sign = self.next() if self.peek() in "+-" and self.peek() else "+"
        tree = self.product()
        tree = ("neg", tree) if sign == "-" else tree
        while (sign := self.peek()) in ("+", "-"):
            self.next()
            tree = ("add" if sign == "+" else "sub", tree, self.product())
        self.depth -= 1
        return tree

    def product(self):
        tree = self.power()
        while True:
            symbol = self.peek()
            if symbol in ("*", "/"):
                self.next()
                tree = ("mul" if symbol == "*" else "div", tree, self.power())
            elif not symbol or symbol in ENDS or symbol in "+-" or (symbol == "|" and self.bars):
                return tree
            else:
                right = self.power()
                # 11 \frac23 is eleven and two thirds
                mixed = (tree[0] == "num" and right[0] == "frac"
                         and right[1][0] == right[2][0] == "num" and tree[1].denominator == 1)
                tree = ("add" if mixed else "mul", tree, right)

    def power(self):
        tree = self.one()
        while (symbol := self.peek()) in ("^", "!", "°", "'"):
            self.next()
            if symbol == "^":
                sign = self.next() if self.peek() == "-" else ""
                right = self.one()
                tree = ("pow", tree, ("neg", right) if sign else right)
            elif symbol == "'":
                raise Unread
            else:
                tree = ("factorial" if symbol == "!" else "degree", tree)
        return tree

    def argument(self):
        """of \\frac and \\sqrt: a group, or one digit or letter"""
        symbol = self.peek()
        if symbol[:1].isdigit() and len(symbol) > 1:                 # \frac12
            self.symbols[self.at] = symbol[1:]
            return ("num", int(symbol[0]))
        return self.one()

    def group(self, close):
        tree = self.sum()
        self.expect(close)
        return tree

    def one(self):
        symbol = self.next()
        if symbol[:1].isdigit() or symbol[:1] == ".":
            return self.number(symbol)
        if symbol in ("(", "{", "["):
            return self.group({"(": ")", "{": "}", "[": "]"}[symbol])
        if symbol == "|":
            self.bars += 1
            tree = self.group("|")
            self.bars -= 1
            return ("abs", tree)
        if symbol in ("π", "∞", "i", "e"):
            return ("num", {"π": math.pi, "∞": math.inf, "i": 1j, "e": math.e}[symbol])
        if (len(symbol) == 1 and symbol.isascii() and symbol.isalpha()) or symbol[1:] in GREEK:
            self.variables = True
            name = symbol
            if self.peek() == "_":
                self.next()
                name += "_" + (self.next() if self.peek() != "{"
                               else "".join(iter(self.next, "}"))[1:] if "}" in self.symbols else "")
            return ("var", name)
        if symbol == "\\frac":
            return ("frac", self.argument(), self.argument())
        if symbol == "\\sqrt":
            root = ("num", 2)
            if self.peek() == "[":
                self.next()
                root = self.group("]")
            return ("root", self.argument(), root)
        if symbol in ("\\binom", "\\dbinom", "\\tbinom"):
            return ("binom", self.argument(), self.argument())
        if symbol[1:] in FUNCTIONS:
            return self.function(symbol[1:])
        raise Unread

    def number(self, symbol):
        if self.peek() == "\\overline" and "." in symbol + self.symbols[self.at - 2]:
            self.next()
            self.expect("{")
            period = self.next()
            self.expect("}")
            if not period.isdigit():
                raise Unread
            places = len(symbol.partition(".")[2])
            return ("num", Fraction(symbol) + Fraction(int(period), (10 ** len(period) - 1) * 10 ** places))
        if self.peek() == "." and self.symbols[self.at + 1:self.at + 2] == ["\\overline"]:  # 0.\overline{3}
            self.next()
            return self.number(symbol + ".")
        if self.peek() == "_":                                       # 52_8: the base was asked for
            self.next()
            self.one()
        return ("num", Fraction(symbol) if "." in symbol else int(symbol))

    def function(self, name):
        base, exponent = ("num", math.e), None
        while self.peek() in ("^", "_"):
            if self.next() == "^":
                sign = self.next() if self.peek() == "-" else ""
                exponent = self.argument()
                exponent = ("neg", exponent) if sign else exponent
            elif name == "log":
                base = self.argument()
            else:
                raise Unread
        if self.peek() in ("(", "{", "["):
            inside = self.one()
            inside = ("degree", inside) if self.peek() == "°" and self.next() else inside
        else:                                  # \sin 5x \cos x: up to the next function or sign
            inside = self.power()
            while ((symbol := self.peek()) and symbol not in ENDS and symbol not in "+-*/|("
                   and symbol[1:] not in FUNCTIONS):
                inside = ("mul", inside, self.power())
        tree = ("call", name, inside) if name != "log" else ("div", ("call", "ln", inside),
                                                             ("call", "ln", base))
        if exponent == ("neg", ("num", 1)) and name in ANGLES:       # \tan^{-1}
            return ("call", "arc" + name, inside) if "arc" + name in FUNCTIONS else ("pow", tree, exponent)
        return ("pow", tree, exponent) if exponent else tree


def small(x):
    """a number that may be computed with further"""
    if isinstance(x, complex):
        if cmath.isnan(x) or cmath.isinf(x):
            raise Unread
        return x.real if x.imag == 0 else x
    if isinstance(x, float):
        if math.isnan(x):
            raise Unread
        return x
    if x.numerator.bit_length() > BITS or x.denominator.bit_length() > BITS:
        raise Unread
    return x.numerator if x.denominator == 1 else x


@functools.lru_cache(maxsize=4096)
def at_point(name, point):
    """
    what a variable stands for: integers, so that polynomials stay exact, and both signs, so that
    |x| is not x. From a hash: were x, y, z at even distances, x - y + z would be y.
    """
    number = int.from_bytes(blake2b(f"{name} {point}".encode(), digest_size=4).digest(), "big")
    return (7 + number % 9973, -(5 + number % 9967), Fraction(3 + number % 7919, 7927))[point]


def value(tree, point, angle=False):
    kind = tree[0]
    if kind == "num":
        return tree[1]
    if kind == "var":
        return at_point(tree[1], point)
    if kind == "call":
        x = complex(value(tree[2], point, tree[1] in ANGLES))
        y = FUNCTIONS[tree[1]](x)
        return small(complex(y.real, 0 if abs(y.imag) < 1e-14 * abs(y) else y.imag))
    a = value(tree[1], point, angle)
    if kind == "neg":
        return -a
    if kind == "abs":
        return abs(a)
    if kind == "degree":
        return a * math.pi / 180 if angle else a
    if kind == "factorial":
        if not isinstance(a, int) or not 0 <= a <= 2500:
            raise Unread
        return small(math.factorial(a))
    b = value(tree[2], point, angle)
    if kind == "add":
        return small(a + b)
    if kind == "sub":
        return small(a - b)
    if kind == "mul":
        return small(a * b)
    if kind in ("div", "frac"):
        return small(Fraction(a) / b if isinstance(a, int) else a / b)
    if kind == "binom":
        if not isinstance(a, int) or not isinstance(b, int) or not 0 <= b <= a <= 1000:
            raise Unread
        return small(math.comb(a, b))
    if kind == "root":
        return power(a, Fraction(1) / b if isinstance(b, int | Fraction) else 1 / b)
    return power(a, b)


def power(a, b):
    """a ** b, exact where it is rational and small enough, the principal value elsewhere (and the
    real odd root of a negative number)"""
    if isinstance(b, int) or (isinstance(b, Fraction) and b.denominator == 1):
        b = int(b)
        if isinstance(a, int | Fraction):
            if abs(b) * max(a.numerator.bit_length(), a.denominator.bit_length()) > BITS:
                raise Unread
            return small(Fraction(a) ** b)
        return small(a ** b) if abs(b) < 10_000 else float("nan")
    if (isinstance(a, int | Fraction) and isinstance(b, Fraction) and b.denominator < 64
            and abs(b.numerator) < 64):
        if a < 0 and b.denominator % 2:
            return small((-1) ** (b.numerator % 2) * power(-a, b))
        if a >= 0:
            top, bottom = whole_root(a.numerator, b.denominator), whole_root(a.denominator, b.denominator)
            if top is not None and bottom is not None:
                return power(Fraction(top, bottom), b.numerator)
    return small(complex(a) ** complex(b))


def whole_root(n, k):
    """the k-th root of n where it is whole. Floats guess it, integers check it"""
    if k == 2:
        guess = math.isqrt(n)
        return guess if guess * guess == n else None
    if n.bit_length() > 900:
        return None
    guess = round(n ** (1 / k))
    return next((g for g in (guess - 1, guess, guess + 1) if g >= 0 and g ** k == n), None)


# --------------------------------------------------------------------------------------------------
# whole answers

# kind: value | list | tuple | union | matrix | equation | order | word | raw. key: hashable,
# equal for equal ones nearly always
Form = namedtuple("Form", "kind parts key decimals percent name tree", defaults=(0, False, "", None))


@functools.lru_cache(maxsize=1 << 16)
def read(answer):
    """an answer's Form"""
    if len(answer) < 40 and PLAIN.fullmatch(answer):                 # nine answers in ten
        number = int(answer.replace(" ", ""))
        return Form("value", (number,), number)
    bare = "".join(answer.split())
    if len(answer) > LONGEST:
        return Form("raw", bare, bare)
    try:
        return form(simpler(answer))
    except (Unread, ArithmeticError, ValueError, IndexError, RecursionError):
        bare = bare.replace("\\left", "").replace("\\right", "").strip("$.")
        return Form("raw", bare, bare)


def form(text):
    percent = text.endswith("%")
    if percent:
        return form(text.rstrip("%\\ "))._replace(percent=True)
    if "≈" in text:                          # what is exact comes first, if it is there at all
        text = next(side for side in text.split("≈") if side.strip()).strip()
    if THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    stripped = UNIT.sub("", text)
    if stripped and not WORD.fullmatch(text):
        text = stripped.strip()
    if match := re.fullmatch(r"\(?\s*([a-eA-E])\s*\)?", text):         # (B), the choice
        return Form("word", match[1].lower(), match[1].lower())
    if match := re.fullmatch(r"(-?[0-9A-Z]+)\s*_\s*\{?\s*(\d+)\s*\}?", text):
        return form(match[1])._replace(name=f"base {match[2]}")
    if not text:
        raise Unread
    if WORD.fullmatch(text):
        word = re.sub("[ .]", "", text.lower())
        return Form("word", word, word)
    parts = cut(text, "∪")
    if len(parts) > 1:
        # (A ∪ B) ∪ C
        forms = [one for f in map(form, parts) for one in (f.parts if f.kind == "union" else [f])]
        forms.sort(key=lambda f: repr(f.key))
        return Form("union", tuple(forms), ("union", *(f.key for f in forms)))
    if matrix := re.fullmatch(
            r"\\begin\s*\{([pbvBV]?matrix|smallmatrix|array)\}(?:\{[clr|]*\})?(.*)\\end\s*\{\1\}",
            text, re.S):
        rows = tuple(tuple(form(cell) for cell in row.split("&")) for row in matrix[2].strip(" ¶").split("¶"))
        return Form("matrix", rows, ("matrix", *(tuple(cell.key for cell in row) for row in rows)))
    items = cut(text, ",;")
    if len(items) > 1:
        return listed([form(item) for item in items])
    if ("±" in text or "∓" in text) and text[0] != "⟨":
        return listed([form(text.replace("±", a).replace("∓", b)) for a, b in (("+", "-"), ("-", "+"))])
    if len(text) > 1 and text[0] in "([⟨{" and closes(text) == len(text) - 1:
        items = cut(text[1:-1], ",;")
        if text[0] in "⟨{" or (len(items) == 1 and ("∪" in text or "\\begin" in text)):
            return listed([form(item) for item in items])
        if len(items) > 1:
            forms = tuple(form(item) for item in items)
            # (1, 2) may be a point or an interval and is written alike; of more than two only the
            # order counts
            shape = (text[0] + text[-1] if len(items) == 2
                     else {"[]": "()"}.get(text[0] + text[-1], text[0] + text[-1]))
            if len(items) == 2:                                      # nothing is closed at infinity
                ends = [f.kind == "value" and f.parts[0] in (math.inf, -math.inf) for f in forms]
                shape = ("(" if ends[0] else shape[0]) + (")" if ends[1] else shape[1])
            return Form("tuple", (shape, forms), (shape, *(f.key for f in forms)))
    if any(symbol in text for symbol in "=<>≤≥≠∈"):
        return related(text)
    return computed(Reader(text))


def listed(forms):
    """what has no order; the order it came in is kept for the comparison with a tuple"""
    # 1 ± 2, 3 is three of them
    forms = [one for f in forms for one in (f.parts if f.kind == "list" else [f])]
    if len(forms) == 1:
        return forms[0]
    return Form("list", tuple(forms), ("list", *sorted((f.key for f in forms), key=repr)))


def computed(reader, tree=None):
    tree = tree or reader.whole()
    values = tuple(value(tree, point) for point in range(POINTS if reader.variables else 1))
    decimals = (len("".join(reader.symbols).partition(".")[2]) if tree[0] in ("num", "neg")
                and len(reader.symbols) < 3 else 0)
    return Form("value", values, rounded(values[0]) if len(values) == 1 else tuple(map(rounded, values)),
                decimals, tree=tree)


def rounded(x):
    if isinstance(x, int | Fraction):
        return x
    if isinstance(x, float) and (math.isinf(x) or abs(x - round(x)) < 1e-12 * abs(x)):
        return x if math.isinf(x) else round(x)
    x = complex(x)
    size = abs(x)
    return tuple(f"{0.0 if abs(part) < 1e-11 * size else part:.9g}" for part in (x.real, x.imag))


def closes(text):
    """where the bracket that opens the text is closed"""
    depth = 0
    for i, letter in enumerate(text):
        if letter in "([{⟨":
            depth += 1
        elif letter in ")]}⟩":
            depth -= 1
            if depth == 0:
                return i
    return -1


def cut(text, separators):
    """the text between separators that stand in no bracket"""
    depth, start, parts = 0, 0, []
    for i, letter in enumerate(text):
        if letter in "([{⟨":
            depth += 1
        elif letter in ")]}⟩":
            depth -= 1
        elif depth == 0 and letter in separators:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in parts + [text[start:]] if part.strip()] if parts else [text]


def related(text):
    """x = 5 is 5 that has a name; x > 5 and 2 ≤ x < 5 are intervals; the rest is lhs - rhs, which
    only its zeros or its sign matter of"""
    sides = [side.strip() for side in re.split("[=<>≤≥≠∈]", text)]
    signs = re.findall("[=<>≤≥≠∈]", text)
    if set(signs) == {"="} and len(sides) == 2 and not NAME.fullmatch(sides[0]) and NAME.fullmatch(sides[1]):
        sides.reverse()                                              # 3/2 = x
    name = NAME.fullmatch(sides[0])
    if (signs == ["∈"] or set(signs) == {"="}) and name:
        right = form(sides[-1])
        return right._replace(name="".join(sides[0].split()))
    if any(sign in "∈≠" for sign in signs):
        raise Unread
    readers = [Reader(side) for side in sides]
    middle = len(sides) == 3 and NAME.fullmatch(sides[1])            # 1 < f(x) < 2
    trees = [("var", "x") if middle and i == 1 else reader.whole() for i, reader in enumerate(readers)]
    if set(signs) == {"="} and len(sides) == 2:
        reader = readers[0]
        reader.variables |= readers[1].variables
        return Form("equation", zeros := computed(reader, ("sub", *trees)).parts,
                    ("equation", *proportion(zeros)))
    if {"<", "≤"} >= set(signs) or {">", "≥"} >= set(signs):
        if signs[0] in ">≥":
            trees = trees[::-1]
            signs = [{">": "<", "≥": "≤"}[sign] for sign in signs[::-1]]
            readers = readers[::-1]
        if len(trees) == 2 and trees[0][0] == "var" and not readers[1].variables:
            trees, signs = [("neg", ("num", math.inf)), *trees], ["<", *signs]
        elif len(trees) == 2 and trees[1][0] == "var" and not readers[0].variables:
            trees, signs = [*trees, ("num", math.inf)], [*signs, "<"]
        if len(trees) == 3 and trees[1][0] == "var":
            ends = tuple(computed(Reader(""), tree) for tree in (trees[0], trees[2]))
            shape = "[("[signs[0] == "<"] + "])"[signs[1] == "<"]
            return Form("tuple", (shape, ends), (shape, *(f.key for f in ends)))
        if len(trees) == 2:
            readers[0].variables |= readers[1].variables
            zeros = computed(readers[0], ("sub", *trees)).parts
            return Form("order", (signs[0], zeros), (signs[0], *proportion(zeros), zeros[0] > 0))
    raise Unread


def proportion(values):
    first = next((x for x in values if x), 1)
    return tuple(rounded(small(Fraction(x) / first if isinstance(x, int) else x / first)) for x in values)


# --------------------------------------------------------------------------------------------------
# equality


def canon(answer):
    return read(answer).key


def same(a, b):
    a_form, b_form = read(a), read(b)
    if equal(a_form, b_form):
        return True
    # what was understood on both sides and differs, differs; only what was not is worth milliseconds
    return "raw" in (a_form.kind, b_form.kind) and a_form.key != b_form.key and by_math_verify(a, b)


def equal(a, b):
    if (a.name and b.name and a.name.lower() != b.name.lower()
            and (len(a.name) == len(b.name) == 1 or a.name[:5] == b.name[:5] == "base ")):
        return False                                  # x = 1 is not y = 1, nor 52_8 what 52_9 is
    if a.kind != b.kind:
        # 1, 2 for (1, 2): in that order, and not for an interval with its ends
        if {a.kind, b.kind} == {"list", "tuple"}:
            a, b = (a, b) if a.kind == "list" else (b, a)
            return b.parts[0] == "()" and alike(a.parts, b.parts[1])
        if {a.kind, b.kind} == {"equation", "value"}:                # y = 2x + 3 and 2x - y + 3 = 0
            a, b = (a, b) if a.kind == "equation" else (b, a)
            if not b.name or b.tree is None or len(b.parts) == 1:  # 4x = 16 asks for x = 4, and is no answer
                return False
            reader = Reader("")
            reader.variables = True
            return proportional(a.parts, computed(reader, ("sub", ("var", b.name), b.tree)).parts)
        return False
    if a.key == b.key:
        return True
    if a.kind == "value":
        x, y = a.parts, b.parts
        if len(x) != len(y):
            x, y = x * (POINTS // len(x)), y * (POINTS // len(y))
        return all(map(near, x, y)) or (len(x) == 1 and (rounds(a, b) or rounds(b, a)))
    if a.kind in ("list", "union"):
        left = list(b.parts)
        for one in a.parts:
            match = next((other for other in left if equal(one, other)), None)
            if match is None:
                return False
            left.remove(match)
        return not left
    if a.kind == "tuple":
        return a.parts[0] == b.parts[0] and alike(a.parts[1], b.parts[1])
    if a.kind == "matrix":
        return len(a.parts) == len(b.parts) and all(alike(x, y) for x, y in zip(a.parts, b.parts))
    if a.kind == "equation":
        return proportional(a.parts, b.parts)
    if a.kind == "order":
        return (a.parts[0] == b.parts[0] and proportional(a.parts[1], b.parts[1])
                and (a.parts[1][0] > 0) == (b.parts[1][0] > 0))
    return False


def alike(a, b):
    return len(a) == len(b) and all(map(equal, a, b))


def near(x, y):
    if isinstance(x, int | Fraction) and isinstance(y, int | Fraction):
        return x == y
    if any(isinstance(z, int | Fraction) and z.numerator.bit_length() - z.denominator.bit_length() > 1000
           for z in (x, y)):
        return False                                                 # no float is as large
    if x == y or cmath.isinf(x) or cmath.isinf(y):
        return x == y
    return abs(x - y) <= max(1e-10 * max(abs(x), abs(y)), 1e-13 if 0 in (x, y) else 0)


def rounds(a, b):
    """a is a decimal of six places or more, and b is what it rounds; or a is a percentage
    and b its fraction"""
    x, y = a.parts[0], b.parts[0]
    if a.percent and not b.percent and isinstance(x, int | Fraction):
        return near(Fraction(x) / 100, y)
    return (a.decimals >= 6 and not isinstance(y, complex) and not math.isinf(y)
            and abs(y - x) <= Fraction(51, 100 * 10 ** a.decimals))


def proportional(x, y):
    a, b = next((i for i, v in enumerate(x) if v), None), next((i for i, v in enumerate(y) if v), None)
    return (a == b and a is not None and len(x) == len(y)
            and all(near(x[i] * y[a], y[i] * x[a]) for i in range(len(x))))


@functools.cache
def have_math_verify():
    return importlib.util.find_spec("math_verify") is not None


@functools.lru_cache(maxsize=1 << 14)
def by_math_verify(a, b):
    """the library's verdict in at most PATIENCE seconds per step; it keeps time by a signal,
    which only a main thread gets"""
    if (not have_math_verify() or max(len(a), len(b)) > LONGEST
            or threading.current_thread() is not threading.main_thread()):
        return False
    import math_verify
    try:
        forms = [math_verify.parse(f"${text}$", parsing_timeout=PATIENCE) for text in (a, b)]
        return bool(math_verify.verify(*forms, timeout_seconds=PATIENCE))
    except Exception:          # a parser of others on a model's text: whatever it throws means no
        return False
