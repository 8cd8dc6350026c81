"""Transforms: equal to torchvision's for given parameters, drawn as they should be, the same for a seed everywhere, and resumed to the bit."""
import copy
import math
import multiprocessing
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from exp.batch_transforms import (Augment, Draw, RandomColor, RandomDihedral, RandomErasing, RandomPerspective, dihedral_mats, move_boxes,
                                  move_points, recolor, warp)
from exp.callbacks import AvgStatsCallback, BatchTransformXCallback, Callback, Runner, accuracy
from exp.checkpoints import Checkpoint
from exp.convnets import Lambda, flatten
from exp.data_block import (CategoryProcessor, ImageList, LabeledData, NormalizeBytes, SplitData, grandparent_splitter, label_by_func,
                            make_rgb, parent_labeler, to_byte_tensor, to_float_tensor)
from exp.export_models import export, load_learner, pack
from exp.fast_batches import ItemLoader, fast_dl, is_random, load_batch
from exp.files import CheckpointError
from exp.learner import Learner
from exp.optimizers import sgd_mom_opt
from exp.transforms import (BatchAugment, BatchCrop, CenterCrop, GeneralCrop, PilRandomDihedral, PilRandomFlip, PilRandomRotate,
                            PilTiltRandomCrop, RandomAffine, RandomFlip, RandomResizedCrop, Resize, affine, affine_mats, crop_batch,
                            crop_resize, dihedral, homography, np_to_float, show_tfm, tilted)

few = settings(max_examples=20, deadline=None)
sizes, channels, dtypes, seeds = st.integers(9, 40), st.sampled_from([1, 3]), st.sampled_from([torch.uint8, torch.float32]), st.integers(0, 2**31)
BILINEAR = InterpolationMode.BILINEAR


def gen(s=0): return torch.Generator().manual_seed(s)


def seeded(tfm, s=0):
    tfm.generator = gen(s)
    return tfm


def smooth(n, c, h, w, seed=0, dtype=torch.uint8):
    "Noise of a few pixels' grain, full range."
    x = F.interpolate(torch.rand(n, c, h//3 + 2, w//3 + 2, generator=gen(seed)), (h, w), mode='bilinear', align_corners=False)
    x = (x - x.amin((1, 2, 3), True))/(x.amax((1, 2, 3), True) - x.amin((1, 2, 3), True))
    return (255*x).round().to(torch.uint8) if dtype == torch.uint8 else x


def gap(a, b): return (a.double() - b.double()).abs()*(1 if a.dtype == torch.uint8 else 255)
def inside(mats, h, w): return warp(torch.ones(len(mats), 1, h, w), mats, padding='zeros') > 1 - 1e-4
def rgb(w, h, seed=0): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))
def ints(im): return np.asarray(im, dtype=int)
def batch_tfms(): return [RandomFlip(), RandomDihedral(), RandomAffine(20, (.8, 1.2), 5, .1, p=.6), RandomPerspective(.3, p=.6),
                          RandomColor(.3, .3, .3, .1, p=.6), RandomErasing()]


by_name = dict(ids=lambda t: getattr(t, '__name__', type(t).__name__))
each = pytest.mark.parametrize('tfm', batch_tfms(), **by_name)


# ---------------------------------------------------------------- geometry

@few
@given(sizes, sizes, channels, dtypes, st.floats(-180, 180), st.floats(.6, 1.8), *[st.floats(-20, 20)]*2, *[st.integers(-6, 6)]*2, seeds)
def test_affine_as_torchvision(h, w, c, dtype, angle, zoom, sx, sy, dx, dy, seed):
    x, m = smooth(2, c, h, w, seed, dtype), affine_mats(angle, zoom, (sx, sy), (dx, dy)).repeat(2, 1, 1)
    tv, mask = TF.affine(x, angle=angle, translate=[dx, dy], scale=zoom, shear=[sx, sy], interpolation=BILINEAR), inside(m, h, w)
    for ours in (affine(x, m, 'zeros'), affine(x, m), warp(x, m, padding='zeros'), warp(x, m)):          # they differ outside only
        assert ours.dtype == dtype and ours.shape == x.shape and (gap(ours, tv)*mask).max() <= 1
    for pad in ('zeros', 'border', 'reflection'): assert gap(affine(x, m, pad), warp(x, m, padding=pad)).max() <= 1


