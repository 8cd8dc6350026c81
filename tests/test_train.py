"""`exp-train` as a person meets it: the table, the mistakes, Ctrl-C, a killed run; and the parts of its recipes beside independent references."""
import copy
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
import torch.nn.functional as F
from conftest import ROOT, small_env, wants_sigint
from PIL import Image

from exp import train_imagenette as T
from exp.callbacks import Callback, DataBunch, Dataset, accuracy, get_dls
from exp.datasets import DataError
from exp.export_models import export
from exp.fast_batches import InMemory, fast_dl, in_memory
from exp.learner import Learner
from exp.mixup import Mixer
from exp.pictures import any_rgb


def run(*args, home, **env):
    return subprocess.run([sys.executable, '-m', 'exp.train_imagenette', *map(str, args)], cwd=ROOT, env={**small_env(home), **env}, capture_output=True,
                          text=True, timeout=300)


def folder(tmp_path, train=('a', 'b'), val=('a', 'b'), n=4):
    for s, cs in (('train', train), ('val', val)):
        (tmp_path/s).mkdir(exist_ok=True)
        for c in cs:
            (tmp_path/s/c).mkdir()
            for i in range(n): Image.new('RGB', (20, 30), (i*40, 0, 99)).save(tmp_path/s/c/f'{i}.png')
    return tmp_path


def test_trains_and_says_on_what(data_home, tmp_path):
    r = run('--data', 'sample', '--size', 32, '--epochs', 1, '--json', tmp_path/'r.json', '--log-dir', tmp_path/'run', home=data_home)
    assert r.returncode == 0, r.stderr
    first, second, *_, model, last = r.stdout.strip().splitlines()
    assert 'sample (drawn)' in first and '800 images' in first and re.search('recipe cpu(16)?, arch xresnet18, width 0.5, crops ', second)
    assert re.fullmatch(r'accuracy 0\.\d{3} · sample \(drawn\) · 300 validation images · 1 epochs · 32 px · seed 42 · \S+ · \d+ s', last)
    j = json.loads((tmp_path/'r.json').read_text())
    assert f"{j['accuracy']:.3f}" in last and j['rows'][-1]['valid_accuracy'] == j['accuracy'] and len(j['classes']) == 10
    assert j['recipe'] == T.get_recipe(device=j['device'])['recipe'] and j['opt'] == 'adam' and j['bs'] == 16
    assert '\r' not in r.stdout + r.stderr, 'carriage returns fill a log'
    from exp.predict import main as predict
    pictures = sorted((data_home/'data/drawn-shapes-160/val').glob('*/*.JPEG'))[::60]
    assert f'exp-predict {j["model"]}' in model and predict([j['model'], *map(str, pictures)]) == 0


def test_same_seed_same_weights(data_home, monkeypatch):
    from exp.datasets import URLs, untar_data
    data = in_memory(T.get_items(untar_data(URLs.SAMPLE), 16)).to_databunch(100, seed=3, make_dl=fast_dl)
    ws = []
    for seed in (1, 1, 2):
        data.train_dl.epoch = 0                                # the same order of pictures for all three
        ws.append(torch.cat([p.flatten() for p in T.get_training(data, 'lesson', 'cpu', seed).fit(1).model.parameters()]))
    assert ws[0].equal(ws[1]) and not ws[0].equal(ws[2])


@pytest.mark.parametrize('args', [('--size', '0'), ('--epochs', '0'), ('--nonsense',), ('--lr', 'much'), ('--device', 'abacus'), ('--data', '/nowhere/at/all'),
                                  ('--bs', '1'), ('--json', '/nowhere/at/all/x.json'), ('--crops', 'big'), ('--crops', '4-9'), ('--recipe', 'cake'),
                                  ('--opt', 'magic'), ('--ema', '1'), ('--runs', '0'), ('--log-dir', '/proc/nowhere'), ('--wd', '-1'),
                                  ('--recipe', 'lesson', '--crops', '48-80')])
