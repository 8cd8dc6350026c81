"""exp.data_block against torchvision, Pillow, hypothesis, broken files and processes that start by spawn."""
import copy
import csv
import os
import pickle
import random
import subprocess
import sys
import threading
import warnings
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, small_env
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from exp import data_block as D
from exp import datasets
from exp.data_block import (CategoryProcessor, ImageList, ItemList, LabeledData, MultiCategoryProcessor, NumberProcessor, PathList, RegexLabeler, ResizeFixed,
                            SplitData, TableLabeler, get_files, grandparent_splitter, label_by_func, make_rgb, open_image, parent_labeler, to_byte_tensor,
                            to_float_tensor, verify_images)
from exp.datasets import DataError, URLs, untar_data

BYTES = [make_rgb, ResizeFixed(32), to_byte_tensor]


@pytest.fixture(scope='module')
def sample(data_home): return untar_data(URLs.SAMPLE, base=data_home/'data')


@pytest.fixture
def ll(sample): return labelled(sample, BYTES)


def labelled(path, tfms, valid='val'):
    sd = SplitData.split_by_func(ImageList.from_files(path, tfms=tfms), partial(grandparent_splitter, valid_name=valid))
    return label_by_func(sd, parent_labeler)


def pictures(root, *names, size=(40, 30)):
    "Small pictures, each of its own colour, at `names` below `root`."
    for i, n in enumerate(names):
        (root/n).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', size, (i*37 % 256, i*91 % 256, 60)).save(root/n)
    return root


def jpeg(path, size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path, quality=90)
    return path


# ------------------------------------------------------------------ the slides, as printed
def test_the_summary_cell_of_the_slides(data_home, monkeypatch):
    monkeypatch.setenv('EXP_DATA', 'sample')
    ImageList, SplitData, label_by_func = D.ImageList, D.SplitData, D.label_by_func
    bs = 64
    path = datasets.unzip_data(datasets.URLs.IMAGENETTE_160)
    tfms = [make_rgb, ResizeFixed(128), to_byte_tensor, to_float_tensor]
    il = ImageList.from_files(path, tfms=tfms)
    sd = SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val'))
    ll = label_by_func(sd, parent_labeler)
    data = ll.to_databunch(bs, c_in=3, c_out=10, num_workers=4)
    xb, yb = next(iter(data.train_dl))
    assert xb.shape == (64, 3, 128, 128) and xb.dtype == torch.float32 and 0 <= xb.min() < .2 and .8 < xb.max() <= 1
    assert yb.shape == (64,) and yb.dtype == torch.int64 and isinstance(data, D.DataBunch)
    assert len(data.train_ds) == 800 and len(data.valid_ds) == 300 and data.classes == sorted(datasets.SAMPLE_CLASSES)


def test_names_of_the_slides():
    for n in '''get_files image_extensions ListContainer ItemList ImageList grandparent_splitter split_by_func SplitData Processor CategoryProcessor
                ProcessedItemList LabeledData label_by_func parent_labeler make_rgb ResizeFixed to_byte_tensor to_float_tensor DataBunch databunchify show_image'''.split():
        assert hasattr(D, n), n
    assert hasattr(SplitData, 'to_databunch') and hasattr(D.ItemBunch, 'show_batch')


# ------------------------------------------------------------------ against torchvision and Pillow
def test_same_files_classes_and_pixels_as_imagefolder(sample):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2
    ref = ImageFolder(sample/'val', v2.Compose([v2.Resize((96, 96)), v2.PILToTensor()]))
    ll = labelled(sample, [make_rgb, ResizeFixed(96), to_byte_tensor])
    assert [str(p) for p in ll.valid.x.items] == [f for f, _ in ref.samples]
    assert ll.train.proc_y.vocab == ref.classes and ll.valid.y.items.tolist() == ref.targets
    for i in range(0, len(ref), 17): assert (ll.valid[i][0].int() - ref[i][0].int()).abs().max() <= 1


def test_same_files_as_a_plain_walk(sample):
    want = sorted(p for p in sample.rglob('*') if p.is_file() and not any(q[0] == '.' for q in p.relative_to(sample).parts))
    got = get_files(sample, recurse=True)
    assert sorted(got) == want and len(got) == 1100 and list(got) == list(get_files(sample, '.jpeg', recurse=True))
    assert len(get_files(sample)) == 0 and len(get_files(sample, recurse=True, include=['val'])) == 300 and not len(get_files(sample, '.png', recurse=True))


def test_a_batch_is_its_items(sample):
    for tfms in (BYTES, [*BYTES, to_float_tensor]):
        il = ImageList.from_files(sample, tfms=tfms[::-1])                      # listed in any order: _order decides
        xb, kept, bad = il.batch([5, 2, 900])
        assert kept == [5, 2, 900] and not bad and xb.equal(torch.stack([il[i] for i in (5, 2, 900)])) and xb.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('kind', ['BILINEAR', 'BICUBIC', 'LANCZOS'])
@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA'])
def test_resize_is_pillows_to_two_levels(sample, kind, mode):
    f, kind = get_files(sample, recurse=True)[0], Image.Resampling[kind]
    im = Image.open(f).convert(mode)
    for size in ((50, 20), (300, 200)):
        want, got = np.asarray(im.resize(size, kind), int), np.asarray(ResizeFixed(size, kind)(im), int)
        assert got.shape == want.shape and abs(got - want).max() <= 2 and abs(got - want).mean() < .2, size
        if mode == 'RGBA' or kind == Image.Resampling.LANCZOS: assert (got == want).all(), 'these go through Pillow itself'


def test_batches_of_mixed_pictures_are_their_items_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    for i, (w, h, c) in enumerate([(90, 60, 3), (90, 60, 3), (60, 90, 3), (90, 60, 1), (90, 60, 4), (33, 200, 3), (90, 60, 3)]):
        Image.fromarray(rng.integers(0, 256, (h, w, c), dtype=np.uint8).squeeze()).save(tmp_path/f'{i}.png')
    il = ImageList.from_files(tmp_path, tfms=[make_rgb, ResizeFixed((40, 24)), to_byte_tensor])
    xb, kept, _ = il.batch(range(7))
    assert kept == list(range(7)) and xb.equal(torch.stack(il[:])) and xb.shape == (7, 3, 24, 40)
    raw = ImageList(il.items, tmp_path, [ResizeFixed(8), to_byte_tensor])
    with pytest.raises(DataError, match=r'3.png is \(1, 8, 8\) where .*0.png is \(3, 8, 8\)'): raw.batch([0, 3])
    assert raw.batch([4])[0].equal(raw[4][None])                                # RGBA, resized by Pillow


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    y, x = np.mgrid[:960, :1280]
    Image.fromarray(np.stack([x//5 % 256, y//4 % 256, (x + y)//9 % 256], -1).astype(np.uint8)).save(tmp_path/'a.jpg', quality=95)
    small = ImageList([tmp_path/'a.jpg'], tfms=BYTES)
    assert min(open_image(tmp_path/'a.jpg', draft=64).size) < 960 and open_image(tmp_path/'a.jpg').size == (1280, 960)
    whole = to_byte_tensor(Image.open(tmp_path/'a.jpg').resize((32, 32), Image.Resampling.BILINEAR))
    assert (small[0].float() - whole.float()).abs().mean() < 2


@pytest.fixture
def simplejpeg(monkeypatch):
    "A stand-in for the package: Pillow's own pictures, `off` levels brighter."
    import io
    def install(off):
        m = type(sys)('simplejpeg')
        def load(data): return Image.open(io.BytesIO(data))
        m.decode_jpeg_header = lambda data: (*load(data).size[::-1], 'Gray' if load(data).mode == 'L' else 'YCbCr', '420')
        m.decode_jpeg = lambda data, space='RGB': np.clip(np.asarray(load(data), int).reshape(*load(data).size[::-1], -1) + off, 0, 255).astype(np.uint8)
        monkeypatch.setitem(sys.modules, 'simplejpeg', m)
        D.fast_decoder.cache_clear()
    yield install
    D.fast_decoder.cache_clear()


def test_a_faster_decoder_only_where_it_agrees(simplejpeg, sample, tmp_path, monkeypatch):
    files = get_files(sample, recurse=True)[::7]
    simplejpeg(1)
    assert D.fast_decoder() and {open_image(f, fast=True).mode for f in files} == {'RGB', 'L'}
    a, b = (np.asarray(open_image(files[0], fast=k), int) for k in (True, False))
    assert abs(a - b).max() == 1, 'it was not used'
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (40, 20)).save(tmp_path/'turned.jpg', exif=exif)
    assert open_image(tmp_path/'turned.jpg', fast=True).size == (20, 40)
    (tmp_path/'cut.jpg').write_bytes(files[0].read_bytes()[:900])
    with pytest.raises(DataError, match='cut.jpg'): open_image(tmp_path/'cut.jpg', fast=True)
    sys.modules['simplejpeg'].decode_jpeg_header = lambda data: (10**5, 10**5, 'YCbCr', '420')
    assert (np.asarray(open_image(files[0], fast=True)) == np.asarray(open_image(files[0]))).all(), "beyond the limit it is Pillow's to refuse"
    simplejpeg(5)
    assert D.fast_decoder() is None
    monkeypatch.setitem(sys.modules, 'simplejpeg', None)                         # as if not installed
    D.fast_decoder.cache_clear()
    assert D.fast_decoder() is None and open_image(files[0], fast=True).size == open_image(files[0]).size


def test_the_real_one_gives_the_same_pictures(sample):
    pytest.importorskip('simplejpeg')
    D.fast_decoder.cache_clear()
    for f in get_files(sample, recurse=True)[::60]: assert abs(np.asarray(open_image(f, fast=True), int) - np.asarray(open_image(f), int)).mean() <= 2


# ------------------------------------------------------------------ odd pictures
@pytest.mark.parametrize('n', range(1, 9))
def test_every_exif_orientation(tmp_path, n):
    upright = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 40, 3), dtype=np.uint8)).resize((80, 48), Image.Resampling.NEAREST)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}                          # Transpose that stores the upright picture as orientation n says
    stored = upright if n == 1 else upright.transpose(Image.Transpose(undo[n]))
    exif = Image.Exif()
    exif[0x0112] = n
    stored.save(tmp_path/'a.png', exif=exif)
    assert np.array_equal(open_image(tmp_path/'a.png'), upright) and np.array_equal(ImageOps.exif_transpose(Image.open(tmp_path/'a.png')), upright)


