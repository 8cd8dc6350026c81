"""The training loop, schedules, hooks and norms of 04–07, beside torch's own and under faults."""
import copy
import inspect
import math
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from event_log import Log
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler
from toys import At, Takes, X, Y, batches, raises, rows, stats, toy

from exp.annealing import ParamScheduler, annealer, combine_scheds, cos_1cycle_anneal, sched_cos, sched_exp, sched_lin
from exp.batchnorm import BatchNorm, RunningBatchNorm, conv_layer
from exp.callbacks import (EVENTS, NO_PASS, AvgStatsCallback, BatchTransformXCallback, CancelBatchException, CancelEpochException, CancelFitException,
                           CudaCallback, DataBunch, Dataset, Recorder, Runner, accuracy, batch_len, binary_accuracy, get_dls, get_hypers, get_runner, metric_name)
from exp.convnets import Hook, Hooks, Lambda, append_stats, get_cnn_model, init_cnn, plot_hists, plot_stats
from exp.minibatch import AvgStats, option


def runner(*cbs, data=None, lr=.1, loss=F.cross_entropy, wrap=lambda model: model):
    torch.manual_seed(0)
    model = wrap(nn.Linear(10, 3))
    return Runner(model, data or toy(), loss, torch.optim.SGD(model.parameters(), lr=lr), cbs)


# the loop

def test_events_come_in_the_order_of_the_table():
    runner(log := Log(), data=DataBunch(batches(40, 40), batches(40, 40))).fit(1)
    assert log.seen == ['begin_fit', 'begin_epoch', 'begin_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step', 'after_batch',
                        'begin_validate', 'begin_batch', 'after_pred', 'after_loss', 'after_batch', 'after_epoch', 'after_fit'] and {*log.seen} < {*EVENTS}


@pytest.mark.parametrize('error, after, then, n', [(CancelBatchException, 'after_cancel_batch', 'begin_batch', 7), (CancelEpochException, 'after_cancel_epoch', 'begin_validate', 5),
                                                   (CancelFitException, 'after_cancel_fit', 'after_fit', 1)])
def test_cancelling_ends_what_it_says_and_no_more(error, after, then, n):
    "And a gradient that was cancelled is in no later step."
    def right(run):
        want = torch.autograd.grad(F.cross_entropy(run.model(run.xb), run.yb), list(run.model.parameters()))
        assert all(torch.allclose(p.grad, g) for p, g in zip(run.model.parameters(), want))
    run = runner(log := Log('after_backward', error, nth=2), rec := Recorder(), At('after_backward', right, -1)).fit(2)
    seen, i = log.seen, log.seen.index(after)
    assert seen[i-1:i+2] == ['after_backward', after, then] and seen.count(after) == seen.count('after_fit') == 1 and seen[-1] == 'after_fit'
    assert len(rec.losses) == run.n_iter == n and ('after_epoch' in seen) == (n > 1)


def test_an_error_in_a_callback_still_ends_the_fit_cleanly():
    run = runner(log := Log('after_backward', ZeroDivisionError))
    with pytest.raises(ZeroDivisionError): run.fit(1)
    assert log.seen[-1] == 'after_fit' and 'after_error' not in log.seen and all(p.grad is None for p in run.model.parameters())
    run.fit(1)                                                       # and the runner is still good for another
    assert log.seen.count('after_epoch') == 1
    with pytest.raises(ValueError): run.fit(-1)


def test_order_of_callbacks_is_order_then_as_listed():
    calls = []
    runner(*(At('begin_fit', lambda run, n=n: calls.append(n), order) for n, order in (('c', 5), ('a', -1), ('b', 0), ('b2', 0)))).fit(0)
    assert calls == ['a', 'b', 'b2', 'c']


@pytest.mark.parametrize('wrong, right', [('after_bacth', 'after_batch'), ('before_fit', 'begin_fit'), ('after_eror', 'after_error')])
def test_what_is_no_event_or_no_callback_is_found_at_once(wrong, right):
    with pytest.raises(AttributeError, match=f'{wrong}.* {right}'): runner(At(wrong, print))
    with pytest.raises(TypeError, match='Recorder'): runner(Recorder)
    runner(At('before_std', 3)).fit(0)                               # what a callback keeps is no misspelt event