def test_a_mistake_is_one_line_and_exit_2(args, data_home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('FASTAI_HOME', str(data_home))
    try: status = T.main(['--data', 'sample', '--log-dir', str(tmp_path/'run'), *args])
    except SystemExit as e: status = e.code
    said = capsys.readouterr().err
    assert not (tmp_path/'run').exists()
    assert status == 2 and said.startswith('exp-train: ') and len(said.strip().splitlines()) == 1, said


def test_faults_of_a_folder(tmp_path, data_home, capsys):
    def said(d):
        status, err = T.main(['--data', str(d), '--log-dir', str(tmp_path/'run')]), capsys.readouterr().err
        assert status == 2 and len(err.strip().splitlines()) == 1 and 'Traceback' not in err
        return err
    for n in 'abcdef': (tmp_path/n).mkdir()
    assert 'no folder train/' in said(tmp_path/'a')
    assert 'no pictures' in said(folder(tmp_path/'b', n=0))
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


def test_an_unreadable_folder_as_root_too(tmp_path, monkeypatch):
    def scandir(p): raise PermissionError(13, 'Permission denied')
    folder(tmp_path)
    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(DataError, match='cannot be read: Permission denied'): T.get_items(tmp_path, 16)


def test_dot_folders_are_nobodys_class(tmp_path):
    folder(tmp_path, train=('a', 'b', '.ipynb_checkpoints'), val=('a', 'b'))
    (tmp_path/'train/a/.DS_Store').touch(); (tmp_path/'train/a/notes.txt').touch()
    ll = T.get_items(tmp_path, 16)
    assert ll.train.proc_y.vocab == ['a', 'b'] and len(ll.train) == len(ll.valid) == 8


def test_goes_through_the_data_block(tmp_path, data_home):
    "Uprightness, pixels and the rest are tested there; here, that the command's pictures are those, whole sets in memory or not."
    from exp import data_block as D
    items = T.get_items(folder(tmp_path), 16)
    assert isinstance(items, D.SplitData) and items.train.x.tfms[0] is any_rgb and items.train.x.tfms[1].size == (16, 16)
    kept, read = (in_memory(items, m).to_databunch(4, seed=0, num_workers=0, make_dl=fast_dl) for m in (1e9, 1))
    assert isinstance(kept.train_ds, InMemory) and not isinstance(read.train_ds, InMemory)
    for (a, ya), (b, yb) in zip(kept.train_dl, read.train_dl, strict=True): assert a.equal(b) and ya.equal(yb) and a.dtype == torch.uint8
    for name in ('find_images', 'load_image', 'ImageFiles', 'load_all', 'get_data'): assert not hasattr(T, name), f'{name}: the old way'


def test_a_broken_picture_of_a_large_set_is_one_line_too(tmp_path):
    "Too large to keep in memory: the error comes from a worker process, with its file and without its traceback."
    from exp import data_block as D
    d = folder(tmp_path)
    (d/'train/b/2.png').write_text('no picture')
    data = T.get_items(d, 16).to_databunch(4, seed=0, num_workers=1, make_dl=fast_dl)
    with pytest.raises(DataError) as e: list(data.train_dl)
    assert str(e.value).startswith(str(d/'train/b/2.png')) and len(str(e.value).splitlines()) == 1 and isinstance(data, D.ItemBunch)


def start(*args, home, **kw):
    return subprocess.Popen([sys.executable, '-m', 'exp.train_imagenette', '--data', 'sample', *map(str, args)], cwd=ROOT, env=small_env(home),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


def read_until(p, word):
    for line in p.stdout:
        if word(line): return line
    raise AssertionError(p.stderr.read())


def test_ctrl_c_tells_how_far_it_got_and_how_to_go_on(data_home, tmp_path):
    p = start('--recipe', 'lesson', '--size', 32, '--epochs', 500, '--log-dir', tmp_path/'run', home=data_home, preexec_fn=wants_sigint)
    read_until(p, lambda l: l.split()[:1] == ['0'])            # the row of epoch 0
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=200)
    assert p.returncode == 130 and re.search(r'interrupted after \d+ epochs, accuracy 0\.\d+ after epoch \d+; exp-train --resume --log-dir \S+run goes on', err)
    assert 'Traceback' not in err


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(data_home, tmp_path, capsys):
    args = '--recipe', 'lesson', '--width', .5, '--tfms', 'crop', '--crops', '16-20', '--size', 24, '--epochs', 2, '--ema', .9, '--mixup', .2, '--cutmix', 1, '--validate', 1, '--opt', 'ranger'
    whole = run('--data', 'sample', *args, '--log-dir', tmp_path/'whole', '--json', tmp_path/'whole.json', home=data_home)
    assert whole.returncode == 0, whole.stderr
    p = start(*args, '--log-dir', tmp_path/'killed', home=data_home)
    read_until(p, lambda l: l.split()[:1] == ['0'])
    while not list((tmp_path/'killed').glob('seed-42/checkpoints/*.pt')): time.sleep(.05)
    p.kill(); p.communicate()
    assert T.main(['--resume', '--log-dir', str(tmp_path/'killed'), '--lr', '.5']) == 2 and 'was begun with lr 0.008, and 0.5 is asked for' in capsys.readouterr().err
    assert T.main(['--data', 'sample', '--log-dir', str(tmp_path/'killed')]) == 2 and 'holds a run already: --resume' in capsys.readouterr().err
    r = run('--resume', '--log-dir', tmp_path/'killed', '--json', tmp_path/'killed.json', home=data_home)
    assert r.returncode == 0, r.stderr
    a, b = (json.loads((tmp_path/f'{n}.json').read_text()) for n in ('whole', 'killed'))
    for rows in (a['rows'], b['rows']):
        for row in rows: del row['time']
    assert a['rows'] == b['rows'] and len(b['rows']) == 2 and a['accuracy'] == b['accuracy']
    w, k = (torch.load(f, weights_only=True) for f in (a['model'], b['model']))
    def tensors(o): return [o] if torch.is_tensor(o) else [t for v in (o.values() if isinstance(o, dict) else o) for t in tensors(v)] if isinstance(o, (dict, list, tuple)) else []
    assert len(tensors(w)) > 20 and all(x.equal(y) for x, y in zip(tensors(w), tensors(k), strict=True))


def test_resume_with_another_seed_is_refused_also_where_it_is_the_default(data_home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('FASTAI_HOME', str(data_home))
    small = ['--data', 'sample', '--recipe', 'lesson', '--size', '16', '--width', '.25', '--epochs', '1', '--log-dir', str(tmp_path/'run')]
    assert T.main([*small, '--seed', '7']) == 0
    assert T.main(['--resume', '--seed', '42', '--log-dir', str(tmp_path/'run')]) == 2 and 'was begun with seed 7, and 42 is asked for' in capsys.readouterr().err
    assert T.main(['--resume', '--log-dir', str(tmp_path/'run')]) == 0


def test_interrupted_in_a_later_seed_there_is_something_to_go_on_with():
    class Done: rows = []
    a = type('a', (), {'log_dir': 'runs/x'})
    assert 'goes on' not in T._how_far(a, []) + T._how_far(a, [Done]) and '--resume --log-dir runs/x goes on' in T._how_far(a, [Done, Done])


def test_a_mistake_that_only_the_second_process_has_is_told(data_home, tmp_path):
    "On a machine without the data, say. The first process says that another has ended, and its output why: there used to be none."
    (tmp_path/'one.py').write_text("""
import os, sys
from exp import train_imagenette as T
if os.environ['RANK'] == '1':
    def find_data(name): raise T.DataError('no data on this machine')
    T.find_data = find_data
status = T.main(sys.argv[1:]); sys.stdout.flush(); sys.stderr.flush(); os._exit(status)
""")
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(tmp_path/'one.py'), '--data', 'sample', '--recipe', 'lesson', '--size', '16',
                        '--epochs', '1', '--log-dir', str(tmp_path/'run')],
                       cwd=ROOT, env={**small_env(data_home), 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=240)
    assert r.returncode and r.stderr.count('exp-train: process 1: no data on this machine') == 1, r.stderr


def test_two_processes_one_result(data_home, tmp_path):
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'exp.train_imagenette', '--data', 'sample', '--recipe', 'lesson',
                        '--size', '24', '--epochs', '1', '--log-dir', str(tmp_path/'run'), '--json', str(tmp_path/'r.json')],
                       cwd=ROOT, env={**small_env(data_home), 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=240)
    assert r.returncode == 0, r.stderr
    assert r.stdout.count('accuracy 0.') == 1 and r.stdout.count('training on') == 1
    j = json.loads((tmp_path/'r.json').read_text())
    assert j['processes'] == 2 and 0 <= j['accuracy'] <= 1 and j['n_valid'] == 300 and len(list((tmp_path/'run').rglob('*.pt'))) == 2       # a checkpoint, a model


