"""Looking at a trained model: every number against a loop or a formula of its own, a look that leaves no trace, a command that meets bad files, an export that gives the same."""
import copy
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, small_env, wants_sigint
from PIL import Image
from torch import nn

from exp import interpret as I
from exp.batchnorm import BatchNorm, RunningBatchNorm, conv_layer
from exp.callbacks import AvgStatsCallback, BatchTransformXCallback, Callback, CudaCallback, DataBunch, Dataset, accuracy, get_dls
from exp.files import write_file
from exp.convnets import GeneralRelu, Lambda, flatten
from exp.data_block import (ImageList, NormalizeBytes, ResizeFixed, SplitData, grandparent_splitter, item_dl, label_by_func, make_rgb,
                            parent_labeler, to_byte_tensor, to_float_tensor)
from exp.fast_batches import ItemLoader, fast_dl, in_memory
from exp.tables import default_processor
from exp.interpret import IMAGENETTE_NAMES, Interpretation, cam, item_losses, overlay, readable, to_exported_program, to_onnx
from exp.export_models import export, load_learner
from exp.learner import Learner
from exp.mixup import LabelSmoothing

COLOURS = {'n01440764': (200, 30, 30), 'n03028079': (30, 200, 30), 'zebra': (30, 30, 200)}


def picture(colour, seed, size=(24, 20)):
    "A picture of noise around one colour."
    a = np.random.default_rng(seed).integers(-30, 30, (size[1], size[0], 3)) + np.array(colour)
    return Image.fromarray(a.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d, n = tmp_path_factory.mktemp('pictures'), 0
    for side, k in (('train', 8), ('val', 5)):
        for c, colour in COLOURS.items():
            (d/side/c).mkdir(parents=True)
            for i in range(k): picture(colour, n := n + 1).save(d/side/c/f'{i}.png')
    return d


def items(folder):
    return label_by_func(SplitData.split_by_func(ImageList.from_files(folder, tfms=[make_rgb, ResizeFixed(16), to_byte_tensor]), partial(grandparent_splitter, valid_name='val')), parent_labeler)


def net(c_out=3, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(conv_layer(3, 6, norm=norm), conv_layer(6, 8, stride=1, norm=norm), nn.AdaptiveAvgPool2d(1), Lambda(flatten), nn.Dropout(.5), nn.Linear(8, c_out))


def learner(folder, epochs=4, kept=False, make_dl=fast_dl, **kw):
    sd = items(folder)
    data = (in_memory(sd, **kw) if kept else sd).to_databunch(8, seed=0, num_workers=0, make_dl=make_dl, **kw)
    cbs = [CudaCallback('cpu'), BatchTransformXCallback(NormalizeBytes([.4]*3, [.3]*3)), AvgStatsCallback(accuracy, silent=True)]
    return Learner(net(), data, F.cross_entropy, lr=.05, cbs=cbs).fit(epochs)


@pytest.fixture(scope='module')
def learn(folder): return learner(folder)


@pytest.fixture(scope='module')
def model(folder, learn, tmp_path_factory): return export(learn, tmp_path_factory.mktemp('model')/'m.pt')


def random_interp(n=400, c=7, seed=0, **kw):
    g = torch.Generator().manual_seed(seed)
    t = torch.randint(0, c, (n,), generator=g)
    return Interpretation(torch.randn(n, c, generator=g)*2 + 2*F.one_hot(t, c), t, **kw)


# ---------------------------------------------------------------- numbers, each against a loop


def test_names():
    assert len(IMAGENETTE_NAMES) == 20 == len(set(IMAGENETTE_NAMES.values()))
    assert readable('n01440764') == 'tench' and readable('n02115641') == 'dingo' and readable('cat') == 'cat' and readable(3) == '3'
    assert readable(['n01440764', 'cat']) == 'tench + cat' and readable([]) == 'none'


def test_confusion_and_what_follows_from_it():
    it = random_interp(vocab=list('abcdefg'))
    p, t = it.preds.numpy(), it.targets.numpy()
    naive = np.zeros((7, 7), int)
    for row, true in zip(p, t): naive[true, max(range(7), key=lambda j: row[j])] += 1
    cm = it.confusion_matrix()
    assert cm.dtype == torch.int64 and (cm.numpy() == naive).all() and not (naive == naive.T).all()
    table, losses = it.per_class(), it.losses.double().numpy()
    for k, row in enumerate(table):
        tp, fn, fp = naive[k, k], naive[k].sum() - naive[k, k], naive[:, k].sum() - naive[k, k]
        assert row['class'] == 'abcdefg'[k] and row['pictures'] == (t == k).sum()
        assert np.allclose([row['recall'], row['precision'], row['F1'], row['loss']], [tp/(tp + fn), tp/(tp + fp), 2*tp/(2*tp + fp + fn), losses[t == k].mean()])
    want = sorted(((naive[i, j], i, j) for i in range(7) for j in range(7) if i != j and naive[i, j] >= 4), key=lambda r: (-r[0], r[1], r[2]))
    assert it.most_confused(4) == [('abcdefg'[i], 'abcdefg'[j], n) for n, i, j in want] and 0 < len(want) < 42
    assert len(it.most_confused(0)) == (naive - np.diag(np.diag(naive)) > 0).sum(), 'a pair that was never confused is not confused'


def test_scores_that_are_no_numbers_are_no_class():
    "NaN rows used to be class 0, and perfectly calibrated. Minus infinity is a score: it says impossible."
    preds, t = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    bad = preds.clone(); bad[1, 2], bad[4], bad[5, 0] = float('nan'), float('-inf'), float('inf')
    it = Interpretation(bad, t, losses=torch.zeros(6))
    for ask in (it.confusion_matrix, it.calibration, it.per_class, it.most_confused):
        with pytest.raises(ValueError, match='3 of 6 rows of scores'): ask()
    preds[0, 1] = float('-inf')
    assert Interpretation(preds, t, losses=torch.zeros(6)).confusion_matrix().sum() == 6


def test_table_prints():
    it = Interpretation(torch.tensor([[2., 0, 0], [0, 2, 0]]), torch.tensor([0, 0]), vocab=['n01440764', 'b', 'c'])
    lines = repr(it.per_class()).splitlines()
    assert len({len(l) for l in lines}) == 1 and lines[0].split() == ['class', 'pictures', 'recall', 'precision', 'F1', 'loss']
    assert lines[1].split()[:4] == ['tench', '2', '0.500', '1.000'] and lines[3].split() == ['c', '0', '–', '–', '–', '–'] and lines[2].split()[:4] == ['b', '0', '–', '0.000']


@pytest.mark.parametrize('loss', [F.cross_entropy, nn.CrossEntropyLoss(reduction='sum'), nn.CrossEntropyLoss(reduction='none'),
                                  partial(F.cross_entropy, label_smoothing=.1), nn.CrossEntropyLoss(label_smoothing=.1),
                                  lambda p, y: (-p.log_softmax(1)[torch.arange(len(y)), y]).mean()], ids=range(6))
def test_losses_of_items(loss):
    it = random_interp(20, 4)
    smooth = .1 if getattr(loss, 'label_smoothing', 0) or isinstance(loss, partial) else 0
    before = repr(vars(loss)) if isinstance(loss, nn.Module) else None
    got = item_losses(loss, it.preds, it.targets)
    for row, t, l in zip(it.preds.double().numpy(), it.targets, got):
        logp = row - np.log(np.exp(row).sum())
        assert abs(-(1 - smooth)*logp[t] - smooth*logp.mean() - l.item()) < 1e-5
    assert before is None or repr(vars(loss)) == before, 'the loss was changed'


def test_top_losses():
    it = random_interp(50)
    losses, idx = it.top_losses(5)
    order = sorted(range(50), key=lambda i: -it.losses[i].item())
    assert idx.tolist() == order[:5] and losses.tolist() == it.losses[order[:5]].tolist()
    assert it.top_losses(3, largest=False)[1].tolist() == order[::-1][:3] and len(it.top_losses()[0]) == 50
    it.losses[7] = float('nan')
    assert it.top_losses(1)[1].tolist() == [7], 'a loss that is no number comes first: it wants to be seen'


@pytest.mark.parametrize('bins', [1, 7, 10, 15])
def test_calibration_is_eq_3_of_guo_et_al(bins):
    it = random_interp(700, 5)
    p = np.exp(it.preds.double().numpy()); p /= p.sum(1, keepdims=True)
    conf, right, ece = p.max(1), p.argmax(1) == it.targets.numpy(), 0.
    cal = it.calibration(bins)
    for k in range(bins):
        inside = [(c, r) for c, r in zip(conf, right) if k/bins < c <= (k + 1)/bins]
        assert cal.count[k] == len(inside)
        if not inside: assert np.isnan(cal.accuracy[k]) and np.isnan(cal.confidence[k]); continue
        c, r = np.mean([c for c, _ in inside]), np.mean([r for _, r in inside])
        assert abs(cal.confidence[k] - c) < 1e-12 and abs(cal.accuracy[k] - r) < 1e-12
        ece += len(inside)/len(conf)*abs(r - c)
    assert abs(cal.ece - ece) < 1e-12 and cal.count.sum() == 700


def test_calibration_at_the_edges():
    "A confidence of exactly 1/2 belongs to the bin below; a model that is sure and right has no error, one that is sure and wrong has 1."
    half = Interpretation(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])).calibration(2)
    assert half.count.tolist() == [4, 0] and half.ece == 0
    sure = torch.tensor([[1e4, 0.], [1e4, 0.]])
    assert Interpretation(sure, torch.tensor([0, 0])).calibration().ece == 0 and Interpretation(sure, torch.tensor([1, 1])).calibration().ece == 1


