"""One thread, so that small tensors are not slowed down by a pool."""
import torch

torch.set_num_threads(1)
