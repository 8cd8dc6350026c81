"""Looking at a trained model: every number against a loop or a formula of its own, row i is picture i, a look that leaves no trace."""
import copy
import io
import pickle
import shutil
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from trained import COLOURS, NAMES, items, learner, net, norm, of, pictures

from exp.batchnorm import BatchNorm, RunningBatchNorm
from exp.calibration import measure_calibration, plot_reliability
from exp.callbacks import CudaCallback, DataBunch, Dataset, get_dls
from exp.data_block import NormalizeBytes, decoded, item_dl
from exp.fast_batches import ItemLoader
from exp.interpret import Interpretation, cam, loss_of_each, overlay, show_cam
from exp.learner import Learner
from exp.mixup import LabelSmoothing


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return pictures(tmp_path_factory.mktemp('pictures'))


@pytest.fixture(scope='module')
def learn(folder): return learner(folder)


def random_interp(n=400, c=7, **kw):
    g = torch.Generator().manual_seed(0)
    t = torch.randint(0, c, (n,), generator=g)
    return Interpretation(torch.randn(n, c, generator=g)*2 + 2*F.one_hot(t, c), t, **kw)


def test_confusion_and_what_follows_from_it():
    it = random_interp(vocab=list('abcdefg'))
    p, t = it.preds.numpy(), it.targets.numpy()
    naive = np.zeros((7, 7), int)
    for row, true in zip(p, t): naive[true, max(range(7), key=lambda j: row[j])] += 1
    assert (it.confusion_matrix().numpy() == naive).all() and not (naive == naive.T).all()
    losses = it.losses.double().numpy()
    for k, row in enumerate(zip(*it.per_class().values())):
        tp, fn, fp = naive[k, k], naive[k].sum() - naive[k, k], naive[:, k].sum() - naive[k, k]
        assert np.allclose(row, [tp + fn, tp/(tp + fn), tp/(tp + fp), 2*tp/(2*tp + fp + fn), losses[t == k].mean()])
    want = sorted(((naive[i, j], i, j) for i in range(7) for j in range(7) if i != j and naive[i, j] >= 4), key=lambda r: (-r[0], r[1], r[2]))
    assert it.most_confused(4) == [('abcdefg'[i], 'abcdefg'[j], n) for n, i, j in want] and 0 < len(want) < 42
    assert len(it.most_confused(0)) == (naive - np.diag(np.diag(naive)) > 0).sum(), 'never confused is not confused'


def test_what_has_no_classes_is_refused():
    "NaN rows used to be class 0, and perfectly calibrated. Minus infinity is a score: it says impossible."
    preds, t = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    nan, inf, never = preds.clone(), preds.clone(), preds.clone()
    nan[1, 2], inf[5, 0], never[0, 1] = float('nan'), float('inf'), float('-inf')
    for p, y in ((nan, t), (inf, t), (preds, preds), (preds[:, 0], t), (preds, t.float())):
        it = Interpretation(p, y, losses=torch.zeros(6))
        for ask in (it.confusion_matrix, it.plot_confusion_matrix, it.per_class, it.most_confused):
            with pytest.raises(ValueError): ask()
    with pytest.raises(ValueError): measure_calibration(nan.softmax(1), t)
    assert Interpretation(never, t).confusion_matrix().sum() == 6


def test_no_items_are_refused(learn):
    x, none = torch.rand(4, 3, 16, 16), torch.full((4,), -100)                    # -100: no label counts
    for make in (lambda: Interpretation(torch.zeros(0, 3), none[:0]), lambda: Interpretation.from_learner(learn, [(x, none)]), lambda: Interpretation.from_learner(learn, [])):
        with pytest.raises(ValueError): make()


def test_names_are_no_formulas():
    it = random_interp(30, 5, vocab=['$\\frac$', 'a\\b', '$', 'caf\udce9', '{x}_$y$'])                # \udce9: a name that is not UTF-8
    fig = it.plot_confusion_matrix()
    fig.savefig(io.BytesIO())
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ['$\\frac$', 'a\\b', '$', 'caf\\udce9', '{x}_$y$']


