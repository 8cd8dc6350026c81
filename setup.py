"""Builds the distribution from settings.ini, the one place of name, version, description and requirements."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser()
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


class WithoutIndex(build_py):
    "Leaves out `_modidx.py`, which nbdev-export may have left beside the modules."
    def find_package_modules(self, package, package_dir):
        return [m for m in super().find_package_modules(package, package_dir) if m[1] != '_modidx']


extras = {name: cfg[f'{name}_requirements'].split() for name in ('nb', 'dev', 'docs', 'bench')}
setup(
    name=cfg['name'], version=cfg['version'], description=cfg['description'], author=cfg['author'], license=cfg['license'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']), package_data={cfg['lib_path']: ['py.typed']},
    python_requires='>='+cfg['min_python'], install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    cmdclass={'build_py': WithoutIndex}, include_package_data=True, zip_safe=False)
