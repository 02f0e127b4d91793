"""`timm-lean export`: one checkpoint in several forms, with the size and the speed of each; detectors too."""
import argparse
from pathlib import Path
from typing import Any

from .arguments import add_calibration, add_data, add_json, add_model, add_trust, given
from .changing import calibration_images
from .changing_detector import detector_calibration
from .opening import data_options, finish, is_detector, open_model, progress

HELP = 'write a checkpoint in another form'

_CHECK_IMAGES = 8
_INT8_CALIBRATION, _INT8_CHECK = 512, 1000  # images


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_model(p, 'checkpoint file, timm name, local-dir:DIR, or a detector')
    p.add_argument('--det-dir', metavar='DIR', help='detector checkpoint: folder for load_detector')
    p.add_argument('--det-config', metavar='FILE', help='detector checkpoint: its config, if it is a .pth')
    p.add_argument('--part', choices=['whole', 'features', 'backbone', 'boxes'],
                   help='detector checkpoint: what --onnx and --torch-export write (default whole, up to the boxes; '
                        'boxes: with NMS, one image at a time)')
    add_trust(p)
    p.add_argument('--fold', nargs='?', const='all', choices=['all', 'auto'],
                   help='fold shared bases into dense convolutions first; auto: only where faster here')
    p.add_argument('--onnx', metavar='FILE', help='ONNX file with a dynamic batch size')
    p.add_argument('--int8', action='store_true',
                   help='--onnx FILE in int8: ranges from training images, answers compared on others')
    p.add_argument('--torch-export', metavar='FILE', help='torch.export file (.pt2) with a dynamic batch size')
    p.add_argument('--half', action='store_true', help='store float16 tensors (-o and --hf-dir)')
    p.add_argument('--weights', choices=['float', 'int8'],
                   help='how -o and --det-dir store weights: int8, with a scale per filter, and calibrated where there '
                        'are images: those of --data-dir or --data, of a detector those of its config')
    p.add_argument('--hf-dir', metavar='DIR', help='folder that timm loads as local-dir:DIR')
    p.add_argument('-o', '--output', metavar='FILE', help='checkpoint file')
    add_calibration(p)
    p.add_argument('--data-root', metavar='DIR', help="detector checkpoint: its data's folder, instead of the config's")
    add_data(p.add_argument_group('images: to check --onnx and --torch-export with; for --int8 and --weights int8'))
    add_json(p)


def run(args: argparse.Namespace) -> None:
    if args.det_dir or args.det_config or is_detector(args.model):
        _export_detector(args)
    else:
        _export_classifier(args)


def _export_classifier(args: argparse.Namespace) -> None:
    from timm.models import get_model_input_config

    from timm_lean.checkpoint.format import load_model, save_hf_dir, save_model
    from timm_lean.errors import LeanError
    from timm_lean.export.auto import fold_as_asked
    from timm_lean.export.forms import half
    from timm_lean.export.table import Form, write_forms
    from timm_lean.measure import count_params, human_bytes
    from timm_lean.training.data import open_eval_loader
    for flag in ('part', 'data_root'):
        if getattr(args, flag):
            raise LeanError(f'--{flag.replace("_", "-")} is for detectors, and {args.model} is none that says its '
                            'config.')
    if not (args.hf_dir or args.output or args.onnx or args.torch_export):
        raise LeanError('Nothing to write: give --hf-dir DIR, -o FILE, --onnx FILE or --torch-export FILE, or '
                        '--det-dir DIR for a detector.')
    if args.half and not (args.output or args.hf_dir):
        raise LeanError('--half is for -o FILE and --hf-dir DIR; give one of them.')
    if args.weights == 'int8' and (args.half or not args.output):
        raise LeanError('--weights int8 is for -o FILE, without --half: the scales are float32.')
    if args.int8 and not args.onnx:
        raise LeanError('--int8 is for --onnx FILE; for a checkpoint in int8 give -o FILE --weights int8.')
    if args.int8 and not (args.data or args.data_dir):
        raise LeanError('--int8 needs images like those the network is for: --data-dir DIR, or --data digits.')
    if args.weights != 'int8' and given(args, 'calibrate', 'calibrate_positions'):
        raise LeanError('--calibrate and --calibrate-positions are for -o FILE --weights int8.')
    _check_files(args)
    options = data_options(args)
    model = open_model(args)
    calibration = calibration_images(args, model, options) if args.weights == 'int8' else None
    channels, *size = get_model_input_config(model)['input_size']
    shape = (1, channels, *((args.img_size, args.img_size) if args.img_size else size))
    images = int8_images = None
    if args.onnx or args.torch_export:  # images that cannot be had are an error before anything is written
        loader = open_eval_loader(
            model, **{**options, 'batch_size': _CHECK_IMAGES, 'workers': 0, 'device': 'cpu'}, labels=False)
        images = next(iter(loader))[0]
    if args.int8:
        int8_images = _int8_images(args, model, {'batch_size': 64, **options, 'workers': 0, 'device': 'cpu'})
    forms = [Form.of_file(args.model, model, options['device'])]
    with progress(args):
        model, folded = fold_as_asked(model, args.fold, shape, options['device'])
        if folded:
            print(folded)
        stored = half(model) if args.half else model
        if args.output:
            saved = stored if calibration is None else _rounded(model, calibration, options['device'])
            rounding = save_model(saved, args.output, **given(args, 'weights'))
            if rounding is not None:
                print(rounding if calibration is None else saved.lean_report)
            kind = ', float16' if args.half else ', int8' if rounding is not None else ''
            forms.append(Form.of_file(args.output, load_model(args.output), options['device'], args.output + kind))
            print(f'{args.output}: {human_bytes(forms[-1].bytes or 0)}, {count_params(model):,} parameters')
        if args.hf_dir:
            save_hf_dir(stored, args.hf_dir)
            print(f"{args.hf_dir}: import timm, timm_lean; "
                  f"timm.create_model('local-dir:{args.hf_dir}', pretrained=True)")
        if images is not None:
            written = write_forms(model.to('cpu'), images, onnx=args.onnx, torch_export=args.torch_export,
                                  int8=int8_images)
            print(*(form.note for form in written), sep='\n')
            forms += written
    _finish_forms(args, forms, shape)


