"""
The package reasoning-gym, as gym.py takes it: which of its tasks, by what names, and which answers
they may see.

    dataset("chain_sum", ["max_terms=3"])        # a data set of the package; ValueError in one line
    harmless("n_queens", "[['Q', '_'], ['_', 'Q']]")

Eight tasks hand an answer to Python's eval, or to sympy, which calls eval. A model wrote that answer,
and a reward is what it is trained to raise: `open("x.py", "w")` is an answer, too. So it is read
first, and only these pass:

    literals    numbers, texts, names, lists, and what Python cannot read at all: eval cannot either
    formulas    numbers, names, operators and FUNCTIONS. No text: sympy reads a text as a formula
"""
import ast
import difflib
import json

# of a data set: most make a problem when it is asked for, a few all of them, when they are made
SIZE = 1000
ANEW = "the same seed does not ask the same again, so no run could be resumed"
LEFT_OUT = {
    "composite": "it is a mixture of the others",
    "game_of_life_halting": "its score_answer takes every answer as right",
    "isomorphic_strings": ANEW,
    "knight_swap": ANEW,
    "polynomial_multiplication": ANEW,
    "puzzle24": "its score_answer takes any four numbers that make 24, whichever were given",
    "ransom_note": ANEW,
}
LITERALS = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
FORMULAS = {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24",
            "simple_integration"}
FUNCTIONS = set("sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log sqrt".split())
ATOMS = (ast.Expression, ast.Constant, ast.Name, ast.Load, ast.UnaryOp, ast.USub, ast.UAdd)


def package():
    try:
        from reasoning_gym import factory
    except ImportError as error:
        raise ValueError(f"gym tasks need the package reasoning-gym ({error}): "
                         "python -m pip install reasoning-gym") from None
    return factory


def names():
    return sorted(package().DATASETS)


def dataset(name, settings=()):
    if not name:
        raise ValueError("task gym needs a name, as in gym:chain_sum: python -m data.gym lists all")
    if name in LEFT_OUT:
        raise ValueError(f"task gym:{name} is left out: {LEFT_OUT[name]}")
    if name not in names():
        near = difflib.get_close_matches(name, set(names()) - set(LEFT_OUT), 1, cutoff=0)
        raise ValueError(f"no task gym:{name}: did you mean gym:{near[0]}? python -m data.gym lists all")
    defaults = package().DATASETS[name][1]()
    try:
        values = dict(map(setting, settings))
        return package().create_dataset(name, **{"seed": 0, "size": SIZE} | values)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"task gym:{':'.join([name, *settings])}: {error}; what can be set: "
                         f"{defaults}") from None


def setting(word):
    """max_terms=3 -> ("max_terms", 3)"""
    key, mark, value = word.partition("=")
    if not mark:
        raise ValueError(f"{word!r} is no setting like max_terms=3")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


def gold(entry):
    """-> a right answer of what a data set asks, None where the package knows none"""
    places = ("answer", "example_correct_answer", "example_answer", "possible_answer")
    right = next(filter(None, map((entry["metadata"] | entry).get, places)), None)
    return right if right is None or isinstance(right, str) else json.dumps(right)


def harmless(task, answer):
    """May the scorer of this task see this answer?"""
    if task not in LITERALS | FORMULAS:
        return True
    try:
        nodes = list(ast.walk(ast.parse(answer.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return task in LITERALS
    if task in LITERALS:
        return all(isinstance(node, (*ATOMS, ast.List, ast.Tuple)) for node in nodes)
    return all(map(of_a_formula, nodes))


def of_a_formula(node):
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    return isinstance(node, (*ATOMS, ast.BinOp, ast.operator))