@pytest.mark.parametrize('preds, targets, word', [(torch.randn(4, 3), torch.randn(4, 3), 'one class an item'), (torch.randn(4, 1), torch.randn(4, 1), 'one class an item'),
                                                  (torch.randn(4, 3), torch.tensor([0, 1, 2, 3]), 'targets go from 0 to 3'), (torch.randn(4, 3), torch.tensor([0, -100, 2, 1]), 'from -100')])
def test_no_classes_no_confusion(preds, targets, word):
    it = Interpretation(preds, targets, losses=torch.zeros(4))
    for f in (it.confusion_matrix, it.per_class, it.calibration, it.most_confused):
        with pytest.raises(ValueError, match=word): f()
    with pytest.raises(ValueError, match='4 predictions but 3 targets'): Interpretation(preds, targets[:3])


# ---------------------------------------------------------------- from a learner


@pytest.mark.parametrize('kw', [{}, {'kept': True}, {'make_dl': item_dl}], ids=['read as it goes', 'in memory', 'the plain loader'])
def test_from_a_learner(folder, kw):
    learn = learner(folder, 1, **kw)
    it = Interpretation.from_learner(learn)
    src = learn.data.source.valid
    assert it.vocab == sorted(COLOURS) and it.names == ['tench', 'church', 'zebra'] and len(it) == 15
    assert it.targets.tolist() == src.y.items.tolist() and [str(f) for f in it.files] == [str(f) for f in src.x.items]
    for i in (0, 6, 14):
        assert it.item(i).equal(src.x[i])
        label, probs = learn.predict(it.files[i])
        assert it.vocab[it.decoded[i]] == label and torch.allclose(it.probs[i].float(), probs, atol=1e-6)
    assert abs(it.losses.mean().item() - learn.validate()['loss']) < 1e-5, 'the mean of the losses is the validation loss'
    train = Interpretation.from_learner(learn, learn.data.train_dl)                           # it shuffles
    assert train.targets.tolist() == learn.data.source.train.y.items.tolist() and train.files[3] == learn.data.source.train.x.items[3]
    assert train.item(5).equal(learn.data.source.train.x[5])
    shown = [t.get_text() for ax in it.plot_top_losses(3).axes for t in [ax.title] if t.get_text()]
    worst = it.top_losses(3)[1].tolist()
    assert len(shown) == 3 and all(it.files[i].name in s and f'loss {it.losses[i]:.2f}' in s for i, s in zip(worst, shown))


def test_skipped_files_do_not_shift_the_names(folder, tmp_path):
    import shutil
    d = tmp_path/'d'
    shutil.copytree(folder, d)
    for side in ('val', 'train'): (d/side/'n03028079/1.png').write_text('no picture')
    for kept in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn = learner(d, 1, kept, on_error='skip')
            it, train = Interpretation.from_learner(learn), Interpretation.from_learner(learn, learn.data.train_dl)
        assert len(train) == 23 and all(f.parent.name == train.vocab[t] for f, t in zip(train.files, train.targets)) and train.item(20).equal(learn.data.source.train.x.new(train.files)[20])
        assert len(it) == 14 == len(it.files) and not any(str(f).endswith('n03028079/1.png') for f in it.files)
        for i, f in enumerate(it.files):
            assert f.parent.name == it.vocab[it.targets[i]] and it.item(i).equal(learn.data.source.valid.x.new([f])[0])


