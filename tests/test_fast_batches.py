"""exp.fast_batches: batches that are their items, an order that is the seed's alone, workers, broken files, memory."""
import copy
import gc
import pickle
import random
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from exp import fast_batches as F
from exp.data_block import (ImageList, ItemList, LabeledData, NormalizeBytes, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb,
                            parent_labeler, to_byte_tensor, to_float_tensor)
from exp.datasets import DataError, URLs, untar_data
from exp.fast_batches import EpochOrder, ItemLoader, fast_dl, in_memory, load_batch

BYTES = [make_rgb, ResizeFixed(32), to_byte_tensor]


@pytest.fixture(scope='module')
def sample(data_home): return untar_data(URLs.SAMPLE, base=data_home/'data')


@pytest.fixture
def ll(sample): return labelled(sample, BYTES, 10)


def labelled(path, tfms, every=1):
    "80 and 30 pictures of the sample, with `every` 10."
    il = ImageList.from_files(path, tfms=tfms)
    return label_by_func(SplitData.split_by_func(il.new(il.items[::every]), partial(grandparent_splitter, valid_name='val')), parent_labeler)


def pictures(root, *names, size=(40, 30)):
    "Small pictures, each of its own colour, at `names` below `root`."
    for i, n in enumerate(names):
        (root/n).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', size, (i*37 % 256, i*91 % 256, 60)).save(root/n)
    return root


def folders(root, n=6, broken=()):
    "train and val with classes a and b of `n` pictures, of which some are none."
    pictures(root, *(f'{s}/{c}/{i}.png' for s in ('train', 'val') for c in 'ab' for i in range(n)))
    for f in broken: (root/f).write_bytes(b'x')
    return labelled(root, BYTES)


def bunch(sd, bs, **kw): return sd.to_databunch(bs, make_dl=fast_dl, **{'num_workers': 0, 'seed': 0, **kw})


def labels(dl): return torch.cat([y for _, y in dl]).tolist()


def same(a, b): return all(x.equal(v) and y.equal(w) for (x, y), (v, w) in zip(a, b, strict=True))


# ------------------------------------------------------------------ batches
@pytest.mark.parametrize('last', [[], [to_float_tensor]])
def test_a_batch_is_its_items(tmp_path, last):
    rng = np.random.default_rng(0)
    for i, (w, h, c) in enumerate([(90, 60, 3), (90, 60, 3), (60, 90, 3), (90, 60, 1), (90, 60, 4), (33, 200, 3), (90, 60, 3)]):
        Image.fromarray(rng.integers(0, 256, (h, w, c), dtype=np.uint8).squeeze()).save(tmp_path/f'{i}.png')
    for first in ([make_rgb], []):
        il = ImageList.from_files(tmp_path, tfms=[*last, to_byte_tensor, ResizeFixed((40, 24)), *first])          # in any order
        idxs = [5, 2, 6, 0, 4, 3] if first else [1, 5, 2]
        xb, kept, bad = load_batch(il, idxs)
        assert kept == idxs and not bad and xb.equal(torch.stack([il[i] for i in idxs])) and xb.shape[2:] == (24, 40)
        assert xb.is_contiguous(memory_format=torch.channels_last)
    assert load_batch(il, [4])[0].equal(il[4][None]) and load_batch(il, [3])[0].shape == (1, 1, 24, 40)           # RGBA by Pillow, grey
    with pytest.raises(DataError, match='(?s)3.png.*0.png'): load_batch(il, [0, 3])


def test_other_rows_of_transforms(sample):
    def mine(x): return x.float().mean((1, 2))
    mine._order = 40
    for tfms in ([], [to_byte_tensor], [*BYTES, mine], [*BYTES, to_float_tensor, mine], [ResizeFixed(32), to_byte_tensor]):
        il = ImageList.from_files(sample, tfms=tfms)
        idxs = [0, 400][:len(tfms)]                                             # as they are, they have several sizes
        assert all(x.equal(il[i]) for i, x in zip(idxs, load_batch(il, idxs)[0]))
    numbers = ItemList([1., 2., 3.])
    assert load_batch(numbers, [2, 0])[0].tolist() == [3, 1]