@few
@given(sizes, sizes, channels, dtypes, st.floats(0, .4), seeds)
def test_perspective_as_torchvision(h, w, c, dtype, magnitude, seed):
    x = smooth(1, c, h, w, seed, dtype)
    m, start = seeded(RandomPerspective(magnitude, p=1), seed).mats(x.shape), torch.tensor([[0., 0], [w, 0], [w, h], [0, h]])
    tv = TF.perspective(x, start.tolist(), move_points(start[None], m, (h, w))[0].tolist(), interpolation=BILINEAR)
    assert (gap(warp(x, m, padding='zeros'), tv)*inside(m, h, w)).max() <= 1


def test_homography_takes_four_points_to_four():
    src, dst = torch.rand(5, 4, 2, generator=gen()) + torch.tensor([[0, 0], [2, 0], [2, 2], [0, 2]]), torch.rand(4, 2, generator=gen(1)) + 3
    q = F.pad(src.double(), (0, 1), value=1) @ homography(src, dst).mT
    torch.testing.assert_close(q[..., :2]/q[..., 2:], dst.double().expand(5, 4, 2), atol=1e-6, rtol=0)
    assert tilted(.25, 0.).tolist() == [[-1, -.75], [1, -1.25], [1, 1.25], [-1, .75]]                     # the right side longer
    assert tilted(0., .25).tolist() == [[-.75, -1], [.75, -1], [1.25, 1], [-1.25, 1]]                     # the lower


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_turns_and_what_stands_still(dtype):
    "The eight numbers mean the same for pictures and for matrices; a matrix that does nothing leaves its picture to the bit."
    x, eye = smooth(8, 3, 20, 20).to(dtype), torch.eye(3).repeat(8, 1, 1)
    turned = warp(x, dihedral_mats(torch.arange(8)))
    for k in range(8):
        pil = dihedral(Image.fromarray(x[k].byte().permute(1, 2, 0).numpy()), k)
        assert gap(turned[k].float(), to_byte_tensor(pil).float()).max() <= 255*(0 if dtype == torch.uint8 else 1 if dtype == torch.bfloat16 else .01)
    assert warp(x, eye) is x and warp(x[:0], eye[:0]).shape == (0, 3, 20, 20)
    mixed = warp(x, affine_mats(rotate=torch.tensor([0., 5]*4)))
    assert mixed[::2].equal(x[::2]) and not mixed[1].equal(x[1])


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
def test_a_batch_is_its_pictures(dtype, monkeypatch):
    "In chunks, alone, channels last; bicubic overshoots, and is cut."
    x = smooth(11, 3, 20, 24, 0, dtype)
    draw = seeded(Augment(RandomFlip(), RandomAffine(p=.5), RandomPerspective(p=.5), RandomColor(.3, .3, .3, .1, p=.6)), 1).draw(x.shape)
    whole = draw(x)
    for i in range(11):
        one = Draw((1, *x.shape[1:]), draw.mats[i:i+1], [{k: v[i:i+1] for k, v in c.items()} for c in draw.color])
        assert gap(one(x[i:i+1]), whole[i:i+1]).max() <= 1
    for chunk in (3*x[0].numel() + 1, 1):
        monkeypatch.setattr('exp.batch_transforms.CHUNK', chunk)
        assert draw(x).equal(whole)
    assert gap(draw(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), whole).max() <= 1
    if dtype == torch.uint8:
        assert (draw(x.float()/255)*255 - whole).abs().max() <= .6                     # rounded, not cut
        assert (affine(x.float(), draw.mats) - affine(x, draw.mats)).abs().max() <= .51
        cubic = (255*warp(x.float()/255, draw.mats, 'bicubic')).round()
        assert cubic.min() < 0 or cubic.max() > 255
        assert (warp(x, draw.mats, 'bicubic') - cubic.clamp(0, 255)).abs().max() <= 1


