"""The page and its recipes by name, beside independent references: what each setting does, and that nothing but speed is between page and command."""
import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, small_env
from PIL import Image

from exp import recipes as R
from exp import train_imagenette as page
from exp.callbacks import AvgStatsCallback, BatchTransformXCallback, Callback, DataBunch, Dataset, accuracy, get_dls
from exp.checkpoints import Checkpoint
from exp.datasets import DataError
from exp.export_models import export, load_learner
from exp.files import CheckpointError, load
from exp.fast_batches import InMemory, fast_dl, in_memory
from exp.learner import Learner
from exp.mixup import Mixer
from exp.training_callbacks import SaveBest
from exp.xresnet import xresnet18


def folder(tmp_path, train=('a', 'b'), val=('a', 'b'), n=4):
    for s, cs in (('train', train), ('val', val)):
        (tmp_path/s).mkdir(exist_ok=True, parents=True)
        for c in cs:
            (tmp_path/s/c).mkdir()
            for i in range(n): Image.new('RGB', (20, 30), (i*40, 0, 99)).save(tmp_path/s/c/f'{i}.png')
    return tmp_path


def tiny(n=24, size=20):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8), torch.arange(n) % 3
    return DataBunch(*get_dls(Dataset(x, y), Dataset(x, y), 8, seed=0), c_in=3, c_out=3)


def flat(cbs=(), lr=.01, data=None, layer=torch.nn.Linear):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), layer(1200, 3))
    return Learner(model, data or tiny(), F.cross_entropy, lr=lr, cbs=[BatchTransformXCallback(lambda x: x.float()/255), *cbs])


