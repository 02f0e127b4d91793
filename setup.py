"""What pyproject.toml cannot say: the configs in `mmdet_configs/` travel in the wheel as `timm_lean/.mim/configs`."""
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """An editable install reads the folder itself."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / 'timm_lean' / '.mim' / 'configs'
            shutil.copytree('mmdet_configs', target, dirs_exist_ok=True, ignore=shutil.ignore_patterns('__pycache__'))


setup(cmdclass={'build_py': BuildWithConfigs})
