"""Which techniques apply to which families of timm, and the error of the output before and after calibration.

    python tools/reproduce.py calibration-families --output rows.json
    python tools/reproduce.py calibration-families --output rows.json --only densenet121 mixnet_s

Networks with random weights and random batch norms, twelve smooth random images of 64 pixels, nine of them to calibrate
with; the errors, `||y' - y|| / ||y||` against the network before, are those on the other three. So few images of noise
say whether the engine copes with a network's structure, not how well it does on photographs.

`--output FILE` keeps finished rows: the same command goes on where it was cut off, and prints the table.
"""
import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from tqdm import tqdm

import timm_lean
from timm_lean import LeanError

FAMILIES = [
    'resnet20_cifar', 'resnet10t', 'resnet26d', 'resnext26ts', 'seresnext26d_32x4d', 'res2net50_26w_4s',
    'regnetx_002', 'regnety_002', 'mobilenetv2_035', 'mobilenetv3_small_050', 'efficientnet_lite0', 'mnasnet_small',
    'ghostnet_050', 'densenet121', 'ese_vovnet19b_dw', 'darknet17', 'cspresnet50', 'dla34', 'hrnet_w18_small',
    'convnext_atto', 'mixnet_s', 'rexnet_100', 'repvgg_a0', 'hardcorenas_a', 'selecsls42', 'fbnetc_100', 'spnasnet_100',
    'tinynet_e', 'mobileone_s0', 'lcnet_050', 'semnasnet_050']
NARROW: dict[str, dict[str, Any]] = {
    'res2net50_26w_4s': {'channels': (16, 32, 64, 128)}, 'densenet121': {'growth_rate': 8}}
"""Members that are wide, made narrow: the equations grow with the cube of the width."""
TECHNIQUES = ('kernels', 'channels', 'share', 'blocks')


def measure(name: str, technique: str) -> dict[str, Any]:
    """Errors `before` and `after` of one network and technique, or by what it was `refused`."""
    torch.manual_seed(0)
    original = timm.create_model(name, num_classes=10, **NARROW.get(name, {})).eval()
    for module in original.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    x = nn.functional.interpolate(torch.randn(12, 3, 8, 8), size=64, mode='bilinear')
    try:
        plain, calibrated = compress(original, technique, x)
    except LeanError as e:
        return {'refused': str(e)}
    held = x[3::4]
    return {'before': error(plain, original, held), 'after': error(calibrated, original, held)}


def compress(original: nn.Module, technique: str, x: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    """The compressed network as it is and calibrated."""
    if technique == 'blocks':
        new: Any = timm_lean.remove_blocks(original, count=1, calibration=[x])
        return timm_lean.remove_blocks(original, blocks=[name for name, *_ in new.lean_report.removed]), new
    plain: Any
    if technique == 'kernels':
        plain = timm_lean.prune_kernels(original, amount=0.4)
    elif technique == 'channels':
        plain = timm_lean.prune_channels(original, x[:1], pruning_ratio=0.25, round_to=1)
    else:
        plain = timm_lean.share(original, shared_rank=16)
    return plain, timm_lean.calibrate(plain, original, [x], kept=getattr(plain.lean_report, 'kept', None))


@torch.no_grad()
def error(model: nn.Module, original: nn.Module, x: torch.Tensor) -> float:
    y = original(x)
    return float((model(x) - y).norm() / y.norm())


def run(args: argparse.Namespace) -> str:
    """Measure what is missing; a Markdown table."""
    output = Path(args.output)
    rows: dict[str, dict[str, Any]] = json.loads(output.read_text()) if output.is_file() else {}
    for name in tqdm(args.only or FAMILIES, 'families'):
        for technique in TECHNIQUES:
            if technique not in rows.setdefault(name, {}):
                rows[name][technique] = measure(name, technique)
                output.write_text(json.dumps(rows, indent=1) + '\n')
    return format_rows(rows)


def format_rows(rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, a line per network, and under it why what was refused was."""
    lines = [f'| network | {" | ".join(TECHNIQUES)} |', '|' + ' --- |' * (len(TECHNIQUES) + 1)]
    reasons = []
    for name, row in rows.items():
        cells = []
        for technique in TECHNIQUES:
            cell = row.get(technique, {})
            if 'refused' in cell:
                reasons.append(f'- `{name}`, {technique}: {cell["refused"]}')
            cells.append(f'{cell["before"]:.3f}, {cell["after"]:.3f}' if 'before' in cell else
                         'refused' if cell else '')
        lines.append(f'| `{name}` | {" | ".join(cells)} |')
    return '\n'.join([*lines, '', *reasons])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog='reproduce calibration-families', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--output', metavar='FILE', required=True, help='keep finished rows in this file')
    p.add_argument('--only', nargs='+', choices=FAMILIES, metavar='NAME', help='these networks')
    return p
