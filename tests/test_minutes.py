"""`--minutes`: what fits is what is chosen, by a clock that the test turns; the trial leaves no trace; a run goes on with what was chosen."""
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from test_recipes import folder

from exp import minutes as M
from exp import train as T
from exp.datasets import DataError
from exp.minutes import Costs
from exp.recipes import get_recipe


class Clock:
    "Every look at it takes `tick` seconds."
    def __init__(self, tick=.125): self.now, self.tick = 0., tick
    def __call__(self):
        self.now += self.tick
        return self.now


SIZED = dict(arch='lesson', width=.25, size=16, crops=(8, 16), bs=4, tfms='crop')
OTHERS = dict(bs_given=True, valid_pct=0., split_seed=0, seed=0, device='cpu', bf16=None, compile=False)


@pytest.mark.parametrize('n, share', [(3, 10/12), (8, 1), (40, 51/160)])
def test_costs_by_a_clock_that_ticks(tmp_path, n, share):
    clock, c = Clock(), {**get_recipe('cpu', **SIZED), **OTHERS}
    costs, total = M.measure(c, folder(tmp_path, n=n), clock), 2*n                     # of two classes, in train/ and val/
    assert costs.epoch == pytest.approx(.125*-(-total//4)) and costs.judge == pytest.approx(.125*total/8)
    assert costs.load == pytest.approx(.125/share), 'in the trial: whole batches of 4, every third of 80'
    assert get_recipe('cpu', **SIZED) == {k: c[k] for k in get_recipe('cpu')}, 'the settings are as they were'


def test_the_first_batches_do_not_count():
    watch, run = M.Stopwatch(iter([0, 9, 18, 20, 22.]).__next__), SimpleNamespace(in_train=True)
    watch.begin_fit(run)
    watch.begin_epoch(run)
    for _ in range(4): watch.after_batch(run)
    assert watch.train == 2


def test_larger_crops_cost_more_by_simpsons_rule(tmp_path, monkeypatch):
    class Area(M.Stopwatch):
        def after_batch(self, run): self.seconds[run.in_train].append(run.xb.shape[-1]**2)
    monkeypatch.setattr(M, 'Stopwatch', Area)
    costs = M.measure({**get_recipe('cpu', **{**SIZED, 'crops': (8, 24), 'size': 24}), **OTHERS}, folder(tmp_path, n=8))
    assert costs.epoch == pytest.approx(4*sum((8 + 16*i/1000)**2 for i in range(1001))/1001, rel=1e-3)


positive = st.floats(.01, 100)


@given(st.builds(Costs, positive, positive, positive), st.integers(0, 9), st.floats(1, 1e4))
def test_it_ends_within_the_time_and_one_more_would_not(costs, every, seconds):
    e = M.most_epochs(costs, every, seconds)
    assert 1 <= e <= 200 and (e == 1 or M.seconds_of(costs, e, every) <= seconds)
    assert e == 200 or M.seconds_of(costs, e + 1, every) > seconds


@given(st.builds(Costs, positive, positive, positive), st.integers(1, 40), st.integers(0, 9))
def test_seconds_counted_out(costs, epochs, every):
    "As the training goes: an epoch, and a validation after each `every`-th and the last."
    t = costs.load
    for e in range(1, epochs + 1): t += costs.epoch + (costs.judge if e == epochs or (every and e % every == 0) else 0)
    assert M.seconds_of(costs, epochs, every) == pytest.approx(t)


@pytest.mark.parametrize('speed, minutes, arch, crops', [(1, 1, 'xresnet18', [48, 80]), (1, 6, 'xresnet18', [48, 80]), (1, 9, 'xresnet18', [64, 112]), (1, 60, 'xresnet34', [64, 112]), (20, 60, 'xresnet18', [48, 80])])
def test_who_has_time_gets_larger_pictures_and_a_larger_net(speed, minutes, arch, crops):
    clock = Clock(0.)
    def cost(c):
        clock.now += 10.                                                              # measuring takes its time, too
        return Costs(5., speed*c['crops'][1]**2/800*(2 if c['arch'] == 'xresnet34' else 1), 1.)
    c = {**get_recipe('cpu'), 'crops': [48, 80]}
    p = M.plan(c, {}, lambda: 60*minutes - clock(), cost)
    assert (p['arch'], p['crops']) == (arch, crops) and p['epochs'] >= {112: 30, 80: 1}[crops[1]]
    took = clock.now - 10 + M.seconds_of(cost(p), p['epochs'], p['validate'])
    assert took <= 60*minutes < took + cost(p).epoch + 21, 'all is spent but what is less than an epoch, or was measured last'
    for own in ({'size': 96}, {'recipe': 'cpu'}, {'arch': 'lesson'}):
        asked = M.plan(c, own, lambda: 60*minutes, cost)
        assert {**asked, 'epochs': 0} == {**c, 'epochs': 0}, 'what was asked for stays'


@pytest.fixture
def pets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path/'pets', n=8)
    return ['--data', 'pets', '--recipe', 'lesson', '--width', '.25', '--size', '16', '--device', 'cpu']


def test_the_command(pets, tmp_path, monkeypatch, capsys):
    measure = M.measure
    monkeypatch.setattr(M, 'measure', lambda c, path, clock: measure(c, path) and Costs(1., 15., 2.))
    assert T.main([*pets, '--minutes', '1', '--log-dir', 'r', '--json', 'a.json']) == 0
    r, c = json.loads((tmp_path/'a.json').read_text()), json.loads((tmp_path/'r/config.json').read_text())
    assert r['epochs'] == c['epochs'] == 3 == len(r['rows']) and c['minutes'] == 1 and '3 epochs of lesson' in capsys.readouterr().out
    assert T.main([*pets, '--epochs', '3', '--log-dir', 'other', '--json', 'b.json']) == 0
    plain = json.loads((tmp_path/'b.json').read_text())
    assert [{k: v for k, v in o.items() if k != 'time'} for o in r['rows']] == [{k: v for k, v in o.items() if k != 'time'} for o in plain['rows']], 'the trial left a trace'
    def again(c, path, clock): raise AssertionError('measured twice')
    monkeypatch.setattr(M, 'measure', again)
    for same in ([], ['--minutes', '1']): assert T.main([*pets, *same, '--resume', '--log-dir', 'r']) == 0
    capsys.readouterr()
    for wrong in (['--resume', '--minutes', '2', '--log-dir', 'r'], ['--minutes', '1', '--epochs', '3']): assert T.main([*pets, *wrong]) == 2
    for bad in ('0', 'nan', '-1', 'five'):
        with pytest.raises(SystemExit) as e: T.main([*pets, '--minutes', bad])
        assert e.value.code == 2
    assert not [l for l in capsys.readouterr().err.splitlines() if not l.startswith('exp-train: ')]


def test_measured_for_itself_on_the_way(pets, tmp_path):
    assert T.main([*pets, '--minutes', '.1', '--log-dir', 'r', '--runs', '2']) == 0
    assert 1 <= json.loads((tmp_path/'r/config.json').read_text())['epochs'] <= 200 and len([*tmp_path.glob('r/*/model.pt')]) == 2


def test_several_processes_are_not_measured_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    with pytest.raises(DataError, match='--epochs'): M.in_minutes({'minutes': 1.}, {}, tmp_path, 0.)


@pytest.mark.parametrize('command', ['train', 'predict'])
def test_interrupted_while_torch_is_imported(command):
    code = f'''import sys
class Stop:
    def find_spec(self, name, *args):
        if name == 'torch': raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
from lesson11.commands import {command}
sys.exit({command}())'''
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert (r.returncode, r.stdout, r.stderr) == (130, '', f'exp-{command}: interrupted\n')
