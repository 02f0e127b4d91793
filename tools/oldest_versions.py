"""Print the oldest versions that pyproject.toml allows, one pin a line, for `pip install --constraint`."""
import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).parents[1] / 'pyproject.toml'


def oldest(requirements: list[str]) -> list[str]:
    """The lower bound `NAME>=VERSION` of each requirement as a pin; a bound without a patch level takes its newest."""
    bounds = [found.groups() for r in requirements if (found := re.match(r'([\w.-]+)>=([\d.]+)', r))]
    return [f'{name}=={version}' + ('' if version.count('.') > 1 else '.*') for name, version in bounds]


def main() -> None:
    project = tomllib.loads(PYPROJECT.read_text())['project']
    extras = project['optional-dependencies']
    groups = [project['dependencies'], *(extras[name] for name in extras if name != 'dev')]  # what a user installs
    print('\n'.join(oldest([r for group in groups for r in group])))


if __name__ == '__main__':
    main()