# ---------------------------------------------------------------- the parts of recipes

def tiny(n=24, size=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8), torch.arange(n) % 3
    return DataBunch(*get_dls(Dataset(x, y), Dataset(x, y), 8, seed=0), c_in=3, c_out=3)


SMALL = dict(arch='lesson', width=.25, epochs=2, size=20, crops=(16, 20), bs=8, opt='momentum', lr=.05, wd=.1, sched='cycle', tfms='crop', mixup=0., cutmix=0., smooth=0., ema=0., validate=1)


def weights(**changes):
    r = T.get_recipe('lesson', **{**SMALL, **changes})
    return torch.cat([p.detach().flatten() for p in T.get_training(tiny(), r, 'cpu', 0).fit(r['epochs']).model.parameters()])


@pytest.fixture(scope='module')
def small_weights():
    assert weights().equal(weights())
    return weights()


@pytest.mark.parametrize('change', [dict(width=.5), dict(arch='xresnet18', width=.125), dict(epochs=1), dict(crops=(20, 20)), dict(opt='adam'), dict(opt='sgd'), dict(opt='lamb'), dict(opt='lars'),
                                    dict(opt='ranger'), dict(lr=.06), dict(wd=.2), dict(sched='flat'), dict(sched='lesson'), dict(tfms='none', crops=None), dict(tfms='flip', crops=None), dict(tfms='strong'),
                                    dict(mixup=.4), dict(cutmix=1.), dict(smooth=.1), dict(ema=.9)], ids=str)
def test_every_setting_changes_the_result(change, small_weights):
    w = weights(**change)
    assert w.shape != small_weights.shape or not w.equal(small_weights) and w.isfinite().all()


def test_mixup_and_cutmix_take_turns():
    mixers = lambda **kw: [cb for cb in T.get_training(tiny(), T.get_recipe('lesson', **{**SMALL, **kw}), 'cpu', 5).cbs if isinstance(cb, Mixer)]
    assert [type(m).__name__ for m in mixers(mixup=.2)] == ['Mixup'] and mixers() == []
    both, = mixers(mixup=.2, cutmix=1.)
    assert [(type(m).__name__, m.alpha) for m in both.mixers] == [('Mixup', .2), ('CutMix', 1.)] and len({id(m.gen) for m in (both, *both.mixers)}) == 1
    assert not weights(mixup=.2, cutmix=1.).equal(weights(mixup=.2)) and not weights(mixup=.2, cutmix=1.).equal(weights(cutmix=1.))


def test_a_result_is_json_whatever_the_numbers():
    assert json.loads(json.dumps(T._no_nan({'a': [1., math.nan, math.inf], 'b': -math.inf}), allow_nan=False)) == {'a': [1., None, None], 'b': None}


