"""09f's callbacks: beside a bare loop of torch's, on tables that are dictated, under kills and on full disks."""
import csv
import math
import signal
import subprocess
import sys
import textwrap
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, largest_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from exp.callbacks import (AvgStatsCallback, Callback, CancelBatchException, CancelEpochException, CancelFitException, CudaCallback,
                           DataBunch, Dataset, Recorder, Runner, accuracy, get_dls)
from exp.learner import Learner
from exp.optimizers import sgd_mom_opt
from exp.training_callbacks import (CSVLogger, EarlyStopping, GradientAccumulation, GradientClip, SaveBest, TensorBoardCallback, Watch,
                                    written_whole)

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(140, 10, generator=G), torch.randint(0, 3, (140,), generator=G)
TRAIN, VALID = Dataset(X[:100], Y[:100]), Dataset(X[100:], Y[100:])
needs_limits = pytest.mark.skipif(sys.platform == 'win32', reason='no limit of file sizes')


def toy(bs=32): return DataBunch(*get_dls(TRAIN, VALID, bs, seed=0), 10, 3)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))


def learner(*cbs, data=None, loss=F.cross_entropy, opt=torch.optim.SGD, lr=.1, model=None):
    return Learner(model or net(), data or toy(), loss, opt, lr, cbs=list(cbs))


def table(*metrics): return AvgStatsCallback(*metrics, silent=True)
def flat(model): return torch.cat([t.detach().flatten() for t in model.state_dict().values()])
def batches(bs, n=100): return [(X[i:min(i + bs, n)], Y[i:min(i + bs, n)]) for i in range(0, n, bs)]
def close(a, b): return torch.allclose(a, b, rtol=0, atol=1e-6)


def bare_loop(steps, opt=torch.optim.SGD, lr=.1, loss=F.cross_entropy, clip=None):
    "The reference: torch's own, one step for each of `steps`. Weights, and the norms before clipping."
    model, norms = net(), []
    o = opt(model.parameters(), lr=lr)
    for x, y in steps:
        o.zero_grad()
        loss(model(x), y).backward()
        if clip: norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        o.step()
    return flat(model), norms


class Steps(Callback):
    _order = 16
    def __init__(self): self.norms = []
    def after_backward(self, run): self.norms.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm().item())


# accumulation and clipping

