"""The Learner of 09b beside bare loops in torch, under faults at every event, and looked at without a trace."""
import json
import math
import os
import random
import subprocess
import sys
import textwrap
from collections import Counter, namedtuple
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from event_log import Log
from test_lr_find import LOADERS, Count
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from toys import At, Takes, X, Y, batches, flat, net, raises, rows, stats, toy

from exp.annealing import ParamScheduler
from exp.batchnorm import conv_layer
from exp.callbacks import (EVENTS, AvgStatsCallback, BatchTransformXCallback, Callback, CancelBatchException, CancelEpochException, CancelFitException,
                           CudaCallback, DataBunch, Recorder, Runner, accuracy, get_hypers)
from exp.data_block import ImageList, NormalizeBytes, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb, parent_labeler, to_byte_tensor
from exp.learner import CancelStepException, Explain, Learner, get_learner, split_batch, spread_lrs
from exp.lr_find import set_seed
from exp.optimizers import adam_opt, norm_bias_groups, sgd_mom_opt, sgd_opt
from exp.tables import MultiCategoryProcessor, NumberProcessor

SGD, AdamW, Momentum = torch.optim.SGD, partial(torch.optim.AdamW, weight_decay=.1), partial(torch.optim.SGD, momentum=.9)
CE = F.cross_entropy
TEN = batches(10)                                                              # ten batches, always in this order


def learner(*cbs, data=None, opt_func=SGD, norm=False, **kw):
    return Learner(net(norm), data or toy(), CE, opt_func, **{'lr': .1, **kw}, cbs=list(cbs))


def weights(learn): return flat(learn.model)
def halves(m): return [[*m[0].parameters()], [*m[-1].parameters()]]
def table(learn): return rows(learn.cb(AvgStatsCallback))
def of(xs, ys, bs, **kw): return DataLoader(TensorDataset(xs, ys), bs, **kw)


# the loop

@pytest.mark.parametrize('opt_func', [SGD, AdamW, Momentum, sgd_mom_opt, adam_opt()], ids=['SGD', 'AdamW', 'momentum', 'ours', 'our adam'])
def test_same_as_a_bare_loop_to_the_bit(opt_func):
    learn = learner(opt_func=opt_func, norm=True, lr=.01)
    for n in (2, 1): learn.fit(n)                                              # a second fit goes on
    model, data = net(norm=True), toy()
    opt = opt_func(model.parameters(), lr=.01)
    for _ in range(3):
        model.train()
        for xb, yb in data.train_dl:
            CE(model(xb), yb).backward()
            opt.step()
            opt.zero_grad()
        for _ in data.valid_dl: pass                                           # a loader draws from torch's generator as it starts
    assert weights(learn).equal(flat(model)) and learn.n_iter == 12
    again = learner(opt_func=opt_func, norm=True, lr=.01).fit(2).fit(1, reset_opt=True)
    assert weights(again).equal(flat(model)) == (opt_func is SGD), 'reset_opt forgets the averages'


def test_events_and_callbacks_are_those_of_runner():
    "Also the order of three that tie, and a table of what validation made of it."
    def cbs(): return [Log(), Recorder(), stats(accuracy), CudaCallback('cpu'), BatchTransformXCallback(lambda x: x*2), ParamScheduler('lr', lambda p: .1*(1 - p))]
    a, b, model = cbs(), cbs(), net()
    run = Runner(model, toy(), CE, SGD(model.parameters(), lr=.1), a).fit(2)
    grads = set()
    learn = learner(*b).fit(2, At('after_loss', lambda l: grads.add((l.in_train, l.model.training, l.loss.requires_grad))))
    assert grads == {(True,)*3, (False,)*3}
    assert weights(learn).equal(flat(model)) and (a[0].seen, a[1].losses, a[1].hypers) == (b[0].seen, b[1].losses, b[1].hypers)
    assert run.n_iter == 8 and rows(a[2]) == rows(b[2]) and b[0].seen.count('begin_epoch') == 2    # the class of 2019: four


@pytest.mark.parametrize('error, after, then, n', [(CancelBatchException, 'after_cancel_batch', 'begin_batch', 7), (CancelEpochException, 'after_cancel_epoch', 'begin_validate', 5),
                                                   (CancelFitException, 'after_cancel_fit', 'after_fit', 1)])
@pytest.mark.parametrize('at', ['begin_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step'])
def test_cancelling_ends_what_it_says_and_no_more(at, error, after, then, n):
    log, rec = Log(at, error, nth=2), Recorder()
    learn = learner(log, rec).fit(2)
    seen, i = log.seen, log.seen.index(after)
    assert seen[i-1:i+2] == [at, after, then] and seen.count(after) == 1 and seen[-1] == 'after_fit' and seen.count('after_fit') == 1
    assert len(rec.losses) == n and all(p.grad is None for p in learn.model.parameters())


PLANS = {'steps left out add up': 'aasas', 'the last of a pass is not for the next': 'sasa', 'a cancelled batch is in no later step': 'sds', 'nor what was added before it': 'ads',
         'a pass cut short': 'ssc', 'cut with gradients under way': 'ac', 'not one step': 'aaa', 'all at once': 'asdasac'}


