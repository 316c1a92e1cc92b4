"""GRPO in one flat file: torch and transformers, nothing else. Read it from top to bottom.

    python cookbook/one_file/grpo.py                                       a tiny model made here learns to say "ok"
    python cookbook/one_file/grpo.py --model MODEL --prompts prompts.jsonl   a folder or hub id; {"prompt", "answer"}

The same rollout gives the same loss and the same gradients as `recipe: grpo` of the library (tests/test_cookbook.py), which
adds what a real run needs: engines, token budgets, a KL to a reference, several updates and processes, rewards with limits,
checkpoints.
"""
import argparse
import json
import pathlib
import random

import torch

TOY = [{"prompt": f"Is {n} a number? ", "answer": "ok"} for n in range(10)]


# 1. The reward: a number for a response. Any function will do; this one is the share of letters that are where the answer has
#    them, so that saying more than the answer costs something.
def reward(response, example):
    answer = example["answer"]
    return sum(a == b for a, b in zip(response, answer, strict=False)) / max(len(response), len(answer))


# 2. A rollout: k responses to each prompt, sampled at temperature 1. `mask` is 1 on response tokens up to the end token, which
#    counts: stopping is learnt too. Prompts are padded on the left, so that all responses begin at the same place.
@torch.no_grad()
def rollout(policy, tokenizer, examples, k, length):
    prompts = [tokenizer(e["prompt"])["input_ids"] for e in examples for _ in range(k)]
    width, end = max(map(len, prompts)), tokenizer.eos_token_id
    attend = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    tokens = torch.tensor([[end] * (width - len(p)) + p for p in prompts])
    tokens = policy.generate(tokens, attention_mask=attend, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                             max_new_tokens=length, eos_token_id=end, pad_token_id=end)
    answer = tokens[:, width:]
    mask = ((answer == end).cumsum(1) - (answer == end).int() == 0)               # up to the first end token
    texts = [tokenizer.decode(a[m], skip_special_tokens=True) for a, m in zip(answer, mask, strict=True)]
    rewards = torch.tensor([reward(t, examples[n // k]) for n, t in enumerate(texts)])
    attend = torch.cat([attend, mask.int()], 1)
    mask = torch.cat([torch.zeros(len(tokens), width, dtype=torch.bool), mask], 1)
    return {"tokens": tokens, "attend": attend, "mask": mask, "reward": rewards, "group": torch.arange(len(prompts)) // k}, texts


# 3. log pi of every token given all before it. The logits at place t predict the token at t + 1, hence the shift. Positions count
#    from the first real token.
def token_logp(model, tokens, attend):
    position = (attend.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=tokens, attention_mask=attend, position_ids=position).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return torch.cat([torch.zeros(len(tokens), 1, dtype=logp.dtype), logp], 1)


# 4. The advantage: how much better a response is than the others to the same prompt, in standard deviations (of a sample, hence
#    n - 1). Where all are equally good there is nothing to learn.
def advantages(reward, group, eps=1e-6):
    out = torch.zeros_like(reward)
    for g in group.unique():
        r = reward[group == g]
        if len(r) > 1 and r.max() > r.min():
            out[group == g] = (r - r.mean()) / (r.std() + eps)
    return out


# 5. The loss. r = pi / pi_old is 1 until the policy has moved; clipping ends the gain of moving it further than that.
#
#        J = mean over responses of the mean over tokens of min(r A, clip(r, 1 - low, 1 + high) A)
def grpo_loss(logp, logp_old, mask, advantage, low=0.2, high=0.2):
    ratio = torch.where(mask, logp - logp_old, 0.0).exp()
    a = advantage[:, None]
    gain = torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a) * mask
    return -(gain.sum(1) / mask.sum(1).clamp(min=1)).mean()


# 6. The loop: sample, score, update, again. `updates` of one rollout are off-policy from the second on, which is what the ratio
#    is for. Dropout is off, so that the policy that samples is the one that trains.
def train(policy, tokenizer, examples, *, k=8, batch=4, length=8, steps=60, updates=1, lr=1e-6, seed=0):
    torch.manual_seed(seed)
    policy.eval()
    optimizer, order = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0), random.Random(seed)
    for step in range(1, steps + 1):
        asked = order.sample(examples, min(batch, len(examples)))
        found, texts = rollout(policy, tokenizer, asked, k, length)
        advantage, old = advantages(found["reward"], found["group"]), None
        for _ in range(updates):
            logp = token_logp(policy, found["tokens"], found["attend"])
            old = logp.detach() if old is None else old
            loss = grpo_loss(logp, old, found["mask"], advantage)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        print(f"step {step:4d}   reward {found['reward'].mean():.3f}   gradient {norm:.3f}   {texts[0]!r}")
    return float(found["reward"].mean())


# 7. Where there is no model: two layers with random weights, and one token per letter.
def tiny():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    words = ["<eos>", *" ?0123456789Iabekmnorsu"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, bos_token_id=None, eos_token_id=0)
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def main():
    parser = argparse.ArgumentParser(description="GRPO in one flat file")
    parser.add_argument("--model", help="folder or hub id of a causal language model; a tiny one is made without it")
    parser.add_argument("--prompts", help='jsonl file of {"prompt": ..., "answer": ...}')
    parser.add_argument("--out", help="folder for the trained model")
    parser.add_argument("--lr", type=float, help="1e-6, and 5e-3 for the tiny model")
    parser.add_argument("--k", type=int, default=16, help="responses to a prompt")
    parser.add_argument("--batch", type=int, default=4, help="prompts of a step")
    parser.add_argument("--length", type=int, help="tokens of a response at most; 256, and 8 for the tiny model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--updates", type=int, default=1, help="optimiser steps of a rollout")
    options = parser.parse_args()
    if options.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        policy = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:
        policy, tokenizer = tiny()
    lines = pathlib.Path(options.prompts).read_text(encoding="utf-8").splitlines() if options.prompts else []
    train(policy, tokenizer, [json.loads(line) for line in lines] or TOY, k=options.k, batch=options.batch,
          length=options.length or (256 if options.model else 8), steps=options.steps, updates=options.updates,
          lr=options.lr or (1e-6 if options.model else 5e-3))
    if options.out:
        policy.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
