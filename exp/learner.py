"One object that holds all that training needs, and that can fit, find its learning rate, validate and predict."

__all__ = ['one_group', 'spread_lrs', 'CancelStepException', 'split_batch', 'join_batches', 'in_order', 'bare', 'left_out', 'fit_only',
           'FIT_ONLY', 'sum_over_processes', 'summed', 'SumStats', 'Explain', 'Learner', 'get_learner', 'set_seed']

import itertools, os, random
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset, WeightedRandomSampler

from .annealing import ParamScheduler, combine_scheds, cos_1cycle_anneal
from .callbacks import (EVENTS, AvgStats, AvgStatsCallback, Callback, CancelBatchException, CancelEpochException,
                        CancelFitException, Recorder, check_events, column_names, get_hypers, metric_name)
from .convnets import get_cnn_model, init_cnn
from .lr_find import LR_Find, snapshot
from .optimizers import listify, sgd_opt

class CancelStepException(Exception):
    "Raised by a callback after `backward`: no step now; the gradients stay and the next batch's are added."

def one_group(model):
    "A splitter: all parameters of `model` in one group."
    return [list(model.parameters())]

def spread_lrs(lr, n: int) -> list:
    "`lr` as a list of `n`, one a group: a number for all; a list as it is; `slice(low, high)` in equal ratios from the first on."
    if isinstance(lr, slice):
        low, high = lr.start, lr.stop
        if not high or n > 1 and not low: raise ValueError(f'{lr}: slice(low, high) with both above 0 is wanted')
        return [low*(high/low)**(i/(n - 1)) for i in range(n)] if n > 1 else [high]
    lrs = list(lr) if isinstance(lr, (list, tuple)) else [lr]*n
    if len(lrs) != n: raise ValueError(f'{len(lrs)} learning rates for {n} parameter groups')
    return lrs

def split_batch(b):
    "`(xb, yb)` of what a loader gives; a batch without targets gets an empty `yb`. Raises `ValueError` for more than two parts."
    if not isinstance(b, (list, tuple)): return b, torch.empty(0)
    if len(b) > 2: raise ValueError(f'a batch of {len(b)} parts: (inputs, targets) is wanted, or inputs alone')
    return (b[0], b[1]) if len(b) > 1 else (b[0], torch.empty(0))

def join_batches(parts):
    """One batch of many, on the CPU: tensors end to end; tuples, lists and dictionaries of tensors part by part.

    Raises `TypeError` where there is anything else in them."""
    first = parts[0]
    if torch.is_tensor(first): return torch.cat([p.cpu() for p in parts])
    if isinstance(first, dict): return {k: join_batches([p[k] for p in parts]) for k in first}
    if isinstance(first, (tuple, list)): return type(first)(map(join_batches, zip(*parts)))
    raise TypeError(f'a {type(first).__name__} cannot be put together with those of other batches: tensors are wanted, or tuples, lists, dictionaries of them')

def in_order(dl):
    "`dl` with each item once, in the data's own order: what its `each_once()` says, or a new loader where torch's shuffles or drops."
    if hasattr(dl, 'each_once'): return dl.each_once()
    if not isinstance(dl, DataLoader) or isinstance(dl.dataset, IterableDataset): return dl
    batches = dl.batch_sampler
    s = dl.sampler if batches is None else getattr(batches, 'sampler', batches)
    if isinstance(s, SequentialSampler) and not dl.drop_last: return dl
    ds = dl.dataset
    if not isinstance(s, (SequentialSampler, RandomSampler, WeightedRandomSampler)):      # a part of the data: its items only
        ds = Subset(ds, sorted({int(i) for i in np.concatenate([np.ravel(i) for i in s])}))
    return DataLoader(ds, dl.batch_size or 64, collate_fn=dl.collate_fn, num_workers=dl.num_workers)

def bare(model):
    "The model inside the wrappers that training puts around it (`DistributedDataParallel`, `torch.compile`)."
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)): model = model.module
        elif hasattr(model, '_orig_mod'): model = model._orig_mod
        else: return model

def left_out(model, opt) -> list:
    "Names of the parameters of `model` that train and are not in `opt`."
    there = {id(p) for g in opt.param_groups for p in (g['params'] if isinstance(g, dict) else g)}
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in there]