@pytest.mark.parametrize('opt', [torch.optim.SGD, partial(torch.optim.SGD, momentum=.9)], ids=['SGD', 'momentum'])
@pytest.mark.parametrize('small, n, large', [(16, 4, 64), (25, 2, 50), (7, 5, 35), (3, 99, 100), (32, 1, 32)])
def test_small_batches_accumulated_are_the_large_one(small, n, large, opt):
    "The last batch of 4 items, or of one, and the last step of fewer batches, are among the cases."
    learn = learner(steps := Steps(), data=DataBunch(batches(small), None), opt=opt).fit(2, GradientAccumulation(n))
    want, _ = bare_loop(batches(large)*2, opt)
    assert close(flat(learn.model), want) and len(steps.norms) == 2*-(-100//large)


def test_accumulating_with_our_optimizers():
    big, small = learner(data=toy(64), opt=sgd_mom_opt).fit(3), learner(data=toy(16), opt=sgd_mom_opt).fit(3, GradientAccumulation(4))
    assert close(flat(big.model), flat(small.model))


class Scaled(Callback):
    "As mixed precision does: the loss is scaled on its way back, and the gradients are divided before the step."
    _order = 8
    def after_loss(self, run): run.loss = run.loss*1024
    def after_backward(self, run):
        for p in run.model.parameters(): p.grad.div_(1024)


class Losses(Callback):
    def __init__(self, order): self._order, self.all = order, []
    def after_loss(self, run): self.all.append(run.loss.item())


def test_others_see_the_loss_of_the_batch():
    want = [F.cross_entropy(net()(x), y).item() for x, y in batches(16)]
    for cbs in ([], [Scaled()]):
        before, rec = Losses(6), Recorder()
        learn = learner(rec, before, table(), data=DataBunch(batches(16), None), lr=0.).fit(1, [GradientAccumulation(3), *cbs])
        assert rec.losses == pytest.approx(want) and before.all == pytest.approx(want)
        assert learn.cb(AvgStatsCallback).rows[0]['train_loss'] == pytest.approx(F.cross_entropy(net()(X[:100]), Y[:100]).item(), abs=1e-6)
    scaled = learner(data=DataBunch(batches(16), None)).fit(1, [GradientAccumulation(3), Scaled()])
    assert close(flat(scaled.model), bare_loop(batches(48))[0])


@pytest.mark.parametrize('loss', [partial(F.cross_entropy, ignore_index=1), partial(F.cross_entropy, weight=torch.tensor([1., 5., .2]))])
def test_count_is_what_the_loss_divides_by(loss):
    w = loss.keywords.get('weight', torch.tensor([1., 0., 1.]))
    def small(*count): return flat(learner(data=DataBunch(batches(8, 32), None), loss=loss).fit(1, GradientAccumulation(4, *count)).model)
    want, _ = bare_loop(batches(32, 32), loss=loss)
    assert close(small(lambda run: w[run.yb].sum()), want) and not torch.allclose(small(), want, atol=1e-4)


@pytest.mark.parametrize('pack', [lambda x: {'x': x}, lambda x: (x, x)], ids=['dict', 'tuple'])
def test_several_inputs_are_counted_by_items(pack):
    class Takes(nn.Module):
        def __init__(self): super().__init__(); self.l = net()
        def forward(self, b): return self.l(b['x'] if isinstance(b, dict) else b[0])
    data = DataBunch([(pack(X[:40]), Y[:40]), (pack(X[40:42]), Y[40:42])], None)
    learn = learner(CudaCallback('cpu'), model=Takes(), data=data).fit(1, GradientAccumulation(2))
    assert close(flat(learn.model), bare_loop([(X[:42], Y[:42])])[0])


@pytest.mark.parametrize('at, kept', [('after_backward', [2, 3]), ('begin_batch', [0, 2, 3])])
def test_a_batch_that_is_cancelled_does_not_count(at, kept):
    "On its way back it takes those before it along (their gradients are gone); before that, only itself."
    def cancel(self, run):
        if run.in_train and run.iter == 1: raise CancelBatchException
    cb = type('Cancel', (Callback,), {at: cancel, '_order': 1})()
    learn = learner(cb, data=DataBunch(batches(8, 32), None)).fit(1, GradientAccumulation(3))
    part = torch.cat([torch.arange(i*8, i*8 + 8) for i in kept])
    assert close(flat(learn.model), bare_loop([(X[part], Y[part])])[0])


@pytest.mark.filterwarnings('ignore:Length of IterableDataset')
def test_a_pass_that_ends_early_is_told_and_leaves_nothing_to_the_next():
    class Rows(IterableDataset):
        def __len__(self): return 32
        def __iter__(self): return iter([(X[i], Y[i]) for i in range(16)])                 # half of what it says
    with pytest.warns(UserWarning, match='last 2 batches of epoch 0'): learner(data=DataBunch(DataLoader(Rows(), 8), None)).fit(1, GradientAccumulation(4))
    class Cut(Callback):
        def begin_batch(self, run):
            if run.epoch == 0 and run.iter == 1: raise CancelEpochException
    with pytest.warns(UserWarning, match='last 1 batches'): learn = learner(Cut(), data=DataBunch(batches(8, 32), None)).fit(2, GradientAccumulation(4))
    assert close(flat(learn.model), bare_loop(batches(32, 32))[0])


def test_a_search_for_a_rate_with_gradients_that_add_up():
    assert len(learner(GradientAccumulation(2)).lr_find(max_iter=30).losses) == 30


def test_clipping_is_torchs_and_after_all_that_makes_the_gradient():
    for cbs, large in (([], 16), ([GradientAccumulation(4)], 64), ([Scaled()], 16), ([GradientAccumulation(4), Scaled()], 64)):
        learn = learner(steps := Steps(), data=DataBunch(batches(16), None)).fit(2, [GradientClip(.2), *cbs])
        want, norms = bare_loop(batches(large)*2, clip=.2)
        assert close(flat(learn.model), want) and min(norms) > .2
        assert steps.norms == pytest.approx([min(n, .2) for n in norms], rel=1e-4)
    assert close(flat(learner(data=DataBunch(batches(16), None)).fit(1, GradientClip(1e3)).model), bare_loop(batches(16))[0])


@pytest.mark.parametrize('make', [lambda: GradientAccumulation(0), lambda: GradientClip(0.), lambda: GradientClip(math.nan), lambda: EarlyStopping(patience=0)])
def test_numbers_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError): make()


