"Notebook 04's loop, before there is a Learner."
import torch
import torch.nn.functional as F
from torch import nn

from exp.callbacks import AvgStatsCallback, CudaCallback, DataBunch, Dataset, Runner, accuracy, get_dls

x, y = torch.randn(128, 10), torch.randint(0, 3, (128,))
data = DataBunch(*get_dls(Dataset(x, y), Dataset(x, y), bs=32), c_out=3)
model = nn.Linear(10, 3)
run = Runner(model, data, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=.1), cbs=[AvgStatsCallback(accuracy), CudaCallback()])
run.fit(2)
print(run.epoch, run.loss.item())
