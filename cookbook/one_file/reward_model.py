"""A Bradley-Terry reward model in one flat file: torch and transformers, nothing else. Read it from top to bottom.

    python cookbook/one_file/reward_model.py                    a tiny model made here, on three toy pairs
    python cookbook/one_file/reward_model.py --model MODEL --pairs pairs.jsonl

A model is a folder or hub id, a pair {"prompt", "chosen", "rejected"}.

The same batch gives the same loss and the same gradients as `recipe: bradley_terry` of the library (tests/test_cookbook.py),
which adds what a real run needs: micro-batches, adapters, ties and lists, evaluation, checkpoints, several processes.
"""
import argparse
import json
import pathlib
import random

import torch
import torch.nn.functional as F

TOY = [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
       {"prompt": "The sky is", "chosen": " blue", "rejected": " a kind of cheese"},
       {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " No."}]


# 1. Data: a prompt with two answers, as token ids. Prompt and answer are tokenised apart, so that no token joins them, and
#    the answer ends with the end token, where the reward will be read.
def encode(pair, tokenizer):
    prompt = tokenizer(pair["prompt"])["input_ids"]
    return [prompt + tokenizer(pair[side], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            for side in ("chosen", "rejected")]


# 2. A batch: rows 0, 2, 4, ... are chosen, rows 1, 3, 5, ... rejected. Padding goes to the right, where a causal model never
#    looks, so that `last`, the place of the last token, is all that has to be remembered.
def collate(pairs, tokenizer):
    rows = [row for pair in pairs for row in encode(pair, tokenizer)]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for n, row in enumerate(rows):
        tokens[n, :len(row)] = torch.tensor(row)
    return tokens, torch.tensor([len(row) - 1 for row in rows])


# 3. The reward of an answer: one number, a linear head on the hidden state of its last token. `model` is a transformers model
#    for sequence classification with one label; its body is `base_model`, its head `score`.
def rewards(model, tokens, last):
    states = model.base_model(input_ids=tokens).last_hidden_state
    return model.score(states[torch.arange(len(tokens)), last]).squeeze(-1)


# 4. The loss: P(chosen preferred) = sigmoid(r_chosen - r_rejected), and its negative log-likelihood. Equal rewards cost log 2.
#
#        L = -log sigmoid(r_chosen - r_rejected),   mean over pairs
#
#    Only differences count: adding a number to all rewards changes nothing.
def bradley_terry_loss(model, tokens, last):
    r = rewards(model, tokens, last)
    chosen, rejected = r[0::2], r[1::2]
    return -F.logsigmoid(chosen - rejected).mean(), (chosen > rejected).float().mean()


# 5. The loop.
def train(model, tokenizer, pairs, *, lr=1e-5, batch=8, epochs=1, seed=0):
    model.eval()                                              # without dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    order, step = random.Random(seed), 0
    for _ in range(epochs):
        order.shuffle(pairs := list(pairs))
        for start in range(0, len(pairs), batch):
            loss, accuracy = bradley_terry_loss(model, *collate(pairs[start:start + batch], tokenizer))
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            print(f"step {step:4d}   loss {loss.item():.4f}   accuracy {accuracy.item():.2f}   gradient {norm.item():.3f}")


# 6. Where there is no model: two layers with random weights, and one token per byte.
def tiny():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
    words = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_labels=1,
                         num_attention_heads=4, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    return LlamaForSequenceClassification(config), PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def main():
    parser = argparse.ArgumentParser(description="A Bradley-Terry reward model in one flat file")
    parser.add_argument("--model", help="folder or hub id of a language model; a tiny one is made without it")
    parser.add_argument("--pairs", help='jsonl file of {"prompt": ..., "chosen": ..., "rejected": ...}')
    parser.add_argument("--out", help="folder for the trained model")
    parser.add_argument("--lr", type=float, help="1e-5, and 1e-3 for the tiny model")
    parser.add_argument("--batch", type=int, default=8, help="pairs of an optimiser step")
    parser.add_argument("--epochs", type=int, help="1, and 20 for the toy pairs")
    options = parser.parse_args()
    if options.model:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:
        model, tokenizer = tiny()
    lines = pathlib.Path(options.pairs).read_text(encoding="utf-8").splitlines() if options.pairs else []
    pairs = [json.loads(line) for line in lines] or TOY
    train(model, tokenizer, pairs, lr=options.lr or (1e-5 if options.model else 1e-3), batch=options.batch,
          epochs=options.epochs or (1 if options.pairs else 20))
    if options.out:
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
