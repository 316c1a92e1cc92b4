"""A small model for dialogues, made from the pairs alone: nothing is downloaded.

    python cookbook/hh_rlhf/make_model.py train.jsonl.gz [more.jsonl.gz ...] --out runs/hh_rlhf/model

A byte-level BPE tokenizer is trained on the texts, and a small decoder learns to continue the chosen dialogues, so that a
preference method has a reference that knows more than nothing.
"""
from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler

from data_tools import Group, load
from data_tools.encoding import encode
from data_tools.validate import checked

TEMPLATE = ("{% for m in messages %}{{ '\n\nAssistant:' if m['role'] == 'assistant' else '\n\nHuman:' }}"
            "{{ ' ' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}")


def byte_pairs(groups: list[Group], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `size` tokens trained on prompts and responses, with a template for dialogues."""
    parts = (part for group in groups for part in (group.prompt, *(r.text for r in group.responses)))
    texts = (text for part in parts for text in ([part] if isinstance(part, str) else [m["content"] for m in part]))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE)


def decoder(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 48, num_key_value_heads=width // 48, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def chosen(groups: list[Group], tokenizer: PreTrainedTokenizerFast) -> list[torch.Tensor]:
    """The ids of each prompt with its best response, written as training writes them."""
    best = [Group(g.prompt, [g.responses[max(range(len(g.responses)), key=g.relevance.__getitem__)]]) for g in groups]
    return [torch.tensor([*e.prompt, *e.rows[0].tokens]) for e in encode(best, tokenizer)]


def warm_start(model: LlamaForCausalLM, rows: list[torch.Tensor], *, steps: int, batch: int = 8, length: int = 256,
               lr: float = 2e-3, seed: int = 0) -> float:
    """Next-token training on the rows, one after the other in blocks of `length`; returns the mean loss of 10 last steps."""
    if (tokens := sum(map(len, rows))) < length:
        raise ValueError(f"all dialogues together have {tokens} tokens, and a block has {length}: give more dialogues")
    order, blocks, losses = random.Random(seed), torch.empty(0, length, dtype=torch.long), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    for _ in track(range(steps), "warm start"):
        while len(blocks) < batch:                            # another pass over the rows, in another order
            order.shuffle(rows)
            stream = torch.cat(rows)
            blocks = torch.cat([blocks, stream[:len(stream) // length * length].view(-1, length)])
        tokens, blocks = blocks[:batch], blocks[batch:]
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


def make(files: list[str], out: Path, *, vocabulary: int = 4096, width: int = 192, layers: int = 3, steps: int = 300,
         seed: int = 0) -> float:
    """The model and its tokenizer in `out`; the last training loss, in nats per token."""
    torch.manual_seed(seed)
    groups = list(checked(load(files), on_bad="skip"))
    tokenizer = byte_pairs(groups, vocabulary)
    model, rows = decoder(tokenizer, width, layers), chosen(groups, tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(rows):,} dialogues of {sum(map(len, rows)):,} tokens")
    loss = warm_start(model, rows, steps=steps, seed=seed)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="files of pairs, as data.train takes them; never the test file")
    parser.add_argument("--out", type=Path, default=Path("runs/hh_rlhf/model"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()
    print(f"{make(options.files, options.out, steps=options.steps, width=options.width, layers=options.layers):.3f} nats "
          f"per token; the model is in {options.out}")
