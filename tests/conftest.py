"""What the tests share: the project's root, a home of their own, and an environment that chooses small data."""
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run: what passed here does not fail elsewhere by the luck of a draw. `pytest -m hypothesis --hypothesis-profile search` draws new ones.
# No examples are given up because a busy machine makes them slowly.
settings.register_profile('fixed', derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile('search', derandomize=False, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('fixed')

ROOT = Path(__file__).resolve().parent.parent
LESSONS, MORE = (sorted(p for p in (ROOT/folder).glob('*.ipynb') if p.name[0] not in '._') for folder in ('nbs', 'nbs/more'))
NBS = sorted([*LESSONS, *MORE], key=lambda p: p.name)                     # in the order of their numbers, index last


def small_env(home):
    "Environment of a subprocess that must see the drawn data only, and a data folder of its own."
    env = {k: v for k, v in os.environ.items() if k not in ('EXP_MIRROR', 'EXP_DATA')}
    return {**env, 'FASTAI_HOME': str(home), 'EXP_DATA': 'sample', 'EXP_NO_BAR': '1', 'PYTHONWARNINGS': 'ignore', 'OMP_NUM_THREADS': '1',
            'no_proxy': '*', 'NO_PROXY': '*', 'MPLBACKEND': env.get('MPLBACKEND', 'agg')}                  # servers of tests are on this machine


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    "`-n auto`: one process a core, and one more, for some tests wait for processes of their own; fewer where memory is short (1.5 GB each)."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    try:
        quota, period = Path('/sys/fs/cgroup/cpu.max').read_text().split()         # a container may have a share of the cores it sees
        cores = min(cores, max(1, int(quota)//int(period)))
    except (OSError, ValueError): pass
    try: from psutil import virtual_memory
    except ImportError: return cores + 1
    return max(1, min(cores + 1, int(virtual_memory().available/1.5e9)))


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    "One data folder for the session and all its processes (`-n`)."
    base = tmp_path_factory.getbasetemp()
    return (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/'fastai'


@pytest.fixture(scope='session')
def data_home(home):
    "The same with the drawn sample in it: the first test that wants it draws it."
    from exp.datasets import URLs, untar_data
    untar_data(URLs.SAMPLE, base=home/'data')                                          # two at once: one works, the others wait for it
    return home


@pytest.fixture(autouse=True)
def no_real_home(home, monkeypatch):
    "No test reads or writes the reader's own ~/.fastai, nor goes to a mirror it did not make."
    monkeypatch.setenv('FASTAI_HOME', str(home))
    monkeypatch.delenv('EXP_MIRROR', raising=False)
    monkeypatch.delenv('EXP_DATA', raising=False)
    for k in ('no_proxy', 'NO_PROXY'): monkeypatch.setenv(k, '*')                      # servers of tests are on this machine


def python(*args, env=None, **kw):
    "Run this Python on `args`, in the project's root, and return the finished process."
    import subprocess
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, **kw)


@contextmanager
def largest_file(n):
    "Inside, no file can grow beyond `n` bytes: a disk that is full."
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wants_sigint():
    "For `preexec_fn`: a process started in the background of a shell ignores Ctrl-C, and so would its children."
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
