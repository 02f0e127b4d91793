"""`timm-lean share`: convert a network to shared bases, and say what it cost and saved."""
import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from timm.models import get_model_input_config

from timm_lean.checkpoint.files import output_file
from timm_lean.checkpoint.format import load_any, save_model
from timm_lean.errors import LeanError
from timm_lean.sharing.convert import share

__all__ = ['share_command']

_CALIBRATION_IMAGES = 1024


def share_command(args: argparse.Namespace) -> None:
    """Run `timm-lean share`.

    Args:
        args: `model`, `output`, `params`, `energy`, `shared_rank`, `unique_rank`, `dual`, `bn`, `stages`,
            `include`, `exclude`, `data`, `data_dir`, `img_size`, `device`, `batch_size`, `workers`,
            `finetune_epochs`, `lr`, `distill`.

    Raises:
        LeanError: Options that cannot be met, or a model without convolutions to share.
    """
    output = output_file(args.output, '.safetensors')
    has_data = bool(args.data or args.data_dir)
    if args.finetune_epochs and not has_data:
        raise LeanError('--finetune-epochs needs data: --data-dir DIR, or --data digits.')
    if args.finetune_epochs < 0:
        raise LeanError(f'--finetune-epochs must be at least 0, got {args.finetune_epochs}.')
    if args.distill and not args.finetune_epochs:
        raise LeanError('--distill is a way of fine-tuning: it needs --finetune-epochs.')
    if args.bn and not has_data:
        raise LeanError('--bn needs training images for the statistics: --data-dir DIR, or --data digits.')
    model = load_any(args.model).eval()
    x = torch.randn(1, *get_model_input_config(model)['input_size'], generator=torch.Generator().manual_seed(0))
    new = share(
        model, shared_rank=args.shared_rank, energy=args.energy, params=args.params, unique_rank=args.unique_rank,
        dual=args.dual, stages=args.stages, include=args.include, exclude=args.exclude, example_input=x, bn=args.bn,
        calibration=_calibration(args, model) if args.bn else None)
    print(new.lean_report)
    save_model(new, output)
    if has_data:
        from timm_lean.training.device import resolve_device
        from timm_lean.training.evaluate import evaluate_source
        for title, net in (('before', model), ('converted', new)):
            top1 = evaluate_source(args.model, net, args.data, args.data_dir, args.img_size, args.batch_size,
                                   resolve_device(args.device), args.workers)['top1']
            print(f'top-1 {title:10} {top1:.2f} %', flush=True)
    if args.finetune_epochs:
        from timm_lean.training.finetune import finetune
        keys = ('data', 'data_dir', 'img_size', 'device', 'batch_size', 'workers')
        settings = {k: getattr(args, k) for k in keys}
        with tempfile.TemporaryDirectory(dir=output.parent, prefix='.teacher-') as folder:
            if args.distill:
                settings['distill'] = str(Path(folder) / 'original.safetensors')
                save_model(model.cpu(), settings['distill'])
            print(f'top-1 fine-tuned {finetune(output, args.finetune_epochs, args.lr, settings):.2f} %')
    print(output)


def _calibration(args: argparse.Namespace, model: torch.nn.Module) -> Any:
    """Training images for the statistics of batch norms."""
    from timm_lean.training.data import open_eval_loader
    return open_eval_loader(model, args.data, args.data_dir, args.img_size, args.batch_size, torch.device('cpu'),
                            args.workers, split='train', limit=_CALIBRATION_IMAGES)