@pytest.mark.parametrize('h,w', [(64, 64), (48, 80), (33, 51)])
def test_points_and_boxes_go_along(h, w):
    at = torch.rand(60, 1, 2, generator=gen())*torch.tensor([w/2, h/2]) + torch.tensor([w/4, h/4])
    ys, xs = torch.arange(h)[:, None] + .5, torch.arange(w)[None] + .5
    spots = torch.exp(-((xs - at[..., 0, None])**2 + (ys - at[..., 1, None])**2)/4)[:, None]
    aug = Augment(RandomFlip(), RandomAffine(30, (.8, 1.2), 8, .05), RandomPerspective(.2), padding='zeros')
    draw = seeded(aug).draw(spots.shape)
    out, there = draw(spots)[:, 0], draw.points(at)[:, 0]
    found = torch.stack([(out*xs).sum((1, 2))/out.sum((1, 2)), (out*ys).sum((1, 2))/out.sum((1, 2))], 1)
    clear = ((there > 8) & (there < torch.tensor([w - 8, h - 8]))).all(1)
    assert clear.sum() > 20 and ((found - there).norm(dim=1)[clear] < .5).all()
    shift, flip = SimpleNamespace(mats=lambda shape: affine_mats(translate=(8., 0.))), RandomFlip(1.)
    assert [Augment(*o).draw((1, 3, h, w)).mats[0, 0, 2] for o in ((shift, flip), (flip, shift))] == [-8, 8]       # in the order given
    l, t, r, b = box = w//3, h//3, w//2, h//2
    spots[:] = 0.
    spots[:, :, t:b, l:r] = 1.
    for (l, t, r, b), o in zip(draw.boxes(torch.tensor([[box]]*60))[:, 0], draw(spots)[:, 0] > .5):
        rows, cols = o.any(1).nonzero(), o.any(0).nonzero()
        assert max(abs(l - cols.min()), abs(r - cols.max() - 1), abs(t - rows.min()), abs(b - rows.max() - 1)) < 1.5
    assert move_boxes(torch.tensor([[[0., 0, 8, 8]]]), affine_mats(translate=(-4., 6.)), (10, 10)).tolist() == [[[0, 6, 4, 10]]]      # cut


# ---------------------------------------------------------------- colours

@few
@given(sizes, sizes, channels, dtypes, st.floats(.3, 1.8), seeds)
def test_colours_as_torchvision(h, w, c, dtype, f, seed):
    x, turn = smooth(2, c, h, w, seed, dtype), max(-.5, min(.5, (f - 1)/2))
    for name, v in dict(brightness=f, contrast=f, saturation=f, **({'hue': turn} if c == 3 else {})).items():
        ours, theirs = recolor(x, **{name: torch.full((2,), v)}), getattr(TF, f'adjust_{name}')
        if dtype == torch.uint8: assert (ours.double() - 255*theirs(x.float()/255, v).double()).abs().max() <= .51      # the nearest byte
        else: assert gap(ours, theirs(x, v)).max() <= 1


def test_colours_of_each_picture_are_its_own():
    x, f = smooth(5, 3, 20, 20, 0, torch.float32), torch.tensor([.5, 1, 1.2, 1.5, .8])
    kw = dict(brightness=f, contrast=f.flip(0), saturation=f, hue=(f - 1)/3)
    both = recolor(x, **kw)
    for i in range(5): torch.testing.assert_close(both[i:i+1], recolor(x[i:i+1], **{k: v[i:i+1] for k, v in kw.items()}))
    tv = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(x/2, 1.2), .7), .8)                    # where nothing is cut
    assert gap(recolor(x/2, brightness=f*0 + 1.2, contrast=f*0 + .7, saturation=f*0 + .8), tv).max() < .5
    assert both.min() >= 0 and both.max() <= 1 and recolor(x, **{k: v*0 + (k != 'hue') for k, v in kw.items()}).equal(x)
    assert recolor(torch.full((2, 3, 8, 8), .4).half(), hue=torch.tensor([.2, .4])).isfinite().all()


def test_erasing():
    x = torch.zeros(300, 3, 30, 40, dtype=torch.uint8)
    out = seeded(RandomErasing(1., scale=(.1, .3), ratio=(.5, 2.), value=1.))(x)
    assert x.sum() == 0 and set(out.unique().tolist()) == {0, 255}
    for o in out[:, 0] == 255:
        r, c = o.any(1).nonzero().flatten(), o.any(0).nonzero().flatten()
        hh, ww = r.max() - r.min() + 1, c.max() - c.min() + 1
        assert o.sum() == hh*ww and .08 < hh*ww/1200 < .33 and .42 < ww/hh < 2.4       # whole, of the size and shape asked for
    noise = seeded(RandomErasing(1.))(x).flatten(1)
    assert len(noise.unique(dim=0)) == 300 and noise.float().max() > 200
    assert not seeded(RandomErasing(p=1, scale=(1, 1), ratio=(9, 9)))(x).any()         # the whole area at 9:1: none of ten fits


# ---------------------------------------------------------------- pictures of Pillow

