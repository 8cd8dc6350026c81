"""exp.fast_optimizers: whatever the runner does, the weights are the plain loop's. Most cases compile nothing (`force_eager`: the same programs, run
by torch operation by operation), a few go through the real compiler."""
import copy
import io
import os
import pickle
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from exp.fast_optimizers import Compiled, fast
from exp.optimizers import (AverageGrad, AverageSqrGrad, Optimizer, Stat, StepCount, adam_opt, adam_step, debias, each, l2_reg, lamb, lars,
                            nesterov_step, sgd_mom_opt, sgd_opt, weight_decay)

f64, bf16, last = torch.float64, torch.bfloat16, torch.channels_last
SHAPES = ((400, 400), (64, 32, 3, 3), (10,), (30, 7), (16, 8, 1, 1), (1,), (5, 4))


@pytest.fixture
def eager():
    with torch.compiler.set_stance('force_eager'): yield


@pytest.fixture
def said():
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        warnings.filterwarnings('ignore', message='This overload of')
        yield lambda: [w for w in ws if issubclass(w.category, UserWarning)]


def parameters(shapes=SHAPES, dtype=f64):
    g = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(s, generator=g, dtype=f64).to(dtype)) for s in shapes]
    for p in ps[1::2]:
        if p.ndim == 4: p.data = p.data.to(memory_format=last)
    return ps


def walk(opt_func, run, steps=12, dtype=f64, shapes=SHAPES, event=None, at=7, **hypers):
    "Parameters and optimizer after some steps: two groups, rates that change, now and then no gradient, an event before step `at`."
    ps, g = parameters(shapes, dtype), torch.Generator().manual_seed(1)
    opt = opt_func([ps[:2], ps[2:]], run=run, lr=.01, **hypers)
    for i in range(steps):
        for h, lr in zip(opt.hypers, (.01*(1 + i % 7), .02/(1 + i % 3))): h['lr'] = lr
        for j, p in enumerate(ps):
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g, dtype=f64)) if (i + j) % 5 or i == 0 else None
        if i == at and event: ps, opt = event(ps, opt)
        where = [p.data_ptr() for p in ps]
        opt.step()
        assert where == [p.data_ptr() for p in ps]
    return ps, opt


def same(a, b, tol=1e-9):
    (ps, one), (qs, two) = a, b
    assert [p.stride() for p in ps] == [q.stride() for q in qs]
    for p, q in zip(ps, qs): assert torch.allclose(p, q, rtol=tol, atol=tol, equal_nan=True)
    for p, q in zip(ps, qs):
        s, t = one.state[p], two.state[q]
        assert s.keys() == t.keys()
        for k, v in s.items(): assert torch.allclose(v, t[k], tol, tol, equal_nan=True) if torch.is_tensor(v) else v == t[k], k


# ---- the same as the loop

class Ema(Stat):
    def init_state(self, p): return {'ema': p.detach().clone()}
    def update(self, p, state, **kwargs):
        state['ema'].lerp_(p, .1)
        return state

class Replaced(Ema):
    def update(self, p, state, **kwargs): return {**state, 'ema': state['ema']*.9 + p*.1}

class Slow(Stat):
    def init_state(self, p): return {'slow': p.detach().clone()}
    def update(self, p, state, **kwargs): return state

def own_step(p, lr, ema, **kwargs):
    g = p.grad - p.grad.mean()
    p -= lr*torch.where(g.abs() > .5, g.sign(), g).clamp(-1, .5) + .01*(p - ema)/2
    p.sub_(1/(1 + g.abs()) - 2**-g.abs(), alpha=lr).clamp_(max=4.)
def old_style(p, lr, **kwargs):
    p.data.add_(-lr, p.grad.data)
    p.data.addcmul_(-lr*.1, p.data, p.grad.data)
    p.data.addcdiv_(-lr*.1, p.data, 1 + p.grad.data.abs())
    for _ in range(4): p.data.mul_(1 - lr)
