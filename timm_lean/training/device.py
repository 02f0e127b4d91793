"""Devices, precision and compilation, checked before a run starts."""
import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so

from timm_lean.errors import LeanError

__all__ = ['autocast', 'check_compiler', 'is_primary', 'lost_processes', 'resolve_device', 'start_distributed']


def resolve_device(name: str = 'auto') -> torch.device:
    """A device by name; 'auto' is CUDA if there is one, else the CPU.

    Raises:
        LeanError: An unknown device or one this machine does not have.
    """
    if name == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError) as e:
        raise LeanError(f"Unknown device {name[:100]!r}. Use 'auto', 'cpu', 'cuda' or 'cuda:N'.") from e
    if device.type == 'cuda':
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise LeanError(f'Device {name!r} was asked for, but torch {torch.__version__} sees {count} CUDA devices '
                            "here. Use --device auto or cpu.")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, NotImplementedError, ImportError, AssertionError) as e:
        raise LeanError(f'Device {name!r} does not compute here with torch {torch.__version__} ({type(e).__name__}). '
                        'Use --device auto or cpu.') from e
    return device


def start_distributed(name: str) -> tuple[torch.device, int, int]:
    """Join the process group if torchrun started several processes.

    Returns:
        Device, rank and number of processes.
    """
    device = resolve_device(name)
    if int(os.environ.get('WORLD_SIZE', '1')) < 2:
        return device, 0, 1
    info = init_distributed_device_so(device=device.type)
    return torch.device(info['device']), info['global_rank'], info['world_size']


def is_primary() -> bool:
    """Whether this process is the one of several that speaks."""
    return int(os.environ.get('RANK', '0')) == 0


@contextlib.contextmanager
def lost_processes(world: int) -> Iterator[None]:
    """Turn the failures of communication that the end of another process causes into one line."""
    try:
        yield
    except RuntimeError as e:
        if world > 1 and (isinstance(e, dist.DistError) or 'gloo' in str(e) or 'NCCL' in str(e)):
            raise LeanError('Another process of this run has ended, so this one stops too; what that one printed says '
                            'why. The last completed save is kept: continue it by --resume.') from e
        raise


def autocast(device: torch.device, amp: str) -> Any:
    """Mixed precision context for 'bf16' or 'fp16', none for ''."""
    if not amp:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={'bf16': torch.bfloat16, 'fp16': torch.float16}[amp])


def check_compiler(device: torch.device) -> None:
    """Raise a LeanError if torch.compile could not build its kernels on this machine."""
    names = [os.environ.get('CXX', ''), 'c++', 'g++', 'clang++', 'cl']
    if not any(shutil.which(name) for name in names if name):
        raise LeanError('--compile needs a C++ compiler, and none of c++, g++, clang++ is on the PATH. '
                        'Install one (e.g. the package g++) or drop --compile.')
    if device.type == 'cuda' and importlib.util.find_spec('triton') is None:
        raise LeanError('--compile on a GPU needs triton. Install it or drop --compile.')