class Jitter:
    "Adds one number to the picture."
    _order, generator = 25, None
    def __call__(self, x): return x.float() + torch.rand((), generator=self.generator)


@pytest.fixture
def jittered(sample): return labelled(sample, [make_rgb, ResizeFixed(8), to_byte_tensor, Jitter()], 10)


def test_draws_go_by_picture_and_epoch_whatever_the_workers(jittered):
    def draws(nw, seed=1):
        dl = bunch(jittered, 10, num_workers=nw, seed=seed).train_dl
        return [torch.cat([x.flatten(1)[:, 0] % 1 for x, _ in dl]) for _ in range(2)]
    one, two = draws(0)
    assert len(one.mul(1e4).round().unique()) > 70 and not one.equal(two) and not draws(0, 2)[0].equal(one)
    assert all(a.equal(b) for a, b in zip((one, two), draws(2)))
    dl = bunch(jittered, 10).valid_dl
    assert same(list(dl), list(dl)), 'validation draws the same in every epoch'


def test_generators_are_put_back_also_after_an_error(jittered):
    t, g = jittered.train.x.tfms[-1], torch.Generator()
    t.generator = g
    load_batch(jittered.train.x, [0], seed=3)
    assert t.generator is g
    def fails(x): raise DataError('no')
    fails._order = 30
    jittered.train.x.tfms = [*jittered.train.x.tfms, fails]
    with pytest.raises(Exception, match='no'): load_batch(jittered.train.x, [0], seed=3)
    assert t.generator is g


def test_no_draw_is_that_of_the_next_item_and_the_seed_before():
    il = ItemList([torch.zeros(1)]*2, tfms=Jitter())
    assert not load_batch(il, [1], seed=0)[0].equal(load_batch(il, [0], seed=1)[0])


# ------------------------------------------------------------------ the order
def test_order_is_a_function_of_seed_and_epoch(ll):
    kept = in_memory(ll)

    def epochs(seed):
        dl = bunch(kept, 10, seed=seed).train_dl
        return [labels(dl) for _ in range(2)], dl
    (a, b), dl = epochs(3)
    assert a != b and sorted(a) == sorted(b) == sorted(ll.train.y.items.tolist()) and epochs(3)[0] == [a, b] and epochs(4)[0][0] != a
    dl.epoch = 1
    assert labels(dl) == b                                                       # picked up where it was, without running the first
    dl.epoch, dl.sampler.skip = 1, 3
    assert labels(dl) == b[30:] and dl.epoch == 2 and len(labels(dl)) == 80
    with torch.random.fork_rng():
        torch.manual_seed(5)
        c = labels(ItemLoader(kept.valid, 64, shuffle=True))
        torch.manual_seed(5)
        assert c == labels(ItemLoader(kept.valid, 64, shuffle=True)) != labels(ItemLoader(kept.valid, 64, shuffle=True))


def test_the_order_of_older_versions():
    "Who goes on with an old checkpoint, or repeats an old figure, wants this order and no other."
    order = EpochOrder(10, 4, shuffle=True, seed=0)
    assert [[i.tolist() for _, i in order] for _ in range(2)] == [[[6, 7, 5, 2], [8, 3, 4, 1], [9, 0]], [[3, 4, 5, 8], [7, 2, 9, 0], [6, 1]]]


def test_drop_last_and_each_once(ll):
    data = bunch(ll, 32, drop_last=True)
    assert [len(y) for _, y in data.train_dl] == [32]*2 and len(data.train_dl) == 2 and sum(len(y) for _, y in data.valid_dl) == 30
    data.train_dl.epoch = 0
    assert all(a.equal(b) for (a, _), (b, _) in zip(data.train_dl, bunch(ll, 32).train_dl))
    once = data.train_dl.each_once()
    assert labels(once) == ll.train.y.items.tolist() == labels(once) and data.valid_dl.each_once() is data.valid_dl and data.train_dl.epoch == 1