def test_kinds_of_pictures_become_rgb(tmp_path):
    d = tmp_path
    Image.new('RGBA', (8, 8), (255, 0, 0, 0)).save(d/'clear.png')
    p = Image.new('P', (8, 8), 1)
    p.putpalette([0, 0, 0, 9, 99, 199])
    p.save(d/'palette.png')
    p.save(d/'palette_clear.png', transparency=1)
    Image.fromarray(np.full((8, 8), 128*256, np.uint16)).save(d/'deep.png')
    Image.new('CMYK', (8, 8), (0, 255, 255, 0)).save(d/'cmyk.tif')
    Image.new('L', (8, 8), 77).save(d/'grey.png')
    Image.new('1', (8, 8), 1).save(d/'bit.png')
    Image.new('RGB', (8, 8), 'red').save(d/'film.gif', save_all=True, append_images=[Image.new('RGB', (8, 8), 'blue')])
    want = dict(clear=(255,)*3, palette=(9, 99, 199), palette_clear=(255,)*3, deep=(128,)*3, cmyk=(255, 0, 0), grey=(77,)*3, bit=(255,)*3, film=(255, 0, 0))
    il = ImageList.from_files(d, tfms=[make_rgb, to_byte_tensor])
    for f, x in zip(il.items, il):
        assert x.shape == (3, 8, 8)
        assert x[:, 4, 4].tolist() == pytest.approx(want[f.stem], abs=2), f.name


def test_float_pictures(tmp_path):
    Image.fromarray(np.full((4, 4), .5, np.float32)).save(tmp_path/'f.tif')
    assert np.asarray(make_rgb(open_image(tmp_path/'f.tif')))[0, 0].tolist() == [127]*3


@pytest.fixture
def broken(tmp_path):
    "Six files: good, cut off, empty, text, a header of 60,000 × 60,000 pixels, gone."
    d = tmp_path/'train/c'
    jpeg(d/'a_good.jpg')
    (d/'b_cut.jpg').write_bytes((d/'a_good.jpg').read_bytes()[:700])
    (d/'c_empty.jpg').touch()
    (d/'d_text.jpg').write_text('no picture')
    bmp = bytearray()
    Image.new('RGB', (2, 2)).save(d/'e_bomb.bmp')
    bmp[:] = (d/'e_bomb.bmp').read_bytes()
    bmp[18:26] = (60000).to_bytes(4, 'little')*2
    (d/'e_bomb.bmp').write_bytes(bmp)
    return tmp_path


def test_a_broken_file_is_an_error_with_its_name(broken):
    for name, why in dict(b_cut='truncated', c_empty='empty', d_text='not a picture').items():
        with pytest.raises(DataError, match=f'{name}.jpg.*{why}'): open_image(broken/f'train/c/{name}.jpg')
    with pytest.raises(DataError, match='e_bomb.bmp.*exceeds limit'): open_image(broken/'train/c/e_bomb.bmp')
    with pytest.raises(DataError, match='no such file'): open_image(broken/'nope.jpg')


@pytest.mark.parametrize('name', ['a.png', 'a.jpg'])                                    # the second goes the fast way
def test_the_pixel_limit_is_kept_and_lifted_for_one_list_only(name, tmp_path, simplejpeg):
    simplejpeg(1)
    Image.new('L', (400, 400)).save(tmp_path/name)
    before = Image.MAX_IMAGE_PIXELS
    for fast in (False, True):
        with pytest.raises(DataError, match=name): ImageList([tmp_path/name], max_pixels=1000, fast=fast)[0]
    assert Image.MAX_IMAGE_PIXELS == before and ImageList([tmp_path/name], max_pixels=10**6)[0].size == (400, 400)


def test_verify_lists_and_never_deletes(broken):
    il = ImageList.from_files(broken, tfms=BYTES)
    seen = []
    bad = verify_images(il, progress=lambda n, of: seen.append((n, of)))
    assert [f.name for f in bad] == ['b_cut.jpg', 'c_empty.jpg', 'd_text.jpg', 'e_bomb.bmp'] and seen[-1] == (5, 5)
    assert len(list((broken/'train/c').iterdir())) == 5
    good = il.without(bad)
    assert [f.name for f in good.items] == ['a_good.jpg'] and len(il) == 5 and not verify_images(good) and good.tfms == il.tfms


@pytest.mark.parametrize('nw', [0, 2])
def test_bad_files_are_skipped_counted_and_listed(tmp_path, nw):
    for s in ('train', 'val'):
        for c in 'ab':
            for i in range(6): jpeg(tmp_path/s/c/f'{i}.jpg')
    for f in ('train/a/3.jpg', 'train/b/0.jpg', 'val/a/1.jpg'): (tmp_path/f).write_bytes(b'x')
    ll = labelled(tmp_path, BYTES)
    data = ll.to_databunch(4, num_workers=nw, seed=0, on_error='skip')
    with pytest.warns(UserWarning, match='2 of 12 pictures cannot be read.*train/'): n = sum(len(xb) for xb, _ in data.train_dl)
    assert n == 10 and {Path(f).relative_to(tmp_path).as_posix() for f in data.skipped} == {'train/a/3.jpg', 'train/b/0.jpg'}
    with warnings.catch_warnings():
        warnings.simplefilter('error')                                          # listed once, not in every epoch
        assert sum(len(xb) for xb, _ in data.train_dl) == 10
    with pytest.raises(DataError, match=r'^\S*train/(a/3|b/0).jpg: no readable picture'): list(ll.to_databunch(4, num_workers=nw, seed=0).train_dl)


def test_bad_files_in_memory(tmp_path):
    for s in ('train', 'val'):
        for c in 'ab':
            for i in range(4): jpeg(tmp_path/s/c/f'{i}.jpg')
    (tmp_path/'train/a/0.jpg').write_bytes(b'x')
    ll = labelled(tmp_path, BYTES)
    with pytest.raises(DataError, match='train/a/0.jpg'): ll.to_databunch(4, in_memory=True)
    data = ll.to_databunch(4, in_memory=True, on_error='skip')
    assert len(data.train_ds) == 7 and list(data.skipped) == [str(tmp_path/'train/a/0.jpg')] and data.train_ds.y.tolist() == [0]*3 + [1]*4
    assert data.train_ds.x[0].equal(ll.train[1][0])


