"""Mixup, CutMix, label smoothing, distillation, false labels: beside torch's own losses on mixed targets, in fits that are broken off and resumed."""
import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from event_log import Log
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from exp.callbacks import (EVENTS, AvgStatsCallback, BatchTransformXCallback, Callback, CancelBatchException, CancelFitException, DataBunch, Dataset,
                           Runner, accuracy, get_dls)
from exp.checkpoints import Checkpoint
from exp.export_models import export
from exp.learner import Learner, set_seed
from exp.training_callbacks import GradientAccumulation, GradientClip
from exp.distillation import Distillation, distill_loss, noisy_labels
from exp.mixup import CutMix, LabelSmoothing, MixLoss, Mixup, OneOf, draw_boxes, draw_shares, item_losses, show_mixed
from exp.optimizers import adam_opt, sgd_mom_opt, sgd_opt

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(140, 3, 6, 5, generator=G), torch.randint(0, 4, (140,), generator=G)
H = torch.eye(4)


def toy(bs=32, n=99, y=Y): return DataBunch(*get_dls(Dataset(X[:n], y[:n]), Dataset(X[100:], y[100:]), bs, seed=0), 3, 4)


def net(norm=True, drop=0., n=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *([nn.BatchNorm2d(8)] if norm else []), nn.ReLU(), nn.Dropout(drop), nn.Flatten(), nn.Linear(240, n))


def learner(*cbs, data=None, loss=F.cross_entropy, opt_func=sgd_mom_opt, model=None, **kw):
    return Learner(model or net(), data or toy(), loss, opt_func, lr=.05, cbs=list(cbs), **kw)


def weights(m): return torch.cat([t.detach().flatten().double() for t in m.state_dict().values()])


class Seen(Callback):
    "What each training batch looked like after mixing, and its loss."
    _order = 6
    def __init__(self): self.rows = []
    def after_loss(self, run):
        if run.in_train: self.rows.append((run.xb, run.yb, run.loss_func.lam, run.loss_func.perm, run.loss.detach(), run.pred.detach()))


# the losses

def losses():
    w = torch.tensor([.2, 1., 3., .5])
    def own(pred, yb): return F.cross_entropy(pred, yb)
    class Own(nn.Module):
        def forward(self, pred, yb): return F.cross_entropy(pred, yb)
    return {'cross_entropy': F.cross_entropy, 'object': nn.CrossEntropyLoss(), 'smoothed': partial(F.cross_entropy, label_smoothing=.1), 'ours, smoothed': LabelSmoothing(.1),
            'weighted': nn.CrossEntropyLoss(weight=w), 'weighted, smoothed': partial(F.cross_entropy, weight=w, label_smoothing=.2), 'sum': nn.CrossEntropyLoss(reduction='sum'),
            'a function of ours': own, 'a module of ours': Own(), 'lambda': lambda p, y: F.cross_entropy(p, y)}


@pytest.mark.parametrize('name', losses())
def test_share_of_one_is_the_plain_loss_to_the_bit_with_its_gradient(name):
    loss = losses()[name]
    for n in (1, 2, 7, 33):
        pred = torch.randn(n, 4, generator=G).requires_grad_()
        mix = MixLoss(loss)
        mix.set(torch.ones(n), torch.randperm(n, generator=G))
        a, b = mix(pred, Y[:n]), loss(pred, Y[:n])
        assert a.equal(b) and torch.autograd.grad(a, pred)[0].equal(torch.autograd.grad(b, pred)[0])


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 9), c=st.integers(2, 6), eps=st.sampled_from([0., .1, .7]), each=st.booleans(), seed=st.integers(0, 999))
def test_equals_the_loss_on_mixed_one_hot_targets(n, c, eps, each, seed):
    g = torch.Generator().manual_seed(seed)
    pred, yb = torch.randn(n, c, generator=g, dtype=torch.float64).requires_grad_(), torch.randint(0, c, (n,), generator=g)
    lam, perm = torch.rand(n if each else 1, generator=g), torch.randperm(n, generator=g)
    hot, l = F.one_hot(yb, c).double(), lam.double()[:, None]
    want = F.cross_entropy(pred, l*hot + (1 - l)*hot[perm], label_smoothing=eps)
    for loss in (partial(F.cross_entropy, label_smoothing=eps), nn.CrossEntropyLoss(label_smoothing=eps), LabelSmoothing(eps)):
        mix = MixLoss(loss)
        mix.set(lam, perm)
        got = mix(pred, yb)
        assert torch.allclose(got, want, rtol=1e-6)
        assert torch.allclose(*(torch.autograd.grad(o, pred, retain_graph=True)[0] for o in (got, want)), atol=1e-7)


