"""Transforms: equal to torchvision's and kornia's for given parameters, drawn as they should be, the same for a seed everywhere, and resumed to the bit."""
import math
import multiprocessing
import pickle
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from exp.callbacks import AvgStatsCallback, BatchTransformXCallback, Callback, Runner, accuracy
from exp.checkpoints import Checkpoint
from exp.files import CheckpointError
from exp.convnets import Lambda, flatten
from exp.data_block import (CategoryProcessor, ImageList, LabeledData, NormalizeBytes, SplitData, grandparent_splitter, label_by_func,
                            make_rgb, parent_labeler, to_byte_tensor, to_float_tensor)
from exp.export_models import export, load_learner, pack
from exp.fast_batches import ItemLoader, fast_dl, is_random, load_batch
from exp.learner import Learner
from exp.optimizers import sgd_mom_opt
from exp.pictures import open_picture
from exp.transforms import (Augment, BatchAugment, BatchCrop, CenterCrop, Draw, GeneralCrop, PilRandomDihedral, PilRandomFlip, PilRandomRotate, PilTiltRandomCrop, RandomAffine,
                            RandomColor, RandomDihedral, RandomErasing, RandomFlip, RandomPerspective, RandomResizedCrop, Resize, affine_mats, crop_batch,
                            crop_resize, dihedral, dihedral_mats, homography, move_boxes, move_points, np_to_float, recolor, show_tfm, warp)

few = settings(max_examples=25, deadline=None)
sizes, channels, bytes_or_floats = st.integers(9, 40), st.sampled_from([1, 3]), st.sampled_from([torch.uint8, torch.float32])
seeds = st.integers(0, 2**31)


def smooth(n, c, h, w, seed, dtype):
    "Noise of a few pixels' grain, full range."
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(n, c, h//3 + 2, w//3 + 2, generator=g), (h, w), mode='bilinear', align_corners=False)
    x = (x - x.amin((1, 2, 3), True))/(x.amax((1, 2, 3), True) - x.amin((1, 2, 3), True))
    return (255*x).round().to(torch.uint8) if dtype == torch.uint8 else x


def gap(a, b): return (a.double() - b.double()).abs()*(1 if a.dtype == torch.uint8 else 255)
def inside(mats, h, w): return warp(torch.ones(len(mats), 1, h, w), mats, padding='zeros') > 1 - 1e-4
def rgb(w, h, seed=0): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))
def gen(s=0): return torch.Generator().manual_seed(s)


# ---------------------------------------------------------------- geometry beside torchvision and kornia

@few
@given(sizes, sizes, channels, bytes_or_floats, st.floats(-180, 180), st.floats(.6, 1.8), st.floats(-20, 20), st.floats(-20, 20), st.integers(-6, 6), st.integers(-6, 6), seeds)
def test_affine_as_torchvision(h, w, c, dtype, angle, zoom, sx, sy, dx, dy, seed):
    x = smooth(2, c, h, w, seed, dtype)
    m = affine_mats(angle, zoom, (sx, sy), (dx, dy)).repeat(2, 1, 1)
    tv = TF.affine(x, angle=angle, translate=[dx, dy], scale=zoom, shear=[sx, sy], interpolation=InterpolationMode.BILINEAR)
    ours, mask = warp(x, m, padding='zeros'), inside(m, h, w).expand(-1, c, -1, -1)
    assert ours.dtype == dtype and ours.shape == x.shape
    assert (gap(ours, tv)*mask).max() <= 1
    assert (gap(warp(x, m), tv)*mask).max() <= 1                                     # the padding is a matter of the outside only


@few
@given(sizes, sizes, channels, bytes_or_floats, st.floats(0, .4), seeds)
def test_perspective_as_torchvision(h, w, c, dtype, magnitude, seed):
    x = smooth(1, c, h, w, seed, dtype)
    m = RandomPerspective(magnitude, p=1).mats(x.shape, gen(seed))
    start = torch.tensor([[0., 0], [w, 0], [w, h], [0, h]])                           # edge to edge
    tv = TF.perspective(x, start.tolist(), move_points(start[None], m, (h, w))[0].tolist(), interpolation=InterpolationMode.BILINEAR)
    assert (gap(warp(x, m, padding='zeros'), tv)*inside(m, h, w)).max() <= 1


@few
@given(sizes, sizes, channels, st.sampled_from(['zeros', 'border', 'reflection']), seeds)
def test_any_homography_as_kornia(h, w, c, padding, seed):
    kornia = pytest.importorskip('kornia')
    x, g = smooth(3, c, h, w, seed, torch.float32), gen(seed)
    m = RandomPerspective(.3, p=.7).mats(x.shape, g) @ RandomAffine(40, (.7, 1.5), 10, .1, p=.7).mats(x.shape, g) @ RandomFlip().mats(x.shape, g)
    t = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    t[:, 0, 2], t[:, 1, 2] = torch.tensor([1, -1])*(w - 1)/2, torch.tensor([1, -1])*(h - 1)/2
    theirs = kornia.geometry.transform.warp_perspective(x.double(), t[0] @ m @ t[1], (h, w), mode='bilinear', padding_mode=padding, align_corners=True)
    assert (gap(warp(x, m, padding=padding), theirs)*inside(m, h, w)).max() <= 1


