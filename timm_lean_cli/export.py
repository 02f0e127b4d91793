"""`timm-lean export`: one checkpoint in several forms, with the size and the speed of each."""
import argparse
from pathlib import Path

import torch
import torch.nn as nn
from timm.models import get_model_input_config

from timm_lean.checkpoint.files import output_file
from timm_lean.checkpoint.format import load_any, load_model, save_hf_dir, save_model
from timm_lean.errors import LeanError
from timm_lean.export.auto import fold_faster
from timm_lean.export.forms import (
    check_onnx_installed,
    half,
    onnx_form,
    save_onnx,
    save_torch_export,
    torch_export_form,
)
from timm_lean.measure.report import count_params, human_bytes, measure_latency
from timm_lean.sharing.fold import fold
from timm_lean.training.data import open_eval_loader
from timm_lean.training.device import resolve_device

__all__ = ['Row', 'export_command', 'fold_as_asked', 'format_rows', 'write_forms']

Row = tuple[str, int | None, nn.Module, torch.device]
"""A form in the table: name, bytes of its file, how to run it and where."""

_CHECK_IMAGES = 8


def export_command(args: argparse.Namespace) -> None:
    """Write the forms that were asked for and print a table of them."""
    _check(args)
    device = resolve_device(args.device)
    model = load_any(args.model).eval()
    channels, *size = get_model_input_config(model)['input_size']
    shape = (1, channels, *((args.img_size, args.img_size) if args.img_size else size))
    rows: list[Row] = []
    source = Path(args.model)
    rows.append((args.model, source.stat().st_size if source.is_file() else None, model, device))
    model = fold_as_asked(model, args.fold, shape, device)
    stored = half(model) if args.half else model
    label = ', float16' if args.half else ''
    if args.output:
        save_model(stored, args.output)
        rows.append((args.output + label, Path(args.output).stat().st_size, load_model(args.output), device))
        print(f'{args.output}: {human_bytes(rows[-1][1] or 0)}, {count_params(model):,} parameters')
    if args.hf_dir:
        save_hf_dir(stored, args.hf_dir)
        print(f"{args.hf_dir}: import timm, timm_lean; timm.create_model('local-dir:{args.hf_dir}', pretrained=True)")
    if args.onnx or args.torch_export:
        cpu = torch.device('cpu')
        loader = open_eval_loader(model, args.data, args.data_dir, args.img_size, _CHECK_IMAGES, cpu)
        rows += write_forms(model.to(cpu), next(iter(loader))[0], args.onnx, args.torch_export)
    if len(rows) > 1:
        print(format_rows(rows, shape))


def fold_as_asked(model: nn.Module, how: str | None, shape: tuple[int, ...], device: torch.device) -> nn.Module:
    """`--fold`: nothing, everything, or what is faster dense on the device."""
    if how == 'all':
        model = fold(model)
        print(model.fold_report)
    elif how == 'auto':
        model, times = fold_faster(model, shape, device)
        folded = sum(dense < shared for shared, dense in times.values())
        print(f'{folded} of {len(times)} shared convolutions are faster dense on {device} and were folded')
    return model


def write_forms(model: nn.Module, images: torch.Tensor, onnx: str | None, torch_export: str | None) -> list[Row]:
    """Write `--onnx` and `--torch-export`, checked on images `[B, C, H, W]`; rows for the table."""
    rows: list[Row] = []
    for path, save, form in ((onnx, save_onnx, onnx_form), (torch_export, save_torch_export, torch_export_form)):
        if path:
            error = save(model, images, path)
            print(f'{path}: within {error:.1e} of PyTorch on {len(images)} images')
            rows.append((path, Path(path).stat().st_size, form(path), torch.device('cpu')))
    return rows


def _check(args: argparse.Namespace) -> None:
    if not (args.hf_dir or args.output or args.onnx or args.torch_export):
        raise LeanError('Nothing to write: give --hf-dir DIR, -o FILE, --onnx FILE or --torch-export FILE, or '
                        '--det-dir DIR for a detector.')
    for option, path, suffix in (('-o', args.output, '.safetensors'), ('--onnx', args.onnx, '.onnx'),
                                 ('--torch-export', args.torch_export, '.pt2')):
        if path:
            output_file(path, suffix, option)
    if args.half and not (args.output or args.hf_dir):
        raise LeanError('--half is for -o FILE and --hf-dir DIR; give one of them.')
    if args.onnx:
        check_onnx_installed()


def format_rows(rows: list[Row], shape: tuple[int, ...]) -> str:
    """Size and latency of every form, measured in turn on inputs of a shape `[B, C, H, W]`."""
    times: dict[int, float] = {}
    for device in dict.fromkeys(row[3] for row in rows):
        chosen = [i for i, row in enumerate(rows) if row[3] == device]
        measured = measure_latency([rows[i][2] for i in chosen], [shape] * len(chosen), device)
        times.update({i: ms for i, (ms, _, _) in zip(chosen, measured, strict=True)})
    cells = [('form', 'file', 'latency', 'device')] + [
        (name, '-' if size is None else human_bytes(size), f'{times[i]:.2f} ms', str(device))
        for i, (name, size, _, device) in enumerate(rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines = ['  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.append(f'latency: batch 1 of {shape[1]} x {shape[2]} x {shape[3]}, median of 20, in turn, '
                 f'{torch.get_num_threads()} threads')
    return '\n'.join(lines)
