"""The training loop, schedules, hooks and norms of 04–07, beside torch's own and under faults."""
import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from event_log import Log
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from exp.annealing import ParamScheduler, annealer, combine_scheds, cos_1cycle_anneal, sched_cos, sched_exp, sched_lin
from exp.batchnorm import BatchNorm, RunningBatchNorm, conv_layer
from exp.callbacks import (EVENTS, NO_PASS, AvgStatsCallback, BatchTransformXCallback, CancelBatchException, CancelEpochException, CancelFitException,
                           CudaCallback, DataBunch, Dataset, Recorder, Runner, accuracy, batch_len, binary_accuracy, get_dls, get_hypers, get_runner)
from exp.convnets import Hook, Hooks, append_stats, get_cnn_model, init_cnn, plot_hists, plot_stats


def small_data(n=100, bs=32, seed=0):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 10, generator=g), torch.randint(0, 3, (n,), generator=g)
    return DataBunch(*get_dls(Dataset(x, y), Dataset(x[:40], y[:40]), bs, seed=seed), 10, 3)


def runner(*cbs, data=None, lr=.1):
    torch.manual_seed(0)
    model = nn.Linear(10, 3)
    return Runner(model, data or small_data(), F.cross_entropy, torch.optim.SGD(model.parameters(), lr=lr), cbs)


@pytest.mark.parametrize('error, after, cut', [(CancelBatchException, 'after_cancel_batch', 'after_batch'),
                                               (CancelEpochException, 'after_cancel_epoch', 'after_batch'), (CancelFitException, 'after_cancel_fit', 'after_epoch')])
def test_cancelling_ends_what_it_says_and_no_more(error, after, cut):
    log, rec = Log('after_loss', error, nth=2), Recorder()
    runner(log, rec).fit(2)
    seen = log.seen
    assert seen.count(after) == 1 and seen[-1] == 'after_fit' and seen.count('after_fit') == 1
    i = seen.index(after)
    assert seen[i-1] == 'after_loss', 'nothing of the cancelled batch may follow'
    if error is CancelBatchException: assert seen[i+1] == 'begin_batch' and len(rec.losses) == 7          # 2 epochs of 4 batches, less one
    if error is CancelEpochException: assert seen[i+1] == 'begin_validate' and len(rec.losses) == 1 + 4
    if error is CancelFitException: assert seen[i+1] == 'after_fit' and len(rec.losses) == 1 and 'after_epoch' not in seen


@pytest.mark.parametrize('error', [CancelBatchException, CancelEpochException])
def test_a_gradient_that_was_cancelled_is_in_no_later_step(error):
    steps = []
    class Grads:
        def after_backward(self, run):
            if run.n_iter == 1 and not steps.count('cancelled'): steps.append('cancelled'); raise error
            want = torch.autograd.grad(F.cross_entropy(run.model(run.xb), run.yb), list(run.model.parameters()))
            assert all(torch.allclose(p.grad, g) for p, g in zip(run.model.parameters(), want))
            steps.append('whole')
    runner(Grads()).fit(2)
    assert steps[:2] == ['whole', 'cancelled'] and steps.count('whole') == (7 if error is CancelBatchException else 5)


def test_an_error_in_a_callback_still_ends_the_fit_cleanly():
    log = Log('after_backward', ZeroDivisionError)
    run = runner(log)
    with pytest.raises(ZeroDivisionError): run.fit(1)
    assert log.seen[-1] == 'after_fit' and all(p.grad is None for p in run.model.parameters())
    run.fit(1)                                                       # and the runner is still good for another
    assert log.seen.count('after_epoch') == 1


def test_events_come_in_the_order_of_the_table():
    log = Log()
    runner(log, data=small_data(n=40, bs=40)).fit(1)
    assert log.seen == ['begin_fit', 'begin_epoch', 'begin_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step', 'after_batch',
                        'begin_validate', 'begin_batch', 'after_pred', 'after_loss', 'after_batch', 'after_epoch', 'after_fit']


def test_order_of_callbacks_is_order_then_as_listed():
    calls = []
    def make(name, order):
        return type(name, (), {'_order': order, 'begin_fit': lambda self, run: calls.append(name)})()
    runner(make('c', 5), make('a', -1), make('b', 0), make('b2', 0)).fit(0)
    assert calls == ['a', 'b', 'b2', 'c']