@few
@given(st.integers(20, 90), st.integers(20, 90), channels, dtypes, st.integers(9, 40), seeds)
def test_random_crops_are_torchvisions_resized_crops(w, h, c, dtype, size, seed):
    "Of a picture; and of a batch, with the same boxes for one generator."
    im, crop = rgb(w, h, seed), seeded(RandomResizedCrop((24, 17), .1), seed)
    l, t, r, b = crop.get_corners(w, h)
    np.testing.assert_array_equal(seeded(crop, seed)(im), TF.resized_crop(im, t, l, b - t, r - l, [17, 24]))
    x, crop = smooth(3, c, h, w, seed, dtype), seeded(RandomResizedCrop(size, .35), seed)
    boxes = [crop.get_corners(w, h) for _ in x]
    ref = torch.stack([TF.resized_crop(o, t, l, b - t, r - l, [size, size], antialias=True) for o, (l, t, r, b) in zip(x, boxes)])
    run = SimpleNamespace(in_train=True, xb=x, yb=None, epoch=0, n_epochs=1)
    BatchCrop(size, seed=seed).begin_batch(run)
    assert run.xb.dtype == dtype and run.xb.shape == (3, c, size, size) and gap(run.xb, ref).max() <= 1
    assert dtype != torch.uint8 or (crop_batch(x.float(), boxes, size) - run.xb).abs().max() <= 1.05    # what a GPU computes for bytes
    assert gap(crop_batch((x/(255 if dtype == torch.uint8 else 1)).bfloat16(), boxes, size).float(), ref/(255 if dtype == torch.uint8 else 1)).max() < 4


@pytest.mark.parametrize('first,last,step', [(64, 100, 16), (96, 125, 16), (125, 96, 16), (96, 32, 32), (50, 50, 16)])
def test_pictures_that_grow(first, last, step):
    for n in (1, 4, 20):
        seen = [BatchCrop((first, last), step=step).size_in(e, n) for e in range(n)]
        assert seen[-1] == last and (n == 1 or seen[0] == first) and seen == sorted(seen, reverse=first > last)
        assert min(first, last) <= min(seen) and max(seen) <= max(first, last) and all((s - first) % step == 0 for s in seen[:-1] if s != last)


def test_other_pictures_as_torchvision():
    im = Image.fromarray(smooth(1, 3, 60, 80)[0].permute(1, 2, 0).numpy())
    for ours, theirs in [(GeneralCrop(30, crop_size=30)(im), TF.center_crop(im, [30, 30])), (Resize(30)(im), TF.resize(im, [30])),
                         (CenterCrop(60, scale=1)(im), TF.center_crop(im, [60, 60])), (PilRandomFlip(1)(im), TF.hflip(im)),
                         (CenterCrop((20, 10), scale=2)(im), im.crop((20, 20, 60, 40)).resize((20, 10), 2))]:
        np.testing.assert_array_equal(ours, theirs)
    degrees = 30*(2*torch.rand(2, generator=gen(3), dtype=torch.float64)[1].item() - 1)
    rot = seeded(PilRandomRotate(30, p=1, fill=(7, 9, 7)), 3)
    np.testing.assert_array_equal(rot(im), TF.rotate(im, degrees, BILINEAR, fill=[7, 9, 7]))
    for a in (im, im.convert('L'), np.asarray(im)): assert np_to_float(a).equal(to_float_tensor(to_byte_tensor(a)))


def test_a_tilted_crop_is_what_its_corners_say():
    im, size = Image.fromarray(smooth(1, 3, 60, 80)[0].permute(1, 2, 0).numpy()), (80, 60)
    tilt = PilTiltRandomCrop(size, crop_size=size, magnitude=.4)
    src = seeded(tilt, 5).get_corners(*size, *size)
    m = homography(torch.tensor([[0., 0], [80, 0], [80, 60], [0, 60]]), src)                  # pixel by pixel, in float64
    grid = torch.stack([*torch.meshgrid(torch.arange(60) + .5, torch.arange(80) + .5, indexing='ij')[::-1], torch.ones(60, 80)], -1).double() @ m.T
    at = grid[..., :2]/grid[..., 2:]/torch.tensor(size)*2 - 1
    ref = F.grid_sample(torch.from_numpy(ints(im)).double().permute(2, 0, 1)[None], at[None], padding_mode='border', align_corners=False)[0]
    assert np.abs(ints(seeded(tilt, 5)(im)) - ref.permute(1, 2, 0).numpy())[1:-1, 1:-1].max() <= 1.01
    big, fine = Image.effect_noise((400, 400), 99), PilTiltRandomCrop(40, crop_size=400, magnitude=0)
    assert ints(fine(big)).std() < 15 < ints(big).std()/2                                     # shrunk by averaging, not by leaving out
    wide = PilTiltRandomCrop((40, 400), crop_size=400, magnitude=0)
    assert ints(wide(big)).std() < 40                                                         # each side by its own share


@pytest.mark.parametrize('magnitude', [.2, .5])
def test_a_tilted_crop_never_leaves_the_picture(magnitude):
    white, tilt = Image.new('RGB', (90, 60), 'white'), seeded(PilTiltRandomCrop(24, magnitude=magnitude))
    assert all(ints(tilt(white)).min() == 255 for _ in range(100))


