"""exp.xresnet against independent constructions (torchvision, timm, fastai, formulas), and every mix of its options."""
import copy
import csv
import importlib.util
import io
import pickle
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, small_env
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from exp.lsuv import lsuv_init
from exp.optimizers import norm_bias_groups
from exp.xresnet import (PLAIN, MaxBlurPool, ResBlock, SelfAttention, SqueezeExcite, XResNet, get_shortcut, relu,
                         xresnet18, xresnet34, xresnet50, xresnet101, xresnet152, xse_resnext50)

B = {**PLAIN, 'stride_3x3': True}                       # torchvision's and timm's ResNet-50 has the stride in the 3 × 3


def n_params(m): return sum(p.numel() for p in m.parameters())


@torch.no_grad()
def fill(model, seed=0):
    "Random weights, norms and statistics, of sizes that keep the signal."
    g = torch.Generator().manual_seed(seed)
    for k, t in model.state_dict().items():
        if t.dim() > 1: t.normal_(0, (2/t[0].numel())**.5, generator=g)
        elif t.is_floating_point(): t.uniform_(*((.5, 1.5) if k.endswith(('weight', 'var')) else (-.2, .2)), generator=g)
        else: t.zero_()


@torch.no_grad()
def pair(theirs, ours):
    "The models of these two functions with the same weights, copied in order; built without paying for two initialisations."
    with torch.device('meta'): theirs, ours = theirs(), ours()
    theirs, ours = theirs.to_empty(device='cpu'), ours.to_empty(device='cpu')
    fill(theirs)
    a, b = theirs.state_dict(), ours.state_dict()
    assert n_params(theirs) == n_params(ours) and [v.shape for v in a.values()] == [v.shape for v in b.values()]
    for v, w in zip(a.values(), b.values()): w.copy_(v)
    return theirs, ours


@torch.no_grad()
def assert_same(theirs, ours, tol=1e-5):
    "Parameter count and, with copied weights, outputs; at an even size and at an odd one."
    theirs, ours = pair(theirs, ours)
    for size in (64, 49):
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        a, b = theirs.eval()(x), ours.eval()(x)
        assert a.std() > 1e-3 and (a - b).abs().max() <= tol*a.abs().max(), size


@pytest.mark.parametrize('name, ours', [('resnet18', partial(xresnet18, **PLAIN)), ('resnet34', partial(xresnet34, **PLAIN)), ('resnet50', partial(xresnet50, **B)),
                                        ('resnext50_32x4d', partial(xresnet50, groups=32, width_per_group=4, **B))])
def test_plain_is_torchvisions(name, ours):
    tv = pytest.importorskip('torchvision').models
    assert_same(getattr(tv, name), ours)


def test_plain_50_is_that_of_2015():
    "torchvision's, with each stride moved back from the 3 × 3 to the first 1 × 1."
    tv = pytest.importorskip('torchvision').models
    def theirs():
        m = tv.resnet50()
        for stage in (m.layer2, m.layer3, m.layer4): stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        return m
    assert_same(theirs, partial(xresnet50, **PLAIN))


@pytest.mark.parametrize('name, ours', [('resnet101', xresnet101), ('resnet152', xresnet152), ('wide_resnet50_2', partial(xresnet50, width_per_group=128)),
                                        ('resnext101_32x8d', partial(xresnet101, groups=32, width_per_group=8))])
def test_parameter_counts_of_the_large(name, ours):
    tv = pytest.importorskip('torchvision').models
    with torch.device('meta'): assert n_params(getattr(tv, name)()) == n_params(ours(**B))


@pytest.mark.parametrize('name, ours', [
    ('resnet18d', xresnet18), ('resnet34d', xresnet34), ('resnet50d', xresnet50), ('seresnet18', partial(xresnet18, se=True, **PLAIN)),
    ('seresnext26d_32x4d', partial(XResNet, (2, 2, 2, 2), 4, se=True, groups=32, width_per_group=4)), ('seresnext50_32x4d', partial(xse_resnext50, **B))])
def test_tweaked_is_timms(name, ours):
    timm = pytest.importorskip('timm')
    assert_same(partial(timm.create_model, name), ours)


def test_tweaked_is_fastais():
    fa = pytest.importorskip('fastai.vision.models.xresnet')
    assert_same(partial(fa.xresnet18, act_cls=nn.Mish), partial(xresnet18, act=nn.Mish))