def test_an_event_has_its_name_in_the_table_and_a_runner_announces_no_other():
    log = Log('after_loss', ZeroDivisionError)
    with pytest.raises(ZeroDivisionError): runner(log).fit(1)
    assert {*log.seen} < {*EVENTS} and 'after_error' in EVENTS and 'after_error' not in log.seen          # that one is the Learner's


@pytest.mark.parametrize('wrong, right', [('after_bacth', 'after_batch'), ('begin_epcoh', 'begin_epoch'), ('before_fit', 'begin_fit'), ('after_eror', 'after_error')])
def test_a_misspelt_event_is_found_at_once(wrong, right):
    with pytest.raises(AttributeError, match=f'{wrong} is no event: did you mean {right}'): runner(type('C', (), {wrong: lambda self, run: None})())


def test_what_a_callback_keeps_is_no_misspelt_event():
    class Keeps:
        def __init__(self): self.before_std, self.after_all, self.begin_at = 3, None, 'here'
    runner(Keeps()).fit(1)


def test_metrics_are_those_of_the_whole_set():
    stats = AvgStatsCallback(accuracy, silent=True)
    run = runner(stats, lr=0.).fit(1)                                # 100 = 3·32 + 4: a short last batch
    for ds, split in ((run.data.train_ds, 'train'), (run.data.valid_ds, 'valid')):
        pred = run.model(ds.x)
        assert abs(stats.rows[0][f'{split}_accuracy'] - accuracy(pred, ds.y).item()) < 1e-6
        assert abs(stats.rows[0][f'{split}_loss'] - F.cross_entropy(pred, ds.y).item()) < 1e-6


def test_the_slides_cuda_callback_needs_no_gpu():
    seen = []
    class Device:
        def after_pred(self, run): seen.append((run.xb.device, next(run.model.parameters()).device))
    run = runner(CudaCallback(), BatchTransformXCallback(lambda x: x*2), Device()).fit(1)
    assert {a for a, _ in seen} == {b for _, b in seen} == {CudaCallback().device} and run.n_iter == 4


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


def test_a_shape_made_in_a_function_changes_no_other():
    def power(n):
        @annealer
        def shape(start, end, pos): return start + (end - start)*pos**n
        return shape
    square = power(2)(0, 1)
    power(3)
    assert square(.5) == .25


def test_help_says_what_an_annealer_takes():
    import inspect
    for shape in (sched_lin, sched_cos, annealer(lambda start, end, pos: start)):
        assert list(inspect.signature(shape).parameters) == ['start', 'end'] and callable(shape(0, 1))
    assert pickle.loads(pickle.dumps(sched_lin)) is sched_lin and 'straight line' in sched_lin.__doc__


def test_a_loader_of_ones_own_and_a_subset_see_pairs():
    ds = Dataset(torch.arange(12.).view(6, 2), torch.arange(6))
    part = torch.utils.data.Subset(ds, [5, 3, 1])
    for dl in (torch.utils.data.DataLoader(ds, 4), get_dls(ds, part, 2)[1], torch.utils.data.DataLoader(part, 4)):
        xb, yb = next(iter(dl))
        assert xb.equal(ds.x[yb]) and yb.tolist() == ([5, 3, 1] if dl.dataset is part else [0, 1, 2, 3])


@pytest.mark.parametrize('pred, yb', [((6, 1), (6,)), ((6,), (6,)), ((6, 3), (6, 3)), ((6, 3), (6, 1)), ((6, 1, 4), (6, 4))])
def test_accuracy_of_what_has_no_largest_is_refused(pred, yb):
    "Of one score the largest is always the first: it was the share of zeros."
    with pytest.raises(ValueError, match='binary_accuracy'): accuracy(torch.randn(pred), torch.ones(yb))
    assert accuracy(torch.randn(6, 3, 5, 4), torch.ones(6, 5, 4)).shape == ()          # pixels with a class each


@pytest.mark.parametrize('shape', [(50,), (50, 1), (50, 4)])
def test_binary_accuracy_is_torchmetrics(shape):
    c = pytest.importorskip('torchmetrics').classification
    g = torch.Generator().manual_seed(0)
    pred, yb = torch.randn(shape, generator=g), torch.randint(0, 2, shape, generator=g)
    want = c.MultilabelAccuracy(4, average='micro')(pred.sigmoid(), yb) if shape[-1] == 4 else c.BinaryAccuracy()(pred.sigmoid(), yb)
    assert binary_accuracy(pred, yb).isclose(want) and binary_accuracy(pred, yb.float().flatten()).isclose(want)
    assert binary_accuracy(pred.sigmoid(), yb, threshold=.5).isclose(want)