@pytest.mark.parametrize('n', [1, 5])
def test_several_labels_at_once(n):
    pred, t = torch.randn(n, 6, generator=G), (torch.rand(n, 6, generator=G) > .6).float()
    lam, perm = torch.rand(n, generator=G), torch.randperm(n, generator=G)
    for loss in (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss(pos_weight=torch.rand(6, generator=G))):
        mix = MixLoss(loss)
        mix.set(lam, perm)
        assert torch.allclose(mix(pred, t), loss(pred, lam[:, None]*t + (1 - lam[:, None])*t[perm]), atol=1e-6)
        mix.set(torch.ones(n), perm)
        assert mix(pred, t).equal(loss(pred, t))


def test_class_weights_and_ignored_labels():
    "By hand: what each of the two labels weighs, and nothing for one that is ignored."
    w, yb = torch.tensor([.2, 1., 3., .5]), torch.tensor([0, 1, -100, 3, 2])
    pred, lam, perm = torch.randn(5, 4, generator=G), torch.rand(5, generator=G), torch.tensor([3, 2, 0, 4, 1])
    logp, num, den = pred.log_softmax(1), 0., 0.
    for i in range(5):
        for share, label in ((lam[i], yb[i]), (1 - lam[i], yb[perm[i]])):
            if label >= 0: num += share*w[label]*-logp[i, label]; den += share*w[label]
    for loss in (nn.CrossEntropyLoss(weight=w), partial(F.cross_entropy, weight=w)):
        mix = MixLoss(loss)
        mix.set(lam, perm)
        assert torch.allclose(mix(pred, yb), num/den)


def test_pixels_with_a_label_each():
    pred, yb = torch.randn(3, 4, 5, 6, generator=G), torch.randint(0, 4, (3, 5, 6), generator=G)
    lam, perm = torch.rand(3, generator=G), torch.tensor([2, 0, 1])
    mix = MixLoss(F.cross_entropy)
    mix.set(lam, perm)
    a, b = (F.cross_entropy(pred, t, reduction='none').mean((1, 2)) for t in (yb, yb[perm]))
    assert torch.allclose(mix(pred, yb), (lam*a + (1 - lam)*b).mean())


def test_nothing_is_done_to_the_readers_loss():
    loss = nn.CrossEntropyLoss(weight=torch.rand(4))
    before = {k: v for k, v in vars(loss).items()}
    item_losses(loss, torch.randn(5, 4), Y[:5])
    assert vars(loss) == before and loss.reduction == 'mean'


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 9), eps=st.floats(0, 1), ignore=st.booleans(), reduction=st.sampled_from(['mean', 'sum', 'none']), pixels=st.booleans())
def test_label_smoothing_equals_torchs(n, eps, ignore, reduction, pixels):
    g = torch.Generator().manual_seed(n)
    pred, yb = torch.randn(n + 1, 5, *([3] if pixels else []), generator=g, dtype=torch.float64), torch.randint(0, 5, (n + 1, *([3] if pixels else [])), generator=g)
    if ignore: yb[0] = -100
    assert torch.allclose(LabelSmoothing(eps, reduction)(pred, yb), F.cross_entropy(pred, yb, label_smoothing=eps, reduction=reduction))


