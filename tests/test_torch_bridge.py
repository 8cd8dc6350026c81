"""exp.torch_bridge: one of ours where a `torch.optim.Optimizer` is wanted: beside torch's own under the same schedulers, scalers and wrappers."""
import copy
import io
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from exp.fast_optimizers import Compiled
from exp.optimizers import Optimizer, Stat, adam_opt, lamb, norm_bias_groups, sgd_mom_opt, sgd_opt
from exp.torch_bridge import TorchOptimizer

f64 = torch.float64


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(f64)


def groups(m): return [list(m[0].parameters()), list(m[2].parameters())]
def dicts(m): return [{'params': ps} for ps in groups(m)]
def weights(m): return torch.cat([p.detach().flatten() for p in m.parameters()])


def steps(m, opt, n=8, seed=1, sched=None, scaler=None, after=None):
    g = torch.Generator().manual_seed(seed)
    for i in range(n):
        loss = F.cross_entropy(m(torch.randn(4, 6, generator=g, dtype=f64)), torch.randint(0, 3, (4,), generator=g))
        if scaler is None:
            loss.backward()
            opt.step()
        else:
            scaler.scale(loss*(float('inf') if i == 3 else 1)).backward()
            scaler.step(opt)
            scaler.update()
        if sched is not None: sched.step(*([loss.item()] if isinstance(sched, ReduceLROnPlateau) else []))
        opt.zero_grad()
        if after: after(i, opt)
    return weights(m)


OURS = {'sgd': lambda m, **kw: TorchOptimizer(sgd_mom_opt(groups(m), lr=.1, wd=0., **kw)),
        'adam': lambda m, **kw: TorchOptimizer(adam_opt()(groups(m), lr=.1, eps=1e-8, sqr_mom=.999, **kw)),
        'adam, compiled': lambda m, **kw: TorchOptimizer(adam_opt(run=Compiled(least=0))(groups(m), lr=.1, eps=1e-8, sqr_mom=.999, **kw))}
TORCHS = {'sgd': lambda m, **kw: torch.optim.SGD(dicts(m), lr=.1, momentum=.9), 'adam': lambda m, **kw: torch.optim.AdamW(dicts(m), lr=.1, weight_decay=0.)}
TORCHS['adam, compiled'] = TORCHS['adam']

SCHEDS = {'OneCycleLR': lambda o: OneCycleLR(o, max_lr=[.3, .1], total_steps=30), 'CyclicLR': lambda o: CyclicLR(o, .01, .2, step_size_up=3),
          'CyclicLR, no momentum': lambda o: CyclicLR(o, .01, .2, step_size_up=3, cycle_momentum=False), 'ExponentialLR': lambda o: ExponentialLR(o, .8),
          'LambdaLR': lambda o: LambdaLR(o, [lambda i: 1/(1 + i), lambda i: .5]), 'ReduceLROnPlateau': lambda o: ReduceLROnPlateau(o, patience=0)}

@pytest.mark.parametrize('scaled', [False, True], ids=('', 'scaled'))
@pytest.mark.parametrize('sched', SCHEDS)
@pytest.mark.parametrize('name', OURS)
def test_schedulers_and_scalers_drive_ours_as_torchs(name, sched, scaled):
    out = []
    for make in (OURS[name], TORCHS[name]):
        m = net()
        opt = make(m)
        scaler = torch.amp.GradScaler('cpu', init_scale=8.) if scaled else None
        with torch.compiler.set_stance('force_eager'): out.append((steps(m, opt, 12, sched=SCHEDS[sched](opt), scaler=scaler), opt))
    (a, ours), (b, torchs) = out
    assert 'compiled' not in name or ours.opt.run.programs
    assert torch.allclose(a, b, rtol=0, atol=1e-10)
    for g, h, theirs in zip(ours.param_groups, ours.opt.hypers, torchs.param_groups):
        assert g['lr'] == h['lr'] == theirs['lr']


def test_either_side_sees_what_the_other_sets():
    m = net()
    opt = TorchOptimizer(adam_opt()(groups(m), lr=.1, wd=.1))
    a, b = opt.param_groups
    a['betas'], b['weight_decay'], opt.opt.hypers[1]['mom'], opt.opt.hypers[0]['lr'] = (.5, .6), .3, .7, 7.
    steps(m, opt, 1)
    assert [(h['mom'], h['sqr_mom'], h['wd']) for h in opt.opt.hypers] == [(.5, .6, .1), (.7, .99, .3)]
    assert a['betas'] == (.5, .6) and b['betas'] == (.7, .99) and a['lr'] == 7. and b['weight_decay'] == .3
    assert isinstance(opt, torch.optim.Optimizer) and opt.defaults['betas'] == (.9, .99) and opt.state[a['params'][0]]['step'] == 1