def test_tensors_and_plain_loaders():
    torch.manual_seed(0)
    ds = [Dataset(torch.rand(n, 3, 8, 8), torch.randint(0, 3, (n,))) for n in (20, 11)]
    learn = Learner(net(), DataBunch(*get_dls(*ds, 4, seed=1), 3, 3), F.cross_entropy, cbs=CudaCallback('cpu'))
    for dl, d in ((None, ds[1]), (learn.data.train_dl, ds[0]), ([(ds[1].x[:6], ds[1].y[:6]), (ds[1].x[6:], ds[1].y[6:])], ds[1])):
        it = Interpretation.from_learner(learn, dl)
        assert it.targets.equal(d.y) and it.files is None and it.item(9).equal(d.x[9]) and it.names == ['0', '1', '2']
    with pytest.raises(ValueError, match='no targets'): Interpretation.from_learner(learn, [ds[1].x])
    assert it.plot_top_losses(2) and it.plot_confusion_matrix() and it.plot_calibration()
    with pytest.raises(ValueError, match='numbers alone'): random_interp().plot_top_losses()


def test_a_loaded_model_has_no_set_of_its_own(folder, learn, model):
    loaded = load_learner(model)
    with pytest.raises(ValueError, match='no validation set'): Interpretation.from_learner(loaded)
    it = Interpretation.from_learner(loaded, ItemLoader(learn.data.source.valid, 4, seed=0))
    there = Interpretation.from_learner(learn)
    assert it.preds.equal(there.preds) and it.losses.equal(there.losses) and it.names == there.names and it.files == there.files


# ---------------------------------------------------------------- class activation maps


def numpy_maps(learn, x):
    "What goes into the pooling, by another way: the layers called one by one."
    with torch.no_grad(): return learn.model[:2](NormalizeBytes([.4]*3, [.3]*3)(x[None])).double().numpy()[0]


def test_cam_is_the_logit_spread_over_the_picture(learn):
    x = learn.data.source.valid.x[7]
    fc, maps = learn.model[-1], numpy_maps(learn, x)
    logits = learn.get_preds([x[None]])[0][0]
    for c in range(3):
        m = cam(learn, x, c)
        assert m.cls == c and m.map.shape == (8, 8) and abs(m.map.double().mean().item() + fc.bias[c].item() - logits[c].item()) < 1e-5 and abs(m.score - logits[c].item()) < 1e-5
        w = fc.weight[c].detach().double().numpy()
        naive = np.array([[sum(w[k]*maps[k, i, j] for k in range(8)) for j in range(8)] for i in range(8)])
        assert np.abs(m.map.numpy() - naive).max() < 1e-5
    assert cam(learn, x).cls == logits.argmax() and cam(learn, x, 'zebra').cls == 2 == cam(learn, x, 2).cls and cam(learn, x, 'church').cls == 1 == cam(learn, x, 'n03028079').cls
    f = learn.data.source.valid.x.items[7]
    assert cam(learn, f).map.equal(cam(learn, x).map) and cam(learn, Image.open(f)).map.equal(cam(learn, x).map), 'a file, a picture, a tensor: the same'


def test_grad_cam_is_cam_where_cam_exists(learn):
    for i in (0, 8, 14):
        x = learn.data.source.valid.x[i]
        for c in range(3):
            a, b = cam(learn, x, c), cam(learn, x, c, learn.model[1])
            assert torch.allclose(a.map.relu()/a.map.numel(), b.map, atol=1e-7) and b.score == pytest.approx(a.score, abs=1e-5)
            assert cam(learn, x, c, '1').map.equal(b.map)
    assert any(cam(learn, learn.data.source.valid.x[i], c, '1').map.max() > 1e-4 for i in (0, 8) for c in range(3)), 'not all nothing'


@pytest.mark.parametrize('layer', ['0', '0.0', '0.1', '1.0'])
def test_grad_cam_of_any_layer_by_finite_differences(learn, layer):
    "The weight of map k is the mean over space of the slope of the score: add a little to the whole map and see what the score does. The conv layers are followed by a ReLU that writes over them."
    x, model, seen, add = learn.data.source.valid.x[3], copy.deepcopy(learn.model).double().eval(), {}, {}
    norm = NormalizeBytes([.4]*3, [.3]*3)(x[None]).double()
    def hook(m, i, o):
        seen['out'] = o.detach().clone()
        return o + add['d'] if 'd' in add else None
    dict(model.named_modules())[layer].register_forward_hook(hook)
    with torch.no_grad():
        model(norm)
        maps, eps, slopes = seen['out'][0], 1e-6, []
        for k in range(len(maps)):
            up, down = torch.zeros_like(maps)[None], torch.zeros_like(maps)[None]
            up[0, k], down[0, k], ds = eps, -eps, []
            for add['d'] in (up, down): ds.append(model(norm)[0])
            slopes.append((ds[0] - ds[1])/(2*eps)/maps[0].numel())                        # (C,): a sum over the places, made a mean
    want = torch.einsum('kc,khw->chw', torch.stack(slopes), maps).relu()
    for c in range(3): assert torch.allclose(cam(learn, x, c, layer).map.double(), want[c], atol=1e-5, rtol=1e-4)
    assert want.max() > .01


@pytest.mark.parametrize('name', ['resnet18', 'shufflenet_v2_x0_5'])
def test_other_peoples_nets(name):
    "Nets that pool by a layer, or by a bare mean in forward: the identity decides, not the layers' names."
    models = pytest.importorskip('torchvision.models')
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=5).eval()
    learn = Learner(model, DataBunch(None, None, 3, 5), F.cross_entropy, cbs=CudaCallback('cpu'))
    m, fc = cam(learn, torch.randn(3, 64, 64), 3), model.fc
    assert m.map.shape == (2, 2) and abs(m.map.mean().item() + fc.bias[3].item() - m.score) < 1e-4*max(1, abs(m.score)) and (m.map < 0).any() | (m.map > 0).any()


