"""A training in several sittings: what a script of experiments/ needs so that a broken-off arm goes on where it stopped, and its seconds add up."""
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

RUNS = Path(__file__).parent.parent/'runs'                                          # not committed


@contextmanager
def sitting(folder):
    "Yields `seconds()`: CPU seconds (all threads) of this sitting and of the earlier ones in `folder`. A `kill` ends it as Ctrl-C does; `kill -9` forgets its seconds."
    file, started = Path(folder)/'cpu_seconds', time.process_time()
    file.parent.mkdir(parents=True, exist_ok=True)
    before = float(file.read_text()) if file.exists() else 0.
    def seconds(): return before + time.process_time() - started
    old = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try: yield seconds
    finally:
        file.write_text(f'{seconds():.3f}')
        signal.signal(signal.SIGTERM, old)
