"""pins.py oldest|tested: constraints for pip, on stdout; needs nothing installed.

oldest: the lower bounds of settings.ini, `>=` read as `==`; with Python 3.10, which has wheels for all of them.
tested: what is installed here, the requirements and what they stand on; `constraints.txt` is made so."""
import re, sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

INDIRECT = ('numpy', 'fastprogress', 'clarabel', 'osqp', 'scs', 'pillow', 'ipython', 'jupyter-client', 'nbclient',
            'nbformat', 'setuptools')

def needs():
    "Name -> what is said about its version, for every requirement of settings.ini."
    cfg = ConfigParser(delimiters=['=']); cfg.read(Path(__file__).parent.parent/'settings.ini', encoding='utf-8')
    return dict(re.match(r'([\w-]+)(.*)', o).groups() for k,v in cfg['DEFAULT'].items() if k.endswith('requirements')
                for o in v.split())

def oldest():
    "name==lower bound, where there is one."
    for name, said in needs().items():
        if m := re.search(r'>=([\w.]+)', said): yield f'{name}=={m[1]}'

def tested():
    "name==installed version without its build, for what is installed."
    yield f'# Python {sys.version_info.major}.{sys.version_info.minor}; made by `python scripts/pins.py tested`'
    for name in sorted({*needs(), *INDIRECT}):
        try: yield f"{name}=={version(name).split('+')[0]}"
        except PackageNotFoundError: pass

if __name__ == '__main__':
    make = dict(oldest=oldest, tested=tested).get(' '.join(sys.argv[1:]))
    if make is None: sys.exit(__doc__)
    print('\n'.join(make()))
