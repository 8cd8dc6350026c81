"Optimizers without a Learner, and steppers and stats of one's own, as notebook 09 and the slides write them."
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from exp.optimizers import (AverageGrad, AverageSqrGrad, Optimizer, Stat, StatefulOptimizer, StepCount, adam_opt, adam_step, debias, lamb,
                            lars, momentum_step, norm_bias_groups, sgd_mom_opt, sgd_opt, sgd_step, weight_decay)

model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
xb, yb = torch.randn(16, 4), torch.randint(0, 2, (16,))


def train(opt: Optimizer):
    for _ in range(2):
        F.cross_entropy(model(xb), yb).backward()
        opt.step()
        opt.zero_grad()
    return opt.hypers[0]['lr']


train(sgd_opt(model.parameters(), lr=.1))
train(sgd_mom_opt(list(model.parameters()), lr=.1, mom=.9, wd=1e-2))
train(adam_opt()(model.parameters(), lr=1e-3))
train(adam_opt(xtra_step=weight_decay)(model.parameters(), lr=1e-3, wd=.01))
train(lamb(model.parameters(), lr=1e-3, wd=.01))
train(lars(model.parameters(), lr=1e-3))
train(lamb(norm_bias_groups(model), lr=1e-3, wd=.01))
train(Optimizer(model.parameters(), steppers=[weight_decay, sgd_step], lr=.1, wd=1e-4))
train(Optimizer([list(model[0].parameters()), list(model[2].parameters())], steppers=[sgd_step], lr=.1))


# the slides'
def lamb_step(p, lr, mom, mom_damp, step, sqr_mom, sqr_damp, grad_avg, sqr_avg, eps, wd, **kwargs):
    debias1 = debias(mom, mom_damp, step)
    debias2 = debias(sqr_mom, sqr_damp, step)
    r1 = p.data.pow(2).mean().sqrt()
    step = (grad_avg/debias1) / ((sqr_avg/debias2).sqrt() + eps) + wd*p.data
    r2 = step.pow(2).mean().sqrt()
    p.data.add_(step, alpha=-lr * min(r1/r2, 10))
    return p


lamb_step._defaults = dict(eps=1e-6, wd=0.)
mine = partial(StatefulOptimizer, steppers=lamb_step, stats=[AverageGrad(dampening=True), AverageSqrGrad(), StepCount()])
train(mine(model.parameters(), lr=1e-3))
train(StatefulOptimizer(model.parameters(), [adam_step, weight_decay], stats=[AverageGrad(dampening=True), AverageSqrGrad(), StepCount()], lr=1e-3))


# a reader's
class SignCount(Stat):
    _defaults = dict(keep=.9)
    def init_state(self, p): return {'signs': torch.zeros_like(p)}
    def update(self, p, state, keep, **kwargs):
        state['signs'].mul_(keep).add_(p.grad.sign())
        return state


def sign_step(p, lr, signs, **kwargs): p.add_(signs.sign(), alpha=-lr)


opt = StatefulOptimizer(model.parameters(), steppers=[sign_step], stats=SignCount(), lr=1e-3)
train(opt)
train(StatefulOptimizer(model.parameters(), [momentum_step], stats=AverageGrad(), lr=1e-3))
for group, hypers in zip(opt.param_groups, opt.hypers): print(len(group), hypers['lr'])
saved = opt.state_dict()
opt.load_state_dict(saved)
print(len(opt.state))
