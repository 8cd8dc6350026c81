"""Optimizers: torch's and the papers' to the last digits, the slides' code as printed, groups, refusals, states that go on."""
import copy
import io
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exp.optimizers import (AverageGrad, AverageSqrGrad, Optimizer, Stat, StatefulOptimizer, StepCount, adam_opt, adam_step,
                            debias, l2_reg, lamb, lars, momentum_step, nesterov_step, norm_bias_groups, sgd_mom_opt,
                            sgd_opt, sgd_step, weight_decay)

pytestmark = pytest.mark.filterwarnings('ignore:This overload of')                  # the argument order of 2019
f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16


def net(seed=0):
    "Group norm: before batch norm, a bias has a gradient of pure rounding, which Adam and LAMB blow up to full size."
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8*36, 10)).to(f64)


def split(m): return [list(m[0].parameters()), [*m[1].parameters(), *m[4].parameters()]]


def walk(make, n=200, seed=0, holes=True):
    "Weights after `n` steps on random pictures: two groups, two schedules, now and then no gradient for two of the tensors."
    m, g = net(seed), torch.Generator().manual_seed(seed + 1)
    opt = make(m)
    for i in range(n):
        x, y = torch.randn(4, 3, 8, 8, generator=g, dtype=f64), torch.randint(0, 10, (4,), generator=g)
        m.zero_grad()
        F.cross_entropy(m(x), y).backward()
        if holes and i % 5 == 3: m[0].bias.grad = m[4].weight.grad = None
        for h, lr in zip(getattr(opt, 'hypers', None) or opt.param_groups, (.01*(1 + i % 7), .02/(1 + i % 3))): h['lr'] = lr
        opt.step()
    return torch.cat([p.detach().flatten() for p in m.parameters()])


def theirs(cls, groups=split, **kw): return lambda m: cls([{'params': ps} for ps in groups(m)], lr=.01, **kw)
def ours(f, groups=split, **kw): return lambda m: f(groups(m), lr=.01, **kw)
def agree(a, b, atol=1e-10, **kw): assert torch.allclose(walk(a, **kw), walk(b, **kw), rtol=0, atol=atol)


def sgd(*steppers, stats=None): return partial(Optimizer, steppers=[*steppers], stats=stats)
def adam_stats(dampened=True): return [AverageGrad(dampened), AverageSqrGrad(dampened), StepCount()]


SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
PAIRS = {
    'sgd': (theirs(SGD), ours(sgd_opt)),
    'sgd, L2': (theirs(SGD, weight_decay=.1), ours(sgd(sgd_step, l2_reg), wd=.1)),
    'sgd, decay': (theirs(SGD, weight_decay=.1), ours(sgd_opt, wd=.1)),
    'momentum': (theirs(SGD, momentum=.8), ours(sgd_mom_opt, mom=.8)),
    'momentum, damped, L2': (theirs(SGD, momentum=.9, dampening=.3, weight_decay=.1), ours(sgd(momentum_step, l2_reg, stats=AverageGrad(.3)), wd=.1)),
    'nesterov, L2': (theirs(SGD, momentum=.9, nesterov=True, weight_decay=.1), ours(sgd(nesterov_step, partial(l2_reg, wd=.1), stats=AverageGrad()))),
    'adam': (theirs(Adam, betas=(.9, .99), eps=1e-5), ours(adam_opt())),
    'adam, L2': (theirs(Adam, betas=(.8, .95), eps=1e-3, weight_decay=.1), ours(adam_opt(decay=l2_reg), mom=.8, sqr_mom=.95, eps=1e-3, wd=.1)),
    'adam, averages as sums': (theirs(Adam, betas=(.9, .99), eps=1e-5), ours(sgd(adam_step, stats=adam_stats(False)))),
    'adamw': (theirs(AdamW, betas=(.9, .99), eps=1e-5, weight_decay=.1), ours(adam_opt(), wd=.1)),
}


@pytest.mark.parametrize('seed', (0, 1))
@pytest.mark.parametrize('name', PAIRS)
def test_equal_to_torch(name, seed): agree(*PAIRS[name], seed=seed)


