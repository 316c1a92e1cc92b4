"""The model, made on the spot: a small decoder that learns to answer like the careless writer."""
from __future__ import annotations

import random

import torch
from rich.progress import track
from task import Problem, Table, careless, problem
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler


def small_model(tokenizer: PreTrainedTokenizerFast, width: int = 128) -> LlamaForCausalLM:
    """Two layers, four heads; 337,280 parameters."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def demonstrations(tokenizer: PreTrainedTokenizerFast, asked: list[Problem],
                   rng: random.Random) -> dict[str, torch.Tensor]:
    """Problems with the careless writer's answers; the loss is on the answer and its end."""
    answers = [careless(one, rng) + " <eos>" for one in asked]
    batch = tokenizer([f"{one.prompt} {answer}" for one, answer in zip(asked, answers, strict=True)], padding=True,
                      padding_side="right", return_tensors="pt", return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :len(tokenizer(asked[0].prompt)["input_ids"])] = -100   # prompts are equally long
    return {**batch, "labels": labels}


def warm_up(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, table: Table, *, steps: int, batch: int,
            lr: float, seed: int) -> None:
    """Plain supervised fine-tuning on new problems, in place: 20 steps up, and down to zero over the last 30 %."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98))
    scheduler = get_scheduler("warmup_stable_decay", optimizer, num_warmup_steps=20, num_training_steps=steps,
                              scheduler_specific_kwargs={"num_decay_steps": int(0.3 * steps), "decay_type": "linear"})
    model.train()
    for _ in track(range(steps), "warm-up"):
        asked = [problem(rng, table) for _ in range(batch)]
        loss = model(**demonstrations(tokenizer, asked, rng)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
