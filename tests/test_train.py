"""`exp-train` as a person meets it: the table, the mistakes, Ctrl-C, a killed run, the folder that is left."""
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, small_env, wants_sigint
from test_recipes import folder

from exp import recipes as R
from exp import runs as U
from exp import train as T
from exp.callbacks import Callback
from exp.datasets import DataError

MODULE = '-m', 'exp.train'
QUICK = ['--recipe', 'lesson', '--width', '.25', '--size', '16', '--epochs', '1', '--device', 'cpu']
AGAIN = ['--resume', '--log-dir', 'r', '--device', 'cpu']


def run(*args, home, program=MODULE, **env):
    return subprocess.run([sys.executable, *program, *map(str, args)], cwd=ROOT, env={**small_env(home), 'PYTHONPATH': str(ROOT), **env}, capture_output=True, text=True, timeout=300)


def start(*args, home, **kw):
    return subprocess.Popen([sys.executable, *MODULE, '--data', 'sample', *map(str, args)], cwd=ROOT, env=small_env(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


def first_row(p):
    for line in p.stdout:
        if line.split()[:1] == ['0']: return
    raise AssertionError(p.stderr.read())


def settings(*args): return T.settle(T.get_parser().parse_args(['--device', 'cpu', *map(str, args)]))


@pytest.fixture
def pets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return folder(tmp_path/'pets', n=8)


def test_trains_and_says_on_what(data_home, tmp_path):
    r = run('--data', 'sample', '--size', 32, '--epochs', 1, '--json', tmp_path/'r.json', '--log-dir', tmp_path/'run', home=data_home)
    assert r.returncode == 0, r.stderr
    first, second, *_, model, last = r.stdout.strip().splitlines()
    assert 'sample (drawn)' in first and '800 images' in first and re.search('recipe cpu(16)?, arch xresnet18, width 0.5, crops ', second)
    assert re.fullmatch(r'accuracy 0\.\d{3} · sample \(drawn\) · 300 validation images · 1 epochs · 32 px · seed 42 · \S+ · \d+ s', last)
    j = json.loads((tmp_path/'r.json').read_text())
    assert f"{j['accuracy']:.3f}" in last and j['rows'][-1]['valid_accuracy'] == j['accuracy'] and len(j['classes']) == 10
    assert j['recipe'] == R.get_recipe(device=j['device'])['recipe'] and j['opt'] == R.get_recipe(device=j['device'])['opt'] and j['bs'] == 16
    assert '\r' not in r.stdout + r.stderr, 'carriage returns fill a log'
    from exp.predict import main as predict
    pictures = sorted((data_home/'data/drawn-shapes-160/val').glob('*/*.JPEG'))[::60]
    assert f'exp-predict {j["model"]}' in model and predict([j['model'], *map(str, pictures)]) == 0


def test_trains_where_the_terminal_knows_ascii_only(data_home, tmp_path):
    r = run('--data', 'sample', *QUICK, '--validate', 2, '--log-dir', tmp_path/'run', home=data_home, PYTHONIOENCODING='ascii')
    assert r.returncode == 0 and 'accuracy 0.' in r.stdout, r.stderr


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize('args', [('--size', '0'), ('--epochs', '0'), ('--nonsense',), ('--lr', 'much'), ('--device', 'abacus'), ('--data', '/nowhere/at/all'),
                                  ('--bs', '1'), ('--json', '/nowhere/at/all/x.json'), ('--crops', 'big'), ('--crops', '4-9'), ('--recipe', 'cake'),
                                  ('--opt', 'magic'), ('--ema', '1'), ('--runs', '0'), ('--log-dir', '/proc/nowhere'), ('--wd', '-1'), ('--valid-pct', '1'),
                                  ('--seed', '-1'), ('--seed', str(2**32)), ('--recipe', 'lesson', '--crops', '48-80')])
def test_a_mistake_is_one_line_and_exit_2(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for where in (['--log-dir', 'run'], []):                            # nor is there a runs/ where nothing is to be put
        try: status = T.main(['--data', 'sample', *where, *args])
        except SystemExit as e: status = e.code
        said = capsys.readouterr().err
        assert status == 2 and said.startswith('exp-train: ') and len(said.strip().splitlines()) == 1, said
        assert not [*tmp_path.iterdir()]


def test_faults_of_a_folder(tmp_path, data_home, capsys):
    def said(d):
        status, err = T.main(['--data', str(d), '--log-dir', str(tmp_path/'run')]), capsys.readouterr().err
        assert status == 2 and len(err.strip().splitlines()) == 1 and 'Traceback' not in err
        return err
    (tmp_path/'a').mkdir()
    assert 'no folder' in said(tmp_path/'a') and 'no pictures' in said(folder(tmp_path/'b', n=0))
    assert 'one class only (a)' in said(folder(tmp_path/'c', train=('a',), val=('a',)))
    assert "label 'z'" in said(folder(tmp_path/'d', val=('a', 'z')))
    bad = folder(tmp_path/'e')
    (bad/'train/a/0.png').write_text('no picture')
    assert 'train/a/0.png' in said(bad)
    r = run('--data', bad, '--log-dir', tmp_path/'run', home=data_home)                  # and once in a process of its own
    assert r.returncode == 2 and 'train/a/0.png' in r.stderr and len(r.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='root reads everything')
def test_an_unreadable_folder(tmp_path, data_home):
    os.chmod(folder(tmp_path)/'train/a', 0)
    r = run('--data', tmp_path, '--log-dir', tmp_path/'run', home=data_home)
    os.chmod(tmp_path/'train/a', 0o755)
    assert r.returncode == 2 and 'cannot be read' in r.stderr


def test_mistakes_that_show_before_the_training(pets, tmp_path, capsys):
    (tmp_path/'dir').mkdir()
    assert T.main(['--data', 'pets', '--json', 'dir', '--log-dir', 'r']) == 2 and 'Is a directory' in capsys.readouterr().err and not (tmp_path/'r').exists()
    (tmp_path/'r').mkdir()
    for text in ('{"data": ', '[]', '{}', '3'):
        (tmp_path/'r/config.json').write_text(text)
        assert T.main(AGAIN) == 2 and 'r/config.json: ' in capsys.readouterr().err


@pytest.mark.parametrize('bs, other', [(5, 6), (3, 4)])                                            # 16 = 5·3 + 1
def test_a_last_batch_of_one_is_refused_before_the_training_and_the_size_named_instead_fits(pets, capsys, bs, other):
    assert T.main([*QUICK, '--data', 'pets', '--bs', str(bs), '--log-dir', 'r']) == 2 and f'--bs {other} does not' in capsys.readouterr().err
    assert T.main([*QUICK, '--data', 'pets', '--bs', str(other), '--log-dir', 'r']) == 0


def test_no_last_batch_of_one_where_the_size_is_free():
    def bs(n): return T.batch_size({'bs': 64, 'bs_given': False}, n)
    assert all(n <= bs(n) or n % bs(n) != 1 for n in range(2, 4000)) and (bs(800), bs(33), bs(9469)) == (16, 15, 64)


# ---------------------------------------------------------------- broken off

def test_ctrl_c_tells_how_far_it_got_and_how_to_go_on(data_home, tmp_path):
    p = start('--recipe', 'lesson', '--size', 32, '--epochs', 500, '--log-dir', tmp_path/'run', home=data_home, preexec_fn=wants_sigint)
    first_row(p)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=200)
    assert p.returncode == 130 and re.search(r'interrupted after \d+ epochs, accuracy 0\.\d+ after epoch \d+; exp-train --resume --log-dir \S+run goes on', err)
    assert 'Traceback' not in err


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(data_home, tmp_path, capsys):
    args = '--recipe', 'lesson', '--width', .5, '--tfms', 'crop', '--crops', '16-20', '--size', 24, '--epochs', 2, '--ema', .9, '--mixup', .2, '--cutmix', 1, '--validate', 1, '--opt', 'ranger'
    whole = run('--data', 'sample', *args, '--log-dir', tmp_path/'whole', '--json', tmp_path/'whole.json', home=data_home)
    assert whole.returncode == 0, whole.stderr
    p = start(*args, '--log-dir', tmp_path/'killed', home=data_home)
    first_row(p)
    while not list((tmp_path/'killed').glob('seed-42/checkpoints/*.pt')): time.sleep(.05)
    p.kill()
    p.communicate()
    assert T.main(['--resume', '--log-dir', str(tmp_path/'killed'), '--lr', '.5']) == 2 and 'was begun with lr 0.008, and 0.5 is asked for' in capsys.readouterr().err
    assert T.main(['--data', 'sample', '--log-dir', str(tmp_path/'killed')]) == 2 and 'holds a run already: --resume' in capsys.readouterr().err
    r = run('--resume', '--log-dir', tmp_path/'killed', '--json', tmp_path/'killed.json', home=data_home)
    assert r.returncode == 0, r.stderr
    a, b = (json.loads((tmp_path/f'{n}.json').read_text()) for n in ('whole', 'killed'))
    for row in (*a['rows'], *b['rows']): del row['time']
    assert a['rows'] == b['rows'] and len(b['rows']) == 2 and a['accuracy'] == b['accuracy']
    w, k = (torch.load(f, weights_only=True) for f in (a['model'], b['model']))
    def tensors(o):
        if torch.is_tensor(o): return [o]
        return [t for v in (o.values() if isinstance(o, dict) else o if isinstance(o, (list, tuple)) else ()) for t in tensors(v)]
    assert len(tensors(w)) > 20 and all(x.equal(y) for x, y in zip(tensors(w), tensors(k), strict=True))


def test_resume_with_another_seed_is_refused_also_where_it_is_the_default(pets, capsys):
    assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'r', '--seed', '7']) == 0
    assert T.main([*AGAIN, '--seed', '42']) == 2 and 'was begun with seed 7, and 42 is asked for' in capsys.readouterr().err
    assert T.main(AGAIN) == 0