def paper(rule, **kw):
    "An optimizer of `w, memory = rule(w, g, memory, lr)`, one tensor at a time; nothing shared with exp."
    class Paper:
        def __init__(self, m): self.param_groups, self.s = [{'params': ps} for ps in split(m)], {}
        def step(self):
            for p, lr in [(p, g['lr']) for g in self.param_groups for p in g['params'] if p.grad is not None]:
                p.data, self.s[p] = rule(p.detach(), p.grad, self.s.get(p, (0, 0, 0)), lr, **kw)
    return Paper


def size(t): return (t**2).sum().item()**.5


def lamb_rule(w, g, memory, lr, wd, top, b1=.9, b2=.99, eps=1e-6):
    "Algorithm 2 of You et al. 2019; `top`: bound of the ratio or None."
    m, v, t = memory
    m, v, t = b1*m + (1 - b1)*g, b2*v + (1 - b2)*g**2, t + 1
    r = (m/(1 - b1**t))/((v/(1 - b2**t))**.5 + eps) + wd*w
    phi = size(w)/size(r) if size(w) and size(r) else 1.
    return w - lr*(phi if top is None else min(phi, top))*r, (m, v, t)


def lars_rule(w, g, memory, lr, wd, mom=.9, coef=1e-3, eps=1e-8):
    "Algorithm 1 of You et al. 2017 with the rate outside the velocity."
    local = coef*size(w)/(size(g) + wd*size(w) + eps) if size(w) and size(g) else 1.
    v = mom*memory[0] + local*(g + wd*w)
    return w - lr*v, (v,)


@pytest.mark.parametrize('wd', (0., .1))
def test_lamb_and_lars_equal_the_papers_formula(wd):
    for top in (None, 2.): agree(paper(lamb_rule, wd=wd, top=top), ours(lamb, wd=wd, max_ratio=top))
    agree(paper(lars_rule, wd=wd), ours(lars, wd=wd))


def test_lamb_and_lars_equal_timm():
    optim = pytest.importorskip('timm.optim')                                       # it counts the steps of a group, we those of a tensor: no holes
    agree(theirs(optim.Lamb, betas=(.9, .99), weight_decay=.1, max_grad_norm=None), ours(lamb, wd=.1, max_ratio=None), 1e-8, holes=False)
    agree(theirs(optim.Lars, momentum=.9, weight_decay=.1), ours(lars, wd=.1))


def test_lars_by_kind_equals_pytorch_optimizers():
    "Which neither decays nor rescales what has one dimension."
    po, own = pytest.importorskip('pytorch_optimizer'), partial(norm_bias_groups, no_adapt=True)
    def groups(m): return [[p for _, p in g['params']] for g in own(m)]
    agree(theirs(po.LARS, groups, momentum=.9, dampening=0., weight_decay=.1, trust_coefficient=1e-3), ours(lars, own, eps=0., wd=.1))


# ---- the slides of lesson 11, as printed (addcddiv_ apart)

class SlideAverageGrad(Stat):
    _defaults = dict(mom=0.9)

    def init_state(self, p): return {'grad_avg': torch.zeros_like(p.grad.data)}
    def update(self, p, state, mom, **kwargs):
        state['grad_avg'].mul_(mom).add_(p.grad.data)
        return state

def slide_momentum_step(p, lr, grad_avg, **kwargs):
    p.data.add_(-lr, grad_avg)
    return p

def slide_l2_reg(p, lr, wd, **kwargs):
    p.grad.data.add_(wd, p.data)
    return p
slide_l2_reg._defaults = dict(wd=0.)

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

slide_sgd_mom_opt = partial(StatefulOptimizer, steppers=[slide_momentum_step,weight_decay],
                      stats=SlideAverageGrad(), wd=0.01)


def momentum_rule(w, g, memory, lr, wd=.01, mom=.9):
    v = mom*memory[0] + g
    return (w - lr*v)*(1 - lr*wd), (v,)


def off_zero(make):
    "From a norm of 0 the slide's LAMB does not move."
    def made(m):
        for p in m.parameters(): p.data += .1
        return make(m)
    return made


SLIDES = {'sgd, L2': (theirs(SGD, weight_decay=.1), ours(sgd(slide_l2_reg, sgd_step), wd=.1)),
          'momentum': (paper(momentum_rule), ours(slide_sgd_mom_opt)),
          'adam': (theirs(Adam, betas=(.9, .99), eps=1e-5), ours(sgd(slide_adam_step, weight_decay, stats=adam_stats()))),
          'lamb': (paper(lamb_rule, wd=.1, top=10.), ours(sgd(slide_lamb_step, stats=adam_stats()), wd=.1))}


