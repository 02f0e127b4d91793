"""README and docs: Python examples run and print what is shown, shown commands parse, links lead somewhere."""
import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_house import table

import timm_lean_cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks(page):
    return BLOCK.findall(page.read_text())


def write_detector():
    """The trained detector and the image that mmdetection.md speaks of, small."""
    pytest.importorskip('mmdet')
    from mmdet_support import scenes_config

    from timm_lean.mmdet.detector import build_detector, describe, save_detector
    cfg = scenes_config(Path.cwd())
    model = build_detector(cfg)
    Path('work_dirs/run').mkdir(parents=True)
    save_detector(model, 'work_dirs/run/best.safetensors', describe(cfg, model, {'classes': [*'0123456789']}))
    Image.new('RGB', (64, 64), 'gray').save('image.jpg')


PREPARATIONS = {'mmdetection.md': write_detector}


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_python_examples_run_and_print_what_is_shown(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PREPARATIONS.get(page.name, lambda: None)()
    namespace, found = {}, blocks(page)
    for i, (language, text) in enumerate(found):
        if language != 'python':
            continue
        if 'import mmengine' in text or 'timm_lean.mmdet' in text:
            pytest.importorskip('mmdet')
        torch.manual_seed(0)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, f'{page.name}, block {i}', 'exec'), namespace)
        if i + 1 < len(found) and found[i + 1][0] == '' and printed.getvalue():
            assert printed.getvalue().strip() == found[i + 1][1].strip()


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_no_example_is_left_out_by_its_language(page):
    assert {language for language, _ in blocks(page)} <= {'', 'bash', 'mermaid', 'python', 'text', 'yaml'}


def test_the_configs_shown_for_mmdetection_build():
    pytest.importorskip('mmdet')
    import timm_lean.mmdet  # noqa: F401  # isort: skip  (prepares what follows)
    from mmdet.registry import HOOKS, MODELS
    shown = {}
    for language, text in blocks(ROOT / 'docs' / 'mmdetection.md'):
        if language == 'python' and text.startswith(('model =', 'custom_hooks =')):
            exec(text, shown)
    assert [f'timm_lean.{type(HOOKS.build(hook)).__name__}' for hook in shown['custom_hooks']] == [
        hook['type'] for hook in shown['custom_hooks']]
    backbone = {k: v for k, v in shown['model']['backbone'].items() if k != 'checkpoint'}
    assert MODELS.build(backbone).out_channels == [64, 128, 256, 512]


def commands():
    """(page, arguments) of every shown `timm-lean ...` line."""
    for page in PAGES:
        for language, text in blocks(page):
            if language in ('', 'bash', 'sh', 'console'):
                for line in text.replace('\\\n', ' ').splitlines():
                    line = line.strip().removeprefix('$ ')
                    if line.startswith(('timm-lean ', '.venv/bin/timm-lean ')):
                        yield page.name, shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize('page, arguments', list(commands()), ids=str)
def test_shown_commands_are_accepted(page, arguments):
    arguments = ['1' if re.fullmatch(r'[A-Z]', a) else a.removesuffix('...') for a in arguments]
    timm_lean_cli.build_parser().parse_args(arguments)


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)#]+)[^)]*\)', page.read_text()):
        assert target.startswith('http') or (page.parent / target).exists(), target


def test_files_the_readme_names_exist():
    for path in re.findall(r'`((?:docs|tools|timm_lean|mmdet_configs)/[\w/.-]+\w)`', (ROOT / 'README.md').read_text()):
        assert (ROOT / path).exists(), path


def test_the_site_has_every_page():
    text = (ROOT / 'mkdocs.yml').read_text()
    pages = {p.name for p in (ROOT / 'docs').glob('*.md')}
    assert set(re.findall(r': (\w+\.md)$', text, re.MULTILINE)) == pages


def test_the_picture_of_the_rooms_is_the_table_of_contributing():
    """Arrows are those of the table, but for those that others lead to as well."""
    left_out = {'errors.py', 'version.py', 'registry.py'}
    uses = {room: rooms - left_out for room, rooms in table().items() if room not in left_out}
    uses['timm_lean_cli'] = set(uses)

    def below(room):
        return uses[room].union(*map(below, uses[room]))

    wanted = {(room, used) for room in uses for used in uses[room]
              if not any(used in below(other) for other in uses[room])}
    picture = next(text for language, text in blocks(ROOT / 'docs' / 'how_it_works.md') if language == 'mermaid')
    drawn = re.findall(r'^ *(\w+) --> (\w+)$', picture, re.MULTILINE)
    assert len(drawn) == len(set(drawn)) and set(drawn) == wanted
    assert set(re.findall(r'^ *(\w+)\[', picture, re.MULTILINE)) == uses.keys()


def test_the_notebooks_page_links_to_every_notebook():
    named = set(re.findall(r'\]\(notebooks/(\w+\.ipynb)\)', (ROOT / 'docs' / 'notebooks.md').read_text()))
    assert named == {p.name for p in (ROOT / 'docs' / 'notebooks').glob('*.ipynb')}


def test_the_api_page_names_what_there_is():
    pytest.importorskip('mmdet')
    for name in re.findall(r'^::: (\S+)$', (ROOT / 'docs' / 'api.md').read_text(), re.MULTILINE):
        module, _, attribute = name.rpartition('.')
        assert getattr(importlib.import_module(module), attribute).__doc__, name