@pytest.mark.parametrize('loss', [F.cross_entropy, nn.CrossEntropyLoss(reduction='sum'), nn.CrossEntropyLoss(reduction='none'),
                                  partial(F.cross_entropy, label_smoothing=.1), lambda p, y: (-p.log_softmax(1)[torch.arange(len(y)), y]).mean()], ids=range(5))
def test_losses_of_items(loss):
    it, smooth = random_interp(20, 4), .1 if isinstance(loss, partial) else 0
    for row, t, l in zip(it.preds.double().numpy(), it.targets, loss_of_each(loss, it.preds, it.targets)):
        logp = row - np.log(np.exp(row).sum())
        assert abs(-(1 - smooth)*logp[t] - smooth*logp.mean() - l.item()) < 1e-5


def test_top_losses():
    it = random_interp(50)
    order = sorted(range(50), key=lambda i: -it.losses[i].item())
    losses, idx = it.top_losses(5)
    assert idx.tolist() == order[:5] and losses.tolist() == it.losses[order[:5]].tolist()
    assert it.top_losses(3, largest=False)[1].tolist() == order[::-1][:3] and len(it.top_losses()[0]) == 50
    it.losses[7] = float('nan')
    assert it.top_losses(1)[1].tolist() == [7], 'a loss that is no number wants to be seen'


@pytest.mark.parametrize('bins', [1, 7, 15])
def test_calibration_is_eq_3_of_guo_et_al(bins):
    it = random_interp(700, 5)
    p = np.exp(it.preds.double().numpy())
    conf, right, ece, cal = (p/p.sum(1, keepdims=True)).max(1), p.argmax(1) == it.targets.numpy(), 0., measure_calibration(it.probs, it.targets, bins)
    for k in range(bins):
        inside = (conf > k/bins) & (conf <= (k + 1)/bins)
        assert cal.count[k] == inside.sum()
        if not inside.any(): assert np.isnan(cal.accuracy[k]) and np.isnan(cal.confidence[k]); continue
        c, r = conf[inside].mean(), right[inside].mean()
        assert abs(cal.confidence[k] - c) < 1e-12 and abs(cal.accuracy[k] - r) < 1e-12
        ece += inside.mean()*abs(r - c)
    assert abs(cal.ece - ece) < 1e-12


def test_calibration_at_the_edges():
    "A confidence of exactly 1/2 belongs to the bin below; sure and right is no error, sure and wrong is 1."
    half = measure_calibration(torch.full((4, 2), .5), torch.tensor([0, 0, 1, 1]), 2)
    assert half.count.tolist() == [4, 0] and half.ece == 0
    for y, ece in ((0, 0), (1, 1)): assert measure_calibration(torch.tensor([[1., 0.]]*2), torch.tensor([y, y])).ece == ece


# ---------------------------------------------------------------- from a learner: row i is picture i


@pytest.mark.parametrize('kw', [{}, {'kept': True}, {'make_dl': item_dl}], ids=['read as it goes', 'in memory', 'the plain loader'])
def test_from_a_learner(folder, kw):
    learn = learner(folder, 1, **kw)
    it, src = Interpretation.from_learner(learn), learn.data.source.valid
    assert it.vocab == sorted(COLOURS) and it.names == NAMES and len(it) == 15
    assert it.targets.tolist() == src.y.items.tolist() and [*map(str, it.files)] == [*map(str, src.x.items)]
    for i in (0, 6, 14):
        label, probs = learn.predict(it.files[i])
        assert it.item(i).equal(src.x[i]) and it.vocab[it.decoded[i]] == label and torch.allclose(it.probs[i].float(), probs, atol=1e-6)
    assert abs(it.losses.mean().item() - learn.validate()['loss']) < 1e-5
    train, src = Interpretation.from_learner(learn, learn.data.train_dl), learn.data.source.train          # it shuffles
    assert train.targets.tolist() == src.y.items.tolist() and train.files[3] == src.x.items[3] and train.item(5).equal(src.x[5])
    shown = [ax.get_title() for ax in it.plot_top_losses(3).axes if ax.get_title()]
    worst = it.top_losses(3)[1].tolist()
    assert len(shown) == 3 and all(f'{it.losses[i]:.2f}' in s and f'is {it.names[it.targets[i]]}' in s for i, s in zip(worst, shown))
    learn.data.valid_dl = learner(folder, 1, **kw).data.train_dl                                          # of another bunch, put into this one
    swapped = Interpretation.from_learner(learn)
    assert swapped.files == train.files and swapped.item(5).equal(train.item(5)) and swapped.targets.equal(train.targets)
    assert it.plot_confusion_matrix() and plot_reliability(measure_calibration(it.probs, it.targets)) and all(n in repr(it) for n in ('15', *NAMES))


