"""exp.items and exp.data_block against torchvision, Pillow and plain walks, with broken files and processes that start by spawn."""
import io
import os
import pickle
import random
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, small_env
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from exp import data_block as D
from exp import datasets
from exp.data_block import (CategoryProcessor, ImageList, ItemList, LabeledData, ListContainer, NormalizeBytes, ProcessedItemList, Processor, ResizeFixed,
                            SplitData, decoded, first_batch, get_files, grandparent_splitter, image_extensions, item_dl, label_by_func, make_rgb, open_image,
                            parent_labeler, to_byte_tensor, to_float_tensor)
from exp.datasets import DataError, URLs, untar_data
from exp.fast_batches import fast_dl
from exp.many_files import list_files
from exp.pictures import open_picture
from exp.tables import TableLabeler

BYTES = [make_rgb, ResizeFixed(16), to_byte_tensor]


@pytest.fixture(scope='module')
def sample(data_home): return untar_data(URLs.SAMPLE, base=data_home/'data')


def labelled(path, tfms=BYTES, valid='val', f=parent_labeler, **kw):
    il = ImageList.from_files(path, tfms=tfms)
    return label_by_func(SplitData.split_by_func(il, partial(grandparent_splitter, valid_name=valid)), f, **kw)


@pytest.fixture
def ll(sample): return labelled(sample)


def pictures(root, *names, size=(40, 30)):
    "Small pictures, each of its own colour, at `names` below `root`."
    for i, n in enumerate(names):
        (root/n).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', size, (i*37 % 256, i*91 % 256, 60)).save(root/n)
    return root


def ys(dl): return torch.cat([y for _, y in dl]).tolist()


def noisy(x): return x.float() + random.random() + torch.rand(()) + np.random.rand()
noisy._order = 25


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
    names = '''get_files image_extensions ListContainer ItemList ImageList grandparent_splitter split_by_func SplitData Processor CategoryProcessor
        ProcessedItemList LabeledData label_by_func parent_labeler make_rgb ResizeFixed to_byte_tensor to_float_tensor DataBunch databunchify show_image'''.split()
    space = {}
    exec('from exp.data_block import *', space)
    assert {*names} <= {*space}


# ------------------------------------------------------------------ files
def test_same_files_classes_and_pixels_as_imagefolder(sample):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2
    ref = ImageFolder(sample/'val', v2.Compose([v2.Resize((96, 96)), v2.PILToTensor()]))
    ll = labelled(sample, [to_byte_tensor, ResizeFixed(96), make_rgb])                  # listed in any order: _order decides
    assert [str(p) for p in ll.valid.x.items] == [f for f, _ in ref.samples]
    assert ll.train.proc_y.vocab == ref.classes and ll.valid.y.items.tolist() == ref.targets
    for i in range(0, len(ref), 29): assert (ll.valid[i][0].int() - ref[i][0].int()).abs().max() <= 1


@pytest.mark.parametrize('kw, want', [
    ({}, ['top.PNG']), (dict(recurse=True), ['a/1.jpg', 'a/2.txt', 'b/c/3.jpeg', 'top.PNG']), (dict(recurse=True, extensions='png'), ['top.PNG']),
    (dict(recurse=True, extensions=['.JPG', 'jpeg']), ['a/1.jpg', 'b/c/3.jpeg']), (dict(recurse=True, include='a'), ['a/1.jpg', 'a/2.txt']),
    (dict(recurse=True, include=iter('b')), ['b/c/3.jpeg'])], ids=lambda o: len(str(o)) if isinstance(o, dict) else None)
def test_which_files(tmp_path, monkeypatch, kw, want):
    for n in ('b/c/3.jpeg', 'a/2.txt', 'a/1.jpg', 'top.PNG', '.hidden', 'a/._1.jpg', '.ipynb_checkpoints/a/1.jpg'):
        (tmp_path/n).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/n).touch()
    monkeypatch.setenv('HOME', str(tmp_path.parent))
    assert [p.relative_to(tmp_path).as_posix() for p in get_files(tmp_path, **kw)] == want
    if 'include' not in kw: assert get_files(f'~/{tmp_path.name}', **kw) == get_files(str(tmp_path), **kw)


def test_the_order_is_that_of_sorted(tmp_path):
    files = get_files(pictures(tmp_path, 'cat-big/1.png', 'cat.old/1.png', 'cat/b.png', 'cat/a/1.png', 'cat.png', 'cat 2/1.png', 'Cat/1.png', 'b.png'), recurse=True)
    assert files == sorted(files) and len(files) == 8


