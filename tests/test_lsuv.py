"""exp.lsuv and exp.lsuv_any: every layer at unit variance by an independent pass, whatever the network; and everything else as it was."""
import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from exp.convnets import GeneralRelu
from exp.lsuv import lsuv_init
from exp.lsuv_any import first_inputs, lsuv_any, orthonormal_

LAYERS = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
both = pytest.mark.parametrize('init', [lsuv_init, lsuv_any])


def gen(seed=0): return torch.Generator().manual_seed(seed)


def ok(found): return not found.failed if hasattr(found, 'failed') else all(r['ok'] for r in found)


@torch.no_grad()
def variances(model, *batches):
    "Variance of all outputs of each layer over all batches: outputs kept, put end to end, and NumPy asked. Our own hooks, not exp's."
    outs, handles = {}, []
    for n, m in model.named_modules():
        if isinstance(m, LAYERS): handles.append(m.register_forward_hook(lambda mod, i, o, n=n: outs.setdefault(n, []).append(o.double().flatten().numpy())))
    rng, buffers = torch.get_rng_state(), {k: v.clone() for k, v in model.named_buffers()}
    for b in batches: model(b)
    for h in handles: h.remove()
    torch.set_rng_state(rng)
    for k, v in model.named_buffers(): v.copy_(buffers[k])
    return {n: np.var(np.concatenate(o)) for n, o in outs.items()}


def all_near_1(model, *batches, tol=.01): return max(abs(v - 1) for v in variances(model, *batches).values()) < tol


def stack(*layers): return nn.Sequential(*layers)


def net(norm=False): return stack(nn.Conv2d(3, 8, 3), *[nn.BatchNorm2d(8)]*norm, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))


def module(forward, **layers):
    "A module of these layers that does `forward(self, *inputs)`."
    m = type('Made', (nn.Module,), {'forward': forward})()
    for k, v in layers.items(): setattr(m, k, v)
    return m


def residual(c): return module(lambda s, x: F.relu(x + s.b(F.relu(s.a(x))), inplace=True), a=nn.Conv2d(c, c, 3, padding=1, bias=False), b=nn.Conv2d(c, c, 3, padding=1))


ZOO = {
    'conv1d': ((3, 20), lambda: stack(nn.Conv1d(3, 8, 5, dilation=2), nn.ReLU(inplace=True), nn.Conv1d(8, 6, 3, bias=False))),
    'conv3d': ((2, 6, 6, 6), lambda: stack(nn.Conv3d(2, 6, 3, padding=1), nn.ELU(), nn.Conv3d(6, 4, 3))),
    'transposed': ((4, 5, 5), lambda: stack(nn.ConvTranspose2d(4, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.Flatten(2), nn.ConvTranspose1d(6, 2, 1), nn.Tanh(), nn.Linear(144, 9))),
    'grouped, depthwise': ((8, 9, 9), lambda: stack(nn.Conv2d(8, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16, padding_mode='reflect', padding=1))),
    'in-place': ((3, 12, 12), lambda: stack(*(l for i in range(6) for l in (nn.Conv2d(3 if not i else 8, 8, 3, padding=1), GeneralRelu(.1, .4, inplace=True))))),
    'pooling, dropout': ((3, 16, 16), lambda: stack(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Dropout(.5), nn.Conv2d(8, 8, 3), nn.Dropout2d(.2), nn.Flatten(), nn.Linear(200, 5))),
    'norms': ((3, 12, 12), lambda: stack(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3))),
    'residual': ((8, 8, 8), lambda: stack(*(residual(8) for _ in range(5)))),
    'prelu, 30 deep': ((16,), lambda: stack(*(l for _ in range(30) for l in (nn.Linear(16, 16), nn.PReLU())))),
}


@both
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('name', ZOO)
def test_every_output_has_unit_variance(name, train, init):
    shape, make = ZOO[name]
    torch.manual_seed(0)
    model, x = make().train(train), torch.randn(64, *shape)*3 + 1
    found = init(model, x)
    assert ok(found) and len(found) == sum(isinstance(m, LAYERS) for m in model.modules()) and all_near_1(model, x)
    assert name == 'residual' or getattr(found, 'forwards', 3) == 3, 'one round was not enough'


