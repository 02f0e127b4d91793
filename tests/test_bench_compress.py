"""`tools/benchmark.py compress`: what it counts, by hand, and its rows."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image

from timm_lean import compress, save_model
from timm_lean.export.rounding import round_weights

TOOLS = Path(__file__).parents[1] / 'tools'


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_compress
    yield bench_compress
    sys.modules.pop('bench_compress', None)


def test_zeros_of_l1_cost_nothing(bench):
    """A convolution of 2 x 3 kernels of 3 x 3 with 10 of its 54 weights left, without bias, on 4 x 4 pixels."""
    conv = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1, bias=False))
    with torch.no_grad():
        conv[0].weight.flatten()[10:] = 0
        conv[0].weight.flatten()[:10] = 1
    sizes = bench.sparse_sizes(conv, torch.zeros(1, 3, 4, 4))
    assert sizes == {'params': 10, 'macs': 54 * 16 * 10 // 54, 'file': 4 * 10 + 7}  # 54 bits are 7 bytes


def test_the_smallest_ratio_that_meets_a_target(bench):
    def make(ratio):
        return None, {'size': 1 - ratio}, f'{ratio}'

    found = bench.smallest(make, lambda result: result[1]['size'] <= 0.4)
    assert 0.4 - found[1]['size'] == pytest.approx(0., abs=0.98 / 2 ** 9) and found[1]['size'] <= 0.4
    assert bench.smallest(make, lambda result: False) is None


@pytest.mark.slow
def test_what_is_stored_as_int8_is_rounded_again_after_training(bench):
    torch.manual_seed(0)
    model = timm.create_model('lean_resnet', layers=(2, 2), widths=(8, 16), num_classes=2).eval()
    images = [torch.randn(64, 3, 8, 8) for _ in range(2)]
    case = bench.Bench.__new__(bench.Bench)
    case.args, case.batches = SimpleNamespace(seed=0, agreement=False), images
    case.train = torch.cat(images), torch.arange(128) % 2
    for technique in ('int8', 'share'):
        new = compress(model, 'file=0.9', images, techniques=[technique])
        tuned = case.finetune(new, 1)
        again = round_weights(tuned)
        equal = all(torch.equal(a, b) for a, b in zip(tuned.parameters(), again.parameters(), strict=True))
        assert equal == (technique == 'int8') and not torch.equal(tuned(images[0]), new(images[0]))


@pytest.mark.slow
def test_rows_and_table(bench, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_lean.search.search._MOST_MIXES', 1)
    torch.manual_seed(0)
    model = timm.create_model('lean_resnet', layers=(2, 2), widths=(8, 16), num_classes=2, conv_shortcut=False)
    save_model(model, tmp_path / 'net.safetensors')
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for kind in 'ab':
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(16):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                    tmp_path / split / kind / f'{i}.png')
    arguments = ['--checkpoint', str(tmp_path / 'net.safetensors'), '--data-dir', str(tmp_path), '--img-size', '32',
                 '--images', '8', '--judge', '8', '--shares', '0.6', '--minutes', '5', '--finetune-epochs', '1',
                 '--rows', str(tmp_path / 'rows.jsonl'), '--plot', str(tmp_path / 'p.png')]
    assert bench.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / 'rows.jsonl').read_text().splitlines()]
    original = next(r for r in rows if r['method'] == 'original')
    for row in rows:
        if 'score' in row and row['method'] != 'original':
            assert row[row['quantity']] <= 0.6 * original[row['quantity']] * 1.001 and 0 <= row['score'] <= 100
    made = {(r['method'], r['quantity'], r['epochs']) for r in rows if 'score' in r}
    for quantity in ('params', 'macs', 'file'):
        assert {(m, quantity, e) for m in ('compress', 'torch-pruning', 'l1') for e in (0, 1)} <= made
    assert bench.main(arguments) == 0  # nothing is measured again
    assert len((tmp_path / 'rows.jsonl').read_text().splitlines()) == len(rows)