@pytest.mark.parametrize('name', SLIDES)
def test_slides_run_as_printed(name): agree(*map(off_zero, SLIDES[name]))


@pytest.mark.parametrize('f', (lamb, partial(lamb, max_ratio=None), lars, partial(lars, eps=0.)))
@pytest.mark.parametrize('w, g', [(0., 1.), (1., 0.), (0., 0.)])
def test_a_norm_of_zero_neither_holds_nor_breaks_anything(f, w, g):
    p = torch.full((5,), w)
    opt = f([p], lr=.1)
    for _ in range(5): p.grad = torch.full((5,), g); opt.step()
    assert p.isfinite().all() and bool(g) != p.equal(torch.full((5,), w))


@pytest.mark.parametrize('f', (sgd_mom_opt, adam_opt(), lamb, lars), ids=('momentum', 'adam', 'lamb', 'lars'))
def test_other_precisions_stay_near(f):
    def go(dtype):
        ps, opt = start(f, dtype=dtype, wd=.1)
        steps(ps, opt, 0, 20)
        assert {v.dtype for s in opt.state.values() for v in s.values() if torch.is_tensor(v)} == {dtype}
        return torch.cat([p.detach().double().flatten() for p in ps])
    for dtype, atol in ((f32, 1e-5), (bf16, .1)): assert torch.allclose(go(dtype), go(f64), rtol=0, atol=atol)


# ---- hypers and groups

CHANGED = {'wd': .2, 'mom': .5, 'sqr_mom': .5, 'eps': .1, 'adapt': False, 'max_ratio': .5, 'trust_coef': .1}


@pytest.mark.parametrize('f, names', [(sgd_opt, 'wd'), (sgd_mom_opt, 'wd mom'), (adam_opt(), 'wd mom sqr_mom eps'), (adam_opt(decay=l2_reg), 'wd'),
                                      (lamb, 'wd mom sqr_mom eps adapt max_ratio'), (lars, 'wd mom eps adapt trust_coef')])
def test_every_hyper_changes_the_result(f, names):
    a = walk(ours(f, wd=.05), n=5)
    for k in names.split(): assert not a.equal(walk(ours(f, **{'wd': .05, k: CHANGED[k]}), n=5)), k


def two(): return nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))


def ones(*ps):
    for p in ps: p.grad = torch.ones_like(p)


FLAT = [lambda a, b: [a, b], lambda a, b: (a, b), lambda a, b: iter([a, b]), lambda a, b: [('a', a), ('b', b)], lambda a, b: iter([('a', a), ('b', b)]), lambda a, b: [(a, b)]]
APART = [lambda a, b: [[a], [b]], lambda a, b: ((a,), (b,)), lambda a, b: [iter([a]), iter([b])], lambda a, b: [[('a', a)], [('b', b)]],
         lambda a, b: [{'params': [a]}, {'params': iter([b])}], lambda a, b: [{'params': a}, {'params': b}], lambda a, b: [{'params': [('a', a)]}, [b]]]


@pytest.mark.parametrize('form', FLAT + APART)
def test_forms_of_parameters(form):
    a, b = two()
    opt = sgd_opt(form(a, b), lr=.5)
    assert [*map(len, opt.param_groups)] == ([2] if form in FLAT else [1, 1]) and len(opt.hypers) == len(opt.param_groups)
    ones(a, b)
    opt.step()
    assert a.tolist() == [.5]*3 and b.tolist() == [.5]*2 and a.requires_grad


def test_a_group_goes_before_the_call_the_call_before_a_partial_and_that_before_the_default():
    def step(p, lr, x, **kwargs): p.sub_(lr*x)
    step._defaults = dict(x=1.)
    a, b = two()
    ones(a, b)
    groups = [{'params': [a], 'x': 4.}, {'params': [b], 'lr': 2.}]                  # they can be used again
    def later(p, x, **kwargs): pass
    later._defaults = dict(x=9.)
    assert Optimizer([a], [step, later], lr=.5).hypers[0]['x'] == 1.               # the first to name it
    for f, want in ((step, 1.), (partial(step, x=2.), 2.), (partial(step, x=2.), 3.)):
        was = a[0].item(), b[0].item()
        Optimizer(groups, f, lr=.5, **({'x': 3.} if want == 3 else {})).step()
        assert (was[0] - a[0].item(), was[1] - b[0].item()) == (2., 2*want)


