"""`timm-lean analyze`: a property of a network, measured: redundancy of its features, or what criteria would prune."""
import argparse
from pathlib import Path
from typing import Any

from .arguments import add_data, add_json, add_layers, add_model, given
from .opening import data_options, finish, open_model

HELP = 'measure a property of a model on data'

_BATCH = 64
_BATCHES = 4


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_model(p)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument('--similarity', action='store_true', help='redundancy of the feature maps, per layer')
    what.add_argument('--criteria', action='store_true', help='what each pruning criterion would prune')
    p.add_argument('--threshold', type=float, metavar='T', help='--criteria: t of overlap and layers (default 1e-4)')
    add_layers(p)
    p.add_argument('--vs', metavar='MODEL', help='--similarity: a second model, shown beside the first')
    p.add_argument('--batches', type=int, metavar='N', help=f'--similarity: of {_BATCH} images (default {_BATCHES})')
    p.add_argument('-o', '--output', metavar='PATH', help='picture of the similarity (similarity.png if not given); '
                   'folder for --criteria (output/analysis if not given)')
    add_data(p.add_argument_group('images of --similarity'))
    add_json(p)


def run(args: argparse.Namespace) -> None:
    if args.criteria:
        _criteria(args)
    else:
        _similarity(args)


def _similarity(args: argparse.Namespace) -> None:
    from timm_lean.errors import LeanError
    from timm_lean.measure.pictures import check_picture
    from timm_lean.measure.similarity import feature_similarity, format_similarity, plot_similarity
    from timm_lean.training.data import open_eval_loader
    if args.include or args.exclude or args.threshold is not None:
        raise LeanError('--include, --exclude and --threshold are for --criteria.')
    batches = _BATCHES if args.batches is None else args.batches
    if batches < 1:
        raise LeanError(f'--batches must be at least 1, got {batches}.')
    picture = args.output or 'similarity.png'
    check_picture(picture)
    options = {'batch_size': _BATCH, 'workers': 0, **data_options(args)}
    results = []
    for source in [args.model] if args.vs is None else [args.model, args.vs]:
        model = open_model(args, source).to(options['device'])
        results.append(feature_similarity(
            model, open_eval_loader(model, **options, labels=False), options['device'], max_batches=batches))
    second = results[1] if args.vs else None
    finish(args, results, format_similarity(results[0], second))
    plot_similarity(results[0], second, picture)


def _criteria(args: argparse.Namespace) -> None:
    from timm_lean.checkpoint.files import writable_dir
    from timm_lean.errors import LeanError
    from timm_lean.pruning.analysis import analyze_criteria
    if args.vs or args.batches is not None or args.data or args.data_dir:
        raise LeanError('--vs, --batches, --data and --data-dir are for --similarity: criteria need no images.')
    analysis: Any = analyze_criteria(open_model(args), **given(args, 'threshold', 'include', 'exclude'))
    files = _save(analysis, writable_dir(args.output or 'output/analysis'))
    finish(args, {**analysis.to_dict(), 'files': list(map(str, files))}, '\n'.join(map(str, [analysis, *files])))


def _save(analysis: Any, folder: Path) -> list[Path]:
    """Write the tables of an analysis and its picture."""
    import csv

    from timm_lean.checkpoint.files import atomic_file
    from timm_lean.measure.pictures import save_figure
    files = []
    for name, rows in analysis.tables().items():
        files.append(folder / f'{name}.csv')
        with atomic_file(files[-1]) as temporary, open(temporary, 'w', newline='') as f:
            csv.writer(f).writerows(rows)
    files.append(folder / 'criteria.png')
    save_figure(analysis.figure(), files[-1])
    return files