def test_crop_resize_of_fractions_reads_only_around_its_box():
    im = Image.new('RGB', (40, 40))
    im.paste((255, 255, 255), (0, 0, 20, 40))
    assert ints(crop_resize(im, (8, 8), (22.5, 3.5, 38.5, 19.5))).max() == 0
    assert ints(crop_resize(im, (8, 8), (1.5, 3.5, 17.5, 19.5))).min() == 255
    assert ints(crop_resize(Image.fromarray(np.array([[0, 200]]*2, np.uint8)), (1, 1), (.25, 0, 1.25, 2))).item() == 50      # a quarter of the second


def test_the_lessons_lists_run_as_written(data_home):
    "Cells of the 2019 notebook."
    for tfms in ([make_rgb, RandomResizedCrop(128, scale=(0.35, 1)), np_to_float, PilRandomFlip()],
                 [make_rgb, PilTiltRandomCrop(128, magnitude=0.1), PilRandomFlip(), to_byte_tensor, to_float_tensor],
                 [make_rgb, PilRandomDihedral(p=0.75), CenterCrop(128), np_to_float]):
        x = ImageList.from_files(data_home/'data'/'drawn-shapes-160'/'val', tfms=tfms)[3]
        assert x.shape == (3, 128, 128) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1


# ---------------------------------------------------------------- how it is drawn

@pytest.mark.parametrize('size,scale', [((160, 160), (.08, 1.)), ((500, 250), (.35, 1.)), ((120, 700), (.08, 1.)), ((300, 400), (.35, .8))])
def test_random_resized_crop_draws_as_torchvision(size, scale):
    ks, n, crop = pytest.importorskip('scipy.stats').ks_2samp, 10_000, seeded(RandomResizedCrop(32, scale))
    ours = np.array([crop.get_corners(*size) for _ in range(n)], float)
    torch.manual_seed(0)
    tv, blank = v2.RandomResizedCrop(32, scale=scale), [Image.new('L', size)]
    theirs = np.array([(p['left'], p['top'], p['left'] + p['width'], p['top'] + p['height']) for p in (tv.make_params(blank) for _ in range(n))], float)
    def facts(b):
        cw, ch = b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]
        return [cw*ch, cw/ch, b[:, 0], b[:, 1], (b[:, 0] + b[:, 2])/2, (b[:, 1] + b[:, 3])/2]
    assert all(ks(a, b).pvalue > 1e-3 for a, b in zip(facts(ours), facts(theirs)))


@pytest.mark.parametrize('w,h', [(1000, 10), (10, 1000), (3000, 1), (1, 1), (1, 3000), (2, 3)])
def test_extreme_shapes(w, h):
    crop = seeded(RandomResizedCrop(16))
    for _ in range(50):
        l, t, r, b = crop.get_corners(w, h)
        assert 0 <= l < r <= w and 0 <= t < b <= h
    if max(w, h)/min(w, h) > 20:                                                       # always the fallback, which is torchvision's
        p = v2.RandomResizedCrop(16).make_params([Image.new('L', (w, h))])
        assert (p['left'], p['top'], p['left'] + p['width'], p['top'] + p['height']) == (l, t, r, b)
    for tfm in (crop, CenterCrop(16), PilTiltRandomCrop(16), GeneralCrop(16)): assert tfm(Image.new('RGB', (w, h))).size == (16, 16)
    assert min(Resize(5)(Image.new('RGB', (w, h))).size) == 5


@each
def test_each_picture_draws_for_itself(tfm):
    "Of one picture 400 times the right share is left alone, neighbours are independent; alone or in an `Augment`, it draws the same."
    x = smooth(1, 3, 16, 16).expand(400, -1, -1, -1)
    before, out = x.clone(), seeded(Augment(tfm))(x)
    assert gap(seeded(tfm)(x), out).max() <= 1 and x.equal(before)
    changed, kind = (out != x).flatten(1).any(1).double(), type(tfm).__name__
    p = tfm.p*{'RandomDihedral': 7/8}.get(kind, 1)
    left_alone = (seeded(tfm)(x/255) == x/255).flatten(1).all(1).double()                # floats, to the bit
    for share in (changed.mean(), 1 - left_alone.mean()): assert abs(share - p) < 4*math.sqrt(p*(1 - p)/400)
    c = changed - changed.mean()
    assert abs((c[1:]*c[:-1]).mean()/c.var()) < .2
    n = len(out.flatten(1).unique(dim=0))
    assert n == {'RandomFlip': 2, 'RandomDihedral': 8}.get(kind, n) and (n < 9 or n > .8*changed.sum())


