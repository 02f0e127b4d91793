"""`timm-lean models`: the networks of the papers by name."""
import argparse
import re
from typing import Any

from .arguments import add_json
from .opening import finish

_SHARED_RANK = re.compile(r'_s\d+u\d+')  # the papers' SsUu: shared and unique filters

HELP = 'list model names, with --counts also parameters and MACs'


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument('filter', nargs='?', help="part of a name, a pattern with *, or 'shared': all with shared bases")
    p.add_argument('--counts', action='store_true', help='build each network to count parameters and MACs')
    add_json(p)


def run(args: argparse.Namespace) -> None:
    from dataclasses import asdict
    from fnmatch import fnmatch

    import timm

    from timm_lean.errors import LeanError
    from timm_lean.measure import human_count, model_reports
    from timm_lean.models import model_names
    names = [n for n in model_names() if n != 'lean']
    part = args.filter or ''
    pattern = part if '*' in part else f'*{part}*'
    chosen = [n for n in names if fnmatch(n, pattern) or (part == 'shared' and _SHARED_RANK.search(n))]
    if not chosen:
        raise LeanError(f'No model name matches {part!r}. Names: {", ".join(names)}.')
    width = max(map(len, chosen))
    if not args.counts:
        cfgs: dict[str, Any] = {n: timm.get_pretrained_cfg(n) for n in chosen}
        sizes = {n: cfg.input_size[-1] for n, cfg in cfgs.items()}
        finish(args, [dict(name=n, img_size=size) for n, size in sizes.items()],
               '\n'.join(f'{n:{width}}  @{size}' for n, size in sizes.items()))
        return
    reports = model_reports(chosen)
    finish(args, [asdict(r) for r in reports], '\n'.join(
        f'{r.name:{width}}  {r.params:>11,} params  {human_count(r.macs):>9} MACs @{r.img_size}' for r in reports))