def test_label_smoothing_says_what_is_wrong():
    with pytest.raises(ValueError, match='1.5'): LabelSmoothing(1.5)
    with pytest.raises(ValueError, match='avg'): LabelSmoothing(.1, 'avg')
    with pytest.raises(ValueError, match='4 outputs.* 7'): learner(loss=LabelSmoothing(), data=toy(y=Y.where(Y != 2, 7))).fit(1)


# drawing and mixing

@pytest.mark.parametrize('alpha', [.1, .4, 1., 8.])
def test_shares_are_beta_distributed(alpha):
    lam = draw_shares(20_000, alpha, torch.Generator().manual_seed(1)).double()
    var = 1/(4*(2*alpha + 1))
    kurt = var**2*3*(1 + 2*alpha)/(3 + 2*alpha)                          # fourth central moment of Beta(α, α)
    assert lam.min() >= 0 and lam.max() <= 1
    assert abs(lam.mean() - .5) < 4*math.sqrt(var/20_000) and abs(lam.var() - var) < 4*math.sqrt((kurt - var**2)/20_000)


@pytest.mark.parametrize('make', [Mixup, CutMix, lambda **k: OneOf(Mixup(), CutMix(), **k)], ids=['Mixup', 'CutMix', 'OneOf'])
def test_draws_follow_from_the_seed_and_touch_no_other_generator(make):
    before = torch.get_rng_state()
    a, b, c = make(seed=1), make(seed=1), make(seed=2)
    xs = [[m(X[:9])[0] for _ in range(5)] for m in (a, b, c)]
    assert all(p.equal(q) for p, q in zip(*xs[:2])) and not all(p.equal(q) for p, q in zip(xs[0], xs[2]))
    assert not xs[0][0].equal(xs[0][1]) and torch.get_rng_state().equal(before)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 8), h=st.integers(1, 20), w=st.integers(1, 20), each=st.booleans(), seed=st.integers(0, 99))
def test_cutmix_label_is_the_area_to_the_pixel(n, h, w, each, seed):
    flat = torch.arange(n)[:, None, None, None].expand(n, 2, h, w).to(torch.uint8)
    xm, lam, perm = CutMix(each=each, seed=seed)(flat)
    assert xm.dtype == torch.uint8 and lam.shape == (n if each else 1,)
    for i, l in enumerate(lam.expand(n).tolist()):
        if perm[i] == i: assert (xm[i] == i).all(); continue
        assert round(l*h*w) == (xm[i, 0] == i).sum().item() and math.isclose(l*h*w, round(l*h*w), abs_tol=1e-3)
        rows, cols = [(xm[i, 0] == perm[i]).any(d).nonzero().flatten() for d in (1, 0)]
        if len(rows): assert (xm[i][:, rows.min():rows.max() + 1, cols.min():cols.max() + 1] == perm[i]).all()          # one whole box


def test_boxes_in_the_middle_have_the_area_that_was_drawn():
    lam = torch.full((20_000,), .91)                                      # sides 0.3: away from the edges for many centres
    top, bottom, left, right = draw_boxes(lam, 1000, 800, torch.Generator().manual_seed(0)).T.double()
    inside = (top > 0) & (bottom < 1000) & (left > 0) & (right < 800)
    area = ((bottom - top)*(right - left)/800_000)[inside]
    assert .4 < inside.double().mean() < .6 and (area - .09).abs().max() < .002                      # (1 − 0.3)² of the centres
    centre = (top + bottom)[inside]/2
    assert abs(centre.mean() - 500) < 5 and abs(centre.std() - 700/math.sqrt(12)) < 5


def test_mixup_mixes_and_keeps_the_main_part():
    xm, lam, perm = Mixup(1., seed=3)(X[:64])
    l = lam[:, None, None, None]
    assert torch.allclose(xm, l*X[:64] + (1 - l)*X[:64][perm], atol=1e-6) and lam.min() >= .5 and lam.unique().numel() > 60
    assert Mixup(1e-5)(X[:9])[0].equal(X[:9]) and Mixup(1., each=False)(X[:9])[1].numel() == 1
    one = Mixup(1.)(X[:1])
    assert torch.allclose(one[0], X[:1]) and one[2].tolist() == [0]