@pytest.mark.parametrize('kw, kind', [(dict(bs=0), ValueError), (dict(bs=4, on_error='maybe'), ValueError), (dict(bs=81, drop_last=True), DataError)])
def test_wrong_arguments(ll, kw, kind):
    with pytest.raises(kind): ItemLoader(ll.train, **kw)


# ------------------------------------------------------------------ workers
class Frozen(ItemList):
    def get(self, i): return torch.tensor(gc.get_freeze_count())


def test_workers_leave_alone_what_came_from_the_parent():
    assert next(iter(ItemLoader(Frozen([0, 1]), 1, num_workers=1))) > 1000 and not gc.get_freeze_count()


class Drawn:
    "A random transform that asks the global generators, as other people's do."
    def __call__(self, x): return torch.tensor([x, torch.rand(()).item(), np.random.rand(), random.random()])


def numbers(n=12): return ItemList([float(i) for i in range(n)], tfms=Drawn())


def test_global_draws_in_workers_follow_the_seed():
    def draws(seed): return torch.cat(list(ItemLoader(numbers(), 3, seed=seed, num_workers=2)))
    a, b, again = draws(1), draws(2), draws(1)
    assert a.equal(again) and (a[:, 1] != b[:, 1]).all() and a[:, 0].equal(b[:, 0]) and draws(-3).isfinite().all()


@pytest.mark.parametrize('nw', [0, 2])
def test_two_passes_over_one_loader_at_once(nw):
    dl = ItemLoader(numbers(), 2, seed=0, num_workers=nw)
    def firsts(bs): return torch.cat(list(bs))[:, 0].tolist()
    want, seen, inner = [float(i) for i in range(12)], [], []
    for i, b in enumerate(dl):
        seen.append(b)
        if i in (1, 2): inner.append(firsts(dl))
    assert firsts(seen) == want and inner == [want]*2 and [firsts(p) for p in zip(*zip(dl, dl))] == [want]*2
    kept = dl._iterator
    for _ in dl: break                                                          # given up: not open any more
    it = iter(dl)
    next(it)
    it.close()
    assert firsts(dl) == want and dl._iterator is kept and (not nw or kept is not None)


@pytest.mark.parametrize('nw', [0, 1])
def test_workers_that_stay_notice_what_was_changed(ll, nw):
    "They trained at 16 px, and one looked at 32."
    data = bunch(ll, 40, num_workers=nw)
    def side(dl): return next(iter(dl))[0].shape[-1]
    assert side(data.train_dl) == 32
    data.source.train.x.tfms = [make_rgb, ResizeFixed(16), to_byte_tensor]
    assert side(data.train_dl) == 16 == data.train_dl.first()[0].shape[-1] and side(data.valid_dl) == 32
    data.source.train.x.tfms[1].size = (8, 8)                                   # inside a transform
    assert side(data.train_dl) == 8
    data.source.valid.y.items = data.source.valid.y.items + 5
    assert labels(data.valid_dl) == data.source.valid.y.items.tolist()
    stay = data.train_dl._iterator
    assert side(data.train_dl) == 8 and data.train_dl._iterator is stay, 'nothing was changed'


@pytest.mark.parametrize('nw', [0, 2])
def test_copies_and_pickles_begin_anew(ll, nw):
    dl = ItemLoader(ll.valid, 6, seed=0, num_workers=nw)
    it = iter(dl)
    next(it)
    for again in (copy.copy(dl), copy.deepcopy(dl), pickle.loads(pickle.dumps(dl))): assert labels(again) == ll.valid.y.items.tolist()
    assert len(list(it)) == 4


