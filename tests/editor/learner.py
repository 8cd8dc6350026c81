"A Learner from its data to a prediction, as notebook 09b and the README use it."
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from exp.annealing import combine_scheds, cos_1cycle_anneal
from exp.batchnorm import conv_layer
from exp.callbacks import AvgStatsCallback, BatchTransformXCallback, CudaCallback, DataBunch, Dataset, accuracy, get_dls
from exp.learner import Learner, get_learner, set_seed
from exp.optimizers import adam_opt, sgd_mom_opt

set_seed(42)
x, y = torch.randn(256, 1, 16, 16), torch.randint(0, 3, (256,))
train_dl, valid_dl = get_dls(Dataset(x, y), Dataset(x, y), bs=16)
data = DataBunch(train_dl, valid_dl, c_in=1, c_out=3)

# the slides' way
cbfs = [partial(AvgStatsCallback, accuracy), CudaCallback, partial(BatchTransformXCallback, lambda xb: xb*2)]
learn = get_learner([8, 16], data, 0.4, conv_layer, cb_funcs=cbfs)
learn.fit(1)

# by hand
model = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
learn = Learner(model, data, F.cross_entropy, adam_opt(), lr=1e-3, cbs=AvgStatsCallback(accuracy))
learn.fit(1)
learn.fit(1, reset_opt=True)
found = learn.lr_find(max_iter=12)
print(f'{found.lrs[0]:.1e}', f'{found.losses[-1]:.3f}')
try: learn.fit_one_cycle(1, lr=found.suggestion)
except ValueError: learn.fit_one_cycle(1, lr=1e-3, pct_start=.3)
learn.fit_one_cycle(1, lr=[1e-3], cbs=[CudaCallback()])
sched = combine_scheds([.3, .7], cos_1cycle_anneal(.1, .3, .05))
print(f'{sched(.5):.3f}')

got = learn.validate()
print(f"{got['loss']:.3f}", f"{got['accuracy']:.1%}")
print(learn.validate(data.train_dl, metrics=[accuracy]))
preds, targets = learn.get_preds()
print((preds.argmax(1) == targets).float().mean().item())
preds, _ = learn.get_preds(data.train_dl, act=partial(torch.softmax, dim=1))
print(preds.sum(1).allclose(torch.ones(len(preds))))
label, probs = learn.predict(x[0])
print(label, probs)

# what one looks at and changes
for cb in learn.cbs: print(type(cb).__name__)
print(learn.cb(AvgStatsCallback).rows[-1]['valid_accuracy'])
learn.add_cbs(CudaCallback())
learn.remove_cbs(learn.cb(CudaCallback))
learn.opt_func = sgd_mom_opt
learn.lr = .01
learn.fit(1, reset_opt=True)
print(learn.opt.hypers[0]['lr'], learn.opt.state_dict().keys(), learn.n_iter, learn.epoch)
learn.opt.hypers[0]['lr'] = .005
print(sum(p.numel() for p in learn.model.parameters()), len(learn.data.train_dl), learn.loss.item())


# a splitter of one's own, and torch's optimizer
def last_apart(model): return [list(model[:-1].parameters()), list(model[-1].parameters())]


model = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 3))
Learner(model, data, F.cross_entropy, adam_opt(), lr=.01, splitter=last_apart).fit_one_cycle(1, lr=slice(1e-4, 1e-2))
Learner(model, data, nn.CrossEntropyLoss(), torch.optim.AdamW, lr=.01).fit(1)