def test_interrupted_in_a_later_seed_there_is_something_to_go_on_with():
    class Done: rows = []
    a = type('a', (), {'log_dir': 'my runs'})
    assert 'goes on' not in T.how_far(a, []) + T.how_far(a, [Done]) and "--resume --log-dir 'my runs' goes on" in T.how_far(a, [Done, Done])


def test_each_epoch_once_and_the_seconds_of_all_sittings(pets, tmp_path, monkeypatch):
    class Slow(Callback):
        _order = 1000
        def begin_epoch(self, run): time.sleep(.4)
        def after_epoch(self, run):
            if run.epoch == 1 and stop: raise KeyboardInterrupt
    make, stop = T.get_cbs, True
    monkeypatch.setattr(T, 'get_cbs', lambda *args: [*make(*args), Slow()])
    assert T.main([*QUICK, '--epochs', '3', '--data', 'pets', '--log-dir', 'r']) == 130
    stop = False
    assert T.main([*AGAIN, '--json', 'r.json']) == 0
    r = json.loads((tmp_path/'r.json').read_text())
    assert len(r['rows']) == 3 and r['seconds'] > sum(row['time'] for row in r['rows']) > 1.2
    for f in (tmp_path/'r/seed-42/checkpoints').glob('*.pt'): f.unlink()
    (tmp_path/'r/seed-42/result.json').unlink()
    assert T.main(AGAIN) == 0
    assert [l.split(',')[0] for l in (tmp_path/'r/seed-42/history.csv').read_text().splitlines()] == ['epoch', '0', '1', '2']


