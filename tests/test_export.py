"""The export step beside nbdev's own command, under faults, and under random cells."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exp import export as ex

PYPROJECT = '[tool.nbdev]\nlib_path = "exp"\nnbs_path = "nbs"\nexport_procs = ["exp.export:ClassicComments"]\n' \
            'put_version_in_init = false\nupdate_pyproject = false\n'


def write_nb(path, *sources):
    cells = [dict(cell_type='code', source=s, metadata={}, outputs=[], execution_count=None, id=f'c{i}') for i, s in enumerate(sources)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)), encoding='utf-8')
    return path


@pytest.fixture
def project(tmp_path):
    (tmp_path/'nbs').mkdir()
    (tmp_path/'exp').mkdir()
    (tmp_path/'exp/__init__.py').touch()
    (tmp_path/'pyproject.toml').write_text(PYPROJECT)
    return tmp_path


def tree(root): return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(Path(root).rglob('*')) if p.is_file() and '__pycache__' not in p.parts}


def run_main(project, *args):
    "main() from inside `project`, as the command does it: (exit status, stderr)."
    r = subprocess.run([sys.executable, '-m', 'exp.export', *map(str, args)], cwd=project, capture_output=True, text=True,
                       env={**os.environ, 'PYTHONPATH': str(ROOT)})
    return r.returncode, r.stdout, r.stderr


@pytest.mark.parametrize('what', [(), ('--readme',)], ids=['exp with nbs', 'README with index'])
def test_in_step(what, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert ex.main(['--check', *what]) == 0, capsys.readouterr()


def test_every_module_has_a_notebook():
    made = {ex.scan(p)[0] for p in ex.notebooks(ROOT)}
    assert {p.stem for p in (ROOT/'exp').glob('*.py')} - {'_modidx'} == made - {None}


def test_same_bytes_as_nbdev_export(tmp_path):
    for d in ('nbs', 'exp'): shutil.copytree(ROOT/d, tmp_path/d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    shutil.copy(ROOT/'pyproject.toml', tmp_path)
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    script = Path(sys.executable).with_name('nbdev-export')
    r = subprocess.run([str(script)], cwd=tmp_path, env={**env, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    theirs = {k: v for k, v in tree(tmp_path/'exp').items() if k.endswith('.py')}
    assert theirs == {k: v for k, v in tree(ROOT/'exp').items() if k.endswith('.py')}


@pytest.mark.parametrize('form', ['#export', '# export', '#| export', '# | export'])
def test_both_spellings_give_the_same_bytes(project, form):
    write_nb(project/'nbs/00_a.ipynb', '#default_exp a', f'{form}\ndef f(x):\n    return x + 1', '#exporti\ny = 2', 'f(3)')
    text = ex.build(project)[Path('exp/a.py')]
    write_nb(project/'nbs/00_a.ipynb', '#| default_exp a', '#| export\ndef f(x):\n    return x + 1', '#| exporti\ny = 2', 'f(3)')
    assert text == ex.build(project)[Path('exp/a.py')]
    assert "__all__ = ['f']" in text and 'y = 2' in text and 'f(3)' not in text


@pytest.mark.parametrize('sources, where', [
    (['#default_exp a', 'x', '#export\ny = 1\ndef f(:\n    pass'], 'nbs/00_a.ipynb:cell 3:line 3: SyntaxError'),
    (['#default_exp a', '#export\nreturn 1'], "nbs/00_a.ipynb:cell 2:line 2: SyntaxError: 'return' outside function"),
    (['#export\nx = 1'], 'nbs/00_a.ipynb:cell 1: #export with no #default_exp'),
    (['#default_exp a', '#export\n%matplotlib inline'], 'nbs/00_a.ipynb:cell 2:line 2: SyntaxError'),
    (['#default_exp a', '#export\nfrom .b import c'], 'nbs/00_a.ipynb:cell 2:line 2: relative import'),
    (['#default_exp ../a', '#export\nx = 1'], 'nbs/00_a.ipynb'),
])
def test_errors_name_notebook_cell_and_line(project, sources, where):
    write_nb(project/'nbs/00_a.ipynb', *sources)
    write_nb(project/'nbs/01_b.ipynb', '#default_exp b', '#export\nx = 1')
    before = tree(project)
    status, _, err = run_main(project)
    assert status == 2 and err.startswith(where), err
    assert 'Traceback' not in err and len(err.strip().splitlines()) == 1
    assert tree(project) == before, 'all or none: nothing may change, the good notebook included'


@pytest.mark.parametrize('text', ['', 'not json', '[]', '{}', '{"cells": 3}', '{"cells": [{"cell_type": "code"}]}x'])
def test_a_file_that_is_no_notebook(project, text):
    (project/'nbs/00_a.ipynb').write_text(text)
    status, _, err = run_main(project)
    assert status == 2 and 'nbs/00_a.ipynb' in err and 'not a notebook' in err and 'Traceback' not in err


def test_two_notebooks_of_one_name(project):
    for n in ('00_a', '01_b'): write_nb(project/f'nbs/{n}.ipynb', '#default_exp same', '#export\nx = 1')
    status, _, err = run_main(project)
    assert status == 2 and "nbs/01_b.ipynb: module 'same' is already made by nbs/00_a.ipynb" in err


def test_check_writes_nothing_and_shows_a_diff(project):
    write_nb(project/'nbs/00_a.ipynb', '#default_exp a', '#export\nx = 1')
    assert run_main(project)[0] == 0 and run_main(project, '--check')[0] == 0
    write_nb(project/'nbs/00_a.ipynb', '#default_exp a', '#export\nx = 2')
    before = tree(project)
    status, out, _ = run_main(project, '--check')
    assert status == 1 and '-x = 1' in out and '+x = 2' in out and tree(project) == before


def test_one_named_notebook_leaves_the_others(project):
    a = write_nb(project/'nbs/00_a.ipynb', '#default_exp a', '#export\nx = 1')
    write_nb(project/'nbs/01_b.ipynb', '#default_exp b', '#export\ny = 1')
    run_main(project)
    write_nb(a, '#default_exp a', '#export\nx = 2')
    write_nb(project/'nbs/01_b.ipynb', '#default_exp b', '#export\ny = 2')
    assert run_main(project, 'nbs/00_a.ipynb')[0] == 0
    assert 'x = 2' in (project/'exp/a.py').read_text() and 'y = 1' in (project/'exp/b.py').read_text()


def test_a_module_whose_notebook_is_gone_is_a_fault(project):
    write_nb(project/'nbs/00_a.ipynb', '#default_exp a', '#export\nx = 1')
    old = write_nb(project/'nbs/01_b.ipynb', '#default_exp b', '#export\ny = 1')
    (project/'exp/by_hand.py').write_text('z = 1\n')                          # nobody's business but its author's
    assert run_main(project)[0] == 0
    old.unlink()
    for args in ((), ('--check',)):
        status, _, err = run_main(project, *args)
        assert status == 2 and err.startswith('exp/b.py: no notebook makes this module any more'), err
    assert run_main(project, 'nbs/00_a.ipynb')[0] == 0


def test_a_comment_of_two_words_is_no_directive(project):
    write_nb(project/'nbs/00_a.ipynb', '#default_exp a', '#export\nx = 1', '# export batches\nx + 1')
    assert run_main(project)[0] == 0
    assert 'x + 1' not in (project/'exp/a.py').read_text()


def test_a_whole_module_may_be_imported(project):
    write_nb(project/'nbs/00_a.ipynb', '#default_exp a', '#export\nx = 1')
    write_nb(project/'nbs/01_b.ipynb', '#default_exp b', '#export\nfrom exp import a\ny = a.x')
    status, _, err = run_main(project)
    assert status == 0, err
    assert 'from . import a' in (project/'exp/b.py').read_text()


def test_a_module_in_a_folder_imports_from_the_package(project):
    write_nb(project/'nbs/00_beta.ipynb', '#default_exp beta', '#export\nx = 1')
    write_nb(project/'nbs/01_gamma.ipynb', '#default_exp sub.gamma', '#export\nfrom exp import beta\nfrom exp.beta import x\ny = x + beta.x')
    status, _, err = run_main(project)
    assert status == 0, err
    r = subprocess.run([sys.executable, '-c', 'from exp.sub.gamma import y; print(y)'], cwd=project, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(project)})
    assert r.stdout == '2\n', r.stderr


def test_a_full_disk_leaves_the_old_modules_whole(tmp_path, monkeypatch):
    ex.write_all(tmp_path, {'a.py': 'old a\n', 'b.py': 'old b\n'})
    calls = []

    def no_space(fd):
        calls.append(fd)
        if len(calls) == 2: raise OSError(28, 'No space left on device')
    monkeypatch.setattr(ex.os, 'fsync', no_space)
    with pytest.raises(OSError): ex.write_all(tmp_path, {'a.py': 'new a\n', 'b.py': 'new b\n'})
    assert tree(tmp_path) == {'a.py': b'old a\n', 'b.py': b'old b\n'}


def test_a_kill_between_writes_leaves_whole_files(tmp_path):
    ex.write_all(tmp_path, {'a.py': 'old\n'*50, 'b.py': 'old\n'*50})
    code = ("import os, signal; from exp import export as ex\n"
            "real, n = os.replace, []\n"
            "def replace(a, b):\n    n.append(1)\n    if len(n) == 2: os.kill(os.getpid(), signal.SIGKILL)\n    real(a, b)\n"
            "ex.os.replace = replace\n"
            f"ex.write_all({str(tmp_path)!r}, {{'a.py': 'new\\n'*50, 'b.py': 'new\\n'*50}})")
    assert python('-c', code).returncode == -9
    assert (tmp_path/'a.py').read_text() == 'new\n'*50 and (tmp_path/'b.py').read_text() == 'old\n'*50


line = st.one_of(st.text(max_size=20), st.sampled_from(['#export', '#exporti', '# export', '#| export', '#default_exp m', 'x = 1', 'def f(:', '%ls', '!ls',
                 'from exp.a import b', 'from __future__ import annotations', '"""', 'return', '    y', 'class A: pass', '\\', '@patch', '__all__ = 3']))
