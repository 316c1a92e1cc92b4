"""DPO in one flat file: torch and transformers, nothing else. Read it from top to bottom.

    python cookbook/one_file/dpo.py                                     a tiny model made here, on three toy pairs
    python cookbook/one_file/dpo.py --model MODEL --pairs pairs.jsonl   a folder or hub id; {"prompt", "chosen", "rejected"}

The same batch gives the same loss and the same gradients as `recipe: dpo` of the library (tests/test_cookbook.py), which
adds what a real run needs: micro-batches, adapters, cached references, evaluation, checkpoints, several processes.
"""
import argparse
import copy
import json
import pathlib
import random

import torch
import torch.nn.functional as F

TOY = [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
       {"prompt": "The sky is", "chosen": " blue", "rejected": " a kind of cheese"},
       {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " No."}]


# 1. Data: a prompt with two answers, as token ids. Prompt and answer are tokenised apart, so that no token joins them, and
#    the answer ends with the end token, so that stopping is learnt too.
def encode(pair, tokenizer):
    prompt = tokenizer(pair["prompt"])["input_ids"]
    answers = [tokenizer(pair[side], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
               for side in ("chosen", "rejected")]
    return [(prompt, answer) for answer in answers]


# 2. A batch: rows 0, 2, 4, ... are chosen, rows 1, 3, 5, ... rejected. `mask` is 1 on the tokens of the answers. Padding
#    goes to the right, where a causal model never looks.
def collate(pairs, tokenizer):
    rows = [row for pair in pairs for row in encode(pair, tokenizer)]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for n, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        tokens[n, :end] = torch.tensor(prompt + answer)
        mask[n, len(prompt):end] = True
    return tokens, mask


# 3. log pi(answer | prompt): each token's log-probability given all before it, summed over the answer. The logits at place t
#    predict the token at t + 1, hence the shift.
def answer_logp(model, tokens, mask):
    logits = model(input_ids=tokens).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return (logp * mask[:, 1:]).sum(-1)


# 4. The loss. The implicit reward of an answer is beta (log pi - log pi_ref); it should be higher for the chosen one:
#
#        L = -log sigmoid(reward_chosen - reward_rejected),   mean over pairs
#
#    At the start pi = pi_ref, so that L = log 2.
def dpo_loss(policy, reference, tokens, mask, beta):
    with torch.no_grad():
        reference_logp = answer_logp(reference, tokens, mask)
    reward = beta * (answer_logp(policy, tokens, mask) - reference_logp)
    chosen, rejected = reward[0::2], reward[1::2]
    return -F.logsigmoid(chosen - rejected).mean(), (chosen > rejected).float().mean()


# 5. The loop. The reference is a copy of the policy as it was, and dropout is off, so that the two agree at the start.
def train(policy, tokenizer, pairs, *, beta=0.1, lr=1e-6, batch=8, epochs=1, seed=0):
    reference = copy.deepcopy(policy).eval()
    policy.eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    order, step = random.Random(seed), 0
    for _ in range(epochs):
        order.shuffle(pairs := list(pairs))
        for start in range(0, len(pairs), batch):
            tokens, mask = collate(pairs[start:start + batch], tokenizer)
            loss, accuracy = dpo_loss(policy, reference, tokens, mask, beta)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            step += 1
            print(f"step {step:4d}   loss {loss.item():.4f}   accuracy {accuracy.item():.2f}   gradient {norm.item():.3f}")


# 6. Where there is no model: two layers with random weights, and one token per byte.
def tiny():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    words = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, bos_token_id=None, eos_token_id=0)
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def main():
    parser = argparse.ArgumentParser(description="DPO in one flat file")
    parser.add_argument("--model", help="folder or hub id of a causal language model; a tiny one is made without it")
    parser.add_argument("--pairs", help='jsonl file of {"prompt": ..., "chosen": ..., "rejected": ...}')
    parser.add_argument("--out", help="folder for the trained model")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--lr", type=float, help="1e-6, and 1e-3 for the tiny model")
    parser.add_argument("--batch", type=int, default=8, help="pairs of an optimiser step")
    parser.add_argument("--epochs", type=int, help="1, and 20 for the toy pairs")
    options = parser.parse_args()
    if options.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        policy = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:
        policy, tokenizer = tiny()
    lines = pathlib.Path(options.pairs).read_text(encoding="utf-8").splitlines() if options.pairs else []
    pairs = [json.loads(line) for line in lines] or TOY
    train(policy, tokenizer, pairs, beta=options.beta, lr=options.lr or (1e-6 if options.model else 1e-3),
          batch=options.batch, epochs=options.epochs or (1 if options.pairs else 20))
    if options.out:
        policy.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
