"""09f's callbacks: beside a bare loop of torch's, on tables that are dictated, on full disks and under a kill. Over a kill of the whole run: test_resume."""
import csv
import math
import os
import signal
import sys
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import largest_file
from event_log import Log
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from toys import At, Takes, X, Y, batches, flat, net, raises, stats, toy

from exp.callbacks import AvgStatsCallback, Callback, CancelBatchException, CancelEpochException, CancelFitException, DataBunch, Recorder, Runner, accuracy
from exp.learner import Learner
from exp.optimizers import sgd_mom_opt
from exp.training_callbacks import CSVLogger, EarlyStopping, GradientAccumulation, GradientClip, SaveBest, TensorBoardCallback, Watch, written_whole

SGD = torch.optim.SGD
needs_limits = pytest.mark.skipif(sys.platform == 'win32', reason='no limit of file sizes')


def learner(*cbs, data=None, loss=F.cross_entropy, opt=SGD, lr=.1, model=None): return Learner(model or net(), data or toy(), loss, opt, lr, cbs=list(cbs))
def on(steps, *cbs, **kw): return learner(*cbs, data=DataBunch(steps, None), **kw)
def close(a, b): return torch.allclose(a, b, rtol=0, atol=1e-6)
def at(epoch, iter=None): return lambda run: run.in_train and run.epoch == epoch and iter in (None, run.iter)


def bare_loop(steps, opt=SGD, loss=F.cross_entropy, clip=None):
    "The reference: torch's own, one step for each of `steps`. Weights, and the norms before clipping."
    model, norms = net(), []
    o = opt(model.parameters(), lr=.1)
    for x, y in steps:
        loss(model(x), y).backward()
        if clip: norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        o.step(); o.zero_grad()
    return flat(model), norms


class Norms(Callback):
    _order = 16
    def __init__(self): self.all = []
    def after_backward(self, run): self.all.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm().item())


class Scaled(Callback):
    "As mixed precision does: the loss is scaled on its way back, and the gradients are divided before the step."
    _order = 8
    def after_loss(self, run): run.loss = run.loss*1024
    def after_backward(self, run):
        for p in run.model.parameters(): p.grad.div_(1024)


# accumulation and clipping