@pytest.mark.parametrize('kept', [False, True])
def test_skipped_files_do_not_shift_the_names(folder, tmp_path, kept):
    shutil.copytree(folder, d := tmp_path/'d')
    for side in ('val', 'train'): (d/side/'n03028079/1.png').write_text('no picture')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = learner(d, 1, kept, on_error='skip')
        its = [Interpretation.from_learner(learn), Interpretation.from_learner(learn, learn.data.train_dl)]
    for it, n in zip(its, (14, 23)):
        assert len(it) == n == len(it.files) and all(f.parent.name == it.vocab[t] for f, t in zip(it.files, it.targets))
        for i in (0, n//2, n - 1): assert it.item(i).equal(learn.data.source.valid.x.new([it.files[i]])[0])


def test_pictures_kept_by_the_lesson_and_a_net_of_more_outputs(folder):
    "`most_confused` ended in an IndexError for the fourth and fifth of five outputs."
    learn = Learner(net(5), decoded(items(folder)).to_databunch(8, c_out=5, seed=0, num_workers=0), F.cross_entropy, cbs=[CudaCallback('cpu'), norm()])
    learn.model[-1].bias.data[4] = 100.
    it = Interpretation.from_learner(learn)
    assert it.files[7].parent.name == it.vocab[it.targets[7]] and it.item(7).equal(learn.data.valid_ds[7][0])
    assert it.most_confused() == [(n, '4', 5) for n in NAMES] and it.per_class()['precision'][4] == 0
    assert it.plot_top_losses(1) and cam(learn, it.item(0)).name == '4'


def test_tensors_and_plain_loaders(learn):
    torch.manual_seed(0)
    ds = [Dataset(torch.rand(n, 3, 8, 8), torch.randint(0, 3, (n,))) for n in (20, 11)]
    plain = Learner(net(), DataBunch(*get_dls(*ds, 4, seed=1), 3, 3), F.cross_entropy, cbs=CudaCallback('cpu'))
    for dl, d in ((None, ds[1]), (plain.data.train_dl, ds[0])):
        it = Interpretation.from_learner(plain, dl)
        assert it.targets.equal(d.y) and it.files is None and it.item(9).equal(d.x[9]) and it.names == ['0', '1', '2'] and it.plot_top_losses(2)
    some = torch.utils.data.DataLoader(ds[1], 2, sampler=torch.utils.data.SubsetRandomSampler([8, 3, 5]))
    it = Interpretation.from_learner(plain, some)
    assert it.targets.equal(ds[1].y[[3, 5, 8]]) and it.item(1).equal(ds[1].x[5])
    assert torch.allclose(Interpretation.from_learner(plain, [(ds[1].x, ds[1].y)]).preds, Interpretation.from_learner(plain).preds, atol=1e-6)
    with pytest.raises(ValueError): Interpretation.from_learner(plain, [ds[1].x])
    other = Interpretation.from_learner(learn, ItemLoader(learn.data.source.valid, 4, seed=0))              # a loader of one's own
    assert other.files == Interpretation.from_learner(learn).files
    with pytest.raises(ValueError): Interpretation.from_learner(of(net()))


@pytest.mark.parametrize('loss, ignored', [(F.cross_entropy, -100), (nn.CrossEntropyLoss(ignore_index=1), 1),
                                           (partial(F.cross_entropy, ignore_index=0), 0), (LabelSmoothing(.1), -100)], ids=range(4))
def test_what_the_loss_ignores_is_left_out(loss, ignored):
    "Their losses were NaN, so they were the worst mistakes, and the mean was none."
    torch.manual_seed(0)
    x, y = torch.randn(40, 3, 8, 8), torch.randint(3, (40,))
    y[::4] = ignored
    keep = (y != ignored).nonzero().flatten()
    learn = Learner(net(), DataBunch(*get_dls(Dataset(x, y), Dataset(x, y), 8), 3, 3), loss, cbs=CudaCallback('cpu'))
    it = Interpretation.from_learner(learn)
    assert 0 < len(it) < 40 and it.targets.equal(y[keep]) and it.losses.isfinite().all()
    for i in (0, 7, len(it) - 1): assert it.item(i).equal(x[keep[i]])
    numbers = Learner(net(1), DataBunch(None, [(x, y.float())], 3, 1), lambda p, t: F.mse_loss(p.view_as(t), t), cbs=CudaCallback('cpu'))
    assert len(Interpretation.from_learner(numbers)) == 40, 'of numbers none is ignored'


# ---------------------------------------------------------------- class activation maps


def by_hand(maps, rest, c):
    "The map in three lines: the score of `c` as a function of the maps (1, K, H, W)."
    maps = maps.detach().requires_grad_()
    g, = torch.autograd.grad(rest(maps)[0, c], maps)
    return (g[0].sum((1, 2))[:, None, None]*maps.detach()[0]).sum(0)


def test_cam_is_the_logit_spread_over_the_picture(learn):
    x, f = learn.data.source.valid.x[7], learn.data.source.valid.x.items[7]
    fc, logits = learn.model[-1], learn.get_preds([x[None]])[0][0]
    with torch.no_grad(): maps = learn.model.eval()[:2](NormalizeBytes([.4]*3, [.3]*3)(x[None]))[0]      # the layers called one by one
    for c, name in enumerate(NAMES):
        m = cam(learn, x, c)
        want = sum(fc.weight[c, k].item()*maps[k] for k in range(8))
        assert (m.map - want).abs().max() < 1e-5 and m.cls == c and m.name == name and abs(m.score - logits[c].item()) < 1e-5
        assert abs(m.map.mean() + fc.bias[c] - m.score) < 1e-5
        for same in (cam(learn, x, name), cam(learn, x, sorted(COLOURS)[c]), cam(learn, f, c), cam(learn, Image.open(f), c), cam(learn, x, c, '1'), cam(learn, x, c, learn.model[1])):
            assert same.map.equal(m.map) and same.cls == c
    assert cam(learn, x).cls == logits.argmax()


@pytest.mark.parametrize('layer', ['0', '0.0', '1.0'])
def test_grad_cam_of_any_layer_by_finite_differences(learn, layer):
    "Add a little to a whole map and see what the score does. The convolutions are followed by a ReLU that writes over them."
    x, model, seen, add = learn.data.source.valid.x[3], copy.deepcopy(learn.model).double().eval(), {}, {}
    def hook(m, i, o):
        seen['out'] = o.detach().clone()
        return o + add['d'] if 'd' in add else None
    model.get_submodule(layer).register_forward_hook(hook)
    with torch.no_grad():
        model(batch := NormalizeBytes([.4]*3, [.3]*3)(x[None]).double())
        maps, want = seen['out'][0], 0
        for k in range(len(maps)):
            scores = []
            for eps in (1e-6, -1e-6):
                add['d'] = torch.zeros_like(maps)[None]
                add['d'][0, k] = eps
                scores.append(model(batch)[0])
            want = want + ((scores[0] - scores[1])/2e-6)[:, None, None]*maps[k]
    for c in range(3): assert torch.allclose(cam(learn, x, c, layer).map.double(), want[c], atol=1e-4, rtol=1e-3)
    assert want.abs().max() > .01


class OneRelu(nn.Module):
    "The same ReLU on the maps and on what was pooled."
    def __init__(self): super().__init__(); self.conv, self.relu, self.mid, self.fc = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)
    def rest(self, maps): return self.fc(self.relu(self.mid(maps.mean((2, 3), keepdim=True))).flatten(1))
    def forward(self, x): return self.rest(self.relu(self.conv(x)))


