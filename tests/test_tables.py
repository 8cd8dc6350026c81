"""exp.tables: rows that are found, splits that are disjoint and complete, targets there and back."""
import csv

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from exp.data_block import (CategoryProcessor, ImageList, ItemList, LabeledData, ResizeFixed, SplitData, grandparent_splitter, label_by_func,
                            to_byte_tensor)
from exp.datasets import DataError
from exp.tables import (MultiCategoryProcessor, NumberProcessor, RegexLabeler, TableLabeler, default_processor, find_row, k_folds, read_table,
                        split_by_csv, split_by_idx, split_by_names, split_stratified)

WORDS = st.text('abcdefgh/', min_size=1, max_size=8)


@pytest.fixture
def il(tmp_path):
    "a/0.png … b/2.png"
    for i, n in enumerate(f'{c}/{k}.png' for c in 'ab' for k in range(3)):
        (tmp_path/n).parent.mkdir(exist_ok=True)
        Image.new('RGB', (9, 9), (i*37, 9, 60)).save(tmp_path/n)
    return ImageList.from_files(tmp_path)


@pytest.fixture
def table(tmp_path):
    "Row i == 2 of each folder is for validation; labels 'a;0', 'a;1', …"
    with open(tmp_path/'t.csv', 'w', newline='', encoding='utf-8-sig') as f:
        csv.writer(f).writerows([['name', 'is_valid', 'label'], *([f'{c}/{i}.png', i == 2, f'{c}; {i % 2}'] for c in 'ab' for i in range(3))])
    return tmp_path/'t.csv'


def valid(sd): return [o.relative_to(sd.valid.path).as_posix() for o in sd.valid.items]


# ------------------------------------------------------------------ tables
@pytest.mark.parametrize('text, want', [
    ('name,label\na.jpg,cat\nb.jpg,\na.jpg,cat\n', {'a.jpg': 'cat', 'b.jpg': ''}),
    ('name,label\na.jpg,cat\na.jpg,dog\n', DataError), ('name,other\na,b\n', ValueError), ('', ValueError),
    ('name,label\na.jpg,' + 'x'*200_000, DataError), ('name,label\nMüller,x\n'.encode('latin-1'), DataError), (None, DataError)])
def test_two_columns(tmp_path, text, want):
    f = tmp_path/'t.csv'
    if text is not None: f.write_bytes(text if isinstance(text, bytes) else text.encode())
    if isinstance(want, dict): assert read_table(f, 'name', 'label') == want
    else:
        with pytest.raises(want): read_table(f, 'name', 'label')


def test_a_dataframe_is_the_file(table, il):
    pd = pytest.importorskip('pandas')
    for t in (table, pd.read_csv(table)):
        sd = split_by_csv(il, t)
        assert valid(sd) == ['a/2.png', 'b/2.png'] and len(sd.train) == 4
        ll = label_by_func(sd, TableLabeler(t, delim=';'), proc_y=MultiCategoryProcessor())
        assert ll.train.proc_y.vocab == ['0', '1', 'a', 'b'] and ll.train.y[0].tolist() == [1, 0, 1, 0] and ll.valid.y_obj(1) == ['0', 'b']
    for empty in (None, float('nan'), pd.NA):
        assert read_table(pd.DataFrame({'name': ['a', 'b'], 'label': [empty, 'x']}, dtype=object), 'name', 'label') == {'a': '', 'b': 'x'}


@pytest.mark.parametrize('name, hit', [('/x/a/1.jpg', True), ('x/a/1.jpg', True), ('a/1.jpg', True), ('a/1', True), ('1.jpg', True), ('1', True),
                                       ('b/1.jpg', False), ('/1.jpg', False), ('.jpg', False), ('1.jp', False)])
def test_the_row_of_a_file(name, hit): assert find_row({name: 'row'}, '/x/a/1.jpg') == ('row' if hit else None)


def test_the_longer_end_wins_and_a_file_may_have_no_extension():
    assert find_row({'1.jpg': 0, 'a/1.jpg': 1, 'a/1': 2}, 'x/a/1.jpg') == 1 and find_row({'a/README': 3}, 'x/a/README') == 3


# ------------------------------------------------------------------ splits
def test_split_by_names(il):
    assert valid(split_by_names(il, ['a/1.png', 'b/2'])) == ['a/1.png', 'b/2.png'] and valid(split_by_names(il, ['0.png'])) == ['a/0.png', 'b/0.png']
    assert valid(split_by_names(il, [il.items[1]])) == ['a/1.png'] and not set(split_by_names(il, ['1']).train.items) & set(split_by_names(il, ['1']).valid.items)
    with pytest.raises(DataError, match='a/9.png'): split_by_names(il, ['a/1.png', 'a/9.png'])
    text = ItemList(['/x/a/1.jpg', '/x/b/2.jpg'], '/x')
    assert split_by_names(text, ['b/2.jpg']).valid.items == ['/x/b/2.jpg']


