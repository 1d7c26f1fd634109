"""
routing.py: why RL of experts weighs whole answers: the router changes its mind (GSPO, arXiv
2507.18071).

In a mixture of experts a token's probability can jump though hardly a weight has moved: another
expert was picked. PPO's ratio is of one token, so it is made of such jumps, and the clip then
decides by luck which tokens learn. GSPO's ratio is of the answer, the geometric mean over its
tokens, where they cancel:

    GRPO    rho_t = pi(y_t) / pi_old(y_t)              clipped at 1 - 0.2, 1 + 0.27, by token
    GSPO    s = exp(mean_t log pi(y_t) / pi_old(y_t))  clipped at 1 - 3e-4, 1 + 4e-4, all or none

The paper: after one update about 10% of the experts that a token meets are others (48 layers,
Qwen3-30B-A3B); GRPO does not converge without replaying the old routes, GSPO does without. Here
both sides compute in fp32 and agree, so the jumps are made: in the trainer the router's logits get
noise of NOISE = 0.15 (they are about 1), fresh in each forward, the sampler's none; "changed" says
how many picks differ. Both algorithms are as in algos.py, with four updates per rollout, no other
weight between sampler and trainer, one rate. Two arms have no noise: what GSPO gains there is not
due to routing. The control has as much noise between sampler and trainer but the same before and
after an update (drawn once, a function of the token's hidden state): that is routing replay; if
GRPO is as good there as without noise, jumps between updates were what hurt.

The start: the base's SwiGLU eight times, moved apart by noise and trained on the base's texts for
100 steps (2 of 8 experts, 1.5M parameters); or your own Qwen3-MoE folder. Test problems were seen
by no arm.

    python -m ideas.routing
    python -m ideas.routing --init DIR --task math500
    python -m bench ideas --names routing
"""
from dataclasses import dataclass, replace

import numpy as np
import torch

from common.evidence import Claim, Idea, begin, finish, needs, picture
from common.experts import Experts
from common.flags import die, flags, positive
from common.hf import find
from common.optim import Optimizer
from evaluate import evaluate, paired
from stages import Settings, advantage, close, collect, learn, next_problems, setup
from train_gpt import GPT, scratch, steps

CLAIM = Claim(paper="2507.18071",
              says="GSPO trains mixtures of experts without replayed routes, GRPO does not",
              measured="accuracy of GSPO against GRPO, both under router noise", smallest=2.0)
# baseline; idea; both without noise; control: noise that an update does not change
ARMS = {"GRPO": ("grpo", "fresh"), "GSPO": ("gspo", "fresh"), "GRPO, no noise": ("grpo", ""),
        "GSPO, no noise": ("gspo", ""), "GRPO, replayed": ("grpo", "fixed")}
HIGH = {"grpo": 0.27, "gspo": 4e-4}      # the paper's, which it chose for either with care
NOISE = 0.15
UPDATES = 4                              # of a rollout
EXPERTS = 8


@dataclass
class Config(Idea):
    task: str = "countdown"              # what is learned
    steps: int = 30                      # rollouts per arm, four updates of each
    prompts: int = 32                    # problems per rollout
    n: int = 8                           # samples of each
    max_new: int = 48                    # tokens of a sample, at most
    lr: float = 1e-3                     # AdamW
    tune: int = 100                      # steps on the base's texts, before all arms
    asked: int = 300                     # test problems at the end, 8 samples each


@dataclass
class Several(Settings):
    minibatch: int = 8                   # groups of an update


# -----------------------------------------------------------------------------
# the noise


class Noisy(Experts):
    """Another block's experts, whose router is noisy where it is trained."""

    def __init__(self, c, experts, kind, seed):
        super().__init__(c)
        self.router = experts.router
        self.gate_up = experts.gate_up
        self.down = experts.down
        self.kind = kind
        self.generator = torch.Generator().manual_seed(seed)
        # a hidden state has about one per number, so its product with this one per expert
        self.fixed = torch.randn(c.n_expert, c.d_model, generator=self.generator) * c.d_model**-0.5
        self.changed = [0, 0]            # picks that the noise changed, and all

    def logits(self, x_TD):
        clean_TE = super().logits(x_TD)
        if torch.is_inference_mode_enabled():                    # the sampler
            return clean_TE
        if self.kind == "fresh":
            noise_TE = torch.randn(clean_TE.shape, generator=self.generator)
        else:
            noise_TE = x_TD.detach() @ self.fixed.t()
        logits_TE = clean_TE + NOISE * noise_TE
        picks = [z.topk(self.active).indices.sort().values for z in (clean_TE, logits_TE)]
        kept = (picks[0].unsqueeze(2) == picks[1].unsqueeze(1)).sum()
        self.changed[0] += picks[0].numel() - int(kept)
        self.changed[1] += picks[0].numel()
        return logits_TE