def test_a_metric_may_give_a_plain_number():
    cb = AvgStatsCallback(lambda pred, yb: .5, silent=True)
    runner(cb).fit(1)
    assert cb.rows[0]['valid_<lambda>'] == .5


def test_a_user_schedule_of_a_known_name_changes_nobody_elses():
    from exp.annealing import annealer
    before = sched_cos(0, 1)
    def sched_cos_again(start, end, pos): return 99
    sched_cos_again.__name__ = 'sched_cos'
    annealer(sched_cos_again)
    assert before(.5) == .5 and sched_exp(1, 100)(.5) == pytest.approx(10)


@pytest.mark.parametrize('error', [None, CancelFitException, CancelEpochException, ZeroDivisionError, KeyboardInterrupt])
def test_scheduler_sets_each_group_and_puts_back_what_it_found(error):
    run, seen = runner(), []
    run.opt = torch.optim.SGD([{'params': [run.model.weight], 'lr': 3.}, {'params': [run.model.bias], 'lr': 5.}], lr=.1)
    class Sees:
        def after_batch(self, run):
            if run.in_train: seen.append([h['lr'] for h in get_hypers(run.opt)])
    sched = ParamScheduler('lr', [sched_lin(0, 1), sched_lin(1, 0)])
    for _ in range(2):                                               # the second fit begins from what the first put back
        run.cbs, seen[:] = [sched, Sees(), *([Log('after_step', error, 3)] if error else [])], []
        try: run.fit(1)
        except (ZeroDivisionError, KeyboardInterrupt): assert error in (ZeroDivisionError, KeyboardInterrupt)
        assert seen == [[0, 1], [.25, .75], [.5, .5], [.75, .25]][:2 if error else 4] and [g['lr'] for g in run.opt.param_groups] == [3., 5.]
    run.opt.param_groups[0]['lr'], run.cbs = 4., [Log('begin_fit', ZeroDivisionError), sched]
    with pytest.raises(ZeroDivisionError): run.fit(1)                # before it has begun
    assert run.opt.param_groups[0]['lr'] == 4.


def test_schedules_that_do_not_fit():
    with pytest.raises(ValueError, match="'momentun'.*momentum"): runner(ParamScheduler('momentun', sched_lin(0, 1))).fit(1)
    with pytest.raises(ValueError, match='2 .* 1'): runner(ParamScheduler('lr', [sched_lin(0, 1)]*2)).fit(1)


def test_hooks_are_gone_after_an_error_and_see_training_only():
    net = get_cnn_model(DataBunch(None, None, 1, 10), [8])
    with pytest.raises(RuntimeError), Hooks(net, append_stats): net(torch.randn(2, 3, 8, 8))
    assert not any(m._forward_hooks for m in net.modules())
    with Hook(net[0], append_stats) as h:
        net.eval()(torch.randn(2, 1, 8, 8))
        assert not hasattr(h, 'stats')
        net.train()(torch.randn(2, 1, 8, 8))
    assert [len(s) for s in h.stats] == [1, 1, 1]


@pytest.mark.parametrize('leak', [0., .1])
def test_kaiming_keeps_the_variance_through_twenty_layers(leak):
    torch.manual_seed(0)
    net = init_cnn(nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(400, 400), nn.LeakyReLU(leak))], nn.Linear(400, 10)), leak)
    x = net[:-3](torch.randn(500, 400))                              # before the last nonlinearity but one
    assert .3 < net[-3](x).std() < 3


shapes = st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(1, 5), st.integers(2, 5))


@settings(deadline=None, max_examples=25)
@given(shapes, st.integers(0, 99))
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


@pytest.mark.parametrize('norm', [BatchNorm, RunningBatchNorm])
@pytest.mark.parametrize('dtype, scale', [(torch.bfloat16, 1.), (torch.float16, 300.)], ids=['bfloat16', 'large float16'])
def test_norms_take_16_bits(norm, dtype, scale):
    x = torch.randn(16, 4, 6, 6, generator=torch.Generator().manual_seed(0))*scale
    a, b = norm(4), norm(4)
    if norm is BatchNorm and scale > 1: pytest.skip('as the formula: the variance overflows')
    out, want = a(x.to(dtype)), b(x)
    assert torch.allclose(out.float(), want, atol=.05) and all(t.isfinite().all() for t in a.buffers())