def test_a_kill_before_the_first_batch_leaves_the_settings_and_a_mistake_nothing(pets, tmp_path, monkeypatch, capsys):
    seen = []
    def stop(*args):
        seen.append(json.loads((tmp_path/'r/config.json').read_text())['epochs'])
        raise DataError('a mistake')
    with monkeypatch.context() as m:
        m.setattr(T, 'make_items', stop)
        assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'r']) == 2
    assert seen == [1] and not (tmp_path/'r').exists()
    capsys.readouterr()
    assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'r', '--resume']) == 0 and 'there is no run in r yet: this begins one' in capsys.readouterr().err


def test_nobody_reads_on(data_home, tmp_path):
    p = start('--recipe', 'lesson', '--size', 16, '--width', .25, '--epochs', 300, '--log-dir', tmp_path/'run', home=data_home)
    p.stdout.readline()
    p.stdout.close()
    err = p.stderr.read()
    p.wait(400)
    assert p.returncode == 141 and 'Traceback' not in err


# ---------------------------------------------------------------- the folder, and the data of a run

def test_a_run_goes_on_with_the_data_that_was_found(pets, data_home, tmp_path, monkeypatch, capsys):
    "Nothing named, and only the sample to be had. Tomorrow Imagenette may be."
    drawn = data_home/'data/drawn-shapes-160', T.DRAWN
    with monkeypatch.context() as m:
        m.setattr(T, 'find_data', lambda name: drawn)
        assert T.main([*QUICK, '--log-dir', 'r']) == 0
    file = tmp_path/'r/config.json'
    assert json.loads(file.read_text())['data'] == 'sample'
    with monkeypatch.context() as m:
        m.setattr(T, 'find_data', lambda name: drawn if name == 'sample' else (pets, 'imagenette2-160'))
        assert T.main(AGAIN) == 0 and 'was trained' not in capsys.readouterr().err
        old = json.dumps({**json.loads(file.read_text()), 'data': None})                          # as an older exp-train wrote it
        file.write_text(old)
        assert T.main(AGAIN) == 2 and 'refused' in capsys.readouterr().err             # the checkpoint's, for other classes
        file.write_text(old)
        assert T.main([*AGAIN, '--data', 'sample']) == 0


