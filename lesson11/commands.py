"""`exp-train` and `exp-predict`, without torch: Ctrl-C while it is imported is no traceback."""
import sys
from importlib import import_module


def start(command, module):
    "Imports `module` and runs its `main`. The exit status; 130: interrupted before it began."
    try: main = import_module(module).main
    except KeyboardInterrupt:
        print(f'{command}: interrupted', file=sys.stderr)
        return 130
    return main()


def train(): return start('exp-train', 'exp.train')
def predict(): return start('exp-predict', 'exp.predict')