def same(a, b): return all(x.equal(y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- the page

TINY = dict(data='sample', epochs=1, bs=16, arch=partial(xresnet18, width=.125))


def rows_of(st): return [{k: v for k, v in r.items() if k != 'time'} for r in st]


def test_the_page_gives_the_numbers_of_the_command_digit_for_digit(data_home, tmp_path):
    from exp.train import main
    r, st = page.Recipe(**TINY), AvgStatsCallback(accuracy, silent=True)
    page.get_learner(r, page.get_data(r, make_dl=fast_dl), [st]).fit(1)
    assert main(['--data', 'sample', '--recipe', 'cpu', '--width', '.125', '--epochs', '1', '--no-bf16', '--device', 'cpu', '--log-dir', str(tmp_path/'r'), '--json', str(tmp_path/'r.json')]) == 0
    assert rows_of(json.loads((tmp_path/'r.json').read_text())['rows']) == rows_of(st.rows)


def test_a_page_that_was_stopped_ends_as_if_it_had_not_been_and_exports(data_home, tmp_path):
    class Stop(Callback):
        def after_batch(self, run):
            if run.in_train and run.epoch == 1: raise KeyboardInterrupt
    class Batches(Callback):
        n = 0
        def after_step(self, run): self.n += 1
    r = page.Recipe(**{**TINY, 'epochs': 2}, size=24, crops=(16, 20))
    whole = page.train(r, tmp_path/'a')
    with pytest.raises(KeyboardInterrupt): page.train(r, tmp_path/'b', cbs=[Stop()])
    parts = page.train(r, tmp_path/'b', finish=export, cbs=[seen := Batches()])
    assert 0 < seen.n < 800//16*2, 'it goes on, and does not begin anew'
    assert same(whole.model.state_dict().values(), parts.model.state_dict().values())
    f = parts.data.source.valid.x.items[0]
    assert torch.allclose(load_learner(tmp_path/'b/model.pt').predict(f)[1], whole.predict(f)[1], atol=1e-5)


def test_the_page_is_a_program(data_home, tmp_path):
    args = '--data', 'sample', '--epochs', '1', '--size', '16', '--dtype', 'bfloat16', '--bs', '100'
    r = subprocess.run([sys.executable, '-m', 'exp.train_imagenette', *args], cwd=tmp_path, env={**small_env(data_home), 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0 and (tmp_path/'run/model.pt').exists(), r.stderr


def test_nothing_is_shared_between_recipes():
    assert replace(page.Recipe(), lr=1.).lr == 1. and page.Recipe().lr == .01 and page.Recipe().crops == R.RECIPES['cpu']['crops']
    with pytest.raises(AttributeError): page.Recipe().lr = 2.
    own = R.RECIPES['cpu']
    assert {k: getattr(page.Recipe(), k) for k in ('epochs', 'size', 'bs', 'lr', 'wd', 'smooth', 'crops')} == {k: own[k] for k in ('epochs', 'size', 'bs', 'lr', 'wd', 'smooth', 'crops')}


# ---------------------------------------------------------------- folders

def test_dot_folders_are_nobodys_class_and_the_pictures_are_the_data_blocks(tmp_path):
    folder(tmp_path, train=('a', 'b', '.ipynb_checkpoints'))
    (tmp_path/'train/a/.DS_Store').touch()
    (tmp_path/'train/a/notes.txt').touch()
    items = R.get_items(tmp_path, 16)
    assert items.train.proc_y.vocab == ['a', 'b'] and len(items.train) == len(items.valid) == 8
    kept, read = (in_memory(items, m).to_databunch(4, seed=0, num_workers=0, make_dl=fast_dl) for m in (1e9, 1))
    assert isinstance(kept.train_ds, InMemory) and not isinstance(read.train_ds, InMemory)
    for (a, ya), (b, yb) in zip(kept.train_dl, read.train_dl, strict=True): assert a.equal(b) and ya.equal(yb) and a.dtype == torch.uint8


def test_a_broken_picture_of_a_large_set_is_one_line_too(tmp_path):
    "Too large to keep in memory: the error comes from a worker process, with its file and without its traceback."
    (folder(tmp_path)/'train/b/2.png').write_text('no picture')
    data = R.get_items(tmp_path, 16).to_databunch(4, seed=0, num_workers=1, make_dl=fast_dl)
    with pytest.raises(DataError) as e: list(data.train_dl)
    assert str(e.value).startswith(str(tmp_path/'train/b/2.png')) and len(str(e.value).splitlines()) == 1


def test_an_unreadable_folder_as_root_too(tmp_path, monkeypatch):
    def scandir(p): raise PermissionError(13, 'Permission denied')
    folder(tmp_path)
    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(DataError, match='cannot be read: Permission denied'): R.get_items(tmp_path, 16)


def test_pictures_in_other_places_are_told_of(tmp_path):
    d = folder(tmp_path)
    (d/'train/a/more').mkdir()
    (d/'train/a/0.png').rename(d/'train/a/more/0.png')
    (d/'train/b/0.png').rename(d/'train/0.png')
    with pytest.warns(UserWarning, match=r'2 of 16 pictures in .* are left out'): assert len(R.get_items(d, 16).train) == 6


def test_a_split_by_share_is_the_same_each_time_and_grows_with_the_folder(tmp_path):
    d = folder(tmp_path, n=20)/'train'
    def valid(seed=1): return {str(f) for f in R.get_items(d, 16, valid_pct=.3, seed=seed).valid.x.items}
    first = valid()
    assert first == valid() != valid(2) and 5 <= len(first) <= 19
    for i in range(5): Image.new('RGB', (20, 20)).save(d/f'a/new{i}.png')
    assert {f for f in valid() if 'new' not in f} == first
    with pytest.raises(DataError, match='val/'): R.get_items(d, 16)
    assert len(R.get_items(d, 16, 20, .3).train.x[0][0]) == 20


@pytest.mark.parametrize('seed', range(4))
def test_a_split_by_share_leaves_no_class_out(tmp_path, seed):
    d = folder(tmp_path, n=20)/'train'
    for c, n in dict(two=2, three=3, one=1).items():
        (d/c).mkdir()
        for i in range(n): Image.new('RGB', (20, 20)).save(d/c/f'{i}.png')
    for share in (.02, .2, .98):
        sd = R.get_items(d, 16, valid_pct=share, seed=seed)
        sides = [{f.parent.name for f in side.x.items} for side in (sd.train, sd.valid)]
        assert sides[0] - sides[1] == {'one'} and len(sides[0]) == 5, 'a class of one picture is for training'


# ---------------------------------------------------------------- settings

SMALL = dict(arch='lesson', width=.25, epochs=2, size=20, crops=(16, 20), bs=8, opt='momentum', lr=.05, wd=.1, sched='cycle', tfms='crop', mixup=0., cutmix=0., smooth=0., ema=0., validate=1)


def weights(seed=0, **changes):
    r = R.get_recipe('lesson', **{**SMALL, **changes})
    return torch.cat([p.detach().flatten() for p in R.get_training(tiny(), r, 'cpu', seed).fit(r['epochs']).model.parameters()])


@pytest.fixture(scope='module')
def small_weights():
    assert weights().equal(weights()) and not weights().equal(weights(1))
    return weights()


@pytest.mark.parametrize('change', [dict(width=.5), dict(arch='xresnet18', width=.125), dict(epochs=1), dict(crops=(20, 20)), dict(opt='adam'), dict(opt='sgd'), dict(opt='lamb'), dict(opt='lars'),
                                    dict(opt='ranger'), dict(opt='muon'), dict(lr=.06), dict(wd=.2), dict(sched='flat'), dict(sched='lesson'), dict(tfms='none', crops=None), dict(tfms='flip', crops=None), dict(tfms='strong'),
                                    dict(mixup=.4), dict(cutmix=1.), dict(smooth=.1), dict(ema=.9)], ids=str)
def test_every_setting_changes_the_result(change, small_weights):
    w = weights(**change)
    assert w.shape != small_weights.shape or not w.equal(small_weights) and w.isfinite().all()


def test_mixup_and_cutmix_take_turns():
    def mixers(**kw): return [cb for cb in R.get_training(tiny(), R.get_recipe('lesson', **{**SMALL, **kw}), 'cpu', 5).cbs if isinstance(cb, Mixer)]
    assert [type(m).__name__ for m in mixers(mixup=.2)] == ['Mixup'] and mixers() == []
    both, = mixers(mixup=.2, cutmix=1.)
    assert [(type(m).__name__, m.alpha) for m in both.mixers] == [('Mixup', .2), ('CutMix', 1.)]
    assert not weights(mixup=.2, cutmix=1.).equal(weights(mixup=.2)) and not weights(mixup=.2, cutmix=1.).equal(weights(cutmix=1.))


def test_recipes(monkeypatch):
    for name in R.RECIPES: assert R.get_recipe(name).keys() == {'recipe', *R.RECIPES['cpu']} and R.get_recipe(name)['recipe'] == name
    assert R.get_recipe(device='cuda')['recipe'] == 'gpu' and R.get_recipe(device='mps')['recipe'] == 'cpu'
    for native, want in ((torch.bfloat16, 'cpu16'), (None, 'cpu')):
        monkeypatch.setattr(R, 'native_dtype', lambda device, native=native: (native, ''))
        assert R.get_recipe(device='cpu')['recipe'] == want
    assert {**R.RECIPES['cpu'], **dict(epochs=26, wd=.03, validate=6)} == R.RECIPES['cpu16']          # the row of 26 epochs in the README
    assert R.get_recipe('lesson', opt='adam')['lr'] == R.LRS['adam'] and R.get_recipe('lesson', opt='adam', lr=1.)['lr'] == 1.
    assert R.get_recipe('cpu', size=192)['crops'] == (96, 160) and R.get_recipe('cpu', size=192, crops=(9, 9))['crops'] == (9, 9)
    for bad in (dict(name='cake'), dict(sugar=1), dict(name='lesson', crops=(48, 80))):
        with pytest.raises(ValueError): R.get_recipe(**bad)


def test_radam_as_torch():
    "Through the steps where it is plain momentum (rho at most 5) and those where it is not, a schedule running."
    g = torch.Generator().manual_seed(0)
    ps = [torch.randn(3, 4, generator=g, dtype=torch.float64) for _ in range(2)]
    a, b = ([p.clone().requires_grad_() for p in ps] for _ in range(2))
    stats = [R.AverageGrad(dampening=True), R.AverageSqrGrad(), R.StepCount()]
    ours = R.Optimizer(a, [R.radam_step], stats, lr=.1, mom=.9, sqr_mom=.99, eps=1e-15)
    ref = torch.optim.RAdam(b, lr=.1, betas=(.9, .99), eps=1e-15)        # torch adds eps before debiasing
    for i in range(200):
        ours.hypers[0]['lr'] = ref.param_groups[0]['lr'] = .1*(1 + math.cos(i/20))/2
        for p, q in zip(a, b):
            grad = torch.randn(3, 4, generator=g, dtype=torch.float64) + p.detach()
            p.grad, q.grad = grad.clone(), grad.clone()
        ours.step()
        ref.step()
    for p, q in zip(a, b): assert torch.allclose(p, q, rtol=1e-8, atol=1e-9)


def test_lookahead_is_the_papers_algorithm():
    "Around plain SGD, beside the formula in Python numbers."
    ws = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (1., -2.)]
    opt = R.Optimizer(ws, [lambda p, lr, **kw: p.sub_(p.grad, alpha=lr), R.lookahead_step], [R.StepCount(), R.Remember(slow=lambda p: p.detach().clone())], lr=.1, k=4, pull=.3)
    want = [[1., 1.], [-2., -2.]]
    for i in range(1, 18):
        for w, s in zip(ws, want):
            w.grad = 2*w.detach()
            s[0] -= .1*2*s[0]
            if i % 4 == 0: s[0] = s[1] = s[1] + .3*(s[0] - s[1])
        opt.step()
        assert [w.item() for w in ws] == pytest.approx([s[0] for s in want], rel=1e-12), i


# ---------------------------------------------------------------- averaged weights, validation now and then

def test_ema_is_the_average_of_all_steps_and_what_is_validated():
    data, seen = tiny(), {'steps': [], 'valid': []}
    class Spy(Callback):
        _order = 5
        def now(self, run): return {k: v.double().clone() for k, v in run.model.state_dict().items()}
        def after_step(self, run): seen['steps'].append(self.now(run))
        def after_loss(self, run):
            if not run.in_train: seen['valid'].append(self.now(run))
    R.get_training(tiny(), R.get_recipe('lesson', **SMALL), 'cpu', 0, [Spy()]).fit(2)
    plain, seen['steps'], seen['valid'] = seen['steps'], [], []
    learn = R.get_training(data, R.get_recipe('lesson', **SMALL) | {'ema': .8}, 'cpu', 0, [Spy()])
    avg, averages, own = {k: v.double().clone() for k, v in learn.model.state_dict().items()}, [], learn.model.state_dict()
    learn.fit(2)
    for n, now in enumerate(seen['steps'], 1):
        d = min(.8, (1 + n)/(10 + n))
        avg = {k: d*avg[k] + (1 - d)*v if own[k].is_floating_point() else v for k, v in now.items()}
        averages.append(avg)
    half = len(data.train_dl)
    assert all(same(a.values(), b.values()) for a, b in zip(plain, seen['steps'], strict=True)), 'training does not see it'
    for got, want in ((seen['valid'][0], averages[half - 1]), (seen['valid'][-1], averages[-1]), (learn.model.state_dict(), averages[-1])):
        for k, v in want.items(): assert torch.allclose(got[k].double(), v, rtol=1e-4, atol=1e-6), k
    assert any(not torch.allclose(v, seen['steps'][half - 1][k]) for k, v in seen['valid'][0].items() if v.is_floating_point())


def test_ema_and_savebest_keep_what_was_validated():
    class Spy(Callback):
        _order = 5
        def __init__(self): self.seen = []
        def begin_batch(self, run):
            if not run.in_train and not run.iter: self.seen.append(copy.deepcopy(run.model.state_dict()))
    st, spy = AvgStatsCallback(accuracy, silent=True), Spy()
    learn = flat([R.EMA(.9), SaveBest(), st, spy], lr=.3).fit(6)
    assert (best := min(range(6), key=lambda i: st.rows[i]['valid_loss'])) < 5, 'the best epoch must not be the last'
    assert same(learn.model.state_dict().values(), spy.seen[best].values())


def test_a_checkpoint_has_both_the_averaged_weights_and_those_as_trained(tmp_path):
    "The table showed the ones and `load` took the others, without a word."
    class Stop(Callback):
        _order = 2000
        def after_epoch(self, run):
            if run.epoch == 1: raise KeyboardInterrupt
    learn, ema = flat(), R.EMA(.9)
    with pytest.raises(KeyboardInterrupt): learn.fit(4, [ema, Checkpoint(tmp_path), Stop()])
    f, avg, own = Checkpoint(tmp_path).files()[0], [t.clone() for t in ema.avg], copy.deepcopy(learn.model.state_dict())
    with pytest.warns(UserWarning, match='load_averaged'): assert same(load(flat(), f).model.state_dict().values(), own.values())
    assert same(R.load_averaged(flat(), f).model.state_dict().values(), avg) and not same(avg, own.values())
    d = torch.load(f, weights_only=True)
    for bad in ({}, {'EMA 1': 5}, {'EMA 1': {'avg': avg[:1], 'n': 3}}, {'EMA 1': {'avg': [a[:1] for a in avg], 'n': 3}}):
        torch.save({**d, 'callbacks': bad}, f)
        new = flat()
        before = copy.deepcopy(new.model.state_dict())
        with pytest.raises(CheckpointError): R.load_averaged(new, f)
        assert same(new.model.state_dict().values(), before.values())


def test_ema_without_a_validation_set_and_after_an_error():
    learn, ema = flat(data=DataBunch(tiny().train_dl, None)), R.EMA(.9)
    assert same(learn.fit(2, [ema]).model.state_dict().values(), ema.avg)
    class Stop(Callback):
        _order = 900
        def after_loss(self, run):
            if not run.in_train:
                self.own = copy.deepcopy(ema.own)
                raise KeyboardInterrupt
    learn, stop = flat(), Stop()
    with pytest.raises(KeyboardInterrupt): learn.fit(2, [ema, stop])
    assert same(learn.model.state_dict().values(), stop.own)


def test_ema_leaves_what_a_module_saves_beside_its_tensors():
    class Counting(torch.nn.Linear):
        calls = 0
        def forward(self, x):
            self.calls += 1
            return super().forward(x)
        def get_extra_state(self): return {'calls': self.calls}
        def set_extra_state(self, s): self.calls = s['calls']
    counting, plain = (flat(layer=layer).fit(2, [R.EMA(.9)]).model for layer in (Counting, torch.nn.Linear))
    assert counting[1].weight.equal(plain[1].weight) and counting[1].calls == 2*sum(len(dl) for dl in (tiny().train_dl, tiny().valid_dl))


@pytest.mark.parametrize('n, epochs, want', [(0, 4, [3]), (1, 3, [0, 1, 2]), (2, 5, [1, 3, 4]), (3, 2, [1])])
def test_validate_every(n, epochs, want):
    st = AvgStatsCallback(accuracy, silent=True)
    flat().fit(epochs, [st, R.ValidateEvery(n)])
    assert [r['epoch'] for r in st.rows if r['valid_loss'] == r['valid_loss']] == want


def test_leaderboard_net_exports_and_loads_back(tmp_path):
    "Mish, self-attention and blurred pooling travel as plain data, into a process that has imported no more than the loading."
    net, x = R.ARCHS['leaderboard'](3, 3, width=.125), torch.randn(2, 3, 32, 32)
    export(Learner(net, tiny(), F.cross_entropy), tmp_path/'m.pt', cbs=[])
    torch.save(x, tmp_path/'x.pt')
    code = ("import sys, torch; from exp.export_models import load_learner\n"
            "torch.save(load_learner(sys.argv[1]).model(torch.load(sys.argv[2])), sys.argv[3])")
    subprocess.run([sys.executable, '-c', code, tmp_path/'m.pt', tmp_path/'x.pt', tmp_path/'y.pt'], cwd=ROOT, check=True, timeout=400)
    assert torch.allclose(torch.load(tmp_path/'y.pt'), net.eval()(x), atol=1e-5)


def test_the_readmes_script_goes_from_a_folder_to_a_prediction(tmp_path):
    import re
    script, = (s for s in re.findall(r'(?s)```python\n(.*?)```', (ROOT/'README.md').read_text()) if 'pets' in s)
    assert len(script.strip().splitlines()) <= 12
    for c, v in (('cat', 30), ('dog', 220)):
        (tmp_path/'pets'/c).mkdir(parents=True)
        for i in range(16): Image.new('RGB', (120, 100), (v, v + i, 99)).save(tmp_path/f'pets/{c}/{i}.jpg')
    Image.new('RGB', (50, 70), (30, 40, 99)).save(tmp_path/'new.jpg')
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    r = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0 and re.search(r"\('(cat|dog)', tensor", r.stdout), r.stderr
