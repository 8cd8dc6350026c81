"The progress bar's cell of the slides."
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from exp.callbacks import AvgStatsCallback, CudaCallback, DataBunch, Dataset, accuracy, get_dls
from exp.learner import Learner
from exp.progress import ProgressCallback

x, y = torch.randn(128, 10), torch.randint(0, 3, (128,))
data = DataBunch(*get_dls(Dataset(x, y), Dataset(x, y), bs=32), c_out=3)
cbfs = [partial(AvgStatsCallback, accuracy), CudaCallback, ProgressCallback]
learn = Learner(nn.Linear(10, 3), data, F.cross_entropy, torch.optim.SGD, lr=.4, cb_funcs=cbfs)
learn.fit(2)
