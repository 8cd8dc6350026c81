"""The search for a rate, beside a bare loop; and what it must leave alone: snapshots, dice, loaders in their own order."""
import io
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, SequentialSampler, Subset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from exp.callbacks import AvgStatsCallback, CancelFitException, DataBunch, Dataset, Recorder, Runner, get_dls
from exp.data_block import ItemList
from exp.fast_batches import ItemLoader
from exp.lr_find import (LR_Find, generator_state, in_order, load_loader_state, loader_state, own_generators, rng_state, set_generator_state, set_rng_state,
                         set_seed, snapshot)
from exp.optimizers import adam_opt, sgd_mom_opt, sgd_opt

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(120, 10, generator=G), torch.randint(0, 3, (120,), generator=G)
SIX = [(X[i:i+20], Y[i:i+20]) for i in range(0, 120, 20)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(.2), nn.Linear(20, 3))


def halves(m): return [[*m[0].parameters(), *m[1].parameters()], [*m[4].parameters()]]


# the search

@pytest.mark.parametrize('opt_func', [torch.optim.SGD, partial(torch.optim.SGD, momentum=.9), sgd_mom_opt, adam_opt()], ids=['SGD', 'momentum', 'ours', 'our adam'])
def test_rates_and_losses_are_those_of_a_bare_loop(opt_func):
    "Two groups whose rates are as 1 to 4, throughout; twenty batches of a loader of six; no validation."
    lrs, want = np.geomspace(1e-3, 1., 20).tolist(), []
    def groups(m): return [{'params': ps, 'lr': lr} for ps, lr in zip(halves(m), (.01, .04))]
    model = net()
    run = Runner(model, DataBunch(SIX, SIX), F.cross_entropy, opt_func(groups(model), lr=.1), [find := LR_Find(20, 1e-3, 1.), seen := Recorder(), table := AvgStatsCallback(silent=True)])
    torch.manual_seed(1)
    run.fit(99)
    model = net()
    opts = [opt_func(ps, lr=1.) for ps in halves(model)]
    torch.manual_seed(1)
    for lr, (x, y) in zip(lrs, SIX*4):
        for o, share in zip(opts, (.25, 1.)): (getattr(o, 'hypers', None) or o.param_groups)[0]['lr'] = lr*share
        loss = F.cross_entropy(model(x), y)
        want.append(loss.item())
        loss.backward()
        for o in opts: o.step(); o.zero_grad()
    assert find.lrs == pytest.approx(lrs) and seen.hypers['lr'] == pytest.approx(lrs) and find.losses == pytest.approx(want, rel=1e-4)
    assert len(table.rows) == 3 and all(r['valid_loss'] != r['valid_loss'] for r in table.rows) and run.n_iter == 20


@pytest.mark.parametrize('losses, end', [([2., 1., 3.9, 4.1], 3), ([2., 1., 3.9, 3.9], None), ([2., float('nan')], 1), ([2., float('inf')], 1), ([float('nan')], 0), ([-1., -3., 5.9, 6.1], 3), ([0., .1], 1), ([0., 0.], None)], ids=str)
def test_where_the_search_ends(losses, end):
    find, ended = LR_Find(50), None
    run = Runner(nn.Linear(1, 1), None, None, sgd_opt([nn.Parameter(torch.ones(1))], lr=.1))
    find.begin_fit(run)
    run.in_train = True
    for i, l in enumerate(losses):
        run.loss = torch.tensor(l)
        try: find.after_loss(run)
        except CancelFitException: ended = i; break
    assert ended == end


def finder(losses):
    f = LR_Find()
    f.lrs, f.losses = [1e-6*2**i for i in range(len(losses))], losses
    return f


def test_suggestion_and_curve():
    f = finder([4., 3., 3., 2., 2., 1., 1., 1., .5, 1., 3., 9.])
    w = [[.8**(i - j) if j <= i else 0. for j in range(12)] for i in range(12)]                # the mean so far, the last one counting most
    mean = [sum(a*b for a, b in zip(r, f.losses))/sum(r) for r in w]
    assert f.smooth() == pytest.approx(mean) and f.suggestion == f.lrs[int(np.argmin(mean))]/4 and f'{f.suggestion:.2g}' in f.plot().get_title()
    assert f.smooth(0.) == pytest.approx(f.losses)
    for bad in ([1. + i for i in range(12)], [8. - i for i in range(8)], [float('nan')]*12, []):
        with pytest.raises(ValueError): print(finder(bad).suggestion)
        finder(bad).plot()
    assert finder([12. - i for i in range(11)] + [float('nan')]).suggestion == 1e-6*2**10/4    # the one that ended it