def test_a_head_that_is_no_gap_and_linear(folder):
    "Without the identity the default is Grad-CAM of the last layer with a map; a model without maps is told so."
    torch.manual_seed(0)
    def model(*head): return Learner(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(inplace=True), *head), DataBunch(None, None, 3, 3), F.cross_entropy, cbs=CudaCallback('cpu'))
    x = torch.randn(3, 8, 8)
    learn = model(nn.Flatten(), nn.Linear(64, 3))
    assert cam(learn, x, 1).map.equal(cam(learn, x, 1, learn.model[1]).map) and cam(learn, x, 1).map.shape == (4, 4)
    two = model(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    assert cam(two, x, 0).map.equal(cam(two, x, 0, '1').map)
    flat = Learner(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), DataBunch(None, None, 3, 3), F.cross_entropy, cbs=CudaCallback('cpu'))
    with pytest.raises(ValueError, match='no layer of this model gives a map'): cam(flat, x)


@pytest.mark.parametrize('call, word', [(dict(cls=3), 'no class of this model'), (dict(cls='horse'), "'horse' is no class"), (dict(layer='9'), '9 is no layer'), (dict(layer=nn.Conv2d(3, 3, 1)), 'Conv2d is no layer'),
                                        (dict(layer='5'), 'a map .* is wanted')])
def test_cam_says_what_is_wrong(learn, call, word):
    with pytest.raises(ValueError, match=word): cam(learn, learn.data.source.valid.x[0], **call)
    assert not any(m._forward_hooks for m in learn.model.modules()), 'a hook was left behind'


def test_overlay_lights_the_place():
    x, heat = torch.full((3, 32, 32), 100, dtype=torch.uint8), torch.zeros(4, 4)
    heat[0, 3] = 5.; heat[3, 0] = -5.
    o = overlay(x, heat)
    assert o.shape == (3, 32, 32) and 0 <= o.min() and o.max() <= 1
    far = (o - 100/255).abs().sum(0)
    assert far[:8, 24:].mean() > .2 and far[24:, :8].max() < 1e-6, 'evidence for the class is lit, evidence against it is not'
    assert overlay(x, torch.zeros(4, 4)).sub(100/255).abs().max() < 1e-6


# ---------------------------------------------------------------- a look leaves no trace


def fingerprint(learn):
    "Everything that a look could change, as bytes."
    out = io.BytesIO()
    torch.save([learn.model.state_dict(), [(n, m.training, len(m._forward_hooks)) for n, m in learn.model.named_modules()], [p.grad for p in learn.model.parameters()],
                [p.requires_grad for p in learn.model.parameters()], torch.get_rng_state(), learn.data.train_dl.epoch, learn.n_iter, learn.epoch, repr(learn.opt.hypers),
                sorted((i, sorted(s)) for i, s in enumerate(learn.opt.state.values()))], out)
    return out.getvalue(), pickle.dumps(np.random.get_state()), [id(cb) for cb in learn.cbs], [dict(vars(cb)).keys() for cb in learn.cbs], repr(learn.cbs[-1].rows), torch.is_grad_enabled(), id(learn.model)


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, BatchNorm, RunningBatchNorm])
def test_looking_changes_nothing(folder, norm, tmp_path, monkeypatch):
    learn = learner(folder, 1)
    learn.model = net(norm=norm)
    learn.fit(1, reset_opt=True)
    learn.model.train(); learn.model[0].eval()                                     # a mixture of modes, and gradients that are there
    for p in learn.model[0].parameters(): p.grad = torch.ones_like(p)
    x, before = learn.data.source.valid.x[0], fingerprint(learn)
    def broken(*args): raise KeyError('in the middle')
    def fails(): monkeypatch.setattr(learn.model[-1], 'forward', broken); cam(learn, x)
    looks = dict(interp=lambda: Interpretation.from_learner(learn), cam=lambda: cam(learn, x), grad=lambda: cam(learn, x, 1, '0.0'), show=lambda: I.show_cam(learn, [x, x]),
                 files=lambda: list(I.predict_files(learn, list(learn.data.source.valid.x.items))), program=lambda: to_exported_program(learn), fails=fails)
    for name, look in looks.items():
        if name == 'fails':
            with pytest.raises(KeyError): look()
            monkeypatch.undo()
        else: look()
        assert fingerprint(learn) == before, f'{name} changed something'


# ---------------------------------------------------------------- files that need no Python of ours


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, BatchNorm, RunningBatchNorm])
def test_exported_program_gives_the_same(learn, norm, tmp_path):
    learn = Learner(net(norm=norm), learn.data, F.cross_entropy, lr=.05, cbs=[CudaCallback('cpu'), BatchTransformXCallback(NormalizeBytes([.4]*3, [.3]*3))]).fit(1)
    ep = to_exported_program(learn)
    torch.export.save(ep, tmp_path/'m.pt2')
    f = torch.export.load(tmp_path/'m.pt2').module()
    for n in (1, 2, 7):
        xb = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8)
        assert (f(xb) - learn.get_preds([xb])[0]).abs().max() < 1e-4


def test_running_batchnorm_never_trained_and_nested(learn):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(RunningBatchNorm(4), GeneralRelu(leak=.1, sub=.2)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    cold = Learner(model, learn.data, F.cross_entropy, cbs=[CudaCallback('cpu'), BatchTransformXCallback(NormalizeBytes([.4]*3, [.3]*3))])
    xb = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    for warm in (False, True):
        if warm: model.train()(torch.randn(4, 3, 16, 16))
        assert (to_exported_program(cold).module()(xb) - cold.get_preds([xb])[0]).abs().max() < 1e-5
        assert isinstance(model[1][0], RunningBatchNorm), 'the learner keeps its layer'


def test_onnx_runs_elsewhere(learn, model, tmp_path):
    pytest.importorskip('onnx'); pytest.importorskip('onnxscript'); ort = pytest.importorskip('onnxruntime')
    for who, f in ((learn, tmp_path/'a.onnx'), (load_learner(model), tmp_path/'b.onnx')):
        assert to_onnx(who, f) == f and sorted(p.name for p in tmp_path.iterdir() if p.stem == f.stem) == [f.name], 'one file, nothing beside it'
        s = ort.InferenceSession(str(f), providers=['CPUExecutionProvider'])
        i, o = s.get_inputs()[0], s.get_outputs()[0]
        assert (i.name, i.shape[1:], i.type, o.name, o.shape[1:]) == ('pictures', [3, 16, 16], 'tensor(uint8)', 'scores', [3]) and isinstance(i.shape[0], str)
        for n in (1, 5):
            xb = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8)
            assert np.abs(s.run(None, {'pictures': xb.numpy()})[0] - learn.get_preds([xb])[0].numpy()).max() < 1e-4
        meta = s.get_modelmeta().custom_metadata_map
        assert json.loads(meta['classes']) == sorted(COLOURS) and json.loads(meta['names']) == ['tench', 'church', 'zebra']


