"""The boundary around a config that came inside a file: what it may say before anything is built from it.

MMEngine's registries import whatever dotted name a `type` holds and call it; `batched_nms` evaluates the `type` of its
settings; a few registered classes open files, download or evaluate text that their arguments name. A config the user
names is code and trusted, as in MMDetection. One that comes with a checkpoint is a stranger's: it may name classes that
are registered, in the places where they are built, with plain values. Nothing is imported to find that out.
"""
import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from mmdet.utils import register_all_modules
from mmengine import registry as mmengine_registry
from mmengine.config import Config
from mmengine.registry import MODELS, TASK_UTILS, TRANSFORMS, Registry

from timm_lean.checkpoint.format import RUNTIME_ARGS
from timm_lean.errors import CheckpointError
from timm_lean.regularizers import list_regularizers

__all__ = ['check_config', 'check_recipe', 'find', 'registered_only']

_LIBRARIES = ('timm_lean', 'mmdet', 'mmcv', 'mmengine')
_ANY = tuple(value for value in vars(mmengine_registry).values() if isinstance(value, Registry))
_PARTS = {'model': (MODELS, TASK_UTILS), 'detector': (MODELS, TASK_UTILS), 'tta_model': (MODELS, TASK_UTILS)}

_TYPE_KEYS = ('type', 'constructor', 'runner_type')
_FOLLOWED = ('init_cfg', 'pretrained', 'backend_args', 'file_client_args')
"""Keys that lead to other files, or to code that reads them. They are taken out: all weights are in the checkpoint."""

_WORDS = {
    'regularizers': set(list_regularizers()),
    'nms': {'nms', 'soft_nms'},
    'roi_layer': {'RoIAlign', 'RoIPool', 'SimpleRoIAlign', 'DeformRoIPoolPack', 'ModulatedDeformRoIPoolPack'},
    'adapt_cfg': {'dilation', 'offset'},
    **{f'{name}_trans': {'conv', 'interpolation_conv', 'last_conv'} for name in (
        'same_down', 'same_up', 'across_lateral', 'across_down', 'across_up', 'across_skip', 'output')}}
"""Types that are looked up elsewhere than in a registry of MMEngine, by the key their settings stand under."""

_REACH_OUT = {
    'ATSSVLFusionHead', 'AppearanceFreeLink', 'BertModel', 'CameraMotionCompensation', 'Detectron2Wrapper',
    'KnowledgeDistillationSingleStageDetector', 'LAD', 'RandomSamplingNegPos'}
"""Registered classes whose arguments name files, downloads or Python code."""

_BACKBONE_KEYS = {'type', 'model_name', 'model_args', 'out_indices', 'frozen_stages', 'norm_eval'}
_ALBU_NAME = re.compile(r'[A-Z]\w{0,60}', re.ASCII)
_KEY = re.compile(r'[\w .*+-]{1,200}', re.ASCII)
_PLACE = re.compile(r'[/\\:~(){}\'"`\n]')  # in a path, a URL or an expression; in no name or setting of a network
_MAX_INT = 1_000_000  # no network has that many channels, blocks or boxes
_SHOWN = 80


def check_config(cfg: Config, source: str, trust_imports: Sequence[str] = ()) -> Config:
    """What may be built from a config of unknown origin.

    Args:
        cfg: Plain values, see `settings.parse_config`.
        source: The file it comes from, for messages.
        trust_imports: Packages or modules the config's `custom_imports` may import.

    Returns:
        The config without what leads to other files.

    Raises:
        CheckpointError: It asks for anything beyond that boundary.
    """
    register_all_modules(init_default_scope=False)
    values = cfg.to_dict()
    imports = _import_trusted(values.pop('custom_imports', None), source, trust_imports)
    scope = values.get('default_scope', 'mmdet')
    if not isinstance(scope, str) or scope not in _scopes():
        raise CheckpointError(f'{source}: default_scope is {_shown(scope)}; known are {", ".join(sorted(_scopes()))}.')
    if not isinstance(values.get('model'), Mapping):
        raise CheckpointError(f'{source}: model must be a dict, got {_shown(values.get("model"))}.')
    for key in ('work_dir', 'load_from', 'resume'):  # of the run that wrote it
        values.pop(key, None)
    return Config({
        **_Inspector(source).mapping(values, '', _ANY),
        **({'custom_imports': {'imports': imports, 'allow_failed_imports': False}} if imports else {})})


def check_recipe(model_name: Any, model_args: Any, source: str) -> None:
    """Refuse a recipe that does more than describe a network.

    Raises:
        CheckpointError: A name of another place, or arguments of `timm.create_model` that are about files and devices.
    """
    if not isinstance(model_name, str) or _PLACE.search(model_name):
        raise CheckpointError(f'{source}: the backbone must be a timm name, got {_shown(model_name)}.')
    if not isinstance(model_args, Mapping):
        raise CheckpointError(f'{source}: model_args must be a dict, got {_shown(model_args)}.')
    if runtime := sorted(RUNTIME_ARGS & model_args.keys()):
        raise CheckpointError(f'{source}: {", ".join(runtime)} in model_args do not describe a network.')


@contextmanager
def registered_only() -> Iterator[None]:
    """While this lasts, registries build what is registered with them and import nothing."""
    # the function by which Registry.get turns a name it does not know into an import
    with mock.patch.object(sys.modules[Registry.__module__], 'get_object_from_string', lambda name: None):
        yield


def find(name: str, registries: Iterable[Registry]) -> str | None:
    """The registered name of a type, as `Name`, `scope.Name` or the path of a class that is imported already."""
    scope, _, short = name.rpartition('.')
    nodes = [node for registry in registries for node in _nodes(registry)]
    if any(short in node.module_dict and scope in ('', node.scope) for node in nodes):
        return name
    target = vars(sys.modules[scope]).get(short) if scope in sys.modules else None
    if target is None:
        return None
    return next((f'{node.scope}.{key}' for node in nodes for key, value in node.module_dict.items()
                 if value is target), None)


