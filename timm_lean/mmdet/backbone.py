"""Any timm CNN, those of this package included, as the backbone of an MMDetection detector."""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from mmengine.model import BaseModule

from timm_lean.checkpoint.format import PRUNED_STEP
from timm_lean.checkpoint.recipe import has_step, note_zeros
from timm_lean.errors import LeanError
from timm_lean.pruning.resize import set_feature_channels

from .network import build_features, feature_levels, flat_name, load_features, whole_names
from .scope import MODELS, register
from .weights import read_weights

__all__ = ['TimmBackbone']

_MEASURED_SIDE = 64
_STEM_REDUCTION = 4  # a first level of a smaller stride than this is the stem's


@register(MODELS)
class TimmBackbone(BaseModule):
    """A timm network that returns feature maps.

    The neck's `in_channels` may be `'auto'` in the detector's config; a wrong list is an error that prints the right
    one (see `channels.py`).

    Args:
        model_name: A timm name or `local-dir:DIR` (with the weights in that folder). May be left out if the checkpoint
            says what it holds.
        pretrained: Download timm's weights for this name, as `timm.create_model(pretrained=True)` does.
        checkpoint: Weights of the whole classification network or of a detector with this backbone. A file written by
            `timm_lean.save_model` or `SafetensorsHook` brings its structure with it (converted and pruned networks
            too); a plain `.safetensors` or `.pth` file needs `model_name`.
        out_indices: Feature levels to return, 0 the first; all of stride 4 and more if None. timm counts a ResNet's
            stem as level 0, so that C2 to C5 are 1 to 4.
        frozen_stages: Freeze the stem and the first n stages: no gradients, batch norm in eval mode. -1 freezes
            nothing, 0 the stem.
        norm_eval: Keep all batch norms in eval mode during training, for small batches with pretrained weights.
        model_args: Arguments for `timm.create_model`.
        share: Options of `timm_lean.share`, e.g. `dict(params=0.5)`: the network is converted to shared filter bases
            once it has its weights. Shares of parameters are of the network without classifier. `lean_report` tells
            what was done.
        init_cfg: `dict(type='Pretrained', checkpoint=FILE)`; with `prefix` for a part of a larger file. Loaded when
            training starts, strictly.

    Shape:
        Images `[B, 3, H, W]` to a tuple of feature maps `[B, C_i, H / stride_i, W / stride_i]`.

    Raises:
        LeanError: The arguments cannot be used; the message says why and what would be right.
    """

    def __init__(
            self,
            model_name: str = '',
            pretrained: bool = False,
            checkpoint: str | None = None,
            out_indices: Sequence[int] | None = None,
            frozen_stages: int = -1,
            norm_eval: bool = False,
            model_args: dict[str, Any] | None = None,
            share: dict[str, Any] | None = None,
            init_cfg: Any = None,
    ):
        super().__init__(init_cfg=init_cfg)
        self.net, self.recipe, self.lean_report = build_features(
            model_name, pretrained, checkpoint, out_indices, model_args, share)
        self.note_zeros()
        self.out_indices: tuple[int, ...] = tuple(
            self.net.feature_info.out_indices)  # type: ignore[union-attr, arg-type]
        self.frozen_stages = self._check_frozen(frozen_stages)
        self.norm_eval = norm_eval
        for module in self._frozen_modules():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    @property
    def lean_steps(self) -> list[dict[str, Any]]:
        """The structural steps taken, as every model of this package tells them; they are the recipe's."""
        return self.recipe.steps

    @lean_steps.setter
    def lean_steps(self, steps: list[dict[str, Any]]) -> None:
        self.recipe.steps = list(steps)

    @property
    def out_channels(self) -> list[int]:
        """Channels of the feature maps, for the neck's `in_channels`."""
        return list(self.net.feature_info.channels())  # type: ignore[union-attr, operator]

    @property
    def out_strides(self) -> list[int]:
        """Strides of the feature maps."""
        return list(self.net.feature_info.reduction())  # type: ignore[union-attr, operator]

    @torch.no_grad()
    def measure_channels(self) -> None:
        """Note the channels that the feature maps have after a step on the whole detector."""
        training = self.net.training
        info: Any = self.net.feature_info.info  # type: ignore[union-attr]
        maps = self.net.eval()(next(self.net.parameters()).new_zeros(1, 3, _MEASURED_SIDE, _MEASURED_SIDE))
        self.net.train(training)
        channels = dict(zip(self.out_indices, (feature.shape[1] for feature in maps), strict=True))
        set_feature_channels(self.net, [channels.get(i, entry['num_chs']) for i, entry in enumerate(info)])

    def note_zeros(self) -> None:
        """Once the weights are loaded: if kernels were pruned, note how many, so that saving can tell a loss."""
        if has_step(self, PRUNED_STEP):
            note_zeros(self.net)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.net(x))

    def adopt_names(self, state: dict[str, Any], prefix: str = '') -> None:
        """Rename what a state dict holds of this backbone to the names it has here, in place.

        The same network has other names where timm wraps it in another way (`net.layer1`, `net.model.layer1`) and in
        MMDetection's own ResNets, whose names are timm's (`layer1`).

        Args:
            state: Tensors by name.
            prefix: Of this backbone's names, with the dot.
        """
        own = {flat_name(self.net, name): f'{prefix}net.{name}' for name in self.net.state_dict()}
        for key in [key for key in state if key.startswith(prefix)]:
            flat = key[len(prefix):].removeprefix('net.').removeprefix('model.').replace('.', '_')
            if flat in own:
                state[own[flat]] = state.pop(key)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.adopt_names(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def init_weights(self) -> None:
        """Load what `init_cfg` names. Without it nothing happens: timm has initialized the network."""
        for cfg in [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []:
            if cfg.get('type') != 'Pretrained':
                raise LeanError(f"TimmBackbone takes init_cfg=dict(type='Pretrained', checkpoint=FILE) only, got "
                                f'{cfg!r}: timm initializes its networks.')
            load_features(
                self.net, read_weights(cfg['checkpoint'], cfg.get('prefix')), self.recipe.architecture,
                known=whole_names(self.recipe))
        self._is_init = True

    def train(self, mode: bool = True) -> 'TimmBackbone':
        super().train(mode)
        if mode:
            for module in self._frozen_modules():
                module.training = False
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.training = False
        return self

    def _check_frozen(self, frozen_stages: int) -> int:
        last = max(self.out_indices) + (0 if self._has_stem_level() else 1)
        if isinstance(frozen_stages, bool) or not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= last:
            raise LeanError(
                f'frozen_stages={frozen_stages!r} is not possible: {self.recipe.architecture!r} with '
                f'out_indices={self.out_indices} has {last} stages; give -1 (nothing) to {last}.')
        return frozen_stages

    def _has_stem_level(self) -> bool:
        return feature_levels(self.net)[0]['reduction'] < _STEM_REDUCTION

    def _frozen_modules(self) -> list[nn.Module]:
        """The frozen modules, without the containers that hold others too.

        timm's CNNs register their modules in the order of execution, so all up to the stage's last one are meant.
        """
        if self.frozen_stages < 0:
            return []
        level = self.frozen_stages - (0 if self._has_stem_level() else 1)
        target = flat_name(self.net, feature_levels(self.net)[max(level, 0)]['module'])
        modules = list(self.net.named_modules())
        inside = [i for i, (name, _) in enumerate(modules)
                  if (flat_name(self.net, name) + '_').startswith(target + '_')]
        count = inside[0] if level < 0 else inside[-1] + 1
        rest = [name for name, _ in modules[count:]]
        return [module for name, module in modules[:count]
                if name and not any(other.startswith(name + '.') for other in rest)]