@pytest.mark.parametrize('init, most', [(lsuv_init, 1), (lsuv_any, 3)])
@pytest.mark.parametrize('name, train', [('resnet18', True), ('resnet50', False), ('mobilenet_v3_small', True)])
def test_torchvision(name, train, init, most):
    torch.manual_seed(0)
    model, x, calls = getattr(torchvision.models, name)(weights=None).train(train), torch.randn(16, 3, 32, 32), []
    h = model.register_forward_pre_hook(lambda *a: calls.append(1))
    found = init(model, x)
    h.remove()
    assert ok(found) and all_near_1(model, x) and len(calls) == getattr(found, 'forwards', 1) == most


def test_same_weights_as_the_step_by_step_algorithm():
    "Biases stay, so the scales are determined: a whole pass and a bisection for each layer must find the same."
    torch.manual_seed(0)
    ours = stack(*(l for i in range(8) for l in (nn.Conv2d(3 if not i else 12, 12, 3, padding=1), nn.BatchNorm2d(12) if i % 3 == 1 else nn.ReLU())))
    x, ref = torch.randn(32, 3, 10, 10), copy.deepcopy(ours)
    assert lsuv_any(copy.deepcopy(ours), x, orthonormal=None).forwards == 3, 'the bias is allowed for: one round does it'
    lsuv_any(ours, x, orthonormal=None, tol=1e-5)
    with torch.no_grad():
        for m in ref[::2]:
            outs, b = [], m.bias[:, None, None]
            h = m.register_forward_hook(lambda mod, i, o, outs=outs: outs.append(o.clone()))
            ref(x)
            h.remove()
            lo, hi = 0., 100.
            for _ in range(60):
                mid = (lo + hi)/2
                lo, hi = (mid, hi) if (mid*(outs[0] - b) + b).var(correction=0) < 1 else (lo, mid)
            m.weight *= mid
    for a, b in zip(ours.parameters(), ref.parameters()): assert torch.allclose(a, b, rtol=2e-3, atol=1e-5)


# orthonormal

@both
def test_weights_are_orthonormal_up_to_their_scale_and_layers_differ(init):
    torch.manual_seed(0)
    model = stack(*(nn.Linear(600, 600) for _ in range(3)))       # large enough to be woven
    init(model, torch.randn(50, 600))
    for l in model:
        gram = l.weight @ l.weight.T
        assert torch.allclose(gram/gram[0, 0], torch.eye(600), atol=1e-4) and not l.bias.any()
    assert not torch.allclose(model[0].weight/model[0].weight.norm(), model[1].weight/model[1].weight.norm(), atol=1e-3)