@pytest.mark.parametrize('word, side', [*((w, True) for w in ('True', 'true', '1', '1.0', 'yes', ' VALID ', 'val')), *((w, False) for w in ('False', '0', 'no', '', 'train'))])
def test_words_for_validation(tmp_path, word, side):
    (tmp_path/'t.csv').write_text(f'file,part\n1.jpg,{word}\n2.jpg,{"no" if side else "yes"}\n')
    sd = split_by_csv(ItemList(['x/1.jpg', 'x/2.jpg']), tmp_path/'t.csv', 'file', 'part')
    assert (sd.valid if side else sd.train).items == ['x/1.jpg']


def test_a_file_without_a_row(il, table):
    Image.new('L', (9, 9)).save(il.path/'a/9.png')
    with pytest.raises(DataError, match='1 of 7.*a/9.png'): split_by_csv(ImageList.from_files(il.path), table)


@given(names=st.lists(WORDS, unique=True, min_size=2, max_size=50), k=st.integers(2, 8), seed=st.integers(0, 9))
def test_k_folds(names, k, seed):
    if k > len(names):
        with pytest.raises(ValueError): k_folds(ItemList(names), k, seed)
        return
    folds = k_folds(ItemList(names), k, seed)
    assert sorted(o for f in folds for o in f.valid.items) == sorted(names) and all(sorted([*f.train.items, *f.valid.items]) == sorted(names) for f in folds)
    sizes = [len(f.valid) for f in folds]
    assert len(folds) == k and max(sizes) - min(sizes) <= 1
    assert [set(f.valid.items) for f in k_folds(ItemList(names[::-1]), k, seed)] == [set(f.valid.items) for f in folds]
    if len(names) > 20: assert [f.valid.items for f in k_folds(ItemList(names), k, seed + 1)] != [f.valid.items for f in folds]


CLASSES = {0: 'rare', 1: 'rare', **{i: 'lone' for i in (2,)}, **{i: f'c{i % 7}' for i in range(3, 100)}}


@pytest.mark.parametrize('seed', range(20))
def test_every_class_has_its_share(seed):
    "The split by chance leaves the class of two out of validation for most seeds."
    il, of = ItemList([*CLASSES]), CLASSES.get
    def count(items): return {c: sum(of(o) == c for o in items) for c in CLASSES.values()}
    sd, every = split_stratified(il, of, .2, seed), count(il.items)
    assert sorted([*sd.train.items, *sd.valid.items]) == il.items and count(sd.valid.items) == {**{f'c{i}': 3 for i in range(7)}, 'rare': 1, 'lone': 0}
    assert {*split_stratified(il.new(il.items[::-1]), of, .2, seed).valid.items} == {*sd.valid.items} != {*split_stratified(il, of, .2, seed + 1).valid.items}
    folds = k_folds(il, 5, seed, by=of)
    assert sorted(o for f in folds for o in f.valid.items) == il.items and {len(f.valid) for f in folds} == {20}
    for f in folds: assert all(abs(n - every[c]/5) < 1 for c, n in count(f.valid.items).items())


def test_split_by_places(il):
    assert valid(split_by_idx(il, [1, -1])) == ['a/1.png', 'b/2.png'] == valid(split_by_idx(il, np.array([5, 1, 1]))) and len(split_by_idx(il, {0}).train) == 5
    pytest.raises(IndexError, split_by_idx, il, [6])
    for bad in ([], range(6)): pytest.raises(DataError, split_by_idx, il, bad)
    for bad in (0, 1): pytest.raises(ValueError, split_stratified, il, str, bad)


def test_folds_of_items_without_a_name():
    "torch abbreviates what it prints, so all large tensors had one name; a picture's text holds its address."
    x = torch.zeros(300, 1, 40, 40)
    ims = [Image.new('RGB', (4, 4)) for _ in range(300)]
    a, b = ([i for i, o in enumerate(items) if any(o is v for v in k_folds(ItemList(items), 3)[0].valid.items)] for items in (list(x), ims))
    assert a == b and len(a) == 100


# ------------------------------------------------------------------ labels
def test_labelers(table):
    lab = RegexLabeler(r'([a-z]+)_\d+\.')
    assert lab('x/cat_12.jpg') == 'cat' and lab('x/12.jpg') is None
    assert TableLabeler(table)('b/1.png') == 'b; 1' and TableLabeler(table, delim=';')('b/1.png') == ['b', '1'] and TableLabeler(table)('b/7.png') is None
    with pytest.raises(ValueError): TableLabeler(table, label_col='labels')
    sd = SplitData.split_by_func(ItemList(['train/a/1', 'train/b/2', 'valid/a/3']), grandparent_splitter)
    with pytest.raises(DataError, match='1 of 2.*train/b/2'): label_by_func(sd, RegexLabeler('/(a)/'))


