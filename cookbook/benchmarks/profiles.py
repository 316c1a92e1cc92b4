"""Where the time of our steps goes: by function of prefopt and PyTorch (cProfile), and by operation (torch.profiler)."""
from __future__ import annotations

import cProfile
import io
import pstats
import tempfile
import time
from pathlib import Path

from bench import Clock, Job, on_gpu


class Profile(Clock):
    """Functions in every step but the first and the last, operations in the last."""

    def __init__(self, steps: int):
        from torch.profiler import ProfilerActivity, profile
        super().__init__()
        self.left = steps + 1
        self.functions = cProfile.Profile(time.perf_counter if on_gpu() else time.process_time)
        self.operations = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu(), record_shapes=True)

    def step(self, *_, **__) -> None:
        self.functions.disable()
        super().step()
        self.left -= 1
        if self.left == 1:
            self.operations.start()
        elif self.left:
            self.functions.enable()
        else:
            self.operations.stop()


def profiled(job: Job, assets: Path) -> str:
    """Our side of a job, under both profilers."""
    clock, out = Profile(job.sizes.steps), io.StringIO()
    with tempfile.TemporaryDirectory(dir=assets) as own:
        list(job.sides.values())[1](job.sizes, assets, Path(own), clock)
    out.write(f"{clock.medians()}; functions of {job.sizes.steps - 1} steps, operations of one\n\n")
    pstats.Stats(clock.functions, stream=out).strip_dirs().sort_stats("cumulative").print_stats(60)
    by = "self_device_time_total" if on_gpu() else "self_cpu_time_total"
    for shapes in (False, True):
        out.write(clock.operations.key_averages(group_by_input_shape=shapes).table(by, row_limit=20, max_name_column_width=50,
                                                                                   max_shapes_column_width=90))
    return out.getvalue()