def test_what_cannot_be_mixed():
    with pytest.raises(ValueError, match='floats'): Mixup()(X[:4].byte())
    with pytest.raises(ValueError, match=r'\(4, 90\)'): CutMix()(X[:4].flatten(1))
    with pytest.raises(ValueError, match='OneOf'): learner().fit(1, [Mixup(), CutMix()])
    with pytest.raises(ValueError, match='leaves nothing'): learner().fit(2, Mixup(stop=2))
    for wrong in (lambda: Mixup(0), lambda: Mixup(-1.), lambda: Mixup(stop=-1), lambda: Mixup(stop=1.5), lambda: OneOf()):
        with pytest.raises(ValueError): wrong()


# in a fit

@pytest.mark.parametrize('make', [Mixup, partial(Mixup, each=False), CutMix, lambda: OneOf(Mixup(), CutMix())], ids=['Mixup', 'one share', 'CutMix', 'OneOf'])
def test_loss_is_of_the_mixture_and_metrics_of_the_true_labels(make):
    stats, seen = AvgStatsCallback(accuracy, silent=True), Seen()
    learn = learner(stats, seen, make())
    learn.fit(1)
    assert [len(r[0]) for r in seen.rows] == [32, 32, 32, 3]              # an odd batch at the end
    right = total = loss = 0
    for xb, yb, lam, perm, l, pred in seen.rows:
        lam = lam.expand(len(xb))[:, None]
        assert torch.allclose(l, F.cross_entropy(pred, lam*H[yb] + (1 - lam)*H[yb[perm]]), atol=1e-6)
        right, total, loss = right + (pred.argmax(1) == yb).sum().item(), total + len(xb), loss + l.item()*len(xb)
    row = stats.rows[0]
    assert math.isclose(row['train_accuracy'], right/total, rel_tol=1e-6) and math.isclose(row['train_loss'], loss/total, rel_tol=1e-5)
    with torch.no_grad(): pred = learn.model.eval()(X[100:])
    assert math.isclose(row['valid_loss'], F.cross_entropy(pred, Y[100:]).item(), rel_tol=1e-5)       # validation is plain
    assert sorted(y.item() for r in seen.rows for y in r[1]) == sorted(Y[:99].tolist())


def test_batches_of_one():
    learner(data=toy(1, 5), model=net(norm=False)).fit(1, seen := [Mixup(1.), Seen()])
    for xb, yb, lam, perm, l, pred in seen[1].rows: assert torch.allclose(l, F.cross_entropy(pred, yb), atol=1e-6)


@pytest.mark.parametrize('stop, mixed', [(0, 12), (1, 8), (2, 4), (1/3, 8), (.5, 6), (.25, 9)])
def test_stop(stop, mixed):
    learner().fit(3, [Mixup(stop=stop), s := Seen()])
    assert [r[2] is not None for r in s.rows] == [True]*mixed + [False]*(12 - mixed)
    for xb, yb, lam, perm, l, pred in s.rows[mixed:]: assert l.equal(F.cross_entropy(pred, yb))