def radam(p, lr, mom, mom_damp, step, grad_avg, sqr_avg, **kwargs):
    if step <= 4: p.add_(grad_avg, alpha=-lr/debias(mom, mom_damp, step))
    else: p.addcdiv_(grad_avg, sqr_avg.sqrt().add_(.1), value=-lr)
def lookahead(p, slow, step, **kwargs):
    if step % 3 == 0:
        slow.lerp_(p, .5)
        p.copy_(slow)
adam_stats = [AverageGrad(dampening=True), AverageSqrGrad(), StepCount()]

OPTS = {'sgd': partial(sgd_opt, wd=.1), 'momentum': partial(sgd_mom_opt, wd=.1), 'adam': partial(adam_opt(), wd=.1), 'adam, no decay': adam_opt(),
        'adam, L2': partial(adam_opt(decay=l2_reg), wd=.1), 'lamb': partial(lamb, wd=.1), 'lamb, no ceiling': partial(lamb, max_ratio=None),
        'lars': partial(lars, wd=.1), 'nesterov, L2': partial(Optimizer, steppers=[nesterov_step, l2_reg], stats=AverageGrad(.3), wd=.1),
        'own stat': partial(Optimizer, steppers=own_step, stats=Ema()), '2019 order of arguments': partial(Optimizer, steppers=old_style),
        'branch on the step count, lookahead': partial(Optimizer, steppers=[radam, lookahead], stats=[*adam_stats, Slow()])}


@pytest.mark.parametrize('name', OPTS)
def test_equal_to_the_loop(name, eager, said):
    runner = Compiled(least=0)
    same(walk(OPTS[name], each), walk(OPTS[name], runner))
    assert not said() and runner.programs


REAL = {'adam': (adam_opt(), torch.float32, 1e-5), 'lamb': (lamb, torch.float32, 1e-5), 'adam, bfloat16': (adam_opt(), bf16, .05)}

@pytest.mark.parametrize('name', REAL)
def test_equal_to_the_loop_through_the_compiler_which_compiles_once(name, said):
    opt_func, dtype, tol = REAL[name]
    def after_it(ps, opt):
        torch.compiler.set_stance('fail_on_recompile')
        return ps, opt
    try: b = walk(opt_func, runner := Compiled(least=0), dtype=dtype, event=after_it, at=3, wd=.1)
    finally: torch.compiler.set_stance('default')
    same(walk(opt_func, each, dtype=dtype, wd=.1), b, tol)
    assert not said() and runner.programs


def test_bfloat16_keeps_decays_in_float32(eager):
    def go(run):
        p = nn.Parameter(torch.ones(64, dtype=bf16))
        opt = adam_opt()([p], lr=.1, run=run)
        for i in range(9):
            p.grad = torch.full_like(p, float(i == 0))
            opt.step()
        return opt.state[p]
    a, b = go(each), go(Compiled(least=0))
    assert a['sqr_avg'].equal(b['sqr_avg']) and a['grad_avg'].equal(b['grad_avg'])


# ---- things that happen between two steps

def moved(ps, opt):
    for p in ps: p.data = p.data.clone()
    return ps, opt
def reformatted(ps, opt):
    ps[1].data = ps[1].data.contiguous()
    return ps, opt
def transposed(ps, opt):
    ps[0].data = ps[0].data.t()
    return ps, opt