# following a column

class Dictated:
    "A metric that gives `values`, one an epoch."
    def __init__(self, values): self.values, self.i = values, -2                         # reset as the table is made, too
    def reset(self): self.i += 1
    def update(self, pred, yb): pass
    def compute(self): return torch.tensor(self.values[self.i])


class Kept(Callback):
    "The weights at the end of each epoch."
    def __init__(self): self.all = []
    def after_epoch(self, run): self.all.append(flat(run.model))


NAN = math.nan


@pytest.mark.parametrize('values, kw, epochs, best', [
    ([1., 2, 3, 2, 1, 9, 9], dict(patience=2), 5, 2), ([1., 2, 3, 2, 4, 3, 3], dict(patience=2), 7, 4), ([3., 2, 1, 2, 3], dict(bigger=False, patience=1), 4, 2),
    ([1., 1, 1, 1], dict(patience=2), 3, 0), ([1., 1.4, 1.8, 2.2, 2.3], dict(patience=1, min_delta=.5), 2, 0), ([1., 1.6, 2., 2.05], dict(patience=2, min_delta=.5), 4, 1),
    ([NAN, NAN, NAN, 1], dict(patience=2), 2, None), ([1., NAN, 2, NAN, NAN], dict(patience=2), 5, 2), ([-1., -2, -.5], dict(patience=5), 3, 2), ([2., 1], dict(patience=1), 2, 0)])
def test_early_stopping_on_a_dictated_column(values, kw, epochs, best):
    stop = EarlyStopping('valid_Dictated', **kw)
    learn = learner(stats := table(Dictated(values))).fit(len(values), stop)
    assert len(stats.rows) == epochs and stop.best_epoch == best and learn.n_iter == 4*epochs


@pytest.mark.parametrize('values, bigger, best', [([1., 3, 2], None, 1), ([3., 1, 2], False, 1), ([3., 2, 1], None, 0), ([1., 2, 3], None, 2), ([NAN, 1, NAN], None, 1), ([1., 1, 1], None, 0)])
def test_the_best_weights_are_in_the_model_and_in_the_file(values, bigger, best, tmp_path):
    cb = SaveBest('valid_Dictated', tmp_path/'new'/'best.pt', bigger)
    learn = learner(table(Dictated(values)), kept := Kept()).fit(3, cb)
    saved = torch.load(tmp_path/'new'/'best.pt', weights_only=True)
    assert cb.best_epoch == best and flat(learn.model).equal(kept.all[best]) and not kept.all[0].equal(kept.all[1])
    assert all(v.equal(saved[k]) for k, v in learn.model.state_dict().items()) and [f.name for f in (tmp_path/'new').iterdir()] == ['best.pt']


def test_a_second_fit_begins_anew():
    stop, best = EarlyStopping('valid_Dictated', patience=2), SaveBest('valid_Dictated')
    learn = learner(stats := table(Dictated([9., 8, 7, NAN, 2, 1, NAN, NAN])), kept := Kept(), stop, best).fit(3)
    assert best.best == 9 and len(stats.rows) == 3
    learn.fit(3)
    assert best.best == stop.best == 2 and best.best_epoch == 1 and len(stats.rows) == 6 and flat(learn.model).equal(kept.all[4])
    with pytest.warns(UserWarning): learn.fit(2)
    assert best.weights is best.best is None and flat(learn.model).equal(kept.all[7])


class At(Callback):
    def __init__(self, event, error, epoch=2, order=0):
        self._order = order
        setattr(self, event, lambda run: self.now(run, error, epoch))
    def now(self, run, error, epoch):
        if run.epoch == epoch: raise error


