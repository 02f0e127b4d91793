"""Every setting of a training run, with its default."""
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from timm_lean.errors import LeanError

from .settings import check_settings, from_mapping, rule, setting

__all__ = ['PruneConfig', 'TrainConfig', 'list_configs', 'load_yaml']

CONFIGS = Path(__file__).parent / 'configs'


# Arguments of timm.create_model that are settings of their own, or none of a network.
_NO_MODEL_ARGS = {
    'num_classes': '--num-classes', 'pretrained': '--pretrained', 'checkpoint_path': '--model FILE',
    'pretrained_cfg': '--model FILE', 'pretrained_cfg_overlay': '--model FILE', 'features_only': 'a classifier',
    'device': '--device', 'dtype': '--amp', 'scriptable': 'nothing', 'exportable': 'nothing', 'no_jit': 'nothing',
    'cache_dir': 'the environment variable HF_HOME',
}


@dataclass
class PruneConfig:
    """Kernel pruning while training.

    Attributes:
        criterion: By which kernels are pruned; if empty, a model that comes pruned stays as it is.
        amount: Share of the kernels to prune.
        threshold: Prune kernels below the criterion's threshold for this t instead.
        scope: Whether the amount is one of all kernels ('global'), of each layer's or of each filter's.
        schedule: 'one_shot', 'linear', 'cubic' or 'exponential'.
        epochs: BEGIN:END of the schedule in epochs (BEGIN alone for one_shot); the start of the run if empty.
        steps: The same in optimizer updates.
        every: Distance between two updates of the masks, in the unit of the schedule.
        include: Shell patterns of the layers to prune; all if empty.
        exclude: Shell patterns of layers that are never pruned.
        min_keep: Share of kernels that each layer keeps at least.
        again: Prune a model that comes pruned further.
    """
    PART: ClassVar[str] = 'prune'

    criterion: str = ''
    amount: float | None = setting(None, least=0, below=1)
    threshold: float | None = setting(None, least=0)
    scope: str = setting('global', choices=('global', 'layer', 'filter'))
    schedule: str = setting('one_shot', choices=('one_shot', 'linear', 'cubic', 'exponential'))
    epochs: str = ''
    steps: str = ''
    every: float = setting(1., above=0)
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    min_keep: float = setting(0.01, least=0, most=1)
    again: bool = False

    def __post_init__(self) -> None:
        for name in ('epochs', 'steps'):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                setattr(self, name, str(value))  # BEGIN alone, as YAML reads it
        check_settings(self)
        if not self.criterion:
            for name in ('amount', 'threshold', 'epochs', 'steps'):
                if getattr(self, name) not in (None, ''):
                    raise LeanError(f'--prune-{name} needs a criterion: --prune spectral_norm.')
        if self.epochs and self.steps:
            raise LeanError('Give --prune-epochs or --prune-steps, not both.')
        self.span()

    def span(self) -> tuple[float, float | None]:
        """BEGIN and END as numbers, in epochs or updates; without an end for one_shot."""
        text = self.steps or self.epochs or '0'
        begin, _, end = text.partition(':')
        try:
            numbers = float(begin), float(end) if end else None
        except ValueError:
            numbers = math.nan, None
        if not all(0 <= n < math.inf for n in numbers if n is not None):
            option = '--prune-steps' if self.steps else '--prune-epochs'
            raise LeanError(f'{option} takes BEGIN:END, such as 10:30, got {text[:100]!r}.')
        return numbers


