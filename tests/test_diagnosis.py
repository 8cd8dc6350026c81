"""09g's tools, each on faults that were planted for it, and on none."""
import math

import pytest
import torch
import torch.nn.functional as F
from test_looking import Noise, everything, learner, net, toy
from torch import nn

from exp.callbacks import Callback, DataBunch, Runner
from exp.diagnosis import CheckActivations, CheckGrads, WhichLayer, mixed_items, overfit_batch
from exp.learner import Learner

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 10, generator=G), torch.randint(0, 3, (64,), generator=G)


def on(model, *cbs, x=X, loss=F.cross_entropy, valid=None): return Learner(model, DataBunch([(x, Y)]*3, valid), loss, lr=.1, cbs=list(cbs))


class Apply(nn.Module):
    "A layer that does `f`, and may have another inside."
    def __init__(self, f, inner=None): super().__init__(); self.f, self.inner = f, inner
    def forward(self, x): return self.f(x if self.inner is None else self.inner(x))


class Dict(nn.Module):
    def __init__(self): super().__init__(); self.l = nn.Linear(9, 3)
    def forward(self, b): return self.l(b['x'])


def boom(x): raise KeyError('boom')
def no_memory(x): raise torch.OutOfMemoryError('out of memory')


# which layer

@pytest.mark.parametrize('model, x, words', [
    (nn.Sequential(nn.Linear(10, 8), nn.Sequential(nn.ReLU(), nn.Linear(9, 3))), X, ['1.1', 'Linear', '(64, 8)', 'float32']), (nn.Linear(9, 3), X, ['Linear', '(64, 10)']),
    (nn.Sequential(nn.Linear(10, 8), Apply(boom)), X, ['1', 'Apply', '(64, 8)', 'boom']), (nn.Sequential(Apply(boom, nn.Linear(10, 8))), X, ['0', 'Apply', '(64, 10)']),
    (nn.Sequential(nn.Embedding(5, 3)), torch.full((64,), 9), ['0', 'Embedding', 'int64 (64,)']), (Dict(), {'x': X}, ['l', 'Linear', '(64, 10)']),
    (nn.Sequential(Apply(lambda b: b, None), Dict()), {'x': X}, ['1.l', '(64, 10)'])], ids=range(7))
def test_the_layer_that_failed_is_named_with_what_it_was_given(model, x, words):
    with pytest.raises(RuntimeError) as e: on(model, WhichLayer(), x=x).fit(1)
    assert all(w in str(e.value) for w in words) and e.value.__cause__ is not None


def test_in_validation_and_in_later_batches():
    model = nn.Sequential(nn.Linear(10, 3))
    with pytest.raises(RuntimeError, match=r'batch 2 .*layer 0'): Learner(model, DataBunch([(X, Y), (X, Y), (X[:, :5], Y)], None), F.cross_entropy, cbs=WhichLayer()).fit(1)
    with pytest.raises(RuntimeError, match='layer 0'): on(model, WhichLayer(), valid=[(X[:, :5], Y)]).fit(1)


def test_memory_that_runs_out_stays_what_it_is():
    with pytest.raises(torch.OutOfMemoryError, match=r'layer 1 \(Apply\).*\(64, 3\)'): on(nn.Sequential(nn.Linear(10, 3), Apply(no_memory)), WhichLayer()).fit(1)


def test_what_is_not_the_models_passes():
    def loss(pred, yb): return nn.Linear(7, 1)(pred)                                    # a module, and not one of the model
    with pytest.raises(RuntimeError) as e: on(net(), WhichLayer(), loss=loss).fit(1)
    assert 'layer' not in str(e.value)
    class Fails(Callback):
        def after_step(self, run): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): on(net(), WhichLayer(), Fails()).fit(1)
    assert on(net(), WhichLayer()).fit(1).n_iter == 3


# the first number that is none

class Poison(Callback):
    "Writes `value` into the weights of layer `i` before batch 1."
    def __init__(self, i, value): self.i, self.value = i, value
    def begin_batch(self, run):
        if run.iter == 1: run.model[self.i].weight.data[0, 0] = self.value


@pytest.mark.parametrize('i, value, word', [(0, math.nan, 'NaN'), (0, math.inf, 'infinite'), (2, math.nan, 'NaN'), (2, -math.inf, '(NaN|infinite)')])
def test_the_layer_where_it_began(i, value, word):
    learn = on(net(), Poison(i, value), check := CheckActivations(), x=X.abs() + 1)
    with pytest.raises(FloatingPointError, match=rf'output of {i} \(Linear\) is {word} in batch 1 of epoch 0$'): learn.fit(1)
    assert not any(m._forward_hooks for m in learn.model.modules()) and check in learn.cbs and learn.n_iter == 1


