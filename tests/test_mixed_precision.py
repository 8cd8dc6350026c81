"""Mixed precision beside torch's own recipe, to the bit; under overflow, accumulation, clipping, faults and restarts; ChannelsLast and Compile leave nothing."""
import copy
import math
from collections import OrderedDict, namedtuple
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from event_log import Log
from torch import nn

import exp.faster as faster
from exp.callbacks import EVENTS, AvgStatsCallback, Callback, CancelBatchException, CancelFitException, DataBunch, Dataset, Recorder, Runner, accuracy, get_dls
from exp.checkpoints import Checkpoint
from exp.distillation import Distillation
from exp.export_models import export, load_learner
from exp.faster import ChannelsLast, Compile, cpu_bf16, native_dtype, native_precision, no_autocast_because, no_compile_because
from exp.files import load
from exp.learner import Learner, set_seed
from exp.mixed_precision import MixedPrecision, to_float
from exp.mixup import Mixup
from exp.optimizers import adam_opt, lamb, sgd_mom_opt, sgd_opt
from exp.torch_bridge import TorchOptimizer
from exp.training_callbacks import GradientAccumulation, GradientClip, SaveBest

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(140, 3, 8, 8, generator=G), torch.randint(0, 4, (140,), generator=G)
SGD = partial(torch.optim.SGD, momentum=.9)


def toy(bs=32, n=96): return DataBunch(*get_dls(Dataset(X[:n], Y[:n]), Dataset(X[100:], Y[100:]), bs, seed=0), 3, 4)


def net(norm=True, drop=0.):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *([nn.BatchNorm2d(8)] if norm else []), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Dropout(drop),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def learner(*cbs, data=None, opt_func=sgd_mom_opt, model=None, lr=.1, said=None):
    learn = Learner(model or net(), data or toy(), F.cross_entropy, opt_func, lr=lr, cbs=list(cbs))
    learn.logger = lambda *args: said.append(args[0]) if said is not None else None
    return learn


def weights(m): return torch.cat([t.detach().flatten().double() for t in m.state_dict().values()])


def recipe(opt_func, scaler, dtype=torch.float16, clip=None, lr=.1):
    "The loop of torch's manual: the model, which steps were taken, the losses."
    model, data, taken, losses = net(), toy(), [], []
    opt = opt_func(list(model.parameters()), lr=lr)
    for _ in range(2):
        model.train()
        for xb, yb in data.train_dl:
            with torch.autocast('cpu', dtype): pred = model(xb)
            loss = F.cross_entropy(pred.float(), yb)
            losses.append(loss.item())
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            if clip: nn.utils.clip_grad_norm_(model.parameters(), clip)
            before = scaler.get_scale()
            scaler.step(opt)
            scaler.update()
            taken.append(scaler.get_scale() >= before)
            opt.zero_grad()
        for _ in data.valid_dl: pass                                     # its loader draws too
    return model, taken, losses


# what the machine can do

@pytest.mark.parametrize('text, want', [('flags\t: fpu amx_bf16 amx_tile avx512_bf16', 'AMX'), ('flags : fpu avx512_bf16', 'AVX-512 BF16'), ('Features : fp asimd bf16', 'Arm BF16'),
                                        ('flags : fpu avx2 avx512f', None), ('\udcff\x00 nothing', None)])
def test_flags_of_the_cpu(text, want, tmp_path):
    (tmp_path/'cpuinfo').write_bytes(text.encode('utf-8', 'surrogateescape'))
    assert cpu_bf16(tmp_path/'cpuinfo') == want


def test_asking_never_fails_and_works_is_found_by_trying(tmp_path, monkeypatch):
    def boom(): raise RuntimeError
    for name in faster._TESTS:
        if hasattr(torch.cpu, name): monkeypatch.setattr(torch.cpu, name, boom)
    assert cpu_bf16(tmp_path) is None and cpu_bf16(tmp_path/'none') is None                # a folder; nothing
    assert native_dtype('meta')[0] is None and native_dtype('cpu')[0] in (None, torch.bfloat16)
    state = torch.get_rng_state()
    assert no_autocast_because('cpu', torch.bfloat16) is None and no_autocast_because('cpu', torch.float64) and no_autocast_because('meta', torch.bfloat16)
    assert torch.get_rng_state().equal(state)