def make_noisy(model, kind, seed):
    """-> the noisy experts, which took the places of the others; their weights are the same tensors"""
    for i, block in enumerate(model.blocks if kind else ()):
        block.experts = Noisy(model.config, block.experts, kind, seed + 100 * i)
    return [block.experts for block in model.blocks if kind]


# -----------------------------------------------------------------------------
# the start


def upcycled(dense, seed, apart=0.3):
    """-> a mixture of EXPERTS times the dense model's SwiGLU, each moved by a share of its size; with
    apart=0 it is the dense model."""
    c = dense.config
    model = GPT(replace(c, d_ff=2 * c.d_ff, n_expert=EXPERTS, n_active=2)).init_weights(seed)
    known = dense.state_dict()
    model.load_state_dict(known, strict=False)                   # all but the SwiGLU, which has no place
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            for part in ("gate_up", "down"):
                w = known[f"blocks.{i}.{part}.weight"].repeat(EXPERTS, 1)
                moved = apart * w.std() * torch.randn(w.shape, generator=g)
                getattr(block.experts, part).weight.copy_(w + moved)
    return model


def start_of(trial, config):
    """-> the folder that all arms begin with"""
    folder = trial.base()
    model = GPT.from_hf(find(folder))
    if model.config.n_expert:
        return folder
    if config.init:
        die(f"--init {config.init} is no mixture of experts: there is no router whose noise could be studied")
    model = upcycled(model, config.seed)
    _, document = scratch("base", config.seed + 1000)            # texts that the base did not have
    for _ in steps(model, document, Optimizer(model, lr=2e-3), 1 if config.smoke else config.tune):
        pass
    model.save_hf(trial.folder / "experts", document.tok)
    return str(trial.folder / "experts")


# -----------------------------------------------------------------------------
# the trial


def train(arm, start, trial, config):
    algo, kind = ARMS[arm]
    minibatch = max(1, config.prompts // UPDATES)
    settings = trial.settings(algo=algo, clip_high=HIGH[algo], init=start, minibatch=minibatch, tis=0.0)
    rl = setup(Several(**settings), reward=trial.reward)
    noisy = make_noisy(rl.model, kind, config.seed)
    clipped = []
    for step in range(config.steps):
        groups = list(collect(rl, next_problems(rl, config.prompts), config.n))
        for group in groups:
            advantage(group, rl.config)
        stats = learn(rl, groups)
        clipped.append(float(stats.get("clipped", 0)) / max(1, stats.get("tokens", 0)))
        trial.point(arm, step, np.mean([s.reward for group in groups for s in group]))
    asked = rl.task.problems("test", config.asked, config.seed)
    result = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, asked, 8, config.max_new, scores=True)
    close(rl)
    changed, picks = np.sum([e.changed for e in noisy], axis=0) if noisy else (0, 1)
    return result | dict(clipped=np.mean(clipped), changed=changed / max(1, picks))


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps prompts max_new tune asked")
    needs(config.task, "reward", "learning needs one")
    trial = begin(config, __file__, CLAIM, tuple(ARMS), config.steps)
    start = start_of(trial, config)
    results = {arm: train(arm, start, trial, config) for arm in ARMS}
    quiet, _ = paired(results["GSPO, no noise"], results["GRPO, no noise"], "avg")
    replayed, _ = paired(results["GRPO, replayed"], results["GRPO"], "avg")
    shown = ("avg", "clipped", "changed")
    table = {arm: {k: float(result[k]) for k in shown} for arm, result in results.items()}
    picture(trial, x="rollout", y="share of right samples")
    return finish(trial, paired(results["GSPO"], results["GRPO"], "avg"), table,
                  note=f"(without noise {quiet:+.1f}; GRPO gains {replayed:+.1f} where routes are replayed)")


if __name__ == "__main__":
    main()
