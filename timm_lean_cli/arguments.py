"""The `timm-lean` console script: arguments only.

`timm_lean` (and with it torch) is imported when a command runs, so help and usage errors answer at once.
"""
import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

SUPPRESS = argparse.SUPPRESS


class _Parser(argparse.ArgumentParser):
    """Errors in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: {message} (see {self.prog} --help)\n')


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run` to 'module:function' in timm_lean."""
    parser = _Parser(prog='timm-lean', description='Smaller convolutional networks for timm and MMDetection.')
    parser.add_argument('--version', action='store_true', help='print the version')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', parser_class=_Parser)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument('--debug', action='store_true', help='show the traceback of an error')
        return sub

    models = command('models', 'list model names with parameters and MACs')
    models.add_argument('filter', nargs='?', default='', help='part of a name, or a pattern with *')
    models.add_argument('--json', action='store_true')

    info = command('info', 'parameters, MACs, file size and speed of a model')
    info.add_argument('model', help='timm name, checkpoint file or local-dir:DIR')
    info.add_argument('--vs', action='append', default=[], metavar='MODEL', help='compare with this one (repeatable)')
    info.add_argument('--img-size', type=int)
    info.add_argument('--latency', action='store_true', help='measure ms and peak memory on this device')
    info.add_argument('--plot', metavar='FILE', help='picture of accuracy against latency (with --latency) or MACs')
    info.add_argument('--data', choices=['digits', 'folder'], default='', help="accuracy on the embedded 'digits'")
    info.add_argument('--data-dir', metavar='DIR', help='accuracy on a folder with val/ or test/, or of class folders')
    info.add_argument('--device', default='auto')
    info.add_argument('--json', action='store_true')

    _add_train(command('train', 'train a classification model'))

    validate = command('validate', 'accuracy of a model on a dataset')
    validate.add_argument('model', help='timm name, checkpoint file or local-dir:DIR')
    _add_eval_data(validate)
    validate.add_argument('--batch-size', type=int, default=128)
    validate.add_argument('--workers', type=int, default=2)
    validate.add_argument('--amp', choices=['bf16', 'fp16'], default='')
    validate.add_argument('--json', action='store_true')

    predict = command('predict', 'classes of images, or objects in them by an exported detector')
    predict.add_argument('model', help='timm name, checkpoint file, local-dir:DIR, or the folder of a detector')
    predict.add_argument('images', nargs='+', metavar='IMAGE')
    predict.add_argument('--top', type=int, default=5, help='classes shown (default 5)')
    predict.add_argument('-o', '--output', metavar='FILE', help='detector: picture with boxes; a folder for several')
    predict.add_argument('--score-thr', type=float, default=0.3, help='detector: least score of a box (default 0.3)')
    predict.add_argument('--device', default='auto')
    predict.add_argument('--json', action='store_true')

    prune = command('prune', 'prune the kernels or channels of a checkpoint')
    prune.add_argument('model', help='checkpoint file, timm name or local-dir:DIR')
    prune.add_argument('-o', '--output', required=True, metavar='FILE', help='the pruned checkpoint')
    prune.add_argument('--criterion', default='spectral_norm', help='default spectral_norm; any other prints the list')
    prune.add_argument('--granularity', choices=['kernel', 'channel'], default='kernel')
    prune.add_argument('--again', action='store_true', help='prune a model that has been pruned before')
    prune.add_argument('--ignore', action='append', metavar='PATTERN', help='layers to leave alone (repeatable)')
    kernels = prune.add_argument_group('kernels (exactly one of threshold, amount and contrib)')
    kernels.add_argument('--threshold', type=float, metavar='T', help="below the criterion's threshold, e.g. 1e-4")
    kernels.add_argument('--amount', type=float, metavar='SHARE', help='the lowest share, e.g. 0.8')
    kernels.add_argument('--contrib', type=float, metavar='SHARE', help="below this share of the filter's total score")
    kernels.add_argument('--scope', choices=['global', 'layer', 'filter'], help='what --amount is a share of')
    kernels.add_argument('--min-keep', type=float, metavar='SHARE', help='each layer keeps at least (default 0.01)')
    kernels.add_argument('--compact', action='store_true', help='remove filters and channels that are all dead')
    kernels.add_argument('--plot', metavar='FILE', help='picture of the pruned share per layer')
    channels = prune.add_argument_group('channels (--granularity channel)')
    channels.add_argument('--ratio', type=float, metavar='SHARE', help='of the channels to remove (default 0.5)')
    channels.add_argument('--global', action='store_true', dest='global_pruning', help='rank all layers together')
    channels.add_argument('--round-to', type=int, metavar='N', help='keep multiples of N channels (default 8)')
    data = prune.add_argument_group('accuracy and fine-tuning')
    _add_eval_data(data)
    data.add_argument('--batch-size', type=int, default=128)
    data.add_argument('--workers', type=int, default=2)
    data.add_argument('--finetune-epochs', type=int, default=0, metavar='N', help='train the pruned model so long')
    data.add_argument('--finetune-lr', type=float, default=0.01, metavar='LR', help='default 0.01')

    shared = command('share', "convert a model to shared filter bases, from its own weights")
    shared.add_argument('model', help='checkpoint file, timm name or local-dir:DIR')
    shared.add_argument('-o', '--output', required=True, metavar='FILE', help='the converted checkpoint')
    size = shared.add_mutually_exclusive_group(required=True)
    size.add_argument('--params', type=float, metavar='SHARE', help="of the original's parameters, e.g. 0.5")
    size.add_argument('--energy', type=float, metavar='SHARE', help='of the squared norm that each basis keeps')
    size.add_argument('--shared-rank', type=int, metavar='N', help='filters of every basis')
    shared.add_argument('--unique-rank', type=int, default=0, metavar='N', help='more filters per layer (default 0)')
    shared.add_argument('--dual', action='store_true', help="a basis each for a block's first and second convolution")
    shared.add_argument('--bn', action='store_true', help='batch norms behind the filters, set by training images')
    shared.add_argument('--stages', type=int, nargs='+', metavar='N', help="as timm's feature levels; all if not given")
    shared.add_argument('--include', action='append', metavar='PATTERN', help='only these layers (repeatable)')
    shared.add_argument('--exclude', action='append', metavar='PATTERN', help='layers to leave alone (repeatable)')
    shared_data = shared.add_argument_group('accuracy and fine-tuning')
    _add_eval_data(shared_data)
    shared_data.add_argument('--batch-size', type=int, default=128)
    shared_data.add_argument('--workers', type=int, default=2)
    shared_data.add_argument('--finetune-epochs', type=int, default=0, metavar='N', help='train the result so long')
    shared_data.add_argument('--lr', type=float, default=0.01, help='of the fine-tuning (default 0.01)')
    shared_data.add_argument('--distill', action='store_true', help="fine-tune towards the original's features")

    export = command('export', 'write a checkpoint in another form')
    export.add_argument('model', help='checkpoint file or timm name')
    export.add_argument('--det-dir', metavar='DIR', help='detector checkpoint: folder for load_detector')
    export.add_argument('--det-config', metavar='FILE', help="detector checkpoint: its config, if it is a .pth")
    export.add_argument('--fold', nargs='?', const='all', choices=['all', 'auto'],
                        help='fold shared bases into dense convolutions first; auto: only where faster here')
    export.add_argument('--onnx', metavar='FILE', help='ONNX file with a dynamic batch size')
    export.add_argument('--torch-export', metavar='FILE', help='torch.export file (.pt2) with a dynamic batch size')
    export.add_argument('--half', action='store_true', help='store float16 tensors (-o and --hf-dir)')
    export.add_argument('--hf-dir', metavar='DIR', help='folder that timm loads as local-dir:DIR')
    export.add_argument('-o', '--output', metavar='FILE', help='checkpoint file')
    _add_eval_data(export)

    analyze = command('analyze', 'measure a property of a model on data')
    analyze.add_argument('model', help='timm name, checkpoint file or local-dir:DIR')
    analyze.add_argument('--similarity', action='store_true', help='redundancy of the feature maps, per layer')
    analyze.add_argument('--criteria', action='store_true', help='what each pruning criterion would prune')
    analyze.add_argument('--threshold', type=float, default=1e-4, help='--criteria: t of overlap and layers')
    analyze.add_argument('--ignore', action='append', metavar='PATTERN', help='--criteria: layers to leave out')
    analyze.add_argument('--vs', metavar='MODEL', help='a second model, shown beside the first')
    analyze.add_argument('--batches', type=int, default=4, help='batches of 64 images (default 4)')
    analyze.add_argument('-o', '--output', metavar='PATH', help='picture of the similarity (default similarity.png); '
                         'folder for --criteria (default output/analysis)')
    analyze.add_argument('--json', action='store_true')
    _add_eval_data(analyze)

    _add_depth(command('depth', 'how deep a network the data asks for, and that network'))

    command('doctor', 'what is installed, what works, what is missing')

    demo = command('demo', 'train, compare, export and reload on the embedded digits')
    demo.add_argument('--output', default='output/demo', help='folder for the results (default output/demo)')
    demo.add_argument('--epochs', type=int, default=8)
    demo.add_argument(
        '--detection', action=argparse.BooleanOptionalAction, help='with a detector (default: if installed)')
    return parser