@pytest.mark.parametrize('kind', sorted(image_extensions))
def test_what_pillow_opens_is_found(tmp_path, kind):
    for im in (Image.new('RGB', (40, 30)), Image.new('1', (32, 32))):
        try: im.save(tmp_path/f'a{kind}')
        except (OSError, ValueError, KeyError): continue
        assert open_image(ImageList.from_files(tmp_path).items[0]).mode


def test_a_class_without_pictures_and_files_left_out_are_named(tmp_path):
    pictures(tmp_path, 'train/cat/1.png', 'train/cow/1.png', 'more/x/1.png', 'loose/1.png')
    for n in ('labels.csv', 'train/labels.csv', 'more/notes.txt'): (tmp_path/n).touch()              # beside the classes: nobody's business
    def said(*names):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            ImageList.from_files(tmp_path)
        return len(told) == bool(names) and all(n in str(told[0].message) for n in names)
    assert said()
    (tmp_path/'train/dog').mkdir()
    assert said('train/dog')
    for i in range(3): (tmp_path/f'train/dog/{i}.xyz').touch()
    assert said('train/dog', '3 files')
    (tmp_path/'train/dog/4.png').write_bytes((tmp_path/'train/cat/1.png').read_bytes())
    assert said('3 files')


@pytest.mark.skipif(sys.platform == 'win32', reason='there are none')
@pytest.mark.parametrize('way', [open_image, open_picture, partial(open_picture, fast=True)], ids=['open_image', 'open_picture', 'fast'])
def test_what_would_hang_or_fill_the_memory(tmp_path, way):
    "A pipe, a device, a file of 8 TB that takes no place, a side of 8 million pixels; an EPS would start another program."
    os.mkfifo(pictures(tmp_path, 'cat/1.png')/'cat/a.jpg')
    (tmp_path/'cat/b.jpg').symlink_to('/dev/zero')
    with open(tmp_path/'cat/c.jpg', 'wb') as f: f.truncate(8 << 40)
    Image.new('L', (1, 8_000_000)).save(tmp_path/'cat/d.png')
    Image.new('RGB', (4, 4)).save(tmp_path/'cat/e.jpg', 'EPS')
    assert [f.name for f in get_files(tmp_path, recurse=True)] == ['1.png', 'c.jpg', 'd.png', 'e.jpg']
    for n in ('a.jpg', 'b.jpg', 'c.jpg', 'd.png', 'e.jpg'):
        with pytest.raises(DataError, match=n): way(tmp_path/'cat'/n)


@pytest.mark.skipif(sys.platform == 'win32', reason='links want rights there')
def test_links_are_followed_and_end(tmp_path):
    pictures(tmp_path, 'x/a/1.png', 'x/b/2.png', 'elsewhere/3.png')
    for at, to in (('x/a/up', 'x'), ('x/a/to_b', 'x/b'), ('x/b/to_a', 'x/a'), ('x/self', 'x/self'), ('x/c', 'elsewhere')): (tmp_path/at).symlink_to(tmp_path/to)
    assert sorted(p.name for p in get_files(tmp_path/'x', '.png', recurse=True)) == ['1.png', '2.png', '3.png']


def test_a_home_folder_gives_the_same_names(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(pictures(tmp_path, 'ds/a/1.png')))
    assert ImageList.from_files('~/ds').name(0) == ImageList.from_files(tmp_path/'ds').name(0) == ItemList([tmp_path/'ds/a/1.png'], '~/ds').name(0) == 'a/1.png'
    (tmp_path/'t.csv').write_text('name,label\n1.png,x\n')
    assert open_image('~/ds/a/1.png').size == open_picture(Path('~/ds/a/1.png')).size and list_files('~/ds')[0] == tmp_path/'ds/a/1.png' and TableLabeler('~/t.csv')('1.png') == 'x'
    monkeypatch.delenv('HOME'); monkeypatch.setattr('pwd.getpwuid', lambda uid: {}[uid])             # a user without a home
    for f in (open_image, open_picture, get_files, ImageList.from_files, list_files, TableLabeler): pytest.raises(DataError, f, '~/ds')


def test_folders_that_are_not_there(tmp_path):
    for f in (partial(get_files, tmp_path/'nope'), partial(get_files, tmp_path, recurse=True, include='trian'), partial(ImageList.from_files, tmp_path)): pytest.raises(DataError, f)


# ------------------------------------------------------------------ pictures
@pytest.mark.parametrize('n', range(1, 9))
def test_every_exif_orientation(tmp_path, n):
    upright = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}                          # Transpose that stores the upright picture as orientation n says
    exif = Image.Exif()
    exif[0x0112] = n
    (upright if n == 1 else upright.transpose(Image.Transpose(undo[n]))).save(tmp_path/'a.png', exif=exif)
    assert np.array_equal(open_image(tmp_path/'a.png'), upright)


