"From a folder to batches, as the slides write it, and as the README goes on."
from functools import partial

from exp.data_block import (CategoryProcessor, ImageList, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb,
                            parent_labeler, to_byte_tensor, to_float_tensor)
from exp.datasets import URLs, untar_data

if __name__ == '__main__':
    path = untar_data(URLs.IMAGENETTE_160)
    tfms = [make_rgb, ResizeFixed(128), to_byte_tensor, to_float_tensor]
    il = ImageList.from_files(path, tfms=tfms)
    sd = SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val'))
    ll = label_by_func(sd, parent_labeler, proc_y=CategoryProcessor())
    data = ll.to_databunch(64, c_in=3, c_out=10, num_workers=0)
    xb, yb = next(iter(data.train_dl))
    print(xb.shape, yb.shape, xb.dtype, data.c_in, data.c_out)
    print(len(il), il[0].size, len(sd.train), len(ll.valid), ll.train.proc_y.vocab[:3])
    print(ll)
    data.show_batch()