def _add_train(p: argparse.ArgumentParser) -> None:
    """Flags of `TrainConfig`; only those given override the config file and the defaults."""
    p.argument_default = SUPPRESS

    def flag(name: str, help: str = '', **kwargs: Any) -> None:
        p.add_argument(name, default=SUPPRESS, help=help, **kwargs)

    def switch(name: str, help: str) -> None:
        p.add_argument(name, default=SUPPRESS, help=help, action=argparse.BooleanOptionalAction)

    p.add_argument('--config', help='YAML file, or the name of a shipped recipe')
    flag('--model', 'timm name, checkpoint file or local-dir:DIR')
    flag('--model-args', 'arguments of the timm name, e.g. shared_rank=24 dual=true', nargs='+', metavar='KEY=VALUE')
    flag('--num-classes', "number of classes (default: the data's)", type=int)
    flag('--data', "'digits' (embedded, default) or 'folder'", choices=['digits', 'folder'])
    flag('--data-dir', 'folder with train/ and val/ or test/, each with one folder per class', metavar='DIR')
    flag('--train-images', 'use only so many training images', type=int, metavar='N')
    flag('--img-size', "image size (default: the model's)", type=int)
    switch('--cache', 'decode all images once and keep them on the device')
    flag('--workers', 'data loading processes (default 2)', type=int)
    flag('--epochs', 'default 100', type=int)
    flag('--batch-size', 'per process (default 128)', type=int)
    flag('--grad-accum', 'steps per update (default 1)', type=int)
    flag('--opt', 'timm optimizer (default sgd)')
    flag('--lr', 'learning rate (default 0.1)', type=float)
    flag('--momentum', 'default 0.9', type=float)
    flag('--weight-decay', 'default 5e-4', type=float)
    switch('--decay-all', 'weight decay on biases and norms too')
    flag('--sched', 'learning rate schedule (default cosine)', choices=['cosine', 'multistep', 'poly', 'constant'])
    flag('--milestones', 'epochs at which multistep decays', type=int, nargs='+', metavar='EPOCH')
    flag('--decay-rate', 'default 0.1', type=float)
    flag('--warmup-epochs', 'default 0', type=int)
    flag('--min-lr', 'default 0', type=float)
    flag('--reg', 'regularizer, e.g. basis_ortho=10 (repeatable)', action='append', metavar='NAME=WEIGHT')
    flag('--init', 'data-free initialization before the first epoch', choices=['conv_similarity'])
    flag('--init-steps', 'its steps (default 200)', type=int)
    flag('--distill', 'learn the features of this network: checkpoint, or timm name with weights', metavar='TEACHER')
    flag('--distill-weight', 'weight of their mean squared error (default 1)', type=float, metavar='W')
    flag('--prune', 'prune kernels by this criterion while training, e.g. spectral_norm', metavar='CRITERION')
    flag('--prune-amount', 'share of the kernels to prune, e.g. 0.7', type=float, metavar='SHARE')
    flag('--prune-threshold', "prune below the criterion's threshold for this t instead", type=float, metavar='T')
    flag('--prune-scope', 'share of all kernels (default), of each layer or of each filter',
         choices=['global', 'layer', 'filter'])
    flag('--prune-schedule', 'default one_shot', choices=['one_shot', 'linear', 'cubic', 'exponential'])
    flag('--prune-epochs', 'when, in epochs, e.g. 10:30 (one_shot: 10; default: the start)', metavar='BEGIN:END')
    flag('--prune-steps', 'when, in optimizer updates', metavar='BEGIN:END')
    flag('--prune-every', 'epochs (or updates) between two updates of the masks (default 1)', type=float, metavar='N')
    flag('--prune-ignore', 'layers to leave alone (repeatable)', action='append', metavar='PATTERN')
    flag('--prune-min-keep', 'share of kernels each layer keeps at least (default 0.01)', type=float, metavar='SHARE')
    switch('--prune-again', 'prune a model that comes pruned further')
    flag('--smoothing', 'label smoothing', type=float)
    flag('--mixup', 'mixup alpha', type=float)
    flag('--cutmix', 'cutmix alpha', type=float)
    flag('--aug', "'crop' (default), 'rrc' or 'none'", choices=['crop', 'rrc', 'none'])
    flag('--hflip', 'probability of a flip (default 0.5, digits 0)', type=float)
    flag('--auto-augment', 'timm policy, e.g. rand-m9-mstd0.5')
    flag('--re-prob', 'random erasing', type=float)
    flag('--amp', 'mixed precision', choices=['bf16', 'fp16'])
    switch('--ema', 'evaluate an exponential moving average of the weights')
    flag('--ema-decay', 'default 0.9998', type=float)
    flag('--clip-grad', 'gradient norm', type=float)
    switch('--compile', 'torch.compile the model')
    switch('--channels-last', 'memory format')
    flag('--device', 'default auto')
    flag('--seed', 'default 0', type=int)
    flag('--output', 'folder of the run (default output/MODEL)', metavar='DIR')
    flag('--resume', 'continue the run in --output', action='store_true')