@pytest.mark.parametrize('kw', [dict(prefetch_factor=4), dict(persistent_workers=True), dict(timeout=5)], ids=str)
def test_options_of_workers_do_no_harm_without_them(ll, kw): assert len(fast_dl(ll.valid, 16, **kw).first()[0]) == 16


# ------------------------------------------------------------------ broken files
@pytest.mark.parametrize('nw', [0, 2])
def test_bad_files_are_skipped_counted_and_listed(tmp_path, nw):
    sd = folders(tmp_path, broken=('train/a/3.png', 'train/b/0.png', 'val/a/1.png'))
    data = bunch(sd, 4, num_workers=nw, on_error='skip')
    with pytest.warns(UserWarning, match='2 of 12 pictures .*train/'): n = sum(len(xb) for xb, _ in data.train_dl)
    assert n == 10 and {Path(f).relative_to(tmp_path).as_posix() for f in data.train_dl.skipped} == {'train/a/3.png', 'train/b/0.png'}
    with warnings.catch_warnings():
        warnings.simplefilter('error')                                          # listed once, not in every epoch
        assert sum(len(xb) for xb, _ in data.train_dl) == 10
    with pytest.raises(DataError, match=r'^\S*train/(a/3|b/0).png: no readable picture'): list(bunch(sd, 4, num_workers=nw).train_dl)
    (xb, kept, bad), x = load_batch(sd.valid.x, [0, 1, 2], on_error='skip'), sd.valid.x
    assert kept == [0, 2] and xb.equal(torch.stack(x[[0, 2]])) and [str(x.items[1])] == list(bad) and not bad[str(x.items[1])].startswith(str(tmp_path))
    assert load_batch(x, [1], on_error='skip')[1] == []


def test_odd_names_spoil_no_message(tmp_path):
    for name in ('x\ny.jpg', 'a: b.jpg'):
        (tmp_path/name).write_bytes(b'no picture')
        for nw in (0, 1):
            with pytest.raises(DataError) as e: list(ItemLoader(ImageList([tmp_path/name], tmp_path, BYTES), 2, num_workers=nw))
            assert str(e.value).startswith(f'{tmp_path/name}: no readable picture'), nw


def test_a_test_set(ll, sample, tmp_path):
    test = ImageList(ll.valid.x.items, sample)
    data = bunch(ll.add_test(test), 64)
    assert torch.cat(list(data.test_dl)).equal(torch.cat([x for x, _ in data.valid_dl]))
    (tmp_path/'a.jpg').write_bytes(b'x')
    with pytest.raises(DataError, match='a.jpg'): list(bunch(ll.add_test(ImageList.from_files(tmp_path)), 8, on_error='skip').test_dl)


# ------------------------------------------------------------------ in memory
def test_memory_and_files_give_the_same_batches(ll):
    kept = in_memory(ll)
    m, f = (bunch(sd, 64, num_workers=n) for sd, n in ((kept, 2), (ll, 0)))
    assert same(list(m.train_dl), list(f.train_dl)) and same(m.valid_dl, f.valid_dl) and m.train_dl.first()[0].is_contiguous(memory_format=torch.channels_last)
    assert kept.train.x.items.dtype == torch.uint8 and (m.c_in, m.c_out) == (3, 10) and m.train_dl.num_workers == 0 and m.source is ll and m.train_ds is kept.train
    assert m.item(ll.valid.x.items[3]).equal(ll.valid[3][0]) and m.classes == f.classes
    assert NormalizeBytes.fit(m.train_ds, 50).mean.equal(NormalizeBytes.fit(f.train_ds, 50).mean)


def test_the_limit(ll):
    need = 3*32*32*110
    assert in_memory(ll, need - 1) is ll and in_memory(ll, need) is not ll


