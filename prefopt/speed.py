"""How fast a run is: tokens that were computed, tokens that sharing and packing saved, and the share of a GPU's peak."""
from __future__ import annotations

from dataclasses import dataclass, field

import torch

from prefopt.models import Models, Trunk

# dense matrix products in bfloat16, 10^12 operations a second, as the makers state them; the first that fits counts
PEAKS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "GH200": 989, "A100": 312, "A800": 312,
         "L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A10": 125, "A6000": 155, "RTX 5090": 210, "RTX 4090": 165,
         "RTX 3090": 71, "MI300X": 1307, "MI250X": 383}


def peak(device: torch.device) -> float | None:
    """Operations a second of a device in bfloat16, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for kind, peak in PEAKS.items() if kind in name), None)


def operations(trunk: Trunk) -> float:
    """Operations of all passes of a model so far: 2 for each weight and token forward, 4 more where there was a gradient.

    Scores of attention do not count, and what gradient checkpointing computes again does not either.
    """
    body = sum(p.numel() for p in trunk.body.parameters()) - trunk.vocabulary * trunk.width
    calls = trunk.calls
    learned = calls["trained"] / max(calls["tokens"], 1)
    met = body * calls["tokens"] - trunk.end_size * calls["unread"] + trunk.output_size * calls["positions"]
    return 2 * met * (1 + 2 * learned)


@dataclass
class Meter:
    """What the models of a run have computed, step by step."""
    models: Models
    device: torch.device
    tokens: int = 0                                           # real tokens of all rows, prompts once per row
    seconds: float = 0.0
    before: dict = field(default_factory=dict)

    def step(self, tokens: int, seconds: float) -> dict[str, float]:
        """One step's figures, for the timing file."""
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        now = self.counted()
        found = {key: now[key] - self.before.get(key, 0) for key in now}
        self.before = now
        return {"tokens": tokens, "seconds": seconds, **found}

    def counted(self) -> dict[str, int]:
        """Tokens through the bodies of all models, and how many the padded layout would have had."""
        return {"computed": sum(t.calls["tokens"] for t in self.trunks), "padded": sum(t.calls["rectangle"] for t in self.trunks)}

    @property
    def trunks(self) -> list[Trunk]:
        return [t for t in (self.models._policy, self.models._reference, self.models._critic) if t is not None]

    def summary(self) -> str:
        """The run so far in a line, of this process."""
        if not self.seconds:
            return ""
        now, plain = self.counted(), self.models.policy_model().plain
        said = f"{self.tokens / self.seconds:,.0f} tokens/s"
        if now["padded"] > now["computed"]:
            said += f"; packed rows with shared prompts computed {now['computed'] / now['padded']:.0%} of the padded tokens"
        if plain:
            said += f"; rows are not packed: {plain}"
        if most := peak(self.device):
            reached = sum(map(operations, self.trunks)) / self.seconds
            said += f"; {reached / most:.1%} of the peak of {most / 1e12:,.0f} TFLOP/s (MFU)"
        return said
