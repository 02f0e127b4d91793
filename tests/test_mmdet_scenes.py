"""The embedded scenes: deterministic, in COCO format, boxes around digits, train and validation digits apart."""
import json

import numpy as np
import pytest
from mmdet_support import SHARED, open_config
from mmengine.registry import init_default_scope
from PIL import Image

from timm_lean import LeanError
from timm_lean.mmdet import DigitScenes, write_scenes
from timm_lean.training.data import digits_split

COUNTS = dict(train=6, val=3)


def test_files_are_the_same_every_time(tmp_path):
    for name in ('a', 'b'):
        write_scenes(tmp_path / name, 64, COUNTS)
    files = sorted(p.relative_to(tmp_path / 'a') for p in (tmp_path / 'a').rglob('*.*'))
    assert len(files) == 6 + 3 + 2
    assert all((tmp_path / 'a' / f).read_bytes() == (tmp_path / 'b' / f).read_bytes() for f in files)
    stamps = [(tmp_path / 'a' / f).stat().st_mtime_ns for f in files]
    write_scenes(tmp_path / 'a', 64, COUNTS)
    assert stamps == [(tmp_path / 'a' / f).stat().st_mtime_ns for f in files]


def test_boxes_surround_bright_strokes(tmp_path):
    write_scenes(tmp_path, 128, COUNTS)
    data = json.loads((tmp_path / 'annotations' / 'train.json').read_text())
    assert [c['name'] for c in data['categories']] == list('0123456789')
    images = {i['id']: np.asarray(Image.open(tmp_path / 'train' / i['file_name'])) for i in data['images']}
    for box in data['annotations']:
        x, y, w, h = box['bbox']
        image = images[box['image_id']]
        assert image.shape == (128, 128, 3)
        assert min(x, y) >= 0 and x + w <= 128 and y + h <= 128 and w >= 5 and h >= 10
        assert image[y:y + h, x:x + w].max() > np.median(image) + 60
        assert box['area'] == w * h and not box['iscrowd']


def test_validation_has_other_digits():
    (train, _), (val, labels) = digits_split('train'), digits_split('val')
    assert len(train) + len(val) == 1797 and len(set(labels)) == 10
    assert len(val) == 360


def test_dataset_writes_itself_and_loads(tmp_path):
    init_default_scope('mmdet')  # as a Runner does
    cfg = open_config(SHARED)
    dataset = DigitScenes(str(tmp_path), split='val', size=64, counts=COUNTS, pipeline=cfg.train_pipeline)
    assert len(dataset) == 3 and dataset.metainfo['classes'] == tuple('0123456789')
    item = dataset[0]
    assert item['inputs'].shape == (3, 64, 64) and len(item['data_samples'].gt_instances) >= 2


def test_bad_input(tmp_path):
    with pytest.raises(LeanError, match='train, val'):
        DigitScenes(str(tmp_path), split='test')
    write_scenes(tmp_path, 64, COUNTS)
    with pytest.raises(LeanError, match='6 scenes of 64 pixels, not 6 of 96'):
        write_scenes(tmp_path, 96, COUNTS)
    (tmp_path / 'annotations' / 'train.json').write_text('{')
    with pytest.raises(LeanError, match='damaged'):
        write_scenes(tmp_path, 64, COUNTS)
    (tmp_path / 'file').write_text('')
    with pytest.raises(LeanError, match='Cannot write'):
        write_scenes(tmp_path / 'file', 64, COUNTS)