def test_xtra_steps_come_last():
    def cap(p, top, **kwargs): p.clamp_(max=top)
    a, b = two()
    ones(a, b)
    for p in (a, b): p.grad.neg_()
    adam_opt([cap], top=.25)([a, b], .1).step()
    assert a.tolist() == [.25]*3 and b.tolist() == [.25]*2


@pytest.mark.parametrize('call, error', [
    (lambda a, b: sgd_opt([a], lr=.1, momentum=.9), ValueError), (lambda a, b: sgd_opt([{'params': [a]}, {'params': [b], 'decay': 1.}], lr=.1), ValueError),
    (lambda a, b: adam_opt(momentum=.9)([a], lr=.1), ValueError), (lambda a, b: sgd_opt([a, b, a], lr=.1), ValueError),
    (lambda a, b: sgd_opt([[a], [b, a]], lr=.1), ValueError), (lambda a, b: sgd_opt([('a', a), ('b', a)], lr=.1), ValueError),
    (lambda a, b: sgd_opt([], lr=.1), ValueError), (lambda a, b: sgd_opt([[a], []], lr=.1), ValueError), (lambda a, b: sgd_opt(iter([]), lr=.1), ValueError),
    *[(lambda a, b, f=f, kw=kw: f([a, b], **{'lr': .1, **kw}), ValueError) for f, kw in (
        *[(sgd_opt, {'lr': lr}) for lr in (-1, math.nan, math.inf, None, '.1')], *[(sgd_mom_opt, {'mom': mom}) for mom in (1., -.1, 2, math.nan)], (sgd_opt, {'wd': -1.}),
        (adam_opt(), {'eps': -1.}), (adam_opt(), {'sqr_mom': 1.}), (lars, {'trust_coef': -1.}), (lamb, {'max_ratio': math.nan}))],
    (lambda a, b: sgd_opt([{'params': [a]}, {'params': [b], 'lr': -1.}], .1), ValueError), (lambda a, b: sgd_mom_opt([a], .1, .9), TypeError), (lambda a, b: sgd_opt([a]), ValueError),
    (lambda a, b: sgd_opt([a], .1, lr=.1), TypeError), (lambda a, b: sgd_opt(a, lr=.1), TypeError), (lambda a, b: adam_opt([a, b], lr=.1), TypeError), (lambda a, b: adam_opt(net().parameters(), lr=.1), TypeError)])
def test_refused_when_it_is_made(call, error):
    with pytest.raises(error): call(*two())


@pytest.mark.parametrize('make, dtype, error', [
    (sgd(momentum_step, stats=[AverageGrad(), AverageGrad(True)]), f64, ValueError), (adam_opt(), torch.complex64, TypeError), (lamb, torch.complex64, TypeError)])
def test_refused_at_the_first_step(make, dtype, error):
    "Two stats of one name; a square of complex numbers, which is no size."
    p = torch.ones(3, dtype=dtype)
    ones(p)
    with pytest.raises(error): make([p], lr=.1).step()
    assert p.equal(torch.ones(3, dtype=dtype))


def test_momentum_of_complex_parameters_is_torchs():
    def go(make):
        p = torch.tensor([1 + 1j, 2 - .5j], requires_grad=True)
        opt = make([p])
        for _ in range(5): opt.zero_grad(); (p - 1).abs().pow(2).sum().backward(); opt.step()
        return p.detach()
    assert torch.allclose(go(partial(sgd_mom_opt, lr=.05)), go(partial(SGD, lr=.05, momentum=.9)))


@pytest.mark.parametrize('theirs, ours', [('weight_decay', 'wd'), ('momentum', 'mom'), ('betas', 'mom and sqr_mom'), ('maximize', 'minus'), ('foreach', 'Compiled'), ('fused', 'Compiled'), ('sqr_mon', 'sqr_mom')])
def test_torchs_spellings_are_told_ours(theirs, ours):
    for group in ({}, {theirs: 1}):
        with pytest.raises(ValueError, match=f'{theirs}.*{ours}'): adam_opt()([{'params': [torch.ones(2)], **group}], .1, **({} if group else {theirs: 1}))