def test_sixteen_bits_where_they_are_native_and_a_sentence_where_not(monkeypatch):
    said = []
    monkeypatch.setattr(faster, 'cpu_bf16', lambda: None)
    assert native_precision('cpu', said.append) == [] and len(said) == 1
    monkeypatch.setattr(faster, 'cpu_bf16', lambda: 'AMX')
    (cb,) = native_precision('cpu', said.append)
    learner().fit(1, cb)
    assert cb.dtype is torch.bfloat16 and len(said) == 1
    monkeypatch.setattr(faster, 'no_autocast_because', lambda *a: 'its gradients come out wrong')
    assert native_precision('cpu', said.append) == [] and len(said) == 2


def test_what_it_refuses():
    with pytest.raises(ValueError, match='float64'): MixedPrecision(torch.float64)
    with pytest.raises(ValueError, match='16 bits'): learner(model=net().half()).fit(1, MixedPrecision('bf16'))


# against torch's recipe

OPTS = {'torch SGD': SGD, 'torch AdamW': torch.optim.AdamW, 'ours': adam_opt(), 'ours, LAMB': lamb}


@pytest.mark.parametrize('scale', [2.**10, 2.**20])
@pytest.mark.parametrize('opt', OPTS)
def test_fp16_equals_the_recipe_to_the_bit(opt, scale):
    "Overflow included: at a scale of 2²⁰ the first steps are thrown away by both. The losses seen are the true ones."
    rec, mp = Recorder(), MixedPrecision(torch.float16, init_scale=scale, growth_interval=3)
    learn = learner(opt_func=OPTS[opt], lr=.01).fit(2, [mp, rec])
    theirs = (lambda ps, lr: TorchOptimizer(OPTS[opt](ps, lr=lr))) if 'ours' in opt else OPTS[opt]
    model, taken, losses = recipe(theirs, scaler := torch.amp.GradScaler('cpu', init_scale=scale, growth_interval=3), lr=.01)
    assert weights(learn.model).equal(weights(model)) and rec.losses == losses
    assert mp.scale == scaler.get_scale() and mp.lived == scaler.state_dict()['_growth_tracker']
    assert mp.skipped == taken.count(False) and (mp.skipped > 0) == (scale > 2**18) and mp.skipped < len(taken)