def test_floats_and_no_data_block(tmp_path):
    data = DataBunch(None, None, 3, 3)
    learn = Learner(net(), data, F.cross_entropy, cbs=CudaCallback('cpu'))
    with pytest.raises(ValueError, match='without a data block'): to_exported_program(learn)
    xb = torch.randn(4, 3, 12, 20)
    assert (to_exported_program(learn, xb[:1]).module()(xb) - learn.get_preds([xb])[0]).abs().max() < 1e-5


class Doubles(Callback):
    def begin_batch(self, run): run.xb = run.xb.float()*2


class Decides(nn.Module):
    def forward(self, x): return x*2 if x.sum() > 0 else x


def test_an_export_that_would_lie_is_refused(learn, tmp_path):
    xb = torch.randn(2, 3, 16, 16)
    odd = Learner(net(), DataBunch(None, None, 3, 3), F.cross_entropy, cbs=[CudaCallback('cpu'), Doubles()])
    with pytest.raises(ValueError, match='what was exported differs from the learner .*Doubles'): to_exported_program(odd, xb)
    odd = Learner(nn.Sequential(Decides(), net()), DataBunch(None, None, 3, 3), F.cross_entropy, cbs=CudaCallback('cpu'))
    with pytest.raises(ValueError, match='torch.export cannot trace this model'): to_onnx(odd, tmp_path/'x.onnx', xb)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('package', ['onnx', 'onnxscript'])
def test_missing_packages_are_named(learn, package, monkeypatch, tmp_path):
    if package == 'onnxscript': pytest.importorskip('onnx')
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'\({package}\): pip install onnx onnxscript'): to_onnx(learn, tmp_path/'m.onnx')


# ---------------------------------------------------------------- exp-predict


def predict(*args, home, **kw):
    return subprocess.run([sys.executable, '-m', 'exp.interpret', *map(str, args)], cwd=kw.pop('cwd', ROOT), env={**small_env(home), 'PYTHONPATH': str(ROOT), **kw.pop('env', {})},
                          capture_output=True, text=True, timeout=400, **kw)


def test_predicts(folder, learn, model, tmp_path, data_home):
    big = tmp_path/'my photo: 1.png'
    picture(COLOURS['zebra'], 99, (300, 200)).save(big)
    (tmp_path/'broken.jpg').write_bytes(b'\xff\xd8\xff nothing')
    r = predict(model, big, folder/'val', tmp_path/'broken.jpg', tmp_path/'none.png', f'{folder}/train/zebra/[01].png', '--json', tmp_path/'r.json', '--bs', 4, '--device', 'cpu', home=data_home)
    rows, errors = [l.split('\t') for l in r.stdout.splitlines()], r.stderr.splitlines()
    assert r.returncode == 1 and len(rows) == 1 + 15 + 2 and len(errors) == 2 and all(e.startswith('exp-predict: ') for e in errors)
    assert 'broken.jpg' in errors[0] and 'none.png' in errors[1] and 'such file' in errors[1] and 'Traceback' not in r.stderr
    assert [row[0] for row in rows[:2] + rows[-2:]] == [str(big), str(folder/'val/n01440764/0.png'), str(folder/'train/zebra/0.png'), str(folder/'train/zebra/1.png')]
    for f, name, p in rows:
        label, probs = learn.predict(f)
        assert name == readable(label) and abs(float(p) - probs.max().item()) <= 5.1e-5
    j = json.loads((tmp_path/'r.json').read_text())
    assert [q['file'] for q in j['predictions']] == [row[0] for row in rows] and set(j['failed']) == {str(tmp_path/'broken.jpg'), str(tmp_path/'none.png')}
    assert {q['top'][0]['name'] for q in j['predictions']} <= {'tench', 'church', 'zebra'} and f"{j['predictions'][0]['top'][0]['probability']:.4f}" == rows[0][2]


def run_main(capsys, *args):
    status = None
    try: status = I.main([str(a) for a in args])
    except SystemExit as e: status = e.code
    out, err = capsys.readouterr()
    return status, out, err


def test_all_well_is_0_and_top_k(folder, model, capsys):
    f = folder/'val/zebra/0.png'
    assert run_main(capsys, model, f)[0] == 0
    status, out, err = run_main(capsys, model, f, '--top', 9)
    name, *pairs = out.rstrip('\n').split('\t')
    probs = [float(p) for p in pairs[1::2]]
    assert status == 0 and not err and set(pairs[::2]) == {'tench', 'church', 'zebra'} and probs == sorted(probs, reverse=True) and abs(sum(probs) - 1) < 2e-4
    status, out, err = run_main(capsys, model, '--help')
    assert status == 0 and 'Exit status' in out and all(o in out for o in ('--top', '--json', '--device', '--bs'))


def test_upright_by_exif(tmp_path, learn, model, capsys):
    "A photo of a phone that lies on its side in the file, and the same picture upright: one prediction."
    im = Image.new('RGB', (60, 40), COLOURS['zebra'])
    im.paste(Image.new('RGB', (60, 14), COLOURS['n01440764']), (0, 0))
    exif = Image.Exif(); exif[0x0112] = 6
    im.save(tmp_path/'up.png'); im.transpose(Image.Transpose.ROTATE_90).save(tmp_path/'phone.png', exif=exif); im.transpose(Image.Transpose.ROTATE_90).save(tmp_path/'no_exif.png')
    _, out, _ = run_main(capsys, model, tmp_path/'up.png', tmp_path/'phone.png', tmp_path/'no_exif.png', '--top', 3)
    up, phone, lying = (l.split('\t')[1:] for l in out.splitlines())
    assert up == phone != lying