@dataclass
class TrainConfig:
    """Settings of `train`. Command line flags have the same names with dashes.

    Attributes:
        model: timm name, checkpoint file or local-dir:DIR.
        model_args: Arguments for a timm name.
        pretrained: Start from timm's weights of that name.
        num_classes: Number of classes; the dataset's if None.
        data: 'folder' (needs data_dir) or 'digits'.
        data_dir: Folder with train/ and val/ or test/, each with one folder per class.
        train_images: Use only so many training images, evenly over the classes.
        img_size: Image size in pixels; the model's if None.
        cache: Decode all images once and keep them, uint8, on the device; crop and flip run there.
        workers: Data loading processes.
        epochs: Passes over the training images.
        batch_size: Images per step and process.
        grad_accum: Steps whose gradients are added before an update.
        opt: timm optimizer name; 'sgd' is Nesterov's, 'momentum' the plain one.
        lr: Learning rate.
        momentum: Optimizer momentum.
        weight_decay: Weight decay; not on biases and norms unless decay_all.
        decay_all: Weight decay on every parameter, as the papers do.
        sched: 'cosine', 'multistep', 'poly' or 'constant' (timm's, stepped by update).
        milestones: Epochs at which 'multistep' multiplies lr by decay_rate.
        decay_rate: See milestones.
        warmup_epochs: Epochs of linear warm-up.
        min_lr: Final learning rate of decaying schedules.
        reg: Regularizers as NAME=WEIGHT.
        init: '' or 'conv_similarity', its data-free initialization before the first epoch.
        init_steps: Steps of that initialization.
        distill: Teacher of a feature distillation: checkpoint file, local-dir:DIR, or a timm name with pretrained
            weights; none if empty.
        distill_weight: Weight of the features' mean squared error beside the classification loss.
        prune: Kernels to prune while training, see `PruneConfig`; in YAML a mapping.
        smoothing: Label smoothing.
        mixup: Mixup alpha.
        cutmix: Cutmix alpha.
        aug: 'crop' (pad 4, random crop), 'rrc' (random resized crop) or 'none'.
        hflip: Probability of a horizontal flip; 0 for digits and 0.5 otherwise if None.
        auto_augment: timm auto augment policy.
        re_prob: Probability of random erasing.
        amp: '', 'bf16' or 'fp16'.
        ema: Keep and evaluate an exponential moving average of the weights.
        ema_decay: Decay of the EMA.
        clip_grad: Clip the gradient norm to this value.
        compile: Compile the model with torch.compile.
        channels_last: Use the channels-last memory format.
        device: 'auto', 'cpu', 'cuda', ...
        seed: Seed of everything random.
        output: Folder for the results; output/MODEL, numbered if taken, if empty.
        resume: Continue the run in `output` from its last completed save.
    """
    model: str = ''
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    num_classes: int | None = setting(None, least=1, most=1_000_000)
    data: str = setting('', choices=('', 'folder', 'digits'))
    data_dir: str | None = None
    train_images: int | None = setting(None, least=1)
    img_size: int | None = setting(None, least=1, most=16_384)
    cache: bool = False
    workers: int = setting(2, least=0, most=1024)
    epochs: int = setting(100, least=1, most=1_000_000)
    batch_size: int = setting(128, least=1, most=1_000_000)
    grad_accum: int = setting(1, least=1, most=1_000_000)
    opt: str = 'sgd'
    lr: float = setting(0.1, least=0)
    momentum: float = setting(0.9, least=0, most=1)
    weight_decay: float = setting(5e-4, least=0)
    decay_all: bool = False
    sched: str = setting('cosine', choices=('cosine', 'multistep', 'poly', 'constant'))
    milestones: list[int] = field(default_factory=list, metadata=rule(least=0))
    decay_rate: float = setting(0.1, above=0, most=1)
    warmup_epochs: int = setting(0, least=0)
    min_lr: float = setting(0., least=0)
    reg: list[str] = field(default_factory=list)
    init: str = setting('', choices=('', 'conv_similarity'))
    init_steps: int = setting(200, least=1, most=1_000_000)
    distill: str = ''
    distill_weight: float = setting(1., least=0)
    prune: PruneConfig = field(default_factory=PruneConfig)
    smoothing: float = setting(0., least=0, below=1)
    mixup: float = setting(0., least=0, most=1000)
    cutmix: float = setting(0., least=0, most=1000)
    aug: str = setting('crop', choices=('crop', 'rrc', 'none'))
    hflip: float | None = setting(None, least=0, most=1)
    auto_augment: str | None = None
    re_prob: float = setting(0., least=0, most=1)
    amp: str = setting('', choices=('', 'bf16', 'fp16'))
    ema: bool = False
    ema_decay: float = setting(0.9998, least=0, most=1)
    clip_grad: float | None = setting(None, above=0)
    compile: bool = False
    channels_last: bool = False
    device: str = 'auto'
    seed: int = setting(0, least=0, most=2 ** 32 - 1)
    output: str = ''
    resume: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.model:
            raise LeanError('No model given. Name one by --model; `timm-lean models` lists names.')
        if not self.data:
            self.data = 'folder' if self.data_dir else 'digits'
        if self.data == 'folder' and not self.data_dir:
            raise LeanError("data='folder' needs --data-dir DIR, a folder with train/ and val/ or test/.")
        for name, flag in _NO_MODEL_ARGS.items():
            if name in self.model_args:
                raise LeanError(f'{name} is no model argument: give {flag} instead.')
        for name, value in self.model_args.items():
            # timm's networks look at it when they run
            if name.endswith(('drop_rate', 'drop_path_rate')) and not (_is_number(value) and 0 <= value <= 1):
                raise LeanError(f'{name} of model_args must be a number from 0 to 1, got {repr(value)[:100]}.')
        if self.auto_augment:
            self._check_auto_augment(self.auto_augment)
        if self.cache and (self.aug == 'rrc' or self.auto_augment or self.re_prob):
            raise LeanError('--cache augments on the device, by crop and flip only. Use --aug crop or none without '
                            'auto-augment and random erasing, or drop --cache.')
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise LeanError(f'mixup and cutmix pair images: batch_size must be even, got {self.batch_size}.')

    def _check_auto_augment(self, policy: str) -> None:
        if self.aug != 'rrc':
            raise LeanError(f'--auto-augment {policy} is a part of --aug rrc, and --aug is {self.aug}.')
        from timm.data.transforms_factory import transforms_imagenet_train
        try:
            transforms_imagenet_train(auto_augment=policy)
        except Exception as e:  # timm's parsers of policies raise whatever they stumble over
            raise LeanError(f'Unknown auto_augment policy {policy[:100]!r}. It reads like rand-m9-mstd0.5, '
                            'augmix-m5-w4-d2 or original.') from e

    def rerun_args(self) -> dict[str, Any]:
        """The settings as plain data, without those that say where and from what to start."""
        return {k: v for k, v in asdict(self).items() if k not in ('output', 'resume')}

    @classmethod
    def from_args(cls, settings: dict[str, Any]) -> 'TrainConfig':
        """Create a config from settings by name.

        Raises:
            LeanError: An unknown setting, or a value of the wrong type.
        """
        return from_mapping(cls, settings)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def list_configs() -> list[str]:
    """Names of the configs that ship with the package, usable as `--config NAME`."""
    return sorted(path.stem for path in CONFIGS.glob('*.yaml'))


def load_yaml(source: str) -> dict[str, Any]:
    """Settings from a YAML file, or from a shipped config by name.

    Raises:
        LeanError: There is no such file or config, or it is not a YAML mapping.
    """
    shipped = CONFIGS / f'{source}.yaml' if source in list_configs() else None
    path = shipped or Path(source)
    try:
        settings = yaml.safe_load(path.read_text())
    except FileNotFoundError as e:
        raise LeanError(f'No config file {source!r}, and no shipped one of this name. Shipped: '
                        f'{", ".join(list_configs())}.') from e
    except (yaml.YAMLError, OSError, ValueError, OverflowError, RecursionError) as e:
        raise LeanError(f'{source[:300]} is not a readable YAML file: {" ".join(str(e).split())[:500]}') from e
    if not isinstance(settings, dict):
        raise LeanError(f'{path} must hold settings as "name: value" lines.')
    return {str(k).replace('-', '_'): v for k, v in settings.items()}