@pytest.mark.parametrize('error', [ZeroDivisionError, KeyboardInterrupt, CancelFitException])
def test_the_best_is_put_back_by_whichever_way_the_fit_ends(error):
    learn = learner(table(Dictated([1., 0, 0, 0])), kept := Kept(), SaveBest('valid_Dictated'), At('after_step', error))
    if error is CancelFitException: learn.fit(4)
    else:
        with pytest.raises(error): learn.fit(4)
    assert len(kept.all) == 2 and flat(learn.model).equal(kept.all[0])


def test_the_best_comes_after_those_who_validate_other_weights():
    "As averaging does: its weights while it validates, the training's own put back later, also after an interrupt."
    class Swaps(Callback):
        _order = 13
        def begin_validate(self, run):
            self.own = [p.detach().clone() for p in run.model.parameters()]
            for p in run.model.parameters(): p.data.mul_(1.5)
        def back(self, run):
            for p, o in zip(run.model.parameters(), self.own): p.data.copy_(o)
        after_epoch = after_fit = back
    class Validated(Callback):
        _order = 10
        def __init__(self): self.all = []
        def after_epoch(self, run): self.all.append(flat(run.model))
    learn = learner(table(Dictated([1., 5, 2, 2])), SaveBest('valid_Dictated'), Swaps(), seen := Validated(), At('begin_batch', KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): learn.fit(4)
    assert flat(learn.model).equal(seen.all[1])


def test_in_a_runner():
    model = net()
    stats, best, kept = table(Dictated([1., 3, 2, 2, 2])), SaveBest('valid_Dictated'), Kept()
    Runner(model, toy(), F.cross_entropy, torch.optim.SGD(model.parameters(), .1), [stats, best, kept, EarlyStopping('valid_Dictated')]).fit(5)
    assert len(stats.rows) == 4 and flat(model).equal(kept.all[1])


@pytest.mark.parametrize('name, sign', [*((n, -1) for n in '''loss cross_entropy nll mse rmse mae mape bce_with_logits kl_div huber wer brier ece error_rate perplexity
    mean_absolute_error'''.split()), *((n, 1) for n in 'accuracy f1 MulticlassF1Score precision recall auc top_k dice power piece_recall newer measure'.split())])
def test_which_way_is_better(name, sign):
    assert SaveBest(f'valid_{name}').sign == EarlyStopping(f'train_{name}').sign == sign
    assert Watch(name, bigger=True).sign == 1 and Watch(name, bigger=False).sign == -1


@pytest.mark.parametrize('cb', [SaveBest, EarlyStopping])
def test_a_column_that_is_not_there_is_refused_before_anything_is_trained(cb):
    no_valid = learner(table(accuracy), data=DataBunch(toy().train_dl, None))
    for learn, monitor in ((learner(table(accuracy)), 'valid_acc'), (learner(), 'valid_loss'), (no_valid, 'valid_loss')):
        before = flat(learn.model)
        with pytest.raises(ValueError): learn.fit(1, cb(monitor))
        assert flat(learn.model).equal(before) and learn.n_iter == 0
    no_valid.fit(2, best := SaveBest('train_loss'))
    assert best.best_epoch == 1


def test_the_last_epoch_of_an_early_stop_is_seen_by_all(tmp_path):
    late = Kept()
    late._order = 21
    learn = learner(stats := table(Dictated([3., 1, 1])), late, CSVLogger(tmp_path/'h.csv'), EarlyStopping('valid_Dictated'))
    learn.fit(3)
    assert len(late.all) == len(stats.rows) == 3 == len((tmp_path/'h.csv').read_text().splitlines()) - 1


def test_epochs_without_validation_are_not_counted():
    class Every3(Callback):
        _order, _fit_only = -20, True
        def begin_validate(self, run):
            if (run.epoch + 1) % 3: raise CancelEpochException
    learn = learner(stats := table(), Every3(), lr=0.).fit(20, [EarlyStopping(), best := SaveBest()])
    assert stats.rows[-1]['epoch'] == 8 and best.best_epoch == 2                          # 2 is the best, 5 and 8 are no better
    assert learn.n_iter == 9*4


def test_a_run_without_a_number_ends_with_a_word_and_without_a_file(tmp_path):
    with pytest.warns(UserWarning, match='valid_loss'): learner(table(), lr=1e30).fit(3, [best := SaveBest(path=tmp_path/'b.pt'), EarlyStopping(patience=9)])
    assert best.weights is None and not list(tmp_path.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(ZeroDivisionError): learner(table(), SaveBest(), At('after_step', ZeroDivisionError, 0)).fit(1)      # nothing to say of no epoch
        learner(table(), SaveBest()).fit(1)


def test_the_best_by_a_metric_of_the_whole_set(tmp_path):
    tm = pytest.importorskip('torchmetrics.classification')
    class Reference(Callback):
        _order = 50
        def __init__(self): self.all = []
        def after_epoch(self, run):
            f1 = tm.MulticlassF1Score(3, average='macro')
            with torch.no_grad(): self.all.append(f1(run.model(X[100:]), Y[100:]).item())
    best = SaveBest('valid_MulticlassF1Score', tmp_path/'b.pt')
    learn = learner(stats := table(tm.MulticlassF1Score(3, average='macro')), ref := Reference(), best, data=toy(8), lr=.5).fit(12)
    assert [r['valid_MulticlassF1Score'] for r in stats.rows] == pytest.approx(ref.all) and len({round(v, 6) for v in ref.all}) > 3
    assert best.best_epoch == ref.all.index(max(ref.all))
    learn.model.load_state_dict(torch.load(tmp_path/'b.pt', weights_only=True))
    assert learn.validate()['MulticlassF1Score'] == pytest.approx(max(ref.all))


class GivesState(Callback):
    "As a checkpoint does: last in `begin_fit`, it gives the others what they remembered."
    _order = 1000
    def __init__(self, *pairs): self.pairs = pairs
    def begin_fit(self, run):
        for cb, state in self.pairs: cb.load_state_dict(state)


@pytest.mark.parametrize('k', [1, 2, 3, 4])
def test_state_goes_from_one_process_to_the_next(k, tmp_path):
    "A run of five epochs broken off after `k` stops and ends as the one that nobody touched."
    values = [2., 3, 1, 1, 1, 1]
    def cbs(): return EarlyStopping('valid_Dictated', patience=3), SaveBest('valid_Dictated')
    whole, (stop, best) = learner(table(Dictated(values))), cbs()
    whole.fit(6, [stop, best])
    first, (stop1, best1) = learner(table(Dictated(values))), cbs()
    first.fit(6, [stop1, best1, own := Kept(), At('after_epoch', CancelFitException, k - 1, 950)])
    torch.save([stop1.state_dict(), best1.state_dict()], tmp_path/'state')
    state = torch.load(tmp_path/'state', weights_only=True)                               # plain tensors and numbers
    second, (stop2, best2) = learner(t := table(Dictated([0.]*k + values[k:]))), cbs()
    t.stats[False].metrics[0].i += k
    second.fit(6, [stop2, best2, GivesState((stop2, state[0]), (best2, state[1]))], start=(k, 0))
    assert len(own.all) == k and stop2.waited == stop.waited and (best2.best, best2.best_epoch) == (best.best, best.best_epoch)
    assert second.epoch == whole.epoch == 4 and flat(whole.model).equal(flat(second.model)) == (k >= 2)       # its best was in the first part


def test_what_accumulation_remembers_in_the_middle():
    ga = GradientAccumulation(4)
    class Look(Callback):
        _order = 1000
        def __init__(self): self.all = []
        def begin_batch(self, run): self.all.append(ga.state_dict())
    learner(look := Look(), data=DataBunch(batches(8, 48), None)).fit(1, ga)
    assert look.all == [dict(batches=i, items=8*i) for i in (0, 1, 2, 3, 0, 1)]
    new = GradientAccumulation(4)
    new.load_state_dict(look.all[2])
    assert (new.batches, new.items) == (2, 16)


def test_weights_are_a_copy_also_of_what_is_no_tensor():
    class Counting(nn.Linear):
        seen = [0]
        def get_extra_state(self): return {'seen': self.seen}
        def set_extra_state(self, s): self.seen = s['seen']
    class Count(Callback):
        def begin_epoch(self, run): run.model.seen[0] += 1
    model = Counting(10, 3)
    learner(table(Dictated([3., 2, 1])), Count(), SaveBest('valid_Dictated'), model=model).fit(3)
    assert model.seen == [1]


# files

def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    learner(table()).fit(1, [SaveBest(path='~/a/best.pt'), CSVLogger('~/b/h.csv')])
    assert (tmp_path/'a'/'best.pt').exists() and (tmp_path/'b'/'h.csv').exists() and not (tmp_path/'~').exists()


def test_written_whole_or_not_at_all(tmp_path):
    f = tmp_path/'f'
    for text, error in (('old', None), ('new', ZeroDivisionError), ('new', KeyboardInterrupt), ('newest', None)):
        try:
            with written_whole(f) as tmp:
                tmp.write_text(text)
                if error: raise error
        except BaseException as e: assert type(e) is error
        assert f.read_text() == ('newest' if text == 'newest' else 'old') and [o.name for o in tmp_path.iterdir()] == ['f']


@pytest.mark.skipif(sys.platform == 'win32', reason='no SIGKILL')
@pytest.mark.parametrize('what', ['SaveBest', 'CSVLogger'])
def test_a_kill_in_the_middle_of_writing_leaves_the_old_file(what, tmp_path):
    code = f'''
        import os, signal, sys, csv; sys.path.insert(0, 'tests')
        from test_training_callbacks import *
        cb = {dict(SaveBest=f"SaveBest('valid_Dictated', {str(tmp_path/'f')!r})", CSVLogger=f"CSVLogger({str(tmp_path/'f')!r})")[what]}
        class Half:
            def __init__(self, f): self.f = f
            def write(self, s):
                self.f.write(s[:len(s)//2]); self.f.flush()
                if learn.epoch == 2: os.kill(os.getpid(), signal.SIGKILL)
                self.f.write(s[len(s)//2:])
        save, writer = torch.save, csv.writer
        def half(o, path):
            save(o, path)
            if learn.epoch == 2: os.truncate(path, 300); os.kill(os.getpid(), signal.SIGKILL)
        torch.save, csv.writer = half, lambda f: writer(Half(f))
        learn = learner(table(Dictated([1., 2, 3, 4])), cb)
        learn.fit(4)
    '''
    r = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=ROOT, capture_output=True, timeout=400)
    assert r.returncode == -signal.SIGKILL, r.stderr.decode()[-800:]
    if what == 'SaveBest': assert all(torch.is_tensor(v) for v in torch.load(tmp_path/'f', weights_only=True).values())
    else:
        learner(table(Dictated([1.]*4)), CSVLogger(tmp_path/'f')).fit(4, start=(2, 0))      # goes on, with each epoch once
        assert [r['epoch'] for r in csv.DictReader(open(tmp_path/'f'))] == ['0', '1', '2', '3']


@needs_limits
def test_best_weights_on_a_full_disk(tmp_path):
    learn = learner(table(Dictated([1., 2, 0])), kept := Kept())
    with largest_file(500), pytest.warns(UserWarning, match='best.pt'): learn.fit(3, SaveBest('valid_Dictated', tmp_path/'best.pt'))
    assert not list(tmp_path.iterdir()) and flat(learn.model).equal(kept.all[1])


@needs_limits
def test_a_table_on_a_full_disk_costs_neither_the_training_nor_later_the_rows(tmp_path):
    class Room(Callback):
        "The disk is full from epoch 2 to 4."
        def begin_epoch(self, run):
            if run.epoch == 2: self.limit = largest_file(20); self.limit.__enter__()
            if run.epoch == 5: self.limit.__exit__(None, None, None)
    f = tmp_path/'h.csv'
    class Read(Callback):
        _order = 30
        def __init__(self): self.n = []
        def after_epoch(self, run): self.n.append([len(r) for r in csv.reader(f.open())])
    learn = learner(table(accuracy), read := Read(), Room())
    with pytest.warns(UserWarning, match='h.csv'): learn.fit(6, CSVLogger(f))
    assert learn.n_iter == 24 and [len(n) - 1 for n in read.n] == [1, 2, 2, 2, 2, 6] and {k for n in read.n for k in n} == {6}, 'whole rows only'


def epochs_in(f): return ''.join(r['epoch'] for r in csv.DictReader(open(f, newline='', encoding='utf-8')))


def test_csv_is_the_table(tmp_path):
    def m(pred, yb): return pred.mean()
    m.__name__ = 'größe, mittlere'
    learn = learner(stats := table(accuracy, m), CSVLogger(tmp_path/'new'/'h.csv')).fit(2)
    learn.fit(1)
    rows = list(csv.DictReader(open(tmp_path/'new'/'h.csv', newline='', encoding='utf-8')))
    assert [{k: float(v) for k, v in r.items()} for r in rows] == [pytest.approx(r) for r in stats.rows] and len(rows) == 3
    with pytest.raises(ValueError): learner(table(), CSVLogger(tmp_path/'new'/'h.csv')).fit(1)        # other columns
    with pytest.raises(ValueError): learner(CSVLogger(tmp_path/'i.csv')).fit(1)                       # no table
    assert epochs_in(tmp_path/'new'/'h.csv') == '010' and not (tmp_path/'i.csv').exists()


@pytest.mark.parametrize('fits, want', [
    ([(3, (0, 0)), (4, (2, 0))], '0123'), ([(2, (0, 0)), (2, (0, 0)), (3, (1, 2))], '01012'), ([(3, (0, 0)), (3, (0, 0))], '012012'),
    ([(2, (0, 0)), (3, (2, 0))], '012'), ([(1, (0, 0)), (3, (0, 0)), (3, (2, 0)), (4, (3, 0))], '00123'), ([(3, (0, 0)), (3, (3, 0))], '012')])
def test_a_csv_that_goes_on_has_each_epoch_once(fits, want, tmp_path):
    for epochs, start in fits: learner(table(), CSVLogger(tmp_path/'h.csv')).fit(epochs, start=start)
    assert epochs_in(tmp_path/'h.csv') == want


@pytest.mark.parametrize('tail', ['1,0.5', '1,0.', '\n', ''])
def test_a_csv_whose_last_line_is_half_written(tail, tmp_path):
    f = tmp_path/'h.csv'
    learner(table(), CSVLogger(f)).fit(1)
    f.write_text(f.read_text() + tail)
    learner(table(), CSVLogger(f)).fit(2, start=(1, 0))
    assert epochs_in(f) == '01'


def test_an_empty_csv_is_begun(tmp_path):
    (tmp_path/'h.csv').touch()
    learner(table(), CSVLogger(tmp_path/'h.csv')).fit(1)
    assert epochs_in(tmp_path/'h.csv') == '0'


class Several:
    "A metric of more than one number."
    def reset(self): pass
    def update(self, pred, yb): pass
    def compute(self): return torch.tensor([1., 2.])


def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = learner(stats := table(accuracy, Several()), rec := Recorder()).fit(2, TensorBoardCallback(tmp_path))
    ea = EventAccumulator(str(tmp_path))
    ea.Reload()
    loss, acc = ea.Scalars('batch/loss'), ea.Scalars('epoch/valid_accuracy')
    assert [s.value for s in loss] == pytest.approx(rec.losses) and [s.step for s in loss] == list(range(1, 9))
    assert [s.value for s in acc] == pytest.approx([r['valid_accuracy'] for r in stats.rows]) and [s.step for s in acc] == [4, 8]
    assert [s.value for s in ea.Scalars('batch/lr')] == pytest.approx([.1]*8) and learn.n_iter == 8


def test_without_tensorboard_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    learn = learner()
    with pytest.raises(ImportError, match='pip install tensorboard'): learn.fit(1, TensorBoardCallback())
    assert learn.n_iter == 0


def test_looks_are_without_those_that_report(tmp_path):
    learn = learner(table(), SaveBest(path=tmp_path/'b'), EarlyStopping(patience=1), CSVLogger(tmp_path/'h'), GradientAccumulation(2), GradientClip(1.))
    learn.validate()
    learn.get_preds()
    learn.lr_find(max_iter=10)
    assert not list(tmp_path.iterdir())