def test_device_transforms_and_any_optimizer():
    "Two places, `meta` being one without numbers; the transform comes when the batch is there."
    for place, tfm in (('cpu', lambda x: x*2), ('meta', lambda x: x)):
        seen, data = [], DataBunch(batches(50), [])
        cbs = [BatchTransformXCallback(lambda x, tfm=tfm: [x[1], tfm(x[0])]), At('begin_batch', lambda run: setattr(run, 'xb', [run.xb, {'a': run.yb}]), -11), CudaCallback(place),
               At('begin_batch', lambda run, to=seen: to.append((run.xb[1], run.xb[0]['a'], run.yb, run.model.weight)), 9), At('begin_batch', raises(CancelBatchException), 10)]
        opt = get_runner(nn.Linear(10, 3), data, .01, cbs, partial(torch.optim.AdamW, weight_decay=.1)).fit(1).opt
        assert isinstance(opt, torch.optim.AdamW) and [get_hypers(opt)[0][k] for k in ('weight_decay', 'lr')] == [.1, .01]
        assert len(seen) == 2 and {t.device.type for ts in seen for t in ts} == {place} and (place == 'meta' or seen[0][0].equal(X[:50]*2))
    assert CudaCallback().device.type == ('cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu')


# schedules

def test_one_cycle_is_torchs_onecycle():
    "`torch.optim.lr_scheduler.OneCycleLR` (two cosine phases) steps through the same rates."
    n, opt = 50, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    theirs = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=.6, total_steps=n, pct_start=.3, div_factor=3, final_div_factor=4, cycle_momentum=False)
    up, last = .3*n - 1, n - 1                                       # torch's phases end on a step
    ours = combine_scheds([up/last, 1 - up/last], cos_1cycle_anneal(.2, .6, .05))
    for i in range(n):
        assert abs(ours(i/last) - opt.param_groups[0]['lr']) < 1e-9
        opt.step()
        if i < n - 1: theirs.step()


@given(st.lists(st.floats(.01, 1), min_size=1, max_size=6), st.floats(0, 1))
def test_combined_schedules_pass_through_their_ends(shares, pos):
    pcts = [s/sum(shares) for s in shares]
    sched = combine_scheds(pcts, [sched_lin(i, i+1) for i in range(len(pcts))])
    assert 0 <= sched(pos) <= len(pcts) and abs(sched(1) - len(pcts)) < 1e-9 and sched(0) == 0
    assert pickle.loads(pickle.dumps(sched))(pos) == sched(pos)


def test_a_piece_begins_at_its_own_nought():
    "0.3 + 0.7 − 0.7 is less than 0.3: the second piece got a negative position, of which a root is complex."
    @annealer
    def root(start, end, pos): return start + (end - start)*pos**.5
    for first in (.1, .2, .3, .4, .6, .7): assert combine_scheds([first, 1 - first], [sched_lin(0, 1), root(1, 2)])(first) == 1


def test_shapes_of_ones_own():
    def power(n, name):
        def shape(start, end, pos): return start + (end - start)*pos**n
        shape.__name__ = name
        return annealer(shape)
    square, cosine = power(2, 'shape')(0, 1), sched_cos(0, 1)
    power(3, 'shape'); power(3, 'sched_cos')                         # made later, of the same name: they change no other
    assert square(.5) == .25 and cosine(.5) == .5 and sched_exp(1, 100)(.5) == pytest.approx(10)
    for shape in (sched_lin, power(2, 'mine')): assert list(inspect.signature(shape).parameters) == ['start', 'end'] and callable(shape(0, 1))
    assert pickle.loads(pickle.dumps(sched_lin)) is sched_lin and sched_lin.__doc__


@pytest.mark.parametrize('error', [None, CancelFitException, CancelEpochException, ZeroDivisionError, KeyboardInterrupt])
def test_scheduler_sets_each_group_and_puts_back_what_it_found(error):
    run, seen = runner(), []
    run.opt = torch.optim.SGD([{'params': [run.model.weight], 'lr': 3.}, {'params': [run.model.bias], 'lr': 5.}], lr=.1)
    def see(run):
        if run.in_train: seen.append([h['lr'] for h in get_hypers(run.opt)])
    sched = ParamScheduler('lr', [sched_lin(0, 1), sched_lin(1, 0)])
    for _ in range(2):                                               # the second fit begins from what the first put back
        run.cbs, seen[:] = [sched, At('after_batch', see), *([Log('after_step', error, 3)] if error else [])], []
        try: run.fit(1)
        except (ZeroDivisionError, KeyboardInterrupt): assert error in (ZeroDivisionError, KeyboardInterrupt)
        assert seen == [[0, 1], [.25, .75], [.5, .5], [.75, .25]][:2 if error else 4] and [g['lr'] for g in run.opt.param_groups] == [3., 5.]
    run.opt.param_groups[0]['lr'], run.cbs = 4., [Log('begin_fit', ZeroDivisionError), sched]
    with pytest.raises(ZeroDivisionError): run.fit(1)                # before it has begun
    assert run.opt.param_groups[0]['lr'] == 4.