# ------------------------------------------------------------------ lists
def test_pathlist_is_a_list_of_paths(tmp_path):
    names = ['b/ä.jpg', 'a.jpg', 'c/d/e.png', os.fsdecode(b'odd\xff.jpg')]
    p = PathList(tmp_path, names)
    assert list(p) == [tmp_path/n for n in names] and p[-1] == tmp_path/names[-1] and p[1:3] == [tmp_path/n for n in names[1:3]]
    assert p[[2, 0]] == [tmp_path/names[2], tmp_path/names[0]] and p[[2, 0]][1:][0] == tmp_path/names[0] and p[::-1][0] == p[3]
    assert len(p[[]]) == 0 == len(PathList(tmp_path, [])) and list(pickle.loads(pickle.dumps(p[1:]))) == list(p)[1:] and p[np.array([True, False, False, True])] == [p[0], p[3]]
    for i in (4, -5):
        with pytest.raises(IndexError): p[i]


def test_listcontainer():
    l = D.ListContainer(range(20))
    assert l[3] == 3 and list(l[2:4]) == [2, 3] and l[[1, 5]] == [1, 5] and l[[i % 2 == 0 for i in range(20)]] == list(range(0, 20, 2))
    assert repr(l).startswith('ListContainer (20 items)\n[0, 1, 2') and repr(l).endswith('…]') and len(l) == 20
    m = D.ListContainer([1, 2, 3])
    m[0] = 9; del m[1]
    assert list(m) == [9, 3]
    with pytest.raises(IndexError): l[[True]]


def test_dot_names_are_nobodys_class(tmp_path):
    pictures(tmp_path, 'train/a/0.png', 'train/b/0.png', 'train/a/1.png', 'train/b/1.png', 'val/a/2.png', 'val/b/2.png', 'train/.ipynb_checkpoints/0.png', 'train/a/._0.png')
    (tmp_path/'train/a/.DS_Store').touch()
    ll = labelled(tmp_path, BYTES)
    assert ll.train.proc_y.vocab == ['a', 'b'] and len(ll.train) == 4


def test_a_link_that_leads_back_is_not_followed(tmp_path):
    pictures(tmp_path, 'x/a/0.png', 'other/1.png')
    try: (tmp_path/'x/a/up').symlink_to(tmp_path/'x', target_is_directory=True); (tmp_path/'x/b').symlink_to(tmp_path/'other', target_is_directory=True)
    except OSError: pytest.skip('no links here')
    assert [p.relative_to(tmp_path/'x').as_posix() for p in get_files(tmp_path/'x', recurse=True)] == ['a/0.png', 'b/1.png']


def test_errors_of_a_folder(tmp_path):
    with pytest.raises(DataError, match='cannot be read'): get_files(tmp_path/'nope')
    with pytest.raises(DataError, match='no images'): ImageList.from_files(tmp_path)


# ------------------------------------------------------------------ splits
Fake = namedtuple('Fake', 'items path')
names_st = st.lists(st.text('abcdefgh/', min_size=1, max_size=8), unique=True, min_size=2, max_size=60)


@given(names=names_st, seed=st.integers(0, 99), pct=st.floats(.01, .99))
@settings(max_examples=60, deadline=None)
def test_random_split_is_disjoint_complete_and_seeded(names, seed, pct):
    il = ItemList(names)
    a, b = SplitData.split_by_random(il, pct, seed), SplitData.split_by_random(il, pct, seed)
    assert sorted([*a.train.items, *a.valid.items]) == sorted(names) and not set(a.train.items) & set(a.valid.items)
    assert a.train.items == b.train.items and len(a.train) and len(a.valid)
    backwards = SplitData.split_by_random(ItemList(names[::-1]), pct, seed)
    assert set(backwards.valid.items) == set(a.valid.items)