@pytest.mark.parametrize('plan', PLANS.values(), ids=PLANS)
def test_which_gradients_reach_which_step(plan):
    "s: step; a: CancelStep, add to the next; d: CancelBatch, drop; c: CancelEpoch. Two passes, beside a bare loop that does so by hand."
    errors, n = dict(a=CancelStepException, d=CancelBatchException, c=CancelEpochException), len(plan)
    def f(learn):
        if plan[learn.iter] in errors: raise errors[plan[learn.iter]]
    learn = learner(At('after_backward', f), data=DataBunch(TEN[:n], TEN[:1]), opt_func=Momentum).fit(2)
    model = net()
    opt = Momentum(model.parameters(), lr=.1)
    for _ in range(2):
        for what, (xb, yb) in zip(plan, TEN):
            CE(model(xb), yb).backward()
            if what == 's': opt.step()
            if what in 'sd': opt.zero_grad()
        opt.zero_grad()
    assert weights(learn).equal(flat(model)) and learn.n_iter == 2*sum(w in 'sa' for w in plan)


WAYS = {'after_cancel_batch': CancelBatchException, 'after_cancel_epoch': CancelEpochException, 'after_cancel_fit': CancelFitException, 'after_error': LookupError}


@pytest.mark.parametrize('error', [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize('at', EVENTS)
def test_after_an_error_anywhere_the_learner_is_as_before(at, error):
    def swap(learn):
        learn.loss_func, learn.logger, learn.model, learn.data = (lambda p, y: CE(p, y)*2), None, nn.Sequential(learn.model), DataBunch(TEN, TEN)
        learn.add_cbs(Log())
    ended, table = [], stats(accuracy)
    first, last = (At('after_fit', ended.append, order) for order in (-50, 50))
    helper = [Log('after_loss', WAYS[at])] if at in WAYS else []
    learn = learner(table)
    before = learn.cbs, learn.loss_func, learn.logger, learn.model, learn.data
    with pytest.raises(error):
        learn.fit(2, [*helper, At('begin_fit', swap), ParamScheduler('lr', lambda pos: 7.), first, Log(at, error), last])
    assert len(ended) == 2, 'after_fit reaches those on both sides of the one that fails'
    assert (learn.cbs, learn.loss_func, learn.logger, learn.model, learn.data) == before and learn.error is None
    assert get_hypers(learn.opt)[0]['lr'] == .1 and all(p.grad is None for p in learn.model.parameters())
    learn.fit(1, log := Log())                                                 # and nothing of the last fit listens
    assert Counter(log.seen)['begin_batch'] == 5 and len(table.rows) >= 1 and log.seen[0] == 'begin_fit' and learn.cbs == before[0]


def test_an_error_is_announced_before_the_end_and_forgotten_after_it():
    seen = []
    learn = learner(At('after_error', lambda l: seen.append(l.error)), log := Log('after_step', ZeroDivisionError))
    with pytest.raises(ZeroDivisionError) as e: learn.fit(1, Log('after_fit', AttributeError))      # an error at the end does not hide it
    assert seen == [e.value] and log.seen[-3:] == ['after_step', 'after_error', 'after_fit'] and learn.error is None
    try: raise LookupError
    except LookupError: learn.fit(1)                                           # goes well, while another error is being handled
    with pytest.raises(KeyboardInterrupt): learn.fit(1, Log('after_loss', KeyboardInterrupt))
    assert len(seen) == 1, 'the wish to stop is no error'


def test_at_the_end_they_are_called_in_their_order_too():
    seen = []
    learner(*[At('after_fit', lambda learn, o=o: seen.append(o), o) for o in (30, -30, 0)]).fit(1)
    assert seen == [-30, 0, 30]


def test_callbacks_come_once_go_and_are_found():
    came = []
    learner(*(At('begin_batch', lambda l, n=n: came.append(n), n//10) for n in (50, -10, 1, 2)), data=DataBunch(TEN[:1], None)).fit(1)
    assert came == [-10, 1, 2, 50], 'by order, then as listed'
    learn, typo = learner(rec := Recorder()), At('after_bacth', print)
    for f in (lambda: learn.add_cbs(typo), lambda: learn.fit(1, typo), lambda: learner(typo)):
        with pytest.raises(AttributeError, match='after_bacth'): f()
    assert learn.cbs[1:] == [rec] and isinstance(learn.cbs[0], Explain)
    learn.fit(1, rec)                                                          # it is there already
    assert len(rec.losses) == 4 and learn.cb(Recorder) is rec
    guest = Log()
    def door(run):
        if run.in_train and run.iter == 1: run.add_cbs(guest)
        if run.in_train and run.iter == 3: run.remove_cbs(guest)
    learn.fit(1, At('begin_batch', door))
    assert guest.seen.count('after_batch') == 2 and learn.cbs[1:] == [rec]
    learn.remove_cbs(rec)
    with pytest.raises(KeyError): learn.cb(Recorder)
    made = Learner(net(), toy(), CE, cb_funcs=[Recorder, partial(AvgStatsCallback, accuracy, silent=True)]).fit(1)
    assert len(made.cb(Recorder).losses) == 4 and len(table(made)) == 1 and repr(made)


def test_no_more_reads_from_the_device_for_more_batches():
    class Recorder2019(Recorder):
        def after_batch(self, run): run.loss.detach().cpu()
    class Reads(TorchFunctionMode):
        n, all = 0, {getattr(torch.Tensor, n) for n in 'item tolist cpu numpy __float__ __int__ __bool__'.split()}
        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.n += func in self.all
            return func(*args, **(kwargs or {}))
    def reads(n, recorder=Recorder):
        learn = learner(stats(accuracy), recorder(), ParamScheduler('lr', lambda pos: .1), data=DataBunch(TEN[:1]*n, TEN[:1]*n))
        with Reads() as r: learn.fit(1)
        return r.n
    assert reads(2) == reads(40) and reads(40, Recorder2019) > reads(2, Recorder2019) + 30       # and the check sees something


@pytest.mark.parametrize('how', ['evaluates', 'frozen by the optimizer', 'all of it evaluates'])
@pytest.mark.parametrize('loop', [Runner, Learner])
def test_modes_set_before_a_fit_are_kept_and_put_back(loop, how):
    "A norm that evaluates measures nothing, and a frozen one neither; a net that somebody has looked at trains as a whole."
    learn = learner(opt_func=sgd_opt, norm=True, splitter=lambda m: [[*m[:2].parameters()], [*m[-1].parameters()]])
    learn.ready_opt()
    model, bn, dropout = learn.model, *learn.model[1:3]
    if how == 'evaluates': bn.eval()
    elif how == 'all of it evaluates': model.eval()
    else: learn.opt.freeze(0)
    modes, before, seen = [m.training for m in model.modules()], bn.running_mean.clone(), set()
    watch = At('after_pred', lambda run: seen.add((run.in_train, dropout.training, bn.training)))
    run = learn if loop is Learner else Runner(model, toy(), CE, learn.opt, [watch])
    if loop is Learner: run.add_cbs(watch)
    for _ in '12':
        run.fit(1)
        assert [m.training for m in model.modules()] == modes
    trains = how == 'all of it evaluates'
    assert bn.running_mean.equal(before) != trains and seen == {(True, True, trains), (False, False, False)}
    watch.after_pred = raises(ZeroDivisionError(), lambda run: not run.in_train)
    run = learner(watch) if loop is Learner else run
    with pytest.raises(ZeroDivisionError): run.fit(1)
    assert run.model.training == (loop is Learner or not trains)


@pytest.mark.parametrize('one_cycle', [False, True])
@pytest.mark.parametrize('start', [(0, 0), (0, 9), (1, 0), (1, 4), (1, 10), (2, 3)])
def test_a_fit_broken_off_goes_on_from_its_place(start, one_cycle):
    "Data in one order, so that what was skipped can be told; a schedule that knows how far we are."
    def fit(learn, cbs=(), **kw):
        if one_cycle: return learn.fit_one_cycle(3, .1, cbs=list(cbs), **kw)
        return learn.fit(3, [ParamScheduler('lr', lambda pos: .1*(1 - pos)), *cbs], **kw)
    whole, parts = (learner(data=DataBunch(TEN, TEN[:2]), opt_func=Momentum) for _ in range(2))
    fit(whole)
    def stop(run):
        if run.in_train and (run.epoch, run.iter) == start: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(parts, [At('begin_batch', stop) if start[1] < 10 else Log('begin_validate', KeyboardInterrupt, start[0] + 1)])
    fit(parts, start=start)
    assert weights(whole).equal(weights(parts)) and parts.n_iter == 30
    log = Log()
    learner(log, data=DataBunch(TEN, TEN[:1])).fit(2, start=(1, 8))
    assert Counter(log.seen)['begin_epoch'] == 1 and Counter(log.seen)['begin_batch'] == 3
    assert learner().fit(0).n_iter == 0


def test_a_batch_outside_of_a_fit_is_a_plain_step():
    "Somebody's own loop around `one_batch`."
    learn = learner()
    learn.fit(0, gone := Log())
    gone.seen.clear()
    w, (g,) = learn.model[0].weight.detach().clone(), torch.autograd.grad(CE(learn.model(X), Y), learn.model[0].weight)
    learn.in_train, learn.iters = True, 1
    learn.one_batch(0, (X, Y))
    assert torch.allclose(learn.model[0].weight, w - .1*g) and gone.seen == [], 'who came for a fit is gone'


# groups, rates, optimizers

SPLITS = {'lists': halves, 'generators': lambda m: (p for p in (m[0].parameters(), m[-1].parameters())), 'dictionaries': lambda m: [{'params': iter(ps)} for ps in halves(m)],
          'with rates': lambda m: [{'params': ps, 'lr': lr} for ps, lr in zip(halves(m), (.02, .2))]}


@pytest.mark.parametrize('opt_func', [SGD, Momentum, torch.optim.Adam, sgd_opt, adam_opt()], ids=['SGD', 'momentum', 'Adam', 'ours', 'our adam'])
@pytest.mark.parametrize('kind', SPLITS)
def test_groups_with_rates_of_their_own(kind, opt_func):
    learn = learner(opt_func=opt_func, splitter=SPLITS[kind], lr=5. if kind == 'with rates' else slice(.02, .2), data=DataBunch(TEN, TEN[:1])).fit(2)
    model = net()
    opts = [opt_func(ps, lr=lr) for ps, lr in zip(halves(model), (.02, .2))]   # one optimizer a group: nothing is shared
    for xb, yb in TEN*2:
        CE(model(xb), yb).backward()
        for o in opts: o.step(); o.zero_grad()
    assert torch.allclose(weights(learn), flat(model), atol=1e-6)


def test_rates_spread():
    for lr, n, want in ((.1, 2, [.1, .1]), ([1, 2], 2, [1, 2]), (slice(1e-4, 1e-2), 3, [1e-4, 1e-3, 1e-2]), (slice(1e-4, 1e-2), 1, [1e-2])): assert spread_lrs(lr, n) == pytest.approx(want)
    with pytest.raises(ValueError, match='2 .* 1'): learner(lr=[.1, .2]).fit(1)
    with pytest.raises(ValueError): learner().fit(-1)


@pytest.mark.parametrize('opt_func', [partial(sgd_mom_opt, wd=.5), partial(torch.optim.AdamW, weight_decay=.5)], ids=['ours', "torch's"])
def test_no_decay_for_norms_and_biases(opt_func):
    "A group's `wd` means torch's `weight_decay`, too: with slopes of 0 and weights of 1, one step is the decay alone."
    learn = learner(opt_func=opt_func, splitter=norm_bias_groups, norm=True)
    learn.ready_opt()
    for p in learn.model.parameters(): p.data.fill_(1.); p.grad = torch.zeros_like(p)
    learn.opt.step()
    assert {p.dim(): p.min().item() for p in learn.model.parameters()} == {2: pytest.approx(.95), 1: 1.}


@pytest.mark.parametrize('opt_func, name', [(Momentum, 'momentum'), (sgd_mom_opt, 'mom'), (adam_opt(), 'mom'), (SGD, None), (AdamW, 'betas')], ids=['momentum', 'ours', 'our adam', 'SGD', 'AdamW'])
def test_one_cycle_is_its_formula_and_goes_back(opt_func, name):
    rec, n = Recorder(), 20
    def first(v): return v[0] if isinstance(v, tuple) else v
    moms = At('after_step', lambda l: rec.hypers.setdefault('moms', []).append(first(get_hypers(l.opt)[1].get(name))))
    learn = learner(rec, moms, opt_func=opt_func, splitter=halves, lr=[.01, .1])
    learn.fit_one_cycle(5, moms=(.9, .8, .95), pct_start=.3)                    # 5 epochs of 4 batches
    def piece(a, b, p): return a + (b - a)*(1 - math.cos(math.pi*p))/2
    def cycle(a, b, c): return [piece(a, b, i/n/.3) if i/n < .3 else piece(b, c, (i/n - .3)/.7) for i in range(n)]
    assert rec.hypers['lr'] == pytest.approx(cycle(.1/25, .1, .1/1e5))
    if name: assert rec.hypers['moms'] == pytest.approx(cycle(.9, .8, .95))
    assert [h['lr'] for h in get_hypers(learn.opt)] == [.01, .1] and (not name or get_hypers(learn.opt)[0][name] in (.9, (.9, .999)))
    both = [learner(opt_func=opt_func, splitter=halves).fit_one_cycle(1, lr, moms=None, reset_opt=True) for lr in (slice(.02, .2), [.02, .2])]
    assert weights(both[0]).equal(weights(both[1])) and not weights(both[0]).equal(weights(learner(opt_func=opt_func).fit_one_cycle(1, .2, moms=None)))


def test_what_the_optimizer_leaves_out_is_told_at_every_fit():
    learn = learner(splitter=lambda m: [[p for p in m.parameters() if p.requires_grad]])
    frozen = learn.model[0].requires_grad_(False).weight.clone()
    assert learn.fit(1).model[0].weight.equal(frozen)                          # frozen on purpose: nothing to say
    learn.model[0].requires_grad_(True)
    for fit in (learn.fit, learn.fit_one_cycle):
        with pytest.raises(ValueError, match='0.weight.*reset_opt'): fit(1)
    assert not learn.fit(1, reset_opt=True).model[0].weight.equal(frozen)
    learn.model[2] = nn.Linear(20, 3)                                          # a new head
    with pytest.raises(ValueError, match='2.weight'): learn.fit(1)
    head = learn.model[2].weight.clone()
    assert not learn.fit_one_cycle(1, reset_opt=True).model[2].weight.equal(head)
    loss = Gives(1.)                                                           # a loss that learns, too
    loss.forward = lambda p, y: CE(p*loss.w, y)
    for f in (loss, partial(loss), loss.__call__):
        with pytest.raises(ValueError, match=r'\bw\b'): Learner(net(), toy(), f, SGD).fit(1)
    Learner(net(), toy(), loss, SGD, splitter=lambda m: [[*m.parameters(), loss.w]]).fit(1)
    assert loss.w != 1


class Counts(SGD):
    "Keeps numbers of its own beside the rate, as Schedule-Free does."
    def __init__(self, params, lr):
        super().__init__(params, lr)
        for g in self.param_groups: g.update(k=0, weight_sum=0.)
    def step(self, closure=None):
        super().step()
        for g in self.param_groups: g['k'], g['weight_sum'] = g['k'] + 1, g['weight_sum'] + g['lr']


def test_what_the_optimizer_counts_stays_and_looks_do_not_count():
    learn = learner(opt_func=Counts).fit(1, ParamScheduler('lr', lambda pos: .5)).fit(1, At('after_epoch', lambda run: run.validate()))
    learn.lr_find(max_iter=3)
    with learn.untouched(): learn.fit(1)
    g, = learn.opt.param_groups
    assert (g['lr'], g['k'], g['weight_sum']) == (.1, 8, pytest.approx(4*.5 + 4*.1))


# looking

class Noise(Callback):
    "Shapes each batch, drawing from every generator there is; keeps a mean of its own that is changed in place, and another deeper down."
    _order = 5
    def __init__(self): self.g, self.n, self.mean, self.deep = torch.Generator().manual_seed(5), 0, torch.zeros(3), {'all': [torch.zeros(3)]}
    def begin_batch(self, run):
        run.xb = run.xb + .01*torch.randn(1, generator=self.g) + .01*torch.rand(1) + .01*random.random() + .01*np.random.rand() + self.mean.sum()*.01
        self.n += 1
    def after_step(self, run):
        for m in (self.mean, *self.deep['all']): m.lerp_(run.model[-1].bias.detach(), .5)


def fails(learn):
    with pytest.raises(ZeroDivisionError), learn.looking(Log('after_loss', ZeroDivisionError)): learn.one_pass(learn.data.train_dl, False)


def search_fails(learn):
    learn.add_cbs(log := Log('after_step', ZeroDivisionError, 5))
    with pytest.raises(ZeroDivisionError): learn.lr_find(max_iter=20)
    learn.remove_cbs(log)


def trains(learn):
    with pytest.raises(ZeroDivisionError), learn.untouched():
        learn.fit(1).opt = None
        raise ZeroDivisionError


def adds_gradients(learn):
    with learn.untouched(), torch.enable_grad(): CE(learn.model(X), Y).backward()


LOOKS = {'lr_find': lambda l: l.lr_find(max_iter=9), 'lr_find fails': search_fails, 'validate': lambda l: l.validate(), 'validate training': lambda l: l.validate(l.data.train_dl, accuracy),
         'get_preds': lambda l: l.get_preds(), 'get_preds training': lambda l: l.get_preds(l.data.train_dl), 'predict': lambda l: l.predict(X[0]), 'a look fails': fails,
         'a fit inside fails': trains, 'gradients inside': adds_gradients}
MOMENTS = {'between fits': None, 'new': None, 'with gradients': 'after_backward', 'in validation': 'after_pred', 'after an epoch': 'after_epoch'}


@pytest.mark.parametrize('when', MOMENTS)
@pytest.mark.parametrize('kind, opt_func', zip(LOADERS, [Momentum, adam_opt(), adam_opt(), sgd_mom_opt, torch.optim.Adam, Momentum, torch.optim.Adam, SGD]), ids=LOADERS)
def test_training_goes_the_same_with_and_without_looks(kind, opt_func, when):
    "Not what was put back is compared, but what comes of it: weights, losses, the table, a metric of the whole set."
    def run(look=None):
        set_seed(1)
        learn = learner(Noise(), Recorder(), stats(accuracy, Count()), log := Log(), data=DataBunch(LOADERS[kind](), LOADERS[kind]()), norm=True, opt_func=opt_func, lr=.01)
        seen = Counter()
        def at(l):
            seen[l.in_train] += 1
            if look and l.in_train == (when == 'with gradients') and seen[l.in_train] == 1: look(l)
        if MOMENTS[when]: return learn.fit(2, At(MOMENTS[when], at)), log
        if when == 'between fits': learn.fit(1)
        mean, cbs, modes = learn.cb(Noise).mean, learn.cbs, [m.training for m in learn.model.modules()]
        state = {p: dict(s) for p, s in learn.opt.state.items()} if learn.opt else {}
        if look: look(learn)
        assert learn.cb(Noise).mean is mean and learn.cbs == cbs and [m.training for m in learn.model.modules()] == modes and (learn.opt is None) == (when == 'new')
        assert all(v is state[p][k] for p, s in getattr(learn.opt, 'state', {}).items() for k, v in s.items() if torch.is_tensor(v)), 'those who hold it hold the one in use'
        return learn.fit(1), log
    plain, log = run()
    for name, look in LOOKS.items():
        learn, other = run(look)
        assert weights(learn).equal(weights(plain)) and table(learn) == table(plain) and learn.cb(Recorder).losses == plain.cb(Recorder).losses, name
        assert (learn.n_iter, learn.cb(Noise).n, learn.logger) == (plain.n_iter, plain.cb(Noise).n, plain.logger) and other.seen == log.seen, name


@pytest.mark.parametrize('look', ['lr_find', 'validate', 'get_preds'])
def test_a_look_begins_and_ends_once_for_those_who_shape_a_batch_only(look):
    "Who wraps the model at the beginning of a fit takes it out at the end."
    def wrap(run): run.model = nn.Sequential(run.model)
    def take_out(run): run.model = run.model[0]; ends.append(type(run.model[0]))
    ends, reports = [], Log()
    reports._fit_only = True
    learn = learner(At('begin_fit', wrap), At('after_fit', take_out), reports, ParamScheduler('lr', lambda pos: 7.), stats(accuracy))
    learn.logger = None
    getattr(learn, look)()
    assert ends == [nn.Linear] and reports.seen == [] and table(learn) == []


def test_a_search_takes_its_numbers_and_more_than_one_epoch():
    find = learner().lr_find(1e-4, .1, 30)                                     # 8 epochs of 4 batches
    assert len(find.losses) == 30 and [find.lrs[0], find.lrs[-1]] == pytest.approx([1e-4, .1])


# reading off

@pytest.mark.parametrize('bs', [1, 7, 32, 59, 140])
def test_validation_counts_each_item_once_whatever_the_batches(bs):
    learn, f1 = learner(stats(accuracy)), pytest.importorskip('torchmetrics').classification.MulticlassF1Score(3, average='macro')
    with torch.no_grad(): pred = learn.model.eval()(X)
    for dl in (of(X, Y, bs), of(X, Y, bs, shuffle=True, drop_last=True)):
        assert learn.validate(dl) == {'loss': pytest.approx(CE(pred, Y).item(), abs=1e-5), 'accuracy': pytest.approx(accuracy(pred, Y).item(), abs=1e-6)}
        preds, ys = learn.get_preds(dl)
        assert torch.allclose(preds, pred, atol=1e-6) and ys.equal(Y)
        want = type(f1)(3, average='macro')(pred, Y)
        assert learn.validate(dl, f1)['MulticlassF1Score'] == pytest.approx(want.item()) and f1.compute() == want, 'it can be asked afterwards'


def test_metrics_of_validate():
    learn = learner(stats(accuracy))
    assert list(learn.validate(metrics=[]).values()) == [learn.validate()['loss']]
    assert [*learn.validate(metrics=[lambda p, y: torch.tensor(1.), lambda p, y: torch.tensor(2.)]).values()][1:] == [1., 2.]
    learn.loss_func = partial(CE, reduction='none')
    with pytest.raises(ValueError, match='40'): learn.validate()
    learn.loss_func = lambda p, y: 3.
    assert learn.validate()['loss'] == 3


Out = namedtuple('Out', 'a b')


@pytest.mark.parametrize('pack', [lambda a, b: (a, b), lambda a, b: [a, {'b': b}], lambda a, b: {'a': a, 'b': b}, Out], ids=['tuple', 'nested', 'dictionary', 'namedtuple'])
def test_predictions_of_several_outputs(pack):
    a, b = nn.Linear(10, 3), nn.Linear(10, 2)
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = a, b
        def forward(self, x): return pack(self.a(x), self.b(x))
    def parts(o): return [t for v in (o.values() if isinstance(o, dict) else o) for t in (parts(v) if not torch.is_tensor(v) else [v])]
    learn = Learner(Two(), DataBunch(TEN, of(X, Y, 32)), lambda p, y: CE(parts(p)[0], y), SGD, cbs=stats()).fit(1)
    preds, y = learn.get_preds()
    with torch.no_grad(): want = pack(a(X), b(X))
    assert type(preds) is type(want) and all(torch.allclose(p, q, atol=1e-6) for p, q in zip(parts(preds), parts(want), strict=True)) and y.equal(Y)
    y1, y2 = learn.get_preds([(X[i:i + 32], (Y[i:i + 32], X[i:i + 32, :1])) for i in range(0, 140, 32)])[1]
    assert y1.equal(Y) and y2.equal(X[:, :1])
    learn.model.forward = lambda x: 'three'
    with pytest.raises(TypeError, match='str'): learn.get_preds()


def test_several_inputs_are_counted_by_items():
    for pack in (lambda x: {'x': x}, lambda x: (x, x), lambda x: [x]):
        learn = Learner(Takes(net()), DataBunch([(pack(x), y) for x, y in TEN], [(pack(X[:40]), Y[:40]), (pack(X[40:42]), Y[40:42])]), CE, SGD, .1, cbs=CudaCallback('cpu'))
        assert flat(learn.fit(1).model).equal(weights(learner(data=DataBunch(TEN, None)).fit(1)))
        assert learn.validate()['loss'] == pytest.approx(CE(learn.model([X[:42]]), Y[:42]).item(), abs=1e-6)


def test_batches_without_targets_and_of_three_parts():
    for b, n in ((X, 0), ([X], 0), ((X, Y), 140), ([X, Y], 140)): assert split_batch(b)[0] is X and len(split_batch(b)[1]) == n
    for b, said in (((X, X, Y), '3'), ({'x': X, 'labels': Y}, '2')):
        with pytest.raises(ValueError, match=said): learner(data=DataBunch([b], None)).fit(1)
    auto = Learner(nn.Linear(10, 10), DataBunch([X[:20], X[20:40]], [X[40:]]), lambda p, _: p.pow(2).mean(), SGD, lr=.5, cbs=stats()).fit(2)
    assert table(auto)[1]['valid_loss'] < table(auto)[0]['valid_loss']
    for several in ([X[:90], X[90:]], [(X[:90],), [X[90:]]]):
        preds, none = auto.get_preds(several, act=partial(torch.softmax, dim=1))
        assert torch.allclose(preds, auto.model(X).softmax(1), atol=1e-6) and none is None


def test_data_that_is_not_there_is_told():
    d, none = toy(), of(X[:8], Y[:8], 64, drop_last=True)
    learn = learner(data=DataBunch(d.train_dl, None)).fit(1)
    for look in (learn.validate, learn.get_preds, lambda: learn.validate([]), lambda: learn.get_preds([])):
        with pytest.raises(ValueError, match='no'): look()
    for train in (None, none):
        for f in (lambda l: l.fit(1), lambda l: l.fit_one_cycle(1), lambda l: l.lr_find()):
            with pytest.raises(ValueError, match='no training data'): f(learner(data=DataBunch(train, d.valid_dl)))
    class Long(IterableDataset):
        def __iter__(self): return iter([(X[0], Y[0])]*4)
        def __len__(self): return 4
    long = DataLoader(Long(), 2)
    assert learner(data=DataBunch(long, long)).fit(2).n_iter == 4 and len(learn.get_preds(long)[1]) == 4


@pytest.mark.parametrize('loss, said, numbers', [
    (CE, 2, lambda p: p.softmax(0)), (F.mse_loss, [-1., 0., 3.], lambda p: p), (nn.L1Loss(), [-1., 0., 3.], lambda p: p), (F.binary_cross_entropy_with_logits, [2], torch.sigmoid)],
    ids=['classes', 'values', 'a module', 'several classes'])
def test_a_prediction_without_words_is_what_the_loss_says(loss, said, numbers):
    p = torch.tensor([-1., 0., 3.])
    learn = Learner(nn.Identity(), DataBunch(None, None), loss)
    got, n = learn.predict(p)
    assert got == said and torch.allclose(n, numbers(p))
    with pytest.raises(ValueError): learn.predict('a file')


def items(data_home, every, *tfms, size=32, labeler=parent_labeler, proc=None):
    il = ImageList.from_files(data_home/'data'/'drawn-shapes-160', include=('train', 'val'), tfms=[make_rgb, ResizeFixed(size), *tfms, to_byte_tensor])
    return label_by_func(SplitData.split_by_func(il.new(il.items[::every]), partial(grandparent_splitter, valid_name='val')), labeler, proc_y=proc)


def long_name(f): return 'ab'[len(parent_labeler(f)) > 5]
def both(x): return torch.cat([1 - x.sigmoid(), x.sigmoid()])


@pytest.mark.parametrize('labeler, proc, pred, said, p', [
    (parent_labeler, None, [0.]*9 + [5.], lambda c: c[9], lambda x: x.softmax(0)), (parent_labeler, None, [0.]*10 + [5.], lambda c: 'output 10', lambda x: x.softmax(0)),
    (long_name, None, [2.], lambda c: 'b', both), (long_name, None, [-2.], lambda c: 'a', both),
    (lambda f: [parent_labeler(f), 'picture'], MultiCategoryProcessor(), [5.] + [-5.]*9 + [.1], lambda c: [c[0], c[10]], torch.sigmoid),
    (lambda f: len(parent_labeler(f)), NumberProcessor(standardise=True), [1.], None, None)], ids=['class', 'one class too many', 'one score: second', 'one score: first', 'several', 'a number'])
def test_a_prediction_in_words(labeler, proc, pred, said, p, data_home):
    data, x = items(data_home, 20, size=8, labeler=labeler, proc=proc).to_databunch(8, num_workers=0), torch.tensor(pred)
    got, numbers = Learner(nn.Identity(), data, CE if said else F.mse_loss).predict(x)
    lengths = np.array([len(f.parent.name) for f in data.train_ds.x.items])
    if said: assert got == said(data.classes) and torch.allclose(numbers, p(x))
    else: assert got == pytest.approx(lengths.mean() + lengths.std(), rel=.02)     # in its own measure


def test_files_and_pictures_are_predicted_in_words(data_home):
    from PIL import Image
    sd = items(data_home, 20)
    sd = sd.add_test(ImageList(sd.valid.x.items, sd.valid.x.path))
    data = sd.to_databunch(8, seed=0, num_workers=0)
    learn = get_learner([8], data, .1, conv_layer, cb_funcs=[CudaCallback, partial(BatchTransformXCallback, NormalizeBytes.fit(sd.train))]).fit(1)
    preds, none = learn.get_preds(data.test_dl)
    assert none is None and torch.allclose(preds, learn.get_preds()[0], atol=1e-5)            # the same files, with and without labels
    assert learn.get_preds(data.train_dl)[1].tolist() == [y for _, y in data.train_ds]
    f = sd.valid.x.items[3]
    label, probs = learn.predict(f)
    assert label == data.classes[preds[3].argmax()] and torch.allclose(probs, preds[3].softmax(0), atol=1e-4)
    assert learn.predict(str(f))[0] == learn.predict(Image.open(f))[0] == learn.predict(sd.valid[3][0])[0] == label


TWO = '''
    import os, sys
    sys.path.insert(0, 'tests')
    from test_learner import *
    from torchmetrics.classification import MulticlassF1Score
    rank = int(sys.argv[1])
    torch.distributed.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=rank, world_size=2)
    mine = slice(0, 70) if rank == 0 else slice(70, 101)                     # shares of unequal size
    learn = learner(data=DataBunch(None, of(X[mine], Y[mine], 16)))
    got = learn.validate(metrics=[accuracy, MulticlassF1Score(3, average='macro')])
    pred, y, f1 = learn.model(X[:101]), Y[:101], MulticlassF1Score(3, average='macro', sync_on_compute=False)
    print(json.dumps([[CE(pred, y).item(), accuracy(pred, y).item(), f1(pred, y).item()], list(got.values())]))
    torch.distributed.destroy_process_group()
    sys.stdout.flush(); os._exit(0)                                          # torch's threads now and then abort a process that tidies up
'''


def script(text, *args):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    return subprocess.Popen([sys.executable, '-c', textwrap.dedent(text), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)


def test_over_two_processes_validation_is_that_of_all_the_data(tmp_path):
    pytest.importorskip('torchmetrics')
    ps = [script(TWO, r, tmp_path/'meet') for r in (0, 1)]
    for p, (out, err) in [(p, p.communicate(timeout=400)) for p in ps]:
        assert p.returncode == 0, err
        want, got = json.loads(out.strip().splitlines()[-1])
        assert got == pytest.approx(want, abs=1e-5)


# errors for the reader

class Gives(nn.Module):
    "Predicts `pred`, whatever comes in."
    def __init__(self, pred): super().__init__(); self.w, self.pred = nn.Parameter(torch.ones(())), pred
    def forward(self, x): return self.pred*self.w


def rand(*shape): return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('pred, yb, loss_func, said', [
    (rand(4, 3), torch.tensor([0, 2, 1, 12]), CE, '3 .*12'), (rand(4, 3), torch.tensor([0, -1, 1, 1]), nn.CrossEntropyLoss(), '-1'), (rand(2, 3, 5), torch.full((2, 5), 7), F.nll_loss, '3 .*7'),
    (rand(4, 3), torch.tensor([0, 2, 1, 255]), partial(CE, ignore_index=9), '255'), (rand(64, 1), rand(64), F.mse_loss, r'\(64, 1\).*\(64,\)'), (rand(64), rand(64, 1), nn.L1Loss(), r'\(64, 1\)'),
    (rand(4, 3), torch.tensor([0, 2]), CE, r'\(4, 3\).*\(2,\)'), (rand(4, 3), torch.tensor(1), CE, r'\(4, 3\).*\(\)'), (rand(4), torch.tensor([0, 1, 2, 1]), CE, r'\(4,\).*row of scores'),
    (rand(4, 3), torch.tensor([0., 2, 1, 1]), CE, 'float.*int64'), (rand(4, 3), torch.tensor([0, 2, 1, 1]), partial(CE, reduction='none'), 'single number')])
@pytest.mark.parametrize('kind', ['training', 'validation'])
def test_what_does_not_fit_is_told_with_its_place(pred, yb, loss_func, said, kind):
    bad = [(rand(4), yb) if yb.numel() else rand(4)]
    learn = Learner(Gives(pred), DataBunch(bad, None), loss_func)
    if kind == 'training':
        with pytest.raises(ValueError, match=f'{kind} batch 0 of epoch 0.*{said}') as e: learn.fit(1)
        assert e.value.__cause__ is None or 'single' in said, 'told before the loss is asked: on a GPU that would be the end'
    elif 'single' not in said:
        with pytest.raises(ValueError, match=f'{kind} batch 0.*{said}'): learn.validate(bad)


@pytest.mark.parametrize('pred, yb, f', [(rand(4, 3), torch.tensor([0, 2, 1, -100]), CE), (rand(4, 3), torch.tensor([0, 2, 1, 255]), nn.CrossEntropyLoss(ignore_index=255)),
                                         (rand(4, 3), torch.tensor([0, 2, 1, 255]), partial(CE, ignore_index=255)), (rand(4, 3), rand(4, 3).softmax(1), CE),
                                         (rand(4, 3, 2), torch.randint(0, 3, (4, 2)), nn.CrossEntropyLoss(weight=torch.ones(3))), (rand(4), rand(4), F.mse_loss),
                                         (rand(4, 3), rand(4), lambda p, y: (p.mean(1) - y).abs().mean()), ((rand(4, 1)), rand(4, 1).round(), F.binary_cross_entropy_with_logits)])
def test_what_is_allowed_passes(pred, yb, f):
    learn = Learner(Gives(pred), DataBunch([(rand(4), yb)]*2, [(rand(4), yb)]), f, cbs=stats()).fit(1)
    assert learn.n_iter == 2 and table(learn)[0]['valid_loss'] == pytest.approx(f(pred*learn.model.w, yb).item())


def test_a_last_batch_of_one_and_batch_norm():
    learn = Learner(net(norm=True), DataBunch([(X[:8], Y[:8]), (X[:1], Y[:1])], TEN), CE)
    with pytest.raises(ValueError, match='training batch 1 of epoch 0.*drop_last'): learn.fit(1)


class OutOfMemory(RuntimeError): pass                                          # a kind of its own must stay what it is


@pytest.mark.parametrize('error', [RuntimeError('mine'), ValueError('mine'), OutOfMemory('mine'), torch.OutOfMemoryError('mine')], ids=repr)
@pytest.mark.parametrize('at', ['the model', *EVENTS])
def test_other_errors_are_not_explained_away(at, error):
    "Raised in the second batch, of another size than the first, whose targets would not fit to what the first one left."
    def now(run):
        if at in EVENTS[:3] or 'epoch' in at or at.endswith('fit') or run.iter: raise error
    data = DataBunch([TEN[0], (X[:7], Y[:7])], [TEN[1], (X[:3], Y[:3])])
    helper = [Log('after_loss', WAYS[at], 2)] if at in WAYS else []
    learn = learner(*helper, data=data)
    if at == 'the model': learn.model[1].register_forward_hook(lambda m, i, o: raises(error)(None) if len(o) == 7 else None)
    with pytest.raises(type(error)) as e: learn.fit(1, [] if at == 'the model' else At(at, now))
    assert e.value is error


def test_what_an_earlier_fit_left_explains_nothing():
    learn = learner().fit(1)
    learn.loss_func = F.mse_loss                                               # does not fit to the last batch; but that is not what is wrong
    for f in (lambda cb: learn.fit(1, cb), lambda cb: (learn.add_cbs(cb), learn.validate())):
        with pytest.raises(LookupError): f(At('begin_fit', raises(LookupError()), -20))
    learn = learner()
    with pytest.raises(ValueError) as e: Learner(net(), DataBunch(TEN, [(X, Y + 9)]), CE).fit(1)
    assert 'validation batch 0 of epoch 0' in str(e.value) and isinstance(e.value.__cause__, IndexError), "torch's own words are there, too"


# the same again

class Flip:
    "Draws for each picture."
    _order, generator = 11, None
    def __call__(self, im): return im.transpose(0) if torch.rand((), generator=self.generator) < .5 else im


SAME = '''
    import hashlib, sys, torch
    sys.path.insert(0, 'tests')
    from test_learner import *
    from pathlib import Path
    from exp.fast_batches import fast_dl
    def run(workers):
        set_seed(0)
        learn = get_learner([8, 8], items(Path(sys.argv[1]), 12, Flip(), size=16).to_databunch(16, seed=0, num_workers=workers, make_dl=fast_dl), .1, conv_layer, cbs=BatchTransformXCallback(lambda x: x.float()/255)).fit_one_cycle(2)
        return hashlib.sha256(b''.join(t.numpy().tobytes() for t in learn.model.state_dict().values())).hexdigest()
    print(run(0), run(0), run(2))
'''


def test_same_seed_same_weights_twice_in_a_fresh_process_and_with_workers(data_home):
    outs = []
    for p in [script(SAME, data_home) for _ in '12']:                          # each with hashes of its own
        out, err = p.communicate(timeout=400)
        assert p.returncode == 0, err
        outs += out.split()
    assert len(outs) == 6 and len(set(outs)) == 1, outs