FIT_ONLY = AvgStatsCallback, Recorder, ParamScheduler
def fit_only(cb) -> bool:
    "Whether `cb` belongs to a fit alone: it reports or schedules, and shapes no batch. A class says so by `_fit_only = True`."
    return getattr(cb, '_fit_only', isinstance(cb, FIT_ONLY))

def sum_over_processes(*ts):
    "Sums of the tensors over all processes of a distributed run; alone, the tensors as they are."
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for t in ts: torch.distributed.all_reduce(t)
    return ts

def summed(stats):
    "Sums (loss, metrics) and count of an `AvgStats`, over all processes."
    count = torch.tensor(float(stats.count), dtype=torch.float64, device=stats.totals.device)
    totals, count = sum_over_processes(stats.totals.double(), count)
    return totals, count.item()

class SumStats(Callback):
    "Before `AvgStatsCallback` writes its row: sums and counts of all processes, so that each row is of all the data."
    _order, _fit_only = AvgStatsCallback._order - 1, True
    def after_epoch(self, run):
        tables = [cb for cb in run.cbs if isinstance(cb, AvgStatsCallback)]
        for s in [s for cb in tables for s in cb.stats.values()]:
            if s.totals is not None: s.totals, s.count = summed(s)

# what is wrong between predictions and targets

_BY_CLASS = F.cross_entropy, F.nll_loss, nn.CrossEntropyLoss, nn.NLLLoss
_OF_LOGITS = F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss
_BY_PAIR = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss,
            nn.HuberLoss, nn.BCELoss, *_OF_LOGITS)

def compares(loss_func, kinds) -> bool:
    "Whether the loss is one of these functions or classes, or a `partial` of one."
    f = getattr(loss_func, 'func', loss_func)
    return f in kinds or type(f) in kinds

class Explain(Callback):
    """Says in a sentence what is wrong between predictions and targets. Looks at the first batch of a fit, where a misfit may be silent
    (`mse_loss` stretches (N, 1) and (N,) to (N, N)), and otherwise only once something has raised. Raises `ValueError`."""
    def begin_fit(self, learn): self.new = True
    def after_pred(self, learn):
        if not self.new: return
        self.new = False
        if why := self.misfit(learn): raise ValueError(why)

    def after_error(self, learn):
        if learn.pred is None or isinstance(learn.error, torch.OutOfMemoryError): return
        why = self.misfit(learn) or self.no_scalar(learn)
        if why and why != str(learn.error): raise ValueError(why) from learn.error

    def where(self, learn):
        return f'{"training" if learn.in_train else "validation"} batch {learn.iter} of epoch {learn.epoch}'

    def misfit(self, learn):
        "A sentence, or None where predictions and targets fit the loss, or where nothing is known of it."
        pred, yb, f = learn.pred, learn.yb, learn.loss_func
        by_class, by_pair = compares(f, _BY_CLASS), compares(f, _BY_PAIR)
        if not (by_class or by_pair) or not torch.is_tensor(pred) or not torch.is_tensor(yb): return None
        name, wanted = metric_name(f), tuple(pred.shape[:1] + pred.shape[2:])
        why = None
        if not yb.numel(): why = 'this batch has no targets'
        elif pred.shape[:1] != yb.shape[:1]: why = 'one row of each for every item is wanted'
        elif by_pair and pred.shape != yb.shape: why = f'{name} compares number with number: give both one shape'
        elif by_class and yb.is_floating_point() and pred.shape != yb.shape: why = f'{name} wants class indices, int64 {wanted}'
        elif by_class and not yb.is_floating_point(): why = self.wrong_labels(pred, yb, f)
        shapes = f'the model gives {tuple(pred.shape)}, the targets are {str(yb.dtype)[6:]} {tuple(yb.shape)}'
        return why and f'{self.where(learn)}: {shapes}; {why}'

    def wrong_labels(self, pred, yb, f):
        if pred.dim() < 2: return f'{metric_name(f)} wants a row of scores for each item'
        ignored = getattr(f, 'keywords', {}).get('ignore_index', getattr(f, 'ignore_index', -100))
        bad = yb[((yb < 0) | (yb >= pred.shape[1])) & (yb != ignored)]
        if not len(bad): return None
        return f'the model has {pred.shape[1]} outputs, so labels go from 0 to {pred.shape[1] - 1}; {len(bad)} of {yb.numel()} do not, the first is {bad[0].item()}'

    def no_scalar(self, learn):
        loss = learn.loss
        if loss is None or torch.is_tensor(loss) and loss.numel() == 1: return None
        got = f'has shape {tuple(loss.shape)}' if torch.is_tensor(loss) else f'is a {type(loss).__name__}'
        return f'{self.where(learn)}: the loss {got}; one number, a tensor, is wanted: say the mean over the items'