def test_schedules_that_do_not_fit():
    with pytest.raises(ValueError, match="'momentun'.*momentum"): runner(ParamScheduler('momentun', sched_lin(0, 1))).fit(1)
    with pytest.raises(ValueError, match='2 .* 1'): runner(ParamScheduler('lr', [sched_lin(0, 1)]*2)).fit(1)


# hooks, initialisation, norms

def test_hooks_are_gone_after_an_error_and_see_training_only():
    net = get_cnn_model(DataBunch(None, None, 1, 10), [8])
    with pytest.raises(RuntimeError), Hooks(net, append_stats): net(torch.randn(2, 3, 8, 8))
    assert not any(m._forward_hooks for m in net.modules())
    with Hook(net[0], append_stats) as h:
        net.eval()(torch.randn(2, 1, 8, 8))
        assert not hasattr(h, 'stats')
        net.train()(torch.randn(2, 1, 8, 8))
    assert [len(s) for s in h.stats] == [1, 1, 1]


@pytest.mark.parametrize('kw', [{}, dict(bins=80), dict(lo=-1., hi=1.), dict(lo=0., hi=4., bins=16)], ids=str)
def test_the_share_near_zero_is_that_of_the_numbers(kw):
    out, m = torch.cat([torch.full((300,), .01), torch.full((500,), .9)]), nn.Identity().train()
    with Hook(m, partial(append_stats, **kw)) as h: m(out)
    assert plot_stats([h]).axes[2].lines[0].get_ydata()[0] == pytest.approx(3/8)
    assert tuple(plot_hists([h]).axes[0].images[0].get_extent()[2:]) == (kw.get('lo', -2.), kw.get('hi', 8.))
    with pytest.raises(ValueError, match='no batch'): plot_stats([Hook(m, append_stats)])


@pytest.mark.parametrize('leak', [0., .1])
def test_kaiming_keeps_the_variance_through_twenty_layers(leak):
    torch.manual_seed(0)
    net = init_cnn(nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(400, 400), nn.LeakyReLU(leak))], nn.Linear(400, 10)), leak)
    x = net[:-3](torch.randn(500, 400))                              # before the last nonlinearity but one
    assert .3 < net[-3](x).std() < 3


@settings(deadline=None, max_examples=25)
@given(st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(1, 5), st.integers(2, 5)), st.integers(0, 99))
def test_batchnorm_is_torchs(shape, seed):
    torch.manual_seed(seed)
    ours, theirs = BatchNorm(shape[1]).double(), nn.BatchNorm2d(shape[1]).double()
    for _ in range(2):
        x = torch.randn(shape, dtype=torch.float64)*3 + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ya, yb = ours(a), theirs(b)
        (ya.sin()).sum().backward(); (yb.sin()).sum().backward()
        assert torch.allclose(ya, yb, atol=1e-6) and torch.allclose(a.grad, b.grad, atol=1e-6)
    for k, v in theirs.state_dict().items():
        if k != 'num_batches_tracked': assert torch.allclose(ours.state_dict()[k], v, atol=1e-6), k
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-6)
    one = BatchNorm(3)
    with pytest.raises(ValueError): one(torch.randn(1, 3, 1, 1))     # one value a channel has no variance
    assert one.running_var.equal(torch.ones(3)) and one.eval()(torch.randn(1, 3, 1, 1)).isfinite().all()


def test_running_batchnorm_is_batchnorm_on_a_constant_stream_and_its_gradient_is_right():
    torch.manual_seed(0)
    rbn, x = RunningBatchNorm(3).double(), torch.randn(6, 3, 4, 4, dtype=torch.float64)
    for _ in range(4): y = rbn(x)
    assert torch.allclose(y, F.batch_norm(x, None, None, training=True), atol=1e-8)
    def f(x): return copy.deepcopy(rbn)(x)                           # a fresh copy each time: the state is an input, not an output
    assert torch.autograd.gradcheck(f, x[:2].clone().requires_grad_(), atol=1e-5)
    assert torch.equal(rbn.eval()(x[:1]), rbn(x)[:1]), 'evaluation does not depend on the batch'