def test_trains_where_the_terminal_knows_ascii_only(data_home, tmp_path):
    r = run('--data', 'sample', '--recipe', 'lesson', '--width', .25, '--size', 24, '--epochs', 2, '--validate', 2, '--log-dir', tmp_path/'run', home=data_home, PYTHONIOENCODING='ascii')
    assert r.returncode == 0 and 'accuracy 0.' in r.stdout, r.stderr


def test_no_last_batch_of_one_where_the_size_is_free(tmp_path):
    for s, n in (('train', 33), ('val', 8)):
        for i in range(n):
            (tmp_path/s/'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (32, 32), (8*i % 256, 0, 0)).save(tmp_path/s/'ab'[i % 2]/f'{i}.png')
    c = {**T.settle(T.get_parser().parse_args(['--device', 'cpu', '--recipe', 'lesson', '--width', '.25', '--size', '64', '--epochs', '1', '--log-dir', str(tmp_path/'run')])), 'device': 'cpu'}
    assert T.train_one(c, tmp_path, 'mine', tmp_path/'run')['bs'] == 15                # 33 = 2·16 + 1, and batch norm wants two values of a channel


def test_mistakes_that_show_before_the_training(tmp_path, capsys):
    (tmp_path/'dir').mkdir()
    data = folder(tmp_path)
    assert T.main(['--data', str(data), '--json', str(tmp_path/'dir'), '--log-dir', str(tmp_path/'r')]) == 2
    assert 'Is a directory' in capsys.readouterr().err and not (tmp_path/'r').exists()
    (tmp_path/'cut').mkdir(); (tmp_path/'cut/config.json').write_text('{"data": ')
    assert T.main(['--resume', '--log-dir', str(tmp_path/'cut')]) == 2 and 'cut/config.json' in capsys.readouterr().err


def test_the_same_folder_by_another_path_goes_on_and_a_lost_model_is_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder(tmp_path, n=8))
    args = ['--recipe', 'lesson', '--width', '.25', '--size', '32', '--epochs', '1', '--device', 'cpu', '--log-dir', 'r']
    assert T.main(['--data', '.', *args]) == 0
    (tmp_path/'r/seed-42/model.pt').unlink()
    assert T.main(['--data', str(tmp_path), *args, '--resume']) == 0 and (tmp_path/'r/seed-42/model.pt').exists()


def test_no_size_leaves_a_last_batch_of_one(): assert all(n % T.free_bs(n) != 1 for n in range(2, 2000)) and T.free_bs(800) == 16


def test_resume_takes_the_newest_run_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse = T.get_parser().parse_args
    for age, name, epochs in ((9, 'mine', 3), (1, '20261125-180000', 4)):
        c = T.settle(parse(['--device', 'cpu', '--recipe', 'cpu', '--epochs', str(epochs), '--log-dir', f'runs/{name}']))
        f = tmp_path/'runs'/name/'config.json'
        f.parent.mkdir(parents=True); f.write_text(json.dumps(c)); os.utime(f, (time.time() - age,)*2)
    a = parse(['--resume', '--device', 'cpu'])
    assert T.settle(a)['epochs'] == 4 and a.log_dir == 'runs/20261125-180000'


def test_a_run_begun_before_an_option_existed_goes_on(tmp_path):
    c = T.settle(T.get_parser().parse_args(['--device', 'cpu', '--recipe', 'cpu', '--log-dir', str(tmp_path)]))
    old = {k: v for k, v in c.items() if k not in ('cutmix', 'validate')}
    (tmp_path/'config.json').write_text(json.dumps(old))
    again = lambda *more: T.settle(T.get_parser().parse_args(['--device', 'cpu', '--resume', '--log-dir', str(tmp_path), *more]))
    assert again() == c and again('--cutmix', '0')['validate'] == 2
    with pytest.raises(T.DataError, match='was begun with cutmix 0.0, and 1.0 is asked for'): again('--cutmix', '1')


def test_recipes(monkeypatch):
    for name in T.RECIPES: assert T.get_recipe(name)['recipe'] == name and set(T.get_recipe(name)) == {'recipe', *T.RECIPES['cpu']}
    assert T.get_recipe(device='cuda')['recipe'] == 'gpu' and T.get_recipe(device='mps')['recipe'] == 'cpu'
    for native, want in ((torch.bfloat16, 'cpu16'), (None, 'cpu')):
        monkeypatch.setattr(T, 'native_dtype', lambda device, native=native: (native, ''))
        assert T.get_recipe(device='cpu')['recipe'] == T.settle(T.get_parser().parse_args(['--device', 'cpu', '--log-dir', '/nowhere/x']))['recipe'] == want
        assert T.settle(T.get_parser().parse_args(['--device', 'cpu', '--no-bf16', '--log-dir', '/nowhere/x']))['recipe'] == 'cpu'
    assert {**T.RECIPES['cpu'], **dict(epochs=26, wd=.03, validate=6)} == T.RECIPES['cpu16']      # the row of 26 epochs in the README
    assert T.get_recipe('lesson', opt='adam')['lr'] == T.LRS['adam'] and T.get_recipe('lesson', opt='adam', lr=1.)['lr'] == 1. and T.get_recipe('lesson', opt='sgd')['lr'] == .3
    with pytest.raises(ValueError, match="no recipe 'cake'; there are lesson"): T.get_recipe('cake')
    options = vars(T.get_parser().parse_args([]))
    assert set(T.RECIPES['cpu']) <= set(options) and all(options[k] is None for k in T.RECIPES['cpu'])