@few
@given(st.integers(9, 40), channels, st.sampled_from([torch.uint8, torch.float32, torch.float64, torch.bfloat16]), st.integers(0, 7), seeds)
def test_turns_are_exact_and_identity_is_the_same_tensor(h, c, dtype, k, seed):
    x = smooth(3, c, h, h, seed, torch.uint8).to(dtype)
    assert warp(x, dihedral_mats(torch.zeros(3))) is x and warp(x, affine_mats().repeat(3, 1, 1)) is x
    assert warp(x, dihedral_mats(torch.full((3,), k))).equal(dihedral(x, k))
    assert warp(x, affine_mats(rotate=[90., 180, 270])).equal(torch.stack([x[i].rot90(-i - 1, (1, 2)) for i in range(3)]))
    for a, b in zip(dihedral(x, k), (np.asarray(dihedral(Image.fromarray(p[0].float().numpy().astype(np.uint8)), k)) for p in x)):
        np.testing.assert_array_equal(a[0].float().numpy(), b)
    m = affine_mats(rotate=[0., 5, 0])
    assert warp(x, m)[[0, 2]].equal(x[[0, 2]]) and not warp(x, m)[1].equal(x[1])


@few
@given(sizes, sizes, channels, bytes_or_floats, seeds)
def test_parameters_that_change_nothing(h, w, c, dtype, seed):
    x = smooth(4, c, h, w, seed, dtype)
    one = torch.ones(4)
    assert recolor(x, one, one, one, 0*one).equal(x)
    still = Augment(RandomFlip(0), RandomDihedral(0), RandomAffine(p=0), RandomPerspective(p=0), RandomColor(.5, .5, .5, .5, p=0), RandomErasing(p=0))
    g = gen()
    before = g.get_state()
    assert still(x, g) is x and g.get_state().equal(before)                          # not even a number is drawn
    asleep = Augment(RandomAffine(0, (1, 1)), RandomPerspective(0.), RandomColor(1e-12, None, p=1.))
    assert asleep(x, g).equal(x)


def test_more_than_one_chunk_and_single_pictures_agree():
    x = smooth(137, 3, 24, 20, 0, torch.uint8)
    draw = Augment(RandomFlip(), RandomAffine(p=.5), RandomPerspective(p=.5), RandomColor(.3, .3, .3, .1, p=.6)).draw(x.shape, gen(1))
    out = draw(x)
    for i in range(0, 137, 4):
        one = Draw((1, *x.shape[1:]), draw.mats[i:i+1], [{k: v[i:i+1] for k, v in c.items()} for c in draw.color])
        assert (gap(one(x[i:i+1]), out[i:i+1])).max() <= 1
    cubic = warp(x, draw.mats, 'bicubic')                                            # overshoots, so it must be cut before it becomes bytes
    assert (cubic.float() - (255*warp(x.float()/255, draw.mats, 'bicubic')).round().clamp(0, 255)).abs().max() <= 1
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)                 # channels last, as loaders give them
    assert gap(draw(strided), out).max() <= 1 and gap(draw(x.float()/255)*255, out).max() <= 255.01*1
    assert (draw(x.float()/255)*255 - out).abs().max() <= 1


# ---------------------------------------------------------------- points and boxes

@few
@given(st.integers(0, 10**6), st.sampled_from([(64, 64), (48, 80), (33, 51)]))
def test_a_marked_spot_goes_where_its_point_goes(seed, size):
    h, w = size
    at = torch.rand(6, 1, 2, generator=gen(seed))*torch.tensor([w/2, h/2]) + torch.tensor([w/4, h/4])
    ys, xs = torch.arange(h)[:, None] + .5, torch.arange(w)[None] + .5
    spots = torch.exp(-((xs - at[..., 0, None])**2 + (ys - at[..., 1, None])**2)/4)[:, None]
    draw = Augment(RandomFlip(), RandomAffine(30, (.8, 1.2), 8, .05), RandomPerspective(.2), padding='zeros').draw(spots.shape, gen(seed))
    out, there = draw(spots)[:, 0], draw.points(at)[:, 0]
    found = torch.stack([(out*xs).sum((1, 2))/out.sum((1, 2)), (out*ys).sum((1, 2))/out.sum((1, 2))], 1)
    clear = ((there > 8) & (there < torch.tensor([w - 8, h - 8]))).all(1)
    assert ((found - there).norm(dim=1)[clear] < .5).all()


def test_boxes_hold_what_they_held():
    x = torch.zeros(40, 1, 60, 80)
    x[:, :, 20:35, 30:50] = 1.
    draw = Augment(RandomAffine(40, (.8, 1.2), 10, p=1), RandomPerspective(.2, p=1), padding='zeros').draw(x.shape, gen())
    box, out = draw.boxes(torch.tensor([[[30., 20, 50, 35]]]).repeat(40, 1, 1))[:, 0], draw(x)[:, 0] > .5
    for (l, t, r, b), o in zip(box, out):
        rows, cols = o.any(1).nonzero(), o.any(0).nonzero()
        assert abs(l - cols.min()) < 1.5 and abs(r - cols.max() - 1) < 1.5 and abs(t - rows.min()) < 1.5 and abs(b - rows.max() - 1) < 1.5
    assert move_boxes(torch.tensor([[[0., 0, 8, 8]]]), affine_mats(translate=(-4., 6.)), (10, 10)).tolist() == [[[0, 6, 4, 10]]]     # cut at the edges