@pytest.mark.parametrize('norm_first', [False, True])
def test_conv_layer_order(norm_first):
    out = conv_layer(3, 8, norm_first=norm_first)(torch.randn(16, 3, 8, 8))
    zero_mean = out.mean((0, 2, 3)).abs().max() < 1e-5
    assert zero_mean != norm_first and (out.min() >= 0) == norm_first


def test_get_runner_takes_any_optimizer():
    data = small_data()
    r = get_runner(nn.Linear(10, 3), data, .01, opt_func=partial(torch.optim.AdamW, weight_decay=.1)).fit(1)
    assert isinstance(r.opt, torch.optim.AdamW) and get_hypers(r.opt)[0]['weight_decay'] == .1


def test_lists_load_as_tensors_do():
    "`Dataset` takes any two sequences; torch's loader asks it for whole batches."
    x, y = [1., 2., 3., 4., 5.], [0, 1, 0, 2, 1]
    for xs, ys in ((x, y), (torch.tensor(x), y), (x, torch.tensor(y))):
        train, valid = get_dls(Dataset(xs, ys), Dataset(torch.tensor(x), torch.tensor(y)), 2, seed=0)
        assert sorted(v for xb, _ in train for v in xb.tolist()) == x and [len(xb) for xb, _ in train] == [2, 2, 1]
        assert all(y[x.index(a)] == b for xb, yb in train for a, b in zip(xb.tolist(), yb.tolist()))
        assert torch.cat([xb for xb, _ in valid]).tolist() == x and next(iter(valid))[1].dtype == torch.int64


# found by users' scripts

@pytest.mark.parametrize('pack', [lambda x: {'a': x, 'b': x}, lambda x: (x, x, x), lambda x: [x]], ids=['dict', 'tuple', 'list'])
def test_a_batch_of_several_inputs_counts_its_items(pack):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(42, 10, generator=g), torch.randint(0, 3, (42,), generator=g)
    torch.manual_seed(0)
    model = nn.Linear(10, 3)
    class Takes(nn.Module):
        def __init__(self): super().__init__(); self.l = model
        def forward(self, b): return self.l(next(iter(b.values())) if isinstance(b, dict) else b[0])
    batches = [(pack(x[:40]), y[:40]), (pack(x[40:]), y[40:])]
    stats = AvgStatsCallback(accuracy, silent=True)
    Runner(Takes(), DataBunch(batches, batches), F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.), [CudaCallback('cpu'), stats]).fit(1)
    assert stats.rows[0]['valid_loss'] == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-6)
    assert batch_len(pack(x)) == batch_len(pack(x), y) == 42 and batch_len(['a', 'b']) == 2


def test_metrics_of_one_name_have_a_column_each():
    def loss(pred, yb): return torch.tensor(123.)
    stats = AvgStatsCallback(partial(accuracy), accuracy, loss, silent=True)
    runner(stats).fit(1)
    assert stats.names == ['loss', 'accuracy', 'accuracy_2', 'loss_2'] and list(stats.rows[0]) == stats.heads
    assert stats.rows[0]['valid_loss_2'] == 123 and stats.rows[0]['valid_loss'] < 10 and len(stats.line(stats.rows[0]).split()) == len(stats.heads) + 1


def test_the_last_batch_is_dropped_in_training_only():
    x, y = torch.randn(40, 2), torch.arange(40)
    train, valid = get_dls(Dataset(x, y), Dataset(x[:10], y[:10]), 16, drop_last=True)
    assert len(train) == 2 and sum(len(yb) for _, yb in valid) == 10
    with pytest.raises(ValueError, match='40 .*64'): get_dls(Dataset(x, y), Dataset(x, y), 64, drop_last=True)


def test_a_diverged_loss_is_no_pass_that_did_not_happen():
    said = []
    def fit(data, lr, *metrics):
        r = runner(AvgStatsCallback(*metrics), data=data, lr=lr); r.logger = said.append
        r.fit(2); return said[-1]
    assert 'nan' in fit(small_data(), 1e38, lambda p, y: p.mean()) and ' - ' not in said[-1]
    data = small_data()
    assert fit(DataBunch(data.train_dl, []), .1).split().count('-') == 1                       # without metrics too