def test_called_as_torchs_are():
    "The rate by place, a closure that makes loss and gradients, `zero_grad(set_to_none=…)`; and what it says of itself."
    def go(make):
        m = net()
        opt = make(m.parameters(), 1e-3)
        def closure():
            opt.zero_grad(set_to_none=False)
            loss = m(torch.ones(2, 3, 8, 8, dtype=f64)).pow(2).sum()
            loss.backward()
            return loss
        losses = [opt.step(closure).item() for _ in range(3)]
        assert all(p.grad is not None for p in m.parameters()) and opt.step() is None
        opt.zero_grad()
        return losses, m, opt
    (a, _, _), (b, m, opt) = go(torch.optim.SGD), go(sgd_opt)
    assert a == pytest.approx(b) and a[2] < a[0] and all(p.grad is None for p in m.parameters())
    assert all(word in repr(opt) for word in ('weight_decay', 'sgd_step', "'lr': 0.001", f'{len(list(m.parameters()))} '))
    assert 'AverageGrad' in repr(sgd_mom_opt(norm_bias_groups(m), .1)) and len(repr(sgd_mom_opt(norm_bias_groups(m), .1)).splitlines()) == 3


def test_norm_bias_groups():
    groups = norm_bias_groups(net())
    assert [{*g} for g in groups] == [{'params'}, {'params', 'wd'}]
    assert [[n for n, _ in g['params']] for g in groups] == [['0.weight', '4.weight'], ['0.bias', '1.weight', '1.bias', '4.bias']]
    for decay, adapt in (1, 1), (1, 0), (0, 1), (0, 0):
        hypers = lamb(norm_bias_groups(net(), no_decay=decay, no_adapt=adapt), lr=.1, wd=.3).hypers
        assert (hypers[0]['wd'], hypers[0]['adapt']) == (.3, True) and len(hypers) == 1 + (decay or adapt)
        assert (hypers[-1]['wd'], hypers[-1]['adapt']) == (0. if decay else .3, not adapt)
    assert len(norm_bias_groups(nn.Linear(2, 2, bias=False))) == 1                   # no empty one


def test_zero_grad_and_freeze_leave_alone_what_is_not_trained():
    a, b = two()
    opt = sgd_mom_opt([[a], [b]], lr=.1)
    def step(*ps):
        was = a.detach().clone(), b.detach().clone()
        opt.zero_grad()
        sum(p.sum() for p in ps).backward()
        opt.step()
        return [(q - p)[0].item() for p, q in zip((a, b), was)]
    assert step(a, b) == pytest.approx([.1, .1]) and step(b) == pytest.approx([0, .19])     # no step by momentum alone
    a.grad = torch.ones(3)
    opt.freeze(0)
    opt.step()
    assert a[0].item() == pytest.approx(.9) and not a.requires_grad and b.requires_grad
    assert step(a, b)[0] == 0
    opt.freeze(0, on=False)
    assert step(a)[0] == pytest.approx(.19)                                         # what is remembered stayed


def test_a_runner_is_handed_what_is_ready_and_decides_how():
    seen = []
    def run(opt, params, hypers):
        seen.append((opt, [*map(id, params)], hypers))
        for p in reversed(params): opt.update_one(p, hypers)
    agree(ours(adam_opt()), ours(adam_opt(run=run)))
    agree(ours(lamb), ours(lamb, run=run))
    (a, b), (c, d) = two(), two()
    opt = sgd_opt([[a, b], [c, d]], lr=.1, run=run)
    seen.clear()
    ones(d)
    opt.step()
    assert seen == [(opt, [id(d)], {'lr': .1, 'wd': 0.})]                            # a group with no gradient is not asked for


# ---- what is remembered

class GradNorm(Stat):
    "A Python number for each parameter."
    def init_state(self, p): return {'gn': 1.}
    def update(self, p, state, **kwargs): return {**state, 'gn': p.grad.norm().item()}
def normed(p, lr, gn, **kwargs): p.add_(p.grad, alpha=-lr/gn)

class FromZero(Stat):
    "A number until the first update makes a tensor of it, and a tensor that was not there before."
    def init_state(self, p): return {'avg': 0}
    def update(self, p, state, **kwargs): return {'avg': .9*state['avg'] + p.grad, 'calls': state.get('calls', torch.zeros((), dtype=f64)) + 1}
