"""Optimizers: equal to independent references, by each of their ways of running; the slides' code; state; callbacks; the adapter."""
import copy
import io
import pickle
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exp.callbacks import AvgStatsCallback, Callback, CancelFitException, CudaCallback, DataBunch, Dataset, Recorder, Runner, accuracy, get_dls
from exp.data_block import ItemLoader
from exp.optimizers import (AverageGrad, AverageSqrGrad, CheckGrads, LR_Find, Optimizer, ParamScheduler, Stat, StatefulOptimizer,
                            StepCount, TensorList, TorchOptimizer, adam_opt, adam_step, debias, l2_reg, lamb, lars, momentum_step,
                            nesterov_step, norm_bias_groups, sgd_mom_opt, sgd_opt, sgd_step, weight_decay)

f64 = torch.float64


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='This overload of')
        yield


def group_norm(nf): return nn.GroupNorm(2, nf)


def net(seed=0, dtype=f64, norm=group_norm):
    "Group norm, for a bias before batch norm has a gradient of pure rounding, which Adam and LAMB would blow up to full size."
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Flatten(), nn.Linear(8*36, 10)).to(dtype)


def split(m): return [list(m[0].parameters()), [*m[1].parameters(), *m[4].parameters()]]


def set_lr(opt, lrs):
    for g, lr in zip(getattr(opt, 'hypers', None) or opt.param_groups, lrs): g['lr'] = lr


def walk(make, n=200, seed=0, dtype=f64, holes=True):
    "Weights after `n` steps on random pictures: two groups, two schedules, now and then no gradient for two of the tensors."
    m = net(seed, dtype)
    opt, g = make(m), torch.Generator().manual_seed(seed + 1)
    for i in range(n):
        x, y = torch.randn(4, 3, 8, 8, generator=g, dtype=f64).to(dtype), torch.randint(0, 10, (4,), generator=g)
        F.cross_entropy(m(x), y).backward()
        if holes and i % 5 == 3: m[0].bias.grad = m[4].weight.grad = None
        set_lr(opt, (.01*(1 + i % 7), .02/(1 + i % 3)))
        opt.step()
        opt.zero_grad()
    return torch.cat([p.detach().flatten() for p in m.parameters()])


def theirs(cls, **kw): return lambda m: cls([{'params': ps} for ps in split(m)], lr=.01, **kw)
def ours(f, **kw): return lambda m: f(split(m), lr=.01, **kw)


PAIRS = {
    'sgd': (theirs(torch.optim.SGD), sgd_opt, {}),
    'sgd, L2': (theirs(torch.optim.SGD, weight_decay=.1), partial(Optimizer, steppers=[sgd_step, l2_reg]), dict(wd=.1)),
    'momentum': (theirs(torch.optim.SGD, momentum=.8), sgd_mom_opt, dict(mom=.8)),
    'momentum, dampening, L2': (theirs(torch.optim.SGD, momentum=.9, dampening=.3, weight_decay=.1),
                                partial(StatefulOptimizer, steppers=[momentum_step, l2_reg], stats=AverageGrad(.3)), dict(wd=.1)),
    'nesterov': (theirs(torch.optim.SGD, momentum=.9, nesterov=True), partial(StatefulOptimizer, steppers=nesterov_step, stats=AverageGrad()), {}),
    'nesterov, L2': (theirs(torch.optim.SGD, momentum=.9, nesterov=True, weight_decay=.1),
                     partial(StatefulOptimizer, steppers=[nesterov_step, l2_reg], stats=AverageGrad()), dict(wd=.1)),
    'adam': (theirs(torch.optim.Adam, betas=(.9, .99), eps=1e-5), adam_opt(), {}),
    'adam, L2': (theirs(torch.optim.Adam, betas=(.8, .95), eps=1e-3, weight_decay=.1), adam_opt(decay=l2_reg), dict(mom=.8, sqr_mom=.95, eps=1e-3, wd=.1)),
    'adamw': (theirs(torch.optim.AdamW, betas=(.9, .99), eps=1e-5, weight_decay=.1), adam_opt(), dict(wd=.1)),
}


@pytest.mark.parametrize('name', PAIRS)
def test_equal_to_torch(name):
    ref, f, kw = PAIRS[name]
    for seed, ways in ((0, (False, True)), (1, (False,))):
        a = walk(ref, seed=seed)
        for fast in ways:
            b = walk(ours(f, fast=fast, **kw), seed=seed)
            assert torch.allclose(a, b, rtol=0, atol=1e-9), (fast, (a - b).abs().max())


class PaperLamb:
    "Algorithm 2 of You et al. 2019, one tensor at a time, nothing shared with exp; `top`: bound of the ratio or None."
    def __init__(self, groups, lr, b1=.9, b2=.99, eps=1e-6, wd=0., top=None):
        self.param_groups, self.h, self.s = [{'params': g, 'lr': lr} for g in groups], (b1, b2, eps, wd, top), {}
    def zero_grad(self):
        for g in self.param_groups:
            for p in g['params']: p.grad = None
    def step(self):
        b1, b2, eps, wd, top = self.h
        for g in self.param_groups:
            for p in g['params']:
                if p.grad is None: continue
                m, v, t = self.s.get(p, (0, 0, 0))
                m, v, t = b1*m + (1 - b1)*p.grad, b2*v + (1 - b2)*p.grad**2, t + 1
                self.s[p] = m, v, t
                r = (m/(1 - b1**t))/((v/(1 - b2**t))**.5 + eps) + wd*p.detach()
                w, u = (p.detach()**2).sum().item()**.5, (r**2).sum().item()**.5
                phi = w/u if w > 0 and u > 0 else 1.
                p.data = p.detach() - g['lr']*(phi if top is None else min(phi, top))*r


class PaperLars(PaperLamb):
    "Algorithm 1 of You et al. 2017 with the rate outside the velocity."
    def __init__(self, groups, lr, mom=.9, wd=0., coef=1e-3, eps=1e-8):
        self.param_groups, self.h, self.s = [{'params': g, 'lr': lr} for g in groups], (mom, wd, coef, eps), {}
    def step(self):
        mom, wd, coef, eps = self.h
        for g in self.param_groups:
            for p in g['params']:
                if p.grad is None: continue
                w, n = (p.detach()**2).sum().item()**.5, (p.grad**2).sum().item()**.5
                local = coef*w/(n + wd*w + eps) if w > 0 and n > 0 else 1.
                self.s[p] = mom*self.s.get(p, 0) + local*(p.grad + wd*p.detach())
                p.data = p.detach() - g['lr']*self.s[p]


@pytest.mark.parametrize('wd', (0., .1))
def test_lamb_and_lars_equal_the_papers_formula(wd):
    cases = [(partial(PaperLamb, lr=.01, wd=wd, top=top), partial(ours, lamb, wd=wd, max_ratio=top)) for top in (None, 2.)]
    for paper, own in [*cases, (partial(PaperLars, lr=.01, wd=wd), partial(ours, lars, wd=wd))]:
        ref = walk(lambda m, paper=paper: paper(split(m)))
        for fast in (False, True): assert torch.allclose(ref, walk(own(fast=fast)), rtol=0, atol=1e-9), (paper, fast)