def test_gradients_are_timms():
    "In training mode: the statistics of the batch, and every gradient, in order."
    timm = pytest.importorskip('timm')
    theirs, ours = pair(partial(timm.create_model, 'seresnet18'), partial(xresnet18, se=True, **PLAIN))
    x, y = torch.randn(4, 3, 40, 40), torch.tensor([1, 2, 3, 4])
    for m in (theirs.double(), ours.double()): F.cross_entropy(m(x.double()), y).backward()
    for p, q in zip(theirs.parameters(), ours.parameters()): assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-9)
    for a, b in zip(theirs.buffers(), ours.buffers()): assert torch.allclose(a, b)


@pytest.mark.parametrize('switch', ['stride_3x3', 'pool_shortcut', 'zero_gamma'])
def test_each_switch_changes_one_thing(switch):
    off = dict(stride_3x3=False, pool_shortcut=False, zero_gamma=False)
    a, b = ResBlock(64, 16, 2, 4, **off), ResBlock(64, 16, 2, 4, **{**off, switch: True})
    def layers(m): return [(type(l).__name__, getattr(l, 'stride', None), bool(l.weight.any()) if isinstance(l, nn.BatchNorm2d) else None) for l in m]
    assert (layers(a.branch) == layers(b.branch)) == (switch == 'pool_shortcut') and (layers(a.shortcut) == layers(b.shortcut)) == (switch != 'pool_shortcut')
    assert n_params(a) == n_params(b) and a(x := torch.randn(1, 64, 8, 8)).shape == b(x).shape == (1, 64, 4, 4)


@pytest.mark.parametrize('expansion', [1, 4])
@pytest.mark.parametrize('act', [relu, nn.Mish])
def test_zero_gamma_starts_as_the_identity(expansion, act):
    block = ResBlock(8*expansion, 8, 1, expansion, act=act, se=True)
    x = torch.randn(4, 8*expansion, 7, 7)
    assert torch.allclose(block(x), act()(x.clone()))
    assert not torch.allclose(ResBlock(8*expansion, 8, 1, expansion, act=act, zero_gamma=False)(x), act()(x.clone()), atol=.1)
    down = ResBlock(8*expansion, 16, 2, expansion, act=act)
    assert torch.allclose(down(x), act()(down.shortcut(x)))


@pytest.mark.parametrize('norm', [nn.InstanceNorm2d, nn.Identity, partial(nn.BatchNorm2d, affine=False), lambda n: nn.BatchNorm2d(n)], ids=['instance', 'none', 'no weight', 'weight'])
def test_a_norm_without_a_weight_has_no_gamma_to_be_zero(norm):
    torch.manual_seed(0); net = XResNet((1, 1), 1, 3, 5, stem=(8,), channels=(8, 16), norm=norm)
    torch.manual_seed(0); plain = XResNet((1, 1), 1, 3, 5, stem=(8,), channels=(8, 16), norm=norm, zero_gamma=False)
    x = torch.randn(2, 3, 32, 32)
    assert net(x).equal(plain(x)) == (getattr(norm(4), 'weight', None) is None)


def blur_by_hand(x):
    "Loops over the definition, (H, W) in float64."
    h, w = x.shape
    def at(a, i, j): return a[min(max(i, 0), h - 1), min(max(j, 0), w - 1)]
    top = np.array([[max(at(x, i + u, j + v) for u in (-1, 0, 1) for v in (-1, 0, 1)) for j in range(w)] for i in range(h)])
    k = {-1: .25, 0: .5, 1: .25}
    return np.array([[sum(k[u]*k[v]*at(top, i + u, j + v) for u in k for v in k) for j in range(0, w, 2)] for i in range(0, h, 2)])


@pytest.mark.parametrize('h, w', [(8, 8), (9, 6), (7, 5), (2, 3), (1, 1), (1, 4)])
def test_max_blur_pool_by_hand(h, w):
    x = torch.randn(2, 3, h, w, dtype=torch.float64)
    got = MaxBlurPool()(x)
    assert got.shape == nn.MaxPool2d(3, 2, 1)(x).shape
    for i in range(2):
        for c in range(3): assert np.allclose(got[i, c], blur_by_hand(x[i, c].numpy()))