def test_running_batchnorm_may_be_used_twice_before_the_way_back():
    torch.manual_seed(0)
    bn, (a, b) = RunningBatchNorm(3).double(), torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    once = copy.deepcopy(bn)
    a1, b1, a2, b2 = (t.clone().requires_grad_() for t in (a, b, a, b))
    (bn(a1).pow(3).sum() + bn(b1).pow(3).sum()).backward()                    # as a net of two branches with shared layers does
    for t in (a2, b2): once(t).pow(3).sum().backward()
    assert torch.allclose(a1.grad, a2.grad) and torch.allclose(b1.grad, b2.grad)


@pytest.mark.parametrize('norm, dtype, scale', [(BatchNorm, torch.bfloat16, 1.), (RunningBatchNorm, torch.bfloat16, 1.), (RunningBatchNorm, torch.float16, 300.)])
def test_norms_take_16_bits(norm, dtype, scale):
    x, a, b = torch.randn(16, 4, 6, 6, generator=torch.Generator().manual_seed(0))*scale, norm(4), norm(4)
    assert torch.allclose(a(x.to(dtype)).float(), b(x), atol=.05) and all(t.isfinite().all() for t in a.buffers())


@pytest.mark.parametrize('norm_first', [False, True])
def test_conv_layer_order(norm_first):
    out = conv_layer(3, 8, norm_first=norm_first)(torch.randn(16, 3, 8, 8))
    assert (out.mean((0, 2, 3)).abs().max() < 1e-5) != norm_first and (out.min() >= 0) == norm_first


# data

def test_a_dataset_in_all_loaders():
    "Whole and in part, by torch's own loader and samplers, with indices that are tensors, of tensors and of lists."
    x = torch.arange(14.).view(7, 2)
    for ds in (Dataset(x, torch.arange(7)), Dataset(x, [*range(7)]), Dataset(x.tolist(), torch.arange(7)), Dataset(x[:, 0].tolist(), [*range(7)])):
        part, some = Subset(ds, [5, 3, 1]), Subset(ds, torch.tensor([5, 3, 1]))
        for dl, want in ((DataLoader(ds, 4), range(7)), (get_dls(ds, part, 2)[1], [5, 3, 1]), (DataLoader(part, 4), [5, 3, 1]), (DataLoader(some, 1), [5, 3, 1]),
                         (DataLoader(ds, 3, sampler=SubsetRandomSampler(torch.tensor([6, 2]))), None), (get_dls(ds, ds, 2, seed=0)[0], None)):
            xs, ys = (torch.cat([torch.stack(t, 1) if isinstance(t, list) else t for t in ts]) for ts in zip(*dl))
            assert xs.equal(x[ys] if xs.dim() > 1 else x[ys, 0].double()) and (want is None or ys.tolist() == [*want]) and ys.dtype == torch.int64


def test_training_is_shuffled_by_its_seed_and_only_its_last_batch_dropped():
    ds = Dataset(torch.randn(40, 2), torch.arange(40))
    def order(dl): return torch.cat([y for _, y in dl]).tolist()
    (train, valid), again, other = (get_dls(ds, ds, 16, seed=seed, drop_last=True) for seed in (0, 0, 1))
    orders = [[order(dl) for _ in '12'] for dl in (train, again[0], other[0])]
    assert orders[0] == orders[1] != orders[2] and orders[0][0] != orders[0][1]
    assert [len(y) for _, y in train] == [16, 16] and [len(y) for _, y in valid] == [32, 8] and order(valid) == [*range(40)]
    for n, bs, kw in ((40, 64, dict(drop_last=True)), (0, 4, {}), (40, 0, {})):
        with pytest.raises(ValueError, match=f'{bs}' if n else 'training.* 0'): get_dls(Dataset(ds.x[:n], ds.y[:n]), ds, bs, **kw)
    with pytest.raises(ValueError, match='40 .* 39'): Dataset(ds.x, ds.y[:39])


# metrics