def test_lamb_and_lars_equal_timm():
    optim = pytest.importorskip('timm.optim')
    ref = theirs(optim.Lamb, betas=(.9, .99), weight_decay=.1, max_grad_norm=None)
    assert torch.allclose(walk(ref, holes=False), walk(ours(lamb, wd=.1, max_ratio=None), holes=False), rtol=0, atol=1e-8)
    ref = theirs(optim.Lars, momentum=.9, weight_decay=.1)
    assert torch.allclose(walk(ref), walk(ours(lars, wd=.1)), rtol=0, atol=1e-9)


def test_pytorch_optimizers_lamb_departs_from_the_paper_where_we_say():
    po = pytest.importorskip('pytorch_optimizer')
    ref = theirs(po.Lamb, betas=(.9, .99))
    assert not torch.allclose(walk(ref, n=20, holes=False), walk(ours(lamb, max_ratio=None), n=20, holes=False), atol=1e-4)     # no debiasing, ‖w‖ clipped


# ---- the slides of lesson 11, as printed (addcddiv_ apart)

def slide_adam_step(p, lr, mom, mom_damp, step, sqr_mom, sqr_damp, grad_avg, sqr_avg, eps, **kwargs):
    debias1 = debias(mom,     mom_damp, step)
    debias2 = debias(sqr_mom, sqr_damp, step)
    p.data.addcdiv_(-lr / debias1, grad_avg, (sqr_avg/debias2).sqrt() + eps)
    return p
slide_adam_step._defaults = dict(eps=1e-5)


def slide_lamb_step(p, lr, mom, mom_damp, step, sqr_mom, sqr_damp, grad_avg, sqr_avg, eps, wd, **kwargs):
    debias1 = debias(mom,     mom_damp, step)
    debias2 = debias(sqr_mom, sqr_damp, step)
    r1 = p.data.pow(2).mean().sqrt()
    step = (grad_avg/debias1) / ((sqr_avg/debias2).sqrt()+eps) + wd*p.data
    r2 = step.pow(2).mean().sqrt()
    p.data.add_(-lr * min(r1/r2,10), step)
    return p
slide_lamb_step._defaults = dict(eps=1e-6, wd=0.)

three = [AverageGrad(dampening=True), AverageSqrGrad(), StepCount()]


@pytest.mark.parametrize('fast', (False, True), ids=('plain', 'batched'))
def test_slides_run_as_printed(fast):
    slide = partial(StatefulOptimizer, steppers=[slide_adam_step, weight_decay], stats=three)
    ref = theirs(torch.optim.Adam, betas=(.9, .99), eps=1e-5)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*parameter by parameter')             # this one batches
        assert torch.allclose(walk(ref), walk(ours(slide, fast=fast)), rtol=0, atol=1e-9)
    slide = partial(StatefulOptimizer, steppers=slide_lamb_step, stats=three)

    def start(f):
        def make(m):
            for p in m.parameters(): p.data += .1                                         # no weight of norm 0: there the slide stands still
            return f(m)
        return make
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        a, b = walk(start(ours(slide, wd=.1, fast=fast))), walk(start(ours(lamb, wd=.1)))
    assert torch.allclose(a, b, rtol=0, atol=1e-9)
    said = [w for w in ws if 'parameter by parameter' in str(w.message)]
    assert len(said) == fast and all('slide_lamb_step' in str(w.message) for w in said)   # cannot batch, says so once


def test_slides_lamb_never_moves_a_zero_bias_and_ours_does():
    for f, moves in ((partial(StatefulOptimizer, steppers=slide_lamb_step, stats=three), False), (lamb, True)):
        b = nn.Parameter(torch.zeros(5))
        opt = f([b], lr=.1)
        for _ in range(5): b.grad = torch.ones(5); opt.step()
        assert bool(b.any()) == moves
    w = nn.Parameter(torch.ones(5))
    opt = lamb([w], lr=.1)
    w.grad = torch.zeros(5); opt.step()                                                   # an update of norm 0
    assert w.isfinite().all() and w.equal(torch.ones(5))


# ---- the fast ways

class Ema(Stat):
    "A learner's own stat, that replaces its tensor."
    def init_state(self, p): return {'ema': p.detach().clone()}
    def update(self, p, state, **kwargs): return {**state, 'ema': state['ema']*.9 + p*.1}

def own_step(p, lr, ema, **kwargs):
    g = p.grad - p.grad.mean()
    p -= lr*torch.where(g.abs() > g.std(), g.sign(), g).clamp(-1, .5) + .01*(p - ema)/(1 + p.numel()**.5*0)
def branching(p, lr, **kwargs):
    p.mul_(1 - lr)
    if p.norm() > 1: p.add_(p.grad, alpha=-lr)
    else: p.sub_(lr*p.grad.sign())
def per_matrix(p, lr, **kwargs):
    g = p.grad if p.dim() < 2 else p.grad - p.grad.mean(tuple(range(1, p.dim())), keepdim=True)
    p.add_(g, alpha=-lr)
def noisy(p, lr, **kwargs): p.add_(p.grad + .1*torch.randn_like(p), alpha=-lr)
def assigns(p, lr, **kwargs): p.data = p.data - lr*p.grad.data
def old_style(p, lr, **kwargs): p.data.add_(-lr, p.grad.data); p.data.addcmul_(-lr*.1, p.data, p.grad.data)


OWN = {'own stat': partial(StatefulOptimizer, steppers=own_step, stats=Ema()), 'branch on values': partial(Optimizer, steppers=branching),
       'branch on shape': partial(Optimizer, steppers=per_matrix), 'assigns data': partial(Optimizer, steppers=assigns),
       '2019 argument order': partial(Optimizer, steppers=old_style)}


@pytest.mark.parametrize('name', OWN)
def test_a_learners_own_stepper_gives_the_same_batched(name):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert torch.allclose(walk(ours(OWN[name], fast=False)), walk(ours(OWN[name], fast=True)), rtol=0, atol=1e-9)


def test_what_cannot_batch_falls_back_whole_and_says_so_once():
    with pytest.warns(UserWarning, match='branching runs parameter by parameter') as ws:
        a = walk(ours(partial(Optimizer, steppers=[branching, weight_decay]), wd=.1, fast=True), n=20)
    assert len([w for w in ws if 'parameter by parameter' in str(w.message)]) == 1
    assert a.equal(walk(ours(partial(Optimizer, steppers=[branching, weight_decay]), wd=.1, fast=False), n=20))


def test_rehearsal_draws_no_random_numbers():
    m = net()
    for p in m.parameters(): p.grad = torch.ones_like(p)
    opt = Optimizer(m.parameters(), noisy, lr=0.)
    torch.manual_seed(3)
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); opt.step()
    a = torch.rand(1)
    torch.manual_seed(3)
    for p in m.parameters(): torch.randn_like(p)
    assert a == torch.rand(1)