def _add_depth(p: argparse.ArgumentParser) -> None:
    p.add_argument('--data', choices=['digits', 'folder'], default='', help="'digits' are embedded")
    p.add_argument('--data-dir', metavar='PATH', help='image folder (of one with train/ that part), tar or COCO json')
    p.add_argument('--images-dir', metavar='DIR', help='images of a COCO json (default: beside it)')
    entropy = p.add_argument_group('entropy')
    entropy.add_argument('--mode', choices=['pooled', 'per_channel', 'grayscale', 'joint', 'dataset'], default='pooled')
    entropy.add_argument('--bins', type=int, default=256, help="over the pixel type's range (default 256)")
    entropy.add_argument('--samples', type=int, metavar='N', help='only so many images, with a confidence interval')
    entropy.add_argument('--seed', type=int, default=0, help='of the sample')
    entropy.add_argument('--on-error', choices=['raise', 'skip'], default='raise', help='at a broken image')
    entropy.add_argument('--workers', type=int, default=2)
    model = p.add_argument_group('bound and model')
    model.add_argument('--rule', default='bits_per_stage', help='from entropy to depth (default bits_per_stage)')
    model.add_argument('--family', default='resnet', help='of the suggested model (default resnet)')
    model.add_argument('--baseline', metavar='MODEL', help='timm name or checkpoint to compare with')
    model.add_argument('--budget', help="of the suggested model: 850k, macs=40M (default: the baseline's parameters)")
    model.add_argument('--num-classes', type=int)
    model.add_argument('--img-size', type=int, help="default: the baseline's, else the images'")
    model.add_argument('--batch-size', type=int, default=32, help='of the measured training step (default 32)')
    model.add_argument('--no-step-time', action='store_true', help='do not measure training steps')
    model.add_argument('--device', default='auto')
    model.add_argument('--write-config', metavar='FILE', help='recipe of the model for timm-lean train --config')
    model.add_argument('--json', action='store_true')
    sweep = p.add_argument_group('--verify')
    sweep.add_argument('--verify', action='store_true', help='train networks of several depths at equal budget')
    sweep.add_argument('--depths', type=int, nargs='+', help='default: from a quarter of the bound to three times')
    sweep.add_argument('--seeds', type=int, default=3)
    sweep.add_argument('--epochs', type=int, default=15)
    sweep.add_argument('--lr', type=float, default=0.05)
    sweep.add_argument('--hflip', type=float)
    sweep.add_argument('--train-images', type=int, metavar='N')
    sweep.add_argument('--output', metavar='DIR', help='runs and results (default output/depth)')


def _add_eval_data(p: argparse._ActionsContainer) -> None:
    p.add_argument('--data', choices=['digits', 'folder'], default='')
    p.add_argument('--data-dir', metavar='DIR', help='folder with val/ or test/, or of class folders')
    p.add_argument('--img-size', type=int)
    p.add_argument('--device', default='auto')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 failed, 2 bad input)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from importlib.metadata import version
        print(version('timm-lean'))
        return 0
    if not args.command:
        parser.print_help()
        return 2
    from .run import run
    return run(args)