# ------------------------------------------------------------------ processors
@given(st.lists(st.lists(st.sampled_from('abcdef'), unique=True), min_size=1, max_size=20))
def test_several_labels_there_and_back(train):
    p = MultiCategoryProcessor()
    ys = p(train)
    assert p.deprocess(ys) == [sorted(t) for t in train] and p.vocab == sorted({l for t in train for l in t})
    assert all(y.dtype == torch.float32 and y.sum() == len(t) for y, t in zip(ys, train))
    scores = torch.linspace(-2, 2, len(p.vocab))
    said, probs = p.decode(scores)
    assert said == [v for v, s in zip(p.vocab, scores) if s > 0] and torch.allclose(probs, 1/(1 + (-scores).exp()))


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=3, max_size=20, unique_by=(lambda t: round(t[0]), lambda t: round(t[1]))))
def test_numbers_there_and_back(train):
    for p in (NumberProcessor(), NumberProcessor(standardise=True)):
        ys = p([list(t) for t in train])
        assert np.allclose(p.deprocess(ys), train, rtol=1e-4, atol=1e-2) and ys[0].dtype == torch.float32
        assert np.allclose(p.decode(ys[0])[0], train[0], rtol=1e-4, atol=1e-2) and p.decode(ys[0])[1] is ys[0]
    assert torch.stack(ys).mean(0).abs().max() < 1e-3 and (torch.stack(ys).std(0, correction=0) - 1).abs().max() < 1e-3


def test_one_number_comes_back_as_one():
    p = NumberProcessor(standardise=True)
    y = p([1000, 2000, 4000])[2]
    assert p.deproc1(y) == pytest.approx(4000, rel=1e-5) and p.decode(y.view(1))[0] == pytest.approx(4000, rel=1e-5) and p.proc1(2333.3333).abs() < 1e-3


@pytest.mark.parametrize('proc, train, bad', [
    (MultiCategoryProcessor, [['a'], ['b']], 'a'), (MultiCategoryProcessor, [['a'], ['b']], ['c']), (MultiCategoryProcessor, [['a'], ['b']], 3),
    (NumberProcessor, [1., 2.], 'x'), (NumberProcessor, [1., 2.], None), (NumberProcessor, [1., 2.], float('nan')), (NumberProcessor, [[1., 2.]], [1., float('inf')]),
    (NumberProcessor, [[1., 2.]], [1., 'x']), (MultiCategoryProcessor, ['cat dog'], []), (lambda: NumberProcessor(standardise=True), [[1, 2], [1, 3]], 1)])
def test_targets_that_are_refused(proc, train, bad):
    with pytest.raises(DataError):
        p = proc()
        p(train)
        p.proc1(bad)


def test_a_refused_target_names_its_file():
    with pytest.raises(DataError, match='1 of 3.*— c'): LabeledData(ItemList(['a', 'b', 'c']), [1., 2., float('nan')], proc_y=NumberProcessor())


C, M, N = CategoryProcessor, MultiCategoryProcessor, NumberProcessor


@pytest.mark.parametrize('labels, kind', [
    (['a', 'b'], C), ([1, 2], C), ([np.int64(3), 9], C), ([['a'], []], M), ([(), ('a',)], M), ([{'a'}], M), ([np.array(['a', 'b'])], M),
    ([.5, 2], N), ([0]*200 + [.5], N), ([1, .14], N), ([np.float32(1.5), np.float32(2)], N), ([torch.tensor(.5)], N), ([[1, 2]], N), ([np.array([1, .5])], N),
    ([torch.tensor([1, 2])], N), (['a', .5], C)], ids=str)
def test_the_processor_by_the_look_of_the_labels(labels, kind): assert type(default_processor(labels)) is kind


@pytest.mark.parametrize('f, proc, c_out, shape, words', [(lambda i: ['x'] if i % 2 else ['x', 'y'], M, 2, (2, 2), ['x']), (lambda i: ['x'][:i % 2], M, 1, (2, 1), ['x']),
                                                          (float, N, 1, (2,), 1.), (lambda i: [i, .5], N, 2, (2, 2), [1., .5])])
def test_targets_in_a_batch(il, f, proc, c_out, shape, words):
    il.tfms = [ResizeFixed(8), to_byte_tensor]
    ll = label_by_func(split_by_names(il, ['2']), lambda fn: f(int(fn.stem)), proc_y=proc())
    data = ll.to_databunch(2, num_workers=0, seed=0)
    yb = next(iter(data.train_dl))[1]
    assert yb.dtype == torch.float32 and yb.shape == shape and data.c_out == c_out and ll.train.y_obj(1) == words