def test_batched_float32_stays_close():
    for f in (adam_opt(), lamb, lars, sgd_mom_opt):
        a, b = walk(ours(f, wd=.1, fast=False), dtype=torch.float32), walk(ours(f, wd=.1, fast=True), dtype=torch.float32)
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_tensor_list_answers_like_its_tensors():
    a, b = [torch.rand(3), torch.rand(2, 2)], [torch.rand(3), torch.rand(2, 2)]
    x, y = TensorList(a, []), TensorList(b, [])
    for f in (lambda x, y: x*2 - y/3 + 1 - x, lambda x, y: 2 - x, lambda x, y: 1/(1 + x), lambda x, y: -x.sqrt()**2, lambda x, y: x.lerp(y, .3),
              lambda x, y: x.addcmul(x, y, value=.5).addcdiv(y, x + 1, value=2), lambda x, y: x.norm()*y, lambda x, y: x.norm(1),
              lambda x, y: torch.where(x > y, x, y), lambda x, y: torch.maximum(x, y).clamp(.2, .7), lambda x, y: x.add(y, alpha=3), lambda x, y: torch.stack([x, y]),
              lambda x, y: x.max(), lambda x, y: x.div(y, rounding_mode='floor'), lambda x, y: abs(x - y), lambda x, y: x @ y if x.dim() > 3 else x):
        try: got = f(x, y)
        except Exception as e: assert type(e).__name__ == 'NotBatched', e; continue
        for g, p, q in zip(got.ts, a, b): assert torch.allclose(g, f(p, q))
    for f in (bool, float, len, list, lambda x: x.shape, lambda x: x.item(), lambda x: min(x.norm(), 1)):
        with pytest.raises(Exception, match='many tensors|different answers'): f(x)


@pytest.mark.parametrize('name', ('adam', 'lamb'))
def test_compiled_equals_plain(name):
    "Large tensors by one compiled pass: contiguous, channels-last, some without a gradient, lr changing at every step."
    pytest.importorskip('torch._inductor')
    shapes = [(300,), (64, 32, 3, 3), (100, 100), (10,), (32, 16, 3, 3)]

    def walk(fast):
        g = torch.Generator().manual_seed(0)
        ps = [nn.Parameter(torch.randn(s, generator=g, dtype=f64)) for s in shapes]
        ps[1].data = ps[1].data.contiguous(memory_format=torch.channels_last)
        opt = {'adam': adam_opt(), 'lamb': lamb}[name](ps, lr=.01, wd=.1, fast=fast)
        opt.big = 1000
        for i in range(200):
            opt.hypers[0]['lr'] = .01*(1 + i % 7)
            for j, p in enumerate(ps):
                p.grad = None if j == 2 and i % 3 == 1 else torch.empty_like(p).copy_(torch.randn(p.shape, generator=g, dtype=f64))
            where = [p.data_ptr() for p in ps]
            opt.step()
            assert where == [p.data_ptr() for p in ps] and ps[1].is_contiguous(memory_format=torch.channels_last)
        return ps, opt
    (a, plain), (b, fast) = walk(False), walk('compile')
    if fast.compiled is None: pytest.skip('no compiler here')
    for p, q in zip(a, b): assert torch.allclose(p, q, rtol=0, atol=1e-6)
    assert [plain.state[p]['step'] for p in a] == [fast.state[p]['step'] for p in b]


@pytest.mark.parametrize('event', ['p.data replaced', 'memory format', 'load_state_dict', 'state tensor replaced', 'deepcopy', 'gradient of another format'])
def test_compiled_steps_follow_when_tensors_are_replaced(event):
    "The flat views are kept from step to step; here what they were views of goes away in the middle of a walk."
    pytest.importorskip('torch._inductor')
    def walk(fast):
        g, cl = torch.Generator().manual_seed(0), torch.channels_last
        ps = [nn.Parameter(torch.randn(s, generator=g, dtype=f64)) for s in ((64, 32, 3, 3), (50, 60))]
        opt = adam_opt()(ps, lr=.01, wd=.1, fast=fast)
        opt.big = 100
        for i in range(9):
            for p in ps: p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g, dtype=f64))
            if i == 5:
                if event == 'p.data replaced': ps[0].data = ps[0].data.clone()
                if event == 'memory format': ps[0].data = ps[0].data.contiguous(memory_format=cl)
                if event == 'load_state_dict': opt.load_state_dict(copy.deepcopy(opt.state_dict()))
                if event == 'state tensor replaced': opt.state[ps[0]]['grad_avg'] = opt.state[ps[0]]['grad_avg']*2
                if event == 'gradient of another format': ps[0].grad = ps[0].grad.contiguous(memory_format=cl)
                if event == 'deepcopy':
                    grads = [p.grad for p in ps]
                    opt = copy.deepcopy(opt)
                    ps = opt.param_groups[0]
                    for p, d in zip(ps, grads): p.grad = d.clone()
            opt.step()
        return torch.cat([p.detach().flatten() for p in ps]), opt
    (a, _), (b, fast) = walk(False), walk('compile')
    if fast.compiled is None: pytest.skip('no compiler here')
    assert torch.allclose(a, b, rtol=0, atol=1e-9)


def rowwise(p, lr, **kwargs): p.sub_(lr*p.grad/p.grad.norm(dim=0, keepdim=True))

def test_what_means_something_else_when_flat_is_not_compiled():
    def go(fast):
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(40, 30, dtype=f64)) for _ in range(3)]
        opt = Optimizer(ps, rowwise, lr=.1, fast=fast)
        opt.big = 100
        for p in ps: p.grad = torch.randn(40, 30, dtype=f64)
        opt.step()
        return torch.cat(ps)
    with pytest.warns(UserWarning, match='no compiled step for rowwise'): a = go('compile')
    assert torch.allclose(a, go(False), rtol=0, atol=1e-12)


# ---- hypers and groups

@pytest.mark.parametrize('f,kw', [(sgd_opt, {}), (sgd_mom_opt, {}), (adam_opt(), {}), (adam_opt(decay=l2_reg), {}), (lamb, {}), (lars, {})])
def test_every_hyper_changes_the_result(f, kw):
    base = f(net().parameters(), lr=.01, wd=.05)
    start = dict(base.hypers[0])
    changed = {'lr': .02, 'wd': .2, 'mom': .5, 'sqr_mom': .5, 'eps': .1, 'adapt': False, 'max_ratio': .5, 'trust_coef': .1}
    a = walk(lambda m: f(list(m.parameters()), **start), n=5)
    for k in start:
        h = {**start, k: changed[k]}
        def make(m, h=h):
            opt = f(list(m.parameters()), **h)
            opt.set = True
            return opt
        b = walk(make, n=5) if k != 'lr' else None
        if b is not None: assert not a.equal(b), k