def files_that_are_no_model(tmp_path, model):
    good = model.read_bytes()
    (tmp_path/'cut.pt').write_bytes(good[:len(good)//2]); (tmp_path/'empty.pt').touch(); (tmp_path/'poem.pt').write_text('Shall I compare thee'); torch.save({'a': torch.ones(1)}, tmp_path/'foreign.pt')

    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'you_were_here'),)
    torch.save({'format': 'exp.checkpoints', 'version': 1, 'kind': 'export', 'layers': Bomb()}, tmp_path/'hostile.pt')
    head = dict(cbs=[], c_in=3, c_out=3)
    write_file(tmp_path/'nodata.pt', 'export', {'layers': {'object': 'torch.nn.Flatten', 'vars': {'start_dim': 1, 'end_dim': -1}, 'parameters': {}, 'buffers': {}, 'children': {}}, 'model': None, 'data': None, **head})
    d = torch.load(model, weights_only=True)
    d['layers'] = {'object': 'torch.nn.Linear', 'vars': {'in_features': 4, 'out_features': 4}, 'parameters': {}, 'buffers': {}, 'children': {}}
    torch.save(d, tmp_path/'senseless.pt')


@pytest.mark.parametrize('name', ['cut.pt', 'empty.pt', 'poem.pt', 'foreign.pt', 'hostile.pt', 'none.pt', 'nodata.pt', 'senseless.pt'])
def test_a_file_that_is_no_model_is_2(name, folder, model, tmp_path, capsys):
    files_that_are_no_model(tmp_path, model)
    status, out, err = run_main(capsys, tmp_path/name, folder/'val/zebra/0.png')
    assert status == 2 and not out and err.startswith('exp-predict: ') and len(err.splitlines()) == 1 and name in err, err
    assert not (tmp_path/'you_were_here').exists()


@pytest.mark.parametrize('args, word', [((), 'FILE'), (('x.png', '--top', '0'), '0 is less than 1'), (('x.png', '--nonsense'), '--nonsense'), (('x.png', '--device', 'abacus'), '--device abacus'),
                                        (('x.png', '--json', '/nowhere/at/all/x.json'), '/nowhere/at/all/x.json'), (('x.png', '--bs', 'many'), 'many')])
def test_a_mistake_in_the_options_is_2(args, word, model, capsys):
    status, out, err = run_main(capsys, model, *args)
    assert status == 2 and not out and err.startswith('exp-predict: ') and word in err and len(err.splitlines()) == 1


def test_folders_and_patterns(tmp_path, folder, model, capsys):
    (tmp_path/'empty').mkdir(); (tmp_path/'odd[1].png').write_bytes((folder/'val/zebra/0.png').read_bytes())
    status, out, err = run_main(capsys, model, tmp_path/'empty', tmp_path/'*.gif', tmp_path/'odd[1].png', tmp_path/'od*')
    assert status == 1 and out.count('odd[1].png') == 2, 'a name with brackets that exists is that file'
    assert 'empty: no pictures in this folder' in err and '*.gif: no file matches' in err and len(err.splitlines()) == 2


def test_all_of_a_batch_broken_and_the_next_goes_on(tmp_path, folder, model, capsys):
    for i in range(3): (tmp_path/f'{i}.png').write_text('no')
    status, out, err = run_main(capsys, model, tmp_path, folder/'val/zebra', '--bs', 3)
    assert status == 1 and len(out.splitlines()) == 5 and len(err.splitlines()) == 3


def test_names_no_terminal_can_show(tmp_path, folder, model, monkeypatch):
    "A new line, a tab, an escape sequence, and bytes that are no UTF-8: still a line each, on an ASCII terminal too."
    data = (folder/'val/zebra/0.png').read_bytes()
    names = [b'new\nline.png', b'tab\there.png', b'\x1b[31mred.png', 'grün.png'.encode(), b'\xff\xfe.png']
    (tmp_path/'d').mkdir()
    for n in names: open(os.path.join(os.fsencode(tmp_path/'d'), n), 'wb').write(data)
    (tmp_path/'d'/'bad\n.png').touch()
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding='ascii') for _ in range(2))
    monkeypatch.setattr(sys, 'stdout', out); monkeypatch.setattr(sys, 'stderr', err)
    status = I.main([str(model), str(tmp_path/'d'), '--json', str(tmp_path/'r.json')])
    monkeypatch.undo()
    said, complained = (t.buffer.getvalue().decode() for t in (out, err))
    assert status == 1 and len(said.splitlines()) == 5 and all(len(l.split('\t')) == 3 for l in said.splitlines()) and '\x1b' not in said and len(complained.splitlines()) == 1
    back = {os.fsencode(q['file']) for q in json.loads((tmp_path/'r.json').read_text())['predictions']}
    assert back == {os.path.join(os.fsencode(tmp_path/'d'), n) for n in names}, 'the json has the true names'


def test_a_transform_that_fails_on_one_picture(tmp_path, folder, learn):
    "No resize: pictures of several shapes go one by one, and one that a transform cannot take does not take the others with it."
    il = ImageList([], '.', [to_byte_tensor, to_float_tensor])                                # no make_rgb: 16 bits are a TypeError
    picture((1, 2, 3), 0, (16, 16)).save(tmp_path/'a.png'); picture((200, 2, 3), 1, (20, 24)).save(tmp_path/'b.png')
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path/'deep.png')
    parts, bad = I._load(il, [str(tmp_path/n) for n in ('a.png', 'deep.png', 'b.png')])
    assert [fs for fs, _ in parts] == [[str(tmp_path/'a.png')], [str(tmp_path/'b.png')]] and list(bad) == [str(tmp_path/'deep.png')] and 'make_rgb' in bad[str(tmp_path/'deep.png')]


def test_no_numbers_are_a_failure(folder, tmp_path, capsys):
    learn = learner(folder, 0)
    learn.model[-1].bias.data[1] = float('nan')
    status, out, err = run_main(capsys, export(learn, tmp_path/'nan.pt'), folder/'val/zebra/0.png', '--json', tmp_path/'r.json')
    assert status == 1 and not out and 'NaN' in err and json.loads((tmp_path/'r.json').read_text())['predictions'] == []