@each
def test_p_0_draws_nothing_and_gives_the_batch_itself(tfm):
    off, g, x = copy.copy(tfm), gen(), smooth(4, 3, 12, 12, 0, torch.float32)
    off.p, off.generator = 0, g
    aug = Augment(off)
    aug.generator = g
    assert off(x) is x and aug(x) is x and g.get_state().equal(gen().get_state())
    for t in (tfm, Augment(tfm)): assert t(x[:0]).shape == (0, 3, 12, 12)


def test_pictures_draw_with_probability_p():
    im = rgb(8, 8)
    for tfm, p in ((PilRandomFlip(.3), .3), (PilRandomDihedral(.8), .7), (PilRandomRotate(p=.6), .6)):
        assert abs(np.mean([seeded(tfm)(im) is not im] + [tfm(im) is not im for _ in range(1999)]) - p) < .05
    turns = seeded(PilRandomDihedral(1.))
    assert len({turns(im).tobytes() for _ in range(99)}) == 8 and PilRandomFlip(0)(im) is im


def test_draws_are_independent_of_each_other():
    m = seeded(RandomAffine(30, (.5, 2), 0, .2, p=1)).mats((5000, 3, 32, 64))
    facts = torch.stack([torch.atan2(m[:, 1, 0], m[:, 0, 0]), m[:, :2, :2].det().log(), m[:, 0, 2], m[:, 1, 2]])
    assert (torch.cat([facts[:, 1:], facts[:, :-1]]).corrcoef() - torch.eye(8)).abs().max() < .06
    assert facts[1].mean().abs() < .05                                                  # as likely to halve as to double
    top, want = facts.abs().amax(1), torch.tensor([math.radians(30), 2*math.log(2), .2*64, .2*32]).double()
    assert (top <= want).all() and (top > .98*want).all()
    c = seeded(RandomColor(.5, None, .2, .1, p=1)).color((5000, 3, 8, 8))
    assert c.keys() == {'brightness', 'saturation', 'hue'}
    for k, hi in dict(brightness=1.5, saturation=1.2, hue=.1).items():
        lo = -hi if k == 'hue' else 1/hi
        assert lo <= c[k].min() < lo + .02 and hi - .02 < c[k].max() <= hi


def test_same_seed_same_batch_other_seed_other_batch():
    x, aug, state = smooth(16, 3, 20, 20), Augment(*batch_tfms()), torch.get_rng_state()
    a, b, c = (seeded(aug, s)(x) for s in (1, 1, 2))
    assert a.equal(b) and not a.equal(c) and torch.get_rng_state().equal(state)         # the global generator is not touched
    aug.generator = None                                                                # then it is what is drawn from
    d = [(torch.manual_seed(0), aug(x))[1] for _ in range(2)]
    assert d[0].equal(d[1])


# ---------------------------------------------------------------- workers, processes, a learner

PIL_TFMS = [make_rgb, RandomResizedCrop(16, .3), PilRandomFlip(), PilRandomRotate(20), to_byte_tensor]


@pytest.fixture
def folder(tmp_path):
    for i in range(24):
        side, c = 'valid' if i % 4 == 3 else 'train', 'ab'[i//2 % 2]
        (tmp_path/'in'/side/c).mkdir(parents=True, exist_ok=True)
        im = ints(rgb(22, 20, i)).astype(np.uint8)
        im[:9] = 255*(c == 'a')
        Image.fromarray(im).save(tmp_path/'in'/side/c/f'{i:03d}.png')
    return tmp_path/'in'


def test_workers_epochs_and_starts_by_spawn(folder):
    il = ImageList.from_files(folder/'train', tfms=PIL_TFMS)
    ll = LabeledData.label_by_func(il, parent_labeler, proc_y=CategoryProcessor())
    def loader(seed, workers, **kw): return ItemLoader(ll, 4, True, seed, num_workers=workers, **kw)
    none, two, spawned = loader(1, 0), loader(1, 2), loader(1, 1, multiprocessing_context=multiprocessing.get_context('spawn'))
    a, b = ([torch.cat([x for x, _ in dl]) for _ in range(2)] for dl in (none, two))
    assert a[0].equal(b[0]) and a[1].equal(b[1]) and torch.cat([x for x, _ in spawned]).equal(a[0])
    def sort(x): return x.flatten(1).float().sum(1).sort().values
    assert not sort(a[0]).equal(sort(a[1]))                                             # not the same draws in another order
    assert not torch.cat([x for x, _ in loader(2, 0)]).equal(a[0])
    two._iterator = spawned._iterator = None
    assert is_random(il) and not is_random(ImageList(il.items, tfms=[make_rgb, CenterCrop(16), to_byte_tensor]))
    xb, *_ = load_batch(ImageList([il.items[0]]*8, folder, tfms=PIL_TFMS), range(8), seed=0)
    assert len(xb.flatten(1).unique(dim=0)) == 8                                        # two copies of one picture draw differently


def test_pickles():
    for tfm in [*PIL_TFMS[1:4], PilRandomDihedral(), PilTiltRandomCrop(16), CenterCrop(16), Resize(9), *batch_tfms(), Augment(*batch_tfms())]:
        assert set(vars(pickle.loads(pickle.dumps(tfm)))) == set(vars(tfm))


def make_learner(folder, workers, seed):
    torch.manual_seed(seed)
    il = ImageList.from_files(folder, tfms=[make_rgb, CenterCrop(16), to_byte_tensor])
    sd = label_by_func(SplitData.split_by_func(il, grandparent_splitter), parent_labeler)
    sd.train.x.tfms = PIL_TFMS
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Dropout(.2), nn.AdaptiveAvgPool2d(2), Lambda(flatten), nn.Linear(16, 2))
    data = sd.to_databunch(4, seed=seed, num_workers=workers, make_dl=fast_dl)
    return Learner(net, data, F.cross_entropy, sgd_mom_opt, lr=.05, cbs=[AvgStatsCallback(accuracy, silent=True)])


