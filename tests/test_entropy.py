"""Entropy of datasets, against independent computations by numpy and scipy."""
import json
import math
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.stats import entropy as scipy_entropy

from timm_lean.depth import EntropyResult, dataset_entropy
from timm_lean.depth.histogram import entropies
from timm_lean.depth.images import open_source
from timm_lean.errors import LeanError


def reference(values: np.ndarray, bins: int = 256, top: float = 256) -> float:
    """Entropy in nats of the histogram of all values."""
    return float(scipy_entropy(np.histogram(values, bins=bins, range=(0, top))[0]))


def random_image(seed: int, size: tuple[int, int] = (12, 17), channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = size if channels == 1 else (*size, channels)
    return (rng.normal(120, 20 + 10 * (seed % 5), shape).clip(0, 255)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 PNG images in two class folders."""
    root = tmp_path / 'data'
    for i in range(40):
        path = root / 'ab'[i % 2] / f'{i:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_image(i)).save(path)
    return root


def arrays_of(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(p)) for p in sorted(folder.rglob('*.png'))]


# --- the number -------------------------------------------------------------------------------------------------------

def test_pooled_is_the_mean_of_scipys_entropies(folder):
    result = dataset_entropy(folder)
    expected = [reference(a) for a in arrays_of(folder)]
    np.testing.assert_allclose(result.values, expected, rtol=1e-12)
    assert result.nats == pytest.approx(np.mean(expected), rel=1e-12)
    assert result.bits == pytest.approx(np.mean(expected) / math.log(2), rel=1e-12)
    assert result.std == pytest.approx(np.std(expected), rel=1e-10)
    assert result.quantiles[0.5] == pytest.approx(np.median(expected))
    assert (result.count, result.total, result.channels, result.image_size) == (40, 40, 3, (17, 12))
    assert result.formats == {'3 x 8-bit': 40}
    assert result.interval == (result.nats, result.nats)


def test_per_channel_is_the_mean_over_the_channels(folder):
    result = dataset_entropy(folder, mode='per_channel')
    expected = np.array([[reference(a[..., c]) for c in range(3)] for a in arrays_of(folder)])
    np.testing.assert_allclose(result.per_channel, expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(result.values, expected.mean(1), rtol=1e-12)


def test_grayscale_is_pils_luma(folder):
    images = [Image.open(p) for p in sorted(folder.rglob('*.png'))]
    expected = [reference(np.asarray(i.convert('L'))) for i in images]
    np.testing.assert_allclose(dataset_entropy(folder, mode='grayscale').values, expected, rtol=1e-12)
    np.testing.assert_allclose(dataset_entropy(arrays_of(folder), mode='grayscale').values, expected, rtol=1e-12)


def test_joint_counts_colours(folder):
    expected = [float(scipy_entropy(np.unique(a.reshape(-1, 3), axis=0, return_counts=True)[1]))
                for a in arrays_of(folder)]
    np.testing.assert_allclose(dataset_entropy(folder, mode='joint').values, expected, rtol=1e-12)


def test_dataset_is_one_histogram(folder):
    result = dataset_entropy(folder, mode='dataset', workers=2)
    assert result.nats == pytest.approx(reference(np.stack(arrays_of(folder))), rel=1e-12)
    assert (result.std, result.interval, result.count) == (0, None, 40)


def test_large_images_take_the_other_way_to_the_same_number():
    images = [Image.fromarray(random_image(i, (200, 150))) for i in range(3)]
    expected = [reference(np.asarray(i)) for i in images]
    np.testing.assert_allclose(dataset_entropy(images).values, expected, rtol=1e-12)
    channels = [np.mean([reference(np.asarray(i)[..., c]) for c in range(3)]) for i in images]
    np.testing.assert_allclose(dataset_entropy(images, mode='per_channel').values, channels, rtol=1e-12)


@pytest.mark.parametrize('mode', ['pooled', 'per_channel', 'grayscale', 'joint', 'dataset'])
@pytest.mark.parametrize('value', [0, 7, 255])
def test_a_constant_image_has_none(mode, value):
    result = dataset_entropy([np.full((9, 11, 3), value, np.uint8)] * 2, mode=mode)
    assert result.nats == 0
    assert result.std == 0


def test_uniform_noise_has_8_bits():
    image = np.random.default_rng(0).permutation(np.arange(256 * 64) % 256).astype(np.uint8).reshape(128, 128)
    assert dataset_entropy([image]).bits == pytest.approx(8, abs=1e-12)
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000), dtype=np.uint8)
    assert dataset_entropy([noise]).bits == pytest.approx(8, abs=1e-3)


def test_two_values_have_one_bit():
    image = np.zeros((4, 4), np.uint8)
    image[:2] = 200
    assert dataset_entropy([image]).bits == pytest.approx(1, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]))))
def test_bounds_hold_for_any_image(image):
    pooled, joint, channels = (dataset_entropy([image], mode=m).nats for m in ('pooled', 'joint', 'per_channel'))
    assert 0 <= channels <= pooled + 1e-12 <= math.log(256) + 1e-9
    assert channels <= joint + 1e-12 <= math.log(image.shape[0] * image.shape[1]) + 1e-9
    assert pooled == pytest.approx(reference(image), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.integers(0, 10 ** 6)))
def test_entropies_of_any_histogram_are_scipys(counts):
    counts[:, 0] += 1
    np.testing.assert_allclose(entropies(counts), [scipy_entropy(c) for c in counts], rtol=1e-9, atol=1e-12)


# --- the bins ---------------------------------------------------------------------------------------------------------

def test_16_bits_use_256_bins_over_their_own_range():
    image = random_image(3, channels=1).astype(np.uint16) * 257
    assert dataset_entropy([image]).nats == pytest.approx(reference(image, 256, 65536))
    assert dataset_entropy([image], bins=1024).nats == pytest.approx(reference(image, 1024, 65536))


@pytest.mark.parametrize('bins', [2, 16, 100, 256])
def test_bins(bins):
    image = random_image(1)
    assert dataset_entropy([image], bins=bins).nats == pytest.approx(reference(image, bins), rel=1e-12)
    assert dataset_entropy([Image.fromarray(image)], bins=bins).nats == pytest.approx(reference(image, bins), rel=1e-12)


def test_floats_of_to_tensor_give_the_entropy_of_the_image():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(32, 24)
    tensor = torch.from_numpy(image)[None].float() / 255
    assert dataset_entropy([tensor]).nats == dataset_entropy([image]).nats


# --- kinds of images --------------------------------------------------------------------------------------------------

def test_modes_of_pil_images():
    rgb = Image.fromarray(random_image(5))
    expected = dataset_entropy([rgb]).nats
    rgba = rgb.convert('RGBA')
    rgba.putalpha(Image.fromarray(random_image(6, channels=1)))
    assert dataset_entropy([rgba]).nats == pytest.approx(expected, rel=1e-12)
    palette = rgb.quantize(16)
    assert dataset_entropy([palette]).nats == pytest.approx(dataset_entropy([palette.convert('RGB')]).nats, rel=1e-12)
    palette.info['transparency'] = bytes(range(16))
    opaque = palette.convert('RGBA').convert('RGB')
    assert dataset_entropy([palette]).nats == pytest.approx(dataset_entropy([opaque]).nats, rel=1e-12)
    gray = rgb.convert('L')
    assert dataset_entropy([gray]).nats == pytest.approx(dataset_entropy([gray.convert('RGB')]).nats, rel=1e-12)
    assert dataset_entropy([gray.convert('LA')]).nats == pytest.approx(dataset_entropy([gray]).nats, rel=1e-12)
    bilevel = gray.point(lambda v: 255 * (v > 120)).convert('1')
    assert 0 < dataset_entropy([bilevel]).bits <= 1


def test_16_bit_png(tmp_path):
    image = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    Image.fromarray(image).save(tmp_path / 'a.png')
    result = dataset_entropy(tmp_path)
    assert result.nats == pytest.approx(reference(image, 256, 65536))
    assert result.formats == {'1 x 16-bit': 1}


def test_forms_a_dataset_may_give():
    image = random_image(2)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    expected = dataset_entropy([image]).nats
    for item in (tensor, (tensor, 3), [tensor], {'image': tensor}, {'img': Image.fromarray(image)}, image.copy()):
        assert dataset_entropy([item]).nats == expected


@pytest.mark.parametrize('item, words', [
    ({'label': 3}, 'no image'), ('text', 'str'), (torch.randn(3, 8, 8), 'Normalize'), (torch.zeros(3), 'shape'),
    (np.full((4, 4), np.nan), 'Normalize'), (np.full((4, 4), 70000), '16 bits'), (np.zeros((0, 4), np.uint8), 'shape'),
])
def test_items_that_are_no_images(item, words):
    with pytest.raises(LeanError, match=words):
        dataset_entropy([item])


# --- sources ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('suffix, mode', [('.tar', 'w'), ('.tar.gz', 'w:gz'), ('.tar.xz', 'w:xz'), ('.tgz', 'w:gz')])
def test_tar(folder, tmp_path, suffix, mode):
    path = tmp_path / f'data{suffix}'
    with tarfile.open(path, mode) as tar:
        tar.add(folder, arcname='data')
    expected = dataset_entropy(folder)
    assert dataset_entropy(path) == expected
    assert dataset_entropy(path, workers=2) == expected


def coco(folder: Path, annotations: Path, names: list[str]) -> Path:
    annotations.parent.mkdir(parents=True, exist_ok=True)
    annotations.write_text(json.dumps({'images': [{'id': i, 'file_name': n} for i, n in enumerate(names)],
                                       'annotations': [], 'categories': []}))
    return annotations


def test_coco(folder, tmp_path):
    names = [str(p.relative_to(folder)) for p in folder.rglob('*.png')]
    expected = dataset_entropy(folder)
    beside = coco(folder, folder / 'annotations' / 'train.json', names)
    assert dataset_entropy(beside) == expected
    elsewhere = coco(folder, tmp_path / 'elsewhere' / 'x.json', names)
    assert dataset_entropy(elsewhere, images_dir=folder) == expected
    with pytest.raises(LeanError, match='images_dir'):
        dataset_entropy(elsewhere)
    folder.rename(tmp_path / 'train2017')
    assert dataset_entropy(coco(folder, tmp_path / 'annotations' / 'instances_train2017.json', names)) == expected


def test_torch_and_timm_datasets(folder):
    from timm.data import ImageDataset
    from torchvision.datasets import ImageFolder
    expected = dataset_entropy(folder)
    assert dataset_entropy(ImageFolder(str(folder))) == expected
    assert dataset_entropy(ImageDataset(str(folder), reader='folder')) == expected
    assert open_source(ImageFolder(str(folder))).name(0) == str(folder / 'a' / '00.png')


# --- deterministic ----------------------------------------------------------------------------------------------------

def test_the_order_of_the_images_does_not_matter(folder):
    images = arrays_of(folder)
    expected = dataset_entropy(images)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(images))
        result = dataset_entropy([images[i] for i in order])
        assert (result.nats, result.std, result.quantiles) == (expected.nats, expected.std, expected.quantiles)


@pytest.mark.parametrize('mode', ['pooled', 'dataset'])
def test_workers_give_the_same_answer(folder, mode):
    images = arrays_of(folder) * 5
    assert dataset_entropy(images, mode=mode, workers=2) == dataset_entropy(images, mode=mode)


def test_sample(folder):
    full = dataset_entropy(folder)
    sample = dataset_entropy(folder, samples=20)
    assert sample == dataset_entropy(folder, samples=20)
    assert sample.nats != dataset_entropy(folder, samples=20, seed=1).nats
    assert (sample.count, sample.total) == (20, 40)
    low, high = sample.interval
    n, total = 20, 40
    half = 1.959964 * np.std(sample.values, ddof=1) / math.sqrt(n) * math.sqrt((total - n) / total)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-6)
    assert dataset_entropy(folder, samples=1000) == full


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 2 ** rng.integers(1, 9), (8, 8), dtype=np.uint8) for _ in range(300)]
    truth = dataset_entropy(images).nats
    hits = 0
    for seed in range(100):
        low, high = dataset_entropy(images, samples=60, seed=seed, confidence=0.9).interval
        hits += low <= truth <= high
    assert 82 <= hits <= 97


def _shard_worker(rank: int, world: int, folder: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{output}/init', rank=rank, world_size=world)
    results = [dataset_entropy(folder, mode=m, on_error='skip').to_dict() for m in ('pooled', 'dataset', 'per_channel')]
    try:
        dataset_entropy(folder)
    except LeanError as e:
        results.append(str(e))
    Path(output, f'{rank}.json').write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_processes_give_the_answer_of_one(folder, tmp_path):
    (folder / 'a' / '03.png').write_bytes(b'not an image')
    single = [dataset_entropy(folder, mode=m, on_error='skip').to_dict() for m in ('pooled', 'dataset', 'per_channel')]
    with pytest.raises(LeanError) as e:
        dataset_entropy(folder)
    mp.spawn(_shard_worker, args=(2, str(folder), str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert json.loads((tmp_path / f'{rank}.json').read_text()) == json.loads(json.dumps([*single, str(e.value)]))


# --- JPEG -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['RGB', 'L', 'CMYK', 'progressive', '420', 'large'])
@pytest.mark.parametrize('mode', ['pooled', 'per_channel', 'grayscale', 'joint'])
def test_every_kind_of_jpeg_is_what_pil_decodes(tmp_path, kind, mode):
    smooth = Image.fromarray(random_image(0, (8, 12))).resize((250, 130) if kind == 'large' else (45, 30))
    options = {'progressive': dict(progressive=True), '420': dict(subsampling=2)}.get(kind, {})
    smooth.convert(kind if kind in ('L', 'CMYK') else 'RGB').save(tmp_path / 'a.jpg', quality=85, **options)
    with Image.open(tmp_path / 'a.jpg') as image:
        decoded = image if kind == 'L' else image.convert('RGB')
        decoded.load()
    measured, expected = dataset_entropy(tmp_path, mode=mode), dataset_entropy([decoded], mode=mode)
    assert measured.nats == expected.nats
    assert (measured.image_size, measured.formats) == (expected.image_size, expected.formats)
    if mode == 'pooled':
        assert measured.nats == pytest.approx(reference(np.asarray(decoded)), rel=1e-12)


@pytest.mark.parametrize('damage', [lambda b: b[:len(b) // 2], lambda b: b[:len(b) // 2] + b[-2:], lambda b: b[:30]])
def test_a_damaged_jpeg_is_reported_as_pil_does(tmp_path, damage):
    """Cut off, also with its end marker; what PIL decodes all the same is measured."""
    Image.fromarray(random_image(0, (64, 64))).save(tmp_path / 'a.jpg')
    (tmp_path / 'a.jpg').write_bytes(damage((tmp_path / 'a.jpg').read_bytes()))
    try:
        with Image.open(tmp_path / 'a.jpg') as image:
            image.load()
    except OSError:
        with pytest.raises(LeanError, match=r'a\.jpg'):
            dataset_entropy(tmp_path)
    else:
        assert dataset_entropy(tmp_path).nats == dataset_entropy([image]).nats


# --- bad input --------------------------------------------------------------------------------------------------------

def test_an_unreadable_image_is_named_or_skipped(folder):
    whole = dataset_entropy(folder)
    broken = folder / 'b' / '07.png'
    broken.write_bytes(broken.read_bytes()[:100])
    (folder / 'a' / 'empty.jpg').touch()
    with pytest.raises(LeanError, match=r'a/empty\.jpg cannot be read .*on-error skip'):
        dataset_entropy(folder)
    (folder / 'a' / 'empty.jpg').unlink()
    with pytest.raises(LeanError, match=r'b/07\.png cannot be read'):
        dataset_entropy(folder, workers=2)
    result = dataset_entropy(folder, on_error='skip')
    assert result.skipped == (str(broken),)
    assert (result.count, result.total) == (39, 40)
    assert result.interval == (result.nats, result.nats)
    assert result.nats != whole.nats


def test_nothing_readable(tmp_path):
    (tmp_path / 'a.jpg').write_bytes(b'no')
    with pytest.raises(LeanError, match=r'None of the 1 images'):
        dataset_entropy(tmp_path, on_error='skip')


@pytest.mark.parametrize('files, words', [
    ([], 'empty'), (['readme.txt', 'labels.csv'], r'\.csv, \.txt'), (['clip.mp4'], 'ffmpeg'),
    (['.hidden.png'], 'empty')])
def test_a_folder_without_images(tmp_path, files, words):
    for name in files:
        (tmp_path / name).write_text('x')
    with pytest.raises(LeanError, match=words):
        dataset_entropy(tmp_path)


def test_a_video_among_images(folder):
    (folder / 'clip.mp4').write_bytes(b'x')
    with pytest.raises(LeanError, match=r'clip\.mp4 cannot be read .*video'):
        dataset_entropy(folder)
    assert dataset_entropy(folder, on_error='skip').count == 40


def test_mixed_images(folder):
    image = random_image(0, channels=1)
    Image.fromarray(image).save(folder / 'gray.png')
    assert dataset_entropy(folder).formats == {'3 x 8-bit': 40, '1 x 8-bit': 1}
    with pytest.raises(LeanError, match=r'mixed number of channels.*gray\.png \(1\)'):
        dataset_entropy(folder, mode='per_channel')
    Image.fromarray(image.astype(np.uint16) * 256).save(folder / 'deep.png')
    with pytest.raises(LeanError, match=r'mixed depth.*8-bit.*deep\.png \(16-bit\)'):
        dataset_entropy(folder)


@pytest.mark.parametrize('kwargs, words', [
    (dict(mode='color'), "'color'"), (dict(bins=1), 'bins'), (dict(bins=1e3), 'bins'), (dict(samples=1), 'samples'),
    (dict(confidence=1.0), 'confidence'), (dict(on_error='ignore'), 'ignore'), (dict(workers=-1), 'workers')])
def test_bad_arguments(kwargs, words):
    with pytest.raises(LeanError, match=words):
        dataset_entropy([random_image(0)], **kwargs)


def test_bad_sources(tmp_path):
    with pytest.raises(LeanError, match='does not exist'):
        dataset_entropy(tmp_path / 'nowhere')
    with pytest.raises(LeanError, match='is empty'):
        dataset_entropy([])
    with pytest.raises(LeanError, match='generator'):
        dataset_entropy(i for i in range(3))
    (tmp_path / 'x.tar').write_bytes(b'nonsense')
    with pytest.raises(LeanError, match='not a whole tar'):
        dataset_entropy(tmp_path / 'x.tar')
    (tmp_path / 'x.json').write_text('{"a": 1}')
    with pytest.raises(LeanError, match='COCO'):
        dataset_entropy(tmp_path / 'x.json')
    (tmp_path / 'x.mp4').touch()
    with pytest.raises(LeanError, match='ffmpeg'):
        dataset_entropy(tmp_path / 'x.mp4')
    with tarfile.open(tmp_path / 'y.tar', 'w') as tar:
        tar.add(tmp_path / 'x.json', arcname='x.json')
    with pytest.raises(LeanError, match='holds no images'):
        dataset_entropy(tmp_path / 'y.tar')


def test_result_as_plain_data(folder):
    result = dataset_entropy(folder, samples=10)
    content = json.loads(json.dumps(result.to_dict()))
    assert content['bits'] == result.bits
    assert content['quantiles']['0.5'] == result.quantiles[0.5]
    assert isinstance(result, EntropyResult)
    assert 'values' not in content


# --- real data --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get('TIMM_LEAN_CIFAR10'), reason='TIMM_LEAN_CIFAR10 names no CIFAR-10 folder')
def test_cifar10():
    root = Path(os.environ['TIMM_LEAN_CIFAR10'])
    train = dataset_entropy(root / 'train', workers=2)
    assert (round(train.nats, 5), round(train.bits, 5), round(train.std, 4)) == (5.07444, 7.32086, 0.2957)
    assert train.count == 50_000
    assert round(dataset_entropy(root / 'test', workers=2).nats, 5) == 5.07386
