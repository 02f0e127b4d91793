"""`timm-lean info`: what networks cost, beside each other; classifiers and detectors."""
import argparse
import sys

from .arguments import add_data, add_json, add_model, add_trust, given
from .opening import data_options, finish, is_detector, open_model

HELP = 'parameters, MACs, file size and speed of a model'


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_model(p, 'timm name, checkpoint file or local-dir:DIR; a detector too')
    p.add_argument('--vs', action='append', default=[], metavar='MODEL', help='compare with this one (repeatable)')
    p.add_argument('--shareable', action='store_true', help='how few of the parameters `timm-lean share` can leave')
    p.add_argument('--latency', action='store_true', help='measure ms and peak memory on this device')
    p.add_argument('--plot', metavar='FILE', help='picture of accuracy against latency (with --latency) or MACs')
    add_trust(p)
    add_data(p.add_argument_group('accuracy'))
    add_json(p)


def run(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from timm_lean.errors import LeanError
    from timm_lean.measure import format_table, model_reports
    from timm_lean.measure.pictures import check_picture
    from timm_lean.measure.tradeoff import plot_tradeoff
    from timm_lean.training.evaluate import evaluate_source
    options = data_options(args)
    if args.plot:
        check_picture(args.plot)
    sources = [args.model, *args.vs]
    measured = {**given(args, 'img_size'), 'latency': args.latency, 'device': options['device']}
    if any(map(is_detector, sources)):
        if args.plot or args.data or args.data_dir or args.shareable or not all(map(is_detector, sources)):
            raise LeanError(f'{next(filter(is_detector, sources))} is a detector: it is compared with detectors, '
                            'without --shareable, --plot, --data and --data-dir. Its accuracy is measured by '
                            'tools/test_det.py.')
        from timm_lean.mmdet.report import detector_report
        reports = [detector_report(source, **measured, **given(args, 'trust_imports')) for source in sources]
    else:
        if args.trust_imports:
            raise LeanError(f'--trust-imports is for detectors, and {args.model[:100]!r} is none.')
        accuracy = args.plot or args.data or args.data_dir
        models = [open_model(args, source) for source in sources] if accuracy else []
        reports = model_reports(sources, **measured)
        for source, model, report in zip(sources, models, reports, strict=False):
            report.top1 = evaluate_source(source, model, progress=sys.stderr.isatty(), **options)['top1']
    rows = [asdict(r) for r in reports]
    text = format_table(reports)
    if args.shareable:
        for source, row in zip(sources, rows, strict=True):
            row['shareable'] = least = _shareable(source)
            text += (f'\n{source}: share can leave {100 * least["without_classifier"]:.1f} % of the parameters, '
                     f'{100 * least["with_classifier"]:.1f} % with --classifier')
    finish(args, rows, text)
    if args.plot:
        plot_tradeoff(reports, args.plot)


def _shareable(source: str) -> dict[str, float]:
    """The least share of its parameters that `share` can leave of a network, without and with its classifier."""
    import torch

    from timm_lean.checkpoint.format import load_any
    from timm_lean.sharing import shareable_range
    stored = source.endswith('.safetensors') or source.startswith('local-dir:')
    with torch.device('cpu' if stored else 'meta'):  # of a name no weights are needed
        model = load_any(source)
    return {name: shareable_range(model, classifier=name == 'with_classifier')[0]
            for name in ('without_classifier', 'with_classifier')}
