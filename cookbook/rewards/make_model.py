"""The small language model that the trained rewards here start from: random weights, and a tokenizer of the texts beside it.

    python -m cookbook.rewards.make_model [OUT]
"""
import sys
from pathlib import Path

import torch

from cookbook.hh_rlhf.make_model import byte_pairs, decoder
from data_tools import load

out = sys.argv[1] if len(sys.argv) > 1 else "runs/rewards/model"
tokenizer = byte_pairs(list(load([str(path) for path in sorted(Path(__file__).parent.glob("*.jsonl"))])), 600)
torch.manual_seed(0)
model = decoder(tokenizer, width=48, layers=2)
model.save_pretrained(out)
tokenizer.save_pretrained(out)
print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, in {out}")
