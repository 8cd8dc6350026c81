"""Mixup, CutMix, label smoothing, distillation, false labels: beside torch's losses on mixed targets, in fits broken off and resumed."""
import copy
import math
from functools import partial

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
from exp.distillation import Distillation, distill_loss, noisy_labels
from exp.export_models import export
from exp.learner import Learner, set_seed
from exp.mixup import CutMix, LabelSmoothing, Mixup, OneOf, draw_shares, loss_by_item, mixed_loss
from exp.optimizers import adam_opt, sgd_mom_opt, sgd_opt
from exp.training_callbacks import GradientAccumulation, GradientClip

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(140, 3, 6, 5, generator=G), torch.randint(0, 4, (140,), generator=G)
H, W = torch.eye(4), torch.tensor([.2, 1., 3., .5])
MIXERS = dict(argvalues=[Mixup, CutMix, lambda **k: OneOf(Mixup(), CutMix(), **k)], ids=['Mixup', 'CutMix', 'OneOf'])


def toy(bs=32, n=99, y=Y): return DataBunch(*get_dls(Dataset(X[:n], y[:n]), Dataset(X[100:], y[100:]), bs, seed=0), 3, 4)


def net(norm=True, drop=0., n=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *([nn.BatchNorm2d(8)] if norm else []), nn.ReLU(), nn.Dropout(drop), nn.Flatten(), nn.Linear(240, n))


def learner(*cbs, data=None, loss=F.cross_entropy, opt_func=sgd_mom_opt, model=None):
    return Learner(model or net(), data or toy(), loss, opt_func, lr=.05, cbs=list(cbs))


def weights(m): return torch.cat([t.detach().flatten().double() for t in m.state_dict().values()])


class Seen(Callback):
    "Each training batch after mixing, with its loss."
    def __init__(self, mixer, order=4): self.mixer, self.rows, self._order = mixer, [], order
    def after_loss(self, run):
        m = self.mixer
        if run.in_train: self.rows.append((run.xb, run.yb, m.lam if m.mixes else None, m.perm if m.mixes else None, run.loss.detach(), run.pred.detach()))


def mixed_targets(yb, lam, perm): return lam.expand(len(yb))[:, None]*H[yb] + (1 - lam.expand(len(yb))[:, None])*H[yb[perm]]


# the losses

@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 9), c=st.integers(2, 6), eps=st.sampled_from([0., .1, .7]), each=st.booleans(), seed=st.integers(0, 999), how=st.sampled_from(['mean', 'sum']))
def test_equals_the_loss_on_mixed_one_hot_targets(n, c, eps, each, seed, how):
    g = torch.Generator().manual_seed(seed)
    pred, yb = torch.randn(n, c, generator=g, dtype=torch.float64).requires_grad_(), torch.randint(0, c, (n,), generator=g)
    lam, perm = torch.rand(n if each else 1, generator=g), torch.randperm(n, generator=g)
    hot, l = F.one_hot(yb, c).double(), lam.double()[:, None]
    want = F.cross_entropy(pred, l*hot + (1 - l)*hot[perm], label_smoothing=eps, reduction=how)
    for loss in (partial(F.cross_entropy, label_smoothing=eps, reduction=how), LabelSmoothing(eps, reduction=how)):
        got = mixed_loss(loss, pred, yb, lam, perm)
        assert torch.allclose(got, want, rtol=1e-6)
        assert torch.allclose(*(torch.autograd.grad(o, pred, retain_graph=True)[0] for o in (got, want)), atol=1e-7)


def by_hand(pred, yb, reduction='mean'): l = F.cross_entropy(pred, yb, reduction='none'); return {'none': l}.get(reduction, l.mean())
class Callable:
    "No module, with a reduction."
    reduction = 'sum'
    def __call__(self, pred, yb): return F.cross_entropy(pred, yb, reduction=self.reduction)


PIXELS, LABELS_OF_PIXELS = torch.randn(6, 4, 5, 6, generator=G), torch.randint(0, 4, (6, 5, 6), generator=G)
IGNORED = Y[:6].where(torch.arange(6) != 2, -100)
LOSSES = [(f, X[:6, 0, 0, :4], Y[:6]) for f in (F.cross_entropy, by_hand, Callable(), partial(F.cross_entropy, reduction='sum'), nn.MultiMarginLoss(weight=W),
                                                nn.CrossEntropyLoss(weight=W, label_smoothing=.2), partial(F.cross_entropy, weight=W))]