@pytest.mark.parametrize('opt', [SGD, partial(SGD, momentum=.9), sgd_mom_opt], ids=['SGD', 'momentum', 'ours'])
@pytest.mark.parametrize('small, n, large', [(16, 4, 64), (25, 2, 50), (7, 5, 35), (3, 99, 100), (32, 1, 32)])
def test_small_batches_accumulated_are_the_large_one(small, n, large, opt):
    "The last batch of 4 items, or of one, and the last step of fewer batches, are among the cases."
    learn = on(batches(small), steps := Norms(), opt=opt).fit(2, GradientAccumulation(n))
    assert close(flat(learn.model), bare_loop(batches(large)*2, opt)[0]) and len(steps.all) == 2*-(-100//large)


def test_others_see_the_loss_of_the_batch():
    want = [F.cross_entropy(net()(x), y).item() for x, y in batches(16)]
    for cbs in ([], [Scaled()]):
        before, rec = [], Recorder()
        learn = on(batches(16), rec, At('after_loss', lambda run, to=before: to.append(run.loss.item()), 6), stats(), lr=0.).fit(1, [GradientAccumulation(3), *cbs])
        assert rec.losses == pytest.approx(want) and before == pytest.approx(want)
        assert learn.cb(AvgStatsCallback).rows[0]['train_loss'] == pytest.approx(F.cross_entropy(net()(X[:100]), Y[:100]).item(), abs=1e-6)


@pytest.mark.parametrize('loss', [partial(F.cross_entropy, ignore_index=1), partial(F.cross_entropy, weight=torch.tensor([1., 5., .2]))], ids=['ignore_index', 'weight'])
def test_count_is_what_the_loss_divides_by(loss):
    w = loss.keywords.get('weight', torch.tensor([1., 0., 1.]))
    def small(*count): return flat(on(batches(8, 32), loss=loss).fit(1, GradientAccumulation(4, *count)).model)
    want, _ = bare_loop(batches(32, 32), loss=loss)
    assert close(small(lambda run: w[run.yb].sum()), want) and not torch.allclose(small(), want, atol=1e-4)


def test_several_inputs_are_counted_by_items():
    for pack in (lambda x: {'x': x}, lambda x: (x, x)):
        learn = on([(pack(X[:40]), Y[:40]), (pack(X[40:42]), Y[40:42])], model=Takes(net())).fit(1, GradientAccumulation(2))
        assert close(flat(learn.model), bare_loop([(X[:42], Y[:42])])[0])


@pytest.mark.parametrize('event, kept', [('after_backward', [2, 3]), ('begin_batch', [0, 2, 3])])
def test_a_batch_that_is_cancelled_does_not_count(event, kept):
    "On its way back it takes those before it along (their gradients are gone); before that, only itself."
    learn = on(batches(8, 32), At(event, raises(CancelBatchException, at(0, 1)), 1)).fit(1, GradientAccumulation(3))
    part = torch.cat([torch.arange(i*8, i*8 + 8) for i in kept])
    assert close(flat(learn.model), bare_loop([(X[part], Y[part])])[0])


@pytest.mark.filterwarnings('ignore:Length of IterableDataset')
def test_a_pass_that_ends_early_is_told_and_leaves_nothing_to_the_next():
    class Rows(IterableDataset):
        def __len__(self): return 32
        def __iter__(self): return iter([(X[i], Y[i]) for i in range(16)])                 # half of what it says
    with pytest.warns(UserWarning, match='2 batches of epoch 0'): on(DataLoader(Rows(), 8)).fit(1, GradientAccumulation(4))
    with pytest.warns(UserWarning, match='1 batches'): learn = on(batches(8, 32), At('begin_batch', raises(CancelEpochException, at(0, 1)))).fit(2, GradientAccumulation(4))
    assert close(flat(learn.model), bare_loop(batches(32, 32))[0])


def test_clipping_is_torchs_and_after_all_that_makes_the_gradient():
    for cbs, large in (([], 16), ([GradientAccumulation(4)], 64), ([Scaled()], 16), ([GradientAccumulation(4), Scaled()], 64)):
        learn = on(batches(16), steps := Norms()).fit(2, [GradientClip(.2), *cbs])
        want, norms = bare_loop(batches(large)*2, clip=.2)
        assert close(flat(learn.model), want) and min(norms) > .2
        assert steps.all == pytest.approx([min(n, .2) for n in norms], rel=1e-4)
    assert close(flat(on(batches(16)).fit(1, GradientClip(1e3)).model), bare_loop(batches(16))[0])


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
    def __init__(self, order=0): self._order, self.all = order, []
    def after_epoch(self, run): self.all.append(flat(run.model))


NAN, DICTATED = math.nan, 'valid_Dictated'


@pytest.mark.parametrize('values, kw, epochs, best', [
    ([1., 2, 3, 2, 1, 9, 9], dict(patience=2), 5, 2), ([1., 2, 3, 2, 4, 3, 3], dict(patience=2), 7, 4), ([3., 2, 1, 2, 3], dict(bigger=False, patience=1), 4, 2),
    ([1., 1, 1, 1], dict(patience=2), 3, 0), ([1., 1.4, 1.8, 2.2, 2.3], dict(patience=1, min_delta=.5), 2, 0), ([1., 1.6, 2., 2.05], dict(patience=2, min_delta=.5), 4, 1),
    ([NAN, NAN, NAN, 1], dict(patience=2), 2, None), ([1., NAN, 2, NAN, NAN], dict(patience=2), 5, 2), ([-1., -2, -.5], dict(patience=5), 3, 2)])
def test_early_stopping_on_a_dictated_column(values, kw, epochs, best, tmp_path):
    "Its last epoch is seen by all others."
    stop, late = EarlyStopping(DICTATED, **kw), Kept(21)
    learn = learner(table := stats(Dictated(values)), late, CSVLogger(tmp_path/'h')).fit(len(values), stop)
    assert len(table.rows) == len(late.all) == len(epochs_in(tmp_path/'h')) == epochs and stop.best_epoch == best and learn.n_iter == 4*epochs


@pytest.mark.parametrize('values, bigger, best', [([1., 3, 2], None, 1), ([3., 1, 2], False, 1), ([3., 2, 1], None, 0), ([NAN, 1, NAN], None, 1), ([1., 1, 1], None, 0)])
def test_the_best_weights_are_in_the_model_and_in_the_file(values, bigger, best, tmp_path):
    cb = SaveBest(DICTATED, tmp_path/'new'/'best.pt', bigger)
    learn = learner(stats(Dictated(values)), kept := Kept()).fit(3, cb)
    saved = torch.load(tmp_path/'new'/'best.pt', weights_only=True)
    assert cb.best_epoch == best and flat(learn.model).equal(kept.all[best]) and not kept.all[0].equal(kept.all[1])
    assert all(v.equal(saved[k]) for k, v in learn.model.state_dict().items()) and [f.name for f in (tmp_path/'new').iterdir()] == ['best.pt']


def test_a_second_fit_begins_anew():
    stop, best = EarlyStopping(DICTATED, patience=2), SaveBest(DICTATED)
    learn = learner(table := stats(Dictated([9., 8, 7, NAN, 2, 1, NAN, NAN])), kept := Kept(), stop, best).fit(3)
    assert best.best == 9 and len(table.rows) == 3
    learn.fit(3)
    assert best.best == stop.best == 2 and best.best_epoch == 1 and len(table.rows) == 6 and flat(learn.model).equal(kept.all[4])
    with pytest.warns(UserWarning): learn.fit(2)
    assert best.weights is best.best is None and flat(learn.model).equal(kept.all[7])


@pytest.mark.parametrize('error', [ZeroDivisionError, KeyboardInterrupt, CancelFitException])
def test_the_best_is_put_back_by_whichever_way_the_fit_ends(error):
    learn = learner(stats(Dictated([1., 0, 0, 0])), kept := Kept(), SaveBest(DICTATED), At('after_step', raises(error, at(2))))
    try: learn.fit(4)
    except (ZeroDivisionError, KeyboardInterrupt): pass
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
    learn = learner(stats(Dictated([1., 5, 2, 2])), SaveBest(DICTATED), Swaps(), seen := Kept(10), At('begin_batch', raises(KeyboardInterrupt, at(2))))
    with pytest.raises(KeyboardInterrupt): learn.fit(4)
    assert flat(learn.model).equal(seen.all[1])


def test_in_a_runner():
    model, table, kept = net(), stats(Dictated([1., 3, 2, 2, 2])), Kept()
    Runner(model, toy(), F.cross_entropy, SGD(model.parameters(), .1), [table, SaveBest(DICTATED), kept, EarlyStopping(DICTATED)]).fit(5)
    assert len(table.rows) == 4 and flat(model).equal(kept.all[1])


@pytest.mark.parametrize('sign, names', [(-1, 'loss cross_entropy nll mse rmse mae mape bce_with_logits kl_div huber wer brier ece error_rate perplexity mean_absolute_error MSE'),
                                         (1, 'accuracy f1 MulticlassF1Score precision recall auc top_k dice power piece_recall newer measure')])
def test_which_way_is_better(sign, names):
    assert {n: Watch(f'{side}_{n}').sign for n in names.split() for side in ('valid', 'train')} == dict.fromkeys(names.split(), sign)
    assert Watch('loss', bigger=True).sign == 1 and Watch('f1', bigger=False).sign == -1


@pytest.mark.parametrize('cb', [SaveBest, EarlyStopping])
def test_a_column_that_is_not_there_is_refused_before_anything_is_trained(cb):
    no_valid = learner(stats(accuracy), data=DataBunch(toy().train_dl, None))
    for learn, monitor in ((learner(stats(accuracy)), 'valid_acc'), (learner(), 'valid_loss'), (no_valid, 'valid_loss')):
        with pytest.raises(ValueError): learn.fit(1, cb(monitor))
        assert learn.n_iter == 0
    no_valid.fit(2, best := SaveBest('train_loss'))
    assert best.best_epoch == 1


def test_epochs_without_validation_are_not_counted():
    every3 = At('begin_validate', raises(CancelEpochException, lambda run: (run.epoch + 1) % 3), -20)
    learner(table := stats(), every3, lr=0.).fit(20, [EarlyStopping(), best := SaveBest()])
    assert table.rows[-1]['epoch'] == 8 and best.best_epoch == 2                          # 2 is the best, 5 and 8 are no better


def test_a_run_without_a_number_ends_with_a_word_and_without_a_file(tmp_path):
    with pytest.warns(UserWarning, match='valid_loss'): learner(stats(), lr=1e30).fit(3, [best := SaveBest(path=tmp_path/'b.pt'), EarlyStopping(patience=9)])
    assert best.weights is None and not list(tmp_path.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(ZeroDivisionError): learner(stats(), SaveBest(), Log('after_step', ZeroDivisionError)).fit(1)      # nothing to say of no epoch
        learner(stats(), SaveBest()).fit(1)


@pytest.mark.parametrize('k', [1, 2, 3])
def test_state_goes_from_one_fit_to_the_next(k, tmp_path):
    "A run broken off after `k` epochs, its state on disk as plain tensors and numbers, stops and ends as the one that nobody touched."
    def run(done=0, *more):
        cbs = EarlyStopping(DICTATED, patience=3), SaveBest(DICTATED)
        learn = learner(table := stats(Dictated([2., 3, 1, 1, 1, 1])))
        table.stats[False].metrics[0].i += done
        if done: more = [At('begin_fit', lambda run: [cb.load_state_dict(s) for cb, s in zip(cbs, torch.load(tmp_path/'state', weights_only=True))], 1000)]
        learn.fit(6, [*cbs, *more], start=(done, 0))
        return learn, *cbs
    whole, stop, best = run()
    torch.save([cb.state_dict() for cb in run(0, At('after_epoch', raises(CancelFitException, lambda run: run.epoch == k - 1), 950))[1:]], tmp_path/'state')
    second, stop2, best2 = run(k)
    assert second.epoch == whole.epoch == 4 and (best2.best, best2.best_epoch, stop2.waited) == (best.best, best.best_epoch, stop.waited)
    assert flat(whole.model).equal(flat(second.model)) == (k > 1)                         # its best was in the first part


def test_weights_are_a_copy_also_of_what_is_no_tensor():
    class Counting(nn.Linear):
        seen = [0]
        def get_extra_state(self): return {'seen': self.seen}
        def set_extra_state(self, s): self.seen = s['seen']
    def count(run): run.model.seen[0] += 1
    learner(stats(Dictated([3., 2, 1])), At('begin_epoch', count), SaveBest(DICTATED), model=(model := Counting(10, 3))).fit(3)
    assert model.seen == [1]


# files

@pytest.mark.parametrize('end', [ZeroDivisionError, KeyboardInterrupt, pytest.param(None, marks=pytest.mark.skipif(not hasattr(os, 'fork'), reason='no SIGKILL'), id='a kill')])
def test_written_whole_or_not_at_all(end, tmp_path):
    f = tmp_path/'f'
    def write(text, end=None):
        with written_whole(f) as tmp:
            tmp.write_text(text)
            if end: end()
    def fail(): raise end
    write('old')
    if end:
        with pytest.raises(end): write('new', fail)
        assert [o.name for o in tmp_path.iterdir()] == ['f']
    elif pid := os.fork(): os.waitpid(pid, 0)
    else: write('new', lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert f.read_text() == 'old'
    write('newest')
    assert f.read_text() == 'newest' and [o.name for o in tmp_path.iterdir()] == ['f']


@needs_limits
def test_best_weights_on_a_full_disk(tmp_path):
    learn = learner(stats(Dictated([1., 2, 0])), kept := Kept())
    with largest_file(500), pytest.warns(UserWarning, match='best.pt'): learn.fit(3, SaveBest(DICTATED, tmp_path/'best.pt'))
    assert not list(tmp_path.iterdir()) and flat(learn.model).equal(kept.all[1])


@needs_limits
def test_a_table_on_a_full_disk_costs_neither_the_training_nor_later_the_rows(tmp_path):
    f, n, full = tmp_path/'h.csv', [], largest_file(20)
    def begin(run):
        if run.epoch == 2: full.__enter__()
        if run.epoch == 5: full.__exit__(None, None, None)
    def read(run): n.append([len(r) for r in csv.reader(f.open())])
    learn = learner(stats(accuracy), At('after_epoch', read, 30), At('begin_epoch', begin))
    with pytest.warns(UserWarning, match='h.csv'): learn.fit(6, CSVLogger(f))
    assert learn.n_iter == 24 and [len(n) - 1 for n in n] == [1, 2, 2, 2, 2, 6] and {k for n in n for k in n} == {6}, 'whole rows only'


def read(f): return list(csv.DictReader(open(f, newline='', encoding='utf-8')))
def epochs_in(f): return ''.join(r['epoch'] for r in read(f))


def test_csv_is_the_table(tmp_path):
    def m(pred, yb): return pred.mean()
    m.__name__, f = 'größe, mittlere', tmp_path/'new'/'h.csv'
    for _ in range(2): learn = learner(table := stats(accuracy, m), CSVLogger(f)).fit(2)
    learn.fit(1)
    assert [{k: float(v) for k, v in r.items()} for r in read(f)[2:]] == [pytest.approx(r) for r in table.rows] and epochs_in(f) == '01010'
    with pytest.raises(ValueError): learner(stats(), CSVLogger(f)).fit(1)                             # other columns
    with pytest.raises(ValueError): learner(CSVLogger(tmp_path/'i.csv')).fit(1)                       # no table
    assert epochs_in(f) == '01010' and not (tmp_path/'i.csv').exists()


@pytest.mark.parametrize('fits, want', [
    ([(3, (0, 0)), (4, (2, 0))], '0123'), ([(2, (0, 0)), (2, (0, 0)), (3, (1, 2))], '01012'), ([(3, (0, 0)), (3, (0, 0))], '012012'),
    ([(2, (0, 0)), (3, (2, 0))], '012'), ([(1, (0, 0)), (3, (0, 0)), (3, (2, 0)), (4, (3, 0))], '00123'), ([(3, (0, 0)), (3, (3, 0))], '012')])
def test_a_csv_that_goes_on_has_each_epoch_once(fits, want, tmp_path):
    for epochs, start in fits: learner(stats(), CSVLogger(tmp_path/'h.csv')).fit(epochs, start=start)
    assert epochs_in(tmp_path/'h.csv') == want


def test_a_csv_whose_last_line_is_half_written_and_an_empty_one(tmp_path):
    for i, tail in enumerate(['1,0.5', '1,0.', '\n', '']):
        f = tmp_path/str(i)
        f.touch()
        learner(stats(), CSVLogger(f)).fit(1)
        f.write_text(f.read_text() + tail)
        learner(stats(), CSVLogger(f)).fit(2, start=(1, 0))
        assert epochs_in(f) == '01'


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    for k in ('HOME', 'USERPROFILE'): monkeypatch.setenv(k, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    learner(stats()).fit(1, [SaveBest(path='~/a/best.pt'), CSVLogger('~/b/h.csv')])
    assert {p.name for p in tmp_path.rglob('*')} == {'a', 'b', 'best.pt', 'h.csv'}


class Several:
    "A metric of more than one number."
    def reset(self): pass
    def update(self, pred, yb): pass
    def compute(self): return torch.tensor([1., 2.])


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learner(table := stats(accuracy, Several()), rec := Recorder()).fit(2, TensorBoardCallback(tmp_path))
    ea = EventAccumulator(str(tmp_path))
    ea.Reload()
    for name, values, steps in (('batch/loss', rec.losses, range(1, 9)), ('batch/lr', [.1]*8, range(1, 9)), ('epoch/valid_accuracy', [r['valid_accuracy'] for r in table.rows], [4, 8])):
        assert [s.value for s in ea.Scalars(name)] == pytest.approx(values) and [s.step for s in ea.Scalars(name)] == list(steps)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)                     # not installed
    with pytest.raises(ImportError, match='pip install tensorboard'): learner().fit(1, TensorBoardCallback())


def test_looks_are_without_those_that_report(tmp_path):
    learn = learner(stats(), SaveBest(path=tmp_path/'b'), EarlyStopping(patience=1), CSVLogger(tmp_path/'h'), GradientAccumulation(2), GradientClip(1.))
    learn.validate(); learn.get_preds()
    assert len(learn.lr_find(max_iter=10).losses) == 10 and not list(tmp_path.iterdir())
