"""exp.lsuv: every layer at unit variance by an independent pass, whatever the network; and everything else as it was."""
import copy
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
from exp.lsuv import LSUVReport, _batches, lsuv_init, orthonormal_

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def gen(seed=0): return torch.Generator().manual_seed(seed)


def variances(model, *batches):
    "Variance of all outputs of each layer over all batches: outputs kept, put end to end, and NumPy asked. Our own hooks, not exp's."
    outs, handles = {}, []
    for n, m in model.named_modules():
        if isinstance(m, LAYERS): handles.append(m.register_forward_hook(lambda mod, i, o, n=n: outs.setdefault(n, []).append(o.detach().double().flatten().clone())))
    rng, buffers = torch.get_rng_state(), {k: v.clone() for k, v in model.named_buffers()}
    with torch.no_grad():
        for b in batches: model(b)
    for h in handles: h.remove()
    torch.set_rng_state(rng)
    for k, v in model.named_buffers(): v.copy_(buffers[k])
    return {n: np.var(np.concatenate([o.numpy() for o in os])) for n, os in outs.items()}


def all_near_1(model, *batches, tol=.01): return max(abs(v - 1) for v in variances(model, *batches).values()) < tol


def stack(*layers): return nn.Sequential(*layers)


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.Conv2d(c, c, 3, padding=1)
    def forward(self, x): return F.relu(x + self.b(F.relu(self.a(x))), inplace=True)


ZOO = {
    'conv1d': ((3, 20), lambda: stack(nn.Conv1d(3, 8, 5, dilation=2), nn.ReLU(inplace=True), nn.Conv1d(8, 6, 3, bias=False))),
    'conv3d': ((2, 6, 6, 6), lambda: stack(nn.Conv3d(2, 6, 3, padding=1), nn.ELU(), nn.Conv3d(6, 4, 3))),
    'transposed': ((4, 5, 5), lambda: stack(nn.ConvTranspose2d(4, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1))),
    'transposed 1d and 3d': ((4, 8), lambda: stack(nn.ConvTranspose1d(4, 8, 4, 2), nn.ReLU(), nn.Unflatten(2, (3, 3, 2)), nn.ConvTranspose3d(8, 4, 2))),
    'grouped, depthwise': ((8, 9, 9), lambda: stack(nn.Conv2d(8, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16, padding_mode='reflect', padding=1))),
    'linear, 3 axes': ((5, 12), lambda: stack(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 7, bias=False))),
    'in-place': ((3, 12, 12), lambda: stack(*(l for i in range(6) for l in (nn.Conv2d(3 if not i else 8, 8, 3, padding=1), GeneralRelu(.1, .4, inplace=True))))),
    'pooling, dropout': ((3, 16, 16), lambda: stack(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(.5), nn.Conv2d(8, 8, 3), nn.Dropout2d(.2), nn.Flatten(), nn.Linear(200, 5))),
    'norms': ((3, 12, 12), lambda: stack(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3))),
    'residual': ((8, 8, 8), lambda: stack(*(Residual(8) for _ in range(5)))),
    'one linear': ((10,), lambda: nn.Linear(10, 3)),
    'prelu, 30 deep': ((16,), lambda: stack(*(l for _ in range(30) for l in (nn.Linear(16, 16), nn.PReLU())))),
}


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('name', ZOO)
def test_every_output_has_unit_variance(name, train):
    shape, make = ZOO[name]
    torch.manual_seed(0)
    model, x = make().train(train), torch.randn(64, *shape)*3 + 1
    report = lsuv_init(model, x)
    assert not report.failed and len(report) == sum(isinstance(m, LAYERS) for m in model.modules())
    assert all_near_1(model, x)
    if 'residual' not in name: assert all(r['trials'] <= 1 for r in report), 'one pass was not enough'


@pytest.mark.parametrize('name, train', [('resnet18', True), ('resnet50', True), ('resnet50', False), ('vgg11', False), ('mobilenet_v3_small', True)])
def test_torchvision(name, train):
    torch.manual_seed(0)
    model, x = getattr(torchvision.models, name)(weights=None).train(train), torch.randn(8, 3, 32, 32)
    calls = []
    h = model.register_forward_pre_hook(lambda *a: calls.append(1))
    report = lsuv_init(model, x)
    h.remove()
    assert not report.failed and all_near_1(model, x)
    assert len(calls) == report.forwards <= 3


