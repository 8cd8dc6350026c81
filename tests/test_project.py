"""The project's own promises: one version, an importable package, what a distribution holds."""
import ast
import configparser
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT, python

try: import tomllib
except ImportError: import tomli as tomllib

ini = configparser.ConfigParser()
ini.read(ROOT/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
MODULES = sorted(p.stem for p in (ROOT/'exp').glob('*.py') if p.stem[0] != '_')


def test_pyproject_agrees_with_settings():
    nbdev = tomllib.loads((ROOT/'pyproject.toml').read_text())['tool']['nbdev']
    assert nbdev['lib_path'] == cfg['lib_path'] and nbdev['nbs_path'] == cfg['nbs_path']
    assert cfg['version'] not in (ROOT/'pyproject.toml').read_text()


def test_version_is_that_of_settings():
    import exp
    assert exp.__version__ == cfg['version']
    assert f"## {cfg['version']}" in (ROOT/'CHANGELOG.md').read_text()


def test_exp_lists_and_finds_its_names_without_importing_a_module():
    code = ("import sys, exp\n"
            "listed = dir(exp)\n"
            "for name in ('Lerner', '_said_', ''):\n"
            "    try: getattr(exp, name); print('found', name)\n"
            "    except AttributeError as e: assert repr(name) in str(e)\n"
            "print(*[m for m in sys.modules if m.startswith('exp.') or m in ('torch', 'numpy', 'matplotlib', 'PIL', 'nbdev')])\n"
            "assert exp.sched_cos(0., 1.)(1.) == 1. and exp.annealing.sched_cos is exp.sched_cos\n"
            "from exp import Learner, learner\n"
            "assert learner.Learner is Learner is exp.Learner\n"
            "print(*listed)")
    r = python('-c', code)
    imported, listed = r.stdout.splitlines()
    assert not imported, r.stdout + r.stderr
    import importlib
    public = {n for m in MODULES for n in importlib.import_module(f'exp.{m}').__all__}
    assert {n for n in listed.split() if n[0] != '_'} == public | {*MODULES} and '__version__' in listed


def test_a_name_of_two_modules_is_that_of_the_lower_notebook():
    import exp
    from exp import export, predict, train
    assert exp.main is export.main and predict.main is not train.main is not export.main


def test_importing_is_light_and_needs_no_ipython_no_network_and_no_cuda():
    "Each module by itself says what it loaded that it should not have; what another module loaded before does not count for it."
    code = ("import sys, socket, importlib, torch\n"
            "class No:\n    def find_spec(self, name, *a):\n        if name.split('.')[0] in ('IPython', 'nbdev', 'jupyter_client', 'torchvision'): raise ImportError(name)\n"
            "sys.meta_path.insert(0, No())\n"
            "def nope(*a, **k): raise RuntimeError('a connection was opened')\n"
            "socket.socket.connect = nope\n"
            "heavy = ('matplotlib', 'fastprogress', 'pandas', 'scipy', 'onnx', 'onnxruntime', 'onnxscript', 'torch._dynamo', 'torch._inductor', 'torch.distributed.fsdp')\n"
            f"for m in {MODULES!r}:\n"
            "    importlib.import_module('exp.' + m)\n"
            "    for h in heavy:\n        if h in sys.modules: print(m, 'loads', h)\n"
            "assert not torch.cuda.is_initialized()\nprint('ok')")
    r = python('-c', code)
    assert r.stdout.strip() == 'ok', r.stdout + r.stderr


@pytest.mark.parametrize('name', MODULES)
def test_public_names_have_docstrings(name):
    import importlib
    m = importlib.import_module(f'exp.{name}')
    assert m.__doc__
    for n in m.__all__:
        o = getattr(m, n)
        if callable(o) and getattr(o, '__module__', '') == m.__name__: assert o.__doc__, f'exp.{name}.{n} has no docstring'


def required(*names): return {re.match(r'[\w-]+', r)[0].lower() for n in names for r in cfg[n].split()}


def test_what_the_modules_import_is_required_by_name():
    "Outside of functions by `requirements`; inside a function also what only some want, and are told of when it is not there."
    optional = {'ipython', 'onnx', 'onnxruntime', 'onnxscript', 'safetensors', 'simplejpeg', 'tensorboard', 'traitlets'}
    allowed = {True: required('requirements'), False: required('requirements', 'nb_requirements') | optional}
    for m in MODULES:
        tree = ast.parse((ROOT/f'exp/{m}.py').read_text())
        for o in ast.walk(tree):
            names = [a.name for a in o.names] if isinstance(o, ast.Import) else [o.module] if isinstance(o, ast.ImportFrom) and not o.level else []
            for name in {n.split('.')[0] for n in names} - sys.stdlib_module_names:
                assert {'PIL': 'pillow'}.get(name, name).lower() in allowed[o in tree.body], f'exp/{m}.py imports {name}'
    assert {'torch', 'torchvision', 'pillow', 'matplotlib', 'fastprogress'} <= required('requirements')
    assert {'nbdev', 'jupyter'} <= required('nb_requirements')


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    "A copy of what git has, with a second reading and nbdev's index of names beside it."
    root = tmp_path_factory.mktemp('checkout')/'lesson11'
    left_out = shutil.ignore_patterns('.venv', '.git', '__pycache__', 'runs', 'build', '*.egg-info', '.ipynb_checkpoints', '.out', '_modidx.py')
    shutil.copytree(ROOT, root, ignore=left_out)
    (root/'nbs/more').mkdir(exist_ok=True)
    shutil.copy(root/'nbs/index.ipynb', root/'nbs/more/05a_second_reading.ipynb')
    (root/'exp/_modidx.py').write_text('d = {}\n')
    return root


def test_distributions_hold_what_they_should(tmp_path, checkout):
    "From the folder to an sdist, and to a wheel by both ways: through the sdist and straight."
    build = [sys.executable, '-m', 'build', '--no-isolation', '--outdir', str(tmp_path)]
    for args in ([], ['--wheel', '--outdir', str(tmp_path/'straight')]):
        r = subprocess.run([*build, *args, str(checkout)], capture_output=True, text=True)
        assert r.returncode == 0, r.stderr[-2000:]
    wheel, straight, sdist = next(tmp_path.glob('*.whl')), next(tmp_path.glob('straight/*.whl')), next(tmp_path.glob('*.tar.gz'))
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(names) == sorted(zipfile.ZipFile(straight).namelist())
    assert {n for n in names if n.startswith('exp/')} == {f'exp/{p.stem}.py' for p in (ROOT/'exp').glob('*.py') if p.stem != '_modidx'} | {'exp/py.typed'}
    assert not [n for n in names if n.split('/')[0] not in ('exp', 'lesson11') and '.dist-info/' not in n]
    meta = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith('METADATA'))).decode()
    assert f"Version: {cfg['version']}" in meta
    assert {re.match(r'[\w-]+', r)[0].lower() for r in re.findall(r'^Requires-Dist: ([^;\n]+)$', meta, re.M)} == required('requirements')
    assert not [n for n in tarfile.open(sdist).getnames() if n.endswith('_modidx.py')]
    inside = {n.split('/', 1)[1] for n in tarfile.open(sdist).getnames() if '/' in n}
    for want in ('settings.ini', 'setup.py', 'pyproject.toml', 'LICENSE', 'README.md', 'CHANGELOG.md', 'Makefile',
                 'nbs/00_export.ipynb', 'nbs/more/05a_second_reading.ipynb', 'exp/export.py', 'exp/py.typed', 'tests/test_project.py', 'benchmarks/__main__.py'):
        assert want in inside, want