# ---------------------------------------------------------------- colours beside torchvision

@few
@given(sizes, sizes, channels, bytes_or_floats, st.floats(.3, 1.8), seeds)
def test_colours_as_torchvision(h, w, c, dtype, f, seed):
    x, t, turn = smooth(2, c, h, w, seed, dtype), torch.full((2,), f), max(-.5, min(.5, (f - 1)/2))
    pairs = [(recolor(x, brightness=t), lambda x: TF.adjust_brightness(x, f)), (recolor(x, contrast=t), lambda x: TF.adjust_contrast(x, f)),
             (recolor(x, saturation=t), lambda x: TF.adjust_saturation(x, f))]
    if c == 3: pairs.append((recolor(x, hue=torch.full((2,), turn)), lambda x: TF.adjust_hue(x, turn)))
    for ours, theirs in pairs:
        if dtype == torch.uint8:                                  # the nearest byte to torchvision's floats; its own bytes lose a fraction twice
            assert (ours.double() - 255*theirs(x.float()/255).double()).abs().max() <= .51 and gap(ours, theirs(x)).max() <= 2
        else: assert gap(ours, theirs(x)).max() <= 1


def test_colours_of_each_picture_are_its_own():
    x, f = smooth(5, 3, 20, 20, 0, torch.float32), torch.tensor([.5, 1, 1.2, 1.5, .8])
    both = recolor(x, f, f.flip(0), f, (f - 1)/3)
    for i in range(5): torch.testing.assert_close(both[i:i+1], recolor(x[i:i+1], f[i:i+1], f.flip(0)[i:i+1], f[i:i+1], (f[i:i+1] - 1)/3))
    assert both.min() >= 0 and both.max() <= 1


# ---------------------------------------------------------------- pictures of Pillow beside torchvision

@few
@given(st.integers(20, 90), st.integers(20, 90), seeds)
def test_random_resized_crop_is_torchvisions_resized_crop(w, h, seed):
    im, crop = rgb(w, h, seed), RandomResizedCrop((24, 17), .1)
    crop.generator = gen(seed)
    l, t, r, b = crop.get_corners(w, h)
    crop.generator = gen(seed)
    np.testing.assert_array_equal(np.asarray(crop(im)), np.asarray(TF.resized_crop(im, t, l, b - t, r - l, [17, 24])))


@few
@given(st.integers(20, 90), st.integers(20, 90), channels, bytes_or_floats, st.integers(9, 40), seeds)
def test_crops_from_a_batch_are_torchvisions_resized_crops(h, w, c, dtype, size, seed):
    "And their boxes those of `RandomResizedCrop` on pictures, for one generator."
    x, crop, cb = smooth(3, c, h, w, seed, dtype), RandomResizedCrop(size, .35), BatchCrop(size, seed=seed)
    crop.generator = gen(seed)
    boxes = [crop.get_corners(w, h) for _ in x]
    ref = torch.stack([TF.resized_crop(o, t, l, b - t, r - l, [size, size], antialias=True) for o, (l, t, r, b) in zip(x, boxes)])
    run = SimpleNamespace(in_train=True, xb=x, epoch=0, n_epochs=1)
    cb.begin_batch(run)
    assert run.xb.dtype == dtype and run.xb.shape == (3, c, size, size) and gap(run.xb, ref).max() <= 1
    float_way = crop_batch(x.float(), boxes, size)                                   # what a GPU computes for bytes
    bytes_lose = 2*.5 + .05                                      # a rounding in each direction, and 16-bit filter weights: at most 1.005 in 3,000 draws
    assert dtype != torch.uint8 or (float_way - run.xb).abs().max() <= bytes_lose


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
def test_a_batch_of_several_chunks_is_its_pictures(dtype, monkeypatch):
    x, aug = smooth(11, 3, 20, 24, 0, dtype), Augment(RandomFlip(), RandomAffine(), RandomColor())
    draw = aug.draw(x.shape, gen())
    whole = draw(x)
    monkeypatch.setattr('exp.transforms.CHUNK', 3*x[0].numel() + 1)                            # 3, 3, 3 and 2 pictures
    assert draw(x).equal(whole)
    monkeypatch.setattr('exp.transforms.CHUNK', 1)                                            # a picture larger than a chunk
    assert draw(x).equal(whole)


def test_pictures_that_grow():
    sizes = BatchCrop((64, 100)).size_in
    assert [sizes(e, 4) for e in range(4)] == [64, 80, 96, 100] and sizes(0, 1) == 100       # the last is what was asked for
    assert [BatchCrop((96, 32), step=32).size_in(e, 3) for e in range(3)] == [96, 64, 32] and BatchCrop(50).size_in(1, 9) == 50
    with pytest.raises(ValueError, match='pixels'): BatchCrop((0, 64))
    with pytest.raises(ValueError, match='share of the area'): BatchCrop(64, scale=2)


