"""Lion, AdEMAMix, schedule-free AdamW and Muon: step for step beside independent implementations, and what a learner makes of them."""
import ast
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exp import since_2019
from exp.callbacks import AvgStatsCallback, DataBunch, Dataset, accuracy, get_dls
from exp.learner import Learner, one_group, set_seed
from exp.optimizers import adam_opt
from exp.since_2019 import ScheduleFree, ademamix, lion, muon, muon_groups, newton_schulz, schedule_free, use_average

SHAPES = (8, 5), (5, 8), (7,)


def walk(make, shapes=SHAPES, steps=200, seed=0):
    "Weights after `steps` steps in float64 on noisy slopes that depend on them, and the optimizer."
    g = torch.Generator().manual_seed(seed)
    def draw(s): return torch.randn(s, generator=g, dtype=torch.float64)
    ps = [draw(s).requires_grad_() for s in shapes]
    opt = make(ps)
    for _ in range(steps):
        for p in ps: p.grad = torch.sin(3*p.detach()) + p.detach()/2 + draw(p.shape)/2
        opt.step()
    return [p.detach().clone() for p in ps], opt


def same(ours, theirs, tol=1e-9):
    for a, b in zip(ours, theirs, strict=True): assert (a - b).norm() <= tol*b.norm()


def test_the_rate_by_place_as_torchs():
    for f in (lion, ademamix, schedule_free, muon): assert f([torch.ones(3)], .2).hypers[0]['lr'] == .2


def test_lion():
    peer = pytest.importorskip('pytorch_optimizer').Lion
    ours, _ = walk(lambda ps: lion(ps, lr=.003, mom=.8, avg_mom=.97, wd=.1))
    theirs, _ = walk(lambda ps: peer(ps, lr=.003, betas=(.8, .97), weight_decay=.1))
    same(ours, theirs)


@pytest.mark.parametrize('warm', [None, 120, 1000])
def test_ademamix(warm):
    peer = pytest.importorskip('pytorch_optimizer').AdEMAMix
    ours, _ = walk(lambda ps: ademamix(ps, lr=.003, mom=.8, sqr_mom=.95, slow_mom=.995, alpha=4., warm=warm, eps=1e-6, wd=.1))
    theirs, _ = walk(lambda ps: peer(ps, lr=.003, betas=(.8, .95, .995), alpha=4., t_alpha_beta3=warm, eps=1e-6, weight_decay=.1,
                                     weight_decouple=True))
    same(ours, theirs)


@pytest.mark.parametrize('warmup', [0, 30, 500])
def test_schedule_free(warmup):
    peer = pytest.importorskip('schedulefree').AdamWScheduleFree
    def reference(ps):
        opt = peer(ps, lr=.01, betas=(.8, .95), eps=1e-6, weight_decay=.1, warmup_steps=warmup)
        opt.train()
        return opt
    ours, opt = walk(lambda ps: schedule_free(ps, lr=.01, mix=.8, sqr_mom=.95, eps=1e-6, wd=.1, warmup=warmup))
    theirs, their_opt = walk(reference)
    same(ours, theirs)
    their_opt.eval()
    assert use_average(opt)
    same(opt.param_groups[0], their_opt.param_groups[0]['params'])                          # the average x
    assert not use_average(opt)                                                             # it is there already
    same(opt.param_groups[0], their_opt.param_groups[0]['params'])
    assert use_average(opt, False)
    same(opt.param_groups[0], theirs)                                                       # y again


@pytest.mark.parametrize('scale', ['original', 'match_rms_adamw', 'spectral_unclamped'])
def test_muon_of_torch(scale, monkeypatch):
    if not hasattr(torch.optim, 'Muon'): pytest.skip('this torch has no Muon')
    monkeypatch.setattr(torch.Tensor, 'bfloat16', lambda t: t.clone())                      # torch rounds to three digits inside
    try: torch.optim.Muon([torch.ones(2, 2, requires_grad=True)], adjust_lr_fn=scale)
    except ValueError: pytest.skip(f'this torch knows no {scale}')
    ours, _ = walk(lambda ps: muon(ps, lr=.01, mom=.9, wd=.1, adjust_lr_fn=scale), SHAPES[:2])
    theirs, _ = walk(lambda ps: torch.optim.Muon(ps, lr=.01, momentum=.9, weight_decay=.1, adjust_lr_fn=scale), SHAPES[:2])
    same(ours, theirs)


