"""Memory that a piece of work takes while it runs."""
import os
from collections.abc import Callable
from typing import Any

import torch

__all__ = ['peak_memory']


def peak_memory(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that were allocated at once while `work` ran, beyond what was allocated before.

    On a GPU as its allocator counts, otherwise as torch's profiler sees the allocations of tensors.
    """
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # CUDA builds complain on stderr where there is no GPU
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        work()
    live = peak = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == '[memory]':
            live += event.nbytes()
            peak = max(peak, live)
    return peak
