"""`compress` on detectors: the same search, judged by the AP of the config's own evaluator."""
import copy
import json

import pytest
import torch
from mmdet_support import batch, predictions_of, write_native
from test_cli import run

import timm_lean
from timm_lean import LeanError
from timm_lean.mmdet import load_detector, open_detector, write_detector
from timm_lean.mmdet.on_images import on_images
from timm_lean.mmdet.runs import calibration_images, detector_scores
from timm_lean.mmdet.scoring import average_precision
from timm_lean.search.sizes import measure_sizes
from timm_lean.search.subject import subject_of

from conftest import by_params, shorten_searches  # isort: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_native(tmp_path_factory.mktemp('compress'))


@pytest.fixture(scope='module')
def detector(folder):
    return open_detector(folder / 'zoo.pth', folder / 'config.py')


@pytest.fixture(scope='module')
def images(detector):
    return list(calibration_images(detector, 8))


@pytest.fixture
def quick(monkeypatch):
    shorten_searches(monkeypatch, mixes=1, steps=3)


def scores(model):
    return [found.pred_instances.scores for found in predictions_of(model, batch(64, classes=10))]


class Oracle(torch.nn.Module):
    """Predicts the boxes that are there, of the first `share` of them."""

    def __init__(self, share=1.):
        super().__init__()
        self.share = share

    def test_step(self, data):
        samples = copy.deepcopy(data['data_samples'])
        for sample in samples:
            boxes = sample.gt_instances.bboxes
            boxes = getattr(boxes, 'tensor', boxes) / torch.tensor(sample.scale_factor).repeat(2)
            keep = round(self.share * len(boxes))
            sample.pred_instances = sample.gt_instances.new(
                bboxes=boxes[:keep], labels=sample.gt_instances.labels[:keep], scores=torch.ones(keep))
        return samples


@pytest.mark.parametrize('count', [None, 2])
def test_ap_is_of_the_images_that_judge(detector, count):
    """An oracle gets all, also when the annotations hold more images than were looked at; a blind one gets nothing."""
    score = average_precision(detector, count)
    assert score(Oracle()) == pytest.approx(100.)
    assert 20 < score(Oracle(0.5)) < 80
    assert score(Oracle(0.)) == 0.


def test_ap_is_that_of_mmengines_own_run(detector, monkeypatch):
    """The oracle's boxes come from the network here, so that the Runner's loop can give them too."""
    monkeypatch.setattr(type(detector), 'test_step', lambda self, data: Oracle(0.5).test_step(data), raising=False)
    (name, value), *_ = detector_scores(detector).items()
    assert name == 'coco/bbox_mAP'
    assert average_precision(detector)(detector) == pytest.approx(100 * value) and 0 < value < 1


def test_without_an_evaluator_there_is_no_ap_and_missing_data_are_told(detector, tmp_path):
    other = copy.copy(detector)
    other.cfg = copy.deepcopy(detector.cfg)
    other.cfg.test_evaluator = None
    assert average_precision(other) is None
    other.cfg = copy.deepcopy(detector.cfg)
    other.cfg.test_dataloader.dataset.update(type='CocoDataset', data_root=str(tmp_path), ann_file='none.json',
                                                metainfo=dict(classes=tuple('0123456789')))
    for key in ('split', 'size', 'counts'):
        other.cfg.test_dataloader.dataset.pop(key)
    with pytest.raises(LeanError, match=r'none\.json'):
        average_precision(other)


def test_costs_are_those_of_its_file_and_its_whole_forward_pass(detector, images, tmp_path):
    subject = subject_of(detector, images)
    sizes = measure_sizes(detector, subject, ('params', 'macs', 'file'))
    write_detector(detector, tmp_path / 'd.safetensors')
    assert sizes.file == (tmp_path / 'd.safetensors').stat().st_size
    assert sizes.params == sum(p.numel() for p in detector.parameters())
    assert sizes.macs > 1e6 and not detector.training and subject.x.shape == (1, 3, 64, 64)


