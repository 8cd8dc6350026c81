"""The Learner of 09b: beside a bare loop and Runner, under faults at every event, and looked at without a trace."""
import csv
import gc
import hashlib
import math
import os
import random
import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from event_log import Log
from conftest import ROOT, largest_file
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

from exp.annealing import ParamScheduler
from exp.batchnorm import conv_layer
from exp.callbacks import (EVENTS, AvgStatsCallback, BatchTransformXCallback, Callback, CancelBatchException, CancelEpochException,
                           CancelFitException, CudaCallback, DataBunch, Dataset, Recorder, Runner, accuracy, get_dls, get_hypers)
from exp.data_block import (ImageList, NormalizeBytes, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb, parent_labeler,
                            to_byte_tensor)
from exp.learner import (CancelStepException, CSVLogger, EarlyStopping, GradientAccumulation, GradientClip, Learner, SaveBest, SumStats,
                         TensorBoardCallback, get_learner, in_order, set_seed, split_batch, spread_lrs)
from exp.optimizers import adam_opt, sgd_mom_opt, sgd_opt, norm_bias_groups

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(140, 10, generator=G), torch.randint(0, 3, (140,), generator=G)


def toy(bs=32, seed=0): return DataBunch(*get_dls(Dataset(X[:100], Y[:100]), Dataset(X[100:], Y[100:]), bs, seed=seed), 10, 3)


def net(norm=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), *([nn.BatchNorm1d(20), nn.Dropout(.3)] if norm else []), nn.ReLU(), nn.Linear(20, 3))


def learner(*cbs, data=None, opt_func=torch.optim.SGD, norm=False, **kw):
    return Learner(net(norm), data or toy(), F.cross_entropy, opt_func, **{'lr': .1, **kw}, cbs=list(cbs))


def weights(learn): return torch.cat([t.detach().flatten().double() for t in learn.model.state_dict().values()])


# the loop