def test_lr_of_each_group_counts():
    m = net()
    opt = sgd_opt([{'params': m[0].parameters(), 'lr': 0.}, {'params': m[4].parameters()}], lr=1.)
    before = copy.deepcopy(m)
    for p in m.parameters(): p.grad = torch.ones_like(p)
    opt.step()
    assert m[0].weight.equal(before[0].weight) and torch.allclose(m[4].weight, before[4].weight - 1) and m[1].weight.equal(before[1].weight)


@pytest.mark.parametrize('call,match', [
    (lambda: sgd_opt(net().parameters(), lr=.1, momentum=.9), "'momentum'; known are lr, wd"),
    (lambda: adam_opt()(net().parameters(), lr=.1, betas=(.9, .99)), 'known are eps, lr, mom, sqr_mom, wd'),
    (lambda: sgd_opt(net().parameters()), "needs 'lr'"),
    (lambda: StatefulOptimizer(net().parameters(), adam_step, AverageGrad(), lr=.1), "adam_step needs.*'sqr_avg'"),
    (lambda: Optimizer(net().parameters(), lambda p, lr: None, lr=.1), 'needs \\*\\*kwargs'),
    (lambda: sgd_opt([], lr=.1), 'empty'),
    (lambda: sgd_opt([[torch.ones(1)], []], lr=.1), 'group 1 is empty'),
    (lambda: sgd_opt([torch.ones(1, requires_grad=True)]*2, lr=.1), 'twice'),
    (lambda: StatefulOptimizer([torch.ones(1)], momentum_step, [AverageGrad(), AverageGrad(True)], lr=.1).state_of(torch.ones(1)), 'two stats'),
])
def test_errors_say_what_is_wrong(call, match):
    with pytest.raises(ValueError, match=match): call()


def test_wrong_kinds_are_type_errors():
    with pytest.raises(TypeError, match='one tensor'): sgd_opt(torch.ones(1), lr=.1)
    with pytest.raises(TypeError, match='str'): sgd_opt([torch.ones(1), 'x'], lr=.1)
    with pytest.raises(TypeError, match='makes an optimizer function'): adam_opt(net().parameters(), lr=.1)


def test_norm_bias_groups():
    m = net()
    g = norm_bias_groups(m, no_decay=True, no_adapt=True)
    assert [n for n, _ in g[0]['params']] == ['0.weight', '4.weight'] and [n for n, _ in g[1]['params']] == ['0.bias', '1.weight', '1.bias', '4.bias']
    opt = lamb(g, lr=.1, wd=.3)
    assert [h['wd'] for h in opt.hypers] == [.3, 0.] and [h['adapt'] for h in opt.hypers] == [True, False]
    assert 'adapt' not in norm_bias_groups(m)[1] and len(norm_bias_groups(m, no_decay=False)) == 1
    assert 'wd' not in norm_bias_groups(m, no_decay=False, no_adapt=True)[1]
    # each switch does what it says and nothing else
    def after(**kw):
        m = net()
        opt = lamb(norm_bias_groups(m, **kw), lr=.1, wd=.3)
        for p in m.parameters():
            p.data += torch.linspace(0, 1, p.numel(), dtype=f64).view_as(p)
            p.grad = torch.ones_like(p)*.1
        opt.step()
        return m
    both, decay, adapt, none = (after(no_decay=a, no_adapt=b) for a, b in ((1, 1), (1, 0), (0, 1), (0, 0)))
    assert both[0].weight.equal(none[0].weight) and not both[1].weight.equal(decay[1].weight)
    assert not both[1].weight.equal(adapt[1].weight) and not decay[1].weight.equal(none[1].weight)


def test_freeze_and_thaw():
    m = net()
    opt = sgd_mom_opt(split(m), lr=.1)
    x, y = torch.randn(4, 3, 8, 8, dtype=f64), torch.arange(4)
    opt.freeze(0)
    w, v = m[0].weight.clone(), m[4].weight.clone()
    F.cross_entropy(m(x), y).backward(); opt.step(); opt.zero_grad()
    assert w.equal(m[0].weight) and not v.equal(m[4].weight) and m[0].weight.grad is None
    opt.freeze(0, on=False)
    F.cross_entropy(m(x), y).backward(); opt.step()
    assert not w.equal(m[0].weight)


def test_l2_with_momentum_reaches_the_average():
    "The 2019 lesson's l2_reg ran after the averages were taken, so that with momentum_step it did nothing."
    p = nn.Parameter(torch.ones(3))
    opt = StatefulOptimizer([p], [momentum_step, l2_reg], AverageGrad(), lr=.1, wd=.5)
    p.grad = torch.zeros(3); opt.step()
    assert torch.allclose(p, torch.full((3,), .95))


# ---- state

adam = adam_opt()


def trained(f=adam, named=True, steps=3, dtype=f64, **kw):
    m = net(dtype=dtype)
    opt = f(norm_bias_groups(m) if named else list(m.parameters()), lr=.01, **kw)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        F.cross_entropy(m(torch.randn(4, 3, 8, 8, generator=g, dtype=f64).to(dtype)), torch.arange(4)).backward()
        opt.step(); opt.zero_grad()
    return m, opt


@pytest.mark.parametrize('named', (True, False))
def test_state_survives_a_file_and_goes_on_the_same(named):
    m, opt = trained(named=named, wd=.1)
    f = io.BytesIO(); torch.save(opt.state_dict(), f); f.seek(0)
    sd = torch.load(f, weights_only=True)
    m2 = copy.deepcopy(m)
    opt2 = adam_opt()(norm_bias_groups(m2) if named else list(m2.parameters()), lr=5.)
    opt2.load_state_dict(sd)
    for mod, o in ((m, opt), (m2, opt2)):
        for _ in range(3):
            F.cross_entropy(mod(torch.ones(4, 3, 8, 8, dtype=f64)), torch.arange(4)).backward(); o.step(); o.zero_grad()
    assert all(p.equal(q) for p, q in zip(m.parameters(), m2.parameters()))
    assert all(v.data_ptr() != opt.state[p]['grad_avg'].data_ptr() for p, v in zip(m.parameters(), [opt2.state[q]['grad_avg'] for q in m2.parameters()]))


def test_state_follows_names_not_places():
    m, opt = trained()
    m2 = copy.deepcopy(m)
    named = list(m2.named_parameters())[::-1]
    opt2 = adam_opt()([{'params': [o for o in named if o[1].ndim > 1]}, {'params': [o for o in named if o[1].ndim <= 1], 'wd': 0.}], lr=.01)
    opt2.load_state_dict(opt.state_dict())
    for (n, p), q in zip(m.named_parameters(), m2.parameters()): assert opt.state[p]['sqr_avg'].equal(opt2.state[q]['sqr_avg']), n