def test_what_has_no_momentum_says_so():
    for f in (OneCycleLR, CyclicLR):
        opt = TorchOptimizer(sgd_opt(groups(net()), lr=.1))
        with pytest.raises(ValueError, match='momentum'): f(opt, *((.1, .2) if f is CyclicLR else (.1, 10)))
    assert 'momentum' not in opt.param_groups[0] and opt.param_groups[0]['weight_decay'] == 0.


# ---- state

@pytest.mark.parametrize('opt_func', [adam_opt(), lamb, sgd_mom_opt, sgd_opt])
@pytest.mark.parametrize('named', [(True, True), (True, False), (False, True), (False, False)])
def test_state_goes_through_a_file_by_order_with_names_or_without(opt_func, named):
    def make(m, named, lr):
        return TorchOptimizer(opt_func(norm_bias_groups(m) if named else [[m[0].weight, m[2].weight], [m[0].bias, m[2].bias]], lr=lr))
    m, m2 = net(), net(5)
    opt, other = make(m, named[0], .1), make(m2, named[1], .7)
    steps(m, opt, 3)
    opt.param_groups[0]['lr'] = .05
    torch.save((m.state_dict(), opt.state_dict()), f := io.BytesIO())
    f.seek(0)
    sd, opt_sd = torch.load(f, weights_only=True)
    m2.load_state_dict(sd)
    other.load_state_dict(opt_sd)
    assert other.opt.hypers[0]['lr'] == .05 and other.opt.hypers[0] is other.param_groups[0] and other.opt.state is other.state
    assert steps(m, opt, 4, seed=3).equal(steps(m2, other, 4, seed=3))


def test_its_form_is_torchs():
    sds = []
    for make in (OURS['adam'], TORCHS['adam']):
        m = net()
        opt = make(m)
        steps(m, opt, 2)
        sds.append(opt.state_dict())
    ours, torchs = sds
    assert ours.keys() == torchs.keys() and ours['state'].keys() == torchs['state'].keys() == {0, 1, 2, 3}
    assert [g['params'] for g in ours['param_groups']] == [g['params'] for g in torchs['param_groups']]
    for i, s in ours['state'].items():
        assert torch.allclose(s['grad_avg'], torchs['state'][i]['exp_avg']) and s['step'] == torchs['state'][i]['step']


def test_hooks_are_called():
    m, seen = net(), []
    opt = OURS['adam'](m)
    for name in ('step_pre', 'step_post', 'state_dict_pre', 'state_dict_post', 'load_state_dict_pre', 'load_state_dict_post'):
        getattr(opt, f'register_{name}_hook')(lambda *a, name=name: seen.append(name) and None)
    steps(m, opt, 1)
    opt.load_state_dict(opt.state_dict())
    assert seen == ['step_pre', 'step_post', 'state_dict_pre', 'state_dict_post', 'load_state_dict_pre', 'load_state_dict_post']


@pytest.mark.parametrize('wrong', ['another optimizer', 'fewer groups', 'fewer parameters'])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(wrong):
    m = net()
    opt = OURS['adam'](m)
    steps(m, opt, 2)
    gs = {'another optimizer': groups(m), 'fewer groups': groups(m)[:1], 'fewer parameters': [groups(m)[0], groups(m)[1][:1]]}[wrong]
    other = TorchOptimizer((sgd_mom_opt if wrong == 'another optimizer' else adam_opt())(gs, lr=.9))
    steps(m, other, 1)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError): opt.load_state_dict(other.state_dict())
    now = opt.state_dict()
    assert now['param_groups'] == before['param_groups'] and opt.opt.hypers[0]['lr'] == .1
    for i, s in before['state'].items(): assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(now['state'][i][k])) for k, v in s.items())


@pytest.mark.parametrize('how', [copy.deepcopy, 'pickle'])
def test_a_copy_goes_its_own_way(how):
    m = net()
    opt = OURS['adam'](m)
    sched = ExponentialLR(opt, .5)
    steps(m, opt, 2, sched=sched)
    opt.opt.hypers[1]['mom'] = .6                            # not yet seen by torch's side
    if how == 'pickle':
        def how(o):
            torch.save(o, f := io.BytesIO())
            f.seek(0)
            return torch.load(f, weights_only=False)
    m2, opt2 = how((m, opt))
    before = weights(m)
    stepped = steps(m2, opt2, 3)
    assert weights(m).equal(before) and not stepped.equal(before) and steps(m, opt, 3).equal(stepped)
    assert opt2.param_groups[0] is opt2.opt.hypers[0] and opt2.state is opt2.opt.state and opt2.param_groups[0]['lr'] == .025
    assert opt2.opt.hypers[1]['mom'] == .6 and opt2.defaults == opt.defaults


def test_an_optimizer_that_has_begun_is_taken_over():
    m, m2 = net(), net()
    plain, opt = adam_opt()(groups(m), lr=.1), adam_opt()(groups(m2), lr=.1)
    steps(m, plain, 3)
    steps(m2, opt, 3)
    assert steps(m, plain, 3, seed=2).equal(steps(m2, TorchOptimizer(opt), 3, seed=2))


