"""Every setting of a training run, with its default."""
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from timm_lean.errors import LeanError

__all__ = ['TrainConfig', 'list_recipes', 'load_yaml']

RECIPES = Path(__file__).parent / 'configs'


@dataclass
class TrainConfig:
    """Settings of `train`. Command line flags have the same names with dashes.

    Attributes:
        model: timm name, checkpoint file or local-dir:DIR.
        model_args: Arguments for a timm name.
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
        decay_all: Weight decay on every parameter, as the papers' recipes do.
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
        prune: Criterion by which kernels are pruned while training; if empty, a model that comes pruned stays as it is.
        prune_amount: Share of the kernels to prune.
        prune_threshold: Prune kernels below the criterion's threshold for this t instead.
        prune_scope: Whether the amount is one of all kernels ('global'), of each layer's or of each filter's.
        prune_schedule: 'one_shot', 'linear', 'cubic' or 'exponential'.
        prune_epochs: BEGIN:END of the schedule in epochs (BEGIN alone for one_shot); the start of the run if empty.
        prune_steps: The same in optimizer updates.
        prune_every: Distance between two updates of the masks, in the unit of the schedule.
        prune_ignore: Shell patterns of layers that are never pruned.
        prune_min_keep: Share of kernels that each layer keeps at least.
        prune_again: Prune a model that comes pruned further.
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
    num_classes: int | None = None
    data: str = ''
    data_dir: str | None = None
    train_images: int | None = None
    img_size: int | None = None
    cache: bool = False
    workers: int = 2
    epochs: int = 100
    batch_size: int = 128
    grad_accum: int = 1
    opt: str = 'sgd'
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_all: bool = False
    sched: str = 'cosine'
    milestones: list[int] = field(default_factory=list)
    decay_rate: float = 0.1
    warmup_epochs: int = 0
    min_lr: float = 0.
    reg: list[str] = field(default_factory=list)
    init: str = ''
    init_steps: int = 200
    distill: str = ''
    distill_weight: float = 1.
    prune: str = ''
    prune_amount: float | None = None
    prune_threshold: float | None = None
    prune_scope: str = 'global'
    prune_schedule: str = 'one_shot'
    prune_epochs: str = ''
    prune_steps: str = ''
    prune_every: float = 1.0
    prune_ignore: list[str] = field(default_factory=list)
    prune_min_keep: float = 0.01
    prune_again: bool = False
    smoothing: float = 0.
    mixup: float = 0.
    cutmix: float = 0.
    aug: str = 'crop'
    hflip: float | None = None
    auto_augment: str | None = None
    re_prob: float = 0.
    amp: str = ''
    ema: bool = False
    ema_decay: float = 0.9998
    clip_grad: float | None = None
    compile: bool = False
    channels_last: bool = False
    device: str = 'auto'
    seed: int = 0
    output: str = ''
    resume: bool = False

    def __post_init__(self) -> None:
        if not self.model:
            raise LeanError('No model given. Name one by --model; `timm-lean models` lists names.')
        if not self.data:
            self.data = 'folder' if self.data_dir else 'digits'
        if isinstance(self.reg, str):
            self.reg = [self.reg]
        self._choice('data', ('folder', 'digits'))
        self._choice('aug', ('crop', 'rrc', 'none'))
        self._choice('sched', ('cosine', 'multistep', 'poly', 'constant'))
        self._choice('init', ('', 'conv_similarity'))
        self._choice('amp', ('', 'bf16', 'fp16'))
        if self.data == 'folder' and not self.data_dir:
            raise LeanError("data='folder' needs --data-dir DIR, a folder with train/ and val/ or test/.")
        for name in ('epochs', 'batch_size', 'grad_accum', 'init_steps'):
            self._at_least(name, 1)
        for name in ('workers', 'warmup_epochs', 'lr', 'min_lr', 'momentum', 'weight_decay', 'smoothing', 'mixup',
                     'cutmix', 're_prob', 'seed', 'distill_weight'):
            self._at_least(name, 0)
        for name in ('train_images', 'img_size', 'num_classes'):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        if not self.prune:
            for name in ('prune_amount', 'prune_threshold', 'prune_epochs', 'prune_steps'):
                if getattr(self, name) not in (None, ''):
                    raise LeanError(f'--{name.replace("_", "-")} needs a criterion: --prune spectral_norm.')
        if self.prune_epochs and self.prune_steps:
            raise LeanError('Give --prune-epochs or --prune-steps, not both.')
        if self.cache and (self.aug == 'rrc' or self.auto_augment or self.re_prob):
            raise LeanError('--cache augments on the device, by crop and flip only. Use --aug crop or none without '
                            'auto-augment and random erasing, or drop --cache.')
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise LeanError(f'mixup and cutmix pair images: batch_size must be even, got {self.batch_size}.')

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise LeanError(f'{name} must be one of {", ".join(map(repr, choices))}, got {getattr(self, name)!r}.')

    def _at_least(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= minimum:
            raise LeanError(f'{name} must be a number of at least {minimum}, got {value!r}.')

    def rerun_args(self) -> dict[str, Any]:
        """The settings as plain data, without those that say where and from what to start."""
        return {k: v for k, v in asdict(self).items() if k not in ('output', 'resume')}

    @classmethod
    def from_args(cls, settings: dict[str, Any]) -> 'TrainConfig':
        """Create a config from settings by name.

        Raises:
            LeanError: An unknown setting, or a value of the wrong type.
        """
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise LeanError(f'Unknown setting {unknown[0]!r}. Known: {", ".join(known)}.')
        for name, value in settings.items():
            default = getattr(cls, name, None)
            if isinstance(default, bool) and not isinstance(value, bool):
                raise LeanError(f'{name} must be true or false, got {value!r}.')
            if isinstance(default, float) and isinstance(value, str):
                settings = {**settings, name: _to_float(name, value)}
        return cls(**settings)


def _to_float(name: str, value: str) -> float:
    # YAML 1.1 reads 5e-4 as a string
    try:
        return float(value)
    except ValueError:
        raise LeanError(f'{name} must be a number, got {value!r}.') from None


def list_recipes() -> list[str]:
    """Names of the recipes that ship with the package, usable as `--config NAME`."""
    return sorted(path.stem for path in RECIPES.glob('*.yaml'))


def load_yaml(source: str) -> dict[str, Any]:
    """Settings from a YAML file, or from a shipped recipe by name.

    Raises:
        LeanError: There is no such file or recipe, or it is not a YAML mapping.
    """
    path = Path(source)
    if not path.is_file():
        path = RECIPES / f'{source}.yaml'
    if not path.is_file():
        raise LeanError(f'No config file or recipe {source!r}. Recipes: {", ".join(list_recipes())}.')
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as e:
        raise LeanError(f'{path} is not a readable YAML file: {e}') from e
    if not isinstance(settings, dict):
        raise LeanError(f'{path} must hold settings as "name: value" lines.')
    return {str(k).replace('-', '_'): v for k, v in settings.items()}