class _Inspector:
    """Copies a config of one file and checks it on the way."""

    def __init__(self, source: str):
        self.source = source

    def mapping(
            self, values: Mapping[Any, Any], where: str, registries: Sequence[Registry], albu: bool = False,
    ) -> dict[Any, Any]:
        """Check a dict at the place `where`, whose types must be in one of `registries` (or Albumentations')."""
        result: dict[Any, Any] = {}
        for key, value in values.items():
            self._key(key, where)
            if key in _TYPE_KEYS:
                result[key] = self._type(value, where, registries, albu)
        name = result.get('type', '').rpartition('.')[2]
        if name == 'TimmBackbone':
            self._backbone(values, where)
        for key, value in values.items():
            place = f'{where}.{key}' if where else str(key)
            if key == '_scope_' and not (isinstance(value, str) and value in _scopes()):
                self._refuse(f'{place} is {_shown(value)}, which is none of {", ".join(sorted(_scopes()))}')
            if key not in _FOLLOWED and key not in _TYPE_KEYS:
                result[key] = self._value(value, place, _of_part(key, where) or registries, albu or name == 'Albu')
        return result

    def _value(self, value: Any, where: str, registries: Sequence[Registry], albu: bool) -> Any:
        if isinstance(value, Mapping):
            return self.mapping(value, where, registries, albu)
        if isinstance(value, (list, tuple, set)):
            return type(value)(self._value(item, where, registries, albu) for item in value)
        built = registries is not _ANY  # when the detector is loaded or predicts
        if isinstance(value, str):
            if '{{' in value or (built and _PLACE.search(value)):
                self._refuse(f'{where} is {_shown(value)}: no path, URL or expression is followed')
        elif isinstance(value, int):
            if built and abs(value) > _MAX_INT:
                self._refuse(f'{where} is {_shown(value)}, more than {_MAX_INT:,}')
        elif not (value is None or isinstance(value, float)):
            self._refuse(f'{where} is {_shown(value)}: only text, numbers, None, lists and dicts are expected')
        return value

    def _type(self, value: Any, where: str, registries: Sequence[Registry], albu: bool) -> str:
        if not isinstance(value, str):
            self._refuse(f'the type of {where} must be a name, got {_shown(value)}')
        if value in _WORDS.get(where.rpartition('.')[2], ()) or (albu and _ALBU_NAME.fullmatch(value)):
            return value
        found = find(value, registries)
        if found is None:
            return self._refuse(
                f'{where} asks for the type {_shown(value)}, which is not registered there. If it is a class of '
                "yours that the config's custom_imports register, say --trust-imports PACKAGE, or load_detector(..., "
                "trust_imports=['PACKAGE'])")
        if found.rpartition('.')[2] in _REACH_OUT:
            self._refuse(f'{where} asks for {_shown(value)}, which opens what its arguments name. Load such a detector '
                         "with MMDetection's init_detector and a config you trust")
        return found

    def _key(self, key: Any, where: str) -> None:
        if (isinstance(key, int) or key == '') and where:  # '': the network itself, among the modules a step resizes
            return
        if not isinstance(key, str) or not _KEY.fullmatch(key) or (key.startswith('_') and key != '_scope_'):
            self._refuse(f'{where or "the config"} has the key {_shown(key)}')

    def _backbone(self, values: Mapping[str, Any], where: str) -> None:
        if extra := [key for key in values if key not in _BACKBONE_KEYS and key not in _FOLLOWED]:
            self._refuse(f'{where}.{str(extra[0])[:_SHOWN]} is not followed: the weights and the structure of the '
                         'backbone are in the file itself')
        check_recipe(values.get('model_name'), values.get('model_args') or {}, self.source)

    def _refuse(self, reason: str) -> Any:
        raise CheckpointError(f'{self.source} is not loaded: {reason}.')


def _of_part(key: Any, where: str) -> Sequence[Registry] | None:
    """What the types under this key are looked up in, where that is another registry than around it."""
    if str(key).endswith('pipeline'):
        return (TRANSFORMS,)
    return None if where else _PARTS.get(key)


def _import_trusted(custom_imports: Any, source: str, trusted: Sequence[str]) -> list[str]:
    """Import what a config's `custom_imports` name and the user trusts; the libraries' are imported already."""
    names = custom_imports.get('imports') if isinstance(custom_imports, Mapping) else custom_imports
    names = [names] if isinstance(names, str) else names or []
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f'{source}: custom_imports must be a list of names, got {_shown(custom_imports)}.')
    trusted = [trusted] if isinstance(trusted, str) else trusted
    for name in names:
        if name.partition('.')[0] in _LIBRARIES and name in sys.modules:
            continue
        if not any(name == package or name.startswith(f'{package}.') for package in trusted):
            raise CheckpointError(
                f'{source} is not loaded: its config imports {_shown(name)}, which would run that code. If you know '
                f'and trust it, say --trust-imports {_shown(name)[1:-1]}, or load_detector(..., '
                f'trust_imports=[{_shown(name)}]).')
        try:
            importlib.import_module(name)
        except Exception as e:  # a module of the user's, which fails as it likes
            raise CheckpointError(f'{source}: the module {_shown(name)} its config needs cannot be imported: '
                                  f'{type(e).__name__}: {e}') from e
    return list(names)


def _nodes(registry: Registry) -> Iterator[Registry]:
    yield registry
    for child in registry.children.values():
        yield from _nodes(child)


def _scopes() -> set[str]:
    return {node.scope for node in _nodes(MODELS)}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + '...'