def test_make_help_lists_every_task():
    tasks = re.findall(r'^([a-z]+):', (ROOT/'Makefile').read_text(), re.M)
    assert {'run', 'test', 'lab', 'export', 'readme', 'docs', 'lint', 'bench', 'clean', 'help'} == set(tasks)
    if not shutil.which('make'): pytest.skip('there is no make here')
    said = subprocess.run(['make', '--no-print-directory', 'help'], cwd=ROOT, capture_output=True, text=True).stdout
    assert [l.split()[0] for l in said.splitlines()] == tasks and all(len(l.split()) > 3 for l in said.splitlines())


def test_lint():
    r = python('-m', 'ruff', 'check', '.')
    assert r.returncode == 0, r.stdout


@pytest.mark.parametrize('module', ['exp.train', 'exp.predict'])
def test_every_option_of_a_command_is_in_the_readme(module):
    import importlib
    readme = (ROOT/'README.md').read_text()
    for a in importlib.import_module(module).get_parser()._actions:
        assert a.help, a.dest
        for o in a.option_strings:
            if o[:2] == '--' and o != '--help': assert f'`{o}' in readme or f'{o} ' in readme, o


def test_the_results_in_the_readme_are_those_of_the_experiment():
    "Mean, deviation and number of seeds of each row, computed anew from the csv."
    import csv
    import statistics
    rows = [*csv.DictReader(l for l in (ROOT/'experiments/recipes.csv').read_text().splitlines() if l[0] != '#')]
    table = re.findall(r'\| `(exp-train [^`]*)` \| (float32|bfloat16) \| (0\.\d{3})(?: ± (0\.\d{3}))? \| (\d+) \|', (ROOT/'README.md').read_text())
    assert {t[:2] for t in table} == {(r['command'], r['arithmetic'].split()[0]) for r in rows}
    for command, arithmetic, mean, std, n in table:
        acc = [float(r['accuracy']) for r in rows if (r['command'], r['arithmetic'].split()[0]) == (command, arithmetic)]
        assert int(n) == len(acc) and f'{statistics.mean(acc):.3f}' == mean and (f'{statistics.stdev(acc):.3f}' if len(acc) > 1 else '') == std, command


def test_the_augmented_runs_in_the_readme_are_those_of_the_experiments():
    import csv
    import statistics
    def rows(name): return [*csv.DictReader(l for l in (ROOT/f'experiments/{name}.csv').read_text().splitlines() if l[0] != '#')]
    runs = rows('augmentation') + [{**r, 'arm': 'plain'} for r in rows('data_block_sizes') if r['size'] == '128']
    table = re.findall(r'\| (plain|augmented) \| (\d+) \| (0\.\d{3})(?: ± (0\.\d{3}))? \| (\d+) \|', (ROOT/'README.md').read_text())
    assert {t[:2] for t in table} == {(r['arm'], r['epochs']) for r in runs}
    for arm, epochs, mean, std, n in table:
        acc = [float(r['accuracy']) for r in runs if (r['arm'], r['epochs']) == (arm, epochs)]
        assert int(n) == len(acc) and f'{statistics.mean(acc):.3f}' == mean and (f'{statistics.stdev(acc):.3f}' if len(acc) > 1 else '') == std, (arm, epochs)