def test_same_weights_as_the_step_by_step_algorithm():
    "Without orthonormal start and biases the scales are determined: the reference, a whole pass per layer and trial, must find the same."
    torch.manual_seed(0)
    ours = stack(*(l for i in range(8) for l in (nn.Conv2d(3 if not i else 12, 12, 3, padding=1), nn.BatchNorm2d(12) if i % 3 == 1 else nn.ReLU())))
    x, ref = torch.randn(32, 3, 10, 10), copy.deepcopy(ours)
    lsuv_init(ours, x, orthonormal=False, tol=1e-5)
    with torch.no_grad():
        for m in ref:
            for _ in range(50 if isinstance(m, nn.Conv2d) else 0):
                v = {}
                h = m.register_forward_hook(lambda mod, i, o, v=v: v.update(u=o - mod.bias[:, None, None], b=mod.bias[:, None, None], o=o.clone()))
                ref(x); h.remove()
                if abs(v['o'].var(correction=0) - 1) < 1e-6: break
                lo, hi = 0., 100.                                # bisection, where ours solves the quadratic equation
                for _ in range(60):
                    mid = (lo + hi)/2
                    lo, hi = (mid, hi) if (mid*v['u'] + v['b']).var(correction=0) < 1 else (lo, mid)
                m.weight *= mid
    for a, b in zip(ours.parameters(), ref.parameters()): assert torch.allclose(a, b, rtol=2e-3, atol=1e-5)


def test_weights_are_orthonormal_up_to_their_scale_and_layers_differ():
    torch.manual_seed(0)
    model = stack(*(nn.Linear(600, 600) for _ in range(3)))       # large enough to be woven
    lsuv_init(model, torch.randn(50, 600))
    for l in model:
        gram = l.weight @ l.weight.T
        assert torch.allclose(gram/gram[0, 0], torch.eye(600), atol=1e-4) and not l.bias.any()
    assert not torch.allclose(model[0].weight/model[0].weight.norm(), model[1].weight/model[1].weight.norm(), atol=1e-3)


