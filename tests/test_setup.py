"""The set-up nothing trips over: uv, an editor elsewhere, `make lab`, the wheel; none of it needs a network unless the test says so."""
import configparser
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import zipfile

import clean_notebook
import nbformat
import pytest
from conftest import NBS, ROOT

try: import tomllib
except ImportError: import tomli as tomllib

HERE = sysconfig.get_path('purelib')
BIN = 'Scripts' if os.name == 'nt' else 'bin'
ENV = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV', 'UV_PROJECT_ENVIRONMENT', 'EXP_MIRROR', 'EXP_DATA')}


def run(*args, cwd=None, fails=False, **env):
    "What a command printed; the test fails where the command does."
    r = subprocess.run([*map(str, args)], cwd=cwd, env={**ENV, **env}, capture_output=True, text=True, timeout=600)
    assert fails == bool(r.returncode), r.stdout[-1000:] + r.stderr[-3000:]
    return r.stdout + r.stderr


def tool(name):
    "The path of a command of the dev requirements, or skip."
    found = shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get('PATH', '')]))
    return found or pytest.skip(f'no {name} here: pip install -e ".[dev]"')


def new_venv(folder, *installed, **env):
    "A venv in `folder` with `installed` and nothing that it requires; its folder of commands."
    pytest.importorskip('pip')                             # uv's own venvs have none
    run(sys.executable, '-m', 'venv', '--without-pip', folder)
    run(sys.executable, '-m', 'pip', '--python', folder/BIN/'python', 'install', '--no-deps', '--no-index', *installed, **env)
    return folder/BIN


def copy_project(to):
    "What git has of the project, without its tests."
    away = shutil.ignore_patterns('.*', '__pycache__', 'runs', 'build', 'dist', '*.egg-info', 'uv.lock', 'tests', 'benchmarks', '_modidx.py')
    return shutil.copytree(ROOT, to, ignore=away)


def set_in(settings, name, value):
    text = settings.read_text(encoding='utf-8')
    assert re.search(rf'(?m)^{name} =', text), name
    settings.write_text(re.sub(rf'(?m)^({name}) =.*', rf'\1 = {value}', text), encoding='utf-8')


def settings():
    ini = configparser.ConfigParser()
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


# uv

def test_pyproject_says_what_settings_ini_says():
    project, cfg = tomllib.loads((ROOT/'pyproject.toml').read_text())['project'], settings()
    assert project['name'] == cfg['name'] and project['requires-python'] == '>=' + cfg['min_python']
    assert not set(project) - {'name', 'requires-python', 'dynamic'}, 'the rest has one place'