@pytest.mark.parametrize('kind', ['Learner', 'Runner'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_learner_and_runner_equal_the_recipe_to_the_bit(kind, dtype):
    mp = MixedPrecision(dtype, init_scale=2.**21)
    if kind == 'Learner': model = learner(opt_func=SGD).fit(2, mp).model
    else: model = Runner(m := net(), toy(), F.cross_entropy, SGD(m.parameters(), lr=.1), [mp]).fit(2).model
    theirs, taken, _ = recipe(SGD, torch.amp.GradScaler('cpu', init_scale=2.**21, enabled=dtype is torch.float16), dtype)
    assert weights(model).equal(weights(theirs)) and len(taken) > mp.skipped == taken.count(False)


@pytest.mark.parametrize('shape', [(64, 128, 1, 3, 2, 1), (16, 16, 2, 5, 1, 2), (8, 16, 2, 3, 2, 1), (8, 8, 3, 3, 1, 1), (3, 8, 1, 1, 1, 0)])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_weights_that_see_only_padding_have_no_gradient_in_bf16(shape, layout):
    "torch 2.14 on a CPU with bfloat16 leaves their gradients unwritten: NaN, where memory held one. The reference is autograd in float64."
    ci, co, size, kernel, stride, padding = shape
    torch.manual_seed(0)
    conv, x = nn.Conv2d(ci, co, kernel, stride, padding), torch.randn(16, ci, size, size)
    y = F.conv2d(x.double(), w := conv.weight.detach().double().requires_grad_(), conv.bias.detach().double(), stride, padding)
    y.square().mean().backward()
    model, seen = nn.Sequential(conv).to(memory_format=layout), []
    class Keep:
        _order = 900
        def after_pred(self, run): seen.append(run.pred.detach())
        def after_backward(self, run): seen.append(run.model[0].weight.grad.clone())
    def junk(pred, yb): full = [torch.full((w.numel(),), float('nan')) for _ in range(8)]; del full; return pred.square().mean()
    dl = [(x.contiguous(memory_format=layout), torch.zeros(16))]
    Learner(model, DataBunch(dl, None), junk, sgd_opt, lr=0., cbs=[MixedPrecision('bf16'), Keep()]).fit(1)
    out, grad = seen
    assert (grad - w.grad).abs().max() < .02*w.grad.abs().max() and grad[w.grad == 0].eq(0).all()
    if (w.grad == 0).any(): assert (out - y).abs().max() < 1e-5          # in float32
    assert not conv._forward_pre_hooks and not conv._forward_hooks                 # and nothing stays behind


def test_a_weight_used_at_two_sizes_or_of_two_layers_keeps_its_gradient():
    "Only the last size was looked at: after one pixel, eight of nine true gradients were set to 0."
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding='same'), nn.Linear(3, 4)
            self.b.weight = self.a.weight
        def forward(self, x): return self.head(self.a(self.b(self.a(x)).mean((2, 3), keepdim=True)).flatten(1))
    grads = []
    class Keep(Callback):
        def after_backward(self, run): grads.append(run.model.a.weight.grad.clone()); raise CancelFitException
    for cbs in ([], [MixedPrecision('bf16')]):
        torch.manual_seed(0)
        learner(*cbs, model=Twice()).fit(1, Keep())
    want, got = grads
    assert want.abs().min() > 0 and (got - want).norm() < .1*want.norm()


def test_clips_gradients_of_true_size():
    norms = []
    class Norm(Callback):
        _order = 16
        def after_backward(self, run): norms.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm().item())
    learn = learner(opt_func=SGD).fit(2, [GradientClip(.05), MixedPrecision('fp16'), Norm()])
    assert max(norms) < .0501 and weights(learn.model).equal(weights(recipe(SGD, torch.amp.GradScaler('cpu'), clip=.05)[0]))


def test_weights_and_loss_stay_float32_and_the_model_is_in_16_bits():
    seen = []
    class Look(Callback):
        _order = 7
        def after_pred(self, run): seen.append(run.pred.dtype)
        def after_loss(self, run): assert run.pred.dtype is run.loss.dtype is torch.float32 and not torch.is_autocast_enabled('cpu')
    learn = learner().fit(1, [MixedPrecision('bf16'), Look()])
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in learn.model.parameters()} == {torch.float32}
    assert {v.dtype for s in learn.opt.state.values() for v in s.values() if torch.is_tensor(v)} == {torch.float32}
    assert learn.get_preds()[0].dtype is torch.float32


def test_outputs_keep_their_kind():
    class Output(OrderedDict):
        @property
        def logits(self): return self['logits']
    Pair, half, long = namedtuple('Pair', 'a b'), torch.ones(2).half(), torch.ones(2).long()
    out = to_float(Output(logits=half, more=[(half, Pair(half, 'x')), long, half.double()]))
    assert type(out) is Output and out.logits.dtype is torch.float32
    (a, pair), b, c = out['more']
    assert type(pair) is Pair and (a.dtype, pair.a.dtype, pair.b, b.dtype, c.dtype) == (torch.float32, torch.float32, 'x', torch.int64, torch.float64)


# accumulation, skipped steps and the logged loss

