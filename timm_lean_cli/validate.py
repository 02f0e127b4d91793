"""`timm-lean validate`: the accuracy of a network."""
import argparse
import sys

from .arguments import add_data, add_json, add_model, given
from .opening import data_options, finish, open_model

HELP = 'accuracy of a model on a dataset'


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_model(p)
    add_data(p)
    p.add_argument('--amp', help='mixed precision: bf16 or fp16')
    add_json(p)


def run(args: argparse.Namespace) -> None:
    from timm_lean.training.config import TrainConfig
    from timm_lean.training.evaluate import evaluate_source
    from timm_lean.training.settings import check_setting
    options = data_options(args)
    amp = {name: check_setting(TrainConfig, name, value) for name, value in given(args, 'amp').items()}
    metrics = evaluate_source(args.model, open_model(args), progress=sys.stderr.isatty(), **options, **amp)
    finish(args, {'model': args.model, **metrics},
           'top-1 {top1:.2f} %  top-5 {top5:.2f} %  loss {loss:.4f}  {images} images, '
           '{images_per_second:.0f} images/s'.format(**metrics))