def test_state_that_does_not_fit_is_refused_and_changes_nothing():
    m, opt = trained()
    sd, before = opt.state_dict(), copy.deepcopy(opt.state_dict())
    other = copy.deepcopy(sd); other['state']['0.weight']['grad_avg'] = torch.zeros(9, 3, 3, 3)
    cases = [({}, 'no state'), ({**sd, 'version': 9}, 'newer'), ({**sd, 'params': sd['params'][1:]}, '0.weight'), ({**sd, 'hypers': sd['hypers'][:1]}, '1 groups'),
             (trained(sgd_mom_opt)[1].state_dict(), 'another optimizer'), (other, '0.weight, grad_avg: saved with shape \\(9, 3, 3, 3\\)')]
    for bad, match in cases:
        with pytest.raises(ValueError, match=match): opt.load_state_dict(bad)
    now = opt.state_dict()
    assert now['hypers'] == before['hypers'] and all(now['state'][k][n].equal(v) for k, s in before['state'].items() for n, v in s.items() if torch.is_tensor(v))


# ---- the bridge to torch

def test_one_cycle_and_grad_scaler_drive_ours():
    m = net()
    opt = TorchOptimizer(sgd_mom_opt(split(m), lr=.1))
    assert isinstance(opt, torch.optim.Optimizer)
    ref_m = net()
    ref = torch.optim.SGD([{'params': ps} for ps in split(ref_m)], lr=.1, momentum=.9)
    scheds = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[.3, .1], total_steps=30, cycle_momentum=False) for o in (opt, ref)]
    scalers = [torch.amp.GradScaler('cpu', init_scale=8.) for _ in range(2)]
    g = torch.Generator().manual_seed(0)
    for i in range(25):
        x, y = torch.randn(4, 3, 8, 8, generator=g, dtype=f64), torch.randint(0, 10, (4,), generator=g)
        for mod, o, sched, scaler in zip((m, ref_m), (opt, ref), scheds, scalers):
            scaler.scale(F.cross_entropy(mod(x), y)*(float('inf') if i == 7 else 1)).backward()
            scaler.step(o); scaler.update(); sched.step(); o.zero_grad()
    assert all(torch.allclose(p, q, rtol=0, atol=1e-10) for p, q in zip(m.parameters(), ref_m.parameters()))
    assert opt.opt.hypers[0]['lr'] == opt.param_groups[0]['lr'] == ref.param_groups[0]['lr'] != .1
    opt.opt.hypers[1]['lr'] = 7.
    assert opt.param_groups[1]['lr'] == 7. and opt.step(lambda: torch.tensor(3.)) == 3
    torch.save(opt.state_dict(), f := io.BytesIO()); f.seek(0)
    opt.load_state_dict(torch.load(f, weights_only=True))


# ---- callbacks

def runner(opt_func=sgd_mom_opt, cbs=(), n=200, lr=.1, bad=False):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 3, 8, 8, generator=g), torch.randint(0, 10, (n,), generator=g)
    if bad: x[3] = float('nan')
    data = DataBunch(*get_dls(Dataset(x, y), Dataset(x[:20], y[:20]), 20, seed=3), 3, 10)
    m = net(dtype=torch.float32, norm=nn.BatchNorm2d)
    return Runner(m, data, F.cross_entropy, opt_func(m.parameters(), lr=lr), cbs)


def test_scheduler_recorder_and_cuda_callbacks_work_with_ours():
    rec = Recorder()
    run = runner(cbs=[rec, CudaCallback('cpu'), ParamScheduler('mom', lambda p: .5 + .4*p), ParamScheduler('lr', lambda p: .1*(1 - p))])
    run.fit(2)
    assert len(rec.hypers['lr']) == 20 and abs(rec.hypers['lr'][10] - .05) < 1e-9 and abs(rec.hypers['mom'][10] - .7) < 1e-9
    with pytest.raises(ValueError, match='momentum'): runner(cbs=[ParamScheduler('momentum', lambda p: .9)]).fit(1)


def everything(run):
    "All that LR_Find must leave alone, copied."
    o = run.opt
    return copy.deepcopy((run.model.state_dict(), [dict(h) for h in o.hypers] if hasattr(o, 'hypers') else [{k: v for k, v in g.items() if k != 'params'} for g in o.param_groups],
                          [dict(s) for s in o.state.values()], torch.get_rng_state(), random.getstate(), run.data.train_dl.generator.get_state(),
                          run.n_iter, run.model.training, [p.grad is None for p in run.model.parameters()]))


def same(a, b):
    if torch.is_tensor(a): return a.equal(b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Draws(Callback):
    "Uses up random numbers, and fails at batch `at`."
    def __init__(self, at=None): self.at = at
    def after_pred(self, run):
        torch.rand(3); random.random()
        if run.iter == self.at: raise RuntimeError('on purpose')


@pytest.mark.parametrize('opt_func', (sgd_mom_opt, adam_opt(), partial(torch.optim.SGD, momentum=.9)), ids=('sgd', 'adam', 'torch'))
@pytest.mark.parametrize('at', (None, 4))
def test_lr_find_puts_everything_back(opt_func, at):
    run = runner(opt_func).fit(1)                               # an optimizer with state
    before = everything(run)
    run.cbs = [find := LR_Find(max_iter=30, max_lr=1.), Draws(at)]
    if at is None: run.fit(10)
    else:
        with pytest.raises(RuntimeError, match='on purpose'): run.fit(10)
    assert len(find.lrs) > 3 and same(before, everything(run))
    run.cbs = []
    a = runner(opt_func).fit(1).fit(1)
    run.fit(1)                                                  # and the next epoch is the one it would have been
    assert all(p.equal(q) for p, q in zip(a.model.parameters(), run.model.parameters()))


def test_lr_find_leaves_the_place_in_the_data_and_numpy():
    "The order of an ItemLoader follows from its epoch, and a transform may draw from numpy."
    class DrawsNumpy(Callback):
        def after_pred(self, run): np.random.rand()
    run = runner()
    x, y = torch.randn(60, 20), torch.randint(0, 3, (60,))
    run.data = DataBunch(ItemLoader(Dataset(x, y), 10, shuffle=True, seed=3), ItemLoader(Dataset(x, y), 10, shuffle=False, seed=3))
    run.model = nn.Linear(20, 3); run.opt = sgd_mom_opt(run.model.parameters(), lr=.1)
    order, at = [b[1].tolist() for b in ItemLoader(Dataset(x, y), 10, shuffle=True, seed=3)], np.random.get_state()[2]
    run.cbs = [find := LR_Find(max_iter=20, max_lr=1.), DrawsNumpy()]
    run.fit(99)
    assert len(find.lrs) == 20 and run.data.train_dl.epoch == 0 and np.random.get_state()[2] == at
    assert [b[1].tolist() for b in run.data.train_dl] == order


def test_lr_find_suggests_a_rate_that_trains():
    find = LR_Find(max_iter=80, max_lr=100.)
    run = runner(sgd_opt, [find], lr=.01).fit(20)
    assert find.lrs[0] == 1e-6 and all(b/a == pytest.approx(find.lrs[1]/find.lrs[0]) for a, b in zip(find.lrs, find.lrs[1:]))
    assert 1e-4 < find.suggestion < 10
    run.cbs = [st := AvgStatsCallback(accuracy, silent=True), ParamScheduler('lr', lambda p: find.suggestion)]
    run.fit(5)
    assert st.rows[-1]['train_loss'] < st.rows[0]['train_loss']
    with pytest.raises(ValueError, match='did not fall'):
        bad = LR_Find(); bad.lrs, bad.losses = [1e-6*2**i for i in range(12)], [1 + i for i in range(12)]
        _ = bad.suggestion


def test_nan_gradient_is_named():
    with pytest.raises(FloatingPointError, match=r'gradient of 0\.weight is NaN at step \d+ \(epoch 0, batch \d+'): runner(cbs=[CheckGrads()], bad=True).fit(1)
    runner(cbs=[CheckGrads()]).fit(1)
    runner(bad=True).fit(1)                                     # off by default


# ---------------------------------------------------------------- found by a second reading

def two(): return torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)