def test_other_pictures_as_torchvision():
    im = Image.fromarray(smooth(1, 3, 60, 80, 0, torch.uint8)[0].permute(1, 2, 0).numpy())
    def a(x): return np.asarray(x, dtype=int)
    np.testing.assert_array_equal(a(GeneralCrop(30, crop_size=30)(im)), a(TF.center_crop(im, [30, 30])))
    np.testing.assert_array_equal(a(Resize(30)(im)), a(TF.resize(im, [30])))
    np.testing.assert_array_equal(a(CenterCrop(60, scale=1)(im)), a(TF.center_crop(im, [60, 60])))
    rot = PilRandomRotate(30, p=1, fill=7)
    rot.generator = gen(3)
    degrees = 30*(2*torch.rand(2, generator=gen(3), dtype=torch.float64)[1].item() - 1)
    np.testing.assert_array_equal(a(rot(im)), a(TF.rotate(im, degrees, InterpolationMode.BILINEAR, fill=[7, 7, 7])))
    tilt = PilTiltRandomCrop(im.size, crop_size=im.size, magnitude=.4)
    tilt.generator = gen(5)
    src = tilt.get_corners(*im.size, *im.size)
    tilt.generator = gen(5)
    mine = a(tilt(im))                                                                 # against the definition, pixel by pixel, in float64
    m = homography(torch.tensor([[0., 0], [80, 0], [80, 60], [0, 60]]), src)
    grid = torch.stack(torch.meshgrid(torch.arange(60) + .5, torch.arange(80) + .5, indexing='ij')[::-1] + (torch.ones(60, 80),), -1).double() @ m.T
    at = grid[..., :2]/grid[..., 2:]/torch.tensor([80, 60])*2 - 1
    ref = F.grid_sample(torch.from_numpy(a(im)).double().permute(2, 0, 1)[None], at[None], padding_mode='border', align_corners=False)[0].permute(1, 2, 0)
    assert np.abs(mine - ref.numpy())[1:-1, 1:-1].max() <= 1.01


def test_bytes_or_floats_at_the_end():
    for im in (rgb(7, 5), rgb(7, 5).convert('L')):
        assert np_to_float(im).equal(to_float_tensor(to_byte_tensor(im))) and np_to_float(np.asarray(im)).equal(np_to_float(im))


def test_the_lessons_lists_run_as_written(data_home):
    "Cells of the 2019 notebook."
    path = data_home/'data'/'drawn-shapes-160'
    for tfms in ([make_rgb, RandomResizedCrop(128, scale=(0.35, 1)), np_to_float, PilRandomFlip()],
                 [make_rgb, PilTiltRandomCrop(128, magnitude=0.1), PilRandomFlip(), to_byte_tensor, to_float_tensor],
                 [make_rgb, CenterCrop(128), to_byte_tensor, to_float_tensor], [make_rgb, PilRandomDihedral(p=0.75), CenterCrop(128), np_to_float]):
        x = ImageList.from_files(path/'val', tfms=tfms)[3]
        assert x.shape == (3, 128, 128) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1


# ---------------------------------------------------------------- how it is drawn

@pytest.mark.parametrize('size,scale', [((160, 160), (.08, 1.)), ((500, 250), (.35, 1.)), ((120, 700), (.08, 1.)), ((300, 400), (.35, .8))])
def test_random_resized_crop_draws_as_torchvision(size, scale):
    ks = pytest.importorskip('scipy.stats').ks_2samp
    (w, h), n = size, 20_000
    crop = RandomResizedCrop(32, scale)
    crop.generator = gen(0)
    ours = np.array([crop.get_corners(w, h) for _ in range(n)], float)
    torch.manual_seed(0)
    tv, blank = v2.RandomResizedCrop(32, scale=scale), [Image.new('L', size)]
    theirs = np.array([(p['left'], p['top'], p['left'] + p['width'], p['top'] + p['height']) for p in (tv.make_params(blank) for _ in range(n))], float)
    def facts(b):
        cw, ch = b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]
        return {'area': cw*ch, 'shape': cw/ch, 'left': b[:, 0], 'top': b[:, 1], 'x': (b[:, 0] + b[:, 2])/2, 'y': (b[:, 1] + b[:, 3])/2}
    for k, (a, b) in {k: (facts(ours)[k], facts(theirs)[k]) for k in facts(ours)}.items(): assert ks(a, b).pvalue > 1e-3, (k, ks(a, b))


@pytest.mark.parametrize('w,h', [(1000, 10), (10, 1000), (3000, 1), (1, 1), (1, 3000), (2, 3)])
def test_extreme_shapes(w, h):
    crop = RandomResizedCrop(16)
    crop.generator = gen(0)
    for _ in range(50):
        l, t, r, b = crop.get_corners(w, h)
        assert 0 <= l < r <= w and 0 <= t < b <= h
    if max(w, h)/min(w, h) > 20:                                                       # always the fallback, which is torchvision's
        p = v2.RandomResizedCrop(16).make_params([Image.new('L', (w, h))])
        assert (p['left'], p['top'], p['left'] + p['width'], p['top'] + p['height']) == (l, t, r, b)
    for tfm in (crop, CenterCrop(16), PilTiltRandomCrop(16), GeneralCrop(16)): assert tfm(Image.new('RGB', (w, h))).size == (16, 16)
    assert min(Resize(5)(Image.new('RGB', (w, h))).size) == 5