cell = st.lists(line, max_size=5).map('\n'.join)


@given(st.lists(cell, max_size=5))
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_cells_give_a_module_or_an_error_that_names_the_cell(tmp_path_factory, cells):
    root = tmp_path_factory.mktemp('fuzz')
    (root/'nbs').mkdir(); (root/'exp').mkdir()
    (root/'pyproject.toml').write_text(PYPROJECT)
    (root/'exp/__init__.py').touch()
    path = root/'nbs/00_m.ipynb'
    try: write_nb(path, '#default_exp m', *cells)
    except UnicodeEncodeError: return
    try: texts = ex.build(root)
    except ex.ExportError as e:
        assert str(e).startswith('nbs/00_m.ipynb:cell ') or 'exp/m.py' in str(e) or 'nbs/00_m.ipynb: ' in str(e), str(e)
        return
    for text in texts.values(): compile(text, 'm.py', 'exec')
    assert not (root/'exp/m.py').exists()


def test_a_named_notebook_does_not_take_the_module_of_another(project):
    "Two notebooks of one module were told of only where both were exported; alone, the second overwrote the first one's module."
    write_nb(project/'nbs/00_a.ipynb', '#default_exp a', '#export\nx = 1')
    write_nb(project/'nbs/02_c.ipynb', '#default_exp c', '#export\ndef f(:')               # a fault that is not asked for
    (project/'nbs/03_d.ipynb').write_text('no notebook')
    assert run_main(project, 'nbs/00_a.ipynb')[0] == 0
    write_nb(project/'nbs/01_b.ipynb', '#default_exp a', '#export\ny = 1')
    before = tree(project)
    for args in ((), ('--check',)):
        status, _, err = run_main(project, *args, 'nbs/01_b.ipynb')
        assert status == 2 and "nbs/01_b.ipynb: module 'a' is already made by nbs/00_a.ipynb" in err and tree(project) == before


def test_without_nbdev_a_sentence(monkeypatch, capsys):
    from exp.export import main
    monkeypatch.setitem(sys.modules, 'nbdev', None)
    for k in [k for k in sys.modules if k.startswith('nbdev.')]: monkeypatch.setitem(sys.modules, k, None)
    monkeypatch.chdir(ROOT)
    assert main(['--check']) == 2 and 'exp-export needs nbdev' in capsys.readouterr().err