@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('kind', ['Learner', 'Runner'])
def test_nothing_stays_behind_whatever_happens(event, kind):
    teacher, loss = net(), nn.CrossEntropyLoss()
    teacher[1].eval()
    modes, before = [m.training for m in teacher.modules()], copy.deepcopy(teacher.state_dict())
    for error, nth in ((ZeroDivisionError, 1), (KeyboardInterrupt, 2), (CancelBatchException, 1), (CancelFitException, 1)):
        if error in (CancelBatchException, CancelFitException) and event in ('begin_fit', 'after_fit', 'after_cancel_batch', 'after_cancel_epoch', 'after_cancel_fit'): continue
        for order in (-20, 50):
            log = Log(event, error, nth)
            log._order = order
            cbs = [Mixup(), Distillation(teacher), log]
            run = learner(loss=loss) if kind == 'Learner' else Runner(m := net(), toy(), loss, torch.optim.SGD(m.parameters(), lr=.05), cbs)
            try: run.fit(2, cbs) if kind == 'Learner' else run.fit(2)
            except (ZeroDivisionError, KeyboardInterrupt, CancelBatchException): pass
            if not (kind == 'Runner' and event == 'after_fit' and order < 0):                        # there the old Runner calls nobody else
                assert run.loss_func is loss and loss.reduction == 'mean'
                assert [m.training for m in teacher.modules()] == modes
            for m, on in zip(teacher.modules(), modes): m.training = on
            assert all(v.equal(before[k]) for k, v in teacher.state_dict().items())


def test_runner_and_learner_train_the_same():
    a = Runner(m := net(), toy(), F.cross_entropy, torch.optim.SGD(m.parameters(), lr=.05), [Mixup()]).fit(2)
    b = learner(opt_func=torch.optim.SGD).fit(2, Mixup())
    assert weights(a.model).equal(weights(b.model))


def test_looks_see_plain_batches_and_exports_carry_no_mixing(tmp_path):
    learn = learner(Mixup())
    learn.fit(1)
    assert math.isclose(learn.validate()['loss'], F.cross_entropy(learn.model.eval()(X[100:]), Y[100:]).item(), rel_tol=1e-5)
    assert learn.get_preds(learn.data.train_dl)[1].shape == (99,)
    learn.lr_find(max_iter=12)
    export(learn, tmp_path/'e.pt')
    learn.fit(1)
    assert learn.loss_func is F.cross_entropy


def test_with_accumulation_and_clipping():
    "By hand from what the batches were: the mean over all items of two batches, clipped."
    seen = Seen()
    seen._order = 4                                                       # before accumulation makes sums of the losses
    learn = learner(seen, Mixup(), GradientAccumulation(2), GradientClip(.5), model=net(norm=False), opt_func=sgd_opt, data=toy(16, 48))
    first = copy.deepcopy(learn.model)
    class Stop:
        def after_step(self, run): raise CancelFitException
    learn.fit(1, Stop())
    assert len(seen.rows) == 2
    loss = sum(len(xb)*F.cross_entropy(first(xb), lam[:, None]*H[yb] + (1 - lam[:, None])*H[yb[perm]]) for xb, yb, lam, perm, _, _ in seen.rows)/32
    loss.backward()
    nn.utils.clip_grad_norm_(first.parameters(), .5)
    for p, q in zip(first.parameters(), learn.model.parameters()): assert torch.allclose(p - .05*p.grad, q, atol=1e-6)


@pytest.mark.parametrize('make', [Mixup, CutMix, lambda: OneOf(Mixup(), CutMix())], ids=['Mixup', 'CutMix', 'OneOf'])
@pytest.mark.parametrize('at', [4, 6, 9])
def test_resumes_to_the_bit(make, at, tmp_path):
    class Kill:
        _order = 2000
        def after_batch(self, run):
            if run.n_iter == at: raise KeyboardInterrupt
    def run(*cbs, start=False):
        ck = Checkpoint(tmp_path, every=1)
        learn = learner(model=net(drop=.3), opt_func=adam_opt())
        set_seed(3)
        begin = ck.start(learn) if start else (0, 0)
        try: learn.fit(4, [make(), BatchTransformXCallback(lambda x: x*2), *([ck] if cbs or start else []), *cbs], start=begin)
        except KeyboardInterrupt: pass
        return learn
    whole = run()
    run(Kill())
    assert weights(run(start=True).model).equal(weights(whole.model))


# distillation

