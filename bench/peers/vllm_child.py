"""
vLLM's side of `python -m bench rollout --vllm PYTHON`, run by that Python: it imports nothing of ours.

    PYTHON vllm_child.py FOLDER SEQUENCES MAX_LEN

One line of JSON in, {"prompts", "limits"}, one line out, {"tokens", "logprobs", "seconds"};
the first line out, {"ready"}, comes once the engine stands.
It ends with its input.
"""
import json
import os
import sys
import time

# our folder: its kernels.py would be taken for a package of that name
sys.path.pop(0)
# the engine in this process: between two of them every token's numbers are packed and sent
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# GiB for keys and values, where it would take nearly all memory there is: 256 sequences of 600 tokens
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")


def answer(llm, SamplingParams, request):
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    # logprobs=0: of the sampled token alone
    settings = [SamplingParams(temperature=1.0, max_tokens=limit, ignore_eos=True, logprobs=0,
                               detokenize=False) for limit in request["limits"]]
    start = time.perf_counter()
    outputs = llm.generate(prompts, settings, use_tqdm=False)
    seconds = time.perf_counter() - start
    samples = [output.outputs[0] for output in outputs]
    tokens = [list(sample.token_ids) for sample in samples]
    logprobs = [[at[token].logprob for token, at in zip(sample.token_ids, sample.logprobs)]
                for sample in samples]
    return {"tokens": tokens, "logprobs": logprobs, "seconds": seconds}


def main():
    folder, sequences, max_len = sys.argv[1:]
    pipe = os.fdopen(os.dup(1), "w")     # for answers alone: what the engine prints goes to stderr
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams
    llm = LLM(model=folder, skip_tokenizer_init=True, dtype="float32", max_num_seqs=int(sequences),
              max_model_len=int(max_len), enable_prefix_caching=False)
    print(json.dumps({"ready": True}), file=pipe, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(llm, SamplingParams, json.loads(line))), file=pipe, flush=True)


if __name__ == "__main__":
    main()