def test_radam_as_torch():
    "Through the steps where it is plain momentum (rho at most 5) and those where it is not, a schedule running."
    g = torch.Generator().manual_seed(0)
    ps = [torch.randn(3, 4, generator=g, dtype=torch.float64) for _ in range(2)]
    a, b = ([p.clone().requires_grad_() for p in ps] for _ in range(2))
    stats = [T.AverageGrad(dampening=True), T.AverageSqrGrad(), T.StepCount()]
    ours = T.StatefulOptimizer(a, [T.radam_step], stats, lr=.1, mom=.9, sqr_mom=.99, eps=1e-15)
    ref = torch.optim.RAdam(b, lr=.1, betas=(.9, .99), eps=1e-15)        # torch adds eps before debiasing
    for i in range(200):
        lr = .1*(1 + math.cos(i/20))/2
        ours.hypers[0]['lr'] = ref.param_groups[0]['lr'] = lr
        for p, q in zip(a, b):
            grad = torch.randn(3, 4, generator=g, dtype=torch.float64) + p.detach()
            p.grad, q.grad = grad.clone(), grad.clone()
        ours.step(); ref.step()
    for p, q in zip(a, b): assert torch.allclose(p, q, rtol=1e-8, atol=1e-9)


def test_lookahead_is_the_papers_algorithm():
    "Around plain SGD, beside the formula in Python numbers."
    if True:
        ws = [torch.tensor([1.], dtype=torch.float64, requires_grad=True), torch.tensor([-2.], dtype=torch.float64, requires_grad=True)]
        opt = T.StatefulOptimizer(ws, [lambda p, lr, **kw: p.sub_(p.grad, alpha=lr), T.lookahead_step], [T.StepCount(), T.SlowWeights()], lr=.1, k=4, pull=.3)
        want = [[1., 1.], [-2., -2.]]
        for i in range(1, 18):
            for w, s in zip(ws, want):
                w.grad = 2*w.detach()
                s[0] -= .1*2*s[0]
                if i % 4 == 0: s[1] += .3*(s[0] - s[1]); s[0] = s[1]
            opt.step()
            assert [w.item() for w in ws] == pytest.approx([s[0] for s in want], rel=1e-12), i


def test_ema_is_the_average_of_all_steps_and_what_is_validated():
    data, seen = tiny(), {'steps': [], 'valid': []}
    class Spy(Callback):
        _order = 5
        def after_step(self, run): seen['steps'].append({k: v.double().clone() for k, v in run.model.state_dict().items()})
        def after_loss(self, run):
            if not run.in_train: seen['valid'].append({k: v.double().clone() for k, v in run.model.state_dict().items()})
    r = T.get_recipe('lesson', **SMALL, **{}) | {'ema': .8}
    learn = T.get_training(data, r, 'cpu', 0, [Spy()])
    avg = {k: v.double().clone() for k, v in learn.model.state_dict().items()}
    learn.fit(2)
    averages = []
    for n, now in enumerate(seen['steps'], 1):
        d = min(.8, (1 + n)/(10 + n))
        avg = {k: d*avg[k] + (1 - d)*v if learn.model.state_dict()[k].is_floating_point() else v for k, v in now.items()}
        averages.append(avg)
    per_epoch = len(data.train_dl)
    for got, want in ((seen['valid'][0], averages[per_epoch - 1]), (seen['valid'][-1], averages[-1]), (learn.model.state_dict(), averages[-1])):
        for k, v in want.items(): assert torch.allclose(got[k].double(), v, rtol=1e-4, atol=1e-6), k
    assert not torch.allclose(seen['valid'][0]['0.0.weight' if '0.0.weight' in avg else next(iter(avg))], seen['steps'][per_epoch - 1][next(iter(avg))])


def test_ema_and_savebest_keep_what_was_validated():
    from exp.training_callbacks import SaveBest
    class Spy(Callback):
        _order = 5
        def __init__(self): self.seen = []
        def begin_batch(self, run):
            if not run.in_train and not run.iter: self.seen.append(copy.deepcopy(run.model.state_dict()))
    st, spy = T.AvgStatsCallback(accuracy, silent=True), Spy()
    learn = Learner(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1200, 3)), tiny(), F.cross_entropy, lr=.3,
                    cbs=[T.BatchTransformXCallback(lambda x: x.float()/255), T.EMA(.9), SaveBest(), st, spy]).fit(6)
    assert (best := min(range(6), key=lambda i: st.rows[i]['valid_loss'])) < 5, 'the best epoch must not be the last'
    assert all(a.equal(b) for a, b in zip(learn.model.state_dict().values(), spy.seen[best].values()))


def test_ema_without_a_validation_set():
    data = tiny()
    learn = Learner(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1200, 3)), DataBunch(data.train_dl, None), F.cross_entropy, lr=.01, cbs=[T.BatchTransformXCallback(lambda x: x.float()/255)])
    learn.fit(2, [ema := T.EMA(.9)])
    assert all(a.equal(b) for a, b in zip(learn.model.state_dict().values(), ema.avg))