def _rounded(model: Any, calibration: Any, device: Any) -> Any:
    """The network as its int8 file holds it, calibrated."""
    from timm_lean.export.rounding import round_weights
    new = round_weights(model.to(device), calibration=calibration).cpu()
    model.cpu()
    return new


def _int8_images(args: argparse.Namespace, model: Any, options: dict[str, Any]) -> list[Any]:
    """Images for the ranges of activations, and others to compare answers on: with labels, if those fit the model."""
    from timm_lean.errors import LeanError
    from timm_lean.training.data import open_eval_loader
    from timm_lean.training.evaluate import labelled_loader
    if args.data_dir and not (Path(args.data_dir) / 'train').is_dir():
        raise LeanError(f'--int8 takes ranges from one part of the images and compares answers on another: '
                        f'{args.data_dir} needs train/ and val/ or test/.')
    ranges = open_eval_loader(model, **options, split='train', limit=_INT8_CALIBRATION, labels=False)
    try:
        return [ranges, labelled_loader(args.model, model, **options, limit=_INT8_CHECK)]
    except LeanError:
        return [ranges, [x for x, _ in open_eval_loader(model, **options, limit=_INT8_CHECK, labels=False)]]


def _export_detector(args: argparse.Namespace) -> None:
    from timm_lean.errors import LeanError
    if args.output or args.hf_dir or args.half or args.int8:
        raise LeanError(f'{args.model} is a detector: -o, --hf-dir, --half and --int8 are for classification. Give '
                        '--det-dir DIR for its folder, --onnx FILE or --torch-export FILE for its graph.')
    if args.weights != 'int8' and given(args, 'calibrate', 'calibrate_positions', 'data_root'):
        raise LeanError('--calibrate, --calibrate-positions and --data-root are for --det-dir DIR --weights int8.')
    if args.weights and not args.det_dir:
        raise LeanError('--weights is for --det-dir DIR: the graph in --onnx and --torch-export is in float32.')
    if not (args.det_dir or args.onnx or args.torch_export):
        raise LeanError(f'{args.model} is a detector: give --det-dir DIR for its folder, --onnx FILE or '
                        '--torch-export FILE for its graph.')
    if args.fold and not (args.onnx or args.torch_export):
        raise LeanError('--fold is for --onnx and --torch-export: detectors are stored as they are trained.')
    _check_files(args)
    options = data_options(args)
    from timm_lean.mmdet.detector import open_detector, write_folder
    from timm_lean.mmdet.export import export_forms
    result: dict[str, Any] = {}
    with progress(args):
        if args.onnx or args.torch_export:
            forms = export_forms(
                args.model, config=args.det_config, device=options['device'],
                **given(args, 'part', 'onnx', 'torch_export', 'fold', 'img_size', 'data_dir', 'trust_imports'))
            print(forms)
            result['forms'] = _as_data(forms.forms, forms.times)
        if args.det_dir:
            model: Any = open_detector(args.model, args.det_config, **given(args, 'trust_imports'))
            if args.weights == 'int8':
                model = _rounded_detector(args, model, options['device'])
            folder = write_folder(model, args.det_dir, **given(args, 'weights'))
            print(f'{folder}: timm_lean.mmdet.load_detector({str(folder)!r})')
            result['det_dir'] = str(folder)
    if args.json:
        finish(args, result, '')


def _rounded_detector(args: argparse.Namespace, model: Any, device: Any) -> Any:
    """The detector as its int8 file holds it, calibrated; as it is where there is nothing to calibrate with."""
    from timm_lean.export.rounding import round_weights
    from timm_lean.mmdet import lean_detector
    from timm_lean.mmdet.runs import set_data
    set_data(model, args.data_root)
    images = detector_calibration(args, model.to(device))
    if images is None:
        return model.cpu()
    new: Any = lean_detector(model, round_weights, calibration=images).cpu()
    print(new.lean_report)
    return new


def _finish_forms(args: argparse.Namespace, forms: list[Any], shape: tuple[int, ...]) -> None:
    from timm_lean.export.table import format_forms, time_forms
    if len(forms) == 1 and not args.json:
        return  # nothing to compare with
    times = time_forms(forms, shape)
    finish(args, _as_data(forms, times), format_forms(forms, times, shape))


def _as_data(forms: list[Any], times: list[float]) -> list[dict[str, Any]]:
    return [{'name': form.name, 'bytes': form.bytes, 'latency_ms': ms, 'device': str(form.device)}
            for form, ms in zip(forms, times, strict=True)]


def _check_files(args: argparse.Namespace) -> None:
    from timm_lean.checkpoint.files import output_file
    from timm_lean.export.forms import check_onnx_installed
    for option, path, suffix in (('-o', args.output, '.safetensors'), ('--onnx', args.onnx, '.onnx'),
                                 ('--torch-export', args.torch_export, '.pt2')):
        if path:
            output_file(path, suffix, option)
    if args.onnx:
        check_onnx_installed()