def test_distillation_has_the_gradient_of_the_paper_and_that_loss():
    z, r = torch.randn(6, 5, generator=G, dtype=torch.float64).requires_grad_(), torch.randn(6, 5, generator=G, dtype=torch.float64)
    for T in (1., 4., 20.):
        p, q = (r/T).softmax(1), (z/T).softmax(1)
        paper = -T*T*(p*q.log()).sum(1).mean()
        entropy = -T*T*(p*p.log()).sum(1).mean()
        ours = distill_loss(z, r, T)
        assert torch.allclose(ours, paper - entropy) and torch.allclose(*(torch.autograd.grad(o, z, retain_graph=True)[0] for o in (ours, paper)))


def test_distillation_in_a_fit():
    teacher, seen = net(n=4, drop=.5), []
    with torch.no_grad(): teacher[-1].weight.normal_()
    teacher.train(); before = copy.deepcopy(teacher.state_dict())
    class Look(Callback):
        def after_loss(self, run): seen.append((run.in_train, run.xb, run.yb, run.pred.detach(), run.loss.detach(), teacher.training))
    learn = learner(Look(), Distillation(teacher, T=5., weight=.5), model=net(norm=False))
    with torch.no_grad(): learn.model[-1].weight.mul_(.5)
    learn.fit(1)
    ref = copy.deepcopy(teacher).eval()
    for train, xb, yb, pred, loss, mode in seen:
        want = F.cross_entropy(pred, yb)
        with torch.no_grad():
            if train: want = want + .5*25*F.kl_div((pred/5).log_softmax(1), (ref(xb)/5).softmax(1), reduction='batchmean')
        assert torch.allclose(loss, want, rtol=1e-4) and not mode
    assert teacher.training and all(v.equal(before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    with pytest.raises(ValueError, match=r'the teacher gives \(32, 7\), the student \(32, 4\)'): learn.fit(1, Distillation(net(n=7)))
    with pytest.raises(ValueError, match='are one'): learn.fit(1, Distillation(learn.model))


def test_distillation_of_mixed_pictures():
    "The teacher sees what the student sees; both wrappers are around one loss."
    inputs, student = [], []
    teacher = net()
    teacher.register_forward_hook(lambda m, i, o: inputs.append(i[0]))
    class Look(Callback):
        def after_pred(self, run):
            if run.in_train: student.append(run.xb)
    learn = learner().fit(1, [Distillation(teacher), Mixup(), Look()])
    assert len(inputs) == len(student) == 4 and all(a is b for a, b in zip(inputs, student)) and learn.loss_func is F.cross_entropy


# false labels

@settings(deadline=None, max_examples=60)
@given(n=st.integers(0, 60), c=st.integers(2, 12), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_noisy_labels(n, c, share, seed):
    y = torch.randint(0, c, (n,), generator=torch.Generator().manual_seed(seed))
    old, noisy = y.clone(), noisy_labels(y, share, c, seed)
    assert (noisy != y).sum() == round(share*n) and y.equal(old) and noisy.dtype == y.dtype
    assert not n or 0 <= noisy.min() and noisy.max() < c
    assert noisy.equal(noisy_labels(y, share, c, seed))


def test_false_labels_are_spread_evenly_over_the_other_classes():
    y = torch.arange(5).repeat(4000)
    noisy = noisy_labels(y, .5, 5, seed=1)
    table = torch.zeros(5, 5).index_put_((y, noisy), torch.ones(len(y)), accumulate=True)
    off = table[~torch.eye(5, dtype=torch.bool)]
    assert ((off - 500).abs() < 5*math.sqrt(500)).all() and (table.diag() - 2000).abs().max() < 5*math.sqrt(1000)
    for wrong in (lambda: noisy_labels(y, 1.2, 5), lambda: noisy_labels(y, .5, 1), lambda: noisy_labels(y, .5, 4)):
        with pytest.raises(ValueError): wrong()


def test_show_mixed_names_what_is_mixed():
    import matplotlib.pyplot as plt
    fig = show_mixed(CutMix(seed=2), (X[:4].sigmoid()*255).byte(), Y[:4], ['a', 'b', 'c', 'd'])
    _, lam, perm = CutMix(seed=2)(X[:4])
    want = [f'{l:.2f} {"abcd"[Y[i]]}\n{1 - l:.2f} {"abcd"[Y[j]]}' for i, (l, j) in enumerate(zip(lam.tolist(), perm.tolist()))]
    assert [ax.get_title() for ax in fig.axes][:4] == want
    plt.close('all')


# found by a second reading

class Callable:
    "A loss that is no module, with a reduction."
    def __init__(self, reduction): self.reduction = reduction
    def __call__(self, pred, yb): return F.cross_entropy(pred, yb, reduction=self.reduction)


def test_a_callable_loss_with_a_reduction_is_taken_item_by_item():
    pred, yb = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), Y[:7].clone()
    yb[2] = -100                                                         # counts for nothing, in a mean too
    for loss in (Callable('sum'), Callable('mean')):
        sums, counts = item_losses(loss, pred, yb)
        assert torch.allclose(sums.sum()/counts.sum(), loss(pred, yb)) and torch.allclose(sums, F.cross_entropy(pred, yb, reduction='none'))
        assert loss.reduction in ('sum', 'mean')


class OuterMean(nn.Module):
    "It has a reduction and does not follow it: the mean is taken inside."
    def __init__(self, reduction='mean'): super().__init__(); self.reduction, self.ce = reduction, nn.CrossEntropyLoss(reduction=reduction)
    def forward(self, pred, yb): return self.ce(pred, yb)


def mean_or_sum(pred, yb, reduction='mean'):
    l = F.cross_entropy(pred, yb, reduction='none')
    return l.sum() if reduction == 'sum' else l.mean()


def strict(pred, yb, reduction='mean'):
    if reduction not in ('mean', 'sum'): raise ValueError(reduction)
    return mean_or_sum(pred, yb, reduction)


@pytest.mark.parametrize('loss', [OuterMean(), OuterMean('sum'), mean_or_sum, partial(mean_or_sum, reduction='sum'), strict, lambda p, y: F.cross_entropy(p, y)])
def test_a_loss_that_gives_no_value_an_item_is_refused_or_mixed_with_one_share(loss):
    "A scalar used to be spread over the batch: every item's share counted as the mean of all shares."
    pred, yb, perm = torch.randn(4, 4, generator=G), Y[:4], torch.tensor([1, 2, 3, 0])
    mix = MixLoss(loss); mix.set(torch.tensor([.5, .6, .9, 1.]), perm)
    with pytest.raises(ValueError): mix(pred, yb)
    mix.set(torch.tensor([.7]), perm)
    assert torch.allclose(mix(pred, yb), .7*loss(pred, yb) + .3*loss(pred, yb[perm]))
    learner(loss=lambda p, y: F.cross_entropy(p, y)).fit(1, Mixup(each=False))
    with pytest.raises(ValueError, match='each=False'): learner(loss=lambda p, y: F.cross_entropy(p, y)).fit(1, Mixup())


def test_losses_with_another_mean():
    w = torch.tensor([.2, 1., 3., .5])
    logp, p, yb = torch.randn(6, 4, generator=G).log_softmax(1), torch.rand(6, 4, generator=G).softmax(1), Y[:6]
    def own(pred, yb, weight=w, reduction='mean'): l = F.cross_entropy(pred, yb, weight=weight, reduction='none'); return l.mean() if reduction == 'mean' else l
    for loss, t in ((nn.KLDivLoss(reduction='batchmean'), p), (partial(F.kl_div, reduction='batchmean'), p), (nn.MultiMarginLoss(weight=w), yb),
                    (partial(F.multi_margin_loss, weight=w), yb), (partial(own, weight=w), yb), (nn.NLLLoss(weight=w), yb), (partial(F.nll_loss, weight=w), yb), (partial(F.cross_entropy, weight=w), yb)):
        sums, counts = item_losses(loss, logp, t)
        assert sums.shape == counts.shape == (6,) and torch.allclose(sums.sum()/counts.sum(), loss(logp, t)), loss


def test_to_show_a_mixture_changes_nothing():
    for mixer in (Mixup(seed=3), CutMix(seed=3), OneOf(Mixup(), CutMix(), seed=3)):
        before = mixer.gen.get_state()
        show_mixed(mixer, X[:4].sigmoid(), Y[:4])
        assert mixer.gen.get_state().equal(before)


def test_smoothing_where_a_score_is_minus_infinity():
    pred, yb = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, -100, 2, 3])
    off = pred.clone(); off[:, 0] = -math.inf; off[0, 0] = 1.
    assert torch.allclose(LabelSmoothing(0.)(off, yb), F.cross_entropy(off, yb))
    ignored = pred.clone(); ignored[2, 1] = -math.inf
    assert torch.allclose(LabelSmoothing(.1)(ignored, yb), F.cross_entropy(ignored, yb, label_smoothing=.1))


