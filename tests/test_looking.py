"""A look leaves no trace: not in anything that a hash of everything can see, nor in what training makes of it."""
import gc
import hashlib
import random
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from event_log import Log
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from exp.annealing import ParamScheduler
from exp.batchnorm import conv_layer
from exp.callbacks import AvgStatsCallback, BatchTransformXCallback, Callback, CudaCallback, DataBunch, Dataset, Recorder, accuracy, get_dls
from exp.data_block import ImageList, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb, parent_labeler, to_byte_tensor
from exp.datasets import readable
from exp.fast_batches import fast_dl, in_memory
from exp.learner import Learner, get_learner, set_seed
from exp.looking import layer_shapes, show_results, summary
from exp.optimizers import adam_opt, sgd_mom_opt
from exp.training_callbacks import GradientAccumulation, GradientClip

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(140, 10, generator=G), torch.randint(0, 3, (140,), generator=G)


def toy(seed=0): return DataBunch(*get_dls(Dataset(X[:100], Y[:100]), Dataset(X[100:], Y[100:]), 32, seed=seed), 10, 3)


def net(norm=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), *([nn.BatchNorm1d(20), nn.Dropout(.3)] if norm else []), nn.ReLU(), nn.Linear(20, 3))


def learner(*cbs, data=None, opt=torch.optim.SGD, norm=False, **kw):
    return Learner(net(norm), data or toy(), F.cross_entropy, opt, **{'lr': .1, **kw}, cbs=list(cbs))


def table(): return AvgStatsCallback(accuracy, silent=True)
def weights(learn): return torch.cat([t.detach().flatten().double() for t in learn.model.state_dict().values()])


def everything(learn):
    "A hash of all that a look could change: written without the learner's own list of it."
    h = hashlib.sha256()
    def add(o):
        if torch.is_tensor(o): h.update(repr((o.dtype, o.shape)).encode() + o.detach().contiguous().numpy().tobytes())
        elif isinstance(o, dict): [add((k, v)) for k, v in o.items()]
        elif isinstance(o, (list, tuple)): [add(v) for v in o]
        else: h.update(repr(o).encode())
    add(list(learn.model.state_dict().items()))
    add([(m.training, len(m._forward_hooks)) for m in learn.model.modules()])
    add([p.grad for p in learn.model.parameters()])
    add(learn.opt.state_dict() if learn.opt is not None else None)
    add([torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2], torch.is_grad_enabled()])
    for dl in (learn.data.train_dl, learn.data.valid_dl): add([dl.generator.get_state() if dl.generator is not None else None, getattr(dl, 'epoch', None)])
    add([learn.epoch, learn.n_epochs, learn.iter, learn.n_iter, learn.in_train, [id(cb) for cb in learn.cbs], id(learn.opt), id(learn.logger), id(learn.loss_func)])
    add([(k, v) for cb in learn.cbs for k, v in vars(cb).items() if isinstance(v, (int, float, str, list))])
    add([(s.count, s.totals) for cb in learn.cbs if isinstance(cb, AvgStatsCallback) for s in cb.stats.values()])
    return h.hexdigest()


