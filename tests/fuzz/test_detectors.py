"""Damaged and hostile detector files give one CheckpointError or a detector, fast, and run nothing."""
import json
import random
import resource
import sys

import pytest
import torch.nn as nn

from fuzz import fuzz, interesting, mutate_json
from fuzz.safetensors_file import entry_of, mutate_file, with_entry
from timm_lean import CheckpointError

pytest.importorskip('mmdet')

from mmdet_support import DENSE, scenes_config

from timm_lean.mmdet import load_detector
from timm_lean.mmdet.detector import build_detector, describe, save_detector
from timm_lean.mmdet.settings import parse_config
from timm_lean.mmdet.weights import DETECTOR_KEY

COMMANDS = 'os.system', 'subprocess.run', 'subprocess.Popen', 'timeit.timeit', 'builtins.eval', 'os.mkdir'


def hostile(rng: random.Random):
    """A value that a config must not hold, or another odd one."""
    mark = 'fuzzed_mark'
    return rng.choice([
        interesting(rng), 20_000, {'type': rng.choice(COMMANDS), 'command': f'touch {mark}', 'args': ['touch', mark]},
        {'type': 'timeit.timeit', 'stmt': f'open({mark!r}, "w")'}, f'open({mark!r}, "w")', 'https://localhost/x', 'nms',
        'mmdet.FPN', 'FPN', 'mmengine.Runner', {'type': 'BN'}, {'type': 'FPN', '_scope_': 'antigravity'}, 'SGD'])


@pytest.mark.timeout(0)
def test_mutated_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = scenes_config(tmp_path, DENSE)
    cfg.model.backbone.update(model_name='resnet18', model_args=dict(
        channels=(4, 4, 8, 8), layers=(1, 1, 1, 1), stem_width=4), out_indices=(2, 3, 4))
    model = build_detector(cfg)
    path = tmp_path / 'd.safetensors'
    save_detector(model, path, describe(cfg, model, {'classes': [str(i) for i in range(10)]}))
    data = path.read_bytes()
    config = parse_config(entry_of(data, DETECTOR_KEY)['config']).to_dict()
    load_detector(path)
    modules = set(sys.modules)

    def attempt(rng):
        if rng.random() < 0.5:
            path.write_bytes(mutate_file(rng, data, DETECTOR_KEY))
        else:
            part = rng.choice(['model', 'model', 'test_dataloader', 'train_dataloader', None])
            plain = json.loads(json.dumps(config))
            changed = mutate_json(rng, plain if part is None else plain[part], hostile)
            changed = changed if part is None else {**plain, part: changed}
            text = '\n'.join(f'{k} = {v!r}' for k, v in changed.items()) if isinstance(changed, dict) else repr(changed)
            path.write_bytes(with_entry(data, key=DETECTOR_KEY, config=text))
        assert isinstance(load_detector(path), nn.Module)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = fuzz(attempt, count=30, allowed=CheckpointError)
    assert outcome['refused'] and outcome['accepted'], outcome
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB
    assert not (tmp_path / 'fuzzed_mark').exists()
    assert not {name for name in set(sys.modules) - modules if name.partition('.')[0] in ('antigravity', 'this')}