@pytest.mark.parametrize('limit', [0, 1e9])
@pytest.mark.parametrize('shape, groups', [((6, 40), 1), ((40, 6), 1), ((64, 64), 1), ((97, 101), 1), ((60, 20, 3, 3), 1), ((512, 256, 1, 1), 1), ((12, 1, 3, 3), 12), ((1, 7), 1)])
def test_orthonormal(shape, groups, limit):
    for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, .1)):
        w = orthonormal_(torch.empty(shape, dtype=dtype), groups=groups, generator=gen(), qr_limit=limit)
        s = torch.linalg.svdvals(w.double().view(groups, shape[0]//groups, -1))
        assert (s - 1).abs().max() < tol
    w4 = torch.empty(shape).contiguous(memory_format=torch.channels_last) if len(shape) == 4 else torch.empty(shape).T.contiguous().T
    assert orthonormal_(w4, groups, gen(), limit).equal(orthonormal_(torch.empty(shape), groups, gen(), limit)), 'memory layout changes the result'


def test_orthonormal_is_random_and_seeded():
    def sample(limit, seed): return orthonormal_(torch.empty(64, 128), generator=gen(seed), qr_limit=limit)
    for limit in (0, 1e9):
        assert sample(limit, 0).equal(sample(limit, 0)) and not torch.allclose(sample(limit, 0), sample(limit, 1), atol=.1)
        mean = sum(sample(limit, s) for s in range(200))/200
        assert mean.abs().max() < .04 and abs(mean.std()*128**.5*200**.5 - 1) < .1      # entries of mean 0 and variance 1/128
    torch.manual_seed(1); a, b = (orthonormal_(torch.empty(8, 8)) for _ in range(2))
    torch.manual_seed(1); again = orthonormal_(torch.empty(8, 8))
    assert a.equal(again) and not torch.allclose(a, b, atol=.1), 'the global seed should choose, and each call draw anew'
    with pytest.raises(ValueError, match='groups'): orthonormal_(torch.empty(5, 5), groups=2)


class Odd(nn.Module):
    "A layer that runs twice, one that never does, one that is frozen, a container that is shared."
    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.never, self.frozen = nn.Linear(10, 16), nn.Linear(16, 16), nn.Linear(3, 3), nn.Linear(16, 16)
        self.block = stack(nn.Linear(16, 16), nn.ReLU())
        self.again, self.head = self.block, nn.Linear(16, 4)
        self.frozen.requires_grad_(False)
    def forward(self, x):
        x = self.stem(x).relu()
        x = self.twice(self.twice(x).relu()).relu()
        return self.head(self.again(self.block(self.frozen(x))))


def test_twice_never_frozen_shared():
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(256, 10)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    report = lsuv_init(model, x)
    rows = {r['name']: r for r in report}
    assert report.failed == [] and rows['frozen']['note'] == 'frozen' and 'never' in rows['never']['note'] and np.isnan(rows['never']['std'])
    vs = variances(model, x)
    for n in ('stem', 'twice', 'block.0', 'head'): assert abs(vs[n] - 1) < .01, (n, vs[n])
    for n in ('frozen', 'never'):
        for p in ('weight', 'bias'): assert kept[f'{n}.{p}'].equal(model.state_dict()[f'{n}.{p}'])
    assert rows['frozen']['std'] == pytest.approx(vs['frozen']**.5, rel=1e-4)
    assert [r['name'] for r in report] == ['stem', 'twice', 'frozen', 'block.0', 'head', 'never']


def test_a_layer_run_eight_times_in_a_row():
    class Loop(nn.Module):
        def __init__(self): super().__init__(); self.l, self.out = nn.Linear(32, 32), nn.Linear(32, 2)
        def forward(self, x):
            for _ in range(8): x = self.l(x).relu()
            return self.out(x)
    torch.manual_seed(0)
    model, x = Loop(), torch.randn(128, 32)
    report = lsuv_init(model, x)
    assert not report.failed and all_near_1(model, x)


def test_tied_weights_are_one():
    torch.manual_seed(0)
    model, x = stack(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(99, 16)
    model[2].weight = model[0].weight
    report = lsuv_init(model, x)
    vs, outs = variances(model, x), []
    assert [r['name'] for r in report] == ['0 = 2', '4'] and not report.failed and abs(vs['4'] - 1) < .01
    with torch.no_grad(): outs += [model[0](x), model[2](model[0](x).relu())]
    assert abs(torch.cat(outs).var() - 1) < .01


def test_hopeless_layers_are_named_left_finite_and_the_rest_is_set():
    torch.manual_seed(0)
    model = stack(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad(): model[0].bias.fill_(-1e3); model[3].bias.copy_(torch.linspace(-9, 9, 8))
    for p in (model[0].bias, model[2].bias, model[3].bias): p.requires_grad_(False)
    x = torch.randn(64, 8)
    report = lsuv_init(model, x)
    notes = {r['name']: r['note'] for r in report}
    assert report.failed == ['2', '3'] and 'dead' in notes['2'] and notes['0'] == '' == notes['4']
    assert all(p.isfinite().all() for p in model.parameters())
    assert abs(variances(model, x)['0'] - 1) < .01 and 'failed' in repr(report) and 'dead' in repr(report)
    # the bias alone
    wide = nn.Linear(8, 8)
    with torch.no_grad(): wide.bias.copy_(torch.linspace(-9, 9, 8))
    w = wide.weight.clone()
    report = lsuv_init(wide, x, orthonormal=False)
    assert report.failed == ['(model)'] and 'bias alone' in report[0]['note'] and w.equal(wide.weight)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_bad_inputs_never_reach_the_weights(bad):
    model, x = stack(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(10, 4)
    x[3, 2] = bad
    report = lsuv_init(model, x)
    assert report.failed == ['0', '2'] and 'not finite' in report[0]['note'] and all(p.isfinite().all() for p in model.parameters())


def test_extreme_scales():
    for scale in (1e-25, 1e25):
        model, x = stack(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(64, 16)*scale
        assert not lsuv_init(model, x).failed and all_near_1(model, x)
    half, x = nn.Linear(16, 16).half(), (torch.randn(64, 16)*6e-6).half()     # would need weights beyond 65,504
    lsuv_init(half, x)
    assert half.weight.isfinite().all()
    big = nn.Linear(16, 16).half()
    r = lsuv_init(big, torch.full((4, 16), 6e-8).half()*torch.randn(4, 16).sign().half())
    assert big.weight.isfinite().all() and (r.failed == ['(model)'] or all_near_1(big, x))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    torch.manual_seed(0)
    model, x = stack(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(dtype), torch.randn(16, 3, 8, 8).to(dtype)
    assert not lsuv_init(model, x).failed and all_near_1(model, x, tol=.02) and model[0].weight.dtype == dtype


class WeightNormalised(nn.Conv2d):
    "Its output does not follow the size of its weight."
    def forward(self, x): return F.conv2d(x, 3*self.weight/self.weight.flatten(1).norm(dim=1)[:, None, None, None], self.bias)


def test_weights_that_are_not_what_they_seem():
    torch.manual_seed(0)
    model, x = stack(WeightNormalised(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), parametrizations.spectral_norm(nn.Linear(128, 16)), nn.Linear(16, 4)), torch.randn(64, 3, 8, 8)
    report = lsuv_init(model.eval(), x)
    rows = {r['name']: r for r in report}
    assert report.failed == ['0'] and 'follow' in rows['0']['note'] and 'computed' in rows['4']['note']
    assert model[0].weight.abs().max() < 2
    assert abs(variances(model, x)['2'] - 1) < .01 and abs(rows['5']['std']**2 - 1) < .01


def test_attention_that_is_used_without_being_called():
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(16, 2, 32, dropout=0., batch_first=True), torch.randn(32, 5, 16)
    out = model.self_attn.out_proj.weight.clone()
    report = lsuv_init(model, x)
    rows = {r['name']: r for r in report}
    assert rows['self_attn.out_proj']['note'] == 'never ran' and out.equal(model.self_attn.out_proj.weight)
    assert abs(variances(model, x)['linear1'] - 1) < .01 and not report.failed


def batches(n=5): return [torch.randn(16, 3, 10, 10)*(1 + i) + i for i in range(n)]       # very unlike each other


def net(norm=False): return stack(nn.Conv2d(3, 8, 3), *([nn.BatchNorm2d(8)] if norm else []), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))


@pytest.mark.parametrize('norm', [False, True])
def test_several_batches_are_one_set(norm):
    torch.manual_seed(0)
    bs, model = batches(), net(norm)
    report = lsuv_init(model, bs)
    assert not report.failed and all_near_1(model, *bs)
    assert norm or not all_near_1(model, bs[0], tol=.2)


def test_forms_of_xb():
    bs = batches(4)
    xs = torch.cat(bs)
    loader = DataLoader(TensorDataset(xs, torch.zeros(64)), 16)
    want = None
    for xb in (bs, loader, iter(bs), [(b, torch.zeros(16)) for b in bs], [[b, None] for b in bs], ((b, 0) for b in bs)):
        torch.manual_seed(0)
        model = net()
        lsuv_init(model, xb)
        want = want or copy.deepcopy(model.state_dict())
        assert all(torch.equal(v, want[k]) for k, v in model.state_dict().items())
    for xb in (xs, (xs, torch.zeros(64))):
        torch.manual_seed(0)
        model = net()
        lsuv_init(model, xb)
        assert all(torch.allclose(v, want[k], rtol=.02, atol=1e-4) for k, v in model.state_dict().items())     # to tol, the same set
    model = net()
    lsuv_init(model, loader, n_batches=1)
    assert all_near_1(model, bs[0]) and not all_near_1(model, xs)

    class Two(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(4, 4)
        def forward(self, a, b): return self.l(a + b)
    assert not lsuv_init(Two(), ((torch.randn(9, 4), torch.randn(9, 4)), torch.zeros(9))).failed
    for bad in (None, 3, 'x', {'x': xs}, [], [3.], DataLoader(TensorDataset(xs[:0]), 4)):
        with pytest.raises((TypeError, ValueError), match='batch'): lsuv_init(net(), bad)


def test_a_pair_as_torchs_loader_gives_it():
    "default_collate makes a list [inputs, targets]: the targets used to be taken for a second batch."
    torch.manual_seed(0)
    net, ds = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), TensorDataset(torch.randn(64, 5), torch.arange(64) % 3)
    other, b = copy.deepcopy(net), next(iter(DataLoader(ds, 64)))
    assert isinstance(b, list)
    lsuv_init(net, b, generator=torch.Generator().manual_seed(0)); lsuv_init(other, b[0], generator=torch.Generator().manual_seed(0))
    assert all(p.equal(q) for p, q in zip(net.parameters(), other.parameters()))
    assert len(_batches([b[0], b[0]], 8, 'cpu')) == 2                         # two of floats are two batches


@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8])
def test_a_pair_of_whole_numbers_as_torchs_loader_gives_it(dtype):
    "Tokens or bytes with labels: the labels used to be fed to the model as a second batch."
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 9, (64, 5)).to(dtype), torch.arange(64) % 3

    class Net(nn.Module):
        def __init__(self): super().__init__(); self.emb, self.l, self.shapes = nn.Embedding(9, 4), nn.Linear(4, 3), []
        def forward(self, x): self.shapes.append(tuple(x.shape)); return self.l(self.emb(x.long()))
    b = next(iter(DataLoader(TensorDataset(tokens, labels), 64)))
    assert isinstance(b, list)
    net = Net()
    lsuv_init(net, b)
    assert set(net.shapes) == {(64, 5)} and all_near_1(net, tokens)
    for two in ([tokens, tokens], [labels, labels], [tokens, labels[:8]], [tokens, torch.arange(5)]): assert len(_batches(two, 8, 'cpu')) == 2


def test_a_net_that_chooses_its_way():
    "One of two experts runs, by a layer that LSUV changes: the other may have run in the first pass and in no other."
    class Choose(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)
        def forward(self, x): return (self.a if self.gate(x).mean(0).argmax() == 0 else self.b)(x)
    gone = 0
    for seed in range(20):
        torch.manual_seed(seed)
        report = lsuv_init(Choose(), torch.randn(32, 4))
        gone += any(r['note'] == 'ran at first and not again' for r in report)
    assert gone


def test_a_layer_that_only_runs_in_a_later_batch():
    class Fork(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        def forward(self, x): return self.a(x) if len(x) > 10 else self.b(x)
    model = Fork()
    assert not lsuv_init(model, [torch.randn(20, 4), torch.randn(9, 4)]).failed
    assert all_near_1(model, torch.randn(20, 4), tol=1.) and {r['trials'] for r in lsuv_init(model, [torch.randn(20, 4)], orthonormal=False)} <= {0, 1}


def snapshot(model):
    return dict(modes=[m.training for m in model.modules()], hooks=[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
                grads=[p.requires_grad for p in model.parameters()], ids=[id(p) for p in [*model.parameters(), *model.buffers()]],
                buffers={k: v.tolist() for k, v in model.named_buffers()}, grad=[None if p.grad is None else p.grad.tolist() for p in model.parameters()],
                rng=(torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())))


class Breaks(nn.Module):
    def forward(self, x): raise RuntimeError('here')


@pytest.mark.parametrize('train', [None, True, False])
def test_model_left_as_found(train):
    torch.manual_seed(0)
    model = stack(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(.5), stack(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None)), nn.Flatten(), nn.Linear(288, 3))
    model[3].eval(); model[0].bias.requires_grad_(False); model(torch.randn(4, 3, 10, 10)).sum().backward()
    model[0].register_forward_hook(lambda *a: None)
    loader = DataLoader(TensorDataset(torch.randn(64, 3, 10, 10)), 16, shuffle=True, generator=gen(3))
    before, state = snapshot(model), loader.generator.get_state()
    lsuv_init(model, loader, train=train, generator=gen(1))
    assert snapshot(model) == before and loader.generator.get_state().equal(state)
    weights = copy.deepcopy(model.state_dict())
    model.append(Breaks())
    x, wrong = torch.randn(4, 3, 10, 10), torch.randn(4, 7, 10, 10)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match='here'): lsuv_init(model, x, train=train, generator=gen(1))
    assert snapshot(model) == before and all(weights[k].equal(v) for k, v in model.state_dict().items()), 'an error in the first pass changed weights'
    with pytest.raises(RuntimeError): lsuv_init(model, wrong, train=train, generator=gen(1))
    assert snapshot(model) == before


def test_each_call_draws_anew_and_the_seed_chooses():
    "Nets of one shape used to get the same weights, all of them: the seed was read, and nothing drawn."
    x = torch.randn(64, 10)
    def made(): m = stack(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3)); lsuv_init(m, x); return m[0].weight.detach()
    torch.manual_seed(1); a, b = made(), made()
    torch.manual_seed(1); again = made()
    assert a.equal(again) and not torch.allclose(a, b, atol=.1)
    net = stack(nn.Linear(10, 20), nn.Dropout(.5))
    torch.manual_seed(2); torch.randint(2**62, ()); want = torch.get_rng_state()
    torch.manual_seed(2); lsuv_init(net, x)
    assert torch.get_rng_state().equal(want), 'one draw, however large the net'
    lsuv_init(net, x, orthonormal=False)
    assert torch.get_rng_state().equal(want), 'nothing to draw'


def test_a_look_at_a_loader_uses_up_no_epoch():
    class Loader(list):
        epoch = 3
        def __iter__(self): self.epoch += 1; return super().__iter__()
    loader = Loader(batches(4))
    lsuv_init(net(), loader)
    assert loader.epoch == 3
    with pytest.raises(RuntimeError, match='here'): lsuv_init(stack(net(), Breaks()), loader)
    assert loader.epoch == 3


def test_every_argument_matters():
    torch.manual_seed(0)
    base, x = net(norm=True), torch.randn(32, 3, 10, 10)
    def result(**kw): m = copy.deepcopy(base); torch.manual_seed(5); lsuv_init(m, x, **kw); return m.state_dict()['3.weight']
    want = result()
    assert want.equal(result())
    for kw in (dict(orthonormal=False), dict(train=False), dict(generator=gen(9)), dict(orthonormal=lambda w, groups, generator: w.normal_(generator=generator))):
        assert not torch.allclose(want, result(**kw), atol=1e-3), kw
    near = copy.deepcopy(base); lsuv_init(near, x); near[0].weight.data.mul_(1.02)
    for tol, touched in ((.1, 0), (.01, 1)): assert max(r['trials'] for r in lsuv_init(copy.deepcopy(near), x, orthonormal=False, tol=tol)) == touched
    looped = Odd()
    assert 'after 1 trials' in lsuv_init(looped, torch.randn(64, 10), max_trials=1, tol=1e-4)[1]['note']
    for bad in (dict(tol=0), dict(tol=float('nan')), dict(max_trials=0)):
        with pytest.raises(ValueError, match='tol'): lsuv_init(net(), x, **bad)
    with pytest.raises(ValueError, match='run a batch'): lsuv_init(nn.LazyLinear(3), x)


def test_a_second_call_changes_nothing():
    torch.manual_seed(0)
    model, x = net(), torch.randn(32, 3, 10, 10)
    lsuv_init(model, x)
    kept = copy.deepcopy(model.state_dict())
    report = lsuv_init(model, x, orthonormal=False)
    assert report.forwards == 1 and all(kept[k].equal(v) for k, v in model.state_dict().items())


def test_report():
    torch.manual_seed(0)
    model, x = net(), torch.randn(32, 3, 10, 10)*5
    before, report = variances(model, x), lsuv_init(model, x)
    assert isinstance(report, LSUVReport) and [r['name'] for r in report] == ['0', '2', '5']
    for r in report: assert r['std_before'] == pytest.approx(before[r['name']]**.5, rel=1e-3) and abs(r['std'] - 1) < .005 and r['note'] == ''
    assert len(repr(report).splitlines()) == 5 and repr(report).count('\n') and '<table>' in report._repr_html_()
    assert len(report.plot().lines) == 2
    assert repr(lsuv_init(nn.ReLU(), x)).endswith('0 layers, 0 failed; 1 forward passes')


def test_compiled_model_is_initialised_without_compiling():
    torch.manual_seed(0)
    model, x = net(), torch.randn(32, 3, 10, 10)
    report = lsuv_init(torch.compile(model), x)
    assert [r['name'] for r in report] == ['0', '2', '5'] and all_near_1(model, x)