def test_squeeze_excite_is_its_formula():
    se, x = SqueezeExcite(32, 4).double(), torch.randn(3, 32, 5, 6, dtype=torch.float64)
    w1, b1, w2, b2 = (p.detach().flatten(1) if p.dim() > 1 else p.detach() for p in se.parameters())
    assert w1.shape == (8, 32)
    want = np.empty(x.shape)
    for i in range(3):
        hidden = np.maximum(w1.numpy() @ x[i].mean((1, 2)).numpy() + b1.numpy(), 0)
        want[i] = x[i].numpy()*(1/(1 + np.exp(-(w2.numpy() @ hidden + b2.numpy()))))[:, None, None]
    assert np.allclose(se(x).detach(), want)


def test_self_attention_is_its_formula():
    sa, x = SelfAttention(6).double(), torch.randn(3, 6, 4, 5, dtype=torch.float64)
    assert sa(x).equal(x)                                                           # γ = 0
    nn.init.constant_(sa.gamma, .7)
    w = sa.conv.weight[..., 0].detach()
    for i in range(3):
        X = x[i].reshape(6, 20)
        want = X.clone()
        for p in range(20): want[:, p] += .7*sum(X[:, q]*(X[:, q] @ (w @ X[:, p])) for q in range(20))/20     # each pixel asks all the others
        assert torch.allclose(sa(x)[i].reshape(6, 20), want)
    order = torch.randperm(20)
    shuffled = x.flatten(2)[..., order].view_as(x)
    assert torch.allclose(sa(shuffled).flatten(2), sa(x).flatten(2)[..., order])    # places do not count


OPTIONS = dict(layers=st.lists(st.integers(1, 2), min_size=1, max_size=3).map(tuple), expansion=st.sampled_from([1, 2, 4]), c_in=st.integers(1, 4), c_out=st.integers(1, 7),
               width=st.sampled_from([.125, .25, .3]), stem=st.sampled_from([(64,), (32, 32, 64), (16, 24), (8, 8, 8, 8)]), stride_3x3=st.booleans(),
               pool_shortcut=st.booleans(), zero_gamma=st.booleans(), act=st.sampled_from([relu, nn.Mish, nn.GELU, partial(nn.LeakyReLU, .1)]),
               norm=st.sampled_from([nn.BatchNorm2d, partial(nn.GroupNorm, 1)]), pool=st.sampled_from([MaxBlurPool, nn.Identity, partial(nn.MaxPool2d, 3, 2, 1)]),
               sa=st.booleans(), se=st.booleans(), groups=st.sampled_from([1, 2, 4]), width_per_group=st.sampled_from([16, 64, 100]))
some = partial(settings, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@some(max_examples=25)
@given(st.fixed_dictionaries(OPTIONS), st.sampled_from([64, 33, 47]))
def test_any_mix_of_options(o, size):
    torch.manual_seed(0)
    net = XResNet(**o)
    x = torch.randn(2, o['c_in'], size, size - 2)
    for name, p in net.named_parameters():                       # what starts at 0 hides the gradient of what is before it
        if not p.any(): nn.init.constant_(p, .5)
    y = net(x)
    assert y.shape == (2, o['c_out']) and y.isfinite().all()
    (y*torch.randn(y.shape)).sum().backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    dead = [n for n, p in net.named_parameters() if not p.grad.any()]
    assert len(dead) <= .1*len(list(net.parameters())), dead     # a ReLU of few channels may let nothing pass
    again = pickle.loads(pickle.dumps(net.eval()))
    assert again(x).equal(net(x)) and copy.deepcopy(net)(x).equal(net(x))
    assert torch.allclose(net(x.to(memory_format=torch.channels_last)), net(x), atol=1e-4)


@some(max_examples=3)
@given(st.fixed_dictionaries({**OPTIONS, 'layers': st.just((1, 1))}), st.sampled_from([64, 33]))
def test_any_mix_exports(o, size):
    net, x = XResNet(**o).eval(), torch.randn(2, o['c_in'], size, size)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim('n', min=2, max=64)},))
    out = io.BytesIO()
    torch.export.save(program, out); out.seek(0)
    x5 = torch.randn(5, o['c_in'], size, size)
    assert torch.allclose(torch.export.load(out).module()(x5), net(x5), atol=1e-5)


@pytest.mark.parametrize('wrong', [dict(layers=(1, 1), channels=(64,)), dict(layers=(1,), channels=(64, 64)), dict(groups=3), dict(stem=())])
def test_there_is_no_such_net(wrong):
    with pytest.raises((ValueError, IndexError)): XResNet(**wrong)


def test_a_misspelt_option_is_an_error():
    with pytest.raises(TypeError, match='zero_gama'): xresnet18(zero_gama=True)


