"""Benchmarks of exp.transforms and exp.batch_transforms beside its peers: augmentation of whole batches, and of pictures in workers.

Each function returns `{name: callable}` as benchmarks/__main__.py takes it; the first name is the one the ratios are to.
"""
from functools import partial


def _bytes(n=64, size=128):
    import torch
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=g)


def augment(n=64, size=128, rounds=8):
    """Batches of 64 at 128 px, `rounds` of them a turn: flip, affine (±10°, zoom to 1.1), perspective (0.2), brightness and contrast (±0.2), a draw for each picture.

    Peers take floats, as they are meant to, ours takes the loader's bytes; each is timed from bytes. Run with 2 threads (OMP_NUM_THREADS=2).
    On the best device there is: with a GPU each batch travels there first, as bytes, and the time is that until the GPU has done all of it."""
    import torch
    import torch.nn.functional as F
    from exp.callbacks import default_device
    from exp.batch_transforms import Augment, RandomColor, RandomPerspective, sample_grid, sampling_mats
    from exp.transforms import RandomAffine, RandomFlip
    xb, work, device = _bytes(n, size), {}, default_device()
    if device.type == 'cuda': xb = xb.pin_memory()
    def there(): return xb.to(device, non_blocking=True)
    try:
        import kornia.augmentation as K
        seq = K.AugmentationSequential(K.RandomHorizontalFlip(p=.5), K.RandomAffine(10, scale=(1, 1.1), p=.75), K.RandomPerspective(.2, p=.75),
                                       K.RandomBrightness((.8, 1.2), p=.75), K.RandomContrast((.8, 1.2), p=.75))
        work['kornia'] = lambda: seq(there().float()/255)
    except ImportError: work['kornia'] = None
    try:
        from fastai.vision.all import Pipeline, TensorImage, aug_transforms, setup_aug_tfms
        pipe = Pipeline(setup_aug_tfms(aug_transforms()), split_idx=0)
        work['fastai aug_transforms'] = lambda: pipe(TensorImage(there().float()/255))
    except ImportError: work['fastai aug_transforms'] = None
    aug = Augment(RandomFlip(), RandomAffine(), RandomPerspective(), RandomColor())
    aug.generator = torch.Generator().manual_seed(0)
    grid, f = sample_grid(sampling_mats(aug.draw(xb.shape).mats, (size, size)), (size, size)).to(device), xb.float().to(device)
    work |= {'exp Augment, bytes to bytes': lambda: aug(there()), 'exp Augment, bytes to floats': lambda: aug(there().float()/255),
             'one bare grid_sample': lambda: F.grid_sample(f, grid, padding_mode='reflection', align_corners=False)}
    off = aug.draw(xb.shape)
    assert off(there()).dtype == xb.dtype and (off(there()).float() - off(f/255)*255).abs().max() <= 1          # both ways, the same pictures

    def several(one):
        for _ in range(rounds): one()
        if device.type == 'cuda': torch.cuda.synchronize()
    return {k: one and partial(several, one) for k, one in work.items()}


def crops(bs=64, nw=2, size=128):
    "RandomResizedCrop (0.35) and flip on Pillow, the 3,925 validation pictures of Imagenette-160 as bytes, 2 workers kept from turn to turn: one pass."
    import torch
    from benchmarks.data_block import _imagenette
    from exp.data_block import CategoryProcessor, ImageList, LabeledData, make_rgb, parent_labeler, to_byte_tensor
    from exp.fast_batches import ItemLoader
    from exp.transforms import PilRandomFlip, RandomResizedCrop
    path, loaders = _imagenette()/'val', {'torchvision v2': None}
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2
        ds = ImageFolder(path, v2.Compose([v2.RandomResizedCrop(size, scale=(.35, 1)), v2.RandomHorizontalFlip(), v2.PILToTensor()]))
        loaders['torchvision v2'] = torch.utils.data.DataLoader(ds, bs, shuffle=True, num_workers=nw, persistent_workers=True)
    except ImportError: pass
    il = ImageList.from_files(path, tfms=[make_rgb, RandomResizedCrop(size, .35), PilRandomFlip(), to_byte_tensor])                  # Pillow decodes for both
    loaders['exp'] = ItemLoader(LabeledData.label_by_func(il, parent_labeler, proc_y=CategoryProcessor()), bs, True, 0, num_workers=nw)

    def work(dl):
        n = sum(len(b[0]) for b in dl)
        assert n == 3925, n
    return {k: dl and partial(work, dl) for k, dl in loaders.items()}


BENCHMARKS = {'augment': augment, 'crops': crops}
