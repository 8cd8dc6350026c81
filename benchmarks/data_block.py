"""Benchmarks of exp.data_block, exp.fast_batches and exp.many_files beside their peers: loading, listing files, and a list a hundred times Imagenette.

Each function returns `{name: callable}` as benchmarks/__main__.py takes it; the first name is the one the ratios are to.
`python -m benchmarks.data_block` prints the memory figures of the large list, which are no timings.
"""
import os
import sys
import tempfile
from functools import partial
from pathlib import Path


def _imagenette():
    from benchmarks import Skip
    from exp.datasets import DataError, URLs, untar_data
    try: path = untar_data(URLs.IMAGENETTE_160, quiet=True, tries=1)
    except DataError as e: raise Skip(str(e)) from None
    return path


def _ours(path, bs, nw, tfms, **kw):
    "Validation batches of `bs` by the loader of the second readings, or by `make_dl`."
    from exp.data_block import ImageList, SplitData, grandparent_splitter, label_by_func, parent_labeler
    from exp.fast_batches import fast_dl
    opened = {'open': kw.pop('open')} if 'open' in kw else {}
    sd = SplitData.split_by_func(ImageList.from_files(path, tfms=tfms, **opened), partial(grandparent_splitter, valid_name='val'))
    return label_by_func(sd, parent_labeler).to_databunch(bs//2, num_workers=nw, **{'make_dl': fast_dl, **kw}).valid_dl      # they are twice bs


def loading(bs=64, nw=2, size=128):
    "The 3,925 validation pictures of Imagenette-160, squeezed to 128 px, batches of 64, 2 workers kept from turn to turn: one pass."
    import torch
    from exp.data_block import ResizeFixed, item_dl, make_rgb, to_byte_tensor, to_float_tensor
    from exp.pictures import fast_decoder, open_picture
    path, tfms = _imagenette(), [make_rgb, ResizeFixed(size), to_byte_tensor]
    loaders = {'ImageFolder, v2 to uint8': None, 'fastai DataBlock': None}
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2
        ds = ImageFolder(path/'val', v2.Compose([v2.Resize((size, size)), v2.PILToTensor()]))
        loaders['ImageFolder, v2 to uint8'] = torch.utils.data.DataLoader(ds, bs, num_workers=nw, persistent_workers=True)
    except ImportError: pass
    try:
        from fastai.vision.all import CategoryBlock, DataBlock, GrandparentSplitter, ImageBlock, Resize, get_image_files, parent_label
        block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, splitter=GrandparentSplitter(valid_name='val'), get_y=parent_label,
                          item_tfms=Resize(size, 'squish'))
        loaders['fastai DataBlock'] = block.dataloaders(path, bs=bs, num_workers=nw, device='cpu', persistent_workers=True).valid
    except ImportError: pass
    quick = partial(open_picture, fast=True)
    loaders['exp, item_dl'] = _ours(path, bs, nw, tfms, make_dl=item_dl)
    loaders['exp, item_dl that stays'] = _ours(path, bs, nw, tfms, make_dl=item_dl, persistent_workers=True)
    loaders['exp, fast_dl'] = _ours(path, bs, nw, tfms)
    loaders['exp, fast_dl, simplejpeg'] = _ours(path, bs, nw, tfms, open=quick) if fast_decoder() else None
    loaders["exp, the same, slides' floats"] = _ours(path, bs, nw, [*tfms, to_float_tensor], open=quick)
    if (tv := loaders['ImageFolder, v2 to uint8']) is not None:                   # the same work: the same pictures come out
        (a, ya), (b, yb) = next(iter(tv)), next(iter(loaders['exp, fast_dl']))
        d = (a.int() - b.int()).abs()
        assert d.max() <= 2 and d.float().mean() < .2 and ya.equal(yb)

    def work(dl):
        n = sum(len(b[0]) for b in dl)
        assert n == 3925, n
    return {k: dl and partial(work, dl) for k, dl in loaders.items()}