def test_bad_files_in_memory(tmp_path):
    sd, seen = folders(tmp_path, 40, ('train/a/0.png', 'train/b/9.png')), []
    with pytest.raises(DataError, match='train/a/0.png'): in_memory(sd)
    kept = in_memory(sd, on_error='skip', progress=lambda *n: seen.append(n))
    assert len(kept.train) == 78 and kept.train.y.items.tolist() == [0]*39 + [1]*39 and kept.train[0][0].equal(sd.train[1][0]) and kept.train[-1][0].equal(sd.train[-2][0])
    assert [Path(f).name for f in kept.train.skipped] == ['0.png', '9.png'] and (80, 80) in seen and seen[0][0] < 80
    data = bunch(kept, 16)
    assert len(data.train_dl.skipped) == 2 and len(labels(data.train_dl)) == 78
    for f in tmp_path.rglob('*.png'): f.write_bytes(b'x')
    with pytest.raises(DataError, match='80'): F.decode_side(sd.train, 'skip')


@pytest.mark.parametrize('draw', [random.random, np.random.rand, lambda: torch.rand(()).item(), lambda: torch.rand(()).item() > 2, lambda: random.random() > 2])
def test_a_random_transform_is_never_frozen(sample, draw):
    def tfm(x): return x.float() + draw()
    tfm._order = 25
    sd = labelled(sample, [make_rgb, ResizeFixed(8), to_byte_tensor, tfm], 10)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(ValueError): in_memory(sd)
    assert in_memory(sd, 1e9) is sd
    assert torch.get_rng_state().equal(state[0]) and random.getstate() == state[1] and np.array_equal(np.random.get_state()[1], state[2])


def test_a_random_transform_of_one_side(jittered, ll):
    for sd in (SplitData(jittered.train, ll.valid), SplitData(ll.train, jittered.valid)):
        with pytest.raises(ValueError): in_memory(sd)


def test_transforms_changed_after_decoding_are_refused(ll):
    "One trained on what was decoded, and looked at something else."
    data = bunch(in_memory(ll), 64)
    list(data.train_dl)
    data.source.train.x.tfms = [make_rgb, ResizeFixed(16), to_byte_tensor]
    with pytest.raises(ValueError, match='in_memory'): list(data.train_dl)
    assert len(labels(data.valid_dl)) == 30


def test_pictures_of_another_shape_in_memory(tmp_path):
    names = [f'train/{c}/{i:03d}.png' for c in 'ab' for i in range(20)] + ['val/a/0.png', 'val/b/0.png']
    pictures(tmp_path, *names)
    for i in range(20): Image.new('L', (40, 30)).save(tmp_path/f'train/b/{i:03d}.png')            # a chunk in colour, then a grey one
    with pytest.raises(DataError, match='train/b/000.png'): in_memory(labelled(tmp_path, [ResizeFixed(16), to_byte_tensor]))


def test_targets_that_are_no_tensor_and_items_that_are_no_pictures(ll):
    sd = label_by_func(SplitData(ll.train.x, ll.valid.x), parent_labeler, proc_y=[])
    kept = F.decode_side(sd.valid)
    xb, yb = next(iter(ItemLoader(kept, 4)))
    assert len(xb) == 4 and list(yb) == [parent_labeler(f) for f in ll.valid.x.items[:4]]
    rows = F.decode_side(LabeledData(ItemList(list(torch.arange(12.).view(4, 3))), [0, 1, 0, 1]))
    assert rows.x.items.tolist() == torch.arange(12.).view(4, 3).tolist()


# ------------------------------------------------------------------ looking
def test_a_look_at_a_batch_draws_nothing(jittered, sample):
    import matplotlib
    matplotlib.use('agg')

    def shifted(x): return x.float() + random.random() + torch.rand(()) + np.random.rand()
    shifted._order = 25
    for sd in (jittered, labelled(sample, [make_rgb, ResizeFixed(8), to_byte_tensor, shifted], 10)):
        data = bunch(sd, 8)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        data.show_batch()
        repr(data)
        x = data.train_dl.first()[0]
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before and data.train_dl.epoch == 0
    data = bunch(jittered, 8)
    assert data.train_dl.first()[0].equal(next(iter(data.train_dl))[0]) and len(x) == 8
