"""What the commands of `timm-lean` do. Their arguments are in `timm_lean_cli`."""
import argparse
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from timm_lean.errors import LeanError

__all__ = ['run']


def run(args: argparse.Namespace) -> int:
    """Run a parsed command. A LeanError becomes one line and exit code 2."""
    try:
        return COMMANDS[args.command](args) or 0
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except LeanError as e:
        if args.debug:
            traceback.print_exc()
        # an error raised in a data loading process carries that process's traceback in its text
        message = str(e).rsplit('LeanError: ', 1)[-1].strip()
        print(f'timm-lean {args.command}: {message}', file=sys.stderr)
        return 2


def _models(args: argparse.Namespace) -> None:
    from timm_lean.measure.report import human_count, model_reports, to_json
    from timm_lean.models import model_names
    names = [n for n in model_names() if n != 'lean']
    pattern = args.filter if '*' in args.filter else f'*{args.filter}*'
    chosen = [n for n in names if fnmatch(n, pattern)]
    if not chosen:
        raise LeanError(f'No model name matches {args.filter!r}. Names: {", ".join(names)}.')
    reports = model_reports(chosen)
    if args.json:
        print(to_json(reports))
        return
    width = max(map(len, chosen))
    for r in reports:
        print(f'{r.name:{width}}  {r.params:>11,} params  {human_count(r.macs):>9} MACs @{r.img_size}')


def _info(args: argparse.Namespace) -> None:
    from timm_lean.measure.report import format_table, model_reports, to_json
    from timm_lean.training.device import resolve_device
    device = resolve_device(args.device)
    if args.img_size is not None and args.img_size < 1:
        raise LeanError(f'--img-size must be at least 1, got {args.img_size}.')
    if args.plot:
        from timm_lean.measure.pictures import check_picture
        from timm_lean.measure.tradeoff import plot_tradeoff
        check_picture(args.plot)
    sources = [args.model, *args.vs]
    reports = model_reports(sources, args.img_size, args.latency, device)
    if args.plot or args.data or args.data_dir:
        from timm_lean.checkpoint.format import load_any
        from timm_lean.training.evaluate import evaluate_source
        for source, report in zip(sources, reports, strict=True):
            report.top1 = evaluate_source(
                source, load_any(source), args.data, args.data_dir, args.img_size, 128, device, workers=2)['top1']
    print(to_json(reports) if args.json else format_table(reports))
    if args.plot:
        plot_tradeoff(reports, args.plot)


def _train(args: argparse.Namespace) -> None:
    from timm_lean.training import TrainConfig, train
    from timm_lean.training.config import load_yaml
    settings = {k: v for k, v in vars(args).items() if k not in ('command', 'debug', 'version', 'config')}
    if 'model_args' in settings:
        settings['model_args'] = dict(map(_key_value, settings['model_args']))
    if getattr(args, 'config', None):
        settings = {**load_yaml(args.config), **settings}
    result = train(TrainConfig.from_args(settings))
    print(f'best top-1 {result["best_top1"]:.2f} % in epoch {result["best_epoch"]}; '
          f'{result["output"]}/best.safetensors, last.safetensors, summary.csv, curves.png')


def _key_value(text: str) -> tuple[str, Any]:
    key, sep, value = text.partition('=')
    if not sep or not key:
        raise LeanError(f'--model-args takes KEY=VALUE, got {text!r}.')
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _validate(args: argparse.Namespace) -> None:
    from timm_lean.checkpoint.format import load_any
    from timm_lean.training.device import resolve_device
    from timm_lean.training.evaluate import evaluate_source
    metrics = evaluate_source(
        args.model, load_any(args.model), args.data, args.data_dir, args.img_size, args.batch_size,
        resolve_device(args.device), args.workers, args.amp)
    if args.json:
        print(json.dumps({'model': args.model, **metrics}, indent=2))
    else:
        print('top-1 {top1:.2f} %  top-5 {top5:.2f} %  loss {loss:.4f}  {images} images, '
              '{images_per_second:.0f} images/s'.format(**metrics))