@pytest.mark.parametrize('opt_func', [torch.optim.SGD, partial(torch.optim.AdamW, weight_decay=.1), partial(torch.optim.SGD, momentum=.9)])
def test_same_as_a_bare_loop_to_the_bit(opt_func):
    learn = learner(opt_func=opt_func, norm=True).fit(3)
    model, data = net(norm=True), toy()
    opt = opt_func(model.parameters(), lr=.1)
    for _ in range(3):
        model.train()
        for xb, yb in data.train_dl:
            F.cross_entropy(model(xb), yb).backward()
            opt.step()
            opt.zero_grad()
        for _ in data.valid_dl: pass                                           # a loader draws from torch's generator as it starts
    assert all(a.equal(b) for a, b in zip(learn.model.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize('mine, torchs', [(sgd_opt, torch.optim.SGD), (sgd_mom_opt, partial(torch.optim.SGD, momentum=.9)),
                                          (adam_opt(), partial(torch.optim.Adam, betas=(.9, .99), eps=1e-5))])
def test_works_with_our_optimizers_and_torchs(mine, torchs):
    a, b = (learner(opt_func=f, lr=.01).fit_one_cycle(2, moms=None) for f in (mine, torchs))
    assert torch.allclose(weights(a), weights(b), atol=1e-5)


def test_callbacks_of_earlier_notebooks_see_what_they_saw_in_runner():
    def cbs(): return [AvgStatsCallback(accuracy, silent=True), Recorder(), CudaCallback('cpu'), BatchTransformXCallback(lambda x: x*2), ParamScheduler('lr', lambda p: .1*(1 - p))]
    a, b, model = cbs(), cbs(), net()
    Runner(model, toy(), F.cross_entropy, torch.optim.SGD(model.parameters(), lr=.1), a).fit(2)
    learn = learner(*b).fit(2)
    assert weights(learn).equal(torch.cat([t.flatten().double() for t in model.state_dict().values()]))
    assert a[1].losses == b[1].losses and a[1].hypers == b[1].hypers
    assert [{k: v for k, v in r.items() if k != 'time'} for r in a[0].rows] == [{k: v for k, v in r.items() if k != 'time'} for r in b[0].rows]


def test_events_are_runners():
    a, b, model = Log(), Log(), net()
    Runner(model, toy(), F.cross_entropy, torch.optim.SGD(model.parameters(), lr=.1), [a]).fit(2)
    learner(b).fit(2)
    assert a.seen == b.seen and b.seen.count('begin_epoch') == 2                 # the class of 2019: four


@pytest.mark.parametrize('error, after, cut', [(CancelBatchException, 'after_cancel_batch', 'after_batch'),
                                               (CancelEpochException, 'after_cancel_epoch', 'after_batch'), (CancelFitException, 'after_cancel_fit', 'after_epoch')])
@pytest.mark.parametrize('at', ['begin_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step'])
def test_cancelling_ends_what_it_says_and_no_more(at, error, after, cut):
    log, rec = Log(at, error, nth=2), Recorder()
    learn = learner(log, rec).fit(2)
    seen, i = log.seen, log.seen.index(after)
    assert seen.count(after) == 1 and seen[-1] == 'after_fit' and seen.count('after_fit') == 1 and seen[i-1] == at
    n = {CancelBatchException: 7, CancelEpochException: 1 + 4, CancelFitException: 1}[error]       # 2 epochs of 4 batches
    assert len(rec.losses) == n, 'the recorder must not see the cancelled batch'
    assert seen[i+1] == {CancelBatchException: 'begin_batch', CancelEpochException: 'begin_validate', CancelFitException: 'after_fit'}[error]
    assert all(p.grad is None for p in learn.model.parameters())


def test_a_cancelled_batch_leaves_no_gradient_to_the_next():
    a = learner(Log('after_backward', CancelBatchException)).fit(1)
    class Skip:
        def begin_batch(self, run):
            if run.in_train and run.iter == 0: raise CancelBatchException
    assert weights(a).equal(weights(learner(Skip()).fit(1)))


@pytest.mark.parametrize('at', EVENTS)
def test_after_an_error_anywhere_the_learner_is_as_before(at):
    class Swaps(Callback):
        _order, ended = -50, False
        def begin_fit(self, run): run.loss_func, run.logger, run.model = (lambda p, y: F.cross_entropy(p, y)*2), None, nn.Sequential(run.model)
        def after_fit(self, run): self.ended = True
    helper = {'after_cancel_batch': CancelBatchException, 'after_cancel_epoch': CancelEpochException, 'after_cancel_fit': CancelFitException}.get(at)
    learn, last = learner(AvgStatsCallback(accuracy, silent=True)), Swaps()
    last._order = 50
    before = learn.cbs, learn.loss_func, learn.logger, learn.model, learn.data
    with pytest.raises(ZeroDivisionError):
        learn.fit(2, [*([Log('after_loss', helper)] if helper else []), ParamScheduler('lr', lambda pos: 7.), Swaps(), Log(at, ZeroDivisionError), last])
    assert last.ended, 'after_fit must reach the callbacks after the one that failed'
    assert (learn.cbs, learn.loss_func, learn.logger, learn.model, learn.data) == before
    assert get_hypers(learn.opt)[0]['lr'] == .1 and all(p.grad is None for p in learn.model.parameters())
    log = Log()
    learn.fit(1, log)
    assert log.seen[0] == 'begin_fit' and learn.cbs == before[0]


def test_keyboard_interrupt_cleans_up_too():
    learn = learner()
    with pytest.raises(KeyboardInterrupt): learn.fit(1, Log('after_pred', KeyboardInterrupt))
    assert learn.cbs == [] and not learn.calls['after_pred']


def test_an_error_inside_an_except_block_of_the_caller():
    try: raise ZeroDivisionError
    except ZeroDivisionError: learner(Log()).fit(1)                             # a fit that goes well, while another error is being handled


def test_misspelt_events_are_named_and_add_nothing():
    class Typo:
        def after_bacth(self, run): pass
    learn = learner()
    for f in (lambda: learn.add_cbs(Typo()), lambda: learn.fit(1, Typo()), lambda: learner(Typo())):
        with pytest.raises(AttributeError, match='after_bacth.*did you mean after_batch'): f()
    assert learn.cbs == []


def test_callbacks_come_and_go_in_the_middle():
    class Comes:
        n = 0
        def after_batch(self, run): self.n += 1
    class Brings:
        def __init__(self): self.guest = Comes()
        def begin_batch(self, run):
            if run.in_train and run.iter == 1: run.add_cbs(self.guest)
            if run.in_train and run.iter == 3: run.remove_cbs(self.guest)
    learn = learner(b := Brings()).fit(1)
    assert b.guest.n == 2 and learn.cbs == [b]


def test_no_more_reads_from_the_device_for_more_batches():
    class Recorder2019(Callback):
        def begin_fit(self, run): self.losses = []
        def after_batch(self, run): self.losses.append(run.loss.detach().cpu())
    class Reads(TorchFunctionMode):
        n, all = 0, {getattr(torch.Tensor, n) for n in 'item tolist cpu numpy __float__ __int__ __bool__'.split()}
        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.n += func in self.all
            return func(*args, **(kwargs or {}))
    def reads(data, recorder=Recorder):
        learn = learner(AvgStatsCallback(accuracy, silent=True), recorder(), ParamScheduler('lr', lambda pos: .1), GradientClip(1.), data=data)
        with Reads() as r: learn.fit(1)
        return r.n
    few, many = [DataBunch([(X[:8], Y[:8])]*n, [(X[:8], Y[:8])]*n) for n in (2, 40)]
    assert reads(few) == reads(many) and reads(many, Recorder2019) > reads(few, Recorder2019) + 30       # and the check sees something


@pytest.mark.parametrize('opt_func', [sgd_mom_opt, adam_opt(), partial(torch.optim.SGD, momentum=.9)])
def test_fit_twice_goes_on(opt_func):
    def run(*fits):
        learn = learner(opt_func=opt_func, lr=.01)
        for epochs, reset in fits: learn.fit(epochs, reset_opt=reset)
        return weights(learn)
    assert run((2, False)).equal(run((1, False), (1, False))) and not run((2, False)).equal(run((1, False), (1, True)))


def test_a_fit_broken_off_goes_on_from_its_batch():
    "Data in one order, so that what was skipped can be told."
    dl = [(X[i:i+10], Y[i:i+10]) for i in range(0, 100, 10)]
    data = DataBunch(dl, dl[:2])
    whole, parts = (learner(ParamScheduler('lr', lambda pos: .1*(1 - pos)), data=data, opt_func=partial(torch.optim.SGD, momentum=.9)) for _ in range(2))
    whole.fit(3)
    with pytest.raises(ZeroDivisionError): parts.fit(3, Log('begin_batch', ZeroDivisionError, nth=12 + 5))       # in epoch 1, before its batch 4
    parts.fit(3, start=(1, 4))
    assert weights(whole).equal(weights(parts))


def test_one_cycle_goes_on_from_where_it_was():
    dl = [(X[i:i+10], Y[i:i+10]) for i in range(0, 100, 10)]
    whole, parts = (learner(data=DataBunch(dl, dl[:2]), opt_func=sgd_mom_opt) for _ in range(2))
    whole.fit_one_cycle(3, .1)
    with pytest.raises(ZeroDivisionError): parts.fit_one_cycle(3, .1, cbs=Log('begin_batch', ZeroDivisionError, nth=12 + 5))
    parts.fit_one_cycle(3, .1, start=(1, 4))
    assert weights(whole).equal(weights(parts))


def test_epochs_must_make_sense():
    with pytest.raises(ValueError, match='0 or more'): learner().fit(-1)
    assert learner().fit(0).n_iter == 0


# groups

def test_a_splitter_may_give_names_and_hypers():
    "As `norm_bias_groups` does: decay reaches the weights and nothing else."
    learn = learner(lr=.1, opt_func=partial(sgd_mom_opt, wd=.5), splitter=norm_bias_groups)
    opt = learn.make_opt()
    assert [h['wd'] for h in opt.hypers] == [.5, 0.] and {h['lr'] for h in opt.hypers} == {.1}
    assert {opt.names[p] for p in opt.param_groups[1]} == {n for n, p in learn.model.named_parameters() if p.ndim < 2}
    assert learn.fit(1).n_iter > 0
    with pytest.raises(ValueError, match='leaves out'): learner(splitter=lambda m: norm_bias_groups(m)[:1]).fit(1)


def test_rates_by_group_reach_the_right_parameters():
    learn = learner(lr=slice(.001, .1), splitter=lambda m: [[*m[0].parameters()], [*m[2].parameters()]])
    before, data = [p.detach().clone() for p in learn.model.parameters()], learn.data.train_dl
    model = net()
    state = data.generator.get_state()
    xb, yb = next(iter(data))
    data.generator.set_state(state)
    F.cross_entropy(model(xb), yb).backward()
    learn.fit(1, Log('after_step', CancelFitException))
    for p, b, m, lr in zip(learn.model.parameters(), before, model.parameters(), (.001, .001, .1, .1)):
        assert torch.allclose(p, b - lr*m.grad, atol=1e-7) and not p.equal(b)


def test_splitters_and_rates_that_do_not_fit():
    assert spread_lrs(slice(1e-4, 1e-2), 3) == pytest.approx([1e-4, 1e-3, 1e-2])
    with pytest.raises(ValueError, match='2 learning rates for 1'): learner(lr=[.1, .2]).fit(1)
    with pytest.raises(ValueError, match='leaves out 2 parameters .*2.weight'): learner(splitter=lambda m: [[*m[0].parameters()]]).fit(1)
    learn = learner(splitter=lambda m: [[*m[0].parameters()]])
    learn.model[2].requires_grad_(False)
    learn.fit(1)                                                               # frozen on purpose: nothing to say


def test_one_cycle_by_group_and_back():
    rec = Recorder()
    learn = learner(rec, opt_func=partial(torch.optim.SGD, momentum=.9), splitter=lambda m: [[*m[0].parameters()], [*m[2].parameters()]], lr=[.01, .1])
    learn.fit_one_cycle(5)
    lrs, moms = rec.hypers['lr'], rec.hypers['momentum']
    assert lrs[0] == pytest.approx(.1/25) and max(lrs) == pytest.approx(.1) and lrs.index(max(lrs)) == 5 and lrs[-1] < .01
    assert moms[0] == pytest.approx(.95) and min(moms) == pytest.approx(.85) and moms.index(min(moms)) == 5
    assert [h['lr'] for h in get_hypers(learn.opt)] == [.01, .1] and get_hypers(learn.opt)[0]['momentum'] == .9


# looking

def everything(learn):
    "A hash of all that a look could change: written without the learner's own list of it."
    h = hashlib.sha256()
    def add(o):
        if torch.is_tensor(o): h.update(repr((o.dtype, o.shape)).encode() + o.detach().contiguous().numpy().tobytes())
        elif isinstance(o, dict): [add((k, v)) for k, v in o.items()]
        elif isinstance(o, (list, tuple)): [add(v) for v in o]
        else: h.update(repr(o).encode())
    add([(n, t) for n, t in learn.model.state_dict().items()])
    add([(m.training, len(m._forward_hooks)) for m in learn.model.modules()])
    add([p.grad for p in learn.model.parameters()])
    add(learn.opt.state_dict() if learn.opt is not None else None)
    add([torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]])
    for dl in (learn.data.train_dl, learn.data.valid_dl):
        add([dl.generator.get_state() if dl.generator is not None else None, getattr(dl, 'epoch', None)])
    add([learn.epoch, learn.n_epochs, learn.iter, learn.n_iter, learn.in_train, [id(cb) for cb in learn.cbs], id(learn.opt), id(learn.logger), id(learn.loss_func)])
    add([(k, v) for cb in learn.cbs for k, v in vars(cb).items() if isinstance(v, (int, float, str, list))])
    return h.hexdigest()


def pictures(data_home, n=40, **kw):
    il = ImageList.from_files(data_home/'data'/'drawn-shapes-160', include=('train', 'val'), tfms=[make_rgb, ResizeFixed(32), to_byte_tensor])
    sd = label_by_func(SplitData.split_by_func(il.new(il.items[::max(1, 1100//n)]), partial(grandparent_splitter, valid_name='val')), parent_labeler)
    return sd.to_databunch(8, seed=1, **{'in_memory': True, **kw})


class Noise(Callback):
    "Shapes each batch, drawing from every generator there is, and counts."
    def __init__(self): self.g, self.n = torch.Generator().manual_seed(5), 0
    def begin_batch(self, run): run.xb = run.xb + .01*torch.randn(1, generator=self.g) + .01*torch.rand(1) + .01*random.random() + .01*np.random.rand(); self.n += 1


def looks():
    def fails(learn):
        class Fails:
            n = 0
            def after_step(self, run): self.n += 1; 1/(self.n - 5)
        learn.add_cbs(f := Fails())
        with pytest.raises(ZeroDivisionError): learn.lr_find(max_iter=20)
        learn.remove_cbs(f)
    def fails_in_validate(learn):
        with pytest.raises(ZeroDivisionError), learn.looking(Log('after_loss', ZeroDivisionError)):
            learn('begin_fit')
            learn.one_pass(learn.data.train_dl, False)
    return {'lr_find': lambda l: l.lr_find(max_iter=20), 'lr_find that fails': fails, 'summary': lambda l: l.summary(), 'show_results': lambda l: l.show_results(4),
            'validate': lambda l: l.validate(), 'validate on training': lambda l: l.validate(l.data.train_dl), 'get_preds': lambda l: l.get_preds(),
            'get_preds on training': lambda l: l.get_preds(l.data.train_dl), 'predict': lambda l: l.predict(l.data.valid_dl.dataset[0][0] if not hasattr(l.data, 'source') else l.data.source.valid.x.items[0]),
            'a look that fails': fails_in_validate, 'show_batch': lambda l: l.data.show_batch() if hasattr(l.data, 'show_batch') else None}


@pytest.mark.parametrize('fitted', [False, True], ids=['new', 'fitted'])
@pytest.mark.parametrize('kind', ['items', 'seeded', 'global'])
def test_looking_leaves_no_trace(kind, fitted, data_home):
    import matplotlib.pyplot as plt
    data = pictures(data_home) if kind == 'items' else toy(seed=0 if kind == 'seeded' else None)
    set_seed(0)
    cbs = [AvgStatsCallback(accuracy, silent=True), Recorder(), CudaCallback('cpu'), Noise(), ParamScheduler('lr', lambda pos: .05)]
    if kind == 'items':
        learn = get_learner([8, 8], data, .1, conv_layer, opt_func=adam_opt(), cbs=[*cbs, BatchTransformXCallback(lambda x: x.float()/255)])
        cbs[3]._order = 5
    else: learn = learner(*cbs, data=data, norm=True, opt_func=partial(torch.optim.SGD, momentum=.9))
    if fitted: learn.fit(1)
    for name, look in looks().items():
        if name == 'show_results' and kind != 'items': continue
        before = everything(learn)
        look(learn)
        assert everything(learn) == before, name
        plt.close('all')


@pytest.mark.parametrize('opt_func', [sgd_mom_opt, adam_opt(), partial(torch.optim.SGD, momentum=.9), partial(torch.optim.Adam)], ids=['momentum', 'adam', "torch's SGD", "torch's Adam"])
def test_steps_taken_inside_leave_no_trace_in_what_is_remembered(opt_func):
    "Not in the optimizer's averages, nor in the lists of callbacks; and those who hold such a list or tensor still hold the one in use."
    def run(inside):
        set_seed(1)
        learn = learner(st := AvgStatsCallback(accuracy, silent=True), rec := Recorder(), data=toy(seed=0), norm=True, opt_func=opt_func, lr=.01)
        learn.fit(1)
        rows, losses, state = st.rows, rec.losses, {p: dict(s) for p, s in learn.opt.state.items()}
        if inside:
            with pytest.raises(ZeroDivisionError), learn.untouched(): learn.fit(2); raise ZeroDivisionError
        assert st.rows is rows and len(rows) == 1 and rec.losses == losses and len(losses) == len(learn.data.train_dl)
        assert all(v is state[p][k] for p, s in learn.opt.state.items() for k, v in s.items() if torch.is_tensor(v))
        learn.fit(1)
        return weights(learn), [r['train_loss'] for r in st.rows]
    (a, rows_a), (b, rows_b) = run(True), run(False)
    assert a.equal(b) and rows_a == rows_b


@pytest.mark.parametrize('seed', [0, None])
def test_training_goes_the_same_with_and_without_looks(seed):
    "The same thing from the other side: not what was put back is compared, but what comes of it."
    def run(look):
        set_seed(1)
        learn = learner(Noise(), data=toy(seed=seed), norm=True, opt_func=sgd_mom_opt)
        for i in range(2):
            if look: learn.lr_find(max_iter=9); learn.summary(); learn.validate(); learn.get_preds(learn.data.train_dl); learn.predict(X[0])
            learn.fit(1)
        return weights(learn)
    assert run(True).equal(run(False))


def test_lr_find_finds_the_edge():
    "A quadratic bowl of curvature 2: plain SGD diverges above lr = 1, so the loss turns up near there, and the advice is below."
    class Bowl(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.full((1,), 5.))
        def forward(self, x): return self.w.expand(len(x), 1)
    data = DataBunch([(torch.zeros(4, 1), torch.zeros(4, 1))]*50, None)
    f = Learner(Bowl(), data, F.mse_loss, torch.optim.SGD, lr=.1).lr_find(1e-4, 100, 100)
    assert .01 < f.suggestion < 1 and f.lrs[f.losses.index(min(f.losses))] < 3


# reading off

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60))
def test_validation_counts_each_item_once_whatever_the_batches(bs):
    learn = learner(AvgStatsCallback(accuracy, silent=True))
    r = learn.validate(DataLoader(TensorDataset(X, Y), bs))
    with torch.no_grad(): pred = learn.model.eval()(X)
    assert r['loss'] == pytest.approx(F.cross_entropy(pred, Y).item(), abs=1e-5) and r['accuracy'] == pytest.approx(accuracy(pred, Y).item(), abs=1e-6)


def test_get_preds_keeps_the_order(data_home):
    learn = learner()
    with torch.no_grad(): want = learn.model.eval()(X)
    for dl in (DataLoader(TensorDataset(X, Y), 32), DataLoader(TensorDataset(X, Y), 32, shuffle=True), DataLoader(TensorDataset(X, Y), 32, shuffle=True, drop_last=True), DataLoader(TensorDataset(X, Y), 32, drop_last=True)):
        p, y = learn.get_preds(dl)
        assert torch.allclose(p, want, atol=1e-6) and y.equal(Y)
    p, y = learn.get_preds([X[:90], X[90:]])
    assert torch.allclose(p, want, atol=1e-6) and y is None
    data = pictures(data_home, in_memory=False, num_workers=0)
    pix = get_learner([8], data, .1, conv_layer, cbs=BatchTransformXCallback(lambda x: x.float()/255))
    p, y = pix.get_preds(data.train_dl)
    assert y.tolist() == [data.train_ds[i][1] for i in range(len(data.train_ds))] and in_order(data.valid_dl) is data.valid_dl
    assert learn.get_preds(act=partial(torch.softmax, dim=1))[0].sum(1).allclose(torch.ones(40))


def test_test_set_and_predict(data_home):
    il = ImageList.from_files(data_home/'data'/'drawn-shapes-160', include=('train', 'val'), tfms=[make_rgb, ResizeFixed(32), to_byte_tensor])
    sd = label_by_func(SplitData.split_by_func(il.new(il.items[::20]), partial(grandparent_splitter, valid_name='val')), parent_labeler)
    sd = sd.add_test(ImageList(sd.valid.x.items, sd.valid.x.path))
    data = sd.to_databunch(8, seed=0, num_workers=0)
    learn = get_learner([8], data, .1, conv_layer, cb_funcs=[CudaCallback, partial(BatchTransformXCallback, NormalizeBytes.fit(sd.train))]).fit(1)
    preds, none = learn.get_preds(data.test_dl)
    assert none is None and torch.allclose(preds, learn.get_preds()[0].cpu(), atol=1e-5)      # the same files, with and without labels
    from PIL import Image
    f = sd.valid.x.items[3]
    label, probs = learn.predict(f)
    assert label == data.classes[preds[3].argmax()] and torch.allclose(probs, preds[3].softmax(0), atol=1e-4)
    assert learn.predict(str(f))[0] == learn.predict(Image.open(f))[0] == learn.predict(sd.valid[3][0])[0] == label


def test_predictions_in_words_for_several_labels_and_for_numbers(data_home):
    il = ImageList.from_files(data_home/'data'/'drawn-shapes-160', include=('train', 'val'), tfms=[make_rgb, ResizeFixed(16), to_byte_tensor])
    sd = SplitData.split_by_func(il.new(il.items[::40]), partial(grandparent_splitter, valid_name='val'))
    from exp.data_block import MultiCategoryProcessor, NumberProcessor
    multi = label_by_func(sd, lambda f: [parent_labeler(f), 'picture'], proc_y=MultiCategoryProcessor()).to_databunch(8, num_workers=0)
    learn = Learner(nn.Identity(), multi, F.binary_cross_entropy_with_logits)
    words, p = learn.decode(torch.tensor([5.] + [-5.]*(multi.c_out - 2) + [5.]))
    assert words == [multi.classes[0], multi.classes[-1]] and p[0] == pytest.approx(torch.tensor(5.).sigmoid().item())
    number = label_by_func(sd, lambda f: len(parent_labeler(f)), proc_y=NumberProcessor(standardise=True)).to_databunch(8, num_workers=0)
    proc = number.source.train.y.procs[-1]
    value, _ = Learner(nn.Identity(), number, F.mse_loss).decode(torch.tensor([1.]))
    assert value == pytest.approx((proc.mean + proc.std).item(), rel=1e-5)


def test_summary_measures(capsys):
    learner(norm=True).summary()
    out = capsys.readouterr().out
    assert '(32, 20)' in out and '(32, 3)' in out and f'{10*20 + 20 + 40 + 20*3 + 3:,} parameters' in out and 'BatchNorm1d' in out


def test_over_two_processes_the_numbers_are_those_of_all_the_data(tmp_path):
    script = tmp_path/'two.py'
    script.write_text(textwrap.dedent(f'''
        import os, sys, json, torch, torch.nn.functional as F
        from torch import nn
        from exp.callbacks import AvgStatsCallback, DataBunch, Dataset, accuracy, get_dls
        from exp.learner import Learner, SumStats
        from exp.optimizers import sgd_opt
        rank = int(sys.argv[1])
        torch.distributed.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=rank, world_size=2)
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(101, 10, generator=g), torch.randint(0, 3, (101,), generator=g)
        mine = slice(0, 70) if rank == 0 else slice(70, 101)                     # shares of unequal size
        torch.manual_seed(0)
        model = nn.Linear(10, 3)
        data = DataBunch(*get_dls(Dataset(x[mine], y[mine]), Dataset(x[mine], y[mine]), 16, seed=0))
        stats = AvgStatsCallback(accuracy, silent=True)
        learn = Learner(model, data, F.cross_entropy, sgd_opt, lr=0., cbs=[stats, SumStats()])
        learn.fit(1)
        with torch.no_grad(): want = [F.cross_entropy(model(x), y).item(), (model(x).argmax(1) == y).float().mean().item()]
        row = stats.rows[0]
        print(json.dumps([want, list(learn.validate().values()), [row['valid_loss'], row['valid_accuracy']], [row['train_loss'], row['train_accuracy']]]))
        torch.distributed.destroy_process_group()
        sys.stdout.flush(); os._exit(0)                                          # torch's threads now and then abort a process that tidies up
    '''))
    import json
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    ps = [subprocess.Popen([sys.executable, str(script), str(r)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT) for r in (0, 1)]
    outs = [p.communicate(timeout=400) for p in ps]
    for (out, err), p in zip(outs, ps):
        assert p.returncode == 0, err
        want, *got = json.loads(out.strip().splitlines()[-1])
        for g in got: assert g == pytest.approx(want, abs=1e-5)


# callbacks

def test_accumulation_is_the_large_batch():
    "Short last batch included: 100 items in 16s, four at a time, against 64 and 36 at once."
    big, small = learner(Recorder(), data=toy(64)), learner(Recorder(), data=toy(16))
    big.fit(3)
    small.fit(3, GradientAccumulation(4))
    assert torch.allclose(weights(big), weights(small), atol=1e-6)
    assert max(small.cb(Recorder).losses) < 2*max(big.cb(Recorder).losses), 'the loss recorded is that of a batch, unscaled'
    assert len(small.cb(Recorder).losses) == 21 and small.n_iter == 21


def test_clipping_comes_after_accumulating():
    class Norms:
        _order = 16
        def __init__(self): self.all = []
        def after_backward(self, run): self.all.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm().item())
    learner(c := Norms(), data=toy(16)).fit(1, [GradientClip(.05), GradientAccumulation(4)])
    assert len(c.all) == 2 and all(n == pytest.approx(.05, rel=1e-3) for n in c.all)


def test_early_stopping_and_the_best(tmp_path):
    stats, best = AvgStatsCallback(accuracy, silent=True), SaveBest(path=tmp_path/'best.pt')
    learn = learner(stats, lr=1.).fit(60, [EarlyStopping(patience=3), best])
    losses = [r['valid_loss'] for r in stats.rows]
    assert len(losses) < 60 and losses.index(min(losses)) == best.best_epoch == len(losses) - 4
    assert learn.validate()['loss'] == pytest.approx(min(losses), rel=1e-5)
    saved = torch.load(tmp_path/'best.pt', weights_only=True)
    assert all(v.equal(saved[k]) for k, v in learn.model.state_dict().items()) and [f.name for f in tmp_path.iterdir()] == ['best.pt']


def test_watching_knows_which_way_is_better_and_what_is_missing():
    assert SaveBest('valid_accuracy').sign == 1 and SaveBest('train_loss').sign == -1 and SaveBest('valid_rmse', bigger=False).sign == -1
    with pytest.raises(ValueError, match="no 'valid_acc'.*valid_accuracy"): learner(AvgStatsCallback(accuracy, silent=True)).fit(1, EarlyStopping('valid_acc'))
    with pytest.raises(ValueError, match='AvgStatsCallback: add one'): learner().fit(1, SaveBest())


def test_early_stopping_is_no_friend_of_nan():
    stats = AvgStatsCallback(silent=True)
    learner(stats, lr=1e30).fit(20, EarlyStopping(patience=2))
    assert len(stats.rows) <= 4


def test_csv(tmp_path):
    stats = AvgStatsCallback(accuracy, silent=True)
    learn = learner(stats, CSVLogger(tmp_path/'h.csv')).fit(2)
    learn.fit(1)
    rows = list(csv.DictReader(open(tmp_path/'h.csv')))
    assert [float(r['valid_loss']) for r in rows] == [r['valid_loss'] for r in stats.rows] and len(rows) == 3
    with pytest.raises(ValueError, match='AvgStatsCallback'): learner().fit(1, CSVLogger(tmp_path/'i.csv'))


def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = learner(AvgStatsCallback(accuracy, silent=True), rec := Recorder()).fit(2, TensorBoardCallback(tmp_path))
    ea = EventAccumulator(str(tmp_path))
    ea.Reload()
    assert [s.value for s in ea.Scalars('batch/loss')] == pytest.approx(rec.losses) and [s.step for s in ea.Scalars('batch/loss')] == list(range(1, 9))
    assert [s.value for s in ea.Scalars('epoch/valid_accuracy')] == pytest.approx([r['valid_accuracy'] for r in learn.cb(AvgStatsCallback).rows])


def test_without_tensorboard_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(ImportError, match='pip install tensorboard'): learner().fit(1, TensorBoardCallback())


# errors for the reader

@pytest.mark.parametrize('shape, yb, loss_func, words', [
    ((4, 3), torch.tensor([0, 2, 1, 12]), F.cross_entropy, '3 outputs.*from 0 to 2; 1 of 4.*12 in row 3'),
    ((4, 3), torch.tensor([0, -1, 1, 1]), nn.CrossEntropyLoss(), '-1 in row 1'),
    ((2, 3, 5), torch.full((2, 5), 7), F.cross_entropy, '10 of 10'),
    ((64, 1), torch.randn(64), F.mse_loss, r'\(64, 1\).*\(64,\).*yb\[:, None\]'),
    ((64,), torch.randn(64, 1), nn.L1Loss(), 'one shape'),
    ((4, 3), torch.tensor([0, 2]), F.cross_entropy, 'one row of each'),
    ((4, 3), torch.tensor([0., 2, 1, 1]), F.cross_entropy, 'class indices, int64'),
    ((4, 3), torch.randn(4, 5), lambda p, y: (p - y).mean(), r'\(4, 3\).*\(4, 5\).*must match'),
    ((4, 3), torch.empty(0), F.cross_entropy, 'no targets')])
def test_a_loss_that_cannot_be_says_why(shape, yb, loss_func, words):
    xb = torch.randn(shape)
    data = DataBunch([(xb, yb) if len(yb) else xb], None)
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.))
    class Anything(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(()))
        def forward(self, x): return model(x)*self.w
    with pytest.raises(ValueError, match='training batch 0 of epoch 0.*' + words): Learner(Anything(), data, loss_func).fit(1)


def test_what_is_allowed_passes():
    for shape, yb, f in [((4, 3), torch.tensor([0, 2, 1, -100]), F.cross_entropy), ((4, 3), torch.rand(4, 3).softmax(1), F.cross_entropy),
                         ((4, 3, 2), torch.randint(0, 3, (4, 2)), nn.CrossEntropyLoss()), ((4,), torch.randn(4), F.mse_loss)]:
        learn = Learner(nn.Identity(), toy(), f)
        learn.pred, learn.yb = torch.randn(shape), yb
        assert learn.get_loss(yb).isfinite()


def test_a_loss_of_many_numbers_or_none():
    with pytest.raises(ValueError, match=r'shape \(32,\).*mean'): learner(data=None).__class__(net(), toy(), partial(F.cross_entropy, reduction='none')).fit(1)
    with pytest.raises(ValueError, match='the loss is a float'): Learner(net(), toy(), lambda p, y: 1.).fit(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_labels_out_of_range_are_found_before_the_gpu_is_lost():
    data = DataBunch([(X[:4], torch.tensor([0, 1, 2, 3]))], None)
    with pytest.raises(ValueError, match='3 outputs'): Learner(net(), data, F.cross_entropy, cbs=CudaCallback('cuda')).fit(1)
    assert (torch.ones(3, device='cuda')*2).sum().item() == 6                   # the device still answers


def test_split_batch():
    for b, n in ((X, 0), ([X], 0), ((X, Y), 140), ([X, Y], 140)): assert split_batch(b)[0] is X and len(split_batch(b)[1]) == n


# the slides, and the same again

def test_the_slides_cell_runs_as_printed(data_home, capsys):
    data, nfs, norm_imagenette = pictures(data_home), [32]*4, lambda x: x.float()/255 - .5
    cbfs = [partial(AvgStatsCallback, accuracy), CudaCallback, partial(BatchTransformXCallback, norm_imagenette)]
    learn = get_learner(nfs, data, 0.4, conv_layer, cb_funcs=cbfs)
    learn.fit(1)
    assert 'valid_accuracy' in capsys.readouterr().out and learn.n_iter == len(data.train_dl)


SAME = '''
import hashlib, sys, torch
from functools import partial
from pathlib import Path
from exp.batchnorm import conv_layer
from exp.callbacks import BatchTransformXCallback
from exp.data_block import ImageList, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb, parent_labeler, to_byte_tensor
from exp.learner import get_learner, set_seed

class Flip:
    "Draws for each picture."
    _order, generator = 11, None
    def __call__(self, im): return im.transpose(0) if torch.rand((), generator=self.generator) < .5 else im

def run(workers):
    il = ImageList.from_files(Path(sys.argv[1]), include=('train', 'val'), tfms=[make_rgb, ResizeFixed(16), Flip(), to_byte_tensor])
    sd = label_by_func(SplitData.split_by_func(il.new(il.items[::12]), partial(grandparent_splitter, valid_name='val')), parent_labeler)
    set_seed(0)
    data = sd.to_databunch(16, seed=0, num_workers=workers)
    learn = get_learner([8, 8], data, .1, conv_layer, cbs=BatchTransformXCallback(lambda x: x.float()/255)).fit_one_cycle(2)
    return hashlib.sha256(b''.join(t.numpy().tobytes() for t in learn.model.state_dict().values())).hexdigest()
if __name__ == '__main__': print(run(0), run(0), run(2))
'''


def test_same_seed_same_weights_twice_in_a_fresh_process_and_with_workers(tmp_path, data_home):
    (tmp_path/'same.py').write_text(SAME)
    outs = []
    for hashseed in '12':
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'PYTHONHASHSEED': hashseed}
        p = subprocess.run([sys.executable, str(tmp_path/'same.py'), str(data_home/'data'/'drawn-shapes-160')], capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
        assert p.returncode == 0, p.stderr
        outs += p.stdout.split()
    assert len(outs) == 6 and len(set(outs)) == 1, outs


def test_set_seed_reaches_every_generator():
    def draws(): set_seed(7); return torch.rand(1).item(), random.random(), np.random.rand()
    assert draws() == draws() and math.isfinite(sum(draws()))


def test_sum_stats_alone_changes_nothing():
    a, b = AvgStatsCallback(accuracy, silent=True), AvgStatsCallback(accuracy, silent=True)
    learner(a).fit(1)
    learner(b, SumStats()).fit(1)
    assert [a.rows[0][k] for k in a.heads[:-1]] == [b.rows[0][k] for k in b.heads[:-1]]


def test_a_step_cancelled_keeps_the_gradient():
    class Once:
        def after_backward(self, run):
            if run.iter == 0: raise CancelStepException
    learn, model = learner(Once(), Log('after_step', CancelFitException)), net()
    state = learn.data.train_dl.generator.get_state()
    (x1, y1), (x2, y2), *_ = iter(learn.data.train_dl)
    learn.data.train_dl.generator.set_state(state)
    learn.fit(1)
    (F.cross_entropy(model(x1), y1) + F.cross_entropy(model(x2), y2)).backward()
    for p, q in zip(learn.model.parameters(), model.parameters()): assert torch.allclose(p, q - .1*q.grad, atol=1e-6)


# found by a second reading

def test_lr_find_with_gradients_that_add_up():
    "The loss was multiplied where others see it, and the search ended at the first short batch."
    found = learner(GradientAccumulation(2)).lr_find(max_iter=30)
    assert len(found.losses) == 30
    class Seen(Callback):
        _order = 50
        def __init__(self): self.l = []
        def after_loss(self, run): self.l.append(run.loss.item())
    for cbs in ([GradientAccumulation(1), s1 := Seen()], [s2 := Seen()]): learner(*cbs).fit(1)
    assert s1.l == s2.l


def test_a_batch_cancelled_on_its_way_back_does_not_count():
    class Cancel(Callback):
        _order = 1
        def after_backward(self, run):
            if run.in_train and run.iter == 1: raise CancelBatchException
    data = DataBunch([(X[i:i+8], Y[i:i+8]) for i in (0, 8, 16, 24)], None)
    a = learner(GradientAccumulation(2), Cancel(), data=data).fit(1)
    b = learner(GradientAccumulation(2), data=DataBunch([(X[i:i+8], Y[i:i+8]) for i in (16, 24)], None)).fit(1)          # what was there went with the cancelled one
    assert torch.allclose(weights(a), weights(b))


def test_messages_about_losses_that_do_not_fit():
    def fails(pred, y, loss=F.cross_entropy):
        class Model(nn.Module):
            def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(()))
            def forward(self, x): return pred*self.w
        with pytest.raises(ValueError) as e: Learner(Model(), DataBunch([(X[:4], y)], None), loss, lr=.1).fit(1)
        return str(e.value)
    assert 'wants a row of scores for each item' in fails(torch.ones(4), torch.tensor([0, 1, 2, 9]))
    assert 'one row of each for every item is wanted' in fails(torch.ones(()), Y[:4])
    def silent(p, y): raise ValueError
    assert '(ValueError: )' in fails(torch.ones(4, 3), Y[:4], silent)
    from exp.learner import _wrong_labels
    l = learner(); l.loss_func, l.pred = partial(F.cross_entropy, ignore_index=255), torch.ones(4, 3)
    assert _wrong_labels(l, torch.tensor([0, 1, 2, 255])) is None and '1 of 4 do not' in _wrong_labels(l, torch.tensor([0, 1, 2, 9]))


def test_a_batch_of_three_parts_and_rates_of_nothing():
    with pytest.raises(ValueError, match='a batch of 3 parts'): split_batch((X, X, Y))
    for bad in (slice(1e-2), slice(0, .1)):
        with pytest.raises(ValueError, match='both above 0'): spread_lrs(bad, 3)
    assert spread_lrs(slice(1e-2), 1) == [1e-2]


def test_the_last_epoch_of_an_early_stop_is_seen_by_all():
    class Late(Callback):
        _order, n = 21, 0
        def after_epoch(self, run): self.n += 1
    late = Late()
    learn = learner(AvgStatsCallback(accuracy, silent=True), EarlyStopping('valid_accuracy', patience=2, min_delta=1.), late).fit(9)
    assert late.n == len(learn.cb(AvgStatsCallback).rows) == 3


def test_a_learner_without_training_data_shows_itself():
    assert 'no training data' in repr(Learner(net(), DataBunch(None, None), F.cross_entropy))


def test_looks_leave_sums_gradients_and_batch_samplers_alone():
    class Sampler:
        def __init__(self): self.generator = torch.Generator().manual_seed(0)
        def __iter__(self): return iter(torch.randperm(96, generator=self.generator).view(-1, 8).tolist())
        def __len__(self): return 12
    dl = DataLoader(TensorDataset(X, Y), batch_sampler=Sampler())
    learn = learner(AvgStatsCallback(accuracy, silent=True), data=DataBunch(dl, dl))
    learn.fit(1)
    F.cross_entropy(learn.model(X), Y).backward()
    stats = learn.cb(AvgStatsCallback).stats
    with torch.no_grad(): learn.model[-1].weight.mul_(-1)                # so that a look at the data has other sums
    def state(): return ([dl.batch_sampler.generator.get_state()] + [t.clone() for f in (True, False) for t in (torch.tensor(stats[f].count), stats[f].totals)] +
                         [p.grad.clone() for p in learn.model.parameters()])
    def trains():
        with learn.untouched(): learn.fit(1)
    def adds_to_gradients():
        with learn.untouched(): F.cross_entropy(learn.model(X), Y).backward()
    for look in (learn.validate, lambda: learn.lr_find(max_iter=5), learn.get_preds, trains, adds_to_gradients):
        before = state()
        look()
        assert all(a.equal(b) for a, b in zip(state(), before, strict=True))


def test_in_order_of_samplers_of_ones_own():
    ds = TensorDataset(X, Y)
    class Shuffled:
        batch_size = 16
        def __iter__(self): return iter(torch.randperm(140).split(16))
        def __len__(self): return 9
    some = torch.utils.data.SubsetRandomSampler([7, 3, 100])
    for dl, want in ((DataLoader(ds, batch_sampler=Shuffled()), X), (DataLoader(ds, 2, sampler=some), X[[3, 7, 100]])):
        assert torch.cat([xb for xb, _ in in_order(dl)]).equal(want)


def test_csv_of_other_columns_or_without_a_table(tmp_path):
    learner(AvgStatsCallback(accuracy, silent=True), CSVLogger(tmp_path/'a/h.csv')).fit(1)
    learner(AvgStatsCallback(accuracy, silent=True), CSVLogger(tmp_path/'a/h.csv')).fit(1)
    with pytest.raises(ValueError, match='another file'): learner(AvgStatsCallback(silent=True), CSVLogger(tmp_path/'a/h.csv')).fit(1)
    with pytest.raises(ValueError, match='add one'): learner(CSVLogger(tmp_path/'b.csv')).fit(1)
    assert len((tmp_path/'a/h.csv').read_text().splitlines()) == 3


def test_show_results_shows_as_many_as_asked_for(monkeypatch):
    shown = []
    monkeypatch.setattr('exp.learner.show_images', lambda xs, titles, title, cols: shown.append(len(xs)))
    d = DataBunch(*get_dls(Dataset(torch.rand(10, 3, 4, 4), torch.arange(10) % 3), Dataset(torch.rand(10, 3, 4, 4), torch.arange(10) % 3), 5), 3, 3)
    l = Learner(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), d, F.cross_entropy)
    for n in (8, 50): l.show_results(n)
    assert shown == [8, 10]


# found by users' scripts

@pytest.mark.parametrize('opt', [torch.optim.SGD, torch.optim.AdamW, sgd_opt, adam_opt()], ids=['SGD', 'AdamW', 'ours', 'our adam'])
def test_groups_of_generators_train(opt):
    split = lambda m: [{'params': m[0].parameters()}, {'params': m[2].parameters()}]
    learn = learner(opt_func=opt, splitter=split)
    before = weights(learn)
    learn.fit(1)
    assert not weights(learn).equal(before)
    assert weights(learn).equal(weights(learner(opt_func=opt, splitter=lambda m: [list(m[0].parameters()), list(m[2].parameters())]).fit(1)))


def test_what_the_optimizer_does_not_know_is_told_at_every_fit():
    trained = lambda m: [[p for p in m.parameters() if p.requires_grad]]
    learn = learner(splitter=trained)
    learn.model[0].requires_grad_(False)
    learn.fit(1)
    learn.model[0].requires_grad_(True)
    for fit in (learn.fit, learn.fit_one_cycle):
        with pytest.raises(ValueError, match='0.weight.*reset_opt=True'): fit(1)
    before = learn.model[0].weight.clone()
    assert not learn.fit(1, reset_opt=True).model[0].weight.equal(before)
    learn.model[2] = nn.Linear(20, 3)
    with pytest.raises(ValueError, match='2.weight.*reset_opt=True'): learn.fit(1)
    learn.model = net()
    with pytest.raises(ValueError, match='leaves out 4 parameters'): learn.fit_one_cycle(1)


def test_predictions_that_fail_leave_nothing_behind():
    learn = learner(AvgStatsCallback(accuracy, silent=True), norm=True).fit(1)
    plain, n = type(learn.model).forward, learn.n_iter
    class Two(nn.Sequential):
        def forward(self, x): return super().forward(x), 'two'
    learn.model.__class__ = Two
    kept = []
    for look in (learn.get_preds, lambda: learn.show_results(2)):
        try: look()
        except Exception as e: kept.append(e)                               # the traceback lives, and all that it holds
        assert torch.is_grad_enabled() and len(learn.cbs) == 1 and learn.logger is print
    assert len(kept) == 2
    learn.model.__class__ = nn.Sequential
    learn.fit(1)
    now = weights(learn)
    kept.clear(); gc.collect()
    assert learn.n_iter == 2*n and weights(learn).equal(now) and plain


@pytest.mark.parametrize('pack', [lambda x: {'x': x}, lambda x: (x, x)], ids=['dict', 'tuple'])
def test_several_inputs_are_counted_by_items(pack):
    torch.manual_seed(0)
    class Takes(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(10, 3)
        def forward(self, b): return self.l(b['x'] if isinstance(b, dict) else b[0])
    batches = [(pack(X[:40]), Y[:40]), (pack(X[40:42]), Y[40:42])]
    model = Takes()
    learn = Learner(model, DataBunch(batches, batches), F.cross_entropy, torch.optim.SGD, lr=.5, cbs=[CudaCallback('cpu'), GradientAccumulation(2)])
    assert learn.validate()['loss'] == pytest.approx(F.cross_entropy(model.l(X[:42]), Y[:42]).item(), abs=1e-6)
    want = model.l.weight - .5*torch.autograd.grad(F.cross_entropy(model.l(X[:42]), Y[:42]), model.l.weight)[0]
    learn.fit(1)
    assert torch.allclose(model.l.weight, want, atol=1e-6)
    learn.summary()


def test_validate_on_a_loader_that_shuffles_and_drops_counts_each_item_once():
    dl = get_dls(Dataset(X[:40], Y[:40]), Dataset(X[:40], Y[:40]), 32, drop_last=True)[0]
    learn = learner()
    assert learn.validate(dl)['loss'] == pytest.approx(F.cross_entropy(learn.model(X[:40]), Y[:40]).item(), abs=1e-6)
    got = learn.validate(metrics=[lambda p, y: torch.tensor(1.), lambda p, y: torch.tensor(2.)])
    assert list(got.values())[1:] == [1., 2.]


class Every3(Callback):
    _order, _fit_only = -20, True
    def begin_validate(self, run):
        if (run.epoch + 1) % 3: raise CancelEpochException


def test_early_stopping_waits_for_validations():
    def row(learn): return [r['epoch'] for r in learn.cb(AvgStatsCallback).rows][-1]
    assert row(learner(AvgStatsCallback(silent=True), Every3(), EarlyStopping(patience=2), lr=0.).fit(20)) == 8        # 2 best, 5 and 8 no better
    assert row(learner(AvgStatsCallback(silent=True), EarlyStopping(patience=2), lr=0.).fit(20)) == 2


def test_less_is_better_where_the_name_says_so():
    for name, bigger in dict(valid_loss=0, valid_mse=0, valid_mae=0, train_rmse=0, valid_error_rate=0, valid_perplexity=0, valid_mean_absolute_error=0,
                             valid_accuracy=1, valid_f1=1, valid_topk=1, valid_dice=1, valid_measure=1).items():
        assert SaveBest(name).sign == EarlyStopping(name).sign == (1 if bigger else -1), name
    assert SaveBest('valid_mse', bigger=True).sign == 1


def test_save_best_makes_its_folder_and_comes_last(tmp_path):
    class Swaps(Callback):                                                   # as EMA does: other weights while it validates, put back later
        _order = 13
        def begin_validate(self, run): self.own = [p.detach().clone() for p in run.model.parameters()]
        def back(self, run):
            for p, o in zip(run.model.parameters(), self.own): p.data.copy_(o)
        after_epoch = after_fit = back
    class Stop(Callback):
        def begin_batch(self, run):
            if not run.in_train and run.epoch == 2: raise KeyboardInterrupt
    best = SaveBest(path=tmp_path/'new/x.pt')
    learn = learner(AvgStatsCallback(silent=True), best, Swaps())
    with pytest.raises(KeyboardInterrupt): learn.fit(4, Stop())
    assert all(v.equal(best.weights[k]) for k, v in learn.model.state_dict().items()) and (tmp_path/'new/x.pt').exists()


def test_a_callback_that_is_there_is_not_added_again():
    learn = learner(rec := Recorder())
    learn.fit(1, rec)
    assert len(rec.losses) == 4 and learn.cbs == [rec]


def test_a_csv_with_a_comma_in_a_name_goes_on(tmp_path):
    def m(pred, yb): return pred.mean()
    m.__name__ = 'mean, of all'
    for _ in range(2): learner(AvgStatsCallback(m, silent=True), CSVLogger(tmp_path/'h.csv')).fit(1)
    rows = list(csv.reader(open(tmp_path/'h.csv')))
    assert len(rows) == 3 and 'valid_mean, of all' in rows[0]


def test_data_that_is_not_there_is_told():
    d = toy()
    learn = learner(data=DataBunch(d.train_dl, None)).fit(1)
    for look in (learn.validate, learn.get_preds):
        with pytest.raises(ValueError, match='no validation data'): look()
    for look in ('fit', 'lr_find', 'summary'):
        with pytest.raises(ValueError, match='no training data'): getattr(learner(data=DataBunch(None, d.valid_dl)), look)(*[1]*(look == 'fit'))


def test_a_terminal_without_dashes(tmp_path):
    code = '''
        import sys; sys.path.insert(0, 'tests')
        from test_learner import *
        from exp.progress import ProgressCallback
        learner(AvgStatsCallback(accuracy), Every3(), ProgressCallback(show=sys.argv[1], every=0.)).fit(3)
    '''
    for encoding, show in (('ascii', 'lines'), ('cp932', 'terminal')):
        r = subprocess.run([sys.executable, '-c', textwrap.dedent(code), show], cwd=ROOT, capture_output=True, env={**os.environ, 'PYTHONIOENCODING': encoding}, timeout=400)
        assert r.returncode == 0, r.stderr.decode()[-800:]


class Some(torch.utils.data.Sampler):
    def __init__(self, idxs): self.idxs = idxs
    def __iter__(self): return iter(self.idxs)
    def __len__(self): return len(self.idxs)


TEN = TensorDataset(torch.arange(10.)[:, None], torch.arange(10))
BS = torch.utils.data.BatchSampler


@pytest.mark.parametrize('make, want', [
    (lambda: DataLoader(TEN, 2, sampler=Some([9, 6, 7])), [6, 7, 9]), (lambda: DataLoader(TEN, batch_sampler=BS(torch.utils.data.RandomSampler(TEN), 4, False)), range(10)),
    (lambda: DataLoader(TEN, batch_sampler=BS(torch.utils.data.RandomSampler(TEN), 4, True)), range(10)), (lambda: DataLoader(TEN, batch_sampler=BS(Some([5, 1, 3]), 2, False)), [1, 3, 5]),
    (lambda: DataLoader(TEN, batch_sampler=[[4, 0], [2]]), [0, 2, 4]), (lambda: DataLoader(TEN, 3, sampler=torch.utils.data.SubsetRandomSampler(torch.tensor([8, 2]))), [2, 8]),
    (lambda: DataLoader(TEN, 3, sampler=torch.utils.data.WeightedRandomSampler([1.]*10, 7)), range(10)), (lambda: DataLoader(TEN, 4, shuffle=True, drop_last=True), range(10)),
    (lambda: DataLoader(TEN, 4), range(10)), (lambda: DataLoader(TEN, batch_sampler=BS(torch.utils.data.SequentialSampler(TEN), 4, True)), range(10))], ids=map(str, range(10)))
def test_whatever_the_sampler_its_items_once_in_order(make, want):
    dl, want = make(), list(want)
    assert torch.cat([xb for xb, _ in in_order(dl)]).flatten().tolist() == want
    learn = Learner(nn.Linear(1, 10), DataBunch(dl, dl), F.cross_entropy)
    assert learn.get_preds()[1].tolist() == want
    x, y = TEN[want]
    before = torch.get_rng_state()
    assert learn.validate()['loss'] == pytest.approx(F.cross_entropy(learn.model(x), y).item(), abs=1e-5) and torch.get_rng_state().equal(before)


def test_in_order_keeps_the_workers():
    from exp.data_block import ItemList, ItemLoader
    assert in_order(ItemLoader(ItemList([torch.zeros(2)]*4), 2, shuffle=True, num_workers=2)).num_workers == 2


def test_save_best_in_a_runner():
    torch.manual_seed(0)
    model = nn.Linear(10, 3)
    best = SaveBest()
    Runner(model, toy(), F.cross_entropy, torch.optim.SGD(model.parameters(), lr=5.), [AvgStatsCallback(silent=True), best]).fit(4)
    assert all(v.equal(best.weights[k]) for k, v in model.state_dict().items())


def test_a_csv_that_goes_on_has_each_epoch_once(tmp_path):
    cbs = lambda: [AvgStatsCallback(silent=True), CSVLogger(tmp_path/'h.csv')]
    learner(*cbs()).fit(3)
    learner(*cbs()).fit(4, start=(2, 0))
    assert [r['epoch'] for r in csv.DictReader(open(tmp_path/'h.csv'))] == ['0', '1', '2', '3']


class RunningMean(Callback):
    "Changes its tensors in place, from fit to fit."
    def __init__(self): self.mean, self.deep, self.n = torch.zeros(3), {'all': [torch.zeros(3)]}, 0
    def after_step(self, run):
        self.n += 1
        for m in (self.mean, *self.deep['all']): m.lerp_(run.model[-1].bias.detach(), 1/self.n)


def test_looks_put_back_tensors_that_callbacks_change_in_place():
    learn = learner(c := RunningMean()).fit(1)
    mean, deep, was = c.mean, c.deep['all'][0], c.mean.clone()
    c.wide = torch.zeros(1).expand(4)                                        # cannot be changed in place, nor copied into
    with learn.untouched(): learn.fit(1); assert not c.mean.equal(was)
    assert c.mean is mean and c.deep['all'][0] is deep and mean.equal(was) and deep.equal(was) and c.n == 4
    learn.lr_find(max_iter=5)
    assert mean.equal(was) and deep.equal(was)
    learn.fit(1)
    assert c.n == 8 and not mean.equal(was)


class Counts(torch.optim.SGD):
    "Keeps numbers of its own beside the rate, as Schedule-Free does."
    def __init__(self, params, lr):
        super().__init__(params, lr)
        for g in self.param_groups: g.update(k=0, lr_max=-1., weight_sum=0.)
    def step(self, closure=None):
        super().step()
        for g in self.param_groups:
            g['lr_max'] = max(g['lr_max'], g['lr'])
            g['k'], g['weight_sum'] = g['k'] + 1, g['weight_sum'] + g['lr_max']**2


def test_what_the_optimizer_counts_is_not_put_back():
    learn = learner(opt_func=Counts).fit(1, ParamScheduler('lr', lambda pos: .5))
    learn.fit(1, ParamScheduler('lr', lambda pos: .25))
    g, = learn.opt.param_groups
    assert g['lr'] == .1 and g['k'] == 8 and g['lr_max'] == .5 and g['weight_sum'] == 8*.25
    learn.lr_find(max_iter=3)
    with learn.untouched(): learn.fit(1)
    assert g['k'] == 8 and g['lr'] == .1
    learn.fit(1, Validates())
    assert g['k'] == 12


class Validates(Callback):
    "A look in the middle of a fit."
    def after_epoch(self, run): run.validate()


def test_summary_tells_our_optimizers_apart(capsys):
    for f, words in ((sgd_mom_opt, 'optimizer StatefulOptimizer (weight_decay, momentum_step)'), (torch.optim.AdamW, 'optimizer AdamW,')):
        learner(opt_func=f).summary()
        assert words in capsys.readouterr().out


def test_a_batch_outside_of_a_fit_is_a_plain_step():
    "Somebody's own loop around `one_batch`: what a fit prepares was missing there."
    model, (x, y) = nn.Linear(4, 2), (torch.randn(8, 4), torch.arange(8) % 2)
    learn = Learner(model, None, F.cross_entropy, lr=.1)
    learn.ready_opt()
    w = model.weight.detach().clone()
    g, = torch.autograd.grad(F.cross_entropy(model(x), y), model.weight)
    learn.in_train, learn.iters = True, 1
    learn.one_batch(0, (x, y))
    assert torch.allclose(model.weight, w - .1*g)


# what a hard user found

def pieces(n, size, extra=0):
    "An iterable data set of `n` rows in batches of `size`, whose length is said to be `extra` batches more."
    class Rows(torch.utils.data.IterableDataset):
        def __len__(self): return n + extra*size
        def __iter__(self): return iter([(X[i], Y[i]) for i in range(n)])
    return DataLoader(Rows(), size)


@pytest.mark.filterwarnings('ignore:Length of IterableDataset')
def test_accumulation_says_when_a_pass_was_shorter_than_its_length():
    learn = Learner(net(), DataBunch(pieces(16, 8, extra=2), None), F.cross_entropy, lr=.1)
    with pytest.warns(UserWarning, match='last 2 batches of epoch 0'): learn.fit(1, GradientAccumulation(4))


@pytest.mark.parametrize('loss', [partial(F.cross_entropy, ignore_index=1), partial(F.cross_entropy, weight=torch.tensor([1., 5., .2]))])
def test_accumulation_counts_what_the_loss_divides_by(loss):
    w = loss.keywords.get('weight', torch.tensor([1., 0., 1.]))
    def one(bs, *cbs):
        learn = Learner(net(), DataBunch([(X[i:i + bs], Y[i:i + bs]) for i in range(0, 32, bs)], None), loss, torch.optim.SGD, .1)
        return weights(learn.fit(1, list(cbs)))
    whole = one(32)
    assert torch.allclose(one(8, GradientAccumulation(4, count=lambda run: w[run.yb].sum())), whole, atol=1e-6)
    assert not torch.allclose(one(8, GradientAccumulation(4)), whole, atol=1e-4)


def test_a_group_keeps_its_own_rate():
    def split(m): return [{'params': [*m[0].parameters()], 'lr': 1e-5}, {'params': [*m[2].parameters()]}]
    for f in (torch.optim.SGD, sgd_opt): assert [h['lr'] for h in get_hypers(learner(opt_func=f, splitter=split).make_opt())] == [1e-5, .1]


def test_no_decay_of_biases_with_torchs_optimizers():
    learn = learner(opt_func=partial(torch.optim.AdamW, weight_decay=.5), splitter=norm_bias_groups, norm=True)
    opt = learn.make_opt()
    assert [g['weight_decay'] for g in opt.param_groups] == [.5, 0.] and not any('wd' in g for g in opt.param_groups)
    for p in learn.model.parameters(): p.data.fill_(1.); p.grad = torch.zeros_like(p)
    opt.step()
    assert {p.dim(): p.min().item() for p in learn.model.parameters()} == {2: pytest.approx(.95), 1: 1.}


def test_a_loss_with_parameters_of_its_own_is_refused():
    t = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="1 parameter that is not the model's"): learner(splitter=lambda m: [[*m.parameters(), t]]).make_opt()


def test_one_output_for_two_classes(data_home):
    il = ImageList.from_files(data_home/'data'/'drawn-shapes-160', include=('train', 'val'), tfms=[make_rgb, ResizeFixed(8), to_byte_tensor])
    il = il.new([f for f in il.items if f.parent.name in ('dots', 'waves')][::10])
    data = label_by_func(SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val')), parent_labeler).to_databunch(4, seed=0, num_workers=0)
    learn = Learner(nn.Flatten(), data, None)
    said, p = learn.decode(torch.tensor([2.]))
    assert said == 'waves' and torch.allclose(p, torch.tensor([1 - 1/(1 + math.exp(-2))]*1 + [1/(1 + math.exp(-2))]))
    assert learn.decode(torch.tensor(-2.))[0] == 'dots'
    assert learn.decode(torch.tensor([0., 1., 5.]))[0] == 'output 2' and learn.decode(torch.tensor([0., 9., 5.]))[0] == 'waves'       # more outputs than classes
    from exp.interpret import ranked
    assert [n for n, _ in ranked(learn, torch.tensor([0., 1., 5.]), 3)] == ['output 2', 'waves', 'dots']


def test_values_without_a_data_block_are_values():
    x = X[:4]
    learn = Learner(nn.Linear(10, 2), DataBunch(None, [(x, x[:, :2])]), F.mse_loss)
    said, p = learn.predict(x[0])
    assert said == pytest.approx(p.tolist()) and torch.allclose(p, learn.get_preds()[0][0])
    learn.loss_func = F.binary_cross_entropy_with_logits
    said, q = learn.predict(x[0])
    assert torch.allclose(q, p.sigmoid()) and said == [i for i in (0, 1) if p[i] > 0]
    learn.loss_func = F.cross_entropy
    assert torch.allclose(learn.predict(x[0])[1], p.softmax(0)) and learn.predict(x[0])[0] == p.argmax()


@pytest.mark.parametrize('name', ['cross_entropy', 'nll', 'mape', 'bce_with_logits', 'kl_div', 'huber', 'wer', 'brier', 'ece', 'error_rate', 'perplexity'])
def test_less_is_better_for_the_names_of_losses(name): assert SaveBest(f'valid_{name}').sign == -1 and EarlyStopping(f'valid_{name}', bigger=True).sign == 1


@pytest.mark.parametrize('name', ['accuracy', 'f1', 'precision', 'recall', 'auc', 'top_k', 'dice', 'power', 'piece_recall', 'newer'])
def test_more_is_better_otherwise(name): assert SaveBest(f'valid_{name}').sign == 1


def test_watching_a_validation_that_there_is_none_of():
    learn = Learner(net(), DataBunch(toy().train_dl, None), F.cross_entropy, lr=.1, cbs=AvgStatsCallback(accuracy, silent=True))
    for cb in (SaveBest(), EarlyStopping('valid_accuracy')):
        with pytest.raises(ValueError, match='there is no validation data'): learn.fit(1, cb)
    assert learn.fit(2, best := SaveBest('train_loss')) and best.best_epoch == 1


def test_looks_leave_the_generator_of_a_data_set(data_home):
    class Noisy(torch.utils.data.Dataset):
        def __init__(self): self.g, self.n = torch.Generator().manual_seed(1), np.random.default_rng(1)
        def __len__(self): return 64
        def __getitem__(self, i): return X[i] + torch.randn(10, generator=self.g) + float(self.n.random()), Y[i]
    for look in (lambda l: l.lr_find(max_iter=3), lambda l: l.summary(), lambda l: l.get_preds(), lambda l: l.get_preds(l.data.train_dl), lambda l: l.validate()):
        ds = Noisy()
        learn = learner(data=DataBunch(DataLoader(ds, 16), DataLoader(torch.utils.data.Subset(ds, range(32)), 16)))
        was = ds.g.get_state(), ds.n.bit_generator.state
        look(learn)
        assert ds.g.get_state().equal(was[0]) and ds.n.bit_generator.state == was[1]


def test_loaders_without_length_or_batches():
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self): return iter([(X[0], Y[0])]*4)
    dl = DataLoader(Rows(), 2)
    for f in (lambda l: l.fit(1), lambda l: l.lr_find(), lambda l: l.summary(), lambda l: l.validate(dl), lambda l: l.get_preds(dl)):
        with pytest.raises(ValueError, match='has no length'): f(learner(data=DataBunch(dl, None)))
    with pytest.raises(ValueError, match='validation loader has no length'): learner(data=DataBunch(toy().train_dl, dl)).fit(1)
    none = DataLoader(TensorDataset(X[:8], Y[:8]), 64, drop_last=True)
    for f in (lambda l: l.fit(1), lambda l: l.lr_find(), lambda l: l.summary()):
        with pytest.raises(ValueError, match='has no batch'): f(learner(data=DataBunch(none, None)))


def test_predictions_of_several_outputs():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(10, 3), nn.Linear(10, 2)
        def forward(self, x): return self.a(x), {'b': self.b(x)}
    m = Two()
    learn = Learner(m, DataBunch(None, DataLoader(TensorDataset(X, Y), 32)), lambda p, y: F.cross_entropy(p[0], y))
    (a, d), y = learn.get_preds()
    with torch.no_grad(): assert type(d) is dict and torch.allclose(a, m.a(X), atol=1e-6) and torch.allclose(d['b'], m.b(X), atol=1e-6) and y.equal(Y)
    pairs = [(X[i:i + 32], (Y[i:i + 32], X[i:i + 32, :1])) for i in range(0, 140, 32)]
    y1, y2 = learn.get_preds(pairs)[1]
    assert y1.equal(Y) and y2.equal(X[:, :1])
    learn.model = nn.Sequential(m, type('Odd', (nn.Module,), {'forward': lambda self, x: 'three'})())
    with pytest.raises(TypeError, match='str'): learn.get_preds()


@pytest.mark.parametrize('event, exc', [('begin_epoch', CancelEpochException), ('after_epoch', CancelEpochException), ('begin_fit', CancelEpochException),
                                        ('begin_validate', CancelBatchException), ('after_loss', CancelStepException)])
def test_a_cancel_out_of_place_says_where_it_belongs(event, exc):
    def now(self, run): raise exc
    with pytest.raises(exc, match=f'{exc.__name__}.*nothing of the kind.*(after_batch|after_backward)'): learner(type('Cancel', (Callback,), {event: now})()).fit(1)


@pytest.mark.skipif(sys.platform == 'win32', reason='no limit of file sizes')
def test_best_weights_on_a_full_disk(tmp_path):
    learn = learner(AvgStatsCallback(accuracy, silent=True))
    with largest_file(500), pytest.warns(UserWarning, match='best.pt could not be written'): learn.fit(2, best := SaveBest('train_loss', tmp_path/'best.pt'))
    assert best.weights is not None and [*tmp_path.iterdir()] == []


@pytest.mark.parametrize('metric, said', [(lambda p, y: (p.argmax(1) == y).float(), r'<lambda> gave 32 numbers'), (lambda p, y: {'a': 1}, '<lambda> gave a dict')])
def test_a_metric_is_one_number(metric, said):
    with pytest.raises(ValueError, match=said): learner(AvgStatsCallback(metric, silent=True)).fit(1)


def test_validate_wants_one_number_too():
    learn = learner()
    learn.loss_func = partial(F.cross_entropy, reduction='none')
    with pytest.raises(ValueError, match='the loss gave 40 numbers'): learn.validate()
    learn.loss_func = lambda p, y: 3.
    assert learn.validate()['loss'] == 3


@pytest.mark.skipif(sys.platform == 'win32', reason='no limit of file sizes')
def test_a_table_on_a_full_disk_does_not_cost_the_training(tmp_path):
    learn = learner(AvgStatsCallback(accuracy, silent=True))
    with largest_file(300), pytest.warns(UserWarning, match='h.csv: the row of epoch .* could not be written'): learn.fit(3, CSVLogger(tmp_path/'h.csv'))
    rows = [*csv.reader((tmp_path/'h.csv').open())]
    assert learn.n_iter == 12 and 1 <= len(rows) <= 3 and all(len(r) == len(rows[0]) for r in rows), 'whole rows only'


def test_best_weights_of_a_model_that_saves_more_than_tensors():
    class Counting(nn.Linear):
        def get_extra_state(self): return {'seen': [1]}
        def set_extra_state(self, s): self.seen = s['seen']
    learn = Learner(Counting(10, 3), toy(), F.cross_entropy, lr=.1, cbs=[AvgStatsCallback(silent=True), SaveBest()]).fit(2)
    assert learn.model.seen == [1]