def test_a_folder_is_the_same_from_everywhere_and_may_move(pets, tmp_path, monkeypatch, capsys):
    assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'r']) == 0
    def lose(): (tmp_path/'r/seed-42/result.json').unlink()
    lose()
    (tmp_path/'away').mkdir()
    monkeypatch.chdir(tmp_path/'away')
    again = ['--resume', '--log-dir', '../r', '--device', 'cpu']
    assert T.main(again) == 0 and T.main([*again, '--data', '../pets']) == 0
    (tmp_path/'r/seed-42/model.pt').unlink()                                                   # a lost model is made again
    assert T.main([*again, '--data', str(pets)]) == 0 and (tmp_path/'r/seed-42/model.pt').exists()
    pets.rename(tmp_path/'away/pets')
    lose()
    folder(tmp_path/'others', n=40)
    capsys.readouterr()
    assert T.main([*again, '--data', '../others']) == 2 and 'checkpoints' in capsys.readouterr().err     # wrong data, and they do not stay
    assert T.main([*again, '--data', 'pets']) == 0
    assert T.main([*again, '--data', '../others']) == 2 and 'was begun with data' in capsys.readouterr().err


def test_a_share_for_validation_stays_with_the_run(pets, tmp_path, capsys):
    args = [*QUICK, '--data', 'pets/train', '--log-dir', 'r', '--runs', '2', '--json', 'r.json']
    assert T.main(args) == 2 and '--valid-pct' in capsys.readouterr().err
    assert T.main([*args, '--valid-pct', '.3']) == 0
    a, b = json.loads((tmp_path/'r.json').read_text())['each']
    assert a['n_valid'] == b['n_valid'] and a['n_train'] + a['n_valid'] == 16                  # two seeds, one split
    (tmp_path/'r/seed-43/result.json').unlink()
    assert T.main(AGAIN) == 0 and T.main([*AGAIN, '--valid-pct', '.5']) == 2