def _analyze(args: argparse.Namespace) -> None:
    from timm_lean.checkpoint.format import load_any
    from timm_lean.measure.similarity import feature_similarity, format_similarity, plot_similarity
    from timm_lean.training.data import open_eval_loader
    from timm_lean.training.device import resolve_device
    if args.similarity == args.criteria:
        raise LeanError('Say what to measure: --similarity or --criteria.')
    if args.criteria:
        from .prune import analyze_command
        analyze_command(args)
        return
    if args.batches < 1:
        raise LeanError(f'--batches must be at least 1, got {args.batches}.')
    device = resolve_device(args.device)
    results = []
    for source in filter(None, (args.model, args.vs)):
        model = load_any(source).to(device)
        loader = open_eval_loader(model, args.data, args.data_dir, args.img_size, 64, device)
        results.append(feature_similarity(model, loader, device, max_batches=args.batches))
    second = results[1] if args.vs else None
    print(json.dumps(results) if args.json else format_similarity(results[0], second))
    plot_similarity(results[0], second, args.output or 'similarity.png')


def _prune(args: argparse.Namespace) -> None:
    if _is_detector(Path(args.model)):
        from .prune import prune_detector_command
        prune_detector_command(args)
        return
    from .prune import prune_command
    prune_command(args)


def _is_detector(path: Path) -> bool:
    """Whether this is a detector's folder or checkpoint; MMDetection is not imported to tell."""
    if path.is_dir():
        return (path / 'config.py').is_file()
    try:
        with safe_open(path, framework='pt') as f:
            return 'timm_lean_detector' in (f.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False  # whoever reads it as a network says what is wrong


def _share(args: argparse.Namespace) -> None:
    from .share import share_command
    share_command(args)


def _depth(args: argparse.Namespace) -> None:
    from .depth import depth_command
    depth_command(args)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import doctor
    return doctor()


def _predict(args: argparse.Namespace) -> None:
    from timm_lean.checkpoint.format import load_any
    from timm_lean.training.device import resolve_device
    from timm_lean.training.predict import predict
    if args.top < 1:
        raise LeanError(f'--top must be at least 1, got {args.top}.')
    if _is_detector(Path(args.model)):
        _detect(args)
        return
    model = load_any(args.model)
    results = predict(model, args.images, resolve_device(args.device), args.top)
    if args.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        print(result['image'] + ': ' + ', '.join(f'{p["class"]} {100 * p["probability"]:.1f} %' for p in result['top']))


def _detect(args: argparse.Namespace) -> None:
    from timm_lean.mmdet import predict_images
    from timm_lean.training.device import resolve_device
    results = predict_images(args.model, args.images, args.output, args.score_thr, str(resolve_device(args.device)))
    if args.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        boxes = ', '.join(f'{b["class"]} {100 * b["score"]:.1f} %' for b in result['boxes'])
        print(f'{result["image"]}: {boxes or "nothing"}' + (f' -> {result["picture"]}' if result['picture'] else ''))


def _export(args: argparse.Namespace) -> None:
    if args.det_dir or args.det_config or _is_detector(Path(args.model)):
        from .export import export_detector_command
        export_detector_command(args)
        return
    from .export import export_command
    export_command(args)


def _demo(args: argparse.Namespace) -> None:
    from .demo import demo
    detection = args.detection
    if detection is None:
        detection = importlib.util.find_spec('mmdet') is not None
    demo(Path(args.output), args.epochs)
    if detection:
        from timm_lean.mmdet.demo import detection_demo
        print('\nAnd a detector')
        detection_demo(Path(args.output) / 'detection')
    else:
        print("MMDetection is not installed (pip install 'timm-lean[mmdet]'): the detector's part is left out.")


COMMANDS: dict[str, Callable[[argparse.Namespace], Any]] = {
    'models': _models, 'info': _info, 'train': _train, 'validate': _validate, 'predict': _predict, 'export': _export,
    'prune': _prune, 'share': _share, 'analyze': _analyze, 'depth': _depth, 'doctor': _doctor, 'demo': _demo,
}