LOSSES += [(F.cross_entropy, X[:6, 0, 0, :4], IGNORED), (nn.CrossEntropyLoss(weight=W), X[:6, 0, 0, :4], IGNORED), (F.cross_entropy, PIXELS, LABELS_OF_PIXELS),
           (nn.BCEWithLogitsLoss(pos_weight=W), X[:6, 0, 0, :4], H[Y[:6]]), (F.l1_loss, X[:6, 0, 0, 0], X[6:12, 0, 0, 0]),
           (nn.KLDivLoss(reduction='batchmean'), X[:6, 0, 0, :4].log_softmax(1), X[6:12, 0, 0, :4].softmax(1))]


@pytest.mark.parametrize('loss, pred, yb', LOSSES)
def test_mixed_as_the_loss_itself_averages(loss, pred, yb):
    "λ of 1 and of 0 are the plain losses; in between each item by its share, on the same scale; and nothing is done to the reader's loss."
    before = dict(vars(loss)) if isinstance(loss, nn.Module) else None
    perm, lam = torch.tensor([3, 2, 0, 5, 1, 4]), torch.tensor([1., .2, .7, .5, 0., .9])
    plain = loss(pred, yb)
    assert torch.allclose(mixed_loss(loss, pred, yb, torch.ones(6), perm), plain)
    assert torch.allclose(mixed_loss(loss, pred, yb, torch.zeros(6), perm), loss(pred, yb[perm]))
    assert torch.allclose(mixed_loss(loss, pred, yb, torch.tensor([.3]), perm), .3*plain + .7*loss(pred, yb[perm]))
    a, b = (loss_by_item(loss, pred, y) for y in (yb, yb[perm]))
    assert a.shape == (6,) and torch.allclose(mixed_loss(loss, pred, yb, lam, perm), (lam*a + (1 - lam)*b).sum()/(a.sum()/plain), rtol=1e-4)
    assert before is None or vars(loss) == before


def test_no_loss_at_all_is_no_nan():
    pred = (99*H[Y[:4]]).requires_grad_()
    loss = mixed_loss(F.multi_margin_loss, pred, Y[:4], torch.rand(4), torch.arange(4))
    assert loss == 0 and not torch.autograd.grad(loss, pred)[0].any()


class OuterMean(nn.Module):
    "It has a reduction and does not follow it: the mean is taken inside."
    reduction = 'mean'
    def forward(self, pred, yb): return F.cross_entropy(pred, yb)


@pytest.mark.parametrize('loss', [OuterMean(), lambda p, y: F.cross_entropy(p, y), lambda p, y, reduction='mean': F.cross_entropy(p, y)])
def test_a_loss_that_gives_no_value_an_item_is_refused_or_mixed_with_one_share(loss):
    "A scalar used to be spread over the batch: every item's share counted as the mean of all shares."
    pred, perm = torch.randn(4, 4, generator=G), torch.tensor([1, 2, 3, 0])
    with pytest.raises(ValueError): mixed_loss(loss, pred, Y[:4], torch.tensor([.5, .6, .9, 1.]), perm)
    with pytest.raises(ValueError, match='each=False'): learner(loss=loss).fit(1, Mixup())
    learner(loss=loss).fit(1, Mixup(each=False))
    learner(loss=loss, data=toy(1, 3), model=net(norm=False)).fit(1, Mixup())                  # one item has one share


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 9), eps=st.floats(0, 1), ignore=st.booleans(), reduction=st.sampled_from(['mean', 'sum', 'none']))
def test_label_smoothing_equals_its_formula(n, eps, ignore, reduction):
    g = torch.Generator().manual_seed(n)
    pred, yb = torch.randn(n + 1, 5, generator=g, dtype=torch.float64), torch.randint(0, 5, (n + 1,), generator=g)
    counts = torch.ones(n + 1, dtype=torch.bool)
    if ignore: yb[0], counts[0] = -100, False
    logp = pred.log_softmax(1)
    l = (-(1 - eps)*logp[torch.arange(n + 1), yb.clamp(min=0)] - eps*logp.mean(1))*counts
    want = {'mean': l.sum()/counts.sum(), 'sum': l.sum(), 'none': l}[reduction]
    assert torch.allclose(LabelSmoothing(eps, reduction=reduction)(pred, yb), want)


def test_a_learner_treats_smoothing_as_the_cross_entropy_that_it_is():
    with pytest.raises(ValueError, match='4 outputs.* 7'): learner(loss=LabelSmoothing(), data=toy(y=Y.where(Y != 2, 7))).fit(1)


# drawing and mixing