def test_several_labels_and_values(folder, tmp_path, capsys):
    il = ImageList.from_files(folder, tfms=[make_rgb, ResizeFixed(16), to_byte_tensor])
    sd = SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val'))
    def several(fn): return [parent_labeler(fn), 'any']
    def value(fn): return float(len(parent_labeler(fn)))
    many, one = (label_by_func(sd, f, proc_y=default_processor([f(fn) for fn in sd.train.items])).to_databunch(8, num_workers=0, seed=0) for f in (several, value))
    a = Learner(net(4), many, F.binary_cross_entropy_with_logits, cbs=BatchTransformXCallback(NormalizeBytes([.4]*3, [.3]*3)))
    a.model[-1].weight.data.zero_(); a.model[-1].bias.data = torch.tensor([3., -3., -3., 2.])       # any, n01440764, n03028079, zebra
    f = folder/'val/zebra/0.png'
    assert run_main(capsys, export(a, tmp_path/'a.pt'), f)[1] == f'{f}\tany\t{1/(1 + np.exp(-3)):.4f}\tzebra\t{1/(1 + np.exp(-2)):.4f}\n'
    b = Learner(net(1), one, F.mse_loss, cbs=BatchTransformXCallback(NormalizeBytes([.4]*3, [.3]*3)))
    b.model[-1].weight.data.zero_(); b.model[-1].bias.data.fill_(2.5)
    assert run_main(capsys, export(b, tmp_path/'b.pt'), f)[1] == f'{f}\t2.5\n'


@pytest.mark.skipif(os.name != 'posix', reason='signals and pipes of POSIX')
def test_ctrl_c_and_a_reader_who_leaves(tmp_path, folder, model, data_home):
    from itertools import repeat
    many = list(repeat(str(folder/'val/zebra/0.png'), 4000))
    def start(): return subprocess.Popen([sys.executable, '-m', 'exp.interpret', str(model), *many, '--bs', '1'], cwd=ROOT, env=small_env(data_home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=wants_sigint)
    p = start()
    p.stdout.readline(); p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=400)
    assert p.returncode == 130 and 'interrupted after' in err and 'Traceback' not in err and len(err.splitlines()) == 1, err
    p = start()
    p.stdout.readline(); p.stdout.close()
    err = p.stderr.read(); p.wait(60)
    assert p.returncode == 141 and not err, err


def test_what_there_is_stays_after_ctrl_c(tmp_path, folder, model, capsys, monkeypatch):
    "The json used to be an empty file after an interruption, and after a model that is not there."
    calls, real = [], I.ranked
    def ranked(*args):
        if len(calls) == 3: raise KeyboardInterrupt
        calls.append(1)
        return real(*args)
    monkeypatch.setattr(I, 'ranked', ranked)
    status, out, err = run_main(capsys, model, folder/'val', tmp_path/'none.png', '--json', tmp_path/'r.json')
    j = json.loads((tmp_path/'r.json').read_text())
    assert status == 130 and [q['file'] for q in j['predictions']] == [l.split('\t')[0] for l in out.splitlines()] and len(j['predictions']) == 3
    assert run_main(capsys, tmp_path/'nope.pt', folder/'val', '--json', tmp_path/'new.json')[0] == 2 and not (tmp_path/'new.json').exists()


def test_several_values_are_no_sum():
    assert readable([30.5, -2.]) == '30.5, -2.0' and readable(('wet', 'cat')) == 'wet + cat' and readable([]) == 'none'


def test_it_does_not_know_the_command():
    assert 'train_imagenette' not in (ROOT/'exp/interpret.py').read_text()


# ---------------------------------------------------------------- found by users


class Functional(nn.Module):
    "A convolution, a ReLU that is no layer, a pooling, a linear layer."
    def __init__(self, *head): super().__init__(); self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Sequential(*head)
    def forward(self, x): return self.head(F.relu(self.conv(x)))


class OneRelu(nn.Module):
    "The same ReLU on the maps and on what was pooled."
    def __init__(self): super().__init__(); self.conv, self.relu, self.mid, self.fc = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)
    def forward(self, x): return self.fc(self.relu(self.mid(self.relu(self.conv(x)).mean((2, 3), keepdim=True))).flatten(1))


class Concat(nn.Module):
    def forward(self, x): return torch.cat([x.amax((2, 3), keepdim=True), x.mean((2, 3), keepdim=True)], 1)


def by_hand(maps, rest, c):
    "Grad-CAM in three lines: the class's score as a function of the maps (1, K, H, W)."
    maps = maps.detach().requires_grad_()
    g, = torch.autograd.grad(rest(maps)[0, c], maps)
    return (g[0].mean((1, 2))[:, None, None]*maps.detach()[0]).sum(0).relu()


def of(model, **kw): return Learner(model, DataBunch(None, None, 3, 4), F.cross_entropy, cbs=CudaCallback('cpu'), **kw)


def test_the_maps_that_go_into_a_pooling_are_found_there():
    "A functional ReLU between convolution and pooling: no layer's output is what is pooled. The map used to be one place, the mean of itself."
    torch.manual_seed(0)
    model, x = Functional(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval(), torch.randn(3, 12, 10)
    maps, fc = F.relu(model.conv(x[None]))[0].detach(), model.head[-1]
    for c in range(4):
        m = cam(of(model), x, c)
        assert torch.allclose(m.map, torch.einsum('khw,k->hw', maps, fc.weight[c].detach()), atol=1e-6) and m.map.shape == (10, 8)
        assert abs(m.map.mean() + fc.bias[c] - m.score) < 1e-5 and abs(m.score - model(x[None])[0, c]) < 1e-5


@pytest.mark.parametrize('head, k', [((nn.AdaptiveMaxPool2d(1), nn.Flatten()), 6), ((Concat(), nn.Flatten()), 12), ((nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(6)), 6),
                                     ((nn.AdaptiveAvgPool2d(1), nn.GroupNorm(1, 6), nn.Flatten()), 6)], ids=['max', 'max and mean', 'normalised', 'normalised as a map'])
def test_without_a_mean_before_the_linear_layer_it_is_grad_cam_of_many_places(head, k):
    torch.manual_seed(0)
    conv, fc = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), nn.Linear(k, 4)
    model, x = nn.Sequential(conv, *head, fc).eval(), torch.randn(3, 12, 10)
    for c in range(4):
        m = cam(of(model), x, c)
        assert m.map.shape == (10, 8) and torch.allclose(m.map, by_hand(conv(x[None]), model[1:], c), atol=1e-6)
    if k == 6 and len(head) == 2:                                         # by pencil: one place of each map has the gradient w
        assert torch.allclose(m.map, torch.einsum('khw,k->hw', conv(x[None])[0].detach(), fc.weight[3].detach()).relu()/80, atol=1e-6)


