"Augmentation on pictures and on batches, as notebooks 10 and 10a hand it on."
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from exp.batch_transforms import Augment, RandomColor
from exp.callbacks import AvgStatsCallback, DataBunch, Dataset, accuracy, get_dls
from exp.data_block import make_rgb, to_byte_tensor
from exp.learner import Learner
from exp.transforms import (BatchAugment, PilRandomDihedral, PilRandomFlip, PilTiltRandomCrop, RandomAffine, RandomFlip,
                            RandomResizedCrop)

tfms = [make_rgb, PilTiltRandomCrop(32, magnitude=.1), PilRandomFlip(p=.5), PilRandomDihedral(p=.2), RandomResizedCrop(32), to_byte_tensor]
print([getattr(t, '_order', 0) for t in tfms])
x, y = torch.rand(64, 3, 32, 32), torch.randint(0, 3, (64,))
print(Augment(RandomFlip(), RandomAffine(rotate=10.), RandomColor())(x).shape, RandomFlip()(x).shape)
data = DataBunch(*get_dls(Dataset(x, y), Dataset(x, y), bs=16), c_in=3, c_out=3)
model = nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 3))
cbfs = [partial(AvgStatsCallback, accuracy), partial(BatchAugment, RandomFlip(), seed=3)]
Learner(model, data, F.cross_entropy, torch.optim.SGD, lr=.01, cb_funcs=cbfs).fit(1)
