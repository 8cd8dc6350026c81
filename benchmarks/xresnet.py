"""Benchmarks of exp.xresnet beside the same networks of timm, torchvision and fastai: one training step, one forward pass, one pooling.

Each function returns `{name: callable}` as benchmarks/__main__.py takes it; the first name is the one the ratios are to. The networks get the
same weights and the outputs are compared before anything is timed.
"""
import os


def _peers():
    "`{name: function that makes the network}` of ResNet-18-D in three libraries, ours last; `None` where one is not installed."
    from exp.xresnet import xresnet18
    found = {'timm resnet18d': None, 'fastai xresnet18': None}
    try:
        import timm
        found['timm resnet18d'] = lambda: timm.create_model('resnet18d', num_classes=10)
    except ImportError: pass
    try:
        from fastai.vision.models.xresnet import xresnet18 as fastai18
        found['fastai xresnet18'] = lambda: fastai18(n_out=10)
    except ImportError: pass
    return {**found, 'exp xresnet18': lambda: xresnet18(c_out=10)}


def _same_weights(makers):
    "The networks, channels last, all with the weights of ours."
    import torch
    torch.manual_seed(0)
    nets = {k: make and make() for k, make in makers.items()}
    state = list(nets['exp xresnet18'].state_dict().values())
    x, out = torch.randn(2, 3, 64, 64), {}
    for k, net in nets.items():
        if net is None: continue
        with torch.no_grad():
            for a, b in zip(net.state_dict().values(), state, strict=True): a.copy_(b)
        out[k] = net.eval()(x).detach()
        assert torch.allclose(out[k], nets['exp xresnet18'].eval()(x), atol=1e-4), k
        net.to(memory_format=torch.channels_last)
    return nets


def training(bs=32, size=64):
    "Forward, backward and SGD of an 18-layer ResNet-D on one batch of 32 at 64 px."
    import torch
    import torch.nn.functional as F
    nets = _same_weights(_peers())
    x, y = torch.randn(bs, 3, size, size).to(memory_format=torch.channels_last), torch.arange(bs) % 10

    def work(net):
        opt = torch.optim.SGD(net.train().parameters(), lr=1e-3)

        def run():
            F.cross_entropy(net(x), y).backward()
            opt.step(); opt.zero_grad()
        return run
    return {k: net and work(net) for k, net in nets.items()}


def inference(bs=32, size=128):
    "Forward in evaluation mode, one batch of 32 at 128 px."
    import torch
    nets = _same_weights(_peers())
    x = torch.randn(bs, 3, size, size).to(memory_format=torch.channels_last)

    def work(net):
        net.eval()

        def run():
            with torch.inference_mode(): net(x)
        return run
    return {k: net and work(net) for k, net in nets.items()}


def pooling(bs=32, nf=64, size=64):
    "Forward and backward of the pooling after the stem: kornia's MaxBlurPool2D, ours, and the plain max pool."
    import torch
    from exp.xresnet import MaxBlurPool, max_pool
    x = torch.randn(bs, nf, size, size).to(memory_format=torch.channels_last).requires_grad_()
    try:
        import kornia
        theirs = kornia.filters.MaxBlurPool2D(3, max_pool_size=3)
    except ImportError: theirs = None

    def work(pool):
        def run(): pool(x).square().sum().backward()
        return run
    return {k: pool and work(pool) for k, pool in {'kornia MaxBlurPool2D': theirs, 'exp MaxBlurPool': MaxBlurPool(), 'max pool': max_pool()}.items()}


def threads(bs=64, size=96):
    "Forward and backward of the recipes' networks on one batch of 64 at 96 px, in the type that exp-train takes here: with one thread and with two."
    import torch
    import torch.nn.functional as F
    from benchmarks import Skip
    from exp.convnets import keep_freed_memory
    from exp.faster import native_dtype
    from exp.xresnet import xresnet18, xresnet34
    if (os.cpu_count() or 1) < 2: raise Skip('there is one core')
    keep_freed_memory()
    dtype = native_dtype('cpu')[0]
    x, y = torch.randn(bs, 3, size, size).to(memory_format=torch.channels_last), torch.arange(bs) % 10

    def work(net, n):
        def run():
            before = torch.get_num_threads()
            torch.set_num_threads(n)
            with torch.autocast('cpu', dtype, enabled=dtype is not None): out = net(x)
            F.cross_entropy(out.float(), y).backward()
            torch.set_num_threads(before)
        return run
    nets = {'xresnet18': xresnet18, 'xresnet34': xresnet34}
    nets = {f'{k}, half width': f(3, 10, width=.5).to(memory_format=torch.channels_last) for k, f in nets.items()}
    return {f'{k}, {n} thread{"s"*(n > 1)}': work(net, n) for k, net in nets.items() for n in (1, 2)}


BENCHMARKS = {'xresnet_training': training, 'xresnet_inference': inference, 'xresnet_pooling': pooling, 'threads': threads}