@pytest.mark.parametrize('limit', [0, 1e9])
@pytest.mark.parametrize('shape, groups', [((6, 40), 1), ((40, 6), 1), ((97, 101), 1), ((60, 20, 3, 3), 1), ((256, 64, 1, 1), 1), ((12, 1, 3, 3), 12), ((24, 8, 3, 3), 4)])
def test_orthonormal(shape, groups, limit):
    for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, .1)):
        w = orthonormal_(torch.empty(shape, dtype=dtype), groups, gen(), limit)
        assert (torch.linalg.svdvals(w.double().view(groups, shape[0]//groups, -1)) - 1).abs().max() < tol
    other = torch.empty(shape).transpose(0, 1).contiguous().transpose(0, 1)
    assert orthonormal_(other, groups, gen(), limit).equal(orthonormal_(torch.empty(shape), groups, gen(), limit)), 'memory layout changes the result'


def test_orthonormal_is_random_and_seeded():
    for limit in (0, 1e9):
        def sample(seed, limit=limit): return orthonormal_(torch.empty(64, 128), 1, gen(seed), limit)
        assert sample(0).equal(sample(0)) and not torch.allclose(sample(0), sample(1), atol=.1)
        mean = sum(map(sample, range(200)))/200
        assert mean.abs().max() < .04 and abs(mean.std()*128**.5*200**.5 - 1) < .1      # entries of mean 0 and variance 1/128
    for shape, groups in (((5, 5), 2), ((5,), 1)):
        with pytest.raises(ValueError): orthonormal_(torch.empty(shape), groups)


@both
def test_each_call_draws_anew_and_the_seed_chooses(init):
    "Nets of one shape used to get the same weights, all of them."
    def made():
        m = stack(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))
        init(m, torch.randn(64, 10, generator=gen()))
        return m[0].weight.detach()
    torch.manual_seed(1); a, b = made(), made()
    torch.manual_seed(1); again = made()
    assert a.equal(again) and not torch.allclose(a, b, atol=.1)


# nets that are not chains

def odd():
    "A layer that runs twice, one that never does, one that is frozen, a container that is shared."
    block = stack(nn.Linear(16, 16), nn.ReLU())
    m = module(lambda s, x: s.head(s.again(s.block(s.frozen(s.twice(s.twice(s.stem(x)).relu())).relu()))), stem=nn.Linear(10, 16), twice=nn.Linear(16, 16),
               never=nn.Linear(3, 3), frozen=nn.Linear(16, 16), block=block, head=nn.Linear(16, 4))
    m.again = block
    for p in m.frozen.parameters(): p.requires_grad_(False)
    return m


def test_odd_nets():
    torch.manual_seed(0)
    model, x = odd(), torch.randn(128, 10)
    kept = copy.deepcopy(model.state_dict())
    report = lsuv_any(model, x)
    vs = variances(model, x)
    assert [r['name'] for r in report] == ['stem', 'twice', 'frozen', 'block.0', 'head', 'never'] and not report.failed
    assert all(abs(v - 1) < .01 for n, v in vs.items() if n != 'frozen')
    assert {r['name'] for r in report if r['note']} == {'frozen', 'never'} and math.isnan(report[-1]['std'])
    assert all(kept[k].equal(v) for k, v in model.state_dict().items() if k.split('.')[0] in ('frozen', 'never'))


def test_a_layer_run_eight_times_in_a_row():
    def forward(s, x):
        for _ in range(8): x = s.l(x).relu()
        return s.out(x)
    torch.manual_seed(0)
    model, x = module(forward, l=nn.Linear(32, 32), out=nn.Linear(32, 2)), torch.randn(128, 32)
    assert not lsuv_any(model, x).failed and all_near_1(model, x)
    assert lsuv_any(model, x, max_trials=1).failed == ['l'], 'one round cannot do it, and the report must say so'


def test_tied_weights_are_one():
    torch.manual_seed(0)
    model, x = stack(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(99, 16)
    model[2].weight = model[0].weight
    report = lsuv_any(model, x)
    with torch.no_grad(): outs = [model[0](x), model[2](model[0](x).relu())]
    assert [r['name'] for r in report] == ['0 = 2', '4'] and not report.failed and abs(variances(model, x)['4'] - 1) < .01
    assert abs(torch.cat(outs).var() - 1) < .01


def test_a_net_that_chooses_its_way():
    "One of two experts runs, by a layer that LSUV changes: the other may have run in the first pass and in no other."
    def forward(s, x): return (s.a if s.gate(x).mean(0).argmax() == 0 else s.b)(x)
    gone = 0
    for seed in range(20):
        torch.manual_seed(seed)
        gone += any('not again' in r['note'] for r in lsuv_any(module(forward, gate=nn.Linear(4, 2), a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.randn(32, 4)))
    assert gone
    fork = module(lambda s, x: s.a(x) if len(x) > 10 else s.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    long, short = torch.randn(20, 4), torch.randn(9, 4)
    assert not lsuv_any(fork, [long, short]).failed and all_near_1(fork, long) and all_near_1(fork, short), 'a layer that only runs in a later batch'


# layers that cannot be set

@both
def test_dead_layers_are_named_left_finite_and_the_rest_is_set(init):
    torch.manual_seed(0)
    model, x = stack(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(64, 8)
    with torch.no_grad(): model[0].bias.fill_(-1e3)
    model[0].requires_grad_(False)                              # left alone, so what follows is dead
    found = init(model, x)
    assert all(p.isfinite().all() for p in model.parameters()) and not ok(found)
    bad = found.failed if init is lsuv_any else [r['name'] for r in found if not r['ok']]
    assert bad == ['2', '3', '4']


def test_a_bias_that_may_not_be_moved():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    for size, failed in ((9., ['(model)']), (1., [])):
        layer = nn.Linear(8, 8)
        with torch.no_grad(): layer.bias.copy_(torch.linspace(-size, size, 8))
        layer.bias.requires_grad_(False)
        kept = layer.bias.clone()
        assert lsuv_any(layer, x).failed == failed and layer.bias.equal(kept) and layer.weight.isfinite().all()
        assert failed or all_near_1(layer, x)


@both
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_bad_inputs_never_reach_the_weights(bad, init):
    model, x = stack(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(10, 4)
    x[3, 2] = bad
    assert not ok(init(model, x)) and all(p.isfinite().all() for p in model.parameters())


def test_extreme_scales():
    for scale in (1e-25, 1e25):
        model, x = stack(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(64, 16)*scale
        assert not lsuv_any(model, x).failed and all_near_1(model, x)
    half, x = nn.Linear(16, 16).half(), torch.full((4, 16), 6e-8).half()*torch.randn(4, 16).sign().half()      # would need weights beyond 65,504
    report = lsuv_any(half, x)
    assert half.weight.isfinite().all() and (report.failed or all_near_1(half, x))


@both
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, init):
    if init is lsuv_init and dtype != torch.float64: init = lambda m, x: lsuv_init(m, x, orthonormal=None)          # torch has no QR of halves
    torch.manual_seed(0)
    model, x = stack(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(dtype), torch.randn(16, 3, 8, 8).to(dtype)
    assert ok(init(model, x)) and all_near_1(model, x, tol=.02) and model[0].weight.dtype == dtype


class WeightNormalised(nn.Conv2d):
    "Its output does not follow the size of its weight."
    def forward(self, x): return F.conv2d(x, 3*self.weight/self.weight.flatten(1).norm(dim=1)[:, None, None, None], self.bias)


def test_weights_that_are_not_what_they_seem():
    torch.manual_seed(0)
    layers = WeightNormalised(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), parametrizations.spectral_norm(nn.Linear(128, 16)), nn.Linear(16, 4)
    model, x = stack(*layers).eval(), torch.randn(64, 3, 8, 8)
    report = lsuv_any(model, x)
    assert report.failed == ['0'] and [r['name'] for r in report if r['note']] == ['0', '4']
    w = model[0].weight.flatten(1)
    assert torch.allclose(w @ w.T, torch.eye(8), atol=1e-5), 'tried, and put back as it was'
    assert abs(variances(model, x)['2'] - 1) < .01 and abs({r['name']: r['std'] for r in report}['5']**2 - 1) < .01
    with pytest.raises(ValueError): lsuv_any(nn.LazyLinear(3), x)


# batches, arguments, traces

@pytest.mark.parametrize('norm', [False, True])
def test_several_batches_are_one_set(norm):
    torch.manual_seed(0)
    bs, model = [torch.randn(16, 3, 10, 10)*(1 + i) + i for i in range(5)], net(norm)             # very unlike each other
    assert not lsuv_any(model, bs).failed and all_near_1(model, *bs) and (norm or not all_near_1(model, bs[0], tol=.2))


def test_forms_of_a_batch():
    x = torch.randn(64, 3, 10, 10)
    two = module(lambda s, a, b: s.l(a + b), l=nn.Linear(4, 4))
    assert not lsuv_any(two, [(torch.randn(9, 4), torch.randn(9, 4))]).failed
    for bad in (None, 3, 'x', {'x': x}, [], (x, x), DataLoader(TensorDataset(x), 4)):
        with pytest.raises(TypeError): lsuv_any(net(), bad)


def test_first_inputs_leave_a_loader_as_it_was():
    ds = TensorDataset(torch.arange(40.).view(40, 1), torch.zeros(40))
    for g in (gen(3), None):                                    # its own generator, or torch's
        dl = DataLoader(ds, 4, shuffle=True, generator=g)
        torch.manual_seed(0)
        taken = first_inputs(dl, 3)
        want = [xb for xb, _ in dl][:3]
        assert len(taken) == 3 and all(a.equal(b) for a, b in zip(taken, want)) and len(first_inputs(dl, 99)) == 10


class Breaks(nn.Module):
    def forward(self, x): raise RuntimeError('here')


def traces(model):
    return dict(modes=[m.training for m in model.modules()], hooks=[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
                grads=[p.requires_grad for p in model.parameters()], ids=[id(p) for p in [*model.parameters(), *model.buffers()]],
                buffers={k: v.tolist() for k, v in model.named_buffers()}, grad=[None if p.grad is None else p.grad.tolist() for p in model.parameters()],
                rng=(torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())))


@pytest.mark.parametrize('init', [lambda m, x: lsuv_init(m, x, orthonormal=None), lambda m, x: lsuv_any(m, x, generator=gen(1)),
                                  lambda m, x: lsuv_any(m, x, train=False, generator=gen(1))], ids=['lsuv_init', 'lsuv_any', 'in eval mode'])
def test_model_left_as_found(init):
    torch.manual_seed(0)
    model = stack(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(.5), stack(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None)), nn.Flatten(), nn.Linear(288, 3))
    model[3].eval(); model[0].bias.requires_grad_(False); model(torch.randn(4, 3, 10, 10)).sum().backward()
    model[0].register_forward_hook(lambda *a: None)
    before = traces(model)
    init(model, torch.randn(16, 3, 10, 10, generator=gen()))
    assert traces(model) == before
    model.append(Breaks())
    before = traces(model)
    for x in (torch.randn(4, 3, 10, 10, generator=gen()), torch.randn(4, 7, 10, 10, generator=gen())):
        with pytest.raises(RuntimeError): init(model, x)
        assert traces(model) == before


def test_every_argument_of_lsuv_any_matters():
    torch.manual_seed(0)
    base, x = net(norm=True), torch.randn(32, 3, 10, 10)*torch.tensor([1, 5, .2]).view(3, 1, 1)
    def result(**kw): m = copy.deepcopy(base); torch.manual_seed(5); lsuv_any(m, x, **kw); return m.state_dict()['3.weight']
    want = result()
    assert want.equal(result())
    for kw in (dict(orthonormal=None), dict(train=False), dict(generator=gen(9)), dict(orthonormal=lambda w, groups, generator: w.normal_(generator=generator))):
        assert not torch.allclose(want, result(**kw), atol=1e-3), kw
    near = copy.deepcopy(base); lsuv_any(near, x); near[0].weight.data.mul_(1.02)
    for tol, touched in ((.1, 0), (.01, 1)): assert max(r['trials'] for r in lsuv_any(copy.deepcopy(near), x, orthonormal=None, tol=tol)) == touched
    for bad in (dict(tol=math.nan), dict(max_trials=0)):
        with pytest.raises(ValueError): lsuv_any(net(), x, **bad)


def test_a_second_call_changes_nothing():
    torch.manual_seed(0)
    model, x = net(), torch.randn(32, 3, 10, 10)
    lsuv_any(model, x)
    kept = copy.deepcopy(model.state_dict())
    assert lsuv_any(model, x, orthonormal=None).forwards == 1 and all(kept[k].equal(v) for k, v in model.state_dict().items())
    lsuv_init(model, x, orthonormal=None)
    assert all(torch.allclose(kept[k], v, rtol=1e-2) for k, v in model.state_dict().items())


def test_report():
    torch.manual_seed(0)
    model, x = net(), torch.randn(32, 3, 10, 10)*5
    before, report = variances(model, x), lsuv_any(model, x)
    assert [r['name'] for r in report] == ['0', '2', '5'] and len(report.plot().lines) == 2
    for r in report: assert r['std_before'] == pytest.approx(before[r['name']]**.5, rel=1e-3) and abs(r['std'] - 1) < .005 and r['note'] == ''
    assert len(repr(report).splitlines()) == 5
    assert [(r['name'], round(r['found'], 1)) for r in lsuv_init(model, x, orthonormal=None)] == [('0', 1), ('2', 1), ('5', 1)]
    assert lsuv_init(nn.ReLU(), x) == lsuv_any(nn.ReLU(), x) == []


def test_lsuv_init_knows_its_limits():
    "A layer that runs twice is set once, by its first output; one that never runs and a frozen one are not set."
    torch.manual_seed(0)
    model, x = odd(), torch.randn(128, 10)
    frozen = model.frozen.weight.clone()
    rows = {r['name']: r['ok'] for r in lsuv_init(model, x)}
    assert rows == {'stem': True, 'twice': True, 'block.0': True, 'head': True, 'never': False} and frozen.equal(model.frozen.weight)
    with torch.no_grad(): assert abs(model.twice(model.stem(x)).var() - 1) < .01


def test_compiled_model_is_initialised_without_compiling():
    torch.manual_seed(0)
    model, x = net(), torch.randn(32, 3, 10, 10)
    assert [r['name'] for r in lsuv_any(torch.compile(model), x)] == ['0', '2', '5'] and all_near_1(model, x)