@pytest.mark.slow
def test_a_detector_is_compressed_as_a_whole_and_reloads_equal(detector, images, quick, tmp_path):
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    new = timm_lean.compress(detector, {'params': 0.6, 'file': 0.3}, images, evaluate=by_params, folder=tmp_path)
    report, whole = new.lean_report, sum(p.numel() for p in detector.parameters())
    assert report.met and report.judged_by == 'AP' and report.weights == 'int8'
    assert sum(p.numel() for p in new.parameters()) <= 0.6 * whole
    assert {'blocks', 'channels', 'share', 'kernels', 'int8'} >= {name for name, _ in report.refused}
    tried = [c.plan for c in report.candidates]
    assert any(p.channels for p in tried) and any(p.share < 1 for p in tried) and any(p.blocks for p in tried)
    write_detector(new, tmp_path / 'new.safetensors', weights=report.weights)
    assert (tmp_path / 'new.safetensors').stat().st_size == report.chosen.sizes.file
    for a, b in zip(scores(load_detector(tmp_path / 'new.safetensors')), scores(new), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())


def test_without_a_measure_the_heads_outputs_judge(detector, images):
    """Rounded to int8, the error by hand: of all tensors of the heads, on every fourth image."""
    new = timm_lean.compress(detector, 'file=0.4', images, techniques=['int8'])
    report = new.lean_report
    assert report.judged_by == 'likeness of the output' and report.original.score == pytest.approx(100.)
    held = torch.cat(images)[3::4]
    with torch.no_grad(), on_images(detector), on_images(new):
        pairs = list(zip(new(held), detector(held), strict=True))
    lost = sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    assert 0 < lost < 0.05 and report.chosen.score == pytest.approx(100 * (1 - float(lost)), abs=1e-3)


def test_a_detector_without_a_config_is_told(detector, images):
    bare = copy.copy(detector)
    bare.cfg = None
    with pytest.raises(LeanError, match='open_detector'):
        timm_lean.compress(bare, 'params=0.8', images)


def arguments(folder):
    return ['compress', folder / 'zoo.pth', '--det-config', folder / 'config.py', '--calibrate', '8', '--device', 'cpu']


def test_command(capsys, tmp_path, folder):
    output = tmp_path / 'small.safetensors'
    code, out, err = run(capsys, *arguments(folder), '--target', 'file=0.4', '--techniques', 'int8', '--judge', '2',
                         '-o', output, '--json')
    assert code == 0, err
    result = json.loads(out)
    assert result['report']['chosen']['sizes']['file'] == output.stat().st_size
    write_detector(open_detector(folder / 'zoo.pth', folder / 'config.py'), tmp_path / 'whole.safetensors')
    assert output.stat().st_size <= 0.4 * (tmp_path / 'whole.safetensors').stat().st_size
    assert load_detector(output).bbox_head.retina_cls.out_channels == 10
    assert {p.name for p in (tmp_path / 'small.search').iterdir()} == {
        'candidates.jsonl', 'frontier.csv', 'frontier.png'}


@pytest.mark.slow
def test_out_of_reach_is_exit_code_3(capsys, tmp_path, folder, quick):
    code, _, err = run(capsys, *arguments(folder), '--target', 'params=0.01', '--techniques', 'share', '--judge', '2',
                       '-o', tmp_path / 'none.safetensors')
    assert code == 3 and 'out of reach' in err and not (tmp_path / 'none.safetensors').exists()


@pytest.mark.parametrize(('given', 'words'), [
    (['--target', 'size=0.5'], ["'size'"]),
    (['--target', 'params=0.5', '--data-dir', 'x'], ['--data-dir', 'classification']),
    (['--target', 'params=0.5', '--distill'], ['--distill', 'classification']),
    (['--target', 'params=0.5', '--finetune-lr', '1'], ['--finetune-epochs']),
    (['--target', 'params=0.5', '--data-root', 'nowhere/x'], ['nowhere'])], ids=lambda v: ' '.join(v)[:40])
def test_bad_input_is_one_line(capsys, tmp_path, folder, given, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'nowhere').write_text('a file')
    code, _, err = run(capsys, *arguments(folder), *given, '-o', 'o.safetensors')
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert all(word in err for word in words)
    assert not (tmp_path / 'o.safetensors').exists()


def test_what_belongs_to_detectors_is_told_to_other_networks(capsys, tmp_path):
    code, _, err = run(capsys, 'compress', 'resnet20_cifar', '--random-weights', '--target', 'params=0.5',
                       '--data-root', 'x', '-o', tmp_path / 'o.safetensors')
    assert code == 2 and '--data-root' in err and 'detectors' in err