def from_zero(p, lr, avg, calls, **kwargs): p.sub_(lr*avg/calls)

class Rows(Stat):
    "Of another shape than the parameter."
    def init_state(self, p): return {'rows': torch.zeros_like(p[:, :1] if p.ndim > 1 else p)}
    def update(self, p, state, **kwargs): return {'rows': state['rows'] + p.grad.abs().mean(-1, keepdim=True)}
def by_rows(p, lr, rows, **kwargs): p.sub_(lr*p.grad/(rows + 1))


@pytest.mark.parametrize('stat, k, want', [(AverageGrad(), 'grad_avg', 2.9), (AverageGrad(True), 'grad_avg', .29),
                                           (AverageSqrGrad(), 'sqr_avg', .0499), (AverageSqrGrad(False), 'sqr_avg', 4.99)])
def test_averages_by_hand(stat, k, want):
    p = torch.ones(3)
    opt = Optimizer([p], sgd_step, stat, lr=.1)
    for g in (1., 2.): p.grad = torch.full((3,), g); opt.step()
    assert torch.allclose(opt.state[p][k], torch.tensor(want))


def test_numbers_of_each_parameter_stay_its_own():
    ps = [torch.zeros(3) for _ in range(3)]
    opt = Optimizer(ps, normed, [GradNorm(), StepCount()], lr=1.)
    for n in (1, 2, 3):
        for p, g in zip(ps[:n], (1., 10., 100.)): p.grad = torch.full((3,), g)
        opt.step()
    assert [opt.state[p]['step'] for p in ps] == [3, 2, 1]
    assert all(torch.allclose(p, torch.tensor(-n*3**-.5)) for p, n in zip(ps, (3, 2, 1)))


WAYS = {'sgd': sgd_opt, 'momentum': sgd_mom_opt, 'damped': sgd(momentum_step, stats=AverageGrad(.3)), 'adam': adam_opt(), 'lamb': lamb, 'lars': lars,
        'slide': slide_sgd_mom_opt, 'numbers': sgd(normed, stats=GradNorm()), 'from zero': sgd(from_zero, stats=FromZero()), 'rows': sgd(by_rows, stats=Rows())}
SIZES = (3, 4), (5,), (2, 2)


def start(f, sizes=SIZES, dtype=f64, lr=.1, **kw):
    g = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(s, generator=g, dtype=f64).to(dtype)) for s in sizes]
    return ps, f([{'params': ps[:1], 'lr': lr}, {'params': ps[1:]}], lr=lr/2, **kw)


def steps(ps, opt, begin, end):
    "The last parameter has its first gradient at step 4."
    for i in range(begin, end):
        g = torch.Generator().manual_seed(i)
        for p in ps: p.grad = torch.randn(p.shape, generator=g, dtype=f64).to(p.dtype)
        if i < 4: ps[-1].grad = None
        opt.step()


def filed(o):
    torch.save(o, f := io.BytesIO())
    return torch.load(io.BytesIO(f.getvalue()), weights_only=isinstance(o, dict))


@pytest.mark.parametrize('way', (filed, lambda sd: sd, None, 'deepcopy'), ids=('file', 'memory', 'whole', 'deepcopy'))
@pytest.mark.parametrize('name', WAYS)
def test_a_state_goes_on_the_same(name, way):
    ps, opt = start(WAYS[name])
    steps(ps, opt, 0, 3)
    if way == 'deepcopy': qs, other = copy.deepcopy((ps, opt))
    elif way is None: qs, other = filed((ps, opt))
    else:
        qs, other = start(WAYS[name], lr=5.)
        for p, q in zip(ps, qs): q.data.copy_(p.data)
        other.load_state_dict(way(opt.state_dict()))
    own = {t.data_ptr() for o in (opt, other) for s in o.state.values() for t in s.values() if torch.is_tensor(t)}
    assert len(own) == sum(torch.is_tensor(t) for o in (opt, other) for s in o.state.values() for t in s.values())
    for _ in range(2): steps(ps, opt, 3, 6); steps(qs, other, 3, 6)                  # by turns: nothing is shared
    assert all(p.equal(q) for p, q in zip(ps, qs)) and other.hypers == opt.hypers
    other.hypers[0]['lr'] = 7.
    assert opt.hypers[0]['lr'] == .1