def test_resume_takes_the_newest_run_whatever_its_name(pets, tmp_path):
    for age, name, epochs in ((9, 'mine', 3), (1, '20261125-180000', 4)):
        c = settings('--recipe', 'cpu', '--epochs', epochs, '--log-dir', f'runs/{name}')
        f = tmp_path/'runs'/name/'config.json'
        f.parent.mkdir(parents=True)
        U.keep(f, c)
        os.utime(f, (time.time() - age,)*2)
    a = T.get_parser().parse_args(['--resume', '--device', 'cpu'])
    assert T.settle(a)['epochs'] == 4 and a.log_dir == 'runs/20261125-180000'


def test_a_run_begun_before_an_option_existed_goes_on(tmp_path):
    c = settings('--recipe', 'cpu', '--log-dir', tmp_path)
    U.keep(tmp_path/'config.json', {k: v for k, v in c.items() if k not in ('cutmix', 'validate', 'valid_pct')})
    again = ['--resume', '--log-dir', tmp_path]
    assert settings(*again) == c and settings(*again, '--cutmix', '0')['validate'] == 2
    with pytest.raises(DataError, match='was begun with cutmix 0.0, and 1.0 is asked for'): settings(*again, '--cutmix', '1')


def test_no_bf16_on_a_processor_is_the_recipe_cpu_and_every_setting_an_option(tmp_path):
    assert settings('--no-bf16', '--log-dir', tmp_path/'r')['recipe'] == 'cpu'
    options = vars(T.get_parser().parse_args([]))
    assert all(k in options and options[k] is None for k in R.RECIPES['cpu'])