# ---- groups, closures, wrappers

@pytest.mark.parametrize('said', [{}, {'wd': .3}, {'weight_decay': .3}, {'mom': .5}, {'betas': (.5, .9)}, {'lr': .7}])
def test_a_group_that_joins_later(said):
    def go(make):
        m = net()
        opt = make(m)
        steps(m, opt, 2)
        theirs = dict(said)
        if isinstance(opt, torch.optim.AdamW):
            if 'wd' in theirs: theirs['weight_decay'] = theirs.pop('wd')
            if 'mom' in theirs: theirs['betas'] = theirs.pop('mom'), .99
        opt.add_param_group({'params': m[2].parameters(), **theirs})
        return steps(m, opt, 4, seed=7), opt
    a, opt = go(lambda m: TorchOptimizer(adam_opt()(m[0].parameters(), lr=.1, eps=1e-8, wd=.1)))
    b, _ = go(lambda m: torch.optim.AdamW(m[0].parameters(), lr=.1, betas=(.9, .99), weight_decay=.1))
    assert torch.allclose(a, b, rtol=0, atol=1e-10) and len(opt.opt.param_groups) == 2
    with pytest.raises(ValueError): opt.add_param_group({'params': [opt.param_groups[0]['params'][0]]})


def test_step_with_a_closure_and_zero_grad():
    m = net()
    opt, before = OURS['adam'](m), weights(m)
    def closure():
        opt.zero_grad()
        loss = m(torch.ones(2, 6, dtype=f64)).pow(2).sum()
        loss.backward()
        return loss
    loss = opt.step(closure)
    assert loss.item() > 0 and not weights(m).equal(before)
    opt.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in m.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in m.parameters())


def look_ahead(name):
    if name == 'timm': return partial(pytest.importorskip('timm.optim').Lookahead, alpha=.5, k=3)
    return partial(pytest.importorskip('pytorch_optimizer').Lookahead, alpha=.5, k=3)

@pytest.mark.parametrize('name', ['timm', 'pytorch_optimizer'])
def test_lookahead_of_others_around_it(name):
    out = []
    for make in (OURS['adam'], TORCHS['adam']):
        m = net()
        opt = look_ahead(name)(make(m))
        out.append(steps(m, opt, 8))
        sd = copy.deepcopy(opt.state_dict())
        opt.load_state_dict(sd)
        out.append(steps(m, opt, 8))
    assert torch.allclose(out[0], out[2], rtol=0, atol=1e-10) and torch.allclose(out[1], out[3], rtol=0, atol=1e-10)


def test_entries_that_others_make_in_the_state_do_no_harm():
    m = net()
    opt, ref = OURS['adam'](m), TORCHS['adam'](net())
    for p in m.parameters(): opt.state[p]['slow'] = p.detach().clone()
    opt.state[m[0].weight]
    m2 = net()
    ref = TORCHS['adam'](m2)
    assert torch.allclose(steps(m, opt, 5), steps(m2, ref, 5), rtol=0, atol=1e-10)
    assert 'slow' in opt.state[m[2].weight]


@pytest.mark.parametrize('begun', [False, True])
def test_torchs_distributed_checkpoint(begun):
    dcp = pytest.importorskip('torch.distributed.checkpoint.state_dict')
    m, m2 = net(), net(3)
    opt, opt2 = OURS['adam'](m), OURS['adam'](m2)
    if begun: steps(m, opt, 3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        before = weights(m)
        sd = dcp.get_optimizer_state_dict(m, opt)
        assert sd['state'].keys() == {n for n, _ in m.named_parameters()} and weights(m).equal(before) and opt.opt.hypers[0]['lr'] == .1
        m2.load_state_dict(m.state_dict())
        dcp.set_optimizer_state_dict(m2, opt2, copy.deepcopy(sd))
    assert steps(m, opt, 3).equal(steps(m2, opt2, 3))


def test_a_stat_that_draws_leaves_the_random_numbers_alone():
    class Draws(Stat):
        def init_state(self, p): return {'x': torch.rand_like(p)}
        def update(self, p, state, **kwargs): return state
    def sgd(p, lr, **kwargs): p.sub_(p.grad, alpha=lr)
    torch.manual_seed(0)
    want = torch.rand(1)
    ps = [torch.ones(3, requires_grad=True)]
    torch.manual_seed(0)
    TorchOptimizer(Optimizer(ps, [sgd], Draws(), lr=.1))
    assert torch.rand(1).equal(want)


def test_one_scheduler_after_another_and_steplr():
    m, m2 = net(), net()
    opt, ref = OURS['sgd'](m), TORCHS['sgd'](m2)
    for make in (lambda o: StepLR(o, 2, .5), SCHEDS['OneCycleLR'], SCHEDS['CyclicLR']):
        a, b = (steps(m, o, 6, sched=make(o)) for m, o in ((m, opt), (m2, ref)))
        assert torch.allclose(a, b, rtol=0, atol=1e-10)
