"""Time and memory of a training iteration of a detector: dense, shared, and shared with the hooks.

    python tools/bench_detection.py --backbones resnet34 resnet34_s48u1_dual --img-size 640 --batch-size 2
    python tools/bench_detection.py --configs mmdet_configs/bccd/*.py --img-size 320 --batch-size 4

The detector is RetinaNet as in `mmdet_configs/retinanet`. Rounds are interleaved (every variant once per round), so
that a disturbance hits all of them alike; the table shows medians and quartiles. The cost of the hooks is the median
over the rounds of the time with them over the time without, of the same detector. Hooks see weights only: their time
does not depend on the images, so their share grows as these get smaller. KernelPruningHook is measured between two
updates of its masks, as all but a few iterations of a training are.
"""
import argparse
import copy
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm_lean.mmdet  # noqa: F401  # isort: skip  (prepares what follows)
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from timm_lean.measure import count_params, peak_memory
from timm_lean.measure.timing import Timing, synchronize
from timm_lean.mmdet import KernelPruningHook, RegularizerHook
from timm_lean.mmdet.detector import build_detector
from timm_lean.mmdet.settings import open_config

CONFIG = Path(__file__).parents[1] / 'mmdet_configs' / '_base_' / 'retinanet_1x_coco.py'
CLASSES = 3  # of the random boxes; every detector has as many


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure; one dict per variant.

    Returns:
        Keys `what`, `params` (of the detector), `ms`, `q1`, `q3` of `repeats` iterations (forward, losses, backward,
        update), `peak_mb` beyond the weights, `hook` (relative cost of the hooks; None without).
    """
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    variants = {Path(path).stem: open_config(path) for path in args.configs}
    for name in () if variants else args.backbones:
        variants[name] = open_config(CONFIG)
        variants[name].model.backbone.model_name = name
    steps: dict[str, Callable[[], Any]] = {}
    params = {}
    pairs = {}
    for name, cfg in variants.items():
        model = build_detector(cfg).to(device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
        batch = make_batch(args.batch_size, args.img_size)
        hooks: list[Any] = []
        variants_of = {name: hooks}
        if name == list(variants)[-1]:
            if args.regularizers:
                hooks = [RegularizerHook([dict(type=reg, weight=args.weight) for reg in args.regularizers])]
                variants_of[f'{name} + {", ".join(args.regularizers)}'] = hooks
            if args.amount:
                hooks = [*hooks, pruning_hook(model, args.amount)]
                variants_of[f'{" + ".join([name, *args.regularizers])} + pruning'] = hooks
        for label, chosen in variants_of.items():
            steps[label] = make_step(model, optimizer, batch, device, chosen)
            params[label] = count_params(model)
            if chosen:
                pairs[label] = name
    timings = {label: Timing([]) for label in steps}
    for i in range(args.repeats + 1):
        # every other round backwards, so that no variant always follows the same one
        for label in list(steps) if i % 2 else list(steps)[::-1]:
            seconds = steps[label]()
            if i:
                timings[label].seconds.append(seconds)
    rows = []
    for label, timing in timings.items():
        low, high = timing.quartiles
        rows.append({
            'what': label, 'params': params[label], 'ms': 1e3 * timing.median, 'q1': 1e3 * low, 'q3': 1e3 * high,
            'repeats': len(timing.seconds), 'peak_mb': peak_memory(steps[label], device) / 1e6,
            'hook': timing.ratio(timings[pairs[label]]) - 1 if label in pairs else None})
    return rows


def make_step(
        model: Any, optimizer: torch.optim.Optimizer, data: dict[str, list[Any]], device: torch.device,
        hooks: Sequence[Any] = (),
) -> Callable[[], float]:
    """A training iteration, with what the hooks do in it, that returns its seconds."""
    runner = make_runner(model, hooks)
    # on the model, which others share, only during the iteration
    attached = [hook for hook in hooks if isinstance(hook, RegularizerHook)]

    def step() -> float:
        batch = copy.deepcopy(data)
        for hook in attached:
            hook.before_train(runner)
        synchronize(device)
        start = time.perf_counter()
        for hook in hooks:
            hook.before_train_iter(runner, 0)
        losses = model(**model.data_preprocessor(batch, training=True), mode='loss')
        loss, _ = model.parse_losses(losses)
        loss.backward()
        optimizer.step()
        for hook in hooks:
            hook.after_train_iter(runner, 0)
        optimizer.zero_grad()  # at the end, so that the memory of the gradients is that of an iteration
        synchronize(device)
        seconds = time.perf_counter() - start
        for hook in attached:
            hook.after_train(runner)
        return seconds

    return step


def make_runner(model: Any, hooks: Sequence[Any]) -> Any:
    """What the hooks ask a Runner for."""
    return SimpleNamespace(
        model=model, hooks=list(hooks), iter=0, max_iters=1, max_epochs=1, train_dataloader=[None],
        logger=logging.getLogger(__name__))


def pruning_hook(model: Any, amount: float) -> KernelPruningHook:
    """A hook that has pruned the model's backbone."""
    hook = KernelPruningHook(amount=amount)
    runner = make_runner(model, [hook])
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    return hook


def make_batch(batch_size: int, size: int) -> dict[str, list[Any]]:
    """Random images with eight boxes each, before the data preprocessor."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(batch_size):
        low = rng.uniform(0, size * 0.6, (8, 2))
        boxes = np.concatenate((low, low + rng.uniform(size * 0.1, size * 0.4, (8, 2))), axis=1).astype(np.float32)
        sample = DetDataSample(metainfo=dict(
            img_shape=(size, size), ori_shape=(size, size), batch_input_shape=(size, size), pad_shape=(size, size),
            scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(
            bboxes=torch.from_numpy(boxes), labels=torch.from_numpy(rng.integers(0, CLASSES, 8)))
        samples.append(sample)
    images = [torch.from_numpy(rng.integers(0, 256, (3, size, size), dtype=np.uint8)) for _ in samples]
    return dict(inputs=images, data_samples=samples)


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ['| backbone | detector parameters | median ms | quartiles | repeats | memory, MB | cost of the hooks |',
             '|' + ' --- |' * 7]
    for row in rows:
        hook = '' if row['hook'] is None else f'{100 * row["hook"]:+.1f} %'
        lines.append(f'| {row["what"]} | {row["params"]:,} | {row["ms"]:.0f} | {row["q1"]:.0f} - {row["q3"]:.0f} | '
                     f'{row["repeats"]} | {row["peak_mb"]:.0f} | {hook} |')
    return '\n'.join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--backbones', nargs='+', default=['resnet34', 'resnet34_s48u1_dual'],
                   help='timm names, the one that is regularized last')
    p.add_argument('--configs', nargs='+', default=[], metavar='FILE',
                   help='detector configs instead of --backbones, the one that is regularized last')
    p.add_argument('--regularizers', nargs='+', default=['basis_ortho'])
    p.add_argument('--weight', type=float, default=1e-4)
    p.add_argument('--amount', type=float, default=0.5, help='share of the kernels pruned; 0 leaves pruning out')
    p.add_argument('--batch-size', type=int, default=2)
    p.add_argument('--img-size', type=int, default=640)
    p.add_argument('--repeats', type=int, default=20)
    p.add_argument('--device', default='cpu')
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    print(f'torch {torch.__version__}, {args.device}, {args.threads} threads, batch {args.batch_size} at '
          f'{args.img_size} px')
    print(format_rows(run(args)))
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