def test_ema_after_an_error_the_model_has_its_own_weights():
    class Stop(Callback):
        _order = 900
        def after_loss(self, run):
            if not run.in_train: self.own = copy.deepcopy(ema.own); raise KeyboardInterrupt
    learn = Learner(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1200, 3)), tiny(), F.cross_entropy, lr=.01, cbs=[T.BatchTransformXCallback(lambda x: x.float()/255)])
    ema, stop = T.EMA(.9), Stop()
    with pytest.raises(KeyboardInterrupt): learn.fit(2, [ema, stop])
    assert all(a.equal(b) for a, b in zip(learn.model.state_dict().values(), stop.own))


def test_ema_leaves_what_a_module_saves_beside_its_tensors():
    class Counting(torch.nn.Linear):
        calls = 0
        def forward(self, x): self.calls += 1; return super().forward(x)
        def get_extra_state(self): return {'calls': self.calls}
        def set_extra_state(self, s): self.calls = s['calls']
    def fit(layer):
        torch.manual_seed(0)
        learn = Learner(torch.nn.Sequential(torch.nn.Flatten(), layer(1200, 3)), tiny(), F.cross_entropy, lr=.01, cbs=[T.BatchTransformXCallback(lambda x: x.float()/255)])
        learn.fit(2, [T.EMA(.9)])
        return learn.model
    counting, plain = fit(Counting), fit(torch.nn.Linear)
    assert counting[1].weight.equal(plain[1].weight) and counting[1].calls == 2*sum(len(dl) for dl in (tiny().train_dl, tiny().valid_dl))


@pytest.mark.parametrize('n, epochs, want', [(0, 4, [3]), (1, 3, [0, 1, 2]), (2, 5, [1, 3, 4]), (3, 2, [1])])
def test_validate_every(n, epochs, want):
    st = T.AvgStatsCallback(accuracy, silent=True)
    learn = Learner(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1200, 3)), tiny(), F.cross_entropy, lr=.01, cbs=[T.BatchTransformXCallback(lambda x: x.float()/255)])
    learn.fit(epochs, [st, T.ValidateEvery(n)])
    assert [r['epoch'] for r in st.rows if r['valid_loss'] == r['valid_loss']] == want
    assert all(('-' in st.line(r).split()) == (r['epoch'] not in want) for r in st.rows)


def test_mean_and_deviation_of_several_runs():
    rows = [dict(accuracy=a, seconds=10., seed=5 + i, data='d', n_valid=9, epochs=2, size=8, device='cpu', runs=3) for i, a in enumerate((.5, .7, .6))]
    r = T.summarise(rows, 3)
    assert (r['accuracy'], r['std'], r['seconds']) == (pytest.approx(.6), pytest.approx(.1), 30.)
    assert T.result_line(r) == 'accuracy 0.600 ± 0.100 (3 runs, mean and standard deviation) · d · 9 validation images · 2 epochs · 8 px · seeds 5–7 · cpu · 30 s'


def test_nan_is_null_in_json(tmp_path):
    T._keep(tmp_path/'r.json', {'rows': [{'valid_loss': math.nan, 'train_loss': 1.}]})
    assert json.loads((tmp_path/'r.json').read_text(), parse_constant=pytest.fail)['rows'] == [{'valid_loss': None, 'train_loss': 1.}]


def test_leaderboard_net_exports_and_loads_back(tmp_path):
    "Mish, self-attention and blurred pooling travel as plain data, into a process that has imported no more than the loading."
    net = T.ARCHS['leaderboard'](3, 3, width=.125)
    learn = Learner(net, tiny(), F.cross_entropy)
    export(learn, tmp_path/'m.pt', cbs=[])
    x = torch.randn(2, 3, 32, 32)
    code = ("import sys, torch; from exp.export_models import load_learner\n"
            "torch.save(load_learner(sys.argv[1]).model(torch.load(sys.argv[2])), sys.argv[3])")
    torch.save(x, tmp_path/'x.pt')
    subprocess.run([sys.executable, '-c', code, tmp_path/'m.pt', tmp_path/'x.pt', tmp_path/'y.pt'], cwd=ROOT, check=True, timeout=400)
    assert torch.allclose(torch.load(tmp_path/'y.pt'), net.eval()(x), atol=1e-5)


# ---------------------------------------------------------------- what a hard user found

QUICK = ['--recipe', 'lesson', '--width', '.25', '--size', '16', '--epochs', '1', '--device', 'cpu']


@pytest.fixture
def pets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'pets').mkdir()
    return folder(tmp_path/'pets', n=8)


