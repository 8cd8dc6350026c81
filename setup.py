"""Builds the distribution from settings.ini, the one place of name, version, description and requirements."""
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser()
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


class WithCourse(build_py):
    "Puts the course, all that MANIFEST.in names, into the wheel for `exp-lab`; leaves out `_modidx.py`, which nbdev may have made."
    def find_package_modules(self, package, package_dir):
        return [m for m in super().find_package_modules(package, package_dir) if m[1] != '_modidx']

    def run(self):
        super().run()
        if self.editable_mode: return
        course = Path(self.build_lib, 'lesson11/course')
        shutil.rmtree(course, ignore_errors=True)                          # of a build before this one
        self.run_command('egg_info')
        for f in self.get_finalized_command('egg_info').filelist.files:
            if '.egg-info' in f or f == 'setup.cfg': continue              # made by an sdist
            self.mkpath(str((course/f).parent))
            self.copy_file(f, str(course/f))


readme, urls = (here/'README.md').read_text(encoding='utf-8'), dict(o.split('=', 1) for o in cfg['urls'].split())
if cfg['repository']:
    files = cfg['repository'] + '/blob/main/'
    urls |= {'Source': cfg['repository'], 'Changes': files + 'CHANGELOG.md'}
    readme = re.sub(r'\]\((?!https?:|#)', f']({files}', readme)           # read elsewhere, its links must lead here
extras = {name.removesuffix('_requirements'): of.split() for name, of in cfg.items() if name.endswith('_requirements')}
setup(
    name=cfg['name'], version=cfg['version'], description=cfg['description'], author=cfg['author'], license=cfg['license'],
    license_files=['LICENSE'], classifiers=cfg['classifiers'].strip().splitlines(), project_urls=urls,
    long_description=readme, long_description_content_type='text/markdown',
    # With a folder named here an editable install is that folder on the path, where an editor finds the package too.
    package_dir={'': '.'}, packages=[cfg['lib_path'], 'lesson11'], package_data={cfg['lib_path']: ['py.typed']},
    python_requires='>='+cfg['min_python'], install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    cmdclass={'build_py': WithCourse}, include_package_data=True, zip_safe=False)