def test_two_commands_have_two_folders(pets, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(time, 'strftime', lambda f: '20261130-113051')
        assert [U.new_folder() for _ in range(3)] == ['runs/20261130-113051' + s for s in ('', '-2', '-3')]
    args = [*QUICK, '--data', str(pets), '--log-dir', str(tmp_path/'r')]
    with U.only_here(tmp_path/'r'): p = run(*args, home=tmp_path)
    assert p.returncode == 2 and 'another exp-train is at work there' in p.stderr and not (tmp_path/'r').exists()
    assert T.main(args) == 0 and not (tmp_path/'r/.lock').exists()


@pytest.mark.parametrize('wrong', [dict(arch='xresnet19'), dict(epochs='many'), dict(crops=5), dict(seed=None), dict(runs=-1), dict(lr=[1]), dict(recipe=7), dict(bf16='no'),
                                   dict(valid_pct=2), dict(data=3), dict(width={})], ids=str)
def test_settings_that_cannot_be_are_a_sentence(wrong, tmp_path, capsys):
    c = settings('--recipe', 'cpu', '--data', 'sample', '--log-dir', tmp_path/'r')
    U.keep(tmp_path/'r/config.json', {**c, **wrong})
    assert T.main(['--resume', '--log-dir', str(tmp_path/'r'), '--device', 'cpu']) == 2
    said = capsys.readouterr().err
    assert 'r/config.json' in said and [*wrong][0].replace('_', '-') in said.replace('_', '-') and len(said.splitlines()) == 1


def test_a_result_of_other_settings_is_nobodys(pets, tmp_path, capsys):
    "config.json is gone: a command with other settings took the folder, and printed the old accuracy."
    args = ['--data', 'pets', '--log-dir', 'r']
    assert T.main([*QUICK, *args]) == 0
    (tmp_path/'r/config.json').unlink()
    assert T.main([*QUICK, *args, '--epochs', '2']) == 2 and 'holds a run' in capsys.readouterr().err
    assert T.main([*QUICK, *args, '--epochs', '2', '--resume']) == 2 and 'epochs' in capsys.readouterr().err        # the checkpoint knows
    folder(tmp_path/'other/pets', n=8)
    result = tmp_path/'r/seed-42/result.json'
    whole = result.read_text()
    for more in (['--bs', '4'], ['--mixup', '.4'], ['--smooth', '.2'], ['--data', 'other/pets'], ['--tfms', 'flip']):
        for text in (whole, ''):                                                                  # and without a result the checkpoint knows
            result.write_text(text)
            status = T.main([*QUICK, *args, *more, '--resume'])
            assert status == 2 or more[0] == '--data', more                                       # copied data are the same data
            if not status: assert json.loads(result.read_text())['source'] == str(tmp_path/'other/pets')
        [f.unlink() for f in (tmp_path/'r').glob('config.json')]
    for text in ('[]', '{}', '{"accuracy": "x"}', '3', '['*10**5):
        result.write_text(text)
        assert T.main([*QUICK, *args, '--resume']) == 0 and json.loads((tmp_path/'r/seed-42/result.json').read_text())['accuracy'] >= 0


def odd_values(): return None, -1, 2, 10**400, math.inf, math.nan, 'x', '../../x', '', True, [], [1, [2]], {}, {'a': 1}


def test_no_crafted_settings_or_result_end_in_a_traceback(pets, tmp_path, capsys):
    "Each field of both files with each odd value: a mistake, or a run. `train_one` is not reached but for a result that is none."
    assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'r']) == 0
    f, count = tmp_path/'r/config.json', []
    for file in (f, tmp_path/'r/seed-42/result.json'):
        whole = file.read_text()
        d = json.loads(whole)
        texts = [json.dumps({**d, k: v}) for k in [*d, 'std', 'fault', 'each', 'split_seed'] for v in odd_values()]
        for text in [*texts, '['*10**5, '{"a": '*10**5, '9'*5000, '\0', '\ufeff{}', '']:
            file.write_text(text)
            if file == f:
                try: T.check(U.begun_with(f), f)
                except DataError as e: count.append(str(e))
            elif r := U.kept(file.parent, json.loads(f.read_text())): assert T.result_line(r) and T.summarise([r, r])
        file.write_text(whole)
    assert len(count) > 250 and all('config.json' in c for c in count)
    for file in (f, tmp_path/'r/seed-42/result.json'):
        file.unlink()
        os.mkfifo(file)                                                                           # opening it would wait for ever
    assert U.kept(tmp_path/'r/seed-42', {'data': 'pets'}) is None and T.main(AGAIN) == 2


@pytest.mark.parametrize('spoil', [lambda f: f.write_text(''), lambda f: f.unlink(), lambda f: f.write_bytes(b'epoch\0\xff\n\n'), lambda f: f.write_text(f.read_text()[:60]),
                                   lambda f: f.write_text(f.read_text().replace('\n0,', '\n\n0,')), lambda f: f.write_bytes(f.read_text().encode('utf-16'))])
def test_the_history_is_written_anew_from_the_checkpoint(spoil, pets, tmp_path, monkeypatch):
    args = ['--data', 'pets', '--log-dir', 'r', '--epochs', '3']
    class Stop(Callback):
        _order = 2000
        def after_epoch(self, run):
            if run.epoch == 1: raise KeyboardInterrupt
    make, file = T.get_cbs, tmp_path/'r/seed-42/history.csv'
    monkeypatch.setattr(T, 'get_cbs', lambda *args: [*make(*args), Stop()])
    assert T.main([*QUICK, *args]) == 130
    before = file.read_text().splitlines()
    spoil(file)
    left = [tmp_path/'r'/n for n in ('.config.json.01234567.exp-tmp', 'seed-42/.model.pt.01234567.exp-tmp', 'seed-42/checkpoints/.x.pt.01234567.exp-tmp')]
    for f in left: f.touch()                                                                      # and what a kill left goes
    monkeypatch.setattr(T, 'get_cbs', make)
    assert T.main([*QUICK, *args, '--lr', '.001', '--resume']) == 2                               # refused, and nothing of it
    assert T.main(AGAIN) == 0
    lines = file.read_text().splitlines()
    assert lines[:3] == before and len(lines) == 4 and not any(f.exists() for f in left)


