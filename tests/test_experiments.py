"""Scripts of experiments/: a training that was killed goes on where it stood, gives the row it would have given, and its seconds add up."""
import csv
import os
import shutil
import signal
import sys

import pytest

from conftest import ROOT, small_env


@pytest.fixture
def script(monkeypatch):
    "Import a script of experiments/ as it imports its neighbours."
    monkeypatch.syspath_prepend(str(ROOT/'experiments'))
    def get(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return __import__(name)
    return get


def test_seconds_of_all_sittings(script, tmp_path):
    sitting, before = script('sittings').sitting, signal.getsignal(signal.SIGTERM)
    with sitting(tmp_path/'a') as seconds: sum(range(10**6)); first = seconds()
    with pytest.raises(SystemExit), sitting(tmp_path/'a') as seconds: sum(range(10**6)); os.kill(os.getpid(), signal.SIGTERM); sum(range(10**9))
    with sitting(tmp_path/'a') as seconds: third = seconds()
    assert 0 < first < third and signal.getsignal(signal.SIGTERM) == before
    assert float((tmp_path/'a'/'cpu_seconds').read_text()) >= first


def test_an_augmented_training_that_was_killed(script, tmp_path, data_home, monkeypatch):
    for k, v in small_env(data_home).items(): monkeypatch.setenv(k, v)
    aug = script('augmentation')
    for split, step in (('train', 6), ('val', 10)):                                          # every sixth of the drawn pictures: 140 of them, three batches
        for f in sorted((data_home/'data/drawn-shapes-160'/split).rglob('*.JPEG'))[::step]:
            (few := tmp_path/'few'/split/f.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(f, few)
    monkeypatch.setattr(aug, 'RUNS', tmp_path/'runs')
    monkeypatch.setattr(sys, 'argv', ['augmentation.py', '--data', str(tmp_path/'few'), '--size', '16', '--epochs', '3', '--seeds', '0'])
    def rows(out): return [*csv.DictReader(l for l in open(out) if l[0] != '#')]

    monkeypatch.setattr(aug, 'OUT', whole := tmp_path/'whole.csv')
    aug.main()
    assert [r['arm'] for r in rows(whole)] == ['augmented', 'plain'] and not any((tmp_path/'runs'/'augmentation').iterdir())

    monkeypatch.setattr(aug, 'OUT', broken := tmp_path/'broken.csv')
    class Killed(aug.ProgressCallback):
        def begin_batch(self, learn):
            if learn.epoch == 1 and learn.iter == 2: os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as m:
        m.setattr(aug, 'ProgressCallback', Killed)
        with pytest.raises(SystemExit): aug.main()
    assert not rows(broken) and len([*(tmp_path/'runs').rglob('*.pt')]) == 1
    aug.main()
    for a, b in zip(rows(whole), rows(broken)): assert {**a, 'cpu_seconds': 0} == {**b, 'cpu_seconds': 0}
    assert len(rows(broken)) == 2
    aug.main()                                                                                # nothing is left to do
    assert len(rows(broken)) == 2


def test_a_recipe_in_two_sittings(script, tmp_path, data_home, monkeypatch):
    for k, v in small_env(data_home).items(): monkeypatch.setenv(k, v)
    rec = script('recipes')
    monkeypatch.setattr(rec, 'FOLDER', tmp_path/'runs')
    monkeypatch.setattr(rec, 'OUT', tmp_path/'r.csv')
    monkeypatch.setattr(rec, 'RUNS', {'tiny': '--recipe cpu --epochs 2 --size 16 --width .125 --bs 100'})
    monkeypatch.setattr(sys, 'argv', ['recipes.py', '--rows', 'tiny', '--seeds', '0'])
    trained = rec.train
    def killed(a): trained(a); os.kill(os.getpid(), signal.SIGTERM)                          # trained, and the row not yet written
    with monkeypatch.context() as m:
        m.setattr(rec, 'train', killed)
        with pytest.raises(SystemExit): rec.main()
    (result,) = (tmp_path/'runs').rglob('result.json')
    rec.main()
    (row,) = csv.DictReader(l for l in open(tmp_path/'r.csv') if l[0] != '#')
    assert row['recipe'] == 'tiny' and row['epochs'] == '2' and 0 < float(row['accuracy']) < 1 and not result.exists()


def test_an_arm_of_five_minutes(script, tmp_path, data_home, monkeypatch):
    for k, v in small_env(data_home).items(): monkeypatch.setenv(k, v)
    five = script('five_minutes')
    monkeypatch.setattr(five, 'ARMS', {'small': (dict(width=.125, **five.SILU), dict(epochs=1, size=16, crops=(8, 16), bs=100))})
    monkeypatch.setattr(sys, 'argv', ['five_minutes.py', '--folder', str(tmp_path/'parts'), '--out', str(tmp_path/'f.csv')])
    five.main(); five.main()
    (row,) = csv.DictReader(l for l in open(tmp_path/'f.csv') if l[0] != '#')
    train, val = ({f.name for f in (tmp_path/'parts'/s).rglob('*.JPEG')} for s in ('train', 'val'))
    assert (row['n_train'], row['n_valid']) == ('640', '160') == (str(len(train)), str(len(val))) and not train & val and 0 < float(row['accuracy']) < 1
    assert row['network'] == "{'width': 0.125, 'act': 'SiLU'}"


def test_optimizers_since_2019_in_two_sittings(script, tmp_path, data_home, monkeypatch):
    for k, v in small_env(data_home).items(): monkeypatch.setenv(k, v)
    since = script('since_2019')
    for k, v in dict(OUT=tmp_path/'s.csv', SIZE=16, N_TRAIN=128, EPOCHS=1, NFS=[8]).items(): monkeypatch.setattr(since, k, v)
    def rows(*args):
        monkeypatch.setattr(sys, 'argv', ['since_2019.py', '--arms', 'schedule-free', 'Muon', '--seeds', '0', *args])
        since.main()
        return since.written()
    assert len(rows('--most', '3')) == 3
    whole = rows()
    assert rows() == whole
    for arm in ('schedule-free', 'Muon'):
        tried = {r['rate']: float(r['accuracy']) for r in whole if (r['kind'], r['arm']) == ('rate', arm)}
        (final,) = (r for r in whole if (r['kind'], r['arm']) == ('final', arm))
        best = max(tried, key=tried.get)
        assert len(tried) >= 5 and final['rate'] == best
        assert min(tried, key=float) != best != max(tried, key=float)
