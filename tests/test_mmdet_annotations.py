"""Annotation files and settings are checked once, before a run; MMDetection's own dataset reads what is accepted."""
import json

import pytest
from mmdet_support import scenes_config
from mmengine.config import Config
from PIL import Image

from timm_lean import LeanError
from timm_lean.mmdet.data import check_data
from timm_lean_cli import detectors


def coco(folder, change=lambda data: None):
    """A folder with two images and their annotations, and a config that reads it."""
    (folder / 'images').mkdir(exist_ok=True)
    for name in ('a.png', 'b.png'):
        Image.new('RGB', (20, 10)).save(folder / 'images' / name)
    data = {
        'images': [
            {'id': i, 'file_name': name, 'width': 20, 'height': 10} for i, name in enumerate(('a.png', 'b.png'))],
        'categories': [{'id': 7, 'name': 'cat'}, {'id': 9, 'name': 'dog'}],
        'annotations': [
            {'id': i, 'image_id': i, 'category_id': 7 + 2 * i, 'bbox': [1, 1, 5.5, 5], 'area': 27.5, 'iscrowd': 0}
            for i in range(2)]}
    change(data)
    (folder / 'ann.json').write_text(json.dumps(data))
    dataset = dict(
        type='CocoDataset', data_root=str(folder), ann_file='ann.json', data_prefix=dict(img='images/'),
        metainfo=dict(classes=('cat', 'dog')), pipeline=[])
    return Config(dict(
        model=dict(bbox_head=dict(num_classes=2)),
        **{f'{split}_dataloader': dict(batch_size=2, num_workers=0, dataset=dataset) for split in ('train', 'test')}))


def test_a_good_file_is_accepted_and_read(tmp_path):
    from mmdet.datasets import CocoDataset
    cfg = coco(tmp_path)
    check_data(cfg, ('train', 'test'))
    kwargs = {k: v for k, v in cfg.train_dataloader.dataset.items() if k != 'type'}
    assert len(CocoDataset(**kwargs).get_data_info(1)['instances']) == 1


def changed(kind, **values):
    """A change of the second image, annotation or category; None takes a key out."""
    def change(data):
        data[kind][1].update(values)
        for key in [key for key, value in values.items() if value is None]:
            del data[kind][1][key]
    return change


BAD = {
    'no bbox': (changed('annotations', bbox=None), 'must have a bbox .* got None'),
    'three numbers': (changed('annotations', bbox=[1, 2, 3]), r'with id 1 must have a bbox .* got \[1, 2, 3\]'),
    'text': (changed('annotations', bbox=['1', 2, 3, 4]), 'must have a bbox'),
    'null in the box': (changed('annotations', bbox=[1, 2, 3, [None]]), 'must have a bbox'),
    'NaN': (changed('annotations', bbox=[1, 2, float('nan'), 4]), 'finite numbers'),
    'no area': (changed('annotations', area=None), 'must have an area'),
    'no category': (changed('annotations', category_id=None), 'the category_id of one of the file'),
    'unknown category': (changed('annotations', category_id=8), 'the category_id of one of the file, got 8'),
    'category of a wrong type': (changed('annotations', category_id=[7]), 'the category_id of one of the file'),
    'unknown image': (changed('annotations', image_id=5), 'the image_id of one of the file, got 5'),
    'no id': (changed('annotations', id=None), 'must have an id'),
    'same id': (changed('annotations', id=0), 'the annotation id 0 twice'),
    'same image id': (changed('images', id=0), 'the image id 0 twice'),
    'no width': (changed('images', width=None), 'must have a positive width'),
    'height 0': (changed('images', height=0), 'must have a positive height'),
    'no file name': (changed('images', file_name=None), 'must have a file_name'),
    'missing image': (changed('images', file_name='c.png'), r'1 of the 2 images of .* do not exist.*c\.png'),
    'no annotations': (lambda d: d.update(annotations=[]), "no annotations of the classes .'cat', 'dog'."),
    'annotations missing': (lambda d: d.pop('annotations'), 'no list of annotations'),
    'no images': (lambda d: d.update(images=[]), 'has no images'),
    'images missing': (lambda d: d.pop('images'), 'no list of images'),
    'images of numbers': (lambda d: d.update(images=[1]), 'no list of images'),
    'no categories': (lambda d: d.pop('categories'), 'no list of categories'),
    'same category id': (changed('categories', id=7), 'the category id 7 twice'),
    'same category name': (changed('categories', name='cat'), "the category name 'cat' twice"),
    'category without id': (changed('categories', id=None), 'no list of categories'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_annotations(tmp_path, name):
    change, message = BAD[name]
    with pytest.raises(LeanError, match=message) as error:
        check_data(coco(tmp_path, change), ('train',))
    assert '\n' not in str(error.value) and 'ann.json' in str(error.value)


@pytest.mark.parametrize('content, message', [
    (b'{"categories": "\xe9"}', 'is not UTF-8'),
    (b'[' * 100_000, 'is damaged or no JSON'),
    (b'{"categories": ', 'is damaged or no JSON'),
    (b'[]', 'no list of categories'),
])
def test_no_json(tmp_path, content, message):
    cfg = coco(tmp_path)
    (tmp_path / 'ann.json').write_bytes(content)
    with pytest.raises(LeanError, match=message):
        check_data(cfg, ('train',))


def test_empty_image_files(tmp_path):
    cfg = coco(tmp_path)
    (tmp_path / 'images' / 'b.png').write_bytes(b'')
    with pytest.raises(LeanError, match=r'1 of the 2 images .* are empty files'):
        check_data(cfg, ('train',))


def test_images_without_ground_truth_can_be_tested(tmp_path):
    check_data(coco(tmp_path, lambda d: d.update(annotations=[])), ('test',))


@pytest.mark.parametrize('options, message', [
    (['train_dataloader.batch_size=0'], 'train_dataloader.batch_size must be a whole number of at least 1, got 0'),
    (['val_dataloader.num_workers=-1'], 'val_dataloader.num_workers must be'),
    (['optim_wrapper.optimizer.lr=nan'], 'optim_wrapper.optimizer.lr must be a finite number'),
    (['optim_wrapper.optimizer.lr=-1'], 'optim_wrapper.optimizer.lr must be'),
    (['model.neck.type=FPM'], "asks for the type 'FPM', which is not in the mmdet::model registry"),
    (['train_dataloader.dataset.type=Cocoa'], "asks for the type 'Cocoa', which is not in the mmdet::dataset"),
])
def test_bad_settings_of_a_run(tmp_path, capsys, options, message):
    cfg = scenes_config(tmp_path)
    path = tmp_path / 'config.py'
    cfg.dump(path)
    assert detectors.train_main([str(path), '--work-dir', str(tmp_path / 'run'), '--cfg-options', *options]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob('run/*.pth'))