# snapshots

class Holder:
    "Something with a state of its own, as callbacks have it."
    def __init__(self):
        self.n, self.gone, self.dice, self.np = 1, 'here', torch.Generator().manual_seed(5), np.random.default_rng(5)
        self.mean, self.deep, self.wide = torch.zeros(3), {'all': [torch.zeros(3), {'m': torch.ones(2)}], 'rows': [{'a': 1}]}, torch.zeros(1).expand(4)
        self.stats = AvgStatsCallback(Count(), silent=True).stats[False]
        self.itself = [self.deep]
        self.itself.append(self.itself)
    def change(self):
        self.n, self.new = 2, 'new'
        del self.gone
        torch.rand(1, generator=self.dice), self.np.random()
        for t in (self.mean, self.deep['all'][0], self.deep['all'][1]['m']): t.add_(1)
        self.deep['rows'][0]['a'] = 2
        self.deep['rows'].append({})
        self.deep['all'][1]['more'] = self.deep.pop('rows')
        self.mean = torch.full((3,), 9.)
        self.stats.accumulate(type('run', (), dict(xb=X[:4], yb=Y[:4], pred=X[:4, :3], loss=torch.ones(()))))
    def state(self):
        s = self.stats
        return [self.n, self.gone, hasattr(self, 'new'), self.dice.get_state().tolist(), self.np.bit_generator.state['state'], self.mean.tolist(), s.count, s.totals, s.objects[0].n,
                {k: str(v) for k, v in self.deep.items()}, id(self.mean), id(self.deep), id(self.deep['all'][0]), id(self.deep['rows']), len(self.itself)]


class Count:
    "A metric that is an object."
    def reset(self): self.n, self.each = 0, []
    def update(self, pred, yb): self.n += len(yb); self.each.append(len(yb))
    def compute(self): return self.n


class Order(Sampler):
    def __init__(self, dice): self.generator = dice
    def __len__(self): return 60
    def __iter__(self): return iter(torch.randperm(60, generator=self.generator).tolist() if isinstance(self.generator, torch.Generator) else self.generator.permutation(60).tolist())


class Noisy(TensorDataset):
    def __init__(self, *ts): super().__init__(*ts); self.g, self.n = torch.Generator().manual_seed(1), np.random.default_rng(1)
    def __getitem__(self, i): x, y = super().__getitem__(i); return x + torch.randn(10, generator=self.g) + float(self.n.random()), y


LOADERS = {'its generator': lambda: get_dls(Dataset(X, Y), Dataset(X, Y), 20, seed=3)[0], 'global': lambda: DataLoader(TensorDataset(X, Y), 20, shuffle=True),
           'items': lambda: ItemLoader(Dataset(X, Y), 20, shuffle=True, seed=3), "a sampler's": lambda: DataLoader(TensorDataset(X, Y), 20, sampler=Order(torch.Generator().manual_seed(2))),
           "numpy's": lambda: DataLoader(TensorDataset(X, Y), 20, sampler=Order(np.random.default_rng(3))),
           "a batch sampler's": lambda: DataLoader(TensorDataset(X, Y), batch_sampler=BatchSampler(Order(np.random.default_rng(3)), 8, True)),
           "a data set's": lambda: DataLoader(Noisy(X, Y), 20), "a subset's": lambda: DataLoader(Subset(Noisy(X, Y), range(50)), 20)}


def batches(dl): return [(x.clone(), y.clone()) for x, y in dl]
def same(a, b): return all(x.equal(u) and y.equal(v) for (x, y), (u, v) in zip(a, b, strict=True))