def test_a_loss_and_metrics_of_one_number_in_a_list():
    stats = AvgStatsCallback(lambda p, y: (p.argmax(1) == y).float(), silent=True)
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(10, 3), small_data().valid_ds[:]
    batches = [(x[i:i+1], y[i:i+1]) for i in range(len(x))]
    Runner(model, DataBunch(batches, batches), partial(F.cross_entropy, reduction='none'), torch.optim.SGD(model.parameters(), lr=0.), [stats]).fit(1)
    assert stats.rows[0]['valid_loss'] == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-5)


def test_a_class_in_place_of_a_callback_is_told():
    with pytest.raises(TypeError, match=r'Recorder is a class: Recorder\(…\)'): runner(Recorder)
    with pytest.raises(ValueError, match='nothing yet'): Recorder().plot('lr')


def test_batch_norm_of_one_value_a_channel_is_refused_as_torchs():
    for norm in (BatchNorm, nn.BatchNorm2d):
        m = norm(3)
        with pytest.raises(ValueError, match='more than 1 value per channel'): m(torch.randn(1, 3, 1, 1))
        assert m.running_var.equal(torch.ones(3)) and m.eval()(torch.randn(1, 3, 1, 1)).isfinite().all()


@pytest.mark.parametrize('kw', [{}, dict(bins=80), dict(lo=-1., hi=1.), dict(lo=0., hi=4., bins=16)], ids=str)
def test_the_share_near_zero_is_that_of_the_numbers(kw):
    out = torch.cat([torch.full((300,), .01), torch.full((500,), .9)])
    m = nn.Identity().train()
    with Hook(m, partial(append_stats, **kw)) as h:
        m(out)
        fig = plot_stats([h])
        assert fig.axes[2].lines[0].get_ydata()[0] == pytest.approx(3/8)
        extent = plot_hists([h]).axes[0].images[0].get_extent()
        assert tuple(extent[2:]) == (kw.get('lo', -2.), kw.get('hi', 8.))
    with pytest.raises(ValueError, match='no batch'): plot_stats([Hook(m, append_stats)])


def test_a_dataset_takes_indices_that_are_tensors():
    from torch.utils.data import DataLoader, Subset, SubsetRandomSampler
    x, y = torch.randn(40, 4), torch.arange(40)
    ds = Dataset(x, y)
    assert next(iter(DataLoader(Subset(ds, torch.arange(1, 4)), 1)))[0].shape == (1, 4)
    xb, yb = next(iter(DataLoader(ds, 5, sampler=SubsetRandomSampler(torch.randperm(40)[:5]))))
    assert xb.equal(x[yb])


# metrics that are objects

class Distinct:
    "No mean over items: how many rows were seen twice or more, over a whole pass."
    def reset(self): self.n, self.seen = 0, []
    def update(self, pred, yb): self.seen += [tuple(p) for p in pred.tolist()]; self.n += len(yb)
    def compute(self): return [self.n, len(self.seen) - len(set(self.seen))]


def whole_set(kind):
    "Metrics of torchmetrics', fresh."
    c = pytest.importorskip('torchmetrics').classification
    return {'F1': lambda: c.MulticlassF1Score(3, average='macro'), 'AUROC': lambda: c.MulticlassAUROC(3), 'confusion': lambda: c.MulticlassConfusionMatrix(3),
            'by class': lambda: c.MulticlassRecall(3, average=None)}[kind]


@pytest.mark.parametrize('kind', ['F1', 'AUROC', 'confusion', 'by class'])
def test_torchmetrics_see_the_whole_set(kind):
    "Each pass by itself, in any number of epochs, with a short last batch, between other metrics; and not their mean over batches."
    make = whole_set(kind)
    run = runner(stats := AvgStatsCallback(accuracy, make(), lambda p, y: p.mean(), silent=True), lr=0.).fit(3)
    name = type(make()).__name__
    for ds, split in ((run.data.train_ds, 'train'), (run.data.valid_ds, 'valid')):
        pred = run.model(ds.x)
        want = torch.as_tensor(make()(pred, ds.y)).numpy()
        for row in stats.rows:
            assert torch.tensor(row[f'{split}_{name}']).numpy() == pytest.approx(want, abs=1e-6) and row[f'{split}_<lambda>'] == pytest.approx(pred.mean().item(), abs=1e-5)
            assert row[f'{split}_accuracy'] == pytest.approx(accuracy(pred, ds.y).item(), abs=1e-6)
    assert len(stats.line(row).split()) == len(stats.heads) + 1
    means = sum(make()(run.model(x), y).numpy()*len(y) for x, y in zip(run.data.train_ds.x.split(32), run.data.train_ds.y.split(32)))/100
    assert kind == 'confusion' or abs(means - make()(run.model(run.data.train_ds.x), run.data.train_ds.y).numpy()).max() > 1e-3, 'or this test sees nothing'