def pictures(data_home, n=40):
    il = ImageList.from_files(data_home/'data'/'drawn-shapes-160', include=('train', 'val'), tfms=[make_rgb, ResizeFixed(32), to_byte_tensor])
    sd = SplitData.split_by_func(il.new(il.items[::max(1, 1100//n)]), partial(grandparent_splitter, valid_name='val'))
    return in_memory(label_by_func(sd, parent_labeler)).to_databunch(8, seed=1, make_dl=fast_dl)


class Noise(Callback):
    "Shapes each batch, drawing from every generator there is, and counts; keeps a mean of its own, changed in place, and another one deeper down."
    _order = 5
    def __init__(self): self.g, self.n, self.mean, self.deep = torch.Generator().manual_seed(5), 0, torch.zeros(3), {'all': [torch.zeros(3)]}
    def begin_batch(self, run):
        run.xb = run.xb + .01*torch.randn(1, generator=self.g) + .01*torch.rand(1) + .01*random.random() + .01*np.random.rand()
        self.n += 1
    def after_step(self, run):
        for m in (self.mean, *self.deep['all']): m.lerp_(next(reversed(list(run.model.parameters()))).detach()[:3], .5)


def fails(learn):
    with pytest.raises(ZeroDivisionError), learn.looking(Log('after_loss', ZeroDivisionError)):
        learn('begin_fit')
        learn.one_pass(learn.data.train_dl, False)


def search_that_fails(learn):
    learn.add_cbs(log := Log('after_step', ZeroDivisionError, 5))
    with pytest.raises(ZeroDivisionError): learn.lr_find(max_iter=20)
    learn.remove_cbs(log)


def trains(learn):
    with pytest.raises(KeyboardInterrupt), learn.untouched():
        learn.fit(1)
        raise KeyboardInterrupt


def adds_gradients(learn):
    with learn.untouched():
        xb, yb = next(iter(learn.data.valid_dl))
        F.cross_entropy(learn.model(xb.float()), yb).backward()


def summarised(learn): summary(learn)


LOOKS = dict(summary=summarised, results=lambda l: show_results(l, 4), find=lambda l: l.lr_find(max_iter=20), find_fails=search_that_fails, validate=lambda l: l.validate(),
             validate_training=lambda l: l.validate(l.data.train_dl), preds=lambda l: l.get_preds(), preds_training=lambda l: l.get_preds(l.data.train_dl),
             predict=lambda l: l.predict(l.data.source.valid.x.items[0] if hasattr(l.data, 'source') else X[0]), fails=fails, trains=trains,
             adds_gradients=adds_gradients)


@pytest.mark.parametrize('state', ['new', 'fitted', 'with gradients'])
@pytest.mark.parametrize('kind', ['items', 'seeded', 'global'])
def test_no_trace(kind, state, data_home):
    data = pictures(data_home) if kind == 'items' else toy(0 if kind == 'seeded' else None)
    set_seed(0)
    cbs = [table(), Recorder(), CudaCallback('cpu'), noise := Noise(), ParamScheduler('lr', lambda pos: .05), GradientClip(1.), GradientAccumulation(1)]
    if kind == 'items': learn = get_learner([8, 8], data, .1, conv_layer, opt_func=adam_opt(), cbs=[*cbs, BatchTransformXCallback(lambda x: x.float()/255)])
    else: learn = learner(*cbs, data=data, norm=True, opt=partial(torch.optim.SGD, momentum=.9))
    if state != 'new': learn.fit(1)
    if state == 'with gradients': sum(p.sum() for p in learn.model.parameters()).backward()
    held = noise.mean, noise.deep['all'][0], learn.cb(AvgStatsCallback).rows, list(learn.model.parameters()), noise.g
    for name, look in LOOKS.items():
        if name == 'results' and kind != 'items': continue
        before, mean = everything(learn), noise.mean.clone()
        look(learn)
        assert everything(learn) == before and noise.mean.equal(mean) and noise.deep['all'][0].equal(mean), name
    now = noise.mean, noise.deep['all'][0], learn.cb(AvgStatsCallback).rows, list(learn.model.parameters()), noise.g
    assert all(a is b for a, b in zip(held[:3], now)) and all(a is b for a, b in zip(held[3], now[3])) and held[4] is now[4]      # the very same objects
    plt.close('all')


@pytest.mark.parametrize('opt', [sgd_mom_opt, adam_opt(), partial(torch.optim.SGD, momentum=.9), torch.optim.Adam], ids=['momentum', 'adam', "torch's SGD", "torch's Adam"])
@pytest.mark.parametrize('seed', [0, None])
def test_training_goes_the_same_with_and_without_looks(seed, opt):
    "The same thing from the other side: not what was put back is compared, but what comes of it."
    def run(look):
        set_seed(1)
        learn = learner(table(), Noise(), data=toy(seed), norm=True, opt=opt, lr=.01)
        for _ in range(3):
            if look:
                for name, f in LOOKS.items():
                    if name != 'results': f(learn)
            learn.fit(1)
        return weights(learn), [[v for k, v in r.items() if k != 'time'] for r in learn.cb(AvgStatsCallback).rows]
    (a, rows_a), (b, rows_b) = run(True), run(False)
    assert a.equal(b) and rows_a == rows_b and len(rows_a) == 3


class Noisy(torch.utils.data.Dataset):
    "Items that draw from generators of the set's own."
    def __init__(self): self.g, self.n = torch.Generator().manual_seed(1), np.random.default_rng(1)
    def __len__(self): return 64
    def __getitem__(self, i): return X[i] + torch.randn(10, generator=self.g) + float(self.n.random()), Y[i]


class Batches:
    "A batch sampler with a generator of its own."
    def __init__(self): self.generator = torch.Generator().manual_seed(0)
    def __iter__(self): return iter(torch.randperm(96, generator=self.generator).view(-1, 8).tolist())
    def __len__(self): return 12


@pytest.mark.parametrize('name', [n for n in LOOKS if n != 'results'])
def test_generators_of_data_sets_and_samplers(name):
    ds, batches = Noisy(), Batches()
    for dl, state in ((DataLoader(ds, 16), lambda: (ds.g.get_state().tolist(), ds.n.bit_generator.state)),
                      (DataLoader(TensorDataset(X, Y), batch_sampler=batches), lambda: batches.generator.get_state().tolist())):
        learn = learner(data=DataBunch(dl, DataLoader(torch.utils.data.Subset(dl.dataset, range(32)), 16)))
        was = state()
        LOOKS[name](learn)
        assert state() == was


def test_a_look_in_the_middle_of_a_fit():
    class Looks(Callback):
        def after_epoch(self, run):
            run.validate()
            summary(run)
            run.get_preds(run.data.train_dl)
    def run(*cbs):
        set_seed(1)
        return learner(table(), Noise(), *cbs, norm=True).fit(3)
    assert weights(run(Looks())).equal(weights(run())) and run(Looks()).n_iter == 12


def test_predictions_that_fail_leave_nothing_behind():
    class Two(nn.Sequential):
        def forward(self, x): return super().forward(x), 'two'
    learn = learner(table(), norm=True).fit(1)
    learn.model.__class__, cbs, kept = Two, list(learn.cbs), []
    for look in (learn.get_preds, partial(show_results, learn, 2)):
        with pytest.raises(Exception) as e: look()                          # the traceback lives, and all that it holds
        kept.append(e)
        assert torch.is_grad_enabled() and learn.cbs == cbs and learn.logger is print and not any(m._forward_hooks for m in learn.model.modules())
    learn.model.__class__ = nn.Sequential
    now = weights(learn.fit(1))
    kept.clear()
    gc.collect()
    assert learn.n_iter == 8 and weights(learn).equal(now)


# what a summary says

class Odd(nn.Module):
    "Two outputs, one of them deeper down, and a string."
    def __init__(self): super().__init__(); self.body, self.rnn, self.odd = nn.Linear(10, 8), nn.LSTM(8, 5, batch_first=True), Says()
    def forward(self, b):
        out, (h, c) = self.rnn(self.body(b['x'])[:, None])
        return {'out': out, 'h': self.odd(h)}


class Says(nn.Module):
    def forward(self, x): return x, 'word'


def rows_of(out): return {l.split()[0]: l.split() for l in out.splitlines()[2:-1]}


def test_summary_measures(capsys):
    learn = learner(norm=True, opt=sgd_mom_opt)
    learn.model[0].requires_grad_(False)
    summary(learn)
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert '(32, 10)' in out.splitlines()[0] and list(rows) == list('01234')
    assert [(r[1], int(r[4].replace(',', ''))) for r in rows.values()] == [('Linear', 220), ('BatchNorm1d', 40), ('Dropout', 0), ('ReLU', 0), ('Linear', 63)]
    assert [' '.join(r[2:4]) for r in rows.values()] == ['(32, 20)']*4 + ['(32, 3)'] and ['frozen' in r for r in rows.values()] == [True] + [False]*4
    assert '323 parameters, 103 of them train' in out and 'cross_entropy' in out and 'momentum_step' in out
    summary(learner(opt=torch.optim.AdamW))
    assert 'optimizer AdamW' in capsys.readouterr().out


def test_shapes_of_several_inputs_and_outputs_and_of_data_without_targets():
    learn = Learner(Odd(), DataBunch([{'x': X[:4]}], None), None)
    *rows, (_, model, given) = layer_shapes(learn)
    assert given == {'x': (4, 10)} and model is learn.model
    assert [(n, out) for n, _, out in rows] == [('body', (4, 8)), ('rnn', [(4, 1, 5), [(1, 4, 5), (1, 4, 5)]]), ('odd', [(1, 4, 5), 'str'])]


def test_callbacks_that_shape_a_batch_are_at_work():
    learn = Learner(nn.Linear(5, 3), toy(), F.cross_entropy, cbs=BatchTransformXCallback(lambda x: x[:, :5]))
    assert layer_shapes(learn)[-1][2] == (32, 5)


@pytest.mark.parametrize('data', [DataBunch(None, toy().valid_dl), DataBunch([], None), DataBunch(DataLoader(TensorDataset(X[:8], Y[:8]), 64, drop_last=True), None)])
def test_no_data_is_told(data):
    with pytest.raises(ValueError): summary(Learner(net(), data, F.cross_entropy))
    if data.valid_dl is None:
        with pytest.raises(ValueError): show_results(Learner(net(), data, F.cross_entropy))


# what results show

def shown(monkeypatch):
    out = []
    monkeypatch.setattr('exp.looking.show_images', lambda xs, titles, title, cols: out.append((xs, titles, title)))
    return out


def test_results_are_of_all_the_set_and_right_where_they_say_so(monkeypatch, data_home):
    out, data = shown(monkeypatch), pictures(data_home, 200)
    learn = get_learner([8, 8], data, .1, conv_layer, cbs=[BatchTransformXCallback(lambda x: x.float()/255)]).fit(1)
    n = len(data.valid_ds)
    for k in (6, 10_000):
        show_results(learn, k)
        xs, titles, title = out.pop()
        at = [i*n//min(k, n) for i in range(min(k, n))]
        preds, ys = learn.get_preds()
        assert len(xs) == len(at) and all(x.equal(data.valid_ds[i][0]) for x, i in zip(xs, at))
        for i, t in zip(at, titles):
            said, true = (readable(data.classes[j]) for j in (preds[i].argmax(), ys[i]))
            assert t == (said if said == true else f'{said}\nnot: {true}')
        assert title.startswith(f'{sum("not:" not in t for t in titles)} of {len(at)} ')
    assert {'not:' in t for t in titles} == {True, False}


def test_results_without_a_data_block(monkeypatch):
    out = shown(monkeypatch)
    x, y = torch.rand(10, 3, 4, 4), torch.arange(10) % 3
    learn = Learner(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), DataBunch(*get_dls(Dataset(x, y), Dataset(x, y), 5), 3, 3), F.cross_entropy)
    for n in (8, 50): show_results(learn, n)
    assert [len(xs) for xs, _, _ in out] == [8, 10] and all(t.split('\n')[0] in '012' for _, titles, _ in out for t in titles)


def test_results_of_items_that_draw(monkeypatch):
    class Pictures(Noisy):
        def __getitem__(self, i): return torch.rand(3, 4, 4, generator=self.g) + torch.rand(1) + float(self.n.random()), Y[i]
    shown(monkeypatch)
    dl = DataLoader(Pictures(), 16)
    learn = Learner(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), DataBunch(dl, dl), F.cross_entropy)
    was = dl.dataset.g.get_state(), dl.dataset.n.bit_generator.state, torch.get_rng_state()
    show_results(learn)
    assert dl.dataset.g.get_state().equal(was[0]) and dl.dataset.n.bit_generator.state == was[1] and torch.get_rng_state().equal(was[2])
