"""The house holds: imports go down the numbers, lessons import lessons only, nothing is over its ceiling, nobody knows whom he should not."""
import ast
import json
import re

import house
import pytest
from conftest import NBS, ROOT

try: import tomllib
except ImportError: import tomli as tomllib

by_name = {n.name: n for n in house.notebooks()}
each = pytest.mark.parametrize('nb', by_name.values(), ids=by_name)


@each
def test_is_within_its_ceilings(nb):
    found = house.faults(nb)
    assert not found, '\n'.join(found)


@each
def test_imports_go_down_the_numbers(nb):
    assert not [*house.upward(nb)]


def test_all_together_are_within_theirs():
    lessons, everything = house.totals()
    assert not house.over(lessons, house.LESSONS_TOGETHER, 'lessons') + house.over(everything, house.EVERYTHING, 'everything')


def test_every_notebook_has_a_number_of_its_own():
    assert {p.stem for p in NBS} == {*by_name, 'index'}
    numbers = [n.number for n in by_name.values()]
    assert numbers == sorted({*numbers}) and [n.name for n in by_name.values()] == sorted(by_name)
    assert not [n.name for n in by_name.values() if not n.is_lesson and not n.number[1]], 'a second reading has a letter'


def test_ruff_leaves_out_nothing():
    assert 'extend-exclude' not in tomllib.loads((ROOT/'pyproject.toml').read_text())['tool']['ruff']


# what is measured, on cells made for it

def nb(tmp_path, *cells, name='09z_made', lesson=True):
    "A notebook of `cells`: text in a tuple, code as it is; a code cell may come with its outputs."
    made = []
    for i, c in enumerate(cells):
        kind, text, outputs = ('markdown', c[0], []) if isinstance(c, tuple) else ('code', *c) if isinstance(c, list) else ('code', c, [])
        made.append(dict(cell_type=kind, id=str(i), source=text, outputs=outputs))
    path = tmp_path/('nbs' if lesson else 'nbs/more')/f'{name}.ipynb'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=made)))
    return house.Notebook(path)


PICTURE = [dict(data={'image/png': 'A'*80_000})]


def test_minutes_are_words_and_lines(tmp_path):
    f = nb(tmp_path, ('word '*200,), '#default_exp made\n', '#export\ndef f(x):\n    """One.\n\n    Two."""\n\n    return x', ['f(1)\n'*11, PICTURE], 'f(2)\n'*6).figures
    assert f['minutes'] == round(1 + 1/6 + 3/6 + 2/200 + 11/6 + 6/6) and f['first'] == round(1 + 1/6 + 3/6 + 2/200 + 11/6)
    assert f['lines'] == 2 and f['cells'] == 5 and f['wide'] == f['long'] == 0 and f['picture_kb'] == 60
    assert nb(tmp_path, 'x').figures['first'] is None
    assert nb(tmp_path, ['x', [dict(text='epoch  train_loss')]]).figures['first'] == 0
    f = nb(tmp_path, '#' + 'x'*100, 'a = 1\n'*21, 'class A:\n' + '    a = 1\n'*60, '%time x\n' + 'a\n'*20).figures
    assert f['wide'] == 1 and f['long'] == 2


@pytest.mark.parametrize('lesson, cell, said', [
    (True, 'from exp.annealing import sched_cos', ''),
    (True, 'def f():\n    if 1:\n        from exp.mixup import MixUp', 'exp.mixup of the later 10b_mixup'),
    (True, '%matplotlib inline\nimport exp.xresnet as x', 'exp.xresnet of the later 11_xresnet'),
    (True, 'from exp import xresnet', 'exp.xresnet of the later 11_xresnet'),
    (True, 'from exp import Learner', 'Learner from exp itself'),
    (True, 'import exp', 'all from exp itself'),
    (True, 'from exp.nowhere import x', 'which no notebook makes'),
    (True, '#export\nfrom exp.annealing import *', 'import *'),
    (True, 'from exp.annealing import *', ''),
    (True, '#export\nfrom exp.second_reading import x', 'a lesson, and imports of the second reading 09y_second'),
    (True, 'from exp.second_reading import x', 'a lesson, and imports of the second reading 09y_second'),
    (False, '#export\nfrom exp.second_reading import x\nfrom exp.annealing import y', ''),
    (True, '#default_exp learner\n#export\nfrom exp.datasets import URLs', 'the loop knows no pictures'),
    (True, '#default_exp learner\nfrom exp.datasets import URLs', ''),                                     # to show it is another thing
])
def test_an_import_that_is_out_of_place_is_named(tmp_path, monkeypatch, lesson, cell, said):
    there = {**house.modules(), 'second_reading': nb(tmp_path, '#default_exp second_reading', name='09y_second', lesson=False)}
    monkeypatch.setattr(house, 'modules', lambda: there)
    n = nb(tmp_path, cell, lesson=lesson)
    found = [*house.upward(n), *house.aside(n), *house.strangers(n)]
    assert len(found) == bool(said) and said in ''.join(found)


def test_what_a_module_weighs():
    src = '"""Of a module."""\n# a comment\ndef f(a, b=()):\n    "Doc."\n    return [x for x in a if x and b] if a else b   # why\n'
    tree = ast.parse(src)
    assert house.branches(tree.body[1]) == 1 + 1 + 2 + 1
    assert [*house.weights(tree)] == [1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1]        # IfExp, a, b, comprehension, x, x, a, and, x, b
    assert house.characters(src) == len('deff(a,b=()):return[xforxinaifxandb]ifaelseb')
    assert house.patches(ast.parse('from .learner import Learner, fit\nLearner.f = 1\nsetattr(Learner, "f", 1)\nfit.x = 1\n@patch\ndef f(self:Learner): pass')) == 3


# the tables of notebooks, for readers

INDEX = ''.join(''.join(c['source']) for c in json.loads(house.INDEX.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown')


def test_the_tables_list_every_notebook():
    "All but the minutes must be right; those may be a fifth off, or three minutes, until somebody runs `make readme`."
    def but_minutes(r): return [*r[:-3], *r[-2:]]
    have, want = house.rows(INDEX), house.rows(house.with_tables(INDEX))
    assert [*have] == [*want] == [*[n for n in by_name if by_name[n].is_lesson], *[n for n in by_name if not by_name[n].is_lesson]], 'make readme'
    for name, row in have.items():
        assert but_minutes(row) == but_minutes(want[name]) and row[-1], 'make readme'
        minutes = by_name[name].figures['minutes']
        assert abs(int(row[-3]) - minutes) <= max(3, .2*minutes), f'{name}: {row[-3]} minutes in the table, {minutes} measured: make readme'


def test_every_link_of_the_index_leads_somewhere():
    links = {l.split('#')[0] for l in re.findall(r'\]\((?!https?:|#)([^)\s]+)\)', INDEX)}
    assert len(links) > 20 and not [l for l in links if not (house.INDEX.parent/l).exists()]