def test_a_partial_names_a_hyper():
    p = torch.ones(1, requires_grad=True); p.grad = torch.zeros(1)
    opt = Optimizer([p], [partial(weight_decay, wd=.1), sgd_step], lr=.5)
    opt.step()
    assert opt.hypers[0]['wd'] == .1 and p.item() == pytest.approx(.95)                       # it was 0: decay never happened
    assert Optimizer([p], [partial(weight_decay, wd=.1), sgd_step], lr=.5, wd=.2).hypers[0]['wd'] == .2


def test_a_group_may_be_one_tensor_as_in_torch():
    a, b = two()
    opt = Optimizer([{'params': a}, {'params': [b], 'lr': .2}], sgd_step, lr=.1)
    assert [len(ps) for ps in opt.param_groups] == [1, 1] and opt.param_groups[0][0] is a


def test_two_parameters_of_one_name():
    a, b = two()
    with pytest.raises(ValueError, match="two parameters are called 'weight'"): sgd_mom_opt([[('weight', a)], [('weight', b)]], lr=.1)


def test_state_goes_by_group_and_other_groups_are_refused():
    a, b = two()
    def opt(*groups): return sgd_mom_opt([{'params': [(n, p)], 'wd': wd} for n, p, wd in groups], lr=.1)
    saved = opt(('a', a, .1), ('b', b, 0.)).state_dict()
    with pytest.raises(ValueError, match='other groups'): opt(('b', b, 0.), ('a', a, .1)).load_state_dict(saved)
    opt(('a', a, .3), ('b', b, 0.)).load_state_dict(saved)
    del saved['sizes']                                                                       # as it was saved before
    opt(('a', a, .3), ('b', b, 0.)).load_state_dict(saved)


def test_a_hyper_of_one_group_only_comes_back():
    def step(p, lr, scale=1., **kwargs): p.sub_(p.grad, alpha=lr*scale)
    a, b = two()
    def opt(): return StatefulOptimizer([{'params': [a], 'scale': .5}, {'params': [b]}], [step], [AverageGrad()], lr=.1)
    opt().load_state_dict(opt().state_dict())


def test_a_state_of_row_means_comes_back():
    class Rows(Stat):
        def init_state(self, p): return {'rows': torch.zeros_like(p[:, :1]) if p.ndim > 1 else torch.zeros_like(p)}
        def update(self, p, state, **kwargs): return {'rows': state['rows'] + p.grad.abs().mean(-1, keepdim=True)}
    def step(p, lr, rows, **kwargs): p.sub_(p.grad/(rows + 1), alpha=lr)
    w = torch.ones(3, 4, requires_grad=True); w.grad = torch.ones(3, 4)
    def opt(p): return StatefulOptimizer([p], [step], [Rows()], lr=.1, fast=False)
    a = opt(w); a.step()
    b = opt(w); b.load_state_dict(a.state_dict())
    assert next(iter(b.state.values()))['rows'].shape == (3, 1)
    with pytest.raises(ValueError, match='shape'): opt(torch.ones(5, 4, requires_grad=True)).load_state_dict(a.state_dict())


def test_a_stat_without_its_hyper_is_found_at_once():
    class Needs(Stat):
        def init_state(self, p): return {'x': torch.zeros_like(p)}
        def update(self, p, state, share, **kwargs): return {'x': state['x']*share}
    with pytest.raises(ValueError, match="Needs needs 'share'"): StatefulOptimizer([two()[0]], [sgd_step], [Needs()], lr=.1)


def test_a_stat_that_draws_leaves_the_random_numbers_alone():
    class Draws(Stat):
        def init_state(self, p): return {'x': torch.rand_like(p)}
        def update(self, p, state, **kwargs): return state
    torch.manual_seed(0); want = torch.rand(1)
    torch.manual_seed(0); StatefulOptimizer([two()[0]], [sgd_step], [Draws()], lr=.1)
    assert torch.rand(1).equal(want)


def test_a_stepper_by_rows_is_not_compiled_flat():
    def rows(p, lr, **kwargs): p.sub_(lr*p.grad/p.grad.norm(dim=-1, keepdim=True))
    ps = [torch.ones(64, requires_grad=True), torch.ones(64, 64, requires_grad=True)]
    for p in ps: p.grad = torch.linspace(.1, 1, p.numel()).view_as(p)
    want = [p.detach() - .1*p.grad/p.grad.norm(dim=-1, keepdim=True) for p in ps]
    with pytest.warns(UserWarning, match='no compiled step'): Optimizer(ps, rows, fast='compile', lr=.1).step()
    assert all(torch.allclose(p, w) for p, w in zip(ps, want))


def test_lr_find_takes_negative_losses_and_shows_a_curve_without_a_suggestion():
    f = LR_Find()
    f.losses = [-1.]
    f.after_loss(type('run', (), {'loss': torch.tensor(-3.)}))                               # it ended the search: −3 is not below 4 · −3
    f.after_loss(type('run', (), {'loss': torch.tensor(5.9)}))
    with pytest.raises(CancelFitException): f.after_loss(type('run', (), {'loss': torch.tensor(6.1)}))
    f.lrs, f.losses = [10**-i for i in range(8)], [8. - i for i in range(8)]
    with pytest.raises(ValueError, match='too few'): print(f.suggestion)
    assert f.plot().get_title() == 'no rate to suggest'


def weights_of(m): return torch.cat([p.detach().flatten() for p in m.parameters()])


def loss_of(p): return (p - 1).abs().pow(2).sum()


@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('opt_func', [adam_opt(), lamb], ids=['adam', 'lamb'])
def test_complex_parameters_and_sparse_gradients_have_no_average_of_squares(opt_func, fast):
    "The square of a complex gradient is no size: Adam took steps in wrong directions, without a word."
    ps = [torch.tensor([1 + 1j, 2 - .5j], requires_grad=True), torch.tensor([.3j], requires_grad=True)]
    sum(map(loss_of, ps)).backward()
    with pytest.raises(TypeError, match='complex'): opt_func(ps, lr=.1, fast=fast).step()
    e = torch.nn.Embedding(5, 3, sparse=True)
    e(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r'sparse') as err: opt_func(e.parameters(), lr=.1, fast=fast).step()
    assert len(str(err.value)) < 200