def test_a_full_disk_behind_the_output_costs_no_training(data_home, tmp_path):
    with open('/dev/full', 'w') as full:
        p = subprocess.run([sys.executable, *MODULE, '--data', 'sample', *QUICK, '--log-dir', tmp_path/'r'], cwd=ROOT, env=small_env(data_home), stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert p.returncode == 1 and len(p.stderr.splitlines()) == 1 and (tmp_path/'r/seed-42/result.json').exists(), p.stderr


def test_names_from_outside_stay_on_one_harmless_line(pets, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(tmp_path))
    pets.rename(tmp_path/'p\x1b[31m\ne')
    (tmp_path/'p\x1b[31m\ne/train/stray\x1b.png').write_bytes(next((tmp_path/'p\x1b[31m\ne').rglob('*.png')).read_bytes())
    assert T.main([*QUICK, '--data=~/p\x1b[31m\ne', '--log-dir=-x', '--json=~/r.json']) == 0
    assert T.main([*QUICK, '--data', '\x1b[31mnowhere', '--log-dir', 'y']) == 2
    out, err = capsys.readouterr()
    assert '\x1b' not in out + err and len(err.splitlines()) == 2 and (tmp_path/'-x/seed-42/model.pt').exists() and (tmp_path/'r.json').exists()
    assert f'exp-predict {tmp_path}/-x/' in out                                                   # to be copied, and no option


def test_help_on_any_terminal(tmp_path):
    p = run('--help', home=tmp_path, PYTHONIOENCODING='ascii')
    assert p.returncode == 0 and '--mixup' in p.stdout and not p.stderr


@pytest.mark.parametrize('e', [MemoryError(), RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.'), ZeroDivisionError()])
def test_no_status_that_means_trained_where_it_was_not(pets, monkeypatch, capsys, e):
    "1 is 'trained, but', and it is what Python itself ends with."
    def stop(*args): raise e
    monkeypatch.setattr(T, 'make_items', stop)
    assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'r']) == 4
    assert ('Traceback' in capsys.readouterr().err) == isinstance(e, ZeroDivisionError)


# ---------------------------------------------------------------- at the end

def test_a_disk_that_is_full_at_the_end_does_not_cost_the_result(pets, tmp_path, monkeypatch, capsys):
    def full(learn, f): raise OSError(28, 'No space left on device', str(f))
    with monkeypatch.context() as m:
        m.setattr(T, 'export', full)
        assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'r', '--json', 'r.json']) == 1
    out, err = capsys.readouterr()
    assert 'No space left' in err and 'accuracy ' in out and 'exp-predict' not in out and json.loads((tmp_path/'r.json').read_text())['model'] is None
    assert T.main(AGAIN) == 0 and (tmp_path/'r/seed-42/model.pt').exists()                        # room again


@pytest.mark.parametrize('runs', [1, 2])
def test_a_loss_that_is_no_number_is_said_and_its_model_not_kept(pets, tmp_path, capsys, runs):
    "It was 'accuracy 0.500', exit status 0, and use this model."
    assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'r', '--opt', 'sgd', '--lr', '1000', '--epochs', '4', '--bs', '2', '--runs', str(runs)]) == 1
    out, err = capsys.readouterr()
    assert 'no number' in err and 'exp-predict' not in out and not [*(tmp_path/'r').rglob('model.pt')]