class StopAt(Callback):
    _order = 2000
    def __init__(self, at): self.at = at
    def after_batch(self, run):
        if run.in_train and run.n_iter == self.at: raise KeyboardInterrupt


def fit_cbs(seed=7):
    aug = BatchAugment(RandomFlip(), Augment(*batch_tfms()), seed=seed)
    return [aug, BatchTransformXCallback(NormalizeBytes([.5]*3, [.3]*3)), BatchCrop((8, 14), step=2, seed=4)]


@pytest.mark.parametrize('workers', [0, 2])
def test_resumes_to_the_bit(workers, folder, tmp_path):
    "Stopped in the first epoch, at its end and in the second; another seed afterwards. The generators come out of the checkpoint."
    def end(learn):
        learn.data.train_dl._iterator = learn.data.valid_dl._iterator = None
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    def fit(seed, cbs):
        learn = make_learner(folder, workers, seed)
        torch.manual_seed(3)
        learn.fit(2, cbs)
        return learn
    ref = fit(0, fit_cbs())
    want, n = end(ref), len(ref.data.train_dl)
    for at in (2, n, n + 2):
        with pytest.raises(KeyboardInterrupt): fit(0, [*fit_cbs(), Checkpoint(tmp_path/f'{at}', every=1), StopAt(at)])
        new, ck, cbs = make_learner(folder, workers, 50 + at), Checkpoint(tmp_path/f'{at}'), fit_cbs(12345)
        new.fit(2, [*cbs, ck], start=ck.start(new))
        assert end(new).equal(want), at
    assert not end(fit(0, fit_cbs(8))).equal(want)                                      # so the draws do matter


class Look(Callback):
    _order = 1.5
    def __init__(self): self.seen = {True: [], False: []}
    def begin_batch(self, run): self.seen[run.in_train].append(run.xb)


def test_validation_gets_none_and_looking_leaves_no_trace(folder, tmp_path):
    learn, cbs, look = make_learner(folder, 0, 0), fit_cbs(), Look()
    learn.add_cbs([*cbs, look])
    plain = torch.cat([x for x, _ in learn.data.valid_dl])
    learn.fit(1)
    assert torch.cat(look.seen[False]).equal(plain) and {x.shape[2] for x in look.seen[True]} == {14}
    def states(): return [cb.generator.get_state() for cb in (cbs[0], cbs[2])]
    before = states()
    learn.validate()
    learn.get_preds()
    learn.lr_find(max_iter=3)
    with learn.untouched(): learn.fit(1)
    assert all(a.equal(b) for a, b in zip(before, states()))
    learn.fit(1)
    assert not any(a.equal(b) for a, b in zip(before, states()))
    learn.remove_cbs(look)
    path = export(learn, tmp_path/'e.pt')                                               # it shapes no batch at prediction
    assert load_learner(path).data.source.valid.x.tfms[1].size == (16, 16)
    with pytest.raises(CheckpointError, match='RandomResizedCrop'): pack(RandomResizedCrop(8))