BATCH = [RandomFlip(.5), RandomDihedral(.5), RandomAffine(20, (.8, 1.2), 5, .1, p=.6), RandomPerspective(.3, p=.6), RandomColor(.3, .3, .3, .1, p=.6), RandomErasing(.5)]


@pytest.mark.parametrize('tfm', BATCH, ids=lambda t: type(t).__name__)
def test_each_picture_draws_for_itself(tfm):
    "A batch of one picture 400 times: the share that is left alone is right, neighbours are independent, and the halves of the batch differ."
    x = smooth(1, 3, 16, 16, 0, torch.uint8).expand(400, -1, -1, -1)
    out = Augment(tfm)(x, gen(0))
    changed = (out != x).flatten(1).any(1).double()
    p = tfm.p*{'RandomDihedral': 7/8}.get(type(tfm).__name__, 1)
    assert abs(changed.mean() - p) < 4*math.sqrt(p*(1 - p)/400)
    c = changed - changed.mean()
    assert abs((c[1:]*c[:-1]).mean()/c.var()) < .2
    kinds = len(out.flatten(1).unique(dim=0))
    assert kinds == 2 if isinstance(tfm, RandomFlip) else kinds == 8 if isinstance(tfm, RandomDihedral) else kinds > .8*changed.sum()


def test_draws_are_independent_of_each_other():
    "No two of the numbers of an affine draw go together, within a picture or from one picture to the next."
    m = RandomAffine(30, (.5, 2), 0, .2, p=1).mats((5000, 3, 32, 32), gen(0))
    facts = torch.stack([torch.atan2(m[:, 1, 0], m[:, 0, 0]), m[:, :2, :2].det().log(), m[:, 0, 2], m[:, 1, 2]])
    both = torch.cat([facts[:, 1:], facts[:, :-1]]).corrcoef() - torch.eye(8)
    assert both.abs().max() < .06
    assert facts[1].mean().abs() < .05                                                  # as likely to halve as to double


def test_same_seed_same_batch_other_seed_other_batch():
    x = smooth(16, 3, 20, 20, 0, torch.uint8)
    a, b, c = (Augment(*BATCH)(x, gen(s)) for s in (1, 1, 2))
    assert a.equal(b) and not a.equal(c)
    state = torch.get_rng_state()
    Augment(*BATCH)(x, gen(1))
    assert torch.get_rng_state().equal(state)                                           # the global generator is not touched
    torch.manual_seed(0); d = Augment(*BATCH)(x)
    torch.manual_seed(0); assert d.equal(Augment(*BATCH)(x))                             # without one it is the global one that is drawn from


@pytest.mark.parametrize('cls,base,others', [
    (RandomAffine, dict(rotate=5., zoom=(1., 1.1), shear=0., translate=0., p=.75), dict(rotate=9., zoom=(.8, 1.), shear=4., translate=.2, p=.3)),
    (RandomPerspective, dict(magnitude=.2, p=.75), dict(magnitude=.1, p=.3)), (RandomErasing, dict(p=.5, scale=(.02, .33), ratio=(.3, 3.3), value=None), dict(p=.9, scale=(.3, .4), ratio=(1, 1.1), value=.5)),
    (RandomColor, dict(brightness=.2, contrast=.2, saturation=None, hue=None, p=.75), dict(brightness=None, contrast=.4, saturation=.2, hue=.1, p=.3))])
def test_every_argument_changes_the_result(cls, base, others):
    x = smooth(12, 3, 24, 24, 0, torch.float32)
    plain = Augment(cls(**base))(x, gen(0))
    for k, v in others.items(): assert not Augment(cls(**{**base, k: v}))(x, gen(0)).equal(plain), k
    if cls is RandomAffine:
        big = RandomAffine(40, (.5, 1), p=1)
        outs = [Augment(big, padding=p, mode=m)(x, gen(0)) for p, m in (('reflection', 'bilinear'), ('zeros', 'bilinear'), ('border', 'bilinear'), ('zeros', 'nearest'), ('zeros', 'bicubic'))]
        assert all(not a.equal(b) for i, a in enumerate(outs) for b in outs[:i])


def test_erasing():
    x = torch.zeros(300, 3, 30, 40, dtype=torch.uint8)
    out = Augment(RandomErasing(1., scale=(.1, .3), ratio=(.5, 2.), value=1.))(x, gen(0))
    assert x.sum() == 0 and out is not x and set(out.unique().tolist()) == {0, 255}
    for o in out[:, 0] == 255:
        r, c = o.any(1).nonzero().flatten(), o.any(0).nonzero().flatten()
        hh, ww = r.max() - r.min() + 1, c.max() - c.min() + 1
        assert o.sum() == hh*ww and .08 < hh*ww/1200 < .33 and .42 < ww/hh < 2.4               # a whole rectangle, of the size and shape asked for
    noise = Augment(RandomErasing(1.))(x, gen(0)).flatten(1)
    assert len(noise.unique(dim=0)) == 300 and noise.float().max() > 200


# ---------------------------------------------------------------- workers, processes

PIL_TFMS = [make_rgb, RandomResizedCrop(16, .3), PilRandomFlip(), PilRandomRotate(20), to_byte_tensor]