def test_a_metric_of_ones_own_in_three_methods():
    stats = AvgStatsCallback(mine := Distinct(), silent=True)
    run = runner(stats).fit(2)
    assert [r['train_Distinct'][0] for r in stats.rows] == [100, 100] and [r['valid_Distinct'] for r in stats.rows] == [[40, 0]]*2 and mine.n == 40
    assert repr(stats.stats[False]).startswith('valid: [')
    run.data = DataBunch(run.data.train_dl, [])
    run.fit(1)
    assert all(v is NO_PASS for k, v in stats.rows[-1].items() if k.startswith('valid')), 'and no number of the pass before'


@pytest.mark.parametrize('kind', ['F1', 'AUROC', 'own'])
def test_the_state_of_table_and_recorder_in_mid_epoch(kind):
    "Kept while the fit goes on, loaded into fresh ones, in a run that begins at the same batch: the same row."
    make = Distinct if kind == 'own' else whole_set(kind)
    def cbs(): return [AvgStatsCallback(make(), accuracy, silent=True), Recorder(), ParamScheduler('lr', lambda p: p)]
    data, kept = small_data(), {}
    batches = [(x.clone(), y) for x, y in data.train_dl]
    class Keep:
        _order = 30
        def after_batch(self, run):
            if run.in_train and (run.epoch, run.iter) == (1, 1): kept.update(cbs=[c.state_dict() for c in first[:2]], model=copy.deepcopy(run.model.state_dict()))
    first, second = cbs(), cbs()
    runner(*first, Keep(), data=DataBunch(batches, data.valid_dl)).fit(2)
    run = runner(*second, data=DataBunch(batches, data.valid_dl))
    run.model.load_state_dict(kept['model'])
    for c in second: c.begin_fit(run)
    second[0].begin_epoch(run)
    for c, sd in zip(second, kept['cbs']): c.load_state_dict(sd)
    so_far = second[0].stats[True].avg_stats
    run.n_epochs, run.epoch, run.in_train, run.iters = 2, 1, True, 4
    for i in (2, 3): run.one_batch(i, *batches[i])
    run.all_batches(data.valid_dl, train=False)
    second[0].after_epoch(run)
    def rows(c): return [{k: v for k, v in r.items() if k != 'time'} for r in c.rows]
    assert rows(first[0]) == rows(second[0]) and len(first[0].rows) == 2
    assert first[1].losses == second[1].losses and first[1].hypers == second[1].hypers and len(first[1].losses) == 8
    (third := cbs()[0]).load_state_dict(kept['cbs'][0])              # what is kept serves twice
    assert third.stats[True].avg_stats == so_far and len(so_far) == 3 and len(third.rows) == 1
    with pytest.raises(ValueError, match='accuracy'): AvgStatsCallback(accuracy, silent=True).load_state_dict(kept['cbs'][0])
    run.data = DataBunch(data.train_dl, [])
    run.fit(1)                                                       # a missing pass stays one
    (again := cbs()[0]).load_state_dict(second[0].state_dict())
    assert again.rows[-1]['valid_loss'] is NO_PASS and again.rows[0]['valid_loss'] is not NO_PASS
    fresh = Recorder()
    fresh.load_state_dict(Recorder().state_dict())                   # before any fit
    assert fresh.losses == []


@pytest.mark.parametrize('metric, said', [(lambda p, y: (p.argmax(1) == y).float(), '<lambda>.*32'), (lambda p, y: {'a': 1}, '<lambda>.*dict')])
def test_a_metric_is_one_number(metric, said):
    with pytest.raises(ValueError, match=said): runner(AvgStatsCallback(metric, silent=True)).fit(1)
