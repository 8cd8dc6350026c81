"A folder of pictures in three colours, and a small net that has learned to tell them apart."
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from exp.batchnorm import conv_layer
from exp.callbacks import AvgStatsCallback, BatchTransformXCallback, CudaCallback, DataBunch, accuracy
from exp.convnets import Lambda, flatten
from exp.data_block import (ImageList, NormalizeBytes, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb,
                            parent_labeler, to_byte_tensor)
from exp.fast_batches import fast_dl, in_memory
from exp.learner import Learner

COLOURS = {'n01440764': (200, 30, 30), 'n03028079': (30, 200, 30), 'zebra': (30, 30, 200)}
NAMES = ['tench', 'church', 'zebra']


def picture(colour, seed, size=(24, 20)):
    a = np.random.default_rng(seed).integers(-30, 30, (size[1], size[0], 3)) + np.array(colour)
    return Image.fromarray(a.clip(0, 255).astype(np.uint8))


def pictures(d):
    n = 0
    for side, k in (('train', 8), ('val', 5)):
        for c, colour in COLOURS.items():
            (d/side/c).mkdir(parents=True)
            for i in range(k): picture(colour, n := n + 1).save(d/side/c/f'{i}.png')
    return d


def items(d):
    il = ImageList.from_files(d, tfms=[make_rgb, ResizeFixed(16), to_byte_tensor])
    return label_by_func(SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val')), parent_labeler)


def norm(): return BatchTransformXCallback(NormalizeBytes([.4]*3, [.3]*3))


def net(c_out=3, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), Lambda(flatten), nn.Dropout(.5), nn.Linear(8, c_out)
    return nn.Sequential(conv_layer(3, 6, norm=norm), conv_layer(6, 8, stride=1, norm=norm), *head)


def learner(d, epochs=4, kept=False, make_dl=fast_dl, loss=F.cross_entropy, **kw):
    sd = items(d)
    data = (in_memory(sd, **kw) if kept else sd).to_databunch(8, seed=0, num_workers=0, make_dl=make_dl, **kw)
    cbs = [CudaCallback('cpu'), norm(), AvgStatsCallback(accuracy, silent=True)]
    return Learner(net(), data, loss, lr=.05, cbs=cbs).fit(epochs)


def of(model, c_out=4): return Learner(model, DataBunch(None, None, 3, c_out), F.cross_entropy, cbs=CudaCallback('cpu'))