@pytest.mark.parametrize('dtype', ['fp16', 'bf16'])
def test_accumulation_adds_up_and_logs_the_true_loss(dtype):
    def fit(bs, *cbs):
        learn = learner(data=toy(bs), model=net(norm=False), opt_func=sgd_opt)
        return learn.fit(2, [MixedPrecision(dtype, init_scale=2.**8), rec := Recorder(), stats := AvgStatsCallback(accuracy, silent=True), *cbs]), rec.losses, stats.rows
    (a, big, ra), (b, small, rb) = fit(32), fit(8, GradientAccumulation(4))
    start = weights(net(norm=False))
    assert (weights(a.model) - weights(b.model)).norm() < .02*(weights(a.model) - start).norm()
    assert len(small) == 24 and all(math.isclose(sum(small[4*i:4*i + 4])/4, big[i], rel_tol=5e-3) for i in range(6))
    for p, q in zip(ra, rb): assert all(math.isclose(p[k], q[k], rel_tol=5e-3) for k in ('train_loss', 'valid_loss'))


@pytest.mark.parametrize('acc', [1, 3])
def test_an_overflow_throws_the_whole_step_away_and_announces_none(acc):
    steps = []
    class Steps(Callback):
        _order = 30
        def begin_fit(self, run): self.s = torch.optim.lr_scheduler.LinearLR(run.opt, .5, .1, 10)
        def after_step(self, run): steps.append(run.n_iter); self.s.step()
    learn = learner(data=toy(8), model=net(norm=False), opt_func=torch.optim.SGD)
    learn.fit(2, [mp := MixedPrecision('fp16', init_scale=2.**21), *([GradientAccumulation(acc)] if acc > 1 else []), Steps()])
    assert 0 < mp.skipped < 8 and len(steps) == 24/acc - mp.skipped and set(steps) < {*range(acc - 1, 24, acc)} and weights(learn.model).isfinite().all()


@pytest.mark.parametrize('what', ['loss', 'grad'])
def test_what_overflows_for_ever_ends_the_fit(what):
    class Break(Callback):
        _order = 7
        def after_loss(self, run):
            if what == 'loss': run.loss = run.loss*float('nan')
        def after_backward(self, run): run.model[0].weight.grad[0] = math.inf
    learn = learner()
    with pytest.raises(FloatingPointError, match='nan' if what == 'loss' else r'loss of \d'): learn.fit(20, [MixedPrecision('fp16'), Break()])
    assert all(p.equal(q) for p, q in zip(learn.model.parameters(), net().parameters()))                 # no step was taken


# faults, restarts, other callbacks

@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('kind', ['Learner', 'Runner'])
def test_nothing_stays_behind_whatever_happens(event, kind):
    for error in (ZeroDivisionError, KeyboardInterrupt, CancelBatchException, CancelFitException):
        if error in (CancelBatchException, CancelFitException) and event in ('begin_fit', 'after_fit', 'after_cancel_batch', 'after_cancel_epoch', 'after_cancel_fit'): continue
        for order in (-20, 50):
            log = Log(event, error, 2)
            log._order = order
            model = net()
            strides = [p.stride() for p in model.parameters()]
            cbs = [MixedPrecision('fp16'), ChannelsLast(), Compile(backend='eager'), log]
            run = learner(model=model) if kind == 'Learner' else Runner(model, toy(), F.cross_entropy, torch.optim.SGD(model.parameters(), lr=.05), cbs)
            run.logger = lambda *args: None
            try: run.fit(2, cbs) if kind == 'Learner' else run.fit(2)
            except (ZeroDivisionError, KeyboardInterrupt, CancelBatchException): pass
            assert not torch.is_autocast_enabled('cpu') and run.model is model
            assert [p.stride() for p in model.parameters()] == strides and list(model.state_dict()) == list(net().state_dict())


class Bad(nn.Module):
    def __init__(self): super().__init__(); self.l = nn.Linear(2, 4)
    def forward(self, x): raise ZeroDivisionError('mine')