def test_no_empty_json_is_left_behind(tmp_path):
    args = [*QUICK, '--data', str(tmp_path/'nowhere'), '--log-dir', str(tmp_path/'r'), '--json', str(tmp_path/'r.json')]
    assert T.main(args) == 2 and not (tmp_path/'r.json').exists()
    (tmp_path/'r.json').touch()
    assert T.main(args) == 2 and (tmp_path/'r.json').exists()


def test_what_is_to_be_copied_is_quoted_and_a_moved_run_knows_where_it_is(pets, tmp_path, capsys):
    assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'my runs/a b']) == 0 and "exp-predict 'my runs/a b/seed-42/model.pt' PICTURE" in capsys.readouterr().out
    (tmp_path/'my runs/a b').rename(tmp_path/'r')
    assert T.main(AGAIN) == 0 and 'exp-predict r/seed-42/model.pt PICTURE' in capsys.readouterr().out


def test_half_a_result_is_none_and_a_whole_one_is_said_again(pets, tmp_path, capsys):
    assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'r']) == 0
    f, model = tmp_path/'r/seed-42/result.json', tmp_path/'r/seed-42/model.pt'
    f.write_text(f.read_text()[:200])
    assert T.main(AGAIN) == 0 and json.loads(f.read_text())['data'] == 'pets'
    capsys.readouterr()
    assert T.main(AGAIN) == 0 and 'training on' not in capsys.readouterr().out, 'nothing is left to do'
    model.write_bytes(b'')
    assert T.main(AGAIN) == 0 and model.stat().st_size


def test_mean_and_deviation_of_several_runs():
    rows = [dict(accuracy=a, seconds=10., seed=5 + i, data='d', n_valid=9, epochs=2, size=8, device='cpu') for i, a in enumerate((.5, .7, .6))]
    r = T.summarise(rows)
    assert (r['accuracy'], r['std'], r['seconds']) == (pytest.approx(.6), pytest.approx(.1), 30.)
    assert T.result_line(r) == 'accuracy 0.600 ± 0.100 (3 runs, mean and standard deviation) · d · 9 validation images · 2 epochs · 8 px · seeds 5–7 · cpu · 30 s'


def test_a_result_is_json_whatever_the_numbers(tmp_path):
    U.keep(tmp_path/'r.json', {'a': [1., math.nan, math.inf], 'b': {'c': -math.inf}})
    assert json.loads((tmp_path/'r.json').read_text(), parse_constant=pytest.fail) == {'a': [1., None, None], 'b': {'c': None}}


# ---------------------------------------------------------------- two processes

TWO = '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'


def test_two_processes_one_result(data_home, tmp_path):
    r = run('--data', 'sample', *QUICK, '--log-dir', tmp_path/'run', '--json', tmp_path/'r.json', program=(*TWO, *MODULE), home=data_home)
    assert r.returncode == 0, r.stderr
    assert r.stdout.count('accuracy 0.') == 1 and r.stdout.count('training on') == 1
    j = json.loads((tmp_path/'r.json').read_text())
    assert j['processes'] == 2 and 0 <= j['accuracy'] <= 1 and j['n_valid'] == 300 and len(list((tmp_path/'run').rglob('*.pt'))) == 2       # a checkpoint, a model


def test_a_mistake_that_only_the_second_process_has_is_told(data_home, tmp_path):
    "On a machine without the data, say."
    (tmp_path/'one.py').write_text("""
import os, sys
from exp import train as T
if os.environ['RANK'] == '1':
    def find_data(name): raise T.DataError('no data on this machine')
    T.find_data = find_data
status = T.main(sys.argv[1:]); sys.stdout.flush(); sys.stderr.flush(); os._exit(status)
""")
    r = run('--data', 'sample', *QUICK, '--log-dir', tmp_path/'run', program=(*TWO, str(tmp_path/'one.py')), home=data_home)
    assert r.returncode and r.stderr.count('exp-train: process 1: no data on this machine') == 1, r.stderr