def files():
    "The names of Imagenette's 13,394 pictures: fastai's get_image_files, ours as paths and as bytes, and a bare scandir that keeps nothing."
    from exp.data_block import get_files, image_extensions
    from exp.many_files import list_files
    path = _imagenette()
    try: from fastai.data.transforms import get_image_files
    except ImportError: get_image_files = None

    def bare(d=path):
        with os.scandir(d) as it:
            return sum(bare(e.path) if e.is_dir() else 1 for e in it)

    def ours(): assert len(get_files(path, image_extensions, recurse=True)) == 13394
    def names(): assert len(list_files(path)) == 13394
    return {'fastai get_image_files': get_image_files and (lambda: get_image_files(path)), 'exp get_files': ours, 'exp list_files': names, 'bare scandir': bare}


def large(n=200_000):
    "A made-up tree of 200,000 empty files in 1,000 folders: listed, split and labelled; and a tenth of it, to see that time is linear."
    from exp.data_block import ImageList, SplitData, grandparent_splitter, label_by_func, parent_labeler
    from exp.many_files import list_files
    tmp = tempfile.TemporaryDirectory(prefix='exp-large-')

    def tree(root, k):
        for s, share in (('train', .9), ('val', .1)):
            for c in range(k//200):
                d = root/s/f'n{c:08d}'
                d.mkdir(parents=True)
                for i in range(int(200*share)): (d/f'n{c:08d}_{i:05d}.JPEG').touch()
        return root

    def work(root, k, keep=tmp):
        ll = label_by_func(SplitData.split_by_func(ImageList(list_files(root), root), partial(grandparent_splitter, valid_name='val')), parent_labeler)
        assert len(ll.train) + len(ll.valid) == k and len(ll.train.proc_y.vocab) == k//200
    big, small = tree(Path(tmp.name)/'big', n), tree(Path(tmp.name)/'small', n//10)
    return {f'{n//10:,} files': lambda: work(small, n//10), f'{n:,} files': lambda: work(big, n)}


def imagenet_memory(n=1_281_167, n_batches=None, bs=256):
    """1.28 million made-up paths: bytes a file of the labelled list, seconds, and the memory of two workers along an epoch (or `n_batches` of it; made-up pictures).

    Returns a dictionary; the workers' figures are unique set sizes in MB, so pages shared with the parent do not count until they are copied."""
    import gc
    import time
    import psutil
    from exp.data_block import SplitData, grandparent_splitter, label_by_func, parent_labeler
    from exp.fast_batches import ItemLoader
    me = psutil.Process()
    gc.collect()
    before, t = me.memory_full_info().uss, time.perf_counter()
    ll = label_by_func(SplitData.split_by_func(_made_up(n), grandparent_splitter), parent_labeler)
    gc.collect()
    out = dict(files=n, seconds=round(time.perf_counter() - t, 1), bytes_a_file=round((me.memory_full_info().uss - before)/n))
    held = sum(s.x.items.names.nbytes + s.y.items.nbytes for s in (ll.train, ll.valid))
    out['bytes_a_file_of_arrays'] = round(held/n)
    dl, marks = ItemLoader(ll.train, bs, shuffle=True, seed=0, num_workers=2), []
    n_batches = n_batches or len(dl) - 1
    for i, (xb, yb) in enumerate(dl):
        if i in (20, n_batches//4, n_batches//2, n_batches): marks.append([round(p.memory_full_info().uss/1e6, 1) for p in sorted(me.children(), key=lambda p: p.pid) if p.memory_full_info().uss > 1e7])
        if i == n_batches: break
    return {**out, 'worker_MB_at_batch_20_quarter_half_end': marks}


def _made_up(n):
    from exp.data_block import ImageList
    from exp.many_files import PathList
    names = (f'{"valid" if i // 1000 % 25 == 0 else "train"}/n{i % 1000:08d}/n{i % 1000:08d}_{i:07d}.JPEG' for i in range(n))

    class MadeUp(ImageList):
        "No files: a small picture whose colour is the length of the name."
        def get(self, fn):
            import torch
            return torch.full((3, 16, 16), len(str(fn)), dtype=torch.uint8)
    return MadeUp(PathList('/made/up', list(names)), '/made/up')


BENCHMARKS = {'loading': loading, 'files': files, 'large': large}

if __name__ == '__main__':
    for k, v in imagenet_memory(*map(int, sys.argv[1:])).items(): print(f'{k:<34} {v}')