class Concat(nn.Module):
    def forward(self, x): return torch.cat([x.amax((2, 3), keepdim=True), x.mean((2, 3), keepdim=True)], 1)


HEADS = {'no pooling': (nn.Flatten(), nn.Linear(480, 4)), 'max': (nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 4)), 'max and mean': (Concat(), nn.Flatten(), nn.Linear(12, 4)),
         'two layers': (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), 'a norm': (nn.AdaptiveAvgPool2d(1), nn.GroupNorm(1, 6), nn.Flatten(), nn.Linear(6, 4))}


@pytest.mark.parametrize('head', HEADS)
def test_any_head_is_seen_from_the_last_map(head):
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True))
    model, x = nn.Sequential(conv, *HEADS[head]).eval(), torch.randn(3, 12, 10)
    for c in range(4): assert torch.allclose(cam(of(model), x, c).map, by_hand(conv(x[None]), model[1:], c), atol=1e-5)
    once = OneRelu().eval()
    assert torch.allclose(cam(of(once), x, 1).map, by_hand(F.relu(once.conv(x[None])), once.rest, 1), atol=1e-5)


@pytest.mark.parametrize('name', ['resnet18', 'shufflenet_v2_x0_5'])
def test_other_peoples_nets(name):
    "Nets that pool by a layer, or by a bare mean in forward."
    models = pytest.importorskip('torchvision.models')
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=5).eval()
    m = cam(of(model, 5), torch.randn(3, 64, 64), 3)
    assert m.map.shape == (2, 2) and abs(m.map.mean().item() + model.fc.bias[3].item() - m.score) < 1e-4*max(1, abs(m.score))


