"""
What a piece of work costs, on any machine and beside any other: not in seconds, but in units, a fixed
piece of work that is timed in the same moment. Both by the clock of this process, which stands still
while others compute.
"""
import time


def seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def unit():
    """a hundredth of a second on a fast core: dictionaries, strings and integers, as a checker uses"""
    counts = {}
    for i in range(25_000):
        word = str(i * i)[:3]
        counts[word] = counts.get(word, 0) + len(word.strip("1"))
    return counts


def units(work):
    """how many units the work costs, beside the quickest of some before it and after it"""
    before = [seconds(unit) for _ in range(3)]
    cost = seconds(work)
    return cost / min(before + [seconds(unit) for _ in range(3)])