def test_a_run_goes_on_with_the_data_that_was_found(data_home, tmp_path, monkeypatch, capsys):
    "Nothing named, and only the sample to be had. Tomorrow Imagenette may be."
    monkeypatch.setenv('FASTAI_HOME', str(data_home))
    with monkeypatch.context() as m:
        m.setattr(T, 'find_data', lambda name: (data_home/'data/drawn-shapes-160', 'sample (drawn)'))
        assert T.main([*QUICK, '--log-dir', str(tmp_path/'r')]) == 0
    assert json.loads((tmp_path/'r/config.json').read_text())['data'] == 'sample'
    other = tmp_path/'other'; other.mkdir(); folder(other)
    with monkeypatch.context() as m:
        m.setattr(T, 'find_data', lambda name: (data_home/'data/drawn-shapes-160', 'sample (drawn)') if name == 'sample' else (other, 'imagenette2-160'))
        assert T.main(['--resume', '--log-dir', str(tmp_path/'r'), '--device', 'cpu']) == 0
    assert 'was trained' not in capsys.readouterr().err
    c = json.loads((tmp_path/'r/config.json').read_text())
    (tmp_path/'r/config.json').write_text(json.dumps({**c, 'data': None}))                 # as an older exp-train wrote it
    with monkeypatch.context() as m:
        m.setattr(T, 'find_data', lambda name: (other, 'imagenette2-160'))
        assert T.main(['--resume', '--log-dir', str(tmp_path/'r'), '--device', 'cpu']) == 2 and 'was trained on sample (drawn), and this is imagenette2-160' in capsys.readouterr().err
    (tmp_path/'r/config.json').write_text(json.dumps({**c, 'data': None}))
    assert T.main(['--resume', '--data', 'sample', '--log-dir', str(tmp_path/'r'), '--device', 'cpu']) == 0


def test_a_relative_folder_is_the_same_from_everywhere_and_may_move(pets, tmp_path, monkeypatch, capsys):
    assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'r']) == 0
    (tmp_path/'r/seed-42/result.json').unlink()
    (tmp_path/'away').mkdir(); monkeypatch.chdir(tmp_path/'away')
    assert T.main(['--resume', '--log-dir', '../r', '--device', 'cpu']) == 0
    assert T.main(['--resume', '--log-dir', '../r', '--device', 'cpu', '--data', '../pets']) == 0
    pets.rename(tmp_path/'away/pets')
    (tmp_path/'r/seed-42/result.json').unlink()
    assert T.main(['--resume', '--log-dir', '../r', '--device', 'cpu', '--data', 'pets']) == 0
    (tmp_path/'others').mkdir(); folder(tmp_path/'others')
    assert T.main(['--resume', '--log-dir', '../r', '--device', 'cpu', '--data', '../others']) == 2 and 'was begun with data' in capsys.readouterr().err


def test_two_commands_of_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(time, 'strftime', lambda f: '20261130-113051')
    monkeypatch.chdir(tmp_path)
    assert [T.new_folder() for _ in range(3)] == ['runs/20261130-113051' + s for s in ('', '-2', '-3')]


def test_two_commands_do_not_share_a_folder(pets, tmp_path, capsys):
    with T.only_here(tmp_path/'r'):
        p = subprocess.run([sys.executable, '-m', 'exp.train_imagenette', *QUICK, '--data', str(pets), '--log-dir', str(tmp_path/'r')], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert p.returncode == 2 and 'another exp-train is at work there' in p.stderr and not (tmp_path/'r').exists()
    assert T.main([*QUICK, '--data', str(pets), '--log-dir', str(tmp_path/'r')]) == 0 and not (tmp_path/'r/.lock').exists()


def test_a_kill_before_the_first_batch_leaves_the_settings_and_a_mistake_nothing(pets, tmp_path, monkeypatch, capsys):
    seen = []
    def stop(*args): seen.append(json.loads((tmp_path/'r/config.json').read_text())['epochs']); raise DataError('a mistake')
    with monkeypatch.context() as m:
        m.setattr(T, 'get_items', stop)
        assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'r']) == 2
    assert seen == [1] and not (tmp_path/'r').exists()
    capsys.readouterr()
    assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'r', '--resume']) == 0 and 'there is no run in r yet: this begins one' in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_end_does_not_cost_the_result(pets, tmp_path, monkeypatch, capsys):
    def full(learn, f): raise OSError(28, 'No space left on device', str(f))
    with monkeypatch.context() as m:
        m.setattr(T, 'export', full)
        assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'r', '--json', 'r.json']) == 1
    out, err = capsys.readouterr()
    assert 'No space left' in err and 'accuracy ' in out and 'exp-predict' not in out and json.loads((tmp_path/'r.json').read_text())['model'] is None
    assert T.main(['--resume', '--log-dir', 'r', '--device', 'cpu']) == 0 and (tmp_path/'r/seed-42/model.pt').exists()      # room again


def test_no_empty_json_is_left_behind(tmp_path, monkeypatch):
    assert T.main([*QUICK, '--data', str(tmp_path/'nowhere'), '--log-dir', str(tmp_path/'r'), '--json', str(tmp_path/'r.json')]) == 2 and not (tmp_path/'r.json').exists()
    (tmp_path/'r.json').touch()
    assert T.main([*QUICK, '--data', str(tmp_path/'nowhere'), '--log-dir', str(tmp_path/'r'), '--json', str(tmp_path/'r.json')]) == 2 and (tmp_path/'r.json').exists()