def test_complex_parameters_with_momentum_are_torchs():
    def run(opt_func):
        ps = [torch.tensor([1 + 1j, 2 - .5j], requires_grad=True), torch.tensor([.3j], requires_grad=True)]
        opt = opt_func(ps)
        for _ in range(5): opt.zero_grad(); sum(map(loss_of, ps)).backward(); opt.step()
        return torch.cat([p.detach() for p in ps])
    assert torch.allclose(run(lambda ps: sgd_mom_opt(ps, lr=.05)), run(lambda ps: torch.optim.SGD(ps, .05, momentum=.9)))


def test_a_torch_optimizer_can_be_copied_and_pickled():
    torch.manual_seed(0); m = nn.Linear(3, 2); opt = TorchOptimizer(adam_opt()(m.named_parameters(), lr=.01))
    sched = torch.optim.lr_scheduler.ExponentialLR(opt, .5)
    def step(m, opt): opt.zero_grad(); sum(p.pow(2).sum() for p in m.parameters()).backward(); opt.step(); return weights_of(m)
    step(m, opt); sched.step()
    m2, opt2 = copy.deepcopy((m, opt))
    assert opt2.param_groups[0]['lr'] == .005 and opt2.param_groups[0] is opt2.opt.hypers[0] and opt2.state is opt2.opt.state
    before = weights_of(m)
    stepped = step(m2, opt2)
    assert weights_of(m).equal(before) and not stepped.equal(before) and step(m, opt).equal(stepped)
    torch.save((m, opt), f := io.BytesIO()); f.seek(0)
    assert step(*torch.load(f, weights_only=False)).equal(step(m, opt))


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('fast', [True, 'compile'])
def test_a_first_gradient_that_is_not_finite_makes_nothing_slow(fast, value):
    "There is nothing to compare by: the rehearsal waits for one that is."
    def run(fast, f=None):
        g, ps = torch.Generator().manual_seed(0), [torch.ones(n, 40) for n in (3, 4)]
        opt = adam_opt()(ps, lr=.1, fast=fast) if f is None else Optimizer(ps, [f], lr=.1, fast=fast)
        for i in range(4):
            for p in ps: p.grad = torch.randn(p.shape, generator=g)
            if i < 2: ps[0].grad[0, 0] = value
            opt.step()
            if i < 2: ps[0].fill_(1.)                                                    # as after a look that went too far
        return ps, opt
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('default', message='no compiled step')
        (a, opt), (b, _) = run(fast), run(False)
    assert all(torch.allclose(p, q, atol=1e-6, equal_nan=True) for p, q in zip(a, b)) and not opt.unbatched
    if fast == 'compile' and opt.compiled is None: pytest.skip('no compiler here')
    assert fast != 'compile' or opt.compiled
    def odd(p, lr, **kwargs): p.sub_(p.grad, alpha=lr if torch.is_tensor(p) else 2*lr)
    with pytest.warns(UserWarning, match='another result'): assert run(True, odd)[1].unbatched


def test_a_group_has_names_for_all_or_for_none():
    "With a tensor first the pairs were taken for tensors, and failed in the step."
    a, b = two()
    for ps in ([a, ('b', b)], [('a', a), b], [{'params': [a, ('b', b)]}]):
        with pytest.raises(TypeError, match='mixes tensors and'): sgd_opt(ps, lr=.1)
    with pytest.raises(TypeError, match='tuple'): sgd_opt([a, ('b', 'b')], lr=.1)
    assert sgd_opt([[('a', a)], [b]], lr=.1).names == {a: 'a'}


@pytest.mark.parametrize('fast', [True, False, 'compile'])
def test_a_hyper_that_is_put_in_later_and_read_by_nobody_is_an_error(fast):
    a, b = two(); a.grad, b.grad = torch.ones(3), torch.ones(2)
    opt = sgd_mom_opt([[a], [b]], lr=.1, fast=fast)
    opt.hypers[1]['momentum'] = .5
    before = b.detach().clone()
    with pytest.raises(ValueError, match="'momentum' is no hyper of this optimizer.*lr"): opt.step()
    assert b.equal(before)
    del opt.hypers[1]['momentum']; opt.step()
    torchs = TorchOptimizer(sgd_mom_opt([a], lr=.1))
    torch.optim.lr_scheduler.StepLR(torchs, 1)                                               # puts initial_lr there
    torchs.step()


# ---- numbers that are not the same for every parameter

class GradNorm(Stat):
    "A Python number for each parameter: the gradient's norm, from step `start` on."
    def __init__(self, start=0): self.start = start
    def init_state(self, p): return {'gn': 1., 'n': 0}
    def update(self, p, state, **kwargs):
        return {**state, 'n': state['n'] + 1, 'gn': p.grad.norm().item() if state['n'] >= self.start else 1.}

class Track(Stat):
    "A list for each parameter, which grows: from the first step on, or put there by it."
    def __init__(self, late): self.late = late
    def init_state(self, p): return {} if self.late else {'track': []}
    def update(self, p, state, lr, **kwargs):
        state.setdefault('track', []).append(lr if p.ndim else 0.)
        return state

class Late(Stat):
    "A tensor that the first update puts there."
    def init_state(self, p): return {}
    def update(self, p, state, **kwargs):
        state.setdefault('calls', torch.zeros((), dtype=f64)).add_(1)
        return state

class Mean(Stat):
    "A number rounded, so that some parameters have the same and some have not."
    def init_state(self, p): return {'mean': 0}
    def update(self, p, state, **kwargs): return {**state, 'mean': round(p.grad.mean().item()*3)}

def normed(p, lr, gn, **kwargs): p.add_(p.grad, alpha=-lr/gn)
def tracked(p, lr, track, **kwargs): p.mul_(1 - lr/len(track)); track.append(len(track))
def called(p, lr, calls, **kwargs): p.sub_(p.grad/calls*lr)
def by_mean(p, lr, mean, **kwargs): p.add_(p.grad, alpha=-lr*(1 + mean))

APART = {'from the first step': ([normed], [GradNorm()]), 'from the third': ([normed], [GradNorm(2)]), 'others around it': ([l2_reg, normed, adam_step, weight_decay], [
         AverageGrad(True), GradNorm(1), AverageSqrGrad(), StepCount()]), 'two alike': ([by_mean, weight_decay], [Mean(), AverageGrad()]), 'a list': ([tracked], [Track(False)]),
         'a list put there later': ([tracked], [Track(True)]), 'a tensor put there later': ([called], [Late()])}

