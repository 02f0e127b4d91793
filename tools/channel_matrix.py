"""Channel pruning of many timm networks, by this package and by Torch-Pruning's own documented way.

    python tools/channel_matrix.py run rows.jsonl                      # what rows.jsonl has already is left out
    python tools/channel_matrix.py run rows.jsonl --names resnet18 --way ours
    python tools/channel_matrix.py table rows.jsonl

Random weights, `pruning_ratio=0.5`, images of 64 px or, where a network takes only its own size, of that. Each network
and way runs in a forked process of its own with `--seconds` of CPU time; imports and building it are not counted. Ours
counts as done when the pruned network is saved, comes back bit for bit and its features have the channels that
`feature_info` says; Torch-Pruning's when the pruned network runs.
"""
import argparse
import json
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = Path(__file__).with_name('channel_matrix_names.txt')
WAYS = ('ours', 'torch-pruning')
SIZE = 64


def ours(model: Any, x: Any) -> dict[str, Any]:
    import torch

    import timm_lean
    before = sum(p.numel() for p in model.parameters())
    try:
        new = timm_lean.prune_channels(model, x, pruning_ratio=0.5)
    except timm_lean.LeanError as e:
        return {'result': 'refused', 'why': str(e)[:300]}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / 'pruned.safetensors'
        timm_lean.save_model(new, file)
        if not torch.equal(timm_lean.load_model(file).eval()(x), new.eval()(x)):
            return {'result': 'differs when reloaded'}
        try:
            features = timm_lean.load_model(file, features_only=True).eval()
        except (timm_lean.LeanError, RuntimeError, AttributeError) as e:
            features, why = None, str(e)[:200]
        if features is not None:
            counts = [(m.shape[1], m.shape[-1]) for m in features(x)]
            if any(c not in both for c, both in zip(features.feature_info.channels(), counts, strict=True)):
                return {'result': 'wrong features', 'why': f'{counts} for {features.feature_info.channels()}'}
    kept = sum(p.numel() for p in new.parameters()) / before
    fixed = sum('code fixes' in why for _, why in new.lean_report.unchanged)
    return {'result': 'pruned', 'params': kept, 'fixed': fixed, **({} if features is not None else {'features': why})}


def torch_pruning(model: Any, x: Any) -> dict[str, Any]:
    """As its README prunes a classifier."""
    import torch
    import torch.nn as nn
    import torch_pruning as tp
    before = sum(p.numel() for p in model.parameters())
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    try:
        tp.pruner.BasePruner(
            model, x, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=heads,
        ).step()
    except Exception as e:  # whatever it raises is the result
        return {'result': 'crashed', 'why': f'{type(e).__name__}: {str(e)[:200]}'}
    try:
        with torch.no_grad():
            model(x)
    except Exception as e:
        return {'result': 'breaks in forward', 'why': f'{type(e).__name__}: {str(e)[:200]}'}
    return {'result': 'pruned', 'params': sum(p.numel() for p in model.parameters()) / before}


def one(pipe: Any, way: str, name: str, seconds: int) -> None:
    """A network, in this process; its row is sent."""
    import timm
    import torch
    warnings.simplefilter('ignore')
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    own = model.pretrained_cfg['input_size'][-1]
    x = torch.randn(1, 3, SIZE, SIZE)
    try:
        with torch.no_grad():
            model(x)
    except Exception:
        x = torch.randn(1, 3, own, own)
    start = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(start) + seconds + 1, int(start) + seconds + 2))
    try:
        result = (ours if way == 'ours' else torch_pruning)(model, x)
    except Exception as e:
        result = {'result': 'crashed', 'why': f'{type(e).__name__}: {str(e)[:200]}'}
    pipe.send({**result, 'seconds': time.process_time() - start, 'size': x.shape[-1]})


def run(args: argparse.Namespace) -> None:
    import torch

    import timm_lean  # noqa: F401  so that no process has to import it
    torch.set_num_threads(1)
    done = {(row['way'], row['name']) for row in read(args.rows)} if args.rows.is_file() else set()
    context = multiprocessing.get_context('fork')
    for name in args.names or NAMES.read_text().split():
        for way in [args.way] if args.way else WAYS:
            if (way, name) in done:
                continue
            here, there = context.Pipe(duplex=False)
            child = context.Process(target=one, args=(there, way, name, args.seconds))
            child.start()
            there.close()
            try:
                row = here.recv()
            except EOFError:  # it was ended
                row = {}
            child.join()
            if not row:
                row = ({'result': 'too long'} if child.exitcode in (-24, -9) else  # SIGXCPU, SIGKILL
                       {'result': 'crashed', 'why': f'exit status {child.exitcode}'})
            row = {'way': way, 'name': name, **row}
            with args.rows.open('a') as f:
                f.write(json.dumps(row) + '\n')
            print(json.dumps(row), flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: how many of each result, then every network; the columns are the ways that were run."""
    by = {(row['way'], row['name']): row for row in rows}
    names = [name for name in NAMES.read_text().split() if any((way, name) in by for way in WAYS)]
    ways = [way for way in WAYS if any(way == w for w, _ in by)]
    lines = ['| | ' + ' | '.join(ways) + ' |', '| --- |' + ' --- |' * len(ways)]
    counts = {way: Counter(row['result'] for (w, _), row in by.items() if w == way) for way in ways}
    results = list(dict.fromkeys(r for way in ways for r, _ in counts[way].most_common()))
    lines += [f'| {r} | ' + ' | '.join(str(counts[way][r]) for way in ways) + ' |' for r in results]
    lines += ['', '| network | ' + ' | '.join(f'{way} | parameters left | CPU s' for way in ways) + ' |',
              '| --- |' + ' --- |' * 3 * len(ways)]
    for name in names:
        cells = []
        for way in ways:
            row = by.get((way, name), {})
            params = f'{100 * row["params"]:.0f} %' if 'params' in row else ''
            seconds = f'{row["seconds"]:.0f}' if 'seconds' in row else ''
            cells += [row.get('result', ''), params, seconds]
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest='command', required=True)
    q = commands.add_parser('run', help='prune, and note what came of it')
    q.add_argument('rows', type=Path, help='JSON lines, written and read')
    q.add_argument('--names', nargs='+', help='networks (default: those of channel_matrix_names.txt)')
    q.add_argument('--way', choices=WAYS)
    q.add_argument('--seconds', type=int, default=60)
    commands.add_parser('table', help='the rows as Markdown').add_argument('rows', type=Path)
    args = p.parse_args()
    if args.command == 'run':
        run(args)
    else:
        print(format_table(read(args.rows)))


if __name__ == '__main__':
    main()
