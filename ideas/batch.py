"""
batch.py: begin with small batches and double them as training goes (critical batch size revisited,
2505.23971).

How large may a batch be before a token teaches less? Asked directly: from a checkpoint, forks train
on the same text with batches k times as large and a rate sqrt(k) times as high, warmed up again and
with an optimizer that begins anew. The critical batch size (CBS) is the largest that ends no worse
than all smaller ones. It is near zero at the start of training, rises, and stays; so

    batch     16 16 16 16 16 16 | 32 32 32 | 64          a third of the text each, the rate sqrt(2) higher at
                                                         each doubling: 350 steps instead of 600

The paper: OLMo 1B with batch warm-up ends slightly lower than the original run, in 43% fewer steps.
It smooths the training loss of its forks; its window and tolerance are chosen by eye, so here forks
are compared on held-out windows, and 0.01 nats are no difference. "As low with fewer steps" is a
claim that nothing is lost: the gain is what is left of an allowance of 0.02 nats. The control is
the same schedule backwards, 64, 32, 16: as many steps on as much text. `large` has batches of 64
from the start. Here: 0.16M parameters, AdamW, bytes of Python's own library; all arms read the same
text in the same order.

    python -m ideas.batch
    python -m bench ideas --names batch
"""
from dataclasses import dataclass, replace

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from data.documents import Documents
from train_gpt import evaluate, scratch, steps, trapezoid

CLAIM = Claim(paper="2505.23971", says="batch warm-up: 43% fewer steps, a slightly lower loss, OLMo 1B",
              measured="what is left of an allowance of 0.02 nats, in 42% fewer steps", smallest=1.0,
              unit="0.01 nats")
ARMS = {"small": (1, 1, 1), "warm-up": (1, 2, 4), "backwards": (4, 2, 1), "large": (4, 4, 4)}
ALLOWED = 2.0                            # 0.01 nats
LR = 1e-2                                # of the smallest batches
FORKS = (1, 2, 4, 8)
SHARE = 12                               # a fork reads this part of the text: 48 steps of 16, 24 of 32, ...
EQUAL = 0.01                             # nats that count as no difference between forks
PANEL = "CBS"


@dataclass
class Config(Idea):
    steps: int = 600                     # of the arm `small`
    batch: int = 16                      # windows of 128 bytes in its batches
    asked: int = 512                     # windows of 128 bytes for the losses


# -----------------------------------------------------------------------------
# the idea


def windows(steps, config):
    """-> what so many of the smallest batches hold, rounded to the largest fork's: read whole by all"""
    most = FORKS[-1]
    return max(1, steps // most) * most * config.batch


def in_batches(document, batch):
    return Documents(document.read, replace(document.config, batch=batch), document.tok)


def stretch(model, document, optimizer, k, batch, first, last, total):
    """-> (windows read, loss) after each step over the windows first .. last of `total`, in batches k times
    as large as `batch`. The rate follows the text that was read, times the root of k."""
    batch *= k

    def rate(step):
        return k**0.5 * trapezoid(step * batch, total, document.config)

    batches = in_batches(document, batch)
    for step, loss in steps(model, batches, optimizer, last // batch, begin=first // batch, schedule=rate):
        yield step * batch, loss


def critical(losses):
    """losses: {k: loss}, k rising -> the largest k that is no worse than all smaller ones"""
    found = min(losses)
    for k in sorted(losses):
        if losses[k] > min(losses[j] for j in losses if j <= k) + EQUAL:
            break
        found = k
    return found


# -----------------------------------------------------------------------------
# the trial


def begun(config, weights=None):
    model, document = scratch("tiny", config.seed)
    document.config.eval_docs = config.asked
    if weights:
        model.load_state_dict(weights)
    return model, document


def fork(weights, k, config, first):
    """-> the loss after a fork's text"""
    model, document = begun(config, weights)
    batch = config.batch * k
    total = windows(config.steps // SHARE, config) // batch
    warmup = max(1, total // 5)

    def rate(step):
        return min(1.0, (step + 1 - first // batch) / warmup)

    document = in_batches(document, batch)
    optimizer = Optimizer(model, lr=LR * k**0.5)
    start = first // batch
    list(steps(model, document, optimizer, start + total, begin=start, schedule=rate))
    return evaluate(model, document)["loss"]


def train(arm, trial, config, keep=()):
    """-> the result, and the weights after each number of windows in `keep`"""
    model, document = begun(config)
    optimizer = Optimizer(model, lr=LR)
    third = windows(config.steps // 3, config)
    kept = {}
    taken = 0
    for i, k in enumerate(ARMS[arm]):
        part = i * third, (i + 1) * third, 3 * third
        for read, loss in stretch(model, document, optimizer, k, config.batch, *part):
            taken += 1
            trial.dot("", arm, read, loss)
            trial.bar.update(k * config.batch)
            if read in keep:
                kept[read] = {name: w.clone() for name, w in model.state_dict().items()}
    return dict(evaluate(model, document), steps=taken), kept


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked batch")
    from_scratch(config)
    third = windows(config.steps // 3, config)
    trial = begin(config, __file__, CLAIM, tuple(ARMS), 3 * third)
    early = windows(config.steps // 10, config)
    late = third
    results = {}
    results["small"], kept = train("small", trial, config, keep=(early, late))
    for arm in list(ARMS)[1:]:
        results[arm], _ = train(arm, trial, config)
    sizes = []
    for when, weights in kept.items():
        losses = {k: fork(weights, k, config, when) for k in FORKS}
        for k, loss in losses.items():
            trial.dot(PANEL, f"after {when} windows", config.batch * k, loss - losses[1])
        sizes.append(f"{config.batch * critical(losses)} after {when}")
    cost = {arm: 100 * (results[arm]["loss"] - results["small"]["loss"]) for arm in ARMS}
    picture(trial, x="windows of 128 bytes read", y="loss, nats per byte",
            **{PANEL: ("batch of the fork", "loss above the fork of 16")})
    note = (f"(above small: backwards {cost['backwards']:+.1f}, large {cost['large']:+.1f}; "
            f"critical batch {', '.join(sizes)} windows)")
    return finish(trial, (ALLOWED - cost["warm-up"], 0.0), results, note=note)


if __name__ == "__main__":
    main()