def test_muon_leaves_the_rest_to_adam():
    def groups(ps): return [{'params': [ps[0]]}, {'params': [ps[1]], 'muon': False}, {'params': [ps[2]]}]
    ours, _ = walk(lambda ps: muon(groups(ps), lr=.01, wd=.1))
    adam, _ = walk(lambda ps: adam_opt()(ps, lr=.01, wd=.1))
    same(ours[1:], adam[1:], 0)
    assert (ours[0] - adam[0]).norm() > .1


def test_muon_takes_a_convolution_for_a_matrix():
    (conv,), _ = walk(lambda ps: muon(ps, lr=.01), [(6, 3, 2, 2)])
    (matrix,), _ = walk(lambda ps: muon(ps, lr=.01), [(6, 12)])
    same([conv.flatten(1)], [matrix])


@pytest.mark.parametrize('shape', [(6, 4), (4, 6), (5, 5), (1, 7)])
def test_newton_schulz_changes_singular_values_only(shape):
    g = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    s = s/s.norm()
    for _ in range(3): s = 3.4445*s - 4.7750*s**3 + 2.0315*s**5
    same([newton_schulz(1000*g, 3)], [u*s@vt])
    assert newton_schulz(torch.zeros(shape)).equal(torch.zeros(shape))


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
                         nn.Flatten(), nn.Linear(6*16, 12), nn.Linear(12, 3))


def test_muon_groups():
    model = net()
    hidden, ends, vectors = muon_groups(model)
    assert [[n for n, _ in g['params']] for g in (hidden, ends)] == [['3.weight', '7.weight'], ['0.weight', '8.weight']]
    assert sum(len(g['params']) for g in (hidden, ends, vectors)) == len([*model.parameters()])
    opt = muon([hidden, ends, vectors], lr=.1, wd=.3)
    assert [h['muon'] for h in opt.hypers] == [True, False, False] and [h['wd'] for h in opt.hypers] == [.3, .3, 0]
    assert [len(g['params']) for g in muon_groups(nn.Linear(3, 2))] == [1, 1]               # one layer is both first and last
    assert [len(g['params']) for g in muon_groups(nn.Linear(3, 2, bias=False))] == [1]


def learner(opt_func, cbs=(), lr=.01, splitter=one_group):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 1, 8, 8, generator=g), torch.randint(3, (96,), generator=g)
    x[range(96), 0, y] += 1.
    train, valid = Dataset(x[:64], y[:64]), Dataset(x[64:], y[64:])
    set_seed(0)
    data = DataBunch(*get_dls(train, valid, 16, seed=0), 1, 3)
    return Learner(net(), data, F.cross_entropy, opt_func, lr, splitter, [AvgStatsCallback(accuracy, silent=True), *cbs])


def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize('opt_func, lr, splitter', [(lion, .005, one_group), (ademamix, .01, one_group), (muon, .02, muon_groups),
                                                    (schedule_free, .02, one_group)])
def test_they_train_in_one_cycle(opt_func, lr, splitter):
    learn = learner(opt_func, [ScheduleFree()] if opt_func is schedule_free else [], lr, splitter).fit_one_cycle(10)
    assert learn.cb(AvgStatsCallback).rows[-1]['train_loss'] < .4 and learn.validate()['accuracy'] > .6