def test_a_layer_that_is_used_again_after_the_pooling_is_not_the_one():
    torch.manual_seed(0)
    model, x = OneRelu().eval(), torch.randn(3, 12, 10)
    def rest(maps): return model.fc(F.relu(model.mid(F.relu(maps).mean((2, 3), keepdim=True))).flatten(1))
    for c in range(4): assert torch.allclose(cam(of(model), x, c).map, by_hand(model.conv(x[None]), rest, c), atol=1e-6)


def test_convnext():
    "A small one of torchvision's: a layer norm lies between pooling and linear layer."
    convnext = pytest.importorskip('torchvision.models.convnext')
    torch.manual_seed(0)
    model, x = convnext.ConvNeXt([convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)], num_classes=4).eval(), torch.randn(3, 16, 24)
    m = cam(of(model), x, 2)
    assert m.map.shape == (2, 3) and torch.allclose(m.map, by_hand(model.features(x[None]), lambda f: model.classifier(model.avgpool(f)), 2), atol=1e-6)


def test_a_picture_that_shrinks_to_one_place_is_looked_at_before_it_does():
    torch.manual_seed(0)
    first, last = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(6, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    model, x = nn.Sequential(first, last).eval(), torch.randn(3, 4, 4)
    m = cam(of(model), x, 1)
    assert m.map.shape == (2, 2) and torch.allclose(m.map, by_hand(first(x[None]), last, 1), atol=1e-6)


@pytest.mark.parametrize('loss, ignored', [(F.cross_entropy, -100), (nn.CrossEntropyLoss(reduction='sum'), -100), (nn.CrossEntropyLoss(ignore_index=1), 1),
                                           (partial(F.cross_entropy, ignore_index=0), 0), (LabelSmoothing(.1), -100), (lambda p, y: F.cross_entropy(p, y), -100),
                                           (lambda p, y, ignore_index=255: F.cross_entropy(p, y, ignore_index=ignore_index), 255)], ids=range(7))
def test_what_the_loss_ignores_is_left_out(loss, ignored):
    "Their losses were NaN, so they were the worst mistakes, and the mean was none."
    torch.manual_seed(0)
    x, y = torch.randn(40, 3, 8, 8), torch.randint(3, (40,))
    y[::4] = ignored
    keep = (y != ignored).nonzero().flatten()
    learn = Learner(net(), DataBunch(*get_dls(Dataset(x, y), Dataset(x, y), 8), 3, 3), loss, cbs=CudaCallback('cpu'))
    it, want = Interpretation.from_learner(learn), Interpretation.from_learner(learn, [(x[keep], y[keep])])
    assert 0 < len(it) < 40 and it.targets.equal(y[keep]) and torch.allclose(it.preds, want.preds, atol=1e-6) and torch.allclose(it.losses, want.losses, atol=1e-6)
    assert it.losses.isfinite().all() and it.top_losses(3)[1].equal(want.top_losses(3)[1]) and it.confusion_matrix().sum() == len(keep) and it.plot_top_losses(2)
    for i in (0, 7, len(it) - 1): assert it.item(i).equal(x[keep[i]])
    with pytest.raises(ValueError, match='none of these 40 items has a label that counts'):
        Interpretation.from_learner(learn, [(x, torch.full_like(y, ignored))])


@pytest.mark.parametrize('kept', [False, True], ids=['read as it goes', 'in memory'])
def test_files_of_those_that_count(folder, kept):
    sd = items(folder)
    learn = Learner(net(), (in_memory(sd) if kept else sd).to_databunch(8, seed=0, num_workers=0, make_dl=fast_dl), nn.CrossEntropyLoss(ignore_index=1), cbs=[CudaCallback('cpu'), BatchTransformXCallback(NormalizeBytes([.4]*3, [.3]*3))])
    it = Interpretation.from_learner(learn)
    assert len(it) == 10 == len(it.files) and all(f.parent.name == it.vocab[t] for f, t in zip(it.files, it.targets)) and it.item(7).equal(learn.data.source.valid.x.new(it.files)[7])


def test_numbers_are_ignored_by_no_loss():
    "Targets that are no class indices stay, -100 among them."
    x, y = torch.randn(6, 3, 8, 8), torch.tensor([-100., 1, 2, 3, 4, 5])
    for t, c in ((y[:, None], 1), (y, 1), (F.one_hot(torch.arange(6) % 3).float(), 3)):
        learn = Learner(net(c), DataBunch(None, [(x, t)], 3, c), lambda p, t: F.mse_loss(p.view_as(t), t), cbs=CudaCallback('cpu'))
        assert Interpretation.from_learner(learn).targets.equal(t)


def test_outputs_beyond_the_vocabulary_have_a_name(folder):
    "A head of 5 for 3 classes. `most_confused` ended in an IndexError, and `per_class` left them out."
    learn = Learner(net(5), items(folder).to_databunch(8, c_out=5, seed=0, num_workers=0), F.cross_entropy, cbs=[CudaCallback('cpu'), BatchTransformXCallback(NormalizeBytes([.4]*3, [.3]*3))])
    learn.model[-1].bias.data[4] = 100.
    it = Interpretation.from_learner(learn)
    assert it.names == ['tench', 'church', 'zebra', 'output 3', 'output 4'] and it.vocab[:3] == sorted(COLOURS) and '5 classes' in repr(it)
    assert it.most_confused() == [(n, 'output 4', 5) for n in it.names[:3]] and len(it.per_class()) == 5 and it.per_class()[4]['precision'] == 0
    assert it.plot_confusion_matrix() and 'said output 4' in it.plot_top_losses(1).axes[0].get_title()
    fig = I.show_cam(learn, [it.item(0)])
    assert any(ax.get_title().startswith('for 4: ') for ax in fig.axes)
    assert Interpretation(torch.randn(4, 1), torch.randn(4, 1), torch.zeros(4), ['a']).names == ['a'] and Interpretation(torch.randn(4), torch.randn(4), torch.zeros(4), ['a', 'b']).names == ['a', 'b']


def test_a_model_of_several_outputs_is_refused_in_a_sentence():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.Linear(12, 3)
        def forward(self, x): x = x.flatten(1); return self.a(x), x
    x, y = torch.randn(8, 3, 2, 2), torch.zeros(8).long()
    learn = Learner(Two(), DataBunch(None, [(x, y)], 3, 3), F.cross_entropy)
    with pytest.raises(ValueError, match='one output and one target'): Interpretation.from_learner(learn)
    from exp.interpret import to_exported_program
    with pytest.raises(ValueError, match='several outputs'): to_exported_program(learn, x=x)