@pytest.mark.parametrize('fast', [True, 'compile'])
@pytest.mark.parametrize('name', APART)
def test_numbers_of_each_parameter_stay_its_own(name, fast):
    "All of them got the first one's, without a word."
    steppers, stats = APART[name]
    def go(fast):
        g = torch.Generator().manual_seed(0)
        ps = [nn.Parameter(torch.randn(s, generator=g, dtype=f64)) for s in ((3, 4), (5,), (3, 4), (2, 2, 2), (5,))]
        opt = StatefulOptimizer(ps, steppers, stats, lr=.1, fast=fast)
        opt.big = 8
        for i in range(6):
            for j, p in enumerate(ps): p.grad = None if i == 3 and j == 1 else torch.randn(p.shape, generator=g, dtype=f64)*(1 + j)
            opt.step()
        return ps, [opt.state[p] for p in ps]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        (ps, ss), (qs, ts) = go(fast), go(False)
    assert all(torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in zip(ps, qs))
    for s, t in zip(ss, ts):
        assert s.keys() == t.keys() and all(torch.allclose(v, t[k]) if torch.is_tensor(v) else v == t[k] for k, v in s.items())


def test_numbers_of_each_parameter_by_hand():
    ps = [torch.zeros(3) for _ in range(3)]
    opt = StatefulOptimizer(ps, [normed], GradNorm(), lr=1.)
    for p, g in zip(ps, (1., 10., 100.)): p.grad = torch.full((3,), g)
    with pytest.warns(UserWarning, match='normed runs parameter by parameter.*numbers'):
        warnings.filterwarnings('ignore', message='GradNorm runs')
        opt.step()
    assert all(torch.allclose(p, torch.tensor(-3**-.5)) for p in ps) and [opt.state[p]['gn'] for p in ps] == pytest.approx([3**.5*g for g in (1, 10, 100)])


def test_a_parameter_that_comes_later_or_from_a_file_counts_for_itself_and_the_others_stay_one_list():
    lists = []
    def look(p, step, **kwargs): lists.append((len(p.ts) if isinstance(p, TensorList) else 1, step))
    def go(fast, through_a_file):
        g = torch.Generator().manual_seed(0)
        ps = [nn.Parameter(torch.randn(4, generator=g, dtype=f64)) for _ in range(5)]
        def new(): return StatefulOptimizer(ps, [adam_step, look], [AverageGrad(True), AverageSqrGrad(), StepCount()], lr=.1, fast=fast)
        opt = new()
        for i in range(5):
            lists.clear()
            for j, p in enumerate(ps): p.grad = torch.randn(4, generator=g, dtype=f64) if j < 3 or i > 2 else None
            if i == 4 and through_a_file: sd, opt = copy.deepcopy(opt.state_dict()), new(); opt.load_state_dict(sd)
            opt.step()
        return ps, opt
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for through_a_file in (False, True):
            qs, _ = go(False, through_a_file)
            ps, opt = go(True, through_a_file)
            assert {(3, 5), (2, 2)} <= set(lists) and not opt.unbatched and [opt.state[p]['step'] for p in ps] == [5, 5, 5, 2, 2]
            assert all(torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in zip(ps, qs))


@pytest.mark.parametrize('how', ['pickle', 'torch.save', 'deepcopy'])
def test_a_compiled_optimizer_can_be_pickled(how):
    pytest.importorskip('torch._inductor')
    g = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(40, 30, generator=g, dtype=f64)) for _ in range(2)]
    opt = adam_opt()(ps, lr=.01, fast='compile')
    def step(ps, opt):
        for i, p in enumerate(ps): p.grad = torch.full_like(p, 1 + i)
        opt.step()
        return torch.cat([p.detach().flatten() for p in ps])
    for _ in range(3): step(ps, opt)
    if not opt.compiled: pytest.skip('no compiler here')
    if how == 'pickle': ps2, opt2 = pickle.loads(pickle.dumps((ps, opt)))
    elif how == 'deepcopy': ps2, opt2 = copy.deepcopy((ps, opt))
    else: torch.save((ps, opt), f := io.BytesIO()); f.seek(0); ps2, opt2 = torch.load(f, weights_only=False)
    for _ in range(2): a, b = step(ps, opt), step(ps2, opt2)
    assert torch.allclose(a, b, rtol=0, atol=1e-12) and opt.compiled and opt2.compiled and opt2.state[ps2[0]]['step'] == 5
    assert all(p is q for p, q in zip(ps2, opt2.param_groups[0]))


class Wide(Stat):
    "Keeps its average in double precision, whatever the parameter has; and a count in a tensor of whole numbers."
    def init_state(self, p): return {'wide': torch.zeros_like(p, dtype=f64), 'count': torch.zeros((), dtype=torch.int64)}
    def update(self, p, state, **kwargs):
        state['wide'].add_(p.grad); state['count'].add_(1)
        return state

def pulls(p, slow, grad_avg, lr, **kwargs): slow.lerp_(p, .5); p.add_(grad_avg, alpha=-lr)

class Slow(Stat):
    def init_state(self, p): return {'slow': p.detach().clone()}
    def update(self, p, state, **kwargs): return state


@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('src,dst', [(torch.float32, f64), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_state_from_another_precision_takes_on_that_of_a_fresh_one(src, dst, fast):
    "Averages stayed in the old one; `lerp_` then failed halfway through a step."
    def new(dtype):
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(s).to(dtype)) for s in ((3, 4), (5,))]
        return ps, StatefulOptimizer(ps, [pulls], [AverageGrad(), Slow(), Wide()], lr=.1, fast=fast)
    def step(ps, opt):
        for p in ps: p.grad = torch.ones_like(p)
        opt.step()
    ps, opt = new(src); step(ps, opt)
    qs, other = new(dst); other.load_state_dict(opt.state_dict())
    for p, q in zip(ps, qs):
        s, t = opt.state[p], other.state[q]
        assert t['grad_avg'].dtype is t['slow'].dtype is dst and t['wide'].dtype is f64 and t['count'].dtype is torch.int64
        assert t['slow'].equal(s['slow'].to(dst)) and t['wide'].equal(s['wide'])
    step(qs, other)
    assert other.state[qs[0]]['count'] == 2
    again = new(src)[1]; again.load_state_dict(opt.state_dict())                             # the same precision: the same bits
    assert all(v.equal(w) for a, b in zip(opt.state.values(), again.state.values()) for v, w in zip(a.values(), b.values()) if torch.is_tensor(v))


def test_lr_find_takes_a_sampler_with_a_generator_of_numpys_and_puts_it_back():
    class Order(torch.utils.data.Sampler):
        def __init__(self): self.generator = np.random.default_rng(3)
        def __len__(self): return 60
        def __iter__(self): return iter(self.generator.permutation(60).tolist())
    run = runner()
    ds, order = Dataset(torch.randn(60, 3, 8, 8), torch.randint(0, 10, (60,))), Order()
    run.data = DataBunch(torch.utils.data.DataLoader(ds, 10, sampler=order), run.data.valid_dl)
    before = order.generator.bit_generator.state
    run.cbs = [find := LR_Find(max_iter=20, max_lr=1.)]
    run.fit(9)
    assert len(find.lrs) > 9 and order.generator.bit_generator.state == before