@pytest.mark.parametrize('pred, yb', [((6, 1), (6,)), ((6,), (6,)), ((6, 3), (6, 3)), ((6, 3), (6, 1)), ((6, 1, 4), (6, 4))])
def test_accuracy_of_what_has_no_largest_is_refused(pred, yb):
    "Of one score the largest is always the first: it was the share of zeros."
    with pytest.raises(ValueError, match='binary_accuracy'): accuracy(torch.randn(pred), torch.ones(yb))
    pixels = F.one_hot(y := torch.arange(60).view(3, 5, 4) % 3, 3).permute(0, 3, 1, 2)
    assert accuracy(pixels, y) == 1                                  # pixels with a class each


@pytest.mark.parametrize('shape', [(50,), (50, 1), (50, 4)])
def test_binary_accuracy_is_torchmetrics(shape):
    c, g = pytest.importorskip('torchmetrics').classification, torch.Generator().manual_seed(0)
    pred, yb = torch.randn(shape, generator=g), torch.randint(0, 2, shape, generator=g)
    want = c.MultilabelAccuracy(4, average='micro')(pred.sigmoid(), yb) if shape[-1] == 4 else c.BinaryAccuracy()(pred.sigmoid(), yb)
    assert binary_accuracy(pred, yb).isclose(want) and binary_accuracy(pred, yb.float().flatten()).isclose(want)
    assert binary_accuracy(pred.sigmoid(), yb, threshold=.5).isclose(want)


@pytest.mark.parametrize('loss, ignored', [(F.cross_entropy, -100), (lambda p, y: F.cross_entropy(p, y), -100), (partial(F.cross_entropy, ignore_index=2), 2), (nn.CrossEntropyLoss(ignore_index=255), 255),
                                           (partial(F.cross_entropy, weight=torch.tensor([3., 2., .5]), ignore_index=1), 1)])
@pytest.mark.parametrize('pixels', [(), (3,)])
def test_the_loss_is_weighted_by_the_labels_that_count(loss, ignored, pixels):
    "One batch of three has only labels to be ignored, or of weight 0: its mean is 0/0, and that of the pass is not."
    yb = Y[:96, None].repeat(1, *pixels) if pixels else Y[:96].clone()
    yb[:32] = yb[40:50] = ignored
    data, model = [(X[i:i + 32], yb[i:i + 32]) for i in (0, 32, 64)], nn.Linear(10, 3)
    if pixels: model = nn.Sequential(model, Lambda(lambda p: p[..., None].repeat(1, 1, 3)))
    run = Runner(model, DataBunch(data, data), loss, torch.optim.SGD(model.parameters(), lr=0.), [table := stats(accuracy)]).fit(1)
    want, row = loss(model(X[:96]), yb).item(), table.rows[0]
    assert row['train_loss'] == pytest.approx(want, abs=1e-5) and row['valid_loss'] == pytest.approx(want, abs=1e-5)
    assert row['valid_accuracy'] == pytest.approx(accuracy(model(X[:96]), yb).item())
    run.data = DataBunch(data[:1], data[:1])
    assert math.isnan(run.fit(1).cbs[0].rows[-1]['valid_loss'])


def test_a_batch_of_classes_that_weigh_nothing():
    yb, loss, s = Y[:96].clone(), nn.CrossEntropyLoss(weight=torch.tensor([0., 2., .5])), AvgStats([], False)
    yb[:32], pred = 0, torch.randn(96, 3)
    for i in (0, 32, 64):
        part = slice(i, i + 32)
        s.accumulate(SimpleNamespace(xb=X[part], yb=yb[part], pred=pred[part], loss=loss(pred[part], yb[part]), loss_func=loss))
    assert s.avg_stats[0] == pytest.approx(loss(pred, yb).item(), abs=1e-5)


class Distinct:
    "No mean over items: how many rows were seen twice or more, over a whole pass."
    def reset(self): self.n, self.seen = 0, []
    def update(self, pred, yb): self.seen += [tuple(p) for p in pred.tolist()]; self.n += len(yb)
    def compute(self): return [self.n, len(self.seen) - len(set(self.seen))]


def whole_set(kind):
    "Metrics of torchmetrics', fresh."
    c = pytest.importorskip('torchmetrics').classification
    return {'F1': lambda: c.MulticlassF1Score(3, average='macro'), 'AUROC': lambda: c.MulticlassAUROC(3), 'confusion': lambda: c.MulticlassConfusionMatrix(3)}[kind]


