"""The last look at a config before a Runner is built from it."""
from collections.abc import Sequence

import torch
from mmengine.config import Config, ConfigDict

from .checks import check_settings
from .data import check_data

__all__ = ['prepare']


def prepare(cfg: Config, splits: Sequence[str]) -> None:
    """Check a config's settings and data and fit it to this machine, in place.

    Raises:
        LeanError: A setting is out of range, or annotations are missing, damaged or do not fit the config.
    """
    check_settings(cfg, splits)
    check_data(cfg, splits)
    if torch.cuda.is_available():
        return
    if (cfg.get('optim_wrapper') or {}).get('type') == 'AmpOptimWrapper':
        print('No GPU: training in full precision (MMEngine has no AMP on CPUs).', flush=True)
        cfg.optim_wrapper = ConfigDict({
            **{k: v for k, v in cfg.optim_wrapper.items() if k not in ('loss_scale', 'dtype', 'use_fsdp')},
            'type': 'OptimWrapper'})
    if cfg.get('launcher', 'none') == 'pytorch':
        # MMEngine would choose a CUDA device for the process
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group('gloo')
        cfg.setdefault('model_wrapper_cfg', dict(
            type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False)))