def test_garbage_in_exif_breaks_no_picture(tmp_path):
    Image.new('RGB', (40, 20)).save(tmp_path/'a.png', exif=b'Exif\0\0garbage, no EXIF')
    assert open_image(tmp_path/'a.png').size == (40, 20)


def test_a_broken_file_is_named(tmp_path, sample):
    whole = get_files(sample, recurse=True)[0].read_bytes()
    for name, content in (('cut', whole[:len(whole)//2]), ('empty', b''), ('text', b'no picture')):
        (tmp_path/f'{name}.jpg').write_bytes(content)
        with pytest.raises(DataError, match=f'{name}.jpg'): open_image(tmp_path/f'{name}.jpg')
    with pytest.raises(DataError, match='nope.jpg'): open_image(tmp_path/'nope.jpg')


def test_kinds_of_pictures_become_rgb(tmp_path):
    p = Image.new('P', (8, 8), 1)
    p.putpalette([0, 0, 0, 9, 99, 199])
    p.save(tmp_path/'clear.png', transparency=1)
    film = tmp_path/'film.gif'
    Image.new('RGB', (8, 8), 'red').save(film, save_all=True, append_images=[Image.new('RGB', (8, 8), 'blue')])
    kinds = [(Image.new('RGBA', (8, 8), (255, 0, 0, 0)), (255,)*3), (Image.new('LA', (8, 8), (0, 0)), (255,)*3), (Image.new('LA', (8, 8), (77, 255)).convert('La'), (77,)*3), (p, (9, 99, 199)), (open_image(tmp_path/'clear.png'), (255,)*3),
             (Image.new('CMYK', (8, 8), (0, 255, 255, 0)), (255, 0, 0)), (Image.new('L', (8, 8), 77), (77,)*3), (Image.new('1', (8, 8), 1), (255,)*3), (open_image(film), (255, 0, 0))]
    for im, want in kinds: assert to_byte_tensor(make_rgb(im))[:, 4, 4].tolist() == pytest.approx(want, abs=2), im
    for mode in ('I', 'I;16', 'F'): pytest.raises(ValueError, make_rgb, Image.new(mode, (8, 8)))        # not white without a word


@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA'])
def test_resize_is_pillows_to_two_levels(sample, mode):
    im = Image.open(get_files(sample, recurse=True)[0]).convert(mode)
    for size in ((50, 20), (300, 200)):
        got = ResizeFixed(size)(im)
        assert got.size == size and np.abs(np.asarray(got, int) - np.asarray(im.resize(size, Image.Resampling.BILINEAR), int)).max() <= 2


def test_arrays_go_through_as_opencv_and_albumentations_give_them(sample):
    def mirror(im): return np.asarray(im)[:, ::-1]                                        # (H, W, 3) bytes, with strides below zero
    mirror._order = 15
    fn = get_files(sample, recurse=True)[3]
    a, b = (ImageList([fn], tfms=t)[0] for t in ([*BYTES, mirror], BYTES))
    assert a.dtype == torch.uint8 and a.equal(b.flip(2)) and to_byte_tensor(np.zeros((4, 5), np.uint8)).shape == (1, 4, 5)
    for bad in (Image.new('1', (4, 4)), np.zeros((4, 4, 3), np.float32)): pytest.raises(TypeError, to_byte_tensor, bad)


def test_floats_are_not_overwritten():
    x = torch.arange(0, 250., 10).view(5, 5)
    il = ItemList(x, tfms=to_float_tensor)
    assert il[1].equal(x[1]/255) and il[1].equal(il[1]) and x.max() == 240 and to_float_tensor(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, 1]


@pytest.mark.parametrize('im', [Image.new('L', (9, 8)), torch.zeros(1, 8, 9, dtype=torch.uint8), torch.randn(3, 8, 9), np.zeros((8, 9, 3)), torch.rand(3, 8, 9).half()], ids=['L', 'bytes', 'floats', 'array', 'half'])
def test_whatever_is_a_picture_is_shown(im):
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    assert D.show_image(im).images[0].get_array().shape[:2] == (8, 9) and len(D.show_images((im for _ in range(3)), cols=2).axes) == 4
    plt.close('all')


def test_a_loop_of_plots_keeps_one_of_them_open():
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    plt.close('all')
    mine, x = plt.figure(), torch.rand(3, 8, 9)
    kept = [D.show_image(x).figure for _ in range(5)] + [D.show_images([x, x]) for _ in range(5)]
    assert len(plt.get_fignums()) == 2 and plt.fignum_exists(mine.number)
    for f in kept: f.savefig(io.BytesIO())                                                # closed is not gone
    plt.close('all')


def test_normalised_bytes():
    x = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
    x[:, 1] = 200                                                                         # nothing to divide by
    before, z = x.clone(), (norm := NormalizeBytes.fit([(o, 0) for o in x]))(x)
    d = x.double()/255
    want = ((d - d.mean((0, 2, 3), keepdim=True))/d.std((0, 2, 3), keepdim=True).clamp(min=1/255))
    assert torch.allclose(z.double(), want, atol=1e-4) and torch.allclose(norm(d.float()), z, atol=1e-4) and x.equal(before)


# ------------------------------------------------------------------ lists
class Block:
    "Items that are asked for many at once."
    def __init__(self, n): self.idx = np.arange(n) if isinstance(n, int) else n
    def __len__(self): return len(self.idx)
    def __getitem__(self, i): return int(self.idx[i])
    def pick(self, idx): return Block(self.idx[idx])


@pytest.mark.parametrize('items', [range(20), [*range(20)], np.arange(20), torch.arange(20), Block(20)], ids=['range', 'list', 'array', 'tensor', 'block'])
def test_one_several_and_a_mask(items):
    l = ListContainer(items)
    assert l[3] == 3 and l[-1] == 19 and [int(o) for o in l[[5, 1]]] == [5, 1] and [int(o) for o in l[[i % 2 == 1 for i in range(20)]]] == [*range(1, 20, 2)] and len(l[[]]) == 0
    assert isinstance(l[np.array([1])], Block) == isinstance(items, Block) and '(20 items)' in repr(l)
    for bad in ([True], [20]): pytest.raises(IndexError, l.__getitem__, bad)


def test_a_series_goes_by_place_not_by_label():
    pd = pytest.importorskip('pandas')
    s = pd.Series(['a', 'b', 'c'], index=[2, 0, 1])
    assert [ItemList(s)[i] for i in range(3)] == ['a', 'b', 'c'] == [*ProcessedItemList(s)]


def test_a_step_that_fails_names_the_item_and_itself(sample, capsys):
    def upside(x): return x.nonsense()
    upside._order = 15
    ll = labelled(sample, [*BYTES, upside])
    with pytest.raises(RuntimeError, match=rf'{ll.train.x.items[0].name}.*upside.*RGB'): ll.train[0]
    ll.summary(pictures=False)
    out = capsys.readouterr().out
    assert out.index('ResizeFixed') < out.index('upside') < out.index('BREAKS HERE') and 'to_byte_tensor' not in out


def test_a_step_without_an_order_stays_behind_the_one_before():
    from torchvision.transforms import v2
    def first(x): return x
    il = ItemList([Image.new('L', (99, 99))], tfms=[first, to_byte_tensor, to_float_tensor, ResizeFixed(64), v2.CenterCrop(32), make_rgb])
    assert il[0].shape == (3, 32, 32) and il.tfms[0] is first


def test_two_shapes_are_no_batch(tmp_path):
    pictures(tmp_path, 'a.png', 'b.png')
    pictures(tmp_path, 'c.png', size=(30, 40))
    with pytest.raises(DataError, match='c.png'): list(item_dl(ImageList.from_files(tmp_path, tfms=to_byte_tensor), 3))


# ------------------------------------------------------------------ splits
names_st = st.lists(st.text('abcdefgh', min_size=1, max_size=8), unique=True, min_size=2, max_size=60)


@given(names=names_st, seed=st.integers(0, 99), pct=st.floats(.01, .99))
def test_random_split_is_disjoint_complete_and_goes_by_names(names, seed, pct):
    a, b = SplitData.split_by_random(ItemList(names), pct, seed), SplitData.split_by_random(ItemList(names[::-1]), pct, seed)
    assert sorted([*a.train.items, *a.valid.items]) == sorted(names) and {*a.valid.items} == {*b.valid.items} and len(a.train) and len(a.valid)


@given(names=st.lists(st.text('abcdefgh', min_size=1, max_size=8), unique=True, min_size=40, max_size=60), seed=st.integers(0, 99))
def test_a_new_file_moves_no_old_one(names, seed):
    a, b = ({*SplitData.split_by_random(ItemList(n), .4, seed).valid.items} for n in (names, [*names, 'a new one']))
    assert a == b - {'a new one'}


def test_random_split_has_about_its_share_and_follows_its_folder():
    def valid(root, kind=Path, seed=0): return [str(p).removeprefix(root) for p in SplitData.split_by_random(ItemList([kind(f'{root}/{i}.jpg') for i in range(2000)], root), .2, seed).valid.items]
    assert abs(len(valid('/x')) - 400) < 60 and valid('/x') == valid('/y/z') == valid('/y/z', str) != valid('/x', seed=1)
    for bad in (0, 1, -1): pytest.raises(ValueError, SplitData.split_by_random, ItemList('abc'), bad)


def test_items_without_a_name_are_split_by_their_place():
    "torch abbreviates what it prints, so all large tensors had one name; a picture's text holds its address."
    def places(items): return [i for i, o in enumerate(items) if any(o is v for v in SplitData.split_by_random(ItemList(items)).valid.items)]
    a = places([torch.zeros(40, 40) for _ in range(500)])
    assert a == places([Image.new('RGB', (4, 4)) for _ in range(500)]) and abs(len(a) - 100) < 35


def test_who_belongs_to_neither_side():
    sd = SplitData.split_by_func(ItemList(['train/a/1', 'valid/a/2', 'other/a/3']), grandparent_splitter)
    assert (sd.train.items, sd.valid.items) == (['train/a/1'], ['valid/a/2'])
    several = partial(grandparent_splitter, valid_name=['valid', 'test'], train_name=('train', 'extra'))
    assert [several(f'{s}/a/1') for s in ('train', 'extra', 'valid', 'test', 'other')] == [False, False, True, True, None]


def test_an_empty_side_is_an_error(tmp_path):
    for s in ('train', 'val'):
        with pytest.raises(DataError): SplitData.split_by_func(ItemList([f'{s}/a/1', f'{s}/a/2']), grandparent_splitter)
    with pytest.raises(DataError): SplitData.split_by_mask(ItemList('ab'), [True, True])


# ------------------------------------------------------------------ labels and processors
@given(train=st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=30))
def test_category_there_and_back(train):
    p = CategoryProcessor()
    ys = p(train)
    assert p.deprocess(ys) == train and p.vocab == sorted({*train}) and CategoryProcessor()(train[::-1]) == ys[::-1]
    assert pickle.loads(pickle.dumps(p))(train) == ys == CategoryProcessor(p.vocab)(train)


THREE = SplitData.split_by_func(ItemList(['train/a/1', 'train/b/2', 'valid/a/3']), grandparent_splitter)


@pytest.mark.parametrize('f, named', [({'train/a/1': 'x', 'valid/a/3': 'x'}.get, 'train/b/2'), (lambda o: ' ' if 'b' in o else 'x', 'train/b/2'),
                                      (lambda o: o[-1], 'valid/a/3'), *((lambda o, odd=odd: odd if 'b' in o else 'x', 'train/b/2') for odd in (float('nan'), np.float32('nan'), 3, .5, b'x')),
                                      (lambda o: float('nan') if 'b' in o else 1, 'train/b/2'), (lambda o: 'x' if 'b' in o else 1, 'train/a/1')],
                         ids=['none', 'blank', 'unknown to training', 'nan', 'float32', 'int', 'float', 'bytes', 'nan among numbers', 'mixed'])
def test_labels_that_are_wrong_name_the_file(f, named):
    for kw in ({}, dict(proc_y=CategoryProcessor())):
        with pytest.raises(DataError, match=named): label_by_func(THREE, f, **kw)


def test_a_refused_label_leaves_nothing_behind():
    class Upper(Processor):
        def proc1(self, item): return item.upper()
    with pytest.raises(DataError, match='— c$'): LabeledData(ItemList(['a', 'b', 'c']), ['a', 'b', 'c'], proc_y=[Upper(), CategoryProcessor(['A', 'B'])])
    class Picky(CategoryProcessor):
        def fit(self, items): [self.fit_one(o) for o in items]; super().fit(items)
        def fit_one(self, o):
            if o == 'bad': raise DataError('bad')
    proc = Picky()
    with pytest.raises(DataError, match='^1 of 3.*— c$'): LabeledData(ItemList(['a', 'b', 'c']), ['x', 'y', 'bad'], proc_y=proc)
    assert proc(['z', 'w']) == [1, 0]
    with pytest.raises(ValueError): LabeledData(ItemList(['a', 'b']), ['x'])
    for odd in (.5, ['a'], np.array([1, 2])): pytest.raises(ValueError, label_by_func, THREE, lambda o, odd=odd: odd)


@pytest.mark.parametrize('kind', [int, np.int64, torch.tensor, lambda i: 'ab'[i], lambda i: np.str_('ab'[i])])
def test_what_is_a_class(kind):
    ll = label_by_func(SplitData(ItemList([*'0101']), ItemList([*'10'])), lambda o: kind(int(o)))
    assert ll.train.y.items.tolist() == [0, 1, 0, 1] and ll.valid[0] == ('1', 1) and ll.valid.y_obj(0) in (1, 'b') and type(ll.train.y[0]) is int


class Upper:
    def proc1(self, o): return str(o).upper()
    def deproc1(self, o): return o.lower()


def test_two_methods_are_a_processor():
    ll = label_by_func(THREE, parent_labeler, proc_x=Upper(), proc_y=[Upper(), CategoryProcessor()])
    assert ll.train.y.procs[-1].vocab == ['A', 'B'] and ll.train.y_obj(1) == 'b' and ll.train[1] == ('TRAIN/B/2', 1)
    assert ProcessedItemList(['x', 'y'], [])[1] == 'y' and label_by_func(THREE, parent_labeler, proc_y=[]).valid[0][1] == 'a'


def test_the_labelled_lists_are_their_own():
    ll = label_by_func(THREE, parent_labeler)
    ll.train.x.tfms = str.upper
    part = ll.train.pick([1])
    assert part[0] == ('TRAIN/B/2', 1) and len(ll.train) == 2 and THREE.train[0] == 'train/a/1' and ll.valid.x[0] == 'valid/a/3'


@pytest.mark.parametrize('pred, said, p', [([0., 3., 0.], 'b', .909), ([0., 0., 0., 9.], 'output 3', .9996)])
def test_a_prediction_in_words(pred, said, p):
    label, probs = CategoryProcessor(['a', 'b', 'c']).decode(torch.tensor(pred))
    assert label == said and probs.max().item() == pytest.approx(p, abs=1e-3) and probs.sum().item() == pytest.approx(1)
    label, probs = CategoryProcessor(['no', 'yes']).decode(torch.tensor([2.]))              # one score for two classes
    assert label == 'yes' and probs.tolist() == pytest.approx([.119, .881], abs=1e-3)


# ------------------------------------------------------------------ loaders
def test_the_order_is_the_seeds_whatever_the_workers(ll):
    def epochs(nw, seed): torch.manual_seed(nw); dl = ll.to_databunch(100, 3, num_workers=nw, seed=seed).train_dl; return [ys(dl) for _ in range(2)]
    a, b = epochs(0, 3)
    assert a != b and sorted(a) == sorted(b) == sorted(ll.train.y.items.tolist()) and epochs(2, 3) == [a, b] and epochs(0, 4)[0] != a
    first = next(iter(ll.to_databunch(100, 3, num_workers=2, seed=3).valid_dl))
    assert first[0].equal(torch.stack(ll.valid.x[:200])) and first[1].tolist() == ll.valid.y.items[:200].tolist()


@pytest.mark.parametrize('make_dl', [item_dl, fast_dl])
def test_workers_know_of_other_transforms(sample, make_dl):
    data = labelled(sample).to_databunch(400, num_workers=1, persistent_workers=True, make_dl=make_dl)
    for tfms, side in ((None, 16), ([make_rgb, ResizeFixed(32), to_byte_tensor], 32)):
        if tfms: data.source.train.x.tfms = tfms
        assert next(iter(data.train_dl))[0].shape[-1] == side
    data.source.train.x.tfms[1].size = 8, 8
    assert next(iter(data.train_dl))[0].shape[-1] == 8


def test_torchs_own_arguments(ll):
    def floats(b): x, y = torch.utils.data.default_collate(b); return x.float(), y
    def bunch(**kw): return ll.to_databunch(100, num_workers=0, **kw)
    data = bunch(sampler=[5]*7, collate_fn=floats)
    assert ys(data.train_dl) == [ll.train.y[5]]*7 and ys(data.valid_dl) == ll.valid.y.items.tolist() and next(iter(data.valid_dl))[0].dtype == torch.float32
    a, b = (ys(bunch(generator=torch.Generator().manual_seed(3)).train_dl) for _ in range(2))
    assert a == b != ys(bunch(generator=torch.Generator().manual_seed(4)).train_dl)
    for k in ('sampler', 'collate_fn', 'generator'):
        with pytest.raises(ValueError, match=k): bunch(make_dl=fast_dl, **{k: floats})


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'cp932', 'utf-8'])
def test_a_summary_on_every_console(tmp_path, encoding, monkeypatch):
    pictures(tmp_path, *(f'{s}/{c}/\xe9\x1b{i}.png' for s in ('train', 'valid') for c in ('\xf1and\xfa', 'b') for i in range(2)))
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding))
    labelled(tmp_path, valid='valid').to_databunch(2, num_workers=0).summary(pictures=False)
    sys.stdout.flush()
    said = sys.stdout.buffer.getvalue()
    assert b'ResizeFixed' in said and b'\x1b' not in said and ('\xf1'.encode(encoding) if encoding in ('cp1252', 'utf-8') else b'xf1') in said


