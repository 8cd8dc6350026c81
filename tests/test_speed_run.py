"""Muon by Gram matrices: the same as 09i's, which is compared with torch's; in bfloat16, near it."""
import pytest
import torch
from torch import nn

from exp import recipes as R
from exp.optimizers import adam_opt
from exp.since_2019 import muon, newton_schulz
from exp.speed_run import fast_muon, gram_newton_schulz


@pytest.mark.parametrize('shape', [(8, 72), (72, 8), (5, 5), (1, 9), (9, 1)])
@pytest.mark.parametrize('steps', [1, 2, 3, 5])
def test_the_same_matrix(shape, steps):
    g = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(steps))
    x = gram_newton_schulz(g, steps)
    assert x.dtype == g.dtype and torch.allclose(x, newton_schulz(g, steps), atol=1e-12)
    low = gram_newton_schulz(g.float(), steps, torch.bfloat16)
    assert low.dtype == torch.float32 and (low - x).norm() < .2*x.norm()


def test_no_gradient_no_update():
    assert gram_newton_schulz(torch.zeros(3, 4)).equal(torch.zeros(3, 4))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()


def trained(opt, model, n=10):
    g = torch.Generator().manual_seed(1)
    for _ in range(n):
        model(torch.randn(6, 3, 9, 9, dtype=torch.float64, generator=g)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return [p.detach() for p in model.parameters()]


def test_convolutions_as_09i_and_all_else_as_adam():
    a, b, c = net(), net(), net()
    ours = trained(fast_muon(a.parameters(), lr=.01, times=1., steps=5, wd=.1), a, 1)
    theirs = trained(muon(b.parameters(), lr=.01, adjust_lr_fn='original', wd=.1), b, 1)
    adam = trained(adam_opt()(c.parameters(), lr=.01, wd=.1), c, 1)
    for p, q, r in zip(ours, theirs, adam): assert torch.allclose(p, q if p.ndim == 4 else r, atol=1e-12)
    a = net()
    assert all(p.isfinite().all() for p in trained(fast_muon(a.parameters(), lr=.01, half=True), a))


@pytest.mark.parametrize('native, bf16, half', [(torch.bfloat16, None, True), (torch.bfloat16, False, False), (None, None, False), (torch.float16, None, False)])
def test_products_in_bfloat16_where_the_device_computes_in_it(monkeypatch, native, bf16, half):
    monkeypatch.setattr(R, 'native_dtype', lambda device: (native, ''))
    opt = R.as_page({**R.get_recipe('cpu', opt='muon'), 'bf16': bf16}, 0, 'cpu').opt(net().parameters(), lr=.1)
    assert opt.hypers[0]['half'] == half