@pytest.mark.parametrize('kind', ['F1', 'AUROC', 'confusion'])
def test_the_table_is_that_of_the_whole_set(kind):
    "Loss, means and torchmetrics' objects: each pass by itself, in several epochs, with a short last batch (100 = 3·32 + 4)."
    make = whole_set(kind)
    run = runner(table := stats(accuracy, make(), lambda p, y: p.mean()), lr=0.).fit(3)
    for ds, split in ((run.data.train_ds, 'train'), (run.data.valid_ds, 'valid')):
        pred = run.model(ds.x)
        for row in table.rows:
            got = [torch.tensor(v).numpy() for k, v in row.items() if k.startswith(split)]
            for a, b in zip(got, (F.cross_entropy(pred, ds.y), accuracy(pred, ds.y), make()(pred, ds.y), pred.mean()), strict=True): assert a == pytest.approx(b.detach().numpy(), abs=1e-5)
    assert len(table.line(row).split()) == len(table.heads) + 1


def test_a_metric_of_ones_own_in_three_methods():
    run = runner(table := stats(mine := Distinct())).fit(2)
    assert [r['train_Distinct'][0] for r in table.rows] == [100, 100] and [r['valid_Distinct'] for r in table.rows] == [[40, 0]]*2 and mine.n == 40
    assert repr(table.stats[False])
    run.data = DataBunch(run.data.train_dl, [])
    run.fit(1)
    assert all(v is NO_PASS for k, v in table.rows[-1].items() if k.startswith('valid')), 'and no number of the pass before'


def test_several_inputs_are_counted_by_items():
    for pack in (lambda x: {'a': x, 'b': x}, lambda x: (x, x, x), lambda x: [x]):
        data = [(pack(X[:40]), Y[:40]), (pack(X[40:42]), Y[40:42])]
        run = runner(CudaCallback('cpu'), table := stats(accuracy), data=DataBunch(data, data), lr=0., wrap=Takes).fit(1)
        assert table.rows[0]['valid_loss'] == pytest.approx(F.cross_entropy(run.model([X[:42]]), Y[:42]).item(), abs=1e-6)
        assert batch_len(pack(X)) == batch_len(pack(X), Y) == 140 and batch_len(['a', 'b']) == 2


def test_metrics_of_one_name_have_a_column_each_and_may_give_plain_numbers():
    def loss(pred, yb): return torch.tensor(123.)
    runner(table := stats(partial(accuracy), accuracy, loss, lambda pred, yb: .5)).fit(1)
    names = ['loss', 'accuracy', 'accuracy_2', 'loss_2', '<lambda>']
    assert list(table.rows[0]) == table.heads == ['epoch', *(f'{s}_{n}' for s in ('train', 'valid') for n in names), 'time']
    assert table.rows[0]['valid_loss_2'] == 123 and table.rows[0]['valid_loss'] < 10 and table.rows[0]['valid_<lambda>'] == .5


def test_a_diverged_loss_is_no_pass_that_did_not_happen():
    said = []
    def fit(data, lr, *metrics):
        r = runner(AvgStatsCallback(*metrics), data=data, lr=lr); r.logger = said.append
        r.fit(2); return said[-1]
    assert 'nan' in fit(toy(), 1e38, lambda p, y: p.mean()) and ' - ' not in said[-1]
    assert fit(DataBunch(toy().train_dl, []), .1).split().count('-') == 1                      # without metrics too


@pytest.mark.parametrize('metric', [accuracy, Distinct()])
@pytest.mark.parametrize('out', [lambda p: (p, p), lambda p: {'logits': p}])
def test_predictions_that_a_metric_cannot_use_are_told_with_its_name(metric, out):
    model, first = nn.Linear(10, 3), lambda o: next(iter(o.values())) if isinstance(o, dict) else o[0]
    run = Runner(nn.Sequential(model, Lambda(out)), toy(), lambda p, y: F.cross_entropy(first(p), y), torch.optim.SGD(model.parameters(), lr=.1), [stats(metric)])
    with pytest.raises(TypeError, match=f'{metric_name(metric)}.*{type(out(0)).__name__}'): run.fit(1)