def test_with_the_runner_of_notebook_04():
    x, y = smooth(12, 3, 16, 16, 0, torch.float32), torch.randint(0, 2, (12,), generator=gen())
    net, look = nn.Sequential(Lambda(flatten), nn.Linear(768, 2)), Look()
    data = SimpleNamespace(train_dl=[(x, y)], valid_dl=[(x, y)])
    Runner(net, data, F.cross_entropy, torch.optim.SGD(net.parameters(), lr=.1), [look, BatchAugment(RandomFlip(1.), seed=0)]).fit(1)
    assert look.seen[True][0].equal(x.flip(3)) and look.seen[False][0] is x


# ---------------------------------------------------------------- showing, and what is refused

@pytest.mark.parametrize('tfm', [PilRandomFlip(), RandomResizedCrop(32), CenterCrop(32), np_to_float], **by_name)
def test_every_transform_shows_itself(tfm):
    plt = pytest.importorskip('matplotlib.pyplot')
    state, mine = torch.get_rng_state(), getattr(tfm, 'generator', None)
    figs = [show_tfm(tfm, rgb(30, 30), seed=s) for s in (0, 0, 1)]
    ims = [[np.asarray(ax.images[0].get_array()) for ax in f.axes] for f in figs]
    assert len(ims[0]) == 5 and all(np.array_equal(a, b) for a, b in zip(*ims[:2]))
    assert torch.get_rng_state().equal(state) and getattr(tfm, 'generator', None) is mine
    plt.close('all')


@pytest.mark.parametrize('make', [
    lambda: PilRandomFlip(1.5), lambda: RandomAffine(p=-1), lambda: RandomResizedCrop(8, 35), lambda: RandomResizedCrop(8, ratio=(2, 1)),
    lambda: BatchCrop(8, scale=0), lambda: PilTiltRandomCrop(8, magnitude=.6), lambda: RandomPerspective(.5), lambda: RandomAffine(translate=2.),
    lambda: RandomAffine(zoom=(2, 1)), lambda: RandomAffine(zoom=0), lambda: RandomAffine(shear=90), lambda: RandomAffine(rotate=math.nan),
    lambda: RandomColor(hue=.6), lambda: RandomColor(contrast=-.1), lambda: RandomErasing(scale=(-1, 2)), lambda: RandomErasing(ratio=(0, 1)),
    lambda: RandomErasing(value=255), lambda: PilRandomRotate(math.nan), lambda: PilRandomRotate(-5), lambda: PilRandomFlip(math.nan), lambda: RandomColor(math.inf)])
def test_what_lies_out_of_its_range(make):
    with pytest.raises(ValueError, match=' is from '): make()


def test_masks_do_not_stay_behind():
    x, y = smooth(4, 3, 16, 16), torch.randint(0, 5, (4, 16, 16), generator=gen())
    for move in (BatchAugment(RandomFlip(1.)), BatchAugment(Augment(RandomDihedral())), BatchCrop(16)):
        for yb in (y, (y, y[:, 0, 0]), [y[:, 0, 0], y], {'mask': y, 'label': y[:, 0, 0]}, y[:, None], y[:, ::2, ::2], y[:, :5, :4]):
            with pytest.raises(TypeError, match='targets'): move.begin_batch(SimpleNamespace(in_train=True, xb=x, yb=yb, epoch=0, n_epochs=1))
    for yb in (y[:, 0, 0], (y[:, 0, 0], y[:, 0]), None): BatchAugment(RandomFlip(1.)).begin_batch(SimpleNamespace(in_train=True, xb=x, yb=yb))
    BatchAugment(RandomColor()).begin_batch(SimpleNamespace(in_train=True, xb=x, yb=y))
    draw = seeded(Augment(RandomFlip(1.), RandomColor())).draw(x.shape)
    assert draw.masks(y).equal(y.flip(2)) and draw.masks(y).dtype == y.dtype
    turned = Draw(x.shape, affine_mats(torch.full((4,), 20.)))
    assert set(turned.masks(y).unique().tolist()) <= set(range(5)) and not turned.masks(y).equal(y)


def test_what_an_augment_refuses():
    for wrong in (PilRandomFlip(), Augment(RandomFlip())):
        with pytest.raises(TypeError, match=type(wrong).__name__): Augment(wrong)
    x = smooth(4, 3, 12, 12, 0, torch.float32)
    for tfm in (RandomColor(p=1.), RandomErasing(1.)):
        aug = Augment(tfm)
        aug(x[:0])
        aug((255*x).byte())
        for _ in range(2):                                                              # normalised; a batch that was refused does not count
            with pytest.raises(ValueError, match='normalising'): aug(4*x - 2)
        aug(x)
        aug(4*x - 2)                                                                    # a look is a wait for a GPU: only the first is looked at