def test_width_depth_stem_are_free():
    half = xresnet18(width=.5)
    convs = [m for m in half.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs[:3]] == [16, 16, 32] and half.head[-1].in_features == 256
    assert all(m.out_channels % 8 == 0 for m in xresnet50(width=.37).modules() if isinstance(m, nn.Conv2d))
    deep = XResNet((1, 2, 1, 1, 1), channels=(8, 8, 16, 24, 24), stem=(8,), c_out=3)
    assert [len(s) for s in deep.body] == [1, 2, 1, 1, 1] and deep(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    assert isinstance(get_shortcut(8, 8), nn.Identity)


def test_a_slice_is_part_of_the_same_net():
    net = xresnet18(width=.25, c_out=10).eval()
    body, x = net[:-1], torch.randn(2, 3, 64, 64)
    assert type(body) is nn.Sequential and body(x).shape == (2, 128, 2, 2) and net.head(body(x)).equal(net(x))
    assert body.stem is net[0] and net[-1] is net.head and [n for n, _ in net.named_children()] == ['stem', 'pool', 'body', 'head']


def test_decay_spares_norms_biases_and_gammas():
    net = XResNet((1, 1), 4, c_out=3, width=.25, se=True, sa=True)
    decayed, spared = ({n for n, _ in g['params']} for g in norm_bias_groups(net))
    assert decayed == {f'{n}.weight' for n, m in net.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))}
    assert spared == {n for n, _ in net.named_parameters()} - decayed and 'body.0.1.gamma' in spared


FULL = dict(expansion=4, se=True, sa=True, act=nn.Mish, pool=MaxBlurPool)


@pytest.mark.parametrize('options', [{}, PLAIN, {**FULL, 'zero_gamma': False}, FULL], ids=['tweaked', 'plain', 'full', 'full, zero gamma'])
def test_lsuv_sets_every_layer(options):
    torch.manual_seed(0)
    net = XResNet((2, 2), width=.25, c_out=4, **options)
    rows = lsuv_init(net, torch.randn(32, 3, 32, 32))
    assert len(rows) == sum(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear)) for m in net.modules())
    gates = {n for n, m in net.named_modules() if 'gate.' in n and isinstance(m, nn.Conv2d)}
    assert {r['name'] for r in rows if not r['ok']} == (gates if options is FULL else set())             # after a branch of zeros a gate has nothing to see, and LSUV says so


def test_runs_in_bf16():
    net = XResNet((1, 1), width=.25, c_out=4, se=True, sa=True, pool=MaxBlurPool, act=nn.Mish)
    with torch.autocast('cpu', torch.bfloat16): y = net(torch.randn(2, 3, 32, 32))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    assert net.to(torch.bfloat16)(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).isfinite().all()


def test_experiment_goes_on_where_it_stopped(tmp_path, data_home, monkeypatch):
    spec = importlib.util.spec_from_file_location('xresnet_tweaks', ROOT/'experiments'/'xresnet_tweaks.py')
    script = importlib.util.module_from_spec(spec); spec.loader.exec_module(script)
    for k, v in small_env(data_home).items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr(script, 'WIDTH', .125)
    out = tmp_path/'t.csv'
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['x', '--out', str(out), '--pictures', '32', '--epochs', '1', *args])
        script.main()
        return [(r['claim'], r['arm'], r['seed']) for r in csv.DictReader(l for l in open(out) if l[0] != '#')]
    assert run('--claims', 'tweaks', '--most', '2') == [('tweaks', 'plain', '0'), ('tweaks', '+ C', '0')]
    monkeypatch.setattr(script, 'ARMS', {k: script.ARMS[k] for k in ('plain', '+ C', 'all + LSUV')})
    assert run('--claims', 'tweaks', '--seeds', '0')[2:] == [('tweaks', 'all + LSUV', '0')]
    assert run('--claims', 'tweaks', '--seeds', '0') == run('--claims', 'tweaks', '--seeds', '0', '--most', '5')
    with pytest.raises(SystemExit, match='run --claims tweaks'): run('--claims', 'final', '--seeds', '7')
    rows = [*csv.DictReader(l for l in open(out) if l[0] != '#')]
    assert {r['measured_on'] for r in rows} == {'held-out training pictures'} and int(rows[0]['n_valid']) == 160
    assert run('--claims', 'final', '--seeds', '0', '--most', '1')[3][:2] == ('final', 'plain')
    assert [*csv.DictReader(l for l in open(out) if l[0] != '#')][3]['n_valid'] == '300'