@given(names=st.lists(st.text('abcdefgh', min_size=1, max_size=8), unique=True, min_size=40, max_size=60), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_new_file_moves_no_old_one(names, seed):
    a, b = (set(SplitData.split_by_random(ItemList(n), .4, seed).valid.items) for n in (names, [*names, 'a new one']))
    assert a == b - {'a new one'}


@given(n=st.integers(2, 50), k=st.integers(2, 8), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_k_folds(n, k, seed):
    if k > n:
        with pytest.raises(ValueError): SplitData.k_folds(ItemList(list(range(n))), k, seed)
        return
    folds = SplitData.k_folds(ItemList(list(range(n))), k, seed)
    assert sorted(o for f in folds for o in f.valid.items) == list(range(n)) and all(len(f.train) + len(f.valid) == n for f in folds)
    sizes = [len(f.valid) for f in folds]
    assert len(folds) == k and max(sizes) - min(sizes) <= 1


def test_random_split_has_about_its_share_and_follows_its_folder(tmp_path):
    il = ItemList([Path(f'/x/{i}.jpg') for i in range(2000)], '/x')
    sd = SplitData.split_by_random(il, .2, 0)
    assert abs(len(sd.valid) - 400) < 60 and set(sd.valid.items) != set(SplitData.split_by_random(il, .2, 1).valid.items)
    moved = SplitData.split_by_random(ItemList([Path(f'/y/z/{i}.jpg') for i in range(2000)], '/y/z'), .2, 0)
    assert [p.name for p in moved.valid.items] == [p.name for p in sd.valid.items]


def test_split_by_names_and_csv(tmp_path):
    il = ImageList.from_files(pictures(tmp_path, *(f'{c}/{i}.png' for c in 'ab' for i in range(3))))
    def valid(sd): return [p.relative_to(tmp_path).as_posix() for p in sd.valid.items]
    assert valid(SplitData.split_by_names(il, ['a/1.png', 'b/2'])) == ['a/1.png', 'b/2.png'] and valid(SplitData.split_by_names(il, ['0.png'])) == ['a/0.png', 'b/0.png']
    with pytest.raises(DataError, match='1 of 2 names are no items: a/9.png'): SplitData.split_by_names(il, ['a/1.png', 'a/9.png'])
    with open(tmp_path/'t.csv', 'w', newline='') as f:
        w = csv.writer(f); w.writerow(['name', 'is_valid', 'label']); w.writerows([[f'{c}/{i}.png', i == 2, f'{c};{i % 2}'] for c in 'ab' for i in range(3)])
    pd = pytest.importorskip('pandas')
    for table in (tmp_path/'t.csv', pd.read_csv(tmp_path/'t.csv')):
        sd = SplitData.split_by_csv(il, table)
        assert valid(sd) == ['a/2.png', 'b/2.png']
        ll = label_by_func(sd, TableLabeler(table, delim=';'))
        assert ll.train.proc_y.vocab == ['0', '1', 'a', 'b'] and ll.train[0][1].tolist() == [1, 0, 1, 0] and ll.valid.y_obj(1) == ['0', 'b']
    with pytest.raises(ValueError, match="no column 'labels'; there is name, is_valid, label"): TableLabeler(tmp_path/'t.csv', label_col='labels')
    pictures(tmp_path, 'a/9.png')
    with pytest.raises(DataError, match='1 of 7 items have no row in the table: a/9.png'): SplitData.split_by_csv(ImageList.from_files(tmp_path), tmp_path/'t.csv')


def test_empty_sides_are_named(sample):
    il = ImageList.from_files(sample)
    with pytest.raises(DataError, match='the validation set is empty: of 800 items that were split by grandparent_splitter'): SplitData.split_by_func(il, grandparent_splitter)
    for bad in (0, 1, -1): pytest.raises(ValueError, SplitData.split_by_random, il, bad)


# ------------------------------------------------------------------ labels and processors
@given(train=st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=30), data=st.data())
@settings(max_examples=60, deadline=None)
def test_category_there_and_back(train, data):
    p = CategoryProcessor()
    ys = p(train)
    assert p.deprocess(ys) == train and p.vocab == sorted(set(train)) and CategoryProcessor()(train[::-1]) == ys[::-1]
    q = pickle.loads(pickle.dumps(p))
    later = data.draw(st.lists(st.sampled_from(train)))
    assert q.deprocess(q(later)) == later and q.vocab == p.vocab and CategoryProcessor(p.vocab)(train) == ys


@given(st.lists(st.lists(st.sampled_from('abcdef'), unique=True), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_multi_label_there_and_back(train):
    p = MultiCategoryProcessor()
    assert p.deprocess(p(train)) == [sorted(t) for t in train]


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=3, max_size=20, unique_by=(lambda t: round(t[0]), lambda t: round(t[1]))))
@settings(max_examples=40, deadline=None)
def test_numbers_there_and_back(train):
    for p in (NumberProcessor(), NumberProcessor(standardise=True)):
        ys = p([list(t) for t in train])
        assert np.allclose(p.deprocess(ys), train, rtol=1e-4, atol=1e-2)
    assert torch.stack(ys).mean(0).abs().max() < 1e-3 and (torch.stack(ys).std(0, correction=0) - 1).abs().max() < 1e-3


def test_processor_is_fitted_on_training_only(tmp_path):
    il = ItemList([f'{s}/{c}/{i}' for s in ('train', 'valid') for c in 'cab' for i in range(2)])
    sd = SplitData.split_by_func(il, grandparent_splitter)
    assert label_by_func(sd, parent_labeler).train.proc_y.vocab == ['a', 'b', 'c']
    il = ItemList([*il.items, 'valid/new/7'])
    with pytest.raises(DataError, match=r"1 of 7 labels: label 'new' is none of the 3 of the training set.*valid/new/7"):
        label_by_func(SplitData.split_by_func(il, grandparent_splitter), parent_labeler)


def test_missing_labels_are_named():
    il = ItemList(['train/a/1', 'train/b/2', 'valid/a/3'])
    sd = SplitData.split_by_func(il, grandparent_splitter)
    with pytest.raises(DataError, match='1 of 2 items have no label: train/b/2'): label_by_func(sd, {'train/a/1': 'x', 'valid/a/3': 'x'}.get)
    with pytest.raises(DataError, match='1 of 2 items have no label: train/b/2'): label_by_func(sd, lambda o: ' ' if 'b' in o else 'x')
    with pytest.raises(DataError, match='1 of 2 items have no label'): label_by_func(sd, RegexLabeler(r'/(a)/'))
    with pytest.raises(ValueError, match='2 inputs but 1 labels'): LabeledData(sd.train, ['x'])


def test_a_class_with_one_picture_is_warned_of():
    sd = SplitData.split_by_func(ItemList(['train/a/1', 'train/a/2', 'train/b/3', 'valid/a/4']), grandparent_splitter)
    with pytest.warns(UserWarning, match="class 'b' has a single training picture: train/b/3"): label_by_func(sd, parent_labeler)


def test_one_class_is_nothing_to_tell_apart(tmp_path):
    ll = labelled(pictures(tmp_path, *(f'{s}/a/{i}.png' for s in ('train', 'val') for i in range(3))), BYTES)
    with pytest.raises(DataError, match=r'one class only \(a\)'): ll.to_databunch(2)
    with pytest.raises(ValueError, match='no labels yet'): SplitData(ll.train.x, ll.valid.x).to_databunch(2)


def test_regression_targets(sample):
    il = ImageList.from_files(sample, tfms=BYTES)
    il = il.new(il.items[::40])
    ll = label_by_func(SplitData.split_by_random(il), lambda fn: float(fn.stem[-3:]))
    data = ll.to_databunch(8, num_workers=0)
    xb, yb = next(iter(data.train_dl))
    assert yb.dtype == torch.float32 and data.c_out == 1 and data.classes is None and ll.train.y_obj(0) == float(ll.train.x.items[0].stem[-3:])


# ------------------------------------------------------------------ loaders
def test_order_is_a_function_of_seed_and_epoch(ll):
    def epochs(**kw): dl = ll.to_databunch(100, num_workers=0, in_memory=True, **kw).train_dl; return [torch.cat([y for _, y in dl]).tolist() for _ in range(2)], dl
    (a, b), dl = epochs(seed=3)
    assert a != b and sorted(a) == sorted(b) == sorted(ll.train.y.items.tolist()) and epochs(seed=3)[0] == [a, b] and epochs(seed=4)[0][0] != a
    dl.epoch = 1
    assert torch.cat([y for _, y in dl]).tolist() == b                          # picked up where it was, without running the first
    data = ll.to_databunch(100, num_workers=0, seed=3)                          # from files: the same order
    assert torch.cat([y for _, y in data.train_dl]).tolist() == a


def test_memory_and_files_give_the_same_batches(ll):
    m, f = (ll.to_databunch(64, num_workers=0, seed=0, in_memory=k) for k in (None, False))
    for (a, ya), (b, yb) in zip(m.train_dl, f.train_dl): assert a.equal(b) and ya.equal(yb) and a.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(m.train_ds, D.Dataset) and m.train_ds.x.dtype == torch.uint8 and (m.c_in, m.c_out) == (3, 10)


class Jitter:
    "A random transform, in five lines: adds one number to the picture."
    _order, generator = 25, None
    def __call__(self, x): return x.float() + torch.rand((), generator=self.generator)


def test_random_transforms_draw_per_picture_and_epoch_whatever_the_workers(sample):
    ll = labelled(sample, [make_rgb, ResizeFixed(8), to_byte_tensor, Jitter()])
    def draws(nw, n=2): dl = ll.to_databunch(100, num_workers=nw, seed=1).train_dl; return [torch.cat([x.flatten(1)[:, 0] % 1 for x, _ in dl]) for _ in range(n)]
    one, two = draws(0)
    assert len(one.mul(1e4).round().unique()) > 700 and not one.equal(two)
    assert all(a.equal(b) for a, b in zip((one, two), draws(2)))
    assert ll.train.x.tfms[-1].generator is None


@pytest.mark.parametrize('draw', [random.random, np.random.rand, lambda: torch.rand(()).item()])
def test_a_random_transform_is_never_frozen(sample, draw):
    def tfm(x): return x.float() + draw()
    tfm._order = 25
    ll = labelled(sample, [make_rgb, ResizeFixed(8), to_byte_tensor, tfm])
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(ValueError, match='draws at random'): ll.to_databunch(8, in_memory=True)
    assert not isinstance(ll.to_databunch(8, in_memory=None, num_workers=0, seed=0).train_ds, D.Dataset)
    assert torch.get_rng_state().equal(state[0]) and random.getstate() == state[1] and np.array_equal(np.random.get_state()[1], state[2])


def test_looking_changes_nothing(sample, capsys):
    ll = labelled(sample, [make_rgb, ResizeFixed(8), to_byte_tensor, Jitter()])
    data = ll.to_databunch(50, num_workers=0, seed=1)
    state = torch.get_rng_state()
    data.summary(); data.show_batch(); data.train_dl.first(); D.NormalizeBytes.fit(data.train_ds, 20)
    assert torch.get_rng_state().equal(state) and data.train_dl.epoch == 0
    out = capsys.readouterr().out
    steps = ['ImageList.get', 'make_rgb', 'ResizeFixed', 'to_byte_tensor', 'Jitter', 'label']
    assert [out.index(s) for s in steps] == sorted(out.index(s) for s in steps) and 'uint8 (3, 8, 8)' in out and '800 training' in out
    assert data.train_dl.first()[1].equal(next(iter(data.train_dl))[1])


def test_summary_says_where_it_breaks(sample, capsys):
    def upside(x): return x.nonsense()
    upside._order = 15
    ll = labelled(sample, [make_rgb, ResizeFixed(8), upside, to_byte_tensor])
    ll.summary(pictures=False)
    assert "upside               BREAKS HERE: AttributeError" in (out := capsys.readouterr().out) and 'to_byte_tensor' not in out
    with pytest.raises(RuntimeError, match=r'\.JPEG: upside failed on picture RGB 8 × 8'): ll.train[0]


def test_pictures_of_different_shape_are_named(tmp_path):
    pictures(tmp_path, 'a.png', size=(20, 20)); pictures(tmp_path, 'b.png', size=(30, 20))
    with pytest.raises(DataError, match=r"b.png is \(20, 30, 'RGB'\) where .*a.png is \(20, 20, 'RGB'\)"): ImageList.from_files(tmp_path, tfms=[make_rgb, to_byte_tensor]).batch([0, 1])
    with pytest.raises(TypeError, match='make_rgb first'): to_byte_tensor(Image.new('I', (4, 4)))


def test_test_set(ll, sample):
    test = ImageList.from_files(sample, include=['val'])
    data = ll.add_test(test).to_databunch(64, num_workers=0)
    xs = torch.cat(list(data.test_dl))
    assert len(xs) == 300 and xs[:2].equal(torch.stack(ll.valid.x[:2])) and ll.test is None and ll.to_databunch(64).test_dl is None


@pytest.mark.parametrize('kw, why', [(dict(bs=0), 'at least 1'), (dict(bs=4, on_error='maybe'), 'raise'), (dict(bs=4, c_out=3), 'c_out is 3, but the training set has 10')])
def test_wrong_arguments(ll, kw, why):
    with pytest.raises(ValueError, match=why): ll.to_databunch(num_workers=0, **kw)


# ------------------------------------------------------------------ processes
SPAWN = '''
import sys, torch, warnings
from functools import partial
from exp.data_block import *
from exp.data_block import SplitData
def main():
    sd = SplitData.split_by_func(ImageList.from_files(sys.argv[1], tfms=[make_rgb, ResizeFixed(16), to_byte_tensor]), partial(grandparent_splitter, valid_name='val'))
    ll = label_by_func(sd, parent_labeler)
    a, b = (ll.to_databunch(200, num_workers=n, seed=0, **kw) for n, kw in ((2, dict(multiprocessing_context='spawn')), (0, {})))
    assert a.train_dl.num_workers == 2 and all(x.equal(v) and y.equal(w) for (x, y), (v, w) in zip(a.train_dl, b.train_dl, strict=True))
    print('same batches')
if __name__ == '__main__': main()
'''


def test_workers_that_start_by_spawn(sample, tmp_path, data_home):
    (tmp_path/'s.py').write_text(SPAWN)
    r = subprocess.run([sys.executable, tmp_path/'s.py', sample], env={**small_env(data_home), 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=200)
    assert 'same batches' in r.stdout, r.stderr[-2000:]


def test_a_lambda_under_spawn_is_named_and_goes_on_without_workers(sample):
    tfm = lambda x: x                                                           # noqa: E731
    ll = labelled(sample, [*BYTES, tfm])
    with pytest.warns(UserWarning, match=r'without worker processes: <lambda> \(test_data_block.py, line \d+\)'):
        data = ll.to_databunch(200, num_workers=2, multiprocessing_context='spawn')
    assert data.train_dl.num_workers == 0 and len(next(iter(data.train_dl))[0]) == 200


def test_a_notebooks_own_class_under_spawn(sample, monkeypatch):
    T = type('T', (), {'__module__': '__main__', '__call__': lambda self, x: x, '_order': 40, '__reduce__': lambda self: 'T'})
    main = type(sys)('__main__')
    main.T = T()
    monkeypatch.setitem(sys.modules, '__main__', main)
    ll = labelled(sample, [*BYTES, main.T])
    assert 'T lives in this notebook' in D.no_workers_because(ll.train, 2, context='spawn') and not D.no_workers_because(ll.train, 2, context='fork')


def test_a_small_dev_shm_is_explained(ll, monkeypatch):
    monkeypatch.setattr(D.shutil, 'disk_usage', lambda p: namedtuple('U', 'total used free')(64e6, 0, 1e5))
    with pytest.warns(UserWarning, match=r'need 2 MB of shared memory and /dev/shm has 0 MB free.*--shm-size'): data = ll.to_databunch(64, num_workers=2, prefetch_factor=2)
    assert data.train_dl.num_workers == 0


def test_everything_pickles(ll):
    again = pickle.loads(pickle.dumps(ll))
    assert again.train[3][0].equal(ll.train[3][0]) and again.valid.y_obj(5) == ll.valid.y_obj(5) and len(pickle.dumps(ll.train)) < 300*1100


# ------------------------------------------------------------------ the device's side
def test_normalize_bytes(ll):
    data = ll.to_databunch(64, in_memory=True, seed=0)
    norm = D.NormalizeBytes.fit(data.train_ds, n=10**6)
    z = norm(data.train_ds.x)
    x = data.train_ds.x.double()/255
    assert z.mean((0, 2, 3)).abs().max() < 1e-4 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-3
    want = (x - x.mean((0, 2, 3), keepdim=True))/x.std((0, 2, 3), keepdim=True)
    assert torch.allclose(z.double(), want, atol=1e-4) and torch.allclose(norm(x.float()), z, atol=1e-4) and data.train_ds.x.dtype == torch.uint8


def test_show_image(ll):
    import matplotlib
    matplotlib.use('agg')
    for im in (Image.new('L', (5, 4)), torch.zeros(1, 4, 5, dtype=torch.uint8), torch.randn(3, 4, 5), ll.train[0][0]):
        ax = D.show_image(im)
        assert len(ax.images) == 1
    assert ax.images[0].get_array().shape == (32, 32, 3)
    import matplotlib.pyplot as plt
    plt.close('all')


def test_a_colon_in_a_files_name_spoils_no_message(tmp_path):
    (tmp_path/'part 1: cats').mkdir()
    bad = tmp_path/'part 1: cats/a: b.jpg'
    bad.write_text('no picture')
    Image.new('RGB', (9, 9)).save(tmp_path/'part 1: cats/c.jpg')
    il = ImageList.from_files(tmp_path, tfms=[make_rgb, ResizeFixed(8), to_byte_tensor])
    for found in (verify_images(il, progress=None), il.batch(range(2), on_error='skip')[2]):
        (name, why), = found.items()
        assert str(name) == str(bad) and why.startswith('no readable picture')


# ------------------------------------------------------------------ found by a second reading
def test_absolute_paths_name_items(tmp_path):
    il = ImageList.from_files(pictures(tmp_path, *(f'{c}/{i}.png' for c in 'ab' for i in range(3))))
    sd = SplitData.split_by_names(il, [il.items[1], il.items[4]])
    assert [str(p) for p in sd.valid.items] == [str(il.items[1]), str(il.items[4])]
    (tmp_path/'t.csv').write_text(f'name,label\n{il.items[0]},x\n')
    assert TableLabeler(tmp_path/'t.csv')(il.items[0]) == 'x'


def test_a_home_folder_gives_the_same_split_as_its_path(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(pictures(tmp_path, *(f'ds/{i}.png' for i in range(30)))))
    a, b = (SplitData.split_by_random(ImageList.from_files(f)) for f in ('~/ds', tmp_path/'ds'))
    assert [p.name for p in a.valid.items] == [p.name for p in b.valid.items]


@pytest.mark.skipif(sys.platform == 'win32', reason='links want rights there')
def test_links_in_a_circle_end(tmp_path):
    pictures(tmp_path, 'a/1.png', 'b/2.png')
    (tmp_path/'a/to_b').symlink_to(tmp_path/'b'); (tmp_path/'b/to_a').symlink_to(tmp_path/'a'); (tmp_path/'self').symlink_to(tmp_path/'self')
    assert {p.name for p in get_files(tmp_path, '.png', recurse=True)} == {'1.png', '2.png'}


def test_yes_or_no_with_several_labels_is_a_task(tmp_path):
    il = ImageList.from_files(pictures(tmp_path, *(f'{s}/{c}/{i}.png' for s in ('train', 'valid') for c in 'xy' for i in range(4))), tfms=BYTES)
    ll = label_by_func(SplitData.split_by_func(il, grandparent_splitter), lambda p: ['x'] if p.parent.name == 'x' else [], proc_y=MultiCategoryProcessor())
    assert ll.to_databunch(4, num_workers=0).c_out == 1


@pytest.mark.parametrize('given', [dict(prefetch_factor=4), dict(persistent_workers=True)], ids=str)
def test_options_of_workers_do_no_harm_without_them(ll, given):
    assert len(next(iter(ll.to_databunch(16, in_memory=True, **given).train_dl))[0]) == 16


def test_in_memory_names_the_picture_of_another_shape(tmp_path):
    names = [f'train/{c}/{i:03d}.png' for c in 'ab' for i in range(20)] + ['valid/a/0.png', 'valid/b/0.png']
    pictures(tmp_path, *names)
    for i in range(20): Image.new('L', (40, 30)).save(tmp_path/f'train/b/{i:03d}.png')            # a chunk in colour, then a grey one: it used to be made colour, unasked
    ll = label_by_func(SplitData.split_by_func(ImageList.from_files(tmp_path, tfms=[ResizeFixed(16), to_byte_tensor]), grandparent_splitter), parent_labeler)
    with pytest.raises(DataError, match='train/b/000.png'): ll.train.in_memory()


def test_in_memory_with_targets_that_are_no_tensor(tmp_path):
    il = ImageList.from_files(pictures(tmp_path, *(f'{s}/{c}/{i}.png' for s in ('train', 'valid') for c in 'xy' for i in range(4))), tfms=BYTES)
    ll = label_by_func(SplitData.split_by_func(il, grandparent_splitter), parent_labeler, proc_y=[])
    ds, _ = ll.train.in_memory()
    xb, yb = next(iter(D.ItemLoader(ds, 4)))
    assert len(xb) == 4 and list(yb) == ['x']*4


def test_two_methods_are_a_processor(tmp_path):
    class Upper:
        def proc1(self, o): return str(o).upper()
        def deproc1(self, o): return o.lower()
    il = ImageList.from_files(pictures(tmp_path, *(f'{s}/{c}/{i}.png' for s in ('train', 'valid') for c in 'xy' for i in range(2))), tfms=BYTES)
    ll = label_by_func(SplitData.split_by_func(il, grandparent_splitter), parent_labeler, proc_y=[Upper(), CategoryProcessor()])
    assert ll.train.y.procs[-1].vocab == ['X', 'Y'] and [ll.valid.y_obj(i) for i in range(4)] == ['x', 'x', 'y', 'y']
    class Name:
        def proc1(self, o): return Path(o).name
    assert list(LabeledData(ItemList(['a/1', 'b/2']), [0, 1], proc_x=Name()).x.items) == ['1', '2']


def test_labels_of_odd_kinds():
    assert isinstance(D.default_processor([(), ('a',)]), MultiCategoryProcessor)
    assert isinstance(D.default_processor([np.float32(1.5), np.float32(2)]), NumberProcessor)
    for bad in (float('nan'), [1., float('inf')]):
        with pytest.raises(DataError, match='not finite'): NumberProcessor().proc1(bad)


def test_an_unknown_label_behind_several_processors(tmp_path):
    class Upper(D.Processor):
        def proc1(self, item): return item.upper()
    il, proc = ItemList(['a', 'b', 'c']), CategoryProcessor(['A', 'B'])
    with pytest.raises(DataError, match='1 of 3 labels.*— c'): LabeledData(il, ['a', 'b', 'c'], proc_y=[Upper(), proc])


def test_pictures_that_hold_no_bytes_are_named(tmp_path):
    for mode, name in (('1', 'bits'), ('I;16', 'deep')):
        Image.new(mode, (20, 20)).save(tmp_path/f'{name}.png')
        for size in ((), (ResizeFixed(8),)):
            with pytest.raises((DataError, TypeError), match=f'{name}.png.*put make_rgb first'): ImageList([tmp_path/f'{name}.png'], tmp_path, [*size, to_byte_tensor]).batch(np.arange(1))


def test_how_many_belong_to_neither_side(tmp_path):
    il = ImageList.from_files(pictures(tmp_path, *(f'{s}/a/{i}.png' for s in ('training', 'validation') for i in range(3))))
    with pytest.raises(DataError, match='of 0 items .*6 more belong to neither'): SplitData.split_by_func(il, grandparent_splitter)


def test_a_table_that_is_not_utf8(tmp_path):
    (tmp_path/'t.csv').write_bytes('name,label\nMüller,x\n'.encode('latin-1'))
    with pytest.raises(DataError, match='not UTF-8'): D.read_table(tmp_path/'t.csv', 'name', 'label')


# ------------------------------------------------------------------ found by a third reading
def test_items_without_a_name_are_split_by_their_place():
    "torch abbreviates what it prints, so all large tensors had one name; a picture's text holds its address."
    x = torch.zeros(1000, 1, 40, 40); x[:, :, 8:32, 8:32] = torch.rand(1000, 1, 24, 24)
    ims = [Image.new('RGB', (4, 4)) for _ in range(1000)]
    def places(items): return [[i for i, o in enumerate(items) if any(o is v for v in s.valid.items)] for s in (SplitData.split_by_random(ItemList(items)), SplitData.k_folds(ItemList(items), 3)[0])]
    (a, f), (b, g) = places(list(x)), places(ims)
    assert a == b and f == g and abs(len(a) - 200) < 50 and len(SplitData.split_by_random(ItemList(x)).valid) == len(a)
    nums = SplitData.split_by_random(ItemList([1.5, 2, np.int64(3), 'x', Path('y')]*40))
    assert {str(o) for o in nums.train.items}.isdisjoint({str(o) for o in nums.valid.items}), 'names decide where there are names'


def test_paths_that_are_text_follow_their_folder():
    def valid(root, kind): return [str(o).removeprefix(root) for o in SplitData.split_by_random(ItemList([kind(f'{root}{i}.jpg') for i in range(100)], root)).valid.items]
    assert valid('/x/', str) == valid('/some/where/else/', str) == valid('/x/', Path) != []
    il = ItemList(['/x/a/1.jpg', '/x/b/2.jpg'], '/x')
    assert SplitData.split_by_names(il, ['/x/b/2.jpg']).valid.items == ['/x/b/2.jpg'] == SplitData.split_by_names(il, ['b/2.jpg']).valid.items


def test_a_series_goes_by_place_not_by_label(tmp_path):
    pd = pytest.importorskip('pandas')
    pictures(tmp_path, *(f'{c}/{i}.png' for c in 'ab' for i in range(6)))
    s = pd.Series([str(f) for f in get_files(tmp_path, recurse=True)]).sample(frac=1, random_state=0)
    il = ImageList(s, tmp_path)
    ll = LabeledData.label_by_func(il, parent_labeler)
    assert [parent_labeler(il.items[i]) for i in range(12)] == [ll.y.obj(i) for i in range(12)] and len(ImageList(s[3:7], tmp_path)[:]) == 4
    assert list(D.ProcessedItemList(pd.Series([1, 2], index=[7, 9]))) == [1, 2]


@pytest.mark.parametrize('kw', [dict(include='train'), dict(include=['train'], extensions='png'), dict(include=(n for n in ['train']), extensions=['.JPG', 'Png'])], ids=['one name', 'no dot', 'a generator'])
def test_one_folder_and_endings_without_a_dot(tmp_path, kw):
    pictures(tmp_path, 'train/a/0.png', 't/1.png', 'tr/2.png', 'val/3.png')
    assert [p.name for p in get_files(tmp_path, recurse=True, **kw)] == ['0.png']
    with pytest.raises(DataError, match='trian.*there is t, tr, train, val'): ImageList.from_files(tmp_path, include=['trian'])


def odd_exif(path, tag=None, exif=None):
    "A picture of 40 × 20, with an EXIF block of its own; `tag`: (number, type, count, four bytes) beside an orientation of 6."
    entries = [(0x112, 3, 1, b'\6\0\0\0'), *([tag] if tag else [])]
    block = b'II*\0\x08\0\0\0' + len(entries).to_bytes(2, 'little') + b''.join(n.to_bytes(2, 'little') + t.to_bytes(2, 'little') + c.to_bytes(4, 'little') + v for n, t, c, v in entries) + b'\0'*4
    Image.new('RGB', (40, 20), 'red').save(path, exif=b'Exif\0\0' + block if exif is None else exif)
    return path


def test_odd_exif_is_no_broken_picture(tmp_path):
    for name in ('a.png', 'a.webp', 'a.jpg'): assert open_image(odd_exif(tmp_path/name, exif=b'Exif\0\0garbage, no EXIF')).size == (40, 20)
    for i, tag in enumerate([(0x11a, 3, 1, b'\1\0\0\0'), (0x8769, 2, 4, b'abc\0'), (0x9999, 99, 1, b'\0'*4), (0x10f, 2, 4, b'\xff\xfe\xfd\0')]):
        im = open_image(odd_exif(tmp_path/f'{i}.jpg', tag))
        assert im.size == (20, 40) and im.getexif().get(0x112, 1) == 1, tag
        assert ImageOps.exif_transpose(im).size == (20, 40), 'nobody turns it a second time'


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'


def test_the_fast_way_turns_what_pillow_turns(tmp_path, simplejpeg):
    simplejpeg(1)
    Image.new('RGB', (40, 20)).save(tmp_path/'xmp.jpg', xmp=XMP)
    data = odd_exif(tmp_path/'late.jpg').read_bytes()
    (tmp_path/'late.jpg').write_bytes(data[:2] + (b'\xff\xed' + (65000).to_bytes(2, 'big') + bytes(64998))*2 + data[2:])         # behind 130 KB of other segments
    for f in ('xmp.jpg', 'late.jpg'): assert open_image(tmp_path/f, fast=True).size == open_image(tmp_path/f).size == (20, 40), f
    exif = Image.Exif(); exif[0x112], exif[0x10f] = 1, 'a camera'
    Image.new('RGB', (40, 20)).save(tmp_path/'up.jpg', exif=exif)
    assert np.asarray(open_image(tmp_path/'up.jpg', fast=True)).max() == 1, 'EXIF that turns nothing goes the fast way'


def test_deep_pictures_with_a_transparent_value_and_floats_a_little_off(tmp_path):
    deep = np.full((4, 4), 128*256, np.uint16); deep[0, 0] = 77
    Image.fromarray(deep).save(tmp_path/'t.png', transparency=77)
    im = open_image(tmp_path/'t.png')
    assert 'transparency' in im.info and np.asarray(make_rgb(im))[:2, 0].tolist() == [[255]*3, [128]*3]
    def grey(a): return np.asarray(make_rgb(Image.fromarray(np.array(a, np.float32))))[..., 0].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert grey([[0, .5], [1.001, 1]]) == [[0, 127], [255, 255]]
        assert grey([[0, .5], [np.nan, 1]]) == [[0, 127], [0, 255]] == grey([[-.1, .5], [-np.inf, np.inf]]) and grey([[np.nan]]) == [[0]]
        assert grey([[0, 127.5], [255.4, 255]]) == [[0, 127], [255, 255]] and grey([[0, 65535.]]) == [[0, 255]]
    assert np.asarray(make_rgb(Image.fromarray(np.array([[0, 255]], np.int32))))[..., 0].tolist() == [[0, 255]]


def test_floats_are_not_overwritten():
    x = torch.arange(0, 250., 10).view(5, 5)
    il = ItemList(x, tfms=to_float_tensor)
    assert il[1].equal(x[1]/255) and il[1].equal(il[1]) and x.max() == 240
    assert to_float_tensor(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, 1]


# loaders

class Drawn:
    "A random transform that asks the global generators, as other people's do."
    _order = 5
    def __call__(self, x): return torch.tensor([x, torch.rand(()).item(), np.random.rand(), random.random()])


def numbers(n=12, tfm=Drawn): return ItemList([float(i) for i in range(n)], tfms=tfm())


def test_global_draws_in_workers_follow_the_seed():
    def draws(seed): return torch.cat(list(D.ItemLoader(numbers(), 3, seed=seed, num_workers=2)))
    a, b, again = draws(1), draws(2), draws(1)
    assert a.equal(again) and (a[:, 1] != b[:, 1]).all() and a[:, 0].equal(b[:, 0]) and draws(-3).isfinite().all()


@pytest.mark.parametrize('nw', [0, 2])
def test_two_passes_over_one_loader_at_once(nw):
    "With workers that stay, a second pass used to end the first, without a word."
    dl = D.ItemLoader(numbers(), 2, seed=0, num_workers=nw)
    def firsts(bs): return torch.cat(list(bs))[:, 0].tolist()
    want, seen, inner = [float(i) for i in range(12)], [], []
    for i, b in enumerate(dl):
        seen.append(b)
        if i in (1, 2): inner.append(firsts(dl))
    assert firsts(seen) == want and inner == [want]*2 and [firsts(p) for p in zip(*zip(dl, dl))] == [want]*2
    kept = dl._iterator
    for _ in dl: break                                                          # given up: not open any more
    it = iter(dl); next(it); it.close()
    assert firsts(dl) == want and dl._iterator is kept and (not nw or kept is not None)


def test_drop_last(ll):
    data = ll.to_databunch(64, num_workers=0, seed=1, in_memory=True, drop_last=True)
    assert [len(y) for _, y in data.train_dl] == [64]*12 and len(data.train_dl) == 12 and sum(len(y) for _, y in data.valid_dl) == 300
    data.train_dl.epoch, whole = 0, ll.to_databunch(64, num_workers=0, seed=1, in_memory=True).train_dl
    assert all(a.equal(b) for (_, a), (_, b) in zip(data.train_dl, whole))
    with pytest.raises(DataError, match='800 items .*1,000.*drop_last'): ll.to_databunch(1000, num_workers=0, drop_last=True)
    assert len(next(iter(ll.to_databunch(16, num_workers=0, timeout=5).train_dl))[0]) == 16


def test_a_new_line_in_a_files_name_spoils_no_message(tmp_path):
    (tmp_path/'x\ny.jpg').write_bytes(b'no picture')
    for nw in (0, 1):
        with pytest.raises(DataError) as e: list(D.ItemLoader(ImageList.from_files(tmp_path, tfms=BYTES), 2, num_workers=nw))
        assert str(e.value).startswith(f'{tmp_path}/x\ny.jpg: no readable picture'), nw


# labels

@pytest.mark.parametrize('make', [np.array, torch.tensor])
def test_labels_that_are_arrays_and_tensors(make):
    sd = SplitData.split_by_func(ItemList([f'{s}/{i}' for s in ('train', 'valid') for i in range(4)]), lambda o: o.startswith('valid'))
    def labelled(f): ll = label_by_func(sd, lambda o: f(int(o[-1]))); return type(ll.train.proc_y), ll.train.y.items.tolist(), [ll.valid.y_obj(i) for i in range(4)]
    assert labelled(lambda i: make(i % 2)) == (CategoryProcessor, [0, 1, 0, 1], [0, 1, 0, 1])
    assert labelled(lambda i: make([i, .5])) == (NumberProcessor, [[i, .5] for i in range(4)], [[i, .5] for i in range(4)])
    assert labelled(lambda i: make(i/2))[0] is NumberProcessor
    assert labelled(lambda i: np.array(['a', 'b'][:1 + i % 2]))[::2] == (MultiCategoryProcessor, [['a'], ['a', 'b']]*2)
    assert labelled(lambda i: np.str_('ab'[i % 2]))[2] == ['a', 'b', 'a', 'b'] and type(CategoryProcessor()([np.int64(3), 4])[0]) is int
    assert labelled(lambda i: 1 if i == 0 else i*.14)[:2] == (NumberProcessor, pytest.approx([1, .14, .28, .42]))
    assert isinstance(D.default_processor([0]*200 + [.5]), NumberProcessor) and isinstance(D.default_processor([1, 2]), CategoryProcessor)
    for y in (np.arange(8), np.linspace(0, 1, 8), np.arange(8) > 3):
        items = LabeledData(sd.train.new(list(range(8))), y).y.items
        assert torch.is_tensor(items) and items.tolist() == pytest.approx(y.tolist()) and items.dtype in (torch.int64, torch.float32, torch.bool)


def test_two_rows_for_one_name(tmp_path):
    (tmp_path/'t.csv').write_text('name,label\na.jpg,cat\nb.jpg,dog\na.jpg,cat\n')
    assert D.read_table(tmp_path/'t.csv', 'name', 'label') == {'a.jpg': 'cat', 'b.jpg': 'dog'}
    (tmp_path/'t.csv').write_text('name,label\na.jpg,cat\na.jpg,dog\n')
    with pytest.raises(DataError, match="two rows for a.jpg: 'cat' and 'dog'"): D.read_table(tmp_path/'t.csv', 'name', 'label')
    (tmp_path/'t.csv').write_text('name,label\na.jpg,' + 'x'*200_000)
    with pytest.raises(DataError, match='t.csv cannot be read: field larger'): D.read_table(tmp_path/'t.csv', 'name', 'label')
    pd = pytest.importorskip('pandas')
    assert D.read_table(pd.DataFrame({'name': ['a', 'b'], 'label': pd.array([None, 3], dtype='Int64')}), 'name', 'label') == {'a': '', 'b': '3'}


def test_a_constant_channel_is_not_divided_by_zero():
    x = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8); x[:, 1] = 200
    z = D.NormalizeBytes.fit([(o, 0) for o in x])(x)
    assert z.isfinite().all() and z[:, 1].abs().max() < 1e-4 and (z[:, 0].std() - 1).abs() < 1e-3


# ------------------------------------------------------------------ found by a fourth reading
def test_include_without_recurse_is_refused(tmp_path):
    pictures(tmp_path, 'train/0.png', '1.png')
    for f in (get_files, ImageList.from_files):
        with pytest.raises(ValueError, match='recurse is False'): f(tmp_path, recurse=False, include='train')
    assert [p.name for p in get_files(tmp_path)] == ['1.png']


def test_a_lambda_of_a_notebook_is_named_for_people():
    for file in ('/tmp/ipykernel_1234/1008815586.py', '<ipython-input-3-0123456789ab>'):
        assert D.step_name(eval(compile('\nlambda x: x', file, 'eval'))) == '<lambda> (a notebook cell, line 2)'
    assert D.step_name(lambda x: x).startswith('<lambda> (test_data_block.py, line ')


def test_pictures_under_a_limit_of_their_own_are_decoded_side_by_side(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from PIL import PngImagePlugin
    pictures(tmp_path, 'a.png', 'b.png')
    both, load, limits, before = threading.Barrier(2, timeout=10), PngImagePlugin.PngImageFile.load, [], Image.MAX_IMAGE_PIXELS

    def meet(self): both.wait(); limits.append(Image.MAX_IMAGE_PIXELS); return load(self)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, 'load', meet)
    with ThreadPoolExecutor(2) as pool: sizes = list(pool.map(lambda n: open_image(tmp_path/n, max_pixels=10**4).size, ['a.png', 'b.png']))
    assert sizes == [(40, 30)]*2 and set(limits) == {before}, 'other lists do not see the limit while these decode'


@pytest.mark.parametrize('kind', 'png jpg bmp gif webp ppm tif jp2'.split())
def test_the_limit_is_raised_for_every_kind(kind, tmp_path, monkeypatch):
    "Some are asked for their size when they are opened, some once more when they are decoded."
    Image.new('RGB', (40, 30)).save(tmp_path/f'a.{kind}')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 500)
    with pytest.raises(DataError, match='exceeds limit'): open_image(tmp_path/f'a.{kind}')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert open_image(tmp_path/f'a.{kind}', max_pixels=2000).size == (40, 30)
    assert Image.MAX_IMAGE_PIXELS == 500


