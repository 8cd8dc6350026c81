"""Speed of exp.mixed_precision's callbacks on the lesson's net, and what mixing costs beside torchvision and timm.

Functions shaped as `benchmarks.__main__` wants them; run alone with `python -m benchmarks.mixed_precision [NAME …]`.
"""
import torch
import torch.nn.functional as F


class Ready(list):
    "Ready-made batches: a loader that costs nothing."


def precision(n=4, bs=64, size=128):
    """`n` training batches of the lesson's CNN, 64 pictures of 128 px: float32, channels last, compiled, both; bfloat16 where the device computes in it.

    Compiling itself happens in the warm-up turn and is not in the figures; notebook 10c says what it takes."""
    from exp.batchnorm import conv_layer
    from exp.callbacks import DataBunch, default_device
    from exp.convnets import keep_freed_memory
    from exp.learner import get_learner
    from exp.faster import ChannelsLast, Compile, native_dtype, no_compile_because
    from exp.mixed_precision import MixedPrecision
    from exp.recipes import NFS
    keep_freed_memory()
    device, g = default_device(), torch.Generator().manual_seed(0)
    dl = Ready((torch.randn(bs, 3, size, size, generator=g).to(device), torch.randint(0, 10, (bs,), generator=g).to(device)) for _ in range(n))

    def epoch(*cbs):
        torch.manual_seed(0)
        learn = get_learner(NFS, DataBunch(dl, None, 3, 10), .01, conv_layer, opt_func=torch.optim.SGD)
        learn.model.to(device)
        learn.logger = lambda *args: None
        def run():
            learn.fit(1, cbs)
            if device.type == 'cuda': torch.cuda.synchronize()
        return run
    compiles, native = no_compile_because(device) is None, native_dtype(device)[0]
    work = {'float32': epoch(), 'channels last': epoch(ChannelsLast()), 'compiled': epoch(Compile()) if compiles else None,
            'channels last, compiled': epoch(ChannelsLast(), Compile()) if compiles else None}
    if native:
        name = str(native)[6:]
        work |= {name: epoch(MixedPrecision(native)), f'{name}, channels last': epoch(MixedPrecision(native), ChannelsLast())}
    return work


def mixing(bs=64, size=128, n=20):
    "`n` batches of 64 pictures of 128 px (floats) mixed, and the loss of given predictions, forward and backward: torchvision v2 and timm (which mix one-hot targets), ours; one λ a batch or one an item."
    from exp.mixup import CutMix, Mixup, mixed_loss
    g = torch.Generator().manual_seed(0)
    xb, yb = torch.randn(bs, 3, size, size, generator=g), torch.randint(0, 10, (bs,), generator=g)
    pred = torch.randn(bs, 10, generator=g).requires_grad_()
    plain = F.cross_entropy

    def ours(mixer):
        def once():
            xm, lam, perm = mixer(xb)
            mixed_loss(plain, pred, yb, lam, perm).backward()
        return once
    work = {'torchvision v2 MixUp': None, 'torchvision v2 CutMix': None, 'timm Mixup, elem': None, 'timm CutMix, elem': None,
            'exp Mixup, one λ': ours(Mixup(each=False)), 'exp Mixup, λ per item': ours(Mixup()), 'exp CutMix, one box': ours(CutMix(each=False)), 'exp CutMix, box per item': ours(CutMix()),
            'no mixing': lambda: plain(pred, yb).backward()}
    try:
        from torchvision.transforms import v2
        for name, t in (('MixUp', v2.MixUp(num_classes=10)), ('CutMix', v2.CutMix(num_classes=10))):
            work[f'torchvision v2 {name}'] = lambda t=t: plain(pred, t(xb, yb)[1]).backward()
    except ImportError: pass
    try:
        from timm.data.mixup import Mixup as Timm
        for name, t in (('Mixup', Timm(.4, 0., mode='elem', label_smoothing=0., num_classes=10)), ('CutMix', Timm(0., 1., mode='elem', label_smoothing=0., num_classes=10))):
            def once(t=t):
                x = xb.clone()                                           # timm mixes in place
                plain(pred, t(x, yb)[1]).backward()
            work[f'timm {name}, elem'] = once
    except ImportError: pass

    def repeat(f):
        def run():
            for _ in range(n): f()
        return run
    return {k: f and repeat(f) for k, f in work.items()}


BENCHMARKS = {'precision': precision, 'mixing': mixing}

if __name__ == '__main__':
    from benchmarks import __main__ as bench
    bench.BENCHMARKS = BENCHMARKS
    bench.main()