@pytest.mark.parametrize('cb', [MixedPrecision('bf16'), Compile(backend='eager')], ids=['bf16', 'compiled'])
def test_faults_of_the_model_itself_come_through_and_leave_no_autocast(cb):
    with pytest.raises(ZeroDivisionError, match='mine'): learner(model=Bad()).fit(1, cb)
    assert not torch.is_autocast_enabled('cpu')


class Kill:
    _order = 2000
    def __init__(self, at): self.at = at
    def after_batch(self, run):
        if run.n_iter == self.at: raise KeyboardInterrupt


@pytest.mark.parametrize('at, acc', [(2, 1), (5, 1), (7, 2), (14, 2)])
def test_resumes_to_the_bit(at, acc, tmp_path):
    def run(*cbs, start=False):
        ck, mp = Checkpoint(tmp_path, every=1), MixedPrecision('fp16', init_scale=2.**(25 - 4*acc), growth_interval=3)
        learn = learner(model=net(drop=.2), opt_func=adam_opt(), lr=.01, data=toy(24))
        set_seed(3)
        begin = ck.start(learn) if start else (0, 0)
        more = [GradientAccumulation(acc)] if acc > 1 else []
        try: learn.fit(4, [mp, Mixup(), ChannelsLast(), *more, *([ck] if cbs or start else []), *cbs], start=begin)
        except KeyboardInterrupt: pass
        return learn, mp
    whole, a = run()
    run(Kill(at))
    resumed, b = run(start=True)
    assert weights(resumed.model).equal(weights(whole.model)) and (a.scale, a.lived, a.skipped) == (b.scale, b.lived, b.skipped) and 0 < a.skipped < 16/acc


def test_looks_predictions_and_exports_are_in_float32(tmp_path):
    kinds, teacher = [], net()
    teacher[-1].register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    learn = learner(MixedPrecision('fp16'), ChannelsLast(), Compile(backend='eager'), Mixup(), Distillation(teacher), AvgStatsCallback(accuracy, silent=True))
    learn.fit(1, SaveBest(path=tmp_path/'best.pt'))
    with torch.no_grad(): want = copy.deepcopy(learn.model).eval()(X[100:])
    assert set(kinds) == {torch.float16} and list(torch.load(tmp_path/'best.pt', weights_only=True)) == list(net().state_dict())
    assert learn.get_preds()[0].equal(want)
    assert math.isclose(learn.validate()['loss'], F.cross_entropy(want, Y[100:]).item(), rel_tol=1e-5)
    learn.lr_find(max_iter=6)
    export(learn, tmp_path/'e.pt')
    assert load_learner(tmp_path/'e.pt').get_preds(toy().valid_dl)[0].equal(want)


# channels last