def loaded(ps, opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    return ps, opt
def state_replaced(ps, opt):
    for p in ps:
        if p in opt.state: opt.state[p]['grad_avg'] = opt.state[p]['grad_avg']*2
    return ps, opt
def state_moved(ps, opt):
    opt.state[ps[0]]['sqr_avg'].data = opt.state[ps[0]]['sqr_avg']*2
    return ps, opt
def other_gradients(ps, opt):
    for p in (p for p in ps if p.ndim == 4 and p.grad is not None): p.grad = p.grad.contiguous()
    ps[0].grad = ps[0].grad.t().contiguous().t()
    return ps, opt
def count_replaced(ps, opt):
    opt.state[ps[0]]['step'] = 3
    return ps, opt
def copied(ps, opt, how=copy.deepcopy):
    grads = [p.grad for p in ps]
    ps, opt = how((ps, opt))
    for p, g in zip(ps, grads): p.grad = g
    return ps, opt
def pickled(o): return pickle.loads(pickle.dumps(o))
def saved(o):
    torch.save(o, f := io.BytesIO())
    f.seek(0)
    return torch.load(f, weights_only=False)
def new_shape(ps, opt):
    "Pruned in place: the first rows stay where they were."
    ps[0].data, ps[0].grad = ps[0].data[:200], ps[0].grad[:200].clone()
    opt.state[ps[0]] = {k: v[:200] if torch.is_tensor(v) else v for k, v in opt.state[ps[0]].items()}
    return ps, opt
def unsettled(ps, opt):
    opt.hypers[1]['wd'] = 0.
    return ps, opt

EVENTS = dict(moved=moved, reformatted=reformatted, transposed=transposed, loaded=loaded, state_replaced=state_replaced, state_moved=state_moved, new_shape=new_shape,
              other_gradients=other_gradients, count_replaced=count_replaced, deepcopy=copied, pickle=partial(copied, how=pickled),
              torch_save=partial(copied, how=saved), unsettled=unsettled)

@pytest.mark.parametrize('event', EVENTS)
def test_what_happens_between_steps_is_noticed(event, eager):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        a, b = (walk(adam_opt(), run, event=EVENTS[event], at=6, wd=.1) for run in (each, Compiled(least=0)))
        same(a, b)


def test_a_pruned_parameter_of_which_nothing_is_remembered(eager, said):
    same(*(walk(OPTS['2019 order of arguments'], run, event=new_shape, at=6) for run in (each, Compiled(least=0))))


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_gradients_that_are_not_finite(value, eager, said):
    def odd(ps, opt):
        ps[0].grad[0, 0] = value
        return ps, opt
    a, b = (walk(adam_opt(), run, event=odd, at=1) for run in (each, Compiled(least=0)))
    same(a, b)
    assert not said() and b[0][0].isnan().sum() == 1


def test_one_runner_for_two_optimizers_is_right(eager):
    runner = Compiled(least=0)
    for opt_func in (adam_opt(), lamb, partial(adam_opt(), mom=.5)): same(walk(opt_func, each), walk(opt_func, runner))
    one, two = (fast(adam_opt())(parameters(), lr=.1) for _ in range(2))
    assert one.run is not two.run and isinstance(one.run, Compiled)
    assert isinstance(pickled(fast(sgd_opt))(parameters(), lr=.1).run, Compiled)


# ---- what cannot be compiled goes the plain way, and says so once

def rowwise(p, lr, **kwargs): p.sub_(lr*p.grad/(p.grad.norm(dim=-1, keepdim=True) + 1))
def by_shape(p, lr, **kwargs): p.sub_(lr*p.grad/p.shape[0])
def by_ndim(p, lr, **kwargs): p.sub_(p.grad, alpha=lr/p.ndim)
def by_count(p, lr, **kwargs): p.sub_(p.grad, alpha=lr if p.numel() > 100 else 2*lr)
def by_value(p, lr, **kwargs): p.sub_(p.grad, alpha=lr if p.norm() > 1 else 2*lr)
def by_item(p, lr, **kwargs): p.sub_(p.grad, alpha=lr*p.grad.norm().item())
def assigns(p, lr, **kwargs): p.data = p.data - lr*p.grad.data
def masked(p, lr, **kwargs): p[p.grad > 0] = 0.
def matrix(p, lr, **kwargs): p.sub_(p.grad.flatten(1) @ torch.eye(p.numel()//len(p), dtype=p.dtype)[::1].roll(1, 0) if p.ndim == 2 else p.grad, alpha=lr)
def turned(p, lr, **kwargs): p.sub_(p.grad.roll(1, 0), alpha=lr)
def outer(p, lr, **kwargs): p.sub_(p.grad*OUTER, alpha=lr)
def noisy(p, lr, **kwargs): p.add_(p.grad + .1*torch.randn_like(p), alpha=-lr)
def power(p, lr, **kwargs): p.sub_(lr*p.grad.sign()*p.grad.abs()**(1 + lr))
OUTER = torch.tensor(.5, dtype=f64)
many = [weight_decay]*6                                      # so many lines that small tensors are worth a program

REFUSED = dict(rowwise=rowwise, by_shape=by_shape, by_ndim=by_ndim, by_count=by_count, by_value=by_value, by_item=by_item, masked=masked, matrix=matrix,
               turned=turned, outer=outer, noisy=noisy)

@pytest.mark.parametrize('name', REFUSED)
def test_a_stepper_that_cannot_be_compiled_runs_as_it_is(name, eager, said):
    opt_func, shapes = partial(Optimizer, steppers=[REFUSED[name], *many], wd=.1), ((400, 400), (64, 60), (5, 4), (30, 7))
    torch.manual_seed(3)
    a, x = walk(opt_func, each, steps=4, shapes=shapes), torch.rand(1)
    torch.manual_seed(3)
    b, y = walk(opt_func, Compiled(least=0), steps=4, shapes=shapes), torch.rand(1)
    assert len(said()) == 1 and x == y                       # said once, and no random number was drawn for the trial
    for p, q in zip(a[0], b[0]): assert p.equal(q)


@pytest.mark.parametrize('stepper', [assigns, power])
def test_others_that_no_program_fits(stepper, eager):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ps = [[nn.Parameter(torch.linspace(-1, 1, 160_000, dtype=f64).view(400, 400))] for _ in range(2)]
        opts = [Optimizer(p, [stepper, *many], lr=.1, wd=.01, run=run) for p, run in zip(ps, (each, Compiled(least=0)))]
        for i in range(40):
            for opt in opts:
                opt.hypers[0]['lr'] = .1/(1 + i)
                opt.param_groups[0][0].grad = torch.cos(torch.arange(160_000, dtype=f64)).view(400, 400)
                opt.step()
    assert torch.allclose(ps[0][0], ps[1][0], rtol=1e-12)


def test_a_rate_of_zero_hides_nothing(eager, said):
    def go(run):
        p = nn.Parameter(torch.linspace(0, 1, 6000, dtype=f64).view(60, 100))
        opt = Optimizer([p], [rowwise, *many], lr=0., wd=.1, run=run)
        for i in range(6):
            p.grad, opt.hypers[0]['lr'] = (p.detach()*7).sin(), 1e-9*max(0, i - 2)
            opt.step()
        return p
    assert go(each).equal(go(Compiled(least=0))) and len(said()) == 1


class GradNorm(Stat):
    "A number for each parameter, from its values."
    def init_state(self, p): return {'gn': 1.}
    def update(self, p, state, **kwargs): return {**state, 'gn': p.grad.norm().item()}
class Size(Stat):
    "A number for each parameter, from its shape, without asking a tensor inside the step."
    def init_state(self, p): return {'size': float(p.ndim), 'name': 'x'}
    def update(self, p, state, **kwargs): return state
class Track(Stat):
    "A list that grows."
    def init_state(self, p): return {'track': []}
    def update(self, p, state, lr, **kwargs):
        state['track'].append(lr)
        return state
class Scalar(Stat):
    "A count in a tensor of its own shape."
    def init_state(self, p): return {'calls': torch.zeros((), dtype=f64)}
    def update(self, p, state, **kwargs):
        state['calls'].add_(1)
        return state
class Late(Stat):
    "A tensor that a later update puts there."
    def init_state(self, p): return {'n': 0}
    def update(self, p, state, **kwargs):
        if state['n'] == 4: state = {**state, 'late': p.detach().clone()}
        return {**state, 'n': state['n'] + 1}
class Wide(Stat):
    "Double precision whatever the parameter has."
    def init_state(self, p): return {'wide': torch.zeros_like(p, dtype=f64)}
    def update(self, p, state, **kwargs):
        state['wide'].add_(p.grad)
        return state
def normed(p, lr, gn, **kwargs): p.add_(p.grad, alpha=-lr/gn)
def sized(p, lr, size, **kwargs): p.add_(p.grad, alpha=-lr/size)
def tracked(p, lr, track, **kwargs): p.mul_(1 - lr/len(track))
def called(p, lr, calls, **kwargs): p.sub_(p.grad/calls*lr)
def late_step(p, lr, late=None, **kwargs): p.sub_(p.grad if late is None else late, alpha=lr)
def widely(p, lr, wide, **kwargs): p.sub_(wide, alpha=lr)

STATES = dict(replaced=(own_step, Replaced(), 1), numbers_from_values=(normed, GradNorm(), 1), numbers_of_each=(sized, Size(), 0), a_list=(tracked, Track(), 1),
              another_shape=(called, Scalar(), 1), a_tensor_that_comes_later=(late_step, Late(), 1), another_precision=(widely, Wide(), 0))

@pytest.mark.parametrize('name', STATES)
def test_states_of_all_kinds(name, eager, said):
    stepper, stat, n = STATES[name]
    opt_func = partial(Optimizer, steppers=[l2_reg, stepper, adam_step, weight_decay], stats=[stat, *adam_stats], wd=.1)
    dtype, tol = (torch.float32, 1e-4) if name == 'another_precision' else (f64, 1e-9)
    a, b = (walk(opt_func, run, dtype=dtype) for run in (each, Compiled(least=0)))
    assert len(said()) == n
    same(a, b, tol)


def odd_tensors():
    g = torch.Generator().manual_seed(0)
    base = torch.randn(60, 60, generator=g, dtype=f64)
    ps = [base[:, ::2].requires_grad_(), base.clone().t().requires_grad_(), torch.randn(50, 2, generator=g, dtype=f64).requires_grad_(),
          torch.randn(40, generator=g).requires_grad_(), nn.Parameter(torch.tensor(.5)), nn.Parameter(torch.zeros(0))]
    return [*ps, torch.view_as_complex(torch.randn(50, 2, generator=g, dtype=f64)).requires_grad_()]

def test_tensors_with_gaps_complex_sparse_and_tiny_ones(eager):
    def go(run):
        ps = odd_tensors()
        opt = Optimizer(ps, [sgd_mom_step, *many], AverageGrad(), lr=.1, wd=.01, run=run)
        for i in range(4):
            for p in ps: p.grad = (p.detach() + i).clone()
            ps[2].grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2, dtype=f64), (50, 2))
            opt.step()
        return ps
    def sgd_mom_step(p, lr, grad_avg, **kwargs): p.add_(grad_avg, alpha=-lr)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for p, q in zip(go(each), go(Compiled(least=0))): assert torch.allclose(p, q, rtol=1e-6)


# ---- when it compiles

def test_small_nets_are_left_to_the_loop(monkeypatch, said):
    def never(*args, **kwargs): raise AssertionError('compiled')
    monkeypatch.setattr(torch, 'compile', never)
    a, b = walk(lamb, each), walk(lamb, Compiled())
    same(a, b, 0)
    assert not said()


def script(code, **env):
    code = 'import sys, warnings, torch\nfrom exp.optimizers import adam_opt\n' + code
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, **env}, timeout=300)
    assert r.returncode == 0, r.stderr
    return r.stdout.split()


def test_importing_it_does_not_bring_in_the_compiler():
    assert script("import exp.fast_optimizers\nprint([m for m in sys.modules if m.startswith(('torch._dynamo', 'torch._inductor'))])") == ['[]']


def test_no_compiler_is_one_warning_and_the_loop(tmp_path):
    out = script("""
from exp.fast_optimizers import Compiled
from exp.optimizers import each
def go(run):
    p = torch.nn.Parameter(torch.linspace(0, 1, 6000))
    opt = adam_opt()([p], lr=.1, run=run)
    for _ in range(5): p.grad = p.detach().cos(); opt.step()
    return p
with warnings.catch_warnings(record=True) as ws:
    warnings.simplefilter('always')
    print(go(Compiled(least=0)).equal(go(each)), sum('plain loop' in str(w.message) for w in ws))
""", CXX='/no/such/compiler', TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert out == ['True', '1']