@pytest.mark.parametrize('kind', LOADERS)
def test_a_loader_goes_on_as_if_nobody_had_looked(kind):
    torch.manual_seed(0)
    dl = LOADERS[kind]()
    batches(dl)
    back = snapshot(nn.Linear(1, 1), loaders=[dl])
    coming = batches(dl)
    next(iter(dl))
    back()
    assert same(batches(dl), coming)
    back()                                                                     # as often as one likes
    assert same(batches(dl), coming) and (kind == 'global' or not same(batches(dl), coming) or kind == 'items')


def digest(m, opt):
    out = [t.tolist() for t in m.state_dict().values()] + [[x.training for x in m.modules()], [p.requires_grad for p in m.parameters()]]
    out += [None if p.grad is None else p.grad.tolist() for p in m.parameters()]
    h = getattr(opt, 'hypers', None) or [{k: v for k, v in g.items() if k != 'params'} for g in opt.param_groups]
    return str([out, h, [{k: v.tolist() if torch.is_tensor(v) else v for k, v in opt.state[p].items()} for p in m.parameters() if p in opt.state]])


def step(m, opt, zero=True):
    F.cross_entropy(m.train()(X), Y).backward()
    opt.step()
    if zero: opt.zero_grad()


@pytest.mark.parametrize('opt_func', [torch.optim.SGD, partial(torch.optim.SGD, momentum=.9), torch.optim.AdamW, sgd_opt, sgd_mom_opt, adam_opt()], ids=['SGD', 'momentum', 'AdamW', 'ours', 'our momentum', 'our adam'])
@pytest.mark.parametrize('state', ['new', 'stepped', 'with gradients', 'evaluating'])
def test_model_and_optimizer_come_back(opt_func, state):
    m = net()
    opt = opt_func(m.parameters(), lr=.1)
    if state != 'new': step(m, opt, state != 'with gradients')
    m.train(state != 'evaluating')
    held, grads, averages = [*m.state_dict().values()], [p.grad for p in m.parameters()], [v for s in opt.state.values() for v in s.values() if torch.is_tensor(v)]
    before, back = digest(m, opt), snapshot(m, opt)
    for h in getattr(opt, 'hypers', None) or opt.param_groups: h['lr'] = 7.
    step(m, opt)
    step(m, opt, False)
    m[4].eval()
    back()
    assert digest(m, opt) == before
    assert all(a is b for a, b in zip([p.grad for p in m.parameters()], grads)) and all(t.data_ptr() == h.data_ptr() for t, h in zip(m.state_dict().values(), held))
    assert all(a is b for a, b in zip([v for s in opt.state.values() for v in s.values() if torch.is_tensor(v)], averages, strict=True))


def test_what_objects_hold_comes_back_also_inside_lists():
    o = Holder()
    before, back = o.state(), snapshot(nn.Linear(1, 1), objects=[o])
    o.change()
    back()
    assert o.state() == before
    o.change()                                                                 # and goes on working
    assert o.n == 2 and o.stats.count == 4


def test_a_look_without_steps_copies_no_weights():
    m = net()
    opt = torch.optim.SGD(m.parameters(), lr=.1)
    back, w, mean = snapshot(m, opt, tensors=False), m[0].weight.detach().clone(), m[1].running_mean.clone()
    with torch.no_grad(): m[0].weight.add_(1)
    m.train()(X)
    back()
    assert m[0].weight.equal(w + 1) and m[1].running_mean.equal(mean)


# dice