def pictures(folder, n=24):
    for i in range(n):
        side, c = 'valid' if i % 4 == 3 else 'train', 'ab'[i//2 % 2]
        (folder/side/c).mkdir(parents=True, exist_ok=True)
        im = np.asarray(rgb(22, 20, i)).copy()
        im[:9] = 255*(c == 'a')
        Image.fromarray(im).save(folder/side/c/f'{i:03d}.png')
    return folder


def test_workers_epochs_and_starts_by_spawn(tmp_path):
    il = ImageList.from_files(pictures(tmp_path)/'train', tfms=PIL_TFMS)
    ll = LabeledData.label_by_func(il, parent_labeler, proc_y=CategoryProcessor())
    def loader(seed, workers, **kw): return ItemLoader(ll, 4, True, seed, num_workers=workers, **kw)
    none, two = loader(1, 0), loader(1, 2)
    epochs = [[torch.cat([x for x, _ in dl]) for _ in range(2)] for dl in (none, two)]
    assert epochs[0][0].equal(epochs[1][0]) and epochs[0][1].equal(epochs[1][1])
    sort = lambda x: x.flatten(1).float().sum(1).sort().values
    assert not sort(epochs[0][0]).equal(sort(epochs[0][1]))                             # not the same draws in another order
    assert not torch.cat([x for x, _ in loader(2, 0)]).equal(epochs[0][0])
    spawned = loader(1, 1, multiprocessing_context=multiprocessing.get_context('spawn'))
    assert torch.cat([x for x, _ in spawned]).equal(epochs[0][0])
    two._iterator = spawned._iterator = None
    assert is_random(il) and not is_random(ImageList(il.items, tfms=[make_rgb, CenterCrop(16), to_byte_tensor]))


def test_two_copies_of_one_picture_draw_differently(tmp_path):
    f = pictures(tmp_path)/'train'/'a'/'000.png'
    xb, *_ = load_batch(ImageList([f]*8, tmp_path, tfms=PIL_TFMS), range(8), seed=0)
    assert len(xb.flatten(1).unique(dim=0)) == 8


@pytest.mark.parametrize('tfm', [*PIL_TFMS[1:4], PilRandomDihedral(), PilTiltRandomCrop(16), CenterCrop(16), Resize(9), GeneralCrop(8, 4), *BATCH, Augment(*BATCH)], ids=lambda t: type(t).__name__)
def test_pickles(tfm):
    back = pickle.loads(pickle.dumps(tfm))
    assert type(back) is type(tfm) and set(vars(back)) == set(vars(tfm))


# ---------------------------------------------------------------- in a learner

def make_learner(folder, workers, seed):
    torch.manual_seed(seed)
    sd = label_by_func(SplitData.split_by_func(ImageList.from_files(folder, tfms=[make_rgb, CenterCrop(16), to_byte_tensor]), grandparent_splitter), parent_labeler)
    sd.train.x.tfms = PIL_TFMS
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Dropout(.2), nn.AdaptiveAvgPool2d(2), Lambda(flatten), nn.Linear(16, 2))
    return Learner(net, sd.to_databunch(4, seed=seed, num_workers=workers, make_dl=fast_dl), F.cross_entropy, sgd_mom_opt, lr=.05, cbs=[AvgStatsCallback(accuracy, silent=True)])


class StopAt(Callback):
    _order = 2000
    def __init__(self, at): self.at = at
    def after_batch(self, run):
        if run.in_train and run.n_iter == self.at: raise KeyboardInterrupt


def fit_cbs(): return [BatchAugment(*BATCH, seed=7), BatchTransformXCallback(NormalizeBytes([.5]*3, [.3]*3)), BatchCrop((8, 14), step=2, seed=4)]


@pytest.mark.parametrize('workers', [0, 2])
def test_resumes_to_the_bit(workers, tmp_path):
    "Stopped in the first epoch, at its end and in the second; another seed afterwards. The generator comes out of the checkpoint."
    folder = pictures(tmp_path/'pictures')
    def end(learn):
        learn.data.train_dl._iterator = learn.data.valid_dl._iterator = None
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    ref = make_learner(folder, workers, 0)
    torch.manual_seed(3); ref.fit(2, fit_cbs())
    want, n = end(ref), len(ref.data.train_dl)
    for at in (2, n, n + 2):
        learn = make_learner(folder, workers, 0)
        torch.manual_seed(3)
        with pytest.raises(KeyboardInterrupt): learn.fit(2, [*fit_cbs(), Checkpoint(tmp_path/f'{at}', every=1), StopAt(at)])
        end(learn)
        new, ck = make_learner(folder, workers, 50 + at), Checkpoint(tmp_path/f'{at}')
        cbs = fit_cbs()
        for cb in (cbs[0], cbs[2]): cb.generator.manual_seed(12345)                    # not the state it must go on from
        new.fit(2, [*cbs, ck], start=ck.start(new))
        assert end(new).equal(want), at
    other = make_learner(folder, workers, 0)
    torch.manual_seed(3); other.fit(2, [BatchAugment(*BATCH, seed=8), fit_cbs()[1]])
    assert not end(other).equal(want)                                                    # so the draws do matter