def test_a_saved_state_keeps_its_hypers_and_what_is_loaded_replaces_all():
    ps, opt = start(adam_opt())
    fresh = opt.state_dict()
    steps(ps, opt, 0, 6)
    opt.hypers[0]['lr'] = 3.
    opt.load_state_dict(fresh)
    steps(ps, opt, 6, 7)
    assert [opt.state[p]['step'] for p in ps] == [1, 1, 1] and opt.hypers[0]['lr'] == .1
    opt.hypers[0]['lr'] = 7.
    assert fresh['hypers'][0]['lr'] == .1


def equal(a, b):
    if torch.is_tensor(a): return a.equal(b)
    if isinstance(a, dict): return equal([*a.items()], [*b.items()])
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def with_x(p, lr, x=1., **kwargs): p.sub_(lr*x)
def with_y(p, lr, y=1., **kwargs): p.sub_(lr*y)


@pytest.mark.parametrize('f, other, sizes', [
    (adam_opt(), adam_opt(), ((3, 4), (5,), (2, 3))), (adam_opt(), adam_opt(), ((3, 4), (5,), (1, 2))), (adam_opt(), adam_opt(), ((3, 4), (5,))),
    (sgd_mom_opt, sgd_mom_opt, ((5,), (3, 4), (2, 2))), (adam_opt(), sgd_mom_opt, SIZES), (sgd_mom_opt, adam_opt(), SIZES), (sgd_mom_opt, sgd_opt, SIZES),
    (adam_opt(), lamb, SIZES), (WAYS['from zero'], WAYS['numbers'], SIZES), (partial(sgd(with_x), x=2.), partial(sgd(with_y), y=2.), SIZES), (adam_opt(), SGD, SIZES)])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(f, other, sizes):
    "Other shapes, the last of all too; fewer; groups in another order; other stats; other hypers; no state of ours."
    (ps, opt), (qs, theirs) = start(f), start(other, sizes, lr=9.)
    steps(ps, opt, 0, 6); steps(qs, theirs, 0, 5)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError): opt.load_state_dict(theirs.state_dict())
    assert equal(opt.state_dict(), before)


@pytest.mark.parametrize('key, value', [('grad_avg', 1.), ('grad_avg', [1., 2.]), ('sqr_avg', torch.ones(2))])
def test_a_state_of_another_kind_is_refused(key, value):
    ps, opt = start(adam_opt())
    steps(ps, opt, 0, 2)
    sd, before = opt.state_dict(), copy.deepcopy(opt.state_dict())
    sd['states'][0][0][key] = value
    with pytest.raises(ValueError, match=key): opt.load_state_dict(sd)
    assert equal(opt.state_dict(), before)


class Wide(Stat):
    "Keeps its average in double precision, whatever the parameter has; a count in whole numbers; and a copy of the weights."
    def init_state(self, p): return {'wide': torch.zeros_like(p, dtype=f64), 'count': torch.zeros((), dtype=torch.int64), 'slow': p.detach().clone()}
    def update(self, p, state, **kwargs):
        state['wide'].add_(p.grad); state['count'].add_(1)
        return state
def pulls(p, slow, grad_avg, lr, **kwargs): slow.lerp_(p, .5); p.add_(grad_avg, alpha=-lr)


@pytest.mark.parametrize('src, dst', [(f32, f64), (f32, bf16), (bf16, f32)])
def test_a_state_takes_on_precision_and_memory_format_of_a_fresh_one(src, dst):
    f, sizes = sgd(pulls, stats=[AverageGrad(), Wide()]), ((2, 3, 4, 4), (5,))
    (ps, opt), (qs, other) = start(f, sizes, src), start(f, sizes, dst)
    qs[0].data = qs[0].data.contiguous(memory_format=torch.channels_last)
    steps(ps, opt, 0, 5)
    other.load_state_dict(opt.state_dict())
    for p, q in zip(ps, qs):
        s, t = opt.state[p], other.state[q]
        assert [t[k].dtype for k in ('grad_avg', 'slow', 'wide', 'count')] == [dst, dst, f64, torch.int64]
        assert t['slow'].equal(s['slow'].to(dst)) and t['wide'].equal(s['wide']) and t['grad_avg'].stride() == q.stride()
    steps(qs, other, 5, 6)
    assert other.state[qs[0]]['count'] == 6
