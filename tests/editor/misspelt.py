"What an editor has to see: every line that ends in `# wrong`, and no other."
import torch
import torch.nn.functional as F
from torch import nn

from exp.callbacks import AvgStatsCallback, Callback, DataBunch, Dataset, accuracy, get_dls
from exp.learner import Learner
from exp.learner import Lerner                                       # wrong
from exp.lerner import Learner as Other                              # wrong
from exp.optimizers import adam_opt, sgd_opt

x, y = torch.randn(128, 10), torch.randint(0, 3, (128,))
data = DataBunch(*get_dls(Dataset(x, y), Dataset(x, y), bs=32), c_out=3)
model = nn.Linear(10, 3)


class Print(Callback):
    def after_loss(self, learn: Learner): print(learn.los)           # wrong


opt = sgd_opt(model.parameters(), lr=.1)
opt.step()
opt.stepp()                                                          # wrong
adam_opt()(model.parameters(), lr=.1).zero_gradd()                   # wrong
adam_opt(decai=1e-2)
adam_opt(1, 2, 3)                                                    # wrong
learn = Learner(model, data, F.cross_entropy, sgd_opt, cbs=[AvgStatsCallback(accuracy), Print()])
learn.fit(1)
learn.fitt(1)                                                        # wrong
learn.fit(epoch=1)                                                   # wrong
learn.fit()                                                          # wrong
learn.fit_one_cycle(1, lr_max=.1)                                    # wrong
print(learn.lr_find().sugestion)                                     # wrong
learn.validat()                                                      # wrong
learn.get_preds(data.valid_dll)                                      # wrong
Learner(model, data, F.cross_entropy, sgd_opt, cb=[Print()])         # wrong
print(Lerner, Other)