class Look(Callback):
    _order = 1.5
    def __init__(self): self.seen = {True: [], False: []}
    def begin_batch(self, run): self.seen[run.in_train].append(run.xb)


def test_validation_gets_none_and_looking_leaves_no_trace(tmp_path):
    folder = pictures(tmp_path/'pictures')
    learn, aug, look = make_learner(folder, 0, 0), BatchAugment(*BATCH, seed=0), Look()
    learn.add_cbs([aug, *fit_cbs()[1:], look])
    plain = torch.cat([x for x, _ in learn.data.valid_dl])
    learn.fit(1)
    assert torch.cat(look.seen[False]).equal(plain) and not torch.cat(look.seen[True]).equal(plain[:1])
    state = aug.generator.get_state()
    learn.validate(); learn.get_preds(); learn.lr_find(max_iter=3)
    with learn.untouched(): learn.fit(1)
    assert aug.generator.get_state().equal(state)
    learn.fit(1)
    assert not aug.generator.get_state().equal(state)
    path = export(learn, tmp_path/'e.pt', cbs=[learn.cb(BatchTransformXCallback)])
    assert load_learner(path).data.source.valid.x.tfms[1].size == (16, 16)
    learn.remove_cbs(look)
    export(learn, tmp_path/'f.pt')                                                        # it shapes no batch at prediction, so exports leave it out
    with pytest.raises(CheckpointError, match='RandomResizedCrop'): pack(RandomResizedCrop(8))


def test_with_the_runner_of_notebook_04_and_after_float_conversion():
    x, y = smooth(12, 3, 16, 16, 0, torch.float32), torch.randint(0, 2, (12,), generator=gen())
    data = SimpleNamespace(train_dl=[(x, y)], valid_dl=[(x, y)])
    net, look = nn.Sequential(Lambda(flatten), nn.Linear(768, 2)), Look()
    Runner(net, data, F.cross_entropy, torch.optim.SGD(net.parameters(), lr=.1), [look, BatchAugment(RandomFlip(1.), seed=0)]).fit(1)
    assert look.seen[True][0].equal(x.flip(3)) and look.seen[False][0] is x


def test_the_callers_batch_is_never_written_to():
    for dtype in (torch.uint8, torch.float32, torch.float64):
        x = smooth(20, 3, 16, 16, 0, torch.uint8).to(dtype)/(1 if dtype == torch.uint8 else 255)
        x = x.to(dtype)
        before = x.clone()
        for tfm in BATCH: Augment(tfm)(x, gen(1))
        Augment(RandomColor(p=1.), RandomErasing(1.))(x, gen(1))
        assert x.equal(before)


# ---------------------------------------------------------------- showing, and what is said

@pytest.mark.parametrize('tfm', [PilRandomFlip(), RandomResizedCrop(32), CenterCrop(32), RandomAffine(), Augment(*BATCH), RandomErasing(), np_to_float], ids=lambda t: getattr(t, '__name__', type(t).__name__))
def test_every_transform_shows_itself(tfm):
    plt = pytest.importorskip('matplotlib.pyplot')
    state, mine = torch.get_rng_state(), getattr(tfm, 'generator', None)
    figs = [show_tfm(tfm, rgb(30, 30), n=5, seed=s, cols=5) for s in (0, 0, 1)]
    ims = [[np.asarray(ax.images[0].get_array()) for ax in f.axes] for f in figs]
    assert len(ims[0]) == 5 and all(np.array_equal(a, b) for a, b in zip(*ims[:2]))
    assert torch.get_rng_state().equal(state) and getattr(tfm, 'generator', None) is mine
    plt.close('all')


def test_errors_are_for_the_reader():
    with pytest.raises(ValueError, match='probability.*1.5'): PilRandomFlip(1.5)
    with pytest.raises(ValueError, match='probability'): RandomAffine(p=-1)
    with pytest.raises(ValueError, match='share of the area'): RandomResizedCrop(8, 0)
    with pytest.raises(ValueError, match='ratio'): RandomResizedCrop(8, ratio=(2, 1))
    with pytest.raises(ValueError, match='magnitude'): PilTiltRandomCrop(8, magnitude=1)
    with pytest.raises(ValueError, match='magnitude'): RandomPerspective(.5)
    with pytest.raises(ValueError, match='on one line'): homography(torch.rand(4, 2), torch.tensor([[0., 0], [1, 1], [2, 2], [5, 0]]))
    with pytest.raises(ValueError, match='flattens'): warp(torch.rand(1, 1, 8, 8), affine_mats(zoom=0.))
    with pytest.raises(TypeError, match='PilRandomFlip is no transform of batches'): Augment(PilRandomFlip())
    with pytest.raises(ValueError, match='augment before normalising'): Augment(RandomColor(p=1))(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match='drawn for a batch'): Augment(RandomFlip()).draw((2, 3, 8, 8))(torch.rand(3, 3, 8, 8))


def test_large_jpegs_are_drafted_no_further_than_the_smallest_crop_allows(tmp_path):
    rgb(1600, 1200).save(tmp_path/'a.jpg')
    for crop, least in ((RandomResizedCrop(32, .5), 32), (CenterCrop(32), 32), (Resize(32), 32)):
        il = ImageList([tmp_path/'a.jpg'], tmp_path, tfms=[make_rgb, crop], open=partial(open_picture, draft=crop.draft))
        w, h = il.get(il.items[0]).size
        smallest = math.sqrt(.5*w*h*3/4) if isinstance(crop, RandomResizedCrop) else min(w, h)/getattr(crop, 'scale', 1)
        assert w < 1600 and smallest >= 2*least, (crop, w, h)