@pytest.mark.parametrize('alpha', [.1, .4, 1., 8.])
def test_shares_are_beta_distributed(alpha):
    lam = draw_shares(20_000, alpha, torch.Generator().manual_seed(1)).double()
    var = 1/(4*(2*alpha + 1))
    kurt = var**2*3*(1 + 2*alpha)/(3 + 2*alpha)                          # fourth central moment of Beta(α, α)
    assert lam.min() >= 0 and lam.max() <= 1
    assert abs(lam.mean() - .5) < 4*math.sqrt(var/20_000) and abs(lam.var() - var) < 4*math.sqrt((kurt - var**2)/20_000)


@pytest.mark.parametrize('make', **MIXERS)
def test_draws_follow_from_the_seed_and_touch_no_other_generator(make):
    before = torch.get_rng_state()
    a, b, c = ([m(X[:9])[0] for _ in range(5)] for m in (make(seed=1), make(seed=1), make(seed=2)))
    assert all(p.equal(q) for p, q in zip(a, b)) and not all(p.equal(q) for p, q in zip(a, c))
    assert not a[0].equal(a[1]) and torch.get_rng_state().equal(before)


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


def test_boxes_have_the_area_that_was_drawn_and_any_centre():
    flat = torch.arange(4000.)[:, None, None, None].expand(4000, 1, 50, 80)
    cut = (CutMix(seed=0)(flat)[0] != flat)[:, 0]
    side = (1 - draw_shares(4000, 1., torch.Generator().manual_seed(0))).sqrt()                               # what was drawn
    rows, cols = cut.any(2), cut.any(1)
    inside = ~(rows[:, 0] | rows[:, -1] | cols[:, 0] | cols[:, -1]) & rows.any(1)
    assert inside.sum() > 400 and (rows.sum(1)/50 - side)[inside].abs().max() < .03 and (cols.sum(1)/80 - side)[inside].abs().max() < .03
    small = rows.any(1) & (side < .2)
    for seen, n in ((rows, 50), (cols, 80)):
        centre = (seen[small].float() @ torch.arange(.5, n))/seen[small].sum(1)/n
        assert abs(centre.mean() - .5) < .05 and abs(centre.std() - 12**-.5) < .05


def test_mixup_mixes_and_keeps_the_main_part():
    xm, lam, perm = Mixup(1., seed=3)(X[:64])
    l = lam[:, None, None, None]
    assert torch.allclose(xm, l*X[:64] + (1 - l)*X[:64][perm], atol=1e-6) and lam.min() >= .5 and lam.unique().numel() > 60
    assert Mixup(1e-5)(X[:9])[0].equal(X[:9]) and Mixup(1., each=False)(X[:9])[1].numel() == 1


def test_what_cannot_be_mixed():
    for mixer, xb in ((Mixup(), X[:4].byte()), (CutMix(), X[:4].flatten(1))):
        with pytest.raises((RuntimeError, ValueError)): mixer(xb)
    with pytest.raises(ValueError, match='OneOf'): learner().fit(1, [Mixup(), CutMix()])
    for alpha in (0, -1., math.nan):
        with pytest.raises(ValueError, match='alpha'): Mixup(alpha)


def test_one_of_takes_turns():
    flat, both = torch.arange(9.)[:, None, None, None].expand(9, 3, 17, 30), OneOf(Mixup(), OneOf(CutMix()), seed=5)
    cut = sum(((m == flat) | (m == flat[p])).all().item() for m, _, p in (both(flat) for _ in range(100)))
    assert 30 < cut < 70


# in a fit

@pytest.mark.parametrize('make', [*MIXERS['argvalues'], partial(Mixup, each=False)], ids=[*MIXERS['ids'], 'one share'])
def test_loss_is_of_the_mixture_and_metrics_of_the_true_labels(make):
    stats, seen = AvgStatsCallback(accuracy, silent=True), Seen(make())
    learn = learner(stats, seen, seen.mixer)
    learn.fit(1)
    assert [len(r[0]) for r in seen.rows] == [32, 32, 32, 3]              # an odd batch at the end
    right = loss = 0
    for xb, yb, lam, perm, l, pred in seen.rows:
        assert torch.allclose(l, F.cross_entropy(pred, mixed_targets(yb, lam, perm)), atol=1e-6)
        right, loss = right + (pred.argmax(1) == yb).sum().item(), loss + l.item()*len(xb)
    row = stats.rows[0]
    assert math.isclose(row['train_accuracy'], right/99, rel_tol=1e-6) and math.isclose(row['train_loss'], loss/99, rel_tol=1e-5)
    with torch.no_grad(): pred = learn.model.eval()(X[100:])
    assert math.isclose(row['valid_loss'], F.cross_entropy(pred, Y[100:]).item(), rel_tol=1e-5)       # validation is plain
    assert sorted(y.item() for r in seen.rows for y in r[1]) == sorted(Y[:99].tolist())