def draws(): return torch.rand(1).item(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()


def saved(o):
    "Through a file that may hold nothing but plain types."
    torch.save(o, f := io.BytesIO())
    f.seek(0)
    return torch.load(f, weights_only=True)


def test_set_seed_and_the_state_of_all_dice():
    set_seed(7)
    a = draws()
    s = saved(rng_state())                                                     # gauss keeps its second number for the next call
    b = draws()
    set_rng_state(s)
    assert draws() == b
    set_seed(7)
    assert draws() == a != b
    set_seed(2**40 + 7)
    assert draws() != a
    try:
        set_seed(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally: torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('g', [torch.Generator(), *(np.random.Generator(k(3)) for k in (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64))], ids=lambda g: type(getattr(g, 'bit_generator', g)).__name__)
def test_generators_of_ones_own(g):
    def draw(): return torch.rand(3, generator=g).tolist() if isinstance(g, torch.Generator) else [g.random(), int(g.integers(9)), g.normal()]
    draw()
    s = saved(generator_state(g))
    want = draw()
    set_generator_state(g, s)
    assert draw() == want
    class Has: pass
    a, b = Has(), Has()
    a.x, b.y, a.z = g, g, 3
    assert own_generators(a, b) == [g]


@pytest.mark.parametrize('make', [*LOADERS.values(), lambda: DataLoader(TensorDataset(X, Y), 20, sampler=DistributedSampler(TensorDataset(X, Y), 2, 0, seed=5))], ids=[*LOADERS, 'distributed'])
def test_the_place_of_a_loader_goes_through_a_file_to_a_fresh_one(make):
    dl = make()
    batches(dl)
    if hasattr(dl.sampler, 'set_epoch'): dl.sampler.set_epoch(3)
    s, at = saved(loader_state(dl)), torch.get_rng_state()
    coming = batches(dl)
    load_loader_state(fresh := make(), s)
    torch.set_rng_state(at)
    assert same(batches(fresh), coming)


# loaders in their own order

TEN = TensorDataset(torch.arange(10.)[:, None], torch.arange(10))
PAIRS = TensorDataset(torch.arange(10.).view(5, 2, 1), torch.arange(10).view(5, 2))


class Some(Sampler):
    def __init__(self, idxs): self.idxs = idxs
    def __iter__(self): return iter(self.idxs)
    def __len__(self): return len(self.idxs)


@pytest.mark.parametrize('make, want, bs', [
    (lambda: DataLoader(TEN, 4), range(10), 4), (lambda: DataLoader(TEN, 4, drop_last=True), range(10), 4), (lambda: DataLoader(TEN, 4, shuffle=True), range(10), 4),
    (lambda: DataLoader(TEN, 4, shuffle=True, drop_last=True), range(10), 4), (lambda: DataLoader(TEN, 2, sampler=Some([9, 6, 7])), [6, 7, 9], 2),
    (lambda: DataLoader(TEN, 3, sampler=SubsetRandomSampler(torch.tensor([8, 2]))), [2, 8], 2), (lambda: DataLoader(TEN, 3, sampler=WeightedRandomSampler([1.]*10, 7)), range(10), 3),
    (lambda: DataLoader(TEN, batch_sampler=BatchSampler(RandomSampler(TEN), 4, True)), range(10), 4), (lambda: DataLoader(TEN, batch_sampler=BatchSampler(SequentialSampler(TEN), 4, True)), range(10), 4),
    (lambda: DataLoader(TEN, batch_sampler=BatchSampler(Some([5, 1, 3]), 2, False)), [1, 3, 5], 2), (lambda: DataLoader(TEN, batch_sampler=[[4, 0], [2]]), [0, 2, 4], 3),
    (lambda: DataLoader(TEN, batch_sampler=Some(torch.tensor([9, 8, 7, 6]).split(2))), [6, 7, 8, 9], 4), (lambda: DataLoader(PAIRS, None), range(10), 2),
    (lambda: DataLoader(PAIRS, None, shuffle=True), range(10), 2), (lambda: DataLoader(PAIRS, None, sampler=Some([3, 1])), [2, 3, 6, 7], 2),
    (lambda: ItemLoader(Dataset(*TEN.tensors), 4, shuffle=True, seed=0, drop_last=True), range(10), 4), (lambda: [TEN[5:7], TEN[:2]], [5, 6, 0, 1], 2)], ids=map(str, range(17)))
def test_whatever_the_sampler_its_items_once_in_order(make, want, bs):
    dl = make()
    got = [*in_order(dl)]
    assert torch.cat([xb for xb, _ in got]).flatten().tolist() == list(want) == torch.cat([yb for _, yb in got]).tolist() and len(got[0][0]) == bs


def test_in_order_keeps_collate_and_workers():
    def twice(items): return torch.stack([x for x, _ in items])*2
    assert torch.cat([*in_order(DataLoader(TEN, 4, shuffle=True, collate_fn=twice))]).flatten().tolist() == [2*i for i in range(10)]
    for dl in (DataLoader(TEN, 2, shuffle=True, num_workers=2), ItemLoader(ItemList([torch.zeros(2)]*4), 2, shuffle=True, num_workers=2)): assert in_order(dl).num_workers == 2