def test_inputs_that_are_none_are_told():
    x = X.clone()
    x[5, 5] = math.nan
    with pytest.raises(FloatingPointError, match=r'output of 0 .*NaN.*inputs'): on(net(), CheckActivations(), x=x).fit(1)


@pytest.mark.parametrize('layers, name, word', [
    ([nn.Linear(10, 8), Apply(lambda x: (x*0).sqrt() + x), nn.Linear(8, 3)], '0.bias', 'NaN'), ([nn.Linear(10, 8), nn.Linear(8, 3), Apply(lambda x: x + (x*0).sqrt())], '1.bias', 'NaN'),
    ([nn.Linear(10, 8), nn.Linear(8, 3, bias=False), Apply(lambda x: x + (x - x.detach()).sqrt())], '1.weight', '(infinite|NaN)')], ids=range(3))
@pytest.mark.parametrize('kind', ['Learner', 'Runner'])
def test_the_gradient_where_it_began(layers, name, word, kind):
    model = nn.Sequential(*layers)
    with pytest.raises(FloatingPointError, match=rf'gradient of {name} is {word} in batch 0 of epoch 0'):
        if kind == 'Learner': on(model, CheckGrads(), CheckActivations()).fit(1)
        else: Runner(model, DataBunch([(X, Y)], [(X, Y)]), F.cross_entropy, torch.optim.SGD(model.parameters(), .1), [CheckGrads()]).fit(1)


def test_a_sound_training_is_the_same_with_all_of_them():
    a, b = (learner(*cbs, norm=True).fit(2) for cbs in ([], [CheckGrads(), CheckActivations(), WhichLayer()]))
    assert all(p.equal(q) for p, q in zip(a.model.parameters(), b.model.parameters()))
    frozen = learner(CheckGrads())
    for p in frozen.model.parameters(): p.requires_grad_(False)
    frozen.model[0].weight.requires_grad_(True)
    frozen.fit(1)


# one batch by heart

def test_one_batch_by_heart_against_a_bare_loop():
    learn, model = learner(lr=.5), net()
    state = learn.data.train_dl.generator.get_state()
    x, y = next(iter(learn.data.train_dl))
    learn.data.train_dl.generator.set_state(state)
    opt, want = torch.optim.SGD(model.parameters(), lr=.5), []
    for _ in range(30):
        loss = F.cross_entropy(model(x), y)
        want.append(loss.item())
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert overfit_batch(learn, 30) == pytest.approx(want, abs=1e-6)
    assert overfit_batch(learner(lr=1e-9), 30, lr=.5) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize('fitted', [False, True])
def test_nothing_is_changed(fitted):
    from test_looking import table
    from functools import partial
    learn = learner(table(), Noise(), norm=True, opt=partial(torch.optim.SGD, momentum=.9))
    if fitted: learn.fit(1)
    for f in (overfit_batch, mixed_items):
        before = everything(learn)
        f(learn)
        assert everything(learn) == before and (learn.data.train_dl, learn.lr) == (learn.data.train_dl, .1)


def test_callbacks_that_shape_a_batch_are_at_work():
    class Blind(Callback):
        def begin_batch(self, run): run.xb = torch.zeros_like(run.xb)
    seeing, blind = overfit_batch(learner(lr=.5), 200), overfit_batch(learner(Blind(), lr=.5), 200)
    assert seeing[-1] < .1*seeing[0] and blind[-1] > .8


def test_a_fit_begins_and_ends_once():
    class Opens(Callback):
        opened = 0
        def begin_fit(self, run): self.opened += 1
        def after_fit(self, run): said.append(self.opened)
    said = []
    overfit_batch(learner(Opens()), 3)
    assert said == [1]


# items that see each other

BN = nn.BatchNorm1d(10, track_running_stats=False)


@pytest.mark.parametrize('layer, mixed', [
    (nn.Identity(), []), (nn.Dropout(.5), []), (nn.BatchNorm1d(10), []), (nn.LayerNorm(10), []), (Apply(lambda x: x - x.mean(0)), range(40)), (BN, range(40)),
    (Apply(lambda x: x + x.roll(1, 0)), [-1]), (Apply(lambda x: x.view(10, -1).t()), range(0, 40)), (Apply(lambda x: x.flip(0)), [39])], ids=range(9))
@pytest.mark.parametrize('item', [0, 3])
def test_items_that_see_each_other(layer, mixed, item):
    got = mixed_items(learner_of(nn.Sequential(layer, net())), item)
    if mixed == [-1]: assert got == [(item - 1) % 40]
    elif mixed == [39]: assert got == [39 - item]
    elif isinstance(layer, Apply) and mixed and len(got) < 39: assert got and all(0 <= i < 40 and i != item for i in got)      # a view: some of them
    else: assert got == [i for i in mixed if i != item]


def learner_of(model): return Learner(model, toy(), F.cross_entropy, lr=.1)