@pytest.mark.parametrize('opt_func', [lion, ademamix, schedule_free, muon])
def test_state_goes_on(opt_func):
    _, one = walk(lambda ps: opt_func(ps, lr=.01), steps=7)
    def other(ps):
        opt = opt_func(ps, lr=.3)
        opt.load_state_dict(one.state_dict())
        return opt
    _, two = walk(other, steps=0)
    for a, b in zip(one.param_groups[0], two.param_groups[0]): b.data.copy_(a)
    for opt in (one, two):
        for p in opt.param_groups[0]: p.grad = torch.cos(p.detach())
        opt.step()
        opt.step()
    same(one.param_groups[0], two.param_groups[0], 0)


class Spy:
    "The weights that each training batch and each validation sees."
    _order = ScheduleFree._order + 1
    def begin_fit(self, learn): self.seen = {True: [], False: []}
    def begin_batch(self, learn): self.seen[learn.in_train].append(weights(learn.model))


def test_schedule_free_trains_at_y_and_validates_at_x():
    spy = Spy()
    learn = learner(schedule_free, [ScheduleFree(), spy]).fit(2)
    assert learn.opt.hypers[0]['averaged']
    x = weights(learn.model)
    assert spy.seen[False][-1].equal(x)
    assert len(spy.seen[True]) == 8

    again = learner(schedule_free).fit(2)                                                   # without the callback: always at y
    y = weights(again.model)
    assert (x - y).norm() > 1e-3
    use_average(again.opt)
    assert torch.allclose(weights(again.model), x, atol=1e-6)
    use_average(learn.opt, False)
    assert torch.allclose(weights(learn.model), y, atol=1e-6)


def test_schedule_free_looks_change_nothing():
    learn = learner(schedule_free, [ScheduleFree()]).fit(1)
    x, buffers = weights(learn.model), [b.clone() for b in learn.model.buffers()]
    stats = learn.validate()
    row = learn.cb(AvgStatsCallback).rows[-1]
    assert learn.validate() == stats == {k: row[f'valid_{k}'] for k in stats}
    learn.lr_find(max_iter=8)
    assert weights(learn.model).equal(x) and all(a.equal(b) for a, b in zip(buffers, learn.model.buffers()))
    learn.fit(1)                                                                            # and it goes on
    assert not weights(learn.model).equal(x)


class Looks:
    "Validates in the middle of an epoch."
    def after_step(self, learn):
        if learn.iter == 1: learn.validate()


def test_schedule_free_survives_a_look_in_mid_epoch():
    plain = learner(schedule_free, [ScheduleFree()]).fit(2)
    looked = learner(schedule_free, [ScheduleFree(), Looks()]).fit(2)
    assert torch.allclose(weights(plain.model), weights(looked.model), atol=1e-4)


def test_schedule_free_without_validation_renews_batch_norm():
    learn = learner(schedule_free, [ScheduleFree(n_batches=3)])
    learn.data.valid_dl, batches = None, []
    learn.model[2].eval()
    learn.fit(2, SimpleNamespace(begin_batch=lambda learn: batches.append(learn.xb)))
    assert learn.model.training and not learn.model[2].training, 'modes are as they were'
    assert learn.opt.hypers[0]['averaged'] and learn.model[1].momentum == .1
    with torch.no_grad(): means = [learn.model[0](x).mean((0, 2, 3)) for x in batches[-3:]]
    assert torch.allclose(learn.model[1].running_mean, torch.stack(means).mean(0), atol=1e-6)


def test_a_step_at_the_average_is_refused():
    _, opt = walk(lambda ps: schedule_free(ps, lr=.01), steps=3)
    use_average(opt)
    with pytest.raises(ValueError): opt.step()


def test_no_stepper_and_no_stat_of_more_than_twelve_lines():
    for o in ast.parse(inspect.getsource(since_2019)).body:
        if not isinstance(o, (ast.FunctionDef, ast.ClassDef)) or o.name == 'ScheduleFree': continue
        said = o.body[0].end_lineno - o.body[0].lineno + 1 if ast.get_docstring(o) else 0
        assert o.end_lineno - o.lineno + 1 - said <= 12, o.name
