"""
moved.py: names that left a file, and where they are now: one page for all files. A file ends with

    __getattr__ = moved(__name__)

and a fork that imports an old name from there gets an ImportError that names its new place. This file
imports nothing of ours.
"""
import opcode
import sys

# file -> {name: "the.place"}, or "the.place:new_name"; what has no new name: "= what to write instead"
MOVED = {
    "algos": dict(
        address="algos:key", aggregated="algos:weigh", by_address="algos:by_key",
        predicting="= batch.hidden(model)", covariant="common.entropy",
        **dict.fromkeys(("check_updates", "filled_in", "several_updates", "unused", "with_algorithm",
                         "DEFAULTS"), "common.axes"),
    ),
    "common.run": dict(
        flags="common.flags", positive="common.flags", check_name="common.flags", check_day="common.flags",
        GONE="common.watch", ONE="common.cpu:ONE_THREAD", times="common.cpu:matmul_t",
        spare="common.cpu:spare_rows", begun_with="common.run:threads_of_resumed",
        dated="common.run:with_date",
    ),
    "nanorl": dict(
        ALGORITHMS="algos", BASELINES="algos", RATIOS="algos", TRUSTS="algos", AGGREGATES="algos",
        address="algos:key", covariant="common.entropy", make_loss="algos",
        predicting="= batch.hidden(model)",
        with_algorithm="common.axes", stored="algos:by_key", elapsed="stages",
        accumulate="stages:back_propagate",
        backward="stages:back_propagate", everyone="stages:gather_groups", test="stages:evaluation",
        together="common.metrics:merge_stats", score="stages:old_logprobs", stream="tail:learn_early",
        rehearse="common.memory:trial_update", budget="common.memory:fixed",
        fullest="common.memory:fullest_row", CLOCKS="common.metrics", recent="common.metrics",
        repeats="common.metrics", varied="common.metrics", next_round="tail:Rounds",
        groups_of="tail:sample_step", collect_round="tail", HARDWARE="nanorl:RECIPES",
    ),
    "opd_check": {
        **dict.fromkeys(("MEASURES", "EDGES", "PROBED", "log_softmax", "in_top", "compare", "places",
                         "repeated", "disagreement", "by_sample", "pulls_of", "diagnosis", "rising",
                         "guard"), "common.overlap"),
        **dict.fromkeys(("PROBES", "token_bytes", "chat_differs", "read_gold", "privileged"),
                        "common.teacher"),
    },
    "pack": dict(
        Launch="tail", Round="tail", Rounds="tail", in_order="tail:Race", as_they_come="tail:Race",
        longer="common.metrics:kaplan_meier", selected="common.metrics:length_bias",
    ),
    "rollout": dict(
        Deal="common.deal:SharedPrompts", Slab="common.slabs", causal="common.slabs", calls="common.deal",
        Row="rollout:Sequence", PAGE="common.pages", Columns="rollout:Batch",
    ),
    "stages": dict(
        backward="stages:back_propagate", backward_share="stages:back_propagate",
        accumulate="stages:back_propagate",
        ask_rewards="stages:get_rewards", take_rewards="stages:get_rewards", test="stages:evaluation",
        micro_batches="pack:batches", aggregated="algos:weigh", address="algos:key",
        predicting="= batch.hidden(model)", find_base="train_gpt:train_missing",
        new_optimizer="common.memory", reset="nanorl", check_memory="common.memory:check_flags",
    ),
    "tail": dict(
        kaplan_meier="common.metrics", length_bias="common.metrics", median="common.metrics",
        shared_counter="common.deal",
    ),
    "train_gpt": dict(
        last_checkpoint="common.run:Run",
        mfu="common.machine", rope_frequencies="common.hf",
    ),
    "ttrl": dict(
        compare_runs="common.view",
        Graders="common.reward", ended_runs="common.files", in_metrics="common.view:has",
        test="ttrl:evaluation",
    ),
}


def moved(module):
    """-> the __getattr__ of a module. `from module import name` says where the name is. Such an import
    hides the words of an AttributeError, so it gets an ImportError; everything else (module.name,
    hasattr) gets an AttributeError with the same words."""
    def __getattr__(name):
        place = MOVED[module].get(name)
        if not place:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, renamed = place.partition(":")
        message = f"{module}.{name} moved to {place}: from {place} import {renamed or name}"
        if place.startswith("= "):
            message = f"{module}.{name} is gone: write {place[2:]}"
        caller = sys._getframe(1)
        importing = opcode.opname[caller.f_code.co_code[caller.f_lasti]] == "IMPORT_FROM"
        raise ImportError(message) if importing else AttributeError(message)

    return __getattr__
