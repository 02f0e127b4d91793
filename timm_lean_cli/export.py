"""`timm-lean export`: one checkpoint in several forms, with the size and the speed of each."""
import argparse

import torch
from timm.models import get_model_input_config

from timm_lean.checkpoint.files import output_file
from timm_lean.checkpoint.format import load_any, load_model, save_hf_dir, save_model
from timm_lean.errors import LeanError
from timm_lean.export.auto import fold_as_asked
from timm_lean.export.forms import check_onnx_installed, half
from timm_lean.export.table import Form, format_forms, write_forms
from timm_lean.measure.report import count_params, human_bytes
from timm_lean.training.data import open_eval_loader
from timm_lean.training.device import resolve_device

__all__ = ['export_command', 'export_detector_command']

_CHECK_IMAGES = 8


def export_command(args: argparse.Namespace) -> None:
    """Write the forms that were asked for and print a table of them."""
    _check(args)
    device = resolve_device(args.device)
    model = load_any(args.model).eval()
    channels, *size = get_model_input_config(model)['input_size']
    shape = (1, channels, *((args.img_size, args.img_size) if args.img_size else size))
    forms = [Form.of_file(args.model, model, device)]
    model, folded = fold_as_asked(model, args.fold, shape, device)
    if folded:
        print(folded)
    stored = half(model) if args.half else model
    if args.output:
        save_model(stored, args.output)
        forms.append(Form.of_file(args.output, load_model(args.output), device,
                                  args.output + (', float16' if args.half else '')))
        print(f'{args.output}: {human_bytes(forms[-1].bytes or 0)}, {count_params(model):,} parameters')
    if args.hf_dir:
        save_hf_dir(stored, args.hf_dir)
        print(f"{args.hf_dir}: import timm, timm_lean; timm.create_model('local-dir:{args.hf_dir}', pretrained=True)")
    if args.onnx or args.torch_export:
        loader = open_eval_loader(model, args.data, args.data_dir, args.img_size, _CHECK_IMAGES, torch.device('cpu'))
        written = write_forms(model.to('cpu'), next(iter(loader))[0], onnx=args.onnx, torch_export=args.torch_export)
        print(*(form.note for form in written), sep='\n')
        forms += written
    if len(forms) > 1:
        print(format_forms(forms, shape))


def _check(args: argparse.Namespace) -> None:
    if not (args.hf_dir or args.output or args.onnx or args.torch_export):
        raise LeanError('Nothing to write: give --hf-dir DIR, -o FILE, --onnx FILE or --torch-export FILE, or '
                        '--det-dir DIR for a detector.')
    _check_forms(args)
    if args.half and not (args.output or args.hf_dir):
        raise LeanError('--half is for -o FILE and --hf-dir DIR; give one of them.')


def _check_forms(args: argparse.Namespace) -> None:
    for option, path, suffix in (('-o', args.output, '.safetensors'), ('--onnx', args.onnx, '.onnx'),
                                 ('--torch-export', args.torch_export, '.pt2')):
        if path:
            output_file(path, suffix, option)
    if args.onnx:
        check_onnx_installed()


def export_detector_command(args: argparse.Namespace) -> None:
    """Run `timm-lean export` on a detector."""
    from timm_lean.mmdet.detector import export_detector
    from timm_lean.mmdet.export import export_backbone
    if args.output or args.hf_dir or args.half:
        raise LeanError(f'{args.model} is a detector: -o, --hf-dir and --half are for classification. Give --det-dir '
                        'DIR for the whole detector, --onnx FILE or --torch-export FILE for its backbone.')
    if not (args.det_dir or args.onnx or args.torch_export):
        raise LeanError(f'{args.model} is a detector: give --det-dir DIR for the whole of it, --onnx FILE or '
                        '--torch-export FILE for its backbone.')
    if args.fold and not (args.onnx or args.torch_export):
        raise LeanError('--fold is for --onnx and --torch-export: detectors are stored as they are trained.')
    _check_forms(args)
    if args.onnx or args.torch_export:
        size = {'img_size': args.img_size} if args.img_size else {}
        print(export_backbone(
            args.model, config=args.det_config, onnx=args.onnx, torch_export=args.torch_export, fold=args.fold,
            data_dir=args.data_dir, device=resolve_device(args.device), **size))
    if args.det_dir:
        folder = export_detector(args.det_config, args.model, args.det_dir)
        print(f'{folder}: timm_lean.mmdet.load_detector({str(folder)!r})')