class Learner:
    """A model, its data, a loss, and the recipe for an optimizer: everything that training needs, in one place.

    `opt_func(params, lr=…)`: ours or torch's. `splitter(model)`: lists of parameters, one a group, each with its own `lr` (`spread_lrs`).
    `cbs`: callbacks; `cb_funcs`: functions that make them, so that a list of them can serve several learners."""
    def __init__(self, model, data, loss_func, opt_func=sgd_opt, lr=1e-2, splitter=one_group, cbs=None, cb_funcs=None):
        self.model, self.data, self.loss_func = model, data, loss_func
        self.opt_func, self.lr, self.splitter = opt_func, lr, splitter
        self.opt, self.logger, self.cbs, self.start, self.error = None, print, [], (0, 0), None
        self.in_train, self.epoch, self.n_epochs, self.iter, self.n_iter = False, 0, 0, 0, 0
        self.xb = self.yb = self.pred = self.loss = None
        self.add_cbs([Explain(), *listify(cbs), *(f() for f in listify(cb_funcs))])

    def __call__(self, event):
        for f in self.calls[event]: f(self)

    def __repr__(self):
        n = sum(p.numel() for p in self.model.parameters())
        return f'Learner: {type(self.model).__name__} of {n:,} parameters, {self.n_iter:,} batches trained so far'

    def add_cbs(self, cbs):
        "Listen to these too, from the next event on. Raises `AttributeError` for a method that looks like an event and is none."
        new = [check_events(cb) for cb in listify(cbs) if not any(cb is old for old in self.cbs)]
        self.cbs = [*self.cbs, *new]
        ordered = sorted(self.cbs, key=lambda cb: getattr(cb, '_order', 0))
        self.calls = {e: [getattr(cb, e) for cb in ordered if hasattr(cb, e)] for e in EVENTS}

    def remove_cbs(self, cbs):
        "Stop listening to these."
        gone = listify(cbs)
        self.cbs = [cb for cb in self.cbs if not any(cb is g for g in gone)]
        self.add_cbs([])

    def cb(self, cls):
        "The first callback of class `cls`. Raises `KeyError` with those there are."
        for cb in self.cbs:
            if isinstance(cb, cls): return cb
        raise KeyError(f'this learner has no {cls.__name__}; it has {", ".join(type(cb).__name__ for cb in self.cbs)}')

    # training

    def one_batch(self, i, b):
        "Batch `b`, number `i` of its pass: prediction, loss and, in training, a step, each with its event."
        self.iter, self.pred, self.loss = i, None, None
        try:
            self.xb, self.yb = split_batch(b)
            self('begin_batch')
            self.pred = self.model(self.xb);                     self('after_pred')
            self.loss = self.loss_func(self.pred, self.yb);      self('after_loss')
            if self.in_train:
                self.step()
                self.n_iter += 1
            self('after_batch')
        except CancelBatchException: self('after_cancel_batch')

    def step(self):
        "From the loss to new weights."
        try:
            self.loss.backward();      self('after_backward')
            self.opt.step();           self('after_step')
        except CancelStepException: return                      # the gradients are kept for the next batch
        except CancelBatchException: self.opt.zero_grad(); raise
        self.opt.zero_grad()

    def one_pass(self, dl, train, skip=0):
        "One pass over the loader `dl`, training or not; `skip` leaves out its first batches, which a fit before has seen."
        self.dl, self.in_train, self.iters = dl, train, len(dl)
        self.model.train(train)
        if train: self.opt.zero_grad()                          # nothing is left of a pass that was cut short
        try:
            with torch.set_grad_enabled(train):
                if not train: self('begin_validate')
                for i, b in enumerate(itertools.islice(dl, skip, None), skip): self.one_batch(i, b)
        except CancelEpochException: self('after_cancel_epoch')

    def make_opt(self):
        "A new optimizer: `opt_func` on the groups of `splitter`, each with its learning rate, its own or the learner's."
        groups = [dict(g) if isinstance(g, dict) else {'params': list(g)} for g in self.splitter(self.model)]
        lrs = spread_lrs(self.lr, len(groups))
        opt = self.opt_func([{'lr': lr, **g} for g, lr in zip(groups, lrs)], lr=lrs[-1])
        for g in opt.param_groups:
            if 'weight_decay' in g and 'wd' in g: g['weight_decay'] = g.pop('wd')       # torch's word for it
        return opt

    def ready_opt(self, reset=False):
        "The optimizer there is, or a new one. Raises `ValueError` where it lacks parameters that are to be trained now."
        if self.opt is None or reset: self.opt = self.make_opt()
        modules = [self.model, *([self.loss_func] if isinstance(self.loss_func, nn.Module) else [])]
        if lost := [n for m in modules for n in left_out(m, self.opt)]:
            raise ValueError(f'the optimizer leaves out {len(lost)} parameters ({", ".join(lost[:3])}): freeze them, put them in the model and in '
                             'a group of the splitter, or, where the optimizer is older than they are, make a new one with reset_opt=True')

    def fit(self, epochs: int, cbs=None, reset_opt: bool = False, start=(0, 0)) -> 'Learner':
        """Train for `epochs` passes, validating after each; called again it goes on with weights and optimizer as they are.

        `cbs` listen during this fit only. `start`: epoch and batch to begin at, for a fit that was broken off."""
        if epochs < 0: raise ValueError(f'epochs must be 0 or more, not {epochs}')
        self.ready_opt(reset_opt)
        with self.this_fit(cbs):
            self.n_epochs, self.epoch, self.start = epochs, start[0], tuple(start)
            self('begin_fit')
            for self.epoch in range(start[0], epochs):
                self('begin_epoch')
                self.one_pass(self.data.train_dl, True, start[1] if self.epoch == start[0] else 0)
                if self.data.valid_dl is not None: self.one_pass(self.data.valid_dl, False)
                self('after_epoch')
        return self

    @contextmanager
    def this_fit(self, cbs=None):
        """What holds for one fit: `cbs` listen; whatever happened, `after_fit` reaches every callback at the end, and what they have
        put in the place of model, data, loss and logger is the old one again. An exception is announced first: `after_error`."""
        before = {k: getattr(self, k) for k in ('cbs', 'model', 'data', 'loss_func', 'logger')}
        try:
            self.add_cbs(cbs)
            try: yield
            except CancelFitException: self('after_cancel_fit')
            except Exception as e: self.error = e; self('after_error'); raise
            finally: self.end_fit(self.calls['after_fit'])
        finally:
            self.error = None
            for k, v in before.items(): setattr(self, k, v)
            self.add_cbs([])

    def end_fit(self, calls):
        "Call all of `calls`, also those after one that fails."
        self.opt.zero_grad()
        for i, f in enumerate(calls):
            try: f(self)
            except Exception: self.end_fit(calls[i+1:]); raise

    def fit_one_cycle(self, epochs: int, lr=None, pct_start=.25, div=25., final_div=1e5, moms=(.95, .85, .95), cbs=None,
                      reset_opt: bool = False, start=(0, 0)) -> 'Learner':
        """`fit` with one cycle: the rate from `lr/div` up to `lr` in the first `pct_start` of the time, down to `lr/final_div` in the rest.

        Momentum, where the optimizer has one, goes through `moms` meanwhile (None: it stays). Source: Smith 2018 (arXiv 1803.09820)."""
        self.ready_opt(reset_opt)
        groups = get_hypers(self.opt)
        def cycle(*ends): return combine_scheds([pct_start, 1 - pct_start], cos_1cycle_anneal(*ends))
        lrs = spread_lrs(self.lr if lr is None else lr, len(groups))
        scheds = [ParamScheduler('lr', [cycle(l/div, l, l/final_div) for l in lrs])]
        mom = [k for k in ('mom', 'momentum') if groups[0].get(k)] if moms else []
        scheds += [ParamScheduler(k, cycle(*moms)) for k in mom]
        return self.fit(epochs, [*scheds, *listify(cbs)], start=start)

    # looking, with nothing left changed

    @contextmanager
    def untouched(self, weights=True):
        "What is done inside leaves no trace, also after an exception. `weights=False` is for looks that take no step."
        loaders = [dl for dl in (self.data.train_dl, self.data.valid_dl, getattr(self.data, 'test_dl', None)) if dl is not None]
        back = snapshot(self.model, self.opt, loaders, [self, *self.cbs], weights)
        try: yield self
        finally: back()

    @contextmanager
    def looking(self, cbs=None, weights=False):
        "A look at model or data: callbacks that shape a batch are at work, those that report or schedule are not; nothing is left changed."
        with self.untouched(weights):
            self.cbs, self.logger = [cb for cb in self.cbs if not fit_only(cb)], lambda *args: None
            self.add_cbs([])
            self.opt = self.opt or SimpleNamespace(state={}, hypers=[], param_groups=[], zero_grad=lambda: None)
            with self.this_fit(cbs): yield self

    def lr_find(self, min_lr=1e-6, max_lr=10., max_iter: int = 100) -> LR_Find:
        "Try rates on `max_iter` training batches with a new optimizer: an `LR_Find` with `plot()` and `suggestion`. Nothing is changed."
        finder, epochs = LR_Find(max_iter, min_lr, max_lr), -(-max_iter//len(self.data.train_dl))
        with self.looking(weights=True): self.fit(epochs, finder, reset_opt=True)
        return finder

    def look(self, dl, f):
        "A pass over `dl` (default: validation), each item once, in evaluation mode; `f(learn)` after each batch. Nothing is changed."
        dl = self.data.valid_dl if dl is None else dl
        if dl is None: raise ValueError('there is no validation data, and no other loader was given')
        after = SimpleNamespace(_order=AvgStatsCallback._order, after_batch=f)
        with self.looking(after):
            self('begin_fit')
            self.one_pass(in_order(dl), False)

    def validate(self, dl=None, metrics=None) -> dict:
        "Loss and metrics on `dl` (default: the validation set), each item counted once. Nothing is changed."
        own = next((cb.stats[False].metrics for cb in self.cbs if isinstance(cb, AvgStatsCallback)), [])
        stats = AvgStats(own if metrics is None else listify(metrics), False)
        self.look(dl, stats.accumulate)
        if not stats.count: raise ValueError('there was no batch to validate on')
        stats.totals, stats.count = summed(stats)
        return dict(zip(column_names(stats.metrics), stats.avg_stats))

    def get_preds(self, dl=None, act=None) -> tuple:
        "`(preds, targets)` on the CPU, row i for item i of `dl` (default: validation), shuffled or not; targets None for none."
        parts = []
        with self.untouched(weights=False):
            self.loss_func = lambda pred, yb: torch.zeros(())               # there may be no targets
            self.look(dl, lambda learn: parts.append(join_batches([(learn.pred, learn.yb)])))
        if not parts: raise ValueError('there was no batch to predict')
        preds, ys = join_batches(parts)
        return preds if act is None else act(preds), ys if len(ys) else None

    def predict(self, item) -> tuple:
        "`(label, probabilities)` of one item: what the data's items are (a file, say), or a tensor as the model's batches hold it."
        x = item if torch.is_tensor(item) else self.data.item(item)
        preds, _ = self.get_preds([(x[None],)])
        return self.data.decode(preds[0]) or self.decode(preds[0])

    def decode(self, pred) -> tuple:
        "What one prediction (C,) says, where the data has no words: by the loss, a value, the numbers of several classes, or of one."
        if compares(self.loss_func, _OF_LOGITS): return (pred > 0).nonzero().flatten().tolist(), pred.sigmoid()
        if compares(self.loss_func, _BY_PAIR) or pred.numel() == 1: return pred.squeeze().tolist(), pred
        return pred.argmax().item(), pred.softmax(0)

def get_learner(nfs, data, lr, layer, loss_func=F.cross_entropy, cb_funcs=None, opt_func=sgd_opt, cbs=None, splitter=one_group, **kwargs):
    "A `Learner` on the lesson's CNN: channels `nfs`, layers made by `layer(ni, nf, ks, stride=…, **kwargs)`, Kaiming initialisation."
    model = init_cnn(get_cnn_model(data, nfs, layer, **kwargs))
    return Learner(model, data, loss_func, opt_func, lr, splitter, cbs, cb_funcs)

def set_seed(seed, deterministic=False):
    """Seeds torch (every device), numpy and random. `deterministic`: torch raises an error where an operation has no reproducible form.

    That is a switch of the whole process: a later `set_seed(seed)` leaves it on."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
