"""What the check of annotations accepts, MMDetection's own dataset reads."""
import json
import math

import pytest
from test_mmdet_annotations import coco

from fuzz import fuzz, mutate_json, mutate_text
from timm_lean import LeanError
from timm_lean.mmdet.data import check_data

datasets = pytest.importorskip('mmdet.datasets')


@pytest.mark.timeout(0)
def test_mutated_annotations(tmp_path):
    cfg = coco(tmp_path)
    kwargs = {k: v for k, v in cfg.train_dataloader.dataset.items() if k != 'type'}
    path = tmp_path / 'ann.json'
    text = path.read_text()

    def attempt(rng):
        data = mutate_json(rng, json.loads(text))
        changed = mutate_text(rng, text) if rng.random() < 0.3 else json.dumps(data)
        path.write_bytes(changed.encode(errors='surrogatepass'))
        check_data(cfg, ('train',))
        dataset = datasets.CocoDataset(**kwargs)
        for i in range(len(dataset)):
            for instance in dataset.get_data_info(i)['instances']:
                assert all(map(math.isfinite, instance['bbox'])) and instance['bbox_label'] in (0, 1)

    outcome = fuzz(attempt, count=80, allowed=LeanError)
    assert outcome['refused'] and outcome['accepted'], outcome
