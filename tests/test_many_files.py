"""exp.many_files: the same files as get_files, in little room, and a list of paths for all that the chain does with one."""
import os
import pickle
from functools import partial

import numpy as np
import pytest

from exp.data_block import ImageList, ItemList, ResizeFixed, SplitData, get_files, item_key, label_by_func, make_rgb, parent_labeler, to_byte_tensor
from exp.datasets import DataError, URLs, untar_data
from exp.many_files import PathList, list_files

BYTES = [make_rgb, ResizeFixed(32), to_byte_tensor]


@pytest.fixture(scope='module')
def sample(data_home): return untar_data(URLs.SAMPLE, base=data_home/'data')


def test_the_same_files_as_get_files(sample):
    files = list_files(sample)
    assert list(files) == get_files(sample, '.jpeg', recurse=True) and len(files) == 1100
    assert len(list_files(sample, include=['val'])) == 300 == len(list_files(sample, ['JPEG'], include=['val'])) and not len(list_files(sample, ['.png']))
    a, b = ImageList(files, files.root, BYTES), ImageList.from_files(sample, tfms=BYTES)
    assert a[7].equal(b[7]) and [item_key(a, i) for i in (0, -1)] == [item_key(b, i) for i in (0, -1)] and [p.name for p in a.items[3:5]] == [p.name for p in b.items[3:5]]
    (x, y), (v, w) = (sides(il) for il in (a, b))
    assert x == v and y == w


def sides(il):
    sd = label_by_func(SplitData.split_by_random(il, .2, 1), parent_labeler)
    return [list(s.x.items) for s in (sd.train, sd.valid)], [s.y.items.tolist() for s in (sd.train, sd.valid)]


def test_dots_links_endings_and_missing_folders(tmp_path):
    here = tmp_path/'x'
    for n in ('x/b/2.PNG', 'x/a/.hid.png', 'x/a/1.png', 'x/.dot/3.png', 'x/0.png', 'x/a/n.txt.png', 'x/a/b.c/none', 'other/9.png'):
        (tmp_path/n).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/n).touch()
    try:
        for link, to in (('a/up', here), ('c', tmp_path/'other'), ('self', here/'self'), ('b/to_a', here/'a'), ('a/to_b', here/'b')): (here/link).symlink_to(to)
    except OSError: pytest.skip('no links here')
    def names(*args, **kw): return [item_key(ItemList([p], here), 0) for p in list_files(here, *args, **kw)]
    assert names() == ['0.png', 'a/1.png', 'a/n.txt.png', 'a/to_b/2.PNG', 'c/9.png'] == [item_key(ItemList([p], here), 0) for p in get_files(here, ['.png'], recurse=True)]
    assert 'a/b.c/none' in names(None) and names(['png'], include='b')[0] == 'b/2.PNG' and names(include=['b', 'a'])[0] == 'b/2.PNG' and not names(['.gif'])
    for bad in (partial(list_files, tmp_path/'nope'), partial(list_files, here, include=['nope'])):
        with pytest.raises(DataError, match='nope'): bad()


def test_pathlist_is_a_list_of_paths(tmp_path):
    names = ['b/ä.jpg', 'a.jpg', 'c/d/e.png', os.fsdecode(b'odd\xff.jpg')]
    p = PathList(tmp_path, names)
    assert list(p) == [tmp_path/n for n in names] and p[-1] == tmp_path/names[-1] and p[1:3] == [tmp_path/n for n in names[1:3]]
    assert p[[2, 0]] == [tmp_path/names[2], tmp_path/names[0]] and p[[2, 0]][1:][0] == tmp_path/names[0] and p[::-1][0] == p[3]
    assert len(p[[]]) == 0 == len(PathList(tmp_path, [])) and list(pickle.loads(pickle.dumps(p[1:]))) == list(p)[1:] and p[np.array([True, False, False, True])] == [p[0], p[3]]
    for i in (4, -5):
        with pytest.raises(IndexError): p[i]


def test_names_take_little_room():
    p = PathList('/x', [f'train/n{i % 1000:08d}/n{i % 1000:08d}_{i:05d}.JPEG' for i in range(20_000)])
    ll = label_by_func(SplitData.split_by_random(ImageList(p, '/x')), parent_labeler)
    assert len(pickle.dumps(ll)) < 60*20_000 and isinstance(ll.train.x.items, PathList)