def test_wrong_labels_of_bytes_are_all_classes():
    noisy = noisy_labels(torch.full((20_000,), 199, dtype=torch.uint8), 1., 200)
    assert noisy.dtype == torch.uint8 and noisy.unique().tolist() == list(range(199))


def test_a_stop_of_all_and_a_one_of_in_another_are_refused():
    for stop in (1., 2., -1):
        with pytest.raises(ValueError, match='stop'): Mixup(stop=stop)
    with pytest.raises(ValueError, match='OneOf'): OneOf(OneOf(Mixup()), CutMix())


def test_labels_that_are_ignored_or_only_look_so():
    p, y = torch.randn(5, generator=torch.Generator().manual_seed(0)), torch.tensor([1, -100, 2, 3, 4])
    a, n = item_losses(F.l1_loss, p, y)
    assert torch.allclose(a.sum()/n.sum(), F.l1_loss(p, y))
    p, y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 3, 2, -100])
    with pytest.raises(ValueError, match='reduction'): item_losses(lambda p, t: F.cross_entropy(p, t), p, y)


# found by a third reading

def total(pred, yb): return F.cross_entropy(pred, yb, reduction='sum')


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_one_share_a_batch_takes_any_loss(reduction):
    "A sum was once taken for a mean; a batch of one has one share as well."
    def own(pred, yb): return F.cross_entropy(pred, yb, reduction=reduction)
    mix, lam = MixLoss(own), torch.tensor([.3])
    for n in (1, 7):
        pred, yb, perm = torch.randn(n, 4, generator=G), Y[:n], torch.arange(n).roll(1)
        mix.set(lam, perm)
        assert torch.allclose(mix(pred, yb), F.cross_entropy(pred, .3*H[yb] + .7*H[yb[perm]], reduction=reduction))
    learner(loss=own, data=toy(1, 3), model=net(norm=False)).fit(1, Mixup(each=False))


@pytest.mark.parametrize('make', [Mixup, CutMix, lambda: OneOf(Mixup(), CutMix())])
@pytest.mark.parametrize('wrap', [lambda t: [t, t], lambda t: (t, t), lambda t: {'a': t}], ids=['list', 'tuple', 'dict'])
def test_targets_that_are_no_one_tensor_are_refused_in_a_sentence(make, wrap):
    mixer = make()
    mixer.loss = MixLoss(F.cross_entropy)
    run = SimpleNamespace(in_train=True, epoch=0, iter=0, iters=1, n_epochs=1, xb=X[:8], yb=wrap(Y[:8]))
    mixer.off, before = 0, mixer.gen.get_state()
    with pytest.raises(ValueError, match='one tensor of inputs, and one of targets'): mixer.begin_batch(run)
    assert run.xb.equal(X[:8]) and mixer.gen.get_state().equal(before)
    run.in_train = False
    mixer.begin_batch(run)                                               # validation is no business of it