@pytest.fixture
def for_uv(tmp_path):
    "A copy that requires nothing, so that nothing need be fetched, with what is installed here on its path; `uv` with its options."
    root, uv = copy_project(tmp_path/'lesson11'), tool('uv')
    set_in(root/'settings.ini', r'\w*requirements', '')
    env = dict(UV_CACHE_DIR=str(tmp_path/'cache'), UV_TOOL_DIR=str(tmp_path/'tools'), UV_OFFLINE='1', UV_PYTHON_DOWNLOADS='never', UV_NO_PROGRESS='1', EXP_NO_BAR='1')
    run(uv, 'venv', '--python', sys.executable, root/'.venv', **env)
    py = root/'.venv'/BIN/'python'
    site = run(py, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"), end="")')
    with open(os.path.join(site, 'outer.pth'), 'w') as f: f.write(HERE)
    def uv_(*args, cwd=root, **kw): return run(uv, *args, cwd=cwd, **env, **kw)
    return root, py, uv_


def test_uv_sync_installs_the_package_from_settings_ini(for_uv):
    root, py, uv = for_uv
    uv('sync', '--no-build-isolation')
    say = 'import exp; print(exp.__version__, exp.__file__)'
    assert str(root/'exp') in run(py, '-c', say, cwd=root.parent)
    assert '--epochs' in uv('run', '--no-build-isolation', 'exp-train', '--help')
    set_in(root/'settings.ini', 'version', '7.0')
    uv('sync', '--no-build-isolation')
    assert run(py, '-c', say, cwd=root.parent).startswith('7.0 '), 'uv looks at settings.ini'


def test_uvx_runs_a_command_of_the_folder(for_uv):
    root, _, uv = for_uv
    said = uv('tool', 'run', '--no-build-isolation', '--from', root, 'exp-train', '--help', cwd=root.parent, PYTHONPATH=HERE)
    assert '--epochs' in said


def test_uv_finds_all_that_is_required(tmp_path):
    "Of every extra, for every Python and system that we name. Needs the network, a few seconds; torch is not downloaded."
    root, uv = copy_project(tmp_path/'lesson11'), tool('uv')
    r = subprocess.run([uv, 'lock', '--dry-run', '--no-python-downloads'], cwd=root, env=ENV, capture_output=True, text=True, timeout=600)
    if r.returncode and re.search('(?i)error sending request|failed to fetch|dns error|connect|timed out', r.stderr): pytest.skip('uv reaches no package index')
    assert not r.returncode and 'warning' not in r.stderr.lower(), r.stderr
    assert 'torchvision' in r.stdout + r.stderr


# an editor

@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "The Python of a new venv in which this folder is installed as `make` does it, `pip install -e`, without what it requires."
    folder = tmp_path_factory.mktemp('venv')
    root = copy_project(folder/'lesson11')
    return new_venv(folder, '--no-build-isolation', '-e', root, PYTHONPATH=HERE)/'python', root


def test_an_editor_finds_the_package_from_another_folder(installed, tmp_path):
    "And knows what is in it."
    pyright, (py, _) = tool('pyright'), installed
    script = tmp_path/'mine.py'
    script.write_text('import exp\nfrom exp.learner import Learner\n\nreveal_type(Learner.fit)\nprint(exp.annealing, Learner.fitt)\n')
    tried = subprocess.run([pyright, '--version'], env=ENV, capture_output=True, text=True)
    if tried.returncode: pytest.skip('no node for pyright')
    r = subprocess.run([pyright, '--pythonpath', str(py), '--outputjson', str(script)], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    said = [(d['range']['start']['line'] + 1, d['severity'], d['message']) for d in json.loads(r.stdout)['generalDiagnostics']]
    assert [(line, kind) for line, kind, _ in said] == [(4, 'information'), (5, 'error')] and 'epochs' in said[0][2] and 'fitt' in said[1][2], said


def test_exp_lab_says_where_a_clone_is(installed, tmp_path):
    py, root = installed
    assert str(root) in run(py, '-m', 'lesson11', tmp_path/'mine', cwd=tmp_path, fails=True) and not (tmp_path/'mine').exists()


# JupyterLab

@pytest.fixture
def lab(tmp_path):
    "The address that `make lab` prints, once it answers."
    pytest.importorskip('jupyterlab')
    if os.name == 'nt': pytest.skip('make is not for Windows')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    args = f'--no-browser --allow-root --port={port} --ServerApp.port_retries=0 --LabApp.news_url= --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'
    dirs = {f'JUPYTER_{k}_DIR': str(tmp_path/k) for k in ('CONFIG', 'DATA', 'RUNTIME')} | {'JUPYTERLAB_WORKSPACES_DIR': str(tmp_path/'w')}
    line = run(tool('make'), '--no-print-directory', '-n', '-o', '.venv/stamp-dev', 'lab', f'BIN={os.path.dirname(sys.executable)}', f'ARGS={args}', cwd=ROOT)
    log = tmp_path/'log'
    with open(log, 'w') as f: p = subprocess.Popen(['bash', '-c', 'exec ' + line.splitlines()[-1]], cwd=ROOT, env={**ENV, **dirs}, stdout=f, stderr=f)
    try:
        for _ in range(300):
            address = re.search(r'http://127\.0\.0\.1:\S+', log.read_text())
            try: urllib.request.urlopen(address[0], timeout=5); break
            except (OSError, TypeError): time.sleep(.2)
            assert p.poll() is None, log.read_text()
        yield address[0]
    finally:
        p.terminate()
        p.wait(20)


def test_make_lab_opens_the_index_with_the_repository_as_root(lab):
    "The address that is printed is what somebody opens where no browser can be started."
    place, query = lab.split('?')
    assert place.endswith('/lab/tree/nbs/index.ipynb')
    for name in ('nbs/index.ipynb', 'docs/colab.md'):
        got = urllib.request.urlopen(f'{place.split("/lab/")[0]}/api/contents/{name}?content=0&{query}')
        assert json.load(got)['path'] == name


# the wheel

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    root = copy_project(tmp_path_factory.mktemp('wheel')/'lesson11')
    set_in(root/'settings.ini', 'repository', 'https://example.org/lesson11')
    run(sys.executable, '-m', 'build', '--wheel', '--no-isolation', root)
    return next((root/'dist').glob('*.whl'))


def test_the_wheel_says_what_it_is(wheel):
    z = zipfile.ZipFile(wheel)
    text = {n.split('/', 1)[1].split('/')[-1]: z.read(n).decode() for n in z.namelist() if '.dist-info/' in n}
    assert 'exp/py.typed' in z.namelist() and 'Apache License' in text['LICENSE']
    head, readme = text['METADATA'].split('\n\n', 1)
    for want in ('License-File: LICENSE', 'Requires-Python: >=3.10', 'Classifier: Typing :: Typed', 'Project-URL: Source, https://example.org/lesson11'):
        assert want in head.splitlines()
    assert '(https://example.org/lesson11/blob/main/nbs/00_export.ipynb)' in readme, 'links lead somewhere from where it is read'
    run(tool('twine'), 'check', '--strict', wheel)


# the course out of a wheel

@pytest.fixture(scope='module')
def reader(wheel, tmp_path_factory):
    "The commands of a new venv with the wheel in it."
    return new_venv(tmp_path_factory.mktemp('reader'), wheel)


def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_exp_lab_puts_the_course_into_a_folder_over_nothing(reader, tmp_path):
    mine = tmp_path/'my course'
    assert f'cd "{mine}"' in run(reader/'exp-lab', mine)
    got = files(mine)
    want = {p.relative_to(ROOT).as_posix() for p in ROOT.glob('nbs/**/[0-9i]*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    assert {n for n in got if n.startswith('nbs/')} == want and all(got[n] == (ROOT/n).read_bytes() for n in want)
    assert not [n for n in got if '__pycache__' in n or n.endswith('.part') or 'egg-info' in n]
    note, gone = mine/'nbs/00_export.ipynb', mine/'nbs/01_datasets.ipynb'
    note.write_text('my notes')
    gone.unlink()
    (mine/'mine.py').write_text('mine')
    run(reader/'exp-lab', mine)
    assert files(mine) == {**got, 'nbs/00_export.ipynb': b'my notes', 'mine.py': b'mine'}


def test_what_its_notebooks_point_to_is_in_the_folder(reader, tmp_path):
    "Links in prose; and in code what lies outside of nbs/."
    run(reader/'exp-lab', tmp_path)
    points = 0
    for p in [tmp_path/'README.md', *tmp_path.glob('docs/*.md'), *tmp_path.glob('nbs/**/*.ipynb')]:
        cells = json.loads(p.read_text(encoding='utf-8'))['cells'] if p.suffix == '.ipynb' else [dict(cell_type='markdown', source=p.read_text(encoding='utf-8'))]
        for c in cells:
            pattern = {'markdown': r'\]\((?!\w+:|#)([^)\s#]+)', 'code': r"['\"]((?:\.\./)+(?:exp|experiments)/[\w.]+)['\"]"}[c['cell_type']]
            for to in re.findall(pattern, ''.join(c['source'])):
                points += 1
                assert (p.parent/to).exists(), f'{p.name}: {to}'
    assert points > 100


def test_a_folder_that_cannot_be_written_is_said(reader, tmp_path):
    (tmp_path/'taken').write_text('a file')
    assert 'Traceback' not in run(reader/'exp-lab', tmp_path/'taken', fails=True)
    assert (tmp_path/'taken').read_text() == 'a file'


# a container, a filter for git

SIZE = dict(type='string', pattern=r'^\d+([tgmk]b)?$')
CONTAINER = dict(properties=dict(                          # what containers.dev/implementors/json_reference says of the fields we use
    name=dict(type='string'), image=dict(type='string'), postCreateCommand=dict(type='string'),
    hostRequirements=dict(properties=dict(cpus=dict(type='integer', minimum=1), memory=SIZE, storage=SIZE, gpu=dict(enum=[True, False, 'optional'])), additionalProperties=False),
    customizations=dict(properties=dict(vscode=dict(properties=dict(
        extensions=dict(type='array', items=dict(type='string', pattern=r'^[\w-]+\.[\w-]+$')), settings=dict(type='object')), additionalProperties=False)))),
    required=['image'], additionalProperties=False)


def test_the_container_is_described_as_its_readers_expect():
    jsonschema = pytest.importorskip('jsonschema')
    c = json.loads((ROOT/'.devcontainer/devcontainer.json').read_text())
    jsonschema.Draft202012Validator(CONTAINER).validate(c)
    assert c['postCreateCommand'].split()[0] == 'make' and 'pip install' in run(tool('make'), '--no-print-directory', '-nB', *c['postCreateCommand'].split()[1:], cwd=ROOT)
    assert c['customizations']['vscode']['settings']['python.defaultInterpreterPath'] == '.venv/bin/python'


def as_jupyterlab_saves(nb):
    nb['metadata'] = dict(kernelspec=dict(display_name='Python 3 (ipykernel)', language='python', name='python3'), widgets={},
                          language_info=dict(name='python', version='3.13.1', mimetype='text/x-python', codemirror_mode=dict(name='ipython', version=3)))
    for c in nb['cells']:
        c['metadata'] |= dict(scrolled=True, editable=True)
        if c['cell_type'] == 'code': c['metadata']['execution'] = {'iopub.execute_input': '2026-01-01T00:00:00Z'}


@pytest.mark.parametrize('path', NBS, ids=[p.stem for p in NBS])
def test_a_clean_notebook_is_as_it_is_committed(path):
    "As data: the order of its keys may be another."
    nb = path.read_text(encoding='utf-8')
    assert clean_notebook.clean(json.loads(nb)) == json.loads(nb)


def test_with_the_filter_git_sees_no_change_in_a_notebook_that_was_only_opened(tmp_path):
    git, path, lesson = tool('git'), tmp_path/'a.ipynb', json.loads((ROOT/'nbs/05_annealing.ipynb').read_text(encoding='utf-8'))
    def staged():
        run(git, 'add', path, cwd=tmp_path)
        return run(git, 'ls-files', '-s', cwd=tmp_path)
    def save(): nbformat.write(nbformat.from_dict(lesson), path)
    run(git, 'init', '-q', tmp_path)
    save()
    before = staged()
    (tmp_path/'.git/info/attributes').write_text('*.ipynb filter=notebook\n')
    run(git, 'config', 'filter.notebook.clean', f"'{sys.executable}' '{ROOT}/tests/clean_notebook.py'", cwd=tmp_path)
    as_jupyterlab_saves(lesson)
    save()
    assert staged() == before
    lesson['cells'][-1]['source'] = 'another'
    save()
    assert staged() != before