class Blur(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
        self.register_buffer('kernel', torch.full((3, 1, 3, 3), 1/9))
        self.register_buffer('shift', torch.zeros(2, 3, 4, 5))
    def forward(self, x):
        self.shift += 1
        return self.net(F.conv2d(x, self.kernel, padding=1, groups=3))


def test_channels_last_is_at_work_during_the_fit_and_all_is_put_back_as_found():
    seen, model = [], Blur()
    conv = model.net[0]
    class Look(Callback):
        _order = 30
        def after_pred(self, run): seen.append((run.xb.is_contiguous(memory_format=torch.channels_last), conv.weight.stride(), model.shift.stride()))
        def after_step(self, run): seen.append((True, run.opt.state[conv.weight]['grad_avg'].stride(), model.shift.stride()))
    odd = model.net[3].weight                                            # one that the reader has laid out in a way of his own
    odd.data = odd.data.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    model.register_buffer('wide', torch.zeros(2, 1, 1, 1).expand(2, 3, 4, 5))          # one number in many places
    def kept(): return [(n, id(t), t.stride()) for n, t in [*model.named_parameters(), *model.named_buffers()]]
    before, twin = kept(), copy.deepcopy(model)
    for _ in range(2):                                                   # again, with a state that is there
        learn = learner(model=model)
        learn.fit(1, [ChannelsLast(), Look()])
        assert kept() == before and all(learn.opt.state[p]['grad_avg'].stride() == p.stride() for p in model.parameters())
    assert set(seen) == {(True, (27, 1, 9, 3), (60, 1, 15, 3))}
    for _ in range(2): learner(model=twin).fit(1)
    assert torch.allclose(weights(model), weights(twin), atol=1e-5)


@pytest.mark.parametrize('opt_func', [torch.optim.Adam, lamb], ids=['torch Adam', 'LAMB'])
def test_channels_last_leaves_other_batches_alone(opt_func):
    def trained(*cbs):
        torch.manual_seed(0)
        ds = Dataset(X[:40, 0, 0, :5], Y[:40])
        return Learner(nn.Linear(5, 4), DataBunch(*get_dls(ds, ds, 10, seed=0)), F.cross_entropy, opt_func, lr=.1).fit(1, cbs).model.weight
    assert trained().equal(trained(ChannelsLast()))


# compiling

def test_only_training_batches_of_the_usual_shape_are_compiled():
    compiled, plain = [], []
    def backend(gm, inputs):
        def run(*args): compiled.append(1); return gm.forward(*args)
        return run
    class Look(Callback):
        _order = 900
        def after_pred(self, run): plain.append(type(run.model).__name__)
    learn = learner(data=toy(20), model=net(norm=False))                 # 96 = 4·20 + 16
    model = learn.model
    learn.fit(2, [c := Compile(backend=backend), Look()])
    assert len(compiled) == 8 and set(plain) == {'Sequential'} and learn.model is model and c.why is None
    other = learner(data=toy(20), model=net(norm=False)).fit(2)
    assert torch.allclose(weights(model), weights(other.model), atol=1e-6)
    learn.fit(1, c)
    assert len(compiled) == 12


def test_it_says_what_it_cost():
    learner(data=toy(8), said=(said := [])).fit(1, Compile(compare=3, backend='aot_eager'))
    assert len(said) == 1 and 'the first batch took' in said[0] and ('pays after' in said[0] or 'does not pay' in said[0])


def test_without_a_compiler_or_where_compiling_fails_it_says_so_and_trains(monkeypatch):
    def backend(gm, inputs): raise RuntimeError('no such thing')
    plain = weights(learner().fit(1).model)
    learn = learner(said=(said := [])).fit(1, Compile(backend=backend))
    monkeypatch.setenv('PATH', '/nowhere')
    monkeypatch.delenv('CXX', raising=False)
    other = learner(said=said).fit(1, Compile())
    assert no_compile_because('cpu') and len(said) == 2 and 'no such thing' in said[0]
    assert torch.allclose(weights(learn.model), plain) and weights(other.model).equal(plain)


def test_compiled_fits_resume_and_their_checkpoints_open_without_compiling(tmp_path):
    def run(*cbs, start=False):
        ck, learn = Checkpoint(tmp_path, every=1), learner()
        begin = ck.start(learn) if start else (0, 0)
        try: learn.fit(3, [Compile(backend='aot_eager'), *([ck] if cbs or start else []), *cbs], start=begin)
        except KeyboardInterrupt: pass
        return learn
    whole = run()
    run(Kill(4))
    load(learner(), max(tmp_path.glob('*.pt')))                          # an uncompiled model takes it as it is
    assert torch.allclose(weights(run(start=True).model), weights(whole.model), atol=1e-6)


def test_compile_that_compares_more_batches_than_are_timed():
    learn = learner(c := Compile(compare=60, backend='eager'), data=DataBunch([(X[:8], Y[:8])]*70, None))
    kinds = []
    class Spy(Callback):
        _order = 7.5
        def begin_batch(self, run): kinds.append(c.kind)
    learn.fit(1, Spy())
    assert kinds.count('plain') == 60 and kinds[-1] == 'compiled'