@pytest.mark.parametrize('batch', [{'pixel_values': X, 'labels': Y}, {'x': X, 'label': Y}, {'x': X, 'target': Y, 'id': Y}, (X, Y, Y)])
def test_a_batch_of_other_parts_is_refused_by_the_runner(batch):
    "A dictionary of two was unpacked into its keys."
    with pytest.raises(ValueError, match='collate_fn'): runner(data=DataBunch([batch], [batch])).fit(1)


def test_what_the_loss_was_made_with_moves_with_the_model():
    for loss in (nn.CrossEntropyLoss(weight=torch.ones(3)), partial(F.cross_entropy, weight=torch.ones(3), ignore_index=2), F.cross_entropy):
        CudaCallback('meta').begin_fit(SimpleNamespace(model=nn.Linear(10, 3), loss_func=loss, opt=SimpleNamespace(state={})))
        w = option(loss, 'weight')
        assert w is None or w.is_meta


def test_what_is_kept_of_a_long_fit_does_not_grow_by_objects():
    "Each is walked over and written by itself, after every epoch."
    def parts(o): return 1 + sum(map(parts, o.values() if isinstance(o, dict) else o if isinstance(o, (list, tuple)) else []))
    data = DataBunch(batches(50), batches(50))
    counts = [[parts(cb.state_dict()) for cb in runner(stats(accuracy), Recorder(), data=data).fit(n).cbs] for n in (2, 20)]
    assert counts[1] == counts[0]


def test_a_loss_and_a_metric_are_one_number():
    one, each = batches(1, 40), lambda p, y: (p.argmax(1) == y).float()
    run = runner(table := stats(each), data=DataBunch(one, one), lr=0., loss=partial(F.cross_entropy, reduction='none')).fit(1)     # in a list: also one
    assert table.rows[0]['valid_loss'] == pytest.approx(F.cross_entropy(run.model(X[:40]), Y[:40]).item(), abs=1e-5)
    for metric, said in ((each, '<lambda>.*32'), (lambda p, y: {'a': 1}, '<lambda>.*dict')):
        with pytest.raises(ValueError, match=said): runner(stats(metric)).fit(1)


@pytest.mark.parametrize('kind', ['F1', 'AUROC', 'own'])
def test_the_state_of_table_and_recorder_in_mid_epoch(kind):
    "Kept while the fit goes on, loaded into fresh ones, in a run that begins at the same batch: the same row."
    make = Distinct if kind == 'own' else whole_set(kind)
    def cbs(): return [stats(make(), accuracy), Recorder(), ParamScheduler('lr', lambda p: p)]
    data, kept, first, second = DataBunch(batches(32), toy().valid_dl), {}, cbs(), cbs()
    def keep(run):
        if run.in_train and (run.epoch, run.iter) == (1, 1): kept.update(cbs=[c.state_dict() for c in first[:2]], model=copy.deepcopy(run.model.state_dict()))
    runner(*first, At('after_batch', keep, 30), data=data).fit(2)
    run = runner(*second, data=data)
    run.model.load_state_dict(kept['model'])
    for c in (second[0], second[2]): c.begin_fit(run)
    second[0].begin_epoch(run)
    for c, sd in zip(second, kept['cbs']): c.load_state_dict(sd)
    so_far = second[0].stats[True].avg_stats
    run.n_epochs, run.epoch, run.in_train, run.iters = 2, 1, True, 4
    for i in (2, 3): run.one_batch(i, *data.train_dl[i])
    run.all_batches(data.valid_dl, train=False)
    second[0].after_epoch(run)
    assert rows(first[0]) == rows(second[0]) and len(first[0].rows) == 2
    assert first[1].losses == second[1].losses and first[1].hypers == second[1].hypers and len(first[1].losses) == 8
    (third := cbs()[0]).load_state_dict(kept['cbs'][0])              # what is kept serves twice
    assert third.stats[True].avg_stats == so_far and len(so_far) == 3 and len(third.rows) == 1
    with pytest.raises(ValueError, match='accuracy'): stats(accuracy).load_state_dict(kept['cbs'][0])
    run.data = DataBunch(data.train_dl, [])
    run.fit(1)                                                       # a missing pass stays one
    (again := cbs()[0]).load_state_dict(second[0].state_dict())
    assert again.rows[-1]['valid_loss'] is NO_PASS and again.rows[0]['valid_loss'] is not NO_PASS
    (fresh := Recorder()).load_state_dict(Recorder().state_dict())   # before any fit
    assert fresh.losses == []
    with pytest.raises(ValueError): fresh.plot('lr')