@pytest.mark.parametrize('stop, mixed', [(0, 12), (1, 8), (2, 4), (1/3, 8), (.5, 6), (.25, 9), (3, 0)])
def test_stop(stop, mixed):
    learner().fit(3, [m := Mixup(stop=stop), s := Seen(m)])
    assert [r[2] is not None for r in s.rows] == [True]*mixed + [False]*(12 - mixed)
    for xb, yb, lam, perm, l, pred in s.rows[mixed:]: assert l.equal(F.cross_entropy(pred, yb))


@pytest.mark.parametrize('event', EVENTS)
def test_nothing_stays_behind_whatever_happens(event):
    teacher, loss = net(), nn.CrossEntropyLoss()
    teacher[1].eval()
    modes, before = [m.training for m in teacher.modules()], copy.deepcopy(teacher.state_dict())
    for error, nth, order in ((ZeroDivisionError, 1, -20), (KeyboardInterrupt, 2, 50), (CancelBatchException, 1, -20), (CancelFitException, 1, 50)):
        if error is not KeyboardInterrupt and event in ('begin_fit', 'after_fit', 'after_cancel_batch', 'after_cancel_epoch', 'after_cancel_fit'): continue
        log = Log(event, error, nth)
        log._order = order
        learn = learner(loss=loss)
        try: learn.fit(2, [Mixup(), Distillation(teacher), log])
        except (ZeroDivisionError, KeyboardInterrupt, CancelBatchException): pass
        assert learn.loss_func is loss and loss.reduction == 'mean' and [m.training for m in teacher.modules()] == modes
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


def test_with_accumulation_and_clipping():
    "By hand from what the batches were: the mean over all items of two batches, clipped."
    seen = Seen(Mixup())
    learn = learner(seen, seen.mixer, GradientAccumulation(2), GradientClip(.5), model=net(norm=False), opt_func=sgd_opt, data=toy(16, 48))
    first = copy.deepcopy(learn.model)
    class Stop:
        def after_step(self, run): raise CancelFitException
    learn.fit(1, Stop())
    assert len(seen.rows) == 2
    (sum(len(xb)*F.cross_entropy(first(xb), mixed_targets(yb, lam, perm)) for xb, yb, lam, perm, _, _ in seen.rows)/32).backward()
    nn.utils.clip_grad_norm_(first.parameters(), .5)
    for p, q in zip(first.parameters(), learn.model.parameters()): assert torch.allclose(p - .05*p.grad, q, atol=1e-6)


@pytest.mark.parametrize('make', **MIXERS)
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
        paper, entropy = -T*T*(p*q.log()).sum(1).mean(), -T*T*(p*p.log()).sum(1).mean()
        ours = distill_loss(z, r, T)
        assert torch.allclose(ours, paper - entropy) and torch.allclose(*(torch.autograd.grad(o, z, retain_graph=True)[0] for o in (ours, paper)))


def test_distillation_in_a_fit():
    teacher, seen = net(n=4, drop=.5), []
    with torch.no_grad(): teacher[-1].weight.normal_()
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    class Look(Callback):
        _order = 5
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
    with pytest.raises(ValueError, match=r'\(32, 7\).*\(32, 4\)'): learn.fit(1, Distillation(net(n=7)))
    with pytest.raises(ValueError): learn.fit(1, Distillation(learn.model))


def test_distillation_of_mixed_pictures():
    "The teacher sees what the student sees; its part comes on top of the mixture's loss, whichever is listed first."
    inputs, losses, teacher, mixer = [], [], net(), Mixup()
    teacher.register_forward_hook(lambda m, i, o: inputs.append(i[0]))
    seen = Seen(mixer, 3.5)
    class Look(Callback):
        _order = 5
        def after_loss(self, run):
            if run.in_train: losses.append((run.loss - distill_loss(run.pred, teacher(run.xb), 20.)).item())
    learner().fit(1, [Distillation(teacher), Look(), seen, mixer])
    assert all(a is row[0] for a, row in zip(inputs[::2], seen.rows)) and len(losses) == 4
    assert all(math.isclose(a, row[4].item(), abs_tol=1e-4) for a, row in zip(losses, seen.rows))


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
    of_bytes = noisy_labels(torch.full((20_000,), 199, dtype=torch.uint8), 1., 200)
    assert of_bytes.dtype == torch.uint8 and of_bytes.unique().tolist() == list(range(199))
    for wrong in ((1.2, 5), (.5, 1), (.5, 4)):
        with pytest.raises(ValueError): noisy_labels(y, *wrong)