def test_crop_resize_of_fractions_reads_only_around_its_box():
    im = Image.new('RGB', (40, 40))
    im.paste((255, 255, 255), (0, 0, 20, 40))
    assert np.asarray(crop_resize(im, (8, 8), (22.5, 3.5, 38.5, 19.5))).max() == 0
    assert np.asarray(crop_resize(im, (8, 8), (1.5, 3.5, 17.5, 19.5))).min() == 255


# found by a second reading
def test_an_augment_in_another_is_refused():
    for make in (lambda: Augment(Augment(RandomFlip(p=1))), lambda: BatchAugment(Augment(RandomFlip()), RandomColor())):
        with pytest.raises(TypeError, match='would do nothing'): make()
    with pytest.raises(ValueError, match='padding: give it to the Augment'): BatchAugment(Augment(RandomFlip()), padding='zeros')


@pytest.mark.parametrize('magnitude', [.2, .5])
def test_a_tilted_crop_never_leaves_the_picture(magnitude):
    white, tilt = Image.new('RGB', (90, 60), 'white'), PilTiltRandomCrop(24, magnitude=magnitude)
    tilt.generator = gen()
    assert all(np.asarray(tilt(white)).min() == 255 for _ in range(200))
    with pytest.raises(ValueError, match='magnitude'): PilTiltRandomCrop(24, magnitude=.6)            # there it may fold


@pytest.mark.parametrize('sizes', [(96, 125), (125, 96), (64, 112)])
def test_growing_crops_stay_between_their_sizes(sizes):
    seen = [BatchCrop(sizes).size_in(e, 20) for e in range(20)]
    assert (seen[0], seen[-1]) == sizes and min(sizes) <= min(seen) <= max(seen) <= max(sizes) and seen == sorted(seen, reverse=sizes[0] > sizes[1])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_16_bit_pictures(dtype):
    grey = torch.full((2, 3, 8, 8), .4, dtype=dtype)
    assert recolor(grey, hue=torch.tensor([.2, .4])).isfinite().all()
    x = torch.rand(2, 3, 20, 20, generator=gen())
    got = crop_batch(x.to(dtype), [(0, 0, 16, 16)]*2, 8)
    assert got.dtype == dtype and torch.allclose(got.float(), crop_batch(x, [(0, 0, 16, 16)]*2, 8), atol=.01)


# found by a third reading
def test_only_the_first_batch_of_floats_is_looked_at(monkeypatch):
    "A look at the range is a wait for the whole queue of a GPU. A batch that was refused does not count, nor do bytes."
    x, looks, real = smooth(4, 3, 12, 12, 0, torch.float32), [], torch.Tensor.min
    monkeypatch.setattr(torch.Tensor, 'min', lambda t, *a, **k: (looks.append(t.dtype), real(t, *a, **k))[1])
    for tfm in (RandomColor(p=1.), RandomErasing(1.)):
        aug = Augment(tfm)
        aug((255*x).to(torch.uint8), gen())
        assert looks == []
        for _ in range(2):
            with pytest.raises(ValueError, match='-2.00 – 2.00: divide bytes by 255'): aug(4*x - 2, gen())
        looks.clear()
        aug(x, gen())
        assert len(looks) == 1
        for s in range(5): aug(x, gen(s))
        assert len(looks) == 1
        looks.clear()


# found by users
@pytest.mark.parametrize('xb', [[torch.rand(4, 3, 16, 16)], {'x': torch.rand(4, 3, 16, 16)}], ids=['list', 'dict'])
@pytest.mark.parametrize('make', [lambda: BatchAugment(RandomFlip()), lambda: BatchCrop(8)])
def test_inputs_that_are_no_one_tensor_are_refused_in_a_sentence(make, xb):
    cb, run = make(), SimpleNamespace(in_train=True, xb=xb, epoch=0, n_epochs=1)
    with pytest.raises(ValueError, match=f'{type(cb).__name__} .* one tensor.* {type(xb).__name__}'): cb.begin_batch(run)
    run.in_train = False
    cb.begin_batch(run)
    assert run.xb is xb


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize('tfm', [RandomErasing(1.), RandomErasing(.5, value=.3), RandomColor(p=1., hue=.1, saturation=.2), RandomFlip(1.), RandomAffine(p=1.), RandomPerspective(p=1.)], ids=lambda t: type(t).__name__)
def test_no_pictures_are_left_as_they_are(tfm, dtype):
    aug = Augment(tfm)
    for shape in ((0, 3, 16, 16), (0, 1, 5, 9)):
        out = aug(torch.empty(shape, dtype=dtype), gen())
        assert out.shape == shape and out.dtype == dtype
    if isinstance(tfm, (RandomErasing, RandomColor)):
        with pytest.raises(ValueError, match='augment before normalising'): aug(torch.full((2, 3, 8, 8), -2.), gen())            # nothing was looked at so far