def test_open_files_are_pictures_too(simplejpeg):
    import io
    simplejpeg(1)
    good = io.BytesIO()
    Image.new('RGB', (40, 30)).save(good, 'JPEG')
    for fast in (False, True):
        assert open_image(good, fast=fast).size == (40, 30)
        for bad in (b'', b'no picture', good.getvalue()[:300]):
            with pytest.raises(DataError, match='no readable picture'): open_image(io.BytesIO(bad), fast=fast)


def test_pictures_to_show():
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    x = np.random.default_rng(0).integers(0, 256, (3, 8, 9), dtype=np.uint8)
    for im in (x, x[:, ::-1], x/255., x[:1], x.transpose(1, 2, 0)): assert D.show_image(im).images[0].get_array().shape[:2] == (8, 9)
    assert len(D.show_images((torch.tensor(x) for _ in range(3)), cols=2).axes) == 4
    with pytest.raises(ValueError, match='no pictures to show'): D.show_images([])
    plt.close('all')


@pytest.mark.filterwarnings('ignore:class .* has a single training picture')
def test_the_labelled_lists_are_their_own():
    il = ItemList(['train/a/1', 'train/b/2', 'valid/a/3'])
    sd = SplitData.split_by_func(il, grandparent_splitter)
    ll, alone = label_by_func(sd, parent_labeler), LabeledData.label_by_func(il, parent_labeler)
    ll.train.x.tfms = alone.x.tfms = str.upper
    assert ll.train.x[0] == alone.x[0] == 'TRAIN/A/1' and sd.train[0] == il[0] == 'train/a/1' and ll.valid.x[0] == 'valid/a/3'


