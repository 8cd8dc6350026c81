"Callbacks of one's own, a schedule, and what a fit has recorded, as notebooks 04, 05 and 09b have them."
import torch
import torch.nn.functional as F
from torch import nn

from exp.annealing import ParamScheduler, combine_scheds, cos_1cycle_anneal, sched_cos, sched_exp, sched_lin
from exp.callbacks import AvgStatsCallback, Callback, CancelFitException, DataBunch, Dataset, Recorder, accuracy, get_dls
from exp.learner import Learner
from exp.optimizers import sgd_mom_opt

x, y = torch.randn(128, 10), torch.randint(0, 3, (128,))
data = DataBunch(*get_dls(Dataset(x, y), Dataset(x, y), bs=32), c_out=3)


class Print(Callback):
    _order = AvgStatsCallback._order + 1
    def __init__(self, every=1): self.every, self.seen = every, []
    def begin_fit(self, learn: Learner): self.seen.clear()
    def begin_batch(self, learn: Learner): learn.xb = learn.xb*2
    def after_loss(self, learn: Learner):
        if learn.in_train and learn.iter % self.every == 0: self.seen.append(learn.loss.item())
    def after_batch(self, learn: Learner): print(learn.epoch, learn.iter, learn.iters, learn.pred.shape, learn.yb.shape, learn.opt.hypers[0]['lr'])
    def after_epoch(self, learn: Learner):
        if learn.epoch == 1: raise CancelFitException
    def after_fit(self, learn: Learner): learn.logger(f'{len(self.seen)} of {learn.n_epochs} epochs')


class NoBase:
    def after_backward(self, learn): learn.model.weight.grad.clamp_(-1, 1)


def top2(pred, yb): return (pred.topk(2).indices == yb[:, None]).any(1).float().mean()


model = nn.Linear(10, 3)
sched = combine_scheds([.3, .7], [sched_cos(.1, .6), sched_lin(.6, .1)])
learn = Learner(model, data, F.cross_entropy, sgd_mom_opt, lr=.1, cbs=[AvgStatsCallback(accuracy, top2), Recorder(), Print(every=2)])
learn.fit(3, cbs=[ParamScheduler('lr', sched), ParamScheduler('mom', sched_exp(.95, .85)), NoBase()])
learn.fit(1, ParamScheduler('lr', [combine_scheds([.5, .5], cos_1cycle_anneal(.1, .3, .05))]))
rec = learn.cb(Recorder)
print(len(rec.losses), min(rec.losses))
for row in learn.cb(AvgStatsCallback).rows: print(row['epoch'], row['valid_top2'])