def test_each_epoch_once_and_the_seconds_of_all_sittings(pets, tmp_path, monkeypatch):
    class Slow(Callback):
        _order = 1000
        def begin_epoch(self, run): time.sleep(.4)
        def after_epoch(self, run):
            if run.epoch == 1 and stop: raise KeyboardInterrupt
    make = T.get_cbs
    def slowly(*args): cbs, ck = make(*args); return [*cbs, Slow()], ck
    monkeypatch.setattr(T, 'get_cbs', slowly)
    stop = True
    assert T.main([*QUICK, '--epochs', '3', '--data', 'pets', '--log-dir', 'r']) == 130
    stop = False
    assert T.main(['--resume', '--log-dir', 'r', '--device', 'cpu', '--json', 'r.json']) == 0
    r = json.loads((tmp_path/'r.json').read_text())
    assert len(r['rows']) == 3 and r['seconds'] > sum(row['time'] for row in r['rows']) > 1.2
    for f in (tmp_path/'r/seed-42/checkpoints').glob('*.pt'): f.unlink()
    (tmp_path/'r/seed-42/result.json').unlink()
    assert T.main(['--resume', '--log-dir', 'r', '--device', 'cpu']) == 0
    assert [l.split(',')[0] for l in (tmp_path/'r/seed-42/history.csv').read_text().splitlines()] == ['epoch', '0', '1', '2']


def test_what_is_to_be_copied_is_quoted_and_a_moved_run_knows_where_it_is(pets, tmp_path, capsys):
    assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'my runs/a b']) == 0 and "exp-predict 'my runs/a b/seed-42/model.pt' PICTURE" in capsys.readouterr().out
    (tmp_path/'my runs/a b').rename(tmp_path/'moved')
    assert T.main(['--resume', '--log-dir', 'moved', '--device', 'cpu']) == 0 and 'exp-predict moved/seed-42/model.pt PICTURE' in capsys.readouterr().out
    class Done: rows = []
    assert "--log-dir 'my runs' goes on" in T._how_far(type('a', (), {'log_dir': 'my runs'}), [Done, Done])


def test_half_a_result_is_none_and_no_settings_are_a_sentence(pets, tmp_path, capsys):
    assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'r']) == 0
    f = tmp_path/'r/seed-42/result.json'
    f.write_text(f.read_text()[:200])
    assert T.main(['--resume', '--log-dir', 'r', '--device', 'cpu']) == 0 and json.loads(f.read_text())['data'] == 'pets'
    (tmp_path/'r/seed-42/model.pt').write_bytes(b'')
    assert T.main(['--resume', '--log-dir', 'r', '--device', 'cpu']) == 0 and (tmp_path/'r/seed-42/model.pt').stat().st_size
    for text in ('[]', '{}', '3'):
        (tmp_path/'r/config.json').write_text(text)
        assert T.main(['--resume', '--log-dir', 'r', '--device', 'cpu']) == 2 and 'config.json: these are not the settings of a run' in capsys.readouterr().err


def test_a_last_batch_of_one_is_refused_before_the_training(pets, capsys):
    assert T.main([*QUICK, '--data', 'pets', '--bs', '5', '--log-dir', 'r']) == 2                   # 16 = 3·5 + 1
    assert '--bs 5 leaves a last batch of one of the 16 pictures' in capsys.readouterr().err


def test_pictures_in_other_places_are_told_of(pets):
    (pets/'train/a/more').mkdir(); (pets/'train/a/0.png').rename(pets/'train/a/more/0.png'); (pets/'train/b/0.png').rename(pets/'train/0.png')
    with pytest.warns(UserWarning, match=r'2 of 32 pictures in .* are left out'): assert len(T.get_items(pets, 16).train) == 14


@pytest.mark.parametrize('seed', ['-1', str(2**32), '9'*30])
def test_a_seed_is_no_larger_than_everybody_takes(seed):
    with pytest.raises(SystemExit): T.main(['--seed', seed])


def test_nobody_reads_on(data_home, tmp_path):
    p = start('--recipe', 'lesson', '--size', 16, '--width', .25, '--epochs', 300, '--log-dir', tmp_path/'run', home=data_home)
    p.stdout.readline(); p.stdout.close()
    err = p.stderr.read(); p.wait(400)
    assert p.returncode == 141 and 'Traceback' not in err


def test_wrong_data_on_the_way_back_does_not_stay_in_the_settings(pets, tmp_path, capsys):
    "The folder has moved, another one is named by mistake: the checkpoint refuses it, and the right one must still be welcome."
    assert T.main([*QUICK, '--data', 'pets', '--log-dir', 'r']) == 0
    (tmp_path/'r/seed-42/result.json').unlink()
    pets.rename(tmp_path/'moved'); (tmp_path/'others').mkdir(); folder(tmp_path/'others', n=40)
    go_on = ['--resume', '--log-dir', 'r', '--device', 'cpu', '--data']
    assert T.main([*go_on, 'others']) == 2 and 'checkpoints' in capsys.readouterr().err
    assert T.main([*go_on, 'moved']) == 0 and json.loads((tmp_path/'r/config.json').read_text())['data'] == str(tmp_path/'moved')


@pytest.mark.parametrize('bs, other', [(5, 6), (3, 4)])
def test_the_batch_size_that_is_named_instead_fits(pets, capsys, bs, other):
    assert T.main([*QUICK, '--data', 'pets', '--bs', str(bs), '--log-dir', 'r']) == 2 and f'--bs {other} does not' in capsys.readouterr().err      # 16 = 5·3 + 1
    assert T.main([*QUICK, '--data', 'pets', '--bs', str(other), '--log-dir', 'r']) == 0