def test_runs_of_pictures_have_a_bound():
    sizes = []

    class Spy(ResizeFixed):
        def batch(self, xb): sizes.append(xb.shape[0]*xb.shape[2]*xb.shape[3]); return super().batch(xb)
    c = D._Collect(Spy(8))
    for i in range(7): c.add(Image.new('RGB', (1000, 700)), i)
    for i in range(2): c.add(Image.new('RGB', (2000, 1500)), i)
    assert c.tensor().shape == (9, 3, 8, 8) and sizes == [1_400_000]*3 + [700_000] + [3_000_000]*2


def test_a_look_at_a_batch_draws_nothing(sample):
    import matplotlib
    matplotlib.use('agg')
    def states(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    before = states()
    D.ItemLoader(numbers(), 3, seed=0).first()
    assert states() == before

    def shifted(x): return x.float() + random.random() + torch.rand(()) + np.random.rand()
    shifted._order = 25
    data = labelled(sample, [make_rgb, ResizeFixed(8), to_byte_tensor, shifted]).to_databunch(8, num_workers=0, seed=0)
    before = states()
    data.show_batch()
    assert states() == before


def test_progress_is_done_also_where_files_are_skipped(tmp_path):
    for i in range(40): jpeg(tmp_path/f'{i:02d}.jpg')
    for i in (3, 39): (tmp_path/f'{i:02d}.jpg').write_bytes(b'x')
    seen = []
    ds, skipped = LabeledData(ImageList.from_files(tmp_path, tfms=BYTES), [0]*40).in_memory('skip', progress=lambda *n: seen.append(n))
    assert len(ds) == 38 and len(skipped) == 2 and seen[-1] == (40, 40) and len(seen) == 2 and seen[0][0] < 40


def test_verify_makes_no_list_of_all_paths(monkeypatch):
    class Counting(PathList):
        made = 0
        def __getitem__(self, i):
            Counting.made += isinstance(i, int)
            return super().__getitem__(i)
    seen, dones = [], []
    monkeypatch.setattr(D, 'open_image', lambda fn, **kw: seen.append(Counting.made))
    assert verify_images(ImageList(Counting('/x', [f'{i}.jpg' for i in range(1000)]), '/x'), progress=lambda *n: dones.append(n)) == {}
    assert seen[0] <= 200 and len(seen) == Counting.made == 1000 and dones[-1] == (1000, 1000)


# ------------------------------------------------------------------ found by users
@pytest.mark.parametrize('labels, bad', [(['cat dog', 'dog'], 2), ([['cat', 'dog'], 'dog'], 1), ([['cat'], np.str_('dog')], 1), ([3, 4], 2), ([np.array(['cat', 'dog']), np.array('dog')], 1)], ids=str)
def test_text_is_no_list_of_labels(labels, bad):
    "Without delim= the letters became the classes."
    proc = MultiCategoryProcessor()
    with pytest.raises(DataError, match=fr'{bad} of 2 labels: a list of labels is wanted for each item, not .*delim=.* — .*b\.png'): LabeledData(ItemList(['a.png', 'b.png']), labels, proc_y=proc)
    with pytest.raises(DataError, match='a list of labels is wanted'): proc(labels)
    assert LabeledData(ItemList(['a.png']), [['x', 'y']], proc_y=proc).y[0].tolist() == [1, 1] and proc.vocab == ['x', 'y'], 'what was refused left a vocabulary behind'
    with pytest.raises(DataError, match="not 'x'"): proc(['x'])


def test_lists_of_labels_of_every_kind():
    for one in (('b', 'a'), {'b', 'a'}, np.array(['b', 'a']), dict.fromkeys('ba').keys(), ['b', 'a', 'a']):
        proc = MultiCategoryProcessor()
        assert [y.tolist() for y in proc([one, []])] == [[1, 1], [0, 0]] and proc.vocab == ['a', 'b']
    assert MultiCategoryProcessor()([torch.tensor([3, 1]), np.array([1])])[1].tolist() == [1, 0]


def test_a_loader_with_workers_can_be_copied():
    "After a pass, and in the middle of one: the copy starts workers of its own, and goes on where the loader was. It was an error, of a `Learner` as well."
    il = numbers(tfm=lambda: torch.tensor)
    plain, data = D.ItemLoader(il, 3, True, 0), D.DataBunch(D.ItemLoader(il, 3, True, 0, num_workers=1), None)
    want = [torch.cat(list(plain)) for _ in range(3)]
    def check(epoch):
        for again in (pickle.loads(pickle.dumps(data)), copy.deepcopy(data), copy.copy(data.train_dl)):
            dl = getattr(again, 'train_dl', again)
            assert dl._iterator is None and not dl._busy and dl.num_workers == 1
            if again is not dl: assert torch.cat(list(dl)).equal(want[epoch]) and dl._iterator is not data.train_dl._iterator     # a shallow copy shares the order
            dl._iterator = None
    assert torch.cat(list(data.train_dl)).equal(want[0])
    check(1)
    going = iter(data.train_dl)
    half = [next(going)]
    check(2)
    assert torch.cat([*half, *going]).equal(want[1]), 'the pass under way goes on'
    data.train_dl._iterator = None