def test_what_has_no_map_or_no_such_class(learn):
    x = learn.data.source.valid.x[0]
    with pytest.raises(ValueError): cam(of(nn.Sequential(nn.Flatten(), nn.Linear(192, 3))), torch.randn(3, 8, 8))
    for call, error in ((dict(cls='horse'), ValueError), (dict(cls=3), IndexError), (dict(layer='9'), AttributeError), (dict(layer='5'), ValueError)):
        with pytest.raises(error): cam(learn, x, **call)
    assert not any(m._forward_hooks for m in learn.model.modules()), 'a hook was left behind'


def test_overlay_lights_the_place():
    x, heat = torch.full((3, 32, 32), 100, dtype=torch.uint8), torch.zeros(4, 4)
    heat[0, 3], heat[3, 0] = 5., -5.
    o = overlay(x, heat)
    far = (o - 100/255).abs().sum(0)
    assert o.shape == (3, 32, 32) and 0 <= o.min() and o.max() <= 1 and far[:8, 24:].mean() > .2 and far[24:, :8].max() < 1e-6
    assert overlay(x, torch.zeros(4, 4)).sub(100/255).abs().max() < 1e-6


# ---------------------------------------------------------------- a look leaves no trace


def fingerprint(learn):
    "Everything that a look could change, as bytes."
    out, model = io.BytesIO(), learn.model
    torch.save([model.state_dict(), [(n, m.training, len(m._forward_hooks)) for n, m in model.named_modules()], [(p.grad, p.requires_grad) for p in model.parameters()],
                torch.get_rng_state(), learn.data.train_dl.epoch, learn.n_iter, learn.epoch, repr(learn.opt.hypers), [sorted(s) for s in learn.opt.state.values()]], out)
    return out.getvalue(), pickle.dumps(np.random.get_state()), [id(cb) for cb in learn.cbs], [vars(cb).keys() for cb in learn.cbs], torch.is_grad_enabled(), id(model), learn.loss_func


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, BatchNorm, RunningBatchNorm])
def test_looking_changes_nothing(folder, norm, monkeypatch):
    learn = learner(folder, 0)
    learn.model = net(norm=norm)
    learn.fit(1, reset_opt=True)
    learn.model.train()
    learn.model[0].eval()                                                          # a mixture of modes, and gradients that are there
    for p in learn.model[0].parameters(): p.grad = torch.ones_like(p)
    x, before = learn.data.source.valid.x[0], fingerprint(learn)
    looks = [lambda: Interpretation.from_learner(learn, learn.data.train_dl).plot_top_losses(2), lambda: cam(learn, x), lambda: cam(learn, x, 1, '0.0'), lambda: show_cam(learn, [x, x], [0, 1])]
    for look in looks:
        look()
        assert fingerprint(learn) == before
    def broken(*args): raise KeyError('in the middle')
    monkeypatch.setattr(learn.model[-1], 'forward', broken)
    with pytest.raises(KeyError): cam(learn, x)
    monkeypatch.undo()
    assert fingerprint(learn) == before