@pytest.mark.parametrize('kw', [dict(num_workers=0), dict(num_workers=1, persistent_workers=True)], ids=['alone', 'workers that stay'])
def test_looking_changes_nothing(sample, kw, capsys):
    ll = labelled(sample, [*BYTES, noisy])
    def states(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    def bunch(): return ll.to_databunch(50, seed=1, **kw)
    want, data, before = ys(bunch().train_dl), bunch(), states()
    data.summary(); data.show_batch(); first = first_batch(data.train_dl); NormalizeBytes.fit(data.train_ds, 20)
    out = capsys.readouterr().out
    steps = ['ImageList.get', 'make_rgb', 'ResizeFixed', 'to_byte_tensor', 'noisy', 'label']
    assert states() == before and [out.index(s) for s in steps] == sorted(out.index(s) for s in steps)
    assert first[1].tolist() == want[:50] and ys(data.train_dl) == want


def test_a_bunch_prints_itself(ll):
    said = repr(ll.to_databunch(64, num_workers=0))
    for part in ('800', '300', *map(datasets.readable, ll.train.proc_y.vocab), '(64, 3, 16, 16)', 'uint8', 'int64'): assert part in said, part


def test_what_is_inferred(ll, sample):
    data = ll.to_databunch(64, num_workers=0)
    assert (data.c_in, data.c_out) == (3, 10) and [len(y) for _, y in data.valid_dl][0] == 128 and len(next(iter(ll.to_databunch(64, num_workers=0, valid_bs=7).valid_dl))[1]) == 7
    assert ll.to_databunch(64, c_in=1, c_out=12, num_workers=0).c_out == 12
    class Half:
        def proc1(self, o): return torch.tensor([o/2, 1.])
        def deproc1(self, y): return y[0].item()*2
    data = label_by_func(SplitData(ll.train.x, ll.valid.x), lambda fn: float(fn.stem[-3:]), proc_y=Half()).to_databunch(8, num_workers=0)
    assert 'classes: none' in repr(data) and data.c_out == 2 and data.classes is None and first_batch(data.train_dl)[1].dtype == torch.float32 and data.decode(torch.tensor([3., 0]))[0] == 6


def test_what_is_refused(ll, sample):
    for bad in (dict(bs=0), dict(bs=4, c_out=3)): pytest.raises(ValueError, ll.to_databunch, num_workers=0, **bad)
    pytest.raises(ValueError, SplitData(ll.train.x, ll.valid.x).to_databunch, 4)                                  # no labels
    pytest.raises(DataError, labelled(sample, f=lambda o: 'a').to_databunch, 4)                                   # one class
    pytest.raises(DataError, ll.to_databunch, 801, drop_last=True, num_workers=0)                                 # no batch at all
    data = ll.to_databunch(64, 3, num_workers=0, drop_last=True, persistent_workers=True, prefetch_factor=3, timeout=5)
    assert [len(y) for _, y in data.train_dl] == [64]*12 and sum(len(y) for _, y in data.valid_dl) == 300


def test_another_loader_is_handed_in(ll):
    made = []
    def make_dl(ds, bs, shuffle=False, seed=None, num_workers=0, drop_last=False, colour=None):
        made.append((bs, shuffle, seed, num_workers, drop_last, colour))
        return item_dl(ds, bs, shuffle, seed)
    data = ll.add_test(ll.valid.x).to_databunch(8, seed=5, num_workers=1, drop_last=True, make_dl=make_dl, colour='red')
    assert made == [(8, True, 5, 1, True, 'red')] + [(16, False, 5, 1, False, 'red')]*2 and data.train_ds is ll.train


def test_a_test_set(ll, sample):
    data = ll.add_test(ImageList.from_files(sample, include=['val'])).to_databunch(64, num_workers=0)
    xs = torch.cat(list(data.test_dl))
    assert len(xs) == 300 and xs[:2].equal(torch.stack(ll.valid.x[:2])) and ll.test is None and ll.to_databunch(64, num_workers=0).test_dl is None
    with pytest.raises(DataError): ll.add_test(ItemList([]))


def test_decoded_once(ll, sample):
    kept = decoded(ll)
    a, b = (s.to_databunch(64, num_workers=0, seed=0) for s in (kept, ll))
    assert all(x.equal(v) and y.equal(w) for (x, y), (v, w) in zip(a.train_dl, b.train_dl, strict=True)) and kept.valid.x.items.dtype == torch.uint8
    f = ll.valid.x.items[3]
    assert a.item(f).equal(ll.valid[3][0]) and a.item(Image.open(f)).equal(ll.valid[3][0]) and a.classes == b.classes
    assert next(iter(kept.add_test(ImageList([f])).to_databunch(4, num_workers=0).test_dl))[0].equal(ll.valid[3][0])
    class Draws:
        _order, generator = 25, None
        def __call__(self, x): return x
    for t in (noisy, Draws()): pytest.raises(ValueError, decoded, labelled(sample, [*BYTES, t]))


def test_everything_pickles(ll):
    again = pickle.loads(pickle.dumps(ll))
    assert again.train[3][0].equal(ll.train[3][0]) and again.valid.y_obj(5) == ll.valid.y_obj(5)


# ------------------------------------------------------------------ processes
SPAWN = '''
import sys
from functools import partial
from exp.data_block import *
from exp.fast_batches import fast_dl
def main():
    sd = SplitData.split_by_func(ImageList.from_files(sys.argv[1], tfms=[make_rgb, ResizeFixed(16), to_byte_tensor]), partial(grandparent_splitter, valid_name='val'))
    ll = label_by_func(sd, parent_labeler)
    a, b = (ll.to_databunch(200, num_workers=n, seed=0, make_dl=globals()[sys.argv[2]], **kw) for n, kw in ((2, dict(multiprocessing_context='spawn')), (0, {})))
    assert a.train_dl.num_workers == 2 and all(x.equal(v) and y.equal(w) for (x, y), (v, w) in zip(a.train_dl, b.train_dl, strict=True))
    print('same batches')
if __name__ == '__main__': main()
'''


@pytest.mark.parametrize('loader', ['item_dl', 'fast_dl'])
def test_workers_that_start_by_spawn(loader, sample, tmp_path, data_home):
    (tmp_path/'s.py').write_text(SPAWN)
    r = subprocess.run([sys.executable, tmp_path/'s.py', sample, loader], env={**small_env(data_home), 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=200)
    assert 'same batches' in r.stdout, r.stderr[-2000:]


NO_GUARD = '''
import sys, torch
from exp.data_block import *
torch.multiprocessing.set_start_method(sys.argv[2])
ll = label_by_func(SplitData.split_by_func(ImageList.from_files(sys.argv[1], tfms=[make_rgb, ResizeFixed(16), to_byte_tensor]), grandparent_splitter), parent_labeler)
how = dict(multiprocessing_context=torch.multiprocessing.get_context('spawn')) if sys.argv[3:] else {}
print(len(list(ll.to_databunch(2, num_workers=2, **how).train_dl)), 'batches')
'''


@pytest.mark.parametrize('how', [['spawn'], ['forkserver'], ['fork', 'context']], ids=str)
def test_a_script_without_a_main_guard_goes_without_workers(tmp_path, data_home, how):
    pictures(tmp_path, *(f'{s}/{c}/{i}.png' for s in ('train', 'valid') for c in 'ab' for i in range(2)))
    (tmp_path/'s.py').write_text(NO_GUARD)
    r = subprocess.run([sys.executable, '-Wdefault', tmp_path/'s.py', tmp_path, *how], env={**small_env(data_home), 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=200)
    assert r.stdout == '2 batches\n' and '__main__' in r.stderr and 'Traceback' not in r.stderr, r.stderr


def test_what_would_not_be_found_goes_without_workers(sample, monkeypatch):
    with pytest.warns(UserWarning, match='lambda'):
        data = labelled(sample, [*BYTES, lambda x: x]).to_databunch(200, num_workers=2, multiprocessing_context='spawn')
    assert data.train_dl.num_workers == 0 and len(next(iter(data.train_dl))[0]) == 200
    main = type(sys)('__main__')                                                          # a notebook: no file
    main.T = type('T', (), {'__module__': '__main__', '__call__': lambda self, x: x})
    monkeypatch.setitem(sys.modules, '__main__', main)
    il = ItemList([1], tfms=main.T())
    with pytest.warns(UserWarning): assert D.choose_workers(il, 2, 'spawn') == 0
    assert D.choose_workers(il, 2, 'fork') == 2 == D.choose_workers(ItemList([1]), 2, 'spawn') and D.choose_workers(il, 0, 'spawn') == 0


# ------------------------------------------------------------------ other people's data sets
def test_a_data_set_of_dictionaries():
    "As Hugging Face's are: a list of records, labelled; its own batches are refused with what to do."
    from exp.learner import split_batch
    class Records(ItemList):
        def get(self, item): return item['image']
    records = [{'image': Image.new('RGB', (4, 4), (i, 0, 0)), 'label': i % 2} for i in range(6)]
    ds = LabeledData.label_by_func(Records(records, tfms=to_byte_tensor), lambda r: r['label'], proc_y=CategoryProcessor())
    xb, yb = next(iter(item_dl(ds, 6)))
    assert xb[:, 0, 0, 0].tolist() == [*range(6)] and yb.tolist() == [0, 1]*3
    b = next(iter(DataLoader([{'image': torch.zeros(3), 'label': 1}]*4, 4)))
    with pytest.raises(ValueError, match='inputs, targets'): split_batch(b)
    assert split_batch({'a': torch.zeros(2), 'b': torch.zeros(2)})[1].numel() == 0        # inputs of two names, without targets
